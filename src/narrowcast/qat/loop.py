"""The built-in training loop: a prepared model in, the same one trained, every step of it resumable bit for bit.

Owns the order of things in a step and what a run has to remember. Does not print: `tell` gets what there is to show.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from narrowcast.core import all_finite
from narrowcast.data import Batch, iterate
from narrowcast.errors import DataError, ModelError
from narrowcast.nn.trained_ranges import WeightRange
from narrowcast.qat.early import Best
from narrowcast.qat.health import Health, health_state, load_health_state_, report
from narrowcast.qat.objective import Loss, Objective
from narrowcast.qat.order import Order
from narrowcast.qat.saved import Folder, Saved, random_state, restore_random_state, undisturbed
from narrowcast.qat.settings import FitSettings
from narrowcast.qat.state import unwrapped

# The report on health looks at the weights so often in a training, so that flips to and fro are seen.
_LOOKS = 40
_CHECKPOINTS = 20
_END = object()


@dataclass(frozen=True)
class Progress:
    """Where training is.

    Args:
        step, steps: done, and of the whole training.
        epoch: the one that is trained in, from 1 on.
        epochs: of the whole training; None where that is not known.
        loss: of the last step; None before the first of a run.
        mean_loss: of the steps since it was last given: where an evaluation is due and at the end; else None.
        rate: learning rate of the last step.
        score: of an evaluation that has just been made, else None.
        best: the best score so far, and its step; None before the first evaluation.
        saved: whether the state has just been written.
    """

    step: int
    steps: int
    epoch: int
    epochs: int | None
    loss: float | None = None
    mean_loss: float | None = None
    rate: float = 0.0
    score: float | None = None
    best: tuple[float, int] | None = None
    saved: bool = False


@dataclass(frozen=True)
class Fitted:
    """What a training did.

    Args:
        steps: done, of all that were planned.
        planned: steps.
        resumed: the step that it went on from; None where it began anew.
        losses: (step, mean loss since the last entry), where an evaluation is due and at the end.
        scores: (step, score) of every evaluation; step 0 is before training.
        best: (score, step) of the state that the model has now; None without evaluation.
        stopped_early: whether patience ended.
        health: of the weights at the end, before a best state was restored.
        notes: decisions taken.
    """

    steps: int
    planned: int
    resumed: int | None
    losses: list[tuple[int, float]]
    scores: list[tuple[int, float]]
    best: tuple[float, int] | None
    stopped_early: bool
    health: Health
    notes: list[str] = field(default_factory=list)


def fit(
    model: nn.Module, data: Any, settings: FitSettings | None = None, *, teacher: nn.Module | None = None,
    loss: Loss | None = None, evaluate: Callable[[nn.Module], float] | None = None, higher_is_better: bool = True,
    work: str | Path | None = None, resume: bool = False, made_from: Mapping[str, str] | None = None,
    tell: Callable[[Progress], None] | None = None,
) -> Fitted:  # fmt: skip
    """Train a prepared model; with evaluations, it ends in its best evaluated state.

    A run that was killed and is resumed gives the same weights bit for bit as one that was not, on the same machine
    with as many threads, where the data's randomness comes from the global generators of torch, numpy and random.

    Args:
        model: of `prepare`; it is trained in place.
        data: training data in any form of `narrowcast.data` that can be read again; next tokens, class labels, or no
            labels where the teacher's answers are all that is learned.
        settings: how; None takes the defaults.
        teacher: the float model, put into evaluation mode; needed where `settings.distill` is not 0.
        loss: (the model's own output, targets) -> scalar, in place of the loss that fits the data.
        evaluate: score of the model in evaluation mode, which is the integer model; called before the first step,
            once an epoch or as `settings` say, and at the end.
        higher_is_better: of that score.
        work: directory for the state of training; None keeps none.
        resume: go on from the state in `work`, if there is one.
        made_from: hashes by name of what the result depends on; a state with others is refused.
        tell: called with the progress after every step.

    Returns:
        What was done. Convert the model with `convert`.

    Raises:
        DataError: the data has no loss, or cannot be read again.
        ModelError: the loss is not finite (the message names the step and the last good state), or the model was not
            prepared.
        CheckpointError: `work` holds another run's state.
    """
    settings = FitSettings() if settings is None else settings
    if settings.distill and teacher is None:
        raise DataError("distill is not 0 and there is no teacher; pass the float model as teacher, or distill=0")
    folder = None if work is None else Folder(work, made_from or {}, settings)
    found = None if folder is None else folder.check(resume=resume)
    unwrapped(model)
    teacher = None if teacher is None else teacher.eval()
    run = _Run(model, data, settings, folder, Best(higher_is_better, settings.patience), evaluate, tell)
    run.begin_(teacher, loss)
    if folder is not None and found is not None:
        run.restore_(folder.read())
        run.notes += folder.changed(found)
    return run.train()


class _Run:
    """One training, from its beginning or from a state."""

    def __init__(
        self, model: nn.Module, data: Any, settings: FitSettings, folder: Folder | None, best: Best,
        evaluate: Callable[[nn.Module], float] | None, tell: Callable[[Progress], None] | None,
    ) -> None:  # fmt: skip
        self.model, self.settings, self.folder, self.best = model, settings, folder, best
        self.evaluate, self.tell = evaluate, tell
        self.order = Order(data, settings.batch_size, settings.seed, model)
        self.total = settings.total(self.order.per_epoch)
        self.freeze = settings.freeze(self.total)
        self.optimizer = settings.make_optimizer(model)
        self.notes = list(self.order.notes)
        self.step = self.epoch = self.taken = 0
        self.resumed: int | None = None
        self.losses: list[tuple[int, float]] = []
        self.scores: list[tuple[int, float]] = []
        self.recent, self.counted = 0.0, 0  # sum and number of losses since the last mean
        self.health: Health | None = None
        self.generators: tuple[Mapping[str, Any], Mapping[str, Tensor]] | None = None
        self.last_loss: float | None = None
        self.rate = settings.lr
        self.written: int | None = None
        epoch = self.order.per_epoch or self.total
        self.evaluate_every = settings.evaluate_every or epoch
        self.checkpoint_every = settings.checkpoint_every or min(epoch, max(1, self.total // _CHECKPOINTS))
        self.look_every = max(1, self.total // _LOOKS)

    def begin_(self, teacher: nn.Module | None, loss: Loss | None) -> None:
        """Find the loss by a first batch."""
        with undisturbed():
            first = next(iterate(self.order.epoch(0), self.model))
            was_training = self.model.training
            self.objective = Objective(
                self.model.eval(), first, teacher=teacher, distill=self.settings.distill,
                temperature=self.settings.temperature, loss=loss,
            )  # fmt: skip
            self.model.train(was_training)
        self.notes += self.objective.notes

    def train(self) -> Fitted:
        """All steps that are left."""
        if self.resumed is None:
            score = self._evaluate()
            self._tell(score, saved=False)
        self.freeze.apply(self.model.train(), self.step)
        while not self._finished():
            self._epoch()
        if self.best.score is not None:
            self.best.restore_(self.model)
        assert self.health is not None
        best = None if self.best.score is None else (self.best.score, self.best.step)
        stopped = self.step < self.total
        return Fitted(
            self.step, self.total, self.resumed, self.losses, self.scores, best, stopped, self.health, self.notes
        )

    def _finished(self) -> bool:
        return self.step >= self.total or self.best.exhausted

    def _epoch(self) -> None:
        """The steps of one epoch that are left, up to the end of training."""
        raw = self.order.epoch(self.epoch, skip=self.taken, ready=self._put_back_generators)
        first = next(raw, _END)
        if first is not _END or not self.taken:  # a state may have been written at the end of an epoch
            for batch in iterate(raw if first is _END else chain([first], raw), self.model):
                self._train_on(batch)
                self._after_step()
                if self._finished():
                    return
        self.epoch, self.taken = self.epoch + 1, 0

    def _put_back_generators(self) -> None:
        if self.generators is not None:
            restore_random_state(*self.generators)
            self.generators = None

    def _train_on(self, batch: Batch) -> None:
        rate = self.settings.rate(self.step, self.total)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate(self.step, self.total, ranges=group["name"] == "ranges")
        if self.step in (self.freeze.batchnorm, self.freeze.ranges):
            self.freeze.apply(self.model, self.step)
        where = f"step {self.step + 1} (epoch {self.epoch + 1}, batch {self.taken + 1})"
        loss = self.objective(self.model, batch, where)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise self._diverged(f"the loss is {value} at {where}")
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.step, self.taken = self.step + 1, self.taken + 1
        self.recent, self.counted = self.recent + value, self.counted + 1
        self.last_loss, self.rate = value, rate

    def _after_step(self) -> None:
        """Look, evaluate and write where it is time for that."""
        due = self.step >= self.total or self.step % self.evaluate_every == 0
        score, mean = (self._evaluate(), self._mean_loss()) if due else (None, None)
        finished = self._finished()
        if finished or self.step % self.look_every == 0:
            with self._diverging():
                self.health = report(self.model)
        saved = self.folder is not None and (finished or self.step % self.checkpoint_every == 0)
        if saved:
            self._write(finished=finished)
        self._tell(score, mean, saved=saved)

    def _tell(self, score: float | None, mean: float | None = None, *, saved: bool) -> None:
        if self.tell is None:
            return
        best = None if self.best.score is None else (self.best.score, self.best.step)
        epochs = self.order.per_epoch and math.ceil(self.total / self.order.per_epoch)
        self.tell(
            Progress(self.step, self.total, self.epoch + 1, epochs, self.last_loss, mean, self.rate, score, best, saved)
        )

    def _evaluate(self) -> float | None:
        if self.evaluate is None:
            return None
        with undisturbed(), self._diverging():
            score = float(self.evaluate(self.model.eval()))
        self.model.train()
        self.scores.append((self.step, score))
        self.best.see(self.model, score, self.step)
        return score

    def _mean_loss(self) -> float:
        mean = self.recent / self.counted
        self.losses.append((self.step, mean))
        self.recent, self.counted = 0.0, 0
        return mean

    def _check_finite(self) -> None:
        bad = next((name for name, p in self.model.named_parameters() if not all_finite(p.detach())), None)
        if bad is not None:
            raise self._diverged(f"{bad} is not finite after step {self.step}")

    @contextmanager
    def _diverging(self) -> Iterator[None]:
        """An error of a model that has taken steps is one of its training."""
        if self.step == 0:
            yield
            return
        self._check_finite()
        try:
            yield
        except ModelError as error:
            raise self._diverged(f"after step {self.step}: {str(error).split(';')[0]}") from error

    def _diverged(self, what: str) -> ModelError:
        good = "no state was written before"
        if self.folder is not None and self.written is not None:
            good = f"the last good state is of step {self.written}, in {self.folder.path.parent}"
        return ModelError(
            f"training has diverged: {what}; {good}. Lower the learning rate ({self.settings.lr:g}) and "
            f"{'resume from there, or ' if self.written else ''}start anew"
        )

    def _write(self, *, finished: bool) -> None:
        assert self.folder is not None
        self._check_finite()
        generators, generator_tensors = random_state()
        state = self.optimizer.state_dict()["state"]
        parts = {
            "model": self.model.state_dict(), "best": self.best.state, "random": generator_tensors,
            "health": health_state(self.model), "followed": _followed(self.model),
            "optimizer": {f"{i}/{k}": v for i, values in state.items() for k, v in values.items()},
        }  # fmt: skip
        optimizer = {key: value for key, value in parts["optimizer"].items() if not isinstance(value, Tensor)}
        tensors = {f"{part}/{k}": v for part, values in parts.items() for k, v in values.items() if k not in optimizer}
        said = {
            "step": self.step, "epoch": self.epoch, "taken": self.taken, "finished": finished,
            "best": self.best.to_dict(), "losses": self.losses,
            "recent": [self.recent, self.counted],
            "scores": self.scores, "random": generators, "optimizer": optimizer,
            "health": None if self.health is None else self.health.to_dict(),
        }  # fmt: skip
        self.folder.write(said, tensors)
        self.written = self.step

    def restore_(self, saved: Saved) -> None:
        """Go on from a state. Changes the model, the optimizer and the generators."""
        said = saved.said
        self.step, self.epoch, self.taken = said["step"], said["epoch"], said["taken"]
        self.resumed = self.written = self.step
        self.recent, self.counted = said["recent"]
        self.model.load_state_dict(saved.part("model"))
        for path, share in saved.part("followed").items():
            _range(self.model, path)._followed = share.to(next(self.model.parameters()).device)
        load_health_state_(self.model, saved.part("health"))
        state: dict[int, dict[str, Any]] = {}
        for key, value in {**saved.part("optimizer"), **said["optimizer"]}.items():
            index, _, name = key.partition("/")
            state.setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state})
        for name in ("score", "step", "since"):
            setattr(self.best, name, said["best"][name])
        self.best.state = saved.part("best")
        self.losses, self.scores = ([tuple(row) for row in said[name]] for name in ("losses", "scores"))
        self.health = None if said["health"] is None else Health.from_dict(said["health"])
        self.generators = said["random"], saved.part("random")


def _followed(model: nn.Module) -> dict[str, Tensor]:
    """What frozen ranges that follow their weights hold on to, by path; a state_dict does not have it."""
    ranges = ((path, module) for path, module in model.named_modules() if isinstance(module, WeightRange))
    return {path: part._followed for path, part in ranges if part._followed is not None}


def _range(model: nn.Module, path: str) -> WeightRange:
    found = model.get_submodule(path)
    assert isinstance(found, WeightRange)
    return found
