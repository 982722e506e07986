from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from narrowcast.core import QuantizedTensor, QuantSpec, quantize
from narrowcast.errors import DataError, ModelError, RecipeError
from narrowcast.methods import Gptq, Rtn, Seen, make_method
from narrowcast.observers import Hessian

SPECS = (
    "int4/group32/asym/scale:k6",
    "int2/group16/asym/scale:k6",
    "int6/group16/scale:k6",
    "codebook4/channel",
    "codebook2/group16",
    "int8/channel",
    "int8/channel/asym",
    "uint8/tensor",
    "int4/channel/asym",
    "int4/group32/asym",
    "int4/group32",
    "uint4/group8/asym",
    "int3/block4x8",
    "int2/group16/asym",
    "int4/group32/asym/scale:int8",
    "int4/group16/scale:int8",
    "int4/group32/scale:e8m0",
    "nf4/group64",
    "mxfp4",
    "fp8_e4m3/channel",
)
VARIANTS = (
    Gptq(),
    Gptq(scales="static", rounds=1),
    Gptq(order="group", scales="updated", rounds=0),
    Gptq(order="none", damping=0.1, range="absmax", rounds=1),
)
specs = pytest.mark.parametrize("text", SPECS)
variants = pytest.mark.parametrize("method", VARIANTS, ids=str)


