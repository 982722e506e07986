"""Latency of the presets that compute in integers, on every kit model at its natural shapes, beside their peers.

    python -m benchmarks.latency                         everything, 2 threads and 1, into benchmarks/results
    python -m benchmarks.latency --models minilm --threads 2
    python -m benchmarks.latency --quick                 short bursts, into build/benchmarks

All contenders of one model, shape and thread count are timed in one run, interleaved (A B C A B C ...); a speed-up is
the median over the rounds of the ratio within a round. Nothing else should run on the machine meanwhile.
"""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from typing import Any

import torch
from torch import nn

from benchmarks import peers, results_io
from benchmarks.kit import Batch, KitModel, kit_model
from benchmarks.machine import machine
from benchmarks.timing import Timing, interleave

PRESETS = ("dynamic-int8", "dynamic-int4", "static-int8")
# The first issue: which preset must be faster than which peers. Every integer preset must beat eager float32; MiniLM in
# dynamic int8 must beat eager bfloat16 and torch.ao as well.
BEATEN_BY_ALL = (peers.FLOAT32, peers.CHANNELS_LAST)
BEATEN_BY_ENCODER = (*BEATEN_BY_ALL, peers.BFLOAT16, peers.TORCH_AO)


def shape_name(shape: tuple[int, ...]) -> str:
    """(1,) -> "1", (32, 64) -> "32x64"."""
    return "x".join(map(str, shape))


def quantized_models(kit: KitModel, presets: list[str], skipped: dict[str, str]) -> dict[str, nn.Module]:
    """The kit model in each preset; one that fails is named with its reason in `skipped`."""
    import narrowcast as nc

    models = {}
    for preset in presets:
        data = kit.calibration()  # with data, convolutions may return channels-last tensors: it was tried on a batch
        try:
            models[preset] = nc.quantize(kit.build(), preset, data=data, progress=False).model
        except Exception as error:  # a benchmark reports whatever a preset raises, and goes on
            skipped[f"narrowcast {preset}"] = f"{type(error).__name__}: {error}"
    return models


def contenders(
    kit: KitModel, batch: Batch, models: dict[str, nn.Module], skipped: dict[str, str]
) -> dict[str, peers.Call]:
    """Everything that can run this batch, by name; what cannot is named with its reason in `skipped`."""
    calls: dict[str, peers.Call] = {}
    for name, make in peers.PEERS.items():
        if name == peers.CHANNELS_LAST and kit.kind != "cnn":
            continue
        try:
            call = make(kit, batch)
            call()
        except Exception as error:  # a peer that cannot run this model is a result, not a crash
            skipped[name] = (
                str(error) if isinstance(error, peers.UnavailableError) else f"{type(error).__name__}: {error}"
            )
        else:
            calls[name] = call
    for preset, model in models.items():
        calls[f"narrowcast {preset}"] = peers.eager(model, batch)
        if kit.kind == "cnn":
            images = peers.converted(batch, peers.in_channels_last)
            calls[f"narrowcast {preset} channels_last"] = peers.eager(model, images)
    return calls


def verdict(kit: KitModel, preset: str, timings: dict[str, Timing]) -> dict[str, Any]:
    """Speed-ups of one preset over every peer, and whether it beats all those it must beat.

    The model is called as its user calls it, with images in the ordinary memory format; float32 may choose the better
    of its two formats.
    """
    mine = timings[f"narrowcast {preset}"]
    rivals = BEATEN_BY_ENCODER if kit.kind == "encoder" and preset == "dynamic-int8" else BEATEN_BY_ALL
    speedups = {name: round(mine.ratio_to(timings[name]), 3) for name in peers.PEERS if name in timings}
    return {"speedups": speedups, "met": all(speedups[name] > 1.0 for name in rivals if name in speedups)}


def measure(kit: KitModel, shape: tuple[int, ...], models: dict[str, nn.Module], options: Namespace) -> dict[str, Any]:
    """One row: all contenders on one model, shape and the current number of threads."""
    skipped: dict[str, str] = {}
    calls = contenders(kit, kit.example(shape), models, skipped)
    load = os.getloadavg()[0]
    timings = interleave(calls, rounds=options.rounds, seconds=options.seconds)
    return {
        "model": kit.name,
        "shape": shape_name(shape),
        "threads": torch.get_num_threads(),
        "load_average": round(load, 2),
        "milliseconds": {name: {"median": t.median, "best": t.best, "rounds": t.rounds} for name, t in timings.items()},
        "narrowcast": {preset: verdict(kit, preset, timings) for preset in models},
        "skipped": skipped,
    }


def measure_model(name: str, options: Namespace) -> list[dict[str, Any]]:
    """Rows of one kit model, for every thread count and shape."""
    kit = kit_model(name)
    failed: dict[str, str] = {}
    models = quantized_models(kit, options.presets, failed)
    rows = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        for shape in kit.shapes[:1] if options.quick else kit.shapes:
            row = measure(kit, shape, models, options)
            row["failed"] = failed
            rows.append(row)
            print(summary(row), flush=True)
    return rows


