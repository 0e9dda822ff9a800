"""A text-to-image model, or a UM3, on a data set: draw after its words, keep the pictures, measure them."""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qlip.data.samples import BadSample, Joined, evenly
from qlip.data.sources import open_indexed
from qlip.errors import InputError
from qlip.eval.drawings import Drawer, Judges, Words, classes_of, evaluate_drawn, open_judges
from qlip.eval.options import Drawing, Options, Scoring
from qlip.eval.run import Record, Tracker, check_card
from qlip.files import whole_file
from qlip.jobs.draw import Draw, Painter, Sheet, draw_sheets, fingerprint, load_painter
from qlip.model.checkpoint import called
from qlip.t2i.pipeline import TextToImage
from qlip.train.distributed import on_all_ranks, on_first_rank, processes

FOLDER, LIST = "drawn", "drawn.jsonl"


def evaluate_t2i(
    model: str,
    sources: Sequence[str],
    options: Options,
    tracker: Tracker,
    scoring: Scoring,
    drawing: Drawing,
    tokenizer: str | None = None,
) -> Record:
    """Draw after the words of a data set, and measure; see `qlip.eval.drawings`.

    Args:
        model: a bundled text-to-image model or UM3 by its name, or a folder.
        sources: of pictures with captions or labels.
        options: of all protocols. `max_samples` is of `sources`, and of the reference. Pictures go to
            `out`/drawn/, which `out`/drawn.jsonl lists with their words: a source like any other.
        tracker: shows progress.
        scoring: what is measured.
        drawing: how pictures are drawn.
        tokenizer: that draws the tokens; None: the one that the model was trained with.

    Returns:
        what stands in results.json.

    Raises:
        InputError: see `load_painter`, `draw_sheets` and `evaluate_drawn`.
    """
    name = called(model)
    out = options.out or Path("results", name, "t2i")
    with processes(options.device) as device:
        painter = on_all_ranks(
            lambda: load_painter(model, tokenizer=tokenizer, device=device, dtype=getattr(torch, options.dtype))
        )
        config = painter.model.config
        with_classes = isinstance(painter, TextToImage) and painter.reader is None

        def prepare() -> tuple[Judges, list[Sheet], list[Record]]:
            samples = open_indexed(sources)
            words = Words(classes_of(scoring, samples, samples), scoring.template)
            judges = open_judges(scoring, words.classes, device)  # before anything is drawn, as what follows
            check_card(options, model)
            if scoring.reference:
                open_indexed(scoring.reference)
            return judges, *plan(samples, words, out, drawing, options.max_samples, with_classes)

        judges, sheets, lines = on_all_ranks(prepare)
        settings = _settings(painter, drawing)
        about = {"model": fingerprint(painter), **settings}
        draw: Draw = partial(painter.draw_rows, batch_size=options.batch_size, **settings)
        draw_sheets(sheets, draw, about, tracker("drawing"))
        on_first_rank(partial(_write_list, out / LIST, lines))
        described = {"num": drawing.num, "seed": drawing.seed, **settings, "weights": about["model"]}
        described |= painter.describe() | {"drawn_after": [Path(source).name for source in sources]}
        drawer = Drawer(name, config.id_hash, options.dtype, described)
        own = tokenizer or config.tokenizer
        options = replace(options, out=out)
        return evaluate_drawn([str(out / LIST)], sources, options, tracker, scoring, own, drawer, judges, model)


def plan(
    samples: Joined, words: Words, out: Path, drawing: Drawing, most: int | None, with_classes: bool
) -> tuple[list[Sheet], list[Record]]:
    """What is to be drawn: a file for each picture, and its line in the list.

    Args:
        samples: with captions or labels.
        words: of each.
        out: folder.
        drawing: `num` pictures of each sample; picture k of sample i has the seed `seed` + i · `num` + k.
        most: so many samples, evenly spread.
        with_classes: whether the model draws after labels.

    Raises:
        InputError: a sample has neither words nor a label.
    """
    sheets: list[Sheet] = []
    lines: list[Record] = []
    for i, index in enumerate(evenly(len(samples), most or len(samples))):
        try:
            sample = samples[index]
        except BadSample as error:
            raise InputError(f"{error}: there is nothing to draw after") from error
        label = sample.get("label")
        if with_classes and not isinstance(label, int):
            raise InputError(f"{sample.get('key')}: no label, and this model draws classes: give labelled data")
        line: Record = {} if label is None else {"label": label}
        if not with_classes or words.classes:
            line["caption"] = words(sample)
        for k in range(drawing.num):
            number = i * drawing.num + k
            path = out / FOLDER / f"{number:06d}.png"
            sheets.append(
                Sheet(path, str(label) if with_classes else str(line["caption"]), (drawing.seed + number,))
            )
            lines.append({"image": f"{FOLDER}/{path.name}", **line})
    return sheets, lines


def _write_list(path: Path, lines: Sequence[Record]) -> None:
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    with whole_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def _settings(painter: Painter, drawing: Drawing) -> dict[str, Any]:
    """How to draw: what was said, and of the rest what the model takes itself."""
    own = painter.published
    usual = {"cfg": own.guidance_scale} | {name: getattr(own, name) for name in ("temperature", "top_k", "top_p")}
    said = {name: getattr(drawing, name) for name in usual}
    return {name: usual[name] if value is None else value for name, value in said.items()}
