import itertools
import json
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cabochon.core import Key, TokenBatch
from cabochon.core.errors import ConfigError, DataError, FolderError, TokenizerMismatch
from cabochon.data.chat import ChatTokens, Message
from cabochon.data.corpus import standard_library
from cabochon.data.documents import Document
from cabochon.data.packing import (
    Packed,
    best_fit_pack,
    pack_chats,
    pack_conversations,
    pack_documents,
    pack_tokens,
)
from cabochon.data.readers import Conversation, read_chats
from cabochon.data.tokenizer import Tokenizer

sequences = st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=40), min_size=1, max_size=25)


def everything(packed: Packed) -> TokenBatch:
    return packed.batch(range(packed.rows))


def pieces(batch: TokenBatch) -> list[tuple[list[int], list[int], list[bool]]]:
    """Tokens, targets and mask of each document of each row, slot by slot, in plain Python."""
    found = []
    for row in range(batch.shape[0]):
        for document in sorted(set(batch.documents[row].tolist()) - {-1}):
            own = batch.documents[row] == document
            found.append(
                tuple(
                    getattr(batch, name)[row][own].tolist()
                    for name in ("tokens", "targets", "mask")
                )
            )
            assert batch.positions[row][own].tolist() == list(range(int(own.sum())))
    return found


# -- best fit -------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(1, 16), max_size=60))
def test_every_sequence_is_placed_once_and_no_row_overflows(lengths):
    rows = best_fit_pack([range(length) for length in lengths], 16)
    assert sorted(itertools.chain(*rows)) == list(range(len(lengths)))
    assert all(sum(lengths[number] for number in row) <= 16 for row in rows)


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(1, 16), max_size=60))
def test_at_most_one_row_is_half_empty(lengths):
    rows = best_fit_pack([range(length) for length in lengths], 16)
    assert sum(2 * sum(lengths[number] for number in row) <= 16 for row in rows) <= 1


def test_a_sequence_goes_where_least_room_stays_free():
    # 7 and 6 open rows with 3 and 4 slots left; 3 fits best in the first, then 4 in the second.
    assert best_fit_pack([range(n) for n in (6, 7, 3, 4)], 10) == [[1, 2], [0, 3]]


# -- documents ------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(documents=sequences, context=st.integers(2, 17))
def test_packing_loses_no_token_and_no_target(documents, context):
    packed = pack_tokens(documents, context)
    found = pieces(everything(packed))
    tokens = Counter(itertools.chain(*documents))
    assert Counter(itertools.chain(*(piece for piece, _, _ in found))) == tokens
    targets = Counter(itertools.chain(*(document[1:] for document in documents)))
    assert targets == Counter(
        target
        for _, aims, mask in found
        for target, counts in zip(aims, mask, strict=True)
        if counts
    )
    assert packed.manifest.tokens == tokens.total()
    assert packed.manifest.targets == targets.total()
    assert packed.manifest.documents == len(documents)
    assert packed.waste == pytest.approx(1 - tokens.total() / (packed.rows * context))


@settings(max_examples=200, deadline=None)
@given(documents=sequences, context=st.integers(2, 17))
def test_every_piece_is_a_run_of_a_document_with_the_targets_that_follow(documents, context):
    expected = Counter()
    for document in documents:
        for start in range(0, len(document), context):
            piece = tuple(document[start : start + context])
            aims = tuple(document[start + 1 : start + context + 1])
            expected[piece, aims] += 1
    found = Counter()
    for piece, aims, mask in pieces(everything(pack_tokens(documents, context))):
        assert mask in ([True] * len(mask), [True] * (len(mask) - 1) + [False])
        found[tuple(piece), tuple(itertools.compress(aims, mask))] += 1
    assert found == expected


