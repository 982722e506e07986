"""The bootstrap's statistics equal SciPy's, and its intervals cover the true value as often as they promise."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from narrowcast.evaluate import interval
from narrowcast.evaluate.interval import bootstrap, expanded_interval, paired, spearman, weighted_mean


@given(st.integers(2, 40), st.integers(0, 10_000), st.booleans())
@settings(max_examples=40, deadline=None)
def test_spearman_of_drawn_samples_equals_scipys(samples: int, seed: int, ties: bool) -> None:
    generator = np.random.default_rng(seed)
    first, second = generator.normal(size=(2, samples))
    if ties:
        first, second = first.round(), second.round()
    counts = np.stack([np.ones(samples), generator.integers(0, 4, samples)]).astype(float)
    counts[1, 0] += 1
    got = spearman(first, second)(counts)
    for row, value in zip(counts.astype(int), got, strict=True):
        a, b = np.repeat(first, row), np.repeat(second, row)
        defined = len(set(a)) > 1 and len(set(b)) > 1
        if defined:
            assert value == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)
        else:
            assert np.isnan(value)


def test_weighted_mean_counts_a_sample_as_often_as_it_was_drawn() -> None:
    statistic = weighted_mean(np.array([2.0, 9.0]), np.array([1.0, 3.0]), np.exp)
    np.testing.assert_allclose(statistic(np.array([[1.0, 1.0], [3.0, 0.0]])), np.exp([11 / 4, 2.0]))


def test_draws_have_the_right_size_and_do_not_depend_on_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[float] = []

    def first(counts: np.ndarray) -> np.ndarray:
        sizes.extend(counts.sum(1))
        return counts[:, 0]

    at_once = bootstrap([first], 7, resamples=50)
    monkeypatch.setattr(interval, "COUNTS_AT_ONCE", 21)
    np.testing.assert_array_equal(bootstrap([first], 7, resamples=50), at_once)
    assert at_once.shape == (1, 50)
    assert set(sizes) == {7.0}


@pytest.mark.parametrize("samples", [20, 300])
def test_interval_of_a_paired_difference_covers_the_truth_in_95_percent(samples: int) -> None:
    generator = np.random.default_rng(1)
    trials, covered, width = 300, 0, 0.0
    for trial in range(trials):
        shared = generator.normal(size=samples)  # what pairing cancels
        reference, candidate = shared, shared + 0.1 + 0.2 * generator.normal(size=samples)
        ones = np.ones(samples)
        drawn = bootstrap(
            [weighted_mean(reference, ones), weighted_mean(candidate, ones)], samples, resamples=400, seed=trial
        )
        low, high = expanded_interval(drawn[1] - drawn[0], samples)
        covered += low <= 0.1 <= high
        width += (high - low) / trials
    # three standard errors of a share of 300 trials are 0.038
    assert 0.95 - 0.045 <= covered / trials <= 0.99
    assert width < 6 * 0.2 / np.sqrt(samples)  # not that of the unpaired spread, which is 7 times wider


def test_paired_gives_difference_and_ratio_with_bounds_around_them() -> None:
    ones = np.ones(100)
    losses = np.linspace(1, 2, 100)
    difference, ratio = paired(weighted_mean(losses, ones, np.exp), weighted_mean(losses + 0.1, ones, np.exp), 100)
    assert ratio.value == pytest.approx(np.exp(0.1))
    assert ratio.low == pytest.approx(ratio.high)  # the ratio is the same for every sample
    assert difference.low is not None
    assert difference.high is not None
    assert difference.low < difference.value < difference.high


def test_one_sample_has_no_interval() -> None:
    one = np.ones(1)
    difference, ratio = paired(weighted_mean(one, one), weighted_mean(2 * one, one), 1)
    assert (difference.value, ratio.value) == (1.0, 2.0)
    assert difference.low is difference.high is ratio.low is None


def test_the_interval_agrees_with_scipys_bootstrap() -> None:
    values = np.random.default_rng(3).exponential(size=200)
    ours = paired(weighted_mean(np.zeros(200), np.ones(200)), weighted_mean(values, np.ones(200)), 200)[0]
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=2000, rng=0).confidence_interval
    assert ours.low == pytest.approx(theirs.low, abs=0.02)
    assert ours.high == pytest.approx(theirs.high, abs=0.02)
