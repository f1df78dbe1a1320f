"""What is REINFORCE's own in reinforce.py, against plain definitions, enumeration, NumPy; short runs.

What the script shares with ppo_continuous.py, letter for letter, is tested there.
"""

import copy
import dataclasses
import itertools
import json
import math
import signal
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn as nn
from helpers import checkpoint_difference, read_curves, start
from scipy.stats import chi2
from test_ppo_continuous import make_batch, plain_gae
from test_ppo_continuous_runs import flags, kill_when, nth_evaluation, random_return, refusal
from torch.distributions import Categorical, Independent, Normal

import ppo_continuous
import reinforce

SCRIPT = "reinforce.py"
ESTIMATORS = reinforce.ESTIMATORS.__args__
LOG: list[tuple] = []  # (seed, observation, action, reward, next observation, terminated) of Short


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Short(gym.Env):
    """Ends after 2 + seed % 4 steps, by truncation where seed % 3 is 0, and writes every step to LOG.

    Observations and rewards are noise; the rewards also depend on the action.
    """

    def __init__(self, action_space: gym.Space, observation_space: gym.Space | None = None):
        self.observation_space = observation_space or gym.spaces.Box(-np.inf, np.inf, (3,), np.float64)
        self.action_space = action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seed, self.steps = seed, 0
        self.observation = self.np_random.normal(5, 3, 3)
        return self.observation, {}

    def step(self, action):
        assert self.action_space.contains(action)
        before, self.steps = self.observation, self.steps + 1
        self.observation = self.np_random.normal(5, 3, 3)
        reward = float(np.float32(self.np_random.normal(2) + np.sum(action)))
        ended, truncated = self.steps == 2 + self.seed % 4, self.seed % 3 == 0
        LOG.append((self.seed, before, action, reward, self.observation, ended and not truncated))
        return self.observation, reward, ended and not truncated, ended and truncated, {}


RANGES = gym.spaces.Box(np.float32([[-2, 0], [-1, 0.5]]), np.float32([[6, 1], [1, 2.5]]))
gym.register("Reinforce/Box-v0", Short, kwargs={"action_space": RANGES})
gym.register("Reinforce/Discrete-v0", Short, kwargs={"action_space": gym.spaces.Discrete(3, start=5)})
gym.register("Reinforce/Several-v0", Short, kwargs={"action_space": gym.spaces.MultiDiscrete([2, 3])})
sequence = gym.spaces.Sequence(gym.spaces.Discrete(2))
spaces = {"action_space": gym.spaces.Discrete(2), "observation_space": sequence}
gym.register("Reinforce/Sequence-v0", Short, kwargs=spaces)


# ------------------------------------------------------------------------------------- the six estimators


def plain_weights(rewards, values, next_values, terminated, done, gamma, gae_lambda, estimator) -> np.ndarray:
    """The definitions, one environment, one episode and one step at a time."""
    rows, columns = rewards.shape
    weights = np.zeros((rows, columns))
    for n in range(columns):
        first = 0
        while first < rows:
            last = first
            while last < rows - 1 and not done[last, n]:
                last += 1

            def discounted_return(begin: int, n: int = n, last: int = last) -> float:
                result = sum(gamma ** (k - begin) * rewards[k, n] for k in range(begin, last + 1))
                ended = bool(terminated[last, n])
                return result + (0 if ended else gamma ** (last + 1 - begin) * next_values[last, n])

            for t in range(first, last + 1):
                q_value = rewards[t, n] + (0 if terminated[t, n] else gamma * next_values[t, n])
                if estimator == "total_return":
                    weights[t, n] = discounted_return(first)
                elif estimator == "reward_to_go":
                    weights[t, n] = discounted_return(t)
                elif estimator == "baseline":
                    weights[t, n] = discounted_return(t) - values[t, n]
                elif estimator == "q_value":
                    weights[t, n] = q_value
                elif estimator == "td_residual":
                    weights[t, n] = q_value - values[t, n]
            first = last + 1
    if estimator == "advantage":
        return plain_gae(rewards, values, next_values, terminated, done, gamma, gae_lambda)
    return weights


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(("T", "gamma"), [(1, 0.9), (2, 0.9), (17, 0.0), (17, 0.93), (32, 1.0)])
def test_weights_are_the_definitions(T, gamma, estimator):
    """Several episodes in a column, terminated ones, truncated ones, and unfinished tails."""
    batch = make_batch(T, 5, seed=T)
    *_, terminated, done = batch
    if T > 2:
        assert done.sum(0).min() >= 1 and (done & ~terminated).any() and not done[-1].all()
    weights = reinforce.policy_gradient_weights(*batch, gamma, 0.8, estimator)
    assert weights.shape == (T, 5) and weights.dtype == torch.float64
    expected = plain_weights(*(x.numpy() for x in batch), gamma, 0.8, estimator)
    np.testing.assert_allclose(weights, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_masks_may_be_bool_or_float_and_inputs_are_left_alone(estimator, dtype):
    *numbers, terminated, done = make_batch(16, 4, seed=1)
    numbers = [x.to(dtype) for x in numbers]
    masks = terminated.to(dtype), done.to(dtype)
    before = [x.clone() for x in (*numbers, *masks)]
    as_bool = reinforce.policy_gradient_weights(*numbers, terminated, done, 0.97, 0.9, estimator)
    as_float = reinforce.policy_gradient_weights(*numbers, *masks, 0.97, 0.9, estimator)
    assert as_bool.dtype == dtype and torch.equal(as_bool, as_float)
    assert all(torch.equal(x, y) for x, y in zip((*numbers, *masks), before))


WORKED = {  # terminated after three steps in the first column, truncated in the second; then unfinished
    "total_return": ([2.75, 2.75, 2.75, 8.5, 8.5], [3.75, 3.75, 3.75, 8.5, 8.5]),
    "reward_to_go": ([2.75, 3.5, 3, 8.5, 9], [3.75, 5.5, 7, 8.5, 9]),
    "baseline": ([-7.25, -16.5, -27, -31.5, -41], [-6.25, -14.5, -23, -31.5, -41]),
    "q_value": ([11, 17, 3, 29, 9], [11, 17, 7, 29, 9]),
    "advantage": ([-1.4375, -9.75, -27, -21.25, -41], [-1.1875, -8.75, -23, -21.25, -41]),
    "td_residual": ([1, -3, -27, -11, -41], [1, -3, -23, -11, -41]),
}


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_numbers_worked_by_hand(estimator):
    """Discount and lambda of 1/2."""
    columns = [[1, 2, 3, 4, 5], [10, 20, 30, 40, 50], [20, 30, 8, 50, 8]]
    rewards, values, next_values = (torch.tensor([x, x]).double().T for x in columns)
    terminated, done = torch.zeros(2, 5, 2)
    terminated[2, 0], done[2] = 1, 1
    batch = rewards, values, next_values, terminated, done
    weights = reinforce.policy_gradient_weights(*batch, 0.5, 0.5, estimator)
    assert tuple(weights.T.tolist()) == WORKED[estimator]


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_relations_between_the_estimators(gamma):
    rewards, values, next_values, terminated, done = make_batch(24, 5, seed=3)
    # Inside an episode V of the next observation is that of the next row, as in a rollout.
    next_values[:-1] = torch.where(done[:-1], next_values[:-1], values[1:])
    batch = rewards, values, next_values, terminated, done

    def weights(estimator: str, gae_lambda: float = 0.7) -> torch.Tensor:
        return reinforce.policy_gradient_weights(*batch, gamma, gae_lambda, estimator)

    def assert_equal(one: torch.Tensor, other: torch.Tensor) -> None:
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)

    assert_equal(weights("baseline"), weights("reward_to_go") - values)
    assert_equal(weights("advantage", 1.0), weights("baseline"))
    assert_equal(weights("advantage", 0.0), weights("td_residual"))
    assert_equal(weights("q_value") - values, weights("td_residual"))
    total, to_go = weights("total_return"), weights("reward_to_go")
    assert torch.equal(total[0], to_go[0])
    for n, t in itertools.product(range(5), range(1, 24)):
        assert total[t, n] == (to_go[t, n] if done[t - 1, n] else total[t - 1, n])


