from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from narrowcast.core import QuantSpec, quantize
from narrowcast.errors import DataError, ModelError, RecipeError
from narrowcast.kernels import reference_search
from narrowcast.methods import Rtn, Seen
from narrowcast.methods.base import relative_importance

SPECS = (
    "int4/group32/asym/scale:k6",
    "int2/group16/asym/scale:k6",
    "int6/group16/scale:k6",
    "int8/channel",
    "int8/channel/asym",
    "uint8/tensor",
    "int4/group32/asym",
    "int4/group32",
    "int4/tensor",
    "uint4/group8/asym",
    "int3/block4x8",
    "int2/group16/asym",
    "int4/group32/asym/scale:int8",
    "int4/group16/scale:int8",
    "int4/group32/scale:e8m0",
    "nf4/group64",
    "mxfp4",
    "fp8_e4m3/channel",
    "fp8_e5m2/tensor",
    "bf16",
)


def random_weight(seed: int, rows: int, columns: int, kind: str = "normal") -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    if kind == "outliers":
        weight = weight**3
    if kind == "positive":
        weight = weight.abs() + 0.5
    if kind == "tiny":
        weight = weight * 1e-6
    if kind == "holes":
        weight[::2, : columns // 2] = 0
    return weight


def squared_error(weight: Tensor, quantized: Tensor, importance: Tensor | None = None) -> float:
    deviation = (weight.to(torch.float64) - quantized.to(torch.float64)).square()
    return float((deviation if importance is None else deviation * importance.to(torch.float64)).sum())


weights = st.builds(
    random_weight,
    st.integers(0, 10_000),
    st.integers(1, 9),
    st.integers(1, 75),
    st.sampled_from(["normal", "outliers", "positive", "tiny", "holes"]),
)


@pytest.mark.parametrize("text", SPECS)
@settings(max_examples=10, deadline=None, derandomize=True)
@given(weight=weights, seed=st.integers(0, 100), weighted=st.booleans())
def test_error_is_never_above_plain_rounding(text: str, weight: Tensor, seed: int, weighted: bool) -> None:
    spec, seen, importance = QuantSpec.parse(text), None, None
    if weighted:
        importance = torch.rand(weight.shape[1], generator=torch.Generator().manual_seed(seed)) ** 4 + 0.05
        seen = Seen(importance=importance)
        importance = relative_importance(seen, weight.shape[1])
    found = Rtn(range="mse").quantize(weight, spec, seen)
    plain = quantize(weight, spec)
    assert squared_error(weight, found.dequantize(), importance) <= (
        squared_error(weight, plain.dequantize(), importance) * (1 + 1e-5) + 1e-30
    )


@pytest.mark.parametrize("text", SPECS)
def test_uniform_importance_gives_the_codes_of_no_importance(text: str) -> None:
    weight, spec = random_weight(1, 6, 70), QuantSpec.parse(text)
    plain = Rtn().quantize(weight, spec)
    uniform = Rtn().quantize(weight, spec, Seen(importance=torch.full((70,), 0.3)))
    assert torch.equal(plain.codes, uniform.codes)
    assert torch.equal(plain.dequantize(), uniform.dequantize())


@pytest.mark.parametrize(("text", "search"), [("int8/channel", False), ("int6/channel", True), ("int4/group32", True)])
def test_automatic_range_keeps_the_full_range_of_eight_bits_without_data(text: str, search: bool) -> None:
    weight, spec = random_weight(15, 16, 64), QuantSpec.parse(text)
    chosen = Rtn(range="mse" if search else "absmax").quantize(weight, spec)
    assert torch.equal(Rtn().quantize(weight, spec).codes, chosen.codes)


@pytest.mark.parametrize("text", SPECS)
@pytest.mark.parametrize("weighted", [False, True])
def test_chunks_do_not_change_the_result(text: str, weighted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, spec = random_weight(2, 11, 70), QuantSpec.parse(text)
    importance = torch.arange(70) + 1.0 if weighted else None
    whole = reference_search.search_weight(weight, spec, importance, 2)
    monkeypatch.setattr(reference_search, "_CHUNK", 1)
    small = reference_search.search_weight(weight, spec, importance, 2)
    for one, other in zip(whole, small, strict=True):
        assert one is other is None or (one is not None and other is not None and torch.equal(one, other))


@pytest.mark.parametrize("text", ["int4/group32/asym", "int4/group32/asym/scale:k6", "codebook3/channel"])
def test_number_of_threads_does_not_change_the_result(text: str) -> None:
    weight, spec, threads = random_weight(3, 64, 2048), QuantSpec.parse(text), torch.get_num_threads()
    seen = Seen(importance=torch.rand(2048, generator=torch.Generator().manual_seed(4)) + 0.1)
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(Rtn().quantize(weight, spec, seen))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0].codes, results[1].codes)
    assert torch.equal(results[0].dequantize(), results[1].dequantize())


