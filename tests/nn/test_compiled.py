"""Quantized modules under torch.compile and torch.export: one graph, the same answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.nn.oracles import close, noise
from torch import Tensor, nn

import narrowcast as nc

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


class Convolutions(nn.Module):
    """Plain, depthwise and transposed, then a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, stride=2)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.depthwise(self.first(x).relu()).relu())
        return self.head(x.mean((2, 3)))


def linears() -> nn.Module:
    return nn.Sequential(nn.Linear(40, 24), nn.GELU(), nn.Linear(24, 7, bias=False))


class Tokens(nn.Module):
    """A table, attention and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(30, 32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.head = nn.Linear(32, 30)

    def forward(self, indices: Tensor) -> Tensor:
        x = self.table(indices)
        return self.head(x + self.attention(x, x, x, need_weights=False)[0])


CASES: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "linear": (linears, noise(40, 40)),
    "convolution": (Convolutions, noise(40, 3, 8, 8)),
    "tokens": (Tokens, torch.arange(60).view(6, 10) % 30),
}
RECIPES = ("weight-int4", "dynamic-int4", "static-int8")


def quantized(case: str, recipe: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, x = CASES[case]
    return nc.quantize(make().eval(), recipe, [x], progress=False).model, x


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("case", CASES)
def test_a_quantized_model_compiles_as_one_graph(case: str, recipe: str) -> None:
    model, x = quantized(case, recipe)
    torch._dynamo.reset()
    graphs: list[Any] = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=count, fullgraph=True)
    with torch.no_grad():
        close(compiled(x), model(x))
    assert len(graphs) == 1


@pytest.mark.parametrize("case", CASES)
def test_a_quantized_model_goes_through_aot_autograd(case: str) -> None:
    model, x = quantized(case, "static-int8")
    torch._dynamo.reset()
    with torch.no_grad():
        close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), model(x))


@pytest.mark.parametrize("recipe", ["dynamic-int8", "static-int8"])
@pytest.mark.parametrize("case", CASES)
def test_a_quantized_model_exports_with_its_ops(case: str, recipe: str) -> None:
    model, x = quantized(case, recipe)
    program = torch.export.export(model, (x,))
    with torch.no_grad():
        close(program.module()(x), model(x))
    ops = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any(op.startswith("narrowcast.") for op in ops)


def test_an_exported_program_takes_other_batch_sizes() -> None:
    model, x = quantized("linear", "dynamic-int8")
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=512)},))
    with torch.no_grad():
        close(program.module()(x[:7]), model(x[:7]))
