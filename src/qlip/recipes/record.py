"""What a run says of itself: `recipe.json`, its recipe and when it was started and resumed."""

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import tyro

from qlip.data.journal import SKIPPED
from qlip.data.samples import evenly
from qlip.data.walk import walk
from qlip.environment import environment
from qlip.errors import InputError, one_line
from qlip.files import write_json
from qlip.guarded import read_json, read_object, typed
from qlip.recipes.plain import from_plain, to_plain
from qlip.train.checkpoint import checkpoint_step, latest_checkpoint
from qlip.train.distributed import on_all_ranks, world_size
from qlip.train.parallel import ComputeConfig, settled

REQUIRED = tyro.conf.arg(help_behavior_hint=lambda given: f"(default: {given})" if given else "(required)")
"""Annotates a field that is empty in a recipe and that a run needs."""

R = TypeVar("R", bound=ComputeConfig)
logger = logging.getLogger("qlip")
_MAY_CHANGE_DATA = {"data.num_workers", "data.max_skipped_share", "data.shuffle_buffer", "data.cache"}
_MAY_CHANGE = {"fit", *_MAY_CHANGE_DATA, *ComputeConfig.__dataclass_fields__}

# Fields that name data and models: they may name other places that hold the same content.
_CONTENT = {
    *("data.tokens", "data.val_tokens", "data.text", "data.val_text", "data.train", "data.val", "data.classes"),
    *("data.features", "base", "start", "vision", "llm", "tokenizer", "teacher", "vocabulary"),
    *("init.vision", "init.text", "task.calibration"),
}
_MAY_MOVE = _CONTENT | {"data.images"}  # whose files the conversations name
_SAMPLED_BYTES = 1 << 16  # at each end of a file
_NUM_SAMPLED = 256  # files of a folder whose bytes are read


def content(recipe: Any) -> str:
    """A digest of the data and models that a recipe names, the same wherever they lie and whatever their names.

    Args:
        recipe: a dataclass.
    """
    plain = to_plain(recipe)
    return _digest(f"{name} {identity(_named(plain, name))}\n".encode() for name in sorted(_CONTENT))


def identity(names: Iterable[str]) -> str:
    """A digest of what some names stand for.

    Of a file, its size and the bytes at both ends count. Of a folder, its files count in order; of most files of a
    large folder only the size. A name that is neither, such as a hub id, counts itself.
    """
    return _digest(part for name in names if name for part in _parts(name))


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:32]


def _named(plain: Any, field: str) -> list[str]:
    """The paths and ids in a field, which few recipes have."""
    for part in field.split("."):
        plain = plain.get(part) if isinstance(plain, dict) else None
    return [plain] if isinstance(plain, str) else plain or []


def _parts(name: str) -> Iterator[bytes]:
    """What counts of a file, a folder or another name."""
    if not os.path.exists(name):
        yield f"name {name}\n".encode(errors="surrogateescape")
    files = [os.path.join(name, file) for file in walk(name)] if os.path.isdir(name) else [name]
    sampled = set(evenly(len(files), _NUM_SAMPLED))
    for i, file in enumerate(files):
        if os.path.isfile(file):
            size = os.path.getsize(file)
            yield f"file {size}\n".encode()
            if i in sampled:
                with open(file, "rb") as contents:
                    yield contents.read(_SAMPLED_BYTES)
                    contents.seek(max(0, size - _SAMPLED_BYTES))
                    yield contents.read(_SAMPLED_BYTES)


def read_recipe(path: str | Path, kinds: Mapping[int | str, type]) -> Any:
    """The recipe of a run's `recipe.json`.

    Args:
        path: the file.
        kinds: for each `stage` that `write_record` may have been given, the recipe's class.

    Raises:
        InputError: it is something else.
    """
    try:
        record = read_object(path)
        stage = typed(int | str, record.get("stage", 1), "stage")  # type: ignore[arg-type]
        if stage not in kinds or "recipe" not in record:
            raise InputError(f"stage is {stage!r:.40}" if "recipe" in record else "it has no 'recipe'")
        return from_plain(kinds[stage], record["recipe"])
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a recipe ({one_line(error)})") from error


def check_steps(out: Path, steps: int) -> None:
    """Whether a run that a folder holds was to be as long, for who reads it as finished.

    Raises:
        InputError: it was not: it would go on in the middle of another schedule.
    """
    path = out / "recipe.json"
    if path.exists() and (found := _fit(path).get("steps")) != steps:
        raise InputError(f"{out} holds a run of {found} steps, not {steps}: name another --out")


