"""The first samples of calibration data as a page offers them: PNG files, texts, numbers."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from narrowcast.data import iterate
from narrowcast.export.web_ports import Question

PICTURES, FOLDER = 6, "examples"
_MOST_NUMBERS = 4096
_START, _WORDS = "Once upon a time", 6  # what models that write on begin with, and how much of a given text
# For text models without data: two sentences that mean nearly the same.
_TEXTS = ("A man is playing a guitar on the street.", "Someone makes music outdoors.")


def first_samples(example: Any, model: Any, count: int) -> dict[str, Any]:
    """The first `count` samples of data as arrays by the names of the model's inputs; empty where there is no data.

    Args:
        example: calibration data, or None.
        model: an `OnnxModule`.
        count: samples of the first batch to take.

    Raises:
        DataError: the data holds no batch.
    """
    if example is None:
        return {}
    batch = next(iter(iterate(example, model)))
    given = dict(zip(model.input_names, batch.args, strict=False)) | dict(batch.kwargs)
    return {name: np.asarray(value)[:count] for name, value in given.items() if name in model.input_names}


def pictures(samples: Mapping[str, Any], ask: Mapping[str, Any], folder: Path) -> list[str]:
    """Write samples as PNG files, their preparation undone; returns their paths relative to `folder`."""
    array = samples.get(ask["input"])
    if array is None:
        return []
    (folder / FOLDER).mkdir()
    names = []
    for index, sample in enumerate(array):
        names.append(f"{FOLDER}/{index + 1}.png")
        (folder / names[-1]).write_bytes(png(pixels(sample, ask)))
    return names


def pixels(sample: Any, ask: Mapping[str, Any]) -> Any:
    """[height, width, channels] uint8 of one prepared picture, whose axes are those of the ask's layout."""
    values = np.asarray(sample, np.float64)
    values = np.moveaxis(values, 0, -1) if ask["layout"] == "NCHW" else values
    mean, std = np.array(ask["mean"] or [0.0]), np.array(ask["std"] or [1.0])
    return np.clip(np.rint((values * std + mean) * ask["divide"]), 0, 255).astype(np.uint8)


def png(image: Any) -> bytes:
    """An image [height, width, 1 or 3] uint8 as a PNG file."""
    height, width, channels = image.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), image.reshape(height, -1)], axis=1)  # filter 0 per row
    header = struct.pack(">IIBBBBB", width, height, 8, {1: 0, 3: 2}[channels], 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 9)), (b"IEND", b"")]
    chunks = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def texts(example: Any, count: int) -> list[str]:
    """The first `count` texts of the data; sentences of the page's own where it has none."""
    found = getattr(example, "strings", None) or getattr(example, "texts", None) or _TEXTS
    return [str(text) for text in found[:count]]


def beginning(example: Any) -> str:
    """The first words of the first text of the data, for models that write on."""
    found = getattr(example, "strings", None) or getattr(example, "texts", None)
    return " ".join(str(found[0]).split()[:_WORDS]) if found else _START


def numbers(samples: Mapping[str, Any], example: Mapping[str, Any]) -> dict[str, Any]:
    """The first sample in place of the zeros of `example`, where it is small enough to be read."""
    found = {name: array[:1] for name, array in samples.items() if name in example}
    if set(found) != set(example) or any(array.size > _MOST_NUMBERS for array in found.values()):
        return dict(example)
    return {name: array.tolist() for name, array in found.items()}


def complete(asked: Question, show: Mapping[str, Any], samples: Mapping[str, Any], example: Any, folder: Path) -> None:
    """Put examples into what is asked, in place; pictures are written into the folder."""
    ask = asked.ask
    if ask["kind"] == "picture":
        ask["examples"] = pictures(samples, ask, folder)
    elif show["kind"] == "continuation":
        ask["texts"], ask["examples"] = 1, [beginning(example)]
    elif ask["kind"] == "text":
        ask["texts"] = 2 if show["kind"] == "likeness" else 1
        ask["examples"] = texts(example, ask["texts"])
    else:
        ask["example"] = numbers(samples, ask["example"])
