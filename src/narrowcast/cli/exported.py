"""A `.pt2` file of torch.export, looked through before torch opens it.

`torch.export.load` unpickles what the archive says is pickled, evaluates its shape expressions and guards as Python,
and calls whatever functions of torch its graph names. So an archive is refused unless its tensors are plain bytes, its
expressions calculate with sizes only and its graph calls registered operators only.
"""

from __future__ import annotations

import ast
import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from narrowcast.errors import ModelError

_OPERATOR = re.compile(
    r"torch\.ops\.(?!_|load_library|import_module|loaded)\w+"
    r"\.(?:__i?(?:and|or|xor|lshift|rshift)__|(?!__)\w+)(?:\.(?!_)\w+)?"
    r"|_operator\.(?!_)\w+|math\.(?!_)\w+|torch\.sym_\w+"
)
_FORBIDDEN = ("_operator.methodcaller", "_operator.attrgetter", "_operator.itemgetter", "_operator.call")
# sympy's and torch's functions of sizes have capital letters: Max, Mod, FloorDiv, ...
_FUNCTION = re.compile(r"[A-Z]\w*|floor|ceiling|sqrt|log")
_SIZES = ("size", "stride", "storage_offset", "ndim", "shape", "numel", "dim")
_NODES = (
    ast.Expression, ast.BoolOp, ast.BinOp, ast.UnaryOp, ast.Compare, ast.Constant, ast.Name, ast.Load, ast.Call,
    ast.keyword, ast.boolop, ast.operator, ast.unaryop, ast.cmpop,
)  # fmt: skip
_LIMIT = 256 << 20  # bytes of JSON; graphs of large models have tens of megabytes


def check_exported(path: Path) -> None:
    """Refuse a `.pt2` file that could run code of its own.

    Raises:
        ModelError: it is no such archive, is truncated, or holds pickles, compiled code or functions beside operators.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            _check(path, archive)
    except (zipfile.BadZipFile, OSError, ValueError, RecursionError, NotImplementedError, RuntimeError) as error:
        raise ModelError(f"{path} is not a readable torch.export archive: {error}") from None


def _check(path: Path, archive: zipfile.ZipFile) -> None:
    names = [name.partition("/")[2] for name in archive.namelist()]
    if "archive_format" not in names:
        raise ModelError(f"{path} is not an archive of torch.export of torch 2.8 or newer; save it again with that")
    for full, name in zip(archive.namelist(), names, strict=True):
        if name.startswith("data/aotinductor/"):
            raise ModelError(f"{path} holds compiled code ({name}); save the exported program itself")
        if name.startswith(("data/weights/", "data/constants/")) and name.endswith(".json"):
            _check_payloads(path, _json(archive, full))
        elif name.startswith(("data/weights/", "data/constants/")) and name.endswith(".pt"):
            raise _pickled(path, name)
        elif name.startswith("models/"):
            _check_graph(path, _json(archive, full))
        elif name.startswith("data/sample_inputs/"):
            _check_inputs(path, archive, full)


def _pickled(path: Path, name: str) -> ModelError:
    return ModelError(
        f"{path} holds a pickle ({name:.100}), which can run any code when it is opened; save the program again with "
        "torch.export.save from plain tensors, or give the model as package.module:factory"
    )


def _json(archive: zipfile.ZipFile, name: str) -> Any:
    if archive.getinfo(name).file_size > _LIMIT:
        raise ValueError(f"{name} is larger than {_LIMIT} bytes")
    return json.loads(archive.read(name))


def _check_payloads(path: Path, payloads: Any) -> None:
    entries = payloads.get("config") if isinstance(payloads, dict) else None
    if not isinstance(entries, dict):
        raise ModelError(f"{path}: its list of tensors is not a table; the file is damaged")
    for name, entry in entries.items():
        file = str(entry.get("path_name", "")) if isinstance(entry, dict) else ""
        if not file.startswith(("weight_", "tensor_")) or entry.get("use_pickle") is not False:
            raise _pickled(path, str(name))


def _check_inputs(path: Path, archive: zipfile.ZipFile, name: str) -> None:
    """torch.export.load falls back to full unpickling where this fails, so it must not fail."""
    import torch

    content = archive.read(name)
    if not content:
        return
    try:
        torch.load(io.BytesIO(content), weights_only=True)
    except Exception:  # whatever is wrong with it, torch would go on to unpickle it
        raise _pickled(path, name) from None


def _check_graph(path: Path, graph: Any) -> None:
    for key, value in _texts(graph):
        if key == "target" and (not _OPERATOR.fullmatch(value) or value in _FORBIDDEN):
            raise ModelError(f"{path}: its graph calls {value!r:.100}, which is no operator of torch; export it again")
        if key == "expr_str" and not _is_arithmetic(value, guard=False):
            raise ModelError(f"{path}: the shape expression {value!r:.100} is not arithmetic; export it again")
        if key == "guards_code" and not _is_arithmetic(value, guard=True):
            raise ModelError(f"{path}: the guard {value!r:.100} does more than compare sizes; export it again")


def _is_arithmetic(text: str, *, guard: bool) -> bool:
    """Whether Python would only calculate; a guard may also index the inputs and ask for their sizes."""
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, MemoryError):
        return False
    return all(_is_allowed(node, guard=guard) for node in ast.walk(tree))


def _is_allowed(node: ast.AST, *, guard: bool) -> bool:
    if isinstance(node, ast.Call):
        called = node.func
        if guard and isinstance(called, ast.Attribute):
            return called.attr in _SIZES
        return isinstance(called, ast.Name) and bool(_FUNCTION.fullmatch(called.id))
    if isinstance(node, ast.Name):
        return not node.id.startswith("__")
    if isinstance(node, ast.Constant):  # texts are names: Symbol('s27', integer=True), L['x']
        return isinstance(node.value, int | float) or (isinstance(node.value, str) and node.value.isidentifier())
    if isinstance(node, ast.Attribute):
        return guard and node.attr in _SIZES
    return isinstance(node, _NODES) or (guard and isinstance(node, ast.Subscript))


def _texts(document: Any) -> Iterator[tuple[str, str]]:
    """Every text below a key, however deep, without recursion."""
    pending: list[tuple[str, Any]] = [("", document)]
    while pending:
        key, value = pending.pop()
        if isinstance(value, dict):
            pending += value.items()
        elif isinstance(value, list):
            pending += ((key, item) for item in value)
        elif isinstance(value, str):
            yield key, value
