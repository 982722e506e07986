"""What a page makes of a model's output: classes, likeness of two texts, values, or a text that is written on."""

from __future__ import annotations

from math import prod
from typing import Any

from narrowcast.errors import DataError
from narrowcast.export.web_options import PageOptions
from narrowcast.export.web_ports import Question

_CLASSES = 20  # a text model with at most so many outputs per text is taken for a classifier


def predicts(asked: Question, shape: tuple[int, ...], options: PageOptions) -> bool:
    """Whether an output of this shape has a score for every token of the vocabulary."""
    return asked.ask["kind"] == "text" and _count(asked, shape) in (asked.vocabulary, options.scores)


def _pooled(asked: Question, shape: tuple[int, ...]) -> bool:
    """Whether there is one row of the output per token of a text."""
    return asked.ask["kind"] == "text" and len(shape) == 3


def _count(asked: Question, shape: tuple[int, ...]) -> int:
    return shape[-1] if _pooled(asked, shape) else prod(shape)


def shown(
    asked: Question, shape: tuple[int, ...], options: PageOptions, output: str, *, next_token: bool = False
) -> dict[str, Any]:
    """What the page makes of an output of this shape.

    Args:
        asked: what it asks for.
        shape: of the output of one sample.
        options: of the page.
        output: name of the output.
        next_token: whether the output scores the next token of a text; see `web_text.writes`.

    Raises:
        DataError: there are more or fewer labels than outputs, or `show` asks for what the model cannot give.
    """
    count, pooled = _count(asked, shape), _pooled(asked, shape)
    kind = options.show or _guess(asked, shape, options, next_token=next_token)
    if kind == "likeness" and asked.ask["kind"] != "text":
        raise DataError("likeness compares two texts, and the model's input is not a text with a known vocabulary")
    if kind == "continuation" and not (next_token and not asked.unspoken):
        raise DataError(
            "continuation writes a text on, and the model's output "
            f"{output!r} of shape {list(shape)} is not a score of every token of a known vocabulary for the next place"
            + (f"; {asked.unspoken}" if asked.unspoken else "")
        )
    labels = options.labels or (asked.tokens if predicts(asked, shape, options) and count == asked.vocabulary else ())
    if kind == "classes" and labels and len(labels) != count:
        raise DataError(f"there are {len(labels)} labels, and the model's output {output!r} has {count} classes")
    pool = "none" if not pooled else ("last" if kind in ("classes", "continuation") else "mean")
    return {"kind": kind, "output": output, "pool": pool, "labels": list(labels) if kind == "classes" else []}


def _guess(asked: Question, shape: tuple[int, ...], options: PageOptions, *, next_token: bool) -> str:
    count = _count(asked, shape)
    if asked.ask["kind"] != "text":
        named = asked.ask["kind"] == "picture" and count == max(shape, default=1)
        return "classes" if count > 1 and (options.labels or named) else "values"
    if next_token and not asked.unspoken and not options.labels:
        return "continuation"
    few = not _pooled(asked, shape) and 1 < count <= _CLASSES
    return "classes" if options.labels or predicts(asked, shape, options) or few else "likeness"


def notes_of(asked: Question, show: dict[str, Any]) -> list[str]:
    """Why the page is not what one may expect."""
    silent = asked.unspoken and show["kind"] == "classes"
    return [*asked.notes, *([f"the page does not write on: {asked.unspoken}"] if silent else [])]
