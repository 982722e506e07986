"""The target `web`: see `web_export`."""

from __future__ import annotations

from pathlib import Path

from narrowcast.export.checkpoint_files import refuse_foreign
from narrowcast.export.targets import Delivered, Request
from narrowcast.export.web_export import WHAT, foreign_to_page, web
from narrowcast.export.web_float import HOW
from narrowcast.export.web_options import PageOptions, with_folder


def check(out: Path) -> None:
    """Raise CheckpointError where the folder holds anything that would be lost."""
    refuse_foreign(out.resolve(), foreign_to_page, WHAT)


def deliver(request: Request) -> Delivered:
    """Write the page; `folder` is where the model lies, whose files may say how inputs are prepared."""
    settings = dict(request.settings)
    named = {name: settings.pop(name, None) for name in ("reference", "runtime")}
    folder = settings.pop("folder", None)
    options = PageOptions(**settings)
    options = options if folder is None else with_folder(options, folder)
    page = web(request.model, request.out, request.example, options=options, **named)
    reference = named.get("reference")
    ask, show = page.facts["ask"], page.facts["show"]
    facts = {
        "compared with": f"float32{f', {reference}' if isinstance(reference, Path) else ''}" if reference else HOW,
        "asks for": ask["kind"], "shows": show["kind"], "onnxruntime-web": page.runtime,
        **{f"{name} in WebAssembly": f"{value:.1f} dB to the CPU's answer" for name, value in page.parity.items()},
        "to see it": f"python -m http.server -d {request.out} and open http://localhost:8000",
    }  # fmt: skip
    return Delivered(request.out, page.files, facts, page.notes, page.warnings)
