"""Following channels through one forward pass: where every output channel of every layer goes, and what stops it.

The maps of `channel_ops` are kept on the tensors themselves. Every channel of every producer has a number; a map holds
these numbers, so inputs that are cut, repeated (grouped-query heads) or joined (a concatenation) are read off the map
at the layer that gets them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from narrowcast.models.channel_ops import (
    BENDS,
    KEEPS,
    MATRIX_PRODUCTS,
    MOVES,
    OTHER,
    POOLS,
    PRODUCTS,
    QUERIES,
    QUOTIENTS,
    REDUCES,
    ceiling_of,
    compact,
    constant_over,
    moved,
    reduced_dims,
)

_MAP = "_narrowcast_channel_map"
_FEW = 64  # a cat of small tensors and the like: more leaves than this are not looked through for maps


@dataclass
class Producer:
    """The channels of one layer or normalization during the pass.

    Args:
        path: of the module.
        first: number of its channel 0.
        ran: whether it ran.
        why: [channels] index of the reason why a channel may not be scaled; 0 while it may.
        ceiling: [channels] upper bound of a clip on the way.
        shifts: [channels] whether a constant goes through.
    """

    path: str
    first: int
    channels: int
    ran: bool = False
    why: Tensor = field(default_factory=lambda: torch.empty(0))
    ceiling: Tensor = field(default_factory=lambda: torch.empty(0))
    shifts: Tensor = field(default_factory=lambda: torch.empty(0))

    def __post_init__(self) -> None:
        self.why = torch.zeros(self.channels, dtype=torch.int64)
        self.ceiling = torch.full((self.channels,), math.inf)
        self.shifts = torch.ones(self.channels, dtype=torch.bool)


def map_of(value: Any) -> Tensor | None:
    """The channel map that a tensor carries."""
    return getattr(value, _MAP, None) if isinstance(value, Tensor) else None


def set_map(value: Tensor, channels: Tensor | None) -> None:
    """Give a tensor a map, or take it away."""
    if channels is not None:
        setattr(value, _MAP, channels)
    elif hasattr(value, _MAP):
        delattr(value, _MAP)


def tensors_in(value: Any, depth: int = 3) -> Iterator[Tensor]:
    """The tensors in nested lists, tuples and dictionaries; other containers (a cache of keys) are not opened."""
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, list | tuple):
        for part in value[:_FEW]:
            yield from tensors_in(part, depth - 1)
    elif depth and isinstance(value, dict):
        for key, part in value.items():
            if key != "past_key_values":
                yield from tensors_in(part, depth - 1)


class ChannelFlow(TorchFunctionMode):
    """Keeps the maps up to date while a model runs.

    Args:
        sizes: output channels of every producer by path.
    """

    def __init__(self, sizes: dict[str, int]) -> None:
        super().__init__()
        self.producers: dict[str, Producer] = {}
        self.reasons = [""]
        first = 0
        for path, channels in sizes.items():
            self.producers[path] = Producer(path, first, channels)
            first += channels
        self.total = first
        self.opaque = 0  # inside how many layers: what they do is known and not looked at
        self.places: list[str] = []

    def owners(self, numbers: Tensor) -> list[tuple[Producer, Tensor]]:
        """The producers of some channel numbers, each with the channels of its own."""
        numbers = torch.unique(numbers[numbers >= 0]).long()
        found = []
        for producer in self.producers.values():
            mine = (numbers >= producer.first) & (numbers < producer.first + producer.channels)
            if bool(mine.any()):
                found.append((producer, numbers[mine] - producer.first))
        return found

    def stop(self, channels: Tensor | None, reason: str) -> None:
        """The channels in a map may not be scaled; the first reason of a channel stays."""
        if channels is None:
            return
        if reason not in self.reasons:
            self.reasons.append(reason)
        index = self.reasons.index(reason)
        for producer, own in self.owners(compact(channels)):
            fresh = own[producer.why[own] == 0]
            producer.why[fresh] = index

    def no_shift(self, channels: Tensor) -> None:
        """No constant goes through for the channels in a map."""
        for producer, own in self.owners(compact(channels)):
            producer.shifts[own] = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        name = _attribute(func) if name == "__get__" else name
        if self.opaque or name in QUERIES:
            return func(*args, **kwargs)
        used = [t for t in tensors_in((args, kwargs)) if map_of(t) is not None]
        if not used:
            return func(*args, **kwargs)
        maps = [map_of(t) for t in used]
        output = func(*args, **kwargs)
        results = list(tensors_in(output))
        found = self._effect(func, name, args, kwargs, output)
        fits = found is not None and len(found) == len(results)
        fits = fits and all(m is None or m.shape == r.shape for m, r in zip(found or [], results, strict=False))
        if not fits:
            for channels in maps:
                self.stop(channels, f"its output goes through {name}{self._where()}")
            found = [None] * len(results)
        for result, channels in zip(results, found or [], strict=True):
            set_map(result, channels)
        if name == "__setitem__":
            set_map(args[0], None)
        return output

    def _where(self) -> str:
        return f" in {self.places[-1]!r}" if self.places and self.places[-1] else ""

    def _effect(self, func: Any, name: str, args: Any, kwargs: Any, output: Any) -> list[Tensor | None] | None:
        """The maps of the results; None where the channels stop here."""
        x = map_of(args[0]) if args else None
        if name in MOVES or name == "pad":
            return self._move(func, name, args, kwargs)
        if x is None and name not in PRODUCTS | MATRIX_PRODUCTS | {"scaled_dot_product_attention"}:
            return None
        if name in KEEPS and x is not None:
            return [x]
        if (ceiling := ceiling_of(name, args, kwargs)) is not None:
            self._clip(x, ceiling)
            return [x]
        if name in BENDS:
            if name.strip("_") != "relu":
                self.no_shift(x)  # type: ignore[arg-type]
            return [x]
        handlers: dict[frozenset[str], Callable[..., list[Tensor | None] | None]] = {
            PRODUCTS: self._product, QUOTIENTS: self._quotient, MATRIX_PRODUCTS: self._matrix_product,
            POOLS: self._pool, REDUCES: self._reduce, frozenset({"scaled_dot_product_attention"}): self._attention,
        }  # fmt: skip
        handler = next((h for names, h in handlers.items() if name in names), None)
        made = None if handler is None else handler(args, kwargs, output)
        if made is not None:
            for value in tensors_in((args, kwargs)):
                if (channels := map_of(value)) is not None:
                    self.no_shift(channels)
        return made

    def _move(self, func: Any, name: str, args: Any, kwargs: Any) -> list[Tensor | None] | None:
        def swap(value: Any) -> Any:
            if isinstance(value, Tensor):
                known = map_of(value)
                if known is not None:
                    return known
                floating = value.is_floating_point()  # an index stays an index
                return torch.full_like(value, OTHER, dtype=torch.int32) if floating else value
            if isinstance(value, list | tuple) and any(isinstance(part, Tensor) for part in value):
                return type(value)(swap(part) for part in value)
            return value

        if name == "pad":
            mode = kwargs.get("mode", args[2] if len(args) > 2 else "constant")
            value = kwargs.get("value", args[3] if len(args) > 3 else None)
            if mode != "constant" or value not in (None, 0):
                return None
            self.no_shift(map_of(args[0]))  # type: ignore[arg-type]
            pads = kwargs.get("pad", args[1] if len(args) > 1 else None)
            return [torch.nn.functional.pad(map_of(args[0]), pads, value=-2)]  # type: ignore[arg-type]
        with torch._C.DisableTorchFunction():
            made = moved(func, name, tuple(swap(a) for a in args), {k: swap(v) for k, v in kwargs.items()})
        return None if made is None else list(tensors_in(made))

    def _clip(self, x: Tensor | None, ceiling: float) -> None:
        assert x is not None
        if math.isinf(ceiling):
            return
        for producer, own in self.owners(compact(x)):
            producer.ceiling[own] = producer.ceiling[own].clamp(max=ceiling)

    def _product(self, args: Any, kwargs: Any, output: Any) -> list[Tensor | None] | None:
        """Linear in one factor while the other has no channels of its own; of two, the later producer's stays."""
        factors = [map_of(arg) for arg in args[:2]]
        if len(factors) < 2 or not isinstance(output, Tensor):
            return None
        known = [channels for channels in factors if channels is not None]
        if len(known) == 2:
            newest = [int(compact(channels).max()) for channels in known]
            if newest[0] == newest[1]:
                return None
            kept = known[newest.index(max(newest))]
            name = self.owners(compact(kept))[0][0].path
            self.stop(known[newest.index(min(newest))], f"it is multiplied by the output of {name!r}, which is scaled")
            known = [kept]
        try:
            return [known[0].expand(output.shape)]
        except RuntimeError:  # the channels' tensor is the smaller one in a way that expand does not know
            return None

    def _quotient(self, args: Any, kwargs: Any, output: Any) -> list[Tensor | None] | None:
        if len(args) < 2 or map_of(args[1]) is not None or map_of(args[0]) is None:
            return None
        return [map_of(args[0]).expand(output.shape)]  # type: ignore[union-attr]

    def _matrix_product(self, args: Any, kwargs: Any, output: Any) -> list[Tensor | None] | None:
        """A mixture of rows: attention weights times values."""
        if len(args) < 2 or map_of(args[0]) is not None:
            return None
        values = map_of(args[1])
        if values is None or values.dim() < 2 or (one := constant_over(values, (-2,))) is None:
            return None
        return [one.expand(output.shape)]

    def _attention(self, args: Any, kwargs: Any, output: Any) -> list[Tensor | None] | None:
        named = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        for role in ("query", "key", "attn_mask"):
            self.stop(map_of(named.get(role)), f"its output makes attention scores{self._where()}")
        values = map_of(named.get("value"))
        if values is None:
            return [None]
        if (one := constant_over(values, (-2,))) is None:
            return None
        if one.dim() > 2 and one.shape[-3] not in (1, output.shape[-3]):
            one = one.repeat_interleave(output.shape[-3] // one.shape[-3], dim=-3)
        return [one.expand(output.shape)]

    def _pool(self, args: Any, kwargs: Any, output: Any) -> list[Tensor | None] | None:
        x = map_of(args[0])
        if x is None or not isinstance(output, Tensor) or (one := constant_over(x, (-2, -1))) is None:
            return None
        return [one.expand(output.shape)]

    def _reduce(self, args: Any, kwargs: Any, output: Any) -> list[Tensor | None] | None:
        x = map_of(args[0])
        assert x is not None
        dims, keep = reduced_dims(args, kwargs, x.dim())
        if not isinstance(output, Tensor) or (one := constant_over(x, dims)) is None:
            return None
        if not keep:
            for dim in sorted(dims, reverse=True):
                one = one.squeeze(dim)
        return [one.expand(output.shape)]


def _attribute(func: Any) -> str:
    """The name of the attribute that a tensor was asked for."""
    return getattr(getattr(func, "__self__", None), "__name__", "__get__")
