from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from narrowcast.errors import DataError
from narrowcast.observers import Drift


def pair(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    exact = torch.randn(600, 9, generator=generator) * torch.logspace(-3, 2, 9)
    return exact, exact * 1.01 + 1e-3 * torch.randn(600, 9, generator=generator)


def test_it_is_the_mean_product_of_difference_and_input() -> None:
    exact, now = pair(1)
    drift = Drift()
    drift.update(exact.view(6, 100, 9), now.view(6, 100, 9))
    expected = (exact.double() - now.double()).t() @ now.double() / 600
    torch.testing.assert_close(drift.result(), expected, rtol=1e-9, atol=1e-12)
    assert torch.equal(drift.result(), drift.result())


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), at=st.lists(st.integers(0, 600), max_size=5).map(sorted))
def test_the_same_bits_for_every_batch_split(seed: int, at: list[int]) -> None:
    exact, now = pair(seed)
    whole, parts = Drift(), Drift()
    whole.update(exact, now)
    for one, other in zip(torch.tensor_split(exact, at), torch.tensor_split(now, at), strict=True):
        parts.update(one, other)
    assert torch.equal(whole.result(), parts.result())


def test_without_a_difference_there_is_no_drift() -> None:
    drift = Drift()
    drift.update(pair(2)[0], pair(2)[0])
    assert not bool(drift.result().any())


def test_what_does_not_fit_is_refused() -> None:
    drift = Drift()
    with pytest.raises(DataError, match=r"shapes \(2, 3\) and \(2, 4\) are not one input"):
        drift.update(torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(DataError, match=r"Drift: batch 0 has inf at \(0, 1\)"):
        drift.update(torch.ones(1, 2), torch.tensor([[1.0, float("inf")]]))
    with pytest.raises(DataError, match="seen no value in 0 batches"):
        drift.result()
    drift.update(torch.ones(2, 3), torch.ones(2, 3))
    with pytest.raises(DataError, match="batch 1 has 5 channels, the batches before had 3"):
        drift.update(torch.ones(2, 5), torch.ones(2, 5))
