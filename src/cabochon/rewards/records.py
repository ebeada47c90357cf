"""RUN/rollouts: experience as RLDS episodes, written once, and read again as it was observed."""

from __future__ import annotations

import warnings
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from cabochon.core.errors import DataError
from cabochon.data.rlds.layout import is_dataset, read_notes
from cabochon.data.rlds.reader import Episodes
from cabochon.data.rlds.rollouts import (
    KIND,
    Rollout,
    open_rollouts,
    rollouts_of,
    write_rollouts,
)
from cabochon.data.rlds.writer import EpisodeWriter
from cabochon.data.tokenizer import Tokenizer
from cabochon.rewards.experience import Experience
from cabochon.rewards.scores import Scores

__all__ = ["Recorder", "recorded", "recorder", "replayed"]


class Recorder:
    """Writes experiences as RLDS episodes; close it, or use it in a `with` block.

    Nothing that was observed is lost when the process is killed. A run that goes on from a
    checkpoint observes some experiences for the second time: those are compared with what is
    there, and not written twice. Under torch.distributed each rank writes a split of its own.

    Args:
        folder: of the dataset; made with the first experience.
        tokenizer: that the ids are of.
        notes: plain JSON that says how was drawn.
        split: which one to write.
    """

    def __init__(
        self, folder: Path, tokenizer: Tokenizer, notes: Mapping[str, Any], split: str
    ) -> None:
        self.folder, self.split = folder, split
        self._tokenizer, self._notes = tokenizer.fingerprint(), dict(notes)
        self._writer: EpisodeWriter | None = None
        self._known: dict[tuple[int, str, int], Rollout] = {}
        self._count = 0
        self._unlike = False

    def __call__(self, experience: Experience) -> None:
        """Records it.

        Raises:
            DataError: what is recorded of it already is something else, and it was drawn on a CPU,
                where it should not be.
        """
        if self._writer is None:
            self._writer = self._open(experience.number)
        new = list[Rollout]()
        for rollout in _rollouts(experience):
            known = self._known.pop((rollout.batch, rollout.writer, rollout.place), None)
            if known is None:
                new.append(replace(rollout, number=self._count + len(new)))
            elif not _same(known, rollout):
                self._say_unlike(rollout)
        write_rollouts(self._writer, new)
        self._count += len(new)

    def recalled(self, first: int) -> Iterator[Experience]:
        """What a killed process recorded from micro-batch `first` on, whole ones in a row.

        A run that goes on from a checkpoint learns from these instead of drawing them again, which
        costs less and, where sums differ from run to run, could not give the same. They end where
        a micro-batch is missing: one in which nobody drew anything, or that was not written whole.
        """
        if self._writer is None and is_dataset(self.folder):
            self._writer = self._open(first)
        if self._writer is None:
            return iter(())
        return _unbroken(self.folder, first, self.split, refuse_gaps=False)

    def close(self) -> None:
        """Closes the last shard. Closing twice does nothing."""
        if self._writer is not None:
            self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _say_unlike(self, rollout: Rollout) -> None:
        """What was drawn now is not what was recorded; elsewhere than on a CPU that may be."""
        what = (
            f"{self.folder} holds other completions or rewards for prompt {rollout.place} of "
            f"micro-batch {rollout.batch} than were drawn now"
        )
        if rollout.group.prompt.device.type == "cpu":
            raise DataError(
                f"{what}; the run went on with another reward, or on another machine: begin again "
                "in another folder"
            )
        if not self._unlike:
            warnings.warn(
                f"{what}: sums differ from run to run on this device; the records keep what was "
                "drawn first",
                stacklevel=3,
            )
        self._unlike = True

    def _open(self, first: int) -> EpisodeWriter:
        """The writer, after what is recorded from micro-batch `first` on was read."""
        there = is_dataset(self.folder)
        writer = open_rollouts(
            self.folder,
            tokenizer=self._tokenizer,
            split=self.split,
            append=there,
            notes=self._notes,
        )
        if there:
            episodes = Episodes(self.folder, self.split)
            for rollout in _from(episodes, first):
                self._known[rollout.batch, rollout.writer, rollout.place] = rollout
            self._count = _groups(episodes)
        return writer


def recorder(
    folder: Path,
    tokenizer: Tokenizer,
    *,
    notes: Mapping[str, Any] | None = None,
    rank: int = 0,
) -> Recorder:
    """An `Observe` that writes RUN/rollouts, see `Recorder`.

    Args:
        folder: RUN/rollouts.
        tokenizer: that the ids are of.
        notes: plain JSON about the run for the dataset's `cabochon.json`.
        rank: of this process, where several train together.
    """
    return Recorder(folder, tokenizer, notes or {}, _split(rank))


