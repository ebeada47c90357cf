"""What can be verified of a text: it parses, says one sentence, matches, is the number."""

from __future__ import annotations

import time
from fractions import Fraction
from pathlib import Path

import pytest
from reward_groups import decode, group

from cabochon.core.errors import ConfigError, DataError
from cabochon.data.readers import read_records
from cabochon.rewards.checks import answer_number, documented, equals, matches, number_in, parses
from cabochon.rewards.scores import scores
from cabochon.rewards.texts import judged


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("def f(x):\n    return x", 1.0),
        ("    x = 1\n    y = 2", 1.0),  # a body, indented as a whole
        ("Here it is:\n```python\nx = 1\n```\nDone.", 1.0),
        ("```\nx = 1", 1.0),  # a fence that the length limit left open
        ("def f(x:\n    return x", 0.0),
        ("Here it is: x = 1", 0.0),
        ("", 0.0),
        ("# only a remark", 0.0),
        ("x = '\\d'", 1.0),  # an old escape is a warning, and none of ours
        ("x = 1\0", 0.0),
        ("(" * 5000, 0.0),
        ("-" * 100_000 + "1", 0.0),
    ],
)
def test_parses_is_whether_there_is_python(code: str, expected: float) -> None:
    assert parses()("", code) == expected


def test_a_prompt_may_begin_the_code() -> None:
    assert parses(with_prompt=True)("def f(x):\n", "    return x\n") == 1.0
    assert parses()("def f(x):\n", "    return x +\n") == 0.0


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("The square of x.", 1.0),
        ("The square of x, e.g. 4 of 2.", 1.0),
        ("Is x even?", 1.0),
        ("The square\n    of x.", 1.0),
        ("The square of x", 0.0),
        ("The square of x. It is never negative.", 0.0),
        ("The square of x.\n\n    More.", 0.0),
        ("Square.", 0.0),
        ("", 0.0),
    ],
)
def test_a_docstring_is_one_sentence(docstring: str, expected: float) -> None:
    code = f'def f(x):\n    """{docstring}"""\n    return x * x\n'
    assert documented()("", code) == expected
    head, body = code.split("\n", 1)
    assert documented(with_prompt=True)(head + "\n", body) == expected


def test_code_without_a_function_or_a_docstring_is_not_documented() -> None:
    assert documented()("", "x = 1") == 0.0
    assert documented()("", "def f():\n    return 1") == 0.0
    assert documented()("", 'def f(:\n    """A sentence here."""') == 0.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("#### 42", 42),
        ("#### 1,000", 1000),
        ("#### 1000", 1000),
        ("#### $1,234.50", Fraction("1234.5")),
        ("#### -$5", -5),
        ("#### $-5", -5),
        ("#### \u22125", -5),
        ("#### 42 apples", 42),
        ("#### 42.\nThat was 7 easy steps", 42),
        ("#### 50%", 50),
        ("#### 3/4", Fraction(3, 4)),
        ("#### .5", Fraction(1, 2)),
        ("first #### 1 then #### 2", 2),
        ("so 10 - 3 = 7 in all, 7.", 7),
        ("The answer is 1,000,000", 1_000_000),
        ("10-3=7", 7),
        ("no number at all", None),
        ("####", None),
        ("version v2.0", None),
        ("7" * 5000, None),
        ("1/0", None),
        ("#### -3.5e2", -350),
        ("#### 1\u202f000", 1000),
        ("#### 1e1000", None),
        ("#### 1.000.000", None),
        ("#### 1,5", None),
        ("on 1/2/2026", None),
        ("1/2.5", None),
        ("it is 3.", 3),
    ],
)
def test_the_answer_of_a_solution(text: str, expected: Fraction | None) -> None:
    assert answer_number(text) == expected


def test_without_the_mark_a_marked_answer_is_none() -> None:
    assert answer_number("so 42", marked=True) is None
    assert number_in("1 2 3") == 1


def test_every_reference_of_gsm8k_has_the_number_behind_its_mark(shared_data: Path) -> None:
    rows = [each.values["answer"] for each in read_records(shared_data / "gsm8k/train.jsonl.gz")]
    for answer in rows:
        written = answer.rpartition("#### ")[2].replace(",", "")
        assert answer_number(answer, marked=True) == Fraction(written)
    assert len(rows) == 7473


def test_an_answer_equals_its_prompts_number_and_an_unknown_prompt_is_named() -> None:
    reward = judged(equals({"2+2": Fraction(4)}), decode)
    found = scores(reward, [group("2+2", "#### 4", "#### 5", "4.0")]).total
    assert found.tolist() == [[1.0, 0.0, 1.0]]
    with pytest.raises(DataError, match=r"no answer is known.*prompt 0, sample 0: '3\+3'"):
        scores(reward, [group("3+3", "#### 6", "7")])


def test_matching_looks_anywhere_and_a_bad_expression_is_refused() -> None:
    assert matches(r"^\d+$")("", "42") == 1.0
    assert matches(r"b.d")("", "ab\nd") == 1.0
    assert matches(r"^\d+$")("", "a42") == 0.0
    with pytest.raises(ConfigError, match="no regular expression"):
        matches("(")


def test_a_reward_that_answers_whatever_goes_wrong_does_not_answer_a_time_out() -> None:
    def forgiving(_prompt: str, _completion: str) -> float:
        try:
            time.sleep(30.0)
        except Exception:
            return 0.0
        return 1.0

    slow = judged(forgiving, decode, timeout_s=0.1)
    with pytest.raises(DataError, match="longer than"):
        scores(slow, [group("one", "a", "bb")])


def test_a_judgement_that_hangs_is_ended_and_names_the_sample() -> None:
    endless = judged(matches(r"(a+)+$"), decode, timeout_s=0.2)
    begin = time.monotonic()
    with pytest.raises(DataError, match=r"longer than 0.2 s at prompt 1, sample 0: 'q' -> 'aaaa"):
        scores(endless, [group("p", "a"), group("q", "a" * 60 + "b")])
    assert time.monotonic() - begin < 5.0


def test_a_judgement_that_fails_or_is_no_number_names_and_quotes_the_sample() -> None:
    def fails(_prompt: str, text: str) -> float:
        return 1.0 / len(text)

    with pytest.raises(DataError, match=r"ZeroDivisionError.*prompt 0, sample 1: 'p' -> ''"):
        scores(judged(fails, decode), [group("p", "x", "")])
    with pytest.raises(DataError, match=r"gave 'good' at prompt 0, sample 0"):
        scores(judged(lambda _p, _c: "good", decode), [group("p", "x")])  # type: ignore[arg-type,return-value]
