"""One file per run, named; `run` turns a recipe into a trained tokenizer.

A recipe is found by its name, or read back from the `recipe.json` that a run leaves.
"""

import pkgutil
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from qlip.errors import InputError

if TYPE_CHECKING:
    from qlip.recipes.run import TrainRecipe

_MACHINERY = ("run", "record", "stage1", "stage2", "calibrate", "export", "plain", "card", "llava", "t2i", "um3")


def recipe_names() -> list[str]:
    """Names of the recipes in this package."""
    modules = (module.name for module in pkgutil.iter_modules(__path__))
    return [name.replace("_", "-") for name in modules if name not in _MACHINERY]


def describe_recipes() -> str:
    """A line for each recipe: its name and what its docstring begins with."""
    names = recipe_names()
    docs = [(_module(name).__doc__ or "").splitlines()[0] for name in names]
    width = max(map(len, names)) + 2
    return "\n".join(
        f"  {name:<{width}}{doc.removeprefix(f'`{name}`: ')}" for name, doc in zip(names, docs, strict=True)
    )


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
