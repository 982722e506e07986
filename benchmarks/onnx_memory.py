"""Peak memory of calibrating an ONNX model on many images, and of quantizing one of 6 GB, each in a process of its own.

    python -m benchmarks.onnx_memory             everything, into benchmarks/results; takes 15 GB of disk for a while
    python -m benchmarks.onnx_memory --quick     20 and 40 images and a file of 400 MB, into build/benchmarks

The peak is the largest resident set of the process (VmHWM), from which what it had after its imports is subtracted:
that is torch, ONNX Runtime and narrowcast themselves. Targets: calibrating, the model plus 500 MB; the large file,
2.5 GB in all. Images are 224 x 224 x 3, of noise, in an .npy file; the model is SqueezeNet 1.1 with random weights.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import REPOSITORY, machine
from benchmarks.results_io import folder_of, page, table, write_results

MB = 10**6
ROOM_MB, LARGE_MB = 500, 2500
SIDE = 4096
_FIRES = ((64, 16, 64), (128, 16, 64), (128, 32, 128), (256, 32, 128), (256, 48, 192), (384, 48, 192), (384, 64, 256),
          (512, 64, 256))  # fmt: skip


def write_images(path: Path, count: int) -> None:
    """So many images of noise [count, 224, 224, 3] uint8."""
    random = np.random.default_rng(0)
    images = np.lib.format.open_memmap(path, "w+", np.uint8, (count, 224, 224, 3))
    for start in range(0, count, 100):
        images[start : start + 100] = random.integers(0, 256, images[start : start + 100].shape, np.uint8)


def write_squeezenet(path: Path) -> None:
    """SqueezeNet 1.1 with random weights and a free number of images."""
    import onnx
    from onnx import helper, numpy_helper

    random = np.random.default_rng(1)
    nodes: list[Any] = []
    constants: list[Any] = []

    def convolution(source: str, name: str, inputs: int, outputs: int, side: int, stride: int = 1) -> str:
        weight = random.standard_normal((outputs, inputs, side, side), np.float32) * np.sqrt(2 / (inputs * side**2))
        constants.append(numpy_helper.from_array(weight.astype(np.float32), f"{name}.weight"))
        constants.append(numpy_helper.from_array(np.zeros(outputs, np.float32), f"{name}.bias"))
        pads = [1] * 4 if side == 3 and stride == 1 else [0] * 4
        given = [source, f"{name}.weight", f"{name}.bias"]
        nodes.append(helper.make_node("Conv", given, [f"{name}.sum"], strides=[stride] * 2, pads=pads))
        nodes.append(helper.make_node("Relu", [f"{name}.sum"], [f"{name}.out"]))
        return f"{name}.out"

    value = convolution("x", "conv1", 3, 64, 3, 2)
    for index, (inputs, squeezed, expanded) in enumerate(_FIRES):
        if index in (0, 2, 4):
            nodes.append(helper.make_node("MaxPool", [value], [f"pool{index}"], kernel_shape=[3, 3], strides=[2, 2]))
            value = f"pool{index}"
        small = convolution(value, f"fire{index}.squeeze", inputs, squeezed, 1)
        parts = [convolution(small, f"fire{index}.expand{side}", squeezed, expanded, side) for side in (1, 3)]
        nodes.append(helper.make_node("Concat", parts, [f"fire{index}"], axis=1))
        value = f"fire{index}"
    nodes.append(helper.make_node("GlobalAveragePool", [convolution(value, "conv10", 512, 1000, 1)], ["pooled"]))
    nodes.append(helper.make_node("Flatten", ["pooled"], ["y"]))
    given = helper.make_tensor_value_info("x", 1, ["n", 3, 224, 224])
    graph = helper.make_graph(
        nodes, "squeezenet", [given], [helper.make_tensor_value_info("y", 1, ["n", 1000])], constants
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


def write_stack(path: Path, layers: int) -> None:
    """So many products of 4096 x 4096 one after the other, 67 MB each, the weights in a file beside the model."""
    import onnx
    from onnx import TensorProto, helper

    block = np.random.default_rng(0).standard_normal((SIDE, SIDE), dtype=np.float32) / 64
    data = path.with_name(f"{path.name}.data")
    nodes, constants = [], []
    with data.open("wb") as file:
        for index in range(layers):
            (block * np.float32(1 + index / 100)).tofile(file)
            tensor = TensorProto(name=f"layer{index}.weight", data_type=1, dims=[SIDE, SIDE], data_location=1)
            entry = {"location": data.name, "offset": index * block.nbytes, "length": block.nbytes}
            for key, number in entry.items():
                tensor.external_data.add(key=key, value=str(number))
            constants.append(tensor)
            nodes.append(
                helper.make_node("MatMul", [f"x{index}", tensor.name], [f"x{index + 1}"], name=f"layer{index}")
            )
    given = helper.make_tensor_value_info("x0", 1, ["n", SIDE])
    answer = helper.make_tensor_value_info(f"x{layers}", 1, ["n", SIDE])
    graph = helper.make_graph(nodes, "stack", [given], [answer], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


def memory(field: str) -> float:
    """VmRSS or VmHWM of this process in megabytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024 / MB


