"""The calibration doctor: what is wrong with calibration data, said before the long part of the work.

`Doctor.read` looks at every batch before the model is calibrated (data that can be read once only is looked at while it
streams through); `unseen` adds what the calibration pass did not reach. Only what can be established is a finding:
ids are compared with the very table that looks them up, images with the statistics of the model's own BatchNorm.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from narrowcast.data import Batch, DataStatistics, iterate, named_inputs, out_of_vocabulary, repeatable
from narrowcast.data.signature import Signature
from narrowcast.errors import DataError, ModelError
from narrowcast.models import FoldReport, TorchModel, is_onnx
from narrowcast.models.entrance import Entrance, find_entrance, norm_sums
from narrowcast.pipeline.calibrate import Calibration, first_batch, rewindable
from narrowcast.pipeline.findings import Dead, judge_length, judge_reach, judge_tokens, judge_values
from narrowcast.planning import LayerPlan, Plan, make_plan
from narrowcast.recipe import Recipe, load_recipe
from narrowcast.report import Finding

# Images that the first BatchNorm is compared on: its mean is then known to a sixteenth of its deviation or better.
_COMPARED_ROWS = 256
_PADDING_NAMES = ("input_ids", "decoder_input_ids")


@dataclass
class Doctor:
    """What is known of calibration data so far.

    Args:
        adapter: the float model, BatchNorms not yet folded.
        plan: what the data is for.
        entrance: where the model's inputs enter it.
        statistics: counts of what was read.
        probe_elements: values of the first batch's first input.
        norm: [3, channels] sums over what reached the first BatchNorm, see `norm_sums`; None where there is none.
    """

    adapter: TorchModel
    plan: Plan
    entrance: Entrance
    statistics: DataStatistics
    probe_elements: int
    norm: Tensor | None = None
    _compared: int = field(default=0, repr=False)
    _trained: nn.Module | None = field(default=None, repr=False)

    @classmethod
    def of(cls, adapter: TorchModel, plan: Plan, probe: Batch) -> Doctor:
        """A doctor that has run the first batch once to see where its inputs go; nothing is counted yet."""
        signature = Signature.of(adapter.model)
        inputs = named_inputs(probe, signature)
        entrance = find_entrance(adapter.model, inputs, lambda: probe.run(adapter.model))
        padding = {name: table.padding for name, table in entrance.tables.items() if table.padding is not None}
        configured = getattr(getattr(adapter.model, "config", None), "pad_token_id", None)
        if isinstance(configured, int):
            padding = {name: configured for name in _PADDING_NAMES if name in inputs} | padding
        elements = next((value.numel() for value in inputs.values()), 0)
        trained = adapter.model.get_submodule(entrance.norm) if entrance.norm else None
        doctor = cls(adapter, plan, entrance, DataStatistics(signature, padding), elements, _trained=trained)
        for name, table in entrance.tables.items():
            doctor.statistics.expect_ids(name, table.size)
        return doctor

    def read(self, data: Any, batches: Any, *, strict: bool = False) -> Any:
        """Look at all batches now, or as they are read where they can be read only once.

        Args:
            data: as the caller gave it.
            batches: the same in a form whose first batch was looked at.
            strict: raise at a severe finding.

        Returns:
            What is to be read in place of `batches`.

        Raises:
            DataError: an id is outside the vocabulary (names batch, position, id and table), or `strict` is not met.
        """
        if not repeatable(data):
            return _Watched(self, batches)
        for batch in iterate(batches, self.adapter.model):
            self.take(batch, compare=True)
        if strict:
            refuse_severe(self.findings())
        return batches

    def take(self, batch: Batch, *, compare: bool) -> None:
        """Count one batch.

        Args:
            batch: the next one.
            compare: whether the model may be run on it up to its first BatchNorm.
        """
        for name, value in named_inputs(batch, self.statistics.signature).items():
            table = self.entrance.tables.get(name)
            found = None if table is None or value.is_floating_point() else out_of_vocabulary(value, table.size)
            if found is not None and table is not None:
                position, index = found
                raise DataError(
                    f"calibration batch {self.statistics.batches}: input {name!r} holds id {index} at {position}, but "
                    f"embedding {table.path!r} has ids 0 to {table.size - 1}; tokenize with this model's own "
                    "tokenizer, or resize the embedding where tokens were added"
                )
        self.statistics.update(batch)
        if compare and self.entrance.norm and batch.call is None and self._compared < _COMPARED_ROWS:
            sums = norm_sums(self.adapter.model, self.entrance.norm, lambda: batch.run(self.adapter.model))
            self.norm = sums if self.norm is None else self.norm + sums
            self._compared += batch.samples

    def findings(self) -> list[Finding]:
        """What the data alone says, worst first."""
        statistics = self.statistics
        if statistics.uncounted:
            return [
                Finding(
                    "note",
                    "length",
                    "calibration data",
                    "it is a callable that runs the model itself, so it was not examined",
                )
            ]
        share = statistics.elements / max(self.probe_elements, 1)
        found = judge_length(self.plan, {path: count * share for path, count in self.entrance.positions.items()})
        found += judge_tokens(statistics)
        found += judge_values(statistics, self.entrance, self._norm_difference())
        return sort_findings(found)

    def _norm_difference(self) -> tuple[float, float] | None:
        """(median spread, median shift) of the first BatchNorm's channels against its own statistics.

        The spread is the ratio of standard deviations, the shift the distance of the means in standard deviations.
        None where nothing was compared, on few images, or where the norm was never trained.
        """
        if self.norm is None or self._compared < 8 or not bool((self.norm[2] > 1).all()):
            return None
        module: Any = self._trained  # the adapter's own is folded by now
        mean, variance = module.running_mean.double(), module.running_var.double()
        if bool((mean == 0).all()) and bool((variance == 1).all()):
            return None
        total, squares, count = self.norm
        got = total / count
        spread = (squares / count - got.square()).clamp(min=0).sqrt() / (variance + module.eps).sqrt()
        shift = (got - mean).abs() / (variance + module.eps).sqrt()
        return float(spread.median()), float(shift.median())


class _Watched:
    """Data that can be read once, examined batch by batch on the way to the calibration pass."""

    def __init__(self, doctor: Doctor, batches: Any) -> None:
        self._doctor, self._batches = doctor, batches

    def __iter__(self) -> Iterator[Batch]:
        for batch in iterate(self._batches, self._doctor.adapter.model):
            self._doctor.take(batch, compare=False)  # hooks of the pass are in place: a second run would count twice
            yield batch


def unseen(adapter: TorchModel, plan: Plan, calibration: Calibration) -> list[Finding]:
    """What the calibration pass did not reach: modules that never ran, input channels that were always zero.

    Args:
        adapter: the float model.
        plan: what the data was for.
        calibration: what the pass saw.
    """
    calls = calibration.observation.calls
    rows = [row for row in plan.layers if row.weight is not None]
    dead = {}
    for row in rows:
        path = row.layer.sites[0].path
        sees_input = row.layer.sites[0].parameter in (
            "weight",
            "weight_ih_l0",
            "gate_up_proj",
            "up_proj",
        )  # not the hidden state
        if sees_input and calls.get(path) and path in calibration.magnitudes:
            dead[path] = _dead_channels(adapter, row, calibration.magnitudes[path].result() == 0)
    reached = {s.path: calls.get(s.path, 0) for row in rows for s in row.layer.sites}
    for path, counts in calibration.observation.experts.items():
        reached |= {f"{path}.{index}": int(count) for index, count in enumerate(counts)}
    return sort_findings(judge_reach(reached, dead))


def _dead_channels(adapter: TorchModel, row: LayerPlan, silent: Tensor) -> Dead:
    """The silent channels [channels] of a layer's input; used ones weigh at least half the median of the others."""
    count, site = int(silent.sum()), row.layer.sites[0]
    if not count or adapter.input_groups(site) > 1 or row.layer.shape[1] % silent.numel():
        return Dead(count, silent.numel(), 0)
    norms = adapter.weight(row.layer).reshape(row.layer.shape[0], silent.numel(), -1).norm(dim=(0, 2))
    usual = float(norms[~silent].median()) if count < silent.numel() else 0.0
    return Dead(count, silent.numel(), int((norms[silent] > usual / 2).sum()))


