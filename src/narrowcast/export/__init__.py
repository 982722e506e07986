"""What leaves the house: narrowcast's own checkpoints."""

from narrowcast.export.checkpoint import load, read_description, save, source_hash

__all__ = ["load", "read_description", "save", "source_hash"]
