"""A static page that runs a quantized model in the browser, beside its float32 original: files, nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from narrowcast.core import sqnr_db
from narrowcast.errors import DataError, ModelError
from narrowcast.export.artefact import Artefact, write_artefact
from narrowcast.export.checkpoint_files import staged
from narrowcast.export.web_examples import PICTURES, complete, first_samples
from narrowcast.export.web_options import PageOptions
from narrowcast.export.web_ports import Port, Question, ports
from narrowcast.export.web_question import question, trial
from narrowcast.export.web_runtime import copy_runtime, runtime_files, try_models
from narrowcast.export.web_shown import notes_of, predicts, shown
from narrowcast.export.web_text import longest, writes
from narrowcast.models.onnx_file import read_onnx
from narrowcast.models.onnx_session import OnnxModule, feeds_of, run_session

PAGE, WHAT = "page.json", "page of narrowcast"
_FORMAT = "narrowcast page 1"
_SOURCES = Path(__file__).with_name("web_page")
_FOLDERS = ("runtime", "examples")
# A wasm memory has at most 4 GB, and holds the file, the weights and the values at once.
_LARGEST = 1_500_000_000
_LIKE = 20.0  # dB: WebAssembly answers what the CPU answers


@dataclass(frozen=True)
class Page:
    """A page that was written.

    Args:
        path: its folder.
        files: bytes of every file.
        facts: page.json: what is asked, what is shown, sizes.
        runtime: version of onnxruntime-web.
        parity: per model the SQNR in dB of WebAssembly's output against ONNX Runtime's on the CPU; empty where there
            was no Node.js to try it in.
        notes: what differs from the source, and why.
        warnings: what is doubtful.
    """

    path: Path
    files: dict[str, int]
    facts: dict[str, Any]
    runtime: str
    parity: dict[str, float]
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def web(
    quantized: Any, directory: str | Path, example: Any = None, *, reference: Any = None,
    options: PageOptions | None = None, runtime: str | Path | None = None,
) -> Page:  # fmt: skip
    """Write a folder that runs a model in any browser, from any static server, without a network.

    Args:
        quantized: what `nc.quantize` returned, its module, or the path of an .onnx file.
        directory: absent, empty, or an earlier page, which is replaced in one step.
        example: calibration data; PyTorch models need it, and the page offers its first samples.
        reference: the float32 model, of the same kinds, whose answers and times stand beside; None for none.
        options: how inputs are prepared and what outputs are called.
        runtime: folder of an installed onnxruntime-web; None lets npm install it for the time.

    Returns:
        What was written.

    Raises:
        ModelError: the model cannot be written as ONNX, is too large for a browser, or does not run in WebAssembly.
        DataError: the options do not fit the model.
        KernelError: there is no npm, or onnxruntime-web is not where `runtime` says.
        CheckpointError: the directory holds something else, or the disk refuses.
    """
    target, options = Path(directory), options or PageOptions()
    with staged(target, foreign=foreign_to_page, what=WHAT) as folder:
        models = {"quantized": write_artefact(quantized, folder / "quantized.onnx", example)}
        if reference is not None:
            models["float32"] = write_artefact(reference, folder / "float32.onnx", example)
        with runtime_files(None if runtime is None else Path(runtime)) as found:
            version = copy_runtime(found, folder / "runtime")
        made = _Making(folder, models, options, example)
        facts, parity, warnings = made.page(Path(quantized).stem if isinstance(quantized, str | Path) else target.name)
        sizes = {
            path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()
        }
    notes = [f"{name}: {note}" for name, model in models.items() for note in model.notes]
    return Page(target, dict(sorted(sizes.items())), facts, version, parity, [*notes, *facts["notes"]], warnings)


def foreign_to_page(folder: Path) -> list[str] | None:
    """Names in a folder that are not a page's; None where it is no page at all."""
    try:
        known = json.loads((folder / PAGE).read_text(encoding="utf-8")).get("format") == _FORMAT
    except (OSError, ValueError, AttributeError):
        return None
    ours = {path.name for path in _SOURCES.iterdir()} | {PAGE, "quantized.onnx", "float32.onnx", *_FOLDERS,
                                                         "tokenizer.json", "vocab.json"}  # fmt: skip
    return sorted(path.name for path in folder.iterdir() if path.name not in ours) if known else None


