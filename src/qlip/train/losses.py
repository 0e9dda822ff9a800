"""The losses of both stages, each a function of tensors."""

import torch.nn.functional as F
from torch import Tensor


def contrastive_loss(logits_per_image: Tensor, group: Tensor | None = None) -> Tensor:
    """Symmetric InfoNCE; samples of one group are each other's positives.

    Each image's target is shared equally among the texts of its group, and each text's among the images.
    With all groups different (or None) this is plain InfoNCE.

    Args:
        logits_per_image: (B, B), exp(logit_scale) · cosine.
        group: (B,) integers, equal where captions mean the same.

    Returns:
        (), the mean of the cross-entropies in both directions, in nats.
    """
    same = (group[:, None] == group[None]).float() if group is not None else _eye_like(logits_per_image)
    targets = same / same.sum(1, keepdim=True)  # `same` is symmetric, so both directions share it
    return (F.cross_entropy(logits_per_image, targets) + F.cross_entropy(logits_per_image.T, targets)) / 2


def pixel_mse(reconstructions: Tensor, pixel_values: Tensor, scale: Tensor) -> Tensor:
    """Mean squared error in a pixel space that is `scale` times the normalised one.

    Args:
        reconstructions, pixel_values: (B, 3, H, W) normalised.
        scale: (3,) per channel: the processor's std for an error in [0,1] pixels, ones for normalised ones.

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


def _eye_like(x: Tensor) -> Tensor:
    return x.new_zeros(x.shape).fill_diagonal_(1)
