"""The pairs of layers that a recipe may name for a transform, as plain text; knows no model."""

from __future__ import annotations

from typing import Any

from narrowcast.errors import RecipeError

Pair = tuple[str, str]
"""Glob patterns of a producer's and a consumer's name."""


def checked_pairs(transform: str, pairs: Any) -> tuple[Pair, ...]:
    """The pairs as tuples of texts.

    Raises:
        RecipeError: they are not a list of [producer, consumer] texts.
    """
    problem = (
        f"{transform}: pairs is {pairs!r}; write a list of [producer, consumer] patterns, like [['*.fc1', '*.fc2']]"
    )
    if not isinstance(pairs, list | tuple):
        raise RecipeError(problem)
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise RecipeError(problem)
    return tuple((pair[0], pair[1]) for pair in pairs)
