"""InputSample keeps the same vectors however the data is split, and knows the size of every channel."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from narrowcast.errors import DataError
from narrowcast.observers.input_sample import InputSample


def sample_of(parts: list[torch.Tensor], limit: int = 16) -> InputSample:
    sample = InputSample(limit)
    for part in parts:
        sample.update(part)
    return sample


@given(rows=st.integers(1, 300), size=st.integers(1, 60))
def test_the_split_into_batches_does_not_change_what_is_kept(rows: int, size: int) -> None:
    x = torch.randn(rows, 5, generator=torch.Generator().manual_seed(rows))
    whole, split = sample_of([x]), sample_of(list(x.split(size)))
    assert torch.equal(whole.rows(), split.rows())
    assert whole.rows().shape == (min(rows, 16), 5)
    assert whole.positions == split.positions == rows


@given(rows=st.integers(2, 100))
def test_sizes_are_those_of_all_values_and_not_of_the_kept_ones(rows: int) -> None:
    x = torch.randn(rows, 4, generator=torch.Generator().manual_seed(rows))
    sample = sample_of(list(x.split(7)), limit=2)
    assert torch.equal(sample.largest(), x.abs().amax(0))
    assert torch.equal(sample.low(), x.amin(0))
    assert torch.equal(sample.high(), x.amax(0))
    torch.testing.assert_close(sample.magnitude(), x.double().abs().mean(0))
    torch.testing.assert_close(sample.mean_square(), x.double().square().mean(0))
    torch.testing.assert_close(sample.mean(), x.double().mean(0))
    torch.testing.assert_close(sample.deviation(), x.double().std(0, unbiased=False))


def test_kept_vectors_are_spread_over_long_data() -> None:
    positions = torch.arange(4096.0).view(64, 64, 1)
    kept = sample_of([positions], limit=64).rows().flatten().sort().values
    assert float(kept.diff().max()) < 3 * 64
    assert len(set((kept % 64).tolist())) > 20, "no column of an image is preferred"


def test_values_that_are_not_finite_and_other_widths_are_errors() -> None:
    with pytest.raises(DataError, match="not finite"):
        sample_of([torch.tensor([[1.0, float("inf")]])])
    with pytest.raises(DataError, match="3 channels"):
        sample_of([torch.zeros(2, 2), torch.zeros(2, 3)])
    with pytest.raises(DataError, match="no value"):
        InputSample().rows()
    assert sample_of([torch.zeros(0, 3)]).positions == 0
