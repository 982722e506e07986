"""The two models of a comparison: opened from whatever names them, and held in evaluation mode while it lasts."""

from __future__ import annotations

import contextlib
import copy
import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from narrowcast.errors import CheckpointError, ModelError
from narrowcast.evaluate.sources import kind, open_model
from narrowcast.models import is_onnx, is_onnx_module, require_onnx


@dataclass(frozen=True)
class Opened:
    """A model and where it came from; `architecture` is the factory that a fresh process loads a checkpoint into."""

    name: str
    model: nn.Module
    source: str | None
    architecture: str | None = None
    note: str = ""


def open_side(source: Any, reference: Opened | None, *, role: str, called: str = "the reference") -> Opened:
    """The model that `source` is or names.

    Args:
        source: an nn.Module, a Quantized, an ONNX model in memory, or a path or factory as in `evaluate.sources`.
        reference: into a copy of which a checkpoint without an architecture is loaded; None where there is none.
        role: what the model is called in messages.
        called: what `reference` is called there.

    Raises:
        ModelError, CheckpointError: it cannot be opened.
    """
    if isinstance(source, nn.Module):
        return Opened(type(source).__name__, source, None)
    if is_onnx(source) and not isinstance(source, str | Path):
        require_onnx()
        return Opened("an ONNX model", _onnx_module(source), None)
    model = getattr(source, "model", None)
    if isinstance(model, nn.Module):
        return Opened(f"{type(model).__name__}, quantized", model, None)
    if not isinstance(source, str | Path):
        raise ModelError(
            f"the {role} is {type(source).__name__}; pass an nn.Module, what nc.quantize returned, an ONNX model or a "
            "path"
        )
    try:
        return Opened(str(source), open_model(source), str(source))
    except CheckpointError as error:
        if kind(source) != "checkpoint" or "into=" not in str(error):
            raise
        if reference is None or is_onnx_module(reference.model):
            beside = "" if reference is None else f", and neither has {reference.name}"
            raise CheckpointError(
                f"the {role}, {source}, is a checkpoint without an architecture{beside}; give what nc.load(path, "
                "into=...) returned; nc.verify takes the architecture as into=, narrowcast verify as --into"
            ) from error
        copied = open_model(source, copy.deepcopy(reference.model))
        architecture = reference.source if reference.source and kind(reference.source) == "factory" else None
        note = f"the {role}'s checkpoint holds no architecture: it was loaded into a copy of {called}"
        return Opened(str(source), copied, str(source), architecture, note)


def _onnx_module(source: Any) -> nn.Module:
    read = importlib.import_module("narrowcast.models.onnx_file").read_onnx
    made: nn.Module = importlib.import_module("narrowcast.models.onnx_session").OnnxModule(
        read(source), "an ONNX model"
    )
    return made


@contextlib.contextmanager
def evaluating(models: Mapping[str, nn.Module]) -> Iterator[list[str]]:
    """Models in evaluation mode, put back afterwards; yields notes, with one for each that was in training mode.

    Args:
        models: what each is called in notes -> the model.
    """
    training = [module for model in models.values() for module in model.modules() if module.training]
    notes = []
    for name, model in models.items():
        if any(module.training for module in model.modules()) and not isinstance(model, torch.fx.GraphModule):
            notes.append(f"the {name} was in training mode and was compared in eval mode")
    for module in training:
        module.training = False
    try:
        yield notes
    finally:
        for module in training:
            module.training = True
