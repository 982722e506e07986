from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import narrowcast.cli
from narrowcast.cli.app import app

COMMANDS = [command.name for command in app.registered_commands]
SOURCE = Path(narrowcast.cli.__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    command = [sys.executable, "-m", "narrowcast.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)


def test_the_console_entry_works_in_a_process_of_its_own():
    shown = run("show", "0.87654321", "--quiet")
    assert shown.returncode == 0, shown.stderr
    assert "0.874015749" in shown.stdout
    assert shown.stderr == ""
    wrong = run("inspect", "no/such/file")
    assert wrong.returncode == 2
    assert wrong.stdout == "" and wrong.stderr.startswith("error: ")


def test_the_table_of_commands_loads_nothing_heavy():
    code = """
import sys
import narrowcast
before = set(sys.modules)
import narrowcast.cli.app
added = {name.partition(".")[0] for name in set(sys.modules) - before}
sys.exit(", ".join(sorted(added & {"torch", "transformers", "onnx", "sklearn", "PIL", "pandas"})) or 0)
"""
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples(cli, command):
    answer = cli(command, "--help")
    assert answer.code == 0
    assert f"narrowcast {command}" in answer.out
    assert "Examples:" in answer.out


def test_version_and_overview(cli):
    assert cli("--version").out.startswith("narrowcast ")
    overview = cli("--help").out
    assert all(command in overview for command in COMMANDS)
    assert "Exit codes" in overview


def test_unknown_commands_and_options_are_wrong_usage(cli):
    assert cli("frobnicate").code == 2
    assert cli("size", "30B", "--colour").code == 2


def test_an_unexpected_error_is_one_message(cli, monkeypatch):
    monkeypatch.setattr("narrowcast.sizes.format_sizes", lambda *_, **__: 1 / 0)
    answer = cli("size", "30B")
    assert answer.code == 2
    assert answer.err.startswith("error: ZeroDivisionError") and "NARROWCAST_DEBUG" in answer.err
