"""WARM where the truth is known: a gold reward of random features, models small enough for seeds.

Inputs have 16 dimensions, the gold reward is a sum of 24 random tanh features of them. A network
of two hidden layers is pre-trained on 12 other sums of these features (three checkpoints), a head
is fitted on its features, and six members are tuned on 600 pairs, of which exactly a quarter have
the wrong label: other orders, learning rates, dropouts and starts. All seeds are one batch of
networks, so what is done for one is done for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cabochon.core import Key
from cabochon.losses.preference import bradley_terry
from cabochon.weights.interpolate import average

INPUTS, WIDTH, FEATURES, TARGETS = 16, 64, 24, 12
MEMBERS, PAIRS, BATCH = 6, 600, 60
RATES, DROPOUTS = (3e-3, 1e-3, 2e-3), (0.05, 0.1)
CANDIDATES, PROMPTS = 64, 300
"""Of best-of-N."""

Networks = dict[str, Tensor]
"""K networks at once: each tensor is K ... ."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Of one set, for each seed."""

    member: Tensor
    """S: mean of the members."""
    ensemble: Tensor
    average: Tensor

    def means(self) -> tuple[float, float, float]:
        """Of member, ensemble and average."""
        each = (self.member, self.ensemble, self.average)
        member, ensemble, merged = (one.mean().item() for one in each)
        return member, ensemble, merged


def difference(values: Tensor) -> tuple[float, float]:
    """Mean over seeds, and the half-width of its 95% interval (normal)."""
    return values.mean().item(), 1.96 * values.std().item() / len(values) ** 0.5


