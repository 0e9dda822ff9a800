import multiprocessing
import os
import pickle
import signal
from contextlib import closing
from itertools import islice

import numpy as np
import pytest
import torch

from qlip.bits import tokens_to_sub_tokens
from qlip.data import TokenDataset, token_dataset
from qlip.data.token_file import TokenFormat, write_token_file
from qlip.errors import InputError

FORMAT = TokenFormat("small", "0123456789abcdef", 28, (2, 3))
COUNTS = (7, 0, 5, 12)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Four shards of several row groups, one of them without rows."""
    monkeypatch.setattr("qlip.data.token_file.ROW_GROUP", 4)
    rng = np.random.default_rng(0)
    for i, count in enumerate(COUNTS):
        keys = [f"{i}/{k}" for k in range(count)]
        kept = {"caption": [f"picture {key}" if key != "0/3" else None for key in keys]}
        ids = rng.integers(0, 2**28, (count, 6))
        write_token_file(tmp_path / "tokens" / f"tokens-{i:05d}.parquet", FORMAT, keys, ids, kept)
    return tmp_path / "tokens"


@pytest.fixture(params=["parquet", "mapped"])
def dataset(request, folder, tmp_path):
    return TokenDataset(folder, 14, cache=tmp_path / "cache" if request.param == "mapped" else None)


def expected(folder):
    rng = np.random.default_rng(0)
    return torch.from_numpy(np.concatenate([rng.integers(0, 2**28, (count, 6)) for count in COUNTS]))


def test_rows_are_those_of_the_files(dataset, folder):
    keys = [f"{i}/{k}" for i, count in enumerate(COUNTS) for k in range(count)]
    assert len(dataset) == 24 and [dataset[i]["key"] for i in range(24)] == keys
    found = torch.stack([dataset[i]["sub_tokens"] for i in range(24)])
    assert found.equal(tokens_to_sub_tokens(expected(folder), 28, 14)) and found.shape == (24, 6, 2)
    assert dataset[3]["caption"] is None and dataset[-1]["caption"] == "picture 3/11"
    assert dataset.columns == ("key", "caption")
    with pytest.raises(IndexError):
        dataset[24]


def test_batches_depend_on_seed_and_step_alone(dataset):
    def take(count, **options):
        return list(islice(dataset.batches(6, **options), count))

    first = take(8, seed=1)
    assert sorted(key for batch in first[:4] for key in batch["key"]) == sorted(d["key"] for d in dataset)
    assert [b["key"] for b in first[:4]] != [b["key"] for b in first[4:]] != [b["key"] for b in take(4, seed=2)]
    resumed = take(5, seed=1, start_step=3)
    shares = [take(8, seed=1, rank=rank, world_size=3) for rank in range(3)]
    workers = take(8, seed=1, num_workers=2)
    for i, batch in enumerate(first):
        assert batch["sub_tokens"].shape == (6, 6, 2) and batch["sub_tokens"].dtype == torch.int64
        parts = [share[i] for share in shares]
        assert torch.cat([part["sub_tokens"] for part in parts]).equal(batch["sub_tokens"])
        assert [caption for part in parts for caption in part["caption"]] == batch["caption"]
        assert workers[i]["key"] == batch["key"]
        assert i < 3 or resumed[i - 3]["sub_tokens"].equal(batch["sub_tokens"])


def test_the_cache_is_made_once_and_anew_for_another_file(folder, tmp_path):
    cache = tmp_path / "cache"
    TokenDataset([folder], 28, cache)
    times = {path.name: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert len(times) == 4 and all(name.endswith(".arrow") for name in times)
    again = TokenDataset(folder, 28, cache)
    assert {path.name: path.stat().st_mtime_ns for path in cache.iterdir()} == times
    assert again[0]["key"] == "0/0"
    write_token_file(folder / "tokens-00000.parquet", FORMAT, ["new"], np.ones((1, 6)))
    changed = TokenDataset(folder, 28, cache)
    assert changed[0]["key"] == "new" and len(changed) == 18 and changed.columns == ("key", "caption")
    assert len(list(cache.iterdir())) == 4


def test_it_pickles_and_decodes_lazily(dataset, monkeypatch):
    copy = pickle.loads(pickle.dumps(dataset))
    calls = []
    read = token_dataset._read_group.__wrapped__
    monkeypatch.setattr(token_dataset, "_read_group", lambda *place: calls.append(place) or read(*place))
    assert copy[5]["key"] == "0/5" and len(calls) == 1


def test_what_does_not_fit_is_named(folder, tmp_path):
    with pytest.raises(InputError, match="bits=5 does not divide"):
        TokenDataset(folder, 5)
    dataset = TokenDataset(folder, 7)
    with pytest.raises(InputError, match="24 samples do not fill a batch of 25"):
        next(dataset.batches(25))
    with pytest.raises(InputError, match="batch_size=6 cannot be shared by 4"):
        next(dataset.batches(6, world_size=4))
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="choose another cache"):
        TokenDataset(folder, 7, tmp_path / "file")
    write_token_file(folder / "other.parquet", TokenFormat("b", "f" * 16, 28, (2, 3)), ["a"], np.ones((1, 6)))
    with pytest.raises(InputError, match="read them one at a time"):
        TokenDataset(folder, 7)


def test_large_files_in_random_order_ask_for_a_cache(folder, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(token_dataset, "HELD_GROUPS", 3)
    monkeypatch.setattr(token_dataset, "ROW_GROUP", 4)
    TokenDataset(folder, 7, tmp_path / "cache")
    assert not caplog.text
    TokenDataset(folder, 7)
    assert "24 rows of Parquet in random order are slow: give a cache=" in caplog.text


def test_workers_outlive_a_signal_to_the_whole_group(dataset):
    """It is for the training to answer: the batches that it needs until then still come."""
    with closing(dataset.batches(4, num_workers=1)) as batches:
        next(batches)
        (worker,) = multiprocessing.active_children()
        os.kill(worker.pid, signal.SIGTERM)
        assert len([next(batches) for _ in range(8)]) == 8 and worker.is_alive()
    worker.join(10)
    assert not worker.is_alive()
