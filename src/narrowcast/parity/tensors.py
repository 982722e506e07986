"""Outputs as lists of tensors, copied, checked and compared in shape; errors say which layer of which side."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves, tree_map

from narrowcast.errors import ModelError


def tensors_of(output: Any) -> list[Tensor]:
    """Every tensor of an output with numbers to compare, in order."""
    leaves = [leaf.data if isinstance(leaf, PackedSequence) else leaf for leaf in tree_leaves(output, _is_packed)]
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    return [torch.view_as_real(tensor) if tensor.is_complex() else tensor for tensor in tensors]


def _is_packed(value: Any) -> bool:
    return isinstance(value, PackedSequence)


def copied(value: Any) -> Any:
    """The same with tensors of its own, so that what runs in place changes neither side's inputs."""
    return tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, value)


def check_alike(where: str, expected: list[Tensor], got: list[Tensor]) -> None:
    """Refuse outputs that cannot be compared number by number.

    Args:
        where: the layer and the batch.
        expected: tensors of the reference.
        got: those of the artefact.

    Raises:
        ModelError: numbers or shapes of tensors differ, or one side has a NaN or an infinity that the other lacks.
    """
    ours, theirs = ([list(t.shape) for t in side] for side in (expected, got))
    if ours != theirs:
        raise ModelError(
            f"{where}: the artefact's output has the shape {_shapes(theirs)}, the reference's {_shapes(ours)}; the two "
            "are of different structure, so compare a model with what was made of that very model"
        )
    for reference, artefact in zip(expected, got, strict=True):
        for side, tensor in (("reference", reference), ("artefact", artefact)):
            _refuse_nan(where, side, tensor)
        strange = reference.isinf() | artefact.isinf()
        if bool((strange & (reference != artefact)).any()):
            position = (strange & (reference != artefact)).nonzero()[0].tolist()
            values = reference[tuple(position)].item(), artefact[tuple(position)].item()
            raise ModelError(
                f"{where}: at position {position} the reference gives {values[0]} and the artefact {values[1]}; an "
                "infinity on one side leaves no difference to measure: look at the scale and the weights of that layer"
            )


def _refuse_nan(where: str, side: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point() or not bool(tensor.isnan().any()):
        return
    position = tensor.isnan().nonzero()[0].tolist()
    raise ModelError(
        f"{where}: the {side} gives NaN at position {position} of shape {list(tensor.shape)}, expected finite numbers; "
        f"repair that layer of the {side} (its weight, scale or running statistics) or leave out what leads there"
    )


def _shapes(shapes: list[list[int]]) -> str:
    return ", ".join(str(shape) for shape in shapes) or "none (no tensor)"


def half_inputs(args: tuple[Any, ...]) -> bool:
    """Whether the first input is a 16-bit float."""
    return bool(args) and isinstance(args[0], Tensor) and args[0].dtype in (torch.bfloat16, torch.float16)
