"""What the doctor finds in the rewards of a run, and how much of a prompt a reward model reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

from cabochon import folders
from cabochon.cli.checks import Check, attempt
from cabochon.cli.machine import model_folder
from cabochon.cli.prompts import prompts_of_source, turns_of
from cabochon.cli.rewards import RewardSettings, is_address, is_folder, load_reward
from cabochon.cli.settings import RunSettings
from cabochon.data.prompts import Prompt
from cabochon.data.tokenizer import Tokenizer
from cabochon.rewards.preference_texts import encode_exchange
from cabochon.rewards.texts import Exchange

__all__ = ["examine_rewards"]


def examine_rewards(
    rewards: RewardSettings, run: RunSettings, tokenizer: Tokenizer, *, plain: bool, room: int
) -> Iterator[Check]:
    """Whether each reward can be made, and a reward model has room for every prompt.

    Args:
        rewards: at least one.
        run: names the data.
        tokenizer: of the policy.
        plain: prompts are the beginnings of texts.
        room: the most tokens of a completion.
    """
    for name in rewards.reward:
        look = partial(_look, name, rewards, run, tokenizer, plain=plain, room=room)
        yield attempt(f"reward {name}", look)


def _look(
    name: str,
    rewards: RewardSettings,
    run: RunSettings,
    tokenizer: Tokenizer,
    *,
    plain: bool,
    room: int,
) -> Check:
    title = f"reward {name}"
    if is_address(name):
        return Check(name=title, well=True, text="a server; it is asked when the run begins")
    prompts = [
        prompt for data in run.data for prompt in prompts_of_source(data, tokenizer, plain=plain)
    ]
    alone = replace(rewards, reward=(name,), reward_weights=(), reward_normalise="")
    load_reward(
        alone, tokenizer, prompts=prompts, data=run.data, device=run.device, plain=plain
    )  # raises where it cannot be used
    if not is_folder(name):
        return Check(name=title, well=True, text="can be used")
    return _model(title, name, run.data, prompts, tokenizer, plain=plain, room=room)


def _model(
    title: str,
    name: str,
    data: Sequence[str],
    prompts: Sequence[Prompt],
    tokenizer: Tokenizer,
    *,
    plain: bool,
    room: int,
) -> Check:
    folder = model_folder(name)
    model, own = folders.load_reward(folder)
    if tokenizer.difference(own) is None:
        longest = max((len(each.ids) for each in prompts), default=0)
        text = (
            "the policy's own tokenizer, so it reads the tokens that are drawn; the longest prompt "
            f"has {longest:,}, a completion at most {room:,}, and it reads {model.context:,}"
        )
        return Check(name=title, well=longest + room <= model.context, text=text)
    here, turns = folders.saved_here(folder), None if plain else turns_of(tokenizer, data)
    lengths = [0]
    for each in prompts:
        said = tokenizer.decode(each.ids) if turns is None else tuple(turns(each.ids))
        empty = Exchange(prompt=said, completion="", name=each.source)
        lengths.append(len(encode_exchange(own, empty, trained_here=here)))
    form = "plain texts" if plain else "conversations, in its own chat format"
    text = (
        f"another tokenizer than the policy's, so it reads {form}; the longest prompt has "
        f"{max(lengths):,} of its tokens, and it reads {model.context:,}"
    )
    if max(lengths) >= model.context:
        text += "; take longer ones out, nothing is cut off"
    return Check(name=title, well=max(lengths) < model.context, text=text)
