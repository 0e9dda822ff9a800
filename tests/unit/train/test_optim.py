import copy
import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from qlip.errors import InputError
from qlip.train.optim import (
    OptimizerConfig,
    adamw,
    build_optimizer,
    clip_gradients,
    make_groups,
    optimizer_state,
)

RATES = {"lr": 5e-4, "vision_lr": 2e-4, "text_lr": 2e-5, "decoder_lr": 2e-3}


def rates(model, **settings):
    """(rate, weight decay, group's name) of each parameter."""
    groups = build_optimizer(model, OptimizerConfig(**RATES | settings)).param_groups
    owners = {p: (g["lr"], g["weight_decay"], g["name"]) for g in groups for p in g["params"]}
    return {name: owners[p] for name, p in model.named_parameters() if p in owners}


def give_gradients(model, step):
    """Random ones, larger and smaller from step to step; the same however the model is sharded."""
    torch.manual_seed(step)
    for p in model.parameters():
        p.grad = torch.randn(p.shape) * 10 ** (step % 3 - 2)
        if isinstance(p, DTensor):
            p.grad = distribute_tensor(p.grad, p.device_mesh, p.placements, src_data_rank=None)


def train(model, optimizer, steps):
    for step in range(steps):
        give_gradients(model, step)
        norms = clip_gradients(optimizer.param_groups, 5.0)
        optimizer.step()
    return norms


def test_towers_have_their_rates_and_vectors_no_decay(small_model):
    found = rates(small_model, weight_decay=0.05)
    parameters = dict(small_model.named_parameters())
    assert found.keys() == parameters.keys()
    assert all(found[name][1] == (0.05 if p.ndim >= 2 else 0) for name, p in parameters.items())
    assert found["vision_model.embeddings.position_embedding.weight"] == (2e-4, 0.05, "vision")
    assert found["vision_model.encoder.layers.1.mlp.w3.bias"] == (2e-4, 0, "vision")
    assert found["vision_model.post_layernorm.weight"] == (2e-4, 0, "vision")
    assert found["text_model.embeddings.token_embedding.weight"] == (2e-5, 0.05, "text")
    assert found["text_model.final_layer_norm.bias"] == (2e-5, 0, "text")
    others = {name for name, found_here in found.items() if found_here[2] == "other"}
    assert {name.split(".")[1] for name in others if "quant" in name} == {"quant_embed", "quant_embed_post"}
    rest = {"logit_scale", "visual_projection.weight", "visual_projection.bias", "text_projection.weight"}
    assert {name for name in others if "quant" not in name} == rest & parameters.keys()
    assert {found[name][0] for name in others} == {5e-4}
    decoder = {found_here for name, found_here in found.items() if name.startswith("vision_decoder.")}
    assert decoder == {(2e-3, 0.05, "decoder"), (2e-3, 0, "decoder")}


def test_without_rates_of_their_own_towers_take_lr_and_frozen_ones_are_left_out(small_model):
    small_model.text_model.requires_grad_(False)
    found = rates(small_model, vision_lr=None, decoder_lr=0.0)
    assert not any(name.startswith("text_model") for name in found)
    assert found["vision_model.post_layernorm.weight"][0] == 5e-4
    assert found["vision_decoder.conv_out.weight"][0] == 0


def test_layer_decay_counts_as_eva_does(small_model):
    found = {name: group[0] for name, group in rates(small_model, layer_decay=0.5).items()}
    vision, text = "vision_model", "text_model"  # of two blocks and of one
    assert found[f"{vision}.post_layernorm.bias"] == 2e-4
    assert found[f"{vision}.encoder.layers.1.layer_norm1.weight"] == pytest.approx(2e-4 / 2)
    assert found[f"{vision}.encoder.layers.0.self_attn.q_proj.weight"] == pytest.approx(2e-4 / 4)
    assert found[f"{vision}.embeddings.class_embedding"] == pytest.approx(2e-4 / 8)
    assert found[f"{vision}.embeddings.patch_embedding.bias"] == pytest.approx(2e-4 / 8)
    assert found[f"{vision}.quant_embed.c_fc.weight"] == 5e-4
    assert found[f"{text}.final_layer_norm.weight"] == 2e-5
    assert found[f"{text}.encoder.layers.0.mlp.fc1.weight"] == pytest.approx(2e-5 / 2)
    assert found[f"{text}.embeddings.position_embedding.weight"] == pytest.approx(2e-5 / 4)
    assert found["vision_decoder.encoder.layers.0.mlp.w1.weight"] == 2e-3