def test_documents_that_fit_are_batched_as_the_plain_record_does():
    documents = [[5, 6, 7, 8], [1, 2], [9]]
    plain = TokenBatch.of(documents)
    for row, document in enumerate(documents):
        packed = everything(pack_tokens([document], 4))
        for name in ("tokens", "positions", "documents", "mask"):
            assert torch.equal(getattr(packed, name)[0], getattr(plain, name)[row]), name
        mask = plain.mask[row]
        assert torch.equal(packed.targets[0][mask], plain.targets[row][mask])


def test_packing_is_deterministic_and_real_text_wastes_next_to_nothing(tokenizer):
    documents = standard_library().held_out
    packed = pack_documents(tokenizer, documents, 128)
    again = pack_documents(tokenizer, documents, 128)
    assert torch.equal(everything(packed).tokens, everything(again).tokens)
    assert packed.manifest == again.manifest
    assert packed.waste < 0.01
    batch = everything(packed)
    starts = batch.tokens[(batch.positions == 0) & (batch.documents >= 0)]
    assert int((starts == tokenizer.bos_id).sum()) == len(documents)
    assert int((batch.targets[batch.mask] == tokenizer.eos_id).sum()) == len(documents)
    assert packed.manifest.tokenizer == tokenizer.fingerprint()


def test_the_words_of_a_packed_document_can_be_read_back(tokenizer):
    packed = pack_documents(tokenizer, [Document("def f():\n\treturn '漢'\n", "a")], 64)
    batch = everything(packed)
    assert tokenizer.decode(batch.tokens[0][batch.documents[0] == 0].tolist()) == (
        "def f():\n\treturn '漢'\n"
    )


def test_large_vocabularies_keep_their_ids():
    packed = pack_tokens([[0, 70_000, 255_999], [65_536, 65_535]], 4)
    assert sorted(everything(packed).tokens.flatten().tolist())[-2:] == [70_000, 255_999]


def test_nothing_to_pack_is_refused(tokenizer):
    with pytest.raises(DataError, match="the corpus is empty"):
        pack_tokens([], 8)
    with pytest.raises(DataError, match="the corpus is empty"):
        pack_documents(tokenizer, [], 8)
    with pytest.raises(DataError, match="document 1 has no tokens"):
        pack_tokens([[1], []], 8)
    with pytest.raises(DataError, match="document 0 holds the token id -1"):
        pack_tokens([[1, -1]], 8)
    with pytest.raises(ConfigError, match="context must be at least 2"):
        pack_tokens([[1, 2]], 1)


def test_a_document_that_is_no_text_is_named(tokenizer):
    with pytest.raises(DataError, match=r"^b\.txt: .*lone surrogate"):
        pack_documents(tokenizer, [Document("fine", "a.txt"), Document("\ud800", "b.txt")], 8)


# -- chats ----------------------------------------------------------------------------------------


def chat(ids, mask):
    return ChatTokens(ids=tuple(ids), mask=tuple(mask), roles=(None,) * len(ids))


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(
        st.lists(st.tuples(st.integers(0, 99), st.booleans()), min_size=1, max_size=11),
        min_size=1,
        max_size=12,
    )
)
def test_chats_stay_whole_and_only_their_masked_tokens_are_targets(rows):
    chats = [
        chat([2, 7, *(i for i, _ in row)], [False, True, *(m for _, m in row)]) for row in rows
    ]
    expected = Counter(
        (each.ids, tuple(itertools.compress(each.ids[1:], each.mask[1:]))) for each in chats
    )
    found = Counter(
        (tuple(piece), tuple(itertools.compress(aims, mask)))
        for piece, aims, mask in pieces(everything(pack_chats(chats, 13)))
    )
    assert found == expected


def test_a_conversation_that_is_too_long_is_refused_by_name(tokenizer):
    fits = chat([1, 2, 3], [False, True, True])
    with pytest.raises(DataError, match="conversation 1 has 4 tokens, a row holds 3"):
        pack_chats([fits, chat([1, 2, 3, 4], [False, True, True, True])], 3)
    said = Conversation((Message("user", "hi " * 50), Message("model", "yes")), "rows.jsonl:7")
    with pytest.raises(DataError, match=r"^rows\.jsonl:7 has \d+ tokens, a row holds 16"):
        pack_conversations(tokenizer, [said], 16)


