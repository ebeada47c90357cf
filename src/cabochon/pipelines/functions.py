"""The demo's alignment: a student that writes functions is rewarded for such as parse.

    distilled -> writer    tuned to go on from a signature: a docstring of one sentence, a body
              -> bond      best-of-N distillation of the reward
              -> members   RLHF from there, apart, each close to a moving average of itself
              -> merged    WARP: the arc between what they moved; the front back to the writer

The reward can be checked: does the function parse, does it say in one sentence what it does?
Nothing that a model wrote is ever run. All are judged on signatures from modules that nothing has
read, and that stand in none that was.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cabochon import folders
from cabochon.algorithms import bond, rlhf, sft
from cabochon.core import Key, RewardFn, Step
from cabochon.core.errors import DataError
from cabochon.data.corpus import Summary
from cabochon.data.order import Order
from cabochon.data.prompts import Prompt, PromptRows, text_prompt
from cabochon.data.readers import read_chats
from cabochon.data.tokenizer import Tokenizer
from cabochon.pipelines.recipe import Phase
from cabochon.pipelines.rewarded import Bench, best_of_n
from cabochon.pipelines.stages import Observe, Stage, model_of, probed, trained
from cabochon.pipelines.verdicts import Verdict, judged
from cabochon.pipelines.warp import rounds
from cabochon.pipelines.warp_findings import angles_of, between, gain, samples_of, summary
from cabochon.rewards.checks import documented, parses
from cabochon.rewards.compose import Composition, Part
from cabochon.rewards.texts import judged as reward_of
from cabochon.training.optimizers import OptimizerConfig, adamw

__all__ = ["Config", "aligned", "conversation_of", "reward"]

PROBE_FUNCTIONS = 48
"""How many held-out functions are read at each point of the writer's curve."""
ETAS = (0.3, 0.5, 0.8)
"""Points of the front between the writer and the merged policy."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """How long the student learns to write, and how it learns from the reward."""

    write: Phase
    bond: Phase
    member: Phase
    members: int = 2
    anchor_rate: float = 0.1
    """Of BOND's anchor: a run this short has no time for a slower one."""
    member_anchor_rate: float = 0.05
    kl_weight: float = 0.1
    samples: int = 4
    """Completions of each prompt that a member learns from."""
    prompt_tokens: int = 32
    """The longest signature, BOS included."""
    new_tokens: int = 64
    """The longest rest of a function, its end included."""
    held_out: int = 200
    """Signatures that all are judged on."""
    judged_samples: int = 2
    seed: int = 0
    device: str = "cpu"


