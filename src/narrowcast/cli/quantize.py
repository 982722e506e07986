"""`narrowcast quantize`: a model in, a smaller one in a directory out, with the report of what was done."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from narrowcast.cli.console import JsonOption, Output, QuietOption
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
from narrowcast.cli.plan import RecipeOption
from narrowcast.cli.sources import ModelArgument
from narrowcast.errors import CheckpointError, FormatError, ModelError

if TYPE_CHECKING:
    from narrowcast.pipeline import Quantized
    from narrowcast.report import Report

OutOption = Annotated[
    Path,
    typer.Option(
        "--out", "-o", metavar="PATH", help="Where the quantized model goes: a directory, or of an ONNX model a file."
    ),
]
WorkOption = Annotated[
    Path | None,
    typer.Option(
        metavar="DIRECTORY",
        help="Write finished blocks, or of ONNX files what calibration found, here; an interrupted run continues.",
    ),
]
CoverageOption = Annotated[
    float, typer.Option(help="Fail if less than this share of the weights ends up quantized.", min=0.0, max=1.0)
]
FormOption = Annotated[
    str, typer.Option("--form", metavar="qdq|qoperator", help="Of an ONNX model: how integer steps are written.")
]


def quantize(
    model: ModelArgument,
    recipe: RecipeOption,
    out: OutOption,
    data: Annotated[
        str | None, typer.Option("--data", "-d", metavar="DATA", help=f"Calibration data: {DATA_HELP}")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Fail if a layer is not as the recipe says.")] = False,
    min_coverage: CoverageOption = 0.0,
    form: FormOption = "qdq",
    report: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the report as JSON, too.")] = None,
    work: WorkOption = None,
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
    """Quantize a model and save it; the report tells for every weight what was done, or why not.

    Nothing is written unless everything worked and every requirement is met.

    Examples:
        narrowcast quantize ./all-MiniLM-L6-v2 --recipe dynamic-int8 -o minilm-int8
        narrowcast quantize my_package.models:build -r static-int8 -d calibration.npz --limit 256 -o my-int8
        narrowcast quantize model.onnx -r static-int8 -d calibration.npz -o model-int8.onnx
        narrowcast quantize ./my-llama -r weight-int4 -d texts.txt -o my-int4 --strict --report report.json
    """
    output = Output(as_json=as_json, quiet=quiet)
    check_destinations(out, report, onnx=model.lower().endswith(".onnx"), form=form)
    options = data_options(batch_size, limit, tokenizer, mean, std, image_size, image_layout)
    with output.working(f"opening {model}"):
        import narrowcast as nc
        from narrowcast.cli.datasets import open_data
        from narrowcast.cli.sources import open_model
        from narrowcast.recipe import load_recipe

        rules = load_recipe(recipe)
        source = open_model(model)
        calibration = None if data is None else open_data(data, options, model=model)
    result = nc.quantize(
        source.model, rules, calibration, strict=strict, min_coverage=min_coverage, progress=output.progress,
        resume=work,
    )  # fmt: skip
    _check_something_done(result.report, source.kind, model)
    with output.working(f"saving {out}"):
        _save(result, out, report, form)
    output.json({"out": str(out), "report": result.report.to_dict()})
    if not quiet:
        _show(output, result.report, out)


def _save(result: Quantized, out: Path, report: Path | None, form: str) -> None:
    import narrowcast as nc

    nc.save(result, out, form=form)
    if report is not None:
        result.report.save_json(report)


def check_destinations(out: Path, report: Path | None, *, onnx: bool = False, form: str = "qdq") -> None:
    """Find out before the work what would fail after it; `nc.save` checks again."""
    from narrowcast.export.checkpoint_schema import DESCRIPTION
    from narrowcast.export.onnx_save import FORMS

    if form not in (FORMS if onnx else FORMS[:1]):
        raise FormatError(f"--form {form!r}: ONNX models are written as {' or '.join(FORMS)}, others have no form")
    if onnx:
        if out.suffix.lower() != ".onnx" or out.is_dir() or not out.absolute().parent.is_dir():
            raise CheckpointError(f"--out {out}: an ONNX model is saved as a file; name one that ends in .onnx")
    elif out.exists() and not out.is_dir():
        raise CheckpointError(f"--out {out} is a file; name a directory that does not exist yet")
    elif out.is_dir() and any(out.iterdir()) and not (out / DESCRIPTION).is_file():
        raise CheckpointError(f"--out {out} is not empty and no narrowcast checkpoint; choose another directory")
    if report is not None and (report.is_dir() or not report.absolute().parent.is_dir()):
        raise CheckpointError(f"--report {report}: no file can be written there; name one in a directory that exists")


def _check_something_done(report: Report, kind: str, model: str) -> None:
    """A model in which nothing was quantized is no result, whatever the recipe leaves open."""
    if report.totals.quantized_parameters:
        return
    reasons = sorted({row.reason for row in report.layers if row.reason})[:3]
    remedy = "the report of narrowcast plan lists every layer"
    if kind == "exported":
        remedy = "a torch.export program has operators and no modules; give its module as package.module:factory"
    raise ModelError(f"nothing in {model} was quantized ({'; '.join(reasons)}), so nothing was saved; {remedy}")


def _show(output: Output, report: Report, out: Path) -> None:
    """The report as wide as the terminal, or as plain text."""
    from narrowcast.cli.console import in_width
    from narrowcast.report import format_bytes

    output.show(in_width(output, report))
    files = out.iterdir() if out.is_dir() else [f for f in (out, out.with_name(f"{out.name}.data")) if f.is_file()]
    size = sum(file.stat().st_size for file in files)
    output.show(f"saved to {out} ({format_bytes(size)})")
