"""The solver of a rule that names none: by bits, by whether inputs multiply the weight, by whether there is data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import narrowcast as nc
from narrowcast.core import QuantSpec
from narrowcast.models import TorchModel
from narrowcast.recipe import Recipe, Rule, default_method

LAYER = TorchModel(nn.Sequential(nn.Linear(64, 8))).layers()[0]


def method_of(text: str, *, multiplied: bool = True, has_data: bool = True) -> str:
    return next(iter(default_method(LAYER, QuantSpec.parse(text), multiplied=multiplied, has_data=has_data)))


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("int8/channel", "rtn"),
        ("int6/channel", "gptq"),
        ("int4/group32/asym", "gptq"),
        ("nf4/group64", "gptq"),
        ("int3/group32/asym", "gptq"),
        ("int2/group32/asym", "autoround"),
        ("codebook2/channel", "gptq"),
        ("fp16", "rtn"),
        ("fp8_e4m3/channel", "rtn"),
    ],
)
def test_the_fewer_bits_the_more_work_the_default_does(text: str, method: str) -> None:
    assert method_of(text) == method


def test_convolutions_and_recurrent_layers_are_compensated_for_at_any_few_bits() -> None:
    for module in (nn.Conv2d(8, 8, 3), nn.ConvTranspose2d(8, 8, 3), nn.Conv1d(8, 8, 3), nn.LSTM(8, 8), nn.GRU(8, 8)):
        for layer in (layer for layer in TorchModel(nn.Sequential(module)).layers() if len(layer.shape) > 1):
            for text, method in (("int2/channel", "gptq"), ("int5/channel", "gptq"), ("int8/channel", "rtn")):
                chosen = default_method(layer, QuantSpec.parse(text), multiplied=True, has_data=True)
                assert next(iter(chosen)) == method


def test_without_data_or_products_the_default_rounds_to_nearest() -> None:
    assert method_of("int4/group32/asym", has_data=False) == method_of("int2/group32", multiplied=False) == "rtn"


def test_a_rule_without_a_method_stays_without_one_when_it_is_written_down() -> None:
    recipe = Recipe.from_dict({"rule": [{"weight": "int4/group32/asym"}]})
    assert "method" not in recipe.to_dict()["rule"][0]
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert Rule.from_dict({"weight": "int4/channel", "method": "rtn"}).method == {"rtn": {}}


def quantized(data: Any, **rule: Any) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    return nc.quantize(model, {"rule": [{"weight": "int4/group32/asym", **rule}]}, data=data, progress=False)


def test_the_plan_says_what_it_would_do_with_and_without_data() -> None:
    plan = nc.plan(nn.Sequential(nn.Linear(64, 8)), "weight-int4")
    assert [next(iter(row.method)) for row in plan.layers if row.weight is not None] == ["gptq"]
    assert any("gptq" in note and "without it they are rounded to nearest" in note for note in plan.notes)


def test_with_data_the_default_solves_and_without_it_rounds() -> None:
    torch.manual_seed(1)
    enough = [torch.randn(128, 64)]
    assert {row.method.split(",")[0] for row in quantized(enough).report.layers if row.spec} == {"gptq"}
    assert {row.method.split(",")[0] for row in quantized(None).report.layers if row.spec} == {"rtn"}


def test_with_fewer_vectors_than_inputs_the_default_rounds_to_nearest_and_says_so() -> None:
    report = quantized([torch.randn(40, 64)]).report
    for row in (row for row in report.layers if row.spec):
        assert (row.outcome, row.method.split(",")[0]) == ("quantized", "rtn")
        assert "40 input vectors for its 64 inputs" in row.reason
    asked = quantized([torch.randn(40, 64)], method="gptq").report
    assert {row.method.split(",")[0] for row in asked.layers if row.spec} == {"gptq"}


class Attention(nn.Module):
    """A part whose output is no plain product of any of its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.query(x) * self.key(x))


def test_at_2_bits_blocks_are_learned_and_a_layer_that_is_all_of_its_block_is_compensated_for() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Attention(), Attention(), nn.Flatten(), nn.Linear(32, 8))
    report = nc.quantize(model, {"rule": [{"weight": "int2/group32/asym"}]}, data=[torch.randn(256, 32)]).report
    used = {row.layer: row.method.split(",")[0] for row in report.layers if row.spec}
    assert used.pop("3") == "gptq"
    assert set(used.values()) == {"autoround"}