class World:
    """S seeds of the experiment.

    Attributes:
        seeds: S.
    """

    def __init__(self, seeds: int) -> None:
        self.seeds, self._key, self._drawn = seeds, Key(0).fold("warm"), 0
        self._gold = self._normal(seeds, INPUTS, FEATURES) * 1.5 / INPUTS**0.5
        self._share = self._normal(seeds, FEATURES, 1)

    def gold(self, x: Tensor) -> Tensor:
        """S n: the true reward of inputs S n 16."""
        return (torch.tanh(x @ self._gold) @ self._share).squeeze(-1)

    def run(self, steps: int) -> dict[str, Figures]:
        """Set -> figures: accuracies, and the gold reward of the best of 64."""
        starts = self._pretrained()
        x = self._normal(self.seeds, PAIRS, 2, INPUTS)
        good, bad = self._ordered(x)
        flipped = self._flips()
        first = torch.where(flipped[..., None], bad, good)
        second = torch.where(flipped[..., None], good, bad)
        head = self._probe(starts[-1], first, second)
        members = self._tuned(starts, head, first, second, steps)
        kept = {
            "corrupted": (_where(first, flipped), _where(second, flipped)),
            "clean": (_where(first, ~flipped), _where(second, ~flipped)),
            "held out": self._ordered(self._normal(self.seeds, 4000, 2, INPUTS)),
            "shifted": self._ordered(0.5 + 1.5 * self._normal(self.seeds, 4000, 2, INPUTS)),
        }
        found = {name: self._judged(members, *pairs) for name, pairs in kept.items()}
        return {**found, "best of 64": self._best(members)}

    def _pretrained(self) -> list[Networks]:
        targets = self._normal(self.seeds, FEATURES, TARGETS) / FEATURES**0.5
        shapes = {"first": (INPUTS, WIDTH), "second": (WIDTH, WIDTH), "out": (WIDTH, TARGETS)}
        networks = {
            name: self._normal(self.seeds, *shape) / shape[0] ** 0.5
            for name, shape in shapes.items()
        } | {name: torch.zeros(self.seeds, 1, WIDTH) for name in ("bias", "other_bias")}

        def loss(_: int) -> Tensor:
            x = self._normal(self.seeds, 256, INPUTS)
            wanted = torch.tanh(x @ self._gold) @ targets
            apart: Tensor = features(networks, x) @ networks["out"] - wanted
            return apart.square().mean((1, 2))

        return [
            {name: each.detach().clone() for name, each in networks.items() if name != "out"}
            for step in descended(networks, loss, 1500, torch.tensor(3e-3))
            if step + 1 in (1000, 1250, 1500)
        ]

    def _flips(self) -> Tensor:
        """S n bool: exactly a quarter of each seed's pairs."""
        flipped = torch.zeros(self.seeds, PAIRS, dtype=torch.bool)
        for row in flipped:
            row[torch.randperm(PAIRS, generator=self._stream())[: PAIRS // 4]] = True
        return flipped

    def _probe(self, start: Networks, first: Tensor, second: Tensor) -> Tensor:
        head = {"head": torch.zeros(self.seeds, WIDTH, 1)}
        good, bad = features(start, first), features(start, second)

        def loss(_: int) -> Tensor:
            scores = [(each @ head["head"]).squeeze(-1) for each in (good, bad)]
            return bradley_terry(scores[0], scores[1]).mean(1)

        for _ in descended(head, loss, 200, torch.tensor(1e-2)):
            pass
        return head["head"].detach()

    def _tuned(
        self, starts: list[Networks], head: Tensor, first: Tensor, second: Tensor, steps: int
    ) -> Networks:
        """(S M) ...: the members of each seed one after another."""
        stacked = {
            name: torch.stack([starts[m % len(starts)][name] for m in range(MEMBERS)], 1).flatten(
                0, 1
            )
            for name in starts[0]
        } | {"head": head.repeat_interleave(MEMBERS, 0)}
        rate = torch.tensor([RATES[m % 3] for m in range(MEMBERS)]).repeat(self.seeds)[
            :, None, None
        ]
        drop = torch.tensor([DROPOUTS[m % 2] for m in range(MEMBERS)]).repeat(self.seeds)
        count = self.seeds * MEMBERS
        pair = [each.repeat_interleave(MEMBERS, 0) for each in (first, second)]
        order = torch.zeros(0)

        def loss(step: int) -> Tensor:
            nonlocal order
            place = step % (PAIRS // BATCH)
            if place == 0:
                order = torch.rand(count, PAIRS, generator=self._stream()).argsort(1)
            chosen = order[:, place * BATCH : (place + 1) * BATCH, None].expand(-1, -1, INPUTS)
            noise = torch.rand(count, BATCH, WIDTH, generator=self._stream())
            kept = (noise >= drop[:, None, None]).float() / (1.0 - drop[:, None, None])
            scores = [
                (features(stacked, each.gather(1, chosen)) * kept @ stacked["head"]).squeeze(-1)
                for each in pair
            ]
            return bradley_terry(scores[0], scores[1]).mean(1)

        for _ in descended(stacked, loss, steps, rate):
            pass
        return {name: each.detach() for name, each in stacked.items()}

    def _judged(self, members: Networks, good: Tensor, bad: Tensor) -> Figures:
        each = self._scores(members, good) - self._scores(members, bad)
        merged = self._merged(members)
        whole = score(merged, good) - score(merged, bad)
        return Figures(
            member=_accuracy(each).mean(1),
            ensemble=_accuracy(each.mean(1)),
            average=_accuracy(whole),
        )

    def _best(self, members: Networks) -> Figures:
        """Gold reward, in its standard deviations, of the best of 64 by each judge."""
        x = self._normal(self.seeds, PROMPTS * CANDIDATES, INPUTS)
        gold = self.gold(x)
        gold = ((gold - gold.mean()) / gold.std()).view(self.seeds, PROMPTS, CANDIDATES)

        def kept(scores: Tensor) -> Tensor:
            chosen = scores.view(self.seeds, PROMPTS, CANDIDATES).argmax(-1, keepdim=True)
            return gold.gather(2, chosen).mean((1, 2))

        each = self._scores(members, x)
        return Figures(
            member=torch.stack([kept(each[:, m]) for m in range(MEMBERS)]).mean(0),
            ensemble=kept(each.mean(1)),
            average=kept(score(self._merged(members), x)),
        )

    def _scores(self, members: Networks, x: Tensor) -> Tensor:
        """S M n."""
        return score(members, x.repeat_interleave(MEMBERS, 0)).view(self.seeds, MEMBERS, -1)

    def _merged(self, members: Networks) -> Networks:
        """S ...: each seed's members averaged."""
        apart = {name: each.unflatten(0, (self.seeds, MEMBERS)) for name, each in members.items()}
        return average([{n: each[:, m] for n, each in apart.items()} for m in range(MEMBERS)])

    def _ordered(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The better and the worse of each pair, S n 16 each, of S n 2 16."""
        gold = self.gold(x.flatten(1, 2)).unflatten(1, (-1, 2))
        first = (gold[..., 0] > gold[..., 1])[..., None]
        left, right = x[:, :, 0], x[:, :, 1]
        return torch.where(first, left, right), torch.where(first, right, left)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._stream())

    def _stream(self) -> torch.Generator:
        self._drawn += 1
        return self._key.fold(self._drawn).generator()


def features(networks: Networks, x: Tensor) -> Tensor:
    """K n 64: the second hidden layer."""
    hidden = torch.tanh(torch.baddbmm(networks["bias"], x, networks["first"]))
    return torch.tanh(torch.baddbmm(networks["other_bias"], hidden, networks["second"]))


def score(networks: Networks, x: Tensor) -> Tensor:
    """K n."""
    return (features(networks, x) @ networks["head"]).squeeze(-1)


def descended(
    networks: Networks, loss: Callable[[int], Tensor], steps: int, rate: Tensor
) -> Iterator[int]:
    """Adam's steps, each network for itself: `rate` is one number, or K 1 1."""
    values = [each.requires_grad_() for each in networks.values()]
    mean = [torch.zeros_like(each) for each in values]
    square = [torch.zeros_like(each) for each in values]
    for step in range(steps):
        gradients = torch.autograd.grad(loss(step).sum(), values)
        with torch.no_grad():
            for value, gradient, m, v in zip(values, gradients, mean, square, strict=True):
                m.mul_(0.9).add_(gradient, alpha=0.1)
                v.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
                upright = (v / (1.0 - 0.999 ** (step + 1))).sqrt_().add_(1e-8)
                value.sub_(rate * (m / (1.0 - 0.9 ** (step + 1))) / upright)
        yield step


def _where(x: Tensor, chosen: Tensor) -> Tensor:
    """S n 16: as many of each seed."""
    return x[chosen].reshape(len(x), -1, INPUTS)


def _accuracy(margin: Tensor) -> Tensor:
    share: Tensor = (margin > 0.0).float().mean(-1)
    return share
