"""Checkpoints of a run: every tensor that makes it, written while the training goes on, whole or not at all.

A checkpoint is a folder, `checkpoints/step-NNNNNNN/`: a safetensors file from each process, and `checkpoint.json`
(step, evaluation, number of processes, shapes). PyTorch's distributed checkpoints (DCP) plan who writes and who
reads which part, so that any number of processes can go on from it. DCP's own format holds a pickle; this one is
what its `HuggingFaceStorageReader` reads.
"""

import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.tensor import DTensor

from qlip.errors import InputError, SharedError, one_line
from qlip.files import checksum, save_tensors
from qlip.guarded import inside, read_json, typed
from qlip.train.distributed import any_rank, gather_rows, on_all_ranks, rank, world_size
from qlip.train.measures import measure

Shapes = dict[str, tuple[list[int], torch.dtype]]


@dataclass(frozen=True)
class Info:
    """What `checkpoint.json` says.

    Attributes:
        step: after which it was written.
        results: of the evaluation of this step.
        world_size: number of processes.
        shapes: of the tensors, by name.
        checksums: of the processes' files, by name; older checkpoints have none.
    """

    step: int
    results: dict[str, Any]
    world_size: int
    shapes: dict[str, list[int]]
    checksums: dict[str, str] = field(default_factory=dict)


class Checkpoints:
    """The checkpoints of a run in training. All ranks make it, and call its methods at the same steps.

    As a context it waits at the end for the one in writing, also when the training fails.
    """

    def __init__(self, out: Path, keep: int, best: str | None = None):
        """Make `out/checkpoints`, and clear away what a killed run left unfinished.

        Args:
            out: the run's folder, which all processes share.
            keep: how many checkpoints are kept, the latest.
            best: the evaluation's number whose best checkpoint is kept besides; see `qlip.train.measures`.

        Raises:
            InputError: the folder cannot be written, or is not the same one on all ranks.
        """
        self.out, self.folder, self.keep, self.best = out, out / "checkpoints", keep, best
        # Its collectives run beside the training's: a group of its own keeps each in order.
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._pending: Future | None = None
        on_all_ranks(self._begin)
        on_all_ranks(self._look)
        if rank() == 0:
            self._sweep()
        leader = best_checkpoint(out, best) if best else None
        self._record = _score(leader, best) if best and leader else math.nan

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with suppress(*(Exception, CheckpointException) if kind else ()):  # the first error is the one to see
            self.wait()

    def is_best(self, results: dict[str, float] | None) -> bool:
        """Whether an evaluation's number is better than every checkpoint's; on the ranks that know the results."""
        if self.best is None or not results:
            return False
        return measure(self.best).is_better(results.get(self.best, math.nan), self._record)

    def save(self, state: dict[str, Tensor], step: int, results: dict[str, float] | None = None) -> None:
        """Begin a checkpoint: `state` is copied before this returns, the writing goes on behind.

        One in writing is waited for first. The folder gets its name when all ranks' files are on the disk; then
        older ones go, but the latest and the best. A checkpoint of this step that is there already stays.

        Args:
            state: the task's tensors by name; what is no DTensor is the same on every rank.
            step: its number.
            results: the evaluation of this step, if there was one; rank 0's counts.

        Raises:
            InputError: the one in writing failed.
        """
        self.wait()
        if results and self.is_best(results):
            self._record = results[cast(str, self.best)]
        shapes = {name: list(tensor.shape) for name, tensor in state.items()}
        info = {"step": step, "results": results or {}, "world_size": world_size(), "shapes": shapes}
        unfinished = self.folder / f".step-{step:07d}.unfinished"
        writer = _Writer(unfinished, partial(self._complete, unfinished, info))
        whole = sorted((-t.numel(), name) for name, t in state.items() if not isinstance(t, DTensor))
        others = {name for i, (_, name) in enumerate(whole) if i % world_size() != rank()}  # theirs to copy
        part = {name: tensor for name, tensor in _flat(state).items() if name not in others}
        _silence()
        group: Any = {"process_group": self._group, "no_dist": self._group is None}
        self._pending = cast(Future, dcp.async_save(part, storage_writer=writer, **group))

    def check(self) -> None:
        """Hear what became of the one in writing, without waiting for it; at every step.

        Raises:
            InputError: it cannot be written, on any rank; the checkpoints before it are whole.
        """
        if self._pending and not any_rank(not self._pending.done()):
            self.wait()

    def wait(self) -> None:
        """Wait for the one in writing, if there is one.

        Raises:
            InputError: as `check`.
        """
        pending, self._pending = self._pending, None
        if pending and (failures := pending.result().storage_data):  # the same on every rank; none writes any more
            if rank() == 0:
                self._sweep()
            raise self._unwritable(failures[0])

    def _begin(self) -> None:
        try:
            if rank() == 0:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._sweep()
                (self.folder / ".shared.unfinished").mkdir()
        except OSError as error:
            raise self._unwritable(one_line(error)) from error

    def _look(self) -> None:
        if not (self.folder / ".shared.unfinished").is_dir():
            raise InputError(
                f"rank {rank()} does not see rank 0's {self.folder}: --out must be one for all of them"
            )

    def _complete(self, unfinished: Path, info: dict[str, Any], checksums: dict[str, str]) -> None:
        """On rank 0, when all ranks' files are on the disk: the name, and room for the next one."""
        path = unfinished / "checkpoint.json"
        path.write_text(json.dumps(info | {"checksums": checksums}), encoding="utf-8")
        _flush(path)
        _flush(unfinished)
        final = self.folder / f"step-{info['step']:07d}"
        if not final.exists():
            unfinished.rename(final)
            _flush(self.folder)
        there = _checkpoints(self.out)
        kept = {*there[-self.keep :], best_checkpoint(self.out, self.best) if self.best else None}
        for old in there:
            if old not in kept:  # a half-deleted one must not look whole
                old.rename(old.with_name(f".{old.name}.unfinished"))
        self._sweep()

    def _sweep(self) -> None:
        """Delete what has no name of its own; what resists (open elsewhere, over a network) waits for the next."""
        for unfinished in self.folder.glob(".*.unfinished"):
            shutil.rmtree(unfinished, ignore_errors=True)

    def _unwritable(self, why: str) -> SharedError:
        return SharedError(
            f"{self.folder} cannot be written ({why}): make room or allow it, then go on with --resume"
        )


