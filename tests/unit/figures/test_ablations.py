"""Table 3: what our numbers are said to show."""

import json
from pathlib import Path

import pytest
from benchmarks.paper_tiny import CELLS

from qlip.figures import ablations
from qlip.figures.ablations import DIRECTIONS, PAPER, markdown, write_tables

ROOT = Path(__file__).parents[3]


def of_the_paper():
    """The paper's own numbers as if they were ours, rFID as LPIPS."""
    rows = [row for table in PAPER.values() for row in table]
    top1 = {cell: top1 for _, cell, top1, _, _ in rows if top1 is not None}
    results = {cell: {"psnr": psnr, "perceptual": rfid / 100} for _, cell, _, rfid, psnr in rows}
    for cell, result in results.items():
        result |= {"top1": top1.get(cell, top1["1:1e3"]) / 100, "chance": 0.001}
    return results


def test_the_paper_reproduces_itself():
    """Table (a) and (b) share a cell: theirs begins with MIM in one and at random in the other."""
    results = of_the_paper()
    for direction in DIRECTIONS:
        row = "(b) the vision encoder begins with" if "from-contrastive" in direction.cells else "(a) α_a:α_r"
        top1 = next(row[2] for row in PAPER[row] if row[1] == "1:1e3") / 100
        results["1:1e3"] = {"top1": top1, "psnr": 24.49, "perceptual": 0.353}
        assert direction.verdict(results) == "reproduced", direction.says


@pytest.mark.parametrize(
    ("cell", "metric", "value", "says"),
    [
        ("1:0", "psnr", 22.0, "alignment alone rebuilds badly"),
        ("0:1", "top1", 0.2, "reconstruction alone classifies at chance"),
        ("1:1e3", "top1", 0.5, "1:10³ costs classification little"),
        ("1:1e3", "psnr", 20.0, "1:10³ costs pictures nothing"),
        ("1:1e2", "psnr", 10.0, "pictures get better with α_r"),
        ("1:1e4", "top1", 0.7, "at 1:10⁴ classification breaks down"),
        ("from-contrastive", "psnr", 25.0, "a start from CLIP rebuilds a little worse"),
        ("recipe1-stage2", "perceptual", 0.5, "stage 2 makes pictures look better"),
        ("recipe1-stage2", "psnr", 25.0, "stage 2 costs PSNR"),
        ("recipe2", "psnr", 20.0, "without the quantizer stage 1 rebuilds better"),
        ("recipe2-stage2", "perceptual", 0.01, "in the end recipe 1 looks better"),
    ],
)
def test_other_numbers_do_not_reproduce_it(cell, metric, value, says):
    (direction,) = (direction for direction in DIRECTIONS if direction.says.startswith(says))
    results = of_the_paper()
    results[cell] = results[cell] | {metric: value}
    assert direction.verdict(results) == "not reproduced"
    del results[cell]
    assert direction.verdict(results) == "not measured"


def test_what_was_not_measured_is_said_so():
    """A cell without LPIPS, where its weights could not be had."""
    results = {cell: {"psnr": 20.0, "top1": 0.1, "chance": 0.005} for cell in ("1:1e3", "recipe1-stage2")}
    verdicts = {direction.says: direction.verdict(results) for direction in DIRECTIONS}
    assert verdicts["stage 2 makes pictures look better (rFID 35.3 to 3.21)"] == "not measured"
    assert verdicts["stage 2 costs PSNR (24.49 to 23.16 dB)"] == "not reproduced"


def test_every_cell_of_the_tables_can_be_trained_and_every_number_is_the_papers():
    cells = [row[1] for table in PAPER.values() for row in table]
    assert set(cells) == CELLS.keys()
    assert {cell for direction in DIRECTIONS for cell in direction.cells} <= CELLS.keys()
    text = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")
    reported = text[text.index("Loss weights α_a:α_r") : text.index("Linear probe: EVA-CLIP")]
    for name, _, top1, rfid, psnr in [row for table in PAPER.values() for row in table]:
        for number in (top1, rfid, psnr):
            assert number is None or str(number).removesuffix(".0") in reported, (name, number)


def test_tables_of_part_of_the_grid(tmp_path):
    results = {
        "1:0": {"psnr": 9.5, "top1": 0.12, "chance": 0.005, "perceptual": 0.9},
        "1:1e3": {"psnr": 20.25, "top1": 0.115, "chance": 0.005, "perceptual": 0.4},
    }
    write_tables(results, {"steps": 600, "batch_size": 128, "perceptual": "ST-LPIPS"}, tmp_path, "cpu")
    record = json.loads((tmp_path / "paper_tiny.json").read_text())
    page = (tmp_path / "paper_tiny.md").read_text()
    assert record["results"] == results and page == markdown(record)
    assert "| 1:10³ | 74.3 | 11.5 | 35.3 | 0.400 | 24.5 | 20.25 |" in page
    assert "| 1:1 | 75.1 | – | 162.6 | – | 17.8 | – |" in page
    assert page.count("**reproduced**") == 2 and "rFID: paper | ST-LPIPS: ours" in page
    left, right = ablations.draw(record, tmp_path).axes
    assert list(left.lines[1].get_ydata()) == [9.5, 20.25]
    assert list(right.lines[1].get_ydata()) == pytest.approx([100, 100 * 0.115 / 0.12])
    assert (tmp_path / "paper_tiny.png").is_file()
