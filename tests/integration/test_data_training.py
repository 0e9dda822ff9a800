"""Trainings on sources of every kind: killed, resumed, with things that are broken; and pack → check → train."""

import json
import signal
from itertools import islice

import pyarrow.parquet as pq
import pytest
from tests.conftest import LABELS
from tests.integration.test_training import SMALL, STAGE2, Running, assert_same, entries, last_step, one_line
from tests.unit.data.test_sources import write
from tests.unit.data.test_stream import Server

from qlip.data.loader import order
from qlip.data.sources import open_samples


@pytest.fixture
def mixed(tmp_path, color_data):
    """Labelled Parquet, and captions in a folder, CSV, JSONL and shards; a picture of each is damaged."""
    sources = [
        color_data / "train.parquet",
        *(write(kind, tmp_path / kind) for kind in ("folder", "csv", "jsonl")),
    ]
    for kind in ("folder", "csv", "jsonl"):
        (tmp_path / kind / "pictures" / "005.png").write_bytes(b"damaged")
    shards = write("shards", tmp_path / "shards")
    contents = bytearray((shards / "010.tar").read_bytes())
    contents[600:1200] = bytes(600)  # in the first picture
    (shards / "010.tar").write_bytes(contents)
    return [*sources, shards]


def train(sources, folder, *more):
    classes = ["--data.classes", folder / "colors" / "classes.json"]
    return ["train", "tiny", "--data.train", *sources, *classes, *SMALL, "--eval-every", 100, *more]


def skipped(run):
    return sorted(json.loads(line)["key"] for line in (run / "skipped.jsonl").read_text().splitlines())


def test_a_killed_run_on_all_kinds_of_sources_is_the_whole_run(mixed, tmp_path):
    """160 samples, so that every epoch meets all that is damaged."""
    arguments = train(mixed, tmp_path, "--steps", 22, "--data.max-skipped-share", 0.03)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    code, words = Running(tmp_path, *arguments, "--out", whole).wait()
    assert code == 0 and "training on 160 samples: resumes exactly to the sample" in words[0], words
    planned = {i for indices in islice(order(160, 8, seed=0), 22) for _, i in indices}
    bad = {64 + 5: "pictures/005.png", 88 + 5: "list.csv:5", 112 + 5: "list.jsonl:5", 136 + 10: "010.tar/00000010"}
    assert skipped(whole) == sorted(bad.values()) and planned >= bad.keys()
    assert "skipped 4 of the data, listed in" in " ".join(words[0].split())

    running = Running(tmp_path, *arguments, "--out", killed)
    running.until(lambda: last_step(killed) >= 11)
    running.signal(signal.SIGKILL)
    running.processes[0].join()
    record = json.loads((killed / "recipe.json").read_text())
    for newer in ("max_skipped_share", "shuffle_buffer"):  # as of a run that began before there were these
        del record["recipe"]["data"][newer]
    (killed / "recipe.json").write_text(json.dumps(record))
    code, words = Running(tmp_path, *arguments, "--data.num-workers", 1, "--out", killed, "--resume").wait()
    assert code == 0, words
    assert_same(whole, killed)
    assert skipped(killed) == skipped(whole)


def test_too_much_that_is_broken_ends_the_run_on_both_processes(mixed, tmp_path):
    arguments = train(mixed, tmp_path, "--steps", 22, "--out", tmp_path / "run")
    code, words = Running(tmp_path, *arguments, processes=2).wait()
    said = one_line(["\n".join(line for line in words[0].splitlines() if "cannot be used" in line), words[1]])
    assert (
        code == 1 and "2 of 160 samples cannot be used, listed in" in said and "--data.max-skipped-share" in said
    )
    assert len(skipped(tmp_path / "run")) == 2


