"""Why two layers differ, as far as what they store shows it: codes, scales and biases set side by side."""

from __future__ import annotations

import torch
from torch import Tensor

_NAMED = 3
SAME = "both store the same numbers"


def stored_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> str:
    """What two layers of one format store differently, in words; `SAME` where nothing does.

    Args:
        ours: of the reference, tensors by name.
        theirs: of the artefact.
    """
    if ours.keys() != theirs.keys():
        return f"stored differently: {', '.join(sorted(ours.keys() ^ theirs.keys()))} on one side only"
    found = [text for name in ours if (text := _tensor_difference(name, ours[name], theirs[name]))]
    if not found:
        return SAME
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return f"stored differently: {', '.join(found[:_NAMED])}{more}"


def _tensor_difference(name: str, ours: Tensor, theirs: Tensor) -> str:
    if ours.shape != theirs.shape:
        return f"{name} of shape {list(theirs.shape)}, not {list(ours.shape)}"
    if torch.equal(ours, theirs):
        return ""
    count = int((ours.double() != theirs.double()).sum())
    return f"{count} of {ours.numel()} in {name}"
