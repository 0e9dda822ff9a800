"""Checkpoints of `transformers` give here the logits that they give there, and the other way round."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.unit.lm.conftest import LLAMA3, small_lm

from qlip.errors import InputError
from qlip.lm.checkpoint import config_from_dict, load, save
from qlip.lm.config import RopeScaling

PEERS = {
    "llama 2": ("Llama", {"num_key_value_heads": 4}),
    "llama 3": ("Llama", {"rope_theta": 5e5, "rope_scaling": LLAMA3}),
    "llama 3, tied": ("Llama", {"rope_theta": 5e5, "rope_scaling": LLAMA3, "tie_word_embeddings": True}),
    "llama, one head of keys": ("Llama", {"num_key_value_heads": 1, "rms_norm_eps": 1e-5, "hidden_size": 48}),
    "llama, wide heads": ("Llama", {"head_dim": 32}),
    "llama, sharded": ("Llama", {"shard": "50KB"}),
    "qwen 3": ("Qwen3", {"head_dim": 24, "rope_theta": 1e6}),
    "qwen 3, tied, sharded": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True, "shard": "50KB"}),
}


@pytest.mark.parametrize("name", PEERS)
def test_logits_equal_those_of_transformers_both_ways(peer, tmp_path, name):
    """Worst case measured: no difference at all, logits up to 6; the tolerance leaves room for other versions."""
    transformers = pytest.importorskip("transformers")
    kind, changes = PEERS[name]
    theirs, folder = peer(kind, **changes)
    assert ("shard" in changes) == (folder / "model.safetensors.index.json").exists()
    ids = torch.randint(0, 99, (2, 100), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(ids).logits
        ours = load(folder)
        torch.testing.assert_close(ours.logits(ours(ids)), expected, rtol=0, atol=1e-5)
        save(ours, tmp_path / "again", shard_bytes=50_000 if "shard" in changes else 10**9)
        again, report = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "again", output_loading_info=True
        )
        assert not any(report.values()) and type(again) is type(theirs)
        assert torch.equal(again(ids).logits, expected)
    assert again.config.eos_token_id is None
    assert load(tmp_path / "again").config == ours.config


def test_qk_norm_with_llama_3_scaling_is_a_qwen_3(tmp_path):
    """As UM3 is exported: Llama-3.2's positions, Qwen3's norms."""
    transformers = pytest.importorskip("transformers")
    ours = small_lm(qk_norm=True, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 64), bos_token_id=1, eos_token_id=(2, 3))
    save(ours, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(theirs, transformers.Qwen3ForCausalLM) and theirs.config.eos_token_id == [2, 3]
    ids = torch.randint(0, 99, (2, 100))
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(ours(ids)), theirs(ids).logits, rtol=0, atol=1e-5)


def test_what_is_saved_comes_back_bit_for_bit_over_what_was_there(tmp_path):
    first = small_lm(0)
    second = small_lm(1, tie_word_embeddings=True, qk_norm=True, head_dim=16).to(torch.bfloat16)
    (tmp_path / "tokenizer.json").write_text("{}")
    save(first, tmp_path, shard_bytes=50_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    save(second, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    again = load(tmp_path, dtype=torch.bfloat16)
    assert again.config == second.config and not again.training
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in second.state_dict().items())
    loaded = load(tmp_path, dtype=torch.bfloat16)
    save(loaded, tmp_path)  # over the file that it is mapped from
    assert torch.equal(loaded.norm.weight, load(tmp_path, dtype=torch.bfloat16).norm.weight)


def test_files_of_transformers_4_and_before(tmp_path):
    """`rope_scaling` with `type`; rotary tables among the weights; the embedding twice in a tied checkpoint."""
    save(small_lm(tie_word_embeddings=True), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    old = config | {"rope_scaling": LLAMA3 | {"type": "llama3"}, "rope_theta": 5e5}
    del old["head_dim"], old["rope_scaling"]["rope_type"]
    assert config_from_dict(old) == replace(
        config_from_dict(config), rope_theta=5e5, head_dim=None, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 64)
    )
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / "model.safetensors")
    assert load(tmp_path).lm_head is None


def test_absent_keys_mean_what_they_mean_there():
    transformers = pytest.importorskip("transformers")
    for kind, theirs in (("llama", transformers.LlamaConfig()), ("qwen3", transformers.Qwen3Config())):
        ours = config_from_dict({"model_type": kind, "vocab_size": 7})
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps"):
            assert getattr(ours, name) == getattr(theirs, name)
        assert ours.head_width == theirs.head_dim and not ours.tie_word_embeddings
        assert ours.rope_theta == theirs.rope_parameters["rope_theta"]


BAD_CONFIGS = {
    "model_type is 'mistral': only llama and qwen3": {"model_type": "mistral"},
    r"model_type is \['llama'\]: only llama and qwen3": {"model_type": ["llama"]},
    "hidden_act is 'gelu': only checkpoints with 'silu'": {"hidden_act": "gelu"},
    "attention_bias is True": {"attention_bias": True},
    "rope_type is 'yarn': only checkpoints with 'default' or 'llama3'": {"rope_scaling": {"rope_type": "yarn"}},
    "num_key_value_heads 3 does not divide": {"num_key_value_heads": 3},
    "'factor'": {"rope_scaling": {"rope_type": "llama3"}},
}


@pytest.mark.parametrize("message", BAD_CONFIGS)
def test_other_architectures_are_refused_by_name(tmp_path, message):
    save(small_lm(), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | BAD_CONFIGS[message]))
    with pytest.raises(InputError, match=f"config.json' is not a usable model configuration: .*{message}"):
        load(tmp_path)


def test_weights_that_are_not_the_models_are_named(tmp_path):
    with pytest.raises(InputError, match="config.json' is not a usable .*No such file"):
        load(tmp_path)
    save(small_lm(), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.9.mlp.up_proj.weight"] = weights.pop("lm_head.weight")
    weights["model.norm.weight"] = torch.ones(3)
    weights["model.layers.0.mlp.up_proj.weight"] = torch.ones(96, 64, dtype=torch.int8)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(InputError) as error:
        load(tmp_path)
    for part in (
        "it lacks lm_head.weight",
        "it has besides model.layers.9.mlp.up_proj.weight",
        "model.norm.weight is (3,), not (64,)",
        "these are no weights: model.layers.0.mlp.up_proj.weight is I8",
    ):
        assert part in str(error.value)
    (tmp_path / "model.safetensors").write_bytes(b"version https://git-lfs")
    with pytest.raises(InputError, match=r"model.safetensors' cannot be read .*whole safetensors"):
        load(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "b.safetensors"}}))
    with pytest.raises(InputError, match="b.safetensors' cannot be read"):
        load(tmp_path)


def test_a_model_for_images_is_no_llama(tmp_path):
    with pytest.raises(InputError, match="rope_axes 2 with num_slots 2 is neither"):
        save(small_lm(rope_axes=2, num_slots=2), tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        save(small_lm(), tmp_path / "file" / "folder")
