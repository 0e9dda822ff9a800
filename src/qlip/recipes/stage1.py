"""From a recipe to a trained tokenizer: data, words, model, task, evaluators, and `fit`."""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qlip.data.augment import random_resized_crop
from qlip.data.loader import TrainingSet, batches
from qlip.data.parquet import Captioner, ParquetSamples, read_class_names
from qlip.environment import environment, resolve_device
from qlip.errors import InputError
from qlip.eval.pictures import reconstruction_grid
from qlip.eval.protocols import reconstruction, zero_shot
from qlip.files import whole_file
from qlip.model.config import PRESETS, QLIPConfig
from qlip.model.image import ImageProcessor, read_image
from qlip.model.qlip import QLIP
from qlip.model.text import TextTokenizer
from qlip.recipes.plain import to_plain
from qlip.train.checkpoint import checkpoint_step, latest_checkpoint
from qlip.train.fit import Evaluator, FitConfig, fit
from qlip.train.plot import require_matplotlib
from qlip.train.stage1 import Stage1, Stage1Config

TEMPLATES = (
    "a photo of a {}.",
    "a picture of a {}.",
    "a close-up photo of a {}.",
    "a blurry photo of a {}.",
    "a small photo of the {}.",
    "this is a {}.",
    "{}",
)


@dataclass(frozen=True)
class DataConfig:
    """Where samples come from.

    Attributes:
        train: Parquet files, or folders of them, with `image` and `label` or `caption`.
        val: the same, held out; may be empty.
        max_val: samples of `val`, evenly spread over it, that evaluations during training look at.
        classes: JSON file of class names, if samples have labels.
        templates: sentences with `{}` that turn a name into a caption.
        crop_scale: range of the random crop's area, as a share of the picture's.
        num_workers: processes that decode; 0 decodes in the training process.
    """

    train: tuple[Path, ...] = ()
    val: tuple[Path, ...] = ()
    max_val: int = 1000
    classes: Path | None = None
    templates: tuple[str, ...] = TEMPLATES
    crop_scale: tuple[float, float] = (0.6, 1.0)
    num_workers: int = 0


@dataclass(frozen=True)
class Recipe:
    """Everything that makes a run.

    Attributes:
        model: the tokenizer to train; its text vocabulary size is an upper bound where one is trained.
        data: where samples come from.
        task: loss weights and optimizer.
        fit: how long and how often.
        batch_size: samples an optimizer step.
        seed: of the weights, the data order and the augmentation.
        device: "cpu", "cuda", …; "auto" takes a GPU if there is one.
        compile: compile the model, which takes a minute; on a CPU it needs a C++ compiler.
    """

    model: QLIPConfig = field(default_factory=lambda: PRESETS["tiny"])
    data: DataConfig = field(default_factory=DataConfig)
    task: Stage1Config = field(default_factory=Stage1Config)
    fit: FitConfig = field(default_factory=FitConfig)
    batch_size: int = 128
    seed: int = 0
    device: str = "auto"
    compile: bool = False

    def __post_init__(self):
        if self.batch_size < 2:
            raise InputError(f"batch_size is {self.batch_size}: contrast needs at least 2 samples")


def run(recipe: Recipe, out: Path, resume: bool = False) -> QLIP:
    """Train a tokenizer and leave everything in one folder.

    Args:
        recipe: what to do.
        out: folder for `recipe.json` and what `fit` leaves, for `reconstructions.png` and, at the end, for
            `model/`, a checkpoint that `qlip.load` reads.
        resume: go on where an interrupted run stopped.

    Returns:
        The trained model.

    Raises:
        InputError: the recipe cannot be run: missing data, no class names, no such device, a folder that holds
            another run.
    """
    recipe = replace(recipe, device=str(resolve_device(recipe.device)))
    _check_compiler(recipe)
    require_matplotlib()
    train = ParquetSamples(recipe.data.train)
    val = _some(ParquetSamples(recipe.data.val), recipe.data.max_val) if recipe.data.val else []
    names = read_class_names(recipe.data.classes) if recipe.data.classes else []
    captioner = Captioner(names, recipe.data.templates)
    model = build_model(recipe, train, captioner)
    task = Stage1(model, recipe.task, torch.tensor(model.need_image_processor().std))
    if recipe.compile:
        model.compile()
    transform = _Transform(model.need_image_processor(), recipe.data.crop_scale)
    dataset = TrainingSet(train, transform, captioner, recipe.seed)

    def stream(start_step: int) -> Iterator[dict[str, Any]]:
        tokenize, workers = model.need_text_tokenizer(), recipe.data.num_workers
        return batches(dataset, tokenize, recipe.batch_size, start_step, workers)

    next(stream(0))  # data that cannot be used fails here, before anything is written
    _record(recipe, out, resume)
    evaluators = _evaluators(model, val, names, recipe.data.templates, out)
    fit(task, stream, recipe.fit, out, evaluators, resume)
    model.save(out / "model")
    return model


