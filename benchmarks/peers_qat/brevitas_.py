"""Brevitas: its quantized layers with learned scales of inputs; weights scaled by their largest values."""

from __future__ import annotations

from typing import Any

import brevitas.nn as quantized
from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerChannelFloat
from brevitas_examples.common.generative.quantizers import (
    IntWeightSymmetricGroupQuant,
    ShiftedUint8DynamicActPerRowFloat,
)
from torch import nn

from benchmarks.kit import KitModel, run
from benchmarks.peers_qat.formats import Format, exchange_

# one scale and zero point per row of the last dimension, as its own language-model example sets them
_BY_ROW: Any = ShiftedUint8DynamicActPerRowFloat.let(
    dynamic_scaling_broadcastable_fn=lambda x, shape: x.view(*shape[:-1], 1), permute_dims=None, stats_reduce_dim=1
)


def prepare(model: nn.Module, kit: KitModel, form: Format) -> nn.Module:
    """The model with quantized layers, scales of inputs found on one batch of calibration data."""
    exchange_(model, lambda name, layer: _layer(layer, form.of(name)))
    run(model.train(), kit.calibration()[0])
    return model


def _layer(layer: Any, form: Format) -> nn.Module:
    weight: Any = Int8WeightPerChannelFloat.let(bit_width=form.weight)
    if form.group:
        weight = IntWeightSymmetricGroupQuant.let(bit_width=form.weight, group_size=form.group)
    inputs: Any = None
    if form.input:
        inputs = _BY_ROW if form.dynamic else Int8ActPerTensorFloat.let(bit_width=form.input)
    named = {"bias": layer.bias is not None, "weight_quant": weight, "input_quant": inputs}
    if isinstance(layer, nn.Conv2d):
        made: Any = quantized.QuantConv2d(
            layer.in_channels, layer.out_channels, layer.kernel_size, stride=layer.stride, padding=layer.padding,
            **named,
        )  # fmt: skip
    else:
        made = quantized.QuantLinear(layer.in_features, layer.out_features, **named)
    made.load_state_dict(layer.state_dict(), strict=False)
    return made
