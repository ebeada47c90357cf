"""A teacher of another vocabulary: how likely it finds each group of the text's tokens.

The text of a document is cut again by the teacher's tokenizer, and where both cuts have a boundary
at the same byte a group ends. For each group the teacher says log P = sum log p over its own tokens
of it, the student's is log Q = sum log q over its own, and what is compared is the two outcomes
"the model goes on with this group" and "it does not".

Exact: P and Q, as the probabilities that each model gives to the group spelled as its tokenizer
spells it, behind the text before. With the student's own tokenizer every group is one token, and
the comparison that of the text's token and all others: a lower bound of any f-divergence.

Not exact: a model could spell the same bytes in other tokens, which P and Q leave out; behind a
boundary the next token may reach further in one vocabulary than in the other, so that the outcomes
are of the same bytes but not quite of the same event; and what a teacher thinks of other ways to go
on is not used at all, so less is learned from a position than with a common tokenizer.

Source: Minixhofer, Vulic and Ponti 2025, arXiv:2503.20083 (approximate likelihood matching), whose
binarised comparison of aligned chunks this is; their choice of chunks by a threshold on
tokenization bias, and their temperature, are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from cabochon.core.errors import DataError, TokenizerMismatch
from cabochon.core.protocols import Policy, Teacher
from cabochon.core.types import GroupTargets, TokenBatch
from cabochon.data.alignment import Atoms, aligned, utf8_skip
from cabochon.data.batches import Placed, documents
from cabochon.data.tokenizer import Tokenizer
from cabochon.data.truncation import spans

__all__ = ["TargetLogprob", "cross_tokenizer", "target_logprob"]

TargetLogprob = Callable[[TokenBatch], Tensor]
"""What a model gives to the counted targets of a batch: B T float32 nats, NaN elsewhere."""

_ROLES = ("bos", "eos", "start_of_turn", "end_of_turn")
_FIRST_CONTROL = 256


def target_logprob(policy: Policy) -> TargetLogprob:
    """Of a policy in process."""

    @torch.no_grad()
    def logprob(batch: TokenBatch, /) -> Tensor:
        prediction = policy(batch)
        found = torch.full((batch.mask.numel(),), torch.nan, device=batch.mask.device)
        rows = batch.mask.flatten().nonzero().squeeze(1)
        targets = batch.targets.flatten()
        for some in spans(prediction, rows):
            law = prediction.logits(some).log_softmax(-1)
            found[some] = law.gather(-1, targets[some, None]).squeeze(-1).float()
        return found.view(batch.shape)

    return logprob


def cross_tokenizer(
    logprob: TargetLogprob, student: Tokenizer, teacher: Tokenizer, *, context: int | None = None
) -> Teacher:
    """A teacher that speaks another vocabulary, about the groups that both cut alike.

    Positions stay without a group where the cuts cannot be compared: behind bytes that are no
    UTF-8 (the student may write such), behind what the teacher's normaliser changes, at a control
    token that the teacher lacks and behind it.

    Args:
        logprob: the teacher's, of its own tokens; `target_logprob` of a policy, `served_logprob`
            of a server.
        student: the tokenizer of the batches.
        teacher: the teacher's own.
        context: the most tokens of a document that the teacher is made for.

    Raises:
        TokenizerMismatch: the bytes of tokens cannot be told, or the teacher has no BOS or EOS
            where the student has.

    The teacher raises DataError where nothing of a batch can be compared, or a document has more
    of the teacher's tokens than its context.
    """
    mine, theirs = _Bytes.of(student, "student"), _Bytes.of(teacher, "teacher")
    for role in ("bos", "eos"):
        if role in mine.controls.values() and role not in theirs.controls.values():
            raise TokenizerMismatch(
                f"the student's tokenizer has a {role} token, the teacher's has none; a text could "
                "not be begun or ended for both"
            )

    def say(batch: TokenBatch, /) -> GroupTargets:
        asked = [each for each in documents(batch) if each.counted.any()]
        pairs = [_pair(each, mine, theirs) for each in asked]
        for pair in pairs:
            if context is not None and len(pair.tokens) > context:
                raise DataError(
                    f"a document of {len(pair.document.tokens)} tokens has {len(pair.tokens)} of "
                    f"the teacher's, which is made for {context}; use shorter rows (--context)"
                )
        if asked and not any(pair.groups for pair in pairs):
            raise DataError(
                "no group of tokens can be compared with the teacher's: its tokenizer changes "
                "this text, or lacks its control tokens"
            )
        return _targets(batch, pairs, logprob)

    return say


@dataclass(frozen=True)
class _Bytes:
    """What the ids of a tokenizer stand for."""

    tokenizer: Tokenizer
    controls: dict[int, str]
    """Id -> role."""

    @staticmethod
    def of(tokenizer: Tokenizer, whose: str) -> _Bytes:
        if tokenizer.bytes_of(0) is None:
            raise TokenizerMismatch(
                f"the bytes of the {whose}'s tokens depend on their neighbours, so that its text "
                "cannot be aligned with another tokenizer's; use one with byte-level tokens or "
                "byte fallback"
            )
        ids = {role: getattr(tokenizer.controls, role) for role in _ROLES}
        return _Bytes(tokenizer, {id_: role for role, id_ in ids.items() if id_ is not None})

    def id_of(self, atom: int) -> int | None:
        """The token of a control atom; None where there is no such."""
        role = _ROLES[atom - _FIRST_CONTROL]
        return next((id_ for id_, each in self.controls.items() if each == role), None)

    def atoms(self, id_: int) -> Atoms | None:
        """Its bytes, or its role; None for control tokens of no known role, and unknown ids."""
        if id_ in self.controls:
            return (_FIRST_CONTROL + _ROLES.index(self.controls[id_]),)
        if id_ >= self.tokenizer.vocab_size or self.tokenizer.is_control(id_):
            return None
        return self.tokenizer.bytes_of(id_)


@dataclass(frozen=True)
class _Pair:
    """A document in both cuts."""

    document: Placed
    tokens: list[int]
    """The teacher's."""
    groups: list[tuple[range, range]] = field(default_factory=list)
    """Places in the student's and in the teacher's sequence, none of them the first."""


