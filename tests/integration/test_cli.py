"""The commands as a person types them, on real photographs and on bad files."""

import json
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
import skimage.metrics
import torch
from PIL import Image

import qlip
from qlip.cli.main import COMMANDS
from qlip.data.token_file import TokenFormat
from qlip.train.log import read_log


@pytest.fixture
def model(small_model, tmp_path):
    """The folder of a saved small model."""
    small_model.save(tmp_path / "small")
    return tmp_path / "small"


@pytest.fixture
def mixed(tmp_path, photos):
    """Good and bad pictures: a folder with two photographs, a subfolder with a namesake, and broken files."""
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    for photo in photos[:2]:
        (folder / photo.name).write_bytes(photo.read_bytes())
    Image.open(photos[0]).convert("RGBA").save(folder / "more" / f"{photos[0].stem} ü.png")
    (folder / "notes.txt").write_text("not a picture, and not looked at")
    (folder / "empty.jpg").touch()
    (folder / "junk.png").write_bytes(b"junk")
    (folder / "truncated.jpg").write_bytes(photos[0].read_bytes()[:2000])
    return folder


def test_pictures_to_tokens_and_back(run, model, mixed, tmp_path):
    code, out, err = run("tokenize", mixed, "--out", tmp_path / "t.parquet", "--model", model)
    assert code == 0 and out == ""
    assert "3 pictures in" in err and "3 failed" in err
    assert all(name in err for name in ("empty.jpg", "junk.png", "truncated.jpg")) and "notes.txt" not in err

    table = pq.read_table(tmp_path / "t.parquet")
    loaded = qlip.load(model)
    expected = loaded.tokenize([mixed / key for key in table["key"].to_pylist()])
    assert torch.tensor(table["tokens"].to_pylist()).equal(expected)
    token_format = TokenFormat.read(tmp_path / "t.parquet")
    assert token_format.id_hash == loaded.id_hash() and token_format.grid == (4, 4) and token_format.bits == 28

    code, _, err = run("detokenize", tmp_path / "t.parquet", "--out", tmp_path / "rebuilt", "--model", model)
    assert code == 0 and "3 pictures" in err
    written = sorted(str(p.relative_to(tmp_path / "rebuilt")) for p in (tmp_path / "rebuilt").rglob("*.png"))
    assert len(written) == 3 and any(name.startswith("more/") for name in written)
    rebuilt = loaded.detokenize(expected)
    for key, pixels in zip(table["key"].to_pylist(), rebuilt, strict=True):
        path = (tmp_path / "rebuilt" / key).with_suffix(".png")
        found = torch.tensor(list(Image.open(path).tobytes())).view(32, 32, 3)
        assert (found - (pixels.permute(1, 2, 0) * 255).round()).abs().max() == 0


def test_shards_when_out_has_no_suffix(run, model, mixed, tmp_path):
    out, options = tmp_path / "shards", ("--shard-rows", 3, "--model", model, "--num-workers", 0)
    for i in range(5):
        (mixed / f"copy-{i}.jpg").write_bytes((mixed / "astronaut.jpg").read_bytes())
    code, _, err = run("tokenize", mixed, "--out", out, *options)
    assert code == 0 and "8 pictures in" in err and "already" not in err
    rows = {p.name: pq.read_metadata(p).num_rows for p in sorted(out.glob("*.parquet"))}
    assert sum(rows.values()) == 8 and list(rows) == [f"tokens-{i:05d}.parquet" for i in range(4)]
    code, _, err = run("tokenize", mixed, "--out", out, *options)
    assert code == 0 and "8 rows are there already" in err and "8 pictures in" in err and "3 failed" in err
    code, _, err = run("tokenize", mixed / "more", "--out", out, *options)
    assert code == 1 and "of another source" in err and "--out" in err
    code, _, _ = run("detokenize", out, "--out", tmp_path / "rebuilt", "--model", model)
    assert code == 0 and len(list((tmp_path / "rebuilt").rglob("*.png"))) == 8

    code, _, err = run("tokens", "verify", out)
    assert code == 0 and "8 rows in 4 shards; 3 samples could not be used" in err
    code, text, err = run("tokens", "stats", out)
    assert code == 0 and "entropy of groups of 14" in text and "the same tokens: " in err
    code, text, _ = run("tokens", "stats", out, "--json", "--group-bits", 7)
    assert code == 0 and len(json.loads(text)["group_entropy"]) == 4 and json.loads(text)["num_duplicates"] == 6
    file = out / "tokens-00002.parquet"
    file.write_bytes(file.read_bytes()[:-100])
    code, text, err = run("tokens", "verify", out, "--json")
    assert code == 1 and "tokens-00002.parquet: its bytes are not those" in err
    assert [fault["key"] for fault in json.loads(text)["broken"]] == [str(file)]


