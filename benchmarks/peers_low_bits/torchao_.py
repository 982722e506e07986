"""torchao: `quantize_` with its integer configurations."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    IntxWeightOnlyConfig,
    MappingType,
    PerAxis,
    PerGroup,
    quantize_,
)

from benchmarks.kit import KitModel
from benchmarks.peers_low_bits.base import BITS, Answers, answers, group_of, weighted, weights_of


def configuration(form: str, method: str) -> Any:
    """The configuration of one cell."""
    if form == "W8A8 dynamic":
        return Int8DynamicActivationInt8WeightConfig()
    dtype = getattr(torch, f"int{BITS[form]}")
    group = group_of(form)
    granularity = PerGroup(group) if group else PerAxis(0)
    if form == "W4A8":
        return Int8DynamicActivationIntxWeightConfig(
            weight_dtype=dtype, weight_granularity=granularity, weight_mapping_type=MappingType.ASYMMETRIC
        )
    if method == "rtn":
        return IntxWeightOnlyConfig(weight_dtype=dtype, granularity=granularity, mapping_type=MappingType.ASYMMETRIC)
    return IntxWeightOnlyConfig(
        weight_dtype=dtype, granularity=granularity, intx_choose_qparams_algorithm="hqq_scale_only"
    )


def refusal(model: nn.Module, name: str, form: str, method: str) -> str | None:
    """Quantizes one layer in place; torchao's message where it refuses to."""
    try:
        quantize_(model, configuration(form, method), filter_fn=lambda _, full: full == name)
    except (AssertionError, ValueError, RuntimeError) as error:
        return str(error)
    return None


def quantize(kit: KitModel, form: str, method: str) -> Answers:
    """One cell; a layer that torchao refuses stays float32 and is named with torchao's message."""
    model = kit.build()
    before = weights_of(model)
    refused = [message for name in weighted(model) if (message := refusal(model, name, form, method))]
    result = answers(model, before)
    result.notes += [f"{len(refused)} layers refused: {message}" for message in sorted(set(refused))]
    return result
