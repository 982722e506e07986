"""Small tokenizers of every family that the page knows, trained on a few lines, and texts that are hard for them."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

TEXTS: list[str] = json.loads(Path(__file__).with_name("hard_texts.json").read_text(encoding="utf-8"))
CORPUS = [
    "low lower lowest new newer newest wide wider widest", "the quick brown fox jumps over the lazy dog",
    "It's what they'll say: don't stop, we've only just begun!", "café naïve über 東京 is big, 你好 世界 and 1234",
    "def f(x):\n    return x  # ok", "Hello, world! hello World.", "aaaa abab baba aaab",
]  # fmt: skip


def _words(vocabulary: list[str]) -> dict[str, int]:
    return {word: number for number, word in enumerate(dict.fromkeys(vocabulary))}


def gpt2() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(CORPUS, trainer)
    return made


def roberta() -> Any:
    from tokenizers import AddedToken, processors

    made = gpt2()
    made.add_special_tokens([AddedToken("<mask>", lstrip=True), AddedToken("</s>")])
    sides = [(name, made.token_to_id(name)) for name in ("</s>", "<s>")]
    made.post_processor = processors.RobertaProcessing(*sides, add_prefix_space=True)
    made.pre_tokenizer.add_prefix_space = True
    return made


def llama3() -> Any:
    """GPT-4's cutting, whole words before merges, a template."""
    from tokenizers import Regex, pre_tokenizers, processors

    made = gpt2()
    words, signs = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    pattern = rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|{words}|{signs}"
    cuts = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    template = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))])
    made.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    table = json.loads(made.to_str())
    table["model"]["ignore_merges"] = True
    return type(made).from_str(json.dumps(table))


def _sentence_piece(*, legacy: bool) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Metaspace()
    learned.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=200, show_progress=False))
    model = json.loads(learned.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    made = Tokenizer(models.BPE(_words(pieces), [tuple(m) for m in model["merges"]], unk_token="<unk>", fuse_unk=True,
                                byte_fallback=True))  # fmt: skip
    made.add_special_tokens([AddedToken(name, normalized=False) for name in ("<unk>", "<s>", "</s>")])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    if legacy:
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return made


def llama2() -> Any:
    return _sentence_piece(legacy=True)


def mistral() -> Any:
    return _sentence_piece(legacy=False)


def clip() -> Any:
    """Ends of words marked, letters small, NFC."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    made = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>", fuse_unk=False))
    made.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase(), normalizers.StripAccents()])
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)]
    )
    made.decoder = decoders.BPEDecoder(suffix="</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=["<unk>"], end_of_word_suffix="</w>", show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    return made


def unigram(*, byte_fallback: bool = False) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    learned = Tokenizer(models.Unigram())
    learned.pre_tokenizer = pre_tokenizers.Metaspace()
    learned.train_from_iterator(
        CORPUS * 4,
        trainers.UnigramTrainer(vocab_size=120, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False),
    )
    vocabulary = [tuple(entry) for entry in json.loads(learned.to_str())["model"]["vocab"]]
    tail = [(f"<0x{byte:02X}>", 0.0) for byte in range(256)] if byte_fallback else []
    made = Tokenizer(models.Unigram([*vocabulary, ("</s>", 0.0), *tail], 0, byte_fallback))
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    end = made.token_to_id("</s>")
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", end)])
    made.add_special_tokens(["</s>"])
    return made


def unigram_bytes() -> Any:
    from tokenizers import decoders

    made = unigram(byte_fallback=True)
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return made


def word_piece() -> Any:
    from tokenizers import AddedToken, BertWordPieceTokenizer

    made = BertWordPieceTokenizer(lowercase=True)
    made.train_from_iterator(CORPUS, vocab_size=200, show_progress=False)
    made = made._tokenizer
    made.add_tokens([AddedToken("newword", single_word=True), AddedToken("CamelCase", normalized=True)])
    return made


def word_level() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[UNK]", "Hello", "world", ",", "!", " ", "<", "s", ">", "low", "lower"]
    made = Tokenizer(models.WordLevel(_words(words), unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("contiguous")]
    )
    return made


def charsmap(replacements: dict[str, str]) -> bytes:
    """SentencePiece's table of replacements: a double-array trie over UTF-8, then the replacements, each ended by 0."""
    text, places = b"", {}
    for key, value in replacements.items():
        places[key.encode()] = len(text)
        text += value.encode() + b"\0"
    units = {0: 0}

    def place(prefix: bytes, at: int) -> None:
        """Give the children of a node, which stands at `at`, places that are free."""
        keys = [key for key in places if key.startswith(prefix)]
        labels = sorted(
            {key[len(prefix)] for key in keys if len(key) > len(prefix)} | ({0} if prefix in places else set())
        )
        base = next(b for b in range(1, 4096) if not any((b ^ label) in units for label in labels))
        assert base ^ at < 1 << 21
        units[at] |= (base ^ at) << 10 | (256 if prefix in places else 0)
        for label in labels:
            units[base ^ label] = label if label else places[prefix] | 1 << 31
        for label in filter(None, labels):
            place(prefix + bytes([label]), base ^ label)

    place(b"", 0)
    array = [units.get(i, 0) for i in range(max(units) // 256 * 256 + 512)]  # any byte leads to a unit
    return struct.pack(f"<I{len(array)}I", 4 * len(array), *array) + text


def xlm_roberta() -> Any:
    from tokenizers import normalizers

    made = unigram()
    table = charsmap({"ﬁ": "fi", "①": "1", "½": "1/2", "\u00a0": " ", "\t": " ", "\u200b": "", "ß": "ss", "…": "..."})
    made.normalizer = normalizers.Sequence([normalizers.Precompiled(table), made.normalizer])
    return made


FAMILIES: dict[str, Callable[[], Any]] = {
    made.__name__: made
    for made in (
        gpt2,
        roberta,
        llama3,
        llama2,
        mistral,
        clip,
        unigram,
        unigram_bytes,
        xlm_roberta,
        word_piece,
        word_level,
    )
}
