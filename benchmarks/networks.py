"""Whole networks: narrowcast's integer presets beside torch, torch.ao, ONNX Runtime and OpenVINO, with their errors.

    python -m benchmarks.networks                        everything, 2 threads and 1, into benchmarks/results
    python -m benchmarks.networks --models resnet20 --shapes 32 --threads 1
    python -m benchmarks.networks --quick                two networks, short bursts, into build/benchmarks

Every peer gets the form that suits it best: a graph of exactly this shape, weights per channel, calibration data of the
same split. All contenders of one network, shape and thread count are timed in one run, interleaved. The error of every
contender stands beside its time, so that nobody wins by computing something else.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import networks_page, peers, peers_onnx, peers_openvino, results_io
from benchmarks.kit import Batch, KitModel, kit_model
from benchmarks.machine import machine
from benchmarks.timing import interleave

NETWORKS = ("resnet20", "mobilenetv1", "mobilenetv2", "squeezenet11", "minilm")
QUICK = ("resnet20", "minilm")
PRESETS = {"cnn": ("static-int8",), "encoder": ("dynamic-int8", "dynamic-int4")}
COMPARED = 128  # images that every contender classifies beside float32

Prepare = peers_onnx.Prepare


def torch_model(make: Callable[[], nn.Module], convert: Callable[[Tensor], Tensor] | None = None) -> Prepare:
    """A module in eager mode, its batches converted beforehand."""
    model = make()
    return lambda batch: peers.eager(model, peers.converted(batch, convert) if convert else batch)


def torch_bfloat16(kit: KitModel) -> Prepare:
    """Model and input cast to bfloat16."""
    return torch_model(lambda: kit.build().to(torch.bfloat16), lambda tensor: tensor.to(torch.bfloat16))


def torch_channels_last(kit: KitModel) -> Prepare:
    """Model and input with channels innermost."""
    return torch_model(lambda: kit.build().to(memory_format=torch.channels_last), peers.in_channels_last)


def makers(
    kit: KitModel, shape: tuple[int, ...], folder: Path, models: dict[str, nn.Module]
) -> dict[str, Callable[[], Prepare]]:
    """How every contender on this network is made, by name; the first one is what errors are measured against."""
    found: dict[str, Callable[[], Prepare]] = {peers.FLOAT32: lambda: torch_model(kit.build)}
    if kit.kind == "cnn":
        found[peers.CHANNELS_LAST] = partial(torch_channels_last, kit)
    found[peers.BFLOAT16] = partial(torch_bfloat16, kit)
    found[peers.TORCH_AO] = lambda: torch_model(lambda: peers.torch_ao_model(kit))
    file = partial(peers_onnx.float32_file, kit, shape, folder)
    static = partial(peers_onnx.static_int8_file, kit, shape, folder)
    found[peers.ONNXRUNTIME] = lambda: peers_onnx.prepare(file())
    if kit.kind == "cnn":
        found[networks_page.ONNXRUNTIME_STATIC] = lambda: peers_onnx.prepare(static())
    else:
        dynamic = partial(peers_onnx.dynamic_int8_file, kit, shape, folder)
        found[networks_page.ONNXRUNTIME_DYNAMIC] = lambda: peers_onnx.prepare(dynamic())
    found["OpenVINO float32"] = lambda: peers_openvino.prepare(file(), peers_openvino.FLOAT32)
    found["OpenVINO default"] = lambda: peers_openvino.prepare(file())
    found[networks_page.OPENVINO_INT8] = lambda: peers_openvino.prepare(peers_openvino.int8_file(kit, shape, folder))
    if kit.kind == "cnn":
        found["OpenVINO int8 of ONNX Runtime's file"] = lambda: peers_openvino.prepare(static())
    for preset, model in models.items():
        found[f"narrowcast {preset}"] = lambda model=model: torch_model(lambda: model)
        if kit.kind == "cnn":
            found[f"narrowcast {preset} channels_last"] = lambda model=model: torch_model(
                lambda: model, peers.in_channels_last
            )
    return found


def quantized_models(kit: KitModel, skipped: dict[str, str]) -> dict[str, nn.Module]:
    """The network in the presets of its kind; one that fails is named with its reason in `skipped`."""
    import narrowcast as nc

    models = {}
    for preset in PRESETS[kit.kind]:
        quantize = partial(nc.quantize, kit.build(), preset, data=kit.calibration(), progress=False)
        quantized = peers.attempt(f"narrowcast {preset}", quantize, skipped)
        if quantized is not None:
            models[preset] = quantized.model
    return models


def made(contenders: dict[str, Callable[[], Prepare]], batch: Batch, skipped: dict[str, str]) -> dict[str, Prepare]:
    """The contenders that answer this batch; the others are named with their reason in `skipped`."""
    ready: dict[str, Prepare] = {}
    for name, make in contenders.items():
        prepare = peers.attempt(name, lambda make=make: tried(make(), batch), skipped)
        if prepare is not None:
            ready[name] = prepare
            print(f"  ready: {name}", flush=True)
    return ready


def tried(prepare: Prepare, batch: Batch) -> Prepare:
    """The same contender after it has answered this batch once."""
    prepare(batch)()
    return prepare


def as_tensor(answer: Any) -> Tensor:
    """The main output as float32 with memory of its own: a runtime may write its next answer into the old one's."""
    tensor = answer.last_hidden_state if hasattr(answer, "last_hidden_state") else torch.as_tensor(answer)
    return tensor.detach().float().clone()


