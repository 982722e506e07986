"""Where results go and how they look: one JSON document and one Markdown page per benchmark.

A complete run writes to benchmarks/results, which is committed. A partial one (--quick, --models, --presets) writes to
build/benchmarks, which is not, so a committed result is never half a run.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.kit import KIT_NAMES, MissingDataError, kit_model
from benchmarks.machine import REPOSITORY, machine_sentence

Row = dict[str, Any]


def arguments(description: str, presets: Sequence[str]) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=KIT_NAMES, default=list(KIT_NAMES), help="kit models to measure")
    parser.add_argument("--presets", nargs="+", choices=presets, default=list(presets), help="presets to measure")
    parser.add_argument("--quick", action="store_true", help="fewer samples and rounds: does it work at all?")
    parser.add_argument("--out", type=Path, help="folder of the results (default: see above)")
    return parser


def output_folder(options: argparse.Namespace, presets: Sequence[str]) -> Path:
    """The folder the options ask for; the committed one only for a complete run."""
    if options.out:
        return Path(options.out)
    complete = not options.quick and set(options.models) == set(KIT_NAMES) and set(options.presets) == set(presets)
    return folder_of(complete)


def folder_of(complete: bool) -> Path:
    """benchmarks/results for a complete run, build/benchmarks for any other."""
    return REPOSITORY / ("benchmarks/results" if complete else "build/benchmarks")


def available(names: Iterable[str], note: Callable[[str], None]) -> list[str]:
    """The kit models whose data is on this machine; the others are reported through `note`."""
    reasons = {name: _missing(name) for name in names}
    for name, reason in reasons.items():
        if reason:
            note(f"{name}: skipped, {reason}")
    return [name for name, reason in reasons.items() if not reason]


def _missing(name: str) -> str | None:
    try:
        kit = kit_model(name)
        kit.weights()
        kit.example(kit.shapes[0])
    except (MissingDataError, ImportError) as missing:
        return str(missing)
    return None


def load_average() -> float:
    """How many processes wanted a core over the last minute: a measurement beside others is worth less."""
    return round(os.getloadavg()[0], 2)


def write_results(folder: Path, name: str, document: dict[str, Any], page: str) -> None:
    """Writes NAME.json and NAME.md and says where."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text(page, encoding="utf-8")
    print(f"wrote {folder / name}.json and .md")


def rows_of(folder: Path, name: str) -> list[Row]:
    """The rows of an earlier NAME.json; none where there is no such file."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []


def page(title: str, facts: dict[str, Any], sections: Sequence[str]) -> str:
    """A Markdown page: title, the machine, the sections."""
    return "\n\n".join([f"# {title}", machine_sentence(facts), *sections]) + "\n"


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; None is an empty cell."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join("" if cell is None else str(cell) for cell in line) + " |" for line in lines)


def rounded(value: float | None, digits: int) -> str | None:
    """A number with that many decimals; nothing for None."""
    return None if value is None else f"{value:.{digits}f}"
