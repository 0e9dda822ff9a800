"""Whether this device computes faster in half precision than in float32, by trying it.

A name or a generation says little: a CPU without bfloat16 instructions runs the format at a fiftieth of float32's
speed, its attention may be fast forward and slow backward, and a GPU before Ampere takes it but emulates it.
"""

import logging
import time
from collections.abc import Callable
from functools import cache, partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Work = Literal["product", "attention"]

WORTH = 1.2  # times as fast, from which on half precision is worth its rounding
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_LEAST = 5e-4  # seconds of work in float32: less would time how it is launched
_BUDGET = 0.05  # seconds after which no further round begins
logger = logging.getLogger("qlip")


@cache
def speedup(device: torch.device, dtype: torch.dtype, work: Work = "product", backward: bool = True) -> float:
    """How many times as fast as in float32 a device computes in another dtype; measured once in a process.

    Both take turns, after one call of each that is not counted, and the fastest call of each counts: what else the
    machine does can only slow a call down.

    Args:
        device: where.
        dtype: bfloat16 or float16.
        work: the product of two matrices, or attention.
        backward: with gradients, as in training.

    Returns:
        the ratio of times; 0 if the device does not have the dtype.
    """
    try:
        size, seconds = 1, 0.0
        while seconds < _LEAST and size < 1 << 16:
            size *= 2
            wide = _task(device, torch.float32, work, backward, size)
            seconds = min(_seconds(wide, device) for _ in range(2))
        half = _task(device, dtype, work, backward, size)
        _seconds(half, device)
        return _ratio(partial(_seconds, wide, device), partial(_seconds, half, device))
    except (RuntimeError, TypeError):  # TypeError: of MPS
        return 0.0


def warn_if_slow(device: torch.device, dtype: torch.dtype) -> None:
    """Say in the log, once, if a model's weights in this dtype make it slower than float32 does."""
    if dtype in (torch.bfloat16, torch.float16):
        _warn_if_slow(device, dtype)


@cache
def _warn_if_slow(device: torch.device, dtype: torch.dtype) -> None:
    ratio = speedup(device, dtype, backward=False)
    if ratio < 1:
        logger.warning(
            "dtype %s runs at %.2g times the speed of float32 here: leave it out, unless it is for the memory",
            NAMES[dtype],
            ratio,
        )


def _ratio(first: Callable[[], float], second: Callable[[], float]) -> float:
    """The least time of the first over that of the second, in turns: 3 to 10, as the budget allows."""
    times = [(first(), second()) for _ in range(3)]
    while len(times) < 10 and sum(map(sum, times)) < _BUDGET:
        times.append((first(), second()))
    a, b = (min(column) for column in zip(*times, strict=True))
    return a / b


def _task(device: torch.device, dtype: torch.dtype, work: Work, backward: bool, size: int) -> Callable[[], object]:
    shapes = [(32 * size, 256), (256, 256)] if work == "product" else [(size, 2, 64, 64)] * 3
    compute: Callable[..., Tensor] = F.linear if work == "product" else F.scaled_dot_product_attention
    # no random numbers: who asks must find the generator as it was
    operands = [torch.full(s, 0.5, dtype=dtype, device=device, requires_grad=backward) for s in shapes]

    def task() -> object:
        with torch.autocast(device.type, enabled=False), torch.set_grad_enabled(backward):
            result = compute(*operands)
            return torch.autograd.grad(result, operands, result.detach()) if backward else result

    return task


def _seconds(task: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    task()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - start
