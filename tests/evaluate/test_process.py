"""A fresh process reports its own memory and time, or why there are none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from narrowcast.data import Batch
from narrowcast.evaluate.process import measure, one_sample

MODELS = "tests.evaluate.models"


def test_a_fresh_process_reports_the_model_and_not_its_parent() -> None:
    ballast = torch.ones(400_000_000, dtype=torch.uint8)  # ru_maxrss would hand this down to the child
    measured = measure(f"{MODELS}:large", Batch((torch.ones(4, 10_000),), {}, None, 4), processes=1)
    assert measured.reason == ""
    assert measured.peak_bytes - measured.baseline_bytes > 39_000_000
    assert measured.peak_bytes < 400_000_000 + measured.baseline_bytes // 2
    assert 0 < measured.load_seconds < measured.answer_seconds
    assert len(ballast) == 400_000_000


def test_a_process_that_fails_says_why() -> None:
    measured = measure(f"{MODELS}:broken", processes=1)
    assert measured.processes == 0
    assert measured.reason == "the fresh process ended with exit status 1: MemoryError: no room for this model"


def test_a_source_that_does_not_exist_says_so(tmp_path: Path) -> None:
    assert "does not exist: a narrowcast checkpoint" in measure(tmp_path / "none", processes=1).reason


def test_a_process_that_takes_too_long_is_ended() -> None:
    assert measure(f"{MODELS}:large", processes=1, timeout=0.05).reason == (
        "the fresh process was ended after 0.05 seconds"
    )


@pytest.mark.parametrize(
    ("batch", "reason"),
    [
        (Batch((), {}, None, 1, call=lambda model: None), "the data is a callable"),
        (Batch(((torch.ones(1), torch.ones(1)),), {}, None, 1), "the input is nested"),
    ],
)
def test_an_input_that_cannot_be_handed_over_is_a_reason(batch: Batch, reason: str) -> None:
    assert measure(f"{MODELS}:large", batch).reason.startswith(reason)


def test_one_sample_cuts_what_has_a_row_per_sample() -> None:
    cut = one_sample(Batch((torch.ones(8, 3),), {"scale": torch.ones(2), "flag": True}, torch.ones(8), 8))
    assert cut.args[0].shape == (1, 3)
    assert cut.kwargs["scale"].shape == (2,)
    assert cut.kwargs["flag"] is True
    assert cut.samples == 1
