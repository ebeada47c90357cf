"""What every runtime promises, on every runtime."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from crew_members import Member, Pair, slow_to_come, stillborn

from cabochon.core.errors import ActorDied, Closed, ConfigError, DataError, WeightsMismatch
from cabochon.runtime import Runtime, runtime_called, wait

ALL = ["inline", "threads", "processes", "ray"]

CONCURRENT = ["threads", "processes", pytest.param("ray", marks=pytest.mark.claim)]
"""Ray takes two seconds for each actor: what it adds to the tests of `ALL` runs with the claims."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One for all tests: it takes seconds to start."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed (extra ray)")
    import ray

    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        environment.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        ray.init(
            num_cpus=4,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=200 * 2**20,
        )
        yield
        ray.shutdown()


@contextlib.contextmanager
def opened(name: str, request: pytest.FixtureRequest) -> Iterator[Runtime]:
    if name == "ray":
        request.getfixturevalue("cluster")
    with runtime_called(name) as runtime:
        yield runtime


@pytest.fixture(params=ALL)
def runtime(request: pytest.FixtureRequest) -> Iterator[Runtime]:
    with opened(request.param, request) as one:
        yield one


@pytest.fixture(params=CONCURRENT)
def concurrent(request: pytest.FixtureRequest) -> Iterator[Runtime]:
    with opened(request.param, request) as one:
        yield one


def test_calls_are_answered_in_their_order(runtime: Runtime) -> None:
    actor = runtime.spawn(Member, 10, name="a")
    answers = [actor.call("add", 1, times=2), actor.call("add", 5), actor.call("add", -3)]
    assert [answer.result(60) for answer in answers] == [12, 17, 14]
    assert (actor.name, actor.generation, actor.death) == ("a", 0, None)


def test_records_come_back_as_they_went(runtime: Runtime) -> None:
    record = {
        "plain": [None, True, 2**70, -0.5, "ü\ud800", float("inf"), b"\0\xff"],
        "tuple": (1, (2.5,)),
        "arrays": [np.arange(6.0).reshape(2, 3).T, np.zeros((0, 4), "<i2"), np.array("ab")],
        "scalar": np.float32(0.1),
        "big": np.arange(300_000, dtype=np.uint8),
        "tensors": Pair(left=torch.tensor([[0.1, 1e30]]).bfloat16(), right=torch.tensor(True)),
        "$": "a key like any other",
        "nothing": torch.empty(0, 3),
    }
    actor = runtime.spawn(Member, name="a")
    for _ in range(3):
        back = actor.call("echo", record).result(60)
        assert list(back) == list(record)
        for name in ("plain", "tuple", "$"):
            assert back[name] == record[name]
        mine_and_its = zip(
            [*record["arrays"], record["big"]], [*back["arrays"], back["big"]], strict=True
        )
        for mine, its in mine_and_its:
            assert mine.dtype == its.dtype
            assert mine.shape == its.shape
            assert its.flags.writeable
            np.testing.assert_array_equal(mine, its)
        assert type(back["scalar"]) is np.float32
        assert back["scalar"] == record["scalar"]
        for mine, its in (
            (record["tensors"].left, back["tensors"].left),
            (record["tensors"].right, back["tensors"].right),
            (record["nothing"], back["nothing"]),
        ):
            assert mine.dtype == its.dtype
            assert torch.equal(mine, its)


def test_an_exception_ends_its_actor_and_no_other(runtime: Runtime) -> None:
    actor, other = runtime.spawn(Member, name="a"), runtime.spawn(Member, name="b")
    actor.call("add", 1).result(60)
    failed = actor.call("raises", "reward is nan").exception(60)
    assert isinstance(failed, ActorDied)
    assert (failed.actor, failed.cause) == ("a", "ValueError: reward is nan")
    assert failed.__cause__ is not None
    assert actor.death == failed.cause
    after = actor.call("add", 1).exception(60)
    assert isinstance(after, ActorDied)
    assert after.cause == failed.cause
    assert other.call("add", 7).result(60) == 7


