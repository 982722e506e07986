"""GPTQ: columns are rounded one after another, and each rounding error is taken over by the columns that follow.

With H = mean of x x^T over the layer's inputs, storing q for a row w costs the squared output error
(q - w) H (q - w)^T. Once column j is fixed, the best that the columns not yet rounded can do is

    w_k -= (w_j - q_j) / U_jj * U_jk   for k after j,   inverse(H) = U^T U with U upper triangular.

Source:
    Frantar et al. 2023, GPTQ, arXiv:2210.17323, algorithm 1; rounding by descending activation is of the authors'
    code. Differs: ranges are searched under the diagonal of H instead of min and max; with updated scales a block's
    range is found when its first column is reached, in whatever order; after the last column, codes and scales are
    refined under H, see `descent.py`; a row that is worse than rounded to nearest is rounded to nearest; all sums are
    float64; damping is raised until H can be factored, which is done without inverting it, see `curvature.py`.

Behind layers that are quantized already the input is x and no longer the float model's x'. What stays nearest to the
float output W x' is then W + W D inverse(H) with D = mean of (x' - x) x^T; where D was observed, `correction` of that
way is gone before the first column is rounded.

Source:
    Li et al. 2025, GPTAQ, arXiv:2504.02692 (asymmetric calibration). Differs: the weight is moved once, before the
    sweep, instead of term by term in it, so ranges and descent aim at the moved weight too; and only a part of the
    way, as D is what calibration saw and not what comes.

Tried on stories260K and left out: choosing each range by the error that its own sweep leaves for good (11 scales, 3
zero points), four times the cost for a gain within the noise. Ranges under other weights than the diagonal of H, and
ten times more or less damping, are within the noise too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from narrowcast.core import QuantizedTensor, QuantSpec, block_shape
from narrowcast.errors import RecipeError
from narrowcast.methods.base import Need, Seen, Solved, check_weight
from narrowcast.methods.curvature import Curvature, curvature, factor
from narrowcast.methods.descent import Descent
from narrowcast.methods.draft import Draft
from narrowcast.methods.learned_draft import LearnedDraft
from narrowcast.methods.native import round_to_nearest
from narrowcast.methods.rtn import Rtn
from narrowcast.methods.scaled_draft import ScaledDraft
from narrowcast.methods.sweep import Sweep


@dataclass(frozen=True)
class Gptq:
    """GPTQ with searched ranges, then coordinate descent.

    Args:
        order: which columns are rounded first: "activation", those with the largest inputs; "group", the same but
            block by block, the block with the largest inputs first; "none", from left to right.
        scales: "updated", from the weights as they are when the first column of a block is reached; "static", from
            the weights as they were. 8-bit scales (scale:int8) hang together by rows and are always static; those of
            super-blocks (scale:k6) are updated under the float16 scale that the weights as they were asked for.
        correction: how much of the way to the weight that makes up for the error of earlier layers is gone, 0 to 1;
            only where that error was observed.
        damping: what is added to the diagonal of H, as a part of its mean; more where that is not enough.
        rounds: turns of coordinate descent at most; it stops when no code changes.
        range: of every block, as in `Rtn`.
        refinements: of the range search, as in `Rtn`.
        block: columns between two full updates; changes speed and memory, no code.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"hessian", "drift"})
    takes_levels: ClassVar[bool] = True
    order: Literal["activation", "group", "none"] = "activation"
    scales: Literal["updated", "static"] = "updated"
    correction: float = 0.5
    damping: float = 0.01
    rounds: int = 5
    range: Literal["auto", "mse", "absmax"] = "auto"
    refinements: int = 2
    block: int = 128

    def __post_init__(self) -> None:
        if self.order not in ("activation", "group", "none"):
            raise RecipeError(f"gptq: order is {self.order!r}; use 'activation', 'group' or 'none'")
        if self.scales not in ("static", "updated"):
            raise RecipeError(f"gptq: scales is {self.scales!r}; use 'static' or 'updated'")
        for name in ("correction", "damping"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise RecipeError(f"gptq: {name} is {value!r}; use a number from 0 to 1, like 0.01")
        for name, least in (("rounds", 0), ("block", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise RecipeError(f"gptq: {name} is {value!r}; use a whole number >= {least}")
        try:
            self._nearest()
        except RecipeError as error:
            raise RecipeError(f"gptq: {str(error).removeprefix('rtn: ')}") from None

    def solve(self, weight: Tensor, spec: QuantSpec, seen: Seen | None = None) -> Solved:
        """Codes and scales of a small output error under the Hessian of calibration.

        Args:
            weight: [out, in] float, finite; may be empty.
            spec: target format; any format, granularity and scale format.
            seen: its `hessian` [in, in], and `samples` for the notes.

        Returns:
            A record whose error tr((Q - W) H (Q - W)^T) is at most that of round-to-nearest. With uncorrelated inputs
            it is that of `Rtn` under the diagonal of H, bit for bit.

        Raises:
            ModelError: the weight is not a finite float matrix.
            DataError: there is no Hessian, or it does not fit the weight or is not finite.
            FormatError: a scale is larger than the scale format can hold.
        """
        weight = check_weight(weight)
        known = curvature(seen, weight.shape[1], weight.device)
        if spec.format.is_cast or weight.numel() == 0:
            why = f"{spec} has no scales" if weight.numel() else "the weight is empty"
            return Solved(round_to_nearest(weight, spec), (f"{why}: rounded to nearest",))
        importance = Seen(importance=known.importance)
        if not known.correlated:
            plain = self._nearest().quantize(weight, spec, importance)
            return Solved(plain, known.notes or ("no two inputs are correlated: rounded to nearest",))
        wide = block_shape(spec.granularity, (weight.shape[0], weight.shape[1]))[1]
        order = _order(self.order, known.importance, wide)
        factored = factor(known.hessian, order, self.damping)
        weight, moved = _corrected(weight, known.drift, (order, factored.factor), self.correction)
        plain = self._nearest().quantize(weight, spec, importance)
        draft = _draft_of(plain)
        transposed = weight.t().to(torch.float64)
        self._sweep_(draft, transposed, order, known, factored.factor)
        notes = (
            known.notes + factored.notes + moved + _keep_better_(draft, _draft_of(plain), transposed, factored.hessian)
        )
        descent = Descent(transposed, draft, factored.hessian, block=self.block)
        for _ in range(self.rounds):
            descent.refit_scales_()
            if not descent.refine_codes_():
                break
        return Solved(draft.record(), notes)

    def quantize(self, weight: Tensor, spec: QuantSpec, seen: Seen | None = None) -> QuantizedTensor:
        """The record of `solve` alone."""
        return self.solve(weight, spec, seen).record

    def _nearest(self) -> Rtn:
        return Rtn(self.range, self.refinements)

    def _sweep_(self, draft: Draft, weight: Tensor, order: Tensor, known: Curvature, factor: Tensor) -> None:
        sweep = Sweep(weight[order], factor, self.block)
        columns = order.tolist()
        # one block of columns has no weights before it that could have updated it
        updated = self.scales == "updated" and draft.groups > 1 and draft.spec.scale_format != "int8"
        begun: set[int] = set()

        def round_column(position: int, values: Tensor) -> Tensor:
            group = columns[position] // draft.wide
            if updated and group not in begun:
                begun.add(group)
                self._choose_scale_(draft, group, sweep, (order, known.importance))
            return draft.round_column_(columns[position], values)

        sweep.run(round_column)

    def _choose_scale_(self, draft: Draft, group: int, sweep: Sweep, columns: tuple[Tensor, Tensor]) -> None:
        """The range of a block of columns from what they are by now."""
        order, importance = columns
        part = draft.columns(group)
        positions = order.argsort()[part]
        now = sweep.current(positions).t().to(torch.float32).contiguous()
        draft.adopt_(group, self._nearest().quantize(now, draft.spec, Seen(importance=importance[part])))


def _draft_of(record: QuantizedTensor) -> Draft:
    return LearnedDraft.of(record) if record.spec.format.learned else ScaledDraft.of(record)


def _order(name: str, importance: Tensor, wide: int) -> Tensor:
    """The columns [in] in the order in which they are rounded; equal ones from left to right."""
    columns = torch.arange(importance.numel(), device=importance.device)
    if name == "none":
        return columns
    order = importance.argsort(descending=True, stable=True)
    if name == "activation":
        return order
    groups = columns // wide
    sums = torch.zeros_like(importance).index_add_(0, groups, importance)
    counts = torch.bincount(groups, minlength=importance.numel()).clamp(min=1)
    rank = (sums / counts).argsort(descending=True, stable=True).argsort()
    return order[rank[groups[order]].argsort(stable=True)]


def _corrected(
    weight: Tensor, drift: Tensor | None, inverse: tuple[Tensor, Tensor], part: float
) -> tuple[Tensor, tuple[str, ...]]:
    """`part` of the way to the weight that on x comes nearest to what `weight` gives on x'; says how far that is."""
    if drift is None or part == 0:
        return weight, ()
    order, upper = inverse
    pulled = (weight.to(torch.float64) @ drift)[:, order] @ upper.t() @ upper
    step = torch.empty_like(pulled)
    step[:, order] = pulled * part
    moved = (weight + step).to(torch.float32)
    size = float(step.norm() / weight.norm()) if bool(weight.any()) else 0.0
    return moved, (f"weights moved by {100 * size:.2g} % to make up for the error of earlier layers",)


def _keep_better_(draft: Draft, plain: Draft, weight: Tensor, hessian: Tensor) -> tuple[str, ...]:
    """Rows that came out worse than rounded to nearest become `plain` again; says how many."""
    errors = [(d.values - weight).mul(hessian @ (d.values - weight)).sum(0) for d in (draft, plain)]
    worse = draft.sum_rows(errors[0]) > draft.sum_rows(errors[1])
    if not bool(worse.any()):
        return ()
    draft.take_rows_(plain, worse)
    return (f"{int(draft.by_row(worse).sum())} of {weight.shape[1]} rows are better rounded to nearest",)
