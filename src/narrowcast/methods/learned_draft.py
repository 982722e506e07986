"""A draft in a format with learned levels: value = levels[code], a table for every block.

With the codes fixed, E is a parabola in the levels of a block. With U_l = 1 where the code is l and P half the slope,

    change of E = 2 d g + d G d^T,    g_l = sum(U_l P),  G_lm = sum(U_l (H U_m)),    least at d = -inverse(G) g

so all levels of a block are found together, at the cost of one product with H per level.

Source:
    Levels under a Hessian: the codebook update of GPTVQ (van Baalen et al. 2024, arXiv:2402.15319). Differs: one
    dimension, and a linear system instead of gradient descent.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from narrowcast.core import QuantizedTensor, nearest_levels
from narrowcast.methods.draft import Draft, as_float32

_LARGEST_LEVEL = 65504.0
# Part of the mean diagonal that keeps levels without a code, and those that H cannot tell apart, where they are.
_DAMPING = 1e-9


@dataclass
class LearnedDraft(Draft):
    """Codes and levels that are still being found.

    Args:
        tables: [block_rows, block_columns, 2^bits] float32 of float16 numbers, ascending.
    """

    tables: Tensor

    @classmethod
    def of(cls, record: QuantizedTensor) -> LearnedDraft:
        """A draft that starts as `record`, sharing nothing with it."""
        assert record.levels is not None
        values = record.dequantize().t().to(torch.float64).contiguous()
        codes = record.codes.t().contiguous().clone()
        return cls(record.spec, record.shape, codes, values, record.levels.clone())

    def record(self) -> QuantizedTensor:
        """See `Draft`."""
        return QuantizedTensor(self.codes.t().contiguous(), None, None, self.spec, self.tables)

    def round_column_(self, column: int, wanted: Tensor) -> Tensor:
        """See `Draft`."""
        tables = self._tables_by_row(column // self.wide)
        codes = nearest_levels(as_float32(wanted).unsqueeze(1), tables)
        self.codes[column] = codes[:, 0]
        self.values[column] = tables.gather(1, codes.to(torch.int64))[:, 0].to(torch.float64)
        return self.values[column]

    def adopt_(self, group: int, found: QuantizedTensor) -> None:
        """See `Draft`."""
        assert found.levels is not None
        self.tables[:, group] = found.levels[:, 0]

    def refit_(self, group: int, slope: Tensor, hessian: Tensor) -> Tensor:
        """See `Draft`; codes change only to follow their levels where these change places."""
        columns, count = self.columns(group), self.tables.shape[2]
        codes = self.codes[columns].to(torch.int64)
        zeros = slope.new_zeros(count, self.shape[0])
        falling = self.sum_rows(zeros.scatter_add(0, codes, slope)).t()
        curved = torch.stack(
            [self.sum_rows(zeros.scatter_add(0, codes, hessian @ (codes == level).to(slope))) for level in range(count)]
        ).permute(2, 0, 1)
        damped = curved + torch.eye(count).to(curved) * self._damping(curved)
        old = self.tables[:, group].to(torch.float64)
        best = old - torch.linalg.solve(damped, falling.unsqueeze(-1)).squeeze(-1)
        new = best.clamp(-_LARGEST_LEVEL, _LARGEST_LEVEL).to(torch.float16).to(torch.float64)
        step = new - old
        gain = (2 * step * falling).sum(1) + (step.unsqueeze(1) @ curved @ step.unsqueeze(2))[:, 0, 0]
        new = torch.where((gain < 0).unsqueeze(1), new, old)
        return self._move_(group, codes, new)

    def _damping(self, curved: Tensor) -> Tensor:
        mean = curved.diagonal(dim1=1, dim2=2).mean(1)
        return torch.where(mean > 0, mean * _DAMPING, 1.0)[:, None, None]

    def _move_(self, group: int, codes: Tensor, levels: Tensor) -> Tensor:
        """Give a block of columns other levels [block_rows, 2^bits]; returns by how much its values moved."""
        columns = self.columns(group)
        ordered, order = levels.sort(dim=1, stable=True)
        rank = self.by_row(order.argsort(1).t())
        self.tables[:, group] = ordered.to(torch.float32)
        self.codes[columns] = rank.gather(0, codes).to(torch.uint8)
        moved = self.by_row(levels.t()).gather(0, codes)
        change = moved - self.values[columns]
        self.values[columns] = moved
        return change

    def _tables_by_row(self, group: int) -> Tensor:
        """The levels [out, 2^bits] of every row in a block of columns."""
        return self.tables[:, group].repeat_interleave(self.tall, 0)[: self.shape[0]]

    def take_rows_(self, other: Draft, blocks: Tensor) -> None:
        """See `Draft`."""
        assert isinstance(other, LearnedDraft)
        self.tables[blocks] = other.tables[blocks]
        self.take_codes_(other, self.by_row(blocks))
