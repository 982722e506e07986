"""Several observers in one pass: what each proposes, and which one is taken."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from narrowcast.core import QuantSpec, choose_scale, quantize
from narrowcast.errors import DataError
from narrowcast.observers import OBSERVERS, Best, make_observer


def tails(seed: int = 0, count: int = 4000) -> Tensor:
    return torch.randn(count // 40, 40, generator=torch.Generator().manual_seed(seed)) ** 3


def best(text: str = "best", *batches: Tensor, bits: int = 8, symmetric: bool = False) -> Best:
    observer = make_observer(text, bits=bits, symmetric=symmetric)
    assert isinstance(observer, Best)
    for batch in batches:
        observer.update(batch)
    return observer


def sqnr_db(values: Tensor, low: float, high: float) -> float:
    """What the codes of a range really lose."""
    spec = QuantSpec.parse("uint8/tensor")
    scale, zero_point = choose_scale(torch.tensor([[low]]), torch.tensor([[high]]), spec)
    error = quantize(values, spec, scale, zero_point).dequantize() - values
    return float(10 * (values.square().sum() / error.square().sum()).log10())


def test_every_candidate_has_the_range_that_it_has_alone() -> None:
    batches = [tails(seed) for seed in range(3)]
    for found in best("best", *batches).candidates():
        alone = make_observer(found.observer)
        for batch in batches:
            alone.update(batch)
        assert (found.low, found.high) == alone.range()


def test_the_stated_error_is_what_the_codes_lose() -> None:
    values = tails()
    for found in best("best", values).candidates():
        assert found.sqnr_db == pytest.approx(sqnr_db(values, found.low, found.high), abs=0.05)


def test_the_least_error_wins_and_no_other_has_less_than_mse() -> None:
    observer = best("best(minmax,percentile(90),mse)", tails())
    first, *others = observer.candidates()
    assert first.observer == "mse" and observer.range() == (first.low, first.high)
    assert all(first.sqnr_db > other.sqnr_db for other in others)
    assert best("best(percentile(90),minmax)", tails()).candidates()[0].observer == "minmax"
    outlier = torch.cat([torch.randn(1, 4000, generator=torch.Generator().manual_seed(1)), torch.full((1, 4000), 0.5)])
    outlier[1, 0] = 12.0
    assert best("best(minmax,percentile(99.9))", outlier, bits=4).candidates()[0].observer == "percentile(99.9)"


def test_of_equals_the_first_named_wins() -> None:
    zeros = torch.zeros(10)
    assert best("best(minmax,mse)", zeros).candidates()[0].observer == "minmax"
    assert best("best(mse,minmax)", zeros).candidates()[0].observer == "mse"
    assert best("best(mse,minmax)", zeros).range() == (0.0, 0.0)


def test_batches_may_be_split_anyhow() -> None:
    values = tails()
    whole, parts = best("best", values), best("best", *values.split(7))
    assert whole.candidates() == parts.candidates()


def test_symmetric_codes_have_symmetric_ranges() -> None:
    for found in best("best", tails().abs(), symmetric=True).candidates():
        assert found.low == -found.high


def test_a_value_that_is_not_finite_changes_no_member() -> None:
    observer = best("best", tails())
    before = observer.candidates()
    with pytest.raises(DataError, match="nan"):
        observer.update(torch.tensor([1e9, float("nan")]))
    assert observer.candidates() == before


def test_nothing_seen_is_an_error() -> None:
    with pytest.raises(DataError, match="has seen no value"):
        best("best").range()


def test_it_says_who_won_and_what_the_others_propose() -> None:
    text = str(best("best", tails()))
    assert text.startswith("by mse ") and all(name in text for name in OBSERVERS)
    assert text.count(" dB") == len(OBSERVERS)
