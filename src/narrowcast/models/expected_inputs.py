"""The mean of what layers behind BatchNorms read, known without data; `transforms.bias_correction` has the formula.

Behind a BatchNorm a channel is taken for a Gaussian with BatchNorm's own mean and deviation; clamps cut it off, while
averages, padding and concatenations keep its mean. Where something else lies between, the mean is not known.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from narrowcast.models.modules import get_module
from narrowcast.models.trace import find_flows
from narrowcast.nn.flow import Flow
from narrowcast.nn.image_ops import ImageOp, image_op
from narrowcast.nn.regions import modules_of
from narrowcast.transforms import clipped_normal_mean

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


@dataclass(frozen=True, eq=False)
class _Image:
    """What is known of an image: Gaussian channels cut off at two bounds, or no more than their means.

    Args:
        mean: [channels] of the Gaussian, or of the image where there is no deviation.
        deviation: [channels]; None where only the mean is known.
        low, high: bounds.
    """

    mean: Tensor
    deviation: Tensor | None
    low: float = -math.inf
    high: float = math.inf

    def expectation(self) -> Tensor:
        """[channels] float64."""
        if self.deviation is None:
            return self.mean
        return clipped_normal_mean(self.mean, self.deviation, self.low, self.high)


def expected_inputs(model: nn.Module) -> dict[str, Tensor]:
    """Path of a layer -> mean of each of its input channels, [in] float64, where BatchNorms before it tell.

    Args:
        model: in evaluation mode, its BatchNorms not yet folded; parts that cannot be traced are passed over.
    """
    found: dict[str, Tensor] = {}
    flows, _ = find_flows(model, lambda module: isinstance(module, (*_LAYERS, *_NORMS)))
    for path, flow in flows.items():
        means = _means_in(flow, get_module(model, path))
        found |= {(f"{path}.{layer}" if path else layer): mean for layer, mean in means.items()}
    return found


def _means_in(flow: Flow, owner: nn.Module) -> dict[str, Tensor]:
    images: dict[str, _Image] = {}
    found: dict[str, Tensor] = {}
    modules = modules_of(flow, owner)
    calls = [node.target for node in flow.nodes if node.kind == "module"]
    for node in flow.nodes:
        module = modules.get(node.name)
        source = images.get(next(node.refs(), ""))
        if isinstance(module, _NORMS) and module.running_mean is not None:
            images[node.name] = _behind(module)
        elif isinstance(module, _LAYERS):
            channels = module.in_features if isinstance(module, nn.Linear) else module.in_channels
            if source is not None and source.mean.numel() == channels and calls.count(node.target) == 1:
                found[node.target] = source.expectation()
        elif (op := image_op(node, module)) is not None and all(name in images for name in op.sources):
            image = _after(op, [images[name] for name in op.sources])
            if image is not None:
                images[node.name] = image
    return found


def _behind(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> _Image:
    ones = torch.ones(norm.num_features)
    mean = torch.zeros_like(ones) if norm.bias is None else norm.bias.detach()
    deviation = ones if norm.weight is None else norm.weight.detach().abs()
    return _Image(mean.double(), deviation.double())


def _after(op: ImageOp, sources: list[_Image]) -> _Image | None:
    """What is known behind an operation; None for nothing."""
    first = sources[0]
    if op.kind in ("identity", "pad"):
        return first
    if op.kind == "average_pool":
        return _Image(first.expectation(), None)
    if op.kind == "cat":
        return _Image(torch.cat([source.expectation() for source in sources]), None)
    if op.kind == "clamp" and first.deviation is not None:
        return replace(first, low=max(first.low, op.low), high=min(first.high, op.high))
    return None
