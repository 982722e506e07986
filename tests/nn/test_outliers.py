"""A linear layer with outlier channels: their part in float, the rest in integers, nothing of one in the other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import narrowcast as nc
from narrowcast.core import QuantSpec, quantize, sqnr_db
from narrowcast.errors import FormatError
from narrowcast.nn import Activation, OutlierLinear, QuantizedLinear, outlier_bits

FORMATS = ["int8/channel", "int4/group32/asym", "int4/channel", "int3/group32/asym", "nf4/group32"]


def layer(
    weight: Tensor, index: list[int], spec: str = "int8/channel", given: str = "int8/token", fused: str = "none"
) -> OutlierLinear:
    outliers = torch.tensor(index)
    record = quantize(weight.index_fill(1, outliers, 0.0), QuantSpec.parse(spec))
    activation = Activation(QuantSpec.parse(given), outliers=outliers)
    return OutlierLinear(
        record.spec, record.shape, activation, record=record, columns=weight[:, outliers],
        bias=torch.linspace(-1, 1, len(weight)), fused=fused,
    )  # fmt: skip


@pytest.mark.parametrize("spec", FORMATS)
@pytest.mark.parametrize("fused", ["none", "gelu"])
def test_the_answer_is_the_integer_part_plus_the_float_part(spec: str, fused: str) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(24, 64), torch.randn(2, 5, 64)
    made = layer(weight, [3, 40], spec, fused=fused)
    rest = x.index_fill(-1, torch.tensor([3, 40]), 0.0)
    plain = QuantizedLinear(made.stored("weight").spec, (24, 64), Activation(QuantSpec.parse("int8/token")),
                            record=made.quantized_weights()["weight"], bias=made.bias)  # fmt: skip
    expected = plain(rest) + x[..., [3, 40]] @ weight[:, [3, 40]].half().float().t()
    for _ in range(3):  # the weight is interleaved on the way
        got = made(x)
        torch.testing.assert_close(got, functional.gelu(expected) if fused == "gelu" else expected)
    assert torch.equal(made.weight[:, [3, 40]], weight[:, [3, 40]].half().float())


@given(size=st.floats(0, 1e4), given=st.sampled_from(["int8/token", "uint8/token"]))
def test_an_outlier_costs_the_other_channels_nothing(size: float, given: str) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(16, 64), torch.randn(20, 64)
    small = layer(weight, [7], given=given)(x.index_fill(1, torch.tensor([7]), 0.0))
    x[:, 7] = size
    exact = size * weight[:, 7].half().float()
    torch.testing.assert_close(layer(weight, [7], given=given)(x), small + exact, rtol=1e-5, atol=1e-5 * (1 + size))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_give_half_precision_outputs(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(16, 64), torch.randn(20, 64)
    made = layer(weight, [7])
    half = made(x.to(dtype))
    assert half.dtype == dtype
    assert sqnr_db(made(x), half.float()) > 35


@pytest.mark.parametrize(("given", "words"), [("uint8/tensor", "found at run time"), ("bf16", "found at run time")])
def test_inputs_with_fixed_ranges_are_refused(given: str, words: str) -> None:
    with pytest.raises(FormatError, match=words):
        layer(torch.randn(4, 8), [1], given=given)


def test_a_weight_beyond_float16_is_refused() -> None:
    weight = torch.ones(4, 8)
    weight[2, 1] = 1e5
    with pytest.raises(FormatError, match="above 65504"):
        layer(weight, [1])


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.act, self.down = nn.LayerNorm(64), nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(self.norm(x))))


def body_with_outliers() -> tuple[Body, Tensor]:
    """A block whose norm makes channel 13 fifty times as large as the others, as trained transformers have them."""
    torch.manual_seed(0)
    model = Body().eval()
    with torch.no_grad():
        model.norm.weight[13] = 50
    return model, torch.randn(64, 64)


def recipe(given: str, weight: str = "int8/channel") -> dict[str, object]:
    return {"name": "tried", "rule": [{"type": "Linear", "weight": weight, "input": given}]}


def test_keeping_the_outlier_recovers_what_it_cost() -> None:
    model, x = body_with_outliers()
    plain = nc.quantize(model, recipe("int8/token"), x, progress=False)
    kept = nc.quantize(model, recipe("int8/token outliers:top(1%)"), x, progress=False)
    rows = {row.layer: row for row in kept.report.layers}
    assert rows["up"].input == "int8/token outliers:top(1%): channels 13 in float16"
    before = {row.layer: row.output_sqnr_db for row in plain.report.layers}
    assert rows["up"].output_sqnr_db > before["up"] + 6
    exact = model(x)
    assert sqnr_db(exact, kept.model(x)) > sqnr_db(exact, plain.model(x)) + 6


def test_plan_and_report_count_the_float_columns_and_name_both_kernels() -> None:
    model, x = body_with_outliers()
    rule = recipe("int8/token outliers:top(3%)", "int4/group32/asym")
    planned = {row.layer.name: row for row in nc.plan(model, rule).layers}["up"]
    result = nc.quantize(model, rule, x, progress=False)
    row = {row.layer: row for row in result.report.layers}["up"]
    plain = {row.layer.name: row for row in nc.plan(model, recipe("int8/token", "int4/group32/asym")).layers}["up"]
    assert planned.bytes_after == row.bytes_after == plain.bytes_after + outlier_bits(96, 2) // 8
    stored = sum(t.numel() * t.element_size() for name, t in result.model.up.state_dict().items() if name != "bias")
    assert row.bytes_after == stored
    assert "linear_lowbit_dynamic" in row.kernel and "2 of 64 inputs in torch mm" in row.kernel
    assert "2 of 64 inputs in torch mm" in planned.kernel


@pytest.mark.parametrize("given", ["int8/token", "uint8/token"])
def test_checkpoints_give_back_the_same_bits(given: str, tmp_path: Path) -> None:
    model, x = body_with_outliers()
    result = nc.quantize(model, recipe(f"{given} outliers:top(2%)"), x, progress=False)
    assert isinstance(result.model.up, OutlierLinear) and result.model.up.fused == "gelu"
    nc.save(result, tmp_path / "out")
    loaded = nc.load(tmp_path / "out", into=Body())
    assert isinstance(loaded.up, OutlierLinear) and loaded.up.config() == result.model.up.config()
    assert torch.equal(loaded(x), result.model(x))
    assert torch.equal(loaded.up.weight, result.model.up.weight)


def test_outliers_without_data_are_an_error_with_a_remedy() -> None:
    with pytest.raises(nc.DataError, match=r"keeps outlier channels of 2 layers .*pass data="):
        nc.quantize(Body().eval(), recipe("int8/token outliers:top(1%)"), progress=False)


def test_a_layer_that_never_ran_falls_back_and_says_so() -> None:
    class Idle(Body):
        def forward(self, x: Tensor) -> Tensor:
            return self.up(self.norm(x))

    rule = recipe("int8/token outliers:top(1%)")
    report = nc.quantize(Idle().eval(), rule, torch.randn(40, 64), progress=False).report
    row = {row.layer: row for row in report.layers}["down"]
    assert row.outcome == "fell back"
    assert "outlier channels are not known" in row.reason


@pytest.mark.parametrize("model", [nn.Sequential(nn.Conv2d(3, 4, 3)), nn.Sequential(nn.LSTM(4, 4))])
def test_other_layers_than_linear_ones_are_refused(model: nn.Module) -> None:
    rule = {"rule": [{"weight": "int8/channel", "input": "int8/token outliers:top(1%)"}]}
    with pytest.raises(nc.RecipeError, match="keeps outlier channels of linear layers"):
        nc.plan(model, rule)
