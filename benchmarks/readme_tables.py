"""Writes the section "Measured" of the README from the committed results; where one is missing, how to get it.

    python -m benchmarks.readme_tables                   between the markers of README.md
    python -m benchmarks.readme_tables --check           changes nothing; exit code 1 when the README is out of date

Figures are copied from benchmarks/results/*.json, never computed anew. Quick runs are not published.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- measured:begin -->", "<!-- measured:end -->"
FLOAT32 = ("torch float32", "torch float32 channels_last")
OTHERS = ("torch bfloat16", "torch.ao dynamic int8", "ONNX Runtime float32")
ACCURACY = (
    "weight-int8",
    "weight-int8+data",
    "dynamic-int8",
    "static-int8",
    "weight-int4",
    "weight-int4+data",
    "dynamic-int4+data",
)
SIZES = ("weight-int8", "weight-int4", "dynamic-int8", "dynamic-int4", "static-int8")
TIMED = ("dynamic-int8", "dynamic-int4", "static-int8")
METRICS = {"top1": "top-1 %", "spearman": "Spearman x 100", "perplexity": "perplexity"}

Row = Mapping[str, Any]


def table(header: Sequence[str], rows: Iterable[Sequence[str | None]]) -> str:
    """A Markdown table with numbers to the right; columns without any cell are left out."""
    body = [[cell or "" for cell in row] for row in rows]
    kept = [index for index in range(len(header)) if index == 0 or any(row[index] for row in body)]
    rule = ["---" if index == 0 else "---:" for index in kept]
    lines = [[header[index] for index in kept], rule, *([row[index] for index in kept] for row in body)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def by_model(rows: Iterable[Row], key: str) -> dict[str, dict[str, Row]]:
    """Rows by model, then by `key`, without those that failed."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        if not row.get("failed") and row.get(key) is not None:
            found.setdefault(str(row["model"]), {})[str(row[key])] = row
    return found


def source(document: Row, command: str) -> str:
    """The sentence under a table: the command and the machine."""
    facts = document.get("machine", {})
    versions = facts.get("packages", {})
    known = ", ".join(f"{name} {versions[name]}" for name in ("torch", "onnxruntime") if name in versions)
    cores = f", {facts['cores']} cores" if "cores" in facts else ""
    return (
        f"`python -m benchmarks.{command}` on {facts.get('cpu', 'an unknown processor')}{cores}; {known or 'torch'}; "
        f"commit {facts.get('commit', 'unknown')}, {str(facts.get('date', ''))[:10]}."
    )


def change(row: Row | None) -> str | None:
    """The change of the main score: signed points, or the ratio of perplexities."""
    if row is None:
        return None
    if row.get("perplexity_ratio") is not None:
        return f"x {row['perplexity_ratio']:.4f}"
    return f"{-row['drop']:+.2f}"


def fidelity(row: Row | None) -> str | None:
    """How near the outputs are to float32's: SQNR, and the mean cosine or the agreement of the top prediction."""
    if row is None:
        return None
    more = f"cos {row['cosine']:.4f}" if row.get("cosine") is not None else ""
    if row.get("agreement") is not None:
        more = f"{row['agreement']:.1f} %"
    return ", ".join(part for part in (f"{row['sqnr_db']:.1f} dB", more) if part)


def accuracy(document: Row) -> str:
    """Two tables: what the score changes by, and how near the outputs are to float32's."""
    models = by_model(document.get("rows", ()), "variant")
    several = len({row.get("commit") for row in document.get("rows", ())}) > 1
    scores, outputs = [], []
    for model, rows in models.items():
        whole = next((row for row in rows.values() if row.get("samples") == "all"), next(iter(rows.values())))
        metric = str(whole["metric"])
        base = f"{whole['float32'][metric]:.{3 if metric == 'perplexity' else 2}f}"
        name = f"{model}, {METRICS.get(metric, metric)}"
        scores.append([name, base, *(change(rows.get(variant)) for variant in ACCURACY)])
        outputs.append([model, *(fidelity(rows.get(variant)) for variant in ACCURACY)])
    return "\n\n".join(
        (
            "**Change of the score against float32** (points; for perplexity the ratio). `+data`: with calibration "
            "data. Whatever saw calibration data is scored on other samples.",
            table(("model", "float32", *ACCURACY), scores),
            "**Nearness of the outputs to float32**: SQNR, with the agreement of the top prediction or the mean cosine "
            "of embeddings. Task scores alone hardly tell int8 models apart.",
            table(("model", *ACCURACY), outputs),
            source(document, "accuracy"),
            *(["Rows are of several commits, see [accuracy.md](benchmarks/results/accuracy.md)."] if several else []),
        )
    )


