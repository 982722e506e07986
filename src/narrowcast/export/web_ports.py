"""Inputs and outputs of a model as a page sees them, and what it asks its user for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from narrowcast.errors import ModelError

_TYPES = {
    "tensor(float)": "float32", "tensor(double)": "float64", "tensor(int64)": "int64", "tensor(int32)": "int32",
    "tensor(uint8)": "uint8", "tensor(int8)": "int8", "tensor(int16)": "int16", "tensor(uint16)": "uint16",
    "tensor(bool)": "bool", "tensor(float16)": "float16", "tensor(uint32)": "uint32", "tensor(uint64)": "uint64",
}  # fmt: skip
TOKENS = ("int64", "int32")


@dataclass(frozen=True)
class Port:
    """An input or output of a model.

    Args:
        name: its name.
        type: as JavaScript's ONNX Runtime calls it.
        shape: sides; None where open.
    """

    name: str
    type: str
    shape: tuple[int | None, ...]


def ports(entries: Sequence[Any]) -> list[Port]:
    """The inputs or outputs of a session of ONNX Runtime.

    Raises:
        ModelError: one has a type that a page cannot hand over.
    """
    found = []
    for entry in entries:
        if entry.type not in _TYPES:
            raise ModelError(
                f"{entry.name!r} is a {entry.type}, which a page cannot hand over; it knows {', '.join(_TYPES)}"
            )
        sides = tuple(side if isinstance(side, int) and side > 0 else None for side in entry.shape or [])
        found.append(Port(entry.name, _TYPES[entry.type], sides))
    return found


@dataclass(frozen=True)
class Question:
    """What is asked for.

    Args:
        ask: for page.json.
        files: to be copied beside it: name -> file.
        vocabulary: number of tokens, 0 where the input is no text.
        tokens: the tokens by number, for models that predict one.
        notes: why it is not what one may expect.
        unspoken: why the page cannot make a text of tokens; "" where it can.
    """

    ask: dict[str, Any]
    files: dict[str, Path]
    vocabulary: int = 0
    tokens: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    unspoken: str = ""