def test_state_made_early_changes_nothing(small_model):
    twin = copy.deepcopy(small_model)
    ours = build_optimizer(small_model, OptimizerConfig(lr=1e-2))
    groups = [{k: g[k] for k in ("lr", "weight_decay")} for g in ours.param_groups]
    names = {p: name for name, p in small_model.named_parameters()}
    theirs = dict(twin.named_parameters())
    for stock, group in zip(groups, ours.param_groups, strict=True):
        stock["params"] = [theirs[names[p]] for p in group["params"]]
    stock = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-6, fused=True)
    keys = optimizer_state(ours, small_model).keys()
    assert "vision_decoder.conv_out.weight.exp_avg_sq" in keys and "logit_scale.step" in keys
    assert len(keys) == 3 * len(theirs) and not stock.state
    for step in range(3):
        for model, optimizer in ((small_model, ours), (twin, stock)):
            give_gradients(model, step)
            optimizer.step()
    for name, p in small_model.named_parameters():
        assert torch.equal(p, theirs[name]), name
        for key, value in stock.state[theirs[name]].items():
            assert torch.equal(value, optimizer_state(ours, small_model)[f"{name}.{key}"])


@pytest.mark.parametrize("kind", ("adamw", "lamb", "muon"))
def test_state_by_name_restores_a_run_bit_for_bit(small_model, kind):
    config = OptimizerConfig(optimizer=kind, lr=1e-2, layer_decay=0.75)
    optimizer = build_optimizer(small_model, config)
    train(small_model, optimizer, 2)
    resumed = copy.deepcopy(small_model)
    fresh = build_optimizer(resumed, config)
    saved = {name: value.clone() for name, value in optimizer_state(optimizer, small_model).items()}
    live = optimizer_state(fresh, resumed)
    assert live.keys() == saved.keys()
    for name, value in live.items():
        value.copy_(saved[name])
    for model, own in ((small_model, optimizer), (resumed, fresh)):
        train(model, own, 2)
    for p, q in zip(small_model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("max_norm", (1e-3, 1e3, math.inf))
def test_clipping_is_torchs(small_model, max_norm):
    optimizer = build_optimizer(small_model, OptimizerConfig())
    give_gradients(small_model, 1)
    before = {name: p.grad.clone() for name, p in small_model.named_parameters()}
    norms = clip_gradients(optimizer.param_groups, max_norm)
    after = {name: p.grad.clone() for name, p in small_model.named_parameters()}
    for name, p in small_model.named_parameters():
        p.grad = before[name].clone()
    torch.testing.assert_close(
        norms["grad_norm"], nn.utils.clip_grad_norm_(small_model.parameters(), max_norm), rtol=1e-6, atol=0
    )
    for name, p in small_model.named_parameters():
        torch.testing.assert_close(after[name], p.grad, rtol=1e-6, atol=0)
    assert norms.keys() == {"grad_norm"} | {f"grad_norm/{t}" for t in ("vision", "text", "decoder", "other")}
    text = torch.cat([g.flatten() for name, g in before.items() if name.startswith("text_model.")])
    torch.testing.assert_close(norms["grad_norm/text"], text.norm())
    parts = [value for name, value in norms.items() if "/" in name]
    torch.testing.assert_close(torch.stack(parts).norm(), norms["grad_norm"])


@pytest.mark.parametrize("bad", (math.inf, math.nan))
def test_a_norm_that_is_not_finite_is_told_and_gradients_stay(bad):
    model = nn.Linear(2, 2)
    groups = make_groups(model, lambda name: (name, 1.0), 0.0)
    model.weight.grad, model.bias.grad = torch.full((2, 2), 7.0), torch.tensor([bad, 1.0])
    norms = clip_gradients(groups, 1.0)
    assert not norms["grad_norm"].isfinite() and not norms["grad_norm/bias"].isfinite()
    assert norms["grad_norm/weight"] == 14
    assert torch.equal(model.weight.grad, torch.full((2, 2), 7.0)) and model.bias.grad[1] == 1


def test_any_module_can_have_groups():
    torch.manual_seed(0)
    discriminator = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Conv2d(4, 1, 1))
    optimizer = adamw(make_groups(discriminator, lambda name: ("discriminator", 1e-2), 0.05))
    assert [(g["name"], g["lr"], g["weight_decay"], len(g["params"])) for g in optimizer.param_groups] == [
        ("discriminator", 1e-2, 0.05, 2),
        ("discriminator", 1e-2, 0, 4),
    ]
    images = torch.randn(2, 3, 8, 8)
    losses = []
    for _ in range(20):
        loss = (discriminator(images) - 3).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert clip_gradients(optimizer.param_groups, 5.0).keys() == {"grad_norm", "grad_norm/discriminator"}
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def shard(model):
    """As FSDP2 holds a model: all sharded but the scalar, which it cannot."""
    for tower in (model.vision_model, model.vision_decoder, model.text_model):
        for layer in tower.encoder.layers:
            fully_shard(layer)
    return fully_shard(model, ignored_params={model.logit_scale})


