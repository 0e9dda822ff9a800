"""A run keeps the precision that it began with, unless a person names another."""

import json
from dataclasses import replace

import pytest
import torch

from qlip.recipes.record import settle
from qlip.train.parallel import ComputeConfig

CPU = torch.device("cpu")


@pytest.fixture
def fast(monkeypatch):
    """A machine on which bfloat16 would be taken."""
    monkeypatch.setattr("qlip.train.parallel._is_faster", lambda device, work: True)


def test_a_new_run_asks_the_device(fast):
    found = settle(ComputeConfig(), CPU, None)
    assert (found.device, found.precision, found.attention) == ("cpu", "bf16", "bf16")


def test_a_resumed_run_keeps_its_own_also_on_another_machine(fast, tmp_path, caplog):
    recipe = {"precision": "fp32", "attention": "fp32"}
    (tmp_path / "recipe.json").write_text(json.dumps({"recipe": recipe, "segments": [], "num_samples": 1}))
    with caplog.at_level("INFO", "qlip"):
        found = settle(ComputeConfig(), CPU, tmp_path)
    assert (found.precision, found.attention) == ("fp32", "fp32")
    assert "precision: fp32, as in the run until now" in caplog.text
    named = settle(replace(ComputeConfig(), precision="bf16"), CPU, tmp_path)
    assert (named.precision, named.attention) == ("bf16", "fp32")


def test_a_record_from_before_attention_was_asked(fast, tmp_path):
    record = {"recipe": {"precision": "bf16"}, "segments": [], "num_samples": 1}
    (tmp_path / "recipe.json").write_text(json.dumps(record))
    assert settle(ComputeConfig(), CPU, tmp_path).precision == "bf16"
