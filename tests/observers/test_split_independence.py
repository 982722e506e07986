"""What every observer promises: the answer depends on the values, not on how they arrive."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from narrowcast.errors import DataError
from narrowcast.observers import OBSERVERS, ChannelMagnitude, make_observer

NAMES = sorted(OBSERVERS)
ORDER_FREE = [name for name in NAMES if name != "moving_average"]


def values_of(seed: int, scale_exponent: int, kind: str, samples: int = 24) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(samples, 3, 7, generator=generator)
    if kind == "relu":
        values = values.relu()
    if kind == "tails":
        values = values**5
    if kind == "negative":
        values = -values.abs() - 1
    return torch.ldexp(values, torch.tensor(scale_exponent))


data = st.builds(
    values_of,
    st.integers(0, 10_000),
    st.sampled_from([-140, -60, -3, 0, 5, 60, 100]),
    st.sampled_from(["normal", "relu", "tails", "negative"]),
)
cuts = st.lists(st.integers(0, 24), max_size=6).map(sorted)


def split_at(values: Tensor, at: list[int]) -> list[Tensor]:
    return list(torch.tensor_split(values, at))


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=12, deadline=None)
@given(values=data, at=cuts)
def test_range_is_the_same_for_every_batch_split(name: str, values: Tensor, at: list[int]) -> None:
    whole, parts = make_observer(name), make_observer(name)
    whole.update(values)
    for part in split_at(values, at):
        parts.update(part)
    assert whole.range() == parts.range()


@pytest.mark.parametrize("name", ORDER_FREE)
@settings(max_examples=12, deadline=None)
@given(values=data, seed=st.integers(0, 100))
def test_range_is_the_same_for_every_order_of_batches(name: str, values: Tensor, seed: int) -> None:
    forward, shuffled = make_observer(name), make_observer(name)
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))
    for index in range(len(values)):
        forward.update(values[index])
        shuffled.update(values[order[index]])
    assert forward.range() == shuffled.range()


@settings(max_examples=40, deadline=None)
@given(values=data, at=cuts, axis=st.sampled_from([1, 2, -1]), seed=st.integers(0, 100))
def test_channel_magnitude_is_the_same_bits_for_every_split_and_order(
    values: Tensor, at: list[int], axis: int, seed: int
) -> None:
    whole, parts = ChannelMagnitude(axis), ChannelMagnitude(axis)
    whole.update(values)
    batches = split_at(values, at)
    order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(seed))
    for index in order.tolist():
        parts.update(batches[index])
    assert torch.equal(whole.result(), parts.result())


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=12, deadline=None)
@given(values=data)
def test_range_is_ordered_and_inside_what_was_seen(name: str, values: Tensor) -> None:
    observer = make_observer(name)
    observer.update(values)
    low, high = observer.range()
    assert low <= high
    seen_low, seen_high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    rounding = 1e-12 * max(-seen_low, seen_high)
    assert seen_low - rounding <= low
    assert high <= seen_high + rounding


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3, 4, 5)])
def test_every_shape_is_accepted(name: str, shape: tuple[int, ...]) -> None:
    observer = make_observer(name)
    observer.update(torch.full(shape, 2.5))
    assert observer.range()[1] == 2.5


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_float_type_counts_as_its_float32_value(name: str, dtype: torch.dtype) -> None:
    values = torch.randn(4, 50, generator=torch.Generator().manual_seed(1)).to(dtype)
    narrow, wide = make_observer(name), make_observer(name)
    narrow.update(values)
    wide.update(values.to(torch.float32))
    assert narrow.range() == wide.range()


@pytest.mark.parametrize("name", NAMES)
def test_all_zero_data_gives_the_empty_range(name: str) -> None:
    observer = make_observer(name)
    observer.update(torch.zeros(3, 4))
    assert observer.range() == (0.0, 0.0)


@pytest.mark.parametrize("name", NAMES)
def test_the_answer_does_not_change_by_asking(name: str) -> None:
    observer = make_observer(name)
    observer.update(torch.randn(100, generator=torch.Generator().manual_seed(3)))
    assert observer.range() == observer.range()


@pytest.mark.parametrize("name", NAMES)
def test_an_observer_that_saw_nothing_says_so(name: str) -> None:
    observer = make_observer(name)
    observer.update(torch.zeros(0, 8))
    with pytest.raises(DataError, match="seen no value in 1 batches"):
        observer.range()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_named_and_changes_nothing(name: str, bad: float) -> None:
    observer = make_observer(name)
    good = torch.randn(2, 6, generator=torch.Generator().manual_seed(4))
    observer.update(good)
    before = observer.range()
    broken = good.clone()
    broken[1, 4] = bad
    with pytest.raises(DataError, match=r"batch 1 has (nan|-?inf) at \(1, 4\) \(1 of 12"):
        observer.update(broken)
    assert observer.range() == before


@pytest.mark.parametrize("name", NAMES)
def test_data_that_is_not_float_is_refused(name: str) -> None:
    with pytest.raises(DataError, match=r"takes float tensors, got torch\.int64"):
        make_observer(name).update(torch.arange(4))
