"""Train a CNN with 2-bit weights and 4-bit inputs by Lightning, with a moving average of its weights beside it.

Run digits.py first: it writes the weights. Needs Lightning: pip install 'narrowcast[examples]'.
"""

from __future__ import annotations

from typing import Any

import digits
import lightning
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

import narrowcast as nc
from qat import RECIPE

EPOCHS = 3


class Digits(lightning.LightningModule):
    """A prepared model is a module like any other; in validation it is the integer model."""

    def __init__(self) -> None:
        super().__init__()
        # not a submodule: its weights belong into no checkpoint
        self.__dict__["teacher"] = digits.build()
        self.model = nc.qat.prepare(self.teacher, RECIPE, digits.calibration(), progress=False)
        # averages parameters, ranges among them, and copies buffers
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        self.schedule = nc.qat.FreezeSchedule(batchnorm=EPOCHS - 1, ranges=EPOCHS - 1)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(nc.qat.parameter_groups(self.model, lr=2e-3, weight_decay=1e-4))

    def on_train_epoch_start(self) -> None:
        self.schedule.apply(self.model, self.current_epoch)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        images = batch[0]
        with torch.no_grad():
            target = self.teacher(images)
        loss = nc.qat.distill_loss(self.model(images), target, temperature=2.0)
        self.log("loss", loss)
        return loss

    def on_train_batch_end(self, *arguments: Any) -> None:
        self.average.update_parameters(self.model)

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        images, labels = batch
        for name, model in (("right", self.model), ("right, average", self.average)):
            self.log(name, (model(images).argmax(1) == labels).float().mean())


def main() -> None:
    lightning.seed_everything(0, verbose=False)
    images, labels = digits.samples(slice(digits.TRAINING_SAMPLES))
    module = Digits()
    trainer = lightning.Trainer(
        max_epochs=EPOCHS, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, gradient_clip_val=10.0, default_root_dir="digits-lightning",
    )  # fmt: skip
    unseen, answers = digits.evaluation()
    validation = DataLoader(TensorDataset(unseen, answers), batch_size=200)
    before = trainer.validate(module, validation, verbose=False)[0]
    trainer.fit(module, DataLoader(TensorDataset(images, labels), batch_size=64, shuffle=True), validation)
    after = trainer.validate(module, validation, verbose=False)[0]

    for name, trained in (("right", module.model), ("right, average", module.average)):
        quantized = nc.qat.convert(trained, strict=True)
        with torch.inference_mode():
            same = torch.equal(quantized.model(unseen), trained.eval()(unseen))
        print(f"{name}: {before[name]:.1%} before, {after[name]:.1%} after; converted bit for bit: {same}")
    nc.save(quantized, "digits-lightning-w2a4")


if __name__ == "__main__":
    main()
