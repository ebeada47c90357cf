"""vLLM as a server: drawing, scoring, and giving it the weights as they are trained.

vLLM pins its own torch, so it lives in an environment of its own and is spoken to over HTTP:

    VLLM_SERVER_DEV_MODE=1 vllm serve FOLDER --logprobs-mode processed_logprobs --max-logprobs -1

    transport = Transport(url="http://127.0.0.1:8000")
    endpoint = connect(transport)                               # what it serves, checked
    groups = generate(endpoint, prompts, settings, Key(0))      # remote.generate
    publish(transport, model, Path("/shared/weights"), version="step-100")

`processed_logprobs` are those of the distribution that is drawn from, without which no importance
weight is right; `--max-logprobs -1` lets any number of most probable tokens be asked for; the
development mode opens the endpoints that change weights, pause and sleep.

Weights go through the disk, which every transport of files serves: a folder of safetensors that
the server reads. For tensors over NCCL or between processes of one GPU, `weight_update` frames the
four calls, and whoever holds the tensors sends them in between by vLLM's own library.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from cabochon.core.errors import ConfigError, ServerError
from cabochon.generation.remote import Dialect, Endpoint
from cabochon.generation.transport import Request, Transport, ask_one
from cabochon.models.foreign import ForeignModel, write_foreign
from cabochon.models.gemma.convert import write_gemma
from cabochon.models.gemma.decoder import Gemma

__all__ = [
    "VLLM",
    "connect",
    "finish_weight_update",
    "init_weight_transfer",
    "is_paused",
    "is_sleeping",
    "pause",
    "publish",
    "read_models",
    "reload",
    "reset_prefix_cache",
    "resume",
    "server_version",
    "set_weight_version",
    "sleep",
    "start_weight_update",
    "update_weights",
    "wake_up",
    "weight_update",
    "weight_version",
    "world_size",
]

A = TypeVar("A")

VLLM = Dialect(
    name="vLLM",
    known=frozenset({"max_new_tokens", "temperature", "top_k", "top_p", "stop_ids"}),
    extra={
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "logprobs": 0,  # of the drawn token alone
        "ignore_eos": True,  # the stop ids are the settings' own
        "skip_special_tokens": False,
        # What is not sent is taken from the model's generation_config.json.
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
    },
    logprobs="drawn",
    scores="prompt_logprobs",
)
"""With --logprobs-mode processed_logprobs; `connect` finds out."""

DEVELOPMENT = "start the server with VLLM_SERVER_DEV_MODE=1, which opens this endpoint"
PUBLISHED = "published-for-vllm"
"""A file that says of a folder of weights that `publish` may remove it."""

CERTAIN = -1e-4
"""Nats: above it a token was the only one that could be drawn."""


def connect(transport: Transport, *, model: str = "") -> Endpoint:
    """The endpoint of a served model: its name, its context, and whose log-probabilities it gives.

    vLLM does not say in its answers which log-probabilities they hold. So it is tried out: the one
    token that is left by top_k = 1 has probability 1 after the cut, and less in the model.

    Args:
        transport: where the server is.
        model: which of its models; the only one when empty.

    Raises:
        ConfigError: it serves several models, or not this one.
        ServerError: it cannot be reached, or does not answer as vLLM does.
    """
    served = _request(transport, "v1/models", read_models, method="GET")
    if model not in served and (model or len(served) != 1):
        raise ConfigError(
            f"{transport.url} serves {sorted(served)}; "
            + (f"{model!r} is none of them" if model else "say which one is meant")
        )
    model = model or next(iter(served))
    endpoint = Endpoint(transport=transport, model=model, dialect=VLLM, context=served[model])
    body = {"model": model, **VLLM.extra, "prompt": [1], "max_tokens": 1, "top_k": 1, "n": 1}
    certainty = _request(transport, endpoint.path, _only_logprob, {**body, "temperature": 1.0})
    if certainty > CERTAIN:
        return endpoint
    return replace(endpoint, dialect=replace(VLLM, logprobs="model"))


# --- weights ---


def publish(
    transport: Transport,
    model: Gemma | ForeignModel,
    folder: Path,
    *,
    version: str,
    seen_as: str = "",
) -> None:
    """Let the server go on with the weights that `model` has now.

    They are written to a folder of their own in `folder`, `reload` is asked for, and what earlier
    calls wrote into `folder` is removed once it has succeeded.

    Args:
        transport: where the server is.
        model: written in the type of its parameters.
        folder: on a file system that the server sees too.
        version: a name for these weights, such as the step; `weight_version` gives it back.
        seen_as: the path of `folder` for the server, where it differs.

    Raises:
        ConfigError: `version` is no plain name.
        FolderError: the weights could not be written.
        ServerError: the server did not take them; see `reload`.
    """
    if not version or Path(version).name != version:
        raise ConfigError(f"{version!r} cannot name a folder; take a plain name like step-100")
    # A path the server has not read before: it may keep what it read under the old one.
    place = folder / version
    if isinstance(model, Gemma):
        write_gemma(model, place)
    else:
        write_foreign(model, place)
    reload(
        transport,
        f"{seen_as.rstrip('/')}/{version}" if seen_as else str(place.resolve()),
        version=version,
    )
    (place / PUBLISHED).touch()
    for marker in list(folder.glob(f"*/{PUBLISHED}")):
        if marker.parent != place:
            shutil.rmtree(marker.parent)


def reload(transport: Transport, path: str, *, version: str) -> None:
    """Let the server read the weights of a folder: pause, read, forget old prefixes, go on.

    Args:
        transport: where the server is.
        path: of safetensors, as the server sees it.
        version: what `weight_version` shall say from now on.

    Raises:
        ServerError: a step failed. Before the reading began the server is as it was; afterwards
            it stays paused, since nobody knows which weights it holds.
    """
    weight_version(transport)  # an older vLLM has none: it refuses before anything has changed
    pause(transport, "wait")
    arguments = {"method": "reload_weights", "kwargs": {"weights_path": path}}
    try:
        _request(transport, "collective_rpc", _nothing, arguments, repeat=False)
        reset_prefix_cache(transport)
        set_weight_version(transport, version)
    except ServerError as error:
        error.args = (
            f"{error}; the server stays paused, holding either the old weights or part of those "
            f"in {path}: reload once more, or `resume` it knowingly",
        )
        raise
    resume(transport)


@contextmanager
def weight_update(transport: Transport, *, version: str) -> Iterator[None]:
    """A frame for sending weights in memory: inside it the server is paused and expects them.

    The first and the last of vLLM's four phases are done here; inside, call `update_weights` while
    the tensors are sent. The transfer must have been initialised (`init_weight_transfer`). If the
    inside fails the server stays paused, since nobody knows which weights it holds.
    """
    pause(transport, "wait")
    start_weight_update(transport)
    yield
    finish_weight_update(transport, version)
    reset_prefix_cache(transport)
    resume(transport)


def init_weight_transfer(transport: Transport, init_info: Mapping[str, Any]) -> None:
    """Phase 1, once: let the workers join the trainer's group; `init_info` is the backend's."""
    body = {"init_info": dict(init_info)}
    _request(transport, "init_weight_transfer_engine", _nothing, body, repeat=False)


def start_weight_update(transport: Transport) -> None:
    """Phase 2: let the workers make their weights ready to be overwritten."""
    _request(transport, "start_weight_update", _nothing, repeat=False)


def update_weights(transport: Transport, update_info: Mapping[str, Any]) -> None:
    """Phase 3: let the workers receive tensors; returns when they have. It may be repeated."""
    body = {"update_info": dict(update_info)}
    _request(transport, "update_weights", _nothing, body, repeat=False)


def finish_weight_update(transport: Transport, version: str) -> None:
    """Phase 4: let the workers use what they received, under the name `version`."""
    body = {"weight_version": version}
    _request(transport, "finish_weight_update", _nothing, body, repeat=False)


def weight_version(transport: Transport) -> str:
    """Which weights the server holds, by the name they were given."""
    read = _named("weight_version", str)
    return _request(transport, "weight_info", read, method="GET")


def set_weight_version(transport: Transport, version: str) -> None:
    """Give the weights that the server holds a name."""
    _request(transport, "update_weight_version", _nothing, {"new_version": version})


def reset_prefix_cache(transport: Transport) -> None:
    """Forget the keys and values of prompts read before."""
    _request(transport, "reset_prefix_cache", _nothing)


def world_size(transport: Transport) -> int:
    """How many workers hold a part of the weights."""
    return _request(transport, "get_world_size", _named("world_size", int), method="GET")


# --- pausing and sleeping ---


def pause(transport: Transport, mode: Literal["wait", "keep", "abort"] = "wait") -> None:
    """Start nothing more.

    Args:
        transport: where the server is.
        mode: what happens to requests under way: they are finished first, kept where they are for
            `resume`, or given up (whoever waits for them here asks again).
    """
    _request(transport, "pause", _nothing, params={"mode": mode})


def resume(transport: Transport) -> None:
    """Go on after `pause`."""
    _request(transport, "resume", _nothing)


def is_paused(transport: Transport) -> bool:
    """Whether the server is paused."""
    return _request(transport, "is_paused", _named("is_paused", bool), method="GET")


def sleep(transport: Transport, level: Literal[1, 2] = 1) -> None:
    """Give the GPU's memory free for a trainer beside it (server option --enable-sleep-mode).

    Args:
        transport: where the server is.
        level: 1 keeps the weights in the host's memory; 2 drops them, and they must be reloaded.
    """
    _request(transport, "sleep", _nothing, params={"level": str(level)})


def wake_up(transport: Transport, tags: Sequence[Literal["weights", "kv_cache"]] = ()) -> None:
    """Take the memory back: all of it, or, to reload weights in between, part by part."""
    _request(transport, "wake_up", _nothing, params={"tags": list(tags)} if tags else {})


def is_sleeping(transport: Transport) -> bool:
    """Whether the server sleeps."""
    return _request(transport, "is_sleeping", _named("is_sleeping", bool), method="GET")


def server_version(transport: Transport) -> str:
    """vLLM's own version."""
    return _request(transport, "version", _named("version", str), method="GET")


