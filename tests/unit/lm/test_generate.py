"""Tokens and filtered logits are those of `transformers`; the rest is compared with the uncached forward."""

from dataclasses import replace

import pytest
import torch
from tests.unit.lm.conftest import small_lm

from qlip.errors import InputError
from qlip.lm import generate as module
from qlip.lm.checkpoint import load
from qlip.lm.generate import GREEDY, Parts, Sampling, generate, guide, restrict, sample
from qlip.lm.transformer import grid_positions

LENGTHS = (3, 17, 1, 9)


def prompts(lengths=LENGTHS) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 99, (length,), generator=generator) for length in lengths]


@pytest.mark.parametrize("kind", ("Llama", "Qwen3"))
def test_greedy_text_of_a_padded_batch_is_that_of_transformers(peer, kind):
    theirs, folder = peer(kind, head_dim=16)
    inputs = torch.nn.utils.rnn.pad_sequence(prompts(), batch_first=True, padding_side="left")
    mask = torch.stack([torch.arange(17) >= 17 - length for length in LENGTHS]).long()
    expected = theirs.generate(inputs, attention_mask=mask, max_new_tokens=40, do_sample=False, pad_token_id=0)
    assert torch.equal(generate(load(folder), prompts(), 40), expected[:, 17:])


FILTERS = (
    {"top_k": 5},
    {"top_k": 1},
    {"top_p": 0.7},
    {"top_p": 1e-6},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
    {"temperature": 3.0, "top_k": 10**6},
)


@pytest.mark.parametrize("settings", FILTERS, ids=str)
def test_filters_leave_what_those_of_transformers_leave(settings):
    processors = pytest.importorskip("transformers.generation.logits_process")
    scores = 3 * torch.randn(64, 200, generator=torch.Generator().manual_seed(0))
    expected = scores / settings.get("temperature", 1.0)
    for name in ("top_k", "top_p", "min_p"):
        if name in settings:
            kind = {"top_k": "TopK", "top_p": "TopP", "min_p": "MinP"}[name]
            expected = getattr(processors, f"{kind}LogitsWarper")(settings[name])(None, expected)
    assert torch.equal(restrict(scores, Sampling(**settings)), expected)


def test_tokens_are_drawn_as_often_as_they_are_likely():
    """With noise that is spread evenly each token comes as often as its probability says, to one draw."""
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(0)) * 2
    logits[0, [0, 7, 49]] = -torch.inf
    count = 20_000
    noise = (torch.arange(count) + 0.5) / count
    drawn = sample(logits.expand(count, -1), Sampling(), noise)
    frequencies = drawn.bincount(minlength=50) / count
    assert (frequencies - logits[0].softmax(-1)).abs().max() < 1.5 / count
    ends = torch.tensor([0.0, 1 - 2**-24])  # the first and the last token that may be drawn
    assert sample(logits.expand(2, -1), Sampling(), ends).tolist() == [1, 48]
    assert sample(logits, GREEDY, noise[:1]).item() == logits.argmax()


SETTINGS = Sampling(temperature=1.2, top_k=60, top_p=0.95)


def test_seeds_reproduce_and_a_row_is_the_same_alone_and_in_any_batch():
    model = small_lm()
    seeds = [5, 6, 2**40, 5]
    batch = generate(model, prompts(), 30, SETTINGS, seeds=seeds)
    assert torch.equal(generate(model, prompts(), 30, SETTINGS, seeds=seeds), batch)
    for i, prompt in enumerate(prompts()):
        assert torch.equal(generate(model, [prompt], 30, SETTINGS, seeds=seeds[i : i + 1])[0], batch[i])
    same = generate(model, [prompts()[0]] * 3, 30, SETTINGS, seeds=[1, 2, 1])
    assert torch.equal(same[0], same[2]) and not torch.equal(same[0], same[1])
    assert torch.equal(
        generate(model, prompts(), 5, SETTINGS), generate(model, prompts(), 5, SETTINGS, seeds=range(4))
    )


