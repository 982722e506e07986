"""What every command shares: where text goes, progress, and how an error becomes one message and an exit code.

Results go to standard output; notes, warnings, progress and errors to standard error, so that `--json` leaves nothing
but JSON on standard output. Knows no model and no command.
"""

from __future__ import annotations

import functools
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from narrowcast.errors import ContractError, NarrowcastError

JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notes; only what was asked for.")]

DONE, NOT_MET, WRONG_USE, INTERRUPTED = 0, 1, 2, 130
DEBUG_VARIABLE = "NARROWCAST_DEBUG"
PLAIN_WIDTH = 200  # columns where standard output is a file or a pipe, so that no cell is cut

Command = TypeVar("Command", bound=Callable[..., Any])


class Output:
    """Where a command writes.

    Args:
        as_json: only JSON on standard output.
        quiet: no notes and no progress.
    """

    def __init__(self, *, as_json: bool = False, quiet: bool = False) -> None:
        self.as_json = as_json
        self.quiet = quiet
        self.result = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False, soft_wrap=False)
        self.notes = Console(stderr=True, width=None if sys.stderr.isatty() else PLAIN_WIDTH, highlight=False)

    def show(self, content: Any) -> None:
        """Print a table or a line of the result; nothing under `--json`."""
        if not self.as_json:
            text = isinstance(content, str)
            self.result.print(escape(content) if text else content, soft_wrap=text)

    def heading(self, text: str) -> None:
        """Print a line in bold above a result; nothing under `--json` or `--quiet`."""
        if not self.as_json and not self.quiet:
            self.result.print(escape(text), style="bold", soft_wrap=True)

    def note(self, text: str) -> None:
        """Tell the user something beside the result; nothing under `--quiet`."""
        if not self.quiet:
            self.notes.print(escape(text), style="dim", soft_wrap=True)

    def warn(self, text: str) -> None:
        """Tell the user what is doubtful about the result, also under `--quiet`."""
        self.notes.print(f"[yellow]warning:[/] {escape(text)}", soft_wrap=True)

    def json(self, value: Any) -> None:
        """Print the result as JSON when `--json` was given."""
        if self.as_json:
            print(json.dumps(plain(value), indent=2, ensure_ascii=False))

    @contextmanager
    def working(self, text: str) -> Iterator[None]:
        """Say what is being done while it is done: a spinner on a terminal, a plain line otherwise."""
        if self.quiet:
            yield
        elif self.notes.is_terminal:
            with self.notes.status(escape(text)):
                yield
        else:
            self.notes.print(escape(text), soft_wrap=True)
            yield

    @property
    def progress(self) -> bool:
        """Whether the library may show its progress."""
        return not self.quiet and not self.as_json


def plain(value: Any) -> Any:
    """`value` with everything that JSON lacks as text: infinite and undefined numbers, paths, dtypes."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return str(value)


class PlainTable(Table):
    """A table whose cells are text: a bracket in a cell is a bracket, not markup."""

    def add_row(self, *cells: Any, **settings: Any) -> None:
        """Add a row; strings stand as they are."""
        super().add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in cells), **settings)


def table(*columns: str, title: str | None = None, right: tuple[str, ...] = ()) -> PlainTable:
    """An empty table; columns named in `right` are aligned to the right."""
    heading = None if title is None else Text(title, style="bold")
    made = PlainTable(title=heading, title_justify="left", header_style="bold", box=None, pad_edge=False)
    for name in columns:
        made.add_column(name, justify="right" if name in right else "left", overflow="fold")
    return made


def in_width(output: Output, report: Any) -> Any:
    """A report as a table that fits the terminal, or as wide text where there is none."""
    from rich.console import Group

    from narrowcast.report import finding_lines, report_table
    from narrowcast.report.terminal import solver_notes, totals_lines

    if not output.result.is_terminal:
        return str(report)
    lines = [*totals_lines(report.totals), *finding_lines(report.findings)]
    lines += [f"note       {note}" for note in [*report.notes, *solver_notes(report.layers)]]
    return Group(report_table(report), Text("\n".join(lines)))


def installed_version(package: str, *, missing: str) -> str:
    """The version of an installed package, or `missing`."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return missing


def guarded(command: Command) -> Command:
    """The command with every error as one message and the exit code that the documentation promises.

    0 done; 1 a contract or check was not met; 2 wrong usage or bad input; 130 interrupted. `NARROWCAST_DEBUG=1` shows
    the traceback as well.
    """

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            with _plain_warnings():
                return command(*args, **kwargs)
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(DONE) from None
        except KeyboardInterrupt:
            fail("interrupted", as_json=False)
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:
            if os.environ.get(DEBUG_VARIABLE):
                raise
            fail(explain(error), as_json=bool(kwargs.get("as_json")))
            raise typer.Exit(NOT_MET if isinstance(error, ContractError) else WRONG_USE) from None

    return run  # type: ignore[return-value]


def explain(error: Exception) -> str:
    """One message for an error; those that narrowcast does not raise on purpose keep their kind."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, NarrowcastError):
        return str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    if isinstance(error, MemoryError):
        return "not enough memory"
    return f"{type(error).__name__}: {text[:600]} (set {DEBUG_VARIABLE}=1 for the traceback)"


def fail(message: str, *, as_json: bool) -> None:
    """Print an error on standard error, and as JSON on standard output where that was asked for."""
    if as_json:
        print(json.dumps({"error": message}, ensure_ascii=False))
    width = None if sys.stderr.isatty() else PLAIN_WIDTH
    Console(stderr=True, highlight=False, width=width).print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Warnings as one line on standard error instead of a source location."""

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if issubclass(category, DeprecationWarning | FutureWarning | PendingDeprecationWarning):
            return
        Console(stderr=True, highlight=False).print(f"[yellow]warning:[/] {escape(str(message))}", soft_wrap=True)

    before = warnings.showwarning
    warnings.showwarning = show  # type: ignore[assignment]
    try:
        yield
    finally:
        warnings.showwarning = before
