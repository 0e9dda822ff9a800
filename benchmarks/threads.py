"""What it costs that waiting threads do not spin, and what it saves beside another process.

    python benchmarks/threads.py --out benchmarks/results/threads-cpu.json

Two processes train `tiny` on random images with as many threads as there are cores. In one OpenMP's threads wait
passively, as the command line sets it; in the other they spin first, which is the runtime's default. They take
turns, first on the machine as it is, then beside a process that computes without end. Run it on an idle machine:
the goal is that passive waiting costs at most 3% there.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from qlip.environment import environment
from qlip.figures.memory import random_batch
from qlip.machine import num_cores
from qlip.model.config import PRESETS
from qlip.model.image import ImageProcessor
from qlip.model.qlip import QLIP
from qlip.train.parallel import ComputeConfig
from qlip.train.stage1 import Stage1, Stage1Config

CHOSEN = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "MKL_NUM_THREADS"}
WORKER = "--worker"


@dataclass(frozen=True)
class Options:
    """How much is measured.

    Attributes:
        out: the JSON file; by default it is only printed.
        turns: of both processes, on the machine as it is and beside a busy process.
        steps: of a turn.
        batch_size: images of a step.
    """

    out: Path | None = None
    turns: int = 15
    steps: int = 3
    batch_size: int = 16


class Trainer:
    """A process that trains some steps when it is asked, and else waits."""

    def __init__(self, policy: dict[str, str], threads: int, batch_size: int):
        """Start it, and let it do two steps that are not counted."""
        environ = {name: value for name, value in os.environ.items() if name not in CHOSEN}
        environ |= policy | {"OMP_NUM_THREADS": str(threads)}
        arguments = [sys.executable, __file__, WORKER, str(batch_size)]
        self.process: Any = subprocess.Popen(
            arguments, env=environ, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.seconds(2)

    def seconds(self, steps: int) -> float:
        """Of a step, on average over some."""
        print(steps, file=self.process.stdin, flush=True)
        return float(self.process.stdout.readline())


def work(batch_size: int) -> None:
    """Train as many steps as each line of stdin says, and answer with the seconds of a step."""
    torch.manual_seed(0)
    model = QLIP(PRESETS["tiny"], image_processor=ImageProcessor(resize=64, crop=64))
    task = Stage1(model, Stage1Config(lr=1e-9), ComputeConfig(device="cpu", precision="fp32"), batch_size)
    batch = random_batch(model.config, batch_size)
    for line in sys.stdin:
        start = time.perf_counter()
        for _ in range(int(line)):
            task.step(batch, 1)
        print((time.perf_counter() - start) / int(line), flush=True)


def compare(passive: Trainer, spinning: Trainer, options: Options) -> dict[str, float]:
    """Median seconds of a step, and the median of the ratio, turn by turn."""
    found = []
    for turn in range(options.turns):
        order = (passive, spinning) if turn % 2 else (spinning, passive)
        found.append({trainer: trainer.seconds(options.steps) for trainer in order})
    return {
        "passive_s": round(statistics.median(turn[passive] for turn in found), 4),
        "spinning_s": round(statistics.median(turn[spinning] for turn in found), 4),
        "ratio": round(statistics.median(turn[passive] / turn[spinning] for turn in found), 3),
    }


def main(options: Options) -> None:
    """Measure and write."""
    threads, load = num_cores(), os.getloadavg()[0]
    passive = Trainer({"OMP_WAIT_POLICY": "PASSIVE"}, threads, options.batch_size)
    spinning = Trainer({}, threads, options.batch_size)
    results: dict[str, Any] = {"environment": environment("cpu"), "threads": threads}
    results |= {"batch_size": options.batch_size, "load_before": round(load, 2)}
    results["as it is"] = compare(passive, spinning, options)
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        results["beside a busy process"] = compare(passive, spinning, options)
    finally:
        busy.kill()
    for trainer in (passive, spinning):
        trainer.process.stdin.close()
    text = json.dumps(results, indent=2) + "\n"
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    if sys.argv[1:2] == [WORKER]:
        work(int(sys.argv[2]))
    else:
        main(tyro.cli(Options, description=__doc__))
