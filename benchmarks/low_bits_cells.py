"""Cells of the low-bits table run one by one, each in a process of its own, kept on disk so that a run can go on."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks.machine import REPOSITORY, commit
from benchmarks.results_io import load_average

Row = dict[str, Any]
CACHE = REPOSITORY / "build" / "benchmarks" / "low_bits"
SCORING = ("benchmarks/kit/*.py", "benchmarks/low_bits_score.py")


@dataclass(frozen=True)
class Cell:
    """One cell of the table.

    Attributes:
        model, format, tool, method, samples: what it measures; they name the row.
        command: the process that prints the row as JSON on its last line.
        source: digest of all that decides the result: code, recipe, versions.
    """

    model: str
    format: str
    tool: str
    method: str
    samples: str
    command: tuple[str, ...]
    source: str

    @property
    def row(self) -> Row:
        """The part of the row that is known before."""
        return {name: getattr(self, name) for name in ("model", "format", "tool", "method", "samples")}

    @property
    def name(self) -> str:
        """What the terminal calls it."""
        return f"{self.model}, {self.format}: {self.tool} {self.method}"

    def file(self, folder: Path) -> Path:
        """Where its row is kept."""
        words = re.sub(r"[^a-z0-9_.]+", "-", "-".join(map(str, self.row.values())).lower())
        return folder / f"{words}-{self.source}.json"


def digest(patterns: Iterable[str], *more: object) -> str:
    """A digest of the files that match patterns, relative to the repository, and of plain data."""
    total = hashlib.sha256(json.dumps(more, sort_keys=True).encode())
    for path in sorted(path for pattern in patterns for path in REPOSITORY.glob(pattern)):
        total.update(str(path.relative_to(REPOSITORY)).encode() + path.read_bytes())
    return total.hexdigest()[:12]


def measure(cell: Cell, limit: float | None) -> Row:
    """The row of one cell, from a process of its own; one that fails or is stopped says so."""
    started = time.perf_counter()
    moment = datetime.now(timezone.utc).isoformat(timespec="seconds")
    known = cell.row | {"date": moment, "load": load_average(), "commit": commit()}
    try:
        code, output, errors = _run(cell.command, limit)
    except subprocess.TimeoutExpired:
        return known | {"stopped": limit, "wall": limit}
    wall = {"wall": round(time.perf_counter() - started, 1)}
    if code != 0:
        return known | wall | {"failed": last_words(errors)}
    return known | wall | json.loads(output.splitlines()[-1])


def _run(command: tuple[str, ...], limit: float | None) -> tuple[int, str, str]:
    """Exit code and both streams; a process that is stopped takes those that it started with it."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY,
                          errors="replace", start_new_session=True) as process:  # fmt: skip
        try:
            output, errors = process.communicate(timeout=limit)
        except BaseException:  # also when the user interrupts: another tool's process would go on alone
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return process.returncode, output, errors


def last_words(text: str) -> str:
    """The error a process ended with: its last line of the form "SomeError: ...", or else its last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Exit)\b", line)]
    return (errors or lines or ["no message"])[-1][:300]


def remembered(cell: Cell, folder: Path) -> Row | None:
    """The row of an earlier run of the same source."""
    path = cell.file(folder)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def settled(row: Row, limit: float | None) -> bool:
    """Whether a row need not be measured again: failures, and stops under a shorter limit, are tried again."""
    return "failed" not in row and not ("stopped" in row and (limit is None or limit > row["stopped"]))


def remaining(left: list[Cell], done: list[Row]) -> float:
    """Estimated seconds of the cells that are left: the mean of those of the same tool and method, or of all."""
    if not done:
        return 0.0
    mean = sum(row["wall"] for row in done) / len(done)
    alike: dict[tuple[str, str], list[float]] = {}
    for row in done:
        alike.setdefault((row["tool"], row["method"]), []).append(row["wall"])
    guesses = (alike.get((cell.tool, cell.method), [mean]) for cell in left)
    return sum(sum(guess) / len(guess) for guess in guesses)


def run_all(
    cells: list[Cell],
    *,
    fresh: bool = False,
    known_only: bool = False,
    limit: float | None = None,
    folder: Path = CACHE,
    show: Callable[[str], None] = print,
) -> list[Row]:
    """The rows of all cells, in their order.

    Args:
        cells: what to measure.
        fresh: whether to measure what an earlier run has measured already.
        known_only: whether to leave out what no earlier run has measured; what failed then is a row.
        limit: seconds after which a cell is stopped; None for no limit.
        folder: where rows are kept, one file per cell.
        show: called with one line per cell.

    Returns:
        One row per cell, or per known cell.
    """
    found = {} if fresh else {cell: row for cell in cells if (row := remembered(cell, folder))}
    if known_only:
        return list(found.values())
    known = {cell: row for cell, row in found.items() if settled(row, limit)}
    left = [cell for cell in cells if cell not in known]
    show(f"{len(cells)} cells, {len(known)} of them known from {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    done: list[Row] = []
    for number, cell in enumerate(left, 1):
        row = known[cell] = measure(cell, limit)
        cell.file(folder).write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
        done.append(row)
        show(f"{line(row)}  [{number}/{len(left)}, about {remaining(left[number:], done) / 60:.0f} min left]")
    return [known[cell] for cell in cells]


def with_earlier(cells: list[Cell], rows: list[Row], earlier: list[Row]) -> list[Row]:
    """The rows in the order of the cells; cells without one get that of an earlier document, where it has one."""
    found = {_place(row): row for row in [*earlier, *rows]}
    return [found[_place(cell.row)] for cell in cells if _place(cell.row) in found]


def _place(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("model", "format", "tool", "method", "samples"))


def line(row: Row) -> str:
    """A row for the terminal."""
    name = f"{row['model']}, {row['format']}: {row['tool']} {row['method']}:"
    if "failed" in row:
        return f"{name} failed: {row['failed']}"
    if "stopped" in row:
        return f"{name} stopped after {row['stopped']:g} s"
    if "milliseconds" in row:
        return f"{name} {len(row['milliseconds'])} timed, load {row['load_average']:g}"
    low, high = row["interval"]
    return f"{name} {row['score']:.3f} ({row['difference']:+.3f}, {low:+.3f} .. {high:+.3f}), {row['seconds']} s"


def narrowcast_command(*arguments: str) -> tuple[str, ...]:
    """Runs a cell of narrowcast in this interpreter."""
    return (sys.executable, "-m", "benchmarks.low_bits", "--cell", *arguments)
