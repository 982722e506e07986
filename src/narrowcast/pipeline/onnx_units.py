"""One scale per value that carries a range per channel: the units of channels, chosen from their calibrated ranges.

A value in units is x_c / u_c with u_c in (0, 1]. It gets one scale s and one zero point z, and so channel c the step
s u_c. What makes it divides by the units, what reads it multiplies (models/onnx_channels.py says where that is
possible). `balance` b says how much of the difference between ranges goes into the units, as for modules: u = r^b with
r the range of a channel relative to the largest one of its value; of values that share units, the largest such r. No
channel's step is larger than with one range.

The balance of values that share units is the one with the least noise at the products that read them, taken as
independent roundings: s^2 / 12 sum (w u)^2 of the codes of the value, and sum_rows d^2 / 12 sum E[(x / u)^2] of the
weight, with d the step of its row, relative to sum w^2 E[x^2].

Source:
    Balance: Xiao et al. 2023, SmoothQuant, arXiv:2211.10438, eq. 4. Units through sums: Nagel et al. 2019,
    arXiv:1906.04721, sec. 4.1, equalizes pairs of layers; here all values that are added have the same units, and
    ranges of activations take the place of those of the weights before them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from narrowcast.core import QuantSpec, choose_scale, spread_channels
from narrowcast.models.onnx_channels import ScalableChannels
from narrowcast.nn import Activation
from narrowcast.observers import ChannelRange
from narrowcast.transforms import with_headroom

BALANCES = (1.0, 0.75, 0.5, 0.25)
# As for modules: a channel that was almost silent in calibration may yet speak.
_SMALLEST_UNIT = 1 / 64
# A Clip at the codes' end or beyond it does nothing more than rounding to codes does.
_LAST_CODE = 254.5
_CODES = QuantSpec.parse("uint8/tensor")
_PER_CHANNEL = QuantSpec.parse("uint8/channel")


@dataclass(frozen=True)
class Reader:
    """A product that multiplies a value.

    Args:
        source: name of the value whose codes it reads.
        weight: [out, columns] float32.
        mean_square: [channels] of its input.
        groups: of a convolution.
    """

    source: str
    weight: Tensor
    mean_square: Tensor
    groups: int


@dataclass
class Units:
    """What was chosen.

    Args:
        of: by the value's name, the unit of each of its channels, [channels] float64; values without have unit 1.
        ranges: by the name of a value with units that is observed, scale and zero point of its codes.
        texts: by the same name, for the report.
        reasons: by the name of a value with one range, why.
    """

    of: dict[str, Tensor] = field(default_factory=dict)
    ranges: dict[str, tuple[float, int]] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def activation(self, name: str, source: str) -> Activation | None:
        """How products read a value; None where it has one range for all channels.

        Args:
            name: of the value.
            source: the value whose codes it has.
        """
        if name not in self.of or source not in self.ranges:
            return None
        scale, zero = self.ranges[source]
        scales = (self.of[name] * scale).float()
        return Activation(_PER_CHANNEL, scales, torch.full(scales.shape, zero, dtype=torch.uint8))


@dataclass(frozen=True)
class _Seen:
    """What calibration says of a value: [channels] float64, and the number of each channel."""

    channels: Any
    low: Tensor
    high: Tensor

    def relative(self) -> Tensor:
        """Every channel's range relative to the largest one, on the side where it is larger."""
        sides = [side.abs() / side.abs().max() for side in (self.low, self.high) if bool(side.any())]
        return torch.stack(sides).amax(0) if sides else torch.ones_like(self.low)

    def codes(self, units: Tensor) -> tuple[float, int]:
        """Scale and zero point of the value in units."""
        low, high = (self.low / units).min(), (self.high / units).max()
        scale, zero = choose_scale(low.float().view(1, 1), high.float().view(1, 1), _CODES)
        assert zero is not None
        return float(scale), int(zero)


def choose_units(
    channels: ScalableChannels, observed: Mapping[str, ChannelRange], readers: Mapping[str, list[Reader]]
) -> Units:
    """The units of all channels that may have some.

    Args:
        channels: of the graph.
        observed: ranges of the values that are made in codes, by name.
        readers: the products that read a value, by its name.
    """
    chosen, seen = Units(), {name: _seen(channels, name, observer) for name, observer in observed.items()}
    units = torch.ones(1 + max((int(c.max()) for c in channels.of.values() if len(c)), default=0), dtype=torch.float64)
    for names in _together(channels):
        mine = {name: seen[name] for name in names if name in seen}
        relative = _relative(channels, mine)
        read = [(name, reader) for name in names for reader in readers.get(name, ())]
        if not mine or not relative or not read:
            continue
        numbers = torch.tensor(list(relative))
        ratios = torch.tensor([relative[int(n)] for n in numbers], dtype=torch.float64).clamp(_SMALLEST_UNIT, 1.0)
        best, least = 0.0, _noise(channels, units, mine, read)
        for balance in BALANCES:
            units[numbers] = ratios**balance
            if _cuts(channels, units, names, mine) and (noise := _noise(channels, units, mine, read)) < least:
                best, least = balance, noise
        units[numbers] = ratios**best
        _take(chosen, channels, units, names, mine, best)
    for name in observed:
        if name not in chosen.ranges:
            chosen.reasons[name] = channels.why_not(name) or "units would make the products that read it less exact"
    return chosen


