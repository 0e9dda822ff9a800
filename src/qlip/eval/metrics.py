"""PSNR and SSIM of 8-bit RGB pictures, equal to scikit-image's."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from qlip.errors import InputError


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio.

    Args:
        a, b: (B, 3, H, W) uint8.

    Returns:
        (B,) float64 in dB; infinite where the pictures are equal.
    """
    _check(a, b)
    mse = (a.double() - b.double()).square().mean((1, 2, 3))
    return 10 * torch.log10(255**2 / mse)


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity with a Gaussian window (σ 1.5, 11 × 11), mean over channels (Wang et al. 2004).

    The same as scikit-image's with `gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
    data_range=255`: the border of 5 pixels, where the window does not fit, is left out of the mean.

    Args:
        a, b: (B, 3, H, W) uint8, at least 11 pixels high and wide.

    Returns:
        (B,) float64, at most 1.
    """
    _check(a, b)
    if min(a.shape[-2:]) < 11:
        raise InputError(f"SSIM needs pictures of at least 11 × 11 pixels, not {tuple(a.shape[-2:])}")
    x, y = a.double(), b.double()
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = (_blur(z) for z in (x, y, x * x, y * y, x * y))
    var_x, var_y, cov = mean_xx - mean_x**2, mean_yy - mean_y**2, mean_xy - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    score = (2 * mean_x * mean_y + c1) * (2 * cov + c2)
    score = score / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return score.mean((1, 2, 3))


def to_uint8(images: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1] → uint8, rounded."""
    return (images * 255).round().clamp(0, 255).to(torch.uint8)


def stack_uint8(pictures: list) -> Tensor:
    """PIL pictures of one size → (B, 3, H, W) uint8."""
    return torch.stack([torch.from_numpy(np.array(p.convert("RGB"))).permute(2, 0, 1) for p in pictures])


def _blur(x: Tensor) -> Tensor:
    """Gaussian blur where the whole window fits."""
    offsets = torch.arange(-5, 6, dtype=x.dtype, device=x.device)
    kernel = torch.exp(-(offsets**2) / (2 * 1.5**2))
    kernel = (kernel / kernel.sum()).expand(x.shape[1], 1, 1, 11)
    x = F.conv2d(x, kernel, groups=x.shape[1])
    return F.conv2d(x, kernel.transpose(2, 3), groups=x.shape[1])


def _check(a: Tensor, b: Tensor) -> None:
    for x in (a, b):
        if x.dtype != torch.uint8 or x.ndim != 4:
            raise InputError(f"pictures are {x.dtype} {tuple(x.shape)}: pass (B, 3, H, W) uint8")
    if a.shape != b.shape:
        raise InputError(f"pictures differ in shape: {tuple(a.shape)} and {tuple(b.shape)}")
