"""BOND's claims in worlds whose every law is a sum: Jeffreys, J-BOND's fixed point, its anchor.

Run as a program with a number of seeds, this file prints the tables of docs/papers/bond.md.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev

import pytest
import torch
from torch import Tensor

from cabochon.algorithms import bond
from cabochon.core import Key, TokenBatch
from cabochon.generation.best_of_n import best_of_n_logprob, log_quantiles
from cabochon.models.critic import Critic
from cabochon.training.anchors import anchor_of

sys.path.append(str(Path(__file__).parents[1] / "algorithms"))
from one_token_worlds import OneToken, Pairs, Shared, experiences, tabular

# --- (a) Jeffreys, exactly -----------------------------------------------------------------------

OUTCOMES, N, HUMPS = 64, 8, 4
BETAS = (0.0, 0.25, 0.5, 0.75, 1.0)


def humps(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A reference, rewards with several modes, and three features that cannot follow them."""
    generator = Key(seed).fold("bond").generator()
    place = torch.linspace(-1, 1, OUTCOMES, dtype=torch.float64)
    phase = 2 * math.pi * torch.rand((), generator=generator).double()
    noise = torch.randn(OUTCOMES, generator=generator).double()
    reward = torch.sin(HUMPS * math.pi * place + phase) + 0.3 * noise
    reference = torch.full_like(place, -math.log(OUTCOMES))
    return reference, reward, torch.stack([place, place**2, place**3], 1)


def jeffreys(seed: int, beta: float) -> tuple[float, float, float]:
    """KL(best-of-8 || pi), KL(pi || best-of-8), E log p_<= of the member of the exponential family
    that descent from the reference ends at."""
    reference, reward, features = humps(seed)
    target = best_of_n_logprob(reference, reward, N)
    theta = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    descent = torch.optim.LBFGS(
        [theta], max_iter=400, line_search_fn="strong_wolfe", tolerance_grad=1e-8
    )

    def both() -> tuple[Tensor, Tensor, Tensor]:
        law = (reference + features @ theta).log_softmax(-1)
        forward = (target.exp() * (target - law)).sum()
        return law, forward, (law.exp() * (law - target)).sum()

    def closure() -> Tensor:
        descent.zero_grad()
        _, forward, backward = both()
        total = (1 - beta) * forward + beta * backward
        total.backward()
        return total

    descent.step(closure)
    law, forward, backward = (each.detach() for each in both())
    _, at_most = log_quantiles(reference, reward)
    return float(forward), float(backward), float((law.exp() * at_most).sum())


def means(beta: float, seeds: int) -> list[float]:
    return [mean(each) for each in zip(*(jeffreys(n, beta) for n in range(seeds)), strict=True)]


@pytest.mark.claim
def test_jeffreys_is_close_to_both_minima_where_each_divergence_alone_is_far_from_the_other() -> (
    None
):
    table = {beta: means(beta, 5) for beta in BETAS}
    forward, middle, backward = table[0.0], table[0.5], table[1.0]
    assert middle[0] < forward[0] + 0.5
    assert middle[1] < backward[1] + 0.5
    assert backward[0] > forward[0] + 1.0
    assert forward[1] > backward[1] + 1.0
    quantiles = [table[beta][2] for beta in BETAS]
    assert quantiles == sorted(quantiles)


# --- (b), (c) J-BOND, sampled --------------------------------------------------------------------


def trained(
    config: bond.Config, policy: OneToken, worth: Tensor, learning_rate: float, seed: int
) -> Iterator[tuple[int, float, float]]:
    """After every update its index, the expected reward, and KL to the start, over the prompts."""
    start, anchor = policy.law(), anchor_of(policy, config.anchor_config)
    optimizer = torch.optim.Adam(policy.parameters(), lr=learning_rate)
    source = experiences(config, policy, anchor, worth, Key(seed))
    for step in bond.train(
        config, policy, anchor, (), optimizer, key=Key(seed), stop_ids=(), source=source
    ):
        yield step.index, *judged(policy.law(), start, worth)


def judged(law: Tensor, start: Tensor, worth: Tensor) -> tuple[float, float]:
    reward = (law.exp() * worth).sum(-1).mean()
    return float(reward), float((law.exp() * (law - start)).sum(-1).mean())


