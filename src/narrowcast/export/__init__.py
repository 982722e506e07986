"""What leaves the house: narrowcast's own checkpoints, ONNX files."""

from narrowcast.export.checkpoint import load, read_description, save, source_hash
from narrowcast.export.onnx_export import Exported, onnx

__all__ = ["Exported", "load", "onnx", "read_description", "save", "source_hash"]
