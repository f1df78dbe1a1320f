"""Small environments that know what should come out, as in `--env-id stub_environments:Stub/Coded-v0`."""

import random

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


class Seeded(Coded):
    """Coded, for scripts that seed every reset: the seed alone decides what an episode is."""

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.seed, self.episode = seed % 5, seed // 5 % 4
        self.observation = self.observe()
        return self.observation, {}


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


class OwnGenerator(Seeded):
    """Draws from a second generator, seeded at the reset as Gymnasium asks."""

    def reset(self, *, seed=None, options=None):
        result = super().reset(seed=seed)
        self.generator = np.random.default_rng(seed)
        return result

    def step(self, action):
        observation, reward, *rest = super().step(action)
        return observation + self.generator.normal(size=3), reward + self.generator.normal(), *rest


class GlobalReset(Seeded):
    """Draws from random and np.random at the reset, against Gymnasium's advice."""

    def reset(self, *, seed=None, options=None):
        result = super().reset(seed=seed)
        self.bonus = np.random.normal() + random.random()
        return result

    def step(self, action):
        observation, reward, *rest = super().step(action)
        return observation, reward + self.bonus, *rest


class GlobalStep(Seeded):
    """Draws from np.random in every step, so that what one environment sees depends on all others."""

    def observe(self) -> np.ndarray:
        return super().observe() + np.random.normal(size=3)


class GlobalHidden(Seeded):
    """Draws from np.random in every step, and shows it only at the end of a long episode."""

    def reset(self, *, seed=None, options=None):
        self.hidden = 0.0
        return super().reset(seed=seed)

    def step(self, action):
        observation, reward, _, _, info = super().step(action)
        self.hidden += np.random.normal()
        ended = self.step_count == 100
        return observation, reward + ended * self.hidden, ended, False, info


class Counted(Seeded):
    """A counter that all environments share, and that no seed resets, is part of the reward."""

    steps_of_all = 0

    def step(self, action):
        Counted.steps_of_all += 1
        observation, reward, *rest = super().step(action)
        return observation, reward + Counted.steps_of_all, *rest


class Flicker(Seeded):
    """The same counter shows in the first observation after a reset, and never again."""

    def step(self, action):
        Counted.steps_of_all += 1
        observation, *rest = super().step(action)
        return observation + (self.step_count == 1) * Counted.steps_of_all, *rest


class Failing(Seeded):
    """Has a mistake in the method that a test names, after a number of calls."""

    where, calls_left = "", 0

    def __init__(self):
        super().__init__()
        self.fail("__init__", after=0)

    def reset(self, *, seed=None, options=None):
        self.fail("reset")
        return super().reset(seed=seed)

    def step(self, action):
        self.fail("step")
        return super().step(action)

    @classmethod
    def fail(cls, where: str, after: int = 1) -> None:
        if cls.where == where:
            cls.calls_left -= after
            if cls.calls_left <= 0 or not after:
                raise TypeError(f"mistake in {where}")


class Endless(gym.Env):
    """Never ends, and is registered without a time limit; every step is worth 1."""

    observation_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        return np.zeros(1, np.float32), 1.0, False, False, {}


class Levels(Seeded):
    """Actions are whole numbers from 0 to 5, and the environment insists on their type."""

    def __init__(self):
        super().__init__()
        self.action_space = gym.spaces.Box(0, 5, (2,), np.int64)

    def step(self, action):
        assert self.action_space.contains(action), repr(action)
        return super().step(action)


class Image(Endless):
    """Observations are small pictures."""

    observation_space = gym.spaces.Box(0, 255, (4, 5, 3), np.uint8)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.low, {}

    def step(self, action):
        return self.observation_space.low, *super().step(action)[1:]


def make_stacked() -> gym.Env:
    """Frame stacking, a wrapper with state."""
    return gym.wrappers.FrameStackObservation(Seeded(noise=1.0), 3)


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
gym.register("Stub/Seeded-v0", Seeded)
gym.register("Stub/NoisySeeded-v0", Seeded, kwargs={"noise": 1.0})
gym.register("Stub/Poisoned-v0", Poisoned)
gym.register("Stub/Matrix-v0", Matrix)
gym.register("Stub/IntegerReset-v0", IntegerReset)
gym.register("Stub/Opaque-v0", Opaque)
gym.register("Stub/OwnGenerator-v0", OwnGenerator)
gym.register("Stub/GlobalReset-v0", GlobalReset)
gym.register("Stub/GlobalStep-v0", GlobalStep)
gym.register("Stub/GlobalHidden-v0", GlobalHidden)
gym.register("Stub/Counted-v0", Counted)
gym.register("Stub/Flicker-v0", Flicker)
gym.register("Stub/Endless-v0", Endless)
gym.register("Stub/Levels-v0", Levels)
gym.register("Stub/Image-v0", Image)
gym.register("Stub/Stacked-v0", make_stacked)
gym.register("Stub/Failing-v0", Failing)
