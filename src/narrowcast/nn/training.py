"""How ranges are trained: the table that the recipe key `train` names."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Training:
    """One way to train ranges; gradients of weights and inputs always go straight through the rounding.

    Args:
        name: as recipes have it.
        weights: "learned" (the scale of every block is a parameter) or "followed" (it follows the largest weight of
            its block).
        inputs: how the scale of a static input is trained: "learned" (LSQ), "clipped" (PACT: by clipped values alone)
            or "fixed".
        offsets: whether zero points are trained with the scales, where the format has them.
        source: paper.
    """

    name: str
    weights: str
    inputs: str
    offsets: bool = False
    source: str = ""


TRAINING: dict[str, Training] = {
    row.name: row
    for row in (
        Training("lsq", "learned", "learned", source="Esser et al. 2019, arXiv:1902.08153"),
        Training("lsq+", "learned", "learned", offsets=True, source="Bhalgat et al. 2020, arXiv:2004.09576"),
        Training("ste", "followed", "fixed", source="Bengio et al. 2013, arXiv:1308.3432"),
        Training("pact", "followed", "clipped", source="Choi et al. 2018, arXiv:1805.06085"),
    )
}
DEFAULT_TRAINING = "lsq"
