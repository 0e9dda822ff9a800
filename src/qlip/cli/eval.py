"""Commands that measure a tokenizer or a model: `qlip eval PROTOCOL`."""

from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.markup import escape
from rich.table import Table

from qlip.cli.options import (
    AT_LEAST_ONE,
    DEFAULT_MODEL,
    Group,
    Json,
    Model,
    finish,
    print_json,
    print_table,
    rank,
    say,
)
from qlip.cli.options import track as watch
from qlip.errors import InputError
from qlip.eval.options import (
    Drawing,
    FeatureName,
    LanguageOptions,
    Options,
    PerceptualName,
    ProbeConfig,
    Scoring,
)

Sources = Annotated[
    tuple[str, ...],
    tyro.conf.Positional,
    tyro.conf.arg(
        metavar="SOURCE…",
        help_behavior_hint=AT_LEAST_ONE,
        help="Pictures: files, folders, shards, datasets:NAME; see docs/data.md.",
    ),
]

OPTIONS, PROBE, DRAWING, SCORING = Options(), ProbeConfig(), Drawing(), Scoring()
LANGUAGE = LanguageOptions()
Shared = Annotated[Options, tyro.conf.arg(name="")]
Perceptual = Annotated[
    PerceptualName,
    tyro.conf.arg(help="Perceptual distance; auto takes LPIPS where its weights are, else ST-LPIPS."),
]


def zero_shot(
    sources: Sources,
    /,
    *,
    model: Model = DEFAULT_MODEL,
    classes: str | None = None,
    templates: tuple[str, ...] = (),
    options: Shared = OPTIONS,
    json: Json = False,
) -> int:
    """Classify with words: top-1 and top-5.

    Args:
        classes: "imagenet" for its 1,000 names, or a JSON file of class names; by default the data's own.
        templates: Sentences with {} for the name, or "imagenet" for CLIP's 80.
    """
    from qlip.eval.run import evaluate_zero_shot

    found = evaluate_zero_shot(model, sources, options, watch, classes, templates)
    return _show(found, json)


def retrieval(
    sources: Sources,
    /,
    *,
    model: Model = DEFAULT_MODEL,
    most_captions: int = 5,
    options: Shared = OPTIONS,
    json: Json = False,
) -> int:
    """Find pictures by captions and captions by pictures: recall at 1, 5, 10.

    Args:
        most_captions: Of a picture, the first ones.
    """
    from qlip.eval.run import evaluate_retrieval

    return _show(evaluate_retrieval(model, sources, options, watch, most_captions), json)


def reconstruction(
    sources: Sources,
    /,
    *,
    model: Model = DEFAULT_MODEL,
    features: tuple[FeatureName, ...] = ("auto",),
    inception_weights: Path | None = None,
    perceptual: Perceptual = "auto",
    options: Shared = OPTIONS,
    json: Json = False,
) -> int:
    """Rebuild pictures from their tokens: PSNR, SSIM, LPIPS, rFID, bits.

    Args:
        features: Networks for Fréchet distances; auto takes those whose weights are here.
        inception_weights: File of FID's Inception; by default torch.hub's folder has it.
    """
    from qlip.eval.run import evaluate_reconstruction

    found = evaluate_reconstruction(model, sources, options, watch, features, inception_weights, perceptual)
    return _show(found, json)


def linear_probe(
    *,
    train: tuple[str, ...],
    test: tuple[str, ...],
    model: Model = DEFAULT_MODEL,
    probe: ProbeConfig = PROBE,
    cache: Path | None = None,
    options: Shared = OPTIONS,
    json: Json = False,
) -> int:
    """Train a linear classifier on frozen features, by the paper's schedule: CLS, mean of patches, both.

    Args:
        train: Sources of labelled pictures.
        test: The same, held out.
        probe: The paper's schedule.
        cache: Folder in which features are kept; by default that of the results.
    """
    from qlip.eval.run import evaluate_linear_probe

    return _show(evaluate_linear_probe(model, train, test, options, watch, probe, cache), json)


def compare(
    sources: Sources,
    /,
    *,
    models: tuple[str, ...] = (DEFAULT_MODEL,),
    perceptual: Perceptual = "auto",
    options: Shared = OPTIONS,
    json: Json = False,
) -> int:
    """Tokenizers side by side, and JPEG, WebP and AVIF at the same bytes; writes compare.png, too.

    Args:
        models: Bundled names, folders, hub ids.
    """
    from qlip.eval.run import evaluate_compare

    return _show(evaluate_compare(models, sources, options, watch, perceptual), json)


