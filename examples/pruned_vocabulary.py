r"""A Llama with a smaller vocabulary, and what it costs (`qlip.um3.prune`).

    python examples/pruned_vocabulary.py stories15M --text stories/train.jsonl --held-out stories/held-out.jsonl \
        --num-text 8192 --out stories15M-8k

Of a small model most parameters are its vocabulary's: of stories15M's 15.2 M they are 9.2 M. Texts that still use
only tokens that are there have the same pieces and logits; with `--held-out` it says what that costs over all
texts, in bits per byte of UTF-8, which a vocabulary does not change.
"""

import math
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Annotated

import torch
import tyro

from qlip.data.captions import class_sentences
from qlip.errors import InputError
from qlip.lm.checkpoint import load
from qlip.lm.loss import chunked_cross_entropy
from qlip.um3.checkpoint import open_tokenizer
from qlip.um3.prune import prune
from qlip.um3.sources import find_texts, read_texts


def texts(sources: tuple[str, ...]) -> Iterator[str]:
    """Their documents, blank ones left out."""
    for file in find_texts(sources):
        yield from (text for text in read_texts(file, "text") if text.strip())


@torch.no_grad()
def bits_per_byte(folder: Path, documents: list[str]) -> float:
    """Of documents, from their beginning to their end or the end of the model's context."""
    model, tokenizer = load(folder), open_tokenizer(folder)
    bits = num_bytes = 0.0
    for document in documents:
        ids = tokenizer.encode(document, add_special_tokens=False).ids[: model.config.max_position_embeddings - 1]
        row = torch.tensor([[model.config.bos_token_id, *ids]])
        bits += float(chunked_cross_entropy(model(row)[:, :-1], model.head, row[:, 1:])) / math.log(2)
        num_bytes += len(tokenizer.decode(ids).strip().encode())
    return bits / num_bytes


def main(
    model: Annotated[Path, tyro.conf.Positional],
    /,
    *,
    text: tuple[str, ...],
    classes: Path | None = None,
    num_text: int,
    out: Path,
    held_out: tuple[str, ...] = (),
) -> None:
    """Write the smaller model.

    Args:
        model: Folder of a Llama.
        text: Whose tokens are counted; see `qlip.um3.sources`.
        classes: JSON file of class names: sentences about them are counted, too.
        num_text: How many tokens are kept.
        out: The new folder.
        held_out: Text on which both models are compared.
    """
    kept = prune(model, chain(texts(text), *class_sentences(classes)), num_text, out)
    print(f"{kept} tokens are kept in {out}")
    if held_out:
        documents = list(texts(held_out))
        before, after = (bits_per_byte(folder, documents) for folder in (model, out))
        print(f"{len(documents)} texts: {before:.4f} bits per byte before, {after:.4f} after")


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except InputError as error:
        sys.exit(f"pruned_vocabulary: {error}")
