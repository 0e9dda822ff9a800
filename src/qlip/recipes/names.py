"""What recipes there are, and what each is: known without importing them, which brings PyTorch."""

import ast
from pathlib import Path

_MACHINERY = (
    "__init__", "names", "run", "record", "stage1", "stage2", "calibrate", "export", "plain", "card", "llava",
    "t2i", "um3",
)  # fmt: skip

T2I = {
    "t2i-xl": "LlamaGen's GPT-XL on 2 × 14 bits a token, after FLAN-T5-XL, as in the paper.",
    "t2i-tiny": "3.2 M parameters, chains of 4 × 7 bits, on qlip-tiny's tokens, after its text tower, on a CPU.",
}
UM3 = {
    "um3-1b": "Llama-3.2-1B that describes and draws, on 2 × 14 bits a token, as in the paper.",
    "um3-tiny": "a small writer of stories that does, on qlip-tiny's tokens and a CPU.",
}
LLAVA = {
    "llava-pretrain": "LLaVA-1.5's first stage: the projector, on 558 k captions, lr 1e-3, batch 256",
    "llava-finetune": "its second: projector and language model, on 665 k conversations, lr 2e-5, batch 128",
    "llava-tiny-pretrain": "the first stage with qlip-tiny and a language model as small, in minutes on a CPU",
    "llava-tiny-finetune": "the second stage after it",
}


def tokenizers() -> dict[str, str]:
    """Recipes of tokenizers, each a file of this package, and what its docstring begins with."""
    files = [file for file in sorted(Path(__file__).parent.glob("*.py")) if file.stem not in _MACHINERY]
    return {file.stem.replace("_", "-"): _about(file) for file in files}


def _about(file: Path) -> str:
    doc = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return doc.partition("\n")[0].partition(": ")[2]
