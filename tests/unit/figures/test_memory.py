"""What a step takes, counted without doing it, against what PyTorch's own tracker sees of a step that is done."""

import json
from dataclasses import replace

import pytest
import torch
from tests.conftest import small_config
from torch.distributed._tools.mem_tracker import MemTracker

from qlip.errors import InputError
from qlip.figures import memory
from qlip.figures.memory import Counter, build, count, draw, need, random_batch
from qlip.recipes import load_recipe

CPU = torch.device("cpu")


def small(name, **changes):
    return replace(load_recipe(name), device="cpu", compile=False, batch_size=16, **changes)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_count_is_what_pytorchs_tracker_sees_of_a_real_step(recompute):
    recipe, config = small("tiny", recompute=recompute), small_config()
    counted = count(build(recipe, config), config, 16)
    task, batch = build(recipe, config), random_batch(config, 16)
    tracker = MemTracker()
    tensors = [value for value in batch.values() if isinstance(value, torch.Tensor)]
    tracker.track_external(task.model, task.optimizer, *tensors)
    with tracker:
        task.step(batch, 1)
    seen = tracker.get_tracker_snapshot("peak")[CPU]["Total"]
    assert counted == pytest.approx(seen, rel=0.02)  # measured: 0.6 %


def test_counting_leaves_the_task_as_it_was():
    config = small_config()
    task = build(small("tiny"), config)
    before = {name: value.clone() for name, value in task.state_dict().items()}
    assert count(task, config, 4) > sum(value.nbytes for value in before.values())
    assert all(torch.equal(value, before[name]) for name, value in task.state_dict().items())
    task.step(random_batch(config, 4), 1)


def test_a_counted_storage_ends_when_its_last_view_does():
    with Counter() as counter:
        x = torch.zeros(1000)
        view = x[:10]
        del x
        assert counter.now == 4000
        del view
        assert counter.now == 0 and counter.peak == 4000


def test_recomputation_needs_less():
    config = small_config()
    assert need(small("tiny", recompute=True), config, 64, CPU) < need(small("tiny"), config, 64, CPU)


@pytest.mark.slow
def test_a_step_with_r1_needs_more():
    recipe, config = load_recipe("b16-256-stage2"), small_config()
    recipe = replace(recipe, task=replace(recipe.task, discriminator_width=64, perceptual_weight=0.0))
    assert need(recipe, config, 4, CPU, recipe.task.r1_every) > need(recipe, config, 4, CPU)


def test_the_figure_holds_what_was_counted_beside_the_papers(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "need", lambda recipe, config, images, device, step: images / 8 * step)
    path = memory.memory("tiny", "tiny-stage2", tmp_path, (2, 8), (2, 8), "cpu")
    record = json.loads(path.read_text())
    assert record["how"] == "counted" and record["environment"]["torch"] == torch.__version__
    assert [point["memory_gb"] for point in record["series"][0]["points"]] == [0.25, 1.0]
    assert len(record["series"]) == 2  # this recipe's adversary has no R1
    labels = draw(record, tmp_path).axes[0].get_legend_handles_labels()[1]
    assert sum(label.startswith("ours, counted") for label in labels) == 2
    assert sum(label.startswith("paper") for label in labels) == 2
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_what_does_not_fit_is_left_out_of_the_drawing(tmp_path):
    points = [{"images": 2, "memory_gb": 1.0}, {"images": 4, "memory_gb": None}]
    record = {"recipes": ["a", "b"], "how": "measured", "series": [{"name": "stage 1", "points": points}]}
    axis = draw(record | {"paper": []}, tmp_path).axes[0]
    assert list(axis.lines[0].get_xdata()) == [2]


@pytest.mark.parametrize(
    ("recipes", "sizes", "message"),
    [(("tiny-stage2", "tiny"), (4,), "one of stage 2"), (("tiny", "tiny-stage2"), (1,), "2 or more")],
)
def test_what_cannot_be_is_refused(recipes, sizes, message, tmp_path):
    with pytest.raises(InputError, match=message):
        memory.memory(*recipes, tmp_path, sizes, sizes, "cpu")
