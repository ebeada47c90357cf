"""`train gkd`: prompts, a student that goes on from them, and a teacher that says how."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cabochon.algorithms import gkd
from cabochon.cli.checks import Check
from cabochon.cli.configuration import FLAT
from cabochon.cli.drawing import Drawn
from cabochon.cli.generate import stop_ids
from cabochon.cli.prompts import examine, prompt_rows
from cabochon.cli.proxy import ProxySettings, check_proxy, watching
from cabochon.cli.recipe import Recipe, Train
from cabochon.cli.rewards import RewardSettings, load_reward, reward_sources
from cabochon.cli.rollouts import records
from cabochon.cli.settings import Architecture, RunSettings
from cabochon.cli.teachers import TeacherSettings, kind, load_teacher, open_cache
from cabochon.core import Backbone, Key, Loss, Objective, Policy, Step, Teacher, TokenBatch
from cabochon.core.errors import ConfigError
from cabochon.data.continuations import Sequences, prompts_of, written_in
from cabochon.data.prompts import PromptRows
from cabochon.data.tokenizer import Tokenizer
from cabochon.files import write_whole
from cabochon.generation.engine import generate
from cabochon.models.gemma.presets import PRESETS
from cabochon.rewards.experience import Experience, Observe
from cabochon.training import parallel
from cabochon.training.optimizers import OptimizerConfig

__all__ = ["RECIPE", "GkdSettings"]

SHOWN = 4
"""Prompts whose completions a record of samples holds."""

CHECKED = 64
"""Prompts that are looked up in a teacher cache at a time."""


def _gentle() -> OptimizerConfig:
    return OptimizerConfig(learning_rate=1e-4, weight_decay=0.0)


@dataclass(frozen=True, kw_only=True)
class GkdSettings:
    """Settings of `train gkd`."""

    run: Annotated[RunSettings, FLAT] = field(default_factory=RunSettings)
    student: str = ""
    """The model that learns, a folder or a run; another word for --model."""
    teaching: Annotated[TeacherSettings, FLAT] = field(default_factory=TeacherSettings)
    rewards: Annotated[RewardSettings, FLAT] = field(default_factory=RewardSettings)
    plain: bool = False
    """Prompts are the beginnings of texts, not turns of conversations."""
    sample_every: int = 20
    """Updates between texts of what the student writes, in RUN/samples; 0: none."""
    no_rollouts: bool = False
    """Do not record all that the student writes in RUN/rollouts."""
    proxy: Annotated[ProxySettings, FLAT] = field(default_factory=ProxySettings)
    method: Annotated[gkd.Config, FLAT] = field(default_factory=gkd.Config)
    optimizer: Annotated[OptimizerConfig, FLAT] = field(default_factory=_gentle)

    def __post_init__(self) -> None:
        if self.sample_every < 0:
            raise ConfigError(f"sample_every must be at least 0, got {self.sample_every}")
        if self.student:
            if self.student not in PRESETS and not Path(self.student).exists():
                raise ConfigError(
                    f"there is no model folder or run at {self.student}; name what --student "
                    "begins from"
                )
            given = self.run.model
            if given not in (Architecture(), Architecture(source=self.student)):
                raise ConfigError("--student and --model name the same thing; give one of them")
            run = replace(self.run, model=Architecture(source=self.student))
            object.__setattr__(self, "run", run)
            object.__setattr__(self, "student", "")


def _pack(settings: GkdSettings, tokenizer: Tokenizer) -> PromptRows:
    _check_roles(settings)
    rows = prompt_rows(
        settings.run,
        tokenizer,
        plain=settings.plain,
        room=_room(settings),
        answered=_answered(settings),
    )
    if kind(settings.teaching.named) == "cache":
        cache = open_cache(settings.teaching.named)
        cache.check_tokenizer(tokenizer.fingerprint())
        for start in range(0, len(rows.prompts), CHECKED):
            cache(rows.batch(rows.prompts[start : start + CHECKED]))  # it names what it lacks
    check_proxy(settings.proxy, settings.teaching, tokenizer, rows.prompts, plain=settings.plain)
    return rows


def _room(settings: GkdSettings) -> int:
    """Tokens that are drawn after a prompt, by the student or by a teacher."""
    method = settings.method
    return method.max_new_tokens if method.own_fraction or method.preset == "seq_kd" else 0


def _answered(settings: GkdSettings) -> bool:
    """Whether completions of the data are learned."""
    return settings.method.own_fraction < 1.0 and settings.method.preset != "seq_kd"


def _examine(
    settings: GkdSettings, tokenizer: Tokenizer, name: str
) -> tuple[list[Check], list[Drawn]]:
    return examine(
        name,
        settings.run,
        tokenizer,
        plain=settings.plain,
        room=_room(settings),
        answered=_answered(settings),
        stop_ids=stop_ids(tokenizer, (), chat=not settings.plain),
    )


def _train(settings: GkdSettings, model: nn.Module, tokenizer: Tokenizer) -> Train:
    method, key = settings.method, Key(settings.run.seed)
    teacher: Teacher | None = None
    if settings.teaching.named:
        teacher = load_teacher(settings.teaching, settings.run, tokenizer)
    reward = None
    if settings.rewards.reward:
        run, prompts = settings.run, _pack(settings, tokenizer).prompts
        reward = load_reward(
            settings.rewards, tokenizer, prompts=prompts, data=run.data, device=run.device,
            plain=settings.plain,
        )  # fmt: skip
    stops = stop_ids(tokenizer, (), chat=not settings.plain)
    show = _samples(settings, tokenizer)
    watch = watching(
        settings.proxy,
        settings.run,
        cast(Backbone, model),
        cast(Backbone, teacher),
        tokenizer,
        replace(method.settings(stops), temperature=1.0),
        warmup=method.warmup or 0,
        plain=settings.plain,
    )

    def train(batches: Iterable[TokenBatch], optimizer: Optimizer, start: int) -> Iterator[Step]:
        if method.preset == "seq_kd":
            batches = _taught(settings, cast(Backbone, teacher), batches, stops)
        first = start * method.accumulate
        with records(
            settings.run, tokenizer, algorithm="gkd", temperature=method.sampling_temperature,
            first=first, wanted=not settings.no_rollouts,
        ) as found:  # fmt: skip

            def observe(experience: Experience) -> None:
                show(experience)
                if found.observe is not None:
                    found.observe(experience)

            steps = gkd.train(
                method,
                cast(Backbone, model),
                batches,
                optimizer,
                key=key,
                stop_ids=stops,
                teacher=None if method.learns_text else teacher,
                reward=reward,
                observe=observe,
                start=start,
            )
            yield from watch(steps, start)

    return train


def _check_roles(settings: GkdSettings) -> None:
    """Who teaches, and whether that suits what is learned.

    Raises:
        ConfigError: a teacher or reward is missing, has no part, or cannot do what it is to do.
    """
    method, named = settings.method, settings.teaching.named
    if (method.distillation_weight < 1.0) != bool(settings.rewards.reward):
        raise ConfigError("--reward goes with a --distillation-weight below 1, which needs one")
    if method.distillation_weight == 0.0:
        if named:
            raise ConfigError("distillation_weight 0 learns from the reward alone: no --teacher")
        return
    if method.preset == "sft" and named:
        raise ConfigError("sft learns the text of the data; leave --teacher out")
    if method.preset != "sft" and not named:
        raise ConfigError(f"{method.preset} needs --teacher FOLDER, CACHE or http://HOST:PORT")
    if kind(named) == "cache" and method.own_fraction > 0.0:
        raise ConfigError(
            f"{named} is a teacher cache, which knows the data's texts alone; what a student "
            "writes is new: use the teacher itself, or --preset supervised_kd"
        )
    if named and kind(named) != "model" and method.preset == "seq_kd":
        raise ConfigError("seq_kd lets the teacher write: --teacher must be a model folder or run")
    if method.preset == "seq_kd" and settings.teaching.cross_tokenizer:
        raise ConfigError("what a teacher of another tokenizer writes is no text of the student's")


def _taught(
    settings: GkdSettings,
    teacher: Backbone,
    batches: Iterable[TokenBatch],
    stops: Sequence[int],
) -> Iterator[TokenBatch]:
    """The prompts with what the teacher writes for them: the same in every epoch."""
    key = Key(settings.run.seed).fold("seq_kd")
    for batch in batches:
        prompts = prompts_of(batch)
        groups = generate(
            teacher, prompts, settings.method.settings(stops), key, indices=[*map(_index, prompts)]
        )
        written = Sequences.of(written_in(groups, own=False), batch.tokens.device)
        yield written.batch


def _index(prompt: Tensor) -> int:
    """A number that is the prompt's own wherever it stands."""
    digest = hashlib.blake2b(prompt.cpu().numpy().tobytes(), digest_size=7).digest()
    return int.from_bytes(digest, "little")


