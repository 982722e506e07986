"""ChannelRange: extremes per channel and whether they are walls."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from narrowcast.errors import DataError
from narrowcast.observers import ChannelRange


@given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.integers(0, 1000))
def test_the_split_into_batches_does_not_change_the_answer(sizes: list[int], seed: int) -> None:
    values = torch.randn(sum(sizes), 3, generator=torch.Generator().manual_seed(seed)).clamp(-0.5, 1.0)
    whole, parts = ChannelRange(), ChannelRange()
    whole.update(values)
    for part in values.split(sizes):
        parts.update(part)
    for ours, theirs in zip((*whole.result(), *whole.walls()), (*parts.result(), *parts.walls()), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(whole.result()[0], values.amin(0)) and torch.equal(whole.result()[1], values.amax(0))


def test_a_bound_that_is_met_many_times_is_a_wall() -> None:
    observer = ChannelRange()
    observer.update(torch.randn(1000, 2, generator=torch.Generator().manual_seed(0)).relu())
    low, high = observer.walls()
    assert low.all() and not high.any()


def test_values_that_are_not_finite_other_widths_and_no_values_are_errors() -> None:
    observer = ChannelRange()
    with pytest.raises(DataError, match="has seen no value"):
        observer.result()
    with pytest.raises(DataError, match="nan"):
        observer.update(torch.tensor([[1.0, float("nan")]]))
    observer.update(torch.ones(2, 3))
    with pytest.raises(DataError, match="4 channels"):
        observer.update(torch.ones(2, 4))
