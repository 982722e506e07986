"""Files whose parts contradict each other are refused by name; data outside of a file is found wherever it is used."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
ir = pytest.importorskip("onnx_ir", reason="onnx-ir is not installed")

from benchmarks import onnx_fuzz, onnx_mutations
from onnx import helper
from tests.onnx_files import graphs

import narrowcast as nc
from narrowcast.core import sqnr_db
from narrowcast.errors import ModelError
from narrowcast.models.onnx_model import OnnxModel

FOUND_LATE = [2570, 2889, 3324, 3930, 5020, 5880, 8357, 8996, 9919]


def elsewhere(tensor: Any, location: str) -> bytes:
    """Put the numbers of a constant into a file, which the caller writes; returns them."""
    numbers = bytes(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    del tensor.external_data[:]
    tensor.external_data.add(key="location", value=location)
    return numbers


def choosing() -> Any:
    """An If, whose branches multiply by constants of their own, as opset 13: conversion passes over them."""
    branches = [
        helper.make_graph([helper.make_node("MatMul", ["x", f"{side}.w"], [f"{side}.y"])], side, [],
                          [graphs.value(f"{side}.y", ["n", 6])], [graphs.constant(graphs.normal(8, 6), f"{side}.w")])
        for side in ("then", "else")
    ]  # fmt: skip
    nodes = [
        helper.make_node("Constant", [], ["turn"], value=graphs.constant(graphs.normal(6, 6, seed=3), "turn")),
        helper.make_node("If", ["flag"], ["chosen"], then_branch=branches[0], else_branch=branches[1]),
        helper.make_node("MatMul", ["chosen", "turn"], ["h"]),
        helper.make_node("MatMul", ["h", "last.weight"], ["y"]),
    ]
    inputs = [graphs.value("x", ["n", 8]), graphs.value("flag", [], onnx.TensorProto.BOOL)]
    return graphs.model(
        nodes, inputs, [graphs.value("y", ["n", 5])], [graphs.constant(graphs.normal(6, 5, seed=4), "last.weight")], 13
    )


@pytest.mark.parametrize("index", [*FOUND_LATE, 3938, 4352, 7060, 9841])
def test_mutated_files_that_ended_in_an_error_of_python_are_taken_or_refused(index: int, tmp_path: Path) -> None:
    models, chance = onnx_mutations.seeds(), random.Random(index)
    path = onnx_fuzz.prepare_folder(tmp_path) / "model.onnx"
    path.write_bytes(onnx_mutations.mutated(chance.choice(models), chance)[0])
    recipe = chance.choice(("weight-int8", "weight-int4", "dynamic-int8", "fp16"))
    outcome, message = onnx_fuzz.one(path, recipe)
    assert outcome in ("quantized", "refused while planning", "refused while quantizing"), message
    assert outcome == "quantized" or len(message) > 20


@pytest.mark.parametrize("decoys", [True, False])
@pytest.mark.parametrize("recipe", ["weight-int4", "weight-int8"])
def test_small_and_inner_constants_in_other_files_come_from_the_models_folder(
    recipe: str, decoys: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parted = choosing(), choosing()
    outer, here = tmp_path / "model", tmp_path / "here"
    outer.mkdir(), here.mkdir()
    branches = [attribute.g.initializer[0] for attribute in parted.graph.node[1].attribute]
    tensors = [*parted.graph.initializer, parted.graph.node[0].attribute[0].t, *branches]
    for number, tensor in enumerate(tensors):
        (outer / f"{number}.bin").write_bytes(elsewhere(tensor, f"{number}.bin"))
        if decoys:  # what a name without its folder would find
            (here / f"{number}.bin").write_bytes(b"\x00" * 4096)
    (outer / "model.onnx").write_bytes(parted.SerializeToString())
    monkeypatch.chdir(here)
    feeds = [{"x": torch.from_numpy(graphs.normal(4, 8, seed=7)), "flag": torch.tensor(flag)} for flag in (True, False)]
    expected, got = (
        nc.quantize(whole, recipe, progress=False),
        nc.quantize(outer / "model.onnx", recipe, progress=False),
    )
    for feed in feeds:
        assert torch.equal(expected.model(**feed), got.model(**feed))
        assert float(expected.model(**feed).abs().max()) > 0.1


def test_a_model_in_memory_whose_data_is_in_a_file_without_a_folder_is_refused(tmp_path: Path) -> None:
    model = graphs.one("MatMul", graphs.normal(64, 8), ["n", 64])
    (tmp_path / "weights.bin").write_bytes(elsewhere(model.graph.initializer[0], "weights.bin"))
    with pytest.raises(ModelError, match=r"'weights.bin', and a model in memory .*give the path"):
        nc.plan(model, "weight-int8")
    with pytest.raises(ModelError, match="does not say in which folder"):
        nc.plan(ir.from_proto(model), "weight-int8")
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    known = nc.quantize(ir.load(tmp_path / "model.onnx"), "weight-int8", progress=False)
    assert known.report.layers[0].outcome == "quantized"


def with_function(inner: Any, tensor: Any = None) -> Any:
    """A model that calls a function of one node, with a Constant beside it."""
    value = tensor or graphs.constant(graphs.normal(8, 6), "inside")
    body = [helper.make_node("Constant", [], ["w"], value=value), inner]
    function = helper.make_function("local", "Twice", ["a"], ["b"], body, [helper.make_opsetid("", 17)])
    graph = helper.make_graph([helper.make_node("Twice", ["x"], ["y"], domain="local")], "g",
                              [graphs.value("x", ["n", 8])], [graphs.value("y", ["n", 6])])  # fmt: skip
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9, functions=[function])


def test_functions_are_held_against_what_onnx_says_too(tmp_path: Path) -> None:
    good = nc.quantize(with_function(helper.make_node("MatMul", ["a", "w"], ["b"])), "weight-int8", progress=False)
    assert good.report.layers[0].outcome == "quantized"
    for inner, words in ((helper.make_node("MatMul", ["a", "v"], ["b"]), "function 'Twice': node .*reads 'v'"),
                         (helper.make_node("MatMul", ["a", "w"], ["c"]), "function 'Twice': no node gives .*'b'"),
                         (helper.make_node("MatMul", ["a"], ["b"]), "function 'Twice': .*not what ONNX")):  # fmt: skip
        with pytest.raises(ModelError, match=words):
            nc.plan(with_function(inner), "weight-int8")
    outside = graphs.constant(graphs.normal(8, 6), "inside")
    elsewhere(outside, "../secret.bin")
    model = with_function(helper.make_node("MatMul", ["a", "w"], ["b"]), outside)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match=r"'../secret.bin', which is outside"):
        nc.plan(tmp_path / "model.onnx", "weight-int8")


def test_constants_in_attributes_have_the_bytes_of_their_shape() -> None:
    model = choosing()
    model.graph.node[0].attribute[0].t.dims[0] = 2**40
    with pytest.raises(ModelError, match=r"\(Constant\): constant 'turn' of shape .* would have"):
        nc.plan(model, "weight-int8")


def test_sparse_constants_are_refused_and_not_lost() -> None:
    values = graphs.constant(np.ones(2, np.float32), "last.weight")
    sparse = helper.make_sparse_tensor(values, graphs.constant(np.array([1, 7]), "places"), [6, 5])
    model = choosing()
    del model.graph.initializer[:]
    model.graph.sparse_initializer.append(sparse)
    with pytest.raises(ModelError, match=r"constant 'last\.weight' is stored as a sparse tensor"):
        nc.plan(model, "weight-int8")
    model = choosing()
    model.graph.node[0].CopyFrom(helper.make_node("Constant", [], ["turn"], name="c", sparse_value=sparse))
    with pytest.raises(ModelError, match=r"'sparse_value' of node 'c' \(Constant\) is stored as a sparse"):
        nc.plan(model, "weight-int8")


@pytest.mark.parametrize("place", ["graph", "branch", "input", "metadata"])
def test_text_that_is_no_text_is_named(place: str) -> None:
    model = choosing()
    model.metadata_props.add(key="k", value="mark_metadata")
    model.graph.name, model.graph.node[1].attribute[0].g.name = "mark_graph", "mark_branch"
    content = model.SerializeToString().replace(b"flag", b"fl\xffg") if place == "input" else model.SerializeToString()
    content = content.replace(b"mark_" + place.encode(), b"mar\x80_" + place.encode())
    with pytest.raises(ModelError, match="which is no UTF-8 text"):
        nc.plan(onnx.ModelProto.FromString(content), "weight-int8")


def test_convolutions_and_norms_of_contradicting_sizes_are_refused() -> None:
    weight, shape = graphs.normal(8, 3, 3, 3), ["n", 3, 9, 9]
    for attributes, words in (({"pads": [1]}, r"pads is \[1\].*wants 4 numbers"),
                              ({"strides": [2] * 3}, r"strides is \[2, 2, 2\].*wants 2 numbers"),
                              ({"group": 3}, "group is 3, and that does not divide"),
                              ({"bias": graphs.normal(7)}, r"the bias has the shape \[7\].*wants \[8\]")):  # fmt: skip
        with pytest.raises(ModelError, match=words):
            nc.plan(graphs.one("Conv", weight, shape, rank=4, **attributes), "weight-int8")
    with pytest.raises(ModelError, match=r"weight has the shape .*3 axes at least"):
        nc.plan(graphs.one("Conv", graphs.normal(8, 3), shape, rank=4), "weight-int8")
    for sizes, words in (((7,) * 4, r"\[7\], and Conv 'Conv_of_h' before it gives 8"),
                         ((8, 8, 7, 8), r"scale \[8\], B \[8\], mean \[7\]")):  # fmt: skip
        with pytest.raises(ModelError, match=words):
            nc.plan(normed(helper.make_node("Conv", ["x", "w"], ["h"]), weight, shape, sizes), "weight-int8")


def normed(layer: Any, weight: Any, shape: list[Any], sizes: tuple[int, ...], **constants: Any) -> Any:
    """A layer with a BatchNorm behind it, whose constants have these sizes."""
    names = ["gamma", "beta", "mean", "variance"]
    nodes = [layer, helper.make_node("BatchNormalization", ["h", *names], ["y"])]
    arrays = {
        "w": weight,
        **{n: np.abs(graphs.normal(s)) + 0.5 for n, s in zip(names, sizes, strict=True)},
        **constants,
    }
    return graphs.model(
        nodes, [graphs.value("x", shape)], [graphs.value("y", [None] * len(shape))],
        [graphs.constant(array, name) for name, array in arrays.items()],
    )  # fmt: skip


@pytest.mark.parametrize(("rows", "shape", "folded"), [(6, (1, 6), True), (6, (1,), True), (6, (6, 1), False),
                                                       (2, (2, 6), False)])  # fmt: skip
def test_a_norm_behind_a_gemm_that_adds_another_number_to_each_row_stays(
    rows: int, shape: tuple[int, ...], folded: bool
) -> None:
    layer = helper.make_node("Gemm", ["x", "w", "c"], ["h"])
    model = normed(layer, graphs.normal(4, 6), [rows, 4], (6,) * 4, c=graphs.normal(*shape, seed=2))
    adapter = OnnxModel(model)
    assert [node.op_type for node in adapter.graph.graph] == ["Gemm"] + ["BatchNormalization"] * (not folded)
    x = torch.from_numpy(graphs.normal(rows, 4, seed=6))
    assert sqnr_db(adapter.original(x), adapter.model(x)) > 100


@pytest.mark.parametrize(("pads", "words"), [(np.zeros(7, np.int64), r"INT64 of shape \[7\]"),
                                             (np.zeros((2, 4), np.int64), r"of shape \[2, 4\]"),
                                             (np.zeros(8, np.float32), "FLOAT of shape")])  # fmt: skip
def test_pads_that_are_no_pads_are_refused(pads: Any, words: str) -> None:
    nodes = [helper.make_node("Pad", ["x", "pads"], ["p"]), helper.make_node("Conv", ["p", "w"], ["y"])]
    model = helper.make_model(helper.make_graph(
        nodes, "g", [graphs.value("x", ["n", 3, 9, 9])], [graphs.value("y", [None] * 4)],
        [graphs.constant(pads, "pads"), graphs.constant(graphs.normal(8, 3, 3, 3), "w")],
    ), opset_imports=[helper.make_opsetid("", 17)], ir_version=9)  # fmt: skip
    with pytest.raises(ModelError, match=words):
        nc.plan(model, "weight-int8")
