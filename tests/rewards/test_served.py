"""A reward behind HTTP: its scores, and every way in which it fails, with the sample."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from reward_groups import decode, group

from cabochon.core.errors import ServerError
from cabochon.generation.transport import Transport
from cabochon.rewards.scores import scores
from cabochon.rewards.served import served

pytest.importorskip("httpx2")

GROUPS = [group("one", "a", "bb"), group("two", "ccc", "dddd")]


@contextmanager
def server(answer: Callable[[dict[str, Any]], Any], *, hangs: bool = False) -> Iterator[str]:
    over = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if hangs and body["prompt"] == "two":
                over.wait()
            content = json.dumps(answer(body)).encode()
            known = self.path in ("/judge/score", "/judge/score?task=a&key=b")
            self.send_response(200 if known else 404)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{listening.server_port}"
        finally:
            over.set()
            listening.shutdown()


def lengths(body: dict[str, Any]) -> dict[str, Any]:
    return {"scores": [len(text) for text in body["completions"]]}


def once(url: str, **changes: Any) -> Transport:
    return Transport(url=url, attempts=1, **changes)


def test_the_server_sees_prompts_and_completions_and_its_numbers_come_back_in_order() -> None:
    with server(lengths) as url:
        found = scores(served(once(f"{url}/judge/score"), decode), GROUPS)
    assert found.total.tolist() == [[1.0, 2.0], [3.0, 4.0]]


def test_what_the_address_asks_for_is_asked_for() -> None:
    with server(lengths) as url:
        found = scores(served(once(f"{url}/judge/score?task=a&key=b"), decode), GROUPS)
        assert found.total.tolist() == [[1.0, 2.0], [3.0, 4.0]]
        with pytest.raises(ServerError, match="404"):
            scores(served(once(f"{url}/judge/score?task=c"), decode), GROUPS)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda body: {"scores": [1.0] * (len(body["completions"]) - 1)}, "with 2 numbers"),
        (lambda _: {"scores": ["good", 1.0]}, "the score of sample 0 is 'good'"),
        (lambda _: [1.0, 2.0], "with 2 numbers"),
    ],
)
def test_an_answer_that_cannot_be_used_names_the_prompt(answer: Any, said: str) -> None:
    def second(body: dict[str, Any]) -> Any:
        return answer(body) if body["prompt"] == "two" else lengths(body)

    with server(second) as url, pytest.raises(ServerError, match=f"prompt 1 .*{said}"):
        scores(served(once(f"{url}/judge/score"), decode), GROUPS)


def test_a_server_that_hangs_names_the_prompt() -> None:
    with (
        server(lengths, hangs=True) as url,
        pytest.raises(ServerError, match=r"prompt 1 .*no answer within 2 s"),
    ):
        scores(served(once(f"{url}/judge/score", timeout_s=2.0), decode), GROUPS)


def test_an_address_that_is_no_reward_says_so() -> None:
    with server(lengths) as url, pytest.raises(ServerError, match="the address of a reward"):
        scores(served(once(f"{url}/other"), decode), GROUPS)
