"""What leaves the house: narrowcast's own checkpoints, ONNX files."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from narrowcast.export.checkpoint import load, read_description, save, source_hash

if TYPE_CHECKING:
    from narrowcast.export.onnx_export import Exported, onnx

__all__ = ["Exported", "load", "onnx", "read_description", "save", "source_hash"]


def __getattr__(name: str) -> Any:
    """What exports foreign files, on its first use: loading a checkpoint does not wait for it."""
    if name not in ("Exported", "onnx"):
        raise AttributeError(f"module 'narrowcast.export' has no attribute {name!r}")
    return getattr(importlib.import_module("narrowcast.export.onnx_export"), name)
