"""Captions of token files to a file of their features."""

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

import pyarrow.parquet as pq
import torch

from qlip.data.captions import class_sentences
from qlip.data.parquet import readable
from qlip.data.token_file import TokenFiles
from qlip.environment import resolve_device
from qlip.eval.batches import Track
from qlip.jobs.of_tokens import load_tokenizer
from qlip.t2i.condition import OWN, open_reader, write_features


def compute_features(
    paths: Sequence[Path],
    out: Path,
    condition: str,
    num_text_tokens: int,
    tokenizer: str | None = None,
    dtype: torch.dtype = torch.float16,
    device: str = "cpu",
    classes: Path | None = None,
    track: Track = iter,
) -> int:
    """Compute the features of all captions, each once.

    Args:
        paths: token files, or folders of them.
        out: the new file.
        condition: "qlip", or an encoder of `transformers`.
        num_text_tokens: the most of a caption that is read.
        tokenizer: whose text tower "qlip" is; None: the one that the files name.
        dtype: of the features in the file.
        device: where.
        classes: JSON file of class names, whose sentences are read, too.
        track: shows progress.

    Returns:
        how many texts it holds.

    Raises:
        InputError: there are no captions, or the encoder or the file of names is missing.
    """
    sentences = class_sentences(classes)
    source, place = TokenFiles.open(paths), resolve_device(device)
    own = load_tokenizer(source.format, tokenizer, place) if condition == OWN else None
    reader = open_reader(condition, own, num_text_tokens, place)
    return write_features(out, reader, chain(_captions(source.files), *sentences), dtype, track)


def _captions(files: Sequence[Path]) -> Iterator[str]:
    for file in files:
        with readable(file):
            names = [name for name in ("caption", "captions") if name in pq.read_schema(file).names]
            table = pq.read_table(file, columns=names, page_checksum_verification=True)
        for name in names:
            for value in table[name].to_pylist():
                yield from [value] if isinstance(value, str) else value or ()
