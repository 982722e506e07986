"""A runtime besides torch is a subclass and a row of the table."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import narrowcast as nc
from narrowcast.parity.runtime import Unit
from narrowcast.parity.torch_runtime import TorchRuntime


class Elsewhere(TorchRuntime):
    """Computes in float64, as a runtime that sums in another order would differ by rounding."""

    def call(self, unit: Unit, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        layer: Any = self.model.get_submodule(unit.name)
        if not isinstance(layer, nn.Linear):
            return super().call(unit, args, kwargs)
        return nn.functional.linear(args[0].double(), layer.weight.double(), layer.bias.double()).float()


class There(nn.Sequential):
    """A model that the other runtime runs."""


def test_another_runtime_is_bounded_by_float_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["narrowcast.parity.verify"]  # the package's own `verify` is the function
    row = (lambda side: isinstance(side.model, There), lambda side, kernels: Elsewhere(side.name, side.model, kernels))
    monkeypatch.setattr(module, "RUNTIMES", (row, *module.RUNTIMES))
    torch.manual_seed(0)
    layers = [nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)]
    data: list[Tensor] = [torch.randn(16, 64)]
    parity = nc.verify(nn.Sequential(*layers).eval(), There(*layers).eval(), data)
    assert parity.ok and not parity.equal
    assert {layer.verdict for layer in parity.layers} == {"within bound", "equal"}
    assert all(layer.bound.startswith("1e-5 of max |y|") for layer in parity.layers)
