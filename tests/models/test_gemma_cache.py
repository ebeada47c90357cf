"""Decoding from a cache: always what one pass over the whole sequence gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from cabochon.core import Key, TokenBatch
from cabochon.core.errors import DataError
from cabochon.models.gemma import Gemma, GemmaConfig, preset
from cabochon.models.gemma.step import int8

CLOSE = 1e-4
"""Float32 logits of standard deviation about 1, through other shapes of the same products."""


def lively(config: GemmaConfig, seed: int = 0) -> Gemma:
    """A model whose every part matters: large weights, norm weights that are not 0."""
    model = Gemma.init(config, Key(seed))
    generator = Key(seed).fold("lively").generator()
    with torch.no_grad():
        for weight in model.parameters():
            drawn = torch.randn(weight.shape, generator=generator)
            weight.copy_(drawn * (0.3 if weight.ndim == 1 else 4.0 / weight.shape[-1] ** 0.5))
            if weight is model.embedding:
                weight.mul_(0.1)
    return model.eval()


@pytest.fixture(scope="module", params=[None, 1, 5, 64])
def model(request: pytest.FixtureRequest) -> Gemma:
    return lively(replace(preset("gemma2-nano"), vocab_size=100, layers=3, window=request.param))


def sequences(*lengths: int) -> list[Tensor]:
    generator = Key(7).generator()
    return [torch.randint(3, 100, (length,), generator=generator) for length in lengths]


def logits(model: Gemma, tokens: Tensor) -> Tensor:
    return model(TokenBatch.of([tokens])).logits(slice(None))


def feed(
    model: Gemma, cache: object, pieces: list[Tensor], starts: list[int], *, left: bool = False
) -> list[Tensor]:
    """The logits of each row's piece (which may be empty) that stands at its start."""
    filled = [piece if len(piece) else torch.tensor([0]) for piece in pieces]
    batch = TokenBatch.of(filled, left=left)
    empty = torch.tensor([len(piece) == 0 for piece in pieces])
    held = (batch.documents >= 0) & ~empty[:, None]
    batch = replace(
        batch,
        positions=torch.where(held, batch.positions + torch.tensor(starts)[:, None], 0),
        documents=torch.where(held, 0, -1),
    )
    out = model(batch, cache).logits(slice(None)).view(*batch.shape, -1)
    return [out[row][held[row]] for row in range(len(pieces))]


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("cuts", [(0, 1), (4, 1), (4, 3), (9, 7), (12, 12), (1, 2)])
def test_cached_decoding_in_any_pieces_is_the_full_forward(
    model: Gemma, cuts: tuple[int, int], left: bool
) -> None:
    rows = sequences(23, 14, 3)
    first, step = cuts
    cache = model.new_cache(3, 23)
    bounds = [0, first, *range(first + step, 23, step), 23] if first else [*range(0, 23, step), 23]
    seen: list[list[Tensor]] = [[], [], []]
    for begin, end in pairwise(bounds):
        pieces = [row[begin:end] for row in rows]
        starts = [begin if begin < len(row) else 0 for row in rows]
        for row, out in enumerate(feed(model, cache, pieces, starts, left=left)):
            seen[row].append(out)
    for tokens, pieces in zip(rows, seen, strict=True):
        torch.testing.assert_close(torch.cat(pieces), logits(model, tokens), atol=CLOSE, rtol=0)


def test_rows_advance_at_their_own_pace(model: Gemma) -> None:
    rows = sequences(20, 20, 20)
    cache, done = model.new_cache(3, 20), [0, 0, 0]
    seen: list[list[Tensor]] = [[], [], []]
    for paces in [(3, 0, 9), (1, 1, 1), (0, 8, 1), (9, 0, 0), (1, 1, 1), (6, 10, 8)]:
        pieces = [row[at : at + pace] for row, at, pace in zip(rows, done, paces, strict=True)]
        for row, out in enumerate(feed(model, cache, pieces, done)):
            seen[row].append(out)
        done = [at + pace for at, pace in zip(done, paces, strict=True)]
    assert done == [20, 20, 20]
    for tokens, pieces in zip(rows, seen, strict=True):
        torch.testing.assert_close(torch.cat(pieces), logits(model, tokens), atol=CLOSE, rtol=0)


