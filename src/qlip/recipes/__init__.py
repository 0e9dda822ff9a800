"""One file per run, named; `stage1` turns a recipe into a trained tokenizer.

A recipe is found by its name, or read back from the `recipe.json` that a run leaves.
"""

import json
import pkgutil
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from qlip.errors import InputError

if TYPE_CHECKING:
    from qlip.recipes.stage1 import Recipe

_MACHINERY = ("stage1", "plain", "card")


def recipe_names() -> list[str]:
    """Names of the recipes in this package."""
    return [module.name for module in pkgutil.iter_modules(__path__) if module.name not in _MACHINERY]


def describe_recipes() -> str:
    """A line for each recipe: its name and what its docstring begins with."""
    docs = {name: (import_module(f"qlip.recipes.{name}").__doc__ or "").splitlines()[0] for name in recipe_names()}
    return "\n".join(f"  {name:<12}{doc.removeprefix(f'`{name}`: ')}" for name, doc in docs.items())


def load_recipe(name: str) -> "Recipe":
    """A recipe by name, or from a run's `recipe.json`.

    Raises:
        InputError: there is no such recipe, or the file is not one.
    """
    from qlip.recipes.plain import from_plain
    from qlip.recipes.stage1 import Recipe

    if name in recipe_names():
        return import_module(f"qlip.recipes.{name}").RECIPE
    if not Path(name).is_file():
        raise InputError(f"no recipe {name!r}: use one of {recipe_names()}, or the recipe.json of a run")
    try:
        return from_plain(Recipe, json.loads(Path(name).read_text(encoding="utf-8"))["recipe"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{name}: not a recipe ({error})") from error
