"""Images of any source to a file of a vision model's features, which `qlip train --teacher` reads."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from qlip.data.delivery import FromWorkers
from qlip.data.samples import Fault, Samples, readable
from qlip.data.sources import open_indexed
from qlip.data.teacher import Teacher, TeacherWriter, create_teacher_file, hash_image
from qlip.errors import InputError
from qlip.eval.batches import Track
from qlip.jobs.vision_model import Prepare, VisionModel
from qlip.model.image import read_image


def compute_vision_features(
    sources: Sequence[str],
    out: Path,
    name: str,
    grid: tuple[int, int] | None = None,
    batch_size: int = 32,
    num_workers: int = 0,
    compile: bool = False,
    device: str = "cpu",
    track: Track = iter,
) -> tuple[int, list[Fault]]:
    """Compute the features of all images, or of those that a file lacks.

    Batches come in random order: the file is of use, evenly over the data, before it is complete.

    Args:
        sources: see `qlip.data.sources`; none is remote.
        out: the file; one of the same data and model is completed.
        name: of the vision model; folder or hub id.
        grid: rows and columns to which the model's grid is average-pooled and kept; None: only the pooled feature.
        batch_size: images at once.
        num_workers: processes that decode; 0: this one.
        compile: with `torch.compile`.
        device: where.
        track: shows progress.

    Returns:
        The number of images with features, and those that cannot be read.

    Raises:
        InputError: a source or the model is missing, the model has no such grid, features do not fit float16, or
            the file is of another model or other data.
    """
    if batch_size < 1 or num_workers < 0:
        raise InputError(f"batch_size {batch_size} must be at least 1, num_workers {num_workers} at least 0")
    samples, model = open_indexed(sources), VisionModel(name, device, compile)
    teacher = _describe(model, grid, batch_size)
    if not out.exists():
        create_teacher_file(out, teacher, len(samples))
    writer = TeacherWriter(out)
    _check(writer, teacher, samples)
    starts = [i for i in range(0, len(samples), batch_size) if not writer.hashes[i : i + batch_size].all()]
    np.random.default_rng(0).shuffle(starts)
    chunks = _Chunks(samples, model.prepare, batch_size, teacher.image_size)
    faults: list[Fault] = list(samples.unreadable)
    for chunk in track(FromWorkers(chunks, num_workers, starts)):
        if isinstance(chunk, InputError):
            raise chunk
        faults += chunk["faults"]
        if chunk["rows"]:
            features = _features(model, chunk["pixel_values"], grid, batch_size)
            writer.write(chunk["rows"], chunk["hashes"], features)
    return int(np.count_nonzero(writer.hashes)), faults


def _features(
    model: VisionModel, pixel_values: Tensor, grid: tuple[int, int] | None, batch_size: int
) -> dict[str, Tensor]:
    """By the names in the file. A batch of fewer images is filled up: a compiled model sees one shape."""
    count = len(pixel_values)
    filled = F.pad(pixel_values, (0, 0, 0, 0, 0, 0, 0, batch_size - count))
    pooled, found = model(filled)
    features = {"pooled": pooled[:count]}
    if grid and found is not None:
        features["grid"] = F.adaptive_avg_pool2d(found[:count], grid).permute(0, 2, 3, 1)
    if not all(values.to(torch.float16).isfinite().all() for values in features.values()):
        raise InputError(f"features of {model.name!r} do not fit float16: take another model as teacher")
    return features


def _describe(model: VisionModel, grid: tuple[int, int] | None, batch_size: int) -> Teacher:
    """What the model gives of a batch, tried on black images."""
    pixel_values = model.prepare(Image.new("RGB", (256, 256))).expand(batch_size, -1, -1, -1)
    pooled, found = model(pixel_values)
    size = (pixel_values.shape[2], pixel_values.shape[3])
    plain = Teacher(model.name, model.hash, size, pooled.shape[1])
    if grid is None:
        return plain
    if found is None:
        raise InputError(f"{model.name!r} has no grid of features: leave out --grid")
    if min(grid) < 1 or grid[0] > found.shape[2] or grid[1] > found.shape[3]:
        raise InputError(
            f"the grid of {model.name!r} is {found.shape[2]} × {found.shape[3]}, not as fine as "
            f"{grid[0]} × {grid[1]}: ask for at most its own"
        )
    return Teacher(model.name, model.hash, size, pooled.shape[1], grid, found.shape[1])


def _check(writer: TeacherWriter, teacher: Teacher, samples: Samples) -> None:
    """Whether a file is of this model and this data.

    Raises:
        InputError: it is not.
    """
    for field in ("model_hash", "image_size", "grid"):
        if getattr(writer.teacher, field) != getattr(teacher, field):
            raise InputError(f"{writer.path} is of a teacher with another {field}: name another file")
    done = np.flatnonzero(writer.hashes)
    same = len(writer.hashes) == len(samples)
    if same and len(done):
        same = hash_image(samples[int(done[0])]["image"]) == writer.hashes[done[0]]
    if not same:
        raise InputError(f"{writer.path} is of other data: name another file")


@dataclass(frozen=True)
class _Chunks(Dataset):
    """Neighbouring samples, decoded and prepared; indexed by the first one's number."""

    samples: Samples
    prepare: Prepare
    size: int
    image_size: tuple[int, int]

    def __getitem__(self, start: int) -> dict[str, Any] | InputError:
        rows, hashes, pixel_values, faults = [], [], [], []
        numbers = range(start, min(start + self.size, len(self.samples)))
        for row, sample in zip(numbers, readable(self.samples, numbers), strict=True):
            if isinstance(sample, Fault):
                faults.append(sample)
                continue
            try:
                prepared = self.prepare(read_image(sample["image"]))
            except InputError as error:
                faults.append(Fault(sample["key"], str(error), row))
                continue
            if prepared.shape[1:] != self.image_size:
                return InputError("the image processor gives images of several sizes: set one in its config")
            rows.append(row)
            hashes.append(hash_image(sample["image"]))
            pixel_values.append(prepared)
        stacked = torch.stack(pixel_values) if pixel_values else torch.empty(0)
        return {"rows": rows, "hashes": hashes, "pixel_values": stacked, "faults": faults}
