"""A run is safe to leave alone: real processes of the command line, killed, stopped, starved and misled."""

import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import LABELS, encoded

import qlip
from qlip import cli
from qlip.data.loader import order
from qlip.train.checkpoint import latest_checkpoint, read_tensors

# Forked from a process that has everything imported, a run starts in a second; `test_the_command_itself` and
# `test_torchrun_itself` do without.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    "qlip.cli qlip.recipes.tiny qlip.recipes.tiny_stage2 qlip.recipes.calibrate qlip.train.plot matplotlib.figure "
    "matplotlib.backends.backend_agg torch._dynamo torch.distributed.fsdp torch.distributed.checkpoint "
    "pyarrow.dataset".split()
)
SPEED = {"images_per_s", "tflops_per_s", "memory_gib"}
STEPS = 12
SMALL = (
    f"--no-compile --device cpu --precision fp32 --batch-size 8 --steps {STEPS} --warmup-steps 1 --log-every 1 "
    "--eval-every 6 --save-every 2 --model.vision.hidden-size 32 --model.vision.num-hidden-layers 1 "
    "--model.vision.intermediate-size 48 --model.vision.image-size 32 --model.vision.num-attention-heads 2 "
    "--model.decoder.hidden-size 32 --model.decoder.num-hidden-layers 1 --model.decoder.intermediate-size 48 "
    "--model.decoder.image-size 32 --model.decoder.num-attention-heads 2 --model.text.hidden-size 32 "
    "--model.text.num-hidden-layers 1 --model.text.intermediate-size 48 --model.text.num-attention-heads 2"
).split()
STAGE2_STEPS = 8
STAGE2 = (
    f"--device cpu --batch-size 8 --steps {STAGE2_STEPS} --warmup-steps 1 --log-every 1 --eval-every 4 "
    "--save-every 2 --perceptual-weight 0 --adversary stylegan2 --discriminator-width 32 --r1-every 3 --ema 0.9 "
    "--no-freeze-ids"
).split()


def command(arguments, environment, said, largest_file):
    """What a process does: `qlip ARGUMENTS…`, its words in a file."""
    file = os.open(said, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
    if largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    sys.argv = ["qlip", *(str(a).replace("{rank}", environment.get("RANK", "0")) for a in arguments)]
    cli.main()


class Running:
    """`qlip ARGUMENTS…` in one process, or in several that find each other as those of `torchrun` do.

    An argument's `{rank}` is the process's number.
    """

    def __init__(self, folder, *arguments, processes=1, largest_file=None):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
        several = place | {"WORLD_SIZE": str(processes)}
        environments = [several | {"RANK": str(r), "LOCAL_RANK": str(r)} for r in range(processes)]
        name = time.monotonic_ns()
        self.said = [Path(folder) / f"said-{name}-{rank}" for rank in range(processes)]
        self.processes = [
            PROCESSES.Process(target=command, args=(arguments, env if processes > 1 else {}, said, largest_file))
            for env, said in zip(environments, self.said, strict=True)
        ]
        for process in self.processes:
            process.start()

    def signal(self, number, *ranks):
        for rank in ranks or range(len(self.processes)):
            if self.processes[rank].is_alive():
                os.kill(self.processes[rank].pid, number)

    def wait(self, seconds=90):
        """Exit code, the same of all processes, and what each said."""
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0, end - time.monotonic()))
        alive = [process.is_alive() for process in self.processes]
        for process in self.processes:
            process.kill()
        words = [path.read_text() for path in self.said]
        assert not any(alive), f"hanging: {alive}, {words}"
        (code,) = {process.exitcode for process in self.processes}
        assert "Traceback" not in "".join(words), words
        return code, words

    def until(self, there, seconds=60):
        """Wait for something while it runs."""
        end = time.monotonic() + seconds
        while not there() and self.processes[0].is_alive():
            assert time.monotonic() < end, "nothing happens"
            time.sleep(0.0005)


def entries(run, speed=False):
    """The log but for the speed."""
    path = run / "log.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{k: v for k, v in entry.items() if speed or k not in SPEED} for entry in found]


