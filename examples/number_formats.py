"""One weight matrix in many number formats: bits per weight and what is lost; needs no model."""

from __future__ import annotations

import torch

from narrowcast.core import QuantSpec, bits_per_weight, quantize, sqnr_db
from narrowcast.methods import Rtn

SPECS = (
    *("bf16", "fp8_e4m3/channel", "int8/tensor", "int8/channel", "int6/channel", "mxfp8"),
    *("int4/channel", "int4/group32", "int4/group32/asym", "int4/group32/asym/scale:int8"),
    *("nf4/group32", "mxfp4", "int3/group32/asym", "int2/group32/asym"),
)


def main() -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 256) * torch.rand(64, 1)  # rows of different size, like a trained layer
    print(f"{'spec':32} {'bits':>6} {'nearest':>9} {'searched':>9}   (SQNR in dB)")
    for text in SPECS:
        spec = QuantSpec.parse(text)
        plain = quantize(weight, spec)  # the full range of every block
        searched = Rtn(range="mse").quantize(weight, spec)  # the range with the least squared error
        quality = [sqnr_db(weight, tensor.dequantize()) for tensor in (plain, searched)]
        print(f"{spec!s:32} {bits_per_weight(plain):6.2f} {quality[0]:9.2f} {quality[1]:9.2f}")


if __name__ == "__main__":
    main()
