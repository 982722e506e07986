"""A quantized PyTorch model as an ONNX file: torch's exporter gives the graph, the checkpoint the weights."""

from __future__ import annotations

import importlib
import json
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from narrowcast.core import PerGroup
from narrowcast.data import Batch, iterate
from narrowcast.errors import DataError, ModelError
from narrowcast.export.onnx_twins import Source, float_twin
from narrowcast.models import require_onnx
from narrowcast.nn import Activation, FoldedBatchNorm, FusedActivation, is_portable


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


def onnx(quantized: Any, path: str | Path, example: Any, *, token_ranges: bool = True) -> Exported:
    """Write a quantized PyTorch model as an ONNX file that ONNX Runtime runs in integers.

    Where the model's recipe said `portable = true`, layers that would saturate on CPUs without VNNI are stored as
    uint8: the same integers, multiplied by another kernel.

    Args:
        quantized: what `nc.quantize` or `nc.qat.convert` returned, or its module.
        path: of the file, ending in .onnx.
        example: data as `nc.quantize` takes it, of which the first batch shows torch's exporter the inputs.
        token_ranges: whether linear layers that find their ranges at run time have one per token, with the module's
            codes. False gives them one per input (DynamicQuantizeMatMul): faster, and further from the float model.

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
    portable = importlib.import_module("narrowcast.models.onnx_portable").Portable(is_portable(model), exact=True)
    adapter = importlib.import_module("narrowcast.models.onnx_model").OnnxModel(
        proto, blocked=blocked, portable=portable, token_ranges=token_ranges
    )
    work = _Work(adapter, sources, {})
    notes = work.write()
    adapter.graph.metadata_props["narrowcast.layers"] = json.dumps(_told(model, sources))
    adapter.finish()
    verdict = importlib.import_module("narrowcast.models.onnx_verdict")
    kernels = verdict.kernels_of(verdict.optimized_graph(adapter.graph), adapter.codes)
    importlib.import_module("narrowcast.models.onnx_file").write_onnx(adapter.graph, path)
    rows = [work.row(name, kernels) for name in sources]
    return Exported(Path(path), rows, [*adapter.notes, *notes])


def _told(model: nn.Module, sources: dict[str, Source]) -> dict[str, Any]:
    """What the file's metadata says of every layer: formats as in the recipe, and the module that gives its output."""
    ends = {m.convolution: path for path, m in model.named_modules() if isinstance(m, FoldedBatchNorm)}
    ends |= {m.linear: path for path, m in model.named_modules() if isinstance(m, FusedActivation)}
    told = {}
    for path, source in sources.items():
        given = source.activation.spec
        told[path] = {
            "spec": str(source.record.spec), "input": "" if given is None else str(given), "end": ends.get(path, ""),
            "behind": source.behind,
        }  # fmt: skip
    return told


def float_onnx(model: nn.Module, path: str | Path, example: Any) -> None:
    """Write a float module as an ONNX file; arguments and errors are those of `onnx`."""
    require_onnx()
    proto = _exported(model, next(iter(iterate(example, model))), optimize=True)
    files = importlib.import_module("narrowcast.models.onnx_file")
    files.write_onnx(files.read_onnx(proto), path)


def _exported(twin: nn.Module, batch: Batch, *, optimize: bool = False) -> Any:
    """The float graph, its first dimension open, and the second of inputs that are tokens.

    Optimizing gives weights other names, by which the codes would not be found.
    """
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
                twin, args, kwargs=kwargs, dynamo=True, verbose=False, optimize=optimize, dynamic_shapes=shapes
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

    def write(self) -> list[str]:
        """Install every weight that is found; returns notes."""
        found = {site.parameter: layer for layer in self.adapter.layers() for site in layer.sites}
        built = importlib.import_module("narrowcast.models.onnx_model").Written
        static: dict[str, tuple[Any, Activation]] = {}
        for path, source in self.sources.items():
            layer = found.get(f"{path}.weight" if path else "weight")
            if layer is None or layer.reason or layer.type == "Parameter":
                why = "torch's exporter left no weight of this name" if layer is None else layer.reason
                self.done[path] = ([], f"float: {why}")
                continue
            possible = self.adapter.possible(layer, source.record.spec, source.activation.spec)
            if possible.weight is None:
                self.done[path] = ([], f"float: {possible.reason}")
                continue
            exact = Activation(possible.input).mode == "static" and source.activation.scale is not None
            self.done[path] = ([site.path for site in layer.sites], possible.fallback or "" if exact else "; ".join(
                part for part in (possible.fallback, possible.reason) if part
            ))  # fmt: skip
            for site in layer.sites:
                if exact and self.adapter.takes_activation(site):
                    static[site.path] = source.record, source.activation
                    continue
                given = Activation(possible.input) if self.adapter.takes_activation(site) else Activation()
                record = self.adapter.fitting(site.path, source.record, given)
                self.adapter.install(site.path, built(record, given))
        return self._raised(self.adapter.write_products(static))

    def _raised(self, raised: dict[str, int]) -> list[str]:
        """Notes on channels whose bias does not fit into int32 in the scale of the sums."""
        return [
            f"{path}: {count} channels have larger scales, so that their bias fits into int32; their weights are small "
            "beside it" for path, count in raised.items()
        ]  # fmt: skip

    def row(self, path: str, kernels: Any) -> ExportedLayer:
        """What became of one module."""
        sites, note = self.done[path]
        runs = [kernels[site] for site in sites]
        kernel = ", ".join(sorted({str(run) for run in runs})) or "float"
        spec = self.sources[path].record.spec
        if runs and spec.format.is_cast:
            kernel = "cast when loading, product in float"
        return ExportedLayer(path, str(spec), kernel, bool(runs) and all(run.integer for run in runs), note)
