"""Mutated ONNX files, each read, planned and quantized: a clear error or a clean result, nothing else.

    python -m benchmarks.onnx_fuzz                   10,000 files, into benchmarks/results
    python -m benchmarks.onnx_fuzz --count 300       fewer, into build/benchmarks
    python -m benchmarks.onnx_fuzz --first 10000 --count 20000      other files

Files come from small good models (`tests/onnx_files/graphs.py` has their like) by changed bytes, cuts, spliced pieces,
and by changes of their fields: swapped and repeated names, edges back, sides of 0, -1 and 2^62, other types, weights in
files elsewhere, behind links, at huge offsets. Every file is worked on in a process that does 500 of them, with a
limit of time, and of address space so that a request for much memory fails. Whatever Python opens is watched: nothing
outside of the model's folder, of Python's own folders and of the temporary folder may be read, and nothing may be
written into the model's folder.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.machine import REPOSITORY, machine
from benchmarks.onnx_mutations import mutated, seeds
from benchmarks.results_io import folder_of, page, table, write_results

PER_PROCESS, SECONDS_EACH, SLOW_SECONDS = 500, 60, 10.0
ROOM_BYTES = 2 * 2**30


def prepare_folder(folder: Path) -> Path:
    """A folder with a model's place, files beside it, and a secret outside; returns the model's folder."""
    inside = folder / "model"
    (inside / "folder").mkdir(parents=True)
    (folder / "secret.bin").write_bytes(b"\x41" * 8192)
    (inside / "weights.bin").write_bytes(b"\x00\x00\x80\x3f" * 2048)
    (inside / "link.bin").symlink_to(folder / "secret.bin")
    (inside / "hard.bin").hardlink_to(folder / "secret.bin")
    return inside


class Watch:
    """Which files Python opens outside of where it may."""

    def __init__(self, allowed: list[Path]) -> None:
        self.allowed = [str(path) for path in allowed]
        self.outside: list[str] = []
        self.on = False
        sys.addaudithook(self._see)

    def _see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on or event != "open" or not isinstance(arguments[0], str | bytes):
            return
        path = os.path.realpath(os.fsdecode(arguments[0]))
        if not any(path.startswith(place) for place in self.allowed):
            self.outside.append(path)


def one(path: Path, recipe: str) -> tuple[str, str]:
    """What became of a file: ("planned", "quantized", "refused" or the name of a foreign error; message)."""
    import narrowcast as nc

    outcome = "refused while planning"
    try:
        nc.plan(path, recipe)
        outcome = "refused while quantizing"
        nc.quantize(path, recipe, progress=False)
    except nc.NarrowcastError as error:
        return outcome, str(error)
    except MemoryError:
        return "MemoryError", ""
    except Exception as error:  # what a fuzzer is for
        return f"foreign {type(error).__name__}", str(error)
    return "quantized", ""


def child(first: int, count: int) -> None:
    """Work on `count` files from number `first`; one JSON line for each, before and after."""
    import onnx
    import onnxruntime
    import torch

    import narrowcast as nc

    torch.set_num_threads(1)
    models = seeds()
    nc.quantize(models[0], "weight-int8", progress=False)
    assert onnx.__version__ and onnxruntime.__version__
    with tempfile.TemporaryDirectory() as name:
        folder = prepare_folder(Path(name))
        installed = Path(onnx.__file__).parents[1]
        python = [Path(p) for p in (sys.prefix, sys.base_prefix, installed, REPOSITORY, "/dev", "/proc", "/sys")]
        watch = Watch([folder, *[path.resolve() for path in python], Path(tempfile.gettempdir()) / "narrowcast."])
        watch.allowed += [os.path.realpath(Path(tempfile.gettempdir()) / "tmp")]
        present = sorted(folder.iterdir())
        pages = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (pages + ROOM_BYTES,) * 2)
        for index in range(first, first + count):
            chance = random.Random(index)
            content, kind = mutated(chance.choice(models), chance)
            path = folder / "model.onnx"
            path.write_bytes(content)
            print(json.dumps({"begun": index, "kind": kind}), flush=True)
            began = time.perf_counter()
            watch.on, watch.outside = True, []
            outcome, message = one(path, chance.choice(("weight-int8", "weight-int4", "dynamic-int8", "fp16")))
            watch.on = False
            path.unlink()
            row = {"index": index, "kind": kind, "outcome": outcome, "message": message[:300], "outside": watch.outside,
                   "seconds": round(time.perf_counter() - began, 2),
                   "written": [str(p) for p in sorted(folder.iterdir()) if p not in present]}  # fmt: skip
            print(json.dumps(row), flush=True)


def run_all(first: int, count: int) -> list[dict[str, Any]]:
    """The row of every file from number `first`; a process that dies or hangs is one, and the next begins behind it."""
    rows: list[dict[str, Any]] = []
    paths = os.pathsep.join([str(REPOSITORY / "src"), str(REPOSITORY)])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    at, end = first, first + count
    while at < end:
        number = min(PER_PROCESS, end - at)
        command = [sys.executable, "-m", "benchmarks.onnx_fuzz", "--child", str(at), str(number)]
        try:
            done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False,
                                  timeout=SECONDS_EACH + 3 * number)  # fmt: skip
            text, died = done.stdout, f"died with {done.returncode}: {done.stderr[-300:]}"
        except subprocess.TimeoutExpired as late:
            text, died = (late.stdout or b"").decode(), "hung"
        found = [json.loads(line) for line in text.splitlines() if line.startswith("{") and line.endswith("}")]
        finished = [row for row in found if "index" in row]
        rows += finished
        at += len(finished)
        if len(finished) < number:
            kind = next((row["kind"] for row in found if row.get("begun") == at), "")
            rows.append({"index": at, "kind": kind, "outcome": died, "message": "", "outside": [], "written": [],
                         "seconds": 0.0})  # fmt: skip
            at += 1
        for row in rows[-number:]:
            if is_bad(row):
                print(json.dumps(row))
        print(f"{at - first} of {count}", flush=True)
    return rows


def is_bad(row: dict[str, Any]) -> bool:
    """Whether a file had another end than a clear error or a clean result."""
    known = row["outcome"] in ("quantized", "refused while planning", "refused while quantizing")
    silent = row["outcome"].startswith("refused") and len(row["message"]) < 20
    return not known or silent or bool(row["outside"] or row["written"]) or row["seconds"] > SLOW_SECONDS


def main(argv: list[str] | None = None) -> int:
    """Runs, writes the page, and returns 1 where a file had a bad end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000, help="how many files")
    parser.add_argument("--first", type=int, default=0, help="number of the first file, of which chance makes it")
    parser.add_argument("--quick", action="store_true", help="300 files")
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--child", nargs=2, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        child(*options.child)
        return 0
    count = 300 if options.quick else options.count
    rows = run_all(options.first, count)
    bad = [row for row in rows if is_bad(row)]
    ends = Counter(row["outcome"].split(":")[0] for row in rows)
    kinds = Counter((row["kind"], row["outcome"].split(":")[0].startswith("quantized")) for row in rows)
    command = f"python -m benchmarks.onnx_fuzz{_others(options.first, count)}"
    tables = [
        f"{count} files, {len(bad)} bad ends. `{command}` repeats it with the same files.",
        table(["end", "files"], ends.most_common()),
        table(["mutation", "files", "of them quantized"],
              [[k, kinds[k, True] + kinds[k, False], kinds[k, True]] for k in sorted({kind for kind, _ in kinds})]),
    ]  # fmt: skip
    if bad:
        shown = [
            [row["index"], row["kind"], row["outcome"], row["message"], row["outside"] or row["written"]] for row in bad
        ]
        tables.append(table(["file", "mutation", "end", "message", "files touched"], shown))
    facts = machine()
    document = {
        "machine": facts,
        "first": options.first,
        "count": count,
        "ends": ends,
        "bad": bad,
        "slowest_s": max(r["seconds"] for r in rows),
    }
    folder = options.out or folder_of(count == 10_000 and not options.first)
    write_results(folder, "onnx_fuzz", document, page("Mutated ONNX files", facts, tables))
    return int(bool(bad))


def _others(first: int, count: int) -> str:
    """The options that name these files."""
    return (f" --first {first}" if first else "") + (f" --count {count}" if count != 10_000 else "")


if __name__ == "__main__":
    sys.exit(main())
