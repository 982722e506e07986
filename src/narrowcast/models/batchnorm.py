"""Folding BatchNorms into the convolutions before them; `followers` says which follow which, and on what evidence.

Where no evidence holds, the BatchNorm stays and the reason is reported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from narrowcast.models.followers import Kinds, find_followers
from narrowcast.models.layer_kinds import kind_of
from narrowcast.models.modules import get_module, replace_everywhere_
from narrowcast.nn import FoldedBatchNorm
from narrowcast.transforms import BatchNormStatistics, fold_batchnorm

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)
_BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
_KINDS = Kinds(lambda module: isinstance(module, _CONVOLUTIONS), lambda module: isinstance(module, _BATCHNORMS))


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
    followers = find_followers(model, run, list(waiting), _KINDS)
    for evidence, found in followers.pairs.items():
        for norm, convolution in found.items():
            if norm in waiting and convolution not in report.folded.values():
                _decide(model, norm, convolution, evidence, report)
                del waiting[norm]
    for path in waiting:
        known = "the forward pass" if run is not None else "the symbolic trace" if path in followers.decided else ""
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
        model = replace_everywhere_(model, norm, FoldedBatchNorm(convolution_path).train(norm.training))
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
