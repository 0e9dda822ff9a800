"""The probe decides by measured times, whatever disturbs them, and warns once."""

import logging
from itertools import cycle

import pytest
import torch

from qlip import precision
from qlip.jobs.tokens_encoder import Encoder
from qlip.precision import speedup, warn_if_slow
from qlip.t2i.pipeline import load_t2i

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _fresh():
    yield
    speedup.cache_clear()
    precision._warn_if_slow.cache_clear()


def machine(monkeypatch, rates, disturbances=(1.0,)):
    """A device where a call takes 1 / its dtype's rate in milliseconds, times a disturbance, in turn."""
    speedup.cache_clear()
    noise = cycle(disturbances)
    monkeypatch.setattr(precision, "_task", lambda device, dtype, work, backward, size: (dtype, work, backward))
    monkeypatch.setattr(
        precision, "_seconds", lambda task, device: 1e-3 * next(noise) / rates.get(task, rates.get(task[0]))
    )


def test_the_ratio_is_that_of_the_times(monkeypatch):
    machine(monkeypatch, {torch.float32: 1, torch.bfloat16: 4})
    assert speedup(CPU, torch.bfloat16) == pytest.approx(4)


@pytest.mark.parametrize("ratio", (0.2, 0.9, 1.5, 4))
def test_a_busy_machine_does_not_turn_it_over(monkeypatch, ratio):
    disturbances = (1, 7, 3, 30, 1, 1, 12, 1, 5)  # of two calls out of three
    machine(monkeypatch, {torch.float32: 1, torch.bfloat16: ratio}, disturbances)
    assert speedup(CPU, torch.bfloat16) == pytest.approx(ratio)


def test_products_and_attention_are_asked_separately_and_measured_once(monkeypatch):
    slow = {(torch.bfloat16, "attention", True): 0.1}
    machine(monkeypatch, {torch.float32: 1, torch.bfloat16: 4} | slow)
    assert speedup(CPU, torch.bfloat16, "product") == pytest.approx(4)
    assert speedup(CPU, torch.bfloat16, "attention") == pytest.approx(0.1)
    monkeypatch.setattr(precision, "_seconds", None)
    assert speedup(CPU, torch.bfloat16, "attention") == pytest.approx(0.1)


def test_a_device_without_the_dtype(monkeypatch):
    def refuse(device, dtype, *rest):
        if dtype != torch.float32:
            raise TypeError("BFloat16 is not supported on MPS")
        return dtype

    machine(monkeypatch, {torch.float32: 1})
    monkeypatch.setattr(precision, "_task", refuse)
    monkeypatch.setattr(precision, "_seconds", lambda task, device: 1e-3)
    assert speedup(CPU, torch.bfloat16) == 0


@pytest.mark.parametrize("work", ("product", "attention"))
@pytest.mark.parametrize("backward", (False, True))
def test_the_real_probe_of_float32_against_itself(work, backward):
    state = torch.get_rng_state()
    assert speedup(CPU, torch.float32, work, backward) == pytest.approx(1, rel=0.5)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_slow_dtype_is_warned_of_once(monkeypatch, caplog):
    machine(monkeypatch, {torch.float32: 1, torch.bfloat16: 0.02, torch.float16: 2})
    with caplog.at_level(logging.WARNING, "qlip"):
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.bfloat16):
            warn_if_slow(CPU, dtype)
    (record,) = caplog.records
    assert record.getMessage().startswith("dtype bfloat16 runs at 0.02 times the speed of float32 here")


def test_tokenizing_in_a_slow_dtype_is_warned_of(monkeypatch, caplog):
    machine(monkeypatch, {torch.float32: 1, torch.bfloat16: 0.02})
    with caplog.at_level(logging.WARNING, "qlip"):
        Encoder.with_torch("qlip-tiny", CPU, "float32", None)
        assert not caplog.records
        Encoder.with_torch("qlip-tiny", CPU, "bfloat16", None)
    assert "dtype bfloat16 runs at 0.02 times" in caplog.text


def test_generating_in_a_slow_dtype_is_warned_of(monkeypatch, caplog):
    machine(monkeypatch, {torch.float32: 1, torch.bfloat16: 0.02})
    with caplog.at_level(logging.WARNING, "qlip"):
        load_t2i("t2i-tiny", dtype=torch.bfloat16)
    assert "dtype bfloat16 runs at 0.02 times" in caplog.text
