"""What a training sample costs to compute, and what a device can compute: together the model FLOPs utilization."""

import re
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from qlip.model.checkpoint import skeleton
from qlip.model.config import QLIPConfig

# Dense bfloat16 with float32 accumulation, FLOP/s, from the makers' data sheets (V100 and T4 have float16 only).
# The first row whose words are all in the device's name holds.
PEAK_FLOPS: dict[str, float] = {
    "GB200": 2.5e15,
    "B200": 2.25e15,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "GH200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A40": 150e12,
    "A30": 165e12,
    "A10": 125e12,
    "A10G": 70e12,
    "RTX 5090": 209e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "V100": 125e12,
    "T4": 65e12,
    "MI300X": 1307e12,
}


def flops_per_image(
    config: QLIPConfig,
    text_length: int = 0,
    rebuilt: float = 1.0,
    drop_tokens: float = 0.0,
    frozen_encoder: bool = False,
) -> float:
    """Floating-point operations to train on one image–text pair: forward and backward, by PyTorch's own count.

    Matrix products, attention and convolution count, at two operations a multiply–add; causal attention counts in
    full. What is computed again to save memory does not (Chowdhery et al. 2022, arXiv 2204.02311, appendix B), so
    that the utilization compares settings. Losses are left out, and with them the comparison of the batch's
    embeddings and stage 2's perceptual network and discriminator: there it is the tokenizer's utilization alone.

    Args:
        config: the tokenizer.
        text_length: tokens of a text; 0 without the text tower.
        rebuilt: share of the images that is quantized and decoded, in [0, 1].
        drop_tokens: share of the patches that the other images leave out, in [0, 1).
        frozen_encoder: the vision encoder goes forward only, as in stage 2; the quantizer's MLPs train.
    """
    model = skeleton(config).to("meta")  # the rotary tables are made on the CPU
    model.requires_grad_(True)
    if frozen_encoder:
        model.vision_model.embeddings.requires_grad_(False)
        model.vision_model.encoder.requires_grad_(False)

    def encode(num_patches: int, quantized: bool) -> Tensor:
        pixel_values = torch.empty(1, config.vision.num_channels, *config.size, device="meta")
        hidden = model.hidden_states(pixel_values, torch.arange(num_patches, device="meta"))
        features = model.compress(hidden[:, 1:]) if quantized else hidden[:, :1]
        return features.sum() + model.project(hidden[:, 0]).sum() if text_length else features.sum()

    def decode() -> Tensor:
        codes = torch.empty(1, config.num_tokens, config.num_bits, device="meta", requires_grad=True)
        return model.decode(codes).sum()

    def read() -> Tensor:
        return model.encode_text(torch.empty(1, text_length, dtype=torch.long, device="meta")).sum()

    all_patches, fewer = config.num_tokens, num_kept(config.num_tokens, drop_tokens)
    flops = rebuilt * (_count(lambda: encode(all_patches, True)) + _count(decode))
    flops += (1 - rebuilt) * _count(lambda: encode(fewer, False)) if rebuilt < 1 else 0
    return flops + _count(read) if text_length else flops


def num_kept(num_patches: int, drop_tokens: float) -> int:
    """How many of an image's patches are left, at least one, when a share of them in [0, 1) is dropped."""
    return max(1, round(num_patches * (1 - drop_tokens)))


def peak_flops(device: torch.device | str) -> float | None:
    """FLOP/s that a device's maker promises for dense bfloat16 products; None where we do not know, as on CPUs."""
    if torch.device(device).type != "cuda":
        return None
    words = set(re.split(r"[^A-Za-z0-9]+", torch.cuda.get_device_name(device)))
    if words & {"MIG", "Laptop", "Ti", "D"}:  # a slice of the chip, or another chip of the same number
        return None
    return next((peak for name, peak in PEAK_FLOPS.items() if words.issuperset(name.split())), None)


def _count(loss: Callable[[], Tensor]) -> float:
    with FlopCounterMode(display=False) as counter:
        loss().backward()
    return counter.get_total_flops()
