"""`qlip eval` as a person types it: every protocol, on good data and bad, in one process and in two."""

import json
import re
import shlex
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tests.conftest import LABELS, encoded
from tests.integration.test_training import Running

import qlip
from qlip.eval import compare
from qlip.eval.codecs import CODECS

SMALL = ["--device", "cpu", "--batch-size", "5"]


@pytest.fixture
def run(run, monkeypatch, tmp_path):
    """Call `qlip eval ARGUMENTS…` in an empty folder; gives exit code, stdout, stderr in one line."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        code, out, err = run("eval", *arguments)
        return code, out, " ".join(err.split())

    return call


@pytest.fixture
def model(small_model, tmp_path):
    """The folder of a saved small model."""
    small_model.save(tmp_path / "small")
    return tmp_path / "small"


@pytest.fixture
def captioned(tmp_path):
    """A Parquet file of pictures with one to three captions."""
    rows = [{"bytes": encoded(i % 4, i), "path": None} for i in range(12)]
    captions = [[f"a photo of a {LABELS[i % 4]}.", LABELS[i % 4], "a square"][: 1 + i % 3] for i in range(12)]
    pq.write_table(pa.table({"image": rows, "captions": captions}), tmp_path / "captions.parquet")
    return tmp_path / "captions.parquet"


def commands(color_data, captioned, model):
    """A quick command of each protocol."""
    data, classes = color_data / "val.parquet", color_data / "classes.json"
    of = ["--model", model]
    return {
        "zero-shot": ["zero-shot", data, "--classes", classes, "--templates", "a {}.", "{}", *of],
        "retrieval": ["retrieval", captioned, *of],
        "reconstruction": ["reconstruction", data, *of],
        "linear-probe": ["linear-probe", "--train", color_data / "train.parquet", "--test", data, *of],
        "compare": ["compare", data, "--models", model, "--max-samples", 3, "--perceptual", "none"],
    }


METRICS = {
    "zero-shot": {"top1", "top5"},
    "retrieval": {f"{way}_recall@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)},
    "reconstruction": {"psnr", "ssim", "st_lpips", "fd_efficientnet_lite0", "bits_per_pixel", "codes_used"},
    "linear-probe": {"cls_top1", "patches_top1", "both_top1"},
    "compare": {"num_bytes", "bits_per_pixel", "psnr", "ssim"},
}


@pytest.mark.parametrize("protocol", METRICS)
def test_every_protocol(run, color_data, captioned, model, protocol, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "CODECS", CODECS[:1])  # AVIF takes time
    arguments = [*commands(color_data, captioned, model)[protocol], *SMALL, "--out", tmp_path / "out"]
    code, out, err = run(*arguments)
    assert code == 0, err
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    words = (argument.name if isinstance(argument, Path) else str(argument) for argument in arguments)
    assert found["protocol"] == protocol and found["command"] == shlex.join(["qlip", "eval", *words])
    assert found["models"] == [{"name": "small", "id_hash": qlip.load(model).id_hash(), "dtype": "float32"}]
    numbers = found["results"]["small"]
    assert METRICS[protocol] <= numbers.keys() and found["settings"]["resize"] == "crop"
    for name in METRICS[protocol] - {"fd_efficientnet_lite0", "bits_per_pixel", "codes_used"}:
        assert numbers[name]["low"] <= numbers[name]["value"] <= numbers[name]["high"], name
    assert "95 % interval" in out or protocol == "compare"
    assert (tmp_path / "out" / "compare.png").exists() == (protocol == "compare")
    if protocol != "reconstruction":  # whose networks take seconds to load
        code, out, _ = run(*arguments, "--json")
        again = json.loads(out)
        assert code == 0 and again["results"] == found["results"] and again["data"] == found["data"]


@pytest.mark.slow
@pytest.mark.parametrize("protocol", METRICS)
def test_two_processes_find_what_one_does(color_data, captioned, model, protocol, tmp_path):
    arguments = ["eval", *commands(color_data, captioned, model)[protocol], *SMALL, "--out"]
    found, distances = [], []
    for number in (1, 2):
        out = tmp_path / str(number)
        code, words = Running(tmp_path, *arguments, out, processes=number).wait()
        assert code == 0, words
        found.append(json.loads((out / "results.json").read_text()))
        assert found[-1].pop("environment")["processes"] == number and found[-1].pop("command")
        distances.append(found[-1]["results"]["small"].pop("fd_efficientnet_lite0", {"value": 0})["value"])
    assert found[0] == found[1]
    assert distances[0] == pytest.approx(distances[1], rel=1e-6)  # sums over ranks, in another order


def test_a_data_set_of_which_a_picture_is_broken(run, color_data, model, tmp_path):
    table = pq.read_table(color_data / "val.parquet")
    rows = table["image"].to_pylist()
    rows[3]["bytes"] = b"junk"
    pq.write_table(table.set_column(0, "image", pa.array(rows)), color_data / "broken.parquet")
    arguments = ["--classes", color_data / "classes.json", "--model", model, *SMALL, "--out", tmp_path / "out"]
    code, out, err = run("zero-shot", color_data / "broken.parquet", *arguments)
    assert code == 0 and "1 failed: broken.parquet:3: " in err and "15 pictures" in err and "top-1" in out
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["data"]["num_samples"] == 15 and found["data"]["failed"][0].startswith("broken.parquet:3: ")


def test_a_folder_of_class_folders_names_its_classes(run, color_data, model, tmp_path):
    """Its own names, or a file's by them; and the same pictures give the same numbers as with labels."""
    rows = pq.read_table(color_data / "val.parquet").to_pylist()
    for i, row in enumerate(rows):
        folder = tmp_path / "photos" / LABELS[row["label"]].replace(" ", "_")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i:02d}.png").write_bytes(row["image"]["bytes"])
    numbers = []
    for options in ([], ["--classes", color_data / "classes.json"]):
        code, out, err = run("zero-shot", tmp_path / "photos", *options, "--model", model, *SMALL, "--json")
        assert code == 0, err
        found = json.loads(out)
        numbers.append({name: n["value"] for name, n in found["results"]["small"].items()})
    assert numbers[0] == numbers[1] and found["settings"]["classes"] == "classes.json"
    (tmp_path / "photos" / "unicorn").mkdir()
    (tmp_path / "photos" / "unicorn" / "x.png").write_bytes(rows[0]["image"]["bytes"])
    code, _, err = run("zero-shot", tmp_path / "photos", *options, "--model", model, *SMALL)
    assert code == 1 and "class folder 'unicorn' is not in classes.json" in err


