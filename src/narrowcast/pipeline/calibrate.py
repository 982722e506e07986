"""Calibration: which observers the plan needs, one streaming pass, and what they answer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from narrowcast.core import PerChannel, QuantSpec, choose_scale
from narrowcast.data import iterate, opened, repeatable
from narrowcast.errors import DataError
from narrowcast.methods import Seen
from narrowcast.models import Layer, ModelAdapter, Observation, Site
from narrowcast.nn import Activation
from narrowcast.observers import Best, ChannelMagnitude, ChannelRange, Observer, make_observer
from narrowcast.pipeline.outliers import choose_outliers, describe_outliers
from narrowcast.planning import LayerPlan, Plan
from narrowcast.transforms import channel_scales, with_headroom


@dataclass(frozen=True)
class Evidence:
    """What a block's own pass saw at the input of one module, for solvers that want more than magnitudes.

    Args:
        samples: input vectors seen.
        hessian: [groups, columns, columns] float32, the mean of x x^T; None when not asked for.
        inputs: [vectors, columns] some of the vectors; None when not asked for, and for grouped convolutions.
        drift: [columns, columns] the mean of (x' - x) x^T with x' the float model's; None as for `inputs`.
    """

    samples: int
    hessian: Tensor | None = None
    inputs: Tensor | None = None
    drift: Tensor | None = None


@dataclass
class Calibration:
    """What the data said.

    Args:
        observation: counts and samples of the pass.
        ranges: range observer of each module with one static range, by path.
        channel_ranges: range observer of each module with a static range per input channel, by path.
        magnitudes: channel magnitudes at the input of each module, by path; inside of it by `evidence_key`.
        evidence: what the pass through a block saw, by `evidence_key`; only while the block is worked on.
        means: mean of each input channel of a layer as BatchNorms before it say, by path; only where there is no data.
    """

    observation: Observation = field(default_factory=Observation)
    ranges: dict[str, Observer] = field(default_factory=dict)
    channel_ranges: dict[str, ChannelRange] = field(default_factory=dict)
    magnitudes: dict[str, ChannelMagnitude] = field(default_factory=dict)
    evidence: dict[str, Evidence] = field(default_factory=dict)
    means: dict[str, Tensor] = field(default_factory=dict)

    def ran(self, path: str) -> bool:
        """Whether the module ran at all."""
        return self.observation.calls.get(path, 0) > 0


def rewindable(data: Any) -> Any:
    """The data in a form whose first batch can be looked at before the whole is run; a generator is not drained."""
    data = opened(data)
    if data is None or repeatable(data):
        return data
    return _Peekable(data)


class _Peekable:
    """A one-shot iterable whose first element is remembered, so that it can be iterated from the start once more."""

    def __init__(self, data: Any) -> None:
        self.kind = type(getattr(data, "reader", data)).__name__
        self._rest = iter(data)
        self._first: list[Any] = list(itertools.islice(self._rest, 1))

    def __iter__(self) -> Iterator[Any]:
        return itertools.chain(self._first, self._rest)

    def first(self) -> list[Any]:
        """The first element alone."""
        return self._first


def first_batch(data: Any, adapter: ModelAdapter) -> Any:
    """The first batch of the data.

    Raises:
        DataError: there is none.
    """
    source = data.first() if isinstance(data, _Peekable) else data
    if isinstance(data, _Peekable) and not source:
        raise DataError(
            f"the calibration data ({data.kind}) holds no batch; it can be read only once, and may be spent"
        )
    for batch in iterate(source, adapter.model):
        return batch
    raise DataError("the calibration data is empty: it has no batch; give at least one")


def calibrate(adapter: ModelAdapter, plan: Plan, data: Any) -> Calibration:
    """One streaming pass over the data with the observers that the plan needs."""
    result = Calibration()
    watchers: dict[str, list[Any]] = {}
    for row in plan.layers:
        for path in _consumers(adapter, row):
            if path in watchers:
                continue
            result.magnitudes[path] = ChannelMagnitude()
            watchers[path] = [thinned(result.magnitudes[path].update)]
            if row.input is not None and row.input.observer:
                observer: Observer | ChannelRange
                if per_channel(row):
                    observer = result.channel_ranges[path] = ChannelRange()
                else:
                    observer = result.ranges[path] = make_observer(row.input.observer, bits=row.input.spec.format.bits)
                watchers[path].append(observer.update)
    result.observation = adapter.observe(data, watchers)
    return result


def per_channel(row: LayerPlan) -> bool:
    """Whether a layer gets a static range per input channel.

    A tied weight cannot take in the scales of several inputs, so it gets one range.
    """
    if row.input is None or not isinstance(row.input.spec.granularity, PerChannel) or not row.input.observer:
        return False
    return len(row.layer.sites) == 1


def thinned(update: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    """The same watcher on about 256 positions of every image: neighbouring pixels tell the same of a channel's size."""

    def watch(x: Tensor) -> None:
        if x.dim() == 4:
            step = max(1, math.isqrt(x.shape[1] * x.shape[2] // 256))
            x = x[:, ::step, ::step]
        update(x)

    return watch


def _consumers(adapter: ModelAdapter, row: LayerPlan) -> list[str]:
    if row.weight is None:
        return []
    return [site.path for site in row.layer.sites if adapter.takes_activation(site)]


# Modules with several weights, some of which multiply what cannot be seen from outside.
PARTLY_SEEN = ("LSTM", "GRU", "Experts")


def seen_by(adapter: ModelAdapter, layer: Layer, calibration: Calibration) -> tuple[Seen | None, str]:
    """What calibration knows of the columns of a weight, and how to say it in the report.

    The weights of experts that multiply inner values, and a depthwise convolution's, have no importance: the former
    cannot be seen from outside, the latter multiply one channel each, so nothing distinguishes them. Those of a
    recurrent layer that multiply hidden states have one where a block's own pass has looked inside.
    """
    importances = []
    samples = 0
    for site in layer.sites:
        magnitude = calibration.magnitudes.get(evidence_key(site))
        if magnitude is None or not calibration.ran(site.path):
            continue
        mean_square: Tensor = magnitude.result()
        if adapter.input_groups(site) > 1:
            continue
        spread = mean_square.repeat_interleave(adapter.kernel_elements(site))
        if spread.numel() != layer.shape[1]:
            continue
        importances.append(spread)
        samples += 1
    if not importances:
        return None, "plain error"
    return Seen(importance=torch.stack(importances).mean(0), samples=samples), "error weighted by input magnitude"


def evidence_key(site: Site) -> str:
    """Where calibration keeps what a weight multiplies: by module, or by weight where it is not the module's input."""
    inner = site.type in PARTLY_SEEN and not sees_input(site.parameter)
    return f"{site.path}.{site.parameter}" if inner else site.path


def sees_input(parameter: str) -> bool:
    """Whether a matrix of a layer with several multiplies the input of the whole layer."""
    return parameter.startswith("weight_ih_l0") or parameter in ("gate_up_proj", "up_proj")


def activations_of(
    adapter: ModelAdapter, row: LayerPlan, path: str, calibration: Calibration
) -> list[tuple[Activation, str]]:
    """The treatments of a module's input to choose from, best guess first, each with its text for the report.

    More than one only for ranges per channel, where the balance between input and weight is found by trying.
    """
    if row.input is None:
        return [(Activation(), "float")]
    if row.input.outliers and calibration.ran(path):
        outliers = choose_outliers(row.input, calibration.magnitudes[path])
        return [(Activation(row.input.spec, outliers=outliers), f"{row.input}: {describe_outliers(outliers)}")]
    if not row.input.observer:
        return [(Activation(row.input.spec), str(row.input.spec))]
    if not calibration.ran(path):
        return [(Activation(QuantSpec.parse("int8/token")), "int8/token")]
    if path in calibration.channel_ranges:
        observed = calibration.channel_ranges[path]
        low, high = with_headroom(*observed.result(), observed.walls())
        text = f"{row.input.spec} [{float(low.min()):.4g}, {float(high.max()):.4g}]"
        balances = (1.0,) if adapter.is_depthwise(row.layer.sites[0]) else (1.0, 0.75, 0.5)
        code_high = int(row.input.spec.format.high)
        scales = [(balance, channel_scales(low, high, balance, code_high=code_high)) for balance in balances]
        return [(Activation(row.input.spec, *pair), f"{text} balance {balance:g}") for balance, pair in scales]
    observer = calibration.ranges[path]
    bounds = observer.range()
    spec = QuantSpec.parse(f"{row.input.spec.format.name}/tensor")
    scale, zero_point = choose_scale(torch.tensor([[bounds[0]]]), torch.tensor([[bounds[1]]]), spec)
    assert zero_point is not None
    activation = Activation(spec, scale.view(1), zero_point.view(1).to(torch.uint8))
    why = f" {observer}" if isinstance(observer, Best) else ""
    return [(activation, f"{spec} [{bounds[0]:.4g}, {bounds[1]:.4g}]{why}")]
