"""Writing a quantized ONNX model, with a word on how it was made; imports nothing of ONNX before it is called."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from narrowcast.errors import CheckpointError

# Q and DQ nodes around float operators, or one operator for every integer step.
FORMS = ("qdq", "qoperator")


def is_onnx_module(model: Any) -> bool:
    """Whether `model` is an ONNX graph called like a torch module; loading a checkpoint imports no adapter."""
    adapters = importlib.import_module("narrowcast.models")
    found: bool = adapters.is_onnx_module(model)
    return found


def save_onnx(model: Any, recipe: Any, path: Path, form: str = "qdq") -> None:
    """Write an ONNX model to a file; the recipe goes into its metadata.

    Args:
        model: an `OnnxModule`.
        recipe: what was followed.
        path: ends in .onnx.
        form: "qdq", or "qoperator", whose steps are one operator each.

    Raises:
        CheckpointError: another ending, or the disk refuses.
        FormatError: the form is not known.
    """
    if path.suffix.lower() != ".onnx":
        raise CheckpointError(f"{path}: an ONNX model is saved as one file; give a path that ends in .onnx")
    model.graph.metadata_props["narrowcast.recipe"] = json.dumps(recipe.to_dict())
    if form == "qdq":
        importlib.import_module("narrowcast.models.onnx_file").write_onnx(model.graph, path)
    else:
        importlib.import_module("narrowcast.export.artefact").write_artefact(model, path, form=form)