def latest_checkpoint(out: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    return next(reversed(_checkpoints(out)), None)


def best_checkpoint(out: Path, name: str) -> Path | None:
    """The complete checkpoint with the best evaluation number `name`, the earliest of equals; None without one.

    Raises:
        InputError: a checkpoint is damaged.
    """
    scores = {path: _score(path, name) for path in _checkpoints(out)}
    found = [path for path, score in scores.items() if not math.isnan(score)]
    choose = min if measure(name).lower_is_better else max
    return choose(found, key=scores.__getitem__, default=None)


def checkpoint_step(path: Path) -> int:
    """The step at which a checkpoint was written, from its name."""
    return int(path.name.removeprefix("step-"))


def load_checkpoint(path: Path, state: dict[str, Tensor]) -> int:
    """Fill a task's live tensors in place. All ranks call it, however many they are and were.

    Args:
        path: a checkpoint.
        state: the task's tensors and DTensors by name.

    Returns:
        The step that was saved.

    Raises:
        InputError: it is damaged; or it is of another model or task, and then nothing was filled.
    """
    steps = gather_rows(torch.tensor([checkpoint_step(path)]))
    if (steps != steps[0]).any():
        raise InputError(f"the ranks see checkpoints of steps {steps.tolist()}: --out must be one for all of them")
    on_all_ranks(partial(_verify, path, rank(), world_size()))
    on_all_ranks(partial(_compare, path, state))
    on_all_ranks(partial(_read, path, state))
    return checkpoint_step(path)


def read_tensors(path: Path, prefix: str | tuple[str, ...]) -> dict[str, Tensor]:
    """Whole tensors of a checkpoint, put together from its shards, on the CPU, by one process alone.

    Args:
        path: a checkpoint.
        prefix: which ones, like "model.", or several; their names are returned in full.

    Raises:
        InputError: it is damaged, or has none such.
    """
    _verify(path)
    saved = {name: kind for name, kind in _open(path).items() if name.startswith(prefix)}
    if not saved:
        raise InputError(f"{path} has no tensors whose names begin with {prefix!r}")
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in saved.items()}
    _read(path, tensors)
    return tensors


