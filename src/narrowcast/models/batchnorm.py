"""Which BatchNorm follows which convolution, established without a traceable model, and folding the two.

A pair is established by one of three kinds of evidence: the tensors of one real forward pass (which operations
consumed the convolution's output), a symbolic trace of the model or of the block around the BatchNorm, or
neighbourhood in an `nn.Sequential`. Where none holds, the BatchNorm stays and the reason is reported.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from narrowcast.models.layer_kinds import kind_of
from narrowcast.models.modules import get_module, replace_everywhere_
from narrowcast.nn import FoldedBatchNorm
from narrowcast.transforms import BatchNormStatistics, fold_batchnorm

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)
_BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
# Asking a tensor for its shape does not use its values.
_QUERIES = frozenset({"__get__", "size", "dim", "numel", "stride", "is_contiguous", "element_size", "__len__"})


@dataclass
class FoldReport:
    """What became of every BatchNorm.

    Args:
        folded: BatchNorm path -> convolution path.
        kept: BatchNorm path -> why it stays.
        evidence: BatchNorm path -> how the pair was established.
    """

    folded: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    evidence: dict[str, str] = field(default_factory=dict)


def find_pairs(model: nn.Module, run: Callable[[], Any] | None) -> FoldReport:
    """Pair every BatchNorm with the convolution before it, or say why not. Changes nothing.

    Args:
        model: in evaluation mode.
        run: runs the model once on real data; None when there is no data.
    """
    report = FoldReport()
    waiting = {path: module for path, module in model.named_modules() if isinstance(module, _BATCHNORMS)}
    has_convolutions = any(isinstance(module, _CONVOLUTIONS) for module in model.modules())
    if not waiting:
        return report
    for path in [p for p, m in waiting.items() if m.running_mean is None or m.running_var is None]:
        report.kept[path] = "it has no running statistics, so it depends on the batch"
        del waiting[path]
    decided: set[str] = set()
    if run is not None:
        sources = {"a forward pass": _pairs_in_a_pass(model, run)}
    else:
        traced, decided = _pairs_by_tracing(model, waiting)
        neighbours = {norm: conv for norm, conv in _pairs_in_sequentials(model).items() if norm not in decided}
        sources = {"a symbolic trace": traced, "neighbours in a Sequential": neighbours}
    for evidence, found in sources.items():
        for norm, convolution in found.items():
            if norm in waiting and convolution not in report.folded.values():
                _decide(model, norm, convolution, evidence, report)
                del waiting[norm]
    for path in waiting:
        known = "the forward pass" if run is not None else "the symbolic trace" if path in decided else ""
        report.kept[path] = _why_not_found(known) if has_convolutions else "the model has no convolution"
    return report


def _decide(model: nn.Module, norm: str, convolution: str, evidence: str, report: FoldReport) -> None:
    module = get_module(model, convolution)
    if kind_of(module) is None:
        report.kept[norm] = f"{convolution} is a {type(module).__name__}, whose weight cannot be rewritten"
    elif _users(model, module.weight) > 1:
        report.kept[norm] = f"the weight of {convolution} is used elsewhere too"
    else:
        report.folded[norm] = convolution
        report.evidence[norm] = evidence


def _users(model: nn.Module, weight: Any) -> int:
    return sum(1 for m in model.modules() for p in m._parameters.values() if p is weight)


def _why_not_found(known: str) -> str:
    if known:
        return f"in {known} no convolution fed it alone: another operation lies between or uses the same tensor"
    return "without data its convolution could not be established (the block is not traceable); give data to find it"


def fold_(model: nn.Module, report: FoldReport) -> nn.Module:
    """Fold the pairs of the report. Changes the modules of `model`, not their old tensors; returns the model."""
    for norm_path, convolution_path in report.folded.items():
        norm: Any = get_module(model, norm_path)
        convolution: Any = get_module(model, convolution_path)
        statistics = BatchNormStatistics(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)
        channels_first = _output_channels_first(convolution)
        bias = None if convolution.bias is None else convolution.bias.detach()
        weight, bias = fold_batchnorm(channels_first.detach(), bias, statistics)
        if isinstance(convolution, nn.ConvTranspose2d):
            weight = _input_channels_first(weight, convolution)
        convolution.weight = nn.Parameter(weight, requires_grad=False)
        convolution.bias = nn.Parameter(bias, requires_grad=False)
        model = replace_everywhere_(model, norm, FoldedBatchNorm(convolution_path))
    return model


def _output_channels_first(convolution: Any) -> Tensor:
    """A transposed convolution's weight [in, out / groups, ...] as [out, in / groups, ...]; others as they are."""
    weight: Tensor = convolution.weight
    if not isinstance(convolution, nn.ConvTranspose2d):
        return weight
    groups = convolution.groups
    split = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    return split.transpose(1, 2).reshape(convolution.out_channels, -1, *weight.shape[2:])


