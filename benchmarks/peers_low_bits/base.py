"""What a peer hands back, and what it is measured by: which weight matrices it really changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

BITS = {"W8A8 static": 8, "W8A8 dynamic": 8, "W4A8": 4, "W4 channel": 4, "W4 g32": 4, "W3 g32": 3, "W2 g32": 2}
GROUP = 32


class NotOfferedError(RuntimeError):
    """The tool has no such method or format; the message says what it lacks."""


def group_of(form: str) -> int | None:
    """The group size of a format; None for one scale per output channel."""
    return GROUP if form.endswith("g32") or form == "W4A8" else None


@dataclass
class Answers:
    """A model quantized by another tool.

    Attributes:
        call: stands in for the module in `KitModel.outputs`.
        changed: weight matrices that differ from float32.
        matrices: weight matrices there are, embeddings and tied heads left out.
        notes: what the tool did otherwise than asked.
    """

    call: Callable[..., Any]
    changed: int
    matrices: int
    notes: list[str] = field(default_factory=list)


def weighted(model: nn.Module) -> dict[str, nn.Module]:
    """Linear and convolution layers by name, without heads tied to an embedding."""
    tied = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and id(module.weight) not in tied
    }


def dense(module: Any) -> Tensor:
    """The float weights that a layer computes with, [out, in, ...], whatever it stores.

    Tools that round only when they answer keep float weights: those are read off a linear layer's answer to the
    identity matrix.
    """
    weight = getattr(module, "weight", None)
    if weight is None:
        return next(getattr(module, name) for name in READERS if hasattr(module, name))()
    if type(weight) not in (Tensor, nn.Parameter):
        return weight.dequantize()
    if not isinstance(module, nn.Linear):
        return weight
    inputs = torch.eye(weight.shape[1])
    return (module(inputs) - module(torch.zeros_like(inputs[:1]))).T


# What layers that store no `weight` call the function that makes one.
READERS = ("dequantize", "dequantize_weight")


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the float weights of every layer that quantization is about, to compare with afterwards."""
    return {name: module.weight.detach().clone() for name, module in weighted(model).items()}


def answers(model: nn.Module, before: dict[str, Tensor], call: Callable[..., Any] | None = None) -> Answers:
    """A quantized torch module with its weights compared to those `before`.

    Args:
        model: the quantized module; the layers kept their names.
        before: result of `weights_of` on the float32 module.
        call: what answers in its place; the module itself by default.
    """
    with torch.no_grad():
        same = [name for name, old in before.items() if equal(dense(model.get_submodule(name)).float(), old)]
    notes = [f"left float32: {', '.join(same[:3])}{' ...' if len(same) > 3 else ''}"] if same else []
    return Answers(call or model, len(before) - len(same), len(before), notes)


def equal(first: Tensor, second: Tensor) -> bool:
    """Whether two matrices differ by no more than float32 arithmetic explains."""
    return bool((first - second).abs().max() <= 1e-6 * second.abs().max())
