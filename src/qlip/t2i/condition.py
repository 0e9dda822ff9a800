"""What a picture is made after: features of texts, token by token, by whoever reads them.

A `TextReader` gives each text's features (T, W). There are three: the tokenizer's own text tower, any encoder of
`transformers` (`qlip.t2i.transformers_reader`), and files of features computed before.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qlip.errors import InputError, one_line
from qlip.files import save_tensors, whole_file
from qlip.model.qlip import QLIP
from qlip.model.text import check_text

OWN = "qlip"  # the condition that is the tokenizer's text tower
BATCH_SIZE = 32


class TextReader(Protocol):
    """From texts to features.

    Attributes:
        name: of `T2IConfig.condition`.
        width: W.
        num_text_tokens: the most that a text has.
    """

    name: str
    width: int
    num_text_tokens: int

    def __call__(self, texts: Sequence[str], whole: bool = False) -> list[Tensor]:
        """Features (T, W) of each text, float32; longer ones are cut.

        Args:
            texts: not empty.
            whole: do not cut.

        Raises:
            InputError: a text cannot be read, or with `whole` is too long.
        """


def open_reader(
    condition: str, tokenizer: QLIP | None, num_text_tokens: int, device: torch.device | str
) -> TextReader:
    """The reader that a model's `condition` names.

    Args:
        condition: "qlip", or a folder or hub id for `transformers`.
        tokenizer: whose text tower "qlip" is.
        num_text_tokens: the most of a text that is read.
        device: where.

    Raises:
        InputError: the tokenizer has no words, or `transformers` or the encoder is missing.
    """
    if condition == OWN:
        if tokenizer is None:
            raise InputError(f"condition {OWN!r} is the tokenizer's text tower: name the tokenizer")
        return TowerReader(tokenizer, num_text_tokens)
    from qlip.t2i.transformers_reader import TransformersReader

    return TransformersReader(condition, num_text_tokens, device)


class TowerReader:
    """The states of a tokenizer's text tower, from the beginning to the end of a text, before pooling."""

    name = OWN

    def __init__(self, model: QLIP, num_text_tokens: int):
        """Hold the tokenizer.

        Raises:
            InputError: it has no text vocabulary.
        """
        self.model, self.vocabulary = model, model.need_text_tokenizer()
        self.width = model.config.text.hidden_size
        self.num_text_tokens = min(num_text_tokens, self.vocabulary.context_length)

    @torch.no_grad()
    def __call__(self, texts: Sequence[str], whole: bool = False) -> list[Tensor]:
        """See `TextReader`."""
        if whole:
            for text in texts:
                length = len(self.vocabulary.backend.encode(text, add_special_tokens=False).ids) + 2
                check_length(text, length, self.num_text_tokens)
        input_ids, attention_mask = self.vocabulary(texts)
        lengths = attention_mask.sum(1).clamp(max=self.num_text_tokens).tolist()
        input_ids = input_ids[:, : max(lengths)].to(self.model.device)  # causal: the cut changes nothing before it
        states = self.model.text_model.states(input_ids).float()
        return [row[:length] for row, length in zip(states, lengths, strict=True)]


def write_features(
    path: str | os.PathLike[str],
    reader: TextReader,
    texts: Iterable[str],
    dtype: torch.dtype = torch.float16,
    track: Callable[[Iterable], Iterable] = iter,
) -> int:
    """Compute the features of texts once, for `FeatureFiles`. The file must fit into memory; take several.

    Args:
        path: the new file, .safetensors.
        reader: what computes them.
        texts: each is kept once.
        dtype: of the features in the file.
        track: shows progress.

    Returns:
        how many texts it holds.

    Raises:
        InputError: there are none, features do not fit the dtype, or the file cannot be written.
    """
    by_hash = {_hash(text): text for text in texts}
    if not by_hash:
        raise InputError("there are no texts to read: the token files need captions, `qlip tokenize --keep`")
    hashes = sorted(by_hash)
    rows: list[Tensor] = []
    for i in track(range(0, len(hashes), BATCH_SIZE)):
        rows += (row.to("cpu", dtype) for row in reader([by_hash[h] for h in hashes[i : i + BATCH_SIZE]]))
    features = torch.cat(rows)
    if not features.isfinite().all():
        raise InputError(f"features of {reader.name!r} do not fit {dtype}: choose another dtype")
    ends = torch.tensor([len(row) for row in rows]).cumsum(0)
    about = {"reader": reader.name, "num_text_tokens": str(reader.num_text_tokens)}
    with whole_file(Path(path)) as unfinished:
        save_tensors({"features": features, "ends": ends, "hashes": torch.tensor(hashes)}, unfinished, about)
    return len(hashes)


class FeatureFiles:
    """Features that `write_features` computed, mapped from the files; found by a hash of 63 bits of the text."""

    def __init__(self, paths: Sequence[str | os.PathLike[str]]):
        """Open the files.

        Raises:
            InputError: one is no such file, or they are of different readers.
        """
        self._files = [_FeatureFile(Path(path)) for path in paths]
        kinds = {(file.name, file.width, file.num_text_tokens) for file in self._files}
        if len(kinds) != 1:
            raise InputError(f"feature files are of several readers, {sorted(kinds)}: give those of one")
        ((self.name, self.width, self.num_text_tokens),) = kinds

    def __call__(self, texts: Sequence[str], whole: bool = False) -> list[Tensor]:
        """See `TextReader`; what was cut was cut before."""
        return [self._find(text) for text in texts]

    def holds(self, text: str) -> bool:
        """Whether a file has the features of a text."""
        number = _hash(text)
        return any(file.find(number) is not None for file in self._files)

    def _find(self, text: str) -> Tensor:
        number = _hash(text)
        for file in self._files:
            if (found := file.find(number)) is not None:
                return found
        raise InputError(f"no feature file holds the text {text!r}: compute its features, `qlip features`")


class _FeatureFile:
    def __init__(self, path: Path):
        try:
            self._file = safe_open(path, "pt")
            about = self._file.metadata() or {}
            self.name, self.num_text_tokens = about["reader"], int(about["num_text_tokens"])
            self._hashes, self._ends = (self._file.get_tensor(name).numpy() for name in ("hashes", "ends"))
            self._features = self._file.get_slice("features")
            self.width = self._features.get_shape()[1]
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise InputError(
                f"{path} holds no features ({one_line(error)}): `qlip features` writes them"
            ) from error

    def find(self, number: int) -> Tensor | None:
        place = int(np.searchsorted(self._hashes, number))
        if place == len(self._hashes) or self._hashes[place] != number:
            return None
        return self._features[int(self._ends[place - 1]) if place else 0 : int(self._ends[place])].float()


def check_prompt(text: Any) -> str:
    """The prompt, if it asks for anything.

    Raises:
        InputError: it is empty, no string or no valid Unicode.
    """
    if not check_text(text).strip():
        raise InputError("a prompt is empty: say what should be in the picture")
    return text


def check_length(text: str, length: int, most: int) -> None:
    """Whether a prompt is read to its end.

    Raises:
        InputError: it is not.
    """
    if length > most:
        shown = text if len(text) < 60 else f"{text[:60]}…"
        raise InputError(f"the prompt {shown!r} has {length} tokens, this model reads {most}: shorten it")


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(check_text(text).encode(), digest_size=8).digest(), "big") >> 1
