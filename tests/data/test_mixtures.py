import itertools
from collections import Counter

import pytest
import torch

from cabochon.core import Key, TokenBatch
from cabochon.core.errors import ConfigError, TokenizerMismatch
from cabochon.data.mixtures import Mixture
from cabochon.data.packing import Packed, pack_tokens


def corpus(first: int, rows: int, context: int = 8, tokenizer: str = "") -> Packed:
    """`rows` full rows, each of one document that repeats one id of its own."""
    documents = [[first + row] * context for row in range(rows)]
    return pack_tokens(documents, context, tokenizer=tokenizer)


@pytest.fixture
def mixture() -> Mixture:
    sources = {"code": corpus(0, 7), "text": corpus(100, 5), "chat": corpus(200, 3)}
    return Mixture(sources, {"code": 5, "text": 3.0, "chat": 2})


def ids(batches, count: int) -> list[int]:
    return [
        id_ for batch in itertools.islice(batches, count) for id_ in batch.tokens[:, 0].tolist()
    ]


def equal(first: TokenBatch, second: TokenBatch) -> bool:
    return all(torch.equal(vars(first)[name], vars(second)[name]) for name in vars(first))


def test_rows_come_in_proportion_to_the_weights(mixture):
    drawn = Counter(id_ // 100 for id_ in ids(mixture.batches(Key(0), 50), 200))
    # Standard deviation of each share of 10 000 draws: at most 0.005.
    for number, share in enumerate((0.5, 0.3, 0.2)):
        assert abs(drawn[number] / 10_000 - share) < 0.02


def test_each_corpus_is_read_epoch_after_epoch_at_its_own_pace(mixture):
    drawn = ids(mixture.batches(Key(0), 10), 60)
    for number, rows in enumerate((7, 5, 3)):
        own = [id_ for id_ in drawn if id_ // 100 == number]
        for at in range(0, len(own) - rows, rows):
            assert len(set(own[at : at + rows])) == rows


@pytest.mark.parametrize("start", [1, 17, 600])
def test_starting_at_n_is_skipping_n_batches(mixture, start):
    whole = itertools.islice(mixture.batches(Key(1), 9), start, start + 5)
    resumed = itertools.islice(mixture.batches(Key(1), 9, start=start), 5)
    assert all(equal(*pair) for pair in zip(whole, resumed, strict=True))


def test_ranks_together_see_what_one_process_sees(mixture):
    whole = itertools.islice(mixture.batches(Key(2), 8, start=3), 5)
    parts = [
        itertools.islice(mixture.batches(Key(2), 8, start=3, rank=rank, ranks=4), 5)
        for rank in range(4)
    ]
    for batch, *shares in zip(whole, *parts, strict=True):
        joined = {name: torch.cat([vars(each)[name] for each in shares]) for name in vars(batch)}
        assert equal(batch, TokenBatch(**joined))


def test_a_mixture_of_one_is_in_an_order_that_reads_everything(mixture):
    alone = Mixture({"code": corpus(0, 7)}, {"code": 0.1})
    assert sorted(ids(alone.batches(Key(0), 7), 1)) == list(range(7))


def test_a_weight_of_zero_leaves_a_corpus_out():
    mixture = Mixture({"a": corpus(0, 3), "b": corpus(100, 3)}, {"a": 1, "b": 0})
    assert max(ids(mixture.batches(Key(0), 10), 20)) < 100


def test_the_order_of_the_names_does_not_matter():
    sources = {"a": corpus(0, 3), "b": corpus(100, 3)}
    turned = dict(reversed(sources.items()))
    first = Mixture(sources, {"a": 1, "b": 2}).batches(Key(0), 8)
    second = Mixture(turned, {"b": 2, "a": 1}).batches(Key(0), 8)
    assert ids(first, 10) == ids(second, 10)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": 1}, r"the weights are for \['a'\]"),
        ({"a": 1, "b": 1, "c": 1}, "give each corpus one weight"),
        ({"a": 1, "b": -0.5}, "the weight of b is -0.5"),
        ({"a": 1, "b": float("nan")}, "the weight of b is nan"),
        ({"a": float("inf"), "b": 1}, "the weight of a is inf"),
        ({"a": 0, "b": 0.0}, "all weights are 0"),
    ],
)
def test_weights_that_cannot_be_are_refused(weights, message):
    with pytest.raises(ConfigError, match=message):
        Mixture({"a": corpus(0, 3), "b": corpus(100, 3)}, weights)


def test_corpora_that_do_not_go_together_are_refused():
    weights = {"a": 1, "b": 1}
    with pytest.raises(ConfigError, match="rows of different lengths"):
        Mixture({"a": corpus(0, 3), "b": corpus(100, 3, context=4)}, weights)
    with pytest.raises(TokenizerMismatch, match="different tokenizers"):
        Mixture({"a": corpus(0, 3, tokenizer="x"), "b": corpus(9, 3, tokenizer="y")}, weights)


def test_batches_that_cannot_be_shared_are_refused_at_once(mixture):
    with pytest.raises(ConfigError, match="cannot be shared equally"):
        mixture.batches(Key(0), 9, ranks=2)
