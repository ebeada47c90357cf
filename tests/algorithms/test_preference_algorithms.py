"""Reward models and DPO learn from pairs: gradients by an independent route, resuming, probes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import pytest
import torch
from torch.nn.functional import logsigmoid

from cabochon.algorithms import dpo, reward_model
from cabochon.core import Key, Policy, Step, TokenBatch
from cabochon.core.errors import ConfigError, DataError
from cabochon.data.preferences import Pairs, PairTokens
from cabochon.losses.preference import gained
from cabochon.models.gemma.config import GemmaConfig
from cabochon.models.gemma.decoder import Gemma
from cabochon.models.reward_head import RewardModel
from cabochon.training.optimizers import OptimizerConfig, adamw

CONFIG = GemmaConfig(
    vocab_size=24, width=16, layers=2, heads=2, kv_heads=1, head_width=8, ffn_width=24,
    query_scalar=8, window=6, attention_cap=50.0, final_cap=30.0, post_norms=True, context=32,
)  # fmt: skip


def pairs(count: int = 64) -> Pairs:
    """The answer that repeats the prompt's last token is preferred."""
    stream = Key(4).fold("pairs").generator()
    some = []
    for number in range(count):
        prompt = tuple(torch.randint(3, 24, (3,), generator=stream).tolist())
        other = 3 + (prompt[-1] - 3 + 5 + number % 7) % 21
        some.append(
            PairTokens(prompt=prompt, chosen=(prompt[-1], 1), rejected=(other, 2, 1), source="")
        )
    return Pairs(some)


def gemma(seed: int = 0) -> Gemma:
    return Gemma.init(CONFIG, Key(seed))


def teach(config: reward_model.Config, model: RewardModel, start: int = 0) -> Iterator[Step]:
    optimizer = adamw(model, OptimizerConfig(learning_rate=3e-3))
    batches = pairs().batches(Key(1), 16, start * config.accumulate)
    return reward_model.train(config, model, batches, optimizer, key=Key(2), start=start)


def test_a_reward_model_begins_at_even_odds_and_learns_the_preference() -> None:
    model = RewardModel(gemma())
    steps = list(teach(reward_model.Config(steps=120), model))
    assert steps[0].loss == pytest.approx(torch.tensor(2.0).log().item())
    assert steps[-1].report["accuracy"] > 0.95
    assert steps[-1].report["margin"] > 1.0


def test_splitting_a_batch_changes_no_update() -> None:
    whole, split = RewardModel(gemma()), RewardModel(gemma())
    batches = list(islice(pairs().batches(Key(1), 8), 2))
    joined = Pairs.rows([pairs().pairs[n] for n in range(8)])
    halves = [joined.rows(0, 8), joined.rows(8, 16)]
    del batches
    for model, given, accumulate in ((whole, [joined], 1), (split, halves, 2)):
        config = reward_model.Config(steps=1, accumulate=accumulate, centre=0.1)
        list(
            reward_model.train(
                config, model, given, adamw(model, OptimizerConfig(weight_decay=0.0)), key=Key(2)
            )
        )
    torch.testing.assert_close(whole.score, split.score)


def test_dropout_is_keyed_by_the_update_and_alike_within_a_pair() -> None:
    config = reward_model.Config(steps=6, dropout=0.3)
    straight = RewardModel(gemma(), torch.randn(1, 16, generator=Key(9).generator()))
    first = [step.loss for step in teach(config, straight)]
    again = RewardModel(gemma(), torch.randn(1, 16, generator=Key(9).generator()))
    assert [step.loss for step in teach(config, again)] == first
    features = torch.ones(6, 2000)
    dropped = reward_model._dropped(features, 0.3, Key(0))
    assert torch.equal(dropped[::2], dropped[1::2])
    assert not torch.equal(dropped[0], dropped[2])
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.05)
    assert (dropped == 0.0).float().mean().item() == pytest.approx(0.3, abs=0.05)


def test_a_probe_moves_the_head_alone() -> None:
    model = RewardModel(gemma())
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    model.backbone.requires_grad_(False)
    optimizer = adamw(model, OptimizerConfig(learning_rate=1e-2))
    config = reward_model.Config(steps=3)
    list(
        reward_model.train(
            config, model, pairs().batches(Key(1), 8), optimizer, key=Key(2), probe=True
        )
    )
    changed = {n for n, w in model.state_dict().items() if not torch.equal(w, before[n])}
    assert changed == {"score"}


def naive_dpo(
    config: dpo.Config, policy: Gemma, reference: Gemma, batch: TokenBatch
) -> torch.Tensor:
    """The loss from whole logits, by autograd all the way."""

    def log_ratio(model: Policy) -> torch.Tensor:
        logits = model(batch).logits(slice(None)).log_softmax(-1)
        each = logits.gather(-1, batch.targets.flatten()[:, None]).reshape(batch.shape)
        return (each * batch.mask).sum(1)

    ratio = log_ratio(policy) - log_ratio(reference).detach()
    value = gained(ratio, config.f)
    return -logsigmoid(config.strength * (value[::2] - value[1::2])).sum()


@pytest.mark.parametrize(
    ("name", "parameter"),
    [
        ("forward_kl", None),
        ("reverse_kl", None),
        ("jsd", 0.5),
        ("alpha", 0.5),
        ("chi_square", None),
    ],
)
def test_the_gradient_of_dpo_is_that_of_the_whole_logits(
    name: str, parameter: float | None
) -> None:
    config = dpo.Config(divergence=name, divergence_parameter=parameter, strength=0.7)  # type: ignore[arg-type]
    policy, reference = gemma(1), gemma(2)
    for model in (policy, reference):
        for weight in model.parameters():
            weight.data.mul_(8.0)
    batch = Pairs.rows(pairs().pairs[:5])
    expected = naive_dpo(config, policy, reference, batch)
    expected.backward()
    wanted = {name: weight.grad.clone() for name, weight in policy.named_parameters()
              if weight.grad is not None}  # fmt: skip
    policy.zero_grad()
    found = dpo.objective(config, reference)(policy, batch)
    found.total.backward()
    assert found.total.item() == pytest.approx(expected.item(), rel=1e-5)
    for weight_name, weight in policy.named_parameters():
        assert weight.grad is not None
        torch.testing.assert_close(weight.grad, wanted[weight_name], rtol=1e-4, atol=1e-5)


def test_dpo_begins_at_even_odds_and_widens_the_margin() -> None:
    policy, reference = gemma(), gemma().requires_grad_(False)
    config = dpo.Config(steps=60, strength=0.5)
    optimizer = adamw(policy, OptimizerConfig(learning_rate=3e-3))
    steps = list(
        dpo.train(config, policy, pairs().batches(Key(1), 16), optimizer, reference=reference)
    )
    assert steps[0].loss == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-6)
    assert steps[-1].report["accuracy"] > 0.95
    assert steps[-1].report["chosen"] > steps[-1].report["rejected"]


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="strength must be above 0"):
        dpo.Config(strength=0.0)
    with pytest.raises(ConfigError, match="alpha needs its parameter"):
        dpo.Config(divergence="alpha")
    with pytest.raises(ConfigError, match="dropout must lie"):
        reward_model.Config(dropout=1.0)
    odd = TokenBatch.of([[1, 2], [3, 4], [5, 6]])
    with pytest.raises(DataError, match="a pair is two rows"):
        dpo.objective(dpo.Config(), gemma())(gemma(), odd)
