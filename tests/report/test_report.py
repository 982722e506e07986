"""Report: plain data that survives JSON, and a table that shows all of it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from narrowcast.report import LayerOutcome, Report, Totals, format_bytes

TOTALS = Totals(
    quantized_parameters=900, coverage=0.95, integer_parameters=800, integer_macs=0.9, parameters=1000,
    bytes_before=4000, bytes_after=1100, seconds=1.5, peak_memory_bytes=10**9, output_sqnr_db=math.inf,
    float_ms=2.0, quantized_ms=1.0, timed_samples=32, threads=1,
)  # fmt: skip
LAYERS = [
    LayerOutcome(
        "body.0", "Linear", "quantized", spec="int8/channel", input="int8/token", method="rtn, plain error",
        parameters=900, macs=9000, weight_sqnr_db=41.5, output_sqnr_db=-math.inf, bits_per_weight=8.25,
        bytes_before=3600, bytes_after=928, kernel="linear_int8_dynamic[avx2]", seconds=0.1, float_ms=1.0,
        quantized_ms=0.5,
    ),
    LayerOutcome("body.1", "Linear", "fell back", "it never ran", spec="int8/channel", weight_sqnr_db=math.inf),
    LayerOutcome("table", "Embedding", "kept", "max_norm rescales rows", parameters=90),
    LayerOutcome("norm.weight", "Parameter", "kept", "stays float", parameters=5, bytes_before=20, bytes_after=20),
    LayerOutcome("norm.bias", "Parameter", "kept", "stays float", parameters=5, bytes_before=20, bytes_after=20),
]  # fmt: skip
REPORT = Report("dynamic-int8", "Model", LAYERS, TOTALS, ["a note [with brackets]", "another"])


def test_json_and_back_loses_nothing() -> None:
    text = json.dumps(REPORT.to_dict(), allow_nan=False)
    assert Report.from_dict(json.loads(text)) == REPORT
    assert json.loads(text)["layers"][1]["weight_sqnr_db"] == "inf"


decibels = st.one_of(st.none(), st.floats(allow_nan=False))


@given(weight=decibels, output=decibels, reason=st.text(), macs=st.one_of(st.none(), st.integers(0, 2**60)))
def test_any_figures_survive(weight: float | None, output: float | None, reason: str, macs: int | None) -> None:
    row = replace(LAYERS[0], weight_sqnr_db=weight, output_sqnr_db=output, reason=reason, macs=macs)
    report = replace(REPORT, layers=[row], totals=replace(TOTALS, output_sqnr_db=output))
    assert Report.from_dict(json.loads(json.dumps(report.to_dict(), allow_nan=False))) == report
    assert str(report)


def test_a_layer_called_inf_is_a_name() -> None:
    report = replace(REPORT, layers=[replace(LAYERS[0], layer="inf", reason="nan")])
    assert Report.from_dict(report.to_dict()) == report


def test_keys_of_later_versions_are_passed_over() -> None:
    values = REPORT.to_dict()
    values["layers"][0]["colour"] = "blue"
    values["totals"]["joules"] = 3
    assert Report.from_dict(values) == REPORT


def test_the_file_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("something older")
    REPORT.save_json(path)
    assert Report.from_dict(json.loads(path.read_text(encoding="utf-8"))) == REPORT
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


def test_the_table_shows_every_layer_outcome_and_note() -> None:
    text = str(REPORT)
    for part in ("body.0", "quantized", "int8/token", "8.25", "41.5 dB", "linear_int8_dynamic[avx2]", "2.00x",
                 "fell back", "it never ran", "exact", "max_norm rescales rows", "norm.weight and 1 more",
                 "4.00 kB -> 1.10 kB (27.5%)",
                 "95.0%", "90.0% of multiply-accumulates", "2.00 ms float32, 1.00 ms quantized: 2.00x", "1.5 s",
                 "a note [with brackets]"):  # fmt: skip
        assert part in text, part


@pytest.mark.parametrize("name", ["[red]x[/red]", "a[/]b", "layers[0]", "x" * 300])
def test_names_are_shown_as_they_are(name: str) -> None:
    for row in (
        replace(LAYERS[0], layer=name),
        replace(LAYERS[0], reason=name),
        replace(LAYERS[3], layer=name, reason=name),
    ):
        flat = "".join(character for character in str(replace(REPORT, layers=[row])) if character not in " │\n")
        assert flat.count(name[:20])


def test_a_report_without_data_or_layers_can_be_shown() -> None:
    bare = Totals(quantized_parameters=0, coverage=1.0, integer_parameters=0, integer_macs=None)
    text = str(Report("", "Empty", [], bare))
    assert "unnamed" in text and "not known without data" in text and "speed" not in text.replace("speed ┃", "")


@pytest.mark.parametrize(("count", "text"), [
    (0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (1_234_567, "1.23 MB"), (120e9, "120.00 GB"), (2e15, "2000.00 TB"),
])  # fmt: skip
def test_bytes_are_in_decimal_units(count: float, text: str) -> None:
    assert format_bytes(count) == text


def test_speedup_needs_both_times() -> None:
    assert LAYERS[0].speedup == 2.0
    assert LAYERS[1].speedup is None
    assert replace(LAYERS[0], quantized_ms=0.0).speedup is None


def test_what_solvers_say_of_many_layers_is_one_line_with_the_span_of_its_numbers() -> None:
    said = [["weights moved by 3 %", "damped {twice}"], ["weights moved by 0.5 %"], ["weights moved by 12 %"]]
    rows = [replace(LAYERS[0], layer=f"body.{i}", notes=notes) for i, notes in enumerate(said)]
    text = str(replace(REPORT, layers=[*rows, replace(LAYERS[0], layer="last", notes=["weights moved by 1e-05 %"])]))
    assert "weights moved by 1e-05 .. 12 %: body.0, body.1, body.2 and 1 more" in text
    assert "damped {twice}: body.0" in text
