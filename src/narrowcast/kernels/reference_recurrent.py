"""Pure torch bodies of lstm_int8 and gru_int8: they define what the native kernels must compute, bit for bit.

exp and tanh follow Cephes (expf.c, tanhf.c) with one float32 operation per line of the formula, because the next
step quantizes the state: a last-bit difference in tanh could become a whole code. Absolute error below 2e-7.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from narrowcast.kernels.op import Op
from narrowcast.kernels.reference import integer_product, quantize_rows

EXP_COEFFICIENTS = (
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
)
TANH_COEFFICIENTS = (-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1)
LOG2_HIGH = 0.693359375
LOG2_LOW = -2.12194440e-4


def _polynomial(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    total = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        total = total * x + coefficient
    return total


def exponential(x: Tensor) -> Tensor:
    """exp(x) for x clamped to [-87, 88], float32, relative error below 2e-7."""
    x = x.clamp(-87.0, 88.0)
    whole = torch.round(x * 1.44269504088896341)
    rest = x - whole * LOG2_HIGH
    rest = rest - whole * LOG2_LOW
    total = _polynomial(rest, EXP_COEFFICIENTS) * rest * rest + rest + 1.0
    return (total.view(torch.int32) + (whole.to(torch.int32) << 23)).view(torch.float32)


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x)), float32."""
    return 1.0 / (1.0 + exponential(0.0 - x))


def hyperbolic_tangent(x: Tensor) -> Tensor:
    """tanh(x), float32: a polynomial below 0.625, else 1 - 2 / (exp(2x) + 1)."""
    size = x.abs()
    large = torch.copysign(1.0 - 2.0 / (exponential(size + size) + 1.0), x)
    square = x * x
    small = _polynomial(square, TANH_COEFFICIENTS) * square * x + x
    return torch.where(size < 0.625, small, large)


