"""The recipes of the paper: what its tables say, and that they run."""

import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qlip.cli.training import _load_any, parse_recipe
from qlip.errors import InputError
from qlip.model import PRESETS, QLIP
from qlip.model.image import ImageProcessor
from qlip.recipes import _module, load_recipe, names, recipe_names
from qlip.recipes.llava import RECIPES as LLAVA
from qlip.recipes.plain import to_plain
from qlip.recipes.record import identity, write_record
from qlip.recipes.t2i import RECIPES as T2I
from qlip.recipes.um3 import RECIPES as UM3
from qlip.train.checkpoint import Checkpoints

ROOT = Path(__file__).parents[3]
STAGE_1 = ("b16-256", "b8-256", "l14-392")
STAGE_2 = tuple(f"{name}-stage2" for name in STAGE_1)
VARIANTS = ("b16-256-ablation", "b16-256-recipe2", "b16-256-reconstruction", "b16-256-contrastive")

# Table 8 of the paper, typed from docs/paper.md section 4.
COMMON = {"lr": 5e-4, "betas": (0.9, 0.95), "weight_decay": 0.05}
TABLE_8 = {
    1: {
        **COMMON,
        "optimizer": "lamb",
        "vision_lr": 2e-4,
        "text_lr": 2e-5,
        "decoder_lr": 2e-3,
        "grad_clip": 5,
        "reconstruction_weight": 1000,
        "alignment_weight": 1,
        "quantizer_weight": 1,
        "commitment_weight": 1,
    },
    2: {
        **COMMON,
        "optimizer": "adamw",
        "decoder_lr": 1e-4,
        "grad_clip": 1,
        "discriminator_lr": 1e-4,
        "reconstruction_weight": 1,
        "quantizer_weight": 1,
        "perceptual_weight": 0.1,
        "adversarial_weight": 0.1,
    },
}
RATES = {
    1: {"vision": 2e-4, "text": 2e-5, "decoder": 2e-3, "other": 5e-4},
    2: {"decoder": 1e-4, "other": 5e-4, "discriminator": 1e-4},  # both encoders stand still
}


@pytest.mark.parametrize("name", (*STAGE_1, *STAGE_2))
def test_the_settings_are_those_of_table_8(name):
    recipe = load_recipe(name)
    assert {key: getattr(recipe.task, key) for key in TABLE_8[recipe.stage]} == TABLE_8[recipe.stage]
    assert (recipe.fit.steps, recipe.fit.warmup_steps) == (120_000, 2000)
    per_device, total = {1: (512, 65_536), 2: (128, 16_384)}[recipe.stage]
    assert recipe.batch_size == total and recipe.batch_size // 128 == per_device
    assert per_device % recipe.micro_batch_size == 0  # so that 128 devices can share the batch out


@pytest.mark.parametrize("name", STAGE_1)
def test_the_models_are_the_published_ones(name):
    assert load_recipe(name).model == PRESETS[name]


def test_the_variants_differ_from_the_ablation_in_what_they_are_about_alone():
    ablation = load_recipe("b16-256-ablation")
    assert ablation.batch_size * ablation.fit.steps == pytest.approx(2e9, rel=1e-4)
    assert replace(ablation, fit=load_recipe("b16-256").fit) == load_recipe("b16-256")
    changes = {
        "b16-256-recipe2": {"quantize": False, "quantizer_weight": 0, "commitment_weight": 0},
        "b16-256-reconstruction": {"alignment_weight": 0},
        "b16-256-contrastive": {"reconstruction_weight": 0, "quantizer_weight": 0, "commitment_weight": 0},
    }
    for name, changed in changes.items():
        recipe = load_recipe(name)
        assert replace(recipe, task=ablation.task, fit=ablation.fit) == ablation
        assert recipe.task == replace(ablation.task, **changed)
        assert replace(recipe.fit, best=ablation.fit.best) == ablation.fit


@pytest.mark.parametrize("name", recipe_names())
def test_a_run_can_be_repeated_from_its_file(name, tmp_path):
    recipe = load_recipe(name)
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps({"stage": recipe.stage, "recipe": to_plain(recipe)}))
    assert load_recipe(str(file)) == recipe


