"""Which clamps, activations and additions become part of the convolution or addition before them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from narrowcast.kernels.network import Activation
from narrowcast.nn.network_codes import ConflictError
from narrowcast.nn.regions import Region, readers


@dataclass
class Sum:
    """One step: a convolution, addition or clamp with what follows it.

    Args:
        nodes: from the head to the last node that it takes in; the image it makes has the last one's name.
        second: the image that is added; "" where there is none.
        low, high: of the clamp at the end.
        activation: HARDSWISH or NONE.
    """

    nodes: list[str]
    second: str = ""
    low: float = -math.inf
    high: float = math.inf
    activation: Activation = Activation.NONE


def find_sums(region: Region) -> list[Sum]:
    """The steps that the convolutions, additions, clamps and hard-swishes of a region make together.

    Raises:
        ConflictError: a hard-swish that no convolution can take in.
    """
    uses = readers(region.ops)
    position = {name: index for index, name in enumerate(region.ops)}
    ready: dict[str, int] = {}  # image -> position of the step that makes it
    taken: set[str] = set()
    sums = []

    def only_reader(name: str) -> str:
        return uses[name][0] if len(uses.get(name, ())) == 1 and name not in region.outputs else ""

    for name, op in region.ops.items():
        if name in taken or op.kind not in ("conv", "add", "clamp", "hardswish"):
            ready.setdefault(name, position[name])
            continue
        entry = Sum([name], op.sources[1] if op.kind == "add" else "", op.low, op.high)
        following = only_reader(name)
        if op.kind == "conv" and following and region.ops[following].kind == "add":
            other = next((source for source in region.ops[following].sources if source != name), "")
            if other and (other not in region.ops or ready.get(other, len(position)) < position[name]):
                entry.nodes.append(following)
                entry.second, following = other, only_reader(following)
        after = region.ops[following] if following and op.kind != "clamp" else None
        if after is not None and after.kind == "clamp":
            entry.low, entry.high = after.low, after.high
            entry.nodes.append(following)
        elif after is not None and after.kind == "hardswish" and op.kind == "conv":
            entry.activation = Activation.HARDSWISH
            entry.nodes.append(following)
        if op.kind == "hardswish":
            raise ConflictError(name, "it does not follow a convolution alone")
        taken.update(entry.nodes)
        ready |= dict.fromkeys(entry.nodes, position[name])
        sums.append(entry)
    return sums
