"""One job of tokenizing: its settings, and what it is once model and source are open.

source ─ units ─ workers decode batches ─ a device tokenizes ─ a file for each piece of a unit ─ _manifest.json
"""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from qlip.data.samples import Fault, Joined
from qlip.data.stream import Stream
from qlip.data.token_file import KEPT, TokenFormat, write_token_file
from qlip.data.values import printable
from qlip.errors import InputError
from qlip.eval.batches import Track
from qlip.integrations.ray import Item, map_on_ray
from qlip.jobs.pictures import say_partly
from qlip.jobs.tokens_encoder import Encoder
from qlip.jobs.tokens_reading import Batch, Lost, Preparer
from qlip.jobs.tokens_shards import Place, is_file, remaining, write_manifest
from qlip.jobs.tokens_source import Unit, cut, fingerprint, names, open_sources
from qlip.machine import num_cores
from qlip.model.image import Resize
from qlip.train.distributed import world_size


@dataclass(frozen=True)
class Job:
    """Tokenizing some sources. Pickles, for the workers of a cluster.

    Attributes:
        model: as `qlip.load` takes it; for "onnx" a folder of `qlip export --format onnx`.
        sources: as `qlip.data.sources` takes them, and picture files.
        out: a `.parquet` file, or a folder of them.
        image_size: side, or height and width, of the pictures; None: the model's own.
        dtype: of the weights.
        keep: columns beside key and tokens: "caption", "captions", "label".
        shard_rows: samples that a file of a folder is made from.
        batch_size: pictures at once.
        num_workers: processes that decode, for each that computes; None: as many as it has cores.
        device: where to compute; "auto" takes a GPU if there is one.
        engine: "local": this process, or those that `torchrun` started; "onnx": the same on ONNX Runtime; "ray":
            a Ray cluster.
        resize: see `ImageProcessor.preprocess`.

    Raises:
        InputError: a field is out of range.
    """

    model: str
    sources: tuple[str, ...]
    out: Path
    image_size: int | tuple[int, int] | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    keep: tuple[str, ...] = ()
    shard_rows: int = 10_000
    batch_size: int = 64
    num_workers: int | None = None
    device: str = "auto"
    engine: Literal["local", "onnx", "ray"] = "local"
    resize: Resize = "crop"

    def __post_init__(self) -> None:
        for name, least in (("shard_rows", 1), ("batch_size", 1), ("num_workers", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{name} is {value}: use {least} or more")
        if unknown := set(self.keep) - KEPT.keys():
            raise InputError(f"keep has {', '.join(sorted(unknown))}: use some of {', '.join(KEPT)}")


@dataclass(frozen=True)
class Work:
    """A job, opened on one process.

    Attributes:
        job: what, and how.
        encoder: on this process's device.
        units: ranges of the source.
        place: of the files.
        rows: samples of a piece.
        identity: what must be the same for the job to go on.
        unreadable: files of the source.
    """

    job: Job
    encoder: Encoder
    units: list[Unit]
    place: Place
    rows: int
    identity: dict[str, Any]
    unreadable: tuple[Fault, ...]

    @classmethod
    def open(cls, job: Job, device: torch.device) -> "Work":
        """Load the model and open the source.

        Raises:
            InputError: either is not to be had.
        """
        one_file = is_file(job.out)
        samples = open_sources(job.sources)
        if one_file and isinstance(samples, Stream):
            raise InputError(f"{job.out}: remote shards make a file each: name a folder, without .parquet")
        if job.engine == "onnx":
            encoder = Encoder.with_onnx(job.model, job.device, job.dtype, job.image_size)
        else:
            encoder = Encoder.with_torch(job.model, device, job.dtype, job.image_size)
        identity = {
            "id_hash": encoder.id_hash,
            "dtype": job.dtype,
            "image_size": list(encoder.config.size),
            "processor": encoder.processor.to_dict() | ({"resize": "squash"} if job.resize == "squash" else {}),
            "source": fingerprint(samples),
            "batch_size": job.batch_size,
            "shard_rows": None if one_file else job.shard_rows,
            "keep": list(job.keep),
        }
        rows = len(samples) if isinstance(samples, Joined) and one_file else job.shard_rows
        units = cut(samples, rows)
        place = Place(job.out, len(units), isinstance(samples, Stream))
        return cls(job, encoder, units, place, rows, identity, tuple(samples.unreadable))

    @cached_property
    def format(self) -> TokenFormat:
        """Of the files."""
        config = self.encoder.config
        return TokenFormat(self.encoder.name, self.encoder.id_hash, config.num_bits, config.grid)

    def tokenize(self, todo: Sequence[tuple[Unit, int]], track: Track = iter) -> list[Fault]:
        """Write the files of units from the first piece on that each lacks.

        Returns:
            those that could not be read to their end.
        """
        job = self.job
        preparer = Preparer(self.encoder.processor, job.keep, job.batch_size, self.rows, job.resize)
        num_workers = _num_cores() if job.num_workers is None else job.num_workers
        batches = preparer.batches([unit for unit, _ in todo], [first for _, first in todo], num_workers)
        unwritten: dict[int, list[tuple[Batch, Tensor]]] = {}
        lost: list[Fault] = []
        partly: Counter[str] = Counter()
        for batch in track(batches):
            if isinstance(batch, Lost):
                unwritten.pop(batch.unit, None)
                lost.append(batch.fault)
                continue
            partly += batch.partly
            tokens = self.encoder.tokens(batch.pixel_values)
            unwritten.setdefault(batch.unit, []).append((batch, tokens))
            if batch.ends_piece:
                self._write(unwritten.pop(batch.unit))
        say_partly(partly)
        return lost

    def tokenize_on_ray(self, todo: Sequence[tuple[Unit, int]], track: Track = iter) -> list[Fault]:
        """The same on a Ray cluster.

        Raises:
            InputError: Ray is missing, or `torchrun` started this process.
        """
        if world_size() > 1:
            raise InputError("--engine ray finds its own processes: start it without torchrun")
        items = [(unit.number, first) for unit, first in todo]
        worker = _RayWorker(self.job, os.getcwd())
        found = track(map_on_ray(worker, items, self.job.num_workers, self.job.device))
        return [Fault(**fault) for faults in found for fault in faults]

    def finish(self, lost: Sequence[Fault]) -> dict[str, Any]:
        """Write the manifest.

        Raises:
            InputError: a file that was there, or was written, is gone.
        """
        if not lost and (todo := remaining(self.units, self.place.shards(self.identity))):
            gone = self.place.path(todo[0][0].number, todo[0][1])
            raise InputError(f"{gone} was deleted while the job ran: start it again, which does what is missing")
        used = self.encoder.used | {name: version(name) for name in ("pillow", "pyarrow")}
        used |= {"processes": str(world_size()), "engine": self.job.engine}
        return write_manifest(
            self.place, self.format, self.identity, names(self.job.sources), (*self.unreadable, *lost), used
        )

    def _write(self, parts: Sequence[tuple[Batch, Tensor]]) -> None:
        """The file of a piece."""
        batches = [batch for batch, _ in parts]
        last = batches[-1]
        origin = {
            "identity": self.identity,
            "sources": names(self.job.sources),
            "unit": last.unit,
            "piece": last.piece,
            "ends_unit": last.ends_unit,
            "num_samples": sum(batch.num_samples for batch in batches),
            "failures": [
                {"key": printable(f.key), "reason": printable(f.reason)} for batch in batches for f in batch.faults
            ],
        }
        write_token_file(
            self.place.path(last.unit, last.piece),
            self.format,
            [key for batch in batches for key in batch.keys],
            np.concatenate([tokens.numpy() for _, tokens in parts]),
            {name: [value for batch in batches for value in batch.kept[name]] for name in self.job.keep},
            origin,
        )


@dataclass(frozen=True)
class _RayWorker:
    """Opens the job on a worker of a cluster: gives what tokenizes a unit there."""

    job: Job
    folder: str

    def __call__(self, device: str, num_workers: int) -> Callable[[Item], list[dict[str, Any]]]:
        os.chdir(self.folder)  # relative names mean the same there
        work = Work.open(replace(self.job, num_workers=num_workers), torch.device(device))
        return lambda item: [asdict(fault) for fault in work.tokenize([(work.units[item[0]], item[1])])]


def _num_cores() -> int:
    """Of this machine, for each of its processes."""
    return max(1, num_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