@dataclass(frozen=True)
class _Transform:
    """Encoded bytes → a random part of the picture, normalised (3, H, W)."""

    processor: ImageProcessor
    crop_scale: tuple[float, float]

    def __call__(self, image: bytes, rng: np.random.Generator) -> torch.Tensor:
        picture = random_resized_crop(read_image(image), self.processor.crop, rng, self.crop_scale)
        return self.processor.normalize(picture)


def _evaluators(
    model: QLIP, val: list[dict], names: list[list[str]], templates: tuple[str, ...], out: Path
) -> list[Evaluator]:
    """Reconstruction and, for labelled samples, zero-shot; and a picture of what is rebuilt."""
    if not val:
        return []

    def draw() -> dict[str, float]:
        reconstruction_grid(model, val[:: max(1, len(val) // 24)][:24]).save(out / "reconstructions.png")
        return {}

    evaluators: list[Evaluator] = [partial(reconstruction, model, val), draw]
    if names and "label" in val[0]:
        evaluators.append(partial(zero_shot, model, val, [n[0] for n in names], templates))
    return evaluators


def _check_compiler(recipe: Recipe) -> None:
    on_cpu, compilers = recipe.device.startswith("cpu"), (os.environ.get("CXX", "g++"), "clang++")
    if recipe.compile and on_cpu and not any(map(shutil.which, compilers)):
        raise InputError("compiling the model needs a C++ compiler: install g++, or pass --no-compile")


def _record(recipe: Recipe, out: Path, resume: bool) -> None:
    """Write `recipe.json`: the recipe, and a segment for the start and for each time that the run was resumed.

    A resumed run must be of the same recipe, but for how long and how often, and on what.
    """
    path, plain = out / "recipe.json", to_plain(recipe)
    checkpoint = latest_checkpoint(out)
    if checkpoint and not resume:
        return  # `fit` refuses such a folder, which stays as it is
    segments = []
    if checkpoint and path.exists():
        record = json.loads(path.read_text(encoding="utf-8"))
        segments = record["segments"]
        for name in plain.keys() - {"fit", "device", "compile"}:
            if record["recipe"].get(name) != plain[name]:
                raise InputError(f"{out} holds a run with another {name!r}: resume with its recipe.json as RECIPE")
    first_step = checkpoint_step(checkpoint) + 1 if checkpoint else 1
    segments.append({"first_step": first_step, "fit": plain["fit"], "environment": environment(recipe.device)})
    with whole_file(path) as unfinished:
        text = json.dumps({"recipe": plain, "segments": segments}, indent=2)
        unfinished.write_text(text + "\n", encoding="utf-8")


def build_model(recipe: Recipe, train: ParquetSamples, captioner: Captioner) -> QLIP:
    """A model with random weights, its image processor, and a vocabulary learnt from the captions."""
    size = recipe.model.vision.image_size
    text = recipe.model.text
    vocabulary = TextTokenizer.train(_captions(train, captioner), text.vocab_size, text.max_position_embeddings)
    text = replace(
        text,
        vocab_size=vocabulary.vocab_size,
        bos_token_id=vocabulary.bos_token_id,
        eos_token_id=vocabulary.eos_token_id,
        pad_token_id=vocabulary.pad_token_id,
    )
    torch.manual_seed(recipe.seed)
    model = QLIP(
        replace(recipe.model, text=text),
        image_processor=ImageProcessor(resize=size, crop=size),
        text_tokenizer=vocabulary,
    )
    return model.to(recipe.device)


def _captions(train: ParquetSamples, captioner: Captioner) -> Iterator[str]:
    """All captions of the samples, and all that class names and templates can say."""
    yield from train.captions()
    for names in captioner.names:
        yield from (t.replace("{}", name) for name in names for t in captioner.templates)


def _some(samples: ParquetSamples, count: int) -> list[dict]:
    """At most `count` samples, evenly spread."""
    return [samples[i * len(samples) // count] for i in range(count)] if count < len(samples) else samples[:]
