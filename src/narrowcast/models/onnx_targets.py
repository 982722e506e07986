"""What ONNX Runtime's CPU kernels can make of a weight and its input, and what they are called.

Measured on ONNX Runtime 1.31.1: docs/onnx.md has the table.
"""

from __future__ import annotations

from narrowcast.core import PerBlock, PerChannel, PerGroup, PerTensor, PerToken, QuantSpec
from narrowcast.models.base import Layer, Possible
from narrowcast.models.onnx_layers import RECURRENT, Use

# Bits of the codes of MatMulNBits.
BLOCK_BITS = (2, 4, 8)


def possible(
    layer: Layer, uses: list[Use], weight: QuantSpec, given: QuantSpec | None, *, token_ranges: bool = False
) -> Possible:
    """What becomes of a weight and its input that are to have these formats."""
    if weight.format.is_cast:
        if weight.format.name == "fp32":
            return Possible(weight, None)
        why = "" if given is None else f"products are in float32, not {given}: ONNX Runtime's CPU kernels have no other"
        return Possible(weight, None, reason=why)
    if weight.format.kind != "int" or weight.format.learned or weight.format.bits not in BLOCK_BITS:
        return Possible(None, None, f"ONNX has no kernel for weights in {weight}; use int2, int4 or int8")
    if isinstance(weight.granularity, PerBlock) or weight.scale_format not in ("fp32", "fp16"):
        return Possible(None, None, f"ONNX has no form for weights in {weight}; use scales per channel or group")
    if layer.type == "Embedding" and (weight.format.bits != 8 or isinstance(weight.granularity, PerGroup)):
        return Possible(None, None, f"rows are looked up in int8/channel, and not in {weight}")
    if given is None:
        return Possible(weight, None)
    found = _with_input(layer, uses, weight, given)
    if token_ranges and layer.type == "Linear" and found.input is not None and is_simple(weight):
        dynamic = isinstance(found.input.granularity, PerToken)
        return Possible(weight, found.input, "", found.fallback) if dynamic else found
    return found


def _with_input(layer: Layer, uses: list[Use], weight: QuantSpec, given: QuantSpec) -> Possible:
    if not given.format.scaled:
        return Possible(weight, None, fallback=f"products are in float32, not {given}")
    if given.format.bits != 8:
        return Possible(
            weight, None, fallback=f"ONNX Runtime has no integer kernel for inputs in {given}; they stay float"
        )
    if layer.type in RECURRENT:
        return _recurrent(layer, weight, given)
    if any(use.op == "ConvTranspose" for use in uses):
        why = (
            "ONNX Runtime has no integer kernel for ConvTranspose; its weight is stored in integers, its input is float"
        )
        return Possible(weight, None, fallback=why)
    simple = is_simple(weight)
    if isinstance(given.granularity, PerToken):
        return _dynamic(layer, weight, given, simple=simple)
    if not simple:
        return Possible(
            weight, None, fallback=f"static inputs go with symmetric int8 weights per channel, not {weight}"
        )
    if any(use.inside for use in uses):
        return Possible(
            weight, QuantSpec.parse("uint8/token"),
            fallback="it is inside a subgraph, whose values cannot be watched; its range is found at run time",
        )  # fmt: skip
    return Possible(weight, given)


def _recurrent(layer: Layer, weight: QuantSpec, given: QuantSpec) -> Possible:
    if layer.type != "LSTM":
        why = "has no integer kernel in ONNX Runtime; a rule without an input stores its weights in integers"
        return Possible(None, None, f"{layer.type} {why}")
    if not is_simple(weight):
        return Possible(weight, None, fallback=f"the integer LSTM has symmetric int8 weights per channel, not {weight}")
    found = given if isinstance(given.granularity, PerToken) else QuantSpec.parse("uint8/token")
    return Possible(weight, found, "one range for the whole input, and for the states of a step, found at run time")


def is_simple(weight: QuantSpec) -> bool:
    """Whether a weight is symmetric int8 with a scale per channel or tensor, as most integer kernels have it."""
    return weight.format.name == "int8" and weight.symmetric and isinstance(weight.granularity, PerChannel | PerTensor)


def _dynamic(layer: Layer, weight: QuantSpec, given: QuantSpec, *, simple: bool) -> Possible:
    if simple:
        return Possible(weight, given, "one range for all tokens of the input, as DynamicQuantizeLinear has it")
    if layer.type == "Linear":
        return Possible(weight, given, "a range for every block of every token, as MatMulNBits has it")
    return Possible(weight, None, fallback=f"ONNX Runtime has no integer {layer.type} with weights in {weight}")


def integer_op(use: Use, spec: QuantSpec, mode: str, *, token_ranges: bool = False) -> str | None:
    """The operator that will multiply integers."""
    if use.op == "Gather" or use.op == "ConvTranspose" or mode not in ("static", "dynamic", "asymmetric"):
        return None
    simple = is_simple(spec)
    if use.op in RECURRENT:
        return "DynamicQuantizeLSTM" if use.op == "LSTM" and simple and mode != "static" else None
    if mode == "static":
        if not simple:
            return None
        if use.op == "Conv":
            return "QLinearConv"
        joined = use.op == "Gemm" or (use.rank in (None, 2) and use.bias is not None)
        return "QGemm" if joined else "MatMulIntegerToFloat"
    if use.op == "Conv":
        return "ConvInteger" if simple else None
    if simple and token_ranges:
        return "MatMulIntegerToFloat"
    return "DynamicQuantizeMatMul" if simple else "MatMulNBits (inputs in int8 per block)"


def float_kernel(layer: Layer, spec: QuantSpec) -> str:
    """What multiplies float inputs with a weight of this format."""
    if spec.format.is_cast:
        return "cast when loading, product in float"
    if layer.type == "Embedding":
        return "row lookup"
    if layer.type == "Linear":
        return "MatMulNBits"
    return "dequantized at every run, product in float"
