"""Finding the feeds of a model by following the channels through its first batch; needs no pattern and no trace."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from narrowcast.models.channel_flow import ChannelFlow, Producer, map_of, set_map, tensors_in
from narrowcast.models.channel_ops import OTHER, ZERO, constant_over
from narrowcast.models.feeds import Feed, Feeds, Reader
from narrowcast.models.layer_kinds import kind_of
from narrowcast.models.rewrite import as_norm, input_channels, layer_kind, parameters_of, weight_users


@dataclass
class _Read:
    """What a layer read in the pass.

    Args:
        numbers: [in] channel number of each input channel, OTHER where it is none; None before its first call.
        torn: whether its calls differ in what they read.
    """

    numbers: Tensor | None = None
    torn: bool = False


def follow_channels(model: nn.Module, run: Callable[[], Any]) -> Feeds:
    """The feeds of a model. Changes nothing.

    Args:
        model: in evaluation mode.
        run: runs the model once on real data.
    """
    hooked = {path for path, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks}
    sizes, norms = _producers(model)
    flow = ChannelFlow(sizes)
    reads: dict[str, _Read] = {}
    handles: list[Any] = []
    paths: dict[int, str] = {id(module): path for path, module in model.named_modules()}
    for path, module in model.named_modules():
        watch = _Watch(path, flow, reads, hooked, norms)
        handles.append(module.register_forward_pre_hook(watch.before, with_kwargs=True))
        handles.append(module.register_forward_hook(watch.after))
    try:
        with torch.no_grad(), flow:
            for tensor in tensors_in(run()):
                flow.stop(map_of(tensor), "the model returns it")
    finally:
        for handle in handles:
            handle.remove()
    _stop_tied(model, flow, reads, paths)
    _stop_unseen(model, flow, reads)
    return _as_feeds(flow, reads)


def _producers(model: nn.Module) -> tuple[dict[str, int], set[str]]:
    """Output channels of everything whose output can be scaled, and which of these are normalizations."""
    sizes: dict[str, int] = {}
    norms = set()
    for path, module in model.named_modules():
        kind = layer_kind(module)
        if kind is not None:
            sizes[path] = kind.shapes(module)["weight"][0]
        elif as_norm(module) is not None:
            sizes[path] = module.weight.numel()  # type: ignore[union-attr, operator]
            norms.add(path)
    return sizes, norms


class _Watch:
    """Hooks of one module."""

    def __init__(
        self, path: str, flow: ChannelFlow, reads: dict[str, _Read], hooked: set[str], norms: set[str]
    ) -> None:
        self.path, self.flow, self.reads = path, flow, reads
        self.hooked, self.norms = path in hooked, norms

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        flow = self.flow
        with torch._C.DisableTorchFunction():
            if self.hooked:
                self._stop_all((args, kwargs), f"{self.path!r} has hooks, which may look at what it gets or gives")
            if not flow.opaque:
                self._enter(module, args, kwargs)
        flow.places.append(self.path)
        flow.opaque += self._is_known(module)

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        flow = self.flow
        flow.opaque -= self._is_known(module)
        flow.places.pop()
        with torch._C.DisableTorchFunction():
            producer = flow.producers.get(self.path)
            if producer is not None and not flow.opaque and isinstance(output, Tensor):
                dim = -1 if self.path in self.norms else layer_kind(module).channel_dim  # type: ignore[union-attr]
                _mark(output, producer, dim)
            if self.hooked:
                self._stop_all(output, f"{self.path!r} has hooks, which may look at what it gets or gives")

    def _is_known(self, module: nn.Module) -> bool:
        return kind_of(module) is not None or self.path in self.norms

    def _stop_all(self, values: Any, reason: str) -> None:
        for tensor in tensors_in(values):
            self.flow.stop(map_of(tensor), reason)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._is_known(module):
            return
        kind = layer_kind(module)
        x = args[0] if args else next(iter(kwargs.values()), None)
        if kind is None or not isinstance(x, Tensor) or len(args) + len(kwargs) != 1:
            self._stop_all((args, kwargs), f"its output goes into {self.path!r} ({type(module).__name__})")
            return
        read = self.reads.setdefault(self.path, _Read())
        channels = map_of(x)
        width = input_channels(module)
        numbers = torch.full((width,), OTHER, dtype=torch.int64)
        if channels is not None:
            dim = kind.channel_dim % x.dim()
            one = constant_over(channels, tuple(d for d in range(x.dim()) if d != dim))
            if one is None:
                self.flow.stop(channels, f"positions of the input of {self.path!r} hold different channels")
            else:
                numbers = one.reshape(-1).long().expand(width).clone()
                numbers[numbers == ZERO] = OTHER
        if read.numbers is not None and not torch.equal(read.numbers, numbers):
            read.torn = True
            for torn in (read.numbers, numbers):
                self.flow.stop(torn, f"{self.path!r} is called on different inputs")
        read.numbers = numbers


def _mark(output: Tensor, producer: Producer, dim: int) -> None:
    shape = [1] * output.dim()
    shape[dim] = producer.channels
    if output.shape[dim] != producer.channels:
        set_map(output, None)
        return
    numbers = torch.arange(producer.first, producer.first + producer.channels, dtype=torch.int32)
    set_map(output, numbers.view(shape).expand(output.shape))
    producer.ran = True


def _stop_tied(model: nn.Module, flow: ChannelFlow, reads: dict[str, _Read], paths: dict[int, str]) -> None:
    """A weight that another module uses too cannot be rescaled for one of them."""
    users = weight_users(model)
    for path in paths.values():
        module = model.get_submodule(path) if path else model
        if not any(users[id(parameter)] > 1 for parameter in parameters_of(module)):
            continue
        if path in flow.producers:
            producer = flow.producers[path]
            own = torch.arange(producer.first, producer.first + producer.channels)
            flow.stop(own, f"the weight of {path!r} is tied to another module's")
        if path in reads:
            flow.stop(reads[path].numbers, f"its reader {path!r} has a weight that is tied to another module's")


def _stop_unseen(model: nn.Module, flow: ChannelFlow, reads: dict[str, _Read]) -> None:
    """A layer that did not run might read, on other data, any output that is as wide as its input."""
    unseen: dict[int, str] = {}
    for path, module in model.named_modules():
        if layer_kind(module) is not None and path not in reads:
            unseen.setdefault(input_channels(module), path)
    for producer in flow.producers.values():
        if producer.channels in unseen:
            own = torch.arange(producer.first, producer.first + producer.channels)
            flow.stop(own, f"{unseen[producer.channels]!r} did not run on the first batch and could read it too")


def _as_feeds(flow: ChannelFlow, reads: dict[str, _Read]) -> Feeds:
    feeds = Feeds()
    for path, producer in flow.producers.items():
        if not producer.ran:
            continue
        readers = []
        read_by_any = torch.zeros(producer.channels, dtype=torch.bool)
        for reader, read in reads.items():
            if read.numbers is None:
                continue
            columns = read.numbers - producer.first
            mine = (columns >= 0) & (columns < producer.channels) & (read.numbers >= 0)
            if bool(mine.any()):
                readers.append(Reader(reader, torch.where(mine, columns, OTHER)))
                read_by_any[columns[mine]] = True
        why = [flow.reasons[int(index)] for index in producer.why]
        why = [w or ("" if read_by_any[i] else "no layer reads it") for i, w in enumerate(why)]
        free = torch.tensor([not reason for reason in why], dtype=torch.bool)
        feeds.feeds[path] = Feed(path, tuple(readers), free, producer.ceiling, producer.shifts, tuple(why))
    return feeds
