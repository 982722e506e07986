"""Accuracy of every preset on every kit model, beside its float32 original, judged by the first issue's targets.

    python -m benchmarks.accuracy                        everything, into benchmarks/results
    python -m benchmarks.accuracy --models minilm --presets dynamic-int8 dynamic-int4
    python -m benchmarks.accuracy --presets static-int8 --keep    some into benchmarks/results, beside the others there
    python -m benchmarks.accuracy --quick                fewer samples, into build/benchmarks

A preset that needs no data is measured without and, as "PRESET+data", with calibration data. Whatever saw calibration
data is scored on samples outside of it, against float32 on the same samples.
"""

from __future__ import annotations

import json
import sys
import time
from argparse import Namespace
from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import results_io, targets
from benchmarks.kit import KIT_NAMES, KitModel, kit_model
from benchmarks.machine import commit, machine

WITHOUT_DATA = ("weight-int8", "weight-int4", "dynamic-int8", "dynamic-int4", "fp16", "bf16")
WITH_DATA = ("weight-int8+data", "weight-int4+data", "dynamic-int8+data", "dynamic-int4+data", "static-int8")
VARIANTS = (
    "weight-int8",
    "weight-int8+data",
    "weight-int4",
    "weight-int4+data",
    "dynamic-int8",
    "dynamic-int8+data",
    "dynamic-int4",
    "dynamic-int4+data",
    "static-int8",
    "fp16",
    "bf16",
)


def sqnr_db(reference: Tensor, candidate: Tensor) -> float:
    """Signal to quantization noise of all outputs together, in decibels; infinite when equal."""
    signal, noise = reference.double().square().sum(), (reference.double() - candidate.double()).square().sum()
    return (10.0 * (signal / noise).log10()).item()


def weight_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers, biases left out: codes, scales, zero points, sums."""
    seen: dict[int, int] = {}
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if name.rsplit(".", 1)[-1] != "bias":
            seen[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
    return sum(seen.values())


def linear_percent(original: nn.Module, quantized: nn.Module) -> float | None:
    """Weight bytes of everything that was an `nn.Linear`, scales counted, as percent of float32.

    Args:
        original: the float32 model.
        quantized: the same model after quantization; module names are unchanged.

    Returns:
        Percent, or None for a model without linear layers.
    """
    names = [name for name, module in original.named_modules() if isinstance(module, nn.Linear)]
    before = sum(weight_bytes(original.get_submodule(name)) for name in names)
    after = sum(weight_bytes(quantized.get_submodule(name)) for name in names)
    return 100.0 * after / before if before else None


def compare_outputs(kit: KitModel, reference: Tensor, candidate: Tensor) -> dict[str, float]:
    """Fidelity to float32: mean cosine for embeddings, agreement of the top prediction otherwise, SQNR for both."""
    row = {"sqnr_db": sqnr_db(reference, candidate)}
    if kit.kind == "encoder":
        row["cosine"] = F.cosine_similarity(reference.double(), candidate.double()).mean().item()
    else:
        row["agreement"] = 100.0 * (reference.argmax(1) == candidate.argmax(1)).double().mean().item()
    return row


class Reference:
    """A kit model's float32 original: its module, and per evaluation set its outputs and scores, computed once."""

    def __init__(self, kit: KitModel, *, quick: bool) -> None:
        """The float32 original of `kit`; `quick` replaces every evaluation set by the quick one."""
        self.kit = kit
        self.model = kit.build()
        self.quick = quick
        self._known: dict[str, tuple[Tensor, dict[str, float]]] = {}

    def samples(self, variant: str) -> str:
        """Name of the evaluation set that fits a variant."""
        if self.quick:
            return "quick"
        return "held_out" if variant in WITH_DATA else "all"

    def on(self, samples: str) -> tuple[Tensor, dict[str, float]]:
        """float32 outputs and scores on an evaluation set."""
        if samples not in self._known:
            chosen = self.kit.sets[samples]
            outputs = self.kit.outputs(self.model, chosen)
            self._known[samples] = outputs, self.kit.scores(outputs, chosen)
        return self._known[samples]


def measure(reference: Reference, variant: str) -> dict[str, Any]:
    """One row: a kit model quantized by one variant, scored beside float32.

    Args:
        reference: the float32 original.
        variant: one of VARIANTS.

    Returns:
        The measured quantities by name, with the verdict on every target that applies.
    """
    import narrowcast as nc

    kit = reference.kit
    samples = reference.samples(variant)
    float_outputs, float_scores = reference.on(samples)
    data = kit.calibration() if variant in WITH_DATA else None
    started = time.perf_counter()
    quantized = nc.quantize(reference.model, variant.removesuffix("+data"), data=data, progress=False)
    seconds = time.perf_counter() - started
    outputs = kit.outputs(quantized.model, kit.sets[samples])
    scores = kit.scores(outputs, kit.sets[samples])
    gain = scores[kit.metric] - float_scores[kit.metric]
    row: dict[str, Any] = {
        "model": kit.name,
        "variant": variant,
        "samples": samples,
        "metric": kit.metric,
        "float32": float_scores,
        "scores": scores,
        "drop": -gain if kit.higher_is_better else gain,
        **compare_outputs(kit, float_outputs, outputs),
        "linear_percent": linear_percent(reference.model, quantized.model),
        "quantize_seconds": round(seconds, 2),
        "totals": quantized.report.to_dict()["totals"],
    }
    if kit.metric == "perplexity":
        row["perplexity_ratio"] = scores["perplexity"] / float_scores["perplexity"]
    row["targets"] = targets.judge(targets.ACCURACY, kit.name, variant, row)
    return row


