"""A server on this machine that speaks vLLM's API, with a small Gemma behind it.

Everything that is answered is computed: our engine draws, the model scores, `reload_weights` reads
the folder. What vLLM does where a request is silent is imitated, since that is where clients go
wrong: sampling defaults out of generation_config.json, its own end of text, -9999 for -inf.

`faults` is what goes wrong: one function for each of the next requests to completions, called
instead of answering.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import torch
from small_gemma import small_gemma

from cabochon.core import Key, TokenBatch
from cabochon.data.tokenizer import Tokenizer
from cabochon.generation.engine import Settings, generate
from cabochon.generation.transport import Transport
from cabochon.models.gemma.convert import read_gemma
from cabochon.models.gemma.decoder import Gemma

EOS = 1
DEFAULTS = {"temperature": 0.6, "top_k": 5, "top_p": 0.9, "repetition_penalty": 1.3, "min_p": 0.1}
"""What the served folder's generation_config.json says."""

Fault = Callable[["Handler"], None]


@dataclass
class World:
    """The server's state, for tests to look at and to change."""

    model: Gemma = field(default_factory=small_gemma)
    processed: bool = True
    """--logprobs-mode processed_logprobs."""
    development: bool = True
    tokenizer: Tokenizer | None = None
    max_logprobs: int = 100
    faults: list[Fault] = field(default_factory=list)
    alter: Callable[[dict[str, Any]], Any] = lambda answer: answer
    """The last word on an answer to completions."""
    delay_s: float = 0.0
    calls: list[tuple[str, Any]] = field(default_factory=list)
    paused: bool = False
    sleeping: bool = False
    version: str = "default"
    under_way: int = 0
    most_under_way: int = 0
    abandoned: int = 0
    """Answers that nobody waited for."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    compute: threading.Lock = field(default_factory=threading.Lock)

    def paths(self) -> list[str]:
        return [path for path, _ in self.calls]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    world: World

    def log_message(self, *_: Any) -> None:
        """Silence."""

    def do_GET(self) -> None:
        self._handle({})

    def do_POST(self) -> None:
        length = int(self.headers.get("content-length", 0))
        text = self.rfile.read(length)
        self._handle(json.loads(text) if text else {})

    def reply(self, status: int, value: Any, **headers: str) -> None:
        text = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, header in headers.items():
            self.send_header(name.replace("_", "-"), header)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def _handle(self, body: dict[str, Any]) -> None:
        world, parts = self.world, urlsplit(self.path)
        path = parts.path.strip("/")
        with world.lock:
            world.calls.append((path, body or parse_qs(parts.query)))
            world.under_way += 1
            world.most_under_way = max(world.most_under_way, world.under_way)
            fault = world.faults.pop(0) if path == "v1/completions" and world.faults else None
        try:
            if fault is not None:
                fault(self)
            elif path == "v1/completions":
                time.sleep(world.delay_s)
                try:
                    answer = completions(world, body)
                except Refused as refused:
                    self.reply(400, {"error": {"message": str(refused)}})
                else:
                    self.reply(200, world.alter(answer))
            elif path == "v1/models":
                self.reply(200, {"data": [{"id": "small", "max_model_len": world.model.context}]})
            else:
                self.reply(*control(world, path, body, parse_qs(parts.query)))
        except OSError:
            world.abandoned += 1
            self.close_connection = True
        finally:
            with world.lock:
                world.under_way -= 1


class Refused(Exception):
    """A request that vLLM would answer with 400."""


def completions(world: World, body: dict[str, Any]) -> dict[str, Any]:
    how = {name: body.get(name, default) for name, default in DEFAULTS.items()}
    for name in ("repetition_penalty", "min_p", "presence_penalty", "frequency_penalty"):
        if how.get(name, body.get(name, 0.0)) not in (0.0, 1.0):
            raise Refused(f"{name} is computed by vLLM, not by this imitation")
    prompts = body["prompt"]
    if isinstance(prompts, str):
        if world.tokenizer is None:
            raise Refused("this server has no tokenizer")
        prompts = world.tokenizer.encode(prompts, bos=body.get("add_special_tokens", True))
    if max(body.get("prompt_logprobs") or 0, body.get("logprobs") or 0) > world.max_logprobs:
        raise Refused(f"more log-probabilities than max_logprobs {world.max_logprobs}")
    if isinstance(prompts[0], int):
        prompts = [prompts]
    count = body.get("max_tokens", 16)
    if any(len(prompt) + count > world.model.context for prompt in prompts):
        raise Refused(f"the maximum context length is {world.model.context} tokens")
    stops = tuple(body.get("stop_token_ids", ()))
    settings = Settings(
        max_new_tokens=max(count, 1),
        temperature=how["temperature"],
        top_k=how["top_k"],
        top_p=how["top_p"],
        stop_ids=stops if body.get("ignore_eos") else (*stops, EOS),
    )
    key = Key(body.get("seed", int(time.time())))
    choices: list[dict[str, Any]] = []
    with world.compute:
        for prompt in prompts:
            (group,) = generate(
                world.model, [torch.tensor(prompt)], settings, key, body.get("n", 1), indices=[0]
            )
            scores = prompt_scores(world.model, prompt, body)
            for written in group.completions:
                ids = written.tokens.tolist()
                values = written.logprob if world.processed else written.model_logprob
                choice: dict[str, Any] = {
                    "index": len(choices),
                    "text": " ".join(map(str, ids)),
                    "finish_reason": "stop" if written.stopped else "length",
                    "logprobs": None,
                }
                if body.get("logprobs") is not None:
                    choice["logprobs"] = {
                        "tokens": [name_of(id_, body) for id_ in ids],
                        "token_logprobs": values.tolist(),
                    }
                if body.get("return_token_ids"):
                    choice |= {"token_ids": ids, "prompt_token_ids": prompt}
                choices.append(choice | scores)
    usage = {"prompt_tokens": sum(map(len, prompts))}
    return {"object": "text_completion", "choices": choices, "usage": usage}


def name_of(id_: int, body: dict[str, Any]) -> str:
    return f"token_id:{id_}" if body.get("return_tokens_as_token_ids") else f"<{id_}>"


@torch.no_grad()
def prompt_scores(model: Gemma, prompt: list[int], body: dict[str, Any]) -> dict[str, Any]:
    """vLLM's prompt_logprobs: the model's own at temperature 1, the actual token always among
    them; and OpenAI's echo."""
    law = model(TokenBatch.of([prompt])).logits(slice(0, -1)).log_softmax(-1)
    law = law.clamp(min=-9999.0)
    found: dict[str, Any] = {}
    if body.get("prompt_logprobs") is not None:
        entries: list[Any] = [None]
        for row, actual in zip(law, prompt[1:], strict=True):
            shown = [*row.topk(body["prompt_logprobs"]).indices.tolist(), actual]
            entries.append({str(i): {"logprob": float(row[i]), "rank": 1} for i in shown})
        found["prompt_logprobs"] = entries
    if body.get("echo"):
        actual = law.gather(-1, torch.tensor(prompt[1:])[:, None]).squeeze(-1).tolist()
        names = [name_of(id_, body) for id_ in prompt]
        most: list[Any] = [None]
        for row in law:
            shown = row.topk(body["logprobs"]).indices.tolist()
            most.append({name_of(i, body): float(row[i]) for i in shown})
        found["logprobs"] = {
            "tokens": names, "token_logprobs": [None, *actual], "top_logprobs": most
        }  # fmt: skip
        found["token_ids"] = None
    return found


