r"""Which cut of a token should a model of pictures learn: held-out bits a picture of small text-to-image models.

    python benchmarks/t2i_bits.py --tokens tokens/ --val-tokens val-tokens/ --out runs/t2i-bits

One run of the recipe `t2i-tiny` for each cut, one after the other, equal in all else: the transformer's blocks,
order, what is dropped; with --seconds another for each, of as many steps as so much processor time allows, by a
step measured before. Raw is the number of a picture's bits. The same command goes on where it was interrupted; a
run that is finished makes no step more. Writes docs/results/t2i-bits.json and .md.
"""

import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from qlip.environment import environment
from qlip.errors import InputError
from qlip.files import whole_file
from qlip.recipes.record import check_steps
from qlip.recipes.t2i import RECIPES, T2IDataConfig, T2IRecipe, run
from qlip.t2i.checkpoint import load
from qlip.t2i.train import T2ITask
from qlip.train.fit import FitConfig
from qlip.train.log import read_log

RESULTS = Path(__file__).parents[1] / "docs" / "results"
CUTS: dict[str, dict[str, Any]] = {
    "2×14": {"bits": 14, "head": "sequence"},
    "4×7": {"bits": 7, "head": "sequence"},
    "7×4": {"bits": 4, "head": "sequence"},
    "14×2": {"bits": 2, "head": "sequence"},
    "2×14, bits": {"bits": 14, "head": "sequence", "embedding": "bits"},
    "4×7, bits": {"bits": 7, "head": "sequence", "embedding": "bits"},
    "2×14, chain": {"bits": 14, "head": "chain"},
    "4×7, chain": {"bits": 7, "head": "chain"},
    "7×4, chain": {"bits": 4, "head": "chain"},
    "14×2, chain": {"bits": 2, "head": "chain"},
    "4×7, parallel": {"bits": 7, "head": "parallel"},
    "28×1, parallel": {"bits": 1, "head": "parallel"},
}
TIMED, NUM_TEXT_TOKENS = 3, 10  # steps after a first one, and the texts of these


@dataclass(frozen=True)
class Options:
    """What to compare.

    Attributes:
        tokens, val_tokens: token files or folders, with captions, or labels for "classes".
        out: folder of the runs.
        cuts: which of them.
        steps: of each run with equal steps; 0: there are none.
        seconds: of processor time that the steps of each run with equal time take; 0: there are none.
        batch_size: of each step.
        condition, num_classes: as for `qlip train t2i-tiny`.
        classes: names of labels, where pictures have no captions.
        features: of the captions, computed before.
        max_val: held-out pictures that are looked at.
        device: where.
        results: the folder of the two files.
    """

    tokens: tuple[Path, ...]
    val_tokens: tuple[Path, ...]
    out: Path
    cuts: Annotated[tuple[str, ...], tyro.conf.arg(metavar="CUT…")] = tuple(CUTS)
    steps: int = 1000
    seconds: float = 0.0
    batch_size: int = 64
    condition: str = "qlip"
    num_classes: int = 0
    classes: Path | None = None
    features: tuple[Path, ...] = ()
    max_val: int = 1000
    device: str = "auto"
    results: Path = RESULTS


