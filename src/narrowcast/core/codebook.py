"""Learned levels: the 2^bits numbers per block that stand for its values with the least weighted squared error.

    minimise over levels l and codes c    sum_i h_i (x_i - l[c_i])^2

In one dimension that is solved exactly: the best clusters are runs of the sorted values, so dynamic programming over
where runs end finds the best of all. With W, X and Q the sums of h, h x and h x^2 over the values i..j-1,

    cost(i, j) = Q - X^2 / W,    D_1(j) = cost(0, j),    D_m(j) = min over i < j of D_{m-1}(i) + cost(i, j)

Blocks of more than 256 values are first summed up in 128 bins, so that the work does not grow with the square of the
width; Lloyd's iteration on all values then ends where no value changes its run. Bins are equal parts of the integral of
(h density)^(1/3), which is where levels are dense too.

Source:
    Sensitivity-weighted levels: SqueezeLLM (Kim et al. 2023, arXiv:2306.07629, section 4.1). Differs: h is the
    importance of the input channel, as in every solver here, not the Fisher information of a weight; the minimum is
    exact, not the one that k-means++ reaches. Dynamic programming: Wang & Song 2011, "Ckmeans.1d.dp" (R Journal 3/2).
    Density of levels: Panter & Dite 1951.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Values of a block that are solved exactly, and bins of a longer one.
_EXACT = 256
_BINS = 128
_LLOYD_ROUNDS = 100
# Blocks times costs held at once, in float64: a few MB, near the processor.
_AT_ONCE = 1 << 18
# A weight below this is none.
_TINY = 1e-30


def learn_levels(blocks: Tensor, counts: Tensor, bits: int) -> Tensor:
    """The best levels of every block.

    Args:
        blocks: [block_rows, block_columns, elements] float32, finite, within float16.
        counts: of that shape, >= 0: what each squared error counts; where it is 0 there is no value.
        bits: of a code.

    Returns:
        levels: [block_rows, block_columns, 2^bits] float32 with float16 values, ascending. Every level is the nearest
            of some value; where a block needs fewer, the last one stands in all places that are left. A block of no
            more than 2^bits float16 numbers has just these as its levels.
    """
    down, across, elements = blocks.shape
    levels = blocks.new_zeros(down * across, 2**bits)
    if blocks.numel():
        bins = elements if elements <= _EXACT else _BINS
        rows = max(1, _AT_ONCE // (bins * bins))
        flat, weights = blocks.reshape(-1, elements), counts.reshape(-1, elements)
        for start in range(0, flat.shape[0], rows):
            part = slice(start, start + rows)
            levels[part] = _learn(_Sorted(flat[part], weights[part]), 2**bits)
    return levels.reshape(down, across, 2**bits)


def nearest_levels(blocks: Tensor, levels: Tensor) -> Tensor:
    """The code of the level nearest to each value; of two as near the lower, of equal ones the first.

    Args:
        blocks: [..., elements] float32.
        levels: [..., 2^bits] float32, ascending.

    Returns:
        codes: [..., elements] uint8.
    """
    # half by half: the sum of two large levels could overflow
    middle = levels[..., :-1] / 2 + levels[..., 1:] / 2
    codes = torch.searchsorted(middle.contiguous(), blocks.contiguous())
    first = torch.searchsorted(levels.contiguous(), levels.contiguous())
    return first.gather(-1, codes).to(torch.uint8)


class _Sorted:
    """Rows of values in ascending order and the running sums that the cost of a run is made of.

    Args:
        values: [rows, n] float32.
        counts: [rows, n] >= 0.

    Attributes:
        values: [rows, n] float64, ascending; where nothing counts the row's largest value stands.
        sums: [3, rows, n + 1] float64: h, h x and h x^2 of the values before each position.
    """

    def __init__(self, values: Tensor, counts: Tensor) -> None:
        largest = torch.where(counts > 0, values, -torch.inf).amax(1, keepdim=True)
        largest = torch.where(torch.isfinite(largest), largest, 0.0)
        ordered, order = torch.where(counts > 0, values, largest).sort(1)
        weights = counts.gather(1, order).to(torch.float64)
        self.values = ordered.to(torch.float64)
        # around the row's mean: the cost is a small difference of these sums
        self.mean = _total(weights * self.values) / _total(weights).clamp(min=_TINY)
        centred = self.values - self.mean
        parts = torch.stack([weights, weights * centred, weights * centred.square()])
        self.sums = torch.nn.functional.pad(parts.cumsum(-1), (1, 0))

    def ends_of_bins(self) -> Tensor:
        """Positions [rows, bins + 1] between which values are taken together."""
        rows, elements = self.values.shape
        if elements <= _EXACT:
            return torch.arange(elements + 1, device=self.values.device).expand(rows, -1).contiguous()
        gaps = (self.values[:, 1:] - self.values[:, :-1]).clamp(min=0)
        weights = self.sums[0].diff(dim=1)[:, 1:]
        grown = (weights.clamp(min=0) * gaps.square()).pow(1 / 3).cumsum(1)
        wanted = torch.linspace(0, 1, _BINS + 1, dtype=torch.float64, device=gaps.device)[1:-1] * grown[:, -1:]
        inner = torch.searchsorted(grown, wanted.contiguous()) + 1
        first, last = inner.new_zeros(rows, 1), inner.new_full((rows, 1), elements)
        return torch.cat([first, inner, last], 1)

    def centres(self, ends: Tensor) -> Tensor:
        """Weighted mean [rows, runs] of the values between ends [rows, runs + 1]; of none, the value at its start."""
        weight, moment = (part.gather(1, ends).diff(dim=1) for part in self.sums[:2])
        there = self.values.gather(1, ends[:, :-1].clamp(max=self.values.shape[1] - 1))
        return torch.where(weight > _TINY, moment / weight.clamp(min=_TINY) + self.mean, there)


def _total(terms: Tensor) -> Tensor:
    """The sum of every row [rows, 1] from left to right: `sum` may split a row between threads."""
    return terms.cumsum(1)[:, -1:]


def _learn(data: _Sorted, count: int) -> Tensor:
    """Levels [rows, count] float32 of float16 values for one chunk of blocks."""
    bins = data.ends_of_bins()
    ends = bins.gather(1, _best_runs(data.sums.gather(2, bins.expand(3, -1, -1)), count))
    if data.values.shape[1] > _EXACT:
        ends = _lloyd(data, ends)
    levels = data.centres(ends).to(torch.float16).to(torch.float32)
    levels = torch.where(_is_few(data, count), _distinct(data, count), levels).sort(1).values
    return _compacted(data, levels)


def _best_runs(sums: Tensor, count: int) -> Tensor:
    """Where the best `count` runs of bins end: [rows, count + 1] among the bins, from sums [3, rows, bins + 1]."""
    weight, moment, cost = (part[:, None, :] - part[:, :, None] for part in sums)
    cost.sub_(moment.square_().div_(weight.clamp_(min=_TINY))).clamp_(min=0)
    bins = cost.shape[1] - 1
    cost.masked_fill_(torch.ones(bins + 1, bins + 1, dtype=torch.bool, device=cost.device).tril(-1), torch.inf)
    best = [cost[:, 0]]
    for _ in range(count - 1):  # into one tensor: new ones take longer to be given memory than to be filled
        best.append(torch.add(best[-1][:, :, None], cost, out=weight).amin(1))
    at = cost.new_full((cost.shape[0], 1), bins, dtype=torch.int64)
    ends = [at]
    for before in reversed(best[:-1]):  # where the last run starts, then the one before it
        at = (before + cost.gather(2, at[:, :, None].expand(-1, bins + 1, -1))[:, :, 0]).argmin(1, keepdim=True)
        ends.append(at)
    return torch.cat([torch.zeros_like(at), *reversed(ends)], 1)


def _lloyd(data: _Sorted, ends: Tensor) -> Tensor:
    """Lloyd's iteration from runs that end at `ends`, until no value changes its run."""
    for _ in range(_LLOYD_ROUNDS):
        levels = data.centres(ends).sort(1).values
        inner = torch.searchsorted(data.values, (levels[:, :-1] / 2 + levels[:, 1:] / 2).contiguous(), right=True)
        moved = torch.cat([ends[:, :1], inner, ends[:, -1:]], 1)
        if torch.equal(moved, ends):
            break
        ends = moved
    return ends