def commands(text):
    """The commands `train` and `calibrate` of a text, and their arguments; lines are joined."""
    text = re.sub(r"\\\n\s*", "", text)
    found = re.findall(r"(?:qlip|qlip\.cli) +(train|calibrate) ([^`#\n]+)", text)
    arguments = [(command, (*rest.split(), "--out", "runs/x")) for command, rest in found if "…" not in rest]
    return [(command, given) for command, given in arguments if len(given) > 3 and "--help" not in given]


def parse(command, arguments):
    known = {"Recipes": names.tokenizers() | names.T2I | names.UM3}
    return parse_recipe(command, "", "", known, _load_any, arguments, {})


def test_every_recipe_is_described():
    for recipes, about in ((T2I, names.T2I), (UM3, names.UM3), (LLAVA, names.LLAVA)):
        assert recipes.keys() == about.keys()
    assert all(names.tokenizers().values())


@pytest.mark.parametrize("name", recipe_names())
def test_the_commands_of_the_docstrings_are_understood(name):
    for command, arguments in commands(_module(name).__doc__):
        options = parse(command, arguments)
        assert options.recipe.stage == load_recipe(arguments[0]).stage


@pytest.mark.parametrize("page", ("training.md", "paper-scale.md", "t2i.md", "um3-training.md"))
def test_the_commands_of_the_pages_are_understood(page):
    found = commands((ROOT / "docs" / page).read_text(encoding="utf-8"))
    assert found
    for command, arguments in found:
        assert not isinstance(parse(command, arguments), int)


@pytest.mark.slow
def test_hours_and_tables_are_those_of_the_count(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "docs"), *sys.path])
    import write_scale

    page = write_scale.PAGE.read_text(encoding="utf-8")
    assert write_scale.fill(page) == page
    for name in write_scale.RECIPES:
        if found := re.search(r"([\d,]+)\s+GPU-hours", _module(name).__doc__):
            hours = float(found[1].replace(",", ""))
            assert hours == pytest.approx(write_scale.counted_hours(name), rel=0.05), name


def shallow(config):
    """One block a tower, and few words."""
    towers = {name: replace(getattr(config, name), num_hidden_layers=1) for name in ("vision", "text", "decoder")}
    return replace(config, **towers | {"text": replace(towers["text"], vocab_size=1000)})


def real_step(recipe, config, **changes):
    """A step of a recipe on random pictures on the CPU → values, names of what moved, optimizer groups."""
    images = 2 if recipe.stage == 1 else 4  # StyleGAN2's adversary compares four
    torch.manual_seed(0)
    size = config.vision.image_size
    model = QLIP(config, image_processor=ImageProcessor(resize=size, crop=size))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    recipe = replace(recipe, device="cpu", batch_size=images, micro_batch_size=None, compile=False, **changes)
    task = recipe.build_task(model)
    input_ids = torch.randint(0, 900, (images, 16))
    input_ids[:, -1] = config.text.vocab_size - 1
    batch = {"pixel_values": torch.randn(images, 3, size, size), "keys": [""] * images}
    words = {"input_ids": input_ids, "group": torch.arange(images)} if recipe.stage == 1 else {}
    values = {name: float(value) for name, value in task.step(batch | words, 1).items()}
    moved = {name for name, p in model.named_parameters() if not torch.equal(before[name], p)}
    groups = {g["name"]: g["lr"] for optimizer in task.optimizers for g in optimizer.param_groups}
    return values, moved, groups


def towers(names):
    return {".".join(n.split(".")[: 2 if n.startswith("vision_model") else 1]) for n in names}


QUANTIZER = {"vision_model.quant_embed", "vision_model.quant_embed_post"}
ENCODER = {"vision_model.embeddings", "vision_model.encoder"}
WORDS = {"vision_model.post_layernorm", "visual_projection", "text_model", "text_projection", "logit_scale"}
MOVING = {
    "b16-256": ENCODER | QUANTIZER | WORDS | {"vision_decoder"},
    "b16-256-recipe2": ENCODER | WORDS | {"vision_decoder"},
    "b16-256-reconstruction": ENCODER | QUANTIZER | {"vision_decoder"},
    "b16-256-contrastive": ENCODER | WORDS,
}