def measure_model(name: str, variants: list[str], *, quick: bool) -> list[dict[str, Any]]:
    """Rows of one kit model; a variant that fails is a row that says why."""
    reference = Reference(kit_model(name), quick=quick)
    rows = []
    for variant in variants:
        try:
            row = measure(reference, variant)
        except Exception as error:  # a benchmark reports whatever a preset raises, and goes on
            row = {"model": name, "variant": variant, "failed": f"{type(error).__name__}: {error}", "targets": []}
        rows.append(row | {"commit": commit()})
        print(summary(row), flush=True)
    return rows


def with_earlier(rows: list[dict[str, Any]], document: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows in the order of a whole run; what was not measured again is that of an earlier document."""
    said = document["machine"]["commit"]
    found = {(row["model"], row["variant"]): {"commit": said} | row for row in document["rows"]}
    found |= {(row["model"], row["variant"]): row for row in rows}
    return [found[key] for name in KIT_NAMES for variant in VARIANTS if (key := (name, variant)) in found]


def summary(row: dict[str, Any]) -> str:
    """One line for the terminal."""
    return "  ".join(str(cell) for cell in cells(row) if cell is not None)


HEADER = ("model", "preset", "metric", "float32", "score", "drop", "agreement %", "cosine", "SQNR dB")
HEADER += ("perplexity ratio", "linear bytes %", "targets")


def cells(row: dict[str, Any]) -> list[str | None]:
    """The cells of one table row, in the order of HEADER."""
    if "failed" in row:
        return [row["model"], row["variant"], f"failed: {row['failed']}", *([None] * (len(HEADER) - 3))]
    metric = row["metric"]
    digits = 4 if metric == "perplexity" else 2
    verdicts = [f"{verdict['target']}: {'met' if verdict['met'] else '**missed**'}" for verdict in row["targets"]]
    return [
        row["model"],
        row["variant"],
        f"{metric} ({row['samples']})",
        results_io.rounded(row["float32"][metric], digits),
        results_io.rounded(row["scores"][metric], digits),
        results_io.rounded(row["drop"], digits),
        results_io.rounded(row.get("agreement"), 2),
        results_io.rounded(row.get("cosine"), 5),
        results_io.rounded(row["sqnr_db"], 2),
        results_io.rounded(row.get("perplexity_ratio"), 4),
        results_io.rounded(row["linear_percent"], 2),
        "; ".join(verdicts) or None,
    ]


def markdown(facts: dict[str, Any], rows: list[dict[str, Any]], skipped: list[str]) -> str:
    """The Markdown page of a run."""
    verdicts = [verdict for row in rows for verdict in row["targets"]]
    met = sum(bool(verdict["met"]) for verdict in verdicts)
    commits = Counter(row.get("commit", facts["commit"]) for row in rows)
    notes = [
        f"Rows by commit: {', '.join(f'{count} of {name}' for name, count in commits.most_common())}.",
        "`drop` is in the metric's own unit (points for top-1 and Spearman times 100), positive where it is worse. "
        "`held_out` are the samples outside of the calibration data. Linear bytes count scales, zero points and sums.",
        f"Targets met: {met} of {len(verdicts)}.",
        *skipped,
    ]
    return results_io.page("Accuracy", facts, [results_io.table(HEADER, map(cells, rows)), *notes])


def options(argv: list[str] | None) -> Namespace:
    """The command line."""
    parser = results_io.arguments(__doc__ or "", VARIANTS)
    parser.add_argument("--keep", action="store_true", help="keep the committed rows of what is not measured")
    parser.add_argument("--strict", action="store_true", help="exit with 1 when a target is missed")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Measures, writes the results, and returns 1 when something failed (or, with --strict, missed its target)."""
    chosen = options(argv)
    torch.manual_seed(0)
    facts, skipped, rows = machine(), [], []
    for name in results_io.available(chosen.models, skipped.append):
        rows += measure_model(name, chosen.presets, quick=chosen.quick)
    folder = results_io.folder_of(True) if chosen.keep else results_io.output_folder(chosen, VARIANTS)
    if chosen.keep and (folder / "accuracy.json").is_file():
        rows = with_earlier(rows, json.loads((folder / "accuracy.json").read_text(encoding="utf-8")))
    document = {"machine": facts, "quick": chosen.quick, "skipped": skipped, "rows": rows}
    results_io.write_results(folder, "accuracy", document, markdown(facts, rows, skipped))
    failed = any("failed" in row for row in rows) or not rows
    missed = any(not verdict["met"] for row in rows for verdict in row["targets"])
    return int(failed or (chosen.strict and missed))


if __name__ == "__main__":
    sys.exit(main())
