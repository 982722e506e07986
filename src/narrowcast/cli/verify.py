"""`narrowcast verify`: whether two versions of a model compute the same, layer by layer, and where they part."""

from __future__ import annotations

from typing import Annotated

import typer

from narrowcast.cli.console import NOT_MET, JsonOption, Output, QuietOption
from narrowcast.cli.datasets import (
    DATA_HELP,
    BatchOption,
    DeviationOption,
    LimitOption,
    MeanOption,
    SideOption,
    TokenizerOption,
    data_options,
)
from narrowcast.cli.sources import MODEL_HELP

ToleranceOption = Annotated[
    str | None,
    typer.Option(
        help="What outputs may differ by: exact, a least ratio of signal to noise such as 40dB, or a share of the "
        "largest output such as 1e-3; default: what follows from each layer's arithmetic.",
    ),
]
KernelsOption = Annotated[
    str | None,
    typer.Option(
        metavar="KERNELS",
        help="Run A on these kernels: reference (torch bodies that define every op) or a tier of narrowcast doctor.",
    ),
]

IntoOption = Annotated[
    str | None,
    typer.Option(
        "--into",
        metavar="FACTORY",
        help="package.module:factory of the architecture of checkpoints whose model is no transformers class.",
    ),
]


def verify(
    reference: Annotated[str, typer.Argument(metavar="A", help=f"The model that is right by definition: {MODEL_HELP}")],
    artefact: Annotated[str, typer.Argument(metavar="B", help="The model to verify, of the same kinds.")],
    data: Annotated[str, typer.Option("--data", "-d", metavar="DATA", help=f"Inputs to run: {DATA_HELP}")],
    tolerance: ToleranceOption = None,
    kernels: KernelsOption = None,
    into: IntoOption = None,
    batch_size: BatchOption = 32,
    limit: LimitOption = None,
    tokenizer: TokenizerOption = None,
    mean: MeanOption = "",
    std: DeviationOption = "",
    image_size: SideOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Compare two versions of a model layer by layer: each layer alone, on the same inputs, and in the model.

    Ends with 0 where parity holds, 1 where it does not, 2 where the two cannot be compared. A float model and a
    quantized one are never equal: say with --tolerance how far apart they may be. ONNX files run in ONNX Runtime; what
    that computes otherwise than the file says is in the notes.

    Examples:
        narrowcast verify my_package.models:trained my-int8 --data test.npz
        narrowcast verify ./all-MiniLM-L6-v2 minilm-int8 -d pairs.jsonl --tolerance 15dB
        narrowcast verify my_package.models:trained model.onnx --data test.npz --tolerance 20dB
        narrowcast verify model.onnx model-int8.onnx --data test.npz --tolerance 20dB
        narrowcast verify my-int8 my-int8.onnx --into my_package.models:trained --data test.npz
        narrowcast verify minilm-int8 minilm-int8 -d pairs.jsonl --kernels reference
    """
    output = Output(as_json=as_json, quiet=quiet)
    options = data_options(batch_size, limit, tokenizer, mean, std, image_size)
    with output.working(f"verifying {artefact} against {reference}"):
        import narrowcast as nc
        from narrowcast.cli.datasets import open_data
        from narrowcast.cli.sources import check_source

        check_source(reference)
        check_source(artefact)
        if into is not None:
            check_source(into)
        samples = open_data(data, options, model=reference)
        parity = nc.verify(reference, artefact, samples, tolerance=tolerance, kernels=(kernels, None), into=into)
    output.json(parity.to_dict())
    output.show(str(parity))
    if not parity.ok:
        raise typer.Exit(NOT_MET)
