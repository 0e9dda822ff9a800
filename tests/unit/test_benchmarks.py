"""What benchmarks compare is what their pages say."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from benchmarks import cpu_training
from benchmarks.tiny_recipes import ARMS, Options, recipe_of, with_steps, write_page

from qlip.recipes.run import DataConfig


@pytest.fixture
def options(tmp_path):
    return Options(tmp_path, DataConfig(train=("x",)), (Path("f.safetensors"),), results=tmp_path / "docs")


@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_changes_what_it_says_and_nothing_else(options, arm):
    base, other = (asdict(with_steps(recipe_of(name, options, "cpu"), 24)) for name in ("base", arm))
    base |= base.pop("task")
    other |= other.pop("task")
    changed = {name: value for name, value in other.items() if value != base[name]}
    teacher = {"teacher": ()} if ARMS[arm].get("teacher_weight") == 0 else {}
    assert changed == ARMS[arm] | teacher and other["fit"]["warmup_steps"] == 2


def test_the_page_says_what_another_seed_changes(options):
    about = {"hardware": "H", "torch": "T", "commit": "C"}
    for arm, top1, psnr in (("another seed", 0.03, 19.0), ("base", 0.04, 19.25)):
        (options.out / arm).mkdir()
        result = {"arm": arm, "images_a_core_second": 20, "steps": 9, "images": 1152, "top1": top1, "psnr": psnr}
        (options.out / arm / "result.json").write_text(json.dumps(result | {"environment": about}))
    write_page(options)
    page = (options.results / "tiny-recipes.md").read_text()
    assert page.index("| base | 20.0 | 9 | 1,152 | 4.0% | 19.25 |") < page.index("| another seed |")
    assert "Another seed of the base differs by 1.0 points and 0.25 dB" in page


def test_parts_of_a_step_add_up_and_ratios_are_of_pairs(monkeypatch):
    step = cpu_training.tiny({"device": "cpu", "precision": "fp32", "compile": False}, 4, {})
    shares = cpu_training.parts(step)
    assert sum(shares.values()) == pytest.approx(1, abs=0.01) and shares["products"] > 0.1
    times = iter((2.0, 3.0, 1.0, 2.0, 4.0, 4.0))
    monkeypatch.setattr(cpu_training, "core_seconds", lambda run: next(times))
    found = cpu_training.alternate(step, step, 3)
    assert found == {"now": 2.0, "before": 3.0, "ratio": 1.5, "range": [1.0, 2.0]}
