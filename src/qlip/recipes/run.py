"""From a recipe to a trained tokenizer: data, task, evaluators, record, and `fit`."""

import logging
import os
from collections.abc import Generator, Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from PIL import Image

from qlip.data.augment import random_resized_crop
from qlip.data.buckets import Buckets
from qlip.data.captions import TEMPLATES, Captioner, read_class_names
from qlip.data.journal import Journal
from qlip.data.loader import TrainingSet, batches
from qlip.data.samples import Fault, Samples, evenly, readable
from qlip.data.sources import open_samples
from qlip.data.stream import Stream
from qlip.data.teacher import TeacherFiles
from qlip.errors import InputError, one_line
from qlip.eval.pictures import reconstruction_grid
from qlip.eval.reconstruction import Distance, reconstruction
from qlip.eval.zero_shot import zero_shot
from qlip.model.checkpoint import save_description
from qlip.model.image import ImageProcessor, read_image
from qlip.model.qlip import QLIP
from qlip.recipes.record import REQUIRED, settle, write_record
from qlip.train.checkpoint import latest_checkpoint
from qlip.train.distributed import on_all_ranks, on_first_rank, processes, rank, world_size
from qlip.train.fit import Evaluator, FitConfig, fit, start_checkpoint
from qlip.train.nonfinite import for_json, replay
from qlip.train.parallel import ComputeConfig
from qlip.train.plot import require_matplotlib
from qlip.train.task import Task
from qlip.train.trackers import require

logger = logging.getLogger("qlip")

NUM_LOOKED_AT = 500  # samples of which the teacher's share is measured


@dataclass(frozen=True)
class DataConfig:
    """Where samples come from.

    Attributes:
        train: pictures with captions or labels: Parquet, CSV or JSONL files, `.tar` shards, folders of pictures
            or of those files, URLs of shards, datasets:NAME; several kinds together, too. See docs/data.md.
        val: the same, held out; may be empty.
        max_val: samples of `val`, evenly spread over it, that evaluations during training look at.
        classes: JSON file of class names, if samples have labels and their source does not name them.
        templates: sentences with `{}` that turn a name into a caption.
        crop_scale: range of the random crop's area, as a share of the picture's.
        buckets: heights and widths, in pixels, such as 64 64 64 96 96 64: a batch is of one of them, and a picture
            goes where the aspect is nearest to its own. By default all are of the model's size.
        num_workers: processes that decode, for each training process; 0 decodes in the training process.
        max_skipped_share: of the samples, and of the files, that may be skipped because they cannot be used; more
            of them end the run.
        shuffle_buffer: samples that a worker shuffles among each other if shards are remote.
    """

    train: Annotated[tuple[str, ...], REQUIRED] = ()
    val: tuple[str, ...] = ()
    max_val: int = 1000
    classes: Path | None = None
    templates: tuple[str, ...] = TEMPLATES
    crop_scale: tuple[float, float] = (0.6, 1.0)
    buckets: tuple[tuple[int, int], ...] = ()
    num_workers: int = 0
    max_skipped_share: float = 0.01
    shuffle_buffer: int = 1000

    def __post_init__(self):
        for name in ("train", "val"):  # a path in the form in which records have it, without a last slash
            sources = (os.fspath(source) for source in getattr(self, name))
            plain = tuple(s if "://" in s else str(Path(s)) for s in sources)
            object.__setattr__(self, name, plain)
        for template in self.templates:
            if "{}" not in template:
                raise InputError(f"templates has {template!r} without {{}}: put it where the word goes")
        if len(self.crop_scale) != 2 or not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise InputError(f"crop_scale is {self.crop_scale}: it must be two shares of (0, 1], smaller first")
        for name in ("max_val", "num_workers", "shuffle_buffer"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} is {getattr(self, name)}: it must be 0 or more")
        if not 0 <= self.max_skipped_share < 1:
            raise InputError(f"max_skipped_share is {self.max_skipped_share}: it must be a share in [0, 1)")


@dataclass(frozen=True)
class TrainRecipe(ComputeConfig):
    """What the recipes of both stages share.

    Attributes:
        data: where samples come from.
        fit: how long and how often.
        batch_size: samples an optimizer step, over all processes.
        seed: of the weights, the data order and the augmentation.
    """

    data: DataConfig = field(default_factory=DataConfig)
    fit: Annotated[FitConfig, tyro.conf.arg(name="")] = field(default_factory=FitConfig)
    batch_size: int = 128
    seed: int = 0

    def __post_init__(self):
        if self.batch_size < 2:
            raise InputError(f"batch_size is {self.batch_size}: contrast needs at least 2 samples")
        if self.seed < 0:
            raise InputError(f"seed is {self.seed}: it must be 0 or more")

    @property
    def stage(self) -> int:
        """1 or 2."""
        raise NotImplementedError

    def build_model(self, data: "Data", device: torch.device, description: Path | None) -> QLIP:
        """The tokenizer as training begins, the same on every process; with the words of a run's description."""
        raise NotImplementedError

    def build_task(self, model: QLIP) -> Task:
        """What `fit` trains."""
        raise NotImplementedError

    def open_teacher(self) -> TeacherFiles | None:
        """The features that training learns to predict; None: no such."""
        return None

    def flops_per_image(self, model: QLIP, text_length: int) -> float:
        """Of training, for the log."""
        raise NotImplementedError


