"""Every op goes through torch.compile and torch.export without a graph break and with the same bits."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from tests.kernels.conv_cases import SHAPES
from tests.kernels.linear_cases import int4_arguments, int8_arguments, static_arguments
from tests.kernels.lowbit_cases import lowbit_arguments
from tests.kernels.network_cases import residual_network
from tests.kernels.test_recurrent import arguments as recurrent_arguments
from torch import Tensor, nn

from narrowcast import kernels
from narrowcast.kernels.reference_conv import conv_plan

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

INT8 = int8_arguments(5, 17, 40)
INT4 = int4_arguments(5, 17, 64, asymmetric=True)
CONV = SHAPES["grouped"].arguments()
CONV_SIZES = (SHAPES["grouped"].kernel, SHAPES["grouped"].groups)
INDICES = torch.tensor([[0, 5, 3], [16, 1, 1]])

# One call of every op; an op without a row here fails the first test.
CALLS: dict[str, tuple[Any, ...]] = {
    "linear_int8_dynamic": (*INT8, False),
    "linear_int8_static": static_arguments(INT8, 0.1, 128),
    "linear_lowbit_dynamic": lowbit_arguments(5, 17, 64, asymmetric=True, fused="silu"),
    "dequantize_int8": (INT8[1], INT8[2]),
    "dequantize_int4": (INT4[1], INT4[2], INT4[3], 32, 64),
    "conv2d_int8": CONV,
    "conv2d_int8_planned": (*CONV[:7], conv_plan(*CONV[7:])),
    "conv2d_int8_pack": (SHAPES["grouped"].weight(), *CONV_SIZES),
    "conv2d_int8_unpack": (CONV[1], SHAPES["grouped"].outputs, 6, *CONV_SIZES),
    "conv_network_int8": ([torch.randn(2, 3, 8, 8)], *residual_network(1).arguments()),
    "embedding_int8": (INDICES, INT8[1], INT8[2]),
    "embedding_int4": (INDICES, INT4[1], INT4[2], INT4[3], 32, 64),
    "lstm_int8": recurrent_arguments("lstm_int8", 3, 2, 5, 7),
    "gru_int8": recurrent_arguments("gru_int8", 3, 2, 5, 7),
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
