"""Frames per second of an agent that plays an Atari game and learns from it: ours beside others.

ALE/Pong-v5, 84 x 84 grey pictures, 4 stacked, an action for 4 frames; the small network of IMPALA
(16 8x8/4, 32 4x4/2, 256), 32 environments, unrolls of 20 steps, an Adam step on 640 transitions.
A frame here is a step of an environment, for which the emulator plays 4. Ours is `vtrace_agent`
with one actor of 32 environments, which threads of ale-py's own step, with central inference on one
side and the learner on the other, a thread of torch's each (`--threads 1`). The peers, each with
the same environments, network and loss function unless it says otherwise:

    impala    acts and learns in turn, V-trace, one update for each rollout, ale-py's vector of
              environments in C++: the strongest program that is not asynchronous
    ppo       the same loop with what CleanRL's ppo_atari_envpool.py does with a rollout: 4 epochs
              of 4 mini-batches, generalised advantages
    torchrl   TorchRL's MultiAsyncCollector, two workers of 16 environments (Gymnasium's Atari
              preprocessing in Python and OpenCV, each worker with its own network), and the
              learner of `impala`

Run: python benchmarks/seed_throughput.py [ROUNDS] [setting ...]
     python benchmarks/seed_throughput.py --picture FILE.png    throughput by actors and by batch
"""

from __future__ import annotations

import os
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from side_by_side import compare, report, run_worker, worker_arguments

GAME = "ALE/Pong-v5"
ENVIRONMENTS, LENGTH, ACTIONS = 32, 20, 6
UPDATES, WARM = 10, 2
RATE, DISCOUNT = 2.5e-4, 0.99
SETTINGS = ("impala", "ppo", "torchrl")


class Agent(nn.Module):
    """The peers' network: stacked bytes to logits and value."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(4, 16, 8, 4), nn.ReLU(), nn.Conv2d(16, 32, 4, 2), nn.ReLU(), nn.Flatten(),
            nn.Linear(32 * 9 * 9, 256), nn.ReLU(),
        )  # fmt: skip
        self.policy, self.value = nn.Linear(256, ACTIONS), nn.Linear(256, 1)

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(frames.float() / 255.0)
        return self.policy(features), self.value(features).squeeze(-1)


def processor_seconds() -> float:
    """Of this process and the processes that it started, so far."""
    spent = time.process_time()
    tick = os.sysconf("SC_CLK_TCK")
    for task in Path("/proc/self/task").iterdir():
        for child in (task / "children").read_text().split():
            fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
            spent += (int(fields[11]) + int(fields[12])) / tick
    return spent


class Clock:
    """Seconds, and processor seconds, since it was made."""

    def __init__(self) -> None:
        self.begin, self.spent = time.perf_counter(), processor_seconds()

    def read(self) -> dict[str, float]:
        """Both, until now."""
        seconds, spent = time.perf_counter() - self.begin, processor_seconds() - self.spent
        return {"seconds": seconds, "processor_seconds": spent}


def environments(count: int, stack: int) -> Any:
    """ale-py's own vector, with the options of ours."""
    from ale_py.vector_env import AtariVectorEnv
    from gymnasium.vector import AutoresetMode

    return AtariVectorEnv(
        game="pong",
        num_envs=count,
        stack_num=stack,
        reward_clipping=False,
        repeat_action_probability=0.25,
        autoreset_mode=AutoresetMode.SAME_STEP,
    )


def environment_alone() -> dict[str, float]:
    """32 environments with random actions: what nothing can exceed."""
    envs, draw = environments(ENVIRONMENTS, 1), np.random.default_rng(0)
    envs.reset(seed=0)
    actions = draw.integers(0, ACTIONS, (230, ENVIRONMENTS))
    for each in actions[:30]:
        envs.step(each)
    clock = Clock()
    for each in actions[30:]:
        envs.step(each)
    taken = clock.read()
    envs.close()
    frames = len(actions[30:]) * ENVIRONMENTS
    return {
        "frames_per_second": frames / taken["seconds"],
        "frames_per_processor_second": frames / taken["processor_seconds"],
    }


