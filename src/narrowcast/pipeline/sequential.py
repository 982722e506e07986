"""Block after block: what a block's layers get is seen with the blocks before it quantized, and only then solved.

Inside a block the layers are taken in the order in which they run; those that read the same tensor (queries, keys and
values) are seen and solved together, and the next ones see what these have become (Frantar et al. 2022,
arXiv:2210.17323, "true sequential"). One group's statistics and one block's activations are in memory at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from narrowcast.errors import DataError, FormatError, ModelError
from narrowcast.methods import BlockMethod, Seen, make_method
from narrowcast.models import ModelBlock, find_blocks
from narrowcast.models.modules import get_module
from narrowcast.pipeline.block_view import LayerUse, ModuleBlock
from narrowcast.pipeline.resume import Journal
from narrowcast.pipeline.solve import Job, Treatment, choose_treatment, install_, speaker
from narrowcast.pipeline.solve_weight import Task, column_ratio, described, needs_of, task_of, why_not_method
from narrowcast.pipeline.streams import Call, Recording, Stream, keep, reached_by, without_cache
from narrowcast.pipeline.watchers import Hooks, Inside, Watcher
from narrowcast.planning import LayerPlan, Plan
from narrowcast.progress import progress_steps
from narrowcast.report import LayerOutcome

# More groups than this in one block (a mixture of many experts): the rest is seen in one pass.
_MOST_GROUPS = 16


def wants_blocks(plan: Plan) -> bool:
    """Whether the plan is to be carried out block after block."""
    if plan.recipe.sequential is True:
        return True
    return any(needs_of(row) for row in plan.layers)


def solve_in_blocks(
    job: Job, recording: Recording, *, journal: Journal | None, progress: bool
) -> tuple[list[LayerOutcome], list[str]]:
    """Quantize and install every planned weight, block after block.

    Args:
        job: with a calibration that has seen all data once; its model is changed.
        recording: the first calls of the model in that pass.
        journal: where finished blocks are written and found again; None keeps none.
        progress: whether to show it, with the time left.

    Returns:
        One outcome per weight of the plan, and notes.
    """
    units = job.units()
    first = recording.calls[0]
    found = find_blocks(job.adapter.model, units, lambda: _without_gradient(first, job.adapter.model))
    calls, notes = keep(recording, found)
    blocks = [*found.blocks, *([ModelBlock("", found.loose)] if found.loose else [])]
    twin = job.adapter.twin()
    with without_cache(twin):
        reached = reached_by(twin, blocks, calls)
    streams = [Stream(model, blocks, calls, reached) for model in (lambda: job.adapter.model, lambda: twin)]
    work = _Work(job, blocks, *streams)
    notes = [*found.notes, *notes, *work.tied_notes()]
    with progress_steps("quantizing", len(units), enabled=progress) as step, without_cache(job.adapter.model, twin):
        for index, block in enumerate(blocks):
            mine = {path: units[path] for path in work.paths_of(index)}
            if not mine:
                continue  # its weight is tied to that of a later block
            if journal is None or not journal.restore_(job, index, mine):
                work.solve_(index)
                if journal is not None:
                    journal.write(job, index, mine)
            step(block.path or "the model", advance=len(mine))
    return job.outcomes(), notes + work.notes


def _without_gradient(call: Call, model: nn.Module) -> None:
    with torch.no_grad(), without_cache(model):
        call.run(model)


class _Work:
    """The job, with the streams that run through the blocks.

    Args:
        job: what is to be done.
        blocks: in the order in which they run.
        quantized: the model whose finished blocks are quantized.
        reference: the float model.
    """

    def __init__(self, job: Job, blocks: Sequence[ModelBlock], quantized: Stream, reference: Stream) -> None:
        self.job, self.blocks, self.reference = job, blocks, reference
        self.sequential = job.plan.recipe.sequential is not False
        self.stream = quantized if self.sequential else reference
        self.units = job.units()
        self.homes = _homes(self.units, blocks)
        self._compensate_alone_()
        self.notes: list[str] = []

    def _compensate_alone_(self) -> None:
        """What the default would learn by block is compensated for where it is all of its block.

        Without anything behind the product, the Hessian says exactly what learning has to find out from samples.
        """
        alone = {path for block in self.blocks if block.layers == (block.path,) for path in block.layers}
        for path in alone & self.units.keys():
            rows = self.units[path]
            self.units[path] = [replace(r, method={"gptq": {}}) if r.chosen and self._by_block(r) else r for r in rows]

    def paths_of(self, index: int) -> list[str]:
        """Modules that are replaced with a block: its own in the order in which they run, then others tied to them."""
        mine = [path for path in self.units if self.homes[path] == index]
        own = [path for path in self.blocks[index].layers if path in mine]
        return own + [path for path in mine if path not in own]

    def tied_notes(self) -> list[str]:
        """Weights that stay float in one place until a later one that multiplies them is reached."""
        notes = []
        for path, rows in self.units.items():
            own = next(i for i, block in enumerate(self.blocks) if path in block.layers)
            if own != self.homes[path]:
                notes += [f"{row.layer.name} is tied: solved for {speaker(row.layer)}, float before" for row in rows]
        return list(dict.fromkeys(notes))

    def solve_(self, index: int) -> None:
        """Quantize one block."""
        paths = self.paths_of(index)
        whole = [path for path in paths if any(self._by_block(row) for row in self.units[path])]
        single = [path for path in paths if path not in whole]
        for group in self._groups(index, single):
            self._observe(index, group)
            for path in group:
                install_(self.job, path, self.units[path])
            self.job.calibration.evidence.clear()
        if whole:
            self._solve_together_(index, whole)
            self.job.calibration.evidence.clear()

    def _by_block(self, row: LayerPlan) -> bool:
        job = self.job
        return "block" in needs_of(row) and not why_not_method(job.adapter, row, job.calibration)

    def _wanted(self, path: str) -> frozenset[str]:
        """What is to be observed at a module: needs of its solvers, "range" for a static range."""
        job, calibration = self.job, self.job.calibration
        rows = [row for row in self.units[path] if row.layer.name not in job.solved]
        site = next((site for row in rows for site in row.layer.sites if site.path == path), None)
        if site is None or not job.adapter.takes_activation(site):
            return frozenset()  # tied to what is solved already, or looked up
        needs: set[str] = set()
        for row in rows:
            if not why_not_method(job.adapter, row, calibration):
                needs |= needs_of(row)
        if self.sequential and (path in calibration.ranges or path in calibration.channel_ranges):
            needs.add("range")
        if not self.sequential or any(block.path == "" and path in block.layers for block in self.blocks):
            needs.discard("drift")  # the float model's own input, or no block whose inputs both models have
        return frozenset(needs)

    def _groups(self, index: int, paths: list[str]) -> list[list[str]]:
        """The modules in the order in which they run, those that read the same tensor together."""
        watched = [path for path in paths if self._wanted(path)]
        if len(watched) < 2 or self.blocks[index].path == "":
            return [paths] if paths else []
        self.stream.enter(index)
        order: dict[str, Any] = {}
        for number in range(len(self.stream.inputs)):
            missing = [path for path in paths if path not in order]
            if not missing:
                break
            with self._hooked(missing, lambda path, x: order.setdefault(path, x)):
                self.stream.run_until(number, missing)
        groups: list[list[str]] = []
        before: Any = None
        for path, x in order.items():
            if groups and (x is before or len(groups) >= _MOST_GROUPS):
                groups[-1].append(path)
            else:
                groups.append([path])
            before = x
        if len(groups) >= _MOST_GROUPS and len(groups[-1]) > 1:
            self.notes.append(f"{self.blocks[index].path}: more than {_MOST_GROUPS} steps; the last ones seen together")
        rest = [path for path in paths if path not in order]
        return [*groups, rest] if rest else groups

    def _hooked(self, paths: Sequence[str], see: Callable[[str, Any], object], inside: Inside | None = None) -> Hooks:
        return Hooks(self.stream.model(), paths, see, inside)

    def _observe(self, index: int, paths: Sequence[str]) -> None:
        """Run the block for every call and keep what the solvers of these modules ask for."""
        watchers = {path: self._watchers(path, wanted) for path in paths if (wanted := self._wanted(path))}
        if not watchers:
            return
        self.stream.enter(index)
        drifting = [path for path, watcher in watchers.items() if "drift" in watcher.wanted]
        exact: dict[str, list[Tensor]] = {}

        def see(path: str, x: Tensor) -> None:
            waiting = exact.get(path)
            try:
                watchers[path].see(x, waiting.pop(0) if waiting else None)
            except DataError as error:
                raise DataError(f"layer {path!r}, behind quantized blocks: {error}") from None

        with self._hooked(list(watchers), see, lambda path, args, kwargs: watchers[path].see_inside(args, kwargs)):
            for number in range(len(self.stream.inputs)):
                if drifting:
                    exact = self._float_inputs(index, number, drifting)
                if self.blocks[index].path == "":
                    self.stream.run(number)
                else:
                    self.stream.run_until(number, list(watchers))
        for watcher in watchers.values():
            watcher.finish_(self.job.calibration)

    def _float_inputs(self, index: int, number: int, paths: Sequence[str]) -> dict[str, list[Tensor]]:
        """What the float model has at these modules for one call, in the order of their calls."""
        self.reference.enter(index)
        found: dict[str, list[Tensor]] = {path: [] for path in paths}
        # a copy: what computes behind may write into it
        with Hooks(self.reference.model(), paths, lambda path, x: found[path].append(x.detach().clone())):
            self.reference.run_until(number, paths)
        return found

    def _watchers(self, path: str, wanted: frozenset[str]) -> Watcher:
        return Watcher(self.job, path, wanted, len(self.stream.calls))

    def _solve_together_(self, index: int, paths: list[str]) -> None:
        """Give the whole block to its solvers, and install what they make of it."""
        job = self.job
        self._observe(index, paths)
        treatments: dict[str, Treatment] = {}
        for path in paths:
            treatments[path] = choose_treatment(job, path, self.units[path])
            job.shared.choose(path, treatments[path][0])
        rows = {row.layer.name: row for path in paths for row in self.units[path] if self._by_block(row)}
        tasks = {n: task_of(job.adapter, r, job.calibration, treatments[speaker(r.layer)][0]) for n, r in rows.items()}
        methods: dict[str, list[str]] = {}
        for name, row in rows.items():
            methods.setdefault(repr(row.method), []).append(name)
        for names in methods.values():
            started = time.perf_counter()
            view = self._view(index, {name: tasks[name] for name in names}, treatments)
            method = cast(BlockMethod, make_method(rows[names[0]].method))
            try:
                solved = method.solve_block(view)
            except (FormatError, ModelError, DataError) as error:
                raise type(error)(f"block {self.blocks[index].path!r}: {error}") from None
            seconds = (time.perf_counter() - started) / len(names)
            for name in names:
                job.solved[name] = described(tasks[name], solved[name], next(iter(rows[name].method)), seconds)
                path = speaker(rows[name].layer)
                treatments[path] = _refined(treatments[path], solved[name].input_factor)
        for path in paths:
            install_(job, path, self.units[path], treatments[path])

    def _view(self, index: int, tasks: dict[str, Task], treatments: dict[str, Treatment]) -> ModuleBlock:
        """The block as a solver sees it: weights that are solved already are what they have become."""
        job, block = self.job, self.blocks[index]
        self.stream.enter(index)
        self.reference.enter(index)
        if any(call.runner is not None for call in self.stream.calls) and block.path == "":
            raise DataError(
                "the data is a callable that never calls the model's forward, so no block's inputs are known; give "
                "batches, or a method that works layer by layer"
            )
        pairs = [
            (given, wanted)
            for given, wanted in zip(self.stream.inputs, self.reference.outputs(), strict=True)
            if given is not None and wanted is not None
        ]
        uses, fixed = {}, {}
        for path in self.paths_of(index):
            for row in self.units[path]:
                if speaker(row.layer) != path or path not in block.layers:
                    continue
                solved, name = job.solved.get(row.layer.name), row.layer.name
                treatment = treatments[path] if path in treatments else job.modules[path][0].treatment
                site = next(site for site in row.layer.sites if site.path == path)
                inside = path if block.path == "" else path[len(block.path) + 1 :]
                ratio = tasks[name].ratio if name in tasks else column_ratio(job.adapter, row, treatment[0])
                assert row.weight is not None
                own = treatment[0].mode == "static" and len(row.layer.sites) == len(self.units[path]) == 1
                own = own and job.shared.is_alone(path)
                uses[name] = LayerUse(inside, site.parameter, row.weight, treatment[0], ratio, adjustable=own)
                if solved is not None:
                    fixed[name] = solved.record.dequantize()
        return ModuleBlock(
            job.adapter, get_module(self.reference.model(), block.path), uses,
            {name: task.weight for name, task in tasks.items()}, fixed,
            {name: task.seen or Seen() for name, task in tasks.items()},
            [given for given, _ in pairs], [wanted for _, wanted in pairs],
        )  # fmt: skip


def _refined(treatment: Treatment, factor: float) -> Treatment:
    """The treatment of an input whose static scale a solver has multiplied."""
    activation, text = treatment
    return treatment if factor == 1 else (activation.scaled(factor), f"{text} times {factor:.3g}")


def _homes(units: dict[str, list[LayerPlan]], blocks: Sequence[ModelBlock]) -> dict[str, int]:
    """The block that each module is replaced with: of tied weights the last one that multiplies them."""
    own = {path: index for index, block in enumerate(blocks) for path in block.layers}
    homes = {path: own[path] for path in units}
    for rows in units.values():
        for row in rows:
            paths = [site.path for site in row.layer.sites]
            multiplying = [site.path for site in row.layer.sites if site.type != "Embedding"] or paths
            last = max(own[path] for path in multiplying)
            for path in paths:
                homes[path] = max(homes[path], last)
    return homes
