"""The README keeps its word: its snippets run, its tables come from the results, what the documents name exists."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from benchmarks import readme_tables

from narrowcast.kernels import OPS
from narrowcast.recipe import ALIASES, PRESETS, load_recipe

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def command_lines() -> list[list[str]]:
    """The lines of the README's shell snippets that need nothing but the package."""
    lines = [shlex.split(line, comments=True) for text in blocks(README, "sh") for line in text.splitlines()]
    return [line for line in lines if line and line[0] in ("narrowcast", "python")]


def test_python_snippet_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (snippet,) = blocks(README, "python")
    assert len([line for line in snippet.splitlines() if line.strip()]) <= 12
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(snippet, "README.md", "exec"), names)
    assert {row.outcome for row in names["quantized"].report.layers if row.type == "Linear"} == {"quantized"}
    assert (tmp_path / "my-int8" / "model.safetensors").is_file()


@pytest.mark.slow
def test_command_line_snippet_runs(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the example's data is in scikit-learn")
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "NO_COLOR": "1"}
    starts = {"python": [sys.executable], "narrowcast": [sys.executable, "-m", "narrowcast.cli"]}
    commands = command_lines()
    assert [command[1] for command in commands if command[0] == "narrowcast"][:3] == ["plan", "quantize", "compare"]
    for name, *arguments in commands:
        done = subprocess.run(
            [*starts[name], *arguments],
            cwd=tmp_path / "examples",
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{name} {shlex.join(arguments)}\n{done.stdout}\n{done.stderr}"
    assert (tmp_path / "examples" / "digits-int8" / "narrowcast.json").is_file()


def test_presets_of_the_table_are_the_presets() -> None:
    rows = re.findall(r"^\| `([\w-]+)`(?: \(([\w-]+)\))? \|", README, re.MULTILINE)
    assert [name for name, _ in rows] == list(PRESETS)
    assert {alias.upper(): name for name, alias in rows if alias} == ALIASES


def test_commands_that_the_readme_names_exist() -> None:
    from narrowcast.cli.app import app

    known = {command.name for command in app.registered_commands}
    assert set(re.findall(r"`?narrowcast\n? ?([a-z]+)", " ".join(blocks(README, "sh")))) <= known
    assert {command[1] for command in command_lines() if command[0] == "narrowcast"} <= known


def test_every_figure_of_the_readme_comes_from_the_committed_results() -> None:
    assert readme_tables.filled(README, ROOT / "benchmarks" / "results") == README


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_between_the_documents_lead_somewhere(path: Path) -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8"))
    assert [target for target in targets if not (path.parent / target).exists()] == []


def test_files_that_the_architecture_page_lists_exist() -> None:
    room, missing = "", []
    house = ARCHITECTURE.partition("## The house")[2].partition("### Floors")[0]
    for indent, name in re.findall(r"^( {6}| {8})([\w*]+(?:\.py|/))", house, re.MULTILINE):
        room = name if len(indent) == 6 else room
        pattern = name if len(indent) == 6 else room + name
        if not list((ROOT / "src" / "narrowcast").glob(pattern.rstrip("/"))):
            missing.append(pattern)
    assert missing == []


def test_rooms_of_the_package_are_on_the_architecture_page() -> None:
    rooms = {path.stem for path in (ROOT / "src" / "narrowcast").iterdir() if not path.name.startswith(("_", "."))}
    floors = ARCHITECTURE.partition("### Floors")[2].partition("## Central types")[0]
    assert rooms - set(re.findall(r"\w+", floors)) == set()


def test_operators_of_the_architecture_page_are_the_operators() -> None:
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", ARCHITECTURE.partition("| op | reads |")[2], re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"\w+", row)}
    assert named == set(OPS) - {"conv2d_int8_pack", "conv2d_int8_unpack"}


def test_recipe_of_the_architecture_page_is_one(tmp_path: Path) -> None:
    (text,) = blocks(ARCHITECTURE, "toml")
    (tmp_path / "recipe.toml").write_text(text, encoding="utf-8")
    recipe = load_recipe(tmp_path / "recipe.toml")
    assert [rule.keep for rule in recipe.rules if rule.keep] == ["the head decides"]


# what the benchmarks write, cut to what the tables read
MACHINE = {
    "cpu": "A Processor",
    "cores": 2,
    "packages": {"torch": "2.13.0"},
    "commit": "abc",
    "date": "2026-11-21T09:00",
}


def write(folder: Path, name: str, rows: list[dict[str, Any]], **more: Any) -> None:
    (folder / f"{name}.json").write_text(json.dumps({"machine": MACHINE, "rows": rows, **more}), encoding="utf-8")


def test_without_results_the_tables_say_how_to_get_them(tmp_path: Path) -> None:
    text = readme_tables.filled(f"a {readme_tables.BEGIN} old {readme_tables.END} b", tmp_path)
    assert text.startswith("a ") and text.endswith(" b") and "old" not in text
    assert all(f"python -m benchmarks.{name}" in text for name in ("accuracy", "latency", "sizes"))


def test_tables_hold_the_measured_figures(tmp_path: Path) -> None:
    common = {"metric": "top1", "float32": {"top1": 91.56}, "samples": "all", "drop": 0.04, "sqnr_db": 37.26}
    failed = {"model": "broken", "variant": "fp16", "failed": "because"}
    row = {"model": "net", "variant": "static-int8", "agreement": 99.61, **common}
    write(tmp_path, "accuracy", [failed, row], quick=False)
    speedups = {"speedups": {"torch float32": 3.0, "torch float32 channels_last": 2.0}, "met": True}
    times = {"torch float32": {"median": 1.5}, "narrowcast static-int8": {"median": 0.5}}
    timed = {"model": "net", "shape": "1", "threads": 2, "milliseconds": times, "narrowcast": {"static-int8": speedups}}
    write(tmp_path, "latency", [timed, {**timed, "threads": 1, "shape": "77"}])
    small = {"model": "net", "variant": "static-int8", "bytes": 28, "percent": 28.0, "ready_speedup": 1.5}
    write(tmp_path, "sizes", [{"model": "net", "variant": "float32", "bytes": 1_000_000}, small])
    bits = {"model": "net", "format": "W4 g32", "float32": 91.56}
    ours = [
        {**bits, "tool": "narrowcast", "method": method, "score": score}
        for method, score in (("default", 91.0), ("gptq", 91.2), ("rtn without data", 80.0))
    ]
    others = [
        {**bits, "tool": "other", "method": method, "score": score, "changed": changed, "matrices": 3}
        for method, score, changed in (("idle", 91.5, 0), ("busy", 90.1, 3))
    ]
    write(tmp_path, "low_bits", [*ours, *others, {**bits, "tool": "other", "method": "broken", "failed": "because"}])
    text = readme_tables.filled(readme_tables.BEGIN + readme_tables.END, tmp_path)
    assert "| net, W4 g32 | 91.56 | 80.00 | 91.00 | 91.20 (gptq) | 90.10 (other busy) |" in text
    assert "| net, top-1 % | 91.56 | -0.04 |" in text and "37.3 dB, 99.6 %" in text and "broken" not in text
    assert "| net 1 | 1.5 | 0.5 (2.00x) |" in text and "77" not in text
    assert "| net | 1.00 MB | 28.0 % (1.50x) |" in text
    assert text.count("A Processor") == 4


def test_quick_results_are_not_published(tmp_path: Path) -> None:
    write(tmp_path, "accuracy", [{"model": "net", "variant": "fp16"}], quick=True)
    assert "Not measured yet" in readme_tables.section("accuracy", tmp_path)


def test_readme_without_markers_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="markers"):
        readme_tables.filled("no markers", tmp_path)
