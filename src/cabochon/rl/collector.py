"""Where a learner's unrolls come from: taken as they are needed, or made beside the learning.

`inline`: the learner's own thread acts until there are unrolls enough. Everything, the lag
included, is a function of the seed, and a checkpoint holds all of it.

Otherwise a thread serves the actors all the time, with a copy of the weights that is brought up to
date before each update, and puts unrolls into a queue that is as long as a batch: a learner that
lags behind holds the actors up, not the other way round. Unrolls that are too old when they are
taken are dropped and counted. A run that goes on from a checkpoint begins its episodes anew.
"""

from __future__ import annotations

import copy
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cabochon.core import Key
from cabochon.core.errors import Closed, ConfigError
from cabochon.models.agents.networks import AgentNetwork
from cabochon.rl.environment import Arrival, EnvironmentSpec
from cabochon.rl.inference import Choose, Inference
from cabochon.rl.server import ActingConfig, Server
from cabochon.rl.unrolls import Unroll, UnrollStore
from cabochon.runtime import Runtime, runtime_called
from cabochon.runtime.queues import BoundedQueue

__all__ = ["RECENT", "Collector", "Cutting"]

Array = NDArray[Any]

RECENT = 100
"""Episodes whose mean return is told."""
_RUNS_APART = 1_000_000
"""More actors than die in one life of a run."""


@dataclass(frozen=True, kw_only=True)
class Cutting:
    """How unrolls are cut, and how old they may be."""

    length: int = 20
    overlap: int = 0
    batch: int = 16
    """Unrolls that are taken at once; as many wait in the queue."""
    lag: int = 0
    """`inline` alone: unrolls wait for so many takes before they are learned from."""
    max_lag: int | None = None
    """Unrolls whose first step is more updates older than that are dropped."""


