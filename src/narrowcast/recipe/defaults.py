"""The weight solver of a rule that names none: what keeps the most accuracy with what there is to go by."""

from __future__ import annotations

from typing import Any

from narrowcast.core import QuantSpec
from narrowcast.models import Layer

# At most so many bits a rounding error is large enough that compensating for it is worth the minutes it takes; above,
# solvers that see inputs are within the noise of rounding to nearest on every model of the accuracy table.
SOLVED_BITS = 6
# At most so many bits rounding is learned block by block, with what lies between the layers of a block in view; above,
# compensating column by column keeps as much in a third of the time.
LEARNED_BITS = 2
# Blocks of convolutions have too few of them for that view to be worth more than compensating: on the four networks of
# the accuracy table it keeps less at every number of bits. Recurrent layers are not solved as part of a block.
COMPENSATED = ("Conv1d", "Conv2d", "ConvTranspose2d", "LSTM", "GRU")


def default_method(layer: Layer, spec: QuantSpec, *, multiplied: bool, has_data: bool) -> dict[str, dict[str, Any]]:
    """The solver that a weight gets where its rule names none.

    Args:
        layer: the weight.
        spec: its format.
        multiplied: whether inputs multiply it; embeddings are looked up.
        has_data: whether there is calibration data.

    Returns:
        One name with its options, as a recipe has it.
    """
    if not has_data or not multiplied or spec.format.is_cast or spec.format.bits > SOLVED_BITS:
        return {"rtn": {}}
    # no gradient moves learned levels
    if spec.format.bits <= LEARNED_BITS and not spec.format.learned and layer.type not in COMPENSATED:
        return {"autoround": {}}
    return {"gptq": {}}
