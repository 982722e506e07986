"""What ONNX files score on CPUs without VNNI, where sums of two products saturate: plain and with `portable = true`.

    python -m benchmarks.onnx_portable                          into benchmarks/results
    python -m benchmarks.onnx_portable --models mobilenetv1     into build/benchmarks

A CPU without VNNI is made of one with it: in copies of ONNX Runtime's library the checks of CPUID for VNNI, and in one
of them for AVX-512, are patched to fail, so that its other kernels run. Files made of the float ONNX file and files
exported from the quantized PyTorch module are answered by the library as it is and by both copies, in processes of
their own. Linux on x86-64 only; a library whose checks are not found is an error.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import onnx_cell, results_io
from benchmarks.kit import kit_model
from benchmarks.machine import REPOSITORY, machine
from benchmarks.onnx_cases import KIT, case
from benchmarks.onnx_tools import FLOAT32, ORT, session, tensors

FOLDER = REPOSITORY / "build" / "benchmarks" / "onnx_portable"
# cpuid; test al, 16: AVX-VNNI. and r, 0x800: AVX512-VNNI, behind the check of AVX-512. test r, 0x10000: AVX-512.
AVX_VNNI, AVX512_VNNI = rb"\x0f\xa2\xa8\x10", rb"\x81[\xe0-\xe7]\x00\x08\x00\x00"
AVX512 = rb"\xf7[\xc0-\xc7]\x00\x00\x01\x00"
NEAR = 0x800
CPUS = ("as it is", "AVX-512 without VNNI", "AVX2 without VNNI")
FILE, MODULE = "ONNX file", "module, exported"
PORTABLE = (False, True)
FILES = {f"{source}{', portable' if portable else ''}": (source, portable) for source in (FILE, MODULE)
         for portable in PORTABLE}  # fmt: skip
MODELS = ("mobilenetv1", "resnet20", "squeezenet11")


class PatchError(RuntimeError):
    """The library is not one whose checks of the CPU are known."""


def patched(folder: Path, *, avx512: bool) -> Path:
    """A copy of the installed onnxruntime that finds no VNNI, and without `avx512` no AVX-512; what to put on the path.

    Raises:
        PatchError: a check was not found.
    """
    import onnxruntime

    source = Path(onnxruntime.__file__).parent
    target = folder / ("avx512" if avx512 else "avx2")
    if not target.exists():
        shutil.copytree(source, target / "onnxruntime", ignore=shutil.ignore_patterns("transformers", "tools"))
        (library,) = (target / "onnxruntime" / "capi").glob("onnxruntime_pybind11_state*.so")
        library.write_bytes(_patched_bytes(library.read_bytes(), avx512=avx512))
    return target


def _patched_bytes(library: bytes, *, avx512: bool) -> bytes:
    data = bytearray(library)
    places = {
        "AVX-VNNI": [(m.start(), 3) for m in re.finditer(AVX_VNNI, library)],
        "AVX512-VNNI": [(m.start(), 3) for m in re.finditer(AVX512_VNNI, library)
                        if b"\x00\x00\x02\xc0" in library[m.start() - NEAR : m.start()]],
        "AVX-512": [(m.start(), 4) for m in re.finditer(AVX512, library)
                    if re.search(AVX_VNNI, library[m.start() - NEAR : m.start()])],
    }  # fmt: skip
    if len({len(found) for found in places.values()}) != 1 or not places["AVX-VNNI"]:
        counted = {name: len(found) for name, found in places.items()}
        raise PatchError(f"the checks of the CPU were found {counted} times, expected equally often, at least once")
    for name, found in places.items():
        for start, offset in found if name != "AVX-512" or not avx512 else []:
            data[start + offset] = 0
    return bytes(data)


def make(name: str) -> dict[str, list[str]]:
    """Write the files of one model; what is said of CPUs without VNNI, by file."""
    said = {}
    for kind, (source, portable) in FILES.items():
        path = FOLDER / file_of(name, kind)
        notes = _of_module(name, path, portable) if source == MODULE else _of_file(name, path, portable)
        said[kind] = [note for note in notes if "without VNNI" in note]
    return said


def _recipe(portable: bool) -> Any:
    from narrowcast.recipe import load_recipe

    return load_recipe("static-int8").to_dict() | {"portable": portable}


def _of_file(name: str, path: Path, portable: bool) -> list[str]:
    """Quantize the float ONNX file."""
    import narrowcast as nc

    chosen = case(name)
    source = onnx_cell.float32_file(chosen)
    data: Any = [tensors(batch) for batch in chosen.calibration(*session(source, ORT, 1))]
    quantized = nc.quantize(source, _recipe(portable), data, progress=False)
    nc.save(quantized, path)
    return list(quantized.report.notes)


def _of_module(name: str, path: Path, portable: bool) -> list[str]:
    """Quantize the PyTorch module, and export it."""
    import narrowcast as nc

    kit = kit_model(name)
    quantized = nc.quantize(kit.build(), _recipe(portable), kit.calibration(), progress=False)
    return list(nc.export.onnx(quantized, path, kit.calibration()).notes)


def file_of(name: str, kind: str) -> str:
    """The name of a quantized file."""
    return f"{name}-{kind.replace(', ', '-').replace(' ', '-')}.onnx"


def answer(name: str) -> dict[str, Any]:
    """The scores of the files of a model in the library that this process finds."""
    rows = {}
    for kind in FILES:
        got = onnx_cell.answers(name, f"{ORT} {FLOAT32}", "held_out", FOLDER / file_of(name, kind))
        found = case(name).figures("held_out", onnx_cell.expected(name, "held_out"), got)
        rows[kind] = {key: found[key] for key in ("score", "sqnr_db", "agreement", "digest")}
    return rows


def _elsewhere(name: str, library: Path | None) -> dict[str, Any]:
    path = os.pathsep.join([*([str(library)] if library else []), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "benchmarks.onnx_portable", "--answer", name]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False,
                          env=os.environ | {"PYTHONPATH": path})  # fmt: skip
    if done.returncode:
        raise PatchError(done.stderr.splitlines()[-1])
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measure(name: str) -> list[dict[str, Any]]:
    """One row per file and library."""
    notes = make(name)
    np.asarray(onnx_cell.expected(name, "held_out"))  # by the library as it is, before copies ask for it
    libraries = {CPUS[0]: None, CPUS[1]: patched(FOLDER, avx512=True), CPUS[2]: patched(FOLDER, avx512=False)}
    answered = {cpu: _elsewhere(name, library) for cpu, library in libraries.items()}
    rows = [{"model": name, "file": kind, "cpu": cpu, **answered[cpu][kind], "notes": notes[kind]}
            for kind in FILES for cpu in CPUS]  # fmt: skip
    for row in rows:
        print({key: value for key, value in row.items() if key != "notes"}, flush=True)
    return rows


def markdown(facts: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The page."""
    digests = {(row["model"], row["file"]): row["digest"] for row in rows if row["cpu"] == CPUS[0]}
    table = results_io.table(
        ("model", "static-int8 of", "kernels", "score", "SQNR dB", "agreement %", "bits as with VNNI"),
        [(row["model"], row["file"], row["cpu"], f"{row['score']:.3f}", f"{row['sqnr_db']:.2f}",
          f"{row['agreement']:.2f}", "yes" if row["digest"] == digests[row["model"], row["file"]] else "no")
         for row in rows],
    )  # fmt: skip
    portable = [row for row in rows if row["cpu"] == CPUS[0] and "portable" in row["file"]]
    repaired = [f"- {row['model']}, {row['file']}: {note}" for row in portable for note in row["notes"]]
    description = " ".join((__doc__ or "").split("\n\n")[2].split())
    return results_io.page("ONNX files on CPUs without VNNI", facts, [description, table, "\n".join(repaired)])


def main(argv: list[str] | None = None) -> int:
    """Measures, and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=KIT, default=list(MODELS))
    parser.add_argument("--answer", help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help="one model only, into build/benchmarks")
    parser.add_argument("--out", type=Path, help="folder of the results (default: see above)")
    chosen = parser.parse_args(argv)
    if chosen.answer:
        with contextlib.redirect_stdout(sys.stderr):
            found = answer(chosen.answer)
        print(json.dumps(found))
        return 0
    FOLDER.mkdir(parents=True, exist_ok=True)
    names = results_io.available(chosen.models[:1] if chosen.quick else chosen.models, print)
    facts, rows = machine(), [row for name in names for row in measure(name)]
    folder = chosen.out or results_io.folder_of(set(names) == set(MODELS))
    results_io.write_results(folder, "onnx_portable", {"machine": facts, "rows": rows}, markdown(facts, rows))
    return int(not rows)


if __name__ == "__main__":
    sys.exit(main())
