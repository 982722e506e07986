"""onnxruntime-web for a page: from npm or a folder; and a trial of the models in it before a browser sees them."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from narrowcast.errors import CheckpointError, KernelError, ModelError

PACKAGE = "onnxruntime-web"
# From 1.20 on: one build with threads that also runs without them, and JavaScript modules.
RANGE = ">=1.20 <2"
# What a page on the CPU needs of the 130 MB of the package.
FILES = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
_INSTALLING, _TRYING = 600, 600  # seconds
_CHECK = Path(__file__).with_name("web_check.mjs")


@contextmanager
def runtime_files(folder: Path | None) -> Iterator[Path]:
    """The folder of onnxruntime-web's files: the given one, or one that npm installs for the time.

    Args:
        folder: the package, its `dist`, a `node_modules` or what holds one; None installs it.

    Raises:
        KernelError: it is not there, or npm is missing or fails; the message has its words.
    """
    if folder is not None:
        yield _found(folder)
        return
    with tempfile.TemporaryDirectory(prefix="narrowcast-npm-") as place:
        _install(Path(place))
        yield _found(Path(place))


def _found(folder: Path) -> Path:
    places = [folder, folder / "dist", folder / PACKAGE / "dist", folder / "node_modules" / PACKAGE / "dist"]
    for place in places:
        if all((place / name).is_file() for name in FILES):
            return place
    raise KernelError(
        f"{folder} is no {PACKAGE}: {', '.join(FILES)} are not in it or its dist folder; give the folder that "
        f"'npm install {PACKAGE}' makes, of a version {RANGE}"
    )


def _install(place: Path) -> None:
    remedy = (
        f"install Node.js with npm, or run 'npm install {PACKAGE}' on another machine and give its folder by "
        "--runtime-from (runtime=)"
    )
    npm = shutil.which("npm")
    if npm is None:
        raise KernelError(f"{PACKAGE} comes from npm, and there is no npm on this machine; {remedy}")
    command = [npm, "install", "--prefix", str(place), "--no-audit", "--no-fund", "--ignore-scripts", "--omit=dev",
               "--loglevel=error", f"{PACKAGE}@{RANGE}"]  # fmt: skip
    try:
        done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=_INSTALLING, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelError(f"npm install {PACKAGE} did not end: {error!s:.300}; {remedy}") from None
    if done.returncode:
        raise KernelError(f"npm install {PACKAGE} failed: {' '.join(done.stderr.split())[-500:]}; {remedy}")


def copy_runtime(source: Path, target: Path) -> str:
    """Copy what a page needs of onnxruntime-web, and its package.json with version and licence; returns the version."""
    target.mkdir()
    for name in FILES:
        shutil.copyfile(source / name, target / name)
    package = source.parent / "package.json"
    if not package.is_file():
        return "unknown"
    shutil.copyfile(package, target / "package.json")
    try:
        return str(json.loads(package.read_text(encoding="utf-8")).get("version", "unknown"))
    except ValueError as error:
        raise CheckpointError(f"{package} is not JSON ({error}); install {PACKAGE} again") from None


def try_models(runtime: Path, models: Mapping[str, Path], feeds: Mapping[str, Any], output: str) -> Any:
    """Run every model once in WebAssembly, in Node.js.

    Args:
        runtime: folder of onnxruntime-web's files.
        models: files by name.
        feeds: arrays of the inputs by name.
        output: name of the output that is wanted.

    Returns:
        By name the flat output, float64; None where there is no Node.js to try them in.

    Raises:
        ModelError: a model does not load or run; the message has the runtime's words.
        KernelError: Node.js or the runtime itself fails.
    """
    node = shutil.which("node")
    if node is None:
        return None
    request = {
        "runtime": str(runtime.absolute()), "output": output, "models": {k: str(v) for k, v in models.items()},
        "feeds": {name: _plain(array) for name, array in feeds.items()},
    }  # fmt: skip
    try:
        done = subprocess.run([node, str(_CHECK)], input=json.dumps(request), capture_output=True, text=True,
                              timeout=_TRYING, check=False)  # fmt: skip
        answers = json.loads(done.stdout) if done.returncode == 0 else None
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise KernelError(f"{PACKAGE} cannot be tried in Node.js: {error!s:.300}") from None
    if answers is None:
        raise KernelError(f"{PACKAGE} cannot be tried in Node.js: {' '.join(done.stderr.split())[:500]}")
    for name, answer in answers.items():
        if "error" in answer:
            raise ModelError(
                f"{PACKAGE} does not run the {name} model: {answer['error']:.400}; its WebAssembly has the operators "
                "of ONNX Runtime's CPU build: quantize to int8 or int4 and leave out bfloat16 and custom operators"
            )
    return {name: _numbers(answer) for name, answer in answers.items()}


def _numbers(answer: dict[str, Any]) -> Any:
    if answer["half"]:
        return np.array(answer["data"], np.uint16).view(np.float16).astype(np.float64)
    return np.array(answer["data"], np.float64)


def _plain(array: Any) -> dict[str, Any]:
    if array.dtype == np.float16 and np.isfinite(array).all():
        return {"type": "float16", "data": array.reshape(-1).view(np.uint16).tolist(), "dims": list(array.shape)}
    values = [int(v) for v in array.reshape(-1)] if array.dtype.kind in "iub" else array.reshape(-1).tolist()
    if any(isinstance(v, float) and not math.isfinite(v) for v in values):
        raise ModelError("an example holds a number that is not finite")
    return {"type": str(array.dtype), "data": values, "dims": list(array.shape)}
