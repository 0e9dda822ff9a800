"""Samples that can only be read from front to back: shards on a server.

The shards of epoch e come in the order that (seed, e) draws; these orders, one after the other, are an endless row
of positions. Of J readers (each worker of each rank) the j-th reads those at j, j + J, j + 2J, …, and shuffles its
samples through a buffer. A run goes on at the first position that is not yet read out.
"""

import itertools
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from qlip.data.remote import open_url
from qlip.data.samples import BadSample, Fault, Samples, captions_of
from qlip.data.shards import Member, field_of, grouped, sample_of
from qlip.errors import InputError, one_line

TRIES = 3  # to read a shard
FIRST_WAIT_S = 1.0
NUM_CAPTIONS = 100_000  # that words are learnt from
RANGE = 1000  # samples of a local source that stand among remote shards as one

Read = Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class RemoteShard:
    """A `.tar` file at a URL."""

    name: str

    def __iter__(self) -> Iterator[Read]:
        """What reads each sample: for an error of one does not end the others.

        Raises:
            InputError: the shard cannot be read, or not to its end.
        """
        try:
            with open_url(self.name) as file, tarfile.open(fileobj=file, mode="r|", tarinfo=Member) as tar:
                members = (
                    (member.name, tar.extractfile(member).read() if field_of(member.name) else b"")  # type: ignore[union-attr]
                    for member in tar
                    if member.isfile()
                )
                for stem, fields in grouped(members):
                    tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all
                    yield partial(sample_of, f"{self.name}/{stem}", fields)
        except Exception as error:  # each file system has errors of its own
            raise InputError(f"cannot be read ({one_line(error)})") from error


@dataclass(frozen=True)
class SampleRange:
    """Neighbours in a source of this machine, in the place of a shard."""

    samples: Samples
    start: int
    stop: int

    @property
    def name(self) -> str:
        """For an error."""
        return f"samples {self.start} to {self.stop - 1}"

    def __iter__(self) -> Iterator[Read]:
        for i in range(self.start, self.stop):
            yield partial(self.samples.read, i)


def read_on(shard: RemoteShard | SampleRange, skip: int = 0) -> Iterator[Read]:
    """What reads each sample but the first `skip`; taken up again where the line breaks.

    Raises:
        InputError: the shard cannot be read to its end, three times.
    """
    for attempt in range(TRIES):
        try:
            for read in itertools.islice(shard, skip, None):
                skip += 1
                yield read
            return
        except InputError:
            if attempt == TRIES - 1:
                raise
            time.sleep(FIRST_WAIT_S * 2**attempt)


@dataclass(frozen=True)
class Stream:
    """Shards, at least one of which is remote.

    Attributes:
        shards: what is read.
        unreadable: files of this machine that should have been among them.
        buffer_size: samples that a reader shuffles among each other.
        class_names: what the labels mean, where a source says so.
    """

    shards: Sequence[RemoteShard | SampleRange]
    unreadable: tuple[Fault, ...] = ()
    buffer_size: int = 1000
    class_names: tuple[str, ...] = ()

    @property
    def num_files(self) -> int:
        """Shards, with those that cannot be opened."""
        return len(self.shards) + len(self.unreadable)

    def __iter__(self) -> Iterator[dict[str, Any] | Fault]:
        """All samples once, in order, and what cannot be read of them."""
        for shard in self.shards:
            try:
                for read in shard:
                    try:
                        yield read()
                    except BadSample as error:
                        yield Fault(error.key, error.reason)
            except InputError as error:
                yield Fault(shard.name, str(error), is_file=True)

    def captions(self) -> Iterator[str]:
        """The first 100,000; their pictures come over the line with them.

        Raises:
            InputError: nothing can be read.
        """
        fault, found = None, False
        for item in itertools.islice(self, NUM_CAPTIONS):
            if isinstance(item, Fault):
                fault = item
            else:
                found = True
                yield from captions_of([item])
        if fault and not found:
            raise InputError(f"{fault.key}: {fault.reason}")


@dataclass(frozen=True)
class Item:
    """A sample to be read: number `number` of the shard at `position`."""

    position: int
    number: int
    read: Read


@dataclass
class Reader:
    """Endless samples of every J-th shard.

    Attributes:
        stream: where from.
        seed: of the orders.
        start: the position before which everything is read out.
        number: of this reader, from 0.
        num_readers: J.
    """

    stream: Stream
    seed: int
    start: int
    number: int
    num_readers: int
    _at: int = 0
    _buffer: list[Item] = field(default_factory=list)

    @property
    def position(self) -> int:
        """Before it this reader's shards are read out, and all their samples have left the buffer."""
        return min((item.position for item in self._buffer), default=self._at)

    def __iter__(self) -> Iterator[Item | Fault]:
        """Samples, and shards that cannot be read.

        Raises:
            InputError: no shard can be read.
        """
        rng = np.random.default_rng((self.seed, self.start, self.number))
        num_shards, num_faults = len(self.stream.shards), 0
        first = self.start + (self.number - self.start) % self.num_readers
        for at in itertools.count(first, self.num_readers):
            self._at = at
            if self._buffer and self._buffer[0].position // num_shards < at // num_shards:
                yield from self._emptied(rng)  # so that an epoch has every sample once
            for item in self._shard(at):
                if isinstance(item, Fault):
                    num_faults += 1
                    if num_faults == num_shards:
                        raise InputError(f"no shard can be read; the last, {item.key}: {item.reason}")
                    yield item
                    continue
                num_faults = 0
                self._buffer.append(item)
                if len(self._buffer) > self.stream.buffer_size:
                    yield self._drawn(rng)

    def _drawn(self, rng: np.random.Generator) -> Item:
        k = int(rng.integers(len(self._buffer)))
        self._buffer[k], self._buffer[-1] = self._buffer[-1], self._buffer[k]
        return self._buffer.pop()

    def _emptied(self, rng: np.random.Generator) -> Iterator[Item]:
        while self._buffer:
            yield self._drawn(rng)

    def _shard(self, position: int) -> Iterator[Item | Fault]:
        """The samples of the shard at a position."""
        epoch, k = divmod(position, len(self.stream.shards))
        shard = self.stream.shards[
            np.random.default_rng((self.seed, epoch)).permutation(len(self.stream.shards))[k]
        ]
        try:
            for number, read in enumerate(read_on(shard)):
                yield Item(position, number, read)
        except InputError as error:
            yield Fault(shard.name, str(error), is_file=True)
