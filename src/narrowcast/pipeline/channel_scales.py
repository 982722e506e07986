"""How each rescaling transform chooses the scale of every producer's channels."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from narrowcast.core import block_shape
from narrowcast.errors import DataError
from narrowcast.models.feeds import Feed
from narrowcast.models.rewrite import groups_of, kernel_of, layer_kind, matrix
from narrowcast.pipeline.transform_stage import Stage
from narrowcast.transforms import (
    Awq,
    Equalize,
    SmoothQuant,
    at_columns,
    awq_scale,
    column_maximum,
    divide_rows,
    equalizing_scale,
    lowest_scale,
    multiply_columns,
    smoothing_scale,
    to_channels,
)

_SETTLED = 1e-3  # largest change of a scale, relative, after which equalization stops


@dataclass
class Chosen:
    """What a transform decided.

    Args:
        scales: producer -> [channels] float64 that its output is divided by.
        notes: what the report should say.
    """

    scales: dict[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def choose_scales(stage: Stage, name: str, transform: Equalize | SmoothQuant | Awq) -> Chosen:
    """The scales of one transform; nothing is changed.

    Raises:
        DataError: it needs data and there is none.
        ModelError, RecipeError: see `Stage.select`.
    """
    feeds = stage.select(name, transform.pairs)
    if isinstance(transform, Equalize):
        return _equalize(stage, transform, feeds)
    if stage.data is None:
        raise DataError(f"transform {name} looks at activations, and there is no calibration data; pass data=...")
    wanted = [feed for feed in feeds if any(stage.row(reader.path) is not None for reader in feed.readers)]
    chosen = Chosen()
    if len(wanted) < len(feeds):
        chosen.notes.append(f"{name}: {len(feeds) - len(wanted)} producers feed only layers that stay float")
    shared = [feed for feed in wanted if _rows_share_scales(stage, feed.producer)]
    if shared:
        chosen.notes.append(
            f"{name}: {len(shared)} layers ({shared[0].producer!r}, ...) have one scale for several output channels, "
            "which scaling these channels would make coarser; they are left to 'equalize'"
        )
        wanted = [feed for feed in wanted if feed not in shared]
    stage.observe({reader.path for feed in wanted for reader in feed.readers})
    for feed in wanted:
        if isinstance(transform, Awq):
            _awq(stage, transform, feed, chosen)
        else:
            _smooth(stage, transform, feed, chosen)
    return chosen


def _rows_share_scales(stage: Stage, path: str) -> bool:
    """Whether a producer is quantized with scales over several rows: then its own error depends on theirs."""
    row = stage.row(path)
    if row is None or row.weight is None or row.weight.format.is_cast:
        return False
    return block_shape(row.weight.granularity, (row.layer.shape[0], row.layer.shape[1]))[0] > 1


def _equalize(stage: Stage, transform: Equalize, feeds: list[Feed]) -> Chosen:
    """Sweeps over all pairs on copies of the weights until nothing moves."""
    chosen = Chosen()
    feeds = [feed for feed in feeds if layer_kind(stage.module(feed.producer)) is not None]
    clipped = [feed for feed in feeds if bool((feed.ceiling < math.inf).any())]
    if clipped and stage.data is None:
        chosen.notes.append(
            f"equalize: {len(clipped)} producers before a ReLU6 ({clipped[0].producer!r}, ...) are left: without data "
            "it is not known how near to its ceiling they come"
        )
        feeds = [feed for feed in feeds if feed not in clipped]
    elif stage.data is not None:
        stage.observe({r.path for feed in feeds for r in feed.readers}, {feed.producer for feed in clipped})
    bounds = {feed.producer: _bounds(stage, feed, transform.headroom) for feed in feeds}
    kept = sum(int((~movable & feed.free).sum()) for feed in feeds for movable in [bounds[feed.producer][1]])
    if kept:
        chosen.notes.append(f"equalize: {kept} channels come near the ceiling of a ReLU6 and keep their scale")
    weights = {path: matrix(stage.module(path)) for feed in feeds for path in _paths(feed)}
    totals = {feed.producer: torch.ones(feed.channels, dtype=torch.float64) for feed in feeds}
    for _ in range(transform.rounds):
        moved = max((_balance(stage, feed, bounds[feed.producer], weights, totals) for feed in feeds), default=0.0)
        if moved < _SETTLED:
            break
    chosen.scales = {path: total for path, total in totals.items() if bool((total != 1).any())}
    return chosen


def _paths(feed: Feed) -> list[str]:
    return [feed.producer, *(reader.path for reader in feed.readers)]


def _bounds(stage: Stage, feed: Feed, headroom: float) -> tuple[Tensor, Tensor]:
    """Lowest scale of every channel, and which channels may be scaled."""
    if feed.producer not in stage.outputs:
        return torch.zeros(feed.channels, dtype=torch.float64), feed.free
    lowest, movable = lowest_scale(stage.outputs[feed.producer].high(), feed.ceiling, headroom)
    return lowest, movable & feed.free


def _balance(
    stage: Stage, feed: Feed, bounds: tuple[Tensor, Tensor], weights: dict[str, Tensor], totals: dict[str, Tensor]
) -> float:
    """One step of one producer; returns by how much its scales moved."""
    lowest, movable = bounds
    first = weights[feed.producer].abs().amax(1)
    second = torch.zeros(feed.channels)
    for reader in feed.readers:
        module = stage.module(reader.path)
        largest = column_maximum(weights[reader.path], groups_of(module), kernel_of(module))
        second = torch.maximum(second, to_channels(largest, reader.columns, feed.channels))
    total = totals[feed.producer]
    wanted = torch.maximum(total * equalizing_scale(first, second), lowest)
    wanted = torch.where(movable, wanted.clamp(2.0**-8, 2.0**8), total)
    step = wanted / total
    totals[feed.producer] = wanted
    weights[feed.producer], _ = divide_rows(weights[feed.producer], None, step)
    for reader in feed.readers:
        factor = at_columns(step, reader.columns)
        weights[reader.path] = multiply_columns(weights[reader.path], factor, groups_of(stage.module(reader.path)))
    return float((step.log().abs()).max())


def _awq(stage: Stage, transform: Awq, feed: Feed, chosen: Chosen) -> None:
    magnitude = torch.zeros(feed.channels, dtype=torch.float64)
    for reader in feed.readers:
        seen = to_channels(stage.inputs[reader.path].magnitude(), reader.columns, feed.channels)
        magnitude = torch.maximum(magnitude, seen)
    candidates = {f"ratio {ratio:g}": _only_free(awq_scale(magnitude, ratio), feed) for ratio in transform.ratios()}
    _keep_best(stage, feed, candidates, chosen)


def _smooth(stage: Stage, transform: SmoothQuant, feed: Feed, chosen: Chosen) -> None:
    inputs = torch.zeros(feed.channels)
    weights = torch.zeros(feed.channels)
    for reader in feed.readers:
        module = stage.module(reader.path)
        seen = to_channels(stage.inputs[reader.path].largest(), reader.columns, feed.channels)
        largest = column_maximum(matrix(module), groups_of(module), kernel_of(module))
        inputs = torch.maximum(inputs, seen)
        weights = torch.maximum(weights, to_channels(largest, reader.columns, feed.channels))
    made: Callable[[float], Tensor] = lambda strength: _only_free(smoothing_scale(inputs, weights, strength), feed)  # noqa: E731
    if transform.strength != "search":
        chosen.scales[feed.producer] = made(float(transform.strength))
        return
    candidates = {"none": torch.ones(feed.channels, dtype=torch.float64)}
    candidates |= {f"strength {strength:g}": made(strength) for strength in transform.strengths()}
    _keep_best(stage, feed, candidates, chosen)


def _only_free(scale: Tensor, feed: Feed) -> Tensor:
    """A scale that leaves alone what may not move; under a ceiling no scale is known to be safe here."""
    movable = feed.free & torch.isinf(feed.ceiling)
    return torch.where(movable, scale, torch.ones((), dtype=scale.dtype))


def _keep_best(stage: Stage, feed: Feed, candidates: dict[str, Tensor], chosen: Chosen) -> None:
    """The candidate with the least error, relative to each reader's own output; the first of equal ones."""
    best, least = "", math.inf
    for name, scale in candidates.items():
        error = 0.0
        for reader in feed.readers:
            noise, signal = stage.layer_error(reader.path, at_columns(scale, reader.columns))
            error += noise / max(signal, 1e-300)
        if error < least:
            best, least = name, error
    if best and bool((candidates[best] != 1).any()):
        chosen.scales[feed.producer] = candidates[best]
    chosen.notes.append(f"{feed.producer}: {best}")
