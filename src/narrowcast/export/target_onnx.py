"""The target `onnx`: one file in the form that is asked for, and what ONNX Runtime runs of it."""

from __future__ import annotations

from typing import Any

from narrowcast.export.artefact import Artefact, products, write_artefact
from narrowcast.export.targets import Delivered, Request
from narrowcast.models.onnx_file import read_onnx


def deliver(request: Request) -> Delivered:
    """Write the file."""
    written = write_artefact(request.model, request.out, request.example, **request.settings)
    data = request.out.with_name(f"{request.out.name}.data")
    files = {path.name: path.stat().st_size for path in (request.out, data) if path.is_file()}
    facts, warnings = kernels(written)
    return Delivered(request.out, files, facts, written.notes, warnings)


def kernels(written: Artefact) -> tuple[dict[str, Any], list[str]]:
    """What ONNX Runtime runs of a file, counted, and a warning where nothing in it is quantized."""
    found = list(products(read_onnx(written.path)))
    integers = sum(row.integer for row in found)
    facts = {"products in integers": f"{integers} of {len(found)} in ONNX Runtime on this CPU"}
    warnings = [] if written.quantized else ["nothing in the model is quantized; narrowcast quantize does that"]
    return facts, warnings
