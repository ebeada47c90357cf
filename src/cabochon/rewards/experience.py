"""Experience: what a policy wrote for a micro-batch of prompts, and what that was worth.

    experience = draw(policy, prompts, reward, settings, key, 4, number=12, version=6)
    observe(experience)                              # RUN/rollouts, as RLDS episodes
    advantages = gains(experience.scores.total, "prompt")

Whatever learns from an experience finds all it needs in it: the tokens, the log-probability of each
when it was drawn, the version of the weights that drew it, the rewards and their parts. So a run
learns the same from its records, without sampler and reward, as it learned the first time.
"""

from __future__ import annotations

import warnings
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor

from cabochon.core import Backbone, Completion, Group, Key, RewardFn, TokenBatch
from cabochon.core.errors import DataError
from cabochon.data.rlds.layout import is_dataset
from cabochon.data.rlds.reader import Episodes
from cabochon.data.rlds.rollouts import Rollout, open_rollouts, rollouts_of, write_rollouts
from cabochon.data.rlds.writer import EpisodeWriter
from cabochon.data.tokenizer import Tokenizer
from cabochon.generation.engine import Settings, generate
from cabochon.losses.policy_gradient import leave_one_out, standardised
from cabochon.rewards.scores import Scores, scores

__all__ = [
    "Baseline",
    "Experience",
    "Observe",
    "Recorder",
    "continued",
    "draw",
    "gains",
    "recorded",
    "recorder",
    "replayed",
]

Baseline = Literal["prompt", "batch", "group_normalised", "none"]


@dataclass(frozen=True, kw_only=True)
class Experience:
    """Groups that one writer drew for one micro-batch, and their rewards."""

    number: int
    """Of the micro-batch in the run: update * accumulate + part."""
    groups: tuple[Group, ...]
    """P, of G completions each."""
    scores: Scores
    """P G."""
    version: int
    """Of the weights that drew them: how many updates those had."""
    versions: tuple[tuple[Tensor, ...], ...] = ()
    """P G tensors of T int64: the version that drew each token; empty where all are `version`."""
    writer: str = "policy"
    """Who drew them, where several do for one micro-batch (an anchor)."""
    judged: bool = True
    """False where there was no reward; the scores are then 0."""

    def to(self, device: torch.device | str) -> Experience:
        """The same with prompts, completions and scores on `device`."""
        groups = tuple(
            Group(
                prompt=group.prompt.to(device),
                completions=tuple(
                    Completion(
                        tokens=each.tokens.to(device),
                        logprob=each.logprob.to(device),
                        model_logprob=each.model_logprob.to(device),
                        stopped=each.stopped,
                    )
                    for each in group.completions
                ),
            )
            for group in self.groups
        )
        parts = {name: part.to(device) for name, part in self.scores.parts.items()}
        scores = Scores(total=self.scores.total.to(device), parts=parts)
        return replace(self, groups=groups, scores=scores)

    @property
    def token_versions(self) -> tuple[tuple[Tensor, ...], ...]:
        """P G tensors of T int64: the version of the weights that drew each token."""
        return self.versions or tuple(
            tuple(torch.full_like(each.tokens, self.version) for each in group.completions)
            for group in self.groups
        )


Observe = Callable[[Experience], None]
"""Is shown every experience before anything is learned from it."""


def draw(
    model: Backbone,
    prompts: Sequence[Tensor],
    reward: RewardFn,
    settings: Settings,
    key: Key,
    samples: int,
    *,
    number: int,
    version: int,
    writer: str = "policy",
    indices: Sequence[int] | None = None,
) -> Experience:
    """`samples` completions of each prompt, drawn from the model as it is now and judged.

    Args:
        model: who writes.
        prompts: T int64 each.
        reward: of whole groups.
        settings: how is drawn.
        key: a draw depends on (key, prompt's index, sample, position) alone.
        samples: G.
        number: of the micro-batch in the run.
        version: how many updates the model has had.
        writer: recorded beside it.
        indices: of the prompts in the key, see `generate`.

    Raises:
        DataError: a prompt cannot be continued; or the reward failed, see `scores`.
        NonFinite: logits from which nothing can be drawn, or a reward that is no number.
    """
    groups = tuple(generate(model, prompts, settings, key, samples, indices=indices))
    return Experience(
        number=number,
        groups=groups,
        scores=scores(reward, groups),
        version=version,
        writer=writer,
    )


def gains(rewards: Tensor, baseline: Baseline) -> Tensor:
    """What each reward is above its baseline; exactly 0 where all that are compared are equal.

    prompt            the mean of the prompt's other samples (RLOO)
    batch             the mean of all other samples of the micro-batch
    group_normalised  the mean of the prompt's samples, itself included; the difference is then
                      divided by their standard deviation (GRPO)
    none              0: the reward itself

    Args:
        rewards: P G float32.
        baseline: one of these.
    """
    if baseline == "none":
        return rewards
    if baseline == "group_normalised":
        return standardised(rewards)
    compared = rewards if baseline == "prompt" else rewards.flatten()
    return leave_one_out(compared).view_as(rewards)


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
        for rollout in _rollouts(experience):
            known = self._known.pop((rollout.batch, rollout.writer, rollout.place), None)
            if known is None:
                write_rollouts(self._writer, [replace(rollout, number=self._count)])
                self._count += 1
            elif not _same(known, rollout):
                self._say_unlike(rollout)

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


def continued(
    recalled: Iterable[Experience],
    draw: Callable[[Iterable[TokenBatch], int], Iterator[Experience]],
    batches: Iterable[TokenBatch],
    *,
    start: int,
    accumulate: int,
    writers: int = 1,
) -> Iterator[Experience]:
    """What an interrupted run had drawn beyond its checkpoint, then what is drawn now.

    The weights that drew the first may be gone, so it could not be drawn again as it was.

    Args:
        recalled: as `Recorder.recalled` gives it from the first micro-batch of step `start` on.
        draw: micro-batches from the first of a step on, and that step -> experiences.
        batches: micro-batches from the first of step `start` on.
        start: how many steps were already made.
        accumulate: micro-batches of a step.
        writers: how many experiences there are of each micro-batch, one behind the other; of an
            incomplete last micro-batch all are drawn again.
    """
    count, held = 0, list[Experience]()
    for each in recalled:
        held.append(each)
        if len(held) == writers:
            yield from held
            count, held = count + 1, []
    step, part = divmod(start * accumulate + count, accumulate)
    due = islice(batches, (step - start) * accumulate, None)
    yield from islice(draw(due, step), part * writers, None)


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
    """
    episodes = Episodes(folder, _split(rank))
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
