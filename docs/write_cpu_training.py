"""Writes docs/results/cpu-training.md from benchmarks/results/cpu-training-*.json."""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "results" / "cpu-training.md"
INTRODUCTION = """\
# Where the time of a training step goes on a CPU

Written by `python docs/write_cpu_training.py` from the files of `python benchmarks/cpu_training.py --out
benchmarks/results/cpu-training-NAME.json`. Samples are random. *Machine* is the rate of the product of two square
matrices, in GFLOP/s: no step can be faster. *Share* is the rate of the whole step, compared with it.
"""


def table(head: str, rows: list[str]) -> str:
    """Markdown of a head, such as "a | b", and rows of the same form."""
    return "\n".join(f"| {line} |" for line in (head, " | ".join("---" for _ in head.split("|")), *rows))


def section(found: dict[str, Any]) -> str:
    """What one file says."""
    about = found["environment"]
    title = f"## {about['hardware']}; instructions: {about['instructions']}"
    source = f"torch {about['torch']}, Python {about['python']}, commit {about['commit']}."
    steps = [
        f"`{name}` | {s['threads']} | {s['precision']} | {s['samples']} | {s['seconds']:.2f} | {s['gflops']:.1f} "
        f"| {s['machine']:.1f} | {s['share']:.0%}"
        for name, recipe in found["recipes"].items()
        for s in recipe["steps"]
    ]
    divided = [
        f"`{name}`, {how} | " + " | ".join(f"{share:.0%}" for share in shares.values())
        for name, recipe in found["recipes"].items()
        for how, shares in recipe["parts"].items()
    ]
    ratios = [
        f"`{name}` | {', '.join(f'{k} {v}' for k, v in recipe['undone'].items())} "
        f"| {recipe['ratio']['before']:.2f} | {recipe['ratio']['now']:.2f} | **{recipe['ratio']['ratio']:.2f}** "
        f"({recipe['ratio']['range'][0]:.2f} to {recipe['ratio']['range'][1]:.2f})"
        for name, recipe in found["recipes"].items()
    ]
    return "\n\n".join(
        (
            title,
            source,
            "Steps that are not compiled:",
            table("recipe | threads | precision | samples | seconds | GFLOP/s | machine | share", steps),
            "Where the time of a step goes, in float32 with one thread:",
            table("recipe | products | attention | optimizer | the rest", divided),
            "Core-seconds of a step of the recipe, compared with the same step without what makes it cheap:",
            table("recipe | without | before | now | times as many samples a core-second", ratios),
        )
    )


def main() -> None:
    """Write the page."""
    files = sorted((ROOT / "benchmarks" / "results").glob("cpu-training-*.json"))
    sections = [section(json.loads(path.read_text(encoding="utf-8"))) for path in files]
    PAGE.write_text("\n".join((INTRODUCTION, *(f"{text}\n" for text in sections))), encoding="utf-8")


if __name__ == "__main__":
    main()
