r"""LLaVA-1.5's two stages, at the paper's size and at a tiny one, and what runs them (docs/llava.md).

    qlip llava train llava-pretrain --vision nvidia/QLIP-L-14-392 --llm lmsys/vicuna-7b-v1.5 \
        --data.train blip_laion_cc_sbu_558k.json --data.images LLaVA-Pretrain --out runs/pretrain
    qlip llava train llava-finetune --start runs/pretrain/model \
        --data.train llava_v1_5_mix665k.json --data.images LLaVA-Instruct --out runs/finetune

With `torchrun` on several GPUs; `--sharding fsdp` shares the model out. An epoch each, as in docs/paper.md section
5; section 6 has the numbers to expect. The hours have not been measured.
"""

import logging
from collections.abc import Generator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
import tyro

from qlip.data.journal import Journal
from qlip.data.loader import batches
from qlip.data.samples import Joined
from qlip.errors import InputError
from qlip.llava.data import PLAIN_TEMPLATE, ConversationFile, Conversations, num_image_tokens
from qlip.llava.model import FeatureSource, build, load
from qlip.llava.task import LlavaTask, LlavaTaskConfig
from qlip.recipes.record import REQUIRED, read_recipe, settle, write_record
from qlip.train.distributed import on_all_ranks, on_first_rank, processes, rank, world_size
from qlip.train.fit import FitConfig, fit, start_checkpoint
from qlip.train.nonfinite import for_json, replay
from qlip.train.parallel import ComputeConfig
from qlip.train.plot import require_matplotlib
from qlip.train.trackers import require

STAGE = "llava"  # in `recipe.json`
logger = logging.getLogger("qlip")


@dataclass(frozen=True)
class LlavaDataConfig:
    """Where conversations come from.

    Attributes:
        train: JSON files in LLaVA's form.
        images: the folder that the pictures' paths in them start from.
        template: how a conversation is worded: "chat", by the language model's chat template; "plain", the picture
            and what is said of it, as in LLaVA's first stage.
        max_length: tokens of a conversation that are kept, those of the picture among them.
        num_workers: processes that read, for each training process; 0 reads in the training process.
        max_skipped_share: of the conversations that may be skipped because they cannot be used.
    """

    train: Annotated[tuple[Path, ...], REQUIRED] = ()
    images: Path | None = None
    template: Literal["chat", "plain"] = "chat"
    max_length: int = 2048
    num_workers: int = 0
    max_skipped_share: float = 0.01

    def __post_init__(self):
        if self.max_length < 1 or self.num_workers < 0:
            raise InputError("max_length must be at least 1, and num_workers 0 or more")
        if not 0 <= self.max_skipped_share < 1:
            raise InputError(f"max_skipped_share is {self.max_skipped_share}: it must be a share in [0, 1)")


@dataclass(frozen=True)
class LlavaRecipe(ComputeConfig):
    """Everything that makes a stage of LLaVA's training.

    Attributes:
        vision: the tokenizer that sees: a bundled name, a folder, or a hub id.
        llm: folder or hub id of the language model.
        feature_source: which of the tokenizer's features the projector sees; see `qlip.llava.build`.
        start: a LLaVA folder to go on with, in the place of vision, llm and feature_source.
        data: where conversations come from.
        task: what moves, and how.
        fit: how long and how often.
        batch_size: conversations an optimizer step, over all processes.
        seed: of the projector and the data order.
    """

    vision: str | None = None
    llm: str | None = None
    feature_source: FeatureSource = "layer-2"
    start: Path | None = None
    data: LlavaDataConfig = field(default_factory=LlavaDataConfig)
    task: Annotated[LlavaTaskConfig, tyro.conf.arg(name="")] = field(default_factory=LlavaTaskConfig)
    fit: Annotated[FitConfig, tyro.conf.arg(name="")] = field(default_factory=FitConfig)
    batch_size: int = 128
    seed: int = 0

    def __post_init__(self):
        if self.batch_size < 1 or self.seed < 0:
            raise InputError("batch_size must be at least 1, and seed 0 or more")
        if self.start and (self.vision or self.llm):
            raise InputError(f"start is {self.start}: it brings its own vision and llm, leave them out")


_PRETRAIN = LlavaRecipe(
    data=LlavaDataConfig(template="plain", num_workers=4),
    task=LlavaTaskConfig(train="projector", lr=1e-3),
    fit=FitConfig(steps=2180, warmup_steps=65, eval_every=500, save_every=200, best=None),
    batch_size=256,
)
_FINETUNE = LlavaRecipe(
    data=LlavaDataConfig(num_workers=4),
    task=LlavaTaskConfig(train="llm", lr=2e-5),
    fit=FitConfig(steps=5197, warmup_steps=156, eval_every=500, save_every=500, best=None),
    batch_size=128,
)

