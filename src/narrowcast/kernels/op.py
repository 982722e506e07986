"""The record that describes one operator of the torch namespace `narrowcast`; it knows no particular operator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

FAMILIES = {"x86": ("scalar", "avx2", "avxvnni", "avx512vnni"), "Arm": ("scalar", "neondot", "neoni8mm")}
"""Instruction-set tiers of the native library by processor family, slowest first."""

TIERS = tuple(dict.fromkeys(tier for family in FAMILIES.values() for tier in family))
"""Every tier once."""

FLOAT_TIERS = ("scalar", "avx2", "avx512vnni")
"""Tiers with a body of their own for ops without integer products; on Arm, vectors are part of the scalar tier."""


def lower_tiers(tier: str) -> tuple[str, ...]:
    """The tiers whose code runs on a processor of this tier: itself, then the lower ones of its family.

    Args:
        tier: a name in TIERS.
    """
    family = next(family for family in FAMILIES.values() if tier in family)
    return family[family.index(tier) :: -1]


@dataclass(frozen=True)
class Op:
    """One operator: its meaning is `reference`, its shape rule is `fake`, its fast bodies are in the native library.

    Args:
        name:      name inside torch.ops.narrowcast.
        schema:    arguments and results in torch's schema language, without the name: "(Tensor x) -> Tensor".
        reference: body in plain torch; runs on any device and whenever the native library lacks the op.
        fake:      returns empty tensors of the right shape, dtype and strides without looking at values.
        tiers:     tiers that have a body of their own; a tier without one runs the next lower one of
                   its processor family.
        interleaved: tiers whose body also takes interleaved weights, and is faster on them.
    """

    name: str
    schema: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    tiers: tuple[str, ...] = TIERS
    interleaved: tuple[str, ...] = ()
