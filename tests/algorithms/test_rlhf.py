"""RLHF: expected gradients by enumeration, where training ends, records, and what is refused."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from two_token_world import (
    EOS,
    LENGTH,
    WRITTEN,
    Table,
    every_experience,
    judge,
    objective_gradient,
    prize,
)

from cabochon.algorithms import rlhf
from cabochon.core import Group, Key, Step, TokenBatch
from cabochon.core.errors import ConfigError, DataError, Diverged
from cabochon.models.critic import Critic, critic_of
from cabochon.rewards.experience import Experience, draw
from cabochon.rewards.records import recorder, replayed
from cabochon.rewards.returns import completions_of
from cabochon.training import OptimizerConfig, adamw
from cabochon.training.anchors import Anchor, AnchorConfig, anchor_of

PRICE = 0.3


def expected_gradient(
    config: rlhf.Config, policy: Table, anchor: Table, prompts: Sequence[int],
    *, drawer: Table | None = None, critic: Critic | None = None,
) -> Tensor:  # fmt: skip
    """Of the loss, over everything that could be drawn; its sign turned, to compare with gains."""
    loss = rlhf.objective(config, anchor, critic)
    total = torch.zeros_like(policy.logits)
    for share, experience in every_experience(drawer or policy, prompts, config.samples):
        found = loss(policy, rlhf.scored(config, experience, anchor))
        (one,) = torch.autograd.grad(found.total / found.weight, [policy.logits])
        total -= share * one
    return total


def some_critic(policy: Table, kind: Any) -> Critic:
    critic = critic_of(policy, kind)
    with torch.no_grad():
        critic.head.weight.copy_(torch.tensor([[0.5, -1.0, 0.2, 2.0]]))
        critic.head.bias.fill_(1.7)
    return critic


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=2e-5)


# --- expected gradients, by enumeration ----------------------------------------------------------


@pytest.mark.parametrize("kl", ["sampled", "exact"])
@pytest.mark.parametrize(
    ("baseline", "prompts", "samples"),
    [("none", [1], 1), ("none", [2], 2), ("prompt", [1], 2), ("batch", [1, 3], 1),
     ("batch", [2], 2), ("value", [1], 1), ("value", [3], 2)],
)  # fmt: skip
def test_no_baseline_and_no_estimate_of_kl_changes_the_expected_gradient(
    baseline: Any, prompts: list[int], samples: int, kl: Any
) -> None:
    policy, anchor = Table(0), Table(1)
    config = rlhf.Config(baseline=baseline, samples=samples, kl_weight=PRICE, kl=kl)
    critic = some_critic(policy, "network") if baseline == "value" else None
    found = expected_gradient(config, policy, anchor, prompts, critic=critic)
    close(found, objective_gradient(policy, anchor, prompts, PRICE))


def test_group_normalised_advantages_are_another_gradient() -> None:
    """The deviation that has a name: dividing by the group's spread weighs groups unequally."""
    policy, anchor = Table(0), Table(1)
    config = rlhf.Config(baseline="group_normalised", samples=2, kl_weight=PRICE)
    found = expected_gradient(config, policy, anchor, [1]).flatten()
    wanted = objective_gradient(policy, anchor, [1], PRICE).flatten()
    assert 0.5 < torch.cosine_similarity(found, wanted, dim=0) < 0.999


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_whole_ratios_of_completions_correct_for_another_drawer(level: Any) -> None:
    policy, anchor, drawer = Table(0), Table(1), Table(0)
    with torch.no_grad():
        drawer.logits.add_(0.7 * Table(5).logits)
    config = rlhf.Config(
        baseline="none", samples=1, kl_weight=0.0, correction="truncate", ratio=level,
        max_ratio=1e9,
    )  # fmt: skip
    found = expected_gradient(config, policy, anchor, [1], drawer=drawer)
    wanted = objective_gradient(policy, anchor, [1], 0.0)
    if level == "sequence":
        close(found, wanted)
    else:  # what came before a token is drawn from the drawer, and the return behind it too
        assert not torch.allclose(found, wanted, atol=1e-2)
    same = expected_gradient(config, policy, anchor, [1])
    close(same, wanted)


@pytest.mark.parametrize("correction", ["none", "truncate", "clip"])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_on_the_policys_own_draws_every_correction_is_the_same_gradient(
    correction: Any, ratio: Any
) -> None:
    policy, anchor = Table(0), Table(1)
    config = rlhf.Config(samples=2, kl_weight=PRICE, correction=correction, ratio=ratio)
    close(
        expected_gradient(config, policy, anchor, [2]),
        objective_gradient(policy, anchor, [2], PRICE),
    )


