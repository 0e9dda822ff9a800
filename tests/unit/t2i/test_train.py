"""Batches, a step, and whole runs: parts, processes and interruptions change nothing."""

import json
import math
import os
import shutil
import socket
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.multiprocessing as mp
from tests.unit.t2i.conftest import CLASSES, small_t2i

import qlip
from qlip.data.journal import Journal
from qlip.data.token_dataset import TokenDataset
from qlip.data.token_file import TokenFormat, write_token_file
from qlip.errors import InputError
from qlip.recipes import t2i
from qlip.t2i.checkpoint import load
from qlip.t2i.condition import FeatureFiles, write_features
from qlip.t2i.data import batch_of, check_columns, held_out, training_batches
from qlip.t2i.train import T2ITask
from qlip.train.fit import FitConfig
from qlip.train.log import read_log
from qlip.train.optim import AdamWConfig
from qlip.train.parallel import ComputeConfig

FP32 = ComputeConfig(device="cpu", precision="fp32")
WIDTH = 12


class Reader:
    """A number of vectors that depends on the text alone."""

    name, width, num_text_tokens = "qlip", WIDTH, 5

    def __call__(self, texts, whole=False):
        seeds = [torch.Generator().manual_seed(sum(text.encode())) for text in texts]
        return [torch.randn(1 + len(text) % 5, WIDTH, generator=s) for text, s in zip(texts, seeds, strict=True)]


def write(
    folder: Path,
    count: int,
    num_tokens=(2, 3),
    bits=8,
    id_hash="0123456789abcdef",
    seed=0,
    words=("a cat", "two dogs"),
) -> Path:
    """Pictures of two kinds, each with its words; one has several captions."""
    rng = np.random.default_rng(seed)
    kinds = rng.integers(0, 2, count)
    tokens = np.where(kinds[:, None] == 1, 2**bits - 1, 5) ^ rng.integers(0, 2, (count, np.prod(num_tokens)))
    kept = {
        "caption": [words[kind] for kind in kinds],
        "captions": [[f"cat {i}", "kitten"] if kind == 0 else None for i, kind in enumerate(kinds)],
        "label": kinds.tolist(),
    }
    keys = [f"picture {i}" for i in range(count)]
    about = TokenFormat("qlip-tiny" if bits == 28 else "lab/tokenizer", id_hash, bits, num_tokens)
    write_token_file(folder / "tokens.parquet", about, keys, tokens, kept)
    return folder


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return TokenDataset(write(tmp_path_factory.mktemp("tokens"), 40), 4)


def test_batches_depend_on_seed_and_step_alone(dataset):
    def take(**options):
        return list(islice(training_batches(dataset, Reader(), 0.5, 8, 3, **options), 6))

    whole, later = take(), take(start_step=2)
    shares = [take(rank=rank, world_size=2) for rank in range(2)]
    for i, batch in enumerate(whole):
        for name in ("sub_tokens", "lengths", "dropped"):
            assert torch.equal(torch.cat([share[i][name] for share in shares]), batch[name]), name
        assert i < 2 or torch.equal(later[i - 2]["condition"], batch["condition"])
    dropped = torch.cat([batch["dropped"] for batch in whole])
    assert 10 < int(dropped.sum()) < 38
    assert len({int(length) for batch in whole for length in batch["lengths"]}) > 1


def test_captions_are_drawn_and_labels_given(dataset):
    rows = dataset.__getitems__(range(40))
    some = next(i for i, several in enumerate(rows["captions"]) if several)
    for choice, text in ((0.0, f"cat {some}"), (0.9, "kitten")):
        batch = batch_of(rows, Reader(), np.full(40, choice))
        found = batch["condition"][some, -int(batch["lengths"][some]) :]
        assert torch.equal(found, Reader()([text])[0])
    assert batch_of(rows, None)["condition"].flatten().tolist() == rows["label"]
    named = {
        "key": ["a", "b"],
        "label": [0, 1],
        "captions": [None, ["dogs"]],
        "sub_tokens": rows["sub_tokens"][:2],
    }
    said = [["a photo of a cat.", "cat"], ["a photo of a dog.", "dog"]]
    for choice, texts in ((0.0, ["a photo of a cat.", "dogs"]), (0.9, ["cat", "dogs"])):
        found = batch_of(named, Reader(), np.full(2, choice), said)
        for row, length, text in zip(found["condition"], found["lengths"], texts, strict=True):
            assert torch.equal(row[-int(length) :], Reader()([text])[0])
    with pytest.raises(InputError, match="b: label 5 has no name: give a file of 6 class names"):
        batch_of(named | {"label": [0, 5], "captions": [None, None]}, Reader(), None, said)
    rows["label"][3] = None
    with pytest.raises(InputError, match="picture 3: it has no label"):
        batch_of(rows, None)
    with pytest.raises(InputError, match="no label: tokenize again with --keep label"):
        check_columns(type("Rows", (), {"columns": ("key", "caption")}), None)


