"""Which module's output goes into which other module and nowhere else, established without a traceable model.

A pair is established by one of three kinds of evidence: the tensors of one real forward pass (which operations
consumed the producer's output), a symbolic trace of the model or of the block around the follower, or neighbourhood in
an `nn.Sequential`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from narrowcast.models.modules import get_module

# Asking a tensor for its shape does not use its values.
_QUERIES = frozenset({"__get__", "size", "dim", "numel", "stride", "is_contiguous", "element_size", "__len__"})


@dataclass(frozen=True)
class Kinds:
    """The two kinds of modules that make a pair.

    Args:
        produces: whether a module is of the first kind.
        follows: whether it is of the second.
    """

    produces: Callable[[nn.Module], bool]
    follows: Callable[[nn.Module], bool]


@dataclass
class Followers:
    """The pairs of a model.

    Args:
        pairs: evidence -> follower path -> producer path.
        decided: followers of which the evidence also knows that they have no pair, where they have none.
    """

    pairs: dict[str, dict[str, str]] = field(default_factory=dict)
    decided: set[str] = field(default_factory=set)


def find_followers(model: nn.Module, run: Callable[[], Any] | None, waiting: Iterable[str], kinds: Kinds) -> Followers:
    """Every follower that gets all outputs of one producer and nothing else. Changes nothing.

    Args:
        model: in evaluation mode.
        run: runs the model once on real data; None when there is no data.
        waiting: paths of the followers.
        kinds: what producers and followers are.
    """
    if run is not None:
        return Followers({"a forward pass": _in_a_pass(model, run, kinds)}, set(waiting))
    traced, decided = _by_tracing(model, list(waiting), kinds)
    neighbours = {path: before for path, before in _in_sequentials(model, kinds).items() if path not in decided}
    return Followers({"a symbolic trace": traced, "neighbours in a Sequential": neighbours}, decided)


class _Tracer(fx.Tracer):
    """Calls producers and followers as they are, and enters the model's own modules."""

    def __init__(self, kinds: Kinds) -> None:
        super().__init__()
        self.kinds = kinds

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        pair = self.kinds.produces(m) or self.kinds.follows(m)
        return pair or super().is_leaf_module(m, module_qualified_name)


# The attribute by which a convolution's output is known again; kept on the tensor, so that no tensor is kept alive.
_SOURCE = "_narrowcast_source"


class _Consumers(TorchFunctionMode):
    """Notes, for every producer, inside which followers its outputs were used ("" outside all of them)."""

    def __init__(self) -> None:
        super().__init__()
        self.consumers: dict[str, set[str]] = {}
        self.inside: list[str] = []

    def note(self, values: Any, place: str) -> None:
        """The outputs among `values` are used at `place`."""
        for value in torch.utils._pytree.tree_leaves(values):
            if isinstance(value, Tensor) and (source := getattr(value, _SOURCE, None)) is not None:
                self.consumers[source].add(place)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") not in _QUERIES:
            self.note((args, kwargs), self.inside[-1] if self.inside else "")
        return func(*args, **kwargs)


def _in_a_pass(model: nn.Module, run: Callable[[], Any], kinds: Kinds) -> dict[str, str]:
    """Follower -> producer where every output of the one went into the other, which got nothing else."""
    mode = _Consumers()
    sources: dict[str, set[str | None]] = {}
    handles = []

    def watch_output(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            mode.consumers.setdefault(path, set())
            setattr(output, _SOURCE, path)

        return hook

    def enter(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            mode.inside.append(path)
            sources.setdefault(path, set()).add(getattr(args[0], _SOURCE, None))

        return hook

    for path, module in model.named_modules():
        if kinds.produces(module):
            handles.append(module.register_forward_hook(watch_output(path)))
        elif kinds.follows(module):
            handles.append(module.register_forward_pre_hook(enter(path)))
            handles.append(module.register_forward_hook(lambda m, a, o: mode.inside.pop() and None))
    try:
        with torch.no_grad(), mode:
            mode.note(run(), "")
    finally:
        for handle in handles:
            handle.remove()
    pairs = {}
    for path, followers in mode.consumers.items():
        if len(followers) == 1 and (follower := next(iter(followers))) and sources[follower] == {path}:
            pairs[follower] = path
    return pairs


def _by_tracing(model: nn.Module, waiting: Iterable[str], kinds: Kinds) -> tuple[dict[str, str], set[str]]:
    """Pairs in a symbolic trace of the whole model, or where that fails of each block around a follower.

    The second result are the followers that a trace has seen: of these it knows also that they have no pair.
    """
    whole = _traced(model, "", kinds)
    if whole is not None:
        return whole, set(waiting)
    pairs: dict[str, str] = {}
    decided: set[str] = set()
    for parent in dict.fromkeys(path.rpartition(".")[0] for path in waiting):
        if parent and (found := _traced(get_module(model, parent), parent + ".", kinds)) is not None:
            pairs |= found
            decided |= {path for path in waiting if path.startswith(parent + ".")}
    return pairs, decided


def _traced(block: nn.Module, prefix: str, kinds: Kinds) -> dict[str, str] | None:
    try:
        graph = _Tracer(kinds).trace(block)
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError, AssertionError, NameError):
        return None  # tracing runs the model's own code on placeholders: not traceable is an ordinary answer
    modules = dict(block.named_modules())
    called = [node for node in graph.nodes if node.op == "call_module"]
    times = {node.target: sum(other.target == node.target for other in called) for node in called}
    pairs = {}
    for node in called:
        source = node.args[0] if node.args else None
        if not kinds.follows(modules[str(node.target)]) or not isinstance(source, fx.Node):
            continue
        if source.op != "call_module" or not kinds.produces(modules[str(source.target)]):
            continue
        if times[node.target] == times[source.target] == 1 and len(source.users) == 1:
            pairs[prefix + str(node.target)] = prefix + str(source.target)
    return pairs


def _in_sequentials(model: nn.Module, kinds: Kinds) -> dict[str, str]:
    """Neighbours that stand nowhere else: a module that stands twice is called twice."""
    names = {id(module): path for path, module in model.named_modules()}
    places = Counter(id(child) for parent in model.modules() for child in parent._modules.values())
    pairs = {}
    for module in model.modules():
        if type(module) is nn.Sequential:
            for before, after in pairwise(module):
                if not kinds.produces(before) or not kinds.follows(after):
                    continue
                if places[id(before)] == places[id(after)] == 1:
                    pairs[names[id(after)]] = names[id(before)]
    return pairs