def last_step(run):
    return max((entry["step"] for entry in entries(run)), default=0)


def losses(run):
    return {entry["step"]: entry["loss"] for entry in entries(run) if "loss" in entry}


def tensors(run):
    return read_tensors(latest_checkpoint(run), "")


def assert_same(run, other):
    """Bit for bit: every line of the log, every tensor of the last checkpoint, and the model."""
    assert entries(run) == entries(other)
    for ours, theirs in (
        (tensors(run), tensors(other)),
        (load_file(run / "model" / "model.safetensors"), load_file(other / "model" / "model.safetensors")),
    ):
        assert ours.keys() == theirs.keys()
        different = [name for name, tensor in ours.items() if not tensor.equal(theirs[name])]
        assert not different


def assert_close(run, other):
    """Measured: 3e-7 and 9e-4; Adam moves by a share of the rate (1e-3) also where a gradient is but rounding."""
    ours, theirs = losses(run), losses(other)
    assert ours.keys() == theirs.keys()
    loss = max(abs(ours[step] - loss) / abs(loss) for step, loss in theirs.items())
    tensor, expected = (load_file(r / "model" / "model.safetensors") for r in (run, other))
    weight = max(float((tensor[name] - value).abs().max()) for name, value in expected.items())
    print(f"largest differences: of a loss {loss:.1e} of it, of a weight {weight:.1e}")
    assert loss < 1e-5 and weight < 5e-3


LOGGED = ("step ", "INFO     training on ", "INFO     precision: ")


def without_log(words):
    """The lines that a process said, without those that every run logs."""
    return [line for line in words.splitlines() if not line.startswith(LOGGED)]


