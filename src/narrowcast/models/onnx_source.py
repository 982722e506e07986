"""What counts as an ONNX model, and the error where the packages that read one are missing; imports none of them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from narrowcast.errors import ModelError

PACKAGES = ("onnx", "onnx_ir", "onnxruntime")


def is_onnx(model: Any) -> bool:
    """Whether `model` is a path of an .onnx file, an `onnx.ModelProto` or an `onnx_ir.Model`."""
    if isinstance(model, str | Path):
        return Path(model).suffix.lower() == ".onnx"
    kind = type(model)
    return (kind.__module__.partition(".")[0], kind.__name__) in (
        ("onnx", "ModelProto"),
        ("onnx_ir", "Model"),
    )


def require_onnx() -> None:
    """Raise ModelError where a package that ONNX files need is not installed."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelError(f"ONNX files need {', '.join(missing)}: pip install 'narrowcast[onnx]'")
