"""Report: what became of every weight, and the totals. Plain data; JSON in and out."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from narrowcast.report.findings import Finding

Outcome = Literal["quantized", "kept", "fell back", "folded"]


@dataclass(frozen=True)
class StepError:
    """How far a weight is from what it should be, after one step of the work.

    Args:
        step: "rtn absmax" (what the plainest rounding would give), the name of a transform or of the solver.
        weight_sqnr_db: SQNR of the weight; None when not measured.
        output_error: squared error of the layer's output relative to the output's square, tr(dW H dW^T) / tr(W H W^T)
            with H the mean of x x^T over its calibration inputs; None where H was not observed.
    """

    step: str
    weight_sqnr_db: float | None = None
    output_error: float | None = None


@dataclass(frozen=True)
class LayerOutcome:
    """What became of one weight.

    Args:
        layer: name of the weight.
        type: type of the module that owns it.
        outcome: "quantized" as the recipe says, "fell back" to something else than the recipe says, "kept" float, or
            "folded" into another layer.
        reason: why it was kept or fell back, or what else is worth knowing.
        spec: format of the weight; "" when kept.
        input: treatment of the input: "float", "int8/token", "uint8/tensor [-1.2, 3.4]", ...
        method: weight solver and what it had to go by.
        parameters: number of weights.
        macs: multiply-accumulates in the calibration pass; None without data.
        weight_sqnr_db: SQNR of the weight; None when kept.
        output_sqnr_db: SQNR of the layer's output on a sample of the data; None without data.
        bits_per_weight: stored bits, scales counted.
        bytes_before, bytes_after: bytes of the weight.
        kernel: what multiplies, with its instruction set.
        seconds: time that solving took.
        float_ms, quantized_ms: median time of the float and the quantized module on the same sample; None without data.
        errors: before the solver and after it, in the order of the work.
        notes: what the solver says of its work: dampings, dead channels.
    """

    layer: str
    type: str
    outcome: Outcome
    reason: str = ""
    spec: str = ""
    input: str = ""
    method: str = ""
    parameters: int = 0
    macs: int | None = None
    weight_sqnr_db: float | None = None
    output_sqnr_db: float | None = None
    bits_per_weight: float = 32.0
    bytes_before: int = 0
    bytes_after: int = 0
    kernel: str = ""
    seconds: float = 0.0
    float_ms: float | None = None
    quantized_ms: float | None = None
    errors: list[StepError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def speedup(self) -> float | None:
        """How many times faster than the float module on the sample; None without data."""
        if not self.float_ms or not self.quantized_ms:
            return None
        return self.float_ms / self.quantized_ms


@dataclass(frozen=True)
class LayerChange:
    """What one transform did to how well one layer can be quantized under the recipe, by round-to-nearest.

    Args:
        transform: its name in the recipe.
        layer: name of the weight.
        weight_sqnr_before_db, weight_sqnr_after_db: SQNR of the quantized weight.
        output_sqnr_before_db, output_sqnr_after_db: SQNR of the layer's output with weights and inputs quantized, on a
            sample of its inputs; None without one.
    """

    transform: str
    layer: str
    weight_sqnr_before_db: float
    weight_sqnr_after_db: float
    output_sqnr_before_db: float | None = None
    output_sqnr_after_db: float | None = None


@dataclass(frozen=True)
class Totals:
    """Sums over the model.

    Args:
        quantized_parameters: weights that are quantized now.
        coverage: quantized weights as a share of all weights that are matrices, kernels or tables (not vectors).
        integer_parameters: weights that an integer kernel multiplies.
        integer_macs: multiply-accumulates in integers as a share of all in known layers; None without data.
        parameters: all parameters of the float model, tied ones once.
        bytes_before, bytes_after: bytes of all parameters and buffers.
        seconds: time of the whole job.
        peak_memory_bytes: largest resident memory of this process so far; None where the system does not tell.
        output_sqnr_db: SQNR of the model's output on the first batch; None without data.
        float_ms, quantized_ms: median time of both models on the first batch, interleaved; None without data.
        timed_samples: rows of that batch.
        threads: torch threads while timing.
    """

    quantized_parameters: int
    coverage: float
    integer_parameters: int
    integer_macs: float | None
    parameters: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    seconds: float = 0.0
    peak_memory_bytes: int | None = None
    output_sqnr_db: float | None = None
    float_ms: float | None = None
    quantized_ms: float | None = None
    timed_samples: int | None = None
    threads: int = 1


@dataclass(frozen=True)
class Report:
    """What one call of `quantize` did.

    Args:
        recipe: name of the recipe.
        model: class name of the model.
        layers: one outcome per weight, in the model's order.
        totals: sums.
        notes: decisions that concern no single layer.
        changes: what each transform did to each layer, in order.
        findings: what the calibration doctor says about the data, worst first.
    """

    recipe: str
    model: str
    layers: list[LayerOutcome]
    totals: Totals
    notes: list[str] = field(default_factory=list)
    changes: list[LayerChange] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON values; infinite decibels (nothing was lost) are the text "inf"."""
        plain: dict[str, Any] = _plain(asdict(self))
        return plain

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Report:
        """The report that `to_dict` described; unknown keys of later versions are passed over."""
        layers = [_layer(row) for row in values["layers"]]
        totals = Totals(**_known(Totals, values["totals"]))
        changes = [LayerChange(**_known(LayerChange, row)) for row in values.get("changes", [])]
        findings = [Finding.from_dict(row) for row in values.get("findings", [])]
        return cls(values["recipe"], values["model"], layers, totals, list(values["notes"]), changes, findings)

    def save_json(self, path: str | Path) -> None:
        """Write the report; the file appears whole or not at all."""
        target = Path(path)
        beside = target.with_name(f".{target.name}.{os.getpid()}")
        beside.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        beside.replace(target)

    def __str__(self) -> str:
        from narrowcast.report.terminal import render

        return render(self)


def _layer(row: dict[str, Any]) -> LayerOutcome:
    errors = [StepError(**_known(StepError, error)) for error in row.get("errors", [])]
    return LayerOutcome(**_known(LayerOutcome, row) | {"errors": errors})


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _known(kind: type, row: dict[str, Any]) -> dict[str, Any]:
    names = {f.name for f in fields(kind)}
    infinite = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}
    return {
        key: infinite.get(item, item) if isinstance(item, str) and key.endswith(("_db", "_error")) else item
        for key, item in row.items()
        if key in names
    }
