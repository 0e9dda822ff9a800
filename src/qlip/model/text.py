"""Words in, `input_ids` out: CLIP's byte-level BPE, read from a checkpoint or trained on captions."""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers.models import BPE
from torch import Tensor, nn

from qlip.errors import InputError, one_line
from qlip.guarded import parse_json

T = TypeVar("T")

BOS_TOKEN, EOS_TOKEN = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class TextTokenizer:
    """Turns texts into ids for the text tower: bos, the text, eos, then padding.

    The ids of bos and eos are those of the vocabulary. (A model config's `eos_token_id` of 2 is CLIP's
    sign for "pool at the largest id", not an id.)

    Attributes:
        backend: the `tokenizers.Tokenizer`.
        context_length: ids a text, bos and eos included.
        vocab_size: how many ids there are; the text tower's token embedding needs as many rows.
        bos_token_id, eos_token_id, pad_token_id: the special ids; CLIP pads with eos.
    """

    def __init__(
        self,
        backend: Tokenizer,
        context_length: int,
        bos_token: str = BOS_TOKEN,
        eos_token: str = EOS_TOKEN,
        pad_token: str | None = None,
    ) -> None:
        """Wrap a vocabulary.

        Args:
            backend: a CLIP-style tokenizer.
            context_length: ids a text, at least 2.
            bos_token: opens a text.
            eos_token: closes a text.
            pad_token: the token that fills up to the context; eos by default.

        Raises:
            InputError: the context is too short, or the vocabulary lacks one of the tokens.
        """
        if context_length < 2:
            raise InputError(f"context_length={context_length}: use at least 2, for the start and end tokens")
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.context_length = context_length
        self.vocab_size = backend.get_vocab_size()
        self.bos_token_id = self._id(bos_token)
        self.eos_token_id = self._id(eos_token)
        self.pad_token_id = self.eos_token_id if pad_token is None else self._id(pad_token)

    def _id(self, token: str) -> int:
        number = self.backend.token_to_id(token)
        if number is None:
            raise InputError(f"the vocabulary has no {token!r}: use a CLIP vocabulary, or name its own token")
        return number

    @classmethod
    def find(cls, folder: str | os.PathLike[str], context_length: int) -> "TextTokenizer | None":
        """Read the vocabulary of a checkpoint folder, if it has one.

        That is `tokenizer.json`, else CLIP's `vocab.json` and `merges.txt`. The special tokens are CLIP's,
        unless `special_tokens_map.json` or `tokenizer_config.json` names others.

        Args:
            folder: where the files are.
            context_length: ids a text.

        Returns:
            The tokenizer, or None if none of the files is there.

        Raises:
            InputError: a file is broken; names it.
        """
        folder = Path(folder)
        file, vocab, merges = (folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
        if file.exists():
            backend = _read(file, Tokenizer.from_str)
        elif vocab.exists() or merges.exists():
            ids = _read(vocab, _parse_vocab)
            backend = _read(merges, lambda text: _clip_backend(ids, _parse_merges(text)))
        else:
            return None
        try:
            return cls(backend, context_length, **_special_tokens(folder))
        except InputError as error:
            raise InputError(f"{str(folder)!r}: {error}") from error

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, context_length: int = 77) -> "TextTokenizer":
        """Learn a small CLIP-style vocabulary from captions.

        The ids are laid out as CLIP's: the 256 bytes, the 256 bytes that end a word, the merges, bos, eos. So
        any string can be encoded, and eos is the largest id.

        Args:
            texts: captions.
            vocab_size: the most ids, at least 514; texts that are few or short give fewer, see `vocab_size`.
            context_length: ids a text.

        Raises:
            InputError: `vocab_size` is below 514.
        """
        alphabet = _alphabet()
        if vocab_size < len(alphabet) + 2:
            raise InputError(f"vocab_size={vocab_size}: use at least {len(alphabet) + 2}, the bytes take that")
        learner = _clip_backend({BOS_TOKEN: 0, EOS_TOKEN: 1}, [])
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 2,
            special_tokens=alphabet,  # first and in this order: ties between merges fall the same every time
            end_of_word_suffix=WORD_END,
            show_progress=False,
        )
        learner.train_from_iterator((check_text(text) for text in texts), trainer)
        model = json.loads(learner.to_str())["model"]
        vocab = model["vocab"] | {BOS_TOKEN: len(model["vocab"]), EOS_TOKEN: len(model["vocab"]) + 1}
        return cls(_clip_backend(vocab, [(a, b) for a, b in model["merges"]]), context_length)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, which `find` and `transformers` read again."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(folder / "tokenizer.json"))
        config = {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": self.context_length,
            "bos_token": self.backend.id_to_token(self.bos_token_id),
            "eos_token": self.backend.id_to_token(self.eos_token_id),
            "pad_token": self.backend.id_to_token(self.pad_token_id),
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def __call__(self, texts: str | Sequence[str]) -> tuple[Tensor, Tensor]:
        """Encode one or many texts; what is longer than the context is cut, keeping eos.

        Args:
            texts: a string, or a list or tuple of B strings.

        Returns:
            input_ids and attention_mask, both (B, context_length) int64; the mask is 1 from bos to eos.

        Raises:
            InputError: a text is not a string, or not valid Unicode.
        """
        one = isinstance(texts, str) or not isinstance(texts, Iterable)
        texts = [check_text(text) for text in ([texts] if one else texts)]
        input_ids = torch.full((len(texts), self.context_length), self.pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        for row, encoding in enumerate(self.backend.encode_batch_fast(texts, add_special_tokens=False)):
            ids = [self.bos_token_id, *encoding.ids[: self.context_length - 2], self.eos_token_id]
            input_ids[row, : len(ids)] = torch.tensor(ids)
            attention_mask[row, : len(ids)] = 1
        return input_ids, attention_mask

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """Spell one row of ids out, up to the first eos; in lower case, words apart.

        Args:
            ids: (L,) integers.

        Raises:
            InputError: there is not one row, or an id is not of this vocabulary.
        """
        ids = torch.as_tensor(ids)
        if ids.ndim != 1:
            raise InputError(f"ids are {tuple(ids.shape)}, not one row: decode each row")
        numbers = ids.tolist()
        if self.eos_token_id in numbers:
            numbers = numbers[: numbers.index(self.eos_token_id)]
        if numbers and not 0 <= min(numbers) <= max(numbers) < self.vocab_size:
            raise InputError(
                f"ids range over [{min(numbers)}, {max(numbers)}], outside [0, {self.vocab_size}): "
                "they are of another vocabulary"
            )
        return self.backend.decode(numbers).replace(WORD_END, " ").strip()


def _clip_backend(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    """CLIP's BPE as `transformers.CLIPTokenizer` builds it."""
    model = BPE(vocab=vocab, merges=merges, end_of_word_suffix=WORD_END, unk_token=EOS_TOKEN)
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    specials = [AddedToken(token, normalized=False, special=True) for token in (BOS_TOKEN, EOS_TOKEN)]
    backend.add_special_tokens(specials)
    backend.post_processor = processors.RobertaProcessing(
        (EOS_TOKEN, vocab[EOS_TOKEN]),
        (BOS_TOKEN, vocab[BOS_TOKEN]),
        trim_offsets=False,
        add_prefix_space=False,
    )
    return backend


def _alphabet() -> list[str]:
    """The 512 tokens that CLIP's vocabulary begins with: every byte, then every byte as a word's last."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    return letters + [letter + WORD_END for letter in letters]


def _read(file: Path, parse: Callable[[str], T]) -> T:
    try:
        return parse(file.read_text(encoding="utf-8"))
    except Exception as error:  # `tokenizers` raises plain Exception
        raise InputError(f"{str(file)!r} is not a usable vocabulary file: {one_line(error)}") from error


def _parse_object(text: str) -> dict[str, Any]:
    values = parse_json(text)
    if not isinstance(values, dict):
        raise InputError("it holds no JSON object")
    return values


def _parse_vocab(text: str) -> dict[str, int]:
    vocab = _parse_object(text)
    if not all(type(i) is int and 0 <= i < 2**31 for i in vocab.values()):
        raise InputError("it does not map tokens to ids")
    if missing := {BOS_TOKEN, EOS_TOKEN} - vocab.keys():
        raise InputError(f"it lacks {min(missing)!r}")
    return vocab


def _parse_merges(text: str) -> list[tuple[str, str]]:
    merges = []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: it breaks at more than line ends
        parts = line.split()
        if not parts or (number == 1 and "#version" in line):
            continue
        if len(parts) != 2:
            raise InputError(f"line {number} is not a pair of symbols")
        merges.append((parts[0], parts[1]))
    return merges


def _special_tokens(folder: Path) -> dict[str, str]:
    """`bos_token`, `eos_token` and `pad_token` where the folder's files name them."""
    named: dict[str, str] = {}
    for file in (folder / "tokenizer_config.json", folder / "special_tokens_map.json"):
        config = _read(file, _parse_object) if file.exists() else {}
        for key in ("bos_token", "eos_token", "pad_token"):
            token = config.get(key)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                named[key] = token
    return named


def as_texts(texts: Any, name: str) -> list[str]:
    """Several texts as a list.

    Args:
        texts: any iterable of strings, an array or a generator too.
        name: of the argument.

    Raises:
        InputError: it is one string, no iterable, empty, or holds something else than texts that are not blank.
    """
    if isinstance(texts, str | bytes) or not isinstance(texts, Iterable) or getattr(texts, "ndim", 1) != 1:
        raise InputError(f"{name} is {texts!r:.60}: pass a list of strings")
    found = [str(check_text(text)) for text in texts]  # of an array they are strings of its own
    if not found or not all(text.strip() for text in found):
        raise InputError(f"{name} must hold at least one string, and none that is blank")
    return found


def check_text(text: Any) -> str:
    """The text, if it is one.

    Raises:
        InputError: it is no string, or holds half of a surrogate pair.
    """
    if not isinstance(text, str):
        raise InputError(f"a text is {type(text).__name__}, not a string: {text!r:.60}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"the text {text!r:.60} is not valid Unicode: {error.reason}") from error
    return text


def context_length(tokenizer: Any, model: nn.Module, config: Any) -> int:
    """The most tokens of a text that a model of `transformers` reads.

    Args:
        tokenizer: the model's. Its `model_max_length` is a huge number where its files do not say.
        model: has a table of positions, or none, as T5 has not.
        config: of its text encoder.
    """
    limits = [tokenizer.model_max_length]
    if count := getattr(config, "max_position_embeddings", None):
        limits.append(count)
    for name, table in model.named_modules():
        # RoBERTa and its kin number positions from after the padding id.
        if isinstance(table, nn.Embedding) and "position" in name and table.num_embeddings == count:
            limits.append(count if table.padding_idx is None else count - table.padding_idx - 1)
    return min(limits)