def one_line(words):
    """The first process's last line; the others have said nothing."""
    assert not any(words[1:]), words
    lines = without_log(words[0])
    assert len(lines) == 1, words
    return lines[0]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with train.parquet (64 rows), val.parquet (16 rows) and classes.json: coloured squares."""
    folder = tmp_path_factory.mktemp("training")
    for name, count, offset in (("train", 64, 0), ("val", 16, 1000)):
        rows = [{"bytes": encoded(i % 4, offset + i), "path": f"{i}.png"} for i in range(count)]
        labels = pa.array([i % 4 for i in range(count)], pa.int16())
        pq.write_table(pa.table({"image": rows, "label": labels}), folder / f"{name}.parquet")
    (folder / "classes.json").write_text(json.dumps([{"names": [label]} for label in LABELS]))
    return folder


@pytest.fixture(scope="module")
def files(place):
    return ["--data.train", place / "train.parquet", "--data.val", place / "val.parquet"]


@pytest.fixture(scope="module")
def stage1(files, place):
    """`qlip train tiny` of 20 small steps."""
    return ["train", "tiny", *files, "--data.classes", place / "classes.json", *SMALL]


@pytest.fixture(scope="module")
def whole(place, stage1):
    """A run that nothing interrupted."""
    code, words = Running(place, *stage1, "--out", place / "whole").wait()
    assert code == 0, words
    return place / "whole"


@pytest.fixture(scope="module")
def stage2(files, whole):
    return ["train", "tiny-stage2", *files, "--tokenizer", whole / "model", *STAGE2]


@pytest.fixture(scope="module")
def stopped(place, stage1):
    """A run that SIGTERM stopped after some steps."""
    running = Running(place, *stage1, "--out", place / "stopped")
    running.until(lambda: last_step(place / "stopped") >= 5)
    running.signal(signal.SIGTERM)
    code, words = running.wait()
    assert code == 0 and "this resumes it: qlip train" in one_line(words)
    return place / "stopped"


@pytest.fixture(scope="module")
def stopped_shards(place, stage1):
    """A run of two processes with FSDP, that SIGTERM to the second one stopped."""
    return stop_one_of_two(place, stage1, "fsdp")


def stop_one_of_two(place, stage1, sharding):
    out = place / f"stopped-{sharding}"
    running = Running(place, *stage1, "--sharding", sharding, "--out", out, processes=2)
    running.until(lambda: last_step(out) >= 5)
    running.signal(signal.SIGTERM, 1)
    code, words = running.wait()
    assert code == 0 and "this resumes it: qlip train" in one_line(words)
    return out


def resumed(run, tmp_path, arguments, processes=1, **limits):
    """A copy of a stopped run, gone on with."""
    out = tmp_path / "resumed"
    shutil.copytree(run, out)
    return out, *Running(tmp_path, *arguments, "--out", out, "--resume", processes=processes, **limits).wait()


# Killed


@pytest.mark.parametrize(
    ("name", "kills"), [("stage1", 4), ("stage2", 1), pytest.param("gradient", 1, marks=pytest.mark.slow)]
)
def test_a_run_killed_at_any_moment_is_the_whole_run(request, place, tmp_path, name, kills):
    """SIGKILL at random moments, in a save and at the end: losses, evaluations and weights are the same bits."""
    arguments = request.getfixturevalue("stage2" if name == "stage2" else "stage1")
    steps = STAGE2_STEPS if name == "stage2" else STEPS
    if name == "gradient":
        arguments = [*arguments, "--balance", "gradient", "--balance-every", 3, "--precision", "bf16"]
    if name == "stage1":
        expected = request.getfixturevalue("whole")
    else:
        expected = tmp_path / "expected"
        assert Running(tmp_path, *arguments, "--out", expected).wait()[0] == 0
    seed = random.randrange(2**32)
    print(f"seed of the moments: {seed}")
    chance, out = random.Random(seed), tmp_path / "run"

    def unfinished_save():
        return any((out / "checkpoints").glob(".step-*.unfinished"))

    for kill in range(kills):
        running = Running(tmp_path, *arguments, "--out", out, "--resume")
        if kill == 0:
            running.until(lambda: last_step(out) > 2)
            running.until(unfinished_save)
        elif kill == 3:
            running.until(lambda: last_step(out) == steps)  # evaluation, the last checkpoint, the model
            time.sleep(chance.uniform(0, 1))
        else:
            target = min(last_step(out) + chance.randrange(1, steps // 3), steps)
            time.sleep(chance.uniform(0, 1))  # the log may still be the one of before
            running.until(lambda target=target: last_step(out) >= target)
            time.sleep(chance.uniform(0, 0.1))
        running.signal(signal.SIGKILL)
        running.processes[0].join()
        left = sorted(path.name for path in (out / "checkpoints").iterdir())
        print(f"kill {kill}: the log ends at step {last_step(out)}; {left}")
    code, words = Running(tmp_path, *arguments, "--out", out, "--resume").wait()
    assert code == 0, words
    assert_same(out, expected)


# Stopped


def test_sigterm_loses_nothing(stopped, whole, stage1, tmp_path):
    step = last_step(stopped)
    assert 5 <= step < STEPS and latest_checkpoint(stopped).name == f"step-{step:07d}"
    assert entries(stopped) == [entry for entry in entries(whole) if entry["step"] <= step]
    out, code, words = resumed(stopped, tmp_path, stage1)
    assert code == 0, words
    assert_same(out, whole)
    segments = json.loads((out / "recipe.json").read_text())["segments"]
    assert [segment["first_step"] for segment in segments] == [1, step + 1]


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_two_processes_lose_nothing(request, sharding, stage1, place, tmp_path):
    """SIGTERM to one of them stops both; resumed as two they are two that went through."""
    arguments = [*stage1, "--sharding", sharding]
    if sharding == "fsdp":
        stopped = request.getfixturevalue("stopped_shards")
    else:
        stopped = stop_one_of_two(place, stage1, sharding)
    assert latest_checkpoint(stopped).name == f"step-{last_step(stopped):07d}"
    expected = tmp_path / "expected"
    assert Running(tmp_path, *arguments, "--out", expected, processes=2).wait()[0] == 0
    out, code, words = resumed(stopped, tmp_path, arguments, processes=2)
    assert code == 0, words
    assert_same(out, expected)


@pytest.mark.slow
def test_sigterm_stops_a_run_of_stage_2(stage2, tmp_path):
    running = Running(tmp_path, *stage2, "--out", tmp_path / "run", processes=2)
    running.until(lambda: last_step(tmp_path / "run") >= 3)
    running.signal(signal.SIGTERM)
    code, words = running.wait()
    assert code == 0 and "this resumes it: qlip train" in one_line(words)
    assert latest_checkpoint(tmp_path / "run").name == f"step-{last_step(tmp_path / 'run'):07d}"


# Another number of processes


@pytest.mark.parametrize("sharding", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_one_process_goes_on_as_two(stopped, whole, stage1, tmp_path, sharding):
    out, code, words = resumed(stopped, tmp_path, [*stage1, "--sharding", sharding], processes=2)
    assert code == 0, words
    assert_close(out, whole)
    assert [s["world_size"] for s in json.loads((out / "recipe.json").read_text())["segments"]] == [1, 2]


def test_two_processes_go_on_as_one(stopped_shards, whole, stage1, tmp_path):
    out, code, words = resumed(stopped_shards, tmp_path, stage1)
    assert code == 0, words
    assert_close(out, whole)


# No room


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_no_room_for_a_checkpoint(stopped, whole, stage1, tmp_path, processes):
    arguments = [*stage1, "--save-every", 1, "--eval-every", STEPS]
    out, code, words = resumed(stopped, tmp_path, arguments, processes, largest_file=100_000)
    assert code == 1 and "checkpoints cannot be written" in one_line(words) and "--resume" in one_line(words)
    assert latest_checkpoint(out).name == latest_checkpoint(stopped).name
    assert not list((out / "checkpoints").glob(".*"))
    if processes == 1:
        code, words = Running(tmp_path, *stage1, "--out", out, "--resume").wait()
        assert code == 0, words
        assert_same(out, whole)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_folder_that_cannot_be(stage1, place, tmp_path, processes):
    out = place / "classes.json" / "run"
    code, words = Running(tmp_path, *stage1, "--out", out, processes=processes).wait()
    assert code == 1 and f"{out}/recipe.json cannot be written (Not a directory)" in one_line(words)


def test_a_picture_that_only_the_second_process_sees(stage1, place, tmp_path):
    table = pq.read_table(place / "train.parquet").to_pylist()
    third = list(islice(order(64, 8, seed=0), 3))[2]
    row = third[5][1]
    table[row]["image"]["bytes"] = b"no picture"
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "train.parquet")
    arguments = [*stage1, "--data.train", tmp_path / "train.parquet", "--out", tmp_path / "run"]
    code, words = Running(tmp_path, *arguments, processes=2).wait()
    assert code == 1 and f"train.parquet:{row}: " in one_line(words)


def test_data_that_only_the_second_process_misses(stage1, place, tmp_path):
    (tmp_path / "0.parquet").symlink_to(place / "train.parquet")
    arguments = [*stage1, "--data.train", tmp_path / "{rank}.parquet", "--out", tmp_path / "run"]
    code, words = Running(tmp_path, *arguments, processes=2).wait()
    assert code == 1 and f"{tmp_path}/1.parquet: no such file or folder" in one_line(words)
    assert not (tmp_path / "run").exists()


# Not finite

EXPLODING = ("--lr", "1e30", "--grad-clip", "inf")


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_loss_that_is_not_finite_can_be_looked_at(stage1, tmp_path, processes):
    run = tmp_path / "run"
    arguments = [*stage1, *EXPLODING, "--out", run]
    code, words = Running(tmp_path, *arguments, processes=processes).wait()
    dump = run / "nonfinite" / "step-0000002"
    said = one_line(words)
    assert code == 1 and said.startswith("qlip: step 2: ") and "reconstruction, alignment" in said
    assert f"--replay {dump}" in said and "--skip-nonfinite" in said
    keys = []
    for rank in range(processes):
        report = json.loads((dump / f"report-{rank}.json").read_text())
        batch = load_file(dump / f"batch-{rank}.safetensors")
        keys += report["keys"]
        assert report["step"] == 2 and report["world_size"] == processes
        assert not math.isfinite(float(report["values"]["reconstruction"]))
        pixels = batch["pixel_values"]
        assert pixels.shape == (8 // processes, 3, 32, 32) and pixels.isfinite().all()
    assert len(set(keys)) == 8 and keys[0] in said
    before = tensors(dump)
    assert before.keys() >= {"model.logit_scale", "optimizer.logit_scale.exp_avg", "balance.alignment"}
    assert before["optimizer.logit_scale.step"] == 1  # nothing had moved

    code, words = Running(tmp_path, *arguments, "--replay", dump, processes=processes).wait()
    values = [json.loads("\n".join(without_log(w)), parse_constant=pytest.fail) for w in words if w]
    assert code == 0 and values[0] == json.loads((dump / "report-0.json").read_text())["values"]

    code, words = Running(tmp_path, *arguments, "--replay", dump, processes=3 - processes).wait()
    assert code == 1 and f"is of {processes} processes" in one_line(words)


def test_steps_that_are_not_finite_are_passed_over(stage1, tmp_path):
    arguments = [*stage1, *EXPLODING, "--out", tmp_path / "run", "--skip-nonfinite", 2]
    code, words = Running(tmp_path, *arguments).wait()
    assert code == 1 and "qlip: step 4: " in words[0] and "step 3 is not finite and was passed over" in words[0]
    assert [(e["step"], e.get("skipped")) for e in entries(tmp_path / "run")] == [(1, None), (2, 1), (3, 1)]
    assert [path.name for path in (tmp_path / "run" / "nonfinite").iterdir()] == ["step-0000004"]


# Wrong from the start


@pytest.fixture
def call(run):
    """`qlip ARGUMENTS…` here; gives exit code and stderr."""
    return lambda *arguments: run(*arguments)[::2]


WRONG = {
    "both 0: nothing would be learnt": "--reconstruction-weight 0 --alignment-weight 0",
    "set commitment_weight to 0 too": "--reconstruction-weight 0",
    "quantize is False: set quantizer_weight and commitment_weight to 0": "--no-quantize",
    "write it with `qlip calibrate`": "--balance calibrated",
    "classes.json: not a calibration": "--balance calibrated --calibration {place}/classes.json",
    "there is one process: start several with torchrun": "--sharding fsdp",
    "no training data: name files or folders": "--data.train",
    "nowhere: no such file or folder": "--data.train {place}/nowhere",
    "classes.json: not a source of data": "--data.val {place}/classes.json",
    "not a readable JSON file of class names": "--data.classes {place}/nowhere",
    "--micro-batch-size 3 does not divide the 8 samples": "--micro-batch-size 3",
    "--reconstruct-every 3 does not divide the 8 samples": "--reconstruct-every 3",
    "64 samples do not fill a batch of 100: lower --batch-size": "--batch-size 100",
    "--batch-size is 1: contrast needs at least 2": "--batch-size 1",
    "--log-to wandb needs wandb: pip install": "--log-to wandb",
    "lr is nan: it must be above 0": "--lr nan",
    "--warmup-steps 12 must be less than steps 12": "--warmup-steps 12",
    "seed is -1: it must be 0 or more": "--seed -1",
    "set commitment_weight to 0": "--model.decoder.hidden-size 64",
    "device='abacus' is not to be had": "--device abacus",
    "nowhere has neither tokenizer.json nor": "--vocabulary {place}/nowhere",
    "'{place}/nowhere' is missing": "--init.vision {place}/nowhere",
    "nowhere: not a step that a run left": "--replay {place}/nowhere",
}


@pytest.mark.parametrize(("message", "options"), WRONG.items())
def test_what_is_wrong_is_said_before_anything_is_written(
    call, place, stage1, tmp_path, monkeypatch, message, options
):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    code, said = call(*stage1, *options.format(place=place).split(), "--out", tmp_path / "run")
    assert code == 1 and message.format(place=place) in said and len(said.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("message", "options"),
    {
        "Unrecognized options: --frobnicate": "--frobnicate 1",
        "Error parsing --steps": "--steps many",
        "'comet'": "--log-to comet",
        "templates has 'a photo' without {}": "--data.templates a\u00a0photo",
        "crop_scale is (0.9, 0.1)": "--data.crop-scale 0.9 0.1",
        "num_workers is -1": "--data.num-workers -1",
        "max_skipped_share is 1.0": "--data.max-skipped-share 1",
        "is not a multiple of": "--model.vision.num-attention-heads 5",
    }.items(),
)
def test_options_that_cannot_be_are_refused_as_such(call, stage1, tmp_path, message, options):
    code, said = call(*stage1, *(o.replace("\u00a0", " ") for o in options.split(" ")), "--out", tmp_path / "run")
    assert code == 2 and " ".join(message.split()) in " ".join(said.replace("│", "").split())
    assert not (tmp_path / "run").exists()


def test_what_is_wrong_with_stage_2(call, stage2, tmp_path):
    for message, options in {
        "'nothing' is not known: use a bundled tokenizer": ["--tokenizer", "nothing"],
        "stage 2 needs a tokenizer of stage 1": ["--tokenizer", ""],
        f"{tmp_path}' has no model.safetensors": ["--tokenizer", tmp_path],
        "nothing tells what to rebuild": ["--reconstruction-weight", 0],
        "use a multiple of 32": ["--discriminator-width", 5],
        "ema is 1.0: it must be in [0, 1)": ["--ema", 1],
        "only recipes of stage 1": None,
    }.items():
        arguments = ["calibrate", *stage2[1:]] if options is None else [*stage2, *options]
        code, said = call(*arguments, "--out", tmp_path / "run")
        assert code == 1 and message in said and len(without_log(said)) == 1, message
    assert not (tmp_path / "run").exists()


def test_a_recipe_file_with_a_field_that_there_is_not(call, whole, tmp_path):
    record = json.loads((whole / "recipe.json").read_text())
    record["recipe"]["task"]["frobnicate"] = 1
    (tmp_path / "recipe.json").write_text(json.dumps(record))
    code, said = call("train", tmp_path / "recipe.json", "--out", tmp_path / "run")
    assert code == 1 and "Stage1Config has no field 'frobnicate'" in said and len(said.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_what_may_change_when_a_run_is_resumed(call, stopped, stage1, tmp_path):
    shutil.copytree(stopped, tmp_path / "run")
    before = entries(tmp_path / "run", speed=True)
    for name, options in {
        "task.lr": ["--lr", 0.01],
        "model.vision.rope": ["--model.vision.no-rope"],
        "data.crop_scale": ["--data.crop-scale", 0.5, 1],
        "batch_size": ["--batch-size", 16],
    }.items():
        code, said = call(*stage1, *options, "--out", tmp_path / "run", "--resume")
        assert code == 1 and f"another {name!r}" in said and "recipe.json" in said, said
    code, said = call(*stage1, "--out", tmp_path / "run")
    assert code == 1 and "already holds a run: go on with --resume" in said
    assert entries(tmp_path / "run", speed=True) == before
    options = ["--steps", last_step(tmp_path / "run") + 1, "--micro-batch-size", 4, "--data.num-workers", 0]
    code, said = call(*stage1, *options, "--out", tmp_path / "run", "--resume")
    assert code == 0, said


def test_a_batch_that_three_processes_cannot_share(stage1, tmp_path):
    code, words = Running(tmp_path, *stage1, "--out", tmp_path / "run", processes=3).wait()
    assert code == 1 and "--batch-size 8 is not divisible by the 3 processes" in one_line(words)
    assert not (tmp_path / "run").exists()


# Exported


def test_export_from_a_run_that_was_stopped(call, stopped, tmp_path):
    code, said = call("export", stopped, "--out", tmp_path / "model")
    assert code == 0 and f"step {last_step(stopped)} is in" in said
    (file,) = latest_checkpoint(stopped).glob("rank-*.safetensors")
    check_export(tmp_path / "model", load_file(file), "model.")
    assert call("export", stopped, "--image-size", 32, 64, "--out", tmp_path / "wide")[0] == 0
    assert qlip.load(tmp_path / "wide").config.size == (32, 64)
    code, said = call("export", stopped, "--revision", "v1", "--out", tmp_path / "no")
    assert code == 1 and "no Hugging Face repository, leave it out" in said
    assert call("verify", tmp_path / "model")[0] in (0, 1)


def test_export_of_the_best_checkpoint(call, whole, tmp_path):
    scores = {entry["step"]: entry["eval/psnr"] for entry in entries(whole) if "eval/psnr" in entry}
    best = max(scores, key=scores.get)
    code, said = call("export", whole, "--out", tmp_path / "model", "--checkpoint", "best")
    assert code == 0 and f"step {best} is in" in said
    (file,) = (whole / "checkpoints" / f"step-{best:07d}").glob("rank-*.safetensors")
    check_export(tmp_path / "model", load_file(file), "model.")
    code, said = call("export", whole, "--out", tmp_path / "no", "--checkpoint", "best", "--best", "fid")
    assert code == 1 and "no checkpoint with an evaluation of 'fid'" in said and not (tmp_path / "no").exists()


def test_export_from_shards(call, stopped_shards, tmp_path):
    """What two processes hold, put together by hand along its first dimension, is the tokenizer."""
    code, said = call("export", stopped_shards, "--out", tmp_path / "model")
    assert code == 0, said
    ranks = [load_file(f) for f in sorted(latest_checkpoint(stopped_shards).glob("rank-*.safetensors"))]
    names = ranks[0].keys() | ranks[1].keys()
    assert len(ranks) == 2 and ranks[0].keys() & ranks[1].keys()
    whole = {name: torch.cat([rank[name] for rank in ranks if name in rank]) for name in names}
    check_export(tmp_path / "model", whole, "model.")


def test_export_of_stage_2_has_the_averaged_weights(call, stage2, tmp_path):
    code, words = Running(tmp_path, *stage2, "--steps", 3, "--warmup-steps", 0, "--out", tmp_path / "run").wait()
    assert code == 0, words
    assert call("export", tmp_path / "run", "--out", tmp_path / "model")[0] == 0
    (file,) = latest_checkpoint(tmp_path / "run").glob("rank-*.safetensors")
    saved = load_file(file)
    averages = {name for name in saved if name.startswith("ema.")}
    assert any(not saved[name].equal(saved[name.replace("ema.", "model.", 1)]) for name in averages)
    exported = check_export(tmp_path / "model", saved, "model.", "ema.")
    left_by_the_run = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert all(tensor.equal(exported[name]) for name, tensor in left_by_the_run.items())


def check_export(folder, saved, *prefixes):
    """`qlip.load` reads it, and it has the weights; a later prefix's stand in for an earlier one's."""
    weights = {name.removeprefix(p): t for p in prefixes for name, t in saved.items() if name.startswith(p)}
    exported = qlip.load(folder).state_dict()
    assert exported.keys() == weights.keys()
    different = [name for name, tensor in exported.items() if not tensor.equal(weights[name].view_as(tensor))]
    assert not different
    return exported


# Calibrated


def test_a_calibration_that_cannot_be_ends_before_its_first_run(call, stage1, tmp_path):
    options = ["--reconstruction-weight", 0, "--commitment-weight", 0, "--out", tmp_path / "calibration"]
    options += ["--reconstruct-every", 1, "--drop-tokens", 0]
    code, said = call("calibrate", *stage1[1:], *options)
    assert code == 1 and "nothing would be learnt" in said and not (tmp_path / "calibration").exists()


def test_calibration_interrupted_and_used(call, stage1, place, tmp_path):
    out = tmp_path / "calibration"
    steps = 6
    arguments = ["calibrate", *stage1[1:], "--steps", steps, "--out", out]
    running = Running(tmp_path, *arguments)
    running.until(lambda: last_step(out / "reconstruction") >= 3)
    running.signal(signal.SIGTERM)
    code, words = running.wait()
    assert code == 0 and "this resumes it: qlip calibrate" in words[0]
    assert last_step(out / "alignment") == steps and not (out / "calibration.json").exists()
    code, words = Running(tmp_path, *arguments).wait()
    assert code == 1 and "go on with --resume" in one_line(words)
    code, words = Running(tmp_path, *arguments, "--resume").wait()
    assert code == 0, words
    assert (out / "calibration.png").stat().st_size > 1000
    ends = {}
    for loss, others in (("alignment", {"reconstruction"}), ("reconstruction", {"alignment"})):
        logged = [entry for entry in entries(out / loss) if "loss" in entry]
        assert len(logged) == steps and not any(others & entry.keys() for entry in logged)
        ends[loss] = logged[-1][loss]  # its last tenth
    ratio = json.loads((out / "calibration.json").read_text())["ratio"]
    assert ratio == pytest.approx(ends["alignment"] / ends["reconstruction"])

    options = ["--balance", "calibrated", "--calibration", out / "calibration.json", "--steps", 2]
    code, said = call(*stage1, *options, "--out", tmp_path / "run")
    assert code == 0, said
    first = entries(tmp_path / "run")[0]
    terms = ("alignment", "quantizer/tokens", "quantizer/codebook", "commitment")
    assert first["loss"] == pytest.approx(ratio * first["reconstruction"] + sum(first[t] for t in terms), rel=1e-5)


# Without the fork


def start(program, arguments):
    return subprocess.Popen(
        [sys.executable, "-m", *program.split(), *map(str, arguments)],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def stop(running, out, send):
    """Send SIGTERM after some steps; exit code and stderr."""
    try:
        end = time.monotonic() + 60
        while last_step(out) < 5:
            assert running.poll() is None and time.monotonic() < end
            time.sleep(0.001)
        send(running.pid, signal.SIGTERM)
    except BaseException:
        running.kill()
        raise
    return wait(running)


def wait(running):
    try:
        _, said = running.communicate(timeout=120)
    finally:
        running.kill()
    return running.returncode, said


def test_the_command_itself(stage1, tmp_path):
    """`python -m qlip.cli` with workers; a cluster's SIGTERM goes to all processes of a run."""
    out = tmp_path / "run"
    arguments = [*stage1, "--steps", 5000, "--eval-every", 5000, "--data.num-workers", 2, "--out", out]
    running = start("qlip.cli", arguments)
    code, said = stop(running, out, os.killpg)
    assert code == 0 and "Traceback" not in said and "this resumes it: qlip train" in said
    with pytest.raises(ProcessLookupError):  # and no worker is left
        os.killpg(running.pid, 0)
    assert latest_checkpoint(out).name == f"step-{last_step(out):07d}"


