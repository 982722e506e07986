"""Which values share one scale, as one block view.

A matrix is cut into rectangles; every rectangle has one scale and one zero point. All reshaping into and
out of rectangles is done here, so no other room does arithmetic on group sizes.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import pad

from narrowcast.errors import FormatError


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole matrix."""

    def __str__(self) -> str:
        return "tensor"


@dataclass(frozen=True)
class PerChannel:
    """One scale for every row: the output channel of a weight."""

    def __str__(self) -> str:
        return "channel"


@dataclass(frozen=True)
class PerToken:
    """One scale for every row of an activation matrix [tokens, features], found when it arrives."""

    def __str__(self) -> str:
        return "token"


@dataclass(frozen=True)
class PerGroup:
    """One scale for every `size` consecutive values of a row; the last group of a row may be shorter."""

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise FormatError(f"group size must be at least 1, got {self.size}")

    def __str__(self) -> str:
        return f"group{self.size}"


@dataclass(frozen=True)
class PerBlock:
    """One scale for every tile of `rows` x `columns`; tiles at the edges may be smaller."""

    rows: int
    columns: int

    def __post_init__(self) -> None:
        if self.rows < 1 or self.columns < 1:
            raise FormatError(f"block sides must be at least 1, got {self.rows}x{self.columns}")

    def __str__(self) -> str:
        return f"block{self.rows}x{self.columns}"


Granularity = PerTensor | PerChannel | PerToken | PerGroup | PerBlock

_PLAIN: dict[str, Granularity] = {"tensor": PerTensor(), "channel": PerChannel(), "token": PerToken()}


def parse_granularity(text: str) -> Granularity:
    """The granularity that prints as `text`: tensor, channel, token, group32, block16x16.

    Raises:
        FormatError: `text` is none of these.
    """
    if text in _PLAIN:
        return _PLAIN[text]
    if match := re.fullmatch(r"group([0-9]+)", text):
        return PerGroup(int(match[1]))
    if match := re.fullmatch(r"block([0-9]+)x([0-9]+)", text):
        return PerBlock(int(match[1]), int(match[2]))
    raise FormatError(f"granularity {text!r} is not known; use tensor, channel, token, group<size> or block<r>x<c>")


def block_shape(granularity: Granularity, shape: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of one block of a matrix of `shape`; never zero, so an empty matrix has no blocks."""
    rows, columns = shape
    match granularity:
        case PerTensor():
            return max(rows, 1), max(columns, 1)
        case PerChannel() | PerToken():
            return 1, max(columns, 1)
        case PerGroup(size):
            return 1, min(size, max(columns, 1))
        case PerBlock(block_rows, block_columns):
            return min(block_rows, max(rows, 1)), min(block_columns, max(columns, 1))


def scale_shape(granularity: Granularity, shape: tuple[int, int]) -> tuple[int, int]:
    """[block_rows, block_columns]: how many scales a matrix of `shape` has each way."""
    block_rows, block_columns = block_shape(granularity, shape)
    return math.ceil(shape[0] / block_rows), math.ceil(shape[1] / block_columns)


def to_blocks(matrix: Tensor, granularity: Granularity) -> Tensor:
    """The matrix as a list of blocks, every block flattened.

    Args:
        matrix: [rows, columns] any dtype.
        granularity: how the matrix is cut.

    Returns:
        blocks: [block_rows, block_columns, elements]; blocks that reach over an edge are filled with zeros, which
        change neither a range that contains 0 nor an error.
    """
    rows, columns = matrix.shape
    tall, wide = block_shape(granularity, (rows, columns))
    down, across = scale_shape(granularity, (rows, columns))
    if (missing := (across * wide - columns, down * tall - rows)) != (0, 0):
        matrix = pad(matrix, (0, missing[0], 0, missing[1]))
    return matrix.reshape(down, tall, across, wide).transpose(1, 2).reshape(down, across, tall * wide)


def from_blocks(blocks: Tensor, granularity: Granularity, shape: tuple[int, int]) -> Tensor:
    """The inverse of `to_blocks`: the matrix [rows, columns] without the filling.

    Args:
        blocks: [block_rows, block_columns, elements].
        granularity: how the matrix was cut.
        shape: (rows, columns) of the matrix.
    """
    tall, wide = block_shape(granularity, shape)
    down, across = scale_shape(granularity, shape)
    matrix = blocks.reshape(down, across, tall, wide).transpose(1, 2).reshape(down * tall, across * wide)
    return matrix[: shape[0], : shape[1]].contiguous()


def expand_to_matrix(per_block: Tensor, granularity: Granularity, shape: tuple[int, int]) -> Tensor:
    """One value per block [block_rows, block_columns] repeated to every element it governs [rows, columns]."""
    tall, wide = block_shape(granularity, shape)
    down, across = per_block.shape
    repeated = per_block[:, None, :, None].expand(down, tall, across, wide).reshape(down * tall, across * wide)
    return repeated[: shape[0], : shape[1]]