def kept_best(out: Path) -> str:
    """The evaluation's number whose best checkpoint a run keeps.

    Raises:
        InputError: it keeps none, or the folder holds no run.
    """
    if best := _fit(out / "recipe.json").get("best"):
        return best
    raise InputError(f"{out} keeps no best checkpoint: name a number of its evaluations with --best")


def is_record(path: str | Path, stage: int | str) -> bool:
    """Whether it is the `recipe.json` of a run of this stage."""
    try:
        return read_object(path).get("stage") == stage
    except (OSError, InputError):
        return False


def settle(recipe: R, device: torch.device, out: Path | None) -> R:
    """The recipe as it is computed on this device, with nothing left that is "auto"; all ranks call it.

    Args:
        recipe: with its settings of how to compute.
        device: on which this process trains.
        out: folder of a run to resume, whose precision is kept unless the recipe names another; None: a new run.

    Raises:
        InputError: the run's record cannot be read.
    """
    if out and (out / "recipe.json").exists():
        was = on_all_ranks(partial(_read_record, out / "recipe.json")).recipe
        open_ones = [name for name in ("precision", "attention") if getattr(recipe, name) == "auto"]
        recipe = replace(recipe, **{name: was[name] for name in open_ones if name in was})
        logger.info("precision: %s, as in the run until now", recipe.precision)
    return settled(replace(recipe, device=device.type), device)


def write_record(recipe: Any, stage: int | str, num_samples: int | None, out: Path) -> None:
    """Write `recipe.json`: the recipe, and a segment for the start and for each time that the run was resumed.

    A resumed run must be of the same recipe, but for how long and how often, and how it is computed. Its data and
    the models that it begins with may have moved; see `content`.

    Args:
        recipe: a frozen dataclass with `fit` and `device`.
        stage: which kind of recipe it is, for who reads it back.
        num_samples: of the training data; None: nobody has counted them.
        out: the run's folder.

    Raises:
        InputError: the folder holds another run, or cannot be written.
    """
    path, plain = out / "recipe.json", to_plain(recipe)
    checkpoint, segments, found = latest_checkpoint(out), [], content(recipe)
    if checkpoint:
        record = _read_record(path)
        segments, before = list(record.segments), record.recipe
        with suppress(InputError):  # fields that are newer than the record had the values of their defaults
            before = to_plain(from_plain(type(recipe), before))
        known = record.content is not None
        if known and record.content != found:
            raise InputError(
                f"{out} holds a run on other data or models than these: give it its own, or another --out"
            )
        if name := _change(before, plain, _MAY_CHANGE | _MAY_MOVE if known else _MAY_CHANGE):
            raise InputError(f"{out} holds a run with another {name!r}: resume with its recipe.json as RECIPE")
        if record.num_samples != num_samples:
            was = record.num_samples
            raise InputError(f"{out} holds a run on {was} samples, now there are {num_samples}: give it its data")
    first_step = checkpoint_step(checkpoint) + 1 if checkpoint else 1
    segment = {"first_step": first_step, "world_size": world_size(), "fit": plain["fit"]}
    segments.append(segment | {"environment": environment(recipe.device)})
    about = {"stage": stage, "num_samples": num_samples, "content": found}
    write_json(path, about | {"recipe": plain, "segments": segments})
    if not checkpoint:
        (out / SKIPPED).unlink(missing_ok=True)  # of a run that never saved


@dataclass(frozen=True)
class _Record:
    recipe: dict[str, Any]
    segments: tuple[dict[str, Any], ...]
    num_samples: int | None
    content: str | None = None  # older records have none


def _read_record(path: Path) -> _Record:
    try:
        return typed(_Record, read_json(path), unknown="ignore")
    except (OSError, InputError) as error:
        raise InputError(
            f"{path}: not the record of a run ({one_line(error)}): put it back, or choose another --out"
        ) from error


def _fit(path: Path) -> dict[str, Any]:
    fit = _read_record(path).recipe.get("fit")
    return fit if isinstance(fit, dict) else {}


def _change(was: Any, now: Any, may_change: set[str], name: str = "") -> str | None:
    """The dotted name of the first field that differs and may not."""
    if name in may_change or was == now:
        return None
    if not (isinstance(was, dict) and isinstance(now, dict)):
        return name
    changes = (
        _change(was.get(key), now.get(key), may_change, f"{name}.{key}".lstrip(".")) for key in {**was, **now}
    )
    return next(filter(None, changes), None)
