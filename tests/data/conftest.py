"""A small tokenizer of real source, trained once for all tests of the room."""

import pytest

from cabochon.data.corpus import standard_library
from cabochon.data.tokenizer import Tokenizer, train_tokenizer


@pytest.fixture(scope="session")
def source_texts() -> list[str]:
    """About 300 kB of the standard library."""
    names = {"argparse.py", "ast.py", "bisect.py", "json/decoder.py", "heapq.py", "textwrap.py"}
    return [each.text for each in standard_library().train if each.source in names]


@pytest.fixture(scope="session")
def tokenizer(source_texts: list[str]) -> Tokenizer:
    return train_tokenizer(source_texts, 1024)