class _Making:
    """Fills a folder in which models and runtime lie already.

    Args:
        folder: to fill.
        models: by name, "quantized" first.
        options: see `web`.
        example: see `web`.
    """

    def __init__(self, folder: Path, models: Mapping[str, Artefact], options: PageOptions, example: Any) -> None:
        self.folder, self.models, self.options, self.example = folder, models, options, example
        self.modules = {name: _opened(model.path, name) for name, model in models.items()}
        self.inputs, self.outputs = _same_ports(self.modules)

    def page(self, name: str) -> tuple[dict[str, Any], dict[str, float], list[str]]:
        """Write everything; returns page.json, parity, warnings."""
        asked = question(self.inputs, self.options)
        samples = first_samples(self.example, self.modules["quantized"], PICTURES)
        feeds = {key: array[:1] for key, array in samples.items()} or trial(asked, self.inputs)
        answers = self._answers(feeds)
        show = self._shown(asked, answers["quantized"].shape)
        complete(asked, show, samples, self.example, self.folder)
        parity, warnings = self._parity(feeds, answers)
        if not self.models["quantized"].quantized:
            warnings.append("nothing in the model is quantized; quantize it first, and give this one as --float")
        facts = {
            "format": _FORMAT, "title": self.options.title or name, "models": self._listed(), "ask": asked.ask,
            "show": show, "runs": self.options.runs, "warmup": self.options.warmup, "notes": notes_of(asked, show),
        }  # fmt: skip
        for source in _SOURCES.iterdir():
            shutil.copyfile(source, self.folder / source.name)
        for key, file in asked.files.items():
            shutil.copyfile(file, self.folder / key)
        (self.folder / PAGE).write_text(json.dumps(facts, ensure_ascii=False, indent=1), encoding="utf-8")
        return facts, parity, warnings

    def _shown(self, asked: Question, shape: tuple[int, ...]) -> dict[str, Any]:
        """What is made of the output; of texts, also how many tokens the model takes."""
        module, output = next(reversed(self.modules.values())), self.outputs[0].name  # float32 where it is there

        def run(feeds: Mapping[str, Any]) -> Any:
            return _answer(module, feeds, output)

        if asked.ask["kind"] == "text":
            asked.ask["limit"] = longest(run, asked, self.inputs)
        next_token = predicts(asked, shape, self.options) and writes(run, asked, self.inputs)
        return shown(asked, shape, self.options, output, next_token=next_token)

    def _answers(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """What ONNX Runtime on the CPU says, per model."""
        try:
            return {key: _answer(module, feeds, self.outputs[0].name) for key, module in self.modules.items()}
        except DataError as error:
            if self.example is not None:
                raise
            raise DataError(f"an input made up of zeros or noise was tried; give real data (--data): {error}") from None

    def _listed(self) -> list[dict[str, Any]]:
        recipe = json.loads(self.modules["quantized"].graph.metadata_props.get("narrowcast.recipe", "{}"))
        names = {"quantized": recipe.get("name") or "quantized", "float32": "float32"}
        return [
            {"name": name, "label": names[name], "file": model.path.name, "bytes": model.path.stat().st_size}
            for name, model in self.models.items()
        ]

    def _parity(self, feeds: Mapping[str, Any], answers: Mapping[str, Any]) -> tuple[dict[str, float], list[str]]:
        """How near WebAssembly comes to the CPU, in dB per model, and what is doubtful about it."""
        paths = {name: model.path for name, model in self.models.items()}
        tried = try_models(self.folder / "runtime", paths, feeds, self.outputs[0].name)
        if tried is None:
            return {}, ["there is no Node.js to try the models in: whether a browser runs them is not known"]
        parity = {
            name: sqnr_db(torch.from_numpy(answers[name].reshape(-1).astype(np.float64)), torch.from_numpy(given))
            for name, given in tried.items()
        }
        return parity, [
            f"WebAssembly's answer of the {name} model is only {value:.1f} dB near to the CPU's; its kernels "
            "round elsewhere, so judge the accuracy on the page itself"
            for name, value in parity.items() if value < _LIKE
        ]  # fmt: skip


def _opened(path: Path, name: str) -> OnnxModule:
    if path.stat().st_size > _LARGEST or path.with_name(f"{path.name}.data").exists():
        raise ModelError(
            f"the {name} model has more than {_LARGEST:,} bytes, and WebAssembly has 4 GB for everything; quantize it "
            "to fewer bits, or leave out the float32 model"
        )
    return OnnxModule(read_onnx(path), path.name)


def _same_ports(modules: Mapping[str, OnnxModule]) -> tuple[list[Port], list[Port]]:
    """Inputs and outputs, which the models have in common."""
    every = {
        name: (ports(module.session.get_inputs()), ports(module.session.get_outputs()))
        for name, module in modules.items()
    }
    inputs, outputs = every["quantized"]
    if not inputs:
        raise ModelError("the model has no input, so a page has nothing to ask for")
    for name, (other, given) in every.items():
        if list(map(_face, other)) != list(map(_face, inputs)) or given[0].name != outputs[0].name:
            raise ModelError(
                f"the {name} model has the inputs {[p.name for p in other]} and the output {given[0].name!r}, the "
                f"quantized one {[p.name for p in inputs]} and {outputs[0].name!r}; give the model it was made of"
            )
    return inputs, outputs


def _face(port: Port) -> tuple[str, str, int]:
    """What must be the same of an input; sides may be open in one model only."""
    return port.name, port.type, len(port.shape)


def _answer(module: OnnxModule, feeds: Mapping[str, Any], output: str) -> Any:
    typed = feeds_of(module.session, module.input_names, (), feeds)
    (answer,) = run_session(module.session, [output], typed)
    return np.asarray(answer)
