"""Models of texts: which tokenizers the page reads, which models write on, how many tokens they take."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from narrowcast.errors import DataError
from narrowcast.export import PageOptions
from narrowcast.export.web_examples import beginning
from narrowcast.export.web_options import with_folder
from narrowcast.export.web_ports import Port, Question
from narrowcast.export.web_question import question
from narrowcast.export.web_shown import notes_of, shown
from narrowcast.export.web_text import longest, writes
from narrowcast.export.web_tokenizer import missing

IDS = Port("input_ids", "int64", (None, None))
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True, "trim_offsets": True}


def byte_pairs(**changed: Any) -> dict[str, Any]:
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}
    ends = [{"id": 3, "content": "<|endoftext|>", "special": True, "normalized": False}]
    table = {"model": model, "added_tokens": ends, "pre_tokenizer": BYTE_LEVEL, "decoder": BYTE_LEVEL}
    return table | changed


def asked_of(folder: Path, table: dict[str, Any], **options: Any) -> Question:
    (folder / "tokenizer.json").write_text(json.dumps(table))
    return question([IDS], PageOptions(tokenizer=folder, **options))


def test_byte_pairs_are_read_with_their_added_tokens_and_the_sign_of_an_end(tmp_path: Path) -> None:
    asked = asked_of(tmp_path, byte_pairs())
    assert asked.ask["kind"] == "text" and asked.ask["stop"] == [3] and asked.ask["pad_id"] == 3
    assert asked.vocabulary == 4 and asked.tokens == ("a", "b", "ab", "<|endoftext|>") and not asked.unspoken


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"model": {"type": "Other", "vocab": {"a": 0}}}, "its model is Other, and the page has WordPiece"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}}}, "its model is BPE without a vocabulary"),
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "Nmt"}]}}, "its normalizer is Nmt"),
        ({"pre_tokenizer": {"type": "UnicodeScripts"}}, "its pre_tokenizer is UnicodeScripts"),
        (
            {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": r"\p{L}++| ?"}, "behavior": "Isolated"}},
            r"its pre_tokenizer Split has the pattern .*, whose '\+\+' JavaScript does not have",
        ),
        ({"post_processor": {"type": "X"}}, "its post_processor is X"),
        ({"post_processor": {"type": "TemplateProcessing", "single": []}}, "TemplateProcessing has the text 0 times"),
    ],
)
def test_a_tokenizer_that_the_page_lacks_is_named(tmp_path: Path, changed: dict[str, Any], words: str) -> None:
    asked = asked_of(tmp_path, byte_pairs(**changed))
    assert asked.ask["kind"] == "numbers"
    assert re.search(words, asked.notes[0]) and asked.notes[0].endswith("the page asks for token ids")


def test_patterns_of_the_usual_decoders_are_not_refused() -> None:
    for pattern in (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t)?| ?[^\s]+[\r\n/]*",
    ):
        cut = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        assert missing(byte_pairs(pre_tokenizer=cut)) == ""


def test_ids_that_cannot_become_text_again_are_shown_as_classes(tmp_path: Path) -> None:
    asked = asked_of(tmp_path, byte_pairs(decoder={"type": "CTC"}))
    show = shown(asked, (1, 5, 4), PageOptions(), "y", next_token=True)
    assert show["kind"] == "classes" and "its decoder is CTC" in notes_of(asked, show)[0]
    with pytest.raises(DataError, match=r"continuation writes a text on.*its decoder is CTC"):
        shown(asked, (1, 5, 4), PageOptions(show="continuation"), "y", next_token=True)


def test_scores_of_the_next_token_are_written_on(tmp_path: Path) -> None:
    asked = asked_of(tmp_path, byte_pairs())
    assert shown(asked, (1, 5, 4), PageOptions(), "y", next_token=True) == {
        "kind": "continuation", "output": "y", "pool": "last", "labels": [],
    }  # fmt: skip
    assert shown(asked, (1, 4), PageOptions(), "y", next_token=True)["pool"] == "none"
    assert shown(asked, (1, 5, 4), PageOptions(), "y")["kind"] == "classes"
    assert shown(asked, (1, 5, 4), PageOptions(show="classes"), "y", next_token=True)["kind"] == "classes"


def test_a_model_that_sees_later_tokens_does_not_write_on(tmp_path: Path) -> None:
    asked = asked_of(tmp_path, byte_pairs())

    def causal(feeds: dict[str, Any]) -> Any:
        return np.eye(4)[feeds["input_ids"]].cumsum(axis=1)

    def both_ways(feeds: dict[str, Any]) -> Any:
        return causal(feeds) + np.eye(4)[feeds["input_ids"]].sum(axis=1, keepdims=True)

    assert writes(causal, asked, [IDS]) and not writes(both_ways, asked, [IDS])


@pytest.mark.parametrize("most", [1, 77, 400, 600])
def test_how_many_tokens_a_model_takes_is_found_by_trying(tmp_path: Path, most: int) -> None:
    asked = asked_of(tmp_path, byte_pairs())

    def limited(feeds: dict[str, Any]) -> Any:
        if feeds["input_ids"].shape[1] > most:
            raise DataError("too long")
        return np.zeros((1, 4))

    assert longest(limited, asked, [IDS]) == min(most, 512)


def test_a_folder_says_what_ends_a_text_and_how_many_positions_there_are(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"eos_token_id": 7, "max_position_embeddings": 64, "vocab_size": 9}')
    found = with_folder(PageOptions(), tmp_path)
    assert (found.stop, found.positions, found.scores) == ((7,), 64, 9)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    assert with_folder(PageOptions(), tmp_path).stop == (7, 8)
    asked = asked_of(tmp_path, byte_pairs(), stop=(7, 8), positions=64)
    assert asked.ask["stop"] == [7, 8] and asked.ask["limit"] == 64


def test_a_model_with_a_cache_says_what_the_page_lacks() -> None:
    past = Port("past_key_values.0.key", "float32", (None, 2, None, 4))
    asked = question([IDS, past], PageOptions())
    assert asked.ask["kind"] == "numbers" and "without a cache" in asked.notes[0]


def test_what_is_continued_is_the_beginning_of_the_first_text() -> None:
    data = type("Data", (), {"strings": ["one two  three four five six seven"]})
    assert beginning(data) == "one two three four five six" and beginning(None) == "Once upon a time"
