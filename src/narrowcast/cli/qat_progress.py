"""How `narrowcast qat` shows where training is: a bar on a terminal, lines elsewhere, nothing when not wanted."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from narrowcast.cli.console import Output

if TYPE_CHECKING:
    from narrowcast.cli.qat_metric import MetricInWords
    from narrowcast.qat import Progress as Step

_BETWEEN_LINES = 10.0  # seconds


class TrainingProgress:
    """Shows steps as they are done; evaluations stand in lines of their own.

    Args:
        output: where to; nothing is shown under `--quiet` and `--json`.
        metric: how scores are written.
        resumed: the step of the state that training goes on from, or None.

    Attributes:
        last_saved: the step of the last state that was written, or None.
    """

    def __init__(self, output: Output, metric: MetricInWords | None, resumed: int | None) -> None:
        self.output, self.metric, self.bar = output, metric, None
        self.started = self.printed = time.monotonic()
        self.first: int | None = None
        self.task = TaskID(0)
        self.last_saved = resumed
        if output.progress and output.notes.is_terminal:
            columns = (TextColumn("training"), BarColumn(), TextColumn("{task.description}"))
            self.bar = Progress(*columns, console=output.notes, transient=True)

    def __enter__(self) -> TrainingProgress:
        if self.bar is not None:
            self.bar.start()
            self.task = self.bar.add_task("getting ready", total=None)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.stop()

    def __call__(self, now: Step) -> None:
        """Show a step that has been done, or step 0, which only was evaluated."""
        self.last_saved = now.step if now.saved else self.last_saved
        if not self.output.progress:
            return
        if self.first is None:
            self.first, self.started = now.step, time.monotonic()
        heard = now.score is not None or now.mean_loss is not None
        if heard:
            self._line(self._heard(now))
        if self.bar is not None:
            self.bar.update(self.task, completed=now.step, total=now.steps, description=escape(self._where(now)))
        elif not heard and time.monotonic() - self.printed > _BETWEEN_LINES:
            self._line(self._where(now))

    def _line(self, text: str) -> None:
        self.printed = time.monotonic()
        self.output.notes.print(escape(text), soft_wrap=True)

    def _where(self, now: Step) -> str:
        epoch = f", epoch {now.epoch} of {now.epochs}" if now.epochs else f", epoch {now.epoch}"
        loss = "" if now.loss is None else f", loss {now.loss:.4g}"
        best = f", best {self._score(now.best[0])}" if now.best is not None else ""
        return f"step {now.step} of {now.steps}{epoch}{loss}{best}{self._left(now)}"

    def _heard(self, now: Step) -> str:
        """What an evaluation says, or, without one, the mean loss."""
        name = "" if self.metric is None else self.metric.name
        if now.step == 0 and now.score is not None:
            return f"before training: {name} {self._score(now.score)} (post-training quantization)"
        news = " (best so far)" if now.best is not None and now.best[1] == now.step else ""
        loss = "" if now.mean_loss is None else f", mean loss {now.mean_loss:.4g}"
        score = "" if now.score is None else f", {name} {self._score(now.score)}{news}"
        left = self._left(now) if self.bar is None else ""
        return f"step {now.step} of {now.steps}{loss}{score}{left}"

    def _score(self, value: float) -> str:
        return f"{value:.5g}" if self.metric is None else self.metric.text(value)

    def _left(self, now: Step) -> str:
        done = now.step - (self.first or 0)
        if done < 1 or now.step >= now.steps:
            return ""
        seconds = (time.monotonic() - self.started) / done * (now.steps - now.step)
        return f", about {duration(seconds)} left"


def duration(seconds: float) -> str:
    """Seconds in words: 42 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
