"""Convolutions that read the same image get the same input codes, so that the image can travel as these codes.

An image is followed from where it is made, through pools and concatenations, to the convolutions that read it. The
first of them to be solved chooses its codes, channel by channel; the others take them over.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from narrowcast.models.modules import get_module
from narrowcast.nn import Activation
from narrowcast.nn.flow import Flow
from narrowcast.nn.image_ops import image_op
from narrowcast.nn.regions import modules_of


@dataclass(frozen=True)
class Origin:
    """An image where it is made, with its channels; None where they are not known."""

    name: str
    channels: int | None


@dataclass
class SharedRanges:
    """Which images the convolutions read, and the codes that have been chosen for them.

    Args:
        origins: path of a convolution -> for each of its calls, what its input is made of, in channel order.
        chosen: (name of an image, format of its codes) -> their scale and zero point.
    """

    origins: dict[str, list[list[Origin]]] = field(default_factory=dict)
    chosen: dict[tuple[str, str], tuple[Tensor, Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, flows: Mapping[str, Flow], planned: Iterable[str]) -> SharedRanges:
        """What the flows say about the convolutions at the planned paths."""
        found = cls()
        wanted = frozenset(planned)
        for path, flow in flows.items():
            _follow(found.origins, path, flow, get_module(model, path), wanted)
        return found

    def adapt(self, path: str, treatments: list[tuple[Activation, str]]) -> list[tuple[Activation, str]]:
        """The treatments of a convolution's input that agree with what others have chosen for the same image.

        Args:
            path: of the convolution.
            treatments: (activation, text for the report), best guess first.
        """
        calls = self.origins.get(path)
        static = [entry for entry in treatments if entry[0].scale is not None]
        if not calls or not static:
            return treatments
        number = _format_of(static[0][0])
        decided = [origin.name for origin in calls[0] if (origin.name, number) in self.chosen]
        if not decided:
            return treatments
        adapted = [(self._with_chosen(activation, calls[0]), text) for activation, text in static]
        if len(decided) == len(calls[0]):
            return [(adapted[0][0], f"{static[0][0].spec} as the other readers of the same image")]
        return adapted

    def is_alone(self, path: str) -> bool:
        """Whether no other convolution reads any part of the image that this one reads."""
        mine = {origin.name for call in self.origins.get(path, ()) for origin in call}
        others = (calls for other, calls in self.origins.items() if other != path)
        return not any(origin.name in mine for calls in others for call in calls for origin in call)

    def choose(self, path: str, activation: Activation) -> None:
        """Remember what a convolution's input was given, for the other readers of the image."""
        if activation.scale is None or activation.zero_point is None:
            return
        for call in self.origins.get(path, ()):
            start = 0
            total = sum(origin.channels or 0 for origin in call)
            scale, zero_point = activation.scale.expand(total), activation.zero_point.expand(total)
            for origin in call:
                stop = start + (origin.channels or 0)
                key = origin.name, _format_of(activation)
                self.chosen.setdefault(key, (scale[start:stop], zero_point[start:stop]))
                start = stop

    def _with_chosen(self, activation: Activation, call: list[Origin]) -> Activation:
        assert activation.scale is not None and activation.zero_point is not None
        total = sum(origin.channels or 0 for origin in call)
        scales = list(activation.scale.expand(total).split([origin.channels or 0 for origin in call]))
        zeros = list(activation.zero_point.expand(total).split([origin.channels or 0 for origin in call]))
        for index, origin in enumerate(call):
            key = origin.name, _format_of(activation)
            if key in self.chosen:
                scales[index], zeros[index] = self.chosen[key]
        scale, zero_point = torch.cat(scales), torch.cat(zeros)
        if activation.scale.numel() == 1 and bool((scale == scale[0]).all() and (zero_point == zero_point[0]).all()):
            scale, zero_point = scale[:1], zero_point[:1]
        return Activation(activation.spec, scale.contiguous(), zero_point.contiguous())


def _format_of(activation: Activation) -> str:
    return "" if activation.spec is None else activation.spec.format.name


def _follow(
    origins: dict[str, list[list[Origin]]], path: str, flow: Flow, owner: nn.Module, wanted: frozenset[str]
) -> None:
    made: dict[str, list[Origin]] = {}
    modules = modules_of(flow, owner)
    for node in flow.nodes:
        name = f"{path}:{node.name}"
        module = modules.get(node.name)
        target = f"{path}.{node.target}" if path else node.target
        made[node.name] = [Origin(name, getattr(module, "out_channels", None))]
        if node.kind == "module" and target in wanted:
            source = next(node.refs(), None)
            known = None if source is None else _with_channels(made[source], int(getattr(module, "in_channels", 0)))
            if known is not None:
                origins.setdefault(target, []).append(known)
                made[str(source)] = known
            continue
        op = image_op(node, module)
        if op is not None and op.kind in ("identity", "max_pool", "pad", "cat"):
            made[node.name] = [origin for source in op.sources for origin in made[source]]
        elif op is not None and op.kind in ("clamp", "hardswish", "add", "average_pool"):
            channels = [origin.channels for origin in made[op.sources[0]]]
            made[node.name] = [Origin(name, None if None in channels else sum(channels))]  # type: ignore[arg-type]


def _with_channels(call: list[Origin], channels: int) -> list[Origin] | None:
    """The same with all channels known: at most one can be missing."""
    known = sum(origin.channels or 0 for origin in call)
    missing = [origin for origin in call if origin.channels is None]
    if len(missing) > 1 or known > channels or (not missing and known != channels):
        return None
    return [Origin(o.name, channels - known if o.channels is None else o.channels) for o in call]