def test_a_conversation_with_nothing_to_learn_is_refused_by_name(tokenizer):
    said = Conversation((Message("user", "hi"),), "rows.jsonl:3")
    with pytest.raises(DataError, match=r"^rows\.jsonl:3 has no token to learn"):
        pack_conversations(tokenizer, [said], 64)
    system = Conversation((Message("system", "hi"),), "rows.jsonl:4")
    with pytest.raises(DataError, match=r"^rows\.jsonl:4: .*system"):
        pack_conversations(tokenizer, [system], 64)


def test_public_prompts_and_completions_are_packed_and_read_back(tokenizer, shared_data):
    chats = list(itertools.islice(read_chats(shared_data / "t0_mix" / "t0_mix.jsonl.gz"), 500))
    packed = pack_conversations(tokenizer, chats, 2048)
    assert packed.waste < 0.05
    answers = Counter(
        tokenizer.decode(list(itertools.compress(aims, mask)))
        for _, aims, mask in pieces(everything(packed))
    )
    assert answers == Counter(each.messages[1].content for each in chats)


# -- batches --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packed() -> Packed:
    generator = np.random.default_rng(0)
    return pack_tokens([generator.integers(0, 500, length) for length in range(1, 60)], 32)


def equal(first: TokenBatch, second: TokenBatch) -> bool:
    return all(torch.equal(vars(first)[name], vars(second)[name]) for name in vars(first))


@pytest.mark.parametrize("start", [1, 6, 7, 8, 30])
def test_starting_at_n_is_skipping_n_batches(packed, start):
    whole = itertools.islice(packed.batches(Key(3), 8), start, start + 9)
    resumed = itertools.islice(packed.batches(Key(3), 8, start=start), 9)
    assert all(equal(*pair) for pair in zip(whole, resumed, strict=True))


def test_every_epoch_reads_every_row_once_in_another_order(packed):
    # 5 rows at a time do not divide the rows: batches span epochs and still nothing is dropped.
    taken = 5 * packed.rows
    flat = [
        tuple(row.tolist())
        for batch in itertools.islice(packed.batches(Key(0), 5), packed.rows)
        for row in batch.tokens
    ]
    epochs = [flat[at : at + packed.rows] for at in range(0, taken, packed.rows)]
    rows = Counter(tuple(row.tolist()) for row in everything(packed).tokens)
    assert all(Counter(epoch) == rows for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5


def test_another_key_is_another_order(packed):
    first, second = (next(packed.batches(Key(seed), packed.rows)).tokens for seed in (0, 1))
    assert not torch.equal(first, second)


def test_a_batch_larger_than_the_rows_goes_on_into_the_next_epoch(packed):
    batch = next(packed.batches(Key(0), 2 * packed.rows + 3))
    assert batch.shape == (2 * packed.rows + 3, 32)


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_together_see_what_one_process_sees(packed, ranks):
    whole = itertools.islice(packed.batches(Key(5), 8, start=2), 6)
    parts = [
        itertools.islice(packed.batches(Key(5), 8, start=2, rank=rank, ranks=ranks), 6)
        for rank in range(ranks)
    ]
    for batch, *shares in zip(whole, *parts, strict=True):
        joined = {name: torch.cat([vars(each)[name] for each in shares]) for name in vars(batch)}
        assert equal(batch, TokenBatch(**joined))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size >= 1"),
        ({"batch_size": 4, "start": -1}, "start >= 0"),
        ({"batch_size": 4, "rank": 2, "ranks": 2}, "rank must lie in 0 to 1"),
        ({"batch_size": 4, "ranks": 3}, "cannot be shared equally by 3 ranks"),
    ],
)
def test_batches_that_cannot_be_are_refused_at_once(packed, arguments, message):
    with pytest.raises(ConfigError, match=message):
        packed.batches(Key(0), **arguments)


