"""Objects with the protocol of ONNX Runtime's CalibrationDataReader, as batches.

`get_next()` returns a dictionary {name of an input: array}, and None at the end. The protocol has no way back; what
can be read again has `rewind()`, or `__len__` and `set_range(start, end)` as ONNX Runtime's strided calibration wants.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from narrowcast.errors import DataError


def is_reader(data: Any) -> bool:
    """Whether `data` is an object with `get_next`."""
    return callable(getattr(data, "get_next", None)) and not isinstance(data, type)


class ReaderBatches:
    """The batches of a calibration reader.

    Args:
        reader: with `get_next`.
    """

    def __init__(self, reader: Any) -> None:
        self.reader = reader
        self._begun = False

    @property
    def repeatable(self) -> bool:
        """Whether the reader has a way back."""
        return callable(getattr(self.reader, "rewind", None)) or self._length() is not None

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        if self.repeatable or self._begun:  # who had it before may have read some of it
            self._rewind()
        self._begun = True
        index = 0
        while (batch := self.reader.get_next()) is not None:
            if not isinstance(batch, Mapping):
                raise DataError(
                    f"batch {index}: get_next() of {type(self.reader).__name__} returned a {type(batch).__name__}; it "
                    "returns a dictionary of arrays by the names of the model's inputs, and None at the end"
                )
            yield batch
            index += 1

    def _rewind(self) -> None:
        if callable(getattr(self.reader, "rewind", None)):
            self.reader.rewind()
            return
        length = self._length()
        if length is None:
            raise DataError(
                f"{type(self.reader).__name__} can be read only once, and was; give it a method rewind(), or __len__ "
                "and set_range(start, end), or pass a list of its batches"
            )
        self.reader.set_range(0, length)

    def _length(self) -> int | None:
        """Samples, where the reader can be set to a range of them; None where it cannot.

        ONNX Runtime's base class has both methods, and they only raise.
        """
        base = next((kind for kind in type(self.reader).__mro__ if "set_range" in vars(kind)), None)
        if base is None or base.__module__.startswith("onnxruntime."):
            return None
        try:
            return len(self.reader)
        except (TypeError, NotImplementedError):
            return None
