"""Every token counted once, behind BOS, whatever the batch; equal to transformers on real text."""

from __future__ import annotations

import gzip
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cabochon.core import Key, TokenBatch
from cabochon.core.errors import ConfigError, DataError, NonFinite
from cabochon.evaluation.perplexity import Perplexity, compare, perplexity
from cabochon.models.foreign import ForeignModel
from cabochon.models.gemma.config import GemmaConfig
from cabochon.models.gemma.convert import write_gemma
from cabochon.models.gemma.decoder import Gemma

BOS, EOS = 2, 1
CONFIG = GemmaConfig(
    vocab_size=259,
    width=24,
    layers=2,
    heads=2,
    kv_heads=1,
    head_width=12,
    ffn_width=40,
    query_scalar=12,
    window=5,
    attention_cap=6.0,
    final_cap=8.0,
    post_norms=True,
    context=40,
)


def small_gemma(config: GemmaConfig = CONFIG, seed: int = 0) -> Gemma:
    model = Gemma(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            drawn = torch.randn(weight.shape, generator=Key(seed).fold(name).generator())
            weight.copy_(drawn * (0.3 if weight.ndim == 1 else 1.5 / weight.shape[-1] ** 0.5))
    return model


def byte_ids(text: str) -> list[int]:
    return [3 + byte for byte in text.encode()]


def ids(*lengths: int) -> list[list[int]]:
    stream = Key(4).fold(*lengths).numpy()
    return [stream.integers(3, 259, size=length).tolist() for length in lengths]


@torch.no_grad()
def token_nats(model: Gemma, tokens: list[int]) -> Tensor:
    """T - 1 float64: -log p of each token but the first, by one dense pass."""
    logits = model(TokenBatch.of([tokens])).logits(slice(None)).double()
    return -logits.log_softmax(-1)[:-1].gather(1, torch.tensor(tokens)[1:, None]).squeeze(1)


@pytest.fixture
def paragraphs(shared_data: Path) -> list[str]:
    path = shared_data / "wikitext2" / "valid.txt.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        lines = [line.strip() for line in file.readlines()[:60]]
    return [line for line in lines if line]


# --- the figure ---


def test_nats_and_counts_are_those_of_a_dense_pass_over_each_document_alone():
    model, documents = small_gemma(), ids(3, 17, 1, 30)
    result = perplexity(model, documents, bos_id=BOS)
    assert result.document_tokens == (3, 17, 1, 30)
    assert result.tokens == 51
    for document, nats in zip(documents, result.document_nats, strict=True):
        expected = token_nats(model, [BOS, *document]).sum().item()
        assert nats == pytest.approx(expected, rel=1e-6)
    assert result.nats_per_token == pytest.approx(sum(result.document_nats) / 51)
    assert result.perplexity == pytest.approx(math.exp(result.nats_per_token))


def test_a_model_that_knows_nothing_needs_the_logarithm_of_the_vocabulary():
    model = Gemma(CONFIG)  # zero weights: all logits are 0
    result = perplexity(model, ids(9, 100, 2), bos_id=BOS, eos_id=EOS)
    assert result.tokens == 9 + 100 + 2 + 3
    assert result.nats_per_token == pytest.approx(math.log(259), rel=1e-6)
    assert result.perplexity == pytest.approx(259, rel=1e-5)


def test_the_end_is_counted_only_where_it_is_asked_for():
    model, documents = small_gemma(), ids(5, 8)
    without = perplexity(model, documents, bos_id=BOS)
    ended = perplexity(model, documents, bos_id=BOS, eos_id=EOS)
    assert ended.document_tokens == (6, 9)
    for index, document in enumerate(documents):
        last = token_nats(model, [BOS, *document, EOS])[-1].item()
        added = ended.document_nats[index] - without.document_nats[index]
        assert added == pytest.approx(last, rel=1e-4)


def test_without_bos_the_first_token_is_not_counted():
    model, documents = small_gemma(), ids(5, 1, 60)
    result = perplexity(model, documents, bos_id=None)
    assert result.document_tokens == (4, 0, 59)
    assert result.document_nats[1] == 0.0
    expected = token_nats(model, documents[0]).sum().item()
    assert result.document_nats[0] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_neither_batch_nor_padding_changes_the_figure(batch_size):
    model, documents = small_gemma(), ids(3, 90, 1, 39, 40, 41, 12)
    alone = [perplexity(model, [each], bos_id=BOS).document_nats[0] for each in documents]
    result = perplexity(model, documents, bos_id=BOS, batch_size=batch_size)
    assert result.document_nats == pytest.approx(alone, rel=1e-6)
    assert result.document_tokens == tuple(map(len, documents))


def test_reordering_documents_reorders_their_sums():
    model, documents = small_gemma(), ids(3, 50, 7)
    straight = perplexity(model, documents, bos_id=BOS)
    turned = perplexity(model, documents[::-1], bos_id=BOS)
    assert turned.document_nats[::-1] == pytest.approx(straight.document_nats, rel=1e-6)


def test_it_equals_transformers_on_real_text(tmp_path: Path, paragraphs):
    transformers = pytest.importorskip("transformers")
    model = small_gemma(replace(CONFIG, context=700))
    write_gemma(model, tmp_path)
    peer = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    documents = [byte_ids(text)[:690] for text in paragraphs[:12]]
    nats = []
    for document in documents:
        tokens = torch.tensor([[BOS, *document, EOS]])
        with torch.no_grad():
            mean = peer(input_ids=tokens, labels=tokens).loss.item()
        nats.append(mean * (tokens.shape[1] - 1))
    result = perplexity(model, documents, bos_id=BOS, eos_id=EOS)
    assert result.document_nats == pytest.approx(nats, rel=1e-5)
    expected = sum(nats) / sum(len(document) + 1 for document in documents)
    assert result.nats_per_token == pytest.approx(expected, abs=1e-5)


# --- windows ---


@pytest.mark.parametrize("length", [38, 39, 40, 41, 60, 61, 99])
@pytest.mark.parametrize("stride", [1, 7, 20, 39, None])
@pytest.mark.parametrize("bos_id", [BOS, None])
def test_each_token_of_a_long_document_is_counted_once(length, stride, bos_id):
    uniform = Gemma(CONFIG)
    (document,) = ids(length)
    result = perplexity(uniform, [document], bos_id=bos_id, stride=stride)
    counted = length - (bos_id is None)
    assert result.tokens == counted
    assert result.nats_per_token == pytest.approx(math.log(259), rel=1e-6)


def test_a_document_that_just_fits_the_context_is_read_in_one_window():
    model = small_gemma()
    (document,) = ids(CONFIG.context)  # BOS and all but the last token are read: 40 tokens
    result = perplexity(model, [document], bos_id=BOS, stride=1)
    expected = token_nats(model, [BOS, *document]).sum().item()
    assert result.document_nats[0] == pytest.approx(expected, rel=1e-6)


def test_windows_by_hand():
    # context 40: the first window counts 40 tokens; with stride 10 the second begins at token 10,
    # behind BOS, reads on to token 50 (exclusive) and counts tokens 40 to 49; the third 50 to 54.
    model = small_gemma()
    (document,) = ids(55)
    result = perplexity(model, [document], bos_id=BOS, stride=10)
    windows = [(0, 40, 40), (10, 50, 10), (20, 55, 5)]
    expected = sum(
        token_nats(model, [BOS, *document[begin:end]])[-counted:].sum().item()
        for begin, end, counted in windows
    )
    assert result.document_nats[0] == pytest.approx(expected, rel=1e-6)


def test_a_foreign_model_with_learned_positions_is_never_asked_beyond_its_context():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=259, n_embd=24, n_layer=2, n_head=2, n_positions=16, initializer_range=0.3
    )
    model = ForeignModel(transformers.GPT2LMHeadModel(config).train())
    documents = ids(16, 17, 40, 4)
    result = perplexity(model, documents, bos_id=BOS)
    assert model.inner.training
    assert result.document_tokens == (16, 17, 40, 4)
    model.eval()
    expected = token_nats(model, [BOS, *documents[3]]).sum().item()
    assert result.document_nats[3] == pytest.approx(expected, rel=1e-5)