def _is_few(data: _Sorted, count: int) -> Tensor:
    """[rows, 1] whether a block has no more than `count` different values."""
    return (data.values.diff(dim=1) > 0).sum(1, keepdim=True) < count


def _distinct(data: _Sorted, count: int) -> Tensor:
    """The first `count` different values [rows, count] of every row as float16 numbers, the last one repeated."""
    rank = torch.nn.functional.pad((data.values.diff(dim=1) > 0).cumsum(1), (1, 0)).clamp(max=count - 1)
    levels = data.values.amax(1, keepdim=True).expand(-1, count).scatter(1, rank, data.values)
    return levels.to(torch.float16).to(torch.float32)


def _compacted(data: _Sorted, levels: Tensor) -> Tensor:
    """The levels [rows, count] that are the nearest of some value, in order, the last one repeated."""
    # two levels may be one float16 number: one of them has all the values of both
    again = torch.nn.functional.pad(levels.diff(dim=1) == 0, (1, 0))
    levels = torch.where(again, levels[:, -1:], levels).sort(1).values
    middle = (levels[:, :-1] / 2 + levels[:, 1:] / 2).to(torch.float64)
    inner = torch.searchsorted(data.values, middle.contiguous(), right=True)
    used = torch.nn.functional.pad(inner, (1, 1), value=0)
    used[:, -1] = data.values.shape[1]
    used = used.diff(dim=1) > 0
    last = torch.where(used, levels, -torch.inf).amax(1, keepdim=True)
    return torch.where(used, levels, last).sort(1).values