RECIPES = {
    "llava-pretrain": _PRETRAIN,
    "llava-finetune": _FINETUNE,
    "llava-tiny-pretrain": replace(
        _PRETRAIN,
        vision="qlip-tiny",
        data=LlavaDataConfig(template="plain", max_length=256),
        task=LlavaTaskConfig(train="projector", lr=2e-3),
        fit=FitConfig(steps=150, warmup_steps=5, eval_every=150, save_every=50, best=None),
        batch_size=32,
    ),
    "llava-tiny-finetune": replace(
        _FINETUNE,
        data=LlavaDataConfig(max_length=256),
        task=LlavaTaskConfig(train="llm", lr=1e-3),
        fit=FitConfig(steps=800, warmup_steps=25, eval_every=800, save_every=100, best=None),
        batch_size=32,
    ),
}


def load_recipe(name: str) -> LlavaRecipe:
    """A recipe by name, or from a run's `recipe.json`.

    Raises:
        InputError: there is no such recipe, or the file is not one.
    """
    if name in RECIPES:
        return RECIPES[name]
    if not Path(name).is_file():
        raise InputError(f"no recipe {name!r}: use one of {list(RECIPES)}, or the recipe.json of a run")
    return read_recipe(name, {STAGE: LlavaRecipe})


def run(recipe: LlavaRecipe, out: Path, resume: bool = False) -> bool:
    """Train a stage and leave everything in one folder. With `torchrun`, every process calls it.

    Args:
        recipe: what to do.
        out: folder for `recipe.json`, what `fit` leaves, and, at the end, for `model/`, which `qlip.llava.load`
            and `transformers` read.
        resume: go on where an interrupted run stopped.

    Returns:
        Whether it came to its end; if not, SIGTERM or Ctrl-C stopped it, and `resume` goes on.

    Raises:
        InputError: the recipe cannot be run: missing data or models, a folder that holds another run.
    """
    with processes(recipe.device) as device:
        resumed = start_checkpoint(out, resume) is not None
        recipe = settle(recipe, device, out if resumed else None)
        task, dataset = on_all_ranks(partial(_prepare, recipe, device))

        def stream(start_step: int, notes: Path | None = out) -> Generator[dict[str, Any], None, None]:
            place = rank(), world_size()
            journal = Journal(dataset.samples, recipe.data.max_skipped_share, notes, *place)
            yield from batches(
                dataset, None, recipe.batch_size, start_step, recipe.data.num_workers, *place, journal=journal
            )

        on_all_ranks(lambda: next(stream(0, None)))  # data that cannot be used fails before anything is written
        num_samples = len(cast(Joined, dataset.samples))
        on_first_rank(partial(write_record, recipe, STAGE, num_samples, out))
        logger.info("training on %s conversations", f"{num_samples:,}")
        outcome = fit(task, stream, recipe.fit, out, (), resume, recipe.seed, device)
        finished = outcome.step == recipe.fit.steps
        if finished:
            trained = task.snapshot()
            on_first_rank(partial(_save, trained, dataset.processor, out / "model"))
        return finished


def do_again(recipe: LlavaRecipe, folder: Path) -> dict[str, float | str]:
    """Do the step again that a run left when a loss was not finite; see `qlip.train.nonfinite`.

    Returns:
        this process's values, for JSON.
    """
    with processes(recipe.device) as device:
        recipe = settle(recipe, device, folder.resolve().parents[1])
        task, _ = on_all_ranks(partial(_prepare, recipe, device))
        return for_json(replay(task, folder, recipe.seed))


def _prepare(recipe: LlavaRecipe, device: torch.device) -> tuple[LlavaTask, Conversations]:
    """Check what can be checked, read data and models, build the task."""
    require_matplotlib()
    require(recipe.fit.log_to)
    recipe.num_parts(recipe.batch_size)
    if not recipe.data.train:
        raise InputError("no training data: name LLaVA's JSON files with --data.train")
    samples = Joined([ConversationFile(file, recipe.data.images) for file in recipe.data.train])
    torch.manual_seed(recipe.seed)
    model: Any
    if recipe.start:
        model, processor = load(recipe.start)
    elif recipe.vision and recipe.llm:
        model, processor = build(recipe.vision, recipe.llm, recipe.feature_source)
    else:
        raise InputError("no model: name a tokenizer with --vision and a language model with --llm, or --start")
    if recipe.data.max_length <= num_image_tokens(processor):
        raise InputError(
            f"max_length {recipe.data.max_length} has no room beside the {num_image_tokens(processor)} tokens of "
            "a picture: raise it"
        )
    template = PLAIN_TEMPLATE if recipe.data.template == "plain" else None
    dataset = Conversations(samples, processor, template, recipe.data.max_length, recipe.seed)
    return LlavaTask(model.to(device), recipe.task, recipe, recipe.batch_size), dataset


def _save(model: Any, processor: Any, folder: Path) -> None:
    try:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error.strerror or error}): make room") from error
