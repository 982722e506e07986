"""A quantized PyTorch model as an ONNX file: torch's exporter gives the graph, the checkpoint the weights."""

from __future__ import annotations

import importlib
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from narrowcast.core import PerGroup, QuantSpec, choose_scale
from narrowcast.data import Batch, iterate
from narrowcast.errors import DataError, ModelError
from narrowcast.export.onnx_twins import Source, float_twin
from narrowcast.models import Layer, require_onnx
from narrowcast.nn import Activation
from narrowcast.observers import make_observer

_STATIC = QuantSpec.parse("uint8/tensor")


@dataclass(frozen=True)
class ExportedLayer:
    """What became of one quantized module.

    Args:
        layer: its path.
        spec: format of its weight.
        kernel: what ONNX Runtime runs.
        integer: whether that multiplies integers.
        note: where ONNX differs from the module, how; "" where it does not.
    """

    layer: str
    spec: str
    kernel: str
    integer: bool
    note: str = ""


@dataclass(frozen=True)
class Exported:
    """What was written.

    Args:
        path: the file.
        layers: one entry per quantized module.
        notes: what concerns no single layer.
    """

    path: Path
    layers: list[ExportedLayer]
    notes: list[str]

    def __str__(self) -> str:
        rows = [f"{r.layer}: {r.spec}, {r.kernel}" + (f" ({r.note})" if r.note else "") for r in self.layers]
        return "\n".join([str(self.path), *rows, *(f"note: {note}" for note in self.notes)])


def onnx(quantized: Any, path: str | Path, example: Any) -> Exported:
    """Write a quantized PyTorch model as an ONNX file that ONNX Runtime runs in integers.

    Args:
        quantized: what `nc.quantize` or `nc.qat.convert` returned, or its module.
        path: of the file, ending in .onnx.
        example: calibration data as `nc.quantize` takes it. Its first batch shows torch's exporter the inputs, and all
            of it the ranges of the outputs of static convolutions, which only ONNX rounds to 8 bits.

    Returns:
        What ONNX Runtime runs for every layer, and where it differs.

    Raises:
        ModelError: a module has no form in ONNX, or torch cannot export the model.
        DataError: the example does not run through the model.
        CheckpointError: the file cannot be written.
    """
    model = getattr(quantized, "model", quantized)
    if not isinstance(model, nn.Module):
        raise ModelError(f"expected a quantized model, got {type(model).__name__}; pass what nc.quantize returned")
    require_onnx()
    twin, sources = float_twin(model)
    batch = next(iter(iterate(example, twin)))
    proto = _exported(twin, batch)
    blocked = any(s.record.spec.format.bits < 8 or isinstance(s.record.spec.granularity, PerGroup) for s in
                  sources.values())  # fmt: skip
    adapter = importlib.import_module("narrowcast.models.onnx_model").OnnxModel(
        proto, blocked=blocked, portable=bool(getattr(getattr(quantized, "recipe", None), "portable", False))
    )
    work = _Work(adapter, sources, {})
    notes = work.write(example)
    adapter.finish()
    verdict = importlib.import_module("narrowcast.models.onnx_verdict")
    kernels = verdict.kernels_of(verdict.optimized_graph(adapter.graph), adapter.codes)
    importlib.import_module("narrowcast.models.onnx_file").write_onnx(adapter.graph, path)
    rows = [work.row(name, kernels) for name in sources]
    return Exported(Path(path), rows, [*adapter.notes, *notes])


def _exported(twin: nn.Module, batch: Batch) -> Any:
    """The float graph, its first dimension open, and the second of inputs that are tokens."""
    if batch.call is not None:
        raise DataError("the example is a callable; pass a batch of inputs, which torch's exporter can see")
    if importlib.util.find_spec("onnxscript") is None:
        raise ModelError("torch's exporter needs onnxscript: pip install 'narrowcast[onnx]'")
    args = tuple(_two_rows(value) for value in batch.args)
    kwargs = {name: _two_rows(value) for name, value in batch.kwargs.items()}
    shapes: Any = {name: _open_dimensions(value) for name, value in kwargs.items()} if kwargs else tuple(
        _open_dimensions(value) for value in args
    )  # fmt: skip
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                twin, args, kwargs=kwargs, dynamo=True, verbose=False, optimize=False, dynamic_shapes=shapes
            )
        assert program is not None
        return program.model_proto
    except Exception as error:  # the exporter fails in any way; its words are kept
        raise ModelError(f"torch.onnx.export: {type(error).__name__}: {error!s:.500}") from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _two_rows(value: Any) -> Any:
    """A batch of at least two rows: the exporter takes one for a fixed number."""
    return torch.cat([value, value]) if isinstance(value, Tensor) and value.dim() and value.shape[0] == 1 else value


