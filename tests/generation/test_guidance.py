"""Guidance: equal to two dense passes, whatever the batch, the cache or the prompts' lengths."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from small_gemma import CONFIG, random_prompts, small_gemma
from torch import Tensor

from cabochon.core import Group, Key, LinearPrediction, TokenBatch
from cabochon.core.errors import ConfigError, DataError
from cabochon.generation.engine import Engine, Settings, generate
from cabochon.generation.guidance import Guided, Unprompted, always, guided_logits
from cabochon.generation.score import score
from cabochon.models.foreign import ForeignModel

BOS = torch.tensor([2])
SETTINGS = Settings(max_new_tokens=20, stop_ids=(7, 9, 11))
REVERSED = Unprompted(of=lambda prompt: torch.cat([prompt.flip(0), prompt]), longest=24)
"""Another prompt for each, twice as long."""


def dense(model: Any, other: Any, strength: float, prompt: Tensor, negative: Tensor, new: Tensor):
    """Log-probabilities of `new` by two whole passes and the formula, in float64."""
    streams = []
    for policy, start in ((model, prompt), (other, negative)):
        hidden = policy(TokenBatch.of([torch.cat([start, new])]))
        rows = slice(len(start) - 1, len(start) - 1 + len(new))
        streams.append(hidden.logits(rows).double())
    combined = strength * streams[0] + (1 - strength) * streams[1]
    return combined.log_softmax(-1).gather(-1, new[:, None]).squeeze(-1).float()


def flat(groups: list[Group]) -> list[tuple[list[int], bool]]:
    return [(c.tokens.tolist(), c.stopped) for group in groups for c in group.completions]


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("unprompted", [always(BOS), REVERSED], ids=["bos", "longer"])
@torch.no_grad()
def test_what_the_engine_writes_has_the_probability_that_two_dense_passes_give(
    unprompted: Unprompted, strength: float
) -> None:
    """Prompts and completions on both sides of the window (6)."""
    model = small_gemma()
    prompts = random_prompts(3, 11, 7, 1)
    groups = generate(Guided(model, strength, unprompted), prompts, SETTINGS, Key(1), 2)
    for group in groups:
        for found in group.completions:
            negative = unprompted(group.prompt)
            expected = dense(model, model, strength, group.prompt, negative, found.tokens)
            torch.testing.assert_close(found.logprob, expected, atol=1e-4, rtol=0)
            torch.testing.assert_close(found.model_logprob, expected, atol=1e-4, rtol=0)


def test_strength_one_is_the_model_itself_and_runs_it_alone() -> None:
    model, prompts = small_gemma(), random_prompts(3, 11)
    guided = generate(Guided(model, 1.0, always(BOS)), prompts, SETTINGS, Key(1))
    plain = generate(model, prompts, SETTINGS, Key(1))
    assert flat(guided) == flat(plain)
    for first, second in zip(guided, plain, strict=True):
        assert torch.equal(first.completions[0].logprob, second.completions[0].logprob)


def test_strength_zero_writes_what_the_other_prompts_would() -> None:
    model, prompts = small_gemma(), random_prompts(3, 9)
    guided = generate(Guided(model, 0.0, REVERSED), prompts, SETTINGS, Key(1), 3)
    others = generate(model, [REVERSED(prompt) for prompt in prompts], SETTINGS, Key(1), 3)
    assert flat(guided) == flat(others)


def test_neighbours_and_rows_at_a_time_change_nothing() -> None:
    guided = Guided(small_gemma(), 2.0, REVERSED)
    prompts = random_prompts(3, 11, 7)
    together = generate(guided, prompts, SETTINGS, Key(1), 3)
    apart = [
        generate(guided, [prompt], SETTINGS, Key(1), 3, indices=[index], rows=1)[0]
        for index, prompt in enumerate(prompts)
    ]
    assert flat(together) == flat(apart)


@torch.no_grad()
def test_as_a_policy_it_scores_its_own_samples_alike() -> None:
    model = small_gemma()
    other = small_gemma(replace(CONFIG, final_cap=2.0))
    guided = Guided(model, 2.5, REVERSED, unconditional=other)
    settings = replace(SETTINGS, temperature=0.7, top_k=20)
    groups = generate(guided, random_prompts(3, 11, 7), settings, Key(1), 2)
    under_model = score(guided, groups)
    under_drawn = score(guided, groups, temperature=0.7, top_k=20)
    for group, model_logprob, logprob in zip(groups, under_model, under_drawn, strict=True):
        for place, found in enumerate(group.completions):
            torch.testing.assert_close(found.model_logprob, model_logprob[place], atol=1e-4, rtol=0)
            torch.testing.assert_close(found.logprob, logprob[place], atol=1e-4, rtol=0)
            expected = dense(model, other, 2.5, group.prompt, REVERSED(group.prompt), found.tokens)
            torch.testing.assert_close(found.model_logprob, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("strength", [1.0, 2.0])
def test_with_a_draft_the_guided_law_is_written_all_the_same(strength: float) -> None:
    """What a draft proposes is read by both streams, and taken back from both."""
    model, draft = small_gemma(), small_gemma(replace(CONFIG, final_cap=3.0))
    guided = Guided(model, strength, REVERSED)
    settings = replace(SETTINGS, temperature=0.0)
    prompts = random_prompts(3, 11, 7)
    found = generate(guided, prompts, settings, Key(1), 1, draft=draft, ahead=3)
    assert flat(found) == flat(generate(guided, prompts, settings, Key(1)))
    drawn = generate(guided, prompts, SETTINGS, Key(1), 2, draft=draft, ahead=3)
    for group, scores in zip(drawn, score(guided, drawn), strict=True):
        for completion, expected in zip(group.completions, scores, strict=True):
            torch.testing.assert_close(completion.model_logprob, expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_models_of_other_makers_are_guided_alike() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=CONFIG.vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64,
    )  # fmt: skip
    model = ForeignModel(transformers.LlamaForCausalLM(config).eval())
    guided = Guided(model, 3.0, REVERSED)
    groups = generate(guided, random_prompts(3, 11, 7), SETTINGS, Key(1), 2)
    for group in groups:
        negative = REVERSED(group.prompt)
        for found in group.completions:
            expected = dense(model, model, 3.0, group.prompt, negative, found.tokens)
            torch.testing.assert_close(found.logprob, expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_packed_documents_and_padding_are_guided_each_by_its_own_prompt() -> None:
    model = small_gemma()
    first, second, third = random_prompts(9, 7, 12)
    alone = TokenBatch.of([third], masks=[[False] * 4 + [True] * 8], left=True)
    packed = TokenBatch(
        tokens=torch.cat([first, second])[None],
        positions=torch.cat([torch.arange(9), torch.arange(7)])[None],
        documents=torch.tensor([[0] * 9 + [1] * 7]),
        targets=torch.cat([first[1:], first[:1], second[1:], second[:1]])[None],
        mask=torch.tensor(
            [[False] * 2 + [True] * 6 + [False] + [False] * 4 + [True] * 2 + [False]]
        ),
    )
    guided = Guided(model, 3.0, always(torch.tensor([2, 5, 8])))
    rows = packed.mask.flatten().nonzero().flatten()
    logits = guided(packed).logits(rows).log_softmax(-1)
    found = logits.gather(-1, packed.targets.flatten()[rows, None]).squeeze(-1)
    negative = torch.tensor([2, 5, 8])
    expected = torch.cat(
        [
            dense(model, model, 3.0, first[:3], negative, first[3:]),
            dense(model, model, 3.0, second[:5], negative, second[5:]),
        ]
    )
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    rows = alone.mask.flatten().nonzero().flatten()
    logits = guided(alone).logits(rows).log_softmax(-1)
    found = logits.gather(-1, alone.targets.flatten()[rows, None]).squeeze(-1)
    expected = dense(model, model, 3.0, third[:4], negative, third[4:])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def step(tokens: list[int], positions: list[int], held: list[bool] | None = None) -> TokenBatch:
    column = torch.tensor(tokens)[:, None]
    documents = torch.zeros_like(column)
    if held is not None:
        documents = torch.where(torch.tensor(held)[:, None], 0, -1)
    return TokenBatch(
        tokens=column,
        positions=torch.tensor(positions)[:, None],
        documents=documents,
        targets=column,
        mask=torch.zeros_like(column).bool(),
    )


@torch.no_grad()
def test_a_prompt_read_in_pieces_and_a_row_that_begins_again_are_guided_alike() -> None:
    model = small_gemma()
    guided = Guided(model, 2.0, REVERSED)
    one, two, new = random_prompts(8, 5, 3)
    cache = guided.new_cache(2, 20)
    guided(TokenBatch.of([one[:5], two[:2]]), cache)
    after = guided(TokenBatch(**continued(one, two)), cache)
    logits = after.logits(torch.tensor([2, 5]))

    def following(prompt: Tensor, *written: int) -> Tensor:
        """The whole law of the next token, by two dense passes."""
        text = torch.tensor(written, dtype=torch.int64)
        laws = [
            model(TokenBatch.of([torch.cat([start, text])])).logits(slice(-1, None))[0]
            for start in (prompt, REVERSED(prompt))
        ]
        return (2.0 * laws[0] - laws[1]).log_softmax(-1)

    torch.testing.assert_close(logits.log_softmax(-1)[0], following(one), atol=1e-4, rtol=0)
    torch.testing.assert_close(logits.log_softmax(-1)[1], following(two), atol=1e-4, rtol=0)
    # Row 0 goes on, row 1 leaves and another prompt takes its place.
    guided(step([4, 0], [8, 0], [True, False]), cache)
    begun = guided(TokenBatch(**mixed(new)), cache)
    logits = begun.logits(torch.tensor([0, 5]))
    torch.testing.assert_close(logits.log_softmax(-1)[0], following(one, 4, 6), atol=1e-4, rtol=0)
    torch.testing.assert_close(logits.log_softmax(-1)[1], following(new), atol=1e-4, rtol=0)
    torch.testing.assert_close(begun.logits(torch.tensor([5])), logits[1:])


def continued(one: Tensor, two: Tensor) -> dict[str, Tensor]:
    """The last three tokens of two prompts, of 8 and of 5."""
    tokens = torch.stack([one[5:], two[2:]])
    positions = torch.tensor([[5, 6, 7], [2, 3, 4]])
    zeros = torch.zeros_like(tokens)
    return {
        "tokens": tokens,
        "positions": positions,
        "documents": zeros,
        "targets": zeros,
        "mask": zeros.bool(),
    }


def mixed(new: Tensor) -> dict[str, Tensor]:
    """One more token of row 0, whose row is padded, beside a new prompt of three in row 1."""
    tokens = torch.stack([torch.tensor([6, 0, 0]), new])
    zeros = torch.zeros_like(tokens)
    return {
        "tokens": tokens,
        "positions": torch.tensor([[9, 0, 0], [0, 1, 2]]),
        "documents": torch.tensor([[0, -1, -1], [0, 0, 0]]),
        "targets": zeros,
        "mask": zeros.bool(),
    }


@torch.no_grad()
def test_samples_may_share_a_prompt_before_the_other_stream_has_begun() -> None:
    guided = Guided(small_gemma(), 2.0, always(BOS))
    (prompt,) = random_prompts(5)
    cache = guided.new_cache(1, 20)
    guided(TokenBatch.of([prompt[:4]]), cache)
    cache = cache.select(torch.tensor([0, 0, 0]))
    last = guided(step([int(prompt[4])] * 3, [4] * 3), cache).logits(slice(None))
    whole = guided(TokenBatch.of([prompt]), guided.new_cache(1, 20)).logits(torch.tensor([4]))
    torch.testing.assert_close(last, whole.expand(3, -1), atol=1e-5, rtol=0)


@torch.no_grad()
def test_predictions_that_have_no_meaning_are_refused() -> None:
    guided = Guided(small_gemma(), 2.0, always(BOS))
    (prompt,) = random_prompts(6)
    with pytest.raises(DataError, match="within a prompt"):
        guided(TokenBatch.of([prompt], masks=[[False] * 4 + [True] * 2])).logits(slice(None))
    with pytest.raises(DataError, match="within a prompt"):
        guided(TokenBatch.of([prompt], masks=[[False] * 6])).logits(slice(0, 1))
    cache = guided.new_cache(1, 20)
    prediction = guided(TokenBatch.of([prompt]), cache)
    with pytest.raises(DataError, match="last token"):
        prediction.logits(torch.tensor([3]))
    guided(step([4], [6]), cache)
    with pytest.raises(DataError, match="has read on"):
        prediction.logits(torch.tensor([5]))


def test_other_prompts_that_do_not_fit_are_refused() -> None:
    model = small_gemma()
    with pytest.raises(ConfigError, match="at least 0"):
        Guided(model, -1.0, always(BOS))
    with pytest.raises(ConfigError, match="at least one"):
        always(BOS[:0])
    growing = Unprompted(of=lambda prompt: prompt, longest=4)
    with pytest.raises(DataError, match="1 to 4 tokens"):
        generate(Guided(model, 2.0, growing), random_prompts(5), SETTINGS, Key(0))


def test_both_streams_stay_within_their_contexts() -> None:
    model = small_gemma(replace(CONFIG, context=20))
    assert Guided(model, 2.0, always(BOS)).context == 20
    long = Guided(model, 2.0, Unprompted(of=lambda prompt: prompt.repeat(3), longest=15))
    prompts = random_prompts(5)
    (group,) = generate(long, prompts, Settings(max_new_tokens=50), Key(0))
    assert 15 + len(group.completions[0].tokens) <= 20
    with pytest.raises(DataError, match="context"):
        generate(long, random_prompts(6), SETTINGS, Key(0))


def test_the_combination_by_hand() -> None:
    conditional = torch.tensor([[0.6, 0.3, 0.1]]).log() + 3.0
    unconditional = torch.tensor([[0.2, 0.5, 0.3]]).log() - 1.0
    weights = torch.tensor([0.6**3 / 0.2**2, 0.3**3 / 0.5**2, 0.1**3 / 0.3**2])
    found = guided_logits(conditional, unconditional, 3.0).exp()
    torch.testing.assert_close(found, (weights / weights.sum())[None])
    # What the prompt excludes stays excluded, however the other stream feels about it.
    barred = torch.tensor([[0.0, -torch.inf, 1.0]])
    for other in (unconditional, torch.tensor([[0.0, -torch.inf, 0.0]])):
        found = guided_logits(barred, other, 2.0)
        assert found[0, 1] == -torch.inf
        assert float(found.exp().sum()) == pytest.approx(1.0)


@torch.no_grad()
def test_soft_caps_are_inside_each_stream() -> None:
    """Guided logits leave the cap's range; a cap around the combination would not let them."""
    model = small_gemma()
    batch = TokenBatch.of(random_prompts(9))
    prediction = model(batch)
    assert isinstance(prediction, LinearPrediction)
    assert prediction.cap == 5.0
    logits = Guided(model, 9.0, always(torch.tensor([4, 5])))(batch).logits(slice(None))
    assert float(logits.amax() - logits.amin()) > 10.0