class Collector:
    """See the module. A context manager; leaving it ends the actors."""

    def __init__(
        self,
        network: AgentNetwork,
        spec: EnvironmentSpec,
        choose: Choose,
        key: Key,
        *,
        acting: ActingConfig,
        cutting: Cutting,
        runtime: str = "threads",
        observe: Callable[[Arrival, Array], None] | None = None,
        notice: Callable[[str], None] | None = None,
    ) -> None:
        """Nothing is begun before the first `take`, or `restore`.

        Args:
            network: the learner's, whose weights `take` gives to those who act.
            spec: the environments.
            choose: the actions.
            key: of everything that is drawn.
            acting: who acts.
            cutting: into what.
            runtime: inline, threads, processes or ray.
            observe: called, from the thread that acts, with everything that happens.
            notice: told of every actor that is replaced.

        Raises:
            ConfigError: a lag that only `inline` can keep, or no such runtime.
        """
        if cutting.lag and runtime != "inline":
            raise ConfigError(
                f"a lag of exactly {cutting.lag} takes is kept with --runtime inline alone; "
                "elsewhere bound it with --max-lag"
            )
        self.learner, self.spec, self.choose, self.key = network, spec, choose, key
        self.acting, self.cutting, self.observe = acting, cutting, observe
        self.notice = notice
        self.device = next(network.parameters()).device
        self.runtime_name = runtime
        self.runtime: Runtime | None = None
        self.server: Server | None = None
        self.waiting: deque[Unroll] = deque()
        self.returns: deque[float] = deque(maxlen=RECENT)
        self.lengths: deque[int] = deque(maxlen=RECENT)
        self.steps_before = self.episodes = self.dropped = self.replaced_before = 0
        self.told = (0, 0)
        self.anew = 0
        self.lags: list[int] = []
        self.thread: threading.Thread | None = None
        self.queue: BoundedQueue | None = None
        self.failure: BaseException | None = None
        self.stopping = threading.Event()

    @property
    def inline(self) -> bool:
        """The learner's own thread acts."""
        return self.runtime_name == "inline"

    @property
    def steps(self) -> int:
        """Actions chosen so far, those before a resumption included."""
        return self.steps_before + (self.server.counts.steps if self.server else 0)

    def take(self, count: int, version: int) -> list[Unroll]:
        """So many unrolls, once whoever acts has the learner's weights as they are now.

        Args:
            count: how many.
            version: of the learner's weights: how many updates were made.

        Raises:
            DataError: environments failed again and again.
            NonFinite: the network or an environment says what is not finite.
        """
        if self.server is None:
            self._open(version)
        unrolls = self._own(count, version) if self.inline else self._queued(count, version)
        self.lags = [version - int(each.version[0]) for each in unrolls]
        return unrolls

    def report(self) -> dict[str, float]:
        """How the acting goes, in numbers: of the unrolls taken last, and of the last episodes."""
        said: dict[str, float] = {"frames": float(self.steps), "episodes": float(self.episodes)}
        if self.returns:
            said |= {
                "return": float(np.mean(list(self.returns))),
                "episode_length": float(np.mean(list(self.lengths))),
            }
        if self.lags:
            said |= {"lag": float(np.mean(self.lags)), "lag_max": float(max(self.lags))}
        if self.server is not None:
            steps, batches = self.server.counts.steps, self.server.counts.batches
            if batches > self.told[1]:
                said["inference_batch"] = (steps - self.told[0]) / (batches - self.told[1])
            self.told = (steps, batches)
            said |= {"replaced": float(self._replaced()), "dropped": float(self._dropped())}
        return said

    def state(self) -> dict[str, Array]:
        """What a checkpoint keeps: counts and, with `inline`, everything that is under way."""
        saved = {
            "counts": np.array(
                [self.steps, self.episodes, self._dropped(), self._replaced()], np.int64
            ),
            "returns": np.array(list(self.returns), np.float64),
            "lengths": np.array(list(self.lengths), np.int64),
        }
        if self.inline and self.server is not None:
            saved |= {f"server.{k}": v for k, v in self.server.state().items()}
            saved |= {f"inference.{k}": v for k, v in self.server.inference.state().items()}
            saved["waiting"] = np.array([len(self.waiting)])
            for place, unroll in enumerate(self.waiting):
                saved |= _unroll_arrays(unroll, f"unroll.{place}.")
        return saved

    def restore(self, saved: Mapping[str, Array], version: int) -> None:
        """Goes on from what `state` gave."""
        counts = saved["counts"].tolist()
        self.steps_before, self.episodes, self.dropped, self.replaced_before = counts
        self.returns.extend(saved["returns"].tolist())
        self.lengths.extend(saved["lengths"].tolist())
        if not self.inline or "server.order" not in saved:
            return
        server = self._server(version)
        parts = {
            name: {k.removeprefix(name): v for k, v in saved.items() if k.startswith(name)}
            for name in ("inference.", "server.")
        }
        server.inference.restore(parts["inference."])
        self.anew = server.restore(parts["server."])
        if self.anew and self.notice is not None:
            self.notice(
                f"{self.anew} actors begin their environments anew: what was done in them, done "
                "again, came to other observations; the run goes on, but not bit for bit"
            )
        self.waiting.extend(
            _unroll_of(saved, f"unroll.{place}.") for place in range(int(saved["waiting"][0]))
        )

    def close(self) -> None:
        """Ends the actors, and the thread that serves them. Twice is once."""
        self.stopping.set()
        if self.queue is not None:
            self.queue.close()
        if self.thread is not None:
            self.thread.join()
        if self.runtime is not None:
            self.runtime.close()

    def __enter__(self) -> Collector:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self, version: int) -> None:
        server = self._server(version)
        server.begin()
        if not self.inline:
            self.queue = BoundedQueue(
                self.cutting.batch, max_lag=self.cutting.max_lag, takes=self.cutting.batch
            )
            self.thread = threading.Thread(
                target=self._serve, args=(torch.get_num_threads(),), name="server", daemon=True
            )
            self.thread.start()

    def _server(self, version: int) -> Server:
        network = self.learner if self.inline else copy.deepcopy(self.learner).eval()
        store = UnrollStore(
            self.acting.total, length=self.cutting.length, overlap=self.cutting.overlap
        )
        inference = Inference(network, store, self.choose, self.key, device=self.device)
        inference.version = version
        self.runtime = runtime_called(self.runtime_name)
        self.server = Server(
            self.runtime, self.spec, inference, self.key, self.acting,
            runs_from=0 if self.inline else version * _RUNS_APART,
            observe=self._observe, notice=self.notice,
        )  # fmt: skip
        return self.server

    def _own(self, count: int, version: int) -> list[Unroll]:
        assert self.server is not None
        self.server.inference.version = version
        self._drop(version)
        while len(self.waiting) < count * (self.cutting.lag + 1):
            self.waiting.extend(self.server.turn())
            self._drop(version)  # ends: unrolls that begin now are of this version
        return [self.waiting.popleft() for _ in range(count)]

    def _drop(self, version: int) -> None:
        """Whatever is too old by now, wherever it stands."""
        if self.cutting.max_lag is None:
            return
        oldest = version - self.cutting.max_lag
        kept = [unroll for unroll in self.waiting if unroll.version[0] >= oldest]
        self.dropped += len(self.waiting) - len(kept)
        self.waiting = deque(kept)

    def _queued(self, count: int, version: int) -> list[Unroll]:
        assert self.server is not None
        assert self.queue is not None
        if version != self.server.inference.version:
            self.server.inference.publish(self.learner.state_dict(), version)
        self.queue.advance(version)
        try:
            return [self.queue.get().record for _ in range(count)]
        except Closed:
            if self.failure is None:
                raise
            raise self.failure from None

    def _serve(self, threads: int) -> None:
        """The thread that acts."""
        assert self.server is not None
        assert self.queue is not None
        torch.set_num_threads(threads)  # every thread has a number of its own
        try:
            while not self.stopping.is_set():
                for unroll in self.server.turn():
                    self.queue.put(unroll, version=int(unroll.version[0]))
        except Closed:
            pass  # nobody learns any more
        except BaseException as error:  # the learner's thread raises it
            self.failure = error
        finally:
            self.queue.close()

    def _observe(self, arrival: Arrival, actions: Array) -> None:
        self.episodes += len(arrival.ended)
        self.returns.extend(arrival.episode_return.tolist())
        self.lengths.extend(arrival.episode_length.tolist())
        if self.observe is not None:
            self.observe(arrival, actions)

    def _replaced(self) -> int:
        return self.replaced_before + (self.server.counts.replaced if self.server else 0)

    def _dropped(self) -> int:
        return self.dropped + (self.queue.counts.dropped if self.queue is not None else 0)


def _unroll_arrays(unroll: Unroll, prefix: str) -> dict[str, Array]:
    arrays: dict[str, Array] = {}
    for name, value in vars(unroll).items():
        if name == "outputs":
            arrays |= {f"{prefix}outputs.{key}": each for key, each in value.items()}
        elif name == "state":
            arrays |= {f"{prefix}state.{place}": each for place, each in enumerate(value)}
        else:
            arrays[prefix + name] = np.asarray(value)
    return arrays


def _unroll_of(saved: Mapping[str, Array], prefix: str) -> Unroll:
    found = {k.removeprefix(prefix): v for k, v in saved.items() if k.startswith(prefix)}
    outputs = {k.removeprefix("outputs."): v for k, v in found.items() if k.startswith("outputs.")}
    parts = sum(k.startswith("state.") for k in found)
    rest: dict[str, Any] = {
        k: v for k, v in found.items() if not k.startswith(("outputs.", "state."))
    }
    rest |= {name: rest[name].item() for name in ("environment", "run", "begins")}
    return Unroll(
        **rest, outputs=outputs, state=tuple(found[f"state.{part}"] for part in range(parts))
    )
