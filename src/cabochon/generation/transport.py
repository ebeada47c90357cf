"""JSON over HTTP to a server that generates: time-outs, retries, several requests at a time.

httpx2 carries the requests, tenacity repeats them, anyio keeps several in flight; all three are
imported when first used (extra `remote`). Whoever leaves the iterator of `ask` early, or is
interrupted, cancels what is still in flight: the connections close, and servers that watch them
(vLLM does) stop computing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from json import JSONDecodeError
from queue import SimpleQueue
from types import ModuleType
from typing import Any, Generic, TypeVar

from cabochon.core.errors import ConfigError, MissingExtra, ServerError

__all__ = ["Request", "Transport", "Unsettled", "ask", "ask_one"]

A = TypeVar("A")

TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Statuses that another attempt may not meet again."""

EXCERPT = 400
"""Characters of an answer that an error shows."""


@dataclass(frozen=True, kw_only=True)
class Transport:
    """Where a server is, and how patient to be with it."""

    url: str
    """Its root: http://127.0.0.1:8000, with or without the /v1 that completions lie under."""
    api_key: str = field(default="", repr=False)
    """Sent as a bearer token; empty: none."""
    timeout_s: float = 600.0
    """The longest that one attempt may take, answer included."""
    connect_s: float = 10.0
    """The longest that connecting may take."""
    attempts: int = 5
    """How often a request is made before its failure is final."""
    longest_wait_s: float = 60.0
    """Between two attempts; a server that asks for more (Retry-After) has failed."""
    concurrency: int = 32
    """Requests in flight at a time."""
    notice: Callable[[str], None] | None = field(default=None, repr=False)
    """Told of every attempt that failed and will be repeated; from another thread."""

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"{self.url!r} is no address; expected http://HOST:PORT")
        for name in ("timeout_s", "connect_s", "attempts", "concurrency"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}")
        if not self.longest_wait_s >= 0:
            raise ConfigError(f"longest_wait_s must be at least 0, got {self.longest_wait_s}")

    def at(self, path: str) -> str:
        """The address of an endpoint."""
        return f"{self.url.rstrip('/').removesuffix('/v1')}/{path.lstrip('/')}"


@dataclass(frozen=True, kw_only=True)
class Request(Generic[A]):
    """One question to a server, and how to read the answer."""

    path: str
    read: Callable[[Any], A]
    """From the decoded JSON (None for an empty answer) to what is wanted. It raises ServerError
    for an answer that cannot be used, Unsettled for one that may come out well another time."""
    body: Mapping[str, Any] | None = None
    """Sent as JSON by POST."""
    params: Mapping[str, str | Sequence[str]] = field(default_factory=dict)
    """Of the address."""
    method: str = "POST"
    repeat: bool = True
    """Whether asking twice does no harm."""
    absent: str = ""
    """What to do where the server has no such endpoint, for the message."""
    name: str = ""
    """What messages call the question, where there is more to say than its address."""
    then: Callable[[A], Request[A]] | None = None
    """From the answer to a further request, whose answer takes its place."""


class Unsettled(Exception):
    """An attempt failed in a way that the next one may not; carries what to raise if none does."""

    def __init__(self, error: ServerError, wait_s: float = 0.0) -> None:
        super().__init__(str(error))
        self.error = error
        self.wait_s = wait_s
        """How long the server asks to be left alone."""


def ask(transport: Transport, requests: Sequence[Request[A]]) -> Iterator[tuple[int, A]]:
    """The answers as they come, each with its request's place; several are under way at a time.

    Raises:
        ServerError: a request failed for good; those in flight are cancelled, and all that came
            before has been given out.
        MissingExtra: httpx2 or tenacity is not installed.
    """
    anyio, httpx, tenacity = _libraries()
    from anyio.from_thread import start_blocking_portal

    came: SimpleQueue[tuple[int, A] | None] = SimpleQueue()

    async def all_of_them() -> None:
        failures: list[ServerError] = []
        turn = anyio.CapacityLimiter(transport.concurrency)

        async def one(place: int) -> None:
            async with turn:
                request = requests[place]
                try:
                    answer = await _persist(tenacity, httpx, client, transport, request)
                    while request.then is not None:
                        request = request.then(answer)
                        answer = await _persist(tenacity, httpx, client, transport, request)
                except ServerError as error:
                    if request.name:
                        error.args = (f"{request.name}: {error}",)
                    failures.append(error)
                    group.cancel_scope.cancel()
                else:
                    came.put((place, answer))

        async with _client(httpx, transport) as client, anyio.create_task_group() as group:
            for place in range(len(requests)):
                group.start_soon(one, place)
        if failures:
            raise failures[0]

    # The event loop lives in a thread of its own: there may be one here already (notebooks).
    with start_blocking_portal() as portal:
        future = portal.start_task_soon(all_of_them)
        future.add_done_callback(lambda _: came.put(None))
        try:
            while (item := came.get()) is not None:
                yield item
            future.result()
        finally:
            future.cancel()