def test_guidance_is_two_halves_of_one_batch():
    """Against two uncached passes a step; conditional and unconditional prompts differ in length."""
    model, sampling = small_lm(), replace(SETTINGS, guidance_scale=3.0)
    unconditional = [prompt[:1] for prompt in prompts()]
    tokens = generate(model, prompts(), 12, sampling, unconditional=unconditional)
    for i, (with_it, without) in enumerate(zip(prompts(), unconditional, strict=True)):
        noise = torch.rand(12, generator=torch.Generator().manual_seed(i))
        for step in range(12):
            conditional, plain = (
                model.logits(model(torch.cat((prompt, tokens[i, :step]))[None]))[:, -1].detach()
                for prompt in (with_it, without)
            )
            guided = plain + 3.0 * (conditional - plain)
            torch.testing.assert_close(guide(torch.cat((conditional, plain)), 3.0), guided)
            assert sample(guided, sampling, noise[step : step + 1]) == tokens[i, step]
    assert not torch.equal(generate(model, prompts(), 12, SETTINGS), tokens)
    assert torch.equal(
        generate(model, prompts(), 12, SETTINGS, unconditional=unconditional),
        generate(model, prompts(), 12, SETTINGS),
    )


def test_an_image_after_a_prefix_of_vectors():
    """Text-to-image: a prefix of embeddings at (0, 0), then sub-tokens of a grid; against the uncached forward."""
    model = small_lm(rope_axes=2, num_slots=2, qk_norm=True)
    prefixes = [torch.randn(length, 64, generator=torch.Generator().manual_seed(length)) for length in (5, 8)]
    positions, slots = grid_positions(3, 2, num_slots=2), torch.arange(12) % 2
    tokens = generate(model, prefixes, 12, SETTINGS, seeds=[3, 4], positions=positions, slots=slots)
    for prefix, row, seed in zip(prefixes, tokens, (3, 4), strict=True):
        inputs = torch.cat((prefix, model.embed(row[:-1], slots[:-1])))
        places = torch.cat((torch.zeros(len(prefix), 2), positions[:-1]))
        logits = model.logits(model(inputs[None], places[None]))[0, len(prefix) - 1 :].detach()
        noise = torch.rand(12, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(sample(logits, SETTINGS, noise), row)


def test_what_may_come_next_depends_on_what_came():
    """As in UM3: after token 50 exactly three of the upper vocabulary, elsewhere the lower one, in each row."""

    def allowed(tokens: torch.Tensor) -> torch.Tensor:
        begun = (tokens[:, -3:] == 50).any(dim=1) if tokens.shape[1] else torch.zeros(4, dtype=torch.bool)
        return (torch.arange(99) > 50) == begun[:, None]

    model = small_lm()
    tokens = generate(model, prompts(), 100, Sampling(temperature=8.0), allowed=allowed)
    begins = (tokens == 50).nonzero().tolist()
    assert len({row for row, _ in begins}) > 1
    upper = torch.zeros_like(tokens, dtype=torch.bool)
    for row, place in begins:
        upper[row, place + 1 : place + 4] = True
    assert torch.equal(tokens > 50, upper)
    assert set(generate(model, prompts(), 9, allowed=lambda tokens: torch.arange(99) == 7).flatten().tolist()) == {
        7
    }


def test_a_row_ends_with_a_stop_token():
    model = small_lm()
    free = generate(model, prompts(), 40, SETTINGS)
    stops = [int(free[0, 6]), int(free[1, 11])]
    tokens = generate(model, prompts(), 40, SETTINGS, stop_ids=stops)
    ends = []
    for row, whole in zip(tokens, free, strict=True):
        hits = torch.isin(whole, torch.tensor(stops)).nonzero()
        ends.append(int(hits[0]) if len(hits) else 39)
        assert torch.equal(row[: ends[-1] + 1], whole[: ends[-1] + 1][: len(row)])
        assert (row[ends[-1] :] == whole[ends[-1]]).all()
    assert tokens.shape[1] == max(ends) + 1 and min(ends) < max(ends)


def test_generation_takes_bfloat16_and_leaves_no_graph():
    model = small_lm().to(torch.bfloat16)
    embeds = [torch.randn(4, 64), torch.randn(2, 64)]  # float32, as another model may give them
    tokens = generate(model, embeds, 6, SETTINGS)
    assert tokens.shape == (2, 6) and not tokens.requires_grad


@pytest.mark.parametrize("kind", ("aot_eager", pytest.param("inductor", marks=pytest.mark.slow)))
def test_the_compiled_step_draws_the_same_tokens(monkeypatch, kind):
    torch.compiler.reset()
    model = small_lm()
    compiled = torch.compile(module._step, dynamic=False, backend=kind)
    monkeypatch.setattr(module, "_compiled", lambda device_type: compiled)
    with torch._dynamo.config.patch(error_on_recompile=True):  # one shape, one compilation, two batches
        tokens = generate(model, prompts(), 10, SETTINGS, compile=True)
        assert torch.equal(generate(model, prompts(), 10, SETTINGS, compile=True), tokens)
    assert torch.equal(generate(model, prompts(), 10, SETTINGS), tokens)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("compile", (False, True))
def test_a_gpu_draws_what_the_cpu_draws(compile):
    """In float32; a token whose noise falls between two rounded sums may differ, and what follows it."""
    model, sampling = small_lm(), replace(SETTINGS, guidance_scale=2.0)
    expected = generate(model, prompts(), 30, sampling, unconditional=prompts((1, 1, 1, 1)))
    model = model.cuda()
    for _ in range(2):
        tokens = generate(model, prompts(), 30, sampling, unconditional=prompts((1, 1, 1, 1)), compile=compile)
        assert (tokens.cpu() == expected).all(dim=1).float().mean() >= 0.75


BAD_SETTINGS = {
    "top_k is -1": {"top_k": -1},
    "temperature is -1.0": {"temperature": -1.0},
    "temperature is nan": {"temperature": float("nan")},
    "guidance_scale is inf": {"guidance_scale": float("inf")},
    "top_p is 0.0": {"top_p": 0.0},
    "min_p is 1.5": {"min_p": 1.5},
}


@pytest.mark.parametrize("message", BAD_SETTINGS)
def test_settings_that_cannot_be(message):
    with pytest.raises(InputError, match=message):
        Sampling(**BAD_SETTINGS[message])


BAD_ARGUMENTS = {
    "a prompt is empty": {"prompts": [torch.zeros(0, dtype=torch.long)]},
    "num_tokens is 0": {"num_tokens": 0},
    "there are no unconditional prompts": {"sampling": Sampling(guidance_scale=2.0)},
    "unconditional has 4 entries for 1 prompts": {
        "sampling": Sampling(guidance_scale=2.0),
        "unconditional": prompts(),
    },
    "seeds has 2 entries for 1 prompts": {"seeds": [1, 2]},
    "rope_axes is 1: positions": {"positions": grid_positions(2, 2)},
    "slots has 3 entries for 4 new tokens": {"slots": torch.arange(3)},
    "the sequence has 220 tokens": {"num_tokens": 220},
    "stop_ids, allowed and slots are of tokens that are one id": {
        "parts": Parts(2, torch.sum, torch.add),
        "stop_ids": [1],
    },
}


@pytest.mark.parametrize("message", BAD_ARGUMENTS)
def test_arguments_that_do_not_fit(message):
    arguments = {"prompts": prompts((1,)), "num_tokens": 4} | BAD_ARGUMENTS[message]
    with pytest.raises(InputError, match=message):
        generate(small_lm(), **arguments)


def test_a_model_in_training_is_refused():
    with pytest.raises(InputError, match=r"call its eval\(\)"):
        generate(small_lm(dropout=0.1).train(), prompts(), 2)


def test_a_tiny_temperature_takes_the_likeliest_token():
    logits = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
    for temperature in (1e-40, 1e-20):
        found = sample(logits, Sampling(temperature=temperature), torch.full((4,), 0.3))
        assert torch.equal(found, logits.argmax(-1))


@pytest.mark.parametrize("value", (torch.nan, torch.inf, -torch.inf))
@pytest.mark.parametrize("sampling", (GREEDY, Sampling(), Sampling(top_k=3, top_p=0.9, min_p=0.1)))
def test_logits_that_are_not_finite_give_an_error_and_no_id_out_of_range(value, sampling):
    row = torch.full((1, 10), value)
    assert 0 <= int(sample(row, sampling, torch.tensor([0.3]))) < 10
    model = small_lm()
    model.norm.weight.data.fill_(torch.nan if value != value else 3e38)
    with pytest.raises(InputError, match="logits are not finite in 1 of 1 rows"):
        generate(model, prompts([3]), 2, sampling)


def test_numpys_integers_are_integers():
    numpy = pytest.importorskip("numpy")
    expected = generate(small_lm(), prompts([3]), 4, Sampling(top_k=5), seeds=[7])
    found = generate(
        small_lm(), prompts([3]), numpy.int64(4), Sampling(top_k=numpy.int32(5)), seeds=numpy.arange(7, 8)
    )
    assert torch.equal(found, expected)
    with pytest.raises(InputError, match="top_k is 1.5: it must be an integer"):
        Sampling(top_k=1.5)
