"""Flow: what a module's forward does, as plain data: which submodules and functions it calls on what, in which order.

A flow is read off a trace (`models/trace.py`), stored in checkpoints as JSON, and run again without the trace. It names
functions out of one closed table, so that a checkpoint cannot make it call anything else.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from narrowcast.errors import CheckpointError

_OPERATORS = ("add", "iadd", "sub", "mul", "imul", "truediv", "floordiv", "neg", "getitem")
_TORCH = (
    "abs", "add", "cat", "chunk", "clamp", "concat", "exp", "flatten", "matmul", "mean", "mul", "permute", "relu",
    "relu_", "reshape", "sigmoid", "softmax", "split", "sqrt", "squeeze", "stack", "sub", "sum", "tanh", "transpose",
    "unsqueeze",
)  # fmt: skip
_FUNCTIONAL = (
    "adaptive_avg_pool2d", "adaptive_max_pool2d", "avg_pool2d", "dropout", "dropout2d", "elu", "gelu", "hardsigmoid",
    "hardswish", "hardtanh", "interpolate", "layer_norm", "leaky_relu", "log_softmax", "max_pool2d", "mish",
    "normalize", "pad", "pixel_shuffle", "pixel_unshuffle", "prelu", "relu", "relu6", "sigmoid", "silu", "softmax",
    "softplus", "tanh",
)  # fmt: skip
_METHODS = frozenset({
    "abs", "add", "add_", "amax", "chunk", "clamp", "clamp_", "contiguous", "dim", "exp", "expand", "flatten", "float",
    "max", "mean", "mul", "mul_", "permute", "relu", "relu_", "repeat", "reshape", "sigmoid", "sigmoid_", "size",
    "softmax", "split", "sqrt", "squeeze", "sub", "sum", "t", "tanh", "tanh_", "transpose", "unflatten", "unsqueeze",
    "view",
})  # fmt: skip
_ATTRIBUTES = frozenset({"shape", "T", "mT"})

FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{f"operator.{name}": getattr(operator, name) for name in _OPERATORS},
    **{f"torch.{name}": getattr(torch, name) for name in _TORCH},
    **{f"functional.{name}": getattr(F, name) for name in _FUNCTIONAL},
}
"""Every function that a flow may call, by the name it is stored under."""

_KINDS = ("input", "module", "function", "method", "attribute", "output")


@dataclass(frozen=True)
class Ref:
    """The result of an earlier node."""

    name: str


@dataclass(frozen=True)
class FlowNode:
    """One thing that a forward does.

    Args:
        name: of its result.
        kind: "input" (the next argument), "module", "function", "method", "attribute" of a tensor, or "output".
        target: path of the module, name in FUNCTIONS, of the method or the attribute; "" otherwise.
        args: positional arguments: numbers, strings, None, slices, Refs, and tuples of these.
        kwargs: named ones.
    """

    name: str
    kind: str
    target: str = ""
    args: tuple[Any, ...] = ()
    kwargs: tuple[tuple[str, Any], ...] = ()

    def refs(self) -> Iterator[str]:
        """Names of the results that it uses, each as often as it does."""
        for value in (*self.args, *(value for _, value in self.kwargs)):
            yield from _refs(value)

    def run(self, owner: nn.Module, results: dict[str, Any]) -> Any:
        """Its result, for a node that is neither input nor output.

        Args:
            owner: the module whose forward this is.
            results: of the nodes before.
        """
        args = [_resolve(value, results) for value in self.args]
        kwargs = {key: _resolve(value, results) for key, value in self.kwargs}
        if self.kind == "module":
            return module_at(owner, self.target)(*args, **kwargs)
        if self.kind == "function":
            return FUNCTIONS[self.target](*args, **kwargs)
        if self.kind == "method":
            return getattr(args[0], self.target)(*args[1:], **kwargs)
        return getattr(args[0], self.target)

    def to_list(self) -> list[Any]:
        """JSON values."""
        return [
            self.name, self.kind, self.target, [_to_json(value) for value in self.args],
            {key: _to_json(value) for key, value in self.kwargs},
        ]  # fmt: skip

    @classmethod
    def from_list(cls, values: Any) -> FlowNode:
        """The inverse of `to_list`.

        Raises:
            CheckpointError: it is no such list, or names what a flow may not call.
        """
        try:
            name, kind, target, args, kwargs = values
            node = cls(
                str(name), str(kind), str(target), tuple(_from_json(value) for value in args),
                tuple((str(key), _from_json(value)) for key, value in kwargs.items()),
            )  # fmt: skip
        except (TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"a flow has a node that is none: {values!r:.120} ({error})") from error
        if problem := node.problem():
            raise CheckpointError(f"flow node {node.name!r:.80}: {problem}")
        return node

    def problem(self) -> str:
        """Why a flow may not hold this node; "" when it may."""
        allowed: Any = {"function": FUNCTIONS, "method": _METHODS, "attribute": _ATTRIBUTES}.get(self.kind)
        if self.kind not in _KINDS:
            return f"unknown kind {self.kind!r:.40}"
        if allowed is not None and self.target not in allowed:
            return f"{self.kind} {self.target!r:.80} is not in the table of what flows may call"
        return ""


@dataclass(frozen=True)
class Flow:
    """The forward of one module, nodes in the order they run."""

    nodes: tuple[FlowNode, ...]

    @property
    def inputs(self) -> list[str]:
        """Names of the inputs, in order."""
        return [node.name for node in self.nodes if node.kind == "input"]

    def users(self) -> dict[str, list[FlowNode]]:
        """Name -> the nodes that use that result, one entry per use."""
        found: dict[str, list[FlowNode]] = {node.name: [] for node in self.nodes}
        for node in self.nodes:
            for name in node.refs():
                found[name].append(node)
        return found

    def to_json(self) -> list[Any]:
        """JSON values; `from_json` takes them back."""
        return [node.to_list() for node in self.nodes]

    @classmethod
    def from_json(cls, values: Any) -> Flow:
        """The flow that `to_json` described.

        Raises:
            CheckpointError: it is none, a node uses a result that does not exist yet, or calls what is not allowed.
        """
        if not isinstance(values, list):
            raise CheckpointError(f"a flow is a list of nodes, got {type(values).__name__}")
        nodes = tuple(FlowNode.from_list(value) for value in values)
        known: set[str] = set()
        for node in nodes:
            if node.name in known or any(name not in known for name in node.refs()):
                raise CheckpointError(f"flow node {node.name!r:.80} is there twice or uses what does not exist yet")
            known.add(node.name)
        if not nodes or nodes[-1].kind != "output":
            raise CheckpointError("a flow ends with its output")
        return cls(nodes)


def module_at(owner: nn.Module, path: str) -> nn.Module:
    """The module at a path; without the checks of `get_submodule`, which cost more than finding it."""
    module: Any = owner
    for part in path.split("."):
        module = module._modules[part]
    found: nn.Module = module
    return found


def _refs(value: Any) -> Iterator[str]:
    if isinstance(value, Ref):
        yield value.name
    elif isinstance(value, tuple):
        for entry in value:
            yield from _refs(entry)
    elif isinstance(value, slice):
        yield from _refs((value.start, value.stop, value.step))


def _resolve(value: Any, results: dict[str, Any]) -> Any:
    if isinstance(value, Ref):
        return results[value.name]
    if isinstance(value, tuple):
        return tuple(_resolve(entry, results) for entry in value)
    if isinstance(value, slice):
        return slice(*(_resolve(part, results) for part in (value.start, value.stop, value.step)))
    return value


def _to_json(value: Any) -> Any:
    if isinstance(value, Ref):
        return {"ref": value.name}
    if isinstance(value, tuple):
        return [_to_json(entry) for entry in value]
    if isinstance(value, slice):
        return {"slice": [_to_json(part) for part in (value.start, value.stop, value.step)]}
    return value


def _from_json(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_from_json(entry) for entry in value)
    if isinstance(value, dict):
        (key, inner), *more = value.items()
        if more or key not in ("ref", "slice"):
            raise ValueError(f"unknown argument {value!r:.80}")
        return Ref(str(inner)) if key == "ref" else slice(*(_from_json(part) for part in inner))
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"unknown argument {value!r:.80}")


def resolve_output(node: FlowNode, results: dict[str, Any]) -> Any:
    """What the forward returns: tensors, and tuples of them."""
    return _resolve(node.args[0], results)