@pytest.mark.parametrize("chunk", [1, 4])
def test_a_row_that_begins_again_forgets_what_it_held(model: Gemma, chunk: int) -> None:
    old, kept, new = sequences(17, 20, 9)
    cache = model.new_cache(2, 20)
    feed(model, cache, [old, kept[:11]], [0, 0])
    seen: tuple[list[Tensor], list[Tensor]] = ([], [])
    for at in range(0, 9, chunk):
        pieces = [new[at : at + chunk], kept[11 + at : 11 + at + chunk][: 9 - at]]
        for row, out in enumerate(feed(model, cache, pieces, [at, 11 + at])):
            seen[row].append(out)
    torch.testing.assert_close(torch.cat(seen[0]), logits(model, new), atol=CLOSE, rtol=0)
    torch.testing.assert_close(torch.cat(seen[1]), logits(model, kept)[11:], atol=CLOSE, rtol=0)


def test_sliding_layers_keep_only_their_window() -> None:
    config = replace(preset("gemma2-nano"), window=8)
    small = Gemma(config).new_cache(2, 1000).nbytes
    one_slot = 2 * 2 * config.kv_heads * config.head_width * 4
    assert small == one_slot * (9 + 1001)


def test_what_does_not_follow_the_past_is_refused(model: Gemma) -> None:
    cache = model.new_cache(1, 6)
    tokens = sequences(10)[0]
    feed(model, cache, [tokens[:3]], [0])
    with pytest.raises(DataError, match="goes on at position 5, the cache holds 3"):
        feed(model, cache, [tokens[5:6]], [5])
    with pytest.raises(DataError, match="would grow to 7 tokens, the cache was made for 6"):
        feed(model, cache, [tokens[3:7]], [3])
    with pytest.raises(DataError, match="the cache holds 1 rows, the batch 2"):
        feed(model, cache, [tokens[3:4], tokens[3:4]], [3, 3])
    packed = replace(TokenBatch.of([tokens[:4]]), positions=torch.tensor([[0, 1, 0, 1]]))
    with pytest.raises(DataError, match="one document whose positions follow one another"):
        model(packed, cache)
    with pytest.raises(DataError, match="at least 1"):
        model.new_cache(0, 4)


def test_cached_decoding_makes_no_gradient(model: Gemma) -> None:
    out = model(TokenBatch.of(sequences(4)), model.new_cache(1, 4))
    assert not out.hidden.requires_grad


@pytest.mark.parametrize("rows", [[2, 0], [0, 1], [1, 1, 0, 2], [2, 2, 2], [1]])
def test_chosen_rows_go_on_as_they_would_have(model: Gemma, rows: list[int]) -> None:
    texts = sequences(12, 9, 15)
    cache = model.new_cache(3, 20)
    feed(model, cache, [text[:-2] for text in texts], [0, 0, 0])
    chosen = cache.select(torch.tensor(rows))
    for back in (2, 1):
        pieces = [texts[row][-back:][:1] for row in rows]
        out = feed(model, chosen, pieces, [len(texts[row]) - back for row in rows])
        for row, logits_here in zip(rows, out, strict=True):
            expected = logits(model, texts[row])[-back]
            torch.testing.assert_close(logits_here[0], expected, atol=CLOSE, rtol=0)


@pytest.mark.parametrize("changes", [{}, {"post_norms": False}, {"attention_cap": 5e3}])
def test_a_step_in_bfloat16_errs_as_little_as_the_full_forward(changes: dict[str, object]) -> None:
    config = preset("gemma-nano") if "post_norms" in changes else preset("gemma2-nano")
    exact = lively(replace(config, vocab_size=100, **changes))
    model = Gemma(exact.config, dtype=torch.bfloat16)
    model.load_state_dict(exact.state_dict())
    (tokens,) = sequences(12)
    expected = logits(exact, tokens)
    cache = model.new_cache(1, 12)
    steps = torch.cat(
        [feed(model, cache, [token[None]], [at])[0] for at, token in enumerate(tokens)]
    )
    bound = 1.5 * (logits(model, tokens) - expected).abs().mean()
    assert steps.dtype is torch.float32
    assert (steps - expected).abs().mean() < bound


