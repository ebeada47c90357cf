"""R2D2: recurrent Q-learning from a prioritised replay of sequences with stored state.

Source: Kapturowski et al. 2019, "Recurrent Experience Replay in Distributed Reinforcement
Learning", ICLR; as in SEED RL, Espeholt et al. 2020, arXiv:1910.06591, whose replay ratio and
priority exponent are taken. Double Q: arXiv:1509.06461. Rescaled values: arXiv:1805.11593.
Deviations: an episode that is cut short is worth the value of its last observation; in SEED's code
truncation is an end. The state of a sequence is the one from before its first observation; there it
is that of `burn_in` steps later. The first `burn_in` actions of an environment's run are not
learned. First priorities take for the value of an observation that nobody was asked about (a
sequence's last, or where a cut left off) the one before.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import count, islice

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from cabochon.core import Key, Loss, Objective, Step
from cabochon.core.errors import ConfigError
from cabochon.losses import temporal_difference as td
from cabochon.models.agents.networks import AgentNetwork
from cabochon.rl.collector import Collector, Cutting
from cabochon.rl.replay import Pace, Replay, inserts_before
from cabochon.rl.sequences import SequenceBatch, items_of, spec_of
from cabochon.rl.unrolls import Unroll
from cabochon.training.fit import fit

__all__ = [
    "Config",
    "carried",
    "first_priority",
    "new_replay",
    "objective",
    "td_errors",
    "train",
]

Heard = Callable[[SequenceBatch, Tensor], None]
"""Is told the new priorities (B) of a batch when it was learned from."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is learned from which sequences, for how long."""

    steps: int = 10_000
    """Updates in all, those before an interruption included."""
    batch_size: int = 32
    """Sequences of an update."""
    unroll_length: int = 40
    """Steps of a sequence that are learned."""
    burn_in: int = 20
    """Steps before them that bring the stored state up to date."""
    stored_state: bool = True
    """Begin a sequence with the state that the actor had; with zeros otherwise."""
    horizon: int = 5
    """n: rewards that are summed before a value takes over."""
    discount: float = 0.997
    double: bool = True
    """The learning network chooses the action that the target network judges."""
    rescaling: float = 1e-3
    """e of h(x) = sign(x) (sqrt(|x| + 1) - 1) + e x."""
    target_every: int = 100
    """Updates between two copies of the network that gives the targets."""
    capacity: int = 2_000
    """Sequences that the replay holds."""
    minimum: int = 50
    """Sequences that it must hold before the first update."""
    replay_ratio: float = 1.5
    """How often a sequence is drawn, on average."""
    priority_exponent: float = 0.9
    importance_exponent: float = 0.6
    eta: float = 0.9
    """Priority: eta of the largest error of a sequence, the rest of the mean one."""
    finals: int = 4
    """How many episodes may be cut short within a sequence; more are an error."""
    max_grad_norm: float = 40.0
    """Longer mean gradients are shortened to this norm."""

    def __post_init__(self) -> None:
        for wrong, reason in (
            (min(self.steps, self.batch_size, self.horizon, self.target_every, self.minimum) < 1,
             "steps, batch_size, horizon, target_every and minimum must be at least 1"),
            (self.burn_in < 0 or self.unroll_length < 1, "burn_in must be at least 0 and "
             f"unroll_length at least 1, got {self.burn_in} and {self.unroll_length}"),
            (not 0.0 <= self.discount <= 1.0, f"discount must be in [0, 1], got {self.discount}"),
            (not 0.0 <= self.eta <= 1.0, f"eta must be in [0, 1], got {self.eta}"),
            (not 0.0 <= self.importance_exponent <= 1.0, "importance_exponent must be in [0, 1], "
             f"got {self.importance_exponent}"),
            (not 0.0 <= self.priority_exponent < np.inf, "priority_exponent must be at least 0"),
            (not 0.0 < self.replay_ratio < np.inf,
             f"replay_ratio must be above 0, got {self.replay_ratio}"),
            (self.capacity < self.minimum, "the replay must hold its minimum: capacity "
             f"{self.capacity}, minimum {self.minimum}"),
            (self.finals < 0, f"finals must not be negative, got {self.finals}"),
            (not self.rescaling >= 0.0, f"rescaling must be at least 0, got {self.rescaling}"),
            (not self.max_grad_norm > 0.0, "max_grad_norm must be above 0"),
        ):  # fmt: skip
            if wrong:
                raise ConfigError(reason)

    @property
    def cutting(self) -> Cutting:
        """How sequences are cut; so many wait as an update needs."""
        news = math.ceil(self.batch_size / self.replay_ratio)
        return Cutting(length=self.unroll_length, overlap=self.burn_in, batch=news)

    @property
    def accumulate(self) -> int:
        """Micro-batches of an update."""
        return 1


