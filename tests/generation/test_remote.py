"""A completions endpoint over HTTP: what goes wrong on the way, and answers that are refused."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from local_server import Handler, World, serving
from small_gemma import random_prompts, small_gemma

from cabochon.core import Group, Key
from cabochon.core.errors import ConfigError, DataError, MissingExtra, ServerError
from cabochon.generation import remote
from cabochon.generation.answers import read_group, read_scores, read_texts
from cabochon.generation.engine import Settings
from cabochon.generation.remote import OPENAI, Endpoint
from cabochon.generation.score import score
from cabochon.generation.transport import Transport, Unsettled
from cabochon.generation.vllm import VLLM

pytest.importorskip("httpx2")
pytest.importorskip("tenacity")

SETTINGS = Settings(max_new_tokens=6, stop_ids=(7, 9, 11))


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def endpoint(world: World) -> Iterator[Endpoint]:
    with serving(world) as transport:
        yield Endpoint(transport=transport, model="small", dialect=VLLM)


def refuse(status: int, **headers: str) -> Callable[[Handler], None]:
    return lambda handler: handler.reply(status, {"error": "not now"}, **headers)


def cut_off(handler: Handler) -> None:
    """Promises more than it sends."""
    handler.send_response(200)
    handler.send_header("content-length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.close_connection = True


def hang_up(handler: Handler) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


def half_json(handler: Handler) -> None:
    handler.reply(200, b'{"choices": [{"index": 0, "te')


def draw(endpoint: Endpoint, count: int = 1) -> list[Any]:
    return remote.generate(endpoint, random_prompts(*[4] * count), SETTINGS, Key(1))


# --- on the way ---


@pytest.mark.parametrize(
    "fault",
    [refuse(500), refuse(503), refuse(429, retry_after="0"), cut_off, hang_up, half_json],
    ids=["500", "503", "429", "cut off", "hung up", "half of the JSON"],
)
def test_what_goes_wrong_once_is_asked_again(
    world: World, endpoint: Endpoint, fault: Callable[[Handler], None]
) -> None:
    (expected,) = draw(endpoint)
    world.faults = [fault, fault]
    (found,) = draw(endpoint)
    assert torch.equal(found.completions[0].tokens, expected.completions[0].tokens)
    assert world.paths().count("v1/completions") == 4


def test_a_failure_that_stays_names_address_status_and_body(
    world: World, endpoint: Endpoint
) -> None:
    world.faults = [refuse(500)] * 3
    with pytest.raises(
        ServerError,
        match=r"3 attempts failed.*POST http://127.0.0.1:\d+/v1/completions: 500 .*not now",
    ) as caught:
        draw(endpoint)
    assert caught.value.status == 500
    assert world.faults == []


def test_every_attempt_that_is_repeated_can_be_heard_of(world: World, endpoint: Endpoint) -> None:
    world.faults = [refuse(503)] * 2
    heard: list[str] = []
    draw(replace(endpoint, transport=replace(endpoint.transport, notice=heard.append)))
    assert [line.split(",")[0] for line in heard] == [f"attempt {n} of 3 failed" for n in (1, 2)]
    assert all("503" in line for line in heard)


def test_a_refusal_is_not_asked_again(world: World, endpoint: Endpoint) -> None:
    with pytest.raises(
        ServerError, match=r"400 Bad Request.*maximum context length is 64"
    ) as caught:
        remote.generate(endpoint, random_prompts(62), SETTINGS, Key(1))
    assert caught.value.status == 400
    assert len(world.calls) == 1


def test_a_server_says_when_to_ask_again(world: World, endpoint: Endpoint) -> None:
    patient = replace(endpoint, transport=replace(endpoint.transport, longest_wait_s=5.0))
    world.faults = [refuse(429, retry_after="1")]
    begin = time.monotonic()
    draw(patient)
    assert 1.0 <= time.monotonic() - begin < 4.0
    soon = format_datetime(datetime.now(UTC) - timedelta(seconds=9), usegmt=True)
    world.faults = [refuse(503, retry_after=soon)]
    draw(endpoint)
    world.faults = [refuse(429, retry_after="3600")]
    with pytest.raises(ServerError, match=r"again in 3600 s; longest_wait_s is 0\.05"):
        draw(endpoint)


def test_a_server_that_does_not_answer_in_time(world: World, endpoint: Endpoint) -> None:
    quick = replace(endpoint.transport, timeout_s=0.2, attempts=2)
    world.delay_s = 1.0
    with pytest.raises(ServerError, match=r"2 attempts failed.*no answer within 0\.2 s") as caught:
        draw(replace(endpoint, transport=quick))
    assert caught.value.status is None


def test_an_answer_that_trickles_has_no_more_time(world: World, endpoint: Endpoint) -> None:
    def trickle(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("content-length", "1000")
        handler.end_headers()
        for _ in range(20):
            handler.wfile.write(b" ")
            time.sleep(0.1)

    world.faults = [trickle]
    quick = replace(endpoint.transport, timeout_s=0.4, attempts=1)
    begin = time.monotonic()
    with pytest.raises(ServerError, match="no answer within"):
        draw(replace(endpoint, transport=quick))
    assert time.monotonic() - begin < 1.5


def test_nobody_there() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    transport = Transport(url=url, attempts=2, longest_wait_s=0.01)
    with pytest.raises(ServerError, match=r"2 attempts failed.*ConnectError.*is the server up"):
        draw(Endpoint(transport=transport, model="small", dialect=VLLM))


def test_what_was_finished_before_a_failure_is_kept(world: World, endpoint: Endpoint) -> None:
    one_by_one = replace(endpoint, transport=replace(endpoint.transport, concurrency=1))
    expected = draw(endpoint, 4)
    world.alter = failing_after(2)
    with pytest.raises(ServerError, match="2 of 4 were finished before") as caught:
        draw(one_by_one, 4)
    world.alter = lambda answer: answer
    assert sorted(caught.value.finished) == [0, 1]
    missing = [2, 3]
    prompts = random_prompts(4, 4, 4, 4)
    rest = remote.generate(
        endpoint, [prompts[place] for place in missing], SETTINGS, Key(1), indices=missing
    )
    for found, group in zip([*caught.value.finished.values(), *rest], expected, strict=True):
        assert torch.equal(found.completions[0].tokens, group.completions[0].tokens)


def failing_after(count: int) -> Callable[[dict[str, Any]], Any]:
    """Answers `count` requests, and nonsense from then on."""
    seen = []

    def alter(answer: dict[str, Any]) -> Any:
        seen.append(answer)
        return answer if len(seen) <= count else {"choices": []}

    return alter


def test_results_come_as_they_are_finished_and_leaving_cancels_the_rest(
    world: World, endpoint: Endpoint
) -> None:
    gone = threading.Semaphore(0)

    def watch(handler: Handler) -> None:
        handler.connection.settimeout(10)
        if handler.connection.recv(1) == b"":
            gone.release()
        handler.close_connection = True

    # One request is answered, and three others wait for ever; which of them comes first is open.
    world.faults = [watch, watch, watch]
    found = remote.completed(endpoint, random_prompts(4, 4, 4, 4), SETTINGS, Key(1))
    place, group = next(found)
    assert torch.equal(group.prompt, random_prompts(4, 4, 4, 4)[place])
    found.close()
    assert all(gone.acquire(timeout=5) for _ in range(3))


def test_it_works_where_an_event_loop_is_running(endpoint: Endpoint) -> None:
    """As in a notebook."""

    async def cell() -> list[Any]:
        return draw(endpoint)

    assert len(asyncio.run(cell())) == 1


def test_several_requests_are_under_way_but_no_more_than_allowed(
    world: World, endpoint: Endpoint
) -> None:
    world.delay_s = 0.05
    draw(replace(endpoint, transport=replace(endpoint.transport, concurrency=3)), 9)
    assert world.most_under_way == 3


# --- answers ---


def with_choice(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    def alter(answer: dict[str, Any]) -> Any:
        answer["choices"][0] |= changes
        return answer

    return alter


def with_logprobs(change: Callable[[list[Any]], list[Any]]) -> Callable[[dict[str, Any]], Any]:
    def alter(answer: dict[str, Any]) -> Any:
        logprobs = answer["choices"][0]["logprobs"]
        logprobs["token_logprobs"] = change(logprobs["token_logprobs"])
        return answer

    return alter


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (with_logprobs(lambda v: v[:-1]), r"got \d tokens and \d log-probabilities"),
        (with_logprobs(lambda v: [float("nan"), *v[1:]]), "token 0 was drawn with .*nan"),
        (with_logprobs(lambda v: [*v[:-1], None]), "was drawn with the log-probability None"),
        (with_logprobs(lambda v: [0.3, *v[1:]]), "log-probability 0.3"),
        (with_logprobs(lambda v: [-9999.0, *v[1:]]), "log-probability -9999"),
        (with_choice(logprobs=None), "has no log-probabilities"),
        (with_choice(token_ids=[]), "got 0 tokens"),
        (with_choice(token_ids=["x"] * 6), "names a token 'x'"),
        (with_choice(token_ids=[3] * 9), "9 tokens and"),
        (with_choice(token_ids=None, logprobs={"tokens": [" a"], "token_logprobs": [-1.0]}),
         "names a token ' a' instead of giving its id"),
        (with_choice(finish_reason="stop", token_ids=[3] * 6), "reason 'stop', but neither"),
        (with_choice(finish_reason="content_filter", token_ids=[3] * 6), "content_filter"),
        (with_choice(prompt_token_ids=[2, 2]), "read the prompt as 2 tokens"),
        (with_choice(index=3), r"asked for 1 choices, got those of index \[3\]"),
        (lambda answer: {"choices": []}, "asked for 1 choices"),
        (lambda answer: {"error": "x"}, "has no choices"),
        (lambda answer: ["x"], "has no choices"),
        (lambda answer: "x", "has no choices"),
    ],
)  # fmt: skip
def test_an_answer_that_cannot_be_right_is_refused_at_once(
    world: World, endpoint: Endpoint, alter: Callable[[dict[str, Any]], Any], message: str
) -> None:
    world.alter = alter
    # No completion stops by itself here: the messages depend on nothing that is drawn.
    with pytest.raises(ServerError, match=message) as caught:
        remote.generate(endpoint, random_prompts(4), Settings(max_new_tokens=6), Key(1))
    assert "http://127.0.0.1" in str(caught.value)
    assert len(world.calls) == 1


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


def soundly(prompt: torch.Tensor, ids: list[int]) -> dict[str, Any]:
    """What a server should answer."""
    scores = [None, *({str(id_): {"logprob": -1.0}} for id_ in [*prompt[1:].tolist(), *ids])]
    choice = {
        "index": 0,
        "text": "x",
        "finish_reason": "length",
        "token_ids": list(ids),
        "prompt_token_ids": prompt.tolist(),
        "logprobs": {"tokens": [f"token_id:{i}" for i in ids], "token_logprobs": [-1.0] * len(ids)},
        "prompt_logprobs": scores,
    }
    return {"choices": [choice], "usage": {"prompt_tokens": len(prompt)}}


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every container and key in it."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return [
        place
        for key, inner in items
        for place in [(value, key), *(places(inner) if isinstance(inner, dict | list) else [])]
    ]


@given(data=st.data(), how=st.sampled_from(["prompt_logprobs", "echo"]))
def test_any_damage_to_an_answer_is_noticed_or_harmless(data: st.DataObject, how: str) -> None:
    """Never another error, never numbers that cannot be."""
    (prompt,), ids = random_prompts(4), [5, 6, 7]
    answer = soundly(prompt, ids)
    container, key = data.draw(st.sampled_from(places(answer)))
    container[key] = data.draw(JSON)
    settings = Settings(max_new_tokens=3)
    with contextlib.suppress(ServerError, Unsettled):
        (written,) = read_group(prompt, settings, 1, False, answer).completions
        assert len(written.tokens) == len(written.logprob) <= 3
        assert bool((written.logprob <= 1e-3).all())
    completion = read_group(prompt, settings, 1, False, soundly(prompt, ids)).completions
    with contextlib.suppress(ServerError, Unsettled):
        group = Group(prompt=prompt, completions=completion)
        (scored,) = read_scores(how, group, 1, answer)
        assert bool((scored.logprob <= 1e-3).all())
    with contextlib.suppress(ServerError, Unsettled):
        (text,) = read_texts(1, answer)
        assert isinstance(text.text, str)


def test_a_completion_that_the_server_gave_up_is_asked_for_again(
    world: World, endpoint: Endpoint
) -> None:
    """That is what a pause does to requests under way."""
    answers = iter([{"finish_reason": "abort"}, {}])

    def alter(answer: dict[str, Any]) -> Any:
        answer["choices"][0] |= next(answers)
        return answer

    world.alter = alter
    assert len(draw(endpoint)) == 1
    assert len(world.calls) == 2


def scores_altered(change: Callable[[list[Any]], Any]) -> Callable[[dict[str, Any]], Any]:
    def alter(answer: dict[str, Any]) -> Any:
        for choice in answer["choices"]:
            choice["prompt_logprobs"] = change(choice["prompt_logprobs"])
        return answer

    return alter


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v[:-1], "asked to score 10 tokens, got 9"),
        (lambda v: None, "got 0 scores"),
        (lambda v: [*v[:-1], None], "no score at token 9"),
        (lambda v: [*v[:-1], {}], "is missing"),
        (lambda v: [*v[:-1], {"3": {"logprob": float("nan")}}], "score of token 3 at 9"),
        (lambda v: [*v[:-1], {"x": {"logprob": -1.0}}], "score of token x at 9"),
        (lambda v: [*v[:-1], dict(list(v[-1].items())[-1:])], "2 most probable, got 1|is missing"),
    ],
)
def test_scores_that_are_not_all_there_are_refused(
    world: World, endpoint: Endpoint, change: Callable[[list[Any]], Any], message: str
) -> None:
    groups = remote.generate(endpoint, random_prompts(4), Settings(max_new_tokens=6), Key(1))
    world.alter = scores_altered(change)
    with pytest.raises(ServerError, match=message):
        remote.score(endpoint, groups, top_k=2)


def test_an_impossible_token_scores_minus_infinity(world: World, endpoint: Endpoint) -> None:
    groups = remote.generate(endpoint, random_prompts(4), Settings(max_new_tokens=6), Key(1))
    last = str(int(groups[0].completions[0].tokens[-1]))
    world.alter = scores_altered(lambda v: [*v[:-1], {last: {"logprob": -9999.0}}])
    assert float(remote.score(endpoint, groups)[0][0].logprob[-1]) == -torch.inf


# --- other servers ---


def test_a_server_that_gives_only_text_gives_texts(world: World, endpoint: Endpoint) -> None:
    plain = replace(endpoint, dialect=OPENAI)
    world.alter = lambda answer: {
        "choices": [
            {"index": index, "text": f"once {index}", "finish_reason": reason}
            for index, reason in enumerate(("stop", "length"))
        ]
    }
    world.faults = [lambda handler: handler.reply(200, world.alter({}))]
    ((first, second),) = remote.texts(plain, ["Once upon"], Settings(max_new_tokens=4), Key(0), 2)
    assert (first.text, first.stopped) == ("once 0", True)
    assert (second.text, second.stopped) == ("once 1", False)
    assert world.calls[0][1]["prompt"] == "Once upon"
    with pytest.raises(ConfigError, match="returns text, not tokens and log-probabilities; use"):
        draw(plain)


def test_what_a_server_does_not_follow_is_refused_before_it_is_asked(
    world: World, endpoint: Endpoint
) -> None:
    plain = replace(endpoint, dialect=OPENAI)
    with pytest.raises(ConfigError, match="cannot follow top_k=5"):
        remote.texts(plain, ["x"], Settings(top_k=5), Key(0))
    with pytest.raises(ConfigError, match="cannot follow stop_ids"):
        remote.texts(plain, ["x"], Settings(stop_ids=(1,)), Key(0))
    with pytest.raises(ConfigError, match="cannot score given tokens"):
        remote.score(plain, [])
    no_scores = replace(endpoint, dialect=replace(VLLM, scores="none"))
    with pytest.raises(ConfigError, match="cannot score, so the model's own"):
        remote.generate(no_scores, random_prompts(3), Settings(temperature=0.5), Key(0))
    with pytest.raises(ConfigError, match="samples"):
        remote.generate(endpoint, random_prompts(3), SETTINGS, Key(0), 0)
    with pytest.raises(DataError, match="prompt 0 has shape"):
        remote.generate(endpoint, [torch.zeros(0)], SETTINGS, Key(0))
    with pytest.raises(ConfigError, match="is no address"):
        Transport(url="127.0.0.1:8000")
    with pytest.raises(ConfigError, match="attempts must be above 0"):
        Transport(url="http://x", attempts=0)
    assert world.calls == []


def test_echo_scores_as_prompt_logprobs_do(endpoint: Endpoint) -> None:
    groups = remote.generate(endpoint, random_prompts(4, 7), SETTINGS, Key(1), 2)
    echo = replace(endpoint, dialect=replace(VLLM, scores="echo"))
    for scores, expected in zip(
        remote.score(echo, groups), score(small_gemma(), groups), strict=True
    ):
        for found, logprob in zip(scores, expected, strict=True):
            torch.testing.assert_close(found.logprob, logprob, atol=1e-4, rtol=0)


def test_echo_reports_the_most_probable_as_prompt_logprobs_do(endpoint: Endpoint) -> None:
    groups = remote.generate(endpoint, random_prompts(4, 7), SETTINGS, Key(1))
    echo = replace(endpoint, dialect=replace(VLLM, scores="echo"))
    pairs = zip(
        remote.score(echo, groups, top_k=3), remote.score(endpoint, groups, top_k=3), strict=True
    )
    for (found,), (expected,) in pairs:
        assert torch.equal(found.top_ids, expected.top_ids)
        torch.testing.assert_close(found.top_logprob, expected.top_logprob)


def test_log_probabilities_in_the_form_of_chats_are_read(world: World, endpoint: Endpoint) -> None:
    (expected,) = draw(endpoint)

    def alter(answer: dict[str, Any]) -> Any:
        (choice,) = answer["choices"]
        values = choice["logprobs"]["token_logprobs"]
        entries = zip(choice.pop("token_ids"), values, strict=True)
        choice["logprobs"] = {"content": [{"id": i, "logprob": v} for i, v in entries]}
        return answer

    world.alter = alter
    (found,) = draw(endpoint)
    assert torch.equal(found.completions[0].logprob, expected.completions[0].logprob)


def test_stop_ids_that_a_server_does_not_know_end_what_it_returns(
    world: World, endpoint: Endpoint
) -> None:
    """What follows the first stop is thrown away: the law of what precedes it is the same."""
    known = frozenset(VLLM.known - {"stop_ids"})
    unknowing = replace(endpoint, dialect=replace(VLLM, known=known))
    stops = tuple(range(0, 61, 2))
    settings = Settings(max_new_tokens=8, stop_ids=stops)
    expected = remote.generate(endpoint, random_prompts(4, 5), settings, Key(1), 3)
    condition = Settings(max_new_tokens=8, ends=(lambda tokens: tokens[-1] % 2 == 0,))
    for how in (settings, condition):
        groups = remote.generate(unknowing, random_prompts(4, 5), how, Key(1), 3)
        for group, other in zip(groups, expected, strict=True):
            for found, wanted in zip(group.completions, other.completions, strict=True):
                assert found.tokens.tolist() == wanted.tokens.tolist()
                assert found.stopped == wanted.stopped


def test_a_prompt_sent_as_text_must_be_read_as_the_same_number_of_tokens(
    world: World, endpoint: Endpoint
) -> None:
    texting = replace(endpoint, text_of=lambda prompt: " ".join(map(str, prompt.tolist())))

    def reading(count: int | None) -> Callable[[Handler], None]:
        answer = {
            "choices": [
                {
                    "index": 0,
                    "finish_reason": "length",
                    "logprobs": {"tokens": ["token_id:3"], "token_logprobs": [-1.0]},
                }
            ],
            "usage": {} if count is None else {"prompt_tokens": count},
        }
        return lambda handler: handler.reply(200, answer)

    world.faults = [reading(4), reading(5), reading(None)]
    (group,) = draw(texting)
    assert group.completions[0].tokens.tolist() == [3]
    assert world.calls[0][1]["prompt"] == " ".join(map(str, random_prompts(4)[0].tolist()))
    for count in ("5", "None"):
        with pytest.raises(ServerError, match=f"read a prompt of {count} tokens, it has 4"):
            draw(texting)


@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/"])
def test_an_address_may_end_as_those_of_other_clients_do(end: str) -> None:
    address = Transport(url=f"http://host:8000{end}").at("/v1/completions")
    assert address == "http://host:8000/v1/completions"


def test_every_prompt_may_have_settings_of_its_own(world: World, endpoint: Endpoint) -> None:
    each = [replace(SETTINGS, temperature=0.0), Settings(max_new_tokens=3, top_k=2)]
    found = remote.generate(endpoint, random_prompts(4, 5), each, Key(1))
    bodies = {len(body["prompt"]): body for path, body in world.calls if "seed" in body}
    assert (bodies[4]["temperature"], bodies[4]["max_tokens"]) == (0.0, 6)
    assert (bodies[5]["top_k"], bodies[5]["max_tokens"]) == (2, 3)
    assert len(found[1].completions[0].tokens) == 3
    with pytest.raises(ConfigError, match="got 2 settings for 1 prompts"):
        remote.generate(endpoint, random_prompts(4), each, Key(1))


@pytest.mark.parametrize("library", ["httpx2", "tenacity"])
def test_without_its_libraries_the_extra_is_named(
    endpoint: Endpoint, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingExtra, match=r"cabochon\[remote\]"):
        draw(endpoint)


def test_the_key_travels_and_is_never_shown(world: World) -> None:
    seen: list[str] = []

    def look(handler: Handler) -> None:
        seen.append(handler.headers["authorization"])
        handler.reply(401, {"error": "no"})

    world.faults = [look]
    with serving(world, api_key="sesame") as transport:
        assert "sesame" not in repr(transport)
        with pytest.raises(ServerError, match="401") as caught:
            draw(Endpoint(transport=transport, model="small", dialect=VLLM))
    assert seen == ["Bearer sesame"]
    assert "sesame" not in str(caught.value)
