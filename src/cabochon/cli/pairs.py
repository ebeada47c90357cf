"""From the names in `--data` to pairs of answers, each of which is two rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cabochon.cli.checks import Check
from cabochon.cli.drawing import Drawn
from cabochon.cli.output import say
from cabochon.cli.rows import is_packed, refuse_repeated
from cabochon.cli.settings import RunSettings
from cabochon.core.errors import CabochonError, ConfigError, DataError
from cabochon.data.preferences import Pairs, PairTokens, encoded_pairs
from cabochon.data.tokenizer import Tokenizer

__all__ = ["PairSettings", "examine_pairs", "pair_rows"]


@dataclass(frozen=True, kw_only=True)
class PairSettings:
    """How pairs of answers are read."""

    plain: bool = False
    """Prompts and answers are plain texts, not turns of a conversation."""
    unusable: Literal["refuse", "drop"] = "refuse"
    """Rows that are no pairs (equal or empty answers, different prompts): refuse the first, or
    drop them all and say how many."""


def pair_rows(run: RunSettings, pairs: PairSettings, tokenizer: Tokenizer) -> Pairs:
    """The pairs of `run.data`.

    Raises:
        DataError: they cannot be read, are no pairs or do not fit; file and line are named.
        ConfigError: packed rows or weights, which say nothing about pairs; an odd batch size.
    """
    refuse_repeated(run.data)
    if run.weights or any(is_packed(name) or name == "stdlib" for name in run.data):
        raise ConfigError(
            "preferences come from files of pairs with 'chosen' and 'rejected', all alike; "
            "--weights, packed rows and stdlib are for other trainings"
        )
    if run.batch_size % 2:
        raise ConfigError(
            f"a pair is two rows of a batch: --batch-size must be even, got {run.batch_size}"
        )
    kept: list[PairTokens] = []
    unusable: list[str] = []
    long = 0
    for name in run.data:
        noting = unusable if pairs.unusable == "drop" else None
        for pair in encoded_pairs(name, tokenizer, plain=pairs.plain, unusable=noting):
            if pair.longest <= run.context:
                kept.append(pair)
            elif run.too_long == "drop":
                long += 1
            else:
                raise DataError(
                    f"{pair.source}: a prompt with its answer has {pair.longest} tokens, a row "
                    f"holds {run.context}; raise --context, take it out, or leave out all such "
                    "with --too-long drop"
                )
    if unusable:
        say(f"left out {len(unusable):,} rows that are no pairs ({unusable[0]})")
    if long:
        say(f"left out {long:,} pairs longer than {run.context} tokens; {len(kept):,} stay")
    return Pairs(kept)


def examine_pairs(
    run: RunSettings, pairs: PairSettings, tokenizer: Tokenizer, name: str
) -> tuple[list[Check], list[Drawn]]:
    """What the doctor finds in the pairs of a name, and the first of them to be drawn."""
    title = f"pairs of {name}"
    unusable: list[str] = []
    try:
        found = list(encoded_pairs(name, tokenizer, plain=pairs.plain, unusable=unusable))
    except CabochonError as error:
        return [Check(name=title, well=False, text=str(error))], []
    if not found:
        said = unusable[0] if unusable else "there is none"
        return [Check(name=title, well=False, text=f"no pair: {said}")], []
    long = [each for each in found if each.longest > run.context]
    text = f"{len(found):,} pairs, the longest row of {max(e.longest for e in found):,} tokens"
    if unusable:
        left = ": left out" if pairs.unusable == "drop" else ": take out, or --unusable drop"
        text += f"; {len(unusable):,} rows are no pairs ({unusable[0]}){left}"
    if long:
        left = ": left out" if run.too_long == "drop" else ": raise --context or --too-long drop"
        text += f"; {len(long):,} do not fit ({long[0].source}){left}"
    longer = sum(len(each.chosen) > len(each.rejected) for each in found)
    well = (not unusable or pairs.unusable == "drop") and (not long or run.too_long == "drop")
    share = longer / len(found)
    checks = [
        Check(name=title, well=well, text=text),
        Check(
            name=f"lengths in {name}",
            well=True,
            text=f"the preferred answer is the longer one in {share:.0%} of the pairs",
        ),
    ]
    first = found[0]
    learned = [False] * len(first.prompt) + [True] * len(first.chosen)
    return checks, [Drawn(ids=(*first.prompt, *first.chosen), learned=tuple(learned))]