def control(
    world: World, path: str, body: dict[str, Any], query: dict[str, list[str]]
) -> tuple[int, Any]:
    if path == "version":
        return 200, {"version": "0.33.0"}
    if not world.development:
        return 404, {"detail": "Not Found"}
    match path:
        case "pause" | "resume":
            world.paused = path == "pause"
            return 200, {"status": path}
        case "is_paused":
            return 200, {"is_paused": world.paused}
        case "sleep" | "wake_up":
            world.sleeping = path == "sleep"
            return 200, b""
        case "is_sleeping":
            return 200, {"is_sleeping": world.sleeping}
        case "collective_rpc":
            assert body["method"] == "reload_weights"
            folder = Path(body["kwargs"]["weights_path"])
            if not folder.is_dir():
                return 500, {"detail": f"no weights at {folder}"}
            world.model = read_gemma(folder)
            return 200, {"results": [None]}
        case "weight_info":
            return 200, {"weight_version": world.version}
        case "update_weight_version" | "finish_weight_update":
            world.version = body.get("new_version") or body["weight_version"]
            return 200, {"success": True}
        case "get_world_size":
            return 200, {"world_size": 2}
        case "reset_prefix_cache" | "start_weight_update":
            return 200, b""
        case "init_weight_transfer_engine":
            return (200, {}) if "init_info" in body else (400, {"detail": "Missing 'init_info'"})
        case "update_weights":
            return (200, {}) if "update_info" in body else (400, {"detail": "Missing"})
        case _:
            return 404, {"detail": "Not Found"}


@contextmanager
def serving(world: World, **transport: Any) -> Iterator[Transport]:
    """The server, as long as the block lasts; connections are not waited for at the end."""

    class Bound(Handler):
        pass

    Bound.world = world
    server = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
    server.daemon_threads = True
    server.block_on_close = False
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    how = {"timeout_s": 20.0, "attempts": 3, "longest_wait_s": 0.05, **transport}
    try:
        yield Transport(url=f"http://127.0.0.1:{server.server_port}", **how)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
