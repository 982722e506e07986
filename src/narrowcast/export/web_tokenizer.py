"""Which tokenizer.json the page's tokenizer.js reads, and what it lacks of the others."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

_Step = dict[str, Any]

# Steps that hold others, and under which name.
_NESTED = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "post_processor": "processors",
           "decoder": "decoders"}  # fmt: skip
# By the name of a step the types that token_text.js, token_models.js and tokenizer.js have.
_KNOWN = {
    "normalizer": ("BertNormalizer", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "StripAccents", "Strip", "Prepend",
                   "Replace", "Precompiled"),
    "pre_tokenizer": ("BertPreTokenizer", "Whitespace", "WhitespaceSplit", "Punctuation", "Digits", "Split",
                      "Metaspace", "ByteLevel"),
    "post_processor": ("TemplateProcessing", "BertProcessing", "RobertaProcessing", "ByteLevel"),
    "decoder": ("ByteLevel", "ByteFallback", "Fuse", "Replace", "Strip", "Metaspace", "WordPiece", "BPEDecoder"),
}  # fmt: skip
_MODELS = ("WordPiece", "WordLevel", "BPE", "Unigram")
# Of Oniguruma what token_text.js rewrites for JavaScript: (?i: without brackets in it; \s, \S, \d; sets and properties.
_FOREIGN = re.compile(
    r"\(\?(?!:|=|!|<=|<!|i:[^()]*\))"  # atomic groups, switched modes, names
    r"|(?<!\\)[?*+]\+"  # possessive quantifiers
    r"|\\[^sSdpPnrtux\W_]"  # other escapes
    r"|\[\[:|&&"  # sets of POSIX and their intersections
    r"|(?<![\[\\])\^|(?<!\\)\$"  # starts and ends, which are those of lines there
)


def missing(table: Any, *, decodes: bool = False) -> str:
    """What of a tokenizer the page does not do; "" where it does everything.

    Args:
        table: the content of tokenizer.json.
        decodes: whether ids become text again.
    """
    if not isinstance(table, dict) or not isinstance(table.get("model"), dict):
        return "it is no tokenizer and no vocabulary"
    kind = table["model"].get("type")
    if kind not in _MODELS:
        return f"its model is {kind}, and the page has {', '.join(_MODELS)}"
    if not table["model"].get("vocab") or (kind == "BPE" and "merges" not in table["model"]):
        return f"its model is {kind} without a vocabulary"
    if kind == "BPE" and table["model"].get("dropout"):
        return "its merges are dropped at random"
    for name, known in _KNOWN.items():
        for step in _steps(table.get(name), _NESTED[name]) if name != "decoder" or decodes else ():
            if step.get("type") not in known:
                return f"its {name} is {step.get('type')}, and the page has {', '.join(known)}"
            found = _REFUSED.get(str(step["type"]), lambda _: "")(step)
            if found:
                return f"its {name} {step['type']} {found}"
    return ""


def _steps(step: _Step | None, nested: str) -> Iterator[_Step]:
    if step is None:
        return
    if step.get("type") == "Sequence":
        for inner in step.get(nested, []):
            yield from _steps(inner, nested)
    else:
        yield step


def _foreign(step: _Step) -> str:
    source = step.get("pattern", {}).get("Regex")
    found = _FOREIGN.search(source) if source is not None else None
    return f"has the pattern {source!r}, whose {found[0]!r} JavaScript does not have" if found else ""


def _not_one_text(step: _Step) -> str:
    """Templates are ids before the text, the text, ids after it."""
    whole = [part for part in step.get("single", []) if "Sequence" in part]
    return "" if len(whole) == 1 else f"has the text {len(whole)} times"


_REFUSED: dict[str, Callable[[_Step], str]] = {
    "Split": _foreign, "Replace": _foreign, "TemplateProcessing": _not_one_text,
}  # fmt: skip


def tokens_of(table: dict[str, Any]) -> dict[str, int]:
    """Every token of a tokenizer, added ones too, with its number."""
    vocabulary = table["model"]["vocab"]
    if isinstance(vocabulary, list):
        vocabulary = {piece: number for number, (piece, _) in enumerate(vocabulary)}
    return {**vocabulary, **{entry["content"]: entry["id"] for entry in table.get("added_tokens") or []}}
