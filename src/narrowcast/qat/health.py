"""How training fares inside: codes that flip and oscillate, inputs that are clipped, codes that nothing uses.

Source:
    Oscillations: Nagel et al. 2022, arXiv:2203.11086, section 4.1, eq. 8: a code oscillates when it flips back in the
    direction that it came from; the frequency is a moving average. Differs: counted from one look to the next, not at
    every step, so that training pays nothing for it.
"""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from narrowcast.nn.trained import TrainedModule
from narrowcast.nn.trained_ranges import WeightRange
from narrowcast.qat.state import twins_of, unwrapped

_MOMENTUM = 0.1
# A code that flips back in more than this share of looks oscillates (the paper freezes weights beyond such a bound).
_OSCILLATES = 0.05
_KEPT = "_narrowcast_last_look"
# What `warnings` speaks up about. Healthy networks of 2 to 8 bits are well below.
_MANY, _CLIPPED, _DEAD = 0.05, 0.1, 0.75
_LISTED = 5


@dataclass(frozen=True)
class LayerHealth:
    """One weight of a model in training.

    Args:
        layer: path of its module, and the weight's name where there are several.
        passes: forward passes in training mode.
        flipped: share of weights whose code is another than at the last look; None at the first.
        oscillating: share of weights that flip to and fro; None before the third look.
        unused_codes: share of the format's codes that no weight has.
        clipped: share of the static input's values outside of its range, in a sample since the last look; None where
            the input is not static or nothing was seen.
        dead_codes: share of the static input's codes that did not occur in that sample; None likewise.
        blocks_at_bound: scales that have moved as far from their start as they may.
    """

    layer: str
    passes: int
    flipped: float | None
    oscillating: float | None
    unused_codes: float
    clipped: float | None
    dead_codes: float | None
    blocks_at_bound: int


@dataclass(frozen=True)
class Health:
    """All weights of a model in training, in its order."""

    layers: list[LayerHealth]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"layers": [asdict(row) for row in self.layers]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Health:
        """What `to_dict` described."""
        return cls([LayerHealth(**row) for row in values["layers"]])

    def warnings(self) -> list[str]:
        """One sentence for each thing that is wrong, with the layers that it is wrong with."""
        found = [
            ("never ran in training", [row.layer for row in self.layers if row.passes == 0], "are they used at all?"),
            (
                f"have more than {_MANY:.0%} weights that flip to and fro between two codes",
                [f"{row.layer} ({row.oscillating:.0%})" for row in self.layers if (row.oscillating or 0) > _MANY],
                "a lower learning rate, or ranges frozen earlier, settles them",
            ),
            (
                f"clip more than {_CLIPPED:.0%} of their input",
                [f"{row.layer} ({row.clipped:.0%})" for row in self.layers if (row.clipped or 0) > _CLIPPED],
                "their calibrated range is too narrow, or has shrunk in training",
            ),
            (
                f"use less than {1 - _DEAD:.0%} of their input's codes",
                [f"{row.layer} ({1 - dead:.0%})" for row in self.layers if (dead := row.dead_codes or 0.0) > _DEAD],
                "most of their range is dead: calibrate it by mse or percentile",
            ),
            (
                "have scales that have moved as far as they may",
                [f"{row.layer} ({row.blocks_at_bound})" for row in self.layers if row.blocks_at_bound],
                "a lower learning rate keeps them near where they started",
            ),
        ]
        return [f"{_listed(layers)} {what}: {remedy}" for what, layers, remedy in found if layers]

    def __str__(self) -> str:
        table = Table(title="training")
        table.add_column("layer", overflow="fold")
        for name in ("passes", "flipped", "oscillating", "unused codes", "input clipped", "dead codes", "at bound"):
            table.add_column(name, justify="right")
        for row in self.layers:
            shares = (row.flipped, row.oscillating, row.unused_codes, row.clipped, row.dead_codes)
            cells = (row.layer, str(row.passes), *(_percent(share) for share in shares), str(row.blocks_at_bound))
            table.add_row(*map(Text, cells))
        buffer = io.StringIO()
        Console(file=buffer, width=120, force_terminal=False).print(table)
        return buffer.getvalue().rstrip()