def test_what_is_wrong_is_said(run, color_data, captioned, model, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "names.json").write_text('["red", "green"]')
    data, classes = color_data / "val.parquet", ["--classes", color_data / "classes.json"]
    for message, arguments in {
        "empty: no pictures in this folder": ["zero-shot", tmp_path / "empty", *classes],
        "give the names with --classes": ["zero-shot", data],
        "label 2, but names.json has 2 names": ["zero-shot", data, "--classes", tmp_path / "names.json"],
        "captions.parquet:0: no label": ["zero-shot", captioned, *classes],
        "has no {}": ["zero-shot", data, *classes, "--templates", "a photo"],
        "val.parquet:0: no caption": ["retrieval", data],
        "FID has no weights": ["reconstruction", data, "--features", "inception"],
        "--card writes into a model's folder": ["reconstruction", data, "--card", "--model", "qlip-tiny"],
        "'nothing' is not known": ["reconstruction", data, "--model", "nothing"],
    }.items():
        arguments = arguments if "--model" in arguments else [*arguments, "--model", model]
        code, _, err = run(*arguments, *SMALL, "--out", tmp_path / "out")
        assert code == 1 and message in err, (message, err)
    code, _, err = run("compare", data, "--models", model, "qlip-tiny", *SMALL)
    assert code == 1 and re.search("give one --image-size for all", err)
    assert not (tmp_path / "out" / "results.json").exists()


def test_pictures_of_another_size_and_squashed(run, model, tmp_path):
    Image.new("RGB", (100, 40), "teal").save(tmp_path / "wide.png")
    Image.effect_noise((50, 80), 60).convert("RGB").save(tmp_path / "tall.png")
    quick = ["--features", "none", "--perceptual", "none", "--model", model, *SMALL, "--json"]
    sized = ["--image-size", 16, 48, "--resize", "squash"]
    code, out, err = run("reconstruction", tmp_path / "wide.png", tmp_path / "tall.png", *sized, *quick)
    if code:  # single pictures are no source: their folder is
        code, out, err = run("reconstruction", tmp_path, *sized, *quick)
    assert code == 0, err
    found = json.loads(out)
    assert found["settings"]["pictures"].startswith("the whole picture to 16 × 48 pixels")
    assert found["results"]["small"]["bits_per_image"]["value"] == 2 * 6 * 28
    assert torch.tensor(found["results"]["small"]["psnr"]["value"]).isfinite()


def test_what_runs_left_is_called_by_their_names(run, small_model, color_data, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "CODECS", CODECS[:1])
    for name in ("first", "second"):
        small_model.save(tmp_path / name / "model")
    models = [tmp_path / name / "model" for name in ("first", "second")]
    quick = ["--max-samples", 1, "--perceptual", "none", *SMALL]
    code, out, err = run("compare", color_data / "val.parquet", "--models", *models, *quick)
    assert code == 0 and "first" in out and "second" in out, err
    assert (tmp_path / "results" / "compare" / "results.json").exists()
    code, _, err = run("compare", color_data / "val.parquet", "--models", models[0], models[0], *quick)
    assert code == 1 and "have one name: rename a folder" in err


def test_the_numbers_go_into_the_card(run, color_data, model, tmp_path):
    arguments = ["--classes", color_data / "classes.json", "--model", model, *SMALL, "--out", tmp_path / "out"]
    for _ in range(2):
        code, _, err = run("zero-shot", color_data / "val.parquet", *arguments, "--card")
        assert code == 0, err
    assert (model / "README.md").read_text().count("## Evaluation: zero-shot on val.parquet, crop") == 1
    assert qlip.load(model).name == "small"


def test_features_of_the_probe_are_computed_once(run, color_data, captioned, model, tmp_path):
    arguments = [*commands(color_data, captioned, model)["linear-probe"], *SMALL, "--out", tmp_path / "out"]
    assert run(*arguments)[0] == 0
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("features-*.safetensors")}
    assert len(files) == 2
    assert run(*arguments, "--probe.lr", 0.01)[0] == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("features-*")} == files
    assert run(*arguments, "--resize", "squash")[0] == 0
    assert len(list((tmp_path / "out").glob("features-*"))) == 4
