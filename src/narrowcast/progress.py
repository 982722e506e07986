"""Progress of long work: a bar with the time left on a terminal, plain lines elsewhere, nothing when not wanted."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Step(Protocol):
    """Tell what is worked on; `advance` counts one unit as done."""

    def __call__(self, text: str, *, advance: int = 1) -> None:
        """Show `text`, and count `advance` units as done."""


# Lines come at most this often where there is no terminal, in seconds: short work prints none.
_BETWEEN_LINES = 10.0


class _PlainSteps:
    """A line with the time left now and then."""

    def __init__(self, title: str, total: int) -> None:
        self.title, self.total, self.done = title, total, 0
        self.started = self.printed = time.monotonic()

    def __call__(self, text: str, *, advance: int = 1) -> None:
        self.done += advance
        now = time.monotonic()
        if now - self.printed < _BETWEEN_LINES or not 0 < self.done < self.total:
            return
        self.printed = now
        left = (now - self.started) / self.done * (self.total - self.done)
        print(f"{self.title}: {self.done} of {self.total}, about {left:.0f} s left, {text}", file=sys.stderr)


@contextmanager
def progress_steps(title: str, total: int, *, enabled: bool) -> Iterator[Step]:
    """Progress over `total` units, on standard error.

    Args:
        title: what the work is.
        total: number of units.
        enabled: whether to show anything.
    """
    if not enabled:
        yield lambda text, *, advance=1: None
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        print(f"{title}: {total} steps", file=sys.stderr)
        yield _PlainSteps(title, total)
        print(f"{title}: done", file=sys.stderr)
        return
    columns = (
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda text, *, advance=1: bar.update(task, description=text, advance=advance)
