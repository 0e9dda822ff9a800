"""What a training step costs: `python benchmarks/train_step.py --recipe tiny --sizes 128`.

Writes results/train_step-DEVICE.json, an entry for each recipe, anew after every measurement. Pictures and words
are random and lie on the device: what is timed is the step alone, without decoding and without other processes.

- `sizes`: so many images at once, with and without recomputation, until memory runs out; then a device's share of
  the batch in parts of the most that fitted.
- `ratios`: what each setting costs. It and the plain step take turns, and the ratio is the median over the turns,
  so that whatever else the machine does disturbs both alike.
- `recipe`: that share, computed as the recipe says.

On a GPU, in about eight minutes, passing over what does not fit:

    python benchmarks/train_step.py --recipe b16-256 b8-256 l14-392 b16-256-stage2 --seconds 420
"""

import gc
import json
import os
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import nn

import qlip.train.stage2
from qlip.environment import command, environment, resolve_device
from qlip.errors import one_line
from qlip.files import whole_file
from qlip.model import QLIP
from qlip.model.image import ImageProcessor
from qlip.recipes import load_recipe
from qlip.recipes.run import TrainRecipe
from qlip.train.flops import peak_flops
from qlip.train.perceptual import Perceptual

RESULTS = Path(__file__).parent / "results"
NUM_DEVICES = 128  # the paper's: 65,536 / 512 and 16,384 / 128
Step = Callable[..., float]  # does the step of a number, returns its seconds
Entry = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        recipe: names of recipes.
        device: where.
        sizes: images at once.
        share: images of a device's share; None: one of 128 devices' part of the batch, or all of a batch of 128.
        images: of a step under `ratios`, a multiple of 4; None: half of what fitted, as two models need room.
        runs: steps of which the median is taken; at least 3 where they are long.
        seconds: after so many nothing new is begun.
    """

    recipe: tuple[str, ...] = ("tiny",)
    device: str = "auto"
    sizes: tuple[int, ...] = (8, 32, 64, 128, 256, 512)
    share: int | None = None
    images: int | None = None
    runs: int = 7
    seconds: float = 420.0


class Bench:
    """One recipe on one device."""

    def __init__(self, name: str, options: Options, device: torch.device):
        """Read the recipe; the time that is left is counted from now."""
        self.device, self.runs, self.deadline = device, options.runs, time.monotonic() + options.seconds
        self.recipe = load_recipe(name)
        batch_size = self.recipe.batch_size
        self.share = options.share or max(batch_size // NUM_DEVICES, min(batch_size, 128))
        self.config = load_recipe(name.removesuffix("-stage2")).model
        self.text_length = self.config.text.max_position_embeddings if self.recipe.stage == 1 else 0
        self.plain = replace(self.recipe, micro_batch_size=None, recompute=False, compile=False)

    def measure(self, recipe: TrainRecipe, images: int) -> Entry:
        """Time of a step, and what follows from it."""

        def work() -> Entry:
            step, flops = self.build(recipe, images)
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            first = step()
            seconds = statistics.median(self.repeat(step))
            if recipe.stage == 2:
                step(recipe.task.r1_every)  # it must have room for R1, too
            rate = flops * images / seconds
            found = {"first_step_s": first, "step_s": seconds, "images_per_s": images / seconds}
            found |= {"tflops_per_s": rate / 1e12}
            if peak := peak_flops(self.device):
                found["mfu"] = rate / peak
            if self.device.type == "cuda":
                found["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
            return found

        settings = {name: getattr(recipe, name) for name in ("micro_batch_size", "recompute", "compile")}
        return self.attempt({"images": images, **settings}, work)

    def compare(self, other: TrainRecipe, images: int, number: int = 1) -> Entry:
        """A step of another recipe, in turns with the plain one; `number` is the step's."""

        def work() -> Entry:
            plain, changed = self.build(self.plain, images)[0], self.build(other, images)[0]
            for _ in range(2):  # the first calls compile and allocate
                plain(), changed(number)
            turns = self.repeat(lambda: (plain(), changed(number)))
            ratio = statistics.median(b / a for a, b in turns)
            return {"turns": len(turns), "plain_s": statistics.median(a for a, _ in turns), "ratio": ratio}

        return self.attempt({"images": images}, work)

    def attempt(self, entry: Entry, work: Callable[[], Entry]) -> Entry:
        """What was found, or what stopped it: a lease must not end with the first thing that does not fit."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if time.monotonic() > self.deadline:
            return entry | {"error": "no time left"}
        try:
            entry |= work()
        except torch.OutOfMemoryError:
            entry["error"] = "out of memory"
        except Exception as error:
            entry["error"] = f"{type(error).__name__}: {one_line(error)[:300]}"
        return {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in entry.items()}

    def build(self, recipe: TrainRecipe, images: int) -> tuple[Step, float]:
        """A recipe's step on random pictures, and its operations an image."""
        torch.compiler.reset()  # or a new shape would be compiled for any shape
        torch.manual_seed(0)
        size = self.config.vision.image_size
        with self.device:
            model = QLIP(self.config, image_processor=ImageProcessor(resize=size, crop=size))
        task = replace(recipe, device=self.device.type, batch_size=images).build_task(model.to(self.device))
        flops = recipe.flops_per_image(model, self.text_length)
        batch = self.batch(images)
        for group in (group for optimizer in task.optimizers for group in optimizer.param_groups):
            group["lr"] = 1e-9  # random pictures teach nothing

        def step(number: int = 1) -> float:
            self.wait()
            start = time.perf_counter()
            task.step(batch, number)
            self.wait()
            seconds = time.perf_counter() - start
            for optimizer in task.optimizers:
                optimizer.zero_grad()
            return seconds

        return step, flops

    def batch(self, images: int) -> dict[str, Any]:
        """Random pictures and words of full length."""
        text, side = self.config.text, self.config.vision.image_size
        input_ids = torch.randint(0, text.vocab_size - 2, (images, text.max_position_embeddings))
        input_ids[:, -1] = text.vocab_size - 1  # the published end token, which is also the largest id
        tensors = {"pixel_values": torch.randn(images, 3, side, side), "group": torch.arange(images)}
        tensors |= {"input_ids": input_ids} if self.recipe.stage == 1 else {}
        return {name: tensor.to(self.device) for name, tensor in tensors.items()} | {"keys": [""] * images}

    def repeat(self, run: Callable[[], Any]) -> list[Any]:
        """Some calls, fewer if they are long."""
        results: list[Any] = []
        start, limit = time.monotonic(), 5 if self.device.type == "cuda" else 60
        while len(results) < self.runs and (len(results) < 3 or time.monotonic() - start < limit):
            results.append(run())
        return results

    def wait(self) -> None:
        """Until the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def variants(plain: TrainRecipe, images: int) -> dict[str, tuple[TrainRecipe, int]]:
    """What is compared with the plain step: recipe, and number of the step."""
    task: Any = plain.task
    found = {f"{n} parts": replace(plain, micro_batch_size=images // n) for n in (2, 4)}
    found["recompute"] = replace(plain, recompute=True)
    numbers = {}
    if plain.stage == 2:
        off = {"perceptual": {"perceptual_weight": 0.0}, "adversary": {"adversarial_weight": 0.0}}
        off["both"] = off["perceptual"] | off["adversary"]
        found |= {
            f"without {what}": replace(plain, task=replace(task, **weights)) for what, weights in off.items()
        }
        if task.adversary == "stylegan2":
            found["with R1"], numbers["with R1"] = plain, task.r1_every
    elif task.alignment_weight and task.reconstruction_weight:
        measured = replace(task, balance="gradient", calibration=None, balance_every=1)
        found["balance measured"] = replace(plain, task=measured)
    found["compile"] = replace(plain, compile=True)
    return {name: (recipe, numbers.get(name, 1)) for name, recipe in found.items()}


def untrained_perceptual(variant: str) -> Perceptual:
    """LPIPS with random weights: just as fast, and no one has to fetch any."""
    perceptual = Perceptual(shift_tolerant=False)
    for p in perceptual.parameters():
        nn.init.normal_(p, std=p[0].numel() ** -0.5 if p.ndim == 4 else 0.0)
    return perceptual


def main() -> None:
    """Measure, and write after each measurement."""
    options = tyro.cli(Options, description=__doc__.splitlines()[0])
    qlip.train.stage2.load_perceptual = untrained_perceptual
    device = resolve_device(options.device)
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    path = RESULTS / f"train_step-{re.sub('[^a-z0-9]+', '-', kind.lower())}.json"
    results: dict[str, Entry] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    benches = {name: Bench(name, options, device) for name in options.recipe}

    def note(name: str, part: str, entry: Any, latest: Any = None) -> None:
        results[name][part] = entry
        with whole_file(path) as unfinished:
            unfinished.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(name, part, latest or entry, flush=True)

    def compare(name: str, whats: Callable[[str], bool]) -> None:
        whole = [e for e in results[name]["sizes"] if "error" not in e and not e["micro_batch_size"]]
        fitted = [e["images"] for e in whole if not e["recompute"]]
        images = options.images or max(4, max(fitted, default=8) // 2)
        ratios = results[name].get("ratios", {})
        for what, (recipe, number) in variants(benches[name].plain, images).items():
            if whats(what):
                ratios[what] = benches[name].compare(recipe, images, number)
                note(name, "ratios", ratios, (what, ratios[what]))

    for name, bench in benches.items():
        results[name] = {
            "environment": environment(str(device)),
            "threads": torch.get_num_threads(),
            "load_average": os.getloadavg()[0],
            "command": command(),
        }
        sizes: list[Entry] = []
        for recompute in (False, True):
            plain = replace(bench.plain, recompute=recompute)
            for images in options.sizes:
                sizes.append(bench.measure(plain, images))
                note(name, "sizes", sizes, sizes[-1])
                if "error" in sizes[-1]:
                    break
            size = max((e["images"] for e in sizes if e["recompute"] == recompute and "error" not in e), default=0)
            if size and size < bench.share and bench.share % size == 0:  # the share in parts that fit
                sizes.append(bench.measure(replace(plain, micro_batch_size=size), bench.share))
                note(name, "sizes", sizes, sizes[-1])
    for name in benches:  # what compiles takes longest and comes last, so that a lack of time costs least
        compare(name, lambda what: what != "compile")
    for name, bench in benches.items():
        size = min(bench.recipe.micro_batch_size or bench.share, bench.share)
        recipe = replace(bench.recipe, micro_batch_size=size, sharding="ddp")
        note(name, "recipe", bench.measure(recipe, bench.share))
    for name in benches:
        compare(name, lambda what: what == "compile")


if __name__ == "__main__":
    main()
