import json

import pytest

from qlip.data.journal import Journal
from qlip.data.samples import Fault
from qlip.data.stream import RemoteShard, Stream
from qlip.errors import InputError

SAMPLES = [{}] * 100
STREAM = Stream([RemoteShard(f"http://nowhere/{i}.tar") for i in range(50)])


def fault(i):
    return Fault(f"key {i}", "damaged", i)


def listed(folder):
    return [json.loads(line)["index"] for line in (folder / "skipped.jsonl").read_text().splitlines()]


def test_each_fault_counts_once_whoever_meets_it_and_however_often(tmp_path):
    ranks = [Journal(SAMPLES, 0.03, tmp_path, rank, 2) for rank in (0, 1)]
    ranks[0].skip([fault(1), fault(1)])
    ranks[1].skip([fault(1), fault(2)])
    ranks[0].skip([fault(2)])
    resumed = Journal(SAMPLES, 0.03, tmp_path)
    resumed.skip([fault(1), fault(3)])
    assert listed(tmp_path) == [1, 2, 3]
    with pytest.raises(InputError, match="^key 4: damaged; with it 4 of 100 samples"):
        ranks[1].skip([fault(4)])
    with pytest.raises(InputError, match="^key 1: damaged; with it 4 of 100 samples"):
        Journal(SAMPLES, 0.03, tmp_path).skip([fault(1)])
    Journal(SAMPLES, 0.04, tmp_path).skip([fault(1)])


def test_a_line_that_a_crash_cut_off_is_passed_over(tmp_path):
    Journal(SAMPLES, 0.1, tmp_path).skip([fault(1), fault(2)])
    path = tmp_path / "skipped.jsonl"
    path.write_text(path.read_text()[:-20])
    Journal(SAMPLES, 0.1, tmp_path).skip([fault(3)])
    Journal(SAMPLES, 0.1, tmp_path).skip([fault(4)])


def test_a_small_set_must_be_whole():
    with pytest.raises(InputError, match="1 of 64 samples"):
        Journal([{}] * 64, 0.01).skip([fault(0)])


def test_of_a_stream_files_are_counted_and_samples_as_they_come():
    journal = Journal(STREAM, 0.02)
    journal.skip([fault(i) for i in range(200)])
    with pytest.raises(InputError, match="201 of 10,000"):
        journal.skip([fault(200)])
    journal.skip([fault(201)], num_seen=20_000)
    journal.skip([Fault("a.tar", "gone", is_file=True)], num_seen=20_000)
    with pytest.raises(InputError, match=r"^b\.tar: gone; with it 2 of 50 files"):
        journal.skip([Fault("b.tar", "gone", is_file=True)], num_seen=20_000)


def test_the_place_in_a_stream_is_that_of_the_slowest_rank(tmp_path):
    for rank, moves in enumerate([[(1, 0), (5, 4), (9, 6)], [(1, 0), (6, 3)]]):
        journal = Journal(STREAM, 0, tmp_path, rank, 2)
        for step, position in moves:
            journal.move(step, position)
    journal = Journal(STREAM, 0, tmp_path)
    assert [journal.position(step) for step in (0, 1, 5, 6, 9, 100)] == [0, 0, 0, 3, 3, 3]
    journal.move(7, 3)  # resumed at step 6 as a single process: what the others had done after it is void
    journal.move(8, 5)
    assert [journal.position(step) for step in (6, 7, 8, 20)] == [3, 3, 5, 5]
