"""Networks of your own in ppo_continuous.py, without editing it: wider ones with layer normalisation.

From the folder of the scripts, with the flags of ppo_continuous.py:

    python -m examples.own_network --env-id Hopper-v5 --exp-name own_network
    python -m examples.own_network --resume runs/...

The script asks three things of its agent: `actor` gives the means (..., A) of the actions at normalised
observations (..., D), `value` their values (...), and both are modules, so that their weights are found,
trained and saved. `load` makes the agent that a checkpoint needs, so the arguments of __init__ stay.

Editing a copy of the script comes to the same: there, `Agent.__init__` is the only place to change.
"""

import math

import torch.nn as nn

import ppo_continuous as ppo


def network(inputs: int, outputs: int, output_gain: float, width: int = 256) -> nn.Sequential:
    """Two hidden layers, normalised before the nonlinearity (Ba et al. 2016)."""
    layers = []
    for size in (inputs, width):
        layers += [nn.Linear(size, width), nn.LayerNorm(width), nn.SiLU()]
        nn.init.orthogonal_(layers[-3].weight, math.sqrt(2))
    layers.append(nn.Linear(width, outputs))
    nn.init.orthogonal_(layers[-1].weight, output_gain)
    nn.init.zeros_(layers[-1].bias)
    return nn.Sequential(*layers)


class Agent(ppo.Agent):
    """The agent of ppo_continuous.py with other networks; statistics and action bounds stay as they are."""

    def __init__(self, observation_size: int, action_low, action_high, log_std: float = 0.0):
        super().__init__(observation_size, action_low, action_high, log_std)
        # A small gain of the last layer keeps the first means near 0, so that the first actions are noise.
        self.actor = network(observation_size, len(action_low), output_gain=0.01)
        self.critic = network(observation_size, 1, output_gain=1.0)


ppo.Agent = Agent  # `train`, and `--evaluate`, take this one from here on

if __name__ == "__main__":
    ppo.main(ppo.parse_args())
