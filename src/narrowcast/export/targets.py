"""What models are exported to: one row per target, whose file is imported when it is used."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from narrowcast.errors import CheckpointError, FormatError


@dataclass(frozen=True)
class Request:
    """What is to be exported.

    Args:
        model: path of an .onnx file, an `OnnxModule`, a PyTorch module, or what `nc.quantize` returned.
        out: where to.
        example: calibration data, or None.
        settings: what else was said, by the names that the target's row has in `takes`.
    """

    model: Any
    out: Path
    example: Any = None
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Delivered:
    """What was written.

    Args:
        out: the file or folder.
        files: bytes of every file, by its name.
        facts: what is worth knowing, by name.
        notes: what differs from the model, and why.
        warnings: what is doubtful.
    """

    out: Path
    files: dict[str, int]
    facts: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Target:
    """A kind of thing that models are exported to.

    Args:
        name: after `--to`.
        help: one phrase.
        ending: of the file; "" for a folder.
        module: whose `deliver(request)` writes it, and whose `check(out)`, where there is one, refuses a place.
        takes: settings that mean something to it.
    """

    name: str
    help: str
    ending: str
    module: str
    takes: tuple[str, ...] = ()

    def check(self, out: Path) -> None:
        """Refuse a place before anything is opened.

        Raises:
            CheckpointError: nothing can be written there, or something would be lost.
        """
        if not self.ending:
            importlib.import_module(self.module).check(out)
        elif out.suffix.lower() != self.ending or out.is_dir() or not out.absolute().parent.is_dir():
            raise CheckpointError(
                f"{out}: --to {self.name} writes a file; name one that ends in {self.ending}, in a folder that exists"
            )

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Refuse settings that mean nothing to this target.

        Raises:
            FormatError: one does; the message says which targets it is for.
        """
        for name in sorted(set(settings) - set(self.takes)):
            fits = [row.name for row in TARGETS.values() if name in row.takes]
            raise FormatError(f"{name} means nothing to {self.name}; it is for {' and '.join(fits) or 'no target'}")

    def deliver(self, request: Request) -> Delivered:
        """Write it.

        Raises:
            NarrowcastError: it cannot be written, or a setting means nothing to this target; nothing is left behind.
        """
        self.check_settings(request.settings)
        self.check(request.out)
        found: Delivered = importlib.import_module(self.module).deliver(request)
        return found


PAGE_SETTINGS = ("reference", "runtime", "title", "labels", "mean", "std", "side", "tokenizer", "show",
                 "folder")  # fmt: skip
TARGETS = {
    row.name: row
    for row in (
        Target("onnx", "an ONNX file", ".onnx", "narrowcast.export.target_onnx", ("form", "ranges")),
        Target(
            "ort",
            "ONNX Runtime's own file for phones",
            ".ort",
            "narrowcast.export.target_ort",
            ("form", "ranges", "platform"),
        ),
        Target("web", "a page that runs in the browser", "", "narrowcast.export.target_web", PAGE_SETTINGS),
    )
}
