"""BOND and J-BOND: what is drawn and learned, how the anchor moves, what is refused."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from one_token_worlds import OneToken, Pairs, batches, by_table, experiences, tabular
from torch import Tensor, nn

from cabochon.algorithms import bond
from cabochon.core import Completion, Group, Key, Step, TokenBatch
from cabochon.core.errors import ConfigError, DataError, NonFinite
from cabochon.generation.best_of_n import best_of_n_logprob, log_quantiles
from cabochon.models.critic import Critic, critic_of
from cabochon.models.gemma import Gemma, preset
from cabochon.rewards.comparison import Drawn
from cabochon.rewards.experience import Experience
from cabochon.rewards.records import recorder, replayed
from cabochon.rewards.scores import Scores
from cabochon.training import OptimizerConfig, adamw
from cabochon.training.anchors import Anchor, AnchorConfig, anchor_of

VOCABULARY, EOS, BOS = 40, 1, 2
GEMMA = replace(
    preset("gemma2-nano"), vocab_size=VOCABULARY, width=16, layers=2, heads=2, head_width=8,
    kv_heads=1, ffn_width=24, query_scalar=8, window=4, context=32, eos_id=EOS, bos_id=BOS,
)  # fmt: skip
SAMPLED = bond.Config(n=3, quantile="floor", anchor_samples=4, samples=2, max_new_tokens=6)
"""BOND; the default is J-BOND."""


def gemma(seed: int = 0) -> Gemma:
    model = Gemma.init(GEMMA, Key(seed))
    with torch.no_grad():
        model.embedding.mul_(8.0)  # so that it has opinions
    return model


def prompts(number: int, rows: int = 3) -> TokenBatch:
    generator = Key(number).fold("prompts").generator()
    found = [torch.randint(3, VOCABULARY, (4 + n,), generator=generator) for n in range(rows)]
    return TokenBatch.of(found, masks=[[False] * len(each) for each in found])


def sum_of_tokens(groups: Sequence[Group]) -> Tensor:
    """A reward with hardly any equals."""
    return torch.tensor(
        [[float(c.tokens.sum()) / 10 + len(c.tokens) / 7 for c in g.completions] for g in groups]
    )


def parity(groups: Sequence[Group]) -> Tensor:
    """A reward of two values."""
    return torch.tensor([[float(c.tokens.sum() % 2) for c in g.completions] for g in groups])


class Life:
    """A model, its anchor and its optimizer, from the same start each time."""

    def __init__(self, config: bond.Config, learning_rate: float = 1e-2) -> None:
        self.config, self.model = config, gemma()
        self.anchor: Anchor[Any] = anchor_of(self.model, config.anchor_config)
        learned = config.quantile == "learned"
        self.quantiles = critic_of(self.model, config.quantile_model) if learned else None
        learning = nn.ModuleList([self.model, *([self.quantiles] if self.quantiles else [])])
        self.optimizer = adamw(learning, OptimizerConfig(learning_rate=learning_rate))

    def run(self, start: int = 0, **more: Any) -> list[Step]:
        taken = start * self.config.accumulate
        if "source" not in more:
            more.setdefault("reward", sum_of_tokens)
        more.setdefault("batches", (prompts(number) for number in itertools.count(taken)))
        return list(
            bond.train(
                self.config, self.model, self.anchor, more.pop("batches"), self.optimizer,
                key=Key(5), stop_ids=(EOS,), start=start, quantiles=self.quantiles, **more,
            )
        )  # fmt: skip

    @property
    def beside(self) -> dict[str, Tensor]:
        """What a checkpoint keeps beside model and optimizer."""
        return {**self.anchor.state, **(self.quantiles.state() if self.quantiles else {})}

    def bits(self) -> list[Tensor]:
        return [*self.model.state_dict().values(), *self.beside.values()]


def same(one: Life, other: Life) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.bits(), other.bits(), strict=True))


def lived(config: bond.Config, **more: Any) -> Life:
    life = Life(config)
    life.run(**more)
    return life


J_BOND = bond.Config(steps=4, max_new_tokens=6)
BOND = replace(SAMPLED, steps=4)
LEARNED = replace(J_BOND, quantile="learned")
ALONE = replace(LEARNED, quantile_model="network", backward=1.0, n=4, anchor_samples=1)
"""With a network of its own, and one draw of the anchor for each prompt."""


# --- what is drawn -------------------------------------------------------------------------------


def drawn(config: bond.Config, step: int = 0, batch: TokenBatch | None = None) -> list[Experience]:
    life = Life(config)
    return list(
        bond.experiences(
            config, life.model, life.anchor, iter([batch or prompts(0)]), reward=sum_of_tokens,
            key=Key(5), stop_ids=(EOS,), start=step,
        )
    )  # fmt: skip


def tokens(found: Experience) -> list[list[list[int]]]:
    return [[each.tokens.tolist() for each in group.completions] for group in found.groups]


def test_each_micro_batch_has_samples_of_the_policy_and_of_the_anchor() -> None:
    own, others = drawn(replace(BOND, accumulate=2), step=3)
    assert [(e.writer, e.number, e.version) for e in (own, others)] == [
        ("policy", 6, 3), ("anchor", 6, 3),
    ]  # fmt: skip
    assert [len(g.completions) for g in own.groups] == [2] * 3
    assert [len(g.completions) for g in others.groups] == [4] * 3
    # The same model writes both at the start, from streams of their own.
    assert not any(
        set(map(str, a)) <= set(map(str, b))
        for a, b in zip(tokens(own), tokens(others), strict=True)
    )


def test_a_draw_depends_on_step_and_row_alone() -> None:
    first, again, later = (drawn(J_BOND, step) for step in (3, 3, 4))
    assert [tokens(e) for e in first] == [tokens(e) for e in again]
    assert tokens(first[0]) != tokens(later[0])
    alone = drawn(J_BOND, 3, prompts(0).rows(0, 1))
    assert [tokens(e)[0] for e in alone] == [tokens(e)[0] for e in first]


# --- what is learned -----------------------------------------------------------------------------


@pytest.mark.parametrize("ties", ["equal", "hash"])
@pytest.mark.parametrize(
    "config", [J_BOND, BOND, replace(BOND, quantile="add_one", level_factor=False)]
)
@pytest.mark.parametrize("reward", [sum_of_tokens, parity])
def test_only_the_order_of_rewards_counts_to_the_last_bit(
    config: bond.Config, ties: Any, reward: Callable[[Sequence[Group]], Tensor]
) -> None:
    config = replace(config, ties=ties, regularisation=0.1, steps=2)

    def stretched(groups: Sequence[Group]) -> Tensor:
        return (3.0 * reward(groups) / 10).exp() + 7.0

    assert same(lived(config, reward=reward), lived(config, reward=stretched))


def handmade(config: bond.Config, seed: int = 0) -> tuple[OneToken, Drawn, Callable[..., Any]]:
    """Two prompts, six outcomes; draws can be replaced."""
    start = torch.randn(2, 6, generator=Key(seed).generator())
    policy, anchor = tabular(start + 0.3 * torch.arange(6)), tabular(start)
    worth = by_table(torch.arange(12.0).view(2, 6) % 5)

    def draw(own: list[int], others: list[list[int]]) -> Drawn:
        def wrote(writer: str, texts: Sequence[Sequence[int]]) -> Experience:
            groups = tuple(
                Group(
                    prompt=torch.tensor([place]),
                    completions=tuple(_one_token(policy, place, each) for each in each_prompt),
                )
                for place, each_prompt in enumerate(texts)
            )
            return Experience(
                number=0, groups=groups, scores=Scores(total=worth(groups)), version=0,
                writer=writer,
            )  # fmt: skip

        return bond.judged(
            config, wrote("policy", [[each] for each in own]), wrote("anchor", others), anchor, None
        )

    return policy, draw([1, 2], [[0, 3], [4, 5]]), draw


def _one_token(policy: OneToken, prompt: int, token: int) -> Completion:
    logprob = policy.law()[prompt, [token]].float()
    return Completion(
        tokens=torch.tensor([token]), logprob=logprob, model_logprob=logprob, stopped=True
    )


def slope(config: bond.Config, policy: OneToken, found: Drawn) -> Tensor:
    loss = bond.objective(config)(policy, found)
    (grad,) = torch.autograd.grad(loss.total, list(policy.parameters()))
    return grad


def test_beta_0_looks_at_no_sample_of_the_policy_and_beta_1_at_no_best_of_the_anchor() -> None:
    """The rank of 1 after prompt 0 is the same among [0, 3] and [0, 2]."""
    config = bond.Config(backward=0.0)
    policy, found, draw = handmade(config)
    other = draw([4, 0], [[0, 3], [4, 5]])
    assert torch.equal(slope(config, policy, found), slope(config, policy, other))
    config = bond.Config(backward=1.0)
    policy, found, draw = handmade(config)
    other = draw([1, 2], [[0, 2], [4, 5]])
    assert found.tilt is not None
    assert other.tilt is not None
    assert torch.equal(found.tilt, other.tilt)
    assert torch.equal(slope(config, policy, found), slope(config, policy, other))
    for config in (bond.Config(backward=0.5), bond.Config(backward=0.0)):
        assert not torch.equal(slope(config, policy, found), slope(config, policy, other))


def test_the_update_is_algorithm_2_by_hand() -> None:
    beta, gamma = 0.3, 0.7
    config = bond.Config(backward=beta, regularisation=gamma)
    policy, _, draw = handmade(config)
    found = draw([0, 5], [[1, 3], [5, 4]])  # rewards 0 below both; 11 % 5 = 1 at its anchor's best
    logprob = policy.table().log_softmax(-1)
    anchor = torch.randn(2, 6, generator=Key(0).generator()).log_softmax(-1)
    own = logprob[[0, 1], [0, 5]]
    ratio = (own - anchor[[0, 1], [0, 5]]).detach()
    returns = torch.tensor([-2.7725887, 0.0]) - ratio
    gains = beta * (returns - returns.flip(0)) - gamma * (ratio - ratio.flip(0))
    best = logprob[[0, 1], [3, 5]].sum()
    wanted = -(gains * own).sum() - (1 - beta) * best
    expected = torch.autograd.grad(wanted, list(policy.parameters()))[0]
    torch.testing.assert_close(slope(config, policy, found), expected)
    report = bond.objective(config)(policy, found).report
    assert report["kl_anchor"].item() == pytest.approx(float(ratio.sum()), abs=1e-5)
    assert report["sum_surprisal"].item() == pytest.approx(-float(own.detach().sum()), abs=1e-5)


def test_j_bonds_optimum_is_next_to_the_best_of_two() -> None:
    """anchor exp(E[r_J]) is what the backward part alone would reach."""
    reference = torch.randn(64, generator=Key(3).generator()).double().log_softmax(-1)
    reward = torch.randn(64, generator=Key(4).generator())
    law = best_of_n_logprob(reference, reward, 2)
    at_most = torch.where(reward[None] <= reward[:, None], reference.exp()[None], 0.0).sum(-1)
    reached = (reference - torch.tensor(16.0).log() * (1 - at_most) ** 2).log_softmax(-1)
    kl = float((reached.exp() * (reached - law)).sum())
    mean = [float((each.exp() * reward).sum()) for each in (reference, law, reached)]
    assert kl < 0.03
    assert abs(mean[2] - mean[1]) < 0.1 * (mean[1] - mean[0])


def test_a_frozen_anchor_is_left_for_the_best_of_n_and_no_further() -> None:
    """Sampled, 8 prompts of 6 outcomes, by n = 4 quantiles of 16 draws, compared with the law."""
    start = torch.randn(8, 6, generator=Key(1).generator())
    reward = torch.randn(8, 6, generator=Key(2).generator())
    policy = tabular(start)
    config = bond.Config(
        n=4, quantile="floor", anchor_samples=16, samples=4, anchor="frozen", steps=150,
        max_new_tokens=1, schedule="cosine", floor=0.05,
    )  # fmt: skip
    anchor = anchor_of(policy, config.anchor_config)
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.1)
    steps = bond.train(
        config, policy, anchor, batches(8, 8), optimizer, key=Key(7), stop_ids=(),
        reward=by_table(reward),
    )  # fmt: skip
    for _ in steps:
        pass
    reference = start.double().log_softmax(-1)
    law = best_of_n_logprob(reference, reward, 4)
    found = policy.law()
    kl = (found.exp() * (found - law)).sum(-1).mean()
    before = (reference.exp() * (reference - law)).sum(-1).mean()
    assert float(kl) < 0.1 * float(before)


def test_a_learned_quantile_becomes_the_anchors_as_exactly_as_counts_of_eight_draws() -> None:
    """One draw of the anchor a prompt and update; the policy stays, so that it asks for all."""
    start = torch.randn(2, 5, generator=Key(1).generator())
    worth = torch.arange(10.0).view(2, 5) * 7 % 4
    policy, anchor = tabular(torch.zeros(2, 5)), tabular(start)
    quantiles = Critic(2 * 5, Pairs(2, 5), torch.device("cpu"))
    optimizer = torch.optim.Adam(
        [{"params": [*policy.parameters()], "lr": 0.0}, {"params": [*quantiles.parameters()]}],
        lr=0.3,
    )
    config = bond.Config(
        n=4, quantile="learned", backward=1.0, anchor_samples=1, samples=20, max_new_tokens=1,
        steps=120, warmup=0, schedule="cosine", floor=0.02, max_grad_norm=1e6,
    )  # fmt: skip
    fixed = Anchor(anchor, AnchorConfig())
    source = experiences(config, policy, fixed, worth, Key(3))
    for _ in bond.train(
        config, policy, fixed, (), optimizer, key=Key(3), stop_ids=(), source=source,
        quantiles=quantiles,
    ):  # fmt: skip
        pass
    exact = torch.stack([log_quantiles(*each)[1] for each in zip(anchor.law(), worth, strict=True)])
    p = exact.exp()
    with torch.no_grad():
        rows = TokenBatch.of([[prompt, y] for prompt in range(2) for y in range(5)])
        found = quantiles.at_ends(rows, policy(rows)).sigmoid().view(2, 5)
    error = (found - p).square().mean().sqrt()
    counted = (p * (1 - p) / 8).mean().sqrt()
    assert float(error) < float(counted)
    assert float((found - p).abs().max()) < 0.15


def test_the_reports_estimate_what_they_name() -> None:
    """2,000 draws at once in a world of 40 outcomes without equals."""
    start = torch.randn(1, 40, generator=Key(1).generator()) * 0.3
    reward = torch.randn(1, 40, generator=Key(2).generator())
    policy, anchor = tabular(start + 0.5 * reward), tabular(start)
    config = bond.Config(n=4, quantile="floor", anchor_samples=400, samples=2000, max_new_tokens=1)
    own, others = bond.experiences(
        config, policy, Anchor(anchor, config.anchor_config), iter([TokenBatch.of([[0]])]),
        reward=by_table(reward), key=Key(0), stop_ids=(),
    )  # fmt: skip
    found = bond.judged(config, own, others, anchor, anchor)
    report = bond.objective(config)(policy, found).report
    law, target = policy.law()[0], best_of_n_logprob(anchor.law()[0], reward[0], 4)
    exact = {
        "kl_anchor": (law.exp() * (law - anchor.law()[0])).sum(),
        "kl_start": (law.exp() * (law - anchor.law()[0])).sum(),
        "sum_surprisal": -(law.exp() * law).sum() * config.samples,
        "backward_kl": (law.exp() * (law - target)).sum(),
    }
    for name, value in exact.items():
        assert report[name].item() == pytest.approx(float(value), abs=0.06, rel=0.03), name


# --- between updates -----------------------------------------------------------------------------


def test_the_anchor_stays_follows_or_is_copied() -> None:
    start = gemma().state_dict()

    def weights(**changes: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        life = lived(replace(J_BOND, steps=3, **changes))
        return life.model.state_dict(), life.anchor.model.state_dict()

    for still in ({"anchor": "frozen"}, {"anchor_rate": 0.0}):
        model, anchor = weights(**still)
        assert all(torch.equal(anchor[name], start[name]) for name in start)
        assert not torch.equal(model["embedding"], start["embedding"])
    for moving in ({"anchor_rate": 1.0}, {"anchor": "copy", "anchor_every": 1}):
        model, anchor = weights(**moving)
        assert all(torch.equal(anchor[name], model[name]) for name in start)
    model, anchor = weights(anchor="copy", anchor_every=2)  # the policy after the second update
    assert not torch.equal(anchor["embedding"], model["embedding"])
    assert not torch.equal(anchor["embedding"], start["embedding"])


@pytest.mark.parametrize(
    "config", [J_BOND, BOND, replace(BOND, anchor="copy", anchor_every=3), LEARNED, ALONE]
)
def test_a_run_that_goes_on_is_the_uninterrupted_one(config: bond.Config) -> None:
    whole, parts = lived(config), Life(config)
    first = Life(config)
    steps = bond.train(
        config, first.model, first.anchor, (prompts(n) for n in itertools.count()),
        first.optimizer, key=Key(5), stop_ids=(EOS,), reward=sum_of_tokens,
        quantiles=first.quantiles,
    )  # fmt: skip
    for step in steps:
        if step.index == 1:
            break
    # What a checkpoint keeps, into a life that knows nothing else.
    parts.model.load_state_dict(first.model.state_dict())
    parts.optimizer.load_state_dict(first.optimizer.state_dict())
    with torch.no_grad():
        for name, tensor in first.beside.items():
            parts.beside[name].copy_(tensor)
    parts.run(start=2)
    assert same(whole, parts)


class Words:
    """What a recorder asks of a tokenizer."""

    def fingerprint(self) -> str:
        return "words"


@pytest.mark.parametrize("config", [J_BOND, replace(BOND, accumulate=2), ALONE])
def test_a_run_is_replayed_from_its_records_to_the_same_bits(
    config: bond.Config, tmp_path: Path
) -> None:
    first, again, late = (Life(config) for _ in range(3))
    with recorder(tmp_path, Words()) as observe:  # type: ignore[arg-type]
        steps = first.run(observe=observe)
    replay = again.run(source=replayed(tmp_path, 0), batches=())
    assert same(first, again)
    assert steps == replay
    assert {each.writer for each in replayed(tmp_path, 0)} == {"policy", "anchor"}
    with pytest.raises(ConfigError, match="a reward, or a source"):
        late.run(source=replayed(tmp_path, 0), reward=sum_of_tokens)


# --- rewards and samples that are unusual ---------------------------------------------------------


@pytest.mark.parametrize("config", [J_BOND, BOND, replace(BOND, quantile="add_one")])
def test_equal_rewards_give_nothing_to_learn_from_ranks_and_no_nan(config: bond.Config) -> None:
    life = Life(replace(config, steps=1, backward=1.0))
    (step,) = life.run(reward=lambda groups: torch.zeros(len(groups), len(groups[0].completions)))
    assert step.report["no_signal"] == 1.0
    assert step.report["quantile"] == 1.0
    assert step.grad_norm < 5e-3  # the anchor is the policy; what is left is rounding
    own, others = drawn(config)
    flat = [replace(e, scores=Scores(total=torch.ones_like(e.scores.total))) for e in (own, others)]
    tilt = bond.judged(config, flat[0], flat[1], life.anchor.model, None).tilt
    assert tilt is not None
    assert bool((tilt == tilt[0, 0]).all())


def test_a_reward_that_is_no_number_stops_the_run_and_names_the_sample() -> None:
    def broken(groups: Sequence[Group]) -> Tensor:
        found = sum_of_tokens(groups)
        found[1, -1] = torch.nan
        return found

    life = Life(J_BOND)
    with pytest.raises(NonFinite, match=r"prompt 1 .*sample 0"):
        life.run(reward=broken)
    with pytest.raises(DataError, match=r"\(3,\), expected a tensor of shape \(3, 1\)"):
        life.run(reward=lambda groups: torch.zeros(len(groups)))
    assert torch.equal(life.model.embedding, gemma().embedding)


def test_a_policy_that_never_stops_is_cut_and_learns_what_it_wrote() -> None:
    life = Life(replace(J_BOND, max_new_tokens=5, steps=2))
    endless = bond.train(
        life.config, life.model, life.anchor, (prompts(n) for n in itertools.count()),
        life.optimizer, key=Key(5), stop_ids=(), reward=sum_of_tokens,
    )  # fmt: skip
    for step in endless:
        assert step.report["stopped"] == 0.0
        assert step.report["completion_tokens"] == 5.0
        assert step.grad_norm > 0.0


def test_a_lone_sample_has_no_baseline() -> None:
    life = Life(J_BOND)
    with pytest.raises(ConfigError, match="no others to be compared with"):
        life.run(batches=(prompts(n, rows=1) for n in itertools.count()))
    alone = Life(replace(J_BOND, backward=0.0))
    assert alone.run(batches=(prompts(n, rows=1) for n in itertools.count()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n": 1}, "2 <= n <= anchor_samples"),
        ({"n": 4, "quantile": "floor"}, "got n 4 of 2"),
        ({"anchor_samples": 4}, "two_draws is of n 2"),
        ({"backward": 1.5}, "backward must lie"),
        ({"regularisation": -1.0}, "regularisation"),
        ({"baseline": "prompt"}, "2 samples or more"),
        ({"quantile": "learned", "anchor_samples": 1}, "2 <= n <= anchor_samples"),
        ({"quantile_model": "network"}, "for quantile learned"),
        ({"quantile_weight": 0.0}, "quantile_weight must be above 0"),
        ({"sampling_temperature": 0.0}, "greedily"),
        ({"anchor_rate": 2.0}, "rate must lie"),
        ({"max_grad_norm": -1.0}, "max_grad_norm"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm"),
        ({"max_kl": float("nan")}, "max_kl"),
        ({"steps": 0}, "at least 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bond.Config(**changes)


@pytest.mark.parametrize("config", [LEARNED, ALONE])
def test_what_learns_quantiles_begins_at_one_half_and_teaches_the_policy_nothing_of_its_own(
    config: bond.Config,
) -> None:
    """Its first tilt is the same for all, and its loss has no gradient in the policy."""
    life = Life(config)
    own, others = drawn(config)
    found = bond.judged(config, own, others, life.anchor.model, None)
    assert found.tilt is None
    light, heavy = (
        bond.objective(replace(config, quantile_weight=weight), life.quantiles)
        for weight in (0.1, 3.0)
    )
    one, other = light(life.model, found), heavy(life.model, found)
    assert one.report["log_quantile"].item() == pytest.approx(3 * math.log(0.5))
    assert one.report["quantile_loss"].item() == pytest.approx(3 * math.log(2.0))
    for name, parameter in life.model.named_parameters():
        slopes = [
            torch.autograd.grad(each.total, parameter, retain_graph=True)[0]
            for each in (one, other)
        ]
        torch.testing.assert_close(*slopes, msg=name)
    assert life.quantiles is not None
    (slope,) = torch.autograd.grad(one.total, life.quantiles.head.weight)
    assert float(slope.norm()) > 0.0
    assert ("forward_kl" in one.report) == (config.anchor_samples >= config.n)


def test_what_learns_quantiles_goes_with_them() -> None:
    for config, has in ((LEARNED, J_BOND), (J_BOND, LEARNED)):
        life = Life(config)
        life.quantiles = Life(has).quantiles
        with pytest.raises(ConfigError, match="goes with quantile learned"):
            life.run()


def test_every_update_reports_both_divergences_ranks_rewards_and_entropy() -> None:
    (step,) = Life(replace(J_BOND, steps=1)).run()
    assert step.weight == 3.0
    assert {"forward_kl", "backward_kl", "kl_anchor", "entropy", "quantile", "log_quantile",
            "reward", "anchor_reward", "no_signal", "completion_tokens", "stopped",
            "logprob_gap"} <= step.report.keys()  # fmt: skip
    assert step.report["logprob_gap"] < 1e-5
    assert abs(step.report["kl_anchor"]) < 1e-4
