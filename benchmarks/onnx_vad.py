"""Silero's voice activity detector, two published ONNX files: frames of 30 clips, each fed with the state it left."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor

from benchmarks.kit.base import data_folder

FILES = {"silero_vad": "silero_vad_16k_op15.onnx", "silero_vad_fixed": "silero_vad_openvino_16k.onnx"}
RATE, FRAME, BEFORE = 16000, 512, 64
CALIBRATION_CLIPS = 6
# Clips, not frames, are told apart: neighbouring frames of one clip are much the same.
SETS = {"held_out": slice(CALIBRATION_CLIPS, 30), "quick": slice(CALIBRATION_CLIPS, CALIBRATION_CLIPS + 4)}
# Of the calibration clips every so many-th frame is shown: about 400 of them.
STRIDE = 4

Array = NDArray[Any]
Infer = Callable[[dict[str, Any]], list[Any]]


def source(name: str) -> Path:
    """The published file of one of FILES."""
    return data_folder("silero_vad") / FILES[name]


@lru_cache(maxsize=1)
def clips() -> list[tuple[Array, Array]]:
    """Samples [n] in -1..1 and the labels [frames] of every clip: whether a frame's centre lies in speech."""
    labels = json.loads((data_folder("silero_vad") / "labels.json").read_text(encoding="utf-8"))
    found = []
    with np.load(data_folder("silero_vad") / "audio_16k_int16.npz") as arrays:
        for name in sorted(arrays.files):
            audio = arrays[name].astype(np.float32) / 32768.0
            centres = (np.arange(len(audio) // FRAME) + 0.5) * FRAME / RATE
            spoken = [(start, end) for start, end, speech in labels[name] if speech]
            found.append((audio, np.array([any(a <= t < b for a, b in spoken) for t in centres])))
    return found


def frames(audio: Array) -> Iterator[Array]:
    """Every whole frame behind the last samples of the one before: [1, 576]."""
    before = np.zeros(BEFORE, np.float32)
    for start in range(0, len(audio) // FRAME * FRAME, FRAME):
        frame = audio[start : start + FRAME]
        yield np.concatenate([before, frame])[None]
        before = frame[-BEFORE:]


def walk(infer: Infer, names: list[str], audio: Array) -> Iterator[tuple[dict[str, Any], list[Any]]]:
    """Inputs and outputs of every frame of a clip, its state handed on."""
    state = np.zeros((2, 1, 128), np.float32)
    for frame in frames(audio):
        given: Mapping[str, Any] = {"input": frame, "state": state, "sr": np.array(RATE, np.int64)}
        feeds = {name: given[name] for name in names}
        got = infer(feeds)
        state = got[1]
        yield feeds, got


def calibration(infer: Infer, names: list[str]) -> list[dict[str, Any]]:
    """Inputs of every fourth frame of the first clips, with the states of the float model."""
    chosen = [feeds for audio, _ in clips()[:CALIBRATION_CLIPS] for feeds, _ in walk(infer, names, audio)]
    return chosen[::STRIDE]


def outputs(infer: Infer, names: list[str], samples: str) -> Tensor:
    """Probabilities of speech [frames, 1], clip after clip."""
    chosen = clips()[SETS[samples]]
    return torch.cat(
        [torch.tensor(got[0].reshape(1, 1)) for audio, _ in chosen for _, got in walk(infer, names, audio)]
    )


def score(probabilities: Array, speech: Array) -> float:
    """Area under the receiver operating characteristic, times 100: the rank-sum statistic with ties halved."""
    positives = int(speech.sum())
    ranks = rankdata(probabilities)[speech].sum() - positives * (positives + 1) / 2
    return 100.0 * float(ranks / (positives * (len(speech) - positives)))


def figures(samples: str, expected: Tensor, got: Tensor, resamples: int = 1000) -> dict[str, Any]:
    """Both scores, their difference with the 95 % interval over resampled clips, agreement at 0.5."""
    labels = [label for _, label in clips()[SETS[samples]]]
    ends = np.cumsum([0, *map(len, labels)])
    speech, first, second = np.concatenate(labels), expected[:, 0].numpy(), got[:, 0].numpy()
    generator = np.random.default_rng(0)
    differences = []
    for _ in range(resamples):
        drawn = generator.integers(0, len(labels), len(labels))
        rows = np.concatenate([np.arange(ends[i], ends[i + 1]) for i in drawn])
        differences.append(score(second[rows], speech[rows]) - score(first[rows], speech[rows]))
    return {
        "float32": score(first, speech),
        "score": score(second, speech),
        "difference": score(second, speech) - score(first, speech),
        "interval": tuple(np.quantile(differences, [0.025, 0.975]).tolist()),
        "agreement": 100.0 * float(((first > 0.5) == (second > 0.5)).mean()),
    }