def child(model: str, recipe: str, data: str) -> None:
    """Quantize and save in this process, and print what it took as JSON."""
    import onnx_ir
    import onnxruntime
    import torch

    import narrowcast as nc

    torch.set_num_threads(1)
    assert onnx_ir.__version__ and onnxruntime.__version__
    _ = nc.quantize
    imported, started = memory("VmRSS"), time.perf_counter()
    result = nc.quantize(model, recipe, data or None, progress=False)
    quantized = memory("VmHWM")
    out = Path(model).with_name("small.onnx")
    nc.save(result, out)
    weights = sum(file.stat().st_size for file in (out, out.with_name("small.onnx.data")) if file.exists())
    row = {
        "after_imports_mb": imported, "quantized_peak_mb": quantized, "peak_mb": memory("VmHWM"),
        "seconds": time.perf_counter() - started, "written_mb": weights / MB,
    }  # fmt: skip
    print(json.dumps({name: round(value, 1) for name, value in row.items()}))


def measured(name: str, model: Path, recipe: str, data: Path | None, target: float) -> dict[str, Any]:
    """One row, from a process of its own; `target` in megabytes above the imports, or in all for a large file."""
    command = [sys.executable, "-m", "benchmarks.onnx_memory", "--child", str(model), recipe, str(data or "")]
    paths = os.pathsep.join([str(REPOSITORY / "src"), str(REPOSITORY)])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    for old in model.parent.glob("small.onnx*"):
        old.unlink()
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-2000:]}")
    size = sum(file.stat().st_size for file in (model, model.with_name(f"{model.name}.data")) if file.exists()) / MB
    row = {"name": name, "recipe": recipe, "model_mb": round(size, 1), **json.loads(done.stdout.splitlines()[-1])}
    row["above_imports_mb"] = round(row["peak_mb"] - row["after_imports_mb"], 1)
    counted = row["above_imports_mb"] if data else row["peak_mb"]
    row |= {"target_mb": round(target + (size if data else 0), 1), "counted_mb": counted}
    row["met"] = counted <= row["target_mb"]
    print(json.dumps(row), flush=True)
    return row


def measure(counts: tuple[int, ...], layers: int) -> list[dict[str, Any]]:
    """All rows."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model, images = Path(folder) / "squeezenet.onnx", Path(folder) / "images.npy"
        write_squeezenet(model)
        for count in counts:
            write_images(images, count)
            rows.append(measured(f"calibrating on {count} images", model, "static-int8", images, ROOM_MB))
        images.unlink()
        large = Path(folder) / "large.onnx"
        write_stack(large, layers)
        rows += [
            measured(f"{layers} products of {SIDE} x {SIDE}", large, recipe, None, LARGE_MB)
            for recipe in ("weight-int8", "weight-int4")
        ]
    return rows


def main(argv: list[str] | None = None) -> int:
    """Measures and writes the page; 0 when it ran, whether or not the targets are met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small version: does it work at all?")
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        child(*options.child)
        return 0
    rows = measure((20, 40), 6) if options.quick else measure((200, 2000), 96)
    facts = machine()
    header = [
        "what", "recipe", "model MB", "after imports MB", "peak MB", "counted MB", "target MB", "met", "MB out", "s",
    ]  # fmt: skip
    cells = [
        [row["name"], row["recipe"], row["model_mb"], row["after_imports_mb"], row["peak_mb"], row["counted_mb"],
         row["target_mb"], "yes" if row["met"] else "NO", row["written_mb"], row["seconds"]] for row in rows
    ]  # fmt: skip
    text = (
        "Calibrating is counted above the imports and may take the model plus 500 MB; a large file is counted in all "
        "and may take 2500 MB. `python -m benchmarks.onnx_memory` measures it."
    )
    made = page("Memory of quantizing ONNX files", facts, [text, table(header, cells)])
    write_results(options.out or folder_of(not options.quick), "onnx_memory", {"machine": facts, "rows": rows}, made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
