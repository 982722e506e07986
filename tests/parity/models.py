"""Pairs of artefacts of one model, and faults to be found in them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from tests.pipeline.models import example
from torch import Tensor, nn

import narrowcast as nc
from narrowcast.nn import QuantizedConv


def quantized(name: str, preset: str, **more: Any) -> tuple[nn.Module, nn.Module, list[Tensor]]:
    """A float model, the quantized one, and the data in two batches."""
    model, x = example(name)
    recipe: Any = preset if not more else {"name": preset, **more}
    return model, nc.quantize(model, recipe, x.split(24), progress=False).model, list(x.split(24))


def with_other_scale(model: nn.Module, path: str, factor: float = 1.25) -> nn.Module:
    """A copy whose layer at `path` has another scale in its first row."""
    made = copy.deepcopy(model)
    layer: Any = made.get_submodule(path)
    layer.restore_layout_()
    layer.weight_scale[0] *= factor
    if isinstance(layer, QuantizedConv):  # it derives what its kernel reads once
        layer.kernel_scale[0] *= factor
    layer.prepare_()
    return made


def with_other_weight(model: nn.Module, path: str) -> nn.Module:
    """A copy whose float layer at `path` has another first weight."""
    made = copy.deepcopy(model)
    with torch.no_grad():
        made.get_submodule(path).weight.view(-1)[0] += 0.5
    return made
