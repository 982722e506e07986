"""IntegerGraph: a module's forward in which chains of integer convolutions run as networks, 8-bit codes between them.

`fuse_` gives a module such a forward without replacing it: the module becomes an instance of a subclass of its own
class, as torch's parametrizations do, so that its submodules, methods, hooks and state dict stay what they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from narrowcast.kernels import kernel_name
from narrowcast.nn.conv import QuantizedConv
from narrowcast.nn.flow import Flow, FlowNode, resolve_output
from narrowcast.nn.network_builder import Network, build_network
from narrowcast.nn.network_codes import ConflictError
from narrowcast.nn.regions import Region, find_regions, modules_of


@dataclass(eq=False)
class _Call:
    """One network of the forward: its tensors, the names it reads, and (name, drops two dimensions) of its results."""

    program: Tensor
    constants: Tensor
    panels: Tensor
    plan: list[int]
    inputs: tuple[str, ...]
    outputs: tuple[tuple[str, bool], ...]
    members: frozenset[str]

    @classmethod
    def of(cls, region: Region, network: Network) -> _Call:
        outputs = tuple((name, region.ops[name].flat) for name in region.outputs)
        program = network.program
        return cls(
            program.encode(), network.constants, network.panels, program.output_plan(), region.inputs, outputs,
            region.members,
        )  # fmt: skip

    def run(self, results: dict[str, Any]) -> None:
        made = torch.ops.narrowcast.conv_network_int8(
            [results[name] for name in self.inputs], self.program, self.constants, self.panels, self.plan
        )
        for (name, flat), image in zip(self.outputs, made, strict=True):
            results[name] = image.flatten(1) if flat else image


class IntegerGraph:
    """How a module's forward runs: networks, and what lies between them as it stands.

    Args:
        flow: what the forward does.
        owner: the module; its quantized convolutions are prepared.

    Attributes:
        flow: as given.
        left_out: name of a node -> why it is not part of a network although it could have been.
        fused: paths of the convolutions that run inside networks.
    """

    def __init__(self, flow: Flow, owner: nn.Module) -> None:
        self.flow = flow
        self.left_out: dict[str, str] = {}
        modules = modules_of(flow, owner)
        convolutions = {name: module for name, module in modules.items() if isinstance(module, QuantizedConv)}
        self._calls = self._build(modules, convolutions)
        members = {name for call in self._calls for name in call.members}
        targets = {node.name: node.target for node in flow.nodes if node.name in convolutions}
        self.fused = tuple(path for name, path in targets.items() if name in members)
        self._schedule = _schedule(flow, self._calls, members)

    def _build(self, modules: dict[str, nn.Module], convolutions: dict[str, QuantizedConv]) -> list[_Call]:
        while True:
            calls, networks = [], []
            try:
                for region in find_regions(self.flow, modules, frozenset(self.left_out)):
                    network = build_network(region, convolutions)
                    networks.append(network)
                    calls.append(_Call.of(region, network))
            except ConflictError as conflict:
                self.left_out[conflict.node] = conflict.reason
                continue
            for network in networks:
                _share_panels_(network, convolutions)
            return calls

    @property
    def networks(self) -> int:
        """How many networks there are."""
        return len(self._calls)

    @property
    def kernel(self) -> str:
        """The op and instruction set that runs the networks."""
        return kernel_name("conv_network_int8")

    def run(self, owner: nn.Module, args: tuple[Tensor, ...]) -> Any:
        """The forward of `owner` on images [batch, channels, height, width]."""
        results: dict[str, Any] = dict(zip(self.flow.inputs, args, strict=True))
        for entry in self._schedule:
            if isinstance(entry, _Call):
                entry.run(results)
            elif entry.kind == "output":
                return resolve_output(entry, results)
            else:
                results[entry.name] = entry.run(owner, results)
        raise AssertionError("a flow ends with its output")

    def takes(self, args: tuple[Any, ...]) -> bool:
        """Whether these arguments are those that the flow was made for."""
        fitting = len(args) == len(self.flow.inputs)
        return fitting and all(
            isinstance(x, Tensor) and x.dim() == 4 and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
            for x in args
        )

    def apply_(self, move: Callable[[Tensor], Tensor]) -> None:
        """Move the tensors as `nn.Module._apply` does; element types stay."""
        for call in self._calls:
            for name in ("program", "constants", "panels"):
                tensor = getattr(call, name)
                setattr(call, name, tensor.to(move(tensor).device))


def _share_panels_(network: Network, convolutions: dict[str, QuantizedConv]) -> None:
    """Let the convolutions read their weights where the network has them: memory holds them once."""
    for name, (begin, end) in network.views.items():
        convolutions[name].kernel_panels = network.panels[begin:end]


def _schedule(flow: Flow, calls: list[_Call], members: set[str]) -> list[_Call | FlowNode]:
    """Networks and nodes in an order in which everything is there when it is needed."""
    known: set[str] = set(flow.inputs)
    pending: list[_Call | FlowNode] = [*calls]
    pending += [node for node in flow.nodes if node.kind != "input" and node.name not in members]
    ordered: list[_Call | FlowNode] = []
    while pending:
        for entry in pending:
            needs = entry.inputs if isinstance(entry, _Call) else tuple(entry.refs())
            if known.issuperset(needs):
                break
        else:
            raise AssertionError("networks wait for each other")
        pending.remove(entry)
        ordered.append(entry)
        known.update([name for name, _ in entry.outputs] if isinstance(entry, _Call) else [entry.name])
    return ordered


class _Fused:
    """Mixed into the class of a module by `fuse_`."""

    _integer_graph: IntegerGraph

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The integer graph where the call is what it was made for, else the module's own forward."""
        if kwargs or self.training or not self._integer_graph.takes(args):  # type: ignore[attr-defined]
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        return self._integer_graph.run(self, args)  # type: ignore[arg-type]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        moved = super()._apply(fn, recurse)  # type: ignore[misc]
        self._integer_graph.apply_(fn)
        return moved

    def __reduce_ex__(self, protocol: Any) -> Any:
        # the class is made at run time, so pickle cannot find it by its name
        return _restore, (type(self).__mro__[2], self.__dict__)


