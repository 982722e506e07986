"""The kit's float32 models reproduce their published scores, and its interface holds for every model."""

from __future__ import annotations

import pytest
import torch
from benchmarks.kit import KIT_NAMES, KitModel, MissingDataError, kit_model, run

QUICK = [("mobilenetv1", "all"), ("mobilenetv1", "held_out"), ("mobilenetv2", "quick"), ("stories260k", "held_out")]
SLOW = [
    ("resnet20", "all"),
    ("mobilenetv2", "all"),
    ("squeezenet11", "all"),
    ("squeezenet11", "held_out"),
    ("minilm", "all"),
    ("stories260k", "all"),
    ("textgenrnn", "all"),
]
# half a unit of the last digit that the manifest gives
PRECISION = {"top1": 0.051, "top5": 0.051, "spearman": 0.0051, "perplexity": 0.00051, "nll": 0.000051}


@pytest.fixture(params=KIT_NAMES)
def kit(request: pytest.FixtureRequest) -> KitModel:
    return _available(request.param)


def _available(name: str) -> KitModel:
    if name == "minilm":
        pytest.importorskip("transformers", reason="all-MiniLM-L6-v2 needs transformers")
    try:
        kit = kit_model(name)
        kit.weights()
        kit.example(kit.shapes[0])
    except MissingDataError as missing:
        pytest.skip(str(missing))
    return kit


def _tensor(answer: object) -> torch.Tensor:
    return answer if isinstance(answer, torch.Tensor) else answer.last_hidden_state


@pytest.mark.parametrize(("name", "samples"), QUICK + [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW])
def test_float32_model_reproduces_its_published_scores(name: str, samples: str) -> None:
    kit = _available(name)
    scores = kit.evaluate(kit.build(), samples)
    for metric, published in kit.published[samples].items():
        assert scores[metric] == pytest.approx(published, abs=PRECISION[metric]), metric


@pytest.mark.slow
def test_textgenrnn_reproduces_the_score_of_its_calibration_file() -> None:
    kit = _available("textgenrnn")
    from benchmarks.kit import textgenrnn

    everything = slice(0, 10000)
    logits = textgenrnn.file_outputs(kit.build(), textgenrnn.OTHER, everything)
    scores = textgenrnn.file_scores(logits, textgenrnn.OTHER, everything)
    assert scores["nll"] == pytest.approx(1.5207, abs=0.00005)
    assert scores["top1"] == pytest.approx(56.65, abs=0.005)


def test_stories_decoder_tells_its_published_beginning() -> None:
    kit = _available("stories260k")
    from benchmarks.kit import stories260k

    beginning = (
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
        "One day, she saw a big, red ball."
    )
    assert stories260k.generate(kit.build(), 56).startswith(beginning)


def test_mapped_and_copied_weights_answer_alike(kit: KitModel) -> None:
    batch = kit.example(kit.shapes[0])
    with torch.inference_mode():
        copied, mapped = _tensor(run(kit.build(), batch)), _tensor(run(kit.load(kit.weights()), batch))
    torch.testing.assert_close(mapped, copied)


def test_examples_have_the_shapes_they_are_timed_at(kit: KitModel) -> None:
    for shape in kit.shapes:
        batch = kit.example(shape)
        tensor = batch["input_ids"] if isinstance(batch, dict) else batch
        assert tuple(tensor.shape[: len(shape)]) == shape


def test_calibration_never_meets_scored_samples(kit: KitModel) -> None:
    assert {"all", "held_out", "quick"} <= kit.sets.keys()
    if kit.sets["held_out"] != kit.sets["all"]:  # calibrated on the beginning of the evaluation data
        assert kit.sets["held_out"].start > 0
        assert kit.sets["quick"].start >= kit.sets["held_out"].start
    assert len(kit.calibration()) > 0


def test_quick_outputs_are_finite_rows_that_can_be_scored(kit: KitModel) -> None:
    few = slice(kit.sets["quick"].start, kit.sets["quick"].start + 8)
    outputs = kit.outputs(kit.build(), few)
    assert outputs.dtype == torch.float32
    assert outputs.isfinite().all()
    assert kit.metric in kit.scores(outputs, few)


def test_architecture_can_be_built_without_memory(kit: KitModel) -> None:
    with torch.device("meta"):
        model = kit.architecture()
    assert all(parameter.is_meta for parameter in model.parameters())


def test_missing_data_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    from benchmarks.kit import data_folder

    monkeypatch.setenv("NARROWCAST_DATA", str(tmp_path))
    with pytest.raises(MissingDataError, match="resnet20_cifar10"):
        data_folder("resnet20_cifar10")


def test_unknown_model_is_named() -> None:
    with pytest.raises(ValueError, match="resnet21"):
        kit_model("resnet21")


def test_the_calibration_doctor_has_nothing_against_the_kits_calibration_data(kit: KitModel) -> None:
    from narrowcast.pipeline import examine

    recipe = "static-int8" if kit.kind == "cnn" else "dynamic-int8"
    assert not examine(kit.build(), recipe, kit.calibration())
