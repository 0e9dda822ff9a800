"""The paper's ablations (Table 3a to c) in small: `python benchmarks/paper_tiny.py --out DIR …`.

Each cell is a training of the recipe `tiny` with what the table varies, in its own folder under `--out`. Every
image is reconstructed. A finished cell is not trained again, an interrupted one goes on; `--cells` chooses, and
what a cell begins with is trained first. After each one the results are written anew, beside the paper's:
`paper_tiny.json`, `.png`, `.md`.

- (a) α_a:α_r, the paper's numbers literally, α_q = α_z = 1 as there. Of 0:1 only the ratio is known: α_r is 10³,
  so that the cell differs from 1:10³ by the missing alignment. In 1:0 the quantizer has no loss, and stands still.
  The recipe itself has α_r = 300: after so short a training both losses stand elsewhere (the paper's rule).
  The paper's rows begin with masked image modelling, ours at random.
- (b) The vision encoder of 0:1 in place of masked image modelling, that of 1:0 in place of CLIP; else as 1:10³.
- (c) Recipe 1: 1:10³, then stage 2. Recipe 2: 1:10³ without the quantizer, which learns in stage 2 only. Either
  stage 2 is `tiny-stage2`, but the down MLP learns.

Zero-shot accuracy is of the classes in the data. Where the paper has rFID, ours is LPIPS or ST-LPIPS.
"""

import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from safetensors.torch import load_file, save_file

from qlip.environment import environment, resolve_device
from qlip.errors import InputError
from qlip.eval.metrics import psnr, stack_uint8, to_uint8
from qlip.eval.reconstruction import reconstruction
from qlip.eval.zero_shot import zero_shot
from qlip.figures.ablations import Result, write_tables
from qlip.files import whole_file
from qlip.model import QLIP
from qlip.model.checkpoint import load
from qlip.recipes import load_recipe
from qlip.recipes.plain import to_plain
from qlip.recipes.run import Data, DataConfig, TrainRecipe, run
from qlip.recipes.stage1 import InitConfig
from qlip.train.parallel import ComputeConfig
from qlip.train.perceptual import Perceptual, load_perceptual

RESULTS = Path(__file__).parents[1] / "docs" / "results"
CPU_CELLS, CPU_STEPS = ("1:0", "1:1e3", "0:1"), 600


@dataclass(frozen=True)
class Cell:
    """One training.

    Attributes:
        task: what differs from the task of `tiny`, or in stage 2 of `tiny-stage2`.
        start: the cell whose vision encoder it begins with, or whose tokenizer, in stage 2.
        stage: 1 or 2.
    """

    task: dict[str, Any] = field(default_factory=dict)
    start: str | None = None
    stage: int = 1


def weighed(alignment: float, reconstruction: float, **others: Any) -> dict[str, Any]:
    """The paper's weights, and what else differs."""
    rest = 1.0 if reconstruction else 0.0
    weights = {"alignment_weight": alignment, "reconstruction_weight": reconstruction}
    weights |= {"reconstruct_every": 1, "drop_tokens": 0.0}
    return weights | {"quantizer_weight": rest, "commitment_weight": rest} | others


CELLS = {
    "1:0": Cell(weighed(1.0, 0.0)),
    "1:1": Cell(weighed(1.0, 1.0)),
    "1:1e2": Cell(weighed(1.0, 1e2)),
    "1:1e3": Cell(weighed(1.0, 1e3)),
    "1:1e4": Cell(weighed(1.0, 1e4)),
    "0:1": Cell(weighed(0.0, 1e3)),
    "from-reconstruction": Cell(weighed(1.0, 1e3), "0:1"),
    "from-contrastive": Cell(weighed(1.0, 1e3), "1:0"),
    "recipe1-stage2": Cell({"freeze_ids": False}, "1:1e3", 2),
    "recipe2": Cell(weighed(1.0, 1e3, quantize=False, quantizer_weight=0.0, commitment_weight=0.0)),
    "recipe2-stage2": Cell({"freeze_ids": False}, "recipe2", 2),
}


@dataclass(frozen=True)
class Options:
    """What to train.

    Attributes:
        out: folder of the trainings.
        data: as for `qlip train`.
        cells: which; () is all of them on a GPU, and 1:0, 1:1e3 and 0:1 on a CPU.
        steps: of stage 1; stage 2 has an eighth, as the recipes have. None: 2,400 on a GPU, 600 on a CPU.
        batch_size: of stage 1; stage 2 has a quarter.
        device: "auto" takes a GPU if there is one.
        compile: compile the blocks, as the recipe does.
        results: folder for the tables.
    """

    out: Path
    data: DataConfig
    cells: tuple[str, ...] = ()
    steps: int | None = None
    batch_size: int = 128
    device: str = "auto"
    compile: bool = True
    results: Path = RESULTS


