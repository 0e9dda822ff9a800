"""The gradient of a whole batch from parts of it, exactly, when losses look at the batch as a whole.

A contrastive loss compares all samples, and the codebook entropy looks at mean probabilities: neither is a sum
over parts. But both depend on the batch only through small tensors (embeddings, mean probabilities). So
(Gao et al. 2021, arXiv 2101.06983, there for contrast alone):

1. every part goes forward without a graph, and leaves its small tensors;
2. the losses of the whole batch give the gradient of those;
3. every part goes forward again, with what was random restored, and backward from that gradient and from its own
   losses.

On the device is one part at a time; the price is the second forward pass. A batch in one part takes the plain way.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

Terms = dict[str, Tensor]


class Part(NamedTuple):
    """What a forward pass over some samples gives.

    Attributes:
        terms: losses that are means over samples, each ().
        rows: what the whole batch's losses need of each sample, (samples, ...); parts are concatenated.
        means: what they need of the samples' mean; parts are averaged.
        metrics: diagnostics without gradient; parts are averaged.
    """

    terms: Terms
    rows: Terms
    means: Terms
    metrics: Terms


def backward(
    forward: Callable[[Any, bool], Part],
    batches: Sequence[Any],
    combine: Callable[[Terms, Terms], Terms],
    weights: dict[str, float],
    synchronize: Callable[[bool], None] = lambda now: None,
) -> tuple[Terms, Terms]:
    """Add the gradient of Σ weight · loss to the parameters.

    Args:
        forward: a part of the batch → `Part`; with the flag False rows and means suffice.
        batches: the parts, of equal size.
        combine: rows and means of the whole batch → the losses that look at it as a whole, each ().
        weights: of every loss; one without a weight is computed and left alone.
        synchronize: told before each pass whether it is the last: then ranks average gradients.

    Returns:
        every loss by name, and the metrics, without gradient.
    """
    if len(batches) == 1:
        synchronize(True)
        part = forward(batches[0], True)
        terms = part.terms | combine(part.rows, part.means)
        weighted_sum(terms, weights).backward()
        return _detached(terms), part.metrics

    cached, states = [], []
    with torch.no_grad():
        for batch in batches:
            states.append(_random_state())
            cached.append(forward(batch, False))
    rows = {name: torch.cat([part.rows[name] for part in cached]).requires_grad_() for name in cached[0].rows}
    means = {name: _mean(part.means[name] for part in cached).requires_grad_() for name in cached[0].means}
    shared = combine(rows, means)
    if any(name in weights for name in shared):
        weighted_sum(shared, weights).backward()

    results, share = [], 1 / len(batches)
    for i, (batch, state) in enumerate(zip(batches, states, strict=True)):
        synchronize(i == len(batches) - 1)
        with _restored(state):
            part = forward(batch, True)
        loss = weighted_sum(part.terms, weights) * share
        for name, value in part.rows.items():
            if (grad := rows[name].grad) is not None:
                loss = loss + (value * grad.split(len(value))[i]).sum()
        for name, value in part.means.items():
            if (grad := means[name].grad) is not None:
                loss = loss + (value * grad).sum() * share
        loss.backward()
        results.append(part)
    terms = {name: _mean(part.terms[name].detach() for part in results) for name in results[0].terms}
    metrics = {name: _mean(part.metrics[name] for part in results) for name in results[0].metrics}
    return terms | _detached(shared), metrics


def split_batch(batch: dict[str, Any], num_parts: int) -> list[dict[str, Any]]:
    """A batch of tensors → parts of equal size, in order."""
    size = len(next(iter(batch.values()))) // num_parts
    return [{name: value[i * size : (i + 1) * size] for name, value in batch.items()} for i in range(num_parts)]


def weighted_sum(terms: Terms, weights: dict[str, float]) -> Tensor:
    """Σ weight · loss over the losses that have a weight."""
    weighed = [weights[name] * term for name, term in terms.items() if name in weights]
    return torch.stack(weighed).sum() if weighed else torch.zeros(())


def _detached(terms: Terms) -> Terms:
    return {name: term.detach() for name, term in terms.items()}


def _mean(values: Iterator[Tensor]) -> Tensor:
    return torch.stack(list(values)).mean(0)


def _random_state() -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None


def _set_random_state(state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])


@contextmanager
def _restored(state: tuple[Tensor, Tensor | None]) -> Iterator[None]:
    """Run with the random state of then, and put back that of now."""
    now = _random_state()
    _set_random_state(state)
    yield
    _set_random_state(now)
