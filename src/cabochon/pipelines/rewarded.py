"""Trainings by a reward as stages of a pipeline, and their merge as WARP has it.

    bench = Bench(folder=..., tokenizer=..., prompts=..., held_out=..., reward=..., ...)
    better = best_of_n(bench, "bond", start, method, phase, key)
    members = [reinforced(bench, f"member_{n}", better, method, phase, key) for n in (1, 2)]
    merged = merged_policies(bench, "warp", better, members)

Each training is a run directory in the bench's folder, which is skipped, continued or begun.
Interrupted and called again, all of it ends with the same bits. `verdicts` tells what came of it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from cabochon import folders
from cabochon.algorithms import bond, rlhf
from cabochon.core import Key, RewardFn, Step, TokenBatch
from cabochon.core.errors import RunChanged
from cabochon.data.prompts import Prompt, PromptRows
from cabochon.data.tokenizer import Tokenizer
from cabochon.models.foreign import ForeignModel
from cabochon.models.gemma.decoder import Gemma
from cabochon.pipelines.recipe import Phase
from cabochon.pipelines.stages import Event, Observe, Stage, trained
from cabochon.pipelines.timing import timed
from cabochon.rewards.experience import Experience, continued
from cabochon.rewards.records import Recorder, recorder
from cabochon.training.anchors import Anchor, anchor_of
from cabochon.training.optimizers import OptimizerConfig, adamw
from cabochon.training.run_directory import Run
from cabochon.weights import folders as weight_folders
from cabochon.weights import formulas
from cabochon.weights.geometry import Mean, Per

__all__ = [
    "Bench",
    "best_of_n",
    "merged_policies",
    "refuse_other_starts",
    "reinforced",
    "towards_start",
]

Model = Gemma | ForeignModel
Updates = Callable[[Iterable[TokenBatch], Optimizer, int, Recorder | None], Iterator[Step]]


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What every training by one reward has in common."""

    folder: Path
    """Of the pipeline."""
    observe: Observe
    tokenizer: Tokenizer
    prompts: tuple[Prompt, ...]
    """To learn from."""
    held_out: tuple[Prompt, ...]
    """To be judged on; none of them is learned from."""
    reward: RewardFn
    inputs: Mapping[str, Any]
    """What the result depends on beside the weights: of the data, of the reward."""
    stop_ids: tuple[int, ...]
    seed: int
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    def model(self, path: Path) -> Model:
        """The model of a folder."""
        return folders.load_model(path, dtype=self.dtype, device=self.device)


def reinforced(
    bench: Bench, name: str, start: Path, method: rlhf.Config, phase: Phase, key: Key
) -> Path:
    """The model folder that RLHF leaves in `bench.folder/name`, after the updates missing there.

    Args:
        bench: prompts, reward, place.
        name: of the stage.
        start: the model folder that the policy and its anchor begin from.
        method: how is learned; its `steps` are those of `phase`.
        phase: updates, prompts in each, learning rate.
        key: of the order of the prompts and of all draws.
    """
    policy = bench.model(start)
    anchor = anchor_of(policy, method.anchor_config)

    def updates(
        batches: Iterable[TokenBatch], optimizer: Optimizer, begin: int, witness: Recorder | None
    ) -> Iterator[Step]:
        draw = partial(
            rlhf.experiences, method, policy, reward=bench.reward, key=key.fold("draws"),
            stop_ids=bench.stop_ids,
        )  # fmt: skip
        source = continued(
            _recalled(bench, witness, begin * method.accumulate),
            lambda due, step: draw(due, start=step),
            batches,
            start=begin,
            accumulate=method.accumulate,
        )
        return rlhf.train(
            method,
            policy,
            anchor,
            batches,
            optimizer,
            key=key.fold("draws"),
            stop_ids=bench.stop_ids,
            source=source,
            observe=witness,
            start=begin,
        )

    sequences = phase.rows * method.samples
    settings = asdict(method)
    return _learned(
        bench, name, "rlhf", start, policy, anchor, settings, sequences, phase, key, updates
    )


