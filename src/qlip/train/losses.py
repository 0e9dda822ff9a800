"""The losses of both stages, each a function of tensors."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from qlip.train.distributed import average, gather_rows, rank


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
    group, groups = _own_and_all(group, image_embeds)
    images, texts = gather_rows(image_embeds), gather_rows(text_embeds)
    directions = ((image_embeds, texts), (text_embeds, images))
    losses = [_mean_over_rows(_cross_entropy, *pair, group, groups, chunk_size, scale) for pair in directions]
    return torch.stack(losses).mean()


def sigmoid_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    scale: Tensor,
    bias: Tensor,
    group: Tensor | None = None,
    chunk_size: int = 4096,
) -> Tensor:
    """SigLIP's loss over the batch of all ranks (arXiv 2303.15343): each pair of image and text by itself.

    A pair of one group is positive, any other negative; with all groups different (or None) the positives are the
    diagonal. Longer batches go chunk by chunk, as in `contrastive_loss`.

    Args:
        image_embeds, text_embeds: (B/W, P) unit vectors of this rank, B in all.
        scale: (), exp(logit_scale).
        bias: (), added to each logit.
        group: (B/W,) integers, equal where captions mean the same.
        chunk_size: rows of logits held at once.

    Returns:
        (), the sum of −log σ(±logit) over all pairs of this rank's images with all texts, divided by B/W, in nats;
        its mean over ranks is the loss of the whole batch, which counts each pair once.
    """
    group, groups = _own_and_all(group, image_embeds)
    texts = gather_rows(text_embeds)
    return _mean_over_rows(_binary_cross_entropy, image_embeds, texts, group, groups, chunk_size, scale, bias)


def _own_and_all(group: Tensor | None, rows: Tensor) -> tuple[Tensor, Tensor]:
    """(B/W,) groups of this rank's rows and (B,) of all; without any, every row is a group of its own."""
    if group is None:
        group = torch.arange(len(rows), device=rows.device) + rank() * len(rows)
    return group, gather_rows(group)


def _mean_over_rows(
    summed: Callable[..., Tensor],
    queries: Tensor,
    keys: Tensor,
    group: Tensor,
    groups: Tensor,
    chunk_size: int,
    *parameters: Tensor,
) -> Tensor:
    """Mean over queries (B/W, P) of a loss that sums over chunks of them; each query meets all keys (B, P)."""
    if len(queries) <= chunk_size:
        return summed(queries, keys, group, groups, *parameters) / len(queries)
    total = queries.new_zeros(())
    for part, own in zip(queries.split(chunk_size), group.split(chunk_size), strict=True):
        total = total + checkpoint(summed, part, keys, own, groups, *parameters, use_reentrant=False)
    return total / len(queries)


def _cross_entropy(queries: Tensor, keys: Tensor, group: Tensor, groups: Tensor, scale: Tensor) -> Tensor:
    same = (group[:, None] == groups[None]).float()
    return F.cross_entropy(scale * queries @ keys.T, same / same.sum(1, keepdim=True), reduction="sum")


def _binary_cross_entropy(
    queries: Tensor, keys: Tensor, group: Tensor, groups: Tensor, scale: Tensor, bias: Tensor
) -> Tensor:
    logits = scale * queries @ keys.T + bias
    same = (group[:, None] == groups[None]).to(logits)
    return F.binary_cross_entropy_with_logits(logits, same, reduction="sum")


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


def teacher_loss(predicted: Tensor, target: Tensor, share: Tensor) -> Tensor:
    """Cosine distance between predicted and a teacher's features, as a weighted mean over samples.

    Args:
        predicted: (B, …, C).
        target: (B, …, C), the teacher's; all 0 where it has none.
        share: (B,) weight of each sample; see `teacher_shares`.

    Returns:
        () float32.
    """
    distance = 1 - F.cosine_similarity(predicted.float(), target.float(), dim=-1)
    return (distance.flatten(1).mean(1) * share).mean() if distance.ndim > 1 else (distance * share).mean()


def teacher_shares(target: Tensor) -> Tensor:
    """Weights that make a mean over all samples one over those that have a teacher's feature, on all ranks.

    Args:
        target: (B/W, C) of this rank, all 0 where there is none; B samples in all.

    Returns:
        (B/W,) float32: B / (number of samples with a feature) for these, 0 for the others.
    """
    known = target.any(1).float()
    return known / average(known.mean()).clamp(min=torch.finfo(torch.float32).tiny)
