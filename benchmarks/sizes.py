"""What a checkpoint costs before and until it answers: bytes, load time, first answer, memory, each in a fresh process.

    python -m benchmarks.sizes                           everything, into benchmarks/results
    python -m benchmarks.sizes --models minilm --presets weight-int4
    python -m benchmarks.sizes --quick                   fewer rounds, into build/benchmarks

float32 is loaded the quickest idiomatic way: its safetensors file mapped and put into a module on the meta device, or
copied into an ordinary one where that is quicker; transformers' own loader for MiniLM. narrowcast loads with
nc.load(directory, into=module), the module built the same way.
Processes alternate A B C A B C ...; files are in the page cache for all of them; imports are timed apart.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from argparse import Namespace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks import results_io
from benchmarks.kit import Batch, KitModel, kit_model, run
from benchmarks.machine import REPOSITORY, machine

PRESETS = ("weight-int8", "weight-int4", "dynamic-int8", "dynamic-int4", "static-int8")
FLOAT32 = "float32"
MEASURED = ("import_ms", "load_ms", "first_ms", "resident_mib", "peak_mib")


def folder_bytes(path: Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    return path.stat().st_size if path.is_file() else sum(f.stat().st_size for f in path.rglob("*") if f.is_file())


def write_batch(batch: Batch, path: Path) -> None:
    """Stores one batch; a lone tensor is called "input"."""
    save_file({k: v.contiguous() for k, v in (batch if isinstance(batch, dict) else {"input": batch}).items()}, path)


def answer_of(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """The main output tensor of the model for a batch."""
    answer = run(model, batch)
    return answer if isinstance(answer, torch.Tensor) else answer.last_hidden_state


def save_presets(kit: KitModel, presets: list[str], folder: Path, failed: dict[str, str]) -> dict[str, Path]:
    """Checkpoints of the kit model by preset, each with the answer it must give after loading beside it."""
    import narrowcast as nc

    batch = kit.example(kit.shapes[0])
    write_batch(batch, folder / "batch.safetensors")
    saved = {}
    for preset in presets:
        data = kit.calibration() if preset.startswith("static") else None
        try:
            quantized = nc.quantize(kit.build(), preset, data=data, progress=False)
            nc.save(quantized, folder / preset)
        except Exception as error:  # a benchmark reports whatever a preset raises, and goes on
            failed[preset] = f"{type(error).__name__}: {error}"
            continue
        with torch.inference_mode():
            expected = answer_of(quantized.model, batch)
        save_file({"answer": expected.contiguous()}, folder / f"{preset}.answer.safetensors")
        saved[preset] = folder / preset
    return saved


def fresh_process(kit: KitModel, variant: str, path: Path, options: Namespace) -> dict[str, Any]:
    """Loads a checkpoint and answers once in a process of its own; see benchmarks/first_answer.py."""
    source = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "src"), os.environ.get("PYTHONPATH", "")])
    batch, answer = options.folder / "batch.safetensors", options.folder / f"{variant}.answer.safetensors"
    command = [sys.executable, "-m", "benchmarks.first_answer", kit.name, str(path), str(batch), str(answer)]
    done = subprocess.run(
        [*command, "--threads", str(options.threads)],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": source},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "the process died")
    measured: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return measured


def interleaved_runs(
    kit: KitModel, paths: dict[str, Path], options: Namespace, failed: dict[str, str]
) -> dict[str, list[dict[str, Any]]]:
    """Fresh processes for all checkpoints in turn, `options.rounds` times; one that fails is named in `failed`."""
    runs: dict[str, list[dict[str, Any]]] = {variant: [] for variant in paths}
    for variant in list(paths) * options.rounds:
        if variant in failed:
            continue
        try:
            runs[variant].append(fresh_process(kit, variant, paths[variant], options))
        except RuntimeError as error:
            failed[variant] = str(error)
    return runs


def measure_model(name: str, options: Namespace) -> list[dict[str, Any]]:
    """Rows of one kit model: float32 and every preset, processes interleaved."""
    kit = kit_model(name)
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as temporary:
        options.folder = Path(temporary)
        paths = {FLOAT32: kit.weights(), **save_presets(kit, options.presets, options.folder, failed)}
        runs = interleaved_runs(kit, paths, options, failed)
        sizes = {variant: folder_bytes(path) for variant, path in paths.items()}
    rows = []
    for variant in dict.fromkeys([*paths, *failed]):
        row = row_of(name, variant, sizes.get(variant), runs.get(variant, []))
        rows.append(row | {"failed": failed.get(variant)})
    return compared(rows)


def row_of(model: str, variant: str, size: int | None, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the fresh processes of one checkpoint."""
    row: dict[str, Any] = {"model": model, "variant": variant, "bytes": size}
    for name in MEASURED if runs else ():
        row[name] = round(median(run[name] for run in runs), 3)
    if runs and variant != FLOAT32:
        row["identical_answer"] = all(run["identical_answer"] for run in runs)
    row["runs"] = runs
    return row


