"""ONNX files quantized by every preset and by other tools: score in the runtime itself, size, kernels, latency.

    python -m benchmarks.onnx                                   everything, into benchmarks/results
    python -m benchmarks.onnx --models mobilenetv1 --threads 1
    python -m benchmarks.onnx --quick                           fewer samples and rounds, into build/benchmarks
    python -m benchmarks.onnx --peer-python PATH                NNCF and OpenVINO, installed in another interpreter
    python -m benchmarks.onnx --join A.json B.json              one page of the results of several runs

Models are the kit's, exported by torch's exporter with batch and length left open, and Silero's two published files.
Every tool gets the same float32 file and the same calibration batches, of which none is scored. Kernels are those of
the graph that ONNX Runtime optimizes a file to. All files of one model and shape are timed in one process, interleaved
(A B C A B C ...); a ratio is the median over the rounds of the ratio within a round.

Finished cells are kept in build/benchmarks/onnx, so an interrupted run goes on where it was; --fresh starts over.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import low_bits_cells, onnx_page, results_io
from benchmarks.low_bits_cells import Cell, digest
from benchmarks.machine import REPOSITORY, machine
from benchmarks.onnx_cases import CASES, KIT, case
from benchmarks.onnx_cell import FOLDER
from benchmarks.onnx_tools import NARROWCAST, TOOLS, Tool

Row = dict[str, Any]
SOURCES = ("benchmarks/onnx_c*.py", "benchmarks/onnx_tools.py", "benchmarks/onnx_vad.py", "benchmarks/kit/*.py")
OURS = ("src/narrowcast/**/*.py",)
PACKAGES = ("onnxruntime", "openvino", "nncf")


def versions_of(python: str) -> dict[str, str]:
    """Versions of the runtimes in an interpreter; packages it lacks are left out."""
    code = (
        "import json; from benchmarks.machine import installed_version as v; "
        f"print(json.dumps({{p: v(p) for p in {PACKAGES}}}))"
    )
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    found = json.loads(done.stdout)
    return {package: version for package, version in found.items() if version}


def score_cells(chosen: argparse.Namespace, name: str, versions: dict[str, str]) -> list[Cell]:
    """The scored files of one model."""
    samples = "quick" if chosen.quick else "held_out"
    found = []
    for tool in TOOLS:
        lacking = tool.peer and not {"openvino", "nncf"} <= set(versions)
        if case(name).kind not in tool.kinds or tool.name not in chosen.tools or lacking:
            continue
        ours = tool.tool.startswith(NARROWCAST)
        source = digest((*SOURCES, *(OURS if ours else ())), versions, tool.name)
        path = file_of(name, tool, source)
        command = (sys.executable, "-m", "benchmarks.onnx_cell", "score", name, tool.name, samples, str(path),
                   chosen.peer_python)  # fmt: skip
        found.append(Cell(name, "score", tool.tool, tool.method, samples, command, source))
    return found


def file_of(name: str, tool: Tool, source: str) -> Path:
    """Where a tool's file of a model goes."""
    return FOLDER / "files" / name / f"{tool.name.replace(' ', '-')}-{source}.{tool.ending}"


def timing_cells(chosen: argparse.Namespace, name: str, rows: list[Row]) -> list[Cell]:
    """The timed shapes and thread counts of one model, over all of its files that were made."""
    files = [
        f"{row['tool']} {row['method']}={tool.runtime}={REPOSITORY / row['file']}"
        for row in rows if "file" in row
        for tool in TOOLS if (tool.tool, tool.method) == (row["tool"], row["method"]) and row["method"] != "bf16"
    ]  # fmt: skip
    source = digest(("benchmarks/onnx_timing.py", "benchmarks/timing.py"), files, chosen.rounds, chosen.seconds)
    found = []
    for threads in chosen.threads:
        for shape in case(name).shapes[:1] if chosen.quick else case(name).shapes:
            sides = "x".join(map(str, shape))
            command = (chosen.peer_python, "-m", "benchmarks.onnx_timing", name, sides, str(threads),
                       str(chosen.rounds), str(chosen.seconds), *files)  # fmt: skip
            found.append(Cell(name, f"latency {sides}", "all", f"{threads} threads", sides, command, source))
    return found if files else []


