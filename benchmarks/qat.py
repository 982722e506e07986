"""Quantization-aware training of ResNet-20 and MobileNetV2 on CIFAR-10: what it recovers.

    python -m benchmarks.qat                                      every cell, three seeds, into benchmarks/results
    python -m benchmarks.qat --cells "resnet20 W4A4:lsq:0"        some of them; results of others are kept
    python -m benchmarks.qat speed                                what a step costs, see benchmarks/qat_speed.py
    python -m benchmarks.qat --quick                              a few steps of each, into build/benchmarks

A cell is NETWORK FORMAT:METHOD:SEED. The 5000 training images of the kit are all that training and calibration see; the
score is that of the converted integer model on the test images. Learning rates and freezing were settled on training
images held out. `ptq` is `nc.quantize` with the same recipe, which is also what training starts from.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import narrowcast as nc
from benchmarks import qat_speed, results_io
from benchmarks.kit import KitModel, mobilenetv2, resnet20
from benchmarks.kit.images import normalize, read_images
from benchmarks.kit.resnet20 import data_folder
from benchmarks.machine import machine

# format -> rule of all layers but the first and the last, which have 8 bits below 8, as is usual
FORMATS: dict[str, dict[str, Any]] = {
    "W8A8": {"weight": "int8/channel", "input": "uint8/channel static:minmax"},
    "W4A4": {"weight": "int4/channel", "input": "uint4/tensor static:mse"},
    "W2A4": {"weight": "int2/channel", "input": "uint4/tensor static:mse"},
}
EDGE = {"weight": "int8/channel", "input": "uint8/tensor static:minmax"}
METHODS = ("ptq", "lsq", "ste")
DISTANCES = {"kl": partial(nc.qat.distill_loss, temperature=2.0), "squared": F.mse_loss}
SEEDS = 3


@dataclass(frozen=True)
class Settings:
    """How one format of one network is trained.

    Attributes:
        epochs: how long.
        distance: of the answers to the float model's: KL divergence at temperature 2, or squared error of the logits.
        lr, range_lr: of weights and of ranges; settled on 1000 of the training images, by how far answers are from the
            float model's, while training on the others.
        batch: images per step.
    """

    epochs: float
    distance: str
    lr: float
    range_lr: float
    batch: int = 128


@dataclass(frozen=True)
class Network:
    """A network that is trained.

    Attributes:
        kit: the model and its scores.
        enlarged: CIFAR images [N, 3, 32, 32], shifted and mirrored, to the network's input.
        edges: names of the first and the last layer.
        settings: format -> how it is trained.
    """

    kit: KitModel
    enlarged: Callable[[Tensor], Tensor]
    edges: tuple[str, str]
    settings: dict[str, Settings]


def _enlarge(images: Tensor) -> Tensor:
    """[N, 3, 32, 32] -> [N, 3, 112, 112] channels last, in which a step of MobileNetV2 takes half the time."""
    large = F.interpolate(images, size=112, mode="bilinear", align_corners=False)
    return large.contiguous(memory_format=torch.channels_last)


NETWORKS = {
    "resnet20": Network(
        resnet20.KIT,
        lambda images: images,
        ("conv1", "linear"),
        {
            "W8A8": Settings(2, "kl", 1e-5, 1e-5),
            "W4A4": Settings(20, "kl", 1e-4, 1e-4),
            "W2A4": Settings(8, "squared", 1e-3, 5e-3),
        },
    ),
    "mobilenetv2": Network(
        mobilenetv2.KIT,
        _enlarge,
        ("stem", "classifier"),
        {"W4A4": Settings(8, "squared", 2e-4, 2e-4, batch=64)},
    ),
}


def recipe(network: str, form: str, train: str) -> dict[str, Any]:
    """The recipe of a format, trained in one way."""
    edges = [] if form == "W8A8" else [{"layers": list(NETWORKS[network].edges), **EDGE}]
    rules = [rule if train == "ptq" else {**rule, "train": train} for rule in [*edges, FORMATS[form]]]
    return {"name": f"{form} {train}", "rule": rules}


def training_images() -> Tensor:
    """All training images of the kit, normalized, [N, 3, 32, 32]."""
    return normalize(read_images(data_folder("resnet20_cifar10") / "cifar10_train_5000.npz")[0])


def batches(images: Tensor, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Augmented images of one epoch: shifted by up to 4 pixels and mirrored; a last batch that is not full is left out.

    Eight images are too few for the statistics of a BatchNorm.
    """
    whole = len(images) // size * size
    for index in torch.randperm(len(images), generator=generator)[:whole].split(size):
        chosen = F.pad(images[index], (4, 4, 4, 4))
        shifts = torch.randint(0, 9, (len(index), 2), generator=generator).tolist()
        mirrored = torch.rand(len(index), generator=generator) < 0.5
        cut = torch.stack([chosen[i, :, y : y + 32, x : x + 32] for i, (y, x) in enumerate(shifts)])
        yield torch.where(mirrored[:, None, None, None], cut.flip(3), cut)


