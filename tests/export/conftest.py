"""A quantizer small enough to read: every layer that can be, by plain rounding, without the pipeline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import nn

from narrowcast.core import QuantSpec, quantize
from narrowcast.models.torch_model import TorchModel
from narrowcast.nn import FLOAT, Activation, activation_spec

settings.register_profile("narrowcast", derandomize=True, max_examples=40, deadline=None, database=None)
settings.load_profile("narrowcast")


class Record:
    """Stands for a report or a recipe."""

    def __init__(self, **values: Any) -> None:
        self.values = values

    def to_dict(self) -> dict[str, Any]:
        return self.values


@dataclass
class Quantized:
    model: nn.Module
    report: Record | None
    recipe: Record | None


def quantize_all(
    model: nn.Module, spec: str = "int8/channel", activation: str | None = "int8/token", keep: tuple[str, ...] = ()
) -> Quantized:
    adapter = TorchModel(model.eval())
    parsed = QuantSpec.parse(spec)
    records: dict[str, dict[str, Any]] = {}
    for layer in adapter.layers():
        if layer.reason or layer.name in keep:
            continue
        record = quantize(adapter.weight(layer), parsed)
        for site in layer.sites:
            records.setdefault(site.path, {})[site.parameter] = record
    treatment = FLOAT if activation is None else Activation(activation_spec(activation))
    for path, weights in records.items():
        adapter.install(path, adapter.build(path, weights, treatment))
    adapter.detach_()
    return Quantized(adapter.model, Record(layers=[], sqnr_db=float("inf")), Record(rules=[{"weight": spec}]))


@pytest.fixture(scope="session")
def quantized() -> Callable[..., Quantized]:
    """Model -> what `nc.quantize` would return."""
    return quantize_all


class Small(nn.Module):
    """A kept layer, a buffer of each sort, a plain tensor, and layers to quantize."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.table = nn.Embedding(20, width)
        self.norm = nn.LayerNorm(width)
        self.body = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width, bias=False))
        self.register_buffer("positions", torch.arange(5).expand(1, -1), persistent=False)
        self.register_buffer("shift", torch.randn(width))
        self.gain = torch.full((width,), 1.5)

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        x = self.table(indices) + self.positions[:, : indices.shape[1], None] * 0.1
        return self.body(self.norm(x) * self.gain + self.shift)


@pytest.fixture
def small() -> Callable[..., Small]:
    """The class of a model with one of everything."""
    return Small


@pytest.fixture
def indices() -> torch.Tensor:
    """An input of `Small`."""
    return torch.tensor([[1, 7, 19, 0], [3, 3, 5, 11]])
