"""Which values of a graph travel as 8-bit codes, with whose ranges, and which stay float: every one is rounded once.

A product wants its input in the codes that calibration gave it, with a range per channel. The wish travels back
through Relu, Clip, pools and concatenations to the operation that makes the value. Where that is a convolution and
nobody wants the value otherwise, the convolution writes those very codes. What is also added, averaged, returned or
wanted with other ranges stays float, and each reader rounds it for itself: so do the modules (nn/network_codes.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from narrowcast.models.onnx_layers import attribute

Array = Any
_HIGHEST = 255
# Codes pass through these as they are; a range per channel only where channels stay what they are.
_KEEPS_CHANNELS = ("MaxPool", "Identity")
_MOVES_CHANNELS = ("Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze")
_RECTIFIERS = ("Relu", "Clip")
_CONSTANTS = ("value", "value_float", "value_int")


@dataclass(frozen=True, eq=False)
class Codes:
    """What the codes of a value mean: value = (code - zero) * scale, with a range per channel.

    ONNX Runtime's products know one scale and one zero point for all channels, `common` and `common_zero`. They get the
    codes as they are, and read them as values `(code - common_zero) * common`: the difference is in the weights.

    Args:
        scale: [channels] or [1] float32.
        zero: [channels] or [1] int64, 0 to 255.
        common: the largest scale of the product that wants these codes.
        common_zero: the zero point of all channels, where they have one.
        axis: along which the channels lie: 1, or -1 for the last.
    """

    scale: Array
    zero: Array
    common: float
    common_zero: int
    axis: int

    @classmethod
    def of(cls, scale: Array, zero: Array, axis: int) -> Codes:
        """Of a product with these ranges."""
        zero = np.asarray(zero, np.int64).reshape(-1)
        scale = np.asarray(scale, np.float32).reshape(-1)
        return cls(scale, zero, float(scale.max()), int(np.median(zero)), axis)

    @property
    def is_one_range(self) -> bool:
        """Whether all channels have one range, so that it does not matter which axis they lie along."""
        return self.has_one_zero and bool((self.scale == self.common).all())

    @property
    def has_one_zero(self) -> bool:
        """Whether 0.0 has the same code in all channels."""
        return bool((self.zero == self.common_zero).all())

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal where codes mean the same."""
        ranges = (self.common, self.common_zero)
        return ranges if self.is_one_range else (*ranges, self.axis, self.scale.tobytes(), self.zero.tobytes())

    def part(self, start: int, count: int) -> Codes:
        """The codes of some of the channels."""
        if self.scale.size == 1:
            return self
        end = start + count
        return replace(self, scale=self.scale[start:end], zero=self.zero[start:end])

    def cuts_at(self, high: float) -> bool:
        """Whether values below 0 and above `high` have the codes of 0 and `high`, so that nothing need cut them."""
        return not self.zero.any() and bool((high / self.scale > _HIGHEST - 0.5).all())


@dataclass
class Handover:
    """Which values travel as codes.

    Args:
        wanted: by the value's name, the codes that all readers agree on.
        floats: names of the values that somebody needs as they are.
        padded: ids of the convolutions whose input is padded as a float, since 0.0 has no single code.
        dropped: the rectifiers that codes make superfluous.
        moved: the nodes that compute in codes besides products, with the codes of each input.
    """

    wanted: dict[str, Codes] = field(default_factory=dict)
    floats: set[str] = field(default_factory=set)
    padded: set[int] = field(default_factory=set)
    dropped: list[ir.Node] = field(default_factory=list)
    moved: list[tuple[ir.Node, list[Codes]]] = field(default_factory=list)

    def coded(self, value: ir.Value) -> Codes | None:
        """The codes in which a value is made; None where it is made as floats."""
        made_here = value.producer() is not None and str(value.name) not in self.floats
        return self.wanted.get(str(value.name)) if made_here else None

    def _want(self, value: ir.Value, codes: Codes) -> None:
        if self.wanted.setdefault(str(value.name), codes).key != codes.key:
            self.floats.add(str(value.name))

    def _need(self, values: Any) -> None:
        self.floats.update(str(value.name) for value in values if value is not None)


