r"""Text to image at the paper's size and at a tiny one, and what runs them (docs/t2i.md).

    qlip tokenize DATA --keep caption --out tokens
    qlip train t2i-tiny --tokens tokens --val-tokens held-out --out runs/t2i
    torchrun --nproc-per-node 8 -m qlip.cli train t2i-xl --tokens tokens --features features/* --out runs/xl

`t2i-xl` is LlamaGen's GPT-XL on 2 × 14 bits a token. The paper trains on 15 M images (its Table 1) and does not
say how often it passes over them: 58,600 steps are one pass. The hours have not been measured.

`t2i-tiny` predicts a token's four sub-tokens of 7 bits in a chain, from one position of the transformer:
docs/results/t2i-bits.md compares. In bfloat16 it takes 6.5 MB.
"""

import logging
from collections.abc import Generator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from qlip.data.captions import class_sentences
from qlip.data.journal import Journal
from qlip.data.token_dataset import TokenDataset
from qlip.errors import InputError
from qlip.jobs.of_tokens import load_tokenizer, tokenizer_name
from qlip.recipes.record import REQUIRED, is_record, read_recipe, settle, write_record
from qlip.t2i.checkpoint import save
from qlip.t2i.condition import OWN, FeatureFiles, TextReader, open_reader
from qlip.t2i.config import CLASSES, SIZES, Embedding, Head, Size, T2IConfig
from qlip.t2i.data import Sentences, check_columns, check_held_out, held_out, training_batches
from qlip.t2i.model import T2I
from qlip.t2i.train import T2ITask
from qlip.train.distributed import on_all_ranks, on_first_rank, processes, rank, world_size
from qlip.train.fit import Evaluator, FitConfig, fit, start_checkpoint
from qlip.train.nonfinite import for_json, replay
from qlip.train.optim import AdamWConfig
from qlip.train.parallel import ComputeConfig
from qlip.train.plot import require_matplotlib
from qlip.train.trackers import require

STAGE = "t2i"  # in `recipe.json`
_LLAMAGEN = AdamWConfig(weight_decay=0.05)  # its other settings are UM3's
logger = logging.getLogger("qlip")


@dataclass(frozen=True)
class T2IDataConfig:
    """Where tokens and texts come from.

    Attributes:
        tokens: token files, or folders of them, with captions or labels.
        val_tokens: the same, held out; may be empty.
        features: files of the captions' features, computed before by `qlip features`; empty: they are computed
            as they are needed.
        classes: JSON file of class names, from which pictures with a label and no captions get theirs.
        cache: a folder where tokens are kept as they are read fastest; see `qlip.data.TokenDataset`.
        max_val: pictures of `val_tokens`, evenly spread over it, that an evaluation looks at.
        num_workers: processes that read tokens, for each training process.
        max_skipped_share: of the rows that may be skipped because they have no usable caption or label.
    """

    tokens: Annotated[tuple[Path, ...], REQUIRED] = ()
    val_tokens: tuple[Path, ...] = ()
    features: tuple[Path, ...] = ()
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
class T2IRecipe(ComputeConfig):
    """Everything that makes a text-to-image model.

    Attributes:
        data: where tokens and texts come from.
        size: tiny, or LlamaGen's b, l, xl.
        bits: the width of a sub-token; divides that of a token.
        embedding: of a sub-token: a table's row, or a linear map of its bits.
        head: how the sub-tokens of a token are predicted: in a "sequence", in "parallel", or in a "chain"; see
            `qlip.t2i.config.T2IConfig`.
        dropout: of embeddings and blocks; None takes the size's: 0.1 as LlamaGen, for tiny 0.
        condition: "qlip", the tokenizer's text tower; a folder or hub id of an encoder for `transformers`, such as
            google/flan-t5-xl; or "classes": the labels.
        num_text_tokens: the most of a caption that is read; of `features` what they were computed with.
        num_classes: how many labels there are, for "classes".
        condition_dropout: share of the pictures that are trained without their condition, for guidance.
        tokenizer: that made the tokens; None takes the name that the token files have.
        task: how the parameters move.
        fit: how long and how often.
        batch_size: pictures an optimizer step, over all processes.
        seed: of the weights, the order and what is dropped.
    """

    data: Annotated[T2IDataConfig, tyro.conf.arg(name="")] = field(default_factory=T2IDataConfig)
    size: Size = "xl"
    bits: int = 14
    embedding: Embedding = "table"
    head: Head = "sequence"
    dropout: float | None = None
    condition: str = "google/flan-t5-xl"
    num_text_tokens: int = 120
    num_classes: int = 0
    condition_dropout: float = 0.1
    tokenizer: str | None = None
    task: Annotated[AdamWConfig, tyro.conf.arg(name="")] = _LLAMAGEN
    fit: Annotated[FitConfig, tyro.conf.arg(name="")] = field(default_factory=FitConfig)
    batch_size: int = 256
    seed: int = 0

    def __post_init__(self):
        if self.batch_size < 1 or self.seed < 0:
            raise InputError("batch_size must be at least 1, and seed 0 or more")


