"""Tokenizers: trained here or read from any Hugging Face folder, and written as one.

Text is data: control tokens written out in it (a literal ``<bos>``) are encoded as the characters
they are. Only code that means a control token, such as the chat template, writes one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from cabochon.core.errors import DataError, FolderError, TokenizerMismatch
from cabochon.data.bpe import CONTROLS, train_bpe
from cabochon.data.streaming import StreamDecoder
from cabochon.data.templates import GEMMA_TEMPLATE
from cabochon.data.token_bytes import token_bytes
from cabochon.data.tokenizer_files import (
    ControlIds,
    open_backend,
    read_chat_template,
    read_control_ids,
    read_object,
    read_utf8,
)
from cabochon.files import write_whole

__all__ = ["ControlIds", "StreamDecoder", "Tokenizer", "train_tokenizer"]

_SAMPLE = (
    " Two  words,\tIt's 12345 (x_y);\r\n\n  caf\u00e9 e\u0301 \ufb01 \u2581 \u6f22 \U0001f642 "
)
"""Signs that tokenizers with the same entries may still normalise or cut differently."""


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, *, coverage: float = 0.9995
) -> Tokenizer:
    """A tokenizer of exactly `vocab_size` entries whose decode(encode(s)) is s for every text.

    The same texts give the same tokenizer, bit for bit, in any process.

    Args:
        texts: the corpus.
        vocab_size: at least 272: 16 control tokens and 256 bytes.
        coverage: fraction of the corpus's characters with entries of their own; the rest is bytes.

    Raises:
        ConfigError: a setting is out of range.
        DataError: the corpus is empty, is not text, or is too small for `vocab_size`.
    """
    content = train_bpe(texts, vocab_size, coverage=coverage)
    settings = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<bos>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<eos>",
        "mask_token": "<mask>",
        "pad_token": "<pad>",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
    }
    ids = {name[1:-1]: id_ for id_, name in enumerate(CONTROLS) if not name.startswith("<unused")}
    text = json.dumps(content, ensure_ascii=False, indent=1)
    return Tokenizer(text, ControlIds(**ids), settings=settings, chat_template=GEMMA_TEMPLATE)


class Tokenizer:
    """Text to token ids and back.

    Of a tokenizer trained here decode(encode(s)) is s for every valid Unicode text. A tokenizer
    read from elsewhere does what its own normaliser does (Qwen's composes accents, for instance).
    """

    def __init__(
        self,
        tokenizer_json: str,
        controls: ControlIds,
        *,
        settings: Mapping[str, Any],
        chat_template: str | None = None,
    ) -> None:
        """A tokenizer from the content of its files; `train_tokenizer` and `load` call this.

        Args:
            tokenizer_json: the content of tokenizer.json.
            controls: which ids mean what.
            settings: the content of tokenizer_config.json.
            chat_template: jinja source.
        """
        self.controls = controls
        self.chat_template = chat_template
        self._json = tokenizer_json
        self._settings = dict(settings)
        self._plain = open_backend(tokenizer_json)
        self._plain.encode_special_tokens = True
        vocabulary = self._plain.get_vocab(with_added_tokens=True)
        self._pieces = [""] * (max(vocabulary.values(), default=-1) + 1)
        for piece, id_ in vocabulary.items():
            self._pieces[id_] = piece
        self._special = frozenset(
            id_ for id_, token in self._plain.get_added_tokens_decoder().items() if token.special
        )

    @staticmethod
    def load(folder: str | Path) -> Tokenizer:
        """The tokenizer of a Hugging Face folder that holds a tokenizer.json.

        BOS, EOS and padding come from tokenizer_config.json, special_tokens_map.json,
        generation_config.json or config.json, whichever names them first.

        Raises:
            FolderError: the folder or a needed file is absent, or a file is not JSON.
            TokenizerMismatch: a control token is named that the vocabulary does not hold.
        """
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            there = ", ".join(sorted(each.name for each in folder.glob("*"))[:12]) or "nothing"
            raise FolderError(
                f"{folder} holds no tokenizer.json (it holds {there}); save the tokenizer in the "
                "fast format: AutoTokenizer.from_pretrained(...).save_pretrained(...)"
            )
        text = read_utf8(path)
        settings = read_object(folder / "tokenizer_config.json")
        vocabulary = open_backend(text, str(path)).get_vocab(with_added_tokens=True)
        return Tokenizer(
            text,
            read_control_ids(folder, vocabulary),
            settings=settings,
            chat_template=read_chat_template(folder, settings),
        )

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and chat_template.jinja, each whole or not.

        transformers' AutoTokenizer reads them with the same ids. Two habits of its own remain: it
        puts <bos> in front unless add_special_tokens=False, and it takes control tokens written
        out in the text for control tokens unless split_special_tokens=True.

        Raises:
            FolderError: a file cannot be written; it is as it was.
        """
        folder = Path(folder)
        settings = dict(self._settings)
        settings.pop("chat_template", None)
        for name in ("pad", "eos", "bos", "unk", "mask"):
            id_ = getattr(self.controls, name)
            if id_ is not None:
                settings[f"{name}_token"] = self._pieces[id_]
        config = json.dumps(settings, ensure_ascii=False, indent=2, sort_keys=True) + "\n"
        try:
            write_whole(folder / "tokenizer.json", self._json)
            write_whole(folder / "tokenizer_config.json", config)
            if self.chat_template is not None:
                write_whole(folder / "chat_template.jinja", self.chat_template)
            else:
                (folder / "chat_template.jinja").unlink(missing_ok=True)
        except OSError as error:
            raise FolderError(f"the tokenizer could not be saved in {folder}: {error}") from error

    @property
    def vocab_size(self) -> int:
        """How many rows an embedding needs: the largest id plus one."""
        return len(self._pieces)

    @property
    def pad_id(self) -> int | None:
        return self.controls.pad

    @property
    def eos_id(self) -> int | None:
        return self.controls.eos

    @property
    def bos_id(self) -> int | None:
        return self.controls.bos

    @property
    def start_of_turn_id(self) -> int | None:
        return self.controls.start_of_turn

    @property
    def end_of_turn_id(self) -> int | None:
        return self.controls.end_of_turn

    @property
    def eos_is_pad(self) -> bool:
        """True where padding and the end of a text are one token."""
        return self.eos_id is not None and self.eos_id == self.pad_id

    def control(self, name: str) -> int:
        """The id of a control token that must be there: "bos", "eos", "end_of_turn", ...

        Raises:
            TokenizerMismatch: the tokenizer has no such token.
        """
        id_: int | None = getattr(self.controls, name)
        if id_ is None:
            raise TokenizerMismatch(
                f"the tokenizer has no {name} token; name one in its tokenizer_config.json, or "
                "use a tokenizer that has it"
            )
        return id_

    def learnable_end(self) -> int:
        """The EOS id, once it is sure that it can be learned.

        Raises:
            TokenizerMismatch: there is no EOS, or it is also the padding.
        """
        eos = self.control("eos")
        if self.eos_is_pad:
            raise TokenizerMismatch(
                f"EOS and PAD are the same token, {self._pieces[eos]!r} (id {eos}), so that a "
                "model never learns to stop; name another pad_token in tokenizer_config.json, "
                "an unused one for instance"
            )
        return eos

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Token ids; control tokens written out in `text` are plain text.

        Raises:
            DataError: `text` is no valid Unicode text (it holds a lone surrogate).
            TokenizerMismatch: a control token is asked for that the tokenizer lacks.
        """
        return self.encode_all([text], bos=bos, eos=eos)[0]

    def encode_all(
        self, texts: Iterable[str], *, bos: bool = False, eos: bool = False
    ) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        texts = list(texts)
        before = [self.control("bos")] if bos else []
        after = [self.control("eos")] if eos else []
        try:
            # Without the offsets that plain `encode` counts, which take most of its time.
            encoded = self._plain.encode_batch_fast(texts, add_special_tokens=False)
        except TypeError:
            for number, text in enumerate(texts):
                _refuse_if_not_text(number, text)
            raise
        return [[*before, *each.ids, *after] for each in encoded]

    def encode_framed(self, text: str) -> list[int]:
        """Token ids with whatever control tokens tokenizer.json puts around any text.

        That is what transformers' tokenizer gives for a text; those written out in it are plain.

        Raises:
            DataError: `text` is no valid Unicode text.
        """
        _refuse_if_not_text(0, text)
        return list(self._plain.encode(text, add_special_tokens=True).ids)

    def encode_with_controls(self, text: str) -> tuple[list[int], list[int]]:
        """Token ids, and the character at which each begins, of a rendered chat template.

        Control tokens written out in `text` are meant here.

        Raises:
            DataError: `text` is no valid Unicode text.
        """
        _refuse_if_not_text(0, text)
        encoded = self._parsing.encode(text, add_special_tokens=False)
        return list(encoded.ids), [start for start, _ in encoded.offsets]

    def decode(self, ids: Iterable[int]) -> str:
        """The text; control tokens are left out, and broken characters become U+FFFD.

        Raises:
            DataError: an id lies outside the vocabulary.
        """
        listed = self._checked(ids)
        if self._bytes is None:
            return str(self._plain.decode(listed, skip_special_tokens=True))
        return b"".join([self._bytes[id_] for id_ in listed]).decode("utf-8", "replace")

    def pieces(self, ids: Iterable[int]) -> list[str]:
        r"""What each token looks like: control tokens by name, parts of characters as \xe2."""
        return [
            self._pieces[id_]
            if self._bytes is None or id_ in self._special
            else self._bytes[id_].decode("utf-8", "backslashreplace")
            for id_ in self._checked(ids)
        ]

    def bytes_of(self, id_: int) -> bytes | None:
        """What a token adds to the text, nothing for control tokens; None if neighbours decide."""
        return None if self._bytes is None else self._bytes[id_]

    def is_control(self, id_: int) -> bool:
        """True for tokens that stand for no text."""
        return id_ in self._special

    def controls_in(self, text: str) -> list[str]:
        """The control tokens that `text` writes out, which a template would take for real."""
        return sorted(self._pieces[id_] for id_ in self._special if self._pieces[id_] in text)

    def stream(self) -> StreamDecoder:
        """A decoder for tokens that come one by one."""
        return StreamDecoder(self._bytes, self.decode)

    def fingerprint(self) -> str:
        """SHA-256 over vocabulary, merges, control ids, and how a sample of signs is cut."""
        return self._fingerprint

    def difference(self, other: Tokenizer) -> str | None:
        """What tells `other` from this one, for an error message; None where nothing does."""
        if self.fingerprint() == other.fingerprint():
            return None
        found = []
        if self.vocab_size != other.vocab_size:
            found.append(f"{self.vocab_size} entries against {other.vocab_size}")
        named = asdict(other.controls)
        for name, mine in asdict(self.controls).items():
            if mine != named[name]:
                found.append(f"{name} is {mine} against {named[name]}")
        pairs = enumerate(zip(self._pieces, other._pieces, strict=False))
        unlike = [(id_, mine, theirs) for id_, (mine, theirs) in pairs if mine != theirs]
        if unlike:
            shown = ", ".join(
                f"{id_}: {mine!r} against {theirs!r}" for id_, mine, theirs in unlike[:3]
            )
            found.append(f"{len(unlike)} ids mean something else ({shown})")
        return "; ".join(found) or "the same entries, but merged or cut differently"

    @cached_property
    def _fingerprint(self) -> str:
        # What the tokenizer does, not how a version of the library spells its settings.
        merges = json.loads(self._json)["model"].get("merges", [])
        content = {
            "pieces": self._pieces,
            "merges": [pair.split(" ") if isinstance(pair, str) else pair for pair in merges],
            "special": sorted(self._special),
            "controls": asdict(self.controls),
            "sample": self.encode(_SAMPLE),
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @cached_property
    def _parsing(self) -> tokenizers.Tokenizer:
        return open_backend(self._json)

    @cached_property
    def _bytes(self) -> list[bytes] | None:
        decoder = self._plain.decoder
        content = None if decoder is None else json.loads(decoder.__getstate__())
        table = token_bytes(content, self._pieces)
        if table is None:
            return None
        return [b"" if id_ in self._special else value for id_, value in enumerate(table)]

    def _checked(self, ids: Iterable[int]) -> list[int]:
        listed = [int(id_) for id_ in ids]
        if listed and not 0 <= min(listed) <= max(listed) < self.vocab_size:
            wrong = next(id_ for id_ in listed if not 0 <= id_ < self.vocab_size)
            raise DataError(
                f"token id {wrong} lies outside the vocabulary (0 to {self.vocab_size - 1})"
            )
        return listed


def _refuse_if_not_text(number: int, text: object) -> None:
    if not isinstance(text, str):
        raise DataError(f"text {number} is {type(text).__name__}, expected str")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"text {number} is not valid Unicode: a lone surrogate "
            f"U+{ord(text[error.start]):04X} at character {error.start}; decode its source again "
            "with errors='replace'"
        ) from error