# ----------------------------------------------------------- expectation and variance, by enumeration

HORIZON = 3


class Tiny:
    """2 states, 2 actions, 3 steps; each step may also end the episode. Every trajectory is listed.

    The policy is a table of logits (state, action). `batch(V)` has a column for each trajectory, with the
    values V (HORIZON + 1, 3), where state 2 is the end; rows past the end are not `valid`.
    """

    def __init__(self):
        generator = np.random.default_rng(5)
        self.start = torch.tensor([0.7, 0.3]).double()
        self.moves = torch.from_numpy(generator.dirichlet(np.ones(3), (2, 2)))  # state, action, next state
        self.rewards = torch.from_numpy(generator.uniform(0.5, 2.5, (2, 2, 3)))
        self.logits = torch.from_numpy(generator.normal(size=(2, 2)))
        steps = [(s,) for s in range(2)]  # (state, action, state, ..., state)
        for _ in range(HORIZON):
            steps = [
                x + more
                for x in steps
                for more in (itertools.product(range(2), range(3)) if x[-1] < 2 else [(0, 2)])
            ]
        trajectories = torch.tensor(steps)
        self.states, self.actions = trajectories[:, ::2].T, trajectories[:, 1::2].T
        self.valid = self.states[:-1] < 2
        self.index = self.states[:-1].clamp(max=1), self.actions, self.states[1:]
        self.paid = torch.where(self.valid, self.rewards[self.index], 0.0)

    def log_probs(self, logits: torch.Tensor) -> torch.Tensor:
        """log pi(a_t|s_t) of each trajectory, 0 past its end."""
        return torch.where(self.valid, logits.log_softmax(-1)[self.index[:2]], 0.0)

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        moves = torch.where(self.valid, self.moves[self.index], 1.0).prod(0)
        return self.start[self.states[0]] * moves * self.log_probs(logits).sum(0).exp()

    def expected_return(self, logits: torch.Tensor, gamma: float) -> torch.Tensor:
        powers = gamma ** torch.arange(HORIZON).double()[:, None]
        return (self.probabilities(logits) * (powers * self.paid).sum(0)).sum()

    def gradient(self, gamma: float) -> np.ndarray:
        """Of the expected return, by central differences."""
        gradient = np.zeros((2, 2))
        for place in itertools.product(range(2), range(2)):
            shift = torch.zeros(2, 2).double()
            shift[place] = 1e-5
            ahead, behind = (self.expected_return(self.logits + x, gamma) for x in (shift, -shift))
            gradient[place] = (ahead - behind) / 2e-5
        return gradient

    def exact_values(self, gamma: float) -> torch.Tensor:
        """V of the time and the state, by going backwards; 0 at the end and past the horizon."""
        values, policy = torch.zeros(HORIZON + 1, 3).double(), self.logits.softmax(-1)
        for t in reversed(range(HORIZON)):
            q_values = (self.moves * (self.rewards + gamma * values[t + 1])).sum(-1)
            values[t, :2] = (policy * q_values).sum(-1)
        return values

    def estimates(self, estimator, values, gamma, gae_lambda=0.6, discount_states=False) -> torch.Tensor:
        """sum over t of Psi_t grad log pi(a_t|s_t) of each trajectory, (number, 4)."""
        times = torch.arange(HORIZON + 1)[:, None].expand(self.states.shape)
        values = values[times, self.states]
        terminated = self.states[1:] == 2
        terminated[-1] = True
        batch = self.paid, values[:-1], values[1:], terminated, terminated
        weights = reinforce.policy_gradient_weights(*batch, gamma, gae_lambda, estimator)
        if discount_states:
            weights = weights * gamma ** times[:-1]
        policy, scores = self.logits.softmax(-1), torch.zeros(*self.actions.shape, 2, 2).double()
        for (t, n), ok in np.ndenumerate(self.valid.numpy()):
            if ok:
                state, action = self.states[t, n], self.actions[t, n]
                scores[t, n, state] = nn.functional.one_hot(action, 2) - policy[state]
        return (weights[..., None, None] * scores).sum(0).flatten(1)

    def mean(self, *args, **kwargs) -> np.ndarray:
        probabilities = self.probabilities(self.logits)[:, None]
        return (probabilities * self.estimates(*args, **kwargs)).sum(0).view(2, 2).numpy()

    def variance(self, *args, **kwargs) -> float:
        """Trace of the covariance."""
        probabilities, estimates = self.probabilities(self.logits)[:, None], self.estimates(*args, **kwargs)
        mean = (probabilities * estimates).sum(0)
        return (probabilities * (estimates - mean).square()).sum().item()


@pytest.fixture(scope="module")
def tiny() -> Tiny:
    result = Tiny()
    assert result.probabilities(result.logits).sum().item() == pytest.approx(1, abs=1e-12)
    start = (result.start * result.exact_values(0.8)[0, :2]).sum().item()
    assert result.expected_return(result.logits, 0.8).item() == pytest.approx(start, abs=1e-12)
    return result


def any_values() -> torch.Tensor:
    values = torch.randn(HORIZON + 1, 3).double() * 3
    values[:, 2] = 7  # never to be looked at: the end is worth nothing
    return values


@pytest.mark.parametrize("estimator", ["total_return", "reward_to_go", "baseline"])
def test_three_estimators_are_unbiased_with_any_values(tiny, estimator):
    for _ in range(3):
        mean = tiny.mean(estimator, any_values(), 1.0)
        np.testing.assert_allclose(mean, tiny.gradient(1.0), rtol=0, atol=1e-8)


@pytest.mark.parametrize("estimator", ["q_value", "advantage", "td_residual"])
def test_three_estimators_are_unbiased_with_the_exact_values_only(tiny, estimator):
    gradient = tiny.gradient(1.0)
    for gae_lambda in (0.0, 0.6, 1.0) if estimator == "advantage" else (0.6,):
        mean = tiny.mean(estimator, tiny.exact_values(1.0), 1.0, gae_lambda)
        np.testing.assert_allclose(mean, gradient, rtol=0, atol=1e-8)
    biases = [tiny.mean(estimator, any_values(), 1.0) - gradient for _ in range(4)]
    assert np.abs(biases).max() > 0.05


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradient_of_the_discounted_return(tiny, estimator):
    """It takes a factor gamma^t, but for the total return, which starts to discount at t = 0 anyway."""
    gamma, gradient = 0.7, tiny.gradient(0.7)
    values = tiny.exact_values(gamma)
    means = [tiny.mean(estimator, values, gamma, discount_states=x) for x in (False, True)]
    right, wrong = means if estimator == "total_return" else means[::-1]
    np.testing.assert_allclose(right, gradient, rtol=0, atol=1e-8)
    assert np.abs(wrong - gradient).max() > 0.01


