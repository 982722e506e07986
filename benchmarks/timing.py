"""Interleaved timing: every contender gets a short burst in every round, so that a noisy moment hits all of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one contender.

    Attributes:
        rounds: median of every burst, in the order of the rounds.
        fastest: the fastest single call of all bursts; what the machine can do when nothing disturbs it.
    """

    rounds: tuple[float, ...]
    fastest: float = math.nan

    @property
    def median(self) -> float:
        """Median over the rounds."""
        return median(self.rounds)

    @property
    def best(self) -> float:
        """The fastest round."""
        return min(self.rounds)

    def ratio_to(self, other: Timing) -> float:
        """Median over the rounds of other / self: how many times faster this one is, round by round."""
        return median(theirs / mine for mine, theirs in zip(self.rounds, other.rounds, strict=True))


def burst(call: Call, seconds: float, least: int) -> list[float]:
    """Milliseconds of each of at least `least` calls that fill at least `seconds`."""
    times: list[float] = []
    total = 0.0
    while total < seconds or len(times) < least:
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
        total += times[-1]
    return [1000.0 * duration for duration in times]


def interleave(
    contenders: Mapping[str, Call], *, rounds: int, seconds: float, least: int = 3, rests: Mapping[str, float] = {}
) -> dict[str, Timing]:
    """Times all contenders A B C A B C ...

    Args:
        contenders: name -> the call to time; each is called once beforehand, untimed.
        rounds: how often every contender gets a burst.
        seconds: least duration of a burst.
        least: least number of calls in a burst.
        rests: name -> seconds of rest behind its bursts, for one whose threads go on spinning and would take the next
            one's cores.

    Returns:
        Name -> its timing.
    """
    for call in contenders.values():
        call()
    bursts: dict[str, list[list[float]]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            bursts[name].append(burst(call, seconds, least))
            time.sleep(rests.get(name, 0.0))
    return {name: Timing(tuple(map(median, each)), min(map(min, each))) for name, each in bursts.items()}
