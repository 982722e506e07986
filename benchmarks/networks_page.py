"""How the results of benchmarks.networks are judged and shown; runs nothing."""

from __future__ import annotations

from typing import Any

from benchmarks import results_io

ONNXRUNTIME_STATIC = "ONNX Runtime static int8"
ONNXRUNTIME_DYNAMIC = "ONNX Runtime dynamic int8"
OPENVINO_INT8 = "OpenVINO int8"
# Network and shape -> the preset that must be at least as fast as the peer.
TARGETS = {
    **{(name, "32"): ("static-int8", ONNXRUNTIME_STATIC) for name in ("resnet20", "mobilenetv1", "squeezenet11")},
    **{("minilm", shape): ("dynamic-int8", ONNXRUNTIME_DYNAMIC) for shape in ("32x64", "8x256")},
}
COMPARED_WITH = (ONNXRUNTIME_STATIC, ONNXRUNTIME_DYNAMIC, OPENVINO_INT8)


def shape_name(shape: tuple[int, ...]) -> str:
    """(1,) -> "1", (32, 64) -> "32x64"."""
    return "x".join(map(str, shape))


def verdict(row: dict[str, Any]) -> dict[str, Any]:
    """Speed-up of every narrowcast preset over the int8 peers, and whether this row's target is met.

    Returns:
        {"speedups": {preset: {peer: peer's milliseconds / narrowcast's}}, "met": bool or None without a target}.
    """
    timed = row["contenders"]
    speedups: dict[str, dict[str, float]] = {}
    for name in timed:
        preset = name.removeprefix("narrowcast ")
        if preset != name and not preset.endswith("channels_last"):
            mine = timed[name]["median_ms"]
            speedups[preset] = {
                peer: round(timed[peer]["median_ms"] / mine, 3) for peer in COMPARED_WITH if peer in timed
            }
    target = TARGETS.get((row["model"], row["shape"]))
    reached = speedups.get(target[0], {}).get(target[1]) if target else None
    return {"speedups": speedups, "met": None if reached is None else reached >= 1.0}


def summary(row: dict[str, Any]) -> str:
    """A few lines for the terminal."""
    lines = [f"{row['model']} {row['shape']}, {row['threads']} threads, load {row['load_average']}"]
    for name, found in row["contenders"].items():
        lines.append(f"  {found['median_ms']:9.3f} ms (fastest {found['fastest_ms']:.3f})  {name}  {error_text(found)}")
    lines += [f"  skipped {name}: {reason}" for name, reason in {**row["skipped"], **row["failed"]}.items()]
    return "\n".join(lines)


def error_text(found: dict[str, Any]) -> str:
    """Relative error with the agreement or the cosine."""
    if "relative_error" not in found:
        return ""
    closeness = f"{found['agreement']:.1f} %" if "agreement" in found else f"cosine {found['cosine']:.4f}"
    return f"{found['relative_error']:.3f}, {closeness}"


def contender_table(row: dict[str, Any]) -> str:
    """One network, shape and thread count: time, speed and error of every contender, the fastest first."""
    base = next(iter(row["contenders"].values()))["median_ms"]
    ordered = sorted(row["contenders"].items(), key=lambda item: item[1]["median_ms"])
    cells = [
        [
            f"**{name}**" if name.startswith("narrowcast") else name,
            *(f"{found[key]:.3g}" for key in ("median_ms", "fastest_ms")),
            f"{base / found['median_ms']:.2f}",
            f"{row['macs'] / found['median_ms'] / 1e6:.0f}",
            error_text(found),
        ]
        for name, found in ordered
    ]
    header = ["contender", "median ms", "fastest ms", "times torch float32", "GMAC/s", "error against float32"]
    title = f"### {row['model']}, {row['shape']}, {row['threads']} threads (load {row['load_average']})"
    return f"{title}\n\n{results_io.table(header, cells)}"


def speedup_table(rows: list[dict[str, Any]]) -> str:
    """How narrowcast compares with the int8 peers in every row."""
    cells = [
        [
            *(row["model"], row["shape"], row["threads"], preset),
            *(results_io.rounded(speedups.get(peer), 2) for peer in COMPARED_WITH),
            {True: "yes", False: "**no**"}.get(row["verdict"]["met"]) if _is_judged(row, preset) else None,
        ]
        for row in rows
        for preset, speedups in row["verdict"]["speedups"].items()
    ]
    header = ["network", "shape", "threads", "preset", *(f"over {peer}" for peer in COMPARED_WITH), "target met"]
    return results_io.table(header, cells)


def _is_judged(row: dict[str, Any], preset: str) -> bool:
    return TARGETS.get((row["model"], row["shape"]), (None,))[0] == preset


def skipped_lines(rows: list[dict[str, Any]]) -> list[str]:
    """Every contender that could not run, once per network, with its reason."""
    reasons = [
        f"{row['model']}, {name}: {reason}"
        for row in rows
        for name, reason in {**row["skipped"], **row["failed"]}.items()
    ]
    return list(dict.fromkeys(reasons))


def markdown(facts: dict[str, Any], rows: list[dict[str, Any]], skipped: list[str]) -> str:
    """The Markdown page of a run."""
    judged = [row["verdict"]["met"] for row in rows if row["verdict"]["met"] is not None]
    sections = [
        "Milliseconds per call in eager mode; interleaved bursts in one process; shape is batch, or batch x tokens. "
        "Error: norm of the difference of logits or hidden states over their norm, then the share of images put into "
        "the same class as float32, or the mean cosine of the token vectors. ONNX Runtime's threads do not spin. "
        "OpenVINO default computes floating point in bfloat16 where the processor has it.",
        "Speed-up of narrowcast over the int8 peers, above 1 is faster. Target: convolutional networks at batch 32 at "
        "least as fast as ONNX Runtime's static int8, MiniLM at 32x64 and 8x256 as its dynamic int8. "
        f"Met: {sum(judged)} of {len(judged)}.",
        speedup_table(rows),
        *map(contender_table, rows),
        "Not measured:\n" + "\n".join(f"- {line}" for line in [*skipped, *skipped_lines(rows)]),
    ]
    return results_io.page("Whole networks", facts, sections)