@pytest.mark.parametrize("optimizer", ("adamw", "muon"))
def test_parts_and_recomputation_change_nothing(dataset, optimizer):
    batch = next(training_batches(dataset, Reader(), 0.3, 8))
    settings = [{}, {"micro_batch_size": 2, "recompute": True}]
    tasks = [T2ITask(small_t2i(), AdamWConfig(optimizer), replace(FP32, **s), 8) for s in settings]
    first, second = (task.step(batch, 1) for task in tasks)
    for name, value in first.items():
        assert abs(float(value - second[name])) < 1e-5, name
    for (name, one), other in zip(tasks[0].model.named_parameters(), tasks[1].model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=1e-6, msg=name)
    matrix = "optimizer.lm.layers.0.mlp.up_proj.weight.momentum_buffer"
    assert (matrix in tasks[0].state_dict()) == (optimizer == "muon")


def test_held_out_bits_are_the_models_own(dataset):
    model = small_t2i()
    found = held_out(model, dataset, Reader(), 10, batch_size=4)
    batch = batch_of(dataset.__getitems__(range(0, 40, 4)), Reader())
    inputs = [batch[name] for name in ("condition", "lengths", "sub_tokens")]
    for name, flag in (("bits_per_image", False), ("bits_per_image_unconditional", True)):
        expected = model.bits_per_image(model(*inputs, torch.full((10,), flag)).item())
        assert abs(found[name] - expected) < 1e-4
    assert held_out(small_t2i(condition_dropout=0.0), dataset, Reader(), 3).keys() == {"bits_per_image"}


LEARNERS = [{}, {"bits": 2}, {"bits": 8, "embedding": "bits"}, CLASSES, {"head": "chain", "bits": 2}]


@pytest.mark.parametrize("changes", LEARNERS, ids=str)
def test_it_learns_what_the_words_say(tmp_path, changes):
    """Of raw 48 bits a picture has one of its own a token, and one that says its kind, as its words do."""
    model = small_t2i(**changes)
    reader = None if model.config.with_classes else Reader()
    train, val = (TokenDataset(write(tmp_path / str(seed), 200, seed=seed), model.config.bits) for seed in (1, 2))
    task = T2ITask(model, AdamWConfig(lr=1e-2), FP32, 20)
    for step, batch in enumerate(islice(training_batches(train, reader, 0.2, 20), 50), 1):
        task.step(batch, step)
    found = held_out(task.snapshot(), val, reader, 200)
    assert 5.9 < found["bits_per_image"] < 6.7
    assert 6.9 < found["bits_per_image_unconditional"] < 8.2


def recipe(tokens: Path, **changes) -> t2i.T2IRecipe:
    data = t2i.T2IDataConfig(tokens=(tokens,), val_tokens=(tokens,))
    fit = FitConfig(6, warmup_steps=1, log_every=1, eval_every=6, save_every=3, best=None)
    small = {"size": "tiny", "bits": 4, "condition": "classes", "num_classes": 2, "batch_size": 8, "dropout": 0.0}
    small |= {"data": data, "fit": fit, "device": "cpu", "precision": "fp32"}
    return t2i.T2IRecipe(**small | changes)


def losses(out: Path) -> torch.Tensor:
    return torch.tensor([entry["loss"] for entry in read_log(out / "log.jsonl") if "loss" in entry])


