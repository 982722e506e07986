"""`narrowcast compare`: accuracy with its interval, latency, bytes, memory and load time of two models."""

from __future__ import annotations

from typing import Annotated

import typer

from narrowcast.cli.console import JsonOption, Output, QuietOption
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
from narrowcast.cli.sources import MODEL_HELP, import_object, is_object

SecondsOption = Annotated[float, typer.Option(help="Time for the latency measurement.", min=0.01, max=3600)]
ProcessesOption = Annotated[
    int, typer.Option(help="Fresh processes per model for load time and peak memory; 0 leaves them out.", min=0, max=99)
]


def compare(
    reference: Annotated[str, typer.Argument(metavar="A", help=f"The model that is right by definition: {MODEL_HELP}")],
    candidate: Annotated[str, typer.Argument(metavar="B", help="The model to judge, of the same kinds.")],
    data: Annotated[str, typer.Option("--data", "-d", metavar="DATA", help=f"Evaluation data: {DATA_HELP}")],
    metric: Annotated[
        str | None,
        typer.Option(
            "--metric",
            "-m",
            help="top1, perplexity, spearman, agreement, difference, or package.module:function of (outputs, targets) "
            "or (model); default: chosen by the data.",
        ),
    ] = None,
    seconds: SecondsOption = 3.0,
    processes: ProcessesOption = 3,
    batch_size: BatchOption = 32,
    limit: LimitOption = None,
    tokenizer: TokenizerOption = None,
    mean: MeanOption = "",
    std: DeviationOption = "",
    image_size: SideOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Compare two versions of a model on the same data: accuracy with a paired 95 % interval, latency in turns, memory.

    A checkpoint of a model that transformers does not know is loaded into the architecture of A.

    Examples:
        narrowcast compare ./all-MiniLM-L6-v2 minilm-int8 --data pairs.jsonl --metric spearman
        narrowcast compare my_package.models:build my-int8 -d test.npz --metric top1 --json
    """
    output = Output(as_json=as_json, quiet=quiet)
    options = data_options(batch_size, limit, tokenizer, mean, std, image_size)
    with output.working(f"comparing {candidate} with {reference}"):
        import narrowcast as nc
        from narrowcast.cli.datasets import open_data
        from narrowcast.cli.sources import check_source

        check_source(reference)
        check_source(candidate)
        chosen = import_object(metric) if metric is not None and is_object(metric) else metric
        samples = open_data(data, options, model=reference)
        result = nc.compare(reference, candidate, samples, chosen, seconds=seconds, processes=processes)
    output.json(result.to_dict())
    output.show(str(result))