def summary(row: dict[str, Any]) -> str:
    """A few lines for the terminal."""
    lines = [f"{row['model']} {row['shape']}, {row['threads']} threads, load {row['load_average']}"]
    lines += [f"  {timing['median']:9.3f} ms  {name}" for name, timing in row["milliseconds"].items()]
    lines += [f"  skipped {name}: {reason}" for name, reason in {**row["skipped"], **row["failed"]}.items()]
    return "\n".join(lines)


def columns(rows: list[dict[str, Any]]) -> list[str]:
    """Names of all contenders that were timed in any row, in the order of their first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row["milliseconds"]))


def timing_table(rows: list[dict[str, Any]]) -> str:
    """Median milliseconds of every contender."""
    names = columns(rows)
    cells = [
        [row["model"], row["shape"], row["threads"], *(_milliseconds(row["milliseconds"].get(name)) for name in names)]
        for row in rows
    ]
    return results_io.table(["model", "shape", "threads", *names], cells)


def _milliseconds(timing: dict[str, Any] | None) -> str | None:
    return None if timing is None else f"{timing['median']:.3g}"


def speedup_table(rows: list[dict[str, Any]]) -> str:
    """How many times faster each preset is than each peer, with the verdict."""
    header = ["model", "shape", "threads", "preset", *(f"over {name}" for name in peers.PEERS), "faster as required"]
    cells = [
        [
            *(row["model"], row["shape"], row["threads"], preset),
            *(results_io.rounded(result["speedups"].get(name), 2) for name in peers.PEERS),
            "yes" if result["met"] else "**no**",
        ]
        for row in rows
        for preset, result in row["narrowcast"].items()
    ]
    return results_io.table(header, cells)


def skipped_lines(rows: list[dict[str, Any]]) -> list[str]:
    """Every contender that could not run, once per model, with its reason."""
    reasons = [
        f"{row['model']}, {name}: {reason}"
        for row in rows
        for name, reason in {**row["skipped"], **row["failed"]}.items()
    ]
    return list(dict.fromkeys(reasons))


def markdown(facts: dict[str, Any], rows: list[dict[str, Any]], skipped: list[str]) -> str:
    """The Markdown page of a run."""
    results = [result for row in rows for result in row["narrowcast"].values()]
    notes = "Not measured:\n" + "\n".join(f"- {line}" for line in [*skipped, *skipped_lines(rows)])
    sections = [
        "Median milliseconds per call; interleaved bursts; shape is batch, or batch x tokens.",
        timing_table(rows),
        "Speed-up of narrowcast: median over the rounds of peer / narrowcast, above 1 is faster. Required: faster than "
        "eager float32 in both of its memory formats; MiniLM in dynamic-int8 also faster than bfloat16 and torch.ao. "
        f"Faster as required: {sum(result['met'] for result in results)} of {len(results)}.",
        speedup_table(rows),
        notes,
    ]
    return results_io.page("Latency", facts, sections)


def options(argv: list[str] | None) -> Namespace:
    """The command line."""
    parser = results_io.arguments(__doc__ or "", PRESETS)
    parser.add_argument("--threads", nargs="+", type=int, default=[2, 1], help="thread counts (default: 2 1)")
    parser.add_argument("--rounds", type=int, help="bursts per contender (default: 7, with --quick 2)")
    parser.add_argument("--seconds", type=float, help="least duration of a burst (default: 0.2, with --quick 0.02)")
    parser.add_argument("--strict", action="store_true", help="exit with 1 when a preset is not faster as required")
    chosen = parser.parse_args(argv)
    chosen.rounds = chosen.rounds or (2 if chosen.quick else 7)
    chosen.seconds = chosen.seconds or (0.02 if chosen.quick else 0.2)
    return chosen


def main(argv: list[str] | None = None) -> int:
    """Measures, writes the results, and returns 1 when a preset failed (or, with --strict, was too slow)."""
    chosen = options(argv)
    torch.manual_seed(0)
    facts, skipped, rows = machine(), [], []
    for name in results_io.available(chosen.models, skipped.append):
        rows += measure_model(name, chosen)
    document = {"machine": facts, "rounds": chosen.rounds, "seconds": chosen.seconds, "skipped": skipped, "rows": rows}
    folder = results_io.output_folder(chosen, PRESETS)
    results_io.write_results(folder, "latency", document, markdown(facts, rows, skipped))
    failed = any(row["failed"] for row in rows) or not rows
    slower = any(not result["met"] for row in rows for result in row["narrowcast"].values())
    return int(failed or (chosen.strict and slower))


if __name__ == "__main__":
    sys.exit(main())
