"""One pass over the data with both models side by side: the score with its interval, and how far outputs are apart."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import betaincinv
from torch import Tensor, nn

from narrowcast.core import cosine
from narrowcast.data import Batch, Pairs, describe, iterate
from narrowcast.errors import DataError, ModelError
from narrowcast.evaluate.answers import Answer, answer
from narrowcast.evaluate.interval import (
    Estimate,
    Statistic,
    bootstrap,
    expanded_interval,
    paired,
    spearman,
    weighted_mean,
)
from narrowcast.evaluate.metrics import METRICS, NAMES, SPEARMAN, Metric, agreement_terms, built_in, per_sample

Array = NDArray[np.float64]
MetricChoice = str | Callable[..., Any] | None


@dataclass(frozen=True)
class Score:
    """One metric of both models.

    Args:
        name: the metric.
        unit: "share" (0..1) or "number".
        per: what was resampled: "sample", "sequence", "pair", "batch" or "" where no interval could be given.
        higher_is_better: None where only the user knows.
        reference: the reference's score.
        candidate: the candidate's score.
        difference: candidate - reference with its 95 % interval.
        ratio: candidate / reference with its 95 % interval.
        samples: number of what was resampled.
    """

    name: str
    unit: str
    per: str
    higher_is_better: bool | None
    reference: float
    candidate: float
    difference: Estimate
    ratio: Estimate
    samples: int


@dataclass(frozen=True)
class OutputDifference:
    """How far the candidate's outputs are from the reference's, whatever the metric; padding is left out.

    Args:
        sqnr_db: signal to noise ratio over all values, in decibel; infinite when all are equal.
        cosine: mean cosine of the rows (last dimension; the whole sample for outputs of 4 or more dimensions).
        max_absolute: largest absolute difference of any value.
        mean_absolute: mean absolute difference.
        agreement: share of equal top predictions, with its interval; None for embeddings and single values.
        values: number of values compared.
    """

    sqnr_db: float
    cosine: float
    max_absolute: float
    mean_absolute: float
    agreement: Estimate | None
    values: int


@dataclass(frozen=True)
class Judged:
    """The result of one pass.

    Args:
        score: the chosen metric.
        outputs: None where the data is a callable that returns no output.
        first: the first batch, for timing.
        notes: decisions taken.
    """

    score: Score | None
    outputs: OutputDifference | None
    first: Batch
    notes: tuple[str, ...]


def judge(reference: nn.Module, candidate: nn.Module, data: Any, metric: MetricChoice = None) -> Judged:
    """Runs both models over the data once, in lock-step.

    Args:
        reference: the model that is right by definition.
        candidate: the model to judge; it is given the same inputs.
        data: any form of data; `Pairs` for Spearman correlation.
        metric: None, a name, `metric(outputs, targets)` or `metric(model)`.

    Returns:
        Score, output difference, the first batch and notes.

    Raises:
        DataError: unusable data, an unknown metric, or targets that do not fit it.
        ModelError: outputs of different shapes or not finite.
    """
    if isinstance(metric, str) and metric not in NAMES:
        raise DataError(f"there is no metric {metric!r}; choose from {', '.join(NAMES)}, or pass a function")
    notes = describe(data, reference)
    if isinstance(data, Pairs):
        judged = _judge_pairs(reference, candidate, data, metric)
    elif metric == SPEARMAN:
        raise DataError("spearman needs pairs with scores: pass narrowcast.data.Pairs(first, second, scores)")
    else:
        judged = _judge_batches(reference, candidate, data, metric)
    return Judged(judged.score, judged.outputs, judged.first, (*notes, *judged.notes))


class _Meter:
    """Running sums of the output difference; bounded memory."""

    def __init__(self) -> None:
        self.signal = self.noise = self.absolute = self.largest = self.cosines = 0.0
        self.values = self.rows = 0

    def update(self, reference: Tensor, candidate: Tensor) -> None:
        """Adds the values of one batch; both [rows, ...] without padding."""
        a, b = reference.to(torch.float64), candidate.to(torch.float64)
        equal_infinity = ~torch.isfinite(a) & (a == b)
        a, b = a.masked_fill(equal_infinity, 0), b.masked_fill(equal_infinity, 0)
        distance = (a - b).abs()
        self.signal += float(a.square().sum())
        self.noise += float(distance.square().sum())
        self.absolute += float(distance.sum())
        self.largest = max(self.largest, float(distance.max()) if distance.numel() else 0.0)
        self.values += a.numel()
        first, second = _rows(a), _rows(b)
        count = first.numel() // max(1, first.shape[-1])
        self.cosines += cosine(first, second) * count if count else 0.0
        self.rows += count

    def result(self, agreement: Estimate | None) -> OutputDifference:
        """The finished figures."""
        if self.noise == 0:
            sqnr = math.inf
        else:
            sqnr = 10 * math.log10(self.signal / self.noise) if self.signal > 0 else -math.inf
        return OutputDifference(
            sqnr, self.cosines / self.rows, self.largest, self.absolute / self.values, agreement, self.values
        )


def _rows(values: Tensor) -> Tensor:
    """What a cosine is taken of: the last dimension, or the whole sample of 4 and more dimensions."""
    return values.flatten(1) if values.ndim > 3 else values.reshape(1, -1) if values.ndim < 2 else values


def _answers(
    reference: nn.Module, candidate: nn.Module, batches: Iterator[Batch]
) -> Iterator[tuple[int, Answer, Answer]]:
    for index, batch in enumerate(batches):
        first, second = answer(batch, reference), answer(batch, candidate)
        if first.tensor.shape != second.tensor.shape:
            raise ModelError(
                f"batch {index}: the reference's output has the shape {list(first.tensor.shape)}, "
                f"the candidate's {list(second.tensor.shape)}; they are not two versions of one model"
            )
        _check_finite(first, second, index)
        yield index, first, second


def _check_finite(reference: Answer, candidate: Answer, index: int) -> None:
    """NaN is an error, and so is an infinity that the reference does not have (a reference may mask by infinity)."""
    a, b = reference.values(), candidate.values()
    for name, bad in (("reference", a.isnan()), ("candidate", ~b.isfinite() & (a != b))):
        if bool(bad.any()):
            where = bad.nonzero()[0].tolist()
            raise ModelError(f"batch {index}: the {name}'s output is not finite at {where} of {list(bad.shape)}")


def _judge_batches(reference: nn.Module, candidate: nn.Module, data: Any, metric: MetricChoice) -> Judged:
    notes: list[str] = []
    if callable(metric) and takes_model(metric):
        score: Score | None = _score_of_models(reference, candidate, metric)
        notes.append("the metric runs the model by itself, so there are no samples to resample and no interval")
        chosen: Metric | None = None
    else:
        score, chosen = None, None if metric is None or isinstance(metric, str) else per_sample(metric)
        chosen = METRICS[metric] if isinstance(metric, str) else chosen
    batches = iterate(data, reference)
    first = next(batches)
    if first.call is not None:
        if chosen is not None:
            raise DataError(f"the data is a callable, so {chosen.name} gets no samples; pass metric(model) -> float")
        return _judge_call(reference, candidate, first, score, notes)
    meter, terms, same = _Meter(), _Terms(), _Terms()
    for index, left, right in _answers(reference, candidate, _again(first, batches)):
        if index == 0 and chosen is None and score is None:
            name, note = built_in(reference, left)
            chosen = METRICS[name]
            notes.append(note)
        meter.update(left.values(), right.values())
        if chosen is not None:
            terms.add(chosen.terms(left, left), chosen.terms(right, left))
        if _has_choices(left):
            same.add(agreement_terms(right, left))
    if chosen is not None:
        score = terms.score(chosen, first.samples)
        notes += _doubts(score, terms)
    return Judged(score, meter.result(same.share()), first, tuple(notes))


def _again(first: Batch, rest: Iterator[Batch]) -> Iterator[Batch]:
    yield first
    yield from rest


def _judge_call(
    reference: nn.Module, candidate: nn.Module, batch: Batch, score: Score | None, notes: list[str]
) -> Judged:
    """The data runs the model itself: outputs are compared if it returns them."""
    left, right = batch.run(reference), batch.run(candidate)
    if left is None or right is None:
        notes.append("the data is a callable that returns no output, so outputs could not be compared")
        return Judged(score, None, batch, tuple(notes))
    kept = Batch((), {}, None, 1, call=lambda model: left if model is reference else right)
    meter = _Meter()
    for _, a, b in _answers(reference, candidate, iter((kept,))):
        meter.update(a.values(), b.values())
    return Judged(score, meter.result(None), batch, tuple(notes))


def takes_model(metric: Callable[..., Any]) -> bool:
    """Whether a metric has one required parameter, the model, and not two, outputs and targets."""
    parameters = inspect.signature(metric).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = [p for p in parameters if p.kind in kinds and p.default is inspect.Parameter.empty]
    return len(required) == 1


def _score_of_models(reference: nn.Module, candidate: nn.Module, metric: Callable[..., Any]) -> Score:
    first, second = float(metric(reference)), float(metric(candidate))
    name = getattr(metric, "__name__", type(metric).__name__)
    ratio = Estimate(second / first if first else math.nan)
    return Score(name, "number", "", None, first, second, Estimate(second - first), ratio, 0)


def _has_choices(reference: Answer) -> bool:
    """Whether the largest of an output's values is a prediction: not for hidden states and single values."""
    tensor = reference.tensor
    if reference.name in ("last_hidden_state", "sentence_embedding") or tensor.ndim < 2:
        return False
    return tensor.shape[-1 if tensor.ndim < 4 else 1] > 1


