"""The low-bits table: the targets computed from its rows, cells kept on disk, and what is measured of other tools."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import low_bits, low_bits_cells, low_bits_page, low_bits_targets, results_io
from benchmarks.kit import kit_model
from benchmarks.low_bits_cells import Cell
from benchmarks.machine import REPOSITORY
from benchmarks.peers_low_bits import base
from benchmarks.peers_low_bits.table import PEERS
from torch import Tensor, nn

# Targets


def row(method: str, difference: float, **more: Any) -> dict[str, Any]:
    """A row of narrowcast on ResNet-20 at W4 channel, unless `more` says otherwise."""
    place = {"model": "resnet20", "format": "W4 channel", "tool": "narrowcast", "samples": "held_out"}
    interval = (difference - 0.1, difference + 0.1)
    return place | {"method": method, "difference": difference, "score": 91.6 + difference, "interval": interval} | more


def verdicts(rows: list[dict[str, Any]], start: str) -> list[tuple[str | None, str]]:
    found = low_bits_targets.judged(rows)
    return [(v["recipe"], v["verdict"]) for v in found if v["target"].startswith(start)]


def test_the_recipe_that_loses_least_is_the_one_judged() -> None:
    rows = [row("rtn", -1.6), row("gptq", -0.4), row("broken", 0.0) | {"tool": "hqq"}]
    assert verdicts(rows, "resnet20, W4 channel") == [("gptq", "met")]
    assert verdicts(rows[:1], "resnet20, W4 channel") == [("rtn", "**missed**")]


def test_a_format_without_rows_is_not_measured_and_a_model_without_rows_is_not_listed() -> None:
    rows = [row("rtn", 0.0)]
    assert verdicts(rows, "resnet20, W4A4") == [(None, "not measured")]
    assert verdicts(rows, "minilm") == []


def test_eight_bit_activations_are_judged_beyond_the_best_float_ones() -> None:
    rows = [row("gptq", -1.0), row("gptq", -1.25, format="W4A8")]
    assert verdicts(rows, "resnet20, W4A8") == [("gptq", "met")]
    assert verdicts([*rows, row("autoround", -0.5)], "resnet20, W4A8") == [("gptq", "**missed**")]


def test_below_another_tools_perplexity_means_below() -> None:
    stories = {"model": "stories260k", "format": "W4 g32"}
    assert verdicts([row("gptq", 0.2, **stories, score=4.662)], "stories260k, W4 g32: score below 4.662") == [
        ("gptq", "**missed**")
    ]


def test_other_tools_rows_become_targets_of_the_same_run() -> None:
    stories = {"model": "stories260k", "format": "W3 g32", "samples": "quick"}
    ours = [row("gptq", 1.0, **stories, score=5.0), row("autoround", 0.9, **stories, score=4.9)]
    theirs = [
        row("zero-padded", 0.95, **stories, score=4.95) | {"tool": "auto-round"},
        row("hqq", 0.95, **stories, score=4.95) | {"tool": "hqq"},
    ]
    assert verdicts(ours + theirs, "stories260k, W3 g32") == [("autoround", "met"), ("gptq", "**missed**")]


def test_both_bounds_are_kept_by_one_recipe() -> None:
    encoder = {"model": "minilm", "format": "W4A8"}
    accurate, ranking = row("gptq", -0.9, **encoder, cosine=0.99), row("awq", 0.1, **encoder, cosine=0.97)
    assert verdicts([accurate, ranking], "minilm, W4A8") == [("gptq", "**missed**")]
    both = row("autoround", -0.2, **encoder, cosine=0.986)
    assert verdicts([accurate, ranking, both], "minilm, W4A8") == [("autoround", "met")]


@pytest.mark.parametrize(
    ("default", "best", "words"),
    [
        (-1.05, -1.0, "met: +5 %"),
        (-1.2, -1.0, "**missed**: +20 %"),
        (-0.15, -0.02, "met: the best loss is within noise"),
    ],
)
def test_the_default_is_within_ten_percent_of_the_best_recipe_or_of_its_noise(default, best, words) -> None:
    judged = low_bits_targets.defaults([row("default", default), row("gptq", best)])
    assert judged[0]["verdict"].startswith(words)


def test_a_default_outside_of_the_best_recipes_noise_misses() -> None:
    judged = low_bits_targets.defaults([row("default", -0.9), row("gptq", 0.05)])
    assert judged[0]["verdict"].startswith("**missed**: the best loss is within noise")


def test_beside_a_best_recipe_that_gains_beyond_its_noise_the_default_is_judged_by_intervals() -> None:
    gains = row("gptq", 0.5) | {"interval": [0.1, 0.9]}
    for mine, words in (([-0.5, 0.2], "met: the best gains"), ([-0.9, -0.4], "**missed**: the best gains")):
        judged = low_bits_targets.defaults([row("default", -0.2) | {"interval": mine}, gains])
        assert judged[0]["verdict"].startswith(words)


def test_failed_and_stopped_rows_are_no_candidates_and_fill_the_table() -> None:
    failed = {key: row("gptq", 0.0)[key] for key in ("model", "format", "tool", "method", "samples")}
    rows = [row("rtn", -0.4), failed | {"failed": "ValueError: no"}, failed | {"stopped": 300.0}]
    assert verdicts(rows, "resnet20, W4 channel") == [("rtn", "met")]
    assert all(len(low_bits_page.cells(one)) == len(low_bits_page.HEADER) for one in rows[1:])


# Cells kept on disk


def cell(tmp_path: Path, *, source: str = "1", code: str = "") -> Cell:
    """A cell whose process counts its runs in a file and prints a row."""
    figures = {"score": 1.0, "difference": 0.0, "interval": [0.0, 0.0], "seconds": 0.0}
    count = f"open({str(tmp_path / 'runs')!r}, 'a').write('x'); {code or f'print({json.dumps(figures)!r})'}"
    return Cell("resnet20", "W4 g32", "hqq", "hqq", "quick", (sys.executable, "-c", count), source)


def run(cells: list[Cell], tmp_path: Path, **more: Any) -> tuple[list[dict[str, Any]], int]:
    """The rows, and how many processes were started since the folder was made."""
    rows = low_bits_cells.run_all(cells, folder=tmp_path / "cache", show=lambda line: None, **more)
    runs = tmp_path / "runs"
    return rows, len(runs.read_text()) if runs.exists() else 0


def test_a_finished_cell_is_not_measured_again(tmp_path) -> None:
    first, _ = run([cell(tmp_path)], tmp_path)
    assert run([cell(tmp_path)], tmp_path) == (first, 1)
    assert run([cell(tmp_path)], tmp_path, fresh=True)[1] == 2
    assert run([cell(tmp_path, source="2")], tmp_path)[1] == 3


def test_a_cell_that_failed_says_why_and_is_tried_again(tmp_path) -> None:
    broken = cell(tmp_path, code="raise ValueError('group 32 does not divide 172')")
    assert run([broken], tmp_path)[0][0]["failed"] == "ValueError: group 32 does not divide 172"
    assert run([broken], tmp_path)[1] == 2
    rows, runs = run([broken], tmp_path, known_only=True)
    assert (rows[0]["method"], "failed" in rows[0], runs) == ("hqq", True, 2)


def test_a_stopped_cell_is_tried_again_only_with_more_time(tmp_path) -> None:
    endless = cell(tmp_path, code="import time; time.sleep(60)")
    assert run([endless], tmp_path, limit=0.5)[0][0]["stopped"] == 0.5
    assert "stopped" in run([endless], tmp_path, limit=0.4)[0][0]
    assert run([endless], tmp_path, limit=0.6)[0][0]["stopped"] == 0.6


def test_a_page_of_what_is_known_measures_nothing(tmp_path) -> None:
    assert run([cell(tmp_path)], tmp_path, known_only=True) == ([], 0)


def test_cells_without_a_row_keep_that_of_an_earlier_document(tmp_path) -> None:
    other = replace(cell(tmp_path), method="rtn")
    new, old = row("hqq", -0.1) | cell(tmp_path).row, row("hqq", -0.9) | cell(tmp_path).row
    earlier = [old, row("rtn", -0.4) | other.row, row("gptq", -0.4)]
    assert low_bits_cells.with_earlier([other, cell(tmp_path)], [new], earlier) == [earlier[1], new]


def test_time_left_is_that_of_cells_alike(tmp_path) -> None:
    done = [{"tool": "hqq", "method": "hqq", "wall": 2.0}, {"tool": "NNCF", "method": "awq", "wall": 10.0}]
    assert low_bits_cells.remaining([cell(tmp_path)], done) == 2.0
    assert low_bits_cells.remaining([cell(tmp_path)], done[1:]) == 10.0


def test_a_digest_changes_with_the_source() -> None:
    assert low_bits_cells.digest(["benchmarks/kit/*.py"]) != low_bits_cells.digest(["benchmarks/kit/base.py"])
    assert low_bits_cells.digest([], {"a": 1}) != low_bits_cells.digest([], {"a": 2})


# Other tools


def test_tools_offer_formats_and_kinds_that_exist_and_have_a_file() -> None:
    for tool, peer in PEERS.items():
        assert (REPOSITORY / "benchmarks" / "peers_low_bits" / f"{peer.module}.py").is_file(), tool
        for offer in peer.methods.values():
            assert set(offer.formats) <= set(low_bits.FORMATS) & set(base.BITS)
            assert set(offer.kinds) <= {"cnn", "encoder", "decoder"}


def test_what_no_method_offers_is_listed() -> None:
    listed = low_bits_page.not_offered(["resnet20", "mobilenetv1"], ["W3 g32", "W4 g32"], ["narrowcast", "hqq"])
    assert listed == [("hqq", "cnn", "W3 g32, W4 g32")]


def test_methods_with_the_same_answers_are_named() -> None:
    place = {"tool": "ONNX Runtime", "format": "W4 g32"}
    rows = [row("rtn", 0.0, **place, digest="a"), row("gptq", 0.0, **place, digest="a"), row("hqq", 0.0, digest="a")]
    assert [one["same_as"] for one in low_bits_page.with_twins(rows)] == [["gptq"], ["rtn"], []]


class RoundsWhenAsked(nn.Linear):
    """Stores float weights and computes with rounded ones, as llm-compressor does before it packs."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.round(), self.bias)


def test_matrices_that_stayed_float_are_counted_from_what_the_layers_compute() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4), nn.Conv2d(2, 2, 1))
    before = base.weights_of(model)
    model[0].__class__ = RoundsWhenAsked
    with torch.no_grad():
        model[2].weight.mul_(0.9)
    found = base.answers(model, before)
    assert (found.changed, found.matrices, found.notes) == (2, 3, ["left float32: 1"])


def test_a_head_tied_to_an_embedding_is_no_matrix_to_quantize() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(8, 4), "inner": nn.Linear(4, 4), "head": nn.Linear(4, 8)})
    model["head"].weight = model["embedding"].weight
    assert list(base.weighted(model)) == ["inner"]


@pytest.mark.parametrize("padded", [False, True])
def test_the_decoder_as_transformers_class_answers_alike(padded) -> None:
    pytest.importorskip("transformers")
    skipped: list[str] = []
    if not results_io.available(["stories260k"], skipped.append):
        pytest.skip(skipped[0])
    from benchmarks.peers_low_bits import llama

    kit = kit_model("stories260k")
    model = llama.build(kit, padded=padded)  # refuses to return one that answers otherwise
    assert len(base.weights_of(model)) == 35
    assert model.config.intermediate_size == (192 if padded else 172)