def test_rows_outside_are_refused(packed):
    for wrong in (-1, packed.rows):
        with pytest.raises(IndexError, match="rows go from 0"):
            packed.batch([0, wrong])


# -- on disk --------------------------------------------------------------------------------------


def test_rows_on_disk_are_the_rows_in_memory(packed, tmp_path):
    packed.save(tmp_path / "rows")
    loaded = Packed.load(tmp_path / "rows")
    assert loaded.manifest == packed.manifest
    assert equal(everything(loaded), everything(packed))
    pair = zip(packed.batches(Key(1), 4), loaded.batches(Key(1), 4), strict=False)
    assert all(equal(*both) for both in itertools.islice(pair, 20))
    assert sorted(each.name for each in (tmp_path / "rows").iterdir()) == [
        "manifest.json",
        "rows.safetensors",
    ]
    assert list(tmp_path.iterdir()) == [tmp_path / "rows"]


def test_a_mapped_batch_is_a_copy_that_may_be_written(packed, tmp_path):
    packed.save(tmp_path / "rows")
    batch = Packed.load(tmp_path / "rows").batch([0])
    for value in vars(batch).values():
        value.zero_()
    assert equal(Packed.load(tmp_path / "rows").batch([0]), packed.batch([0]))


def test_existing_data_is_not_overwritten(packed, tmp_path):
    (tmp_path / "rows").mkdir()
    packed.save(tmp_path / "rows")
    with pytest.raises(FolderError, match="exists already"):
        packed.save(tmp_path / "rows")


def test_any_flipped_byte_is_found_and_the_file_named(packed, tmp_path):
    packed.save(tmp_path / "rows")
    file = tmp_path / "rows" / "rows.safetensors"
    content = file.read_bytes()
    for place in (0, 9, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(DataError, match=r"rows\.safetensors is damaged"):
            Packed.load(tmp_path / "rows")
    file.write_bytes(content[:-1])
    with pytest.raises(DataError, match=r"rows\.safetensors is damaged"):
        Packed.load(tmp_path / "rows")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"context": 4}'])
def test_a_manifest_that_is_no_manifest_is_named(packed, tmp_path, content):
    packed.save(tmp_path / "rows")
    (tmp_path / "rows" / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=r"manifest\.json is damaged"):
        Packed.load(tmp_path / "rows")


def test_a_changed_number_in_the_manifest_is_found(packed, tmp_path):
    packed.save(tmp_path / "rows")
    file = tmp_path / "rows" / "manifest.json"
    file.write_text(file.read_text().replace('"documents": 59', '"documents": 58'))
    with pytest.raises(DataError, match=r"manifest\.json is damaged"):
        Packed.load(tmp_path / "rows")


@pytest.mark.parametrize("name", ["manifest.json", "rows.safetensors"])
def test_a_missing_file_is_named(packed, tmp_path, name):
    packed.save(tmp_path / "rows")
    (tmp_path / "rows" / name).unlink()
    with pytest.raises(FolderError, match=f"holds no {name}"):
        Packed.load(tmp_path / "rows")


def test_rows_of_another_tokenizer_are_refused(tokenizer):
    packed = pack_documents(tokenizer, [Document("text", "a")], 8)
    packed.check_tokenizer(tokenizer.fingerprint())
    with pytest.raises(TokenizerMismatch, match="were packed with tokenizer"):
        packed.check_tokenizer("0" * 64)


def test_eos_that_is_padding_is_refused_before_packing(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"pad_token": "<eos>"}))
    loaded = Tokenizer.load(tmp_path)
    with pytest.raises(TokenizerMismatch, match="EOS and PAD"):
        pack_documents(loaded, [Document("text", "a")], 8)
    with pytest.raises(TokenizerMismatch, match="EOS and PAD"):
        pack_conversations(loaded, [], 8)
