r"""Byte-pair encoding with byte fallback, trained from text and written as a tokenizer.json.

The vocabulary is: 16 control tokens (Gemma's first seven, then unused ones), the 256 bytes as
``<0x00>`` to ``<0xFF>``, the characters that cover almost all of the corpus, then the merges in the
order they were found. Nothing is normalised, so that any text comes back unchanged; a character
outside the vocabulary is written in bytes.

Three decisions are worth knowing:

- Digits stand alone, and spaces are kept as they are (no stand-in character such as U+2581, which
  could not be told from itself).
- A piece of text holds at most one newline, at its end. So encoding is additive at line ends,
  encode(a + "\n" + b) == encode(a + "\n") + encode(b), and a prompt that ends in a newline never
  shares a token with what follows it.
- The bytes are ordinary entries, not added tokens: as special tokens they would vanish whenever
  special tokens are skipped while decoding.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from cabochon.core.errors import ConfigError, DataError

__all__ = ["CONTROLS", "SMALLEST_VOCABULARY", "train_bpe"]

CONTROLS: tuple[str, ...] = (
    "<pad>",
    "<eos>",
    "<bos>",
    "<unk>",
    "<mask>",
    "<start_of_turn>",
    "<end_of_turn>",
    *(f"<unused{n}>" for n in range(9)),
)
"""The control tokens; a token's id is its place."""

BYTES: tuple[str, ...] = tuple(f"<0x{value:02X}>" for value in range(256))

SMALLEST_VOCABULARY = len(CONTROLS) + len(BYTES)
"""Controls and bytes alone: every text can be written, one token a byte."""

PIECES = (
    r"\p{N}"  # a digit
    r"|[^\n\p{L}\p{N}]?\p{L}+"  # a word with the one character before it
    r"| ?[^\s\p{L}\p{N}]+\n?"  # signs, with the line's end
    r"|[^\S\n]*\n"  # an empty line, or what trails on one
    r"|[^\S\n]+(?!\S)"  # indentation but for its last space, which goes to the word
    r"|[^\S\n]+"
)
"""How text is cut before merging; merges never cross a cut."""


def train_bpe(
    texts: Iterable[str],
    vocab_size: int,
    *,
    coverage: float = 0.9995,
    longest: int = 16,
) -> dict[str, Any]:
    """The content of a tokenizer.json, the same bits for the same texts in any process.

    Args:
        texts: the corpus, held in memory while it is counted.
        vocab_size: entries, controls and bytes included; exactly this many are made.
        coverage: fraction of the corpus's characters that get an entry of their own, the most
            frequent first; the others are written in bytes.
        longest: the most characters a merged entry may have.

    Raises:
        ConfigError: `vocab_size` does not hold the controls and the bytes.
        DataError: no text at all, something that is not text, or too little text for `vocab_size`.

    Source: Sennrich et al. 2016 (byte-pair encoding); byte fallback as in SentencePiece.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ConfigError(
            f"vocab_size is {vocab_size}; {len(CONTROLS)} control tokens and 256 bytes need at "
            f"least {SMALLEST_VOCABULARY}"
        )
    if not 0.0 < coverage <= 1.0:
        raise ConfigError(f"coverage must lie in (0, 1], got {coverage}")
    corpus = _checked(texts)
    room = vocab_size - SMALLEST_VOCABULARY
    counts = _characters(corpus)
    kept = _most_frequent(counts, coverage, room)
    merges = _merges(corpus, kept, set(counts) - set(kept), room, longest)
    vocabulary = {token: id_ for id_, token in enumerate((*CONTROLS, *BYTES, *kept))}
    for left, right in merges:
        vocabulary.setdefault(left + right, len(vocabulary))
    if len(vocabulary) < vocab_size:
        raise DataError(
            f"the corpus ({sum(counts.values())} characters) gives {len(vocabulary)} entries, "
            f"vocab_size asks for {vocab_size}; ask for at most that or give more text"
        )
    return _tokenizer_json(vocabulary, merges)


def _checked(texts: Iterable[str]) -> list[str]:
    if isinstance(texts, str):
        raise DataError("the corpus is one string; give an iterable of texts, such as [text]")
    corpus = list(texts)
    for number, text in enumerate(corpus):
        if not isinstance(text, str):
            raise DataError(f"text {number} of the corpus is {type(text).__name__}, expected str")
    if not any(corpus):
        raise DataError(
            f"the corpus is empty ({len(corpus)} texts without a character); give it some text"
        )
    return corpus


def _characters(corpus: list[str]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for number, text in enumerate(corpus):
        counts.update(text)
        if not text.isascii() and re.search("[\ud800-\udfff]", text):
            raise DataError(
                f"text {number} of the corpus holds a lone surrogate, which is no character; "
                "decode its source again with errors='replace'"
            )
    return counts


def _most_frequent(counts: Counter[str], coverage: float, room: int) -> list[str]:
    """Characters by falling count (ties by code point) until covered, in code point order."""
    wanted = coverage * sum(counts.values())
    kept: list[str] = []
    covered = 0
    for character, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if covered >= wanted or len(kept) == room:
            break
        kept.append(character)
        covered += count
    return sorted(kept)


def _merges(
    corpus: list[str], kept: list[str], rare: set[str], room: int, longest: int
) -> list[list[str]]:
    if room == len(kept):
        return []
    # Rare characters become cuts: when encoding they are bytes, which no merge crosses. Leaving
    # them to the trainer's own alphabet limit would break ties in hash order.
    cuts: list[Any] = [pre_tokenizers.Split(Regex(PIECES), "isolated")]
    if rare:
        cut = min(rare)
        pattern = re.compile("[" + "".join(re.escape(each) for each in sorted(rare)) + "]+")
        corpus = [pattern.sub(cut, text) for text in corpus]
        cuts.insert(0, pre_tokenizers.Split(cut, "removed"))
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    trainer = trainers.BpeTrainer(
        vocab_size=room,
        min_frequency=2,
        special_tokens=[],
        initial_alphabet=kept,
        max_token_length=longest,
        show_progress=False,
    )
    model.train_from_iterator(corpus, trainer)
    merges: list[list[str]] = json.loads(model.to_str())["model"]["merges"]
    return merges


def _tokenizer_json(vocabulary: dict[str, int], merges: list[list[str]]) -> dict[str, Any]:
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": id_,
                "content": content,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for id_, content in enumerate(CONTROLS)
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": PIECES},
            "behavior": "Isolated",
            "invert": False,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<bos>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [
                {"SpecialToken": {"id": "<bos>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "<bos>", "type_id": 1}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {
                "<bos>": {"id": "<bos>", "ids": [CONTROLS.index("<bos>")], "tokens": ["<bos>"]}
            },
        },
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": merges,
        },
    }
