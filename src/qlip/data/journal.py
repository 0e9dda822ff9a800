"""What a run notes of its data, in its folder: what was skipped, and how far a stream has been read.

`skipped.jsonl` has a line for each sample or file that could not be used, of all processes, each once.
`position-RANK.jsonl` has for streams, from which step on, the position before which everything is read out.
"""

import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from qlip.data.samples import Fault
from qlip.data.stream import Stream
from qlip.data.values import printable
from qlip.errors import InputError, one_line
from qlip.guarded import parse_json, typed

T = TypeVar("T")
logger = logging.getLogger("qlip")

FEWEST_STREAMED = 10_000  # samples that a stream is taken to have until more have been read
SKIPPED = "skipped.jsonl"


@dataclass(frozen=True)
class _Move:
    step: int
    position: int
    world_size: int


class Journal:
    """Counts what is skipped, and knows when it is too much."""

    def __init__(
        self,
        samples: Sequence[dict] | Stream,
        max_share: float = 0.0,
        folder: Path | None = None,
        rank: int = 0,
        world_size: int = 1,
        option: str = "--data.max-skipped-share",
    ):
        """Note the files that could not be opened.

        Args:
            samples: what the run is on.
            max_share: of the samples, and of the files, that may be skipped. Of a stream, whose samples nobody has
                counted, it is a share of those read so far, or of 10,000.
            folder: of the run, which may have notes; None: nothing is written.
            rank: of this process.
            world_size: number of processes.
            option: name of `max_share` on the command line, for messages.

        Raises:
            InputError: more than the share of files could not be opened.
        """
        self._max_share, self._folder, self._rank, self._world_size = max_share, folder, rank, world_size
        self._option = option
        self._num_samples = None if isinstance(samples, Stream) else len(samples)
        self._num_files = getattr(samples, "num_files", 1)
        self._known: set[tuple] = set()
        self._counts: Counter[bool] = Counter()
        self._read_to = 0  # of skipped.jsonl
        self._position: int | None = None
        self.skip(getattr(samples, "unreadable", ()))

    def skip(self, faults: Sequence[Fault], num_seen: int = 0) -> None:
        """Note what could not be used.

        Args:
            faults: new ones, and ones that are known.
            num_seen: samples that the run has used until now.

        Raises:
            InputError: it is more than the share.
        """
        if all(_identity(fault) in self._known for fault in faults):
            return
        before = sum(self._counts.values())
        for fault in self._written():  # also by other processes
            self._count(fault)
        self._write(SKIPPED, [asdict(fault) for fault in faults if self._count(fault)])
        fault, found = faults[-1], sum(self._counts.values())
        self._check(fault, max(num_seen, FEWEST_STREAMED) if self._num_samples is None else self._num_samples)
        if found.bit_length() > before.bit_length():  # 1, 2, 4, …
            where = f", listed in {self._folder / SKIPPED}" if self._folder else ""
            logger.warning("skipped %s of the data%s; the last: %s: %s", found, where, fault.key, fault.reason)

    def move(self, step: int, position: int) -> None:
        """Note that after a step everything before a position of the stream is read out."""
        if position != self._position:
            self._position = position
            entry = {"step": step, "position": position, "world_size": self._world_size}
            self._write(f"position-{self._rank}.jsonl", [entry])

    def position(self, step: int) -> int:
        """Where in the stream a run goes on after a step: no rank has more to read before it."""
        first = self._last_move(0, step)
        moves = [self._last_move(rank, step) for rank in range(first.world_size if first else 0)]
        return min((move.position if move else 0 for move in moves), default=0)

    def _check(self, fault: Fault, num_samples: int) -> None:
        for is_file, total in ((False, num_samples), (True, self._num_files)):
            if self._counts[is_file] > self._max_share * total:
                where, mend = "", "mend them"
                if self._folder:
                    where, mend = f", listed in {self._folder / SKIPPED}", "mend them and delete that list"
                raise InputError(
                    f"{fault.key}: {fault.reason}; with it {self._counts[is_file]:,} of {total:,} "
                    f"{'files' if is_file else 'samples'} cannot be used{where}, more than the share "
                    f"{self._max_share:g}: {mend}, or raise {self._option}"
                )

    def _count(self, fault: Fault) -> bool:
        """Whether it is new."""
        if _identity(fault) in self._known:
            return False
        self._known.add(_identity(fault))
        self._counts[fault.is_file] += 1
        return True

    def _written(self) -> Iterator[Fault]:
        """What stands in the file since the last look."""
        if self._folder and (self._folder / SKIPPED).exists():
            with (self._folder / SKIPPED).open("rb") as file:
                file.seek(self._read_to)
                lines = file.readlines()
            self._read_to += sum(map(len, lines))
            yield from _parsed(Fault, lines)

    def _last_move(self, rank: int, step: int) -> _Move | None:
        # the last line, not the furthest: steps that were lost in a crash stand before those done again
        path = self._folder / f"position-{rank}.jsonl" if self._folder else None
        if path is None or not path.exists():
            return None
        moves = _parsed(_Move, path.read_bytes().splitlines())
        return next((move for move in reversed(moves) if move.step <= step), None)

    def _write(self, name: str, entries: Sequence[dict]) -> None:
        if self._folder and entries:
            path = self._folder / name
            lines = [printable(json.dumps(entry, ensure_ascii=False)) + "\n" for entry in entries]
            try:
                with path.open("a", encoding="utf-8") as file:
                    file.writelines(lines)
            except OSError as error:
                raise InputError(f"{path} cannot be written ({one_line(error)}): make room") from error


def _identity(fault: Fault) -> tuple:
    return fault.index, fault.key, fault.is_file


def _parsed(kind: type[T], lines: Sequence[bytes]) -> list[T]:
    """The lines that are whole; a crash may have cut one off."""
    entries = []
    for line in lines:
        with suppress(InputError):
            entries.append(typed(kind, parse_json(line)))
    return entries
