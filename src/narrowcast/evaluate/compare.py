"""`nc.compare`: accuracy with its interval, latency, bytes, memory, load time and energy of two models in one call."""

from __future__ import annotations

import contextlib
import copy
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from narrowcast.data import Batch
from narrowcast.errors import CheckpointError, ModelError
from narrowcast.evaluate import energy, latency
from narrowcast.evaluate.comparison import Comparison, Side
from narrowcast.evaluate.disk import file_bytes, state_bytes
from narrowcast.evaluate.judge import MetricChoice, judge
from narrowcast.evaluate.process import PROCESSES, ProcessMeasure, measure
from narrowcast.evaluate.sources import kind, open_model

IN_MEMORY = "the model exists only in this process; pass a path to measure it in a fresh one"
NAMES = ("reference", "candidate")


@dataclass(frozen=True)
class _Opened:
    """A model and where it came from; `architecture` is the factory that a fresh process loads a checkpoint into."""

    name: str
    model: nn.Module
    source: str | None
    architecture: str | None = None
    note: str = ""


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
    left = _open(reference, None)
    right = _open(candidate, left)
    with _evaluating(left.model, right.model) as notes, torch.inference_mode():
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


def _open(source: Any, reference: _Opened | None) -> _Opened:
    if isinstance(source, nn.Module):
        return _Opened(type(source).__name__, source, None)
    model = getattr(source, "model", None)
    if isinstance(model, nn.Module):
        return _Opened(f"{type(model).__name__}, quantized", model, None)
    if not isinstance(source, str | Path):
        raise ModelError(
            f"cannot compare {type(source).__name__}; pass an nn.Module, what nc.quantize returned, or a path"
        )
    try:
        return _Opened(str(source), open_model(source), str(source))
    except CheckpointError:
        if reference is None or kind(source) != "checkpoint":
            raise
        copied = open_model(source, copy.deepcopy(reference.model))
        architecture = reference.source if reference.source and kind(reference.source) == "factory" else None
        note = "the candidate's checkpoint holds no architecture: it was loaded into a copy of the reference"
        return _Opened(str(source), copied, str(source), architecture, note)


def _is_code(source: str | None) -> bool:
    """Whether a model has no files of its own: given in memory or made by a factory."""
    return source is None or kind(source) == "factory"


def _runner(batch: Batch, model: nn.Module) -> Callable[[], object]:
    return lambda: batch.run(model)


def _fresh(side: _Opened, batch: Batch, processes: int) -> ProcessMeasure:
    if side.source is None:
        return ProcessMeasure(reason=IN_MEMORY)
    if processes < 1:
        return ProcessMeasure(reason="not asked for")
    return measure(side.source, batch, architecture=side.architecture, processes=processes)


@contextlib.contextmanager
def _evaluating(*models: nn.Module) -> Iterator[list[str]]:
    """Both models in eval mode, put back afterwards; yields notes, with one if a model was in training mode."""
    training = [module for model in models for module in model.modules() if module.training]
    notes = []
    for name, model in zip(NAMES, models, strict=True):
        if any(module.training for module in model.modules()) and not _is_exported(model):
            notes.append(f"the {name} was in training mode and was compared in eval mode")
    for module in training:
        module.training = False
    try:
        yield notes
    finally:
        for module in training:
            module.training = True


def _is_exported(model: nn.Module) -> bool:
    return isinstance(model, torch.fx.GraphModule)


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
