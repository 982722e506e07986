"""The Hessian as solvers use it: checked, scaled, its dead channels set apart, damped until it can be factored."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from narrowcast.errors import DataError
from narrowcast.methods.base import Seen

# Each try damps ten times as much as the one before; where none succeeds, only a multiple of the identity is left.
_FIRST_DAMPING = 1e-8
_MOST_DAMPING = 1e12
# A pivot this much smaller than the diagonal is rounding noise of float64, and what is divided by it is noise too.
_SMALLEST_PIVOT = 1e-13


@dataclass(frozen=True)
class Curvature:
    """A Hessian in units in which its largest diagonal element is between 1 and 2.

    Args:
        hessian: [in, in] float64, symmetric; dead channels have the mean diagonal and nothing else.
        importance: [in] float64: the diagonal, 0 where the channel is dead.
        drift: [in, in] float64 in the same units, see `Seen`; None where it was not observed.
        correlated: whether any two channels are; without, rounding one weight says nothing about the others.
        notes: what the report should say of it.
    """

    hessian: Tensor
    importance: Tensor
    drift: Tensor | None
    correlated: bool
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Factored:
    """A damped Hessian and its factor.

    Args:
        hessian: [in, in] float64 H, damped; columns in their own order.
        factor: [in, in] float64 upper triangular U with inverse(H[order][:, order]) = U^T U: row j says how much of
            the error of column order[j] each later one takes over.
        notes: what the report should say of it.
    """

    hessian: Tensor
    factor: Tensor
    notes: tuple[str, ...]


def curvature(seen: Seen | None, columns: int, device: torch.device) -> Curvature:
    """The Hessian of calibration, checked.

    Args:
        seen: its `hessian` [in, in] and `samples`.
        columns: inputs of the weight.
        device: where the weight lies.

    Raises:
        DataError: there is no Hessian, it does not fit the weight, or has an element that is not finite or a negative
            diagonal; the message names the input channel.
    """
    hessian = _checked(seen, columns).to(device=device, dtype=torch.float64)
    assert seen is not None
    largest = float(hessian.diagonal().max()) if columns else 0.0
    if largest == 0.0:
        identity = torch.eye(columns, dtype=torch.float64, device=device)
        silent = ("calibration saw only zeros here: rounded to nearest",) if columns else ()
        return Curvature(identity, torch.zeros_like(identity.diagonal()), None, False, silent)
    # by powers of two, so scaling the data by one changes no bit; in two steps, as one factor could overflow
    exponent = 1 - math.frexp(largest)[1]
    halves = 2.0 ** (exponent // 2), 2.0 ** (exponent - exponent // 2)
    hessian = hessian * halves[0] * halves[1]
    drift = _checked_drift(seen, columns)
    if drift is not None:
        drift = drift.to(device=device, dtype=torch.float64) * halves[0] * halves[1]
    importance = hessian.diagonal().clone()
    dead = importance == 0
    hessian = torch.where(dead[:, None] | dead[None, :], 0.0, hessian)
    correlated = bool((hessian != torch.diag(importance)).any())
    hessian.diagonal()[dead] = importance.mean()
    notes: tuple[str, ...] = ()
    if count := int(dead.sum()):
        notes += (f"{count} of {columns} input channels were always zero and are rounded to nearest",)
    if 0 < seen.samples < columns:
        notes += (f"{seen.samples} samples for {columns} input channels: damping holds what they leave open",)
    return Curvature(hessian, importance, drift, correlated, notes)


def _checked(seen: Seen | None, columns: int) -> Tensor:
    if seen is None or seen.hessian is None:
        raise DataError(
            "gptq needs the Hessian of the layer's input, and no calibration data reached it; give data that does, or "
            "use a method that needs none: rtn or hqq"
        )
    hessian = seen.hessian.detach()
    if tuple(hessian.shape) != (columns, columns):
        raise DataError(f"the Hessian has shape {tuple(hessian.shape)}, expected ({columns}, {columns}): in by in")
    bad = ~torch.isfinite(hessian)
    if bool(bad.any()):
        # the channel at fault fills its whole row; the others are bad only where they meet it
        channel = int(bad.sum(1).argmax())
        raise DataError(
            f"the Hessian of input channel {channel} is not finite ({int(bad.sum())} of {bad.numel()} elements): the "
            "calibration data drives this channel to infinity; clean the data or check the model's weights"
        )
    if bool((hessian.diagonal() < 0).any()):
        channel = int((hessian.diagonal() < 0).nonzero()[0])
        raise DataError(
            f"the Hessian has {float(hessian[channel, channel]):.6g} on its diagonal at input channel {channel}, and a "
            "mean of squares is not negative; check where it comes from"
        )
    return hessian / 2 + hessian.t() / 2


def _checked_drift(seen: Seen, columns: int) -> Tensor | None:
    if seen.drift is None:
        return None
    drift = seen.drift.detach()
    if tuple(drift.shape) != (columns, columns):
        raise DataError(f"the drift has shape {tuple(drift.shape)}, expected ({columns}, {columns}): in by in")
    bad = ~torch.isfinite(drift)
    if bool(bad.any()):
        channel = int(bad.sum(1).argmax())
        raise DataError(f"the drift of input channel {channel} is not finite; clean the calibration data")
    return drift


def factor(hessian: Tensor, order: Tensor, damping: float) -> Factored:
    """The damped Hessian and its factor, with as much damping as it takes.

    U comes from one Cholesky factorization of the reversed matrix: H = R R^T with R upper triangular has
    U = inverse(R). The inverse of H, which would lose half of the digits, is never formed.

    Args:
        hessian: [in, in] float64, symmetric.
        order: [in] the order in which columns are rounded.
        damping: added to every diagonal element, as a part of their mean; raised tenfold as often as it takes.
    """
    mean = float(hessian.diagonal().mean())
    reverse = order.flip(0)
    identity = torch.eye(order.numel(), dtype=hessian.dtype, device=hessian.device)
    used = damping
    while used <= _MOST_DAMPING:
        damped = hessian + identity * (used * mean)
        lower, failed = torch.linalg.cholesky_ex(damped[reverse][:, reverse])
        smallest = float(lower.diagonal().min()) ** 2
        if int(failed) == 0 and smallest > _SMALLEST_PIVOT * float(damped.diagonal().max()):
            upper = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
            notes = (f"damping {used:g} of the mean diagonal, as {damping:g} left the Hessian singular",)
            return Factored(damped, upper, notes if used != damping else ())
        used = max(used * 10, _FIRST_DAMPING)
    return Factored(identity, identity, ("no damping makes the Hessian positive definite: rounded to nearest",))
