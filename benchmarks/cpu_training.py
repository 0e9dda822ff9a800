"""Where the time of a CPU training step goes: `python benchmarks/cpu_training.py --out FILE`.

Three recipes are measured, `tiny`, `t2i-tiny` and `um3-tiny`, on random samples.

- `machine`: GFLOP/s of the product of two square matrices. It limits everything below.
- `steps`: seconds of a step for each number of threads and each precision, its GFLOP/s, and the share of the
  machine's rate that this is. PyTorch counts the operations. Where bfloat16 is very slow the batch is small.
- `parts`: how a step's time is divided between products, attention, the optimizer and the rest, by PyTorch's
  profiler, eager and compiled, in float32 with one thread.
- `ratios`: images a core-second of the recipe as it is, divided by those of the recipe with what `BEFORE` undoes.
  Both take turns in one process with one thread. The ratio is the median over the turns.

`ONEDNN_MAX_CPU_ISA=AVX2` before the command shows a machine without AVX-512 and without bfloat16.
`python docs/write_cpu_training.py` makes docs/results/cpu-training.md from the files.
"""

import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import qlip
import qlip.t2i.checkpoint
import qlip.um3.checkpoint
from qlip.environment import environment
from qlip.figures.memory import random_batch
from qlip.files import whole_file
from qlip.model import QLIP
from qlip.model.image import ImageProcessor
from qlip.precision import speedup
from qlip.recipes import load_recipe
from qlip.recipes.t2i import RECIPES as T2I_RECIPES
from qlip.recipes.um3 import RECIPES as UM3_RECIPES
from qlip.t2i.train import T2ITask
from qlip.um3.train import UM3Task

MODELS = Path(qlip.__file__).parent / "models"
NUM_WORDS = 14  # tokens of a caption
BEFORE: dict[str, dict[str, Any]] = {
    "tiny": {"optimizer": "adamw", "reconstruct_every": 1, "drop_tokens": 0.0},
    "t2i-tiny": {"compile": False},
    "um3-tiny": {"compile": False},
}
PARTS = {
    "products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::convolution", "aten::mkldnn", "mkldnn::"),
    "attention": ("aten::_scaled_dot_product",),
    "optimizer": ("aten::_fused_adam", "Optimizer", "aten::_foreach", "aten::linalg_vector_norm"),
}
Step = Callable[[], object]


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        out: the JSON file.
        threads: numbers of threads.
        turns: how often each ratio is measured.
        steps: of which a median is taken.
        recipes: which.
    """

    out: Path
    threads: tuple[int, ...] = (1, 2)
    turns: int = 7
    steps: int = 3
    recipes: tuple[str, ...] = ("tiny", "t2i-tiny", "um3-tiny")


def tiny(compute: dict[str, Any], batch_size: int, changes: dict[str, Any]) -> Step:
    """A step of `tiny`."""
    recipe = replace(load_recipe("tiny"), **compute)
    recipe = replace(recipe, task=replace(recipe.task, **changes), batch_size=batch_size)
    size = recipe.model.vision.image_size
    task = recipe.build_task(QLIP(recipe.model, image_processor=ImageProcessor(resize=size, crop=size)))
    batch = random_batch(recipe.model, batch_size)
    batch["input_ids"] = batch["input_ids"][:, -NUM_WORDS:]
    return lambda: task.step(batch, 1)


def t2i_tiny(compute: dict[str, Any], batch_size: int, changes: dict[str, Any]) -> Step:
    """A step of `t2i-tiny`."""
    recipe = replace(T2I_RECIPES["t2i-tiny"], **compute | changes)
    model = qlip.t2i.checkpoint.load(MODELS / "t2i-tiny").float()
    config = model.config
    task = T2ITask(model, recipe.task, recipe, batch_size)
    shape = batch_size, config.grid[0] * config.grid[1], config.num_bits // config.bits
    batch = {
        "condition": torch.randn(batch_size, NUM_WORDS, config.condition_width),
        "lengths": torch.randint(5, NUM_WORDS, (batch_size,)),
        "sub_tokens": torch.randint(0, 1 << config.bits, shape),
        "dropped": torch.rand(batch_size) < config.condition_dropout,
    }
    return lambda: task.step(batch, 1)


def um3_tiny(compute: dict[str, Any], batch_size: int, changes: dict[str, Any]) -> Step:
    """A step of `um3-tiny`: rows of a document of text and one of text and an image."""
    recipe = replace(UM3_RECIPES["um3-tiny"], **compute | changes)
    model = qlip.um3.checkpoint.load(MODELS / "um3-tiny").float()
    task, length, half = (
        UM3Task(model, recipe.task, recipe, batch_size),
        recipe.sequence_length,
        recipe.sequence_length // 2,
    )
    input_ids = torch.randint(0, model.config.num_text, (batch_size, length))
    input_ids[:, -half + NUM_WORDS :] = model.config.num_text + torch.randint(
        0, 1 << model.config.bits, (batch_size, half - NUM_WORDS)
    )
    document_ids = 1 + torch.arange(length).ge(length - half).long().expand(batch_size, -1)
    batch = {"input_ids": input_ids, "document_ids": document_ids, "num_tokens": torch.ones(batch_size, 3)}
    return lambda: task.step(batch, 1)


BUILD = {"tiny": (tiny, 256), "t2i-tiny": (t2i_tiny, 64), "um3-tiny": (um3_tiny, 8)}


def seconds(run: Step) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def core_seconds(run: Step) -> float:
    """Processor time of one call, of all threads."""
    start = time.process_time()
    run()
    return time.process_time() - start


def machine(dtype: torch.dtype) -> float:
    """GFLOP/s of products of square matrices: the best of a few."""
    size = 1024 if dtype == torch.float32 or speedup(torch.device("cpu"), dtype) > 0.5 else 256
    a, b = torch.randn(2, size, size).to(dtype)
    return round(2 * size**3 / min(seconds(lambda: a @ b) for _ in range(10)) / 1e9, 2)


def count_flops(run: Step) -> int:
    """Operations of a step that is not compiled."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def parts(run: Step) -> dict[str, float]:
    """Shares of a step's time."""
    run()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        run()
    sums = dict.fromkeys((*PARTS, "the rest"), 0.0)
    for event in found.key_averages():
        name = next((n for n, prefixes in PARTS.items() if event.key.startswith(prefixes)), "the rest")
        sums[name] += event.self_cpu_time_total
    total = sum(sums.values())
    return {name: round(value / total, 3) for name, value in sums.items()}