def check_stage_1(name, config):
    values, moved, groups = real_step(load_recipe(name), config)
    weights = {"reconstruction": 1e3, "alignment": 1, "quantizer/tokens": 1, "quantizer/codebook": 1}
    weights |= {"commitment": 1}
    present = weights.keys() & values.keys()
    assert values["loss"] == pytest.approx(sum(weights[term] * values[term] for term in present), rel=1e-5)
    assert towers(moved) == MOVING[name]
    assert groups.items() <= RATES[1].items()
    return values


def check_stage_2(config, width):
    recipe = load_recipe("b16-256-stage2")
    task = replace(recipe.task, perceptual_weight=0.0, discriminator_width=width)  # its weights may not be there
    values, moved, groups = real_step(recipe, config, task=task)
    expected = values["reconstruction"] + values["quantizer/tokens"] + values["quantizer/codebook"]
    assert values["loss"] == pytest.approx(expected + 0.1 * values["adversarial"], rel=1e-5, abs=1e-5)
    assert towers(moved) == QUANTIZER | {"vision_decoder"}
    assert groups == RATES[2]


@pytest.mark.parametrize("name", MOVING)
def test_a_step_of_stage_1_trains_what_the_recipe_says(name):
    values = check_stage_1(name, shallow(PRESETS["b16-256"]))
    assert math.isfinite(values["grad_norm"])


def test_a_step_of_stage_2_trains_what_the_recipe_says():
    check_stage_2(shallow(PRESETS["b16-256"]), 32)


@pytest.mark.slow
def test_a_step_of_the_whole_model_in_stage_1():
    values = check_stage_1("b16-256", PRESETS["b16-256"])
    assert values["reconstruction"] < 1 and values["bit_entropy"] > 14


@pytest.mark.slow
def test_a_step_of_the_whole_model_in_stage_2():
    check_stage_2(PRESETS["b16-256"], 512)


def test_every_recipe_asks_the_device_for_its_precision():
    recipes = [*map(load_recipe, recipe_names()), *T2I.values(), *UM3.values(), *LLAVA.values()]
    assert {(recipe.precision, recipe.attention) for recipe in recipes} == {("auto", "auto")}


@pytest.mark.parametrize(
    ("name", "field"),
    [("t2i-tiny", "tokens"), ("um3-tiny", "tokens"), ("tiny", "train"), ("tiny-stage2", "train")],
)
def test_data_that_has_moved_is_known_by_its_content(tmp_path, name, field):
    (tmp_path / "a" / "sub").mkdir(parents=True)
    for file in ("a/1.parquet", "a/sub/2.parquet"):
        (tmp_path / file).write_bytes(file.encode() * 100_000)
    before = {**T2I, **UM3}.get(name) or load_recipe(name)
    before = replace(before, device="cpu")

    def on(folder, **changes):
        path = tmp_path / folder if field == "tokens" else str(tmp_path / folder)
        return replace(before, data=replace(before.data, **{field: (path,)}), **changes)

    write_record(on("a"), name, 7, tmp_path / "run")
    with Checkpoints(tmp_path / "run", 1) as checkpoints:
        checkpoints.save({"x": torch.ones(1)}, 1)
    (tmp_path / "a").rename(tmp_path / "b")
    (tmp_path / "b" / ".DS_Store").write_bytes(b"of another program")
    write_record(on("b"), name, 7, tmp_path / "run")
    with pytest.raises(InputError, match="another 'seed'"):
        write_record(on("b", seed=5), name, 7, tmp_path / "run")
    (tmp_path / "b" / "1.parquet").write_bytes(b"other")
    with pytest.raises(InputError, match="other data or models"):
        write_record(on("b"), name, 7, tmp_path / "run")


def test_a_hub_id_counts_itself_and_of_a_large_folder_every_size_counts(tmp_path):
    assert identity(["owner/name"]) == identity(["owner/name"]) != identity(["owner/other"])
    for i in range(600):
        (tmp_path / f"{i:03}.png").write_bytes(bytes(9))
    before = identity([str(tmp_path)])
    (tmp_path / "301.png").write_bytes(bytes(10))
    assert identity([str(tmp_path)]) != before
