"""Does a checkpoint hold what it claims? From its keys to a picture that it rebuilds."""

import math
import os
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from qlip.bits import pack
from qlip.errors import InputError
from qlip.eval.metrics import psnr, stack_uint8, to_uint8
from qlip.model.checkpoint import load
from qlip.model.config import PRESETS
from qlip.model.image import ImageProcessor
from qlip.model.qlip import QLIP

# What is known of the published three (docs/paper.md section 1, and their files). An eos_token_id of 2 has a text
# pooled at its largest id.
FACTS = (
    "parameters",
    "image_size",
    "grid_size",
    "projection_dim",
    "num_bits",
    "vision_projection_bias",
    "eos_token_id",
)
PUBLISHED = {
    "b16-256": (239_434_013, 256, 16, 512, 28, True, 2),
    "b8-256": (238_991_069, 256, 32, 512, 28, True, 2),
    "l14-392": (738_111_243, 392, 28, 768, 28, True, 2),
}
NAMES = {"QLIP-B-16-256": "b16-256", "QLIP-B-8-256": "b8-256", "QLIP-L-14-392": "l14-392"}

NOT_RUN = "not run"
PHOTOS = ("astronaut.jpg", "cat.jpg", "coffee.jpg")


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: of the check.
        passed: whether it holds; false too where it was not run.
        detail: what was found, on one line.
    """

    name: str
    passed: bool
    detail: str


def verify(name: str | os.PathLike[str], **options: Any) -> list[Check]:
    """Check a checkpoint; a bad one makes failed checks, not exceptions.

    Args:
        name: as `qlip.load` takes it.
        options: `device`, `dtype` and `revision` of `qlip.load`.

    Returns:
        The checks in order. One that finds several faults names the first. Where the model cannot be loaded,
        the others are not run.
    """
    try:
        model = load(name, **options)
    except Exception as error:  # a file from anywhere may break anything
        return [Check("loads", False, _line(error)), *(Check(title, False, NOT_RUN) for title in CHECKS)]
    loaded = f"{model.name}, {str(model.dtype).removeprefix('torch.')} on {model.device}"
    return [Check("loads", True, loaded), *(_run(title, model) for title in CHECKS)]


def _run(title: str, model: QLIP) -> Check:
    try:
        with torch.inference_mode():
            return Check(title, True, CHECKS[title](model))
    except Exception as error:
        return Check(title, False, _line(error))


def _keys(model: QLIP) -> str:
    return f"{len(model.state_dict())} tensors, as config.json has them"  # or it would not have loaded


def _parameters(model: QLIP) -> str:
    parts = (f"{_size(part):,} {name}" for name, part in model.named_children())
    return f"{_size(model):,}: {', '.join(parts)}"


def _published(model: QLIP) -> str:
    config = model.config
    by_name = [preset for name, preset in NAMES.items() if model.name.endswith(name)]
    claims = by_name or [preset for preset in PUBLISHED if replace(config, image_size=None) == PRESETS[preset]]
    if not claims:
        return "none of the published three"
    found = (
        _size(model),
        config.vision.image_size,
        config.vision.grid_size,
        config.projection_dim,
        config.num_bits,
        config.vision_projection_bias,
        config.text.eos_token_id,
    )
    for fact, value, expected in zip(FACTS, found, PUBLISHED[claims[0]], strict=True):
        _require(value == expected, f"{fact} is {value}, but the published {claims[0]} has {expected}")
    return f"{claims[0]}: {', '.join(FACTS)} are as published"


def _finite(model: QLIP) -> str:
    for name, weight in model.named_parameters():
        _require(bool(weight.isfinite().all()), f"{name} holds values that are not finite")
    return "every value"


def _logit_scale(model: QLIP) -> str:
    value, rounding = float(model.logit_scale), torch.finfo(model.dtype).eps
    _require(0 <= value <= 4.6052 * (1 + rounding), f"{value:.4f} is outside [0, ln 100 = 4.6052]")
    return f"{value:.4f}: cosines are scaled by {math.exp(value):.2f}"


def _preprocessor(model: QLIP) -> str:
    if (processor := model.image_processor) is None:
        return "none: the model takes pixel_values only"
    height, width = processor.size
    return f"the short side to {processor.resize} pixels, the middle {height} × {width}"


def _vocabulary(model: QLIP) -> str:
    tokenizer, eos = model.text_tokenizer, model.config.text.eos_token_id
    if tokenizer is None:
        return "none: the model takes input_ids only"
    pooled = max(tokenizer.backend.get_vocab().values()) if eos == 2 else eos
    _require(
        tokenizer.eos_token_id == pooled,
        f"texts end with id {tokenizer.eos_token_id}, but the text tower reads them off at id {pooled}",
    )
    return f"{tokenizer.vocab_size:,} ids, {tokenizer.context_length} a text"


def _tokens(model: QLIP) -> str:
    num_bits = model.config.num_bits
    generator = torch.Generator().manual_seed(0)
    tokens = pack(torch.randint(2, (8, model.config.num_tokens, num_bits), generator=generator))
    back = model.codes_to_tokens(model.tokens_to_codes(tokens.to(model.device))).cpu()
    changed = int((back != tokens).sum())
    _require(changed == 0, f"{changed} of {tokens.numel()} random tokens change from codes and back")
    return f"{tokens.numel():,} random tokens of {num_bits} bits are the same from codes and back"


def _stability(model: QLIP) -> str:
    """A batch of another size may be summed in another order, which can turn bits whose latent is almost 0."""
    pixel_values = _processor(model)(_photos()).to(model.device)
    alone, again = model.encode(pixel_values[1:2]), model.encode(pixel_values[1:2])
    _require(torch.equal(alone > 0, again > 0), "the same picture gives other tokens the second time")
    among = model.encode(pixel_values)[1:2]
    turned = alone[(alone > 0) != (among > 0)].abs()
    _require(
        bool((turned <= torch.finfo(model.dtype).eps ** 0.5).all()),
        f"{turned.numel()} of {alone.numel()} bits of a picture turn in a batch of {len(PHOTOS)}",
    )
    return f"the same twice; {turned.numel()} of {alone.numel():,} bits turn in a batch of {len(PHOTOS)}"


def _reconstruction(model: QLIP) -> str:
    processor, photo = _processor(model), _photos()[0]
    original = stack_uint8([processor.preprocess(photo)])
    decoded = model.decode(model.quantize(model.encode(processor([photo]).to(model.device))))
    _require(bool(decoded.isfinite().all()), "the rebuilt picture holds values that are not finite")
    score = _psnr(processor.denormalize(decoded.float().cpu()), original)
    flat = _psnr((original / 255).mean((2, 3), keepdim=True).expand(original.shape), original)
    found = f"{PHOTOS[0]} at {score:.2f} dB PSNR; painted in its mean colour it has {flat:.2f}"
    _require(score > flat, found)
    return found


def _ids(model: QLIP) -> str:
    return model.id_hash()


CHECKS = {
    "keys and shapes": _keys,
    "parameters": _parameters,
    "published": _published,
    "finite": _finite,
    "logit_scale": _logit_scale,
    "preprocessor": _preprocessor,
    "vocabulary": _vocabulary,
    "tokens": _tokens,
    "stable": _stability,
    "reconstruction": _reconstruction,
    "ids": _ids,
}


def _processor(model: QLIP) -> ImageProcessor:
    size = model.config.size
    return model.image_processor or ImageProcessor(resize=min(size), crop=size)


def _photos() -> list[bytes]:
    return [(files("qlip") / "demo" / "photos" / name).read_bytes() for name in PHOTOS]


def _psnr(images: Tensor, original: Tensor) -> float:
    return float(psnr(to_uint8(images), original))


def _size(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _require(holds: bool, fault: str) -> None:
    if not holds:
        raise InputError(fault)


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, InputError) else f"{type(error).__name__}: {text}"[:300]