@pytest.mark.parametrize("gamma", [0.8, 1.0])
def test_exact_variances_are_in_order(tiny, gamma):
    values, names = tiny.exact_values(gamma), ("total_return", "reward_to_go", "baseline", "td_residual")
    total, to_go, baseline, residual = (tiny.variance(name, values, gamma) for name in names)
    assert total > 1.2 * to_go and to_go > 1.2 * baseline and baseline > 1.2 * residual > 0
    advantages = [tiny.variance("advantage", values, gamma, x) for x in (0.0, 0.5, 1.0)]
    assert advantages == [pytest.approx(residual), advantages[1], pytest.approx(baseline)]
    assert residual < advantages[1] < baseline
    # Without a baseline: less noise than the reward to go, from which it takes that of the later rewards.
    assert residual < tiny.variance("q_value", values, gamma) < to_go


# ---------------------------------------------------------------------------------- agent and its policy


BOX = gym.spaces.Box(-2, 6, (2,))


def make_agent(action_space: gym.Space) -> reinforce.Agent:
    """With weights, log_std and statistics away from where they start."""
    agent = reinforce.Agent(3, action_space, log_std=-0.5)
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    agent.observation_statistics.update(np.random.default_rng(0).normal(2, 5, (100, 3)))
    return agent


def distribution(agent: reinforce.Agent, observations: torch.Tensor) -> torch.distributions.Distribution:
    """The policy at normalised observations; actions are (..., A)."""
    output = agent.actor(observations)
    if agent.discrete:
        return Independent(Categorical(logits=output.unsqueeze(-2)), 1)
    return Independent(Normal(output, agent.log_std.exp()), 1)


low, high = np.float32([[-2, -np.inf], [-np.inf, 0.5]]), np.float32([[6, 1], [np.inf, 2.5]])
RANGES_AND_NO_BOUNDS = gym.spaces.Box(low, high)
ACTION_SPACES = {"discrete": gym.spaces.Discrete(4), "box": BOX}


@pytest.mark.parametrize("kind", ACTION_SPACES)
def test_agent_scores_actions_as_its_distribution_does(kind):
    agent, observations = make_agent(ACTION_SPACES[kind]), torch.randn(6, 2, 3)
    policy = distribution(agent, observations)
    actions = policy.sample()
    torch.testing.assert_close(agent.log_prob(observations, actions), policy.log_prob(actions))
    torch.testing.assert_close(agent.entropy(observations.flatten(0, 1)), policy.entropy().mean())


@pytest.mark.parametrize("kind", ACTION_SPACES)
def test_log_probabilities_are_differentiable(kind):
    agent, observations = make_agent(ACTION_SPACES[kind]).double(), torch.randn(5, 3).double()
    actions = distribution(agent, observations).sample()
    observations.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: agent.log_prob(x, actions), observations)


@pytest.mark.parametrize(
    "space", [gym.spaces.Discrete(3, start=-4), RANGES_AND_NO_BOUNDS, gym.spaces.Box(0, 1, ())]
)
def test_loaded_agent_has_the_actions_of_the_saved_one(space, tmp_path):
    """Without its environment, which a checkpoint names but which nobody may import for it."""
    agent, observations = make_agent(space), np.random.default_rng(1).normal(2, 5, (50, 3))
    state = {"args": {"env_id": "no_such_module:Thing-v0"}, "agent": agent.state_dict()}
    reinforce.save_checkpoint(tmp_path / "checkpoint.pt", state)
    policies = [reinforce.FrozenPolicy(x) for x in (agent, reinforce.Agent.load(tmp_path))]
    actions = policies[0].mode(observations) * 3
    one, other = (policy.to_environment(actions) for policy in policies)
    assert np.array_equal(one, other) and np.shape(other) == (50, *space.shape)
    assert agent.discrete or np.asarray(one).dtype == np.float32


def test_agent_starts_near_uniform_and_with_the_std_that_was_asked_for():
    observations = torch.randn(100, 3)
    agent = reinforce.Agent(3, gym.spaces.Discrete(4))
    assert (agent.actor(observations).softmax(-1) - 0.25).abs().max() < 0.02
    agent = reinforce.Agent(3, gym.spaces.Box(0, 1, (2, 2)), log_std=-0.7)
    assert torch.equal(agent.log_std, torch.full((4,), -0.7))
    assert agent.actor(observations).abs().max() < 0.1


def test_value_is_in_units_of_reward():
    agent, observations = make_agent(BOX), torch.randn(6, 2, 3)
    returns = np.random.default_rng(0).normal(50, 30, 200)
    plain = agent.critic(observations)[..., 0]
    torch.testing.assert_close(agent.value(observations), plain, rtol=1e-6, atol=0)
    agent.return_statistics.update(returns)
    torch.testing.assert_close(agent.value(observations), plain * returns.std(), rtol=1e-5, atol=1e-5)


ACTORS = {"as it is": None, "layer norm": nn.LayerNorm(3), "one layer": nn.Linear(3, 4)}


@pytest.mark.parametrize("actor", ACTORS)
def test_frozen_policy_is_the_actor(actor):
    agent = make_agent(gym.spaces.Discrete(3 if actor == "layer norm" else 4))
    agent.actor = ACTORS[actor] or agent.actor
    observations = np.random.default_rng(1).normal(2, 5, (7, 3))
    observations[0] = 1e4  # which is cut
    mean, variance = agent.observation_statistics.mean, agent.observation_statistics.variance
    normal = ((torch.from_numpy(observations).float() - mean) / (variance + 1e-8).sqrt()).clamp(-10, 10)
    policy, expected = reinforce.FrozenPolicy(agent), agent.actor(normal).detach()
    np.testing.assert_allclose(policy.normalize(observations), normal, rtol=0, atol=1e-5)
    np.testing.assert_allclose(policy.output(observations), expected, rtol=0, atol=2e-5)
    assert policy.mode(observations).tolist() == expected.argmax(-1, keepdim=True).tolist()
    with torch.no_grad():
        for tensor in (*agent.parameters(), *agent.buffers()):
            tensor += 1
    unchanged = np.allclose(policy.output(observations), expected, rtol=0, atol=2e-5)
    assert unchanged == (actor != "layer norm")  # a module that it cannot read stays the live one


def test_drawn_actions_follow_the_softmax():
    agent = make_agent(gym.spaces.Discrete(4))
    policy = reinforce.FrozenPolicy(agent)
    for row in np.random.default_rng(2).normal(2, 5, (2, 3)):
        rows = np.tile(row, (20_000, 1))
        expected = torch.from_numpy(policy.output(rows[:1])).double().softmax(-1)[0].numpy() * len(rows)
        assert expected.min() > 200 and expected.max() / expected.min() > 1.5
        actions = policy.sample(rows)
        assert actions.shape == (len(rows), 1)
        counts = np.bincount(actions[:, 0], minlength=4)
        assert ((counts - expected) ** 2 / expected).sum() < chi2.ppf(1 - 1e-6, df=3)