def _pair(document: Placed, mine: _Bytes, theirs: _Bytes) -> _Pair:
    atoms: list[Atoms] = []
    for id_ in document.sequence.tolist():
        found = mine.atoms(id_)
        if found is None:
            break
        atoms.append(found)
    flat = [each for some in atoms for each in some]
    skip = utf8_skip(flat)
    tokens = list(_recut(flat[skip:], theirs))
    their_atoms = [theirs.atoms(id_) or () for id_ in tokens]
    counted = document.counted
    groups = [
        (ours, other)
        for ours, other in aligned(atoms, their_atoms, skip=skip)
        # What precedes the first token predicts nothing, and a group counts whole or not at all.
        if ours.start > 0 and other.start > 0 and counted[ours.start - 1 : ours.stop - 1].all()
    ]
    return _Pair(document, tokens, groups)


def _recut(atoms: list[int], theirs: _Bytes) -> Iterator[int]:
    """The teacher's tokens of the same atoms, up to the first that it cannot write."""
    text = bytearray()
    for atom in [*atoms, None]:
        if atom is not None and atom < _FIRST_CONTROL:
            text.append(atom)
            continue
        try:
            valid = text.decode("utf-8")
        except UnicodeDecodeError as error:
            valid, atom = text[: error.start].decode("utf-8"), None
        yield from theirs.tokenizer.encode(valid)
        text.clear()
        control = None if atom is None else theirs.id_of(atom)
        if control is None:
            return
        yield control


def _targets(batch: TokenBatch, pairs: list[_Pair], logprob: TargetLogprob) -> GroupTargets:
    """Asks the teacher, and adds its tokens up by group."""
    theirs, starts = _rows(pairs, batch.shape[0])
    device = batch.tokens.device
    group = np.full(batch.mask.numel(), -1, np.int64)
    mask = np.zeros(theirs.mask.numel(), np.bool_)
    places: list[int] = []
    numbers: list[int] = []
    count = 0
    for pair, start in zip(pairs, starts, strict=True):
        for ours, other in pair.groups:
            group[pair.document.flat[ours.start - 1 : ours.stop - 1]] = count
            places += [start + place - 1 for place in other]
            numbers += [count] * len(other)
            count += 1
    mask[places] = True
    asked = TokenBatch(**{**vars(theirs), "mask": torch.from_numpy(mask).view(theirs.shape)})
    at, number = (
        torch.tensor(each, dtype=torch.int64, device=device) for each in (places, numbers)
    )
    total = torch.zeros(count, dtype=torch.float64, device=device)
    total.index_add_(0, number, logprob(asked.to(device)).flatten()[at].double())
    return GroupTargets(
        group=torch.from_numpy(group).view(batch.shape).to(device), logprob=total.float()
    )


def _rows(pairs: list[_Pair], rows: int) -> tuple[TokenBatch, list[int]]:
    """The teacher's tokens, packed as the student's documents are; where each document starts."""
    kept: list[list[_Pair]] = [[] for _ in range(rows)]
    for pair in pairs:
        kept[pair.document.row].append(pair)
    length = max(1, *(sum(len(pair.tokens) for pair in row) for row in kept))
    tokens = torch.zeros((rows, length), dtype=torch.int64)
    targets, positions = torch.zeros_like(tokens), torch.zeros_like(tokens)
    numbers = torch.full_like(tokens, -1)
    starts = []
    for number, row in enumerate(kept):
        begin = 0
        for document, pair in enumerate(row):
            end = begin + len(pair.tokens)
            ids = torch.tensor(pair.tokens, dtype=torch.int64)
            tokens[number, begin:end] = ids
            targets[number, begin : end - 1] = ids[1:]
            positions[number, begin:end] = torch.arange(len(ids))
            numbers[number, begin:end] = document
            starts.append(number * length + begin)
            begin = end
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    return TokenBatch(
        tokens=tokens, positions=positions, documents=numbers, targets=targets, mask=mask
    ), starts
