"""Parity: whether two artefacts of one model compute the same numbers, layer by layer. `nc.verify` is the door."""

from narrowcast.parity.difference import Difference
from narrowcast.parity.parity import LayerParity, Parity
from narrowcast.parity.verify import verify

__all__ = ["Difference", "LayerParity", "Parity", "verify"]