def test_drawn_actions_have_the_std_of_the_policy():
    agent = make_agent(BOX)
    policy, rows = reinforce.FrozenPolicy(agent), np.ones((20_000, 3))
    noise = (policy.sample(rows) - policy.mode(rows)) / agent.log_std.exp().detach().numpy()
    # Standard errors are 0.007 of the mean and of the correlation, 0.005 of the standard deviation.
    np.testing.assert_allclose(noise.mean(0), 0, atol=0.035)
    np.testing.assert_allclose(noise.std(0), 1, atol=0.025)
    assert abs(np.corrcoef(noise.T)[0, 1]) < 0.035


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("low", "high", "raw", "expected"),
    [
        (-2.0, 6.0, [-1, 0, 0.5, 1, 1.5, -9], [-2, 2, 4, 6, 6, -2]),
        (-np.inf, np.inf, [-50, 0.25, 50], [-50, 0.25, 50]),
        (-3.4e38, 3.4e38, [-50, 0.25, 50], [-50, 0.25, 50]),
        (0.0, np.inf, [-1, 0.25, 50], [0, 0.25, 50]),
    ],
)
def test_raw_actions_cover_the_range_of_the_environment(low, high, raw, expected):
    agent = reinforce.Agent(1, gym.spaces.Box(low, high, (len(raw),)))
    action = reinforce.FrozenPolicy(agent).to_environment(np.array([raw], np.float32))[0]
    np.testing.assert_allclose(action, expected, rtol=1e-6)
    assert action.dtype == np.float32


def test_actions_have_the_shape_and_the_start_of_their_space():
    policy = reinforce.FrozenPolicy(reinforce.Agent(1, RANGES))
    action = policy.to_environment(np.float32([[0.5, 0.5, -0.5, -3]]))[0]
    assert action.tolist() == [[4, 0.75], [-0.5, 0.5]] and action in RANGES
    policy = reinforce.FrozenPolicy(reinforce.Agent(1, gym.spaces.Discrete(3, start=-4)))
    assert policy.to_environment(np.arange(3)[:, None]) == [-4, -3, -2]


# -------------------------------------------------------------------------------- gradients of episodes


@pytest.mark.parametrize("kind", ACTION_SPACES)
def test_gradient_of_each_episode(kind):
    """Against autograd of each objective as torch.distributions has it; past the end there is garbage."""
    agent = make_agent(ACTION_SPACES[kind]).double()
    lengths = [6, 1, 4]
    observations, weights = torch.randn(6, 3, 3).double(), torch.randn(6, 3).double()
    actions = distribution(agent, observations).sample()
    expected = []
    for n, length in enumerate(lengths):
        objective = 0
        for t in range(length):
            log_prob = distribution(agent, observations[t, n]).log_prob(actions[t, n])
            objective = objective + weights[t, n] * log_prob
        agent.zero_grad()
        objective.backward()
        expected.append(torch.cat([p.grad.flatten() for p in agent.policy_parameters()]))
        observations[length:, n] = weights[length:, n] = math.nan
        actions[length:, n] = 10**6
    agent.zero_grad(set_to_none=True)
    gradients = reinforce.episode_gradients(agent, observations, actions, weights, lengths)
    torch.testing.assert_close(gradients, torch.stack(expected), rtol=1e-10, atol=1e-12)
    assert all(p.grad is None for p in agent.parameters())  # they are returned and left nowhere
    assert gradients[1].norm() > 0

    def mean_objective() -> torch.Tensor:
        rows = [(slice(length), n) for n, length in enumerate(lengths)]
        terms = [(weights[r] * agent.log_prob(observations[r], actions[r])).sum() for r in rows]
        return sum(terms) / 3

    # The mean is the gradient of the mean, by differences along a direction.
    parameters = agent.policy_parameters()
    directions = [torch.randn_like(p) for p in parameters]
    slope = (gradients.mean(0) * torch.cat([d.flatten() for d in directions])).sum().item()
    ends = []
    with torch.no_grad():
        for step in (1e-5, -2e-5):
            for p, direction in zip(parameters, directions):
                p += step * direction
            ends.append(mean_objective().item())
    assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(slope, rel=1e-5)


def test_parameters_of_the_policy_are_those_of_no_value_function():
    for space in ACTION_SPACES.values():
        agent = reinforce.Agent(3, space)
        policy, critic = {*agent.policy_parameters()}, {*agent.critic.parameters()}
        assert not policy & critic and policy | critic == {*agent.parameters()}


# ----------------------------------------------------------------------------------------------- episodes

NAMES = reinforce.Rollout._fields


def play(env_id: str, num_envs: int = 6, max_episode_steps: int = 100, times: int = 1) -> list[dict]:
    LOG.clear()
    envs = reinforce.Environments(env_id, num_envs, max_episode_steps)
    torch.manual_seed(1)
    policy = reinforce.FrozenPolicy(make_agent(envs.action_space))
    torch.manual_seed(7)
    return [reinforce.collect_episodes(envs, policy)._asdict() for _ in range(times)]


def logged_episodes() -> dict[int, list[tuple]]:
    """{seed: its steps}, in the order of the environments, which are stepped in turn."""
    episodes = {}
    for seed, *step in LOG:
        episodes.setdefault(seed, []).append(step)
    return episodes


@pytest.mark.parametrize("max_episode_steps", [100, 4, 1])
@pytest.mark.parametrize("env_id", ["Reinforce/Box-v0", "Reinforce/Discrete-v0"])
def test_episodes_are_what_the_environments_saw(env_id, max_episode_steps):
    (batch,) = play(env_id, 8, max_episode_steps)
    torch.manual_seed(7)
    seeds = torch.randint(reinforce.EVALUATION_SEED, (8,)).tolist()
    episodes = logged_episodes()
    assert [*episodes] == seeds
    lengths = [min(2 + seed % 4, max_episode_steps) for seed in seeds]
    assert all(len(batch[name]) == max(lengths) for name in NAMES)
    for n, (seed, steps) in enumerate(episodes.items()):
        assert len(steps) == lengths[n]  # nothing was played past the end
        for t, (before, env_action, reward, after, terminated) in enumerate(steps):
            assert np.array_equal(batch["observations"][t, n], before)
            assert np.array_equal(batch["next_observations"][t, n], after)
            assert batch["rewards"][t, n] == np.float32(reward)
            assert batch["terminated"][t, n] == terminated and batch["done"][t, n] == (t == len(steps) - 1)
            action = batch["actions"][t, n]
            if "Discrete" in env_id:
                assert action.shape == (1,) and 5 + action[0] == env_action
            else:
                low, high = RANGES.low.flatten(), RANGES.high.flatten()
                played = np.clip((low + high) / 2 + (high - low) / 2 * action, low, high)
                np.testing.assert_allclose(env_action, played.reshape(2, 2), rtol=1e-5, atol=1e-6)
        assert steps[-1][-1] == (len(steps) == 2 + seed % 4 and seed % 3 > 0)
        for name in ("rewards", "terminated", "done"):
            assert not batch[name][lengths[n] :, n].any()
    ends = batch["terminated"].any(0), batch["done"].any(0)
    assert ends[1].all() and not ends[0].all() and ends[0].any() == (max_episode_steps > 1)
    assert len({*lengths}) == (1 if max_episode_steps == 1 else 3 if max_episode_steps == 4 else 4)


