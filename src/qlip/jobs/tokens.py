"""Pictures to token files, and token files to pictures."""

import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from PIL import Image

from qlip.data.token_file import TokenFiles, TokenFormat, token_writer
from qlip.errors import InputError
from qlip.eval.batches import Track
from qlip.eval.metrics import to_uint8
from qlip.files import whole_file
from qlip.jobs.pictures import Pictures, find_pictures, output_names
from qlip.model.qlip import QLIP

SHARD_ROWS = 10_000


def token_format(model: QLIP) -> TokenFormat:
    """What token files of this model say of their ids."""
    return TokenFormat(model.name, model.id_hash(), model.config.num_bits, model.config.grid)


def tokenize_files(
    model: QLIP, paths: Sequence[Path], out: Path, track: Track = iter
) -> tuple[list[Path], int, list[str]]:
    """Tokenize pictures into one token file, or into a folder of shards.

    Args:
        model: with an image processor.
        paths: files and folders.
        out: a file if it has a suffix, else a folder for `tokens-00000.parquet`, … of 10,000 rows, the last of
            fewer.
        track: shows progress.

    Returns:
        the files written, the number of pictures in them, and a line for each picture that failed.

    Raises:
        InputError: `out` is a folder that already holds tokens, or there is nothing to read.
    """
    pictures = Pictures(find_pictures(paths), model.need_image_processor().preprocess)
    if out.is_dir() if out.suffix else out.is_file():
        raise InputError(f"{out}: with a suffix it must be a file, without one a folder of shards")
    if not out.suffix and list(out.glob("tokens-*.parquet")):
        raise InputError(f"{out} already holds tokens: choose another --out, or delete them first")
    written: list[Path] = []
    description = token_format(model)
    num_rows, room = 0, 0  # room: rows that still fit the open file
    with ExitStack() as stack:
        for found, images in pictures.batches(track):
            keys, tokens = [_key(path) for path in found], model.tokenize(images).numpy()
            num_rows += len(keys)
            while keys:
                if not room:
                    stack.close()  # the shard before is complete
                    written.append(out if out.suffix else out / f"tokens-{len(written):05d}.parquet")
                    write = stack.enter_context(token_writer(written[-1], description))
                    room = sys.maxsize if out.suffix else SHARD_ROWS
                write(keys[:room], tokens[:room])
                keys, tokens, room = keys[room:], tokens[room:], max(room - len(keys), 0)
    return written, num_rows, pictures.failures


def detokenize_files(model: QLIP, paths: Sequence[Path], out: Path, track: Track = iter) -> list[Path]:
    """Rebuild the pictures of token files as PNG, in the size that they had when they were tokenized.

    Args:
        model: the tokenizer that made the ids, or one with the same encoder.
        paths: token files, or folders of them.
        out: folder for the pictures, named as their keys.
        track: shows progress.

    Returns:
        the pictures written.

    Raises:
        InputError: the ids are of another tokenizer, or a file is damaged.
    """
    source, own = TokenFiles.open(paths), token_format(model)
    found = source.format
    if found.id_hash != own.id_hash:
        raise InputError(
            f"{source.files[0]} holds ids {found.id_hash} of {found.model!r}, but {model.name!r} makes "
            f"{own.id_hash}: pass --model with the tokenizer that made them"
        )
    written = [out / name for name in output_names(source.keys())]
    progress = iter(track(written))
    for _, tokens in source.batches():
        for pixels in to_uint8(model.detokenize(torch.tensor(tokens), found.grid)):
            save_png(Image.fromarray(pixels.permute(1, 2, 0).numpy()), next(progress))
    return written


def _key(path: Path) -> str:
    """A path as UTF-8, whatever bytes it has."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def save_png(picture: Image.Image, path: Path) -> None:
    """Write a PNG, whole or not at all."""
    with whole_file(path) as unfinished:
        picture.save(unfinished, format="PNG")
