"""embedding_int8 and embedding_int4: rows of the dequantized table, bit for bit, on every tier."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from narrowcast.kernels.reference import dequantize_int4, dequantize_int8

Tiers = Callable[[], Iterator[str]]
OPS = torch.ops.narrowcast


@pytest.mark.parametrize("columns", [1, 15, 64, 129])
@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3), (40, 50)])
def test_int8_rows_are_the_dequantized_table(columns: int, shape: tuple[int, ...], every_tier: Tiers) -> None:
    weight = torch.randint(-128, 128, (11, columns), dtype=torch.int8)
    scale = torch.rand(11) + 0.1
    table = dequantize_int8(weight, scale)
    for dtype in (torch.int64, torch.int32):
        indices = torch.randint(0, 11, shape, dtype=dtype)
        for _ in every_tier():
            assert torch.equal(OPS.embedding_int8(indices, weight, scale), table[indices.long()])


@pytest.mark.parametrize("columns, group", [(1, 1), (7, 7), (64, 32), (65, 32), (130, 64)])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_int4_rows_are_the_dequantized_table(columns: int, group: int, asymmetric: bool, every_tier: Tiers) -> None:
    weight = torch.randint(0, 256, (9, -(-columns // 2)), dtype=torch.uint8)
    groups = -(-columns // group)
    scale = (torch.rand(9, groups) + 0.1).half()
    zero_point = torch.randint(0, 16, (9, groups), dtype=torch.uint8) if asymmetric else None
    table = dequantize_int4(weight, scale, zero_point, group, columns)
    indices = torch.randint(0, 9, (3, 50))
    for _ in every_tier():
        assert torch.equal(OPS.embedding_int4(indices, weight, scale, zero_point, group, columns), table[indices])


def test_non_contiguous_indices_and_tables(every_tier: Tiers) -> None:
    weight = torch.randint(-127, 128, (20, 12), dtype=torch.int8)[::2, ::3]
    scale = torch.rand(20)[::2]
    indices = torch.randint(0, 10, (6, 8)).t()[::2]
    for _ in every_tier():
        assert torch.equal(OPS.embedding_int8(indices, weight, scale), dequantize_int8(weight, scale)[indices])


@pytest.mark.parametrize("bad", [-1, 11, 2**40])
def test_index_out_of_range_is_named(bad: int) -> None:
    weight, scale = torch.zeros(11, 4, dtype=torch.int8), torch.ones(11)
    with pytest.raises(RuntimeError, match=rf"index {bad} at position 1"):
        OPS.embedding_int8(torch.tensor([[3, bad]]), weight, scale)
    packed, halves = torch.zeros(11, 2, dtype=torch.uint8), torch.ones(11, 1, dtype=torch.float16)
    with pytest.raises(RuntimeError, match=rf"index {bad} at position 1"):
        OPS.embedding_int4(torch.tensor([[3, bad]]), packed, halves, None, 4, 4)


def test_wrong_arguments_are_errors() -> None:
    indices, weight, scale = torch.zeros(2, dtype=torch.int64), torch.zeros(5, 4, dtype=torch.int8), torch.ones(5)
    with pytest.raises(RuntimeError, match="indices must be int64 or int32"):
        OPS.embedding_int8(indices.float(), weight, scale)
    with pytest.raises(RuntimeError, match="4 entries for 5 rows"):
        OPS.embedding_int8(indices, weight, scale[:4])
    with pytest.raises(RuntimeError, match="weight must be int8"):
        OPS.embedding_int8(indices, weight.float(), scale)
    packed, halves = torch.zeros(5, 2, dtype=torch.uint8), torch.ones(5, 1, dtype=torch.float16)
    with pytest.raises(RuntimeError, match="cannot hold"):
        OPS.embedding_int4(indices, packed, halves, None, 32, 9)
    with pytest.raises(RuntimeError, match="expected"):
        OPS.embedding_int4(indices, packed, halves, None, 2, 4)


@pytest.mark.filterwarnings("ignore")
def test_opcheck_accepts_the_embedding_ops() -> None:
    indices = torch.tensor([[0, 4], [2, 1]])
    weight = torch.randint(-127, 128, (5, 6), dtype=torch.int8)
    torch.library.opcheck(OPS.embedding_int8.default, (indices, weight, torch.rand(5)))
    packed, scale = torch.randint(0, 256, (5, 3), dtype=torch.uint8), torch.rand(5, 3).half()
    torch.library.opcheck(OPS.embedding_int4.default, (indices, packed, scale, None, 2, 6))
