"""What only processes can do: be killed, share memory, and leave nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from crew_members import Member

from cabochon.core.errors import ActorDied, ConfigError, DataError
from cabochon.runtime import processes
from cabochon.runtime.memory import Memory, available_megabytes, require_room
from cabochon.runtime.shared_weights import SharedWriter


def alive(process: int) -> bool:
    status = Path(f"/proc/{process}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def gone_within(seconds: float, numbers: list[int]) -> bool:
    end = time.monotonic() + seconds
    while any(alive(number) for number in numbers) and time.monotonic() < end:
        time.sleep(0.02)
    return not any(alive(number) for number in numbers)


def test_a_killed_process_is_named_with_its_signal_or_status() -> None:
    with processes() as runtime:
        actor = runtime.spawn(Member, name="a")
        number = actor.call("pid").result(60)
        waiting = actor.call("sleep", 60.0)
        os.kill(number, signal.SIGKILL)
        assert "killed (SIGKILL" in str(waiting.exception(10))
        actor = runtime.replace(actor)
        assert "status 3" in str(actor.call("exits", 3).exception(60))
        actor = runtime.replace(actor)
        assert "SIGTERM" in _ended_by(actor, signal.SIGTERM)


def _ended_by(actor, sign: signal.Signals) -> str:
    number = actor.call("pid").result(60)
    call = actor.call("sleep", 60.0)
    os.kill(number, sign)
    return str(call.exception(10))


def test_the_trace_of_a_far_exception_comes_along() -> None:
    with processes() as runtime:
        failed = runtime.spawn(Member, name="a").call("raises", "no").exception(60)
        assert isinstance(failed, ActorDied)
        assert "raise ValueError(text)" in str(failed.__cause__)


def test_closing_leaves_no_process_thread_or_descriptor() -> None:
    before = set(threading.enumerate())
    descriptors = len(os.listdir("/proc/self/fd"))
    with processes() as runtime:
        actors = [runtime.spawn(Member, name=f"{i}") for i in range(3)]
        numbers = [actor.call("pid").result(60) for actor in actors]
        numbers.append(actors[0].call("child").result(60))
        queue = runtime.queue(1)
        busy = actors[1].call("put_all", queue, [0] * 9)
        actors[2].call("filled", 1_000_000, 7).result(60)
        publisher = runtime.publisher({"w": torch.zeros(1000)})
        publisher.publish({"w": torch.ones(1000)}, 1)
        actors[2].call("read", publisher.subscriber()).result(60)
    assert isinstance(busy.exception(5), ActorDied)
    assert gone_within(5.0, numbers)
    assert set(threading.enumerate()) <= before
    del publisher, runtime, queue, actors, busy
    assert len(os.listdir("/proc/self/fd")) <= descriptors


def test_who_does_not_end_is_killed_and_named() -> None:
    runtime = processes()
    actor = runtime.spawn(Member, name="sleeper")
    number = actor.call("pid").result(60)
    call = actor.call("sleep", 600.0)
    begin = time.monotonic()
    assert runtime.close(grace=0.2) == ("sleeper",)
    assert time.monotonic() - begin < 10.0
    assert "went on for 0.2 s" in str(call.exception(1))
    assert gone_within(5.0, [number])


def test_a_killed_parent_leaves_no_actor_and_no_memory() -> None:
    """Of a hard kill nobody is told; the actors find their sockets closed."""
    shared = set(os.listdir("/dev/shm"))
    program = textwrap.dedent(f"""
        import sys, time, torch
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from crew_members import Member
        from cabochon.runtime import processes
        runtime = processes()
        actors = [runtime.spawn(Member, name=f"{{i}}") for i in range(3)]
        publisher = runtime.publisher({{"w": torch.zeros(1 << 20)}})
        actors[0].call("filled", 1_000_000, 1).result()
        numbers = [actor.call("pid").result() for actor in actors]
        print(*numbers, actors[0].call("child").result(), flush=True)
        actors[1].call("sleep", 600.0)
        time.sleep(600)
    """)
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    numbers = [int(word) for word in parent.stdout.readline().split()]
    assert len(numbers) == 4
    assert all(alive(number) for number in numbers)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert gone_within(10.0, numbers)
    assert set(os.listdir("/dev/shm")) <= shared


def test_what_a_taker_took_with_it_into_death_comes_back() -> None:
    """It is stopped, so that what it is sent never arrives, and then killed."""
    with processes() as runtime:
        queue = runtime.queue(2)
        actor = runtime.spawn(Member, name="a")
        number = actor.call("pid").result(60)
        actor.call("take", queue, 1)
        while not queue._getting:
            time.sleep(0.01)
        os.kill(number, signal.SIGSTOP)
        stat = Path(f"/proc/{number}/stat")
        while stat.read_text().rpartition(")")[2].split()[0] != "T":  # it may run for a moment
            time.sleep(0.001)
        queue.put("precious")
        assert queue.counts.taken == 1
        os.kill(number, signal.SIGKILL)
        assert queue.get(timeout=10).record == "precious"
        assert queue.counts.taken == queue.counts.put == 1


def test_what_is_no_record_is_refused_where_it_is_handed_over() -> None:
    with processes() as runtime:
        actor = runtime.spawn(Member, name="a")
        with pytest.raises(DataError, match=r"threading\.Event is no record"):
            actor.call("echo", {"x": [threading.Event()]})
        with pytest.raises(DataError, match="keys of records"):
            actor.call("echo", {1: 2})
        with pytest.raises(DataError, match="dtype object"):
            actor.call("echo", np.array([None]))
        assert actor.call("add", 2).result(60) == 2
        with pytest.raises(ConfigError, match="top of a module"):
            runtime.spawn(lambda: None, name="b")


def test_more_actors_than_memory_holds_are_refused_in_numbers() -> None:
    with pytest.raises(ConfigError, match=r"200 more actors of 150 MB each need 30000 MB.*117 fit"):
        require_room(200, 150.0, available=17_900.0)
    require_room(117, 150.0, available=17_900.0)
    there = available_megabytes()
    assert there is not None
    with processes() as runtime, pytest.raises(ConfigError, match="0 fit"):
        runtime.spawn(Member, name="a", megabytes=there + 1000)


def test_memory_has_no_name_and_goes_with_its_last_view() -> None:
    names = set(os.listdir("/dev/shm"))
    before = len(os.listdir("/proc/self/fd"))
    memory = Memory(1 << 20)
    again = Memory(1 << 20, os.dup(memory.descriptor))
    memory.bytes[7] = 9
    assert again.bytes[7] == 9
    assert set(os.listdir("/dev/shm")) == names
    del memory, again
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_reader_copies_again_what_changed_under_its_hands() -> None:
    writer = SharedWriter({"w": torch.zeros(4)})
    writer.publish({"w": torch.ones(4)}, 1)
    reader = writer.subscriber()
    original = reader.place
    passes = iter(range(10))

    def meanwhile(count: int):
        room = original(count).copy()
        if next(passes) == 0:  # the writer comes round and is in the middle of this very place
            for version in range(2, 2 + reader.places):
                writer.publish({"w": torch.full((4,), float(version))}, version)
        return room

    reader.place = meanwhile  # type: ignore[method-assign]
    version, tensors = reader.newest()
    assert version == 1 + reader.places
    assert tensors["w"].tolist() == [float(version)] * 4
    assert reader.retries == 1