def report(model: nn.Module) -> Health:
    """Look at a model in training: what has moved since the last look, and what its ranges miss.

    Args:
        model: a prepared one; what was seen is remembered in it for the next look, outside of its state_dict.

    Raises:
        ModelError: the model was not prepared, or a weight or range is not finite.
    """
    return Health([_look(path, twin, name) for path, twin in twins_of(unwrapped(model)) for name in twin.ranges])


def _look(path: str, twin: TrainedModule, name: str) -> LayerHealth:
    codes = twin.records()[name].codes
    codes = codes.view(torch.int8) if codes.dtype.itemsize == 1 else codes
    flipped, oscillating = _compared(twin, name, codes)
    number = twin.weight_range(name).spec
    unused = 0.0
    if number.format.scaled:
        every = number.code_high - number.code_low + 1 if number.format.kind == "int" else 2**number.format.bits
        unused = max(0.0, 1 - torch.unique(codes).numel() / every)
    watch, clipped, dead = twin.watch, None, None
    if watch.counts is not None and watch.seen:
        clipped, dead = watch.clipped / watch.seen, float((watch.counts == 0).float().mean())
    if name == list(twin.ranges)[-1]:
        watch.reset_()
    part = twin.weight_range(name)
    bound = part.at_bound() if isinstance(part, WeightRange) else 0
    layer = path if len(twin.ranges) == 1 else f"{path}.{name}"
    return LayerHealth(layer, int(twin.steps), flipped, oscillating, unused, clipped, dead, bound)


def _compared(twin: TrainedModule, name: str, codes: Tensor) -> tuple[float | None, float | None]:
    kept: dict[str, list[Tensor]] = twin.__dict__.setdefault(_KEPT, {})
    if name not in kept:
        kept[name] = [codes.clone()]
        return None, None
    last, *rest = kept[name]
    change = torch.sign(codes.float() - last.float()).to(torch.int8)
    flipped = float((change != 0).float().mean())
    if not rest:
        kept[name] = [codes.clone(), change, torch.zeros(change.shape, dtype=torch.float16)]
        return flipped, None
    direction, frequency = rest
    back = (change != 0) & (change == -direction)
    frequency = torch.lerp(frequency.float(), back.float(), _MOMENTUM).to(torch.float16)
    kept[name] = [codes.clone(), torch.where(change != 0, change, direction), frequency]
    return flipped, float((frequency > _OSCILLATES).float().mean())


def health_state(model: nn.Module) -> dict[str, Tensor]:
    """What `report` remembers in a model, as tensors by name; a state_dict does not have it."""
    found: dict[str, Tensor] = {}
    for path, twin in twins_of(unwrapped(model)):
        for name, kept in twin.__dict__.get(_KEPT, {}).items():
            found |= {f"{path}|{name}|{index}": tensor for index, tensor in enumerate(kept)}
        watch = twin.watch
        found[f"{path}|watch"] = torch.tensor([watch.passes, watch.clipped, watch.seen])
        if watch.counts is not None:
            found[f"{path}|counts"] = watch.counts
    return found


def load_health_state_(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Let a model remember what `health_state` gave. Changes it."""
    for path, twin in twins_of(unwrapped(model)):
        device = next(twin.parameters()).device
        kept: dict[str, list[Tensor]] = {}
        for name in twin.ranges:
            every = [state[key].to(device) for i in range(3) if (key := f"{path}|{name}|{i}") in state]
            if every:
                kept[name] = every
        twin.__dict__[_KEPT] = kept
        twin.watch.passes, twin.watch.clipped, twin.watch.seen = state[f"{path}|watch"].tolist()
        twin.watch.counts = state.get(f"{path}|counts")


def _listed(layers: list[str]) -> str:
    more = f" and {len(layers) - _LISTED} more" if len(layers) > _LISTED else ""
    return f"{len(layers)} layers, {', '.join(layers[:_LISTED])}{more}," if len(layers) > 1 else f"layer {layers[0]}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.2%}"