@dataclass(frozen=True)
class Data:
    """The samples of a run and their words."""

    train: Samples | Stream
    val: list[dict]
    captioner: Captioner

    @classmethod
    def open(cls, config: DataConfig) -> "Data":
        """Open the sources.

        Raises:
            InputError: one is missing or is something else, or too much of what is held out cannot be used.
        """
        if not config.train:
            raise InputError("no training data: name files or folders with --data.train")
        train = open_samples(config.train, config.shuffle_buffer)
        val = open_samples(config.val) if config.val else None
        named, held_out = train.class_names, val.class_names if val else ()
        if named and held_out and named != held_out:
            raise InputError(
                f"train has {len(named)} classes, val {len(held_out)} others: give both the same ones"
            )
        names = [[name.replace("_", " ")] for name in named]
        if config.classes:
            names = read_class_names(config.classes)
        chosen = _good(val, config.max_val, config.max_skipped_share) if val else []
        return cls(train, chosen, Captioner(names, config.templates))

    @property
    def num_samples(self) -> int | None:
        """Of `train`; None: nobody has counted them."""
        return None if isinstance(self.train, Stream) else len(self.train)

    def __str__(self) -> str:
        """What the log says of it."""
        if isinstance(self.train, Stream):
            return f"{len(self.train.shards):,} shards, read from front to back: resumes exactly to the shard"
        return f"{len(self.train):,} samples: resumes exactly to the sample"


def run(recipe: TrainRecipe, out: Path, resume: bool = False) -> bool:
    """Train a tokenizer and leave everything in one folder. With `torchrun`, every process calls it.

    Args:
        recipe: what to do.
        out: folder for `recipe.json`, what `fit` leaves, and, at the end, for `model/`, a checkpoint that
            `qlip.load` reads.
        resume: go on where an interrupted run stopped.

    Returns:
        Whether it came to its end; if not, SIGTERM or Ctrl-C stopped it, and `resume` goes on.

    Raises:
        InputError: the recipe cannot be run: missing data, no class names, no such device, a folder that holds
            another run.
    """
    with processes(recipe.device) as device:
        resumed = out if start_checkpoint(out, resume) else None
        recipe = settle(recipe, device, resumed)
        task, model, data = on_all_ranks(partial(_prepare, recipe, device, resumed))
        dataset = on_all_ranks(partial(_training_set, recipe, model, data))
        tokenize = model.need_text_tokenizer() if recipe.stage == 1 else None

        def stream(start_step: int, notes: Path | None = out) -> Generator[dict[str, Any], None, None]:
            journal = Journal(data.train, recipe.data.max_skipped_share, notes, rank(), world_size())
            size, num_workers = recipe.batch_size, recipe.data.num_workers
            place = (rank(), world_size(), recipe.num_parts(size))
            yield from batches(dataset, tokenize, size, start_step, num_workers, *place, journal)

        # data that cannot be used fails here, before anything is written
        first = on_all_ranks(lambda: next(stream(0, None)))
        flops = recipe.flops_per_image(model, first["input_ids"].shape[1] if tokenize else 0)
        on_first_rank(partial(_record, recipe, model, data.num_samples, out))
        logger.info("training on %s", data)
        evaluators = _evaluators(data, recipe.stage, getattr(task, "perceptual", None))
        outcome = fit(task, stream, recipe.fit, out, evaluators, resume, recipe.seed, device, flops)
        finished = outcome.step == recipe.fit.steps
        if finished:
            trained = task.snapshot()
            if rank() == 0:
                trained.save(out / "model")
        return finished


def do_again(recipe: TrainRecipe, folder: Path) -> dict[str, float | str]:
    """Do the step again that a run left when a loss was not finite; see `qlip.train.nonfinite`.

    Returns:
        this process's values, for JSON.
    """
    run = folder.resolve().parents[1]
    if not (run / "description").is_dir():
        raise InputError(f"{folder}: not a step that a run left in its nonfinite/ folder")
    with processes(recipe.device) as device:
        task, *_ = on_all_ranks(partial(_prepare, settle(recipe, device, run), device, run))
        return for_json(replay(task, folder, recipe.seed))


