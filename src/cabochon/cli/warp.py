"""`cabochon run warp`: rewarded policies, merged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from cabochon.cli.configuration import FLAT, build, plain, read
from cabochon.cli.machine import device_of, model_folder
from cabochon.cli.rewards import RewardSettings, absolute, load_reward, reward_sources
from cabochon.cli.stages import carry_out
from cabochon.core import RewardFn
from cabochon.core.errors import ConfigError
from cabochon.data.prompts import Prompt
from cabochon.data.tokenizer import Tokenizer
from cabochon.pipelines import warp

__all__ = ["WarpSettings", "main", "resume"]


@dataclass(frozen=True, kw_only=True)
class WarpSettings:
    """Settings of `run warp`."""

    out: Path
    """The folder of all stages; begun there, interrupted and called again, it goes on."""
    recipe: Annotated[warp.Config, FLAT]
    rewards: Annotated[RewardSettings, FLAT] = field(default_factory=RewardSettings)

    def __post_init__(self) -> None:
        if self.rewards.reward_normalise.isdecimal():
            raise ConfigError(
                "run warp compares policies under one reward: give --reward-normalise the file "
                "that `cabochon evaluate rewards --save` wrote"
            )


def main(words: Sequence[str], *, description: str) -> int:
    """Trains, merges, judges; or goes on."""
    invocation = read(
        WarpSettings,
        words,
        prog="cabochon run warp",
        description=description,
        names={"pipeline": "warp"},
    )
    settings = invocation.settings
    recipe = replace(settings.recipe, model=str(model_folder(settings.recipe.model)))
    settings = replace(settings, recipe=recipe, rewards=absolute(settings.rewards))
    return _carried_out(settings, as_json=invocation.json)


def resume(folder: Path, content: Mapping[str, Any], *, as_json: bool) -> int:
    """Goes on with the pipeline that `content`, of `folder`'s config.yaml, describes."""
    whole = {"out": str(folder), **content}
    settings = build(WarpSettings, whole, origin=str(folder / "config.yaml"))
    return _carried_out(settings, as_json=as_json)


def _carried_out(settings: WarpSettings, *, as_json: bool) -> int:
    recipe, rewards = settings.recipe, settings.rewards
    device_of(recipe.device)  # refuses what is none
    if not rewards.reward:
        raise ConfigError("what is good? run warp needs a --reward; `--help` lists them")
    models = [name for name in reward_sources(rewards).values() if Path(name).exists()]
    scales = [rewards.reward_normalise] if rewards.reward_normalise else []

    def judges(tokenizer: Tokenizer, prompts: Sequence[Prompt]) -> RewardFn:
        return load_reward(
            rewards, tokenizer, prompts=prompts, data=[recipe.data], device=recipe.device,
            plain=recipe.plain,
        )  # fmt: skip

    return carry_out(
        lambda observe: warp.run(
            recipe,
            settings.out,
            judges,
            plain(rewards),
            observe,
            sources=[*models, *scales],
        ),
        settings.out,
        as_json=as_json,
    )
