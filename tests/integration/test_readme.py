"""What the README says is so."""

import re
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_example_runs(photos, tmp_path, monkeypatch):
    shutil.copy(photos[1], tmp_path / "cat.jpg")
    shutil.copy(photos[2], tmp_path / "dog.png")
    monkeypatch.chdir(tmp_path)
    example = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    found: dict = {}
    exec(example, found)
    shapes = {
        name: tuple(found[name].shape) for name in ("tokens", "images", "probabilities", "sub_tokens", "latents")
    }
    assert shapes == {
        "tokens": (1, 64),
        "images": (1, 3, 64, 64),
        "probabilities": (1, 3),
        "sub_tokens": (1, 64, 2),
        "latents": (2, 64, 28),
    }
    goldfish = next(photo for photo in photos if photo.stem == "goldfish")
    assert found["words"][found["model"].classify(goldfish, found["words"]).argmax()] == "goldfish"


def test_the_table_is_what_the_bundled_results_say(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "docs"), *sys.path])
    from write_numbers import table

    assert f"-->\n{table()}\n<!-- /models -->" in README


@pytest.mark.parametrize("link", re.findall(r"\]\(((?!https?:)[^)#]+)\)", README))
def test_links_lead_somewhere(link):
    assert (ROOT / link).exists()


def test_the_tree_names_what_is_there():
    tree = README.split("## The tree\n\n```\n")[1].split("```")[0]
    for line in tree.splitlines()[1:]:
        if match := re.match(r"( +)([\w./]+)", line):
            name = match[2]
            assert list((ROOT / "src" / "qlip").glob(name)) or list((ROOT / "src" / "qlip").rglob(name)), name