def _request(
    transport: Transport,
    path: str,
    read: Callable[[Any], A],
    body: Mapping[str, Any] | None = None,
    **how: Any,
) -> A:
    request: Request[A] = Request(path=path, read=read, body=body, absent=DEVELOPMENT, **how)
    return ask_one(transport, request)


def _nothing(_: Any) -> None:
    """Whatever vLLM says of its success."""


def _named(name: str, kind: type[A]) -> Callable[[Any], A]:
    def read(answer: Any) -> A:
        value = answer.get(name) if isinstance(answer, dict) else None
        if not isinstance(value, kind):
            raise ServerError(f"expected {name!r} in the answer, got {str(answer)[:200]!r}")
        return value

    return read


def read_models(answer: Any) -> dict[str, int | None]:
    """Names of the served models, and the most tokens that each takes (None: it does not say).

    Raises:
        ServerError: the answer lists no model.
    """
    listed = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(listed, list) or not listed:
        raise ServerError(f"the server lists no model: {str(answer)[:200]!r}")
    return {str(each.get("id")): each.get("max_model_len") for each in listed}


def _only_logprob(answer: Any) -> float:
    try:
        return float(answer["choices"][0]["logprobs"]["token_logprobs"][0])
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ServerError(f"no log-probability in {str(answer)[:200]!r}") from error
