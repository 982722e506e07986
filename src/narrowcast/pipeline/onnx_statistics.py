"""Statistics of a calibration pass on disk: an interrupted pass goes on where it stopped, a finished one is reused.

One safetensors file per model and set of observers, written aside and renamed. Which data it is of is a chain of
hashes, one link per batch: a later pass reads its batches, and does not run the model on those that the file knows,
if the chain is the same up to there. So the same data is told from other data without being kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from narrowcast.errors import CheckpointError
from narrowcast.models import Observation
from narrowcast.observers.state import restore_, state_of

# Between two writings: what an interruption may cost.
SECONDS = 20.0
_COUNTED = ("calls", "positions")
_VERSION = 1


class Statistics:
    """The statistics of one pass; as `progress` of `OnnxModel.observe` it follows the pass.

    Args:
        directory: made where it is not there.
        model: hash of the graph that is run.
        items: everything that learns from the pass, by names that say what it is; a file that has more is used, too.

    Raises:
        CheckpointError: the directory cannot be used, or a file in it is damaged.
    """

    def __init__(self, directory: str | Path, model: str, items: Mapping[str, Any]) -> None:
        self.directory, self.model, self.items = Path(directory), model, dict(items)
        self._chain = hashlib.sha256(f"narrowcast {_VERSION} {model}".encode()).hexdigest()
        self._read = 0
        self._known, self._known_chain = 0, ""
        self._counts: dict[str, dict[str, int]] = {name: {} for name in _COUNTED}
        self._written = time.monotonic()
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"{directory}: cannot be made a directory of statistics ({error})") from error
        self._restore()

    def has(self, feeds: Mapping[str, Any], seen: Observation) -> bool:
        """See `onnx_model.Progress`.

        Raises:
            CheckpointError: the batches so far are not those of the file.
        """
        self._chain = _next_link(self._chain, feeds)
        self._read += 1
        if self._read > self._known:
            return False
        if self._read == self._known:
            if self._chain != self._known_chain:
                raise CheckpointError(
                    f"{self.path}: its statistics are of other data: the first {self._known} batches are not the same; "
                    "give the data that it was begun with, or another directory"
                )
            seen.calls, seen.positions = dict(self._counts["calls"]), dict(self._counts["positions"])
        return True

    def took(self, seen: Observation) -> None:
        """See `onnx_model.Progress`; writes the statistics now and then."""
        if self._read > self._known and time.monotonic() - self._written >= SECONDS:
            self._write(seen)

    def finish(self, seen: Observation) -> list[str]:
        """Write the statistics of the whole pass; returns what the report should say.

        Raises:
            CheckpointError: the file is of more data than this pass, or the disk refuses.
        """
        if self._read < self._known:
            raise CheckpointError(
                f"{self.path}: its statistics are of {self._known} batches, and the data has {self._read}; give the "
                "data that it was begun with, or another directory"
            )
        if self._read > self._known:
            self._write(seen)
        if not self._known:
            return [f"calibration statistics of {self._read} batches were written to {self.directory}"]
        rest = f", and {self._read - self._known} more were run" if self._read > self._known else ""
        return [f"calibration statistics of {self._known} batches were reused from {self.directory}{rest}"]

    @property
    def path(self) -> Path:
        """The file of this model and these observers."""
        names = hashlib.sha256("\n".join(sorted(self.items)).encode()).hexdigest()
        return self.directory / f"calibration-{self.model[:16]}-{names[:16]}.safetensors"

    def _restore(self) -> None:
        """Take the state of the file that has all items, and the most batches."""
        best: tuple[int, Path, dict[str, Any]] | None = None
        for path in sorted(self.directory.glob(f"calibration-{self.model[:16]}-*.safetensors")):
            said = _header(path)
            fits = said.get("model") == self.model and set(self.items) <= set(said.get("items", {}))
            if fits and (best is None or said["batches"] > best[0]):
                best = (said["batches"], path, said)
        if best is None:
            return
        self._known, path, said = best
        try:
            with safe_open(path, framework="pt", device="cpu") as file:  # type: ignore[no-untyped-call]
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            for name, item in self.items.items():
                restore_(item, said["items"][name], tensors)
            self._known_chain, self._counts = said["chain"], said["counts"]
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: is damaged ({error}); delete it, and the data is run again") from error

    def _write(self, seen: Observation) -> None:
        """Write everything aside, and rename it."""
        tensors: dict[str, Tensor] = {}
        said = {
            "model": self.model, "batches": self._read, "chain": self._chain,
            "counts": {name: getattr(seen, name) for name in _COUNTED},
            "items": {name: state_of(item, name, tensors) for name, item in self.items.items()},
        }  # fmt: skip
        beside = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            with beside.open("wb") as file:
                file.write(save(tensors, {"narrowcast": json.dumps(said)}))
                file.flush()
                os.fsync(file.fileno())
            beside.replace(self.path)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be written ({error})") from error
        finally:
            beside.unlink(missing_ok=True)
        self._written = time.monotonic()


def _header(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:  # type: ignore[no-untyped-call]
            said: dict[str, Any] = json.loads((file.metadata() or {}).get("narrowcast", "{}"))
            return said
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: is damaged ({error}); delete it, and the data is run again") from error


def _next_link(chain: str, feeds: Mapping[str, Any]) -> str:
    """The hash of all batches so far."""
    link = hashlib.sha256(chain.encode())
    for name in sorted(feeds):
        array = np.ascontiguousarray(feeds[name])
        link.update(f"{name} {array.dtype} {array.shape} ".encode())
        link.update(array.tobytes())
    return link.hexdigest()
