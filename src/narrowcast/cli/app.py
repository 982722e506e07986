"""The table of commands; importing it imports neither torch nor any part of the library that needs it."""

from __future__ import annotations

from collections.abc import Callable
from inspect import cleandoc
from typing import Annotated, Any

import typer

from narrowcast.cli.bench import bench
from narrowcast.cli.compare import compare
from narrowcast.cli.console import guarded, installed_version
from narrowcast.cli.demo import demo
from narrowcast.cli.doctor import doctor
from narrowcast.cli.export import export
from narrowcast.cli.inspect import inspect
from narrowcast.cli.plan import plan
from narrowcast.cli.qat import qat
from narrowcast.cli.quantize import quantize
from narrowcast.cli.show import RangeCommand, show
from narrowcast.cli.size import size
from narrowcast.cli.verify import verify

app = typer.Typer(
    name="narrowcast",
    epilog="Exit codes: 0 done, 1 a contract or check was not met, 2 wrong usage or bad input.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"narrowcast {installed_version('narrowcast', missing='from a source tree')}")
        raise typer.Exit


@app.callback()
def narrowcast(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Make a trained neural network small and fast in fewer bits, and prove that it still works."""


def help_text(command: Callable[..., Any]) -> str:
    """The docstring of a command with every paragraph on one line; the lines of examples stay as they are."""
    paragraphs = cleandoc(command.__doc__ or "").split("\n\n")
    return "\n\n".join(part if part.startswith("Examples:") else " ".join(part.split()) for part in paragraphs)


def register(name: str, command: Callable[..., Any], **settings: Any) -> None:
    """Make a function the command `name`."""
    app.command(name=name, help=help_text(command), **settings)(guarded(command))


register("plan", plan)
register("quantize", quantize)
register("qat", qat)
register("compare", compare)
register("verify", verify)
register("export", export)
register("inspect", inspect)
register("bench", bench)
register("show", show, cls=RangeCommand, context_settings={"ignore_unknown_options": True})  # numbers may be negative
register("size", size)
register("doctor", doctor)
register("demo", demo)


def run() -> None:
    """Run the command that the arguments name."""
    app(prog_name="narrowcast")
