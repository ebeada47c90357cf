"""Divergences over large vocabularies: of any f they are the dense formula's, chunk by chunk."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_linear import LargestResult
from torch import Tensor

from cabochon.core import LinearPrediction, Prediction, TokenBatch, soft_cap
from cabochon.core.errors import ConfigError, DataError, TokenizerMismatch
from cabochon.generation.guidance import GuidedPrediction
from cabochon.losses import divergences, f_divergences, rows
from cabochon.losses.f_divergences import KL, FDivergence, JensenShannon, ReverseKL
from cabochon.losses.linear import distillation, divergence, divergence_values

B, T, D, V = 3, 7, 5, 23
EXACT = 1e-10  # float64
DIVERGENCES = [
    f_divergences.named("forward_kl"),
    f_divergences.named("reverse_kl"),
    f_divergences.named("jsd", 0.1),
    f_divergences.named("jsd", 0.5),
    f_divergences.named("jsd", 0.001),
    f_divergences.named("jsd", 0.0),
    f_divergences.named("jsd", 1.0),
    f_divergences.named("jsd_paper", 0.9),
    f_divergences.named("hellinger"),
    f_divergences.named("chi_square"),
    f_divergences.named("alpha", 1.5),
    f_divergences.named("alpha", -0.5),
    f_divergences.named("jeffreys"),
]
any_divergence = pytest.mark.parametrize("f", DIVERGENCES, ids=lambda f: f.name)


def batch_of(mask: Tensor | None = None) -> TokenBatch:
    tokens = torch.randint(V, (B, T))
    return TokenBatch(
        tokens=tokens,
        positions=torch.arange(T).expand(B, T),
        documents=torch.zeros(B, T, dtype=torch.int64),
        targets=torch.randint(V, (B, T)),
        mask=torch.rand(B, T) < 0.6 if mask is None else mask,
    )


def everything() -> TokenBatch:
    return batch_of(torch.ones(B, T, dtype=torch.bool))


def linear(
    cap: float | None = 3.0,
    temperature: float = 1.0,
    width: int = D,
    dtype: torch.dtype = torch.float64,
) -> LinearPrediction:
    return LinearPrediction(
        hidden=torch.randn(B, T, width, dtype=dtype).requires_grad_(),
        head=torch.randn(V, width, dtype=dtype).requires_grad_(),
        cap=cap,
        temperature=temperature,
    )


@dataclass(frozen=True)
class Dense:
    """A prediction that is not linear: it hands out rows of given logits."""

    all_logits: Tensor

    def logits(self, rows: slice | Tensor, /) -> Tensor:
        return self.all_logits.flatten(0, 1)[rows]


def of_logits(*given: Tensor | list[float]) -> tuple[Dense, TokenBatch]:
    """One row of positions, all of which count."""
    logits = torch.stack([torch.as_tensor(row) for row in given])[None]
    ones = torch.ones(logits.shape[:2], dtype=torch.int64)
    batch = TokenBatch(
        tokens=ones, positions=ones, documents=ones, targets=0 * ones, mask=ones.bool()
    )
    return Dense(logits), batch


def all_logits(prediction: LinearPrediction) -> Tensor:
    raw = prediction.hidden @ prediction.head.T
    return soft_cap(raw, prediction.cap) / prediction.temperature


def dense_divergence(
    student: LinearPrediction, teacher: LinearPrediction, batch: TokenBatch, f: FDivergence
) -> Tensor:
    """The definition, sum_j q_j f(p_j / q_j), in float64, through autograd and f alone."""
    q = all_logits(student)[batch.mask].softmax(-1)
    p = all_logits(teacher)[batch.mask].softmax(-1).detach()
    u = p / q
    if isinstance(f, JensenShannon) and f.beta not in (0.0, 1.0):
        beta, m = f.beta, f.beta * p + (1 - f.beta) * q
        value = beta * p * (p / m).log() + (1 - beta) * q * (q / m).log()
        return (value * f.scale / (beta * (1 - beta))).sum(-1)
    return (q * _f(f, u)).sum(-1)


def _f(f: FDivergence, u: Tensor) -> Tensor:
    """f again, so that the objects' own f is not its own judge; c (u - 1) more or less."""
    if f.name in ("forward_kl", "jsd(0)"):
        return u * u.log()
    if f.name in ("reverse_kl", "jsd(1)"):
        return -u.log()
    if f.name == "jeffreys":
        return (u - 1) * u.log()
    if f.name == "hellinger":
        return (1 - u.sqrt()) ** 2
    if f.name == "chi_square":
        return (u - 1) ** 2 / 2
    return (u**f.a - 1) / (f.a * (f.a - 1))  # type: ignore[attr-defined]