def replayed(
    folder: Path,
    start: int,
    *,
    writer: str | None = None,
    rank: int = 0,
    split: str = "",
) -> Iterator[Experience]:
    """The recorded experiences from micro-batch `start` on, in their order.

    Args:
        folder: a run's `rollouts`.
        start: the first micro-batch.
        writer: only those of this writer.
        rank: of this process, where several train together.
        split: instead of that of the rank.

    Raises:
        FolderError: there are no records.
        DataError: the records are damaged, or some are missing between two micro-batches.
    """
    found = _unbroken(folder, start, split or _split(rank), refuse_gaps=True)
    return (each for each in found if writer is None or each.writer == writer)


def _unbroken(folder: Path, start: int, split: str, *, refuse_gaps: bool) -> Iterator[Experience]:
    """The experiences from micro-batch `start` on, whole ones in a row."""
    expected = start
    rollouts = _from(Episodes(folder, split), start)
    for (number, who), found in groupby(rollouts, lambda each: (each.batch, each.writer)):
        group = list(found)
        if number > expected:
            if not refuse_gaps:
                return
            raise DataError(
                f"{folder} has no record of micro-batch {expected}, but of {number}; it cannot be "
                "replayed from there on"
            )
        if [each.place for each in group] != list(range(group[0].places)):
            return  # the process that wrote it was killed there
        expected = number + 1
        yield _experience(number, who, group)


def recorded(folder: Path, *, rank: int = 0) -> int:
    """How many micro-batches are recorded, the last of them perhaps not whole.

    Raises:
        FolderError: there are no records.
        DataError: the episodes are no language rollouts.
    """
    episodes = Episodes(folder, _split(rank))
    kind = read_notes(folder).get("kind")
    if kind != KIND:
        raise DataError(
            f"{folder} holds episodes of kind {kind!r}, expected {KIND!r} (cabochon.json); name a "
            "run of a language model that recorded its rollouts"
        )
    return int(episodes[-1].metadata["batch"]) + 1 if len(episodes) else 0


def _split(rank: int) -> str:
    return f"rank_{rank}" if rank else "train"


def _rollouts(experience: Experience) -> Iterator[Rollout]:
    scores, versions = experience.scores, experience.token_versions
    for place, group in enumerate(experience.groups):
        yield Rollout(
            number=place,
            group=group,
            versions=versions[place],
            rewards=scores.total[place] if experience.judged else None,
            parts={name: part[place] for name, part in scores.parts.items()},
            batch=experience.number,
            place=place,
            places=len(experience.groups),
            writer=experience.writer,
        )


def _experience(number: int, writer: str, found: Sequence[Rollout]) -> Experience:
    versions = tuple(each.versions for each in found)
    flat = torch.cat([each for group in versions for each in group])
    rewards = [each.rewards for each in found if each.rewards is not None]
    shape = (len(found), len(found[0].group.completions))
    return Experience(
        number=number,
        groups=tuple(each.group for each in found),
        scores=Scores(
            total=torch.stack(rewards) if rewards else torch.zeros(shape),
            parts={
                name: torch.stack([each.parts[name] for each in found]) for name in found[0].parts
            },
        ),
        version=int(flat.max()),
        versions=versions if bool((flat != flat.max()).any()) else (),
        writer=writer,
        judged=bool(rewards),
    )


def _from(episodes: Episodes, batch: int) -> Iterator[Rollout]:
    """The rollouts from the first of micro-batch `batch` on; found by halving."""
    first = bisect_left(episodes, batch, key=lambda each: int(each.metadata["batch"]))
    return rollouts_of((episodes[n] for n in range(first, len(episodes))), skip_incomplete=True)


def _groups(episodes: Episodes) -> int:
    """One more than the number of the last group."""
    return int(episodes[-1].metadata["group"]) + 1 if len(episodes) else 0


def _same(one: Rollout, other: Rollout) -> bool:
    def tensors(each: Rollout) -> list[Tensor]:
        found = [each.group.prompt, *each.versions, *each.parts.values()]
        found += [] if each.rewards is None else [each.rewards]
        for completion in each.group.completions:
            found += [completion.tokens, completion.logprob]
        return found

    pairs = zip(tensors(one), tensors(other), strict=False)
    alike = len(tensors(one)) == len(tensors(other)) and one.parts.keys() == other.parts.keys()
    return alike and all(torch.equal(a.cpu(), b.cpu()) for a, b in pairs)
