r"""What a small UM3 keeps and learns, and three ablations (docs/um3.md): language, captions, drawings.

    python benchmarks/um3_tiny.py --out runs/um3-tiny --base stories15M-6k --tokens tokens/train tokens/registry \
        --val-tokens tokens/val --text stories/train.jsonl more-stories/train.jsonl \
        --val-text stories/held-out.jsonl --val val-000.parquet --classes classes.json

Trains the recipe `um3-tiny`, and with fewer steps itself, with a joint softmax, without QK-norm and without the
calm-down. A finished run is not trained further, an interrupted one goes on. Of the long one it captions held-out
photographs and draws after their classes; `qlip eval um3-text` measures the five language sets. Writes
um3-tiny.json, .md and .png.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from textwrap import wrap
from typing import Any

import torch
import tyro
from PIL import Image, ImageDraw, ImageFont
from rich.progress import track

from qlip.data.captions import read_class_names
from qlip.data.samples import evenly
from qlip.data.sources import open_indexed
from qlip.environment import environment, resolve_device
from qlip.errors import InputError
from qlip.eval.captions import named_classes
from qlip.eval.interval import mean_of
from qlip.eval.options import Drawing, Scoring
from qlip.eval.options import Options as EvalOptions
from qlip.files import whole_file
from qlip.jobs.evaluate_t2i import evaluate_t2i
from qlip.lm.checkpoint import load as load_lm
from qlip.recipes.record import check_steps
from qlip.recipes.um3 import RECIPES, UM3DataConfig, UM3Recipe, calibration, run
from qlip.train.log import read_log
from qlip.um3.checkpoint import add_image_specials, open_tokenizer
from qlip.um3.config import UM3Config
from qlip.um3.evaluate import held_out_text
from qlip.um3.model import UM3
from qlip.um3.pipeline import UnifiedModel, load_um3
from qlip.um3.sources import Text

RESULTS = Path(__file__).parents[1] / "docs" / "results"
LONG = "um3-tiny"
SHOWN, DRAWN, SIDE, WORDS = 8, 5, 96, 260  # rows, drawings of each, pixels of a picture, pixels for the text
ARMS: dict[str, dict[str, Any]] = {
    LONG: {},
    "the same, short": {},
    "joint softmax": {"softmax": "joint"},
    "no QK-norm": {"qk_norm": False},
    "no calm-down": {"calm_down": 0},
}
NUMBERS = {
    "text_perplexity": "perplexity of stories",
    "bits_per_image": "bits a picture",
    "caption_nats_per_token": "nats a token of captions",
    "max_attention_scale": "q·k/√d",
}


@dataclass(frozen=True)
class Arguments:
    """What to train, and on what.

    Attributes:
        out: folder of the runs.
        base: folder of the Llama that it begins with; see examples/pruned_vocabulary.py.
        tokens, val_tokens: token files or folders, with captions or labels.
        text, val_text: files of text; see docs/um3-training.md.
        val: held-out photographs with labels, to be described, and drawn after.
        classes: JSON file of class names, which must be ImageNet's.
        steps: of the long run; None takes the recipe's.
        short_steps: of each short one; 0: there are none.
        num_val: photographs that are described, and drawings.
        cfg: how strongly the words count in drawings.
        device: "auto" takes a GPU if there is one.
        results: folder for the tables.
    """

    out: Path
    base: str
    tokens: tuple[Path, ...]
    val_tokens: tuple[Path, ...]
    text: tuple[str, ...]
    val_text: tuple[str, ...]
    val: tuple[str, ...]
    classes: Path
    steps: int | None = None
    short_steps: int = 200
    num_val: int = 1000
    cfg: float = 3.0
    device: str = "auto"
    results: Path = RESULTS


def recipe(args: Arguments, arm: str) -> UM3Recipe:
    """The run of an arm."""
    base, varied = RECIPES["um3-tiny"], dict(ARMS[arm])
    steps = (args.steps or base.fit.steps) if arm == LONG else args.short_steps
    calm_down = varied.pop("calm_down", steps // 5)
    return replace(
        base,
        base=args.base,
        data=UM3DataConfig(
            args.tokens,
            args.val_tokens,
            args.text,
            args.val_text,
            classes=args.classes,
            max_val=base.data.max_val,
        ),
        mix=replace(base.mix, calm_down_steps=calm_down),
        fit=replace(base.fit, steps=steps, warmup_steps=max(1, steps // 20), eval_every=steps),
        device=args.device,
        **varied,
    )


def trained(args: Arguments, arm: str) -> dict[str, float] | None:
    """Train an arm as far as it is not; the numbers of its last evaluation. None if SIGTERM stopped it.

    Raises:
        InputError: its folder holds a run of other settings.
    """
    folder = args.out / arm.replace(",", "").replace(" ", "-")
    made = recipe(args, arm)
    check_steps(folder, made.fit.steps)
    if not run(made, folder, resume=True):
        return None
    last = [line for line in read_log(folder / "log.jsonl") if "eval/text_perplexity" in line][-1]
    return {name: last[f"eval/{name}"] for name in NUMBERS}


def before(args: Arguments, config: UM3Config) -> dict[str, dict[str, float]]:
    """What the base makes of the held-out text: as it is, and with QK-norm before any training.

    The gains of the norms are calibrated, as in training, or 1.
    """
    words, base = open_tokenizer(Path(args.base)), load_lm(args.base)
    boi, eoi = add_image_specials(words)
    about = {key: getattr(config, key) for key in ("num_bits", "bits", "grid", "tokenizer", "id_hash")}
    longest, most = config.lm.max_position_embeddings, RECIPES["um3-tiny"].data.max_val
    found = {}
    for name, qk_norm, calibrate in (
        ("the base", False, False),
        ("the base with QK-norm, gains of 1", True, False),
        ("the base with QK-norm, calibrated", True, True),
    ):
        own = UM3Config.of(
            base.config, boi=boi, eoi=eoi, qk_norm=qk_norm, max_position_embeddings=longest, **about
        )
        documents: Sequence[torch.Tensor] = ()
        if calibrate:
            text = Text.open(args.text, words, own)
            documents = calibration(text, min(base.config.max_position_embeddings, longest))
        model = UM3.from_llama(base, own, calibration=documents)
        found[name] = held_out_text(model, Text.open(args.val_text, words, own), most)
    return found


def described(args: Arguments, model: UnifiedModel, names: Sequence[Sequence[str]]) -> dict[str, Any]:
    """How many captions of held-out photographs name the class, with examples."""
    samples = open_indexed(args.val)
    chosen = [samples[i] for i in evenly(len(samples), args.num_val)]
    captions = model.caption([sample["image"] for sample in chosen])
    right = [
        named_classes(said, names) == [sample["label"]] for said, sample in zip(captions, chosen, strict=True)
    ]
    share = mean_of(torch.tensor(right).float())
    pairs = [[names[sample["label"]][0], said] for sample, said in zip(chosen, captions, strict=True)]
    return {"share": asdict(share), "chance": 1 / len(names), "examples": pairs[:: max(1, len(pairs) // 20)]}


def drawn(args: Arguments, model: Path) -> dict[str, Any]:
    """What the classifier sees in drawings."""
    return evaluate_t2i(
        str(model),
        args.val,
        EvalOptions(out=args.out / "drawn", max_samples=args.num_val, batch_size=50, device=args.device),
        lambda what: lambda rows: track(rows, what, transient=True),
        Scoring(classes=str(args.classes)),
        Drawing(cfg=args.cfg),
    )["results"]


def sheet(args: Arguments, model: UnifiedModel, names: Sequence[Sequence[str]]) -> Image.Image:
    """For some held-out photographs what the model says of them, and what it draws after their class."""
    samples = open_indexed(args.val)
    chosen = [samples[i] for i in evenly(len(samples), SHOWN)]
    captions = model.caption([sample["image"] for sample in chosen])
    page = Image.new("RGB", (SIDE * (1 + DRAWN) + WORDS, SIDE * SHOWN), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(13)
    for row, (sample, said) in enumerate(zip(chosen, captions, strict=True)):
        prompt, top = f"a photo of a {names[sample['label']][0]}.", row * SIDE
        pictures = [model.tokenizer.need_image_processor().preprocess(sample["image"])]
        pictures += model.draw(prompt, DRAWN, cfg=args.cfg)
        for column, picture in enumerate(pictures):
            left = column * SIDE + (WORDS if column else 0)
            page.paste(picture.resize((SIDE - 4, SIDE - 4), Image.Resampling.BICUBIC), (left + 2, top + 2))
        lines = [f"says: {said}", f"drawn after: {prompt}"]
        words = "\n".join(line for text in lines for line in wrap(text[:90], WORDS // 9))
        pen.multiline_text((SIDE + 8, top + SIDE // 2), words, "black", font, anchor="lm")
    return page


def write(args: Arguments, rows: dict[str, dict[str, float]], more: dict[str, Any]) -> None:
    """Write `um3-tiny.json` and `um3-tiny.md`."""
    used, long = environment(args.device), recipe(args, LONG)
    table = [f"| | {' | '.join(NUMBERS.values())} |", "| --- " * (1 + len(NUMBERS)) + "|"]
    for name, found in rows.items():
        cells = [f"{found[key]:,.2f}" if key in found else "" for key in NUMBERS]
        table.append(f"| {name} | {' | '.join(cells)} |")
    share, chance = more["captions"]["share"], more["captions"]["chance"]
    results = more["drawings"]
    accuracies = [f"{who} {found['class_accuracy']['value']:.1%}" for who, found in results.items()]
    said = "; ".join(f"{name}: “{caption[:60]}”" for name, caption in more["captions"]["examples"][:8])
    text = f"""# A small UM3, and what three of its parts are worth

