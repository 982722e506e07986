"""Mutated ONNX files, each read, planned and quantized: a clear error or a clean result, nothing else.

    python -m benchmarks.onnx_fuzz                   10,000 files, into benchmarks/results
    python -m benchmarks.onnx_fuzz --count 300       fewer, into build/benchmarks

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
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import REPOSITORY, machine
from benchmarks.results_io import folder_of, page, table, write_results

PER_PROCESS, SECONDS_EACH, SLOW_SECONDS = 500, 60, 10.0
ROOM_BYTES = 2 * 2**30
_SIDES = (0, -1, 1, 3, 2**31, 2**40, 2**62, -(2**63))
Mutation = Callable[[Any, random.Random], None]


def seeds() -> list[Any]:
    """Good models: convolutions with an If, products with a Loop and old inputs, a lookup; all under 10 kB."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    chance = np.random.default_rng(0)

    def constant(name: str, *shape: int) -> Any:
        return numpy_helper.from_array(chance.standard_normal(shape).astype(np.float32), name)

    def value(name: str, shape: list[Any], kind: int = TensorProto.FLOAT) -> Any:
        return helper.make_tensor_value_info(name, kind, shape)

    def made(nodes: list[Any], inputs: list[Any], outputs: list[Any], constants: list[Any]) -> Any:
        graph = helper.make_graph(nodes, "g", inputs, outputs, constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
        onnx.checker.check_model(model)
        return model

    network = made(
        [
            helper.make_node("Pad", ["x", "pads"], ["padded"]),
            helper.make_node("Conv", ["padded", "a.weight", "a.bias"], ["a"], kernel_shape=[3, 3]),
            helper.make_node("BatchNormalization", ["a", "gamma", "beta", "mean", "variance"], ["normed"]),
            helper.make_node("Relu", ["normed"], ["r"]),
            helper.make_node("ConvTranspose", ["r", "t.weight"], ["t"], strides=[2, 2]),
            helper.make_node("GlobalAveragePool", ["t"], ["pooled"]),
            helper.make_node("Flatten", ["pooled"], ["flat"]),
            helper.make_node("Gemm", ["flat", "head.weight", "head.bias"], ["y"], transB=1),
        ],
        [value("x", ["n", 3, 8, 8])], [value("y", ["n", 5])],
        [numpy_helper.from_array(np.array([0, 0, 1, 1, 0, 0, 1, 1]), "pads"), constant("a.weight", 4, 3, 3, 3),
         constant("a.bias", 4), constant("gamma", 4), constant("beta", 4), constant("mean", 4),
         numpy_helper.from_array(np.ones(4, np.float32), "variance"), constant("t.weight", 4, 6, 2, 2),
         constant("head.weight", 5, 6), constant("head.bias", 5)],
    )  # fmt: skip
    branches = [
        helper.make_graph([helper.make_node("MatMul", ["h", f"{side}.weight"], [f"{side}.out"])], side, [],
                          [value(f"{side}.out", ["n", 6])], [constant(f"{side}.weight", 8, 6)])
        for side in ("then", "else")
    ]  # fmt: skip
    choosing = made(
        [
            helper.make_node("Gather", ["table", "ids"], ["found"]),
            helper.make_node("Transpose", ["m.weight"], ["m.turned"], perm=[1, 0]),
            helper.make_node("MatMul", ["found", "m.turned"], ["h"]),
            helper.make_node("If", ["flag"], ["y"], then_branch=branches[0], else_branch=branches[1]),
        ],
        [value("ids", ["n"], TensorProto.INT64), value("flag", [], TensorProto.BOOL)], [value("y", ["n", 6])],
        [constant("table", 20, 8), constant("m.weight", 8, 8)],
    )  # fmt: skip
    return [network, choosing]


def _tensor(model: Any, chance: random.Random) -> Any:
    return chance.choice(model.graph.initializer)


def _node(model: Any, chance: random.Random) -> Any:
    return chance.choice(model.graph.node)


def names_swapped(model: Any, chance: random.Random) -> None:
    """Two nodes read each other's inputs."""
    one, other = _node(model, chance), _node(model, chance)
    if one.input and other.input:
        one.input[0], other.input[0] = other.input[0], one.input[0]


def edge_back(model: Any, chance: random.Random) -> None:
    """A node reads what comes after it."""
    node = _node(model, chance)
    if node.input:
        node.input[chance.randrange(len(node.input))] = chance.choice([*model.graph.node[-1].output, ""])


def name_repeated(model: Any, chance: random.Random) -> None:
    """Two values, or two constants, of one name."""
    if chance.random() < 0.5:
        _node(model, chance).output[0] = _node(model, chance).output[0]
    else:
        _tensor(model, chance).name = _tensor(model, chance).name


def sides_changed(model: Any, chance: random.Random) -> None:
    """A constant of another declared shape."""
    tensor = _tensor(model, chance)
    if tensor.dims and chance.random() < 0.7:
        tensor.dims[chance.randrange(len(tensor.dims))] = chance.choice(_SIDES)
    else:
        tensor.dims.extend([chance.choice(_SIDES)])


def input_sides_changed(model: Any, chance: random.Random) -> None:
    """A graph input of another declared shape."""
    shape = chance.choice([*model.graph.input, *model.graph.output]).type.tensor_type.shape
    if shape.dim:
        chance.choice(shape.dim).dim_value = chance.choice(_SIDES)


def type_changed(model: Any, chance: random.Random) -> None:
    """A constant or input of another type."""
    if chance.random() < 0.6:
        _tensor(model, chance).data_type = chance.randrange(-1, 30)
    else:
        chance.choice(model.graph.input).type.tensor_type.elem_type = chance.randrange(0, 30)


def operator_changed(model: Any, chance: random.Random) -> None:
    """Another operator or domain."""
    node = _node(model, chance)
    node.op_type = chance.choice(
        ["Conv", "Gemm", "MatMul", "Loop", "Nonsense", "", "Gather", "LSTM", "Constant", "Tile"]
    )
    node.domain = chance.choice(["", "", "com.example", "com.microsoft"])


def attribute_changed(model: Any, chance: random.Random) -> None:
    """An attribute with another number, or of another kind."""
    import onnx

    node = _node(model, chance)
    name = chance.choice(["kernel_shape", "strides", "pads", "group", "transB", "axis", "dilations", "perm", "alpha"])
    kept = [attribute for attribute in node.attribute if attribute.name != name]
    number = chance.choice(_SIDES)
    given: Any = chance.choice([number, [number], [number] * 4, 0.5, "text", b"\xff\xfe"])
    del node.attribute[:]
    node.attribute.extend([*kept, onnx.helper.make_attribute(name, given)])


def data_elsewhere(model: Any, chance: random.Random) -> None:
    """A weight in another file: outside, behind a link, at a huge place, or where it should be."""
    tensor = _tensor(model, chance)
    location = chance.choice(
        ["weights.bin", "../secret.bin", "/etc/passwd", "link.bin", "folder/../../secret.bin", "missing.bin", "", ".",
         "hard.bin", "folder", "model.onnx", "weights.bin\0x"]
    )  # fmt: skip
    tensor.data_location = 1
    tensor.ClearField("raw_data")
    del tensor.external_data[:]
    number = lambda: str(chance.choice([0, 4, 8, 100, 5000, -1, 2**40, 2**63, "x", ""]))  # noqa: E731
    entries = {"location": location} | {key: number() for key in ("offset", "length") if chance.random() < 0.5}
    for key, text in entries.items():
        tensor.external_data.add(key=key, value=text)


def graph_inside_itself(model: Any, chance: random.Random) -> None:
    """Graphs in graphs in graphs."""
    import onnx

    node = _node(model, chance)
    for _ in range(chance.choice([1, 30])):
        inner = onnx.GraphProto()
        inner.node.add().CopyFrom(node)
        node = onnx.NodeProto(op_type=chance.choice(["If", "Loop"]), output=["inner"])
        node.attribute.add(name="then_branch", type=onnx.AttributeProto.GRAPH).g.CopyFrom(inner)
    model.graph.node.add().CopyFrom(node)


def opset_changed(model: Any, chance: random.Random) -> None:
    """Another version."""
    model.opset_import[0].version = chance.choice([-1, 0, 1, 6, 9, 11, 12, 21, 99, 2**40])
    model.ir_version = chance.choice([0, 3, 8, 10, 2**40])


def pieces_lost(model: Any, chance: random.Random) -> None:
    """A node, constant, input or output less."""
    field = chance.choice([model.graph.node, model.graph.initializer, model.graph.input, model.graph.output])
    if field:
        del field[chance.randrange(len(field))]


FIELDS: tuple[Mutation, ...] = (
    names_swapped, edge_back, name_repeated, sides_changed, input_sides_changed, type_changed, operator_changed,
    attribute_changed, data_elsewhere, data_elsewhere, graph_inside_itself, opset_changed, pieces_lost,
)  # fmt: skip


def mutated(good: Any, chance: random.Random) -> tuple[bytes, str]:
    """The bytes of a mutated model, and the kind of the mutation."""
    kind = chance.choice(("bytes", "cut", "splice", "fields", "fields", "fields"))
    content = bytearray(good.SerializeToString())
    if kind == "fields":
        import onnx

        model = onnx.ModelProto()
        model.CopyFrom(good)
        chosen = [chance.choice(FIELDS) for _ in range(chance.choice((1, 1, 2, 4)))]
        with suppress(IndexError, ValueError):  # an earlier one took what this one wants
            for mutation in chosen:
                mutation(model, chance)
        return model.SerializeToString(), chosen[0].__name__
    place = chance.randrange(len(content))
    if kind == "bytes":
        for _ in range(chance.choice((1, 3, 20))):
            content[chance.randrange(len(content))] = chance.randrange(256)
    elif kind == "cut":
        del content[place : place + chance.choice((1, 20, len(content)))]
    else:
        source = chance.randrange(len(content))
        content[place:place] = content[source : source + chance.choice((1, 30, 300))]
    return bytes(content), kind


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


def run_all(count: int) -> list[dict[str, Any]]:
    """Every file's row; a process that dies or hangs is a row of its own, and the next one begins behind it."""
    rows: list[dict[str, Any]] = []
    paths = os.pathsep.join([str(REPOSITORY / "src"), str(REPOSITORY)])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    at = 0
    while at < count:
        number = min(PER_PROCESS, count - at)
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
        print(f"{at} of {count}", flush=True)
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
    parser.add_argument("--quick", action="store_true", help="300 files")
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--child", nargs=2, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        child(*options.child)
        return 0
    count = 300 if options.quick else options.count
    rows = run_all(count)
    bad = [row for row in rows if is_bad(row)]
    ends = Counter(row["outcome"].split(":")[0] for row in rows)
    kinds = Counter((row["kind"], row["outcome"].split(":")[0].startswith("quantized")) for row in rows)
    tables = [
        f"{count} files, {len(bad)} bad ends. `python -m benchmarks.onnx_fuzz` repeats it with the same files.",
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
        "count": count,
        "ends": ends,
        "bad": bad,
        "slowest_s": max(r["seconds"] for r in rows),
    }
    folder = options.out or folder_of(count == 10_000)
    write_results(folder, "onnx_fuzz", document, page("Mutated ONNX files", facts, tables))
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
