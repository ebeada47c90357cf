"""What is written depends on the key alone, and is what the model says."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_gemma import CONFIG, random_prompts, small_gemma, small_llama
from torch import Tensor

from cabochon.core import Cache, Completion, Group, Key, Prediction, TokenBatch
from cabochon.core.errors import ConfigError, DataError, NonFinite
from cabochon.generation.engine import Settings, generate, sampler, stream
from cabochon.generation.sample import sampled_from
from cabochon.models.foreign import ForeignModel
from cabochon.models.gemma.convert import write_gemma
from cabochon.models.gemma.decoder import Gemma

LENGTHS = (5, 1, 17, 9, 3)
CUT = Settings(max_new_tokens=24, temperature=0.8, top_k=20, top_p=0.9)
# Products of other row counts round differently; over 40 steps of 3 layers this is ample.
ROUNDING = 1e-5


def assert_same(first: Completion, second: Completion) -> None:
    assert first.tokens.tolist() == second.tokens.tolist()
    assert first.stopped == second.stopped
    torch.testing.assert_close(first.logprob, second.logprob, atol=ROUNDING, rtol=0)
    torch.testing.assert_close(first.model_logprob, second.model_logprob, atol=ROUNDING, rtol=0)


def full_logits(model: Gemma | ForeignModel, prompt: Tensor, written: Tensor) -> Tensor:
    """The logits that each written token was to be drawn from, by one pass without a cache."""
    tokens = torch.cat([prompt, written])
    with torch.no_grad():
        return model(TokenBatch.of([tokens])).logits(slice(len(prompt) - 1, len(tokens) - 1))


# --- the key decides, and nothing else ---


def test_a_prompt_gets_the_same_completion_alone_as_among_unequal_neighbours():
    model, prompts = small_gemma(), random_prompts(*LENGTHS)
    together = generate(model, prompts, CUT, Key(1))
    for index, prompt in enumerate(prompts):
        (alone,) = generate(model, [prompt], CUT, Key(1), indices=[index])
        assert_same(alone.completions[0], together[index].completions[0])


def test_reordering_the_prompts_reorders_the_completions():
    model, prompts = small_gemma(), random_prompts(*LENGTHS)
    straight = generate(model, prompts, CUT, Key(2), 2)
    order = [3, 0, 4, 2, 1]
    shuffled = generate(model, [prompts[i] for i in order], CUT, Key(2), 2, indices=order)
    for place, index in enumerate(order):
        assert shuffled[place].prompt is prompts[index]
        for one, other in zip(
            shuffled[place].completions, straight[index].completions, strict=True
        ):
            assert_same(one, other)


@pytest.mark.parametrize("rows", [1, 2, 4, 7])
def test_how_many_are_written_at_a_time_changes_nothing(rows):
    model, prompts = small_gemma(), random_prompts(*LENGTHS)
    settings = replace(CUT, stop_ids=(7, 8, 9, 10, 11, 12))
    whole = generate(model, prompts, settings, Key(3), 3)
    parts = generate(model, prompts, settings, Key(3), 3, rows=rows)
    for group, other in zip(whole, parts, strict=True):
        assert len(group.completions) == 3
        for one, another in zip(group.completions, other.completions, strict=True):
            assert_same(one, another)


def test_more_samples_leave_the_first_ones_as_they_are_and_differ_from_them():
    model, prompts = small_gemma(), random_prompts(4, 6)
    few, many = (generate(model, prompts, CUT, Key(4), samples) for samples in (2, 5))
    for group, larger in zip(few, many, strict=True):
        for one, other in zip(group.completions, larger.completions, strict=False):
            assert_same(one, other)
        assert len({tuple(c.tokens.tolist()) for c in larger.completions}) == 5


def test_asking_for_more_tokens_goes_on_where_fewer_ended():
    model, prompts = small_gemma(), random_prompts(*LENGTHS)
    short = generate(model, prompts, replace(CUT, max_new_tokens=7), Key(5))
    for group, longer in zip(short, generate(model, prompts, CUT, Key(5)), strict=True):
        begun = longer.completions[0].tokens[:7]
        assert group.completions[0].tokens.tolist() == begun.tolist()


def test_another_key_writes_something_else_and_the_same_key_the_same():
    model, prompts = small_gemma(), random_prompts(8)
    first, again, other = (generate(model, prompts, CUT, key) for key in (Key(6), Key(6), Key(7)))
    assert_same(first[0].completions[0], again[0].completions[0])
    assert first[0].completions[0].tokens.tolist() != other[0].completions[0].tokens.tolist()


def test_a_sampler_is_generate_with_its_settings():
    model, prompts = small_gemma(), random_prompts(3, 8)
    sample = sampler(model, CUT, 2)
    for group, other in zip(
        sample(prompts, Key(8)), generate(model, prompts, CUT, Key(8), 2), strict=True
    ):
        for one, another in zip(group.completions, other.completions, strict=True):
            assert_same(one, another)


# --- what is written is what the model says ---


@pytest.mark.parametrize(
    "settings",
    [Settings(max_new_tokens=40), replace(CUT, max_new_tokens=40), replace(CUT, temperature=0.0)],
)
def test_log_probabilities_are_those_of_a_full_pass_over_prompt_and_completion(settings):
    model, prompts = small_gemma(), random_prompts(*LENGTHS)  # the window is 6: far beyond it
    for group in generate(model, prompts, settings, Key(9), 2):
        for completion in group.completions:
            logits = full_logits(model, group.prompt, completion.tokens)
            chosen = completion.tokens.unsqueeze(1)
            whole = logits.log_softmax(-1).gather(1, chosen).squeeze(1)
            torch.testing.assert_close(completion.model_logprob, whole, atol=ROUNDING, rtol=0)
            if settings.temperature == 0.0:
                assert torch.equal(completion.logprob, completion.model_logprob)
                assert completion.tokens.tolist() == logits.argmax(-1).tolist()
                continue
            cut = sampled_from(
                logits,
                temperature=settings.temperature,
                top_k=settings.top_k,
                top_p=settings.top_p,
            )
            expected = cut.gather(1, chosen).squeeze(1)
            torch.testing.assert_close(completion.logprob, expected, atol=ROUNDING, rtol=0)


def test_pairs_of_tokens_come_as_often_as_the_model_says():
    config = replace(CONFIG, vocab_size=5)
    model, prompt, count = small_gemma(config), torch.tensor([2, 4, 3]), 20_000
    (group,) = generate(model, [prompt], Settings(max_new_tokens=2), Key(10), count, rows=count)
    pairs = torch.stack([completion.tokens for completion in group.completions])
    first = full_logits(model, prompt, torch.tensor([0])).softmax(-1)[0]
    probability = torch.cat([
        first[token] * full_logits(model, prompt, torch.tensor([token, 0])).softmax(-1)[1]
        for token in range(5)
    ]).double()  # fmt: skip
    seen = torch.bincount(pairs[:, 0] * 5 + pairs[:, 1], minlength=25)
    statistic = ((seen - count * probability) ** 2 / (count * probability)).sum().item()
    # P(chi2 > f + 2 sqrt(f x) + 2 x) <= exp(-x), Laurent and Massart 2000; x = 14: 8e-7.
    assert statistic < 24 + 2 * math.sqrt(24 * 14) + 2 * 14


def test_greedy_writes_what_transformers_writes_also_beyond_the_window(tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    model, prompts = small_gemma(), random_prompts(4, 11)
    write_gemma(model, tmp_path)
    peer = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    )
    groups = generate(model, prompts, Settings(max_new_tokens=45, temperature=0.0), Key(0))
    for group in groups:
        expected = peer.generate(
            group.prompt[None],
            attention_mask=torch.ones_like(group.prompt[None]),
            generation_config=transformers.GenerationConfig(
                max_new_tokens=45, do_sample=False, eos_token_id=None, pad_token_id=0
            ),
        )[0, len(group.prompt) :]
        assert group.completions[0].tokens.tolist() == expected.tolist()


def test_a_model_of_transformers_is_sampled_from_as_our_own_is():
    inner = small_llama(30, attention_dropout=0.5)
    model, prompts = ForeignModel(inner.train()), random_prompts(5, 1, 12)
    settings = Settings(max_new_tokens=40, stop_ids=(4, 5, 6))
    groups = generate(model, prompts, settings, Key(13), 3)
    assert inner.training
    assert all(module.training for module in inner.modules())
    inner.eval()
    for group in groups:
        for completion in group.completions:
            assert completion.stopped or len(completion.tokens) == 30 - len(group.prompt)
            whole = full_logits(model, group.prompt, completion.tokens).log_softmax(-1)
            expected = whole.gather(1, completion.tokens.unsqueeze(1)).squeeze(1)
            torch.testing.assert_close(completion.model_logprob, expected, atol=ROUNDING, rtol=0)


def test_bfloat16_samples_agree_with_a_full_pass_within_its_rounding():
    model, prompts = small_gemma(dtype=torch.bfloat16), random_prompts(9, 4)
    for group in generate(model, prompts, Settings(max_new_tokens=30), Key(14), 2):
        for completion in group.completions:
            logits = full_logits(model, group.prompt, completion.tokens)
            whole = logits.log_softmax(-1).gather(1, completion.tokens.unsqueeze(1)).squeeze(1)
            # 8 bits of mantissa, logits below 5, three layers: a few times 5 / 256.
            assert (completion.model_logprob - whole).abs().max() < 0.15


# --- where a completion ends ---


def test_a_stop_token_ends_a_completion_and_is_its_last_token():
    model, prompts = small_gemma(), random_prompts(*LENGTHS)
    free = generate(model, prompts, CUT, Key(15), 4)
    stops = (20, 30, 40, 50, 21, 31, 41, 51)
    ended = 0
    for group, other in zip(
        generate(model, prompts, replace(CUT, stop_ids=stops), Key(15), 4), free, strict=True
    ):
        for stopped, unstopped in zip(group.completions, other.completions, strict=True):
            tokens = unstopped.tokens.tolist()
            places = [place for place, token in enumerate(tokens) if token in stops]
            assert stopped.stopped == bool(places)
            length = places[0] + 1 if places else len(tokens)
            assert stopped.tokens.tolist() == tokens[:length]
            assert stopped.logprob.shape == stopped.model_logprob.shape == (length,)
            ended += bool(places)
    assert 0 < ended < 20  # both ends were really seen


def test_a_completion_ends_where_the_context_does():
    model = small_gemma()
    settings = Settings(max_new_tokens=1000)
    full, nearly = generate(model, random_prompts(CONFIG.context - 1, 50), settings, Key(16))
    assert len(full.completions[0].tokens) == 1
    assert len(nearly.completions[0].tokens) == CONFIG.context - 50
    assert not full.completions[0].stopped


def test_no_prompts_give_no_groups():
    assert generate(small_gemma(), [], CUT, Key(0)) == []


# --- streaming ---


def test_a_stream_gives_the_tokens_of_generate_one_by_one():
    model, prompts = small_gemma(), random_prompts(4, 6)
    settings = replace(CUT, stop_ids=(20, 30))
    groups = generate(model, prompts, settings, Key(17))
    for index, prompt in enumerate(prompts):
        tokens = list(stream(model, prompt, settings, Key(17), index=index))
        expected = groups[index].completions[0]
        assert [token.id for token in tokens] == expected.tokens.tolist()
        torch.testing.assert_close(
            torch.tensor([token.logprob for token in tokens]), expected.logprob, atol=1e-5, rtol=0
        )


def test_between_the_tokens_of_a_stream_the_model_can_be_trained_and_the_stream_be_left():
    model = small_gemma().train()
    tokens = stream(model, random_prompts(6)[0], CUT, Key(18))
    next(tokens)
    assert model.training
    assert not torch.is_inference_mode_enabled()
    model(TokenBatch.of(random_prompts(7))).logits(slice(None)).sum().backward()
    assert model.embedding.grad is not None
    next(tokens)
    tokens.close()
    assert model.training


# --- the model it came from ---


def test_the_model_is_left_as_it_was_and_the_results_can_be_differentiated_through():
    model = small_gemma().train()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    (group,) = generate(model, random_prompts(5), CUT, Key(19))
    assert model.training
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    completion = group.completions[0]
    batch = TokenBatch.of([torch.cat([group.prompt, completion.tokens])])
    logits = model(batch).logits(slice(4, 4 + len(completion.tokens)))
    logprob = logits.log_softmax(-1).gather(1, completion.tokens.unsqueeze(1)).squeeze(1)
    ((logprob - completion.logprob).exp() * completion.model_logprob).sum().backward()
    assert model.embedding.grad.isfinite().all()


def test_an_update_of_the_weights_is_seen_at_once():
    model, prompts = small_gemma(), random_prompts(6)
    first = generate(model, prompts, CUT, Key(20))[0].completions[0]
    with torch.no_grad():
        model.final_norm.mul_(-1.0)
    second = generate(model, prompts, CUT, Key(20))[0].completions[0]
    model.final_norm.data.mul_(-1.0)  # through .data, which no version counter sees
    third = generate(model, prompts, CUT, Key(20))[0].completions[0]
    assert first.tokens.tolist() != second.tokens.tolist()
    assert_same(first, third)


class Counting:
    """A backbone that is no module, and counts the tokens that it reads."""

    def __init__(self, inner: Gemma) -> None:
        self.inner = inner
        self.read = 0

    @property
    def context(self) -> int:
        return self.inner.context

    def __call__(self, batch: TokenBatch, cache: Cache | None = None) -> Prediction:
        self.read += int((batch.documents >= 0).sum())
        return self.inner(batch, cache)

    def new_cache(self, rows: int, capacity: int, ahead: int = 0) -> Cache:
        return self.inner.new_cache(rows, capacity, ahead)


def test_a_prompt_is_read_once_for_all_its_samples_and_the_last_token_never():
    model = Counting(small_gemma())
    generate(model, random_prompts(10, 20), Settings(max_new_tokens=4), Key(21), 5)
    assert model.read == 10 + 20 + 2 * 5 * (4 - 1)


# --- bad input ---


def test_an_empty_or_misshapen_prompt_is_refused_by_its_index():
    model, (good,) = small_gemma(), random_prompts(3)
    for bad in (torch.tensor([], dtype=torch.int64), good[None], torch.tensor(3)):
        with pytest.raises(DataError, match="prompt 1 has shape"):
            generate(model, [good, bad], CUT, Key(0))


def test_a_prompt_that_leaves_no_room_in_the_context_is_refused_before_anything_is_written():
    with pytest.raises(DataError, match=r"prompt 0 has 64 tokens, the model's context is 64"):
        generate(small_gemma(), random_prompts(64, 2), CUT, Key(0))
    with pytest.raises(DataError, match="prompt 0"):
        next(stream(small_gemma(), random_prompts(70)[0], CUT, Key(0)))


def test_nan_logits_are_refused_with_the_sequence_and_the_place():
    model = small_gemma()
    with torch.no_grad():
        model.embedding[5] = torch.nan
    with pytest.raises(NonFinite, match="prompt 0, sample 0, token 0"):
        generate(model, [torch.tensor([5, 6])], CUT, Key(0))


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -0.5}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"stop_ids": (3, -1)}, "stop_ids"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(wrong, word):
    with pytest.raises(ConfigError, match=word):
        Settings(**wrong)


def test_no_samples_and_too_few_indices_are_refused():
    model, prompts = small_gemma(), random_prompts(3, 4)
    with pytest.raises(ConfigError, match="samples"):
        generate(model, prompts, CUT, Key(0), 0)
    with pytest.raises(ConfigError, match="1 indices for 2 prompts"):
        generate(model, prompts, CUT, Key(0), indices=[1])


def test_a_group_belongs_to_its_prompt():
    prompts = random_prompts(3, 9, 2)
    groups: list[Group] = generate(small_gemma(), prompts, CUT, Key(22), 2)
    assert [group.prompt for group in groups] == prompts
