"""The score of one model: what `compare` says of each of two, without an interval and at half the cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from narrowcast.data import Pairs, iterate
from narrowcast.errors import DataError, ModelError
from narrowcast.evaluate.answers import answer
from narrowcast.evaluate.judge import judge, takes_model
from narrowcast.evaluate.metrics import METRICS, NAMES, SPEARMAN, per_sample


def score_of(
    model: nn.Module, data: Any, metric: str | Callable[..., Any], *, reference: nn.Module | None = None
) -> float:
    """One metric of one model, in the mode that it is in.

    Args:
        model: to be judged.
        data: as in `nc.compare`.
        metric: a name, `metric(outputs, targets)` or `metric(model)`.
        reference: the model that "agreement" and "difference" are measured from; it is not run for other metrics.

    Raises:
        DataError: data and metric do not fit, or no sample counts.
        ModelError: the model's output is not finite.
    """
    with torch.inference_mode():
        if isinstance(metric, str) and metric not in NAMES:
            raise DataError(f"there is no metric {metric!r}; choose from {', '.join(NAMES)}, or pass a function")
        if not isinstance(metric, str) and takes_model(metric):
            return float(metric(model))
        if isinstance(data, Pairs) or metric == SPEARMAN:
            judged = judge(model, model, data, metric).score
            assert judged is not None
            return judged.candidate
        chosen = METRICS[metric] if isinstance(metric, str) else per_sample(metric)
        if reference is None and metric in ("agreement", "difference"):
            raise DataError(f"{chosen.name} is measured from a reference; pass one")
        sums = weights = 0.0
        for index, batch in enumerate(iterate(data, model)):
            given = answer(batch, model)
            if bool(given.values().isnan().any()):
                raise ModelError(f"batch {index}: the model's output is not a number")
            beside = answer(batch, reference) if metric in ("agreement", "difference") and reference else given
            its_sums, its_weights = chosen.terms(given, beside)
            sums, weights = sums + float(its_sums.sum()), weights + float(its_weights.sum())
    if not weights:
        raise DataError(f"no sample counts for the metric {chosen.name}: every label or token is masked")
    mean = np.asarray(sums / weights)
    return float(mean if chosen.finish is None else chosen.finish(mean))
