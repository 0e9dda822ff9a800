"""What commands print is what there is, on every terminal, and strict JSON for programs."""

import io
import json
import sys

import pytest
from rich.table import Table

from qlip.cli.main import _dispatch
from qlip.cli.options import cell, prepare_streams, print_json, print_table, visible
from qlip.errors import InputError

NAMES = (":smile:.png", "[red]x.png", "caf\udce9.png", "\x1b[31mred", "a\nb", "猫")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_names_are_shown_letter_for_letter(monkeypatch, encoding):
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding=encoding, errors="strict"))
    prepare_streams()
    table = Table("name", box=None)
    for name in NAMES:
        table.add_row(cell(name))
    print_table(table)
    sys.stdout.flush()
    shown = [line.strip() for line in out.getvalue().decode(encoding).splitlines()[1:]]
    cat = "猫" if encoding == "utf-8" else "\\u732b"
    assert shown == [":smile:.png", "[red]x.png", "caf\\udce9.png", "\\x1b[31mred", "a\\nb", cat]


def test_json_is_strict_and_ascii(capsys):
    print_json({"name": NAMES, "psnr": float("inf"), "mean": float("nan")})
    text = capsys.readouterr().out
    found = json.loads(text, parse_constant=pytest.fail)
    assert text.isascii() and found["psnr"] is None and found["mean"] is None
    assert found["name"] == [name.replace("\udce9", "\\udce9") for name in NAMES]


def test_messages_keep_their_lines():
    assert visible("a\nb\x1b[0m\x9b") == "a\nb\\x1b[0m\\x9b"


def test_a_closed_stdout_takes_everything(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    prepare_streams()
    print_json({})


@pytest.mark.parametrize(
    "arguments", [["tokenize", "", "--out", "t.parquet"], ["data", "check", ""], ["detokenize", "t", "--out="]]
)
def test_an_empty_argument_is_refused(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="an argument is empty"):
        _dispatch(arguments)
