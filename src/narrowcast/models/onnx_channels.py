"""Which channels of which values may be scaled, so that one scale per value carries a range per channel.

ONNX Runtime's kernels know one scale for a whole value. A static convolution can write each output channel in units of
its own, at no cost: its weight has a scale per output channel anyway. Whatever reads the value must then take the units
in: products by the columns of their weights. Between them the units pass through everything that commutes with positive
factors. Where values are added, their channels have the same units; a channel that reaches anything else has unit 1.

This is the structure alone; the units are chosen from calibrated ranges (pipeline/onnx_units.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import onnx_ir as ir

from narrowcast.models.onnx_handover import number
from narrowcast.models.onnx_layers import attribute

Array = Any
# One input, channels as they were.
_SAME = ("Relu", "LeakyRelu", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Identity", "Dropout")
# Where the channels lie: [samples, channels, ...].
_AXIS = 1


@dataclass
class ScalableChannels:
    """The channels of the values between static products.

    Args:
        of: by the value's name, the number of each of its channels; equal numbers have equal units.
        reasons: by such a number, why its unit is 1.
        made_of: by the name of a value that passes units on, the values that it is made of.
        clips: by the name of a Clip's output, its upper end.
        strangers: by a value's name, why none of its channels can have units.
    """

    of: dict[str, Array] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    made_of: dict[str, list[str]] = field(default_factory=dict)
    clips: dict[str, float] = field(default_factory=dict)
    strangers: dict[str, str] = field(default_factory=dict)

    def free(self, name: str) -> Array:
        """[channels] bool: which channels of a value may have a unit of their own."""
        return np.array([int(channel) not in self.reasons for channel in self.of.get(name, ())], bool)

    def why_not(self, name: str) -> str:
        """Why a value has one range for all channels; "" where it need not."""
        if name not in self.of:
            return self.strangers.get(name, "no static convolution makes it")
        fixed = [self.reasons[int(channel)] for channel in self.of[name] if int(channel) in self.reasons]
        return fixed[0] if len(fixed) == len(self.of[name]) else ""


@dataclass
class _Follower:
    """Goes through the graph once; `parents` joins channels that have the same unit."""

    products: Mapping[int, str]
    found: ScalableChannels = field(default_factory=ScalableChannels)
    parents: list[int] = field(default_factory=list)

    def new(self, count: int) -> Array:
        """Channels that nothing ties yet."""
        start = len(self.parents)
        self.parents.extend(range(start, start + count))
        return np.arange(start, start + count)

    def root(self, channel: int) -> int:
        """The number that speaks for a channel."""
        while self.parents[channel] != channel:
            self.parents[channel] = self.parents[self.parents[channel]]
            channel = self.parents[channel]
        return channel

    def tie(self, first: Array, second: Array) -> None:
        """Give both the same units."""
        for one, other in zip(first, second, strict=True):
            a, b = self.root(int(one)), self.root(int(other))
            if a == b:
                continue
            self.parents[b] = a
            why = self.found.reasons.pop(b, "")
            if why:
                self.found.reasons.setdefault(a, why)

    def channels(self, value: ir.Value | None) -> Array | None:
        """The channels of a value; None where no static convolution made it."""
        return None if value is None else self.found.of.get(str(value.name))

    def fix(self, value: ir.Value | None, why: str) -> None:
        """All channels of a value have unit 1."""
        for channel in self.found.of.get("" if value is None else str(value.name), ()):
            self.found.reasons.setdefault(self.root(int(channel)), why)


def scalable_channels(graph: ir.Graph, products: Mapping[int, str]) -> ScalableChannels:
    """The channels that may have units.

    Args:
        graph: the main graph, nodes in an order in which they can run.
        products: by id of a static Conv, Gemm or MatMul, why its weight cannot take in units; "" where it can.
    """
    follower = _Follower(products)
    for node in graph:
        for inner in _seen_inside(node):
            follower.fix(inner, f"a graph inside of {node.name} reads it")
        if id(node) in products:
            _product(follower, node)
        elif any(follower.channels(value) is not None for value in node.inputs):
            _pass(follower, node)
    for value in graph.outputs:
        follower.fix(value, "the model returns it")
    found = follower.found
    found.of = {name: np.array([follower.root(int(c)) for c in channels]) for name, channels in found.of.items()}
    return found


def _seen_inside(node: ir.Node) -> list[ir.Value]:
    graphs = [a.as_graph() for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH]
    return [value for graph in graphs for inner in graph for value in inner.inputs if value is not None]


def _product(follower: _Follower, node: ir.Node) -> None:
    """A static product takes in the units of its input, and a convolution makes new ones."""
    source, why = node.inputs[0], follower.products[id(node)]
    assert source is not None
    if node.op_type != "Conv" and (source.shape is None or len(source.shape) != 2):
        why = why or f"{node.name} multiplies its last axis"
    if why:
        follower.fix(source, why)
        follower.found.strangers.setdefault(str(source.name), why)
    for value in node.inputs[1:]:
        follower.fix(value, f"{node.name} has it as a weight or bias")
    if node.op_type == "Conv":
        weight, bias = node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None
        assert weight is not None and weight.shape is not None
        follower.found.of[str(node.outputs[0].name)] = follower.new(int(weight.shape[0]))
        if bias is not None and bias.const_value is None:
            follower.fix(node.outputs[0], f"the bias of {node.name} is computed")


def _pass(follower: _Follower, node: ir.Node) -> None:
    """The units of a node's output, or an end to them."""
    rule = _RULES.get(node.op_type) if node.domain in ("", "ai.onnx") else None
    channels = None if rule is None else rule(follower, node)
    if channels is None:
        for value in node.inputs:
            follower.fix(value, f"{node.op_type} {node.name} reads it")
        for value in node.outputs:
            follower.found.strangers[str(value.name)] = f"{node.op_type} makes it"
        return
    name, sources = str(node.outputs[0].name), [str(value.name) for value in node.inputs if value is not None]
    follower.found.of[name] = channels
    follower.found.made_of[name] = [source for source in sources if source in follower.found.of]


