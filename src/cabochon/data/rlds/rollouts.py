"""What a language model wrote, as episodes whose actions are tokens, and back without loss.

Every completion of a prompt is one episode: step t holds the newest token of the context as its
observation (the prompt's last one, then what was just written), the token drawn as its action, the
log-probabilities of that draw, and the version of the weights that drew it: one request can outlive
an update. The reward comes with the last token. A stop token ends the episode; the length limit
cuts it short. The prompt is metadata, so a step costs a few bytes; so are the parts of the reward.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import torch
from torch import Tensor

from cabochon.core.errors import DataError
from cabochon.core.types import Completion, Group
from cabochon.data.rlds.reader import Episodes
from cabochon.data.rlds.records import Episode, episode_of
from cabochon.data.rlds.shards import ShardFormat
from cabochon.data.rlds.writer import EpisodeWriter

__all__ = [
    "KIND",
    "Rollout",
    "episodes_of",
    "open_rollouts",
    "read_rollouts",
    "rollouts_of",
    "write_rollouts",
]

KIND = "language rollouts"
"""What `cabochon.json` says of such a dataset."""


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """A prompt with its completions, and what is known of how they were drawn and judged."""

    number: int
    """Of the prompt within the run, so that its completions are found together."""
    group: Group
    versions: tuple[Tensor, ...]
    """For each completion, T int64: which weights drew each token."""
    rewards: Tensor | None = None
    """G float32, one for each completion; None if none were given."""
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    """Name -> G float32 or float64: what the rewards are made of."""
    batch: int = 0
    """Of the micro-batch of the run that it was drawn for."""
    place: int = 0
    """Of the prompt among those of its micro-batch and writer."""
    places: int = 1
    """How many prompts those are."""
    writer: str = "policy"
    """Who drew it, where several do for one micro-batch."""


def episodes_of(rollout: Rollout) -> list[Episode]:
    """G episodes.

    Raises:
        DataError: a tensor is of another type or length than its record says, or a completion is
            empty.
    """
    count = len(rollout.group.completions)
    _expect("the prompt", rollout.group.prompt, torch.int64, len(rollout.group.prompt))
    if len(rollout.versions) != count:
        raise DataError(f"{count} completions, but versions of {len(rollout.versions)}")
    if rollout.rewards is not None:
        _expect("rewards", rollout.rewards, torch.float32, count)
    for name, part in rollout.parts.items():
        dtype = torch.float64 if part.dtype == torch.float64 else torch.float32
        _expect(f"the reward's part {name}", part, dtype, count)
    return [_episode(rollout, sample) for sample in range(count)]


def rollouts_of(episodes: Iterable[Episode], *, skip_incomplete: bool = False) -> Iterator[Rollout]:
    """The groups that episodes were, in their order.

    Args:
        episodes: as `episodes_of` made them, those of one group one behind the other.
        skip_incomplete: leave out groups of which episodes are missing, as a killed process may
            leave one.

    Raises:
        DataError: a group is not complete, or the episodes are none of language rollouts.
    """
    waiting: list[Episode] = []
    for episode in episodes:
        if "prompt" not in episode.metadata or "logprob" not in episode.steps:
            raise DataError("the episode has no prompt and log-probabilities: no language rollout")
        if waiting and (_group(episode) != _group(waiting[0]) or _sample(episode) == 0):
            _refuse(waiting, skip_incomplete)
            waiting = []
        waiting.append(episode)
        if [_sample(each) for each in waiting] != list(range(len(waiting))):
            _refuse(waiting, skip_incomplete)
            waiting = []
        elif len(waiting) == int(episode.metadata["samples"]):
            yield _rollout(waiting)
            waiting = []
    if waiting:
        _refuse(waiting, skip_incomplete)


def open_rollouts(
    folder: str | Path,
    *,
    tokenizer: str,
    split: str = "train",
    format: ShardFormat | None = None,
    append: bool = False,
    notes: Mapping[str, Any] | None = None,
) -> EpisodeWriter:
    """A writer for a dataset of rollouts.

    Args:
        folder: the dataset's.
        tokenizer: fingerprint of the tokenizer that the ids are of.
        split: which split to write.
        format: of the shards.
        append: go on where a dataset is.
        notes: further plain JSON for `cabochon.json`: how was drawn, of which run.

    Raises:
        DataError: as `EpisodeWriter`; also if the dataset there is of another tokenizer or run.
    """
    said = {"kind": KIND, "tokenizer": tokenizer, **(notes or {})}
    return EpisodeWriter(
        folder, name="rollouts", split=split, format=format, append=append, notes=said
    )


def write_rollouts(writer: EpisodeWriter, rollouts: Iterable[Rollout]) -> None:
    """Adds groups; a process that is killed leaves all of them, or none."""
    writer.write_all([episode for rollout in rollouts for episode in episodes_of(rollout)])


def read_rollouts(
    path: str | Path, split: str = "train", *, skip_incomplete: bool = False
) -> Iterator[Rollout]:
    """The rollouts of a dataset, streamed."""
    return rollouts_of(Episodes(path, split), skip_incomplete=skip_incomplete)


def _episode(rollout: Rollout, sample: int) -> Episode:
    prompt, completion = rollout.group.prompt, rollout.group.completions[sample]
    version = rollout.versions[sample]
    length = len(completion.tokens)
    if length == 0:
        raise DataError(f"completion {sample} of prompt {rollout.number} has no token")
    where = f"of completion {sample}"
    _expect(f"tokens {where}", completion.tokens, torch.int64, length)
    _expect(f"logprob {where}", completion.logprob, torch.float32, length)
    _expect(f"model_logprob {where}", completion.model_logprob, torch.float32, length)
    _expect(f"versions {where}", version, torch.int64, length)
    tokens = _numpy(completion.tokens)
    begin = int(prompt[-1]) if len(prompt) else -1
    rewards = np.zeros(length, np.float32)
    if rollout.rewards is not None:
        rewards[-1] = _numpy(rollout.rewards)[sample]
    return episode_of(
        observations={"token": np.concatenate([[begin], tokens])},
        actions=tokens,
        rewards=rewards,
        terminated=completion.stopped,
        extras={
            "logprob": _numpy(completion.logprob),
            "model_logprob": _numpy(completion.model_logprob),
            "weights_version": _numpy(version),
        },
        metadata={
            "prompt": _numpy(prompt),
            "group": np.int64(rollout.number),
            "batch": np.int64(rollout.batch),
            "place": np.int64(rollout.place),
            "places": np.int64(rollout.places),
            "writer": rollout.writer,
            "sample": np.int64(sample),
            "samples": np.int64(len(rollout.group.completions)),
            "scored": np.bool_(rollout.rewards is not None),
            "reward_parts": {
                _field(name): _numpy(part)[sample] for name, part in rollout.parts.items()
            },
        },
    )


def _rollout(episodes: Sequence[Episode]) -> Rollout:
    first = episodes[0].metadata
    rewards = np.array([each.steps["reward"][-2] for each in episodes], np.float32)
    fields = first.get("reward_parts", {})
    return Rollout(
        number=int(first["group"]),
        group=Group(
            prompt=torch.from_numpy(np.array(first["prompt"])),
            completions=tuple(_completion(each) for each in episodes),
        ),
        versions=tuple(_tensor(each, "weights_version") for each in episodes),
        rewards=torch.from_numpy(rewards) if bool(first["scored"]) else None,
        parts={
            unquote(name): torch.from_numpy(
                np.array([each.metadata["reward_parts"][name] for each in episodes])
            )
            for name in fields
        },
        batch=int(first.get("batch", 0)),
        place=int(first.get("place", 0)),
        places=int(first.get("places", 1)),
        writer=_text(first.get("writer", "policy")),
    )


def _field(part: str) -> str:
    """A part of a reward may be called by a path or an address; a field's name has no `/`."""
    return part.replace("%", "%25").replace("/", "%2F")


