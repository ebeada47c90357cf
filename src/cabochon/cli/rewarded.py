"""What the trainings by a reward have in common: prompts, the reward, records to replay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from cabochon.cli.checks import Check
from cabochon.cli.drawing import Drawn
from cabochon.cli.generate import stop_ids
from cabochon.cli.prompts import examine, prompt_rows
from cabochon.cli.rewards import RewardSettings, load_reward, reward_sources
from cabochon.cli.rollouts import NoRows, check_replay
from cabochon.cli.rows import Rows
from cabochon.cli.settings import RunSettings
from cabochon.core import Backbone, Group, Key, RewardFn
from cabochon.data.prompts import PromptRows
from cabochon.data.tokenizer import Tokenizer
from cabochon.generation.engine import Settings, generate

__all__ = ["Rewarded", "Writing", "examine_prompts", "pack", "reward_folders", "reward_of"]


class Writing(Protocol):
    """What the Config of an algorithm says about what is drawn."""

    @property
    def steps(self) -> int: ...
    @property
    def accumulate(self) -> int: ...
    @property
    def max_new_tokens(self) -> int: ...
    @property
    def sampling_temperature(self) -> float: ...
    def settings(self, stop_ids: Sequence[int]) -> Settings: ...


class Rewarded(Protocol):
    """Settings of a training by a reward."""

    @property
    def run(self) -> RunSettings: ...
    @property
    def rewards(self) -> RewardSettings: ...
    @property
    def plain(self) -> bool: ...
    @property
    def replay(self) -> str: ...
    @property
    def method(self) -> Writing: ...


def pack(settings: Rewarded, tokenizer: Tokenizer, algorithm: str) -> Rows:
    """The prompts; or none, where a run is replayed that can be."""
    if not settings.replay:
        return _prompts(settings, tokenizer)
    method = settings.method
    check_replay(
        settings.replay, tokenizer, method.steps * method.accumulate, algorithm=algorithm,
        temperature=method.sampling_temperature, batch_size=settings.run.batch_size,
        longest=method.max_new_tokens,
    )  # fmt: skip
    return NoRows()


def reward_of(settings: Rewarded, policy: Backbone, tokenizer: Tokenizer) -> RewardFn | None:
    """The reward; None where a run is replayed, which was judged already."""
    if settings.replay:
        return None
    run, prompts = settings.run, _prompts(settings, tokenizer).prompts

    def reference(count: int) -> Sequence[Group]:
        """What the policy writes before it learns, for the scales of rewards."""
        chosen = [torch.tensor(each.ids, device=run.device) for each in prompts[:count]]
        how = settings.method.settings(stop_ids(tokenizer, (), chat=not settings.plain))
        return generate(policy, chosen, how, Key(run.seed).fold("scales"), 2)

    return load_reward(
        settings.rewards, tokenizer, prompts=prompts, data=run.data, device=run.device,
        plain=settings.plain, draw=reference,
    )  # fmt: skip


def examine_prompts(
    settings: Rewarded, tokenizer: Tokenizer, name: str
) -> tuple[list[Check], list[Drawn]]:
    """What the doctor finds in the prompts of a name."""
    return examine(
        name,
        settings.run,
        tokenizer,
        plain=settings.plain,
        room=settings.method.max_new_tokens,
        answered=False,
        stop_ids=stop_ids(tokenizer, (), chat=not settings.plain),
    )


def reward_folders(settings: Rewarded) -> dict[str, str]:
    """The model folders and servers that judge; none where a run is replayed."""
    return {} if settings.replay else reward_sources(settings.rewards)


def _prompts(settings: Rewarded, tokenizer: Tokenizer) -> PromptRows:
    return prompt_rows(
        settings.run,
        tokenizer,
        plain=settings.plain,
        room=settings.method.max_new_tokens,
        answered=False,
    )
