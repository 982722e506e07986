"""Weight solvers, one per file, and the table by which recipes name them. Tensors in, tensors out; no models here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from narrowcast.errors import RecipeError
from narrowcast.methods.adaround import AdaRound
from narrowcast.methods.autoround import AutoRound
from narrowcast.methods.base import Block, BlockMethod, InputTraining, Need, Seen, Solved, WeightMethod
from narrowcast.methods.gptq import Gptq
from narrowcast.methods.hqq import Hqq
from narrowcast.methods.native import weight_sqnr_db
from narrowcast.methods.rtn import Rtn

METHODS: dict[str, type[Any]] = {"rtn": Rtn, "gptq": Gptq, "hqq": Hqq, "adaround": AdaRound, "autoround": AutoRound}
"""Every solver by the name that recipes use: a `WeightMethod`, or a `BlockMethod` where it needs a block."""


def make_method(recipe: str | Mapping[str, Mapping[str, object]]) -> WeightMethod | BlockMethod:
    """The weight solver that a recipe names.

    Args:
        recipe: a name, or one name with its options: "rtn", {"rtn": {"range": "absmax"}}.

    Raises:
        RecipeError: the name, an option or a value is not known; the message lists what is.
    """
    if isinstance(recipe, str):
        recipe = {recipe: {}}
    if not isinstance(recipe, Mapping) or len(recipe) != 1:
        raise RecipeError(f"method = {recipe!r} must be one name or one name with options, like {{'rtn': {{}}}}")
    (name, options), *_ = recipe.items()
    if name not in METHODS:
        raise RecipeError(f"method {name!r} is not known; use one of {', '.join(sorted(METHODS))}")
    if not isinstance(options, Mapping):
        raise RecipeError(f"method {name!r} takes a table of options, got {options!r}; write {name} = {{}}")
    method = METHODS[name]
    known = [field.name for field in fields(method)]
    for key in options:
        if key not in known:
            raise RecipeError(f"method {name!r} has no option {key!r}; its options are {', '.join(known)}")
    made: WeightMethod | BlockMethod = method(**options)
    return made


__all__ = [
    "METHODS",
    "AdaRound",
    "AutoRound",
    "Block",
    "BlockMethod",
    "Gptq",
    "Hqq",
    "InputTraining",
    "Need",
    "Rtn",
    "Seen",
    "Solved",
    "WeightMethod",
    "make_method",
    "weight_sqnr_db",
]
