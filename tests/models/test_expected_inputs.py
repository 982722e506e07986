"""What layers behind BatchNorms read on average, told without data: measured on data of which that is true."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import narrowcast as nc
from narrowcast.core import sqnr_db
from narrowcast.models import expected_inputs


class Net(nn.Module):
    """Clamps, a concatenation, padding, an average; an addition, behind which nothing is known."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 12, 3, bias=False), nn.BatchNorm2d(12)
        self.depthwise, self.second = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False), nn.BatchNorm2d(12)
        self.joined, self.third = nn.Conv2d(24, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.after_sum = nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        y = F.relu6(self.second(self.depthwise(x)))
        z = self.third(self.joined(torch.cat([x, y], 1)))
        return self.head(z.mean((2, 3))) + 0.01 * self.after_sum(z + z).mean()


def trained() -> tuple[Net, Tensor]:
    """Its statistics are those of the images."""
    torch.manual_seed(0)
    model, images = Net(), torch.randn(64, 3, 20, 20)
    for norm in (model.norm, model.second, model.third):
        norm.momentum = None
        nn.init.uniform_(norm.weight, 0.5, 2.0), nn.init.normal_(norm.bias)
    model.train()(images)
    return model.eval(), images


def test_the_means_are_those_that_data_shows() -> None:
    model, images = trained()
    seen: dict[str, Tensor] = {}
    for name, module in model.named_children():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(
                lambda m, a, o, name=name: seen.update({name: a[0].transpose(0, 1).flatten(1)})
            )
    with torch.no_grad():
        model(images)
    means = expected_inputs(trained()[0])
    assert set(means) == {"depthwise", "joined", "head"}
    for name, mean in means.items():
        torch.testing.assert_close(mean.float(), seen[name].mean(1), atol=0.1, rtol=0.05)


@pytest.mark.parametrize("weight", ["int4/channel", "int4/channel/asym", "int8/channel"])
def test_without_data_biases_are_corrected_by_them_and_the_report_says_so(weight: str) -> None:
    model, images = trained()
    rules = {"rule": [{"weight": weight}]}
    corrected, plain = (nc.quantize(model, rules | {"correct_bias": on}, progress=False) for on in (True, False))
    with torch.no_grad():
        expected, got, without = (m(images) for m in (model, corrected.model, plain.model))
    assert sqnr_db(expected, got) > sqnr_db(expected, without) + 1
    said = [row.layer for row in corrected.report.layers if row.method.endswith("bias corrected by BatchNorm's means")]
    assert said == ["depthwise", "joined", "head"]


def test_with_data_or_transforms_batchnorms_are_not_asked() -> None:
    model, images = trained()
    rules = {"rule": [{"weight": "int4/channel"}]}
    reports = [
        nc.quantize(model, rules, [images], progress=False).report,
        nc.quantize(model, rules | {"transforms": ["equalize"]}, progress=False).report,
    ]
    assert not any("BatchNorm's means" in row.method for report in reports for row in report.layers)
