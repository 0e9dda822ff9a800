"""One file per run, named; `run` turns a recipe into a trained tokenizer.

A recipe is found by its name, or read back from the `recipe.json` that a run leaves.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from qlip.errors import InputError
from qlip.recipes.names import tokenizers

if TYPE_CHECKING:
    from qlip.recipes.run import TrainRecipe


def recipe_names() -> list[str]:
    """Names of the recipes in this package."""
    return list(tokenizers())


def load_recipe(name: str) -> "TrainRecipe":
    """A recipe by name, or from a run's `recipe.json`.

    Raises:
        InputError: there is no such recipe, or the file is not one.
    """
    from qlip.recipes.record import read_recipe
    from qlip.recipes.stage1 import Recipe
    from qlip.recipes.stage2 import Stage2Recipe

    if name in recipe_names():
        return _module(name).RECIPE
    if not Path(name).is_file():
        raise InputError(f"no recipe {name!r}: use one of {recipe_names()}, or the recipe.json of a run")
    return read_recipe(name, {1: Recipe, 2: Stage2Recipe})


def _module(name: str):
    return import_module(f"qlip.recipes.{name.replace('-', '_')}")
