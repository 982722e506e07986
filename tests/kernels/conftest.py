"""Fixtures of the kernel tests: every instruction-set tier in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from narrowcast import kernels


@pytest.fixture(params=kernels.TIERS)
def tier(request: pytest.FixtureRequest) -> Iterator[str]:
    """Switches to one tier for the test, skips when this machine lacks it, and switches back."""
    capability = kernels.capability()
    reason = capability.available[request.param]
    if reason:
        pytest.skip(f"{request.param}: {reason}")
    kernels.set_isa(request.param)
    yield request.param
    kernels.set_isa(capability.isa)


@pytest.fixture
def every_tier() -> Iterator[Callable[[], Iterator[str]]]:
    """A function that walks through the tiers this machine has, switching to each: one reference result serves all."""
    capability = kernels.capability()

    def walk() -> Iterator[str]:
        for name in kernels.TIERS:
            if not capability.available[name]:
                kernels.set_isa(name)
                yield name

    yield walk
    kernels.set_isa(capability.isa)


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores torch's number of threads after the test."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
