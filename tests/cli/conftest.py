"""A small workshop on disk: real text, a real tokenizer, a trained model, made once."""

from __future__ import annotations

import pytest
from workshop import Workshop, call, texts, write_jsonl


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    folder = tmp_path_factory.mktemp("workshop")
    corpus = write_jsonl(folder / "corpus.jsonl", [{"text": text} for text in texts()])
    sums = [(f"{a}+{b}", str(a + b)) for a in range(4) for b in range(4)]
    roles = ("user", "model")
    rows = [
        {"messages": [{"role": r, "content": c} for r, c in zip(roles, pair, strict=True)]}
        for pair in sums
    ]
    chats = write_jsonl(folder / "chats.jsonl", rows)
    done = call("data", "tokenizer", "--data", corpus, "--vocab-size", 400, "--out", folder / "tok")
    assert done.code == 0, done.err
    shop = Workshop(corpus, chats, folder / "tok", folder / "run")
    done = shop.train("--out", shop.run)
    assert done.code == 0, done.err
    return shop