class _Terms:
    """What every sample contributed, batch after batch, for one or two models."""

    def __init__(self) -> None:
        self.sums: list[tuple[Array, ...]] = []
        self.weights: list[Array] = []

    def add(self, *terms: tuple[Tensor, Tensor]) -> None:
        """Sums of each model; the weights are those of the first."""
        self.sums.append(tuple(sums.cpu().numpy().astype(np.float64) for sums, _ in terms))
        self.weights.append(terms[0][1].cpu().numpy().astype(np.float64))

    def collected(self) -> tuple[list[Array], Array]:
        """Sums [samples] of each model and weights [samples]; samples that count for nothing are left out."""
        weights = np.concatenate(self.weights)
        sums = [np.concatenate(parts)[weights > 0] for parts in zip(*self.sums, strict=True)]
        return sums, weights[weights > 0]

    def score(self, metric: Metric, batch_samples: int) -> Score:
        """The score of both models."""
        (reference, candidate), weights = self.collected()
        if len(weights) == 0:
            raise DataError(f"no sample counts for the metric {metric.name}: every label or token is masked")
        first = weighted_mean(reference, weights, metric.finish)
        second = weighted_mean(candidate, weights, metric.finish)
        per = "batch" if batch_samples > 1 and len(self.weights[0]) == 1 else metric.per
        return _score(metric.name, metric.unit, per, metric.higher_is_better, (first, second), len(weights))

    def share(self) -> Estimate | None:
        """The quotient with an interval: Clopper and Pearson's for plain counts, else bootstrapped."""
        if not self.weights:
            return None
        (sums,), weights = self.collected()
        value, samples = float(sums.sum() / weights.sum()), len(weights)
        if samples < 2:
            return Estimate(value)
        if np.all(weights == 1):
            hits = sums.sum()
            low = float(betaincinv(hits, samples - hits + 1, 0.025)) if hits > 0 else 0.0
            high = float(betaincinv(hits + 1, samples - hits, 0.975)) if hits < samples else 1.0
            return Estimate(value, low, high)
        drawn = bootstrap([weighted_mean(sums, weights)], samples)
        return Estimate(value, *expanded_interval(drawn[0], samples))


