"""High-bias absorption over a model: which producers, how much, and the two biases that change."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from narrowcast.errors import DataError
from narrowcast.models.feeds import Feed
from narrowcast.models.rewrite import groups_of, layer_kind, matrix, pads_with_zeros, set_matrix_
from narrowcast.pipeline.transform_stage import Rewrite, Stage, Step
from narrowcast.transforms import Absorb, absorbable, absorbed_bias


def absorption(stage: Stage, transform: Absorb) -> Rewrite:
    """What absorbing does to a model; nothing is changed yet.

    Raises:
        DataError: there is no data.
        ModelError, RecipeError: see `Stage.select`.
    """
    if stage.data is None:
        raise DataError("transform absorb looks at activations, and there is no calibration data; pass data=...")
    feeds = [f for f in stage.select("absorb", transform.pairs) if layer_kind(stage.module(f.producer)) is not None]
    padded = [f for f in feeds if any(pads_with_zeros(stage.module(reader.path)) for reader in f.readers)]
    feeds = [feed for feed in feeds if feed not in padded]
    stage.observe({reader.path for f in feeds for reader in f.readers}, {feed.producer for feed in feeds})
    steps, channels = [], 0
    for feed in feeds:
        amount = _amount(stage, feed)
        if bool((amount > 0).any()):
            channels += int((amount > 0).sum())
            steps.append(Step((feed.producer, *(r.path for r in feed.readers)), _absorbing(stage, feed, amount)))
    notes = [f"absorb: {channels} channels of {len(steps)} layers lowered by what they never fall below"]
    if padded:
        notes.append(f"absorb: not into {len(padded)} layers that pad with zeros (after {padded[0].producer!r}, ...)")
    return Rewrite(steps, notes)


def _amount(stage: Stage, feed: Feed) -> Tensor:
    """The constant of every channel, [channels] float64; 0 where none goes through."""
    seen = stage.outputs[feed.producer]
    if seen.positions == 0:
        return torch.zeros(feed.channels, dtype=torch.float64)
    amount = absorbable(seen.low().double(), seen.mean(), seen.deviation())
    usable = feed.free & feed.shifts & (seen.high() < feed.ceiling)  # one that is clipped above loses its place there
    return torch.where(usable, amount, torch.zeros((), dtype=torch.float64))


def _absorbing(stage: Stage, feed: Feed, amount: Tensor) -> Callable[[], None]:
    def apply() -> None:
        producer = stage.module(feed.producer)
        bias = torch.zeros(feed.channels) if producer.bias is None else producer.bias.detach()
        set_matrix_(producer, matrix(producer), bias.double() - amount)
        for reader in feed.readers:
            module = stage.module(reader.path)
            lost = torch.where(reader.columns >= 0, amount[reader.columns.clamp(min=0)], 0.0)
            weight = matrix(module)
            old = None if module.bias is None else module.bias.detach()
            set_matrix_(module, weight, absorbed_bias(weight, old, lost, groups_of(module)))

    return apply
