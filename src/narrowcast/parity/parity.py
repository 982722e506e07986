"""Parity: what verifying two models has shown, layer by layer, as plain data, JSON and a readable table."""

from __future__ import annotations

import io
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from narrowcast.parity.difference import Difference

WIDTH = 150
OUTPUT, MODEL = "(output)", "(model)"
EQUAL, WITHIN, BEYOND, OPEN = "equal", "within bound", "BEYOND", "no bound"
ROWS = 40  # the table shows at most this many layers; `to_dict` has all


@dataclass(frozen=True)
class LayerParity:
    """One layer, or the model's output, on both sides.

    Args:
        layer: its name on both sides.
        type: class in the reference, and in the artefact where that is another.
        reference, artefact: how each side computes it, in words.
        bound: what its outputs may differ by when it gets the same inputs, and why.
        alone: figures of the artefact's layer on the reference's inputs; None where it cannot be run alone.
        in_model: figures of the layer in the artefact's own run, behind everything before it; None where its output
            exists on one side only.
        verdict: "equal", "within bound", "BEYOND" the bound, or "no bound" where outputs differ and none is stated.
        reason: what is known of why.
    """

    layer: str
    type: str
    reference: str
    artefact: str
    bound: str
    alone: Difference | None
    in_model: Difference | None
    verdict: str
    reason: str = ""

    @property
    def drifted(self) -> bool:
        """Whether its outputs differ in the artefact's own run; else alone, else what it stores, as far as is seen."""
        seen = self.in_model or self.alone
        return self.verdict == BEYOND if seen is None else not seen.equal

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "layer": self.layer, "type": self.type, "reference": self.reference, "artefact": self.artefact,
            "bound": self.bound, "verdict": self.verdict, "reason": self.reason,
            "alone": None if self.alone is None else self.alone.to_dict(),
            "in_model": None if self.in_model is None else self.in_model.to_dict(),
        }  # fmt: skip


