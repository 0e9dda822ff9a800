import pytest
import torch
import torch.nn.functional as F

from qlip.figures.memory import Counter
from qlip.lm.loss import chunked_cross_entropy


def inputs(dtype=torch.float64, tokens=(3, 11), vocab=17, dim=8):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(*tokens, dim, dtype=dtype, generator=generator, requires_grad=True)
    head = torch.randn(vocab, dim, dtype=dtype, generator=generator, requires_grad=True)
    targets = torch.randint(0, vocab, tokens, generator=generator)
    targets[0, :4] = -100
    return hidden, head, targets


def plain(hidden, head, targets):
    logits = (hidden @ head.T).flatten(0, -2)
    return F.cross_entropy(
        logits.float() if hidden.dtype != torch.float64 else logits, targets.flatten(), reduction="sum"
    )


@pytest.mark.parametrize("chunk_size", (1, 7, 33, 1000))
def test_value_and_gradients_are_those_of_all_logits_at_once(chunk_size):
    hidden, head, targets = inputs()
    losses = [chunked_cross_entropy(hidden, head, targets, chunk_size), plain(hidden, head, targets)]
    torch.testing.assert_close(*losses, rtol=1e-12, atol=0)
    ours, theirs = (torch.autograd.grad(3 * loss, (hidden, head)) for loss in losses)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(chunked_cross_entropy(hidden, head, targets, chunk_size), losses[1])


def test_in_bfloat16_it_sums_in_float32():
    hidden, head, targets = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = chunked_cross_entropy(hidden, head, targets, 7)
        expected = plain(hidden, head, targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    ours, theirs = (torch.autograd.grad(x, (hidden, head)) for x in (loss, expected))
    for one, other in zip(ours, theirs, strict=True):  # a chunk's gradient of the head is rounded on its own
        torch.testing.assert_close(one, other, rtol=0, atol=0.02 * other.abs().max().item())


def test_two_vocabularies_each_by_itself():
    """As in UM3 (paper, equation 6): text over the first rows of the head, images over the rest, one sum."""
    hidden, head, targets = inputs()
    is_text = targets < 10
    text = chunked_cross_entropy(hidden, head[:10], targets.where(is_text, -100), 5)
    image = chunked_cross_entropy(hidden, head[10:], (targets - 10).where(~is_text, -100), 5)
    logits = hidden @ head.T
    masked = logits.masked_fill((torch.arange(17) < 10) != is_text[..., None], -torch.inf)
    kept = targets >= 0
    expected = F.cross_entropy(masked[kept], targets[kept], reduction="sum")
    torch.testing.assert_close(text + image, expected)


def test_nothing_that_counts_is_zero_with_zero_gradient():
    hidden, head, targets = inputs()
    loss = chunked_cross_entropy(hidden, head, torch.full_like(targets, -100))
    assert loss.item() == 0 and not any(g.any() for g in torch.autograd.grad(loss, (hidden, head)))


def test_no_more_than_a_chunk_of_logits_exists_at_once():
    """Beyond inputs and gradients, in the size of a chunk's logits: measured 2.5, where all logits are 16."""
    hidden, head, targets = inputs(torch.float32, tokens=(4, 64), vocab=5000)
    with Counter() as counter:
        counter.see((hidden, head, targets))
        before = counter.now + hidden.nbytes + 2 * head.nbytes  # the head's gradient, and a chunk's part of it
        torch.autograd.grad(chunked_cross_entropy(hidden, head, targets, chunk_size=16), (hidden, head))
    chunk = 16 * 5000 * 4
    assert counter.peak - before < 4 * chunk
    with Counter() as counter:
        counter.see((hidden, head, targets))
        torch.autograd.grad(plain(hidden, head, targets), (hidden, head))
    assert counter.peak - before > 16 * chunk
