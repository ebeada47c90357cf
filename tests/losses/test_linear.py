"""Large-vocabulary losses: equal to the dense ones, and never larger than a chunk."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cabochon.core import LinearPrediction, TokenBatch, soft_cap
from cabochon.core.errors import ConfigError, DataError, TokenizerMismatch
from cabochon.losses import cross_entropy, distillation

B, T, D, V = 3, 7, 5, 23
EXACT = 1e-10  # float64


def batch_of(mask: Tensor | None = None) -> TokenBatch:
    tokens = torch.randint(V, (B, T))
    return TokenBatch(
        tokens=tokens,
        positions=torch.arange(T).expand(B, T),
        documents=torch.zeros(B, T, dtype=torch.int64),
        targets=torch.randint(V, (B, T)),
        mask=torch.rand(B, T) < 0.6 if mask is None else mask,
    )


def linear(
    cap: float | None = 3.0,
    temperature: float = 1.0,
    width: int = D,
    dtype: torch.dtype = torch.float64,
) -> LinearPrediction:
    return LinearPrediction(
        hidden=torch.randn(B, T, width, dtype=dtype).mul_(2).requires_grad_(),
        head=torch.randn(V, width, dtype=dtype).requires_grad_(),
        cap=cap,
        temperature=temperature,
    )


def dense_logprob(prediction: LinearPrediction, batch: TokenBatch) -> Tensor:
    """log p of the counted rows, all at once, in the type of the parameters."""
    logits = prediction.hidden[batch.mask] @ prediction.head.T
    return (soft_cap(logits, prediction.cap) / prediction.temperature).log_softmax(-1)


def dense_cross_entropy(prediction: LinearPrediction, batch: TokenBatch) -> Tensor:
    logprob = dense_logprob(prediction, batch)
    return -logprob.gather(-1, batch.targets[batch.mask][:, None]).sum()


def dense_distillation(
    student: LinearPrediction, teacher: LinearPrediction, batch: TokenBatch
) -> Tensor:
    target = dense_logprob(teacher, batch).exp().detach()
    return -(target * dense_logprob(student, batch)).sum()


@dataclass(frozen=True)
class Dense:
    """A prediction that is not linear: it hands out rows of given logits."""

    all_logits: Tensor

    def logits(self, rows: slice | Tensor, /) -> Tensor:
        return self.all_logits.flatten(0, 1)[rows]


def gradients(loss: Tensor, *of: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, of)


class LargestResult(TorchDispatchMode):
    """Records how many elements the largest tensor had that an operation made (views do not)."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        known = {memory(value) for value in (*args, *kwargs.values()) if isinstance(value, Tensor)}
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, Tensor) and memory(value) not in known:
                self.elements = max(self.elements, value.numel())
        return result


def memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@given(
    chunk=st.integers(1, 30),
    cap=st.sampled_from([None, 0.7, 3.0, 30.0, 1e3]),
    temperature=st.sampled_from([0.5, 1.0, 2.5]),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_cross_entropy_and_its_gradients_are_those_of_the_dense_loss_for_any_chunk(
    chunk: int, cap: float | None, temperature: float, seed: int
) -> None:
    torch.manual_seed(seed)
    batch, prediction = batch_of(), linear(cap, temperature)
    loss = cross_entropy(prediction, batch, chunk=chunk)
    expected = dense_cross_entropy(prediction, batch)
    assert loss.weight == batch.mask.sum()
    torch.testing.assert_close(loss.total, expected, rtol=0, atol=EXACT)
    found = gradients(loss.total, prediction.hidden, prediction.head)
    wanted = gradients(expected, prediction.hidden, prediction.head)
    torch.testing.assert_close(found, wanted, rtol=0, atol=EXACT)


@given(
    chunk=st.integers(1, 30),
    caps=st.tuples(st.sampled_from([None, 2.0, 30.0]), st.sampled_from([None, 2.0, 30.0])),
    temperatures=st.tuples(st.sampled_from([0.7, 1.0]), st.sampled_from([1.0, 2.0])),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_distillation_and_its_gradients_are_those_of_the_dense_loss_for_any_chunk(
    chunk: int,
    caps: tuple[float | None, float | None],
    temperatures: tuple[float, float],
    seed: int,
) -> None:
    torch.manual_seed(seed)
    batch = batch_of()
    student = linear(caps[0], temperatures[0])
    teacher = linear(caps[1], temperatures[1], width=D + 4)
    loss = distillation(student, teacher, batch, chunk=chunk)
    expected = dense_distillation(student, teacher, batch)
    torch.testing.assert_close(loss.total, expected, rtol=0, atol=EXACT)
    found = gradients(loss.total, student.hidden, student.head)
    wanted = gradients(expected, student.hidden, student.head)
    torch.testing.assert_close(found, wanted, rtol=0, atol=EXACT)
    target = dense_logprob(teacher, batch).detach()
    kl = expected.detach() + (target.exp() * target).sum()
    torch.testing.assert_close(loss.report["kl"], kl, rtol=0, atol=EXACT)
    nll = dense_cross_entropy(student, batch).detach()
    torch.testing.assert_close(loss.report["nll"], nll, rtol=0, atol=EXACT)


def test_gradients_agree_with_finite_differences() -> None:
    batch, teacher = batch_of(), linear()
    student = linear(temperature=1.5)

    def both(hidden: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
        prediction = replace(student, hidden=hidden, head=head)
        return (
            cross_entropy(prediction, batch, chunk=4).total,
            distillation(prediction, teacher, batch, chunk=4).total,
        )

    assert torch.autograd.gradcheck(both, (student.hidden, student.head))


def test_cross_entropy_of_two_by_three_numbers_made_by_hand() -> None:
    batch = TokenBatch.of([[0, 1, 2]])
    prediction = LinearPrediction(
        hidden=torch.tensor([[[1.0], [0.0], [9.0]]]), head=torch.tensor([[0.0], [2.0], [0.0]])
    )
    # logits (0, 2, 0) with target 1, then (0, 0, 0) with target 2; the last token has no target.
    expected = torch.log(torch.tensor(2.0).exp() + 2) - 2 + torch.log(torch.tensor(3.0))
    torch.testing.assert_close(cross_entropy(prediction, batch).total, expected)


@pytest.mark.parametrize("cap", [None, 30.0])
def test_bfloat16_is_as_good_as_rounding_the_logits_allows(cap: float | None) -> None:
    batch = batch_of()
    half = linear(cap, dtype=torch.bfloat16)
    whole = replace(
        half,
        hidden=half.hidden.detach().double().requires_grad_(),
        head=half.head.detach().double().requires_grad_(),
    )
    loss = cross_entropy(half, batch, chunk=2)
    expected = dense_cross_entropy(whole, batch)
    assert loss.total.dtype == torch.float32
    torch.testing.assert_close(loss.total.double(), expected, rtol=0.02, atol=0)
    found = gradients(loss.total, half.hidden, half.head)
    wanted = gradients(expected, whole.hidden, whole.head)
    for ours, exact in zip(found, wanted, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours.double() - exact).norm() < 0.02 * exact.norm()


def test_many_chunks_of_bfloat16_add_up_without_losing_small_terms() -> None:
    rows = 512
    hidden = torch.ones(1, rows, 1, dtype=torch.bfloat16)
    head = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    batch = TokenBatch.of([[0] * (rows + 1)]).rows(0, 1)
    prediction = LinearPrediction(hidden=torch.cat([hidden, hidden[:, :1]], 1), head=head)
    (gradient,) = gradients(cross_entropy(prediction, batch, chunk=1).total, head)
    # Every row adds -1/2 and 1/2; a bfloat16 sum stands still at 128.
    assert gradient.flatten().tolist() == [-rows / 2, rows / 2]


@pytest.mark.parametrize("loss", ["cross_entropy", "distillation"])
def test_nothing_larger_than_a_chunk_of_logits_ever_exists(loss: str) -> None:
    rows, vocabulary, width, chunk = 64, 512, 4, 8
    hidden = torch.randn(1, rows, width, requires_grad=True)
    head = torch.randn(vocabulary, width, requires_grad=True)
    prediction = LinearPrediction(hidden=hidden, head=head, cap=5.0)
    teacher = LinearPrediction(hidden=torch.randn(1, rows, 6), head=torch.randn(vocabulary, 6))
    ones = torch.ones(1, rows, dtype=torch.int64)
    batch = TokenBatch(tokens=ones, positions=ones, documents=ones, targets=ones, mask=ones.bool())
    with LargestResult() as largest:
        if loss == "cross_entropy":
            cross_entropy(prediction, batch, chunk=chunk).total.backward()
        else:
            distillation(prediction, teacher, batch, chunk=chunk).total.backward()
    assert largest.elements == chunk * vocabulary


def test_no_gradient_is_made_where_none_is_wanted() -> None:
    batch, prediction = batch_of(), linear()
    frozen = replace(prediction, head=prediction.head.detach())
    cross_entropy(frozen, batch, chunk=4).total.backward()
    assert prediction.hidden.grad is not None
    with torch.no_grad(), LargestResult() as largest:
        loss = cross_entropy(prediction, batch, chunk=1)
    assert not loss.total.requires_grad
    assert largest.elements < V * D


def test_masked_positions_get_exactly_no_gradient() -> None:
    batch, prediction = batch_of(), linear()
    cross_entropy(prediction, batch, chunk=4).total.backward()
    assert (prediction.hidden.grad[~batch.mask] == 0).all()
    assert (prediction.hidden.grad[batch.mask] != 0).any(-1).all()


@pytest.mark.parametrize("kind", ["linear", "dense"])
def test_a_batch_without_targets_gives_zero_and_zero_gradients(kind: str) -> None:
    batch = batch_of(torch.zeros(B, T, dtype=torch.bool))
    prediction = linear()
    if kind == "linear":
        losses = [cross_entropy(prediction, batch), distillation(prediction, linear(), batch)]
        for loss in losses:
            loss.total.backward()
        assert (prediction.hidden.grad == 0).all()
        assert (prediction.head.grad == 0).all()
    else:
        dense = Dense(torch.randn(B, T, V, requires_grad=True))
        losses = [cross_entropy(dense, batch), distillation(dense, dense, batch)]
        for loss in losses:
            (by_logits,) = gradients(loss.total, dense.all_logits)
            assert (by_logits == 0).all()
    for loss in losses:
        assert loss.total == 0
        assert loss.weight == 0
        assert all(value == 0 for value in loss.report.values())


@pytest.mark.parametrize("chunk", [1, 4, None])
def test_a_prediction_that_is_not_linear_takes_the_same_loss_through_autograd(
    chunk: int | None,
) -> None:
    batch, student, teacher = batch_of(), linear(), linear(None)
    logits = soft_cap(student.hidden @ student.head.T, student.cap).detach().requires_grad_()
    dense = Dense(logits)
    dense_teacher = Dense(teacher.hidden.detach() @ teacher.head.detach().T)
    for found, expected in (
        (cross_entropy(dense, batch, chunk=chunk), dense_cross_entropy(student, batch)),
        (distillation(dense, teacher, batch, chunk=chunk), None),
        (distillation(dense, dense_teacher, batch, chunk=chunk), None),
    ):
        wanted = dense_distillation(student, teacher, batch) if expected is None else expected
        torch.testing.assert_close(found.total.double(), wanted, rtol=1e-6, atol=0)
        (gradient,) = gradients(found.total, logits)
        assert (gradient[~batch.mask] == 0).all()
        gradients(wanted, student.head)  # the dense loss is differentiable too
    mixed = distillation(student, dense_teacher, batch, chunk=chunk)
    torch.testing.assert_close(mixed.total, dense_distillation(student, teacher, batch))
    by_logits = torch.autograd.grad(cross_entropy(dense, batch).total, logits)[0]
    prob = logits[batch.mask].softmax(-1)
    prob.scatter_add_(1, batch.targets[batch.mask][:, None], -torch.ones(len(prob), 1).double())
    torch.testing.assert_close(by_logits[batch.mask], prob, rtol=1e-6, atol=1e-7)


def test_the_divergence_is_zero_only_where_student_and_teacher_agree() -> None:
    batch = batch_of(torch.ones(B, T, dtype=torch.bool))
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        teacher = linear(30.0, dtype=dtype)
        assert distillation(teacher, teacher, batch).report["kl"] == 0
        nudged = replace(teacher, temperature=1.05)
        assert distillation(nudged, teacher, batch).report["kl"] > 0


def test_at_agreement_the_distillation_gradient_vanishes() -> None:
    batch, teacher = batch_of(), linear()
    found = gradients(distillation(teacher, teacher, batch).total, teacher.hidden, teacher.head)
    assert all(gradient.abs().max() < 1e-14 for gradient in found)


def test_the_teacher_gets_no_gradient() -> None:
    batch, student, teacher = batch_of(), linear(), linear()
    distillation(student, teacher, batch).total.backward()
    assert teacher.hidden.grad is None
    assert teacher.head.grad is None


def test_extreme_logits_stay_finite() -> None:
    batch = batch_of(torch.ones(B, T, dtype=torch.bool))
    for cap in (None, 30.0):
        prediction = linear(cap, dtype=torch.float32)
        prediction = replace(prediction, hidden=prediction.hidden.detach() * 1e4)
        loss = cross_entropy(prediction, batch)
        assert loss.total.isfinite()
        assert all(g.isfinite().all() for g in gradients(loss.total, prediction.head))


@pytest.mark.parametrize("size", [1e9, 1e20, 1e30])
def test_logits_whose_rounding_is_large_are_no_less_a_distribution(size: float) -> None:
    logits = (size * torch.tensor([[1.0, 0.9], [0.3, 0.7]]).expand(1, 2, 2)).requires_grad_()
    batch = TokenBatch.of([[0, 0, 0]])
    batch = replace(batch, **{k: v[:, :2] for k, v in vars(batch).items()})
    loss = cross_entropy(Dense(logits), batch)
    assert loss.total.item() == pytest.approx(0.4 * size)
    (by_logits,) = gradients(loss.total, logits)
    assert by_logits.flatten().tolist() == [0.0, 0.0, -1.0, 1.0]


def test_a_token_that_is_excluded_has_no_part_in_distillation() -> None:
    batch = batch_of(torch.ones(B, T, dtype=torch.bool))
    batch = replace(batch, targets=batch.targets % (V - 1))
    student, teacher = torch.randn(2, B, T, V - 1)
    gap = torch.full((B, T, 1), -math.inf)
    logits = torch.cat([student, gap], -1).requires_grad_()
    both = distillation(Dense(logits), Dense(torch.cat([teacher, gap], -1)), batch)
    without = distillation(Dense(student), Dense(teacher), batch)
    torch.testing.assert_close(both.total, without.total)
    torch.testing.assert_close(both.report, without.report)
    (by_logits,) = gradients(both.total, logits)
    assert by_logits.isfinite().all()
    assert (by_logits[..., -1] == 0).all()

    full = torch.cat([student, torch.zeros(B, T, 1)], -1)
    only_teacher = distillation(Dense(full), Dense(torch.cat([teacher, gap], -1)), batch)
    assert only_teacher.report["kl"].isfinite()
    assert only_teacher.report["kl"] > without.report["kl"]
    only_student = distillation(Dense(logits), Dense(full), batch)
    assert only_student.total == math.inf
    assert only_student.report["kl"] == math.inf
    nothing = teacher.clone()
    nothing[1, 2] = -math.inf
    with pytest.raises(DataError, match=r"exclude every token, at position 2 of row 1$"):
        distillation(Dense(student), Dense(nothing), batch)


def test_a_retained_graph_gives_the_same_gradients_again() -> None:
    batch, prediction = batch_of(), linear()
    loss = cross_entropy(prediction, batch, chunk=4).total
    leaves = (prediction.hidden, prediction.head)
    first = torch.autograd.grad(loss * 3, leaves, retain_graph=True)
    again = torch.autograd.grad(loss * 3, leaves)
    torch.testing.assert_close(first, again, rtol=0, atol=0)


def test_a_second_derivative_is_refused() -> None:
    prediction = linear()
    loss = cross_entropy(prediction, batch_of()).total
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(loss, prediction.head, create_graph=True)


def test_a_tied_embedding_collects_both_of_its_gradients() -> None:
    batch, tied = batch_of(), torch.randn(V, D, dtype=torch.float64, requires_grad=True)

    def prediction() -> LinearPrediction:
        return LinearPrediction(hidden=tied[batch.tokens], head=tied, cap=3.0)

    (found,) = gradients(cross_entropy(prediction(), batch, chunk=4).total, tied)
    (wanted,) = gradients(dense_cross_entropy(prediction(), batch), tied)
    torch.testing.assert_close(found, wanted, rtol=0, atol=EXACT)


def test_vocabularies_of_different_sizes_are_refused() -> None:
    batch, student = batch_of(), linear()
    teacher = replace(student, head=torch.randn(V + 1, D).double())
    dense = Dense(torch.randn(B, T, V + 1))
    for wrong in (teacher, dense):
        with pytest.raises(TokenizerMismatch, match=r"23 tokens, the teacher 24"):
            distillation(student, wrong, batch)
    with pytest.raises(TokenizerMismatch, match=r"24 tokens, the teacher 23"):
        distillation(dense, student, batch)


def test_targets_outside_the_vocabulary_are_refused() -> None:
    batch, prediction = batch_of(), linear()
    batch.targets[batch.mask] = V
    for wrong in (prediction, Dense(torch.randn(B, T, V))):
        with pytest.raises(DataError, match=r"the model predicts 23 tokens"):
            cross_entropy(wrong, batch)
    with pytest.raises(DataError):
        distillation(prediction, prediction, batch)


def test_a_chunk_of_no_rows_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 1 row"):
        cross_entropy(linear(), batch_of(), chunk=0)