def test_episodes_are_drawn_from_the_generator_of_torch():
    """The same state of it gives the same episodes, and it moves on: the next ones are others."""
    first, second = play("Reinforce/Box-v0", times=2)
    (again,) = play("Reinforce/Box-v0")
    assert all(np.array_equal(first[name], again[name]) for name in NAMES)
    assert not np.array_equal(first["observations"][0], second["observations"][0])


def test_observations_of_other_kinds_are_flattened():
    """The environment itself checks that its actions are (2, 2) and within its space."""
    envs = reinforce.Environments("stub_environments:Stub/Matrix-v0", 1, 100)
    policy = reinforce.FrozenPolicy(reinforce.Agent(6, envs.action_space, log_std=1.0))
    rollout = reinforce.collect_episodes(envs, policy)
    assert rollout.observations.shape == (10, 1, 6) and rollout.actions.shape == (10, 1, 4)
    assert rollout.done[:, 0].tolist() == [False] * 9 + [True]


def test_statistics_are_those_of_the_last_hundred_episodes_in_the_order_of_the_environments():
    """In the order of their ends, the short episodes of a batch would be forgotten first."""
    envs = reinforce.Environments("Reinforce/Box-v0", 64, 100)
    policy = reinforce.FrozenPolicy(make_agent(envs.action_space))
    assert envs.statistics() == {}
    batches = [reinforce.collect_episodes(envs, policy) for _ in range(2)]
    lengths = np.concatenate([batch.done.argmax(0) + 1 for batch in batches])[-100:]
    returns = np.concatenate([batch.rewards.sum(0) for batch in batches])[-100:]
    statistics = envs.statistics()
    assert statistics["charts/episodic_length"] == lengths.mean()
    assert statistics["charts/episodic_return"] == pytest.approx(returns.mean(), rel=1e-5)
    again = reinforce.Environments("Reinforce/Box-v0", 64, 100)
    again.load_state_dict(envs.state_dict())
    assert again.statistics() == statistics


class GlobalDraws(Short):
    """Draws its rewards from NumPy's global generator, which is seeded at each reset."""

    def step(self, action):
        observation, _, *rest = super().step(action)
        return observation, np.random.normal(), *rest


gym.register("Reinforce/GlobalDraws-v0", GlobalDraws, kwargs={"action_space": RANGES})


def test_episodes_of_an_environment_that_draws_from_global_generators():
    first, again = (play("Reinforce/GlobalDraws-v0")[0] for _ in range(2))
    assert np.array_equal(first["rewards"], again["rewards"]) and first["rewards"].any()


@pytest.mark.parametrize(
    ("env_id", "message"),
    [
        ("Reinforce/Several-v0", "MultiDiscrete"),
        ("Reinforce/Sequence-v0", "cannot be flattened"),
        ("NoSuchEnvironment-v0", "NoSuchEnvironment"),
        ("no_such_module:Thing-v0", "no_such_module"),
    ],
)
def test_environments_that_do_not_fit_are_named(env_id, message, tmp_path):
    assert message in refusal(reinforce.main, reinforce.Args(env_id=env_id, runs=str(tmp_path)))
    assert not [*tmp_path.iterdir()]


def test_environment_that_draws_nothing_is_named(tmp_path):
    env_id = "stub_environments:Stub/Coded-v0"
    args = reinforce.Args(env_id=env_id, runs=str(tmp_path), capture_video=True)
    assert f"Cannot record {env_id}" in refusal(reinforce.main, args)


# ------------------------------------------------------------------------------------- what training does


class Recorder:
    """Keeps what `episode_gradients` is given, the agent of that moment, and the critic's minibatches."""

    def __init__(self, monkeypatch):
        self.iterations, self.compute = [], reinforce.episode_gradients
        monkeypatch.setattr(reinforce, "episode_gradients", self)

    def __call__(self, agent, *inputs):
        if not self.iterations:
            agent.critic.register_forward_hook(self.see)
        self.iterations.append((copy.deepcopy(agent.state_dict()), *inputs, []))
        return self.compute(agent, *inputs)

    def see(self, critic, inputs, output):
        if torch.is_grad_enabled():
            self.iterations[-1][-1].append(inputs[0].clone())


TRAININGS = [
    {"estimator": "advantage", "env_id": "Reinforce/Box-v0"},
    {"estimator": "total_return", "env_id": "Reinforce/Discrete-v0", "discount_states": True},
    {"estimator": "total_return", "env_id": "Reinforce/Box-v0", "norm_returns": False},
    {"estimator": "reward_to_go", "env_id": "Reinforce/Discrete-v0", "anneal_lr": False},
    {"estimator": "baseline", "env_id": "Reinforce/Box-v0", "discount_states": True, "norm_returns": False},
    {"estimator": "q_value", "env_id": "Reinforce/Discrete-v0", "discount_states": True},
    {"estimator": "td_residual", "env_id": "Reinforce/Box-v0", "norm_returns": False},
]


