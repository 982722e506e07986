"""Findings: what the calibration doctor says about data, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Severity = Literal["severe", "warning", "note"]
"""severe: the result cannot be trusted; warning: it is probably worse than it could be; note: worth knowing."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with, or worth knowing of, calibration data.

    Args:
        severity: see `Severity`.
        topic: "length", "duplicates", "padding", "vocabulary", "range", "noise", "constant" or "unseen".
        where: the input of the model or the layer that it is about.
        message: what was found, with numbers.
        remedy: what to do; "" for a note that asks for nothing.
        numbers: the same numbers as data, finite.
    """

    severity: Severity
    topic: str
    where: str
    message: str
    remedy: str = ""
    numbers: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.where}: {self.message}" + (f"; {self.remedy}" if self.remedy else "")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Finding:
        """The finding whose fields are `values`; unknown keys of later versions are passed over."""
        known = {key: values[key] for key in cls.__dataclass_fields__ if key in values}
        return cls(**known)
