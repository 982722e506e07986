"""Reading a recipe from whatever the caller has: a preset name, a file, a document, a Recipe."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from narrowcast.errors import RecipeError
from narrowcast.recipe.presets import ALIASES, PRESETS
from narrowcast.recipe.rules import Recipe

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_LARGEST_FILE = 1 << 20


def load_recipe(recipe: str | Path | Mapping[str, Any] | Recipe) -> Recipe:
    """The recipe that a caller means.

    Args:
        recipe: a preset name or its alias (W8A8), a TOML or JSON file, the document of one, or a Recipe.

    Raises:
        RecipeError: there is no such preset or file, or the file is not a recipe; the message says where in the file.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Mapping):
        return Recipe.from_dict(recipe)
    if not isinstance(recipe, str | Path):
        raise RecipeError(f"a recipe is a preset name, a file, a mapping or a Recipe, got {type(recipe).__name__}")
    name = ALIASES.get(str(recipe).upper(), str(recipe))
    if name in PRESETS:
        return PRESETS[name]
    path = Path(recipe)
    if path.suffix.lower() not in (".toml", ".json"):
        aliases = ", ".join(f"{alias} for {preset}" for alias, preset in ALIASES.items())
        raise RecipeError(
            f"recipe {str(recipe)!r} is neither a preset ({', '.join(PRESETS)}; {aliases}) nor a .toml or .json file"
        )
    return _from_file(path)


def _from_file(path: Path) -> Recipe:
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise RecipeError(f"recipe file {path} is larger than {_LARGEST_FILE} bytes; that is no recipe")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"recipe file {path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise RecipeError(f"recipe file {path} is not text in UTF-8") from None
    try:
        document = json.loads(text) if path.suffix.lower() == ".json" else tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # also for numbers of thousands of digits
        raise RecipeError(f"recipe file {path}: {error}") from None
    recipe = Recipe.from_dict(document, str(path))
    return recipe if recipe.name else replace(recipe, name=path.stem)
