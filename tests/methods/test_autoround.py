from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.methods.small_block import SmallBlock, perceptron
from torch import nn

from narrowcast.core import QuantSpec
from narrowcast.errors import DataError, ModelError, RecipeError
from narrowcast.methods import AutoRound, InputTraining, Rtn, Seen, Solved, make_method

SPECS = (
    "int4/group32/asym/scale:k6",
    "int2/group16/asym/scale:k6",
    "int6/group16/scale:k6",
    "int8/channel",
    "int6/group16/asym",
    "int4/channel/asym",
    "int4/group16/asym",
    "int3/group32",
    "int2/group16/asym",
    "int2/group16",
    "uint4/group8/asym",
    "int3/block4x8",
    "int4/tensor/asym",
    "int4/group16/asym/scale:int8",
    "int4/group16/scale:e8m0",
    "nf4/group16",
    "mxfp4",
    "fp8_e4m3/channel",
)
QUICK = AutoRound(iterations=60)


def judged(block: SmallBlock) -> list[int]:
    return list(range(block.samples))[-round(block.samples * AutoRound.held_out) :]


def nearest_weights(block: SmallBlock) -> dict[str, torch.Tensor]:
    return {
        name: Rtn().quantize(weight, block.specs[name], block.seen.get(name)).dequantize()
        for name, weight in block.weights.items()
    }


@pytest.mark.parametrize("text", SPECS)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_block_is_never_worse_than_round_to_nearest_on_the_samples_that_judge(text: str, seed: int) -> None:
    block = perceptron(text, seed)
    learned = {name: solved.record.dequantize() for name, solved in QUICK.solve_block(block).items()}
    assert block.error(learned, judged(block)) <= block.error(nearest_weights(block), judged(block)) * (1 + 1e-6)


@pytest.mark.parametrize("text", [text for text in SPECS if "8" not in text])
def test_training_takes_a_third_off_the_error_on_samples_it_never_saw(text: str) -> None:
    large = perceptron(text, 2, samples=96)
    seen = replace(large, inputs=large.inputs[:64], wanted=large.wanted[:64])
    learned = {name: s.record.dequantize() for name, s in AutoRound(iterations=150).solve_block(seen).items()}
    unseen = list(range(64, 96))
    assert large.error(learned, unseen) < 2 / 3 * large.error(nearest_weights(large), unseen)


def test_the_same_seed_gives_the_same_codes_for_any_number_of_threads() -> None:
    block, threads, results = perceptron("int3/group16/asym"), torch.get_num_threads(), []
    try:
        for count in (1, 2, 1):
            torch.set_num_threads(count)
            results.append(QUICK.solve_block(block))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(other[name].record == solved.record for name, solved in results[0].items())


def test_another_seed_draws_other_batches() -> None:
    block = perceptron("int3/group16/asym")
    one, other = (AutoRound(iterations=20, seed=seed).solve_block(block) for seed in (0, 1))
    assert any(not torch.equal(one[name].record.codes, other[name].record.codes) for name in one)


def test_samples_held_out_are_never_trained_on() -> None:
    block = perceptron("int3/group16/asym", samples=16)
    drawn: list[int] = []

    class Watched(SmallBlock):
        def output(self, weights, indices, training=None):  # type: ignore[no-untyped-def]
            if torch.is_grad_enabled():
                drawn.extend(indices)
            return super().output(weights, indices, training)

    AutoRound(iterations=30).solve_block(Watched(block.module, block.inputs, block.wanted, block.specs))
    assert set(drawn) == set(range(14))


def test_every_sample_is_drawn_once_before_one_is_drawn_again() -> None:
    batches = AutoRound(batch=4)._batches(list(range(12)))
    assert sorted(index for _ in range(3) for index in next(batches)) == list(range(12))


@pytest.mark.parametrize("samples", [1, 3, 7])
def test_few_samples_are_all_trained_on_and_all_judge(samples: int) -> None:
    block = perceptron("int3/group16/asym", samples=samples)
    everything = list(range(samples))
    learned = {name: solved.record.dequantize() for name, solved in QUICK.solve_block(block).items()}
    assert block.error(learned, everything) < block.error(nearest_weights(block), everything)


def test_training_that_only_harms_keeps_round_to_nearest_and_says_so() -> None:
    block = perceptron("int8/channel")
    solved = AutoRound(iterations=1, offset_travel=50.0, range_travel=50.0).solve_block(block)
    for name, result in solved.items():
        assert result.record == Rtn().quantize(block.weights[name], block.specs[name])
        assert "round-to-nearest kept: no step lowered" in result.notes[0]


def test_the_note_says_how_much_was_gained_and_when() -> None:
    notes = QUICK.solve_block(perceptron("int3/group16/asym"))["0"].notes
    assert len(notes) == 1 and "of round-to-nearest's on 4 samples, after step" in notes[0]


def test_layers_of_different_formats_train_together_and_casts_are_said() -> None:
    block = perceptron("int3/group16/asym")
    mixed = replace(block, specs={"0": QuantSpec.parse("bf16"), "2": QuantSpec.parse("nf4/group8")})
    solved = QUICK.solve_block(mixed)
    assert solved["0"].record == Rtn().quantize(block.weights["0"], QuantSpec.parse("bf16"))
    assert solved["0"].notes == ("bf16: rounded to nearest",)
    assert "block output error" in solved["2"].notes[0]