def milliseconds(row: Row, name: str) -> str | None:
    """The median of one contender."""
    timing = row["milliseconds"].get(name)
    return None if timing is None else f"{timing['median']:.3g}"


def preset_time(row: Row, preset: str) -> str | None:
    """The median of a preset, and how many times faster it is than the better float32."""
    median, result = milliseconds(row, f"narrowcast {preset}"), row["narrowcast"].get(preset)
    if median is None or result is None:
        return None
    speedups = [result["speedups"][name] for name in FLOAT32 if name in result["speedups"]]
    return f"{median} ({min(speedups):.2f}x)" if speedups else median


def latency(document: Row) -> str:
    """One table: median milliseconds at the largest number of threads."""
    rows = [row for row in document.get("rows", ()) if row.get("milliseconds")]
    threads = max((int(row["threads"]) for row in rows), default=0)
    cells = [
        [
            f"{row['model']} {row['shape']}",
            *(milliseconds(row, name) for name in FLOAT32),
            *(preset_time(row, preset) for preset in TIMED),
            *(milliseconds(row, name) for name in OTHERS),
        ]
        for row in rows
        if int(row["threads"]) == threads
    ]
    return "\n\n".join(
        (
            f"**Milliseconds per call**, {threads} threads; batch, or batch x tokens, behind the model's name. In "
            "brackets: times faster than eager float32 in the better of its memory formats.",
            table(("model", *FLOAT32, *TIMED, *OTHERS), cells),
            source(document, "latency"),
        )
    )


PEERS = ("torch float32", "ONNX Runtime float32", "ONNX Runtime int8", "OpenVINO int8")


def best_peer(contenders: Row, peer: str) -> Row | None:
    """The contender of a peer; of several forms of int8 the fastest."""
    runtime, _, what = peer.partition(" int8")
    if peer == runtime + what:
        return contenders.get(peer)
    found = [row for name, row in contenders.items() if name.startswith(runtime) and "int8" in name]
    return min(found, key=lambda row: row["median_ms"], default=None)


def timed_with_error(row: Row | None) -> str | None:
    """A median and, where something was lost, the relative error of the outputs."""
    if row is None:
        return None
    error = f" ({100 * row['relative_error']:.1f} %)" if row["relative_error"] > 1e-4 else ""
    return f"{row['median_ms']:.3g}{error}"


def networks(document: Row) -> str:
    """One table: whole networks beside other runtimes, at the largest number of threads."""
    rows = document.get("rows", ())
    threads = max((int(row["threads"]) for row in rows), default=0)
    cells = []
    for row in (row for row in rows if int(row["threads"]) == threads):
        ours = [row["contenders"].get(f"narrowcast {preset}") for preset in ("static-int8", "dynamic-int8")]
        peers = [timed_with_error(best_peer(row["contenders"], peer)) for peer in PEERS]
        cells.append([f"{row['model']} {row['shape']}", *peers, timed_with_error(ours[0] or ours[1])])
    return "\n\n".join(
        (
            f"**Milliseconds per call**, {threads} threads, and in brackets the error of the outputs relative to "
            "float32's. narrowcast is called from eager PyTorch with the static-int8 preset (minilm: dynamic-int8), "
            "the runtimes with a compiled graph of exactly this shape.",
            table(("model", *PEERS, "narrowcast"), cells),
            source(document, "networks"),
        )
    )


def sizes(document: Row) -> str:
    """One table: bytes in percent of float32, and how much sooner the first answer is there."""
    models = by_model(document.get("rows", ()), "variant")
    cells = []
    for model, rows in models.items():
        base = rows.get("float32")
        whole = None if base is None else f"{base['bytes'] / 1e6:.2f} MB"
        cells.append([model, whole, *(_size(rows.get(preset)) for preset in SIZES)])
    return "\n\n".join(
        (
            "**Bytes on disk** in percent of float32. In brackets: how many times sooner the model is loaded and has "
            "given its first answer, in a fresh process.",
            table(("model", "float32", *SIZES), cells),
            source(document, "sizes"),
        )
    )


