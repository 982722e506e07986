"""How the results of benchmarks.linear are compared, judged and shown; runs nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import exp, log
from typing import Any

from benchmarks import results_io
from benchmarks.linear_problem import INT4, INT8, RIVALS

Row = dict[str, Any]
CASE = ("shape", "batch", "threads", "mode")
INT8_MAIN, INT4_MAIN, INT4_WIDE = "narrowcast int8 uint8/token", "narrowcast int4 g32", "narrowcast int4 g128"
INT4_FLOAT = "narrowcast weight-only int4 g32 bfloat16"


def is_ours(row: Row) -> bool:
    """Whether narrowcast ran."""
    return bool(row["contender"].startswith("narrowcast"))


def case_of(row: Row) -> tuple[Any, ...]:
    """What the rows of one interleaved measurement have in common."""
    return tuple(row[key] for key in CASE)


def with_ratios(rows: list[Row]) -> list[Row]:
    """The rows of one case, narrowcast's with their fastest rival and how many times faster they are.

    A rival is a peer of the same family or of a more exact one; see RIVALS.
    """
    for row in filter(is_ours, rows):
        rivals = [other for other in rows if not is_ours(other) and other["family"] in RIVALS[row["family"]]]
        if rivals:
            best = min(rivals, key=lambda other: other["median_us"])
            row |= {"rival": best["contender"], "ratio": round(best["median_us"] / row["median_us"], 3)}
            quickest = min(other["fastest_us"] for other in rivals)  # undisturbed, also on a busy machine
            row["ratio_of_fastest"] = round(quickest / row["fastest_us"], 3)
    return rows


def progress(rows: list[Row], case: Row) -> str:
    """One line per case for the terminal: narrowcast's formats with the fraction of the roof and the ratio."""
    mine = [row for row in rows if is_ours(row) and case_of(row) == case_of(case)]
    parts = [f"{row['contender'].removeprefix('narrowcast ')} {cell(row)}" for row in mine]
    head = f"{case['shape']} M={case['batch']} {case['threads']}T {case['mode']} load {case['load_average']}: "
    return head + ("; ".join(parts) or "peers only")


def cell(row: Row | None) -> str | None:
    """Microseconds, fraction of the roof, times the fastest rival."""
    if row is None:
        return None
    roof = f", {100 * row['r_roof']:.0f} %" if "r_roof" in row else ""
    ratio = f", x{row['ratio']:.2f}" if "ratio" in row else ""
    return f"{row['median_us']:.4g} us{roof}{ratio}"


@dataclass(frozen=True)
class Target:
    """A bound that the kernels must keep, on every row that it applies to.

    Attributes:
        text: what is asked, for the page.
        contender: the row's contender.
        applies: which of its rows are judged.
        quantity: key of the row.
        least: the smallest value allowed; None where `most` counts.
        most: the largest value allowed.
    """

    text: str
    contender: str
    applies: Callable[[Row], bool]
    quantity: str
    least: float | None = None
    most: float | None = None

    def met(self, value: float) -> bool:
        """Whether `value` keeps the bound."""
        return value >= self.least if self.least is not None else value <= (self.most or 0.0)


def _vector_cold(row: Row) -> bool:
    return row["mode"] == "cold" and row["batch"] == 1


def _few_cold(row: Row) -> bool:
    return row["mode"] == "cold" and 2 <= row["batch"] <= 12


def _hot(least: int, most: int) -> Callable[[Row], bool]:
    return lambda row: row["mode"] == "hot" and least <= row["batch"] <= most


def _smallest(row: Row) -> bool:
    return (row["shape"], row["batch"], row["threads"], row["mode"]) == ("384x384", 1, 1, "hot")


MANY = 1 << 30
TARGETS = (
    Target("int8 matrix-vector, cold: 0.90 of read bandwidth", INT8_MAIN, _vector_cold, "r_bw", least=0.90),
    Target("int4 g32 matrix-vector, cold: 0.85 of read bandwidth", INT4_MAIN, _vector_cold, "r_bw", least=0.85),
    Target("int8, batch 2-12, cold: at most 1.15 x batch 1", INT8_MAIN, _few_cold, "times_batch_1", most=1.15),
    Target("int4 g32, batch 2-12, cold: at most 1.3 x batch 1", INT4_MAIN, _few_cold, "times_batch_1", most=1.3),
    Target("int8, batch 16: 0.75 of the multiply peak", INT8_MAIN, _hot(16, 16), "r_mac", least=0.75),
    Target("int8, batch >= 128: 0.82 of the multiply peak", INT8_MAIN, _hot(128, MANY), "r_mac", least=0.82),
    Target("int4 g32, batch >= 128: 0.70 of the multiply peak", INT4_MAIN, _hot(128, MANY), "r_mac", least=0.70),
    Target("int4 g128, batch >= 128: 0.75 of the multiply peak", INT4_WIDE, _hot(128, MANY), "r_mac", least=0.75),
    Target("weight-only int4, batch 1, cold: 0.80 of read bandwidth", INT4_FLOAT, _vector_cold, "r_bw", least=0.80),
    Target("weight-only int4, batch >= 128: 0.75 of the float peak", INT4_FLOAT, _hot(128, MANY), "r_mac", least=0.75),
    Target("int8 384x384, batch 1, 1 thread: at most 5 us", INT8_MAIN, _smallest, "median_us", most=5.0),
    Target("int4 384x384, batch 1, 1 thread: at most 5 us", INT4_MAIN, _smallest, "median_us", most=5.0),
    Target("int8: at least as fast as the fastest rival", INT8_MAIN, lambda row: True, "ratio", least=1.0),
    Target("int4 g32: at least as fast as the fastest rival", INT4_MAIN, lambda row: True, "ratio", least=1.0),
)
MEANS = ((INT8, INT8_MAIN, 1.1), (INT4, INT4_MAIN, 1.5))


