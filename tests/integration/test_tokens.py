"""`qlip tokenize` on a data set: real processes, one and two, killed at random moments."""

import random
import signal
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.conftest import encoded
from tests.integration.test_training import Running

from qlip.data.token_file import TokenFiles
from qlip.jobs.tokens import tokenize
from qlip.jobs.tokens_check import verify
from qlip.jobs.tokens_job import Job

NUM_PICTURES = 60


@pytest.fixture
def arguments(small_model, tmp_path):
    """A command without its --out: sixty pictures, two of them bad, in fifteen shards."""
    small_model.save(tmp_path / "small")
    images = [{"bytes": encoded(i % 4, i) if i not in (13, 50) else b"junk"} for i in range(NUM_PICTURES)]
    table = pa.table({"image": images, "caption": [f"picture {i}" for i in range(NUM_PICTURES)]})
    pq.write_table(table, tmp_path / "data.parquet", row_group_size=7)
    options = "--shard-rows 4 --batch-size 3 --num-workers 1 --device cpu --keep caption"
    return ["tokenize", tmp_path / "data.parquet", "--model", tmp_path / "small", *options.split()]


@pytest.fixture
def whole(arguments, tmp_path):
    """What a run that nobody disturbs writes, in this process."""
    data, model = str(arguments[1]), str(arguments[3])
    settings = {"keep": ("caption",), "shard_rows": 4, "batch_size": 3, "num_workers": 0, "device": "cpu"}
    tokenize(Job(model, (data,), tmp_path / "whole", **settings))
    return files(tmp_path / "whole")


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".parquet"}


def num_rows(folder):
    return sum(pq.read_metadata(file).num_rows for file in folder.glob("*.parquet"))


def test_killed_at_any_moment_nothing_is_lost_and_nothing_twice(arguments, whole, tmp_path):
    seed = random.randrange(2**32)
    print(f"seed of the moments: {seed}")
    chance, out = random.Random(seed), tmp_path / "out"
    for kill in range(3):
        there = len(files(out)) if out.exists() else 0
        target = min(there + chance.randrange(1, 5), len(whole) - 1)
        running = Running(tmp_path, *arguments, "--out", out)
        if kill == 1:
            running.until(lambda: any(out.glob(".tokens-*.unfinished")))
        else:
            running.until(lambda target=target: len(list(out.glob("*.parquet"))) >= target)
            time.sleep(chance.uniform(0, 0.02))
        running.signal(signal.SIGKILL)
        running.processes[0].join()
        assert files(out).items() <= whole.items()
        print(f"kill {kill}: {len(files(out))} shards of {len(whole)}")
    before = num_rows(out)
    code, words = Running(tmp_path, *arguments, "--out", out).wait()
    assert code == 0 and f"{before} rows are there already: skipped" in words[0], words
    assert "58 pictures in 15 files" in words[0] and "2 failed" in words[0], words
    assert files(out) == whole and not list(out.glob(".*"))
    assert TokenFiles.open([out]).keys() == [f"data.parquet:{i}" for i in range(NUM_PICTURES) if i not in (13, 50)]
    assert verify(out) == {"num_shards": 15, "num_rows": 58, "num_failures": 2, "broken": []}


def test_two_processes_write_what_one_writes(arguments, whole, tmp_path):
    out = tmp_path / "two"
    running = Running(tmp_path, *arguments, "--out", out, processes=2)
    running.until(lambda: len(list(out.glob("*.parquet"))) >= 3)
    running.signal(signal.SIGKILL)
    for process in running.processes:
        process.join()
    code, words = Running(tmp_path, *arguments, "--out", out, processes=2).wait()
    assert code == 0 and "rows are there already" in words[0] and not words[1], words
    assert files(out) == whole and (out / "_manifest.json").exists()
    code, words = Running(tmp_path, *arguments, "--out", out, "--batch-size", 2, processes=2).wait()
    assert code == 1 and "is of another batch size, 3, and not 2" in " ".join(words[0].split()) and not words[1]
    assert files(out) == whole
