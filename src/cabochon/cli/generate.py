"""`cabochon generate MODEL`: goes on from prompts."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from cabochon.cli.configuration import parse

if TYPE_CHECKING:
    from torch import Tensor

    from cabochon.cli.backends import Writer
    from cabochon.cli.stream import Speaker
    from cabochon.core import Completion, Key
    from cabochon.data.tokenizer import Tokenizer
    from cabochon.generation.settings import Ends, Settings

__all__ = ["GenerateSettings", "cut_at_stop", "main", "stop_ids", "stop_texts"]


@dataclass(frozen=True, kw_only=True)
class GenerateSettings:
    """What to go on from, and how."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """A model folder, or a run directory (its newest checkpoint)."""
    prompt: tuple[str, ...] = ()
    """One or more texts to go on from; `--prompt ""` begins with nothing."""
    file: str = ""
    """Prompts of a file, or of standard input if `-`: lines, or .jsonl with `prompt` or `text`."""
    chat: bool = False
    """Each prompt is a user's message, answered through the chat template."""
    max_new_tokens: int = 128
    temperature: float = 1.0
    """0 takes the most probable token."""
    top_k: int = 0
    """Draw among this many; 0: all."""
    top_p: float = 1.0
    """Draw from this much of the probability; 1: all."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion (EOS always does); they are cut from the text."""
    samples: int = 1
    """Completions of each prompt."""
    seed: int = 0
    """The same seed, prompt and settings write the same text."""
    backend: Literal["engine", "transformers", "vllm"] = "engine"
    """What writes: cabochon's engine, transformers' generate, or a vLLM server at --url, for which
    MODEL (a tokenizer folder will do) gives the tokenizer."""
    url: str = ""
    """Of the server: http://HOST:PORT."""
    draft: str = ""
    """A smaller model with the same tokenizer that proposes tokens: faster, the same law."""
    ahead: int = 4
    """How many tokens --draft proposes at a time."""
    int8: bool = False
    """Decode with weights rounded to 8 bits (a Gemma on the CPU)."""
    compile: bool = False
    """Compile the decoding step (a Gemma): seconds to a minute at first, then faster tokens."""
    guidance: float = 1.0
    """Strength of classifier-free guidance: above 1 the prompt counts for more."""
    negative: str = ""
    """What --guidance leads away from; by default a text that begins with nothing."""
    precision: Literal["stored", "float32", "bf16"] = "stored"
    """What to compute in."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    threads: int = 0
    """Of torch on the CPU; 0: OMP_NUM_THREADS, or one a core."""
    json: bool = False
    """One JSON object a completion on standard output: tokens, text, logprobs (nats)."""


def main(argv: Sequence[str]) -> int:
    """Writes completions to standard output."""
    settings = parse(
        GenerateSettings, argv, prog="cabochon generate", description="Go on from prompts."
    )
    prompts = _prompts(settings)
    _check_backend(settings)
    from cabochon.cli.backends import engine_models, served, transformers_own
    from cabochon.cli.machine import use_threads
    from cabochon.core import Key
    from cabochon.generation.engine import Settings, generate, stream

    use_threads(settings.threads)
    model = None
    if settings.backend == "vllm":
        write, tokenizer = served(settings.model, settings.url)
    elif settings.backend == "transformers":
        loaded = (settings.model, settings.precision, settings.device)
        write, tokenizer = transformers_own(*loaded)
    else:
        model, draft, tokenizer = engine_models(settings)
        write = partial(generate, model, draft=draft, ahead=settings.ahead)
        speak = partial(stream, draft=draft, ahead=settings.ahead)
    how = Settings(
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        stop_ids=stop_ids(tokenizer, settings.stop, chat=settings.chat),
        ends=() if model is None else stop_texts(tokenizer, settings.stop),
    )
    encoded = [_encode(tokenizer, prompt, chat=settings.chat) for prompt in prompts]
    key = Key(settings.seed, ("generate",))
    if settings.samples == 1 and len(encoded) == 1 and not settings.json and model is not None:
        _stream(partial(speak, model), tokenizer, encoded[0], how, key, settings.stop)
        return 0
    _batch(write, tokenizer, encoded, how, key, settings)
    return 0


def stop_ids(tokenizer: Tokenizer, stops: Sequence[str], *, chat: bool) -> tuple[int, ...]:
    """EOS, the end of a turn in a chat, and those of `stops` that are control tokens."""
    ids: list[int | None] = [tokenizer.eos_id, tokenizer.end_of_turn_id if chat else None]
    for stop in stops:
        found, _ = tokenizer.encode_with_controls(stop)
        if len(found) == 1 and tokenizer.is_control(found[0]):
            ids += found
    return tuple(dict.fromkeys(id_ for id_ in ids if id_ is not None))


def stop_texts(tokenizer: Tokenizer, stops: Sequence[str]) -> tuple[Ends, ...]:
    """What ends a completion at the first of `stops`; control tokens have no text (`stop_ids`)."""
    from cabochon.generation.stopping import at_text

    texts = [stop for stop in stops if not tokenizer.controls_in(stop)]
    if not texts:
        return ()
    if tokenizer.bytes_of(0) is not None:
        return (at_text(texts, lambda id_: tokenizer.bytes_of(id_) or b""),)
    return (lambda tokens: any(stop in tokenizer.decode(tokens) for stop in texts),)


def cut_at_stop(
    tokenizer: Tokenizer, ids: Sequence[int], stops: Sequence[str]
) -> tuple[int, str] | None:
    """How many tokens it takes to complete the first stop text, and the text before it.

    None if the tokens' text holds none of `stops`.
    """
    text = tokenizer.decode(ids)
    if not any(stop in text for stop in stops if stop):
        return None
    for count in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:count])
        places = [text.find(stop) for stop in stops if stop and stop in text]
        if places:
            return count, text[: min(places)]
    raise AssertionError


def _check_backend(settings: GenerateSettings) -> None:
    """A server computes in its own way, and no flag for this machine may seem to change that."""
    from cabochon.core.errors import ConfigError

    if "" in settings.stop:
        raise ConfigError('--stop "" would end every completion at once; leave it out')
    at_server = settings.backend == "vllm"
    if at_server != bool(settings.url):
        raise ConfigError(
            "--backend vllm needs the server's --url http://HOST:PORT"
            if at_server
            else f"--url is for --backend vllm; the backend is {settings.backend}"
        )
    own = (settings.draft, settings.int8, settings.compile, settings.guidance, settings.negative)
    if settings.backend != "engine" and own != ("", False, False, 1.0, ""):
        raise ConfigError(
            "--draft, --int8, --compile, --guidance and --negative are the engine's; the backend "
            f"is {settings.backend}"
        )
    if settings.ahead != GenerateSettings.ahead and not settings.draft:
        raise ConfigError("--ahead is how far a --draft looks; give one")
    if settings.negative and settings.guidance == 1.0:
        raise ConfigError("--negative has no effect at --guidance 1; give a strength, 1.5 perhaps")
    if at_server and (settings.precision, settings.device) != ("stored", "auto"):
        raise ConfigError("--precision and --device are the server's own; leave them out")


def _prompts(settings: GenerateSettings) -> list[str]:
    from cabochon.core.errors import ConfigError, DataError

    if settings.prompt and settings.file:
        raise ConfigError("give --prompt or --file, not both")
    if settings.prompt:
        return list(settings.prompt)
    if not settings.file:
        if sys.stdin.isatty():
            raise ConfigError('nothing to go on from: give --prompt "TEXT", --file FILE or a pipe')
        piped = sys.stdin.read().removesuffix("\n")
        if not piped:
            raise ConfigError(
                'nothing to go on from: standard input is empty; --prompt "" begins with nothing'
            )
        return [piped]
    if settings.file == "-":
        lines = [line for line in _split(sys.stdin.read()) if line.strip()]
        if not lines:
            raise DataError("standard input holds no prompt")
        return lines
    found = list(_lines(Path(settings.file)))
    if not found:
        raise DataError(f"{settings.file} holds no prompt")
    return found


def _lines(path: Path) -> Iterator[str]:
    from cabochon.core.errors import DataError

    try:
        lines = _split(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}; name a file of prompts"
        ) from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            yield line
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error})") from error
        text = record.get("prompt", record.get("text")) if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise DataError(f"{path}, line {number}: no text in a field `prompt` or `text`")
        yield text


def _split(text: str) -> list[str]:
    """Lines end in LF or CR LF; U+2028 and its like are text, also inside JSON."""
    return [line.removesuffix("\r") for line in text.split("\n")]


def _encode(tokenizer: Tokenizer, prompt: str, *, chat: bool) -> Tensor:
    import torch

    from cabochon.core.errors import DataError

    if chat:
        from cabochon.data.chat import Message, encode_prompt

        ids = encode_prompt(tokenizer, [Message(role="user", content=prompt)])
    else:
        ids = tokenizer.encode(prompt, bos=tokenizer.bos_id is not None)
        if not ids:
            raise DataError(
                "an empty prompt, and the tokenizer has no BOS to begin with; give some text"
            )
    return torch.tensor(ids, dtype=torch.int64)


def _stream(
    speak: Speaker,
    tokenizer: Tokenizer,
    prompt: Tensor,
    how: Settings,
    key: Key,
    stops: Sequence[str],
) -> None:
    from cabochon.cli.stream import write_stream

    write_stream(speak, tokenizer, prompt, how, key, stops, sys.stdout)
    print()


def _batch(
    write: Writer,
    tokenizer: Tokenizer,
    prompts: Sequence[Tensor],
    how: Settings,
    key: Key,
    settings: GenerateSettings,
) -> None:
    from cabochon.cli.output import answer

    groups = write(prompts, how, key, settings.samples)
    several = len(prompts) * settings.samples > 1
    for index, group in enumerate(groups):
        for sample, completion in enumerate(group.completions):
            result = _result(tokenizer, completion, settings)
            if settings.json:
                answer({**result, "prompt": index, "sample": sample})
            else:
                if several:
                    print(f"--- prompt {index}, sample {sample}", file=sys.stderr)
                print(result["text"], flush=True)


def _result(
    tokenizer: Tokenizer, completion: Completion, settings: GenerateSettings
) -> dict[str, Any]:
    ids, logprobs = completion.tokens.tolist(), completion.logprob.tolist()
    stopped, text = completion.stopped, tokenizer.decode(ids)
    cut = cut_at_stop(tokenizer, ids, settings.stop)
    if cut is not None:
        count, text = cut
        ids, logprobs, stopped = ids[:count], logprobs[:count], True
    ended = "stop" if stopped else "length" if len(ids) == settings.max_new_tokens else "context"
    return {
        "tokens": ids, "text": text, "logprobs": logprobs, "stopped": stopped, "ended": ended,
    }  # fmt: skip
