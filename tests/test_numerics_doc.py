"""docs/numerics.md says only what is true: its Python blocks run, in order, in one namespace."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "numerics.md"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_every_block_of_the_numerics_page_runs_and_its_assertions_hold() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    found = list(BLOCK.finditer(text))
    assert len(found) > 10
    with torch.random.fork_rng():
        for block in found:
            # blank lines in front, so that a traceback names the line of the page
            before = text.count("\n", 0, block.start(1))
            exec(compile("\n" * before + block[1], str(DOCUMENT), "exec"), names)


def test_every_section_of_the_numerics_page_that_computes_has_an_example() -> None:
    sections = re.split(r"^## ", DOCUMENT.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    assert [section.partition("\n")[0] for section in sections if "```python" not in section] == []
