"""Groups of tokens against a teacher's probability of them: values, gradients, limits."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cabochon.core import GroupTargets, Key, LinearPrediction, TokenBatch, TopKTargets
from cabochon.core.errors import ConfigError, DataError
from cabochon.losses import linear
from cabochon.losses.f_divergences import KL, FDivergence, named
from cabochon.losses.tempering import tempered

V, WIDTH = 11, 6
DIVERGENCES: list[tuple[str, float | None]] = [
    ("forward_kl", None), ("reverse_kl", None), ("jsd", 0.3), ("jsd_paper", 0.5),
    ("hellinger", None), ("chi_square", None), ("alpha", 1.5), ("jeffreys", None),
]  # fmt: skip


class Dense:
    def __init__(self, dense: Tensor) -> None:
        self.dense = dense

    def logits(self, rows: slice | Tensor, /) -> Tensor:
        return self.dense.flatten(0, 1)[rows]


def drawn(*shape: int, name: str, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=Key(8).fold(name).generator(), dtype=torch.float64)


def batch() -> TokenBatch:
    random = Key(8).fold("tokens").generator()
    return TokenBatch.of([torch.randint(0, V, (n,), generator=random) for n in (8, 5)])


def teacher() -> GroupTargets:
    """Groups of 1, 2 and 3 tokens, places without one, and probabilities near 0 and 1."""
    group = torch.tensor([[0, 1, 1, -1, 2, 2, 2, -1], [4, 3, 3, 5, -1, -1, -1, -1]])
    prob = torch.tensor([0.3, 0.05, 0.004, 0.6, 0.999, 1e-6])
    return GroupTargets(group=group, logprob=prob.log())


def by_hand(dense: Tensor, f: FDivergence, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(sum, weight) by autograd, from the definition."""
    asked, said = batch(), teacher()
    law = dense.log_softmax(-1)
    log_q = law.gather(-1, asked.targets[..., None]).squeeze(-1)
    total, weight = law.new_zeros(()), law.new_zeros(())
    for number, log_p in enumerate(said.logprob.double()):
        member = said.group == number
        own = torch.ones_like(log_q) if weights is None else weights
        q, p = log_q[member].sum().exp(), log_p.exp()
        each = q * f.f(p / q) + (1 - q) * f.f((1 - p) / (1 - q))
        total = total + own[member].mean() * each
        weight = weight + own[member].sum()
    return total, weight


@pytest.mark.parametrize(("name", "parameter"), DIVERGENCES)
@pytest.mark.parametrize("weighted", [False, True])
def test_value_and_gradient_are_those_of_the_definition(
    name: str, parameter: float | None, weighted: bool
) -> None:
    f = named(name, parameter)
    dense = drawn(2, 8, V, name="student").requires_grad_()
    weights = drawn(2, 8, name="weights").abs() if weighted else None
    expected, weight = by_hand(dense, f, weights)
    (by_hand_gradient,) = torch.autograd.grad(expected, dense)
    found = linear.divergence(Dense(dense), teacher(), batch(), f, weights=weights)
    (gradient,) = torch.autograd.grad(found.total, dense)
    scale = 1.0 + expected.abs().item()
    assert found.total.item() == pytest.approx(expected.item(), abs=2e-5 * scale)
    assert found.weight.item() == pytest.approx(weight.item(), rel=1e-5)
    torch.testing.assert_close(gradient, by_hand_gradient, atol=2e-5 * scale, rtol=1e-4)


def test_hidden_states_and_head_get_the_same_gradient_whatever_the_chunk() -> None:
    hidden, head = drawn(2, 8, WIDTH, name="hidden").float(), drawn(V, WIDTH, name="head").float()
    found = []
    for chunk in (None, 1, 3):
        leaves = [hidden.clone().requires_grad_(), head.clone().requires_grad_()]
        student = LinearPrediction(hidden=leaves[0], head=leaves[1], cap=2.0)
        loss = linear.divergence(student, teacher(), batch(), KL(), chunk=chunk)
        found.append([loss.total.detach(), *torch.autograd.grad(loss.total, leaves)])
    dense = [hidden.clone().requires_grad_(), head.clone().requires_grad_()]
    logits = LinearPrediction(hidden=dense[0], head=dense[1], cap=2.0).logits(slice(None))
    total, _ = by_hand(logits.view(2, 8, V).double(), KL())
    found.append([total.detach().float(), *torch.autograd.grad(total, dense)])
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            torch.testing.assert_close(one, two, atol=2e-5, rtol=1e-4)


def test_groups_of_one_token_are_the_token_and_the_tail() -> None:
    asked = batch()
    dense = drawn(2, 8, V, name="student").requires_grad_()
    log_p = drawn(2, 8, V, name="teacher").log_softmax(-1).float()
    own = log_p.gather(-1, asked.targets[..., None]).squeeze(-1)
    group = torch.full(asked.shape, -1)
    group[asked.mask] = torch.arange(int(asked.mask.sum()))
    groups = GroupTargets(group=group, logprob=own[asked.mask])
    tops = TopKTargets(
        ids=asked.targets[..., None], logprob=own[..., None], tail=torch.log1p(-own.exp())
    )
    for f in (KL(), named("reverse_kl"), named("jsd", 0.5)):
        one = linear.divergence(Dense(dense), groups, asked, f)
        other = linear.divergence(Dense(dense), tops, asked, f)
        assert one.total.item() == pytest.approx(other.total.item(), rel=1e-5)
        assert one.weight == other.weight
        torch.testing.assert_close(
            torch.autograd.grad(one.total, dense)[0],
            torch.autograd.grad(other.total, dense)[0],
            atol=1e-5, rtol=1e-4,
        )  # fmt: skip
        torch.testing.assert_close(
            linear.divergence_values(Dense(dense), groups, asked, f),
            linear.divergence_values(Dense(dense), tops, asked, f),
            atol=1e-5, rtol=1e-4,
        )  # fmt: skip


