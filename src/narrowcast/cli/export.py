"""`narrowcast export`: a quantized model for another runtime: an ONNX file, a phone's file, a page for the browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from narrowcast.cli.console import JsonOption, Output, QuietOption, table
from narrowcast.cli.datasets import (
    DATA_HELP,
    BatchOption,
    DeviationOption,
    LayoutOption,
    LimitOption,
    MeanOption,
    SideOption,
    TokenizerOption,
    data_options,
)
from narrowcast.cli.sources import ModelArgument, Source, open_model
from narrowcast.errors import FormatError
from narrowcast.export.targets import TARGETS, Delivered, Request, Target

_TARGETS = "; ".join(f"{row.name}: {row.help}" for row in TARGETS.values())
TargetOption = Annotated[str, typer.Option("--to", metavar="TARGET", help=f"{_TARGETS}.")]
OutOption = Annotated[
    Path, typer.Option("--out", "-o", metavar="PATH", help="The file, or of a page the folder, to write.")
]
ExampleOption = Annotated[
    str | None,
    typer.Option("--data", "-d", metavar="DATA", help=f"Of PyTorch models: shows the exporter the inputs. {DATA_HELP}"),
]
IntoOption = Annotated[
    str | None,
    typer.Option("--into", metavar="FACTORY", help="package.module:factory of a checkpoint's architecture."),
]
FormOption = Annotated[
    str | None,
    typer.Option("--form", metavar="qdq|qoperator", help="Of .onnx and .ort files: how integers stand."),
]
RangesOption = Annotated[
    str | None,
    typer.Option("--ranges", metavar="token|input", help="Of PyTorch models: what has one range found at run time."),
]
PlatformOption = Annotated[
    str | None, typer.Option("--platform", metavar="arm|amd64", help="Of .ort files: what they are optimized for.")
]
FloatOption = Annotated[
    str | None,
    typer.Option(
        "--float", metavar="MODEL",
        help="Of pages: the float32 model to compare with; default: model.onnx or onnx/model.onnx near IN, if it fits; "
        "'none' leaves it out.",
    ),
]  # fmt: skip
RuntimeOption = Annotated[
    Path | None,
    typer.Option("--runtime-from", metavar="FOLDER", help="Of pages: an installed onnxruntime-web; default: npm's."),
]
LabelsOption = Annotated[
    Path | None, typer.Option("--labels", metavar="FILE", help="Of pages: names of the classes, .txt or .json.")
]
ShowOption = Annotated[
    str | None,
    typer.Option(
        "--show", metavar="classes|likeness|values|continuation", help="Of pages: what the output is; default: a guess."
    ),
]


def export(
    model: ModelArgument,
    to: TargetOption,
    out: OutOption,
    data: ExampleOption = None,
    into: IntoOption = None,
    form: FormOption = None,
    ranges: RangesOption = None,
    platform: PlatformOption = None,
    reference: FloatOption = None,
    runtime_from: RuntimeOption = None,
    title: Annotated[str, typer.Option("--title", help="Of pages: the heading.")] = "",
    labels: LabelsOption = None,
    show: ShowOption = None,
    batch_size: BatchOption = 32,
    limit: LimitOption = None,
    tokenizer: TokenizerOption = None,
    mean: MeanOption = "",
    std: DeviationOption = "",
    image_size: SideOption = None,
    image_layout: LayoutOption = "NCHW",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write a quantized model for another runtime.

    `--to web` writes a folder that any static server can serve: the model, ONNX Runtime for WebAssembly, and a page
    that asks for a picture, a text or numbers, predicts, and times the model beside its float32 original. Nothing is
    written unless everything worked.

    Examples:
        narrowcast export my-int8 --to onnx -d samples.npz -o my-int8.onnx
        narrowcast export model-int8.onnx --to onnx --form qoperator -o model-qoperator.onnx
        narrowcast export model-int8.onnx --to ort -o model-int8.ort
        narrowcast export model-int8.onnx --to web --float model.onnx --labels classes.txt --mean 0.485,0.456,0.406 \
--std 0.229,0.224,0.225 -d images.npz -o page
    """
    output = Output(as_json=as_json, quiet=quiet)
    options = data_options(batch_size, limit, tokenizer, mean, std, image_size, image_layout)
    settings: dict[str, Any] = {
        "form": form, "ranges": ranges, "platform": platform, "reference": reference, "runtime": runtime_from,
        "title": title, "labels": labels, "show": show,
    } | (_preparation(model, options) if to == "web" else {})  # fmt: skip
    target, settings = _target(to), {key: value for key, value in settings.items() if value}
    target.check_settings(settings)
    target.check(out)
    with output.working(f"opening {model}"):
        source = _open(model, into)
        request = Request(_sendable(source), out, _example(data, options, model), _ready(settings, source, to))
    with output.working(f"writing {out}"):
        done = target.deliver(request)
    output.json({"out": str(out), **{key: getattr(done, key) for key in ("files", "facts", "notes", "warnings")}})
    _show(output, done)


def _target(name: str) -> Target:
    if name not in TARGETS:
        raise FormatError(f"--to {name!r} is not known; there are {', '.join(TARGETS)}")
    return TARGETS[name]


def _preparation(model: str, options: Any) -> dict[str, Any]:
    """How a page prepares its inputs; other targets read these options only to prepare data."""
    place = Path(model) if Path(model).is_dir() else Path(model).parent
    return {
        "mean": options.mean,
        "std": options.std,
        "side": options.side,
        "tokenizer": options.tokenizer,
        "folder": place,
    }


def _open(text: str, into: str | None) -> Source:
    """The model; a checkpoint without architecture is loaded into that of a factory."""
    return open_model(text, beside=None if into is None else open_model(into))


def _sendable(source: Source) -> Any:
    """A path where the file itself is the model, so that large weights stay on disk; the module otherwise."""
    return Path(source.text) if source.kind == "onnx" else source.model


def _example(data: str | None, options: Any, model: str) -> Any:
    from narrowcast.cli.datasets import open_data

    return None if data is None else open_data(data, options, model=model)


def _ready(settings: dict[str, Any], source: Source, to: str) -> dict[str, Any]:
    """The settings with what they name opened."""
    from narrowcast.export.web_options import read_labels

    if to == "web":
        settings["reference"] = _reference(settings.get("reference"), source)
    if "labels" in settings:
        settings["labels"] = read_labels(settings["labels"])
    return settings


def _reference(named: str | None, source: Source) -> Any:
    """The float32 model that stands beside: the named one, or the file that lies near; None for none."""
    from narrowcast.export.web_float import float_file, found_beside, same_ports

    if named is None:
        return found_beside(Path(source.text)) if source.kind == "onnx" else None
    if named == "none":
        return None
    file = float_file(Path(named))
    if file is not None and source.kind == "onnx" and same_ports(file, Path(source.text)):
        return file
    return _sendable(open_model(named, beside=source))


def _show(output: Output, done: Delivered) -> None:
    from narrowcast.sizes import format_bytes

    made = table("file", "size", right=("size",))
    for name, size in done.files.items():
        made.add_row(name, format_bytes(size))
    output.show(made)
    for name, fact in done.facts.items():
        output.show(f"{name}: {fact}")
    for note in done.notes:
        output.note(f"note: {note}")
    for warning in done.warnings:
        output.warn(warning)
    output.show(f"written to {done.out} ({format_bytes(sum(done.files.values()))})")
