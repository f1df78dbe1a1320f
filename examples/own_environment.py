"""An environment of your own for ppo_continuous.py: a boat that has to reach a buoy and stop there.

From the folder of the scripts:

    python ppo_continuous.py --env-id examples.own_environment:Boat-v0 --total-timesteps 200000

Drifting is worth about 75, and a trained policy comes to 97 of 100.

The part before the colon is a module, which is imported; it registers the environment when it is. The same
works with trpo_mujoco.py and reinforce.py. A run that is resumed or evaluated needs the flag again, because
the scripts import no module that only a file names:

    python ppo_continuous.py --evaluate runs/... --env-id examples.own_environment:Boat-v0 --capture-video

Three rules make a run repeatable, resuming included: `reset` passes its seed on, every random number comes
from `self.np_random`, and `reset` sets all that an episode changes.
"""

import gymnasium as gym
import numpy as np


class Boat(gym.Env):
    """Observations: where the buoy lies (2) and the velocity (2). Actions: thrust (2), each in [-1, 1].

    The reward of a step is 1 at the buoy and 0 at the distance 3, less a little for thrust. Beyond that
    distance the episode is lost, and it ends after 100 steps in any case.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}
    observation_space = gym.spaces.Box(-np.inf, np.inf, (4,), np.float64)
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, render_mode: str | None = None):
        self.render_mode = render_mode  # only --capture-video needs it, with `render` below

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)  # seeds self.np_random
        self.position, self.velocity = self.np_random.uniform(-1, 1, 2), np.zeros(2)
        return self.observe(), {}

    def observe(self) -> np.ndarray:
        return np.concatenate((-self.position, self.velocity))

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        waves = 0.02 * self.np_random.normal(size=2)
        self.velocity = 0.95 * self.velocity + 0.1 * action + waves
        self.position = self.position + 0.1 * self.velocity
        distance = np.linalg.norm(self.position)
        lost = bool(distance > 3)
        # Positive wherever the boat may be: with negative rewards, an early end would be worth striving for.
        reward = 1 - distance / 3 - 0.01 * np.square(action).sum()
        # `terminated`: no reward follows. The limit of 100 steps is not the boat's business: it is given to
        # `gym.register` and arrives in the script as `truncated`, after which V still counts.
        return self.observe(), float(reward), lost, False, {}

    def render(self) -> np.ndarray:
        """A picture (96, 96, 3): the buoy red in the middle, the boat white."""
        picture = np.full((96, 96, 3), (20, 60, 120), np.uint8)
        picture[46:50, 46:50] = 200, 40, 40
        x, y = np.clip(48 + 16 * self.position, 2, 93).astype(int)
        picture[y - 2 : y + 3, x - 2 : x + 3] = 255
        return picture


gym.register("Boat-v0", Boat, max_episode_steps=100)
