"""`narrowcast inspect`: what is in a checkpoint, per layer or tensor, from headers and descriptions alone."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from narrowcast.cli.console import JsonOption, Output, QuietOption, table
from narrowcast.errors import CheckpointError, ModelError

READABLE = ".safetensors, .npz, .npy, .onnx, a narrowcast checkpoint or a Hugging Face directory"


def inspect(
    file: Annotated[Path, typer.Argument(metavar="FILE", help=f"One of {READABLE}.")],
    top: Annotated[int | None, typer.Option(help="Show only so many tensors, the largest first.", min=1)] = None,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Of an .onnx file: what ONNX Runtime runs for every product.")
    ] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Say what is in a checkpoint: type, shape and bytes of every tensor, and how every quantized layer is stored.

    Only headers are read, and everything in them is checked against the file. Pickles (.pt, .pth, .bin) are refused.

    Examples:
        narrowcast inspect model.safetensors
        narrowcast inspect ./my-quantized-model
        narrowcast inspect model.onnx --top 10 --json
        narrowcast inspect model-int8.onnx --kernels
    """
    output = Output(as_json=as_json, quiet=quiet)
    found = read_contents(file) | ({"nodes": _kernels(file)} if kernels else {})
    output.json(found)
    output.heading(f"{file}: {found['kind']}")
    for name, value in found["facts"].items():
        output.show(f"{name}: {value}")
    if kernels:
        output.show(_render_nodes(found["nodes"]))
    if found["layers"]:
        output.show(_render_layers(found["layers"], top))
    if found["tensors"]:
        output.show(_render_tensors(found["tensors"], top))
    output.show(_summary(found["tensors"]))


def read_contents(path: Path) -> dict[str, Any]:
    """What a file or directory holds, as plain data: kind, facts, layers, tensors.

    Args:
        path: any of READABLE.

    Raises:
        CheckpointError: missing, damaged, or nothing that is known.
        ModelError: a pickle.
    """
    from narrowcast.cli.headers import numpy_entries, refuse_pickle, safetensors_entries
    from narrowcast.cli.onnx_header import onnx_entries
    from narrowcast.export.checkpoint_schema import DESCRIPTION

    if not path.exists():
        raise CheckpointError(f"{path} does not exist; pass {READABLE}")
    if path.is_dir():
        return _checkpoint(path) if (path / DESCRIPTION).exists() else _directory(path)
    refuse_pickle(path)
    if path.name == DESCRIPTION:
        return _checkpoint(path.parent)
    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        entries, metadata = safetensors_entries(path)
        return _found("safetensors file", {f"metadata {key}": text for key, text in metadata.items()}, entries)
    if suffix in (".npz", ".npy"):
        return _found("numpy arrays", {}, numpy_entries(path))
    if suffix == ".onnx":
        entries, operators = onnx_entries(path)
        return _found("ONNX model", {"operators": ", ".join(f"{n} {op}" for op, n in operators.items())}, entries)
    if suffix == ".pt2":
        raise ModelError(f"{path} is a torch.export program; narrowcast plan {path} lists its layers")
    raise CheckpointError(f"{path}: files ending in {suffix or 'nothing'!r} are not known; pass {READABLE}")


def _kernels(path: Path) -> list[dict[str, Any]]:
    """What ONNX Runtime runs for every product of an .onnx file: node, kernel, integer, bits, reason.

    Raises:
        ModelError: it is no ONNX file, or the packages for it are missing.
    """
    if path.suffix.lower() != ".onnx":
        raise ModelError(f"{path}: --kernels is for .onnx files, which ONNX Runtime runs")
    require_onnx = importlib.import_module("narrowcast.models").require_onnx
    require_onnx()
    verdict = importlib.import_module("narrowcast.models.onnx_verdict")
    model = importlib.import_module("narrowcast.models.onnx_file").read_onnx(path)
    return [asdict(row) for row in verdict.node_verdicts(verdict.optimized_graph(model))]


def _render_nodes(nodes: list[dict[str, Any]]) -> Any:
    made = table("node", "kernel in ONNX Runtime", "product in", "bits", "why", right=("bits",))
    for node in nodes:
        made.add_row(
            node["node"],
            node["kernel"],
            "integers" if node["integer"] else "float",
            str(node["bits"]),
            node["reason"] or node["saturates"],
        )
    return made


def _found(kind: str, facts: dict[str, Any], entries: Iterable[Any]) -> dict[str, Any]:
    return {"kind": kind, "facts": facts, "layers": [], "tensors": [asdict(entry) for entry in entries]}


