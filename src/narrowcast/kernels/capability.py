"""Finds and loads the native library, and says which instruction set runs and why not a better one."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch

from narrowcast.errors import KernelError
from narrowcast.kernels.op import TIERS, lower_tiers

ISA_VARIABLE = "NARROWCAST_ISA"
"""Environment variable that forces a tier: one of TIERS."""

LIBRARY_NAMES = ("libnarrowcast_kernels.so", "narrowcast_kernels.dll")


@dataclass(frozen=True)
class Capability:
    """What the kernels run on.

    Args:
        isa:       tier in use; "reference" without the native library.
        available: every tier by name with the reason why it cannot run here, "" when it can.
        forced:    the tier that NARROWCAST_ISA asked for, or None.
        library:   path of the native library, or None.
        threads:   torch's number of threads at the time of the call.
        notes:     what is particular about how a tier runs here, by name.
    """

    isa: str
    available: dict[str, str]
    forced: str | None
    library: str | None
    threads: int
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def states(self) -> dict[str, str]:
        """Every tier by name, the lowest first: in use, available, or why it is not used."""
        return {tier: self._state(tier) for tier in self.available}

    def _state(self, tier: str) -> str:
        if self.available[tier]:
            return self.available[tier]
        note = f" ({self.notes[tier]})" if tier in self.notes else ""
        if tier == self.isa:
            return "in use" + note
        if self.isa not in TIERS or tier in lower_tiers(self.isa):
            return "available" + note
        return "available" + note + (f", not used: {ISA_VARIABLE}={self.forced}" if self.forced else ", not chosen")

    def __str__(self) -> str:
        lines = [f"kernels: {self.isa}" + (f" (forced by {ISA_VARIABLE})" if self.forced else "")]
        lines += [f"  {tier}: {state}" for tier, state in self.states.items()]
        lines += [f"  library: {self.library or 'none'}", f"  threads: {self.threads}"]
        return "\n".join(lines)


class _Native:
    """The loaded library's C functions; `reason` says why there is none."""

    def __init__(self) -> None:
        self.path: str | None = None
        self.reason = "the native library has not been loaded"
        self.functions: ctypes.CDLL | None = None


_native = _Native()


def _find_library() -> Path | None:
    folder = Path(__file__).parent
    return next((folder / name for name in LIBRARY_NAMES if (folder / name).is_file()), None)


def load_library() -> str:
    """Load the native library and obey NARROWCAST_ISA.

    Returns:
        "" on success, else the reason why there is no native library.

    Raises:
        KernelError: NARROWCAST_ISA names a tier that does not exist or that this machine lacks.
    """
    path = _find_library()
    if path is None:
        _native.reason = "the native library was not built (no C++ compiler at install time?)"
    else:
        try:
            torch.ops.load_library(str(path))
            _native.functions = _declare(ctypes.CDLL(str(path)))
            _native.path, _native.reason = str(path), ""
        except OSError as error:
            _native.reason = f"the native library does not load: {error}"
    forced = os.environ.get(ISA_VARIABLE)
    if forced:
        set_isa(forced)
    return _native.reason


def _declare(functions: ctypes.CDLL) -> ctypes.CDLL:
    functions.narrowcast_isa.restype = ctypes.c_char_p
    functions.narrowcast_isa_missing.restype = ctypes.c_char_p
    functions.narrowcast_isa_missing.argtypes = [ctypes.c_char_p]
    functions.narrowcast_isa_note.restype = ctypes.c_char_p
    functions.narrowcast_isa_note.argtypes = [ctypes.c_char_p]
    functions.narrowcast_set_isa.argtypes = [ctypes.c_char_p]
    return functions


def missing_library() -> str:
    """Why there is no native library; "" when it is loaded."""
    return _native.reason


def _missing(tier: str) -> str:
    if _native.functions is None:
        return _native.reason
    return str(_native.functions.narrowcast_isa_missing(tier.encode()).decode())


def _notes() -> dict[str, str]:
    if _native.functions is None:
        return {}
    notes = {tier: str(_native.functions.narrowcast_isa_note(tier.encode()).decode()) for tier in TIERS}
    return {tier: note for tier, note in notes.items() if note}


def set_isa(tier: str) -> None:
    """Switch the instruction-set tier of the whole process; meant for tests and for NARROWCAST_ISA.

    Args:
        tier: one of TIERS.

    Raises:
        KernelError: the tier does not exist, this machine lacks it, or there is no native library.
    """
    if tier not in TIERS:
        raise KernelError(
            f"no instruction-set tier {tier!r} ({ISA_VARIABLE} or set_isa); choose from {', '.join(TIERS)}"
        )
    reason = _missing(tier)
    if reason:
        raise KernelError(
            f"instruction-set tier {tier!r} cannot run here: {reason}; unset {ISA_VARIABLE} or choose another"
        )
    assert _native.functions is not None
    _native.functions.narrowcast_set_isa(tier.encode())


def capability() -> Capability:
    """Which instruction set the kernels use on this machine, and why not a better one.

    Returns:
        A record whose str() is a short readable text.
    """
    functions = _native.functions
    return Capability(
        isa="reference" if functions is None else functions.narrowcast_isa().decode(),
        available={tier: _missing(tier) for tier in TIERS},
        forced=os.environ.get(ISA_VARIABLE) or None,
        library=_native.path,
        threads=torch.get_num_threads(),
        notes=_notes(),
    )
