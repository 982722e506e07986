"""What a user or a model's folder says about a page: how inputs are prepared, what the outputs are called."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from narrowcast.errors import DataError

SHOWN = ("classes", "likeness", "values", "continuation")
TOKENIZER, CHARACTERS = "tokenizer.json", "vocab.json"


@dataclass(frozen=True)
class PageOptions:
    """What no model file says.

    Args:
        title: heading of the page; "" takes the name of the model's file, or of the folder.
        mean: per channel, subtracted from pixels in 0..1; empty subtracts nothing.
        std: per channel, what they are divided by then; empty divides by nothing.
        side: side of the square picture that a model with open sides is shown; None takes what the model says.
        labels: name of every class; empty for numbers.
        tokenizer: file or folder of the vocabulary of texts; None for none.
        show: "classes", "likeness", "values" or "continuation" (the model writes on); None decides by the output.
        stop: numbers of the tokens that end a text; empty takes those that vocabularies usually have.
        positions: tokens that the model takes at most; None finds out.
        scores: tokens that the output has scores for, where they are more than the vocabulary's; None for the same.
        runs: measured runs per model; the median is shown.
        warmup: runs before these.
    """

    title: str = ""
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    side: int | None = None
    labels: tuple[str, ...] = ()
    tokenizer: Path | None = None
    show: str | None = None
    stop: tuple[int, ...] = ()
    positions: int | None = None
    scores: int | None = None
    runs: int = 30
    warmup: int = 5

    def __post_init__(self) -> None:
        if self.show is not None and self.show not in SHOWN:
            raise DataError(f"show={self.show!r}: a page shows {', '.join(SHOWN)}")
        if any(deviation <= 0 for deviation in self.std):
            raise DataError(f"std={self.std}: standard deviations are greater than 0")


def with_folder(options: PageOptions, folder: Path) -> PageOptions:
    """The options, and what the files of a Hugging Face folder say where these say nothing."""
    prepared = _json(folder / "preprocessor_config.json")
    config = _json(folder / "config.json")
    found = replace(
        options,
        mean=options.mean or tuple(map(float, prepared.get("image_mean") or ())),
        std=options.std or tuple(map(float, prepared.get("image_std") or ())),
        labels=options.labels or _named(config.get("id2label") or {}),
        stop=options.stop
        or _whole(_json(folder / "generation_config.json").get("eos_token_id"))
        or _whole(config.get("eos_token_id")),
        positions=options.positions or next(iter(_whole(config.get("max_position_embeddings"))), None),
        scores=options.scores or next(iter(_whole(config.get("vocab_size"))), None),
    )
    has_vocabulary = any((folder / name).is_file() for name in (TOKENIZER, CHARACTERS))
    return replace(found, tokenizer=folder) if found.tokenizer is None and has_vocabulary else found


def _whole(value: Any) -> tuple[int, ...]:
    """One whole number or several, as these files have them."""
    listed = value if isinstance(value, list) else [value]
    return tuple(one for one in listed if isinstance(one, int) and not isinstance(one, bool))


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    found = read_json(path)
    if not isinstance(found, dict):
        raise DataError(f"{path} is not a JSON object")
    return found


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        DataError: it is missing or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON: {error}") from None


def _named(names: dict[str, Any]) -> tuple[str, ...]:
    """Names by number, in order; none where transformers made them up."""
    ordered = tuple(str(names[key]) for key in sorted(names, key=int))
    return () if all(name == f"LABEL_{i}" for i, name in enumerate(ordered)) else ordered


def read_labels(path: Path) -> tuple[str, ...]:
    """Names of classes: one per line, or a JSON list, or a JSON object from number to name.

    Raises:
        DataError: it cannot be read, or holds nothing.
    """
    if path.suffix.lower() == ".json":
        found = read_json(path)
        try:
            names = _named(found) if isinstance(found, dict) else tuple(map(_first_name, found))
        except (TypeError, ValueError):
            raise DataError(f"{path}: labels are a JSON list of names, or an object from number to name") from None
    else:
        try:
            names = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
        except (OSError, ValueError) as error:
            raise DataError(f"labels {path} cannot be read: {error}") from None
    if not names:
        raise DataError(f"labels {path} holds no name")
    return names


def _first_name(entry: Any) -> str:
    """The name of a class that may be listed with an identifier before it."""
    if isinstance(entry, list) and entry:
        return str(entry[-1])
    if not isinstance(entry, str | int | float):
        raise TypeError(entry)
    return str(entry)
