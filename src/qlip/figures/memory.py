"""The paper's Figure 3: memory against the batch of a device, stage 1's losses against LPIPS and an adversary.

On a GPU a step is done, and PyTorch says what it took. Elsewhere it is counted: the step runs on fake tensors,
which have sizes and no values, so that 2,048 pictures need no memory, and every storage is added up from its
birth to its end. What kernels allocate for themselves is not seen, and the precision is that of autocast on a CPU.
"""

import copy
import gc
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from qlip.environment import resolve_device
from qlip.errors import InputError
from qlip.figures.record import OURS, THEIRS, plain, write_figure
from qlip.model.config import QLIPConfig
from qlip.model.image import ImageProcessor
from qlip.model.qlip import QLIP
from qlip.recipes import load_recipe
from qlip.recipes.run import TrainRecipe
from qlip.recipes.stage1 import Recipe
from qlip.recipes.stage2 import Stage2Recipe
from qlip.train.perceptual import Perceptual
from qlip.train.plot import new_figure
from qlip.train.stage1 import Stage1
from qlip.train.stage2 import Stage2

if TYPE_CHECKING:
    from qlip.train.plot import Figure

STAGE_1, STAGE_2, WITH_R1 = "stage 1", "stage 2 (LPIPS, adversary)", "stage 2, a step with R1"
PAPER = {  # docs/paper.md section 6: images on a device → GB
    "stage 1's losses": {64: 6, 256: 10, 1024: 28, 2048: 51},
    "with LPIPS and GAN": {1: 4, 64: 12, 256: 42},
}


def memory(
    stage1: str, stage2: str, out: Path, sizes1: Sequence[int], sizes2: Sequence[int], device: str = "auto"
) -> Path:
    """Measure, or count, what a step takes; write `memory.json` and `memory.png`.

    Args:
        stage1: name of a recipe of stage 1, or its file.
        stage2: likewise of stage 2, for the tokenizer of the first.
        out: folder.
        sizes1: images at once, in stage 1.
        sizes2: images at once, in stage 2.
        device: "cuda": a step is done there; "cpu": it is counted; "auto" takes a GPU if there is one.

    Returns:
        the JSON file.

    Raises:
        InputError: a recipe is of the other stage, or a number of images cannot be.
    """
    first, second, place = load_recipe(stage1), load_recipe(stage2), resolve_device(device)
    if not isinstance(first, Recipe) or not isinstance(second, Stage2Recipe):
        raise InputError(f"{stage1!r} and {stage2!r}: name a recipe of stage 1, and one of stage 2")
    first = replace(first, precision="bf16") if first.precision == "auto" else first
    second = replace(second, precision="bf16") if second.precision == "auto" else second
    if any(size < 2 for size in (*sizes1, *sizes2)):
        raise InputError(f"the numbers of images are {[*sizes1, *sizes2]}: they must be 2 or more")
    steps: list[tuple[str, TrainRecipe, Sequence[int], int]] = [
        (STAGE_1, first, sizes1, 1),
        (STAGE_2, second, sizes2, 1),
    ]
    if second.task.adversarial_weight and second.task.adversary == "stylegan2" and second.task.r1_weight:
        steps.append((WITH_R1, second, sizes2, second.task.r1_every))
    series = [
        {"name": name, "recompute": recipe.recompute, "precision": recipe.precision}
        | {"points": _points({size: need(recipe, first.model, size, place, step) for size in sizes})}
        for name, recipe, sizes, step in steps
    ]
    numbers = {
        "recipes": [stage1, stage2],
        "how": "measured" if place.type == "cuda" else "counted",
        "series": series,
        "paper": [{"name": name, "points": _points(points)} for name, points in PAPER.items()],
    }
    return write_figure(out, "memory", numbers, draw, str(place))


def need(
    recipe: TrainRecipe, config: QLIPConfig, images: int, device: torch.device, step: int = 1
) -> float | None:
    """What a step takes, in GB (10⁹ bytes), as the recipe computes it, but all images at once and not compiled.

    Args:
        recipe: of either stage.
        config: of the tokenizer.
        images: at once.
        device: where to do it; on the CPU it is counted.
        step: its number, by which stage 2 knows whether R1 is due.

    Returns:
        the most that is allocated at a time; None if the device has not so much.
    """
    recipe = replace(recipe, device=device.type, compile=False, micro_batch_size=None, batch_size=images)
    if device.type != "cuda":  # what is counted must not follow the speed of this CPU
        recipe = replace(recipe, attention="fp32")
    task = build(recipe, config)
    if device.type != "cuda":
        return count(task, config, images, step) / 1e9
    gc.collect()
    torch.cuda.reset_peak_memory_stats(device)
    try:
        task.step(random_batch(config, images, device), step)
    except torch.OutOfMemoryError:
        return None
    return torch.cuda.max_memory_allocated(device) / 1e9