@pytest.mark.slow
def test_a_defect_ends_a_run_with_workers(stage1, tmp_path):
    """An exception that nobody foresaw comes out with its traceback, and the workers end."""
    defect = "import qlip.recipes.run as run; run.reconstruction_grid = lambda *_: 1 / 0; import qlip.cli as cli"
    (tmp_path / "defective.py").write_text(f"{defect}; cli.main()")
    arguments = [*stage1, "--data.num-workers", 2, "--steps", 2, "--out", tmp_path / "run"]
    running = subprocess.Popen(
        [sys.executable, tmp_path / "defective.py", *map(str, arguments)],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    code, said = wait(running)
    assert code == 1 and "ZeroDivisionError" in said
    with pytest.raises(ProcessLookupError):
        os.killpg(running.pid, 0)


@pytest.mark.slow
def test_torchrun_itself(stage1, whole, tmp_path):
    """SIGTERM to `torchrun` reaches its processes, which save; a resumed run is close to the whole one."""
    out = tmp_path / "run"
    torchrun = "torch.distributed.run --standalone --nproc-per-node 2 -m qlip.cli"
    arguments = [*stage1, "--sharding", "fsdp", "--out", out, "--resume"]
    _, said = stop(start(torchrun, arguments), out, os.kill)
    assert "this resumes it: torchrun --nproc-per-node 2 -m qlip.cli train" in said
    assert 5 <= last_step(out) < STEPS and latest_checkpoint(out).name == f"step-{last_step(out):07d}"
    code, said = wait(start(torchrun, arguments))
    assert code == 0, said
    assert_close(out, whole)
