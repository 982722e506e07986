from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from narrowcast.errors import DataError
from narrowcast.observers import Hessian


def realistic(seed: int, samples: int = 700, channels: int = 11) -> Tensor:
    """Correlated channels of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(samples, channels, generator=generator) @ torch.randn(channels, channels, generator=generator)
    return mixed * torch.logspace(-3, 2, channels)


def seen(*batches: Tensor) -> Hessian:
    hessian = Hessian()
    for batch in batches:
        hessian.update(batch)
    return hessian


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), at=st.lists(st.integers(0, 700), max_size=6).map(sorted))
def test_the_same_bits_for_every_batch_split(seed: int, at: list[int]) -> None:
    data = realistic(seed)
    assert torch.equal(seen(data).result(), seen(*torch.tensor_split(data, at)).result())


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000))
def test_another_order_of_rows_changes_float64_rounding_only(seed: int) -> None:
    data = realistic(seed)
    one, other = seen(data).result(), seen(data.flip(0)).result()
    size = torch.outer(one.diagonal().sqrt(), one.diagonal().sqrt())
    assert float(((one - other).abs() / size).max()) < 1e-13


def test_it_is_the_mean_outer_product_in_float64() -> None:
    data = realistic(1)
    exact = data.double()
    torch.testing.assert_close(seen(data).result(), exact.t() @ exact / 700, rtol=1e-12, atol=0)
    assert torch.equal(seen(data).result(), seen(data).result().t())


def test_leading_dimensions_are_samples() -> None:
    data = realistic(2)
    shaped = seen(data.view(7, 4, 25, 11))
    assert shaped.samples == 700
    assert torch.equal(shaped.result(), seen(data).result())


def test_asking_does_not_change_the_answer() -> None:
    hessian = seen(realistic(3)[:300])
    first = hessian.result()
    assert torch.equal(first, hessian.result())
    hessian.update(realistic(3)[300:])
    assert torch.equal(hessian.result(), seen(realistic(3)).result())


@settings(max_examples=25, deadline=None)
@given(cut=st.integers(0, 700))
def test_an_interrupted_pass_resumes_with_the_same_bits(cut: int) -> None:
    data = realistic(4)
    first = seen(data[:cut])
    second = Hessian()
    second.load_state(first.state())
    first.update(torch.ones(5, 11) if cut else torch.ones(5, 3))  # a state shares nothing with its observer
    second.update(data[cut:])
    assert second.samples == 700
    assert torch.equal(second.result(), seen(data).result())


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"counts": torch.tensor([1, 5])},
        {"counts": torch.tensor([1, 5]), "sums": torch.zeros(3, 3), "waiting": torch.zeros(0, 3)},
        {"counts": torch.tensor([1, 5]), "sums": torch.zeros(3, 4).double(), "waiting": torch.zeros(0, 4)},
        {"counts": torch.tensor([1, 5]), "sums": torch.zeros(3, 3).double(), "waiting": torch.zeros(0, 4)},
    ],
)
def test_what_is_not_a_state_is_refused(state: dict[str, Tensor]) -> None:
    with pytest.raises(DataError, match="is not a saved state"):
        Hessian().load_state(state)


def test_huge_and_tiny_values_neither_overflow_nor_vanish() -> None:
    data = torch.tensor([[3e38, 1e-38]])
    diagonal = seen(data).result().diagonal()
    torch.testing.assert_close(diagonal, data[0].double().square(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_named_and_changes_nothing(bad: float) -> None:
    hessian, broken = seen(realistic(5)), realistic(5)[:2].clone()
    before = hessian.result()
    broken[1, 4] = bad
    with pytest.raises(DataError, match=r"Hessian: batch 1 has (nan|inf) at \(1, 4\) \(1 of 22"):
        hessian.update(broken)
    assert torch.equal(hessian.result(), before) and hessian.samples == 700


def test_another_number_of_channels_is_refused() -> None:
    with pytest.raises(DataError, match="batch 1 has 5 channels, the batches before had 11"):
        seen(realistic(6), torch.ones(2, 5))
    with pytest.raises(DataError, match="without dimensions"):
        seen(torch.tensor(1.0))


def test_an_observer_that_saw_nothing_says_so() -> None:
    with pytest.raises(DataError, match="seen no value in 1 batches"):
        seen(torch.zeros(0, 8)).result()
