"""What a page asks its user for, told from a model's inputs: a picture, a text, or numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from narrowcast.errors import DataError, ModelError
from narrowcast.export.web_options import CHARACTERS, TOKENIZER, PageOptions, read_json

_TYPES = {
    "tensor(float)": "float32", "tensor(double)": "float64", "tensor(int64)": "int64", "tensor(int32)": "int32",
    "tensor(uint8)": "uint8", "tensor(int8)": "int8", "tensor(int16)": "int16", "tensor(uint16)": "uint16",
    "tensor(bool)": "bool", "tensor(uint32)": "uint32", "tensor(uint64)": "uint64",
}  # fmt: skip
_TOKENS = ("int64", "int32")
_FIELDS = 16  # numbers that get a field each
_OPEN_TOKENS = 8  # length of an example where the model leaves it open
_LONGEST_TEXT = 512
# Names that encoders' inputs have everywhere.
_IDS, _MASK, _KINDS = "input_ids", "attention_mask", "token_type_ids"


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
    """

    ask: dict[str, Any]
    files: dict[str, Path]
    vocabulary: int = 0
    tokens: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def question(inputs: list[Port], options: PageOptions) -> Question:
    """What to ask for, for a model with these inputs.

    Raises:
        DataError: mean or std does not have one number per channel, or the vocabulary cannot be read.
    """
    picture = _picture(inputs, options)
    if picture is not None:
        return Question(picture, {})
    if _is_text(inputs):
        if options.tokenizer is not None:
            return _text(inputs, options, options.tokenizer)
        return _numbers(inputs, ("the inputs are token ids, and no vocabulary was given: --tokenizer asks for texts",))
    return _numbers(inputs, ())


def _picture(inputs: list[Port], options: PageOptions) -> dict[str, Any] | None:
    port = inputs[0]
    if (
        len(inputs) != 1
        or len(port.shape) != 4
        or port.type not in ("float32", "uint8")
        or port.shape[0] not in (1, None)
    ):
        return None
    _, a, b, c = port.shape
    if a in (1, 3):
        layout, channels, sides = "NCHW", a, (b, c)
    elif c in (1, 3):
        layout, channels, sides = "NHWC", c, (a, b)
    else:
        return None
    if None in sides and options.side is None:
        raise DataError(f"the model takes pictures of any size; say by --image-size which one {port.name!r} gets")
    height, width = (side or options.side for side in sides)
    for name, values in (("mean", options.mean), ("std", options.std)):
        if values and len(values) not in (1, channels):
            raise DataError(f"{name} has {len(values)} numbers, the model's pictures have {channels} channels")
    divide = 1 if port.type == "uint8" else 255
    return {
        "kind": "picture", "input": port.name, "type": port.type, "layout": layout, "channels": channels,
        "height": height, "width": width, "divide": divide, "mean": list(options.mean), "std": list(options.std),
    }  # fmt: skip


def _is_text(inputs: list[Port]) -> bool:
    names = {port.name for port in inputs}
    tokens = all(port.type in _TOKENS and len(port.shape) == 2 and port.shape[0] in (1, None) for port in inputs)
    return tokens and (len(inputs) == 1 or (_IDS in names and names <= {_IDS, _MASK, _KINDS}))


def _text(inputs: list[Port], options: PageOptions, place: Path) -> Question:
    file = place if place.is_file() else next(
        (place / name for name in (TOKENIZER, CHARACTERS) if (place / name).is_file()), None
    )  # fmt: skip
    if file is None:
        raise DataError(f"{place} holds no {TOKENIZER} and no {CHARACTERS}")
    table = read_json(file)
    characters = isinstance(table, dict) and bool(table) and all(isinstance(number, int) for number in table.values())
    reason = "" if characters else _why_not_word_piece(table)
    if reason:
        return _numbers(inputs, (f"{file.name}: {reason}, so the page asks for token ids",))
    name = CHARACTERS if characters else TOKENIZER
    named = {port.name: port for port in inputs}
    ids = named.get(_IDS, inputs[0])
    vocabulary: dict[str, int] = table if characters else table["model"]["vocab"]
    limit = (table.get("truncation") or {}).get("max_length") if not characters else None
    ask = {
        "kind": "text", "tokens": "characters" if characters else "words", "vocabulary": name,
        "length": ids.shape[1], "limit": min(filter(None, (limit, ids.shape[1], _LONGEST_TEXT))),
        "pad": "left" if characters else "right", "pad_id": 0 if characters else _pad_id(table),
        **{key: _plain(named.get(port)) for key, port in (("mask", _MASK), ("kinds", _KINDS))}, "input": _plain(ids),
    }  # fmt: skip
    tokens = [""] * (max(vocabulary.values()) + 1)
    for token, number in vocabulary.items():
        tokens[number] = token
    return Question(ask, {name: file}, len(tokens), tuple(tokens))


