"""Real text that every machine has: the source of the running Python's standard library.

Modules, not files, are held out: a package's files quote one another. A module's side depends on
its name alone (leading underscores aside, so that `_strptime` goes with `strptime`), so it is the
same under every Python that has the module.
"""

from __future__ import annotations

import ast
import gc
import inspect
import os
import re
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cabochon.core.errors import FolderError
from cabochon.data.documents import Document
from cabochon.data.splits import is_held_out

__all__ = ["Corpus", "Summaries", "Summary", "module_of", "standard_library", "summaries"]

HELD_OUT_FRACTION = 0.1
SALT = "cabochon"

_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_OF_THIS_MACHINE = re.compile(r"_sysconfigdata_|config-\d|sitecustomize|usercustomize")


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Source files of the standard library; a document's source is its path in the library."""

    train: tuple[Document, ...]
    held_out: tuple[Document, ...]
    skipped: tuple[str, ...]
    """Files that are not UTF-8 text, each with the reason."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A function and what its author said that it does."""

    function: str
    """Source without the docstring, not indented, decorators included."""
    summary: str
    """The docstring's first sentence, on one line."""
    source: str
    """Path in the library and line, such as "json/decoder.py:343"."""


@dataclass(frozen=True, kw_only=True)
class Summaries:
    """Functions with their summaries, on the same sides as their modules."""

    train: tuple[Summary, ...]
    held_out: tuple[Summary, ...]
    skipped: tuple[str, ...]
    """Files that are no text or no Python, each with the reason."""


def standard_library(
    held_out_fraction: float = HELD_OUT_FRACTION, *, salt: str = SALT, folder: Path | None = None
) -> Corpus:
    """The running Python's standard library, its tests left out.

    The same on every machine whose Python is of the same version and complete (some systems ship
    parts such as tkinter apart); files that describe the machine are left out, and line ends are
    newlines everywhere.

    Args:
        held_out_fraction: share of the top-level modules held out, in [0, 1].
        salt: another salt holds out other modules.
        folder: another library's folder, for tests.

    Raises:
        FolderError: this Python keeps no source files (an embedded or zipped one).
        ConfigError: the fraction lies outside [0, 1].
    """
    folder = folder or Path(sysconfig.get_path("stdlib"))
    train: list[Document] = []
    held_out: list[Document] = []
    skipped: list[str] = []
    for path in _sources(folder):
        name = path.relative_to(folder).as_posix()
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            skipped.append(f"{name}: not UTF-8 at byte {error.start}")
            continue
        document = Document(text.replace("\r\n", "\n"), name)
        module = module_of(name).lstrip("_")
        (held_out if is_held_out(module, held_out_fraction, salt=salt) else train).append(document)
    if not train and not held_out:
        raise FolderError(
            f"{folder} holds no Python source; run under a Python that keeps its library as files"
        )
    return Corpus(train=tuple(train), held_out=tuple(held_out), skipped=tuple(skipped))


def summaries(
    held_out_fraction: float = HELD_OUT_FRACTION, *, salt: str = SALT, folder: Path | None = None
) -> Summaries:
    """Every documented function of the standard library with the first sentence of its docstring.

    Arguments and errors are those of `standard_library`, and so are the sides.
    """
    corpus = standard_library(held_out_fraction, salt=salt, folder=folder)
    skipped = list(corpus.skipped)
    sides: list[tuple[Summary, ...]] = []
    with _quiet_parsing():
        for documents in (corpus.train, corpus.held_out):
            found: list[Summary] = []
            for document in documents:
                try:
                    found += _summaries(document)
                except SyntaxError as error:
                    skipped.append(f"{document.source}: not Python at line {error.lineno}")
            sides.append(tuple(found))
    return Summaries(train=sides[0], held_out=sides[1], skipped=tuple(skipped))


def module_of(source: str) -> str:
    """The top-level module of a source: "json" of "json/decoder.py" and "json/decoder.py:343"."""
    return source.partition(":")[0].split("/")[0].removesuffix(".py")


@contextmanager
def _quiet_parsing() -> Iterator[None]:
    """No warnings about old escapes, and no cycle collection: syntax trees hold no cycles.

    Collecting all the same would take half the time.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        if was_on:
            gc.enable()


def _sources(folder: Path) -> list[Path]:
    found: list[Path] = []
    for where, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in _LEFT_OUT]
        if Path(where) == folder:
            folders[:] = [name for name in folders if not _OF_THIS_MACHINE.match(name)]
            files = [name for name in files if not _OF_THIS_MACHINE.match(name)]
        found += [Path(where, name) for name in files if name.endswith(".py")]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def _summaries(document: Document) -> Iterator[Summary]:
    if '"""' not in document.text and "'''" not in document.text:
        return
    lines = document.text.split("\n")
    for node in _functions(ast.parse(document.text)):
        said = ast.get_docstring(node, clean=False)
        sentence = _first_sentence(said) if said else None
        function = _without_docstring(node, lines) if sentence else None
        if sentence and function:
            yield Summary(
                function=function, summary=sentence, source=f"{document.source}:{node.lineno}"
            )


def _functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function below, in the order of the source; expressions are not entered."""
    for field in ("body", "handlers", "orelse", "finalbody", "cases"):
        below = getattr(tree, field, ())
        for node in below if isinstance(below, list) else ():
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield node
            yield from _functions(node)


def _without_docstring(
    node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]
) -> str | None:
    """The source; None where the docstring is the whole body or shares a line with something."""
    docstring, *body = node.body
    last = docstring.end_lineno or docstring.lineno
    if not body or lines[docstring.lineno - 1][: docstring.col_offset].strip():
        return None
    if lines[last - 1].encode()[docstring.end_col_offset :].strip():
        return None
    first = min([node.lineno, *(each.lineno for each in node.decorator_list)])
    kept = lines[first - 1 : docstring.lineno - 1] + lines[last : node.end_lineno]
    return textwrap.dedent("\n".join(kept)).strip("\n") + "\n"


def _first_sentence(docstring: str) -> str | None:
    """The first sentence of the first paragraph; None where it says less than two words."""
    paragraph = re.split(r"\n\s*\n", inspect.cleandoc(docstring), maxsplit=1)[0]
    line = " ".join(paragraph.split())
    end = re.search(r"(?<!e\.g)(?<!i\.e)(?<!etc)(?<!vs)[.!?](?=\s|$)", line)
    sentence = line[: end.end()] if end else line
    return sentence if len(sentence.split()) >= 2 else None
