"""A teacher on disk says what the teacher said, of this text alone, or says that it cannot."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from cabochon.core import Key, Policy, Prediction, TokenBatch
from cabochon.core.errors import ConfigError, DataError, FolderError, TokenizerMismatch
from cabochon.core.types import SampledTargets, TopKTargets
from cabochon.data.chat import ChatTokens
from cabochon.data.packed import Packed
from cabochon.data.packing import pack_chats, pack_tokens
from cabochon.data.teacher_cache import (
    MAKING,
    MANIFEST,
    CacheIdentity,
    CacheManifest,
    TeacherCache,
    is_teacher_cache,
    restored,
)
from cabochon.data.teacher_cache_writing import text_sha256, write_cache
from cabochon.data.truncation import sampled, top_k
from cabochon.models.gemma.config import GemmaConfig
from cabochon.models.gemma.decoder import Gemma

V = 37
CONFIG = GemmaConfig(
    vocab_size=V, width=16, layers=2, heads=2, kv_heads=1, head_width=8, ffn_width=24,
    query_scalar=8, window=6, attention_cap=5.0, final_cap=8.0, post_norms=True, context=32,
)  # fmt: skip
Form = Literal["top_k", "sampled"]


def teacher() -> Gemma:
    model = Gemma(CONFIG, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            drawn = torch.randn(weight.shape, generator=Key(5).fold(name).generator())
            weight.copy_(drawn * (0.3 if weight.ndim == 1 else 2.0 / weight.shape[-1] ** 0.5))
    return model.requires_grad_(False)


def texts(count: int = 14, *name: str) -> list[list[int]]:
    random = Key(6, name).numpy()
    return [random.integers(3, V, random.integers(2, 30)).tolist() for _ in range(count)]


def packed(context: int = 16, count: int = 14) -> Packed:
    return pack_tokens(texts(count), context, tokenizer="T" * 64)


def identity(rows: Packed, form: Form = "top_k", width: int = 5, **changes: Any) -> CacheIdentity:
    plain = CacheIdentity(
        form=form, width=width, seed=0, dtype="float32", vocabulary=V, tokenizer="T" * 64,
        teacher={"model.safetensors": "M" * 64}, text=text_sha256([rows]), making={},
    )  # fmt: skip
    return replace(plain, **changes)


def cached(folder: Path, rows: Packed, *, said: Any = None, **how: Any) -> TeacherCache:
    write_cache(folder, identity(rows, **how), said or teacher(), [rows], batch_size=2)
    return TeacherCache.open(folder)


def every_row(rows: Packed) -> TokenBatch:
    return rows.batch(range(rows.rows))


def agree(found: TopKTargets, expected: TopKTargets, mask: Tensor, atol: float = 1e-6) -> None:
    """The same numbers, where ties may change the order of ids."""
    dense = []
    for said in (found, expected):
        row = torch.full((*mask.shape, V + 1), -math.inf)
        row.scatter_(-1, said.ids.where(said.ids >= 0, torch.tensor(V)), said.logprob)
        dense.append(row[..., :V][mask].exp())
    torch.testing.assert_close(*dense, atol=atol, rtol=0)
    torch.testing.assert_close(found.tail[mask].exp(), expected.tail[mask].exp(), atol=atol, rtol=0)


# --- the same numbers ---


@pytest.mark.parametrize("k", [1, 5, V])
def test_it_says_what_the_teacher_says_in_process(tmp_path: Path, k: int) -> None:
    rows = packed()
    cache = cached(tmp_path / "cache", rows, width=k)
    batch = every_row(rows)
    found = cache(batch)
    assert isinstance(found, TopKTargets)
    agree(found, top_k(teacher(), k)(batch), batch.mask)
    assert torch.equal(found.tail.isnan(), ~batch.mask)
    assert (found.ids[~batch.mask] == -1).all()


def test_packing_order_and_shape_of_the_batch_do_not_matter(tmp_path: Path) -> None:
    sequences = texts()
    cache = cached(tmp_path / "cache", pack_tokens(sequences, 32))
    for length in (30, 61):
        other = TokenBatch.of(sequences[::-1], left=length % 2 == 0)
        agree(cache(other), top_k(teacher(), 5)(other), other.mask, atol=1e-5)
    repacked = every_row(pack_tokens(sequences[3:9], 64))
    agree(cache(repacked), top_k(teacher(), 5)(repacked), repacked.mask, atol=1e-5)


def test_draws_are_those_of_the_teacher_in_process_with_the_same_key(tmp_path: Path) -> None:
    rows = packed()
    cache = cached(tmp_path / "cache", rows, form="sampled", width=9, seed=4)
    batch = every_row(rows)
    found = cache(batch)
    assert isinstance(found, SampledTargets)
    said = sampled(teacher(), 9, Key(4, ("teacher",)))(batch)
    assert torch.equal(found.ids[batch.mask], said.ids[batch.mask])
    torch.testing.assert_close(found.share[batch.mask], said.share[batch.mask])
    assert torch.equal(found.share.sum(-1) > 0.5, batch.mask)


def test_a_teacher_that_says_its_likeliest_tokens_alone_is_cached_too(tmp_path: Path) -> None:
    rows = packed()
    direct = cached(tmp_path / "whole", rows)
    told = cached(tmp_path / "told", rows, said=top_k(teacher(), 5))
    agree(told(every_row(rows)), direct(every_row(rows)), every_row(rows).mask)
    assert told.manifest.losses.uneven >= direct.manifest.losses.uneven
    with pytest.raises(ConfigError, match="nothing can be drawn"):
        cached(tmp_path / "drawn", rows, said=top_k(teacher(), 5), form="sampled")
    with pytest.raises(ConfigError, match="says 4 tokens, not 5"):
        cached(tmp_path / "fewer", rows, said=top_k(teacher(), 4))


def test_float16_rounds_by_no_more_than_it_says(tmp_path: Path) -> None:
    rows = packed()
    exact = cached(tmp_path / "exact", rows)
    half = cached(tmp_path / "half", rows, dtype="float16")
    batch = every_row(rows)
    found, expected = half(batch), exact(batch)
    assert isinstance(found, TopKTargets)
    assert isinstance(expected, TopKTargets)
    assert torch.equal(found.ids, expected.ids)
    assert torch.equal(found.tail[batch.mask], expected.tail[batch.mask])
    mass = found.logprob.exp().sum(-1) + found.tail.exp()
    torch.testing.assert_close(mass[batch.mask], torch.ones(int(batch.mask.sum())))
    difference = (found.logprob.exp() - expected.logprob.exp()).abs().sum(-1)[batch.mask]
    assert half.manifest.losses.rounding == pytest.approx(difference.mean().item(), rel=1e-3)
    assert 0 < half.manifest.losses.rounding < 2e-3
    assert exact.manifest.losses.rounding == 0.0


def test_restoring_leaves_silence_and_whole_distributions_alone() -> None:
    logprob = torch.tensor([[[-math.inf, -math.inf], [math.log(0.25), math.log(0.75)]]])
    tail = torch.tensor([[math.nan, -math.inf]])
    assert torch.equal(restored(logprob, tail)[0, 0], logprob[0, 0])
    torch.testing.assert_close(restored(logprob, tail)[0, 1], logprob[0, 1])


def test_the_stated_losses_are_those_of_the_text(tmp_path: Path) -> None:
    rows = packed()
    losses = cached(tmp_path / "cache", rows).manifest.losses
    batch = every_row(rows)
    law = teacher()(batch).logits(batch.mask.flatten().nonzero().squeeze(1)).log_softmax(-1)
    kept, ids = law.topk(5)
    mass = 1 - kept.exp().sum(-1)
    assert losses.tail == pytest.approx(mass.mean().item(), rel=1e-4)
    assert losses.largest_tail == pytest.approx(mass.max().item(), rel=1e-4)
    even = law.scatter(-1, ids, -math.inf)
    uneven = (even.exp() * (even - (mass / (V - 5)).log()[:, None]).nan_to_num(neginf=0)).sum(-1)
    assert losses.uneven == pytest.approx(uneven.mean().item(), rel=1e-3)
    assert losses.kl_bound(2.0) == pytest.approx(losses.uneven + 2.0 * losses.tail)


# --- which positions ---


def chats() -> Packed:
    random = Key(7).numpy()
    made = []
    for length in (9, 12, 7, 15):
        ids = tuple(random.integers(3, V, length).tolist())
        mask = tuple(place >= length // 2 for place in range(length))
        made.append(ChatTokens(ids=ids, mask=mask, roles=(None,) * length))
    return pack_chats(made, 16, tokenizer="T" * 64)


def test_of_conversations_only_what_is_learned_is_stored(tmp_path: Path) -> None:
    rows = chats()
    cache = cached(tmp_path / "cache", rows)
    batch = every_row(rows)
    assert cache.manifest.positions == int(batch.mask.sum()) < int((batch.documents >= 0).sum())
    agree(cache(batch), top_k(teacher(), 5)(batch), batch.mask)
    every = replace(batch, mask=(batch.documents >= 0))
    with pytest.raises(DataError, match="not at every position that is to be learned"):
        cache(every)


def test_less_may_be_asked_than_is_stored(tmp_path: Path) -> None:
    rows = packed()
    cache = cached(tmp_path / "cache", rows)
    batch = every_row(rows)
    half = replace(batch, mask=batch.mask & (torch.arange(16) % 2 == 0))
    found = cache(half)
    agree(found, top_k(teacher(), 5)(half), half.mask)
    assert torch.equal(found.tail.isnan(), ~half.mask)


def test_a_document_that_comes_twice_is_stored_once(tmp_path: Path) -> None:
    sequences = texts(5)
    once = cached(tmp_path / "once", pack_tokens(sequences, 32))
    twice = cached(tmp_path / "twice", pack_tokens([*sequences, *sequences], 32))
    assert twice.manifest.documents == once.manifest.documents == 5


# --- refusals ---


def test_a_document_that_is_not_there_is_refused(tmp_path: Path) -> None:
    rows = packed()
    cache = cached(tmp_path / "cache", rows)
    other = TokenBatch.of(texts(2, "other"))
    with pytest.raises(DataError, match=r"in row 0 of the batch is not in the teacher cache"):
        cache(other)
    with pytest.raises(DataError, match=r"in row \d+ of corpus is not in the teacher cache"):
        cache.check_covers(pack_tokens(texts(), 11), "corpus")
    cache.check_covers(rows)


def test_another_tokenizer_or_teacher_is_refused(tmp_path: Path) -> None:
    cache = cached(tmp_path / "cache", packed())
    cache.check_tokenizer("T" * 64)
    with pytest.raises(TokenizerMismatch, match="UUUUUUUUUUUU"):
        cache.check_tokenizer("U" * 64)
    cache.check_teacher({"model.safetensors": "M" * 64}, "runs/teacher")
    with pytest.raises(
        DataError, match=r"than runs/teacher: config.json, model.safetensors differ"
    ):
        cache.check_teacher({"model.safetensors": "N" * 64, "config.json": "C"}, "runs/teacher")


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 7)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


@pytest.mark.parametrize(
    ("harm", "says"), [(cut, "cut short"), (flip, "damaged"), (lengthen, "longer than it was")]
)
def test_a_harmed_shard_is_found_and_named(
    tmp_path: Path, harm: Callable[[Path], None], says: str
) -> None:
    rows = packed(count=40)
    write_cache(tmp_path / "cache", identity(rows), teacher(), [rows], batch_size=2, shard_bytes=1)
    harm(tmp_path / "cache" / "shard-00003.safetensors")
    with pytest.raises(DataError, match=rf"shard-00003.safetensors is {says}"):
        TeacherCache.open(tmp_path / "cache")


def test_a_missing_shard_or_a_changed_manifest_is_found(tmp_path: Path) -> None:
    cached(tmp_path / "cache", packed())
    manifest = tmp_path / "cache" / MANIFEST
    text = manifest.read_text()
    manifest.write_text(text.replace('"width": 5', '"width": 6'))
    with pytest.raises(DataError, match="not what was written"):
        TeacherCache.open(tmp_path / "cache")
    manifest.write_text(text[: len(text) // 2])
    with pytest.raises(DataError, match=r"manifest.json is damaged"):
        TeacherCache.open(tmp_path / "cache")
    manifest.write_text(text)
    (tmp_path / "cache" / "shard-00000.safetensors").unlink()
    with pytest.raises(FolderError, match=r"lacks shard-00000.safetensors"):
        TeacherCache.open(tmp_path / "cache")


@pytest.mark.parametrize("width", [0, V + 1])
def test_a_width_that_cannot_be_is_refused(width: int) -> None:
    with pytest.raises(ConfigError, match="top_k must lie in 1 to 37"):
        identity(packed(), width=width)


def test_another_vocabulary_than_the_teachers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="predicts 37 tokens, the cache is for 40"):
        cached(tmp_path / "cache", packed(), vocabulary=40)


# --- interruptions ---


class Interrupted(Exception):
    pass


def after(batches: int) -> Policy:
    """The teacher, for so many batches."""
    left = [batches]
    model = teacher()

    def say(batch: TokenBatch) -> Prediction:
        if left[0] == 0:
            raise Interrupted
        left[0] -= 1
        prediction: Prediction = model(batch)
        return prediction

    return say


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("form", ["top_k", "sampled"])
def test_an_interrupted_cache_goes_on_bit_for_bit(tmp_path: Path, form: Form) -> None:
    rows = packed(count=40)
    how: dict[str, Any] = {"batch_size": 2, "shard_bytes": 1}
    write_cache(tmp_path / "straight", identity(rows, form), teacher(), [rows], **how)
    broken = tmp_path / "broken"
    for batches in (0, 3, 1):
        with pytest.raises(Interrupted):
            write_cache(broken, identity(rows, form), after(batches), [rows], **how)
        assert is_teacher_cache(broken)
        with pytest.raises(FolderError, match="is not finished"):
            TeacherCache.open(broken)
    assert (broken / MAKING).is_file()
    write_cache(broken, identity(rows, form), teacher(), [rows], **how)
    assert content(broken) == content(tmp_path / "straight")
    assert len(content(broken)) > 5


def test_what_came_before_an_interruption_is_not_stored_again(tmp_path: Path) -> None:
    rows, folder = packed(), tmp_path / "cache"
    how: dict[str, Any] = {"batch_size": 2, "shard_bytes": 1}
    parts = [rows, rows]
    straight = write_cache(tmp_path / "straight", identity(rows), teacher(), parts, **how)
    with pytest.raises(Interrupted):
        write_cache(folder, identity(rows), after(2), parts, **how)
    assert write_cache(folder, identity(rows), teacher(), parts, **how) == straight
    assert content(folder) == content(tmp_path / "straight")
    alone = write_cache(tmp_path / "alone", identity(rows), teacher(), [rows], **how)
    assert straight.documents == alone.documents


def test_a_finished_cache_is_left_as_it_is(tmp_path: Path) -> None:
    rows = packed()
    cache = cached(tmp_path / "cache", rows)
    before = content(tmp_path / "cache")
    again = write_cache(tmp_path / "cache", identity(rows), after(0), [rows], batch_size=2)
    assert again == cache.manifest
    assert content(tmp_path / "cache") == before


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"teacher": {"model.safetensors": "N" * 64}}, "teacher"),
        ({"tokenizer": "U" * 64}, "tokenizer"),
        ({"text": "X" * 64}, "text"),
        ({"width": 6}, "width"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_what_was_begun_otherwise_is_not_gone_on_with(
    tmp_path: Path, changes: dict[str, Any], says: str, finished: bool
) -> None:
    rows, folder = packed(), tmp_path / "cache"
    if finished:
        cached(folder, rows)
    else:
        with pytest.raises(Interrupted):
            write_cache(folder, identity(rows), after(1), [rows], batch_size=2)
    with pytest.raises(DataError, match=rf"begun as another teacher cache \({says}: "):
        write_cache(folder, identity(rows, **changes), teacher(), [rows], batch_size=2)


def test_a_folder_with_something_else_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(FolderError, match="is no teacher cache"):
        cached(tmp_path, packed())


KILLED = """
import sys, test_teacher_cache as t, pathlib, os, signal
from cabochon.data.teacher_cache_writing import write_cache
rows, left = t.packed(count=40), [int(sys.argv[2])]
model = t.teacher()
def say(batch):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return model(batch)
write_cache(pathlib.Path(sys.argv[1]), t.identity(rows), say, [rows], batch_size=2, shard_bytes=1)
"""


def test_kill_9_leaves_a_cache_that_goes_on(tmp_path: Path) -> None:
    rows, folder = packed(count=40), tmp_path / "killed"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(folder), "4"], cwd=Path(__file__).parent, check=False
    )
    assert done.returncode == -signal.SIGKILL
    assert len(list(folder.glob("shard-*"))) == 4
    for place in (folder, tmp_path / "straight"):
        write_cache(place, identity(rows), teacher(), [rows], batch_size=2, shard_bytes=1)
    assert content(folder) == content(tmp_path / "straight")


def test_a_cut_shard_of_an_unfinished_cache_is_found(tmp_path: Path) -> None:
    rows, folder = packed(count=40), tmp_path / "cache"
    with pytest.raises(Interrupted):
        write_cache(folder, identity(rows), after(3), [rows], batch_size=2, shard_bytes=1)
    cut(folder / "shard-00001.safetensors")
    with pytest.raises(DataError, match=r"shard-00001.safetensors is damaged or cut short"):
        write_cache(folder, identity(rows), teacher(), [rows], batch_size=2, shard_bytes=1)


def test_the_manifest_comes_back_as_it_was_written(tmp_path: Path) -> None:
    cache = cached(tmp_path / "cache", packed())
    assert CacheManifest.read(tmp_path / "cache" / MANIFEST) == cache.manifest
    assert json.loads((tmp_path / "cache" / MANIFEST).read_text())["positions"] > 0


def test_several_parts_are_one_cache(tmp_path: Path) -> None:
    parts = [pack_tokens(texts(6), 16), pack_tokens(texts(6, "more"), 24)]
    whole = identity(parts[0], text=text_sha256(parts))
    write_cache(tmp_path / "cache", whole, teacher(), parts, batch_size=2)
    cache = TeacherCache.open(tmp_path / "cache")
    for part in parts:
        cache.check_covers(part)
    assert cache.manifest.positions == sum(part.manifest.targets for part in parts)


def test_only_one_shard_is_in_memory_at_a_time(tmp_path: Path) -> None:
    rows = packed(count=60)
    write_cache(tmp_path / "c", identity(rows), teacher(), [rows], batch_size=2, shard_bytes=1)
    files = sorted((tmp_path / "c").glob("shard-*"))
    assert len(files) == math.ceil(rows.rows / 2)
    assert isinstance(TeacherCache.open(tmp_path / "c")._shards[0]["ids"], np.memmap)
