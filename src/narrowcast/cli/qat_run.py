"""The work of `narrowcast qat` between its options and its output: open, prepare, train, convert, judge."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from narrowcast.cli.console import Output
from narrowcast.cli.datasets import DataOptions
from narrowcast.cli.qat_metric import MetricInWords, choose_metric
from narrowcast.errors import ModelError

if TYPE_CHECKING:
    from torch import nn

    from narrowcast.evaluate import Score
    from narrowcast.pipeline.run import Quantized
    from narrowcast.qat import FitSettings, Fitted
    from narrowcast.qat.order import Order
    from narrowcast.recipe import Recipe

CALIBRATION_SAMPLES = 256


@dataclass(frozen=True)
class Asked:
    """What the command line says.

    Args:
        model, recipe, data, calibration, evaluation, metric, goal, loss: as typed.
        settings: of the training.
        options: of the data.
        evaluation_limit: samples of the evaluation data to use; None uses all.
        state: directory of the state of training.
        resume: whether to go on from it.
    """

    model: str
    recipe: str
    data: str
    calibration: str | None
    evaluation: str | None
    metric: str | None
    goal: str | None
    loss: str | None
    settings: FitSettings
    options: DataOptions
    evaluation_limit: int | None
    state: Path
    resume: bool


@dataclass(frozen=True)
class Opened:
    """What it names, opened.

    Args:
        model: the float one, in evaluation mode.
        recipe: rules.
        data: training data.
        order: of that data.
        calibration: data.
        evaluation: data, or None.
        metric: of the evaluation data, or None.
        loss: the user's function, or None.
        made_from: hashes of what the result depends on.
        found: what is said in the state that training goes on from; None where it begins.
        notes: decisions taken.
    """

    model: nn.Module
    recipe: Recipe
    data: Any
    order: Order
    calibration: Any
    evaluation: Any
    metric: MetricInWords | None
    loss: Callable[..., Any] | None
    made_from: dict[str, str]
    found: dict[str, Any] | None
    notes: list[str]


@dataclass(frozen=True)
class Trained:
    """The result.

    Args:
        quantized: to be saved.
        fitted: what training did.
        score: of the float and the converted model on the evaluation data, or None.
        warnings: what the weights' health says.
    """

    quantized: Quantized
    fitted: Fitted
    score: Score | None
    warnings: list[str]


def open_all(asked: Asked) -> Opened:
    """Open and check everything before the long part.

    Raises:
        NarrowcastError: of the first thing that is wrong.
    """
    from narrowcast.cli.datasets import open_data
    from narrowcast.cli.sources import check_source, import_object, open_model
    from narrowcast.export import source_hash
    from narrowcast.qat.order import Order, digest_of
    from narrowcast.qat.saved import Folder
    from narrowcast.recipe import load_recipe

    rules = load_recipe(asked.recipe)
    if check_source(asked.model) == "checkpoint":
        raise ModelError(
            f"{asked.model} is a narrowcast checkpoint, whose weights are quantized; training starts from the float "
            "model that it was made of"
        )
    model = open_model(asked.model).model
    data = open_data(asked.data, asked.options, model=asked.model)
    order = Order(data, asked.settings.batch_size, asked.settings.seed, model)
    asked.settings.total(order.per_epoch)
    calibration: Any = order.sample(CALIBRATION_SAMPLES)
    notes = [f"calibration: the first {CALIBRATION_SAMPLES} samples that training would see, or all there are"]
    made_from = {
        "model": source_hash(model), "training data": digest_of(data),
        "recipe": hashlib.sha256(json.dumps(rules.to_dict(), sort_keys=True).encode()).hexdigest(),
    }  # fmt: skip
    if asked.calibration is not None:
        calibration = open_data(asked.calibration, replace(asked.options, limit=None), model=asked.model)
        made_from["calibration data"], notes = digest_of(calibration), []
    evaluation = metric = None
    if asked.evaluation is not None:
        limited = replace(asked.options, limit=asked.evaluation_limit)
        evaluation = open_data(asked.evaluation, limited, model=asked.model)
        metric = choose_metric(asked.metric, asked.goal, model, evaluation)
        made_from |= {"evaluation data": digest_of(evaluation), "metric": f"{metric.name} {metric.higher}"}
        notes += [metric.note] if metric.note else []
    loss = None if asked.loss is None else import_object(asked.loss)
    _try_first_batch(model, order, asked.settings, loss)
    found = Folder(asked.state, made_from, asked.settings).check(resume=asked.resume)
    return Opened(model, rules, data, order, calibration, evaluation, metric, loss, made_from, found, notes)


def _try_first_batch(model: nn.Module, order: Order, settings: FitSettings, loss: Callable[..., Any] | None) -> None:
    """Find out before the long part whether the data can be learned from."""
    from narrowcast.data import iterate
    from narrowcast.qat.objective import Objective
    from narrowcast.qat.saved import undisturbed

    with undisturbed():
        first = next(iterate(order.epoch(0), model))
        objective = Objective(
            model, first, teacher=model, distill=settings.distill, temperature=settings.temperature, loss=loss
        )
        objective(model, first, "training data, first batch")


def prepared(opened: Opened, asked: Asked, output: Output) -> nn.Module:
    """The model to train.

    Raises:
        ModelError: the recipe leaves nothing to train.
    """
    import narrowcast as nc
    from narrowcast.qat.state import twins_of

    model = nc.qat.prepare(opened.model, opened.recipe, opened.calibration, progress=output.progress)
    if not any(True for _ in twins_of(model)):
        raise ModelError(
            f"the recipe quantizes no layer of {asked.model}, so there is nothing to train; the report of narrowcast "
            "plan lists every layer and why"
        )
    return model


def train(opened: Opened, asked: Asked, model: nn.Module, tell: Callable[[Any], None]) -> Trained:
    """Train, convert and judge."""
    import torch

    import narrowcast as nc
    from narrowcast.evaluate.judge import judge
    from narrowcast.evaluate.score import score_of

    metric = opened.metric

    def evaluate(now: nn.Module) -> float:
        assert metric is not None
        return score_of(now, opened.evaluation, metric.chosen, reference=opened.model)

    fitted = nc.qat.fit(
        model, opened.data, asked.settings, teacher=opened.model, loss=opened.loss,
        evaluate=None if metric is None else evaluate, higher_is_better=metric is None or metric.higher,
        work=asked.state, resume=asked.resume, made_from=opened.made_from, tell=tell,
    )  # fmt: skip
    quantized = nc.qat.convert(model)
    score = None
    if metric is not None:
        with torch.inference_mode():
            score = judge(opened.model, quantized.model, opened.evaluation, metric.chosen).score
    return Trained(quantized, fitted, score, fitted.health.warnings())
