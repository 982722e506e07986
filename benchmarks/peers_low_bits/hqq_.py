"""hqq: its own linear layer, axis 1, with its default optimizer."""

from __future__ import annotations

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from torch import Tensor

from benchmarks.kit import KitModel
from benchmarks.peers_low_bits.base import BITS, Answers, answers, group_of, weighted, weights_of


class Layer(HQQLinear):
    """hqq's layer with weights to look at; transformers, once imported, gives it empty ones."""

    @property
    def weight(self) -> Tensor:
        """The dequantized weights [out, in]."""
        return self.dequantize()


def quantize(kit: KitModel, form: str, method: str) -> Answers:
    """One cell."""
    model = kit.build()
    before = weights_of(model)
    settings = BaseQuantizeConfig(nbits=BITS[form], group_size=group_of(form), axis=1)
    for name, layer in weighted(model).items():
        replaced = Layer(layer, settings, compute_dtype=torch.float32, device="cpu")
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, replaced)
    return answers(model, before)