def gradients(loss: Tensor, *of: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, of)


@any_divergence
@given(
    chunk=st.integers(1, 30),
    caps=st.tuples(st.sampled_from([None, 2.0, 30.0]), st.sampled_from([None, 2.0, 30.0])),
    temperatures=st.tuples(st.sampled_from([0.7, 1.0]), st.sampled_from([1.0, 2.0])),
    weighted=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=8, deadline=None)
def test_value_and_gradients_are_those_of_the_definition_for_any_chunk(
    f: FDivergence,
    chunk: int,
    caps: tuple[float | None, float | None],
    temperatures: tuple[float, float],
    weighted: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    batch = batch_of()
    student = linear(caps[0], temperatures[0])
    teacher = linear(caps[1], temperatures[1], width=D + 4)
    weights = torch.rand(B, T) if weighted else None
    loss = divergence(student, teacher, batch, f, weights=weights, chunk=chunk)
    values = dense_divergence(student, teacher, batch, f)
    factor = torch.ones(len(values)) if weights is None else weights[batch.mask]
    torch.testing.assert_close(loss.weight, factor.sum())
    expected = (values * factor).sum()
    torch.testing.assert_close(loss.total, expected, rtol=1e-11, atol=EXACT)
    found = gradients(loss.total, student.hidden, student.head)
    wanted = gradients(expected, student.hidden, student.head)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=EXACT)
    own = divergence_values(student, teacher, batch, f, chunk=chunk)
    torch.testing.assert_close(own, values.detach().float(), rtol=1e-6, atol=1e-7)
    target = -all_logits(student)[batch.mask].log_softmax(-1)
    nll = target.gather(-1, batch.targets[batch.mask][:, None]).squeeze(-1).detach()
    torch.testing.assert_close(loss.report["nll"], (nll * factor).sum(), rtol=0, atol=EXACT)


@any_divergence
def test_any_kinds_of_student_and_teacher_give_the_same_numbers(f: FDivergence) -> None:
    batch, student, teacher = batch_of(), linear(), linear(None)
    logits = all_logits(student).detach().requires_grad_()
    dense_teacher = Dense(all_logits(teacher).detach())
    loss = divergence(student, teacher, batch, f, chunk=4)
    (wanted,) = gradients(dense_divergence(student, teacher, batch, f).sum(), student.hidden)
    for kind in (teacher, dense_teacher):
        found = divergence(Dense(logits), kind, batch, f, chunk=4)
        torch.testing.assert_close(found.total.double(), loss.total, rtol=1e-10, atol=EXACT)
        (by_logits,) = gradients(found.total, logits)
        assert (by_logits[~batch.mask] == 0).all()
        cap = 1 - (logits / 3.0) ** 2
        by_hidden = (by_logits * cap) @ student.head
        torch.testing.assert_close(by_hidden, wanted, rtol=1e-9, atol=EXACT)
    mixed = divergence(student, dense_teacher, batch, f, chunk=4)
    torch.testing.assert_close(mixed.total, loss.total, rtol=1e-12, atol=EXACT)


def test_the_hand_made_numbers_of_three_tokens() -> None:
    # P = (.7, .2, .1), Q = (.4, .4, .2)
    teacher, batch = of_logits(torch.tensor([0.7, 0.2, 0.1]).log())
    student, _ = of_logits(torch.tensor([0.4, 0.4, 0.2]).log())
    numbers = [
        (KL(), 0.183787),
        (ReverseKL(), 0.192042),
        (JensenShannon(0.5, "paper"), 0.046201),
        (JensenShannon(0.5), 4 * 0.046201),
    ]
    for f, expected in numbers:
        found = divergence(student, teacher, batch, f).total
        assert found.item() == pytest.approx(expected, abs=3e-6)
    # By the student's logits: forward Q - P, reverse Q (log(Q / P) - KL(Q || P)).
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.4, 0.4, 0.2])
    for f, by_logits in ((KL(), q - p), (ReverseKL(), q * ((q / p).log() - 0.192042))):
        logits = student.all_logits.clone().requires_grad_()
        (found,) = gradients(divergence(Dense(logits), teacher, batch, f).total, logits)
        torch.testing.assert_close(found.flatten(), by_logits, rtol=0, atol=1e-6)


