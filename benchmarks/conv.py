"""Convolutions: narrowcast's static int8 beside torch and ONNX Runtime, as fractions of what this machine can do.

    python -m benchmarks.conv                            layers of ResNet-50 and MobileNetV2, into benchmarks/results
    python -m benchmarks.conv --quick                    four layers, batch 1, into build/benchmarks
    python -m benchmarks.conv --layers 3x3 depthwise --batches 8 --threads 1

Every layer is followed by ReLU. narrowcast takes and gives float32; ONNX Runtime's QLinearConv is timed so and also
bare, from uint8 to uint8. Dense layers are judged by the multiply peak, depthwise ones by the bandwidth of L2.
"""

from __future__ import annotations

import argparse
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import conv_peers, limits, results_io
from benchmarks.conv_problem import LAYERS, ConvContender, ConvLayer, Prepare
from benchmarks.limits import Limits
from benchmarks.linear import worst_error
from benchmarks.machine import machine
from benchmarks.peers import attempt
from benchmarks.timing import Call, Timing, interleave

QUICK = ("3x3 64 @56", "1x1 64>256 @56", "depthwise 3x3 144 @56", "1x1 64>384 @14")
NAMED = {contender.name: contender for contender in conv_peers.CONTENDERS}
OURS = ("narrowcast static int8", "narrowcast static int8 channels_last")
TARGETS = {"1x1": ("r_mac", 0.75), "3x3": ("r_mac", 0.65), "depthwise": ("r_bw", 0.4)}


def prepared(layer: ConvLayer, skipped: dict[str, str], only: list[str] | None = None) -> dict[str, Prepare]:
    """The contenders that have this layer; the others are named with their reason in `skipped`."""
    found = {}
    for contender in (c for c in conv_peers.CONTENDERS if only is None or any(text in c.name for text in only)):
        prepare = attempt(contender.name, partial(contender.make, layer), skipped)
        if prepare is not None:
            found[contender.name] = prepare
    return found


def as_float(answer: Tensor, call: Call) -> Tensor:
    """The answer as float32 with channels second; a uint8 answer carries its range."""
    if answer.dtype != torch.uint8:
        return answer.float()
    scale, zero = call.range  # type: ignore[attr-defined]
    return ((answer.float() - zero) * scale).permute(0, 3, 1, 2)


def call_and_error(prepare: Prepare, x: Tensor, expected: Tensor) -> tuple[Call, float]:
    """The call of an input and the error of its answer."""
    call = prepare(x)
    return call, worst_error(as_float(call(), call), expected)


def fractions(contender: ConvContender, layer: ConvLayer, batch: int, milliseconds: float, limit: Limits) -> Any:
    """GMAC/s, and the fractions of the multiply peak and of the bandwidth of L2."""
    seconds = milliseconds / 1e3
    found = {"gmacs": layer.macs(batch) / seconds / 1e9}
    if contender.operand in limit.gmacs:
        found["r_mac"] = found["gmacs"] / limit.gmacs[contender.operand]
    if "L2" in limit.read_gbs:
        found["r_bw"] = layer.values(batch) * contender.value_bytes / seconds / 1e9 / limit.read_gbs["L2"]
    return {key: round(value, 4) for key, value in found.items()}


def measure(layer: ConvLayer, batch: int, limit: Limits, options: Namespace, skipped: dict[str, str]) -> dict[str, Any]:
    """One row: all contenders on one layer and batch at the current number of threads."""
    x = layer.example(batch)
    expected = functional.relu(layer.module()(x))
    calls, errors = {}, {}
    for name, prepare in prepared(layer, skipped, options.only).items():
        answered = attempt(name, partial(call_and_error, prepare, x, expected), skipped)
        if answered is not None:
            calls[name], errors[name] = answered
    load = results_io.load_average()
    timings = interleave(calls, rounds=options.rounds, seconds=options.seconds, least=1)
    row = {"layer": layer.name, "batch": batch, "threads": limit.threads, "load_average": load}
    return row | {"contenders": timed(layer, batch, timings, errors, limit)}


def timed(
    layer: ConvLayer, batch: int, timings: dict[str, Timing], errors: dict[str, float], limit: Limits
) -> dict[str, Any]:
    """Time, fractions, error of every contender, and how many times faster narrowcast is than the fastest peer.

    Only peers that are called as narrowcast is, with float in and out, count for that.
    """
    found = {
        name: {"median_us": round(1e3 * timing.median, 2), "fastest_us": round(1e3 * timing.fastest, 2)}
        | fractions(NAMED[name], layer, batch, timing.median, limit)
        | {"error": round(errors[name], 5)}
        for name, timing in timings.items()
    }
    peers = {name: f["median_us"] for name, f in found.items() if name not in OURS and name != conv_peers.UINT8_PEER}
    for name in (name for name in OURS if name in found and peers):
        rival = min(peers, key=lambda peer: peers[peer])
        found[name] |= {"rival": rival, "ratio": round(peers[rival] / found[name]["median_us"], 3)}
    return found


