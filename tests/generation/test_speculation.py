"""A draft changes how fast tokens come, and not which distribution they come from."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from small_gemma import CONFIG, random_prompts, small_gemma, small_llama
from torch import Tensor

from cabochon.core import Backbone, Cache, Key, Prediction, TokenBatch
from cabochon.generation.engine import Engine, Settings, generate, stream
from cabochon.generation.guidance import Guided, always
from cabochon.generation.sample import sampled_from
from cabochon.models.foreign import ForeignModel
from cabochon.models.gemma.decoder import Gemma

LENGTHS = (5, 1, 17, 9)
CUT = Settings(max_new_tokens=24, temperature=0.8, top_k=20, top_p=0.9)


def a_draft(vocab_size: int = CONFIG.vocab_size, window: int = 3) -> Gemma:
    """Another model: one layer, another window, other weights."""
    config = replace(CONFIG, layers=1, vocab_size=vocab_size, window=window)
    return Gemma.init(config, Key(77))


class Counted:
    """A backbone that counts how often it is called with new tokens."""

    def __init__(self, inner: Backbone) -> None:
        self.inner = inner
        self.calls = 0

    @property
    def context(self) -> int:
        return self.inner.context

    def __call__(self, batch: TokenBatch, cache: Cache | None = None) -> Prediction:
        self.calls += 1
        return self.inner(batch, cache)

    def new_cache(self, rows: int, capacity: int, ahead: int = 0) -> Cache:
        return self.inner.new_cache(rows, capacity, ahead)


def nucleus(logits: Tensor, settings: Settings) -> Tensor:
    temperature, top_k, top_p = settings.distribution
    return sampled_from(logits, temperature=temperature, top_k=top_k, top_p=top_p)


@pytest.mark.parametrize("ahead", [1, 2, 3])
@pytest.mark.parametrize("cut", [{}, {"temperature": 0.6, "top_k": 4}])
def test_triples_of_tokens_come_as_often_as_the_large_model_says(
    ahead: int, cut: dict[str, float]
) -> None:
    config = replace(CONFIG, vocab_size=5)
    model, prompt, count = small_gemma(config), torch.tensor([2, 4, 3]), 8_000
    settings = Settings(max_new_tokens=3, **cut)
    draft = a_draft(5)
    (group,) = generate(
        model, [prompt], settings, Key(1), count, rows=count, draft=draft, ahead=ahead
    )
    seen = torch.stack([completion.tokens for completion in group.completions])
    # The exact law, by a full pass over every triple.
    triples = torch.cartesian_prod(*[torch.arange(5)] * 3)
    with torch.no_grad():
        batch = TokenBatch.of([torch.cat([prompt, triple]) for triple in triples])
        logits = model(batch).logits(slice(None)).view(len(triples), 6, 5)[:, 2:5]
    law = nucleus(logits.flatten(0, 1), settings).view_as(logits)
    probability = law.gather(2, triples.unsqueeze(2)).sum((1, 2)).double().exp()
    assert probability.sum().item() == pytest.approx(1.0, abs=1e-5)
    times = torch.bincount(seen @ torch.tensor([25, 5, 1]), minlength=125)
    assert times[probability == 0].sum() == 0
    # Rare triples together, so that every cell is expected at least ten times.
    order = probability.argsort()
    rare = order[(probability[order].cumsum(0) * count) < 10 * (probability > 0).sum().item()]
    common = torch.ones(125, dtype=torch.bool)
    common[rare] = False
    cells = [(times[common].double(), probability[common])]
    observed = torch.cat([cells[0][0], times[~common].sum().double()[None]])
    expected = torch.cat([cells[0][1], probability[~common].sum()[None]]) * count
    keep = expected > 0
    statistic = ((observed - expected)[keep] ** 2 / expected[keep]).sum().item()
    degrees = int(keep.sum()) - 1
    # P(chi2 > f + 2 sqrt(f x) + 2 x) <= exp(-x), Laurent and Massart 2000; x = 14: 8e-7.
    assert degrees >= 8
    assert statistic < degrees + 2 * math.sqrt(degrees * 14) + 2 * 14


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("ahead", [1, 4, 9])
def test_greedy_writes_what_it_writes_without_a_draft(slots: int, ahead: int) -> None:
    model, prompts = small_gemma(), random_prompts(*LENGTHS)
    greedy = Settings(max_new_tokens=40, temperature=0.0, stop_ids=(7, 9))
    plain = generate(model, prompts, greedy, Key(2))
    fast = generate(model, prompts, greedy, Key(2), rows=slots, draft=a_draft(), ahead=ahead)
    for one, other in zip(plain, fast, strict=True):
        assert one.completions[0].tokens.tolist() == other.completions[0].tokens.tolist()
        assert one.completions[0].stopped == other.completions[0].stopped
        for name in ("logprob", "model_logprob"):
            expected = getattr(one.completions[0], name)
            got = getattr(other.completions[0], name)
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("window", [1, 6, 64])
def test_log_probabilities_are_those_of_a_full_pass(window: int) -> None:
    model = small_gemma(replace(CONFIG, window=window))
    for group in generate(model, random_prompts(*LENGTHS), CUT, Key(3), 3, draft=a_draft(), rows=5):
        for completion in group.completions:
            text = torch.cat([group.prompt, completion.tokens])
            start = len(group.prompt) - 1
            logits = model(TokenBatch.of([text])).logits(slice(start, len(text) - 1)).detach()
            chosen = completion.tokens.unsqueeze(1)
            whole = logits.log_softmax(-1).gather(1, chosen).squeeze(1)
            torch.testing.assert_close(completion.model_logprob, whole, atol=1e-5, rtol=0)
            drawn = nucleus(logits, CUT).gather(1, chosen).squeeze(1)
            torch.testing.assert_close(completion.logprob, drawn, atol=1e-5, rtol=0)


def test_a_sequence_depends_on_no_neighbour_slot_or_order() -> None:
    model, prompts, draft = small_gemma(), random_prompts(*LENGTHS), a_draft()
    together = generate(model, prompts, CUT, Key(4), 3, rows=5, draft=draft)
    for index, prompt in enumerate(prompts):
        (apart,) = generate(model, [prompt], CUT, Key(4), 3, indices=[index], rows=1, draft=draft)
        for one, other in zip(apart.completions, together[index].completions, strict=True):
            assert one.tokens.tolist() == other.tokens.tolist()


def test_a_draft_that_is_the_model_itself_is_never_refused() -> None:
    model = Counted(small_gemma())
    (prompt,) = random_prompts(6)
    (group,) = generate(
        model, [prompt], Settings(max_new_tokens=26), Key(5), draft=small_gemma(), ahead=4
    )
    assert len(group.completions[0].tokens) == 26
    # One token after the prompt, then five a reading: four proposals and one more.
    assert model.calls == 1 + 25 // 5


def test_a_draft_of_transformers_and_a_guided_model_can_be_combined() -> None:
    inner = small_llama(80, num_hidden_layers=1)
    guided = Guided(small_gemma(), 1.7, always(torch.tensor([2])))
    prompts, greedy = random_prompts(*LENGTHS), Settings(max_new_tokens=20, temperature=0.0)
    plain = generate(guided, prompts, greedy, Key(6), rows=2)
    fast = generate(guided, prompts, greedy, Key(6), rows=2, draft=ForeignModel(inner.eval()))
    for one, other in zip(plain, fast, strict=True):
        assert one.completions[0].tokens.tolist() == other.completions[0].tokens.tolist()


def test_a_stream_gives_several_tokens_at_once_and_the_same_ones() -> None:
    model, (prompt,) = small_gemma(), random_prompts(6)
    tokens = [token.id for token in stream(model, prompt, CUT, Key(7), draft=a_draft())]
    (group,) = generate(model, [prompt], CUT, Key(7), draft=a_draft())
    assert tokens == group.completions[0].tokens.tolist()


def test_a_broken_draft_only_costs_time() -> None:
    model, draft = small_gemma(), a_draft()
    with torch.no_grad():
        draft.final_norm.fill_(torch.nan)
    greedy = Settings(max_new_tokens=12, temperature=0.0)
    plain = generate(model, random_prompts(6), greedy, Key(8))
    fast = generate(model, random_prompts(6), greedy, Key(8), draft=draft)
    assert plain[0].completions[0].tokens.tolist() == fast[0].completions[0].tokens.tolist()


def test_room_ends_with_the_shorter_of_the_two_contexts() -> None:
    draft = a_draft()
    draft.config = replace(draft.config, context=20)
    (prompt,) = random_prompts(12)
    engine = Engine(small_gemma(), draft=draft)
    (writing,) = engine.add(prompt, CUT, Key(9))
    while not writing.finished:
        engine.step()
    assert len(writing.tokens) == 8
