"""The same recipe on an exported ONNX file and on the PyTorch module it came from: SQNR and score of both.

    python -m benchmarks.onnx_algorithms                                      into benchmarks/results
    python -m benchmarks.onnx_algorithms --models minilm --recipes gptq --keep
    python -m benchmarks.onnx_algorithms --quick                              two recipes, into build/benchmarks

Quick samples: at most 128 rows of calibration data and, for the score, 300 images of MobileNetV1, 200 of MobileNetV2,
300 pairs of MiniLM; scores of so few say little, the two roads' SQNR to float32 is what is compared. Weights are
int4/channel with float inputs, embeddings stay float; "static" is int8/channel with uint8/tensor static:minmax. The
file runs in ONNX Runtime, the module in PyTorch.

With --keep the result file keeps its rows of what the run did not measure; each names its commit.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import onnx_cell, results_io
from benchmarks.accuracy import sqnr_db
from benchmarks.kit import Batch, KitModel, kit_model
from benchmarks.machine import commit, machine
from benchmarks.onnx_cases import case
from benchmarks.onnx_tools import ORT, session
from benchmarks.peers_low_bits import onnx_graph

Row = dict[str, Any]
ROWS = 128
SAMPLES = {"mobilenetv2": slice(0, 200)}
WEIGHTS = {"weight": "int4/channel"}
STATIC = {"weight": "int8/channel", "input": "uint8/tensor static:minmax"}
RTN, GPTQ = {"method": {"rtn": {}}}, {"method": {"gptq": {}}}
# Name -> the rule of all layers, the transforms before.
RECIPES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "rtn": (WEIGHTS | RTN, []),
    "equalize, rtn": (WEIGHTS | RTN, ["equalize"]),
    "awq, rtn": (WEIGHTS | RTN, ["awq"]),
    "smoothquant, rtn": (WEIGHTS | RTN, ["smoothquant"]),
    "equalize, absorb, rtn": (WEIGHTS | RTN, ["equalize", "absorb"]),
    "gptq": (WEIGHTS | GPTQ, []),
    "equalize, gptq": (WEIGHTS | GPTQ, ["equalize"]),
    "static": (STATIC | RTN, []),
    "equalize, static": (STATIC | RTN, ["equalize"]),
}
FEW = ("rtn", "equalize, rtn", "static")
MODELS: dict[str, tuple[str, ...]] = {
    "mobilenetv1": tuple(RECIPES),
    "mobilenetv2": FEW,
    "minilm": ("rtn", "awq, rtn", "gptq"),
}
ROADS = ("file", "module")
HEADER = ("model", "recipe", "ONNX file, dB", "ONNX file, score", "module, dB", "module, score", "float32", "seconds",
          "commit")  # fmt: skip


def recipe_of(name: str) -> dict[str, Any]:
    """The recipe document of one of RECIPES."""
    rule, transforms = RECIPES[name]
    kept = [{"role": role, "keep": "float32 in this comparison", "optional": True} for role in ("embedding", "tied")]
    return {"name": name, "transforms": transforms, "rule": [*kept, rule]}


def calibration(kit: KitModel) -> list[Batch]:
    """The first ROWS rows of the calibration data."""
    found: list[Batch] = []
    left = ROWS
    for batch in kit.calibration():
        taken = {k: v[:left] for k, v in batch.items()} if isinstance(batch, dict) else batch[:left]
        found.append(taken)
        left -= len(next(iter(taken.values())) if isinstance(taken, dict) else taken)
        if left <= 0:
            break
    return found


def answers_of_file(kit: KitModel, path: Path, chosen: slice) -> Tensor:
    """What an ONNX file answers to the evaluation samples, in ONNX Runtime."""
    infer, names = session(path, ORT, 1)
    call = onnx_graph.answering(kit, names, lambda feeds: infer(feeds)[0])
    return kit.outputs(call, chosen)  # type: ignore[arg-type]  # called only


def quantized_answers(kit: KitModel, recipe: str, road: str, chosen: slice) -> Tensor:
    """What the quantized model answers on one of ROADS."""
    import narrowcast as nc

    model = onnx_cell.float32_file(case(kit.name)) if road == "file" else kit.build()
    result = nc.quantize(model, recipe_of(recipe), calibration(kit), progress=False)
    if road == "module":
        return kit.outputs(result.model, chosen)
    with tempfile.TemporaryDirectory(prefix="narrowcast-") as folder:
        path = Path(folder) / "quantized.onnx"
        nc.save(result, path)
        return answers_of_file(kit, path, chosen)


def measure(name: str, recipes: list[str]) -> Iterator[Row]:
    """One row per recipe and road; one that fails says why."""
    kit, chosen = kit_model(name), SAMPLES.get(name) or kit_model(name).sets["quick"]
    expected = kit.outputs(kit.build(), chosen)
    float32 = kit.scores(expected, chosen)[kit.metric]
    for recipe in recipes:
        for road in ROADS:
            row = {"model": name, "recipe": recipe, "road": road, "float32": float32, "commit": commit(),
                   "load": results_io.load_average()}  # fmt: skip
            started = time.perf_counter()
            try:
                got = quantized_answers(kit, recipe, road, chosen)
                row |= {"sqnr_db": sqnr_db(expected, got), "score": kit.scores(got, chosen)[kit.metric]}
            except Exception as error:  # a recipe that fails is a result
                row["failed"] = f"{type(error).__name__}: {str(error)[:200]}"
            row["seconds"] = round(time.perf_counter() - started, 1)
            print({key: value for key, value in row.items() if key != "commit"}, flush=True)
            yield row


def with_earlier(rows: list[Row], earlier: list[Row]) -> list[Row]:
    """The rows of a run, and those of an earlier one that it did not measure, in the order of MODELS."""
    found = {(row["model"], row["recipe"], row["road"]): row for row in [*earlier, *rows]}
    order = [(name, recipe, road) for name in MODELS for recipe in RECIPES for road in ROADS]
    return [found[place] for place in order if place in found]


def markdown(facts: dict[str, Any], document: dict[str, Any]) -> str:
    """The page."""
    rows: dict[tuple[str, str], dict[str, Row]] = {}
    for row in document["rows"]:
        rows.setdefault((row["model"], row["recipe"]), {})[row["road"]] = row
    lines = []
    for (name, recipe), roads in rows.items():
        some = next(iter(roads.values()))
        cells = [cell for road in ROADS for cell in _cells(roads.get(road))]
        seconds = " and ".join(f"{row['seconds']:.0f}" for row in roads.values())
        commits = ", ".join(dict.fromkeys(row["commit"][:8] for row in roads.values()))
        lines.append([name, recipe, *cells, f"{some['float32']:.2f}", seconds, commits])
    description = " ".join((__doc__ or "").split("\n\n")[2].split())
    notes = "\n".join(f"- {note}" for note in document["skipped"])
    table = results_io.table(HEADER, lines)
    return results_io.page("Algorithms on ONNX files and on modules", facts, [description, table, notes])


def _cells(row: Row | None) -> tuple[str, str]:
    if row is None:
        return "not measured", ""
    return (row["failed"], "") if "failed" in row else (f"{row['sqnr_db']:.2f}", f"{row['score']:.2f}")


def main(argv: list[str] | None = None) -> int:
    """Measures, and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--quick", action="store_true", help="one model and two recipes: does it work at all?")
    parser.add_argument("--keep", action="store_true", help="rows of the committed file where the run has none")
    parser.add_argument("--out", type=Path, help="folder of the results (default: see above)")
    chosen = parser.parse_args(argv)
    models, recipes = (chosen.models[:1], ["rtn", "static"]) if chosen.quick else (chosen.models, chosen.recipes)
    torch.manual_seed(0)
    facts, skipped = machine(), []
    complete = set(models) == set(MODELS) and set(recipes) == set(RECIPES)
    kept = chosen.keep and not chosen.quick
    earlier = results_io.rows_of(results_io.folder_of(True), "onnx_algorithms") if kept else []
    rows: list[Row] = []
    for name in results_io.available(models, skipped.append):
        rows += measure(name, [recipe for recipe in MODELS[name] if recipe in recipes])
        document = {"machine": facts, "skipped": skipped, "rows": with_earlier(rows, earlier)}
        folder = chosen.out or results_io.folder_of(complete or kept)
        results_io.write_results(folder, "onnx_algorithms", document, markdown(facts, document))
    return int(not rows or any("failed" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
