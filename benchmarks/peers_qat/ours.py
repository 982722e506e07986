"""narrowcast's own contenders: float, and each way to train ranges."""

from __future__ import annotations

from typing import Any

from torch import nn

import narrowcast as nc
from benchmarks.kit import KitModel
from benchmarks.peers_qat.formats import EDGES, Format


def prepare(model: nn.Module, kit: KitModel, form: Format, train: str) -> nn.Module:
    """The model as `nc.qat.prepare` makes it, rounded to nearest: a step costs the same after any solver."""
    rules = [_rule(form, train) | {"optional": True}]
    if kit.kind == "cnn" and form.weight < 8:
        rules.insert(0, {"layers": list(EDGES), **_rule(form.of(EDGES[0]), train)})
    if kit.kind != "cnn":
        rules.insert(0, {"role": "embedding", "keep": "the other tools leave it float"})
    recipe = {"name": train, "rule": rules}
    return nc.qat.prepare(model, recipe, kit.calibration()[:4], progress=False)


def _rule(form: Format, train: str) -> dict[str, Any]:
    rule = {"weight": f"int{form.weight}/{f'group{form.group}' if form.group else 'channel'}", "method": "rtn"}
    if form.input:
        # torchao's rows always have a zero point; weights of 4 bits in groups are multiplied by rows without one alone
        row = "int8/token" if form.group else "uint8/token"
        rule["input"] = row if form.dynamic else f"uint{form.input}/tensor static:minmax"
    return rule | {"train": train}
