"""What every weight solver gets and gives: tensors in, one QuantizedTensor out. Knows no model and no recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

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
        samples: how many input vectors the two are means of.
    """

    importance: Tensor | None = None
    hessian: Tensor | None = None
    samples: int = 0


class WeightMethod(Protocol):
    """A weight solver: a frozen dataclass whose fields are its recipe keys."""

    def quantize(self, weight: Tensor, spec: QuantSpec, seen: Seen | None = None) -> QuantizedTensor:
        """The codes, scales and zero points that stand for `weight`.

        Args:
            weight: [out, in] float, finite.
            spec: target format.
            seen: what calibration saw; None when there was no data.
        """
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
