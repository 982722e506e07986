from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.methods.test_autoround import SPECS
from torch import Tensor

from narrowcast.core import QuantSpec, distinct_levels, quantize
from narrowcast.methods import Rtn
from narrowcast.methods.rounding import LearnedWeight, encoded, neighbours, one_thread


def random_weight(seed: int, rows: int = 6, columns: int = 37) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def moved(learned: LearnedWeight, seed: int, far: float) -> LearnedWeight:
    """The same weight after training that went somewhere."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        learned.offset += (torch.rand(learned.offset.shape, generator=generator) - 0.5) * 2 * far
        learned.ends += torch.randn(learned.ends.shape, generator=generator) * far
    return learned


@pytest.mark.parametrize("text", SPECS)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), rows=st.integers(1, 7), columns=st.integers(1, 70), far=st.floats(0, 30))
def test_the_stored_record_is_the_trained_weight_bit_for_bit(
    text: str, seed: int, rows: int, columns: int, far: float
) -> None:
    weight, spec = random_weight(seed, rows, columns), QuantSpec.parse(text)
    learned = moved(LearnedWeight(weight, Rtn().quantize(weight, spec)), seed, far)
    record = learned.record()
    assert torch.equal(record.dequantize().view(torch.int32), learned.weight().detach().view(torch.int32))
    again = quantize(record.dequantize(), spec, record.scale, record.zero_point)  # refuses scales that are not stored
    assert torch.equal(again.dequantize(), record.dequantize())


@pytest.mark.parametrize("text", SPECS)
def test_training_starts_at_its_start_bit_for_bit(text: str) -> None:
    weight, spec = random_weight(1), QuantSpec.parse(text)
    start = Rtn().quantize(weight, spec)
    assert LearnedWeight(weight, start).record() == start


@pytest.mark.parametrize("text", SPECS)
def test_an_offset_of_half_a_step_reaches_the_other_neighbour_and_no_further(text: str) -> None:
    weight, spec = random_weight(2), QuantSpec.parse(text)
    start = Rtn().quantize(weight, spec)
    low, high = (encoded(steps, start).dequantize() for steps in neighbours(weight, start))
    for sign, side in ((-0.4999, low), (0.4999, high)):
        learned = LearnedWeight(weight, start)
        with torch.no_grad():
            learned.offset += sign
        values = learned.weight().detach()
        assert bool(((values == low) | (values == high)).all())
        assert float((values == side).float().mean()) > 0.98  # not where the weight is within a thousandth of a level


@pytest.mark.parametrize("text", SPECS)
def test_neighbours_enclose_the_weights_inside_the_range(text: str) -> None:
    weight, spec = random_weight(3), QuantSpec.parse(text)
    start = Rtn().quantize(weight, spec)
    low, high = (encoded(steps, start).dequantize() for steps in neighbours(weight, start))
    nearest = start.dequantize()
    assert bool(((nearest == low) | (nearest == high)).all())
    inside = low != high
    assert bool(inside.any())
    slack = 1e-6 * weight.abs().max()
    assert bool(((low <= weight + slack) & (weight <= high + slack))[inside].all())


@pytest.mark.parametrize("text", ["int8/channel", "int8/channel/asym"])
def test_the_gradient_of_an_end_is_the_slope_of_the_weight_over_many_steps(text: str) -> None:
    """Oracle: differences, where a range clips most of the weight so that its values follow the ends."""
    weight = random_weight(4, 4, 400)
    start = quantize(weight, QuantSpec.parse(text))
    assert start.scale is not None
    clipped = LearnedWeight(weight, quantize(weight * 0.25, start.spec))
    slope = torch.randn(4, 400, generator=torch.Generator().manual_seed(5)).sign() * weight.sign()

    def loss(shift: float) -> float:
        with torch.no_grad():
            clipped.ends.fill_(0)
            clipped.ends[-1] = shift
            return float((clipped.weight() * slope).sum(dtype=torch.float64))

    step = 16.0  # zero points are whole: a small step is lost in their rounding
    difference = (loss(step) - loss(-step)) / (2 * step)
    loss(0)
    (gradient,) = torch.autograd.grad((clipped.weight() * slope).sum(), [clipped.ends])
    assert float(gradient[-1].sum()) == pytest.approx(difference, rel=0.15)


def test_the_gradient_of_an_offset_is_the_scale_inside_and_zero_where_the_code_is_clamped() -> None:
    weight = torch.tensor([[0.1, -0.2, 5.0, -5.0, 0.9]])
    spec = QuantSpec.parse("int4/channel")
    start = quantize(weight, spec, torch.tensor([[0.25]]))
    learned = LearnedWeight(weight, start)
    (gradient,) = torch.autograd.grad(learned.weight().sum(), [learned.offset])
    assert gradient.flatten().tolist() == [0.25, 0.25, 0.0, 0.0, 0.25]


@pytest.mark.parametrize(("text", "count"), [("nf4", 16), ("fp4_e2m1", 15), ("fp8_e4m3/tensor", 253)])
def test_levels_are_every_value_once(text: str, count: int) -> None:
    levels = distinct_levels(QuantSpec.parse(text).format)
    assert levels.numel() == count == levels.unique().numel()
    assert torch.equal(levels, levels.sort().values)


def test_one_thread_gives_the_threads_back_also_after_an_error() -> None:
    threads = torch.get_num_threads()
    with pytest.raises(ValueError, match="inside"), one_thread():
        assert torch.get_num_threads() == 1
        raise ValueError("inside")
    assert torch.get_num_threads() == threads
