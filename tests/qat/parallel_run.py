"""One process of a data-parallel training run; started by torchrun, or alone. Writes what was trained to a file.

python parallel_run.py FILE KIND        KIND is "ddp" or "fsdp"; without torchrun the whole batch on one process

With "ddp cut" and "fsdp cut" gradients of ranges are so large that they are cut.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import narrowcast as nc

RECIPE = {
    "rule": [
        {"layers": "0", "weight": "int4/channel", "input": "uint8/tensor static:minmax", "method": "rtn"},
        {"weight": "int4/group16/asym", "input": "int8/token", "method": "rtn", "train": "lsq+"},
    ]
}
STEPS, BATCH = 4, 32


def data() -> tuple[Tensor, Tensor]:
    """Inputs and classes."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(STEPS * BATCH, 16, generator=generator), torch.randint(
        0, 4, (STEPS * BATCH,), generator=generator
    )


def prepare(x: Tensor) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    return nc.qat.prepare(layers, RECIPE, [x[:BATCH]], progress=False)


def gathered(model: nn.Module, x: Tensor) -> nn.Module:
    """A sharded model as one that can be converted."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    try:
        nc.qat.convert(model)
    except nc.ModelError as error:
        assert "sharded" in str(error)
    whole = prepare(x)
    whole.load_state_dict(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)), strict=False)
    return whole


def main(file: str, kind: str) -> None:
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    kind, _, cut = kind.partition(" ")
    size = 3.0 if cut else 0.01  # of the loss; with the small one no gradient of a range is cut
    x, y = data()
    prepared = prepare(x)
    model: Any = prepared
    if world > 1:
        dist.init_process_group("gloo")
        if kind == "ddp":
            model = nn.parallel.DistributedDataParallel(prepared)
        else:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh("cpu", (world,))
            for index in (0, 2):
                fully_shard(model[index], mesh=mesh)
            fully_shard(model, mesh=mesh)
        if cut:
            nc.qat.sync_ranges(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1 / size, momentum=0.9)
    for step in range(STEPS):
        if step == STEPS - 1:
            nc.qat.FreezeSchedule(ranges=0).apply(model, 0)
        rows = torch.arange(step * BATCH, (step + 1) * BATCH)[rank::world]
        optimizer.zero_grad()
        (size * nn.functional.cross_entropy(model(x[rows]), y[rows])).backward()
        if world == 1:
            factors = [p.grad for name, p in model.named_parameters() if name.endswith("factor")]
            assert max(float(g.abs().max()) for g in factors if g is not None) == 1.0 or not cut or step == STEPS - 1
        optimizer.step()
    converted = nc.qat.convert(gathered(model, x) if world > 1 and kind == "fsdp" else model)
    if rank == 0:
        modules = {path: m for path, m in converted.model.named_modules() if hasattr(m, "quantized_weights")}
        tensors = {}
        for path, module in modules.items():
            record = module.quantized_weights()["weight"]
            tensors |= {f"{path} codes": record.codes, f"{path} scale": record.scale}
            if module.input_scale is not None:
                tensors[f"{path} input"] = module.input_scale
        torch.save(tensors | {"answer": converted.model(x).detach()}, file)
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
