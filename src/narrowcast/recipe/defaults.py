"""The weight solver of a rule that names none: what keeps the most accuracy with what there is to go by."""

from __future__ import annotations

from typing import Any

from narrowcast.core import QuantSpec
from narrowcast.models import Layer

# At most so many bits a rounding error is large enough that compensating for it is worth the minutes it takes; above,
# solvers that see inputs are within the noise of rounding to nearest on every model of the accuracy table.
SOLVED_BITS = 6
# At most so many bits rounding is learned block by block; above, compensating column by column keeps as much in a third
# of the time. A convolution has few inputs, so there is little for its columns to compensate with.
LEARNED_BITS = 2
LEARNED_BITS_OF_CONVOLUTIONS = 4


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
    if layer.type in ("LSTM", "GRU"):
        return {"rtn": {}}  # half of their matrices multiply hidden states, which nothing sees from outside
    convolution = layer.type.startswith("Conv") and layer.type != "Conv1D"  # which is transformers' linear layer
    most = LEARNED_BITS_OF_CONVOLUTIONS if convolution else LEARNED_BITS
    # no gradient moves learned levels
    return {"autoround": {}} if spec.format.bits <= most and not spec.format.learned else {"gptq": {}}