def recipe(options: Options, cut: str, steps: int) -> T2IRecipe:
    """The run of a cut."""
    if cut not in CUTS:
        raise InputError(f"there is no cut {cut!r}: choose from {', '.join(CUTS)}")
    return replace(
        RECIPES["t2i-tiny"],
        data=T2IDataConfig(
            options.tokens, options.val_tokens, options.features, options.classes, max_val=options.max_val
        ),
        fit=FitConfig(
            steps,
            warmup_steps=max(1, steps // 10) if steps > 1 else 0,
            eval_every=steps,
            save_every=max(1, steps // 10),
            keep=1,
            best=None,
        ),
        batch_size=options.batch_size,
        condition=options.condition,
        num_classes=options.num_classes,
        device=options.device,
        **CUTS[cut],
    )


def seconds_a_step(made: T2IRecipe, out: Path) -> float:
    """Processor time of a step, measured once, after a run of one step."""
    path = out / "seconds.json"
    if not path.exists():
        run(replace(made, data=replace(made.data, val_tokens=())), out / "step", resume=True)
        task = T2ITask(load(out / "step" / "model", device=made.device), made.task, made, made.batch_size)
        config, rows = task.model.config, made.batch_size
        text = (1,) if config.with_classes else (NUM_TEXT_TOKENS, config.condition_width)
        batch = {
            "condition": torch.zeros(rows, *text, dtype=torch.long if config.with_classes else torch.float32),
            "lengths": torch.full((rows,), text[0]),
            "sub_tokens": torch.zeros(rows, config.grid[0] * config.grid[1], config.num_slots, dtype=torch.long),
            "dropped": torch.arange(rows) % 10 == 0,
        }
        taken = []
        for number in range(1, TIMED + 2):
            begin = time.process_time()
            task.step(batch, number)
            taken.append(time.process_time() - begin)
        path.write_text(json.dumps(statistics.median(taken[1:])), encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))


def measure(made: T2IRecipe, out: Path) -> dict[str, float] | None:
    """Train what is not yet trained, and read what it found; None if it was stopped.

    Raises:
        InputError: the folder holds a run of other settings.
    """
    check_steps(out, made.fit.steps)
    if not run(made, out, resume=True):
        return None
    found: dict[str, float] = {"steps": made.fit.steps}
    for entry in read_log(out / "log.jsonl"):
        found |= {name.removeprefix("eval/"): value for name, value in entry.items() if name.startswith("eval/")}
    return found


def begin(options: Options, cut: str) -> dict[str, Any]:
    """What is known of a cut before it is trained."""
    out = folder(options, cut)
    out.mkdir(parents=True, exist_ok=True)
    step = seconds_a_step(recipe(options, cut, 1), out)
    model = load(out / "step" / "model")
    return {
        "seconds_a_step": step,
        "raw": model.config.num_bits * model.config.grid[0] * model.config.grid[1],
        "parameters": sum(p.numel() for p in model.parameters()),
        "positions": model.config.num_sub_tokens // model.config.num_slots * model.config.slots_in_sequence,
    }


def folder(options: Options, cut: str) -> Path:
    """Where the runs of a cut are."""
    return options.out / cut.replace("×", "x").replace(", ", "-")


def table(record: dict[str, Any]) -> str:
    """The results as a page."""
    settings, cuts = record["settings"], record["cuts"]
    kinds = [kind for kind in ("equal steps", "equal time") if any(kind in found for found in cuts.values())]
    head = ["cut, head", "M parameters", "positions", "s a step", *(f"{kind}: steps, bits" for kind in kinds)]
    lines = [f"| {' | '.join(head)} |", f"| --- |{' ---: |' * (len(head) - 1)}"]
    for cut, found in cuts.items():
        cells = [
            cut,
            f"{found['parameters'] / 1e6:.1f}",
            f"{found['positions']}",
            f"{found['seconds_a_step']:.2f}",
        ]
        for kind in kinds:
            one = found.get(kind)
            cells.append(f"{one['steps']:,}, {one['bits_per_image']:,.1f}" if one else "")
        lines.append(f"| {' | '.join(cells)} |")
    raw = next(iter(cuts.values()))["raw"]
    about = (
        f"Held-out bits a picture, raw {raw:,}, of `t2i-tiny` with other cuts and heads, after so many steps of "
        f"{settings['batch_size']} pictures; with equal time, {settings['seconds']:.0f} s of processor time on "
        f"one thread. {settings['max_val']:,} held-out pictures. An empty cell was not run. Made by "
        "`benchmarks/t2i_bits.py`.\n\n"
    )
    return "# How a token is predicted\n\n" + about + "\n".join(lines) + "\n"


def main(options: Options) -> None:
    """Run them all and write what they found."""
    if options.device == "cpu":
        torch.set_num_threads(1)
    shown = ("steps", "seconds", "batch_size", "condition", "max_val")
    settings = {name: value for name, value in asdict(options).items() if name in shown}
    found = {cut: begin(options, cut) for cut in options.cuts}
    record = {"environment": environment(options.device), "settings": settings, "cuts": found}
    for kind in ("equal steps", "equal time"):
        for cut, result in found.items():
            by_time = int(options.seconds / result["seconds_a_step"])
            if not (steps := options.steps if kind == "equal steps" else by_time):
                continue
            one = measure(recipe(options, cut, steps), folder(options, cut) / kind.replace(" ", "-"))
            if one is None:
                return
            result[kind] = one
            print(f"{cut:<15}{kind:<12}{steps:6,} steps{one['bits_per_image']:10.1f} bits a picture", flush=True)
            write(record, options.results)


def write(record: dict[str, Any], results: Path) -> None:
    """What is there by now."""
    texts = {".json": json.dumps(record, indent=2, ensure_ascii=False) + "\n", ".md": table(record)}
    for suffix, text in texts.items():
        with whole_file(results / f"t2i-bits{suffix}") as unfinished:
            unfinished.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except InputError as error:
        sys.exit(f"t2i_bits: {error}")
