import json
import math

import pytest
import torch
from torch import nn

from qlip.errors import InputError
from qlip.train.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from qlip.train.fit import FitConfig, cosine_factor, fit
from qlip.train.log import read_log


class LineFit:
    """A task small enough to check by hand: fits y = 3x with AdamW."""

    def __init__(self, seed=0):
        torch.manual_seed(seed)
        self.model = nn.Linear(1, 1)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.3)

    def step(self, batch):
        loss = (self.model(batch["x"]) - 3 * batch["x"]).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"loss": loss.detach()}


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

    def evaluator():
        modes.append((task.model.training, torch.is_grad_enabled()))
        return {"slope": task.model.weight.item()}

    results = fit(task, stream, CONFIG, tmp_path, [evaluator])
    assert abs(results["slope"] - 3) < abs(LineFit().model.weight.item() - 3) / 2
    assert modes == [(False, False)] * 4 and task.model.training
    log = read_log(tmp_path / "log.jsonl")
    losses = [e for e in log if "loss" in e]
    assert [e["step"] for e in losses] == list(range(1, 41))
    assert [e["step"] for e in log if "eval/slope" in e] == [10, 20, 30, 40]
    assert losses[4]["lr"] == pytest.approx(0.3) and losses[-1]["lr"] == pytest.approx(0, abs=1e-9)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "step-0000035.safetensors",
        "step-0000040.safetensors",
    ]


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


def test_a_crash_while_saving_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    task = LineFit()
    save_checkpoint(tmp_path, task, 1, keep=1)

    def full_disk(tensors, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qlip.train.checkpoint.save_file", full_disk)
    with pytest.raises(InputError, match="No space"):
        save_checkpoint(tmp_path, task, 2, keep=1)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-0000001.safetensors"]
    assert load_checkpoint(latest_checkpoint(tmp_path), task) == 1


def test_damaged_and_foreign_checkpoints_are_named(tmp_path):
    path = save_checkpoint(tmp_path, LineFit(), 1, keep=1)
    other = LineFit()
    other.model = nn.Linear(2, 1)
    with pytest.raises(InputError, match="of another model.*weight"):
        load_checkpoint(path, other)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(InputError, match="not a readable checkpoint"):
        load_checkpoint(path, LineFit())


def test_schedule_against_its_formula():
    config = FitConfig(steps=1000, warmup_steps=100)
    assert cosine_factor(50, config) == 0.5 and cosine_factor(100, config) == 1
    for step in (101, 550, 999):
        assert cosine_factor(step, config) == pytest.approx(0.5 * (1 + math.cos(math.pi * (step - 100) / 900)))
    assert cosine_factor(1000, config) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("field", ("steps", "log_every", "eval_every", "save_every", "keep"))
def test_settings_that_cannot_be(field):
    with pytest.raises(InputError, match=f"fit.{field} is 0"):
        FitConfig(**{"warmup_steps": 0, field: 0})
    with pytest.raises(InputError, match="warmup_steps 10"):
        FitConfig(steps=10, warmup_steps=10)


def test_a_line_cut_off_by_a_crash_is_dropped(tmp_path):
    (tmp_path / "log.jsonl").write_text(json.dumps({"step": 1}) + "\n" + '{"step": 2, "lo')
    assert read_log(tmp_path / "log.jsonl") == [{"step": 1}]
