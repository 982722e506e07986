"""Linear layers: every format of narrowcast beside every peer, as fractions of what this machine can do.

    python -m benchmarks.linear                          about 12 minutes on two cores, into benchmarks/results
    python -m benchmarks.linear --quick                  three shapes, about 3 minutes, into build/benchmarks
    python -m benchmarks.linear --shapes 4096x4096 --batches 1 16 --threads 1
    python -m benchmarks.linear --shapes all             every shape of the plan
    python -m benchmarks.linear --avx2                   everybody who can be held to AVX2, into linear-avx2.json

All contenders of one shape, batch and thread count run in one process, interleaved. Hot: one weight, again and again.
Cold: copies of the weight in rotation, four times as large as the last cache together, as in a model's decoding.
Everything between a float input and a float output is timed: quantizing activations, scales, bias.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import subprocess
import sys
import warnings
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import (
    limits,
    linear_narrowcast,
    linear_onnx,
    linear_page,
    linear_torch,
    peers_ggml,
    results_io,
    roofline,
)
from benchmarks.limits import Limits
from benchmarks.linear_problem import Contender, Prepare, Problem
from benchmarks.machine import REPOSITORY, machine
from benchmarks.peers import attempt
from benchmarks.timing import Call, Timing, interleave

CONTENDERS = (
    *linear_torch.CONTENDERS,
    *linear_onnx.CONTENDERS,
    *peers_ggml.CONTENDERS,
    *linear_narrowcast.CONTENDERS,
)
Shape = tuple[int, int]  # (N, K): outputs, inputs
# Layers of MiniLM-L6, BERT-base, Qwen2.5-0.5B, Llama-3.2-1B and Llama-3.1-8B.
SHAPES: tuple[Shape, ...] = (
    *((384, 384), (1536, 384), (384, 1536), (768, 768), (3072, 768)),
    *((896, 896), (4864, 896), (896, 4864), (2048, 2048), (8192, 2048), (2048, 8192), (4096, 4096)),
)
QUICK: tuple[Shape, ...] = ((384, 384), (4864, 896), (2048, 2048))
# The plan's others: MiniLM, BERT, Qwen2.5 (0.5B and 1.5B), Llama-3.2 (1B and 3B), Llama-3.1-8B, two output heads.
MORE: tuple[Shape, ...] = (
    *((768, 3072), (128, 896), (1536, 1536), (256, 1536), (8960, 1536), (1536, 8960)),
    *((512, 2048), (3072, 2048), (16384, 2048), (3072, 3072), (1024, 3072), (8192, 3072), (3072, 8192)),
    *((1024, 4096), (14336, 4096), (4096, 14336), (151936, 896), (128256, 2048)),
)
BATCHES = (1, 4, 16, 128)
EDGE_BATCHES = {(2048, 2048): (1, 2, 3, 4, 6, 8, 12, 16, 32, 128, 512)}
COLD_WEIGHTS = 1 << 20  # smaller layers stay in the caches of any model that uses them
COLD_BATCH = 16
LARGEST_HEAD_BATCH = 1  # layers of a hundred million weights are output heads: one token at a time
HEAD_WEIGHTS = 100_000_000


def shape_name(shape: Shape) -> str:
    """(384, 1536) -> "384x1536"."""
    return f"{shape[0]}x{shape[1]}"


def batches_of(shape: Shape, options: Namespace) -> tuple[int, ...]:
    """The batch sizes of one shape."""
    if options.batches:
        return tuple(options.batches)
    if shape[0] * shape[1] > HEAD_WEIGHTS:
        return (LARGEST_HEAD_BATCH,)
    return BATCHES if options.quick else EDGE_BATCHES.get(shape, BATCHES)


def rotating(calls: Sequence[Call]) -> Call:
    """One call that uses the copies in turn."""
    turn = itertools.cycle(calls)
    return lambda: next(turn)()


def copies_needed(contender: Contender, shape: Shape) -> int:
    """How many copies of the weight are four times as large as the last cache."""
    size = shape[0] * shape[1] * contender.bits / 8
    return max(2, math.ceil(4 * limits.cache_bytes()["L3"] / size))


Factories = dict[str, Callable[[], Prepare]]


def factories_of(problem: Problem, chosen: Sequence[Contender], skipped: dict[str, str]) -> Factories:
    """What makes copies of every contender that has this layer; the others are named with their reason."""
    found: Factories = {}
    for contender in chosen:
        copies = attempt(contender.name, partial(contender.copies, problem), skipped)
        if copies is not None:
            found[contender.name] = copies
    return found


def prepared_copies(
    factories: Factories, shape: Shape, skipped: dict[str, str], *, cold: bool
) -> dict[str, list[Prepare]]:
    """The copies of every contender for the current number of threads, one, or as many as cold timing needs."""
    ready = {}
    for contender in (c for c in CONTENDERS if c.name in factories and c.name not in skipped):
        copy = factories[contender.name]
        count = copies_needed(contender, shape) if cold else 1
        copies = attempt(contender.name, lambda copy=copy, count=count: [copy() for _ in range(count)], skipped)
        if copies is not None:
            ready[contender.name] = copies
    return ready


def worst_error(answer: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest value."""
    return ((answer.float() - expected).abs().max() / expected.abs().max()).item()


