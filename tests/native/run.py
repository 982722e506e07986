"""Builds and runs the native kernel tests: for Arm under emulation, or for this machine with the sanitizers.

    python tests/native/run.py arm
    python tests/native/run.py sanitize

Exit status 0 when every tier equals the scalar one; 3 when a tool is missing, with what to install.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
BUILD = HERE.parents[1] / "build"

ARM_RUNS = (
    # processor, rounds, tiers that must run there; the last one must be the one that is chosen
    ("max", "2000", ("neondot", "neoni8mm")),
    ("neoverse-n1", "500", ("neondot",)),
    ("cortex-a53", "100", ("scalar",)),
)
SANITIZE_ROUNDS = "2500"
TOOLS = {
    "arm": {
        "aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu",
        "qemu-aarch64": "qemu-user",
        "cmake": "cmake",
        "ninja": "ninja-build",
    },
    "sanitize": {"g++": "g++", "cmake": "cmake", "ninja": "ninja-build"},
}


def missing_tools(kind: str) -> str:
    """What is not installed for one kind of run, and how Debian calls it; "" when everything is there."""
    absent = {tool: package for tool, package in TOOLS[kind].items() if shutil.which(tool, path=search_path()) is None}
    if not absent:
        return ""
    return f"not found: {', '.join(absent)} (on Debian or Ubuntu: apt install {' '.join(absent.values())})"


def search_path() -> str:
    """PATH with this Python's own tools first: `make setup` installs cmake and ninja there."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def run(kind: str) -> int:
    """Build and run one kind; returns the first exit status that is not 0."""
    build = BUILD / f"native-{kind}"
    options = {
        "arm": [
            "-DCMAKE_SYSTEM_NAME=Linux",
            "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
            "-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++",
        ],
        "sanitize": ["-DSANITIZE=ON", "-DCMAKE_CXX_COMPILER=g++"],
    }[kind]
    commands = [
        ["cmake", "-S", str(HERE), "-B", str(build), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", *options],
        ["ninja", "-C", str(build)],
    ]
    program = str(build / "kernel_tests")
    if kind == "arm":
        commands += [["qemu-aarch64", "-cpu", cpu, program, rounds, *tiers] for cpu, rounds, tiers in ARM_RUNS]
    else:
        commands.append([program, SANITIZE_ROUNDS])
    # The program chooses by the CPU alone.
    environment = {key: value for key, value in os.environ.items() if key != "NARROWCAST_ISA"}
    environment["PATH"] = search_path()
    for command in commands:
        print("+", " ".join(command), flush=True)
        status = subprocess.run(command, env=environment, check=False).returncode
        if status != 0:
            return status
    return 0


def main(arguments: list[str]) -> int:
    """Run the kind that the command line names."""
    if len(arguments) != 1 or arguments[0] not in TOOLS:
        print(f"usage: run.py {'|'.join(TOOLS)}", file=sys.stderr)
        return 2
    reason = missing_tools(arguments[0])
    if reason:
        print(f"cannot run the {arguments[0]} kernel tests: {reason}", file=sys.stderr)
        return 3
    return run(arguments[0])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
