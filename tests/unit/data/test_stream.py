"""Shards served over HTTP: order, share of readers, resuming, faults."""

import functools
import http.server
import itertools
import threading
from collections import Counter
from itertools import islice

import pytest
import torch
from tests.conftest import encoded
from tests.unit.data.test_shards import samples_of, write

from qlip.data import stream as stream_module
from qlip.data.captions import Captioner
from qlip.data.journal import Journal
from qlip.data.loader import TrainingSet, batches
from qlip.data.samples import Fault
from qlip.data.sources import open_samples
from qlip.data.stream import Item, Reader, Stream
from qlip.errors import InputError

NUM_SHARDS, PER_SHARD = 6, 8


class Server:
    """A folder over loopback HTTP; knows what was asked for, and may hang up after some bytes."""

    def __init__(self, folder):
        self.folder, self.asked, self.hang_up_at = folder, Counter(), {}
        server = self

        class Handler(http.server.SimpleHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_GET(self):
                name = self.path.strip("/")
                server.asked[name] += 1
                self.limit = server.hang_up_at.pop(name, None)
                super().do_GET()

            def copyfile(self, source, target):
                target.write(source.read(self.limit))

        handler = functools.partial(Handler, directory=folder)
        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(stream_module, "FIRST_WAIT_S", 0)
    for i in range(NUM_SHARDS):
        write(tmp_path / f"{i}.tar", samples_of([f"{i}{k}" for k in range(PER_SHARD)]))
    found = Server(tmp_path)
    yield found
    found.http.shutdown()
    found.http.server_close()


def opened(server, buffer_size=10):
    return open_samples([f"{server.url}/{{0..{NUM_SHARDS - 1}}}.tar"], buffer_size)


def shard_of(key):
    return key.split("/")[-2]


def read(server, number=0, num_readers=1, start=0, buffer_size=10, seed=0):
    """Endless keys of a reader."""
    for item in Reader(opened(server, buffer_size), seed, start, number, num_readers):
        yield item.read()["key"] if isinstance(item, Item) else item


def training_set(samples, seed=0):
    def transform(image, rng):
        return torch.tensor([float(sum(image)), rng.random()])

    return TrainingSet(samples, transform, Captioner(), seed)


def tokenize(texts):
    return torch.ones(len(texts), 3, dtype=torch.long), torch.ones(len(texts), 3, dtype=torch.long)


def test_an_epoch_has_every_sample_once_in_an_order_of_its_own(server):
    total = NUM_SHARDS * PER_SHARD
    keys = list(islice(read(server), 2 * total))
    first, second = keys[:total], keys[total:]
    assert len(set(first)) == len(set(second)) == total and first != second
    assert keys == list(islice(read(server), 2 * total))
    assert first != list(islice(read(server, seed=1), total))
    assert len({shard_of(key) for key in first[:PER_SHARD]}) > 1  # shuffled across shards


@pytest.mark.parametrize("num_readers", (2, 4, 8))  # also more than shards
def test_readers_share_out_the_shards(server, num_readers):
    per_reader = 12 * PER_SHARD // num_readers  # two epochs
    seen = [list(islice(read(server, n, num_readers, buffer_size=1), per_reader)) for n in range(num_readers)]
    counts = Counter(shard_of(key) for keys in seen for key in keys)
    assert all(0 < count <= 3 * PER_SHARD for count in counts.values()) and len(counts) == NUM_SHARDS
    for a, b in itertools.combinations(range(num_readers), 2):
        if num_readers == 2:
            assert not {shard_of(k) for k in seen[a][:16]} & {shard_of(k) for k in seen[b][:16]}


@pytest.mark.parametrize(("num_workers", "resumed_workers"), [(0, 0), (2, 2), (2, 0)])
@pytest.mark.parametrize("stop", (1, 5, 11))
def test_a_resumed_stream_reads_every_shard_that_was_not_read_out(
    server, tmp_path, num_workers, resumed_workers, stop
):
    def made(start, folder, num_workers):
        dataset = training_set(opened(server))
        journal = Journal(dataset.samples, 0, folder)
        return batches(dataset, tokenize, 4, start, num_workers, journal=journal)

    (tmp_path / "notes").mkdir()
    before = [key for batch in islice(made(0, tmp_path / "notes", num_workers), stop) for key in batch["keys"]]
    position = Journal(opened(server), 0, tmp_path / "notes").position(stop)
    epoch = NUM_SHARDS * PER_SHARD
    resumed = made(stop, tmp_path / "notes", resumed_workers)
    after = [key for batch in islice(resumed, epoch // 4) for key in batch["keys"]]
    assert len(set(before) | set(after)) == epoch  # nothing is left out
    done = {key for key in before if Counter(map(shard_of, before))[shard_of(key)] == PER_SHARD}
    in_flight = max(1, num_workers) + 10 // PER_SHARD + 1
    assert len(done) // PER_SHARD - position <= in_flight  # little is read twice
    first_again = after[: epoch - position * PER_SHARD - 10 * 2]
    assert not {shard_of(key) for key in first_again} & _read_out(server, position)


def _read_out(server, position):
    """The shards before a position."""
    reader = Reader(opened(server), 0, 0, 0, 1)
    return {item.read()["key"].split("/")[-2] for p in range(position) for item in reader._shard(p)}


def test_it_is_the_same_again_with_the_same_processes(server):
    def made(rank):
        dataset = training_set(opened(server))
        return list(islice(batches(dataset, tokenize, 8, num_workers=1, rank=rank, world_size=2), 5))

    for rank in (0, 1):
        for batch, again in zip(made(rank), made(rank), strict=True):
            assert batch["keys"] == again["keys"] and torch.equal(batch["pixel_values"], again["pixel_values"])
    assert not {k for b in made(0)[:3] for k in b["keys"]} & {k for b in made(1)[:3] for k in b["keys"]}


def test_a_line_that_breaks_is_taken_up_again(server):
    server.hang_up_at["3.tar"] = 5000
    assert len(set(islice(read(server), NUM_SHARDS * PER_SHARD))) == NUM_SHARDS * PER_SHARD
    assert server.asked["3.tar"] == 2 and server.asked["2.tar"] == 1


def test_a_shard_that_cannot_be_read_is_skipped_and_listed(server, tmp_path):
    (server.folder / "2.tar").unlink()
    (server.folder / "4.tar").write_bytes((server.folder / "4.tar").read_bytes()[:9000])
    dataset = training_set(opened(server))
    journal = Journal(dataset.samples, 0.4, tmp_path)
    keys = [k for b in islice(batches(dataset, tokenize, 4, journal=journal), 12) for k in b["keys"]]
    assert {shard_of(key)[0] for key in keys} == set("01345")
    listed = (tmp_path / "skipped.jsonl").read_text()
    assert f'"{server.url}/2.tar", "reason": "cannot be read (HTTP Error 404' in listed
    assert f'"{server.url}/4.tar", "reason": "cannot be read (' in listed and len(listed.splitlines()) == 2
    with pytest.raises(InputError, match=r"of 6 files cannot be used, more than the share 0\.1"):
        list(islice(batches(dataset, tokenize, 4, journal=Journal(dataset.samples, 0.1)), 12))


def test_bad_samples_of_a_stream_are_skipped_and_listed(server, tmp_path):
    write(server.folder / "1.tar", {"a.txt": b"no picture", "b.png": encoded(0, 0)} | samples_of("c"))
    dataset = training_set(opened(server))
    journal = Journal(dataset.samples, 0.01, tmp_path)
    keys = [
        k for b in islice(batches(dataset, tokenize, 4, num_workers=1, journal=journal), 12) for k in b["keys"]
    ]
    assert f"{server.url}/1.tar/c" in keys
    listed = (tmp_path / "skipped.jsonl").read_text()
    assert "1.tar/a" in listed and "no picture" in listed
    assert "1.tar/b" in listed and "neither a caption nor a label" in listed and len(listed.splitlines()) == 2


@pytest.mark.parametrize("num_workers", (0, 1))
def test_a_server_that_is_not_there(server, num_workers):
    stream = open_samples(["http://127.0.0.1:9/{0..2}.tar"])
    with pytest.raises(InputError, match=r"^no shard can be read; the last, http://127.*tar: cannot be read \("):
        next(batches(training_set(stream), tokenize, 4, num_workers=num_workers, journal=Journal(stream, 0.9)))
    with pytest.raises(InputError, match=r"0\.tar|2\.tar"):
        list(stream.captions())


def test_all_samples_once_and_their_captions(server):
    write(server.folder / "1.tar", {"a.txt": b"no picture"} | samples_of("c", "a dog"))
    found = list(opened(server))
    assert [item.key for item in found if isinstance(item, Fault)] == [f"{server.url}/1.tar/a"]
    assert list(opened(server).captions()) == ["a cat"] * PER_SHARD + ["a dog"] + ["a cat"] * 4 * PER_SHARD


def test_words_that_no_sample_has(server):
    dataset = training_set(opened(server))
    dataset.caption = lambda sample, rng: Captioner()({"key": sample["key"]}, rng)
    with pytest.raises(InputError, match="neither a caption nor a label.*100 samples in a row"):
        next(batches(dataset, tokenize, 4, journal=Journal(dataset.samples, 0.9)))


def test_a_stream_holds_no_more_than_its_buffer(server):
    stream = Stream(opened(server).shards, buffer_size=3)
    reader = Reader(stream, 0, 0, 0, 1)
    for _ in islice(reader, 30):
        assert len(reader._buffer) <= 4
