"""Pictures to token files, and token files to pictures.

Several processes, or the workers of a Ray cluster, take units of the source. What is done is not done again.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from PIL import Image

from qlip.data.samples import Fault
from qlip.data.token_file import TokenFiles
from qlip.errors import InputError
from qlip.eval.batches import Track, gather_objects
from qlip.eval.metrics import to_uint8
from qlip.files import place_in, whole_file
from qlip.jobs.pictures import output_names
from qlip.jobs.tokens_job import Job, Work
from qlip.jobs.tokens_shards import remaining
from qlip.model.qlip import QLIP
from qlip.train.distributed import on_all_ranks, on_first_rank, processes, rank, world_size

T = TypeVar("T")
PATIENCE = timedelta(days=7)

logger = logging.getLogger("qlip")


@dataclass(frozen=True)
class Tokenized:
    """What a job did.

    Attributes:
        files: all token files, in order.
        num_rows: in them.
        num_skipped: rows of them that were there before.
        failures: a line for each picture, and each file, that could not be used.
        lost: remote shards that could not be read to their end; the job tries them again.
    """

    files: list[Path]
    num_rows: int
    num_skipped: int
    failures: list[str]
    lost: list[Fault]


def tokenize(job: Job, track: Track = iter) -> Tokenized:
    """Tokenize what is not yet tokenized.

    Args:
        job: what, and how.
        track: shows progress.

    Raises:
        InputError: there is nothing to read, or what is there is of another job; names in what they differ.
    """
    with processes(job.device if job.engine == "local" else "cpu") as device:
        work = on_all_ranks(lambda: Work.open(job, device))
        shards = on_all_ranks(lambda: work.place.shards(work.identity))  # of all, before any writes
        todo = remaining(work.units, shards)
        left = {unit.number: first for unit, first in todo}
        num_skipped = sum(s.num_rows for s in shards if s.piece < left.get(s.unit, s.piece + 1))
        if num_skipped and rank() == 0:
            logger.info("%s rows are there already: skipped", f"{num_skipped:,}")
        if job.engine == "ray":
            lost = on_all_ranks(lambda: work.tokenize_on_ray(todo, track))
        else:
            mine, show = todo[rank() :: world_size()], track if rank() == 0 else iter
            lost = on_all_ranks(lambda: _patiently(lambda: work.tokenize(mine, show)))
        lost = [fault for part in gather_objects(lost) for fault in part]
        made: dict[str, Any] = {}
        on_first_rank(lambda: made.update(work.finish(lost)))
        (made,) = gather_objects(made)[:1]
    failures = [f"{f['key']}: {f['reason']}" for f in (*made["lost"], *made["failures"])]
    files = [
        work.place.out / shard["name"] if not work.place.is_file else work.place.out for shard in made["shards"]
    ]
    return Tokenized(files if made["num_rows"] else [], made["num_rows"], num_skipped, failures, lost)


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
    source, own = TokenFiles.open(paths), model.id_hash()
    found = source.format
    if found.id_hash != own:
        raise InputError(
            f"{source.files[0]} holds ids {found.id_hash} of {found.model!r}, but {model.name!r} makes "
            f"{own}: pass --model with the tokenizer that made them"
        )
    written = [place_in(out, name) for name in output_names(source.keys())]
    progress = iter(track(written))
    for _, tokens in source.batches():
        for pixels in to_uint8(model.detokenize(torch.tensor(tokens), found.grid)):
            save_png(Image.fromarray(pixels.permute(1, 2, 0).numpy()), next(progress))
    return written


def save_png(picture: Image.Image, path: Path) -> None:
    """Write a PNG, whole or not at all."""
    with whole_file(path) as unfinished:
        picture.save(unfinished, format="PNG")


def _patiently(work: Callable[[], T]) -> T:
    """Work of which a rank may be done hours before another: gloo would give up after half an hour."""
    if world_size() == 1:
        return work()
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    try:
        result = work()
    except (InputError, OSError) as error:
        logger.error("rank %s stops, the others finish what is theirs: %s", rank(), error)
        dist.barrier(group)
        raise
    dist.barrier(group)
    return result
