r"""What tokenizers make of pictures that no training saw, side by side with each other and with file formats.

    python benchmarks/held_out.py qlip-tiny runs/tiny-contrastive/model --photos val.parquet \
        --classes classes.json --registry registry/held-out --out docs/results/qlip-tiny.json

For each tokenizer, and each of up to three sets: PSNR, SSIM, code use, and how often words name the picture; for
photographs also a perceptual distance (LPIPS where its weights are, else ST-LPIPS). Sets: photographs; pictures
of names that training never saw; names that it saw, in a style that it never saw (both of examples/registry_data).
Then JPEG, WebP and AVIF on the same photographs at several qualities, and a picture of rate against quality.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import tyro
from PIL import Image
from rich.progress import track

import qlip
from qlip.data.captions import read_class_names
from qlip.data.parquet import ParquetSamples
from qlip.data.samples import evenly
from qlip.environment import environment, resolve_device
from qlip.eval.codecs import CODECS, read
from qlip.eval.metrics import psnr, ssim, stack_uint8
from qlip.eval.reconstruction import reconstruction
from qlip.eval.zero_shot import zero_shot
from qlip.recipes.run import TEMPLATES
from qlip.train.perceptual import Perceptual, load_perceptual

DRAWN = ("{}", "an icon of {}", "an emoji of {}", "clip art of {}")
QUALITIES = (0, 1, 2, 5, 10, 20, 35, 50, 70)
MOST_NAMES = 100


@dataclass(frozen=True)
class HeldOut:
    """A set of held-out pictures.

    Attributes:
        samples: with `image` and `label`.
        names: for each label.
        templates: sentences for a name.
    """

    samples: Sequence[dict]
    names: list[str]
    templates: tuple[str, ...]


def open_sets(
    photos: tuple[Path, ...], classes: Path, registry: Path | None, max_photos: int
) -> dict[str, HeldOut]:
    """The sets that are there, by name; of the unseen names the 100 with the most pictures."""
    samples = ParquetSamples(photos)
    chosen = [samples[i] for i in evenly(len(samples), max_photos)]
    sets = {"photographs": HeldOut(chosen, [n[0] for n in read_class_names(classes)], TEMPLATES)}
    for name in ("unseen-names", "unseen-style") if registry else ():
        drawn = list(ParquetSamples([registry / f"{name}.parquet"])[:])
        names = [n[0] for n in read_class_names(registry / f"{name}.json")]
        most = MOST_NAMES if name == "unseen-names" else len(names)
        kept = sorted(label for label, _ in Counter(s["label"] for s in drawn).most_common(most))
        drawn = [s | {"label": kept.index(s["label"])} for s in drawn if s["label"] in kept]
        sets[name] = HeldOut(drawn, [names[label] for label in kept], DRAWN)
    return sets


def measure(model: qlip.QLIP, held_out: HeldOut, perceptual: Perceptual | None) -> dict[str, float]:
    """Everything about one tokenizer on one set."""
    found = reconstruction(model, held_out.samples, perceptual=perceptual)
    found |= zero_shot(model, held_out.samples, held_out.names, held_out.templates)
    return {"num_samples": len(held_out.samples), "num_names": len(held_out.names)} | found


def measure_formats(
    pictures: list[Image.Image], perceptual: Perceptual, device: torch.device
) -> list[dict[str, Any]]:
    """Means over pictures for every format and quality."""
    original, points = stack_uint8(pictures), []
    for codec in CODECS:
        qualities = [q for q in QUALITIES if codec.lowest <= q <= codec.highest]
        for quality in track(qualities, codec.name, transient=True):
            files = [codec.encode(picture, quality) for picture in pictures]
            rebuilt = stack_uint8([read(file) for file in files])
            with torch.no_grad():
                pairs = zip(rebuilt.split(25), original.split(25), strict=True)
                distances = [perceptual(a.to(device) / 255, b.to(device) / 255).cpu() for a, b in pairs]
            points.append(
                {
                    "format": codec.name,
                    "quality": quality,
                    "num_bytes": float(np.mean([len(file) for file in files])),
                    "header_bytes": codec.header_size(pictures[0].size),
                    "psnr": float(psnr(rebuilt, original).mean()),
                    "ssim": float(ssim(rebuilt, original).mean()),
                    "perceptual": float(torch.cat(distances).mean()),
                }
            )
    return points


def draw(record: dict[str, Any], path: Path) -> None:
    """Rate against PSNR, SSIM and the perceptual distance; thin lines: had the formats' headers cost nothing."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    labels = {"psnr": "PSNR, dB", "ssim": "SSIM", "perceptual": f"{record['perceptual']} (less is better)"}
    for ax, (key, label) in zip(axes, labels.items(), strict=True):
        for i, name in enumerate(dict.fromkeys(p["format"] for p in record["formats"])):
            points = [p for p in record["formats"] if p["format"] == name]
            size, value = [p["num_bytes"] for p in points], [p[key] for p in points]
            free = [s - p["header_bytes"] for s, p in zip(size, points, strict=True)]
            ax.plot(size, value, "o-", color=f"C{i + 1}", label=name, markersize=4)
            ax.plot(free, value, "--", color=f"C{i + 1}", linewidth=0.8, label=f"{name} without header")
        for i, (name, found) in enumerate(record["tokenizers"].items()):
            marker = {"marker": "**XPD"[i % 5], "s": 160 if i == 0 else 60}
            ax.scatter(found["num_bytes"], found["photographs"][key], color="C0", label=name, zorder=3, **marker)
        ax.set(xlabel="bytes a picture", ylabel=label, xlim=(0, 1100))
        ax.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(
    models: tyro.conf.Positional[tuple[str, ...]],
    /,
    *,
    photos: tuple[Path, ...],
    classes: Path,
    out: Path,
    registry: Path | None = None,
    max_photos: int = 1000,
    device: str = "auto",
) -> None:
    """Measure tokenizers, write JSON, and draw it.

    Args:
        models: bundled names, folders, hub ids.
        photos: held-out Parquet files with labels.
        classes: JSON file of their class names.
        out: JSON file; the picture lies beside it.
        registry: the folder held-out/ of the data set that `examples/registry_data` builds.
        max_photos: how many, evenly spread.
        device: where to compute.
    """
    place = resolve_device(device)
    sets = open_sets(photos, classes, registry, max_photos)
    perceptual = load_perceptual().to(place)
    tokenizers: dict[str, Any] = {}
    for name in models:
        model = qlip.load(name, device=place)
        found = tokenizers[name] = {
            "ids": model.id_hash(),
            "num_bytes": model.config.num_tokens * model.config.num_bits / 8,
        }
        for kind, held_out in sets.items():
            found[kind] = measure(model, held_out, perceptual if kind == "photographs" else None)
            print(name, kind, {key: round(value, 4) for key, value in found[kind].items()}, flush=True)
    processor = model.need_image_processor()
    pictures = [processor.preprocess(sample["image"]) for sample in sets["photographs"].samples]
    record = {
        "tokenizers": tokenizers,
        "formats": measure_formats(pictures, perceptual, place),
        "perceptual": "ST-LPIPS" if perceptual.shift_tolerant else "LPIPS",
        "environment": environment(str(place)),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    draw(record, out.with_suffix(".png"))


if __name__ == "__main__":
    tyro.cli(main)
