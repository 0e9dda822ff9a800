"""Tokenizers side by side, and beside them image files at the same number of bytes."""

import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from qlip.eval.batches import Batch, Columns, collect
from qlip.eval.codecs import CODECS, read
from qlip.eval.metrics import stack_uint8
from qlip.eval.reconstruction import Distance, compare, rebuild
from qlip.eval.results import label
from qlip.machine import num_cores
from qlip.model.qlip import QLIP
from qlip.train.distributed import world_size
from qlip.train.plot import new_figure, save_figure

QUALITIES = (0, 2, 5, 10, 20, 35, 50, 70)
METRICS = ("psnr", "ssim", "lpips", "st_lpips")


def measure_tokenizer(model: QLIP, batches: Iterable[Batch], distances: dict[str, Distance]) -> Columns:
    """What a tokenizer makes of pictures.

    Returns:
        num_bytes, bits_per_pixel, psnr, ssim and the perceptual distance of each picture.
    """
    columns, _ = rebuild(model, batches, distances)
    height, width = model.config.size
    num_bits = columns.values.pop("tokens")[0].numel() * model.config.num_bits if columns.values else 0
    size = torch.full((len(columns),), num_bits / 8, dtype=torch.float64)
    values = {"num_bytes": size, "bits_per_pixel": size * 8 / (height * width)}
    return Columns(values | columns.values if columns.values else {}, columns.digests, columns.faults)


def measure_formats(
    batches: Iterable[Batch], targets: Sequence[int], distances: dict[str, Distance], device: torch.device
) -> Columns:
    """What JPEG, WebP and AVIF make of pictures.

    Of each format three kinds of files: of fixed qualities, for a curve; the file nearest to each target; and the
    one nearest to that and to what the format takes before it tells anything ("header free").

    Args:
        batches: pictures.
        targets: bytes.
        distances: perceptual ones, by name.
        device: for these.

    Returns:
        columns named FILE/METRIC, the metrics of `measure_tokenizer`.
    """
    with ThreadPoolExecutor(max(1, num_cores() // world_size())) as pool:

        def score(batch: Batch) -> dict[str, Tensor]:
            pictures = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in batch.pictures]
            headers = {codec.name: codec.header_size(pictures[0].size) for codec in CODECS}
            files = list(pool.map(partial(_files, targets=targets, headers=headers), pictures))
            found: dict[str, Tensor] = {}
            for who in files[0]:
                encoded = [files_of[who] for files_of in files]
                size = torch.tensor([len(file) for file in encoded], dtype=torch.float64)
                values = {"num_bytes": size, "bits_per_pixel": size * 8 / batch.pictures[0, 0].numel()}
                values |= compare(stack_uint8([read(file) for file in encoded]), batch.pictures, distances, device)
                found |= {f"{who}/{metric}": value for metric, value in values.items()}
            return found

        return collect(batches, score)


def draw_rates(found: Mapping[str, Any], path: Path) -> None:
    """Draw bits a pixel against each quality: curves of the formats, a mark for each tokenizer.

    Args:
        found: the record of a comparison.
        path: the PNG to write.

    Raises:
        InputError: matplotlib is not installed.
    """
    results, names = found["results"], [model["name"] for model in found["models"]]
    metrics = [metric for metric in METRICS if metric in results[names[0]]]
    figure = new_figure(4.3 * len(metrics), 3.8)
    for axis, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
        for i, codec in enumerate(CODECS):
            curve = [values for who, values in results.items() if re.fullmatch(rf"{codec.name} quality \d+", who)]
            points = sorted((c["bits_per_pixel"]["value"], c[metric]["value"]) for c in curve)
            axis.plot(*zip(*points, strict=True), "o-", color=f"C{i + 1}", label=codec.name, markersize=4)
        for i, name in enumerate(names):
            point = results[name]["bits_per_pixel"]["value"], results[name][metric]["value"]
            axis.scatter(*point, marker="*PXD"[i % 4], s=140, color="C0", label=name, zorder=3)
        axis.set_xlabel(label("bits_per_pixel"))
        axis.set_ylabel(label(metric) + (" (less is better)" if "lpips" in metric else ""))
        axis.grid(alpha=0.3)
    figure.axes[0].legend(frameon=False, fontsize=8)
    save_figure(figure, path)


def _files(picture: Image.Image, targets: Sequence[int], headers: Mapping[str, int]) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for codec in CODECS:
        encode = codec.encoder(picture)
        qualities = [q for q in QUALITIES if codec.lowest <= q <= codec.highest]
        found |= {f"{codec.name} quality {quality}": encode(quality) for quality in qualities}
        free = (target + headers[codec.name] for target in targets)
        near = codec.nearest(encode, *targets, *free, known=qualities)
        for i, target in enumerate(targets):
            found[f"{codec.name} near {target:,} bytes"] = near[i]
            found[f"{codec.name} near {target:,} bytes, header free"] = near[len(targets) + i]
    return found