def alternate(now: Step, before: Step, turns: int) -> dict[str, Any]:
    """Core-seconds of both, and how many times as many images the first one takes in a core-second."""
    for run in (now, before) * 2:
        run()
    pairs = [(core_seconds(now), core_seconds(before)) for _ in range(turns)]
    ratios = sorted(b / a for a, b in pairs)
    return {
        "now": round(statistics.median(a for a, _ in pairs), 3),
        "before": round(statistics.median(b for _, b in pairs), 3),
        "ratio": round(statistics.median(ratios), 3),
        "range": [round(ratios[0], 3), round(ratios[-1], 3)],
    }


def measure(name: str, options: Options) -> dict[str, Any]:
    """All of one recipe."""
    build, batch_size = BUILD[name]
    slow = max(2, batch_size // 8)
    result: dict[str, Any] = {"batch_size": batch_size, "steps": []}
    eager, compiled = (
        {"device": "cpu", "precision": "fp32", "attention": "fp32", "compile": c} for c in (False, True)
    )
    flops = count_flops(build(eager, slow, {})) / slow
    result["gflop_a_sample"] = round(flops / 1e9, 3)
    for threads in options.threads:
        torch.set_num_threads(threads)
        for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            rate = machine(dtype)
            size = batch_size if dtype == torch.float32 or speedup(torch.device("cpu"), dtype) > 0.5 else slow
            step = build(eager | {"precision": precision}, size, {})
            step()
            taken = statistics.median(seconds(step) for _ in range(options.steps))
            reached = flops * size / taken / 1e9
            result["steps"].append(
                {
                    "threads": threads,
                    "precision": precision,
                    "machine": rate,
                    "samples": size,
                    "seconds": round(taken, 3),
                    "gflops": round(reached, 2),
                    "share": round(reached / rate, 3),
                }
            )
    torch.set_num_threads(1)
    result["parts"] = {
        "eager": parts(build(eager, batch_size, {})),
        "compiled": parts(build(compiled, batch_size, {})),
    }
    torch.compiler.reset()
    changes = BEFORE[name]
    result["undone"] = changes
    result["ratio"] = alternate(
        build(compiled, batch_size, {}), build(compiled, batch_size, changes), options.turns
    )
    return result


def main() -> None:
    """Measure and write."""
    options = tyro.cli(Options, description=__doc__)
    isa = os.environ.get("ONEDNN_MAX_CPU_ISA", "all that the CPU has")
    results: dict[str, Any] = {"environment": environment("cpu") | {"instructions": isa}, "recipes": {}}
    for name in options.recipes:
        torch.manual_seed(0)
        results["recipes"][name] = measure(name, options)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(options.out) as unfinished:
            unfinished.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(name, json.dumps(results["recipes"][name]), flush=True)


if __name__ == "__main__":
    main()
