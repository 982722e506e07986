"""The state of every observer, written down in the middle of a stream, continues with the same answer."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from narrowcast.observers import OBSERVERS, ChannelMagnitude, ChannelRange, GroupedHessian, Hessian, make_observer
from narrowcast.observers.state import restore_, state_of

BATCHES = [torch.randn(7, 5, generator=torch.Generator().manual_seed(seed)) * (1 + seed) for seed in range(4)]
MAKERS = {name: (lambda name=name: make_observer(name)) for name in OBSERVERS} | {
    "percentile(99.5)": lambda: make_observer("percentile(99.5)"), "magnitude": ChannelMagnitude,
    "channel range": ChannelRange, "hessian": Hessian, "grouped hessian": GroupedHessian,
}  # fmt: skip


def answer(observer: Any) -> Any:
    return observer.range() if hasattr(observer, "range") else observer.result()


def watch(observer: Any, batch: torch.Tensor) -> None:
    observer.update(batch[None] if isinstance(observer, GroupedHessian) else batch)


@pytest.mark.parametrize("name", MAKERS)
def test_a_state_written_down_continues_with_the_same_answer(name: str) -> None:
    whole, begun, continued = (MAKERS[name]() for _ in range(3))
    for batch in BATCHES:
        watch(whole, batch)
    for batch in BATCHES[:2]:
        watch(begun, batch)
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(state_of(begun, name, tensors))
    assert restore_(continued, json.loads(text), tensors) is continued
    for batch in BATCHES[2:]:
        watch(continued, batch)
    expected, got = answer(whole), answer(continued)
    assert str(expected) == str(got)
    pairs = zip(expected, got, strict=True) if isinstance(expected, tuple) else [(expected, got)]
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in pairs)


def test_the_state_of_another_class_is_refused() -> None:
    tensors: dict[str, torch.Tensor] = {}
    state = state_of(make_observer("minmax"), "x", tensors)
    with pytest.raises(ValueError, match="does not fit"):
        restore_(make_observer("entropy"), state, tensors)
    with pytest.raises(TypeError, match="no state"):
        state_of({"a": object()}, "x", tensors)
