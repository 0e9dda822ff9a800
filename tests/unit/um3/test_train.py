"""A step, evaluators and whole runs: parts, processes and interruptions change nothing."""

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from tests.unit.um3.conftest import base, small_words
from tests.unit.um3.test_data import STORIES, write_stories, write_tokens

import qlip
from qlip.errors import InputError
from qlip.lm import checkpoint as lm
from qlip.recipes import um3
from qlip.train.fit import FitConfig
from qlip.train.log import read_log
from qlip.train.optim import AdamWConfig
from qlip.train.parallel import ComputeConfig
from qlip.um3.checkpoint import add_image_specials, load, open_tokenizer
from qlip.um3.config import UM3Config
from qlip.um3.data import Batches, DataSources, training_batches
from qlip.um3.evaluate import attention_norms, held_out_pictures, held_out_text
from qlip.um3.layout import image_to_text, text_to_image
from qlip.um3.mix import MixConfig
from qlip.um3.model import UM3
from qlip.um3.sources import Pictures, Text
from qlip.um3.train import UM3Task

FP32 = ComputeConfig(device="cpu", precision="fp32")
MIX = MixConfig((4, 1, 3), (1, 1, 3), 4)


def write_base(folder: Path) -> Path:
    """A language model's folder, of random weights."""
    words = small_words()
    lm.save(base(vocab_size=words.get_vocab_size(), max_position_embeddings=128), folder)
    words.save(str(folder / "tokenizer.json"))
    return folder


