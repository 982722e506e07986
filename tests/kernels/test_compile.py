"""Every op goes through torch.compile and torch.export without a graph break and with the same bits."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from tests.kernels.conv_cases import SHAPES
from tests.kernels.linear_cases import int8_arguments, static_arguments
from tests.kernels.lowbit_cases import lowbit_arguments
from tests.kernels.network_cases import residual_network
from tests.kernels.stored_cases import stored_weight
from tests.kernels.test_recurrent import arguments as recurrent_arguments
from torch import Tensor, nn

from narrowcast import kernels
from narrowcast.kernels.reference_conv import conv_plan

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

INT8 = int8_arguments(5, 17, 40)
CONV = SHAPES["grouped"].arguments()
CONV_SIZES = (SHAPES["grouped"].kernel, SHAPES["grouped"].groups)
STORED, _ = stored_weight("int4/group32/asym", 17, 72)
INDICES = torch.tensor([[0, 5, 3], [16, 1, 1]])
WEIGHT = torch.randn(6, 64, generator=torch.Generator().manual_seed(1))
CODES, SCALE, ZERO_POINT = torch.ops.narrowcast.quantize_weight(WEIGHT, 32, 4, False, 1)

# One call of every op; an op without a row here fails the first test.
CALLS: dict[str, tuple[Any, ...]] = {
    "linear_int8_dynamic": (*INT8, False),
    "linear_int8_static": static_arguments(INT8, 0.1, 128),
    "linear_lowbit_dynamic": lowbit_arguments(5, 17, 64, asymmetric=True, fused="silu"),
    "linear_weight_only": (torch.randn(3, 72), *STORED[:-2], torch.randn(17), *STORED[-2:]),
    "dequantize_weight": (*STORED, 72),
    "embedding_rows": (INDICES, *STORED, 72),
    "conv2d_int8": CONV,
    "conv2d_int8_planned": (*CONV[:7], conv_plan(*CONV[7:])),
    "conv2d_int8_pack": (SHAPES["grouped"].weight(), *CONV_SIZES),
    "conv2d_int8_unpack": (CONV[1], SHAPES["grouped"].outputs, 6, *CONV_SIZES),
    "conv_network_int8": ([torch.randn(2, 3, 8, 8)], *residual_network(1).arguments()),
    "lstm_int8": recurrent_arguments("lstm_int8", 3, 2, 5, 7),
    "gru_int8": recurrent_arguments("gru_int8", 3, 2, 5, 7),
    "quantize_weight": (WEIGHT, 32, 4, False, 1),
    "encode_weight": (WEIGHT, SCALE, ZERO_POINT, 32, 4),
    "quantization_error": (WEIGHT, CODES, SCALE, ZERO_POINT, 32),
    "pack_codes": (CODES, 4, -8),
    "unpack_codes": (torch.ops.narrowcast.pack_codes(CODES, 4, -8), 4, -8, 64, True),
    "search_range": (WEIGHT, torch.rand(64), 32, 4, False, 1, 1),
}


def has_tensors(value: object) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, list) and isinstance(value[0], Tensor))


class Call(nn.Module):
    """One op with its arguments but the tensors fixed: tensors are the inputs of the graph."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.op = getattr(torch.ops.narrowcast, name)
        self.fixed = [None if has_tensors(value) else value for value in CALLS[name]]
        self.places = [index for index, value in enumerate(CALLS[name]) if has_tensors(value)]
        self.tensors = tuple(CALLS[name][index] for index in self.places)

    def forward(self, *tensors: Any) -> Any:
        values = list(self.fixed)
        for index, tensor in zip(self.places, tensors, strict=True):
            values[index] = tensor
        return self.op(*values)


def assert_same(got: Any, expected: Any) -> None:
    for a, b in zip(
        *((value if isinstance(value, tuple | list) else (value,)) for value in (got, expected)), strict=True
    ):
        assert a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)


def test_every_op_has_a_call() -> None:
    assert set(CALLS) == set(kernels.OPS)


@pytest.mark.parametrize("name", CALLS)
def test_opcheck_accepts_every_op(name: str) -> None:
    torch.library.opcheck(getattr(torch.ops.narrowcast, name).default, CALLS[name])


@pytest.mark.parametrize("name", CALLS)
def test_every_op_compiles_without_a_graph_break(name: str) -> None:
    call = Call(name)
    torch._dynamo.reset()
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    assert_same(compiled(*call.tensors), call(*call.tensors))


@pytest.mark.parametrize("name", CALLS)
def test_every_op_exports_as_itself(name: str) -> None:
    call = Call(name)
    program = torch.export.export(call, call.tensors)
    assert_same(program.module()(*call.tensors), call(*call.tensors))
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert f"narrowcast.{name}.default" in targets


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++")
def test_inductor_calls_the_op() -> None:
    call = Call("linear_int8_dynamic")
    torch._dynamo.reset()
    compiled = torch.compile(call, backend="inductor", fullgraph=True)
    assert_same(compiled(*call.tensors), call(*call.tensors))
