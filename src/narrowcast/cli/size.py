"""`narrowcast size`: how many bytes a model takes in every format, from its parameter count or its headers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Annotated, Any

import typer

from narrowcast.cli.console import JsonOption, Output, QuietOption, table
from narrowcast.errors import DataError

DEFAULT_CONTEXT = 4096
CACHE_FORMATS = ("fp32", "fp16", "bf16", "fp8_e4m3", "int8", "int4")
ACTIVATION_FORMATS = ("fp32", "bf16")


@dataclass(frozen=True)
class Contents:
    """What is known of a model before anything is loaded.

    Args:
        title: what the sizes are of.
        matrices: (rows, columns) of every weight.
        other: bytes of everything else.
        parameters: numbers in all weights and in everything else that is floating point.
        config: the Hugging Face configuration, {} without one.
        note: what is counted how.
    """

    title: str
    matrices: list[tuple[int, int]]
    other: int
    parameters: int
    config: Mapping[str, Any]
    note: str


def size(
    model: Annotated[
        str,
        typer.Argument(
            metavar="COUNT|MODEL",
            help="Parameters (30B, 7b, 270M, 1.5e9) or a model: Hugging Face directory, .safetensors file, narrowcast "
            "checkpoint, .pt2 file, package.module:factory.",
        ),
    ],
    group: Annotated[int, typer.Option(help="Weights that share a scale.", min=8, max=65536)] = 32,
    config: Annotated[Path | None, typer.Option(help="A config.json, for activation and cache memory.")] = None,
    batch: Annotated[int, typer.Option(help="Sequences at once, for activation and cache memory.", min=1)] = 1,
    context: Annotated[
        int | None,
        typer.Option(help=f"Tokens of each sequence; default: the model's longest, at most {DEFAULT_CONTEXT}.", min=1),
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Say how many bytes a model takes in every number format, without loading it.

    The scales of a group are float16 (one byte for mxfp4 and mxfp8, whose groups are always 32), zero points one byte.
    Given a configuration, also the memory of activations and of the key/value cache. Sizes are decimal: 1 GB = 10^9.

    Examples:
        narrowcast size 30B
        narrowcast size 7b --group 128
        narrowcast size ./my-llama --batch 8 --context 8192
        narrowcast size 30B --config config.json --json
    """
    from narrowcast.sizes import format_sizes

    output = Output(as_json=as_json, quiet=quiet)
    contents = read_contents(model, config)
    rows = format_sizes(contents.matrices, contents.other, group=group)
    memory = working_memory(contents.config, batch=batch, context=context) if contents.config else None
    output.json(
        {
            "model": contents.title,
            "parameters": contents.parameters,
            "other_bytes": contents.other,
            "group": group,
            "formats": [asdict(row) for row in rows],
            "memory": memory,
        }
    )
    output.heading(f"{contents.title}: {contents.parameters:,} parameters")
    output.show(_render_formats(rows, group))
    if memory:
        output.show(_render_memory(memory))
    output.note(contents.note)


def read_contents(text: str, config: Path | None = None) -> Contents:
    """Shapes of what `text` names: a number of parameters or a model, by headers where there are any.

    Args:
        text: as typed.
        config: a configuration that goes with it; None takes the one beside the model.

    Raises:
        NarrowcastError: neither a number nor a model that can be read.
    """
    from narrowcast.cli.headers import directory_files, safetensors_entries
    from narrowcast.export.checkpoint_schema import read_json
    from narrowcast.sizes import parse_count

    given = read_json(config) if config else {}
    count = parse_count(text)
    if count is not None:
        return Contents(text, [(1, count)], 0, count, given, "every parameter counted in the format of its row")
    path = Path(text)
    if path.is_dir() and (path / "config.json").is_file() and not (files := directory_files(path)):
        return _of_configuration(text, given or read_json(path / "config.json"))
    if path.is_dir() and (files := directory_files(path)):
        found = {} if not (path / "config.json").is_file() else read_json(path / "config.json")
        entries = [entry for file in files for entry in safetensors_entries(file)[0]]
        return _of_entries(text, entries, given or found)
    if path.suffix == ".safetensors":
        return _of_entries(text, safetensors_entries(path)[0], given)
    return _of_module(text, given)


def _of_entries(title: str, entries: list[Any], config: Mapping[str, Any]) -> Contents:
    """Contents by the headers of safetensors files."""
    from narrowcast.sizes import weight_matrix

    shapes = [(entry, weight_matrix(entry.shape) if entry.is_float else None) for entry in entries]
    matrices = [matrix for _, matrix in shapes if matrix]
    other = sum(entry.bytes for entry, matrix in shapes if matrix is None)
    if entries and not matrices:
        raise DataError(
            f"{title} holds no floating-point weight matrix; of a model that is quantized already, narrowcast inspect "
            "tells the sizes"
        )
    kept = sum(prod(entry.shape) for entry, matrix in shapes if matrix is None and entry.is_float)
    counted = sum(rows * columns for rows, columns in matrices) + kept
    return Contents(title, matrices, other, counted, config, _note(matrices, other))


