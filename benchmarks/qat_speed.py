"""What a step of quantization-aware training costs in time and memory, beside other tools.

    python -m benchmarks.qat speed                                everything, into benchmarks/results
    python -m benchmarks.qat speed --quick                        one round, into build/benchmarks
    python -m benchmarks.qat speed --peer-python PATH             torchao and Brevitas, installed in another interpreter

Every contender is a process of its own with one thread (benchmarks/qat_step.py); they step in turns, so that noise hits
all. Ratios are those of processor time in the same round: on a machine that others use too, the clock measures them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks import results_io
from benchmarks.machine import REPOSITORY, machine
from benchmarks.peers_qat.formats import FORMATS
from benchmarks.qat_step import IMAGES, SENTENCES

OURS = ("float32", "narrowcast lsq", "narrowcast ste", "torch.ao")
PEERS = ("torchao", "Brevitas")
SLOWEST, MOST_MEMORY = 1.6, 1.3
# torch's tensors go back to the system at once, so that the peak of a step is its own
_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_ARENA_MAX": "1"}


class Contender:
    """A process that does steps of one tool.

    Args:
        tool, model, form: what it trains.
        python: its interpreter.
    """

    def __init__(self, tool: str, model: str, form: str, python: str) -> None:
        self.tool = tool
        self.command = [python, "-m", "benchmarks.qat_step", tool, model, form]
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            cwd=REPOSITORY, env=_environment(),
        )  # fmt: skip
        self.rounds: list[dict[str, list[float]]] = []
        self.failed = ""

    def begin(self) -> str:
        """Wait until it is ready; the reason where it cannot run."""
        self.failed = self._read().get("failed", "")
        return self.failed

    def turn(self, seconds: float) -> None:
        """One burst of steps."""
        assert self.process.stdin is not None
        print(json.dumps({"seconds": seconds}), file=self.process.stdin, flush=True)
        self.rounds.append(self._read())

    def end(self) -> None:
        """Close its input, upon which it ends, and wait."""
        self.process.communicate()

    def memory(self) -> dict[str, float]:
        """What a step needs, in a fresh process."""
        done = subprocess.run(
            [*self.command, "--memory"], capture_output=True, text=True, cwd=REPOSITORY, check=True,
            env=_environment() | _MEMORY,
        )  # fmt: skip
        found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return found

    def times(self, kind: str) -> list[float]:
        """Median of every burst, milliseconds: `cpu_ms` or `wall_ms`."""
        return [statistics.median(each[kind]) for each in self.rounds]

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        return json.loads(line) if line else {"failed": "the process ended without an answer"}


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{REPOSITORY / 'src'}{os.pathsep}{REPOSITORY}", "OMP_NUM_THREADS": "1"}


def measure(model: str, form: str, rounds: int, python: str) -> dict[str, Any]:
    """Every tool on one model and format, in turns."""
    everyone = [Contender(tool, model, form, sys.executable) for tool in OURS]
    everyone += [Contender(tool, model, form, python) for tool in PEERS]
    started = results_io.load_average()
    running = [one for one in everyone if not one.begin()]
    for _ in range(rounds):
        for one in running:
            one.turn(0.5)
    for one in everyone:
        one.end()
    base = running[0]
    result: dict[str, Any] = {"load": [started, results_io.load_average()], "rounds": rounds, "tools": {}}
    base_memory = base.memory()
    for one in everyone:
        memory = {} if one.failed else (base_memory if one is base else one.memory())
        result["tools"][one.tool] = {"failed": one.failed} if one.failed else _row(one, base, memory, base_memory)
        print(model, form, one.tool, result["tools"][one.tool], flush=True)
    return result


def _row(one: Contender, base: Contender, memory: dict[str, float], base_memory: dict[str, float]) -> dict[str, Any]:
    ratios = {
        kind: sorted(a / b for a, b in zip(one.times(kind), base.times(kind), strict=True))
        for kind in ("cpu_ms", "wall_ms")
    }
    return {
        "cpu_ms": statistics.median(one.times("cpu_ms")),
        "wall_ms": statistics.median(one.times("wall_ms")),
        "ratio": statistics.median(ratios["cpu_ms"]),
        "ratio_range": [ratios["cpu_ms"][0], ratios["cpu_ms"][-1]],
        "wall_ratio": statistics.median(ratios["wall_ms"]),
        "memory_mib": memory,
        "memory_ratio": _whole(memory) / _whole(base_memory),
    }


def _whole(memory: dict[str, float]) -> float:
    return memory["held"] + memory["resident"]


def page(document: dict[str, Any]) -> str:
    """The results as Markdown."""
    header = ("model", "format", "tool", "CPU ms", "times float", "range", "times float, clock", "MiB", "memory")
    rows, reasons, verdicts = [], [], []
    for name, found in document["results"].items():
        model, form = name.split(" ", 1)
        for tool, row in found["tools"].items():
            if row.get("failed"):
                reasons.append((model, form, tool, row["failed"]))
                continue
            low, high = row["ratio_range"]
            rows.append(
                (model, form, tool, f"{row['cpu_ms']:.0f}", f"{row['ratio']:.2f}", f"{low:.2f}-{high:.2f}",
                 f"{row['wall_ratio']:.2f}", f"{_whole(row['memory_mib']):.0f}", f"{row['memory_ratio']:.2f}")
            )  # fmt: skip
        verdicts.append((model, form, *_verdict(found["tools"])))
    sections = [
        "`python -m benchmarks.qat speed`. One training step (forward, backward, SGD with momentum): ResNet-20 with "
        f"{IMAGES} images, MiniLM with {SENTENCES[0]} x {SENTENCES[1]} tokens, embeddings float. Each tool is a "
        "process with one thread, they step in turns; processor time, median over rounds of the ratio to float32 "
        "in the same round, with smallest and largest. Memory: tensors that live between steps and the "
        "peak of a step above them, in a process of its own. Dynamic inputs have zero points, but for narrowcast in "
        "W4A8, whose kernels multiply rows without. torch.ao traces ResNet-20 and rounds results of additions too; of "
        "MiniLM every tool rounds weights and inputs of linear layers, and nothing else.",
        results_io.table(header, rows),
        f"Targets: at most {SLOWEST} times the float step, {MOST_MEMORY} times its memory, not slower than any tool.",
        results_io.table(("model", "format", "time", "memory", "beside the fastest tool"), verdicts),
        "Load average of the two cores at start and end, rounds: "
        + "; ".join(
            f"{name} {found['load'][0]}, {found['load'][1]}, {found['rounds']}"
            for name, found in document["results"].items()
        ),
        "What does not run:",
        results_io.table(("model", "format", "tool", "reason"), reasons),
    ]
    return results_io.page("A step of quantization-aware training", document["machine"], sections)


def _verdict(tools: dict[str, Any]) -> tuple[str, str, str]:
    """Whether narrowcast's default keeps the targets."""
    ours = tools["narrowcast lsq"]
    if ours.get("failed"):
        return ours["failed"], "", ""
    others = {t: r["ratio"] for t, r in tools.items() if t in ("torch.ao", *PEERS) and not r.get("failed")}
    beside = "no other tool runs"
    if others:
        fastest = min(others, key=lambda tool: others[tool])
        share = ours["ratio"] / others[fastest]
        beside = f"{share:.2f} of {fastest}'s time: {'met' if share <= 1 else 'missed'}"
    time = f"{ours['ratio']:.2f}: {'met' if ours['ratio'] <= SLOWEST else 'missed'}"
    memory = f"{ours['memory_ratio']:.2f}: {'met' if ours['memory_ratio'] <= MOST_MEMORY else 'missed'}"
    return time, memory, beside