def test_a_replacement_is_made_as_the_first_one_was(runtime: Runtime) -> None:
    actor = runtime.spawn(Member, 5, name="a")
    assert actor.call("add", 1).result(60) == 6
    assert isinstance(actor.call("raises", "no").exception(60), ActorDied)
    anew = runtime.replace(actor)
    assert (anew.name, anew.generation) == ("a", 1)
    assert anew.call("add", 1).result(60) == 6
    assert runtime.replace(anew).call("add", 2).result(60) == 7  # it lived


def test_what_cannot_be_made_is_not_made_for_ever(runtime: Runtime) -> None:
    actor = runtime.spawn(stillborn, name="a")
    for _ in range(2):
        assert isinstance(actor.call("add", 1).exception(60), ActorDied)
        actor = runtime.replace(actor)
    assert isinstance(actor.call("add", 1).exception(60), ActorDied)
    with pytest.raises(ActorDied, match=r"3 in a row died before .* OSError: no such world"):
        runtime.replace(actor)


def test_names_differ_among_the_living(runtime: Runtime) -> None:
    actor = runtime.spawn(Member, name="a")
    with pytest.raises(ConfigError, match="an actor a already"):
        runtime.spawn(Member, name="a")
    actor.kill("enough")
    assert actor.death == "enough"
    runtime.spawn(Member, name="a")
    with pytest.raises(ConfigError, match="patience"):
        runtime.spawn(Member, name="c", patience=0)


def test_what_is_asked_of_the_dead_and_of_the_closed_fails(
    request: pytest.FixtureRequest,
) -> None:
    for name in ALL:
        with opened(name, request) as runtime:
            actor = runtime.spawn(Member, name="a")
            actor.call("add", 1).result(60)
            queue = runtime.queue(1)
        assert isinstance(actor.call("add", 1).exception(5), ActorDied)
        assert runtime.close() == ()
        with pytest.raises(Closed):
            runtime.spawn(Member, name="b")
        with pytest.raises(Closed):
            queue.put(1)


def test_waiting_for_some_gives_a_partial_batch(concurrent: Runtime) -> None:
    actors = [concurrent.spawn(Member, name=f"{i}") for i in range(3)]
    wait([actor.call("add", 0) for actor in actors])
    calls = [actors[0].call("sleep", 4.0), actors[1].call("sleep", 0.0)]
    calls += [actors[2].call("sleep", 4.0)]
    done, pending = wait(calls, count=1)
    assert done == [calls[1]]
    assert pending == [calls[0], calls[2]]
    begin = time.monotonic()
    assert wait(calls, count=3, timeout=0.05) == (done, pending)
    assert time.monotonic() - begin < 5.0
    actors[0].kill("slow")
    assert wait(calls, count=2)[0] == calls[:2]
    assert isinstance(calls[0].exception(), ActorDied)
    actors[2].kill("slow")


def test_who_hangs_is_noticed_named_and_replaced(concurrent: Runtime) -> None:
    actor = concurrent.spawn(Member, name="a", patience=1.0)
    actor.call("add", 1).result(60)
    late = actor.call("sleep", 4.0)
    with pytest.raises(ActorDied, match=r"actor a died: hung: no answer to sleep within 1 s"):
        late.result(20)
    anew = concurrent.replace(actor)
    assert anew.call("add", 1).result(60) == 1


def test_waiting_for_a_call_is_not_hanging(concurrent: Runtime) -> None:
    """Patience is each call's own: many short calls in a row are no long one."""
    actor = concurrent.spawn(slow_to_come, 1.3, name="a", patience=1.2)
    calls = [actor.call("sleep", 0.2) for _ in range(7)]
    assert [call.result(60) for call in calls] == [0.2] * 7
    time.sleep(1.3)
    assert actor.call("add", 1).result(60) == 1


def weights(value: float) -> dict[str, torch.Tensor]:
    return {
        "w": torch.full((64, 64), value, dtype=torch.bfloat16),
        "b": torch.full((5,), value),
        "n": torch.full((), int(value), dtype=torch.int64),
        "none": torch.empty(0, 2),
    }