def vtrace_loss(agent: Agent, rollout: dict[str, Tensor]) -> Tensor:
    """IMPALA's loss; T B."""
    frames = rollout["frames"]
    logits, values = agent(frames.flatten(0, 1))
    logits = logits.unflatten(0, frames.shape[:2])[:-1].log_softmax(-1)
    values = values.unflatten(0, frames.shape[:2])
    actions = rollout["actions"].unsqueeze(-1)
    logprob = logits.gather(-1, actions).squeeze(-1)
    with torch.no_grad():
        rho = (logprob - rollout["logprob"]).exp().clamp(max=1.0)
        discount = DISCOUNT * (1.0 - rollout["done"])
        after = torch.cat([values[1:-1], values[-1:]])
        delta = rho * (rollout["reward"] + discount * after - values[:-1])
        trace, targets = torch.zeros_like(delta[0]), torch.empty_like(delta)
        for t in reversed(range(len(delta))):
            trace = delta[t] + discount[t] * rho[t] * trace
            targets[t] = values[t] + trace
        following = torch.cat([targets[1:], values[-1:]])
        advantage = rho * (rollout["reward"] + discount * following - values[:-1])
    entropy = -(logits.exp() * logits).sum(-1).mean()
    error = 0.5 * (targets - values[:-1]).square().mean()
    return -(logprob * advantage).mean() + 0.5 * error - 0.01 * entropy


def learn_vtrace(agent: Agent, optimizer: torch.optim.Optimizer, rollout: dict) -> None:
    """One update on the whole rollout."""
    loss = vtrace_loss(agent, rollout)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(agent.parameters(), 40.0)
    optimizer.step()


def learn_ppo(agent: Agent, optimizer: torch.optim.Optimizer, rollout: dict) -> None:
    """Four epochs of four mini-batches, as in CleanRL's ppo_atari_envpool.py."""
    frames, done, reward = rollout["frames"], rollout["done"], rollout["reward"]
    values = rollout["values"]
    with torch.no_grad():
        last = agent(frames[-1])[1]
        following = torch.cat([values[1:], last[None]])
        carried, advantages = torch.zeros_like(last), torch.empty_like(reward)
        for t in reversed(range(len(reward))):
            alive = DISCOUNT * (1.0 - done[t])
            delta = reward[t] + alive * following[t] - values[t]
            advantages[t] = carried = delta + alive * 0.95 * carried
    returns = (advantages + values).flatten()
    seen, actions = frames[:-1].flatten(0, 1), rollout["actions"].flatten()
    old, gains, before = rollout["logprob"].flatten(), advantages.flatten(), values.flatten()
    for _ in range(4):
        for rows in torch.randperm(len(seen)).chunk(4):
            logits, value = agent(seen[rows])
            logits = logits.log_softmax(-1)
            logprob = logits.gather(-1, actions[rows, None]).squeeze(-1)
            ratio = (logprob - old[rows]).exp()
            gain = gains[rows]
            gain = (gain - gain.mean()) / (gain.std() + 1e-8)
            policy = torch.max(-gain * ratio, -gain * ratio.clamp(0.9, 1.1)).mean()
            clipped = before[rows] + (value - before[rows]).clamp(-0.1, 0.1)
            errors = torch.max((value - returns[rows]).square(), (clipped - returns[rows]).square())
            entropy = -(logits.exp() * logits).sum(-1).mean()
            loss = policy - 0.01 * entropy + 0.25 * errors.mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
            optimizer.step()


def peer_in_turn(setting: str) -> dict[str, float]:
    """Seconds for UPDATES rollouts and what is learned from them."""
    agent = Agent()
    optimizer = torch.optim.Adam(agent.parameters(), RATE)
    learn = learn_ppo if setting == "ppo" else learn_vtrace
    envs = environments(ENVIRONMENTS, 4)
    seen = torch.from_numpy(np.array(envs.reset(seed=0)[0]))
    frames = torch.empty((LENGTH + 1, *seen.shape), dtype=torch.uint8)
    rollout = {
        name: torch.empty(LENGTH, ENVIRONMENTS) for name in ("reward", "done", "logprob", "values")
    }
    rollout |= {
        "frames": frames, "actions": torch.empty(LENGTH, ENVIRONMENTS, dtype=torch.int64),
    }  # fmt: skip
    clock = Clock()
    for update in range(WARM + UPDATES):
        if update == WARM:
            clock = Clock()
        for t in range(LENGTH):
            frames[t] = seen
            with torch.no_grad():
                logits, value = agent(seen)
                logits = logits.log_softmax(-1)
                action = torch.multinomial(logits.exp(), 1)
            rollout["actions"][t], rollout["values"][t] = action[:, 0], value
            rollout["logprob"][t] = logits.gather(-1, action)[:, 0]
            now, reward, over, cut, _ = envs.step(action[:, 0].numpy())
            seen = torch.from_numpy(np.array(now))
            rollout["reward"][t] = torch.from_numpy(reward)
            rollout["done"][t] = torch.from_numpy(over | cut).float()
        frames[LENGTH] = seen
        learn(agent, optimizer, rollout)
    taken = clock.read()
    envs.close()
    return taken


