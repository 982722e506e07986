"""A kit model as one ONNX file for inputs of any batch size and length, and what answers in its place."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from benchmarks.kit import Batch, KitModel

WEIGHTED = ("MatMul", "Gemm", "Conv")


class EncoderStates(nn.Module):
    """An encoder that answers with its token states only."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[B, T] ids and mask -> [B, T, features]."""
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def export(kit: KitModel, folder: Path) -> Path:
    """Writes the float32 model with batch and tokens left open.

    Args:
        kit: a CNN, encoder or decoder.
        folder: where model.onnx goes.

    Returns:
        The file; its weights are inside.
    """
    for name in ("torch.onnx", "onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.ERROR)
    path = folder / "model.onnx"
    batch, tokens = torch.export.Dim("batch", min=1, max=4096), torch.export.Dim("tokens", min=2, max=512)
    model, example = kit.build(), kit.calibration()[-1]
    arguments: dict[str, Any] = {}
    if isinstance(example, dict):
        model.config._attn_implementation = "eager"
        example = {name: torch.cat([tensor, tensor])[:2] for name, tensor in example.items()}
        shapes: Any = {name: {0: batch, 1: tokens} for name in example}
        arguments = {"args": (), "kwargs": example}
        model = EncoderStates(model)
    else:
        shapes = ({0: batch, 1: tokens} if kit.kind == "decoder" else {0: batch},)
        arguments = {"args": (torch.cat([example, example])[:2],)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            f=str(path),
            dynamo=True,
            verbose=False,
            external_data=False,
            dynamic_shapes=shapes,
            optimize=True,
            **arguments,
        )
    return path


def feeds(names: list[str], batch: Batch) -> dict[str, Any]:
    """A batch as named arrays."""
    if isinstance(batch, dict):
        return {name: batch[name].numpy() for name in names}
    return {names[0]: batch.numpy()}


def answering(kit: KitModel, names: list[str], infer: Callable[[dict[str, Any]], Any]) -> Callable[..., Any]:
    """What `KitModel.outputs` can call, around a function from named arrays to the first output's array."""

    def call(*arguments: Tensor, **named: Tensor) -> Any:
        answer = torch.from_numpy(infer(feeds(names, named or arguments[0])).copy())
        return SimpleNamespace(last_hidden_state=answer) if kit.kind == "encoder" else answer

    return call


def initializers(graph: onnx.GraphProto) -> set[str]:
    """Names of the constants with two or more axes."""
    return {tensor.name for tensor in graph.initializer if len(tensor.dims) >= 2}


def with_weights(path: Path, kit: KitModel) -> list[str]:
    """Names of the nodes that multiply by a constant matrix, without a decoder's head, which is tied."""
    graph = onnx.load(path).graph
    constants, answers = initializers(graph), {output.name for output in graph.output}
    return [
        node.name
        for node in graph.node
        if node.op_type in WEIGHTED
        and node.input[1] in constants
        and not (kit.kind == "decoder" and answers & set(node.output))
    ]


def head(path: Path, kit: KitModel) -> list[str]:
    """Names of the nodes that make a decoder's logits."""
    graph = onnx.load(path).graph
    answers = {output.name for output in graph.output}
    return [node.name for node in graph.node if kit.kind == "decoder" and answers & set(node.output)]
