"""What this machine can do at most: multiply-accumulates per second and read bandwidth, per level and thread count.

    python -m benchmarks.limits                          prints the limits of 1 and 2 threads, into build/benchmarks

The loops are native (csrc/limits*.cpp) and belong to the instruction-set tier in use, so NARROWCAST_ISA=avx2 gives the
limits of AVX2. Every thread works on memory of its own. The best of many short repeats counts: a limit is a maximum.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import results_io
from benchmarks.machine import machine

FORMATS = ("int8", "float32", "bfloat16")
LEVELS = ("L1", "L2", "L3", "DRAM")
TYPICAL_CACHES = {"L1": 32 << 10, "L2": 1 << 20, "L3": 32 << 20}  # where the system does not tell
DRAM_BYTES = 256 << 20
CALL_SECONDS = 0.005  # a call this long makes the start of a thread negligible and still finds quiet moments


@dataclass(frozen=True)
class Limits:
    """The limits of one thread count.

    Attributes:
        threads: how many threads worked at once.
        gmacs: 1e9 multiply-accumulates per second by operand format; a format that the tier lacks is missing.
        read_gbs: 1e9 bytes per second read by level of memory.
    """

    threads: int
    gmacs: Mapping[str, float]
    read_gbs: Mapping[str, float]

    def seconds(self, *, macs: float, operand: str, size: float, level: str) -> float | None:
        """The least time for so many multiply-accumulates and so many bytes; None where a limit is not known."""
        if operand not in self.gmacs or level not in self.read_gbs:
            return None
        return max(macs / self.gmacs[operand], size / self.read_gbs[level]) / 1e9


def cache_bytes() -> dict[str, int]:
    """Bytes of the data caches of the first core, as Linux tells them."""
    found = dict(TYPICAL_CACHES)
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        if (folder / "type").read_text().strip() != "Instruction":
            size = (folder / "size").read_text().strip()
            found[f"L{(folder / 'level').read_text().strip()}"] = int(size.removesuffix("K")) << 10
    return found


def library() -> ctypes.CDLL | None:
    """The native library's C functions; None when it was not built."""
    import narrowcast as nc

    path = nc.kernels.capability().library
    if path is None:
        return None
    functions = ctypes.CDLL(path)
    functions.narrowcast_limit_multiply.restype = ctypes.c_int64
    functions.narrowcast_limit_multiply.argtypes = [ctypes.c_char_p, ctypes.c_int64]
    functions.narrowcast_limit_read.restype = ctypes.c_int64
    functions.narrowcast_limit_read.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
    return functions


def together(work: list[Callable[[], int]]) -> float:
    """Runs every piece of work in a thread of its own, all at once; what they did per nanosecond."""
    start = threading.Barrier(len(work))
    done: list[float] = [0.0] * len(work)

    def one(index: int) -> None:
        start.wait()
        began = time.perf_counter()
        amount = work[index]()  # ctypes releases the interpreter's lock
        done[index] = amount / (time.perf_counter() - began) / 1e9

    threads = [threading.Thread(target=one, args=(index,)) for index in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(done)


def best_rate(work: Callable[[int, int], int], threads: int, seconds: float) -> float:
    """The highest rate within `seconds`, with as many repeats in a call as fill CALL_SECONDS.

    Args:
        work: (number of the thread, repeats) -> the amount done.
        threads: how many work at once.
        seconds: how long to try.

    Returns:
        Amount per nanosecond; 0.0 where the machine has no such kernel.
    """
    repeats = 1
    while True:  # find how many repeats fill a call
        began = time.perf_counter()
        if work(0, repeats) == 0:
            return 0.0
        if time.perf_counter() - began > CALL_SECONDS:
            break
        repeats *= 2
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end or best == 0.0:
        best = max(best, together([partial(work, index, repeats) for index in range(threads)]))
    return best


def measure(threads: int, *, seconds: float = 0.4) -> Limits:
    """The limits of this many threads in the tier in use.

    Args:
        threads: how many threads work at once.
        seconds: how long each of the seven limits is tried.

    Returns:
        The limits; both tables are empty without the native library or in a tier without such loops.
    """
    functions = library()
    if functions is None:
        return Limits(threads, {}, {})
    gmacs = {}
    for operand in FORMATS:

        def multiply(_: int, repeats: int, name: bytes = operand.encode()) -> int:
            return int(functions.narrowcast_limit_multiply(name, 1000 * repeats))

        if rate := best_rate(multiply, threads, seconds):
            gmacs[operand] = round(rate, 1)
    return Limits(threads, gmacs, read_bandwidths(functions, threads, seconds))


def read_bandwidths(functions: ctypes.CDLL, threads: int, seconds: float) -> dict[str, float]:
    """1e9 bytes per second by level: half of L1 and L2, a quarter of the shared L3, and far more than all of them."""
    caches = cache_bytes()
    sizes = {"L1": caches["L1"] // 2, "L2": caches["L2"] // 2, "L3": caches["L3"] // 4 // threads, "DRAM": DRAM_BYTES}
    found = {}
    for level, size in sizes.items():
        buffers = [torch.ones(size, dtype=torch.uint8) for _ in range(threads)]  # written, so that pages exist

        def read(index: int, repeats: int, size: int = size, buffers: list[torch.Tensor] = buffers) -> int:
            return int(functions.narrowcast_limit_read(buffers[index].data_ptr(), size, repeats))

        if rate := best_rate(read, threads, seconds):
            found[level] = round(rate, 1)
    return found


def table(limits: list[Limits]) -> str:
    """The limits as a Markdown table."""
    header = ["threads", *(f"{name} GMAC/s" for name in FORMATS), *(f"{level} GB/s" for level in LEVELS)]
    rows = [
        [
            limit.threads,
            *(results_io.rounded(limit.gmacs.get(name), 0) for name in FORMATS),
            *(results_io.rounded(limit.read_gbs.get(level), 1) for level in LEVELS),
        ]
        for limit in limits
    ]
    return results_io.table(header, rows)


def as_data(limits: list[Limits]) -> list[dict[str, Any]]:
    """The limits for a result file."""
    return [asdict(limit) for limit in limits]


def main(argv: list[str] | None = None) -> int:
    """Prints and writes the limits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="thread counts (default: 1 2)")
    parser.add_argument("--seconds", type=float, default=0.4, help="how long each limit is tried (default: 0.4)")
    parser.add_argument("--out", type=Path, help="folder of the results (default: build/benchmarks)")
    chosen = parser.parse_args(argv)
    facts = machine()
    limits = [measure(threads, seconds=chosen.seconds) for threads in chosen.threads]
    print(table(limits))
    page = results_io.page("Limits of the machine", facts, [table(limits)])
    document = {"machine": facts, "limits": as_data(limits)}
    results_io.write_results(chosen.out or results_io.folder_of(False), "limits", document, page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
