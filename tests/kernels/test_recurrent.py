"""lstm_int8 and gru_int8: every tier gives the reference's bits, which are close to torch's float layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from narrowcast import kernels
from narrowcast.kernels.reference_recurrent import exponential, hyperbolic_tangent, sigmoid

Tiers = Callable[[], Iterator[str]]
OPS = torch.ops.narrowcast
GATES = {"lstm_int8": 4, "gru_int8": 3}
SIZES = [(1, 1, 1, 1), (3, 2, 5, 7), (2, 3, 17, 16), (5, 1, 8, 33), (2, 13, 40, 20), (9, 50, 3, 12)]


def quantized(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scale = weight.abs().amax(dim=1) / 127
    codes = torch.round(weight / scale[:, None]).to(torch.int8)
    return codes, scale, codes.sum(dim=1, dtype=torch.int32)


def arguments(op: str, steps: int, batch: int, inputs: int, hidden: int, *, reverse: bool = False) -> tuple[Any, ...]:
    random = torch.Generator().manual_seed(steps + 10 * batch + 100 * inputs + hidden)
    rows = GATES[op] * hidden
    x = torch.randn(steps, batch, inputs, generator=random) * 3
    states = [torch.randn(batch, hidden, generator=random) for _ in range(2 if op == "lstm_int8" else 1)]
    weights = [torch.randn(rows, columns, generator=random) for columns in (inputs, hidden)]
    biases = [torch.randn(rows, generator=random) for _ in range(1 if op == "lstm_int8" else 2)]
    return (x, *states, *quantized(weights[0]), *quantized(weights[1]), *biases, reverse)


def assert_equal(got: tuple[Tensor, ...], expected: tuple[Tensor, ...], tier: str) -> None:
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert torch.equal(a, b), f"{tier}: off by {(a.float() - b.float()).abs().max()}"


@pytest.mark.parametrize("op", GATES)
@pytest.mark.parametrize("size", SIZES)
def test_every_tier_gives_the_reference_bits(op: str, size: tuple[int, ...], every_tier: Tiers) -> None:
    for reverse in (False, True):
        values = arguments(op, *size, reverse=reverse)
        expected = kernels.OPS[op].reference(*values)
        for tier in every_tier():
            assert_equal(getattr(OPS, op)(*values), expected, tier)


@pytest.mark.parametrize("op", GATES)
def test_half_precision_and_strided_inputs(op: str, every_tier: Tiers) -> None:
    x, *rest = arguments(op, 6, 4, 10, 9)
    for values in (x.bfloat16(), x.half(), x[::2], x.transpose(1, 2).contiguous().transpose(1, 2)):
        expected = kernels.OPS[op].reference(values, *rest)
        for tier in every_tier():
            assert_equal(getattr(OPS, op)(values, *rest), expected, tier)


@pytest.mark.parametrize("op", GATES)
def test_without_bias(op: str, every_tier: Tiers) -> None:
    values = list(arguments(op, 3, 2, 6, 5))
    values[-2] = None
    expected = kernels.OPS[op].reference(*values)
    for tier in every_tier():
        assert_equal(getattr(OPS, op)(*values), expected, tier)


def test_close_to_torch_lstm() -> None:
    torch.manual_seed(0)
    layer = torch.nn.LSTM(24, 32).requires_grad_(False)
    x, state = torch.randn(20, 3, 24), torch.zeros(3, 32)
    weights = (*quantized(layer.weight_ih_l0), *quantized(layer.weight_hh_l0))
    expected, (h, c) = layer(x)
    y, last, cell = OPS.lstm_int8(x, state, state, *weights, layer.bias_ih_l0 + layer.bias_hh_l0, False)
    assert (y - expected).abs().max() < 0.01
    assert (last - h[0]).abs().max() < 0.01 and (cell - c[0]).abs().max() < 0.02


def test_close_to_torch_gru() -> None:
    torch.manual_seed(0)
    layer = torch.nn.GRU(24, 32).requires_grad_(False)
    x, state = torch.randn(20, 3, 24), torch.zeros(3, 32)
    weights = (*quantized(layer.weight_ih_l0), *quantized(layer.weight_hh_l0))
    expected, h = layer(x)
    y, last = OPS.gru_int8(x, state, *weights, layer.bias_ih_l0, layer.bias_hh_l0, False)
    assert (y - expected).abs().max() < 0.01 and (last - h[0]).abs().max() < 0.01


def test_elementary_functions_are_accurate() -> None:
    x = torch.cat([torch.linspace(-30, 30, 200001), torch.linspace(-1e-3, 1e-3, 2001), torch.tensor([-1e30, 1e30])])
    exact = x.double()
    assert (hyperbolic_tangent(x) - torch.tanh(exact)).abs().max() < 1e-7
    assert (sigmoid(x) - torch.sigmoid(exact)).abs().max() < 1.2e-7
    small = exact.clamp(-80, 80)
    assert ((exponential(small.float()) - torch.exp(small.float().double())) / torch.exp(small)).abs().max() < 1e-6
    near_zero = exact[(exact.abs() < 0.6) & (exact != 0)]
    error = (hyperbolic_tangent(near_zero.float()) - torch.tanh(near_zero)) / torch.tanh(near_zero)
    assert error.abs().max() < 3e-7


@pytest.mark.parametrize("op", GATES)
def test_result_does_not_depend_on_threads_or_batch_split(op: str, threads: None) -> None:
    x, *rest = arguments(op, 12, 60, 64, 48)
    states = 2 if op == "lstm_int8" else 1
    torch.set_num_threads(1)
    whole = getattr(OPS, op)(x, *rest)
    for count in (2, 3):
        torch.set_num_threads(count)
        assert_equal(getattr(OPS, op)(x, *rest), whole, f"{count} threads")
    for begin, end in ((0, 1), (1, 30), (30, 60)):
        part = [state[begin:end] for state in rest[:states]]
        y = getattr(OPS, op)(x[:, begin:end], *part, *rest[states:])[0]
        assert torch.equal(y, whole[0][:, begin:end])


@pytest.mark.parametrize("op", GATES)
def test_empty_batch_and_no_steps(op: str, every_tier: Tiers) -> None:
    for steps, batch in ((3, 0), (0, 3)):
        values = arguments(op, steps, batch, 4, 5)
        expected = kernels.OPS[op].reference(*values)
        for tier in every_tier():
            assert_equal(getattr(OPS, op)(*values), expected, tier)


@pytest.mark.parametrize("op", GATES)
def test_non_finite_value_is_named(op: str, tier: str) -> None:
    x, h0, *rest = arguments(op, 4, 3, 6, 5)
    x[2, 1, 3] = float("nan")
    with pytest.raises(RuntimeError, match="Non-finite value in x at step 2, row 1"):
        getattr(OPS, op)(x, h0, *rest)
    h0[1, 2] = float("inf")
    with pytest.raises(RuntimeError, match="Non-finite value in the state"):
        getattr(OPS, op)(torch.zeros_like(x), h0, *rest)


@pytest.mark.parametrize("op", GATES)
def test_wrong_shapes_and_dtypes_are_errors(op: str) -> None:
    x, h0, *rest = arguments(op, 4, 3, 6, 5)
    call = getattr(OPS, op)
    with pytest.raises(RuntimeError, match="steps, batch, inputs"):
        call(x[0], h0, *rest)
    with pytest.raises(RuntimeError, match="h0 is"):
        call(x, h0[:2], *rest)
    with pytest.raises(RuntimeError, match="weight_ih"):
        call(x[:, :, :5], h0, *rest)
    with pytest.raises(RuntimeError, match="weight_hh"):
        call(x, h0, *(r[:, :4] if r.shape[1:] == (5,) and r.dtype == torch.int8 else r for r in rest[:-1]), False)
    with pytest.raises(RuntimeError, match="float32"):
        call(x.int(), h0, *rest)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("op", GATES)
def test_opcheck_accepts_the_op(op: str) -> None:
    torch.library.opcheck(getattr(OPS, op).default, arguments(op, 3, 2, 5, 7))
