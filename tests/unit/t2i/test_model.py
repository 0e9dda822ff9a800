"""The loss is the product of the generator's own probabilities, and its size is LlamaGen's."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tests.unit.t2i.conftest import BASE, CLASSES, small_config, small_t2i

from qlip.bits import tokens_to_sub_tokens
from qlip.errors import InputError
from qlip.lm.generate import Sampling
from qlip.lm.transformer import Cache
from qlip.recipes.t2i import RECIPES
from qlip.t2i.checkpoint import load, save, skeleton
from qlip.t2i.config import SIZES, T2IConfig
from qlip.t2i.model import pad_left

PLAIN = Sampling()
FORMS = {
    "2 slots": {},
    "1 slot": {"bits": 8},
    "8 slots": {"bits": 1},
    "bits": {"embedding": "bits"},
    "classes": CLASSES,
    "parallel": {"head": "parallel"},
    "chain": {"head": "chain"},
    "8 bits in a chain": {"head": "chain", "bits": 1},
    "bits in a chain": {"head": "chain", "embedding": "bits", **CLASSES},
}


def conditions(model, count: int, seed: int = 1) -> list[torch.Tensor]:
    """Texts of 1 to 5 tokens, or labels."""
    generator = torch.Generator().manual_seed(seed)
    if model.config.with_classes:
        return list(torch.randint(0, model.config.num_classes, (count,), generator=generator))
    width = model.config.condition_width
    return [torch.randn(1 + (3 * i) % 5, width, generator=generator) for i in range(count)]


def pictures(model, count: int) -> torch.Tensor:
    config = model.config
    shape = (count, config.grid[0] * config.grid[1], config.num_slots)
    return torch.randint(0, 2**config.bits, shape, generator=torch.Generator().manual_seed(2))


def loss(model, rows, sub_tokens, dropped=None):
    dropped = torch.zeros(len(rows), dtype=torch.bool) if dropped is None else torch.tensor(dropped)
    return model(*pad_left(rows), sub_tokens, dropped)


@torch.no_grad()
def step_by_step(model, row, sub_tokens, dropped: bool) -> float:
    """−ln p of one picture by the cached steps that `generate` takes, written out."""
    prefix = model.condition(row[None], torch.tensor([dropped]))
    prefix = prefix[:, -1:] if dropped else prefix
    positions, slots = model._places(torch.device("cpu"))
    parts, total = model._parts(), 0.0
    tokens = sub_tokens.reshape(len(positions), -1)
    cache = Cache(model.lm, torch.zeros(1, dtype=torch.long), prefix.shape[1] + len(tokens))
    hidden = model.lm(prefix, torch.zeros(1, prefix.shape[1], 2, dtype=torch.long), cache=cache)[:, -1]
    for i, token in enumerate(tokens):
        for j, target in enumerate(token):
            logits = parts.logits(hidden, token[None, :j]) if parts else model.lm.logits(hidden)
            total -= float(F.log_softmax(logits[0], -1)[target])
        x = parts.embed(token[None]) if parts else model.lm.embed(token, slots[i])
        hidden = model.lm(x[:, None], positions[None, i : i + 1], cache=cache)[:, -1]
    return total


@pytest.mark.parametrize("form", FORMS)
def test_the_loss_is_the_product_of_the_generators_own_steps(form):
    model = small_t2i(**FORMS[form])
    rows, sub_tokens = conditions(model, 4), pictures(model, 4)
    dropped = [False, True, False, True]
    expected = sum(map(step_by_step, [model] * 4, rows, sub_tokens, dropped))
    found = loss(model, rows, sub_tokens, dropped).item() * sub_tokens.numel()
    assert abs(found - expected) < 1e-5 * expected  # measured: 3e-7
    bits = model.bits_per_image(found / sub_tokens.numel())
    assert abs(bits - expected / 4 / math.log(2)) < 1e-4 * bits


@pytest.mark.parametrize("form", FORMS)
def test_an_untrained_model_needs_the_raw_bits(form):
    torch.manual_seed(0)
    model = small_t2i(**FORMS[form])
    torch.nn.init.zeros_(model.lm.head)  # as a model begins
    rows = conditions(model, 2)
    assert abs(model.bits_per_image(loss(model, rows, pictures(model, 2)).item()) - 6 * 8) < 1e-4


@pytest.mark.parametrize("form", FORMS)
def test_a_seed_gives_the_same_picture_alone_and_in_a_batch(form):
    model = small_t2i(**FORMS[form])
    rows = conditions(model, 5)
    sampling = Sampling(guidance_scale=2.0, top_k=9)
    together = model.generate(rows, sampling, seeds=range(5))
    assert together.shape == (5, 6) and together.min() >= 0 and together.max() < 256
    for i, row in enumerate(rows):
        assert torch.equal(model.generate([row], sampling, seeds=[i])[0], together[i])
    assert len({tuple(row) for row in together.tolist()}) == 5


def test_guidance_of_one_is_the_condition_alone_and_of_zero_is_without_it():
    model = small_t2i()
    rows = conditions(model, 3)
    plain = model.generate(rows, PLAIN)
    nearly = model.generate(rows, Sampling(guidance_scale=1 + 1e-6))
    assert torch.equal(plain, nearly)
    without = model.generate(rows, Sampling(guidance_scale=0.0))
    assert torch.equal(without, model.generate(rows[::-1], Sampling(guidance_scale=0.0)))
    assert not torch.equal(plain, without)


@pytest.mark.parametrize("head", ["sequence", "parallel", "chain"])
def test_generated_tokens_follow_the_models_distribution(head):
    """Of two sub-tokens of a bit each: 4,000 pictures against the exact probabilities, by χ² of 3 degrees."""
    model = small_t2i(num_bits=2, bits=1, grid=(1, 1), head=head)
    row = conditions(model, 1)[0]
    every = torch.arange(4)[:, None]
    exact = [math.exp(-step_by_step(model, row, tokens_to_sub_tokens(t[None], 2, 1), False)) for t in every]
    drawn = model.generate([row] * 4000, PLAIN, seeds=range(4000)).flatten()
    counts = torch.bincount(drawn, minlength=4).double()
    expected = 4000 * torch.tensor(exact, dtype=torch.float64)
    assert abs(sum(exact) - 1) < 1e-5
    assert float(((counts - expected) ** 2 / expected).sum()) < 16.3  # 1 in 1,000


def test_padding_and_company_change_no_loss():
    model = small_t2i()
    rows, sub_tokens = conditions(model, 4), pictures(model, 4)
    alone = [loss(model, [row], picture[None]).item() for row, picture in zip(rows, sub_tokens, strict=True)]
    assert abs(loss(model, rows, sub_tokens).item() - sum(alone) / 4) < 1e-6


def test_a_dropped_condition_leaves_no_trace():
    model = small_t2i()
    rows, sub_tokens = conditions(model, 3), pictures(model, 3)
    others = [torch.randn(5, 12) for _ in rows]
    everyone = [True] * 3
    torch.testing.assert_close(
        loss(model, rows, sub_tokens, everyone), loss(model, others, sub_tokens, everyone), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("form", FORMS)
def test_every_parameter_learns(form):
    model = small_t2i(**FORMS[form]).train()
    loss(model, conditions(model, 2), pictures(model, 2), [False, True]).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


@pytest.mark.parametrize("size, millions", [("b", 111), ("l", 343), ("xl", 775)])
def test_sizes_are_llamagens(size, millions):
    """Its class-conditional models, with 16,384 tokens and 1,000 classes; the second slot is ours."""
    shape = {"num_bits": 28, "bits": 14, "grid": (16, 16), "num_classes": 1000}
    rest = {"condition": "classes", "condition_width": 0, "num_text_tokens": 1, "tokenizer": "", "id_hash": ""}
    model = skeleton(T2IConfig.of(SIZES[size], **shape, **rest))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions


def test_a_folder_holds_all_of_it(tmp_path):
    model = small_t2i(embedding="bits")
    save(model, tmp_path)
    again = load(tmp_path, id_hash=model.config.id_hash)
    assert again.config == model.config and not again.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    assert not [path for path in tmp_path.iterdir() if path.name not in ("config.json", "model.safetensors")]


def test_a_folder_of_half_the_size_holds_what_bfloat16_does(tmp_path):
    model = small_t2i(head="chain")
    save(model, tmp_path, dtype=torch.bfloat16)
    assert all(value.dtype == torch.bfloat16 for value in load_file(tmp_path / "model.safetensors").values())
    for dtype in (torch.float32, torch.bfloat16):
        again = load(tmp_path, dtype=dtype)
        for name, value in model.state_dict().items():
            assert torch.equal(value.bfloat16().to(dtype), again.state_dict()[name])


def test_the_tiny_one_is_small_enough_to_bundle():
    recipe = RECIPES["t2i-tiny"]
    shape = {"num_bits": 28, "bits": recipe.bits, "grid": (8, 8), "head": recipe.head}
    rest = BASE | shape | {"condition_width": 128, "num_text_tokens": 32}
    model = skeleton(T2IConfig.of(SIZES["tiny"], **rest))
    assert 2 * sum(p.numel() for p in model.parameters()) < 8_000_000


def test_only_a_chain_knows_what_the_sub_tokens_of_a_token_say_of_each_other():
    """Logits of the second sub-token, after two first ones."""
    for head, depends in (("parallel", False), ("chain", True)):
        model = small_t2i(head=head)
        hidden = torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
        one, other = (model._parts().logits(hidden, torch.tensor([[i]])) for i in (3, 4))
        assert torch.equal(one, other) != depends


def test_errors_say_what_to_do(tmp_path):
    model = small_t2i()
    save(model, tmp_path / "model")
    with pytest.raises(InputError, match="ids 0123456789abcdef of 'qlip-tiny'.*use the tokenizer"):
        load(tmp_path / "model", id_hash="f" * 16)
    with pytest.raises(InputError, match="not a text-to-image model"):
        load(tmp_path)
    (tmp_path / "model" / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="not the model of its config"):
        load(tmp_path / "model")
    with pytest.raises(InputError, match="text has 6 tokens: this model reads 1 to 5"):
        model.generate([torch.zeros(6, 12)])
    with pytest.raises(InputError, match="text has 0 tokens"):
        model.generate([torch.zeros(0, 12)])
    with pytest.raises(InputError, match="condition_dropout, and this has 0"):
        small_t2i(condition_dropout=0.0).generate(conditions(model, 1))
    with pytest.raises(InputError, match="knows 0 to 6"):
        small_t2i(**CLASSES).generate([torch.tensor(7)], PLAIN)
    with pytest.raises(InputError, match="this model's have 12"):
        loss(model, conditions(model, 1), torch.zeros(1, 6, 1, dtype=torch.long))
    with pytest.raises(InputError, match="bits 3 does not divide the 8"):
        small_config(bits=3)
    with pytest.raises(InputError, match="lm.vocab_size is 16, but these sub-tokens need 256"):
        replace(small_config(), bits=8)
    with pytest.raises(InputError, match="head is 'depth': choose sequence, parallel or chain"):
        small_config(head="depth")
    with pytest.raises(InputError, match="lm.vocab_size is 16, but these sub-tokens need 32"):
        replace(small_config(), head="chain")
    with pytest.raises(InputError, match="num_classes 3"):
        small_config(num_classes=3)
