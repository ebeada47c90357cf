"""The one binary: the first word chooses a verb, and only that verb's module is imported."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

__all__ = ["VERBS", "main"]

VERBS: dict[str, tuple[str, str]] = {
    "demo": ("cabochon.cli.demo", "build a small model family from the standard library's source"),
    "train": ("cabochon.cli.train", "train a model with one algorithm: pretrain, sft"),
    "run": ("cabochon.cli.run", "run a pipeline of several trainings: gemma2, demo"),
    "resume": ("cabochon.cli.resume", "go on with an interrupted run, bit for bit"),
    "plan": (
        "cabochon.cli.plan",
        "parameters, memory, tokens, disk and time of a run; runs nothing",
    ),
    "doctor": ("cabochon.cli.doctor", "what is wrong before a run: markers, masks, vocabularies"),
    "data": ("cabochon.cli.data", "tokenizer, pack, inspect: prepare and look at text"),
    "generate": ("cabochon.cli.generate", "go on from prompts with a model folder"),
    "chat": ("cabochon.cli.chat", "talk with a tuned model"),
    "evaluate": ("cabochon.cli.evaluate", "perplexity of a model on documents"),
    "merge": (
        "cabochon.cli.merge",
        "average, slerp, ema, towards, cosine: weights of several models",
    ),
    "export": ("cabochon.cli.export", "a run or model as a Hugging Face folder or a GGUF file"),
    "report": ("cabochon.cli.report", "one HTML page about a run"),
}
"""Verb -> the module whose `main(argv)` does it, and what it does."""

INTERRUPTED = 130

OUT_OF_MEMORY = ("CUDA out of memory", "DefaultCPUAllocator: can't allocate memory")
"""How torch says it, in a RuntimeError."""


def main(argv: Sequence[str] | None = None) -> int:
    """Does what the words say.

    Args:
        argv: the words after `cabochon`; those of this process when absent.

    Returns:
        The exit code: 0 done, 1 failed or found something wrong, 2 asked for wrongly,
        130 interrupted.
    """
    # Read when torch loads. By default a thread that waits for another spins: on a machine that
    # does anything else besides, a step of a small model then takes ten times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    words = list(sys.argv[1:] if argv is None else argv)
    rest = _without_debug(words)
    debug = bool(os.environ.get("CABOCHON_DEBUG")) or rest != words
    try:
        return _dispatch(rest)
    except SystemExit as stop:  # tyro leaves this way, after --help too
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # whoever was reading (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (OSError, ValueError, RuntimeError, ArithmeticError, ImportError, MemoryError) as error:
        code = _explain(error)
        if debug or code is None:
            raise
        return code


def _without_debug(words: list[str]) -> list[str]:
    """The words but for --debug in front, at the end or before a flag; elsewhere it is a mistake.

    Taken out between the values of a flag, it would let the verb read on as if it were not there.
    """
    end = words.index("--") if "--" in words else len(words)
    followed = [*words[1:end], "--"]
    kept = [
        word
        for at, (word, after) in enumerate(zip(words[:end], followed, strict=False))
        if word != "--debug" or (at > 0 and not after.startswith("--"))
    ]
    return kept + words[end:]


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in {"-h", "--help", "help"}:
        print(_help())
        return 0 if words else 2
    verb, rest = words[0], words[1:]
    if verb in {"-V", "--version"}:
        from cabochon import __version__

        print(f"cabochon {__version__}")
        return 0
    if verb not in VERBS:
        from cabochon.cli.words import unknown

        print(unknown("verb", verb, VERBS) + "; see cabochon --help", file=sys.stderr)
        return 2
    code: int = importlib.import_module(VERBS[verb][0]).main(rest)
    return code


def _explain(error: BaseException) -> int | None:
    """Says what went wrong in one message; None if it is a fault of ours and wants a traceback."""
    from cabochon.core.errors import CabochonError, ConfigError

    text = str(error) or type(error).__name__
    if isinstance(error, MemoryError) or any(sign in text for sign in OUT_OF_MEMORY):
        text = f"out of memory ({text.splitlines()[0]}); cabochon plan says what a run takes"
    elif not isinstance(error, CabochonError | OSError):
        return None
    print(f"cabochon: {text}", file=sys.stderr)
    return 2 if isinstance(error, ConfigError) else 1


def _help() -> str:
    width = max(len(verb) for verb in VERBS)
    lines = [f"  {verb:<{width}}  {purpose}" for verb, (_, purpose) in VERBS.items()]
    return "\n".join(
        [
            "usage: cabochon VERB ...",
            "",
            "Shape and polish small language models.",
            "",
            *lines,
            "",
            "cabochon VERB --help says more. --debug (or CABOCHON_DEBUG=1) shows tracebacks.",
        ]
    )