@pytest.mark.parametrize("changes", [{"attention_cap": 500.0}, {"final_cap": 200.0}])
def test_large_caps_bend_a_step_as_they_bend_the_full_forward(changes: dict[str, float]) -> None:
    model = lively(replace(preset("gemma2-nano"), vocab_size=100, **changes))
    (tokens,) = sequences(16)
    cache = model.new_cache(1, 16)
    seen = [feed(model, cache, [token[None]], [at])[0] for at, token in enumerate(tokens)]
    whole = logits(model, tokens)
    torch.testing.assert_close(torch.cat(seen), whole, atol=1e-4, rtol=0)


def test_a_step_and_the_full_forward_choose_the_same_function_for_a_cap() -> None:
    from cabochon.models.gemma import attention, numerics, step

    assert (
        attention.LARGEST_LOGISTIC_CAP == step.LARGEST_LOGISTIC_CAP == numerics.LARGEST_LOGISTIC_CAP
    )
    assert step.curve(1.0, numerics.LARGEST_LOGISTIC_CAP)[0] is torch.sigmoid_
    assert step.curve(1.0, 1.01 * numerics.LARGEST_LOGISTIC_CAP)[0] is torch.tanh_


def test_a_new_cache_sees_changed_weights() -> None:
    model = lively(replace(preset("gemma2-nano"), vocab_size=100))
    (tokens,) = sequences(5)
    feed(model, model.new_cache(1, 5), [tokens[:1]], [0])
    model.blocks[0].qkv.data.mul_(1.5)
    model.embedding.data.mul_(1.5)
    out = feed(model, model.new_cache(1, 5), [tokens[:1]], [0])[0]
    torch.testing.assert_close(out, logits(model, tokens[:1]), atol=CLOSE, rtol=0)


def changed_by_an_optimizer(model: Gemma) -> None:
    for weight in model.parameters():
        weight.grad = torch.sin(torch.arange(weight.numel()).float()).view_as(weight)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.zero_grad(set_to_none=True)


def replaced_by_others(model: Gemma) -> None:
    other = lively(model.config, seed=1)
    model.load_state_dict(other.state_dict(), assign=True)


@pytest.mark.parametrize("change", [changed_by_an_optimizer, replaced_by_others])
def test_weights_that_change_while_decoding_are_those_used_from_then_on(
    change: Callable[[Gemma], None],
) -> None:
    model = lively(replace(preset("gemma2-nano"), vocab_size=100))
    (tokens,) = sequences(12)
    stepped, whole = model.new_cache(1, 12), model.new_cache(1, 12)
    for at in range(8):
        feed(model, stepped, [tokens[at : at + 1]], [at])
    feed(model, whole, [tokens[:8]], [0])
    before = logits(model, tokens[:9])[-1:]
    change(model)
    seen = [feed(model, stepped, [tokens[at : at + 1]], [at])[0] for at in (8, 9)]
    # Several tokens at once go through the model's own blocks, nothing is laid out for them.
    expected = feed(model, whole, [tokens[8:10]], [8])[0]
    torch.testing.assert_close(torch.cat(seen), expected, atol=CLOSE, rtol=0)
    assert (seen[0] - before).abs().max() > 0.1


def test_weights_are_laid_out_once_while_they_stay(model: Gemma) -> None:
    (tokens,) = sequences(5)
    cache = model.new_cache(1, 5)
    feed(model, cache, [tokens[:1]], [0])
    step = cache.step
    feed(model, cache, [tokens[1:2]], [1])
    with torch.inference_mode():
        feed(model, cache, [tokens[2:3]], [2])
    assert cache.step is step


def test_weights_made_in_inference_mode_decode() -> None:
    with torch.inference_mode():
        model = lively(replace(preset("gemma2-nano"), vocab_size=100))
        (tokens,) = sequences(6)
        cache = model.new_cache(1, 6)
        seen = [feed(model, cache, [token[None]], [at])[0] for at, token in enumerate(tokens)]
        torch.testing.assert_close(torch.cat(seen), logits(model, tokens), atol=CLOSE, rtol=0)


