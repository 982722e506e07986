"""The metric of `narrowcast qat`: which one it is, which way is better, and how its scores are written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from narrowcast.errors import DataError

if TYPE_CHECKING:
    from torch import nn

    from narrowcast.evaluate import Score

GOALS = {"higher": True, "lower": False}


@dataclass(frozen=True)
class MetricInWords:
    """A metric that early stopping can follow.

    Args:
        name: how it is called.
        chosen: a name or function, as `nc.compare` takes it.
        share: whether scores are written in percent.
        higher: whether a higher score is better.
        note: why this one was chosen; "" where the user did.
    """

    name: str
    chosen: str | Callable[..., Any]
    share: bool
    higher: bool
    note: str = ""

    def text(self, score: float) -> str:
        """A score as it is written."""
        return f"{100 * score:.2f} %" if self.share else f"{score:.5g}"

    def change(self, score: Score) -> str:
        """The difference of the quantized model from the float one, with its interval."""
        scale, unit = (100.0, " points") if self.share else (1.0, "")
        value, low, high = score.difference.value, score.difference.low, score.difference.high
        bounds = "" if low is None or high is None else f" [{scale * low:+.4g}, {scale * high:+.4g}]"
        return f"{scale * value:+.4g}{unit}{bounds}"


def choose_metric(metric: str | None, goal: str | None, model: nn.Module, data: Any) -> MetricInWords:
    """The metric that is asked for, or that fits the data.

    Args:
        metric: as typed.
        goal: "higher", "lower" or None.
        model: the float one, in evaluation mode; run on a first batch where nothing is asked for.
        data: to evaluate on.

    Raises:
        DataError: it cannot be read twice, or nothing tells which score is better.
    """
    import torch

    from narrowcast.cli.sources import import_object, is_object
    from narrowcast.data import Pairs, iterate, repeatable
    from narrowcast.evaluate.answers import answer
    from narrowcast.evaluate.metrics import METRICS, NAMES, SPEARMAN, built_in
    from narrowcast.evaluate.score import score_of

    if goal is not None and goal not in GOALS:
        raise DataError(f"--goal {goal!r}: choose from {', '.join(GOALS)}")
    if not repeatable(data):
        raise DataError("--eval-data is a generator, which can be read once; it is evaluated on several times")
    note, chosen = "", import_object(metric) if metric is not None and is_object(metric) else metric
    if chosen is None:
        chosen = SPEARMAN if isinstance(data, Pairs) else None
    if chosen is None:
        with torch.inference_mode():
            first = next(iterate(data, model))
            chosen, note = ("difference", "") if first.call else built_in(model, answer(first, model))
    if isinstance(chosen, str) and chosen not in NAMES:
        raise DataError(f"--metric {chosen!r}: choose from {', '.join(NAMES)}, or give package.module:function")
    if not isinstance(data, Pairs):
        score_of(model, [next(iterate(data, model))], chosen, reference=model)  # whether they fit each other
    if isinstance(chosen, str):
        row = METRICS.get(chosen)
        higher = True if row is None else bool(row.higher_is_better)
        share = row is not None and row.unit == "share"
        return MetricInWords(chosen, chosen, share, higher if goal is None else GOALS[goal], note)
    if goal is None:
        raise DataError(f"--metric {metric}: nothing tells which score is better; add --goal higher or --goal lower")
    return MetricInWords(getattr(chosen, "__name__", str(metric)), chosen, False, GOALS[goal], note)