@pytest.mark.parametrize("changes", TRAININGS, ids=lambda changes: "-".join(map(str, changes.values())))
def test_training_does_what_the_definitions_say(changes, tmp_path, monkeypatch):
    """Several iterations, computed anew from what the environments saw, with torch.distributions.

    Observations are normalised with the statistics of the iterations before, in the first with its own.
    """
    recorder = Recorder(monkeypatch)
    settings = {"num_envs": 5, "max_episode_steps": 4, "minibatch_size": 6, "critic_epochs": 2, "gamma": 0.8}
    settings |= {"gae_lambda": 0.7, "total_timesteps": 50, "eval_interval": 0, "learning_rate": 2e-3}
    args = reinforce.Args(**settings | changes, runs=str(tmp_path))
    LOG.clear()
    run = reinforce.main(args)
    curves, episodes = read_curves(run), [*logged_episodes().values()]
    assert len(recorder.iterations) >= 3 and len(episodes) == 5 * len(recorder.iterations)
    assert sum(map(len, episodes[:-5])) < 50 <= sum(map(len, episodes))  # the last batch is finished
    ends = [steps[-1][-1] for steps in episodes]
    assert any(ends) and not all(ends) and {*map(len, episodes)} == {2, 3, 4}

    agent = reinforce.Agent(3, gym.make(args.env_id).action_space)
    agent.load_state_dict(recorder.iterations[0][0])
    optimizer = torch.optim.Adam(agent.policy_parameters(), eps=1e-5, maximize=True)
    critic_optimizer = torch.optim.Adam(agent.critic.parameters(), eps=1e-5)
    step, seen_observations, seen_returns, seen_episodes = 0, [], [], []
    for iteration, (state, observations, actions, weights, lengths, calls) in enumerate(recorder.iterations):
        batch = episodes[5 * iteration : 5 * iteration + 5]
        remaining = 1 - step / 50 if args.anneal_lr else 1
        optimizer.param_groups[0]["lr"] = 2e-3 * remaining
        critic_optimizer.param_groups[0]["lr"] = 1e-3 * remaining
        step += sum(map(len, batch))
        assert lengths == [*map(len, batch)]
        mean_length = np.mean([length for _, length in seen_episodes[-100:]] or lengths)
        for name, expected in agent.named_parameters():
            torch.testing.assert_close(state[name], expected.data, rtol=0, atol=3e-5)

        of_batch = [row[0] for steps in batch for row in steps]
        history = np.array(seen_observations or of_batch)
        mean, std = history.mean(0), np.sqrt(history.var(0) + 1e-8)
        seen_observations += of_batch
        unit = np.std(seen_returns) if seen_returns else 1.0
        plain, returns, values, normal_of_batch = [], [], [], []
        for n, steps in enumerate(batch):
            before, env_actions, rewards, after, terminated = (np.array(x) for x in zip(*steps))
            normal, normal_next = (
                torch.from_numpy(np.clip((x - mean) / std, -10, 10)).float() for x in (before, after)
            )
            with torch.no_grad():
                v, next_v = (agent.critic(x)[:, 0].double().numpy() * unit for x in (normal, normal_next))
            done = np.arange(len(steps)) == len(steps) - 1
            columns = [x[:, None] for x in (rewards, v, next_v, terminated, done)]
            psi = plain_weights(*columns, 0.8, 0.7, args.estimator)[:, 0]
            if args.discount_states and args.estimator != "total_return":
                psi *= 0.8 ** np.arange(len(steps))
            plain.append(psi)
            returns.append(plain_gae(*columns, 0.8, 0.7)[:, 0] + v)
            values.append(v)
            normal_of_batch.append(normal)
            seen_episodes.append((rewards.sum(), len(steps)))
            np.testing.assert_allclose(observations[: len(steps), n], normal, rtol=0, atol=1e-5)
            raw = actions[: len(steps), n].numpy()
            if agent.discrete:
                assert np.array_equal(env_actions, 5 + raw[:, 0])
            else:
                policy = reinforce.FrozenPolicy(agent)
                played = policy.to_environment(raw)
                np.testing.assert_allclose(env_actions, played, rtol=1e-6)

        # The weights, the gradient of each episode, their mean and covariance, the step of the policy.
        if args.norm_returns:
            valid = np.concatenate(plain)
            plain = [(psi - valid.mean()) / (valid.std() + 1e-8) for psi in plain]
            given = np.concatenate([weights[:length, n] for n, length in enumerate(lengths)])
            assert given.mean() == pytest.approx(0, abs=1e-5) and given.std() == pytest.approx(1, abs=1e-5)
        gradients = []
        for n, (normal, psi) in enumerate(zip(normal_of_batch, plain)):
            np.testing.assert_allclose(weights[: len(psi), n], psi, rtol=1e-4, atol=1e-4)
            log_probs = distribution(agent, normal).log_prob(actions[: len(psi), n])
            objective = (torch.from_numpy(psi).float() * log_probs).sum() / mean_length
            gradient = torch.autograd.grad(objective, agent.policy_parameters())
            gradients.append(torch.cat([g.flatten() for g in gradient]))
        gradients = torch.stack(gradients)
        deviations = gradients - gradients.mean(0)
        variance = (deviations @ deviations.T).trace().item() / (len(batch) - 1)
        logged = {tag: curve[step] for tag, curve in curves.items()}
        assert logged["losses/gradient_variance"] == pytest.approx(variance, rel=1e-3)
        assert logged["losses/grad_norm"] == pytest.approx(gradients.mean(0).norm().item(), rel=1e-3)
        assert logged["charts/learning_rate"] == pytest.approx(2e-3 * remaining, rel=1e-5)
        for p, part in zip(
            agent.policy_parameters(),
            gradients.mean(0).split([p.numel() for p in agent.policy_parameters()]),
        ):
            p.grad = part.view_as(p)
        optimizer.step()

        # The critic: all steps once in each epoch, in a new order; targets in units of the returns so far.
        normal, returns, values = torch.cat(normal_of_batch), np.concatenate(returns), np.concatenate(values)
        seen_returns += returns.tolist()
        targets = torch.from_numpy(returns / np.std(seen_returns)).float()
        assert [len(x) for x in calls] == 2 * [len(x) for x in torch.arange(len(normal)).split(6)]
        orders = torch.cdist(torch.cat(calls), normal).argmin(-1)
        epochs = orders.view(2, -1).tolist()
        assert sorted(epochs[0]) == sorted(epochs[1]) == [*range(len(normal))] and epochs[0] != epochs[1]
        losses = []
        for indices in orders.split([len(x) for x in calls]):
            loss = 0.5 * nn.functional.mse_loss(agent.critic(normal[indices])[:, 0], targets[indices])
            critic_optimizer.zero_grad()
            loss.backward()
            critic_optimizer.step()
            losses.append(loss.item())
        assert logged["losses/value_loss"] == pytest.approx(np.mean(losses), rel=1e-3)
        explained = 1 - np.var(returns - values) / np.var(returns)
        assert logged["losses/explained_variance"] == pytest.approx(explained, abs=1e-3)
        entropy = distribution(agent, normal).entropy().mean().item()
        assert logged["losses/entropy"] == pytest.approx(entropy, abs=1e-4)
        training_return, length = np.mean(seen_episodes, 0)
        assert logged["charts/episodic_return"] == pytest.approx(training_return, rel=1e-4)
        assert logged["charts/episodic_length"] == pytest.approx(length, rel=1e-4)
    trained, checkpoint = reinforce.Agent.load(run), reinforce.load_checkpoint(run)
    for p, q in zip(trained.parameters(), agent.parameters()):
        torch.testing.assert_close(p, q, rtol=0, atol=3e-5)
    assert checkpoint["step"] == step
    for statistics, history in (
        (trained.observation_statistics, np.array(seen_observations)),
        (trained.return_statistics, np.array(seen_returns)),
    ):
        assert statistics.count == step
        np.testing.assert_allclose(statistics.mean, history.mean(0), rtol=1e-4)
        np.testing.assert_allclose(statistics.variance, history.var(0), rtol=1e-3)


# --------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"total_timesteps": 0}, "total_timesteps must lie in [1, inf), got 0"),
        ({"num_envs": 0}, "num_envs must lie in [1, inf)"),
        ({"max_episode_steps": 0}, "max_episode_steps must lie in [1, inf)"),
        ({"critic_epochs": 0}, "critic_epochs must lie in [1, inf)"),
        ({"minibatch_size": -1}, "minibatch_size must lie in [1, inf)"),
        ({"checkpoint_interval": 0}, "checkpoint_interval must lie in [1, inf)"),
        ({"eval_episodes": 0}, "eval_episodes must lie in [1, inf)"),
        ({"eval_interval": -1}, "eval_interval must lie in [0, inf)"),
        ({"learning_rate": 0.0}, "learning_rate must lie in (0, inf), got 0.0"),
        ({"learning_rate": math.nan}, "learning_rate must lie in (0, inf), got nan"),
        ({"critic_learning_rate": -1.0}, "critic_learning_rate must lie in (0, inf)"),
        ({"gamma": 1.01}, "gamma must lie in [0, 1], got 1.01"),
        ({"gamma": math.nan}, "gamma must lie in [0, 1]"),
        ({"gae_lambda": -0.1}, "gae_lambda must lie in [0, 1]"),
        ({"seed": -1}, "seed must lie in [0, 4294967296)"),
        ({"seed": 2**32}, "seed must lie in [0, 4294967296)"),
        ({"num_envs": 1, "estimator": "total_return"}, "one return, normalised, is 0"),
        ({"resume": "a", "evaluate": "b"}, "resume, evaluate and run_name exclude each other"),
    ],
    ids=lambda x: "-".join(f"{name}-{value}" for name, value in x.items()) if isinstance(x, dict) else "",
)
def test_bad_arguments_are_named(changes, message):
    with pytest.raises(ValueError) as error:
        reinforce.Args(**changes)
    assert message in str(error.value)