def best_of(start: Tensor, worth: Tensor, n: int) -> tuple[float, float]:
    """Reward and KL of the exact law."""
    return judged(best_of_n_logprob(start, worth, n), start, worth)


def table_world(seed: int) -> tuple[OneToken, Tensor]:
    key = Key(seed).fold("table")
    start = torch.randn(16, 32, generator=key.fold("start").generator())
    return tabular(start), torch.randn(16, 32, generator=key.fold("reward").generator())


def ends(rate: float, steps: int, seed: int) -> tuple[tuple[float, float], Tensor, Tensor]:
    """Where J-BOND leads in a table; and start and rewards of it."""
    policy, worth = table_world(seed)
    config = bond.Config(
        anchor_rate=rate, steps=steps, warmup=0, max_new_tokens=1,
        schedule="constant" if rate else "cosine", floor=0.02,
    )  # fmt: skip
    start = policy.law()
    *_, (_, reward, kl) = trained(config, policy, worth, 0.05, seed)
    return (reward, kl), start, worth


@pytest.mark.claim
def test_a_frozen_anchor_is_left_for_its_best_of_two_and_an_ema_anchor_goes_on_beyond_16() -> None:
    gaps = []
    for seed in range(2):
        (reward, kl), start, worth = ends(0.0, 600, seed)
        wanted, exact = best_of(start, worth, 2)
        gaps.append((reward - wanted, kl - exact))
    assert abs(mean(gap for gap, _ in gaps)) < 0.04
    assert abs(mean(gap for _, gap in gaps)) < 0.04
    (reward, kl), start, worth = ends(0.02, 600, 0)
    assert reward > best_of(start, worth, 16)[0]
    assert kl > best_of(start, worth, 16)[1]


ANCHORS = {
    "EMA, eta 0.02": {"anchor_rate": 0.02},
    "copied every 50": {"anchor": "copy", "anchor_every": 50},
    "frozen": {"anchor": "frozen"},
}


def front(anchor: str, seed: int, steps: int) -> list[tuple[float, float]]:
    """(KL, reward) after every tenth update of a network that all prompts share."""
    key = Key(seed).fold("shared")
    policy = OneToken(Shared(16, 32, key.fold("weights")), 16)
    worth = torch.randn(16, 32, generator=key.fold("reward").generator())
    config = bond.Config(steps=steps, warmup=0, max_new_tokens=1, **ANCHORS[anchor])  # type: ignore[arg-type]
    found = trained(config, policy, worth, 1e-3, seed)
    return [(kl, reward) for index, reward, kl in found if index % 10 == 9]


def at_kl(points: list[tuple[float, float]], kl: float) -> float:
    """Reward where the path first reaches this KL, between its two neighbours."""
    for (a, low), (b, high) in pairwise(points):
        if a <= kl <= b:
            return low + (high - low) * (kl - a) / (b - a)
    raise AssertionError(f"the path ends at {points[-1]}, before KL {kl}")


@pytest.mark.claim
def test_an_anchor_that_follows_slowly_pays_less_kl_than_one_that_is_copied() -> None:
    """At equal KL more reward; and a frozen one stays where it was, near the best of two."""
    ema, copied = (front(name, 0, 500) for name in ("EMA, eta 0.02", "copied every 50"))
    for kl in (1.0, 1.5):
        assert at_kl(ema, kl) > at_kl(copied, kl) + 0.02
    frozen = front("frozen", 0, 300)
    assert 0.05 < frozen[-1][0] < 0.4
    assert frozen[-1][1] < at_kl(ema, 1.0)


# --- (d) quantiles, learned and counted -----------------------------------------------------------

QUANTILES = {
    "counted, k = 4": {"anchor_samples": 4},
    "counted, k = 8": {"anchor_samples": 8},
    "counted, k = 16": {"anchor_samples": 16},
    "learned, k = 1": {"anchor_samples": 1, "quantile": "learned"},
}


