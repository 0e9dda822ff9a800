import math

import pytest
import torch
from tests.unit.train.test_stage1 import batch

from qlip.errors import InputError
from qlip.train.discriminators import build_discriminator
from qlip.train.parallel import ComputeConfig
from qlip.train.stage2 import Stage2, Stage2Config
from qlip.train.task import NonFinite

FP32 = ComputeConfig(device="cpu", precision="fp32")
LIGHT = {"perceptual_weight": 0.0, "discriminator_width": 32}


def moved(model, before):
    return {name for name, p in model.named_parameters() if not torch.equal(before[name], p)}


@pytest.mark.parametrize("freeze_ids", (False, True))
@pytest.mark.parametrize("optimizer", ("adamw", "lamb", "muon"))
def test_what_is_frozen_does_not_move_bit_for_bit(small_model, freeze_ids, optimizer):
    before = {name: p.detach().clone() for name, p in small_model.named_parameters()}
    data = batch(small_model)
    ids, tokens = small_model.id_hash(), small_model.codes_to_tokens(small_model.encode(data["pixel_values"]))
    config = Stage2Config(freeze_ids=freeze_ids, optimizer=optimizer, lr=1e-3, decoder_lr=1e-3, **LIGHT)
    task = Stage2(small_model, config, FP32, 8)
    for step in range(1, 4):
        task.step(data, step)
    trained = {"vision_decoder", "vision_model.quant_embed_post"} | (
        set() if freeze_ids else {"vision_model.quant_embed"}
    )
    names = moved(small_model, before)
    assert {".".join(n.split(".")[: 2 if n.startswith("vision_model") else 1]) for n in names} == trained
    assert names >= {n for n in before if n.startswith("vision_decoder")}
    snapshot = task.snapshot()
    assert (snapshot.id_hash() == ids) == freeze_ids
    if freeze_ids:
        assert torch.equal(snapshot.codes_to_tokens(snapshot.encode(data["pixel_values"])), tokens)


