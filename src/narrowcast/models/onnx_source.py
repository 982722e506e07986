"""What counts as an ONNX model, and the error where the packages that read one are missing; imports none of them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from narrowcast.errors import ModelError

PACKAGES = ("onnx", "onnx_ir", "onnxruntime")


def is_onnx(model: Any) -> bool:
    """Whether `model` is a path of an .onnx file, an `onnx.ModelProto`, an `onnx_ir.Model` or an `OnnxModule`."""
    if isinstance(model, str | Path):
        return Path(model).suffix.lower() == ".onnx"
    kind = type(model)
    named = (kind.__module__.partition(".")[0], kind.__name__)
    return is_onnx_module(model) or named in (("onnx", "ModelProto"), ("onnx_ir", "Model"))


def is_onnx_module(model: Any) -> bool:
    """Whether `model` is an ONNX graph that is called like a torch module."""
    kind = type(model)
    return (kind.__module__, kind.__name__) == ("narrowcast.models.onnx_session", "OnnxModule")


def require_onnx() -> None:
    """Raise ModelError where a package that ONNX files need is not installed."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelError(f"ONNX files need {', '.join(missing)}: pip install 'narrowcast[onnx]'")
