"""What runs: the operators of torch.ops.narrowcast, their reference bodies and their native bodies.

Importing this package defines the operators and loads the native library. It knows tensors, never modules or models.
"""

from __future__ import annotations

from narrowcast.kernels.capability import Capability, capability, set_isa
from narrowcast.kernels.forced import check_kernels, running_on
from narrowcast.kernels.op import TIERS, Op
from narrowcast.kernels.ops import OPS, kernel_name

__all__ = [
    "OPS",
    "TIERS",
    "Capability",
    "Op",
    "capability",
    "check_kernels",
    "kernel_name",
    "running_on",
    "set_isa",
]
