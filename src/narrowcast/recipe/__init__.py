"""Recipes: which layers become what, as ordered rules; presets; TOML and JSON files."""

from narrowcast.recipe.presets import ALIASES, PRESETS
from narrowcast.recipe.read import load_recipe
from narrowcast.recipe.rules import InputRule, Recipe, Rule

__all__ = ["ALIASES", "PRESETS", "InputRule", "Recipe", "Rule", "load_recipe"]
