"""What a model sees, and from where; checkpoints of `transformers` are compared in test_checkpoint.py."""

import pytest
import torch
from tests.unit.lm.conftest import SMALL, small_lm
from torch.nn.attention.flex_attention import create_block_mask

from qlip.errors import InputError
from qlip.lm.config import LMConfig
from qlip.lm.transformer import (
    Cache,
    Transformer,
    causal_mask,
    document_mask,
    grid_positions,
    rotary_tables,
    rotate,
)


def random_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 99, shape, generator=torch.Generator().manual_seed(seed))


def gradients(model: Transformer, loss: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True))


def test_a_token_sees_those_before_it_and_no_other():
    model = small_lm()
    ids = random_ids(1, 20)
    other = ids.clone()
    other[0, 10] = (ids[0, 10] + 1) % 99
    hidden, changed = model(ids), model(other)
    assert torch.equal(hidden[:, :10], changed[:, :10])
    assert (hidden[:, 10:] - changed[:, 10:]).abs().amin(dim=(0, 2)).max() > 1e-3
    torch.testing.assert_close(model(ids, mask=causal_mask(20)), hidden, rtol=0, atol=1e-5)
    assert torch.equal(model(model.embed(ids)), hidden)


def packed() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[tuple[int, int, int]]]:
    """Two rows of documents: ids, document ids, positions within them, and where each lies (row, from, to)."""
    places = [(0, 0, 7), (0, 7, 8), (0, 8, 24), (1, 0, 20), (1, 20, 24)]
    documents, positions = torch.empty(2, 24, dtype=torch.long), torch.empty(2, 24, dtype=torch.long)
    for i, (row, start, end) in enumerate(places):
        documents[row, start:end], positions[row, start:end] = i, torch.arange(end - start)
    return random_ids(2, 24), documents, positions, places


@pytest.mark.parametrize("qk_norm", (False, True))
def test_packed_documents_are_as_if_each_stood_alone(qk_norm):
    """Worst case measured: 2e-6 with hidden states up to 3.4; gradients 1.5e-6 of the largest."""
    model = small_lm(qk_norm=qk_norm)
    ids, documents, positions, places = packed()
    together = model(ids, positions, document_mask(documents))
    alone = [model(ids[row : row + 1, start:end]) for row, start, end in places]
    for (row, start, end), expected in zip(places, alone, strict=True):
        torch.testing.assert_close(together[row, start:end], expected[0], rtol=0, atol=1e-5)
    loss = sum(part.square().sum(dim=(0, 1)) for part in alone) @ torch.linspace(-1, 1, 64)
    packed_loss = together.square().sum(dim=(0, 1)) @ torch.linspace(-1, 1, 64)
    for one, other in zip(gradients(model, loss), gradients(model, packed_loss), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * one.abs().max().item())


@pytest.mark.slow
def test_flex_attention_equals_the_boolean_mask():
    """Its compiled form runs on a CPU without gradients."""
    model = small_lm(hidden_size=128)
    ids, documents, positions, _ = packed()

    def seen(row, head, query, key):
        return (query >= key) & (documents[row, query] == documents[row, key])

    blocks = create_block_mask(seen, 2, None, 24, 24, device="cpu")
    with torch.no_grad():
        expected = model(ids, positions, document_mask(documents))
        torch.testing.assert_close(model(ids, positions, blocks), expected, rtol=0, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("length", (24, 200))
def test_the_gpus_document_mask_equals_the_boolean_one(length):
    model = small_lm(hidden_size=128, max_position_embeddings=256).cuda()
    ids, documents = random_ids(2, length).cuda(), random_ids(2, length, seed=1).div(25, rounding_mode="floor")
    documents = documents.sort().values
    blocks, booleans = document_mask(documents.cuda()), document_mask(documents).cuda()
    expected, fast = model(ids, mask=booleans), model(ids, mask=blocks)
    torch.testing.assert_close(fast, expected, rtol=1e-3, atol=1e-3)
    weight = torch.linspace(-1, 1, 128).cuda()
    for one, other in zip(*(gradients(model, (x * weight).sum()) for x in (expected, fast)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2 * one.abs().max().item())


def test_two_axes_turn_by_row_and_column_distance_alone():
    config = LMConfig(**SMALL | {"rope_axes": 2})
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)

    def score(query: tuple[int, int], key: tuple[int, int]) -> float:
        turned = [rotate(x, rotary_tables(torch.tensor([[p]]), config)) for x, p in ((q, query), (k, key))]
        return (turned[0] * turned[1]).sum().item()

    assert score((5, 3), (2, 7)) == pytest.approx(score((9, 11), (6, 15)), abs=1e-5)
    assert abs(score((5, 3), (2, 7)) - score((3, 5), (7, 2))) > 1e-3
    pairs = torch.view_as_complex(torch.stack((q[0, 0, 0, :8], q[0, 0, 0, 8:]), dim=-1))
    angles = torch.cat([place * 10000.0 ** (-torch.arange(4, dtype=torch.float64) / 4) for place in (5, 3)])
    expected = torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles))
    turned = rotate(q, rotary_tables(torch.tensor([[(5, 3)]]), config))[0, 0, 0]
    torch.testing.assert_close(torch.stack((turned[:8], turned[8:]), dim=-1), expected, rtol=0, atol=1e-6)
    assert torch.equal(rotate(q, rotary_tables(torch.zeros(1, 1, 2), config)), q)  # the text before an image


