"""`qlip eval t2i` and benchmarks' prompts as a person types them, with a small generator of random weights."""

import json

import pytest
from PIL import Image
from tests.conftest import LABELS, encoded
from tests.unit.t2i.conftest import CLASSES, written
from tests.unit.um3.conftest import written as written_um3

import qlip

QUICK = ["--features", "none", "--classifier", "none", "--device", "cpu"]


@pytest.fixture(scope="module")
def tokenizer():
    return qlip.load("qlip-tiny")


@pytest.fixture(scope="module")
def painter(tmp_path_factory, tokenizer):
    """The folder of a run with its model."""
    return written(tmp_path_factory.mktemp("painter") / "model", tokenizer)


@pytest.fixture
def evaluate(run, monkeypatch, tmp_path):
    """Call `qlip eval t2i ARGUMENTS…` in an empty folder; gives exit code, stdout, stderr in one line."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        code, out, err = run("eval", "t2i", *arguments)
        return code, out, " ".join(err.split())

    return call


def test_pictures_are_drawn_once_and_measured(evaluate, color_data, painter, tmp_path):
    data = [color_data / "val.parquet", "--classes", color_data / "classes.json"]
    few = ["--model", painter, "--qlip", "qlip-tiny", "--max-samples", "3", "--cfg", "2", *QUICK]
    code, out, err = evaluate(*data, *few, "--out", "out")
    assert code == 0, err
    assert "QLIP score, w = 1" in out and "the reference, rebuilt by qlip-tiny" in " ".join(out.split())
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    name = painter.parent.name
    assert list(found["results"]) == [name, "the reference", "the reference, rebuilt by qlip-tiny"]
    number = found["results"][name]["qlip_score"]
    assert 0 <= number["low"] <= number["value"] <= number["high"] <= 1
    assert found["data"]["num_samples"] == found["data"]["drawn_num_samples"] == 3
    assert found["settings"]["cfg"] == 2 and found["settings"]["drawn_after"] == ["val.parquet"]
    lines = [json.loads(line) for line in (tmp_path / "out" / "drawn.jsonl").read_text().splitlines()]
    assert [line["caption"] for line in lines] == [f"a photo of a {LABELS[i]}." for i in (0, 1, 2)]
    files = sorted((tmp_path / "out" / "drawn").iterdir())
    times = [path.stat().st_mtime_ns for path in files]
    files[1].unlink()
    code, out, _ = evaluate(*data, *few, "--out", "out", "--json")
    again = json.loads(out)
    assert code == 0 and again["results"] == found["results"] and again["data"] == found["data"]
    assert [path.stat().st_mtime_ns == time for path, time in zip(files, times, strict=True)] == [
        True,
        False,
        True,
    ]
    code, _, err = evaluate(*data, *few, "--out", "out", "--seed", "5")
    assert code == 1 and "was drawn otherwise (seeds [0]): name another --out" in err
    code, out, err = evaluate(*data, "--drawn", "out/drawn.jsonl", "--qlip", "qlip-tiny", *QUICK, "--json")
    assert code == 0 and json.loads(out)["results"]["drawn"] == found["results"][name], err
    assert (tmp_path / "results" / "drawn" / "t2i" / "results.json").exists()


def test_a_model_of_classes_draws_the_labels(evaluate, color_data, tokenizer, tmp_path):
    model = written(tmp_path / "classes", tokenizer, **CLASSES)
    arguments = ["--model", model, "--max-samples", "2", "--num", "2", *QUICK, "--out", "out"]
    code, _, err = evaluate(color_data / "val.parquet", *arguments)
    assert code == 0, err
    lines = [json.loads(line) for line in (tmp_path / "out" / "drawn.jsonl").read_text().splitlines()]
    assert [line["label"] for line in lines] == [0, 0, 0, 0] and "caption" not in lines[0]
    pictures = [(tmp_path / "out" / line["image"]).read_bytes() for line in lines]
    assert len(set(pictures)) == 4  # each has a seed of its own


def test_a_unified_model_draws_as_it_does_itself(evaluate, color_data, tmp_path):
    folder = written_um3(tmp_path / "um3")
    data = [color_data / "val.parquet", "--classes", color_data / "classes.json", "--max-samples", "2"]
    code, out, err = evaluate(*data, "--model", folder, *QUICK, "--out", "out", "--json")
    assert code == 0, err
    settings = json.loads(out)["settings"]
    own = {"cfg": 1.0, "temperature": 1.0, "top_k": 0, "top_p": 0.95, "text": "cut to 63 tokens"}
    assert {name: settings[name] for name in own} == own
    said = json.loads((tmp_path / "out" / "drawn.jsonl").read_text().splitlines()[1])["caption"]
    (expected,) = qlip.load_um3(folder).draw(said, seed=1)
    assert Image.open(tmp_path / "out" / "drawn" / "000001.png").tobytes() == expected.tobytes()


def test_what_is_wrong_is_said_before_anything_is_drawn(evaluate, color_data, painter, tmp_path):
    data, classes = color_data / "val.parquet", ["--classes", color_data / "classes.json"]
    for message, arguments in {
        "'red square' is not one of ImageNet's 1,000 classes": [*classes, "--features", "none"],
        "no caption, and no names of classes": QUICK,
        "has no {}": [*classes, *QUICK, "--template", "a photo"],
        "FID has no weights": [*classes, "--classifier", "none", "--features", "inception"],
        "is no CLIP of transformers": [*classes, *QUICK, "--clip", tmp_path / "nothing"],
        "cfg is 0.5: use 1": [*classes, *QUICK, "--cfg", "0.5"],
        "either a --model that draws": [*classes, *QUICK, "--drawn", data],
    }.items():
        code, _, err = evaluate(data, "--model", painter, *arguments, "--out", "out")
        assert code == 1 and message in err, (message, err)
    assert not (tmp_path / "out").exists()
    assert "either a --model" in evaluate(data)[2]


@pytest.mark.slow
def test_photographs_are_as_good_as_themselves(evaluate, tmp_path):
    """With the real classifier, which is asked for four classes; what it takes the squares for does not matter."""
    wnids = ("n01440764", "n01443537", "n02099601", "n15075141")
    for i in range(8):
        path = tmp_path / "photos" / wnids[i % 4] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(i % 4, i, 64))
    same = ["--features", "efficientnet-lite0", "--device", "cpu", "--tokenizer", "qlip-tiny", "--json"]
    code, out, err = evaluate("photos", "--drawn", "photos", *same)
    assert code == 0 and "fewer than its 1280 features" in err, err
    drawn, reference, rebuilt = json.loads(out)["results"].values()
    assert drawn["fd_efficientnet_lite0"]["value"] == pytest.approx(0, abs=1e-3)
    assert rebuilt["fd_efficientnet_lite0"]["value"] > 0.1
    assert drawn["class_accuracy"] == reference["class_accuracy"] and "class_accuracy" in rebuilt


def test_a_benchmarks_prompts(run, painter, tmp_path):
    (tmp_path / "1.txt").write_text("a dog " * 20)  # longer than the model reads
    command = ["generate", "--model", painter, "--layout", "dpg", "--device", "cpu", "--cfg", "2", "--out"]
    code, out, err = run(*command, tmp_path / "out", "--prompt-file", tmp_path, "--json")
    assert code == 0 and json.loads(out)[0]["seeds"] == [0, 1, 2, 3], err
    assert Image.open(tmp_path / "out" / "1.png").size == (128, 128)
    code, _, err = run(*command, tmp_path / "out", "a dog")
    assert code == 1 and "name them with --prompt-file" in " ".join(err.split())
