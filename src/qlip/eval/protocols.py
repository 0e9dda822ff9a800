"""Evaluation protocols: from a model and samples to named numbers."""

from collections.abc import Callable, Iterable, Sequence

import torch

from qlip.eval.metrics import psnr, ssim, stack_uint8, to_uint8
from qlip.model.qlip import QLIP
from qlip.train.metrics import bit_entropy

BATCH_SIZE = 250

Distance = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

Track = Callable[[Iterable], Iterable]
"""Wraps an iterable to show progress over it."""


@torch.no_grad()
def reconstruction(
    model: QLIP, samples: Sequence[dict], track: Track = iter, perceptual: Distance | None = None
) -> dict[str, float]:
    """Tokenize, rebuild and compare, at the model's size (resize of the short side, centre crop).

    Args:
        model: with an image processor.
        samples: dicts with `image`, encoded bytes.
        track: shows progress.
        perceptual: a distance of two batches of pictures in [0, 1], such as `qlip.train.perceptual.Perceptual`.

    Returns:
        psnr (dB), ssim and, with that distance, perceptual, each the mean over pictures, and what `code_use` says
        of their tokens.
    """
    scores: dict[str, list[torch.Tensor]] = {"psnr": [], "ssim": []}
    tokens = []
    processor = model.need_image_processor()
    for start in track(range(0, len(samples), BATCH_SIZE)):
        batch = samples[start : start + BATCH_SIZE]
        pictures = [processor.preprocess(sample["image"]) for sample in batch]
        tokens.append(model.tokenize(pictures))
        images, original = model.detokenize(tokens[-1]), stack_uint8(pictures)
        rebuilt = to_uint8(images)
        scores["psnr"].append(psnr(rebuilt, original))
        scores["ssim"].append(ssim(rebuilt, original))
        if perceptual is not None:
            pairs = zip(images.split(25), original.split(25), strict=True)  # its network is a large one
            distances = [perceptual(a.to(model.device), b.to(model.device) / 255).cpu() for a, b in pairs]
            scores.setdefault("perceptual", []).extend(distances)
    return {name: float(torch.cat(values).mean()) for name, values in scores.items()} | code_use(
        torch.cat(tokens), model.config.num_bits
    )


def code_use(tokens: torch.Tensor, num_bits: int) -> dict[str, float]:
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


@torch.no_grad()
def zero_shot(
    model: QLIP, samples: Sequence[dict], names: Sequence[str], templates: Sequence[str], track: Track = iter
) -> dict[str, float]:
    """Classify with words: each class is the mean embedding of its name in every template.

    Args:
        model: with image processor and text tokenizer.
        samples: dicts with `image`, encoded bytes, and `label`, an index into `names`.
        names: one name a class.
        templates: sentences with `{}`.
        track: shows progress.

    Returns:
        top1 and top5, shares in [0, 1].
    """
    text = model.embed_labels(names, templates)
    hits = {1: 0, 5: 0}
    for start in track(range(0, len(samples), BATCH_SIZE)):
        batch = samples[start : start + BATCH_SIZE]
        pixel_values = model.need_image_processor()([sample["image"] for sample in batch]).to(model.device)
        best = model.similarity(model.encode_image(pixel_values), text).topk(min(5, len(names))).indices.cpu()
        correct = best == torch.tensor([sample["label"] for sample in batch])[:, None]
        for k in hits:
            hits[k] += int(correct[:, :k].any(1).sum())
    return {f"top{k}": count / len(samples) for k, count in hits.items()}
