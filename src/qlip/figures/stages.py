"""The paper's Figure 4: pictures, what stage 1 rebuilds of them, and what stage 2 does."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from qlip.data.samples import evenly
from qlip.data.sources import open_samples
from qlip.data.stream import Stream
from qlip.errors import InputError
from qlip.eval.metrics import psnr, ssim, stack_uint8, to_uint8
from qlip.figures.record import write_figure
from qlip.files import whole_file
from qlip.model.checkpoint import load
from qlip.train.perceptual import Perceptual, load_perceptual
from qlip.train.plot import new_figure

if TYPE_CHECKING:
    from qlip.train.plot import Figure

COLUMNS = {"original": "original", "stage1": "after stage 1", "stage2": "after stage 2"}


def stages(stage1: str, stage2: str, val: Sequence[str], out: Path, count: int = 6, device: str = "auto") -> Path:
    """Rebuild some pictures with both models; write `stages.json`, `stages.png` and the pictures in `stages/`.

    Without weights for LPIPS (`qlip.train.perceptual`) that number is left out, which the log says.

    Args:
        stage1: the tokenizer that stage 1 left: a folder, a bundled name, or a hub id.
        stage2: likewise of stage 2.
        val: pictures held out of training, as a recipe's `data.val`.
        out: folder.
        count: how many pictures, evenly spread.
        device: where to compute.

    Returns:
        the JSON file.

    Raises:
        InputError: a model or a file cannot be read, or the models are for pictures of different sizes.
    """
    models = {"stage1": load(stage1, device=device), "stage2": load(stage2, device=device)}
    processor = models["stage1"].need_image_processor()
    if models["stage2"].need_image_processor() != processor:
        raise InputError(f"{stage1} and {stage2} prepare pictures differently: name two stages of one tokenizer")
    samples = open_samples(val)
    if isinstance(samples, Stream):
        raise InputError(f"{', '.join(val)}: pictures are chosen by number, so name data on this machine")
    if not 1 <= count <= len(samples):
        raise InputError(f"count is {count}: it must be from 1 to the {len(samples):,} pictures that there are")
    chosen = [samples[i] for i in evenly(len(samples), count)]
    pictures = [processor.preprocess(sample["image"]) for sample in chosen]
    original, perceptual = stack_uint8(pictures), _perceptual(models["stage1"].device)
    columns, scores = {"original": original}, {}
    for name, model in models.items():
        images = model.detokenize(model.tokenize(pictures))
        columns[name] = to_uint8(images)
        scores[name] = _scores(columns[name], original, perceptual)
    for name, batch in columns.items():
        for i, pixels in enumerate(batch.permute(0, 2, 3, 1).numpy()):
            with whole_file(out / "stages" / f"{i}-{name}.png") as unfinished:
                Image.fromarray(pixels).save(unfinished, "PNG")
    numbers = {
        "stage1": stage1,
        "stage2": stage2,
        "ids": {name: model.id_hash() for name, model in models.items()},
        "perceptual": ("ST-LPIPS" if perceptual.shift_tolerant else "LPIPS") if perceptual else None,
        "pictures": [
            {"key": sample["key"]} | {name: {k: v[i] for k, v in found.items()} for name, found in scores.items()}
            for i, sample in enumerate(chosen)
        ],
    }
    return write_figure(out, "stages", numbers, draw, models["stage1"].device.type)


def draw(record: dict[str, Any], folder: Path) -> "Figure":
    """A column for each picture: the original, and below it what each stage rebuilds, with its scores."""
    count = len(record["pictures"])
    figure = new_figure(1.75 * count + 0.3, 6.6)
    axes = figure.subplots(3, count, squeeze=False)
    for row, (name, title) in zip(axes, COLUMNS.items(), strict=True):
        for i, (axis, scores) in enumerate(zip(row, record["pictures"], strict=True)):
            with Image.open(folder / "stages" / f"{i}-{name}.png") as picture:
                axis.imshow(picture, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            if name in scores:
                axis.set_xlabel(_caption(scores[name], record["perceptual"]), fontsize=8)
        row[0].set_ylabel(title, fontsize=10)
    return figure


def _caption(scores: dict[str, float], perceptual: str | None) -> str:
    text = f"{scores['psnr']:.2f} dB, SSIM {scores['ssim']:.3f}"
    return f"{text}\n{perceptual} {scores['perceptual']:.3f}" if perceptual else text


def _perceptual(device: torch.device) -> Perceptual | None:
    try:
        return load_perceptual().to(device)
    except InputError as error:
        logging.getLogger("qlip").warning("no LPIPS: %s", error)
        return None


@torch.no_grad()
def _scores(rebuilt: Tensor, original: Tensor, perceptual: Perceptual | None) -> dict[str, list[float]]:
    """PSNR (dB), SSIM and LPIPS of each picture of two (B, 3, H, W) uint8 batches."""
    scores = {"psnr": psnr(rebuilt, original), "ssim": ssim(rebuilt, original)}
    if perceptual is not None:
        device = perceptual.mean.device
        pairs = zip(rebuilt.to(device), original.to(device), strict=True)
        scores["perceptual"] = torch.cat([perceptual(a[None] / 255, b[None] / 255) for a, b in pairs])
    return {name: values.tolist() for name, values in scores.items()}
