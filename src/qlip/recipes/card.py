"""From a run to a checkpoint folder with a model card whose numbers this command measured."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from qlip.data.captions import read_class_names
from qlip.data.sources import open_indexed
from qlip.environment import environment
from qlip.errors import InputError
from qlip.eval.batches import Track
from qlip.eval.reconstruction import reconstruction
from qlip.eval.zero_shot import zero_shot
from qlip.files import whole_file
from qlip.guarded import read_json
from qlip.jobs.push import CARD
from qlip.model.checkpoint import BUNDLED, bundled, load, save
from qlip.model.qlip import QLIP
from qlip.train.log import read_log


def publish(
    run: Path,
    name: str,
    out: Path,
    val: Sequence[Path],
    classes: Path | None = None,
    attribution: Path | None = None,
    dtype: str = "bfloat16",
    license: str = "other",
    track: Track = iter,
) -> dict[str, float]:
    """Write `out` in the published layout, measure what was written, and describe it in `README.md`.

    Args:
        run: folder of a finished run; of stage 2, the card tells of stage 1 too, where its run is still there, or
            its tokenizer was published.
        name: of the tokenizer.
        out: the new folder.
        val: held-out data on this machine, used whole.
        classes: JSON file of class names, where they have labels.
        attribution: text on the training data and the weights' licence.
        dtype: of the weights in the file, "float32" or "bfloat16".
        license: of the weights, by its identifier on the hub.
        track: shows progress.

    Returns:
        the held-out numbers.

    Raises:
        InputError: the run has not finished, or a file is missing; then nothing is written.
    """
    if not (run / "model").is_dir():
        raise InputError(f"{run} has no finished model: let the run end, or go on with --resume")
    samples = open_indexed(val)
    names = [n[0] for n in read_class_names(classes)] if classes else []
    notes = attribution.read_text(encoding="utf-8") if attribution else ""
    stages = _stages(run)
    templates = stages[0].settings["recipe"]["data"]["templates"]
    save(load(run / "model"), out, dtype=getattr(torch, dtype))
    model = load(out)
    model.name = name
    results = reconstruction(model, samples, track)
    if names:
        results |= zero_shot(model, samples, names, templates, track)
    measured = {
        "results": results,
        "num_samples": len(samples),
        "num_classes": len(names),
        "ids": model.id_hash(),
        "environment": environment("cpu"),
    }
    written = {f"recipe{stage.suffix}.json": json.dumps(stage.settings, indent=2) + "\n" for stage in stages}
    written |= {
        "results.json": json.dumps(measured, indent=2) + "\n",
        "README.md": _card(model, license, stages, measured, val, notes),
    } | ({"ATTRIBUTION.md": notes} if notes else {})
    for file, text in written.items():
        (out / file).write_text(text, encoding="utf-8")
    return results


@dataclass(frozen=True)
class _Stage:
    """A run that made the tokenizer.

    Attributes:
        settings: its `recipe.json`, without folders.
        log: its entries; a published tokenizer has none.
    """

    settings: dict[str, Any]
    log: list[dict[str, float]]

    @property
    def suffix(self) -> str:
        """What tells its files from those of the other stage."""
        return "-stage2" if self.settings.get("stage", 1) == 2 else ""


def _stages(run: Path) -> list[_Stage]:
    """The run, and before it the one whose tokenizer it began with, if that is on this machine."""
    settings = read_json(run / "recipe.json")
    before = _origin(settings["recipe"].get("tokenizer"))
    _hide_folders(settings["recipe"])
    return [*(_stages(before) if before else []), _Stage(settings, read_log(run / "log.jsonl"))]


def _origin(tokenizer: str | None) -> Path | None:
    """The run that left a tokenizer, or the folder that tells of it, as bundled and published ones do."""
    if tokenizer is None:
        return None
    folder = BUNDLED / tokenizer if tokenizer in bundled() else Path(tokenizer)
    return next((place for place in (folder.parent, folder) if (place / "recipe.json").exists()), None)


def _shown(source: str) -> str:
    if source.startswith("datasets:") or "://" in source:
        return source
    return "/".join(Path(source).parts[-1 if Path(source).suffix else -2 :])


def _hide_folders(recipe: dict[str, Any]) -> None:
    """Leave of every path its name, of a folder's also the last before it: where they lay is nobody's business."""
    data = recipe["data"]
    for split in ("train", "val"):
        data[split] = [_shown(source) for source in data[split]]
    init = recipe.get("init", {})
    files = [(data, "classes"), (recipe, "vocabulary"), (recipe["task"], "calibration")]
    for holder, name in [*files, (init, "vision"), (init, "text")]:
        if holder.get(name):
            holder[name] = Path(holder[name]).name
    if "teacher" in recipe:
        recipe["teacher"] = [Path(file).name for file in recipe["teacher"]]
    if (tokenizer := recipe.get("tokenizer")) and Path(tokenizer).is_dir():  # a hub id stays
        recipe["tokenizer"] = Path(tokenizer).name


_ROWS = {
    "psnr": ("PSNR", "{:.2f} dB"),
    "ssim": ("SSIM", "{:.4f}"),
    "top1": ("zero-shot top-1", "{:.1%}"),
    "top5": ("zero-shot top-5", "{:.1%}"),
    "bit_entropy": ("entropy of the bits, each on its own", "{:.2f} bits"),
    "distinct_tokens": ("different ids among all tokens", "{:.1%}"),
}


def _card(
    model: QLIP,
    license: str,
    stages: Sequence[_Stage],
    measured: dict[str, Any],
    val: Sequence[Path],
    notes: str,
) -> str:
    """The model card, Markdown."""
    rows = [
        f"| {label} | {form.format(measured['results'][key])} |"
        for key, (label, form) in _ROWS.items()
        if key in measured["results"]
    ]
    lines = [
        *_description(model, license),
        "## Held-out numbers",
        "",
        f"On all {measured['num_samples']:,} samples of {', '.join(Path(p).name for p in val)}, from the "
        "weights in this folder in float32 (`results.json` has every digit, the hardware and the versions).",
        "",
        "| | |",
        "| --- | --- |",
        *rows,
        "",
        "Zero-shot: each class by its first name in every training template, the embeddings averaged.",
        "",
        *(line for stage in stages for line in _training(stage)),
    ]
    if notes:
        lines += ["## Data, licence, limits", "", notes.strip(), ""]
    return "\n".join(lines)


def write_plain_card(model: QLIP, out: Path) -> None:
    """Describe a tokenizer whose numbers nobody has measured; a card that is there stays.

    Args:
        model: what is in the folder.
        out: the folder, whose name the card has.

    Raises:
        InputError: the card cannot be written.
    """
    if (out / CARD).exists():
        return
    name, model.name = model.name, out.resolve().name
    text = "\n".join([*_description(model, "other"), f"Exported from {name}. Its numbers are not measured.", ""])
    model.name = name
    with whole_file(out / CARD) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def _description(model: QLIP, license: str) -> list[str]:
    """How a card begins: what the tokenizer is, and how to load it."""
    config = model.config
    height, width = config.size
    num_bytes = config.num_tokens * config.num_bits // 8
    return [
        "---",
        f"license: {license}",
        "library_name: open-qlip",
        "tags: [visual-tokenizer, binary-spherical-quantization, zero-shot-image-classification]",
        "---",
        f"# {model.name}",
        "",
        f"A QLIP tokenizer: a {height} × {width} image becomes "
        f"{config.num_tokens} tokens of {config.num_bits} bits ({num_bytes} bytes), from which it is rebuilt, "
        "and whose encoder classifies with words. "
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters; ids `{model.id_hash()}`.",
        "",
        "```python",
        "import qlip",
        "",
        f'model = qlip.load("{model.name}")',
        'tokens = model.tokenize("photo.jpg")',
        "images = model.detokenize(tokens)",
        'probabilities = model.classify("photo.jpg", ["dog", "tabby cat"])',
        "```",
        "",
    ]


def _training(stage: _Stage) -> list[str]:
    """How one stage was trained."""
    recipe, segments = stage.settings["recipe"], stage.settings["segments"]
    steps, batch_size = recipe["fit"]["steps"], recipe["batch_size"]
    weights = {k.removesuffix("_weight"): v for k, v in recipe["task"].items() if k.endswith("_weight")}
    templates = f"of class names in {len(recipe['data']['templates'])} templates, where a picture has none"
    words = f"captions {templates if recipe['data']['classes'] else 'as they came'}"
    optimizer = {"adamw": "AdamW", "lamb": "LAMB", "muon": "Muon"}[recipe["task"].get("optimizer", "adamw")]
    file = f"recipe{stage.suffix}.json"
    return [
        f"## Training, stage {2 if stage.suffix else 1}",
        "",
        f"- Data: {', '.join(recipe['data']['train'])}; {'pictures alone' if stage.suffix else words}.",
        f"- {steps:,} steps of {batch_size} samples ({steps * batch_size:,} images), {optimizer}, peak learning "
        f"rate {recipe['task']['lr']:g}, loss weights {weights}.",
        *(f"- From step {s['first_step']:,}: {_environment(s)}" for s in segments),
        *_duration(stage, steps * batch_size),
        f"- `{file}` names every setting; `qlip train {file} --data.train …` repeats it.",
        "",
    ]


def _duration(stage: _Stage, num_images: int) -> list[str]:
    if not stage.log:
        return []
    rate = median([entry["images_per_s"] for entry in stage.log if "loss" in entry])
    return [f"- {rate:.0f} images a second (median), so {num_images / rate / 3600:.1f} hours at that rate."]


def _environment(segment: dict[str, Any]) -> str:
    used = segment["environment"]
    return (
        f"{used['hardware']}, Python {used['python']}, torch {used['torch']}, commit `{used['commit']}`, "
        f"cosine schedule over {segment['fit']['steps']:,} steps."
    )
