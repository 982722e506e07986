"""Progress without a terminal: few lines, and the time left where the work is long."""

from __future__ import annotations

import pytest

from narrowcast import progress
from narrowcast.progress import progress_steps


def test_long_work_tells_what_is_done_and_how_long_it_will_take(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 1000, 6))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    with progress_steps("quantizing", 10, enabled=True) as step:
        for index in range(5):
            step(f"layers.{index}", advance=2)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "quantizing: 10 steps" and lines[-1] == "quantizing: done"
    # a step takes 6 seconds for 2 units: 6 units are left after 12 seconds
    assert lines[1:-1] == [
        "quantizing: 4 of 10, about 18 s left, layers.1", "quantizing: 8 of 10, about 6 s left, layers.3",
    ]  # fmt: skip


def test_short_work_prints_no_line_in_between(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_steps("calibrating", 3, enabled=True) as step:
        step("a")
    assert capsys.readouterr().err.splitlines() == ["calibrating: 3 steps", "calibrating: done"]
    with progress_steps("calibrating", 3, enabled=False) as step:
        step("a")
    assert capsys.readouterr().err == ""
