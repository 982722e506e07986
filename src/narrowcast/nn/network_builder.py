"""From a region and its convolutions to the program of an integer network.

Clamps, hard-swish and additions that follow a convolution and have no other reader become part of its step. Parts of a
concatenation are written where they are read. An image that is needed both as codes and as floats is written as both.
All constants are computed in float64 and rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from narrowcast.kernels.network import Activation, Buffer, NetworkProgram, Step, StepKind, Value
from narrowcast.nn.conv import QuantizedConv
from narrowcast.nn.image_ops import ImageOp
from narrowcast.nn.network_codes import Code, ConflictError, Wants, channel_counts, find_wants
from narrowcast.nn.network_sums import Sum, find_sums
from narrowcast.nn.regions import Region, readers

_ALIGNMENT = 64


@dataclass(frozen=True, eq=False)
class Network:
    """What `conv_network_int8` takes besides its inputs.

    Args:
        program: the program; `outputs` in the order of `Region.outputs`.
        constants: 1-D float32.
        panels: 1-D int8, the packed weights of all convolutions.
        views: name of a convolution -> (begin, end) of its weight in `panels`.
    """

    program: NetworkProgram
    constants: Tensor
    panels: Tensor
    views: dict[str, tuple[int, int]]


Image = tuple[str, bool]
"""An image in one of its two forms: its name, and whether as codes."""


@dataclass
class _Builder:
    region: Region
    convolutions: Mapping[str, QuantizedConv]
    counts: dict[str, int]
    wants: Wants
    constants: list[Tensor] = field(default_factory=list)
    constant_count: int = 0
    panels: list[Tensor] = field(default_factory=list)
    panel_offsets: dict[int, tuple[int, int]] = field(default_factory=dict)
    panel_bytes: int = 0
    buffers: list[Buffer] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    places: dict[Image, tuple[int, int]] = field(default_factory=dict)  # -> buffer, first channel
    zeros: dict[int, int] = field(default_factory=dict)  # buffer -> where its zero points are in the constants
    made: dict[Image, int] = field(default_factory=dict)  # -> value

    def forms(self, name: str) -> list[bool]:
        """The forms in which an image is needed: True as codes, False as floats."""
        return [coded for coded in (True, False) if name in (self.wants.codes if coded else self.wants.floats)]

    def add_constants(self, *rows: Tensor | float, channels: int) -> int:
        """Store rows of float32 [channels]; returns where they begin."""
        start = self.constant_count
        for row in rows:
            self.constants.append(torch.as_tensor(row, dtype=torch.float64).expand(channels).to(torch.float32))
            self.constant_count += channels
        return start

    def add_panels(self, convolution: QuantizedConv) -> int:
        """Store the packed weight of a convolution once; returns its offset in bytes."""
        key = id(convolution)
        if key not in self.panel_offsets:
            packed = convolution.kernel_panels
            self.panels.append(F.pad(packed, (0, -packed.numel() % _ALIGNMENT)))
            self.panel_offsets[key] = self.panel_bytes, self.panel_bytes + packed.numel()
            self.panel_bytes += self.panels[-1].numel()
        return self.panel_offsets[key][0]

    def place(self, image: Image) -> tuple[int, int]:
        """Buffer and first channel of an image, a buffer of its own where it has no place yet."""
        if image not in self.places:
            name, coded = image
            index = self.new_buffer(self.counts[name], coded=coded)
            if coded:
                self.zeros[index] = self.add_constants(self.wants.codes[name].zero, channels=self.counts[name])
            self.places[image] = index, 0
        return self.places[image]

    def new_buffer(self, channels: int, *, coded: bool = False) -> int:
        """Index of a new buffer."""
        self.buffers.append(Buffer(channels, coded))
        return len(self.buffers) - 1

    def new_value(self, channels: int, buffer: int, offset: int) -> int:
        """A run of channels of a buffer."""
        zero = self.zeros[buffer] + offset if self.buffers[buffer].coded else -1
        self.values.append(Value(channels, buffer, offset, zero))
        return len(self.values) - 1

    def value_of(self, image: Image) -> int:
        """The value of an image, made at its first mention."""
        if image not in self.made:
            self.made[image] = self.new_value(self.counts[image[0]], *self.place(image))
        return self.made[image]


def build_network(region: Region, convolutions: Mapping[str, QuantizedConv]) -> Network:
    """The network of a region.

    Args:
        region: without identities.
        convolutions: name of a node -> its module; integer, static, with panels.

    Raises:
        ConflictError: a node cannot be part of it; leave it out and try again.
    """
    counts = channel_counts(region, convolutions)
    builder = _Builder(region, convolutions, counts, find_wants(region, convolutions, counts))
    sums = {entry.nodes[0]: entry for entry in find_sums(region)}
    inside = {name for entry in sums.values() for name in entry.nodes}
    _place_parts(builder)
    for index, name in enumerate(region.inputs):
        _add_input(builder, index, name)
    for name, op in region.ops.items():
        if name in sums:
            _add_sum(builder, sums[name])
        elif name not in inside:
            _add_other(builder, name, op)
    outputs = [_output(builder, name) for name in region.outputs]
    program = NetworkProgram(len(region.inputs), builder.buffers, builder.values, builder.steps, outputs)
    views = {name: builder.panel_offsets[id(module)] for name, module in convolutions.items() if name in region.ops}
    return Network(program, torch.cat(builder.constants), torch.cat(builder.panels), views)


def _place_parts(builder: _Builder) -> None:
    """Give the parts of concatenations and padded images their places, outermost first."""
    for name, op in reversed(builder.region.ops.items()):
        for coded in builder.forms(name) if op.kind in ("cat", "channel_pad") else ():
            buffer, offset = builder.place((name, coded))
            offset += op.pad[0]
            for source in op.sources:
                builder.places.setdefault((source, coded), (buffer, offset))
                offset += builder.counts[source]


def _add_input(builder: _Builder, index: int, name: str) -> None:
    code, channels = builder.wants.codes[name], builder.counts[name]
    constants = builder.add_constants(1 / code.scale, code.zero, channels=channels)
    if code.high == 255:
        builder.steps.append(Step(StepKind.QUANTIZE, index, builder.value_of((name, True)), constants=constants))
    else:
        _add_narrow_input(builder, index, name, constants)
    if name in builder.wants.floats:
        constants = builder.add_constants(code.scale, code.zero, channels=channels)
        source, target = builder.value_of((name, True)), builder.value_of((name, False))
        builder.steps.append(Step(StepKind.DEQUANTIZE, source, target, constants=constants))


def _add_narrow_input(builder: _Builder, index: int, name: str, constants: int) -> None:
    """Codes of a scale that go to 255, as inputs are quantized to, and then the same clamped to what is wanted."""
    code, channels = builder.wants.codes[name], builder.counts[name]
    buffer = builder.new_buffer(channels, coded=True)
    builder.zeros[buffer] = builder.add_constants(code.zero, channels=channels)
    wide = builder.new_value(channels, buffer, 0)
    builder.steps.append(Step(StepKind.QUANTIZE, index, wide, constants=constants))
    clamp = builder.add_constants(1.0, 0.0, 0.0, 0.0, float(code.high), channels=channels)
    builder.steps.append(Step(StepKind.ADD, wide, builder.value_of((name, True)), wide, clamp))


def _add_other(builder: _Builder, name: str, op: ImageOp) -> None:
    source = op.sources[0]
    if op.kind == "average_pool":
        if name in builder.wants.codes:
            raise ConflictError(name, "a convolution reads an average")
        channels = builder.counts[name]
        constants = builder.add_constants(1.0, 0.0, -math.inf, math.inf, channels=channels)
        values = builder.value_of((source, False)), builder.value_of((name, False))
        builder.steps.append(Step(StepKind.AVERAGE_POOL, *values, constants=constants, window=op.window))
        return
    for coded in builder.forms(name):
        if op.kind == "max_pool":
            values = builder.value_of((source, coded)), builder.value_of((name, coded))
            builder.steps.append(Step(StepKind.MAX_POOL, *values, window=op.window))
        elif op.kind == "identity":
            builder.made[name, coded] = builder.value_of((source, coded))
            builder.places[name, coded] = builder.places[source, coded]
        elif op.kind in ("cat", "channel_pad"):
            _complete(builder, (name, coded), op)
        else:
            raise ConflictError(name, f"a network has no step for {op.kind} here")


def _copy(builder: _Builder, source: int, buffer: int, offset: int, channels: int) -> None:
    builder.steps.append(Step(StepKind.MAX_POOL, source, builder.new_value(channels, buffer, offset)))


def _complete(builder: _Builder, image: Image, op: ImageOp) -> None:
    """Copy the parts that live elsewhere, because something else had a place for them first; fill padding."""
    buffer, start = builder.place(image)
    offset = start + op.pad[0]
    placed: set[str] = set()
    for source in op.sources:
        part = source, image[1]
        if builder.places[part] != (buffer, offset) or source in placed:
            _copy(builder, builder.value_of(part), buffer, offset, builder.counts[source])
        placed.add(source)
        offset += builder.counts[source]
    if op.kind == "channel_pad":
        _fill_padding(builder, image[0], op, (buffer, start))
    builder.value_of(image)


def _fill_padding(builder: _Builder, name: str, op: ImageOp, place: tuple[int, int]) -> None:
    """Anything finite: whoever reads a padded image multiplies its padding by zero."""
    reading = readers(builder.region.ops).get(name, ())
    if name in builder.region.outputs or any(builder.region.ops[reader].kind != "add" for reader in reading):
        raise ConflictError(name, "padding of channels is for additions only")
    source = builder.values[builder.value_of((op.sources[0], False))]
    for start, count in ((0, op.pad[0]), (op.pad[0] + source.channels, op.pad[1])):
        for first in range(0, count, source.channels):
            width = min(source.channels, count - first)
            part = builder.new_value(width, source.buffer, source.offset)
            _copy(builder, part, place[0], place[1] + start + first, width)


def _mask(builder: _Builder, image: str, channels: int, reader: str) -> Tensor:
    """1 for every channel of an image, 0 for its padding."""
    if builder.counts[image] != channels:
        raise ConflictError(reader, "it adds images of different channels")
    op = builder.region.ops.get(image)
    if op is not None and op.kind == "channel_pad":
        return F.pad(_mask(builder, op.sources[0], channels - sum(op.pad), reader), op.pad)
    return torch.ones(channels, dtype=torch.float64)


_EXACT = {(-math.inf, math.inf): Activation.NONE, (0.0, math.inf): Activation.RELU, (0.0, 6.0): Activation.RELU6}


def _add_sum(builder: _Builder, entry: Sum) -> None:
    """One step for a convolution or addition and what follows it."""
    name, channels = entry.nodes[-1], builder.counts[entry.nodes[-1]]
    op, code = builder.region.ops[entry.nodes[0]], builder.wants.codes.get(entry.nodes[-1])
    both = code is not None and name in builder.wants.floats
    activation = entry.activation
    if both and activation is Activation.NONE:
        if (entry.low, entry.high) not in _EXACT:
            raise ConflictError(name, f"a clamp to {entry.low:g} and {entry.high:g} is read as codes and as floats")
        activation = _EXACT[entry.low, entry.high]
    # with an activation, or a float copy, the codes are made at the end; otherwise all constants are in codes at once
    late = both or activation is not Activation.NONE
    scale = torch.ones(channels, dtype=torch.float64) if code is None or late else code.scale
    zero = torch.zeros(channels, dtype=torch.float64) if code is None or late else code.zero
    second = None if not entry.second else _mask(builder, entry.second, channels, name) / scale
    rows = [*_main_rows(builder, entry, scale, zero, second), *_bounds(entry, code)]
    if op.kind == "conv" and second is not None:
        rows.append(second)
    if late:
        rows += [1.0, 0.0] if code is None else [1 / code.scale, code.zero]
    is_conv = op.kind == "conv"
    other = entry.second if is_conv else entry.second or op.sources[0]
    module = builder.convolutions[entry.nodes[0]] if is_conv else None
    step = Step(
        StepKind.CONV if is_conv else StepKind.ADD, builder.value_of((op.sources[0], is_conv)),
        builder.value_of((name, code is not None)), builder.value_of((other, False)) if other else -1,
        builder.add_constants(*rows, channels=channels), 0 if module is None else builder.add_panels(module),
        1 if module is None else module.shape.groups, op.window, activation,
        builder.value_of((name, False)) if both else -1,
    )  # fmt: skip
    builder.steps.append(step)


def _main_rows(
    builder: _Builder, entry: Sum, scale: Tensor, zero: Tensor, second: Tensor | None
) -> list[Tensor | float]:
    """Multipliers and offset that lead from sums, or from the two images of an addition, to the target's units."""
    op = builder.region.ops[entry.nodes[0]]
    if op.kind != "conv":
        name = entry.nodes[0]
        first = _mask(builder, op.sources[0], builder.counts[entry.nodes[-1]], name) / scale
        return [first, 0.0 if second is None else second, zero]
    module = builder.convolutions[entry.nodes[0]]
    multiplier = module.kernel_scale.double()
    offset = -module.kernel_zero_sum.double() * multiplier
    if module.bias is not None:
        offset = offset + module.bias.double()
    return [multiplier / scale, offset / scale + zero]


def _bounds(entry: Sum, code: Code | None) -> list[Tensor | float]:
    """Lowest and highest of what the target stores."""
    if code is None:
        return [entry.low, entry.high]
    low = torch.zeros_like(code.zero)
    high = torch.full_like(code.zero, float(code.high))
    if entry.low > -math.inf:
        low = (entry.low / code.scale + code.zero).clamp(min=0)
    if entry.high < math.inf:
        high = (entry.high / code.scale + code.zero).clamp(max=code.high)
    return [low, high]


def _output(builder: _Builder, name: str) -> int:
    """A float value with a buffer of its own."""
    value = builder.value_of((name, False))
    channels, buffer = builder.counts[name], builder.values[value].buffer
    op = builder.region.ops[name]
    shared = any(place[0] == buffer and other != name for (other, coded), place in builder.places.items() if not coded)
    if builder.buffers[buffer].channels == channels and (not shared or op.kind == "cat"):
        return value
    target = builder.new_value(channels, builder.new_buffer(channels), 0)
    builder.steps.append(Step(StepKind.MAX_POOL, value, target))
    return target