def _score(
    name: str, unit: str, per: str, higher: bool | None, statistics: tuple[Statistic, Statistic], samples: int
) -> Score:
    difference, ratio = paired(*statistics, samples)
    once = np.ones((1, samples))
    values = [float(statistic(once)[0]) for statistic in statistics]
    return Score(name, unit, per, higher, values[0], values[1], difference, ratio, samples)


def _doubts(score: Score, terms: _Terms) -> list[str]:
    """What an interval of width zero does not say."""
    (reference, candidate), _ = terms.collected()
    if score.samples < 2:
        return [f"there is one {score.per}: no interval can be given"]
    if score.name == "top1" and np.array_equal(reference, candidate):
        # the rule of three: with no event in n trials, 3 / n bounds its probability with 95 % confidence
        bound = 100 * min(1.0, 3 / score.samples)
        return [f"no {score.per} was scored differently; with {score.samples} of them up to {bound:.2g} % may be"]
    return []


def _judge_pairs(reference: nn.Module, candidate: nn.Module, data: Pairs, metric: MetricChoice) -> Judged:
    if metric not in (None, SPEARMAN):
        raise DataError("Pairs are judged by Spearman correlation; leave metric out, or pass the samples themselves")
    meter = _Meter()
    first = next(iterate(data.first, reference))
    embeddings = []
    for part in (data.first, data.second):
        rows: list[tuple[Tensor, Tensor]] = []
        for _, left, right in _answers(reference, candidate, iterate(part, reference)):
            rows.append((left.embedding(), right.embedding()))
            meter.update(*rows[-1])
        embeddings.append(tuple(torch.cat(column).to("cpu", torch.float64) for column in zip(*rows, strict=True)))
    scores = np.asarray(data.scores, dtype=np.float64)
    sizes = [len(part[0]) for part in embeddings]
    if not sizes[0] == sizes[1] == len(scores) or not np.all(np.isfinite(scores)):
        raise DataError(
            f"Pairs has {sizes[0]} and {sizes[1]} samples and {len(scores)} scores; give one finite score per pair"
        )
    statistics = [
        spearman(torch.nn.functional.cosine_similarity(a, b).numpy(), scores) for a, b in zip(*embeddings, strict=True)
    ]
    score = _score(SPEARMAN, "number", "pair", True, (statistics[0], statistics[1]), len(scores))
    if not (math.isfinite(score.reference) and math.isfinite(score.candidate)):
        raise DataError("Spearman correlation is undefined: all scores or all similarities are equal")
    return Judged(score, meter.result(None), first, ("metric: Spearman correlation of cosine similarity and score",))
