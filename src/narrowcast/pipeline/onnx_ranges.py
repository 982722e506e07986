"""Static ranges per channel of ONNX files: what is watched for them, what is chosen, and how weights take it in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from narrowcast.core import PerChannel, QuantizedTensor, QuantSpec
from narrowcast.models import Site
from narrowcast.models.onnx_channels import ScalableChannels
from narrowcast.models.onnx_model import OnnxModel
from narrowcast.nn import Activation
from narrowcast.observers import ChannelRange
from narrowcast.pipeline.calibrate import Calibration
from narrowcast.pipeline.onnx_units import Reader, Units, choose_units
from narrowcast.planning import LayerPlan, Plan

_ONE_RANGE = QuantSpec.parse("uint8/tensor")
_ROWS = QuantSpec.parse("int8/channel")


@dataclass
class ChannelRanges:
    """The ranges per channel of one run.

    Args:
        channels: which may be scaled.
        observed: by the value's name.
        units: chosen after the pass.
    """

    channels: ScalableChannels = field(default_factory=ScalableChannels)
    observed: dict[str, ChannelRange] = field(default_factory=dict)
    units: Units = field(default_factory=Units)

    def activation(self, adapter: OnnxModel, path: str) -> tuple[Activation, str] | None:
        """How a product reads its input, and how the report says it; None where that has one range."""
        name = adapter.input_value(path)
        if name not in adapter.placement.values:
            return None
        source = adapter.placement.source(name)
        found = self.units.activation(name, source)
        return None if found is None else (found, self.units.texts[source])

    def divided(self, adapter: OnnxModel, path: str, record: QuantizedTensor, bias: Tensor | None) -> Any:
        """Weight and bias of a product whose output is written in units; its codes stay.

        Returns:
            (record, bias) as given where the output has none.
        """
        units = self.units.of.get(adapter.output_value(path))
        if units is None:
            return record, bias
        assert record.scale is not None
        scale = record.scale.expand(record.codes.shape[0], 1).double() / units[:, None]
        record = replace(record, scale=scale.float(), spec=_ROWS)
        return record, None if bias is None else (bias.double() / units).float()

    def needless_clips(self) -> list[str]:
        """Names of the outputs of Clips that end where codes do, in each channel's own unit."""
        return [name for name in self.channels.clips if name in self.units.of]


def watch_channels(
    adapter: OnnxModel, plan: Plan, values: dict[str, list[Callable[[Tensor], None]]]
) -> ChannelRanges:  # fmt: skip
    """Ask for the ranges per channel of the values that may have some.

    Args:
        adapter: whose ranges are placed.
        plan: of the same adapter.
        values: watchers by the value's name; added to.
    """
    paths = {site.path: _why_not(row) for row in plan.layers for site in static_sites(adapter, row)}
    found = ChannelRanges(adapter.scalable_channels(paths))
    for name in adapter.placement.observed():
        if found.channels.free(name).any():
            observer = found.observed[name] = ChannelRange()
            values.setdefault(name, []).append(_channels_last(observer))
    return found


def static_sites(adapter: OnnxModel, row: LayerPlan) -> list[Site]:
    """The uses of a weight whose inputs get a static range."""
    if row.weight is None or row.input is None or not row.input.observer:
        return []
    return [site for site in row.layer.sites if adapter.takes_activation(site)]


def _channels_last(observer: ChannelRange) -> Callable[[Tensor], None]:
    return lambda x: observer.update(x.movedim(1, -1))


def _why_not(row: LayerPlan) -> str:
    """Why a weight cannot take in scales of its input."""
    assert row.input is not None
    if not isinstance(row.input.spec.granularity, PerChannel):
        return f"{row.layer.name} is to have one range"
    if len(row.layer.sites) > 1:
        return f"{row.layer.name} has several uses, whose inputs have scales of their own"
    return ""


def settle_ranges(adapter: OnnxModel, plan: Plan, calibration: Calibration, found: ChannelRanges) -> tuple[Plan, str]:
    """Choose the units, and say in the plan which inputs have one range all the same.

    Args:
        adapter: whose ranges are placed.
        plan: of the same adapter.
        calibration: after the pass.
        found: of `watch_channels`; its units are set.

    Returns:
        The plan, and a note for the report; "" where nobody asked.
    """
    readers: dict[str, list[Reader]] = {}
    for row in plan.layers:
        for site in static_sites(adapter, row):
            name = adapter.input_value(site.path)
            if name in found.channels.of and calibration.ran(site.path) and len(row.layer.sites) == 1:
                mean_square = calibration.magnitudes[site.path].result()
                reader = Reader(adapter.placement.source(name), adapter.weight(row.layer), mean_square,
                                adapter.input_groups(site))  # fmt: skip
                readers.setdefault(name, []).append(reader)
    seen = {name: observer for name, observer in found.observed.items() if observer.seen}
    found.units = choose_units(found.channels, seen, readers)
    rows = [_settled(adapter, row, found) for row in plan.layers]
    return replace(plan, layers=rows), _note(adapter, found)


def _settled(adapter: OnnxModel, row: LayerPlan, found: ChannelRanges) -> LayerPlan:
    """The plan of a weight whose input turns out to have one range."""
    sites = static_sites(adapter, row)
    if not sites or row.input is None or not isinstance(row.input.spec.granularity, PerChannel):
        return row
    path = sites[0].path
    if found.activation(adapter, path) is not None:
        return row
    name = adapter.input_value(path)
    source = adapter.placement.source(name) if name in adapter.placement.values else name
    why = found.channels.why_not(name) or found.units.reasons.get(source, "it was not seen")
    reason = f"one range for all channels of the input: {why}"
    return replace(row, input=replace(row.input, spec=_ONE_RANGE), reason="; ".join(filter(None, (row.reason, reason))))


def _note(adapter: OnnxModel, found: ChannelRanges) -> str:
    values = adapter.placement.observed()
    many = len(found.units.ranges)
    return f"{many} of {len(values)} static values have a range per channel, written as one scale" if many else ""
