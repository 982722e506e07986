"""The page's tokenizers against the tokenizers library: the same ids for every text, the same text for every id."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.web.tokenizer_cases import FAMILIES, TEXTS

pytest.importorskip("tokenizers", reason="tokenizers is not installed")
BOTH = """import { tokenizer } from "./tokenizer.js"; import { readFileSync } from "node:fs"; //
    const found = tokenizer(JSON.parse(readFileSync(given.file)));
    const ids = given.texts.map((text) => [...found.before, ...found.ids(text), ...found.after]);
    give({ ids, texts: given.ids.map((row) => found.decode(row)) });"""


def differences(javascript: Callable[..., Any], library: Any, file: Path, texts: list[str]) -> list[Any]:
    """What the page makes otherwise: texts with both lists of ids, ids with both texts."""
    library.save(str(file))
    library = type(library).from_file(str(file))
    texts = [text.encode("utf-8", "replace").decode() for text in texts]
    wanted = [encoding.ids for encoding in library.encode_batch(texts)]
    rows = [*wanted, *(row[1:-1] for row in wanted), *(row[::-1] for row in wanted)]
    found = javascript(BOTH, {"file": str(file), "texts": texts, "ids": rows})
    said = [library.decode(row) for row in rows]
    return [
        *(entry for entry in zip(texts, found["ids"], wanted, strict=True) if entry[1] != entry[2]),
        *(entry for entry in zip(rows, found["texts"], said, strict=True) if entry[1] != entry[2]),
    ]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_ids_and_texts_are_those_of_the_tokenizers_library(
    javascript: Callable[..., Any], tmp_path: Path, family: str
) -> None:
    assert not differences(javascript, FAMILIES[family](), tmp_path / "tokenizer.json", TEXTS)