def _seen(channels: ScalableChannels, name: str, observer: ChannelRange) -> _Seen:
    low, high = with_headroom(*observer.result(), observer.walls())
    return _Seen(channels.of[name], low.double().clamp(max=0), high.double().clamp(min=0))


def _together(channels: ScalableChannels) -> list[list[str]]:
    """Values that have channels with the same units, directly or through others."""
    parents: dict[int, int] = {}

    def root(number: int) -> int:
        while parents.setdefault(number, number) != number:
            number = parents[number]
        return number

    for numbers in channels.of.values():
        moving = [int(n) for n in np.unique(numbers) if int(n) not in channels.reasons]
        for number in moving[1:]:
            parents[root(number)] = root(moving[0])
    groups: dict[int, list[str]] = {}
    for name, numbers in channels.of.items():
        moving = [int(n) for n in numbers if int(n) not in channels.reasons]
        if moving:
            groups.setdefault(root(moving[0]), []).append(name)
    return list(groups.values())


def _relative(channels: ScalableChannels, seen: Mapping[str, _Seen]) -> dict[int, float]:
    """By number of a channel that may have a unit, the largest of its relative ranges."""
    found: dict[int, float] = {}
    for value in seen.values():
        for number, ratio in zip(value.channels, value.relative().tolist(), strict=True):
            if int(number) not in channels.reasons:
                found[int(number)] = max(found.get(int(number), 0.0), ratio)
    return found


def _noise(
    channels: ScalableChannels, units: Tensor, seen: Mapping[str, _Seen], read: list[tuple[str, Reader]]
) -> float:
    """Noise at the outputs of the products relative to their signal, see above; the sum over them."""
    steps = {name: value.codes(units[torch.from_numpy(value.channels)])[0] for name, value in seen.items()}
    squares = {name: _accumulated(channels, steps, name) for name, _ in read}
    total = 0.0
    for name, reader in read:
        numbers = channels.of[name]
        shape = (reader.weight.shape[0], reader.weight.shape[1])
        unit = spread_channels(units[torch.from_numpy(numbers)], shape, reader.groups)
        power = spread_channels(reader.mean_square.double(), shape, reader.groups)
        scaled = reader.weight * unit
        step = scaled.abs().amax(1) / 127
        noise = squares[name] * scaled.square().sum() + (step.square()[:, None] * (power / unit.square())).sum()
        total += float(noise) / max(float((reader.weight.square() * power).sum()), 1e-300) / 12
    return total


def _accumulated(channels: ScalableChannels, steps: Mapping[str, float], name: str) -> float:
    """Squares of the steps of all roundings that a value has seen since products made it, added up."""
    parts, own = channels.made_of.get(name, []), steps.get(name, 0.0) ** 2
    return own + sum(_accumulated(channels, steps, part) for part in parts)


def _cuts(channels: ScalableChannels, units: Tensor, names: list[str], seen: Mapping[str, _Seen]) -> bool:
    """Whether the codes of every value behind a Clip end where that cuts, so that it can go."""
    for name in names:
        high = channels.clips.get(name, math.inf)
        if high == math.inf:
            continue
        if name not in seen:
            return False
        unit = units[torch.from_numpy(seen[name].channels)]
        scale, zero = seen[name].codes(unit)
        if zero != 0 or bool((unit * (scale * _LAST_CODE) > high).any()):
            return False
    return True


def _take(
    chosen: Units,
    channels: ScalableChannels,
    units: Tensor,
    names: list[str],
    seen: Mapping[str, _Seen],
    balance: float,
) -> None:
    """Note the units of values that were looked at together."""
    if balance == 0:
        return
    for name in names:
        chosen.of[name] = units[torch.from_numpy(channels.of[name])]
    for name, value in seen.items():
        unit = units[torch.from_numpy(value.channels)]
        chosen.ranges[name] = value.codes(unit)
        low, high = float(value.low.min()), float(value.high.max())
        chosen.texts[name] = f"{_PER_CHANNEL} [{low:.4g}, {high:.4g}] balance {balance:g}"
