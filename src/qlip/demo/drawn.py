"""What the bundled models that write tokens make, for the demo: pictures from words, and words from pictures."""

from collections.abc import Callable
from typing import Any

from PIL import Image
from torch import nn

from qlip.demo.summary import Drawing, Unified, Writer
from qlip.eval.codecs import write_lossless
from qlip.model.qlip import QLIP
from qlip.t2i import checkpoint as t2i
from qlip.t2i.pipeline import load_t2i
from qlip.um3 import checkpoint as um3
from qlip.um3.pipeline import load_um3

PROMPTS = ("a photo of a goldfish.", "a photo of a lemon.", "a photo of an alp.", "a photo of a jellyfish.")
BEGINNING = "One day, a little girl named Lily"
NUM, CFG = 6, 3.0


def draw_prompts(tokenizer: QLIP) -> Writer | None:
    """Pictures by the bundled text-to-image model; None if there is none of these ids."""
    name = _of_ids(t2i.bundled(), lambda name: t2i.read_config(t2i.find(name)), tokenizer)
    if name is None:
        return None
    model = load_t2i(name, tokenizer=tokenizer, device=tokenizer.device)
    return Writer(name, _size(model.model), CFG, _rows(model.generate(PROMPTS, NUM, cfg=CFG)))


def use_unified(tokenizer: QLIP, photos: list[bytes]) -> Unified | None:
    """What the bundled model of text and images says of photographs, draws and tells; None if there is none."""
    name = _of_ids(um3.bundled(), lambda name: um3.read_config(um3.find(name)), tokenizer)
    if name is None:
        return None
    model = load_um3(name, tokenizer=tokenizer, device=tokenizer.device)
    writer = Writer(name, _size(model.model), CFG, _rows(model.draw(PROMPTS, NUM, cfg=CFG)))
    (story,) = model.complete(BEGINNING, max_tokens=60)
    return Unified(writer, tuple(model.caption(photos)), BEGINNING, story.removeprefix(BEGINNING))


def _of_ids(names: list[str], config: Callable[[str], Any], tokenizer: QLIP) -> str | None:
    own = tokenizer.id_hash(), tokenizer.config.grid
    return next((name for name in names if (config(name).id_hash, config(name).grid) == own), None)


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _rows(pictures: list[Image.Image]) -> tuple[Drawing, ...]:
    files = [write_lossless(picture) for picture in pictures]
    return tuple(Drawing(prompt, tuple(files[NUM * i :][:NUM])) for i, prompt in enumerate(PROMPTS))
