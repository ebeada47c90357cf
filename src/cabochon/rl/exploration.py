"""How those who play depart from what seems best.

Source: Horgan et al. 2018, "Distributed Prioritized Experience Replay", arXiv:1803.00933, for a
rate of each actor's own; its spread as in SEED RL, arXiv:1910.06591.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cabochon.core.errors import ConfigError
from cabochon.rl.inference import Choose

__all__ = ["epsilon_greedy", "epsilons"]


def epsilons(environments: int, *, base: float = 0.4) -> NDArray[np.float64]:
    """N: base^1 to base^8, how often each environment's actor does something at random.

    Raises:
        ConfigError: there is no environment, or the base is no rate.
    """
    if environments < 1 or not 0.0 <= base <= 1.0:
        raise ConfigError(
            "a ladder of rates needs environments and a base in [0, 1], "
            f"got {environments} and {base}"
        )
    return np.asarray(base ** np.linspace(1.0, 8.0, environments))


def epsilon_greedy(rates: NDArray[np.float64]) -> Choose:
    """Chooses the best action by `q`; at the environment's rate one at random, of all alike.

    Args:
        rates: N, of the environments 0 to N - 1; environment i of more has that of i mod N.
    """

    def choose(
        outputs: Mapping[str, Tensor], environments: NDArray[np.int64], uniform: NDArray[np.float64]
    ) -> NDArray[np.int64]:
        q = outputs["q"].numpy(force=True)
        anything = (uniform[:, 1] * q.shape[1]).astype(np.int64)
        random = uniform[:, 0] < rates[environments % len(rates)]
        chosen: NDArray[np.int64] = np.where(random, anything, q.argmax(1))
        return chosen

    return choose