def _restore(base: type[nn.Module], state: dict[str, Any]) -> nn.Module:
    module = base.__new__(base)
    module.__dict__.update(state)
    module.__class__ = _fused_class(base)
    return module


_CLASSES: dict[type, type] = {}


def _fused_class(base: type) -> type:
    if base not in _CLASSES:
        _CLASSES[base] = type(base.__name__, (_Fused, base), {"__module__": base.__module__, "__doc__": base.__doc__})
    return _CLASSES[base]


def fuse_(module: nn.Module, flow: Flow) -> IntegerGraph:
    """Give a module a forward in which chains of integer convolutions run as networks. Changes the module.

    Args:
        module: its quantized convolutions are installed.
        flow: what its forward does.

    Returns:
        The graph; without networks in it the module is left as it is.
    """
    unfuse_(module)
    graph = IntegerGraph(flow, module)
    if graph.fused:
        module.__dict__["_integer_graph"] = graph
        module.__class__ = _fused_class(type(module))
    return graph


def unfuse_(module: nn.Module) -> None:
    """Give a fused module its own forward back."""
    if isinstance(module, _Fused):
        base = type(module).__mro__[2]
        del module.__dict__["_integer_graph"]
        module.__class__ = base


@contextmanager
def apart(*models: nn.Module) -> Iterator[bool]:
    """While it lasts, models run module by module; yields whether any has networks."""
    fused = [
        (module, type(module), graph) for model in models for module in model.modules() if (graph := graph_of(module))
    ]
    for module, _, _ in fused:
        unfuse_(module)
    try:
        yield bool(fused)
    finally:
        for module, kind, graph in fused:
            module.__dict__["_integer_graph"] = graph
            module.__class__ = kind


def graph_of(module: nn.Module) -> IntegerGraph | None:
    """The integer graph of a fused module; None for any other."""
    graph: IntegerGraph | None = module.__dict__.get("_integer_graph")
    return graph