def comparison_batches(kit: KitModel, shape: tuple[int, ...]) -> list[Batch]:
    """Input that no contender was calibrated on: images in batches of this shape, or the timed text."""
    if kit.kind != "cnn":
        return [kit.example(shape)]
    images = kit.example((COMPARED,))
    assert isinstance(images, Tensor)
    return list(images.split(shape[0]))


def errors(kit: KitModel, ready: dict[str, Prepare], shape: tuple[int, ...]) -> dict[str, dict[str, float]]:
    """How far every contender is from torch float32.

    Returns:
        Name -> {"relative_error": norm of the difference over the norm, of logits or hidden states, and "agreement":
        percent of images put into the same class, or "cosine": mean cosine of the token vectors}.
    """
    batches = comparison_batches(kit, shape)
    answers = {name: torch.cat([as_tensor(prepare(b)()) for b in batches]) for name, prepare in ready.items()}
    expected = answers[peers.FLOAT32]
    found: dict[str, dict[str, float]] = {}
    for name, answer in answers.items():
        row = {"relative_error": ((answer - expected).norm() / expected.norm()).item()}
        if kit.kind == "cnn":
            row["agreement"] = 100.0 * (answer.argmax(1) == expected.argmax(1)).double().mean().item()
        else:
            row["cosine"] = torch.cosine_similarity(answer, expected, dim=-1).mean().item()
        found[name] = row
    return found


