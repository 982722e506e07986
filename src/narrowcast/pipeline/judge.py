"""Judging: how far a quantized module is from its float one on a kept sample, and how fast both are."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from narrowcast.core import sqnr_db
from narrowcast.models import Sample
from narrowcast.report import LayerOutcome


@dataclass(frozen=True)
class Verdict:
    """Output SQNR in decibel and median milliseconds of both sides on one input; None where it was not measured."""

    sqnr_db: float | None = None
    float_ms: float | None = None
    quantized_ms: float | None = None


def judge_module(float_module: nn.Module, quantized: nn.Module, sample: Sample | None) -> Verdict:
    """Compare two modules on the sample that calibration kept; nothing is measured without one."""
    if sample is None:
        return Verdict()
    with torch.no_grad():
        return judge_calls(
            lambda: float_module(*sample.args, **sample.kwargs),
            lambda: quantized(*sample.args, **sample.kwargs),
            budget=0.05,
        )


def judge_calls(reference: Callable[[], Any], candidate: Callable[[], Any], *, budget: float) -> Verdict:
    """Output SQNR, and medians of interleaved rounds within about `budget` seconds (at least three rounds)."""
    expected, got = first_tensor(reference()), first_tensor(candidate())
    error = None
    if expected is not None and got is not None and expected.shape == got.shape and expected.is_floating_point():
        error = sqnr_db(expected, got)
    times: tuple[list[float], list[float]] = ([], [])
    started = time.perf_counter()
    while len(times[0]) < 3 or (time.perf_counter() - started < budget and len(times[0]) < 50):
        for call, collected in zip((reference, candidate), times, strict=True):
            begin = time.perf_counter()
            call()
            collected.append((time.perf_counter() - begin) * 1e3)
    return Verdict(error, statistics.median(times[0]), statistics.median(times[1]))


# Medians of a few rounds on a machine that does other things too differ by this much without meaning anything.
_NOISE = 0.95
_SHOWN = 8


def slower_than_float(outcomes: list[LayerOutcome]) -> list[str]:
    """A note that names the layers which lost against their float module on the sample that calibration kept.

    Layers that run inside a network are not judged: alone, as they were timed, they are not what runs.
    """
    slow = [row for row in outcomes if row.speedup is not None and row.speedup < _NOISE]
    slow = [row for row in slow if not row.kernel.startswith("conv_network")]
    if not slow:
        return []
    named = ", ".join(f"{row.layer} ({row.speedup:.2f}x)" for row in slow[:_SHOWN])
    more = f" and {len(slow) - _SHOWN} more" if len(slow) > _SHOWN else ""
    return [f"slower than torch's float module on their sample: {named}{more}; keep them by a rule if that matters"]


def first_tensor(output: Any) -> Tensor | None:
    """The first floating-point tensor of a model's output: logits where they are named, else in order."""
    if isinstance(output, nn.utils.rnn.PackedSequence):
        return output.data
    if isinstance(output, dict) and isinstance(output.get("logits"), Tensor):
        return output["logits"]  # type: ignore[no-any-return]
    leaves = [output] if isinstance(output, Tensor) else torch.utils._pytree.tree_leaves(output)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return tensors[0] if tensors else None
