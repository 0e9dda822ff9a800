"""From a run to a checkpoint folder with a model card whose numbers this command measured."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from qlip.data.parquet import ParquetSamples, read_class_names
from qlip.environment import environment
from qlip.errors import InputError
from qlip.eval.protocols import reconstruction, zero_shot
from qlip.model.checkpoint import load, save
from qlip.train.log import read_log


def publish(
    run: Path,
    name: str,
    out: Path,
    val: Sequence[Path],
    classes: Path | None = None,
    attribution: Path | None = None,
    dtype: str = "bfloat16",
) -> dict[str, float]:
    """Write `out` in the published layout, measure what was written, and describe it in `README.md`.

    Args:
        run: folder of a finished run.
        name: of the tokenizer.
        out: the new folder.
        val: held-out Parquet files, used whole.
        classes: JSON file of class names, where they have labels.
        attribution: text on the training data and the weights' licence.
        dtype: of the weights in the file, "float32" or "bfloat16".

    Returns:
        the held-out numbers.

    Raises:
        InputError: the run has not finished.
    """
    if not (run / "model").is_dir():
        raise InputError(f"{run} has no finished model: let the run end, or go on with --resume")
    save(load(str(run / "model")), out, dtype=getattr(torch, dtype))
    model = load(str(out))
    model.name = name
    samples = ParquetSamples(val)
    results = reconstruction(model, samples)
    settings = json.loads((run / "recipe.json").read_text(encoding="utf-8"))
    if classes:
        names = [n[0] for n in read_class_names(classes)]
        results |= zero_shot(model, samples, names, settings["recipe"]["data"]["templates"])
    measured = {"results": results, "num_samples": len(samples), "environment": environment("cpu")}
    (out / "results.json").write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")
    if attribution:
        shutil.copyfile(attribution, out / "ATTRIBUTION.md")
    card = _card(model, name, settings, read_log(run / "log.jsonl"), measured, val, attribution)
    (out / "README.md").write_text(card, encoding="utf-8")
    return results


_ROWS = {
    "psnr": ("PSNR", "{:.2f} dB"),
    "ssim": ("SSIM", "{:.4f}"),
    "top1": ("zero-shot top-1", "{:.1%}"),
    "top5": ("zero-shot top-5", "{:.1%}"),
    "bit_entropy": ("entropy of the bits, each on its own", "{:.2f} bits"),
    "distinct_tokens": ("different ids among all tokens", "{:.1%}"),
}


def _card(
    model: Any,
    name: str,
    settings: dict[str, Any],
    log: list[dict[str, float]],
    measured: dict[str, Any],
    val: Sequence[Path],
    attribution: Path | None,
) -> str:
    """The model card, Markdown."""
    config, recipe, trained_on = model.config, settings["recipe"], settings["environment"]
    steps, batch_size = recipe["fit"]["steps"], recipe["batch_size"]
    rates = [entry["images_per_s"] for entry in log if "loss" in entry and "images_per_s" in entry]
    hours = steps * batch_size / (sorted(rates)[len(rates) // 2]) / 3600
    num_bytes = config.num_tokens * config.num_bits // 8
    weights = {k.removesuffix("_weight"): v for k, v in recipe["task"].items() if k.endswith("_weight")}
    rows = [
        f"| {label} | {form.format(measured['results'][key])} |"
        for key, (label, form) in _ROWS.items()
        if key in measured["results"]
    ]
    data = ", ".join(Path(p).name for p in recipe["data"]["train"])
    lines = [
        "---",
        "license: apache-2.0",
        "library_name: open-qlip",
        "tags: [visual-tokenizer, binary-spherical-quantization, zero-shot-image-classification]",
        "---",
        f"# {name}",
        "",
        f"A QLIP tokenizer: a {config.vision.image_size} × {config.vision.image_size} image becomes "
        f"{config.num_tokens} tokens of {config.num_bits} bits ({num_bytes} bytes), from which it is rebuilt, "
        "and whose encoder classifies with words. "
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters; ids `{model.id_hash()}`.",
        "",
        "```python",
        "import qlip",
        "",
        f'model = qlip.load("{name}")',
        'tokens = model.tokenize("photo.jpg")',
        "images = model.detokenize(tokens)",
        'probabilities = model.classify("photo.jpg", ["a dog", "a cat"])',
        "```",
        "",
        "## Held-out numbers",
        "",
        f"On all {measured['num_samples']:,} samples of {', '.join(Path(p).name for p in val)}, from the "
        "weights in this folder in float32 (`results.json` has every digit, the hardware and the versions).",
        "",
        "| | |",
        "| --- | --- |",
        *rows,
        "",
        "Zero-shot: each class by its first name in every training template, the embeddings averaged. The classes "
        "are those of the training captions, so this measures the alignment on new pictures, not on new words.",
        "",
        "## Training",
        "",
        f"- Data: {data}; captions from class names through {len(recipe['data']['templates'])} templates.",
        f"- {steps:,} steps of {batch_size} samples ({steps * batch_size:,} images), AdamW, peak learning rate "
        f"{recipe['task']['lr']:g}, loss weights {weights}.",
        f"- {trained_on['hardware']}, torch {trained_on['torch']}, about {hours:.1f} hours; open-qlip commit "
        f"`{trained_on['commit']}`.",
        "- `recipe.json` in the run's folder names every setting; `qlip train` repeats it.",
        "",
        "## Limits",
        "",
        "Small, trained briefly on few photographs: rebuilt pictures are blurry, words outside its captions mean "
        "little to it. It is there to learn from, to test with, and to start from.",
        "",
    ]
    if attribution:
        lines += ["## Data and licence", "", attribution.read_text(encoding="utf-8").strip(), ""]
    return "\n".join(lines)