def _same(follower: _Follower, node: ir.Node) -> Array | None:
    return follower.channels(node.inputs[0]) if len(node.outputs) == 1 else None


def _clip(follower: _Follower, node: ir.Node) -> Array | None:
    """A Clip from 0: its upper end is the codes'."""
    ends = [node.inputs[index] if len(node.inputs) > index else None for index in (1, 2)]
    low = attribute(node, "min", None) if ends[0] is None else number(ends[0])
    high = attribute(node, "max", np.inf) if ends[1] is None else number(ends[1])
    if low != 0.0 or high is None:
        return None
    follower.found.clips[str(node.outputs[0].name)] = float(high)
    return follower.channels(node.inputs[0])


def _add(follower: _Follower, node: ir.Node) -> Array | None:
    """Both sides in the same units."""
    first, second = (follower.channels(value) for value in node.inputs)
    ranks = {None if value is None or value.shape is None else len(value.shape) for value in node.inputs}
    if first is None or second is None or len(first) != len(second) or len(ranks) != 1 or None in ranks:
        return None
    follower.tie(first, second)
    return first


def _concat(follower: _Follower, node: ir.Node) -> Array | None:
    parts = [follower.channels(value) for value in node.inputs]
    known = [part for part in parts if part is not None]
    return np.concatenate(known) if attribute(node, "axis", 0) == _AXIS and len(known) == len(parts) else None


def _slice(follower: _Follower, node: ir.Node) -> Array | None:
    """Rows and columns of an image."""
    axes = _constant(node, 3)
    return None if axes is None or bool(np.isin(axes, (_AXIS, _negative(node))).any()) else _same(follower, node)


def _negative(node: ir.Node) -> int:
    """The axis of the channels counted from the end."""
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    return _AXIS if shape is None else _AXIS - len(shape)


def _pad(follower: _Follower, node: ir.Node) -> Array | None:
    """Zeros around an image, or as more channels, which are zero in any unit."""
    sides, filled = _constant(node, 1), _constant(node, 2)
    channels = follower.channels(node.inputs[0])
    plain = attribute(node, "mode", "constant") == "constant" and (len(node.inputs) < 4 or node.inputs[3] is None)
    given = len(node.inputs) > 2 and node.inputs[2] is not None
    if channels is None or sides is None or not plain or (given and (filled is None or filled.any())):
        return None
    before, after = int(sides[_AXIS]), int(sides[_AXIS + len(sides) // 2])
    if before < 0 or after < 0:
        return None
    return np.concatenate([follower.new(before), channels, follower.new(after)])


def _mean(follower: _Follower, node: ir.Node) -> Array | None:
    """The mean of an image."""
    axes = attribute(node, "axes", None) if len(node.inputs) < 2 else _constant(node, 1)
    shape = None if node.inputs[0] is None else node.inputs[0].shape
    if axes is None or shape is None:
        return None
    return _same(follower, node) if min(int(axis) % len(shape) for axis in axes) > _AXIS else None


def _flatten(follower: _Follower, node: ir.Node) -> Array | None:
    """[samples, channels, ...] as vectors: each channel as often as it has positions."""
    value, output = node.inputs[0], node.outputs[0]
    channels = follower.channels(value)
    if channels is None or value is None or value.shape is None or output.shape is None or len(output.shape) != 2:
        return None
    sides, last = list(value.shape)[2:], output.shape[1]
    if not all(isinstance(side, int) for side in sides) or last != len(channels) * prod(int(s) for s in sides):
        return None
    return np.repeat(channels, prod(int(side) for side in sides))


def _constant(node: ir.Node, index: int) -> Array | None:
    """A constant input as an array."""
    value = node.inputs[index] if len(node.inputs) > index else None
    return None if value is None or value.const_value is None else np.atleast_1d(value.const_value.numpy())


_RULES: dict[str, Callable[[_Follower, ir.Node], Array | None]] = {
    **dict.fromkeys(_SAME, _same),
    "Clip": _clip,
    "Add": _add,
    "Concat": _concat,
    "Slice": _slice,
    "Pad": _pad,
    "ReduceMean": _mean,
    "Flatten": _flatten,
    "Reshape": _flatten,
    "Squeeze": _flatten,
}
