"""GKD: which sequences are learned from, what is learned of them, and what is refused."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cabochon.algorithms import gkd
from cabochon.core import Group, Key, LinearPrediction, TokenBatch
from cabochon.core.errors import ConfigError, DataError, TokenizerMismatch
from cabochon.data.continuations import Sequences, Written, prompts_of, references_of
from cabochon.losses import f_divergences, linear
from cabochon.models.gemma import Gemma, preset
from cabochon.rewards.experience import Experience
from cabochon.training import OptimizerConfig, adamw

VOCABULARY, EOS, BOS = 40, 1, 2
CONFIG = replace(
    preset("gemma2-nano"), vocab_size=VOCABULARY, width=16, layers=2, heads=2, head_width=8,
    kv_heads=1, ffn_width=24, query_scalar=8, window=4, context=32, eos_id=EOS, bos_id=BOS,
)  # fmt: skip
DIVERGENCES = [
    ("forward_kl", None), ("reverse_kl", None), ("jsd", 0.0), ("jsd", 0.5), ("jsd", 1.0),
    ("jsd_paper", 0.1), ("hellinger", None), ("chi_square", None), ("alpha", 0.0), ("alpha", 1.0),
    ("alpha", 0.5), ("jeffreys", None),
]  # fmt: skip


def gemma(seed: int = 0, **changes: Any) -> Gemma:
    model = Gemma.init(replace(CONFIG, **changes), Key(seed))
    with torch.no_grad():
        model.embedding.mul_(8.0)  # so that it has opinions
    return model


def examples(rows: int = 3, seed: int = 0) -> TokenBatch:
    """Prompts of unequal lengths with completions that end in EOS."""
    generator = Key(seed).fold("examples").generator()
    prompts = [torch.randint(3, VOCABULARY, (4 + n,), generator=generator) for n in range(rows)]
    ends = [torch.randint(3, VOCABULARY, (7 - n,), generator=generator) for n in range(rows)]
    return TokenBatch.of(
        [torch.cat([a, b, torch.tensor([EOS])]) for a, b in zip(prompts, ends, strict=True)],
        masks=[
            [False] * len(a) + [True] * (len(b) + 1) for a, b in zip(prompts, ends, strict=True)
        ],
    )


def drawn_from(
    config: gkd.Config, student: Gemma, batch: TokenBatch, step: int = 0, **more: Any
) -> Sequences:
    found = gkd.sequences(
        config, student, iter([batch]), key=Key(5), stop_ids=(EOS,), start=step, **more
    )
    return next(found)


def gradient(model: nn.Module, total: Tensor) -> Tensor:
    found = torch.autograd.grad(total, list(model.parameters()))
    return torch.cat([each.flatten() for each in found])


def run(config: gkd.Config, student: Gemma, teacher: Gemma | None, **more: Any) -> list[Any]:
    start = more.pop("start", 0)
    batches = (examples(seed=number) for number in itertools.count(start * config.accumulate))
    optimizer = more.pop("optimizer", None) or adamw(student, OptimizerConfig(learning_rate=1e-2))
    return list(
        gkd.train(
            config, student, more.pop("batches", batches), optimizer, key=Key(5), stop_ids=(EOS,),
            teacher=teacher, start=start, **more,
        )
    )  # fmt: skip


# --- which sequences -----------------------------------------------------------------------------


def test_lambda_0_never_samples_and_takes_the_data_as_it_is(monkeypatch: Any) -> None:
    student, batch = gemma(), examples()
    monkeypatch.setattr(Gemma, "new_cache", None)  # no sampler can do without
    for name in ("batch", "sequence"):
        drawn = drawn_from(gkd.Config(preset="supervised_kd", draw=name), student, batch)
        assert not drawn.own.any()
        assert torch.equal(drawn.batch.tokens, batch.tokens)
        assert torch.equal(drawn.batch.mask, batch.mask)


def test_lambda_1_never_reads_a_target(monkeypatch: Any) -> None:
    student, batch = gemma(), examples()
    after = batch.mask.cumsum(1) > 0
    spoiled = replace(
        batch,
        tokens=torch.where(after.roll(1, 1) & after, -7, batch.tokens),
        targets=torch.full_like(batch.targets, -7),
    )
    for name in ("batch", "sequence"):
        config = gkd.Config(draw=name, max_new_tokens=6)
        first, second = (drawn_from(config, student, each) for each in (batch, spoiled))
        assert first.own.all()
        assert torch.equal(first.batch.tokens, second.batch.tokens)
        assert torch.equal(first.recorded, second.recorded)


def test_prompts_alone_serve_where_nothing_else_is_read() -> None:
    bare = TokenBatch.of(prompts_of(examples()), masks=[[False] * n for n in (4, 5, 6)])
    config = gkd.Config(max_new_tokens=6)
    with_targets, without = (drawn_from(config, gemma(), each) for each in (examples(), bare))
    assert torch.equal(with_targets.batch.tokens, without.batch.tokens)
    with pytest.raises(DataError, match="row 0 is a prompt of 4 tokens that nothing follows"):
        drawn_from(gkd.Config(preset="supervised_kd"), gemma(), bare)


@pytest.mark.parametrize("draw", ["batch", "sequence"])
def test_lambda_is_how_often_the_student_writes(draw: str) -> None:
    config = gkd.Config(preset="imit_kd", on_policy_fraction=0.3, draw=draw, max_new_tokens=1)
    student = gemma()
    shares = [drawn_from(config, student, examples(), step).own.float() for step in range(200)]
    mixed = [share for share in shares if 0.0 < share.mean() < 1.0]
    assert bool(mixed) == (draw == "sequence")
    assert torch.stack(shares).mean().item() == pytest.approx(0.3, abs=0.07)


def test_a_draw_depends_on_the_step_and_the_row_alone() -> None:
    config, student, batch = gkd.Config(max_new_tokens=8), gemma(), examples()
    first, again, later = (drawn_from(config, student, batch, step) for step in (3, 3, 4))
    assert torch.equal(first.batch.tokens, again.batch.tokens)
    assert not torch.equal(first.batch.tokens, later.batch.tokens)
    alone = drawn_from(config, student, batch.rows(0, 1), 3)
    length = int((alone.batch.documents >= 0).sum())
    assert torch.equal(alone.batch.tokens[0, :length], first.batch.tokens[0, :length])


@pytest.mark.parametrize("draw", ["batch", "sequence"])
def test_ranks_draw_together_what_one_process_would(monkeypatch: Any, draw: str) -> None:
    student, batch = gemma(), examples(4)
    config = gkd.Config(preset="imit_kd", draw=draw, max_new_tokens=6)

    def lines(drawn: Sequences) -> list[tuple[bool, list[int]]]:
        rows = zip(drawn.own.tolist(), drawn.batch.tokens, drawn.batch.documents, strict=True)
        return sorted((own, tokens[real >= 0].tolist()) for own, tokens, real in rows)

    for step in range(6):
        whole = lines(drawn_from(config, student, batch, step))
        parts = []
        for rank in range(2):
            with monkeypatch.context() as patched:
                patched.setattr(gkd.parallel, "rank", lambda rank=rank: rank)
                patched.setattr(gkd.parallel, "ranks", lambda: 2)
                share = batch.rows(2 * rank, 2 * rank + 2)
                parts += lines(drawn_from(config, student, share, step))
        assert sorted(parts) == whole


def test_what_was_drawn_is_the_students_and_counts_from_the_prompt_to_the_stop() -> None:
    student, batch = gemma(), examples()
    config = gkd.Config(max_new_tokens=12)
    for step in range(10):
        drawn = drawn_from(config, student, batch, step)
        for row, prompt in enumerate(prompts_of(batch)):
            tokens = drawn.batch.tokens[row][drawn.batch.documents[row] >= 0]
            assert torch.equal(tokens[: len(prompt)], prompt)
            written = tokens[len(prompt) :].tolist()
            assert EOS not in written[:-1]
            assert bool(drawn.stopped[row]) == (written[-1] == EOS)
            assert drawn.stopped[row] or len(written) == 12
            assert drawn.batch.mask[row].sum() == len(written)
            assert drawn.batch.mask[row, len(prompt) - 1]
        prediction = student(drawn.batch)
        logprob = prediction.logits(slice(None)).log_softmax(-1)
        own = logprob.gather(-1, drawn.batch.targets.flatten()[:, None]).view_as(drawn.recorded)
        torch.testing.assert_close(
            own[drawn.batch.mask], drawn.recorded[drawn.batch.mask], atol=1e-5, rtol=1e-5
        )


def test_nothing_is_learned_after_the_first_stop_token() -> None:
    """Padding that is also EOS is found by its place, never by its id."""
    tokens = torch.tensor([[5, 6, 7, EOS, EOS, EOS]])
    batch = TokenBatch.of(list(tokens), masks=[[False, False, True, True, True, True]])
    (found,) = references_of(batch, {EOS}, [0])
    assert found.counts.tolist() == [True, True, False, False]
    assert found.stopped


def test_a_row_with_two_documents_is_no_prompt() -> None:
    batch = examples()
    documents = batch.documents.clone()
    documents[1, 3:] = 1
    with pytest.raises(DataError, match=r"rows \[1\] do not hold one document"):
        prompts_of(replace(batch, documents=documents))


# --- what is learned -----------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "parameter"), DIVERGENCES)
@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_a_student_that_is_its_teacher_has_loss_0_and_no_gradient(
    name: str, parameter: float | None, fraction: float
) -> None:
    student = gemma()
    config = gkd.Config(
        divergence=name, divergence_parameter=parameter, on_policy_fraction=fraction
    )
    loss = gkd.objective(config, gemma())(student, drawn_from(config, student, examples()))
    assert loss.total.item() == pytest.approx(0.0, abs=1e-5)
    assert gradient(student, loss.total).abs().max().item() < 1e-5


@pytest.mark.parametrize("average", ["token", "sequence"])
def test_both_averages_are_the_written_out_ones(average: str) -> None:
    student, teacher = gemma(0), gemma(1, final_cap=2.0)
    config = gkd.Config(average=average, divergence="reverse_kl", max_new_tokens=9)
    drawn = drawn_from(config, student, examples())
    loss = gkd.objective(config, teacher)(student, drawn)
    rows = []
    for row in range(3):
        p, q = (
            model(drawn.batch).logits(slice(None)).unflatten(0, drawn.batch.shape)[row]
            for model in (teacher, student)
        )
        values = f_divergences.divergence(f_divergences.ReverseKL(), p, q)
        rows.append(values[drawn.batch.mask[row]])
    wanted = torch.cat(rows).mean() if average == "token" else torch.stack(
        [each.mean() for each in rows]
    ).mean()  # fmt: skip
    torch.testing.assert_close(loss.total / loss.weight, wanted)
    torch.testing.assert_close(loss.report["divergence"], loss.total.detach())


def test_splitting_a_batch_changes_neither_average() -> None:
    student, teacher = gemma(0), gemma(1)
    for average in ("token", "sequence"):
        config = gkd.Config(average=average, preset="supervised_kd")
        whole = gkd.objective(config, teacher)(student, drawn_from(config, student, examples()))
        parts = [
            gkd.objective(config, teacher)(
                student, drawn_from(config, student, examples().rows(at, at + 1))
            )
            for at in range(3)
        ]
        torch.testing.assert_close(sum(each.total for each in parts), whole.total)
        torch.testing.assert_close(sum(each.weight for each in parts), whole.weight)


def test_the_three_temperatures_are_three() -> None:
    student, teacher, batch = gemma(0), gemma(1), examples()
    base = {"preset": "supervised_kd", "average": "token"}
    drawn = drawn_from(gkd.Config(**base), student, batch)
    p, q = (
        model(drawn.batch).logits(slice(None))[batch.mask.flatten()] for model in (teacher, student)
    )
    for wanted, settings in (
        ((p, q), {"sampling_temperature": 0.5}),
        ((p / 2.0, q), {"teacher_temperature": 2.0}),
        ((p, q / 0.7), {"student_temperature": 0.7}),
    ):
        loss = gkd.objective(gkd.Config(**base, **settings), teacher)(student, drawn)
        dense = f_divergences.divergence(f_divergences.KL(), *wanted).sum()
        torch.testing.assert_close(loss.total, dense)
    cold, hot = (
        drawn_from(gkd.Config(sampling_temperature=t, max_new_tokens=8), student, batch)
        for t in (0.0, 3.0)
    )
    assert cold.recorded[cold.batch.mask].mean() > hot.recorded[hot.batch.mask].mean()


def test_prompts_padding_and_what_follows_the_stop_change_no_loss() -> None:
    student, teacher = gemma(0), gemma(1)
    config = gkd.Config(max_new_tokens=6)
    drawn = drawn_from(config, student, examples())

    class Spoiled:
        def __init__(self, model: Gemma) -> None:
            self.model = model

        def __call__(self, batch: TokenBatch) -> LinearPrediction:
            made = self.model(batch)
            hidden = made.hidden.clone()
            hidden[~batch.mask] = 1e3
            return replace(made, hidden=hidden)

    loss = gkd.objective(config, teacher)(student, drawn)
    other = gkd.objective(config, Spoiled(teacher))(Spoiled(student), drawn)
    assert torch.equal(loss.total, other.total)


def test_no_gradient_reaches_the_teacher_and_the_draw_leaves_no_graph() -> None:
    student, teacher = gemma(0), gemma(1)
    config = gkd.Config(max_new_tokens=6)
    drawn = drawn_from(config, student, examples())
    gkd.objective(config, teacher)(student, drawn).total.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not any(value.requires_grad for value in (drawn.recorded, drawn.gain))


def test_sft_is_the_cross_entropy_of_the_text() -> None:
    student, batch = gemma(), examples()
    for name in ("sft", "seq_kd"):
        config = gkd.Config(preset=name, average="token")
        loss = gkd.objective(config, None)(student, drawn_from(config, student, batch))
        wanted = linear.cross_entropy(student(batch), batch)
        torch.testing.assert_close(loss.total, wanted.total)
        torch.testing.assert_close(loss.weight, wanted.weight)
        torch.testing.assert_close(
            gradient(student, loss.total), gradient(student, wanted.total), atol=1e-5, rtol=1e-4
        )


# --- the gradient through the draw ---------------------------------------------------------------

STATES = 1 + 3  # of two steps over three tokens: the start, and after each token


class Table(nn.Module):
    """A law for each state of a process of two steps over three tokens."""

    context = 8

    def __init__(self, seed: int) -> None:
        super().__init__()
        drawn = torch.randn(STATES, 3, generator=Key(seed).generator(), dtype=torch.float64)
        self.law = nn.Parameter(drawn)

    def forward(self, batch: TokenBatch) -> LinearPrediction:
        state = torch.where(batch.positions == 0, 0, 1 + batch.tokens)
        return LinearPrediction(hidden=torch.eye(STATES).double()[state], head=self.law.T)


def every_sequence() -> list[Written]:
    pairs = list(itertools.product(range(3), repeat=2))
    rewards = torch.randn(len(pairs), generator=Key(3).generator()).tolist()
    return [
        Written(
            prompt=torch.tensor([0]), tokens=torch.tensor(pair), logprob=torch.zeros(2),
            counts=torch.ones(2, dtype=torch.bool), reward=reward, gain=reward,
        )
        for pair, reward in zip(pairs, rewards, strict=True)
    ]  # fmt: skip


def probabilities(model: Table, temperature: float = 1.0) -> Tensor:
    """Of all nine sequences."""
    law = (model.law / temperature).softmax(-1)
    return (law[0, :, None] * law[1:]).flatten()


def expected_gradient(config: gkd.Config, student: Table, teacher: Table | None) -> Tensor:
    """Of the objective of single sequences, weighted with how often the student draws them."""
    weights = probabilities(student, config.sampling_temperature).detach()
    total = torch.zeros(STATES * 3, dtype=torch.float64)
    for weight, each in zip(weights, every_sequence(), strict=True):
        loss = gkd.objective(config, teacher)(student, Sequences.of([each]))
        total += weight * gradient(student, loss.total)
    return total


def test_future_credit_is_what_the_gradient_of_the_sequence_divergence_lacks() -> None:
    student, teacher = Table(0), Table(1)
    ours = probabilities(student)
    theirs = probabilities(teacher).detach()
    wanted = gradient(student, (ours * (ours / theirs).log()).sum())
    base = {"divergence": "reverse_kl", "average": "token"}
    without = expected_gradient(gkd.Config(**base), student, teacher)
    with_it = expected_gradient(gkd.Config(**base, credit="future"), student, teacher)
    torch.testing.assert_close(with_it, wanted, atol=1e-6, rtol=1e-5)
    assert (without - wanted).abs().max() > 0.05


def test_future_credit_is_exact_for_the_sum_of_any_divergence_at_any_temperature() -> None:
    student, teacher = Table(0), Table(1)
    law = (student.law / 1.7).softmax(-1)
    terms = f_divergences.divergence(
        f_divergences.JensenShannon(0.3), teacher.law.detach(), student.law
    )
    wanted = gradient(student, terms[0] + (law[0] * terms[1:]).sum())
    found = expected_gradient(
        gkd.Config(
            divergence="jsd", divergence_parameter=0.3, average="token", credit="future",
            sampling_temperature=1.7,
        ), student, teacher,
    )  # fmt: skip
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)


def test_text_that_the_student_did_not_draw_gets_no_future_credit() -> None:
    student, teacher = Table(0), Table(1)
    found = {}
    for own in (True, False):
        for credit in ("none", "future"):
            drawn = Sequences.of(every_sequence())
            drawn = replace(drawn, own=torch.full_like(drawn.own, own))
            config = gkd.Config(divergence="reverse_kl", credit=credit)
            total = gkd.objective(config, teacher)(student, drawn).total
            found[own, credit] = gradient(student, total)
    torch.testing.assert_close(found[False, "future"], found[False, "none"])
    assert (found[True, "future"] - found[True, "none"]).abs().max() > 0.05


def test_alpha_0_is_reinforce_alpha_1_distillation_and_between_their_mixture() -> None:
    student, teacher = Table(0), Table(1)
    settings = {"samples": 2, "divergence": "reverse_kl"}
    reward = torch.tensor([each.reward for each in every_sequence()]).double()
    reinforce = -gradient(student, (probabilities(student) * reward).sum())
    pure = expected_gradient(gkd.Config(divergence="reverse_kl"), student, teacher)
    ends = [
        expected_gradient(gkd.Config(**settings, distillation_weight=a), student, teacher)
        for a in (0.0, 0.25, 1.0)
    ]
    torch.testing.assert_close(ends[0], reinforce, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(ends[2], pure)
    torch.testing.assert_close(ends[1], 0.75 * reinforce + 0.25 * pure, atol=1e-6, rtol=1e-5)


@dataclass
class Length:
    """Rewards short completions."""

    def __call__(self, groups: Sequence[Group], /) -> Tensor:
        return torch.tensor([[-float(len(c.tokens)) for c in g.completions] for g in groups])


def test_rewards_are_learned_and_their_baselines_leave_no_mean() -> None:
    for settings in ({"samples": 4}, {"samples": 1, "baseline": "batch"}):
        config = gkd.Config(
            **settings, distillation_weight=0.0, max_new_tokens=8, steps=16, schedule="constant"
        )
        drawn = drawn_from(config, gemma(), examples(), reward=Length())
        assert drawn.gain.sum().item() == pytest.approx(0.0, abs=1e-4)
        assert drawn.gain.abs().max() > 0
        steps = run(config, gemma(), None, reward=Length())
        first, last = (
            sum(step.report["reward"] for step in some) for some in (steps[:5], steps[-5:])
        )
        assert last > first


# --- training ------------------------------------------------------------------------------------


def test_the_sampler_sees_every_update_at_once() -> None:
    config = gkd.Config(steps=4, max_new_tokens=8, average="token")
    steps = run(config, gemma(0), gemma(1))
    gaps = [step.report["logprob_gap"] for step in steps]
    assert max(gaps) < 1e-5  # an old sampler would be off by the whole update
    assert {step.report["on_policy"] for step in steps} == {1.0}
    assert all(0.0 <= step.report["stopped"] <= 1.0 for step in steps)
    assert all(1.0 <= step.report["completion_tokens"] <= 8.0 for step in steps)
    assert all(step.loss == pytest.approx(step.report["divergence"]) for step in steps)


def test_training_goes_on_from_any_update_bit_for_bit() -> None:
    config = gkd.Config(
        preset="imit_kd", draw="sequence", steps=6, accumulate=2, max_new_tokens=8, samples=1
    )
    whole, parts, teacher = gemma(0), gemma(0), gemma(1)
    all_steps = run(config, whole, teacher)
    optimizer = adamw(parts, OptimizerConfig(learning_rate=1e-2))
    short = run(replace(config), parts, teacher, optimizer=optimizer, batches=_some(6))
    rest = run(config, parts, teacher, optimizer=optimizer, start=3)
    assert [step.loss for step in all_steps] == [step.loss for step in (*short, *rest)]
    for (name, one), (_, other) in zip(
        whole.named_parameters(), parts.named_parameters(), strict=True
    ):
        assert torch.equal(one, other), name


def _some(count: int) -> Iterator[TokenBatch]:
    return (examples(seed=number) for number in range(count))


def test_own_sequences_bring_the_student_to_its_teacher() -> None:
    config = gkd.Config(steps=40, max_new_tokens=8, divergence="jsd", divergence_parameter=0.5)
    steps = run(config, gemma(0), gemma(1))
    first, last = (sum(step.loss for step in some) for some in (steps[:10], steps[-10:]))
    assert last < 0.7 * first


def test_all_that_the_student_wrote_is_shown() -> None:
    seen: list[Experience] = []
    config = gkd.Config(steps=3, accumulate=2, max_new_tokens=4, samples=2)
    run(config, gemma(0), gemma(1), observe=seen.append)
    assert [(each.number, each.version) for each in seen] == [
        (0, 0), (1, 0), (2, 1), (3, 1), (4, 2), (5, 2),
    ]  # fmt: skip
    assert all(len(group.completions) == 2 for each in seen for group in each.groups)
    assert not any(each.judged for each in seen)


def test_an_all_masked_batch_has_nothing_to_learn_and_is_named() -> None:
    batch = examples()
    written = [
        Written(prompt=p, tokens=torch.tensor([5, 6]), counts=torch.zeros(2, dtype=torch.bool))
        for p in prompts_of(batch)
    ]
    loss = gkd.objective(gkd.Config(), gemma(1))(gemma(0), Sequences.of(written))
    assert loss.total.item() == 0.0
    assert loss.weight.item() == 0.0
    counted = replace(written[0], counts=torch.ones(2, dtype=torch.bool))
    both = gkd.objective(gkd.Config(), gemma(1))(gemma(0), Sequences.of([counted, written[1]]))
    assert both.weight.item() == 1.0  # the masked row is no sequence


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"on_policy_fraction": 1.5}, r"on_policy_fraction must lie in \[0, 1\], got 1.5"),
        ({"distillation_weight": -0.1}, r"distillation_weight must lie in \[0, 1\]"),
        ({"divergence": "jsd", "divergence_parameter": 1.1}, r"beta must lie in \[0, 1\], got 1.1"),
        ({"divergence": "jsd"}, "needs its parameter"),
        ({"divergence": "forward_kl", "divergence_parameter": 0.5}, "takes no parameter"),
        ({"divergence": "kl"}, "no divergence is called 'kl'"),
        ({"preset": "sft", "on_policy_fraction": 0.5}, "sft learns the text itself"),
        ({"preset": "seq_kd", "divergence": "reverse_kl"}, "seq_kd learns the text itself"),
        ({"preset": "supervised_kd", "credit": "future"}, "here it never does"),
        ({"student_temperature": float("nan")}, "temperatures"),
        ({"samples": 2, "draw": "sequence", "on_policy_fraction": 0.5}, "draw by batch"),
        ({"distillation_weight": 0.5, "samples": 2, "average": "token"}, "average by sequence"),
        ({"distillation_weight": 0.5}, "needs 2 samples or more"),
        ({"credit": "future", "sampling_temperature": 0.0}, "decoded greedily"),
        ({"teacher_temperature": 0.0}, "temperatures"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"steps": 0}, "at least 1"),
        ({"samples": 0}, "at least 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        gkd.Config(**settings)


def test_a_missing_or_idle_teacher_or_reward_is_refused() -> None:
    reward = Length()
    rl = {"distillation_weight": 0.0, "samples": 2}
    for config, teacher, more in (
        (gkd.Config(steps=1), None, {}),
        (gkd.Config(steps=1, preset="sft"), gemma(1), {}),
        (gkd.Config(steps=1, **rl), gemma(1), {"reward": reward}),
        (gkd.Config(steps=1, **rl), None, {}),
        (gkd.Config(steps=1), gemma(1), {"reward": reward}),
    ):
        with pytest.raises(ConfigError):
            run(config, gemma(0), teacher, **more)


def test_a_teacher_of_another_vocabulary_is_refused() -> None:
    with pytest.raises(TokenizerMismatch):
        run(gkd.Config(steps=1, max_new_tokens=4), gemma(0), gemma(1, vocab_size=VOCABULARY + 1))


def test_a_prompt_that_fills_the_context_is_refused() -> None:
    long = TokenBatch.of([torch.full((32,), 5)], masks=[[False] * 32])
    with pytest.raises(DataError, match="the model's context is 32"):
        drawn_from(gkd.Config(), gemma(), long)


def test_only_a_whole_distribution_has_another_temperature() -> None:
    student = gemma()
    config = gkd.Config(preset="supervised_kd", teacher_temperature=2.0)

    def says_little(batch: TokenBatch) -> Any:
        return gkd.text_targets(batch)

    drawn = drawn_from(config, student, examples())
    with pytest.raises(ConfigError, match="whole distribution"):
        gkd.objective(config, says_little)(student, drawn)
