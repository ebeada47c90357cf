"""RLHF from what a writer of its own draws ahead: lags, versions, and the limit of none."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from two_token_world import EOS, LENGTH, WRITTEN, Table, judge

from cabochon.algorithms import rlhf
from cabochon.core import Group, Key, Step, TokenBatch
from cabochon.core.errors import ConfigError, DataError
from cabochon.rewards.ahead import Ahead
from cabochon.rewards.experience import Experience
from cabochon.training import OptimizerConfig, adamw
from cabochon.training.anchors import anchor_of

CONFIG = rlhf.Config(
    samples=3, steps=6, accumulate=2, updates=2, correction="truncate", warmup=0,
    max_new_tokens=LENGTH,
)  # fmt: skip


def prompts() -> Iterator[TokenBatch]:
    for number in itertools.count():
        rows = [[1 + (number + row) % 3] for row in range(3)]
        yield TokenBatch.of(rows, masks=[[False]] * 3)


def ahead(policy: Table, config: rlhf.Config, lag: int, reward=judge, **more: int) -> Ahead:
    return Ahead(
        policy,
        lambda writer: rlhf.experiences(
            config, writer, prompts(), reward=reward, key=Key(3), stop_ids=(EOS,)
        ),
        lag=lag, total=config.steps * config.accumulate, accumulate=config.accumulate,
        updates=config.updates, **more,
    )  # fmt: skip


def run(
    policy: Table, config: rlhf.Config, source: Iterator[Experience] | None, pause: float = 0.0
) -> tuple[list[Step], list[Experience]]:
    seen: list[Experience] = []
    optimizer = adamw(policy, OptimizerConfig(learning_rate=0.1, weight_decay=0.0))
    anchor = anchor_of(policy, config.anchor_config)
    steps = []
    for step in rlhf.train(
        config, policy, anchor, prompts(), optimizer, key=Key(3), stop_ids=(EOS,),
        reward=judge if source is None else None, source=source, observe=seen.append,
    ):  # fmt: skip
        time.sleep(pause)
        steps.append(step)
    return steps, seen


def test_at_lag_zero_it_is_the_synchronous_run_bit_for_bit() -> None:
    first, second = Table(0), Table(0)
    wanted, _ = run(first, CONFIG, None)
    with ahead(second, CONFIG, 0) as source:
        found, seen = run(second, CONFIG, source)
    assert torch.equal(first.logits, second.logits)
    assert found == wanted
    assert [each.version for each in seen] == [2 * (number // 2) for number in range(12)]


def test_at_lag_zero_every_ratio_is_one() -> None:
    config = replace(CONFIG, updates=1)
    policy = Table(0)
    with ahead(policy, config, 0) as source:
        steps, _ = run(policy, config, source)
    for step in steps:
        assert step.report["lag"] == 0.0
        assert step.report["effective"] == pytest.approx(1.0, abs=1e-6)
        assert step.report["clipped"] == 0.0
        assert step.report["logprob_gap"] < 1e-6


@pytest.mark.parametrize("lag", [1, 3])
def test_nothing_is_older_than_the_lag_and_says_who_wrote_it(lag: int) -> None:
    """Where the learner is slow the writer is as far ahead as it may be."""
    config = replace(CONFIG, updates=1, steps=10)
    policy = Table(0)
    kept: dict[int, Tensor] = {}

    with ahead(policy, config, lag) as source:

        def watched() -> Iterator[Experience]:
            for number in itertools.count():
                kept.setdefault(number // 2, policy.logits.detach().clone())
                try:
                    yield next(source)
                except StopIteration:
                    return

        steps, seen = run(policy, config, watched(), pause=0.02)
    ages = [each.number // 2 - each.version for each in seen]
    assert len(seen) == 20
    assert all(0 <= age <= lag for age in ages)
    assert max(ages) == lag
    assert steps[-1].report["lag"] == pytest.approx(lag)
    assert min(step.report["effective"] for step in steps[lag:]) < 1.0
    writer = Table(0)
    for each in seen:  # the recorded probabilities are those of the version that is named
        with torch.no_grad():
            writer.logits.copy_(kept[each.version])
        for group, versions in zip(each.groups, each.token_versions, strict=True):
            laws = dict(zip(WRITTEN, writer.logprobs(int(group.prompt[-1])), strict=True))
            for completion, tokens in zip(group.completions, versions, strict=True):
                wanted = laws[tuple(completion.tokens.tolist())]
                torch.testing.assert_close(completion.logprob, wanted.detach())
                assert (tokens == each.version).all()


def test_learning_and_writing_go_on_at_the_same_time() -> None:
    """A reward that takes a while is paid for beside a learner that takes a while."""
    config = replace(CONFIG, updates=1, accumulate=1, steps=12)

    def slow(groups: Sequence[Group]) -> Tensor:
        time.sleep(0.05)
        return judge(groups)

    seconds = {}
    for lag in (0, 1):
        policy = Table(0)
        with ahead(policy, config, lag, slow) as source:
            next(iter(source))
            begin = time.monotonic()
            for _ in source:
                time.sleep(0.05)
            seconds[lag] = time.monotonic() - begin
    assert seconds[0] > 1.1
    assert seconds[1] < 0.8 * seconds[0]


def test_what_the_reward_fails_with_reaches_the_learner() -> None:
    def broken(groups: Sequence[Group]) -> Tensor:
        raise KeyError("no answer")

    policy = Table(0)
    before = set(threading.enumerate())
    with (
        pytest.raises(DataError, match="the reward failed at prompt 0"),
        ahead(policy, CONFIG, 2, broken) as source,
    ):
        run(policy, CONFIG, source)
    assert set(threading.enumerate()) <= before
    with pytest.raises(ConfigError, match="lag"):
        ahead(policy, CONFIG, -1)
