"""The paper's Table 3: its numbers, what they say, and ours beside them.

Cells are named as in `benchmarks/paper_tiny.py`, which trains them.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlip.figures.record import OURS, THEIRS, plain, write_figure
from qlip.files import whole_file
from qlip.train.plot import new_figure

if TYPE_CHECKING:
    from qlip.train.plot import Figure

Result = dict[str, Any]
"""Of a cell: psnr in dB, top1 and chance as shares, perceptual (LPIPS); what was not measured is absent."""

# docs/paper.md section 6: table → a row's name there, the cell, zero-shot %, rFID, PSNR in dB
PAPER: dict[str, list[tuple[str, str, float | None, float, float]]] = {
    "(a) α_a:α_r": [
        ("1:0", "1:0", 75.7, 367.8, 11.7),
        ("1:1", "1:1", 75.1, 162.6, 17.8),
        ("1:10²", "1:1e2", 74.7, 41.7, 22.5),
        ("1:10³", "1:1e3", 74.3, 35.3, 24.5),
        ("1:10⁴", "1:1e4", 35.4, 35.6, 24.5),
        ("0:1", "0:1", 0.1, 35.7, 24.5),
    ],
    "(b) the vision encoder begins with": [
        ("nothing", "1:1e3", 26.4, 35.0, 24.8),
        ("masked images; ours: 0:1", "from-reconstruction", 74.3, 35.3, 24.5),
        ("CLIP; ours: 1:0", "from-contrastive", 74.7, 41.7, 23.9),
    ],
    "(c) recipe": [
        ("1, stage 1", "1:1e3", 74.3, 35.3, 24.49),
        ("1, stage 2", "recipe1-stage2", None, 3.21, 23.16),
        ("2, stage 1, no quantizer", "recipe2", 75.0, 17.2, 26.72),
        ("2, stage 2", "recipe2-stage2", None, 13.7, 23.34),
    ],
}


@dataclass(frozen=True)
class Direction:
    """What the paper's numbers say, and when ours say so too.

    Attributes:
        says: the paper, with its numbers.
        rule: in words.
        cells: whose results the rule takes, in this order.
        holds: the rule.
    """

    says: str
    rule: str
    cells: tuple[str, ...]
    holds: Callable[..., bool]

    def verdict(self, results: dict[str, Result]) -> str:
        """Reproduced, not reproduced, or not measured."""
        try:
            return "reproduced" if self.holds(*(results[cell] for cell in self.cells)) else "not reproduced"
        except KeyError:  # a cell, or its LPIPS
            return "not measured"


DIRECTIONS = (
    Direction(
        "alignment alone rebuilds badly (11.7 dB, 24.5 at 1:10³)",
        "1:0 at least 3 dB below 1:10³",
        ("1:0", "1:1e3"),
        lambda alone, joint: alone["psnr"] <= joint["psnr"] - 3,
    ),
    Direction(
        "reconstruction alone classifies at chance (0.1 % of 1,000 classes)",
        "0:1 at most twice chance",
        ("0:1",),
        lambda alone: alone["top1"] <= 2 * alone["chance"],
    ),
    Direction(
        "1:10³ costs classification little (74.3 %, alignment alone 75.7 %)",
        "at least 90 % of 1:0, and that above twice chance",
        ("1:1e3", "1:0"),
        lambda joint, alone: joint["top1"] >= 0.9 * alone["top1"] > 1.8 * alone["chance"],
    ),
    Direction(
        "1:10³ costs pictures nothing (24.5 dB, reconstruction alone 24.5)",
        "at most 0.5 dB below 0:1",
        ("1:1e3", "0:1"),
        lambda joint, alone: joint["psnr"] >= alone["psnr"] - 0.5,
    ),
    Direction(
        "pictures get better with α_r up to 10³ (11.7, 17.8, 22.5, 24.5 dB)",
        "PSNR rises from 1:0 over 1:1 and 1:10² to 1:10³",
        ("1:0", "1:1", "1:1e2", "1:1e3"),
        lambda *cells: all(a["psnr"] < b["psnr"] for a, b in pairwise(cells)),
    ),
    Direction(
        "at 1:10⁴ classification breaks down (35.4 %, 74.3 at 1:10³)",
        "below 70 % of 1:10³",
        ("1:1e4", "1:1e3"),
        lambda more, joint: more["top1"] < 0.7 * joint["top1"],
    ),
    Direction(
        "a random start classifies far worse (26.4 %, 74.3 and 74.7 from others' weights)",
        "below 70 % of either",
        ("1:1e3", "from-reconstruction", "from-contrastive"),
        lambda random, *others: all(random["top1"] < 0.7 * other["top1"] for other in others),
    ),
    Direction(
        "a start from CLIP classifies a little better than one from pictures (74.7 %, 74.3)",
        "its zero-shot accuracy is higher",
        ("from-contrastive", "from-reconstruction"),
        lambda words, pictures: words["top1"] > pictures["top1"],
    ),
    Direction(
        "a start from CLIP rebuilds a little worse than one from pictures (23.9 dB, 24.5)",
        "its PSNR is lower",
        ("from-contrastive", "from-reconstruction"),
        lambda words, pictures: words["psnr"] < pictures["psnr"],
    ),
    Direction(
        "stage 2 makes pictures look better (rFID 35.3 to 3.21)",
        "LPIPS falls",
        ("1:1e3", "recipe1-stage2"),
        lambda before, after: after["perceptual"] < before["perceptual"],
    ),
    Direction(
        "stage 2 costs PSNR (24.49 to 23.16 dB)",
        "PSNR falls",
        ("1:1e3", "recipe1-stage2"),
        lambda before, after: after["psnr"] < before["psnr"],
    ),
    Direction(
        "without the quantizer stage 1 rebuilds better (26.72 dB, 24.49)",
        "PSNR of recipe 2 above recipe 1",
        ("recipe2", "1:1e3"),
        lambda free, joint: free["psnr"] > joint["psnr"],
    ),
    Direction(
        "in the end recipe 1 looks better (rFID 3.21, recipe 2 13.7)",
        "LPIPS of recipe 1 below recipe 2",
        ("recipe1-stage2", "recipe2-stage2"),
        lambda first, second: first["perceptual"] < second["perceptual"],
    ),
)


def write_tables(results: dict[str, Result], settings: dict[str, Any], out: Path, device: str) -> None:
    """Write `paper_tiny.json`, `.png` and `.md`.

    Args:
        results: of the cells that there are.
        settings: steps and batch_size of stage 1, and the name of the perceptual distance.
        out: folder.
        device: on which they were trained.
    """
    directions = [{"says": d.says, "rule": d.rule, "verdict": d.verdict(results)} for d in DIRECTIONS]
    numbers = {**settings, "results": results, "directions": directions}
    path = write_figure(out, "paper_tiny", numbers, draw, device)
    with whole_file(path.with_suffix(".md")) as unfinished:
        unfinished.write_text(markdown(json.loads(path.read_text(encoding="utf-8"))), encoding="utf-8")


def markdown(record: dict[str, Any]) -> str:
    """The page of the results."""
    results = record["results"]

    def ours(cell: str, metric: str, scale: float, digits: int) -> str:
        value = results.get(cell, {}).get(metric)
        return "–" if value is None else f"{scale * value:.{digits}f}"

    lines = [
        "# The paper's Table 3, in small",
        "",
        f"Written by `{record['command']}`; benchmarks/paper_tiny.py says what is what.",
        f"Ours: the recipe `tiny`, {record['steps']:,} steps of {record['batch_size']}, on "
        f"{record['environment']['hardware']}. Paper: QLIP-B/16 on 2 B samples, ImageNet-1k. Compare directions, "
        "not numbers.",
    ]
    for table, rows in PAPER.items():
        head = f"zero-shot %: paper | ours | rFID: paper | {record['perceptual']}: ours | PSNR dB: paper | ours"
        lines += ["", f"| {table} | {head} |", "| --- " * 7 + "|"]
        for row, cell, top1, rfid, decibel in rows:
            theirs = "–" if top1 is None else top1
            shown = ours(cell, "top1", 100, 1), ours(cell, "perceptual", 1, 3), ours(cell, "psnr", 1, 2)
            lines.append(f"| {row} | {theirs} | {shown[0]} | {rfid} | {shown[1]} | {decibel} | {shown[2]} |")
    lines += ["", "| the paper's direction | our rule | |", "| --- | --- | --- |"]
    lines += [f"| {d['says']} | {d['rule']} | **{d['verdict']}** |" for d in record["directions"]]
    return "\n".join(lines) + "\n"


def draw(record: dict[str, Any], folder: Path) -> "Figure":
    """Table (a): what the weight of reconstruction does to pictures and to words."""
    results = record["results"]
    rows = PAPER["(a) α_a:α_r"]
    figure = new_figure(9, 3.8)
    left, right = figure.subplots(1, 2)
    accuracies = [row[2] or 0.0 for row in rows]
    theirs = [row[-1] for row in rows], [100 * accuracy / accuracies[0] for accuracy in accuracies]
    best = results.get("1:0", {}).get("top1")
    for axis, values in zip((left, right), theirs, strict=True):
        axis.plot(range(len(rows)), values, "s--", color=THEIRS, mfc="none", label="paper, QLIP-B/16")
        axis.set_xticks(range(len(rows)), [row[0] for row in rows])
    found = [(i, results[row[1]]) for i, row in enumerate(rows) if row[1] in results]
    left.plot([i for i, _ in found], [r["psnr"] for _, r in found], "o-", color=OURS, label="ours, tiny")
    if best:
        shares = [100 * r["top1"] / best for _, r in found]
        right.plot([i for i, _ in found], shares, "o-", color=OURS, label=f"ours, tiny (1:0: {100 * best:.1f} %)")
    plain(left, "Pictures", "$\\alpha_a : \\alpha_r$", "PSNR (dB)")
    plain(right, "Words", "$\\alpha_a : \\alpha_r$", "zero-shot accuracy, % of that of 1:0")
    left.set_ylim(bottom=0)
    right.set_ylim(0, max(115, 1.05 * right.get_ylim()[1]))
    for axis in (left, right):
        axis.legend(frameon=False, fontsize=9, loc="lower center" if axis is left else "lower left")
    return figure
