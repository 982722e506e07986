"""`nc.compare`: accuracy with its interval, latency, bytes, memory, load time and energy of two models in one call."""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from narrowcast.data import Batch
from narrowcast.evaluate import energy, latency
from narrowcast.evaluate.comparison import Comparison, Side
from narrowcast.evaluate.disk import file_bytes, state_bytes
from narrowcast.evaluate.judge import MetricChoice, judge
from narrowcast.evaluate.opened import Opened, evaluating, open_side
from narrowcast.evaluate.process import PROCESSES, ProcessMeasure, measure
from narrowcast.evaluate.sources import kind

IN_MEMORY = "the model exists only in this process; pass a path to measure it in a fresh one"
NAMES = ("reference", "candidate")


def compare(
    reference: Any,
    candidate: Any,
    data: Any,
    metric: MetricChoice = None,
    *,
    seconds: float = latency.SECONDS,
    processes: int = PROCESSES,
) -> Comparison:
    """What a candidate gains and loses against a reference, measured on the same data in one run.

    Args:
        reference: an nn.Module, a Quantized, or a model to open: a Hugging Face directory, a narrowcast checkpoint,
            a .pt2 file, `package.module:factory`.
        candidate: the same kinds. A checkpoint of a model that no library knows is loaded into a copy of the
            reference.
        data: evaluation data in any form of `narrowcast.data`; `Pairs` for embeddings.
        metric: "top1", "perplexity", "spearman", "agreement", "difference"; a function `metric(outputs, targets)`
            that gets a model's own output and returns one score per sample; a function `metric(model)` that returns
            a number; None chooses by the data, and says so.
        seconds: time for the latency measurement, and again for energy where there is a counter.
        processes: fresh processes per model for load time and memory; 0 leaves them out.

    Returns:
        The comparison; print it, or take `to_dict()`.

    Raises:
        ModelError: a model cannot be opened, or the two do not answer alike.
        DataError: the data or the metric does not fit.

    Example:
        >>> net = torch.nn.Linear(4, 3)
        >>> result = compare(net, net, [torch.ones(2, 4)], seconds=0.01)
        >>> result.outputs.max_absolute
        0.0
    """
    left = open_side(reference, None, role=NAMES[0])
    right = open_side(candidate, left, role=NAMES[1])
    with evaluating(dict(zip(NAMES, (left.model, right.model), strict=True))) as notes, torch.inference_mode():
        judged = judge(left.model, right.model, data, metric)
        notes += [right.note] if right.note else []
        notes += judged.notes
        runs = {name: _runner(judged.first, side.model) for name, side in zip(NAMES, (left, right), strict=True)}
        timings = latency.interleaved(runs, seconds=seconds)
        counter = energy.Rapl.open()
        joules = energy.interleaved(runs, counter, seconds=seconds) if counter.zones else {}
    if counter.reason:
        notes.append(f"energy: {counter.reason}")
    sides = []
    for name, side in zip(NAMES, (left, right), strict=True):
        size, counted = state_bytes(side.model) if _is_code(side.source) else file_bytes(str(side.source))
        process = _fresh(side, judged.first, processes)
        if process.reason:
            notes.append(f"load time and peak memory of the {name}: {process.reason}")
        sides.append(Side(side.name, size, counted, timings[name], process, joules.get(name)))
    return Comparison(
        reference=sides[0],
        candidate=sides[1],
        score=judged.score,
        outputs=judged.outputs,
        speedup=latency.ratio(timings["reference"], timings["candidate"]),
        batch_samples=judged.first.samples,
        energy_reason=counter.reason,
        machine=machine(),
        notes=tuple(notes),
    )


def _is_code(source: str | None) -> bool:
    """Whether a model has no files of its own: given in memory or made by a factory."""
    return source is None or kind(source) == "factory"


def _runner(batch: Batch, model: nn.Module) -> Callable[[], object]:
    return lambda: batch.run(model)


def _fresh(side: Opened, batch: Batch, processes: int) -> ProcessMeasure:
    if side.source is None:
        return ProcessMeasure(reason=IN_MEMORY)
    if processes < 1:
        return ProcessMeasure(reason="not asked for")
    return measure(side.source, batch, architecture=side.architecture, processes=processes)


def machine() -> dict[str, str]:
    """The processor, threads and torch version that figures come from."""
    name = platform.processor() or platform.machine()
    described = Path("/proc/cpuinfo")
    if described.is_file():
        lines = described.read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return {
        "processor": name,
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
