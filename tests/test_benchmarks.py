"""The machinery of the benchmarks: interleaving, targets, where results go, tables."""

from __future__ import annotations

import json
from argparse import Namespace

import pytest
import torch
from benchmarks import accuracy, results_io, sizes, targets
from benchmarks.kit import KIT_NAMES
from benchmarks.machine import REPOSITORY
from benchmarks.timing import Timing, interleave
from torch import nn


def test_contenders_take_turns() -> None:
    order: list[str] = []
    contenders = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    timings = interleave(contenders, rounds=2, seconds=0.0, least=1)
    assert order == ["a", "b", "a", "b", "a", "b"]  # one untimed call each, then two rounds
    assert all(len(timing.rounds) == 2 for timing in timings.values())


def test_speedup_is_the_median_of_ratios_within_a_round() -> None:
    assert Timing((1.0, 2.0, 10.0)).ratio_to(Timing((2.0, 4.0, 10.0))) == 2.0


def test_target_judges_the_measured_value() -> None:
    row = {"drop": 0.31, "sqnr_db": 36.0}
    verdicts = targets.judge(targets.ACCURACY, "resnet20", "static-int8", row)
    assert [verdict["met"] for verdict in verdicts] == [False, True]


def test_missing_quantity_misses_its_target() -> None:
    assert not targets.judge(targets.ACCURACY, "resnet20", "weight-int8", {})[0]["met"]


def test_every_target_names_a_variant_that_is_measured() -> None:
    for target in targets.ACCURACY:
        assert target.model in KIT_NAMES
        assert set(target.variants) <= set(accuracy.VARIANTS)


def test_every_variant_says_whether_it_sees_data() -> None:
    assert set(accuracy.WITH_DATA) | set(accuracy.WITHOUT_DATA) == set(accuracy.VARIANTS)


@pytest.mark.parametrize(
    ("quick", "models", "committed"),
    [(False, list(KIT_NAMES), True), (True, list(KIT_NAMES), False), (False, ["resnet20"], False)],
)
def test_partial_run_never_overwrites_committed_results(quick: bool, models: list[str], committed: bool) -> None:
    options = Namespace(out=None, quick=quick, models=models, presets=["fp16"])
    assert (results_io.output_folder(options, ["fp16"]) == REPOSITORY / "benchmarks" / "results") is committed


def test_results_are_one_json_and_one_page(tmp_path) -> None:
    results_io.write_results(tmp_path / "new", "sizes", {"rows": [1]}, "# Sizes\n")
    assert json.loads((tmp_path / "new" / "sizes.json").read_text()) == {"rows": [1]}
    assert (tmp_path / "new" / "sizes.md").read_text() == "# Sizes\n"


def test_failed_rows_fill_the_table() -> None:
    failed = {"model": "resnet20", "variant": "fp16", "failed": "no", "targets": []}
    assert len(accuracy.cells(failed)) == len(accuracy.HEADER)
    assert len(sizes.cells(failed)) == len(sizes.HEADER)


def test_sqnr_of_a_tenth_of_the_signal_is_twenty_decibels() -> None:
    signal = torch.ones(100)
    assert accuracy.sqnr_db(signal, 0.9 * signal) == pytest.approx(20.0, abs=1e-4)


def test_linear_bytes_count_everything_but_the_bias_and_tied_weights_once_per_module() -> None:
    linear = nn.Linear(8, 4)
    assert accuracy.weight_bytes(linear) == 8 * 4 * 4
    assert accuracy.linear_percent(nn.Sequential(linear), nn.Sequential(nn.Linear(8, 2))) == 50.0
    assert accuracy.linear_percent(nn.ReLU(), nn.ReLU()) is None
