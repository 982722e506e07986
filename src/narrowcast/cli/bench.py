"""`narrowcast bench`: latency, throughput, load time and peak memory of models beside each other, in turns."""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from narrowcast.cli.compare import ProcessesOption, SecondsOption
from narrowcast.cli.console import JsonOption, Output, QuietOption, table
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
from narrowcast.cli.sources import MODEL_HELP, Source
from narrowcast.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from narrowcast.data import Batch

_INPUT = re.compile(r"(?:(?P<name>[A-Za-z_]\w*)=)?(?P<shape>\d+(?:x\d+)*)(?::(?P<dtype>\w+))?")
_LARGEST = 1 << 31  # elements of one input


def bench(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help=f"The first is the reference. {MODEL_HELP}")],
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            "-i",
            metavar="SHAPE",
            help="Random input: 1x3x224x224, or name=SHAPE:dtype; int64 means token ids. Once per input of the model.",
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", "-d", metavar="DATA", help=f"Take the first batch of real data: {DATA_HELP}")
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
    """Measure latency, throughput, load time and peak memory of one or more models, in turns: A B A B.

    Figures are medians over rounds; ratios are taken within each round, because a shared machine drifts. Load time and
    peak memory come from fresh processes.

    Examples:
        narrowcast bench ./all-MiniLM-L6-v2 minilm-int8 --input 1x128
        narrowcast bench my_package.models:build my-int8 --input 32x3x32x32 --seconds 10
        narrowcast bench my-model.pt2 --data test.npz --batch-size 8 --json
    """
    output = Output(as_json=as_json, quiet=quiet)
    if (data is None) == (not inputs):
        raise DataError("give the input with --input SHAPE or with --data DATA, and only one of the two")
    options = data_options(batch_size, limit, tokenizer, mean, std, image_size)
    with output.working(f"measuring {', '.join(models)}"):
        from narrowcast.cli.datasets import open_data
        from narrowcast.data import iterate

        sources = _open_all(models)
        if data is not None:
            batch = next(iterate(open_data(data, options, model=models[0]), sources[0].model))
        else:
            batch = random_batch(inputs or [], sources[0].model)
        rows = measure_all(sources, batch, seconds=seconds, processes=processes)
    from narrowcast.evaluate import machine

    output.json({"models": rows, "input": _described(batch), "machine": machine()})
    output.heading(f"input {_described(batch)}; " + ", ".join(f"{key} {value}" for key, value in machine().items()))
    output.show(_render(rows))
    for row in rows:
        if row["process"]["reason"]:
            output.note(f"{row['model']}: load time and memory not measured: {row['process']['reason']}")


def _open_all(models: list[str]) -> list[Source]:
    from narrowcast.cli.sources import open_model

    sources: list[Source] = []
    for text in models:
        sources.append(open_model(text, beside=sources[0] if sources else None))
    return sources


def measure_all(sources: list[Source], batch: Batch, *, seconds: float, processes: int) -> list[dict[str, Any]]:
    """Latency in turns, then every model's size on disk, load time and memory.

    Args:
        sources: opened models, the first of which is the reference.
        batch: the input.
        seconds: time for all latencies together.
        processes: fresh processes per model.

    Returns:
        One plain record per model.
    """
    import torch

    from narrowcast.evaluate import latency
    from narrowcast.evaluate.disk import file_bytes, state_bytes
    from narrowcast.evaluate.process import ProcessMeasure, measure

    def runner(model: nn.Module) -> Any:
        return lambda: batch.run(model)

    with torch.inference_mode():
        for source in sources:
            _try_once(source, batch)
        timings = latency.interleaved({str(i): runner(s.model) for i, s in enumerate(sources)}, seconds=seconds)
    rows = []
    for index, source in enumerate(sources):
        process = ProcessMeasure(reason="not asked for")
        if processes:
            process = measure(source.text, batch, architecture=source.architecture, processes=processes)
        size, counted = state_bytes(source.model) if source.kind == "factory" else file_bytes(source.text)
        timing = timings[str(index)]
        rows.append(
            {
                "model": source.text,
                "latency": asdict(timing),
                "samples_per_second": batch.samples / timing.seconds,
                "speedup": asdict(latency.ratio(timings["0"], timing)),
                "bytes": size,
                "bytes_counted": counted,
                "process": asdict(process),
            }
        )
    return rows


