"""Pairs of answers: the forms they come in, what is refused and where, and their rows."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from cabochon.core import Key
from cabochon.core.errors import ConfigError, DataError
from cabochon.data.chat import Message
from cabochon.data.preferences import (
    Pairs,
    PairTokens,
    encode_pair,
    pair_of,
    read_pairs,
    with_flipped,
)
from cabochon.data.tokenizer import Tokenizer, train_tokenizer

USER, GOOD, BAD = "What is 2+2?", "It is 4.", "It is 5."


def said(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([USER, GOOD, BAD, "user\nmodel\n"], 280)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": USER, "chosen": GOOD, "rejected": BAD},
        {
            "prompt": said(("user", USER)),
            "chosen": said(("assistant", GOOD)),
            "rejected": said(("assistant", BAD)),
        },
        {
            "prompt": USER,
            "chosen": said(("user", USER), ("assistant", GOOD)),
            "rejected": said(("user", USER), ("assistant", BAD)),
        },
        {
            "chosen": said(("user", USER), ("model", GOOD)),
            "rejected": said(("user", USER), ("model", BAD)),
        },
        {
            "chosen": f"\n\nHuman: {USER}\n\nAssistant: {GOOD}",
            "rejected": f"\n\nHuman: {USER}\n\nAssistant: {BAD}",
        },
    ],
)
def test_every_form_is_the_same_pair(row: dict[str, Any]) -> None:
    pair = pair_of(row, "f:1")
    assert pair.prompt == (Message("user", USER),)
    assert (pair.chosen, pair.rejected) == (GOOD, BAD)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": USER, "chosen": GOOD, "rejected": GOOD}, "both answers are the same"),
        ({"prompt": USER, "chosen": GOOD, "rejected": " \n"}, "'rejected' is empty"),
        ({"prompt": USER, "chosen": "", "rejected": BAD}, "'chosen' is empty"),
        ({"prompt": " ", "chosen": GOOD, "rejected": BAD}, "the prompt is empty"),
        ({"prompt": USER, "chosen": GOOD}, "no field 'rejected'"),
        ({"chosen": GOOD, "rejected": BAD}, "there is no prompt"),
        ({"prompt": USER, "chosen": 3, "rejected": BAD}, "'chosen' is int"),
        (
            {
                "chosen": said(("user", "A?"), ("model", GOOD)),
                "rejected": said(("user", "B?"), ("model", BAD)),
            },
            r"different prompts \('A\?' and 'B\?'\)",
        ),
        (
            {
                "prompt": USER,
                "chosen": said(("user", "A?"), ("model", GOOD)),
                "rejected": said(("user", USER), ("model", BAD)),
            },
            "'chosen' answers another prompt",
        ),
        (
            {"chosen": said(("user", USER)), "rejected": said(("user", USER), ("model", BAD))},
            "does not end with a turn of the model",
        ),
        (
            {"prompt": USER, "chosen": [{"role": "model"}], "rejected": BAD},
            "message 0 of 'chosen' has no strings",
        ),
    ],
)
def test_what_is_no_pair_is_refused_with_file_and_line(
    row: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    path = tmp_path / "pairs.jsonl"
    fine = {"prompt": USER, "chosen": GOOD, "rejected": BAD}
    path.write_text(json.dumps(fine) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(DataError, match=rf"pairs\.jsonl:2: .*{problem}"):
        list(read_pairs(path))


def test_tokens_are_prompt_and_answers_with_their_ends(tokenizer: Tokenizer) -> None:
    pair = pair_of({"prompt": USER, "chosen": GOOD, "rejected": BAD}, "f:1")
    chat = encode_pair(tokenizer, pair)
    assert tokenizer.decode(chat.prompt) == f"user\n{USER}\nmodel\n"
    assert chat.chosen == (*tokenizer.encode(GOOD), tokenizer.end_of_turn_id)
    plain = encode_pair(tokenizer, pair, plain=True)
    assert plain.prompt == (tokenizer.bos_id, *tokenizer.encode(USER))
    assert plain.rejected == (*tokenizer.encode(BAD), tokenizer.eos_id)
    several = pair_of(
        {
            "prompt": said(("user", "Hi."), ("model", "Hello."), ("user", USER)),
            "chosen": GOOD,
            "rejected": BAD,
        },
        "f:7",
    )
    assert encode_pair(tokenizer, several).chosen == chat.chosen
    with pytest.raises(DataError, match="f:7: a plain text is one prompt"):
        encode_pair(tokenizer, several, plain=True)


def test_a_pair_is_two_rows_and_answers_count() -> None:
    pair = PairTokens(prompt=(1, 2), chosen=(3, 4, 5), rejected=(6,), source="f:1")
    batch = Pairs.rows([pair, pair.flipped()])
    good, bad = [1, 2, 3, 4, 5], [1, 2, 6, 0, 0]
    assert batch.tokens.tolist() == [good, bad, bad, good]
    counted = [batch.targets[row][batch.mask[row]].tolist() for row in range(4)]
    assert counted == [[3, 4, 5], [6], [6], [3, 4, 5]]


def test_batches_resume_share_among_ranks_and_lose_nothing() -> None:
    some = [PairTokens(prompt=(9,), chosen=(n,), rejected=(100 + n,), source="") for n in range(7)]
    pairs, key = Pairs(some), Key(3)
    whole = list(islice(pairs.batches(key, 4), 7))
    seen = torch.cat([batch.tokens[::2, 1] for batch in whole])
    assert sorted(seen.tolist()) == sorted([*range(7), *range(7)])
    resumed = list(islice(pairs.batches(key, 4, start=3), 4))
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(whole[3:], resumed, strict=True))
    ranks = [next(pairs.batches(key, 4, rank=rank, ranks=2)).tokens for rank in (0, 1)]
    assert torch.equal(torch.cat(ranks), whole[0].tokens)
    with pytest.raises(ConfigError, match="must be even"):
        pairs.batches(key, 3)


def test_exactly_the_share_is_flipped_by_the_key_alone() -> None:
    some = [PairTokens(prompt=(9,), chosen=(n,), rejected=(n + 1,), source="") for n in range(403)]
    flipped = with_flipped(some, 0.25, Key(5))
    changed = [at for at, pair in enumerate(flipped) if pair != some[at]]
    assert len(changed) == 101  # 25% of 403
    assert flipped == with_flipped(some, 0.25, Key(5))
    assert flipped != with_flipped(some, 0.25, Key(6))
    assert with_flipped(some, 0.0, Key(5)) == some


def test_the_public_pairs_are_read(shared_data: Path) -> None:
    count, problems = 0, []
    from cabochon.data.readers import read_records

    for record in read_records(shared_data / "hh_harmless/pairs.jsonl.gz"):
        try:
            pair = pair_of(record.values, record.source)
        except DataError as error:
            problems.append(str(error))
        else:
            count += 1
            assert pair.prompt[-1].role == "user"
    assert count + len(problems) == 1612
    assert count > 1550, problems[:5]


def test_rows_of_questions_and_answers_are_conversations(shared_data: Path) -> None:
    from cabochon.data.readers import read_chats

    first = next(iter(read_chats(shared_data / "gsm8k/train.jsonl.gz")))
    assert [message.role for message in first.messages] == ["user", "model"]
    assert first.messages[1].content.endswith("#### 72")