class _Writer(dcp.FileSystemWriter):
    """DCP's writer but for the format: one safetensors file from each rank, and no pickle.

    Torch's `HuggingFaceStorageWriter` puts a file together in memory, and stops the training while it does. What
    fails is told by value: an exception that cannot be pickled would leave the other ranks waiting for it.
    """

    def __init__(self, folder: Path, complete: Callable[[dict[str, str]], None]):
        super().__init__(folder)
        self._complete = complete

    def stage(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copy what the training will change. Torch's own copies DTensors twice, older ones no CPU tensor."""
        form: Any = {"copy": True, "memory_format": torch.contiguous_format}
        return {name: tensor.to("cpu", **form) for name, tensor in state_dict.items()}

    def prepare_local_plan(self, plan: dcp.SavePlan) -> dcp.SavePlan:
        """Nothing: `write_data` makes the folder."""
        return plan

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> torch.futures.Future:
        """Write this rank's file; hand on its name and checksum, or why it could not be written."""
        tensors = {item.index.fqn: cast(Tensor, planner.resolve_data(item)) for item in plan.items}
        offsets = {item.index.fqn: {"saved_offsets": list(item.index.offset or ())} for item in plan.items}
        path = Path(self.path) / f"rank-{rank():05d}.safetensors"
        written: list[tuple[str | None, str]] = []
        try:
            path.parent.mkdir(exist_ok=True)
            save_tensors(tensors, path, {"format": "pt", "DCP_SHARDING_INFO": json.dumps(offsets)})
            _flush(path)
            written = [(path.name, checksum(path))]
        except (OSError, SafetensorError) as error:
            written = [(None, one_line(error))]
        done: torch.futures.Future = torch.futures.Future()
        done.set_result(written)
        return done

    def finish(self, metadata: dcp.Metadata, results: list) -> None:
        """On rank 0 after all have written: complete it, or gather why not; every rank is sent the metadata."""
        written = [entry for of_rank in results for entry in of_rank]
        metadata.storage_data = [why for name, why in written if name is None]
        try:
            if not metadata.storage_data:
                self._complete(dict(written))
        except (OSError, InputError) as error:
            metadata.storage_data = [one_line(error)]


def _flat(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Detached, with (1,) for the shape (), whose slices and chunks are each library's special case."""
    return {name: tensor.detach() if tensor.dim() else tensor.detach().view(1) for name, tensor in state.items()}


def _compare(path: Path, state: dict[str, Tensor]) -> None:
    saved, here = _open(path), {name: (list(tensor.shape), tensor.dtype) for name, tensor in state.items()}
    for name in [*here, *saved]:
        if here.get(name) != saved.get(name):
            was, now = (f"has {kinds[name]}" if name in kinds else "has none" for kinds in (saved, here))
            raise InputError(f"{path} is of another model or task: of {name} it {was}, this run {now}")


def _open(path: Path) -> Shapes:
    """What a checkpoint holds, after a look that all of it is there."""
    shapes = _info(path).shapes
    try:
        saved: dict[str, Any] = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise _damaged(path, error) from error
    for name, shape in shapes.items():
        there = sum(chunk.sizes.numel() for chunk in saved[name].chunks) if name in saved else -1
        if there != math.prod(shape) or list(saved[name].size) != (shape or [1]):
            raise _damaged(path, ValueError(f"{name} is not there in full"))
    return {name: (shape, saved[name].properties.dtype) for name, shape in shapes.items()}


def _verify(path: Path, rank: int = 0, world_size: int = 1) -> None:
    """Compare a rank's share of a checkpoint's files with their checksums, which older checkpoints lack."""
    for name, found in sorted(_info(path).checksums.items())[rank::world_size]:
        try:
            whole = checksum(inside(path, name)) == found
        except (OSError, InputError) as error:
            raise _damaged(path, error) from error
        if not whole:
            raise _damaged(path, ValueError(f"{name} is not what was written"))


def _read(path: Path, tensors: dict[str, Tensor]) -> None:
    """Fill them in place, each rank for itself."""
    _silence()
    try:
        dcp.load(cast(dict, _flat(tensors)), storage_reader=HuggingFaceStorageReader(str(path)), no_dist=True)
    except CheckpointException as error:
        cause = error.failures[0][0]
        if not isinstance(cause, OSError | SafetensorError):
            raise
        raise _damaged(path, cause) from error


def _damaged(path: Path, error: BaseException) -> InputError:
    return InputError(f"{path}: not a readable checkpoint ({one_line(error)}); delete it to use the one before")


def _score(path: Path, name: str) -> float:
    """An evaluation's number at a checkpoint; NaN without one."""
    score = _info(path).results.get(name)
    return float(score) if isinstance(score, int | float) else math.nan


def _info(path: Path) -> Info:
    try:
        return typed(Info, read_json(path / "checkpoint.json"), unknown="ignore")
    except (OSError, InputError) as error:
        raise _damaged(path, error) from error


def _checkpoints(out: Path) -> list[Path]:
    found = [path for path in (out / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d{7,}", path.name)]
    return sorted(found, key=checkpoint_step)


def _flush(path: Path) -> None:
    """See a file or a folder onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _silence() -> None:
    """DCP warns, in its thread too, of the single process that we told it of."""
    warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)
