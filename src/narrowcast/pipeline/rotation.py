"""Rotating the residual stream of a decoder: which modules, by its family's pattern, checked against what runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from narrowcast.errors import ModelError
from narrowcast.models.patterns import FAMILIES, Streams, find_stream
from narrowcast.models.rewrite import (
    commutes_with_rotation,
    gain,
    input_channels,
    layer_kind,
    matrix,
    set_gain_,
    set_matrix_,
    weight_users,
)
from narrowcast.pipeline.transform_stage import Rewrite, Stage, Step
from narrowcast.transforms import Rotate, rotate_columns, rotate_rows


def rotation(stage: Stage, transform: Rotate) -> Rewrite:
    """What rotating does to a model; nothing is changed yet.

    Raises:
        ModelError: the model is no decoder of a known family, its norms do not commute with rotations, or its head is
            tied; names the module.
    """
    model = stage.adapter.model
    stream = find_stream(model)
    if stream is None:
        known = ", ".join(family.name for family in FAMILIES if family.stream is not None)
        raise ModelError(
            f"transform rotate: {type(stage.adapter.original).__name__} has no residual stream that is known here; it "
            f"needs the names of one of: {known}, with an output head"
        )
    _check(stage, stream)
    width = stage.module(stream.embedding).weight.shape[1]
    rotated, name = transform.matrix(width)

    def apply() -> None:
        table = stage.module(stream.embedding)
        values = rotate_columns(table.weight.detach(), rotated)
        table.weight = nn.Parameter(values, requires_grad=False)
        for path, readers in stream.norms.items():
            norm = stage.module(path)
            scales = gain(norm)
            for reader in readers:
                module = stage.module(reader)
                bias = None if module.bias is None else module.bias.detach()
                set_matrix_(module, rotate_columns(matrix(module), rotated, scales), bias)
            set_gain_(norm, torch.ones_like(scales), None)
        for path in stream.writers:
            module = stage.module(path)
            bias = None if module.bias is None else module.bias.detach()
            set_matrix_(module, *rotate_rows(matrix(module), bias, rotated))

    readers = [path for paths in stream.norms.values() for path in paths]
    note = (
        f"rotate: the stream of {len(stream.norms)} norms and {len(stream.writers)} writers ({stream.family}) by "
        f"{name}; scales of the norms folded into the layers that read them"
    )
    return Rewrite([Step((stream.embedding, *readers, *stream.writers), apply)], [note])


def _check(stage: Stage, stream: Streams) -> None:
    table: Any = stage.module(stream.embedding)
    width = table.weight.shape[1]
    users = weight_users(stage.adapter.model)
    head: Any = stage.module(stream.head)
    if head.weight is table.weight or users[id(head.weight)] > 1:
        raise ModelError(
            f"transform rotate: the head {stream.head!r} is tied to {stream.embedding!r}, and the final norm's scales "
            "would go into one and not the other; write transforms = [{rotate = {untie = true}}] to give the head a "
            f"matrix of its own ({head.weight.numel()} weights more)"
        )
    for path, readers in stream.norms.items():
        if not commutes_with_rotation(stage.module(path)):
            raise ModelError(
                f"transform rotate: {path!r} ({type(stage.module(path)).__name__}) does not commute with a rotation: "
                "it subtracts a mean or shifts its output; only RMSNorm without a bias does"
            )
        feed = stage.feeds.feeds.get(path)
        if feed is not None and (not bool(feed.free.all()) or {r.path for r in feed.readers} != set(readers)):
            why = feed.reason or f"it is read by {', '.join(reader.path for reader in feed.readers)}"
            raise ModelError(f"transform rotate: {path!r} feeds more than {', '.join(readers)}: {why}")
    for path in (*stream.writers, *(reader for readers in stream.norms.values() for reader in readers)):
        module = stage.module(path)
        if layer_kind(module) is None or users[id(module.weight)] > 1:
            raise ModelError(f"transform rotate: {path!r} ({type(module).__name__}) has no weight of its own to rotate")
    wrong = [path for path in stream.writers if matrix(stage.module(path)).shape[0] != width]
    wrong += [p for readers in stream.norms.values() for p in readers if input_channels(stage.module(p)) != width]
    if wrong:
        raise ModelError(f"transform rotate: {wrong[0]!r} is not as wide as the stream ({width})")
