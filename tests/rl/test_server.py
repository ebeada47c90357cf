"""No observation is lost or answered twice, whoever is late, hangs or dies."""

import os
import signal
import threading
import time
from collections import Counter

import numpy as np
import pytest

from cabochon.core import Key
from cabochon.core.errors import ConfigError, DataError, NonFinite
from cabochon.models.agents.networks import NetworkConfig, PolicyAndValue, build
from cabochon.rl.environment import EnvironmentSpec, signature_of
from cabochon.rl.inference import Inference, sample
from cabochon.rl.server import ActingConfig, Server
from cabochon.rl.unrolls import UnrollStore
from cabochon.runtime import inline, processes, runtime_called, threads


def spec(name="Counting", **options):
    return EnvironmentSpec(name=f"small_environments:cabochon-tests/{name}-v0", options=options)


class Witness:
    """Checks that each environment's time goes on by one, with the action that was chosen."""

    def __init__(self):
        self.before, self.answered = {}, Counter()

    def __call__(self, arrival, actions):
        for row, number in enumerate(arrival.ids.tolist()):
            _, now, action = arrival.observation[row].tolist()
            run, before = int(arrival.run[row]), self.before.get(number)
            if before is not None and before[0] == run:
                _, time_before, chosen = before
                if arrival.first[row]:
                    final = arrival.final_observation[arrival.ended.tolist().index(row)]
                    now, action = final[1], final[2]
                assert (now, action) == (time_before + 1, chosen), number
            else:
                assert arrival.first[row]
            seen = float(arrival.observation[row, 1])
            self.before[number] = (run, seen, int(actions[row]))
            self.answered[number] += 1


def serve(runtime, which, acting, *, length=4, observe=None, notice=None):
    network = build(NetworkConfig(hidden=(8,)), signature_of(spec()), PolicyAndValue, Key(0))
    inference = Inference(network, UnrollStore(acting.total, length=length), sample, Key(0))
    server = Server(runtime, which, inference, Key(0), acting, observe=observe, notice=notice)
    server.begin()
    return server


def turns(server, until, seconds=30.0):
    unrolls, end = [], time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end, server.counts
        unrolls += server.turn()
    return unrolls