@any_divergence
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_it_is_zero_with_zero_gradient_only_where_the_two_agree(
    f: FDivergence, dtype: torch.dtype
) -> None:
    batch, teacher = everything(), linear(30.0, dtype=dtype)
    same = divergence(teacher, teacher, batch, f)
    assert same.total == 0
    tiny = {torch.float64: 1e-14, torch.float32: 2e-5}.get(dtype, 0.1)
    assert all(g.abs().max() <= tiny for g in gradients(same.total, teacher.hidden, teacher.head))
    nudged = replace(teacher, temperature=1.01)
    values = divergence_values(nudged, teacher, batch, f)
    assert (values > 0).all()


@any_divergence
def test_it_is_never_below_zero_and_accurate_in_float32(f: FDivergence) -> None:
    batch = everything()
    for spread in (1e-4, 1e-2, 1.0):
        teacher = linear(None)
        student = replace(teacher, head=teacher.head + spread * torch.randn(V, D).double())
        exact = divergence_values(student, teacher, batch, f).double()
        halves = [replace(side, hidden=side.hidden.float(), head=side.head.float()) for side in
                  (student, teacher)]  # fmt: skip
        found = divergence_values(*halves, batch, f).double()
        assert (found >= 0).all()
        assert ((found - exact).abs() <= 1e-4 * exact + 1e-6).all()


def test_jensen_shannon_reaches_both_divergences_of_kullback_and_leibler() -> None:
    batch, student, teacher = batch_of(), linear(), linear()

    def of(f: FDivergence) -> Tensor:
        loss = divergence(student, teacher, batch, f).total
        return torch.stack([loss, *(g.norm() for g in gradients(loss, student.head))])

    for end, limit in ((0.0, KL()), (1.0, ReverseKL())):
        torch.testing.assert_close(of(JensenShannon(end)), of(limit), rtol=1e-12, atol=0)
        for gap in (1e-6, 1e-4):
            near = of(JensenShannon(abs(end - gap)))
            torch.testing.assert_close(near, of(limit), rtol=50 * gap, atol=0)
    # Continuous also where the path of few passes takes over.
    for beta in (0.02, 0.98):
        below, above = of(JensenShannon(beta - 1e-9)), of(JensenShannon(beta + 1e-9))
        torch.testing.assert_close(below, above, rtol=1e-7, atol=0)


def test_jensen_shannon_of_beta_is_that_of_the_rest_with_the_two_exchanged() -> None:
    batch, student, teacher = batch_of(), linear(), linear()
    for beta in (0.01, 0.3, 0.5, 0.9):
        f = JensenShannon(beta, "paper")
        found = divergence_values(student, teacher, batch, f)
        mirrored = divergence_values(teacher, student, batch, JensenShannon(1 - beta, "paper"))
        torch.testing.assert_close(found, mirrored)
        assert (found <= -beta * math.log(beta) - (1 - beta) * math.log1p(-beta)).all()


def test_forward_kl_has_the_gradient_of_distillation() -> None:
    batch, student, teacher = batch_of(), linear(), linear()
    leaves = (student.hidden, student.head)
    cross = distillation(student, teacher, batch)
    found = divergence(student, teacher, batch, KL())
    torch.testing.assert_close(found.total.detach(), cross.report["kl"])
    torch.testing.assert_close(
        gradients(found.total, *leaves), gradients(cross.total, *leaves), rtol=0, atol=EXACT
    )


@any_divergence
def test_a_batch_split_in_two_gives_the_same_sums(f: FDivergence) -> None:
    batch, student, teacher = batch_of(), linear(), linear()
    weights = torch.rand(B, T)
    whole = divergence(student, teacher, batch, f, weights=weights)
    parts = []
    for start, stop in ((0, 1), (1, B)):
        half, other = (replace(side, hidden=side.hidden[start:stop]) for side in (student, teacher))
        of = batch.rows(start, stop)
        parts.append(divergence(half, other, of, f, weights=weights[start:stop]))
    total = parts[0].total + parts[1].total
    torch.testing.assert_close(total, whole.total, rtol=0, atol=EXACT)
    torch.testing.assert_close(parts[0].weight + parts[1].weight, whole.weight)
    found = gradients(total, student.head)
    torch.testing.assert_close(found, gradients(whole.total, student.head), rtol=0, atol=EXACT)


