"""Energy per call from the processor's own counter (RAPL), where the operating system lets us read it.

The counter is the whole package's, with everything else that runs on it; idle power is not subtracted. So, as for
latency, the runs take turns and a figure stands beside that of the reference.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Zone:
    """One counter.

    Args:
        name: what it counts, for example "package-0".
        counter: file with microjoules since some start.
        span: microjoules after which the counter starts again from 0.
    """

    name: str
    counter: Path
    span: int

    def read(self) -> int:
        """Microjoules now."""
        return int(self.counter.read_text())

    def spent(self, before: int, after: int) -> int:
        """Microjoules between two readings; a smaller second reading means that the counter wrapped once."""
        return after - before if after >= before else after - before + self.span


@dataclass(frozen=True)
class Rapl:
    """The counters that together cover this machine without counting anything twice, or why there are none.

    Args:
        zones: packages and memory; empty where `reason` is not.
        reason: why energy cannot be measured; "" where it can.
    """

    zones: tuple[Zone, ...]
    reason: str = ""

    @classmethod
    def open(cls, root: Path = POWERCAP) -> Rapl:
        """Looks for readable counters below `root`."""
        if not root.is_dir():
            return cls((), f"this machine offers no energy counter: there is no {root}")
        zones = []
        for folder in sorted(root.glob("intel-rapl:*")):
            try:
                name = (folder / "name").read_text().strip()
                zone = Zone(name, folder / "energy_uj", int((folder / "max_energy_range_uj").read_text()))
                zone.read()
            except PermissionError:
                return cls((), f"the energy counter {folder.name} can be read by root only")
            except (OSError, ValueError) as error:
                return cls((), f"the energy counter {folder.name} cannot be read: {error}")
            zones.append(zone)
        # psys contains the packages, core and uncore are parts of one: adding them would count twice
        chosen = tuple(zone for zone in zones if zone.name.startswith(("package", "dram")))
        return cls(chosen) if chosen else cls((), f"there is no package energy counter in {root}")


def interleaved(
    runs: Mapping[str, Callable[[], object]], rapl: Rapl, *, seconds: float = 3.0, rounds: int = 5
) -> dict[str, float]:
    """Joules per call of several callables that take turns.

    Args:
        runs: what to measure, by name.
        rapl: readable counters.
        seconds: time for all runs together; the counter moves about once a millisecond, so a turn is at least 50 ms.
        rounds: turns of each.

    Returns:
        Joules per call, by name.
    """
    turn = max(0.05, seconds / rounds / len(runs))
    joules = dict.fromkeys(runs, 0.0)
    calls = dict.fromkeys(runs, 0)
    for _ in range(rounds):
        for name, run in runs.items():
            before = [zone.read() for zone in rapl.zones]
            end = time.perf_counter() + turn
            while time.perf_counter() < end:
                run()
                calls[name] += 1
            spent = (zone.spent(start, zone.read()) for zone, start in zip(rapl.zones, before, strict=True))
            joules[name] += sum(spent) / 1e6
    return {name: joules[name] / calls[name] for name in runs}
