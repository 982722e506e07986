"""Every benchmark in turn, each in a process of its own: `python -m benchmarks [--quick] [--out FOLDER]`."""

from __future__ import annotations

import subprocess
import sys

from benchmarks.machine import REPOSITORY

BENCHMARKS = (
    "accuracy",
    "latency",
    "sizes",
    "networks",
    "linear",
    "conv",
    "quantizing",
    "low_bits",
    "onnx",
    "onnx_portable",
    "onnx_algorithms",
    "onnx_web",
    "qat",
    "qat_speed",
    "qat_decoder",
    "adapters",
    "onnx_memory",
    "onnx_fuzz",
)


def main(argv: list[str] | None = None) -> int:
    """Runs all benchmarks with the same options; 1 when one of them fails, which does not stop the others."""
    options = sys.argv[1:] if argv is None else argv
    failed = []
    for name in BENCHMARKS:
        print(f"=== benchmarks.{name}", flush=True)
        command = [sys.executable, "-m", f"benchmarks.{name}", *options]
        if subprocess.run(command, cwd=REPOSITORY, check=False).returncode:
            failed.append(name)
    print(f"failed: {', '.join(failed)}" if failed else "all benchmarks ran")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
