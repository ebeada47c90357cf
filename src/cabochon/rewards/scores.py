"""What a reward says of groups of completions, checked before anything learns from it.

A reward is any function of groups (`cabochon.core.RewardFn`). One that is a sum of parts also has
a method `scores`, which gives the parts beside the sum; `cabochon.rewards.compose` makes such. A
reward is somebody's code or somebody's server: whatever it does wrong surfaces here, with the
prompt and the sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from torch import Tensor

from cabochon.core import Completion, Group, RewardFn
from cabochon.core.errors import CabochonError, DataError, NonFinite
from cabochon.rewards.deadlines import Overdue

__all__ = ["Parted", "Scores", "named", "scores"]

SHOWN_TOKENS = 8
"""How many token ids of a prompt or a completion a message quotes."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The rewards of P prompts with G completions each, and what they are made of."""

    total: Tensor
    """P G float32, finite: higher is better."""
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    """Name -> P G float32, finite: what each part of the reward said, before weights; empty where
    the reward has no parts."""


@runtime_checkable
class Parted(Protocol):
    """A reward that is made of parts and tells them."""

    def __call__(self, groups: Sequence[Group], /) -> Tensor:
        """P G."""
        ...

    def scores(self, groups: Sequence[Group], /) -> Scores:
        """The same rewards, with their parts."""
        ...


def scores(reward: RewardFn, groups: Sequence[Group], *, name: str = "") -> Scores:
    """The rewards of all completions, on the device of the first prompt.

    Args:
        reward: what judges; asked once, for all groups.
        groups: P, of G completions each.
        name: what messages call the reward.

    Raises:
        DataError: groups differ in size or there are none; the reward raised an error, or gave
            another shape than P G. The reward is then asked again group by group and sample by
            sample, so that the message can name what it failed on.
        NonFinite: a reward is NaN or infinite; names prompt and sample.
    """
    sizes = sorted({len(group.completions) for group in groups})
    if len(sizes) != 1 or sizes[0] == 0:
        raise DataError(
            f"the groups have {sizes or 'no'} completions; a reward needs groups of one size, "
            "of at least one completion"
        )
    called = f"the reward {name}" if name else "the reward"
    given = _ask(reward, groups, called)
    _expect_count(given.total, called, reward, groups)
    for part, values in given.parts.items():
        _expect_count(values, f"{called}'s part {part}", None, groups)
    device = groups[0].prompt.device
    return Scores(
        total=_finite(given.total, called, groups).to(device),
        parts={
            part: _finite(values, f"{called}'s part {part}", groups).to(device)
            for part, values in given.parts.items()
        },
    )


def named(groups: Sequence[Group], prompt: int, sample: int | None = None) -> str:
    """How a message calls a completion: its place, and how its tokens begin."""
    group = groups[prompt]
    said = f"prompt {prompt} (token ids {_ids(group.prompt)})"
    if sample is None:
        return said
    return f"{said}, sample {sample} (token ids {_ids(group.completions[sample].tokens)})"


def _ask(reward: RewardFn, groups: Sequence[Group], called: str) -> Scores:
    try:
        return _given(reward, groups)
    except CabochonError:
        raise  # it names its sample already
    except (Exception, SystemExit, Overdue) as error:  # somebody's code: it is named
        raise DataError(
            f"{called} failed at {_culprit(reward, groups)}: {type(error).__name__}: {error}"
        ) from error


def _given(reward: RewardFn, groups: Sequence[Group]) -> Scores:
    return reward.scores(groups) if isinstance(reward, Parted) else Scores(total=reward(groups))


def _culprit(reward: RewardFn, groups: Sequence[Group]) -> str:
    """Which group, and which of its samples, the reward fails on by itself too."""
    for place, group in enumerate(groups):
        if not _fails(reward, group):
            continue
        for sample, completion in enumerate(group.completions):
            if _fails(reward, _alone(group, completion)):
                return named(groups, place, sample)
        return f"{named(groups, place)}, at no single sample"
    return f"no single prompt, but at all {len(groups)} together"


def _fails(reward: RewardFn, group: Group) -> bool:
    """Whether the reward raises an error, or gives another shape than 1 G."""
    try:
        total = _given(reward, [group]).total
    except (Exception, SystemExit, Overdue):  # the error that led here, or its like
        return True
    return not isinstance(total, Tensor) or tuple(total.shape) != (1, len(group.completions))


def _alone(group: Group, completion: Completion) -> Group:
    return Group(prompt=group.prompt, completions=(completion,))


def _expect_count(
    found: Tensor, what: str, reward: RewardFn | None, groups: Sequence[Group]
) -> None:
    expected = (len(groups), len(groups[0].completions))
    shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
    if shape == expected:
        return
    where = "" if reward is None else f"; it goes wrong at {_culprit(reward, groups)}"
    raise DataError(
        f"{what} gave {shape}, expected a tensor of shape {expected}: one number for each prompt "
        f"and sample{where}"
    )


def _finite(values: Tensor, what: str, groups: Sequence[Group]) -> Tensor:
    """P G float32."""
    values = values.detach().float()
    broken = (~values.isfinite()).nonzero().tolist()
    if broken:
        prompt, sample = broken[0]
        raise NonFinite(
            f"{what} gave {float(values[prompt, sample])} for {named(groups, prompt, sample)} "
            f"({len(broken)} of {values.numel()} are no finite numbers); a reward must give a "
            "number for every completion"
        )
    return values


def _ids(tokens: Tensor) -> str:
    shown = " ".join(map(str, tokens[:SHOWN_TOKENS].tolist()))
    return f"{shown} ... of {len(tokens)}" if len(tokens) > SHOWN_TOKENS else shown or "none"
