"""Slots that never wait: prompts come and go, and nothing that is written depends on it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_gemma import CONFIG, random_prompts, small_gemma, small_llama
from torch import Tensor

from cabochon.core import Backbone, Cache, Completion, Group, Key, Prediction, TokenBatch
from cabochon.core.errors import ConfigError, DataError, NonFinite
from cabochon.generation.engine import Engine, Settings, Writing, generate, stream
from cabochon.models.foreign import ForeignModel

LENGTHS = (5, 1, 17, 9, 3, 30, 2, 12)
PLAIN = Settings(max_new_tokens=20)
# Products of other row counts round differently; over 40 steps of 3 layers this is ample.
ROUNDING = 1e-5


def alone(
    model: Backbone, prompts: list[Tensor], settings: list[Settings], key: Key, samples: int
) -> list[Group]:
    """Each completion written by itself, in an engine of one slot."""
    return [
        generate(model, [prompt], how, key, samples, indices=[index], rows=1)[0]
        for index, (prompt, how) in enumerate(zip(prompts, settings, strict=True))
    ]


def assert_same(one: Completion, other: Completion, rounding: float = ROUNDING) -> None:
    assert one.tokens.tolist() == other.tokens.tolist()
    assert one.stopped == other.stopped
    torch.testing.assert_close(one.logprob, other.logprob, atol=rounding, rtol=0)
    torch.testing.assert_close(one.model_logprob, other.model_logprob, atol=rounding, rtol=0)


def assert_all_same(groups: list[Group], others: list[Group], rounding: float = ROUNDING) -> None:
    for group, other in zip(groups, others, strict=True):
        for one, another in zip(group.completions, other.completions, strict=True):
            assert_same(one, another, rounding)


def ragged(count: int) -> list[Settings]:
    """Prompts of one call that each want something else."""
    kinds = [
        Settings(max_new_tokens=3),
        Settings(max_new_tokens=25, temperature=0.7),
        Settings(max_new_tokens=11, temperature=0.0),
        Settings(max_new_tokens=1),
        Settings(max_new_tokens=18, top_k=5, stop_ids=(7, 9, 11, 30)),
        Settings(max_new_tokens=14, top_p=0.6, temperature=1.3),
    ]
    return [kinds[at % len(kinds)] for at in range(count)]


class Watched:
    """A backbone that is no module, and keeps what it was asked to read."""

    def __init__(self, inner: Backbone) -> None:
        self.inner = inner
        self.shapes: list[tuple[int, int]] = []
        self.read = 0

    @property
    def context(self) -> int:
        return self.inner.context

    def __call__(self, batch: TokenBatch, cache: Cache | None = None) -> Prediction:
        self.shapes.append(batch.shape)
        self.read += int((batch.documents >= 0).sum())
        return self.inner(batch, cache)

    def new_cache(self, rows: int, capacity: int, ahead: int = 0) -> Cache:
        return self.inner.new_cache(rows, capacity, ahead)


@pytest.mark.parametrize("slots", [1, 2, 3, 5, 24])
def test_each_prompt_has_its_own_settings_and_is_written_as_if_alone(slots: int) -> None:
    model, prompts = small_gemma(), random_prompts(*LENGTHS)
    settings = ragged(len(prompts))
    together = generate(model, prompts, settings, Key(1), 3, rows=slots)
    assert_all_same(together, alone(model, prompts, settings, Key(1), 3))
    lengths = [len(c.tokens) for group in together for c in group.completions]
    assert lengths[:3] == [3, 3, 3]
    assert lengths[9:12] == [1, 1, 1]


@pytest.mark.parametrize("prefill", [1, 4, 7, 30, 1000])
def test_how_prompts_are_cut_to_be_read_changes_nothing(prefill: int) -> None:
    model, prompts = small_gemma(), random_prompts(*LENGTHS)
    engine = Engine(model, slots=3, prefill=prefill)
    written = [
        engine.add(prompt, PLAIN, Key(2), index=index, samples=2)
        for index, prompt in enumerate(prompts)
    ]
    while not engine.idle:
        engine.step()
    expected = generate(model, prompts, PLAIN, Key(2), 2)
    for writings, group in zip(written, expected, strict=True):
        for writing, completion in zip(writings, group.completions, strict=True):
            assert_same(writing.completion(), completion)


def test_a_long_prompt_is_read_in_pieces_while_the_others_go_on() -> None:
    model = Watched(small_gemma())
    short, long = random_prompts(3, 40)
    engine = Engine(model, slots=2, prefill=8)
    (first,) = engine.add(short, PLAIN, Key(3))
    engine.step()
    (second,) = engine.add(long, PLAIN, Key(3), index=1)
    paces = []
    while not second.tokens:
        before = len(first.tokens)
        engine.step()
        paces.append(len(first.tokens) - before)
    assert paces == [1] * 5  # 40 tokens, 8 at a time
    assert max(columns for _, columns in model.shapes) == 8


def test_prompts_may_come_while_others_are_written_in_any_order() -> None:
    model, prompts = small_gemma(), random_prompts(*LENGTHS)
    settings = ragged(len(prompts))
    engine = Engine(model, slots=3)
    written: dict[int, Writing] = {}
    for index in (6, 2, 5, 0, 3, 7, 1, 4):
        (written[index],) = engine.add(prompts[index], settings[index], Key(4), index=index)
        for _ in range(index):
            engine.step()
    while not engine.idle:
        engine.step()
    for index, group in enumerate(alone(model, prompts, settings, Key(4), 1)):
        assert_same(written[index].completion(), group.completions[0])


def test_a_slot_that_becomes_free_is_taken_at_once_and_no_row_is_idle() -> None:
    model = Watched(small_gemma())
    lengths = [2, 9, 4, 7, 5, 3]
    prompts = random_prompts(*([4] * len(lengths)))
    engine = Engine(model, slots=2)
    for index, (prompt, most) in enumerate(zip(prompts, lengths, strict=True)):
        engine.add(prompt, Settings(max_new_tokens=most), Key(5), index=index)
    while not engine.idle:
        engine.step()
    decoded = [rows for rows, columns in model.shapes if columns == 1]
    # Every token but each sequence's first is drawn from a step, and the last is never read.
    assert sum(decoded) == sum(lengths) - len(lengths)
    assert decoded.count(1) <= 6  # only at the very end is a slot empty


def test_a_group_larger_than_the_slots_shares_one_reading() -> None:
    model = Watched(small_gemma())
    (prompt,) = random_prompts(10)
    groups = generate(model, [prompt], Settings(max_new_tokens=4), Key(6), 7, rows=2)
    assert model.read == 10 + 7 * 3
    assert_all_same(
        groups, generate(small_gemma(), [prompt], Settings(max_new_tokens=4), Key(6), 7)
    )


def test_a_cancelled_sequence_keeps_what_it_has_and_the_others_do_not_notice() -> None:
    model, prompts = small_gemma(), random_prompts(4, 6, 3, 9)
    engine = Engine(model, slots=2)
    one, two, three, four = (
        engine.add(prompt, PLAIN, Key(7), index=index)[0] for index, prompt in enumerate(prompts)
    )
    for _ in range(5):
        engine.step()
    engine.cancel(one)
    engine.cancel(three)  # it waits, and has nothing
    kept = len(one.tokens)
    while not engine.idle:
        engine.step()
    engine.cancel(two)  # too late
    whole = generate(model, prompts, PLAIN, Key(7))
    assert one.cancelled
    assert one.tokens == whole[0].completions[0].tokens.tolist()[:kept]
    assert three.cancelled
    assert three.tokens == []
    assert not two.cancelled
    assert_same(two.completion(), whole[1].completions[0])
    assert_same(four.completion(), whole[3].completions[0])


def test_an_engine_that_ran_dry_goes_on_with_what_comes_later() -> None:
    model, prompts = small_gemma(), random_prompts(4, 6)
    engine = Engine(model, slots=2)
    for index, prompt in enumerate(prompts):
        assert engine.idle
        (writing,) = engine.add(prompt, PLAIN, Key(8), index=index)
        while not writing.finished:
            engine.step()
        expected = generate(model, [prompt], PLAIN, Key(8), indices=[index])
        assert_same(writing.completion(), expected[0].completions[0])
    assert engine.step() == []


def test_an_engine_sees_an_update_at_its_next_step() -> None:
    model, (prompt,) = small_gemma(), random_prompts(6)
    engine = Engine(model, slots=2)
    (writing,) = engine.add(prompt, replace(PLAIN, temperature=0.0), Key(9))
    engine.step()
    before = writing.tokens[-1]
    with torch.no_grad():
        model.final_norm.add_(1.0).neg_().sub_(1.0)  # every logit changes its sign
    engine.step()
    text = torch.cat([prompt, torch.tensor(writing.tokens[:-1])])
    logits = model(TokenBatch.of([text])).logits(slice(len(text) - 1, None))
    # The past was read with the old weights, whose last layer alone differs in its final norm.
    assert writing.tokens[-1] == int(logits.argmax())
    assert writing.tokens[-1] != before


@pytest.mark.parametrize("samples", [1, 3])
def test_a_model_of_transformers_has_slots_too(samples: int) -> None:
    inner = small_llama(60)
    model, prompts = ForeignModel(inner.eval()), random_prompts(*LENGTHS)
    settings = ragged(len(prompts))
    together = generate(model, prompts, settings, Key(10), samples, rows=3)
    # Its logits are ten times those of the small Gemma, and uncapped.
    assert_all_same(together, alone(model, prompts, settings, Key(10), samples), 1e-4)


# --- broken logits ---


class Poisoned(Watched):
    """NaN for the rows whose newest token is 5."""

    def __call__(self, batch: TokenBatch, cache: Cache | None = None) -> Prediction:
        prediction = super().__call__(batch, cache)
        bad = (batch.tokens == 5).flatten()

        class Broken:
            def logits(self, rows: slice | Tensor, /) -> Tensor:
                return prediction.logits(rows).masked_fill(bad[rows].unsqueeze(1), torch.nan)

        return Broken()


@pytest.mark.parametrize("draft", [False, True])
def test_a_nan_names_its_sequence_and_leaves_the_others_alone(draft: bool) -> None:
    model, prompts = small_gemma(), random_prompts(4, 6, 3, 9, 8)
    helper = small_gemma() if draft else None
    whole = generate(model, prompts, PLAIN, Key(11), 3, draft=helper)
    with pytest.raises(NonFinite, match=r"prompt \d, sample \d, token \d+") as caught:
        generate(Poisoned(model), prompts, PLAIN, Key(11), 3, rows=4, draft=helper)
    broken = 0
    for index, (group, other) in enumerate(zip(caught.value.finished, whole, strict=True)):
        for sample, (one, sound) in enumerate(
            zip(group.completions, other.completions, strict=True)
        ):
            tokens = sound.tokens.tolist()
            if 5 in tokens[:-1]:
                broken += 1
                place = tokens.index(5) + 1
                assert f"prompt {index}, sample {sample}, token" in str(caught.value)
                # A draft's tokens are read several at once: it breaks at most that much sooner.
                assert len(one.tokens) == place or (draft and len(one.tokens) < place)
                assert one.tokens.tolist() == tokens[: len(one.tokens)]
            elif len(one.tokens) == len(tokens):
                assert_same(one, sound)
            else:
                assert draft  # a refused proposal was a 5
    assert 0 < broken < 15


def test_a_stream_of_broken_logits_ends_with_the_error() -> None:
    model = Poisoned(small_gemma())
    (prompt,) = random_prompts(4)
    prompt[-1] = 5
    with pytest.raises(NonFinite, match="prompt 0, sample 0, token 0"):
        list(stream(model, prompt, PLAIN, Key(12)))


# --- bad input ---


def test_numbers_that_make_no_engine_are_refused() -> None:
    model = small_gemma()
    for bad in ({"slots": 0}, {"prefill": 0}, {"ahead": 0}, {"capacity": 1}):
        with pytest.raises(ConfigError):
            Engine(model, **bad)
    with pytest.raises(ConfigError, match="samples"):
        Engine(model).add(random_prompts(3)[0], PLAIN, Key(0), samples=0)
    with pytest.raises(DataError, match="float32"):
        Engine(model).add(torch.ones(3), PLAIN, Key(0))
    with pytest.raises(DataError, match=f"{CONFIG.context} tokens"):
        Engine(model).add(random_prompts(CONFIG.context)[0], PLAIN, Key(0))
    with pytest.raises(ConfigError, match="2 settings for 1 prompts"):
        generate(model, random_prompts(3), [PLAIN, PLAIN], Key(0))


# --- a slot whose last sequence was broken, and other accidents ---


def write_all(engine: Engine) -> None:
    while not engine.idle:
        engine.step()


def overflowing(token: int) -> Backbone:
    """A model whose keys and values are NaN wherever it reads `token`, and sound elsewhere."""
    model = small_gemma()
    with torch.no_grad():
        model.embedding[token] = 0.0
        model.embedding[token, 0] = 3e38  # times the root of the width: infinite
        model.final_norm[0] = -1.0  # and the token's own logit is 0
    return model


@pytest.mark.parametrize("draft", [False, True])
def test_what_a_broken_sequence_leaves_in_its_slot_harms_no_later_one(draft: bool) -> None:
    model, helper = overflowing(9), small_gemma() if draft else None
    long, short = torch.arange(10, 40), torch.tensor([4, 5])
    settings = Settings(max_new_tokens=8)
    found = 0
    for seed in range(4):
        engine = Engine(model, slots=2, draft=helper)
        (beside,) = engine.add(long, settings, Key(seed), index=0)
        (broken,) = engine.add(torch.tensor([4] + [9] * 20), settings, Key(seed), index=1)
        engine.step()
        assert isinstance(broken.failure, NonFinite)
        (later,) = engine.add(short, settings, Key(seed), index=2)
        write_all(engine)
        for writing, prompt, index in ((beside, long, 0), (later, short, 2)):
            single = Engine(model, slots=1, draft=helper)
            (one,) = single.add(prompt, settings, Key(seed), index=index)
            write_all(single)
            assert writing.tokens == one.tokens
            found += len(one.tokens) == 8
    assert found > 2  # most of them never draw a 9


@pytest.mark.parametrize("draft", [False, True])
def test_a_condition_that_raises_ends_its_own_sequence_alone(draft: bool) -> None:
    model = small_gemma()
    helper = small_gemma(replace(CONFIG, layers=1)) if draft else None
    prompts = random_prompts(4, 6, 3)

    def third(tokens: list[int]) -> bool:
        if len(tokens) == 3:
            raise ValueError("a mistake of the caller")
        return False

    engine = Engine(model, slots=2, draft=helper)
    wanted = [PLAIN, replace(PLAIN, ends=(third,)), PLAIN]
    writings = [
        engine.add(prompt, how, Key(0), index=index)[0]
        for index, (prompt, how) in enumerate(zip(prompts, wanted, strict=True))
    ]
    with pytest.raises(ValueError, match="a mistake of the caller") as caught:
        write_all(engine)
    assert "prompt 1, sample 0" in caught.value.__notes__[0]
    assert writings[1].failure is caught.value
    assert len(writings[1].tokens) == 3
    write_all(engine)
    whole = generate(model, prompts, PLAIN, Key(0), draft=helper)
    for index in (0, 2):
        assert writings[index].tokens == whole[index].completions[0].tokens.tolist()
    with pytest.raises(ValueError, match="a mistake of the caller"):
        generate(model, prompts, wanted, Key(0), draft=helper)


def test_a_prompt_of_unknown_tokens_is_named_and_the_others_are_written() -> None:
    model, prompts = small_gemma(), random_prompts(4, 6, 3)
    engine = Engine(model, slots=4)
    alien = torch.tensor([4, CONFIG.vocab_size, 6])
    settings = Settings(max_new_tokens=5)
    first = engine.add(prompts[0], settings, Key(0), index=0)
    wrong = engine.add(alien, settings, Key(0), index=1, samples=2)
    last = engine.add(prompts[2], settings, Key(0), index=2)
    with pytest.raises(DataError, match=r"prompt 1, sample 0 holds the token 61"):
        engine.step()
    assert all(isinstance(writing.failure, DataError) for writing in wrong)
    write_all(engine)
    whole = generate(model, prompts, settings, Key(0))
    for (writing,), index in ((first, 0), (last, 2)):
        assert writing.tokens == whole[index].completions[0].tokens.tolist()
    with pytest.raises(DataError, match="token -1"):
        generate(model, [torch.tensor([4, -1])], settings, Key(0))
    with pytest.raises(DataError, match="the token 99"):
        generate(model, [torch.tensor([4] * 40 + [99])], settings, Key(0))


def test_a_draft_of_another_vocabulary_is_refused_whatever_it_proposes() -> None:
    model = small_gemma()
    other = small_gemma(replace(CONFIG, vocab_size=400))
    for seed in range(3):
        with pytest.raises(DataError, match="vocabulary of 400 tokens, the model one of 61"):
            generate(model, random_prompts(4), PLAIN, Key(seed), draft=other)


def test_conditions_are_a_tuple_of_functions() -> None:
    for ends in (lambda _: True, (3,)):
        with pytest.raises(ConfigError, match="tuple of functions"):
            Settings(ends=ends)
