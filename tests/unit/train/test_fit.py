import copy
import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from qlip.errors import InputError
from qlip.train.fit import FitConfig, cosine_factor, fit
from qlip.train.log import read_log
from qlip.train.nonfinite import replay
from qlip.train.optim import adamw, optimizer_state
from qlip.train.task import check_finite


class LineFit:
    """A task small enough to check by hand: fits y = 3x with AdamW."""

    def __init__(self, seed=0):
        torch.manual_seed(seed)
        self.model = nn.Linear(1, 1)
        self.optimizer = adamw([{"name": "all", "lr": 0.3, "params": list(self.model.parameters())}])
        self.optimizers = [self.optimizer]

    def step(self, batch, step):
        noise = 0.01 * torch.randn(4, 1)  # so that resuming must restore what is random
        loss = (self.model(batch["x"] + noise) - 3 * batch["x"]).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        check_finite({"loss": loss})
        self.optimizer.step()
        return {"loss": loss.detach()}

    def state_dict(self):
        return self.model.state_dict() | optimizer_state(self.optimizer, self.model)

    def snapshot(self):
        return copy.deepcopy(self.model).eval()


def stream(start):
    step = start
    while True:
        generator = torch.Generator().manual_seed(step)
        yield {"x": torch.randn(4, 1, generator=generator), "keys": [""] * 4}
        step += 1


CONFIG = FitConfig(steps=40, warmup_steps=5, log_every=1, eval_every=10, save_every=7, keep=2)


def test_it_learns_logs_evaluates_and_saves(tmp_path):
    task = LineFit()
    modes = []

    def evaluator(model):
        modes.append((model.training, torch.is_grad_enabled()))
        return {"slope": model.weight.item(), "picture": Image.new("RGB", (4, 4))}

    outcome = fit(task, stream, CONFIG, tmp_path, [evaluator])
    assert outcome.step == 40
    assert abs(outcome.results["slope"] - 3) < abs(LineFit().model.weight.item() - 3) / 2
    assert modes == [(False, False)] * 4 and task.model.training
    assert len(list((tmp_path / "images").glob("picture-*.png"))) == 4
    log = read_log(tmp_path / "log.jsonl")
    losses = [e for e in log if "loss" in e]
    assert [e["step"] for e in losses] == list(range(1, 41))
    assert [e["step"] for e in log if "eval/slope" in e] == [10, 20, 30, 40]
    assert losses[4]["lr/all"] == pytest.approx(0.3) and losses[-1]["lr/all"] == pytest.approx(0, abs=1e-9)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-0000035", "step-0000040"]


def test_the_best_checkpoint_is_saved_when_it_is_reached_and_kept(tmp_path):
    scores = iter((1.0, 5.0, 2.0, 3.0))
    config = replace(CONFIG, best="score", keep=1, save_every=40)
    fit(LineFit(), stream, config, tmp_path, [lambda model: {"score": next(scores)}])
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-0000020", "step-0000040"]


@pytest.mark.parametrize("stop", (1, 7, 9, 21, 39))
def test_an_interrupted_run_ends_as_the_whole_one_bit_for_bit(tmp_path, stop):
    whole = LineFit()
    fit(whole, stream, CONFIG, tmp_path / "whole")
    assert (tmp_path / "whole" / "curves.png").stat().st_size > 1000  # without evaluators too

    class PowerCut(Exception):
        pass

    def cut(start):
        for step, batch in enumerate(stream(start), start):
            if step == stop:
                raise PowerCut
            yield batch

    with pytest.raises(PowerCut):
        fit(LineFit(), cut, CONFIG, tmp_path / "cut")
    resumed = LineFit(seed=99)
    if stop < 7:  # nothing was saved: a resumed run starts anew, from its own weights
        resumed = LineFit()
    fit(resumed, stream, CONFIG, tmp_path / "cut", resume=True)
    assert torch.equal(whole.model.weight, resumed.model.weight)
    assert torch.equal(whole.model.bias, resumed.model.bias)
    lines = [[(e["step"], e["loss"]) for e in read_log(tmp_path / d / "log.jsonl")] for d in ("whole", "cut")]
    assert lines[0] == lines[1]