@dataclass(frozen=True)
class Parity:
    """What `nc.verify` has shown.

    Args:
        reference, artefact: names of the models.
        layers: one row per common layer, in the order in which the reference runs them.
        output: the models' outputs; None where they return no tensor.
        batches, samples: of the data.
        notes: what was left out and decided, in sentences.
    """

    reference: str
    artefact: str
    layers: tuple[LayerParity, ...]
    output: LayerParity | None
    batches: int
    samples: int
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether every layer and the output are equal or within a stated bound."""
        return all(row.verdict in (EQUAL, WITHIN) for row in self._rows())

    @property
    def equal(self) -> bool:
        """Whether every layer and the output are equal bit for bit (a zero's sign does not count)."""
        return not any(row.drifted or row.verdict != EQUAL for row in self._rows())

    @property
    def first_difference(self) -> str | None:
        """The first layer, as the models run, whose outputs are not equal; None where all are."""
        return next((row.layer for row in self._rows() if row.drifted), None)

    @property
    def first_beyond(self) -> str | None:
        """The first layer, as the models run, that is beyond its bound; None where there is none."""
        return next((row.layer for row in self._rows() if row.verdict == BEYOND), None)

    def _rows(self) -> tuple[LayerParity, ...]:
        return self.layers if self.output is None else (*self.layers, self.output)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; numbers that JSON lacks are the strings "inf" and "-inf"."""
        values: dict[str, Any] = _encode({
            "reference": self.reference, "artefact": self.artefact, "ok": self.ok, "equal": self.equal,
            "first_difference": self.first_difference, "first_beyond": self.first_beyond, "summary": self.summary(),
            "batches": self.batches, "samples": self.samples, "layers": [row.to_dict() for row in self.layers],
            "output": None if self.output is None else self.output.to_dict(), "notes": list(self.notes),
        })  # fmt: skip
        return values

    def to_json(self) -> str:
        """The same as JSON text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    def save_json(self, path: str | Path) -> None:
        """Writes the JSON text to a file."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    def summary(self) -> str:
        """Whether parity holds, and where the two models part, in sentences."""
        layers = f"{len(self.layers)} layers" if len(self.layers) != 1 else "1 layer"
        if self.equal:
            return f"parity holds: {layers} and the output are equal bit for bit"
        head = "parity holds: every layer and the output are within their bounds" if self.ok else _fault(self._rows())
        return f"{head}. {_origin(self._rows())}"

    def __str__(self) -> str:
        """A table for a terminal, without colour."""
        console = Console(file=io.StringIO(), width=WIDTH, color_system=None, legacy_windows=False)
        console.print(table(self))
        for line in lines(self):
            console.print(Text(line))
        file = console.file
        assert isinstance(file, io.StringIO)
        return "\n".join(line.rstrip() for line in file.getvalue().rstrip().splitlines())


def _fault(rows: tuple[LayerParity, ...]) -> str:
    beyond = [row for row in rows if row.verdict == BEYOND]
    if beyond:
        count = f"{len(beyond)} of {len(rows)} rows are" if len(beyond) > 1 else "1 row is"
        why = f" ({beyond[0].reason})" if beyond[0].reason else ""
        return f"parity does not hold: {count} beyond the bound, the first is {beyond[0].layer}{why}"
    without = [row for row in rows if row.verdict == OPEN]
    noisy = min((row for row in without if row.alone is not None), key=_noise, default=None)
    most = "" if noisy is None else f"; the noisiest layer alone is {noisy.layer}, {_noise(noisy):.1f} dB"
    return (
        f"parity is not shown: {len(without)} of {len(rows)} rows differ and have no bound, because the two hold "
        f"different formats; say what they may differ by, as tolerance='20dB' (--tolerance 20dB){most}"
    )


def _origin(rows: tuple[LayerParity, ...]) -> str:
    """Where the first difference comes from: the layer itself, or what lies before it."""
    index = next((index for index, row in enumerate(rows) if row.drifted), None)
    if index is None:
        return "The models' own runs are equal; what differs does so only alone"
    first = rows[index]
    if first.alone is not None and not first.alone.equal:
        return f"The outputs first differ at {first.layer}, and it differs alone, on the reference's inputs, too"
    if first.layer != OUTPUT and first.alone is None:
        return f"The first difference is in what {first.layer} stores; its outputs, inside a network, are not seen"
    unseen = sum(row.in_model is None for row in rows[:index])
    where = "what runs between the layers (functions that are no modules, layers without a partner)"
    if unseen:
        where = f"the network that {unseen} layers before it run inside of, where they hand on codes"
    alone = "" if first.alone is None else ", but alone it is equal"
    return f"The outputs first differ at {first.layer}{alone}: the difference comes from {where}"


def lines(parity: Parity) -> list[str]:
    """What stands below the table: left-out rows, the bounds, the summary, the notes."""
    bounds = dict.fromkeys(row.bound for row in parity._rows() if row.verdict != EQUAL or row.layer == OUTPUT)
    hidden = sum(len(group) for group in _groups(parity) if len(group) > 1)
    more = [f"{hidden} layers are not shown one by one; to_dict() and --json have them all"] if hidden else []
    return [*more, *(f"bound {words}" for words in bounds), parity.summary(), *(f"- {note}" for note in parity.notes)]


def table(parity: Parity) -> Table:
    """The layers as a rich table, in the order they run; the first difference is pointed at."""
    batches = f"{parity.batches} batch{'' if parity.batches == 1 else 'es'}"
    samples = f"{parity.samples} sample{'' if parity.samples == 1 else 's'}"
    title = f"{parity.artefact} against {parity.reference}, {samples} in {batches}"
    grid = Table(title=Text(title), title_justify="left", box=None, pad_edge=False)
    for name in ("", "layer", "verdict", "bound"):
        grid.add_column(name, no_wrap=True)
    for name in ("alone: max", "SQNR", "differ", "in model: max", "SQNR", "differ"):
        grid.add_column(name, justify="right", no_wrap=True)
    grid.add_column("", overflow="fold")
    for group in _groups(parity):
        if len(group) == 1:
            grid.add_row(*map(Text, _cells(group[0], parity)))
        else:
            grid.add_row(*map(Text, _together(group)))
    if parity.output is not None:
        grid.add_row(*map(Text, _cells(parity.output, parity)))
    return grid


def _together(group: list[LayerParity]) -> list[str]:
    """One row for several: their verdict, and the worst that drift makes of them in the model."""
    verdicts = sorted({row.verdict for row in group})
    seen = [row.in_model for row in group if row.in_model is not None]
    worst = min(seen, key=lambda figures: figures.sqnr_db, default=None)
    alone = "equal" if all(row.alone is None or row.alone.equal for row in group) else ""
    return ["", f"... {len(group)} layers", ", ".join(verdicts), "", alone, "", "", *_figures(worst)]


def _groups(parity: Parity) -> list[list[LayerParity]]:
    """The rows in order; those of no interest (equal alone, the quieter ones of a long list) in groups."""
    asked = [row.layer for row in parity.layers if row.verdict == BEYOND][: ROWS // 2]
    asked += [name for name in (parity.first_difference,) if name]
    noisy = sorted((row for row in parity.layers if row.verdict != EQUAL), key=_noise)
    shown = set(list(dict.fromkeys([*asked, *(row.layer for row in noisy)]))[:ROWS])
    groups: list[list[LayerParity]] = []
    for row in parity.layers:
        if row.layer in shown or not groups or groups[-1][-1].layer in shown:
            groups.append([row])
        else:
            groups[-1].append(row)
    return groups


def _noise(row: LayerParity) -> float:
    return math.inf if row.alone is None else row.alone.sqnr_db


def _cells(row: LayerParity, parity: Parity) -> list[str]:
    pointer = ">" if row.layer == parity.first_difference else ""
    bound = row.bound.partition(":")[0]
    return [pointer, row.layer, row.verdict, bound, *_figures(row.alone), *_figures(row.in_model), row.reason]


def _figures(seen: Difference | None) -> list[str]:
    if seen is None:
        return ["-", "", ""]
    if seen.equal:
        return ["equal", "", ""]
    return [f"{seen.max_absolute:.3g}", f"{seen.sqnr_db:.1f} dB", _share(seen.share)]


def _share(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.0995 else f"{100 * share:.0f} %"


def _encode(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _encode(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
