"""The machinery of the benchmarks: interleaving, targets, where results go, tables."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import (
    accuracy,
    conv,
    limits,
    linear,
    linear_page,
    linear_problem,
    linear_torch,
    networks,
    networks_page,
    peers_ggml,
    quantizing,
    results_io,
    roofline,
    sizes,
    targets,
)
from benchmarks.kit import KIT_NAMES
from benchmarks.machine import REPOSITORY
from benchmarks.timing import Timing, interleave
from torch import nn

from narrowcast import kernels


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


# The kernels' benchmarks: they run in a tiny form without any other package.


@pytest.fixture
def restored_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def written(folder: Path, name: str) -> dict[str, Any]:
    assert (folder / f"{name}.md").read_text().startswith("# ")
    document: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return document


def test_a_timing_keeps_the_fastest_call_of_all_bursts() -> None:
    timing = interleave({"a": lambda: None}, rounds=3, seconds=0.0, least=4)["a"]
    assert 0.0 <= timing.fastest <= timing.best


@pytest.mark.skipif(kernels.capability().isa in ("reference", "scalar"), reason="no vector loops in this tier")
def test_limits_of_two_threads_are_positive_and_caches_read_faster_than_memory() -> None:
    found = limits.measure(2, seconds=0.01)
    assert {"int8", "float32"} <= set(found.gmacs)
    assert min(found.gmacs.values()) > 0.0
    assert found.read_gbs["L1"] > found.read_gbs["DRAM"] > 0.0


def test_the_roof_is_the_slower_of_reading_and_multiplying() -> None:
    limit = limits.Limits(1, {"int8": 100.0}, {"DRAM": 10.0})
    assert limit.seconds(macs=1e9, operand="int8", size=1.0, level="DRAM") == 0.01
    assert limit.seconds(macs=1.0, operand="int8", size=1e9, level="DRAM") == 0.1
    assert limit.seconds(macs=1.0, operand="bfloat16", size=1.0, level="DRAM") is None


def test_cold_copies_exceed_the_last_cache_four_times() -> None:
    contender = next(c for c in linear.CONTENDERS if c.bits == 8)
    copies = linear.copies_needed(contender, (1024, 1024))
    assert copies * 1024 * 1024 >= 4 * limits.cache_bytes()["L3"]


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_every_linear_peer_of_torch_computes_the_layer_or_says_why_not() -> None:
    problem, skipped = linear_problem.Problem.random(128, 256), {}
    factories = linear.factories_of(problem, linear_torch.CONTENDERS, skipped)
    x = torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
    expected = nn.functional.linear(x, problem.weight, problem.bias)
    with torch.inference_mode():
        ready = linear.prepared_copies(factories, (128, 256), skipped, cold=False)
        errors = linear.answered(ready, x, expected, skipped)
    assert set(errors) | set(skipped) == {contender.name for contender in linear_torch.CONTENDERS}
    assert errors["torch float32"] == 0.0
    assert max(errors.values()) < 0.2


def test_a_missing_package_is_a_reason_and_not_a_crash() -> None:
    def copies(problem: linear_problem.Problem) -> Any:
        linear_problem.need("a_package_that_does_not_exist")

    contender = linear_problem.Contender("peer", linear_problem.INT8, "int8", 8, copies)
    skipped: dict[str, str] = {}
    assert linear.factories_of(linear_problem.Problem.random(8, 8), [contender], skipped) == {}
    assert skipped == {"peer": "a_package_that_does_not_exist is not installed"}


def test_without_a_build_ggml_is_listed_with_the_variable_that_names_one(monkeypatch) -> None:
    monkeypatch.delenv(peers_ggml.VARIABLE, raising=False)
    peers_ggml.library.cache_clear()
    skipped: dict[str, str] = {}
    linear.factories_of(linear_problem.Problem.random(32, 32), peers_ggml.CONTENDERS, skipped)
    assert all(peers_ggml.VARIABLE in reason for reason in skipped.values())
    assert len(skipped) == len(peers_ggml.CONTENDERS)


def row(contender: str, family: str, median_us: float, **more: Any) -> dict[str, Any]:
    case = {"shape": "64x64", "batch": 1, "threads": 1, "mode": "cold", "bits": 8, "level": "DRAM", "error": 0.0}
    return case | {"contender": contender, "family": family, "median_us": median_us, "fastest_us": median_us} | more


def test_a_rival_computes_the_same_kind_of_product() -> None:
    rows = linear_page.with_ratios(
        [
            row("float", linear_problem.FLOAT, 9.0),
            row("int4", linear_problem.INT4, 1.0),
            row("int8", linear_problem.INT8, 6.0),
            row(linear_page.INT8_MAIN, linear_problem.INT8, 3.0),
        ]
    )
    assert (rows[-1]["rival"], rows[-1]["ratio"]) == ("int8", 2.0)


def test_a_target_is_met_only_when_every_case_keeps_it() -> None:
    rows = [
        row(linear_page.INT8_MAIN, linear_problem.INT8, 1.0, r_bw=0.95),
        row(linear_page.INT8_MAIN, linear_problem.INT8, 2.0, r_bw=0.5, shape="8x8"),
    ]
    verdict = linear_page.judged(rows)[0]
    assert (verdict["kept"], verdict["cases"], verdict["worst"], verdict["met"]) == (1, 2, 0.5, False)
    assert verdict["worst_case"].startswith("8x8")
    assert linear_page.judged(rows)[1]["met"] is None  # no int4 row was measured


def test_linear_runs_small(tmp_path, restored_threads) -> None:
    only = ["torch float32", "narrowcast int8 uint8", "narrowcast int4 g32"]
    arguments = ["--shapes", "64x64", "--batches", "1", "3", "--threads", "1", "--rounds", "1", "--seconds", "0"]
    assert linear.main([*arguments, "--out", str(tmp_path), "--only", *only]) == 0
    document = written(tmp_path, "linear")
    mine = [r for r in document["rows"] if r["contender"] == linear_page.INT8_MAIN]
    assert [r["batch"] for r in mine] == [1, 3]
    assert all(r["ratio"] > 0.0 and r["error"] < 0.05 for r in mine)


def test_conv_runs_small(tmp_path, restored_threads) -> None:
    arguments = ["--layers", "1x1 160>960", "--batches", "1", "--threads", "1", "--rounds", "1", "--seconds", "0"]
    assert conv.main([*arguments, "--out", str(tmp_path), "--only", "torch float32", "narrowcast"]) == 0
    found = written(tmp_path, "conv")["rows"][0]["contenders"]
    assert found["narrowcast static int8"]["ratio"] > 0.0
    assert max(contender["error"] for contender in found.values()) < 0.1


def test_quantizing_runs_small(tmp_path, restored_threads) -> None:
    arguments = ["--size", "64", "--threads", "1", "--rounds", "1", "--seconds", "0", "--out", str(tmp_path)]
    assert quantizing.main(arguments) == 0
    names = {found["contender"] for found in written(tmp_path, "quantizing")["rows"]}
    assert {f"{kind} {name}" for kind in ("solver", "pipeline") for name in quantizing.FORMATS} <= names


@pytest.mark.slow
def test_networks_runs_small(tmp_path, restored_threads) -> None:
    skipped: list[str] = []
    if not results_io.available(["resnet20"], skipped.append):
        pytest.skip(skipped[0])
    arguments = ["--models", "resnet20", "--shapes", "1", "--threads", "1", "--rounds", "1", "--seconds", "0"]
    assert networks.main([*arguments, "--out", str(tmp_path), "--only", "narrowcast"]) == 0
    found = written(tmp_path, "networks")["rows"][0]["contenders"]
    assert found["torch float32"]["agreement"] == 100.0
    assert found["narrowcast static-int8"]["agreement"] >= 95.0


def test_networks_are_judged_where_a_target_is_set() -> None:
    timed = {"narrowcast static-int8": {"median_ms": 2.0}, networks_page.ONNXRUNTIME_STATIC: {"median_ms": 3.0}}
    judged = networks_page.verdict({"model": "resnet20", "shape": "32", "contenders": timed})
    assert judged == {"speedups": {"static-int8": {networks_page.ONNXRUNTIME_STATIC: 1.5}}, "met": True}
    assert networks_page.verdict({"model": "resnet20", "shape": "1", "contenders": timed})["met"] is None


def test_the_roofline_has_one_plot_per_thread_count_and_mode(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    rows = [row(linear_page.INT8_MAIN, linear_problem.INT8, 1.0), row("torch", linear_problem.FLOAT, 3.0)]
    limit = {"threads": 1, "gmacs": {"int8": 100.0, "float32": 20.0}, "read_gbs": {"DRAM": 10.0}}
    paths = roofline.draw_all({"rows": rows, "limits": [limit]}, tmp_path)
    assert [path.name for path in paths] == ["linear-64x64-1-cold.svg"]
    assert linear_page.INT8_MAIN.removeprefix("narrowcast ") in paths[0].read_text()
