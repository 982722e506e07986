from __future__ import annotations

import math
import struct
from typing import Any

import pytest


def formats(answer: Any) -> dict[str, dict[str, Any]]:
    return {row["format"]: row for row in answer.json["formats"]}


def test_the_number_of_the_issue_is_shown_in_every_format(cli):
    rows = formats(cli("show", "0.87654321", "--json"))
    assert rows["int8"]["code"] == 111
    assert rows["int8"]["value"] == pytest.approx(111 / 127)
    assert rows["int4"]["bits"] == "0110"
    assert rows["int4"]["value"] == pytest.approx(6 / 7)
    assert rows["bf16"]["bits"] == "0|01111110|1100000"
    assert rows["fp8_e4m3"]["value"] == 0.875
    assert {"fp32", "fp16", "uint8", "uint4", "int2", "nf4", "fp4_e2m1", "e8m0", "mxfp4", "mxfp8"} <= rows.keys()


def test_formats_whose_levels_are_learned_say_nothing_of_one_number(cli):
    assert not [name for name in formats(cli("show", "0.5", "--json")) if name.startswith("codebook")]


def test_float_bits_are_those_of_ieee(cli):
    rows = formats(cli("show", "-0.3", "--json"))
    expected = format(struct.unpack("<I", struct.pack("<f", -0.3))[0], "032b")
    assert rows["fp32"]["bits"] == f"{expected[0]}|{expected[1:9]}|{expected[9:]}"
    half = format(struct.unpack("<H", struct.pack("<e", -0.3))[0], "016b")
    assert rows["fp16"]["bits"] == f"{half[0]}|{half[1:6]}|{half[6:]}"


def test_errors_are_the_distance_to_the_stored_value(cli):
    for row in formats(cli("show", "0.2", "--json")).values():
        assert row["absolute_error"] == pytest.approx(abs(row["value"] - 0.2))
        assert row["relative_error"] == pytest.approx(row["absolute_error"] / 0.2)


def test_negative_numbers_are_in_twos_complement(cli):
    rows = formats(cli("show", "-1", "--json"))
    assert rows["int8"]["code"] == -127
    assert rows["int8"]["bits"] == "10000001"
    assert "e8m0" not in rows  # a format of positive powers of two


@pytest.mark.parametrize(
    ("arguments", "bounds"),
    [
        (("show", "0.5"), [-1, 1]),
        (("show", "0.5", "--range", "2"), [-2, 2]),
        (("show", "--range", "2", "0.5"), [-2, 2]),
        (("show", "0.5", "--range", "-0.25", "3"), [-0.25, 3]),
        (("show", "--range", "-0.25", "3", "-0.5"), [-0.25, 3]),
    ],
)
def test_range_takes_one_number_or_two_in_any_place(cli, arguments, bounds):
    assert cli(*arguments, "--json").json["range"] == bounds


def test_symmetric_scale_follows_the_larger_end_of_the_range(cli):
    rows = formats(cli("show", "0.5", "--range", "-1", "4", "--json"))
    assert rows["int8"]["scale"] == pytest.approx(4 / 127)
    assert rows["uint8"]["scale"] == pytest.approx(5 / 255)
    assert rows["uint8"]["zero_point"] == 51


def test_a_number_beyond_the_range_is_said_to_be_clipped(cli):
    answer = cli("show", "3.14")
    assert answer.code == 0
    assert "clipped" in answer.out
    assert "--range" in answer.err


def test_zero_has_no_error_in_any_format_that_has_zero(cli):
    rows = formats(cli("show", "0", "--json"))
    assert all(row["absolute_error"] == 0 and row["relative_error"] == 0 for row in rows.values())


def test_table_keeps_brackets_and_names(cli):
    answer = cli("show", "1e-3")
    assert "fp4_e2m1" in answer.out and "mantissa" not in answer.err
    assert math.isfinite(formats(cli("show", "1e-3", "--json"))["int2"]["value"])


def test_quiet_leaves_only_the_table(cli):
    answer = cli("show", "3.14", "--quiet")
    assert answer.err == ""
    assert answer.out.startswith("format")


@pytest.mark.parametrize("number", ["abc", "", "nan", "inf", "-inf", "1e39", "1e400"])
def test_what_is_no_finite_float32_is_refused(refused, number):
    assert number in refused("show", number) or number == "1e39"


@pytest.mark.parametrize("bounds", [("0",), ("1", "1"), ("2", "-2"), ("nan",), ("1e39",)])
def test_an_empty_range_is_refused(refused, bounds):
    assert "--range" in refused("show", "0.5", "--range", *bounds)


def test_a_misspelt_option_is_refused(cli):
    assert cli("show", "0.5", "--rnage", "2").code == 2
