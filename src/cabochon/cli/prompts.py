"""From the names in `--data` to prompts, each in a row of its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cache, partial
from itertools import chain

from cabochon.cli.checks import Check
from cabochon.cli.drawing import Drawn
from cabochon.cli.output import say
from cabochon.cli.rows import chats_of, is_packed, refuse_repeated
from cabochon.cli.settings import RunSettings
from cabochon.core.errors import CabochonError, ConfigError, DataError
from cabochon.data.chat import Message, decode_prompt
from cabochon.data.prompts import Prompt, PromptRows, prompts_in, text_prompt
from cabochon.data.readers import Conversation, read_chats
from cabochon.data.tokenizer import Tokenizer
from cabochon.rewards.texts import Turns

__all__ = ["examine", "prompt_rows", "prompts_of_source", "too_long", "turns_of"]


def prompt_rows(
    run: RunSettings, tokenizer: Tokenizer, *, plain: bool, room: int, answered: bool
) -> PromptRows:
    """The prompts of `run.data`.

    Args:
        run: names the data; what is longer than its `context` is treated as `too_long` says.
        tokenizer: of the student.
        plain: prompts are beginnings of texts.
        room: tokens that a prompt must leave free in a row for what is drawn after it.
        answered: each prompt needs a completion.

    Raises:
        DataError: the data cannot be read, do not fit, or lack completions; file and line are
            named.
        ConfigError: packed rows or weights, which say nothing about prompts.
    """
    refuse_repeated(run.data)
    if run.weights or any(map(is_packed, run.data)):
        raise ConfigError(
            "prompts come from files of prompts or conversations, all alike; --weights and packed "
            "rows are for pretrain and sft"
        )
    kept, dropped = [], 0
    for each in chain.from_iterable(
        prompts_of_source(name, tokenizer, plain=plain) for name in run.data
    ):
        if answered and not each.completion:
            raise DataError(
                f"{each.source}: nothing is said after the last prompt, and the data's completions "
                "are to be learned; take it out, or set --on-policy-fraction 1"
            )
        problem = too_long(each, run, room=room)
        if problem and run.too_long == "refuse":
            raise DataError(
                f"{each.source}: {problem}; raise --context, take it out, or leave out all such "
                "with --too-long drop"
            )
        if problem:
            dropped += 1
        else:
            kept.append(each)
    if dropped:
        say(f"left out {dropped:,} prompts too long for rows of {run.context}; {len(kept):,} stay")
    return PromptRows(kept)


def prompts_of_source(name: str, tokenizer: Tokenizer, *, plain: bool) -> Iterator[Prompt]:
    """The prompts that a name in `--data` means.

    Raises:
        DataError: they cannot be read; file and line are named.
    """
    for each in _conversations(name):
        if plain:
            yield text_prompt(tokenizer, each)
        else:
            yield from prompts_in(tokenizer, each)


def turns_of(tokenizer: Tokenizer, data: Sequence[str]) -> Turns:
    """What finds the conversation that a prompt's tokens are of.

    Gemma's turns are read from the tokens. What another family's template wrote cannot be, so it
    is looked up among the prompts of `data`.
    """
    if tokenizer.start_of_turn_id is not None and tokenizer.end_of_turn_id is not None:
        return partial(decode_prompt, tokenizer)

    @cache
    def known() -> dict[tuple[int, ...], Sequence[Message]]:
        found: dict[tuple[int, ...], Sequence[Message]] = {}
        for each in chain.from_iterable(map(_conversations, data)):
            turns = each.messages
            ends = [at for at, said in enumerate(turns) if said.role in ("model", "assistant")]
            if turns and turns[-1].role == "user":
                ends.append(len(turns))
            for prompt, end in zip(prompts_in(tokenizer, each), ends, strict=True):
                found[prompt.ids] = turns[:end]
        return found

    def turns(ids: Sequence[int]) -> Sequence[Message]:
        try:
            return known()[tuple(ids)]
        except KeyError:
            raise DataError("it is no prompt of the data, whose turns would be known") from None

    return turns


def _conversations(name: str) -> Iterable[Conversation]:
    return chats_of(name) if name == "stdlib" else read_chats(name, answered=False)


def too_long(prompt: Prompt, run: RunSettings, *, room: int) -> str | None:
    """What does not fit into a row; None where all does."""
    length, after = len(prompt.ids), len(prompt.completion) + len(prompt.trailing)
    if length + room > run.context:
        return (
            f"a prompt of {length} tokens leaves no room for {room} new ones in a row of "
            f"{run.context}: lower --max-new-tokens"
        )
    if length + after > run.context:
        return f"prompt and completion have {length + after} tokens, a row holds {run.context}"
    return None


def examine(
    name: str,
    run: RunSettings,
    tokenizer: Tokenizer,
    *,
    plain: bool,
    room: int,
    answered: bool,
    stop_ids: Sequence[int],
) -> tuple[list[Check], list[Drawn]]:
    """What the doctor finds in the prompts of a name, and the first of them to be drawn.

    Arguments: see `prompt_rows`; `stop_ids` are the tokens that may end a completion.
    """
    title = f"prompts of {name}"
    try:
        found = list(prompts_of_source(name, tokenizer, plain=plain))
    except CabochonError as error:
        return [Check(name=title, well=False, text=str(error))], []
    completed = [each for each in found if each.completion]
    problems = [(each, too_long(each, run, room=room)) for each in found]
    long = [f"{each.source}: {problem}" for each, problem in problems if problem]
    text = (
        f"{len(found):,} prompts, the longest of {max(len(each.ids) for each in found):,} tokens; "
        f"{len(completed):,} have a completion"
    )
    if long:
        text += f"; {len(long):,} do not fit ({long[0]})"
        text += ": left out" if run.too_long == "drop" else ": raise --context or --too-long drop"
    bare = next((each.source for each in found if not each.completion), None)
    if answered and bare:
        text += f"; completions are to be learned, but {bare} has none"
    well = (not long or run.too_long == "drop") and not (answered and bare)
    bos = sum(each.ids.count(tokenizer.bos_id or 0) == 1 for each in found)
    ended = sum(each.completion[-1] in stop_ids for each in completed)
    markers = f"{bos:,} of {len(found):,} prompts have one BOS; {ended:,} of {len(completed):,} "
    checks = [
        Check(name=title, well=well, text=text),
        Check(
            name=f"markers in {name}",
            well=(tokenizer.bos_id is None or bos == len(found)) and ended == len(completed),
            text=markers + "completions end in a token that stops the student",
        ),
    ]
    first = completed[0] if completed else found[0]
    learned = [False] * len(first.ids) + [True] * len(first.completion)
    return checks, [Drawn(ids=(*first.ids, *first.completion), learned=tuple(learned))]