def test_arguments_at_the_edge_are_fine():
    reinforce.Args(gamma=1.0, gae_lambda=0.0, eval_interval=0, seed=2**32 - 1, max_episode_steps=1)
    reinforce.Args(num_envs=1, estimator="total_return", norm_returns=False)
    reinforce.Args(num_envs=2, estimator="total_return")
    for estimator in ESTIMATORS[1:]:
        reinforce.Args(num_envs=1, estimator=estimator)


def test_command_line(capsys):
    words = "--estimator q_value --no-norm-returns --discount-states --num-envs 3"
    args = reinforce.parse_args(words.split())
    given = args.estimator, args.norm_returns, args.discount_states, args.num_envs
    assert given == ("q_value", False, True, 3)
    for words in ("--estimator guess", "--num-envs 1 --estimator total_return", "--no-such-flag"):
        with pytest.raises(SystemExit) as stopped:
            reinforce.parse_args(words.split())
        printed = capsys.readouterr().err + str(stopped.value.code)
        assert stopped.value.code not in (0, None)
        assert words.split()[0][2:].replace("-", "_") in printed.replace("-", "_")
    assert {*reinforce.MAY_CHANGE} < {field.name for field in dataclasses.fields(reinforce.Args)}


# -------------------------------------------------------------------------------------------- short runs

TINY = {"env_id": "CartPole-v1", "num_envs": 4, "critic_epochs": 2, "total_timesteps": 400}
TINY |= {"checkpoint_interval": 100, "eval_interval": 200, "eval_episodes": 1}


def train(folder: Path, **changes) -> Path:
    return reinforce.main(reinforce.Args(**TINY | {"runs": str(folder)} | changes))


def assert_same_run(run: Path, reference: Path) -> None:
    for name in ("checkpoint.pt", "best.pt"):
        states = [reinforce.load_checkpoint(x / name) for x in (run, reference)]
        assert checkpoint_difference(*states) is None
    assert read_curves(run) == read_curves(reference)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory) -> Path:
    """A run that nobody changes."""
    return train(tmp_path_factory.mktemp("runs"))


