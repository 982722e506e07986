from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from narrowcast.core import QuantizedTensor, QuantSpec
from narrowcast.errors import DataError, ModelError, RecipeError
from narrowcast.methods import AdaRound, Rtn, Seen, make_method

SPECS = (
    "int4/group32/asym/scale:k6",
    "int2/group16/asym/scale:k6",
    "int6/group16/scale:k6",
    "int8/channel",
    "int4/channel/asym",
    "int4/group32/asym",
    "int3/group32",
    "int2/group16/asym",
    "uint4/group8/asym",
    "int3/block4x8",
    "int4/tensor",
    "int4/group32/asym/scale:int8",
    "int4/group32/scale:e8m0",
    "nf4/group32",
    "mxfp4",
    "fp8_e4m3/channel",
)


def correlated(seed: int, columns: int, samples: int = 200) -> Tensor:
    """Inputs [samples, columns] that share a few directions, so that errors of rounding can make up for each other."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(samples, 4, generator=generator) @ torch.randn(4, columns, generator=generator)
    return common + 0.5 * torch.randn(samples, columns, generator=generator)


def hessian_of(inputs: Tensor) -> Tensor:
    return inputs.t() @ inputs / inputs.shape[0]


def output_errors(weight: Tensor, record: QuantizedTensor, hessian: Tensor) -> Tensor:
    """d H d^T of every row, float64."""
    error = record.dequantize().double() - weight.double()
    return (error @ hessian.double() * error).sum(1)


def weight_of(seed: int, rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("text", SPECS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_row_is_worse_than_round_to_nearest_and_the_whole_is_better(text: str, seed: int) -> None:
    weight, spec = weight_of(seed, 12, 70), QuantSpec.parse(text)
    hessian = hessian_of(correlated(seed, 70))
    seen = Seen(hessian=hessian)
    learned = output_errors(weight, AdaRound(iterations=300).quantize(weight, spec, seen), hessian)
    nearest = output_errors(weight, Rtn().quantize(weight, spec, seen), hessian)
    assert bool((learned <= nearest * (1 + 1e-12)).all())
    assert float(learned.sum()) < 0.9 * float(nearest.sum())


@pytest.mark.parametrize("text", SPECS)
@settings(max_examples=5, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), rows=st.integers(1, 6), columns=st.integers(1, 70))
def test_an_identity_hessian_gives_round_to_nearest_bit_for_bit(text: str, seed: int, rows: int, columns: int) -> None:
    weight, spec = weight_of(seed, rows, columns), QuantSpec.parse(text)
    seen = Seen(hessian=torch.eye(columns))
    assert AdaRound(iterations=50).quantize(weight, spec, seen) == Rtn().quantize(weight, spec, seen)


@pytest.mark.parametrize("text", ["int4/group32/asym", "int3/channel", "nf4/group32"])
def test_a_hessian_that_is_nearly_the_identity_gives_nearly_round_to_nearest(text: str) -> None:
    weight, spec = weight_of(3, 8, 64), QuantSpec.parse(text)
    seen = Seen(hessian=torch.eye(64) + 1e-4)
    learned, nearest = AdaRound().quantize(weight, spec, seen), Rtn().quantize(weight, spec, seen)
    assert float((learned.codes == nearest.codes).float().mean()) > 0.99


@pytest.mark.parametrize("text", SPECS)
def test_every_weight_takes_one_of_its_two_neighbours(text: str) -> None:
    weight, spec = weight_of(4, 6, 70), QuantSpec.parse(text)
    seen = Seen(hessian=hessian_of(correlated(4, 70)))
    learned, nearest = AdaRound(iterations=200).quantize(weight, spec, seen), Rtn().quantize(weight, spec, seen)
    assert learned.scale is not None and nearest.scale is not None and torch.equal(learned.scale, nearest.scale)
    moved = learned.codes.float() != nearest.codes.float()
    assert bool(moved.any())
    value, other = learned.dequantize()[moved], nearest.dequantize()[moved]
    between = (value - weight[moved]) * (other - weight[moved])
    assert bool((between <= 1e-6).all())


def test_the_best_of_all_roundings_is_nearly_found() -> None:
    """Oracle: all 2^10 roundings of a row, tried one by one."""
    spec, hessian = QuantSpec.parse("int3/channel"), hessian_of(correlated(5, 10))
    weight = weight_of(5, 20, 10)
    seen = Seen(hessian=hessian)
    nearest = Rtn().quantize(weight, spec, seen)
    assert nearest.scale is not None
    scaled = (weight / nearest.scale).double()
    corners = torch.tensor(list(itertools.product([0.0, 1.0], repeat=10)), dtype=torch.float64)
    codes = (scaled.floor()[:, None] + corners).clamp(-3, 3)
    error = (codes - scaled[:, None]) * nearest.scale.double()[:, None]
    best = ((error @ hessian.double()) * error).sum(-1).amin(1)
    found = output_errors(weight, AdaRound().quantize(weight, spec, seen), hessian)
    plain = output_errors(weight, nearest, hessian)
    assert float(found.sum() - best.sum()) < 0.3 * float(plain.sum() - best.sum())


def test_inputs_give_what_their_hessian_gives() -> None:
    weight, inputs, spec = weight_of(6, 8, 40), correlated(6, 40), QuantSpec.parse("int4/group16/asym")
    by_inputs = AdaRound(iterations=100).solve(weight, spec, Seen(inputs=inputs))
    exact = (inputs.double().t() @ inputs.double() / inputs.shape[0]).float()
    assert by_inputs.record == AdaRound(iterations=100).solve(weight, spec, Seen(hessian=exact)).record


@pytest.mark.parametrize("factor", [1e-30, 1e-6, 1e6, 1e30])
def test_the_unit_of_the_inputs_does_not_matter(factor: float) -> None:
    weight, spec = weight_of(7, 8, 40), QuantSpec.parse("int4/group16/asym")
    hessian = hessian_of(correlated(7, 40))
    plain = AdaRound(iterations=100).quantize(weight, spec, Seen(hessian=hessian))
    scaled = AdaRound(iterations=100).quantize(weight, spec, Seen(hessian=hessian.double() * factor))
    assert float((plain.codes == scaled.codes).float().mean()) > 0.99


def test_a_singular_hessian_and_dead_channels_are_no_trouble() -> None:
    inputs = correlated(8, 40, samples=5)
    inputs[:, 7] = 0
    weight, hessian = weight_of(8, 8, 40), hessian_of(inputs)
    spec = QuantSpec.parse("int4/group16/asym")
    record = AdaRound(iterations=200).quantize(weight, spec, Seen(hessian=hessian))
    nearest = Rtn().quantize(weight, spec, Seen(hessian=hessian))
    assert bool((output_errors(weight, record, hessian) <= output_errors(weight, nearest, hessian) + 1e-12).all())
    assert torch.equal(record.codes[:, 7], nearest.codes[:, 7])


@pytest.mark.parametrize("hessian", [torch.zeros(40, 40), torch.ones(40, 40) * 1e-40])
def test_inputs_of_nothing_give_round_to_nearest(hessian: Tensor) -> None:
    weight, spec = weight_of(9, 4, 40), QuantSpec.parse("int4/group16/asym")
    solved = AdaRound(iterations=20).solve(weight, spec, Seen(hessian=hessian))
    assert solved.notes
    assert solved.record.shape == (4, 40)


def test_number_of_threads_does_not_change_the_result() -> None:
    weight, spec, threads = weight_of(10, 64, 256), QuantSpec.parse("int4/group32/asym"), torch.get_num_threads()
    seen, records = Seen(hessian=hessian_of(correlated(10, 256))), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            records.append(AdaRound(iterations=50).quantize(weight, spec, seen))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert records[0] == records[1]


def test_rows_that_learning_does_not_improve_are_said() -> None:
    weight, spec = weight_of(11, 8, 32), QuantSpec.parse("int8/channel")
    weight[:3] = 0
    solved = AdaRound(iterations=100).solve(weight, spec, Seen(hessian=hessian_of(correlated(11, 32))))
    assert any("of 8 rows keep round-to-nearest" in note for note in solved.notes)


@pytest.mark.parametrize("text", ["bf16", "fp16"])
def test_a_cast_is_rounded_to_nearest_and_says_so(text: str) -> None:
    weight, spec = weight_of(12, 4, 8), QuantSpec.parse(text)
    solved = AdaRound().solve(weight, spec, Seen(hessian=hessian_of(correlated(12, 8))))
    assert solved.record == Rtn().quantize(weight, spec) and "cast" in solved.notes[0]


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (1, 1)])
def test_degenerate_weights_come_back(shape: tuple[int, int]) -> None:
    record = AdaRound(iterations=5).quantize(
        torch.zeros(shape), QuantSpec.parse("int4/group32/asym"), Seen(hessian=torch.eye(shape[1]))
    )
    assert record.shape == shape


def test_the_caller_keeps_its_tensors() -> None:
    weight, hessian = weight_of(13, 8, 40), hessian_of(correlated(13, 40))
    before = weight.clone(), hessian.clone()
    AdaRound(iterations=20).quantize(weight, QuantSpec.parse("int4/group16/asym"), Seen(hessian=hessian))
    assert torch.equal(weight, before[0]) and torch.equal(hessian, before[1])


@pytest.mark.parametrize(
    ("seen", "message"),
    [
        (None, "give calibration data"),
        (Seen(importance=torch.ones(3)), "give calibration data"),
        (Seen(inputs=torch.ones(0, 3)), "give calibration data"),
        (Seen(hessian=torch.eye(4)), "shape (4, 4), expected (3, 3)"),
        (Seen(hessian=torch.diag(torch.tensor([1.0, float("inf"), 1.0]))), "input channel 1 is not finite"),
    ],
)
def test_data_that_does_not_fit_is_refused(seen: Seen | None, message: str) -> None:
    with pytest.raises(DataError) as error:
        AdaRound().solve(torch.ones(2, 3), QuantSpec.parse("int4/channel"), seen)
    assert message in str(error.value)


def test_a_weight_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ModelError, match="is nan"):
        AdaRound().solve(torch.full((1, 2), torch.nan), QuantSpec.parse("int4/channel"), Seen(hessian=torch.eye(2)))


@pytest.mark.parametrize("options", [{"iterations": 0}, {"iterations": 1.5}, {"strength": -1.0}, {"strength": True}])
def test_wrong_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(RecipeError, match=f"adaround: {next(iter(options))}"):
        make_method({"adaround": options})
