"""Every benchmark, one after the other: `python -m benchmarks [options that all of them take]`."""

from __future__ import annotations

import sys

from benchmarks import accuracy, latency, sizes


def main(argv: list[str] | None = None) -> int:
    """Runs accuracy, latency and sizes with the same options; 1 when one of them returns 1."""
    return max([benchmark.main(argv) for benchmark in (accuracy, latency, sizes)])


if __name__ == "__main__":
    sys.exit(main())
