"""Rotating the residual stream of a decoder: outliers of single channels are spread over all of them.

With an orthogonal Q the stream x becomes x Q. RMSNorm without scales commutes with it, RMSNorm(x Q) = RMSNorm(x) Q, so
with every norm's scales g folded into its readers first,

    embedding E -> E Q,    readers W -> W diag(g) Q,    writers W -> Q^T W,    b -> b Q,

leaves the function as it is. LayerNorm subtracts a mean, which a rotation does not keep: such models are refused.

Q is a Hadamard matrix with random signs, diag(+-1) H / sqrt(n): its entries have one size, so a channel's outlier
is spread evenly. Sylvester's doubling makes them for powers of two; Paley's constructions from quadratic residues give
the odd parts of other widths (12 for 768, 20 for 5120, 28 for 896 and 3584, 36 for 576). Widths for which neither gives
one take a random orthogonal matrix by QR.

Source:
    Ashkboos et al. 2024, QuaRot, arXiv:2404.00456, section 4 (stage 1a); SliceGPT, arXiv:2401.15024, for the folding;
    Paley 1933. Differs: no online rotations inside attention and before the down projection, which would need kernels
    of their own at run time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from narrowcast.errors import RecipeError


@dataclass(frozen=True)
class Rotate:
    """Rotation of the residual stream.

    Args:
        kind: "hadamard" (a random orthogonal matrix where the width has no known one), or "random".
        seed: of the signs, or of the random matrix.
        untie: give an output head that is tied to the embedding a matrix of its own. The final norm's scales go into
            the head and not into the embedding, so a tied head cannot be rotated: without this such a model is refused.
    """

    kind: Literal["hadamard", "random"] = "hadamard"
    seed: int = 0
    untie: bool = False

    def __post_init__(self) -> None:
        if self.kind not in ("hadamard", "random"):
            raise RecipeError(f"rotate: kind is {self.kind!r}; use 'hadamard' or 'random'")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise RecipeError(f"rotate: seed is {self.seed!r}; use a whole number >= 0")
        if not isinstance(self.untie, bool):
            raise RecipeError(f"rotate: untie is {self.untie!r}; use true or false")

    def matrix(self, width: int) -> tuple[Tensor, str]:
        """The rotation of a stream.

        Returns:
            matrix: [width, width] float64, orthogonal.
            name: what it is, for the report.
        """
        generator = torch.Generator().manual_seed(self.seed)
        hadamard = hadamard_matrix(width) if self.kind == "hadamard" else None
        if hadamard is None:
            why = ", no Hadamard matrix of this width is known here" if self.kind == "hadamard" else ""
            return random_orthogonal(width, generator), f"a random orthogonal matrix of {width} (QR{why})"
        signs = torch.randint(0, 2, (width,), generator=generator).double() * 2 - 1
        return hadamard * signs.unsqueeze(1) / math.sqrt(width), f"a Hadamard matrix of {width} with random signs"


def random_orthogonal(width: int, generator: torch.Generator) -> Tensor:
    """An orthogonal matrix, uniformly distributed, [width, width] float64.

    Source:
        Mezzadri 2007, math-ph/0609050: QR of a Gaussian matrix with the signs of R's diagonal.
    """
    q, r = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
    signed: Tensor = q * torch.where(r.diagonal() < 0, -1.0, 1.0).double()
    return signed


def hadamard_matrix(width: int) -> Tensor | None:
    """A matrix of +1 and -1 with orthogonal rows, [width, width] float64; None where no construction here gives one."""
    if width < 1:
        return None
    odd, doublings = width, 0
    while odd % 2 == 0:
        odd, doublings = odd // 2, doublings + 1
    for left in range(doublings, -1, -1):  # as many of Sylvester's doublings as there can be
        if (made := _core(width >> left)) is not None:
            for _ in range(left):
                made = torch.cat([torch.cat([made, made], 1), torch.cat([made, -made], 1)])
            return made
    return None


def _core(width: int) -> Tensor | None:
    """1, or a matrix of Paley's: width - 1 a prime 3 mod 4, or width / 2 - 1 a prime 1 mod 4."""
    if width == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if width % 4 == 0 and _is_prime(width - 1):
        skew = _bordered(width - 1, -1.0)
        return torch.eye(width, dtype=torch.float64) + skew
    if width % 4 == 0 and (width // 2) % 4 == 2 and _is_prime(width // 2 - 1):
        conference = _bordered(width // 2 - 1, 1.0)
        plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        minus = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(conference, plus) + torch.kron(torch.eye(width // 2, dtype=torch.float64), minus)
    return None


def _bordered(prime: int, left: float) -> Tensor:
    """The matrix of quadratic residues mod `prime` with a border: [0, 1...; left..., chi(i - j)]."""
    chi = -torch.ones(prime, dtype=torch.float64)
    chi[torch.arange(1, prime).square() % prime] = 1.0
    chi[0] = 0.0
    index = torch.arange(prime)
    made = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    made[0, 1:], made[1:, 0] = 1.0, left
    made[1:, 1:] = chi[(index.unsqueeze(1) - index.unsqueeze(0)) % prime]
    return made


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


def rotate_columns(weight: Tensor, rotation: Tensor, gain: Tensor | None = None) -> Tensor:
    """What reads the stream: W diag(g) Q.

    Args:
        weight: [out, width] float.
        rotation: [width, width] float64, orthogonal.
        gain: [width] scales of the norm before it, folded in; None for none.
    """
    columns = weight.double() if gain is None else weight.double() * gain.double()
    return (columns @ rotation).to(weight.dtype)


def rotate_rows(weight: Tensor, bias: Tensor | None, rotation: Tensor) -> tuple[Tensor, Tensor | None]:
    """What writes to the stream: Q^T W, and b Q.

    Args:
        weight: [width, in] float.
        bias: [width] float or None.
        rotation: [width, width] float64, orthogonal.
    """
    rows = (rotation.t() @ weight.double()).to(weight.dtype)
    return rows, None if bias is None else (bias.double() @ rotation).to(bias.dtype)
