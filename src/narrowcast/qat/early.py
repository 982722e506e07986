"""The best state so far, and when waiting for a better one has been long enough."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


@dataclass
class Best:
    """The best evaluated state of a model.

    Args:
        higher: whether a higher score is better.
        patience: evaluations without a better one that are waited for; None waits for ever.
        score: the best; None before the first.
        step: its step.
        since: evaluations since then.
        state: state_dict of the model then, on the CPU, with tensors of its own.
    """

    higher: bool
    patience: int | None
    score: float | None = None
    step: int = 0
    since: int = 0
    state: dict[str, Tensor] = field(default_factory=dict)

    def see(self, model: nn.Module, score: float, step: int) -> None:
        """Take in a score; a NaN is never better."""
        if self.score is None or (score > self.score if self.higher else score < self.score):
            self.score, self.step, self.since = score, step, 0
            self.state = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
        else:
            self.since += 1

    @property
    def exhausted(self) -> bool:
        """Whether patience is at its end."""
        return self.patience is not None and self.since >= self.patience

    def restore_(self, model: nn.Module) -> None:
        """Give a model its best state; how often its layers ran in training stays as it is."""
        now = {name: value for name, value in model.state_dict().items() if name.endswith("steps")}
        model.load_state_dict({**self.state, **now})

    def to_dict(self) -> dict[str, Any]:
        """JSON values; the state is stored apart."""
        return {"score": self.score, "step": self.step, "since": self.since}