def trained_on_two(rank, folder, model):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    results = {}
    for kind in ("adamw", "lamb", "muon"):
        sharded = shard(copy.deepcopy(model))
        config = OptimizerConfig(optimizer=kind, lr=1e-2, text_lr=1e-3, layer_decay=0.75)
        optimizer = build_optimizer(sharded, config)
        norms = train(sharded, optimizer, 3)
        tensors = dict(sharded.named_parameters()) | optimizer_state(optimizer, sharded)
        whole = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in tensors.items()}
        results[kind] = {k: v.detach() for k, v in (whole | norms).items()}
        with CommDebugMode() as communication:
            clip_gradients(optimizer.param_groups, 5.0)
        results[kind]["collectives"] = torch.tensor(communication.get_total_counts())
    torch.save(results, f"{folder}/rank-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")

    def run(model):
        if not (folder / "rank-1.pt").exists():
            mp.spawn(trained_on_two, (folder, model), nprocs=2)
        return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(2)]

    return run


@pytest.mark.parametrize("kind", ("adamw", "lamb", "muon"))
def test_two_processes_that_hold_half_of_it_each_do_what_one_does(small_model, two_processes, kind):
    first, second = (results[kind] for results in two_processes(small_model))
    config = OptimizerConfig(optimizer=kind, lr=1e-2, text_lr=1e-3, layer_decay=0.75)
    optimizer = build_optimizer(small_model, config)
    start = {name: p.detach().clone() for name, p in small_model.named_parameters()}
    norms = train(small_model, optimizer, 3)
    expected = {k: v.detach() for k, v in small_model.named_parameters()} | optimizer_state(optimizer, small_model)
    expected |= norms
    assert first.keys() == expected.keys() | {"collectives"}
    measured = {name: first[name] for name in expected}
    torch.testing.assert_close(measured, expected, rtol=1e-6, atol=5e-7)  # the worst seen are 2e-7 and 1.2e-7
    assert all(torch.equal(first[name], second[name]) for name in expected)
    assert any((expected[name] - start[name]).abs().max() > 1e-3 for name in start)
    assert first["collectives"] == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    (
        ({"optimizer": "sgd"}, "optimizer is 'sgd': choose adamw, lamb or muon"),
        ({"lr": 0.0}, "lr is 0.0: it must be above 0"),
        ({"lr": math.nan}, "lr is nan"),
        ({"vision_lr": -1e-4}, "vision_lr is -0.0001: it must be 0 or more"),
        ({"decoder_lr": math.inf}, "decoder_lr is inf"),
        ({"layer_decay": 0.0}, "layer_decay is 0.0: it must be above 0 and at most 1"),
        ({"layer_decay": 1.5}, "layer_decay is 1.5"),
        ({"betas": (0.9, 1.0)}, "betas are .0.9, 1.0.: they must be two numbers"),
        ({"betas": (0.9,)}, "betas are"),
        ({"eps": 0.0}, "eps is 0.0: it must be above 0"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1: it must be 0 or more"),
        ({"grad_clip": 0.0}, "grad_clip is 0.0: it must be above 0 .inf does not clip"),
    ),
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(InputError, match=message):
        OptimizerConfig(**settings)
