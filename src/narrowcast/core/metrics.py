"""How far one tensor is from another, and how many bits a quantized one takes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from narrowcast.core.tensor import QuantizedTensor
from narrowcast.errors import FormatError


def sqnr_db(reference: Tensor, candidate: Tensor) -> float:
    """Signal to quantization noise ratio in decibel: 10 log10(sum reference^2 / sum (reference - candidate)^2).

    Args:
        reference: [...] the float tensor.
        candidate: [...] same shape, the quantized one.

    Returns:
        Decibel; inf when the two are equal (also when both are empty), -inf when only the reference is all zero.

    Raises:
        FormatError: the shapes differ.
    """
    exact, other = _as_pair(reference, candidate)
    signal, noise = float(exact.square().sum()), float((exact - other).square().sum())
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def cosine(reference: Tensor, candidate: Tensor) -> float:
    """Mean cosine of the angle between the rows (last dimension) of two tensors.

    Args:
        reference: [..., features].
        candidate: same shape.

    Returns:
        A number in [-1, 1]; a row that is zero in both counts as 1, in only one as 0; 1 when there are no rows.

    Raises:
        FormatError: the shapes differ.
    """
    exact, other = _as_pair(reference, candidate)
    if exact.numel() == 0:
        return 1.0
    lengths = exact.norm(dim=-1), other.norm(dim=-1)
    product = lengths[0] * lengths[1]
    angle = ((exact * other).sum(-1) / torch.where(product == 0, 1.0, product)).clamp(-1, 1)
    return float(torch.where((lengths[0] == 0) & (lengths[1] == 0), 1.0, angle).mean())


def kl_divergence(reference: Tensor, candidate: Tensor) -> float:
    """Kullback-Leibler divergence sum p log(p / q) in nats between two histograms of counts or probabilities.

    Args:
        reference: [bins] p, not negative, not all zero; normalised here.
        candidate: [bins] q, not negative, not all zero; normalised here.

    Returns:
        Nats, >= 0; inf where the candidate gives no mass to a bin that the reference uses.

    Raises:
        FormatError: the shapes differ, or a histogram has a negative or non-finite bin or no mass.
    """
    p, q = _as_pair(reference, candidate)
    for name, histogram in (("reference", p), ("candidate", q)):
        mass = float(histogram.sum())
        if not 0 < mass < math.inf or bool((histogram < 0).any()):
            raise FormatError(f"kl_divergence: the {name} is no histogram: its sum is {mass} or a bin is negative")
    used = p > 0
    p, q = p[used] / p.sum(), q[used] / q.sum()
    if bool((q == 0).any()):
        return math.inf
    return max(0.0, float((p * (p / q).log()).sum()))


def bits_per_weight(tensor: QuantizedTensor) -> float:
    """Stored bits per weight, scales and zero points counted."""
    return tensor.spec.bits_per_value(tensor.shape)


def _as_pair(reference: Tensor, candidate: Tensor) -> tuple[Tensor, Tensor]:
    if reference.shape != candidate.shape:
        raise FormatError(
            f"two tensors of one shape can be compared, got {tuple(reference.shape)} and {tuple(candidate.shape)}"
        )
    return reference.detach().to(torch.float64), candidate.detach().to(torch.float64)
