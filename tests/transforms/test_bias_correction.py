"""Bias correction takes the mean error out, and only what is more than noise."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from narrowcast.transforms import ChannelError


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
