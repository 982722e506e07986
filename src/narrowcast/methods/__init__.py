"""Weight solvers, one per file, and the table by which recipes name them. Tensors in, tensors out; no models here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

from narrowcast.errors import RecipeError
from narrowcast.methods.base import Seen, WeightMethod
from narrowcast.methods.native import weight_sqnr_db
from narrowcast.methods.rtn import Rtn

METHODS: dict[str, type[Rtn]] = {"rtn": Rtn}


def make_method(recipe: str | Mapping[str, Mapping[str, object]]) -> WeightMethod:
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
    return method(**options)  # type: ignore[arg-type]


__all__ = ["METHODS", "Rtn", "Seen", "WeightMethod", "make_method", "weight_sqnr_db"]
