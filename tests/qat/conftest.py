"""Properties are tried on the same few examples in every run, so a failure is never a matter of luck."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("narrowcast", derandomize=True, max_examples=40, deadline=None, database=None)
settings.load_profile("narrowcast")
