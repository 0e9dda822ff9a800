"""A Llama with a smaller vocabulary: the tokens that some texts use most, and whatever those are merged from.

A BPE tokenizer makes a token step by step, and the steps are the same wherever the token stands. So with a token
are kept the pieces that it is made of on the way, and of the merges those whose two parts and result are all kept.
Then a text whose tokens are all kept is cut as before, and its logits are the old ones of the kept tokens. Any
other text is cut into smaller pieces, at worst into bytes, and still comes back whole.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from qlip.errors import InputError, one_line
from qlip.guarded import read_object
from qlip.lm.checkpoint import load, save
from qlip.lm.config import LMConfig

TOKENIZER, SETTINGS, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
AT_ONCE = 1000

Pair = tuple[str, str]


def prune(folder: str | os.PathLike[str], texts: Iterable[str], num_text: int, out: str | os.PathLike[str]) -> int:
    """Write a smaller Llama.

    Args:
        folder: a Llama or Qwen3 of Hugging Face's layout with a `tokenizer.json` of BPE, with byte fallback as
            Llama-2's or over bytes as Llama-3's.
        texts: whose tokens are counted.
        num_text: tokens to keep; special ones and bytes always are. The order of the ids stays.
        out: the new folder: weights (float32), `config.json`, `tokenizer.json` and what belongs to it.

    Returns:
        How many tokens are kept: `num_text`, or a few less where the next one's pieces did not fit.

    Raises:
        InputError: the folder is something else, or `num_text` has no room for the special tokens and bytes.
    """
    folder, out = Path(folder), Path(out)
    values = _read(folder / TOKENIZER)
    if values.get("model", {}).get("type") != "BPE":
        raise InputError(f"{folder / TOKENIZER} is no BPE tokenizer: only those are pruned")
    model = load(folder)
    kept = _choose(values, _count(folder, texts), num_text)
    numbers = {old: new for new, old in enumerate(kept)}

    state, rows = model.state_dict(), torch.tensor(kept)
    for name in ("embed_tokens.weight", "lm_head.weight"):
        if name in state:
            state[name] = state[name][rows]
    with torch.device("meta"):
        smaller = type(model)(_renumbered(model.config, numbers))
    smaller.load_state_dict(state, assign=True)
    save(smaller, out)
    (out / TOKENIZER).write_text(json.dumps(_tokenizer(values, numbers), ensure_ascii=False), encoding="utf-8")
    if (folder / SETTINGS).exists():
        settings = _read(folder / SETTINGS)
        if "added_tokens_decoder" in settings:
            decoder = {str(numbers[int(old)]): token for old, token in settings["added_tokens_decoder"].items()}
            settings["added_tokens_decoder"] = decoder
        (out / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    if (folder / TEMPLATE).exists():
        shutil.copyfile(folder / TEMPLATE, out / TEMPLATE)
    return len(kept)


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({one_line(error)}): name the folder of a Llama") from error


def _count(folder: Path, texts: Iterable[str]) -> np.ndarray:
    """How often each token stands in the texts."""
    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
    tokenizer.encode_special_tokens = True
    counts = np.zeros(tokenizer.get_vocab_size(), np.int64)
    texts = iter(texts)
    while some := list(islice(texts, AT_ONCE)):
        for encoding in tokenizer.encode_batch_fast(some, add_special_tokens=False):
            counts += np.bincount(encoding.ids, minlength=len(counts))
    return counts


def _choose(values: dict[str, Any], counts: np.ndarray, num_text: int) -> list[int]:
    """The old ids that are kept, in order."""
    vocab: dict[str, int] = values["model"]["vocab"]
    ranks = {pair: rank for rank, pair in enumerate(_merges(values))}
    kept = {token["id"] for token in values["added_tokens"]}
    kept |= {vocab[symbol] for symbol in _alphabet(values["model"])}
    if len(kept) > num_text:
        raise InputError(f"num_text is {num_text}, and {len(kept)} tokens are special or bytes: keep more")
    for token in sorted(vocab, key=lambda token: (-counts[vocab[token]], vocab[token])):
        needed = {vocab[piece] for piece in (token, *_pieces(token, vocab, ranks))} - kept
        if len(kept) + len(needed) <= num_text:
            kept |= needed
        if len(kept) == num_text:
            break
    return sorted(kept)


def _alphabet(model: dict[str, Any]) -> Iterator[str]:
    """What every text can be cut into: the 256 bytes."""
    if model.get("byte_fallback"):
        yield from (f"<0x{byte:02X}>" for byte in range(256))
    else:  # of a tokenizer over bytes they are the tokens of one character
        yield from (token for token in model["vocab"] if len(token) == 1)


def _pieces(token: str, vocab: dict[str, int], ranks: dict[Pair, int]) -> set[str]:
    """Everything that a token is, from its characters on, until it is whole."""
    parts = list(token)
    seen = {part for part in parts if part in vocab}
    while True:
        pairs = [(ranks[pair], i) for i, pair in enumerate(pairwise(parts)) if pair in ranks]
        if not pairs:
            return seen
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
        seen.add(parts[i])


def _merges(values: dict[str, Any]) -> Iterator[Pair]:
    """In order; older files have the two parts in one string."""
    for merge in values["model"]["merges"]:
        first, second = merge.split(" ") if isinstance(merge, str) else merge
        yield first, second


def _tokenizer(values: dict[str, Any], numbers: dict[int, int]) -> dict[str, Any]:
    """The smaller tokenizer's file."""
    vocab = {token: numbers[old] for token, old in values["model"]["vocab"].items() if old in numbers}
    merges = [pair for pair in _merges(values) if {*pair, "".join(pair)} <= vocab.keys()]
    return values | {
        "model": values["model"] | {"vocab": vocab, "merges": merges},
        "added_tokens": [token | {"id": numbers[token["id"]]} for token in values["added_tokens"]],
        "post_processor": _processor(values.get("post_processor"), numbers),
    }


def _processor(value: Any, numbers: dict[int, int]) -> Any:
    """The ids of special tokens that it puts around a text, wherever in it they stand."""
    if isinstance(value, list):
        return [_processor(item, numbers) for item in value]
    if isinstance(value, dict):
        return {
            key: [numbers[old] for old in item] if key == "ids" else _processor(item, numbers)
            for key, item in value.items()
        }
    return value


def _renumbered(config: LMConfig, numbers: dict[int, int]) -> LMConfig:
    def new(old: int | None) -> int | None:
        return None if old is None else numbers[old]

    eos = config.eos_token_id
    ends = tuple(numbers[old] for old in eos) if isinstance(eos, tuple) else new(eos)
    return replace(config, vocab_size=len(numbers), bos_token_id=new(config.bos_token_id), eos_token_id=ends)