def cells() -> list[str]:
    """Every model with every format."""
    return [f"{model} {form}" for model, forms in FORMATS.items() for form in forms]


def main(argv: list[str] | None = None) -> int:
    """Measures and writes the results after each cell; those of other cells stay."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", choices=cells(), metavar="CELL", help="some only: 'minilm W4 g32'")
    parser.add_argument("--rounds", type=int, default=7, help="turns of every tool")
    python = os.environ.get("NARROWCAST_PEERS_PYTHON", sys.executable)
    parser.add_argument("--peer-python", default=python, help="the other tools' (default: $NARROWCAST_PEERS_PYTHON)")
    parser.add_argument("--quick", action="store_true", help="one round: does it work at all?")
    parser.add_argument("--out", type=Path, help="folder of the results")
    options = parser.parse_args(argv)
    names = results_io.available(FORMATS, print)
    folder = options.out or results_io.folder_of(not options.quick)
    path = folder / "qat_speed.json"
    document: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"results": {}}
    for cell in options.cells or cells():
        model, form = cell.split(" ", 1)
        if model not in names:
            continue
        document["machine"] = facts = machine()
        found = measure(model, form, 1 if options.quick else options.rounds, options.peer_python)
        document["results"][cell] = found | {"commit": facts["commit"], "date": facts["date"]}
        results_io.write_results(folder, "qat_speed", document, page(document))
    return 0 if names else 2


if __name__ == "__main__":
    sys.exit(main())
