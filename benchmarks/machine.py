"""What a result must say about where and when it was measured."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "numpy", "safetensors", "transformers", "onnxruntime", "onnx", "onnxscript", "openvino", "nncf")
REPOSITORY = Path(__file__).resolve().parents[1]


def machine() -> dict[str, Any]:
    """The machine, the software and the moment, as plain data for a result file."""
    import narrowcast as nc

    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := installed_version(name))},
        "narrowcast": f"kernels {nc.kernels.capability().isa}, {torch.get_num_threads()} threads",
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "threads": torch.get_num_threads(),
    }


def cpu_model() -> str:
    """The processor as the operating system names it, with the instruction sets torch would use on it."""
    name = platform.processor() or platform.machine()
    description = Path("/proc/cpuinfo")
    if description.exists():
        fields = dict(
            line.split(":", 1) for line in description.read_text().split("\n\n")[0].splitlines() if ":" in line
        )
        values = {key.strip(): value.strip() for key, value in fields.items()}
        family = f"family {values.get('cpu family', '?')} model {values.get('model', '?')}"
        name = f"{values.get('model name', name)}, {family}"
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def installed_version(package: str) -> str | None:
    """Version of an installed package, None when it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str:
    """The commit measured, with "+changes" where tracked source differs from it; "unknown" outside a repository."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", "src", "csrc", "benchmarks/*.py")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+changes" if changed else "")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def machine_sentence(facts: dict[str, Any]) -> str:
    """One Markdown paragraph of those facts."""
    versions = ", ".join(f"{name} {version}" for name, version in facts["packages"].items())
    return (
        f"Machine: {facts['cpu']}; {facts['cores']} cores, {facts['memory_gib']} GiB; load average at start "
        f"{facts['load_average'][0]}. Python {facts['python']}, {versions}. narrowcast: {facts['narrowcast']}; "
        f"commit {facts['commit']}. Measured {facts['date']}."
    )