def _open_dimensions(value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.dim():
        return None
    tokens = value.dim() == 2 and not value.is_floating_point()
    return {0: torch.export.Dim.AUTO, **({1: torch.export.Dim.AUTO} if tokens else {})}


@dataclass
class _Work:
    """Puts the integers of the modules into the exported graph."""

    adapter: Any
    sources: dict[str, Source]
    done: dict[str, tuple[list[str], str]]

    def write(self, example: Any) -> list[str]:
        """Install every weight that is found; returns notes."""
        found = {site.parameter: layer for layer in self.adapter.layers() for site in layer.sites}
        planned: list[tuple[str, Layer, Any]] = []
        for path, source in self.sources.items():
            layer = found.get(f"{path}.weight" if path else "weight")
            if layer is None or layer.reason or layer.type == "Parameter":
                why = "torch's exporter left no weight of this name" if layer is None else layer.reason
                self.done[path] = ([], f"float: {why}")
                continue
            given = source.activation.spec
            possible = self.adapter.possible(layer, source.record.spec, given)
            if possible.weight is None:
                self.done[path] = ([], f"float: {possible.reason}")
                continue
            self.done[path] = ([site.path for site in layer.sites], "; ".join(
                part for part in (source.note, possible.fallback, "" if source.note else possible.reason) if part
            ))  # fmt: skip
            planned.append((path, layer, possible.input))
        static = [site.path for path, layer, given in planned for site in layer.sites
                  if given == _STATIC and self.sources[path].activation.scale is not None]  # fmt: skip
        ranges, notes = self._ranges(static, example)
        built = importlib.import_module("narrowcast.models.onnx_model").Written
        for path, layer, given in planned:
            for site in layer.sites:
                activation = Activation() if given is None or not self.adapter.takes_activation(site) else (
                    _static_activation(ranges[self.adapter.placement.source(self.adapter.input_value(site.path))])
                    if site.path in static else Activation(given)
                )  # fmt: skip
                record = self.adapter.fitting(site.path, self.sources[path].record, activation)
                self.adapter.install(site.path, built(record, activation))
        self.adapter.put_ranges(static, ranges)
        return notes

    def _ranges(self, static: list[str], example: Any) -> tuple[dict[str, tuple[float, int]], list[str]]:
        """Scale and zero point of every value with a range: of inputs the modules', of others from the example."""
        if not static:
            return {}, []
        names = self.adapter.place_ranges(static)
        known: dict[str, tuple[float, int]] = {}
        for path, (sites, _) in self.done.items():
            activation = self.sources[path].activation
            for site in set(sites) & set(static):
                assert activation.scale is not None and activation.zero_point is not None
                source = self.adapter.placement.source(self.adapter.input_value(site))
                known.setdefault(source, (float(activation.scale), int(activation.zero_point)))
        missing = {name: make_observer("minmax") for name in names if name not in known}
        if not missing:
            return known, []
        self.adapter.observe(example, {}, {name: [observer.update] for name, observer in missing.items()})
        for name, observer in missing.items():
            low, high = observer.range()
            scale, zero = choose_scale(torch.tensor([[low]]), torch.tensor([[high]]), _STATIC)
            assert zero is not None
            known[name] = (float(scale), int(zero))
        note = (
            f"{len(missing)} outputs are rounded to 8 bits, as ONNX Runtime's integer kernels have it; their ranges "
            "are those of the example"
        )
        return known, [note]

    def row(self, path: str, kernels: Any) -> ExportedLayer:
        """What became of one module."""
        sites, note = self.done[path]
        runs = [kernels[site] for site in sites]
        kernel = ", ".join(sorted({str(run) for run in runs})) or "float"
        spec = self.sources[path].record.spec
        if runs and spec.format.is_cast:
            kernel = "cast when loading, product in float"
        return ExportedLayer(path, str(spec), kernel, bool(runs) and all(run.integer for run in runs), note)


def _static_activation(range_: tuple[float, int]) -> Activation:
    scale, zero = range_
    return Activation(_STATIC, torch.tensor([scale]), torch.tensor([zero], dtype=torch.uint8))
