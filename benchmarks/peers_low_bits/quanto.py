"""optimum-quanto: `quantize`, calibration, `freeze`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from optimum.quanto import Calibration, HqqOptimizer, freeze, qint2, qint4, qint8
from optimum.quanto import quantize as quanto_quantize
from torch import Tensor, nn

from benchmarks.kit import KitModel, run
from benchmarks.peers_low_bits.base import BITS, Answers, answers, group_of, weighted, weights_of

TYPES = {8: qint8, 4: qint4, 2: qint2}


def answering(model: nn.Module) -> Callable[..., Any]:
    """The model outside of inference mode, which its packed weights do not bear."""

    def call(*arguments: Tensor, **named: Tensor) -> Any:
        with torch.inference_mode(False), torch.no_grad():
            return model(*(x.clone() for x in arguments), **{name: x.clone() for name, x in named.items()})

    return call


def quantize(kit: KitModel, form: str, method: str) -> Answers:
    """One cell; a row that 32 does not divide gets one scale."""
    model = kit.build()
    before = weights_of(model)
    static = {"activations": qint8} if form == "W8A8 static" else {}
    chosen = {"optimizer": HqqOptimizer()} if method == "hqq" else {}
    quanto_quantize(model, weights=TYPES[BITS[form]], include=list(before), **static, **chosen)
    group = group_of(form)
    whole = 0
    for name in weighted(model):
        layer = model.get_submodule(name)
        if BITS[form] < 8:
            fits = group is not None and layer.weight[0].numel() % group == 0
            layer.weight_group_size = group if fits else None
            whole += group is not None and not fits
    if static:
        with torch.no_grad(), Calibration():
            for batch in kit.calibration():
                run(model, batch)
    freeze(model)
    result = answers(model, before, answering(model))
    result.notes += [f"{whole} layers with one scale per row: 32 does not divide them"] if whole else []
    return result
