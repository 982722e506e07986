"""embedding_rows: rows of the dequantized table of every format, bit for bit, on every tier."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from tests.kernels.stored_cases import SPECS, stored_weight

Tiers = Callable[[], Iterator[str]]
OPS = torch.ops.narrowcast


@pytest.mark.parametrize("spec", SPECS)
def test_rows_are_those_of_the_dequantized_table(spec: str, every_tier: Tiers) -> None:
    for columns in (1, 33, 130):
        arguments, table = stored_weight(spec, 9, columns)
        for dtype in (torch.int64, torch.int32):
            for shape in ((), (0,), (5,), (3, 50)):
                indices = torch.randint(0, 9, shape, dtype=dtype)
                for tier in every_tier():
                    rows = OPS.embedding_rows(indices, *arguments, columns)
                    assert torch.equal(rows, table[indices.long()]), (tier, columns)


def test_non_contiguous_indices_and_tables(every_tier: Tiers) -> None:
    (codes, scale, *rest), table = stored_weight("int8", 20, 12)
    indices = torch.randint(0, 10, (6, 8)).t()[::2]
    for _ in every_tier():
        rows = OPS.embedding_rows(indices, codes[::2, ::3], scale[::2], *rest[:-1], 4, 4)
        assert torch.equal(rows, table[::2, ::3][indices])


@pytest.mark.parametrize("spec", ["int8", "int4/group32/asym", "nf4/group32"])
@pytest.mark.parametrize("bad", [-1, 11, 2**40])
def test_index_out_of_range_is_named(spec: str, bad: int) -> None:
    arguments, _ = stored_weight(spec, 11, 32)
    with pytest.raises(RuntimeError, match=rf"index {bad} at position 1"):
        OPS.embedding_rows(torch.tensor([[3, bad]]), *arguments, 32)


def test_wrong_arguments_are_errors() -> None:
    arguments, _ = stored_weight("int4/group32", 5, 32)
    indices = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="indices must be int64 or int32"):
        OPS.embedding_rows(indices.float(), *arguments, 32)
    with pytest.raises(RuntimeError, match="cannot hold"):
        OPS.embedding_rows(indices, *arguments, 40)
    with pytest.raises(RuntimeError, match="has no columns"):
        OPS.embedding_rows(indices, arguments[0][:, :0], arguments[1][:, :0], None, None, 4, 32, 0)


@pytest.mark.filterwarnings("ignore")
def test_opcheck_accepts_the_embedding_op() -> None:
    arguments, _ = stored_weight("int4/group32/asym", 5, 40)
    torch.library.opcheck(OPS.embedding_rows.default, (torch.tensor([[0, 4], [2, 1]]), *arguments, 40))
