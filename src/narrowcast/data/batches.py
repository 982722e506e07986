"""Calibration and evaluation data: every form a user may bring, read as batches that run the model.

Owns which part of a batch is input and which is target, and refuses data that would spoil a measurement: nothing in
it, NaN, something that is no tensor. Knows models only by the signature of `forward`; never runs one by itself.

    form of `data`                                one batch is
    DataLoader, list, generator of batches        what it yields: a tensor or array, a tuple or list, a dictionary
    torch.utils.data.Dataset                      32 samples, collated by torch
    one tensor or array [N, ...]                  32 rows
    tuple (inputs, targets) or dict of tensors    32 rows of each
    Texts(strings, tokenizer)                     tokenized, padded strings
    list of strings                               the same, with the tokenizer that lies beside the model
    Pairs(first, second, scores)                  what `first` yields, then what `second` yields
    path of an .npz or .npy file                  32 rows, see `open_arrays`
    object with `get_next`                        what it returns, until None: ONNX Runtime's CalibrationDataReader
    callable                                      one call `data(model)`, which runs the model as it likes

A tuple's first elements, as many as `forward` has parameters without default (at least one), are inputs and the rest
are targets. A dictionary's keys are parameters of `forward`; `labels`, `label`, `targets` and `target` are targets.
A generator can be read only once, and so can a reader that cannot be rewound: `repeatable` tells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import DataLoader, Dataset

from narrowcast.data.arrays import open_arrays
from narrowcast.data.pairs import Pairs
from narrowcast.data.reader import ReaderBatches, is_reader
from narrowcast.data.signature import Signature
from narrowcast.data.texts import Texts, local_tokenizer
from narrowcast.errors import DataError

ROWS_PER_BATCH = 32
TARGET_KEYS = ("labels", "label", "targets", "target")
CHECKED_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Batch:
    """One call of the model, and what its answer should have been.

    Args:
        args: positional inputs.
        kwargs: inputs by name.
        targets: what the answer is judged by; None where the data has none, a tuple where it has several.
        samples: rows of the first input tensor, at least 1; 1 for a callable, which cannot be counted.
        note: which part was taken as the target, or another decision worth telling; "" if there was none.
        call: runs the model in place of `model(*args, **kwargs)`.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    targets: Any | None
    samples: int
    note: str = ""
    call: Callable[[nn.Module], Any] | None = None

    def run(self, model: nn.Module) -> Any:
        """The model's answer to this batch; the caller sets inference mode."""
        return model(*self.args, **self.kwargs) if self.call is None else self.call(model)


def iterate(data: Any, model: nn.Module) -> Iterator[Batch]:
    """The batches of `data`, read for `model` and moved to its device.

    Args:
        data: any form that the module docstring lists.
        model: decides which elements are inputs, by the signature of its `forward`.

    Returns:
        An iterator that yields at least one batch.

    Raises:
        DataError: at once for a form that is none of these; while iterating for data without a batch, a batch without
            samples, NaN or infinity in a floating input (minus infinity is allowed in masks), an unknown dictionary
            key or an input that is no tensor. The message names batch and position.
    """
    data = opened(data)
    if isinstance(data, Pairs):
        return chain(iterate(data.first, model), iterate(data.second, model))
    if isinstance(data, Texts):
        return _checked(data.batches(model), data, model)
    if _is_strings(data):
        return _checked(Texts(data, local_tokenizer(model)).batches(model), data, model)
    if callable(data) and not isinstance(data, Iterable):
        return iter((Batch((), {}, None, 1, "the data is a callable: it ran the model itself", data),))
    return _checked(_raw_batches(data), data, model)


