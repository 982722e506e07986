"""The float32 model to show beside a quantized one, where its file lies near: Hugging Face directories bring one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from narrowcast.errors import NarrowcastError

_PLACES = ("onnx/model.onnx", "model.onnx", "../onnx/model.onnx", "../model.onnx")
HOW = (
    "no float32 model stands beside; --float names one: an .onnx file, a Hugging Face directory, or "
    "package.module:factory (PyTorch models need --data)"
)


def float_file(directory: Path) -> Path | None:
    """The ONNX file that a Hugging Face directory brings beside its weights; None where there is none."""
    return next((directory / name for name in _PLACES[:2] if (directory / name).is_file()), None)


def found_beside(quantized: Path) -> Path | None:
    """The float32 file that lies near a quantized .onnx file: by the names that exporters use, with the same ports."""
    here = quantized.resolve()
    for name in _PLACES:
        file = (here.parent / name).resolve()
        if file.is_file() and file != here and same_ports(file, here):
            return file
    return None


def same_ports(first: Path, second: Path) -> bool:
    """Whether two ONNX files have inputs and outputs of the same names, and only the second integers inside."""
    from narrowcast.export.artefact import is_quantized
    from narrowcast.models.onnx_file import read_onnx

    try:
        models = [read_onnx(file) for file in (first, second)]
    except NarrowcastError:
        return False
    names: list[Any] = [
        ([value.name for value in model.graph.inputs if value.name not in model.graph.initializers],
         [value.name for value in model.graph.outputs]) for model in models
    ]  # fmt: skip
    return names[0] == names[1] and not is_quantized(models[0]) and is_quantized(models[1])
