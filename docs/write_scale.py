"""Writes the tables of docs/paper-scale.md, counted and from benchmarks/results: `python docs/write_scale.py`."""

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from qlip.model import QLIPConfig
from qlip.model.checkpoint import skeleton
from qlip.recipes import load_recipe, recipe_names
from qlip.train.discriminators import build_discriminator
from qlip.train.flops import PEAK_FLOPS
from qlip.train.perceptual import Perceptual

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "paper-scale.md"
RESULTS = ROOT / "benchmarks" / "results"
PEAK, UTILIZATION, NUM_DEVICES = PEAK_FLOPS["H100"], 0.4, 128
RECIPES = [name for name in recipe_names() if not name.startswith("tiny")]


def config_of(name: str) -> QLIPConfig:
    """The tokenizer that a recipe trains; stage 2's is that of the stage 1 before it."""
    return load_recipe(name.removesuffix("-stage2")).model


def count(run: Callable[[], torch.Tensor]) -> float:
    """Operations of a pass forward and backward, without doing them."""
    with FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as counter:
        run().backward()
    return counter.get_total_flops()


@cache
def flops_of(name: str) -> float:
    """Operations an image in training; in stage 2 with perceptual loss and adversary, without R1."""
    recipe, config = load_recipe(name), config_of(name)
    total = recipe.flops_per_image(skeleton(config), config.text.max_position_embeddings)
    if recipe.stage == 1:
        return total
    side = config.decoder.image_size
    discriminator, perceptual = build_discriminator(recipe.task.adversary, side), Perceptual(shift_tolerant=False)

    def pictures() -> torch.Tensor:
        return torch.empty(1, 3, side, side, requires_grad=True)

    total += count(lambda: perceptual(pictures(), torch.empty(1, 3, side, side)).sum())
    total += count(lambda: discriminator.requires_grad_(False)(pictures()).sum())
    discriminator.requires_grad_(True)
    return total + count(lambda: (discriminator(pictures().detach()) + discriminator(pictures().detach())).sum())


def num_images(name: str) -> int:
    """Images of a run."""
    recipe = load_recipe(name)
    return recipe.batch_size * recipe.fit.steps


def counted_hours(name: str) -> float:
    """Hours of one H100 or H200 at the assumed share of its peak."""
    return num_images(name) * flops_of(name) / (UTILIZATION * PEAK) / 3600


def results() -> dict[str, dict[str, Any]]:
    """What benchmarks/train_step.py measured, by device."""
    files = sorted(RESULTS.glob("train_step-*.json"))
    return {f.stem.removeprefix("train_step-"): json.loads(f.read_text(encoding="utf-8")) for f in files}


def cost_table() -> str:
    """Every recipe's images, operations and hours."""
    rates = {
        name: (entry["recipe"]["images_per_s"], device)
        for device, measured in results().items()
        for name, entry in measured.items()
        if device != "cpu" and "images_per_s" in entry.get("recipe", {})
    }
    head = (
        "| recipe | images | TFLOP an image | GPU-hours by count | hours on 128 | GPU-hours at the measured rate |"
    )
    rows = []
    for name in RECIPES:
        images, hours = num_images(name), counted_hours(name)
        rate, device = rates.get(name, (0.0, ""))
        measured = f"{images / rate / 3600:,.0f} ({device})" if rate else "not measured"
        cells = name, f"{images / 1e9:.1f} B", f"{flops_of(name) / 1e12:.2f}", f"{hours:,.0f}"
        rows.append(f"| `{cells[0]}` | {' | '.join(cells[1:])} | {hours / NUM_DEVICES:.0f} | {measured} |")
    return "\n".join([head, "| --- " * 6 + "|", *rows])


def ratio_table() -> str:
    """What each setting costs, in plain steps, on every device measured."""
    head = "| device | recipe | images a step | change | takes |"
    rows = []
    for device, measured in results().items():
        for name, entry in measured.items():
            for what, ratio in entry.get("ratios", {}).items():
                if "ratio" in ratio:
                    took = f"{ratio['ratio']:.2f} plain steps{every(name, what, ratio['ratio'])}"
                    rows.append(f"| {device} | `{name}` | {ratio['images']} | {what} | {took} |")
    return "\n".join([head, "| --- " * 5 + "|", *rows])


def every(name: str, what: str, ratio: float) -> str:
    """What a change costs that comes every so many-th step only."""
    field = {"balance measured": "balance_every", "with R1": "r1_every"}.get(what)
    if field is None:
        return ""
    steps = getattr(load_recipe(name).task, field)
    return f"; every {steps}th step: {(ratio - 1) / steps:+.0%}"


def size_table() -> str:
    """Speed and memory by the number of images at once, on GPUs."""
    head = "| device | recipe | images a step | at once | activations | images/s | TFLOP/s | MFU | memory |"
    rows = []
    for device, measured in results().items():
        for name, entry in measured.items():
            for size in entry.get("sizes", []) if device != "cpu" else []:
                kind = "computed again" if size["recompute"] else "kept"
                images = size["images"], size["micro_batch_size"] or size["images"]
                cells = [device, f"`{name}`", *map(str, images), kind]
                if "error" in size:
                    cells += [size["error"], "", "", ""]
                else:
                    mfu = f"{size['mfu']:.0%}" if "mfu" in size else ""
                    cells += [f"{size['images_per_s']:,.0f}", f"{size['tflops_per_s']:.0f}", mfu]
                    cells += [f"{size['memory_gib']:.0f} GiB"]
                rows.append(f"| {' | '.join(cells)} |")
    return "\n".join([head, "| --- " * 9 + "|", *rows]) if rows else "No GPU has been measured yet."


def fill(text: str) -> str:
    """The page with its tables written anew."""
    for mark, table in (("cost", cost_table), ("ratios", ratio_table), ("sizes", size_table)):
        pattern = rf"(<!-- {mark}: [^>]*-->\n).*?(<!-- /{mark} -->)"
        text = re.sub(pattern, lambda m, table=table: f"{m[1]}{table()}\n{m[2]}", text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