RECIPES = {
    "t2i-xl": T2IRecipe(
        data=T2IDataConfig(num_workers=4),
        fit=FitConfig(steps=58_600, warmup_steps=2000, log_every=100, eval_every=5000, save_every=5000, best=None),
        recompute=True,
    ),
    "t2i-tiny": T2IRecipe(
        size="tiny",
        bits=7,
        head="chain",
        condition=OWN,
        task=replace(_LLAMAGEN, lr=1e-3),
        fit=FitConfig(steps=3000, warmup_steps=100, eval_every=500, save_every=250, best=None),
        batch_size=64,
        compile=True,
    ),
}


def is_recipe(name: str) -> bool:
    """Whether it names a recipe of this kind, or the `recipe.json` of a run of one."""
    return name in RECIPES or is_record(name, STAGE)


def load_recipe(name: str) -> T2IRecipe:
    """A recipe by name, or from a run's `recipe.json`; see `is_recipe`.

    Raises:
        InputError: the file is not a recipe.
    """
    return RECIPES[name] if name in RECIPES else read_recipe(name, {STAGE: T2IRecipe})


def run(recipe: T2IRecipe, out: Path, resume: bool = False) -> bool:
    """Train a model and leave everything in one folder. With `torchrun`, every process calls it.

    Args:
        recipe: what to do.
        out: folder for `recipe.json`, what `fit` leaves, and, at the end, for `model/`, which `qlip.load_t2i`
            reads.
        resume: go on where an interrupted run stopped.

    Returns:
        Whether it came to its end; if not, SIGTERM or Ctrl-C stopped it, and `resume` goes on.

    Raises:
        InputError: the recipe cannot be run: missing data or encoder, other ids, a folder that holds another run.
    """
    with processes(recipe.device) as device:
        recipe = settle(recipe, device, out if start_checkpoint(out, resume) else None)
        sentences, dataset, reader, task = _prepare(recipe, device)
        evaluators = on_all_ranks(partial(_evaluators, recipe, dataset, reader, sentences))

        def journal(notes: Path | None) -> Journal:
            settings = recipe.data.max_skipped_share, notes, rank(), world_size(), "--max-skipped-share"
            return Journal(dataset, *settings)  # type: ignore[arg-type]

        def stream(start_step: int, notes: Path | None = out) -> Generator[dict[str, Any], None, None]:
            order = recipe.batch_size, recipe.seed, start_step, rank(), world_size(), recipe.data.num_workers
            yield from training_batches(
                dataset, reader, recipe.condition_dropout, *order, sentences, recipe.num_classes, journal(notes)
            )

        on_all_ranks(lambda: next(stream(0, None)))  # data that cannot be used fails before anything is written
        on_first_rank(partial(write_record, recipe, STAGE, len(dataset), out))
        logger.info("training on %s pictures", f"{len(dataset):,}")
        outcome = fit(task, stream, recipe.fit, out, evaluators, resume, recipe.seed, device)
        finished = outcome.step == recipe.fit.steps
        if finished:
            trained = task.snapshot()
            on_first_rank(partial(save, trained, out / "model"))
        return finished


