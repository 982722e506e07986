"""Reading the flow of a module off a symbolic trace; where that is not possible, of the parts that can be traced."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import fx, nn

from narrowcast.models.layer_kinds import kind_of
from narrowcast.nn import InstalledModule
from narrowcast.nn.flow import FUNCTIONS, Flow, FlowNode, Ref

_NAMES: dict[int, str] = {id(function): name for name, function in FUNCTIONS.items()}
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


class _UntraceableError(Exception):
    """Why a module has no flow."""


class _Tracer(fx.Tracer):
    """Enters the model's own modules; those of torch.nn and those that narrowcast knows are called as they are."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if type(m) in _CONTAINERS:
            return False
        own = m.__module__.startswith("torch.nn")
        return isinstance(m, InstalledModule) or kind_of(m) is not None or own or _watched(m)


def _watched(module: nn.Module) -> bool:
    """Whether hooks want to see this very call."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def find_flows(model: nn.Module, wanted: Callable[[nn.Module], bool]) -> tuple[dict[str, Flow], dict[str, str]]:
    """The flows of the largest parts of a model that can be traced. Changes nothing.

    Args:
        model: in evaluation mode.
        wanted: which modules a flow is for; parts without two of them are passed over.

    Returns:
        flows: path -> flow of the module there; no path lies inside another.
        refused: path -> why the module there has no flow.
    """
    flows: dict[str, Flow] = {}
    refused: dict[str, str] = {}
    pending = [("", model)]
    while pending:
        path, module = pending.pop()
        if sum(wanted(part) for part in module.modules()) < 2 or isinstance(module, InstalledModule):
            continue
        try:
            if type(module) in _CONTAINERS[1:]:
                raise _UntraceableError("it has no forward")
            flows[path] = _flow_of(module)
            continue
        except _UntraceableError as reason:
            refused[path] = str(reason)
        children = [(f"{path}.{name}" if path else name, child) for name, child in module.named_children()]
        pending += reversed(children)
    return flows, refused


def _flow_of(module: nn.Module) -> Flow:
    """Raises _UntraceableError with the reason."""
    try:
        graph = _Tracer().trace(module, concrete_args=_defaults(module))
    except _UntraceableError:
        raise
    except Exception as error:  # tracing runs the model's own code on placeholders: anything can fail there
        first = (str(error).strip().splitlines() or [""])[0]
        raise _UntraceableError(f"{type(error).__name__}: {first:.160}") from error
    _erase_checks_(graph)
    nodes = []
    for node in graph.nodes:
        if node.op == "placeholder" and not node.users:
            continue  # an argument that was fixed at its default
        _refuse_mutation(node, module)
        translated = _translate(node)
        if problem := translated.problem():
            raise _UntraceableError(problem)
        nodes.append(translated)
    return Flow(tuple(nodes))


def _defaults(module: nn.Module) -> dict[str, Any]:
    """Arguments that have a default are traced at it: a call that gives them runs the ordinary forward."""
    parameters = list(inspect.signature(module.forward).parameters.values())
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise _UntraceableError(f"its forward takes *{parameter.name}")
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def _erase_checks_(graph: fx.Graph) -> None:
    """Drop the assertions that fx writes for fixed arguments, and the comparisons they are about."""
    for node in reversed(list(graph.nodes)):
        name = getattr(node.target, "__name__", "")
        if node.op == "call_function" and (name.startswith("_assert") or (name == "eq" and not node.users)):
            graph.erase_node(node)


def _refuse_mutation(node: fx.Node, root: nn.Module) -> None:
    """A flow knows results, not memory: a tensor that is changed in place may not be used again afterwards."""
    if not _changes_in_place(node, root) or not node.args or not isinstance(node.args[0], fx.Node):
        return
    later, seen = False, False
    for other in node.graph.nodes:
        later = later or (seen and other in node.args[0].users)
        seen = seen or other is node
    if later or not node.users:
        raise _UntraceableError(f"{node.name} changes {node.args[0].name} in place, which is used again afterwards")


def _changes_in_place(node: fx.Node, root: nn.Module) -> bool:
    if node.op == "call_module":
        return bool(getattr(root.get_submodule(str(node.target)), "inplace", False))
    if node.op == "call_method":
        return str(node.target).endswith("_")
    name = getattr(node.target, "__name__", "")
    is_inplace = name.endswith("_") or (name.startswith("i") and name[1:] in ("add", "mul", "sub"))
    return node.op == "call_function" and (is_inplace or bool(node.kwargs.get("inplace", False)))


def _translate(node: fx.Node) -> FlowNode:
    args = tuple(_value(entry) for entry in node.args)
    kwargs = tuple((key, _value(entry)) for key, entry in node.kwargs.items())
    if node.op == "placeholder":
        return FlowNode(node.name, "input")
    if node.op == "output":
        return FlowNode(node.name, "output", "", args)
    if node.op == "call_module":
        return FlowNode(node.name, "module", str(node.target), args, kwargs)
    if node.op == "call_method":
        return FlowNode(node.name, "method", str(node.target), args, kwargs)
    if node.op == "call_function" and node.target is getattr:
        return FlowNode(node.name, "attribute", str(node.args[1]), args[:1])
    if node.op == "call_function" and id(node.target) in _NAMES:
        return FlowNode(node.name, "function", _NAMES[id(node.target)], args, kwargs)
    what = getattr(node.target, "__name__", str(node.target))
    raise _UntraceableError(f"it uses {what} ({node.op}), which is not in the table of what flows may call")


def _value(entry: Any) -> Any:
    if isinstance(entry, fx.Node):
        return Ref(entry.name)
    if isinstance(entry, slice):
        return slice(_value(entry.start), _value(entry.stop), _value(entry.step))
    if isinstance(entry, list | tuple):
        return tuple(_value(part) for part in entry)
    if entry is None or isinstance(entry, bool | int | float | str):
        return entry
    raise _UntraceableError(f"an argument is a {type(entry).__name__}, which flows do not hold")
