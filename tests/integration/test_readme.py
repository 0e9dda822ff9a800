"""What the README says is so."""

import re
import shlex
import shutil
import sys
from collections import defaultdict
from importlib.metadata import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")

NESTED = ("calibrate", "data", "eval", "figures", "llava", "tokens", "train", "um3")


def commands() -> dict[tuple[str, ...], set[str]]:
    """For each command in README, docs and model cards the options that they give it."""
    found = defaultdict(set)
    pages = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("src/qlip/models/*/README.md")]
    for block in (b for page in pages for b in re.findall(r"```sh\n(.*?)```", page.read_text("utf-8"), re.DOTALL)):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if called := {"qlip", "qlip.cli"} & {*words}:
                words = words[words.index(called.pop()) + 1 :]
                options = {word.split("=")[0] for word in words if word.startswith("--")}
                own_words = 3 if words[:2] == ["llava", "train"] else 1 + (words[0] in NESTED)
                found[tuple(words[:own_words])] |= options
    return dict(found)


@pytest.mark.parametrize(
    ("command", "options"), commands().items(), ids=lambda part: "-".join(part) if isinstance(part, tuple) else ""
)
def test_commands_have_the_options_that_pages_give_them(run, command, options):
    code, out, err = run(*command, "--help")
    known = re.findall(r"--[\w.-]+", out)
    assert code == 0 and known, err
    assert options <= {*known}


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


def test_installation_lines_name_extras_that_there_are():
    pages = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("src/qlip/**/*.py")]
    found = [
        re.findall(r"pip install [^\n]*?(?:open-qlip|\.)\[([\w,-]+)\]", page.read_text("utf-8")) for page in pages
    ]
    named = {extra for page in found for extras in page for extra in extras.split(",")}
    assert {"train", "eval", "ray"} <= named <= {*metadata("open-qlip").get_all("Provides-Extra")}


@pytest.mark.parametrize("link", re.findall(r"\]\(((?!https?:)[^)#]+)\)", README))
def test_links_lead_somewhere(link):
    assert (ROOT / link).exists()


def test_the_tree_names_what_is_there():
    tree = README.split("## The tree\n\n```\n")[1].split("```")[0]
    for line in tree.splitlines()[1:]:
        if match := re.match(r"( +)([\w./]+)", line):
            name = match[2]
            assert list((ROOT / "src" / "qlip").glob(name)) or list((ROOT / "src" / "qlip").rglob(name)), name
