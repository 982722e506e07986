"""The linear layers that torch itself brings: float, int8 with dynamic and static activations, weight-only."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.linear_problem import FLOAT, INT4_WEIGHTS, INT8, INT8_WEIGHTS, Contender, Prepare, Problem
from benchmarks.timing import Call


def float_copies(dtype: torch.dtype) -> Callable[[Problem], Callable[[], Prepare]]:
    """functional.linear in one floating-point type."""

    def copies(problem: Problem) -> Callable[[], Prepare]:
        def copy() -> Prepare:
            weight, bias = problem.weight.to(dtype, copy=True), problem.bias.to(dtype)

            def prepare(x: Tensor) -> Call:
                converted = x.to(dtype)
                return lambda: functional.linear(converted, weight, bias)

            return prepare

        return copy

    return copies


def int8_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 codes [N, K] and scales [N] per row."""
    scale = weight.abs().amax(1) / 127.0
    return (weight / scale.unsqueeze(1)).round().to(torch.int8), scale


def int_mm_copies(problem: Problem) -> Callable[[], Prepare]:
    """torch._int_mm between the quantization of every row of the input and the multiplication with both scales."""
    codes, scale = int8_rows(problem.weight)

    def copy() -> Prepare:
        transposed = codes.clone().t()

        def prepare(x: Tensor) -> Call:
            def call() -> Tensor:
                step = x.abs().amax(1, keepdim=True) / 127.0
                rows = (x / step).round().to(torch.int8)
                return torch.addcmul(problem.bias, torch._int_mm(rows, transposed) * step, scale)

            return call

        return prepare

    return copy


def qlinear_copies(*, static: bool) -> Callable[[Problem], Callable[[], Prepare]]:
    """onednn.qlinear_pointwise: prepacked int8 weights, uint8 input with one range, found per call unless static."""

    def copies(problem: Problem) -> Callable[[], Prepare]:
        codes, scale = int8_rows(problem.weight)
        zeros = torch.zeros(len(scale), dtype=torch.int32)
        fixed = uint8_range(problem.samples)

        def copy() -> Prepare:
            packed = torch.ops.onednn.qlinear_prepack(codes.clone(), None)

            def prepare(x: Tensor) -> Call:
                def call() -> Tensor:
                    step, zero = fixed if static else uint8_range(x)
                    rows = torch.quantize_per_tensor(x, step, zero, torch.quint8).int_repr()
                    return torch.ops.onednn.qlinear_pointwise(  # type: ignore[no-any-return]
                        rows, step, zero, packed, scale, zeros, problem.bias, 1.0, 0, torch.float32, "none", [], ""
                    )

                return call

            return prepare

        return copy

    return copies


def uint8_range(x: Tensor) -> tuple[float, int]:
    """Scale and zero point that map the range of `x`, widened to contain 0, onto 0..255."""
    low, high = (bound.item() for bound in torch.aminmax(x))
    step = max(max(high, 0.0) - min(low, 0.0), 1e-12) / 255.0
    return step, round(-min(low, 0.0) / step)


def torch_ao_copies(problem: Problem) -> Callable[[], Prepare]:
    """torch.ao.nn.quantized.dynamic.Linear with the default engine."""
    layer = nn.Linear(*reversed(problem.weight.shape))
    layer.weight.data, layer.bias.data = problem.weight, problem.bias

    def copy() -> Prepare:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it announces its own removal
            model = torch.ao.quantization.quantize_dynamic(nn.Sequential(layer), {nn.Linear}, dtype=torch.qint8)[0]
        return lambda x: lambda: model(x)

    return copy


def int4pack_copies(dtype: torch.dtype, group: int) -> Callable[[Problem], Callable[[], Prepare]]:
    """aten._weight_int4pack_mm_for_cpu: asymmetric int4 groups, bfloat16 scales and zero points, float activations."""

    def copies(problem: Problem) -> Callable[[], Prepare]:
        rows, columns = problem.weight.shape
        groups = problem.weight.reshape(rows, columns // group, group)
        low, high = groups.amin(2), groups.amax(2)
        scale = (high - low) / 15.0
        codes = ((groups - low.unsqueeze(2)) / scale.unsqueeze(2)).round().clamp(0, 15).to(torch.int32)
        # the kernel computes (code - 8) * scale + zero
        terms = torch.stack([scale, low + 8.0 * scale], 2).transpose(0, 1).contiguous().to(dtype)
        packed = torch._convert_weight_to_int4pack_for_cpu(codes.reshape(rows, columns), 1)
        bias = problem.bias.to(dtype)

        def copy() -> Prepare:
            own = packed.clone()

            def prepare(x: Tensor) -> Call:
                converted = x.to(dtype)
                return lambda: torch._weight_int4pack_mm_for_cpu(converted, own, group, terms) + bias

            return prepare

        return copy

    return copies


def int8pack_copies(problem: Problem) -> Callable[[], Prepare]:
    """aten._weight_int8pack_mm: int8 weights per row, bfloat16 activations."""
    codes, scale = int8_rows(problem.weight)
    bias, scale = problem.bias.bfloat16(), scale.bfloat16()

    def copy() -> Prepare:
        own = codes.clone()

        def prepare(x: Tensor) -> Call:
            converted = x.bfloat16()
            return lambda: torch._weight_int8pack_mm(converted, own, scale) + bias

        return prepare

    return copy


FLOAT32 = "torch float32"
CONTENDERS = (
    Contender(FLOAT32, FLOAT, "float32", 32, float_copies(torch.float32)),
    Contender("torch bfloat16", FLOAT, "bfloat16", 16, float_copies(torch.bfloat16)),
    Contender("torch _int_mm", INT8, "int8", 8, int_mm_copies),
    Contender("onednn qlinear dynamic", INT8, "int8", 8, qlinear_copies(static=False)),
    Contender("onednn qlinear static", INT8, "int8", 8, qlinear_copies(static=True)),
    Contender("torch.ao dynamic", INT8, "int8", 8, torch_ao_copies),
    Contender("torch int4pack g32 bfloat16", INT4_WEIGHTS, "bfloat16", 5, int4pack_copies(torch.bfloat16, 32)),
    Contender("torch int4pack g128 bfloat16", INT4_WEIGHTS, "bfloat16", 4.25, int4pack_copies(torch.bfloat16, 128)),
    Contender("torch int8pack bfloat16", INT8_WEIGHTS, "bfloat16", 8, int8pack_copies),
)