@any_divergence
def test_prompt_and_padding_get_no_gradient_and_change_nothing(f: FDivergence) -> None:
    batch, student, teacher = batch_of(), linear(), linear()
    loss = divergence(student, teacher, batch, f, chunk=4)
    (by_hidden,) = gradients(loss.total, student.hidden)
    assert (by_hidden[~batch.mask] == 0).all()
    assert (by_hidden[batch.mask] != 0).any(-1).all()
    garbage = student.hidden.detach().masked_fill(~batch.mask[..., None], math.nan)
    found = divergence(replace(student, hidden=garbage), teacher, batch, f, chunk=4)
    assert found.total == loss.total


@any_divergence
def test_a_batch_in_which_nothing_counts_gives_zero_and_zero_gradients(f: FDivergence) -> None:
    batch = batch_of(torch.zeros(B, T, dtype=torch.bool))
    student, teacher = linear(), linear()
    loss = divergence(student, teacher, batch, f, weights=torch.ones(B, T))
    loss.total.backward()
    assert loss.total == 0
    assert loss.weight == 0
    assert (student.hidden.grad == 0).all()
    assert (student.head.grad == 0).all()
    assert teacher.head.grad is None
    assert divergence_values(student, teacher, batch, f).shape == (0,)


@any_divergence
def test_the_teacher_gets_no_gradient(f: FDivergence) -> None:
    batch, student, teacher = batch_of(), linear(), linear()
    divergence(student, teacher, batch, f).total.backward()
    assert teacher.hidden.grad is None
    assert teacher.head.grad is None
    logits = torch.randn(B, T, V).double().requires_grad_()
    divergence(student, Dense(logits), batch, f).total.backward()
    assert logits.grad is None


@any_divergence
def test_a_token_that_both_exclude_is_as_if_it_were_not_there(f: FDivergence) -> None:
    first, second = torch.randn(2, 4, V).double()
    student, batch = of_logits(*first)
    teacher, _ = of_logits(*second)
    expected = divergence_values(student, teacher, batch, f)
    gap = torch.full((4, 1), -math.inf)
    logits = torch.cat([first, gap], -1)[None].requires_grad_()
    wider = Dense(torch.cat([second, gap], -1)[None])
    loss = divergence(Dense(logits), wider, batch, f)
    torch.testing.assert_close(divergence_values(Dense(logits), wider, batch, f), expected)
    (found,) = gradients(loss.total, logits)
    assert found.isfinite().all()
    assert (found[..., -1] == 0).all()


def test_what_only_one_excludes_is_the_limit_infinite_or_not() -> None:
    # p = (1/2, 1/2, 0), q = (0, 1/2, 1/2)
    teacher, batch = of_logits([0.0, 0.0, -math.inf])
    student, _ = of_logits([-math.inf, 0.0, 0.0])
    for name, parameter, expected in (
        ("forward_kl", None, math.inf),
        ("reverse_kl", None, math.inf),
        ("jeffreys", None, math.inf),
        ("jsd_paper", 0.5, math.log(2) / 2),
        ("hellinger", None, 1.0),
        ("alpha", 0.5, 2.0),
    ):
        f = f_divergences.named(name, parameter)
        logits = student.all_logits.clone().requires_grad_()
        loss = divergence(Dense(logits), teacher, batch, f).total
        assert loss.item() == pytest.approx(expected, rel=1e-6), name
        if math.isfinite(expected):
            assert gradients(loss, logits)[0].isfinite().all()
    (by_logits,) = gradients(
        divergence(Dense(logits), teacher, batch, JensenShannon()).total, logits
    )
    assert by_logits.flatten()[0] == 0


