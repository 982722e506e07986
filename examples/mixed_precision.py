"""Different formats for different layers: a recipe as ordered rules, and how a report answers for each of them.

    python mixed_precision.py

The same recipe may be a TOML file: `nc.quantize(model, "recipe.toml")`.
"""

from __future__ import annotations

import torch
from torch import nn

import narrowcast as nc

RECIPE = {
    "name": "mixed",
    "rule": [
        {"layers": "classifier", "keep": "the last layer is small and decides"},
        {"layers": "*.linear?", "weight": "int4/group32/asym", "input": "int8/token"},
        {"layers": ["*.q_proj", "*.k_proj"], "weight": "int8/channel", "input": "int8/token"},
        {"role": "embedding", "weight": "int8/channel"},
        {"weight": "fp8_e4m3/channel"},  # the first rule that matches decides; this one takes what is left
    ],
}


class Tagger(nn.Module):
    """A small Transformer encoder over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(1000, 128)
        layer = nn.TransformerEncoderLayer(128, 4, 256, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.classifier = nn.Linear(128, 7)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """[batch, tokens] -> [batch, tokens, 7]."""
        return self.classifier(self.encoder(self.tokens(ids)))


def main() -> None:
    torch.manual_seed(0)
    model = Tagger().eval()
    data = [torch.randint(0, 1000, (8, 32)) for _ in range(4)]

    quantized = nc.quantize(model, RECIPE, data, progress=False)
    for row in quantized.report.layers:
        if row.type != "Parameter":
            error = "" if row.output_sqnr_db is None else f"{row.output_sqnr_db:5.1f} dB"
            print(f"{row.layer:36} {row.outcome:10} {row.spec:18} {error:9} {row.reason or row.kernel}")
    totals = quantized.report.totals
    print(f"{totals.bytes_before:,} -> {totals.bytes_after:,} bytes; {totals.coverage:.1%} of the weights quantized")

    # A rule that matches nothing is an error, not a shrug.
    try:
        nc.plan(model, {"rule": [{"layers": "clasifier", "keep": "typo"}, {"weight": "int8/channel"}]})
    except nc.RecipeError as error:
        print(f"RecipeError: {error}")


if __name__ == "__main__":
    main()
