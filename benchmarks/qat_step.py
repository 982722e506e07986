"""One contender of `python -m benchmarks.qat speed`: a process that does training steps when it is asked to.

    python -m benchmarks.qat_step TOOL MODEL FORMAT            one line of JSON on stdin asks, one on stdout answers
    python -m benchmarks.qat_step TOOL MODEL FORMAT --memory   prints what a step needs and ends

Same model, weights, batch, loss and optimizer (SGD with momentum) for every tool; dropout is off.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import sys
import time
import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.first_answer import memory_mib, reset_peak
from benchmarks.kit import KitModel, kit_model, run
from benchmarks.kit.images import normalize, read_images
from benchmarks.kit.resnet20 import data_folder
from benchmarks.peers_qat.formats import FORMATS, Format

IMAGES, SENTENCES = 128, (16, 64)


def contender(tool: str, kit: KitModel, form: Format) -> nn.Module:
    """The model as a tool prepares it for training."""
    model = kit.build()
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    if tool == "float32":
        return model
    if tool.startswith("narrowcast "):
        made: nn.Module = import_module("benchmarks.peers_qat.ours").prepare(model, kit, form, tool.split()[1])
        return made
    module = {"torch.ao": "torch_ao", "torchao": "torchao_", "Brevitas": "brevitas_"}[tool]
    peer: nn.Module = import_module(f"benchmarks.peers_qat.{module}").prepare(model, kit, form)
    return peer


def stepper(model: nn.Module, kit: KitModel) -> tuple[Callable[[], None], torch.optim.Optimizer]:
    """One training step, and its optimizer."""
    optimizer = torch.optim.SGD(model.train().parameters(), lr=1e-4, momentum=0.9)
    loss = _loss_of(kit)

    def step() -> None:
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()

    return step, optimizer


def _loss_of(kit: KitModel) -> Callable[[nn.Module], Tensor]:
    if kit.kind == "cnn":
        images, labels = read_images(data_folder("resnet20_cifar10") / "cifar10_train_5000.npz")
        x, y = normalize(images[:IMAGES]), labels[:IMAGES].clone()
        return lambda model: F.cross_entropy(model(x), y)
    batch: Any = kit.example(SENTENCES)
    target = torch.randn(*SENTENCES, 384, generator=torch.Generator().manual_seed(0))
    return lambda model: F.mse_loss(run(model, batch).last_hidden_state, target)


def milliseconds(step: Callable[[], None], least_seconds: float) -> dict[str, list[float]]:
    """Times of at least two steps that fill that many seconds: of the processor for this process, and of the clock."""
    times: dict[str, list[float]] = {"cpu_ms": [], "wall_ms": []}
    while len(times["cpu_ms"]) < 2 or sum(times["cpu_ms"]) < 1000 * least_seconds:
        cpu, wall = time.process_time(), time.perf_counter()
        step()
        times["cpu_ms"].append(1000 * (time.process_time() - cpu))
        times["wall_ms"].append(1000 * (time.perf_counter() - wall))
    return times


def memory(step: Callable[[], None], optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """MiB that a step needs: tensors that live between steps, and the peak above that, measured in two ways.

    `resident` is the peak of the process beyond its size before the step (every buffer of every library, gradients
    included); `allocated` is the peak of torch's allocator (tensors alone). The process should return freed memory at
    once (MALLOC_MMAP_THRESHOLD_), or a step finds room that an earlier one left.
    """
    for _ in range(2):
        step()
    optimizer.zero_grad()
    gc.collect()
    held = _held_mib()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    before = memory_mib("VmRSS")
    reset_peak()
    step()
    resident = memory_mib("VmHWM") - before
    optimizer.zero_grad()
    return {"held": held, "resident": resident, "allocated": _allocated_mib(step)}


def _held_mib() -> float:
    """All tensors of this process, storages that several share once."""
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (Tensor, nn.Parameter) and thing.device.type == "cpu":
            with contextlib.suppress(RuntimeError):  # what a tracer left behind has no memory
                storage = thing.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values()) / 2**20


def _allocated_mib(step: Callable[[], None]) -> float:
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    events: Any = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    now = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak / 2**20


def main(argv: list[str] | None = None) -> int:
    """Prepares, then answers until stdin ends; whatever a tool prints goes to standard error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tool")
    parser.add_argument("model", choices=FORMATS)
    parser.add_argument("format")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args(argv)
    answers = sys.stdout
    torch.set_num_threads(chosen.threads)
    warnings.simplefilter("ignore")
    with contextlib.redirect_stdout(sys.stderr):
        kit = kit_model(chosen.model)
        try:
            model = contender(chosen.tool, kit, FORMATS[chosen.model][chosen.format])
            step, optimizer = stepper(model, kit)
            step()
        except Exception as error:  # a tool that cannot is a row of the page
            return _say(answers, {"failed": f"{type(error).__name__}: {error}"[:300]})
        if chosen.memory:
            return _say(answers, memory(step, optimizer))
        _say(answers, {"ready": True})
        for line in sys.stdin:
            _say(answers, milliseconds(step, json.loads(line)["seconds"]))
    return 0


def _say(stream: Any, document: dict[str, Any]) -> int:
    print(json.dumps(document), file=stream, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
