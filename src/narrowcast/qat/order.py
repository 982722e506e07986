"""Training data in an order that only the seed and the epoch decide, so that a resumed run goes on where it was."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from narrowcast.data import Pairs, Texts, repeatable
from narrowcast.errors import DataError

_SEEDS = 1_000_003


@runtime_checkable
class Indexed(Protocol):
    """Samples that are read by their numbers."""

    def __len__(self) -> int: ...

    def take(self, rows: Sequence[int]) -> Any:
        """One batch of these samples, in a form that `narrowcast.data` reads."""


class Order:
    """Batches of training data, epoch after epoch.

    Samples are shuffled anew in every epoch; a last batch that is not full is left out where there is a full one, as
    a few samples are too few for the statistics of a BatchNorm. Of a list of batches the batches are shuffled. A
    DataLoader, or anything else that is iterated over, keeps its own order; its randomness must come from the global
    generators of torch, numpy and random, which are seeded at the start of every epoch.

    Args:
        data: any form of `narrowcast.data` that can be read again, or `Indexed`.
        batch_size: of data that has none of its own.
        seed: of the order.
        model: decides what texts are encoded to.

    Raises:
        DataError: the data cannot be trained on.
    """

    def __init__(self, data: Any, batch_size: int, seed: int, model: nn.Module) -> None:
        self.batch_size, self.seed = batch_size, seed
        self.notes: list[str] = []
        self.data, self.whole_batches = self._read(data, model), False
        if isinstance(self.data, list):
            self.whole_batches = True
            self.notes.append("the training data is a list of batches: their order is shuffled, not their samples")
        elif not isinstance(self.data, Indexed):
            self.notes.append(f"the training data is a {type(data).__name__}, which keeps its own order and batches")

    def _read(self, data: Any, model: nn.Module) -> Any:
        if isinstance(data, Pairs):
            raise DataError(
                "training data is Pairs, and pairs with scores have no loss here; train on classes or texts, or use "
                "nc.qat.prepare with a loop of your own"
            )
        if not repeatable(data):
            raise DataError(
                "training data is a generator, which can be read once; training reads it in every epoch: pass a list, "
                "a Dataset or a DataLoader"
            )
        if isinstance(data, Texts):
            return _TextRows(data, model)
        if isinstance(data, Indexed):
            return data
        if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
            return _DatasetRows(data)
        if isinstance(data, Tensor | np.ndarray | Mapping) or _is_table(data):
            return _TensorRows(data)
        if isinstance(data, tuple):
            return list(data)
        return data

    @property
    def per_epoch(self) -> int | None:
        """Batches of one epoch; None where that is not known before."""
        if isinstance(self.data, Indexed):
            return max(1, len(self.data) // self.batch_size)
        try:
            return len(self.data)
        except TypeError:
            return None

    def sample(self, samples: int) -> Any:
        """About so many samples that the first epoch begins with, to calibrate on; sequences are not padded."""
        if isinstance(self.data, Indexed):
            rows = torch.randperm(len(self.data), generator=self._generator(0))[:samples]
            if hasattr(self.data, "subset"):
                return self.data.subset(rows.tolist())
            return [self.data.take(part.tolist()) for part in rows.split(self.batch_size)]
        return list(islice(self.epoch(0), max(1, samples // self.batch_size)))

    def _generator(self, number: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * _SEEDS + number)

    def epoch(self, number: int, *, skip: int = 0, ready: Callable[[], None] | None = None) -> Iterator[Any]:
        """The batches of one epoch, as `narrowcast.data.iterate` takes them, without the first `skip`.

        Seeds the global generators before the first batch is read, and calls `ready` before the first that is given.
        """
        seed_everything(self.seed * _SEEDS + number)
        batches = self._batches(self._generator(number), skip)
        if ready is not None:
            ready()
        yield from batches

    def _batches(self, order: torch.Generator, skip: int) -> Iterator[Any]:
        """Skipping is done when this returns; of data that is numbered nothing is read for it."""
        if isinstance(self.data, Indexed):
            if not len(self.data):
                raise DataError("the training data holds no samples")
            rows, size = torch.randperm(len(self.data), generator=order), self.batch_size
            parts = rows[: max(size, len(rows) // size * size)].split(size)[skip:]
            return (self.data.take(part.tolist()) for part in parts)
        if self.whole_batches:
            return (self.data[index] for index in torch.randperm(len(self.data), generator=order).tolist()[skip:])
        batches = iter(self.data)
        for _ in range(skip):
            next(batches, None)
        return batches


def seed_everything(seed: int) -> None:
    """Seed torch, numpy and random."""
    torch.manual_seed(seed % 2**63)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - the generator that the users' own data sets draw from
    random.seed(seed)


class _TensorRows:
    """A tensor, or a tuple or dictionary of tensors with equally many rows."""

    def __init__(self, data: Any) -> None:
        parts = data.values() if isinstance(data, Mapping) else data if isinstance(data, tuple) else (data,)
        sizes = {len(part) for part in parts}
        if len(sizes) != 1:
            raise DataError(f"training data: its parts have {sorted(sizes)} rows; give them the same number")
        self.data, self.rows = data, sizes.pop()

    def __len__(self) -> int:
        return self.rows

    def take(self, rows: Sequence[int]) -> Any:
        """See `Indexed`."""
        index = list(rows)
        if isinstance(self.data, Mapping):
            return {name: part[index] for name, part in self.data.items()}
        return tuple(part[index] for part in self.data) if isinstance(self.data, tuple) else self.data[index]


class _DatasetRows:
    """A map-style Dataset of torch."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def take(self, rows: Sequence[int]) -> Any:
        """See `Indexed`."""
        return default_collate([self.data[row] for row in rows])


