"""Batches from worker processes arrive, or end the job."""

import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import IterableDataset

from qlip.data import delivery
from qlip.data.delivery import FromWorkers
from qlip.errors import InputError


def batch(number):
    return {"pixels": torch.full((1000,), float(number)), "keys": [str(number)]}


class Stream(IterableDataset):
    def __iter__(self):
        return map(batch, range(4))


def no_room(item):
    raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")


@pytest.mark.parametrize("num_workers", (0, 1, 2))
@pytest.mark.parametrize("full", (False, True))
def test_batches_arrive_in_order_also_where_shared_memory_is_full(monkeypatch, num_workers, full):
    if full:
        monkeypatch.setattr(delivery, "ForkingPickler", SimpleNamespace(dumps=no_room))
    given = FromWorkers(batch, num_workers, range(4))
    streamed = FromWorkers(Stream(), min(num_workers, 1))
    assert len(given) == 4
    for source in (given, streamed):
        found = list(source)
        assert [item["keys"] for item in found] == [["0"], ["1"], ["2"], ["3"]]
        assert [item["pixels"].tolist() for item in found] == [[float(i)] * 1000 for i in range(4)]


def killed(number):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed_ends_the_job_with_the_remedy():
    since = time.monotonic()
    with pytest.raises(InputError, match="a worker process ended .*--num-workers 0.*--shm-size"):
        list(FromWorkers(killed, 1, range(4)))
    assert time.monotonic() - since < 10


def fails(number):
    raise InputError("a.png is broken") if number else RuntimeError("a defect")


def test_errors_of_a_worker_keep_their_kind():
    with pytest.raises(RuntimeError, match="a defect"):
        list(FromWorkers(fails, 1, [0]))
    with pytest.raises(InputError, match="a.png is broken"):
        list(FromWorkers(fails, 1, [1]))
