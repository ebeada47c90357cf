"""Documents, records and conversations from files; what cannot be read is named by file and line.

.jsonl .jsonl.gz        one JSON object a line
.json .json.gz          a list of objects, or one object a line
.parquet                rows (extra "hf")
.txt .md .rst .py (.gz) each file one document
a folder                all text files below it, or all its .jsonl and .parquet files, by name;
                        or what `datasets` wrote with save_to_disk (extra "hf")
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cabochon.core.errors import DataError
from cabochon.data.chat import Message
from cabochon.data.documents import Document
from cabochon.data.record_files import read_arrow_dataset, read_json, read_parquet, read_text

__all__ = ["Conversation", "Document", "Record", "read_chats", "read_documents", "read_records"]

_TEXT = (".txt", ".md", ".rst", ".py")
_RECORDS = (".jsonl", ".parquet")


@dataclass(frozen=True)
class Record:
    """One row of a file."""

    values: Mapping[str, Any]
    source: str
    """The file and the line or row, counted from 1."""


@dataclass(frozen=True)
class Conversation:
    """Messages and where they came from."""

    messages: tuple[Message, ...]
    source: str


def read_documents(path: str | Path, field: str = "text") -> Iterator[Document]:
    """The documents of a file or folder, one after another as they are asked for.

    Args:
        path: a file or folder of a kind named at the top of this module.
        field: which field of a record is the text.

    Raises:
        DataError: the path, a line or a field cannot be read; or there is no document at all.
        MissingExtra: parquet or a `datasets` folder without the extra "hf".
    """
    path = Path(path)
    text_files = _text_files(path)
    if text_files:
        found = False
        for each in text_files:
            if text := read_text(each):
                found = True
                yield Document(text, str(each))
        if not found:
            raise DataError(f"{path} is empty: it holds no character of text")
        return
    for record in read_records(path):
        text = _field(record, field)
        if not isinstance(text, str):
            raise DataError(
                f"{record.source}: the field {field!r} is {_kind(text)}, expected a string"
            )
        yield Document(_whole(text, record.source), record.source)


def read_records(path: str | Path) -> Iterator[Record]:
    """The rows of a file or folder of records.

    Raises:
        DataError: the path or a line cannot be read; or there is no row at all.
        MissingExtra: parquet or a `datasets` folder without the extra "hf".
    """
    path = Path(path)
    found = False
    for each in _record_files(path):
        for values, source in _rows(each):
            found = True
            yield Record(values, source)
    if not found:
        raise DataError(f"{path} is empty: it holds no row")


def read_chats(
    path: str | Path,
    *,
    prompt: str = "prompt",
    completion: str = "completion",
    answered: bool = True,
) -> Iterator[Conversation]:
    """The conversations of a file or folder of records.

    A row holds {"messages": [{"role": ..., "content": ...}, ...]}, or {"prompt": ...,
    "completion": ...} or {"question": ..., "answer": ...} whose values are strings or lists of
    messages. Roles are not checked here: what is allowed is the chat template's business.

    Args:
        path: a file or folder of a kind named at the top of this module.
        prompt: the field of what the user says, in rows without messages.
        completion: the field of what the model says, in rows without messages.
        answered: each row must hold what the model says; otherwise a prompt alone is a
            conversation too.

    Raises:
        DataError: a row is neither, or the path cannot be read.
        MissingExtra: parquet or a `datasets` folder without the extra "hf".
    """
    for record in read_records(path):
        values, source = record.values, record.source
        if "messages" in values:
            messages = _messages(values["messages"], "messages", source)
        elif prompt in values and (completion in values or not answered):
            messages = _said("user", values[prompt], prompt, source)
            if completion in values:
                messages = [*messages, *_said("model", values[completion], completion, source)]
        elif "question" in values and "answer" in values:
            asked = _said("user", values["question"], "question", source)
            messages = [*asked, *_said("model", values["answer"], "answer", source)]
        else:
            raise DataError(
                f"{source}: expected the field 'messages', or {prompt!r} and {completion!r}; "
                f"it has {_names(values)} ('question' and 'answer' will do too)"
            )
        yield Conversation(tuple(messages), source)


def _text_files(path: Path) -> list[Path]:
    """The text files at a path; none where it holds records."""
    if path.is_file():
        return [path] if _suffix(path) in _TEXT else []
    if not path.is_dir() or _is_arrow_dataset(path):
        return []
    text, records = _below(path, _TEXT), _below(path, _RECORDS)
    if text and records:
        raise DataError(
            f"{path} holds text ({text[0].name}) and records ({records[0].name}); name the file "
            "or folder that is meant"
        )
    return text


def _record_files(path: Path) -> list[Path]:
    if not path.exists():
        raise DataError(f"{path} does not exist")
    if path.is_file() or _is_arrow_dataset(path):
        return [path]
    found = _below(path, _RECORDS)
    if not found:
        there = sorted({_suffix(each) or each.name for each in path.rglob("*") if each.is_file()})
        raise DataError(
            f"{path} holds none of {', '.join((*_RECORDS, *_TEXT))}; it holds "
            f"{', '.join(there[:12]) or 'nothing'}"
        )
    return found


def _rows(path: Path) -> Iterator[tuple[Mapping[str, Any], str]]:
    if path.is_dir():
        return read_arrow_dataset(path)
    suffix = _suffix(path)
    if suffix in (".jsonl", ".json"):
        return read_json(path)
    if suffix == ".parquet":
        return read_parquet(path)
    known = ", ".join((".jsonl", ".json", ".parquet", *_TEXT))
    raise DataError(f"{path} is of the kind {suffix or 'without a suffix'}; known are {known}")


def _below(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    found: list[Path] = []
    for where, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        visible = (Path(where, name) for name in files if not name.startswith("."))
        found += [each for each in visible if _suffix(each) in suffixes]
    return sorted(found, key=lambda each: each.relative_to(folder).as_posix())


def _suffix(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _is_arrow_dataset(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _field(record: Record, field: str) -> Any:
    if field not in record.values:
        raise DataError(
            f"{record.source}: no field {field!r}; it has {_names(record.values)}; name the one "
            "that holds the text"
        )
    return record.values[field]


def _said(role: str, value: Any, field: str, source: str) -> list[Message]:
    if isinstance(value, str):
        return [Message(role, _whole(value, source))]
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return [Message(role, str(value))]  # the answer to a sum
    return _messages(value, field, source)


def _messages(value: Any, field: str, source: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{source}: the field {field!r} is {_kind(value)}, expected messages")
    messages = []
    for number, each in enumerate(value):
        if not isinstance(each, dict):
            raise DataError(
                f"{source}: message {number} is {_kind(each)}, expected an object with 'role' and "
                "'content'"
            )
        for name in ("role", "content"):
            if not isinstance(each.get(name), str):
                raise DataError(
                    f"{source}: message {number} has no string {name!r}; it has {_names(each)}"
                )
        messages.append(Message(each["role"], _whole(each["content"], source)))
    return messages


def _whole(text: str, source: str) -> str:
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"{source}: not valid Unicode: a lone surrogate U+{ord(text[error.start]):04X} at "
                f"character {error.start}"
            ) from error
    return text


def _names(values: Mapping[str, Any]) -> str:
    return ", ".join(repr(name) for name in values) or "no fields"


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a truth value"}
    if value is None:
        return "null"
    if value == []:
        return "an empty list"
    return names.get(
        type(value), "a number" if isinstance(value, int | float) else str(type(value))
    )