@pytest.mark.parametrize(("name", "parameter"), DIVERGENCES)
def test_it_is_nothing_where_the_two_agree_and_never_less(
    name: str, parameter: float | None
) -> None:
    f, asked, said = named(name, parameter), batch(), teacher()
    dense = drawn(2, 8, V, name="student").requires_grad_()
    log_q = dense.detach().log_softmax(-1).gather(-1, asked.targets[..., None]).squeeze(-1)
    own = torch.stack([log_q[said.group == n].sum() for n in range(6)])
    same = linear.divergence(Dense(dense), replace(said, logprob=own.float()), asked, f)
    assert abs(same.total.item()) < 1e-6
    assert torch.autograd.grad(same.total, dense)[0].abs().max() < 1e-5
    assert linear.divergence(Dense(dense), said, asked, f).total.item() > 0


def test_binary_comparison_is_at_most_that_of_all_sequences() -> None:
    """Two tokens: the group and the rest against all V^2 pairs, by enumeration."""
    p, q = (drawn(V, V, name=n, scale=2.0).flatten().log_softmax(-1) for n in "pq")
    for name, parameter in DIVERGENCES:
        f = named(name, parameter)
        whole = (q.exp() * f.f((p - q).exp())).sum()
        for pair in range(0, V * V, 17):
            one, other = p[pair].exp(), q[pair].exp()
            binary = other * f.f(one / other) + (1 - other) * f.f((1 - one) / (1 - other))
            assert binary <= whole + 1e-12


def test_cross_entropy_has_the_gradient_of_kl_and_exceeds_it_by_the_entropy() -> None:
    dense = drawn(2, 8, V, name="student").requires_grad_()
    entropies = linear.distillation(Dense(dense), teacher(), batch())
    kl = linear.divergence(Dense(dense), teacher(), batch(), KL())
    p = teacher().logprob.double().exp()
    entropy = -(p * p.log() + (1 - p) * (-p).log1p()).sum().item()
    assert entropies.total.item() - kl.total.item() == pytest.approx(entropy, abs=1e-5)
    assert entropies.report["kl"].item() == pytest.approx(kl.total.item(), abs=1e-5)
    assert entropies.report["groups"] == 6
    torch.testing.assert_close(
        *(torch.autograd.grad(each.total, dense)[0] for each in (entropies, kl))
    )


def test_places_without_a_group_and_cut_groups_get_no_gradient() -> None:
    asked = batch()
    mask = asked.mask.clone()
    mask[0, 2] = False  # half of group 1
    dense = drawn(2, 8, V, name="student").requires_grad_()
    loss = linear.divergence(Dense(dense), teacher(), replace(asked, mask=mask), KL())
    (gradient,) = torch.autograd.grad(loss.total, dense)
    silent = (teacher().group < 0) | (teacher().group == 1)
    assert (gradient[silent] == 0).all()
    assert (gradient[~silent].abs().sum(-1) > 0).all()
    assert loss.weight == (~silent).sum()


def test_values_of_positions_add_up_to_the_sum_and_stand_where_groups_begin() -> None:
    dense = drawn(2, 8, V, name="student")
    values = linear.divergence_values(Dense(dense), teacher(), batch(), KL())
    total = linear.divergence(Dense(dense), teacher(), batch(), KL()).total
    assert values.sum().item() == pytest.approx(total.item(), rel=1e-5)
    at = torch.zeros(2, 8)
    at[batch().mask] = values
    assert (at > 0).nonzero().tolist() == [[0, 0], [0, 1], [0, 4], [1, 0], [1, 1], [1, 3]]


def test_a_student_that_is_certain_stays_finite() -> None:
    asked = batch()
    dense = torch.zeros(2, 8, V)
    dense.scatter_(-1, asked.targets[..., None], 200.0)
    dense.requires_grad_()
    for name, parameter in DIVERGENCES:
        loss = linear.divergence(Dense(dense), teacher(), asked, named(name, parameter))
        assert loss.total.isfinite()
        assert torch.autograd.grad(loss.total, dense)[0].isfinite().all()


@pytest.mark.parametrize("wrong", [math.nan, 0.1])
def test_what_is_no_probability_is_refused(wrong: float) -> None:
    said = teacher()
    said.logprob[2] = wrong
    with pytest.raises(DataError, match="NaN or above 0"):
        linear.divergence(Dense(drawn(2, 8, V, name="student")), said, batch(), KL())


def test_groups_of_another_batch_are_refused() -> None:
    other = TokenBatch.of([[1, 2, 3]])
    with pytest.raises(DataError, match="groups have shape"):
        linear.divergence(Dense(drawn(1, 3, V, name="student")), teacher(), other, KL())


def test_groups_have_no_temperature() -> None:
    assert tempered(teacher(), 1.0).logprob is not None
    with pytest.raises(ConfigError, match="leave its temperature at 1"):
        tempered(teacher(), 2.0)
