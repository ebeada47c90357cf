"""The queue by itself: what it admits, what it holds back, what it drops."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cabochon.core.errors import Closed, ConfigError
from cabochon.runtime import inline
from cabochon.runtime.queues import BoundedQueue


@given(
    st.integers(1, 4),
    st.none() | st.integers(0, 3),
    st.sampled_from(["drop", "wait"]),
    st.integers(1, 3),
    st.lists(st.tuples(st.sampled_from("pgac"), st.integers(0, 3)), max_size=40),
)
@settings(max_examples=200, deadline=None)
def test_counts_add_up_and_no_lag_exceeds_the_bound(capacity, max_lag, stale, takes, moves) -> None:
    """Any sequence of puts, gets, advances and withdrawals."""
    queue = BoundedQueue(capacity, max_lag=max_lag, stale=stale, takes=takes)
    version, number = 0, 0
    puts, gets = [], []
    for move, by in moves:
        if move == "p":
            puts.append((number, queue.offer(number, max(0, version - by))))
            number += 1
        elif move == "g":
            gets.append(queue.take())
        elif move == "a":
            version += by
            queue.advance(version)
        else:
            for future in [*(f for _, f in puts[-1:]), *gets[-1:]]:
                future.cancel()
        counts = queue.counts
        assert counts.held <= capacity
        assert counts.put == counts.taken + counts.dropped + counts.held
        assert counts.put == sum(f.done() and not f.cancelled() for _, f in puts)
    items = [f.result() for f in gets if f.done() and not f.cancelled()]
    assert [item.record for item in items] == sorted(item.record for item in items)
    assert len(items) == queue.counts.taken
    bound = float("inf") if max_lag is None else max_lag
    assert all(0 <= item.lag <= bound for item in items)


def test_who_waits_for_the_learner_has_nothing_thrown_away() -> None:
    """Puts that are on time, a learner that takes three a version: none of 30 is dropped."""
    for max_lag in (0, 1, 3):
        queue = BoundedQueue(99, max_lag=max_lag, stale="wait", takes=3)
        lags, offered = [], []
        for version in range(10):
            queue.advance(version)
            # Actors, who have the newest weights, put as much as they may.
            while not offered or offered[-1].done():
                offered.append(queue.offer(len(offered), version))
            items = [queue.get(timeout=0) for _ in range(3)]
            lags += [item.lag for item in items]
            offered.pop().cancel()  # made with what will be an old version
        assert queue.counts.dropped == 0
        assert max(lags) == max_lag


def test_at_lag_zero_an_actor_waits_for_the_next_version() -> None:
    queue = BoundedQueue(9, max_lag=0, stale="wait", takes=1)
    assert queue.put("a", version=0)
    queue.get(timeout=0)
    early = queue.offer("b", 0)
    assert not early.done()  # the learner is computing the next version
    queue.advance(1)
    assert early.result(0) is False  # made with the last one, so too old by now
    assert queue.put("c", version=1)


def test_what_grows_too_old_makes_room_at_once() -> None:
    queue = BoundedQueue(1, max_lag=0)
    queue.put("a", version=0)
    waits = queue.offer("b", 1)
    queue.advance(1)
    assert waits.result(0) is True
    counts = queue.counts
    assert (counts.dropped, counts.held, counts.waiting) == (1, 1, 0)


def test_an_item_given_back_is_the_next_one() -> None:
    queue = BoundedQueue(1)
    queue.put("a")
    item = queue.get()
    queue.put("b")
    queue.give_back(item)  # its taker died: for the moment there is one more than the capacity
    assert [queue.get().record, queue.get().record] == ["a", "b"]
    assert queue.counts.taken == queue.counts.put == 2


def test_many_threads_share_one_queue() -> None:
    queue = BoundedQueue(3)
    taken: list[int] = []

    def put(base: int) -> None:
        for number in range(50):
            queue.put(base + number)

    def take() -> None:
        while True:
            try:
                taken.append(queue.get().record)
            except Closed:
                return

    putters = [threading.Thread(target=put, args=(1000 * i,)) for i in range(8)]
    takers = [threading.Thread(target=take) for _ in range(3)]
    for thread in [*putters, *takers]:
        thread.start()
    for thread in putters:
        thread.join()
    queue.close()
    for thread in takers:
        thread.join()
    assert sorted(taken) == [1000 * i + number for i in range(8) for number in range(50)]


def test_alone_there_is_nobody_to_wait_for() -> None:
    with inline() as runtime:
        queue = runtime.queue(1)
        with pytest.raises(ConfigError, match="inline"):
            queue.get()
        queue.put(1)
        with pytest.raises(ConfigError, match="1 of 1"):
            queue.put(2)
        with pytest.raises(TimeoutError):
            queue.put(2, timeout=10.0)


def test_bounds_that_bound_nothing_are_refused() -> None:
    for wrong in ({"capacity": 0}, {"max_lag": -1}, {"stale": "keep"}, {"takes": 0}):
        with pytest.raises(ConfigError):
            BoundedQueue(**{"capacity": 1, **wrong})