def _gates(rows: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Gate inputs [M, gates * hidden] of float rows quantized per row."""
    codes, row_scale = quantize_rows(rows)
    result = integer_product(codes, weight).float() * (row_scale[:, None] * scale[None, :])
    return result if bias is None else result + bias.float()


def _check_finite(op: str, what: str, rows: Tensor) -> None:
    bad = ~torch.isfinite(rows).all(dim=-1)
    if bool(bad.any()):
        raise RuntimeError(f"narrowcast.{op}: Non-finite value in {what} at {bad.nonzero()[0].tolist()}")


def _run(x: Tensor, h0: Tensor, reverse: bool, step: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """All states [T, B, H] and the last one; `step` maps (input row, state) to the next state."""
    state = h0
    y = x.new_empty((x.shape[0], *h0.shape))
    for time in reversed(range(x.shape[0])) if reverse else range(x.shape[0]):
        state = step(x[time], state)
        y[time] = state
    return y, state


def lstm_int8(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    weight_ih: Tensor,
    scale_ih: Tensor,
    sum_ih: Tensor,
    weight_hh: Tensor,
    scale_hh: Tensor,
    sum_hh: Tensor,
    bias: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """One direction of one LSTM layer with int8 weights; inputs and states are quantized to int8 per row.

    Args:
        x:         [T, B, I] float32, bfloat16 or float16, finite, time first.
        h0:        [B, H] float, the first state.
        c0:        [B, H] float, the first cell.
        weight_ih: [4 * H, I] int8, gate order i, f, g, o.
        scale_ih:  [4 * H] float32, weight units per code step of each row of weight_ih.
        sum_ih:    [4 * H] int32, the sum of each row of weight_ih.
        weight_hh: [4 * H, H] int8.
        scale_hh:  [4 * H] float32.
        sum_hh:    [4 * H] int32.
        bias:      [4 * H] float, the sum of both biases, or None.
        reverse:   from the last step to the first.

    Returns:
        y: [T, B, H]; h, c: [B, H] after the last step taken; all in x's dtype, computed in float32.

    Raises:
        RuntimeError: x or a state holds a NaN or an infinity.
    """
    _check_finite("lstm_int8", "x", x)
    _check_finite("lstm_int8", "the state", h0)
    cell = c0.float()

    def step(values: Tensor, state: Tensor) -> Tensor:
        nonlocal cell
        gates = _gates(values, weight_ih, scale_ih, bias) + _gates(state, weight_hh, scale_hh, None)
        take, keep, fresh, show = gates.chunk(4, dim=1)
        cell = sigmoid(keep) * cell + sigmoid(take) * hyperbolic_tangent(fresh)
        return sigmoid(show) * hyperbolic_tangent(cell)

    y, state = _run(x.float(), h0.float(), reverse, step)
    return y.to(x.dtype), _own(state, h0, x), _own(cell, c0, x)


def gru_int8(
    x: Tensor,
    h0: Tensor,
    weight_ih: Tensor,
    scale_ih: Tensor,
    sum_ih: Tensor,
    weight_hh: Tensor,
    scale_hh: Tensor,
    sum_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """One direction of one GRU layer with int8 weights; inputs and states are quantized to int8 per row.

    Args:
        x:         [T, B, I] float32, bfloat16 or float16, finite, time first.
        h0:        [B, H] float.
        weight_ih: [3 * H, I] int8, gate order r, z, n.
        scale_ih:  [3 * H] float32, weight units per code step of each row of weight_ih.
        sum_ih:    [3 * H] int32, the sum of each row of weight_ih.
        weight_hh: [3 * H, H] int8.
        scale_hh:  [3 * H] float32.
        sum_hh:    [3 * H] int32.
        bias_ih:   [3 * H] float, or None.
        bias_hh:   [3 * H] float, or None.
        reverse:   from the last step to the first.

    Returns:
        y: [T, B, H]; h: [B, H] after the last step taken; both in x's dtype, computed in float32.

    Raises:
        RuntimeError: x or a state holds a NaN or an infinity.
    """
    _check_finite("gru_int8", "x", x)
    _check_finite("gru_int8", "the state", h0)

    def step(values: Tensor, state: Tensor) -> Tensor:
        input_r, input_z, input_n = _gates(values, weight_ih, scale_ih, bias_ih).chunk(3, dim=1)
        state_r, state_z, state_n = _gates(state, weight_hh, scale_hh, bias_hh).chunk(3, dim=1)
        fresh = hyperbolic_tangent(input_n + sigmoid(input_r + state_r) * state_n)
        return fresh + sigmoid(input_z + state_z) * (state - fresh)

    y, state = _run(x.float(), h0.float(), reverse, step)
    return y.to(x.dtype), _own(state, h0, x)


def _own(state: Tensor, first: Tensor, x: Tensor) -> Tensor:
    """The state in x's dtype, never the caller's own tensor (with no steps it would be)."""
    result = state.to(x.dtype).contiguous()
    return result.clone() if result.data_ptr() == first.data_ptr() else result


def _fake_lstm(x: Tensor, h0: Tensor, c0: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty((x.shape[0], *h0.shape)), x.new_empty(h0.shape), x.new_empty(h0.shape)


def _fake_gru(x: Tensor, h0: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return x.new_empty((x.shape[0], *h0.shape)), x.new_empty(h0.shape)


_WEIGHTS = "Tensor weight_ih, Tensor scale_ih, Tensor sum_ih, Tensor weight_hh, Tensor scale_hh, Tensor sum_hh"

OPS = (
    Op(
        "lstm_int8",
        f"(Tensor x, Tensor h0, Tensor c0, {_WEIGHTS}, Tensor? bias, bool reverse) -> (Tensor y, Tensor h, Tensor c)",
        lstm_int8,
        _fake_lstm,
    ),
    Op(
        "gru_int8",
        f"(Tensor x, Tensor h0, {_WEIGHTS}, Tensor? bias_ih, Tensor? bias_hh, bool reverse) -> (Tensor y, Tensor h)",
        gru_int8,
        _fake_gru,
    ),
)
