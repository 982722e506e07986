"""Load time and peak memory, each in a fresh process, where nothing else has warmed or filled the memory.

The child imports what it needs, notes its memory, opens the model and answers one input. Peak memory is the process's
own high-water mark (VmHWM) where the kernel offers it: `getrusage`'s ru_maxrss survives the fork and exec of the
child, so a large parent would be reported in its place.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from narrowcast.data import Batch
from narrowcast.errors import NarrowcastError
from narrowcast.evaluate.sources import kind, open_into, prepare

PROCESSES = 3
TIMEOUT = 600.0
STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class ProcessMeasure:
    """What a fresh process needed, medians over several; all 0 where `reason` says why nothing was measured.

    Args:
        load_seconds: opening the model, without importing Python modules.
        answer_seconds: from the start of opening to the first answer; equal to `load_seconds` without an input.
        peak_bytes: largest resident memory of the whole process.
        baseline_bytes: resident memory before opening: Python, torch and what the model imports.
        processes: number of processes.
        reason: why not, "" where it was measured.
    """

    load_seconds: float = 0.0
    answer_seconds: float = 0.0
    peak_bytes: int = 0
    baseline_bytes: int = 0
    processes: int = 0
    reason: str = ""


def measure(
    source: str | Path,
    batch: Batch | None = None,
    *,
    architecture: str | None = None,
    processes: int = PROCESSES,
    timeout: float = TIMEOUT,
) -> ProcessMeasure:
    """Opens a model in fresh processes, one after the other.

    Args:
        source: whatever `open_model` takes: a directory, a file or `package.module:factory`.
        batch: the first input to answer, cut to one sample; its parts must be tensors or plain values. None only loads.
        architecture: `package.module:factory` of the model that a checkpoint is loaded into, built on the meta device.
        processes: how many; the figures are medians.
        timeout: seconds after which a process is ended.

    Returns:
        The figures, or the reason why there are none.
    """
    try:
        kind(source)
    except NarrowcastError as error:
        return ProcessMeasure(reason=str(error))
    with tempfile.TemporaryDirectory() as folder:
        job = {"source": str(source), "architecture": architecture, "threads": torch.get_num_threads()}
        if batch is not None:
            reason = _write_input(batch, Path(folder), job)
            if reason:
                return ProcessMeasure(reason=reason)
        (Path(folder) / "job.json").write_text(json.dumps(job), encoding="utf-8")
        results = [_run(Path(folder), timeout) for _ in range(processes)]
    failed = next((result["reason"] for result in results if result["reason"]), "")
    if failed:
        return ProcessMeasure(reason=failed)
    return ProcessMeasure(
        load_seconds=median(result["load_seconds"] for result in results),
        answer_seconds=median(result["answer_seconds"] for result in results),
        peak_bytes=int(median(result["peak_bytes"] for result in results)),
        baseline_bytes=int(median(result["baseline_bytes"] for result in results)),
        processes=processes,
    )


def one_sample(batch: Batch) -> Batch:
    """The first row of a batch's tensors that have a row per sample."""
    if batch.call is not None:
        return batch

    def cut(value: Any) -> Any:
        has_rows = isinstance(value, Tensor) and value.ndim > 0 and len(value) == batch.samples
        return value[:1] if has_rows else value

    kwargs = {name: cut(value) for name, value in batch.kwargs.items()}
    return Batch(tuple(cut(value) for value in batch.args), kwargs, None, 1)


def _write_input(batch: Batch, folder: Path, job: dict[str, Any]) -> str:
    """Writes the input of one sample; returns why it cannot be handed to another process, or ""."""
    if batch.call is not None:
        return "the data is a callable, which cannot be handed to another process"
    single = one_sample(batch)
    parts = {f"args/{i}": part for i, part in enumerate(single.args)}
    parts |= {f"kwargs/{name}": part for name, part in single.kwargs.items()}
    tensors = {name: part.cpu().contiguous().clone() for name, part in parts.items() if isinstance(part, Tensor)}
    plain = {name: part for name, part in parts.items() if name not in tensors}
    if not all(part is None or isinstance(part, bool | int | float) for part in plain.values()):
        return "the input is nested, so it cannot be handed to another process"
    save_file(tensors, folder / "input.safetensors")
    job.update(order=list(parts), plain=plain)
    return ""


def _run(folder: Path, timeout: float) -> dict[str, Any]:
    """One process; the result, or a dictionary with the reason why there is none."""
    paths = [entry or str(Path.cwd()) for entry in sys.path]
    command = [sys.executable, "-c", "from narrowcast.evaluate.process import main; main()", str(folder)]
    result = folder / "result.json"
    result.unlink(missing_ok=True)
    try:
        done = subprocess.run(
            command,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"reason": f"the fresh process was ended after {timeout:g} seconds"}
    if result.is_file():
        measured: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return measured
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return {"reason": f"the fresh process ended with exit status {done.returncode}: {last}"}


def _memory(field: str) -> int:
    """Bytes of VmHWM (peak) or VmRSS (now); ru_maxrss where there is no /proc."""
    if STATUS.is_file():
        for line in STATUS.read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _read_input(folder: Path, job: dict[str, Any]) -> Callable[[torch.nn.Module], Any] | None:
    """The first call, or None where the job only loads."""
    if "order" not in job:
        return None
    parts = {**load_file(folder / "input.safetensors"), **job["plain"]}
    args = tuple(parts[name] for name in job["order"] if name.startswith("args/"))
    kwargs = {name.removeprefix("kwargs/"): parts[name] for name in job["order"] if name.startswith("kwargs/")}
    return lambda model: model(*args, **kwargs)


def _child(folder: Path) -> dict[str, Any]:
    """What the fresh process does."""
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    torch.set_num_threads(job["threads"])
    call = _read_input(folder, job)
    try:
        prepare(job["source"])
        if job["architecture"] is not None:
            prepare(job["architecture"])
        torch.ones(256, 256) @ torch.ones(256, 256)  # starts the thread pool, which every model shares
        baseline = _memory("VmRSS")
        start = time.perf_counter()
        with torch.inference_mode():
            model = open_into(job["source"], job["architecture"])
            loaded = time.perf_counter() - start
            if call is not None:
                call(model)
            answered = time.perf_counter() - start
    except NarrowcastError as error:
        return {"reason": str(error)}
    return asdict(ProcessMeasure(loaded, answered if call else loaded, _memory("VmHWM"), baseline, 1))


def main() -> None:
    """Entry point of the fresh process: its only argument is the job's folder."""
    parser = argparse.ArgumentParser(description="Open the model of a job folder and write what it needed.")
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    (folder / "result.json").write_text(json.dumps(_child(folder)), encoding="utf-8")


if __name__ == "__main__":
    main()