def test_a_run_is_not_overwritten(tmp_path):
    fit(LineFit(), stream, CONFIG, tmp_path)
    with pytest.raises(InputError, match="already holds a run.*--resume"):
        fit(LineFit(), stream, CONFIG, tmp_path)


def test_losses_that_are_not_finite_are_passed_over_as_often_as_allowed(tmp_path):
    def poisoned(start):
        for step, batch in enumerate(stream(start), start + 1):
            if step in (3, 5):
                batch["x"][0] = float("nan")
            yield batch

    fit(LineFit(), poisoned, replace(CONFIG, skip_nonfinite=2), tmp_path / "tolerant")
    log = read_log(tmp_path / "tolerant" / "log.jsonl")
    assert [e["step"] for e in log if "skipped" in e] == [3, 5]
    task = LineFit()
    with pytest.raises(InputError, match="step 5: loss not finite, with the samples .*--replay"):
        fit(task, poisoned, replace(CONFIG, skip_nonfinite=1, log_every=100), tmp_path / "strict")
    dump = tmp_path / "strict" / "nonfinite" / "step-0000005"
    again = LineFit(seed=5)
    assert math.isnan(replay(again, dump, seed=0)["loss"])
    assert torch.equal(again.model.weight, task.model.weight)


@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGINT))
def test_a_signal_ends_the_run_with_a_checkpoint_and_it_resumes_bit_for_bit(tmp_path, number):
    whole = LineFit()
    fit(whole, stream, CONFIG, tmp_path / "whole")

    def terminated(start):
        for step, batch in enumerate(stream(start), start + 1):
            if step == 17:
                os.kill(os.getpid(), number)
            yield batch

    before = signal.getsignal(number)
    assert fit(LineFit(), terminated, CONFIG, tmp_path / "cut").step == 17
    assert signal.getsignal(number) is before
    resumed = LineFit(seed=9)
    assert fit(resumed, stream, CONFIG, tmp_path / "cut", resume=True).step == 40
    assert torch.equal(whole.model.weight, resumed.model.weight)


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    program = """
import sys; from dataclasses import replace; from pathlib import Path; import os, signal
from tests.unit.train.test_fit import *
def twice(start):
    for step, batch in enumerate(stream(start), start + 1):
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
            print("saving")
            sys.stdout.flush()
            os.kill(os.getpid(), signal.SIGINT)
        yield batch
fit(LineFit(), twice, CONFIG, Path(sys.argv[1]))
"""
    run = [sys.executable, "-c", program, str(tmp_path / "run")]
    done = subprocess.run(run, capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert done.returncode == -signal.SIGINT and done.stdout == "saving\n"
    assert "Ctrl-C again stops at once" in done.stderr


def test_a_run_of_one_step_learns(tmp_path):
    task = LineFit()
    before = task.model.weight.clone()
    fit(task, stream, FitConfig(steps=1, warmup_steps=0), tmp_path)
    assert not torch.equal(task.model.weight, before)


def test_schedule_against_its_formula():
    config = FitConfig(steps=1000, warmup_steps=100)
    assert cosine_factor(50, config) == 0.5 and cosine_factor(100, config) == 1
    for step in (101, 550, 999):
        assert cosine_factor(step, config) == pytest.approx(0.5 * (1 + math.cos(math.pi * (step - 100) / 900)))
    assert cosine_factor(1000, config) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("field", ("steps", "log_every", "eval_every", "save_every", "keep"))
def test_settings_that_cannot_be(field):
    with pytest.raises(InputError, match=f"^{field} is 0"):
        FitConfig(**{"warmup_steps": 0, field: 0})
    with pytest.raises(InputError, match="warmup_steps 10"):
        FitConfig(steps=10, warmup_steps=10)


def test_a_line_cut_off_by_a_crash_is_dropped(tmp_path):
    (tmp_path / "log.jsonl").write_text(json.dumps({"step": 1}) + "\n" + '{"step": 2, "lo')
    assert read_log(tmp_path / "log.jsonl") == [{"step": 1}]
