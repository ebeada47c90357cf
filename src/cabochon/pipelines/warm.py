"""WARM: several fine-tunings of one reward model, averaged in weight space.

    starts (checkpoints of one run) -> probe: one head on the last of them, shared by all
    start i + head -> member i, with an order of the data, a learning rate and a dropout of its own
    members, ranked out of distribution -> the average of the best

The average is one model, so it costs what one costs; it keeps what the members agree on, and of
wrong labels, which each member has learned in its own way, it keeps less than their ensemble does.

Source: Rame et al. 2024, arXiv:2401.12187, section 3.
Deviations: the paper tunes its backbone on preferred answers and keeps checkpoints of that run
(its Baklava); here the starts are whatever checkpoints are named, and that they belong together is
checked on their weights. Dropout falls on what the head reads (see `algorithms.reward_model`), and
AdamW stands for Adafactor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from cabochon import folders
from cabochon.algorithms import reward_model
from cabochon.core import Key, Step
from cabochon.core.errors import ConfigError, DataError, WeightsMismatch
from cabochon.data.preferences import Pairs, PairTokens, encoded_pairs, with_flipped
from cabochon.data.tokenizer import Tokenizer
from cabochon.evaluation.report import render
from cabochon.models.foreign import ForeignModel
from cabochon.models.gemma.decoder import Gemma
from cabochon.models.reward_head import RewardModel, is_reward_model
from cabochon.pipelines.stages import (
    Event,
    Observe,
    Stage,
    hash_of,
    nobody,
    opened,
    torch_threads,
    trained,
)
from cabochon.pipelines.timing import note_memory, timed, write_json
from cabochon.pipelines.warm_findings import Judged, findings, judge, table
from cabochon.training.optimizers import OptimizerConfig, adamw
from cabochon.weights.folders import merge
from cabochon.weights.formulas import averaged

__all__ = ["Config", "Recipe", "recipe_of", "refuse_strangers", "run"]

KINSHIP = 0.5
"""Least cosine between the matrices of two starts: checkpoints of one run have nearly 1, models
that were initialised apart about 0."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is trained, from what, on what."""

    starts: tuple[str, ...]
    """Model folders to begin from: checkpoints of one run, the longest trained last; the head is
    fitted on that one."""
    data: str
    """Pairs to learn from."""
    held_out: str
    """Pairs like them that none has learned."""
    out_of_distribution: str = ""
    """Pairs of another kind, by which the members are ranked; by `held_out` when absent."""
    members: int = 4
    """M: how many fine-tunings."""
    average: int = 0
    """How many of the best are averaged; 0: all."""
    flipped: float = 0.0
    """Share of the pairs whose labels are swapped before learning, to see what that does."""
    steps: int = 200
    """Updates of each member."""
    batch_size: int = 32
    """Rows of an update, two a pair."""
    learning_rates: tuple[float, ...] = (1e-5, 4e-5, 1e-4)
    """Members take them in turn."""
    dropouts: tuple[float, ...] = (0.05, 0.1)
    """Likewise: shares of what the head reads that are dropped."""
    probe_steps: int = 100
    """Updates of the head alone."""
    probe_learning_rate: float = 1e-3
    context: int = 512
    """Tokens of a prompt with its answer, at most."""
    too_long: Literal["refuse", "drop"] = "refuse"
    """Longer pairs: refuse the first, or drop them all and say how many."""
    unusable: Literal["refuse", "drop"] = "refuse"
    """Rows that are no pairs, likewise."""
    plain: bool = False
    """Prompts and answers are plain texts, not turns of a conversation."""
    judged: int = 1000
    """The models are compared on so many training pairs of each kind of label, at most."""
    seed: int = 0
    device: str = "cpu"
    """cpu, cuda, cuda:1, ..."""
    threads: int = 0
    """Of torch; part of the result, because the order of a sum is. 0: as many as torch takes."""

    def __post_init__(self) -> None:
        if not self.starts:
            raise ConfigError("WARM begins from at least one model folder; name it in starts")
        if self.members < 1 or not 0 <= self.average <= self.members:
            raise ConfigError(
                f"members must be at least 1 and average at most as many, got {self.members} and "
                f"{self.average}"
            )
        if not self.learning_rates or not self.dropouts:
            raise ConfigError("learning_rates and dropouts need at least one value each")
        if not 0.0 <= self.flipped <= 1.0:
            raise ConfigError(f"flipped is a share in [0, 1], got {self.flipped}")
        if self.batch_size < 2 or self.batch_size % 2:
            raise ConfigError(f"a pair is two rows: batch_size must be even, got {self.batch_size}")
        for name in ("steps", "probe_steps", "context", "judged"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for rate in self.dropouts:
            reward_model.Config(dropout=rate)  # refuses what is none


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What tells one member from the others."""

    start: int
    """Which of the starts."""
    learning_rate: float
    dropout: float


def recipe_of(config: Config, member: int) -> Recipe:
    """The recipe of a member: starts, rates and dropouts in turn, shifted as starts come round."""
    starts, rates, drops = len(config.starts), config.learning_rates, config.dropouts
    return Recipe(
        start=member % starts,
        learning_rate=rates[(member + member // starts) % len(rates)],
        dropout=drops[member % len(drops)],
    )


def run(config: Config, folder: Path, observe: Observe = nobody) -> dict[str, object]:
    """The contents of `folder/results.json` after every stage; `folder/report.html` shows them.

    The average is the model folder `folder/warm`.

    Probe and members are run directories in `folder`. One that is complete is left alone, one that
    was interrupted goes on from its last checkpoint, and the result is the same, bit for bit.

    Args:
        config: the recipe.
        folder: where everything goes; made if absent, continued if it holds the same recipe.
        observe: called with every event.

    Raises:
        RunChanged: `folder` was begun with another recipe or other files.
        DataError: the pairs cannot be used.
        WeightsMismatch: the starts are not of one run, or of one architecture.
        TokenizerMismatch: they have different tokenizers.
        KeyboardInterrupt: SIGINT came and everything was saved.
    """
    config = _absolute(config)
    read = [config.data, config.held_out]
    read += [config.out_of_distribution] if config.out_of_distribution else []
    inputs = {
        "seed": config.seed,
        "files": {path: hash_of(path) for path in read},
        "weights": {start: folders.fingerprint(start) for start in config.starts},
    }
    tokenizer = _common_tokenizer(config)
    refuse_strangers([Path(start) for start in config.starts])
    work = _Work(config, tokenizer, folder, observe, *_sets(config, tokenizer, observe))
    settings = {"pipeline": "warm", **asdict(config)}
    with opened(folder, settings, inputs).locked(), torch_threads(config.threads):
        probe = _probe(work)
        members = [_member(work, number, probe) for number in range(config.members)]
        return _compared(work, probe, members)


def refuse_strangers(starts: Sequence[Path]) -> None:
    """Returns if the models may be averaged after fine-tuning: they come from one training.

    Raises:
        WeightsMismatch: shapes differ, or the matrices of two point in other directions than
            checkpoints of one run do.
    """
    first = _matrices(starts[0])
    for other_path in starts[1:]:
        other = _matrices(other_path)
        shapes = {name: tuple(each.shape) for name, each in first.items()}
        if shapes != {name: tuple(each.shape) for name, each in other.items()}:
            raise WeightsMismatch(
                f"{starts[0]} and {other_path} are models of different shapes; members that are "
                "averaged begin from checkpoints of one run"
            )
        product = sum(float((first[n].double() * other[n].double()).sum()) for n in first)
        lengths = [
            sum(float(w.double().square().sum()) for w in m.values()) for m in (first, other)
        ]
        cosine = product / max(1e-300, (lengths[0] * lengths[1]) ** 0.5)
        if not cosine >= KINSHIP:
            raise WeightsMismatch(
                f"{starts[0]} and {other_path} were not trained from the same start (the cosine of "
                f"their matrices is {cosine:.2f}, checkpoints of one run have nearly 1): the "
                "average of what becomes of them would be no model; name checkpoints of one run"
            )


@dataclass(frozen=True)
class _Work:
    """What every stage needs."""

    config: Config
    tokenizer: Tokenizer
    folder: Path
    observe: Observe
    learned: list[PairTokens]
    """Labels as they are learned, right or swapped."""
    compared: dict[str, list[PairTokens]]
    """What models are compared on: corrupted and clean (training pairs), held_out, ood."""

    def trained(
        self, name: str, model: RewardModel, recipe: Recipe, steps: int, key: Key, *, probe: bool
    ) -> Path:
        """The model folder that a training leaves."""
        config = self.config
        optimizer = adamw(
            model, OptimizerConfig(learning_rate=recipe.learning_rate, weight_decay=0.0)
        )
        method = reward_model.Config(steps=steps, dropout=recipe.dropout)
        pairs = Pairs(self.learned)

        def updates(start: int) -> Iterator[Step]:
            batches = pairs.batches(key.fold("batches"), config.batch_size, start)
            on_device = (batch.to(config.device) for batch in batches)
            yield from reward_model.train(
                method, model, on_device, optimizer, key=key, probe=probe, start=start
            )

        stage = Stage(
            name=name,
            steps=steps,
            tokens=config.batch_size * config.context,
            settings={
                "stage": name,
                **asdict(recipe),
                "steps": steps,
                "batch_size": config.batch_size,
                "tokens_per_step": config.batch_size * config.context,
            },
            inputs={
                "seed": config.seed,
                "start": folders.fingerprint(config.starts[recipe.start]),
                "pairs": len(pairs.pairs),
            },
        )
        return trained(stage, self.folder, model, self.tokenizer, optimizer, updates, self.observe)


def _probe(work: _Work) -> Path:
    """The last start with the head that all members share."""
    config = work.config
    last = len(config.starts) - 1
    model = RewardModel(_backbone(config.starts[last], config.device))
    model.backbone.requires_grad_(False)
    recipe = Recipe(start=last, learning_rate=config.probe_learning_rate, dropout=0.0)
    key = Key(config.seed).fold("probe")
    return work.trained("probe", model, recipe, config.probe_steps, key, probe=True)


def _member(work: _Work, number: int, probe: Path) -> Path:
    """A fine-tuning from its start with the shared head."""
    config, recipe = work.config, recipe_of(work.config, number)
    head = folders.load_reward(probe)[0].score.detach().to(config.device)
    model = RewardModel(_backbone(config.starts[recipe.start], config.device), head)
    key = Key(config.seed).fold("member", number)
    return work.trained(f"member-{number}", model, recipe, config.steps, key, probe=False)


def _compared(work: _Work, probe: Path, members: Sequence[Path]) -> dict[str, object]:
    """Members judged and ranked, the best averaged, the average judged beside them."""
    config, folder = work.config, work.folder
    with timed(folder, "evaluation"):
        judged = [_judged(work, path) for path in members]
        ranks_by = "ood" if "ood" in work.compared else "held_out"
        order = sorted(range(len(members)), key=lambda n: -judged[n].accuracy(ranks_by))
        best = sorted(order[: config.average or len(members)])
        place = folder / "warm"
        if not (place / "config.json").is_file():
            _average([members[number] for number in best], place)
        warm = _judged(work, place)
        results = findings(
            work.compared,
            probe=_judged(work, probe),
            members=judged,
            recipes=[asdict(recipe_of(config, number)) for number in range(len(members))],
            order=order,
            best=best,
            ranks_by=ranks_by,
            warm=warm,
        )
    results |= {"seed": config.seed, "threads": torch.get_num_threads(), "model": str(place)}
    write_json(folder / "results.json", results)
    (folder / "report.md").write_text(table(results), encoding="utf-8")
    note_memory(folder)
    render(folder)
    work.observe(Event(stage="evaluation", steps=0, note=f"the average is {place}"))
    return results


def _average(members: Sequence[Path], place: Path) -> None:
    """One folder whose weights are the mean of the members'."""
    if len(members) == 1:
        model, tokenizer = folders.load_reward(members[0])
        folders.save(model, tokenizer, place)
    else:
        merge(averaged(len(members)), list(members), place)


def _judged(work: _Work, path: Path) -> Judged:
    model, _ = folders.load_reward(path, device=work.config.device)
    return judge(model, work.compared, rows=work.config.batch_size)


def _backbone(start: str, device: str) -> Gemma | ForeignModel:
    if is_reward_model(start):
        return folders.load_reward(start, device=device)[0].backbone
    return folders.load_model(start, device=device)


def _sets(
    config: Config, tokenizer: Tokenizer, observe: Observe
) -> tuple[list[PairTokens], dict[str, list[PairTokens]]]:
    """The pairs to learn, and those to compare models on."""
    given = _encoded(config.data, config, tokenizer, observe)
    learned = with_flipped(given, config.flipped, Key(config.seed))
    swapped = [one for one, right in zip(learned, given, strict=True) if one is not right]
    clean = [one for one, right in zip(learned, given, strict=True) if one is right]
    compared = {"corrupted": swapped[: config.judged], "clean": clean[: config.judged]}
    compared["held_out"] = _encoded(config.held_out, config, tokenizer, observe)
    if config.out_of_distribution:
        compared["ood"] = _encoded(config.out_of_distribution, config, tokenizer, observe)
    known = {(pair.prompt, frozenset((pair.chosen, pair.rejected))) for pair in given}
    for name in ("held_out", "ood"):
        for pair in compared.get(name, ()):
            if (pair.prompt, frozenset((pair.chosen, pair.rejected))) in known:
                raise DataError(
                    f"{pair.source} is also in {config.data}; what models are judged on must not "
                    "be learned"
                )
    return learned, {name: pairs for name, pairs in compared.items() if pairs}


def _encoded(path: str, config: Config, tokenizer: Tokenizer, observe: Observe) -> list[PairTokens]:
    unusable: list[str] = []
    noting = unusable if config.unusable == "drop" else None
    found = list(encoded_pairs(path, tokenizer, plain=config.plain, unusable=noting))
    kept = [pair for pair in found if pair.longest <= config.context]
    if len(kept) < len(found) and config.too_long == "refuse":
        long = next(pair for pair in found if pair.longest > config.context)
        raise DataError(
            f"{long.source}: a prompt with its answer has {long.longest} tokens, context is "
            f"{config.context}; raise it, or leave out all such with too_long drop"
        )
    left = len(found) - len(kept) + len(unusable)
    note = f"{len(kept):,} pairs of {path}" + (f", {left:,} left out" if left else "")
    observe(Event(stage="data", steps=0, note=note))
    return list(Pairs(kept).pairs)


def _common_tokenizer(config: Config) -> Tokenizer:
    """The starts' tokenizer.

    Raises:
        WeightsMismatch: they have different ones.
    """
    tokenizers = [Tokenizer.load(start) for start in config.starts]
    for start, other in zip(config.starts[1:], tokenizers[1:], strict=True):
        if (unlike := tokenizers[0].difference(other)) is not None:
            raise WeightsMismatch(
                f"{config.starts[0]} and {start} have different tokenizers ({unlike}); members "
                "that are averaged begin from checkpoints of one run"
            )
    return tokenizers[0]


def _matrices(start: Path) -> dict[str, torch.Tensor]:
    backbone = _backbone(str(start), "cpu")
    return {name: each.detach() for name, each in backbone.named_parameters() if each.ndim == 2}


def _absolute(config: Config) -> Config:
    ood = config.out_of_distribution
    return replace(
        config,
        starts=tuple(str(Path(start).resolve()) for start in config.starts),
        data=str(Path(config.data).resolve()),
        held_out=str(Path(config.held_out).resolve()),
        out_of_distribution=str(Path(ood).resolve()) if ood else "",
    )