def test_a_limit_reward_replaces_what_was_judged_of_cut_completions() -> None:
    policy, anchor = Table(0), Table(1)
    config = rlhf.Config(baseline="none", samples=1, kl_weight=PRICE, limit_reward=-1.0)

    def penalised(prompt: int) -> Tensor:
        cut = torch.tensor([tokens[-1] != EOS for tokens in WRITTEN])
        return prize(prompt).masked_fill(cut, -1.0)

    close(
        expected_gradient(config, policy, anchor, [1]),
        objective_gradient(policy, anchor, [1], PRICE, penalised),
    )


def test_equal_rewards_teach_nothing() -> None:
    policy, anchor = Table(0), Table(0)
    _, experience = every_experience(policy, [1], 3)[20]
    scores = replace(experience.scores, total=torch.full((1, 3), 0.1))
    for baseline in ("prompt", "group_normalised", "batch"):
        config = rlhf.Config(baseline=baseline, samples=3)
        found = rlhf.objective(config, anchor)(
            policy, rlhf.scored(config, replace(experience, scores=scores), anchor)
        )
        (gradient,) = torch.autograd.grad(found.total, [policy.logits])
        assert not gradient.any()
        assert found.report["sum_silent"] == 1.0


def test_a_reward_for_being_cut_is_a_signal_where_the_others_are_equal() -> None:
    policy, anchor = Table(0), Table(0)
    config = rlhf.Config(samples=3, limit_reward=-1.0)
    silent = set()
    for _, experience in itertools.islice(every_experience(policy, [1], 3), None, None, 29):
        stopped = {each.stopped for each in experience.groups[0].completions}
        scores = replace(experience.scores, total=torch.full((1, 3), 0.1))
        found = rlhf.scored(config, replace(experience, scores=scores), anchor)
        silent.add((len(stopped), found.report["sum_silent"].item()))
    assert silent == {(1, 1), (2, 0)}


# --- training ------------------------------------------------------------------------------------


def prompts(count: int, start: int = 0, prompt: int | None = None) -> Iterator[TokenBatch]:
    """Micro-batches of so many rows of the prompts 1, 2, 3 in turn, or of one alone."""
    for number in itertools.count(start):
        rows = [[prompt or 1 + (number * count + row) % 3] for row in range(count)]
        yield TokenBatch.of(rows, masks=[[False]] * count)


def run(
    config: rlhf.Config, policy: nn.Module, anchor: Anchor[Any] | None = None, *,
    rate: float = 0.1, start: int = 0, rows: int = 3, prompt: int | None = None, **more: Any,
) -> list[Step]:  # fmt: skip
    """A training run; of the three prompts, or of one, for which the table has logits enough."""
    config = replace(config, max_new_tokens=LENGTH)
    anchor = anchor or anchor_of(policy, config.anchor_config)
    critic = more.get("critic")
    learning = policy if critic is None else nn.ModuleDict({"policy": policy, "critic": critic})
    optimizer = more.pop("optimizer", None) or adamw(
        learning, OptimizerConfig(learning_rate=rate, weight_decay=0.0)
    )
    if "source" not in more:
        more = {"reward": judge, **more}
    return list(
        rlhf.train(
            config, policy, anchor, prompts(rows, start * config.accumulate, prompt), optimizer,
            key=Key(3), stop_ids=(EOS,), start=start, **more,
        )
    )  # fmt: skip


def apart(one: Tensor, other: Tensor) -> float:
    """KL between two laws over all that can be written."""
    return float((one.exp() * (one - other)).sum().detach())


@pytest.mark.parametrize(
    ("baseline", "kl"),
    [("prompt", "sampled"), ("prompt", "exact"), ("batch", "sampled"), ("value", "sampled"),
     ("value", "exact"), ("none", "sampled")],
)  # fmt: skip
def test_training_ends_at_the_anchor_tilted_by_the_reward(baseline: Any, kl: Any) -> None:
    """The optimum of E[r] - beta KL is anchor(y) exp(r(y) / beta), normalised."""
    policy, beta = Table(0), 0.5
    anchor = anchor_of(policy, AnchorConfig())
    config = rlhf.Config(
        baseline=baseline, samples=64, kl_weight=beta, kl=kl, steps=120, warmup=0,
        schedule="cosine", floor=0.0, max_grad_norm=10.0, value_weight=1.0,
    )  # fmt: skip
    critic = critic_of(policy, "head") if baseline == "value" else None
    run(config, policy, anchor, rows=1, prompt=1, critic=critic)
    wanted = (anchor.model.law(1) + prize(1) / beta).log_softmax(0)
    start = apart(anchor.model.law(1), wanted)
    assert start > 0.5
    assert apart(policy.law(1), wanted) < 0.1 * start