def _of_configuration(title: str, config: Mapping[str, Any]) -> Contents:
    """Contents of a directory without weights: the architecture is built without memory."""
    from narrowcast.cli.sources import empty_from_config

    return _of_loaded(title, empty_from_config(Path(title)), config)


def _of_module(title: str, config: Mapping[str, Any]) -> Contents:
    """Contents of a model that has to be opened."""
    from narrowcast.cli.sources import open_model

    return _of_loaded(title, open_model(title).model, config)


def _of_loaded(title: str, model: Any, config: Mapping[str, Any]) -> Contents:
    from narrowcast.sizes import weight_matrix

    tensors = list({id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}.values())
    shapes = [(tensor, weight_matrix(tuple(tensor.shape) if tensor.is_floating_point() else ())) for tensor in tensors]
    matrices = [matrix for _, matrix in shapes if matrix]
    other = sum(tensor.nbytes for tensor, matrix in shapes if matrix is None)
    if not config and hasattr(getattr(model, "config", None), "to_dict"):
        config = model.config.to_dict()
    parameters = sum(tensor.numel() for tensor in tensors if tensor.is_floating_point())
    return Contents(title, matrices, other, parameters, config, _note(matrices, other))


def _note(matrices: list[tuple[int, int]], other: int) -> str:
    from narrowcast.sizes import format_bytes

    return (
        f"{len(matrices)} weight matrices in the format of the row; vectors and integers ({format_bytes(other)}) as "
        "they are. `narrowcast plan` tells what a recipe really does to each layer."
    )


def working_memory(config: Mapping[str, Any], *, batch: int, context: int | None) -> dict[str, Any]:
    """Activation and cache memory of a transformer at work, by format; says why not where it cannot be told."""
    from narrowcast.errors import ModelError
    from narrowcast.sizes import activation_bytes, cache_bytes, is_encoder, score_bytes, transformer_shape

    try:
        shape = transformer_shape(config)
    except ModelError as error:
        return {"unknown": str(error)}
    tokens = context or min(shape.longest or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
    memory: dict[str, Any] = {"batch": batch, "context": tokens}
    names = ACTIVATION_FORMATS
    memory["activations"] = {name: activation_bytes(shape, name, batch=batch, context=tokens) for name in names}
    memory["scores"] = {name: score_bytes(shape, name, batch=batch, context=tokens) for name in names}
    if is_encoder(config):
        memory["cache"], memory["cache_note"] = {}, "an encoder keeps no keys and values between calls"
        return memory
    memory["cache"] = {name: cache_bytes(shape, name, batch=batch, context=tokens) for name in CACHE_FORMATS}
    windowed = f", {shape.windowed_layers} of them the last {shape.window} tokens only" if shape.windowed_layers else ""
    memory["cache_note"] = (
        f"{shape.cached_layers + shape.windowed_layers} layers{windowed}, {shape.cached_values} numbers per token and "
        f"layer (multi-head attention: {2 * shape.attention[0]}); 8 bits and below with a float16 scale per 32"
    )
    return memory


def _render_formats(rows: list[Any], group: int) -> Any:
    from narrowcast.sizes import format_bytes

    scaled = f"with scales of {group}"
    numeric = ("bits", "codes only", "of fp32", scaled)
    made = table("format", "bits", "codes only", "of fp32", scaled, "of fp32", right=numeric)
    whole = rows[0].total
    for row in rows:
        cells = [row.name, str(row.bits), format_bytes(row.codes), f"{row.codes / whole:.1%}"]
        made.add_row(*cells, *([format_bytes(row.total), f"{row.total / whole:.1%}"] if row.spec else ["-", ""]))
    return made


def _render_memory(memory: Mapping[str, Any]) -> Any:
    from narrowcast.sizes import format_bytes

    if "unknown" in memory:
        return f"\nactivations and cache: not known, {memory['unknown']}"
    title = f"\nbatch {memory['batch']}, context {memory['context']} tokens"
    made = table("memory at work", "format", "bytes", "", title=title, right=("bytes",))
    notes = {
        "activations": "reading the whole context in one pass, largest layer",
        "scores": "one layer, unless attention is fused",
    }
    for kind, title in (("activations", "activations"), ("scores", "attention scores"), ("cache", "key/value cache")):
        for index, (name, count) in enumerate(memory[kind].items()):
            note = notes.get(kind, memory["cache_note"]) if index == 0 else ""
            made.add_row(title if index == 0 else "", name, format_bytes(count), note)
    if not memory["cache"]:
        made.add_row("key/value cache", "", "none", memory["cache_note"])
    return made
