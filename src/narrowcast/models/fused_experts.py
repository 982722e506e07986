"""Experts of a mixture that transformers fuses into 3-D weights, recognised by what they say of themselves.

Every such class carries the flags that transformers' own kernels for experts go by (`is_transposed`, `has_bias`, ...),
so no model family is named here but the one with a gate of its own.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from narrowcast.models.activations import activation_name
from narrowcast.nn import ExpertsShape

_FLAGS = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "is_concatenated", "num_experts")


def is_fused_experts(module: nn.Module) -> bool:
    """Whether a module is one of transformers' fused experts, of whatever form."""
    return all(hasattr(module, flag) for flag in _FLAGS) and isinstance(
        getattr(module, "down_proj", None), nn.Parameter
    )


def refuse_experts(module: Any) -> str:
    """Why fused experts cannot be replaced; "" when they can."""
    name = type(module).__name__
    if module.has_post_expert_norm:
        return f"{name}: a normalization after each expert has no quantized module"
    if _is_clamped(module):
        return ""
    if type(module)._apply_gate.__name__ != "_default_apply_gate" or not module.is_concatenated:
        return f"{name}: its gate is of its own making, which no quantized module computes"
    if not activation_name(getattr(module, "act_fn", nn.Identity())):
        return f"{name}: no quantized module computes its activation {type(module.act_fn).__name__}"
    return ""


def _is_clamped(module: Any) -> bool:
    return type(module).__name__ == "GptOssExperts" and all(hasattr(module, name) for name in ("alpha", "limit"))


def experts_shape(module: Any) -> ExpertsShape:
    """The geometry of experts that are not refused."""
    down = module.down_proj.shape
    inner, hidden = (down[1], down[2]) if module.is_transposed else (down[2], down[1])
    if _is_clamped(module):
        return ExpertsShape(
            down[0], hidden, inner, "", alpha=float(module.alpha), limit=float(module.limit), bias=bool(module.has_bias)
        )
    activation = activation_name(module.act_fn)
    return ExpertsShape(down[0], hidden, inner, activation, bool(module.has_gate), bias=bool(module.has_bias))


def experts_matrix(module: Any, parameter: str) -> Tensor:
    """A weight as the matrix [experts * out, in]."""
    weight: Tensor = getattr(module, parameter)
    return (weight.transpose(1, 2) if module.is_transposed else weight).flatten(0, 1)


def experts_biases(module: Any, shape: ExpertsShape) -> dict[str, Tensor]:
    """The biases [experts, out] by the weight's parameter; empty without any."""
    return {name: getattr(module, f"{name}_bias") for name in shape.weights()} if shape.bias else {}
