"""Reading and replacing the weights of layers and normalizations, whatever layout they have. Never writes into one.

The adapter's working copy shares its tensors with the caller's model: what is rewritten becomes a new parameter.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from narrowcast.models.layer_kinds import LayerKind, kind_of
from narrowcast.nn import ConvShape

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)
SCALABLE = frozenset({"Linear", "Conv1D", "Conv1d", "Conv2d", "ConvTranspose2d"})
"""Layers whose rows and columns can be scaled; a recurrent layer's output comes out of tanh, an embedding has none."""


@dataclass(frozen=True)
class Norm:
    """A normalization whose output is multiplied by `weight + offset`, then shifted by `bias`.

    Args:
        offset: 1 for Gemma's (1 + w), else 0.
    """

    offset: float


def layer_kind(module: nn.Module) -> LayerKind | None:
    """The kind of a layer that can be scaled; None for everything else."""
    kind = kind_of(module)
    return kind if kind is not None and kind.name in SCALABLE else None


def matrix(module: Any) -> Tensor:
    """A layer's weight as [out, in / groups * kernel] float."""
    kind = layer_kind(module)
    assert kind is not None
    return kind.matrix(module, "weight").detach().float()


def set_matrix_(module: Any, values: Tensor, bias: Tensor | None) -> None:
    """Give a layer new parameters, in its own layout and dtype.

    Args:
        module: the layer.
        values: [out, in / groups * kernel].
        bias: [out] or None for none.
    """
    old: Tensor = module.weight
    if isinstance(module, _CONVOLUTIONS):
        values = ConvShape.of(module).from_matrix(values).reshape(old.shape)
    elif type(module).__name__ == "Conv1D":
        values = values.t()
    module.weight = nn.Parameter(values.to(old.dtype).contiguous(), requires_grad=False)
    module.bias = None if bias is None else nn.Parameter(bias.to(old.dtype).contiguous(), requires_grad=False)


def input_channels(module: Any) -> int:
    """Input channels of a layer."""
    if isinstance(module, _CONVOLUTIONS):
        return int(module.in_channels)
    return int(matrix(module).shape[1])


def groups_of(module: Any) -> int:
    """Groups of a convolution, 1 elsewhere."""
    return int(getattr(module, "groups", 1)) if isinstance(module, _CONVOLUTIONS) else 1


def kernel_of(module: Any) -> int:
    """Columns of the weight per input channel."""
    kind = layer_kind(module)
    assert kind is not None
    return kind.kernel_elements(module)


def pads_with_zeros(module: Any) -> bool:
    """Whether a convolution puts zeros beside its input."""
    if not isinstance(module, _CONVOLUTIONS):
        return False
    shape = ConvShape.of(module)
    return module.padding_mode == "zeros" and (any(shape.padding) or shape.transposed)


def looks_like_norm(module: nn.Module) -> bool:
    """Whether a module may be a normalization over its last dimension with a scale per channel."""
    names = {name for name, p in module.named_parameters(recurse=False) if p is not None}
    if "Norm" not in type(module).__name__ or any(True for _ in module.children()) or "weight" not in names:
        return False
    return names <= {"weight", "bias"} and all(p.dim() == 1 for p in module.parameters(recurse=False))


def as_norm(module: nn.Module) -> Norm | None:
    """How a normalization uses its weight, found by trying on a copy; None where scaling it does not scale its output.

    BatchNorm, GroupNorm and InstanceNorm have their channels elsewhere: they are none of these.
    """
    if not looks_like_norm(module) or module.weight.is_meta:  # type: ignore[union-attr, operator]
        return None
    trial: Any = copy.deepcopy(module).double().eval()
    weight, bias = trial.weight.detach(), getattr(trial, "bias", None)
    x = torch.randn(3, weight.numel(), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    try:
        with torch.no_grad():
            before = trial(x)
            if bias is not None:
                trial.bias = nn.Parameter(2 * bias.detach())
            for offset in (0.0, 1.0):
                trial.weight = nn.Parameter(2 * (weight + offset) - offset)
                if torch.allclose(trial(x), 2 * before, rtol=1e-3, atol=1e-6):
                    return Norm(offset)
    except (RuntimeError, TypeError, ValueError):  # it wants other inputs: not a normalization of the last dimension
        return None
    return None


def commutes_with_rotation(module: nn.Module) -> bool:
    """Whether a normalization with all scales 1 and no shift gives the rotated output for a rotated input."""
    trial: Any = copy.deepcopy(module).double().eval()
    found = as_norm(module)
    if found is None or getattr(trial, "bias", None) is not None:
        return False
    trial.weight = nn.Parameter(torch.full_like(trial.weight, 1 - found.offset))
    generator = torch.Generator().manual_seed(0)
    width = trial.weight.numel()
    x = torch.randn(3, width, generator=generator, dtype=torch.float64) + 1  # a mean, which LayerNorm would take off
    q = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0]
    with torch.no_grad():
        return bool(torch.allclose(trial(x @ q), trial(x) @ q, rtol=1e-3, atol=1e-5))


def gain(module: Any) -> Tensor:
    """What a normalization multiplies each channel by, [channels] float64."""
    found = as_norm(module)
    assert found is not None
    return module.weight.detach().double() + found.offset


def set_gain_(module: Any, values: Tensor, bias: Tensor | None) -> None:
    """Give a normalization new scales and shifts.

    Args:
        module: the normalization.
        values: [channels] what each channel shall be multiplied by.
        bias: [channels] or None for none.
    """
    found = as_norm(module)
    assert found is not None
    dtype = module.weight.dtype
    module.weight = nn.Parameter((values.double() - found.offset).to(dtype), requires_grad=False)
    if bias is not None:
        module.bias = nn.Parameter(bias.to(dtype), requires_grad=False)


def divide_output_(module: Any, scale: Tensor) -> None:
    """Divide the output channels of a layer or normalization by `scale` [channels] float64 > 0."""
    bias = None if getattr(module, "bias", None) is None else module.bias.detach().double() / scale
    if layer_kind(module) is None:
        set_gain_(module, gain(module) / scale, bias)
    else:
        set_matrix_(module, matrix(module).double() / scale.unsqueeze(1), bias)


def weight_users(model: nn.Module) -> dict[int, int]:
    """How many modules hold each parameter, by its id: more than one for tied weights."""
    users: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                users[id(parameter)] = users.get(id(parameter), 0) + 1
    return users


def parameters_of(module: nn.Module) -> list[Tensor]:
    """Weight and bias of a layer or normalization, those that it has."""
    found = (module._parameters.get(name) for name in ("weight", "bias"))
    return [parameter for parameter in found if parameter is not None]


def untie_(model: nn.Module) -> list[str]:
    """Give every layer that shares its weight with an embedding a parameter of its own; returns their paths."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    untied = []
    for path, module in model.named_modules():
        kind = layer_kind(module)
        if kind is not None and id(module.weight) in tables:
            module.weight = nn.Parameter(module.weight.detach(), requires_grad=False)  # type: ignore[operator]
            untied.append(path)
    return untied
