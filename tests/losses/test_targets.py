"""Targets that say less than all: bounds, limits and averages of the whole divergence."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_divergence import (
    DIVERGENCES,
    EXACT,
    B,
    Dense,
    T,
    V,
    all_logits,
    any_divergence,
    batch_of,
    dense_divergence,
    everything,
    gradients,
    linear,
    of_logits,
)
from torch import Tensor

from cabochon.core import LinearPrediction, SampledTargets, TokenBatch, TopKTargets
from cabochon.core.errors import ConfigError, DataError
from cabochon.losses import f_divergences
from cabochon.losses.f_divergences import KL, FDivergence, JensenShannon
from cabochon.losses.linear import cross_entropy, distillation, divergence, divergence_values


def top_k(teacher: LinearPrediction, k: int, *, pad: int = 0) -> TopKTargets:
    """The k likeliest and the tail, exactly; `pad` more places are left empty."""
    logprob = all_logits(teacher).detach().log_softmax(-1)
    ordered, ids = logprob.sort(-1, descending=True)
    tail = ordered[..., k:].logsumexp(-1) if k < V else torch.full((B, T), -math.inf)
    gap = torch.zeros(B, T, pad)
    return TopKTargets(
        ids=torch.cat([ids[..., :k], gap.long() - 1], -1),
        logprob=torch.cat([ordered[..., :k], gap - math.inf], -1),
        tail=tail.to(logprob.dtype),
    )


def drawn(teacher: LinearPrediction, m: int) -> SampledTargets:
    """m draws at every position; equal ones are one entry."""
    prob = all_logits(teacher).detach().softmax(-1)
    counts = torch.zeros_like(prob)
    draws = torch.multinomial(prob.flatten(0, 1), m, replacement=True).view(B, T, m)
    counts.scatter_add_(-1, draws, torch.ones_like(draws, dtype=counts.dtype))
    share, ids = (counts / m).sort(-1, descending=True)
    share, ids = share[..., :m], ids[..., :m]
    return SampledTargets(ids=ids.masked_fill(share == 0, -1), share=share)


def coarse_divergence(
    student: LinearPrediction, teacher: LinearPrediction, batch: TokenBatch, f: FDivergence, k: int
) -> Tensor:
    """Of the outcomes, built densely: logits of the tail are its logsumexp."""
    ids = top_k(teacher, k).ids[batch.mask]

    def merged(prediction: LinearPrediction) -> Tensor:
        logits = all_logits(prediction)[batch.mask]
        rest = logits.scatter(-1, ids, -math.inf).logsumexp(-1, keepdim=True)
        return torch.cat([logits.gather(-1, ids), rest], -1)

    return f_divergences.divergence(f, merged(teacher).detach(), merged(student))


@any_divergence
@given(
    k=st.integers(1, V - 1),
    pad=st.integers(0, 2),
    chunk=st.integers(1, 30),
    cap=st.sampled_from([None, 2.0]),
    seed=st.integers(0, 99),
)
@settings(max_examples=8, deadline=None)
def test_top_k_is_the_divergence_of_the_listed_tokens_and_the_tail(
    f: FDivergence, k: int, pad: int, chunk: int, cap: float | None, seed: int
) -> None:
    torch.manual_seed(seed)
    batch, student, teacher = batch_of(), linear(cap, 0.8), linear(None)
    weights = torch.rand(B, T)
    target = top_k(teacher, k, pad=pad)
    loss = divergence(student, target, batch, f, weights=weights, chunk=chunk)
    values = coarse_divergence(student, teacher, batch, f, k)
    expected = (values * weights[batch.mask]).sum()
    torch.testing.assert_close(loss.total, expected, rtol=1e-9, atol=EXACT)
    torch.testing.assert_close(
        gradients(loss.total, student.hidden, student.head),
        gradients(expected, student.hidden, student.head),
        rtol=1e-8,
        atol=EXACT,
    )
    own = divergence_values(student, target, batch, f, chunk=chunk)
    torch.testing.assert_close(own, values.detach().float())
    tail = target.tail[batch.mask].exp()
    torch.testing.assert_close(loss.report["tail"], (tail * weights[batch.mask]).sum())


@any_divergence
def test_top_k_is_a_lower_bound_that_grows_with_k_and_is_exact_at_the_whole_vocabulary(
    f: FDivergence,
) -> None:
    batch, student, teacher = batch_of(), linear(), linear(None)
    whole = divergence_values(student, teacher, batch, f)
    before = torch.zeros_like(whole)
    for k in (1, 4, V - 2, V - 1):
        bound = divergence_values(student, top_k(teacher, k), batch, f)
        assert (bound >= 0).all()
        assert (before <= bound * (1 + 1e-6) + 1e-7).all()
        assert (bound <= whole * (1 + 1e-6) + 1e-7).all()
        before = bound
    exact = divergence(student, teacher, batch, f)
    for target in (top_k(teacher, V), top_k(teacher, V - 1)):
        found = divergence(student, target, batch, f)
        torch.testing.assert_close(found.total, exact.total, rtol=1e-9, atol=EXACT)
        torch.testing.assert_close(
            gradients(found.total, student.head),
            gradients(divergence(student, teacher, batch, f).total, student.head),
            rtol=1e-8,
            atol=EXACT,
        )


@any_divergence
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_top_k_of_the_student_itself_is_zero(f: FDivergence, dtype: torch.dtype) -> None:
    batch, teacher = everything(), linear(None, dtype=dtype)
    loss = divergence(teacher, top_k(teacher, 4), batch, f)
    tiny = 1e-12 if dtype == torch.float64 else 1e-5
    assert 0 <= loss.total <= tiny
    (found,) = gradients(loss.total, teacher.head)
    assert found.abs().max() < (1e-13 if dtype == torch.float64 else 2e-5)


def test_the_tail_of_a_sure_student_is_not_lost() -> None:
    # The student's tail is e^-200 of its probability, which float32 cannot hold as 1 - sum, nor
    # as a probability at all; its logarithm is exact all the same.
    student, batch = of_logits([0.0, -200.0, -200.0, -200.0])
    target = TopKTargets(
        ids=torch.tensor([[[0]]]),
        logprob=torch.tensor([[[0.5]]]).log(),
        tail=torch.tensor([[0.5]]).log(),
    )
    logits = student.all_logits.clone().requires_grad_()
    loss = divergence(Dense(logits), target, batch, KL()).total
    expected = -math.log(2) + 0.5 * (200 - math.log(3))
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    (found,) = gradients(loss, logits)
    torch.testing.assert_close(found.flatten(), torch.tensor([0.5] + 3 * [-0.5 / 3]))


def test_one_outcome_says_nothing() -> None:
    batch, student = everything(), linear()
    nothing = TopKTargets(
        ids=torch.full((B, T, 1), -1),
        logprob=torch.full((B, T, 1), -math.inf),
        tail=torch.zeros(B, T),
    )
    loss = divergence(student, nothing, batch, JensenShannon())
    assert loss.total.abs() < EXACT
    assert gradients(loss.total, student.head)[0].abs().max() < EXACT


def test_draws_estimate_the_cross_entropy_without_bias() -> None:
    torch.manual_seed(0)
    batch, student, teacher = everything(), linear(), linear(None)
    whole = distillation(student, teacher, batch)
    wanted = gradients(whole.total, student.head)[0]
    rounds, m = 400, 4
    totals, head = [], torch.zeros_like(wanted)
    for _ in range(rounds):
        loss = divergence(student, drawn(teacher, m), batch, KL())
        totals.append(loss.total.detach())
        head += gradients(loss.total, student.head)[0] / rounds
    found = torch.stack(totals)
    error = found.std() / math.sqrt(rounds)
    assert (found.mean() - whole.total).abs() < 4 * error
    assert (head - wanted).norm() < 0.1 * wanted.norm()
    # Few draws or many: the spread shrinks with their root, the mean stays.
    more = torch.stack(
        [divergence(student, drawn(teacher, 64), batch, KL()).total.detach() for _ in range(100)]
    )
    assert more.std() == pytest.approx(found.std().item() / 4, rel=0.3)


def test_shares_that_are_the_probabilities_give_the_whole_cross_entropy() -> None:
    batch, student, teacher = batch_of(), linear(), linear(None)
    prob = all_logits(teacher).detach().softmax(-1)
    target = SampledTargets(ids=torch.arange(V).expand(B, T, V), share=prob)
    weights = torch.rand(B, T)
    for chunk in (2, None):
        found = divergence(student, target, batch, KL(), chunk=chunk)
        cross = distillation(student, target, batch, chunk=chunk)
        whole = distillation(student, teacher, batch)
        torch.testing.assert_close(found.total, whole.total, rtol=1e-12, atol=0)
        torch.testing.assert_close(cross.total, whole.total, rtol=1e-12, atol=0)
        leaves = (student.hidden, student.head)
        torch.testing.assert_close(
            gradients(found.total, *leaves), gradients(whole.total, *leaves), rtol=0, atol=EXACT
        )
    values = divergence_values(student, target, batch, KL()).double()
    weighted = divergence(student, target, batch, KL(), weights=weights)
    torch.testing.assert_close(
        weighted.total, (values * weights[batch.mask]).sum(), rtol=1e-6, atol=0
    )
    exact = dense_divergence(student, teacher, batch, KL()).sum()
    entropy = -(prob * prob.log()).sum(-1)[batch.mask].sum()
    torch.testing.assert_close(found.total - entropy, exact, rtol=1e-9, atol=EXACT)


def test_one_draw_is_a_hard_target() -> None:
    batch, student = batch_of(), linear()
    target = SampledTargets(ids=batch.targets[..., None], share=torch.ones(B, T, 1))
    found, hard = distillation(student, target, batch), cross_entropy(student, batch)
    torch.testing.assert_close(found.total, hard.total, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.report["nll"], hard.total.detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("k", [3, V])
def test_distillation_towards_top_k_is_cross_entropy_of_its_outcomes(k: int) -> None:
    batch, student, teacher = batch_of(), linear(), linear(None)
    target = top_k(teacher, k)
    loss = distillation(student, target, batch)
    kl = divergence(student, target, batch, KL())
    torch.testing.assert_close(loss.report["kl"], kl.total.detach(), rtol=1e-9, atol=EXACT)
    torch.testing.assert_close(
        gradients(loss.total, student.head), gradients(kl.total, student.head), rtol=0, atol=EXACT
    )
    prob = torch.cat([target.logprob, target.tail[..., None]], -1)[batch.mask].exp()
    entropy = -torch.special.xlogy(prob, prob).sum()
    torch.testing.assert_close(loss.total.detach(), loss.report["kl"] + entropy)
    if k == V:
        whole = distillation(student, teacher, batch)
        torch.testing.assert_close(loss.total, whole.total, rtol=1e-9, atol=0)
        assert loss.report["tail"] == 0


@pytest.mark.parametrize("f", [f for f in DIVERGENCES if f.name not in ("forward_kl", "jsd(0)")])
def test_draws_are_refused_where_they_cannot_say_what_is_asked(f: FDivergence) -> None:
    with pytest.raises(ConfigError, match="cross-entropy of forward_kl alone"):
        divergence(linear(), drawn(linear(), 2), batch_of(), f)


def spoiled(target: TopKTargets, **entries: tuple[tuple[int, ...], float]) -> TopKTargets:
    """The same with one entry of some field changed."""
    fields = {name: getattr(target, name).clone() for name in entries}
    for name, (place, value) in entries.items():
        fields[name][place] = value
    return replace(target, **fields)


def test_top_k_targets_that_are_no_distribution_are_refused_with_their_place() -> None:
    batch, student, teacher = everything(), linear(), linear(None)
    good = top_k(teacher, 3)
    where = "position 2 of row 1"
    wrong = {
        f"says nothing .*{where}": spoiled(good, tail=((1, 2), math.nan)),
        f"names token 23.*{where}": spoiled(good, ids=((1, 2, 0), V)),
        f"tokens below -1.*{where}": spoiled(good, ids=((1, 2, 0), -2)),
        f"lists a token twice .*{where}": spoiled(good, ids=((1, 2, 0), int(good.ids[1, 2, 1]))),
        f"are NaN .*{where}": spoiled(good, logprob=((1, 2, 1), math.nan)),
        f"above 0.*{where}": spoiled(good, logprob=((1, 2, 0), 0.5)),
        f"do not add up to 1 .*{where}": spoiled(good, logprob=((1, 2, 0), -30.0)),
        r"ids are torch.float64": replace(good, ids=good.ids.double()),
        r"tail has shape": replace(good, tail=good.tail[:, :-1]),
        r"ids have shape \(3, 7, 3\), logprob \(3, 7, 2\)": replace(
            good, logprob=good.logprob[..., :2]
        ),
        r"shape \(3, 6, 3\); expected one list": replace(
            good, ids=good.ids[:, :-1], logprob=good.logprob[:, :-1], tail=good.tail[:, :-1]
        ),
        r"shape \(2, 7, 3\); expected one list": replace(
            good, ids=good.ids[:-1], logprob=good.logprob[:-1], tail=good.tail[:-1]
        ),
    }
    for message, target in wrong.items():
        for call in (
            lambda t: divergence(student, t, batch, JensenShannon()),
            lambda t: divergence(Dense(all_logits(student)), t, batch, KL()),
            lambda t: divergence_values(student, t, batch, KL()),
            lambda t: distillation(student, t, batch),
        ):
            with pytest.raises(DataError, match=message):
                call(target)


def test_what_is_not_counted_may_be_anything() -> None:
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[1, 2] = False
    batch, student, teacher = batch_of(mask), linear(), linear(None)
    good = top_k(teacher, 3)
    odd = spoiled(good, tail=((1, 2), math.nan), ids=((1, 2, 0), V + 5))
    expected = divergence(student, good, batch, KL()).total
    assert divergence(student, odd, batch, KL()).total == expected
    nothing = batch_of(torch.zeros(B, T, dtype=torch.bool))
    for target in (odd, drawn(teacher, 2)):
        assert divergence(student, target, nothing, KL()).total == 0


def test_probabilities_that_were_rounded_are_made_to_add_up() -> None:
    batch, student, teacher = everything(), linear(), linear(None)
    good = top_k(teacher, 3)
    rounded = replace(good, logprob=(good.logprob.exp() * 1e4).round().div(1e4).log())
    f = KL()
    found = divergence_values(student, rounded, batch, f)
    assert (found >= 0).all()
    torch.testing.assert_close(found, divergence_values(student, good, batch, f), rtol=0, atol=2e-3)
    # All 0.05% too large or too small: the same distribution, which the teacher itself has.
    for error in (5e-4, -5e-4):
        scaled = replace(good, logprob=good.logprob + error, tail=good.tail + error)
        found = divergence_values(teacher, scaled, batch, f)
        torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=1e-12)


def test_draws_that_are_no_shares_are_refused_with_their_place() -> None:
    batch, student = everything(), linear()
    good = SampledTargets(
        ids=torch.tensor([3, 5]).expand(B, T, 2), share=torch.tensor([0.25, 0.75]).expand(B, T, 2)
    )

    def with_share(*share: float) -> SampledTargets:
        changed = good.share.clone()
        changed[1, 2] = torch.tensor(share)
        return replace(good, share=changed)

    def with_ids(*ids: int) -> SampledTargets:
        changed = good.ids.clone()
        changed[1, 2] = torch.tensor(ids)
        return replace(good, ids=changed)

    where = "position 2 of row 1"
    for message, target in {
        f"drew no token .*{where}": with_share(0.0, 0.0),
        f"below 0 or NaN .*{where}": with_share(1.5, -0.5),
        f"or NaN .*{where}": with_share(math.nan, 1.0),
        f"do not add up to 1 .*{where}": with_share(0.5, 0.25),
        f"have no token .*{where}": with_ids(3, -1),
        f"names token 23.*{where}": with_ids(3, V),
    }.items():
        for call in (
            lambda t: divergence(student, t, batch, KL()),
            lambda t: distillation(student, t, batch),
        ):
            with pytest.raises(DataError, match=message):
                call(target)
