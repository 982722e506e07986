"""The one table of operators; importing this module defines them in torch.ops.narrowcast and loads the native library.

The schema of every op is defined here, and its reference body is registered for all devices. The native library, when
it is present, registers faster bodies for the CPU only; an op it lacks keeps its reference body.
"""

from __future__ import annotations

import warnings

import torch

from narrowcast.kernels import (
    reference_conv,
    reference_embedding,
    reference_encode,
    reference_linear,
    reference_network,
    reference_recurrent,
    reference_search,
    reference_weight_only,
)
from narrowcast.kernels.capability import capability, load_library, missing_library
from narrowcast.kernels.op import Op, lower_tiers

NAMESPACE = "narrowcast"

_ROOMS = (
    reference_linear,
    reference_conv,
    reference_recurrent,
    reference_embedding,
    reference_encode,
    reference_search,
    reference_weight_only,
    reference_network,
)

OPS: dict[str, Op] = {op.name: op for room in _ROOMS for op in room.OPS}
"""Every operator by name."""

# The library object owns the registrations: they disappear with it.
_library = torch.library.Library(NAMESPACE, "DEF")


def _define(op: Op) -> None:
    _library.define(op.name + op.schema)
    _library.impl(op.name, op.reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{op.name}", op.fake, lib=_library)


def _load() -> None:
    for op in OPS.values():
        _define(op)
    reason = load_library()
    if reason:
        warnings.warn(
            f"narrowcast runs on its slow reference kernels: {reason}. Results are the same, but nothing is faster"
            " than float32. Install a C++20 compiler and reinstall narrowcast to build the native library.",
            RuntimeWarning,
            stacklevel=2,
        )


def kernel_name(op: str) -> str:
    """The body that a CPU call of an operator runs now, for example "linear_int8_dynamic[avx512vnni]".

    Args:
        op: a name in OPS.

    Returns:
        name[tier], or name[reference: why] where no native body exists.
    """
    row = OPS[op]
    if missing_library():
        return f"{op}[reference: no native library]"
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{op}", "CPU"):
        return f"{op}[reference: no native body]"
    return f"{op}[{next(tier for tier in lower_tiers(capability().isa) if tier in row.tiers)}]"


def reads_interleaved(op: str) -> bool:
    """Whether the tier in use has a body of this operator for interleaved weights.

    Args:
        op: a name in OPS.
    """
    return not missing_library() and capability().isa in OPS[op].interleaved


_load()
