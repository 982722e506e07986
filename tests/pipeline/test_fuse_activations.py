"""Linear layers that take in the activation module behind them: the same answers, and only where that is certain."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import narrowcast as nc
from narrowcast.core import sqnr_db
from narrowcast.nn import FusedActivation, QuantizedLinear


class Block(nn.Module):
    """As in a transformer: one activation behind one layer, a gate, and a layer whose output is read twice."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(24, 40), activation, nn.Linear(40, 24)
        self.gate, self.gate_act, self.value = nn.Linear(24, 40), nn.SiLU(), nn.Linear(24, 40)
        self.twice, self.twice_act = nn.Linear(24, 24), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(self.act(self.up(x)))
        x = x + self.down(self.gate_act(self.gate(x)) * self.value(x))
        y = self.twice(x)
        return y + self.twice_act(y)


class Shared(nn.Module):
    """One activation module behind two layers: it cannot be part of both."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.act = nn.Linear(24, 24), nn.Linear(24, 24), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.second(self.act(self.first(x))))


def rows() -> Tensor:
    return torch.randn(9, 24, generator=torch.Generator().manual_seed(1))


def fused_of(model: nn.Module) -> dict[str, str]:
    return {name: m.fused for name, m in model.named_modules() if isinstance(m, QuantizedLinear) and m.fused != "none"}


@pytest.mark.parametrize("data", [True, False])
@pytest.mark.parametrize(
    ("activation", "name"),
    [(nn.GELU(), "gelu"), (nn.GELU(approximate="tanh"), "gelu_tanh"), (nn.ReLU(), "relu"), (nn.SiLU(), "silu")],
)
def test_a_layer_takes_in_the_activation_that_alone_reads_it(activation: nn.Module, name: str, data: bool) -> None:
    torch.manual_seed(0)
    model = Block(activation).eval()
    batches = [rows()] if data else None
    fused = nc.quantize(model, "dynamic-int8", batches, progress=False)
    plain = nc.quantize(
        model, {"rule": [{"weight": "int8/channel", "input": "uint8/token"}], "fuse": False}, batches, progress=False
    )
    assert fused_of(fused.model) == {"up": name, "gate": "silu"}
    assert isinstance(fused.model.act, FusedActivation)
    assert isinstance(fused.model.twice_act, nn.ReLU)
    assert next(row.kernel for row in fused.report.layers if row.layer == "up").endswith(f"with {name}")
    with torch.no_grad():
        assert sqnr_db(plain.model(rows()), fused.model(rows())) > 60


def test_an_activation_of_two_layers_stays() -> None:
    result = nc.quantize(Shared().eval(), "dynamic-int8", [rows()], progress=False)
    assert fused_of(result.model) == {}


def test_a_watched_activation_stays() -> None:
    model = Block(nn.GELU()).eval()
    model.act.register_forward_hook(lambda module, args, output: None)
    result = nc.quantize(model, "dynamic-int8", [rows()], progress=False)
    assert fused_of(result.model) == {"gate": "silu"}


class HalfGelu(nn.GELU):
    """Looks like GELU and is not."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


def test_an_activation_of_a_derived_class_stays() -> None:
    result = nc.quantize(Block(HalfGelu()).eval(), "dynamic-int8", [rows()], progress=False)
    assert fused_of(result.model) == {"gate": "silu"}


def test_a_kept_layer_takes_nothing_in() -> None:
    recipe = {
        "rule": [{"layers": "up", "keep": "as it is"}, {"weight": "int8/channel", "input": "int8/token"}],
    }
    result = nc.quantize(Block(nn.GELU()).eval(), recipe, [rows()], progress=False)
    assert isinstance(result.model.act, nn.GELU)


def test_a_checkpoint_remembers_what_was_taken_in(tmp_path: Path) -> None:
    result = nc.quantize(Block(nn.GELU()).eval(), "dynamic-int4", [rows()], progress=False)
    nc.save(result, tmp_path / "model")
    again = nc.load(tmp_path / "model", into=Block(nn.GELU()))
    assert fused_of(again) == fused_of(result.model)
    with torch.no_grad():
        assert torch.equal(again(rows()), result.model(rows()))
