"""Quantization-aware training of ResNet-20 on CIFAR-10: what it recovers.

    python -m benchmarks.qat                             every cell, three seeds, into benchmarks/results
    python -m benchmarks.qat --cells W4A4:lsq:0          some of them; results of others are kept
    python -m benchmarks.qat speed                       what a step costs, see benchmarks/qat_speed.py
    python -m benchmarks.qat --quick                     a few steps of each, into build/benchmarks

A cell is FORMAT:METHOD:SEED. The 5000 training images of the kit are all that training and calibration see; the score
is that of the converted integer model on the 5000 test images. Learning rates and freezing were settled on training
images held out. `ptq` is `nc.quantize` with the same recipe, which is also what training starts from.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import narrowcast as nc
from benchmarks import qat_speed, results_io
from benchmarks.kit.images import normalize, read_images
from benchmarks.kit.resnet20 import KIT, data_folder
from benchmarks.machine import machine

_EDGES = [
    {"layers": ["conv1", "linear"], "weight": "int8/channel", "input": "uint8/tensor static:minmax"},
]
# format -> rules; first and last layer in 8 bits below 8, as is usual
FORMATS: dict[str, list[dict[str, Any]]] = {
    "W8A8": [{"weight": "int8/channel", "input": "uint8/channel static:minmax"}],
    "W4A4": [*_EDGES, {"weight": "int4/channel", "input": "uint4/tensor static:mse"}],
    "W2A4": [*_EDGES, {"weight": "int2/channel", "input": "uint4/tensor static:mse"}],
}
METHODS = ("ptq", "lsq", "ste")
SETTINGS: dict[str, Any] = {
    "batch": 128, "optimizer": "AdamW", "weight_decay": 0.0, "schedule": "cosine",
    "augmentation": "shift by up to 4 pixels, mirror",
    # of the answers to the float model's: KL divergence at temperature 2, or squared error of the logits
    "distance": {"W8A8": "kl", "W4A4": "kl", "W2A4": "squared"},
    # settled on 1000 of the training images, by how far answers are from the float model's; trained on the others
    "lr": {"W8A8": 1e-5, "W4A4": 1e-4, "W2A4": 1e-3},
    "range_lr": {"W8A8": 1e-5, "W4A4": 1e-4, "W2A4": 5e-3},
    "epochs": {"W8A8": 2, "W4A4": 20, "W2A4": 8},
    # share of the steps after which BatchNorms keep their statistics
    "batchnorm_frozen_from": {"W8A8": 0.0, "W4A4": 0.0, "W2A4": 0.0},
}  # fmt: skip
DISTANCES = {"kl": partial(nc.qat.distill_loss, temperature=2.0), "squared": F.mse_loss}
SEEDS = 3


def recipe(name: str, train: str) -> dict[str, Any]:
    """The recipe of a format, trained in one way."""
    rules = [rule if train == "ptq" else {**rule, "train": train} for rule in FORMATS[name]]
    return {"name": f"{name} {train}", "rule": rules}


def training_images() -> tuple[Tensor, Tensor]:
    """All training images of the kit as network input [N, 3, 32, 32], and their labels."""
    images, labels = read_images(data_folder("resnet20_cifar10") / "cifar10_train_5000.npz")
    return normalize(images), labels


def batches(images: Tensor, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """(augmented images, their indices) of one epoch; a last batch that is not full is left out.

    Eight images are too few for the statistics of a BatchNorm.
    """
    whole = len(images) // size * size
    for index in torch.randperm(len(images), generator=generator)[:whole].split(size):
        chosen = F.pad(images[index], (4, 4, 4, 4))
        shifts = torch.randint(0, 9, (len(index), 2), generator=generator).tolist()
        mirrored = torch.rand(len(index), generator=generator) < 0.5
        cut = torch.stack([chosen[i, :, y : y + 32, x : x + 32] for i, (y, x) in enumerate(shifts)])
        yield torch.where(mirrored[:, None, None, None], cut.flip(3), cut), index


def train_(model: nn.Module, name: str, seed: int, epochs: float) -> None:
    """Distillation from the float model; changes `model`.

    Args:
        model: prepared.
        name: of its format.
        seed: of order and augmentation.
        epochs: how long; below 1 a part of an epoch.
    """
    images, _ = training_images()
    teacher, generator = KIT.build(), torch.Generator().manual_seed(seed)
    per_epoch = len(images) // SETTINGS["batch"]
    steps, done = max(1, round(epochs * per_epoch)), 0
    rates = {key: SETTINGS[key][name] for key in ("lr", "range_lr")}
    optimizer = torch.optim.AdamW(nc.qat.parameter_groups(model, weight_decay=SETTINGS["weight_decay"], **rates))
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    freeze = nc.qat.FreezeSchedule(batchnorm=round(SETTINGS["batchnorm_frozen_from"][name] * steps))
    while done < steps:
        for x, _ in batches(images, SETTINGS["batch"], generator):
            freeze.apply(model.train(), done)
            with torch.no_grad():
                target = teacher(x)
            loss = DISTANCES[SETTINGS["distance"][name]](model(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
            done += 1
            if done % 20 == 0:
                print(f"  step {done}/{steps} loss {float(loss.detach()):.4f}", flush=True)
            if done == steps:
                return


def cell(name: str, method: str, seed: int, epochs: float) -> dict[str, Any]:
    """Train (or only quantize) one format, and score what comes out."""
    started = time.perf_counter()
    torch.manual_seed(seed)
    if method == "ptq":
        result = nc.quantize(KIT.build(), recipe(name, method), KIT.calibration(), progress=False)
    else:
        model = nc.qat.prepare(KIT.build(), recipe(name, method), KIT.calibration(), progress=False)
        train_(model, name, seed, epochs)
        result = nc.qat.convert(model, strict=True)
    seconds = time.perf_counter() - started
    scores = KIT.evaluate(result.model, "all")
    return {"top1": scores["top1"], "seconds": seconds, "epochs": 0 if method == "ptq" else epochs}


def page(document: dict[str, Any]) -> str:
    """The results as Markdown."""
    float32 = KIT.published["all"]["top1"]
    rows = []
    for name in FORMATS:
        for method in METHODS:
            found = [v for k, v in sorted(document["cells"].items()) if k.startswith(f"{name}:{method}:")]
            if not found:
                continue
            scores = [row["top1"] for row in found]
            spread = f"{statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
            mean, seconds = statistics.mean(scores), statistics.mean(row["seconds"] for row in found)
            interval = 1.96 * math.sqrt(mean * (100 - mean) / 5000)
            epochs = f"{found[0]['epochs']:g}"
            rows.append(
                (name, method, len(scores), epochs, f"{mean:.2f}", spread, f"{mean - float32:+.2f}", f"{interval:.2f}",
                 f"{seconds:.0f}")
            )  # fmt: skip
    header = ("format", "method", "seeds", "epochs", "top-1 %", "spread", "against float32", "95 % +-", "seconds")
    sections = [
        f"`python -m benchmarks.qat`. Converted integer models on 5000 test images; float32 has {float32}. Trained on "
        f"5000 images by distillation, settings {json.dumps(document['settings'])}. `spread` is the standard deviation "
        "over seeds, `+-` the interval of one score from the number of images.",
        results_io.table(header, rows),
    ]
    return results_io.page("Quantization-aware training", document["machine"], sections)


def every_cell() -> list[str]:
    """All cells."""
    trained = [f"{name}:{method}:{seed}" for seed in range(SEEDS) for name in FORMATS for method in METHODS[1:]]
    return [*(f"{name}:ptq:0" for name in FORMATS), *trained]


def main(argv: list[str] | None = None) -> int:
    """Runs the cells that are asked for and writes the results after each."""
    given = sys.argv[1:] if argv is None else argv
    if given[:1] == ["speed"]:
        return qat_speed.main(given[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", choices=every_cell(), metavar="CELL", help="some cells only")
    parser.add_argument("--epochs", type=float, help="how long each is trained (default: see SETTINGS)")
    parser.add_argument("--quick", action="store_true", help="a few steps: does it work at all?")
    parser.add_argument("--out", type=Path, help="folder of the results")
    options = parser.parse_args(given)
    if not results_io.available(["resnet20"], print):
        return 2
    folder = options.out or results_io.folder_of(not options.quick)
    for name in options.cells or every_cell():
        print(name, flush=True)
        kind, method, seed = _parts(name)
        epochs = 0.05 if options.quick else options.epochs or SETTINGS["epochs"][kind]
        _keep(folder, name, cell(kind, method, seed, epochs))
    return 0


def _parts(name: str) -> tuple[str, str, int]:
    kind, method, seed = name.split(":")
    return kind, method, int(seed)


def _keep(folder: Path, name: str, value: dict[str, Any]) -> None:
    """Add one result to the document; those of other cells stay."""
    path = folder / "qat.json"
    document: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"cells": {}}
    facts = machine()
    document |= {"machine": facts, "settings": SETTINGS}
    document["cells"][name] = value | {"commit": facts["commit"], "date": facts["date"]}
    print(name, value, flush=True)
    results_io.write_results(folder, "qat", document, page(document))


if __name__ == "__main__":
    sys.exit(main())
