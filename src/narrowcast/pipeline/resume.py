"""A journal of finished blocks, so that an interrupted run goes on where it stopped, with the same result.

One safetensors file per block: the codes, scales and zero points of its weights, the ranges of its inputs, and beside
them what the report says of them. Each is written aside and renamed, so it is whole or not there. What the files hold
belongs to one model, one recipe and one set of data; every file says which.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.utils import _pytree as pytree

from narrowcast.core import QuantizedTensor, QuantSpec
from narrowcast.errors import CheckpointError, FormatError
from narrowcast.nn import Activation
from narrowcast.pipeline.calibrate import Calibration
from narrowcast.pipeline.solve import Job, Treatment, install_
from narrowcast.pipeline.solve_weight import SolvedWeight
from narrowcast.pipeline.streams import Call
from narrowcast.planning import LayerPlan
from narrowcast.recipe import Recipe
from narrowcast.report import StepError

_VERSION = 1


def fingerprint(recipe: Recipe, source_sha256: str, calls: list[Call], calibration: Calibration) -> dict[str, str]:
    """What the result of a run depends on, as hashes.

    Args:
        recipe: that is followed.
        source_sha256: of the float model.
        calls: of the model that blocks are solved on.
        calibration: of all data.
    """
    data = hashlib.sha256()
    for leaf in pytree.tree_leaves([(call.args, call.kwargs) for call in calls]):
        if isinstance(leaf, Tensor):
            data.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode())
            data.update(leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    for path, magnitude in calibration.magnitudes.items():
        if calibration.ran(path):
            data.update(path.encode("utf-8", "backslashreplace") + magnitude.result().numpy().tobytes())
    text = json.dumps(recipe.to_dict(), sort_keys=True)
    return {
        "version": str(_VERSION), "recipe": hashlib.sha256(text.encode()).hexdigest(), "model": source_sha256,
        "data": data.hexdigest(),
    }  # fmt: skip


class Journal:
    """The finished blocks of one run in a directory.

    Args:
        directory: made where it is not there.
        made_from: of `fingerprint`.

    Raises:
        CheckpointError: the directory cannot be used.
    """

    def __init__(self, directory: str | Path, made_from: Mapping[str, str]) -> None:
        self.directory, self.made_from = Path(directory), dict(made_from)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"{directory}: cannot be made a directory of finished blocks ({error})") from error

    def restore_(self, job: Job, index: int, units: Mapping[str, list[LayerPlan]]) -> bool:
        """Install a block that was finished before; False where it was not. Changes the job.

        Raises:
            CheckpointError: the file is damaged, or belongs to another model, recipe or data.
        """
        path = self._path(index)
        if not path.exists():
            return False
        try:
            with safe_open(path, framework="pt", device="cpu") as file:  # type: ignore[no-untyped-call]
                said = json.loads((file.metadata() or {}).get("narrowcast", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            self._check(path, said, units)
            weights = {name: _weight(values, name, tensors) for name, values in said["weights"].items()}
            treatments = {unit: _treatment(values, unit, tensors) for unit, values in said["units"].items()}
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, FormatError) as error:
            raise CheckpointError(f"{path}: is damaged ({error}); delete it, and its block is solved again") from error
        job.solved |= weights
        for unit, rows in units.items():
            install_(job, unit, rows, treatments[unit])
        return True

    def write(self, job: Job, index: int, units: Mapping[str, list[LayerPlan]]) -> None:
        """Write a finished block.

        Raises:
            CheckpointError: the disk refuses.
        """
        tensors: dict[str, Tensor] = {}
        weights: dict[str, Any] = {}
        for row in (row for rows in units.values() for row in rows):
            weights[row.layer.name] = _weight_values(job.solved[row.layer.name], row.layer.name, tensors)
        places = {unit: _treatment_values(job.modules[unit][0].treatment, unit, tensors) for unit in units}
        said = {"made_from": self.made_from, "weights": weights, "units": places}
        path = self._path(index)
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with beside.open("wb") as file:
                file.write(save(tensors, {"narrowcast": json.dumps(said)}))
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be written ({error})") from error
        finally:
            beside.unlink(missing_ok=True)

    def _path(self, index: int) -> Path:
        return self.directory / f"block-{index:04d}.safetensors"

    def _check(self, path: Path, said: Mapping[str, Any], units: Mapping[str, list[LayerPlan]]) -> None:
        other = [name for name, value in self.made_from.items() if said.get("made_from", {}).get(name) != value]
        if len(other) > 1 and "data" in other:
            other.remove("data")  # its hash holds what the model makes of it
        if other:
            raise CheckpointError(
                f"{path}: was written for another {' and another '.join(other)}; give another directory, or delete "
                "this one to start anew"
            )
        if list(said["units"]) != list(units):
            raise CheckpointError(f"{path}: holds other layers than this block; delete the directory to start anew")


def _weight_values(solved: SolvedWeight, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    record = solved.record
    for part in ("codes", "scale", "zero_point", "levels"):
        if (tensor := getattr(record, part)) is not None:
            tensors[f"{name}/{part}"] = tensor.contiguous()
    return {
        "spec": str(record.spec), "sqnr_db": solved.sqnr_db, "method": solved.method, "seconds": solved.seconds,
        "fallback": solved.fallback, "notes": list(solved.notes), "errors": [asdict(error) for error in solved.errors],
    }  # fmt: skip


def _weight(values: Mapping[str, Any], name: str, tensors: Mapping[str, Tensor]) -> SolvedWeight:
    codes = tensors[f"{name}/codes"]
    scale, zero_point = tensors.get(f"{name}/scale"), tensors.get(f"{name}/zero_point")
    record = QuantizedTensor(codes, scale, zero_point, QuantSpec.parse(values["spec"]), tensors.get(f"{name}/levels"))
    return SolvedWeight(
        record, values["sqnr_db"], values["method"], values["seconds"], values["fallback"], tuple(values["notes"]),
        tuple(StepError(**error) for error in values["errors"]),
    )  # fmt: skip


def _treatment_values(treatment: Treatment, unit: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    activation, text = treatment
    if activation.scale is not None and activation.zero_point is not None:
        tensors[f"{unit}/input_scale"] = activation.scale.contiguous()
        tensors[f"{unit}/input_zero_point"] = activation.zero_point.contiguous()
    return {"spec": None if activation.spec is None else str(activation.spec), "text": text}


def _treatment(values: Mapping[str, Any], unit: str, tensors: Mapping[str, Tensor]) -> Treatment:
    spec = None if values["spec"] is None else QuantSpec.parse(values["spec"])
    ranges = tensors.get(f"{unit}/input_scale"), tensors.get(f"{unit}/input_zero_point")
    return Activation(spec, *ranges), values["text"]
