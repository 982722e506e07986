"""Comparison: what `nc.compare` found, as plain data, JSON and a readable table."""

from __future__ import annotations

import io
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from narrowcast.errors import DataError
from narrowcast.evaluate.interval import Estimate
from narrowcast.evaluate.judge import OutputDifference, Score
from narrowcast.evaluate.latency import Ratio, Timing
from narrowcast.evaluate.process import ProcessMeasure

WIDTH = 100


@dataclass(frozen=True)
class Side:
    """One of the two models.

    Args:
        name: class name, or the path or factory it was opened from.
        bytes_on_disk: of its files, or of its state as one file.
        bytes_counted: what those bytes are.
        latency: seconds per call on the first batch, measured in turns with the other model.
        process: load time and peak memory in a fresh process.
        joules: energy per call; None where there is no counter.
    """

    name: str
    bytes_on_disk: int
    bytes_counted: str
    latency: Timing
    process: ProcessMeasure
    joules: float | None


@dataclass(frozen=True)
class Comparison:
    """Two versions of a model side by side.

    Args:
        reference: the model that is right by definition.
        candidate: the model that is judged.
        score: the metric with its interval; None where neither metric nor outputs gave one.
        outputs: how far the outputs are apart; None where the data returned none.
        speedup: reference time / candidate time: median and quartiles of interleaved rounds.
        batch_samples: samples in the batch that latency and energy were measured on.
        energy_reason: why there is no energy, "" where there is.
        machine: processor, torch version and threads that the figures come from.
        notes: every decision and omission, in sentences.
    """

    reference: Side
    candidate: Side
    score: Score | None
    outputs: OutputDifference | None
    speedup: Ratio
    batch_samples: int
    energy_reason: str
    machine: dict[str, str]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; numbers that JSON lacks are the strings "inf", "-inf" and "nan"."""
        found: dict[str, Any] = _encode(asdict(self))
        return found

    def to_json(self) -> str:
        """The same as JSON text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    def save_json(self, path: str | Path) -> None:
        """Writes the JSON text to a file."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Comparison:
        """The comparison that `to_dict` gave.

        Raises:
            DataError: a field is missing, unknown or of another kind.
        """
        try:
            return _decode_comparison(values)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"this is not a comparison that narrowcast wrote: {error!r}") from error

    @classmethod
    def from_json(cls, text: str) -> Comparison:
        """The comparison that `to_json` gave."""
        try:
            values = json.loads(text)
        except ValueError as error:
            raise DataError(f"this comparison is not JSON: {error}") from error
        return cls.from_dict(values)

    def __str__(self) -> str:
        """A table for a terminal, without colour."""
        console = Console(file=io.StringIO(), width=WIDTH, color_system=None, legacy_windows=False)
        console.print(table(self))
        for note in self.notes:
            console.print(Text(f"- {note}"))
        file = console.file
        assert isinstance(file, io.StringIO)
        return file.getvalue().rstrip()


def table(comparison: Comparison) -> Table:
    """The comparison as a rich table of reference, candidate and change."""
    reference, candidate = comparison.reference, comparison.candidate
    grid = Table(title=Text(f"{candidate.name} against {reference.name}"), title_justify="left")
    grid.add_column("")
    for name in ("reference", "candidate", "change [95 % interval]"):
        grid.add_column(name, justify="right")
    for row in (*_score_rows(comparison), *_cost_rows(comparison), *_output_rows(comparison.outputs)):
        grid.add_row(*(Text(cell) for cell in row))
    return grid


def _score_rows(comparison: Comparison) -> list[tuple[str, str, str, str]]:
    score = comparison.score
    if score is None:
        return []
    share = score.unit == "share"
    label = f"{score.name} of {score.samples} {_plural(score.per, score.samples)}" if score.per else score.name
    change = _interval(score.difference, scale=100 if share else 1, unit=" points" if share else "")
    rows = [(label, _score(score.reference, share), _score(score.candidate, share), change)]
    if score.name == "perplexity":
        rows.append(("perplexity ratio", "", "", _interval(score.ratio, signed=False)))
    return rows


def _cost_rows(comparison: Comparison) -> list[tuple[str, str, str, str]]:
    a, b, speed = comparison.reference, comparison.candidate, comparison.speedup
    faster = f"{speed.value:.2f} x as fast ({speed.lower_quartile:.2f} to {speed.upper_quartile:.2f})"
    rows = [
        (
            f"latency, batch of {comparison.batch_samples}",
            _seconds(a.latency.seconds),
            _seconds(b.latency.seconds),
            faster,
        ),
        ("bytes on disk", _bytes(a.bytes_on_disk), _bytes(b.bytes_on_disk), _share(a.bytes_on_disk, b.bytes_on_disk)),
    ]
    for label, field, show in (
        ("load, fresh process", "load_seconds", _seconds),
        ("load and first answer", "answer_seconds", _seconds),
        ("peak memory", "peak_bytes", _bytes),
        ("memory before loading", "baseline_bytes", _bytes),
    ):
        cells = [_measured(side.process, field, show) for side in (a, b)]
        both = not (a.process.reason or b.process.reason)
        change = _share(getattr(a.process, field), getattr(b.process, field)) if both else ""
        if cells != ["-", "-"]:
            rows.append((label, cells[0], cells[1], change))
    if a.joules is not None and b.joules is not None:
        rows.append(("energy per call", f"{a.joules:.3g} J", f"{b.joules:.3g} J", _share(a.joules, b.joules)))
    return rows


def _output_rows(outputs: OutputDifference | None) -> list[tuple[str, str, str, str]]:
    if outputs is None:
        return []
    rows = [
        ("output SQNR", "", f"{outputs.sqnr_db:.2f} dB", ""),
        ("output cosine, mean", "", f"{outputs.cosine:.6f}", ""),
        ("output difference, mean / max", "", f"{outputs.mean_absolute:.3g} / {outputs.max_absolute:.3g}", ""),
    ]
    if outputs.agreement is not None:
        share = _interval(outputs.agreement, scale=100, unit=" %", signed=False)
        rows.insert(0, ("same top prediction", "", f"{100 * outputs.agreement.value:.2f} %", share))
    return rows


def _measured(process: ProcessMeasure, field: str, show: Any) -> str:
    return "-" if process.reason else str(show(getattr(process, field)))


def _plural(word: str, count: int) -> str:
    return word if count == 1 else f"{word}es" if word.endswith("ch") else f"{word}s"


def _score(value: float, share: bool) -> str:
    return f"{100 * value:.2f} %" if share else f"{value:.5g}"


def _interval(estimate: Estimate, *, scale: float = 1, unit: str = "", signed: bool = True) -> str:
    def show(value: float) -> str:
        return f"{scale * value:{'+' if signed else ''}.4g}"

    if estimate.low is None or estimate.high is None:
        return f"{show(estimate.value)}{unit}"
    return f"{show(estimate.value)}{unit} [{show(estimate.low)}, {show(estimate.high)}]"


def _seconds(value: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-6:.3g} us"


def _bytes(value: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value:.0f} B"


def _share(reference: float, candidate: float) -> str:
    return f"{100 * candidate / reference:.1f} % of the reference" if reference else ""


def _encode(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _encode(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _decode_comparison(values: dict[str, Any]) -> Comparison:
    fields = dict(values)
    score, outputs = fields.pop("score"), fields.pop("outputs")
    return Comparison(
        reference=_side(fields.pop("reference")),
        candidate=_side(fields.pop("candidate")),
        score=None if score is None else Score(**_numbers(score, ("difference", "ratio"))),
        outputs=None if outputs is None else OutputDifference(**_numbers(outputs, ("agreement",))),
        speedup=Ratio(**_numbers(fields.pop("speedup"), ())),
        notes=tuple(fields.pop("notes")),
        **fields,
    )


def _side(values: dict[str, Any]) -> Side:
    latency = {**values["latency"], "rounds": tuple(values["latency"]["rounds"])}
    process = ProcessMeasure(**values["process"])
    return Side(**{**values, "latency": Timing(**latency), "process": process})


def _numbers(values: dict[str, Any], estimates: tuple[str, ...]) -> dict[str, Any]:
    """Fields with infinities as numbers again and estimates as records."""
    numbers: dict[str, Any] = {
        key: float(value) if value in ("inf", "-inf", "nan") else value for key, value in values.items()
    }
    for key in estimates:
        estimate: Any = numbers[key]
        if estimate is not None:
            numbers[key] = Estimate(**_numbers(estimate, ()))
    return numbers
