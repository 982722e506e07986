"""Equalization, SmoothQuant, AWQ and absorption on tensors: two layers in a row keep their function."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from narrowcast.errors import RecipeError
from narrowcast.transforms import (
    Absorb,
    Awq,
    Equalize,
    SmoothQuant,
    absorbable,
    absorbed_bias,
    at_columns,
    awq_scale,
    column_maximum,
    divide_rows,
    equalizing_scale,
    lowest_scale,
    make_transform,
    multiply_columns,
    smoothing_scale,
    to_channels,
)
from narrowcast.transforms.scaling import LARGEST_SCALE


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(seed=st.integers(0, 1000), hidden=st.integers(1, 20), strength=st.floats(0, 1))
def test_two_layers_with_a_relu_between_keep_their_function_under_every_scale(
    seed: int, hidden: int, strength: float
) -> None:
    first, bias, second, x = randn(hidden, 7, seed=seed), randn(hidden), randn(5, hidden, seed=seed + 1), randn(30, 7)
    first *= torch.logspace(-2, 2, hidden).unsqueeze(1)
    hidden_values = (x @ first.t() + bias).relu()
    expected = hidden_values @ second.t()
    scales = {
        "equalize": equalizing_scale(first.abs().amax(1), column_maximum(second)),
        "smoothquant": smoothing_scale(hidden_values.amax(0), column_maximum(second), strength),
        "awq": awq_scale(hidden_values.mean(0), strength),
    }
    for scale in scales.values():
        rows, moved = divide_rows(first, bias, scale)
        assert moved is not None
        got = (x @ rows.t() + moved).relu() @ multiply_columns(second, scale).t()
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@given(seed=st.integers(0, 1000))
def test_equalized_ranges_are_the_same_on_both_sides(seed: int) -> None:
    first, second = randn(8, 6, seed=seed), randn(4, 8, seed=seed + 1)
    scale = equalizing_scale(first.abs().amax(1), column_maximum(second))
    rows, _ = divide_rows(first, None, scale)
    torch.testing.assert_close(rows.abs().amax(1), column_maximum(multiply_columns(second, scale)))


def test_dead_channels_keep_scale_one_and_no_scale_is_extreme() -> None:
    one = torch.ones(3)
    ranges = torch.tensor([0.0, 1e-30, 1.0])
    for scale in (equalizing_scale(ranges, one), smoothing_scale(ranges, one, 1.0), awq_scale(ranges, 1.0)):
        assert scale[0] == 1
        assert bool((scale <= LARGEST_SCALE).all())
        assert bool((scale >= 1 / LARGEST_SCALE).all())
    assert torch.equal(awq_scale(torch.zeros(3), 0.5), torch.ones(3, dtype=torch.float64))


def test_the_ends_of_smoothquants_strength_flatten_inputs_or_weights() -> None:
    inputs, weights = torch.tensor([4.0, 1.0, 0.5]), torch.tensor([0.1, 2.0, 3.0])
    flat_inputs = inputs / smoothing_scale(inputs, weights, 1.0)
    flat_weights = weights * smoothing_scale(inputs, weights, 0.0)
    torch.testing.assert_close(flat_inputs, torch.ones(3).double())
    torch.testing.assert_close(flat_weights, torch.ones(3).double())


def test_awq_with_ratio_zero_changes_nothing_and_its_extremes_are_reciprocal() -> None:
    magnitude = torch.tensor([0.1, 1.0, 7.0])
    assert torch.equal(awq_scale(magnitude, 0.0), torch.ones(3, dtype=torch.float64))
    scale = awq_scale(magnitude, 0.7)
    assert float(scale.max() * scale.min()) == pytest.approx(1)
    assert bool((scale.diff() > 0).all())


def test_repeated_and_foreign_columns_take_the_scale_of_the_channel_that_they_read() -> None:
    columns = torch.tensor([0, 1, 0, 1, -1])
    assert at_columns(torch.tensor([2.0, 3.0]), columns).tolist() == [2, 3, 2, 3, 1]
    largest = to_channels(torch.tensor([1.0, 5.0, 4.0, 2.0, 9.0]), columns, 3)
    assert largest.tolist() == [4, 5, 0]


@given(groups=st.sampled_from([1, 2, 4]), kernel=st.sampled_from([1, 9]))
def test_columns_of_grouped_convolutions_are_those_of_their_own_group(groups: int, kernel: int) -> None:
    side = 3 if kernel == 9 else 1
    convolution = torch.nn.Conv2d(8, 12, side, groups=groups, bias=False)
    x, scale = randn(2, 8, 5, 5), torch.linspace(0.5, 3, 8).double()
    with torch.no_grad():
        expected = convolution(x)
        matrix = convolution.weight.view(12, -1)
        assert torch.equal(
            column_maximum(matrix, groups, kernel).view(groups, -1),
            convolution.weight.abs().view(groups, 12 // groups, 8 // groups, kernel).amax((1, 3)),
        )
        convolution.weight.copy_(multiply_columns(matrix, scale, groups).view_as(convolution.weight))
        torch.testing.assert_close(convolution(x / scale.float().view(8, 1, 1)), expected, rtol=1e-4, atol=1e-5)


def test_a_ceiling_bounds_the_scale_and_stops_channels_that_come_near_it() -> None:
    largest, ceiling = torch.tensor([1.2, 5.0, 6.0, 100.0]), torch.tensor([6.0, 6.0, 6.0, math.inf])
    lowest, movable = lowest_scale(largest, ceiling, 1.25)
    assert movable.tolist() == [True, False, False, True]
    assert lowest[0] == pytest.approx(0.25)
    assert lowest[3] == 0
    # within the bound the clipped function is the same, up to 1.25 times the largest value
    z, s = torch.linspace(-2, 1.5, 50).double(), lowest[0]
    torch.testing.assert_close((z / s).clamp(0, 6) * s, z.clamp(0, 6))


@given(seed=st.integers(0, 1000), groups=st.sampled_from([1, 3]))
def test_absorbing_a_bias_keeps_the_function_on_what_was_seen(seed: int, groups: int) -> None:
    first, bias, x = randn(6, 4, seed=seed), torch.linspace(-1, 6, 6), randn(50, 4, seed=seed + 1)
    second, second_bias = randn(6, 6 // groups, seed=seed + 2), randn(6)
    z = x @ first.t() + bias
    amount = absorbable(z.amin(0).double(), z.mean(0), z.std(0))
    assert bool((amount >= 0).all())
    assert float(amount[0]) == 0

    def layer(values: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv1d(values.unsqueeze(-1), second.unsqueeze(-1), b, groups=groups).squeeze(-1)

    moved = absorbed_bias(second, second_bias, amount, groups)
    got = layer((z - amount.float()).relu(), moved)
    torch.testing.assert_close(got, layer(z.relu(), second_bias), rtol=1e-4, atol=1e-4)
    without = absorbed_bias(second, None, amount, groups)
    torch.testing.assert_close(without, moved - second_bias, rtol=1e-4, atol=1e-4)


def test_a_channel_that_reaches_zero_or_may_by_its_spread_has_nothing_to_absorb() -> None:
    low, mean, deviation = torch.tensor([-1.0, 2.0, 2.0]), torch.tensor([3.0, 3.0, 3.0]), torch.tensor([0.1, 0.9, 0.5])
    assert absorbable(low, mean, deviation).tolist() == pytest.approx([0, 0.3, 1.5], abs=1e-6)


def test_transforms_are_named_with_their_options() -> None:
    assert make_transform("equalize") == Equalize()
    assert make_transform({"smoothquant": {"strength": 0.8}}) == SmoothQuant(strength=0.8)
    assert make_transform({"awq": {"grid": 5, "pairs": [["*.up", "*.down"]]}}) == Awq(5, (("*.up", "*.down"),))
    assert make_transform({"absorb": {}}) == Absorb()
    assert SmoothQuant("search", 4).strengths() == (0, 0.25, 0.5, 0.75, 1)


@pytest.mark.parametrize(
    ("entry", "word"),
    [
        ("equalise", "equalise"),
        ({"awq": {"steps": 3}}, "grid"),
        ({"awq": {"grid": 0}}, "whole number"),
        ({"awq": 3}, "table"),
        ({"smoothquant": {"strength": 1.5}}, "0 to 1"),
        ({"smoothquant": {"strength": True}}, "0 to 1"),
        ({"smoothquant": {"grid": True}}, "whole number"),
        ({"equalize": {"rounds": 0}}, "rounds"),
        ({"equalize": {"headroom": 0.9}}, "headroom"),
        ({"equalize": {"pairs": ["*.fc1"]}}, "producer, consumer"),
        ({"equalize": {"pairs": "fc1"}}, "producer, consumer"),
        ({"awq": {}, "equalize": {}}, "one name"),
        (3, "one name"),
        ({"rotate": {"kind": "fourier"}}, "hadamard"),
        ({"rotate": {"seed": -1}}, "seed"),
        ({"rotate": {"untie": 1}}, "untie"),
    ],
)
def test_unknown_names_options_and_values_are_recipe_errors(entry: object, word: str) -> None:
    with pytest.raises(RecipeError, match=word):
        make_transform(entry)  # type: ignore[arg-type]
