"""Accuracy at 8, 4, 3 and 2 bits: every solver and combination on every kit model, with 95 % intervals.

    python -m benchmarks.low_bits                                      everything, into benchmarks/results
    python -m benchmarks.low_bits --models stories260k --formats "W4 g32" --methods rtn gptq
    python -m benchmarks.low_bits --quick                              fewer samples, into build/benchmarks
    python -m benchmarks.low_bits --tools hqq NNCF --peer-python PATH  other tools, installed in another interpreter

Each cell is measured in a process of its own, so peak memory is that of one method. Weights of attention, feed-forward
and convolution layers get the format; embeddings, and heads tied to one, stay float32, as the peers leave them.
Scores are those of samples that calibration did not see; the interval of the difference to float32 is that of a paired
bootstrap over images, sentence pairs or whole stories.

Finished cells are kept in build/benchmarks/low_bits, so an interrupted run goes on where it was; --fresh starts over.
With --keep, cells that no run of the present code has measured keep the rows of the result file; each names its commit.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks import low_bits_cells, low_bits_page, low_bits_peers, low_bits_score, results_io
from benchmarks.kit import KIT_NAMES, KitModel, kit_model
from benchmarks.low_bits_cells import Cell
from benchmarks.machine import machine
from benchmarks.peers_low_bits.table import PEERS

OURS = "narrowcast"
SOURCES = ("src/narrowcast/**/*.py", "csrc/*", *low_bits_cells.SCORING)


@dataclass(frozen=True)
class Format:
    """A pair of weight and activation formats.

    Attributes:
        weight: of linear layers.
        convolution: of convolutions; "" where they keep `weight`.
        input: of the layers' inputs; "" leaves them float.
        ends: of the first and the last layer, weights and inputs, as this field leaves them in more bits; ("", "")
            gives them the format of all others.
        depthwise: of the inputs of depthwise convolutions; "" where they keep `input`.
        symmetric: of the inputs of convolutions and recurrent layers, where `input` has zero points that they do not
            take at run time; "" where they keep `input`.
    """

    weight: str
    convolution: str = ""
    input: str = ""
    ends: tuple[str, str] = ("", "")
    depthwise: str = ""
    symmetric: str = ""


FORMATS = {
    "W8A8 static": Format("int8/channel", input="uint8/channel static:minmax"),
    "W8A8 dynamic": Format("int8/channel", input="uint8/token", symmetric="int8/token"),
    "W4A8": Format("int4/group32/asym", "int4/channel", "int8/token"),
    # ranges per channel would go into the weights, which have no codes to spare, but for depthwise convolutions: their
    # weights have a scale for each of these channels
    "W4A8 static": Format("int4/channel", input="uint8/tensor static:mse", depthwise="uint8/channel static:minmax"),
    "W4A4": Format(
        "int4/channel", input="uint4/tensor static:mse", ends=("int8/channel", "uint8/tensor static:minmax")
    ),
    "W4 channel": Format("int4/channel/asym"),
    "W4 g32": Format("int4/group32/asym"),
    "W3 g32": Format("int3/group32/asym"),
    "W2 g32": Format("int2/group32/asym"),
}
# Measured only when asked for: super-blocks and learned levels beside the formats above.
MORE_FORMATS = {
    "W4 k6": Format("int4/group32/asym/scale:k6"),
    "W3 k6": Format("int3/group32/asym/scale:k6"),
    "W2 k6": Format("int2/group32/asym/scale:k6"),
    "W3 k6 g16": Format("int3/group16/asym/scale:k6"),
    "W2 k6 g16": Format("int2/group16/asym/scale:k6"),
    "W3 channel": Format("int3/channel/asym"),
    "W2 channel": Format("int2/channel/asym"),
    "W4 codebook": Format("codebook4/channel"),
    "W3 codebook": Format("codebook3/channel"),
    "W2 codebook": Format("codebook2/channel"),
}
ENDS = {
    "resnet20": ["conv1", "linear"],
    "mobilenetv1": ["stem.1", "classifier"],
    "mobilenetv2": ["stem", "classifier"],
    "squeezenet11": ["conv1", "conv10"],
}
DEPTHWISE = {"mobilenetv1": "blocks.*.0.*", "mobilenetv2": "*.dw"}
# Models without a layer for the rule behind that of convolutions.
ALL_CONVOLUTIONS = ("squeezenet11",)
# What a recipe says besides formats.
METHODS: dict[str, dict[str, Any]] = {
    "default": {},
    "rtn without data": {"method": {"rtn": {}}, "data": False},
    "rtn": {"method": {"rtn": {}}},
    "hqq": {"method": {"hqq": {}}},
    "gptq": {"method": {"gptq": {}}},
    "adaround": {"method": {"adaround": {}}},
    "autoround": {"method": {"autoround": {}}},
    "equalize + rtn": {"method": {"rtn": {}}, "transforms": ["equalize"]},
    "awq + rtn": {"method": {"rtn": {}}, "transforms": ["awq"]},
    "awq + gptq": {"method": {"gptq": {}}, "transforms": ["awq"]},
    "smoothquant + rtn": {"method": {"rtn": {}}, "transforms": ["smoothquant"]},
    "equalize + autoround": {"method": {"autoround": {}}, "transforms": ["equalize"]},
}
CONVOLUTIONAL = ("equalize + rtn", "equalize + autoround")
ATTENTION = ("awq + rtn", "awq + gptq", "smoothquant + rtn")


def applies(kit: KitModel, form: str, method: str) -> bool:
    """Whether a combination is about this kind of model."""
    if kit.kind == "recurrent" and form in ("W8A8 static", "W4A8", "W4A8 static"):
        return False  # refused: no integer kernel multiplies an LSTM's weights with such inputs
    if (FORMATS | MORE_FORMATS)[form].ends[0] and kit.name not in ENDS:
        return False
    if "static" in (FORMATS | MORE_FORMATS)[form].input and not METHODS[method].get("data", True):
        return False  # refused: the ranges come from data
    if method in CONVOLUTIONAL:
        return kit.kind == "cnn"
    return method not in ATTENTION or kit.kind in ("encoder", "decoder")


def recipe_of(name: str, form: Format, method: str) -> dict[str, Any]:
    """The recipe document of one cell."""
    options = METHODS[method]
    solver = {"method": options["method"]} if "method" in options else {}
    rules: list[dict[str, Any]] = [
        {"role": role, "keep": "float32, as the peers leave it", "optional": True} for role in ("embedding", "tied")
    ]
    given = {"input": form.input} if form.input else {}
    if form.ends[0]:
        rules.append({"layers": ENDS[name], "weight": form.ends[0], "input": form.ends[1]})
    if form.depthwise and name in DEPTHWISE:
        rules.append({"layers": DEPTHWISE[name], "weight": form.weight, "input": form.depthwise, **solver})
    if form.symmetric:
        inner = {"weight": form.weight, "input": form.symmetric, **solver, "optional": True}
        rules += [{"type": kind, **inner} for kind in ("Conv2d", "LSTM")]
    if form.convolution:
        rules.append({"type": "Conv2d", "weight": form.convolution, **given, **solver, "optional": True})
    others = {"optional": True} if name in ALL_CONVOLUTIONS and (form.convolution or form.symmetric) else {}
    rules.append({"weight": form.weight, **given, **solver, **others})
    document = {"name": f"{method}", "rule": rules}
    return document | ({"transforms": options["transforms"]} if "transforms" in options else {})


def cell(name: str, form: str, method: str, samples: str) -> dict[str, Any]:
    """One measured cell; to be run in a process of its own."""
    import narrowcast as nc

    kit = kit_model(name)
    model = kit.build()
    expected = kit.outputs(model, kit.sets[samples])
    data = kit.calibration() if METHODS[method].get("data", True) else None
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    recipe = recipe_of(name, (FORMATS | MORE_FORMATS)[form], method)
    quantized = nc.quantize(model, recipe, data=data, progress=False)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    solved = [row for row in quantized.report.layers if row.outcome in ("quantized", "fell back")]
    return {
        **low_bits_score.figures(kit, samples, expected, kit.outputs(quantized.model, kit.sets[samples])),
        "bits": round(sum(r.bits_per_weight * r.parameters for r in solved) / sum(r.parameters for r in solved), 3),
        "seconds": round(seconds, 1),
        "peak_mb": round(peak / 1024),
        "fell_back": [f"{row.layer}: {row.reason}" for row in quantized.report.layers if row.outcome == "fell back"],
    }


def cells_of(chosen: argparse.Namespace, names: list[str], versions: dict[str, str]) -> list[Cell]:
    """Every cell that the options ask for: model by model, format by format, narrowcast before the other tools."""
    samples = "quick" if chosen.quick else "held_out"
    ours = low_bits_cells.digest(SOURCES) if OURS in versions else ""
    found = []
    for name in names:
        for form in chosen.formats:
            methods = [m for m in chosen.methods if OURS in versions and applies(kit_model(name), form, m)]
            for method in methods:
                command = low_bits_cells.narrowcast_command(name, form, method, samples)
                recipe = recipe_of(name, (FORMATS | MORE_FORMATS)[form], method)
                source = low_bits_cells.digest((), ours, recipe, METHODS[method])
                found.append(Cell(name, form, OURS, method, samples, command, source))
            for tool in (tool for tool in versions if tool in PEERS):
                found += low_bits_peers.cells_of(
                    tool, kit_model(name), form, samples, versions[tool], chosen.peer_python
                )
    return found


def options(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = results_io.arguments(__doc__ or "", ())
    tools, python = [OURS, *PEERS], os.environ.get("NARROWCAST_PEERS_PYTHON", sys.executable)
    parser.add_argument("--formats", nargs="+", choices=FORMATS | MORE_FORMATS, default=list(FORMATS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="of narrowcast")
    parser.add_argument("--tools", nargs="+", choices=tools, default=tools, help="narrowcast and other tools")
    parser.add_argument("--peer-python", default=python, help="the other tools' (default: $NARROWCAST_PEERS_PYTHON)")
    parser.add_argument("--fresh", action="store_true", help="measure again what build/benchmarks/low_bits has")
    parser.add_argument("--known", action="store_true", help="measure nothing: the page of what is known so far")
    parser.add_argument("--keep", action="store_true", help="rows of the committed file where the run has none")
    parser.add_argument("--limit-seconds", type=float, help="stop a cell after so long")
    parser.add_argument("--cell", nargs=4, metavar=("MODEL", "FORMAT", "METHOD", "SAMPLES"), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Measures every cell and writes the results; without narrowcast's cells they are named low_bits_peers."""
    chosen = options(argv)
    if chosen.cell:
        print(json.dumps(cell(*chosen.cell)))
        return 0
    torch.manual_seed(0)
    facts, skipped = machine(), []
    names = results_io.available(chosen.models, skipped.append)
    versions = low_bits_peers.versions(chosen.tools, chosen.peer_python, skipped.append)
    cells = cells_of(chosen, names, versions)
    rows = low_bits_cells.run_all(
        cells, fresh=chosen.fresh, known_only=chosen.known, limit=chosen.limit_seconds, show=partial(print, flush=True)
    )
    ours = OURS in chosen.tools
    name = "low_bits" if ours else "low_bits_peers"
    if chosen.keep:
        rows = low_bits_cells.with_earlier(cells, rows, results_io.rows_of(results_io.folder_of(True), name))
    if len(rows) < len(cells):
        skipped.append(f"{len(cells) - len(rows)} of {len(cells)} cells are not measured yet and left out.")
    complete = len(rows) == len(cells) and not chosen.quick
    complete &= set(chosen.models) == set(KIT_NAMES) and set(chosen.formats) == set(FORMATS)
    complete &= set(PEERS) <= set(chosen.tools) and (not ours or set(chosen.methods) == set(METHODS))
    folder = chosen.out or results_io.folder_of(complete)
    document = {"machine": facts, "versions": versions, "skipped": skipped, "rows": rows}
    description = " ".join((__doc__ or "").split("\n\n")[2].split())
    page = low_bits_page.markdown(facts, document, description, models=chosen.models, formats=chosen.formats)
    results_io.write_results(folder, name, document, page)
    return int(not rows or any("failed" in row for row in rows if row["tool"] == OURS))


if __name__ == "__main__":
    sys.exit(main())
