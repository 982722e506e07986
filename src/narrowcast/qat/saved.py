"""The state of a training run on disk: one safetensors file, written beside and renamed, with no code in it.

Owns names and bytes; what the tensors mean is the loop's. The file is whole or the one before is still there, whenever
the process dies.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from narrowcast.errors import CheckpointError, ModelError
from narrowcast.qat.settings import FitSettings

FILE = "training.safetensors"
_FIXED = ("batch_size", "seed", "optimizer")  # the order of the data, and what the optimizer remembers
_VERSION = 1


@dataclass(frozen=True)
class Saved:
    """What a file holds.

    Args:
        said: JSON values.
        tensors: by name.
    """

    said: dict[str, Any]
    tensors: dict[str, Tensor]

    def part(self, name: str) -> dict[str, Tensor]:
        """The tensors below `name/`, without that."""
        return {key.removeprefix(f"{name}/"): t for key, t in self.tensors.items() if key.startswith(f"{name}/")}


class Folder:
    """The directory of one training run.

    Args:
        directory: made when the first file is written.
        made_from: hashes of what the run depends on: model, recipe, data.
        settings: of the training.
    """

    def __init__(self, directory: str | Path, made_from: Mapping[str, str], settings: FitSettings) -> None:
        self.path, self.made_from, self.settings = Path(directory) / FILE, dict(made_from), asdict(settings)

    def check(self, *, resume: bool) -> dict[str, Any] | None:
        """What is said in the file that a run would go on from; None where it begins anew.

        Raises:
            CheckpointError: the file is damaged or belongs to another run, or there is one of an unfinished run and
                `resume` is not set; the message says what to do.
        """
        if self.path.parent.exists() and not self.path.parent.is_dir():
            raise CheckpointError(f"{self.path.parent} is a file; name a directory for the state of training")
        if not self.path.exists():
            return None
        said = _said(self.path)
        if resume:
            self._check_same(said)
            return said
        if said.get("finished"):
            return None
        raise CheckpointError(
            f"{self.path.parent} holds the state of a run that was interrupted at step {said.get('step')}; go on from "
            "it with resume, or delete it or name another directory to start anew"
        )

    def read(self) -> Saved:
        """The file.

        Raises:
            CheckpointError: it is damaged.
        """
        said = _said(self.path)
        try:
            with safe_open(self.path, framework="pt", device="cpu") as file:  # type: ignore[no-untyped-call]
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            raise _damaged(self.path, error) from error
        return Saved(said, tensors)

    def write(self, said: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
        """Put a new file in the place of the old one.

        Raises:
            CheckpointError: the disk refuses; the old file is still there.
            ModelError: something is no tensor.
        """
        settings, threads = self.settings, torch.get_num_threads()
        document = {"version": _VERSION, "made_from": self.made_from, "settings": settings, "threads": threads, **said}
        directory = self.path.parent
        beside = directory / f".{FILE}.{os.getpid()}"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            for left in directory.glob(f".{FILE}.*"):  # of a run that was killed while it wrote
                left.unlink(missing_ok=True)
            save_file(_separate(tensors), beside, {"narrowcast": json.dumps(document)})
            _flush(beside)
            beside.replace(self.path)
            _flush(directory)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.path}: the state of training cannot be written ({error})") from error
        finally:
            beside.unlink(missing_ok=True)

    def _check_same(self, said: Mapping[str, Any]) -> None:
        before = said.get("made_from", {})
        other = [name for name in {**self.made_from, **before} if before.get(name) != self.made_from.get(name)]
        if other:
            raise CheckpointError(
                f"{self.path.parent}: the state there was trained with another {' and another '.join(other)}; go on "
                "with the same, or name another directory to start anew"
            )
        before = said.get("settings", {})
        fixed = next((name for name in _FIXED if before.get(name) != self.settings[name]), None)
        if fixed is not None:
            raise CheckpointError(
                f"{self.path.parent}: the state there was trained with {fixed} {before.get(fixed)}, not "
                f"{self.settings[fixed]}; go on with that, or name another directory to start anew"
            )

    def changed(self, said: Mapping[str, Any]) -> list[str]:
        """Sentences on what is different from when a state was written, and may be."""
        before = said["settings"]
        notes = [
            f"{name} was {before.get(name)} up to step {said['step']} and is {value} from there"
            for name, value in self.settings.items()
            if before.get(name) != value
        ]
        if said["threads"] != torch.get_num_threads():
            notes.append(
                f"the state was trained with {said['threads']} threads, now there are {torch.get_num_threads()}: "
                "results may differ in their last bits from those of a run that was not interrupted"
            )
        return notes


def _said(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:  # type: ignore[no-untyped-call]
            said = json.loads((file.metadata() or {})["narrowcast"])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, error) from error
    if not isinstance(said, dict) or said.get("version") != _VERSION:
        found = said.get("version") if isinstance(said, dict) else type(said).__name__
        raise CheckpointError(f"{path}: is of version {found}, this narrowcast reads {_VERSION}; start anew")
    return said


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path}: is no state of training or damaged ({error}); delete it and start anew")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _separate(tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors on the CPU that share no memory, as the format wants them."""
    separate: dict[str, Tensor] = {}
    met: set[int] = set()
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ModelError(
                f"{name!r} in the state is {type(tensor).__name__}, no tensor, so training cannot be resumed; leave "
                "out the directory for its state, or make get_extra_state return a tensor"
            )
        plain = tensor.detach().cpu().contiguous()
        storage = plain.untyped_storage().data_ptr()
        separate[name] = plain.clone() if storage in met or plain.storage_offset() else plain
        met.add(storage)
    return separate


def random_state() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The states of the global generators of torch, numpy and random: (JSON values, tensors)."""
    kind, key, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002 - what data sets draw from
    version, internal, following = random.getstate()
    tensors = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(np.asarray(key).astype(np.int64))}
    tensors["random"] = torch.tensor(internal, dtype=torch.int64)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        tensors |= {f"cuda{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    said = {"numpy": [kind, int(position), int(has_gauss), float(gauss)], "random": [version, following]}
    return said, tensors


def restore_random_state(said: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Put the global generators back to what `random_state` gave."""
    kind, position, has_gauss, gauss = said["numpy"]
    version, following = said["random"]
    torch.set_rng_state(tensors["torch"])
    np.random.set_state((kind, tensors["numpy"].numpy().astype(np.uint32), position, has_gauss, gauss))  # noqa: NPY002
    random.setstate((version, tuple(tensors["random"].tolist()), following))
    for index in range(sum(name.startswith("cuda") for name in tensors)):
        torch.cuda.set_rng_state(tensors[f"cuda{index}"], index)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Leave the global generators as they were found, whatever is drawn inside."""
    state = random_state()
    try:
        yield
    finally:
        restore_random_state(*state)
