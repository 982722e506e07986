"""Looking at values inside a graph while it runs, a bounded number of bytes at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from narrowcast.errors import DataError
from narrowcast.models.onnx_session import open_session, run_session

# Values that are watched leave the graph as outputs; about so many bytes of them are held at once.
WATCHED_BYTES = 64 * 2**20
# Products of other batch sizes are summed in another order.
_SAME_ROWS = 1e-3


class Watching:
    """Runs a model so that values inside its graph are seen.

    A batch is cut into runs of few rows where the rows of a batch do not see each other, which two rows together and
    each alone tell; where they do, the whole batch runs as often as it takes to see all values in turn.

    Args:
        model: not changed.
        names: of the values.
        feeds: the first batch, by which all this is decided.
        samples: its rows.
    """

    def __init__(self, model: ir.Model, names: Sequence[str], feeds: Mapping[str, Any], samples: int) -> None:
        inputs = {str(value.name) for value in model.graph.inputs}
        self.names = list(names)
        self.session = open_session(with_outputs(model, self.names), frugal=True)
        self._answers = [str(value.name) for value in model.graph.outputs]
        self._hidden = [name for name in names if name not in inputs]
        self._parts = [self._hidden]
        self.rows: int | None = None
        sizes, one = self._sizes(feeds, samples)
        if one and self._rows_are_alone(feeds, samples):
            self.rows = max(1, WATCHED_BYTES // max(1, sum(sizes.values())))
            sizes = {name: size * self.rows for name, size in sizes.items()}
        elif one:
            sizes = {name: size * samples for name, size in sizes.items()}
        self._split(sizes)

    def _sizes(self, feeds: Mapping[str, Any], samples: int) -> tuple[dict[str, int], bool]:
        """Bytes of every value, and whether for one row; not where the number of rows is part of the graph."""
        names = dict.fromkeys(self._hidden)
        first = _rows(feeds, 0, 1, samples)
        try:
            return {name: value.nbytes for name, value in self.run(first) if name in names}, True
        except DataError:
            return {name: value.nbytes for name, value in self.run(feeds) if name in names}, False

    def _rows_are_alone(self, feeds: Mapping[str, Any], samples: int) -> bool:
        if samples < 2 or any(array.shape[:1] != (samples,) for array in feeds.values()):
            return False
        try:
            together = self._answer(_rows(feeds, 0, 2, samples))
            alone = [self._answer(_rows(feeds, row, row + 1, samples)) for row in (0, 1)]
        except DataError:  # the number of rows is part of the graph, and none of the watched values lies behind it
            return False
        for whole, first, second in zip(together, *alone, strict=True):
            shapes = [getattr(answer, "shape", ())[:1] for answer in (whole, first, second)]
            if shapes != [(2,), (1,), (1,)] or whole.shape[1:] != first.shape[1:]:
                return False
            parts = np.concatenate([first, second])
            if whole.dtype.kind == "f" and not _alike(whole, parts):
                return False
        return True

    def _answer(self, feeds: Mapping[str, Any]) -> list[Any]:
        return run_session(self.session, self._answers, feeds)

    def _split(self, sizes: Mapping[str, int]) -> None:
        """Show as many values per run as have `WATCHED_BYTES` together, at least one."""
        parts: list[list[str]] = []
        held = 0
        for name in self._hidden:
            held += sizes[name]
            if not parts or held > WATCHED_BYTES:
                parts.append([])
                held = sizes[name]
            parts[-1].append(name)
        self._parts = parts

    def pieces(self, feeds: Mapping[str, Any], samples: int) -> Iterator[Mapping[str, Any]]:
        """The rows of a batch in as many runs as are needed."""
        if self.rows is None or any(array.shape[:1] != (samples,) for array in feeds.values()):
            yield feeds
            return
        for start in range(0, samples, self.rows):
            yield _rows(feeds, start, start + self.rows, samples)

    def run(self, feeds: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
        """Every watched value with its name."""
        yield from ((name, torch.from_numpy(feeds[name])) for name in self.names if name in feeds)
        for part in filter(None, self._parts):  # asked for nothing, a session gives everything
            got = run_session(self.session, part, feeds)
            while got:  # the last one first, so that each is gone when it was seen
                yield part[len(got) - 1], torch.from_numpy(got.pop())


def _alike(whole: np.ndarray, parts: np.ndarray) -> bool:
    scale = float(np.abs(whole[np.isfinite(whole)]).max(initial=0.0))
    return bool(np.allclose(whole, parts, rtol=_SAME_ROWS, atol=_SAME_ROWS * scale, equal_nan=True))


def _rows(feeds: Mapping[str, Any], start: int, end: int, samples: int) -> dict[str, Any]:
    return {name: array[start:end] if array.shape[:1] == (samples,) else array for name, array in feeds.items()}


def with_outputs(model: ir.Model, names: Sequence[str]) -> ir.Model:
    """A copy of a model whose outputs are these values of its main graph, besides its own."""
    copy = model.clone()
    graph = copy.graph
    values = {str(value.name): value for value in graph.inputs}
    for node in graph:
        values |= {str(value.name): value for value in node.outputs}
    present = {str(value.name) for value in graph.outputs}
    for name in names:
        if name in present or name in {str(value.name) for value in graph.inputs}:
            continue
        value = values[name]
        if value.type is None:
            value.type = ir.TensorType(ir.DataType.FLOAT)
        graph.outputs.append(value)
    return copy
