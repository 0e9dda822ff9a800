"""What makes training fast on a CPU: `python benchmarks/cpu_training.py` writes results/cpu_training.json.

Two ratios, each of medians of alternating runs in one process: attention's forward and backward pass in bfloat16
against float32, and a training step of the recipe `tiny` as it is against the compiled one.
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from qlip.environment import environment
from qlip.model import PRESETS, QLIP
from qlip.model.image import ImageProcessor
from qlip.train.parallel import ComputeConfig
from qlip.train.stage1 import Stage1, Stage1Config

BATCH_SIZE = 128
RESULT = Path(__file__).parent / "results" / "cpu_training.json"


def seconds(run: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def alternate(a: Callable[[], object], b: Callable[[], object], runs: int) -> dict[str, float]:
    """Medians of both, and of the ratio a / b pair by pair, after two calls of each that are not counted."""
    for run in (a, b) * 2:
        run()
    pairs = [(seconds(a), seconds(b)) for _ in range(runs)]
    return {
        "a_ms": round(1e3 * statistics.median(x for x, _ in pairs), 2),
        "b_ms": round(1e3 * statistics.median(y for _, y in pairs), 2),
        "ratio": round(statistics.median(x / y for x, y in pairs), 3),
    }


def attention(dtype: torch.dtype) -> Callable[[], object]:
    """Forward and backward of the attention of `tiny`: 4 heads of 64 over 65 tokens."""
    q, k, v = (torch.randn(BATCH_SIZE, 4, 65, 64, dtype=dtype, requires_grad=True) for _ in range(3))
    gradient = torch.randn(BATCH_SIZE, 4, 65, 64, dtype=dtype)
    return lambda: F.scaled_dot_product_attention(q, k, v).backward(gradient)


def training_step(compiled: bool) -> Callable[[], object]:
    """A step of `tiny` on random pictures."""
    torch.manual_seed(0)
    model = QLIP(PRESETS["tiny"], image_processor=ImageProcessor(resize=64, crop=64))
    compute = ComputeConfig(device="cpu", compile=compiled)
    task = Stage1(model, Stage1Config(lr=1e-9), compute, BATCH_SIZE)
    input_ids = torch.randint(0, 4094, (BATCH_SIZE, 14))
    input_ids[:, -1] = model.config.text.eos_token_id
    batch = {
        "pixel_values": torch.randn(BATCH_SIZE, 3, 64, 64),
        "input_ids": input_ids,
        "group": torch.randint(0, 200, (BATCH_SIZE,)),
        "keys": [""] * BATCH_SIZE,
    }
    return lambda: task.step(batch, 1)


def main() -> None:
    """Measure and write."""
    results = {
        "environment": environment("cpu"),
        "threads": torch.get_num_threads(),
        "batch_size": BATCH_SIZE,
        "attention: a bfloat16, b float32": alternate(
            attention(torch.bfloat16), attention(torch.float32), runs=15
        ),
        "training step: a eager, b compiled": alternate(training_step(False), training_step(True), runs=7),
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(RESULT.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
