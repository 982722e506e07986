"""Where a graph is cut into the blocks of its network: wherever one value alone goes on.

Blocks that come in turns (attention, feed-forward, attention, ...; depthwise, pointwise, ...) belong together: one
layer of a transformer is one block, as its author wrote it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from itertools import pairwise
from typing import Any, TypeVar

T = TypeVar("T")

# Turns of so many blocks are looked for, and so many of them make a habit.
_LONGEST_TURN = 4
_FEWEST_TURNS = 3


def cut(
    steps: Sequence[T], reads: Callable[[T], Sequence[Any]], gives: Callable[[T], Sequence[Any]],
    is_layer: Callable[[T], bool], kind: Callable[[T], Hashable],
) -> list[list[T]]:  # fmt: skip
    """The steps in parts, in order; every part but the first has a layer.

    Args:
        steps: in the order in which they run.
        reads: the values that a step reads; those that no step gives do not count.
        gives: the values that a step gives.
        is_layer: whether a step is a layer.
        kind: what makes two steps alike.
    """
    parts = _joined(_split(steps, reads, gives), is_layer)
    turn = _turn([tuple(map(kind, part)) for part in parts])
    if turn is None:
        return parts
    first, length, count = turn
    ends = [first + length * number for number in range(count + 1)]
    merged = [[step for part in parts[a:b] for step in part] for a, b in pairwise(ends)]
    return [*parts[:first], *merged, *parts[ends[-1] :]]


def _split(
    steps: Sequence[T], reads: Callable[[T], Sequence[Any]], gives: Callable[[T], Sequence[Any]]
) -> list[list[T]]:
    """A part ends where one value alone is read later."""
    until = {id(value): index for index, step in enumerate(steps) for value in reads(step)}
    parts: list[list[T]] = []
    alive: set[int] = set()
    part: list[T] = []
    for index, step in enumerate(steps):
        part.append(step)
        alive = {value for value in alive | set(map(id, gives(step))) if until.get(value, -1) > index}
        if len(alive) == 1:
            parts.append(part)
            part = []
    return [*parts, part] if part else parts


def _joined(parts: list[list[T]], is_layer: Callable[[T], bool]) -> list[list[T]]:
    """The parts, those without a layer as the end of the one before."""
    found: list[list[T]] = []
    for part in parts:
        if found and not any(map(is_layer, part)):
            found[-1] = found[-1] + part
        else:
            found.append(part)
    return found


def _turn(kinds: Sequence[Hashable]) -> tuple[int, int, int] | None:
    """(first part, length, how many) of the shortest turns of different parts; None where there are none."""
    for length in range(2, _LONGEST_TURN + 1):
        for first in range(len(kinds) - _FEWEST_TURNS * length + 1):
            same = 0
            while first + same + length < len(kinds) and kinds[first + same] == kinds[first + same + length]:
                same += 1
            count = same // length + 1
            if count >= _FEWEST_TURNS and len(set(kinds[first : first + length])) > 1:
                return first, length, count
    return None
