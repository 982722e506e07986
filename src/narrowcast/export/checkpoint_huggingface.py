"""The files beside the weights that make a checkpoint of a transformers model load by itself.

transformers is imported only when such a checkpoint is opened; saving a model never imports it, because a model of
its classes exists only where it is loaded already. Code from a checkpoint or a hub is never run.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from narrowcast.errors import CheckpointError
from narrowcast.export.checkpoint_schema import CONFIG, GENERATION, TOKENIZER_FILES, read_json, refuse_absurd_depth

_LARGEST_CONFIG = 16 << 20  # bytes
# fields that name code to fetch and run, or that make transformers look for another quantizer
_REFUSED_FIELDS = (
    "auto_map",
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_internal",
    "_attn_implementation_autoset",
    "experts_implementation",
    "_experts_implementation",
    "_experts_implementation_internal",
    "custom_pipelines",
    "quantization_config",
    "_name_or_path",
)


def _is_exported(cls: type, transformers: ModuleType) -> bool:
    return cls.__module__.startswith("transformers.") and getattr(transformers, cls.__name__, None) is cls


def describe(model: nn.Module) -> dict[str, Any] | None:
    """The entry "huggingface" of a description.

    Args:
        model: any module.

    Returns:
        The class and the attention of a model of a class that transformers exports, else None.
    """
    transformers = sys.modules.get("transformers")
    bases = {f"{base.__module__.partition('.')[0]}.{base.__name__}" for base in type(model).__mro__}
    if transformers is None or "transformers.PreTrainedModel" not in bases:
        return None
    if not _is_exported(type(model), transformers):
        return None
    attention = getattr(model.config, "_attn_implementation", None)
    return {"class": type(model).__name__, "attention": attention if attention == "sdpa" else "eager"}


def write_files(model: nn.Module, directory: Path) -> list[Path]:
    """Write the config of a transformers model and copy its tokenizer where that is known.

    Args:
        model: a model that `describe` has an entry for.
        directory: where to write.

    Returns:
        The files written.
    """
    config: Any = model.config
    values = json.loads(config.to_json_string(use_diff=False))
    values = {key: value for key, value in values.items() if key not in _REFUSED_FIELDS}
    values["architectures"] = [type(model).__name__]
    # transformers' own from_pretrained invents what it does not find; this makes it say that it cannot read the file
    values["quantization_config"] = {"quant_method": "narrowcast"}
    written = [directory / CONFIG]
    written[0].write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        written.append(directory / GENERATION)
        written[-1].write_text(generation.to_json_string(use_diff=False), encoding="utf-8")
    origin = getattr(config, "_name_or_path", None)
    if not origin:
        return written
    for name in TOKENIZER_FILES:
        if (Path(origin) / name).is_file():
            written.append(directory / name)
            shutil.copyfile(Path(origin) / name, written[-1])
    return written


def build(directory: Path, entry: dict[str, Any]) -> nn.Module:
    """The model of a checkpoint on the meta device, its class taken from what transformers exports.

    Args:
        directory: the checkpoint.
        entry: the validated "huggingface" entry of its description.

    Returns:
        A model without values.

    Raises:
        CheckpointError: transformers is missing, has no such model, or refuses the config.
    """
    try:
        import transformers
    except ImportError as error:
        raise CheckpointError(
            f"{directory}: holds a transformers model and transformers is not installed; install narrowcast[hf]"
        ) from error
    values = _without_code(read_json(directory / CONFIG, _LARGEST_CONFIG))
    refuse_absurd_depth(values, str(directory / CONFIG))
    try:
        cls = _exported_class(transformers, entry["class"], directory)
        config_class: Any = cls.config_class
        config: Any = config_class.from_dict(values)
        config._attn_implementation = entry["attention"]
        config._name_or_path = str(directory)
        with torch.device("meta"):
            model: nn.Module = cls(config)
        _restore_generation(model, directory, transformers)
    except CheckpointError:
        raise
    except Exception as error:  # any field of an untrusted config can make a constructor fail in any way
        raise CheckpointError(
            f"{directory / CONFIG}: {entry['class']} cannot be built from it ({type(error).__name__}: {error!s:.500})"
        ) from error
    return model


def _exported_class(transformers: ModuleType, name: str, directory: Path) -> Any:
    cls = getattr(transformers, name, None)
    if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
        return cls
    raise CheckpointError(
        f"{directory}: transformers {transformers.__version__} has no model class {name!r}; "
        "install a version that has it, or pass the model as into="
    )


def _restore_generation(model: nn.Module, directory: Path, transformers: ModuleType) -> None:
    if (directory / GENERATION).is_file() and getattr(model, "generation_config", None) is not None:
        values = read_json(directory / GENERATION, _LARGEST_CONFIG)
        model.generation_config = transformers.GenerationConfig.from_dict(values)


def _without_code(value: Any) -> Any:
    """The config with every field removed that would make transformers fetch code, at any depth."""
    if isinstance(value, list):
        return [_without_code(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    return {key: _without_code(entry) for key, entry in value.items() if key not in _REFUSED_FIELDS}
