"""How well pictures come back from their tokens, and how few bits those are."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from qlip.errors import InputError
from qlip.eval.batches import Batch, Columns, Pictures, Track, collect
from qlip.eval.features import Features
from qlip.eval.frechet import Statistics
from qlip.eval.metrics import psnr, ssim, to_uint8
from qlip.model.config import QLIPConfig
from qlip.model.qlip import QLIP
from qlip.train.metrics import bit_entropy

AT_ONCE = 25  # pictures in a perceptual network, which is a large one

Distance = Callable[[Tensor, Tensor], Tensor]
"""Of two batches of pictures in [0, 1], such as `qlip.train.perceptual.Perceptual`."""

Pair = tuple[Statistics, Statistics]
"""Of the originals' features, and of what was rebuilt."""


def rebuild(
    model: QLIP,
    batches: Iterable[Batch],
    distances: dict[str, Distance] | None = None,
    features: Sequence[Features] = (),
) -> tuple[Columns, dict[str, Pair]]:
    """Tokenize, rebuild, and compare the 8-bit pictures.

    Args:
        model: with an image processor.
        batches: pictures.
        distances: perceptual ones, by name.
        features: networks for Fréchet distances.

    Returns:
        psnr (dB), ssim, each distance, and tokens (n, N) of every picture; statistics by the metric's name.
    """
    pairs = {f.metric: (Statistics.empty(f.num_features), Statistics.empty(f.num_features)) for f in features}

    def score(batch: Batch) -> dict[str, Tensor]:
        tokens, rebuilt = through_tokens(model, batch)
        for network in features:
            for statistics, pictures in zip(pairs[network.metric], (batch.pictures, rebuilt), strict=True):
                statistics.add(network(pictures))
        return compare(rebuilt, batch.pictures, distances or {}, model.device) | {"tokens": tokens}

    return collect(batches, score), pairs


def through_tokens(model: QLIP, batch: Batch) -> tuple[Tensor, Tensor]:
    """A batch's tokens (B, N), and the pictures that they rebuild, (B, 3, H, W) uint8."""
    tokens = model.tokens_of(batch.pixel_values(model.need_image_processor()).to(model.device)).cpu()
    return tokens, to_uint8(model.detokenize(tokens))


def compare(
    rebuilt: Tensor, original: Tensor, distances: dict[str, Distance], device: torch.device
) -> dict[str, Tensor]:
    """psnr, ssim and perceptual distances (B,) of pictures (B, 3, H, W) uint8."""
    found = {"psnr": psnr(rebuilt, original), "ssim": ssim(rebuilt, original)}
    for name, distance in distances.items():
        parts = zip(rebuilt.split(AT_ONCE), original.split(AT_ONCE), strict=True)
        found[name] = torch.cat([distance(a.to(device) / 255, b.to(device) / 255).cpu() for a, b in parts])
    return found


def code_use(tokens: Tensor, num_bits: int) -> dict[str, float]:
    """How much of the code is used.

    Args:
        tokens: (B, N) int64.
        num_bits: L.

    Returns:
        bit_entropy: the sum of each bit's own entropy over all tokens, in [0, L] bits; distinct_tokens: how
        many different ids there are, as a share of all tokens.
    """
    share = torch.stack([(tokens >> i & 1).double().mean() for i in range(num_bits)])
    return {"bit_entropy": float(bit_entropy(share)), "distinct_tokens": tokens.unique().numel() / tokens.numel()}


def rate(config: QLIPConfig) -> dict[str, float]:
    """What a picture's tokens take.

    Returns:
        bits_per_image; bits_per_pixel; compression_ratio, against RGB of 8 bits a channel.
    """
    height, width = config.size
    bits = config.num_tokens * config.num_bits
    pixels = height * width
    return {
        "bits_per_image": bits,
        "bits_per_pixel": bits / pixels,
        "compression_ratio": 24 * pixels / bits,
    }


def reconstruction(
    model: QLIP, samples: Sequence[dict], track: Track = iter, perceptual: Distance | None = None
) -> dict[str, float]:
    """Tokenize, rebuild and compare samples at the model's size (resize of the short side, centre crop).

    Args:
        model: with an image processor.
        samples: dicts with `image`, encoded bytes.
        track: shows progress.
        perceptual: a perceptual distance.

    Returns:
        psnr (dB), ssim and, with that distance, perceptual, each the mean over pictures, and what `code_use` says
        of their tokens.
    """
    if not samples:
        raise InputError("no pictures to rebuild")
    pictures = Pictures(samples, model.need_image_processor())
    distances = {"perceptual": perceptual} if perceptual else {}
    columns, _ = rebuild(model, track(pictures.batches()), distances)
    return columns.means() | code_use(columns["tokens"], model.config.num_bits)