def test_the_limits_of_the_price_are_the_best_completion_and_the_anchor() -> None:
    config = rlhf.Config(samples=32, steps=80, warmup=0, kl_weight=0.0)
    free, held = Table(0), Table(0)
    run(config, free, rows=1, prompt=1, rate=0.2)
    assert int(free.law(1).argmax()) == int(prize(1).argmax())
    assert float(free.law(1).max().detach()) > -0.1
    run(replace(config, kl_weight=100.0, steps=30), held, rows=1, prompt=1, rate=0.01)
    assert apart(held.law(1), Table(0).law(1)) < 0.01


def test_a_moving_anchor_goes_on_where_a_frozen_one_holds() -> None:
    config = rlhf.Config(samples=32, steps=80, warmup=0, kl_weight=2.0)
    worth = {}
    for kind in ("frozen", "ema", "copy"):
        policy, start = Table(0), Table(0)
        steps = run(
            replace(config, anchor=kind, anchor_rate=0.2, anchor_every=20), policy,
            rows=1, prompt=1, beginning=start,
        )  # fmt: skip
        worth[kind] = float((policy.law(1).exp() * prize(1)).sum().detach())
        last = steps[-1].report
        if kind == "frozen":
            assert last["kl_start"] == pytest.approx(last["kl_k1"], abs=1e-6)
        else:
            assert last["kl_start"] > last["kl_k1"]
    assert worth["frozen"] + 0.2 < min(worth["ema"], worth["copy"])


def test_an_anchor_that_is_the_policy_costs_nothing() -> None:
    """mu = 1: the KL term of what is drawn next is 0."""
    config = rlhf.Config(samples=4, steps=5, anchor="ema", anchor_rate=1.0)
    for step in run(config, Table(0)):
        assert step.report["kl_k1"] == pytest.approx(0.0, abs=1e-6)


def test_a_run_in_two_parts_is_the_whole_run_bit_for_bit() -> None:
    config = rlhf.Config(
        samples=3, steps=8, accumulate=2, updates=2, correction="clip", anchor="ema",
        anchor_rate=0.2, warmup=0,
    )  # fmt: skip
    whole, parts = Table(0), Table(0)
    wanted = run(config, whole)
    anchor = anchor_of(parts, config.anchor_config)
    optimizer = adamw(parts, OptimizerConfig(learning_rate=0.1, weight_decay=0.0))
    first = run(replace(config, steps=5), parts, anchor, optimizer=optimizer)
    second = run(config, parts, anchor, optimizer=optimizer, start=5)
    assert torch.equal(whole.logits, parts.logits)
    assert [*first, *second] == wanted
    assert [each.index for each in wanted] == [*range(8)]


def test_further_updates_of_an_experience_are_corrected_and_reported() -> None:
    for correction in ("clip", "truncate"):
        config = rlhf.Config(samples=8, steps=6, updates=4, correction=correction, warmup=0)
        steps = run(config, Table(0), rate=0.3)
        assert steps[0].report["lag"] == pytest.approx(1.5)  # 0, 1, 2, 3 updates
        assert any(step.report["clipped"] > 0.0 for step in steps)
        assert all(0.0 < step.report["effective"] <= 1.0 for step in steps)
        assert min(step.report["effective"] for step in steps) < 0.999


# --- records -------------------------------------------------------------------------------------


class Ids:
    def fingerprint(self) -> str:
        return "abc"


@pytest.mark.parametrize("baseline", ["prompt", "value"])
def test_a_run_replayed_from_its_records_has_the_same_weights(
    tmp_path: Path, baseline: Any
) -> None:
    config = rlhf.Config(
        samples=3, steps=6, accumulate=2, updates=2, correction="truncate", anchor="ema",
        baseline=baseline,
    )  # fmt: skip
    first, second = Table(0), Table(0)

    def critic(policy: Table) -> Critic | None:
        return critic_of(policy, "network") if baseline == "value" else None

    with recorder(tmp_path, Ids()) as record:
        wanted = run(config, first, observe=record, critic=critic(first))
    found = run(config, second, source=replayed(tmp_path, 0), critic=critic(second))
    assert torch.equal(first.logits, second.logits)
    assert found == wanted
    assert not torch.equal(first.logits, Table(0).logits)


