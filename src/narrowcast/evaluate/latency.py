"""Latency of several things measured so that they can be compared: interleaved, A B A B, on one machine at one time.

A shared machine drifts by tens of percent within seconds, and now and then takes the processor away for 20 ms. So
turns are short and many, a ratio is taken within each round, and medians and quartiles over the rounds are reported.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles

import torch

SECONDS = 3.0
ROUNDS = 51
FEWEST_ROUNDS = 5


@dataclass(frozen=True)
class Timing:
    """How long one call takes.

    Args:
        seconds: median over the rounds of the median call of each round.
        rounds: the median call of every round, in seconds, in order.
        calls: number of timed calls.
        threads: threads torch was allowed to use.
    """

    seconds: float
    rounds: tuple[float, ...]
    calls: int
    threads: int


@dataclass(frozen=True)
class Ratio:
    """How many times as fast one thing is as another.

    Args:
        value: median over the rounds of reference time / candidate time; 2 means the candidate takes half the time.
        lower_quartile: a quarter of the rounds gave less.
        upper_quartile: a quarter of the rounds gave more.
    """

    value: float
    lower_quartile: float
    upper_quartile: float


def interleaved(
    runs: Mapping[str, Callable[[], object]], *, seconds: float = SECONDS, rounds: int = ROUNDS
) -> dict[str, Timing]:
    """Times several callables in turn, round after round, in the order of the mapping.

    Args:
        runs: what to time, by name; each is called at least twice before timing and once per round.
        seconds: time to spend on all of them together, not counting the warm-up of a tenth of it.
        rounds: how often each gets its turn, at least 1. Slow calls get fewer turns, but 5 (or `rounds`) in any case.

    Returns:
        A timing per name; equal rounds of two timings were measured next to each other.

    Raises:
        ValueError: `rounds` is not positive or `runs` is empty.
    """
    if rounds < 1 or not runs:
        raise ValueError(f"rounds is {rounds} and there are {len(runs)} runs to time; both must be at least 1")
    turn = seconds / rounds / len(runs)
    for run in runs.values():
        run()
        _calls(run, seconds / 10 / len(runs))
    measured: dict[str, list[list[float]]] = {name: [] for name in runs}
    end = time.perf_counter() + seconds
    for done in range(rounds):
        if done >= FEWEST_ROUNDS and time.perf_counter() > end:
            break
        for name, run in runs.items():
            measured[name].append(_calls(run, turn))
    return {name: _timing(calls) for name, calls in measured.items()}


def ratio(reference: Timing, candidate: Timing) -> Ratio:
    """How many times as fast the candidate is, from two timings of one `interleaved` call."""
    each = [a / b for a, b in zip(reference.rounds, candidate.rounds, strict=True)]
    if len(each) < 2:
        return Ratio(each[0], each[0], each[0])
    lower, middle, upper = quantiles(each, n=4, method="inclusive")
    return Ratio(middle, lower, upper)


def _calls(run: Callable[[], object], seconds: float) -> list[float]:
    """Seconds of each call, as many as fit into the given time, at least one."""
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while not taken or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return taken


def _timing(rounds: list[list[float]]) -> Timing:
    medians = tuple(median(calls) for calls in rounds)
    return Timing(median(medians), medians, sum(len(calls) for calls in rounds), torch.get_num_threads())
