"""Strings as data: a tokenizer turns them into the batches that a model's `forward` takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from narrowcast.data.signature import Signature
from narrowcast.errors import DataError

LONGEST_PLAUSIBLE = 1_000_000  # transformers writes 10**30 where a tokenizer states no limit


@dataclass(frozen=True)
class Texts:
    """Strings and the tokenizer that turns them into batches.

    Args:
        strings: the samples.
        tokenizer: a Hugging Face tokenizer (called with `padding`, `truncation`, `return_tensors="pt"`) or a
            `tokenizers.Tokenizer`.
        batch_size: strings per batch; 1 is used where padding could not be told from text: the model takes no
            `attention_mask`, or the tokenizer has no padding token.
        max_length: tokens after which a string is cut; None means the model's or tokenizer's own limit.
    """

    strings: Sequence[str]
    tokenizer: Any
    batch_size: int = 32
    max_length: int | None = None

    def batches(self, model: nn.Module) -> Iterator[dict[str, Tensor] | Tensor]:
        """Dictionaries of the keys that `forward` takes, or bare token ids where it takes no `input_ids`.

        Raises:
            DataError: there are no strings, one is not a string, or one has no tokens.
        """
        signature = Signature.of(model)
        self._check()
        size = self.batch_size if "attention_mask" in signature.names and self._can_pad() else 1
        longest = self.max_length or self._own_limit(model)
        for start in range(0, len(self.strings), size):
            encoded = self._encode(list(self.strings[start : start + size]), longest)
            if encoded["input_ids"].shape[1] == 0:
                raise DataError(f"string {start} ({self.strings[start]!r}) has no tokens; remove it")
            if "input_ids" not in signature.names:
                yield encoded["input_ids"]
            else:
                yield {key: value for key, value in encoded.items() if key in signature.names}

    def _check(self) -> None:
        if len(self.strings) == 0:
            raise DataError("Texts holds no strings")
        if self.batch_size < 1:
            raise DataError(f"batch_size is {self.batch_size}; it must be at least 1")
        for index, string in enumerate(self.strings):
            if not isinstance(string, str):
                raise DataError(f"element {index} of Texts is a {type(string).__name__}, not a string")

    def _can_pad(self) -> bool:
        return hasattr(self.tokenizer, "encode_batch") or getattr(self.tokenizer, "pad_token", None) is not None

    def _own_limit(self, model: nn.Module) -> int | None:
        limits = (
            getattr(getattr(model, "config", None), "max_position_embeddings", None),
            getattr(self.tokenizer, "model_max_length", None),
        )
        known = [int(limit) for limit in limits if isinstance(limit, int) and 0 < limit < LONGEST_PLAUSIBLE]
        return min(known, default=None)

    def _encode(self, strings: list[str], longest: int | None) -> Mapping[str, Tensor]:
        if hasattr(self.tokenizer, "encode_batch"):
            encodings = self.tokenizer.encode_batch(strings)
            ids = [_real_tokens(encoding)[:longest] for encoding in encodings]
            masks = [torch.ones_like(row) for row in ids]
            pad = nn.utils.rnn.pad_sequence
            return {"input_ids": pad(ids, batch_first=True), "attention_mask": pad(masks, batch_first=True)}
        encoded: Mapping[str, Tensor] = self.tokenizer(
            strings,
            padding=len(strings) > 1,
            truncation=longest is not None,
            max_length=longest,
            return_tensors="pt",
        )
        return encoded


def _real_tokens(encoding: Any) -> Tensor:
    """Token ids without the padding that the tokenizer's file may ask for."""
    real = torch.tensor(encoding.attention_mask, dtype=torch.bool)
    return torch.tensor(encoding.ids, dtype=torch.long)[real]


def local_tokenizer(model: nn.Module) -> Any:
    """The tokenizer in the directory that a Hugging Face model was loaded from; nothing is downloaded.

    Raises:
        DataError: the model does not say where it comes from, that is no directory here, or it has no tokenizer.
    """
    remedy = "pass narrowcast.data.Texts(strings, tokenizer)"
    source = getattr(getattr(model, "config", None), "_name_or_path", "")
    if not source or not Path(source).is_dir():
        raise DataError(
            f"the data is a list of strings, but no tokenizer is known for {type(model).__name__}: "
            f"its config names {source!r}, which is not a directory; {remedy}"
        )
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise DataError(f"tokenizing strings needs transformers: pip install narrowcast[hf]; or {remedy}") from error
    try:
        return AutoTokenizer.from_pretrained(source, local_files_only=True)
    except (OSError, ValueError) as error:
        raise DataError(f"no tokenizer could be loaded from {source!r}: {error}; {remedy}") from error