def answered(ready: dict[str, list[Prepare]], x: Tensor, expected: Tensor, skipped: dict[str, str]) -> dict[str, float]:
    """The error of every contender on this input; one that fails on it is named with its reason."""
    errors = {}
    for name, copies in ready.items():
        error = attempt(name, lambda copies=copies: worst_error(copies[0](x)(), expected), skipped)
        if error is not None:
            errors[name] = error
    return errors


def level_of(size: float, threads: int, *, cold: bool) -> str:
    """The memory that a repeated matrix-vector product reads its weight from."""
    caches = limits.cache_bytes()
    if cold or size > 0.75 * caches["L3"]:
        return "DRAM"
    return "L2" if size <= 0.75 * caches["L2"] * threads else "L3"


def fractions(
    contender: Contender, shape: Shape, batch: int, milliseconds: float, limit: Limits, *, cold: bool
) -> dict[str, Any]:
    """How close a time is to the limits: of bandwidth, of multiplications, and of the roof that both make."""
    rows, columns = shape
    weight = rows * columns * contender.bits / 8
    size, macs, seconds = weight + 4.0 * batch * (rows + columns), float(batch * rows * columns), milliseconds / 1e3
    level = level_of(weight, limit.threads, cold=cold)
    found: dict[str, Any] = {"level": level}
    if level in limit.read_gbs:
        found["r_bw"] = size / seconds / limit.read_gbs[level] / 1e9
    if contender.operand in limit.gmacs:
        found["r_mac"] = macs / seconds / limit.gmacs[contender.operand] / 1e9
    roof = limit.seconds(macs=macs, operand=contender.operand, size=size, level=level)
    if roof is not None:
        found["r_roof"] = roof / seconds
    return {key: value if isinstance(value, str) else round(value, 4) for key, value in found.items()}


def case_rows(
    case: dict[str, Any], shape: Shape, timings: dict[str, Timing], errors: dict[str, float], limit: Limits
) -> list[dict[str, Any]]:
    """One row per contender of one case."""
    named = {contender.name: contender for contender in CONTENDERS}
    rows = []
    for name, timing in timings.items():
        cold = case["mode"] == "cold"
        reached = fractions(named[name], shape, case["batch"], timing.median, limit, cold=cold)
        rows.append(
            case
            | {"contender": name, "family": named[name].family, "bits": named[name].bits}
            | {"median_us": round(1e3 * timing.median, 2), "fastest_us": round(1e3 * timing.fastest, 2)}
            | reached
            | {"error": round(errors[name], 5)}
        )
    return linear_page.with_ratios(rows)


def rests(threads: int) -> dict[str, float]:
    """Seconds of rest behind a burst: with several threads ggml's poll for most of a tenth after their last work."""
    if threads == 1:
        return {}
    return {contender.name: 0.1 for contender in CONTENDERS if contender.name.startswith("ggml")}


def measure_shape(
    shape: Shape, limit: Limits, factories: Factories, problem: Problem, options: Namespace, skipped: dict[str, str]
) -> list[dict[str, Any]]:
    """Rows of one shape at the current number of threads, for all batches, hot and cold."""
    cold = options.cold and shape[0] * shape[1] >= COLD_WEIGHTS
    ready = prepared_copies(factories, shape, skipped, cold=cold)
    found = []
    for batch in batches_of(shape, options):
        x = torch.randn(batch, shape[1], generator=torch.Generator().manual_seed(batch))
        errors = answered(ready, x, functional.linear(x, problem.weight, problem.bias), skipped)
        for mode in ("hot", "cold") if cold and batch <= COLD_BATCH else ("hot",):
            calls = {
                name: rotating([prepare(x) for prepare in (copies if mode == "cold" else copies[:1])])
                for name, copies in ready.items()
                if name in errors
            }
            load = results_io.load_average()
            timings = interleave(
                calls, rounds=options.rounds, seconds=options.seconds, least=1, rests=rests(limit.threads)
            )
            case = {
                "shape": shape_name(shape),
                "batch": batch,
                "threads": limit.threads,
                "mode": mode,
                "load_average": load,
            }
            found += case_rows(case, shape, timings, errors, limit)
            print(linear_page.progress(found, case), flush=True)
    return found


