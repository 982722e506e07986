"""QuantizedTensor: what a record accepts, what it means, and that other readers of its codes see the same numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from narrowcast.core import QuantizedTensor, QuantSpec, dequantize, quantize
from narrowcast.errors import FormatError


def test_dequantize_is_the_equation() -> None:
    spec = QuantSpec.parse("int4/group2/asym")
    codes = torch.tensor([[-8, 7, 0, 3]], dtype=torch.int8)
    record = QuantizedTensor(codes, torch.tensor([[0.5, 2.0]]), torch.tensor([[-8, 1]], dtype=torch.int32), spec)
    assert dequantize(record).tolist() == [[0.0, 7.5, -2.0, 4.0]]


def test_a_record_that_does_not_fit_its_spec_cannot_be_made() -> None:
    good = quantize(torch.ones(2, 8), QuantSpec.parse("int4/group4/asym"))
    assert good.scale is not None
    with pytest.raises(FormatError, match=r"codes are a matrix of torch\.int8, got torch\.int32"):
        QuantizedTensor(good.codes.int(), good.scale, good.zero_point, good.spec)
    with pytest.raises(
        FormatError, match=r"torch\.float32 scales of shape \(2, 2\), got torch\.float32 of shape \(2, 1\)"
    ):
        QuantizedTensor(good.codes, good.scale[:, :1], good.zero_point, good.spec)
    with pytest.raises(FormatError, match=r"zero points of shape .*, got none"):
        QuantizedTensor(good.codes, good.scale, None, good.spec)


def test_records_are_equal_when_all_their_bits_are() -> None:
    spec = QuantSpec.parse("fp8_e4m3/channel")
    one, same, other = (quantize(torch.full((2, 2), value), spec) for value in (1.0, 1.0, 2.0))
    assert one == same
    assert one != other
    assert one != "fp8_e4m3/channel"


@pytest.mark.parametrize("text", ["int8/group32/scale:fp16", "int4/group32"])
def test_gguf_reads_our_codes_as_the_same_numbers(text: str) -> None:
    gguf = pytest.importorskip(
        "gguf", reason="the gguf package is not installed; it is the oracle for its block formats"
    )
    torch.manual_seed(0)
    record = quantize(torch.randn(4, 64), QuantSpec.parse(text))
    assert record.scale is not None
    codes, scale = record.codes.reshape(-1, 32).numpy(), record.scale.half().numpy().reshape(-1, 1).view(np.uint8)
    if text.startswith("int8"):
        kind, body = gguf.GGMLQuantizationType.Q8_0, codes.view(np.uint8)
    else:
        kind, fields = gguf.GGMLQuantizationType.Q4_0, (codes + 8).astype(np.uint8)
        body = fields[:, :16] | (fields[:, 16:] << 4)
    theirs = gguf.quants.dequantize(np.concatenate([scale, body], 1), kind)
    assert np.array_equal(theirs.reshape(4, 64), record.dequantize().numpy())


def test_gguf_reads_our_mxfp4_as_the_same_numbers() -> None:
    gguf = pytest.importorskip("gguf", reason="the gguf package is not installed; it is the oracle for MXFP4")
    torch.manual_seed(0)
    record = quantize(torch.randn(4, 64) * 10.0 ** torch.linspace(-20, 20, 4)[:, None], QuantSpec.parse("mxfp4"))
    assert record.scale is not None
    exponents = (record.scale.log2() + 127).to(torch.uint8).reshape(-1, 1).numpy()
    fields = record.codes.reshape(-1, 32).numpy()
    blocks = np.concatenate([exponents, fields[:, :16] | (fields[:, 16:] << 4)], 1)
    theirs = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.MXFP4)
    assert np.array_equal(theirs.reshape(4, 64), record.dequantize().numpy())