def best_of_n(
    bench: Bench, name: str, start: Path, method: bond.Config, phase: Phase, key: Key
) -> Path:
    """The model folder that BOND leaves; the arguments are those of `reinforced`."""
    policy = bench.model(start)
    anchor = anchor_of(policy, method.anchor_config)

    def updates(
        batches: Iterable[TokenBatch], optimizer: Optimizer, begin: int, witness: Recorder | None
    ) -> Iterator[Step]:
        draw = partial(
            bond.experiences, method, policy, anchor, reward=bench.reward, key=key.fold("draws"),
            stop_ids=bench.stop_ids,
        )  # fmt: skip
        source = continued(
            _recalled(bench, witness, begin * method.accumulate),
            lambda due, step: draw(due, start=step),
            batches,
            start=begin,
            accumulate=method.accumulate,
            writers=2,
        )
        return bond.train(
            method,
            policy,
            anchor,
            batches,
            optimizer,
            key=key.fold("draws"),
            stop_ids=bench.stop_ids,
            source=source,
            observe=witness,
            start=begin,
        )

    sequences = phase.rows * (method.samples + 1)
    settings = asdict(method)
    return _learned(
        bench, name, "bond", start, policy, anchor, settings, sequences, phase, key, updates
    )


def merged_policies(
    bench: Bench,
    name: str,
    start: Path,
    members: Sequence[Path],
    *,
    per: Per = "block",
    mean: Mean = "recursion",
) -> Path:
    """The folder `bench.folder/name`: the members' task vectors on their arc, equally weighted.

    It holds float32, whatever the members hold: what they moved is small beside what they are.

    Args:
        bench: gives the place.
        name: of the folder; one that is there already is left alone.
        start: what all members began from.
        members: model folders as `reinforced` gave them.
        per: what has one angle.
        mean: how more than two combine.

    Raises:
        WeightsMismatch: a member is of another shape, or members point away from each other.
        RunChanged: a member began from other weights than `start`.
    """
    out = bench.folder / name
    if not out.exists():
        refuse_other_starts(start, members)
        bench.observe(Event(stage=name, steps=0, note=f"merges {len(members)} policies"))
        formula = formulas.slerp(len(members), per=per, mean=mean)
        with timed(bench.folder, name):
            weight_folders.merge(formula, members, out, base=start, dtype="float32")
    return out


def towards_start(bench: Bench, name: str, start: Path, model: Path, eta: float) -> Path:
    """The folder `bench.folder/name`: (1 - eta) start + eta model, LITI."""
    out = bench.folder / name
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        weight_folders.merge(formulas.towards(eta), [model], out, base=start, dtype="float32")
    return out


def refuse_other_starts(start: Path, members: Sequence[Path]) -> None:
    """A task vector is what a policy has moved from its start, so all must have the same.

    Args:
        start: a model folder.
        members: model folders in the checkpoints of runs, whose manifests tell their starts.

    Raises:
        RunChanged: one began elsewhere.
    """
    wanted = folders.fingerprint(start)
    for member in members:
        run = Run(member.parents[2])  # NAME/checkpoints/step-N/model
        began = run.manifest()["inputs"].get("start")
        if began != wanted:
            raise RunChanged(
                f"{run.folder} began from other weights than {start}; policies are merged by what "
                "they moved from one start: train it again from there, or leave it out"
            )


def _recalled(bench: Bench, witness: Recorder | None, first: int) -> Iterator[Experience]:
    if witness is not None:
        yield from (each.to(bench.device) for each in witness.recalled(first))


def _learned(
    bench: Bench,
    name: str,
    algorithm: str,
    start: Path,
    policy: Model,
    anchor: Anchor[Model],
    method: Mapping[str, Any],
    sequences: int,
    phase: Phase,
    key: Key,
    train: Updates,
) -> Path:
    """A training's stage; `sequences` are learned from in each update."""
    optimizer = adamw(policy, OptimizerConfig(learning_rate=phase.learning_rate, weight_decay=0.0))
    rows = PromptRows(bench.prompts)
    settings = {"stage": name, **method, **asdict(phase), "sequences_per_step": sequences}

    def updates(begin: int) -> Iterator[Step]:
        batches = rows.batches(key.fold("prompts"), phase.rows, begin * int(method["accumulate"]))
        on_device = (batch.to(bench.device) for batch in batches)
        # Episodes need a library that the trainings do not.
        kept = importlib.util.find_spec("google_crc32c") is not None
        place = bench.folder / name / "rollouts"
        temperature = method["sampling_temperature"]
        notes = {"algorithm": algorithm, "sampling_temperature": temperature}
        with recorder(place, bench.tokenizer, notes=notes) if kept else nullcontext() as witness:
            yield from train(on_device, optimizer, begin, witness)

    stage = Stage(
        name=name,
        steps=phase.steps,
        tokens=phase.rows,
        settings=settings,
        inputs={
            "seed": bench.seed,
            "key": list(key.path),
            "tokenizer": bench.tokenizer.fingerprint(),
            "start": folders.fingerprint(start),
            **bench.inputs,
        },
    )
    return trained(
        stage,
        bench.folder,
        policy,
        bench.tokenizer,
        optimizer,
        updates,
        bench.observe,
        extra=anchor.state,
    )
