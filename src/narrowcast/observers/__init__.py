"""What calibration remembers of activations: one observer per file, and the table by which recipes name them."""

from __future__ import annotations

import inspect
import re

from narrowcast.errors import RecipeError
from narrowcast.observers.base import Observer
from narrowcast.observers.best import Best, Candidate
from narrowcast.observers.channel_magnitude import ChannelMagnitude
from narrowcast.observers.channel_range import ChannelRange
from narrowcast.observers.drift import Drift
from narrowcast.observers.entropy import Entropy
from narrowcast.observers.grouped_hessian import GroupedHessian
from narrowcast.observers.hessian import Hessian
from narrowcast.observers.minmax import MinMax
from narrowcast.observers.moving_average import MovingAverage
from narrowcast.observers.mse import Mse
from narrowcast.observers.percentile import Percentile

OBSERVERS: dict[str, type[Observer]] = {
    "minmax": MinMax,
    "moving_average": MovingAverage,
    "percentile": Percentile,
    "entropy": Entropy,
    "mse": Mse,
}

BEST = "best"


def make_observer(text: str, *, bits: int = 8, symmetric: bool = False) -> Observer:
    """The observer written as `text`: a name, or a name and its number.

    Args:
        text: "minmax", "moving_average(0.9)", "percentile(99.99)", "entropy" or "mse"; or several of them, as in
            "best(minmax,percentile(99.9))", and "best" for all.
        bits: of the activation codes; entropy, mse and best depend on it.
        symmetric: whether the activation codes are symmetric; entropy, mse and best depend on it.

    Raises:
        RecipeError: the text does not name an observer, or its number is not one it takes.
    """
    several = re.fullmatch(rf"\s*{BEST}\s*(?:\((.*)\))?\s*", text) if isinstance(text, str) else None
    if several is not None:
        return _best(several[1] or "", bits=bits, symmetric=symmetric)
    parts = re.fullmatch(r"\s*(\w+)\s*(?:\(\s*([^()]*?)\s*\))?\s*", text) if isinstance(text, str) else None
    known = ", ".join([*OBSERVERS, BEST])
    if parts is None or parts[1] not in OBSERVERS:
        raise RecipeError(f"observer {text!r} is not known; use one of {known}, like 'percentile(99.99)'")
    kind = OBSERVERS[parts[1]]
    takes = inspect.signature(kind).parameters
    if "bits" in takes:
        if parts[2]:
            raise RecipeError(f"observer {text!r}: {parts[1]} takes no number; write {parts[1]!r}")
        return kind(bits=bits, symmetric=symmetric)  # type: ignore[call-arg]
    if not parts[2]:
        return kind()
    if not takes:
        raise RecipeError(f"observer {text!r}: {parts[1]} takes no number; write {parts[1]!r}")
    try:
        number = float(parts[2])
    except ValueError:
        raise RecipeError(f"observer {text!r}: {parts[2]!r} is not a number; write it like '{parts[1]}(0.9)'") from None
    return kind(number)  # type: ignore[call-arg]


def _best(text: str, *, bits: int, symmetric: bool) -> Best:
    """The observers of a list with commas; all of the table where it is empty."""
    members: dict[str, Observer] = {}
    for name in [part.strip() for part in text.split(",")] if text.strip() else OBSERVERS:
        if name in members or name.startswith(BEST):
            raise RecipeError(f"observer 'best({text})': {name!r} is in it twice, or is a choice itself; name it once")
        members[name] = make_observer(name, bits=bits, symmetric=symmetric)
    return Best(members, bits=bits, symmetric=symmetric)


__all__ = [
    "BEST",
    "OBSERVERS",
    "Best",
    "Candidate",
    "ChannelMagnitude",
    "ChannelRange",
    "Drift",
    "Entropy",
    "GroupedHessian",
    "Hessian",
    "MinMax",
    "MovingAverage",
    "Mse",
    "Observer",
    "Percentile",
    "make_observer",
]
