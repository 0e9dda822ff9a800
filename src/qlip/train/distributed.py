"""Several processes that train as one: `torchrun` starts them, or there is a single one without it.

Rank r holds the rows [r·B/W, (r+1)·B/W) of the global batch. Gradients are averaged over ranks, so that a loss
which is a mean over samples needs nothing; what the batch decides as a whole goes through `gather_rows` or
`average`, whose gradients make that average exact.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from qlip.environment import resolve_device
from qlip.errors import InputError, SharedError

T = TypeVar("T")
MAX_WORDS = 2000  # bytes of an error's message that travel


@contextmanager
def processes(device: str) -> Iterator[torch.device]:
    """Join the processes that `torchrun` started; without it do nothing.

    Args:
        device: "auto", "cpu", "cuda"; with several processes on "cuda" each takes the GPU of its local rank.

    Yields:
        this process's device.

    Raises:
        InputError: there is no such device, or not one for each process.
    """
    place = resolve_device(device)
    if "LOCAL_RANK" not in os.environ:
        yield place
        return
    if dist.is_initialized():  # by an outer call
        yield torch.device(place.type, torch.cuda.current_device()) if place.type == "cuda" else place
        return
    if place.type == "cuda":
        local_rank, num_gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local_rank >= num_gpus:
            raise InputError(f"local rank {local_rank} has no GPU, there are {num_gpus}: lower --nproc-per-node")
        place = torch.device("cuda", local_rank)
        torch.cuda.set_device(place)
    dist.init_process_group("cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo")
    yield place
    time.sleep(0.2)  # gloo's thread lets go of the last work; taken down before, it can hang on the GIL
    dist.destroy_process_group()  # not after an error: it would wait for the others, who wait for this one


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def seed_step(seed: int, step: int) -> None:
    """Whatever is random in a step depends on (seed, step, rank) alone."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step, rank())).generate_state(1, np.uint64)[0] >> 1))


def barrier() -> None:
    """Wait for all processes."""
    if world_size() > 1:
        any_rank(False)


def gather_rows(x: Tensor) -> Tensor:
    """(B/W, ...) of each rank → (B, ...) in the order of ranks, on every rank.

    Its gradient is the sum of what all ranks' losses ask of these rows.
    """
    return _Gather.apply(x) if world_size() > 1 else x


def average(x: Tensor) -> Tensor:
    """Mean over ranks; its gradient is the mean of what all ranks' losses ask."""
    return _Average.apply(x) if world_size() > 1 else x


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank; all ranks must call it."""
    if world_size() == 1:
        return flag
    number = torch.tensor(int(flag))
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return bool(number)


def on_all_ranks(work: Callable[[], T]) -> T:
    """Do it on this rank, as the others do on theirs: what fails on one fails on all, so that none waits for it.

    Raises:
        SharedError: on every rank, in the words of the first that failed.
    """
    result, failure = None, ""
    try:
        result = work()
    except InputError as error:
        failure = str(error)
    except OSError as error:
        if error.errno is None:  # no error of the system's
            raise
        failure = str(error)
    if any_rank(bool(failure)):
        words = failure.encode()[:MAX_WORDS].ljust(MAX_WORDS)
        rows = gather_rows(torch.frombuffer(bytearray(words), dtype=torch.uint8)[None])
        said = [bytes(row.tolist()).decode(errors="ignore").strip() for row in rows]
        raise SharedError(next(filter(None, said)))
    return cast(T, result)


def on_first_rank(work: Callable[[], object]) -> None:
    """As `on_all_ranks`, for what the first one does alone."""
    on_all_ranks(work if rank() == 0 else lambda: None)


def mean_over_ranks(values: dict[str, Tensor]) -> dict[str, float]:
    """Scalars of this rank → their means over all, in one collective; all must call it, with the same names."""
    numbers = torch.stack([value.detach().float().reshape(()) for value in values.values()])
    return dict(zip(values, average(numbers).tolist(), strict=True))


def average_gradients(module: torch.nn.Module) -> None:
    """Average a module's gradients over ranks, in one collective."""
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    if world_size() > 1 and grads:
        flat = _mean(torch.cat([grad.flatten() for grad in grads]))
        for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(part.view_as(grad))


class _Gather(torch.autograd.Function):
    """All-gather; backwards a reduce-scatter, on gloo (which has none for every type) by way of an all-reduce."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return grad.chunk(world_size())[rank()]


class _Average(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return _mean(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return _mean(grad)


def _mean(x: Tensor) -> Tensor:
    x = x.contiguous().clone()
    dist.all_reduce(x)
    return x / world_size()