def _prepare(recipe: TrainRecipe, device: torch.device, run: Path | None) -> tuple[Task, QLIP, Data]:
    """Check what can be checked, open the data, build the task; `run` is the folder of one to go on with."""
    if recipe.deterministic and recipe.data.buckets and device.type == "cuda":
        raise InputError(
            "PyTorch has no deterministic gradient of interpolated positions on a GPU: leave out buckets"
        )
    require_matplotlib()
    require(recipe.fit.log_to)
    if recipe.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    recipe.num_parts(recipe.batch_size)
    # each of its own: a process that has no data must not find the others at work on the task
    data = on_all_ranks(partial(Data.open, recipe.data))
    model = on_all_ranks(partial(recipe.build_model, data, device, run / "description" if run else None))
    return recipe.build_task(model), model, data


def _training_set(recipe: TrainRecipe, model: QLIP, data: Data) -> TrainingSet:
    transform = _Transform(model.need_image_processor(), recipe.data.crop_scale)
    captioner = data.captioner if recipe.stage == 1 else None
    buckets, teacher = _buckets(recipe.data, model, data), recipe.open_teacher()
    if teacher is not None:
        _report_coverage(teacher, data.train)
    return TrainingSet(data.train, transform, captioner, recipe.seed, buckets, teacher)


def _report_coverage(teacher: TeacherFiles, samples: Samples | Stream) -> None:
    """Log how many training images the teacher has features of, measured on some of them.

    Raises:
        InputError: it has features of none.
    """
    some = (sample for sample in _some(samples, NUM_LOOKED_AT) if not isinstance(sample, Fault))
    found = [sample["image"] in teacher for sample in some]
    name = teacher.teacher.model
    if not any(found):
        raise InputError(
            f"teacher {name} has features of none of {len(found)} training images: compute those of this data, "
            "`qlip features --vision`"
        )
    share = 100 * sum(found) / len(found)
    logger.info("teacher %s: features of %.0f%% of %d training images", name, share, len(found))


def _buckets(config: DataConfig, model: QLIP, data: Data) -> Buckets | None:
    if not config.buckets:
        return None
    for height, width in config.buckets:
        model.config.vision.grid_of(height, width)
    if isinstance(data.train, Stream):
        raise InputError(
            "buckets need data whose pictures can be measured before: fetch the shards, or leave it out"
        )
    return Buckets.measure(data.train, config.buckets, config.num_workers)


@dataclass(frozen=True)
class _Transform:
    """Encoded bytes → a random part of the picture, normalised (3, H, W)."""

    processor: ImageProcessor
    crop_scale: tuple[float, float]

    def __call__(
        self, image: bytes, rng: np.random.Generator, size: tuple[int, int] | None = None
    ) -> torch.Tensor:
        picture = random_resized_crop(read_image(image), size or self.processor.size, rng, self.crop_scale)
        return self.processor.normalize(picture)


def _evaluators(data: Data, stage: int, perceptual: Distance | None) -> list[Evaluator]:
    """Reconstruction, a picture of it, and in stage 1, for labelled samples, zero-shot."""
    if not data.val:
        return []
    names, templates = [n[0] for n in data.captioner.names], data.captioner.templates

    def draw(model: QLIP) -> dict[str, Image.Image]:
        shown = data.val[:: max(1, len(data.val) // 24)][:24]
        return {"reconstructions": reconstruction_grid(model, shown)}

    evaluators: list[Evaluator] = [partial(reconstruction, samples=data.val, perceptual=perceptual), draw]
    labelled = [sample for sample in data.val if isinstance(sample.get("label"), int)]
    if stage == 1 and names and labelled:
        evaluators.append(partial(zero_shot, samples=labelled, names=names, templates=templates))
    return evaluators


def _record(recipe: TrainRecipe, model: QLIP, num_samples: int | None, out: Path) -> None:
    """Write `recipe.json`, and at the start what else makes the tokenizer."""
    resumed = latest_checkpoint(out) is not None
    write_record(recipe, recipe.stage, num_samples, out)
    if not resumed:
        try:
            save_description(model, out / "description")
        except Exception as error:  # `tokenizers` raises plain Exception
            raise InputError(f"{out / 'description'} cannot be written ({one_line(error)}): make room") from error


def _good(samples: Samples | Stream, count: int, max_skipped_share: float) -> list[dict]:
    """At most `count` samples, evenly spread, or the first of a stream, without those that cannot be used."""
    Journal(samples, max_skipped_share)  # its files
    good: list[dict] = []
    faults: list[Fault] = []
    for sample in _some(samples, count):
        if isinstance(sample, Fault):
            faults.append(sample)
            continue
        try:
            read_image(sample["image"])
            good.append(sample)
        except InputError as error:
            faults.append(Fault(sample["key"], str(error)))
    Journal([{}] * (len(good) + len(faults)), max_skipped_share).skip(faults)
    return good


def _some(samples: Samples | Stream, count: int) -> Iterable[dict | Fault]:
    """At most `count` samples, evenly spread, or the first of a stream."""
    if isinstance(samples, Stream):
        return islice(samples, count)
    return readable(samples, evenly(len(samples), count))
