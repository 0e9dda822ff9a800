"""Optimizers by tower: their settings, groups, state by name, and gradient clipping. Parameters may be sharded."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from qlip.errors import InputError
from qlip.model.qlip import QLIP
from qlip.train.lamb import Lamb, adam_state, local_shards, whole_norms
from qlip.train.muon import Muon

Groups = list[dict[str, Any]]
Kind = Literal["adamw", "lamb", "muon"]


@dataclass(frozen=True)
class AdamWConfig:
    """How the parameters of a language model move; the defaults are the paper's for UM3 (Table 9).

    Attributes:
        optimizer: "adamw", or "muon" for the matrices inside blocks and MLPs and AdamW for the rest.
        lr: peak learning rate.
        betas: of AdamW.
        weight_decay: on matrices; vectors have none.
        grad_clip: largest norm of the whole gradient.
    """

    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    grad_clip: float = 1.0

    def __post_init__(self):
        if self.optimizer not in ("adamw", "muon"):
            raise InputError(f"optimizer is {self.optimizer!r}: choose adamw or muon")
        for name in ("lr", "grad_clip"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} is {getattr(self, name)}: it must be above 0")
        if self.weight_decay < 0:
            raise InputError(f"weight_decay is {self.weight_decay}: it must be 0 or more")


@dataclass(frozen=True)
class OptimizerConfig:
    """How the parameters move (docs/paper.md section 4).

    Attributes:
        optimizer: "adamw"; "lamb" for the batches of ten thousands for which the paper takes it; "muon" for the
            matrices inside blocks and MLPs, with AdamW for the rest.
        lr: peak learning rate; Muon's means the same as AdamW's, LAMB's is the share of a matrix's norm that a
            step may be.
        vision_lr: peak rate of the vision encoder without the quantizer's MLPs; None takes `lr`.
        text_lr: peak rate of the text encoder; None takes `lr`.
        decoder_lr: peak rate of the decoder; None takes `lr`.
        layer_decay: in both encoders the rate shrinks by this factor with each layer from the top: the final norm
            has the full rate, the last block `layer_decay` times that, the embeddings the least (EVA: 0.75).
        betas: decay of the running mean of gradients and of their squares; Muon has a momentum of 0.95 instead.
        eps: added to the root of the mean square; 1e-6 is that of CLIP and EVA-CLIP.
        weight_decay: on matrices; vectors and scalars have none.
        grad_clip: largest norm of the whole gradient; inf only measures it.
    """

    optimizer: Kind = "adamw"
    lr: float = 5e-4
    vision_lr: float | None = None
    text_lr: float | None = None
    decoder_lr: float | None = None
    layer_decay: float = 1.0
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-6
    weight_decay: float = 0.05
    grad_clip: float = 5.0

    def __post_init__(self):
        if self.optimizer not in ("adamw", "lamb", "muon"):
            raise InputError(f"optimizer is {self.optimizer!r}: choose adamw, lamb or muon")
        for name in ("lr", "eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} is {getattr(self, name)}: it must be above 0")
        for name in ("vision_lr", "text_lr", "decoder_lr", "weight_decay"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise InputError(f"{name} is {value}: it must be 0 or more")
        for name in (f.name for f in fields(self) if f.name.endswith("_weight")):  # the losses' of either stage
            if not getattr(self, name) >= 0:
                raise InputError(f"{name} is {getattr(self, name)}: it must be 0 or more")
        if not self.grad_clip > 0:
            raise InputError(f"grad_clip is {self.grad_clip}: it must be above 0 (inf does not clip)")
        if not 0 < self.layer_decay <= 1:
            raise InputError(f"layer_decay is {self.layer_decay}: it must be above 0 and at most 1 (no decay)")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"betas are {self.betas}: they must be two numbers from 0 to below 1")


def build_optimizer(model: QLIP, config: OptimizerConfig, extra: nn.Module | None = None) -> torch.optim.Optimizer:
    """The optimizer over what of a tokenizer has `requires_grad`, its state in place; build it after sharding.

    Args:
        model: the tokenizer.
        config: the optimizer's kind and settings.
        extra: parameters that a task trains beside the model, with the rate `lr`.

    Returns:
        An optimizer whose groups have a `name`: "vision" (without the quantizer's MLPs), "text", "decoder", or
        "other" for both of the quantizer's MLPs, the projections, the logit scale and `extra`.
    """

    def place(parameter: str) -> tuple[str, float]:
        tower = _tower(parameter)
        own_rate = None if tower == "other" else getattr(config, f"{tower}_lr")
        rate = config.lr if own_rate is None else own_rate
        num_blocks = {"vision": model.config.vision, "text": model.config.text}
        if tower in num_blocks:
            rate *= config.layer_decay ** _layers_above(parameter, num_blocks[tower].num_hidden_layers)
        return tower, rate

    groups = make_groups(model, place, config.weight_decay)
    if extra is not None:
        groups += make_groups(extra, lambda name: ("other", config.lr), config.weight_decay)
    return make_optimizer(config.optimizer, groups, config.betas, config.eps)


def make_optimizer(kind: Kind, groups: Groups, betas: tuple[float, float], eps: float) -> torch.optim.Optimizer:
    """An optimizer over groups of `make_groups`, its state in place."""
    if kind == "adamw":
        return adamw(groups, betas, eps)
    if kind == "muon":
        return Muon(groups, betas, eps)
    optimizer = Lamb(groups, betas=betas, eps=eps)
    init_state(optimizer)
    return optimizer


def is_hidden_matrix(parameter: str, p: Tensor) -> bool:
    """Whether Muon moves a parameter, given its name: a matrix inside a block or an MLP.

    AdamW moves the others: embeddings, positions, vocabularies, projections, output layers, and LoRA's factors.
    MLPs outside blocks are the quantizer's (c_fc, c_proj), the decoder's (ffn), those of text to image (mlp, fc1,
    fc2), and LLaVA's projector (linear_1, linear_2).
    """
    inside = r"(^|\.)((layers\.\d+|mlp)\..*|c_fc|c_proj|ffn\.0|fc1|fc2|linear_1|linear_2)\.weight$"
    return p.ndim == 2 and "lora_" not in parameter and re.search(inside, parameter) is not None


def make_groups(model: nn.Module, place: Callable[[str], tuple[str, float]], weight_decay: float) -> Groups:
    """Parameters with `requires_grad`, grouped by what their update depends on.

    Args:
        model: any module.
        place: from a parameter's name, the name of its group and its peak rate.
        weight_decay: on parameters of two dimensions and more; others have none.

    Returns:
        Groups with `name`, `lr`, `weight_decay`, `hidden` (see `is_hidden_matrix`) and `params`; plain and sharded
        parameters are in different ones.
    """
    groups: dict[tuple, dict[str, Any]] = {}
    for parameter, p in model.named_parameters():
        if p.requires_grad:
            name, lr = place(parameter)
            decay = weight_decay if p.ndim >= 2 else 0.0
            hidden = is_hidden_matrix(parameter, p)
            group = {"name": name, "lr": lr, "weight_decay": decay, "hidden": hidden, "params": []}
            groups.setdefault((name, lr, p.ndim >= 2, hidden, isinstance(p, DTensor)), group)["params"].append(p)
    return list(groups.values())


def adamw(groups: Groups, betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-6) -> torch.optim.Optimizer:
    """Fused AdamW over groups of `make_groups`, its state in place."""
    optimizer = torch.optim.AdamW(groups, betas=betas, eps=eps, fused=True)
    init_state(optimizer)
    return optimizer


def init_state(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter of an AdamW or LAMB the state that its first step would begin with."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            optimizer.state[p] = adam_state(p)


def optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The state by name: "<parameter>.exp_avg", "….exp_avg_sq", "….step"; of Muon's matrices "….momentum_buffer".

    These are the optimizer's own tensors: filling them in place restores it.
    """
    return {
        f"{name}.{key}": value
        for name, p in model.named_parameters()
        if p in optimizer.state
        for key, value in optimizer.state[p].items()
    }


@torch.no_grad()
def clip_gradients(groups: Groups, max_norm: float) -> dict[str, Tensor]:
    """Scale all gradients so that their common norm is at most `max_norm`.

    It does as `torch.nn.utils.clip_grad_norm_`, which takes no mixture of plain and sharded gradients. All
    processes must call it; it costs one collective where there are sharded ones.

    Args:
        groups: of one optimizer or several, with a `name`.
        max_norm: largest norm.

    Returns:
        The norms before: `grad_norm` of all gradients, and `grad_norm/<name>` of all groups of a name. If
        `grad_norm` is not finite, the gradients stay as they are, and no step should be made with them.
    """
    grads = [(group["name"], p.grad) for group in groups for p in group["params"] if p.grad is not None]
    shards = local_shards(grad for _, grad in grads)
    squares = whole_norms(shards, [grad for _, grad in grads]).square().unbind()
    norms = {"grad_norm": torch.stack(squares).sum().sqrt()}
    for name in dict.fromkeys(name for name, _ in grads):
        norms[f"grad_norm/{name}"] = (
            torch.stack([square for square, (own, _) in zip(squares, grads, strict=True) if own == name])
            .sum()
            .sqrt()
        )
    scale = (max_norm / (norms["grad_norm"] + 1e-6)).clamp(max=1)
    torch._foreach_mul_(shards, torch.where(norms["grad_norm"].isfinite(), scale, 1.0))
    return norms


def _tower(parameter: str) -> str:
    if parameter.startswith("vision_model.") and ".quant_embed" not in parameter:
        return "vision"
    return {"text_model": "text", "vision_decoder": "decoder"}.get(parameter.split(".")[0], "other")


def _layers_above(parameter: str, num_blocks: int) -> int:
    """EVA's count: the embeddings lie below the first block, the final norm above the last."""
    if block := re.search(r"\.encoder\.layers\.(\d+)\.", parameter):
        return num_blocks - int(block[1])
    return num_blocks + 1 if ".embeddings." in parameter else 0
