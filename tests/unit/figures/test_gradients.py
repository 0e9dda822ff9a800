"""Both losses' gradients in training."""

import json

import pytest
import torch
from tests.conftest import small_config

from qlip.errors import InputError
from qlip.figures import gradients
from qlip.figures.gradients import draw
from qlip.figures.memory import random_batch
from qlip.recipes.plain import to_plain
from qlip.recipes.stage1 import Recipe
from qlip.train.fit import FitConfig
from qlip.train.parallel import ComputeConfig
from qlip.train.stage1 import Stage1, Stage1Config


@pytest.fixture
def recipe_file(tmp_path):
    recipe = Recipe(model=small_config(), fit=FitConfig(steps=9, warmup_steps=3), batch_size=8, precision="fp32")
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps({"stage": 1, "recipe": to_plain(recipe)}))
    return path


@pytest.mark.parametrize("with_data", [False, True])
def test_both_bottlenecks_are_trained_and_measured(with_data, recipe_file, color_data, tmp_path):
    data = (str(color_data / "train.parquet"),) if with_data else ()
    classes = color_data / "classes.json" if with_data else None
    path = gradients.gradients(str(recipe_file), tmp_path / "out", data, classes, steps=4, every=2, device="cpu")
    record = json.loads(path.read_text())
    assert record["data"] == (["train.parquet"] if with_data else "noise with random words")
    for series in record["bottlenecks"].values():
        assert series["step"] == [2, 4]
        assert min(series["alignment"] + series["reconstruction"]) > 0
    assert record["ratio"].keys() == {"BSQ", "identity"}
    again = gradients.gradients(str(recipe_file), tmp_path / "out", data, classes, steps=4, every=2, device="cpu")
    assert json.loads(again.read_text())["bottlenecks"] == record["bottlenecks"]  # finished runs are not repeated
    assert len(draw(record, tmp_path).axes[0].lines) == 4
    assert path.with_suffix(".png").is_file()


def test_the_norms_are_those_of_each_loss_alone(small_model):
    """Against autograd on the losses, written down without the training step."""
    config = Stage1Config(quantizer_weight=0.0, commitment_weight=0.0, quantize=False)
    task = Stage1(small_model.train(), config, ComputeConfig(device="cpu", precision="fp32"), 8)
    batch = random_batch(small_model.config, 8)
    norms = task.gradient_norms(batch, 1)
    hidden = small_model.hidden_states(batch["pixel_values"])
    std = torch.tensor(small_model.image_processor.std)[:, None, None]
    mse = ((small_model.vision_decoder(hidden[:, 1:]) - batch["pixel_values"]) * std).square().mean()
    logits = small_model.similarity(small_model.project(hidden[:, 0]), small_model.encode_text(batch["input_ids"]))
    cross_entropy, target = torch.nn.functional.cross_entropy, torch.arange(8)
    contrast = (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2
    weight = small_model.vision_model.encoder.layers[-1].mlp.w3.weight
    for name, loss in (("alignment", contrast), ("reconstruction", mse)):
        (gradient,) = torch.autograd.grad(loss, weight, retain_graph=True)
        assert norms[name].item() == pytest.approx(gradient.norm().item(), rel=1e-4)


def test_a_recipe_of_one_loss_is_refused(recipe_file, tmp_path):
    record = json.loads(recipe_file.read_text())
    record["recipe"]["task"]["alignment_weight"] = 0.0
    recipe_file.write_text(json.dumps(record))
    with pytest.raises(InputError, match="does not weigh"):
        gradients.gradients(str(recipe_file), tmp_path, device="cpu")