def compared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with bytes in percent of float32, and whether load plus first answer is quicker than float32's."""
    base = rows[0]
    for row in rows[1:]:
        if row["failed"] is None and base["failed"] is None:
            row["percent"] = round(100.0 * row["bytes"] / base["bytes"], 2)
            row["ready_speedup"] = round((base["load_ms"] + base["first_ms"]) / (row["load_ms"] + row["first_ms"]), 3)
            row["met"] = row["ready_speedup"] > 1.0
    return rows


HEADER = ("model", "checkpoint", "bytes", "% of float32", "import ms", "load ms", "first answer ms")
HEADER += ("resident MiB", "peak MiB", "ready, times faster", "answer identical after loading")


def cells(row: dict[str, Any]) -> list[object]:
    """The cells of one table row, in the order of HEADER."""
    if row["failed"]:
        return [row["model"], row["variant"], f"failed: {row['failed']}", *([None] * (len(HEADER) - 3))]
    return [
        *(row["model"], row["variant"], f"{row['bytes']:,}", results_io.rounded(row.get("percent"), 1)),
        *(results_io.rounded(row[name], 1) for name in MEASURED),
        results_io.rounded(row.get("ready_speedup"), 2),
        {True: "yes", False: "**no**"}.get(row.get("identical_answer")),
    ]


def markdown(facts: dict[str, Any], rows: list[dict[str, Any]], skipped: list[str]) -> str:
    """The Markdown page of a run."""
    judged = [row for row in rows if "met" in row]
    notes = [
        "Medians over fresh processes, one batch of the smallest natural shape. Resident and peak memory are what "
        "loading and answering add to the process after its imports. `ready` is load plus first answer, float32 / "
        "narrowcast.",
        f"Ready faster than float32: {sum(row['met'] for row in judged)} of {len(judged)}.",
        *skipped,
    ]
    return results_io.page("Sizes and loading", facts, [results_io.table(HEADER, map(cells, rows)), *notes])


def options(argv: list[str] | None) -> Namespace:
    """The command line."""
    parser = results_io.arguments(__doc__ or "", PRESETS)
    parser.add_argument("--rounds", type=int, help="fresh processes per checkpoint (default: 7, with --quick 1)")
    parser.add_argument("--threads", type=int, default=2, help="threads in those processes (default: 2)")
    parser.add_argument("--strict", action="store_true", help="exit with 1 when a checkpoint is slower than float32")
    chosen = parser.parse_args(argv)
    chosen.rounds = chosen.rounds or (1 if chosen.quick else 7)
    return chosen


def main(argv: list[str] | None = None) -> int:
    """Measures, writes the results, and returns 1 when a checkpoint failed (or, with --strict, was slower)."""
    chosen = options(argv)
    torch.set_num_threads(chosen.threads)
    facts, skipped, rows = machine(), [], []
    for name in results_io.available(chosen.models, skipped.append):
        measured = measure_model(name, chosen)
        for row in measured:
            print("  ".join(str(cell) for cell in cells(row) if cell is not None), flush=True)
        rows += measured
    document = {"machine": facts, "rounds": chosen.rounds, "threads": chosen.threads, "skipped": skipped, "rows": rows}
    folder = results_io.output_folder(chosen, PRESETS)
    results_io.write_results(folder, "sizes", document, markdown(facts, rows, skipped))
    failed = any(row["failed"] or row.get("identical_answer") is False for row in rows) or not rows
    slower = any(not row.get("met", True) for row in rows)
    return int(failed or (chosen.strict and slower))


if __name__ == "__main__":
    sys.exit(main())
