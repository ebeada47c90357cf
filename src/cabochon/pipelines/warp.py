"""WARP: policies that learned from one reward apart are merged, and the next ones begin from there.

    iteration i:  member m     RLHF from start_i, close to a moving average of itself     stage 1
                  merged_i     the arc between the members' task vectors                  stage 2
                  start_(i+1)  (1 - eta) start_i + eta merged_i                           stage 3
    front:        (1 - e) start_1 + e merged_i, e from 0 (where it began) to 1

Source: Rame et al. 2024, "WARP: On the Benefits of Weight Averaged Rewarded Policies",
arXiv:2406.16768, algorithm 1.
Deviations: every iteration has the same number of updates (the paper's later ones are shorter).
REINFORCE's baseline, which the paper does not name, is the mean of the prompt's other samples. What
lies outside of the blocks (embedding, final norm) has an angle for each tensor. The fronts are
measured on prompts that no member learns from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from cabochon import folders
from cabochon.algorithms import rlhf
from cabochon.core import Key, RewardFn
from cabochon.core.errors import ConfigError, DataError
from cabochon.data.order import Order
from cabochon.data.prompts import Prompt, prompts_in, text_prompt
from cabochon.data.readers import read_chats
from cabochon.data.tokenizer import Tokenizer
from cabochon.pipelines import warp_findings
from cabochon.pipelines.recipe import Phase
from cabochon.pipelines.rewarded import Bench, merged_policies, reinforced, towards_start
from cabochon.pipelines.stages import Observe, hash_of, nobody, opened, torch_threads
from cabochon.pipelines.warp_findings import Round
from cabochon.weights.geometry import Mean, Per

__all__ = ["Config", "Judges", "rounds", "run"]

Judges = Callable[[Tokenizer, Sequence[Prompt]], RewardFn]
"""What is good, once tokenizer and prompts are known."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """The whole experiment but the reward."""

    model: str
    """Folder or run that all members begin from; it should write sensibly (after `sft`)."""
    data: str
    """Prompts, or conversations whose model turns are left out: a file or folder."""
    plain: bool = False
    """The prompts are beginnings of texts, not turns of a chat."""
    members: int = 2
    """M: policies that are trained in each iteration, and merged."""
    iterations: int = 1
    """How often merged policies are begun from again; the paper gains until about 3."""
    eta: float = 0.3
    """How far towards the merged policy the next iteration begins."""
    keep: float = 1.0
    """How far towards the last merged policy the one in OUT/policy lies; the front tells what each
    costs in KL."""
    steps: int = 200
    """Updates of each member."""
    batch_size: int = 16
    """Prompts in each update."""
    samples: int = 4
    """Completions of each prompt."""
    learning_rate: float = 1e-6
    """The highest, after a warm-up."""
    warmup: int | None = None
    """Updates over which it rises; a tenth of `steps`, at most 50, when absent."""
    kl_weight: float = 0.1
    """beta: what a nat of KL to the anchor costs in reward."""
    anchor_rate: float = 0.01
    """mu: share of the policy that enters its anchor after each update."""
    sampling_temperature: float = 1.0
    """When policies write and are compared."""
    max_new_tokens: int = 128
    """The longest completion that is drawn."""
    per: Per = "block"
    """What has one angle."""
    mean: Mean = "recursion"
    """How more than two members combine; symmetric does not know their order."""
    held_out: int = 100
    """Prompts that nothing learns from and all policies are judged on."""
    judged_samples: int = 4
    """Completions of each of them."""
    etas: tuple[float, ...] = (0.0, 0.1, 0.3, 0.5, 0.8, 1.0)
    """The points of a front."""
    seed: int = 0
    """Of the order of the prompts and of all draws."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, ..."""
    precision: Literal["float32", "bf16"] = "float32"
    """bf16 computes in bfloat16 over float32 master weights."""
    threads: int = 0
    """Of torch; part of the result, because the order of a sum is. 0: as many as torch takes."""

    def __post_init__(self) -> None:
        _ = (self.method, self.phase)
        for name in ("members", "iterations", "judged_samples"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.held_out < 2:
            raise ConfigError("held_out must be at least 2, for there to be an interval")
        if self.threads < 0:
            raise ConfigError(f"threads must be 0 (torch's choice) or more, got {self.threads}")
        for name, value in (
            ("eta", self.eta), ("keep", self.keep), *(("etas", each) for each in self.etas),
        ):  # fmt: skip
            if not 0.0 <= value <= 1.0:
                raise ConfigError(f"{name} must lie in [0, 1], got {value}")
        if list(self.etas) != sorted({0.0, 1.0, *self.etas}):
            raise ConfigError(
                f"etas must rise from 0 to 1, each once, got {', '.join(map(str, self.etas))}"
            )

    @property
    def method(self) -> rlhf.Config:
        """How each member learns."""
        return rlhf.Config(
            baseline="prompt",
            samples=self.samples,
            kl_weight=self.kl_weight,
            anchor="ema",
            anchor_rate=self.anchor_rate,
            sampling_temperature=self.sampling_temperature,
            max_new_tokens=self.max_new_tokens,
            steps=self.steps,
            warmup=self.warmup,
        )

    @property
    def phase(self) -> Phase:
        """How long and how fast."""
        return Phase(steps=self.steps, rows=self.batch_size, learning_rate=self.learning_rate)


def run(
    config: Config,
    folder: Path,
    judges: Judges,
    reward: dict[str, Any],
    observe: Observe = nobody,
    *,
    sources: Sequence[str] = (),
) -> dict[str, object]:
    """The contents of `folder/results.json`; the policy is in `folder/policy`.

    Each member is a run directory in `folder`. One that is complete is left alone, one that was
    interrupted goes on from its last checkpoint, and the result is the same, bit for bit.

    Args:
        config: the experiment.
        folder: where everything goes; made if absent, continued if it holds the same experiment.
        judges: the reward.
        reward: plain settings that say which it is, for `folder/config.yaml`.
        observe: called with every event.
        sources: files and folders that the reward depends on.

    Raises:
        RunChanged: `folder` was begun with other settings or files, or a member began elsewhere.
        DataError: the data give too few prompts.
        KeyboardInterrupt: SIGINT came and everything was saved.
    """
    config = replace(config, model=str(Path(config.model).resolve()), data=_absolute(config.data))
    read = {path: hash_of(path) for path in (config.data, *sources)}
    start = Path(config.model)
    inputs = {"seed": config.seed, "files": read, "model": folders.fingerprint(start)}
    settings = {"pipeline": "warp", **_plain(config), **reward}
    with opened(folder, settings, inputs).locked(), torch_threads(config.threads):
        bench, dropped = _bench(config, folder, judges, {"reward": reward, "files": read}, observe)
        done = rounds(
            bench,
            start,
            config.method,
            config.phase,
            members=config.members,
            iterations=config.iterations,
            eta=config.eta,
            per=config.per,
            mean=config.mean,
        )
        towards_start(bench, "policy", start, done[-1].merged, config.keep)
        return warp_findings.written(
            bench,
            done,
            config.method.settings(bench.stop_ids),
            _about(config, bench, reward, dropped),
            etas=config.etas,
            keep=config.keep,
            samples=config.judged_samples,
        )


def rounds(
    bench: Bench,
    start: Path,
    method: rlhf.Config,
    phase: Phase,
    *,
    members: int,
    iterations: int = 1,
    eta: float = 0.3,
    per: Per = "block",
    mean: Mean = "recursion",
) -> list[Round]:
    """The iterations of algorithm 1, in stages called `iteration_1_member_1` and so on.

    Members differ in the order of the prompts and in their draws alone.

    Args:
        bench: prompts, reward, place.
        start: the model folder of the first iteration.
        method: how each member learns.
        phase: how long and how fast.
        members: M.
        iterations: I.
        eta: how far towards the merged policy the next iteration begins.
        per: what has one angle.
        mean: how more than two members combine.
    """
    done: list[Round] = []
    for number in range(1, iterations + 1):
        name, key = f"iteration_{number}", Key(bench.seed).fold("warp", number)
        if done:
            last = done[-1]
            start = towards_start(bench, f"{name}_start", last.start, last.merged, eta)
        paths = tuple(
            reinforced(bench, f"{name}_member_{each}", start, method, phase, key.fold(each))
            for each in range(1, members + 1)
        )
        merged = merged_policies(bench, f"{name}_merged", start, paths, per=per, mean=mean)
        done.append(Round(start=start, members=paths, merged=merged))
    return done


def _bench(
    config: Config, folder: Path, judges: Judges, inputs: dict[str, Any], observe: Observe
) -> tuple[Bench, int]:
    """Everything that the members share, and how many prompts were too long for it."""
    model, tokenizer = folders.load(config.model)
    room = model.context - config.max_new_tokens
    found: dict[tuple[int, ...], Prompt] = {}
    dropped = 0
    for chat in read_chats(config.data, answered=False):
        for each in [text_prompt(tokenizer, chat)] if config.plain else prompts_in(tokenizer, chat):
            dropped += len(each.ids) > room
            if len(each.ids) <= room:
                found.setdefault(each.ids, each)
    prompts = list(found.values())
    if len(prompts) < config.held_out + config.batch_size:
        raise DataError(
            f"{config.data} gives {len(prompts)} different prompts of at most {room} tokens, and "
            f"{config.held_out} held out with {config.batch_size} to learn from are needed; give "
            "more, or lower held_out or batch_size"
        )
    order = Order(Key(config.seed, ("held_out",)), len(prompts)).take(len(prompts))
    held_out = [prompts[number] for number in order[: config.held_out]]
    learned = [prompts[number] for number in sorted(order[config.held_out :])]
    bench = Bench(
        folder=folder,
        observe=observe,
        tokenizer=tokenizer,
        prompts=tuple(learned),
        held_out=tuple(held_out),
        reward=judges(tokenizer, prompts),
        inputs=inputs,
        stop_ids=_stops(tokenizer, plain=config.plain),
        seed=config.seed,
        device=config.device,
        dtype=torch.bfloat16 if config.precision == "bf16" else torch.float32,
    )
    return bench, dropped


def _about(config: Config, bench: Bench, reward: dict[str, Any], dropped: int) -> dict[str, object]:
    """What the report says beside what was found."""
    return {
        "title": f"WARP from {Path(config.model).name}",
        "repeat": "",
        "reward": reward,
        "seed": config.seed,
        "method": {name: getattr(config, name) for name in ("members", "iterations", "eta")},
        "prompts": {
            "learned": len(bench.prompts),
            "held_out": len(bench.held_out),
            "dropped": dropped,
        },
    }


def _stops(tokenizer: Tokenizer, *, plain: bool) -> tuple[int, ...]:
    """EOS, and the end of a turn in a chat."""
    ids = (tokenizer.eos_id, None if plain else tokenizer.end_of_turn_id)
    return tuple(dict.fromkeys(each for each in ids if each is not None))


def _plain(config: Config) -> dict[str, Any]:
    return {**asdict(config), "etas": list(config.etas)}


def _absolute(path: str) -> str:
    return str(Path(path).resolve())
