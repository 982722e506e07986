"""What each tool offers: its methods, for which kinds of model and in which formats. Imports none of the tools."""

from __future__ import annotations

from dataclasses import dataclass

CNN, ENCODER, DECODER = "cnn", "encoder", "decoder"
LINEAR = (ENCODER, DECODER)
ALL = (CNN, ENCODER, DECODER)
FOUR_BITS, TWO_BITS = ("W4 channel", "W4 g32"), ("W2 g32",)
WEIGHTS = (*FOUR_BITS, "W3 g32", *TWO_BITS)
GROUPS = ("W4 g32", "W3 g32", "W2 g32")


@dataclass(frozen=True)
class Offer:
    """One method of a tool.

    Attributes:
        kinds: of models that it can quantize, `KitModel.kind`.
        formats: names of benchmarks.low_bits.FORMATS it has, exactly or as near as `Peer.differs` says.
    """

    kinds: tuple[str, ...]
    formats: tuple[str, ...]


@dataclass(frozen=True)
class Peer:
    """One tool.

    Attributes:
        module: file in this folder that runs it.
        packages: the distributions whose versions the page names; the first is the tool itself.
        methods: by the name that the table shows.
        differs: where its formats are not those of narrowcast's cells, in one sentence.
    """

    module: str
    packages: tuple[str, ...]
    methods: dict[str, Offer]
    differs: str


PEERS = {
    "ONNX Runtime": Peer(
        "onnx_runtime",
        ("onnxruntime", "onnx", "onnxscript"),
        {
            "static min-max": Offer(ALL, ("W8A8 static",)),
            "static entropy": Offer(ALL, ("W8A8 static",)),
            "static percentile 99.999": Offer(ALL, ("W8A8 static",)),
            "dynamic": Offer(LINEAR, ("W8A8 dynamic",)),
            "rtn": Offer(LINEAR, ("W4A8", "W4 g32", "W2 g32")),
            "hqq": Offer(LINEAR, ("W4 g32", "W3 g32", "W2 g32")),
            "k-quant": Offer(LINEAR, ("W4 g32",)),
            "gptq": Offer(LINEAR, ("W4 g32",)),
        },
        "static: uint8 activations per tensor, CNNs with its own list of operations (additions too), other models "
        "with their weight matrices only; dynamic: uint8 activations per tensor; W4A8: accuracy_level 4.",
    ),
    "torchao": Peer(
        "torchao_",
        ("torchao",),
        {
            "rtn": Offer(LINEAR, ("W8A8 dynamic", "W4A8", *WEIGHTS)),
            "hqq scale only": Offer(LINEAR, WEIGHTS),
        },
        "int8 activations per token; `hqq scale only` is symmetric.",
    ),
    "hqq": Peer(
        "hqq_",
        ("hqq",),
        {"hqq": Offer(LINEAR, WEIGHTS)},
        "axis 1; its groups of 32 run on across the rows of a matrix whose width 32 does not divide.",
    ),
    "optimum-quanto": Peer(
        "quanto",
        ("optimum-quanto",),
        {
            "max": Offer(ALL, ("W8A8 static", *FOUR_BITS, *TWO_BITS)),
            "hqq": Offer(ALL, (*FOUR_BITS, *TWO_BITS)),
        },
        "static: int8 activations per tensor; groups of 32 where 32 divides a row, otherwise one per row.",
    ),
    "auto-round": Peer(
        "auto_round_",
        ("auto-round", "transformers"),
        {
            "zero-padded": Offer((DECODER,), WEIGHTS),
            "as it is": Offer((DECODER,), WEIGHTS),
        },
        "asymmetric, 200 iterations, calibration stories joined into rows of 512 tokens; `zero-padded` widens the "
        "feed-forward from 172 to 192 with zeros because it skips what 32 does not divide.",
    ),
    "llm-compressor": Peer(
        "llm_compressor",
        ("llmcompressor", "compressed-tensors", "transformers"),
        {
            "rtn": Offer((DECODER,), WEIGHTS),
            "awq": Offer((DECODER,), WEIGHTS),
            "gptq": Offer((DECODER,), WEIGHTS),
            "gptq zero-padded": Offer((DECODER,), GROUPS),
        },
        "asymmetric, calibration stories one by one; `gptq` with activation order by weight.",
    ),
    "GPTQModel": Peer(
        "gptq_model",
        ("gptqmodel", "transformers"),
        {"gptq": Offer((DECODER,), WEIGHTS), "gptq zero-padded": Offer((DECODER,), GROUPS)},
        "asymmetric, activation order, calibration stories one by one.",
    ),
    "NNCF": Peer(
        "nncf_",
        ("nncf", "openvino"),
        {
            "default": Offer(ALL, ("W8A8 static",)),
            "min-max ranges": Offer(ALL, ("W8A8 static",)),
            "rtn": Offer(LINEAR, FOUR_BITS),
            "awq": Offer(LINEAR, FOUR_BITS),
            "scale estimation": Offer(LINEAR, FOUR_BITS),
            "gptq": Offer(LINEAR, FOUR_BITS),
        },
        "static: ModelType.TRANSFORMER where there is attention (SmoothQuant included), run by OpenVINO in float32; "
        "a width that 32 does not divide gets the largest smaller group it accepts.",
    ),
}