def opened(data: Any) -> Any:
    """`data`, with a path opened and a calibration reader made iterable; everything else as it is.

    Raises:
        DataError: the path is of no file of arrays.
    """
    if is_reader(data):
        return ReaderBatches(data)
    if not isinstance(data, str | Path):
        return data
    if Path(data).is_dir():
        raise DataError(
            f"data {str(data)!r} is a folder; say how its images become inputs: narrowcast.data.ImageFolder(folder, "
            "Preprocessing(side=224, mean=(...), std=(...)))"
        )
    if Path(data).suffix.lower() not in (".npz", ".npy"):
        raise DataError(
            f"data is {_kind(data)}, {str(data)!r}: no data, and of paths only .npz and .npy files are read; pass a "
            "DataLoader, a list of batches, one tensor or Texts(strings, tokenizer)"
        )
    return open_arrays(data)


def repeatable(data: Any) -> bool:
    """Whether `data` can be read again: False for generators and other iterators, which are spent after one pass."""
    if is_reader(data):
        return ReaderBatches(data).repeatable
    if isinstance(data, ReaderBatches):
        return data.repeatable
    if isinstance(data, Pairs):
        return repeatable(data.first) and repeatable(data.second)
    return not isinstance(data, Iterator)


def describe(data: Any, model: nn.Module) -> list[str]:
    """Sentences for a report on how `data` is read, from its first batch; nothing is taken from a generator.

    Args:
        data: any form that `iterate` takes.
        model: as for `iterate`.

    Returns:
        Notes, often one or none.
    """
    if not repeatable(data):
        return ["the data is a generator and was read once"]
    first = next(iterate(data, model))
    return [first.note] if first.note else []


def _is_strings(data: Any) -> bool:
    return isinstance(data, list | tuple) and len(data) > 0 and all(isinstance(item, str) for item in data)


def _raw_batches(data: Any) -> Iterable[Any]:
    """What the container yields, before inputs and targets are told apart."""
    if isinstance(data, str | bytes) or not (isinstance(data, Iterable | Dataset)):
        raise DataError(
            f"data is {_kind(data)}; pass a DataLoader, a list of batches, one tensor, Texts(strings, tokenizer), "
            "or a callable that runs the model"
        )
    if isinstance(data, Dataset):
        return DataLoader(data, batch_size=ROWS_PER_BATCH)
    if isinstance(data, Tensor | np.ndarray):
        return _split_rows(data)
    if isinstance(data, Mapping):
        return _split_together(data, tuple(data), "dictionary")
    if isinstance(data, tuple) and data and all(isinstance(part, Tensor | np.ndarray) for part in data):
        return _split_together(data, tuple(range(len(data))), "tuple")
    return data


def _split_rows(values: Any) -> Iterator[Any]:
    if values.ndim == 0:
        raise DataError("data is a tensor without dimensions; its first dimension must count the samples")
    return (values[start : start + ROWS_PER_BATCH] for start in range(0, len(values), ROWS_PER_BATCH))


def _split_together(data: Any, keys: Sequence[Any], kind: str) -> Iterable[Any]:
    """Rows 0-31, 32-63, ... of every part of a tuple or dictionary; a dictionary with other parts is one batch."""
    sized = [isinstance(data[key], Tensor | np.ndarray) and data[key].ndim > 0 for key in keys]
    rows = {len(data[key]) for key, is_sized in zip(keys, sized, strict=True) if is_sized}
    if kind == "dictionary" and not (all(sized) and len(rows) == 1):
        return [data]
    if len(rows) != 1 or not all(sized):
        raise DataError(
            f"data is a tuple of tensors, read as (inputs, targets), but its parts have {_rows(data)} rows; "
            "give them the same number of rows, or pass a list if each is a batch"
        )
    starts = range(0, rows.pop(), ROWS_PER_BATCH)
    if kind == "dictionary":
        return ({key: data[key][start : start + ROWS_PER_BATCH] for key in keys} for start in starts)
    return (tuple(part[start : start + ROWS_PER_BATCH] for part in data) for start in starts)


def _rows(parts: Sequence[Any]) -> str:
    return ", ".join(str(len(part)) if part.ndim else "no" for part in parts)


