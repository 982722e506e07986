"""RAPL counters are added without counting twice, wrap, and explain their absence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from narrowcast.evaluate.energy import Rapl, Zone, interleaved


def write_zone(root: Path, folder: str, name: str, microjoules: int) -> Path:
    path = root / folder
    path.mkdir(parents=True)
    (path / "name").write_text(name + "\n")
    (path / "energy_uj").write_text(f"{microjoules}\n")
    (path / "max_energy_range_uj").write_text("1000000\n")
    return path / "energy_uj"


def spend(counter: Path, microjoules: int) -> Callable[[], None]:
    def run() -> None:
        counter.write_text(str((int(counter.read_text()) + microjoules) % 1_000_000))

    return run


def test_packages_and_memory_count_but_not_their_parts(tmp_path: Path) -> None:
    write_zone(tmp_path, "intel-rapl:0", "package-0", 1)
    write_zone(tmp_path, "intel-rapl:0:0", "core", 1)
    write_zone(tmp_path, "intel-rapl:0:1", "dram", 1)
    write_zone(tmp_path, "intel-rapl:1", "psys", 1)
    assert [zone.name for zone in Rapl.open(tmp_path).zones] == ["package-0", "dram"]


def test_energy_per_call_is_that_of_its_own_turns(tmp_path: Path) -> None:
    counter = write_zone(tmp_path, "intel-rapl:0", "package-0", 999_990)
    rapl = Rapl.open(tmp_path)
    runs = {"a": spend(counter, 1), "b": spend(counter, 3)}
    joules = interleaved(runs, rapl, seconds=0.01, rounds=1)
    assert joules["a"] == pytest.approx(1e-6)
    assert joules["b"] == pytest.approx(3e-6)


def test_a_counter_that_wrapped_is_read_right(tmp_path: Path) -> None:
    assert Zone("package-0", tmp_path, 1000).spent(990, 10) == 20


def test_absence_is_explained(tmp_path: Path) -> None:
    assert "there is no" in Rapl.open(tmp_path / "none").reason
    assert "no package energy counter" in Rapl.open(tmp_path).reason
    (tmp_path / "intel-rapl:0").mkdir()
    assert "cannot be read" in Rapl.open(tmp_path).reason


def test_a_counter_for_root_only_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_zone(tmp_path, "intel-rapl:0", "package-0", 1)

    def refuse(zone: Zone) -> int:
        raise PermissionError

    monkeypatch.setattr(Zone, "read", refuse)
    assert Rapl.open(tmp_path).reason == "the energy counter intel-rapl:0 can be read by root only"
