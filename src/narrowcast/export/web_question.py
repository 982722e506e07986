"""What a page asks its user for, told from a model's inputs: a picture, a text, or numbers."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from narrowcast.errors import DataError
from narrowcast.export.web_options import PageOptions
from narrowcast.export.web_ports import TOKENS, Port, Question
from narrowcast.export.web_text import is_text, text_question, tokens_in_a_row

_FIELDS = 16  # numbers that get a field each
_OPEN_TOKENS = 8  # length of an example where the model leaves it open
# Inputs of decoders that are given the keys and values of earlier tokens.
_PAST = "past_key_values"
_CACHED = (
    "the model wants the keys and values of earlier tokens (past_key_values), which the page does not keep; export it "
    "without a cache to write texts on"
)


def question(inputs: list[Port], options: PageOptions) -> Question:
    """What to ask for, for a model with these inputs.

    Raises:
        DataError: mean or std does not have one number per channel, or the vocabulary cannot be read.
    """
    picture = _picture(inputs, options)
    if picture is not None:
        return Question(picture, {})
    if not is_text(inputs):
        return _numbers(inputs, (_CACHED,) if any(_PAST in port.name for port in inputs) else ())
    if options.tokenizer is None:
        return _numbers(inputs, ("the inputs are token ids, and no vocabulary was given: --tokenizer asks for texts",))
    found = text_question(inputs, options, options.tokenizer)
    return _numbers(inputs, (f"{found}; the page asks for token ids",)) if isinstance(found, str) else found


def _picture(inputs: list[Port], options: PageOptions) -> dict[str, Any] | None:
    port = inputs[0]
    if (
        len(inputs) != 1
        or len(port.shape) != 4
        or port.type not in ("float32", "float16", "uint8")
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
    tokens = port.type in TOKENS and len(port.shape) == 2
    return tuple(
        side if side is not None else (_OPEN_TOKENS if tokens and axis else 1) for axis, side in enumerate(port.shape)
    )


def _zeros(port: Port) -> Any:
    return np.zeros(_sides(port), port.type)


def trial(asked: Question, inputs: list[Port]) -> dict[str, Any]:
    """Arrays that the model can be tried with where there is no example: noise, tokens from all over the vocabulary."""
    if asked.ask["kind"] == "text":
        return tokens_in_a_row(asked, inputs, asked.ask["length"] or min(_OPEN_TOKENS, asked.ask["limit"]))
    generator = np.random.default_rng(0)
    feeds = {}
    for port in inputs:
        sides = _sides(port)
        if asked.ask["kind"] == "picture":
            sides = tuple(side or asked.ask[name] for side, name in zip(port.shape[1:], _axes(asked.ask), strict=True))
            feeds[port.name] = _noise(generator, (1, *sides), port.type, asked.ask)
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
    return (((pixels / 255).astype(np.float32) - mean) / std).astype(type_)