def new_replay(config: Config, network: AgentNetwork) -> Replay:
    """An empty replay for what `network` sees and remembers."""
    times = config.burn_in + config.unroll_length + 1
    spec = spec_of(network, times, config.finals)
    return Replay(spec, config.capacity, config.priority_exponent)


def carried(replay: Replay, target: AgentNetwork) -> dict[str, Tensor]:
    """What a checkpoint holds of the learner beside network and optimizer, restored in place."""
    found = {f"replay.{name}": tensor for name, tensor in replay.state.items()}
    return found | {f"target.{name}": tensor for name, tensor in target.state_dict().items()}


def td_errors(
    config: Config, network: AgentNetwork, target: AgentNetwork, batch: SequenceBatch
) -> tuple[Tensor, Tensor]:
    """U B each: target minus prediction on the rescaled scale, and the prediction."""
    begin, end = config.burn_in, config.burn_in + config.unroll_length + 1
    state = batch.state
    if not config.stored_state:
        state = tuple(torch.zeros_like(part) for part in state)
    own_state, target_state = state, state
    with torch.no_grad():
        if begin:
            own_state = batch.read(network, 0, begin, state).state
            target_state = batch.read(target, 0, begin, state).state
        judged = batch.read(target, begin, end, target_state)
    said = batch.read(network, begin, end, own_state)
    with torch.no_grad():
        chooser = said if config.double else judged
        values = _worth(config, chooser.outputs["q"], judged.outputs["q"])
        none = values.new_zeros(0)
        left = _worth(config, chooser.finals["q"], judged.finals["q"]) if judged.finals else none
        targets = td.n_step_targets(
            batch.reward[begin + 1 :],
            batch.terminated[begin + 1 :],
            batch.truncated[begin + 1 :],
            values,
            batch.place_finals(left, begin),
            discount=config.discount,
            steps=config.horizon,
        )
    actions = batch.previous_action[begin + 1 :].unsqueeze(-1)
    chosen = said.outputs["q"][:-1].gather(-1, actions).squeeze(-1)
    return td.rescale(targets, config.rescaling) - chosen, chosen


def objective(
    config: Config, target: AgentNetwork, heard: Heard | None = None
) -> Objective[AgentNetwork, SequenceBatch]:
    """Half the squared errors of each sequence, summed, times its weight; a unit is a sequence."""

    def loss(network: AgentNetwork, batch: SequenceBatch) -> Loss:
        errors, chosen = td_errors(config, network, target, batch)
        learned = torch.ones_like(errors, dtype=torch.bool)
        priorities = td.sequence_priorities(errors, learned, config.eta)
        if heard is not None:
            heard(batch, priorities)
        report = {"priority": priorities.sum(), "q": chosen.detach().mean(0).sum()}
        total = (td.sequence_losses(errors, learned) * batch.weights).sum()
        weight = torch.tensor(float(errors.shape[1]), device=total.device)
        return Loss(total=total, weight=weight, report=report)

    return loss


