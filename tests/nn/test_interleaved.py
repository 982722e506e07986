"""Linear layers that interleave their weight once it is used again, and give the stored codes back when asked."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import narrowcast as nc
from narrowcast.kernels import capability
from narrowcast.kernels.interleave import is_interleaved
from narrowcast.kernels.ops import reads_interleaved
from narrowcast.nn.interleaved import CALLS_BETWEEN
from narrowcast.nn.linear import QuantizedLinear

pytestmark = pytest.mark.skipif(
    not reads_interleaved("linear_lowbit_dynamic"), reason=f"{capability().isa} has no kernels for interleaved weights"
)

RULES = {
    "int8": {"weight": "int8/channel", "input": "uint8/token"},
    "int8 static": {"weight": "int8/channel", "input": "uint8/tensor static:minmax"},
    "int8 groups": {"weight": "int8/group64", "input": "int8/token"},
    "int4": {"weight": "int4/group32", "input": "int8/token"},
    "int4 asymmetric": {"weight": "int4/group32/asym", "input": "int8/token"},
    "int3": {"weight": "int3/group64", "input": "int8/token"},
    "nf4": {"weight": "nf4/group32", "input": "int8/token"},
    "super-blocks": {"weight": "int4/group32/scale:k6", "input": "int8/token"},
}


def layer(rule: str, inputs: int = 172, outputs: int = 75) -> tuple[QuantizedLinear, Tensor]:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(inputs, outputs)), torch.randn(9, inputs)
    recipe = nc.Recipe.from_dict({"name": "test", "rule": [RULES[rule]]}, "test")
    module = copy.deepcopy(nc.quantize(model, recipe, data=[x], progress=False).model[0])
    assert isinstance(module, QuantizedLinear)
    module.restore_layout_()
    return module, x


def needs_kernel(rule: str) -> None:
    op = "linear_lowbit_dynamic" if rule not in ("int8", "int8 static") else "linear_int8_dynamic"
    if not reads_interleaved(op):
        pytest.skip(f"{op}[{capability().isa}] has no body for interleaved weights")


def in_use(module: QuantizedLinear) -> bool:
    return any(tensor is not None and is_interleaved(tensor) for tensor in module._buffers.values())


@pytest.mark.parametrize("rule", RULES)
def test_the_second_call_interleaves_and_answers_the_same(rule: str) -> None:
    needs_kernel(rule)
    module, x = layer(rule)
    first = module(x)
    assert not in_use(module), "the first answer reads what is stored"
    assert torch.equal(module(x), first) and in_use(module)
    assert torch.equal(module(x), first) and torch.equal(module(x[:1]), first[:1])


@pytest.mark.parametrize("rule", RULES)
def test_the_stored_tensors_come_back_bit_for_bit(rule: str) -> None:
    needs_kernel(rule)
    module, x = layer(rule)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    first, weight = module(x), module.weight
    module(x), module(x)
    assert in_use(module)
    after = module.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert not in_use(module), "there are never two copies"
    module(x), module(x)
    assert in_use(module) and torch.equal(module.weight, weight) and torch.equal(module(x), first)


def test_the_memory_stays_the_same() -> None:
    for rule in [rule for rule in RULES if rule.startswith("int4") or reads_interleaved("linear_int8_dynamic")]:
        module, x = layer(rule, 512, 256)

        def held(module: QuantizedLinear = module) -> int:
            return sum({t.data_ptr(): t.nbytes for t in module.buffers()}.values())

        before = held()
        module(x), module(x)
        assert in_use(module) and held() <= before, rule


def test_shared_codes_stay_as_they_are() -> None:
    module, x = layer("int4")
    other = module.weight_codes
    first = module(x)
    assert torch.equal(module(x), first) and not in_use(module) and other is module.weight_codes


def test_codes_that_were_shared_for_a_while_are_interleaved_later() -> None:
    module, x = layer("int4")
    other = module.weight_codes
    module(x), module(x)
    assert not in_use(module)
    del other
    for _ in range(CALLS_BETWEEN):
        module(x[:1])
    assert in_use(module)


def test_threads_that_call_a_layer_at_once_get_the_same_answer() -> None:
    for _ in range(20):
        module, x = layer("int4")
        expected = module(x)
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda _, module=module, x=x: module(x), range(16)))
        assert all(torch.equal(answer, expected) for answer in answers)


def test_a_copy_and_a_saved_model_answer_the_same(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 40)), torch.randn(5, 64)
    result = nc.quantize(model, "dynamic-int4", progress=False)
    y = [result.model(x) for _ in range(3)][-1]
    assert in_use(result.model[0])
    assert torch.equal(copy.deepcopy(result.model)(x), y)
    nc.save(result, tmp_path / "out")
    loaded = nc.load(tmp_path / "out", model)
    assert all(torch.equal(loaded(x), y) for _ in range(3)) and in_use(loaded[0])
    torch.save(loaded, tmp_path / "whole.pt")
    assert torch.equal(torch.load(tmp_path / "whole.pt", weights_only=False)(x), y)


def test_layers_that_would_grow_stay_as_they_are() -> None:
    module, x = layer("int4", 64, 17)  # 32 rows for 17
    module(x), module(x), module(x)
    assert not in_use(module)
    assert module._calls_left == 0


def test_loading_a_state_into_an_interleaved_layer_works() -> None:
    module, x = layer("int4")
    first, state = module(x), {name: tensor.clone() for name, tensor in module.state_dict().items()}
    module(x), module(x)
    state["bias"] += 1.0
    module.load_state_dict(state)
    assert torch.allclose(module(x), first + 1.0, atol=1e-5) and torch.equal(module(x), module(x))


def test_an_interleaved_layer_compiles_and_exports() -> None:
    module, x = layer("int4")
    expected = module(x)
    module(x), module(x)
    assert in_use(module)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), expected)
    program = torch.export.export(nn.Sequential(module), (x,))  # torch fails on a root with absent buffers
    assert torch.equal(program.module()(x), expected)