class _TextRows:
    """Strings; where the model takes no mask, they are padded on the right and the padding labelled to be left out."""

    def __init__(self, texts: Texts, model: nn.Module) -> None:
        self.texts, self.model = texts, model

    def __len__(self) -> int:
        return len(self.texts.strings)

    def take(self, rows: Sequence[int]) -> Any:
        """See `Indexed`."""
        chosen = [self.texts.strings[row] for row in rows]
        batches = list(replace(self.texts, strings=chosen, batch_size=len(chosen)).batches(self.model))
        if len(batches) == 1:
            return batches[0]
        named = [batch if isinstance(batch, Mapping) else {"": batch} for batch in batches]
        ids = next(iter(named[0]))
        pad = nn.utils.rnn.pad_sequence
        padded = {key: pad([row[key][0] for row in named], batch_first=True) for key in named[0]}
        labels = pad([row[ids][0] for row in named], batch_first=True, padding_value=-100)
        return (padded[""], labels) if ids == "" else {**padded, "labels": labels}

    def subset(self, rows: Sequence[int]) -> Texts:
        """The texts with these numbers."""
        return replace(self.texts, strings=[self.texts.strings[row] for row in rows])


def _is_table(data: Any) -> bool:
    """Whether it is (inputs, targets) of equally many rows, as `narrowcast.data` reads a tuple of tensors."""
    return isinstance(data, tuple) and len(data) > 0 and all(isinstance(part, Tensor | np.ndarray) for part in data)


def digest_of(data: Any) -> str:
    """SHA-256 by which other data is told from this: of all that it holds where it says so, else of a first batch.

    Args:
        data: `Indexed`, or anything that `narrowcast.data` reads.
    """
    if isinstance(data, Texts):
        return hashlib.sha256(repr(list(data.strings)).encode()).hexdigest()
    if isinstance(data, Pairs):
        scores = hashlib.sha256(repr([float(score) for score in data.scores]).encode()).hexdigest()
        return f"{digest_of(data.first)}-{digest_of(data.second)}-{scores}"
    if hasattr(data, "digest"):
        return str(data.digest())
    seed_everything(0)
    sized = len(data) if hasattr(data, "__len__") else -1
    found = hashlib.sha256(f"{type(data).__name__} {sized}".encode())
    batches = data if isinstance(data, list | tuple | Mapping | Tensor | np.ndarray) else _first(data)
    for leaf in torch.utils._pytree.tree_leaves(batches):
        values = torch.as_tensor(leaf) if isinstance(leaf, np.ndarray) else leaf
        if isinstance(values, Tensor):
            found.update(f"{values.dtype} {tuple(values.shape)}".encode())
            found.update(values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        else:
            found.update(repr(values).encode())
    return found.hexdigest()


def _first(data: Any) -> Any:
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        return data[0]  # type: ignore[index]
    if isinstance(data, DataLoader):
        return next(iter(data))
    return next(iter(data), None) if hasattr(data, "__iter__") and repeatable(data) else type(data).__name__