def recipe_of(name: str, options: Options, steps: int, device: str) -> TrainRecipe:
    """The recipe of a cell; what it begins with must be there."""
    cell = CELLS[name]
    recipe: Any = load_recipe("tiny" if cell.stage == 1 else "tiny-stage2")
    steps, batch_size = (steps, options.batch_size) if cell.stage == 1 else (steps // 8, options.batch_size // 4)
    steps = max(steps, 2)
    fit = replace(recipe.fit, steps=steps, warmup_steps=min(recipe.fit.warmup_steps, steps // 10), best=None)
    fit = replace(fit, eval_every=steps, save_every=max(1, steps // 8))
    recipe = replace(recipe, task=replace(recipe.task, **cell.task), fit=fit, batch_size=batch_size)
    recipe = replace(recipe, data=options.data, device=device, compile=options.compile and recipe.compile)
    if cell.start is None:
        return recipe
    model = folder(cell.start, options) / "model"
    if cell.stage == 2:
        return replace(recipe, tokenizer=str(model))
    start = options.out / f"{model.parent.name}-vision.safetensors"
    if not start.exists():
        save_vision(model / "model.safetensors", start)
    return replace(recipe, init=InitConfig(vision=start, vision_source="qlip"))


def save_vision(model: Path, start: Path) -> None:
    """Keep the vision encoder of a tokenizer; of the quantizer's MLPs nothing that was learnt."""
    tensors = {name: tensor for name, tensor in load_file(model).items() if name.startswith("vision_model.")}
    key = "vision_model.quant_embed.c_fc.weight"  # by which the layout is known: as random as in a new model
    fresh = torch.randn(tensors[key].shape, generator=torch.Generator().manual_seed(0))
    kept = {name: tensor for name, tensor in tensors.items() if ".quant_embed" not in name}
    with whole_file(start) as unfinished:
        save_file(kept | {key: fresh * tensors[key].shape[1] ** -0.5}, unfinished)


def folder(name: str, options: Options) -> Path:
    """Of a cell."""
    return options.out / name.replace(":", "-")


def train(
    name: str, options: Options, steps: int, device: str, data: Data, perceptual: Perceptual | None
) -> Result | None:
    """The results of a cell, trained if need be; None if SIGTERM stopped it."""
    recipe, place = recipe_of(name, options, steps, device), folder(name, options)
    settings = {k: v for k, v in to_plain(recipe).items() if k not in ComputeConfig.__dataclass_fields__}
    path = place / "result.json"
    if path.exists():
        result = json.loads(path.read_text(encoding="utf-8"))
        if result.pop("settings") != settings:
            raise InputError(f"{place} holds a cell of other data, steps or weights: choose another --out")
        return result
    torch.compiler.reset()  # or the compiler would count the models of all cells as one that keeps changing
    if not run(recipe, place, resume=True):
        return None
    result = evaluate(load(place / "model", device=device), recipe, data, perceptual)
    result |= {"num_val": len(data.val), "environment": environment(device)}
    with whole_file(path) as unfinished:
        unfinished.write_text(json.dumps(result | {"settings": settings}, indent=1) + "\n", encoding="utf-8")
    return result


def evaluate(model: QLIP, recipe: Any, data: Data, perceptual: Perceptual | None) -> Result:
    """PSNR, SSIM, LPIPS, use of the code and zero-shot accuracy on held-out pictures."""
    names = [names[0] for names in data.captioner.names]
    result: Result = zero_shot(model, data.val, names, data.captioner.templates) | {"chance": 1 / len(names)}
    if recipe.stage == 1 and not recipe.task.quantize:
        return result | {"psnr": unquantized_psnr(model, data.val)}
    perceptual = perceptual and perceptual.to(model.device)
    return result | reconstruction(model, data.val, perceptual=perceptual)


@torch.no_grad()
def unquantized_psnr(model: QLIP, samples: list[dict]) -> float:
    """Mean PSNR in dB of pictures rebuilt from the patch features as they are."""
    processor, scores = model.need_image_processor(), []
    for start in range(0, len(samples), 250):
        pictures = [processor.preprocess(sample["image"]) for sample in samples[start : start + 250]]
        features = model.hidden_states(processor(pictures).to(model.device))[:, 1:]
        images = processor.denormalize(model.vision_decoder(features).float()).cpu()
        scores.append(psnr(to_uint8(images), stack_uint8(pictures)))
    return float(torch.cat(scores).mean())


def main() -> None:
    """Train cell by cell, and write after each."""
    options = tyro.cli(Options, description=__doc__)
    device = resolve_device(options.device).type
    cells = options.cells or (CPU_CELLS if device == "cpu" else tuple(CELLS))
    if unknown := set(cells) - CELLS.keys():
        raise InputError(f"cells: {min(unknown)!r} is none of {', '.join(CELLS)}")
    data = Data.open(options.data)
    if not data.val or not data.captioner.names:
        raise InputError("the tables need held-out pictures of classes: name --data.val and --data.classes")
    wanted = {*cells, *(CELLS[name].start for name in cells)}
    steps = options.steps or (CPU_STEPS if device == "cpu" else load_recipe("tiny").fit.steps)
    perceptual = perceptual_loss()
    name = "no LPIPS" if perceptual is None else "ST-LPIPS" if perceptual.shift_tolerant else "LPIPS"
    settings = {"steps": steps, "batch_size": options.batch_size, "perceptual": name}
    finished = [cell for cell in CELLS if (folder(cell, options) / "result.json").exists()]
    results: dict[str, Result] = {}
    for cell in (*finished, *(cell for cell in CELLS if cell in wanted and cell not in finished)):
        result = train(cell, options, steps, device, data, perceptual)
        if result is None:
            return
        results[cell] = result
        write_tables(results, settings, options.results, device)
        print(cell, {k: round(v, 4) for k, v in result.items() if isinstance(v, float)}, flush=True)


def perceptual_loss() -> Perceptual | None:
    """LPIPS or ST-LPIPS; the tables do without if neither has weights."""
    try:
        return load_perceptual()
    except InputError as error:
        print(f"no LPIPS: {error}", file=sys.stderr)
        return None


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"paper_tiny: {error}")
