"""narrowcast's linear layers, built as a user builds them: one nn.Linear and a recipe."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.linear_problem import INT4, INT4_WEIGHTS, INT8, INT8_WEIGHTS, Contender, Prepare, Problem
from benchmarks.peers import UnavailableError
from benchmarks.timing import Call
from narrowcast.nn.interleaved import CALLS_BEFORE

FLOAT_PRODUCT = "dequantized at each call"  # how a layer says that no kernel of narrowcast multiplies it


def quantized(problem: Problem, weight: str, activation: str) -> nn.Module:
    """The layer in one format, as nc.quantize makes it.

    Raises:
        UnavailableError: this combination has no kernel.
    """
    import narrowcast as nc

    # the full range of every block: which range is best does not change how fast it is multiplied
    rule = {"weight": weight, "method": {"rtn": {"range": "absmax"}}} | ({"input": activation} if activation else {})
    recipe = nc.Recipe.from_dict({"name": "benchmark", "rule": [rule]}, "benchmark")
    layer = nn.Linear(*reversed(problem.weight.shape))
    layer.weight.data, layer.bias.data = problem.weight.clone(), problem.bias.clone()
    data = [problem.samples] if "static" in activation else None
    try:
        module = nc.quantize(nn.Sequential(layer), recipe, data=data, progress=False).model[0]
    except nc.NarrowcastError as error:
        raise UnavailableError(str(error)) from error
    if FLOAT_PRODUCT in module.kernel:
        raise UnavailableError(f"no kernel yet: {module.kernel}")
    return module


def recipe_copies(
    weight: str, activation: str = "", dtype: torch.dtype = torch.float32
) -> Callable[[Problem], Callable[[], Prepare]]:
    """Copies of the layer in one format."""

    def copies(problem: Problem) -> Callable[[], Prepare]:
        with torch.inference_mode(False):
            module = quantized(problem, weight, activation)

        def one_more() -> Prepare:
            own = copy.deepcopy(module)

            def prepare(x: Tensor) -> Call:
                converted = x.to(dtype)
                for _ in range(CALLS_BEFORE):  # what is timed are the calls after the weight has found its layout
                    own(converted)
                return lambda: own(converted)

            return prepare

        return one_more

    return copies


def _dynamic(name: str, family: str, bits: float, weight: str, activation: str) -> Contender:
    return Contender(f"narrowcast {name}", family, "int8", bits, recipe_copies(weight, activation))


def _weight_only(name: str, family: str, bits: float, weight: str) -> list[Contender]:
    return [
        Contender(
            f"narrowcast {name} {str(dtype).removeprefix('torch.')}",
            family,
            str(dtype).removeprefix("torch."),
            bits,
            recipe_copies(weight, dtype=dtype),
        )
        for dtype in (torch.float32, torch.bfloat16)
    ]


CONTENDERS = (
    _dynamic("int8 uint8/token", INT8, 8, "int8/channel", "uint8/token"),
    _dynamic("int8 int8/token", INT8, 8, "int8/channel", "int8/token"),
    _dynamic("int8 static", INT8, 8, "int8/channel", "uint8/tensor static:minmax"),
    _dynamic("int4 g32", INT4, 4.5, "int4/group32", "int8/token"),
    _dynamic("int4 g32 asymmetric", INT4, 4.75, "int4/group32/asym", "int8/token"),
    _dynamic("int4 g128", INT4, 4.125, "int4/group128", "int8/token"),
    _dynamic("int4 per channel", INT4, 4, "int4/channel", "int8/token"),
    _dynamic("int3 g32", INT4, 3.5, "int3/group32", "int8/token"),
    _dynamic("int2 g32", INT4, 2.5, "int2/group32", "int8/token"),
    _dynamic("nf4 g32", INT4, 4.5, "nf4/group32", "int8/token"),
    *_weight_only("weight-only int8", INT8_WEIGHTS, 8, "int8/channel"),
    *_weight_only("weight-only int4 g32", INT4_WEIGHTS, 4.5, "int4/group32"),
    *_weight_only("weight-only int4 g128", INT4_WEIGHTS, 4.125, "int4/group128"),
)
