"""Running a stretch of code on chosen kernels: the reference bodies, or one instruction-set tier."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from narrowcast.errors import KernelError
from narrowcast.kernels.capability import capability, set_isa
from narrowcast.kernels.op import TIERS
from narrowcast.kernels.ops import NAMESPACE, OPS

REFERENCE = "reference"
_chosen: list[str] = []


class _ReferenceBodies(TorchDispatchMode):
    """Sends every narrowcast op to its reference body while "reference" is the innermost choice."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == NAMESPACE and _chosen and _chosen[-1] == REFERENCE:
            return OPS[func._schema.name.partition("::")[2]].reference(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@contextmanager
def running_on(kernels: str | None) -> Iterator[None]:
    """Runs narrowcast's ops on chosen kernels; choices nest, the innermost counts.

    Args:
        kernels: "reference" for the bodies in plain torch that define every op, a name in TIERS, or None for the native
            tier in use.

    Raises:
        KernelError: there are no such kernels, or this machine lacks them.
    """
    check_kernels(kernels)
    before = capability().isa
    _chosen.append(kernels or "")
    try:
        if kernels == REFERENCE:
            with _ReferenceBodies():
                yield
            return
        if kernels is not None:
            set_isa(kernels)
        yield
    finally:
        _chosen.pop()
        if kernels not in (None, REFERENCE):
            set_isa(before)


def check_kernels(kernels: str | None) -> None:
    """Refuse a name that is neither None, "reference" nor a tier that this machine has.

    Raises:
        KernelError: the message lists what there is.
    """
    if kernels is None or kernels == REFERENCE:
        return
    available = capability().available
    here = [tier for tier in TIERS if not available[tier]]
    if kernels not in here:
        why = available.get(kernels) or "there is no such tier"
        raise KernelError(f"cannot run on {kernels!r} kernels: {why}; choose from {', '.join([REFERENCE, *here])}")
