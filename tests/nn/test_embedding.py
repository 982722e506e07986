"""QuantizedEmbedding: rows of the dequantized table, in every format."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.nn.oracles import noise, record, restored
from tests.nn.test_linear import EVERY_FORMAT
from torch.nn.functional import embedding

from narrowcast.core import QuantSpec
from narrowcast.nn import QuantizedEmbedding

INDICES = torch.tensor([[0, 19, 3], [3, 3, 7]])


def made(spec: str, rows: int = 20, columns: int = 76, padding_idx: int | None = None) -> QuantizedEmbedding:
    table = record(noise(rows, columns), spec)
    return QuantizedEmbedding(QuantSpec.parse(spec), (rows, columns), record=table, padding_idx=padding_idx)


@pytest.mark.parametrize("spec", EVERY_FORMAT)
def test_rows_of_every_format_are_the_rows_of_the_dequantized_table(spec: str) -> None:
    module = made(spec)
    table = record(noise(20, 76), spec).dequantize()
    assert torch.equal(module(INDICES), embedding(INDICES, table))
    assert torch.equal(module.weight, table)
    assert module(INDICES).dtype == torch.float32


@pytest.mark.parametrize("spec", EVERY_FORMAT)
def test_settings_and_stored_tensors_rebuild_the_module(spec: str) -> None:
    module = made(spec, padding_idx=3)
    again = restored(module)
    assert again.quantized_weights() == module.quantized_weights()
    assert torch.equal(again(INDICES), module(INDICES))
    assert torch.equal(copy.deepcopy(module)(INDICES), module(INDICES))


@pytest.mark.parametrize(("spec", "kernel"), [
    ("int8", "embedding_rows"), ("int4/group32/asym", "embedding_rows"), ("int8/tensor", "embedding_rows"),
    ("nf4/group32", "embedding_rows"), ("int8/block2x8", "torch"), ("fp16", "torch"),
])  # fmt: skip
def test_the_kernel_is_named(spec: str, kernel: str) -> None:
    assert made(spec).kernel.startswith(kernel)


@pytest.mark.parametrize("spec", ["int8", "int4/group32/asym", "fp8_e4m3", "uint8"])
@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 3, 4), (2, 0)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_any_shape_of_indices_works(shape: tuple[int, ...], spec: str, dtype: torch.dtype) -> None:
    indices = torch.full(shape, 7, dtype=dtype)
    module = made(spec)
    assert module(indices).shape == (*shape, 76)
    assert torch.equal(module(indices), module.weight[indices.long()])


@pytest.mark.parametrize("spec", ["int8", "int4/group32", "fp16", "nf4/group32"])
@pytest.mark.parametrize("index", [-1, 20])
def test_an_index_outside_the_table_is_an_error(index: int, spec: str) -> None:
    with pytest.raises((IndexError, RuntimeError)):
        made(spec)(torch.tensor([0, index]))


@pytest.mark.parametrize("spec", ["int8", "int4/group32", "fp16"])
def test_the_padding_row_is_a_row_like_all_others(spec: str) -> None:
    module = made(spec, padding_idx=3)
    assert module.padding_idx == 3
    assert torch.equal(module(INDICES), made(spec)(INDICES))


@given(
    rows=st.integers(1, 30),
    columns=st.integers(1, 70),
    spec=st.sampled_from(["int8", "int4/group32/asym", "int3/group8"]),
)
def test_every_size_of_table_works(rows: int, columns: int, spec: str) -> None:
    module = made(spec, rows, columns)
    indices = torch.arange(rows).flip(0)
    assert torch.equal(module(indices), record(noise(rows, columns), spec).dequantize().flip(0))
