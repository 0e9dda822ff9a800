r"""The paper's Table 6 in small: which features of a tokenizer should a language model see?

    python examples/stories15m.py --out stories15M
    python benchmarks/llava_tiny.py --out runs/llava-tiny --llm stories15M --train 'train-*.parquet' \
        --val val.parquet --classes classes.json --reconstruction runs/tiny-reconstruction/model

Photographs of named classes become questions and answers in LLaVA's form: "What is this?", answered by the first
name of the class, and "Is there a … in the picture?", yes and no in equal parts. Every arm is trained by the
recipes `llava-tiny-pretrain` and `llava-tiny-finetune` on the same ones, and asked about the same held-out
photographs; the answers are greedy. As in POPE, an absent class is drawn at random, or is the one that looks
likeliest: the nearest name in the tokenizer's own text tower. (POPE's third kind, popular objects, has no sense
where classes are equally frequent.) A finished arm is not trained again, an interrupted one goes on; the tables
are written after each.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from rich.progress import track

from qlip.data.captions import read_class_names
from qlip.data.samples import evenly
from qlip.data.sources import open_indexed
from qlip.environment import environment, resolve_device
from qlip.errors import InputError
from qlip.eval.interval import mean_of
from qlip.files import whole_file
from qlip.llava.answers import ask
from qlip.llava.model import load
from qlip.llava.score import exact_match, pope
from qlip.model.checkpoint import load as load_qlip
from qlip.recipes.llava import RECIPES, LlavaRecipe, run
from qlip.recipes.plain import to_plain
from qlip.train.log import read_log

RESULTS = Path(__file__).parents[1] / "docs" / "results"
WHAT, THERE = "What is this?", "Is there {} in the picture?"
ASKED_AT_ONCE = 100
ARMS = {
    "layer -2": (True, "layer-2"),
    "layer -1": (True, "layer-1"),
    "after the quantizer": (True, "quantizer"),
    "reconstruction only, layer -2": (False, "layer-2"),
    "reconstruction only, after the quantizer": (False, "quantizer"),
}

PAPER = """\
| the paper: QLIP-B/16, Vicuna-1.5-7B | GQA | TextVQA | POPE | MME |
| --- | --- | --- | --- | --- |
| layer -2 | 61.2 | 51.1 | 86.1 | 1398.7 |
| layer -1 | 50.7 | 45.0 | 77.2 | 1077.7 |
| after the quantizer | 40.4 | 43.0 | 50.6 | 677.2 |
"""


@dataclass(frozen=True)
class Options:
    """What to train, and on what.

    Attributes:
        out: folder of the trainings and their data.
        llm: folder of the language model; `examples/stories15m.py` makes one.
        train: photographs with labels; see docs/data.md.
        val: the same, held out.
        classes: JSON file of class names.
        vision: the tokenizer.
        reconstruction: one that was trained for reconstruction alone; without it two arms are left out.
        arms: which; by default all that can be.
        pretrain_steps: of the first stage; None takes the recipe's.
        finetune_steps: of the second.
        num_classes: how many of the classes are shown and asked about, evenly spread; None: all. Fewer are learnt
            sooner.
        max_val: held-out photographs, evenly spread; four questions about each.
        precision: of the training; "auto" takes the faster one.
        device: "auto" takes a GPU if there is one.
        results: folder for the tables.
    """

    out: Path
    llm: Path
    train: tuple[str, ...]
    val: tuple[str, ...]
    classes: Path
    vision: str = "qlip-tiny"
    reconstruction: str | None = None
    arms: tuple[str, ...] = ()
    pretrain_steps: int | None = None
    finetune_steps: int | None = None
    num_classes: int | None = None
    max_val: int = 1000
    precision: str = "auto"
    device: str = "auto"
    results: Path = RESULTS


def article(name: str) -> str:
    """A name with a or an."""
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def conversation(question: str, answer: str) -> list[dict[str, str]]:
    """A question about a picture and its answer, in LLaVA's form."""
    return [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]


class Shown:
    """Samples of some classes, evenly spread, which are numbered anew."""

    def __init__(self, samples: Sequence[dict[str, Any]], classes: Sequence[int]):
        numbers = {label: number for number, label in enumerate(classes)}
        found = [(i, numbers[sample["label"]]) for i, sample in enumerate(samples) if sample["label"] in numbers]
        self.samples, self.rows = samples, found

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index >= len(self):
            raise IndexError(index)
        i, label = self.rows[index]
        return self.samples[i] | {"label": label}