def test_experience_drawn_ahead_by_older_weights_is_learned_with_its_lag() -> None:
    config = rlhf.Config(samples=4, steps=10, correction="truncate", max_ratio=1.5, warmup=0)
    policy, old = Table(0), Table(0)

    def ahead() -> Iterator[Experience]:
        """Drawn by the weights of two updates ago."""
        for number, batch in enumerate(prompts(3)):
            rows = [row[:1] for row in batch.tokens]
            settings = replace(config, max_new_tokens=LENGTH).settings((EOS,))
            yield draw(old, rows, judge, settings, Key(1).fold(number), 4, number=number,
                       version=max(0, number - 2))  # fmt: skip
            if number >= 2:
                with torch.no_grad():
                    old.logits.lerp_(policy.logits, 0.5)

    steps = run(config, policy, source=ahead())
    assert [step.report["lag"] for step in steps[:4]] == [0.0, 1.0, 2.0, 2.0]
    assert 0.0 < min(step.report["effective"] for step in steps) < 1.0


# --- beside TRL ----------------------------------------------------------------------------------


def moved(seed: int = 0) -> tuple[Table, Table, Experience]:
    """A policy that has moved since it drew, its anchor, and one experience of six completions."""
    drawer, anchor, policy = Table(0), Table(1), Table(0)
    with torch.no_grad():
        policy.logits.add_(0.4 * Table(9).logits)
    found = draw(drawer, [torch.tensor([p]) for p in (1, 2, 3)], judge,
                 rlhf.Config(max_new_tokens=LENGTH).settings((EOS,)), Key(seed), 2,
                 number=0, version=0)  # fmt: skip
    return policy, anchor, found


def trl_inputs(policy: Table, experience: Experience) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    rows = completions_of(experience).rows.batch
    mask = rows.mask.long()[:, :LENGTH]
    law = policy(rows).logits(slice(None)).log_softmax(-1)
    own = law.gather(-1, rows.targets.flatten()[:, None]).view(rows.shape)[:, :LENGTH]
    inputs = {
        "prompt_ids": rows.tokens[:, :1], "prompt_mask": torch.ones_like(rows.tokens[:, :1]),
        "completion_ids": rows.tokens[:, 1:], "completion_mask": mask,
    }  # fmt: skip
    return own, mask, inputs


def stub(own: Tensor, **more: Any) -> Any:
    import collections

    class Accelerator:
        num_processes = 1

        def gather(self, value: Tensor) -> Tensor:
            return value

        def gather_for_metrics(self, value: Tensor) -> Tensor:
            return value

        def reduce(self, value: Tensor, reduction: str) -> Tensor:
            return value

    metrics = collections.defaultdict(lambda: collections.defaultdict(list))
    return SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (own, torch.zeros_like(own), None),
        accelerator=Accelerator(), aux_loss_enabled=False, _metrics=metrics,
        epsilon_low=0.2, epsilon_high=0.2, model=SimpleNamespace(training=True), **more,
    )  # fmt: skip


def test_the_loss_is_that_of_trls_rloo_on_the_same_tensors() -> None:
    trl = pytest.importorskip("trl")
    policy, anchor, experience = moved()
    config = rlhf.Config(samples=2, kl_weight=PRICE, correction="clip", ratio="sequence")
    ours = rlhf.objective(config, anchor)(policy, rlhf.scored(config, experience, anchor))
    own, mask, inputs = trl_inputs(policy, experience)
    taken = completions_of(experience)
    old = taken.drawn[:, :LENGTH]
    kl = ((old - taken.logprobs(anchor, 1.0)[:, :LENGTH]) * mask).sum(-1)
    rewards = experience.scores.total.flatten() - PRICE * kl
    grouped = rewards.view(-1, 2)  # as RLOOTrainer._generate_and_score_completions has it
    advantages = rewards - ((grouped.sum(1, keepdim=True) - grouped) / 1).view(-1)
    peer = stub(own)
    wanted = trl.RLOOTrainer._compute_loss(
        peer, peer.model, {**inputs, "old_logps": old.sum(1), "advantages": advantages}
    )
    assert any(value[0] > 0 for value in peer._metrics["train"].values())
    torch.testing.assert_close(ours.total / ours.weight, wanted)
    one, two = (torch.autograd.grad(x, [policy.logits])[0] for x in (ours.total / 6, wanted))
    torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5)