def test_ids_of_another_tokenizer_are_refused(run, model, mixed, small_model, tmp_path):
    run("tokenize", mixed, "--out", tmp_path / "t.parquet", "--model", model)
    with torch.no_grad():
        small_model.vision_decoder.norm.weight.add_(1)  # a better decoder reads the same ids …
    small_model.save(tmp_path / "decoder")
    with torch.no_grad():
        small_model.vision_model.quant_embed.c_proj.weight.add_(1)  # … another encoder makes others
    small_model.save(tmp_path / "encoder")
    ids = tmp_path / "t.parquet"
    assert run("detokenize", ids, "--out", tmp_path / "a", "--model", tmp_path / "decoder")[0] == 0
    code, _, err = run("detokenize", ids, "--out", tmp_path / "b", "--model", tmp_path / "encoder")
    assert code == 1 and "holds ids" in err and "--model" in err and not (tmp_path / "b").exists()


def test_pictures_of_another_size(run, model, mixed, tmp_path):
    wide, ids = ("--image-size", 16, 48, "--model", model), tmp_path / "t.parquet"
    assert run("tokenize", mixed, "--out", ids, *wide)[0] == 0 and TokenFormat.read(ids).grid == (2, 6)
    assert (
        run("detokenize", ids, "--out", tmp_path / "rebuilt", "--model", model)[0] == 0
    )  # the file knows its grid
    assert {Image.open(path).size for path in (tmp_path / "rebuilt").rglob("*.png")} == {(48, 16)}
    assert run("reconstruct", mixed, "--out", tmp_path / "pairs", *wide)[0] == 0
    assert {Image.open(path).size for path in (tmp_path / "pairs").rglob("*.png")} == {(96, 16)}
    assert run("classify", mixed, "--labels", "red square", *wide)[0] == 0
    code, out, _ = run("info", model, "--image-size", 64, "--json")
    assert code == 0 and json.loads(out)["tokens"].endswith("8 × 8")
    code, _, err = run("info", model, "--image-size", 16, 20)
    assert code == 1 and "--image-size 16 × 20 holds no whole patches: use multiples of 8" in err


@pytest.mark.parametrize("command", ("tokenize", "reconstruct", "classify"))
def test_exit_codes_for_bad_pictures(run, model, mixed, tmp_path, command):
    extra = ["--labels", "a", "b"] if command == "classify" else ["--out", tmp_path / "out.d" / "x.parquet"]
    if command == "reconstruct":
        extra = ["--out", tmp_path / "pairs"]
    good, bad = mixed / "astronaut.jpg", mixed / "junk.png"
    assert run(command, good, bad, *extra, "--model", model)[0] == 0
    assert run(command, good, bad, *extra, "--model", model, "--strict")[0] == 1
    (tmp_path / "out.d" / "x.parquet").unlink(missing_ok=True)
    code, out, err = run(command, bad, tmp_path / "nowhere.jpg", *extra, "--model", model)
    assert code == 1 and out == "" and "junk.png" in err and "nowhere.jpg" in err


def test_no_output_file_when_nothing_succeeded(run, model, mixed, tmp_path):
    assert run("tokenize", mixed / "junk.png", "--out", tmp_path / "t.parquet", "--model", model)[0] == 1
    assert run("reconstruct", mixed / "junk.png", "--out", tmp_path / "pairs", "--model", model)[0] == 1
    assert not (tmp_path / "t.parquet").exists() and not (tmp_path / "pairs").exists()


