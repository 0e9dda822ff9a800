import math

import pytest
import torch

from qlip.model.quantizer import quantizer_loss
from qlip.train.losses import contrastive_loss
from qlip.train.stage1 import Stage1, Stage1Config


def batch(model, size=8):
    torch.manual_seed(1)
    captions = [("red square", "blue square")[i % 2] for i in range(size)]
    input_ids, mask = model.text_tokenizer(captions)
    colors = torch.tensor([[1.5, -1.0, -1.0], [-1.0, -1.0, 1.5]])[torch.arange(size) % 2]
    return {
        "pixel_values": colors[:, :, None, None] + 0.2 * torch.randn(size, 3, 32, 32),
        "input_ids": input_ids,
        "attention_mask": mask,
        "group": torch.arange(size) % 2,
        "keys": [""] * size,
    }


def test_the_loss_is_the_papers_weighted_sum(small_model):
    config = Stage1Config(
        reconstruction_weight=7.0, alignment_weight=3.0, quantizer_weight=2.0, commitment_weight=0.5
    )
    data = batch(small_model)
    std = torch.tensor(small_model.image_processor.std)
    terms, _ = Stage1(small_model, config, std).losses(data)
    with torch.autocast("cpu", torch.bfloat16):
        out = small_model(data["pixel_values"], data["input_ids"])
    pixels = [x * std[:, None, None] for x in (out.reconstructions.float(), data["pixel_values"])]
    z, z_hat = out.features.float(), out.quantized_features.float()
    expected = (
        7 * (pixels[0] - pixels[1]).pow(2).mean()
        + 3 * contrastive_loss(out.logits_per_image, data["group"])
        + 2 * quantizer_loss(out.latents, small_model.config.quantizer)
        + 0.5 * (z - z_hat).pow(2).mean()
    )
    torch.testing.assert_close(terms["loss"], expected, rtol=1e-5, atol=1e-5)


def test_it_learns_to_rebuild_and_to_align(small_model):
    small_model.train()
    task = Stage1(small_model, Stage1Config(lr=2e-3), torch.tensor(small_model.image_processor.std))
    data = batch(small_model)
    first = task.step(data)
    for _ in range(60):
        last = task.step(data)
    assert last["reconstruction"] < first["reconstruction"] / 3
    assert last["alignment"] < first["alignment"] - 0.3  # towards ln 4, its floor with four of each caption
    assert last["alignment"] >= math.log(4) - 1e-3
    assert all(p.grad is not None and p.grad.isfinite().all() for p in small_model.parameters())


def test_logit_scale_is_clamped_and_vectors_do_not_decay(small_model):
    task = Stage1(small_model, Stage1Config(lr=1e-4), torch.ones(3))
    with torch.no_grad():
        small_model.logit_scale.fill_(7.0)
    task.step(batch(small_model))
    assert small_model.logit_scale.item() == pytest.approx(math.log(100))
    decayed, others = task.optimizer.param_groups
    assert {p.ndim for p in others["params"]} == {0, 1} and others["weight_decay"] == 0
    assert min(p.ndim for p in decayed["params"]) == 2 and decayed["weight_decay"] == 0.05
    assert len(decayed["params"]) + len(others["params"]) == len(list(small_model.parameters()))