def test_a_hundred_actors_with_delays_of_their_own_are_each_answered_once():
    witness, acting = Witness(), ActingConfig(actors=100, environments=1, inference_batch=32)
    with threads() as runtime:
        server = serve(runtime, spec("Slow", milliseconds=4.0), acting, observe=witness)
        unrolls = turns(server, lambda: server.counts.steps >= 6000)
    assert set(witness.answered) == set(range(100))
    assert sum(witness.answered.values()) == server.counts.steps
    assert min(witness.answered.values()) > 10
    assert server.counts.partial < server.counts.batches
    assert server.counts.steps <= 32 * server.counts.batches
    # And every transition that was completed is in one unroll; an arrival may await its answer.
    for number in range(100):
        own, answered = sum(u.environment == number for u in unrolls), witness.answered[number]
        assert own in {(answered - 1) // 4, answered // 4}


def test_a_partial_batch_goes_when_its_deadline_comes():
    acting = ActingConfig(actors=4, environments=1, deadline_ms=20.0)
    which = spec("Broken", how="hang", seconds=0.7)  # all of them, at the third step
    with threads() as runtime:
        server = serve(runtime, which, acting)
        turns(server, lambda: server.counts.steps >= 12)
        server.seats[0].actor.kill("was told to")  # three are left until it is replaced
        begin = time.monotonic()
        turns(server, lambda: server.counts.steps >= 16)
        assert server.counts.partial >= 1
        assert time.monotonic() - begin < 5.0


def test_a_killed_actor_is_replaced_and_stops_nobody():
    witness, told = Witness(), []
    acting = ActingConfig(actors=8, environments=2, inference_batch=4)
    with threads() as runtime:
        server = serve(
            runtime, spec("Slow", milliseconds=1.0), acting, observe=witness, notice=told.append
        )
        turns(server, lambda: server.counts.steps >= 200)
        for victim in (0, 3, 3, 7):
            server.seats[victim].actor.kill("was told to")
            turns(server, lambda: server.counts.steps % 50 < 4)
            turns(server, lambda: server.counts.steps % 50 >= 4)
        turns(server, lambda: server.counts.steps >= 1500)
    assert server.counts.replaced == len(told) >= 3
    assert any("actor-0 died: was told to" in each for each in told)
    assert min(witness.answered.values()) > 20


def test_a_process_that_is_killed_is_replaced():
    witness, told, acting = Witness(), [], ActingConfig(actors=2, environments=2)
    with processes() as runtime:
        server = serve(runtime, spec(length=6), acting, observe=witness, notice=told.append)
        turns(server, lambda: server.counts.steps >= 100)
        os.kill(server.seats[1].actor.body.process.pid, signal.SIGKILL)
        turns(server, lambda: server.counts.replaced == 1)
        before = witness.answered[3]
        turns(server, lambda: witness.answered[3] > before + 20)
    assert "actor-1 died" in told[0]


def test_another_server_takes_the_actors_over():
    witness, acting = Witness(), ActingConfig(actors=5, environments=2)
    with threads() as runtime:
        server = serve(runtime, spec(length=9), acting, observe=witness)
        turns(server, lambda: server.counts.steps >= 100)
        network = server.inference.network
        store = UnrollStore(acting.total, length=4)
        server.inference = Inference(network, store, sample, Key(0))
        server.begin()  # what the actors still owe the server before is nobody's
        unrolls = turns(server, lambda: server.counts.steps >= 400)
    assert all(each.run >= 5 for each in unrolls)
    assert all(each.begins == (each.observation[0, 1] == 0) for each in unrolls[:10])


@pytest.mark.parametrize("name", ["inline", "threads"])
@pytest.mark.parametrize(("how", "kind"), [("raise", DataError), ("nan_reward", NonFinite)])
def test_environments_that_fail_again_and_again_are_an_error(name, how, kind):
    told, acting = [], ActingConfig(actors=2, environments=1, replacements=2)
    with runtime_called(name) as runtime:
        server = serve(runtime, spec("Broken", how=how), acting, length=8, notice=told.append)
        with pytest.raises(kind, match=r"died 3 times in a row.*cabochon-tests/Broken-v0"):
            turns(server, lambda: False)
    assert 2 <= len(told) <= 4


@pytest.mark.parametrize("name", ["inline", "threads"])
@pytest.mark.parametrize("replacements", [0, 2, 5])
def test_environments_that_never_begin_are_an_error(name, replacements):
    told, acting = [], ActingConfig(actors=1, environments=1, replacements=replacements)
    with runtime_called(name) as runtime:
        server = serve(runtime, spec("Broken", how="raise_in_reset"), acting, notice=told.append)
        with pytest.raises(DataError, match=r"actor-0 died.* in reset: the cartridge is missing"):
            turns(server, lambda: False)
    assert len(told) == server.counts.replaced == min(replacements, 2)


def test_a_hanging_environment_is_replaced_after_its_patience():
    acting = ActingConfig(actors=2, environments=1, patience=0.8, replacements=1)
    which = spec("Broken", how="hang", seconds=4.0)
    with threads() as runtime:
        server = serve(runtime, which, acting, length=8)
        with pytest.raises(DataError, match=r"hung: no answer to step within 0\.8 s"):
            turns(server, lambda: False)


def test_environments_go_on_from_a_saved_state_as_if_nothing_had_been():
    acting = ActingConfig(actors=3, environments=2)
    with inline() as runtime, inline() as again:
        server = serve(runtime, spec(length=6, spread=5), acting)
        turns(server, lambda: server.counts.steps >= 90)
        other = Server(again, spec(length=6, spread=5), server.inference, Key(0), acting)
        assert other.restore(server.state()) == 0
        saved, seen = server.inference.state(), [[], []]
        for each, list_ in zip((server, other), seen, strict=True):
            server.inference.restore(saved)
            each.observe = lambda arrival, actions, list_=list_: list_.append(arrival.observation)
            for _ in range(20):
                each.turn()
        np.testing.assert_array_equal(*seen)


def test_environments_that_are_not_the_same_again_begin_anew():
    acting = ActingConfig(actors=2, environments=1)
    with inline() as runtime, inline() as again:
        server = serve(runtime, spec("Forgetful"), acting)
        server.turn()
        other = Server(again, spec("Forgetful"), server.inference, Key(0), acting)
        assert other.restore(server.state()) == 2
        assert len(other.turn()) == 0
        assert {seat.run for seat in other.seats} == {2, 3}


def test_a_busy_actor_cannot_be_saved():
    with threads() as runtime:
        server = serve(runtime, spec("Broken", how="hang", seconds=0.5), ActingConfig(actors=1))
        turns(server, lambda: server.counts.steps >= 12)
        with pytest.raises(ConfigError, match="inline"):
            server.state()


def test_no_thread_is_left_behind():
    before = threading.active_count()
    with threads() as runtime:
        server = serve(runtime, spec(), ActingConfig(actors=6))
        server.turn()
    time.sleep(0.1)
    assert threading.active_count() <= before


def test_numbers_that_cannot_be_are_refused():
    for wrong in ({"actors": 0}, {"patience": 0.0}, {"deadline_ms": -1.0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            ActingConfig(**wrong)
    with pytest.raises(ConfigError, match="never be full"):
        ActingConfig(actors=2, environments=2, inference_batch=5)
