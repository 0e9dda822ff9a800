import json
from dataclasses import replace
from pathlib import Path

import pytest

from qlip.errors import InputError
from qlip.recipes import load_recipe, recipe_names
from qlip.recipes.plain import from_plain, to_plain
from qlip.recipes.stage1 import Recipe


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_survives_json(name):
    recipe = load_recipe(name)
    data = replace(recipe.data, train=(Path("a.parquet"), Path("b")), classes=Path("c.json"))
    recipe = replace(recipe, data=data, batch_size=7)
    assert from_plain(type(recipe), json.loads(json.dumps(to_plain(recipe)))) == recipe


def test_infinity_survives_strict_json():
    recipe = replace(Recipe(), task=replace(Recipe().task, grad_clip=float("inf")))
    text = json.dumps(to_plain(recipe), allow_nan=False)
    assert from_plain(Recipe, json.loads(text)) == recipe
    with pytest.raises(InputError, match="lr is 'nan', not a number"):
        from_plain(Recipe, {"task": {"lr": "nan"}})


def test_absent_fields_keep_their_defaults_and_unknown_ones_are_named():
    assert from_plain(Recipe, {"batch_size": 9}) == replace(Recipe(), batch_size=9)
    with pytest.raises(InputError, match="FitConfig has no field 'stepz'"):
        from_plain(Recipe, {"fit": {"stepz": 3}})


def test_what_is_no_recipe(tmp_path):
    with pytest.raises(InputError, match="tiny"):
        load_recipe("tinny")
    (tmp_path / "r.json").write_text('{"recipe": {"batch_size": "many"}}')
    with pytest.raises(InputError, match=r"r\.json"):
        load_recipe(str(tmp_path / "r.json"))
    (tmp_path / "r.json").write_text("{}")
    with pytest.raises(InputError, match=r"r\.json"):
        load_recipe(str(tmp_path / "r.json"))