def write_all(folder: Path) -> Path:
    write_base(folder / "base")
    write_stories(folder / "stories.jsonl")
    write_tokens(folder / "tokens", 20)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model and its sources."""
    folder = write_all(tmp_path_factory.mktemp("um3"))
    words = open_tokenizer(folder / "base")
    boi, eoi = add_image_specials(words)
    shape = {"num_bits": 8, "bits": 4, "grid": (2, 3), "tokenizer": "qlip-tiny", "id_hash": "0" * 16}
    llama = lm.load(folder / "base")
    config = UM3Config.of(llama.config, **shape, boi=boi, eoi=eoi)
    text = Text.open([str(folder / "stories.jsonl")], words, config)
    return llama, config, DataSources(text, Pictures([folder / "tokens"], config, words, 10))


def model_of(made, **changes) -> UM3:
    llama, config, _ = made
    return UM3.from_llama(llama, replace(config, **changes), noise=1.0)


def test_parts_and_recomputation_change_nothing(made):
    _, config, sources = made
    batch = Batches(sources, MIX, config, 60, 8)[3]
    tasks = [
        UM3Task(model_of(made), AdamWConfig(), replace(FP32, **settings), 8)
        for settings in ({}, {"micro_batch_size": 2, "recompute": True})
    ]
    first, second = (task.step(batch, 1) for task in tasks)
    for name, value in first.items():
        assert abs(float(value - second[name])) < 1e-5, name
    for (name, one), other in zip(tasks[0].model.named_parameters(), tasks[1].model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=1e-6, msg=name)
    assert first["loss"] == first["text_loss"] + first["visual_loss"]
    shares = [float(first[f"share/{kind}"]) for kind in ("text", "image_to_text", "text_to_image")]
    assert abs(sum(shares) - float((batch["document_ids"] > 0).float().mean())) < 1e-6


@pytest.mark.parametrize("softmax", ["separate", "joint"])
def test_held_out_numbers_are_those_of_the_logits(made, softmax):
    _, config, sources = made
    model = model_of(made, softmax=softmax)

    def nats(document, first, visual):
        ids = torch.tensor(document)
        with torch.no_grad():
            logits = model.lm.logits(model.lm(ids[None]))[0, :-1]
        start = config.num_text if visual and softmax == "separate" else 0
        logits = logits[:, start:] if visual or softmax == "joint" else logits[:, : config.num_text]
        each = F.cross_entropy(logits, (ids[1:] - start).clamp(0, logits.shape[1] - 1), reduction="none")
        kept = (ids[1:] >= config.num_text) == visual
        kept[: first - 1] = False
        return each[kept].sum(), int(kept.sum())

    found = held_out_text(model, sources.text, 10)
    sums = [nats(sources.text.document(i), 1, False) for i in range(0, 30, 3)]
    expected = float(sum(total for total, _ in sums)) / sum(count for _, count in sums)
    assert abs(found["text_nats_per_token"] - expected) < 1e-5
    assert abs(found["text_perplexity"] - math.exp(expected)) < 1e-3
    found = held_out_pictures(model, sources.pictures, 5)
    rows = sources.pictures.read(range(0, 20, 4), range(0, 20, 4))
    drawn = sum(nats(text_to_image(words, tokens, config), 1, True)[0] for _, tokens, words in rows)
    assert abs(found["bits_per_image"] - float(drawn) / math.log(2) / 5) < 1e-4
    said = [nats(image_to_text(tokens, words, config), 15, False) for _, tokens, words in rows]
    assert sum(count for _, count in said) == sum(len(words) + 1 for *_, words in rows)
    per_token = float(sum(total for total, _ in said)) / sum(count for _, count in said)
    assert abs(found["caption_nats_per_token"] - per_token) < 1e-5


def test_norms_are_those_of_queries_and_keys(made):
    llama, config, _ = made
    plain = UM3.from_llama(llama, UM3Config.of(llama.config, **_shape(config), qk_norm=False))
    found = attention_norms(plain, [[1, 7, 9]])
    with torch.no_grad():
        x = llama.embed(torch.tensor([[1, 7, 9]]))
        first = llama.layers[0]
        queries = first.self_attn.q_proj(first.input_layernorm(x)).unflatten(-1, (-1, llama.config.head_width))
    for layer in plain.lm.layers[1:]:
        layer.self_attn.q_proj.weight.data.zero_()
    expected = float(queries.norm(dim=-1).mean()) / len(plain.lm.layers)
    assert abs(attention_norms(plain, [[1, 7, 9]])["query_norm"] - expected) < 1e-5
    assert found["max_attention_scale"] > 0
    normed = attention_norms(model_of(made), [[1, 7, 9]])
    assert abs(normed["query_norm"] - config.lm.head_width**0.5) < 1e-3  # gains of 1


def _shape(config):
    names = ("num_bits", "bits", "grid", "tokenizer", "id_hash", "boi", "eoi")
    return {name: getattr(config, name) for name in names}


def test_it_learns(made):
    _, config, sources = made
    task = UM3Task(model_of(made), AdamWConfig(lr=3e-3), FP32, 8)
    before = task.snapshot()
    for step, batch in enumerate(islice(training_batches(Batches(sources, MIX, config, 60, 8)), 40), 1):
        task.step(batch, step)
    text = [held_out_text(model, sources.text, 30)["text_nats_per_token"] for model in (before, task.snapshot())]
    drawn = [
        held_out_pictures(model, sources.pictures, 20)["bits_per_image"] for model in (before, task.snapshot())
    ]
    assert text[1] < 0.5 * text[0]
    assert drawn[1] < drawn[0] - 5


def recipe(folder: Path, **changes) -> um3.UM3Recipe:
    text = (str(folder / "stories.jsonl"),)
    data = um3.UM3DataConfig((folder / "tokens",), (folder / "tokens",), text, text, max_val=8)
    fit = FitConfig(6, warmup_steps=1, log_every=1, eval_every=6, save_every=3, best=None)
    small = {"base": str(folder / "base"), "mix": MIX, "bits": 4, "sequence_length": 60, "max_caption_tokens": 10}
    small |= {"data": data, "fit": fit, "device": "cpu", "precision": "fp32", "batch_size": 8}
    return um3.UM3Recipe(**small | changes)


def losses(out: Path) -> torch.Tensor:
    return torch.tensor([entry["loss"] for entry in read_log(out / "log.jsonl") if "loss" in entry])


def test_a_run_leaves_a_model_and_goes_on_from_a_checkpoint(tmp_path):
    folder = write_all(tmp_path)
    whole = recipe(folder)
    whole = replace(whole, data=replace(whole.data, cache=tmp_path / "cache", num_workers=1))
    assert um3.run(whole, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step-0000006", ignore_errors=True)
    for path in (tmp_path / "again" / "checkpoints").iterdir():
        if "0000003" not in path.name:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert um3.run(recipe(folder), tmp_path / "again", resume=True)  # neither cache nor workers change anything
    assert torch.equal(losses(tmp_path / "whole"), losses(tmp_path / "again"))
    one, other = (load(tmp_path / name / "model") for name in ("whole", "again"))
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())
    assert one.config.lm.qk_norm and one.config.lm.max_position_embeddings == 60
    evaluated = [entry for entry in read_log(tmp_path / "whole" / "log.jsonl") if "eval/bits_per_image" in entry]
    assert {"eval/text_perplexity", "eval/caption_nats_per_token", "eval/query_norm"} <= evaluated[-1].keys()
    assert um3.load_recipe(str(tmp_path / "whole" / "recipe.json")).mix == MIX
    with pytest.raises(InputError, match=r"another 'mix.calm_down_steps'"):
        um3.run(recipe(folder, mix=replace(MIX, calm_down_steps=5)), tmp_path / "again", resume=True)


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_exactly(tmp_path):
    folder = write_all(tmp_path)
    made = recipe(folder, fit=FitConfig(40, warmup_steps=1, log_every=1, eval_every=40, save_every=2, best=None))
    um3.run(made, tmp_path / "whole")
    path = tmp_path / "recipe.json"
    path.write_text((tmp_path / "whole" / "recipe.json").read_text())
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "qlip.cli", "train", str(path), "--num-workers", "1", "--out", str(out)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while len(losses(out)) < 7 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 6 < len(losses(out)) < 40
    assert subprocess.run([*command, "--resume"], stderr=subprocess.DEVNULL).returncode == 0
    assert torch.equal(losses(out), losses(tmp_path / "whole"))
    one, other = (load(where / "model").state_dict() for where in (out, tmp_path / "whole"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def worker(index: int, port: int, folder: Path, out: Path, sharding: str) -> None:
    os.environ |= {"RANK": str(index), "LOCAL_RANK": str(index), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    um3.run(recipe(folder, sharding=sharding, micro_batch_size=2), out / sharding)


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(tmp_path):
    folder = write_all(tmp_path)
    um3.run(recipe(folder), tmp_path / "alone")
    for sharding in ("ddp", "fsdp"):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        mp.spawn(worker, (port, folder, tmp_path, sharding), nprocs=2)
        found, expected = losses(tmp_path / sharding), losses(tmp_path / "alone")
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        one, other = (load(tmp_path / name / "model").state_dict() for name in (sharding, "alone"))
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"data": um3.UM3DataConfig()}, "name token files or folders with --tokens"),
        ({"base": "nowhere"}, "base 'nowhere' is no folder and no hub id"),
        ({"tokenizer": "qlip-tiny"}, "ids 0000000000000000 of 'lab/tokenizer', but 'qlip-tiny' makes"),
        ({"bits": 3}, "bits 3 does not divide the 8 bits"),
        ({"sequence_length": 20}, "sequence_length 20 is shorter than a picture with its caption, 26 tokens"),
        ({"mix": MixConfig((0, 1, 0), (1, 9, 9), 1)}, "the mix asks for 95% pictures"),
    ],
)
def test_recipes_that_cannot_be_run(tmp_path, changes, complaint):
    with pytest.raises(InputError, match=complaint):
        um3.run(recipe(write_all(tmp_path), **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_held_out_pictures_and_names_are_looked_at_before_training(tmp_path):
    folder = write_all(tmp_path)
    write_tokens(folder / "speechless", 4, caption=["a mug", "", "a mug", "a mug"])
    made = recipe(folder)
    made = replace(made, data=replace(made.data, val_tokens=(folder / "speechless",)))
    with pytest.raises(InputError, match="neither a caption nor a label"):
        um3.run(made, tmp_path / "run")
    write_tokens(folder / "mine", 4, model="mine")
    with pytest.raises(InputError, match="called 'mine', but 'mine' is not known.*--tokenizer"):
        um3.run(recipe(folder, data=replace(made.data, tokens=(folder / "mine",))), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_by_the_command_line(tmp_path, run):
    """Two steps on the bundled tokenizer's ids; text alone has no name."""
    folder = write_all(tmp_path)
    id_hash = qlip.load("qlip-tiny").id_hash()
    write_tokens(folder / "tiny", 8, id_hash, (28, (8, 8)), "qlip-tiny", caption=["a mug"] * 8)
    out, text = tmp_path / "run", folder / "stories.jsonl"
    options = "--batch-size 2 --steps 2 --warmup-steps 1 --max-val 2 --device cpu --mix 1 1 3".split()
    words = ["train", "um3-tiny", "--base", folder / "base", "--tokens", folder / "tiny", *options, "--out", out]
    code, _, err = run(*words)
    assert code == 1 and "the mix has a weight for text" in err.replace("\n", " "), err
    code, _, err = run(*words, "--text", text, "--val-text", text, "--val-tokens", folder / "tiny")
    assert code == 0 and "qlip um3 draw" in err, err
    config = load(out / "model").config
    assert (config.tokenizer, config.id_hash, config.num_image_tokens) == ("qlip-tiny", id_hash, 256)
    record = json.loads((out / "recipe.json").read_text())
    assert record["num_samples"] == len(STORIES) + 8
