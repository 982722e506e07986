"""Solving for learned levels: codes and levels under the Hessian, block by block."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from narrowcast.core import QuantSpec, quantize
from narrowcast.methods import Gptq, Rtn, Seen
from narrowcast.methods.learned_draft import LearnedDraft

SPECS = ("codebook4/channel", "codebook2/channel", "codebook3/group16", "codebook2/tensor", "codebook2/block4x16")


def problem(seed: int, rows: int = 9, columns: int = 75) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(300, columns, generator=generator).cumsum(1)
    return torch.randn(rows, columns, generator=generator) ** 3, (inputs.t() @ inputs / 300).double()


def error(weight: Tensor, values: Tensor, hessian: Tensor) -> float:
    deviation = values.double() - weight.double()
    return float(((deviation @ hessian) * deviation).sum())


@pytest.mark.parametrize("text", SPECS)
@settings(max_examples=5, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1000))
def test_refitting_levels_lowers_the_error_and_keeps_values_and_record_together(text: str, seed: int) -> None:
    weight, hessian = problem(seed)
    draft = LearnedDraft.of(quantize(weight, QuantSpec.parse(text)))
    slope = hessian @ (draft.values - weight.t())
    before = error(weight, draft.values.t(), hessian)
    for group in range(draft.groups):
        columns = draft.columns(group)
        change = draft.refit_(group, slope[columns], hessian[columns, columns])
        slope += hessian[:, columns] @ change
        after = error(weight, draft.values.t(), hessian)
        assert after <= before * (1 + 1e-9)
        before = after
    record = draft.record()
    assert record.levels is not None
    assert torch.equal(record.dequantize().t().double(), draft.values)
    assert torch.equal(record.levels.half().float(), record.levels)
    assert bool((record.levels.diff(dim=-1) >= 0).all())


def test_levels_of_one_block_are_the_least_squares_solution() -> None:
    weight, hessian = problem(1, rows=1)
    record = quantize(weight, QuantSpec.parse("codebook2/channel"))
    draft = LearnedDraft.of(record)
    draft.refit_(0, hessian @ (draft.values - weight.t()), hessian)
    chosen = torch.nn.functional.one_hot(record.codes[0].long(), 4).double()  # [in, level]
    best = torch.linalg.solve(chosen.t() @ hessian @ chosen, chosen.t() @ hessian @ weight[0].double())
    assert record.levels is not None
    assert torch.allclose(chosen @ best, draft.values[:, 0], rtol=2**-10, atol=1e-6)


def test_a_level_without_a_code_stays_where_it_is() -> None:
    weight, hessian = problem(2, rows=2, columns=3)
    record = quantize(weight, QuantSpec.parse("codebook4/channel"))
    draft = LearnedDraft.of(record)
    draft.refit_(0, hessian @ (draft.values - weight.t()), hessian)
    assert bool(draft.tables.isfinite().all())
    assert error(weight, draft.values.t(), hessian) <= error(weight, record.dequantize(), hessian)


@pytest.mark.parametrize("text", ["codebook3/channel", "codebook2/group32"])
def test_gptq_on_learned_levels_halves_the_output_error_of_correlated_inputs(text: str) -> None:
    weight, hessian = problem(3, rows=32, columns=96)
    seen, spec = Seen(importance=hessian.diagonal(), hessian=hessian, samples=300), QuantSpec.parse(text)
    found, nearest = (method.quantize(weight, spec, seen).dequantize() for method in (Gptq(), Rtn()))
    assert error(weight, found, hessian) < 0.5 * error(weight, nearest, hessian)


def test_levels_are_learned_under_the_importance_of_calibration_and_not_without_a_search() -> None:
    weight, hessian = problem(4)
    seen, spec = Seen(importance=hessian.diagonal()), QuantSpec.parse("codebook3/channel")
    found = Rtn().quantize(weight, spec, seen).dequantize()
    plain = Rtn(range="absmax").quantize(weight, spec, seen)
    assert plain == quantize(weight, spec)
    weights = hessian.diagonal()
    of_found, of_plain = (float(((values - weight).square() * weights).sum()) for values in (found, plain.dequantize()))
    assert of_found < of_plain