def test_streams_that_cannot_be_combined_are_refused() -> None:
    other = small_gemma(replace(CONFIG, vocab_size=CONFIG.vocab_size + 9))
    bos = torch.tensor([3])
    guided = Guided(small_gemma(), 2.0, always(bos), unconditional=other)
    with pytest.raises(DataError, match="vocabulary of 61 tokens, the other one of 70"):
        generate(guided, [torch.tensor([4, 5])], Settings(max_new_tokens=3), Key(0))
    with pytest.raises(ConfigError, match="other prompt has up to 64 tokens"):
        Guided(small_gemma(), 2.0, always(torch.full((64,), 3)))


def test_an_other_prompt_that_cannot_be_made_stops_the_reading_and_nothing_else() -> None:
    def mistaken(prompt: torch.Tensor) -> torch.Tensor:
        if len(prompt) == 3:
            raise ValueError("a mistake of the caller")
        return prompt[:1]

    guided = Guided(small_gemma(), 2.0, Unprompted(of=mistaken, longest=1))
    settings, prompts = Settings(max_new_tokens=4), [torch.tensor([4, 5]), torch.tensor([4, 5, 6])]
    engine = Engine(guided)
    good, bad = (
        engine.add(prompt, settings, Key(0), index=index)[0] for index, prompt in enumerate(prompts)
    )
    for _ in range(2):
        with pytest.raises(ValueError, match="a mistake of the caller"):
            engine.step()
    engine.cancel(bad)
    while not engine.idle:
        engine.step()
    (whole,) = generate(guided, prompts[:1], settings, Key(0))
    assert good.tokens == whole.completions[0].tokens.tolist()