def _completion(episode: Episode) -> Completion:
    return Completion(
        tokens=_tensor(episode, "action"),
        logprob=_tensor(episode, "logprob"),
        model_logprob=_tensor(episode, "model_logprob"),
        stopped=episode.terminated,
    )


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _group(episode: Episode) -> int:
    return int(episode.metadata["group"])


def _sample(episode: Episode) -> int:
    return int(episode.metadata["sample"])


def _tensor(episode: Episode, name: str) -> Tensor:
    """The column without the final step, which means nothing."""
    return torch.from_numpy(np.array(episode.steps[name][:-1]))


def _numpy(tensor: Tensor) -> Any:
    return tensor.detach().cpu().numpy()


def _expect(what: str, tensor: Tensor, dtype: torch.dtype, length: int) -> None:
    if tensor.dtype != dtype or tensor.shape != (length,):
        raise DataError(
            f"{what} is {tensor.dtype} {tuple(tensor.shape)}, expected {dtype} ({length},)"
        )


def _refuse(episodes: Sequence[Episode], skip: bool) -> None:
    if not skip:
        found = [_sample(each) for each in episodes]
        count = int(episodes[-1].metadata["samples"])
        raise DataError(
            f"prompt {_group(episodes[-1])} has the completions {found} of {count}; "
            "a killed process leaves such a group: skip_incomplete=True leaves it out"
        )
