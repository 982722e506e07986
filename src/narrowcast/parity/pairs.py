"""Which layers of two models are the same layer: matched by name, with what has become part of them on either side."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from narrowcast.errors import ModelError
from narrowcast.parity.runtime import Runtime, Unit


@dataclass(frozen=True)
class Pair:
    """One layer of both models."""

    reference: Unit
    artefact: Unit

    @property
    def name(self) -> str:
        """As both sides call it."""
        return self.reference.name

    @property
    def is_group(self) -> bool:
        """Whether it is several layers on one side at least."""
        return bool({self.reference.arithmetic.kind, self.artefact.arithmetic.kind} & {"parts", "network"})


def find_pairs(reference: Runtime, artefact: Runtime) -> tuple[dict[str, Pair], list[str]]:
    """The layers that both models have, by name, in the reference's order.

    A layer of one side that is a group of layers on the other (an attention that was taken apart) is compared as one.

    Returns:
        The pairs, and notes on layers that only one model has.

    Raises:
        ModelError: there is no common layer.
    """
    ours, theirs = reference.units(), artefact.units()
    ends = {unit.name: unit.end for unit in (*theirs.values(), *ours.values()) if unit.end}
    known = reference.names() & artefact.names()
    ends = {name: end for name, end in ends.items() if end in known}
    swallowed = set(ends.values())
    names = [name for name in dict.fromkeys([*ours, *theirs]) if name in known and name not in swallowed]
    whole = [name for name in names if not _inside_whole(name, ours, theirs)]
    pairs = {name: Pair(_unit(reference, ours, name, ends), _unit(artefact, theirs, name, ends)) for name in whole}
    if not pairs:
        raise ModelError(_strangers(reference, artefact, list(ours), list(theirs)))
    covered = set(pairs) | swallowed
    notes = []
    for side, units in (("reference", ours), ("artefact", theirs)):
        alone = [name for name in units if name not in covered and not _inside_whole(name, ours, theirs)]
        if alone:
            shown = ", ".join(alone[:5]) + (f" and {len(alone) - 5} more" if len(alone) > 5 else "")
            notes.append(f"only the {side} has {shown}: not compared by themselves")
    return pairs, notes


def _unit(side: Runtime, units: dict[str, Unit], name: str, ends: dict[str, str]) -> Unit:
    found = units.get(name)
    end = ends.get(name, "")
    return found if found is not None and found.end == end else side.unit(name, end)


def _above(name: str) -> Iterator[str]:
    while name:
        name = name.rpartition(".")[0]
        yield name


def _inside_whole(name: str, *sides: dict[str, Unit]) -> bool:
    """Whether one side computes this layer inside of a larger one that is a layer there."""
    above = [units[path] for path in _above(name) for units in sides if path in units]
    return any(unit.arithmetic.kind not in ("network", "parts") for unit in above)


def _strangers(reference: Runtime, artefact: Runtime, ours: list[str], theirs: list[str]) -> str:
    def shown(names: list[str]) -> str:
        return f"{', '.join(repr(name) for name in names[:3]) or 'none'} (of {len(names)})"

    return (
        f"{artefact.name} and {reference.name} have no layer of the same name: the reference has {shown(ours)}, the "
        f"artefact {shown(theirs)}. Layers are matched by their path in the model, so both must be made of the same "
        "architecture; to compare the outputs of two different models use nc.compare"
    )
