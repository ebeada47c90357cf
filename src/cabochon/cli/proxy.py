"""Watching a distillation: its distance to the teacher on held-out prompts, and a warning."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from cabochon.cli.machine import device_of
from cabochon.cli.output import say
from cabochon.cli.prompts import prompts_of_source
from cabochon.cli.settings import RunSettings
from cabochon.cli.teachers import TeacherSettings, kind
from cabochon.core import Backbone, Group, Key, Step
from cabochon.core.errors import ConfigError, DataError
from cabochon.data.prompts import Prompt
from cabochon.data.tokenizer import Tokenizer
from cabochon.evaluation.distances import sequence_kl
from cabochon.evaluation.hacking import Detector, Point, watched
from cabochon.generation.engine import Settings, generate
from cabochon.training.metrics import read_metrics

__all__ = ["MONITOR", "ProxySettings", "check_proxy", "watching"]

MONITOR = Detector(window=8, sureness=4.0)
"""A run has many points at even steps, most of them where the curve is nearly flat, and each is
another chance to warn for nothing; docs/papers/teacher_hacking.md says how often it does."""


@dataclass(frozen=True, kw_only=True)
class ProxySettings:
    """Whether, and on what, the distance to the teacher is measured during training."""

    proxy_every: int = 0
    """Updates between measurements of the distance to the teacher; a warning is printed when its
    law breaks. 0: none."""
    proxy_data: tuple[str, ...] = ()
    """Held-out prompts to measure on, none of which is among the data."""
    proxy_prompts: int = 64
    """The most of them that are used, from the first on."""

    def __post_init__(self) -> None:
        if self.proxy_every < 0 or self.proxy_prompts < 2:
            raise ConfigError(
                "proxy_every must be at least 0 and proxy_prompts at least 2, got "
                f"{self.proxy_every} and {self.proxy_prompts}"
            )
        if bool(self.proxy_every) != bool(self.proxy_data):
            raise ConfigError(
                "--proxy-every and --proxy-data go together: how often the distance to the "
                "teacher is measured, and on which held-out prompts"
            )
        # A run that resumes elsewhere must find them.
        fixed = (n if n == "stdlib" else str(Path(n).resolve()) for n in self.proxy_data)
        object.__setattr__(self, "proxy_data", tuple(fixed))


def check_proxy(
    settings: ProxySettings,
    teaching: TeacherSettings,
    tokenizer: Tokenizer,
    learned: Sequence[Prompt],
    *,
    plain: bool,
) -> None:
    """Refuses what cannot be measured, before anything is trained.

    Raises:
        ConfigError: the teacher cannot write: it is no model in this process, or of another
            vocabulary.
        DataError: there are not two held-out prompts, or one is among those that are learned.
    """
    if not settings.proxy_every:
        return
    if not teaching.teacher or kind(teaching.teacher) != "model" or teaching.cross_tokenizer:
        raise ConfigError(
            "--proxy-every needs a --teacher folder or run with the student's tokenizer: its own "
            "responses to the held-out prompts are what is measured on"
        )
    if teaching.teacher_cache:
        raise ConfigError("--proxy-every asks the teacher itself; leave --teacher-cache out")
    seen = {each.ids for each in learned}
    for each in _held_out(settings, tokenizer, plain=plain):
        if each.ids in seen:
            raise DataError(
                f"{each.source}: this held-out prompt is among the data too, where the student "
                "learns it; take it out of one of them"
            )


def watching(
    settings: ProxySettings,
    run: RunSettings,
    student: Backbone,
    teacher: Backbone,
    tokenizer: Tokenizer,
    drawing: Settings,
    *,
    warmup: int,
    plain: bool,
) -> Callable[[Iterator[Step], int], Iterator[Step]]:
    """(updates, first update) -> the same, some of which report `proxy`, nats for a response.

    Args:
        settings: how often, and on what.
        run: where the metrics of an interrupted run lie.
        student: measured between two updates.
        teacher: writes to each held-out prompt once.
        tokenizer: of both.
        drawing: the longest response and what ends one; responses are sampled at temperature 1.
        warmup: updates over which the learning rate rises.
        plain: prompts are beginnings of texts.
    """

    def watch(updates: Iterator[Step], start: int) -> Iterator[Step]:
        if not settings.proxy_every:
            return updates
        held_out = _held_out(settings, tokenizer, plain=plain)
        device = device_of(run.device)
        prompts = [torch.tensor(each.ids, device=device) for each in held_out]
        groups: list[Group] = generate(teacher, prompts, drawing, Key(run.seed).fold("proxy"))
        return watched(
            updates,
            lambda: sequence_kl(teacher, student, groups).mean,
            every=settings.proxy_every,
            warn=lambda reason: say(f"warning: {reason}; see docs/papers/teacher_hacking.md"),
            seen=_measured(run, start),
            detector=replace(MONITOR, warmup=warmup),
        )

    return watch


def _held_out(settings: ProxySettings, tokenizer: Tokenizer, *, plain: bool) -> list[Prompt]:
    found: list[Prompt] = []
    for name in settings.proxy_data:
        found += prompts_of_source(name, tokenizer, plain=plain)
    if len(found) < 2:
        raise DataError(
            f"{', '.join(settings.proxy_data)}: {len(found)} held-out prompts, need 2 or more"
        )
    return found[: settings.proxy_prompts]


def _measured(run: RunSettings, start: int) -> list[Point]:
    """What an interrupted run has measured before update `start`."""
    path = Path(run.out) / "metrics.jsonl"
    if not run.out or not path.is_file():
        return []
    lines = [line for line in read_metrics(path) if line["step"] < start]
    return [(line["step"] + 1, line["proxy"]) for line in lines if line.get("proxy") is not None]
