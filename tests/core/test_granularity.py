"""The block view: cutting a matrix into blocks and putting it together again, for every shape."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from narrowcast.core import (
    Granularity,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    block_shape,
    expand_to_matrix,
    from_blocks,
    parse_granularity,
    scale_shape,
    to_blocks,
)
from narrowcast.errors import FormatError

GRANULARITIES = st.one_of(
    st.sampled_from([PerTensor(), PerChannel(), PerToken()]),
    st.builds(PerGroup, st.integers(1, 20)),
    st.builds(PerBlock, st.integers(1, 8), st.integers(1, 20)),
)
SIDE = st.integers(0, 17)


def numbered(rows: int, columns: int) -> torch.Tensor:
    return torch.arange(1.0, rows * columns + 1).reshape(rows, columns)


@given(GRANULARITIES, SIDE, SIDE)
def test_from_blocks_undoes_to_blocks(granularity: Granularity, rows: int, columns: int) -> None:
    matrix = numbered(rows, columns)
    blocks = to_blocks(matrix, granularity)
    assert torch.equal(from_blocks(blocks, granularity, (rows, columns)), matrix)
    assert blocks.shape[:2] == scale_shape(granularity, (rows, columns))


@given(GRANULARITIES, SIDE, SIDE)
def test_an_element_and_its_block_share_the_expanded_value(granularity: Granularity, rows: int, columns: int) -> None:
    down, across = scale_shape(granularity, (rows, columns))
    per_block = numbered(down, across)
    expanded = expand_to_matrix(per_block, granularity, (rows, columns))
    assert expanded.shape == (rows, columns)
    blocks = to_blocks(expanded, granularity)
    own = per_block[:, :, None].expand_as(blocks)
    assert torch.equal(blocks[blocks != 0], own[blocks != 0])


@given(GRANULARITIES, SIDE, SIDE)
def test_ragged_blocks_are_filled_with_zeros_only(granularity: Granularity, rows: int, columns: int) -> None:
    matrix = numbered(rows, columns)
    blocks = to_blocks(matrix, granularity)
    assert torch.equal(blocks[blocks != 0].sort().values, matrix.flatten())


@pytest.mark.parametrize(
    ("granularity", "shape", "scales"),
    [
        (PerTensor(), (4, 10), (1, 1)),
        (PerChannel(), (4, 10), (4, 1)),
        (PerToken(), (4, 10), (4, 1)),
        (PerGroup(4), (4, 10), (4, 3)),
        (PerGroup(32), (4, 10), (4, 1)),
        (PerBlock(3, 4), (4, 10), (2, 3)),
        (PerTensor(), (0, 10), (0, 1)),
        (PerChannel(), (4, 0), (4, 0)),
    ],
    ids=str,
)
def test_scale_shape_counts_ragged_blocks(
    granularity: Granularity, shape: tuple[int, int], scales: tuple[int, int]
) -> None:
    assert scale_shape(granularity, shape) == scales


def test_a_group_wider_than_the_row_is_the_row() -> None:
    assert block_shape(PerGroup(32), (4, 10)) == (1, 10)


def test_blocks_of_a_tile_are_read_row_by_row() -> None:
    blocks = to_blocks(numbered(2, 4), PerBlock(2, 2))
    assert blocks.tolist() == [[[1, 2, 5, 6], [3, 4, 7, 8]]]


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16])
def test_codes_of_every_storage_dtype_can_be_cut(dtype: torch.dtype) -> None:
    codes = numbered(3, 7).to(dtype)
    again = from_blocks(to_blocks(codes, PerBlock(2, 4)), PerBlock(2, 4), (3, 7))
    assert again.dtype == dtype
    assert torch.equal(again.to(torch.float32), codes.to(torch.float32))


@given(GRANULARITIES)
def test_granularity_parses_what_it_prints(granularity: Granularity) -> None:
    assert parse_granularity(str(granularity)) == granularity


@pytest.mark.parametrize(
    "text", ["", "rows", "group", "group-1", "group3.5", "block4", "block4x", "group\u0663", "tensor "]
)
def test_an_unknown_granularity_is_an_error(text: str) -> None:
    with pytest.raises(FormatError, match="is not known; use tensor, channel"):
        parse_granularity(text)


@pytest.mark.parametrize("text", ["group0", "block0x4", "block4x0"])
def test_a_block_without_elements_is_an_error(text: str) -> None:
    with pytest.raises(FormatError, match="must be at least 1"):
        parse_granularity(text)