def torchrl_environment() -> Any:
    """One game with Gymnasium's preprocessing, as TorchRL's users wrap it."""
    import ale_py
    import gymnasium
    from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation
    from torchrl.envs import GymWrapper

    gymnasium.register_envs(ale_py)
    env = gymnasium.make(GAME, frameskip=1, full_action_space=False)
    env = FrameStackObservation(AtariPreprocessing(env, noop_max=30, frame_skip=4), 4)
    return GymWrapper(env, categorical_action_encoding=True)


def torchrl_worker() -> Any:
    """Half of the environments, one after the other."""
    from torchrl.envs import SerialEnv

    return SerialEnv(ENVIRONMENTS // 2, torchrl_environment)


class Drawing(nn.Module):
    """What TorchRL's collector asks: frames to an action, its log-probability, and the value."""

    def __init__(self, agent: Agent) -> None:
        super().__init__()
        self.agent = agent

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        rows = frames.reshape(-1, 4, 84, 84)
        logits = self.agent(rows)[0].log_softmax(-1)
        action = torch.multinomial(logits.exp(), 1)
        logprob = logits.gather(-1, action)
        shape = frames.shape[:-3]
        return action[:, 0].reshape(shape), logprob[:, 0].reshape(shape)


def peer_torchrl() -> dict[str, float]:
    """Seconds for as many frames, from TorchRL's asynchronous collector of two processes."""
    from tensordict.nn import TensorDictModule
    from torchrl import collectors

    agent = Agent()
    optimizer = torch.optim.Adam(agent.parameters(), RATE)
    policy = TensorDictModule(
        Drawing(agent), in_keys=["observation"], out_keys=["action", "sample_log_prob"]
    )
    name = "MultiAsyncCollector"
    kind = getattr(collectors, name, None) or collectors.MultiaSyncDataCollector
    half = ENVIRONMENTS // 2 * LENGTH
    collector = kind(
        [torchrl_worker, torchrl_worker], policy, frames_per_batch=half, total_frames=-1,
        update_at_each_batch=True,
    )  # fmt: skip
    clock = Clock()
    for number, data in enumerate(collector):
        if number == 2 * WARM:
            clock = Clock()
        if number == 2 * (WARM + UPDATES):
            break
        if number % 2 == 0:
            held = data.clone()
            continue
        both = [_of_torchrl(each) for each in (held, data)]
        learn_vtrace(agent, optimizer, {k: torch.cat([b[k] for b in both], 1) for k in both[0]})
    taken = clock.read()
    collector.shutdown()
    return taken


def _of_torchrl(data: Any) -> dict[str, Tensor]:
    """T B from B T."""
    following = data["next"]
    frames = torch.cat([data["observation"], following["observation"][:, -1:]], 1)
    return {
        "frames": frames.transpose(0, 1),
        "actions": data["action"].T,
        "logprob": data["sample_log_prob"].T,
        "reward": following["reward"][..., 0].T,
        "done": following["done"][..., 0].float().T,
    }


def ours(
    *,
    actors: int = 1,
    each: int = ENVIRONMENTS,
    batch: int = 0,
    updates: int = UPDATES,
    runtime: str = "threads",
    threads: int = 1,
) -> dict[str, float]:
    """Seconds for UPDATES updates of `vtrace_agent` of 640 transitions each, from fewer or more."""
    from cabochon.algorithms import vtrace_agent
    from cabochon.core import Key
    from cabochon.models.agents.networks import NetworkConfig, build, policy_and_value
    from cabochon.rl.collector import Collector
    from cabochon.rl.environment import EnvironmentSpec, signature_of
    from cabochon.rl.inference import sample
    from cabochon.rl.server import ActingConfig
    from cabochon.training.process_memory import keep_freed_memory

    keep_freed_memory()  # as every run of `cabochon train` does
    torch.set_num_threads(threads)  # of the learner, and of the inference that runs beside it
    spec = EnvironmentSpec(name=GAME)
    network = build(
        NetworkConfig(torso="impala_small", frame_stack=4),
        signature_of(spec),
        policy_and_value(),
        Key(0),
    )
    config = vtrace_agent.Config(
        unroll_length=LENGTH, batch_size=ENVIRONMENTS, steps=10**6, schedule="constant", max_lag=10
    )
    acting = ActingConfig(actors=actors, environments=each, inference_batch=batch)
    optimizer = torch.optim.Adam(network.parameters(), RATE)
    with Collector(
        network, spec, sample, Key(1), acting=acting, cutting=config.cutting, runtime=runtime
    ) as collector:
        steps = vtrace_agent.train(config, network, collector, optimizer)
        for _ in islice(steps, WARM):
            pass
        clock = Clock()
        for _ in islice(steps, updates):
            pass
        return {name: value * UPDATES / updates for name, value in clock.read().items()}


def worker(side: str, setting: str) -> None:
    """One side's work; `setting` may be actors=4,each=8,batch=16,runtime=processes."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.manual_seed(0)
    if side == "environment":
        report(**environment_alone())
        return
    if side == "ours":
        keys = dict(part.split("=") for part in setting.split(",") if "=" in part)
        runtime = keys.pop("runtime", "threads")
        taken = ours(**{name: int(value) for name, value in keys.items()}, runtime=runtime)
    else:
        taken = peer_torchrl() if setting == "torchrl" else peer_in_turn(setting)
    frames = UPDATES * LENGTH * ENVIRONMENTS
    report(
        **taken,
        frames_per_second=frames / taken["seconds"],
        frames_per_processor_second=frames / taken["processor_seconds"],
    )


def draw(path: str) -> None:
    """Throughput against the number of actors and against the inference batch.

    By processor seconds, which neighbours on the machine change less than the time by the clock.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    unit = "frames_per_processor_second"
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    alone = run_worker(__file__, "environment", "")[unit]
    counts, sizes = (1, 4, 16), (2, 8, 32)
    for runtime in ("threads", "processes"):
        settings = [f"actors={n},each={32 // n},updates=4,runtime={runtime}" for n in counts]
        speeds = [run_worker(__file__, "ours", each)[unit] for each in settings]
        left.plot(counts, speeds, "o-", label=runtime)
    settings = [f"actors=16,each=2,updates=4,batch={size}" for size in sizes]
    right.plot(sizes, [run_worker(__file__, "ours", each)[unit] for each in settings], "o-")
    left.set(xscale="log", xlabel="actors (32 environments in all)", ylabel="frames a core-second")
    left.set_xticks(counts, [str(n) for n in counts])
    left.legend()
    right.set(xscale="log", xlabel="inference batch (16 threads of 2 environments)")
    right.set_xticks(sizes, [str(n) for n in sizes])
    for axes in (left, right):
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    figure.suptitle(f"Pong, acting and learning (environments alone: {alone:.0f})")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Both sides of every setting, or the picture."""
    words = sys.argv[1:]
    if words[:1] == ["--picture"]:
        draw(words[1])
        return
    rounds = int(words.pop(0)) if words and words[0].isdecimal() else 3
    alone = run_worker(__file__, "environment", "")["frames_per_second"]
    results = {}
    for setting in words or SETTINGS:
        results[setting] = compare(Path(__file__), setting, rounds=rounds)
        found = results[setting]
        share = found["ours"]["frames_per_second"] / alone
        work = found["peer"]["processor_seconds"] / found["ours"]["processor_seconds"]
        found |= {"share_of_the_environments": round(share, 3), "processor_ratio": round(work, 3)}
        print(setting, results[setting], flush=True)
    ratio = next(iter(results.values()))["ratio"]
    report(ratio=ratio, environments_alone=round(alone), settings=results)


if __name__ == "__main__":
    if (arguments := worker_arguments()) is not None:
        worker(*arguments)
    else:
        main()