def options(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    python = os.environ.get("NARROWCAST_PEERS_PYTHON", sys.executable)
    names = [tool.name for tool in TOOLS]
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES), help="models to measure")
    parser.add_argument("--tools", nargs="+", choices=names, default=names, metavar="TOOL", help="files to measure")
    parser.add_argument("--threads", nargs="*", type=int, default=[1, 2], help="thread counts; none: no timing")
    parser.add_argument("--rounds", type=int, help="bursts per contender (default: 7, with --quick 2)")
    parser.add_argument("--seconds", type=float, help="least duration of a burst (default: 0.1, with --quick 0.02)")
    parser.add_argument("--quick", action="store_true", help="fewer samples and rounds: does it work at all?")
    parser.add_argument("--peer-python", default=python, help="the other tools' (default: $NARROWCAST_PEERS_PYTHON)")
    parser.add_argument("--fresh", action="store_true", help="measure again what build/benchmarks/onnx has")
    parser.add_argument("--known", action="store_true", help="measure nothing: the page of what is known so far")
    parser.add_argument("--limit-seconds", type=float, help="stop a cell after so long")
    parser.add_argument("--join", nargs="+", type=Path, metavar="JSON", help="measure nothing: join these results")
    parser.add_argument("--out", type=Path, help="folder of the results (default: see above)")
    chosen = parser.parse_args(argv)
    chosen.rounds = chosen.rounds or (2 if chosen.quick else 7)
    chosen.seconds = chosen.seconds or (0.02 if chosen.quick else 0.1)
    return chosen


def joined(paths: list[Path]) -> dict[str, Any]:
    """The results of several runs as one document, each row with its commit; of rows that several have, the last."""
    documents = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    found: dict[str, Any] = {"machine": documents[-1]["machine"], "versions": documents[-1]["versions"]}
    found["skipped"] = list(dict.fromkeys(note for document in documents for note in document["skipped"]))
    for part, keys in (("scores", ("model", "tool", "method")), ("timings", ("model", "format", "method"))):
        rows: dict[tuple[str, ...], Row] = {}
        for document in documents:
            commit = {"commit": document["machine"]["commit"]}
            rows |= {tuple(row[key] for key in keys): commit | row for row in document[part]}
        order = {name: index for index, name in enumerate(CASES)}
        found[part] = sorted(rows.values(), key=lambda row: order[row["model"]])
    commits = dict.fromkeys(row["commit"] for part in ("scores", "timings") for row in found[part])
    found["skipped"].append(f"Rows are from runs at the commits {', '.join(commits)}.")
    return found


def main(argv: list[str] | None = None) -> int:
    """Measures every cell, model by model, and writes the results; 1 when a cell of narrowcast failed."""
    chosen = options(argv)
    description = " ".join((__doc__ or "").split("\n\n")[2].split())
    if chosen.join:
        found = joined(chosen.join)
        page = onnx_page.markdown(found["machine"], found, description)
        results_io.write_results(chosen.out or results_io.folder_of(True), "onnx", found, page)
        return 0
    facts, versions, skipped = machine(), versions_of(chosen.peer_python), []
    available = [*results_io.available([name for name in chosen.models if name in KIT], skipped.append),
                 *(name for name in chosen.models if name not in KIT)]  # fmt: skip
    run = partial(low_bits_cells.run_all, fresh=chosen.fresh, known_only=chosen.known, limit=chosen.limit_seconds,
                  folder=FOLDER / "cells", show=partial(print, flush=True))  # fmt: skip
    scores: list[Row] = []
    timings: list[Row] = []
    wanted = 0
    for name in available:
        cells = score_cells(chosen, name, versions)
        scores += (rows := run(cells))
        timings += run(timing_cells(chosen, name, rows))
        wanted += len(cells)
    if len(scores) < wanted:
        skipped.append(f"{wanted - len(scores)} of {wanted} files are not measured yet and left out.")
    complete = len(scores) == wanted and not chosen.quick and set(chosen.models) == set(CASES)
    folder = chosen.out or results_io.folder_of(complete and len(chosen.tools) == len(TOOLS))
    document = {"machine": facts, "versions": versions, "skipped": skipped, "scores": scores, "timings": timings}
    results_io.write_results(folder, "onnx", document, onnx_page.markdown(facts, document, description))
    return int(not scores or any("failed" in row for row in scores if row["tool"].startswith(NARROWCAST)))


if __name__ == "__main__":
    sys.exit(main())