def judged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every target with how many of its cases keep it, in the better memory format, and the worst case."""
    verdicts = []
    for kind, (quantity, least) in TARGETS.items():
        values = []
        for row in rows:
            reached = [row["contenders"][name].get(quantity, 0.0) for name in OURS if name in row["contenders"]]
            if row["layer"].startswith(kind) and reached:
                values.append((max(reached), f"{row['layer']}, batch {row['batch']}, {row['threads']} threads"))
        verdict: dict[str, Any] = {"target": f"{kind}: {quantity} at least {least}", "cases": len(values)}
        kept = sum(value >= least for value, _ in values)
        worst = min(values, default=(None, None))
        verdicts.append(verdict | {"kept": kept, "worst": worst[0], "worst_case": worst[1]})
        verdicts[-1]["met"] = kept == len(values) if values else None
    return verdicts


def cell(found: dict[str, Any] | None) -> str | None:
    """Microseconds, percent of the multiply peak, of L2's bandwidth, ratio, error."""
    if found is None:
        return None
    parts = [f"{found['median_us']:.4g} us"]
    parts += [f"{100 * found[key]:.0f} % {name}" for key, name in (("r_mac", "mac"), ("r_bw", "L2")) if key in found]
    parts += [f"x{found['ratio']:.2f}"] if "ratio" in found else []
    return ", ".join(parts)


def summary(row: dict[str, Any]) -> str:
    """A few lines for the terminal."""
    lines = [f"{row['layer']}, batch {row['batch']}, {row['threads']} threads, load {row['load_average']}"]
    lines += [f"  {cell(found)}, error {found['error']:.4f}  {name}" for name, found in row["contenders"].items()]
    return "\n".join(lines)


def markdown(facts: dict[str, Any], limit_table: str, rows: list[dict[str, Any]], skipped: dict[str, str]) -> str:
    """The Markdown page of a run."""
    names = list(dict.fromkeys(name for row in rows for name in row["contenders"]))
    cells = [
        [row["layer"], row["batch"], row["threads"], *(cell(row["contenders"].get(name)) for name in names)]
        for row in rows
    ]
    worst = {name: max(row["contenders"][name]["error"] for row in rows if name in row["contenders"]) for name in names}
    verdicts = [
        [v["target"], v["cases"], v["kept"], results_io.rounded(v["worst"], 3), v["worst_case"], v["met"]]
        for v in judged(rows)
    ]
    sections = [
        "Median time of a layer with its ReLU; percent of the multiply peak of its operands and of L2's read bandwidth "
        "(inputs and outputs as the call takes and gives them); for narrowcast times the fastest peer with float in "
        "and out. Errors are the largest difference from torch float32 over the largest value, the worst of all rows.",
        limit_table,
        results_io.table(["target, better memory format", "cases", "kept in", "worst", "worst case", "met"], verdicts),
        results_io.table(["layer", "batch", "threads", *names], cells),
        results_io.table(["contender", "worst error"], [[name, f"{error:.4f}"] for name, error in worst.items()]),
        "Not measured:\n" + "\n".join(f"- {name}: {reason}" for name, reason in skipped.items()),
    ]
    return results_io.page("Convolutions", facts, sections)


def options(argv: list[str] | None) -> Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", help="layers whose names contain one of these texts (default: all)")
    parser.add_argument("--batches", nargs="+", type=int, help="batch sizes (default: 1 8, with --quick 1)")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="thread counts (default: 1 2)")
    parser.add_argument("--only", nargs="+", help="contenders whose names contain one of these texts")
    parser.add_argument("--rounds", type=int, default=5, help="bursts per contender (default: 5)")
    parser.add_argument("--seconds", type=float, default=0.02, help="least duration of a burst (default: 0.02)")
    parser.add_argument("--quick", action="store_true", help="four layers, batch 1")
    parser.add_argument("--out", type=Path, help="folder of the results (default: see above)")
    chosen = parser.parse_args(argv)
    chosen.complete = not (
        chosen.quick or chosen.layers or chosen.batches or chosen.only or set(chosen.threads) != {1, 2}
    )
    wanted = chosen.layers or (QUICK if chosen.quick else ("",))
    chosen.layers = [layer for layer in LAYERS if any(text in layer.name for text in wanted)]
    chosen.batches = chosen.batches or ([1] if chosen.quick else [1, 8])
    return chosen


def main(argv: list[str] | None = None) -> int:
    """Measures, writes the results, and returns 1 when nothing could be timed."""
    chosen = options(argv)
    facts, rows = machine(), []
    skipped: dict[str, str] = {}
    measured = [limits.measure(threads) for threads in chosen.threads]
    print(limits.table(measured), flush=True)
    with torch.inference_mode():
        for layer in chosen.layers:
            for limit in measured:
                torch.set_num_threads(limit.threads)
                for batch in chosen.batches:
                    missing: dict[str, str] = {}
                    rows.append(measure(layer, batch, limit, chosen, missing))
                    skipped |= {f"{layer.name}, {name}": reason for name, reason in missing.items()}
                    print(summary(rows[-1]), flush=True)
    document = {"machine": facts, "limits": limits.as_data(measured), "targets": judged(rows)}
    document |= {"skipped": skipped, "rows": rows}
    page = markdown(facts, limits.table(measured), rows, skipped)
    results_io.write_results(chosen.out or results_io.folder_of(chosen.complete), "conv", document, page)
    return int(not rows)


if __name__ == "__main__":
    sys.exit(main())
