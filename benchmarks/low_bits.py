"""Accuracy at 8, 4, 3 and 2 bits: every solver and combination on every kit model, with 95 % intervals.

    python -m benchmarks.low_bits                                      everything, into benchmarks/results
    python -m benchmarks.low_bits --models stories260k --formats "W4 g32" --methods rtn gptq
    python -m benchmarks.low_bits --quick                              fewer samples, into build/benchmarks

Each cell is measured in a process of its own, so peak memory is that of one method. Weights of attention, feed-forward
and convolution layers get the format; embeddings, and heads tied to one, stay float32, as the peers leave them.
Scores are those of samples that calibration did not see; the interval of the difference to float32 is that of a paired
bootstrap over images, sentence pairs or whole stories.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import Tensor

from benchmarks import results_io
from benchmarks.accuracy import compare_outputs
from benchmarks.kit import KIT_NAMES, KitModel, kit_model
from benchmarks.kit.images import read_images
from benchmarks.machine import REPOSITORY, machine

Array = NDArray[np.float64]
RESAMPLES = 1000


@dataclass(frozen=True)
class Format:
    """A pair of weight and activation formats.

    Attributes:
        weight: of linear layers.
        convolution: of convolutions; "" where they keep `weight`.
        input: of the layers' inputs; "" leaves them float.
        ends: of the first and the last layer, weights and inputs, as this field leaves them in more bits; ("", "")
            gives them the format of all others.
        depthwise: of the inputs of depthwise convolutions; "" where they keep `input`.
    """

    weight: str
    convolution: str = ""
    input: str = ""
    ends: tuple[str, str] = ("", "")
    depthwise: str = ""


FORMATS = {
    "W8A8 static": Format("int8/channel", input="uint8/channel static:minmax"),
    "W8A8 dynamic": Format("int8/channel", input="uint8/token"),
    "W4A8": Format("int4/group32/asym", "int4/channel", "int8/token"),
    # ranges per channel would go into the weights, which have no codes to spare, but for depthwise convolutions: their
    # weights have a scale for each of these channels
    "W4A8 static": Format("int4/channel", input="uint8/tensor static:mse", depthwise="uint8/channel static:minmax"),
    "W4A4": Format(
        "int4/channel", input="uint4/tensor static:mse", ends=("int8/channel", "uint8/tensor static:minmax")
    ),
    "W4 channel": Format("int4/channel/asym"),
    "W4 g32": Format("int4/group32/asym"),
    "W3 g32": Format("int3/group32/asym"),
    "W2 g32": Format("int2/group32/asym"),
}
ENDS = {
    "resnet20": ["conv1", "linear"],
    "mobilenetv1": ["stem.1", "classifier"],
    "mobilenetv2": ["stem", "classifier"],
    "squeezenet11": ["conv1", "conv10"],
}
DEPTHWISE = {"mobilenetv1": "blocks.*.0.*", "mobilenetv2": "*.dw"}
# What a recipe says besides formats.
METHODS: dict[str, dict[str, Any]] = {
    "default": {},
    "rtn without data": {"method": {"rtn": {}}, "data": False},
    "rtn": {"method": {"rtn": {}}},
    "hqq": {"method": {"hqq": {}}},
    "gptq": {"method": {"gptq": {}}},
    "adaround": {"method": {"adaround": {}}},
    "autoround": {"method": {"autoround": {}}},
    "equalize + rtn": {"method": {"rtn": {}}, "transforms": ["equalize"]},
    "awq + rtn": {"method": {"rtn": {}}, "transforms": ["awq"]},
    "awq + gptq": {"method": {"gptq": {}}, "transforms": ["awq"]},
    "smoothquant + rtn": {"method": {"rtn": {}}, "transforms": ["smoothquant"]},
    "equalize + autoround": {"method": {"autoround": {}}, "transforms": ["equalize"]},
}
CONVOLUTIONAL = ("equalize + rtn", "equalize + autoround")
ATTENTION = ("awq + rtn", "awq + gptq", "smoothquant + rtn")


def applies(kit: KitModel, form: str, method: str) -> bool:
    """Whether a combination is about this kind of model."""
    if FORMATS[form].ends[0] and kit.name not in ENDS:
        return False
    if method in CONVOLUTIONAL:
        return kit.kind == "cnn"
    return method not in ATTENTION or kit.kind in ("encoder", "decoder")


def recipe_of(name: str, form: Format, method: str) -> dict[str, Any]:
    """The recipe document of one cell."""
    options = METHODS[method]
    solver = {"method": options["method"]} if "method" in options else {}
    rules: list[dict[str, Any]] = [
        {"role": role, "keep": "float32, as the peers leave it", "optional": True} for role in ("embedding", "tied")
    ]
    given = {"input": form.input} if form.input else {}
    if form.ends[0]:
        rules.append({"layers": ENDS[name], "weight": form.ends[0], "input": form.ends[1]})
    if form.depthwise and name in DEPTHWISE:
        rules.append({"layers": DEPTHWISE[name], "weight": form.weight, "input": form.depthwise, **solver})
    if form.convolution:
        rules.append({"type": "Conv2d", "weight": form.convolution, **given, **solver, "optional": True})
    rules.append({"weight": form.weight, **given, **solver})
    document = {"name": f"{method}", "rule": rules}
    return document | ({"transforms": options["transforms"]} if "transforms" in options else {})


def losses(kit: KitModel, outputs: Tensor, samples: slice) -> Array:
    """Per sample what the metric is made of: [samples, 2] of (sum, count), or of similarity and judgement."""
    module = import_module(f"benchmarks.kit.{kit.name}")
    if kit.kind == "cnn":
        images = module._images("test") if kit.name in ("resnet20", "mobilenetv2") else module._images()
        hit = (outputs.argmax(1) == read_images(images)[1][samples]).double().numpy()
        return np.stack([100.0 * hit, np.ones_like(hit)], 1)
    if kit.kind == "encoder":
        first, second = outputs.double().chunk(2)
        return np.stack([F.cosine_similarity(first, second).numpy(), np.asarray(module.pairs("dev")[2][samples])], 1)
    if kit.kind == "decoder":
        chosen = module.stories()[samples]
        targets, lengths = torch.cat([torch.tensor(ids[1:]) for ids in chosen]), [len(ids) - 1 for ids in chosen]
    else:
        targets = module.windows(module.SCORED)[1][samples]
        lengths = [1] * len(targets)
    nll = F.cross_entropy(outputs.double(), targets, reduction="none").split(lengths)
    return np.array([[part.sum().item(), len(part)] for part in nll])


def score(kit: KitModel, values: Array, chosen: Array | slice = slice(None)) -> float:
    """The metric of some samples."""
    picked = values[chosen]
    if kit.kind == "encoder":
        return 100.0 * float(spearmanr(picked[:, 0], picked[:, 1]).statistic)
    mean = float(picked[:, 0].sum() / picked[:, 1].sum())
    return float(np.exp(mean)) if kit.metric == "perplexity" else mean


def interval(kit: KitModel, reference: Array, candidate: Array) -> tuple[float, float]:
    """95 % interval of candidate - reference, both scored on the same draws."""
    generator = np.random.default_rng(0)
    draws = [generator.integers(0, len(reference), len(reference)) for _ in range(RESAMPLES)]
    differences = [score(kit, candidate, draw) - score(kit, reference, draw) for draw in draws]
    low, high = np.quantile(differences, [0.025, 0.975])
    return float(low), float(high)


def cell(name: str, form: str, method: str, samples: str) -> dict[str, Any]:
    """One measured cell; to be run in a process of its own."""
    import narrowcast as nc

    kit = kit_model(name)
    chosen = kit.sets[samples]
    model = kit.build()
    expected = kit.outputs(model, chosen)
    data = kit.calibration() if METHODS[method].get("data", True) else None
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    quantized = nc.quantize(model, recipe_of(name, FORMATS[form], method), data=data, progress=False)
    seconds = time.perf_counter() - started
    outputs = kit.outputs(quantized.model, chosen)
    first, second = losses(kit, expected, chosen), losses(kit, outputs, chosen)
    difference = score(kit, second) - score(kit, first)
    return {
        "float32": score(kit, first),
        "score": score(kit, second),
        "difference": difference,
        "interval": interval(kit, first, second),
        **compare_outputs(kit, expected, outputs),
        "seconds": round(seconds, 1),
        "peak_mb": round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024),
        "fell_back": [f"{row.layer}: {row.reason}" for row in quantized.report.layers if row.outcome == "fell back"],
    }


def measure(name: str, form: str, method: str, samples: str) -> dict[str, Any]:
    """One cell in a process of its own; a cell that fails says why."""
    command = [sys.executable, "-m", "benchmarks.low_bits", "--cell", name, form, method, samples]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)
    row: dict[str, Any] = {"model": name, "format": form, "method": method, "samples": samples}
    if done.returncode != 0:
        return row | {"failed": done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no message"}
    return row | json.loads(done.stdout.splitlines()[-1])


HEADER = ("model", "format", "method", "float32", "score", "difference", "95 % interval", "agreement % / cosine")
HEADER += ("SQNR dB", "seconds", "peak MB above the model")


def cells(row: dict[str, Any]) -> list[Any]:
    """The cells of one table row."""
    if "failed" in row:
        return [row["model"], row["format"], row["method"], f"failed: {row['failed']}", *[None] * (len(HEADER) - 4)]
    fidelity = row.get("agreement", row.get("cosine"))
    low, high = row["interval"]
    return [
        *(row[key] for key in ("model", "format", "method")),
        *(results_io.rounded(row[key], 3) for key in ("float32", "score", "difference")),
        f"{low:.3f} .. {high:.3f}",
        results_io.rounded(fidelity, 2 if "agreement" in row else 5),
        results_io.rounded(row["sqnr_db"], 2),
        results_io.rounded(row["seconds"], 1),
        row["peak_mb"],
    ]


def markdown(facts: dict[str, Any], rows: list[dict[str, Any]], skipped: list[str]) -> str:
    """The Markdown page of a run."""
    paragraphs = [" ".join((__doc__ or "").split("\n\n")[2].split()), *skipped]
    return results_io.page("Low bits", facts, [*paragraphs, results_io.table(HEADER, map(cells, rows))])


def options(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = results_io.arguments(__doc__ or "", ())
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--cell", nargs=4, metavar=("MODEL", "FORMAT", "METHOD", "SAMPLES"), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Measures every cell and writes the results."""
    chosen = options(argv)
    if chosen.cell:
        print(json.dumps(cell(*chosen.cell)))
        return 0
    torch.manual_seed(0)
    facts, skipped, rows = machine(), [], []
    for name in results_io.available(chosen.models, skipped.append):
        for form in chosen.formats:
            for method in (method for method in chosen.methods if applies(kit_model(name), form, method)):
                rows.append(measure(name, form, method, "quick" if chosen.quick else "held_out"))
                print(*(value for value in cells(rows[-1]) if value is not None), flush=True)
    complete = not chosen.quick and [*chosen.models] == list(KIT_NAMES) and set(chosen.methods) == set(METHODS)
    folder = chosen.out or results_io.folder_of(complete and set(chosen.formats) == set(FORMATS))
    document = {"machine": facts, "skipped": skipped, "rows": rows}
    results_io.write_results(folder, "low_bits", document, markdown(facts, rows, skipped))
    return int(any("failed" in row for row in rows) or not rows)


if __name__ == "__main__":
    sys.exit(main())