# --- uncertainty ---


def result_of(nats: np.ndarray, tokens: np.ndarray) -> Perplexity:
    return Perplexity(
        document_nats=tuple(nats.tolist()), document_tokens=tuple(tokens.tolist()), interval=None
    )


def test_one_document_has_no_interval_and_equal_ones_have_one_without_width():
    model, (document,) = small_gemma(), ids(6)
    assert perplexity(model, [document], bos_id=BOS).interval is None
    low, high = perplexity(model, [document] * 3, bos_id=BOS).interval
    assert low == pytest.approx(high, rel=1e-6)


def test_the_interval_holds_the_figure_and_depends_on_the_key_alone():
    model, documents = small_gemma(), ids(*range(1, 30))
    first = perplexity(model, documents, bos_id=BOS, key=Key(5))
    again = perplexity(model, documents, bos_id=BOS, key=Key(5))
    other = perplexity(model, documents, bos_id=BOS, key=Key(6))
    assert first.interval == again.interval != other.interval
    low, high = first.interval
    assert low < first.nats_per_token < high


def test_a_model_compared_with_itself_differs_by_nothing():
    result = perplexity(small_gemma(), ids(4, 9, 30), bos_id=BOS)
    comparison = compare(result, result)
    assert comparison.difference == 0.0
    assert comparison.interval == (0.0, 0.0)
    assert comparison.wins == 0
    assert not comparison.decided