def build(recipe: TrainRecipe, config: QLIPConfig) -> Stage1 | Stage2:
    """A recipe's task with random weights; those of LPIPS too, which has the same size whatever it learnt."""
    size = config.vision.image_size
    model = QLIP(config, image_processor=ImageProcessor(resize=size, crop=size)).to(recipe.device)
    if isinstance(recipe, Recipe):
        return recipe.build_task(model)
    assert isinstance(recipe, Stage2Recipe)
    weight = recipe.task.perceptual_weight
    task = replace(recipe, task=replace(recipe.task, perceptual_weight=0.0)).build_task(model)
    if weight:
        task.perceptual, task.weights["perceptual"] = _untrained_perceptual().to(model.device), weight
    return task


def random_batch(config: QLIPConfig, images: int, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Pictures of noise with random words of full length, each of its own group."""
    text, side = config.text, config.vision.image_size
    input_ids = torch.randint(0, text.vocab_size - 2, (images, text.max_position_embeddings))
    input_ids[:, -1] = text.vocab_size - 1 if text.eos_token_id == 2 else text.eos_token_id
    tensors = {"pixel_values": torch.randn(images, 3, side, side), "input_ids": input_ids}
    tensors["group"] = torch.arange(images)
    return {name: tensor.to(device) for name, tensor in tensors.items()} | {"keys": [""] * images}


def count(task: Stage1 | Stage2, config: QLIPConfig, images: int, step: int = 1) -> int:
    """Bytes of all tensors that are alive at a time in a step, at most; the task itself is left as it is."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with FakeCopyMode(fake):
        task = copy.deepcopy(task)
    with fake, Counter() as counter:
        counter.see(task.state_dict())
        task.step(random_batch(config, images), step)
    return counter.peak


class Counter(TorchDispatchMode):
    """Counts the bytes of the storages that operations read and write, as long as each of them lives.

    Attributes:
        now: bytes alive.
        peak: the most that there were.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def see(self, tensors: Any) -> None:
        """Count what is not counted yet of some tensors, in containers of any kind."""
        for tensor in tree_iter(tensors):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self._known:
                self._known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)

    def _forget(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self.now -= num_bytes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.see((args, kwargs))
        if args and isinstance(args[0], FakeTensor):  # has no value: any will do where a step looks at one
            if func is torch.ops.aten._local_scalar_dense.default:
                return 0.0 if args[0].is_floating_point() else 0
            if func is torch.ops.aten._unique2.default:
                return args[0].flatten(), args[0], args[0]
        results = func(*args, **(kwargs or {}))
        self.see(results)
        return results


def draw(record: dict[str, Any], folder: Path) -> "Figure":
    """Memory against images at once: ours as lines, the paper's as points."""
    figure = new_figure(7.2, 4.6)
    axis = figure.subplots()
    for series, line in zip(record["series"], ("o-", "o--", "o:"), strict=False):
        points = [(p["images"], p["memory_gb"]) for p in series["points"] if p["memory_gb"] is not None]
        label = f"ours, {record['how']}: {series['name']}"
        axis.plot(*zip(*points, strict=True), line, color=OURS, markersize=4, label=label)
    for series, marker in zip(record["paper"], "sD", strict=False):
        points = [(p["images"], p["memory_gb"]) for p in series["points"]]
        label = f"paper: {series['name']}"
        axis.plot(*zip(*points, strict=True), marker, color=THEIRS, markersize=7, mfc="none", mew=1.8, label=label)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.set_xticks(sorted({p["images"] for s in (*record["series"], *record["paper"]) for p in s["points"]}))
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.yaxis.set_major_formatter("{x:g}")
    plain(
        axis,
        f"Memory of a training step: {' and '.join(record['recipes'])}",
        "images on a device",
        "GB (10⁹ bytes)",
    )
    axis.legend(frameon=False, fontsize=8.5)
    return figure


def _untrained_perceptual() -> Perceptual:
    perceptual = Perceptual(shift_tolerant=False)
    for p in perceptual.parameters():
        nn.init.normal_(p, std=p[0].numel() ** -0.5 if p.ndim == 4 else 0.0)
    return perceptual


def _points(memory: dict[int, Any]) -> list[dict[str, Any]]:
    return [{"images": images, "memory_gb": gb and round(gb, 3)} for images, gb in memory.items()]
