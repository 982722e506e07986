"""Weights whose scales or levels a kernel reads in a wider form than they are stored in."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.nn.oracles import noise, record
from torch import nn
from torch.nn.functional import linear

from narrowcast.core import QuantSpec
from narrowcast.nn import QuantizedEmbedding, QuantizedLinear

SPECS = (
    "int4/group32/asym/scale:k6",
    "int6/group16/asym/scale:k6",
    "nf4/group32/scale:k6",
    "codebook3",
    "codebook2/group32",
)


def layer(spec: str, seed: int = 0) -> QuantizedLinear:
    return QuantizedLinear(QuantSpec.parse(spec), (9, 172), record=record(noise(9, 172, seed=seed), spec))


@pytest.mark.parametrize("spec", SPECS)
def test_the_wider_form_is_made_once_and_never_saved(spec: str) -> None:
    module = layer(spec)
    stored = module.stored("weight")
    assert set(module.state_dict()) == {f"weight_{suffix}" for suffix in stored.layout()}
    arguments = stored.kernel_arguments(module)
    assert arguments is not None
    assert arguments[1] is module.get_buffer("weight_kernel_scale")
    assert sum(t.nbytes for t in module.state_dict().values()) == round(
        stored.spec.bits_per_value((9, 172)) * 9 * 172 / 8
    )


@pytest.mark.parametrize("spec", SPECS)
def test_other_weights_are_read_after_a_state_dict_was_loaded(spec: str) -> None:
    module, other, x = layer(spec), layer(spec, seed=1), noise(3, 172)
    assert not torch.equal(module(x), other(x))
    module.load_state_dict(other.state_dict())
    assert torch.equal(module(x), other(x))
    assert torch.equal(copy.deepcopy(module).half()(x.half()), other.half()(x.half()))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("tokens", [1, 3, 4, 9, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_any_number_of_tokens_meets_the_dequantized_weight(spec: str, tokens: int, dtype: torch.dtype) -> None:
    module, x = layer(spec), noise(tokens, 172, seed=2).to(dtype)
    expected = linear(x.float(), record(noise(9, 172), spec).dequantize())
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    assert float((module(x).float() - expected).abs().max()) <= tolerance * float(expected.abs().max())


@pytest.mark.parametrize("spec", [*SPECS, "codebook4/tensor"])
def test_rows_of_a_table_are_looked_up(spec: str) -> None:
    table = record(noise(20, 96), spec)
    module = QuantizedEmbedding(QuantSpec.parse(spec), (20, 96), record=table)
    indices = torch.tensor([[3, 19], [0, 3]])
    assert torch.equal(module(indices), table.dequantize()[indices])


def test_the_kernel_is_named_and_blocks_of_several_rows_are_dequantized_by_torch() -> None:
    assert layer("codebook3").kernel == layer("int3/group32").kernel
    assert layer("int4/group32/scale:k6").kernel == layer("int4/group32").kernel
    assert layer("codebook2/tensor").kernel == "torch linear, weight dequantized at each call"
    assert isinstance(layer("codebook2/tensor"), nn.Module)
