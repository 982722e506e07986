"""Trained networks: what evaluation mode computes is what conversion installs, layer by layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from benchmarks.kit import MissingDataError, kit_model
from tests.parity.models import with_other_scale

import narrowcast as nc

RULES: dict[str, Any] = {
    "resnet20": {"fuse": False, "rule": [
        {"weight": "int4/channel", "input": "uint4/tensor static:minmax", "method": "rtn"}]},
    "stories260k": {"fuse": False, "rule": [{"weight": "int4/group32", "input": "int8/token", "method": "rtn"}]},
}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_a_trained_network_is_converted_bit_for_bit_and_a_fault_in_it_is_found(name: str) -> None:
    try:
        kit = kit_model(name)
        model, calibration = kit.build(), kit.calibration()
    except MissingDataError as missing:
        pytest.skip(str(missing))
    batches = [batch[:8] for batch in calibration[:2] if isinstance(batch, torch.Tensor)]
    made = nc.qat.prepare(model, RULES[name], batches[:1], progress=False)
    made(batches[0]).square().mean().backward()
    torch.optim.SGD(nc.qat.parameter_groups(made), lr=1e-4).step()
    converted = nc.qat.convert(made).model
    parity = nc.verify(made, converted, batches)
    assert parity.equal, str(parity)
    assert len(parity.layers) >= 20

    middle = [layer.layer for layer in parity.layers if "Trained" in layer.type][10]
    faulty = nc.verify(converted, with_other_scale(converted, middle, 1.5), batches)
    assert not faulty.ok and faulty.first_difference == faulty.first_beyond == middle
    later = [layer for layer in faulty.layers if layer.layer != middle]
    assert all(layer.alone is not None and layer.alone.equal for layer in later)
    assert "in weight scale" in next(layer.reason for layer in faulty.layers if layer.layer == middle)
