"""One model through several presets: quantize, save, load, compare; every step by the public API."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import narrowcast as nc
from narrowcast.demo import digits, encoder

DIGITS_PRESETS = ("static-int8", "dynamic-int8", "weight-int8", "weight-int4")
ENCODER_PRESETS = ("dynamic-int8", "weight-int8", "dynamic-int4")
LOADS = 3
SECONDS = 1.5


@dataclass(frozen=True)
class Subject:
    """A float model and all that judging its quantized versions needs.

    Args:
        name: for the table.
        model: float32, eval mode.
        weights: its weights on disk.
        load: reads them the usual way.
        into: makes the architecture that a checkpoint is loaded into, without memory; None where the checkpoint knows.
        calibration: data for the presets; None where they do without, which is quicker.
        evaluation: data that calibration has not seen.
        metric: of `nc.compare`.
        presets: recipes to show.
    """

    name: str
    model: nn.Module
    weights: Path
    load: Callable[[], nn.Module]
    into: Callable[[], nn.Module] | None
    calibration: Any
    evaluation: Any
    metric: str
    presets: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """One line of the demo's table.

    Args:
        model: name of the subject.
        preset: "float32" or the recipe.
        bytes: weights on disk.
        load_ms: median time of opening them, in this process.
        latency_ms: median time of one batch, measured in turns with float32.
        speedup: float32 time / this time, (median, lower, upper quartile of the rounds); None for float32.
        score: the metric.
        difference: score - float32's, (value, low, high), 95 % interval; None for float32.
        fidelity: mean cosine between the outputs and float32's; None for float32.
        batch: samples per batch of the latency.
        float_ms: float32's latency in the same turns; None for float32.
    """

    model: str
    preset: str
    bytes: int
    load_ms: float
    latency_ms: float
    speedup: tuple[float, float, float] | None
    score: float
    difference: tuple[float, float | None, float | None] | None
    fidelity: float | None
    batch: int
    float_ms: float | None


def digits_subject(folder: Path) -> Subject:
    """The digits network, trained now.

    Args:
        folder: where its float weights are written.
    """
    data = digits.load_digits()
    model = digits.train(data)
    weights = folder / "digits.safetensors"
    save_file(model.state_dict(), weights)

    def architecture() -> nn.Module:
        with torch.device("meta"):
            return digits.DigitsNet()

    def load() -> nn.Module:
        loaded = architecture()
        loaded.load_state_dict(load_file(weights), assign=True)
        return loaded.eval()

    calibration = [data.train[0][rows : rows + 64] for rows in range(0, 512, 64)]
    test = list(zip(data.test[0].split(64), data.test[1].split(64), strict=True))
    return Subject("digits CNN", model, weights, load, architecture, calibration, test, "top1", DIGITS_PRESETS)


def encoder_subject(directory: Path) -> Subject:
    """The sentence encoder in `directory`."""
    return Subject(
        "all-MiniLM-L6-v2",
        encoder.load_encoder(directory),
        directory / "model.safetensors",
        lambda: encoder.load_encoder(directory),
        None,
        None,
        encoder.pairs(directory),
        "spearman",
        ENCODER_PRESETS,
    )


def tell(subject: Subject, folder: Path) -> Iterator[list[Row]]:
    """The rows of one model, preset after preset; the float32 row stands before that of the first.

    Args:
        subject: the model.
        folder: where checkpoints are written.
    """
    for index, preset in enumerate(subject.presets):
        result = nc.quantize(subject.model, preset, subject.calibration, progress=False)
        target = folder / f"{subject.name}-{preset}"
        nc.save(result, target)

        def load(target: Path = target) -> nn.Module:
            return nc.load(target, into=None if subject.into is None else subject.into())

        comparison = nc.compare(subject.model, load(), subject.evaluation, subject.metric, seconds=SECONDS, processes=0)
        rows = [_float_row(subject, comparison)] if index == 0 else []
        yield [*rows, _row(subject, preset, comparison, target / "model.safetensors", _load_ms(load))]


def _load_ms(load: Callable[[], object]) -> float:
    """Median milliseconds of opening a model whose file lies in the system's cache."""
    times = []
    for _ in range(LOADS):
        start = time.perf_counter()
        load()
        times.append(time.perf_counter() - start)
    return 1e3 * median(times)


def _float_row(subject: Subject, comparison: nc.Comparison) -> Row:
    assert comparison.score is not None
    return Row(
        subject.name,
        "float32",
        subject.weights.stat().st_size,
        _load_ms(subject.load),
        1e3 * comparison.reference.latency.seconds,
        None,
        comparison.score.reference,
        None,
        None,
        comparison.batch_samples,
        None,
    )


def _row(subject: Subject, preset: str, comparison: nc.Comparison, weights: Path, load_ms: float) -> Row:
    score, outputs, speed = comparison.score, comparison.outputs, comparison.speedup
    assert score is not None and outputs is not None
    return Row(
        subject.name,
        preset,
        weights.stat().st_size,
        load_ms,
        1e3 * comparison.candidate.latency.seconds,
        (speed.value, speed.lower_quartile, speed.upper_quartile),
        score.candidate,
        (score.difference.value, score.difference.low, score.difference.high),
        outputs.cosine,
        comparison.batch_samples,
        1e3 * comparison.reference.latency.seconds,
    )