def test_pairing_finds_a_small_difference_that_the_separate_intervals_hide():
    # Documents differ much in difficulty (1 to 5 nats), the models by 0.02 on each.
    stream = Key(3).numpy()
    tokens = stream.integers(50, 200, size=60)
    each = stream.uniform(1.0, 5.0, size=60)
    noise = stream.normal(0.0, 0.01, size=60)
    first, second = (
        result_of(each * tokens, tokens),
        result_of((each - 0.02 + noise) * tokens, tokens),
    )
    comparison = compare(first, second)
    assert comparison.difference == pytest.approx(-0.02, abs=0.005)
    assert comparison.decided
    assert comparison.interval[1] < 0.0
    assert comparison.documents == 60
    assert comparison.wins > 50
    swapped = compare(second, first)
    assert swapped.difference == pytest.approx(-comparison.difference)


def test_models_scored_on_different_documents_are_not_compared():
    model = small_gemma()
    first = perplexity(model, ids(4, 9), bos_id=BOS)
    with pytest.raises(DataError, match="same"):
        compare(first, perplexity(model, ids(4, 10), bos_id=BOS))
    with pytest.raises(DataError, match="same"):
        compare(first, perplexity(model, ids(4), bos_id=BOS))


# --- the model, and bad input ---


def test_the_model_is_left_as_it_was():
    model = small_gemma().train()
    perplexity(model, ids(4), bos_id=BOS)
    assert model.training
    assert all(weight.grad is None for weight in model.parameters())


def test_nothing_to_count_is_refused():
    model = small_gemma()
    for nothing in ([], [[]], [[], []]):
        with pytest.raises(DataError, match="no token"):
            perplexity(model, nothing, bos_id=BOS)
    assert perplexity(model, [[], [5]], bos_id=BOS).document_tokens == (0, 1)


def test_a_document_that_brings_its_own_bos_is_refused():
    with pytest.raises(DataError, match="document 1 begins with BOS"):
        perplexity(small_gemma(), [[5, 6], [BOS, 5]], bos_id=BOS)


@pytest.mark.parametrize(("stride", "batch_size"), [(0, 8), (40, 8), (5, 0)])
def test_windows_that_make_no_sense_are_refused(stride, batch_size):
    with pytest.raises(ConfigError, match="stride"):
        perplexity(small_gemma(), ids(4), bos_id=BOS, stride=stride, batch_size=batch_size)


def test_a_sum_that_is_no_number_is_refused_with_its_document():
    model = small_gemma()
    with torch.no_grad():
        model.embedding[7] = torch.nan
    with pytest.raises(NonFinite, match="document 0"):
        perplexity(model, [[7, 8], [9]], bos_id=BOS)
