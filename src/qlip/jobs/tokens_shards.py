"""Token files in a folder, or a single one: what is there, is it of this job; and the manifest that ends the work.

Each file says in its metadata which job wrote it, which part of the source it is of, and what of that could not be
used. So nothing but the files has to survive a crash.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from qlip.data.parquet import readable
from qlip.data.samples import Fault
from qlip.data.shards import read_manifest
from qlip.data.token_file import MANIFEST, OLD_MANIFEST, TokenFormat, TokenManifest, read_origin
from qlip.errors import InputError
from qlip.files import checksum, write_json
from qlip.guarded import typed
from qlip.jobs.tokens_source import Unit

# what must be the same for a job to go on → how a person calls it
IDENTITY = {
    "dtype": "dtype",
    "id_hash": "model",
    "image_size": "image size",
    "processor": "image processor",
    "source": "source",
    "batch_size": "batch size",
    "shard_rows": "number of rows in a shard",
    "keep": "choice of columns",
}


@dataclass(frozen=True)
class Shard:
    """A token file that is there.

    Attributes:
        path: of the file.
        num_rows: in it.
        unit: the range of the source that it is of.
        piece: which part of that.
        ends_unit: whether it is the last.
        num_samples: that were looked at for it.
        failures: `key` and `reason` of those that could not be used.
    """

    path: Path
    num_rows: int
    unit: int
    piece: int
    ends_unit: bool
    num_samples: int
    failures: Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Origin:
    """What a token file says of its making, under `qlip_origin`: the job's identity and the fields of `Shard`."""

    identity: dict[str, Any]
    unit: int
    piece: int
    ends_unit: bool
    num_samples: int
    failures: tuple[dict[str, str], ...]
    sources: tuple[str, ...] = ()


@dataclass(frozen=True)
class Place:
    """Where a job's token files are.

    Attributes:
        out: a `.parquet` file, or a folder.
        num_units: ranges of the source.
        streamed: whether they are of remote shards, which may make several files each.
    """

    out: Path
    num_units: int
    streamed: bool

    @property
    def is_file(self) -> bool:
        """Whether all goes into one file."""
        return is_file(self.out)

    def path(self, unit: int, piece: int) -> Path:
        """The file of a piece."""
        if self.is_file:
            return self.out
        number = str(unit).zfill(max(5, len(str(self.num_units - 1))))
        return self.out / f"tokens-{number}{f'-{piece:03d}' if self.streamed else ''}.parquet"

    def shards(self, identity: Mapping[str, Any]) -> list[Shard]:
        """The files that are there, in the order of the source.

        Raises:
            InputError: one is damaged, or of another job; names in what they differ.
        """
        files = [self.out] if self.is_file else sorted(self.out.glob("tokens-*.parquet"))
        shards = [_open(file, identity) for file in files if file.exists()]
        return sorted(shards, key=lambda shard: (shard.unit, shard.piece))


def is_file(out: Path) -> bool:
    """Whether a person asks for one file, and not for a folder.

    Raises:
        InputError: it is there, as the other.
    """
    wanted = out.suffix == ".parquet"
    if out.is_dir() if wanted else out.is_file():
        raise InputError(f"{out}: with the suffix .parquet it must be a file, without it a folder of shards")
    return wanted


def remaining(units: Sequence[Unit], shards: Sequence[Shard]) -> list[tuple[Unit, int]]:
    """Units that are not done, and the first piece that each lacks."""
    there: dict[int, dict[int, Shard]] = {}
    for shard in shards:
        there.setdefault(shard.unit, {})[shard.piece] = shard
    todo = []
    for unit in units:
        pieces, first = there.get(unit.number, {}), 0
        while first in pieces:
            first += 1
        if not first or not pieces[first - 1].ends_unit:
            todo.append((unit, first))
    return todo


def write_manifest(
    place: Place,
    token_format: TokenFormat,
    identity: Mapping[str, Any],
    sources: Sequence[str],
    lost: Sequence[Fault],
    environment: Mapping[str, Any],
) -> dict[str, Any]:
    """Count and checksum the files; into a folder write `_manifest.json`, too. Without a single row nothing stays.

    Args:
        place: of the files.
        token_format: of their ids.
        identity: of the job.
        sources: their names.
        lost: files of the source that could not be read.
        environment: what computed.

    Returns:
        the manifest.
    """
    shards = place.shards(identity)
    failures = [dict(failure) for shard in shards for failure in shard.failures]
    manifest = {
        "format": token_format.describe(),
        "job": dict(identity),
        "sources": list(sources),
        "num_samples": sum(shard.num_samples for shard in shards),
        "num_rows": sum(shard.num_rows for shard in shards),
        "shards": [{"name": shard.path.name, "num_rows": shard.num_rows} for shard in shards],
        "sha256": {shard.path.name: checksum(shard.path) for shard in shards},
        "failures": failures,
        "lost": [asdict(fault) for fault in lost],
        "environment": dict(environment),
    }
    if not manifest["num_rows"]:
        for shard in shards:
            shard.path.unlink()
        with suppress(OSError):
            place.out.rmdir()
    elif not place.is_file:
        write_json(place.out / MANIFEST, manifest)
        with suppress(InputError):  # it is not ours
            if read_manifest(place.out, TokenManifest, OLD_MANIFEST):  # of the same job, by an earlier version
                (place.out / OLD_MANIFEST).unlink()
    return manifest


def _open(file: Path, identity: Mapping[str, Any]) -> Shard:
    found = read_origin(file)
    if "identity" not in found:
        raise InputError(f"{file} does not say what it was made from: choose another --out, or delete it")
    try:
        origin = typed(Origin, found)
    except InputError as error:
        raise InputError(
            f"{file}: its `qlip_origin` is damaged ({error}): delete it to tokenize it again"
        ) from error
    theirs = origin.identity
    for name, what in IDENTITY.items():
        if theirs.get(name) != identity[name]:
            raise InputError(
                f"{file} is of another {what}, {_shown(theirs.get(name))}, and not {_shown(identity[name])}: "
                "choose another --out, or delete what is there to begin anew"
            )
    with readable(file):
        num_rows = pq.read_metadata(file).num_rows
    return Shard(file, num_rows, origin.unit, origin.piece, origin.ends_unit, origin.num_samples, origin.failures)


def _shown(value: Any) -> str:
    return " × ".join(map(str, value)) if isinstance(value, list) else str(value)