def write_data(
    options: Options, samples: Shown, names: Sequence[str], num_pretrain: int, num_finetune: int
) -> Path:
    """Write `pretrain.json`, `finetune.json` and their pictures; the folder."""
    folder = options.out / "data"
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    most = max(num_pretrain, num_finetune)
    orders = [rng.permutation(len(samples)) for _ in range(-(-most // len(samples)))]
    chosen = np.concatenate(orders)[:most].tolist()
    captions, questions = [], []
    for number, i in enumerate(track(chosen, "writing the questions", transient=True)):
        sample, file = samples[i], f"{i:06d}.jpg"
        label = sample["label"]
        (folder / "images" / file).write_bytes(sample["image"])
        other = (label + int(rng.integers(1, len(names)))) % len(names)
        asked, answer = [
            (WHAT, names[label]),
            (THERE.format(article(names[label])), "Yes"),
            (WHAT, names[label]),
            (THERE.format(article(names[other])), "No"),
        ][number % 4]
        entry = {"id": file, "image": file}
        captions.append(
            entry | {"conversations": conversation("Describe it.", f"a photo of {article(names[label])}")}
        )
        questions.append(entry | {"conversations": conversation(asked, answer)})
    kept = [captions[i] for i in evenly(len(captions), num_pretrain)]
    for name, entries in (("pretrain", kept), ("finetune", questions)):
        with whole_file(folder / f"{name}.json") as unfinished:
            unfinished.write_text(json.dumps(entries), encoding="utf-8")
    return folder


def nearest(names: Sequence[str], vision: str) -> list[int]:
    """For each name another one that the tokenizer's text tower holds for the most similar."""
    model = load_qlip(vision)
    with torch.no_grad():
        embeds = model.encode_text(*model.need_text_tokenizer()([f"a photo of a {name}." for name in names]))
    return (embeds @ embeds.T).fill_diagonal_(-2).argmax(1).tolist()


def stages(options: Options, name: str, data: Path) -> tuple[LlavaRecipe, LlavaRecipe]:
    """The recipes of an arm."""
    aligned, source = ARMS[name]
    compute: Any = {"device": options.device, "precision": options.precision}
    found = []
    for stage, steps in (("pretrain", options.pretrain_steps), ("finetune", options.finetune_steps)):
        recipe = RECIPES[f"llava-tiny-{stage}"]
        if steps:
            fit = replace(recipe.fit, steps=steps, warmup_steps=steps // 30, eval_every=steps)
            recipe = replace(recipe, fit=fit)
        named = replace(recipe.data, train=(data / f"{stage}.json",), images=data / "images")
        found.append(replace(recipe, data=named, **compute))
    vision = options.vision if aligned else options.reconstruction
    first = replace(found[0], vision=vision, llm=str(options.llm), feature_source=source)
    return first, replace(found[1], start=folder(options, name) / "pretrain" / "model")


def folder(options: Options, name: str) -> Path:
    """Of an arm."""
    return options.out / name.replace(",", "").replace(" ", "-").replace("--", "-")


def evaluate(
    options: Options, place: Path, samples: Sequence[dict], names: Sequence[str], alike: Sequence[int]
) -> dict[str, Any]:
    """Ask about held-out photographs."""
    model, processor = load(place, options.device)
    rng = np.random.default_rng(1)
    labels = [sample["label"] for sample in samples]
    absent = [(label + int(rng.integers(1, len(names)))) % len(names) for label in labels]

    def answers(questions: list[str], length: int) -> list[str]:
        told = []
        for start in track(range(0, len(samples), ASKED_AT_ONCE), "asking", transient=True):
            part = slice(start, start + ASKED_AT_ONCE)
            images = [sample["image"] for sample in samples[part]]
            told += ask(model, processor, images, questions[part], length)
        return told

    def there(classes: Sequence[int], label: str) -> list[tuple[str, str]]:
        told = answers([THERE.format(article(names[one])) for one in classes], 3)
        return [(answer, label) for answer in told]

    told = answers([WHAT] * len(samples), 16)
    right = [exact_match(answer, names[label]) for answer, label in zip(told, labels, strict=True)]
    named = mean_of(torch.tensor(right))
    present = there(labels, "yes")
    return {
        "what": {"accuracy": named.value, "interval": [named.low, named.high], "chance": 1 / len(names)},
        "random": pope(present + there(absent, "no")),
        "adversarial": pope(present + there([alike[label] for label in labels], "no")),
        "examples": [
            {"label": names[label], "answer": answer} for answer, label in zip(told, labels, strict=True)
        ][:20],
    }


def measure(options: Options, name: str, data: Path, names: Sequence[str], samples: Sequence[dict]) -> dict | None:
    """Train an arm if need be, and evaluate it; None if SIGTERM stopped it."""
    path = folder(options, name) / "result.json"
    recipes = stages(options, name, data)
    settings = [to_plain(recipe) for recipe in recipes]
    if path.exists():
        result = json.loads(path.read_text(encoding="utf-8"))
        if result["settings"] != settings or result["num_val"] != len(samples):
            raise InputError(f"{path.parent} holds an arm of other settings: choose another --out")
        return result
    for stage, recipe in zip(("pretrain", "finetune"), recipes, strict=True):
        there = (path.parent / stage / "model" / "processor_config.json").exists()
        if not there and not run(recipe, path.parent / stage, resume=True):
            return None
    logs = {stage: read_log(path.parent / stage / "log.jsonl") for stage in ("pretrain", "finetune")}
    result = evaluate(options, path.parent / "finetune" / "model", samples, names, nearest(names, options.vision))
    result |= {
        "loss": {stage: float(np.mean([line["loss"] for line in log[-5:]])) for stage, log in logs.items()},
        "num_val": len(samples),
        "environment": environment(options.device),
        "settings": settings,
    }
    with whole_file(path) as unfinished:
        unfinished.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def write_tables(results: dict[str, dict], options: Options) -> None:
    """Write `llava-tiny.json`, and `llava-tiny.md` beside the paper's table."""
    some = next(iter(results.values()))
    first, second = some["settings"]
    rows = [
        "| the projector sees | What is this? of 200 | is there, random: accuracy | F1 | yes "
        "| is there, alike: accuracy | F1 | loss |".replace("200", str(round(1 / some["what"]["chance"]))),
        "| --- " * 8 + "|",
    ]
    for name, r in results.items():
        what = r["what"]
        low, high = what["interval"]
        cells = [f"{what['accuracy']:.1%} [{low:.1%}, {high:.1%}]"]
        cells += [f"{r['random'][key]:.1%}" for key in ("accuracy", "f1", "yes_share")]
        cells += [f"{r['adversarial'][key]:.1%}" for key in ("accuracy", "f1")]
        rows.append(f"| {name} | {' | '.join(cells)} | {r['loss']['finetune']:.3f} |")
    used = some["environment"]
    text = "\n".join(
        [
            "# Which features a language model should see: the paper's Table 6 in small",
            "",
            f"Written by `benchmarks/llava_tiny.py`. {options.vision} and {options.llm.name}: "
            f"{first['fit']['steps']} steps of {first['batch_size']} for the projector, then "
            f"{second['fit']['steps']} of {second['batch_size']} for projector and language model; "
            f"{some['num_val']:,} held-out photographs. In brackets the 95 % bootstrap interval; a guess is right "
            f"in {some['what']['chance']:.1%} and 50%. {used['hardware']}, torch {used['torch']}, commit "
            f"`{used['commit']}`.",
            "",
            *rows,
            "",
            PAPER,
        ]
    )
    options.results.mkdir(parents=True, exist_ok=True)
    for suffix, content in (("json", json.dumps(results, indent=1) + "\n"), ("md", text)):
        with whole_file(options.results / f"llava-tiny.{suffix}") as unfinished:
            unfinished.write_text(content, encoding="utf-8")


def main() -> None:
    """Train arm by arm, and write after each."""
    options = tyro.cli(Options, description=__doc__)
    options = replace(options, device=resolve_device(options.device).type)
    can_be = [name for name, (aligned, _) in ARMS.items() if aligned or options.reconstruction]
    arms = options.arms or tuple(can_be)
    if unknown := set(arms) - set(can_be):
        raise InputError(f"arms: {min(unknown)!r} is none of {', '.join(can_be)} (some need --reconstruction)")
    names = [found[0] for found in read_class_names(options.classes)]
    if len(set(names)) < len(names):
        raise InputError(f"{options.classes}: two classes have one name, so that no answer tells them apart")
    classes = evenly(len(names), options.num_classes or len(names))
    names = [names[i] for i in classes]
    held_out = Shown(open_indexed(options.val), classes)
    samples = [held_out[i] for i in evenly(len(held_out), options.max_val)]
    recipes = stages(options, arms[0], options.out / "data")
    sizes = [recipe.fit.steps * recipe.batch_size for recipe in recipes]
    data = write_data(options, Shown(open_indexed(options.train), classes), names, *sizes)
    results: dict[str, dict] = {}
    for name in (name for name in ARMS if name in arms or (folder(options, name) / "result.json").exists()):
        result = measure(options, name, data, names, samples)
        if result is None:
            return
        results[name] = result
        write_tables(results, options)
        print(name, {key: result[key] for key in ("what", "random", "adversarial")}, flush=True)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"llava_tiny: {error}")