def _directory(path: Path) -> dict[str, Any]:
    """A Hugging Face directory or any directory of safetensors files."""
    from narrowcast.cli.headers import directory_files, safetensors_entries
    from narrowcast.export.checkpoint_schema import read_json

    files = directory_files(path)
    facts: dict[str, Any] = {}
    if (path / "config.json").is_file():
        config = read_json(path / "config.json")
        facts = {
            "architecture": ", ".join(str(name) for name in config.get("architectures") or ["not stated"]),
            "model type": config.get("model_type", "not stated"),
        }
        if config.get("quantization_config"):
            facts["quantized by"] = str(config["quantization_config"])[:500]
    if not files and not facts:
        raise CheckpointError(f"{path} holds no safetensors file and no config.json; pass {READABLE}")
    facts["files"] = ", ".join(file.name for file in files) or "no weights"
    kind = "Hugging Face directory" if (path / "config.json").is_file() else "directory of safetensors files"
    return _found(kind, facts, [entry for file in files for entry in safetensors_entries(file)[0]])


def _checkpoint(path: Path) -> dict[str, Any]:
    """A directory that `nc.save` wrote."""
    from narrowcast.cli.headers import safetensors_entries
    from narrowcast.export.checkpoint_schema import DESCRIPTION, WEIGHTS, read_json, validate

    description = validate(read_json(path / DESCRIPTION), path / DESCRIPTION)
    entries, _ = safetensors_entries(path / WEIGHTS)
    if {entry.name for entry in entries} != set(description["tensors"]):
        raise CheckpointError(f"{path}: {WEIGHTS} does not hold the tensors that {DESCRIPTION} describes")
    facts = {
        "format version": description["version"],
        "written by": ", ".join(f"{name} {version}" for name, version in description["versions"].items()),
        "source sha256": description["source_sha256"] or "not known",
        "architecture": (description["huggingface"] or {}).get("class", "your own module: nc.load(path, into=...)"),
    }
    recipe = description["recipe"]
    if recipe:
        facts["recipe"] = recipe.get("name") or f"{len(recipe.get('rules', recipe.get('rule', [])))} rules"
    found = _found("narrowcast checkpoint", facts, entries)
    found["layers"] = [_layer(name, spec, description, entries) for name, spec in sorted(description["specs"].items())]
    return found


def _layer(name: str, spec: str, description: dict[str, Any], entries: list[Any]) -> dict[str, Any]:
    """One quantized weight: its module, specification, bytes and bits per weight."""
    module = name.rpartition(".")[0] if name not in description["modules"] else name
    parts = [entry for entry in entries if entry.name.startswith(f"{name}_") or entry.name.startswith(f"{module}.")]
    kind = description["modules"].get(module, {}).get("kind", "")
    stored = sum(entry.bytes for entry in parts)
    return {"layer": name, "module": kind, "spec": spec, "bytes": stored}


def _render_layers(layers: list[dict[str, Any]], top: int | None) -> Any:
    made = table("layer", "module", "stored as", "bytes", right=("bytes",))
    for layer in _largest(layers, top):
        made.add_row(layer["layer"], layer["module"], layer["spec"], f"{layer['bytes']:,}")
    return made


def _render_tensors(tensors: list[dict[str, Any]], top: int | None) -> Any:
    made = table("tensor", "dtype", "shape", "bytes", "file", right=("bytes",))
    several = len({tensor["file"] for tensor in tensors}) > 1
    for tensor in _largest(tensors, top):
        shape = "x".join(str(side) for side in tensor["shape"]) or "scalar"
        made.add_row(tensor["name"], tensor["dtype"], shape, f"{tensor['bytes']:,}", tensor["file"] if several else "")
    return made


def _largest(rows: list[dict[str, Any]], top: int | None) -> list[dict[str, Any]]:
    return rows if top is None else sorted(rows, key=lambda row: -row["bytes"])[:top]


def _summary(tensors: list[dict[str, Any]]) -> str:
    from narrowcast.sizes import format_bytes

    by_type: Counter[str] = Counter()
    for tensor in tensors:
        by_type[tensor["dtype"]] += tensor["bytes"]
    parts = ", ".join(f"{dtype} {format_bytes(count)}" for dtype, count in by_type.most_common())
    return f"{len(tensors)} tensors, {format_bytes(sum(by_type.values()))}" + (f": {parts}" if parts else "")
