"""The one exception family: every error narrowcast raises for a caller's mistake is one of these."""

from __future__ import annotations


class NarrowcastError(Exception):
    """Base of all errors raised on purpose; the message says what, where, got, expected and the remedy."""


class FormatError(NarrowcastError):
    """A number format, specification, scale or code that cannot be."""


class RecipeError(NarrowcastError):
    """A recipe that cannot be read, does not fit the model, or has a rule that matches nothing."""


class ModelError(NarrowcastError):
    """A model that cannot be opened, or whose layers or weights cannot be quantized as asked."""


class DataError(NarrowcastError):
    """Calibration or evaluation data that is missing, empty, wrongly shaped or not finite."""


class CheckpointError(NarrowcastError):
    """A saved file that is missing, truncated, inconsistent or of an unknown version."""


class KernelError(NarrowcastError):
    """A kernel that cannot be loaded or an instruction set that this machine does not have."""


class ContractError(NarrowcastError):
    """A stated requirement (strict, min_coverage) that the result does not meet."""