def _input_channels_first(weight: Tensor, convolution: nn.ConvTranspose2d) -> Tensor:
    groups = convolution.groups
    split = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    return split.transpose(1, 2).reshape(convolution.in_channels, -1, *weight.shape[2:]).contiguous()


# The attribute by which a convolution's output is known again; kept on the tensor, so that no tensor is kept alive.
_SOURCE = "_narrowcast_source"


class _Consumers(TorchFunctionMode):
    """Notes, for every convolution, inside which BatchNorms its outputs were used ("" outside all of them)."""

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


def _pairs_in_a_pass(model: nn.Module, run: Callable[[], Any]) -> dict[str, str]:
    """BatchNorm -> convolution where every output of the one went into the other, which got nothing else."""
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
        if isinstance(module, _CONVOLUTIONS):
            handles.append(module.register_forward_hook(watch_output(path)))
        elif isinstance(module, _BATCHNORMS):
            handles.append(module.register_forward_pre_hook(enter(path)))
            handles.append(module.register_forward_hook(lambda m, a, o: mode.inside.pop() and None))
    try:
        with torch.no_grad(), mode:
            mode.note(run(), "")
    finally:
        for handle in handles:
            handle.remove()
    pairs = {}
    for path, norms in mode.consumers.items():
        if len(norms) == 1 and (norm := next(iter(norms))) and sources[norm] == {path}:
            pairs[norm] = path
    return pairs


def _pairs_by_tracing(model: nn.Module, waiting: dict[str, Any]) -> tuple[dict[str, str], set[str]]:
    """Pairs in a symbolic trace of the whole model, or where that fails of each block around a BatchNorm.

    The second result are the BatchNorms that a trace has seen: of these it knows also that they have no pair.
    """
    whole = _traced_pairs(model, "")
    if whole is not None:
        return whole, set(waiting)
    pairs: dict[str, str] = {}
    decided: set[str] = set()
    for parent in dict.fromkeys(path.rpartition(".")[0] for path in waiting):
        if parent and (found := _traced_pairs(get_module(model, parent), parent + ".")) is not None:
            pairs |= found
            decided |= {path for path in waiting if path.startswith(parent + ".")}
    return pairs, decided


def _traced_pairs(block: nn.Module, prefix: str) -> dict[str, str] | None:
    try:
        graph = fx.Tracer().trace(block)
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError, AssertionError, NameError):
        return None  # tracing runs the model's own code on placeholders: not traceable is an ordinary answer
    modules = dict(block.named_modules())
    called = [node for node in graph.nodes if node.op == "call_module"]
    times = {node.target: sum(other.target == node.target for other in called) for node in called}
    pairs = {}
    for node in called:
        source = node.args[0] if node.args else None
        if not isinstance(modules.get(str(node.target)), _BATCHNORMS) or not isinstance(source, fx.Node):
            continue
        if source.op != "call_module" or not isinstance(modules.get(str(source.target)), _CONVOLUTIONS):
            continue
        if times[node.target] == times[source.target] == 1 and len(source.users) == 1:
            pairs[prefix + str(node.target)] = prefix + str(source.target)
    return pairs


def _pairs_in_sequentials(model: nn.Module) -> dict[str, str]:
    """Neighbours that stand nowhere else: a module that stands twice is called twice."""
    names = {id(module): path for path, module in model.named_modules()}
    places = Counter(id(child) for parent in model.modules() for child in parent._modules.values())
    pairs = {}
    for module in model.modules():
        if type(module) is nn.Sequential:
            for before, after in pairwise(module):
                if not isinstance(before, _CONVOLUTIONS) or not isinstance(after, _BATCHNORMS):
                    continue
                if places[id(before)] == places[id(after)] == 1:
                    pairs[names[id(after)]] = names[id(before)]
    return pairs
