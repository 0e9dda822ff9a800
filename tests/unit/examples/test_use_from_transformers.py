"""The example that uses a tokenizer through transformers runs, and finds what is in the picture."""

import runpy
from pathlib import Path

import pytest

import qlip

EXAMPLE = Path(__file__).parents[3] / "examples" / "use_from_transformers.py"


def test_it_runs(photos, tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    goldfish = next(photo for photo in photos if photo.stem == "goldfish")
    runpy.run_path(str(EXAMPLE))["main"](str(goldfish))
    words, features, tokens, rebuilt = capsys.readouterr().out.splitlines()
    shares = {word: float(share[:-1]) for word, share in zip(*[iter(words.split())] * 2, strict=True)}
    assert max(shares, key=shares.get) == "goldfish" and sum(shares.values()) == pytest.approx(100, abs=0.3)
    assert features.endswith("(1, 64, 256)") and rebuilt.endswith("(1, 3, 64, 64), normalised")
    assert tokens.startswith(f"tokens: {qlip.load('qlip-tiny').tokenize(goldfish)[0, :4].tolist()} … of 64")