def _plain(port: Port | None) -> dict[str, str] | None:
    return None if port is None else {"name": port.name, "type": port.type}


def _why_not_word_piece(table: Any) -> str:
    """What of a tokenizer the page does not do; "" where it does everything."""
    if not isinstance(table, dict) or not isinstance(table.get("model"), dict):
        return "it is no tokenizer and no vocabulary"
    steps = {
        "model": ("WordPiece",),
        "normalizer": ("BertNormalizer", None),
        "pre_tokenizer": ("BertPreTokenizer",),
        "post_processor": ("TemplateProcessing", "BertProcessing", None),
    }
    for step, known in steps.items():
        found = (table.get(step) or {}).get("type")
        if found not in known:
            return f"its {step} is {found}, and the page has only that of BERT's family"
    return ""


def _pad_id(table: dict[str, Any]) -> int:
    padding = table.get("padding") or {}
    return int(padding.get("pad_id", table["model"]["vocab"].get("[PAD]", 0)))


def _numbers(inputs: list[Port], notes: tuple[str, ...]) -> Question:
    example = {port.name: _zeros(port).tolist() for port in inputs}
    only = inputs[0]
    few = (
        len(inputs) == 1
        and only.type.startswith("float")
        and 0 < prod(_sides(only)) <= _FIELDS
        and None not in only.shape[1:]
    )
    listed = [{"name": port.name, "type": port.type, "shape": list(port.shape)} for port in inputs]
    return Question({"kind": "numbers", "ports": listed, "example": example, "fields": few}, {}, notes=notes)


def _sides(port: Port) -> tuple[int, ...]:
    """A shape without open sides: one sample, and a few tokens."""
    tokens = port.type in _TOKENS and len(port.shape) == 2
    return tuple(
        side if side is not None else (_OPEN_TOKENS if tokens and axis else 1) for axis, side in enumerate(port.shape)
    )


def _zeros(port: Port) -> Any:
    return np.zeros(_sides(port), port.type)


def trial(asked: Question, inputs: list[Port]) -> dict[str, Any]:
    """Arrays that the model can be tried with where there is no example: noise, tokens from all over the vocabulary."""
    generator = np.random.default_rng(0)
    feeds = {}
    for port in inputs:
        sides = _sides(port)
        if asked.ask["kind"] == "picture":
            sides = tuple(side or asked.ask[name] for side, name in zip(port.shape[1:], _axes(asked.ask), strict=True))
            feeds[port.name] = _noise(generator, (1, *sides), port.type, asked.ask)
        elif asked.ask["kind"] == "text" and port.name in (_MASK, _KINDS):
            feeds[port.name] = np.full(sides, int(port.name == _MASK), port.type)
        elif asked.ask["kind"] == "text":
            feeds[port.name] = generator.integers(0, asked.vocabulary, sides).astype(port.type)
        else:
            feeds[port.name] = _zeros(port)
    return feeds


def _axes(ask: dict[str, Any]) -> tuple[str, str, str]:
    return ("channels", "height", "width") if ask["layout"] == "NCHW" else ("height", "width", "channels")


def _noise(generator: np.random.Generator, sides: tuple[int, ...], type_: str, ask: dict[str, Any]) -> Any:
    """A picture of noise, prepared as the page prepares pictures."""
    pixels = generator.integers(0, 256, sides)
    if type_ == "uint8":
        return pixels.astype(np.uint8)
    shape = (-1, 1, 1) if ask["layout"] == "NCHW" else (-1,)
    mean, std = (
        np.array(ask[name] or [default], np.float32).reshape(shape) for name, default in (("mean", 0), ("std", 1))
    )
    return ((pixels / 255).astype(np.float32) - mean) / std
