r"""A unified model at the paper's size and at a tiny one, and what runs them (docs/um3-training.md).

    qlip tokenize DATA --keep caption --out tokens
    qlip train um3-tiny --base stories15M-6k --tokens tokens --text stories/train.jsonl --out runs/um3
    torchrun --nproc-per-node 8 -m qlip.cli train um3-1b --tokens tokens --text text/ --cache cache --out runs/1b

`um3-1b` has the settings of the paper's Table 9, but for the length: it prints 600,000 iterations, which of 512
rows of 4,096 would be 1.26 T tokens; 60,000 are 126 B, which fits the count that it gives. The hours have not been
measured. `um3-tiny` sees 4.4 M tokens, about 10,000 pictures among them, in 45 minutes of one CPU core.
"""

import logging
from collections.abc import Generator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from tokenizers import Tokenizer
from torch import Tensor

from qlip.data.captions import Captioner, read_class_names
from qlip.data.journal import Journal
from qlip.data.samples import evenly
from qlip.data.token_file import TokenFiles
from qlip.errors import InputError
from qlip.jobs.of_tokens import tokenizer_name
from qlip.lm.checkpoint import load as load_lm
from qlip.lm.checkpoint import read_config
from qlip.model.hub import fetch
from qlip.recipes.record import REQUIRED, is_record, read_recipe, settle, write_record
from qlip.train.distributed import on_all_ranks, on_first_rank, processes, rank, world_size
from qlip.train.fit import Evaluator, FitConfig, fit, start_checkpoint
from qlip.train.nonfinite import for_json, replay
from qlip.train.optim import AdamWConfig
from qlip.train.parallel import ComputeConfig
from qlip.train.plot import require_matplotlib
from qlip.train.trackers import require
from qlip.um3.checkpoint import add_image_specials, open_tokenizer, save
from qlip.um3.config import Softmax, UM3Config
from qlip.um3.data import Batches, DataSources, training_batches
from qlip.um3.evaluate import held_out_pictures, held_out_text
from qlip.um3.mix import MixConfig
from qlip.um3.model import UM3
from qlip.um3.sources import Pictures, Text
from qlip.um3.train import UM3Task

STAGE = "um3"  # in `recipe.json`
CALIBRATING = 64  # documents on which the base's queries and keys are measured
logger = logging.getLogger("qlip")


@dataclass(frozen=True)
class UM3DataConfig:
    """Where text and pictures come from.

    Attributes:
        tokens: token files, or folders of them, with captions, or with labels that `classes` names.
        val_tokens: the same, held out; may be empty.
        text: files or folders of text, or datasets:NAME; see `qlip.um3.sources`.
        val_text: the same, held out; may be empty.
        column: which holds the text.
        classes: JSON file of class names; of a picture without a caption they make "a photo of a ….".
        cache: a folder where text and tokens are kept as they are read fastest.
        max_val: pictures and documents, evenly spread, that an evaluation looks at.
        num_workers: processes that make batches, for each training process.
        max_skipped_share: of the images that may be skipped because they have no usable caption.
    """

    tokens: Annotated[tuple[Path, ...], REQUIRED] = ()
    val_tokens: tuple[Path, ...] = ()
    text: Annotated[tuple[str, ...], REQUIRED] = ()
    val_text: tuple[str, ...] = ()
    column: str = "text"
    classes: Path | None = None
    cache: Path | None = None
    max_val: int = 1000
    num_workers: int = 0
    max_skipped_share: float = 0.01

    def __post_init__(self):
        if self.max_val < 1 or self.num_workers < 0:
            raise InputError("max_val must be at least 1, and num_workers 0 or more")
        if not 0 <= self.max_skipped_share < 1:
            raise InputError(f"max_skipped_share is {self.max_skipped_share}: it must be a share in [0, 1)")


