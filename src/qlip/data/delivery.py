"""Batches from worker processes: each arrives, or the job ends with the reason and the remedy.

A `DataLoader` sends tensors through /dev/shm, in a thread of the worker. Where that is full (a container's usually
has 64 MiB) the thread fails, the worker lives on, and the job waits for ever. Here a worker pickles its batch
itself, and a batch that finds no room goes through the pipe, as plain bytes.
"""

import pickle
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
import torch.multiprocessing  # teaches ForkingPickler shared memory
from torch.utils.data import DataLoader, Dataset, IterableDataset

from qlip.data.workers import end_with_run
from qlip.errors import InputError, one_line


class FromWorkers:
    """What a data set gives, made by worker processes, in order; it has a length where that is known."""

    def __init__(
        self,
        dataset: Dataset | Callable[[Any], Any],
        num_workers: int,
        sampler: Iterable | None = None,
        worker_init_fn: Callable[[int], None] = end_with_run,
        generator: torch.Generator | None = None,
    ):
        """Hold the data.

        Args:
            dataset: an `IterableDataset`; or what gives an item for each of `sampler`: a `Dataset` or a function.
            num_workers: processes; 0: this one.
            sampler: indices.
            worker_init_fn: what a worker does first.
            generator: from which the workers' seeds are taken; None: the global one.
        """
        sent = num_workers > 0
        if not isinstance(dataset, IterableDataset):
            get = dataset.__getitem__ if isinstance(dataset, Dataset) else dataset
            dataset = _Items(get, sent)
        elif sent:
            dataset = _Stream(dataset)
        self._loader: DataLoader = DataLoader(
            dataset,
            batch_size=None,
            sampler=sampler,
            num_workers=num_workers,
            worker_init_fn=worker_init_fn,
            generator=generator,
        )

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        """Each item.

        Raises:
            InputError: a worker ended: it was killed, or memory ran out.
        """
        try:
            yield from self._loader
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker"):
                raise
            raise InputError(
                f"a worker process ended ({one_line(error)}): it may have lacked memory; lower --num-workers, or "
                "use --num-workers 0; in a container a larger --shm-size can help"
            ) from error


@dataclass(frozen=True)
class _Items(Dataset):
    get: Callable[[Any], Any]
    sent: bool

    def __getitem__(self, index: Any) -> Any:
        return _Pickled(self.get(index)) if self.sent else self.get(index)


@dataclass(frozen=True)
class _Stream(IterableDataset):
    source: IterableDataset

    def __iter__(self) -> Iterator["_Pickled"]:
        return map(_Pickled, self.source)


class _Pickled:
    """An item, pickled: its tensors lie in shared memory, or where that is full among the bytes.

    Whoever receives it has the item again, and at once: shared memory is handed over by a worker that lives.
    """

    def __init__(self, item: Any):
        try:
            self._content = bytes(ForkingPickler.dumps(item))
        except (RuntimeError, OSError):
            self._content = pickle.dumps(item)

    def __reduce__(self) -> tuple[Callable, tuple[bytes]]:
        return pickle.loads, (self._content,)
