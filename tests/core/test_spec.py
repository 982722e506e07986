"""QuantSpec: what can be written, what it prints, and what it costs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from narrowcast.core import FORMATS, SCALE_FORMATS, PerBlock, PerChannel, PerGroup, PerTensor, PerToken, QuantSpec
from narrowcast.errors import FormatError


@st.composite
def specs(draw: st.DrawFn) -> QuantSpec:
    """Any spec that is legal."""
    row = draw(st.sampled_from([row for row in FORMATS.values() if row.kind != "exponent"]))
    if row.is_cast:
        return QuantSpec(row, PerTensor(), True, "fp32")
    granularity = draw(
        st.one_of(
            st.sampled_from([PerTensor(), PerChannel(), PerToken()]),
            st.builds(PerGroup, st.integers(1, 512)),
            st.builds(PerBlock, st.integers(1, 64), st.integers(1, 64)),
        )
    )
    symmetric = row.kind != "int" or (row.low != 0 and draw(st.booleans()))
    if row.learned:
        return QuantSpec(row, granularity, True, "fp16" if isinstance(granularity, PerGroup) else "fp32")
    scale_format = draw(st.sampled_from(SCALE_FORMATS))
    if scale_format == "k6":
        granularity, symmetric = PerGroup(2 ** draw(st.integers(0, 8))), symmetric or row.bits > 6
        if row.low == 0 and symmetric:
            scale_format = "fp16"
            symmetric = False
    return QuantSpec(row, granularity, symmetric, scale_format)


@given(specs())
def test_a_spec_parses_what_it_prints(spec: QuantSpec) -> None:
    assert QuantSpec.parse(str(spec)) == spec


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("int8", "int8/channel"),
        ("int8/channel/sym", "int8/channel"),
        ("int4/group32/asym/scale:fp16", "int4/group32/asym"),
        ("int4/asym/group32", "int4/group32/asym"),
        ("uint8", "uint8/tensor"),
        ("uint8/tensor/asym", "uint8/tensor"),
        ("uint4/group64", "uint4/group64"),
        ("fp16", "fp16"),
        ("mxfp4", "fp4_e2m1/group32/scale:e8m0"),
        ("mxfp8", "fp8_e4m3/group32/scale:e8m0"),
        ("nf4/group64/scale:int8", "nf4/group64/scale:int8"),
        ("int8/block16x16", "int8/block16x16"),
        ("int4/group32/asym/scale:k6", "int4/group32/asym/scale:k6"),
        ("codebook4", "codebook4/channel"),
        ("codebook2/group128", "codebook2/group128"),
        (" int8/token ", "int8/token"),
    ],
)
def test_what_is_left_out_has_one_default_and_one_way_to_print(text: str, canonical: str) -> None:
    assert str(QuantSpec.parse(text)) == canonical


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "number format '' is not known"),
        ("int7/channel", "number format 'int7' is not known"),
        ("int4/grp32", "granularity 'grp32' is not known"),
        ("int4/group0", "group size must be at least 1, got 0"),
        ("int4/", "granularity '' is not known"),
        ("int4/group32/channel", "'channel' gives the granularity a second time"),
        ("int4/sym/asym", "'asym' gives the symmetric a second time"),
        ("int4/scale:fp16/scale:fp16", "gives the scale format a second time"),
        ("int4/scale:int4", "scale format 'int4' is not known; use one of fp32, fp16, e8m0, int8, k6"),
        ("nf4/asym", "nf4 has no zero point"),
        ("uint8/sym", "uint8 is unsigned and cannot be symmetric"),
        ("e8m0", "e8m0 holds scales"),
        ("fp16/group32", "fp16 carries no scales; write 'fp16' alone"),
        ("bf16/asym", "bf16 has no zero point"),
        ("codebook3/asym", "codebook3 has no zero point"),
        ("codebook3/scale:fp16", "codebook3 has float16 levels and no scales; leave out 'scale:'"),
        (
            "int4/channel/scale:k6",
            "a whole number makes 256 columns, got channel; use group16 or group32",
        ),
        ("int4/group48/scale:k6", "a whole number makes 256 columns, got group48"),
        ("int4/group512/scale:k6", "a whole number makes 256 columns, got group512"),
        ("int8/group32/asym/scale:k6", "zero points of 6 bits, too few for int8; leave out 'asym'"),
    ],
)
def test_an_impossible_spec_is_an_error_that_repeats_what_was_typed(text: str, reason: str) -> None:
    with pytest.raises(FormatError) as caught:
        QuantSpec.parse(text)
    assert reason in str(caught.value)
    assert f"specification {text!r}" in str(caught.value)


def test_a_spec_is_parsed_from_text_only() -> None:
    with pytest.raises(FormatError, match="is a text like 'int4/group32/asym', got int"):
        QuantSpec.parse(4)  # type: ignore[arg-type]


def test_an_object_that_is_no_granularity_is_refused() -> None:
    with pytest.raises(FormatError, match="a granularity is PerTensor"):
        QuantSpec(FORMATS["int8"], "channel", True, "fp32")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [
        ("int8", -127, 127),
        ("int8/asym", -128, 127),
        ("int6", -31, 31),
        ("int5", -15, 15),
        ("int4", -7, 7),
        ("int4/asym", -8, 7),
        ("int3", -3, 3),
        ("int2", -1, 1),
        ("int2/asym", -2, 1),
        ("uint8", 0, 255),
        ("uint4", 0, 15),
    ],
)
def test_symmetric_integers_are_narrow_and_asymmetric_ones_use_every_code(text: str, low: int, high: int) -> None:
    spec = QuantSpec.parse(text)
    assert (spec.code_low, spec.code_high) == (low, high)


@pytest.mark.parametrize(
    ("text", "shape", "bits"),
    [
        ("fp16", (8, 64), 16),
        ("int8/channel", (8, 64), 8 + 32 / 64),
        ("int8/tensor", (8, 64), 8 + 32 / 512),
        ("int4/group32", (8, 64), 4 + 16 / 32),
        ("int4/group32/asym/scale:k6", (8, 1024), 4 + 12 / 32 + 16 / 256),
        ("int6/group16/scale:k6", (8, 1024), 6 + 6 / 16 + 16 / 256),
        # a row of 172 columns has 6 blocks, 36 bits that end on byte 5, twice, and one float16
        ("int4/group32/asym/scale:k6", (3, 172), (86 + 5 + 5 + 2) * 8 / 172),
        ("codebook4/channel", (8, 4096), 4 + 16 * 16 / 4096),
        ("codebook2/group128", (8, 256), 2 + 4 * 16 / 128),
        ("codebook3/tensor", (8, 64), 3 + 8 * 16 / 512),
        ("int4/group32/asym", (8, 64), 4 + 24 / 32),
        ("int4/group32", (8, 172), (86 * 8 + 6 * 16) / 172),
        ("mxfp4", (8, 64), 4.25),
        ("nf4/group64/scale:int8", (8, 128), 4 + (2 * 8 + 16) / 128),
        ("int3/channel", (1, 3), (16 + 32) / 3),
        ("int4/group32", (0, 64), 4),
    ],
)
def test_bits_per_value_count_scales_zero_points_and_the_last_byte(
    text: str, shape: tuple[int, int], bits: float
) -> None:
    assert QuantSpec.parse(text).bits_per_value(shape) == pytest.approx(bits)