def do_again(recipe: T2IRecipe, folder: Path) -> dict[str, float | str]:
    """Do the step again that a run left when a loss was not finite; see `qlip.train.nonfinite`.

    Returns:
        this process's values, for JSON.
    """
    with processes(recipe.device) as device:
        recipe = settle(recipe, device, folder.resolve().parents[1])
        *_, task = _prepare(recipe, device)
        return for_json(replay(task, folder, recipe.seed))


def _prepare(
    recipe: T2IRecipe, device: torch.device
) -> tuple[Sentences, TokenDataset, TextReader | None, T2ITask]:
    """Open what is trained on, build the task; on all ranks."""
    sentences = on_all_ranks(partial(class_sentences, recipe.data.classes))
    dataset = on_all_ranks(partial(_open, recipe, recipe.data.tokens))
    reader = on_all_ranks(partial(_reader, recipe, dataset, device))
    task = on_all_ranks(partial(_task, recipe, dataset, reader, sentences, device))
    return sentences, dataset, reader, task


def _open(recipe: T2IRecipe, paths: tuple[Path, ...]) -> TokenDataset:
    if not paths:
        raise InputError("no training data: name token files or folders with --tokens")
    return TokenDataset(paths, recipe.bits, recipe.data.cache)


def _reader(recipe: T2IRecipe, dataset: TokenDataset, device: torch.device) -> TextReader | None:
    """What reads captions; None for labels."""
    if recipe.condition == CLASSES:
        if recipe.data.features:
            raise InputError("features are of texts, and condition is 'classes': leave them out")
        return None
    if recipe.data.features:
        files = FeatureFiles(recipe.data.features)
        if files.name != recipe.condition:
            raise InputError(f"the features are of {files.name!r}, and condition is {recipe.condition!r}")
        return files
    tokenizer = None
    if recipe.condition == OWN:
        tokenizer = load_tokenizer(dataset.format, recipe.tokenizer, device)
    return open_reader(recipe.condition, tokenizer, recipe.num_text_tokens, device)


def _task(
    recipe: T2IRecipe,
    dataset: TokenDataset,
    reader: TextReader | None,
    sentences: Sentences,
    device: torch.device,
) -> T2ITask:
    """Check what can be checked, build model and task."""
    require_matplotlib()
    require(recipe.fit.log_to)
    recipe.num_parts(recipe.batch_size)
    check_columns(dataset, reader, sentences)
    size = SIZES[recipe.size]
    config = T2IConfig.of(
        size if recipe.dropout is None else replace(size, dropout=recipe.dropout),
        num_bits=dataset.format.bits,
        bits=recipe.bits,
        grid=dataset.format.grid,
        tokenizer=tokenizer_name(dataset.format, recipe.tokenizer),
        id_hash=dataset.format.id_hash,
        condition=recipe.condition,
        condition_width=reader.width if reader else 0,
        num_text_tokens=reader.num_text_tokens if reader else 1,
        num_classes=recipe.num_classes,
        condition_dropout=recipe.condition_dropout,
        embedding=recipe.embedding,
        head=recipe.head,
    )
    torch.manual_seed(recipe.seed)
    return T2ITask(T2I(config).to(device), recipe.task, recipe, recipe.batch_size)


def _evaluators(
    recipe: T2IRecipe, dataset: TokenDataset, reader: TextReader | None, sentences: Sentences
) -> list[Evaluator]:
    if not recipe.data.val_tokens:
        return []
    val = _open(recipe, recipe.data.val_tokens)
    if (val.format.id_hash, val.format.grid) != (dataset.format.id_hash, dataset.format.grid):
        raise InputError("val_tokens are of another tokenizer or grid than tokens: tokenize both alike")
    check_columns(val, reader, sentences)
    most = recipe.data.max_val
    check_held_out(val, reader, most, sentences, recipe.num_classes)
    return [partial(held_out, dataset=val, reader=reader, max_pictures=most, sentences=sentences)]