def conversation_of(found: Summary) -> dict[str, str] | None:
    """A function as prompt (its signature) and completion (a docstring of one sentence, its body).

    None where its lines do not say where the body begins, or the sentence makes no docstring.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes
        try:
            node = ast.parse(found.function).body[0]
        except SyntaxError:  # lines at the margin (of a string, say) hindered its dedenting
            return None
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return None
    first = node.body[0]
    decorators = getattr(first, "decorator_list", [])
    begins = min([first.lineno, *(each.lineno for each in decorators)]) - 1
    lines = found.function.split("\n")
    if begins < node.lineno:  # the body shares the signature's line
        return None
    indent = lines[begins][: len(lines[begins]) - len(lines[begins].lstrip())]
    sentence = found.summary if found.summary[-1] in ".!?" else f"{found.summary}."
    head = "\n".join(lines[:begins]) + "\n"
    rest = f'{indent}"""{sentence}"""\n' + "\n".join(lines[begins:])
    if not documented(with_prompt=True)(head, rest):
        return None
    return {"prompt": head, "completion": rest, "source": found.source}


def reward(tokenizer: Tokenizer) -> RewardFn:
    """One half for a function that parses, one for a docstring of one sentence in such."""
    checks = {"parses": parses(with_prompt=True), "docstring": documented(with_prompt=True)}
    return Composition(
        parts=tuple(
            Part(name=name, reward=reward_of(check, tokenizer.decode), weight=0.5)
            for name, check in checks.items()
        )
    )


def aligned(
    config: Config,
    folder: Path,
    tokenizer: Tokenizer,
    student: Path,
    texts: Path,
    observe: Observe,
) -> dict[str, Any]:
    """Every stage, and what each policy is worth (see `evaluation.alignment_page`).

    Args:
        config: how.
        folder: of the pipeline.
        tokenizer: of the student.
        student: model folder that begins.
        texts: folder with functions.jsonl and held_out_functions.jsonl, as `conversation_of`.
        observe: called with every event.
    """
    every = _functions(texts / "functions.jsonl", tokenizer)
    known = {each.ids for each in every}
    learned = _short(every, config)
    others = _functions(texts / "held_out_functions.jsonl", tokenizer)
    held_out = [each for each in _short(others, config) if each.ids not in known]
    if len(held_out) < 2:
        raise DataError(f"{texts} leaves {len(held_out)} held-out signatures, need 2 or more")
    writer = _writer(config, folder, tokenizer, student, learned, held_out, observe)
    bench = Bench(
        folder=folder,
        observe=observe,
        tokenizer=tokenizer,
        prompts=_different(learned),
        held_out=_chosen(_different(held_out), config),
        reward=reward(tokenizer),
        inputs={"reward": "parses, docstring"},
        stop_ids=(tokenizer.learnable_end(),),
        seed=config.seed,
        device=config.device,
    )
    return _found(config, bench, writer)


def _found(config: Config, bench: Bench, writer: Path) -> dict[str, Any]:
    """BOND and WARP from the writer, judged."""
    better = best_of_n(
        bench,
        "bond",
        writer,
        bond.Config(
            anchor_rate=config.anchor_rate,
            max_new_tokens=config.new_tokens,
            steps=config.bond.steps,
            warmup=_warmup(config.bond),
        ),
        config.bond,
        Key(config.seed).fold("bond"),
    )
    method = rlhf.Config(
        samples=config.samples,
        kl_weight=config.kl_weight,
        anchor="ema",
        anchor_rate=config.member_anchor_rate,
        max_new_tokens=config.new_tokens,
        steps=config.member.steps,
        warmup=_warmup(config.member),
    )
    (only,) = done = rounds(bench, better, method, config.member, members=config.members)
    reference, settings = bench.model(writer), method.settings(bench.stop_ids)
    paths = {"writer": writer, "bond": better}
    paths |= {f"member_{number}": path for number, path in enumerate(only.members, 1)}
    paths["merged"] = only.merged

    def verdict(name: str, eta: float | None = None) -> Verdict:
        place = only.merged if eta else paths[name]
        model = between(bench, writer, place, eta or 1.0)
        return judged(bench, name, model, reference, settings, samples=config.judged_samples)

    verdicts = {name: verdict(name) for name in paths}
    front = [verdict(f"eta_{eta:g}", eta).point(f"{eta:g}") for eta in ETAS]
    points = [verdicts["writer"].point("0"), *front, verdicts["merged"].point("1")]
    roles = {"writer": "start", "bond": "bond", "merged": "warp"}
    before, after = verdicts["writer"], verdicts["merged"]
    return {
        "policies": [
            summary(name, roles.get(name, "member"), each) for name, each in verdicts.items()
        ],
        "fronts": [
            {"label": "WARP", "role": "warp", "points": [asdict(point) for point in points]}
        ],
        "angles": angles_of(done),
        "gain": gain(before, after, "parses"),
        "samples": samples_of(before, after),
        "prompts": {"learned": len(bench.prompts), "held_out": len(bench.held_out)},
    }


def _writer(
    config: Config,
    folder: Path,
    tokenizer: Tokenizer,
    student: Path,
    learned: Sequence[Prompt],
    held_out: Sequence[Prompt],
    observe: Observe,
) -> Path:
    """The model folder of the student that goes on from signatures."""
    phase, key = config.write, Key(config.seed).fold("writing")
    model = model_of(student, config.device)
    optimizer = adamw(model, OptimizerConfig(learning_rate=phase.learning_rate))
    method = sft.Config(steps=phase.steps, warmup=_warmup(phase))
    rows = PromptRows(learned)
    probe = PromptRows.batch(held_out[:PROBE_FUNCTIONS]).to(config.device)

    def updates(start: int) -> Iterator[Step]:
        batches = (b.to(config.device) for b in rows.batches(key, phase.rows, start))
        steps = sft.train(method, model, batches, optimizer, start=start)
        return probed(steps, model, probe, of=phase.steps)

    stage = Stage(
        name="writer",
        steps=phase.steps,
        tokens=phase.rows * (config.prompt_tokens + config.new_tokens),
        settings={"stage": "writer", **asdict(phase)},
        inputs={
            "seed": config.seed,
            "tokenizer": tokenizer.fingerprint(),
            "student": folders.fingerprint(student),
            "functions": len(learned),
        },
    )
    return trained(stage, folder, model, tokenizer, optimizer, updates, observe)


def _functions(path: Path, tokenizer: Tokenizer) -> list[Prompt]:
    return [text_prompt(tokenizer, each) for each in read_chats(path)]


def _short(found: Sequence[Prompt], config: Config) -> list[Prompt]:
    return [
        each
        for each in found
        if len(each.ids) <= config.prompt_tokens and len(each.completion) <= config.new_tokens
    ]


def _different(found: Sequence[Prompt]) -> tuple[Prompt, ...]:
    return tuple({each.ids: each for each in found}.values())


def _chosen(found: Sequence[Prompt], config: Config) -> tuple[Prompt, ...]:
    order = Order(Key(config.seed, ("signatures",)), len(found))
    return tuple(found[number] for number in order.take(min(config.held_out, len(found))))


def _warmup(phase: Phase) -> int:
    return max(1, phase.steps // 12)
