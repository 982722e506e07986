"""The models of `python -m benchmarks.onnx` behind one face: a float32 ONNX file, its calibration data, its score."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import onnx_vad
from benchmarks.accuracy import sqnr_db
from benchmarks.kit import KitModel, kit_model
from benchmarks.low_bits_score import figures as kit_figures
from benchmarks.peers_low_bits import onnx_graph

Feeds = dict[str, Any]
Infer = Callable[[Feeds], list[Any]]
KIT = ("mobilenetv1", "resnet20", "mobilenetv2", "squeezenet11", "textgenrnn", "stories260k", "minilm")
CASES = (*KIT, *onnx_vad.FILES)


@dataclass(frozen=True)
class Case:
    """One model of the table.

    Attributes:
        name: how the page calls it.
        kind: as `KitModel.kind`, or "vad".
        metric: as `KitModel.metric`, or "auc" (times 100).
        shapes: of the inputs that are timed.
        export: writes the float32 file at a path.
        calibration: (float32 session, names of the inputs) -> batches, none of them scored.
        outputs: (session, names, samples) -> the answers [rows, features] to be scored.
        figures: (samples, answers of float32, answers) -> the score, its interval, the fidelity.
        example: (shape, names) -> one batch of real input.
    """

    name: str
    kind: str
    metric: str
    shapes: tuple[tuple[int, ...], ...]
    export: Callable[[Path], None]
    calibration: Callable[[Infer, list[str]], list[Feeds]]
    outputs: Callable[[Infer, list[str], str], Tensor]
    figures: Callable[[str, Tensor, Tensor], dict[str, Any]]
    example: Callable[[tuple[int, ...], list[str]], Feeds]

    @property
    def higher_is_better(self) -> bool:
        """Whether a larger score is the better one."""
        return self.metric != "perplexity"


def case(name: str) -> Case:
    """The model of one of CASES."""
    return _of_vad(name) if name in onnx_vad.FILES else _of_kit(kit_model(name))


def _of_kit(kit: KitModel) -> Case:
    def export(path: Path) -> None:
        onnx_graph.export(kit, path.parent).rename(path)

    def calibration(infer: Infer, names: list[str]) -> list[Feeds]:
        return [onnx_graph.feeds(names, batch) for batch in kit.calibration()]

    def outputs(infer: Infer, names: list[str], samples: str) -> Tensor:
        call = onnx_graph.answering(kit, names, lambda feeds: infer(feeds)[0])
        return kit.outputs(call, kit.sets[samples])  # type: ignore[arg-type]  # called only

    def figures(samples: str, expected: Tensor, got: Tensor) -> dict[str, Any]:
        return kit_figures(kit, samples, expected, got)

    def example(shape: tuple[int, ...], names: list[str]) -> Feeds:
        return onnx_graph.feeds(names, kit.example(shape))

    shapes = {"encoder": ((1, 128), (8, 64)), "decoder": ((1, 128),)}.get(kit.kind, kit.shapes)
    return Case(kit.name, kit.kind, kit.metric, shapes, export, calibration, outputs, figures, example)


def _of_vad(name: str) -> Case:
    def export(path: Path) -> None:
        shutil.copyfile(onnx_vad.source(name), path)

    def figures(samples: str, expected: Tensor, got: Tensor) -> dict[str, Any]:
        return onnx_vad.figures(samples, expected, got) | {"sqnr_db": sqnr_db(expected, got)}

    def example(shape: tuple[int, ...], names: list[str]) -> Feeds:
        audio = onnx_vad.clips()[onnx_vad.CALIBRATION_CLIPS][0]
        state = torch.zeros(2, 1, 128).numpy()
        given = {"input": list(onnx_vad.frames(audio))[50], "state": state, "sr": torch.tensor(onnx_vad.RATE).numpy()}
        return {key: given[key] for key in names}

    return Case(
        name, "vad", "auc", ((1, 576),), export, onnx_vad.calibration, onnx_vad.outputs, figures, example
    )  # fmt: skip
