"""How the codes of a batch are used, measured during training at no cost worth speaking of."""

import math

import torch
from torch import Tensor

from qlip.model.quantizer import group_tokens
from qlip.train.distributed import average


@torch.no_grad()
def code_metrics(codes: Tensor) -> dict[str, Tensor]:
    """What `code_use` needs of some of the batch's codes (B, N, L); parts are averaged."""
    tokens = group_tokens(codes, codes.shape[-1])
    return {
        "mean_bit": (codes > 0).float().mean((0, 1)),
        "distinct_tokens": torch.tensor(tokens.unique().numel() / tokens.numel(), device=codes.device),
    }


@torch.no_grad()
def code_use(metrics: dict[str, Tensor]) -> dict[str, Tensor]:
    """Code use over all ranks, from the averages of `code_metrics`; nothing where there were no codes.

    Returns:
        bit_entropy: the sum of each bit's own entropy over the batch, in [0, L] bits; distinct_tokens: how many
        different ids a part of the batch has, as a share of its tokens.
    """
    if "mean_bit" not in metrics:
        return {}
    share = average(metrics["mean_bit"])
    return {"bit_entropy": bit_entropy(share), "distinct_tokens": metrics["distinct_tokens"]}


def bit_entropy(share: Tensor) -> Tensor:
    """Σ over bits of each one's own entropy, in [0, L] bits, from the share (L,) of codes in which it is set."""
    return torch.special.entr(torch.stack((share, 1 - share))).sum() / math.log(2)
