"""Models that read texts: what a page needs to make token ids of one, and whether a model writes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from narrowcast.errors import DataError, NarrowcastError
from narrowcast.export.web_options import CHARACTERS, TOKENIZER, PageOptions, read_json
from narrowcast.export.web_ports import TOKENS, Port, Question
from narrowcast.export.web_tokenizer import missing, tokens_of

LONGEST = 512  # tokens that a page hands over where neither the model nor its files say fewer
# Names that these inputs have everywhere.
_IDS, _MASK, _KINDS, _PLACES = "input_ids", "attention_mask", "token_type_ids", "position_ids"
_FILLS = ("<pad>", "[PAD]", "<|endoftext|>", "</s>")
_ENDS = ("</s>", "<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<eos>", "<end_of_turn>", "<|end|>")
# What a later token may change of earlier scores, as a share of their variance: ranges that are found at run time for a
# whole tensor carry rounding over (stories260k, dynamic-int8: at most 4e-4 for 20 pairs), attention carries meaning.
_CAUSAL = 0.02


def is_text(inputs: list[Port]) -> bool:
    """Whether a model with these inputs takes token ids."""
    names = {port.name for port in inputs}
    tokens = all(port.type in TOKENS and len(port.shape) == 2 and port.shape[0] in (1, None) for port in inputs)
    return tokens and (len(inputs) == 1 or (_IDS in names and names <= {_IDS, _MASK, _KINDS, _PLACES}))


def text_question(inputs: list[Port], options: PageOptions, place: Path) -> Question | str:
    """What to ask for where there is a vocabulary; why it is of no use otherwise.

    Raises:
        DataError: the vocabulary cannot be read.
    """
    file = place if place.is_file() else next(
        (place / name for name in (TOKENIZER, CHARACTERS) if (place / name).is_file()), None
    )  # fmt: skip
    if file is None:
        raise DataError(f"{place} holds no {TOKENIZER} and no {CHARACTERS}")
    table = read_json(file)
    characters = isinstance(table, dict) and bool(table) and all(isinstance(number, int) for number in table.values())
    reason = "" if characters else missing(table)
    if reason:
        return f"{file.name}: {reason}"
    tokens: dict[str, int] = table if characters else tokens_of(table)
    named = {port.name: port for port in inputs}
    ids = named.get(_IDS, inputs[0])
    limit = None if characters else (table.get("truncation") or {}).get("max_length")
    ask = {
        "kind": "text", "tokens": "characters" if characters else "words",
        "vocabulary": CHARACTERS if characters else TOKENIZER, "length": ids.shape[1],
        "limit": min(filter(None, (limit, ids.shape[1], options.positions, LONGEST))),
        "pad": "left" if characters else "right", "pad_id": 0 if characters else _pad_id(table, tokens),
        **{key: _plain(named.get(port)) for key, port in (("mask", _MASK), ("kinds", _KINDS), ("positions", _PLACES))},
        "input": _plain(ids), "stop": list(options.stop or _ends(tokens, characters=characters)),
    }  # fmt: skip
    names = [""] * (max(tokens.values()) + 1)
    for token, number in tokens.items():
        names[number] = token
    unspoken = "" if characters else missing(table, decodes=True)
    return Question(ask, {str(ask["vocabulary"]): file}, len(names), tuple(names), unspoken=unspoken)


def _plain(port: Port | None) -> dict[str, str] | None:
    return None if port is None else {"name": port.name, "type": port.type}


def _pad_id(table: dict[str, Any], tokens: dict[str, int]) -> int:
    told = (table.get("padding") or {}).get("pad_id")
    return int(told if told is not None else next((tokens[name] for name in _FILLS if name in tokens), 0))


def _ends(tokens: dict[str, int], *, characters: bool) -> list[int]:
    """Tokens that end a text; vocabularies of characters have one sign for its start and its end."""
    names = ("<s>",) if characters else _ENDS
    return [tokens[name] for name in names if name in tokens]


def longest(answer: Callable[[dict[str, Any]], Any], asked: Question, inputs: list[Port]) -> int:
    """How many tokens the model takes, at most those of `asked`: found by trying, as no file says it for certain.

    Args:
        answer: the model: arrays by the names of the inputs -> output.
        asked: a question for a text.
        inputs: of the model.

    Raises:
        NarrowcastError: the model does not even take one token.
    """
    ask = asked.ask
    if ask["length"] is not None:
        return int(ask["limit"])
    low, high = 1, int(ask["limit"])
    tried = high
    while low < high:
        try:
            answer(tokens_in_a_row(asked, inputs, tried))
            low = tried
        except NarrowcastError:
            high = tried - 1
        tried = (low + high + 1) // 2
    return low


def tokens_in_a_row(asked: Question, inputs: list[Port], count: int) -> dict[str, Any]:
    """Inputs of one text of random tokens."""
    generator = np.random.default_rng(count)
    made = {_MASK: np.ones((1, count)), _KINDS: np.zeros((1, count)), _PLACES: np.arange(count)[None]}
    ids = generator.integers(0, asked.vocabulary, (1, count))
    return {port.name: made.get(port.name, ids).astype(port.type) for port in inputs}


def writes(answer: Callable[[dict[str, Any]], Any], asked: Question, inputs: list[Port]) -> bool:
    """Whether a model whose outputs are scores of tokens gives, at every position, those of the next one.

    A model that sees later tokens (BERT with its language head) gives other scores at the first position when the last
    token is another one. Arguments are those of `longest`.
    """
    count = asked.ask["length"] or min(int(asked.ask["limit"]), 6)
    feeds = tokens_in_a_row(asked, inputs, count)
    first = np.asarray(answer(feeds), np.float64)
    if first.ndim == 2:  # one answer per text
        return True
    name = asked.ask["input"]["name"]
    feeds[name] = feeds[name].copy()
    feeds[name][0, -1] = (feeds[name][0, -1] + 1) % asked.vocabulary
    second = np.asarray(answer(feeds), np.float64)
    return count > 1 and float(np.mean((first - second)[:, :-1] ** 2)) <= _CAUSAL * float(np.var(first[:, :-1]))
