"""From words to pictures: a text-to-image model, what reads its prompts, and the tokenizer of its pictures."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor

from qlip.environment import resolve_device
from qlip.errors import InputError, as_integer
from qlip.lm.generate import Sampling
from qlip.lm.seeded import answered, check_guidance, seeded
from qlip.model.checkpoint import load_for
from qlip.model.image import to_pictures
from qlip.model.qlip import QLIP
from qlip.precision import warn_if_slow
from qlip.t2i.checkpoint import load
from qlip.t2i.condition import TextReader, check_prompt, open_reader
from qlip.t2i.model import PUBLISHED, T2I


def load_t2i(
    name: str | os.PathLike[str] = "t2i-tiny",
    *,
    tokenizer: str | os.PathLike[str] | QLIP | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> "TextToImage":
    """Load a text-to-image model with all that it needs.

    Args:
        name: a bundled one, or a folder, such as RUN/model.
        tokenizer: that draws its tokens: one with the same ids, whose decoder may be better; None: the one that it
            was trained with.
        device: where all go; "auto" takes a GPU if there is one.
        dtype: of the model's weights; tokenizer and text encoder are float32.

    Raises:
        InputError: there is no such model, its encoder or tokenizer is missing, or the tokenizer has other ids.
    """
    place = resolve_device(device)
    warn_if_slow(place, dtype)
    model = load(name, device=place, dtype=dtype)
    config, reader = model.config, None
    tokenizer = load_for(os.fspath(name), tokenizer, config.tokenizer, config.id_hash, place)
    if not config.with_classes:
        reader = open_reader(config.condition, tokenizer, config.num_text_tokens, place)
    return TextToImage(model, tokenizer, reader)


class TextToImage:
    """A text-to-image model, ready to draw.

    Attributes:
        model: draws tokens.
        tokenizer: turns them into pictures.
        reader: gives the prompts' features; None where prompts are labels.
        published: how it draws where nothing else is said.
    """

    published = PUBLISHED

    def __init__(self, model: T2I, tokenizer: QLIP, reader: TextReader | None):
        self.model, self.tokenizer, self.reader = model, tokenizer, reader

    def generate(
        self,
        prompts: str | int | Sequence[str] | Sequence[int],
        num: int = 1,
        *,
        cfg: float = PUBLISHED.guidance_scale,
        seed: int = 0,
        temperature: float = PUBLISHED.temperature,
        top_k: int = PUBLISHED.top_k,
        top_p: float = PUBLISHED.top_p,
        batch_size: int = 16,
        track: Callable[[Iterable], Iterable] = iter,
    ) -> list[Image.Image]:
        """Draw pictures.

        Picture k of a prompt has the seed `seed + k`: it is the same whatever the other prompts are, and how many.

        Args:
            prompts: one or many; of a model of labels their numbers.
            num: pictures of each.
            cfg: how strongly the prompt counts: 1 is the model's own distribution, more than 1 is guided.
            seed: of the first picture of each prompt.
            temperature, top_k, top_p: see `qlip.lm.generate.Sampling`.
            batch_size: pictures at once.
            track: shows progress.

        Returns:
            len(prompts) · num pictures, those of a prompt together.

        Raises:
            InputError: a prompt is empty or longer than the model reads, or a setting is out of its range.
        """
        sampling = _sampling(cfg, temperature, top_k, top_p)
        several = isinstance(prompts, Iterable) and not isinstance(prompts, str)
        conditions = self.read(list(cast(Iterable, prompts)) if several else [cast(str | int, prompts)])
        return seeded(conditions, partial(self._draw, sampling), num, seed, batch_size, track)

    def draw_rows(
        self,
        rows: Sequence[tuple[str, int]],
        *,
        cfg: float = PUBLISHED.guidance_scale,
        temperature: float = PUBLISHED.temperature,
        top_k: int = PUBLISHED.top_k,
        top_p: float = PUBLISHED.top_p,
        batch_size: int = 16,
    ) -> Iterator[Image.Image]:
        """Draw a picture for each prompt and seed, for benchmarks: given as they are made, texts read as needed.

        Args:
            rows: prompts with their seeds; unlike `generate`, of a text that is too long the beginning is read.
            cfg, temperature, top_k, top_p: see `generate`.
            batch_size: pictures at once.

        Raises:
            InputError: see `generate`.
        """
        sampling = _sampling(cfg, temperature, top_k, top_p)

        def draw(prompts: list[str], seeds: list[int]) -> list[Image.Image]:
            read = {prompt: self.read([prompt], whole=False)[0] for prompt in set(prompts)}
            return self._draw(sampling, [read[prompt] for prompt in prompts], seeds)

        return answered(rows, draw, batch_size)

    def describe(self) -> dict[str, Any]:
        """What of it a benchmark's record should name."""
        config = self.model.config
        about = {"tokenizer": self.tokenizer.name, "condition": config.condition}
        return about if config.with_classes else about | {"text": f"cut to {config.num_text_tokens} tokens"}

    def read(self, prompts: Sequence[str | int], whole: bool = True) -> list[Tensor]:
        """Prompts as `T2I.generate` takes them; without `whole`, long ones cut to what the model reads.

        Raises:
            InputError: there are none, one is empty, too long or no valid text, or no label where the model knows
                labels.
        """
        if not prompts:
            raise InputError("there are no prompts: give at least one")
        if self.reader is None:
            return [self._label(prompt) for prompt in prompts]
        texts = [check_prompt(prompt) for prompt in prompts]
        return [self.reader([text], whole=whole)[0] for text in texts]  # alone: so company rounds nothing

    def _label(self, prompt: str | int) -> Tensor:
        most = self.model.config.num_classes
        try:
            label = int(prompt) if isinstance(prompt, str) else as_integer("label", prompt)
        except ValueError:
            label = -1
        if not 0 <= label < most:
            raise InputError(
                f"this model draws classes, and {prompt!r} is none: use a number from 0 to {most - 1}"
            )
        return torch.tensor(label)

    def _draw(self, sampling: Sampling, conditions: list[Tensor], seeds: list[int]) -> list[Image.Image]:
        tokens = self.model.generate(conditions, sampling, seeds)
        return to_pictures(self.tokenizer.detokenize(tokens, self.model.config.grid))


def _sampling(cfg: float, temperature: float, top_k: int, top_p: float) -> Sampling:
    check_guidance(cfg, PUBLISHED.guidance_scale)
    return replace(PUBLISHED, guidance_scale=cfg, temperature=temperature, top_k=top_k, top_p=top_p)
