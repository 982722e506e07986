"""From a trained CNN to one that computes in integers: plan, quantize, report, compare, save, load.

Run digits.py first: it writes the weights.
"""

from __future__ import annotations

import digits
import torch

import narrowcast as nc


def main() -> None:
    model = digits.build()

    # What would happen to every weight, before any work is done. Needs no data.
    print(nc.plan(model, "static-int8"))

    # BatchNorm is folded, input ranges come from the calibration images, `model` itself stays as it is.
    quantized = nc.quantize(model, "static-int8", digits.calibration(), strict=True, progress=False)
    print(quantized.report)

    # The same unseen images through both: accuracy with its interval, agreement, latency in turns, bytes.
    print(nc.compare(model, quantized, digits.evaluation(), "top1", seconds=0.5))

    # A directory with one safetensors file and one JSON document. Loading needs the architecture, not the weights.
    nc.save(quantized, "digits-int8")
    with torch.device("meta"):
        empty = digits.network()
    loaded = nc.load("digits-int8", into=empty)
    images, _ = digits.evaluation()
    with torch.inference_mode():
        assert torch.equal(loaded(images), quantized.model(images)), "loading must not change a bit"
    print("loaded from digits-int8: the outputs are the same, bit for bit")


if __name__ == "__main__":
    main()