@pytest.mark.parametrize("length", [1, 3])
def test_a_cache_for_another_window_is_refused(model: Gemma, length: int) -> None:
    (tokens,) = sequences(length)
    cache = model.with_window(17).new_cache(1, 9)
    with pytest.raises(DataError, match="another configuration"):
        feed(model, cache, [tokens], [0])
    feed(model.with_window(17), cache, [tokens], [0])


def test_a_model_too_large_to_copy_decodes_from_its_own_weights(
    model: Gemma, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cabochon.models.gemma.step.PACKED_BYTES", 0)
    (tokens,) = sequences(8)
    cache = model.new_cache(1, 8)
    seen = [feed(model, cache, [token[None]], [at])[0] for at, token in enumerate(tokens)]
    torch.testing.assert_close(torch.cat(seen), logits(model, tokens), atol=CLOSE, rtol=0)


def test_a_model_that_has_decoded_in_inference_mode_still_learns() -> None:
    model = lively(replace(preset("gemma2-nano"), vocab_size=100, rope_base=777.0))
    (tokens,) = sequences(6)
    with torch.inference_mode():
        cache = model.new_cache(1, 6)
        feed(model, cache, [tokens[:4]], [0])
        feed(model, cache, [tokens[4:5]], [4])
    logits(model, tokens).square().sum().backward()
    assert all(weight.grad is not None for weight in model.parameters())


# --- rows that come and go, tokens that are taken back ---


@pytest.mark.parametrize("ahead", [0, 3])
@pytest.mark.parametrize("lengths", [(4, 9, 2), (12, 1, 17)])
def test_a_row_that_is_put_into_another_cache_goes_on_there(
    model: Gemma, ahead: int, lengths: tuple[int, ...]
) -> None:
    texts = sequences(*(length + 4 for length in lengths))
    small = model.new_cache(3, max(lengths), ahead)
    feed(model, small, [text[:-4] for text in texts], [0, 0, 0])
    cache = model.new_cache(4, 25, ahead)
    first, other = sequences(20, 20)
    feed(model, cache, [first, other, first, other], [0, 0, 0, 0])  # what they hold is forgotten
    cache = cache.select(torch.tensor([1, 0]))
    cache.put(torch.tensor([0, 2, 3]), small, torch.tensor([2, 0, 2]))
    order, starts = [2, None, 0, 2], []
    for at in range(4):
        rows = [other if r is None else texts[r] for r in order]
        starts = [20 if r is None else lengths[r] + at for r in order]
        pieces = [row[start : start + 1] for row, start in zip(rows, starts, strict=True)]
        pieces[1] = first[:0] if at else sequences(1)[0]  # row 1 goes on with first, once
        starts[1] = 0 if at else 20
        out = feed(model, cache, pieces, starts)
        for place in (0, 2, 3):
            expected = logits(model, rows[place])[starts[place]]
            torch.testing.assert_close(out[place][0], expected, atol=CLOSE, rtol=0)
        if not at:
            expected = logits(model, torch.cat([first, pieces[1]]))[-1]
            torch.testing.assert_close(out[1][0], expected, atol=CLOSE, rtol=0)


@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_tokens_that_were_taken_back_leave_no_trace(model: Gemma, ahead: int) -> None:
    texts, wrong = sequences(24, 13), sequences(30, 31)
    cache = model.new_cache(2, 30, ahead)
    feed(model, cache, [text[:3] for text in texts], [0, 0])
    at = [3, 3]
    for turn in range(9):
        # One right token and up to `ahead` wrong ones at once; then the wrong ones are taken back.
        extra = [(turn + row) % (ahead + 1) for row in range(2)]
        pieces = [
            torch.cat([text[a : a + 1], bad[a + 1 : a + 1 + more]])
            for text, bad, a, more in zip(texts, wrong, at, extra, strict=True)
        ]
        out = feed(model, cache, pieces, at)
        for row, text in enumerate(texts):
            expected = logits(model, text[: at[row] + 1])[-1]
            torch.testing.assert_close(out[row][0], expected, atol=CLOSE, rtol=0)
        at = [a + 1 for a in at]
        cache.rewind(at)
    with pytest.raises(DataError, match="cannot go back to 0"):
        cache.rewind([0, at[1]])
    with pytest.raises(DataError, match="cannot go back to 13"):
        cache.rewind([13, at[1]])


def test_several_tokens_at_the_speed_of_one_are_the_full_forward(model: Gemma) -> None:
    texts = sequences(23, 14)
    cache = model.new_cache(2, 23, 3)
    feed(model, cache, [text[:7] for text in texts], [0, 0])
    for start in range(7, 23, 4):
        pieces = [text[start : start + 4] for text in texts]
        out = feed(model, cache, pieces, [start if len(piece) else 0 for piece in pieces])
        for text, piece, got in zip(texts, pieces, out, strict=True):
            expected = logits(model, text)[start : start + len(piece)]
            torch.testing.assert_close(got, expected, atol=CLOSE, rtol=0)
    assert cache.step is not None


def test_rows_for_which_there_is_no_room_are_refused(model: Gemma) -> None:
    cache, other = model.new_cache(2, 9), model.new_cache(1, 9)
    one = torch.tensor([0])
    with pytest.raises(DataError, match="row 2 is asked for, the cache was made for 2"):
        cache.put(torch.tensor([2]), other, one)
    with pytest.raises(DataError, match="capacity 10"):
        cache.put(one, model.new_cache(1, 10), one)
    with pytest.raises(DataError, match="another configuration"):
        cache.put(one, model.with_window(2).new_cache(1, 9), one)


def test_eight_thousand_tokens_cost_a_sliding_layer_no_more_than_its_window() -> None:
    config = replace(preset("gemma2-nano"), window=512, layers=2)
    by_capacity = {c: Gemma(config).new_cache(1, c).nbytes for c in (512, 2048, 8192)}
    one_slot = 2 * config.kv_heads * config.head_width * 4
    assert by_capacity == {c: one_slot * (512 + 1 + c + 1) for c in by_capacity}


# --- 8 bits ---


def test_int8_decoding_errs_as_much_as_eight_bits_do_and_follows_the_weights() -> None:
    exact = lively(replace(preset("gemma2-nano"), vocab_size=100))
    rounded = exact.with_int8_decoding()
    (tokens,) = sequences(12)

    def decoded(model: Gemma) -> Tensor:
        cache = model.new_cache(1, 12)
        steps = [feed(model, cache, [token[None]], [at])[0] for at, token in enumerate(tokens)]
        return torch.cat(steps).log_softmax(-1)

    whole = logits(exact, tokens).log_softmax(-1)
    error = (decoded(rounded) - whole).abs().mean()
    # Weights are off by up to 0.4% of the largest of their row, activations by 2^-9.
    assert 1e-4 < error < 0.02
    assert (decoded(exact) - whole).abs().max() < 1e-4
    assert rounded.embedding is exact.embedding
    with torch.no_grad():
        exact.final_norm.mul_(-1.0)
    changed = logits(exact, tokens).log_softmax(-1)
    assert (decoded(rounded) - changed).abs().mean() < 0.02
    assert (changed - whole).abs().mean() > 0.1


def test_int8_products_are_those_of_the_rounded_weight() -> None:
    weight = torch.randn(50, 64, generator=Key(1).generator())
    weight[7] = 0.0
    x = torch.randn(3, 64, generator=Key(2).generator()).bfloat16()
    step = weight.abs().amax(1, keepdim=True) / 127
    nearest = (weight / step.clamp(min=1e-30)).round() * step
    assert ((nearest - weight).abs() <= step / 2 + 1e-7).all()
    got = int8(weight, 3)(x.float())
    expected = x.float() @ nearest.T
    # bfloat16 scales and results: two roundings of 2^-9.
    torch.testing.assert_close(got, expected, atol=0.02, rtol=2**-7)
    assert torch.equal(got[:, 7], torch.zeros(3))
