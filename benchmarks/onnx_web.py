"""What WebAssembly gives: ONNX files in onnxruntime-web under Node.js, answers beside the CPU's and CPU time per run.

    python -m benchmarks.onnx_web                              npm installs onnxruntime-web for the time
    python -m benchmarks.onnx_web --runtime-from FOLDER        an installed one (default: $NARROWCAST_ONNXRUNTIME_WEB)
    python -m benchmarks.onnx_web --models resnet20 --quick    few rounds, into build/benchmarks

Every model is quantized as an ONNX file by the preset that is named, on its first batch of calibration data. Both files
answer the same inputs (images, texts) in WebAssembly and in ONNX Runtime on the CPU. Times are CPU times of the process
per run, one thread, a batch of one, float32 and quantized interleaved; the median of the rounds stands with the least
and the most. Chromium was not used: pages are tested there, not timed.

Without Node.js or onnxruntime-web nothing is measured, and the reason is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import onnx_cell, results_io
from benchmarks.accuracy import sqnr_db
from benchmarks.kit import Batch, KitModel, kit_model
from benchmarks.machine import REPOSITORY, commit, machine
from benchmarks.onnx_algorithms import calibration
from benchmarks.onnx_cases import case
from benchmarks.onnx_tools import ORT, session
from benchmarks.peers_low_bits import onnx_graph
from narrowcast.errors import KernelError
from narrowcast.export.web_runtime import runtime_files

Row = dict[str, Any]
SCRIPT = Path(__file__).with_suffix(".mjs")
FOLDER = REPOSITORY / "build" / "benchmarks" / "onnx_web"
INSTALLED = "NARROWCAST_ONNXRUNTIME_WEB"


@dataclass(frozen=True)
class Question:
    """What one model is asked.

    Attributes:
        preset: it is quantized by.
        inputs: how many inputs of one row it answers.
        tokens: of a text; 0 for images.
    """

    preset: str
    inputs: int
    tokens: int = 0


MODELS = {
    "mobilenetv1": Question("static-int8", 32),
    "resnet20": Question("static-int8", 32),
    "squeezenet11": Question("static-int8", 4),
    "textgenrnn": Question("dynamic-int8", 8, 40),
    "minilm": Question("dynamic-int8", 2, 32),
}
HEADER = ("model and preset", "float32 MB", "quantized MB", "quantized to the CPU's, dB", "float32 to the CPU's, dB",
          "equal top-1", "float32 ms", "quantized ms", "times float32", "commit")  # fmt: skip


class NodeError(RuntimeError):
    """Node.js ended with an error; the message is its last words."""


def inputs_of(kit: KitModel, question: Question, names: list[str]) -> list[dict[str, NDArray[Any]]]:
    """Inputs of one row each, real ones."""
    shape = (question.inputs, question.tokens) if question.tokens else (question.inputs,)
    batch: Batch = kit.example(shape)
    feeds = onnx_graph.feeds(names, batch)
    return [{name: array[index : index + 1] for name, array in feeds.items()} for index in range(question.inputs)]


def files_of(kit: KitModel, preset: str) -> dict[str, Path]:
    """The float32 file and the quantized one."""
    import narrowcast as nc

    float32 = onnx_cell.float32_file(case(kit.name))
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / f"{kit.name}-{preset}.onnx"
    nc.save(nc.quantize(float32, preset, calibration(kit)[:1], progress=False), path)
    return {"float32": float32, "quantized": path}


def in_node(runtime: Path, files: dict[str, Path], batches: list[Any], output: str, rounds: int, burst: float) -> Any:
    """What the script answers."""
    request = {
        "runtime": str(runtime.absolute()), "output": output, "rounds": rounds, "milliseconds": burst,
        "models": {name: str(path) for name, path in files.items()},
        "batches": [{name: plain(array) for name, array in feeds.items()} for feeds in batches],
    }  # fmt: skip
    node = shutil.which("node") or "node"
    done = subprocess.run([node, str(SCRIPT)], input=json.dumps(request), capture_output=True, text=True, check=False)
    if done.returncode:
        raise NodeError(" ".join(done.stderr.split())[-500:])
    return json.loads(done.stdout)


def plain(array: NDArray[Any]) -> dict[str, Any]:
    """An array as the script reads it."""
    return {"type": str(array.dtype), "data": array.reshape(-1).tolist(), "dims": list(array.shape)}


def measure(name: str, runtime: Path, version: str, *, quick: bool) -> Row:
    """One row."""
    kit, question = kit_model(name), MODELS[name]
    row: Row = {"model": name, "preset": question.preset, "commit": commit(), "onnxruntime-web": version,
                "load": results_io.load_average()}  # fmt: skip
    files = files_of(kit, question.preset)
    infer = {key: session(path, ORT, 1) for key, path in files.items()}
    batches = inputs_of(kit, question, infer["float32"][1])[: 2 if quick else None]
    output = _first_output(files["float32"])
    got = in_node(runtime, files, batches, output, 2 if quick else 7, 20.0 if quick else 300.0)
    row |= {"inputs": len(batches), "bytes": {key: path.stat().st_size for key, path in files.items()}}
    for key, answer in got.items():
        if "error" in answer:
            return row | {"failed": f"{key}: {answer['error']}"}
        web = torch.tensor(np.array(answer["answers"], np.float64).reshape(len(batches), -1))
        cpu = torch.tensor(np.stack([infer[key][0](feeds)[0].reshape(-1) for feeds in batches]).astype(np.float64))
        row[key] = {"sqnr_db": sqnr_db(cpu, web), "cpu_ms": answer["cpu"],
                    "equal_top1": int((cpu.argmax(1) == web.argmax(1)).sum())}  # fmt: skip
    return row


def _first_output(path: Path) -> str:
    import onnx

    return str(onnx.load(path, load_external_data=False).graph.output[0].name)


def markdown(facts: dict[str, Any], document: dict[str, Any]) -> str:
    """The page."""
    description = " ".join((__doc__ or "").split("\n\n")[2].split())
    rows = document["rows"]
    versions = ", ".join(dict.fromkeys(row["onnxruntime-web"] for row in rows))
    loads = ", ".join(f"{row['model']} {row['load']:g}" for row in rows)
    sections = [f"{description}\n\nonnxruntime-web {versions}. Load average at each: {loads}.",
                results_io.table(HEADER, map(_cells, rows))]  # fmt: skip
    if document["skipped"]:
        sections.append("\n".join(f"- {note}" for note in document["skipped"]))
    return results_io.page("ONNX files in WebAssembly", facts, sections)


def _cells(row: Row) -> list[Any]:
    name = f"{row['model']}, {row['preset']}"
    if "failed" in row:
        return [name, row["failed"], *[None] * (len(HEADER) - 3), row["commit"][:8]]
    times = {key: row[key]["cpu_ms"] for key in ("float32", "quantized")}
    ratio = median(theirs / mine for theirs, mine in zip(times["float32"], times["quantized"], strict=True))
    # outputs per token have no classes
    equal = "" if row["model"] == "minilm" else f"{row['quantized']['equal_top1']} of {row['inputs']}"
    return [
        name,
        *(f"{row['bytes'][key] / 1e6:.2f}" for key in times),
        *(_decibels(row[key]["sqnr_db"]) for key in ("quantized", "float32")),
        equal,
        *(f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})" for values in times.values()),
        f"{ratio:.2f}",
        row["commit"][:8],
    ]


def _decibels(value: float) -> str:
    return "equal" if value == float("inf") else f"{value:.1f}"


def main(argv: list[str] | None = None) -> int:
    """Measures, and writes the results; 1 where nothing could be measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--runtime-from", type=Path, default=os.environ.get(INSTALLED), help="an installed package")
    parser.add_argument("--quick", action="store_true", help="few rounds: does it work at all?")
    parser.add_argument("--out", type=Path, help="folder of the results (default: see above)")
    chosen = parser.parse_args(argv)
    if shutil.which("node") is None:
        print("nothing is measured: Node.js is not installed")
        return 1
    facts, skipped = machine(), []
    names = results_io.available(chosen.models, skipped.append)
    try:
        with runtime_files(chosen.runtime_from and Path(chosen.runtime_from)) as runtime:
            version = json.loads((runtime.parent / "package.json").read_text(encoding="utf-8"))["version"]
            rows = [measure(name, runtime, version, quick=chosen.quick) for name in names]
    except KernelError as error:
        print(f"nothing is measured: {error}")
        return 1
    complete = set(names) == set(MODELS) and not chosen.quick
    document = {"machine": facts, "skipped": skipped, "rows": rows}
    folder = chosen.out or results_io.folder_of(complete)
    results_io.write_results(folder, "onnx_web", document, markdown(facts, document))
    return int(not rows or any("failed" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
