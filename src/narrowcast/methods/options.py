"""Checking the options of a weight solver: one message for every number out of its bounds."""

from __future__ import annotations

from collections.abc import Mapping

from narrowcast.errors import RecipeError


def check_numbers(method: str, options: object, bounds: Mapping[str, tuple[float, float]]) -> None:
    """Refuse numbers that are not what their field takes.

    Args:
        method: the method's name in recipes, for the message.
        options: a dataclass with these fields; a field whose default is whole takes whole numbers only.
        bounds: smallest and largest value by field, both allowed.

    Raises:
        RecipeError: a value has another type or is out of bounds; the message names the option and what it takes.
    """
    for name, (low, high) in bounds.items():
        value = getattr(options, name)
        whole = isinstance(getattr(type(options), name), int)
        kinds = (int,) if whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
            kind = "whole number" if whole else "number"
            raise RecipeError(f"{method}: {name} is {value!r}; use a {kind} from {low:g} to {high:g}")
