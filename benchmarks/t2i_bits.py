r"""Which cut of a token should a model of pictures learn: held-out bits a picture of small text-to-image models.

    python benchmarks/t2i_bits.py --tokens tokens/ --val-tokens val-tokens/ --out runs/t2i-bits

One run of the recipe `t2i-tiny` for each cut, one after the other, equal in all else: pictures seen, order, what
is dropped. Raw is the number of a picture's bits. The same command goes on where it was interrupted; a run that is
finished is only read. Writes results/t2i-bits.json.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from qlip.environment import environment
from qlip.errors import InputError
from qlip.files import whole_file
from qlip.recipes.t2i import RECIPES, T2IDataConfig, T2IRecipe, run
from qlip.t2i.checkpoint import load
from qlip.train.fit import FitConfig
from qlip.train.log import read_log

RESULTS = Path(__file__).parent / "results" / "t2i-bits.json"
CUTS: dict[str, dict[str, Any]] = {
    "2×14": {"bits": 14},
    "4×7": {"bits": 7},
    "7×4": {"bits": 4},
    "14×2": {"bits": 2},
    "2×14, bits": {"bits": 14, "embedding": "bits"},
    "4×7, bits": {"bits": 7, "embedding": "bits"},
}


@dataclass(frozen=True)
class Options:
    """What to compare.

    Attributes:
        tokens, val_tokens: token files or folders, with captions, or labels for "classes".
        out: folder of the runs.
        cuts: which of them.
        steps: of each run.
        batch_size: of each step.
        condition, num_classes: as for `qlip train t2i-tiny`.
        device: where.
        results: the file to write.
    """

    tokens: tuple[Path, ...]
    val_tokens: tuple[Path, ...]
    out: Path
    cuts: Annotated[tuple[str, ...], tyro.conf.arg(metavar="CUT…")] = tuple(CUTS)
    steps: int = 1000
    batch_size: int = 64
    condition: str = "qlip"
    num_classes: int = 0
    device: str = "auto"
    results: Path = RESULTS


def recipe(options: Options, cut: str) -> T2IRecipe:
    """The run of a cut."""
    if cut not in CUTS:
        raise InputError(f"there is no cut {cut!r}: choose from {', '.join(CUTS)}")
    steps = options.steps
    return replace(
        RECIPES["t2i-tiny"],
        data=T2IDataConfig(options.tokens, options.val_tokens),
        fit=FitConfig(
            steps,
            warmup_steps=max(1, steps // 30) if steps > 1 else 0,
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


def measure(options: Options, cut: str) -> dict[str, float] | None:
    """Train what is not yet trained, and read what it found; None if it was stopped."""
    made, out = recipe(options, cut), options.out / cut.replace("×", "x").replace(", ", "-")
    if not (out / "model").is_dir() and not run(made, out, resume=True):
        return None
    found: dict[str, float] = {}
    for entry in read_log(out / "log.jsonl"):
        found |= {name.removeprefix("eval/"): value for name, value in entry.items() if name.startswith("eval/")}
    model = load(out / "model")
    return found | {
        "raw": model.config.num_bits * model.config.grid[0] * model.config.grid[1],
        "parameters": sum(p.numel() for p in model.parameters()),
        "sub_tokens": model.config.num_sub_tokens,
    }


def main(options: Options) -> None:
    """Run them all and write what they found."""
    found: dict[str, Any] = {}
    for cut in options.cuts:
        if (result := measure(options, cut)) is None:
            return
        found[cut] = result
        print(f"{cut:<12}{result['bits_per_image']:10.1f} of {result['raw']:,} bits a picture")
        settings = {"steps": options.steps, "batch_size": options.batch_size, "condition": options.condition}
        with whole_file(options.results) as unfinished:
            record = {"environment": environment(options.device), "settings": settings, "cuts": found}
            unfinished.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
