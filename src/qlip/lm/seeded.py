"""Several answers to each of several prompts, some at a time; each has a seed of its own."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from qlip.errors import InputError, as_integer

T = TypeVar("T")
R = TypeVar("R")
MAX_SEED = 2**63


def seeded(
    prompts: Sequence[T],
    answer: Callable[[list[T], list[int]], Iterable[R]],
    num: int,
    seed: int,
    batch_size: int,
    track: Callable[[Iterable], Iterable] = iter,
) -> list[R]:
    """Answer k of a prompt has the seed `seed + k`, whatever the other prompts are, and how many.

    Args:
        prompts: what is answered.
        answer: of a batch's prompts and seeds their answers.
        num: answers of each.
        seed: of the first answer of each prompt.
        batch_size: answers at once.
        track: shows progress.

    Returns:
        len(prompts) · num answers, those of a prompt together.

    Raises:
        InputError: a number is out of its range.
    """
    num, seed, batch_size = as_integer("num", num), as_integer("seed", seed), as_integer("batch_size", batch_size)
    if num < 1 or batch_size < 1:
        raise InputError(f"num is {num} and batch_size {batch_size}: both must be at least 1")
    if not 0 <= seed <= MAX_SEED - num:
        raise InputError(f"seed is {seed}: it must be 0 or more, and below 2^63")
    rows = [(prompt, seed + k) for prompt in prompts for k in range(num)]
    return list(answered(rows, answer, batch_size, track))


def answered(
    rows: Sequence[tuple[T, int]],
    answer: Callable[[list[T], list[int]], Iterable[R]],
    batch_size: int,
    track: Callable[[Iterable], Iterable] = iter,
) -> Iterator[R]:
    """An answer to each prompt with its seed, given as they are made; see `seeded`.

    Raises:
        InputError: batch_size is below 1.
    """
    batch_size = as_integer("batch_size", batch_size)
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}: use 1 or more")
    for start in track(range(0, len(rows), batch_size)):
        part = rows[start : start + batch_size]
        yield from answer([prompt for prompt, _ in part], [seed for _, seed in part])


def check_guidance(cfg: float, usual: float) -> None:
    """Whether a prompt may count so much.

    Raises:
        InputError: it counts less than in the model's own distribution.
    """
    if not cfg >= 1:
        raise InputError(f"cfg is {cfg}: use 1 (the prompt as it is) or more, such as {usual}")
