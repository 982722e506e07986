"""Which activation module follows which linear layer, so that the layer can apply the function itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from narrowcast.models.followers import Kinds, find_followers
from narrowcast.models.modules import get_module, replace_everywhere_
from narrowcast.nn import FusedActivation, QuantizedLinear

# transformers' activation modules by the name of their class: importing them would import transformers
_TRANSFORMERS = {
    "GELUActivation": "gelu", "NewGELUActivation": "gelu_tanh", "GELUTanh": "gelu_tanh", "PytorchGELUTanh": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh", "SiLUActivation": "silu",
}  # fmt: skip


def activation_name(module: nn.Module) -> str:
    """The function that a module applies, as linear layers know it; "" where they do not."""
    if module._forward_hooks or module._forward_pre_hooks:
        return ""  # somebody wants to see this very call
    if type(module) is nn.GELU:  # a subclass may compute something else
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    if type(module) in (nn.ReLU, nn.SiLU):
        return "relu" if type(module) is nn.ReLU else "silu"
    if type(module).__module__ == "transformers.activations":
        return _TRANSFORMERS.get(type(module).__name__, "")
    return ""


def find_activations(model: nn.Module, run: Callable[[], Any] | None, linears: set[str]) -> dict[str, str]:
    """Path of an activation module -> path of the linear layer before it.

    The output of that layer is all that the activation gets, and nothing else reads it.

    Args:
        model: in evaluation mode, unchanged.
        run: runs the model once on real data; None when there is no data.
        linears: paths of the linear layers that may take an activation in.
    """
    wanted = {id(get_module(model, path)) for path in linears}
    waiting = [path for path, module in model.named_modules() if activation_name(module)]
    if not waiting or not wanted:
        return {}
    kinds = Kinds(lambda module: id(module) in wanted, lambda module: bool(activation_name(module)))
    found: dict[str, str] = {}
    for pairs in find_followers(model, run, waiting, kinds).pairs.values():
        for activation, linear in pairs.items():
            if linear not in found.values():
                found.setdefault(activation, linear)
    return found


def fuse_activations_(model: nn.Module, pairs: Mapping[str, str]) -> list[str]:
    """Let quantized linear layers apply the activation behind them. Changes the model.

    Args:
        model: with its quantized modules installed.
        pairs: of `find_activations`.

    Returns:
        Paths of the linear layers that did.
    """
    fused = []
    for path, linear_path in pairs.items():
        linear, activation = get_module(model, linear_path), get_module(model, path)
        if isinstance(linear, QuantizedLinear):
            linear.fused = activation_name(activation)
            replace_everywhere_(model, activation, FusedActivation(linear_path).train(activation.training))
            fused.append(linear_path)
    return fused
