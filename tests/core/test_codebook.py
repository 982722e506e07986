"""Learned levels: the best there are, in a form that is the same whenever it is found again."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from narrowcast.core import QuantizedTensor, QuantSpec, nearest_levels, quantize, quantize_learned
from narrowcast.errors import FormatError

SPECS = ("codebook4/channel", "codebook3/channel", "codebook2/channel", "codebook2/group16", "codebook3/tensor")


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    """Matrices of any magnitude that float16 holds, with zeros, equal values and heavy tails."""
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 90))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    values = torch.randn(rows, columns, generator=generator) ** draw(st.sampled_from([1, 3, 5]))
    values *= 10.0 ** draw(st.integers(-6, 0))
    if draw(st.booleans()):
        values = (values / values.abs().max() * 4).round()
    if draw(st.booleans()):
        values[0] = 0
    return values.clamp(-65000, 65000)


def squared_error(values: Tensor, record: QuantizedTensor, importance: Tensor | float = 1.0) -> Tensor:
    return ((record.dequantize().double() - values.double()).square() * importance).sum(1)


def best_by_trying_all(values: Tensor, weights: Tensor, count: int) -> float:
    """The least weighted squared error of any split of the sorted values into `count` runs."""
    order = values.argsort()
    x, h = values[order].double().numpy(), weights[order].double().numpy()

    def cost(start: int, stop: int) -> float:
        mean = np.average(x[start:stop], weights=h[start:stop])
        return float((h[start:stop] * (x[start:stop] - mean) ** 2).sum())

    splits = combinations(range(1, len(x)), count - 1)
    return min(sum(cost(a, b) for a, b in zip((0, *cuts), (*cuts, len(x)), strict=True)) for cuts in splits)


@given(st.sampled_from(SPECS), matrices())
def test_quantizing_what_was_dequantized_gives_the_same_record(text: str, values: Tensor) -> None:
    first = quantize(values, QuantSpec.parse(text))
    assert quantize(first.dequantize(), first.spec) == first


@given(st.sampled_from(SPECS), matrices())
def test_levels_are_ascending_float16_numbers_and_each_is_used_or_repeats_the_last(text: str, values: Tensor) -> None:
    record = quantize(values, QuantSpec.parse(text))
    levels = record.levels
    assert levels is not None
    assert torch.equal(levels.half().float(), levels)
    assert bool((levels.diff(dim=-1) >= 0).all())
    if text.endswith("channel"):
        for row, table in zip(record.codes, levels[:, 0], strict=True):
            used = row.unique()
            assert torch.equal(used, torch.arange(len(used), dtype=torch.uint8))
            assert bool((table[len(used) - 1 :] == table[len(used) - 1]).all())


@given(st.integers(0, 1000), st.integers(4, 12), st.booleans())
def test_the_levels_of_a_short_row_are_the_best_of_all(seed: int, columns: int, weighted: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(1, columns, generator=generator) ** 3
    weights = torch.rand(columns, generator=generator) + 0.01 if weighted else torch.ones(columns)
    record = quantize_learned(values, QuantSpec.parse("codebook2"), weights)
    best = best_by_trying_all(values[0], weights, 4)
    rounding = float((weights * (values[0] * 2.0**-11).square()).sum())  # of the levels, to float16
    assert float(squared_error(values, record, weights)) <= best + 1e-4 * best + 2 * rounding + 1e-7 * rounding**0.5


@pytest.mark.parametrize(("bits", "columns"), [(4, 172), (3, 172), (4, 1000), (2, 1000)])
def test_k_means_of_scikit_learn_finds_no_better_levels(bits: int, columns: int) -> None:
    cluster = pytest.importorskip(
        "sklearn.cluster", reason="scikit-learn is not installed; it is the oracle of k-means"
    )
    generator = torch.Generator().manual_seed(bits)
    values, weights = torch.randn(1, columns, generator=generator) ** 3, torch.rand(columns, generator=generator) + 0.01
    record = quantize_learned(values, QuantSpec.parse(f"codebook{bits}"), weights)
    made = cluster.KMeans(2**bits, n_init=3, random_state=0)
    inertia = made.fit(values.double().numpy().T, sample_weight=weights.double().numpy()).inertia_
    assert float(squared_error(values, record, weights)) <= inertia * 1.002


@given(st.integers(0, 1000), st.sampled_from([2, 3, 4]), st.sampled_from([1, 3]), st.sampled_from([60, 172, 300]))
def test_no_row_is_worse_than_on_equal_steps(seed: int, bits: int, power: int, columns: int) -> None:
    values = torch.randn(5, columns, generator=torch.Generator().manual_seed(seed)) ** power
    learned = squared_error(values, quantize(values, QuantSpec.parse(f"codebook{bits}")))
    for grid in (f"int{bits}/channel", f"int{bits}/channel/asym"):
        assert bool((learned <= squared_error(values, quantize(values, QuantSpec.parse(grid)))).all())


def test_importance_moves_the_levels_to_the_columns_that_count() -> None:
    torch.manual_seed(0)
    values, importance = torch.randn(8, 64), torch.ones(64)
    importance[:8] = 1000
    spec = QuantSpec.parse("codebook2")
    plain, weighted = quantize(values, spec), quantize_learned(values, spec, importance)
    assert float(squared_error(values, weighted, importance).sum()) < 0.5 * float(
        squared_error(values, plain, importance).sum()
    )


def test_the_last_group_of_a_row_may_be_shorter_and_its_filling_counts_nothing() -> None:
    torch.manual_seed(0)
    values = torch.randn(3, 32 + 12) + 5  # far from the zeros that fill a block up
    spec = QuantSpec.parse("codebook2/group32")
    parts = [quantize(part, spec).dequantize() for part in values.split(32, dim=1)]
    assert torch.equal(quantize(values, spec).dequantize(), torch.cat(parts, 1))


def test_rows_do_not_depend_on_the_rows_beside_them() -> None:
    torch.manual_seed(0)
    values, spec = torch.randn(600, 64), QuantSpec.parse("codebook3")
    whole = quantize(values, spec)
    assert torch.equal(whole.codes[77:78], quantize(values[77:78], spec).codes)


def test_zero_is_exact_in_a_row_of_zeros_and_where_it_is_a_cluster_of_its_own() -> None:
    values = torch.randn(2, 128, generator=torch.Generator().manual_seed(0)).sign() * 3
    values[0] = 0
    values[1, ::2] = 0
    assert torch.equal(quantize(values, QuantSpec.parse("codebook2")).dequantize(), values)


def test_a_tie_goes_to_the_lower_level_and_equal_levels_to_the_first() -> None:
    levels = torch.tensor([[-1.0, 1.0, 3.0, 3.0]])
    codes = nearest_levels(torch.tensor([[0.0, 2.0, 2.1, 3.0, 9.0, -9.0]]), levels)
    assert codes.tolist() == [[0, 1, 2, 2, 2, 0]]


def test_a_value_beyond_float16_is_an_error_with_the_remedy() -> None:
    with pytest.raises(FormatError, match=r"element \(0, 1\) is 70000, beyond the largest codebook4 number 65504"):
        quantize(torch.tensor([[1.0, 70000.0]]), QuantSpec.parse("codebook4"))
