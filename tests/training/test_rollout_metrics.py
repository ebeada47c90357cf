"""Metrics of what was written: ratios of sums, whatever the loss counts."""

from __future__ import annotations

import pytest
import torch

from cabochon.core import Key, LinearPrediction
from cabochon.data.continuations import Sequences, Written
from cabochon.training import rollout_metrics


def written(length: int, *, own: bool, stopped: bool, reward: float = 0.0) -> Written:
    return Written(
        prompt=torch.tensor([3, 4]),
        tokens=torch.full((length,), 5),
        counts=torch.ones(length, dtype=torch.bool),
        logprob=torch.full((length,), -1.0) if own else None,
        stopped=stopped,
        reward=reward,
    )


def prediction(drawn: Sequences) -> LinearPrediction:
    hidden = torch.randn(*drawn.batch.shape, 4, generator=Key(0).generator())
    return LinearPrediction(hidden=hidden, head=torch.randn(9, 4, generator=Key(1).generator()))


def test_metrics_are_those_of_the_sequences_whatever_weight_divides_them() -> None:
    drawn = Sequences.of(
        [
            written(4, own=True, stopped=True, reward=2.0),
            written(2, own=True, stopped=False, reward=1.0),
            written(3, own=False, stopped=True),
        ]
    )
    made = rollout_metrics.sums(drawn, prediction(drawn), rewarded=True)
    sums = {name: value.item() for name, value in made.items()}
    for weight in (1.0, 9.0):
        divided = {name: value / weight for name, value in sums.items()}
        found = rollout_metrics.metrics({"divergence": 0.5, **divided})
        assert found["divergence"] == 0.5
        assert found["completion_tokens"] == pytest.approx(3.0)
        assert found["on_policy"] == pytest.approx(2 / 3)
        assert found["stopped"] == pytest.approx(0.5)
        assert found["reward"] == pytest.approx(1.5)


def test_the_gap_is_between_what_was_recorded_and_what_is_computed_now() -> None:
    drawn = Sequences.of([written(3, own=False, stopped=True), written(4, own=True, stopped=True)])
    given = prediction(drawn)
    logprob = given.logits(slice(None)).log_softmax(-1).view(2, -1, 9)
    wanted = (logprob[1, 1:5, 5] + 1.0).abs().mean().item()
    sums = rollout_metrics.sums(drawn, given)
    found = rollout_metrics.metrics({name: value.item() for name, value in sums.items()})
    assert found["logprob_gap"] == pytest.approx(wanted, rel=1e-5)


def test_without_own_sequences_nothing_is_said_of_them() -> None:
    drawn = Sequences.of([written(3, own=False, stopped=True)])
    sums = rollout_metrics.sums(drawn, prediction(drawn))
    found = rollout_metrics.metrics({name: value.item() for name, value in sums.items()})
    assert found == {"completion_tokens": 3.0, "on_policy": 0.0}