def test_importance_of_the_inputs_weighs_the_ranges_at_the_start() -> None:
    block = perceptron("int3/group16/asym")
    block.seen = {name: Seen(importance=torch.rand(w.shape[1]) ** 4) for name, w in block.weights.items()}
    for name, solved in AutoRound(iterations=0).solve_block(block).items():
        assert solved.record == Rtn().quantize(block.weights[name], block.specs[name], block.seen[name])


def test_the_caller_keeps_its_weights() -> None:
    block = perceptron("int3/group16/asym")
    before = {name: weight.clone() for name, weight in block.weights.items()}
    QUICK.solve_block(block)
    assert all(torch.equal(block.weights[name], before[name]) for name in before)


def test_a_block_without_samples_is_refused_with_the_remedy() -> None:
    with pytest.raises(DataError, match="give calibration data"):
        AutoRound().solve_block(perceptron("int4/channel", samples=0))


def test_a_float_output_that_is_not_finite_is_refused() -> None:
    block = perceptron("int4/channel")
    block.wanted[-1] = torch.inf
    with pytest.raises(DataError, match="not finite"):
        AutoRound().solve_block(block)


def test_an_output_that_explodes_in_training_ends_it_with_a_note() -> None:
    block = perceptron("int4/channel", samples=16)
    block.wanted[:14] = torch.nan
    notes = AutoRound(iterations=20).solve_block(block)["0"].notes
    assert "stopped at step 1, where the block's output is not finite" in notes[0]


def test_a_weight_that_is_not_finite_is_refused() -> None:
    block = perceptron("int4/channel")
    block.weights["0"] = torch.full_like(block.weights["0"], torch.nan)
    with pytest.raises(ModelError, match="is nan"):
        AutoRound().solve_block(block)


def test_a_convolution_as_a_matrix_of_its_patches_trains_too() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 8, 3, padding=1)
    inputs = nn.functional.avg_pool2d(torch.randn(32, 3, 10, 10), 3, stride=1)  # neighbours are alike
    spec = QuantSpec.parse("int3/channel")

    with torch.no_grad():
        wrapped = nn.Sequential(conv)
        block = SmallBlock(wrapped, inputs, wrapped(inputs), {"0": spec})
    block.weights = {"0": conv.weight.detach().flatten(1)}
    block.output = lambda weights, indices, training=None: nn.functional.conv2d(  # type: ignore[method-assign]
        inputs[list(indices)], weights["0"].view(8, 3, 3, 3), conv.bias, padding=1
    )
    learned = {name: solved.record.dequantize() for name, solved in QUICK.solve_block(block).items()}
    assert block.error(learned, judged(block)) < block.error(nearest_weights(block), judged(block))


@pytest.mark.parametrize(
    "options",
    [
        {"iterations": -1},
        {"iterations": 2.5},
        {"batch": -1},
        {"held_out": 0.6},
        {"held_out": "a"},
        {"offset_travel": -1.0},
        {"range_travel": float("nan")},
        {"seed": True},
    ],
)
def test_wrong_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(RecipeError, match=f"autoround: {next(iter(options))}"):
        make_method({"autoround": options})


class RoundedBlock(SmallBlock):
    """Its second layer's input is rounded to 4 bits under a range that is `too_wide` times what it should be."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.rounds_inputs, self.adjustable = True, frozenset({"2"})
        self.steps: list[InputTraining | None] = []
        hidden = self.module[:2](self.inputs).detach()  # type: ignore[index]
        self.scale = 3.0 * float(hidden.max()) / 15

    def output(self, weights, indices, training=None):  # type: ignore[no-untyped-def]
        self.steps.append(training)
        factor = 1.0 if training is None else training.factors.get("2", 1.0)
        hidden = torch.nn.functional.gelu(self.inputs[list(indices)] @ weights["0"].t() + self.module[0].bias)
        scale = self.scale * factor
        scaled = hidden / scale
        rounded = (scaled + (scaled.round() - scaled).detach()).clamp(-4, 11) * scale
        return rounded @ weights["2"].t() + self.module[2].bias


def test_the_scale_of_an_input_is_trained_and_belongs_to_the_records_that_are_kept() -> None:
    plain = perceptron("int4/channel", samples=64)
    block = RoundedBlock(plain.module, plain.inputs, plain.wanted, plain.specs)
    solved = AutoRound(iterations=100, input_travel=1.0).solve_block(block)
    assert solved["0"].input_factor == 1.0 and 0.25 <= solved["2"].input_factor < 0.8
    fixed = AutoRound(iterations=100, input_travel=0.0).solve_block(block)
    assert fixed["2"].input_factor == 1.0

    def error(answer: dict[str, Solved]) -> float:
        weights = {name: s.record.dequantize() for name, s in answer.items()}
        training = InputTraining({"2": torch.tensor(answer["2"].input_factor)})
        with torch.no_grad():
            return float((block.output(weights, judged(block), training) - block.target(judged(block))).square().mean())

    assert error(solved) < error(fixed)


def test_steps_drop_rounding_at_random_and_judging_does_not() -> None:
    plain = perceptron("int4/channel")
    block = RoundedBlock(plain.module, plain.inputs, plain.wanted, plain.specs)
    AutoRound(iterations=10, drop=0.25).solve_block(block)
    parts = [0.0 if step is None else step.dropped for step in block.steps]
    assert set(parts) == {0.0, 0.25} and parts.count(0.25) == 10
