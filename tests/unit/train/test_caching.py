"""A batch in parts has the gradient of the batch in one pass, all losses on."""

import pytest
import torch
from tests.unit.train.test_parallel import BATCH_SIZE, TEACHER, build_model, global_batch
from torch import nn

from qlip.data.teacher import Teacher
from qlip.model.layers import Block
from qlip.train.caching import Part, backward, split_batch
from qlip.train.parallel import ComputeConfig
from qlip.train.stage1 import Stage1, Stage1Config
from qlip.train.stage2 import Stage2, Stage2Config


def gradients(task_class, config, teacher: Teacher | None = None, **compute) -> tuple[dict, dict]:
    """The first step's gradients and values, with a learning rate that moves nothing."""
    model = build_model()
    others = (teacher,) if teacher else ()
    task = task_class(model, config, ComputeConfig(precision="fp32", device="cpu", **compute), BATCH_SIZE, *others)
    values = task.step(global_batch(model, 1) | {"keys": [""] * BATCH_SIZE}, 1)
    modules = [model, task.extra] if task_class is Stage1 else [model]
    named = [parameter for module in modules for parameter in module.named_parameters()]
    return {name: p.grad for name, p in named if p.grad is not None}, values


def assert_same(parts: dict, whole: dict) -> None:
    """Up to rounding, measured at 2e-6 of the largest gradient."""
    largest = max(grad.abs().max().item() for grad in whole.values())
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-4, atol=1e-5 * largest)


@pytest.mark.parametrize("part_size", (8, 4, 1))
@pytest.mark.parametrize("contrastive", ("softmax", "sigmoid"))
def test_stage1_in_parts_has_the_gradient_of_one_pass(part_size, contrastive):
    weights = {"quantizer_weight": 50.0, "alignment_weight": 20.0}
    config = Stage1Config(grad_clip=float("inf"), contrastive=contrastive, **weights)
    whole, values = gradients(Stage1, config)
    parts, values_of_parts = gradients(Stage1, config, micro_batch_size=part_size)
    assert whole.keys() == parts.keys() and len(whole) > 50
    assert ("logit_bias" in whole) == (contrastive == "sigmoid")
    assert_same(parts, whole)
    for name in values.keys() - {"distinct_tokens"}:
        torch.testing.assert_close(values_of_parts[name], values[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("part_size", (8, 4, 1))
def test_a_teacher_in_parts_has_the_gradient_of_one_pass(part_size):
    """Parts hold 1 to 4 samples of a feature each, and the loss is a mean over all of these."""
    config = Stage1Config(grad_clip=float("inf"), teacher_weight=30.0, reconstruction_weight=1.0)
    whole, values = gradients(Stage1, config, TEACHER)
    parts, values_of_parts = gradients(Stage1, config, TEACHER, micro_batch_size=part_size)
    assert whole.keys() == parts.keys() and {"heads.pooled.weight", "heads.grid.bias"} < whole.keys()
    assert_same(parts, whole)
    for name in ("teacher/pooled", "teacher/grid", "loss"):
        torch.testing.assert_close(values_of_parts[name], values[name], rtol=1e-4, atol=1e-5)


def test_dropped_patches_are_the_same_in_every_part():
    config = Stage1Config(grad_clip=float("inf"), reconstruct_every=2, drop_tokens=0.5)
    whole, values = gradients(Stage1, config)
    parts, values_of_parts = gradients(Stage1, config, micro_batch_size=2)
    assert_same(parts, whole)
    torch.testing.assert_close(values_of_parts["loss"], values["loss"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", (Stage1Config(), Stage2Config(perceptual_weight=0.0, discriminator_width=32)))
def test_recomputing_activations_changes_nothing_but_memory(config, monkeypatch):
    task = Stage1 if isinstance(config, Stage1Config) else Stage2
    calls = []
    forward = Block.forward
    monkeypatch.setattr(Block, "forward", lambda self, *args: calls.append(self) or forward(self, *args))
    plain, values = gradients(task, config)
    once = len(calls)
    recomputed, values_again = gradients(task, config, recompute=True)
    trained = 5 if task is Stage1 else 2  # of 2 layers each in encoder and decoder, and 1 of the text tower
    assert len(calls) == 2 * once + trained
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain) and plain.keys() == recomputed.keys()
    assert values == values_again


def test_the_codebook_entropy_looks_at_the_batch_and_not_at_its_parts():
    """Averaging the parts' own entropies would give another gradient: the test above can fail."""
    model = build_model()
    batch = global_batch(model, 1)
    latents = model.encode(batch["pixel_values"])
    from qlip.model.quantizer import quantizer_loss

    weight = model.vision_model.quant_embed.c_proj.weight
    (whole,) = torch.autograd.grad(quantizer_loss(latents, model.config.quantizer), weight, retain_graph=True)
    averaged = sum(quantizer_loss(part, model.config.quantizer) for part in latents.split(2)) / 8
    (of_parts,) = torch.autograd.grad(averaged, weight)
    assert (whole - of_parts).abs().max() > 0.05 * whole.abs().max()


def test_stage2_in_parts_has_the_gradient_of_one_pass():
    config = Stage2Config(grad_clip=float("inf"), perceptual_weight=0.0, discriminator_width=32, r1_every=1)
    whole, values = gradients(Stage2, config)
    parts, values_of_parts = gradients(Stage2, config, micro_batch_size=4)
    assert whole.keys() == parts.keys() and not any("vision_model.encoder" in name for name in whole)
    assert_same(parts, whole)
    assert values["r1"] > 0
    for name in values.keys() - {"distinct_tokens"}:
        torch.testing.assert_close(values_of_parts[name], values[name], rtol=1e-4, atol=1e-5)


def test_what_is_random_is_the_same_in_both_passes():
    """With dropout the cached gradient belongs to the second pass only if that draws what the first drew."""
    net, x = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5)), torch.randn(8, 6)
    seen: dict[bool, list] = {False: [], True: []}

    def forward(part, whole):
        out = net(part["x"])
        seen[whole].append(out.detach())
        return Part({}, {"rows": out}, {}, {})

    torch.manual_seed(7)
    parts = split_batch({"x": x}, 4)
    backward(forward, parts, lambda rows, means: {"spread": rows["rows"].std()}, {"spread": 1.0})
    assert all(torch.equal(a, b) for a, b in zip(seen[False], seen[True], strict=True))
    assert not torch.equal(seen[True][0] == 0, seen[True][1] == 0)  # and each part draws its own
    grad, net[0].weight.grad = net[0].weight.grad, None
    torch.manual_seed(7)
    torch.cat([net(part["x"]) for part in parts]).std().backward()
    torch.testing.assert_close(grad, net[0].weight.grad)
