"""The roofline plot: what every contender of a linear layer reached against what the machine allows, one mark per peer.

    python -m benchmarks.roofline                        of benchmarks/results/linear.json, beside it
    python -m benchmarks.roofline FILE --shapes 2048x2048

Left of the ridge bandwidth decides (batch 1), right of it multiplications do (large batches). A mark below the roof has
room. Multiply-accumulates per byte count the bytes that the format itself needs.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks import results_io
from benchmarks.linear_problem import FLOAT, INT4, INT4_WEIGHTS, INT8, INT8_WEIGHTS

Row = dict[str, Any]
MARKS = "osD^vP*X<>phHd8"
PANELS = ((INT8, "int8 weights and activations"), (INT4, "4-bit weights, int8 activations"))
PANELS += ((INT8_WEIGHTS, "int8 weights, float activations"), (INT4_WEIGHTS, "4-bit weights, float activations"))
ROOFS = (("int8", "multiply peak int8"), ("bfloat16", "multiply peak bfloat16"), ("float32", "multiply peak float32"))


def point(row: Row) -> tuple[float, float]:
    """(multiply-accumulates per byte, 1e9 multiply-accumulates per second) of one row."""
    outputs, inputs = map(int, row["shape"].split("x"))
    macs = row["batch"] * outputs * inputs
    size = outputs * inputs * row["bits"] / 8 + 4 * row["batch"] * (outputs + inputs)
    return macs / size, macs / row["median_us"] / 1e3


def draw_roofs(axes: Any, limit: dict[str, Any], level: str, reach: tuple[float, float]) -> None:
    """The slanted bandwidth line and the flat multiply peaks."""
    left, right = reach
    bandwidth = limit["read_gbs"][level]
    highest = max(limit["gmacs"].values())
    axes.plot([left, highest / bandwidth], [left * bandwidth, highest], color="black", lw=1)
    axes.text(left, left * bandwidth * 1.15, f"{level} read, {bandwidth:.0f} GB/s", fontsize=7, rotation=0)
    for operand, label in ROOFS:
        if operand in limit["gmacs"]:
            peak = limit["gmacs"][operand]
            axes.plot([peak / bandwidth, right], [peak, peak], color="black", lw=1, ls="-" if peak == highest else ":")
            axes.text(right, peak * 1.05, f"{label}, {peak:.0f}", fontsize=7, ha="right")


def draw_panel(axes: Any, rows: list[Row], family: str, marks: dict[str, str]) -> None:
    """The marks of one family and of float; narrowcast's are filled."""
    names = list(dict.fromkeys(row["contender"] for row in rows if row["family"] in (family, FLOAT)))
    for name in names:
        points = sorted(point(row) for row in rows if row["contender"] == name)
        ours = name.startswith("narrowcast")
        style = {"color": "tab:red" if ours else None, "markerfacecolor": None if ours else "none"}
        axes.plot(*zip(*points, strict=True), marker=marks[name], ms=6, lw=0.7 if ours else 0.3, label=name, **style)
    axes.legend(fontsize=6, loc="lower right")


def level_of(rows: list[Row]) -> str:
    """The slowest memory that any of the rows reads its weight from: the line that bounds them all."""
    levels = [row["level"] for row in rows]
    return max(levels, key=("L1", "L2", "L3", "DRAM").index)


def draw(document: dict[str, Any], shape: str, threads: int, mode: str, path: Path) -> None:
    """Writes the plot of one shape, thread count and mode.

    Args:
        document: what benchmarks.linear wrote.
        shape: "4096x4096".
        threads: one of the measured thread counts.
        mode: "hot" or "cold".
        path: .svg or .png file.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "narrowcast"  # the same file for the same results
    from matplotlib import pyplot

    rows = [row for row in document["rows"] if (row["shape"], row["threads"], row["mode"]) == (shape, threads, mode)]
    names = dict.fromkeys(row["contender"] for row in rows)
    marks = {name: MARKS[number % len(MARKS)] for number, name in enumerate(names)}
    limit = next(limit for limit in document["limits"] if limit["threads"] == threads)
    every = [point(row)[0] for row in rows]
    figure, panels = pyplot.subplots(2, 2, figsize=(14, 10), sharex=True, sharey=True)
    for axes, (family, title) in zip(panels.flat, PANELS, strict=True):
        axes.set(xscale="log", yscale="log", title=title)
        if limit["gmacs"] and limit["read_gbs"]:
            draw_roofs(axes, limit, level_of(rows), (min(every), max(every)))
        draw_panel(axes, rows, family, marks)
    figure.supxlabel("multiply-accumulates per byte read and written")
    figure.supylabel("1e9 multiply-accumulates per second")
    figure.suptitle(f"{shape}, {threads} thread{'s' * (threads > 1)}, {mode}; batches from left to right")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def draw_all(
    document: dict[str, Any], folder: Path, shapes: list[str] | None = None, name: str = "linear"
) -> list[Path]:
    """The plots of some shapes, by default of the one with most rows, for every measured thread count and mode."""
    rows = document["rows"]
    counted = [row["shape"] for row in rows]
    written = []
    for shape in shapes or [max(dict.fromkeys(counted), key=counted.count)]:
        for threads, mode in dict.fromkeys((r["threads"], r["mode"]) for r in rows if r["shape"] == shape):
            path = folder / f"{name}-{shape}-{threads}-{mode}.svg"
            draw(document, shape, threads, mode, path)
            written.append(path)
    return written


def draw_beside(document: dict[str, Any], folder: Path, name: str) -> None:
    """Draws the plots of the run called `name`, or says why not."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no plot: matplotlib is not installed")
        return
    for path in draw_all(document, folder, name=name):
        print(f"wrote {path}")


def main(argv: list[str] | None = None) -> int:
    """Reads results and writes their plots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = results_io.folder_of(True) / "linear.json"
    parser.add_argument("file", nargs="?", type=Path, default=default, help="a linear.json")
    parser.add_argument("--shapes", nargs="+", help="shapes to draw (default: the one with most measurements)")
    chosen = parser.parse_args(argv)
    document = json.loads(chosen.file.read_text(encoding="utf-8"))
    for path in draw_all(document, chosen.file.parent, chosen.shapes, chosen.file.stem):
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