def test_reconstruct_measures_what_it_writes(run, model, mixed, tmp_path):
    code, out, _ = run("reconstruct", mixed, "--out", tmp_path / "pairs", "--model", model, "--json")
    report = json.loads(out)
    assert code == 0 and len(report["pictures"]) == 3 and len(report["failed"]) == 3
    for entry in report["pictures"]:
        pair = torch.tensor(list(Image.open(entry["output"]).tobytes())).view(32, 64, 3).byte().numpy()
        left, right = pair[:, :32], pair[:, 32:]
        assert entry["psnr"] == pytest.approx(skimage.metrics.peak_signal_noise_ratio(left, right), abs=1e-9)
        expected = skimage.metrics.structural_similarity(
            left, right, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        assert entry["ssim"] == pytest.approx(expected, abs=1e-9)
    mean = sum(e["psnr"] for e in report["pictures"]) / 3
    assert report["mean"]["psnr"] == pytest.approx(mean)
    code, out, _ = run("reconstruct", mixed, "--out", tmp_path / "pairs", "--model", model)
    assert f"{mean:.2f}" in out and "mean of 3" in out


def test_classify(run, model, mixed):
    code, out, _ = run("classify", mixed / "astronaut.jpg", "--labels", "red", "blue", "--model", model, "--json")
    (entry,) = json.loads(out)["pictures"]
    assert code == 0 and set(entry["labels"]) == {"red", "blue"}
    assert sum(entry["labels"].values()) == pytest.approx(1)
    assert list(entry["labels"].values()) == sorted(entry["labels"].values(), reverse=True)
    code, out, _ = run("classify", mixed / "junk.png", "--labels", "a", "--model", model, "--json")
    report = json.loads(out)
    assert code == 1 and report["pictures"] == [] and "junk.png" in report["failed"][0]
    code, _, err = run("classify", mixed / "astronaut.jpg", "--labels", "a", "--templates", "x", "--model", model)
    assert code == 1 and "{}" in err


def test_names_are_printed_as_they_are(run, model, mixed, tmp_path):
    odd = mixed / "[bold]a[/b] [copy].jpg"
    odd.parent.mkdir(parents=True, exist_ok=True)
    odd.write_bytes((mixed / "astronaut.jpg").read_bytes())
    code, out, _ = run("classify", odd, "--labels", "x[/y]", "[red]z", "--model", model)
    assert code == 0 and "[bold]a[/b] [copy].jpg" in out and "x[/y]" in out and "[red]z" in out
    code, out, _ = run("reconstruct", odd, "--out", tmp_path / "pairs", "--model", model)
    assert code == 0 and "[bold]a[/b] [copy].jpg" in out
    assert run("verify", "nope[/]")[0] == 1


def test_info_and_verify(run, model):
    code, out, _ = run("info", model, "--json")
    facts = json.loads(out)
    assert code == 0 and facts["ids"] == qlip.load(model).id_hash() and facts["bytes_per_image"] == 56
    code, out, _ = run("verify", model, "--json")
    checks = {check["name"]: check["passed"] for check in json.loads(out)}
    assert checks["tokens"] and checks["finite"] and code == (0 if all(checks.values()) else 1)
    (model / "model.safetensors").write_bytes(b"x" * 100)
    code, out, _ = run("verify", model)
    assert code == 1 and "model.safetensors" in out


def test_words_that_are_no_command_or_option(run):
    assert run("frobnicate")[0] == 2
    assert run("tokenize", "a.jpg")[0] == 2  # no --out
    assert run("train")[0] == 2
    assert run("train", "no-such-recipe", "--out", "x")[0] == 1
    code, _, err = run("info", "no-such-model")
    assert code == 1 and "qlip-tiny" in err
    code, out, _ = run("--help")
    assert code == 0 and all(command in out for command in COMMANDS)


SMALL_RUN = (
    "--no-compile --batch-size 8 --steps 6 --warmup-steps 1 --eval-every 3 --save-every 3 "
    "--log-every 1 --model.vision.hidden-size 32 --model.vision.num-hidden-layers 1 "
    "--model.vision.intermediate-size 48 --model.vision.image-size 32 --model.vision.num-attention-heads 2 "
    "--model.decoder.hidden-size 32 --model.decoder.num-hidden-layers 1 --model.decoder.intermediate-size 48 "
    "--model.decoder.image-size 32 --model.decoder.num-attention-heads 2 --model.text.hidden-size 32"
).split()


def test_train_resume_publish_and_use(run, color_data, tmp_path):
    files = ["--data.train", color_data / "train.parquet", "--data.val", color_data / "val.parquet"]
    files += ["--data.classes", color_data / "classes.json"]
    folder = tmp_path / "run"
    code, _, err = run("train", "tiny", *files, *SMALL_RUN, "--out", folder)
    assert code == 0, err
    assert {p.name for p in folder.iterdir()} >= {
        "recipe.json", "log.jsonl", "curves.png", "images", "checkpoints", "model",
    }  # fmt: skip
    entries = read_log(folder / "log.jsonl")
    assert [e["step"] for e in entries if "loss" in e] == [1, 2, 3, 4, 5, 6]
    assert {"eval/psnr", "eval/ssim", "eval/top1", "eval/bit_entropy"} <= entries[-1].keys()

    code, _, err = run("train", "tiny", *files, *SMALL_RUN, "--out", folder)
    assert code == 1 and "--resume" in err
    code, _, err = run("train", folder / "recipe.json", "--out", folder, "--resume", "--steps", 8)
    assert code == 0 and [e["step"] for e in read_log(folder / "log.jsonl") if "loss" in e][-1] == 8
    record = json.loads((folder / "recipe.json").read_text())
    assert record["recipe"]["fit"]["steps"] == 8
    assert [(s["first_step"], s["fit"]["steps"]) for s in record["segments"]] == [(1, 6), (7, 8)]
    code, _, err = run("train", folder / "recipe.json", "--out", folder, "--resume", "--seed", 1)
    assert code == 1 and "another 'seed'" in err

    val, classes = ["--val", color_data / "val.parquet"], ["--classes", color_data / "classes.json"]
    code, out, _ = run("publish", folder, "--name", "colors", "--out", tmp_path / "colors", *val, *classes)
    assert code == 0 and {"psnr", "ssim", "top1"} <= json.loads(out).keys()
    card = (tmp_path / "colors" / "README.md").read_text()
    assert f"{json.loads(out)['psnr']:.2f} dB" in card and "16 samples" in card and "8 steps of 8" in card
    assert str(tmp_path) not in card + (tmp_path / "colors" / "recipe.json").read_text()
    finer, published = tmp_path / "finer", tmp_path / "both"
    quick = "--perceptual-weight 0 --adversarial-weight 0 --steps 2 --warmup-steps 1 --batch-size 8".split()
    for start in (folder / "model", tmp_path / "colors"):  # of a run that is here, or only its published folder
        out = finer / start.name
        code, _, err = run("train", "tiny-stage2", "--tokenizer", start, *files, *quick, "--out", out)
        assert code == 0, err
        code, _, err = run("publish", out, "--name", "finer", "--out", published, *val, *classes)
        assert code == 0, err
        card = (published / "README.md").read_text()
        for told in ("stage 1\n", "8 steps of 8", "stage 2\n", "2 steps of 8", "recipe-stage2.json"):
            assert told in card
    for name in ("recipe.json", "recipe-stage2.json"):
        assert str(tmp_path) not in (tmp_path / "both" / name).read_text()
    one, both = (json.loads(run("info", tmp_path / name, "--json")[1]) for name in ("colors", "both"))
    assert one["ids"] == both["ids"]  # as --freeze-ids of the recipe promises
    assert run("info", tmp_path / "colors")[0] == 0
    assert run("demo", "--model", tmp_path / "colors", "--out", tmp_path / "report")[0] == 0
    assert (tmp_path / "report" / "index.html").stat().st_size > 10_000


def test_train_names_what_is_missing(run, color_data, tmp_path):
    out = ["--out", tmp_path / "run"]
    code, _, err = run("train", "tiny", *out)
    assert code == 1 and "no training data" in err and "--data.train" in err
    code, _, err = run("train", "tiny", *out, "--data.train", tmp_path / "nowhere.parquet")
    assert code == 1 and "nowhere.parquet" in err
    train = ["--data.train", color_data / "train.parquet"]
    code, _, err = run("train", "tiny", *out, *train, *SMALL_RUN)
    assert code == 1 and "class-name" in err
    train += ["--data.classes", color_data / "classes.json"]
    code, _, err = run("train", "tiny", *out, *train, "--batch-size", 1000)
    assert code == 1 and "64 samples do not fill a batch of 1000" in err
    assert run("train", "tiny", *out, *train, "--frobnicate", 1)[0] == 2
    code, _, err = run("train", "tiny", *out, *train, "--device", "abacus")
    assert code == 1 and "abacus" in err
    code, _, err = run("train", "tiny", *out, *train, *SMALL_RUN, "--model.decoder.hidden-size", 64)
    assert code == 1 and "commitment_weight" in err
    assert not (tmp_path / "run").exists()


def test_the_installed_command_answers():
    result = subprocess.run([sys.executable, "-m", "qlip.cli", "--help"], capture_output=True, text=True)
    assert result.returncode == 0 and "tokenize" in result.stdout