def ask_one(transport: Transport, request: Request[A]) -> A:
    """The answer to a single request.

    Raises:
        ServerError: it failed for good.
        MissingExtra: httpx2 or tenacity is not installed.
    """
    ((_, answer),) = ask(transport, [request])
    return answer


def _client(httpx: Any, transport: Transport) -> Any:
    key = {"Authorization": f"Bearer {transport.api_key}"} if transport.api_key else {}
    return httpx.AsyncClient(
        headers=key,
        timeout=httpx.Timeout(transport.timeout_s, connect=transport.connect_s, pool=None),
        limits=httpx.Limits(max_connections=transport.concurrency),
    )


async def _persist(
    tenacity: Any, httpx: Any, client: Any, transport: Transport, request: Request[A]
) -> A:
    """The answer, after as many attempts as are allowed."""
    attempts = transport.attempts if request.repeat else 1
    backoff = tenacity.wait_exponential(multiplier=0.5, max=transport.longest_wait_s)
    spread = tenacity.wait_random(0.5, 1.0)  # of the wait, so that many do not come back as one

    def wait(state: Any) -> float:
        return float(max(backoff(state) * spread(state), state.outcome.exception().wait_s))

    def tell(state: Any) -> None:
        if transport.notice is not None:
            transport.notice(
                f"attempt {state.attempt_number} of {attempts} failed, the next in "
                f"{state.next_action.sleep:.1f} s: {state.outcome.exception()}"
            )

    retrying = tenacity.AsyncRetrying(
        stop=tenacity.stop_after_attempt(attempts),
        wait=wait,
        retry=tenacity.retry_if_exception_type(Unsettled),
        before_sleep=tell,
        reraise=True,
    )
    try:
        answer: A = await retrying(_attempt, httpx, client, transport, request)
    except Unsettled as unsettled:
        error = unsettled.error
        times = f"{attempts} attempts failed; the last: " if attempts > 1 else ""
        raise ServerError(f"{times}{error}", status=error.status) from unsettled.__cause__
    return answer


async def _attempt(httpx: Any, client: Any, transport: Transport, request: Request[A]) -> A:
    import anyio

    where = f"{request.method} {transport.at(request.path)}"
    try:
        with anyio.fail_after(transport.timeout_s):
            response = await client.request(
                request.method,
                transport.at(request.path),
                json=None if request.body is None else dict(request.body),
                params=dict(request.params),
            )
    except (TimeoutError, httpx.TimeoutException) as error:
        raise Unsettled(
            ServerError(
                f"{where}: no answer within {transport.timeout_s:g} s (connecting: "
                f"{transport.connect_s:g} s); raise timeout_s, or ask for fewer tokens at a time"
            )
        ) from error
    except httpx.TransportError as error:
        raise Unsettled(
            ServerError(
                f"{where}: {type(error).__name__}: {error or 'the connection broke'}; is the "
                "server up, and is this its address?"
            )
        ) from error
    if response.status_code != 200:
        raise _refusal(transport, request, where, response)
    if not response.content:
        return request.read(None)
    try:
        decoded = response.json()
    except (JSONDecodeError, UnicodeDecodeError) as error:
        raise Unsettled(
            ServerError(
                f"{where}: the answer is not JSON ({error}): {_excerpt(response)}", status=200
            )
        ) from error
    try:
        return request.read(decoded)
    except (ServerError, Unsettled) as problem:
        unusable = problem.error if isinstance(problem, Unsettled) else problem
        unusable.args = (f"{where}: {unusable}",)
        raise


def _refusal(
    transport: Transport, request: Request[Any], where: str, response: Any
) -> Unsettled | ServerError:
    status = response.status_code
    hint = f"; {request.absent}" if status == 404 and request.absent else ""
    error = ServerError(
        f"{where}: {status} {response.reason_phrase}: {_excerpt(response)}{hint}", status=status
    )
    if status not in TRANSIENT:
        return error
    wait_s = _retry_after(response.headers.get("retry-after"))
    if wait_s > transport.longest_wait_s:
        return ServerError(
            f"{where}: {status} {response.reason_phrase}, and to ask again in {wait_s:g} s; "
            f"longest_wait_s is {transport.longest_wait_s:g}",
            status=status,
        )
    return Unsettled(error, wait_s)


def _retry_after(value: str | None) -> float:
    """Seconds; the header holds them, or a date."""
    if value is None:
        return 0.0
    if value.strip().isdecimal():
        return float(value)
    try:
        then = parsedate_to_datetime(value)
    except ValueError:
        return 0.0
    if then.tzinfo is None:
        then = then.replace(tzinfo=UTC)
    return max(0.0, (then - datetime.now(UTC)).total_seconds())


def _excerpt(response: Any) -> str:
    text = " ".join(response.text.split())
    return repr(text[:EXCERPT] + ("..." if len(text) > EXCERPT else "")) if text else "no body"


def _libraries() -> tuple[ModuleType, ModuleType, ModuleType]:
    try:
        import anyio
        import httpx2
        import tenacity
    except ImportError as error:
        raise MissingExtra("httpx2 and tenacity", "remote", "asking a server") from error
    return anyio, httpx2, tenacity
