"""The options of `narrowcast qat`, with the help that they show."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from narrowcast.cli.datasets import DATA_HELP

TrainOption = Annotated[
    str,
    typer.Option(
        "--data", "-d", metavar="TRAIN", help=f"Training data, with class labels or as texts or token ids: {DATA_HELP}"
    ),
]
OutOption = Annotated[Path, typer.Option("--out", "-o", metavar="DIRECTORY", help="Where the quantized model goes.")]
CalibrationOption = Annotated[
    str | None, typer.Option(metavar="DATA", help="Calibration data; default: 256 samples of the training data.")
]
EvalOption = Annotated[
    str | None,
    typer.Option(metavar="DATA", help="Evaluation data; the best evaluated state is what is saved."),
]
MetricOption = Annotated[
    str | None,
    typer.Option(
        "--metric", "-m",
        help="top1, perplexity, spearman, agreement, difference, or package.module:function of (outputs, targets) or "
        "(model); default: chosen by the data.",
    ),
]  # fmt: skip
GoalOption = Annotated[
    str | None, typer.Option(metavar="higher|lower", help="Which score of a metric of your own is the better one.")
]
LossOption = Annotated[
    str | None,
    typer.Option(help="package.module:function of (outputs, targets), in place of the loss that fits the data."),
]
EpochsOption = Annotated[int | None, typer.Option(help="Passes over the training data; default: 1.", min=1)]
StepsOption = Annotated[int | None, typer.Option(help="Optimizer steps; with --epochs, what ends first.", min=1)]
RangeRateOption = Annotated[
    float | None, typer.Option("--range-lr", help="Learning rate of ranges at the start; default: that of weights.")
]
RateOption = Annotated[float, typer.Option("--lr", help="Learning rate at the start; it falls to 0 along a cosine.")]
OptimizerOption = Annotated[str, typer.Option(metavar="adamw|sgd", help="sgd has momentum 0.9 (Nesterov).")]
DecayOption = Annotated[float, typer.Option(help="Weight decay of matrices and kernels; ranges never decay.")]
SeedOption = Annotated[int, typer.Option(help="Of the order of samples, dropout and augmentation.", min=0)]
DistillOption = Annotated[
    float,
    typer.Option(help="Weight, 0 to 1, of the float model's answers as targets; labels weigh the rest.", min=0, max=1),
]
TemperatureOption = Annotated[float, typer.Option(help="Of the float model's answers.")]
FreezeOption = Annotated[
    float,
    typer.Option(
        help="Share of the steps after which BatchNorms keep their statistics; 1 never. 0.7 can be better at 2 bits.",
        min=0,
        max=1,
    ),
]
FreezeRangesOption = Annotated[
    float, typer.Option(help="Share of the steps after which ranges stay as they are; 1 never.", min=0, max=1)
]
PatienceOption = Annotated[
    int | None, typer.Option(help="Stop after so many evaluations in a row without a better score.", min=1)
]
EvalEveryOption = Annotated[int | None, typer.Option(help="Steps between evaluations; default: an epoch.", min=1)]
CheckpointOption = Annotated[
    int | None, typer.Option(help="Steps between writes of the training state; default: an epoch, or less.", min=1)
]
StateOption = Annotated[
    Path | None,
    typer.Option(metavar="DIRECTORY", help="Where the state of training is kept; default: OUT.training."),
]
ResumeOption = Annotated[
    bool, typer.Option("--resume", help="Go on from the state of training, if there is one, with the same result.")
]
EvalLimitOption = Annotated[
    int | None, typer.Option(help="Evaluate on only the first so many samples of --eval-data.", min=1)
]
