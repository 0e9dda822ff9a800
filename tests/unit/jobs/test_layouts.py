"""Files for the scorers of GenEval and DPG-Bench, and drawing only what is not there."""

import json

import numpy as np
import pytest
from PIL import Image

from qlip.errors import InputError
from qlip.jobs.draw import Sheet, draw_sheets
from qlip.jobs.layouts import layout_sheets

METADATA = [
    '{"tag": "colors", "include": [{"class": "cup", "count": 1, "color": "red"}], "prompt": "a red cup"}',
    '{"tag": "counting", "include": [{"class": "dog", "count": 2}], "prompt": "a photo of two dogs"}',
]


class Painter:
    """Draws a shade for each seed; remembers what it was asked."""

    def __init__(self):
        self.asked = []

    def draw(self, rows):
        for row in rows:
            self.asked.append(row)
            yield Image.new("RGB", (8, 6), (row[1] + 1, 0, 0))


def test_geneval(tmp_path):
    """As its README has them, and as its scorer reads them: number, JSON, samples/NUMBER.png."""
    (tmp_path / "evaluation_metadata.jsonl").write_text("\n".join(METADATA) + "\n\n")
    out, painter = tmp_path / "out", Painter()
    draw_sheets(layout_sheets("geneval", tmp_path / "evaluation_metadata.jsonl", out, 4, 10), painter.draw, {})
    files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    each = ["metadata.jsonl", *(f"samples/{k:04d}.png" for k in range(4))]
    assert files == {f"0000{i}/{name}" for i in range(2) for name in each}
    for i, line in enumerate(METADATA):
        assert json.load((out / f"0000{i}" / "metadata.jsonl").open()) == json.loads(line)
    assert painter.asked[:5] == [
        *(("a red cup", s) for s in range(10, 14)),
        ("a photo of two dogs", 10),
    ]
    assert Image.open(out / "00001" / "samples" / "0002.png").getpixel((0, 0)) == (13, 0, 0)


def test_dpg(tmp_path):
    """Four pictures in an image, cut apart by its scorer at the pictures' size."""
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    (prompts / "12.txt").write_text("A long\ndescription. \n")
    (prompts / "COCOval2014000000.txt").write_text("Another.")
    out, painter = tmp_path / "out", Painter()
    draw_sheets(layout_sheets("dpg", prompts, out, 4, 0), painter.draw, {})
    assert {path.name for path in out.iterdir()} == {"12.png", "COCOval2014000000.png"}
    assert painter.asked[0] == ("A long description.", 0)
    sheet = np.asarray(Image.open(out / "12.png"))
    assert sheet.shape == (12, 16, 3)
    for k, part in enumerate((sheet[:6, :8], sheet[:6, 8:], sheet[6:, :8], sheet[6:, 8:])):
        assert (part == (k + 1, 0, 0)).all()


def test_what_is_there_is_not_drawn_again(tmp_path):
    sheets = [Sheet(tmp_path / f"{i}.png", "a dög", (i,)) for i in range(3)]
    painter, about = Painter(), {"cfg": 2.0, "model": "m"}
    draw_sheets(sheets[:2], painter.draw, about)
    before = sheets[0].path.read_bytes()
    draw_sheets(sheets, painter.draw, about)
    assert painter.asked == [("a dög", 0), ("a dög", 1), ("a dög", 2)] and sheets[0].path.read_bytes() == before
    sheets[1].path.unlink()
    draw_sheets(sheets, painter.draw, about)
    assert painter.asked[3:] == [("a dög", 1)]
    with pytest.raises(InputError, match=r"0.png was drawn otherwise \(cfg 2.0\): name another --out"):
        draw_sheets(sheets, painter.draw, about | {"cfg": 3.0})
    Image.new("RGB", (8, 6)).save(sheets[2].path)
    with pytest.raises(InputError, match="2.png was drawn otherwise .*unknown"):
        draw_sheets(sheets, painter.draw, about)
    assert len(painter.asked) == 4


def test_other_prompts_are_named(tmp_path):
    (tmp_path / "list.jsonl").write_text('{"text": "a cup"}\n')
    (tmp_path / "empty.jsonl").write_text("\n")
    for message, layout, path, num in (
        ("is not GenEval's list", "geneval", tmp_path / "list.jsonl", 4),
        ("is not GenEval's list", "geneval", tmp_path / "none.jsonl", 4),
        ("holds no prompts", "geneval", tmp_path / "empty.jsonl", 4),
        ("no folder of DPG-Bench's prompts", "dpg", tmp_path, 4),
        ("num is 1: DPG-Bench has 4", "dpg", tmp_path, 1),
        ("num is 0", "geneval", tmp_path / "list.jsonl", 0),
    ):
        with pytest.raises(InputError, match=message):
            layout_sheets(layout, path, tmp_path / "out", num, 0)
    assert not (tmp_path / "out").exists()