@pytest.mark.slow
def test_a_run_resumes_exactly(tmp_path):
    """What is random here are dropout, order and conditions."""
    tokens = write(tmp_path / "tokens", 40)
    whole = recipe(tokens, dropout=0.1)
    assert t2i.run(whole, tmp_path / "whole")
    short = replace(whole, fit=replace(whole.fit, steps=6, save_every=1))
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    for path in (tmp_path / "again" / "checkpoints").iterdir():
        if "0000003" not in path.name:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(tmp_path / "again" / "model")
    assert t2i.run(short, tmp_path / "again", resume=True)
    assert torch.equal(losses(tmp_path / "whole"), losses(tmp_path / "again"))
    one, other = (load(tmp_path / name / "model").state_dict() for name in ("whole", "again"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    with pytest.raises(InputError, match="another 'bits'"):
        t2i.run(recipe(tokens, bits=8), tmp_path / "again", resume=True)


def worker(index: int, port: int, tokens: Path, out: Path, sharding: str, head: str) -> None:
    os.environ |= {"RANK": str(index), "LOCAL_RANK": str(index), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    t2i.run(recipe(tokens, sharding=sharding, head=head), out / sharding)


def test_a_step_that_is_not_finite_can_be_done_again(tmp_path, run):
    tokens, out = write(tmp_path / "tokens", 40), tmp_path / "run"
    exploding = recipe(tokens, task=AdamWConfig(lr=1e30, grad_clip=math.inf))
    with pytest.raises(InputError, match=r"step 2: grad_norm.* not finite.*--replay"):
        t2i.run(exploding, out)
    dump = out / "nonfinite" / "step-0000002"
    code, said, err = run("train", out / "recipe.json", "--replay", dump)
    assert code == 0, err
    assert json.loads(said) == json.loads((dump / "report-0.json").read_text())["values"]
    with pytest.raises(InputError, match="not a step that a run left"):
        t2i.do_again(exploding, tmp_path / "nowhere")


@pytest.mark.slow
@pytest.mark.parametrize("head", ["sequence", "chain"])
def test_two_processes_learn_what_one_learns(tmp_path, head):
    tokens = write(tmp_path / "tokens", 40)
    t2i.run(recipe(tokens, head=head), tmp_path / "alone")
    for sharding in ("ddp", "fsdp"):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        mp.spawn(worker, (port, tokens, tmp_path, sharding, head), nprocs=2)
        found, expected = losses(tmp_path / sharding), losses(tmp_path / "alone")
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_other_ids_and_missing_words_are_refused(tmp_path):
    tokens = write(tmp_path / "other", 8, (8, 8), 28)
    with pytest.raises(InputError, match="ids 0123456789abcdef of 'qlip-tiny', but 'qlip-tiny' makes"):
        t2i.run(recipe(tokens, condition="qlip", num_classes=0), tmp_path / "run")
    with pytest.raises(InputError, match="name token files or folders with --tokens"):
        t2i.run(recipe(tokens, data=t2i.T2IDataConfig()), tmp_path / "run")
    few = write(tmp_path / "few", 8)
    with pytest.raises(InputError, match="picture 0: label 1 is no class of the model, which has 1"):
        data = t2i.T2IDataConfig(tokens=(few,), val_tokens=(few,))
        t2i.run(recipe(few, num_classes=1, data=data), tmp_path / "run")
    with pytest.raises(InputError, match="bits=5 does not divide"):
        t2i.run(recipe(tokens, bits=5), tmp_path / "run")
    with pytest.raises(InputError, match="num_classes 0"):
        t2i.run(recipe(few, num_classes=0), tmp_path / "run")
    with pytest.raises(InputError, match="features are of texts"):
        data = t2i.T2IDataConfig(tokens=(tokens,), features=(tokens,))
        t2i.run(recipe(tokens, data=data), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_on_the_bundled_tokenizer(tmp_path, run):
    """By the command line: two steps, a record that reads back, a model that knows its tokenizer, and draws."""
    id_hash = qlip.load("qlip-tiny").id_hash()
    tokens = write(tmp_path / "tokens", 8, (8, 8), 28, id_hash)
    options = "--batch-size 4 --steps 2 --warmup-steps 1 --max-val 4 --device cpu".split()
    out = tmp_path / "run"
    code, _, err = run("train", "t2i-tiny", "--tokens", tokens, "--val-tokens", tokens, *options, "--out", out)
    assert code == 0 and "qlip generate" in err, err
    evaluated = [entry for entry in read_log(out / "log.jsonl") if "eval/bits_per_image" in entry]
    assert 1000 < evaluated[-1]["eval/bits_per_image"] < 1792.1
    config = load(out / "model").config
    assert (config.tokenizer, config.id_hash, config.condition) == ("qlip-tiny", id_hash, "qlip")
    assert t2i.is_recipe(str(out / "recipe.json"))
    assert t2i.load_recipe(str(out / "recipe.json")).batch_size == 4
    picture = qlip.load_t2i(out / "model").generate("a cat", cfg=2.0)[0]
    assert picture.size == (64, 64)


def test_features_computed_before_train_as_those_computed_meanwhile(tmp_path, run):
    id_hash = qlip.load("qlip-tiny").id_hash()
    tokens = write(tmp_path / "tokens", 8, (8, 8), 28, id_hash)
    code, _, err = run("features", tokens, "--condition", "qlip", "--dtype", "float32", "--out", tmp_path / "f")
    assert code == 0 and "features of 8 texts" in err.replace("\n", " "), err
    made = recipe(tokens, condition="qlip", num_classes=0, fit=FitConfig(2, warmup_steps=0, best=None))
    before = replace(made, data=replace(made.data, features=(tmp_path / "f",)))
    for name, one in (("meanwhile", made), ("before", before)):
        assert t2i.run(one, tmp_path / name)
    one, other = (load(tmp_path / name / "model") for name in ("meanwhile", "before"))
    assert one.config == other.config
    torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=1e-4)
    other = write(tmp_path / "held-out", 8, (8, 8), 28, id_hash, words=("a fish", "three dogs"))
    with pytest.raises(InputError, match="no feature file holds"):
        t2i.run(replace(before, data=replace(before.data, val_tokens=(other,))), tmp_path / "other")
    with pytest.raises(InputError, match="features are of 'qlip', and condition is 'google/flan-t5-xl'"):
        t2i.run(replace(before, condition="google/flan-t5-xl"), tmp_path / "other")


def spoilt(folder: Path, **columns) -> TokenDataset:
    """Forty images, of which the columns' values replace the words."""
    write(folder, 40)
    table = pq.read_table(folder / "tokens.parquet")
    for name, values in ({"captions": [None] * 40} | columns).items():
        place = table.schema.get_field_index(name)
        array = values if isinstance(values, pa.Array) else pa.array(values, table.schema.field(name).type)
        table = table.set_column(place, table.schema.field(name), array)
    pq.write_table(table, folder / "tokens.parquet")
    return TokenDataset(folder, 4)


def not_utf8() -> pa.Array:
    """Forty strings, the third of which is no UTF-8."""
    texts = [b"a cat", b"two dogs", b"\xff cat", *[b"a cat"] * 37]
    offsets = np.cumsum([0, *map(len, texts)]).astype(np.int32)
    return pa.StringArray.from_buffers(40, pa.py_buffer(offsets), pa.py_buffer(b"".join(texts)))


@pytest.mark.parametrize(
    ("columns", "reader", "complaint"),
    (
        ({"caption": [None, " ", "", *["a cat"] * 37]}, Reader(), "no words"),
        ({"caption": not_utf8()}, Reader(), "caption is not UTF-8"),
        ({"label": [9, -1, None, *[3] * 37]}, None, "label"),
    ),
)
def test_rows_that_cannot_be_used_are_replaced_and_listed(tmp_path, columns, reader, complaint):
    dataset = spoilt(tmp_path / "tokens", **columns)
    (tmp_path / "run").mkdir()

    def run(start, journal):
        return training_batches(dataset, reader, 0.1, 8, start_step=start, num_classes=7, journal=journal)

    first, again = (list(islice(run(0, Journal(dataset, 0.1, tmp_path / "run")), 15)) for _ in range(2))
    resumed = next(run(14, Journal(dataset, 0.1, tmp_path / "run")))
    assert all(a["keys"] == b["keys"] for a, b in zip(first, again, strict=True))
    assert resumed["keys"] == first[14]["keys"] and torch.equal(resumed["condition"], first[14]["condition"])
    listed = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    bad = {entry["key"] for entry in listed}
    assert len(bad) == len(listed) == (1 if isinstance(columns.get("caption"), pa.Array) else 3)
    assert all(complaint in entry["reason"] for entry in listed)
    assert not bad & {key for batch in first for key in batch["keys"]}
    with pytest.raises(InputError, match="more than the share 0"):
        list(islice(run(0, None), 15))


def test_a_run_of_which_too_much_is_skipped_names_its_option(tmp_path):
    spoilt(tmp_path / "tokens", label=[9, -1, None, *[3] * 37])
    data = t2i.T2IDataConfig(tokens=(tmp_path / "tokens",))
    with pytest.raises(InputError, match="more than the share 0.01: .* or raise --max-skipped-share$"):
        t2i.run(recipe(tmp_path / "tokens", num_classes=7, data=data), tmp_path / "run")


def test_captions_without_features_are_skipped_too(tmp_path):
    dataset = spoilt(tmp_path / "tokens", caption=["a bird", *["a cat"] * 39])
    write_features(tmp_path / "f.safetensors", Reader(), ["a cat"])
    files = FeatureFiles([tmp_path / "f.safetensors"])
    assert files.holds("a cat") and not files.holds("a bird")
    found = training_batches(dataset, files, 0.0, 8, journal=Journal(dataset, 0.1, tmp_path))
    assert "picture 0" not in {key for batch in islice(found, 5) for key in batch["keys"]}
    assert "no feature file holds its caption 'a bird'" in (tmp_path / "skipped.jsonl").read_text()
