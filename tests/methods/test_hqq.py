from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from narrowcast.core import QuantizedTensor, QuantSpec, quantize, to_blocks
from narrowcast.errors import ModelError, RecipeError
from narrowcast.methods import Hqq, make_method

SPECS = (
    "int4/group32/asym/scale:k6",
    "int2/group16/asym/scale:k6",
    "int3/group16/scale:k6",
    "int8/channel",
    "uint8/tensor",
    "int4/channel/asym",
    "int4/group32/asym",
    "int4/group32",
    "int3/block4x8",
    "int2/group16/asym",
    "int4/group32/asym/scale:int8",
    "int4/group32/scale:e8m0",
    "nf4/group64",
    "mxfp4",
    "fp8_e4m3/channel",
)
specs = pytest.mark.parametrize("text", SPECS)


def random_weight(seed: int, rows: int = 9, columns: int = 75) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) ** 3


def block_errors(weight: Tensor, record: QuantizedTensor, norm: float) -> Tensor:
    errors = to_blocks((record.dequantize() - weight).abs().pow(norm), record.spec.granularity).sum(-1)
    return errors.sum(1) if record.spec.scale_format in ("int8", "k6") else errors


@specs
@settings(max_examples=10, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1000), norm=st.sampled_from([0.5, 0.7, 1.0, 1.3, 2.0]))
def test_no_block_is_worse_than_under_its_full_range_and_the_sum_is_better(text: str, seed: int, norm: float) -> None:
    weight, spec = random_weight(seed), QuantSpec.parse(text)
    found = block_errors(weight, Hqq(norm=norm).quantize(weight, spec), norm)
    plain = block_errors(weight, quantize(weight, spec), norm)
    assert bool((found <= plain * (1 + 1e-5)).all())
    if spec.format.bits < 8 and spec.scale_format != "e8m0":  # the full range of 8 bits, or a power of two, may be best
        assert float(found.sum()) < float(plain.sum())


@specs
def test_codes_are_the_nearest_under_scales_that_can_be_stored(text: str) -> None:
    weight, spec = random_weight(1), QuantSpec.parse(text)
    found = Hqq().quantize(weight, spec)
    assert found == quantize(weight, spec, found.scale, found.zero_point)


def test_a_smaller_norm_forgives_the_largest_errors_more() -> None:
    weight, spec = random_weight(2, 64, 256), QuantSpec.parse("int3/group32/asym")
    sparse, smooth = ((Hqq(norm=norm).quantize(weight, spec).dequantize() - weight).abs() for norm in (0.7, 2.0))
    assert float(sparse.max()) > float(smooth.max())
    assert float(sparse.median()) < float(smooth.median())


def test_zero_points_move_away_from_those_of_the_full_range() -> None:
    weight, spec = random_weight(3, 64, 256), QuantSpec.parse("int4/group32/asym")
    found, plain = Hqq().quantize(weight, spec).zero_point, quantize(weight, spec).zero_point
    assert found is not None and plain is not None
    assert bool((found != plain).any())


def test_what_fills_a_ragged_block_does_not_count() -> None:
    spec, weight = QuantSpec.parse("int4/group32/asym"), random_weight(4, 8, 50)
    ragged = Hqq().quantize(weight, spec)
    alone = Hqq().quantize(weight[:, 32:], QuantSpec.parse("int4/group18/asym"))
    assert torch.equal(ragged.codes[:, 32:], alone.codes)


def test_no_iterations_is_the_full_range() -> None:
    weight, spec = random_weight(5), QuantSpec.parse("int4/group32/asym")
    assert Hqq(iterations=0).quantize(weight, spec) == quantize(weight, spec)


def test_number_of_threads_does_not_change_the_result() -> None:
    weight, spec, threads = random_weight(6, 64, 1024), QuantSpec.parse("int3/group32/asym"), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(Hqq(iterations=4).quantize(weight, spec))
    finally:
        torch.set_num_threads(threads)
    assert results[0] == results[1]


@specs
@pytest.mark.parametrize(
    "weight",
    [torch.zeros(3, 40), torch.full((1, 1), -0.7), torch.zeros(0, 4), torch.zeros(4, 0)],
    ids=["zeros", "one", "no rows", "no columns"],
)
def test_degenerate_weights_come_back(text: str, weight: Tensor) -> None:
    spec = QuantSpec.parse(text)
    found = Hqq().solve(weight, spec)
    assert found.record.shape == weight.shape
    assert bool(found.notes) == (weight.numel() == 0)
    error = (found.record.dequantize() - weight).abs().sum()
    assert float(error) <= float((quantize(weight, spec).dequantize() - weight).abs().sum()) + 1e-6


@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_the_size_of_the_weights_does_not_matter(scale: float) -> None:
    weight, spec = random_weight(7), QuantSpec.parse("int4/channel/asym")
    assert torch.isfinite(Hqq().quantize(weight * scale, spec).dequantize()).all()
    doubled = Hqq().quantize(weight * 2.0**20, spec)
    assert torch.equal(doubled.codes, Hqq().quantize(weight, spec).codes)


def test_a_format_without_scales_is_rounded_to_nearest_and_said() -> None:
    found = Hqq().solve(random_weight(8), QuantSpec.parse("bf16"))
    assert found.notes == ("bf16 has no scales: rounded to nearest",)
    assert found.record == quantize(random_weight(8), QuantSpec.parse("bf16"))


def test_a_weight_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ModelError, match=r"weight element \(0, 1\) is nan"):
        Hqq().solve(torch.tensor([[1.0, float("nan")]]), QuantSpec.parse("int8/channel"))


@pytest.mark.parametrize(
    "options", [{"norm": 0}, {"norm": 2.5}, {"norm": True}, {"beta": -1}, {"growth": "x"}, {"iterations": 1.5}]
)
def test_wrong_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(RecipeError, match=f"^hqq: {next(iter(options))} is"):
        Hqq(**options)  # type: ignore[arg-type]


def test_a_recipe_names_it_and_it_needs_no_data() -> None:
    assert make_method({"hqq": {"norm": 0.7}}) == Hqq(norm=0.7)
    assert Hqq.needs == frozenset()
