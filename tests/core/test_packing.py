"""The bit order, written down once more in plain Python, and against the packer of compressed-tensors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from narrowcast.core import FORMATS, NumberFormat, pack, packed_width, unpack
from narrowcast.errors import FormatError

PACKED = [row.name for row in FORMATS.values() if row.bits < 8]


def random_codes(row: NumberFormat, rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    fields = torch.randint(0, 2**row.bits, (rows, columns), generator=generator)
    return (fields + (int(row.low) if row.kind == "int" else 0)).to(row.storage)


def pack_bit_by_bit(codes: torch.Tensor, row: NumberFormat) -> torch.Tensor:
    """The definition: bit b of field i is bit (i * bits + b) of the row's stream."""
    offset = int(row.low) if row.kind == "int" else 0
    packed = torch.zeros(codes.shape[0], packed_width(codes.shape[1], row.bits), dtype=torch.uint8)
    for line, values in enumerate(codes.tolist()):
        stream = sum((value - offset) << (index * row.bits) for index, value in enumerate(values))
        width = packed.shape[1]
        packed[line] = torch.tensor(list(stream.to_bytes(width, "little")), dtype=torch.uint8)
    return packed


@given(st.sampled_from(PACKED), st.integers(0, 4), st.integers(0, 33), st.integers(0, 5))
def test_packing_follows_the_definition_and_unpacking_undoes_it(name: str, rows: int, columns: int, seed: int) -> None:
    row = FORMATS[name]
    codes = random_codes(row, rows, columns, seed)
    packed = pack(codes, row)
    assert torch.equal(packed, pack_bit_by_bit(codes, row))
    assert packed.is_contiguous()
    again = unpack(packed, row, columns)
    assert again.dtype == row.storage
    assert again.is_contiguous()
    assert torch.equal(again, codes)


def test_int4_has_element_0_in_the_low_nibble_and_8_for_zero() -> None:
    codes = torch.tensor([[0, 7, -8, -1, 3]], dtype=torch.int8)
    assert pack(codes, FORMATS["int4"]).tolist() == [[0xF8, 0x70, 0x0B]]


def test_codebook_indices_are_packed_as_they_are() -> None:
    codes = torch.tensor([[0, 15, 8, 1]], dtype=torch.uint8)
    assert pack(codes, FORMATS["nf4"]).tolist() == [[0xF0, 0x18]]


@pytest.mark.parametrize("name", PACKED)
def test_a_view_that_is_not_contiguous_packs_as_its_copy(name: str) -> None:
    row = FORMATS[name]
    codes = random_codes(row, 12, 9).t()[:, ::2]
    packed = pack(codes, row)
    assert torch.equal(packed, pack(codes.contiguous(), row))
    wide = torch.stack([packed, packed], dim=-1).flatten(1)[:, ::2]
    assert torch.equal(unpack(wide, row, codes.shape[1]), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
def test_int_packing_is_that_of_compressed_tensors(bits: int) -> None:
    helpers = pytest.importorskip(
        "compressed_tensors.compressors.pack_quantized.helpers", reason="compressed-tensors is not installed"
    )
    row = FORMATS[f"int{bits}"]
    codes = random_codes(row, 5, 64)
    words = helpers.pack_to_int32(codes, bits)
    assert torch.equal(pack(codes, row), words.contiguous().view(torch.uint8))


@pytest.mark.parametrize(("name", "low", "high"), [("int4", -8, 7), ("uint4", 0, 15), ("int2", -2, 1), ("nf4", 0, 15)])
def test_a_code_outside_the_format_is_an_error(name: str, low: int, high: int) -> None:
    row = FORMATS[name]
    outside = [high + 1] if row.storage == torch.uint8 else [high + 1, low - 1, 127, -128]
    for code in outside:
        with pytest.raises(FormatError, match=f"{name}: a code is outside {low}..{high}"):
            pack(torch.tensor([[code]]).to(row.storage), row)


@pytest.mark.parametrize("name", ["int8", "uint8", "fp8_e4m3", "fp16"])
def test_formats_of_whole_bytes_are_not_packed(name: str) -> None:
    row = FORMATS[name]
    with pytest.raises(FormatError, match="stored as it is"):
        pack(torch.zeros(1, 4).to(row.storage), row)
    with pytest.raises(FormatError, match="stored as it is"):
        unpack(torch.zeros(1, 4, dtype=torch.uint8), row, 4)


@pytest.mark.parametrize(
    "codes", [torch.zeros(4, dtype=torch.int8), torch.zeros(2, 4), torch.zeros(1, 2, 3).to(torch.int8)]
)
def test_only_a_matrix_of_codes_can_be_packed(codes: torch.Tensor) -> None:
    with pytest.raises(FormatError, match=r"int4: pack takes a matrix of torch\.int8, got"):
        pack(codes, FORMATS["int4"])


@pytest.mark.parametrize(
    "packed", [torch.zeros(2, 3), torch.zeros(2, 4, dtype=torch.uint8), torch.zeros(3, dtype=torch.uint8)]
)
def test_bytes_that_do_not_belong_to_the_width_are_an_error(packed: torch.Tensor) -> None:
    with pytest.raises(FormatError, match="5 codes in a row pack into 3 bytes"):
        unpack(packed, FORMATS["int4"], 5)
