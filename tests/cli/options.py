"""The flags of every verb, as `options.txt` keeps them.

Scripts and notebooks of users hold these flags; one that is renamed or lost breaks them silently
or not at all until the night it runs. So the list is frozen: a change to it is made on purpose, by
running `python tests/cli/options.py`, and shows in review and in the CHANGELOG.
"""

from __future__ import annotations

import os
import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from unittest.mock import patch

from cabochon.cli import main

FROZEN = Path(__file__).with_suffix(".txt")

COMMANDS = (
    "demo",
    "train pretrain",
    "train sft",
    "train gkd",
    "train rlhf",
    "train reward_model",
    "train dpo",
    "train bond",
    "train vtrace_agent",
    "train r2d2",
    "run gemma2",
    "run teacher_hacking",
    "run warm",
    "run warp",
    "resume",
    "plan pretrain",
    "plan sft",
    "plan gkd",
    "plan rlhf",
    "plan reward_model",
    "plan dpo",
    "plan bond",
    "plan vtrace_agent",
    "plan r2d2",
    "doctor pretrain",
    "doctor sft",
    "doctor gkd",
    "doctor rlhf",
    "doctor reward_model",
    "doctor dpo",
    "doctor bond",
    "data tokenizer",
    "data pack",
    "data cache-teacher",
    "data inspect",
    "generate",
    "chat",
    "evaluate perplexity",
    "evaluate preferences",
    "evaluate rewards",
    "merge average",
    "merge slerp",
    "merge ema",
    "merge towards",
    "merge cosine",
    "export",
    "report",
)


def flags(command: str) -> list[str]:
    """What `--help` of a command lists, in alphabetical order; words without dashes in capitals."""
    out = StringIO()
    with redirect_stdout(out), patch.dict(os.environ, {"COLUMNS": "80"}):
        assert main([*command.split(), "--help"]) == 0
    first = [line.strip("\u2502| ").split("  ")[0] for line in out.getvalue().splitlines()]
    words = [
        word for line in first for word in re.findall(r"^[A-Z_]{2,}$|--[a-z][a-z0-9.-]*", line)
    ]
    return sorted(set(words) - {"--help"})


def listing() -> str:
    """One block for each command."""
    return "".join(f"{each}\n" + "".join(f"  {f}\n" for f in flags(each)) for each in COMMANDS)


if __name__ == "__main__":
    FROZEN.write_text(listing(), encoding="utf-8")
