"""Each observer against an independent computation of the same thing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from narrowcast.errors import DataError
from narrowcast.observers import ChannelMagnitude, Entropy, MinMax, MovingAverage, Mse, Percentile
from narrowcast.observers.entropy import divergence
from narrowcast.observers.histogram import Bins, Histogram


def normal(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def test_minmax_is_the_smallest_and_the_largest_value() -> None:
    observer = MinMax()
    values = normal(1000)
    observer.update(values)
    assert observer.range() == (float(values.min()), float(values.max()))


def test_moving_average_moves_once_per_sample() -> None:
    observer = MovingAverage(0.75)
    observer.update(torch.tensor([[0.0, 4.0], [-4.0, 8.0]]))
    assert observer.range() == (0.75 * 0.0 + 0.25 * -4.0, 0.75 * 4.0 + 0.25 * 8.0)


@pytest.mark.parametrize("percent", [99.99, 99.0, 75.0])
@pytest.mark.parametrize("kind", ["normal", "relu", "tails", "shifted"])
def test_percentile_is_numpys_within_one_bin(percent: float, kind: str) -> None:
    values = normal(50_000)
    values = {"normal": values, "relu": values.relu(), "tails": values**3, "shifted": values + 9}[kind]
    observer = Percentile(percent)
    observer.update(values)
    low, high = observer.range()
    expected_low, expected_high = np.percentile(values.numpy().astype(np.float64), [100 - percent, percent])
    # one bin, and the distance between two neighbouring values of the sample in the tail
    gaps = np.diff(np.sort(values.numpy().astype(np.float64)))
    bin_width = float(values.abs().max()) / 2048
    assert abs(low - expected_low) <= bin_width + gaps[: max(1, int(len(gaps) * (100 - percent) / 100) + 2)].max()
    assert abs(high - expected_high) <= bin_width + gaps[int(len(gaps) * percent / 100) - 2 :].max()


def test_percentile_hundred_is_the_full_range() -> None:
    observer = Percentile(100)
    values = normal(777)
    observer.update(values)
    assert observer.range() == (float(values.min()), float(values.max()))


def test_percentile_counts_exact_zeros() -> None:
    observer = Percentile(60)
    observer.update(torch.cat([torch.zeros(80), torch.ones(20)]))
    assert observer.range() == (0.0, 0.0)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    exponents=st.lists(st.sampled_from([-149, -130, -20, -1, 0, 1, 7, 90, 127]), min_size=1, max_size=5),
)
def test_histogram_counts_are_those_of_the_final_width(seed: int, exponents: list[int]) -> None:
    histogram, everything = Histogram(), []
    for number, exponent in enumerate(exponents):
        part = torch.ldexp(
            torch.rand(50, generator=torch.Generator().manual_seed(seed + number)) * 1.9 - 0.9, torch.tensor(exponent)
        )
        histogram.add(part)
        everything.append(part)
    values = torch.cat(everything).to(torch.float64)
    bins = histogram.bins()
    width = 2.0 ** max(int(torch.frexp(values.abs().max())[1]) - 13, -126)
    expected = torch.unique(torch.trunc(values[values != 0] / width), return_counts=True)[1]
    assert bins.counts[bins.counts > 0].tolist() == expected.tolist()
    assert int(bins.counts.sum()) + bins.zeros == values.numel()
    assert float(bins.edges[0]) == float(values.min()) or float(values.min()) == 0
    assert float(bins.edges[-1]) == float(values.max()) or float(values.max()) == 0


def test_magnitude_bins_fold_the_negative_side_onto_the_positive() -> None:
    both, folded = Histogram(), Histogram()
    values = normal(5000)
    both.add(values)
    folded.add(values.abs())
    assert torch.equal(both.magnitude_bins().counts, folded.bins().counts)
    assert torch.equal(both.magnitude_bins().edges[1:], folded.bins().edges[1:])


def brute_force_divergence(bins: Bins, first: int, end: int, levels: int) -> float:
    """KL by its definition, one bin at a time."""
    low, high = min(float(bins.edges[first]), 0.0), max(float(bins.edges[end]), 0.0)
    step = (high - low) / (levels - 1)
    inside = bins.counts.numpy()[first:end]
    clipped = inside.copy()
    clipped[0] += bins.counts.numpy()[:first].sum()
    clipped[-1] += bins.counts.numpy()[end:].sum()
    code = np.floor((bins.centers.numpy()[first:end] - low) / step + 0.5).astype(int)
    merged = np.zeros_like(inside)
    for value in np.unique(code):
        members = (code == value) & (clipped > 0)
        if members.any():
            merged[members] = max(inside[code == value].sum(), 1.0) / members.sum()
    p, q = clipped / clipped.sum(), merged / merged.sum()
    used = p > 0
    return float((p[used] * np.log(p[used] / q[used])).sum())


def small_bins(seed: int, count: int, one_sided: bool) -> Bins:
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 6, (count,), generator=generator).to(torch.float64)
    counts[0], counts[-1] = 1.0, 2.0
    # uneven widths, so that no bin lies exactly between two codes
    edges = (torch.rand(count + 1, dtype=torch.float64, generator=generator) + 0.5).cumsum(0)
    return Bins(edges - edges[0 if one_sided else count // 2], counts, 0)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000), count=st.integers(12, 40), one_sided=st.booleans(), levels=st.sampled_from([4, 7, 8])
)
def test_divergence_of_all_ranges_at_once_is_brute_force(seed: int, count: int, one_sided: bool, levels: int) -> None:
    bins = small_bins(seed, count, one_sided)
    zero = 0 if one_sided else count // 2
    pairs = [(a, b) for a in range(zero + 1) for b in range(max(a + 2, zero), count + 1)]
    first, end = (torch.tensor(column) for column in zip(*pairs, strict=True))
    found = divergence(bins, first, end, levels)
    expected = torch.tensor([brute_force_divergence(bins, a, b, levels) for a, b in pairs], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_entropy_of_one_sided_data_is_the_best_of_all_thresholds() -> None:
    values = normal(20_000).relu() ** 3
    observer, histogram = Entropy(bits=4), Histogram()
    observer.update(values)
    histogram.add(values)
    bins = histogram.bins()
    ends = torch.arange(16, bins.counts.numel() + 1)
    divergences = divergence(bins, torch.zeros_like(ends), ends, 16)
    low, high = observer.range()
    assert low == 0.0
    found = int((bins.edges == high).nonzero()[0])
    # the search tries every 16th end and then all around the best: equal up to the roughness of the curve
    assert float(divergences[found - 16]) <= float(divergences.min()) + 1e-3
    assert high < float(values.max())


def test_entropy_clips_far_outliers() -> None:
    values = torch.cat([normal(100_000), torch.tensor([60.0, -40.0])])
    observer = Entropy()
    observer.update(values)
    low, high = observer.range()
    assert -20 < low < -2.5 and 2.5 < high < 20


def test_symmetric_entropy_and_mse_have_symmetric_ranges() -> None:
    values = normal(10_000) + 0.5
    for observer in (Entropy(symmetric=True), Mse(symmetric=True)):
        observer.update(values)
        low, high = observer.range()
        assert low == -high
        assert 2.0 < high <= float(values.abs().max())


def squared_error_of(values: np.ndarray, low: float, high: float, levels: int) -> float:
    scale = (high - low) / (levels - 1)
    zero = np.round(-low / scale)
    quantized = (np.clip(np.round(values / scale) + zero, 0, levels - 1) - zero) * scale
    return float(((values - quantized) ** 2).sum())


@pytest.mark.parametrize("kind", ["normal", "relu", "tails", "relu_tails", "shifted"])
@pytest.mark.parametrize("bits", [4, 8])
def test_mse_is_within_two_percent_of_brute_force_over_both_ends(kind: str, bits: int) -> None:
    values = normal(20_000)
    values = {
        "normal": values,
        "relu": values.relu(),
        "tails": values**3,
        "relu_tails": values.relu() ** 3,
        "shifted": (values + 1).clamp(min=-0.4),
    }[kind]
    observer = Mse(bits=bits)
    observer.update(values)
    exact = values.numpy().astype(np.float64)
    grid = np.linspace(0.02, 1.0, 50)
    lows = [0.0] if exact.min() >= 0 else exact.min() * grid
    brute = min(squared_error_of(exact, low, high, 2**bits) for low in lows for high in exact.max() * grid)
    found = squared_error_of(exact, *observer.range(), 2**bits)
    assert found <= 1.02 * brute
    assert found <= squared_error_of(exact, min(exact.min(), 0.0), exact.max(), 2**bits) * 1.001


def test_channel_magnitude_is_the_mean_square_in_float64() -> None:
    values = torch.randn(6, 5, 4, 3, generator=torch.Generator().manual_seed(2))
    observer = ChannelMagnitude(1)
    observer.update(values)
    expected = values.to(torch.float64).square().mean(dim=(0, 2, 3)).to(torch.float32)
    assert torch.equal(observer.result(), expected)


def test_channel_magnitude_holds_the_whole_range_of_float32() -> None:
    observer = ChannelMagnitude()
    values = torch.tensor([[1e-45, 1.0, 1e18, 0.0], [0.0, 1e-30, -1e18, 0.0]])
    observer.update(values)
    torch.testing.assert_close(observer.result(), torch.tensor([0.0, 0.5, 1e36, 0.0]))


def test_channel_magnitude_refuses_another_number_of_channels() -> None:
    observer = ChannelMagnitude(1)
    observer.update(torch.ones(2, 3, 4))
    with pytest.raises(DataError, match=r"has 4 channels at dimension 1 .* had 3"):
        observer.update(torch.ones(2, 4, 4))


def test_channel_magnitude_refuses_a_missing_dimension_and_empty_data() -> None:
    with pytest.raises(DataError, match="no dimension 1"):
        ChannelMagnitude(1).update(torch.ones(3))
    with pytest.raises(DataError, match="seen no value in 0 batches"):
        ChannelMagnitude().result()
