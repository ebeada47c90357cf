"""Rewards that can be verified: the text parses, says it in one sentence, matches, is the number.

Each is a judge of (prompt, completion): 1 where it holds, 0 where not. Nothing of what a model
wrote is ever run.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
import warnings
from collections.abc import Callable, Mapping
from fractions import Fraction

from cabochon.core.errors import ConfigError, DataError
from cabochon.rewards.texts import Judge

__all__ = ["answer_number", "code_of", "documented", "equals", "matches", "number_in", "parses"]

_FENCED = re.compile(r"^```[^\n`]*\n(.*?)(?:^```\s*$|\Z)", re.DOTALL | re.MULTILINE)

_SENTENCE_END = re.compile(r"(?<!e\.g)(?<!i\.e)(?<!etc)(?<!vs)[.!?][\"')\]]*(?=\s|$)")

_NUMBER = re.compile(
    r"(?<![\w./])(?<!\d,)[-\u2212+]?[$\u20ac\u00a3]?"  # a sign, a currency
    r"(?P<number>[-\u2212]?(?:(?>\d{1,3}(?:[,\u00a0\u2009\u202f]\d{3})+(?!\d)|\d+)(?:\.\d+)?+|\.\d++)"
    r"(?:[eE][-+]?\d{1,3}(?!\d))?+)"
    r"(?![.,]\d|[eE][-+]?\d)"  # 1.000.000, 1,5 and the like are no one number
    r"(?:\s?/\s?(?P<below>\d++)(?!/|[.,]\d))?+(?!\s?/\s?\.?\d)"
)
_MARK = "####"
"""Behind it GSM8K writes the answer."""

LONGEST_NUMBER = 400
"""Digits; a model that repeats itself writes longer ones, which Python refuses to read."""


def parses(*, with_prompt: bool = False) -> Judge:
    """Whether the completion is Python that parses and holds at least one statement.

    Code between Markdown's fences is taken out of them first.

    Args:
        with_prompt: judge prompt and completion as one text: the prompt begins the code.
    """
    return lambda prompt, completion: float(bool(_body(_joined(prompt, completion, with_prompt))))


def documented(*, with_prompt: bool = False) -> Judge:
    """Whether the code parses and its first function has a docstring of exactly one sentence.

    A sentence has two words or more and ends in a full stop, a question or an exclamation mark.
    """

    def judge(prompt: str, completion: str) -> float:
        for statement in _body(_joined(prompt, completion, with_prompt)):
            for node in ast.walk(statement):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    return float(_is_sentence(ast.get_docstring(node) or ""))
        return 0.0

    return judge


def matches(expression: str) -> Judge:
    """Whether the regular expression is found in the completion; ^ and $ are the text's ends.

    Raises:
        ConfigError: it is no regular expression.
    """
    try:
        compiled = re.compile(expression, re.DOTALL)
    except re.error as error:
        raise ConfigError(f"{expression!r} is no regular expression: {error}") from error
    return lambda _prompt, completion: float(compiled.search(completion) is not None)


def equals(
    answer: Callable[[str], Fraction | None] | Mapping[str, Fraction], *, marked: bool = False
) -> Judge:
    """Whether the completion's answer is the number that belongs to its prompt.

    Args:
        answer: prompt -> the right number; or a mapping of the prompts.
        marked: the number must stand behind `####`; else the last number of the text serves where
            there is no such mark.

    Returns:
        A judge that raises DataError where nothing is known of a prompt.
    """
    known = answer.get if isinstance(answer, Mapping) else answer

    def judge(prompt: str, completion: str) -> float:
        wanted = known(prompt)
        if wanted is None:
            raise DataError("no answer is known for the prompt; the data must give each a number")
        found = answer_number(completion, marked=marked)
        return float(found is not None and found == wanted)

    return judge


def answer_number(text: str, *, marked: bool = False) -> Fraction | None:
    """The number that a worked solution ends with; None where there is none.

    Behind the last `####` the first number counts, whatever unit stands about it (`#### 42`,
    `#### $1,000`, `#### 42 apples`); without the mark the last number of the text.

    Args:
        text: the solution.
        marked: without the mark there is no answer.
    """
    _, mark, behind = text.rpartition(_MARK)
    if mark:
        return number_in(behind.strip().partition("\n")[0])
    return None if marked else number_in(text, last=True)


def number_in(text: str, *, last: bool = False) -> Fraction | None:
    """The first (or last) number of a text, exactly; None where there is none.

    1,000 is 1000, 0.50 is 1/2, 1.5e3 is 1500, and 3/4 is itself; percent signs and units are left
    aside. What can be read as different numbers (1,5 or 1.000.000) is none.
    """
    found = list(_NUMBER.finditer(text))
    if not found:
        return None
    chosen = found[-1 if last else 0]
    digits = re.sub("[,\u00a0\u2009\u202f]", "", chosen["number"]).replace("\u2212", "-")
    if len(digits) > LONGEST_NUMBER:
        return None
    before = chosen.group()[: chosen.start("number") - chosen.start()]
    value = Fraction(digits)
    if "-" in before or "\u2212" in before:
        value = -value
    below = int((chosen["below"] or "1")[:LONGEST_NUMBER])
    return value / below if below else None


def code_of(text: str) -> str:
    """The first block between Markdown's fences, or the whole text, without common indentation."""
    fenced = _FENCED.search(text)
    return textwrap.dedent(fenced.group(1) if fenced else text)


def _joined(prompt: str, completion: str, with_prompt: bool) -> str:
    return textwrap.dedent(prompt + completion) if with_prompt else code_of(completion)


def _body(code: str) -> list[ast.stmt]:
    """The statements; none where the code does not parse."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes and the like, which are the model's business
        try:
            return ast.parse(code).body
        except (SyntaxError, ValueError, RecursionError, MemoryError):  # each is said of bad code
            return []


def _is_sentence(docstring: str) -> bool:
    text = inspect.cleandoc(docstring)
    if re.search(r"\n\s*\n", text):
        return False
    line = " ".join(text.split())
    end = _SENTENCE_END.search(line)
    return end is not None and end.end() == len(line) and len(line.split()) >= 2
