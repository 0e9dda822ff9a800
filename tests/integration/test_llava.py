"""The example that trains a LLaVA, and what may become of a run: asked, interrupted, scored, refused."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qlip.train.checkpoint import latest_checkpoint, read_tensors

transformers = pytest.importorskip("transformers")
EXAMPLE = Path(__file__).parents[2] / "examples" / "llava" / "train.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("llava_example", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def trained(example, tmp_path_factory):
    """The folder of the example, trained for a few steps, and how many colours were named."""
    out = tmp_path_factory.mktemp("squares")
    return out, example.train(example.Options(out, pretrain_steps=4, finetune_steps=60))


def test_the_example_learns_colours(trained):
    assert trained[1] >= 0.7  # measured: 1.0; a guess names a quarter


def test_ask(run, trained):
    out, _ = trained
    code, said, _ = run(
        "llava", "ask", out / "finetune" / "model", out / "val" / "0.png", "What is this?", "--device", "cpu"
    )
    assert code == 0 and said.strip().startswith("a ") and said.strip().endswith("square")
    code, _, err = run("llava", "ask", out / "train", out / "val" / "0.png", "What is this?")
    assert code == 1 and "is not a LLaVA folder" in err


def test_the_folder_runs_in_plain_transformers(trained):
    """As the documentation says: import the integration, then transformers' own classes."""
    folder = trained[0] / "finetune" / "model"
    code = f"""
import qlip.integrations.transformers
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained({str(folder)!r})
processor = AutoProcessor.from_pretrained({str(folder)!r})
text = processor.tokenizer.apply_chat_template(
    [{{"role": "user", "content": "<image>\\nWhat is this?"}}], tokenize=False, add_generation_prompt=True
)
inputs = processor(images=[Image.open({str(trained[0] / "val" / "1.png")!r})], text=text, return_tensors="pt")
told = model.generate(**inputs, max_new_tokens=12, do_sample=False)[:, inputs["input_ids"].shape[1] :]
print(processor.tokenizer.batch_decode(told, skip_special_tokens=True)[0].strip())
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    from qlip.llava import ask, load

    assert result.stdout.strip() == ask(*load(folder), [trained[0] / "val" / "1.png"], ["What is this?"], 12)[0]


@pytest.fixture
def arguments(trained):
    out = trained[0]
    return (
        f"llava train llava-tiny-finetune --start {out}/pretrain/model --data.train {out}/train/data.json "
        f"--data.images {out}/train --device cpu --precision fp32 --batch-size 8 --steps 6 --warmup-steps 1 "
        "--log-every 1 --save-every 2 --keep 9 --data.max-length 128"
    ).split()


def lines(folder):
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in entry.items() if k not in ("images_per_s", "memory_gib")} for entry in entries]


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(run, arguments, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    code, _, err = run(*arguments, "--out", whole)
    assert code == 0 and "qlip llava ask" in err
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "model")
    shutil.rmtree(cut / "checkpoints" / "step-0000006")
    code, _, err = run(*arguments, "--out", cut)
    assert code == 1 and "--resume" in err
    code, _, err = run(*arguments, "--out", cut, "--resume", "--lr", "7e-4")
    assert code == 1 and "another 'task.lr'" in err
    assert run("llava", "train", cut / "recipe.json", "--out", cut, "--resume")[0] == 0
    assert lines(cut) == lines(whole)
    first, second = (read_tensors(latest_checkpoint(folder), "model.") for folder in (whole, cut))
    assert first.keys() == second.keys() and not any("vision_tower" in name for name in first)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (cut / "model" / "model.safetensors").read_bytes() == (
        whole / "model" / "model.safetensors"
    ).read_bytes()


def test_a_step_that_is_not_finite_can_be_done_again(run, arguments, tmp_path):
    code, _, err = run(*arguments, "--lr", "1e30", "--grad-clip", "inf", "--out", tmp_path / "run")
    (dump,) = (tmp_path / "run" / "nonfinite").iterdir()
    assert code == 1 and f"--replay {dump}" in " ".join(err.split()), err
    code, said, err = run("llava", "train", tmp_path / "run" / "recipe.json", "--replay", dump)
    assert code == 0, err
    assert json.loads(said) == json.loads((dump / "report-0.json").read_text())["values"]


def test_what_is_wrong_is_said_before_anything_is_written(run, arguments, trained, tmp_path):
    folder = trained[0]
    (tmp_path / "bad.json").write_text("[]")
    for message, options in {
        "name a tokenizer with --vision": ["--start", "None"],
        "brings its own vision": ["--vision", "qlip-tiny"],
        "not a LLaVA folder": ["--start", folder / "llm"],
        "name LLaVA's JSON files": ["--data.train"],
        "raise it": ["--data.max-length", "64"],
        "do not fill a batch": ["--batch-size", "512"],
        "start several with torchrun": ["--sharding", "fsdp"],
    }.items():
        code, _, err = run(*arguments, "--out", tmp_path / "run", *options)
        assert code == 1 and message in " ".join(err.split()), (message, err)
    code, _, err = run("llava", "train", "llava-huge", "--out", tmp_path / "run")
    assert code == 1 and "no recipe 'llava-huge'; qlip llava train --help lists" in err
    assert run("llava", "train", "--help")[0] == 0 and run("llava", "--help")[0] == 0
    assert not (tmp_path / "run").exists()


def test_score(run, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"question_id": 1, "text": "Yes"}\n{"question_id": 2, "text": "Yes"}\n')
    (tmp_path / "l.jsonl").write_text('{"question_id": 1, "label": "yes"}\n{"question_id": 2, "label": "no"}\n')
    code, out, _ = run("llava", "score", "pope", tmp_path / "a.jsonl", "--labels", tmp_path / "l.jsonl", "--json")
    assert code == 0 and json.loads(out)["accuracy"] == 0.5
    code, out, _ = run("llava", "score", "pope", tmp_path / "a.jsonl", "--labels", tmp_path / "l.jsonl")
    assert code == 0 and "recall        1.0000" in out


@pytest.mark.slow
def test_the_tiny_experiment(trained, color_data, tmp_path, monkeypatch, capsys):
    """All arms for two steps each; called again, it trains nothing."""
    from benchmarks import llava_tiny

    options = (
        f"--out {tmp_path}/arms --llm {trained[0]}/llm --train {color_data}/train.parquet "
        f"--val {color_data}/val.parquet --classes {color_data}/classes.json --reconstruction qlip-tiny "
        f"--pretrain-steps 2 --finetune-steps 2 --max-val 8 --device cpu --results {tmp_path}/results"
    ).split()
    monkeypatch.setattr(sys, "argv", ["llava_tiny.py", *options])
    llava_tiny.main()
    written = (tmp_path / "results" / "llava-tiny.md").read_text()
    assert all(f"| {name} |" in written for name in llava_tiny.ARMS) and "| 61.2 |" in written
    found = json.loads((tmp_path / "results" / "llava-tiny.json").read_text())
    assert found["layer -2"]["random"]["num_questions"] == 16 and found["layer -2"]["num_val"] == 8
    questions = json.loads((tmp_path / "arms" / "data" / "finetune.json").read_text())
    answers = [entry["conversations"][1]["value"] for entry in questions]
    assert abs(answers.count("Yes") - answers.count("No")) <= 1
    monkeypatch.setattr(llava_tiny, "run", None)
    llava_tiny.main()
    assert json.loads((tmp_path / "results" / "llava-tiny.json").read_text()) == found
