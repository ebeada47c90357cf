"""What the policies of a pipeline are worth, kept in its folder: a file for each.

A judgement takes a while for a large model, so an interrupted pipeline reads those that it has.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from cabochon.core import Key
from cabochon.core.errors import DataError
from cabochon.data.tokenizer import Tokenizer
from cabochon.evaluation.pareto import Point
from cabochon.evaluation.policies import Judged, judge
from cabochon.files import write_whole
from cabochon.generation.engine import Settings
from cabochon.models.foreign import ForeignModel
from cabochon.models.gemma.decoder import Gemma
from cabochon.pipelines.rewarded import Bench
from cabochon.pipelines.stages import Event
from cabochon.pipelines.timing import timed

__all__ = ["Verdict", "judged"]

SHOWN = 8
"""How many prompts are kept with what a policy wrote for them."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a policy was worth on the held-out prompts: one number a prompt, the mean of samples."""

    reward: list[float]
    kl: list[float]
    """Nats of a whole completion, from where the pipeline began."""
    parts: Mapping[str, list[float]]
    entropy: float
    """Nats a token, along the policy's own completions."""
    length: float
    """Tokens of a completion."""
    stopped: float
    """Share of the completions that a stop token ended."""
    distinct: float
    """How many different completions there are, over all prompts, as a share of all."""
    samples: list[Mapping[str, Any]]
    """The first prompts, each with the first completion and its reward."""

    def point(self, label: str = "") -> Point:
        """For a front."""
        return Point(
            kl=sum(self.kl) / len(self.kl),
            reward=sum(self.reward) / len(self.reward),
            label=label,
        )


def judged(
    bench: Bench,
    name: str,
    policy: Callable[[], Gemma | ForeignModel],
    reference: Gemma | ForeignModel,
    settings: Settings,
    *,
    samples: int,
) -> Verdict:
    """A policy on the held-out prompts, from `bench.folder/judged/NAME.json` where it is there.

    Args:
        bench: prompts and reward.
        name: of the policy; a name stands for one policy as long as the folder exists.
        policy: gives it, where it has to be asked.
        reference: what the KL is measured from.
        settings: how is drawn.
        samples: completions of each prompt.
    """
    place = bench.folder / "judged" / f"{name}.json"
    if not place.is_file():
        bench.observe(Event(stage="evaluation", steps=0, note=f"judges {name}"))
        prompts = [torch.tensor(each.ids, device=bench.device) for each in bench.held_out]
        key = Key(bench.seed, ("judged",))
        with timed(bench.folder, f"judged/{name}"):
            found = judge(
                policy(), reference, prompts, bench.reward, settings, key, samples=samples
            )
        verdict = _verdict(found, bench.tokenizer)
        place.parent.mkdir(exist_ok=True)
        write_whole(place, json.dumps(asdict(verdict), ensure_ascii=False, allow_nan=False) + "\n")
    try:
        return Verdict(**json.loads(place.read_text("utf-8")))
    except (ValueError, TypeError) as error:
        raise DataError(f"{place} is damaged ({error}); remove it and run again") from error


def _verdict(found: Judged, tokenizer: Tokenizer) -> Verdict:
    shown = list(zip(found.groups, found.reward[:, 0].tolist(), strict=True))[:SHOWN]
    return Verdict(
        reward=_by_prompt(found.reward),
        kl=_by_prompt(found.log_ratio),
        parts={name: _by_prompt(part) for name, part in found.parts.items()},
        entropy=found.entropy_per_token,
        length=found.length.mean().item(),
        stopped=found.stopped.mean().item(),
        distinct=found.distinct,
        samples=[
            {
                "prompt": tokenizer.decode(group.prompt.tolist()),
                "completion": tokenizer.decode(group.completions[0].tokens.tolist()),
                "reward": reward,
            }
            for group, reward in shown
        ],
    )


def _by_prompt(values: Tensor) -> list[float]:
    means: list[float] = values.double().mean(1).tolist()
    return means
