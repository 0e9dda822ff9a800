import sys

import pytest

from qlip.environment import command

PROGRAMS = {
    "/home/me/.venv/bin/qlip": "qlip",
    "/site-packages/qlip/cli/__main__.py": "python -m qlip.cli",
    "/home/me/open-qlip/benchmarks/lm.py": "python benchmarks/lm.py",
    "benchmarks/lm.py": "python benchmarks/lm.py",
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_command_can_be_typed_again_and_tells_no_places(monkeypatch, program):
    monkeypatch.setattr(sys, "argv", [program, "/data/val.parquet", "--out", "runs/a", "--templates", "a {}"])
    assert command() == f"{PROGRAMS[program]} val.parquet --out runs/a --templates 'a {{}}'"
