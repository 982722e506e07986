"""The command line: one file per command; each parses, calls the library and prints."""

from __future__ import annotations


def main() -> None:
    """Run the command that the arguments name; the console entry `narrowcast`."""
    from narrowcast.cli.app import run

    run()


__all__ = ["main"]
