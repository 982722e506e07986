"""What every weight solver gets and gives: tensors in, one QuantizedTensor out. Knows no model and no recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from narrowcast.core import QuantizedTensor, QuantSpec, all_finite
from narrowcast.errors import DataError, ModelError


@dataclass(frozen=True)
class Seen:
    """What calibration saw at the input of one weight.

    Args:
        importance: [in] float, >= 0: the mean square of each input channel; None when it was not observed.
        hessian: [in, in] float: the mean of x x^T over the samples; None when it was not observed.
        samples: how many input vectors these are means of.
        inputs: [n, in] float: some of the input vectors themselves; None when none were kept.
        drift: [in, in] float: the mean of (x' - x) x^T, where x' is what the float model has at this input and x what
            it is behind the layers quantized so far; None when it was not observed.
    """

    importance: Tensor | None = None
    hessian: Tensor | None = None
    samples: int = 0
    inputs: Tensor | None = None
    drift: Tensor | None = None


@dataclass(frozen=True)
class Solved:
    """What a solver made of one weight.

    Args:
        record: the codes, scales and zero points.
        notes: what the report should say: dampings, dead channels, fallbacks, each a short clause.
        input_factor: what the scale of the layer's static input is to be multiplied by, as it was solved for.
    """

    record: QuantizedTensor
    notes: tuple[str, ...] = ()
    input_factor: float = 1.0


@dataclass(frozen=True, eq=False)
class InputTraining:
    """What one training step of a block solver wants of the static inputs of layers.

    Args:
        factors: by name of the weight: [] float32 > 0, what the scale of its input is multiplied by; 1 where absent.
        dropped: the part of all values, drawn anew in every step, that is left unrounded.
        generator: draws it.
    """

    factors: Mapping[str, Tensor]
    dropped: float = 0.0
    generator: torch.Generator | None = None


Need = Literal["hessian", "drift", "inputs", "block"]
"""What a solver must be given besides weight, format and importance; "block" makes it a `BlockMethod`."""


class WeightMethod(Protocol):
    """A weight solver: a frozen dataclass whose fields are its recipe keys.

    Attributes:
        needs: what it must be given besides weight, format and importance.
        takes_levels: whether it works on formats with learned levels; else round-to-nearest stands in, with a reason.
    """

    needs: ClassVar[frozenset[Need]]
    takes_levels: ClassVar[bool]

    def solve(self, weight: Tensor, spec: QuantSpec, seen: Seen | None = None) -> Solved:
        """The codes, scales and zero points that stand for `weight`, and what is to be said of them.

        Args:
            weight: [out, in] float, finite.
            spec: target format.
            seen: what calibration saw; None when there was no data.
        """
        ...

    def quantize(self, weight: Tensor, spec: QuantSpec, seen: Seen | None = None) -> QuantizedTensor:
        """The record of `solve` alone."""
        ...


class Block(Protocol):
    """Some layers of a model that run one after another, as a solver sees them: weights in, one output out.

    Attributes:
        weights: float matrices [out, in] by layer name.
        specs: target format of each.
        seen: what calibration saw at the input of each, with the blocks before it quantized.
        samples: how many inputs of the block are kept; they are numbered from 0.
        rounds_inputs: whether some of its layers have inputs with static ranges.
        adjustable: the layers whose input has a static range that is theirs alone, so that its scale may be trained.
    """

    weights: Mapping[str, Tensor]
    specs: Mapping[str, QuantSpec]
    seen: Mapping[str, Seen]
    samples: int
    rounds_inputs: bool
    adjustable: frozenset[str]

    def output(
        self, weights: Mapping[str, Tensor], indices: Sequence[int], training: InputTraining | None = None
    ) -> Tensor:
        """The block's output for some samples with other weights, differentiable in them and in factors.

        Its inputs are those that the quantized blocks before it give; the inputs of its layers are quantized as the
        recipe says, or as `training` does.
        """
        ...

    def target(self, indices: Sequence[int]) -> Tensor:
        """The float model's output of this block for the same samples."""
        ...


class BlockMethod(Protocol):
    """A solver that works on all layers of a block together; see `WeightMethod` for what it says of itself."""

    needs: ClassVar[frozenset[Need]]
    takes_levels: ClassVar[bool]

    def solve_block(self, block: Block) -> dict[str, Solved]:
        """Every layer of the block, by name."""
        ...


# A channel that calibration never excited still counts a little: unseen is not the same as unused.
_SMALLEST_IMPORTANCE = 1e-3


def check_weight(weight: Tensor) -> Tensor:
    """The weight as a float32 matrix.

    Args:
        weight: [out, in] float.

    Raises:
        ModelError: it is not a matrix of finite floats; the message names the first bad element.
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ModelError(
            f"a weight solver takes a float matrix [out, in], got {weight.dtype} of shape {tuple(weight.shape)}; "
            "reshape kernels to [out, in * kernel]"
        )
    weight = weight.detach().to(torch.float32)
    if not all_finite(weight):
        finite = torch.isfinite(weight)
        where = tuple(int(index) for index in (~finite).nonzero()[0])
        raise ModelError(
            f"weight element {where} is {float(weight[where])} ({int((~finite).sum())} of {weight.numel()} are not "
            "finite); repair or retrain the weight, it cannot be quantized"
        )
    return weight


def relative_importance(seen: Seen | None, columns: int) -> Tensor | None:
    """Importance of every input channel relative to their mean, or None when nothing distinguishes them.

    Args:
        seen: what calibration saw.
        columns: inputs of the weight.

    Returns:
        [columns] float32 with mean about 1, at least 0.001. None without importance and when it is uniform.

    Raises:
        DataError: the importance has the wrong shape, or a negative or not finite element.
    """
    if seen is None or seen.importance is None:
        return None
    importance = seen.importance.detach().to(torch.float64)
    if tuple(importance.shape) != (columns,):
        raise DataError(f"importance has shape {tuple(importance.shape)}, expected ({columns},): one per input channel")
    bad = ~torch.isfinite(importance) | (importance < 0)
    if bool(bad.any()):
        where = int(bad.nonzero()[0])
        raise DataError(
            f"importance of input channel {where} is {float(importance[where])}, expected a finite mean square >= 0; "
            "check the calibration data"
        )
    if columns == 0 or bool((importance == importance[0]).all()):
        return None
    mean = float(importance.mean())
    return (importance / mean).clamp(min=_SMALLEST_IMPORTANCE).to(torch.float32)
