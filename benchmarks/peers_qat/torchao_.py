"""torchao's QAT: its fake-quantized linear layers, with the bits of the format."""

from __future__ import annotations

import torch
from torch import nn
from torchao.quantization import quantize_
from torchao.quantization.granularity import PerAxis, PerGroup, PerToken
from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

from benchmarks.kit import KitModel
from benchmarks.peers import UnavailableError
from benchmarks.peers_qat.formats import Format

_DTYPES = {8: torch.int8, 4: torch.int4}


def prepare(model: nn.Module, kit: KitModel, form: Format) -> nn.Module:
    """The model with fake-quantized linear layers."""
    if kit.kind == "cnn":
        raise UnavailableError("its QAT has linear and embedding layers alone, no convolutions")
    if form.input and not form.dynamic:
        raise UnavailableError("its QAT finds integer ranges of inputs at run time alone")
    granularity = PerGroup(form.group) if form.group else PerAxis(0)
    weight = IntxFakeQuantizeConfig(_DTYPES[form.weight], granularity=granularity, is_symmetric=True)
    inputs = None
    if form.input:
        inputs = IntxFakeQuantizeConfig(_DTYPES[form.input], granularity=PerToken(), is_symmetric=False)
    quantize_(model, QATConfig(activation_config=inputs, weight_config=weight, step="prepare"))
    return model