def test_published_weights_are_the_newest_and_equal_to_the_bit(runtime: Runtime) -> None:
    publisher = runtime.publisher(weights(0))
    reader = publisher.subscriber()
    assert publisher.version == reader.version == -1
    with pytest.raises(DataError, match="published yet"):
        reader.newest()
    actor = runtime.spawn(Member, name="a")
    own = weights(3)
    own["w"].copy_(torch.randn(64, 64))
    publisher.publish(own, 7)
    kept = {name: tensor.clone() for name, tensor in own.items()}
    own["w"].zero_()  # the learner goes on
    version, seen = actor.call("read", reader).result(60)
    assert version == publisher.version == reader.version == 7
    assert list(seen) == list(kept)
    assert all(torch.equal(seen[name], kept[name]) for name in kept)
    publisher.publish(weights(4), 9)
    assert actor.call("read", reader).result(60)[0] == reader.newest()[0] == 9


def test_weights_of_another_kind_or_an_old_version_are_refused(runtime: Runtime) -> None:
    publisher = runtime.publisher(weights(0))
    publisher.publish(weights(0), 3)
    with pytest.raises(ConfigError, match="3 was published after 3"):
        publisher.publish(weights(0), 3)
    with pytest.raises(WeightsMismatch, match="only in one"):
        publisher.publish({"w": torch.zeros(64, 64)}, 4)
    with pytest.raises(WeightsMismatch, match="b is"):
        publisher.publish({**weights(0), "b": torch.zeros(4)}, 4)
    assert publisher.version == 3


def test_no_reader_sees_a_mixture_of_two_versions(concurrent: Runtime) -> None:
    """Two readers and a writer that never pauses, 1 MB in eight tensors."""

    def uniform(version: int) -> dict[str, torch.Tensor]:
        value = float(version % 128)
        return {f"{i}": torch.full((1 << 16,), value, dtype=torch.bfloat16) for i in range(8)}

    publisher = concurrent.publisher(uniform(0))
    publisher.publish(uniform(1), 1)
    readers = [concurrent.spawn(Member, name=f"{i}") for i in range(2)]
    wait([reader.call("read", publisher.subscriber()) for reader in readers])  # imports torch
    calls = [each.call("read_often", publisher.subscriber(), 1.0) for each in readers]
    while not all(call.done() for call in calls):
        publisher.publish(uniform(publisher.version + 1), publisher.version + 1)
    for call in calls:
        mixed, readings, versions = call.result(60)
        assert mixed == 0
        assert readings >= 2
        assert versions >= 2


def test_a_queue_gives_what_was_put_in_its_order_with_its_lag(runtime: Runtime) -> None:
    queue = runtime.queue(4)
    actor = runtime.spawn(Member, name="a")
    assert actor.call("put_all", queue, [3, 4, 5]).result(60) == [True] * 3
    queue.advance(5)
    items = [queue.get() for _ in range(3)]
    assert [item.record["number"] for item in items] == [0, 1, 2]
    assert [(item.version, item.lag) for item in items] == [(3, 2), (4, 1), (5, 0)]
    np.testing.assert_array_equal(items[2].record["data"], np.full(9, 2))
    counts = queue.counts
    assert (counts.put, counts.taken, counts.held, counts.dropped) == (3, 3, 0, 0)
    assert dict(counts.lags) == {0: 1, 1: 1, 2: 1}
    with pytest.raises(TimeoutError):
        queue.get(timeout=0.01)
    queue.put(1)
    assert actor.call("take", queue, 1).result(60) == [1]


def test_what_is_too_old_is_dropped_and_counted(runtime: Runtime) -> None:
    queue = runtime.queue(4, max_lag=1)
    queue.put("old", version=0)
    queue.put("new", version=2)
    queue.advance(2)
    assert queue.get().record == "new"
    assert queue.put("too late", version=0) is False
    counts = queue.counts
    assert (counts.put, counts.taken, counts.dropped, counts.held) == (3, 1, 2, 0)


def test_a_full_queue_holds_its_actors_back(concurrent: Runtime) -> None:
    queue = concurrent.queue(2)
    actor = concurrent.spawn(Member, name="a")
    call = actor.call("put_all", queue, [0] * 6)
    while (counts := queue.counts).waiting == 0:
        assert wait([call], timeout=0.05) == ([], [call])
    assert (counts.held, counts.put, counts.waiting) == (2, 2, 1)
    assert [queue.get(30).record["number"] for _ in range(6)] == list(range(6))
    assert call.result(30) == [True] * 6
    with pytest.raises(TimeoutError):
        [queue.put(0, timeout=0.01) for _ in range(3)]
    assert queue.counts.waiting == 0


