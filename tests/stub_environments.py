"""Small environments that know what should come out, as in `--env-id stub_environments:Stub/Coded-v0`."""

import gymnasium as gym
import numpy as np

# One entry per step of any Coded environment: (seed, observation, action, reward, next observation,
# terminated, truncated), as the environment itself saw it. A test clears it before it plays.
LOG: list[tuple] = []


class Coded(gym.Env):
    """Observations that say whose they are: (seed, episode, step), with noise of its own generator if asked.

    Episode e of the environment with seed s ends after 2 + (s + e) % 4 steps, in turn by termination and by
    truncation. Rewards are 100 s + 10 e + step. Every step is written to LOG.
    """

    def __init__(self, noise: float = 0.0, render_mode: str | None = None):
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float64)
        self.action_space = gym.spaces.Box(-2, 6, (2,), np.float32)
        self.noise, self.seed, self.episode, self.step_count = noise, 0, -1, 0

    def observe(self) -> np.ndarray:
        code = np.array([self.seed, self.episode, self.step_count], np.float64)
        return code + self.noise * self.np_random.normal(size=3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.seed, self.episode = seed, -1
        self.episode, self.step_count = self.episode + 1, 0
        self.observation = self.observe()
        return self.observation, {}

    def step(self, action):
        before = self.observation
        self.step_count += 1
        self.observation = self.observe()
        reward = 100.0 * self.seed + 10.0 * self.episode + self.step_count
        ended = self.step_count == 2 + (self.seed + self.episode) % 4
        terminated, truncated = ended and self.episode % 2 == 0, ended and self.episode % 2 == 1
        LOG.append((self.seed, before, np.array(action), reward, self.observation, terminated, truncated))
        return self.observation, reward, terminated, truncated, {}


class Poisoned(Coded):
    """Rewards turn into NaN once one environment has made 40 steps."""

    steps_in_all = 0

    def step(self, action):
        self.steps_in_all += 1
        observation, reward, *rest = super().step(action)
        return observation, float("nan") if self.steps_in_all > 40 else reward, *rest


class Matrix(gym.Env):
    """Actions are a Box of shape (2, 2), observations a Dict. Its constructor takes nothing."""

    observation_space = gym.spaces.Dict(
        {"goal": gym.spaces.Box(-1, 1, (2, 2), np.float32), "sign": gym.spaces.Discrete(2)}
    )
    action_space = gym.spaces.Box(-3, 1, (2, 2), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.observe(), {}

    def observe(self) -> dict:
        self.goal = self.np_random.uniform(-1, 1, (2, 2)).astype(np.float32)
        return {"goal": self.goal, "sign": int(self.np_random.integers(2))}

    def step(self, action):
        assert action.shape == (2, 2) and self.action_space.contains(action)
        reward = -float(np.abs(action - self.goal).sum())
        self.steps += 1
        return self.observe(), reward, False, self.steps == 10, {}


class IntegerReset(Coded):
    """Begins with integers and goes on with fractions, as `np.array([0, 0, 0])` in a reset does."""

    def reset(self, *, seed=None, options=None):
        _, info = super().reset(seed=seed)
        self.observation = np.array([self.seed, self.episode, 0])
        return self.observation, info

    def observe(self) -> np.ndarray:
        return super().observe() + 0.75


class Opaque(Coded):
    """Part of its state is an object that nobody can save."""

    def __init__(self, render_mode: str | None = None):
        super().__init__()
        self.secret = object()


class Recent(gym.Wrapper):
    """Keeps state of its own in an object: here, the last observations."""

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.recent = []

    def step(self, action):
        result = self.env.step(action)
        self.recent.append(result[0])
        return result


gym.register("Stub/Coded-v0", Coded)
gym.register("Stub/NoisyCoded-v0", Coded, kwargs={"noise": 1.0})
gym.register("Stub/Poisoned-v0", Poisoned)
gym.register("Stub/Matrix-v0", Matrix)
gym.register("Stub/IntegerReset-v0", IntegerReset)
gym.register("Stub/Opaque-v0", Opaque)
