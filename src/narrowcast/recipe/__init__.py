"""Recipes: which layers become what, as ordered rules; presets; TOML and JSON files."""

from narrowcast.recipe.defaults import default_method
from narrowcast.recipe.presets import ALIASES, PRESETS
from narrowcast.recipe.read import load_recipe
from narrowcast.recipe.rules import InputRule, Recipe, Rule

__all__ = ["ALIASES", "PRESETS", "InputRule", "Recipe", "Rule", "default_method", "load_recipe"]