def sort_findings(found: list[Finding]) -> list[Finding]:
    """Worst first; the order within a severity stays."""
    order = {"severe": 0, "warning": 1, "note": 2}
    return sorted(found, key=lambda finding: order[finding.severity])


def refuse_severe(found: list[Finding]) -> None:
    """Raise DataError where a finding is severe: what `strict` means for data."""
    severe = [str(finding) for finding in found if finding.severity == "severe"]
    if severe:
        raise DataError(f"strict: the calibration data cannot be trusted: {'; '.join(severe)}")


def examine(model: nn.Module, recipe: str | Path | Mapping[str, Any] | Recipe, data: Any) -> list[Finding]:
    """Read calibration data once and say what is wrong with it for this model and recipe; nothing is calibrated.

    Args:
        model: with its weights; it is not changed.
        recipe: as for `quantize`.
        data: as for `quantize`; a generator is spent afterwards.

    Returns:
        Findings, worst first. What a whole pass through the model would show is not among them.

    Raises:
        RecipeError: as `plan` does.
        DataError: an id is outside the vocabulary, or the data cannot be read.
    """
    if is_onnx(model):
        raise ModelError("calibration data is examined for PyTorch models only; leave out the data of an ONNX file")
    adapter = TorchModel(model)
    batches = rewindable(data)
    doctor = Doctor.of(
        adapter, make_plan(adapter, load_recipe(recipe), FoldReport(), has_data=True), first_batch(batches, adapter)
    )
    for batch in iterate(batches, adapter.model):
        doctor.take(batch, compare=True)
    return doctor.findings()