@pytest.mark.parametrize("adversary", ("stylegan2", "patchgan"))
def test_the_losses_are_the_papers_weighted_sum(small_model, adversary):
    config = Stage2Config(
        reconstruction_weight=3.0,
        quantizer_weight=2.0,
        perceptual_weight=0.5,
        adversarial_weight=0.25,
        adversary=adversary,
        discriminator_width=32,
        pixel_scale="unit",
        perceptual="st-lpips",
        r1_every=1,
    )
    data = batch(small_model)
    task = Stage2(small_model, config, FP32, 8)
    with torch.no_grad():
        rebuilt = small_model(data["pixel_values"]).reconstructions
        processor = small_model.image_processor
        mean, std = (torch.tensor(x)[:, None, None] for x in (processor.mean, processor.std))
        unit, real = rebuilt * std + mean, data["pixel_values"] * std + mean
        perceptual = task.perceptual(unit, real).mean()
        logits = task.discriminator(2 * unit - 1)
        real_logits = task.discriminator(2 * real - 1)
    values = task.step(data, 1)
    torch.testing.assert_close(values["reconstruction"], (unit - real).square().mean(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(values["perceptual"], perceptual, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(values["adversarial"], task.discriminator.generator_loss(logits))
    torch.testing.assert_close(values["discriminator"], task.discriminator.discriminator_loss(real_logits, logits))
    assert ("r1" in values) == (adversary == "stylegan2")
    expected = (
        3 * values["reconstruction"]
        + 2 * (values["quantizer/tokens"] + values["quantizer/codebook"])
        + 0.5 * values["perceptual"]
        + 0.25 * values["adversarial"]
    )
    torch.testing.assert_close(values["loss"], expected)


def test_the_tokenizers_gradient_leaves_the_adversary_alone_and_the_other_way_round(small_model):
    """The discriminator's gradient is that of its own loss at the pictures just rebuilt, and no more."""
    data = batch(small_model)
    torch.manual_seed(3)
    task = Stage2(small_model, Stage2Config(adversary="patchgan", grad_clip=math.inf, **LIGHT), FP32, 8)
    twin = build_discriminator("patchgan", 32, 32)
    twin.load_state_dict(task.discriminator.state_dict())
    with torch.no_grad():
        pictures = [
            2 * task._unit(x) - 1
            for x in (data["pixel_values"], small_model(data["pixel_values"]).reconstructions)
        ]
    twin.discriminator_loss(*(twin(x) for x in pictures)).backward()
    task.step(data, 1)
    for mine, theirs in zip(task.discriminator.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_r1_comes_every_so_many_steps(small_model):
    task = Stage2(small_model, Stage2Config(r1_every=3, **LIGHT), FP32, 8)
    assert ["r1" in task.step(batch(small_model), step) for step in range(1, 8)] == [
        s % 3 == 0 for s in range(1, 8)
    ]


def test_the_snapshot_holds_the_running_mean(small_model):
    task = Stage2(small_model, Stage2Config(ema=0.5, lr=1e-3, **LIGHT), FP32, 8)
    name = "vision_decoder.conv_out.weight"
    weight = small_model.get_parameter(name)
    expected = weight.detach().clone()
    for step in (1, 2, 3):
        task.step(batch(small_model), step)
        expected = 0.5 * expected + 0.5 * weight.detach()
    snapshot = task.snapshot()
    torch.testing.assert_close(snapshot.get_parameter(name).detach(), expected)
    assert not torch.equal(snapshot.get_parameter(name), weight) and not snapshot.training
    task.step(batch(small_model), 4)
    torch.testing.assert_close(snapshot.get_parameter(name).detach(), expected)  # a copy, not a view
    without = Stage2(small_model, Stage2Config(ema=0.0, **LIGHT), FP32, 8)
    assert torch.equal(without.snapshot().get_parameter(name), weight)


def test_it_learns_to_rebuild(small_model):
    config = Stage2Config(lr=2e-3, decoder_lr=2e-3, ema=0.0, adversarial_weight=0.0, perceptual_weight=0.0)
    task = Stage2(small_model, config, ComputeConfig(device="cpu"), 8)
    values = [task.step(batch(small_model), step) for step in range(1, 61)]
    assert values[-1]["reconstruction"] < values[0]["reconstruction"] / 3
    assert "discriminator" not in values[0] and len(task.optimizers) == 1


def test_a_loss_that_is_not_finite_moves_nothing_of_either_side(small_model):
    task = Stage2(small_model, Stage2Config(**LIGHT), FP32, 8)
    task.step(batch(small_model), 1)
    before = {name: value.clone() for name, value in task.state_dict().items()}
    data = batch(small_model)
    data["pixel_values"][0, 0, 0, 0] = float("nan")
    with pytest.raises(NonFinite):
        task.step(data, 2)
    assert {"discriminator", "discriminator_optimizer", "ema", "model", "optimizer"} == {
        n.split(".")[0] for n in before
    }
    for name, value in task.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_parts_that_the_adversary_would_compare_otherwise_are_refused(small_model):
    with pytest.raises(InputError, match="2 samples that a process takes at once are no multiple of the 4"):
        Stage2(small_model, Stage2Config(**LIGHT), ComputeConfig(device="cpu", micro_batch_size=2), 8)
    Stage2(small_model, Stage2Config(adversary="patchgan", **LIGHT), ComputeConfig(micro_batch_size=2), 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    (
        ({"perceptual_weight": -0.1}, "perceptual_weight is -0.1"),
        ({"reconstruction_weight": 0.0, "perceptual_weight": 0.0}, "nothing tells what to rebuild"),
        ({"ema": 1.0}, "ema is 1.0"),
        ({"vision_lr": 1e-4}, "leave out vision_lr"),
        ({"r1_every": 0}, "r1_every is 0"),
    ),
)
def test_settings_that_cannot_be_are_named(changes, message):
    with pytest.raises(InputError, match=message):
        Stage2Config(**changes)


def test_pictures_of_another_size(small_model):
    data = {"pixel_values": torch.nn.functional.interpolate(batch(small_model)["pixel_values"], (40, 64))}
    with torch.no_grad():
        expected = (small_model(data["pixel_values"]).reconstructions - data["pixel_values"]).square().mean()
    config = Stage2Config(adversary="patchgan", perceptual="st-lpips", discriminator_width=32)
    values = Stage2(small_model, config, FP32, 8).step(data, 1)
    torch.testing.assert_close(values["reconstruction"], expected)
    assert all(value.isfinite() for value in values.values())