def test_closing_a_queue_sends_everybody_home(concurrent: Runtime) -> None:
    queue, empty = concurrent.queue(1), concurrent.queue(1)
    putter, getter = (concurrent.spawn(Member, name=name) for name in "ab")
    calls = [putter.call("put_all", queue, [0] * 3), getter.call("take", empty, 1)]
    while queue.counts.waiting == 0:
        assert wait(calls, timeout=0.05)[0] == []
    queue.close()
    empty.close()
    for call in calls:
        died = call.exception(30)
        assert isinstance(died, ActorDied)
        assert "Closed" in died.cause
    assert queue.get(5).record["number"] == 0  # what was put is not lost
    with pytest.raises(Closed):
        queue.get(5)


def test_a_waiting_that_times_out_takes_nothing(concurrent: Runtime) -> None:
    queue = concurrent.queue(3)
    actor = concurrent.spawn(Member, name="a")
    assert actor.call("wait_for_nothing", queue, 0.05).result(60) == "nothing came"
    queue.put(1)
    assert queue.get(5).record == 1


@pytest.mark.parametrize(
    ("name", "many"),
    [("threads", 100), ("processes", 9), pytest.param("ray", 4, marks=pytest.mark.claim)],
)
def test_nothing_is_lost_or_given_twice_whoever_dies(
    name: str, many: int, request: pytest.FixtureRequest
) -> None:
    """Actors put at random speeds, a third are killed on the way and replaced."""
    with opened(name, request) as runtime:
        queue = runtime.queue(7)
        draw = np.random.default_rng(0)
        delays = draw.uniform(0.0, 0.004, many)
        actors = [runtime.spawn(Member, i, name=f"{i}") for i in range(many)]
        calls = [
            actor.call("put_all", queue, [0] * 20, float(delay))
            for actor, delay in zip(actors, delays, strict=True)
        ]
        seen: dict[str, list[int]] = {}
        lives: dict[int, list[str]] = {i: [] for i in range(many)}

        def take(seconds: float) -> None:
            record = queue.get(seconds).record
            if record["life"] not in seen:
                seen[record["life"]] = []
                lives[record["who"]].append(record["life"])
            seen[record["life"]].append(record["number"])

        for _ in range(many):
            take(60)
        for i in range(0, many, 3):
            actors[i].kill("for the test")
            calls[i] = runtime.replace(actors[i]).call("put_all", queue, [0] * 20)
        while not all(call.done() for call in calls) or queue.counts.held:
            with contextlib.suppress(TimeoutError):
                take(0.2)
        assert all(call.result() == [True] * 20 for call in calls)
        counts = queue.counts
        assert counts.put == counts.taken == sum(map(len, seen.values()))
        assert counts.dropped == counts.held == counts.waiting == 0
        # Each life's records came once, in order, from the first on; those of the last all came.
        assert all(numbers == list(range(len(numbers))) for numbers in seen.values())
        for i in range(many):
            assert len(lives[i]) in ({1, 2} if i % 3 == 0 else {1})
            assert max(len(seen[life]) for life in lives[i]) == 20


def test_a_server_that_restarts_is_asked_again(concurrent: Runtime) -> None:
    """Its callers learn which requests were not answered, and ask its replacement for those."""
    server = concurrent.spawn(Member, name="server")
    asked = {number: server.call("echo", number) for number in range(20)}
    asked[20] = server.call("sleep", 3.0)
    asked |= {number: server.call("echo", number) for number in range(21, 40)}
    wait(list(asked.values()), count=20)
    server.kill("restart")
    answered = {number for number, call in asked.items() if call.exception(30) is None}
    assert answered == set(range(20))
    anew = concurrent.replace(server)
    again = {number: anew.call("echo", number) for number in asked.keys() - answered}
    assert {number: call.result(60) for number, call in again.items()} == {
        number: number for number in range(20, 40)
    }


def test_an_unknown_runtime_is_refused() -> None:
    with pytest.raises(ConfigError, match="inline, threads, processes, ray"):
        runtime_called("clouds")
