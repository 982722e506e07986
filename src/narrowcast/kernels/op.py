"""The record that describes one operator of the torch namespace `narrowcast`; it knows no particular operator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

TIERS = ("scalar", "avx2", "avx512vnni")
"""Instruction-set tiers of the native library, slowest first."""


@dataclass(frozen=True)
class Op:
    """One operator: its meaning is `reference`, its shape rule is `fake`, its fast bodies are in the native library.

    Args:
        name:      name inside torch.ops.narrowcast.
        schema:    arguments and results in torch's schema language, without the name: "(Tensor x) -> Tensor".
        reference: body in plain torch; runs on any device and whenever the native library lacks the op.
        fake:      returns empty tensors of the right shape, dtype and strides without looking at values.
        tiers:     tiers that have a body of their own; a tier without one runs the next slower one.
    """

    name: str
    schema: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    tiers: tuple[str, ...] = TIERS