@pytest.mark.parametrize("text", SPECS)
@pytest.mark.parametrize(
    "weight",
    [torch.zeros(3, 40), torch.full((1, 1), -0.7), torch.full((1, 1), 3.0), torch.zeros(0, 4), torch.zeros(4, 0)],
    ids=["zeros", "one negative", "one positive", "no rows", "no columns"],
)
def test_degenerate_weights_come_back(text: str, weight: Tensor) -> None:
    spec = QuantSpec.parse(text)
    quantized = Rtn().quantize(weight, spec, Seen(importance=torch.ones(weight.shape[1])))
    assert quantized.shape == weight.shape
    plain = quantize(weight, spec).dequantize()
    assert squared_error(weight, quantized.dequantize()) <= squared_error(weight, plain) + 1e-12
    if not bool(weight.any()):
        assert torch.equal(quantized.dequantize(), weight)
        assert quantized.scale is None or bool((quantized.scale > 0).all())


@pytest.mark.parametrize("text", ["int4/group32/asym", "int4/group32", "int8/channel", "nf4/group64", "mxfp4"])
def test_a_weight_that_is_already_quantized_stays_what_it_is(text: str) -> None:
    weight, spec = random_weight(4, 8, 96), QuantSpec.parse(text)
    once = quantize(weight, spec).dequantize()
    twice = Rtn().quantize(once, spec).dequantize()
    torch.testing.assert_close(twice, once, rtol=2e-6, atol=1e-7)


def test_the_stored_scale_gives_the_stored_codes_again() -> None:
    weight, spec = random_weight(5, 8, 100), QuantSpec.parse("int4/group32/asym")
    found = Rtn().quantize(weight, spec)
    again = quantize(found.dequantize(), spec, found.scale, found.zero_point)
    assert torch.equal(found.codes, again.codes)


def test_scales_are_numbers_of_the_scale_format() -> None:
    weight = random_weight(6, 16, 64)
    half = Rtn().quantize(weight, QuantSpec.parse("int4/group32/asym")).scale
    power = Rtn().quantize(weight, QuantSpec.parse("mxfp4")).scale
    assert half is not None and power is not None
    assert torch.equal(half, half.to(torch.float16).to(torch.float32))
    assert bool((torch.frexp(power)[0] == 0.5).all())


@pytest.mark.parametrize("text", ["int4/group16/asym", "int2/group16/asym", "int3/group16", "nf4/group16"])
def test_search_is_close_to_an_exhaustive_one(text: str) -> None:
    weight, spec = random_weight(7, 12, 16), QuantSpec.parse(text)
    importance = torch.rand(16, generator=torch.Generator().manual_seed(8)) + 0.1
    found = Rtn().quantize(weight, spec, Seen(importance=importance))
    plain = quantize(weight, spec)
    assert plain.scale is not None
    best = torch.full((12,), torch.inf)
    zero_points = [None] if spec.symmetric else list(range(spec.code_low, spec.code_high + 1))
    for ratio in torch.linspace(0.25, 1.4, 240).tolist():
        for zero in zero_points:
            scale = (plain.scale * ratio).to(torch.float16).to(torch.float32)
            zero_point = None if zero is None else torch.full_like(scale, zero, dtype=torch.int32)
            candidate = quantize(weight, spec, scale, zero_point).dequantize()
            best = torch.minimum(best, ((candidate - weight).square() * importance).sum(1))
    error = float(((found.dequantize() - weight).square() * importance).sum())
    assert error <= 1.03 * float(best.sum())


