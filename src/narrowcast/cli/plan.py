"""`narrowcast plan`: what a recipe would do to every layer of a model, before any work is done."""

from __future__ import annotations

from dataclasses import asdict
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
from narrowcast.cli.sources import ModelArgument

RECIPE_HELP = (
    "weight-int8, weight-int4, dynamic-int8, dynamic-int4, static-int8, fp16, bf16 (or W8A16, W4A16, W8A8, W4A8, "
    "W8A8-static), or a .toml or .json file of rules."
)
RecipeOption = Annotated[str, typer.Option("--recipe", "-r", metavar="RECIPE", help=RECIPE_HELP)]


def plan(
    model: ModelArgument,
    recipe: RecipeOption,
    data: Annotated[
        str | None, typer.Option("--data", "-d", metavar="DATA", help=f"Calibration data to examine: {DATA_HELP}")
    ] = None,
    batch_size: BatchOption = 32,
    limit: LimitOption = None,
    tokenizer: TokenizerOption = None,
    mean: MeanOption = "",
    std: DeviationOption = "",
    image_size: SideOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Show what a recipe would do to every layer: bits, bytes before and after, predicted memory, kernel, or why not.

    Needs no data and, for a Hugging Face directory, not even the weights. With data, says what is wrong with it as
    calibration data for this model and recipe.

    Examples:
        narrowcast plan ./all-MiniLM-L6-v2 --recipe dynamic-int8
        narrowcast plan my_package.models:build --recipe my-recipe.toml --json
        narrowcast plan ./my-llama --recipe weight-int4 --data texts.txt
    """
    output = Output(as_json=as_json, quiet=quiet)
    options = data_options(batch_size, limit, tokenizer, mean, std, image_size)
    with output.working(f"opening {model}"):
        import narrowcast as nc
        from narrowcast.cli.datasets import open_data
        from narrowcast.cli.sources import open_for_plan, open_model
        from narrowcast.pipeline import examine
        from narrowcast.recipe import load_recipe
        from narrowcast.report import finding_lines

        rules = load_recipe(recipe)
        calibration = None if data is None else open_data(data, options, model=model)
        opened = open_for_plan(model) if data is None else open_model(model).model
        planned = nc.plan(opened, rules)
    findings = None
    if calibration is not None:
        with output.working(f"examining {data}"):
            findings = examine(opened, rules, calibration)
    output.json(planned.to_dict() | ({} if findings is None else {"findings": [asdict(row) for row in findings]}))
    output.show(str(planned))
    if findings is not None:
        output.show("\n".join(finding_lines(findings)) or f"data: nothing to say against {data}")
