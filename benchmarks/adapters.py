"""Low-rank adapters over few-bit weights of stories260K: perplexity before and after training, and after merging.

    python -m benchmarks.adapters                                every cell, into benchmarks/results
    python -m benchmarks.adapters --cells int2/group32:codes     some of them; results of others are kept
    python -m benchmarks.adapters --quick                        a few steps of each, into build/benchmarks
    python -m benchmarks.adapters --cells memory                 what training holds, beside the float model

The base is `nc.quantize` with GPTQ and float activations, the tied table in float. Adapters are trained by distillation
from the float model on the 32 stories that calibration sees; scored are the other 142. Learning rates were chosen by
the loss in training.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import narrowcast as nc
from benchmarks import results_io
from benchmarks.kit.stories260k import CALIBRATION, KIT, stories
from benchmarks.machine import machine

# format and way of merging -> rank, learning rate
CELLS: dict[str, tuple[int, float]] = {
    "int2/group32:requantize": (8, 3e-3),
    "int2/group32:codes": (8, 6e-3),
    "int2/group32/asym:requantize": (8, 3e-3),
    "int2/group32/asym:zero_points": (2, 1e-2),
    "int2/group32/asym:codes": (8, 6e-3),
    "int2/group16/asym/scale:k6:zero_points": (4, 3e-3),
    "int3/group32:requantize": (8, 3e-3),
    "int3/group32:codes": (8, 6e-3),
    "int4/group32:requantize": (8, 3e-3),
    "int4/group32:codes": (8, 6e-3),
}
STEPS, BATCH = 100, 4
WIDTH, LAYERS, TOKENS = 2048, 4, 64


@lru_cache(maxsize=1)
def quantized(spec: str) -> Any:
    """The base of a format."""
    rules = [{"role": "tied", "keep": "it is the table, too"}, {"weight": spec, "method": "gptq"}]
    return nc.quantize(KIT.build(), {"name": spec, "rule": rules}, KIT.calibration(), progress=False)


def perplexity(model: nn.Module) -> float:
    """Of the 142 stories that nothing was trained on."""
    return float(KIT.evaluate(model.eval(), "held_out")["perplexity"])


def train_(model: nn.Module, steps: int, lr: float) -> None:
    """Distillation; changes the adapters of `model`."""
    teacher, generator = KIT.build(), torch.Generator().manual_seed(0)
    ids = [torch.tensor(story) for story in stories()[CALIBRATION]]
    optimizer = torch.optim.Adam([p for p in model.train().parameters() if p.requires_grad], lr=lr)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    done = 0
    while done < steps:
        for rows in torch.randperm(len(ids), generator=generator).split(BATCH):
            chosen = [ids[row] for row in rows.tolist()]
            x = nn.utils.rnn.pad_sequence(chosen, batch_first=True)
            mask = torch.arange(x.shape[1]) < torch.tensor([len(row) for row in chosen])[:, None]
            with torch.no_grad():
                target = teacher(x)[mask]
            loss = nc.qat.distill_loss(model(x)[mask], target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
            done += 1
            if done % 25 == 0:
                print(f"  step {done}/{steps} loss {float(loss.detach()):.4f}", flush=True)
            if done == steps:
                return


def cell(name: str, steps: int) -> dict[str, Any]:
    """Attach, train, merge in every way that there is, and score each."""
    spec, _, merge = name.rpartition(":")
    rank, lr = CELLS[name]
    base = quantized(spec)
    torch.manual_seed(0)
    model = nc.qat.attach_adapters(base, rank=rank, alpha=2.0 * rank, merge=merge)
    started = time.perf_counter()
    train_(model, steps, lr)
    result = {"rank": rank, "lr": lr, "steps": steps, "seconds": time.perf_counter() - started}
    result |= {"quantized": perplexity(base.model), "trained": perplexity(model)}
    result["merged"] = perplexity(nc.qat.merge_adapters(model, KIT.calibration()).model)
    if merge == "requantize":
        solved = nc.qat.merge_adapters(model, KIT.calibration(), method="gptq")
        result["merged_gptq"] = perplexity(solved.model)
    return result


def memory() -> dict[str, Any]:
    """Bytes that a training step keeps for its gradient, of weight tensors and of all, and bytes of the models."""
    torch.manual_seed(0)
    layers = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
    x = torch.randn(TOKENS, WIDTH)
    done = nc.quantize(layers, {"rule": [{"weight": "int4/group32/asym", "method": "rtn"}]}, progress=False)
    models: dict[str, nn.Module] = {"float32": layers}
    models |= {
        merge: nc.qat.attach_adapters(done, rank=8, merge=merge) for merge in ("requantize", "zero_points", "codes")
    }
    found = {}
    for name, model in models.items():
        tensors = {t.data_ptr(): t for t in [*model.parameters(), *model.buffers()]}
        kept: dict[int, int] = {}

        def pack(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(x).sum().backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        found[name] = {
            "model": sum(t.untyped_storage().nbytes() for t in tensors.values()),
            "kept_for_gradient": sum(size for key, size in kept.items() if key not in tensors),
            "gradients_and_adam": sum(3 * p.numel() * p.element_size() for p in trained),
        }
    return found


_SCORES = ("quantized", "trained", "merged", "merged_gptq")


def page(document: dict[str, Any]) -> str:
    """The results as Markdown."""
    rows = []
    for name in CELLS:
        if (found := document["cells"].get(name)) is not None:
            parts = [
                f"{found[key]:.3f}" if key in found else "" for key in ("quantized", "trained", "merged", "merged_gptq")
            ]
            rows.append((*name.rsplit(":", 1), found["rank"], found["steps"], *parts, f"{found['seconds']:.0f}"))
    header = ("weights", "merge", "rank", "steps", "quantized", "with adapters", "merged", "merged by GPTQ", "seconds")
    sections = [
        "`python -m benchmarks.adapters`. stories260K, 35 matrices, perplexity on the 142 stories that nothing was "
        f"trained on; float32 has {KIT.published['held_out']['perplexity']}. Cells that are missing have not been run.",
        results_io.table(header, rows),
    ]
    if document.get("memory"):
        lines = [(name, *(f"{v / 2**20:.1f}" for v in sizes.values())) for name, sizes in document["memory"].items()]
        sections.append(f"{LAYERS} layers of {WIDTH}x{WIDTH}, int4/group32/asym, rank 8, {TOKENS} tokens; MiB:")
        sections.append(results_io.table(("", "model", "kept for the gradient", "gradients and Adam"), lines))
    return results_io.page("Adapters over a frozen quantized base", document["machine"], sections)


def main(argv: list[str] | None = None) -> int:
    """Runs the cells that are asked for and writes the results after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*CELLS, "memory"]
    parser.add_argument("--cells", nargs="+", choices=names, metavar="CELL", default=names, help="some cells only")
    parser.add_argument("--steps", type=int, default=STEPS, help="how long each is trained")
    parser.add_argument("--quick", action="store_true", help="two steps: does it work at all?")
    parser.add_argument("--out", type=Path, help="folder of the results")
    options = parser.parse_args(argv)
    if not results_io.available(["stories260k"], print):
        return 2
    folder = options.out or results_io.folder_of(not options.quick)
    for name in options.cells:
        print(name, flush=True)
        value = memory() if name == "memory" else cell(name, 2 if options.quick else options.steps)
        _keep(folder, name, value)
    return 0


def _keep(folder: Path, name: str, value: dict[str, Any]) -> None:
    """Add one result to the document; those of other cells stay."""
    path = folder / "adapters.json"
    document: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"cells": {}}
    facts = machine()
    document["machine"] = facts
    if name == "memory":
        document["memory"] = value
    else:
        document["cells"][name] = value | {"commit": facts["commit"], "date": facts["date"]}
    print(name, value, flush=True)
    results_io.write_results(folder, "adapters", document, page(document))


if __name__ == "__main__":
    sys.exit(main())
