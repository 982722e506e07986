"""AutoRound: rounding and ranges of all layers of a block are trained so that the block's output changes least.

For a block f with float weights W and inputs X as the quantized blocks before it give them,

    minimise |f(Q(W; v, a, b), X) - f(W, X_float)|^2

over an offset v in [-1/2, 1/2] per weight and the ends a, b of every range: `rounding.py` has Q and its gradients, and
trains what is stored. The start is round-to-nearest under the searched range, which is v = a = b = 0. Steps are drawn
from most samples; the error on the samples held out decides which iterate is kept, the start among them, so the
result is never worse than round-to-nearest there.

Where inputs of layers have static ranges f is the block with rounded inputs. A factor on the scale of each such input
that no other layer shares is trained with the rest. With `drop` every step leaves a random part of the values of these
inputs unrounded, so that what is learned leans less on the errors of the samples at hand.

Source:
    Cheng et al. 2023, arXiv:2309.05516, eq. 3-5 and algorithm 1. Differs, each by measurement on a block of a small
    language model (mean squared error of its output on text not trained on, 2-bit groups of 32; 0.0595 at the start):
    Adam instead of the sign of the gradient (0.0274 against 0.0285), in larger steps along a cosine (0.0261) and with
    smaller batches (0.0257); ranges start from the searched ones and their ends move little (0.0274; four times as far
    0.0310, not at all 0.0301); the kept iterate is the best on held-out samples, not on a batch. Not better there:
    offsets beyond 1/2 (0.0283 at 1), a penalty on the weights' error (0.0277), leaving a random part of the weights
    float in each step (0.0298), a start from AdaRound's codes (0.0262 against 0.0257), AdaRound's relaxation in place
    of offsets (0.0347 after as many steps). Inputs: QDrop (Wei et al. 2022, arXiv:2203.05740), with the gradient of LSQ
    for the scales; the block's own input is always that of the quantized blocks before it. Of ResNet-20 with 4-bit
    weights and inputs, 3000 training images that calibration did not see (SQNR of the logits, KL divergence from the
    float model): scales not trained 16.86 dB, 0.0140; travel 0.1 17.00 dB, 0.0143; 0.5 17.11 dB, 0.0160; that with a
    quarter of the values dropped 17.04 dB, 0.0169. So scales move little, and nothing is dropped unless asked: a few
    hundred steps are too few to gain by it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from narrowcast.core import QuantizedTensor
from narrowcast.errors import DataError
from narrowcast.methods.base import Block, InputTraining, Need, Solved, check_weight
from narrowcast.methods.options import check_numbers
from narrowcast.methods.rounding import LearnedWeight, one_thread
from narrowcast.methods.rtn import Rtn

_LARGEST_OFFSET = 0.5
_CHECKS = 5
_BETAS = (0.9, 0.99)
# Of fewer samples none can be spared to judge by.
_FEWEST_TO_HOLD_OUT = 8
_JUDGED_AT_ONCE = 16
# Of the scale of an input.
_FACTORS = (0.25, 4.0)
# The loss is 1 at the start, so a gradient below this is no direction.
_SMALLEST_GRADIENT = 1e-12


@dataclass(frozen=True)
class AutoRound:
    """Learned rounding and ranges, block by block.

    Args:
        iterations: steps of Adam; their size falls to zero along a cosine.
        batch: samples in a step; 0 takes an eighth of them, 4 to 32.
        held_out: part of the samples that is not trained on and decides which iterate is kept; of fewer than 8
            samples all are trained on and decide.
        offset_travel: how far, in code steps, offsets could move in all; sets the size of their steps.
        range_travel: how far, in code steps, the ends of a range could move in all.
        input_travel: how far the factor on the scale of a static input could move in all.
        drop: the part of the values of static inputs that a step leaves unrounded.
        seed: of the order in which samples are drawn.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"block"})
    takes_levels: ClassVar[bool] = False
    iterations: int = 200
    batch: int = 0
    held_out: float = 0.125
    offset_travel: float = 2.0
    range_travel: float = 0.5
    input_travel: float = 0.1
    drop: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        bounds = {"iterations": (0, math.inf), "batch": (0, math.inf), "held_out": (0.0, 0.5), "seed": (0, 2.0**63 - 1)}
        travels = {f"{what}_travel": (0.0, math.inf) for what in ("offset", "range", "input")}
        check_numbers("autoround", self, bounds | travels | {"drop": (0.0, 1.0)})

    def solve_block(self, block: Block) -> dict[str, Solved]:
        """Every layer of the block, by name.

        Args:
            block: its weights may have any format with scales; casts and empty weights are rounded to nearest.

        Raises:
            ModelError: a weight is not a finite float matrix.
            DataError: no sample of the block was kept, or its float output is not finite.
        """
        if block.samples < 1:
            raise DataError("autoround trains on the inputs of a block and none were kept; give calibration data")
        weights = {name: check_weight(weight) for name, weight in block.weights.items()}
        start = {name: Rtn().solve(w, block.specs[name], block.seen.get(name)).record for name, w in weights.items()}
        training = {
            name: LearnedWeight(weights[name], record)
            for name, record in start.items()
            if record.scale is not None and record.scale.numel()
        }
        with one_thread():
            best = self._train(block, start, training)
        return {
            name: Solved(
                record, (best.note() if name in training else f"{record.spec}: rounded to nearest",),
                best.factors.get(name, 1.0),
            )
            for name, record in best.records.items()
        }  # fmt: skip

    def _train(
        self, block: Block, start: Mapping[str, QuantizedTensor], training: Mapping[str, LearnedWeight]
    ) -> _Best:
        drawn, judged = self._split(block.samples)
        best = _Best(block, judged, dict(start))
        if not training or best.start == 0:
            return best
        fixed = {name: record.dequantize() for name, record in start.items() if name not in training}
        inputs = _Inputs(block, self)
        adam, batches = _Adam(training, inputs, self), self._batches(drawn)
        check_every = max(1, self.iterations // _CHECKS)
        for step in range(1, self.iterations + 1):
            indices = next(batches)
            weights = fixed | {name: learned.weight() for name, learned in training.items()}
            answer = block.output(weights, indices, inputs.training())
            error = (answer - block.target(indices)).square().mean() / best.start
            if not math.isfinite(float(error.detach())):
                best.stopped = f"; stopped at step {step}, where the block's output is not finite"
                break
            adam.step_(error, (step - 1) / self.iterations)
            if step % check_every == 0 or step == self.iterations:
                best.offer_({name: learned.record() for name, learned in training.items()}, inputs.values(), step)
        return best

    def _split(self, samples: int) -> tuple[list[int], list[int]]:
        """The samples that steps are drawn from and, the last ones, those that judge."""
        every = list(range(samples))
        held = round(samples * self.held_out) if samples >= _FEWEST_TO_HOLD_OUT else 0
        return (every[:-held], every[-held:]) if held else (every, every)

    def _batches(self, drawn: list[int]) -> Iterator[list[int]]:
        """Endless batches; every sample is drawn once before one is drawn again."""
        generator = torch.Generator().manual_seed(self.seed)
        size = min(self.batch or max(4, min(32, len(drawn) // 8)), len(drawn))
        waiting = list[int]()
        while True:
            if len(waiting) < size:
                waiting += [drawn[i] for i in torch.randperm(len(drawn), generator=generator).tolist()]
            yield waiting[:size]
            waiting = waiting[size:]


class _Inputs:
    """The factors on the scales of static inputs, in training."""

    def __init__(self, block: Block, options: AutoRound) -> None:
        self._drop, self._rounds = options.drop, block.rounds_inputs
        self._generator = torch.Generator().manual_seed(options.seed)
        names = sorted(block.adjustable) if options.input_travel else []
        self.factors = {name: torch.ones((), requires_grad=True) for name in names}

    def training(self) -> InputTraining | None:
        """What the next step wants of the inputs; None where none has a static range."""
        return InputTraining(self.factors, self._drop, self._generator) if self._rounds else None

    def values(self) -> dict[str, float]:
        """The factors as numbers."""
        return {name: float(factor.detach()) for name, factor in self.factors.items()}


class _Best:
    """The best iterate so far by the block's mean squared output error on the samples that judge.

    Attributes:
        records: of every layer.
        factors: on the scales of inputs; 1 where absent.
        start: the error of round-to-nearest.
        error: that of `records`.
        step: after which step they were.
        stopped: a clause for the report where training ended early.
    """

    def __init__(self, block: Block, judged: Sequence[int], start: dict[str, QuantizedTensor]) -> None:
        self._block, self._judged = block, judged
        self.records, self.step, self.stopped = start, 0, ""
        self.factors: dict[str, float] = {}
        self.start = self.error = self._measure(start, {})
        if not math.isfinite(self.start):
            raise DataError("the output of a block is not finite for some calibration samples; look for bad inputs")

    def offer_(self, changed: Mapping[str, QuantizedTensor], factors: dict[str, float], step: int) -> None:
        """Keep these records and factors if they are better."""
        records = {**self.records, **changed}
        error = self._measure(records, factors)
        if error < self.error:
            self.records, self.factors, self.error, self.step = records, factors, error, step

    def note(self) -> str:
        """What the report says of a layer that was trained."""
        judged = f"on {len(self._judged)} samples"
        if self.step == 0:
            return f"round-to-nearest kept: no step lowered the block's output error {judged}{self.stopped}"
        part = self.error / self.start
        return f"block output error {part:.3g} of round-to-nearest's {judged}, after step {self.step}{self.stopped}"

    @torch.no_grad()
    def _measure(self, records: Mapping[str, QuantizedTensor], factors: Mapping[str, float]) -> float:
        weights = {name: record.dequantize() for name, record in records.items()}
        inputs = InputTraining({name: torch.tensor(factor) for name, factor in factors.items()}) if factors else None
        total, count = 0.0, 0
        for first in range(0, len(self._judged), _JUDGED_AT_ONCE):
            indices = self._judged[first : first + _JUDGED_AT_ONCE]
            error = self._block.output(weights, indices, inputs) - self._block.target(indices)
            total += float(error.square().sum(dtype=torch.float64))
            count += error.numel()
        return total / max(count, 1)


class _Adam:
    """Adam (Kingma & Ba 2015, arXiv:1412.6980) over offsets and ends, each with its own first step."""

    def __init__(self, training: Mapping[str, LearnedWeight], inputs: _Inputs, options: AutoRound) -> None:
        travels = (options.offset_travel, options.range_travel, options.input_travel)
        # a cosine from 1 to 0 has mean 1/2
        of_offsets, of_ends, of_factors = (2 * travel / max(options.iterations, 1) for travel in travels)
        learned = training.values()
        self._parts = [(part.offset, of_offsets, (-_LARGEST_OFFSET, _LARGEST_OFFSET)) for part in learned]
        self._parts += [(part.ends, of_ends, (-math.inf, math.inf)) for part in learned]
        self._parts += [(factor, of_factors, _FACTORS) for factor in inputs.factors.values()]
        self._moments = [(torch.zeros_like(part), torch.zeros_like(part)) for part, _, _ in self._parts]
        self._steps = 0

    def step_(self, loss: Tensor, progress: float) -> None:
        """One step down; `progress` from 0 to 1 along the cosine."""
        self._steps += 1
        gradients = torch.autograd.grad(loss, [part for part, _, _ in self._parts])
        one, two = (1 - beta**self._steps for beta in _BETAS)
        with torch.no_grad():
            for (part, size, bounds), (mean, square), gradient in zip(
                self._parts, self._moments, gradients, strict=True
            ):
                mean.lerp_(gradient, 1 - _BETAS[0])
                square.lerp_(gradient.square(), 1 - _BETAS[1])
                rate = size * 0.5 * (1 + math.cos(math.pi * progress)) / one
                part.addcdiv_(mean, (square / two).sqrt_() + _SMALLEST_GRADIENT, value=-rate)
                part.clamp_(*bounds)
