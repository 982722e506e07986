"""Which nodes of a flow one integer network can run together: images that reach each other through image operations.

Nodes that mean nothing to a network split it: everything behind one belongs to a later region, so that the network of a
region never waits for its own results.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import nn

from narrowcast.nn.flow import Flow, module_at
from narrowcast.nn.image_ops import ImageOp, image_op


@dataclass(frozen=True)
class Region:
    """Nodes that run as one network.

    Args:
        ops: name -> operation, in the order of the flow. Sources that are no key are inputs of the region.
        outputs: names that are used outside.
        members: all nodes that it stands for, identities included.
    """

    ops: dict[str, ImageOp]
    outputs: tuple[str, ...]
    members: frozenset[str]

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names that it reads and does not make."""
        return tuple(dict.fromkeys(s for op in self.ops.values() for s in op.sources if s not in self.ops))

    def worthwhile(self) -> bool:
        """Whether there is anything to gain over calling the modules one by one."""
        kinds = [op.kind for op in self.ops.values() if op.kind != "identity"]
        return "conv" in kinds and len(kinds) > 1


def modules_of(flow: Flow, owner: nn.Module) -> dict[str, nn.Module]:
    """Name of a node -> the module that it calls, for the nodes that call one."""
    return {node.name: module_at(owner, node.target) for node in flow.nodes if node.kind == "module"}


def image_ops(
    flow: Flow, modules: Mapping[str, nn.Module], excluded: frozenset[str] = frozenset()
) -> dict[str, ImageOp]:
    """The nodes that mean something to a network.

    Args:
        flow: what the forward does.
        modules: of `modules_of`.
        excluded: names of nodes that are to run as they stand.
    """
    ops: dict[str, ImageOp] = {}
    for node in flow.nodes:
        if node.name in excluded:
            continue
        module = modules.get(node.name)
        if module is not None and (module._forward_hooks or module._forward_pre_hooks):
            continue  # somebody wants to see this very call
        op = image_op(node, module)
        if op is None or any(ops[s].flat for s in op.sources if s in ops):
            continue
        if op.kind == "hardswish" and not _follows_sum(op, ops):
            continue
        ops[node.name] = op
    users = flow.users()
    for name in [name for name, op in ops.items() if op.kind == "pad"]:
        if any(user.name not in ops or ops[user.name].kind != "conv" for user in users[name]):
            del ops[name]  # only a convolution can take it in
    return ops


def _follows_sum(op: ImageOp, ops: Mapping[str, ImageOp]) -> bool:
    source = op.sources[0]
    while source in ops and ops[source].kind == "identity":
        source = ops[source].sources[0]
    return source in ops and ops[source].kind == "conv"


def find_regions(flow: Flow, modules: Mapping[str, nn.Module], excluded: frozenset[str] = frozenset()) -> list[Region]:
    """The regions of a flow that are worth a network, in an order in which they can run.

    Args:
        flow: what the forward does.
        modules: of `modules_of`, with the quantized convolutions.
        excluded: names of nodes that are to run as they stand.
    """
    ops = image_ops(flow, modules, excluded)
    level: dict[str, int] = {}
    for node in flow.nodes:
        inside = node.name in ops
        reached = [level[name] + (inside and name not in ops) for name in node.refs()]
        level[node.name] = max(reached, default=0)
    users = flow.users()
    regions = []
    for number in sorted({level[name] for name in ops}):
        members = {name: op for name, op in ops.items() if level[name] == number}
        outputs = [name for name in members if any(user.name not in members for user in users[name])]
        regions.append(without_identities(Region(members, tuple(outputs), frozenset(members))))
    return [region for region in regions if region.worthwhile()]


def without_identities(region: Region) -> Region:
    """The same region, every source named by what made it; convolutions take in the padding before them.

    Identities stay only where their name is an output.
    """

    def origin(name: str) -> str:
        while name in region.ops and region.ops[name].kind == "identity":
            name = region.ops[name].sources[0]
        return name

    ops = {}
    for name, op in region.ops.items():
        sources = tuple(origin(source) for source in op.sources)
        padding = region.ops.get(sources[0])
        if padding is not None and padding.kind == "pad":
            total = tuple(map(sum, zip(op.window.padding, padding.window.padding, strict=True)))
            window = replace(op.window, padding=(total[0], total[1], total[2], total[3]))
            op, sources = replace(op, window=window), (origin(padding.sources[0]),)
        if op.kind not in ("identity", "pad") or name in region.outputs:
            ops[name] = replace(op, sources=sources)
    return Region(ops, region.outputs, region.members)


def readers(ops: Mapping[str, ImageOp]) -> dict[str, list[str]]:
    """Name -> the operations that read it, one entry per use; names from outside included."""
    found: dict[str, list[str]] = {}
    for name, op in ops.items():
        for source in op.sources:
            found.setdefault(source, []).append(name)
    return found
