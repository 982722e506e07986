"""Coordinate descent on codes and scales under a Hessian: what is left to gain once every weight has a code.

With W the float weight, Q what is stored and H the Hessian, the squared output error is

    E = sum over rows of (q - w) H (q - w)^T,    P = (Q - W) H, half of its slope

Alone, code (r, j) is best at the level nearest to q_rj - p_rj / H_jj, and the scale of a block with levels
u = q / s is best at s - sum(u * p) / sum(u * (u H)): a parabola in s, of which the nearest stored scale is taken.
Learned levels of a block are found together, see `learned_draft.py`. Columns and blocks take turns. No step raises E,
so the result is never worse than what it started from.

Source:
    Behdin et al. 2023, QuantEase, arXiv:2309.01885, algorithm 2 (codes). Differs: it starts from the codes of GPTQ
    instead of zeros, scales take part, and the products with H are made block by block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from narrowcast.methods.draft import Draft


class Descent:
    """A draft that is being refined.

    Args:
        weight: [in, out] float64, the float weight, transposed.
        draft: what is refined, in place.
        hessian: [in, in] float64 H, symmetric, positive diagonal.
        block: columns between two full updates of the slope; changes the speed only.
    """

    def __init__(self, weight: Tensor, draft: Draft, hessian: Tensor, *, block: int) -> None:
        self._draft, self._hessian, self._block = draft, hessian, block
        self._slope = hessian @ (draft.values - weight)

    def refine_codes_(self) -> int:
        """One turn of every column; returns how many codes changed."""
        changed = 0
        columns = self._slope.shape[0]
        for start in range(0, columns, self._block):
            stop = min(start + self._block, columns)
            steps = torch.zeros_like(self._slope[start:stop])
            for column in range(start, stop):
                steps[column - start] = step = self._refine_column_(column)
                changed += int(torch.count_nonzero(step))
                self._slope[start:stop].addr_(self._hessian[start:stop, column], step)
            self._slope[:start].addmm_(self._hessian[:start, start:stop], steps)
            self._slope[stop:].addmm_(self._hessian[stop:, start:stop], steps)
        return changed

    def _refine_column_(self, column: int) -> Tensor:
        before = self._draft.values[column].clone()
        best = before - self._slope[column] / self._hessian[column, column]
        return self._draft.round_column_(column, best) - before

    def refit_scales_(self) -> None:
        """One turn of every block's scale, or of its learned levels, with the codes as they are."""
        for group in range(self._draft.groups):
            columns = self._draft.columns(group)
            change = self._draft.refit_(group, self._slope[columns], self._hessian[columns, columns])
            self._slope.addmm_(self._hessian[:, columns], change)
