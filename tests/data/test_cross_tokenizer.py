"""A teacher of another vocabulary: what it gives to groups, by enumeration and by prefixes."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from cabochon.core import GroupTargets, Key, LinearPrediction, TokenBatch
from cabochon.core.errors import DataError, TokenizerMismatch
from cabochon.data.cross_tokenizer import cross_tokenizer, target_logprob
from cabochon.data.packing import pack_tokens
from cabochon.data.tokenizer import ControlIds, Tokenizer, train_tokenizer
from cabochon.losses import linear
from cabochon.models.gemma.config import GemmaConfig
from cabochon.models.gemma.decoder import Gemma

TEXTS = [
    "def total(values):\n    return sum(values)\n",
    "for each in values:\n    print(each)\n",
    "caf\u00e9 na\u00efve \u6f22\u5b57 and some \U0001f642 words",
]


@pytest.fixture(scope="module")
def student() -> Tokenizer:
    return train_tokenizer(["values: def total sum(values) for each in print " * 6], 320)


@pytest.fixture(scope="module")
def teacher() -> Tokenizer:
    return train_tokenizer([*TEXTS * 3, "return sum(values)\n    return " * 5], 360)


def model(vocabulary: int) -> Gemma:
    config = GemmaConfig(
        vocab_size=vocabulary, width=16, layers=2, heads=2, kv_heads=1, head_width=8, ffn_width=24,
        query_scalar=8, window=8, attention_cap=5.0, final_cap=8.0, post_norms=True, context=128,
    )  # fmt: skip
    made = Gemma(config, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            drawn = torch.randn(weight.shape, generator=Key(5).fold(name).generator())
            weight.copy_(drawn * (0.3 if weight.ndim == 1 else 2.0 / weight.shape[-1] ** 0.5))
    return made.requires_grad_(False)


def log_prob(policy: Any, ids: Sequence[int]) -> float:
    """Of all tokens behind the first, one forward pass a token."""
    total = 0.0
    for place in range(1, len(ids)):
        batch = TokenBatch.of([ids[:place]])
        total += policy(batch).logits(slice(place - 1, place)).log_softmax(-1)[0, ids[place]].item()
    return total


def groups_of(said: GroupTargets, row: int) -> list[list[int]]:
    """The positions of each group of a row, in order."""
    found: dict[int, list[int]] = {}
    for place, group in enumerate(said.group[row].tolist()):
        if group >= 0:
            found.setdefault(group, []).append(place)
    return list(found.values())


def test_each_group_has_the_probability_that_the_teacher_gives_to_its_bytes_in_its_own_tokens(
    student: Tokenizer, teacher: Tokenizer
) -> None:
    policy = model(teacher.vocab_size)
    say = cross_tokenizer(target_logprob(policy), student, teacher)
    batch = TokenBatch.of([student.encode(text, bos=True, eos=True) for text in TEXTS], left=True)
    said = say(batch)
    assert isinstance(said, GroupTargets)
    sizes = set()
    for row, text in enumerate(TEXTS):
        own = teacher.encode(text, bos=True, eos=True)
        theirs = [teacher.bytes_of(id_) or b"" for id_ in own]
        mine = student.encode(text, bos=True, eos=True)
        first = batch.shape[1] - len(mine)
        covered = []
        for places in groups_of(said, row):
            tokens = [place - first + 1 for place in places]  # a position predicts the next token
            begin = b"".join(student.bytes_of(mine[n]) or b"" for n in range(tokens[0]))
            end = begin + b"".join(student.bytes_of(mine[n]) or b"" for n in tokens)
            if tokens[0] == len(mine) - 1:  # EOS
                start, stop = len(own) - 1, len(own)
            else:
                lengths = [len(b"".join(theirs[:n])) for n in range(len(theirs))]
                start = max(n for n, length in enumerate(lengths) if length == len(begin))
                stop = max(n for n, length in enumerate(lengths) if length == len(end))
            expected = log_prob(policy, own[:stop]) - log_prob(policy, own[:start])
            number = said.group[row, places[0]]
            assert said.logprob[number].item() == pytest.approx(expected, abs=2e-4)
            sizes.add((len(tokens), stop - start))
            covered += tokens
        assert covered == list(range(1, len(mine)))
        whole = said.logprob[said.group[row][said.group[row] >= 0].unique()].sum().item()
        assert whole == pytest.approx(log_prob(policy, own), abs=1e-3)
    assert any(mine > theirs for mine, theirs in sizes)
    assert (1, 1) in sizes


def test_with_the_students_own_tokenizer_every_token_is_a_group(student: Tokenizer) -> None:
    policy = model(student.vocab_size)
    batch = TokenBatch.of([student.encode(text, bos=True, eos=True) for text in TEXTS])
    said = cross_tokenizer(target_logprob(policy), student, student)(batch)
    assert isinstance(said, GroupTargets)
    assert torch.equal(said.group[batch.mask], torch.arange(int(batch.mask.sum())))
    law = policy(batch).logits(slice(None)).log_softmax(-1).view(*batch.shape, -1)
    expected = law.gather(-1, batch.targets[..., None]).squeeze(-1)[batch.mask]
    torch.testing.assert_close(said.logprob, expected, atol=1e-5, rtol=0)


def test_packing_changes_nothing(student: Tokenizer, teacher: Tokenizer) -> None:
    say = cross_tokenizer(target_logprob(model(teacher.vocab_size)), student, teacher)
    sequences = [student.encode(text, bos=True, eos=True) for text in TEXTS]
    apart = say(TokenBatch.of(sequences))
    rows = pack_tokens(sequences, sum(map(len, sequences)))
    together = say(rows.batch([0]))
    assert isinstance(apart, GroupTargets)
    assert isinstance(together, GroupTargets)
    torch.testing.assert_close(
        together.logprob.sort().values, apart.logprob.sort().values, atol=1e-4, rtol=0
    )


def test_pieces_of_a_long_document_are_compared_from_their_first_common_boundary_on(
    student: Tokenizer, teacher: Tokenizer
) -> None:
    say = cross_tokenizer(target_logprob(model(teacher.vocab_size)), student, teacher)
    rows = pack_tokens([student.encode(TEXTS[2] * 4, bos=True, eos=True)], 13)
    said = say(rows.batch(range(rows.rows)))
    assert isinstance(said, GroupTargets)
    assert said.logprob.isfinite().all()
    grouped = (said.group >= 0).sum().item()
    assert grouped >= 0.6 * rows.manifest.targets


def test_only_whole_counted_groups_are_asked_for(student: Tokenizer, teacher: Tokenizer) -> None:
    say = cross_tokenizer(target_logprob(model(teacher.vocab_size)), student, teacher)
    plain = TokenBatch.of([student.encode(TEXTS[0], bos=True, eos=True)])
    every = say(plain)
    assert isinstance(every, GroupTargets)
    half = replace(plain, mask=plain.mask & (torch.arange(plain.shape[1]) >= 9))
    some = say(half)
    assert isinstance(some, GroupTargets)
    assert (some.group[~half.mask] == -1).all()
    kept = [g for g in groups_of(every, 0) if g[0] >= 9]
    assert groups_of(some, 0) == kept
    numbers = every.group[0, [g[0] for g in kept]]
    torch.testing.assert_close(some.logprob, every.logprob[numbers], atol=1e-5, rtol=0)


def test_where_nothing_counts_nothing_is_said(student: Tokenizer, teacher: Tokenizer) -> None:
    say = cross_tokenizer(target_logprob(model(teacher.vocab_size)), student, teacher)
    plain = TokenBatch.of([student.encode(TEXTS[0], bos=True)])
    silent = replace(plain, mask=torch.zeros_like(plain.mask))
    said = say(silent)
    assert isinstance(said, GroupTargets)
    assert len(said.logprob) == 0
    head = torch.zeros(student.vocab_size, 4, requires_grad=True)
    hidden = torch.zeros(*plain.shape, 4)
    loss = linear.distillation(LinearPrediction(hidden=hidden, head=head), said, silent)
    loss.total.backward()
    assert (loss.total.item(), loss.weight.item()) == (0.0, 0.0)
    assert head.grad is not None
    assert not head.grad.any()


def test_behind_bytes_that_are_no_text_nothing_is_compared(
    student: Tokenizer, teacher: Tokenizer
) -> None:
    say = cross_tokenizer(target_logprob(model(teacher.vocab_size)), student, teacher)
    good = student.encode("print values", bos=True)
    broken = next(n for n in range(student.vocab_size) if student.bytes_of(n) == b"\xff")
    rest = student.encode(" and more", eos=True)
    said = say(TokenBatch.of([[*good, broken, *rest]]))
    assert isinstance(said, GroupTargets)
    grouped = [place for group in groups_of(said, 0) for place in group]
    assert 0 < max(grouped) < len(good)


# --- enumeration on small vocabularies ---


NONE = ControlIds()


@dataclass(frozen=True)
class Spelled:
    """A tokenizer of a handful of tokens that cuts greedily: the longest first."""

    entries: tuple[bytes, ...]
    controls: ControlIds = NONE

    @property
    def vocab_size(self) -> int:
        return len(self.entries)

    def bytes_of(self, id_: int) -> bytes:
        return self.entries[id_]

    def is_control(self, id_: int) -> bool:
        return False

    def encode(self, text: str) -> list[int]:
        left, found = text.encode(), []
        while left:
            best = max((e for e in self.entries if left.startswith(e)), key=len)
            found.append(self.entries.index(best))
            left = left[len(best) :]
        return found


def table(prefix: Sequence[int], vocabulary: int) -> Tensor:
    """A distribution that depends on every token before."""
    seed = int.from_bytes(hashlib.sha256(str(list(prefix)).encode()).digest()[:4], "little")
    return torch.randn(vocabulary, generator=torch.Generator().manual_seed(seed)).double() * 1.5


class Tabled:
    """A policy out of `table`."""

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary

    def __call__(self, batch: TokenBatch, /) -> Any:
        rows = []
        for row in range(batch.shape[0]):
            for place in range(batch.shape[1]):
                own = batch.documents[row] == batch.documents[row, place]
                own &= torch.arange(batch.shape[1]) <= place
                rows.append(table(batch.tokens[row][own].tolist(), self.vocabulary))

        class Made:
            def logits(self, chosen: slice | Tensor, /) -> Tensor:
                return torch.stack(rows)[chosen]

        return Made()


def test_a_groups_probability_is_that_of_all_texts_that_begin_so() -> None:
    """P(group | before): the mass of all sequences that begin with both, over that of before."""
    mine, theirs = Spelled((b"a", b"b", b"ab", b"bab")), Spelled((b"a", b"b", b"ba", b"aba"))
    text = "ababbab"
    own, length = theirs.encode(text), 6
    prob = {
        ids: math.exp(
            sum(table(ids[:n], 4).log_softmax(-1)[ids[n]].item() for n in range(1, length))
        )
        for ids in product(range(4), repeat=length)
        if ids[0] == own[0]
    }
    assert sum(prob.values()) == pytest.approx(1.0)
    say: Any = cross_tokenizer(target_logprob(Tabled(4)), mine, theirs)  # type: ignore[arg-type]
    batch = TokenBatch.of([mine.encode(text)])
    said = say(batch)
    ends = {len(b"".join(theirs.entries[i] for i in own[:n])): n for n in range(len(own) + 1)}
    sizes = set()
    for places in groups_of(said, 0):
        ids = batch.tokens[0].tolist()
        begin = len(b"".join(mine.entries[i] for i in ids[: places[0] + 1]))
        end = len(b"".join(mine.entries[i] for i in ids[: places[-1] + 2]))
        before, after = tuple(own[: ends[begin]]), tuple(own[: ends[end]])
        of_before = sum(p for ids, p in prob.items() if ids[: len(before)] == before)
        of_both = sum(p for ids, p in prob.items() if ids[: len(after)] == after)
        number = said.group[0, places[0]]
        assert said.logprob[number].exp().item() == pytest.approx(of_both / of_before, rel=1e-5)
        sizes.add((len(places), len(after) - len(before)))
    assert any(max(size) > 1 for size in sizes)


# --- refusals ---


def test_a_tokenizer_whose_bytes_depend_on_neighbours_is_refused(student: Tokenizer) -> None:
    content = json.loads(student._json)
    content["decoder"] = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always"}
    odd = Tokenizer(json.dumps(content), student.controls, settings={})
    assert odd.bytes_of(0) is None
    with pytest.raises(TokenizerMismatch, match="the teacher's tokens depend on their neighbours"):
        cross_tokenizer(target_logprob(model(320)), student, odd)


def test_a_teacher_without_an_end_is_refused(student: Tokenizer) -> None:
    endless = Tokenizer(student._json, replace(student.controls, eos=None), settings={})
    with pytest.raises(TokenizerMismatch, match="has a eos token, the teacher's has none"):
        cross_tokenizer(target_logprob(model(320)), student, endless)


def test_a_text_that_has_nothing_in_common_is_refused(student: Tokenizer) -> None:
    unlike = Spelled((b"x", b"y"))
    mine = Spelled((b"x", b"y"))
    say = cross_tokenizer(target_logprob(Tabled(2)), mine, unlike)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="no group of tokens can be compared"):
        say(TokenBatch.of([[5, 6, 7]]))


def test_a_document_beyond_the_teachers_context_is_refused(
    student: Tokenizer, teacher: Tokenizer
) -> None:
    say = cross_tokenizer(target_logprob(model(360)), student, teacher, context=9)
    with pytest.raises(DataError, match="of the teacher's, which is made for 9"):
        say(TokenBatch.of([student.encode(TEXTS[0], bos=True)]))
