r"""The paper's Table 7 in small: do pictures follow words better where the tokens were made with words?

    python benchmarks/t2i_claim.py --out runs/t2i-claim --train 'train-*.parquet' --val val.parquet \
        --classes classes.json --aligned runs/paper-tiny/1-1e3/model --reconstruction runs/paper-tiny/0-1/model \
        --num-classes 20 --steps 800 --num 2

Two tokenizers of one architecture and one budget, of which one was trained for reconstruction alone. On the tokens
of each the recipe `t2i-tiny` is trained, equal in all else, and both are measured as `qlip eval t2i` does. The
condition is the class, since the text tower of the tokenizer without words knows none. A finished part is not done
again, an interrupted one goes on. Writes t2i-claim.json, .md and .png: pictures of the same class and seed.
"""

import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import tyro
from PIL import Image, ImageDraw
from rich.progress import track

from qlip.data.captions import read_class_names
from qlip.data.samples import evenly
from qlip.data.sources import open_indexed
from qlip.environment import environment, resolve_device
from qlip.errors import InputError
from qlip.eval.options import Drawing, Scoring
from qlip.eval.options import Options as EvalOptions
from qlip.eval.results import shown
from qlip.files import whole_file
from qlip.jobs.evaluate_t2i import FOLDER, LIST, evaluate_t2i
from qlip.jobs.tokens import tokenize
from qlip.jobs.tokens_job import Job
from qlip.model.image import read_image
from qlip.recipes.record import check_steps
from qlip.recipes.t2i import RECIPES, T2IDataConfig, run
from qlip.t2i.config import CLASSES
from qlip.train.log import read_log

RESULTS = Path(__file__).parents[1] / "docs" / "results"
PAIRS, SIDE, MARGIN = 12, 96, 136  # of the figure: rows, pixels of a picture, pixels for the class's name
MEASURES = {
    "bits_per_image": "bits a picture",
    "unconditional": "without its class",
    "gfd": "FD",
    "class_accuracy": "right class",
}
PAPER = """\
| the paper, LlamaGen-XL on COCO-30k | gFID | CLIPScore | GenEval | DPG |
| --- | --- | --- | --- | --- |
| BSQ-ViT, reconstruction alone | 19.03 | .303 | .31 | 34.03 |
| QLIP | 15.29 | .316 | .48 | 78.17 |
"""


@dataclass(frozen=True)
class Arguments:
    """What to train, and on what.

    Attributes:
        out: folder of tokens, trainings and drawings.
        train: photographs with labels; see docs/data.md.
        val: the same, held out; classes are drawn as often as they are in it, and it is the reference.
        classes: JSON file of class names, which must be ImageNet's.
        num_classes: how many of the classes are drawn, evenly spread; None: all. Fewer are learnt in fewer steps.
        aligned: a tokenizer that was trained with words.
        reconstruction: one that was not.
        steps: of each model.
        num_photographs: what each draws after the classes of, and is compared with.
        num: drawings for each.
        cfg: how strongly the class counts.
        device: "auto" takes a GPU if there is one.
        results: folder for the tables.
    """

    out: Path
    train: tuple[str, ...]
    val: tuple[str, ...]
    classes: Path
    aligned: str
    reconstruction: str
    num_classes: int | None = None
    steps: int = 3000
    num_photographs: int = 1000
    num: int = 1
    cfg: float = 3.0
    device: str = "auto"
    results: Path = RESULTS


