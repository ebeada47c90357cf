"""Tokens drawn so that a person sees which of them are learned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.text import Text

from cabochon.core import TokenBatch
from cabochon.data.tokenizer import Tokenizer

__all__ = ["Drawn", "documents_in", "draw"]


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """The tokens of one document of a row, and whether each is to be predicted."""

    ids: tuple[int, ...]
    learned: tuple[bool, ...]


def documents_in(batch: TokenBatch, row: int) -> Iterator[Drawn]:
    """The documents (or pieces of long ones) of a row, in their order, padding left out.

    A batch's mask belongs to its targets; here it stands at the token that is the target.
    """
    documents = batch.documents[row].tolist()
    tokens, mask = batch.tokens[row].tolist(), batch.mask[row].tolist()
    for number in dict.fromkeys(each for each in documents if each >= 0):
        places = [at for at, document in enumerate(documents) if document == number]
        learned = [False, *(mask[at] for at in places[:-1])]
        yield Drawn(ids=tuple(tokens[at] for at in places), learned=tuple(learned))


def draw(
    tokenizer: Tokenizer, ids: Sequence[int], learned: Sequence[bool], *, most: int, colour: bool
) -> Text:
    """Every token as text: learned ones green on a terminal, in [brackets] elsewhere.

    Args:
        tokenizer: says what the ids look like.
        ids: the tokens.
        learned: for each, whether it is to be predicted.
        most: how many to show; how many more there are is said.
        colour: colours instead of brackets.
    """
    text = Text()
    for piece, counts in zip(tokenizer.pieces(ids[:most]), learned, strict=False):
        shown = piece.replace("\n", "\\n")
        if not colour:
            text.append(f"[{shown}]" if counts else shown)
        else:
            text.append(shown, style="black on green" if counts else "dim")
        text.append("\n" * piece.count("\n"))
    if len(ids) > most:
        text.append(f" ... and {len(ids) - most} tokens more")
    return text