def _checked(raw: Iterable[Any], data: Any, model: nn.Module) -> Iterator[Batch]:
    """`raw` as `Batch`es; a generator so that only one batch is in memory."""
    reader = _Reader(model)
    index = -1
    for index, item in enumerate(raw):
        yield item if isinstance(item, Batch) else reader.read(item, index)
    if index < 0:
        spent = "; a generator can be read only once, and this one may be spent" if not repeatable(data) else ""
        raise DataError(f"the data ({_kind(data)}) holds no batch{spent}")


class _Reader:
    """Tells inputs from targets for one model and converts them."""

    def __init__(self, model: nn.Module) -> None:
        self.signature = Signature.of(model)
        parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
        known = parameter is not None and parameter.device.type != "meta"
        self.device = parameter.device if known and parameter is not None else None
        self.keeps_double = parameter is not None and parameter.dtype == torch.float64

    def read(self, item: Any, index: int) -> Batch:
        """One element of the data as a batch."""
        where = f"batch {index}"
        if isinstance(item, Mapping):
            return self._from_dictionary(item, (), where)
        if isinstance(item, list | tuple) and not isinstance(item, PackedSequence):
            if len(item) > 0 and isinstance(item[0], Mapping):
                return self._from_dictionary(item[0], tuple(item[1:]), where)
            return self._from_tuple(tuple(item), where)
        return self._from_tuple((item,), where)

    def _from_tuple(self, parts: tuple[Any, ...], where: str) -> Batch:
        needed = max(1, len(self.signature.required))
        if len(parts) < needed:
            raise DataError(
                f"{where} has {len(parts)} element(s), but {self.signature.owner}.forward requires "
                f"{', '.join(self.signature.required) or 'an input'}; yield a tuple with one element for each"
            )
        inputs = len(parts) if self.signature.any_positional else needed
        names = [self.signature.name_of(position) for position in range(inputs)]
        args = tuple(
            self._input(part, name, f"{where}, element {position + 1}")
            for position, (part, name) in enumerate(zip(parts[:inputs], names, strict=True))
        )
        samples = _samples(args, where)
        rest = tuple(self._target(part) for part in parts[inputs:])
        return Batch(args, {}, _unwrap(rest), samples, _tuple_note(inputs, len(parts)))

    def _from_dictionary(self, item: Mapping[str, Any], rest: tuple[Any, ...], where: str) -> Batch:
        targets = {key: item[key] for key in item if key in TARGET_KEYS and key not in self.signature.required}
        unknown = [key for key in item if key not in targets and key not in self.signature.names]
        if unknown and not self.signature.any_keyword:
            raise DataError(
                f"{where} has the key {unknown[0]!r}, which {self.signature.owner}.forward does not take; it takes "
                f"{', '.join(self.signature.names)} (targets are called {', '.join(TARGET_KEYS)})"
            )
        missing = [name for name in self.signature.required if name not in item]
        if missing:
            raise DataError(f"{where} lacks the key {missing[0]!r}, which {self.signature.owner}.forward requires")
        kwargs = {
            key: self._input(value, key, f"{where}, key {key!r}") for key, value in item.items() if key not in targets
        }
        samples = _samples(tuple(kwargs.values()), where)
        answers = tuple(self._target(part) for part in (*targets.values(), *rest))
        return Batch((), kwargs, _unwrap(answers), samples, _dictionary_note(tuple(targets), rest, unknown))

    def _input(self, value: Any, name: str, where: str) -> Any:
        """An input on the model's device, arrays as tensors, checked; containers element by element."""
        if isinstance(value, np.ndarray | np.generic):
            value = self._from_numpy(np.asarray(value), where)
        if isinstance(value, Tensor):
            _check_finite(value, where, allow_minus_infinity="mask" in name)
            return value if self.device is None else value.to(self.device)
        if isinstance(value, PackedSequence):
            _check_finite(value.data, where, allow_minus_infinity=False)
            return value if self.device is None else value.to(self.device)  # type: ignore[arg-type]
        if isinstance(value, list | tuple) and value:
            parts = [self._input(part, name, f"{where}[{i}]") for i, part in enumerate(value)]
            return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
        if isinstance(value, Mapping):
            return {key: self._input(part, name, f"{where}[{key!r}]") for key, part in value.items()}
        if value is None or isinstance(value, bool | int | float):
            return value
        remedy = "wrap strings as Texts(strings, tokenizer)" if isinstance(value, str) else "convert it to a tensor"
        raise DataError(f"{where} is {_kind(value)}, not a tensor; {remedy}")

    def _from_numpy(self, array: np.ndarray[Any, Any], where: str) -> Tensor:
        """NumPy's default float64 becomes float32 unless the model itself computes in float64."""
        if array.dtype.kind not in "fiub":
            raise DataError(f"{where} is an array of {array.dtype}, not of numbers; convert it to a tensor")
        if array.dtype == np.float64 and not self.keeps_double:
            array = array.astype(np.float32)
        return torch.from_numpy(np.require(array, requirements=["C", "W"]))

    def _target(self, value: Any) -> Any:
        if isinstance(value, np.ndarray | np.generic) and np.asarray(value).dtype.kind in "fiub":
            return torch.as_tensor(np.array(value))
        if isinstance(value, list | tuple) and value and all(isinstance(part, int | float) for part in value):
            return torch.tensor(value)
        return value


