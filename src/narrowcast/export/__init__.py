"""What leaves the house: narrowcast's own checkpoints, ONNX files, files of ONNX Runtime for phones, pages."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from narrowcast.export.checkpoint import load, read_description, save, source_hash
    from narrowcast.export.onnx_export import Exported, onnx
    from narrowcast.export.targets import TARGETS, Delivered
    from narrowcast.export.web_export import Page, web
    from narrowcast.export.web_options import PageOptions

_FILES = {
    "Delivered": "targets",
    "Exported": "onnx_export",
    "Page": "web_export",
    "PageOptions": "web_options",
    "TARGETS": "targets",
    "load": "checkpoint",
    "onnx": "onnx_export",
    "read_description": "checkpoint",
    "save": "checkpoint",
    "source_hash": "checkpoint",
    "web": "web_export",
}

__all__ = [
    "TARGETS",
    "Delivered",
    "Exported",
    "Page",
    "PageOptions",
    "load",
    "onnx",
    "read_description",
    "save",
    "source_hash",
    "web",
]


def __getattr__(name: str) -> Any:
    """A name on its first use: loading a checkpoint does not wait for foreign files, nor help texts for torch."""
    if name not in _FILES:
        raise AttributeError(f"module 'narrowcast.export' has no attribute {name!r}")
    return getattr(importlib.import_module(f"narrowcast.export.{_FILES[name]}"), name)
