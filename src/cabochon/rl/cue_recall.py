"""A task of memory alone: what was shown at the beginning is asked for at the end.

    time       0          1 ... delay          delay + 1
    seen       the cue    nothing              the question
    rewarded                                   the action that the cue named

Whoever decides by what is seen now is right once in `cues` times at best. Importing this module
makes it known to Gymnasium: `cabochon.rl.cue_recall:CueRecall-v0`. Needs the extra `rl`.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from cabochon.core.errors import ConfigError

__all__ = ["CueRecall"]


class CueRecall(gymnasium.Env):  # type: ignore[misc]  # the library is optional, and Any without it
    """Observations: `cues` places for the cue and one for the question, 0 or 1."""

    def __init__(self, cues: int = 3, delay: int = 10) -> None:
        if cues < 2 or delay < 0:
            raise ConfigError(f"CueRecall needs cues >= 2 and delay >= 0, got {cues} and {delay}")
        self.cues, self.delay = cues, delay
        self.observation_space = gymnasium.spaces.Box(0.0, 1.0, (cues + 1,), np.float32)
        self.action_space = gymnasium.spaces.Discrete(cues)
        self._cue = self._time = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Shows another cue."""
        super().reset(seed=seed, options=options)
        self._cue, self._time = int(self.np_random.integers(self.cues)), 0
        return self._seen(), {}

    def step(self, action: int) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """The answer counts when the question was seen; every other action changes nothing."""
        asked = self._time == self.delay + 1
        right = asked and int(action) == self._cue
        self._time += 1
        return self._seen(), float(right), asked, False, {}

    def _seen(self) -> NDArray[np.float32]:
        seen = np.zeros(self.cues + 1, np.float32)
        if self._time == 0:
            seen[self._cue] = 1.0
        elif self._time == self.delay + 1:
            seen[-1] = 1.0
        return seen


gymnasium.register("CueRecall-v0", entry_point=CueRecall)