@dataclass(frozen=True)
class UM3Recipe(ComputeConfig):
    """Everything that makes a unified model.

    Attributes:
        data: where text and pictures come from.
        base: the language model: a folder of Hugging Face's layout, or a hub id.
        mix: how much of a batch is text, image→text and text→image.
        bits: the width of a sub-token; divides that of a token.
        qk_norm: normalise queries and keys.
        calibrate: begin with the norms' gains that change the base's queries and keys on the text least; else 1.
        softmax: "separate": text and pictures each over their own vocabulary; "joint": over both.
        sequence_length: tokens of a row.
        max_caption_tokens: the most of a caption that is read; a row keeps room for so many.
        tokenizer: that made the tokens; None takes the name that the token files have.
        task: how the parameters move.
        fit: how long and how often.
        batch_size: rows an optimizer step, over all processes.
        seed: of the new rows of the vocabulary and of the order.
    """

    data: Annotated[UM3DataConfig, tyro.conf.arg(name="")] = field(default_factory=UM3DataConfig)
    base: str = "meta-llama/Llama-3.2-1B"
    mix: Annotated[MixConfig, tyro.conf.arg(name="")] = field(default_factory=MixConfig)
    bits: int = 14
    qk_norm: bool = True
    calibrate: bool = True
    softmax: Softmax = "separate"
    sequence_length: int = 4096
    max_caption_tokens: int = 64
    tokenizer: str | None = None
    task: Annotated[AdamWConfig, tyro.conf.arg(name="")] = field(default_factory=AdamWConfig)
    fit: Annotated[FitConfig, tyro.conf.arg(name="")] = field(default_factory=FitConfig)
    batch_size: int = 512
    seed: int = 0

    def __post_init__(self):
        for name in ("batch_size", "sequence_length", "max_caption_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.seed < 0:
            raise InputError(f"seed is {self.seed}: it must be 0 or more")


RECIPES = {
    "um3-1b": UM3Recipe(
        data=UM3DataConfig(num_workers=2),
        fit=FitConfig(steps=60_000, warmup_steps=2000, log_every=100, eval_every=2500, save_every=2500, best=None),
        recompute=True,
    ),
    "um3-tiny": UM3Recipe(
        data=UM3DataConfig(max_val=100),
        mix=MixConfig((10, 1, 3), (2, 1, 3), calm_down_steps=200),
        base="stories15M-6k",
        bits=7,
        sequence_length=552,
        max_caption_tokens=16,
        task=AdamWConfig(lr=2e-4),
        fit=FitConfig(steps=1000, warmup_steps=50, eval_every=500, save_every=250, best=None),
        batch_size=8,
        compile=True,
    ),
}


def is_recipe(name: str) -> bool:
    """Whether it names a recipe of this kind, or the `recipe.json` of a run of one."""
    return name in RECIPES or is_record(name, STAGE)


def load_recipe(name: str) -> UM3Recipe:
    """A recipe by name, or from a run's `recipe.json`; see `is_recipe`.

    Raises:
        InputError: the file is not a recipe.
    """
    return RECIPES[name] if name in RECIPES else read_recipe(name, {STAGE: UM3Recipe})


def run(recipe: UM3Recipe, out: Path, resume: bool = False) -> bool:
    """Train a model and leave everything in one folder. With `torchrun`, every process calls it.

    Args:
        recipe: what to do.
        out: folder for `recipe.json`, what `fit` leaves, and, at the end, for `model/`, which `qlip.load_um3`
            reads.
        resume: go on where an interrupted run stopped.

    Returns:
        Whether it came to its end; if not, SIGTERM or Ctrl-C stopped it, and `resume` goes on.

    Raises:
        InputError: the recipe cannot be run: missing data or base, other ids, a mix of what is not there, a folder
            that holds another run.
    """
    with processes(recipe.device) as device:
        recipe = settle(recipe, device, out if start_checkpoint(out, resume) else None)
        config, tokenizer, batches, task = _prepare(recipe, device)
        evaluators = on_all_ranks(partial(_evaluators, recipe, config, tokenizer))

        def stream(start_step: int, notes: Path | None = out) -> Generator[dict[str, Any], None, None]:
            pictures: Any = batches.sources.pictures or ()
            settings = recipe.data.max_skipped_share, notes, rank(), world_size(), "--max-skipped-share"
            journal = Journal(pictures, *settings)
            yield from training_batches(batches, start_step, recipe.data.num_workers, journal)

        on_all_ranks(lambda: next(stream(0, None)))  # what cannot be used fails before it writes
        num_documents, num_pictures = len(batches.sources.text or ()), len(batches.sources.pictures or ())
        on_first_rank(partial(write_record, recipe, STAGE, num_documents + num_pictures, out))
        logger.info("training on %s documents and %s pictures", f"{num_documents:,}", f"{num_pictures:,}")
        outcome = fit(task, stream, recipe.fit, out, evaluators, resume, recipe.seed, device)
        finished = outcome.step == recipe.fit.steps
        if finished:
            trained = task.snapshot()
            on_first_rank(partial(save, trained, out / "model", tokenizer))
        return finished


def calibration(text: Text, longest: int) -> list[Tensor]:
    """The documents on which a run measures its base's queries and keys: (1, T) ids each, T at most `longest`."""
    return [torch.from_numpy(text.document(i)[:longest])[None] for i in range(min(len(text), CALIBRATING))]


def do_again(recipe: UM3Recipe, folder: Path) -> dict[str, float | str]:
    """Do the step again that a run left when a loss was not finite; see `qlip.train.nonfinite`.

    Returns:
        this process's values, for JSON.
    """
    with processes(recipe.device) as device:
        recipe = settle(recipe, device, folder.resolve().parents[1])
        *_, task = _prepare(recipe, device)
        return for_json(replay(task, folder, recipe.seed))


def _prepare(recipe: UM3Recipe, device: torch.device) -> tuple[UM3Config, Tokenizer, Batches, UM3Task]:
    """Check what can be checked, read base and data, build the task; on all ranks."""
    folder = on_all_ranks(partial(_base, recipe))
    config, tokenizer = on_all_ranks(partial(_config, recipe, folder))
    if recipe.data.cache:  # the first rank makes it, the others find it
        for named in (recipe.data.text, recipe.data.val_text):
            on_first_rank(partial(_text, recipe, named, config, tokenizer))
    sources = on_all_ranks(partial(_sources, recipe, config, tokenizer))
    rows = recipe.sequence_length, recipe.batch_size, recipe.seed, rank(), world_size()
    batches = on_all_ranks(partial(Batches, sources, recipe.mix, config, *rows))
    task = on_all_ranks(partial(_task, recipe, folder, config, sources.text, device))
    return config, tokenizer, batches, task


def _base(recipe: UM3Recipe) -> Path:
    """The language model's folder."""
    require_matplotlib()
    require(recipe.fit.log_to)
    recipe.num_parts(recipe.batch_size)
    if Path(recipe.base).is_dir():
        return Path(recipe.base)
    if recipe.base.count("/") != 1:
        raise InputError(f"base {recipe.base!r} is no folder and no hub id: name the language model with --base")
    return fetch(recipe.base, sharded=True)


def _config(recipe: UM3Recipe, folder: Path) -> tuple[UM3Config, Tokenizer]:
    """What the model is to be, and the tokenizer that it reads with."""
    if not recipe.data.tokens:
        raise InputError("no pictures: name token files or folders with --tokens")
    found, tokenizer = TokenFiles.open(recipe.data.tokens).format, open_tokenizer(folder)
    boi, eoi = add_image_specials(tokenizer)
    config = UM3Config.of(
        read_config(folder),
        num_bits=found.bits,
        bits=recipe.bits,
        grid=found.grid,
        tokenizer=tokenizer_name(found, recipe.tokenizer),
        id_hash=found.id_hash,
        boi=boi,
        eoi=eoi,
        softmax=recipe.softmax,
        qk_norm=recipe.qk_norm,
        max_position_embeddings=recipe.sequence_length,
    )
    return config, tokenizer


def _text(recipe: UM3Recipe, sources: tuple[str, ...], config: UM3Config, tokenizer: Tokenizer) -> Text | None:
    return Text.open(sources, tokenizer, config, recipe.data.column, recipe.data.cache) if sources else None


def _pictures(recipe: UM3Recipe, paths: tuple[Path, ...], config: UM3Config, tokenizer: Tokenizer) -> Pictures:
    names = read_class_names(recipe.data.classes) if recipe.data.classes else ()
    longest = recipe.max_caption_tokens
    return Pictures(paths, config, tokenizer, longest, Captioner(names), recipe.data.cache)


def _sources(recipe: UM3Recipe, config: UM3Config, tokenizer: Tokenizer) -> DataSources:
    text = _text(recipe, recipe.data.text, config, tokenizer)
    return DataSources(text, _pictures(recipe, recipe.data.tokens, config, tokenizer))


def _task(recipe: UM3Recipe, folder: Path, config: UM3Config, text: Text | None, device: torch.device) -> UM3Task:
    base = load_lm(folder)
    documents = []
    if recipe.calibrate and config.lm.qk_norm > base.config.qk_norm and text:
        documents = calibration(text, min(base.config.max_position_embeddings, recipe.sequence_length))
    model = UM3.from_llama(base, config, calibration=documents, seed=recipe.seed)
    return UM3Task(model.to(device), recipe.task, recipe, recipe.batch_size)


def _evaluators(recipe: UM3Recipe, config: UM3Config, tokenizer: Tokenizer) -> list[Evaluator]:
    evaluators: list[Evaluator] = []
    if text := _text(recipe, recipe.data.val_text, config, tokenizer):
        evaluators.append(partial(held_out_text, text=text, max_documents=recipe.data.max_val))
    if recipe.data.val_tokens:
        pictures = _pictures(recipe, recipe.data.val_tokens, config, tokenizer)
        indices = evenly(len(pictures), recipe.data.max_val)
        pictures.read(indices, indices)  # what cannot be used fails now, not at the first evaluation
        evaluators.append(partial(held_out_pictures, pictures=pictures, max_pictures=recipe.data.max_val))
    return evaluators