def _size(row: Row | None) -> str | None:
    if row is None or row.get("percent") is None:
        return None
    return f"{row['percent']:.1f} % ({row['ready_speedup']:.2f}x)"


FEW_BITS = ("W4A8", "W4A8 static", "W4A4", "W4 channel", "W4 g32", "W3 g32", "W2 g32")
PERPLEXITY = ("stories260k", "textgenrnn")


def best_score(rows: Iterable[Row], model: str, *, named: bool = True) -> str | None:
    """The best score of some rows, and which method has it; None without rows."""
    kept = [row for row in rows if "score" in row and row.get("changed") == row.get("matrices")]
    if not kept:
        return None
    row = min(kept, key=lambda row: row["score"] if model in PERPLEXITY else -row["score"])
    tool = "" if row["tool"] == "narrowcast" else f"{row['tool']} "
    return f"{row['score']:.2f}" + (f" ({tool}{row['method']})" if named else "")


def low_bits(document: Row) -> str:
    """One table: scores of weights of few bits, beside the best of the other tools that change every weight matrix."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in document.get("rows", ()):
        if row["format"] in FEW_BITS:
            groups.setdefault((row["model"], row["format"]), []).append(row)
    cells = []
    for (model, form), rows in groups.items():
        ours = [row for row in rows if row["tool"] == "narrowcast"]
        default = [row for row in ours if row["method"] == "default"]
        if not default:  # "best" would be the best of what happens to be measured
            continue
        base = next((f"{row['float32']:.2f}" for row in ours if "score" in row), None)
        plain = best_score((row for row in ours if row["method"] == "rtn without data"), model, named=False)
        best = best_score(ours, model), best_score((row for row in rows if row not in ours), model)
        cells.append([f"{model}, {form}", base, plain, best_score(default, model, named=False), *best])
    return "\n\n".join(
        (
            "**Scores at few bits** (accuracy or Spearman x 100; perplexity of stories260k and textgenrnn: less is "
            "better) on samples that calibration did not see. Weights of attention, feed-forward and convolutions "
            "have the format, embeddings stay float32. Intervals, seconds, memory and all other recipes: "
            "[low_bits.md](benchmarks/results/low_bits.md).",
            *document.get("skipped", ()),
            table(("model, format", "float32", "no data", "default", "best recipe", "best other tool"), cells),
            source(document, "low_bits"),
        )
    )


SECTIONS: dict[str, tuple[str, Callable[[Row], str]]] = {
    "accuracy": ("### Accuracy", accuracy),
    "low_bits": ("### Accuracy at few bits", low_bits),
    "latency": ("### Latency", latency),
    "networks": ("### Beside other runtimes", networks),
    "sizes": ("### Size and time to the first answer", sizes),
}


def section(name: str, folder: Path) -> str:
    """One part of the section "Measured", or how to measure it."""
    title, write = SECTIONS[name]
    path = folder / f"{name}.json"
    document = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    if document is None or document.get("quick") or not document.get("rows"):
        return f"{title}\n\nNot measured yet: `python -m benchmarks.{name}`."
    return f"{title}\n\n{write(document)}"


def filled(readme: str, folder: Path) -> str:
    """The README with everything between the markers written anew.

    Args:
        readme: its text; has the two markers, in this order.
        folder: where accuracy.json, latency.json and the others lie.

    Raises:
        ValueError: a marker is missing.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the README needs the markers {BEGIN} and {END}, in this order")
    body = "\n\n".join(section(name, folder) for name in SECTIONS)
    return f"{before}{BEGIN}\n\n{body}\n\n{END}{after}"


def main(argv: list[str] | None = None) -> int:
    """Fills the README; with --check, 1 when that would change it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readme", type=Path, default=REPOSITORY / "README.md")
    parser.add_argument("--results", type=Path, default=REPOSITORY / "benchmarks" / "results")
    parser.add_argument("--check", action="store_true", help="change nothing, say whether anything would change")
    options = parser.parse_args(argv)
    text = options.readme.read_text(encoding="utf-8")
    wanted = filled(text, options.results)
    if options.check:
        print("up to date" if wanted == text else f"{options.readme} is out of date")
        return int(wanted != text)
    options.readme.write_text(wanted, encoding="utf-8")
    print(f"wrote {options.readme}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