def test_a_weight_of_zero_leaves_out_what_is_infinite() -> None:
    student, batch = of_logits([0.0, 1.0, -math.inf], [0.0, 1.0, 2.0])
    teacher, _ = of_logits([0.0, 0.0, 0.0], [0.0, 0.0, 1.0])
    logits = student.all_logits.clone().requires_grad_()
    weights = torch.tensor([[0.0, 3.0]])
    loss = divergence(Dense(logits), teacher, batch, KL(), weights=weights)
    values = divergence_values(student, teacher, batch, KL())
    assert values[0] == math.inf
    assert loss.total.item() == pytest.approx(3.0 * values[1].item())
    assert loss.weight == 3.0
    (by_logits,) = gradients(loss.total, logits)
    assert (by_logits[0, 0] == 0).all()
    assert by_logits.isfinite().all()


def test_parameters_too_small_for_float32_give_the_limit() -> None:
    student, batch = of_logits(*torch.randn(4, V))
    teacher, _ = of_logits(*torch.randn(4, V))
    for tiny, limit in (
        (JensenShannon(1e-300), KL()),
        (f_divergences.Alpha(1e-300), ReverseKL()),
        (f_divergences.Alpha(-1e-300), ReverseKL()),
    ):
        found = divergence_values(student, teacher, batch, tiny)
        torch.testing.assert_close(found, divergence_values(student, teacher, batch, limit))
    assert divergence(student, teacher, batch, JensenShannon(1e-300, "paper")).total == 0.0


@any_divergence
def test_extreme_logits_give_no_nan(f: FDivergence) -> None:
    for cap, size in ((None, 300.0), (30.0, 1e4)):
        student, teacher = (
            replace(p, hidden=p.hidden.detach() * size)
            for p in (linear(cap, dtype=torch.float32), linear(cap, dtype=torch.float32))
        )
        loss = divergence(student, teacher, everything(), f)
        assert not loss.total.isnan()
        assert loss.total > 0
        if "jsd" in f.name or f.name in ("hellinger", "forward_kl", "reverse_kl"):
            assert loss.total.isfinite()
            assert gradients(loss.total, student.head)[0].isfinite().all()


def test_a_teacher_that_says_nothing_is_named() -> None:
    student, batch = of_logits(*torch.randn(4, V))
    broken = torch.randn(1, 4, V)
    broken[0, 2] = -math.inf
    for f in (KL(), JensenShannon(), f_divergences.named("hellinger")):
        with pytest.raises(DataError, match=r"exclude every token, at position 2 of row 0$"):
            divergence(student, Dense(broken), batch, f)
    broken[0, 1, 3] = math.nan
    with pytest.raises(DataError, match=r"NaN.* position 1 of row 0, and at others"):
        divergence(student, Dense(broken), batch, KL(), chunk=4)


def test_a_guided_teacher_is_distilled_chunk_by_chunk() -> None:
    batch, student = batch_of(), linear()
    conditional, unconditional = linear(), linear()
    place = torch.arange(B * T)
    guided = GuidedPrediction(
        conditional=conditional, unconditional=unconditional, place=place, strength=2.0
    )
    logits = 2 * all_logits(conditional).log_softmax(-1) - all_logits(unconditional).log_softmax(-1)
    found = divergence(student, guided, batch, JensenShannon(), chunk=3)
    wanted = divergence(student, Dense(logits), batch, JensenShannon())
    torch.testing.assert_close(found.total, wanted.total, rtol=1e-6, atol=0)


def test_a_tempered_teacher_is_the_teacher_with_its_logits_divided() -> None:
    batch, student, teacher = batch_of(), linear(), linear()
    found = divergence(student, teacher.tempered(2.0), batch, ReverseKL())
    wanted = divergence(student, Dense(all_logits(teacher) / 2.0), batch, ReverseKL())
    torch.testing.assert_close(found.total, wanted.total, rtol=1e-12, atol=0)