def _samples(settings: GkdSettings, tokenizer: Tokenizer) -> Observe:
    """Writes what the student wrote for some updates into the run directory, as text."""
    every, out = settings.sample_every, settings.run.out

    def record(experience: Experience) -> None:
        step, part = divmod(experience.number, settings.method.accumulate)
        if part or not every or step % every or not out or parallel.rank() > 0:
            return
        lines = [
            {
                "step": step,
                "prompt": tokenizer.decode(group.prompt.tolist()),
                "completion": tokenizer.decode(each.tokens.tolist()),
                "tokens": each.tokens.tolist(),
                "logprobs": [round(value, 6) for value in each.model_logprob.tolist()],
                "stopped": each.stopped,
            }
            for group in experience.groups[:SHOWN]
            for each in group.completions
        ]
        # A file for each update: a run that resumes writes the same again.
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_whole(Path(out) / "samples" / f"step-{step}.jsonl", text)

    return record


def _objective(settings: GkdSettings, teacher: Policy | None) -> Objective[Policy, TokenBatch]:
    """The update alone, as `plan` rehearses it: rows as long as they may become."""
    method = settings.method
    inner = gkd.objective(method, None if method.learns_text else teacher)

    def loss(student: Policy, batch: TokenBatch) -> Loss:
        rows = torch.zeros_like(batch.tokens[:, 0], dtype=torch.float32)
        drawn = Sequences(
            batch=batch,
            own=torch.ones_like(rows, dtype=torch.bool),
            stopped=torch.ones_like(rows, dtype=torch.bool),
            recorded=torch.zeros_like(batch.tokens, dtype=torch.float32),
            reward=rows,
            gain=rows,
        )
        return inner(student, drawn)

    return loss


def _folders(settings: GkdSettings) -> dict[str, str]:
    return settings.teaching.sources() | reward_sources(settings.rewards)


RECIPE = Recipe(
    name="gkd",
    purpose="learn from a teacher on the student's own samples",
    settings=GkdSettings,
    chat=True,
    pack=_pack,
    train=_train,
    objective=_objective,
    folders=_folders,
    examine=_examine,
    not_planned="drawing the completions: its cache, and about as much time as the update again",
)