def with_batch_ratios(rows: list[Row]) -> list[Row]:
    """The rows with their time over that of batch 1 of the same shape, threads and mode, where both are there."""
    first = {(r["contender"], r["shape"], r["threads"], r["mode"]): r["median_us"] for r in rows if r["batch"] == 1}
    for row in rows:
        base = first.get((row["contender"], row["shape"], row["threads"], row["mode"]))
        if base:
            row["times_batch_1"] = round(row["median_us"] / base, 3)
    return rows


def judged(rows: list[Row]) -> list[dict[str, Any]]:
    """Every target with how many of its cases keep it, and the worst case.

    Returns:
        [{"target", "kept", "cases", "worst", "worst_case", "met"}]; "met" is None where no case was measured.
    """
    found = []
    for target in TARGETS:
        values = [
            (row[target.quantity], row)
            for row in with_batch_ratios(rows)
            if row["contender"] == target.contender and target.quantity in row and target.applies(row)
        ]
        verdict: dict[str, Any] = {"target": target.text, "cases": len(values), "met": None}
        if values:
            pick = min if target.least is not None else max
            worst, row = pick(values, key=lambda value: value[0])
            kept = sum(target.met(value) for value, _ in values)
            case = f"{row['shape']} M={row['batch']} {row['threads']}T {row['mode']}"
            verdict |= {"kept": kept, "worst": worst, "worst_case": case, "met": kept == len(values)}
        found.append(verdict)
    return found + [_mean_verdict(rows, *mean) for mean in MEANS]


def _mean_verdict(rows: list[Row], family: str, contender: str, least: float) -> dict[str, Any]:
    ratios = [row["ratio"] for row in rows if row["contender"] == contender and "ratio" in row]
    verdict: dict[str, Any] = {
        "target": f"{family}: geometric mean over all cases at least {least} x the fastest rival"
    }
    if not ratios:
        return verdict | {"cases": 0, "met": None}
    mean = exp(sum(map(log, ratios)) / len(ratios))
    return verdict | {"cases": len(ratios), "kept": None, "worst": round(mean, 3), "met": mean >= least}


def target_table(rows: list[Row]) -> str:
    """The targets as a Markdown table."""
    cells = [
        [
            verdict["target"],
            verdict["cases"],
            verdict.get("kept"),
            f"{verdict['worst']:.3g}" if "worst" in verdict else None,
            verdict.get("worst_case"),
            {True: "yes", False: "**no**", None: "not measured"}[verdict["met"]],
        ]
        for verdict in judged(rows)
    ]
    return results_io.table(["target", "cases", "kept in", "worst (or mean)", "worst case", "met"], cells)


def unique(values: Iterable[Any]) -> list[Any]:
    """The values in the order of their first appearance."""
    return list(dict.fromkeys(values))


def case_table(rows: list[Row], threads: int, mode: str, *, ours: bool) -> str:
    """One line per shape and batch, one column per contender."""
    chosen = [row for row in rows if row["threads"] == threads and row["mode"] == mode and is_ours(row) == ours]
    names = unique(row["contender"] for row in chosen)
    cases: dict[tuple[str, int], dict[str, Row]] = {}
    for row in chosen:
        cases.setdefault((row["shape"], row["batch"]), {})[row["contender"]] = row
    cells = [[*case, *(cell(found.get(name)) for name in names)] for case, found in cases.items()]
    who = "narrowcast" if ours else "peers"
    title = f"### {who}, {threads} thread{'s' * (threads > 1)}, {mode}"
    header = ["shape", "batch", *(name.removeprefix("narrowcast ") for name in names)]
    return f"{title}\n\n{results_io.table(header, cells)}"


def error_table(rows: list[Row]) -> str:
    """The worst error of every contender over all cases."""
    worst: dict[str, float] = {}
    for row in rows:
        worst[row["contender"]] = max(row["error"], worst.get(row["contender"], 0.0))
    return results_io.table(["contender", "largest error / largest value"], [[n, f"{e:.4f}"] for n, e in worst.items()])


def markdown(facts: dict[str, Any], limit_tables: list[str], rows: list[Row], skipped: dict[str, str]) -> str:
    """The Markdown page of a run."""
    reasons: dict[str, list[str]] = {}
    for name, reason in skipped.items():
        shape, _, contender = name.partition(", ")
        reasons.setdefault(f"{contender}: {reason}", []).append(shape)
    sections = [
        "Shape is outputs x inputs. A cell is the median time of a whole call from a float input to a float output, "
        "the fraction of the roof (the larger of bytes over read bandwidth and multiplications over multiply peak, "
        "over the time), and how many times faster than the fastest rival. Rivals are the peers of the same kind of "
        "product and float. Cold rotates copies of the weight that are four times as large as the last cache.",
        f"Limits before the run:\n\n{limit_tables[0]}\n\nand after it:\n\n{limit_tables[1]}",
        target_table(rows),
        *(
            case_table(rows, threads, mode, ours=ours)
            for threads in unique(row["threads"] for row in rows)
            for mode in unique(row["mode"] for row in rows)
            for ours in (True, False)
        ),
        "Errors against torch float32, the worst of all cases:\n\n" + error_table(rows),
        "Not measured:\n" + "\n".join(f"- {reason} ({', '.join(shapes)})" for reason, shapes in reasons.items()),
    ]
    return results_io.page("Linear layers", facts, sections)
