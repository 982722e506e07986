"""Latency of all files of one model at one shape, interleaved in one process: `python -m benchmarks.onnx_timing`.

    python -m benchmarks.onnx_timing MODEL SHAPE THREADS ROUNDS SECONDS NAME=RUNTIME=FILE ...     one row as JSON

It runs in the interpreter of the other tools where there is one, so that OpenVINO is timed beside ONNX Runtime; files
that do not load or run are named with the reason.
"""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import installed_version
from benchmarks.onnx_cases import Case, case
from benchmarks.onnx_tools import session
from benchmarks.results_io import load_average
from benchmarks.timing import interleave


def prepare(chosen: Case, shape: tuple[int, ...], runtime: str, path: Path, threads: int) -> Callable[[], object]:
    """The call that answers one batch."""
    infer, names = session(path, runtime, threads)
    call = partial(infer, chosen.example(shape, names))
    call()
    return call


def measure(name: str, shape: tuple[int, ...], threads: int, rounds: int, seconds: float, files: list[str]) -> Any:
    """One row: milliseconds of every file, and what could not run."""
    chosen, calls, skipped = case(name), {}, {}
    torch.set_num_threads(threads)
    for entry in files:
        label, runtime, path = entry.split("=", 2)
        try:
            calls[label] = prepare(chosen, shape, runtime, Path(path), threads)
        except Exception as error:  # a file that does not run is a result
            skipped[label] = f"{type(error).__name__}: {str(error)[:200]}"
    load = load_average()
    timings = interleave(calls, rounds=rounds, seconds=seconds)
    versions = {package: installed_version(package) for package in ("onnxruntime", "openvino", "nncf")}
    return {
        "milliseconds": {key: {"median": t.median, "best": t.best, "rounds": t.rounds} for key, t in timings.items()},
        "load_average": load,
        "skipped": skipped,
        "versions": versions,
    }


def main(argv: list[str] | None = None) -> int:
    """Prints one JSON document as its last line."""
    name, shape, threads, rounds, seconds, *files = sys.argv[1:] if argv is None else argv
    warnings.simplefilter("ignore")
    with contextlib.redirect_stdout(sys.stderr):
        sides = tuple(map(int, shape.split("x")))
        row = measure(name, sides, int(threads), int(rounds), float(seconds), files)
    print(json.dumps(row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
