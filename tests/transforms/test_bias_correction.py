"""Bias correction takes the mean error out, and only what is more than noise."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from narrowcast.transforms import ChannelError, analytic_correction, clipped_normal_mean


def bias_correction(expected: torch.Tensor, got: torch.Tensor, channel_dim: int) -> torch.Tensor | None:
    return ChannelError.of(expected, got, channel_dim).correction()


def outputs(rows: int, channels: int = 5) -> torch.Tensor:
    return torch.randn(rows, channels, generator=torch.Generator().manual_seed(0))


def test_a_constant_error_is_taken_out_whole() -> None:
    expected = outputs(200)
    shift = torch.tensor([0.5, -1.0, 0.0, 2.0, 1e-3])
    correction = bias_correction(expected, expected - shift, -1)
    torch.testing.assert_close(correction, shift, atol=1e-6, rtol=1e-4)


def test_an_exact_layer_is_not_corrected() -> None:
    expected = outputs(200)
    assert torch.equal(bias_correction(expected, expected, -1), torch.zeros(5))


def test_a_sample_that_is_too_small_says_nothing() -> None:
    expected = outputs(63)
    assert bias_correction(expected, expected - 1, -1) is None
    assert bias_correction(outputs(64), outputs(64) - 1, -1) is not None


def test_channels_may_lie_in_any_dimension() -> None:
    expected = torch.randn(3, 5, 6, 7)
    shift = torch.arange(5.0)
    correction = bias_correction(expected, expected - shift.view(5, 1, 1), -3)
    torch.testing.assert_close(correction, shift, atol=1e-5, rtol=1e-5)


def test_a_mean_that_may_be_chance_is_left_alone() -> None:
    noise = outputs(100, 50)
    correction = bias_correction(torch.zeros(100, 50), noise, -1)
    mean = -noise.mean(0)
    assert bool((correction.abs() <= mean.abs()).all())
    # the mean of 100 draws has the size 0.1: the larger part of most is kept out
    assert float(correction.abs().mean()) < 0.5 * float(mean.abs().mean())


@given(rows=st.integers(64, 300), seed=st.integers(0, 50))
def test_the_squared_error_never_grows(rows: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    expected, got = torch.randn(rows, 4, generator=random), torch.randn(rows, 4, generator=random)
    correction = bias_correction(expected, got, -1)
    before, after = (expected - got).square().sum(), (expected - got - correction).square().sum()
    assert float(after) <= float(before) * (1 + 1e-6)


@pytest.mark.parametrize(("low", "high"), [(0.0, math.inf), (0.0, 6.0), (-math.inf, math.inf), (-1.0, 1.0)])
def test_the_mean_of_a_clipped_gaussian_is_what_sampling_gives(low: float, high: float) -> None:
    mean, deviation = torch.tensor([-3.0, -0.5, 0.0, 2.0, 5.5, 20.0]), torch.tensor([1.0, 2.0, 1.0, 0.5, 3.0, 1.0])
    samples = mean + deviation * torch.randn(200_000, 6, generator=torch.Generator().manual_seed(0))
    expected = samples.clamp(low, high).mean(0).double()
    torch.testing.assert_close(clipped_normal_mean(mean, deviation, low, high), expected, atol=0.03, rtol=0)


def test_a_constant_channel_has_its_own_clipped_value_as_mean() -> None:
    mean = torch.tensor([-1.0, 0.5, 9.0])
    got = clipped_normal_mean(mean, torch.zeros(3), 0.0, 6.0)
    torch.testing.assert_close(got, torch.tensor([0.0, 0.5, 6.0]).double())


@pytest.mark.parametrize("groups", [1, 4])
def test_the_analytic_correction_is_the_error_of_the_mean_input(groups: int) -> None:
    weight, mean = torch.randn(8, 8 // groups * 9), torch.rand(8)
    approximate = weight + 0.1 * torch.randn_like(weight)
    image = mean.view(1, 8, 1, 1).expand(1, 8, 3, 3)

    def layer(matrix: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv2d(image, matrix.view(8, -1, 3, 3), groups=groups).flatten()

    correction = analytic_correction(weight, approximate, mean, groups)
    torch.testing.assert_close(layer(approximate) + correction, layer(weight), atol=1e-5, rtol=1e-4)