def test_the_loss_is_that_of_trls_grpo_where_the_definitions_meet() -> None:
    """Dr. GRPO's sum over tokens times its fixed length, without a KL; its advantages are ours."""
    trl = pytest.importorskip("trl")
    policy, anchor, experience = moved()
    config = rlhf.Config(samples=2, kl_weight=0.0, correction="clip", baseline="group_normalised")
    ours = rlhf.objective(config, anchor)(policy, rlhf.scored(config, experience, anchor))
    own, _, inputs = trl_inputs(policy, experience)
    grouped = experience.scores.total
    centred = grouped - grouped.mean(1, keepdim=True)
    advantages = (centred / (grouped.std(1, keepdim=True) + 1e-4)).flatten()
    peer = stub(
        own, top_entropy_quantile=1.0, off_policy_mask_threshold=None, beta=0.0,
        importance_sampling_level="token", loss_type="dr_grpo", use_vllm=False,
        max_completion_length=LENGTH, current_gradient_accumulation_steps=1,
        args=SimpleNamespace(delta=None), _entropy_bonus_enabled=False,
    )  # fmt: skip
    old = completions_of(experience).drawn[:, :LENGTH]
    wanted = trl.GRPOTrainer._compute_loss(
        peer, peer.model, {**inputs, "old_per_token_logps": old, "advantages": advantages}
    )
    torch.testing.assert_close(ours.total / ours.weight, wanted * LENGTH)


# --- what goes wrong -----------------------------------------------------------------------------


def test_a_policy_that_never_ends_is_trained_all_the_same() -> None:
    policy = Table(0)
    with torch.no_grad():
        policy.logits[..., EOS] = -40.0
    steps = run(rlhf.Config(samples=4, steps=3), policy)
    assert [step.report["stopped"] for step in steps] == [0.0] * 3
    fixed = Table(0)
    with torch.no_grad():
        fixed.logits[..., EOS] = -40.0
    before = fixed.logits.detach().clone()
    config = rlhf.Config(samples=4, steps=3, limit_reward=-1.0, kl_weight=0.0)
    assert all(step.grad_norm == 0.0 for step in run(config, fixed))  # all equal: nothing to learn
    assert torch.equal(fixed.logits, before)


def test_a_policy_that_leaves_its_anchor_is_stopped_before_the_update() -> None:
    policy = Table(0)
    anchor = anchor_of(policy, AnchorConfig())
    config = rlhf.Config(samples=4, steps=50, kl_weight=0.0, max_kl=0.5, warmup=0)
    with pytest.raises(Diverged, match=r"step \d+: KL to the anchor is .* above max_kl 0.5"):
        run(config, policy, anchor, rate=5.0)
    assert policy.logits.isfinite().all()
    with torch.no_grad():  # what the anchor would never write
        anchor.model.logits[:, :, 1:] = -float("inf")
    with pytest.raises(Diverged, match="step 0"):
        run(replace(config, max_kl=1e9), Table(0), anchor)


def test_what_no_run_can_be() -> None:
    for given, said in (
        ({"samples": 1}, "compares samples of a prompt"),
        ({"updates": 2}, "need a correction"),
        ({"baseline": "value", "ratio": "sequence"}, "goes with gains of whole completions"),
        ({"sampling_temperature": 0.0}, "greedily"),
        ({"kl_weight": -1.0}, "kl_weight must be finite"),
        ({"max_kl": 0.0}, "max_kl"),
        ({"max_grad_norm": -1.0}, "max_grad_norm"),
        ({"critic": "network"}, "a critic needs baseline value"),
        ({"limit_reward": float("nan")}, "limit_reward must be a finite number"),
        ({"anchor_rate": 2.0}, r"rate must lie in \[0, 1\]"),
        ({"max_ratio": 0.5}, "truncated at 1 or more"),
        ({"steps": 0}, "at least 1"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=said):
            rlhf.Config(**given)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="give a reward, or a source"):
        run(rlhf.Config(), Table(0), source=None)
    with pytest.raises(ConfigError, match="a critic goes with the baseline value"):
        run(rlhf.Config(baseline="value"), Table(0))


def test_a_reward_that_fails_is_named_with_its_sample() -> None:
    def broken(groups: Sequence[Group]) -> Tensor:
        raise KeyError("no answer")

    with pytest.raises(DataError, match="the reward failed at prompt 0"):
        run(rlhf.Config(steps=1), Table(0), reward=broken)
