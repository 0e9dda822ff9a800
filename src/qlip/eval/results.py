"""What an evaluation leaves: `results.json`, a table, and a section of the model card."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qlip.environment import command, environment
from qlip.errors import InputError
from qlip.eval.interval import Number
from qlip.files import whole_file, write_json
from qlip.guarded import read_json
from qlip.train.distributed import world_size

FILE = "results.json"
BOOTSTRAP = "95 %, 1,000 bootstrap resamples of the pictures, percentiles, seed 0"
TASK_NAMES = {  # of lm-eval → as the paper's Table 5 has them
    "arc_challenge": "ARC-C",
    "hellaswag": "HellaSwag",
    "piqa": "PIQA",
    "social_iqa": "SIQA",
    "winogrande": "WinoGrande",
}

# name → what a reader sees, and how it is written; a name that is not here stands for itself
LABELS = {
    "top1": ("top-1", "{:.2%}"),
    "top5": ("top-5", "{:.2%}"),
    "cls_top1": ("CLS, top-1", "{:.2%}"),
    "patches_top1": ("mean of patches, top-1", "{:.2%}"),
    "both_top1": ("both, top-1", "{:.2%}"),
    **{f"image_to_text_recall@{k}": (f"image → text, recall at {k}", "{:.2%}") for k in (1, 5, 10)},
    **{f"text_to_image_recall@{k}": (f"text → image, recall at {k}", "{:.2%}") for k in (1, 5, 10)},
    "psnr": ("PSNR, dB", "{:.2f}"),
    "ssim": ("SSIM", "{:.4f}"),
    "lpips": ("LPIPS", "{:.4f}"),
    "st_lpips": ("ST-LPIPS", "{:.4f}"),
    "rfid": ("rFID", "{:.2f}"),
    "gfid": ("gFID", "{:.2f}"),
    "fd_efficientnet_lite0": ("FD-EfficientNet-Lite0", "{:.2f}"),
    "clip_score": ("CLIPScore, w = 1", "{:.4f}"),
    "qlip_score": ("QLIP score, w = 1", "{:.4f}"),
    "class_accuracy": ("right class, EfficientNet-Lite0", "{:.2%}"),
    "num_bytes": ("bytes an image", "{:,.0f}"),
    "bits_per_image": ("bits an image", "{:,.0f}"),
    "bits_per_pixel": ("bits a pixel", "{:.3f}"),
    "compression_ratio": ("compression, against 24-bit RGB", "{:.1f}"),
    "bit_entropy": ("entropy of the bits, each on its own", "{:.2f}"),
    "distinct_tokens": ("different ids among all tokens", "{:.2%}"),
    "codes_used": ("share of all codes used", "{:.3g}"),
    **{
        f"{task}_{acc}": (f"{name}, {acc}", "{:.2%}")
        for task, name in TASK_NAMES.items()
        for acc in ("acc", "acc_norm")
    },
    "bleu4": ("BLEU@4", "{:.4f}"),
    "meteor": ("METEOR", "{:.4f}"),
    "cider": ("CIDEr", "{:.4f}"),
}


def record(
    protocol: str,
    models: Iterable[Mapping[str, Any]],
    data: Mapping[str, Any],
    settings: Mapping[str, Any],
    results: Mapping[str, Mapping[str, Number]],
    device: str,
    intervals: str = BOOTSTRAP,
) -> dict[str, Any]:
    """All that is needed to read the numbers, and to measure them again.

    Args:
        protocol: its name.
        models: for each `name`, `id_hash`, `dtype`.
        data: `sources`, `num_samples`, `hash`, `failed`.
        settings: of the protocol.
        results: by model (or file format) the named numbers.
        device: that computed.
        intervals: how `low` and `high` came about.
    """
    packages = {name: version(name) for name in ("numpy", "pillow")}
    return {
        "protocol": protocol,
        "models": list(models),
        "data": dict(data),
        "settings": dict(settings),
        "results": {who: {name: _plain(n) for name, n in found.items()} for who, found in results.items()},
        "intervals": intervals,
        "environment": environment(device) | packages | {"device": device, "processes": world_size()},
        "command": command(),
    }


def write_results(folder: Path, found: Mapping[str, Any]) -> Path:
    """Write `results.json` into a folder, which is made if need be."""
    path = folder / FILE
    write_json(path, dict(found))
    return path


def read_results(path: Path) -> dict[str, Any]:
    """A `results.json` of an evaluation.

    Raises:
        InputError: it is something else.
    """
    try:
        found = read_json(path)
        found["protocol"], found["results"], found["data"]
        return found
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not the results of an evaluation ({error}): leave it out") from error


def label(name: str) -> str:
    """What a reader sees for the name of a number."""
    return LABELS.get(name, (name, ""))[0]


def shown(name: str, number: Mapping[str, Any], interval: bool = True) -> str:
    """A number as a reader sees it, with its interval where it has one."""
    form = LABELS.get(name, ("", "{:.4g}"))[1]
    text = _form(form, number["value"])
    if interval and number.get("low") is not None:
        text += f" ({_form(form, number['low'])} to {_form(form, number['high'])})"
    return text


def update_card(folder: Path, found: Mapping[str, Any]) -> None:
    """Write an evaluation into the model card, in place of an earlier one of the same protocol and data.

    Args:
        folder: of the model, with its `README.md`; it is made if there is none.
        found: the record.
    """
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8") if path.exists() else f"# {folder.name}\n"
    mark = f"qlip eval: {title(found)}"
    section = f"<!-- {mark} -->\n{_section(found)}\n<!-- /{mark} -->"
    pattern = re.compile(rf"<!-- {re.escape(mark)} -->\n.*?<!-- /{re.escape(mark)} -->", re.DOTALL)
    text, found_before = pattern.subn(lambda _: section, text)
    if not found_before:
        text = f"{text.rstrip()}\n\n{section}\n"
    with whole_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def title(found: Mapping[str, Any]) -> str:
    """Protocol and data, on one line."""
    resize = found["settings"].get("resize")
    return f"{found['protocol']} on {', '.join(found['data']['sources'])}" + (f", {resize}" if resize else "")


def _section(found: Mapping[str, Any]) -> str:
    data, used = found["data"], found["environment"]
    numbers = next(iter(found["results"].values()))  # below may stand what they are compared with
    failed = f", {len(data['failed'])} more could not be used" if data["failed"] else ""
    rows = [f"| {label(name)} | {shown(name, number)} |" for name, number in numbers.items()]
    return "\n".join(
        [
            f"## Evaluation: {title(found)}",
            "",
            f"{data['num_samples']:,} pictures (data `{data['hash']}`{failed}), {found['models'][0]['dtype']}, "
            f"{used['hardware']}, torch {used['torch']}, commit `{used['commit']}`.",
            "",
            "| | |",
            "| --- | --- |",
            *rows,
            "",
            f"In brackets: {found['intervals']}. Again: `{found['command']}`",
        ]
    )


def _form(form: str, value: Any) -> str:
    return form.format(value) if isinstance(value, (int, float)) else str(value)


def _plain(number: Number) -> dict[str, Any]:
    """For JSON, which has no infinity: equal pictures have an infinite PSNR."""
    values = {name: value for name, value in asdict(number).items() if value is not None}
    return {name: value if math.isfinite(value) else str(value) for name, value in values.items()}
