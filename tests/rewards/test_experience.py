"""Experience: what is drawn, what it is worth above its baseline, and how it is kept."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cabochon.core import Completion, Group, Key, TokenBatch
from cabochon.core.errors import DataError, FolderError
from cabochon.data.rlds.frames import whole_frames
from cabochon.data.rlds.reader import Episodes, validate
from cabochon.data.rlds.records import episode_of
from cabochon.data.rlds.writer import EpisodeWriter
from cabochon.generation.engine import Settings, generate
from cabochon.models.gemma import Gemma, preset
from cabochon.rewards.experience import Experience, continued, draw, gains
from cabochon.rewards.records import recorded, recorder, replayed
from cabochon.rewards.returns import due
from cabochon.rewards.scores import Scores


class Ids:
    """All that a recorder asks of a tokenizer."""

    def fingerprint(self) -> str:
        return "abc"


def experience(
    number: int, *, writer: str = "policy", prompts: int = 2, seed: int = 0
) -> Experience:
    generator = Key(seed).fold(writer, number).generator()
    groups = []
    for place in range(prompts):
        completions = []
        for _ in range(3):
            length = int(torch.randint(1, 6, (), generator=generator))
            completions.append(
                Completion(
                    tokens=torch.randint(0, 40, (length,), generator=generator),
                    logprob=-torch.rand(length, generator=generator),
                    model_logprob=-torch.rand(length, generator=generator),
                    stopped=length % 2 == 0,
                )
            )
        groups.append(Group(prompt=torch.arange(place + 1), completions=tuple(completions)))
    total = torch.randn(prompts, 3, generator=generator)
    return Experience(
        number=number,
        groups=tuple(groups),
        scores=Scores(total=total, parts={"length": total / 3, "style": total * 2}),
        version=number // 2,
        writer=writer,
    )


def numbers(of: Experience) -> list[Tensor]:
    found = [of.scores.total, *(part for _, part in sorted(of.scores.parts.items()))]
    for group in of.groups:
        found.append(group.prompt)
        for each in group.completions:
            found += [each.tokens, each.logprob, each.model_logprob, torch.tensor(each.stopped)]
    return found


def assert_same(found: Experience, wanted: Experience) -> None:
    assert (found.number, found.version, found.writer) == (
        wanted.number, wanted.version, wanted.writer,
    )  # fmt: skip
    assert found.judged == wanted.judged
    assert all(torch.equal(*pair) for pair in zip(numbers(found), numbers(wanted), strict=True))


# --- drawing -------------------------------------------------------------------------------------


def test_an_experience_is_what_the_sampler_draws_and_the_reward_says() -> None:
    config = replace(
        preset("gemma2-nano"), vocab_size=40, width=16, layers=1, heads=2, head_width=8,
        kv_heads=1, ffn_width=24, query_scalar=8, context=32,
    )  # fmt: skip
    model = Gemma.init(config, Key(0))
    prompts, settings = [torch.arange(4), torch.arange(7)], Settings(max_new_tokens=5)

    def lengths(groups: Sequence[Group]) -> Tensor:
        return torch.tensor([[float(len(c.tokens)) for c in g.completions] for g in groups])

    found = draw(model, prompts, lengths, settings, Key(1), 3, number=8, version=4, indices=[5, 9])
    wanted = generate(model, prompts, settings, Key(1), 3, indices=[5, 9])
    assert [c.tokens.tolist() for g in found.groups for c in g.completions] == [
        c.tokens.tolist() for g in wanted for c in g.completions
    ]
    assert torch.equal(found.scores.total, lengths(wanted))
    assert (found.number, found.version, found.writer) == (8, 4, "policy")


# --- baselines -----------------------------------------------------------------------------------


def test_gains_by_hand() -> None:
    rewards = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]])
    assert torch.equal(gains(rewards, "none"), rewards)
    assert gains(rewards, "prompt").tolist() == [[-3.0, -1.5, 4.5], [-1.5, -1.5, 3.0]]
    torch.testing.assert_close(
        gains(rewards, "batch"), torch.tensor([[-1.2, 0.0, 4.8], [-2.4, -2.4, 1.2]])
    )
    normalised = gains(rewards, "group_normalised")
    torch.testing.assert_close(normalised[0], torch.tensor([-2.0, -1.0, 3.0]) / (7**0.5 + 1e-4))


@pytest.mark.parametrize("value", [0.1, -3.3e7, 0.0])
@pytest.mark.parametrize("baseline", ["prompt", "batch", "group_normalised"])
def test_equal_rewards_gain_exactly_nothing(baseline: str, value: float) -> None:
    for count in (1, 3, 7):
        assert not gains(torch.full((2, count), value), baseline).any()  # type: ignore[arg-type]


# --- records -------------------------------------------------------------------------------------


def test_records_are_read_as_they_were_observed(tmp_path: Path) -> None:
    wanted = [
        experience(number, writer=writer) for number in range(5) for writer in ("policy", "anchor")
    ]
    with recorder(tmp_path / "rollouts", Ids(), notes={"run": "x"}) as record:
        for each in wanted:
            record(each)
    assert list(validate(tmp_path / "rollouts")) == []
    for found, each in zip(replayed(tmp_path / "rollouts", 0), wanted, strict=True):
        assert_same(found, each)
    later = list(replayed(tmp_path / "rollouts", 3, writer="anchor"))
    for found, each in zip(later, [wanted[7], wanted[9]], strict=True):
        assert_same(found, each)


def test_versions_of_single_tokens_and_missing_rewards_are_kept(tmp_path: Path) -> None:
    plain = experience(0)
    versions = tuple(
        tuple(torch.arange(len(each.tokens)) for each in group.completions)
        for group in plain.groups
    )
    newest = int(torch.cat([each for group in versions for each in group]).max())
    mixed = replace(plain, versions=versions, version=newest)
    scores = Scores(total=torch.zeros(2, 3), parts=plain.scores.parts)
    unjudged = replace(experience(1), scores=scores, judged=False)
    with recorder(tmp_path, Ids()) as record:
        record(mixed)
        record(unjudged)
    first, second = replayed(tmp_path, 0)
    assert_same(first, mixed)
    pairs = zip(first.versions, versions, strict=True)
    assert all(torch.equal(a, b) for x, y in pairs for a, b in zip(x, y, strict=True))
    assert second.versions == ()
    assert not second.judged


def test_what_is_observed_again_is_compared_and_not_written_twice(tmp_path: Path) -> None:
    with recorder(tmp_path, Ids()) as record:
        for number in range(6):
            record(experience(number))
    with recorder(tmp_path, Ids()) as record:
        for number in range(4, 9):  # a run that goes on from the checkpoint after 4
            record(experience(number))
    assert [each.number for each in replayed(tmp_path, 0)] == [*range(9)]
    with (
        recorder(tmp_path, Ids()) as record,
        pytest.raises(
            DataError, match="other completions or rewards for prompt 0 of micro-batch 7"
        ),
    ):
        record(experience(7, seed=1))


def test_ranks_write_side_by_side(tmp_path: Path) -> None:
    with recorder(tmp_path, Ids()) as first, recorder(tmp_path, Ids(), rank=1) as second:
        for number in range(3):
            first(experience(number))
            second(experience(number, seed=1))
    for rank in (0, 1):
        found = replayed(tmp_path, 0, rank=rank)
        for number, each in enumerate(found):
            assert_same(each, experience(number, seed=rank))


def test_a_gap_between_records_is_said(tmp_path: Path) -> None:
    with recorder(tmp_path, Ids()) as record:
        record(experience(0))
        record(experience(2))
    found = replayed(tmp_path, 0)
    assert next(found).number == 0
    with pytest.raises(DataError, match="no record of micro-batch 1, but of 2"):
        next(found)
    with pytest.raises(FolderError):
        next(replayed(tmp_path / "nowhere", 0))


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_experience import Ids, experience, recorder
record = recorder(Path({folder!r}), Ids())
for number in range(4):
    record(experience(number))
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("frames", [1, 2, 4, 6])
def test_a_process_that_is_killed_while_it_records_leaves_whole_micro_batches(
    tmp_path: Path, frames: int
) -> None:
    """A writer ahead may have had other weights after the restart: half of what it wrote before
    does not go with the other half of what it writes then.
    """
    folder = tmp_path / "rollouts"
    source = KILLED.format(tests=str(Path(__file__).parent), folder=str(folder))
    done = subprocess.run([sys.executable, "-c", source], env=os.environ, check=False)
    assert done.returncode == -signal.SIGKILL
    journal = folder / "rollouts-train.unfinished"
    ends, _ = whole_frames(journal)
    with journal.open("r+b") as file:  # two groups of three, and the frame behind them
        file.truncate(int(ends[-1 - frames]))
    (left,) = Episodes(folder).unfinished
    assert left.episodes == 3 * 6
    assert left.complaint == f"{7 - frames} episodes of a group that is not whole"
    with recorder(folder, Ids()) as record:
        recalled = list(record.recalled(1))
        assert [each.number for each in recalled] == [1, 2]
        assert_same(recalled[1], experience(2))
        for number in range(2, 5):
            record(experience(number, seed=int(number == 3)))
    found = list(replayed(folder, 0))
    assert len(found) == 5
    for number, each in enumerate(found):
        assert_same(each, experience(number, seed=int(number == 3)))


def test_episodes_of_something_else_are_no_records(tmp_path: Path) -> None:
    seen = {"place": np.zeros(3, np.float32)}
    walk = episode_of(
        observations=seen, actions=np.zeros(2, np.int64), rewards=np.zeros(2), terminated=True
    )
    with EpisodeWriter(tmp_path / "walk") as writer:
        writer.write(walk)
    with pytest.raises(DataError, match="kind None, expected 'language rollouts'"):
        recorded(tmp_path / "walk")


def test_what_is_recalled_ends_where_a_micro_batch_is_missing(tmp_path: Path) -> None:
    with recorder(tmp_path / "rollouts", Ids()) as record:
        for number in (0, 1, 3):  # a student that writes by a coin wrote nothing for 2
            record(experience(number))
    with recorder(tmp_path / "rollouts", Ids()) as record:
        assert [each.number for each in record.recalled(0)] == [0, 1]
        assert list(record.recalled(2)) == []


@pytest.mark.parametrize(("known", "begin", "skipped"), [(0, 2, 0), (3, 3, 1), (4, 4, 0)])
def test_a_run_continues_with_what_was_drawn_and_then_draws(
    known: int, begin: int, skipped: int
) -> None:
    """Two steps were made, of two micro-batches each; `known` more were drawn, half of one more."""
    both = [
        experience(4 + number, writer=writer)
        for number in range(known)
        for writer in ("policy", "anchor")
    ]
    recalled = [*both, experience(4 + known, writer="policy")]
    asked = []

    def drawn(due: Iterable[TokenBatch], step: int) -> Iterator[Experience]:
        asked.append(step)
        for number, _ in enumerate(due, step * 2):
            for writer in ("policy", "anchor"):
                yield experience(number, writer=writer)

    batches = [TokenBatch.of([[1]])] * 6
    found = list(continued(recalled, drawn, batches, start=2, accumulate=2, writers=2))
    assert asked == [begin]
    assert skipped == known % 2
    wanted = [(n, w) for n in range(4, 10) for w in ("policy", "anchor")]
    assert [(each.number, each.writer) for each in found] == wanted


@pytest.mark.parametrize(
    "other",
    [
        experience(1),
        experience(0, writer="anchor"),
        replace(experience(0), judged=False),
    ],
)
def test_an_experience_that_is_not_due_is_refused(other: Experience) -> None:
    assert [each.number for each in due([experience(3), experience(4)], 3, 3)] == [3, 4]
    with pytest.raises(DataError, match="expected judged experience 0 of the policy, 3 samples"):
        next(due([other], 0, 3))
    with pytest.raises(DataError, match=r"got experience 0 of the policy, judged, \[3\] samples"):
        next(due([experience(0)], 0, 4))
