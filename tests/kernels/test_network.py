"""conv_network_int8: every tier gives the interpreter's bits; bad programs raise."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from tests.kernels.network_cases import NETWORKS, Builder, fire_network, mobile_network, residual_network, window
from torch import Tensor

from narrowcast import kernels
from narrowcast.kernels.network import HEADER, Activation, NetworkProgram, Window

Tiers = Callable[[], Iterator[str]]
REFERENCE = kernels.OPS["conv_network_int8"].reference
FAKE = kernels.OPS["conv_network_int8"].fake
OP = torch.ops.narrowcast.conv_network_int8


def image(batch: int, channels: int = 3, height: int = 17, width: int = 19) -> Tensor:
    random = torch.Generator().manual_seed(batch + channels)
    return torch.randn(batch, channels, height, width, generator=random) * 2


def assert_every_tier_gives_the_reference(tiers: Tiers, b: Builder, *inputs: Tensor) -> list[Tensor]:
    arguments = b.arguments()
    expected = REFERENCE(list(inputs), *arguments)
    shapes = FAKE(list(inputs), *arguments)
    for tier in tiers():
        got = OP(list(inputs), *arguments)
        assert len(got) == len(expected)
        for ours, theirs, shape in zip(got, expected, shapes, strict=True):
            assert ours.shape == theirs.shape == shape.shape and ours.dtype == theirs.dtype
            assert ours.stride() == theirs.stride() == shape.stride()
            assert torch.equal(ours, theirs), f"{tier}: {(ours != theirs).float().mean()} of the values are off"
    return expected


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_tier_gives_the_reference_bits(name: str, batch: int, every_tier: Tiers) -> None:
    b = NETWORKS[name](batch)
    results = assert_every_tier_gives_the_reference(every_tier, b, image(batch))
    assert all(result.std() > 0.01 for result in results)


@pytest.mark.parametrize("channels", [3, 4, 16, 20, 33, 64])
def test_any_number_of_channels(channels: int, every_tier: Tiers) -> None:
    assert_every_tier_gives_the_reference(every_tier, residual_network(7, channels), image(2, height=9, width=8))
    assert_every_tier_gives_the_reference(every_tier, mobile_network(8, channels), image(1, height=12, width=16))
    if channels % 4 == 0:
        assert_every_tier_gives_the_reference(every_tier, fire_network(9, channels), image(1, height=23, width=22))


SHAPES = {
    "pointwise stride": window(1, 2),
    "square stride": window(3, 2),
    "five": window(5),
    "seven stride, no padding": window(7, 2, 0),
    "row": Window((1, 7), padding=(0, 3, 0, 3)),
    "column": Window((4, 1), (3, 1), (2, 0, 1, 0)),
    "asymmetric": Window((3, 3), (2, 1), (0, 3, 2, 1)),
    "dilated": Window((3, 2), (1, 2), (2, 3, 2, 0), (2, 3)),
    "padding beyond the kernel": window(2, 1, 4),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["dense", "grouped", "depthwise"])
def test_any_window(kind: str, shape: str, every_tier: Tiers) -> None:
    groups, channels = {"dense": (1, 12), "grouped": (3, 15), "depthwise": (18, 18)}[kind]
    for coded in (True, False):
        b = Builder(3)
        x = b.quantize(channels)
        y = b.conv(x, channels, SHAPES[shape], groups, coded=coded, activation=Activation(int(coded)))
        z = b.conv(x, channels, SHAPES[shape], groups, coded=False, second=y)
        w = b.conv(x, channels, SHAPES[shape], groups, coded=coded, second=z)
        late = [b.value(channels, coded=False) for _ in Activation]
        for activation, floats in zip(Activation, late, strict=True):
            b.conv(x, channels, SHAPES[shape], groups, second=w, activation=activation, floats=floats)
        b.finish(w, z, b.conv(x, channels, SHAPES[shape], groups), *late)
        assert_every_tier_gives_the_reference(every_tier, b, image(2, channels, 11, 13))


@pytest.mark.parametrize("flags", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("shape", [window(2, 2, 0), window(3, 2, 1), Window((3, 5), (2, 4), (0, 2, 2, 1))])
def test_any_pool(shape: Window, flags: int, every_tier: Tiers) -> None:
    b = Builder(flags)
    pool = Window(shape.kernel, shape.stride, shape.padding, flags=flags)
    for channels in (6, 70):
        x = b.quantize(channels)
        f = b.dequantize(x)
        most = [b.max_pool(x, pool), b.max_pool(f, pool)]
        means = [b.average_pool(source, pool, coded) for source in (x, f) for coded in (True, False)]
        b.program.outputs += [b.dequantize(value) if b.coded(value) else value for value in (*most, *means)]
    # images that the last window of rounding up leaves
    assert_every_tier_gives_the_reference(every_tier, b, image(2, 6, 12, 14), image(2, 70, 12, 14))


def test_additions_of_codes_and_floats(every_tier: Tiers) -> None:
    for channels in (5, 16, 40):
        b = Builder(channels)
        x, y = b.quantize(channels), b.quantize(channels)
        floats = [b.dequantize(value) for value in (x, y)]
        sums = [b.add(p, q, coded) for p in (x, floats[0]) for q in (y, floats[1]) for coded in (True, False)]
        late = []
        for activation in Activation:
            late.append(b.value(channels, coded=False))
            sums += [b.add(x, y, floats=late[-1], activation=activation), b.add(x, y, False, activation=activation)]
        b.finish(*sums, *late)
        assert_every_tier_gives_the_reference(every_tier, b, image(2, channels, 4, 6), image(3, channels, 4, 6)[1:])


def test_extreme_codes_do_not_overflow(every_tier: Tiers) -> None:
    b = Builder(1)
    x = b.quantize(96)
    b.conv(x, 17, window(5), coded=False)
    b.panels = [torch.full_like(b.panels[0], 127)]
    b.finish(b.program.steps[-1].target)
    assert_every_tier_gives_the_reference(every_tier, b, torch.full((1, 96, 9, 9), 1e30))


def test_results_do_not_depend_on_threads_or_batch_split(threads: None) -> None:
    for name, build in NETWORKS.items():
        arguments = build(0).arguments()
        for batch, size in ((1, 60), (7, 20)):
            x = image(batch, 3, size, size + 1)
            torch.set_num_threads(1)
            expected = OP([x], *arguments)
            for sample in range(batch):
                alone = OP([x[sample : sample + 1]], *arguments)
                assert all(torch.equal(a, e[sample : sample + 1]) for a, e in zip(alone, expected, strict=True))
            for count in (2, 3, 4):
                torch.set_num_threads(count)
                got = OP([x], *arguments)
                assert all(torch.equal(a, e) for a, e in zip(got, expected, strict=True)), (name, batch, count)


@pytest.mark.parametrize("name", NETWORKS)
def test_any_strides_and_dtypes(name: str, tier: str) -> None:
    x = image(2)
    arguments = NETWORKS[name](0).arguments()
    expected = OP([x], *arguments)
    wide = torch.zeros(4, 5, 20, 23)
    wide[::2, 1:4, 2:19, 3:22] = x
    layouts = (
        x.contiguous(memory_format=torch.channels_last),
        wide[::2, 1:4, 2:19, 3:22],
        x.transpose(2, 3).contiguous().transpose(2, 3),
        x.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3),
        wide.contiguous(memory_format=torch.channels_last)[::2, 1:4, 2:19, 3:22],
    )
    for other in layouts:
        assert all(torch.equal(a, e) for a, e in zip(OP([other], *arguments), expected, strict=True))
    for dtype in (torch.bfloat16, torch.float16):
        rounded = x.to(dtype)
        same = OP([rounded.float()], *arguments)
        got = OP([rounded], *arguments)
        assert all(torch.equal(a, e.to(dtype)) and a.dtype == dtype for a, e in zip(got, same, strict=True))
        assert all(a.stride() == e.stride() for a, e in zip(got, same, strict=True))


def test_empty_batch_gives_empty_results(tier: str) -> None:
    got = OP([image(0)], *residual_network(0).arguments())
    assert [tuple(y.shape) for y in got] == [(0, 10, 1, 1), (0, 32, 1, 1), (0, 32, 9, 10)]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_named(bad: float, tier: str) -> None:
    x = image(3)
    x[2, 1, 4, 7] = bad
    for layout in (x, x.contiguous(memory_format=torch.channels_last)):
        with pytest.raises(RuntimeError, match=r"Non-finite value in input 0 at \[2, 1, 4, 7\]"):
            OP([layout], *mobile_network(0).arguments())


def test_the_program_survives_encoding() -> None:
    for build in NETWORKS.values():
        program = build(0).program
        assert NetworkProgram.decode(program.encode()) == program


def test_damaged_programs_raise_and_never_crash(tier: str) -> None:
    """Every number of a program, replaced by others: the call raises RuntimeError or runs on other numbers."""
    x = [image(1, 3, 15, 15)]
    raised = 0
    for build in (residual_network, fire_network):
        program, constants, panels, plan = build(0, 4).arguments()
        for position in range(len(program)):
            for value in (-1, -(2**62), 2**62, 7, 10**6):
                damaged = program.clone()
                damaged[position] = value
                try:
                    OP(x, damaged, constants, panels, plan)
                except RuntimeError:
                    raised += 1
    assert raised > 2000


def test_short_buffers_raise() -> None:
    program, constants, panels, plan = residual_network(0).arguments()
    x = [image(1)]
    with pytest.raises(RuntimeError, match="constants"):
        OP(x, program, constants[:-1], panels, plan)
    with pytest.raises(RuntimeError, match="weights at"):
        OP(x, program, constants, panels[:-64], plan)
    with pytest.raises(RuntimeError, match="numbers"):
        OP(x, program[:-1], constants, panels, plan)
    with pytest.raises(RuntimeError, match="version"):
        OP(x, program[: HEADER - 1], constants, panels, plan)
    with pytest.raises(RuntimeError, match="inputs"):
        OP([*x, *x], program, constants, panels, plan)
    with pytest.raises(RuntimeError, match="channels"):
        OP([image(1, 4)], program, constants, panels, plan)
    with pytest.raises(RuntimeError, match="program must be int64"):
        OP(x, program.int(), constants, panels, plan)
    with pytest.raises(RuntimeError, match="4 dimensions"):
        OP([x[0][0]], program, constants, panels, plan)


def test_a_value_must_be_written_before_it_is_read() -> None:
    b = residual_network(0)
    _, constants, panels, plan = b.arguments()
    steps = b.program.steps
    first, second = steps[1:3]
    for pair, message in (([second, first], "before it is written"), ([first, first], "again")):
        steps[1:3] = pair
        with pytest.raises(RuntimeError, match=message):
            OP([image(1)], b.program.encode(), constants, panels, plan)