def test_positions_of_a_grid_are_shared_by_sub_tokens():
    assert grid_positions(2, 3).tolist() == [[1, 1], [1, 2], [1, 3], [2, 1], [2, 2], [2, 3]]
    assert torch.equal(grid_positions(2, 3, num_slots=2)[1::2], grid_positions(2, 3))
    assert torch.equal(grid_positions(2, 3, num_slots=2)[::2], grid_positions(2, 3))


def test_a_slot_embedding_tells_sub_tokens_apart():
    model = small_lm(rope_axes=2, num_slots=2)
    ids = torch.full((1, 8), 7)
    positions, slots = grid_positions(2, 2, 2)[None], torch.arange(8) % 2
    embeds = model.embed(ids, slots)
    torch.testing.assert_close(
        embeds[0, 1] - embeds[0, 0], model.embed_slots.weight[1] - model.embed_slots.weight[0]
    )
    assert torch.equal(model.embed(ids), model.embed_tokens(ids))
    assert model(embeds, positions).isfinite().all()
    with pytest.raises(InputError, match="positions are missing"):
        model(embeds)
    with pytest.raises(InputError, match="num_slots is 0, but there are slots"):
        small_lm().embed(ids, slots)


@pytest.mark.parametrize("changes", ({}, {"qk_norm": True, "num_key_value_heads": 4}), ids=str)
def test_what_is_read_in_pieces_into_a_cache_equals_the_whole(changes):
    """Rows of several lengths, first in one pass, then one and several at a time. Worst case measured: 3e-6."""
    model = small_lm(**changes)
    ids, padding = random_ids(3, 30), torch.tensor([0, 4, 9])
    with torch.no_grad():
        whole = [model(row[None, pad:])[0] for row, pad in zip(ids, padding.tolist(), strict=True)]
        cache = Cache(model, padding, 40)
        pieces = torch.cat([model(part, cache=cache) for part in ids.split([12, 1, 1, 5, 11], dim=1)], dim=1)
    for row, pad, expected in zip(pieces, padding.tolist(), whole, strict=True):
        torch.testing.assert_close(row[pad:], expected, rtol=0, atol=1e-5)
    assert int(cache.length) == 30 and pieces.isfinite().all()


@pytest.mark.parametrize("bf16", (False, True))
def test_recomputation_changes_nothing(bf16):
    model = small_lm(dropout=0.1, qk_norm=True).train()
    results = []
    for model.recompute in (False, True):
        torch.manual_seed(5)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model.logits(model(random_ids(2, 16))).float().logsumexp(-1).mean()
        results.append((loss, *gradients(model, loss)))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_bfloat16_is_close():
    """Worst case measured: 0.05, with hidden states up to 3.5."""
    model = small_lm(qk_norm=True)
    ids = random_ids(2, 32)
    with torch.no_grad():
        expected = model(ids)
        with torch.autocast("cpu", torch.bfloat16):
            assert (model(ids) - expected).abs().max() < 0.15
        half = model.to(torch.bfloat16)(ids)
    assert half.dtype == torch.bfloat16 and (half - expected).abs().max() < 0.15


def test_dropout_is_for_training():
    model = small_lm(dropout=0.5)
    ids = random_ids(1, 8)
    assert torch.equal(model(ids), model(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))


def test_the_head_is_the_embedding_or_not():
    tied, untied = small_lm(tie_word_embeddings=True), small_lm()
    assert tied.head is tied.embed_tokens.weight and untied.head is untied.lm_head.weight
    assert len(list(untied.parameters())) == len(list(tied.parameters())) + 1
    hidden = tied(random_ids(1, 4))
    torch.testing.assert_close(tied.logits(hidden)[..., 40:], hidden @ tied.head[40:].T)


BAD = {
    "vocab_size is 0": {"vocab_size": 0},
    "num_key_value_heads 3 does not divide num_attention_heads 4": {"num_key_value_heads": 3},
    "num_attention_heads 4 does not divide hidden_size 62": {"hidden_size": 62},
    "rope_axes is 3": {"rope_axes": 3},
    "head_dim 6 is not divisible by 4": {"head_dim": 6, "rope_axes": 2},
    "dropout is 1": {"dropout": 1.0},
}


@pytest.mark.parametrize("message", BAD)
def test_configurations_that_cannot_be(message):
    with pytest.raises(InputError, match=message):
        LMConfig(**SMALL | BAD[message])


def test_a_sequence_longer_than_the_context_is_refused():
    with pytest.raises(InputError, match="129 tokens, more than max_position_embeddings 128"):
        small_lm()(random_ids(1, 129))
    with pytest.raises(InputError, match="200 tokens, more than"):
        Cache(small_lm(), torch.zeros(1, dtype=torch.long), 200)
