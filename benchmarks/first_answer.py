"""The fresh process of benchmarks.sizes: import, load one checkpoint, answer one batch, say what that took.

    python -m benchmarks.first_answer MODEL CHECKPOINT BATCH ANSWER --threads 2

Prints one JSON object. A checkpoint that is a file is float32, one that is a folder is narrowcast's.
"""

from __future__ import annotations

import time

STARTED = time.perf_counter()

import argparse  # noqa: E402  everything below belongs to the measured imports
import json  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from benchmarks.kit import Batch, KitModel, kit_model, run  # noqa: E402


def memory_mib(field: str) -> float:
    """A memory figure of this process: "VmRSS" now, "VmHWM" at most since the last reset; 0 where /proc is absent."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(field + ":")), 0.0)


def reset_peak() -> None:
    """Makes "VmHWM" start again from the memory in use now (Linux, proc(5), clear_refs)."""
    control = Path("/proc/self/clear_refs")
    if control.exists():
        control.write_text("5")


def read_batch(path: Path) -> Batch:
    """The batch that benchmarks.sizes wrote, in memory of its own."""
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    return tensors["input"] if tensors.keys() == {"input"} else tensors


def load(kit: KitModel, checkpoint: Path) -> torch.nn.Module:
    """The model of a float32 file or a narrowcast folder."""
    if checkpoint.is_file():
        return kit.load(checkpoint)
    import narrowcast as nc

    return nc.load(checkpoint, into=kit.skeleton())


def main(argv: list[str] | None = None) -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    for name in ("checkpoint", "batch", "answer"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--threads", type=int, default=2)
    chosen = parser.parse_args(argv)
    kit = kit_model(chosen.model)
    if chosen.checkpoint.is_dir():
        import narrowcast

        narrowcast.load  # noqa: B018  imported on first use, which is not part of loading
    torch.set_num_threads(chosen.threads)
    batch = read_batch(chosen.batch)
    reset_peak()
    before = memory_mib("VmRSS")
    imported = time.perf_counter()
    model = load(kit, chosen.checkpoint)
    loaded = time.perf_counter()
    with torch.inference_mode():
        answer = run(model, batch)
    answered = time.perf_counter()
    measured = {
        "import_ms": 1000 * (imported - STARTED),
        "load_ms": 1000 * (loaded - imported),
        "first_ms": 1000 * (answered - loaded),
        "resident_mib": memory_mib("VmRSS") - before,
        "peak_mib": memory_mib("VmHWM") - before,
    }
    if chosen.answer.exists():
        tensor = answer if isinstance(answer, torch.Tensor) else answer.last_hidden_state
        measured["identical_answer"] = torch.equal(tensor, load_file(chosen.answer)["answer"])
    print(json.dumps(measured))
    return 0


if __name__ == "__main__":
    sys.exit(main())