@any_divergence
@pytest.mark.parametrize("quick", [torch.bfloat16, torch.float32])
def test_bfloat16_is_as_good_as_rounding_the_logits_allows(
    f: FDivergence, quick: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for room in (rows, divergences):  # a processor with bfloat16 arithmetic, and one without
        monkeypatch.setattr(room, "product_dtype", lambda head: quick)
    batch, teacher = batch_of(), linear(30.0, dtype=torch.bfloat16)
    half = linear(30.0, dtype=torch.bfloat16)
    whole = replace(
        half,
        hidden=half.hidden.detach().double().requires_grad_(),
        head=half.head.detach().double().requires_grad_(),
    )
    exact_teacher = replace(teacher, hidden=teacher.hidden.double(), head=teacher.head.double())
    loss = divergence(half, teacher, batch, f, chunk=2)
    expected = dense_divergence(whole, exact_teacher, batch, f).sum()
    assert loss.total.dtype == torch.float32
    torch.testing.assert_close(loss.total.double(), expected, rtol=0.03, atol=0)
    found = gradients(loss.total, half.hidden, half.head)
    wanted = gradients(expected, whole.hidden, whole.head)
    for ours, exact in zip(found, wanted, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours.double() - exact).norm() < 0.03 * exact.norm()


def test_a_tied_embedding_collects_both_of_its_gradients() -> None:
    batch, teacher = batch_of(), linear()
    tied = torch.randn(V, D, dtype=torch.float64, requires_grad=True)
    student = LinearPrediction(hidden=tied[batch.tokens], head=tied, cap=3.0)
    f = JensenShannon()
    (found,) = gradients(divergence(student, teacher, batch, f, chunk=4).total, tied)
    again = LinearPrediction(hidden=tied[batch.tokens], head=tied, cap=3.0)
    (wanted,) = gradients(dense_divergence(again, teacher, batch, f).sum(), tied)
    torch.testing.assert_close(found, wanted, rtol=0, atol=EXACT)


def test_a_second_derivative_is_refused() -> None:
    student, teacher, batch = linear(), linear(), batch_of()
    for prediction, leaf in (
        (student, student.head),
        (Dense(logits := torch.randn(B, T, V, requires_grad=True)), logits),
    ):
        loss = divergence(prediction, teacher, batch, KL()).total
        with pytest.raises(NotImplementedError, match="no second derivative"):
            torch.autograd.grad(loss, leaf, create_graph=True)


def test_unlike_vocabularies_are_refused() -> None:
    batch, student = batch_of(), linear()
    teacher = replace(student, head=torch.randn(V + 1, D).double())
    for wrong in (teacher, Dense(torch.randn(B, T, V + 1))):
        with pytest.raises(TokenizerMismatch, match=r"23 tokens, the teacher 24"):
            divergence(student, wrong, batch, JensenShannon())


def test_predictions_of_another_batch_are_refused() -> None:
    batch, good = everything(), linear()
    other = replace(good, hidden=good.hidden[:, :-1])
    for student, teacher, who in ((good, other, "teacher"), (other, good, "student")):
        with pytest.raises(DataError, match=rf"the {who} predicts \(3, 6\) positions"):
            divergence(student, teacher, batch, KL())


def test_weights_of_another_shape_or_not_finite_are_refused() -> None:
    batch, student = everything(), linear()
    with pytest.raises(DataError, match=r"weights have shape \(3,\)"):
        divergence(student, student, batch, KL(), weights=torch.ones(B))
    weights = torch.ones(B, T)
    weights[1, 2] = math.inf
    with pytest.raises(DataError, match=r"not finite at position 2 of row 1"):
        divergence(student, student, batch, KL(), weights=weights)


def test_a_chunk_of_no_rows_is_refused() -> None:
    student = linear()
    for call in (divergence, divergence_values):
        with pytest.raises(ConfigError, match="at least 1 row"):
            call(student, student, batch_of(), KL(), chunk=0)


def test_a_prediction_is_a_prediction() -> None:
    assert isinstance(Dense(torch.zeros(1, 1, 1)), Prediction)


@any_divergence
def test_nothing_larger_than_a_chunk_of_logits_ever_exists(f: FDivergence) -> None:
    count, vocabulary, chunk = 64, 512, 8
    student = LinearPrediction(
        hidden=torch.randn(1, count, 4, requires_grad=True),
        head=torch.randn(vocabulary, 4, requires_grad=True),
        cap=5.0,
    )
    teacher = LinearPrediction(hidden=torch.randn(1, count, 6), head=torch.randn(vocabulary, 6))
    ones = torch.ones(1, count, dtype=torch.int64)
    batch = TokenBatch(tokens=ones, positions=ones, documents=ones, targets=ones, mask=ones.bool())
    with LargestResult() as largest:
        divergence(student, teacher, batch, f, chunk=chunk).total.backward()
        divergence_values(student, teacher, batch, f, chunk=chunk)
    assert largest.elements == chunk * vocabulary
