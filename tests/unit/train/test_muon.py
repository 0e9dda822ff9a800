"""Muon on one process; test_optim.py has it sharded over two, test_parallel.py in training."""

import copy

import torch
from tests.unit.lm.conftest import SMALL
from tests.unit.train.test_optim import give_gradients
from torch import nn

from qlip.lm.config import LMConfig
from qlip.lm.transformer import Transformer
from qlip.train.fit import set_learning_rate
from qlip.train.muon import Muon, orthogonalize
from qlip.train.optim import OptimizerConfig, build_optimizer, is_hidden_matrix

SHAPES = {"square": (8, 8), "wide": (6, 20), "tall": (20, 6), "second": (20, 6), "column": (5, 1)}


def parameters():
    torch.manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape)) for name, shape in SHAPES.items()}


def torchs(params, **settings):
    return torch.optim.Muon(params, adjust_lr_fn="match_rms_adamw", momentum=0.95, **settings)


def both_after(steps, lr=0.02, weight_decay=0.1):
    """Our parameters and torch's after steps with one schedule and the same gradients."""
    ours, theirs = parameters(), parameters()
    group = {"name": "all", "lr": lr, "weight_decay": weight_decay, "hidden": True, "params": list(ours.values())}
    optimizers = Muon([group], (0.9, 0.95), 1e-8), torchs(theirs.values(), lr=lr, weight_decay=weight_decay)
    for step in range(steps):
        for params, optimizer in zip((ours, theirs), optimizers, strict=True):
            set_learning_rate(optimizer, 1 / (1 + step))
            give_gradients(nn.ParameterDict(params), step)
            optimizer.step()
    return ours, theirs


def test_it_is_torchs_with_iterations_in_float32(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)
    for decay in (0.0, 0.3):
        ours, theirs = both_after(5, weight_decay=decay)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_it_is_torchs_up_to_the_rounding_of_bfloat16():
    start = parameters()
    ours, theirs = both_after(1, weight_decay=0.0)
    for name in SHAPES:
        moves = ours[name] - start[name], theirs[name] - start[name]
        assert (moves[0] - moves[1]).norm() < 0.03 * moves[1].norm(), name


def test_singular_values_become_about_one_and_singular_vectors_stay():
    torch.manual_seed(0)
    matrices = torch.randn(3, 24, 10) * torch.tensor([1e-4, 1.0, 1e4])[:, None, None]
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    within = u.mT @ orthogonalize(matrices) @ vh.mT
    values = within.diagonal(dim1=1, dim2=2)
    assert values.min() > 0.6 and values.max() < 1.3
    torch.testing.assert_close(within, torch.diag_embed(values), rtol=0, atol=1e-4)
    assert not orthogonalize(torch.zeros(1, 3, 5)).any()


def test_hidden_matrices_are_those_in_blocks_and_mlps(small_model):
    hidden = {name for name, p in small_model.named_parameters() if is_hidden_matrix(name, p)}
    others = {name for name, p in small_model.named_parameters() if p.ndim >= 2} - hidden
    assert others == {
        "vision_model.embeddings.patch_embedding.weight",
        "vision_model.embeddings.position_embedding.weight",
        "vision_decoder.position_embeddings",
        "vision_decoder.conv_out.weight",
        "text_model.embeddings.token_embedding.weight",
        "text_model.embeddings.position_embedding.weight",
        "visual_projection.weight",
        "text_projection.weight",
    }
    assert {name for name in hidden if ".layers." not in name} == {
        "vision_model.quant_embed.c_fc.weight",
        "vision_model.quant_embed.c_proj.weight",
        "vision_model.quant_embed_post.c_fc.weight",
        "vision_model.quant_embed_post.c_proj.weight",
        "vision_decoder.ffn.0.weight",
    }
    language = Transformer(LMConfig(**SMALL | {"tie_word_embeddings": False, "qk_norm": True}))
    plain = {name for name, p in language.named_parameters() if p.ndim == 2 and not is_hidden_matrix(name, p)}
    assert plain == {"embed_tokens.weight", "lm_head.weight"}
    assert not is_hidden_matrix("layers.0.self_attn.q_proj.lora_A.default.weight", torch.zeros(2, 2))


def test_what_is_not_hidden_takes_adamws_step_bit_for_bit(small_model):
    twin = copy.deepcopy(small_model)
    settings = {"lr": 1e-2, "text_lr": 1e-3, "layer_decay": 0.75, "weight_decay": 0.1}
    models = {"muon": small_model, "adamw": twin}
    for kind, model in models.items():
        optimizer = build_optimizer(model, OptimizerConfig(optimizer=kind, **settings))
        for step in range(3):
            set_learning_rate(optimizer, 1 / (1 + step))
            give_gradients(model, step)
            optimizer.step()
    stepped = dict(twin.named_parameters())
    for name, p in small_model.named_parameters():
        assert torch.equal(p, stepped[name]) != is_hidden_matrix(name, p), name


def test_a_copy_makes_the_same_steps():
    """A copy has groups and state of its own, and AdamW steps on these."""
    params = parameters()
    first = {"params": [params["wide"], params["square"]], "hidden": True}
    groups = [
        group | {"lr": 0.02, "weight_decay": 0.1}
        for group in (first, {"params": [params["column"]], "hidden": False})
    ]
    copied, other = copy.deepcopy((params, Muon(groups, (0.9, 0.95), 1e-8)))
    for name, p in copied.items():
        p.grad = torch.ones_like(p)
        params[name].grad = p.grad.clone()
    other.step()
    assert torch.equal(params["column"], parameters()["column"])
    Muon(groups, (0.9, 0.95), 1e-8).step()
    for name in ("wide", "square", "column"):
        assert torch.equal(copied[name], params[name]) and not torch.equal(params[name], parameters()[name])