def measure(args: Arguments, name: str, tokenizer: str) -> dict[str, Any] | None:
    """Tokenize, train, draw and look; None if SIGTERM stopped it."""
    folder, num_classes = folder_of(args, name), len(read_class_names(args.classes))
    for part, sources in (("train", args.train), ("val", args.val)):
        job = Job(tokenizer, sources, folder / "tokens" / part, keep=("label",), num_workers=0, device=args.device)
        tokenize(job, lambda rows, part=part: track(rows, f"{name}: tokenizing {part}", transient=True))
    base = RECIPES["t2i-tiny"]
    recipe = replace(
        base,
        data=T2IDataConfig((folder / "tokens" / "train",), (folder / "tokens" / "val",)),
        condition=CLASSES,
        num_classes=num_classes,
        tokenizer=tokenizer,
        fit=replace(base.fit, steps=args.steps, warmup_steps=args.steps // 30, eval_every=args.steps),
        device=args.device,
    )
    check_steps(folder / "run", args.steps)
    if not run(recipe, folder / "run", resume=True):  # a finished one: no step more
        return None
    last = [line for line in read_log(folder / "run" / "log.jsonl") if "eval/bits_per_image" in line][-1]
    found = evaluate_t2i(
        str(folder / "run" / "model"),
        args.val,
        EvalOptions(out=folder / "drawn", max_samples=args.num_photographs, batch_size=50, device=args.device),
        lambda what: lambda rows: track(rows, f"{name}: {what}", transient=True),
        Scoring(classes=str(args.classes)),
        Drawing(num=args.num, cfg=args.cfg),
    )
    bits = {
        "bits_per_image": last["eval/bits_per_image"],
        "unconditional": last["eval/bits_per_image_unconditional"],
    }
    return {"tokenizer": tokenizer, "steps": args.steps, "bits": bits, "evaluation": found}


def with_few_classes(args: Arguments, num_classes: int) -> Arguments:
    """The same on the pictures of `num_classes` alone, numbered anew, which are written to `out`/data."""
    every = json.loads(args.classes.read_text(encoding="utf-8"))
    kept, folder = evenly(len(every), num_classes), args.out / "data"
    numbers = {old: new for new, old in enumerate(kept)}
    for part, sources in (("train", args.train), ("val", args.val)):
        samples = open_indexed(sources)
        few = [s for s in (samples[i] for i in range(len(samples))) if s["label"] in numbers]
        images = [{"bytes": sample["image"], "path": sample["key"]} for sample in few]
        table = pa.table({"image": images, "label": [numbers[sample["label"]] for sample in few]})
        with whole_file(folder / f"{part}.parquet") as unfinished:
            pq.write_table(table, unfinished)
    (folder / "classes.json").write_text(json.dumps([every[i] for i in kept]), encoding="utf-8")
    files = {part: (str(folder / f"{part}.parquet"),) for part in ("train", "val")}
    return replace(args, classes=folder / "classes.json", **files)


def folder_of(args: Arguments, arm: str) -> Path:
    """Of an arm: tokens, training, drawings."""
    return args.out / arm.replace(" ", "-")


def numbers(arm: dict[str, Any]) -> list[dict[str, str]]:
    """The rows of an arm: its drawings, and what no drawing of its tokens can be expected to surpass."""
    rows = []
    for i, (who, values) in enumerate(arm["evaluation"]["results"].items()):
        distance = next((name for name in values if "fd" in name or "fid" in name), None)
        cells = {"": who if i else "drawn"} | (
            {name: f"{arm['bits'][name]:,.1f}" for name in arm["bits"]} if i == 0 else {}
        )
        if distance:
            cells["gfd"] = shown(distance, values[distance])
        if "class_accuracy" in values:
            cells["class_accuracy"] = shown("class_accuracy", values["class_accuracy"])
        rows.append(cells)
    return rows


def write(args: Arguments, arms: dict[str, dict[str, Any]]) -> None:
    """Write `t2i-claim.json`, .md and .png."""
    used = environment(args.device)
    names = ["", *MEASURES]
    lines = [f"| tokens | {' | '.join(MEASURES[name] if name else '' for name in names)} |", "| --- " * 6 + "|"]
    for name, arm in arms.items():
        for cells in numbers(arm):
            lines.append(f"| {name} | {' | '.join(cells.get(key, '') for key in names)} |")
    text = "\n".join(
        [
            "# Text to image on tokens with and without words: the paper's Table 7 in small",
            "",
            f"Written by `benchmarks/t2i_claim.py`: `t2i-tiny` after one of {len(read_class_names(args.classes))} "
            f"classes, {args.steps:,} steps of {RECIPES['t2i-tiny'].batch_size}; {args.num} drawn with guidance "
            f"{args.cfg:g} after the class of each of {args.num_photographs:,} photographs at most. "
            "Bits are of held-out pictures, and of each tokenizer's own tokens: what compares is how many "
            f"the class saves. In brackets the 95 % bootstrap interval. {used['hardware']}, torch "
            f"{used['torch']}, commit `{used['commit']}`.",
            "",
            *lines,
            "",
            "![Pairs of pictures of the same class and seed](t2i-claim.png)",
            "",
            PAPER,
        ]
    )
    record = {
        "settings": {key: str(value) for key, value in asdict(args).items()},
        "environment": used,
        "arms": arms,
    }
    args.results.mkdir(parents=True, exist_ok=True)
    for suffix, content in (("json", json.dumps(record, indent=1, default=str) + "\n"), ("md", text)):
        with whole_file(args.results / f"t2i-claim.{suffix}") as unfinished:
            unfinished.write_text(content, encoding="utf-8")
    pairs(args, list(arms)).save(args.results / "t2i-claim.png")


def pairs(args: Arguments, arms: list[str]) -> Image.Image:
    """For some classes a photograph, and what each model drew with the same seed."""
    classes = [found[0] for found in read_class_names(args.classes)]
    places = [folder_of(args, arm) / "drawn" for arm in arms]
    lists = [[json.loads(line) for line in (place / LIST).read_text().splitlines()] for place in places]
    samples = open_indexed(args.val)
    photographs = {sample["label"]: sample["image"] for sample in (samples[i] for i in range(len(samples)))}
    rows = [i * len(lists[0]) // PAIRS for i in range(PAIRS)]
    sheet = Image.new("RGB", (MARGIN + SIDE * (1 + len(arms)) + 24, 20 + SIDE * PAIRS), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(["photograph", *arms]):
        draw.text((MARGIN + SIDE * column + 4, 4), title, fill="black")
    for at, i in enumerate(rows):
        label, top = lists[0][i]["label"], 20 + SIDE * at
        draw.text((4, top + SIDE // 2 - 6), classes[label][:24], fill="black")
        files = [place / FOLDER / Path(found[i]["image"]).name for place, found in zip(places, lists, strict=True)]
        pictures = [read_image(photographs[label]), *(Image.open(file) for file in files)]
        for column, picture in enumerate(pictures):
            sheet.paste(
                picture.convert("RGB").resize((SIDE - 4, SIDE - 4), Image.Resampling.BICUBIC),
                (MARGIN + SIDE * column + 2, top + 2),
            )
    return sheet


def main() -> None:
    """Do what is missing, and write."""
    args = tyro.cli(Arguments, description=__doc__)
    args = replace(args, device=resolve_device(args.device).type)
    if args.num_classes:
        args = with_few_classes(args, args.num_classes)
    arms: dict[str, dict[str, Any]] = {}
    for name, tokenizer in (("with words", args.aligned), ("reconstruction alone", args.reconstruction)):
        arm = measure(args, name, tokenizer)
        if arm is None:
            return
        arms[name] = arm
    write(args, arms)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"t2i_claim: {error}")
