"""Activation: how a module treats its input, as a record."""

from __future__ import annotations

import pytest
import torch

from narrowcast.core import QuantSpec
from narrowcast.errors import FormatError
from narrowcast.nn import FLOAT, Activation, activation_spec


@pytest.mark.parametrize(("spec", "mode"), [
    ("fp16", "cast"), ("bf16", "cast"), ("int8/token", "dynamic"), ("uint8/token", "asymmetric"),
    ("uint8/tensor", "static"),
    ("uint8/channel", "static"), ("uint4/tensor", "static"), ("uint4/channel", "static"),
])  # fmt: skip
def test_the_spec_decides_the_mode(spec: str, mode: str) -> None:
    assert Activation(activation_spec(spec)).mode == mode
    assert FLOAT.mode == "float"


@pytest.mark.parametrize("spec", [
    "int8", "int8/tensor", "int4/token", "int8/token/asym", "uint8/group32", "nf4/group32", "fp8_e4m3", "uint4/token",
])  # fmt: skip
def test_inputs_that_no_kernel_takes_are_refused_with_those_that_are(spec: str) -> None:
    with pytest.raises(
        FormatError, match=r"no kernel takes such activations; use 'uint8/token' or 'int8/token'.*uint8/tensor static"
    ):
        activation_spec(spec)


def test_text_that_is_no_spec_is_refused() -> None:
    with pytest.raises(FormatError, match="int9"):
        activation_spec("int9/token")


@pytest.mark.parametrize("channels", [0, 1, 5])
def test_settings_say_all_but_the_numbers(channels: int) -> None:
    spec = QuantSpec.parse("uint8/channel" if channels else "int8/token")
    scale = torch.rand(channels) if channels else None
    activation = Activation(spec, scale, None if scale is None else torch.zeros(channels, dtype=torch.uint8))
    again = Activation.from_dict(activation.to_dict())
    assert again.mode == activation.mode and again.spec == spec
    if scale is not None:
        assert again.scale.is_meta and again.scale.shape == scale.shape and again.zero_point.dtype == torch.uint8
    assert Activation.from_dict(FLOAT.to_dict()).mode == "float"


def test_the_ratio_is_relative_to_the_widest_channel() -> None:
    spec = QuantSpec.parse("uint8/channel")
    activation = Activation(spec, torch.tensor([0.5, 2.0, 1.0]), torch.zeros(3, dtype=torch.uint8))
    assert activation.ratio().tolist() == [0.25, 1.0, 0.5]
    assert Activation(spec, torch.tensor([0.5]), torch.zeros(1, dtype=torch.uint8)).ratio() is None
    assert FLOAT.ratio() is None