def problem(seed: int, rows: int = 12, columns: int = 75, samples: int = 300) -> tuple[Tensor, Seen]:
    """A weight and what correlated inputs of different sizes leave behind."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    sizes = torch.exp(torch.randn(columns, generator=generator))
    hessian = Hessian()
    hessian.update(torch.randn(samples, columns, generator=generator) @ mixing * sizes)
    found = hessian.result()
    return torch.randn(rows, columns, generator=generator), Seen(found.diagonal(), found, samples)


def output_error(weight: Tensor, record: QuantizedTensor, seen: Seen) -> float:
    assert seen.hessian is not None
    deviation = (record.dequantize() - weight).double()
    return float(((deviation @ seen.hessian.double()) * deviation).sum())


def diagonal_only(seen: Seen) -> Seen:
    assert seen.hessian is not None
    return replace(seen, hessian=torch.diag(seen.hessian.diagonal()))


@specs
@variants
@settings(max_examples=2, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1000))
def test_identity_hessian_gives_round_to_nearest_bit_for_bit(text: str, method: Gptq, seed: int) -> None:
    weight, spec = problem(seed)[0], QuantSpec.parse(text)
    identity = Seen(hessian=torch.eye(75), samples=1000)
    uniform = Seen(importance=torch.ones(75))
    assert method.quantize(weight, spec, identity) == Rtn(method.range).quantize(weight, spec, uniform)


@specs
@pytest.mark.parametrize("order", ["activation", "group", "none"])
def test_the_whole_way_with_next_to_no_correlation_gives_the_bits_of_round_to_nearest(text: str, order: str) -> None:
    (weight, seen), spec = problem(3), QuantSpec.parse(text)
    almost = diagonal_only(seen)
    assert almost.hessian is not None
    almost.hessian[0, 1] = almost.hessian[1, 0] = 1e-20
    found = Gptq(order=order, rounds=0, scales="static").solve(weight, spec, almost)  # type: ignore[arg-type]
    assert found.notes == ()
    assert found.record == Rtn().quantize(weight, spec, almost)


@specs
@variants
@settings(max_examples=2, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000))
def test_output_error_is_below_round_to_nearest_on_correlated_data(text: str, method: Gptq, seed: int) -> None:
    (weight, seen), spec = problem(seed), QuantSpec.parse(text)
    nearest = Rtn(method.range).quantize(weight, spec, seen)
    assert output_error(weight, method.quantize(weight, spec, seen), seen) < output_error(weight, nearest, seen)


@specs
@variants
def test_block_size_does_not_change_the_result(text: str, method: Gptq) -> None:
    (weight, seen), spec = problem(5), QuantSpec.parse(text)
    results = [replace(method, block=block).quantize(weight, spec, seen) for block in (7, 128)]
    assert results[0] == results[1]


@pytest.mark.parametrize("text", ["int4/channel/asym", "int3/group32/asym", "nf4/group64"])
def test_batch_split_does_not_change_the_result(text: str) -> None:
    weight, spec = problem(6)[0], QuantSpec.parse(text)
    data = torch.randn(500, 75, generator=torch.Generator().manual_seed(7)).cumsum(1)
    results = []
    for at in ([], [1], [100, 300, 301]):
        hessian = Hessian()
        for part in torch.tensor_split(data, at):
            hessian.update(part)
        results.append(Gptq().quantize(weight, spec, Seen(hessian=hessian.result(), samples=500)))
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("method", [Gptq(rounds=2), Gptq(order="group", scales="static", rounds=0)], ids=str)
def test_number_of_threads_does_not_change_the_result(method: Gptq) -> None:
    (weight, seen), spec = problem(8, rows=300, columns=128, samples=900), QuantSpec.parse("int3/group32/asym")
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(method.quantize(weight, spec, seen))
    finally:
        torch.set_num_threads(threads)
    assert results[0] == results[1]


@specs
def test_more_turns_never_raise_the_error(text: str) -> None:
    (weight, seen), spec = problem(9), QuantSpec.parse(text)
    assert seen.hessian is not None
    # without damping: what is lowered is exactly what is measured here
    errors = [
        output_error(weight, Gptq(rounds=rounds, damping=0.0).quantize(weight, spec, seen), seen) for rounds in range(3)
    ]
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in pairwise(errors))
    assert errors[1] < errors[0]


@specs
@variants
def test_the_record_is_one_that_can_be_stored(text: str, method: Gptq) -> None:
    (weight, seen), spec = problem(10), QuantSpec.parse(text)
    found = method.quantize(weight, spec, seen)
    # refuses scales that are not numbers of the scale format and zero points that are no codes
    again = quantize(found.dequantize(), spec, found.scale, found.zero_point)
    assert torch.equal(again.dequantize(), found.dequantize())


def test_an_exact_solution_is_found() -> None:
    spec = QuantSpec.parse("int4/group16/asym")
    seen = problem(11, columns=48)[1]
    exact = quantize(torch.randn(6, 48, generator=torch.Generator().manual_seed(12)), spec)
    found = Gptq(range="absmax").quantize(exact.dequantize(), spec, seen)
    torch.testing.assert_close(found.dequantize(), exact.dequantize(), rtol=1e-3, atol=1e-4)


def test_it_agrees_with_the_plain_algorithm_written_down() -> None:
    (weight, seen), spec = problem(13), QuantSpec.parse("int3/group32/asym")
    assert seen.hessian is not None
    scale, zero_point = Rtn().quantize(weight, spec, seen).scale, Rtn().quantize(weight, spec, seen).zero_point
    damped = seen.hessian + torch.eye(75) * 0.01 * seen.hessian.diagonal().mean()
    inverse, rest, columns = torch.linalg.inv(damped), weight.double(), list(range(75))
    expected = torch.empty(12, 75, dtype=torch.int8)
    for column in range(75):
        rounded = quantize(rest.float(), spec, scale, zero_point)
        expected[:, column] = rounded.codes[:, column]
        error = (rest[:, column] - rounded.dequantize()[:, column]) / inverse[0, 0]
        rest[:, columns] -= torch.outer(error, inverse[0])
        # the inverse without this column, Frantar et al. 2022, arXiv:2208.11580, lemma 1
        inverse = (inverse - torch.outer(inverse[:, 0], inverse[0]) / inverse[0, 0])[1:, 1:]
        columns = columns[1:]
    found = Gptq(order="none", scales="static", rounds=0).quantize(weight, spec, seen)
    assert torch.equal(found.codes, expected)


def drifting(seed: int) -> tuple[Tensor, Seen, Tensor, Tensor]:
    """A weight, what was seen at its input x, the float model's x' and x."""
    generator = torch.Generator().manual_seed(seed)
    exact = torch.randn(400, 75, generator=generator) @ torch.randn(75, 75, generator=generator)
    now = exact + 0.3 * exact.roll(1, 1) + 0.3 * torch.randn(400, 75, generator=generator)
    hessian = now.double().t() @ now.double() / 400
    drift = (exact - now).double().t() @ now.double() / 400
    return torch.randn(12, 75, generator=generator), Seen(hessian=hessian, samples=400, drift=drift), exact, now


@pytest.mark.parametrize("text", ["int4/channel/asym", "int3/group32", "nf4/group64"])
@settings(max_examples=5, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1000))
def test_knowing_the_drift_of_the_input_brings_the_output_nearer_to_the_float_one(text: str, seed: int) -> None:
    (weight, seen, exact, now), spec = drifting(seed), QuantSpec.parse(text)
    target, errors = exact @ weight.t(), []
    for correction in (0.0, 0.5, 1.0):
        found = Gptq(correction=correction).solve(weight, spec, seen)
        errors.append(float((now @ found.record.dequantize().t() - target).square().sum()))
        assert any("make up for the error of earlier layers" in note for note in found.notes) == (correction > 0)
    assert errors[2] < errors[1] < errors[0]


def test_a_full_correction_aims_at_the_least_squares_weight() -> None:
    weight, seen, exact, now = drifting(1)
    best = torch.linalg.lstsq(now.double(), (exact @ weight.t()).double()).solution.t().float()
    spec = QuantSpec.parse("int8/channel")
    aimed, plain = (Gptq(correction=part, damping=0.0).quantize(weight, spec, seen).dequantize() for part in (1.0, 0.0))
    assert float((aimed - best).norm()) < 0.03 * float(best.norm()) < 0.3 * float((plain - best).norm())


def test_no_drift_changes_no_bit() -> None:
    (weight, seen), spec = problem(26), QuantSpec.parse("int3/group32/asym")
    none = Gptq().quantize(weight, spec, replace(seen, drift=torch.zeros(75, 75)))
    assert none == Gptq().quantize(weight, spec, seen)


@pytest.mark.parametrize(
    ("drift", "message"),
    [
        (torch.zeros(3, 3), r"drift has shape \(3, 3\), expected \(75, 75\)"),
        (torch.zeros(75, 75).index_fill(0, torch.tensor([9]), float("nan")), "drift of input channel 9 is not finite"),
    ],
)
def test_a_drift_that_does_not_fit_is_refused(drift: Tensor, message: str) -> None:
    weight, seen = problem(27)
    with pytest.raises(DataError, match=message):
        Gptq().solve(weight, QuantSpec.parse("int4/channel"), replace(seen, drift=drift))


def test_updated_scales_see_the_errors_of_the_blocks_before() -> None:
    (weight, seen), spec = problem(14), QuantSpec.parse("int2/group16/asym")
    static, updated = (
        Gptq(order="none", scales=scales, rounds=0).quantize(weight, spec, seen)  # type: ignore[arg-type]
        for scales in ("static", "updated")
    )
    assert static.scale is not None and updated.scale is not None
    assert torch.equal(static.scale[:, 0], updated.scale[:, 0])
    assert not torch.equal(static.scale[:, 1:], updated.scale[:, 1:])


@pytest.mark.parametrize("order", ["activation", "group", "none"])
def test_a_dead_channel_is_rounded_to_nearest_and_said(order: str) -> None:
    (weight, seen), spec = problem(15), QuantSpec.parse("int4/group32/asym")
    assert seen.hessian is not None
    seen.hessian[[4, 60]] = 0
    seen.hessian[:, [4, 60]] = 0
    found = Gptq(order=order, rounds=0).solve(weight, spec, seen)  # type: ignore[arg-type]
    assert found.notes[:1] == ("2 of 75 input channels were always zero and are rounded to nearest",)
    nearest = quantize(weight, spec, found.record.scale, found.record.zero_point)
    assert torch.equal(found.record.codes[:, [4, 60]], nearest.codes[:, [4, 60]])


def test_fewer_samples_than_channels_work_and_are_said() -> None:
    (weight, seen), spec = problem(16, samples=20), QuantSpec.parse("int4/group32/asym")
    found = Gptq().solve(weight, spec, seen)
    assert found.notes == ("20 samples for 75 input channels: damping holds what they leave open",)
    nearest = Rtn().quantize(weight, spec, seen)
    assert output_error(weight, found.record, seen) < output_error(weight, nearest, seen)


@pytest.mark.parametrize("damping", [0.0, 1e-18])
def test_a_singular_hessian_is_damped_as_far_as_it_takes_and_said(damping: float) -> None:
    (weight, seen), spec = problem(17, samples=3), QuantSpec.parse("int4/group32/asym")
    found = Gptq(damping=damping).solve(weight, spec, seen)
    assert any("of the mean diagonal, as" in note and "left the Hessian singular" in note for note in found.notes)
    assert bool(torch.isfinite(found.record.dequantize()).all())


def test_a_matrix_that_is_no_hessian_at_all_is_still_damped_until_it_can_be_factored() -> None:
    weight, spec = problem(18)[0], QuantSpec.parse("int4/group32/asym")
    indefinite = torch.full((75, 75), -1.0).fill_diagonal_(1.0)
    found = Gptq().solve(weight, spec, Seen(hessian=indefinite, samples=100))
    assert any("left the Hessian singular" in note for note in found.notes)
    assert bool(torch.isfinite(found.record.dequantize()).all())


@pytest.mark.parametrize("size", [2.0**-1000, 2.0**-140, 2.0**140, 2.0**1000])
def test_the_size_of_the_hessian_does_not_matter(size: float) -> None:
    (weight, seen), spec = problem(19), QuantSpec.parse("int3/group32/asym")
    assert seen.hessian is not None
    scaled = Seen(hessian=seen.hessian * size, samples=300)
    assert Gptq().solve(weight, spec, scaled).record == Gptq().quantize(weight, spec, seen)


def test_inputs_that_were_always_zero_give_round_to_nearest_and_are_said() -> None:
    weight, spec = problem(20)[0], QuantSpec.parse("int4/group32/asym")
    found = Gptq().solve(weight, spec, Seen(hessian=torch.zeros(75, 75), samples=9))
    assert found.notes == ("calibration saw only zeros here: rounded to nearest",)
    assert found.record == Rtn().quantize(weight, spec)


def test_rows_that_compensation_makes_worse_are_rounded_to_nearest_and_said() -> None:
    (weight, seen), spec = problem(15, rows=200), QuantSpec.parse("int4/group32/asym")
    swept = Gptq(order="none", scales="static", rounds=0).solve(weight, spec, seen)
    nearest = Rtn().quantize(weight, spec, seen)
    same = int((swept.record.codes == nearest.codes).all(1).sum())
    assert 0 < same < 200
    assert swept.notes == (f"{same} of 200 rows are better rounded to nearest",)


@pytest.mark.parametrize("text", ["bf16", "fp32"])
def test_a_format_without_scales_is_rounded_to_nearest_and_said(text: str) -> None:
    (weight, seen), spec = problem(21), QuantSpec.parse(text)
    found = Gptq().solve(weight, spec, seen)
    assert found.notes == (f"{text} has no scales: rounded to nearest",)
    assert found.record == quantize(weight, spec)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (1, 1)])
def test_degenerate_shapes_come_back(shape: tuple[int, int]) -> None:
    found = Gptq().solve(torch.ones(shape), QuantSpec.parse("int4/group32"), Seen(hessian=torch.eye(shape[1])))
    assert found.record.shape == shape and found.notes


@pytest.mark.parametrize("seen", [None, Seen(), Seen(importance=torch.ones(75))])
def test_without_a_hessian_the_error_says_what_to_do(seen: Seen | None) -> None:
    with pytest.raises(DataError, match=r"gptq needs the Hessian.*give data that does, or use .* rtn or hqq"):
        Gptq().solve(problem(22)[0], QuantSpec.parse("int4/channel"), seen)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_infinity_in_a_channel_is_named(bad: float) -> None:
    weight, seen = problem(23)
    assert seen.hessian is not None
    seen.hessian[17] = bad
    seen.hessian[:, 17] = bad
    with pytest.raises(DataError, match="input channel 17 is not finite"):
        Gptq().solve(weight, QuantSpec.parse("int4/channel"), seen)


@pytest.mark.parametrize(
    ("hessian", "message"),
    [
        (torch.eye(74), r"shape \(74, 74\), expected \(75, 75\)"),
        (torch.eye(75).index_fill(0, torch.tensor([3]), -1.0), "-1 on its diagonal at input channel 3"),
    ],
)
def test_a_hessian_that_does_not_fit_is_refused(hessian: Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Gptq().solve(problem(24)[0], QuantSpec.parse("int4/channel"), Seen(hessian=hessian))


def test_a_weight_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ModelError, match=r"weight element \(0, 1\) is inf"):
        Gptq().solve(torch.tensor([[1.0, float("inf")]]), QuantSpec.parse("int8/channel"), Seen(hessian=torch.eye(2)))


def test_the_caller_keeps_its_tensors() -> None:
    weight, seen = problem(25)
    assert seen.hessian is not None
    before = weight.clone(), seen.hessian.clone()
    Gptq().solve(weight, QuantSpec.parse("int4/group32/asym"), seen)
    assert torch.equal(weight, before[0]) and torch.equal(seen.hessian, before[1])


@pytest.mark.parametrize(
    "options",
    [
        {"order": "act"}, {"scales": "old"}, {"damping": -0.1}, {"damping": True}, {"damping": 2}, {"rounds": -1},
        {"correction": 1.5}, {"block": 0}, {"block": 1.5}, {"range": "max"}, {"refinements": -1},
    ],
)  # fmt: skip
def test_wrong_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(RecipeError, match=f"^gptq: {next(iter(options))} is"):
        Gptq(**options)  # type: ignore[arg-type]


def test_a_recipe_names_it() -> None:
    assert make_method({"gptq": {"damping": 0.05}}) == Gptq(damping=0.05)
    assert Gptq.needs == {"hessian", "drift"}
