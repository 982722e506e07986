"""ONNX files quantized by every preset and by other tools: score in the runtime itself, size, kernels, latency.

    python -m benchmarks.onnx                                   everything, into benchmarks/results
    python -m benchmarks.onnx --models mobilenetv1 --threads 1
    python -m benchmarks.onnx --quick                           fewer samples and rounds, into build/benchmarks
    python -m benchmarks.onnx --peer-python PATH                NNCF and OpenVINO, installed in another interpreter
    python -m benchmarks.onnx --models minilm --keep            one model into benchmarks/results, beside what is there
    python -m benchmarks.onnx --join A.json B.json              one page of the results of several runs

Models are the kit's, exported by torch's exporter with batch and length left open, and Silero's two published files.
Every tool gets the same float32 file and the same calibration batches, of which none is scored. Kernels are those of
the graph that ONNX Runtime optimizes a file to. All files of one model and shape are timed in one process, interleaved
(A B C A B C ...); a ratio is the median over the rounds of the ratio within a round.

Finished cells are kept in build/benchmarks/onnx, so an interrupted run goes on where it was; --fresh starts over. With
--keep the result file keeps its rows of what the run did not measure, each with its commit; ONNX Runtime's float32 and
own int8 files are made and timed with whatever else is timed (--threads without a number: nothing is). --limit-seconds
stops a cell, which is a row.
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

from benchmarks import low_bits_cells, onnx_join, onnx_page, results_io
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
    parser.add_argument("--keep", action="store_true", help="rows of the committed file where the run has none")
    parser.add_argument("--limit-seconds", type=float, help="stop a cell after so long")
    parser.add_argument("--join", nargs="+", type=Path, metavar="JSON", help="measure nothing: join these results")
    parser.add_argument("--out", type=Path, help="folder of the results (default: see above)")
    chosen = parser.parse_args(argv)
    chosen.rounds = chosen.rounds or (2 if chosen.quick else 7)
    chosen.seconds = chosen.seconds or (0.02 if chosen.quick else 0.1)
    if chosen.keep:
        if chosen.quick:
            parser.error("--keep writes into the committed results, which have no row of --quick")
        anchors = onnx_join.ANCHORS if chosen.threads else ()
        chosen.tools = [name for name in names if name in {*chosen.tools, *anchors}]
    return chosen


def too_many_threads(chosen: argparse.Namespace) -> list[str]:
    """Leaves out thread counts for which this process has no cores; what the page says of them."""
    cores = len(os.sched_getaffinity(0))
    left_out = [threads for threads in chosen.threads if threads > cores]
    chosen.threads = [threads for threads in chosen.threads if threads <= cores]
    return [f"{threads} threads: the process had {cores} cores." for threads in left_out]


def write(documents: list[dict[str, Any]], folder: Path | None) -> None:
    """The page of one run, or of several joined, oldest first."""
    document = onnx_join.joined(documents) if len(documents) > 1 else documents[0]
    description = " ".join((__doc__ or "").split("\n\n")[2].split())
    page = onnx_page.markdown(document["machine"], document, description)
    results_io.write_results(folder or results_io.folder_of(True), "onnx", document, page)


def main(argv: list[str] | None = None) -> int:
    """Measures every cell, model by model, and writes the results; 1 when a cell of narrowcast failed."""
    chosen = options(argv)
    if chosen.join:
        write([json.loads(path.read_text(encoding="utf-8")) for path in chosen.join], chosen.out)
        return 0
    facts, versions, skipped = machine(), versions_of(chosen.peer_python), too_many_threads(chosen)
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
    complete &= len(chosen.tools) == len(TOOLS)
    document = {"machine": facts, "versions": versions, "skipped": skipped, "scores": scores, "timings": timings}
    committed = results_io.folder_of(True) / "onnx.json"
    earlier = [json.loads(committed.read_text(encoding="utf-8"))] if chosen.keep and committed.is_file() else []
    write([*earlier, document], chosen.out or results_io.folder_of(complete or chosen.keep))
    return int(not scores or any("failed" in row for row in scores if row["tool"].startswith(NARROWCAST)))


if __name__ == "__main__":
    sys.exit(main())
