"""The rules of the house, file by file: who imports whom, how long files and functions are, what is left out."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "narrowcast"
FILES = sorted(PACKAGE.rglob("*.py"))

# A room is a folder or a module directly under the package. It imports only from lower floors and from itself.
# The page of the design has {models, recipe, data} on one floor; here they have an order, since a recipe's rules
# match layers and an adapter feeds data to its model.
FLOORS = (
    {"errors"},
    {"core"},
    {"kernels", "observers", "report", "progress", "sizes"},
    {"methods", "transforms", "nn"},
    {"data"},
    {"models"},
    {"recipe"},
    {"planning", "pipeline", "qat", "tune", "evaluate", "parity", "export"},
    {"demo"},
    {"cli", "__main__"},
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# The jobs call one another (tuning runs the pipeline, which follows a plan), in one direction: see the test for cycles.
JOBS = FLOORS[-3]

ONNX = {"onnx", "onnx_ir", "onnxscript", "onnxruntime"}
HUGGING_FACE = {"transformers", "tokenizers"}
# Where a Hugging Face directory or its tokenizer is opened; besides, the demo.
OPENS_HUGGING_FACE = {
    "cli/sources.py",
    "cli/text_files.py",
    "data/texts.py",
    "demo/encoder.py",
    "evaluate/sources.py",
    "export/checkpoint_huggingface.py",
}
FUNCTION_LINES = 45
FILE_LINES = 400
UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b|raise NotImplementedError")
PRINTING_ROOMS = {"cli", "report", "progress", "__main__"}


def place(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def room_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def module_name(path: Path) -> str:
    """The dotted name of a file's package, for relative imports."""
    return ".".join(("narrowcast", *path.relative_to(PACKAGE).parts[:-1]))


def imported_names(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import anywhere in a file, also inside functions and for type checking only."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = module_name(path).split(".")
                base = ".".join((*above[: len(above) - node.level + 1], *([base] if base else [])))
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def imported_rooms(path: Path) -> Iterator[tuple[int, str]]:
    """(line, room) of every import from this package; the package itself is the room ''."""
    rooms = {room_of(file) for file in FILES} - {"__init__"}
    for line, name in imported_names(path):
        first, _, rest = name.partition(".")
        if first == "narrowcast":
            room = rest.partition(".")[0]
            yield line, room if room in rooms or room in FLOOR_OF else ""


def third_parties(path: Path) -> set[str]:
    return {name.partition(".")[0] for _, name in imported_names(path)}


every_file = pytest.mark.parametrize("path", FILES, ids=place)


def test_the_package_is_found() -> None:
    assert FILES, f"no Python files under {PACKAGE}"


@every_file
def test_a_module_imports_only_from_lower_floors_or_its_own_room(path: Path) -> None:
    room = room_of(path)
    if room == "__init__":  # the public names come from everywhere
        return
    assert room in FLOOR_OF, f"the room {room!r} has no floor; give it one in FLOORS and in docs/architecture.md"
    wrong = []
    for line, other in imported_rooms(path):
        below = other in FLOOR_OF and FLOOR_OF[other] < FLOOR_OF[room]
        at_the_top = other == "" and room in FLOORS[-1] | FLOORS[-2]
        if not (below or at_the_top or other == room or {room, other} <= JOBS):
            wrong.append(f"line {line}: {room} imports {other or 'the package itself'}")
    assert not wrong, "\n".join(wrong)


def test_the_jobs_call_one_another_without_cycles() -> None:
    calls: dict[str, set[str]] = {job: set() for job in JOBS}
    for path in FILES:
        if (room := room_of(path)) in JOBS:
            calls[room] |= {other for _, other in imported_rooms(path) if other in JOBS and other != room}
    TopologicalSorter(calls).prepare()  # raises CycleError, which names the cycle


@every_file
def test_onnx_is_imported_only_where_onnx_files_are_read_or_written(path: Path) -> None:
    known = room_of(path) in ("models", "parity") and path.name.startswith("onnx_")
    found = third_parties(path) & ONNX
    assert known or room_of(path) == "export" or not found, f"{found}: only export/ and models/onnx_*.py know ONNX"


@every_file
def test_transformers_is_imported_only_where_a_directory_is_opened_and_in_the_demo(path: Path) -> None:
    inside = path.relative_to(PACKAGE).as_posix()
    allowed = inside in OPENS_HUGGING_FACE or inside.startswith("cli/demo")
    found = third_parties(path) & HUGGING_FACE
    assert allowed or not found, f"{found}: call one of {sorted(OPENS_HUGGING_FACE)} instead"


def test_importing_narrowcast_brings_no_heavy_library_and_touches_no_gpu() -> None:
    heavy = sorted(ONNX | HUGGING_FACE | {"gguf", "sklearn", "sentence_transformers"})
    code = (
        "import sys, narrowcast, torch\n"
        f"print(*[name for name in {heavy!r} if name in sys.modules], "
        "*['cuda'] * torch.cuda.is_initialized(), sep=',', end='')"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "", f"import narrowcast also did: {done.stdout}"


LONG_TEXT = [
    path
    for folder, endings in {"src": (".py",), "csrc": (".cpp", ".h"), "tests": (".py",), "benchmarks": (".py",)}.items()
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in endings
]


@pytest.mark.parametrize("path", LONG_TEXT, ids=place)
def test_a_file_is_at_most_400_lines_long(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= FILE_LINES, f"{lines} lines; split it by meaning"


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef, source: list[str]) -> int:
    """Lines of a function from `def` to its end, without its docstring, blank lines and comment lines."""
    assert function.end_lineno is not None
    lines = set(range(function.lineno, function.end_lineno + 1))
    first = function.body[0]
    if ast.get_docstring(function) is not None and first.end_lineno is not None:
        lines -= set(range(first.lineno, first.end_lineno + 1))
    return sum(1 for line in lines if (text := source[line - 1].strip()) and not text.startswith("#"))


@every_file
def test_a_function_is_about_40_lines_long(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = {f"{node.name} (line {node.lineno})": code_lines(node, text.splitlines()) for node in functions}
    assert not {name: length for name, length in lengths.items() if length > FUNCTION_LINES}


@every_file
def test_no_error_is_caught_without_a_name(path: Path) -> None:
    handlers = [
        node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.ExceptHandler)
    ]
    bare = [f"line {node.lineno}: name the exception that can be explained" for node in handlers if node.type is None]
    assert not bare, "\n".join(bare)


@every_file
def test_nothing_is_left_unfinished(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    found = [f"line {number}: {line.strip()}" for number, line in enumerate(lines, 1) if UNFINISHED.search(line)]
    assert not found, "\n".join(found)


@every_file
def test_every_module_says_what_it_owns_and_postpones_annotations(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "a module begins with a docstring: what it owns and what it must not know"
    if any(isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) for node in ast.walk(tree)):
        assert "__future__.annotations" in {name for _, name in imported_names(path)}


@every_file
def test_only_the_command_line_and_the_report_print(path: Path) -> None:
    if room_of(path) in PRINTING_ROOMS:
        return
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    prints = [f"line {node.lineno}" for node in calls if isinstance(node.func, ast.Name) and node.func.id == "print"]
    assert not prints, ", ".join(prints)
