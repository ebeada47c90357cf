"""Prompts and their completions: what is read, what is said, and in which order they come."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch

from cabochon.core import Key
from cabochon.core.errors import DataError
from cabochon.data.chat import Message, encode_chat, encode_prompt
from cabochon.data.continuations import prompts_of, references_of
from cabochon.data.prompts import Prompt, PromptRows, prompts_in, text_prompt
from cabochon.data.readers import Conversation, read_chats
from cabochon.data.tokenizer import Tokenizer, train_tokenizer

TALK = (
    Message("user", "What is 2 + 2?"),
    Message("model", "It is 4."),
    Message("user", "And twice that?"),
    Message("assistant", "8"),
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["What is 2 + 2? It is 4. And twice that? 8 user model\n"] * 5, 300)


def test_every_model_turn_is_a_completion_of_what_stands_before_it(tokenizer: Tokenizer) -> None:
    first, second = prompts_in(tokenizer, Conversation(TALK, "x:1"))
    end = tokenizer.control("end_of_turn")
    assert list(first.ids) == encode_prompt(tokenizer, TALK[:1])
    assert list(second.ids) == encode_prompt(tokenizer, TALK[:3])
    for prompt, said in ((first, "It is 4."), (second, "8")):
        assert prompt.completion[-1] == end
        assert tokenizer.decode(prompt.completion[:-1]) == said
    whole = encode_chat(tokenizer, TALK)
    assert (*second.ids, *second.completion, *second.trailing) == whole.ids


def test_what_counts_is_what_sft_learns_of_the_same_turn(tokenizer: Tokenizer) -> None:
    (prompt,) = prompts_in(tokenizer, Conversation(TALK[:2], "x:1"))
    chat = encode_chat(tokenizer, TALK[:2])
    batch = PromptRows.batch([prompt])
    assert batch.tokens[0].tolist() == list(chat.ids)
    assert batch.mask[0].tolist() == [*chat.mask[1:], False]
    assert prompts_of(batch)[0].tolist() == list(prompt.ids)
    (reference,) = references_of(batch, {tokenizer.control("end_of_turn")}, [0])
    assert reference.tokens[reference.counts].tolist() == list(prompt.completion)
    assert reference.stopped


def test_a_last_user_turn_is_a_prompt_alone(tokenizer: Tokenizer) -> None:
    answered, alone = prompts_in(tokenizer, Conversation(TALK[:3], "x:1"))
    assert answered.completion
    assert alone.completion == ()
    assert list(alone.ids) == encode_prompt(tokenizer, TALK[:3])


def test_plain_text_has_no_template(tokenizer: Tokenizer) -> None:
    prompt = text_prompt(tokenizer, Conversation(TALK[:2], "x:1"))
    assert prompt.ids == (tokenizer.control("bos"), *tokenizer.encode("What is 2 + 2?"))
    assert prompt.completion == (*tokenizer.encode("It is 4."), tokenizer.control("eos"))
    assert text_prompt(tokenizer, Conversation(TALK[:1], "x:1")).completion == ()
    with pytest.raises(DataError, match="x:1: a plain text is a prompt and perhaps"):
        text_prompt(tokenizer, Conversation(TALK, "x:1"))


def test_batches_are_endless_seekable_and_shared_by_ranks() -> None:
    rows = PromptRows([Prompt((5, number), (6, 1), "") for number in range(7, 12)])
    key = Key(3)
    whole = [batch.tokens for batch in islice(rows.batches(key, 4), 6)]
    later = [batch.tokens for batch in islice(rows.batches(key, 4, start=2), 4)]
    assert all(torch.equal(a, b) for a, b in zip(whole[2:], later, strict=True))
    shares = [list(islice(rows.batches(key, 4, rank=rank, ranks=2), 3)) for rank in range(2)]
    for number in range(3):
        both = torch.cat([shares[0][number].tokens, shares[1][number].tokens])
        assert torch.equal(both, whole[number])
    epoch = torch.cat(whole)[:5, 1].tolist()
    assert sorted(epoch) == [7, 8, 9, 10, 11]
    with pytest.raises(DataError, match="there is no prompt"):
        PromptRows([])


def test_prompts_without_completions_are_read_where_that_is_asked(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b", "completion": "c"}\n')
    found = list(read_chats(path, answered=False))
    assert [len(each.messages) for each in found] == [1, 2]
    with pytest.raises(DataError, match=r"prompts\.jsonl:1"):
        list(read_chats(path))
