"""Rewrites of weights and biases that make a layer easier to quantize, or mend it after. Sees tensors, never models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from narrowcast.errors import RecipeError
from narrowcast.transforms.absorb import Absorb, absorbable, absorbed_bias
from narrowcast.transforms.awq import Awq, awq_scale
from narrowcast.transforms.bias_correction import ChannelError, analytic_correction, clipped_normal_mean
from narrowcast.transforms.equalize import Equalize, equalizing_scale, lowest_scale
from narrowcast.transforms.fold_batchnorm import BatchNormStatistics, fold_batchnorm
from narrowcast.transforms.input_scales import channel_scales, fold_input_scales, with_headroom
from narrowcast.transforms.output_error import diagonal_error, linear_error, quantized_inputs
from narrowcast.transforms.rotate import Rotate, hadamard_matrix, rotate_columns, rotate_rows
from narrowcast.transforms.scaling import at_columns, column_maximum, divide_rows, multiply_columns, to_channels
from narrowcast.transforms.smoothquant import SmoothQuant, smoothing_scale

Transform = Equalize | Absorb | SmoothQuant | Awq | Rotate

TRANSFORMS: dict[str, type[Any]] = {
    "absorb": Absorb,
    "awq": Awq,
    "equalize": Equalize,
    "rotate": Rotate,
    "smoothquant": SmoothQuant,
}
"""Every function-preserving transform by the name that recipes use."""


def make_transform(recipe: str | Mapping[str, Mapping[str, object]]) -> Transform:
    """The transform that a recipe names.

    Args:
        recipe: a name, or one name with its options: "equalize", {"smoothquant": {"strength": 0.5}}.

    Raises:
        RecipeError: the name, an option or a value is not known; the message lists what is.
    """
    if isinstance(recipe, str):
        recipe = {recipe: {}}
    if not isinstance(recipe, Mapping) or len(recipe) != 1:
        raise RecipeError(
            f"transforms: {recipe!r} must be one name or one name with options, like {{'smoothquant': {{}}}}"
        )
    (name, options), *_ = recipe.items()
    if name not in TRANSFORMS:
        raise RecipeError(f"transform {name!r} is not known; use one of {', '.join(sorted(TRANSFORMS))}")
    if not isinstance(options, Mapping):
        raise RecipeError(f"transform {name!r} takes a table of options, got {options!r}; write {name} = {{}}")
    known = [field.name for field in fields(TRANSFORMS[name])]
    for key in options:
        if key not in known:
            raise RecipeError(f"transform {name!r} has no option {key!r}; its options are {', '.join(known)}")
    made: Transform = TRANSFORMS[name](**options)
    return made


__all__ = [
    "TRANSFORMS",
    "Absorb",
    "Awq",
    "BatchNormStatistics",
    "ChannelError",
    "Equalize",
    "Rotate",
    "SmoothQuant",
    "Transform",
    "absorbable",
    "absorbed_bias",
    "analytic_correction",
    "at_columns",
    "awq_scale",
    "channel_scales",
    "clipped_normal_mean",
    "column_maximum",
    "diagonal_error",
    "divide_rows",
    "equalizing_scale",
    "fold_batchnorm",
    "fold_input_scales",
    "hadamard_matrix",
    "linear_error",
    "lowest_scale",
    "make_transform",
    "multiply_columns",
    "quantized_inputs",
    "rotate_columns",
    "rotate_rows",
    "smoothing_scale",
    "to_channels",
    "with_headroom",
]
