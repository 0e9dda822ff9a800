"""What only a GPU can show; skipped without one."""

import shutil
from dataclasses import replace

import pytest
import torch
from tests.conftest import small_config

import qlip
from qlip.recipes.run import DataConfig, run
from qlip.recipes.stage1 import Recipe
from qlip.recipes.stage2 import Stage2Recipe
from qlip.train.checkpoint import latest_checkpoint, read_tensors
from qlip.train.fit import FitConfig
from qlip.train.log import read_log
from qlip.train.stage1 import Stage1Config
from qlip.train.stage2 import Stage2Config

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.fixture
def deterministic():
    yield
    torch.use_deterministic_algorithms(False)


def recipes(color_data, tokenizer):
    data = DataConfig(
        train=(color_data / "train.parquet",),
        val=(color_data / "val.parquet",),
        classes=color_data / "classes.json",
    )
    shared = {
        "data": data,
        "device": "cuda",
        "batch_size": 16,
        "fit": FitConfig(steps=8, warmup_steps=1, log_every=1, eval_every=4, save_every=4),
    }
    light = Stage2Config(perceptual_weight=0.0, discriminator_width=32, r1_every=2)
    return {
        "stage1": Recipe(model=small_config(), task=Stage1Config(balance="gradient", balance_every=3), **shared),
        "stage2": Stage2Recipe(tokenizer=str(tokenizer), task=light, **shared),
    }


@pytest.mark.parametrize("stage", ("stage1", "stage2"))
@pytest.mark.parametrize("changes", ({}, {"micro_batch_size": 8, "recompute": True}, {"compile": True}), ids=str)
def test_training_resumes_bit_for_bit(color_data, small_model, tmp_path, deterministic, stage, changes):
    small_model.save(tmp_path / "tokenizer")
    recipe = replace(recipes(color_data, tmp_path / "tokenizer")[stage], deterministic=True, **changes)
    assert run(recipe, tmp_path / "whole")
    twice = tmp_path / "twice"
    assert run(recipe, twice)
    first, second = (read_tensors(latest_checkpoint(tmp_path / path), "") for path in ("whole", "twice"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    shutil.rmtree(twice / "checkpoints" / "step-0000008")
    assert latest_checkpoint(twice).name == "step-0000004"
    assert run(recipe, twice, resume=True)
    resumed = read_tensors(latest_checkpoint(twice), "")
    assert all(torch.equal(first[name], resumed[name]) for name in first)


def test_the_gpu_computes_what_the_cpu_does(color_data, small_model, tmp_path):
    """The first step's losses, in float32; tokens of a trained model on either."""
    small_model.save(tmp_path / "tokenizer")
    for stage, recipe in recipes(color_data, tmp_path / "tokenizer").items():
        losses = {}
        for device in ("cpu", "cuda"):
            run(replace(recipe, device=device, precision="fp32"), tmp_path / f"{stage}-{device}")
            losses[device] = read_log(tmp_path / f"{stage}-{device}" / "log.jsonl")[0]
        for name in ("loss", "reconstruction", "quantizer/tokens", "quantizer/codebook", "grad_norm"):
            assert losses["cuda"][name] == pytest.approx(losses["cpu"][name], rel=1e-3, abs=1e-5), (stage, name)
        assert losses["cuda"]["memory_gib"] > 0
    pictures = torch.rand(8, 3, 32, 32)
    tokens = [qlip.load(tmp_path / "tokenizer", device=device).tokenize(pictures) for device in ("cpu", "cuda")]
    different = sum(int(b).bit_count() for b in (tokens[0] ^ tokens[1]).flatten())
    assert different <= 0.001 * tokens[0].numel() * 28
