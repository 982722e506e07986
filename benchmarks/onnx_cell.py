"""One measured file of `python -m benchmarks.onnx`: made, scored, its kernels read back; in a process of its own.

Verbs, each printing one JSON document:

    score MODEL TOOL SAMPLES FILE PYTHON        a row of the table
    make MODEL TOOL FILE                        in the interpreter that has the tool
    answer MODEL TOOL SAMPLES FILE ANSWERS      what a runtime answers, into a .npy file
"""

from __future__ import annotations

import contextlib
import json
import logging
import subprocess
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.low_bits_cells import last_words
from benchmarks.machine import REPOSITORY
from benchmarks.onnx_cases import Case, case
from benchmarks.onnx_tools import FLOAT32, OPENVINO, ORT, session, tool

FOLDER = REPOSITORY / "build" / "benchmarks" / "onnx"


class ToolError(RuntimeError):
    """A tool's process ended with an error; the message is its last words."""


def float32_file(chosen: Case) -> Path:
    """The float32 file of a case, written when it is first asked for."""
    path = FOLDER / "float32" / chosen.name / "float32.onnx"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        chosen.export(path)
    return path


def make(name: str, method: str, path: Path) -> dict[str, Any]:
    """Write one quantized file."""
    chosen, source = case(name), float32_file(case(name))
    feeds = chosen.calibration(*session(source, ORT, 1))
    started = time.perf_counter()
    notes = tool(method).make(chosen, source, feeds, path)
    return {"seconds": round(time.perf_counter() - started, 1), "notes": notes}


def answers(name: str, method: str, samples: str, path: Path) -> Tensor:
    """What the file answers to the evaluation samples."""
    return case(name).outputs(*session(path, tool(method).runtime, 1), samples)


def expected(name: str, samples: str) -> Tensor:
    """What the float32 file answers in ONNX Runtime, computed once per evaluation set."""
    known = FOLDER / "float32" / name / f"{samples}.npy"
    source = float32_file(case(name))
    if not known.exists():
        np.save(known, answers(name, f"{ORT} {FLOAT32}", samples, source).numpy())
    return torch.from_numpy(np.load(known))


def score(name: str, method: str, samples: str, path: Path, python: str) -> dict[str, Any]:
    """One row."""
    chosen = tool(method)
    path.parent.mkdir(parents=True, exist_ok=True)
    made = _elsewhere(python, "make", name, method, str(path)) if chosen.peer else make(name, method, path)
    if chosen.runtime == OPENVINO:
        stored = path.with_suffix(".npy")
        _elsewhere(python, "answer", name, method, samples, str(path), str(stored))
        got = torch.from_numpy(np.load(stored))
        stored.unlink()
        kernels: dict[str, Any] = {}
    else:
        got = answers(name, method, samples, path)
        kernels = kernels_of(path)
    found = case(name).figures(samples, expected(name, samples), got)
    size = sum(file.stat().st_size for file in path.parent.glob(f"{path.stem}.*") if file.suffix != ".npy")
    return {**found, **made, "bytes": size, **kernels, "file": str(path.relative_to(REPOSITORY))}


def kernels_of(path: Path) -> dict[str, Any]:
    """How many products with weights multiply integers in ONNX Runtime's optimized graph, and why the others do not."""
    import onnx_ir as ir

    from narrowcast.models.onnx_verdict import node_verdicts, optimized_graph, other_operators

    graph = optimized_graph(ir.load(path))
    rows = node_verdicts(graph)
    weighted = [row for row in rows if row.bits]
    floats = Counter((row.kernel, row.reason) for row in rows if not row.integer)
    return {
        "integer": sum(row.integer for row in weighted),
        "products": len(weighted),
        "kernels": dict(Counter(row.kernel for row in rows)),
        "floats": [{"kernel": kernel, "count": count, "reason": why} for (kernel, why), count in floats.items()],
        "others": other_operators(graph),
    }


def _elsewhere(python: str, *arguments: str) -> dict[str, Any]:
    command = [python, "-m", "benchmarks.onnx_cell", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False, errors="replace")
    if done.returncode:
        raise ToolError(last_words(done.stderr))
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main(argv: list[str] | None = None) -> int:
    """Prints one JSON document as its last line; whatever a tool prints goes to standard error."""
    verb, name, method, *rest = sys.argv[1:] if argv is None else argv
    warnings.simplefilter("ignore")
    logging.getLogger().setLevel(logging.ERROR)
    with contextlib.redirect_stdout(sys.stderr):
        if verb == "make":
            document = make(name, method, Path(rest[0]))
        elif verb == "answer":
            np.save(rest[2], answers(name, method, rest[0], Path(rest[1])).numpy())
            document = {}
        else:
            document = score(name, method, rest[0], Path(rest[1]), rest[2])
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
