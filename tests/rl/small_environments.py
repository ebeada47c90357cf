"""Environments whose every number is known, and some that misbehave. Importable by actors."""

import time

import gymnasium
import numpy as np


class Counting(gymnasium.Env):
    """Sees (episode seed, time, action before); gains the time; ends or is cut after `length`."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = gymnasium.spaces.Discrete(3)

    def __init__(self, length=5, cut=False, spread=0):
        self.length, self.cut, self.spread = length, cut, spread

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.now, self.name = 0, float(self.np_random.random())
        self.last = self.length + (int(self.np_random.integers(self.spread)) if self.spread else 0)
        return self._seen(-1), {}

    def step(self, action):
        self.now += 1
        over = self.now >= self.last
        return self._seen(action), float(self.now), over and not self.cut, over and self.cut, {}

    def _seen(self, action):
        return np.array([self.name, self.now, action], np.float32)


class Broken(Counting):
    """Misbehaves in the way of its name: when it begins, or at the third step."""

    def __init__(self, how="raise", seconds=3600.0):
        super().__init__(length=50)
        self.how, self.seconds = how, seconds

    def reset(self, *, seed=None, options=None):
        if self.how == "raise_in_reset":
            raise RuntimeError("the cartridge is missing")
        began = super().reset(seed=seed)
        return None if self.how == "none_in_reset" else began

    def step(self, action):
        seen, reward, over, cut, info = super().step(action)
        if self.now == 3:
            if self.how == "raise":
                raise RuntimeError("the joystick is gone")
            if self.how == "hang":
                time.sleep(self.seconds)
            if self.how == "nan_reward":
                reward = float("nan")
            if self.how == "nan_observation":
                seen = seen * np.nan
            if self.how == "other_shape":
                seen = seen[:2]
            if self.how == "exit":
                raise SystemExit(3)
            rewards = {"no_reward": None, "two_rewards": np.ones(2), "text_reward": "1",
                       "huge_reward": 1e39}  # fmt: skip
            reward = rewards.get(self.how, reward)
            over = None if self.how == "no_flag" else over
            if self.how == "four_values":
                return seen, reward, over, info
        return seen, reward, over, cut, info


class Rewriting(Counting):
    """Gives the same array each time, written into again."""

    def _seen(self, action):
        if not hasattr(self, "kept"):
            self.kept = np.zeros(3, np.float32)
        self.kept[:] = super()._seen(action)
        return self.kept


class Numbered(Counting):
    """Sees the time; its space ends before its episodes do."""

    observation_space = gymnasium.spaces.Discrete(3)

    def _seen(self, action):
        return self.now


class Unlicensed(Counting):
    def __init__(self):
        raise RuntimeError("there is no licence")


class Blind(Counting):
    observation_space = gymnasium.spaces.Box(-1, 1, (0,), np.float32)


class Slow(Counting):
    """Takes a different time for every step."""

    def __init__(self, milliseconds=2.0):
        super().__init__(length=7, spread=5)
        self.milliseconds = milliseconds

    def step(self, action):
        time.sleep(float(np.random.default_rng().random()) * self.milliseconds / 1000)
        return super().step(action)


class Forgetful(Counting):
    """Never begins the same way twice, whatever its seed."""

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.name = float(np.random.default_rng().random())
        return self._seen(-1), {}


class Moving(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)


NAMES = {"Counting": Counting, "Broken": Broken, "Slow": Slow, "Forgetful": Forgetful,
         "Moving": Moving, "Rewriting": Rewriting, "Numbered": Numbered,
         "Unlicensed": Unlicensed, "Blind": Blind}  # fmt: skip
for name, kind in NAMES.items():
    if f"cabochon-tests/{name}-v0" not in gymnasium.registry:
        gymnasium.register(f"cabochon-tests/{name}-v0", entry_point=kind)