def _try_once(source: Source, batch: Batch) -> None:
    """Whether the model takes the input at all, with its name in the message if not."""
    try:
        batch.run(source.model)
    except Exception as error:  # the model is the user's: whatever it raises is about this input
        raise DataError(
            f"{source.text} cannot answer an input of {_described(batch)}: {type(error).__name__}: {error!s:.300}"
        ) from None


def random_batch(texts: list[str], model: nn.Module) -> Batch:
    """Random input for a model.

    Args:
        texts: one per input: `[name=]shape[:dtype]`, for example 1x3x32x32 or input_ids=1x128:int64.
        model: decides what an input without dtype is: token ids where it has embeddings and the shape is [B, T].

    Raises:
        DataError: a text is not of that form.
    """
    from narrowcast.data import Batch

    args: list[Tensor] = []
    kwargs: dict[str, Tensor] = {}
    for text in texts:
        match = _INPUT.fullmatch(text.strip())
        if match is None:
            raise DataError(f"--input {text!r} is not of the form [name=]SHAPE[:dtype], for example 1x3x224x224")
        values = _random(text, [int(side) for side in match["shape"].split("x")], match["dtype"], model)
        if match["name"]:
            kwargs[match["name"]] = values
        else:
            args.append(values)
    first = (args or list(kwargs.values()))[0]
    return Batch(tuple(args), kwargs, None, first.shape[0])


def _random(text: str, shape: list[int], dtype: str | None, model: nn.Module) -> Tensor:
    import math

    import torch

    if not 0 < math.prod(shape) <= _LARGEST:
        raise DataError(f"--input {text!r} has {math.prod(shape)} values; expected 1 to {_LARGEST}")
    vocabulary = _vocabulary(model)
    dtype = dtype or ("int64" if vocabulary and len(shape) == 2 else "float32")
    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype):
        raise DataError(f"--input {text!r}: {dtype!r} is no dtype of torch; use float32, bfloat16, int64, ...")
    generator = torch.Generator().manual_seed(0)
    if kind.is_floating_point:
        return torch.randn(shape, generator=generator).to(kind)
    return torch.randint(0, vocabulary or 2, shape, generator=generator).to(kind)


def _vocabulary(model: nn.Module) -> int:
    """Token ids below this are valid for every embedding of the model; 0 without one."""
    configured = getattr(getattr(model, "config", None), "vocab_size", None)
    if isinstance(configured, int) and configured > 0:
        return configured
    sizes = (getattr(module, "num_embeddings", None) for module in model.modules())
    return min((size for size in sizes if isinstance(size, int)), default=0)


def _described(batch: Batch) -> str:
    import torch

    parts = [*(("", part) for part in batch.args), *batch.kwargs.items()]
    shapes = [
        (f"{name} " if name else "") + "x".join(map(str, part.shape)) + f" {str(part.dtype).removeprefix('torch.')}"
        for name, part in parts
        if isinstance(part, torch.Tensor)
    ]
    return ", ".join(shapes) or "the data's own calls"


def _render(rows: list[dict[str, Any]]) -> Any:
    from narrowcast.sizes import format_bytes

    columns = ("latency", "samples/s", "speed", "quartiles", "bytes", "load", "first answer", "peak memory")
    made = table("model", *columns, right=columns)
    for index, row in enumerate(rows):
        ratio, process = row["speedup"], row["process"]
        speed = (
            ("1 x", "")
            if index == 0
            else (f"{ratio['value']:.2f} x", f"{ratio['lower_quartile']:.2f}-{ratio['upper_quartile']:.2f}")
        )
        fresh = ["-"] * 3
        if not process["reason"]:
            fresh = [format_time(process["load_seconds"]), format_time(process["answer_seconds"])]
            fresh.append(format_bytes(process["peak_bytes"]))
        latency = format_time(row["latency"]["seconds"])
        made.add_row(
            row["model"], latency, f"{row['samples_per_second']:.4g}", *speed, format_bytes(row["bytes"]), *fresh
        )
    return made


def format_time(seconds: float) -> str:
    """Seconds with three digits in a readable unit: 1.2 s, 3.45 ms, 67 us."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"
