"""What is kept of a distribution, and the bounds on what is lost, against plain arithmetic."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cabochon.core import Key, TokenBatch
from cabochon.core.errors import ConfigError, NonFinite
from cabochon.core.types import TopKTargets
from cabochon.data.batches import documents
from cabochon.data.truncation import draw, even_bound, likeliest, log_rest, sampled, top_k


class Dense:
    """Logits that are simply there."""

    def __init__(self, dense: Tensor) -> None:
        self.dense = dense

    def logits(self, rows: slice | Tensor, /) -> Tensor:
        return self.dense.flatten(0, 1)[rows]


def logits(rows: int, vocabulary: int, *name: str | int, scale: float = 2.0) -> Tensor:
    generator = Key(3, name).generator()
    return scale * torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64)


def test_by_hand() -> None:
    prob = torch.tensor([[0.5, 0.1, 0.25, 0.15]], dtype=torch.float64)
    found = likeliest(prob.log(), 2)
    assert found.ids.tolist() == [[0, 2]]
    assert found.logprob.exp().tolist() == [pytest.approx([0.5, 0.25])]
    assert found.tail.exp().item() == pytest.approx(0.25)
    inside = torch.tensor([0.4, 0.6])
    entropy = -(inside * inside.log()).sum().item()
    assert found.uneven.item() == pytest.approx(0.25 * (math.log(2) - entropy), rel=1e-5)


def test_the_whole_vocabulary_leaves_no_tail() -> None:
    found = likeliest(logits(5, 9, "whole"), 9)
    assert torch.equal(found.tail, torch.full((5,), -math.inf))
    assert torch.equal(found.uneven, torch.zeros(5))
    assert torch.allclose(found.logprob.exp().sum(-1), torch.ones(5))


def test_impossible_tokens_are_kept_as_impossible() -> None:
    given_ = torch.tensor([[0.0, -math.inf, 0.0, -math.inf]])
    found = likeliest(given_, 3)
    assert sorted(found.logprob[0].tolist()) == [-math.inf, *[pytest.approx(math.log(0.5))] * 2]
    assert found.tail.item() == -math.inf
    assert found.uneven.item() == 0.0


def test_a_tail_of_a_billionth_is_not_lost_to_rounding() -> None:
    given_ = torch.tensor([[0.0, -20.0, -21.0, -22.0]])
    tail = likeliest(given_, 1).tail.item()
    expected = math.log(sum(math.exp(-x) for x in (20, 21, 22)))
    assert tail == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_what_is_no_distribution_is_refused(wrong: float) -> None:
    bad = logits(3, 7, "bad")
    bad[1, 4] = wrong
    with pytest.raises(NonFinite, match="row 1 of 3"):
        likeliest(bad, 2)
    with pytest.raises(NonFinite, match="row 1 of 3"):
        draw(bad, torch.rand(3, 4, dtype=torch.float64))


@pytest.mark.parametrize("k", [0, 8])
def test_more_tokens_than_there_are_is_refused(k: int) -> None:
    with pytest.raises(ConfigError, match="1 to 7"):
        likeliest(logits(3, 7, "k"), k)


@given(
    seed=st.integers(0, 10**6),
    vocabulary=st.integers(2, 40),
    share=st.floats(0.05, 0.95),
    scale=st.floats(0.1, 6.0),
)
def test_what_the_tail_hides_lies_between_nothing_and_the_bound(
    seed: int, vocabulary: int, share: float, scale: float
) -> None:
    p_logits = logits(4, vocabulary, "p", seed, scale=scale)
    q_logits = logits(4, vocabulary, "q", seed, scale=scale).requires_grad_()
    k = max(1, min(vocabulary - 1, round(share * vocabulary)))
    found = likeliest(p_logits, k)
    log_p, log_q = p_logits.log_softmax(-1), q_logits.log_softmax(-1)
    full = (log_p.exp() * (log_p - log_q)).sum(-1)
    kept_q = log_q.gather(-1, found.ids)
    rest = log_q.scatter(-1, found.ids, -math.inf)
    tail_q, tail_p = rest.logsumexp(-1), found.tail.double()
    kept_p = found.logprob.double()
    coarse = (kept_p.exp() * (kept_p - kept_q)).sum(-1) + tail_p.exp() * (tail_p - tail_q)
    lowest = log_q.masked_fill(torch.isinf(rest), math.inf).amin(-1)
    log_ratio = tail_q - math.log(vocabulary - k) - lowest
    hidden = full - coarse
    bound = found.uneven + tail_p.exp() * log_ratio
    assert (hidden > -1e-5).all()
    assert (hidden <= bound + 1e-5).all()
    difference = (
        torch.autograd.grad(full.sum(), q_logits, retain_graph=True)[0]
        - torch.autograd.grad(coarse.sum(), q_logits)[0]
    )
    assert (difference.abs().sum(-1) <= 2 * tail_p.exp() + 1e-5).all()
    told = TopKTargets(ids=found.ids[None], logprob=found.logprob[None], tail=found.tail[None])
    assert (even_bound(told, vocabulary)[0] >= found.uneven - 1e-4).all()


@given(st.floats(-60.0, -1e-7))
def test_the_rest_of_a_probability(logprob: float) -> None:
    found = log_rest(torch.tensor(logprob, dtype=torch.float64)).item()
    assert found == pytest.approx(math.log(-math.expm1(logprob)), rel=1e-9)


def test_draws_follow_the_distribution() -> None:
    law = logits(1, 6, "law").log_softmax(-1)
    uniform = torch.rand(1, 40_000, generator=Key(1).generator(), dtype=torch.float64)
    found = draw(law, uniform)
    assert found.counts.sum() == 40_000
    share = torch.zeros(6, dtype=torch.float64)
    share[found.ids] = found.counts.double() / 40_000
    error = (law[0].exp() * (1 - law[0].exp()) / 40_000).sqrt()
    assert ((share - law[0].exp()).abs() < 4 * error).all()


def test_what_cannot_come_is_never_drawn() -> None:
    law = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]])
    edges = torch.tensor([[0.0, 0.5 - 1e-17, 0.5, 1.0 - 2**-53]], dtype=torch.float64)
    assert set(draw(law, edges).ids.tolist()) == {1, 3}


def test_the_stated_standard_error_is_that_of_many_draws() -> None:
    law = logits(1, 8, "error").log_softmax(-1)
    draws = 16
    uniform = torch.rand(4000, draws, generator=Key(2).generator(), dtype=torch.float64)
    found = draw(law.expand(4000, 8), uniform)
    row = torch.arange(4000).repeat_interleave(found.sizes)
    estimate = torch.zeros(4000, dtype=torch.float64)
    estimate.index_add_(0, row, -law[0][found.ids] * found.counts / draws)
    assert estimate.std().item() == pytest.approx(
        math.sqrt(found.variance[0].item() / draws), rel=0.05
    )
    share = torch.zeros(4000, 8, dtype=torch.float64)
    share[row, found.ids] = found.counts.double() / draws
    noise = (share - law.exp()).square().sum(-1).mean().item()
    assert noise == pytest.approx(found.spread[0].item() / draws, rel=0.05)


def batch_and_teacher(*lengths: int) -> tuple[TokenBatch, Dense]:
    batch = TokenBatch.of([list(range(3, 3 + length)) for length in lengths])
    return batch, Dense(logits(batch.mask.numel(), 30, "teacher").view(*batch.shape, 30))


def test_a_policy_that_says_its_likeliest_tokens() -> None:
    batch, prediction = batch_and_teacher(5, 3)
    said = top_k(lambda _: prediction, 4)(batch)
    assert said.ids.shape == (2, 5, 4)
    assert torch.equal(said.tail.isnan(), ~batch.mask)
    mass = said.logprob.exp().sum(-1) + said.tail.exp()
    assert torch.allclose(mass[batch.mask], torch.ones(6))
    law = prediction.dense.log_softmax(-1).float()
    chosen = law.gather(-1, said.ids.clamp(min=0))
    assert torch.allclose(chosen[batch.mask], said.logprob[batch.mask])


def test_draws_of_a_document_do_not_depend_on_its_batch() -> None:
    batch, prediction = batch_and_teacher(5, 3, 4)
    together = sampled(lambda _: prediction, 12, Key(4))(batch)
    for row in range(3):
        alone = sampled(lambda _, r=row: Dense(prediction.dense[r : r + 1]), 12, Key(4))
        said = alone(batch.rows(row, row + 1))
        assert torch.equal(said.ids[0], together.ids[row])
        assert torch.equal(said.share[0], together.share[row])
    assert torch.allclose(together.share.sum(-1), batch.mask.float())
    assert not torch.equal(sampled(lambda _: prediction, 12, Key(5))(batch).ids, together.ids)


def test_the_documents_of_a_batch() -> None:
    batch = TokenBatch.of([[5, 6, 7], [8, 9]], left=True)
    first, second = documents(batch)
    assert (first.row, first.tokens.tolist(), first.flat.tolist()) == (0, [5, 6, 7], [0, 1, 2])
    assert (second.row, second.tokens.tolist(), second.flat.tolist()) == (1, [8, 9], [4, 5])
    assert second.counted.tolist() == [True, False]
    assert second.sequence.tolist() == [8, 9]
