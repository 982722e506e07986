"""One linear layer to be timed, what can time it, and the families in which contenders are compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.peers import UnavailableError
from benchmarks.timing import Call

# What is multiplied with what. A contender is compared with its own family and with float.
FLOAT = "float"
INT8 = "int8"  # int8 weights, 8-bit activations
INT4 = "int4"  # weights of at most 4 bits, 8-bit activations
INT8_WEIGHTS = "int8 weights"  # float activations
INT4_WEIGHTS = "int4 weights"  # at most 4 bits, float activations
RIVALS = {
    INT8: (INT8, FLOAT),
    INT4: (INT4, INT4_WEIGHTS, FLOAT),
    INT8_WEIGHTS: (INT8_WEIGHTS, FLOAT),
    INT4_WEIGHTS: (INT4_WEIGHTS, FLOAT),
}

# From an input [M, K] float32, the call that multiplies it; converting the input to bfloat16 is not part of the call
# (a model in bfloat16 has it so), quantizing it is.
Prepare = Callable[[Tensor], Call]


@dataclass(frozen=True)
class Problem:
    """The layer y = x W^T + b with random normal weights, as trained ones roughly are.

    Attributes:
        weight: [N, K] float32.
        bias: [N] float32.
        samples: [rows, K] float32 inputs for static ranges.
    """

    weight: Tensor
    bias: Tensor
    samples: Tensor

    @staticmethod
    def random(rows: int, columns: int) -> Problem:
        """A layer of this shape with the same numbers in every run."""
        generator = torch.Generator().manual_seed(rows * 1_000_003 + columns)
        weight = torch.randn(rows, columns, generator=generator) / columns**0.5
        return Problem(weight, torch.randn(rows, generator=generator), torch.randn(64, columns, generator=generator))


@dataclass(frozen=True)
class Contender:
    """One way to compute the layer.

    Attributes:
        name: how results call it.
        family: FLOAT, INT8, ...: what it is compared with.
        operand: "int8", "float32" or "bfloat16": whose multiply peak bounds it.
        bits: bits per weight that a matrix-vector product must read, scales included.
        copies: from a layer, a function that makes one more independent copy of it, ready to be called; a copy is what
            is rotated beyond the caches.
    """

    name: str
    family: str
    operand: str
    bits: float
    copies: Callable[[Problem], Callable[[], Prepare]]

    @property
    def ours(self) -> bool:
        """Whether this is narrowcast."""
        return self.name.startswith("narrowcast")


def need(package: str) -> None:
    """Refuses with a reason where a package is not installed."""
    import importlib.util

    if importlib.util.find_spec(package) is None:
        raise UnavailableError(f"{package} is not installed")
