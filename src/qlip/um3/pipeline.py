"""From words to pictures, from pictures to words, from words to words: a UM3 and its two tokenizers."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer

from qlip.environment import resolve_device
from qlip.errors import InputError, as_integer
from qlip.lm.generate import GREEDY, Sampling
from qlip.lm.seeded import answered, check_guidance, seeded
from qlip.model.checkpoint import load_for
from qlip.model.image import to_pictures
from qlip.model.qlip import QLIP
from qlip.model.text import check_text
from qlip.precision import warn_if_slow
from qlip.um3.checkpoint import check_words, find, load, open_tokenizer
from qlip.um3.model import PUBLISHED, UM3

DEFAULT = "um3-tiny"
_BYTE = "<0x{:02X}>"  # how a vocabulary with byte fallback, such as Llama's, names its bytes
NO_CAPTION = "say what should be in the picture"


def load_um3(
    name: str | os.PathLike[str] = DEFAULT,
    *,
    tokenizer: str | os.PathLike[str] | QLIP | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> "UnifiedModel":
    """Load a model of text and images with all that it needs.

    Args:
        name: a bundled name, or its folder, such as RUN/model.
        tokenizer: of its pictures: one with the same ids, whose decoder may be better; None: the one that it was
            trained with.
        device: where all go; "auto" takes a GPU if there is one.
        dtype: of the model's weights; the tokenizer is float32.

    Raises:
        InputError: there is no such model, its tokenizer is missing, or has other ids or another grid.
    """
    folder, place = find(name), resolve_device(device)
    warn_if_slow(place, dtype)
    model, words = load(folder, device=place, dtype=dtype), open_tokenizer(folder)
    config = model.config
    check_words(config, words)
    images = load_for(os.fspath(name), tokenizer, config.tokenizer, config.id_hash, place)
    if images.config.grid != config.grid:
        raise InputError(
            f"{images.name!r} makes {images.config.grid} tokens of a picture, but {os.fspath(name)!r} reads "
            f"{config.grid}: load the tokenizer with the image_size that gives them, and pass it"
        )
    return UnifiedModel(model, images, words)


class UnifiedModel:
    """A model of text and images, ready to use.

    Attributes:
        model: goes on from ids.
        tokenizer: of pictures.
        words: of text.
        published: how it draws where nothing else is said.
    """

    published = PUBLISHED

    def __init__(self, model: UM3, tokenizer: QLIP, words: Tokenizer):
        self.model, self.tokenizer, self.words = model, tokenizer, words
        ids = {words.token_to_id(_BYTE.format(byte)): byte for byte in range(256)}
        self._bytes = {i: byte for i, byte in ids.items() if i is not None}  # empty for a byte-level vocabulary

    def caption(
        self,
        images: Any,
        *,
        temperature: float = 0.0,
        top_p: float = PUBLISHED.top_p,
        seed: int = 0,
        max_tokens: int = 64,
        batch_size: int = 16,
    ) -> list[str]:
        """Describe pictures.

        Args:
            images: one or many; see `QLIP.tokenize`.
            temperature: 0 takes the likeliest words; above, they are drawn.
            top_p: see `qlip.lm.generate.Sampling`.
            seed: of each picture's words.
            max_tokens: the longest caption, in ids.
            batch_size: pictures at once.

        Raises:
            InputError: a picture cannot be read, or a setting is out of its range.
        """
        sampling = replace(GREEDY, temperature=temperature, top_p=top_p)
        _check_tokens(max_tokens)

        def describe(rows: list[torch.Tensor], seeds: list[int]) -> list[str]:
            captions = self.model.caption(torch.stack(rows), sampling, seeds, max_tokens)
            return [self._read(ids).strip() for ids in captions]

        return seeded(list(self.tokenizer.tokenize(images)), describe, 1, seed, batch_size)

    def draw(
        self,
        prompts: str | Sequence[str],
        num: int = 1,
        *,
        cfg: float = 1.0,
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
            prompts: captions of what is to be drawn, one or many.
            num: pictures of each.
            cfg: how strongly the prompt counts: 1 is the model's own distribution, more than 1 is guided.
            seed: of the first picture of each prompt.
            temperature, top_k, top_p: see `qlip.lm.generate.Sampling`.
            batch_size: pictures at once.
            track: shows progress.

        Returns:
            len(prompts) · num pictures, those of a prompt together.

        Raises:
            InputError: a prompt is empty or leaves no room for a picture, or a setting is out of its range.
        """
        sampling = _sampling(cfg, temperature, top_k, top_p)
        captions = self._write(prompts, NO_CAPTION)
        self.model.check_captions(captions)
        return seeded(captions, partial(self._draw, sampling), num, seed, batch_size, track)

    def draw_rows(
        self,
        rows: Sequence[tuple[str, int]],
        *,
        cfg: float = 1.0,
        temperature: float = PUBLISHED.temperature,
        top_k: int = PUBLISHED.top_k,
        top_p: float = PUBLISHED.top_p,
        batch_size: int = 16,
    ) -> Iterator[Image.Image]:
        """Draw a picture for each prompt and seed, for benchmarks: given as they are made.

        Args:
            rows: prompts with their seeds; unlike `draw`, of a text that is too long the beginning is read.
            cfg, temperature, top_k, top_p: see `draw`.
            batch_size: pictures at once.

        Raises:
            InputError: see `draw`.
        """
        sampling, most = _sampling(cfg, temperature, top_k, top_p), self.model.config.max_caption_tokens

        def draw(prompts: list[str], seeds: list[int]) -> list[Image.Image]:
            return self._draw(sampling, [ids[:most] for ids in self._write(prompts, NO_CAPTION)], seeds)

        return answered(rows, draw, batch_size)

    def describe(self) -> dict[str, Any]:
        """What of it a benchmark's record should name."""
        most = self.model.config.max_caption_tokens
        return {"tokenizer": self.tokenizer.name, "condition": "captions", "text": f"cut to {most} tokens"}

    def complete(
        self,
        texts: str | Sequence[str],
        num: int = 1,
        *,
        seed: int = 0,
        temperature: float = PUBLISHED.temperature,
        top_k: int = PUBLISHED.top_k,
        top_p: float = PUBLISHED.top_p,
        max_tokens: int = 128,
        batch_size: int = 16,
    ) -> list[str]:
        """Go on with texts, in words.

        Args:
            texts: beginnings, one or many.
            num: continuations of each.
            seed: of the first one of each text; the next has one more.
            temperature, top_k, top_p: see `qlip.lm.generate.Sampling`.
            max_tokens: the most that is added to a text, in ids; the context may leave less.
            batch_size: texts at once.

        Returns:
            len(texts) · num texts, beginnings included.

        Raises:
            InputError: a text is empty or fills the context, or a setting is out of its range.
        """
        sampling = replace(PUBLISHED, temperature=temperature, top_k=top_k, top_p=top_p)
        _check_tokens(max_tokens)
        given = [texts] if isinstance(texts, str) else list(texts)
        rows = list(zip(given, self._write(given, "give it a beginning"), strict=True))

        def go_on(part: list[tuple[str, list[int]]], seeds: list[int]) -> list[str]:
            beginnings = [ids for _, ids in part]
            new = self.model.complete(beginnings, sampling, seeds, max_tokens)
            return [
                text + self._read(ids + more)[len(self._read(ids)) :]  # alone, new ids would lose a space before
                for (text, ids), more in zip(part, new, strict=True)
            ]

        return seeded(rows, go_on, num, seed, batch_size)

    def _draw(self, sampling: Sampling, captions: list[list[int]], seeds: list[int]) -> list[Image.Image]:
        tokens = self.model.draw(captions, sampling, seeds)
        return to_pictures(self.tokenizer.detokenize(tokens, self.model.config.grid))

    def _write(self, texts: str | Sequence[str], remedy: str) -> list[list[int]]:
        """Texts to ids."""
        given = [texts] if isinstance(texts, str) else list(texts)
        if not given:
            raise InputError(f"there are no prompts: {remedy}")
        if not all(check_text(text).strip() for text in given):
            raise InputError(f"a prompt is empty: {remedy}")
        return [self.words.encode(text, add_special_tokens=False).ids for text in given]

    def _read(self, ids: list[int]) -> str:
        """Ids to text, without bytes that make no whole character.

        Otherwise the decoder would give a replacement sign for each byte beside them too, also of characters that
        are whole.
        """
        kept: list[int] = []
        ids_of = {byte: i for i, byte in self._bytes.items()}
        for is_byte, run in groupby(ids, self._bytes.__contains__):
            if is_byte:
                whole = bytes(self._bytes[i] for i in run).decode(errors="ignore").encode()
                kept += (ids_of[byte] for byte in whole)
            else:
                kept += run
        return self.words.decode(kept)


def _sampling(cfg: float, temperature: float, top_k: int, top_p: float) -> Sampling:
    check_guidance(cfg, 3.0)
    return replace(PUBLISHED, guidance_scale=cfg, temperature=temperature, top_k=top_k, top_p=top_p)


def _check_tokens(max_tokens: int) -> None:
    if as_integer("max_tokens", max_tokens) < 1:
        raise InputError(f"max_tokens is {max_tokens}: it must be at least 1")
