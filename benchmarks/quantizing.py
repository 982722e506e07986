"""How fast weights are quantized: GB of float32 per second, beside numpy's quantizers of the package gguf.

    python -m benchmarks.quantizing                      4096 x 4096, 1 and 2 threads, into benchmarks/results
    python -m benchmarks.quantizing --quick              1024 x 1024, into build/benchmarks

`solver` is the weight solver alone: ranges, scales, zero points, codes. `pipeline` is nc.quantize on a model of one
linear layer: besides, packing, its own module and the measured errors of the report. gguf's numbers are packed bytes.
"""

from __future__ import annotations

import argparse
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import limits, results_io
from benchmarks.linear_problem import need
from benchmarks.machine import machine
from benchmarks.peers import attempt
from benchmarks.timing import Call, interleave

# name -> weight format, range search of round-to-nearest, gguf's format that holds as many bits
FORMATS = {
    "int8 per channel": ("int8/channel", "absmax", "Q8_0"),
    "int4 g32": ("int4/group32", "absmax", "Q4_0"),
    "int4 g32 asymmetric": ("int4/group32/asym", "absmax", "Q4_0"),
    "int4 g32 asymmetric, searched ranges": ("int4/group32/asym", "mse", "Q4_0"),
}
SEARCHED = "searched"
LEAST_GBS, LEAST_RATIO = 2.0, 5.0


def solver(weight: Tensor, spec: str, search: str) -> Call:
    """The weight solver alone."""
    from narrowcast.core import QuantSpec
    from narrowcast.methods import make_method

    method, target = make_method({"rtn": {"range": search}}), QuantSpec.parse(spec)
    return lambda: method.quantize(weight, target)


def pipeline(weight: Tensor, spec: str, search: str) -> Call:
    """nc.quantize on one linear layer."""
    import narrowcast as nc

    layer = nn.Linear(*reversed(weight.shape), bias=False)
    layer.weight.data = weight
    model = nn.Sequential(layer)
    rule = {"weight": spec, "method": {"rtn": {"range": search}}}
    recipe = nc.Recipe.from_dict({"name": "benchmark", "rule": [rule]}, "benchmark")
    return lambda: nc.quantize(model, recipe, progress=False)


def gguf(weight: Tensor, kind: str) -> Call:
    """gguf.quants.quantize in numpy."""
    need("gguf")
    from gguf import GGMLQuantizationType, quants

    array, target = weight.numpy(), GGMLQuantizationType[kind]
    return lambda: quants.quantize(array, target)


def makers(weight: Tensor) -> dict[str, Callable[[], Call]]:
    """How every contender is made, by name."""
    found: dict[str, Callable[[], Call]] = {}
    for kind in dict.fromkeys(kind for _, _, kind in FORMATS.values()):
        found[f"gguf {kind}"] = lambda kind=kind: gguf(weight, kind)
    for name, (spec, search, _) in FORMATS.items():
        found[f"solver {name}"] = lambda spec=spec, search=search: solver(weight, spec, search)
        found[f"pipeline {name}"] = lambda spec=spec, search=search: pipeline(weight, spec, search)
    return found


def tried(call: Call) -> Call:
    """The same call after it has run once."""
    call()
    return call


def measure(weight: Tensor, threads: int, options: Namespace, skipped: dict[str, str]) -> list[dict[str, Any]]:
    """Rows of one thread count."""
    torch.set_num_threads(threads)
    calls = {}
    for name, make in makers(weight).items():
        call = attempt(name, lambda make=make: tried(make()), skipped)
        if call is not None:
            calls[name] = call
    timings = interleave(calls, rounds=options.rounds, seconds=options.seconds, least=1)
    size = 4 * weight.numel()
    rates = {name: size / timing.median / 1e6 for name, timing in timings.items()}
    rows = []
    for name, timing in timings.items():
        row = {"contender": name, "threads": threads, "median_ms": timing.median, "fastest_ms": timing.fastest}
        row["gbs"] = round(rates[name], 3)
        kind = FORMATS.get(name.partition(" ")[2], (None, None, None))[2]
        if f"gguf {kind}" in rates:
            row["times_gguf"] = round(rates[name] / rates[f"gguf {kind}"], 2)
        if name.startswith("solver") and SEARCHED not in name and threads == max(options.threads):
            row["met"] = row["gbs"] >= LEAST_GBS and row.get("times_gguf", LEAST_RATIO) >= LEAST_RATIO
        rows.append(row)
        print(f"{threads} threads  {row['gbs']:8.3f} GB/s  {name}", flush=True)
    return rows


def markdown(facts: dict[str, Any], rows: list[dict[str, Any]], shape: str, skipped: dict[str, str]) -> str:
    """The Markdown page of a run."""
    cells = [
        [
            *(row["contender"], row["threads"], f"{row['median_ms']:.1f}", f"{row['gbs']:.2f}"),
            results_io.rounded(row.get("times_gguf"), 1),
            {True: "yes", False: "**no**"}.get(row.get("met")),
        ]
        for row in rows
    ]
    header = ["contender", "threads", "median ms", "GB/s of float32", "times gguf", "target met"]
    sections = [
        f"A float32 weight of {shape}, ranges without search unless named. Target, on all cores: solver at least "
        f"{LEAST_GBS} GB/s and {LEAST_RATIO:g} times gguf.",
        results_io.table(header, cells),
        "Not measured:\n" + "\n".join(f"- {name}: {reason}" for name, reason in skipped.items()),
    ]
    return results_io.page("Quantizing", facts, sections)


def options(argv: list[str] | None) -> Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, help="rows and columns of the weight (default: 4096, with --quick 1024)")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="thread counts (default: 1 2)")
    parser.add_argument("--rounds", type=int, default=5, help="bursts per contender (default: 5)")
    parser.add_argument("--seconds", type=float, default=0.05, help="least duration of a burst (default: 0.05)")
    parser.add_argument("--quick", action="store_true", help="a small weight")
    parser.add_argument("--out", type=Path, help="folder of the results (default: see above)")
    chosen = parser.parse_args(argv)
    chosen.complete = not (chosen.quick or chosen.size or set(chosen.threads) != {1, 2})
    chosen.size = chosen.size or (1024 if chosen.quick else 4096)
    return chosen


def main(argv: list[str] | None = None) -> int:
    """Measures, writes the results, and returns 1 when nothing could be timed."""
    chosen = options(argv)
    weight = torch.randn(chosen.size, chosen.size, generator=torch.Generator().manual_seed(0)) / chosen.size**0.5
    facts, rows = machine(), []
    skipped: dict[str, str] = {}
    for threads in chosen.threads:
        rows += measure(weight, threads, chosen, skipped)
    read = {limit.threads: limit.read_gbs for limit in map(limits.measure, chosen.threads)}
    document = {"machine": facts, "shape": [chosen.size] * 2, "read_gbs": read, "skipped": skipped, "rows": rows}
    page = markdown(facts, rows, f"{chosen.size} x {chosen.size}", skipped)
    results_io.write_results(chosen.out or results_io.folder_of(chosen.complete), "quantizing", document, page)
    return int(not rows)


if __name__ == "__main__":
    sys.exit(main())
