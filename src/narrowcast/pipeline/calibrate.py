"""Calibration: which observers the plan needs, one streaming pass, and what they answer."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from narrowcast.core import PerTensor, QuantSpec, choose_scale
from narrowcast.data import iterate, repeatable
from narrowcast.errors import DataError
from narrowcast.methods import Seen
from narrowcast.models import Layer, Observation, TorchModel
from narrowcast.nn import Activation
from narrowcast.observers import ChannelMagnitude, Observer, make_observer
from narrowcast.plan import LayerPlan, Plan


@dataclass
class Calibration:
    """What the data said.

    Args:
        observation: counts and samples of the pass.
        ranges: range observer of each statically quantized module, by path.
        magnitudes: channel magnitudes at the input of each module, by path.
    """

    observation: Observation = field(default_factory=Observation)
    ranges: dict[str, Observer] = field(default_factory=dict)
    magnitudes: dict[str, ChannelMagnitude] = field(default_factory=dict)

    def ran(self, path: str) -> bool:
        """Whether the module ran at all."""
        return self.observation.calls.get(path, 0) > 0


def rewindable(data: Any) -> Any:
    """The data in a form whose first batch can be looked at before the whole is run; a generator is not drained."""
    if data is None or repeatable(data):
        return data
    return _Peekable(data)


class _Peekable:
    """A one-shot iterable whose first element is remembered, so that it can be iterated from the start once more."""

    def __init__(self, data: Any) -> None:
        self._rest = iter(data)
        self._first: list[Any] = list(itertools.islice(self._rest, 1))

    def __iter__(self) -> Iterator[Any]:
        return itertools.chain(self._first, self._rest)

    def first(self) -> list[Any]:
        """The first element alone."""
        return self._first


def first_batch(data: Any, adapter: TorchModel) -> Any:
    """The first batch of the data.

    Raises:
        DataError: there is none.
    """
    source = data.first() if isinstance(data, _Peekable) else data
    for batch in iterate(source, adapter.model):
        return batch
    raise DataError("the calibration data is empty: it has no batch; give at least one")


def calibrate(adapter: TorchModel, plan: Plan, data: Any) -> Calibration:
    """One streaming pass over the data with the observers that the plan needs."""
    result = Calibration()
    watchers: dict[str, list[Any]] = {}
    for row in plan.layers:
        for path in _consumers(adapter, row):
            if row.input is not None and row.input.observer and path not in result.ranges:
                result.ranges[path] = make_observer(row.input.observer)
                watchers.setdefault(path, []).append(result.ranges[path].update)
            if path not in result.magnitudes:
                result.magnitudes[path] = ChannelMagnitude()
                watchers.setdefault(path, []).append(result.magnitudes[path].update)
    result.observation = adapter.observe(data, watchers)
    return result


def _consumers(adapter: TorchModel, row: LayerPlan) -> list[str]:
    if row.weight is None:
        return []
    return [site.path for site in row.layer.sites if adapter.takes_activation(site)]


def seen_by(adapter: TorchModel, layer: Layer, calibration: Calibration) -> tuple[Seen | None, str]:
    """What calibration knows of the columns of a weight, and how to say it in the report.

    The weights of a recurrent layer that multiply hidden states, and a depthwise convolution's, have no importance:
    the first cannot be seen from outside, the second multiply one channel each, so nothing distinguishes them.
    """
    importances = []
    samples = 0
    for site in layer.sites:
        magnitude = calibration.magnitudes.get(site.path)
        if magnitude is None or not calibration.ran(site.path):
            continue
        mean_square: Tensor = magnitude.result()
        if adapter.input_groups(site) > 1:
            continue
        spread = mean_square.repeat_interleave(adapter.kernel_elements(site))
        if spread.numel() != layer.shape[1] or (layer.type in ("LSTM", "GRU") and not _sees_input(site.parameter)):
            continue
        importances.append(spread)
        samples += 1
    if not importances:
        return None, "plain error"
    return Seen(importance=torch.stack(importances).mean(0), samples=samples), "error weighted by input magnitude"


def _sees_input(parameter: str) -> bool:
    return parameter.startswith("weight_ih_l0")


def activation_of(row: LayerPlan, path: str, calibration: Calibration) -> tuple[Activation, str, str]:
    """(activation, reason of a fall-back or "", text for the report) of one module."""
    if row.input is None:
        return Activation(), "", "float"
    if not row.input.observer:
        return Activation(row.input.spec), "", str(row.input)
    if not calibration.ran(path):
        reason = "it never ran in calibration, so it has no static range; its range is found at run time"
        return Activation(QuantSpec.parse("int8/token")), reason, "int8/token"
    low, high = calibration.ranges[path].range()
    scale, zero_point = _static_scale(low, high, row.input.spec)
    return Activation(row.input.spec, scale, zero_point), "", f"{row.input.spec} [{low:.4g}, {high:.4g}]"


def _static_scale(low: float, high: float, spec: QuantSpec) -> tuple[float, int]:
    assert isinstance(spec.granularity, PerTensor)
    scale, zero_point = choose_scale(torch.tensor([[low]]), torch.tensor([[high]]), spec)
    assert zero_point is not None
    return float(scale), int(zero_point)
