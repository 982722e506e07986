"""Opening the MODEL of a command line: what it may be, and what is refused before it is touched."""

from __future__ import annotations

import copy
import importlib
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from narrowcast.errors import CheckpointError, ModelError

if TYPE_CHECKING:
    from torch import nn

MODEL_HELP = (
    "Hugging Face directory, narrowcast checkpoint, .onnx file, .pt2 file (torch.export), or package.module:factory "
    "of a function that returns the model."
)
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
_OBJECT = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


@dataclass(frozen=True)
class Source:
    """An opened model.

    Args:
        text: as typed.
        kind: "checkpoint", "huggingface", "exported", "onnx" or "factory".
        model: in eval mode.
        architecture: the factory that a fresh process loads a checkpoint into, or None.
    """

    text: str
    kind: str
    model: nn.Module
    architecture: str | None = None


def check_source(text: str) -> str:
    """The kind of what `text` names, refused here if opening it could run foreign code or is not possible.

    Raises:
        ModelError: it does not exist, is a pickle, a bare file of weights, or nothing that is known.
    """
    from narrowcast.cli.exported import check_exported
    from narrowcast.cli.headers import directory_files, refuse_pickle
    from narrowcast.evaluate.sources import kind

    path = Path(text)
    if path.is_file():
        refuse_pickle(path)
        if path.suffix.lower() == ".safetensors":
            raise ModelError(
                f"{text} holds weights without a model; give the directory with its config.json, or "
                "package.module:factory of a function that builds the model and loads the file"
            )
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    found = kind(text)
    if found == "huggingface":
        directory_files(path)
    if found == "exported":
        check_exported(path)
    return found


def open_model(text: str, *, beside: Source | None = None) -> Source:
    """The model that `text` names.

    Args:
        text: as typed.
        beside: an opened model whose architecture a checkpoint without one is loaded into.

    Raises:
        ModelError, CheckpointError: it cannot be opened; the message says why.
    """
    from narrowcast.evaluate.sources import open_model as open_source

    found = check_source(text)
    try:
        return Source(text, found, open_source(text))
    except CheckpointError as error:
        if found != "checkpoint" or "into=" not in str(error):
            raise
        if beside is None:
            raise CheckpointError(f"{text} holds no architecture; name the float model before it: {error}") from None
    architecture = beside.text if beside.kind == "factory" else None
    return Source(text, found, open_source(text, copy.deepcopy(beside.model)), architecture)


def open_for_plan(text: str) -> nn.Module:
    """The model that `text` names, without its weights where they are not needed to know its layers."""
    if check_source(text) == "huggingface":
        return empty_from_config(Path(text))
    return open_model(text).model


def empty_from_config(directory: Path) -> nn.Module:
    """The architecture of a Hugging Face directory on the meta device: no memory, no weights.

    Raises:
        ModelError: transformers is missing or does not know the configuration.
    """
    import torch

    try:
        import transformers
    except ImportError:
        raise ModelError("a Hugging Face directory needs transformers: pip install 'narrowcast[hf]'") from None
    try:
        config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        named = getattr(transformers, str((config.architectures or [""])[0]), None)
        known = isinstance(named, type) and issubclass(named, transformers.PreTrainedModel)
        with torch.device("meta"):
            model: nn.Module = (
                named(config) if known and named is not None else transformers.AutoModel.from_config(config)
            )
    except Exception as error:  # a foreign configuration can make transformers fail in any way
        raise ModelError(
            f"transformers cannot build {str(directory)!r}: {type(error).__name__}: {error!s:.500}"
        ) from None
    return model.float().eval()


def is_object(text: str) -> bool:
    """Whether `text` is `package.module:name` and not a path."""
    return bool(_OBJECT.fullmatch(text)) and not Path(text).exists()


def import_object(text: str) -> Any:
    """What `package.module:name` names; modules in the current directory are found too.

    Raises:
        ModelError: it cannot be imported.
    """
    module_name, _, attribute = text.partition(":")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ModelError(f"cannot import {text!r}: {error}") from None
    finally:
        sys.path.remove(here)
    return found