def test_importance_moves_error_away_from_important_inputs() -> None:
    weight, spec = random_weight(9, 64, 256), QuantSpec.parse("int4/group32/asym")
    importance = torch.where(torch.arange(256) % 8 == 0, 50.0, 1.0)
    plain = (Rtn().quantize(weight, spec).dequantize() - weight).square()
    weighted = (Rtn().quantize(weight, spec, Seen(importance=importance)).dequantize() - weight).square()
    assert float(weighted[:, ::8].sum()) < 0.6 * float(plain[:, ::8].sum())


def test_search_takes_a_twelfth_off_the_error_of_plain_rounding_at_four_bits() -> None:
    weight, spec = random_weight(10, 128, 256), QuantSpec.parse("int4/group32/asym")
    plain = squared_error(weight, quantize(weight, spec).dequantize())
    assert squared_error(weight, Rtn().quantize(weight, spec).dequantize()) < 11 / 12 * plain


def test_an_input_that_calibration_never_excited_is_still_represented() -> None:
    weight, spec = random_weight(11, 16, 32), QuantSpec.parse("int4/group32/asym")
    importance = torch.ones(32)
    importance[5] = 0
    weight[:, 5] = 8.0
    quantized = Rtn().quantize(weight, spec, Seen(importance=importance)).dequantize()
    assert bool((quantized[:, 5] > 1.0).all())


def test_absmax_is_plain_rounding() -> None:
    weight, spec = random_weight(12, 5, 50), QuantSpec.parse("int4/group32/asym")
    assert torch.equal(Rtn(range="absmax").quantize(weight, spec).codes, quantize(weight, spec).codes)


def test_the_caller_keeps_its_tensors() -> None:
    weight, importance = random_weight(13, 8, 64), torch.rand(64)
    before = weight.clone(), importance.clone()
    Rtn().quantize(weight, QuantSpec.parse("int4/group32/asym"), Seen(importance=importance))
    assert torch.equal(weight, before[0]) and torch.equal(importance, before[1])


@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_huge_and_tiny_weights_fall_back_to_the_full_range(scale: float) -> None:
    weight, spec = random_weight(14, 4, 64) * scale, QuantSpec.parse("int4/channel/asym")
    found, plain = Rtn().quantize(weight, spec).dequantize(), quantize(weight, spec).dequantize()
    assert squared_error(weight / scale, found / scale) <= squared_error(weight / scale, plain / scale) * (1 + 1e-5)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(2, 3, 4), "got torch.float32 of shape (2, 3, 4)"),
        (torch.ones(2, 3, dtype=torch.int32), "got torch.int32"),
        (torch.tensor([[1.0, 2.0], [3.0, float("nan")]]), "weight element (1, 1) is nan (1 of 4"),
        (torch.tensor([[1.0, float("inf")]]), "weight element (0, 1) is inf"),
    ],
)
def test_a_weight_that_cannot_be_quantized_is_refused(weight: Tensor, message: str) -> None:
    with pytest.raises(ModelError) as error:
        Rtn().quantize(weight, QuantSpec.parse("int8/channel"))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("importance", "message"),
    [
        (torch.ones(4), "shape (4,), expected (3,)"),
        (torch.tensor([1.0, -1.0, 1.0]), "input channel 1 is -1.0"),
        (torch.tensor([1.0, 1.0, float("nan")]), "input channel 2 is nan"),
    ],
)
def test_importance_that_does_not_fit_is_refused(importance: Tensor, message: str) -> None:
    with pytest.raises(DataError) as error:
        Rtn().quantize(torch.ones(2, 3), QuantSpec.parse("int8/channel"), Seen(importance=importance))
    assert message in str(error.value)


@pytest.mark.parametrize("value", [0.0, 0.3])
def test_importance_that_distinguishes_nothing_is_no_importance(value: float) -> None:
    assert relative_importance(Seen(importance=torch.full((5,), value)), 5) is None


@pytest.mark.parametrize(
    "options", [{"range": "max"}, {"refinements": -1}, {"refinements": 1.5}, {"refinements": True}]
)
def test_wrong_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(RecipeError, match=f"rtn: {next(iter(options))}"):
        Rtn(**options)  # type: ignore[arg-type]


def test_tree_sum_is_the_sum() -> None:
    terms = torch.arange(1.0, 8.0).repeat(3, 1).t().contiguous()
    assert reference_search.tree_sum(terms.clone()).tolist() == [28.0, 28.0, 28.0]
