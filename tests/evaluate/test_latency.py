"""Turns alternate, a known ratio is found, and slow calls do not take for ever."""

from __future__ import annotations

import time

import pytest

from narrowcast.evaluate.latency import FEWEST_ROUNDS, Timing, interleaved, ratio


def test_turns_alternate_in_the_order_given() -> None:
    order: list[str] = []
    interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, seconds=0.0, rounds=3)
    assert order[-6:] == ["a", "b"] * 3  # a turn without time is one call


def test_a_known_ratio_is_found() -> None:
    runs = {"slow": lambda: time.sleep(0.004), "quick": lambda: time.sleep(0.001)}
    timings = interleaved(runs, seconds=0.3, rounds=15)
    found = ratio(timings["slow"], timings["quick"])
    assert found.lower_quartile <= found.value <= found.upper_quartile
    assert 1.5 < found.value < 4.5
    assert timings["slow"].calls >= 15
    assert timings["slow"].threads >= 1


def test_slow_calls_get_fewer_rounds() -> None:
    timing = interleaved({"slow": lambda: time.sleep(0.02)}, seconds=0.01, rounds=50)["slow"]
    assert len(timing.rounds) == FEWEST_ROUNDS


def test_the_ratio_is_taken_within_each_round() -> None:
    drifting = Timing(3.0, (1.0, 3.0, 9.0), 3, 1)
    twice_as_fast = Timing(1.5, (0.5, 1.5, 4.5), 3, 1)
    assert ratio(drifting, twice_as_fast).value == 2.0
    assert ratio(drifting, twice_as_fast).lower_quartile == 2.0


def test_nothing_to_time_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        interleaved({})
    with pytest.raises(ValueError, match="rounds is 0"):
        interleaved({"a": lambda: None}, rounds=0)