Written by `benchmarks/um3_tiny.py`. {long.fit.steps:,} steps of {long.batch_size} rows of
{long.sequence_length} tokens, the short ones {args.short_steps:,}. {used["hardware"]}, torch {used["torch"]},
commit `{used["commit"]}`.

{chr(10).join(table)}

Perplexity is of words alone, with the joint softmax of words among all ids, as it was trained.

![Photographs, what the model says of them, and what it draws after their class](um3-tiny.png)

Captions of {args.num_val:,} held-out photographs name the class in {share["value"]:.1%} [{share["low"]:.1%},
{share["high"]:.1%}], a guess in {chance:.1%}. {said}.

An independent classifier, limited to the classes, finds the right one: {", ".join(accuracies)}.
"""
    record = {"environment": used, "rows": rows, **more}
    for suffix, content in (("json", json.dumps(record, indent=1) + "\n"), ("md", text)):
        with whole_file(args.results / f"um3-tiny.{suffix}") as unfinished:
            unfinished.write_text(content, encoding="utf-8")


def main() -> None:
    """Do what is missing, and write."""
    args = tyro.cli(Arguments, description=__doc__)
    args = replace(args, device=resolve_device(args.device).type)
    found: dict[str, dict[str, float]] = {}
    for arm in ARMS if args.short_steps else (LONG,):
        numbers = trained(args, arm)
        if numbers is None:
            return
        found[arm] = numbers
    folder, names = args.out / LONG / "model", read_class_names(args.classes)
    model = load_um3(folder, device=args.device)
    rows = before(args, model.model.config) | found
    write(args, rows, {"captions": described(args, model, names), "drawings": drawn(args, folder)})
    sheet(args, model, names).save(args.results / "um3-tiny.png")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"um3_tiny: {error}")
