"""The rows of one file, and the text of one file, with every failure named by its place."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

from cabochon.core.errors import DataError, MissingExtra

__all__ = ["read_arrow_dataset", "read_json", "read_parquet", "read_text"]

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_text(path: Path) -> str:
    """The whole file as it is, line ends included; a byte order mark is left out.

    Raises:
        DataError: the file is not UTF-8, or its compression is damaged.
    """
    with _open(path) as file:
        try:
            content = file.read().removeprefix(_BYTE_ORDER_MARK)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path} cannot be read: {error}") from error
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8 ({error.reason})") from error


def read_json(path: Path) -> Iterator[tuple[Mapping[str, Any], str]]:
    """The objects of a file of JSON lines, or of one JSON list; empty lines are passed over.

    Raises:
        DataError: a line is not UTF-8, not JSON or not an object.
    """
    if Path(path.name.lower().removesuffix(".gz")).suffix == ".json":
        text = read_text(path)
        if text.lstrip().startswith("["):
            for number, row in enumerate(_parsed(text, str(path)), 1):
                yield _object(row, f"{path}, row {number}")
            return
    for number, line in _lines(path):
        if line.strip():
            source = f"{path}:{number}"
            yield _object(_parsed(line, source), source)


def read_parquet(path: Path) -> Iterator[tuple[Mapping[str, Any], str]]:
    """The rows of a parquet file.

    Raises:
        DataError: the file is not parquet or is damaged.
        MissingExtra: pyarrow is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtra("pyarrow", "hf", "reading parquet") from error
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for some in file.iter_batches(batch_size=1024):
                for row in some.to_pylist():
                    number += 1
                    yield row, f"{path}, row {number}"
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as parquet after row {number}: {error}") from error


def read_arrow_dataset(folder: Path) -> Iterator[tuple[Mapping[str, Any], str]]:
    """The rows of a folder that `datasets` wrote with save_to_disk.

    Raises:
        DataError: the folder holds several splits, or is damaged.
        MissingExtra: datasets is not installed.
    """
    if (folder / "dataset_dict.json").is_file():
        there = sorted(each.name for each in folder.iterdir() if each.is_dir())
        raise DataError(
            f"{folder} holds the splits {', '.join(there)}; name one, such as {folder / there[0]}"
            if there
            else f"{folder} names splits in dataset_dict.json but holds none"
        )
    try:
        import datasets
        import pyarrow
    except ImportError as error:
        raise MissingExtra("datasets", "hf", "reading a folder of datasets") from error
    try:
        rows = datasets.load_from_disk(str(folder))
    except (pyarrow.ArrowException, OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder} cannot be read as a saved data set: {error}") from error
    for number, row in enumerate(rows, 1):
        yield row, f"{folder}, row {number}"


def _open(path: Path) -> BinaryIO:
    try:
        if path.name.lower().endswith(".gz"):
            return cast(BinaryIO, gzip.open(path, "rb"))
        return path.open("rb")
    except OSError as error:
        raise DataError(f"{path} cannot be opened: {error.strerror or error}") from error


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines by newline alone: JSON strings may hold the other line separators of Unicode."""
    offset, number = 0, 0
    with _open(path) as file:
        while True:
            number += 1
            try:
                line = file.readline()
            except (OSError, EOFError, zlib.error) as error:
                raise DataError(f"{path}:{number}: the file is damaged: {error}") from error
            if not line:
                return
            try:
                text = line.removeprefix(_BYTE_ORDER_MARK if number == 1 else b"").decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}:{number}: byte {offset + error.start} of the file is not UTF-8 "
                    f"({error.reason})"
                ) from error
            yield number, text
            offset += len(line)


def _parsed(text: str, source: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        shown = text.strip()
        shown = shown if len(shown) <= 60 else shown[:60] + "..."
        raise DataError(f"{source}: not JSON ({error}): {shown!r}") from error


def _object(row: Any, source: str) -> tuple[Mapping[str, Any], str]:
    if not isinstance(row, dict):
        raise DataError(f"{source}: a JSON {type(row).__name__}, expected an object with fields")
    return row, source
