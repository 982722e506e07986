"""StoredWeight: the layout of a weight in buffers and files, and the way back without loss."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.nn.oracles import noise, record
from tests.nn.test_linear import EVERY_FORMAT
from torch import nn

from narrowcast.core import QuantSpec
from narrowcast.errors import FormatError
from narrowcast.nn import MODULES, InstalledModule, QuantizedModule, StoredWeight


def owner(stored: StoredWeight, tensors: dict[str, torch.Tensor]) -> nn.Module:
    module = nn.Module()
    for suffix, tensor in tensors.items():
        module.register_buffer(f"{stored.name}_{suffix}", tensor)
    return module


@given(spec=st.sampled_from(EVERY_FORMAT), rows=st.integers(1, 9), columns=st.integers(1, 70))
def test_encoding_loses_nothing(spec: str, rows: int, columns: int) -> None:
    stored = StoredWeight("weight", QuantSpec.parse(spec), (rows, columns))
    original = record(noise(rows, columns) * 3, spec)
    tensors = stored.encode(original)
    assert {k: (t.dtype, tuple(t.shape)) for k, t in tensors.items()} == stored.layout()
    assert {k: (t.dtype, tuple(t.shape)) for k, t in stored.empty().items()} == stored.layout()
    module = owner(stored, tensors)
    assert stored.to_record(module) == original
    assert torch.equal(stored.dequantize(module), original.dequantize())


@given(spec=st.sampled_from(EVERY_FORMAT), rows=st.integers(1, 9), columns=st.integers(1, 70))
def test_the_layout_takes_the_bytes_that_the_plan_promises(spec: str, rows: int, columns: int) -> None:
    parsed = QuantSpec.parse(spec)
    layout = StoredWeight("weight", parsed, (rows, columns)).layout()
    stored = sum(torch.empty(shape, dtype=dtype, device="meta").nbytes for dtype, shape in layout.values())
    assert stored == round(parsed.bits_per_value((rows, columns)) * rows * columns / 8)


def test_a_record_of_another_kind_is_refused() -> None:
    stored = StoredWeight("weight", QuantSpec.parse("int8"), (3, 4))
    with pytest.raises(FormatError, match=r"'weight' is int8/channel of shape \(3, 4\), got int4/channel"):
        stored.encode(record(noise(3, 4), "int4"))
    with pytest.raises(FormatError, match=r"got int8/channel of shape \(4, 3\)"):
        stored.encode(record(noise(4, 3), "int8"))


def test_every_kind_of_module_has_a_name_of_its_own() -> None:
    assert all(issubclass(module, InstalledModule) and module.kind == name for name, module in MODULES.items())
    assert {name for name, module in MODULES.items() if issubclass(module, QuantizedModule)} == {
        "Linear", "OutlierLinear", "Conv", "Embedding", "Recurrent", "Experts",
    }  # fmt: skip