def by_quantiles(name: str, seed: int) -> tuple[float, float]:
    """KL(policy || best of 4) that is left, and the error of the quantiles under the policy."""
    policy, worth = table_world(seed)
    start = policy.law()
    config = bond.Config(
        n=4, backward=1.0, samples=2, anchor="frozen", steps=500, warmup=0, max_new_tokens=1,
        schedule="cosine", floor=0.02, **({"quantile": "floor"} | QUANTILES[name]),
    )  # fmt: skip
    learned = config.quantile == "learned"
    quantiles = Critic(16 * 32, Pairs(16, 32), torch.device("cpu")) if learned else None
    groups = [{"params": [*policy.parameters()], "lr": 0.05}]
    if quantiles is not None:
        groups.append({"params": [*quantiles.parameters()], "lr": 0.2})
    anchor = anchor_of(policy, config.anchor_config)
    source = experiences(config, policy, anchor, worth, Key(seed))
    optimizer = torch.optim.Adam(groups)
    for _ in bond.train(
        config, policy, anchor, (), optimizer, key=Key(seed), stop_ids=(), source=source,
        quantiles=quantiles,
    ):  # fmt: skip
        pass
    law = policy.law()
    wanted = best_of_n_logprob(start, worth, 4)
    p = log_quantiles(start, worth)[1].exp()
    error = p * (1 - p) / config.anchor_samples
    if quantiles is not None:
        with torch.no_grad():
            rows = TokenBatch.of([[prompt, y] for prompt in range(16) for y in range(32)])
            error = (quantiles.at_ends(rows, policy(rows)).sigmoid().view(16, 32) - p).square()
    weighted = (law.exp() * error).sum(-1).mean().sqrt()
    return float((law.exp() * (law - wanted)).sum(-1).mean()), float(weighted)


@pytest.mark.claim
def test_a_quantile_learned_from_one_draw_is_nearer_than_eight_counted_and_costs_updates() -> None:
    learned, eight = (by_quantiles(name, 0) for name in ("learned, k = 1", "counted, k = 8"))
    assert learned[1] < eight[1]
    assert learned[0] < 2.5 * eight[0]  # nothing is learned from it before it has learned


def table_of_quantiles(seeds: int) -> None:
    say("| quantiles | KL(policy to best of 4) | error of p under the policy |")
    for name in QUANTILES:
        kls, errors = zip(*(by_quantiles(name, seed) for seed in range(seeds)), strict=True)
        say(f"| {name} | {spread(kls)} | {spread(errors)} |")


def table_of_jeffreys(seeds: int) -> None:
    for beta in BETAS:
        say(f"| {beta:g} | " + " | ".join(f"{each:.2f}" for each in means(beta, seeds)) + " |")


def table_of_tables(seeds: int) -> None:
    rows: dict[str, list[tuple[float, float]]] = {}
    for seed in range(seeds):
        for rate, steps in ((0.0, 600), (0.02, 600)):
            found, start, worth = ends(rate, steps, seed)
            rows.setdefault(f"J-BOND, eta {rate:g}, {steps} updates", []).append(found)
        for n in (2, 16, 64):
            rows.setdefault(f"best of {n}, exact", []).append(best_of(start, worth, n))
    for name, found in rows.items():
        say(f"| {name} | " + " | ".join(spread(each) for each in zip(*found, strict=True)) + " |")


def table_of_anchors(seeds: int) -> None:
    for name in ANCHORS:
        paths = [front(name, seed, 800) for seed in range(seeds)]
        last = [spread(each) for each in zip(*(path[-1] for path in paths), strict=True)]
        found = []
        for kl in (0.5, 1.0, 1.5):
            reached = [path for path in paths if path[-1][0] > kl]
            values = [at_kl(path, kl) for path in reached]
            found.append(f"{spread(values)}" if len(reached) == seeds else "-")
        say(f"| {name} | " + " | ".join([*found, last[1], last[0]]) + " |")


def spread(values: object) -> str:
    found = list(values)  # type: ignore[call-overload]
    return f"{mean(found):.3f}" + (f" ({stdev(found):.3f})" if len(found) > 1 else "")


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    torch.set_num_threads(1)
    table_of_jeffreys(5)
    table_of_tables(int(sys.argv[1]))
    table_of_anchors(int(sys.argv[1]))
    table_of_quantiles(int(sys.argv[1]))
