"""From words to pictures: a text-to-image model, what reads its prompts, and the tokenizer of its pictures."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from PIL import Image
from torch import Tensor

from qlip.environment import resolve_device
from qlip.errors import InputError
from qlip.lm.generate import Sampling
from qlip.model.checkpoint import load as load_tokenizer
from qlip.model.qlip import QLIP
from qlip.t2i.checkpoint import load
from qlip.t2i.condition import TextReader, check_prompt, open_reader
from qlip.t2i.model import PUBLISHED, T2I

MAX_SEED = 2**63


def load_t2i(
    name: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | QLIP | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> "TextToImage":
    """Load a text-to-image model with all that it needs.

    Args:
        name: its folder, such as RUN/model.
        tokenizer: that draws its tokens: one with the same ids, whose decoder may be better; None: the one that it
            was trained with.
        device: where all go; "auto" takes a GPU if there is one.
        dtype: of the model's weights; tokenizer and text encoder are float32.

    Raises:
        InputError: there is no such model, its encoder or tokenizer is missing, or the tokenizer has other ids.
    """
    place = resolve_device(device)
    model = load(name, device=place, dtype=dtype)
    if not isinstance(tokenizer, QLIP):
        tokenizer = load_tokenizer(tokenizer or model.config.tokenizer, device=place)
    if (found := tokenizer.id_hash()) != model.config.id_hash:
        raise InputError(
            f"{os.fspath(name)!r} was trained on ids {model.config.id_hash} of {model.config.tokenizer!r}, but "
            f"{tokenizer.name!r} makes {found}: name the tokenizer that it was trained with"
        )
    config, reader = model.config, None
    if not config.with_classes:
        reader = open_reader(config.condition, tokenizer, config.num_text_tokens, place)
    return TextToImage(model, tokenizer, reader)


class TextToImage:
    """A text-to-image model, ready to draw.

    Attributes:
        model: draws tokens.
        tokenizer: turns them into pictures.
        reader: gives the prompts' features; None where prompts are labels.
    """

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
        if num < 1 or batch_size < 1:
            raise InputError(f"num is {num} and batch_size {batch_size}: both must be at least 1")
        if not 0 <= seed <= MAX_SEED - num:
            raise InputError(f"seed is {seed}: it must be 0 or more, and below 2^63")
        sampling = _sampling(cfg, temperature, top_k, top_p)
        conditions = self.read([prompts] if isinstance(prompts, str | int) else list(prompts))
        rows = [(condition, seed + k) for condition in conditions for k in range(num)]
        pictures: list[Image.Image] = []
        for start in track(range(0, len(rows), batch_size)):
            pictures += self._draw(rows[start : start + batch_size], sampling)
        return pictures

    def draw(
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
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}: use 1 or more")
        sampling = _sampling(cfg, temperature, top_k, top_p)
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            read = {prompt: self.read([prompt], whole=False)[0] for prompt in {prompt for prompt, _ in part}}
            yield from self._draw([(read[prompt], seed) for prompt, seed in part], sampling)

    def read(self, prompts: Sequence[str | int], whole: bool = True) -> list[Tensor]:
        """Prompts as `T2I.generate` takes them; without `whole`, long ones cut to what the model reads.

        Raises:
            InputError: there are none, one is empty or too long, or is no label where the model knows labels.
        """
        if not prompts:
            raise InputError("there are no prompts: give at least one")
        if self.reader is None:
            return [self._label(prompt) for prompt in prompts]
        texts = [str(prompt) for prompt in prompts]
        for text in texts:
            check_prompt(text)
        return [self.reader([text], whole=whole)[0] for text in texts]  # alone: so company rounds nothing

    def _label(self, prompt: str | int) -> Tensor:
        most = self.model.config.num_classes
        try:
            label = int(prompt)
        except ValueError:
            label = -1
        if not 0 <= label < most:
            raise InputError(
                f"this model draws classes, and {prompt!r} is none: use a number from 0 to {most - 1}"
            )
        return torch.tensor(label)

    def _draw(self, rows: Sequence[tuple[Tensor, int]], sampling: Sampling) -> Iterator[Image.Image]:
        tokens = self.model.generate([condition for condition, _ in rows], sampling, [seed for _, seed in rows])
        for pixels in self.tokenizer.detokenize(tokens, self.model.config.grid):
            picture = pixels.mul(255).round().to(torch.uint8).permute(1, 2, 0)
            yield Image.fromarray(picture.numpy())


def _sampling(cfg: float, temperature: float, top_k: int, top_p: float) -> Sampling:
    if not cfg >= 1:
        raise InputError(f"cfg is {cfg}: use 1 (the prompt as it is) or more, such as {PUBLISHED.guidance_scale}")
    return replace(PUBLISHED, guidance_scale=cfg, temperature=temperature, top_k=top_k, top_p=top_p)
