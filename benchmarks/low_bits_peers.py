"""One cell of another tool for `python -m benchmarks.low_bits`, which runs this file in the peers' interpreter.

    python -m benchmarks.low_bits_peers --cell MODEL FORMAT TOOL METHOD SAMPLES     one row as JSON
    python -m benchmarks.low_bits_peers --versions                                  which tools are installed

The tool gets the same float32 model and calibration data as narrowcast; its answers on the same samples go through the
same functions. Seconds are those from the trained torch module to something that answers: exports count.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any

from benchmarks import low_bits_cells, low_bits_score
from benchmarks.kit import KitModel, kit_model
from benchmarks.low_bits_cells import Cell
from benchmarks.machine import REPOSITORY, installed_version
from benchmarks.peers_low_bits.table import PEERS


def cell(name: str, form: str, tool: str, method: str, samples: str) -> dict[str, Any]:
    """One measured cell; to be run in a process of its own."""
    peer = import_module(f"benchmarks.peers_low_bits.{PEERS[tool].module}")
    kit = kit_model(name)
    expected = kit.outputs(kit.build(), kit.sets[samples])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    quantized = peer.quantize(kit, form, method)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    outputs = kit.outputs(quantized.call, kit.sets[samples])
    return {
        **low_bits_score.figures(kit, samples, expected, outputs),
        "seconds": round(seconds, 1),
        "peak_mb": round(peak / 1024),
        "changed": quantized.changed,
        "matrices": quantized.matrices,
        "notes": quantized.notes,
    }


def cells_of(tool: str, kit: KitModel, form: str, samples: str, version: str, python: str) -> list[Cell]:
    """The cells of one tool on a model and format; none where it offers nothing."""
    peer = PEERS[tool]
    files = [f"benchmarks/peers_low_bits/{name}.py" for name in (peer.module, "base", "llama", "onnx_graph")]
    source = low_bits_cells.digest([*files, "benchmarks/low_bits_peers.py", *low_bits_cells.SCORING], version)
    methods = [name for name, offer in peer.methods.items() if kit.kind in offer.kinds and form in offer.formats]
    command = (python, "-m", "benchmarks.low_bits_peers", "--cell", kit.name, form, tool)
    return [Cell(kit.name, form, tool, method, samples, (*command, method, samples), source) for method in methods]


def versions(tools: list[str], python: str, note: Callable[[str], None]) -> dict[str, str]:
    """Versions of every tool that is installed; the others are reported through `note`.

    Args:
        tools: names in PEERS, and any other name, which is kept with an empty version.
        python: the interpreter whose packages count.
        note: called with one sentence per tool that is not installed.
    """
    command = [python, "-m", "benchmarks.low_bits_peers", "--versions"]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=True).stdout)
    for tool in tools:
        if tool in PEERS and tool not in found:
            note(f"{tool}: skipped, {PEERS[tool].packages[0]} is not installed")
    return {tool: found.get(tool, "") for tool in tools if tool not in PEERS or tool in found}


def installed() -> dict[str, str]:
    """Versions of the packages of every tool that this interpreter has."""
    return {
        tool: ", ".join(f"{package} {installed_version(package)}" for package in peer.packages)
        for tool, peer in PEERS.items()
        if installed_version(peer.packages[0])
    }


def main(argv: list[str] | None = None) -> int:
    """Prints one JSON document as its last line; whatever a tool prints goes to standard error."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cell", nargs=5, metavar=("MODEL", "FORMAT", "TOOL", "METHOD", "SAMPLES"))
    parser.add_argument("--versions", action="store_true")
    chosen = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    with contextlib.redirect_stdout(sys.stderr):
        document = cell(*chosen.cell) if chosen.cell else installed()
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
