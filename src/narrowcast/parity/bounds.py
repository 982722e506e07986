"""What two runs of one layer may differ by, and why: stated before anything is compared.

Integer arithmetic is exact, so the bound is 0. The float bounds are those that docs/numerics.md states of the kernels.
Where the two sides hold different number formats they differ by what rounding does to that model, which has no bound
until the caller states one. Knows formats and kernels by what they are, no model and no runtime.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from narrowcast.errors import FormatError


@dataclass(frozen=True)
class Arithmetic:
    """How one side computes a layer.

    Args:
        kind: "float" (a layer that holds no codes), "integer" (sums of codes; so is a table look-up, which is exact),
            "weights" (float inputs times stored codes), "network" (a chain of layers that runs as one), or "parts"
            (a module that is taken apart into layers on the other side).
        formats: the number formats of weights and input, in words.
        behind: what is applied to the sums in the same layer ("gelu"), "none" where nothing is.
        folded: whether the layer has taken in a BatchNorm.
        step: the largest step of the codes that it hands its output on as, in units of the output; 0 for floats.
    """

    kind: str
    formats: str
    behind: str = "none"
    folded: bool = False
    step: float = 0.0


@dataclass(frozen=True)
class Bound:
    """What every number of an output may differ by: the sum of the terms; or how much noise there may be in all.

    Args:
        words: the bound and its reason, for people.
        absolute: in units of the output.
        relative: of the magnitude of the number itself.
        of_largest: of the largest magnitude in the reference's output of the call.
        of_products: of the sum of magnitudes of the products that the number is the sum of.
        sqnr_db: the least ratio of signal to noise over all outputs, decibel; where given, it alone decides.
    """

    words: str
    absolute: float = 0.0
    relative: float = 0.0
    of_largest: float = 0.0
    of_products: float = 0.0
    sqnr_db: float | None = None

    @property
    def is_exact(self) -> bool:
        """Whether nothing may differ."""
        return self.sqnr_db is None and not (self.absolute or self.relative or self.of_largest or self.of_products)

    def limit(self, magnitude: Tensor, largest: float, products: Tensor | None) -> Tensor:
        """[...] the most that each number may differ by, from its magnitude and those of its products."""
        total = magnitude * self.relative + (self.absolute + self.of_largest * largest)
        if self.of_products:
            total += self.of_products * (largest if products is None else products)
        return total


EXACT = Bound("equal: the same integer arithmetic")
SAME_KERNELS = Bound("equal: the same float kernels on the same weights")
ALL_EXACT = Bound("equal: as all layers must be")
# docs/numerics.md, "Activation functions": 2e-7 of it is the kernels' polynomial, the rest torch's own rounding.
BEHIND = Bound("1.5e-6 + 1e-6 |y|: {} by the kernel's polynomial", absolute=1.5e-6, relative=1e-6)
# docs/numerics.md, "Float inputs": 2^-16 of the products for each side; bfloat16 rounds both inputs and outputs.
PRODUCTS = Bound("2^-15 sum |x w|: float inputs, summed in another order", of_products=2.0**-15)
HALF = Bound("2^-6 sum |x w|: 16-bit float inputs", of_products=2.0**-6, of_largest=2.0**-7)
FLOATS = Bound("1e-5 of max |y|: float32 rounding", of_largest=1e-5)
# Sums of integers are exact everywhere, but another runtime multiplies them by their scale in another order.
SUMS = Bound("1e-5 of max |y|: the same sums of integers, scaled by another runtime", of_largest=1e-5)
# A code that lies on a rounding boundary may fall either way, and what follows sees another code there. No bound can be
# proved for what a model makes of that; 24.7 dB is the least that the kit's networks show (docs/decisions.md).
CODES = Bound("20 dB: codes on a rounding boundary may fall either way", sqnr_db=20.0)


def bound_for(
    ours: Arithmetic, theirs: Arithmetic, *, same_runtime: bool, same_kernels: bool, half: bool = False
) -> Bound | None:
    """What a layer alone, on the same inputs, may differ by.

    Args:
        ours: how the reference computes it.
        theirs: how the artefact does.
        same_runtime: whether one runtime computes what is float on both sides.
        same_kernels: whether both sides run the same kernels of narrowcast in it.
        half: whether the inputs are 16-bit floats, to which outputs are rounded too.

    Returns:
        The bound; None where the formats of the two differ.
    """
    kinds = {ours.kind, theirs.kind}
    if ours.formats != theirs.formats:
        return None
    if kinds & {"parts", "network"}:
        return EXACT if kinds == {"network"} and same_runtime else CODES if "network" in kinds else FLOATS
    if kinds == {"float"}:
        return SAME_KERNELS if same_runtime and ours.folded == theirs.folded else FLOATS
    if kinds == {"integer"} and not same_runtime:
        return _sums(max(ours.step, theirs.step))
    if kinds == {"integer"}:
        function = next((x.behind for x in (ours, theirs) if x.behind not in ("none", "relu")), "")
        apart = not same_kernels or ours.behind != theirs.behind
        relative = 2.0**-7 if half else BEHIND.relative
        return Bound(BEHIND.words.format(function), BEHIND.absolute, relative) if function and apart else EXACT
    if same_kernels and kinds == {"weights"} and ours.behind == theirs.behind:
        return SAME_KERNELS
    return HALF if half else PRODUCTS


def _sums(step: float) -> Bound:
    """Of the same sums in two runtimes."""
    if not step:
        return SUMS
    words = "1 code: the same sums of integers, handed on as codes; one on a rounding boundary may fall either way"
    return Bound(words, absolute=step * (1 + 1e-5))


def bound_for_output(layers: list[Bound | None]) -> Bound | None:
    """What the model's output may differ by, from the bounds of its layers; None where one of them has none."""
    if any(bound is None for bound in layers):
        return None
    return ALL_EXACT if all(bound in (EXACT, SAME_KERNELS) for bound in layers) else CODES


_DECIBEL = re.compile(r"\s*(\d+(?:\.\d+)?)\s*dB\s*", re.IGNORECASE)


def parse_tolerance(tolerance: str | float | Bound) -> Bound:
    """A tolerance as a caller states it: "exact", "40dB", or a share of the largest output such as 1e-3.

    Raises:
        FormatError: it is none of these.
    """
    if isinstance(tolerance, Bound):
        return tolerance
    text = str(tolerance).strip()
    if text.lower() == "exact" or text in ("0", "0.0"):
        return Bound("equal: asked for")
    if found := _DECIBEL.fullmatch(text):
        return Bound(f"{float(found[1]):g} dB: asked for", sqnr_db=float(found[1]))
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 < share < 1:
        raise FormatError(
            f"tolerance {text!r} is not known; give 'exact', a least ratio of signal to noise such as '40dB', or the "
            "largest difference as a share of the largest output, above 0 and below 1, such as 1e-3"
        )
    return Bound(f"{share:g} of the largest output: asked for", of_largest=share)


def all_products(x: Tensor, weight: Tensor) -> Tensor:
    """[..., N] sums of magnitudes of the products of inputs [..., K] and a weight [N, K]."""
    return torch.nn.functional.linear(x.abs().float(), weight.abs().float())
