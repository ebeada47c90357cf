"""What the pages tell a reader to type is what the program understands."""

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMPLETE = (
    "docs/models.md",
    "docs/text.md",
    "docs/guidance.md",
    "docs/weights.md",
    "docs/distillation.md",
    "docs/runtime.md",
    "docs/rewards.md",
    "docs/alignment.md",
    "docs/reinforcement.md",
    "docs/papers/f_divergences.md",
)
"""Pages whose first example stands on its own."""


def options() -> dict[str, set[str]]:
    """Verb -> its flags, from the list that another test compares with the program."""
    verbs: dict[str, set[str]] = {}
    verb = ""
    for line in (ROOT / "tests" / "cli" / "options.txt").read_text().splitlines():
        if line.startswith("  "):
            verbs[verb].add(line.strip())
        else:
            verb = line
            verbs[verb] = set()
    return verbs


def commands() -> list[tuple[str, list[str]]]:
    found = []
    for page in PAGES:
        for _, text in BLOCK.findall(page.read_text(encoding="utf-8")):
            for line in text.splitlines():
                words = shlex.split(line.removeprefix("$ "), comments=True)
                if words[:1] == ["cabochon"] and words[1:2] != ["VERB"]:
                    found.append((f"{page.relative_to(ROOT)}: {line}", words[1:]))
    return found


@pytest.mark.parametrize("words", [pytest.param(w, id=name) for name, w in commands()])
def test_every_command_on_a_page_names_a_verb_and_flags_that_exist(words: list[str]) -> None:
    known = options()
    verb = next(v for v in (" ".join(words[:2]), words[0]) if v in known or v == "--help")
    assert {word for word in words if word.startswith("--")} <= known[verb]


def test_the_pages_have_commands() -> None:
    assert len(commands()) > 10


@pytest.mark.parametrize("page", COMPLETE)
def test_the_example_of_a_page_runs(page: str) -> None:
    blocks = BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))
    source = next(text for language, text in blocks if language == "python")
    exec(compile(source, page, "exec"), {})


def test_links_between_pages_lead_somewhere() -> None:
    links = [
        (page, target)
        for page in PAGES
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
        if "://" not in target
    ]
    broken = [(page.name, target) for page, target in links if not (page.parent / target).exists()]
    assert broken == []