def first_priority(config: Config, unroll: Unroll) -> float:
    """The priority of a new sequence, by what the acting network said of it."""
    q = torch.from_numpy(unroll.outputs["q"][config.burn_in :])
    after = {
        name: torch.from_numpy(getattr(unroll, name)[config.burn_in + 1 :, None])
        for name in ("reward", "terminated", "truncated")
    }
    values = _worth(config, q, q)[:, None]
    values = torch.cat([values, values[-1:]])  # nobody was asked about the last observation
    targets = td.n_step_targets(
        after["reward"], after["terminated"], after["truncated"], values, values[:-1],
        discount=config.discount, steps=config.horizon,
    )  # fmt: skip
    actions = torch.from_numpy(unroll.action[config.burn_in :, None])
    errors = td.rescale(targets, config.rescaling) - q.gather(-1, actions)
    learned = torch.ones_like(errors, dtype=torch.bool)
    return float(td.sequence_priorities(errors, learned, config.eta))


def train(
    config: Config,
    network: AgentNetwork,
    target: AgentNetwork,
    replay: Replay,
    collector: Collector,
    optimizer: Optimizer,
    *,
    key: Key,
    pace: Pace | None = None,
    start: int = 0,
) -> Iterator[Step]:
    """The updates from `start` to the last.

    Args:
        config: what the run tunes.
        network: learns; those who play read it.
        target: a copy of the network that needs no gradient.
        replay: of `new_replay`.
        collector: made with `config.cutting`; is asked for as many sequences as the replay ratio
            wants, which makes it exact. Restored where `start` is not 0.
        optimizer: of the network's parameters.
        key: of what is drawn from the replay.
        pace: is told how long the learner waited and learned.
        start: how many updates were already made.

    Raises:
        ConfigError: the collector cuts other sequences than these.
        DataError: environments failed again and again, or a sequence has more cuts than `finals`.
    """
    if collector.cutting != config.cutting:
        raise ConfigError(f"the collector cuts {collector.cutting}, expected {config.cutting}")
    news: list[tuple[SequenceBatch, Tensor]] = []
    learn = objective(config, target, lambda batch, priorities: news.append((batch, priorities)))
    batches = _drawn(config, network, replay, collector, key, pace or Pace(), start)
    steps = fit(network, learn, batches, optimizer, max_grad_norm=config.max_grad_norm, start=start)
    for step in islice(steps, max(0, config.steps - start)):
        while news:
            batch, priorities = news.pop()
            replay.prioritise(batch.numbers, priorities.numpy(force=True))
        if (step.index + 1) % config.target_every == 0:
            target.load_state_dict(network.state_dict())
        seen = {"sequences": float(replay.inserted), "stored": float(len(replay))}
        yield replace(step, report={**step.report, **seen, **collector.report()})


def _drawn(
    config: Config,
    network: AgentNetwork,
    replay: Replay,
    collector: Collector,
    key: Key,
    pace: Pace,
    start: int,
) -> Iterator[SequenceBatch]:
    device = next(network.parameters()).device
    since = time.perf_counter()
    for update in count(start):
        due = inserts_before(
            update, batch=config.batch_size, ratio=config.replay_ratio, minimum=config.minimum
        )
        begun = time.perf_counter()
        for unroll in collector.take(due - replay.inserted, update):
            priority = np.array([first_priority(config, unroll)])
            replay.insert(items_of(unroll, config.finals), priority)
        pace.learning += begun - since
        since = time.perf_counter()
        pace.waiting += since - begun
        drawn = replay.draw(config.batch_size, key.fold("replay", update).numpy())
        chance = torch.from_numpy(drawn.probabilities)
        weights = td.importance_weights(chance, drawn.stored, config.importance_exponent)
        yield SequenceBatch.of(drawn, weights, device)


def _worth(config: Config, chooses: Tensor, judges: Tensor) -> Tensor:
    """...: of the preferred action, as a return."""
    return td.unscale(td.double_q_values(chooses, judges), config.rescaling)