def _check_finite(values: Tensor, where: str, *, allow_minus_infinity: bool) -> None:
    if values.numel() == 0:
        raise DataError(f"{where} has the shape {list(values.shape)}, which holds no values")
    if values.dtype not in CHECKED_DTYPES or values.device.type == "meta":
        return
    bad = ~torch.isfinite(values)
    if allow_minus_infinity:
        bad &= values != -torch.inf
    if bool(bad.any()):
        position = tuple(bad.nonzero()[0].tolist())
        raise DataError(
            f"{where} holds {values[position].item()} at position {list(position)} of shape {list(values.shape)}; "
            "remove or repair that sample"
        )


def _samples(inputs: tuple[Any, ...], where: str) -> int:
    """Rows of the first tensor among the inputs."""
    for value in inputs:
        if isinstance(value, PackedSequence):
            return int(value.batch_sizes[0])
        if isinstance(value, Tensor):
            return int(value.shape[0]) if value.ndim else 1
        nested = tuple(value.values()) if isinstance(value, dict) else value
        if isinstance(nested, list | tuple) and nested:
            return _samples(tuple(nested), where)
    raise DataError(
        f"{where} holds no tensor: {', '.join(_kind(value) for value in inputs) or 'it is empty'}; "
        "a batch is a tensor, a tuple that starts with one, or a dictionary of tensors"
    )


def _unwrap(targets: tuple[Any, ...]) -> Any | None:
    if not targets:
        return None
    return targets[0] if len(targets) == 1 else targets


def _tuple_note(inputs: int, elements: int) -> str:
    if inputs == elements:
        return ""
    if elements == inputs + 1:
        return f"element {elements} of each batch was taken as the target"
    return f"elements {inputs + 1} to {elements} of each batch were taken as the targets"


def _dictionary_note(targets: tuple[str, ...], rest: tuple[Any, ...], unknown: list[str]) -> str:
    notes = [f"{key!r} of each batch was taken as the target and not passed to the model" for key in targets]
    if rest:
        notes.append("what follows the dictionary in each batch was taken as the target")
    notes += [f"{key!r} of each batch was passed through the model's **kwargs, which may ignore it" for key in unknown]
    return "; ".join(notes)


def _kind(value: Any) -> str:
    """What a value is, for a message: 'a str', 'an int', 'None'."""
    if value is None:
        return "None"
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"
