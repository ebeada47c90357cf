"""Distances of whole responses: against enumeration, at their limits, and refused input."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from cabochon.core import Completion, Group, Key, LinearPrediction, TokenBatch
from cabochon.core.errors import DataError, NonFinite, TokenizerMismatch
from cabochon.evaluation.distances import (
    Distance,
    change,
    sequence_js,
    sequence_kl,
    token_js,
)

V, LENGTH = 3, 3
PROMPT = torch.tensor([0])
Law = dict[tuple[int, ...], list[float]]


class Tabular:
    """Next-token distributions by all that was read before: a policy that can be enumerated."""

    def __init__(self, seed: int, sharpness: float = 1.5, vocabulary: int = V) -> None:
        self.vocabulary = vocabulary
        self._seed, self._sharpness = seed, sharpness
        self._rows: dict[tuple[int, ...], Tensor] = {}

    def row(self, past: tuple[int, ...]) -> Tensor:
        if past not in self._rows:
            stream = Key(self._seed).fold(*past).generator()
            drawn = torch.randn(self.vocabulary, generator=stream, dtype=torch.float64)
            self._rows[past] = drawn * self._sharpness
        return self._rows[past]

    def __call__(self, batch: TokenBatch, /) -> LinearPrediction:
        rows = [
            torch.stack([self.row(tuple(tokens[: at + 1])) for at in range(len(tokens))])
            for tokens in batch.tokens.tolist()
        ]
        return LinearPrediction(hidden=torch.stack(rows), head=torch.eye(self.vocabulary).double())

    def probability(self, response: tuple[int, ...]) -> float:
        past = tuple(PROMPT.tolist())
        total = 0.0
        for token in response:
            total += float(self.row(past).log_softmax(-1)[token])
            past += (token,)
        return math.exp(total)

    def law(self) -> dict[tuple[int, ...], float]:
        every = itertools.product(range(self.vocabulary), repeat=LENGTH)
        return {y: self.probability(y) for y in every}

    def draw(self, count: int, key: Key) -> list[Group]:
        law = self.law()
        responses, weights = list(law), torch.tensor(list(law.values()))
        drawn = torch.multinomial(weights, count, replacement=True, generator=key.generator())
        return [group(responses[number]) for number in drawn.tolist()]


def group(*responses: tuple[int, ...]) -> Group:
    return Group(
        prompt=PROMPT,
        completions=tuple(
            Completion(
                tokens=torch.tensor(each),
                logprob=torch.zeros(len(each)),
                model_logprob=torch.zeros(len(each)),
                stopped=False,
            )
            for each in responses
        ),
    )


def enumerated_kl(p: dict[tuple[int, ...], float], q: dict[tuple[int, ...], float]) -> float:
    return math.fsum(p[y] * math.log(p[y] / q[y]) for y in p)


def expectation(p: Tabular, value: Distance) -> float:
    """The mean of a figure that was taken once for each possible response, under p."""
    return math.fsum(
        weight * each for weight, each in zip(p.law().values(), value.prompts, strict=True)
    )


def every_response(p: Tabular) -> list[Group]:
    return [group(y) for y in p.law()]


@pytest.mark.parametrize("seed", range(4))
def test_the_chain_rule_is_the_divergence_of_the_sequences(seed: int):
    p, q = Tabular(seed), Tabular(seed + 100)
    everything = every_response(p)
    assert expectation(p, sequence_kl(p, q, everything)) == pytest.approx(
        enumerated_kl(p.law(), q.law()), rel=1e-6
    )


def test_responses_drawn_from_p_give_it_in_expectation():
    p, q = Tabular(0), Tabular(100)
    found = sequence_kl(p, q, p.draw(1500, Key(1)))
    low, high = found.interval
    assert low < enumerated_kl(p.law(), q.law()) < high
    assert high - low < 0.2


@pytest.mark.parametrize("seed", range(4))
def test_the_sequence_js_is_that_to_the_mixture_of_sequences(seed: int):
    p, q = Tabular(seed, 3.0), Tabular(seed + 100, 3.0)
    everything = every_response(p)
    # With q's part at one fixed response the rest is p's part, and the other way round.
    fixed = [group((0,) * LENGTH)] * len(everything)
    both = sequence_js(p, q, everything, everything)
    p_law, q_law = p.law(), q.law()
    mixture = {y: (p_law[y] + q_law[y]) / 2 for y in p_law}
    truth = (enumerated_kl(p_law, mixture) + enumerated_kl(q_law, mixture)) / 2
    p_part = expectation(p, sequence_js(p, q, everything, fixed))
    q_part = expectation(q, sequence_js(p, q, fixed, everything))
    rest = sequence_js(p, q, fixed, fixed).mean
    # Each half stands once with its own expectation, once with the fixed response.
    assert p_part + q_part - rest == pytest.approx(truth, rel=1e-6)
    assert max(both.prompts) <= math.log(2.0)


def test_js_is_symmetric_and_at_most_log_two():
    p, q = Tabular(1, 4.0), Tabular(2, 4.0)
    from_p, from_q = p.draw(40, Key(1)), q.draw(40, Key(2))
    for distance in (sequence_js, token_js):
        forth = distance(p, q, from_p, from_q)
        back = distance(q, p, from_q, from_p)
        assert forth.prompts == pytest.approx(back.prompts, abs=1e-6)
        assert 0.0 < forth.mean <= math.log(2.0)


def test_the_two_js_are_different_numbers():
    p, q = Tabular(1, 4.0), Tabular(2, 4.0)
    from_p, from_q = p.draw(200, Key(1)), q.draw(200, Key(2))
    assert sequence_js(p, q, from_p, from_q).mean > token_js(p, q, from_p, from_q).mean + 0.1


def test_identical_policies_are_exactly_at_zero_and_others_above_it():
    p, same, near = Tabular(3), Tabular(3), Tabular(3, 1.5001)
    drawn = p.draw(20, Key(4))
    assert set(sequence_kl(p, same, drawn).prompts) == {0.0}
    assert sequence_js(p, same, drawn, drawn).prompts == pytest.approx([0.0] * 20, abs=1e-12)
    assert set(token_js(p, same, drawn, drawn).prompts) == {0.0}
    assert min(sequence_kl(p, near, drawn).prompts) > 0.0


def test_with_the_oracle_for_a_teacher_proxy_and_golden_are_one_number():
    oracle, student = Tabular(5), Tabular(6)
    teacher = Tabular(5)
    drawn = oracle.draw(30, Key(0))
    assert sequence_kl(teacher, student, drawn) == sequence_kl(oracle, student, drawn)


def test_neither_the_number_of_rows_nor_unequal_lengths_change_it():
    p, q = Tabular(7), Tabular(8)
    groups = [group((0, 1), (2,)), group((1, 1, 1)), group((2, 0, 1, 2, 1))]
    alone = sequence_kl(p, q, groups, rows=1)
    assert sequence_kl(p, q, groups, rows=16).prompts == pytest.approx(alone.prompts, rel=1e-6)
    apart = [sequence_kl(p, q, [group(y)]).mean for y in ((0, 1), (2,))]
    assert alone.prompts[0] == pytest.approx(sum(apart) / 2)


def test_a_change_is_paired_prompt_by_prompt():
    # The prompts differ by 10 nats, the change by a hundredth: only pairing shows it.
    earlier = Distance(prompts=tuple(float(10 * n) for n in range(30)))
    later = Distance(prompts=tuple(10 * n + 0.01 + 0.001 * (n % 3) for n in range(30)))
    moved = change(earlier, later)
    assert moved.mean == pytest.approx(0.011)
    assert (moved.risen, moved.fallen) == (True, False)
    assert change(later, earlier).fallen
    assert not change(earlier, earlier).risen
    with pytest.raises(DataError, match="29 prompts"):
        change(earlier, Distance(prompts=later.prompts[1:]))


def test_what_is_no_sample_of_the_policy_is_refused():
    p, q = Tabular(0), Tabular(1)
    cold = group((0, 1, 2))
    (written,) = cold.completions
    warm = Completion(
        tokens=written.tokens, logprob=torch.tensor([0.0, -0.5, 0.0]),
        model_logprob=written.model_logprob, stopped=False,
    )  # fmt: skip
    with pytest.raises(DataError, match="temperature 1"):
        sequence_kl(p, q, [Group(prompt=PROMPT, completions=(warm,))])
    with pytest.raises(DataError, match="no prompt"):
        sequence_kl(p, q, [])
    with pytest.raises(DataError, match="prompt 0 has no response"):
        sequence_kl(p, q, [Group(prompt=PROMPT, completions=())])
    with pytest.raises(DataError, match="prompt 0 is empty"):
        sequence_kl(p, q, [Group(prompt=PROMPT[:0], completions=cold.completions)])
    with pytest.raises(DataError, match="same prompts"):
        sequence_js(p, q, [cold], [cold, cold])


def test_another_vocabulary_and_nan_are_named():
    p = Tabular(0)
    with pytest.raises(TokenizerMismatch, match="predicts 3 tokens, the other 4"):
        sequence_kl(p, Tabular(1, vocabulary=4), [group((0, 1))])

    def broken(batch: TokenBatch, /) -> LinearPrediction:
        prediction = p(batch)
        return LinearPrediction(hidden=prediction.hidden * math.nan, head=prediction.head)

    with pytest.raises(NonFinite, match="prompt 0"):
        sequence_kl(p, broken, [group((0, 1))])
