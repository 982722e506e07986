"""How far one tensor is from another, and how many bits a quantized one takes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from narrowcast.core.tensor import QuantizedTensor


def sqnr_db(reference: Tensor, candidate: Tensor) -> float:
    """Signal to quantization noise ratio in decibel: 10 log10(sum reference^2 / sum (reference - candidate)^2).

    Args:
        reference: [...] the float tensor.
        candidate: [...] same shape, the quantized one.

    Returns:
        Decibel; inf when the two are equal (also when both are empty), -inf when only the reference is all zero.
    """
    signal = float(reference.to(torch.float64).square().sum())
    noise = float((reference.to(torch.float64) - candidate.to(torch.float64)).square().sum())
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def cosine(reference: Tensor, candidate: Tensor) -> float:
    """Mean cosine of the angle between the rows (last dimension) of two tensors; two zero rows count as 1."""
    a, b = reference.to(torch.float64), candidate.to(torch.float64)
    norms = a.norm(dim=-1) * b.norm(dim=-1)
    both_zero = (a.norm(dim=-1) == 0) & (b.norm(dim=-1) == 0)
    value = (a * b).sum(-1) / torch.where(norms == 0, torch.ones_like(norms), norms)
    return float(torch.where(both_zero, torch.ones_like(value), value).mean())


def kl_divergence(reference: Tensor, candidate: Tensor) -> float:
    """Kullback-Leibler divergence sum p log(p / q) in nats between two histograms of counts or probabilities.

    Args:
        reference: [bins] p, not negative; normalised here.
        candidate: [bins] q, not negative; normalised here.

    Returns:
        Nats; inf where the candidate gives no mass to a bin that the reference uses.
    """
    p = reference.to(torch.float64) / float(reference.sum())
    q = candidate.to(torch.float64) / float(candidate.sum())
    used = p > 0
    if bool((q[used] == 0).any()):
        return math.inf
    return float((p[used] * (p[used] / q[used]).log()).sum())


def bits_per_weight(tensor: QuantizedTensor) -> float:
    """Stored bits per weight, scales and zero points counted."""
    return tensor.spec.bits_per_value(tensor.shape)
