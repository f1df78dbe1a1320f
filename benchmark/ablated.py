"""ppo_continuous.py without one of its details, for ablations that no flag of the script reaches.

python benchmark/ablated.py --without staggered-starts --env-id Hopper-v5 --seed 3
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ppo_continuous as ppo  # noqa: E402


class SimultaneousEnvironments(ppo.Environments):
    """Environments whose first episodes have the full time limit, so that all of them end together."""

    def __init__(self, env_id: str, num_envs: int):
        super().__init__(env_id, num_envs)
        self.limits = np.full(num_envs, self.time_limit)


class LargeEpsilonAdam(ppo.Adam):
    """Adam with the epsilon of OpenAI's baselines and of CleanRL."""

    def __init__(self, parameters, learning_rate: float):
        super().__init__(parameters, learning_rate, eps=1e-5)


class NoStatistics(ppo.RunningStatistics):
    """Statistics that stay at mean 0 and variance 1."""

    def update(self, rows: np.ndarray) -> None:
        pass


class RawObservationsAgent(ppo.Agent):
    """An agent whose networks see the observations as they are."""

    def __init__(self, observation_size: int, *arguments):
        super().__init__(observation_size, *arguments)
        self.observation_statistics = NoStatistics((observation_size,))


class RawRewardsAgent(ppo.Agent):
    """An agent that learns from the rewards as they are."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.return_statistics = NoStatistics(())


REPLACEMENTS = {
    "staggered-starts": ("Environments", SimultaneousEnvironments),
    "small-epsilon": ("Adam", LargeEpsilonAdam),
    "normalised-observations": ("Agent", RawObservationsAgent),
    "scaled-rewards": ("Agent", RawRewardsAgent),
}


def main(arguments: list[str]) -> Path:
    """Trains with all arguments but `--without NAME`; returns the run directory."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--without", choices=REPLACEMENTS, required=True)
    mine, others = parser.parse_known_args(arguments)
    name, replacement = REPLACEMENTS[mine.without]
    setattr(ppo, name, replacement)
    return ppo.main(ppo.parse_args(others))


if __name__ == "__main__":
    main(sys.argv[1:])
