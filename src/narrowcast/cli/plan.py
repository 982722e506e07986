"""`narrowcast plan`: what a recipe would do to every layer of a model, before any work is done."""

from __future__ import annotations

from typing import Annotated

import typer

from narrowcast.cli.console import JsonOption, Output, QuietOption
from narrowcast.cli.sources import ModelArgument

RECIPE_HELP = (
    "weight-int8, weight-int4, dynamic-int8, dynamic-int4, static-int8, fp16, bf16 (or W8A16, W4A16, W8A8, W4A8, "
    "W8A8-static), or a .toml or .json file of rules."
)
RecipeOption = Annotated[str, typer.Option("--recipe", "-r", metavar="RECIPE", help=RECIPE_HELP)]


def plan(model: ModelArgument, recipe: RecipeOption, as_json: JsonOption = False, quiet: QuietOption = False) -> None:
    """Show what a recipe would do to every layer: bits, bytes before and after, predicted memory, kernel, or why not.

    Needs no data and, for a Hugging Face directory, not even the weights.

    Examples:
        narrowcast plan ./all-MiniLM-L6-v2 --recipe dynamic-int8
        narrowcast plan my_package.models:build --recipe my-recipe.toml --json
    """
    output = Output(as_json=as_json, quiet=quiet)
    with output.working(f"opening {model}"):
        import narrowcast as nc
        from narrowcast.cli.sources import open_for_plan
        from narrowcast.recipe import load_recipe

        rules = load_recipe(recipe)
        planned = nc.plan(open_for_plan(model), rules)
    output.json(planned.to_dict())
    output.show(str(planned))
