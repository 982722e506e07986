"""Train a CNN with 2-bit weights and 4-bit inputs: what rounding loses, and what training brings back.

Run digits.py first: it writes the weights.
"""

from __future__ import annotations

import digits
import torch

import narrowcast as nc

RECIPE = {
    "name": "W2A4",
    "rule": [
        {"layers": ["0", "11"], "weight": "int8/channel", "input": "uint8/tensor static:minmax"},  # first and last
        {"weight": "int2/channel", "input": "uint4/tensor static:mse", "method": "rtn", "train": "lsq"},
    ],
}
EPOCHS = 6


def right(model: torch.nn.Module) -> float:
    images, labels = digits.evaluation()
    with torch.inference_mode():
        return (model.eval()(images).argmax(1) == labels).float().mean().item()


def main() -> None:
    teacher = digits.build()
    model = nc.qat.prepare(teacher, RECIPE, digits.calibration(), progress=False)
    print(f"float32 {right(teacher):.1%}, W2A4 before training {right(model):.1%}")

    torch.manual_seed(0)
    images, _ = digits.samples(slice(digits.TRAINING_SAMPLES))
    optimizer = torch.optim.AdamW(nc.qat.parameter_groups(model, lr=2e-3, weight_decay=1e-4))
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    schedule = nc.qat.FreezeSchedule(batchnorm=EPOCHS - 2, ranges=EPOCHS - 1)
    for epoch in range(EPOCHS):
        schedule.apply(model.train(), epoch)
        for rows in torch.randperm(len(images))[:1152].split(64):
            with torch.no_grad():
                target = teacher(images[rows])
            loss = nc.qat.distill_loss(model(images[rows]), target, temperature=2.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        rate.step()
        print(f"epoch {epoch}: the integer model has {right(model):.1%}")
    print(nc.qat.report(model))

    quantized = nc.qat.convert(model, strict=True)
    print(quantized.report)
    print(f"W2A4 after training {right(quantized.model):.1%}")
    nc.save(quantized, "digits-w2a4")


if __name__ == "__main__":
    main()