def multiplications(kit: KitModel, shape: tuple[int, ...]) -> int:
    """Multiply-accumulates of one call, counted by torch on the float32 network."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        peers.eager(kit.build(), kit.example(shape))()
    return int(counter.get_total_flops()) // 2


def measure(
    kit: KitModel, shape: tuple[int, ...], models: dict[str, nn.Module], known: dict[str, Any], options: Namespace
) -> dict[str, Any]:
    """One row: all contenders on one network, shape and the current number of threads."""
    skipped: dict[str, str] = {}
    batch = kit.example(shape)
    chosen = {
        name: make
        for name, make in makers(kit, shape, options.folder, models).items()
        if not options.only or name == peers.FLOAT32 or any(text in name for text in options.only)
    }
    ready = made(chosen, batch, skipped)
    if shape not in known:  # the number of threads changes no answer
        known[shape] = errors(kit, ready, shape), multiplications(kit, shape)
    found, macs = known[shape]
    load = results_io.load_average()
    calls = {name: prepare(batch) for name, prepare in ready.items()}
    timings = interleave(calls, rounds=options.rounds, seconds=options.seconds)
    return {
        "model": kit.name,
        "shape": networks_page.shape_name(shape),
        "threads": torch.get_num_threads(),
        "load_average": load,
        "macs": macs,
        "contenders": {
            name: {"median_ms": t.median, "fastest_ms": t.fastest, "rounds_ms": t.rounds, **found.get(name, {})}
            for name, t in timings.items()
        },
        "skipped": skipped,
    }


def measure_model(name: str, options: Namespace) -> list[dict[str, Any]]:
    """Rows of one network, for every shape and thread count."""
    kit = kit_model(name)
    failed: dict[str, str] = {}
    torch.set_num_threads(max(options.threads))
    models = quantized_models(kit, failed)
    rows, known = [], {}
    wanted = [s for s in kit.shapes if not options.shapes or networks_page.shape_name(s) in options.shapes]
    for shape in wanted[:1] if options.quick and not options.shapes else wanted:
        for threads in options.threads:
            torch.set_num_threads(threads)
            print(f"{name} {networks_page.shape_name(shape)}, {threads} threads", flush=True)
            row = measure(kit, shape, models, known, options) | {"failed": failed}
            row["verdict"] = networks_page.verdict(row)
            rows.append(row)
            print(networks_page.summary(row), flush=True)
    return rows


def options(argv: list[str] | None) -> Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=NETWORKS, help="networks to measure (default: all)")
    parser.add_argument("--shapes", nargs="+", help="only these, for example 1 32 32x64 (default: all of the network)")
    parser.add_argument("--threads", nargs="+", type=int, default=[2, 1], help="thread counts (default: 2 1)")
    parser.add_argument(
        "--only", nargs="+", help="contenders whose names contain one of these texts, and torch float32"
    )
    parser.add_argument("--rounds", type=int, help="bursts per contender (default: 7, with --quick 2)")
    parser.add_argument("--seconds", type=float, help="least duration of a burst (default: 0.1, with --quick 0.02)")
    parser.add_argument("--quick", action="store_true", help="two networks, their smallest shape, short bursts")
    parser.add_argument("--strict", action="store_true", help="exit with 1 when a target is missed")
    parser.add_argument("--out", type=Path, help="folder of the results (default: see above)")
    chosen = parser.parse_args(argv)
    chosen.complete = not (
        chosen.quick or chosen.models or chosen.shapes or chosen.only or set(chosen.threads) != {1, 2}
    )
    chosen.models = chosen.models or (QUICK if chosen.quick else NETWORKS)
    chosen.rounds = chosen.rounds or (2 if chosen.quick else 7)
    chosen.seconds = chosen.seconds or (0.02 if chosen.quick else 0.1)
    return chosen


def main(argv: list[str] | None = None) -> int:
    """Measures, writes the results, and returns 1 when a preset failed (or, with --strict, missed a target)."""
    chosen = options(argv)
    torch.manual_seed(0)
    facts, skipped, rows = machine(), [], []
    for name in results_io.available(chosen.models, skipped.append):
        with tempfile.TemporaryDirectory() as temporary:
            chosen.folder = Path(temporary)
            rows += measure_model(name, chosen)
    document = {"machine": facts, "rounds": chosen.rounds, "seconds": chosen.seconds, "skipped": skipped, "rows": rows}
    folder = chosen.out or results_io.folder_of(chosen.complete)
    results_io.write_results(folder, "networks", document, networks_page.markdown(facts, rows, skipped))
    failed = any(row["failed"] for row in rows) or not rows
    missed = any(row["verdict"].get("met") is False for row in rows)
    return int(failed or (chosen.strict and missed))


if __name__ == "__main__":
    sys.exit(main())
