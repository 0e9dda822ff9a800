"""Who may import whom (the walls of the house), and what may be imported at all."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import qlip

SRC = Path(qlip.__file__).parent

# A room may import itself and the rooms of a lower rank; rooms of one rank do not know each other.
RANK = {
    "errors": -1,
    "guarded": 0,
    "files": 1,
    "image_files": 1,
    "environment": 1,
    "machine": 1,
    "precision": 1,
    "bits": 1,
    "data": 2,
    "model": 2,
    "lm": 2,
    "train": 3,
    "eval": 4,
    "t2i": 4,
    "um3": 4,
    "integrations": 4,
    "llava": 5,
    "jobs": 5,
    "recipes": 6,
    "demo": 7,
    "figures": 7,
    "serve": 7,
    "cli": 8,
    "__init__": 9,
}
CORE = {"torch", "numpy", "safetensors", "PIL", "tokenizers", "huggingface_hub", "pyarrow", "tyro", "rich"}
MODEL_ONLY = {"torch", "numpy", "safetensors", "PIL", "tokenizers", "huggingface_hub"}
OPTIONAL = {  # the one file or folder, or the few, that may import it
    "matplotlib": "train/plot.py",
    "wandb": "train/trackers.py",
    "torch_fidelity": "eval/inception.py",
    "fsspec": "data/remote.py",
    "datasets": "data/hub.py",
    "ray": "integrations/ray.py",
    "onnx": "integrations/onnx.py",
    "onnxscript": "integrations/onnx.py",
    "onnxruntime": "integrations/onnx.py",
    "transformers": (
        "integrations/transformers/",
        "llava/model.py",
        "t2i/transformers_reader.py",
        "jobs/vision_model.py",
        "eval/clip_score.py",
    ),
    "peft": "llava/task.py",
    "lm_eval": "eval/language.py",
    "pycocoevalcap": "eval/captions.py",
}


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "qlip":
                found |= {f"qlip.{alias.name}" if (SRC / alias.name).exists() else "qlip" for alias in node.names}
            else:
                found.add(node.module or "")
    return found


FILES = sorted(SRC.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_imports_go_downwards(path):
    own = path.relative_to(SRC).with_suffix("").parts[0]
    for module in imports(path):
        if module.split(".")[0] != "qlip" or (own == "__init__"):
            continue
        other = room(module)
        if module == "qlip":
            assert RANK[own] >= 7, f"{path.name}: `import qlip` is for the command line and those above it"
        elif other != own:
            assert RANK[other] < RANK[own], f"{path.relative_to(SRC)} imports {module}: {own} may not know {other}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_third_party_imports_are_declared(path):
    relative = path.relative_to(SRC)
    third_party = {m.split(".")[0] for m in imports(path)} - sys.stdlib_module_names - {"qlip"}
    for name in third_party - CORE:
        home = OPTIONAL.get(name, "nowhere")
        assert relative.as_posix().startswith(home), f"{relative} imports {name}: not a core dependency"
    if relative.parts[0] in ("model", "lm"):
        assert third_party <= MODEL_ONLY
    if "huggingface_hub" in third_party:
        assert relative.as_posix() == "model/hub.py"


def test_importing_qlip_and_its_help_is_cheap():
    code = "import sys, qlip, qlip.cli; print('torch' in sys.modules, 'transformers' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "False"]


def test_torchvision_and_pickle_loading_are_nowhere():
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert "torchvision" not in imports(path)
        # `data/delivery.py` reads what a worker of its own has written, and no file.
        assert "import pickle" not in text or path == SRC / "data/delivery.py"
        assert "torch.load(" not in text or "weights_only=True" in text, path
