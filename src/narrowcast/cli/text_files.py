"""Texts of `.txt` and `.jsonl` files as data, and the tokenizer that goes with them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from narrowcast.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

    from narrowcast.cli.datasets import DataOptions

TEXT_KEYS = ("text", "sentence", "content")
LABEL_KEYS = ("label", "labels", "target")
PAIR_KEYS = (("sentence1", "sentence2"), ("text1", "text2"))
SCORE_KEYS = ("score", "similarity_score", "label")
LINE_LIMIT = 10_000_000


class LabelledTexts:
    """Tokenized texts with what each should be recognised as; can be read as often as wanted.

    Args:
        texts: the samples.
        labels: one per text.
        tokenizer: a Hugging Face tokenizer.
        batch_size: texts per batch.
    """

    def __init__(self, texts: list[str], labels: list[Any], tokenizer: Any, batch_size: int) -> None:
        self.texts, self.labels, self.tokenizer, self.batch_size = texts, labels, tokenizer, batch_size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for start in range(0, len(self.texts), self.batch_size):
            yield self.take(range(start, min(start + self.batch_size, len(self.texts))))

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: Sequence[int]) -> dict[str, Any]:
        """The batch of the texts with these numbers."""
        import torch

        texts = [self.texts[row] for row in rows]
        encoded = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        return {**encoded, "labels": torch.tensor([self.labels[row] for row in rows])}

    def digest(self) -> str:
        """SHA-256 of texts and labels."""
        return hashlib.sha256(json.dumps([self.texts, self.labels]).encode()).hexdigest()


class TokenRows:
    """Samples whose inputs stand in the file as lists of numbers; equal lengths share a batch, order is kept."""

    def __init__(self, rows: list[dict[str, Any]], batch_size: int) -> None:
        self.rows, self.batch_size = rows, batch_size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        import torch

        batch: list[dict[str, Any]] = []
        for row in [*self.rows, None]:
            full = len(batch) == self.batch_size or (batch and row is not None and _lengths(row) != _lengths(batch[0]))
            if batch and (full or row is None):
                yield {name: torch.tensor([one[name] for one in batch]) for name in batch[0]}
                batch = []
            if row is not None:
                batch.append(row)

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, rows: Sequence[int]) -> dict[str, Any]:
        """The batch of the samples with these numbers; lists of different lengths are padded.

        Zeros on the right, labels of -100, which count for nothing. Where a sample's labels are no list, an attention
        mask is added: only a causal model whose own tokens are what it learns never looks at what is on the right.
        """
        import torch

        chosen = [self.rows[row] for row in rows]
        lengths = [max(_lengths(row).values()) for row in chosen]
        if len(set(lengths)) == 1:
            return {name: torch.tensor([row[name] for row in chosen]) for name in chosen[0]}
        labels = next((name for name in LABEL_KEYS if name in chosen[0]), None)
        if labels is None:
            ids = next(name for name, value in chosen[0].items() if isinstance(value, list))
            chosen, labels = [row | {"labels": row[ids]} for row in chosen], "labels"
        elif not isinstance(chosen[0][labels], list) and "attention_mask" not in chosen[0]:
            chosen = [row | {"attention_mask": [1] * n} for row, n in zip(chosen, lengths, strict=True)]
        return {name: _padded([row[name] for row in chosen], -100 if name == labels else 0) for name in chosen[0]}

    def subset(self, rows: Sequence[int]) -> TokenRows:
        """The samples with these numbers, nothing padded."""
        return TokenRows([self.rows[row] for row in rows], self.batch_size)

    def digest(self) -> str:
        """SHA-256 of the samples."""
        return hashlib.sha256(json.dumps(self.rows).encode()).hexdigest()


def _padded(values: list[Any], fill: int) -> Tensor:
    """[samples, longest] or, of single numbers, [samples]."""
    import torch

    rows = [torch.tensor(value) for value in values]
    return (
        torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)
        if rows[0].ndim
        else torch.stack(rows)
    )


def _lengths(row: dict[str, Any]) -> dict[str, int]:
    return {name: len(value) if isinstance(value, list) else 0 for name, value in row.items()}


def open_text(path: Path, options: DataOptions, model: str) -> Any:
    """One text per line; empty lines are passed over."""
    from narrowcast.data import Texts

    lines = [line for line in _lines(path) if line.strip()][: options.limit]
    if not lines:
        raise DataError(f"{path} holds no text")
    return Texts(lines, tokenizer_for(model, options), batch_size=options.batch_size)


def open_jsonl(path: Path, options: DataOptions, model: str) -> Any:
    """Texts, labelled texts, scored pairs of texts, or inputs by name; every line of the same kind."""
    from narrowcast.data import Pairs, Texts

    rows = _documents(path)[: options.limit]
    first = rows[0]
    if isinstance(first, str):
        texts = _column(path, [{"text": row} for row in rows], "text")
        return Texts(texts, tokenizer_for(model, options), batch_size=options.batch_size)
    if not isinstance(first, dict):
        raise DataError(f"{path}, line 1 is a {type(first).__name__}; expected a text or a table")
    for names in PAIR_KEYS:
        if set(names) <= set(first):
            score = _one_of(path, first, SCORE_KEYS)
            tokenizer = tokenizer_for(model, options)
            sides = [Texts(_column(path, rows, name), tokenizer, batch_size=options.batch_size) for name in names]
            return Pairs(sides[0], sides[1], [float(value) for value in _column(path, rows, score, number=True)])
    text = next((name for name in TEXT_KEYS if name in first), None)
    if text is None:
        return TokenRows(_token_rows(path, rows), options.batch_size)
    texts, tokenizer = _column(path, rows, text), tokenizer_for(model, options)
    label = next((name for name in LABEL_KEYS if name in first), None)
    if label is None:
        return Texts(texts, tokenizer, batch_size=options.batch_size)
    return LabelledTexts(texts, _column(path, rows, label, number=True), tokenizer, options.batch_size)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not text in UTF-8: {error.reason} at byte {error.start}") from None


def _documents(path: Path) -> list[Any]:
    rows = []
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            rows.append(_document(path, number, line))
    if not rows:
        raise DataError(f"{path} holds no samples")
    return rows


def _document(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line) if len(line) <= LINE_LIMIT else None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}, line {number} is not JSON: {error}") from None


def _column(path: Path, rows: list[Any], name: str, *, number: bool = False) -> list[Any]:
    kinds = (int, float) if number else (str,)
    for index, row in enumerate(rows):
        if not isinstance(row, dict) or not isinstance(row.get(name), kinds):
            raise DataError(f"{path}, sample {index + 1}: no {'number' if number else 'text'} under {name!r}")
    return [row[name] for row in rows]


def _one_of(path: Path, row: dict[str, Any], names: tuple[str, ...]) -> str:
    found = next((name for name in names if name in row), None)
    if found is None:
        raise DataError(
            f"{path}: pairs of texts need a score under one of {', '.join(names)}; line 1 has {', '.join(row)}"
        )
    return found


def _token_rows(path: Path, rows: list[Any]) -> list[dict[str, Any]]:
    for index, row in enumerate(rows):
        if not isinstance(row, dict) or row.keys() != rows[0].keys() or not row:
            raise DataError(f"{path}, sample {index + 1}: expected the keys of line 1, {', '.join(rows[0])}")
        for name, value in row.items():
            if not _is_numeric(value):
                raise DataError(
                    f"{path}, sample {index + 1}: {name!r} is not numbers; texts stand under text, or under sentence1 "
                    "and sentence2 with a score"
                )
    return rows


def _is_numeric(value: Any) -> bool:
    """Whether torch can make a tensor of it."""
    import torch

    try:
        torch.tensor(value)
    except (ValueError, TypeError, RuntimeError, OverflowError):
        return False
    return True


def tokenizer_for(model: str, options: DataOptions) -> Any:
    """The tokenizer of `--tokenizer`, or the one in the model's directory.

    Raises:
        DataError: there is none, or it cannot be read.
    """
    directory = options.tokenizer or Path(model)
    remedy = "give its directory with --tokenizer"
    if not directory.is_dir():
        raise DataError(f"texts need a tokenizer, and {str(directory)!r} is no directory that could hold one; {remedy}")
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise DataError("texts need transformers: pip install 'narrowcast[hf]'") from None
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # foreign files can make transformers fail in any way
        raise DataError(
            f"no tokenizer in {str(directory)!r} ({type(error).__name__}: {error!s:.200}); {remedy}"
        ) from None
