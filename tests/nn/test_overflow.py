"""No integer sum overflows: the longest that are taken are exact at their worst, longer ones are refused and said."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import narrowcast as nc
from narrowcast.core import QuantizedTensor, QuantSpec
from narrowcast.errors import FormatError
from narrowcast.kernels.reference import LONGEST_SUM
from narrowcast.nn import Activation, ConvShape, QuantizedConv, QuantizedLinear

SPEC = QuantSpec.parse("int8/channel")


def full(rows: int, columns: int) -> QuantizedTensor:
    """Codes as large as they can be, of either sign by row."""
    codes = torch.full((rows, columns), 127, dtype=torch.int8)
    codes[1::2] = -127
    return QuantizedTensor(codes, torch.ones(rows, 1), None, SPEC)


def static(zero_point: int) -> Activation:
    spec = QuantSpec.parse("uint8/tensor")
    return Activation(spec, torch.ones(1), torch.tensor([zero_point], dtype=torch.uint8))


@pytest.mark.parametrize("zero_point", [0, 255])
def test_a_static_linear_layer_of_the_longest_sum_is_exact_at_its_worst(zero_point: int) -> None:
    layer = QuantizedLinear(SPEC, (2, LONGEST_SUM), static(zero_point), record=full(2, LONGEST_SUM))
    largest = 255 - 2 * zero_point  # the input code 255 or 0, zero point taken off
    expected = torch.tensor([1, -1], dtype=torch.int64) * LONGEST_SUM * 127 * (255 if zero_point == 0 else -255)
    for _ in range(3):
        assert layer(torch.full((1, LONGEST_SUM), float(largest))).tolist() == [expected.float().tolist()]


@pytest.mark.parametrize("given", ["int8/token", "uint8/token"])
def test_a_dynamic_linear_layer_of_the_longest_sum_is_exact_at_its_worst(given: str) -> None:
    activation = Activation(QuantSpec.parse(given))
    layer = QuantizedLinear(SPEC, (2, LONGEST_SUM), activation, record=full(2, LONGEST_SUM))
    exact = 127.0 * LONGEST_SUM
    for _ in range(3):
        torch.testing.assert_close(layer(torch.ones(1, LONGEST_SUM)), torch.tensor([[exact, -exact]]))


@pytest.mark.parametrize("zero_point", [0, 255])
def test_a_convolution_of_the_longest_sum_is_exact_at_its_worst(zero_point: int) -> None:
    channels = LONGEST_SUM // 9
    shape = ConvShape.of(nn.Conv2d(channels, 2, 3, bias=False))
    layer = QuantizedConv(SPEC, shape, static(zero_point), record=full(2, channels * 9))
    value = 255.0 if zero_point == 0 else -255.0
    expected = torch.tensor([1, -1], dtype=torch.int64) * channels * 9 * 127 * int(value)
    assert layer(torch.full((1, channels, 3, 3), value)).flatten().tolist() == expected.float().tolist()


def test_a_longer_convolution_is_refused() -> None:
    channels = LONGEST_SUM // 9 + 1
    shape = ConvShape.of(nn.Conv2d(channels, 2, 3, bias=False))
    with pytest.raises(FormatError, match="sums of 65538 products can overflow 32 bits, 65536 cannot"):
        QuantizedConv(SPEC, shape, static(0), record=full(2, channels * 9))


class Wide(nn.Module):
    """One sum that fits, one that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(LONGEST_SUM + 1, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(self.wide(x))


@pytest.mark.parametrize("recipe", ["dynamic-int8", "static-int8"])
def test_a_layer_whose_sums_could_overflow_falls_back_to_float_inputs_and_says_so(recipe: str) -> None:
    torch.manual_seed(0)
    model, x = Wide().eval(), torch.randn(40, LONGEST_SUM + 1)
    planned = {row.layer.name: row for row in nc.plan(model, recipe).layers}
    assert "can overflow 32 bits" in planned["wide"].fallback and not planned["wide"].integer
    assert planned["narrow"].integer and not planned["narrow"].fallback
    result = nc.quantize(model, recipe, x, progress=False)
    row = {row.layer: row for row in result.report.layers}["wide"]
    assert (row.outcome, row.input) == ("fell back", "float") and "can overflow 32 bits" in row.reason
    assert nc.quantize(model, recipe, x, progress=False).report.totals.output_sqnr_db > 25
    with pytest.raises(nc.ContractError, match=r"wide: falls back: a sum of 65537 products can overflow 32 bits"):
        nc.quantize(model, recipe, x, strict=True, progress=False)


@given(exponent=st.integers(-30, 30), recipe=st.sampled_from(["dynamic-int8", "static-int8"]))
def test_a_bias_of_any_size_beside_any_weights_is_added_in_full(exponent: int, recipe: str) -> None:
    torch.manual_seed(0)
    for module, x in ((nn.Linear(32, 4), torch.randn(40, 32)), (nn.Conv2d(3, 4, 3), torch.randn(40, 3, 5, 5))):
        with torch.no_grad():
            module.weight[0] = 0.0
            module.weight[0].view(-1)[0] = 1e-30
            module.bias[0] = 10.0**exponent
        y = nc.quantize(nn.Sequential(module).eval(), recipe, x, progress=False).model(x)
        got = y.transpose(0, 1)[0]
        torch.testing.assert_close(got, torch.full_like(got, 10.0**exponent), rtol=1e-6, atol=1e-28)