def test_what_is_logged(finished_run):
    curves, checkpoint = read_curves(finished_run), reinforce.load_checkpoint(finished_run)
    names = "value_loss entropy grad_norm gradient_variance explained_variance".split()
    tags = {f"losses/{name}" for name in names} | {"charts/learning_rate"}
    tags |= {"charts/episodic_return", "charts/episodic_length"}
    evaluations = {"eval/episodic_return", "eval/episodic_return_std"}
    assert curves.keys() == tags | evaluations
    steps = [*curves["losses/grad_norm"]]
    assert all([*curves[tag]] == steps for tag in tags) and steps[-2] < 400 <= steps[-1] == checkpoint["step"]
    crossed = [b for a, b in zip([0, *steps], steps) if b // 200 > a // 200 or b == steps[-1]]
    assert all([*curves[tag]] == [0, *crossed] for tag in evaluations)
    assert all(math.isfinite(x) for curve in curves.values() for x in curve.values())
    expected = [3e-3 * (1 - step / 400) for step in [0, *steps[:-1]]]
    np.testing.assert_allclose([*curves["charts/learning_rate"].values()], expected, rtol=1e-6)
    # The first batch: 4 episodes, as long as their returns are high; the policy is near uniform.
    assert curves["charts/episodic_length"][steps[0]] == steps[0] / 4
    assert curves["charts/episodic_return"] == curves["charts/episodic_length"]
    assert curves["losses/entropy"][steps[0]] == pytest.approx(math.log(2), abs=0.02)
    best = max(curves["eval/episodic_return"][step] for step in crossed)
    assert reinforce.load_checkpoint(finished_run / "best.pt")["best_return"] == pytest.approx(best, rel=1e-6)


def test_equal_seeds_give_equal_runs_and_others_do_not(finished_run, tmp_path):
    assert_same_run(train(tmp_path / "again"), finished_run)
    other = read_curves(train(tmp_path / "other", seed=2))
    assert other["charts/episodic_return"] != read_curves(finished_run)["charts/episodic_return"]


def test_checkpoints_and_evaluations_do_not_touch_the_training(finished_run, tmp_path):
    for number, changes in enumerate(({"eval_interval": 0}, {"eval_interval": 1, "checkpoint_interval": 1})):
        run = train(tmp_path / str(number), **changes)
        states = [reinforce.load_checkpoint(x) for x in (finished_run, run)]
        assert checkpoint_difference(*states, ignore=("args", "best_return")) is None


def test_killed_run_equals_an_uninterrupted_one(tmp_path, capsys):
    """Killed without notice past some checkpoints, then resumed."""
    settings = TINY | {"total_timesteps": 5000, "checkpoint_interval": 150, "eval_interval": 100}
    reference = train(tmp_path / "reference", **settings)
    process = start(SCRIPT, *flags(**settings, runs=tmp_path / "killed"), cwd=tmp_path)
    kill_when(process, nth_evaluation(6), delay=0.03)
    (run,) = (tmp_path / "killed").iterdir()
    assert 0 < reinforce.load_checkpoint(run)["step"] < 5000
    reinforce.main(reinforce.parse_args(["--resume", str(run)]))
    assert "Resumed at step" in capsys.readouterr().out
    assert_same_run(run, reference)


def test_interrupted_run_of_an_environment_whose_state_cannot_be_read(tmp_path, monkeypatch):
    """The episodes have seeds of their own, so that nothing of the environment is missed."""
    settings = {"env_id": "stub_environments:Stub/Opaque-v0", "total_timesteps": 150, "eval_interval": 1}
    settings |= {"checkpoint_interval": 40}
    reference = train(tmp_path / "reference", **settings)
    collect, calls = reinforce.collect_episodes, iter(range(5))

    def interrupted(*inputs):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return collect(*inputs)

    monkeypatch.setattr(reinforce, "collect_episodes", interrupted)
    message = refusal(train, tmp_path / "interrupted", **settings)
    monkeypatch.undo()
    (run,) = (tmp_path / "interrupted").iterdir()
    assert f"--resume {run}" in message and "reinforce.py" in message
    assert 0 < reinforce.load_checkpoint(run)["step"] < 150
    words = ["--resume", str(run)]
    assert f"--env-id {settings['env_id']}" in refusal(reinforce.parse_args, words)
    reinforce.main(reinforce.parse_args([*words, "--env-id", settings["env_id"]]))
    assert_same_run(run, reference)


def test_terminated_run_goes_on_by_the_same_command(tmp_path):
    """SIGTERM, as before a requeue; the second start ends as a run that nobody disturbed."""
    settings = TINY | {"total_timesteps": 5000, "checkpoint_interval": 10**9, "eval_interval": 100}
    reference = train(tmp_path / "reference", **settings)
    words = flags(**settings, runs=tmp_path / "runs", run_name="job-7")
    process = start(SCRIPT, *words, cwd=tmp_path)
    for line in process.stdout:
        if "evaluation" in line and "step         0" not in line:
            process.send_signal(signal.SIGTERM)
            break
    output, run = process.communicate(timeout=100)[0], tmp_path / "runs" / "job-7"
    assert process.returncode == 1 and f"--resume {run}" in output
    assert 0 < reinforce.load_checkpoint(run)["step"] < 5000
    reinforce.main(reinforce.parse_args(words))
    assert_same_run(run, reference)


def test_finished_run_goes_on_with_more_steps(tmp_path):
    """With a constant learning rate, which knows nothing of the end, it is the longer run from the start."""
    constant = {"anneal_lr": False, "eval_interval": 0}
    longer = train(tmp_path / "longer", **constant, total_timesteps=1500)
    run = train(tmp_path / "short", **constant)
    assert reinforce.load_checkpoint(run)["step"] < 1400
    reinforce.main(reinforce.parse_args(["--resume", str(run), "--total-timesteps", "1500"]))
    states = [reinforce.load_checkpoint(x) for x in (run, longer)]
    assert checkpoint_difference(*states) is None and read_curves(run) == read_curves(longer)
    assert json.loads((run / "args.json").read_text())["total_timesteps"] == 1500


def test_resume_keeps_to_the_arguments_of_the_run(finished_run):
    message = refusal(reinforce.parse_args, ["--resume", str(finished_run), "--estimator", "baseline"])
    assert "cannot change estimator from advantage to baseline" in message
    args = reinforce.parse_args(["--resume", str(finished_run), "--total-timesteps", "9999"])
    changes = {"runs": str(finished_run.parent), "resume": str(finished_run), "total_timesteps": 9999}
    assert args == reinforce.Args(**TINY | changes)


@pytest.mark.parametrize("norm_returns", [True, False])
def test_updates_after_single_episodes(norm_returns, tmp_path):
    estimator = "reward_to_go" if norm_returns else "total_return"
    changes = {"num_envs": 1, "norm_returns": norm_returns, "estimator": estimator, "eval_interval": 0}
    run = train(tmp_path, **changes, total_timesteps=60)
    curves = read_curves(run)
    assert "losses/gradient_variance" not in curves and len(curves["losses/grad_norm"]) >= 2
    assert all(x > 0 for x in curves["losses/grad_norm"].values())
    assert all(math.isfinite(x) for curve in curves.values() for x in curve.values())


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_every_estimator_trains(env_id, estimator, tmp_path, monkeypatch):
    recorder = Recorder(monkeypatch)
    changes = {"env_id": env_id, "estimator": estimator, "num_envs": 2, "eval_interval": 0}
    limits = {"max_episode_steps": 40, "total_timesteps": 81} if "Pendulum" in env_id else {}
    run = train(tmp_path, **changes, **{"total_timesteps": 21} | limits)
    curves = read_curves(run)
    assert all(math.isfinite(x) for curve in curves.values() for x in curve.values())
    assert all(x > 0 for tag in ("grad_norm", "gradient_variance") for x in curves[f"losses/{tag}"].values())
    if "Pendulum" in env_id:
        assert [*curves["losses/grad_norm"]] == [80, 160]
        assert {*curves["charts/episodic_length"].values()} == {40}
    before, after = recorder.iterations[0][0], reinforce.Agent.load(run).state_dict()
    for name in before:
        fixed = "statistics" in name or "action" in name
        assert fixed or not torch.equal(before[name], after[name])


def test_evaluate_prints_mean_and_std_of_the_loaded_agent(finished_run, capsys):
    words = ["--evaluate", str(finished_run / "best.pt"), "--eval-episodes", "3", "--seed", "9"]
    reinforce.main(reinforce.parse_args(words))
    agent, seed = reinforce.Agent.load(finished_run / "best.pt"), 9 + reinforce.EVALUATION_SEED
    returns = reinforce.evaluate(agent, "CartPole-v1", 3, seed)
    expected = f"CartPole-v1: {np.mean(returns):.1f} +- {np.std(returns):.1f} over 3 episodes"
    assert expected in capsys.readouterr().out
    last = [*read_curves(finished_run)["eval/episodic_return"].values()][-1]
    agent, seed = reinforce.Agent.load(finished_run), 1 + reinforce.EVALUATION_SEED
    assert reinforce.evaluate(agent, "CartPole-v1", 1, seed).tolist() == [last]


@pytest.mark.parametrize("env_id", ["Reinforce/Box-v0", "Reinforce/Discrete-v0"])
def test_evaluation_plays_the_likeliest_actions_and_changes_nothing(env_id):
    env = reinforce.make_env(env_id)
    agent = make_agent(env.action_space)
    before, generator = copy.deepcopy(agent.state_dict()), torch.get_rng_state()
    LOG.clear()
    returns = reinforce.evaluate(agent, env_id, episodes=3, seed=9)
    episodes, policy = logged_episodes(), reinforce.FrozenPolicy(agent)
    assert [*episodes] == [9, 10, 11]
    assert [sum(step[2] for step in steps) for steps in episodes.values()] == returns.tolist()
    for observation, action, *_ in itertools.chain(*episodes.values()):
        expected = policy.to_environment(policy.mode(observation[None]))[0]
        assert np.array_equal(action, expected)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(x, before[name]) for name, x in agent.state_dict().items())


def test_checkpoint_of_another_script_is_refused(tmp_path):
    state = {"agent": reinforce.Agent(3, BOX).state_dict(), "args": {}}
    ppo_continuous.save_checkpoint(tmp_path / "checkpoint.pt", state)
    (tmp_path / "args.json").write_text(json.dumps(dataclasses.asdict(reinforce.Args(**TINY))))
    for words in (["--resume", str(tmp_path)], ["--evaluate", str(tmp_path)]):
        message = refusal(lambda words=words: reinforce.main(reinforce.parse_args(words)))
        assert str(tmp_path / "checkpoint.pt") in message and "reinforce.py" in message
    (tmp_path / "args.json").write_text(json.dumps(dataclasses.asdict(ppo_continuous.Args())))
    message = refusal(reinforce.parse_args, ["--resume", str(tmp_path)])
    assert "args.json" in message and "clip_coef" in message and "estimator" in message


def test_rewards_that_are_not_finite_end_the_run(tmp_path):
    """From the 41st step of each environment on, in one of its later episodes."""
    changes = {"env_id": "stub_environments:Stub/Poisoned-v0", "eval_interval": 0, "checkpoint_interval": 1}
    message = refusal(train, tmp_path, **changes)
    assert "is nan at step" in message and "rewards" in message and str(tmp_path) in message
    (run,) = tmp_path.iterdir()
    checkpoint = reinforce.load_checkpoint(run)
    assert f"{checkpoint['step']:,}" not in message and checkpoint["step"] >= 40
    assert all(tensor.isfinite().all() for tensor in checkpoint["agent"].values())
    assert checkpoint["step"] == max(read_curves(run)["losses/grad_norm"])


def test_it_learns(tmp_path):
    """The mean return of the last 100 episodes, noise and all, is above 110 with seeds 1 to 5."""
    settings = {"total_timesteps": 20_000, "learning_rate": 1e-2, "anneal_lr": False, "eval_interval": 0}
    curves = read_curves(train(tmp_path, **settings, critic_epochs=5, checkpoint_interval=10**9))
    curve = curves["charts/episodic_return"]
    assert random_return("CartPole-v1", 20) < 30 and [*curve.values()][4] < 50
    assert [*curve.values()][-1] > 80
