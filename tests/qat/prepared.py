"""Models prepared for training, and what makes two passes of one model comparable."""

from __future__ import annotations

from typing import Any

import torch
from tests.pipeline.models import example
from torch import Tensor, nn

import narrowcast as nc

STATIC, CHANNELS = "uint8/tensor static:minmax", "uint8/channel static:minmax"
TABLE = {"type": "Embedding", "weight": "int8/channel/asym", "optional": True}
# model, format of weights, treatment of inputs: what kernels run between them, tied weights, group scales, attention
CASES = (
    ("cnn", "int8/channel", CHANNELS), ("cnn", "int4/channel", STATIC), ("cnn", "int4/channel", "int8/token"),
    ("cnn", "int2/channel", None), ("transformer", "int8/channel", "uint8/token"),
    ("transformer", "int4/group32/asym", "int8/token"), ("lstm", "int8/channel", "int8/token"),
    ("lstm", "int4/group16", None), ("tied", "int8/channel", STATIC), ("tied", "int4/group32", "int8/token"),
    ("cnn", "bf16", "bf16"), ("transformer", "nf4/group32", None),
)  # fmt: skip


def recipe(name: str, weight: str, given: str | None, *, train: str = "lsq", **more: Any) -> dict[str, Any]:
    """A recipe with one rule for all layers, tables in int8 where they are not tied; no solver, nothing fused."""
    rule = {"weight": weight, "train": train, "method": "rtn"} | ({} if given is None else {"input": given})
    return {"name": "trained", "fuse": False, "rule": [*([] if name == "tied" else [TABLE]), rule], **more}


def prepared(name: str, weight: str, given: str | None, **more: Any) -> tuple[nn.Module, Tensor]:
    """A prepared model without dropout, and its data."""
    model, x = example(name)
    made = nc.qat.prepare(model, recipe(name, weight, given, **more), x.split(16), progress=False)
    for module in made.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return made, x


def train_(model: nn.Module, x: Tensor, steps: int = 8, lr: float = 0.02) -> list[float]:
    """Some steps towards random classes; the losses."""
    model.train()
    optimizer = torch.optim.Adam(nc.qat.parameter_groups(model), lr=lr)
    out = model(x)
    target = torch.randint(0, out.shape[-1], out.shape[:-1], generator=torch.Generator().manual_seed(1)).flatten()
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x).flatten(0, -2), target)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@torch.no_grad()
def answer(model: nn.Module, x: Tensor) -> Tensor:
    """What the model says in evaluation mode."""
    out: Tensor = model.eval()(x)
    return out
