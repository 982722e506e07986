"""Models that are named rather than given: a directory, a file or a factory, opened the way its kind is.

transformers, torch.export and narrowcast's checkpoints are imported only when a source needs them.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from narrowcast.errors import CheckpointError, ModelError
from narrowcast.models import require_onnx

DESCRIPTION = "narrowcast.json"
CONFIG = "config.json"
FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
ACCEPTED = "a narrowcast checkpoint, a Hugging Face directory, a .pt2 or .onnx file or package.module:factory"


def kind(source: str | Path) -> str:
    """What a source is: "checkpoint", "huggingface", "exported", "onnx" or "factory".

    Raises:
        ModelError: it is none of these, or does not exist.
    """
    path = Path(source)
    if (path / DESCRIPTION).is_file():
        return "checkpoint"
    if (path / CONFIG).is_file():
        return "huggingface"
    if path.is_file() and path.suffix == ".pt2":
        return "exported"
    if path.is_file() and path.suffix.lower() == ".onnx":
        return "onnx"
    if not path.exists() and FACTORY.fullmatch(str(source)):
        return "factory"
    what = "is none of these" if path.exists() else "does not exist"
    raise ModelError(f"{str(source)!r} {what}: {ACCEPTED}")


def open_model(source: str | Path, into: nn.Module | None = None) -> nn.Module:
    """The model that a source names, in eval mode where it has one.

    Args:
        source: a narrowcast checkpoint, a Hugging Face directory (opened as float32, nothing is downloaded, no code
            of it is run), a `.pt2` file of torch.export (open only what you trust: torch unpickles parts of it), an
            `.onnx` file, which ONNX Runtime answers for, or `package.module:factory`, a function without arguments.
        into: the architecture for a checkpoint whose model is no transformers class; it is filled in place.

    Raises:
        ModelError: the source cannot be opened.
        CheckpointError: a checkpoint is damaged or needs `into`.
    """
    opener = {
        "huggingface": _open_huggingface,
        "exported": _open_exported,
        "onnx": _open_onnx,
        "factory": _open_factory,
    }
    found = kind(source)
    if found == "checkpoint":
        return _room("export").load(source, into)  # type: ignore[no-any-return]
    return opener[found](str(source))


def _room(name: str) -> Any:
    """A room of the same floor, imported when it is needed."""
    return importlib.import_module(f"narrowcast.{name}")


def prepare(source: str | Path) -> None:
    """Imports what opening a source needs, so that timing it measures the file and not Python."""
    found = kind(source)
    if found == "checkpoint":
        _room("export")
    if found == "exported":
        importlib.import_module("torch.export")
    if (Path(source) / CONFIG).is_file():
        _huggingface_class(Path(source), _transformers())
    if found == "factory":
        _import_from(str(source))


def _transformers() -> ModuleType:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise ModelError("a Hugging Face directory needs transformers: pip install 'narrowcast[hf]'") from error


def _huggingface_class(directory: Path, transformers: ModuleType) -> Any:
    """The class that the directory's config names, or AutoModel."""
    try:
        names = json.loads((directory / CONFIG).read_text(encoding="utf-8")).get("architectures") or [""]
    except (ValueError, AttributeError) as error:
        raise ModelError(f"{directory / CONFIG} is not a JSON object: {error}") from error
    found = getattr(transformers, str(names[0]), None)
    usable = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    return found if usable else transformers.AutoModel


@contextlib.contextmanager
def _without_progress(transformers: ModuleType) -> Iterator[None]:
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _open_huggingface(source: str) -> nn.Module:
    transformers = _transformers()
    model_class = _huggingface_class(Path(source), transformers)
    try:
        with _without_progress(transformers):
            model: nn.Module = model_class.from_pretrained(source, local_files_only=True)
    except Exception as error:  # a foreign directory can make transformers fail in any way; the message keeps its words
        raise ModelError(f"transformers cannot open {source!r}: {type(error).__name__}: {error!s:.500}") from error
    return model.float().eval()


def _open_onnx(source: str) -> nn.Module:
    require_onnx()
    model: nn.Module = importlib.import_module("narrowcast.models.onnx_session").open_onnx_module(source)
    return model


def _open_exported(source: str) -> nn.Module:
    try:
        model: nn.Module = torch.export.load(source).module()
    except Exception as error:  # as above: a file of foreign making
        raise ModelError(f"torch.export cannot open {source!r}: {type(error).__name__}: {error!s:.500}") from error
    return model


def _import_from(source: str) -> Any:
    """The object that `package.module:name` names; modules in the current directory are found too."""
    module_name, _, attribute = source.partition(":")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ModelError(f"cannot import {source!r}: {error}") from error
    finally:
        sys.path.remove(here)
    return found


def _open_factory(source: str) -> nn.Module:
    found = _import_from(source)
    if not callable(found):
        raise ModelError(f"{source!r} is {type(found).__name__}, not a function that returns a model")
    model = found()
    model = model if isinstance(model, nn.Module) else getattr(model, "model", None)
    if not isinstance(model, nn.Module):
        raise ModelError(f"{source!r} returned no nn.Module")
    return model.eval()


def open_into(source: str | Path, architecture: str | None) -> nn.Module:
    """Like `open_model`; `architecture` names a factory whose model a checkpoint is loaded into, on the meta device."""
    if architecture is None or kind(source) != "checkpoint":
        return open_model(source)
    factory = _import_from(architecture)
    with torch.device("meta"):
        into = factory()
    if not isinstance(into, nn.Module):
        raise CheckpointError(f"{architecture!r} returned no nn.Module to load {str(source)!r} into")
    return open_model(source, into)