def t2i(
    sources: Sources,
    /,
    *,
    model: str | None = None,
    drawn: tuple[str, ...] = (),
    tokenizer: str | None = None,
    drawing: Annotated[Drawing, tyro.conf.arg(name="")] = DRAWING,
    scoring: Annotated[Scoring, tyro.conf.arg(name="")] = SCORING,
    options: Shared = OPTIONS,
    json: Json = False,
) -> int:
    """Draw after the words of pictures and measure: gFID or a stand-in, CLIPScore, right classes.

    Args:
        model: A bundled text-to-image model or UM3 by its name, or a folder, such as RUN/model.
        drawn: Instead of a model, sources of pictures that were drawn, with captions or labels.
        tokenizer: That draws the tokens, and that rebuilds the reference beside; default: the model's own.
    """
    from qlip.eval.drawings import evaluate_drawn
    from qlip.jobs.evaluate_t2i import evaluate_t2i

    if bool(model) == bool(drawn):
        raise InputError("name either a --model that draws, or pictures that were --drawn")
    if model:
        found = evaluate_t2i(model, sources, options, watch, scoring, drawing, tokenizer)
    else:
        found = evaluate_drawn(drawn, sources, options, watch, scoring, tokenizer)
    return _show(found, json)


def um3_text(
    *, model: str, options: Annotated[LanguageOptions, tyro.conf.arg(name="")] = LANGUAGE, json: Json = False
) -> int:
    """Multiple choice by lm-eval: the language of a UM3, or of any causal language model.

    Args:
        model: A bundled UM3 by its name, a folder of one or in the layout of transformers, or a hub id.
    """
    from qlip.jobs.um3_text import evaluate_um3_text

    return _show(evaluate_um3_text(model, options), json, "documents")


def captions(*, predictions: Path, references: Path, out: Path | None = None, json: Json = False) -> int:
    """Compare captions with those of people: BLEU@4, METEOR, CIDEr.

    Args:
        predictions: JSON list of {"image_id", "caption"}, as COCO's server takes it.
        references: COCO's annotations.
        out: Folder for results.json; default: results/NAME/captions, NAME being that of the predictions.
    """
    from qlip.eval.captions import evaluate_captions

    return _show(evaluate_captions(predictions, references, out), json)


eval = Group(
    "Measure tokenizers and models; every protocol writes results.json.",
    {
        "zero-shot": zero_shot,
        "retrieval": retrieval,
        "reconstruction": reconstruction,
        "linear-probe": linear_probe,
        "compare": compare,
        "t2i": t2i,
        "um3-text": um3_text,
        "captions": captions,
    },
)


def _show(found: dict[str, Any], json: bool, what: str = "pictures") -> int:
    """On the first process, the numbers; what failed; the exit code."""
    if rank() != "0":
        return 0
    if json:
        print_json(found)
    else:
        print_table(TABLES.get(found["protocol"], _table)(found))
    say(f"{found['data']['num_samples']:,} {what}; all of it is in {found['folder']}/results.json")
    failed = [line for name in ("train_failed", "drawn_failed", "failed") for line in found["data"].get(name, [])]
    return finish(found["data"]["num_samples"], failed, strict=False)


def _table(found: dict[str, Any]) -> Table:
    from qlip.eval.results import label, shown

    ((name, numbers),) = found["results"].items()
    table = Table("", escape(name), "95 % interval", box=None, padding=(0, 2, 0, 0))
    for number, value in numbers.items():
        ends = [shown(number, {"value": value[end]}) for end in ("low", "high") if end in value]
        table.add_row(f"[bold]{escape(label(number))}", shown(number, value, False), " to ".join(ends))
    return table


def _side_by_side(found: dict[str, Any]) -> Table:
    from qlip.eval.results import label, shown

    rows = {who: numbers for who, numbers in found["results"].items() if " quality " not in who}
    names = [name for name in next(iter(rows.values())) if all(name in numbers for numbers in rows.values())]
    table = Table("", *map(label, names), box=None, padding=(0, 2, 0, 0))
    for who, numbers in rows.items():
        table.add_row(f"[bold]{escape(who)}", *(shown(name, numbers[name], False) for name in names))
    return table


def _beside_the_reference(found: dict[str, Any]) -> Table:
    """Drawn pictures and what they are compared with: a column each, with intervals."""
    from qlip.eval.results import label, shown

    rows = found["results"]
    table = Table("", *map(escape, rows), box=None, padding=(0, 2, 0, 0))
    for name in dict.fromkeys(name for numbers in rows.values() for name in numbers):
        cells = (shown(name, numbers[name]) if name in numbers else "" for numbers in rows.values())
        table.add_row(f"[bold]{escape(label(name))}", *cells)
    return table


TABLES = {"compare": _side_by_side, "t2i": _beside_the_reference}