def test_a_killed_run_on_shards_of_a_server_goes_on_at_the_shard(tmp_path, color_data):
    shards = write("shards", tmp_path / "shards")
    server, run = Server(shards), tmp_path / "run"
    try:
        source = f"{server.url}/{{000,010,020}}.tar"
        more = ["--data.shuffle-buffer", 4, "--save-every", 2]
        arguments = train([source], tmp_path, *more, "--out", run)
        running = Running(tmp_path, *arguments)
        running.until(lambda: last_step(run) >= 6)
        running.signal(signal.SIGKILL)
        running.processes[0].join()
        code, words = Running(tmp_path, *arguments, "--data.num-workers", 1, "--resume").wait()
    finally:
        server.http.shutdown()
    said = " ".join(words[0].split())
    assert code == 0 and "training on 3 shards, read from front to back: resumes exactly to the shard" in said
    assert [entry["step"] for entry in entries(run) if "loss" in entry] == list(range(1, 13))
    moves = [json.loads(line) for line in (run / "position-0.jsonl").read_text().splitlines()]
    first_step = json.loads((run / "recipe.json").read_text())["segments"][1]["first_step"]
    again = max(i for i, move in enumerate(moves) if move["step"] == first_step)
    before = [move["position"] for move in moves[:again] if move["step"] < first_step]
    assert before[-1] <= moves[again]["position"] <= before[-1] + 1
    assert moves[-1]["position"] >= 2


def test_pack_check_train(run, mixed, tmp_path, color_data):
    code, _, err = run(
        "data", "pack", *mixed, "--out", tmp_path / "packed", "--shard-rows", 50, "--num-workers", 1
    )
    assert code == 0 and "156 samples in 4 shards" in err and "4 failed" in err and "list.csv:5: " in err
    assert "no source states a licence" in err
    code, out, err = run("data", "check", tmp_path / "packed", "--num-workers", 1, "--json")
    found = json.loads(out)
    assert code == 0 and found["num_samples"] == 156 and found["num_checksums"] == 4, err
    code, out, err = run("data", "check", *mixed, "--num-workers", 0)
    assert code == 1 and "4 failed" in err and "010.tar/00000010: " in err and "pictures/s" in out

    code, words = Running(tmp_path, *train([tmp_path / "packed"], tmp_path), "--out", tmp_path / "run").wait()
    assert code == 0 and not (tmp_path / "run" / "skipped.jsonl").exists(), words

    shard = tmp_path / "packed" / "shard-00002.tar"
    contents = bytearray(shard.read_bytes())
    contents[len(contents) // 2] ^= 1
    shard.write_bytes(contents)
    code, _, err = run("data", "check", tmp_path / "packed", "--num-workers", 0)
    assert code == 1 and "shard-00002.tar: its bytes are not those that the manifest names" in err


def test_classes_by_folder_train_and_classify_without_a_file_of_names(tmp_path, color_data):
    for split in ("train", "val"):
        for i, row in enumerate(pq.read_table(color_data / f"{split}.parquet").to_pylist()):
            place = tmp_path / split / LABELS[row["label"]].replace(" ", "_")
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{i}.png").write_bytes(row["image"]["bytes"])
    assert open_samples([tmp_path / "train"]).class_names == tuple(sorted(la.replace(" ", "_") for la in LABELS))
    arguments = ["train", "tiny", "--data.train", tmp_path / "train", "--data.val", tmp_path / "val", *SMALL]
    code, words = Running(tmp_path, *arguments, "--out", tmp_path / "run").wait()
    assert code == 0, words
    assert "eval/top1" in entries(tmp_path / "run")[-1]
    # stage 2 needs no words: a folder of pictures does
    (tmp_path / "train" / "loose.png").write_bytes(row["image"]["bytes"])
    arguments = [
        "train",
        "tiny-stage2",
        "--data.train",
        tmp_path / "train",
        "--tokenizer",
        tmp_path / "run" / "model",
    ]
    code, words = Running(tmp_path, *arguments, *STAGE2, "--steps", 2, "--out", tmp_path / "run2").wait()
    assert code == 0, words


def test_held_out_pictures_that_are_damaged(run, tmp_path, color_data):
    folder = write("folder", tmp_path / "val")
    (folder / "pictures" / "005.png").write_bytes(b"damaged")
    arguments = [*train([color_data / "train.parquet"], tmp_path), "--data.val", folder, "--out", tmp_path / "run"]
    code, _, err = run(*arguments)
    assert code == 1 and "pictures/005.png: " in err and "1 of 24 samples cannot be used" in err
    assert not (tmp_path / "run").exists()
