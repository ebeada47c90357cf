"""`cabochon doctor`: what can be wrong before a run, looked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.text import Text

from cabochon.cli import checks, teacher_checks
from cabochon.cli.checks import Check
from cabochon.cli.configuration import parse, plain, read
from cabochon.cli.drawing import Drawn, draw
from cabochon.cli.machine import tokenizer_of
from cabochon.cli.output import answer, console
from cabochon.cli.recipe import ALGORITHMS, Recipe, recipe_of
from cabochon.cli.reward_checks import examine_rewards
from cabochon.cli.rows import is_packed
from cabochon.cli.session import load_tokenizer, with_context
from cabochon.cli.settings import Architecture, RunSettings
from cabochon.cli.teachers import TOKENIZER
from cabochon.cli.words import unknown
from cabochon.core.errors import CabochonError, ConfigError
from cabochon.data.tokenizer import Tokenizer

__all__ = ["DoctorSettings", "main"]

USAGE = """\
usage: cabochon doctor ALGORITHM [the options of cabochon train ALGORITHM]
       cabochon doctor MODEL_FOLDER

Looks for what can be wrong before a run: BOS and EOS counted, the loss mask drawn token by token,
the chat template there and back, EOS apart from PAD, the tokenizer the model's own, the teacher's
vocabulary compared entry by entry, documents longer than a row counted, rewards tried. Exit code 1
if something is wrong."""

DRAWN = 160
"""Tokens of the loss mask that are drawn."""


@dataclass(frozen=True, kw_only=True)
class DoctorSettings:
    """What to examine where there is no run yet."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """A model folder, a run or a tokenizer folder."""
    json: bool = False
    """Answer with one JSON object on standard output and nothing else there."""


@dataclass
class _Findings:
    checks: list[Check] = field(default_factory=list)
    sample: list[Drawn] = field(default_factory=list)
    tokenizer: Tokenizer | None = None

    @property
    def well(self) -> bool:
        return all(each.well for each in self.checks)


def main(argv: Sequence[str]) -> int:
    """Shows every finding; 1 if something is wrong."""
    if not argv or argv[0] in {"-h", "--help"}:
        print(USAGE)
        return 0 if argv else 2
    if argv[0] in ALGORITHMS:
        recipe = recipe_of(argv[0])
        invocation = read(
            recipe.settings,
            argv[1:],
            prog=f"cabochon doctor {recipe.name}",
            description="What can be wrong before this run.",
            names={"algorithm": recipe.name},
        )
        return _tell(_examine_run(recipe, invocation.settings), as_json=invocation.json)
    if not argv[0].startswith("-") and not Path(argv[0]).exists():
        raise ConfigError(unknown("algorithm or folder", argv[0], ALGORITHMS))
    settings = parse(DoctorSettings, argv, prog="cabochon doctor", description="What can be wrong.")
    return _tell(_examine_folder(settings.model), as_json=settings.json)


def _examine_folder(folder: str) -> _Findings:
    findings = _Findings()
    try:
        found = tokenizer_of(folder)
    except CabochonError as error:
        findings.checks.append(Check(name="tokenizer", well=False, text=str(error)))
        return findings
    findings.tokenizer = found
    findings.checks += [*checks.tokenizer(found), checks.template(found)]
    if not (Path(folder) / "tokenizer.json").is_file() or (Path(folder) / "config.json").is_file():
        run = RunSettings(model=Architecture(source=folder))
        findings.checks.append(checks.model(run, found))
    return findings


def _examine_run(recipe: Recipe[Any], settings: Any) -> _Findings:
    findings = _Findings()
    try:
        run = with_context(settings.run)
        settings = replace(settings, run=run)
        found = load_tokenizer(run)
    except CabochonError as error:
        findings.checks.append(Check(name="tokenizer", well=False, text=str(error)))
        return findings
    findings.tokenizer = found
    findings.checks += [*checks.tokenizer(found), checks.model(run, found)]
    if recipe.chat:
        findings.checks.append(checks.template(found))
    named = plain(settings)
    for name in ("teacher", "teacher_cache"):
        if named.get(name):
            own = named.get("cross_tokenizer") and (named[TOKENIZER] or named["teacher"])
            findings.checks += teacher_checks.teacher(found, named[name], run, own=own or "")
    if named.get("teacher") and named.get("teacher_cache"):
        findings.checks.append(teacher_checks.same(named["teacher"], named["teacher_cache"]))
    if not run.data:
        findings.checks.append(Check(name="data", well=False, text="none is named: --data FILE"))
    for name in run.data:
        if recipe.examine is not None:
            some, row = recipe.examine(settings, found, name)
            findings.checks += some
            findings.sample = findings.sample or row
            continue
        findings.checks += _examine_data(name, run, found, findings, chat=recipe.chat)
    if named.get("reward") and not named.get("replay"):
        findings.checks += examine_rewards(
            settings.rewards, run, found, plain=settings.plain, room=settings.method.max_new_tokens
        )
    return findings


def _examine_data(
    name: str, run: RunSettings, found: Tokenizer, findings: _Findings, *, chat: bool
) -> Iterator[Check]:
    try:
        if not is_packed(name):
            look = checks.chat_lengths if chat else checks.document_lengths
            lengths = look(name, run, found)
            yield lengths
            if not lengths.well:
                return
        packed = checks.rows_of(name, run, found, chat=chat)
        yield checks.markers(name, checks.count(packed, found), chat=chat)
        if not findings.sample:
            findings.sample = checks.first_row(packed)
    except CabochonError as error:
        yield Check(name=f"data {name}", well=False, text=str(error))


def _tell(findings: _Findings, *, as_json: bool) -> int:
    if as_json:
        sample = [asdict(each) for each in findings.sample]
        listed = [asdict(each) for each in findings.checks]
        answer({"well": findings.well, "checks": listed, "sample": sample})
        return 0 if findings.well else 1
    screen = console(stderr=False)
    for check in findings.checks:
        line = Text("well   " if check.well else "WRONG  ", style="green" if check.well else "red")
        screen.print(line.append(f"{check.name}: {check.text}", style="default"))
    if findings.sample and findings.tokenizer is not None:
        how = "green" if screen.is_terminal else "[bracketed]"
        screen.print(f"\nthe first row, of which the {how} tokens are learned:", markup=False)
        left = DRAWN
        for each in findings.sample:
            if left > 0:
                colour = screen.is_terminal
                screen.print(
                    draw(findings.tokenizer, each.ids, each.learned, most=left, colour=colour)
                )
                left -= len(each.ids)
    wrong = sum(not each.well for each in findings.checks)
    screen.print(
        f"\n{wrong} {'thing is' if wrong == 1 else 'things are'} wrong"
        if wrong
        else "\nnothing is wrong",
        markup=False,
    )
    return 1 if wrong else 0
