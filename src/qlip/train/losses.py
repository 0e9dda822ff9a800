"""The losses of both stages, each a function of tensors."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from qlip.train.distributed import gather_rows, rank


def contrastive_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    scale: Tensor,
    group: Tensor | None = None,
    chunk_size: int = 4096,
) -> Tensor:
    """Symmetric InfoNCE over the batch of all ranks; samples of one group are each other's positives.

    Each image's target is shared equally among the texts of its group, and each text's among the images.
    With all groups different (or None) this is plain InfoNCE. Never are more than chunk_size × B logits held:
    longer batches go chunk by chunk, computed again in the backward pass.

    Args:
        image_embeds, text_embeds: (B/W, P) unit vectors of this rank, B in all.
        scale: (), exp(logit_scale).
        group: (B/W,) integers, equal where captions mean the same.
        chunk_size: rows of logits held at once.

    Returns:
        (), the mean of the cross-entropies in both directions over this rank's rows, in nats; its mean over
        ranks is the loss of the whole batch.
    """
    if group is None:
        group = torch.arange(len(image_embeds), device=image_embeds.device) + rank() * len(image_embeds)
    groups = gather_rows(group)
    images, texts = gather_rows(image_embeds), gather_rows(text_embeds)
    directions = ((image_embeds, texts), (text_embeds, images))
    losses = [_retrieval_loss(*pair, scale, group, groups, chunk_size) for pair in directions]
    return torch.stack(losses).mean()


def _retrieval_loss(
    queries: Tensor, keys: Tensor, scale: Tensor, group: Tensor, groups: Tensor, chunk_size: int
) -> Tensor:
    """Mean cross-entropy of each query's (B/W, P) softmax over all keys (B, P)."""
    if len(queries) <= chunk_size:
        return _summed_cross_entropy(queries, keys, scale, group, groups) / len(queries)
    total = queries.new_zeros(())
    for part, part_group in zip(queries.split(chunk_size), group.split(chunk_size), strict=True):
        total = total + checkpoint(
            _summed_cross_entropy, part, keys, scale, part_group, groups, use_reentrant=False
        )
    return total / len(queries)


def _summed_cross_entropy(queries: Tensor, keys: Tensor, scale: Tensor, group: Tensor, groups: Tensor) -> Tensor:
    same = (group[:, None] == groups[None]).float()
    return F.cross_entropy(scale * queries @ keys.T, same / same.sum(1, keepdim=True), reduction="sum")


PixelScale = Literal["unit", "normalized"]


def pixel_scale(std: Sequence[float], space: PixelScale) -> Tensor:
    """What `pixel_mse` multiplies normalised pixels with: the processor's std to get back to [0, 1], or ones."""
    return torch.tensor(std if space == "unit" else (1.0, 1.0, 1.0))


def pixel_mse(reconstructions: Tensor, pixel_values: Tensor, scale: Tensor) -> Tensor:
    """Mean squared error in a pixel space that is `scale` times the normalised one.

    Args:
        reconstructions, pixel_values: (B, 3, H, W) normalised.
        scale: (3,) per channel; see `pixel_scale`.

    Returns:
        () float32.
    """
    return ((reconstructions.float() - pixel_values.float()) * scale[:, None, None]).square().mean()


def commitment_loss(features: Tensor, quantized_features: Tensor) -> Tensor:
    """‖sg(Ẑ) − Z‖² on the latents outside both MLPs, as a mean over all elements (docs/paper.md section 2).

    Args:
        features: (B, N, D) Z, before the down MLP.
        quantized_features: (B, N, D) Ẑ, after the up MLP.

    Returns:
        () float32.
    """
    return F.mse_loss(features.float(), quantized_features.detach().float())
