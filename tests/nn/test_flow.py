"""Flows: what they hold, that they survive JSON, and what they refuse to call."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

from narrowcast.errors import CheckpointError
from narrowcast.models.trace import find_flows
from narrowcast.nn.flow import FUNCTIONS, Flow, resolve_output


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor, scale: float = 2.0) -> Any:
        y = torch.relu(self.first(x))
        z = self.second(y)[:, :, ::2, ::2]
        return z.flatten(1) * scale, y.shape[0]


def flow_of(model: nn.Module) -> Flow:
    flows, _ = find_flows(model, lambda module: isinstance(module, nn.Conv2d))
    return flows[""]


def run(flow: Flow, owner: nn.Module, *args: Any) -> Any:
    results = dict(zip(flow.inputs, args, strict=True))
    for node in flow.nodes:
        if node.kind == "output":
            return resolve_output(node, results)
        if node.kind != "input":
            results[node.name] = node.run(owner, results)
    raise AssertionError


def test_a_flow_computes_what_the_forward_computes_after_a_trip_through_json() -> None:
    model, x = Block().eval(), torch.randn(2, 3, 6, 5)
    flow = Flow.from_json(json.loads(json.dumps(flow_of(model).to_json())))
    got, expected = run(flow, model, x), model(x)
    torch.testing.assert_close(got[0], expected[0], rtol=0, atol=0)
    assert got[1] == expected[1]


BAD: list[tuple[Any, str]] = [
    ({}, "list of nodes"),
    ([["x", "input", "", [], {}]], "ends with its output"),
    ([["x", "input", "", [], {}], ["y", "function", "os.system", [{"ref": "x"}], {}]], "not in the table"),
    ([["x", "input", "", [], {}], ["y", "method", "__reduce__", [{"ref": "x"}], {}]], "not in the table"),
    ([["x", "input", "", [], {}], ["y", "attribute", "grad_fn", [{"ref": "x"}], {}]], "not in the table"),
    ([["x", "eval", "1", [], {}]], "unknown kind"),
    ([["y", "output", "", [{"ref": "x"}], {}]], "does not exist yet"),
    ([["x", "input", "", [], {}], ["x", "output", "", [{"ref": "x"}], {}]], "there twice"),
    ([["x", "input", "", [{"import": "os"}], {}]], "is none"),
    ([["x", "input"]], "is none"),
    ([7], "is none"),
]


@pytest.mark.parametrize(("values", "message"), BAD)
def test_a_malformed_or_hostile_flow_is_refused(values: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Flow.from_json(values)


def test_every_function_of_the_table_is_one_of_torch_or_an_operator() -> None:
    for name, function in FUNCTIONS.items():
        assert callable(function), name
        assert name.split(".")[0] in ("operator", "torch", "functional")


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) if float(x.detach().sum()) > 0 else x


class Overwrites(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        z = torch.relu_(y)
        return self.b(z) + y


class Stars(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, *images: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(images[0]))


def is_convolution(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d)


def test_where_the_whole_is_not_traceable_its_parts_are() -> None:
    flows, refused = find_flows(Branches(), is_convolution)
    assert set(flows) == {"inner"}
    assert set(refused) == {""}


def test_a_tensor_that_is_changed_in_place_and_used_again_has_no_flow() -> None:
    flows, refused = find_flows(Overwrites(), is_convolution)
    assert not flows
    assert "in place" in refused[""]


def test_a_forward_of_any_number_of_arguments_has_no_flow() -> None:
    flows, refused = find_flows(Stars(), is_convolution)
    assert not flows
    assert "*images" in refused[""]
