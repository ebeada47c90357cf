"""A judged policy against what its own logits say exactly."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "generation"))
from small_gemma import random_prompts, small_gemma

from cabochon.core import Group, Key, TokenBatch
from cabochon.core.errors import ConfigError, NonFinite
from cabochon.evaluation.policies import judge, mean_of
from cabochon.generation.engine import Settings
from cabochon.models.gemma.decoder import Gemma

PROMPTS = random_prompts(3, 7, 5)


def lengths(groups: list[Group]) -> torch.Tensor:
    return torch.tensor([[float(len(c.tokens)) for c in group.completions] for group in groups])


def moved(scale: float) -> Gemma:
    model = small_gemma()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=Key(5).fold(name).generator())
            weight.add_(scale * noise * weight.std())
    return model


def law(model: Gemma, prompt: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """V: the logarithm of what it writes first."""
    logits = model(TokenBatch.of([prompt])).logits(slice(len(prompt) - 1, len(prompt)))[0]
    return (logits / temperature).log_softmax(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_over_one_token_divergence_and_entropy_are_those_of_the_logits(temperature: float) -> None:
    policy, reference = moved(0.3), small_gemma()
    settings = Settings(max_new_tokens=1, temperature=temperature)
    found = judge(policy, reference, PROMPTS, lengths, settings, Key(0), samples=1500)
    with torch.no_grad():
        own = [law(policy, each, temperature) for each in PROMPTS]
        other = [law(reference, each, temperature) for each in PROMPTS]
    for place, (p, q) in enumerate(zip(own, other, strict=True)):
        for values, exact in (
            (found.log_ratio[place], (p.exp() * (p - q)).sum()),
            (found.surprisal[place], -(p.exp() * p).sum()),
        ):
            error = values.std() / 1500**0.5
            assert abs(values.mean() - exact) < 4 * error
    assert found.point("x").reward == 1.0
    assert found.entropy_per_token == pytest.approx(found.surprisal.mean().item(), rel=1e-5)


def test_a_policy_is_at_no_distance_from_itself() -> None:
    model = small_gemma()
    settings = Settings(max_new_tokens=8, stop_ids=tuple(range(20)))
    found = judge(model, model, PROMPTS, lengths, settings, Key(0), samples=5)
    assert found.log_ratio.abs().max() < 1e-4
    assert found.reward.shape == (3, 5)
    assert torch.equal(found.reward, found.length)
    assert torch.equal(found.stopped.bool(), (found.length < 8) | (found.stopped == 1))
    assert 0 < found.stopped.mean() <= 1
    assert found.distinct > 0.2


def test_policies_are_compared_on_the_same_random_numbers() -> None:
    settings = Settings(max_new_tokens=6)
    one, two = (
        judge(small_gemma(), moved(0.1), PROMPTS, lengths, settings, Key(3), samples=2)
        for _ in range(2)
    )
    assert torch.equal(one.log_ratio, two.log_ratio)


def test_the_interval_of_a_mean_is_over_prompts() -> None:
    """Samples that repeat each other add no sureness."""
    values = torch.randn(40, 1)
    assert mean_of(values) == mean_of(values.expand(40, 7))
    assert mean_of(values[:1]).interval is None


def test_what_has_no_divergence_or_an_infinite_one_is_refused() -> None:
    policy, reference = moved(1.0), small_gemma()
    with pytest.raises(ConfigError, match="greedily"):
        judge(policy, reference, PROMPTS, lengths, Settings(temperature=0.0), Key(0))
    cut = Settings(max_new_tokens=4, top_k=1)
    with pytest.raises(NonFinite, match="without cuts"):
        judge(policy, reference, PROMPTS, lengths, cut, Key(0))
