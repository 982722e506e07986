"""The figures the first issue asks for, as data: which measured quantity of which model must not pass which bound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

AT_LEAST, AT_MOST = "at least", "at most"


@dataclass(frozen=True)
class Target:
    """One bound on one quantity.

    Attributes:
        model: kit model.
        variants: presets it applies to; "weight-int4" is without data, "weight-int4+data" with calibration data.
        quantity: key of a result row.
        direction: AT_LEAST or AT_MOST.
        bound: the value itself is allowed.
    """

    model: str
    variants: tuple[str, ...]
    quantity: str
    direction: str
    bound: float

    def met(self, value: float) -> bool:
        """Whether `value` keeps the bound."""
        return value >= self.bound if self.direction == AT_LEAST else value <= self.bound

    def __str__(self) -> str:
        return f"{self.quantity} {self.direction} {self.bound:g}"


STATIC = ("static-int8",)
INT8_WEIGHTS = ("weight-int8", "weight-int8+data")
INT4_WEIGHTS = ("weight-int4", "weight-int4+data")
INT8_DYNAMIC = ("dynamic-int8", "dynamic-int8+data")
INT4_DYNAMIC = ("dynamic-int4", "dynamic-int4+data")

ACCURACY = (
    Target("resnet20", STATIC, "drop", AT_MOST, 0.3),
    Target("resnet20", STATIC, "sqnr_db", AT_LEAST, 36.0),
    Target("resnet20", INT8_WEIGHTS, "sqnr_db", AT_LEAST, 38.0),
    Target("mobilenetv1", STATIC, "drop", AT_MOST, 0.5),
    Target("mobilenetv1", STATIC, "sqnr_db", AT_LEAST, 25.0),
    Target("mobilenetv2", STATIC, "drop", AT_MOST, 1.0),
    Target("squeezenet11", STATIC, "drop", AT_MOST, 1.0),
    Target("squeezenet11", STATIC, "sqnr_db", AT_LEAST, 33.0),
    Target("minilm", INT8_DYNAMIC, "drop", AT_MOST, 0.3),
    Target("minilm", INT8_DYNAMIC, "cosine", AT_LEAST, 0.9975),
    Target("minilm", INT4_DYNAMIC, "drop", AT_MOST, 1.0),
    Target("minilm", INT4_DYNAMIC, "cosine", AT_LEAST, 0.977),
    Target("minilm", INT8_WEIGHTS, "cosine", AT_LEAST, 0.9996),
    Target("minilm", INT8_WEIGHTS + INT8_DYNAMIC, "linear_percent", AT_MOST, 25.5),
    Target("minilm", INT4_WEIGHTS + INT4_DYNAMIC, "linear_percent", AT_MOST, 15.7),
    Target("stories260k", INT8_DYNAMIC, "perplexity_ratio", AT_MOST, 1.003),
    Target("stories260k", ("weight-int4",), "perplexity_ratio", AT_MOST, 1.09),
    Target("stories260k", ("weight-int4+data",), "perplexity_ratio", AT_MOST, 1.07),
    Target("textgenrnn", INT8_WEIGHTS, "perplexity_ratio", AT_MOST, 1.005),
)


def judge(targets: Sequence[Target], model: str, variant: str, row: Mapping[str, object]) -> list[dict[str, object]]:
    """Every target that applies to this row, with the measured value and whether it is met.

    Args:
        targets: for example ACCURACY.
        model: kit model.
        variant: preset, with "+data" where calibration data was given to a preset that does not need it.
        row: measured quantities; one that is missing counts as not met.

    Returns:
        [{"target": text, "value": number or None, "met": bool}, ...].
    """
    verdicts: list[dict[str, object]] = []
    for target in targets:
        if target.model == model and variant in target.variants:
            value = row.get(target.quantity)
            met = isinstance(value, (int, float)) and target.met(float(value))
            verdicts.append({"target": str(target), "value": value, "met": met})
    return verdicts