def train_(model: nn.Module, network: Network, settings: Settings, images: Tensor, seed: int) -> None:
    """Distillation from the float model, with AdamW and a cosine schedule; changes `model`.

    Args:
        model: prepared.
        network: which.
        settings: how.
        images: [N, 3, 32, 32] normalized.
        seed: of order and augmentation.
    """
    teacher, generator = network.kit.build(), torch.Generator().manual_seed(seed)
    steps, done = max(1, round(settings.epochs * (len(images) // settings.batch))), 0
    groups = nc.qat.parameter_groups(model, weight_decay=0.0, lr=settings.lr, range_lr=settings.range_lr)
    optimizer = torch.optim.AdamW(groups)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    freeze = nc.qat.FreezeSchedule(batchnorm=0)
    while True:
        for batch in batches(images, settings.batch, generator):
            x = network.enlarged(batch)
            freeze.apply(model.train(), done)
            with torch.no_grad():
                target = teacher(x)
            loss = DISTANCES[settings.distance](model(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
            done += 1
            if done % 20 == 0:
                print(f"  step {done}/{steps} loss {float(loss.detach()):.4f}", flush=True)
            if done == steps:
                return


def cell(name: str, form: str, method: str, seed: int, settings: Settings) -> dict[str, Any]:
    """Train (or only quantize) one format of one network, and score what comes out."""
    kit = NETWORKS[name].kit
    started = time.perf_counter()
    torch.manual_seed(seed)
    if method == "ptq":
        result = nc.quantize(kit.build(), recipe(name, form, method), kit.calibration(), progress=False)
    else:
        model = nc.qat.prepare(kit.build(), recipe(name, form, method), kit.calibration(), progress=False)
        train_(model, NETWORKS[name], settings, training_images(), seed)
        result = nc.qat.convert(model, strict=True)
    seconds = time.perf_counter() - started
    trained = {"epochs": 0} if method == "ptq" else asdict(settings)
    return {"top1": kit.evaluate(result.model, "all")["top1"], "seconds": seconds, **trained}


def page(document: dict[str, Any]) -> str:
    """The results as Markdown."""
    rows, asked = [], [(name, form, method) for name, form in _formats() for method in METHODS]
    for name, form, method in asked:
        found = [v for k, v in sorted(document["cells"].items()) if k.startswith(f"{name} {form}:{method}:")]
        if not found:
            continue
        kit = NETWORKS[name].kit
        float32, images = kit.published["all"]["top1"], kit.sets["all"].stop
        scores = [row["top1"] for row in found]
        spread = f"{statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
        mean, seconds = statistics.mean(scores), statistics.mean(row["seconds"] for row in found)
        interval = 1.96 * math.sqrt(mean * (100 - mean) / images)
        how = {key: value for key, value in found[0].items() if key in ("distance", "lr", "range_lr", "batch")}
        rows.append(
            (name, form, method, len(scores), f"{found[0]['epochs']:g}", f"{mean:.2f}", spread,
             f"{mean - float32:+.2f}", f"{interval:.2f}", f"{seconds:.0f}", ", ".join(f"{k} {how[k]}" for k in how))
        )  # fmt: skip
    header = ("network", "format", "method", "seeds", "epochs", "top-1 %", "spread", "against float32", "95 % +-")
    floats = ", ".join(f"{name} {network.kit.published['all']['top1']}" for name, network in NETWORKS.items())
    sections = [
        f"`python -m benchmarks.qat`. Converted integer models on the test images; float32 has {floats}. Trained on "
        "5000 images, shifted by up to 4 pixels and mirrored, by distillation from the float model with AdamW without "
        "weight decay under a cosine schedule, statistics of BatchNorms frozen. `spread` is the standard deviation "
        "over seeds, `+-` the interval of one score from the number of images.",
        results_io.table((*header, "seconds", "trained with"), rows),
    ]
    return results_io.page("Quantization-aware training", document["machine"], sections)


def _formats() -> list[tuple[str, str]]:
    return [(name, form) for name, network in NETWORKS.items() for form in network.settings]


def every_cell() -> list[str]:
    """All cells."""
    formats = [f"{name} {form}" for name, form in _formats()]
    trained = [f"{form}:{method}:{seed}" for seed in range(SEEDS) for form in formats for method in METHODS[1:]]
    return [*(f"{form}:ptq:0" for form in formats), *trained]


def main(argv: list[str] | None = None) -> int:
    """Runs the cells that are asked for and writes the results after each."""
    given = sys.argv[1:] if argv is None else argv
    if given[:1] == ["speed"]:
        return qat_speed.main(given[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", choices=every_cell(), metavar="CELL", help="some cells only")
    parser.add_argument("--epochs", type=float, help="how long each is trained (default: see NETWORKS)")
    parser.add_argument("--quick", action="store_true", help="a few steps: does it work at all?")
    parser.add_argument("--out", type=Path, help="folder of the results")
    options = parser.parse_args(given)
    if not results_io.available(list(NETWORKS), print):
        return 2
    folder = options.out or results_io.folder_of(not options.quick)
    for name in options.cells or every_cell():
        print(name, flush=True)
        network, form, method, seed = re.split("[ :]", name)
        settings = NETWORKS[network].settings[form]
        epochs = 0.05 if options.quick else options.epochs or settings.epochs
        _keep(folder, name, cell(network, form, method, int(seed), replace(settings, epochs=epochs)))
    return 0


def _keep(folder: Path, name: str, value: dict[str, Any]) -> None:
    """Add one result to the document; those of other cells stay."""
    path = folder / "qat.json"
    document: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"cells": {}}
    facts = machine()
    document |= {"machine": facts}
    document["cells"][name] = value | {"commit": facts["commit"], "date": facts["date"]}
    print(name, value, flush=True)
    results_io.write_results(folder, "qat", document, page(document))


if __name__ == "__main__":
    sys.exit(main())