def measure(shape: Shape, measured: list[Limits], options: Namespace, skipped: dict[str, str]) -> list[dict[str, Any]]:
    """Rows of one shape for every thread count; each format is quantized once."""
    problem = Problem.random(*shape)
    chosen = [c for c in CONTENDERS if not options.only or any(text in c.name for text in options.only)]
    missing: dict[str, str] = {}
    if options.avx2:
        chosen = restricted(chosen, missing)
    factories = factories_of(problem, chosen, missing)
    rows = []
    for limit in measured:
        torch.set_num_threads(limit.threads)
        with torch.inference_mode():
            rows += measure_shape(shape, limit, factories, problem, options, missing)
    skipped |= {f"{shape_name(shape)}, {name}": reason for name, reason in missing.items()}
    return rows


# What holds narrowcast, torch, oneDNN, MKL and FBGEMM to AVX2; they read it when they are loaded.
AVX2_ONLY = {
    "NARROWCAST_ISA": "avx2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2",
}
UNRESTRICTED = ("ONNX Runtime", "ggml")


def restricted(chosen: Sequence[Contender], missing: dict[str, str]) -> list[Contender]:
    """The contenders that obey AVX2_ONLY; the others are named with their reason in `missing`."""
    free = [contender.name for contender in chosen if contender.name.startswith(UNRESTRICTED)]
    missing |= dict.fromkeys(free, "nothing holds it to AVX2")
    return [contender for contender in chosen if contender.name not in free]


def parse_shapes(texts: list[str] | None, *, quick: bool) -> list[Shape]:
    """The shapes asked for: NxK texts, "all", or the default."""
    if not texts:
        return list(QUICK if quick else SHAPES)
    if texts == ["all"]:
        return [*SHAPES, *MORE]
    return [(int(rows), int(columns)) for rows, columns in (text.split("x") for text in texts)]


def options(argv: list[str] | None) -> Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", help="NxK ..., or all (default: twelve shapes)")
    parser.add_argument("--batches", nargs="+", type=int, help="batch sizes (default: 1 4 16 128, more for 2048x2048)")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="thread counts (default: 1 2)")
    parser.add_argument("--only", nargs="+", help="contenders whose names contain one of these texts")
    parser.add_argument("--avx2", action="store_true", help="hold everybody to AVX2")
    parser.add_argument("--no-cold", dest="cold", action="store_false", help="hot weights only")
    parser.add_argument("--rounds", type=int, default=5, help="bursts per contender (default: 5)")
    parser.add_argument("--seconds", type=float, default=0.005, help="least duration of a burst (default: 0.005)")
    parser.add_argument("--quick", action="store_true", help="three shapes")
    parser.add_argument("--strict", action="store_true", help="exit with 1 when a target is missed")
    parser.add_argument("--out", type=Path, help="folder of the results (default: see above)")
    chosen = parser.parse_args(argv)
    is_part = chosen.quick or chosen.shapes not in (None, ["all"]) or chosen.batches or chosen.only
    chosen.complete = not is_part and chosen.cold and set(chosen.threads) == {1, 2}
    chosen.shapes = parse_shapes(chosen.shapes, quick=chosen.quick)
    return chosen


def main(argv: list[str] | None = None) -> int:
    """Measures, writes the results, and returns 1 when nothing was timed (or, with --strict, a target is missed)."""
    chosen = options(argv)
    if chosen.avx2 and any(os.environ.get(name) != value for name, value in AVX2_ONLY.items()):
        command = [sys.executable, "-m", "benchmarks.linear", *(sys.argv[1:] if argv is None else argv)]
        return subprocess.run(command, cwd=REPOSITORY, env=os.environ | AVX2_ONLY, check=False).returncode
    warnings.filterwarnings("ignore", message="torch.quantize_per_tensor")  # it announces its own removal
    facts, skipped, rows = machine(), {}, []
    measured = [limits.measure(threads) for threads in chosen.threads]
    print(limits.table(measured), flush=True)
    for shape in chosen.shapes:
        rows += measure(shape, measured, chosen, skipped)
    again = [limits.measure(threads) for threads in chosen.threads]  # did the machine stay the same?
    document = {
        "machine": facts,
        "ggml": peers_ggml.version(),
        "limits": limits.as_data(measured),
        "limits_afterwards": limits.as_data(again),
        "targets": linear_page.judged(rows),
        "skipped": skipped,
        "rows": rows,
    }
    folder = chosen.out or results_io.folder_of(chosen.complete)
    page = linear_page.markdown(facts, [limits.table(measured), limits.table(again)], rows, skipped)
    name = "linear-avx2" if chosen.avx2 else "linear"
    results_io.write_results(folder, name, document, page)
    roofline.draw_beside(document, folder, name)
    missed = any(verdict["met"] is False for verdict in document["targets"])
    return int(not rows or (chosen.strict and missed))


if __name__ == "__main__":
    sys.exit(main())
