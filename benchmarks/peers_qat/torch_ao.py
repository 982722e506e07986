"""torch.ao.quantization: FX for networks that it traces, else each layer behind a QuantStub of its own.

Its default qconfig for x86, whose observers follow moving averages inside of the fake-quantize op. Outputs of linear
layers stay float here, as nothing else in the comparison rounds them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.ao.quantization import (
    FusedMovingAvgObsFakeQuantize,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    QConfig,
    QConfigMapping,
    QuantWrapper,
    prepare_qat,
)
from torch.ao.quantization.quantize_fx import prepare_qat_fx

from benchmarks.kit import KitModel
from benchmarks.peers import UnavailableError
from benchmarks.peers_qat.formats import EDGES, Format, layers


def prepare(model: nn.Module, kit: KitModel, form: Format) -> nn.Module:
    """The model with fake quantization, in training mode."""
    if form.dynamic or form.group or not form.input:
        raise UnavailableError("its QAT has one range per tensor for inputs and one scale per channel for weights")
    if kit.kind == "cnn":
        return _traced(model, kit, form)
    model.train()
    for name, layer in list(layers(model)):
        parent, _, last = name.rpartition(".")
        wrapped: Any = QuantWrapper(layer)
        wrapped.qconfig = _qconfig(form)
        wrapped.module.qconfig = QConfig(activation=nn.Identity, weight=_qconfig(form).weight)
        setattr(model.get_submodule(parent), last, wrapped)
    return prepare_qat(model, inplace=True)


def _traced(model: nn.Module, kit: KitModel, form: Format) -> nn.Module:
    mapping = QConfigMapping().set_global(_qconfig(form))
    for layer in EDGES:
        mapping.set_module_name(layer, _qconfig(form.of(layer)))
    return prepare_qat_fx(model.train(), mapping, (kit.calibration()[0],))


def _qconfig(form: Format) -> QConfig:
    return QConfig(
        activation=FusedMovingAvgObsFakeQuantize.with_args(
            observer=MovingAverageMinMaxObserver, quant_min=0, quant_max=2**form.input - 1, dtype=torch.quint8
        ),
        weight=FusedMovingAvgObsFakeQuantize.with_args(
            observer=MovingAveragePerChannelMinMaxObserver, quant_min=-(2 ** (form.weight - 1)),
            quant_max=2 ** (form.weight - 1) - 1, dtype=torch.qint8, qscheme=torch.per_channel_symmetric,
        ),
    )  # fmt: skip