def hand_over(graph: ir.Graph, products: Mapping[int, Codes]) -> Handover:
    """What the readers of every value want, followed back to where it is made.

    Args:
        graph: the main graph, nodes in an order in which they can run.
        products: id of a node -> the codes that it wants as its first input.
    """
    found = Handover()
    found._need(graph.outputs)
    for node in reversed(list(graph)):
        found._need(value for value in _seen_inside(node))
        if id(node) in products:
            codes = products[id(node)]
            if not codes.has_one_zero and any(attribute(node, "pads", [])):
                found.padded.add(id(node))
                found._need(node.inputs[:1])
            found._want(node.inputs[0], codes)
            if not _writes_codes(node, found.coded(node.outputs[0])):
                found._need(node.outputs)
            continue
        output = found.coded(node.outputs[0]) if len(node.outputs) == 1 else None
        parts = _parts(node, output) if output is not None else None
        if parts is None:
            found._need(node.inputs)
            found._need(node.outputs)
            continue
        if node.op_type in _RECTIFIERS:
            found.dropped.append(node)
        else:
            found.moved.append((node, [codes for _, codes in parts]))
        for value, codes in parts:
            found._want(value, codes)
    return found


def _writes_codes(node: ir.Node, codes: Codes | None) -> bool:
    """Whether a product gives its output in these codes; a Gemm or MatMul gives floats at no cost."""
    return node.op_type == "Conv" and codes is not None and (codes.axis == 1 or codes.is_one_range)


def _seen_inside(node: ir.Node) -> list[ir.Value]:
    """Values of the graph that nodes of a node's own graphs read."""
    graphs = [a.as_graph() for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH]
    return [value for graph in graphs for inner in graph for value in inner.inputs if value is not None]


def _parts(node: ir.Node, codes: Codes) -> list[tuple[ir.Value, Codes]] | None:
    """What a node's inputs are to be, so that its output is in these codes; None where that cannot be."""
    if node.domain != "":
        return None
    source = node.inputs[0]
    if node.op_type in _KEEPS_CHANNELS and (codes.axis == 1 or codes.is_one_range):
        return [(source, codes)]
    if node.op_type in _MOVES_CHANNELS and codes.is_one_range:
        return [(source, codes)]
    if node.op_type in _RECTIFIERS:
        return [(source, codes)] if _cut_by_codes(node, codes) else None
    if node.op_type != "Concat":
        return None
    if codes.is_one_range:
        return [(value, codes) for value in node.inputs]
    return _split(node, codes) if attribute(node, "axis", 0) == codes.axis == 1 else None


def _split(node: ir.Node, codes: Codes) -> list[tuple[ir.Value, Codes]] | None:
    parts, start = [], 0
    for value in node.inputs:
        sides = None if value.shape is None or len(value.shape) < 2 else value.shape[1]
        if not isinstance(sides, int):
            return None
        parts.append((value, codes.part(start, sides)))
        start += sides
    return parts if start == codes.scale.size else None


def _cut_by_codes(node: ir.Node, codes: Codes) -> bool:
    """Whether codes end where a Relu or Clip cuts."""
    low, high = (0.0, np.inf) if node.op_type == "Relu" else (_end(node, 1, "min"), _end(node, 2, "max"))
    return low == 0.0 and high is not None and codes.cuts_at(high)


def _end(node: ir.Node, index: int, name: str) -> float | None:
    """An end of a Clip; None where it is not known."""
    if len(node.inputs) <= index or node.inputs[index] is None:
        value = attribute(node, name, -np.inf if index == 1 else np.inf)
        return float(value)
    return number(node.inputs[index])


def number(value: ir.Value) -> float | None:
    """The number that a value is, through the casts that torch's exporter writes; None where it is computed."""
    if value.const_value is not None:
        return float(value.const_value.numpy())
    node = value.producer()
    if node is not None and node.op_type in ("CastLike", "Cast", "Identity"):
        return number(node.inputs[0])
    if node is None or node.op_type != "Constant":
        return None
    held = [found for name in _CONSTANTS if (found := attribute(node, name, None)) is not None]
    return float(held[0].numpy() if hasattr(held[0], "numpy") else held[0]) if held else None
