"""The numerics of ppo_continuous.py against plain definitions, NumPy, SciPy, PyTorch, other projects."""

import json
import math
import random
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import stub_environments
import torch
import torch.nn as nn
from helpers import read_curves
from scipy.stats import norm
from torch.distributions import Independent, Normal, kl_divergence

import ppo_continuous as ppo

GOLDENS = Path(__file__).parent / "goldens"
EPS = torch.finfo(torch.float64).eps


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# ------------------------------------------------------------------------------------------- advantages


def plain_sum(x: np.ndarray, decay: np.ndarray) -> np.ndarray:
    y = np.zeros_like(x)
    for t in reversed(range(len(x))):
        y[t] = x[t] + (decay[t] * y[t + 1] if t + 1 < len(x) else 0)
    return y


def plain_gae(rewards, values, next_values, terminated, done, gamma, gae_lambda) -> np.ndarray:
    """The definition, one environment and one step at a time."""
    T, N = rewards.shape
    advantages = np.zeros((T, N))
    for n in range(N):
        for t in range(T):
            weight = 1.0
            for k in range(t, T):  # the sum of (gamma lambda)^l delta[t + l] up to the end of the episode
                bootstrap = 0.0 if terminated[k, n] else gamma * next_values[k, n]
                advantages[t, n] += weight * (rewards[k, n] + bootstrap - values[k, n])
                weight *= gamma * gae_lambda
                if done[k, n]:
                    break
    return advantages


def make_batch(T: int, N: int, seed: int) -> tuple[torch.Tensor, ...]:
    """Rewards, values, next values, terminated, done in float64; episodes end in both ways."""
    generator = np.random.default_rng(seed)
    rewards, values, next_values = torch.from_numpy(generator.normal(size=(3, T, N)))
    terminated, truncated = torch.from_numpy(generator.random((2, T, N)) < 0.15)
    return rewards, values, next_values, terminated, terminated | truncated


@pytest.mark.parametrize("T", [1, 2, 3, 7, 8, 9, 64, 100])
def test_discounted_sum_is_the_recursion(T):
    generator = np.random.default_rng(T)
    x, decay = generator.normal(size=(T, 3)), generator.random((T, 3)) * (generator.random((T, 3)) > 0.2)
    y = ppo.discounted_sum(torch.from_numpy(x), torch.from_numpy(decay))
    np.testing.assert_allclose(y, plain_sum(x, decay), rtol=0, atol=1e-12)


@pytest.mark.parametrize("T", [1, 5, 16, 33])
@pytest.mark.parametrize("gae_lambda", [0.0, 0.9, 1.0])
def test_gae_is_the_definition(T, gae_lambda):
    batch = make_batch(T, 4, seed=T)
    advantages, returns = ppo.compute_gae(*batch, 0.97, gae_lambda)
    np.testing.assert_allclose(advantages, plain_gae(*batch, 0.97, gae_lambda), rtol=0, atol=1e-12)
    assert torch.equal(returns, advantages + batch[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gae_takes_masks_of_bool_and_float(dtype):
    *numbers, terminated, done = make_batch(16, 4, seed=1)
    numbers = [x.to(dtype) for x in numbers]
    as_bool, _ = ppo.compute_gae(*numbers, terminated, done, 0.97, 0.9)
    as_float, _ = ppo.compute_gae(*numbers, terminated.to(dtype), done.to(dtype), 0.97, 0.9)
    assert as_bool.dtype == dtype and torch.equal(as_bool, as_float)


def test_lambda_0_is_the_residual():
    rewards, values, next_values, terminated, done = batch = make_batch(16, 4, seed=2)
    advantages, _ = ppo.compute_gae(*batch, 0.97, 0.0)
    expected = torch.where(terminated, rewards, rewards + 0.97 * next_values) - values
    torch.testing.assert_close(advantages, expected, rtol=0, atol=8 * EPS)


def test_lambda_1_is_the_discounted_return_less_the_value():
    """Inside an episode next_values[t] = values[t + 1], so that all values but the first and last cancel."""
    rewards, values, last = torch.randn(6, 1).double(), torch.randn(6, 1).double(), torch.randn(1, 1).double()
    going_on, ended = torch.zeros(6, 1), torch.tensor([0.0] * 5 + [1.0])[:, None]
    powers = 0.9 ** torch.arange(7.0, dtype=torch.float64)
    next_values = torch.cat((values[1:], last))
    for terminated, done, tail in ((going_on, going_on, 1), (going_on, ended, 1), (ended, ended, 0)):
        advantages, returns = ppo.compute_gae(rewards, values, next_values, terminated, done, 0.9, 1.0)
        for t in range(6):
            expected = (powers[: 6 - t] * rewards[t:, 0]).sum() + tail * powers[6 - t] * last[0, 0]
            assert returns[t, 0].item() == pytest.approx(expected.item(), abs=1e-12)
            assert advantages[t, 0].item() == pytest.approx((expected - values[t, 0]).item(), abs=1e-12)


def test_termination_stops_the_bootstrap_and_truncation_does_not():
    """Two environments alike but for how the episode ends in row 1; row 2 is the next episode."""
    rewards, values, next_values = torch.ones(3, 2), torch.zeros(3, 2), torch.full((3, 2), 10.0)
    terminated, done = torch.zeros(3, 2), torch.zeros(3, 2)
    terminated[1, 0], done[1] = 1, 1
    advantages, _ = ppo.compute_gae(rewards, values, next_values, terminated, done, 0.5, 1.0)
    assert advantages[:, 0].tolist() == [6 + 0.5 * 1, 1, 6]
    assert advantages[:, 1].tolist() == [6 + 0.5 * 6, 6, 6]


def golden_batch() -> dict[str, np.ndarray]:
    """A batch as a rollout makes it, in sixteenths, which float32 and JSON hold exactly."""
    generator = np.random.default_rng(7)
    rewards, values, finals = np.round(generator.normal(size=(3, 14, 5)) * 16) / 16
    terminated, truncated = generator.random((2, 14, 5)) < 0.15
    terminated[0, 0] = truncated[0, 1] = terminated[-1, 2] = truncated[-1, 3] = True
    truncated &= ~terminated
    following = np.concatenate((values[1:], finals[-1:]))
    next_values = np.where(terminated | truncated, finals, following)
    batch = {"rewards": rewards, "values": values, "next_values": next_values}
    return batch | {"terminated": terminated, "truncated": truncated}


def sb3_advantages(batch: dict[str, np.ndarray], gamma: float, gae_lambda: float) -> np.ndarray:
    """By Stable-Baselines3, whose algorithms add the discounted final value to the reward of a truncation."""
    buffers = pytest.importorskip("stable_baselines3.common.buffers")
    T, N = batch["rewards"].shape
    box = gym.spaces.Box(-1, 1, (1,))
    buffer = buffers.RolloutBuffer(T, box, box, "cpu", gae_lambda, gamma, N)
    done = batch["terminated"] | batch["truncated"]
    buffer.rewards[:] = batch["rewards"] + gamma * batch["next_values"] * batch["truncated"]
    buffer.values[:] = batch["values"]
    buffer.episode_starts[1:] = done[:-1]
    last_values = torch.from_numpy(batch["next_values"][-1]).float()
    buffer.compute_returns_and_advantage(last_values, done[-1].astype(np.float32))
    return buffer.advantages


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(0.99, 0.95), (0.9, 0.5), (1.0, 1.0)])
def test_gae_equals_stable_baselines3(gamma, gae_lambda):
    batch = golden_batch()
    numbers = [torch.from_numpy(batch[name]).float() for name in ("rewards", "values", "next_values")]
    terminated, truncated = torch.from_numpy(batch["terminated"]), torch.from_numpy(batch["truncated"])
    ours, _ = ppo.compute_gae(*numbers, terminated, terminated | truncated, gamma, gae_lambda)
    np.testing.assert_allclose(ours, sb3_advantages(batch, gamma, gae_lambda), rtol=0, atol=1e-5)


def test_gae_equals_the_golden_numbers_of_stable_baselines3():
    """The same without Stable-Baselines3 installed; the file is made by running this one as a program."""
    golden = json.loads((GOLDENS / "gae_stable_baselines3.json").read_text())
    numbers = [torch.tensor(golden["batch"][name]) for name in ("rewards", "values", "next_values")]
    terminated, truncated = (torch.tensor(golden["batch"][name]) for name in ("terminated", "truncated"))
    ours, _ = ppo.compute_gae(*numbers, terminated, terminated | truncated, 0.99, 0.95)
    np.testing.assert_allclose(ours, golden["advantages"], rtol=0, atol=1e-5)


# ----------------------------------------------------------------------------------- densities and losses


def random_policies(B: int = 6, A: int = 3) -> tuple[torch.Tensor, ...]:
    """Actions, old means, old log_std, means, log_std, advantages; float64."""
    shapes = (B, A), (B, A), (A,), (B, A), (A,), (B,)
    return tuple(torch.randn(shape, dtype=torch.float64) * 0.5 for shape in shapes)


def test_log_prob_is_the_normal_density():
    actions, means, log_std, *_ = random_policies()
    ours = ppo.gaussian_log_prob(actions, means, log_std)
    torch.testing.assert_close(ours, Independent(Normal(means, log_std.exp()), 1).log_prob(actions))
    by_scipy = norm(means.numpy(), log_std.exp().numpy()).logpdf(actions.numpy()).sum(-1)
    np.testing.assert_allclose(ours, by_scipy, rtol=1e-12)


def test_kl_is_that_of_old_to_new():
    _, old_means, old_log_std, means, log_std, _ = random_policies()
    old, new = (Independent(Normal(m, s.exp()), 1) for m, s in ((old_means, old_log_std), (means, log_std)))
    ours = ppo.gaussian_kl(old_means, old_log_std, means, log_std)
    torch.testing.assert_close(ours, kl_divergence(old, new))
    assert not torch.allclose(ours, kl_divergence(new, old), rtol=0.01)  # the direction matters here
    assert torch.equal(ppo.gaussian_kl(means, log_std, means, log_std), torch.zeros(6).double())


def test_gradients_of_the_densities():
    actions, old_means, old_log_std, means, log_std, _ = (x.requires_grad_() for x in random_policies())
    assert torch.autograd.gradcheck(ppo.gaussian_log_prob, (actions, means, log_std))
    assert torch.autograd.gradcheck(ppo.gaussian_kl, (old_means, old_log_std, means, log_std))


def plain_surrogate(log_probs, old_log_probs, advantages, kl, surrogate, clip_coef, kl_coef) -> float:
    """Schulman et al. 2017, equations 6 to 8, sample by sample; maximised, so the loss is the negative."""
    objectives = []
    for new, old, advantage, divergence in zip(log_probs, old_log_probs, advantages, kl):
        ratio = math.exp(new - old)
        if surrogate == "clip":
            clipped = min(max(ratio, 1 - clip_coef), 1 + clip_coef)
            objectives.append(min(ratio * advantage, clipped * advantage))
        elif surrogate == "none":
            objectives.append(ratio * advantage)
        else:
            objectives.append(ratio * advantage - kl_coef * divergence)
    return -sum(objectives) / len(objectives)


SURROGATES = ("clip", "kl-fixed", "kl-adaptive", "none")


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_surrogate_loss_and_its_gradient(surrogate):
    log_probs, old_log_probs, advantages, kl = torch.randn(4, 32, dtype=torch.float64) * 0.5
    kl, log_probs = kl.square(), log_probs.requires_grad_()
    for kl_coef in (0.7, torch.tensor(0.7, dtype=torch.float64)):
        ours = ppo.surrogate_loss(log_probs, old_log_probs, advantages, kl, surrogate, 0.2, kl_coef)
        plain = [x.detach().tolist() for x in (log_probs, old_log_probs, advantages, kl)]
        assert ours.shape == () and ours.dtype == torch.float64
        assert ours.item() == pytest.approx(plain_surrogate(*plain, surrogate, 0.2, 0.7), abs=1e-12)
    rest = old_log_probs, advantages, kl.requires_grad_(), surrogate, 0.2, 0.7
    assert torch.autograd.gradcheck(ppo.surrogate_loss, (log_probs, *rest))


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_loss_falls_as_good_actions_become_likelier(surrogate):
    log_probs, zeros = torch.zeros(2, requires_grad=True), torch.zeros(2)
    ppo.surrogate_loss(log_probs, zeros, torch.tensor([1.0, -1.0]), zeros, surrogate, 0.2, 1.0).backward()
    assert log_probs.grad.tolist() == [-0.5, 0.5]


@pytest.mark.parametrize("surrogate", ["kl-fixed", "kl-adaptive"])
def test_loss_rises_with_the_divergence(surrogate):
    kl, zeros = torch.zeros(2, requires_grad=True), torch.zeros(2)
    ppo.surrogate_loss(zeros, zeros, zeros, kl, surrogate, 0.2, 3.0).backward()
    assert kl.grad.tolist() == [1.5, 1.5]


@pytest.mark.parametrize(
    ("ratio", "advantage", "has_gradient"),
    [(1.3, 1, False), (1.3, -1, True), (0.7, 1, True), (0.7, -1, False), (1.1, 1, True), (0.9, -1, True)],
)
def test_clip_ends_the_gradient_where_nothing_is_to_be_gained(ratio, advantage, has_gradient):
    """Paper's figure 1: past the range in the direction of the advantage, and only there."""
    log_probs = torch.tensor([math.log(ratio)], requires_grad=True)
    zeros = torch.zeros(1)
    loss = ppo.surrogate_loss(log_probs, zeros, torch.tensor([1.0 * advantage]), zeros, "clip", 0.2, 0.0)
    loss.backward()
    assert log_probs.grad.item() == pytest.approx(-ratio * advantage if has_gradient else 0, abs=1e-6)


# ------------------------------------------------------------------------------------------- statistics


def test_running_statistics_over_uneven_batches():
    generator = np.random.default_rng(0)
    # Far from zero and of unequal spread, where a sum of squares would lose its digits.
    batches = [
        generator.normal([5, -300], [0.1, 20], (n, 2)) + i for i, n in enumerate((1, 7, 2048, 3, 500, 64))
    ]
    statistics = ppo.RunningStatistics((2,))
    for i, batch in enumerate(batches):
        statistics.update(batch)
        history = np.concatenate(batches[: i + 1])
        assert statistics.count.item() == len(history)
        np.testing.assert_allclose(statistics.mean, history.mean(0), rtol=1e-6)
        np.testing.assert_allclose(statistics.variance, history.var(0), rtol=2e-5)


def test_running_statistics_of_scalars():
    statistics, rows = ppo.RunningStatistics(()), np.array([1.0, 2.0, 6.0], np.float32)
    statistics.update(rows[:2])
    statistics.update(rows[2:])
    assert statistics.mean.item() == pytest.approx(3) and statistics.variance.item() == pytest.approx(14 / 3)
    assert all(x.shape == () and x.dtype == torch.float32 for x in statistics.buffers())


def plain_reward_scaling(rewards: np.ndarray, done: np.ndarray, gamma: float, state: dict) -> np.ndarray:
    """One step at a time; `state` carries the running returns and every return that was seen."""
    for r, d in zip(rewards, done):
        state["running"] = gamma * state["running"] + r
        state["seen"].extend(state["running"])
        state["running"] = np.where(d, 0, state["running"])
    return np.clip(rewards / np.sqrt(np.var(state["seen"]) + 1e-8), -10, 10)


def test_reward_scaling_over_several_rollouts():
    """Episodes end in the first row, in the last, in both, in all rows and in none."""
    generator = np.random.default_rng(3)
    statistics, running = ppo.RunningStatistics(()), torch.zeros(5)
    state = {"running": np.zeros(5), "seen": []}
    for _ in range(4):
        rewards, done = generator.normal(1, 2, (9, 5)), generator.random((9, 5)) < 0.2
        done[0, :3], done[-1, :3] = (True, False, True), (False, True, True)
        done[:, 3], done[:, 4] = True, False
        inputs = torch.from_numpy(rewards).float(), torch.from_numpy(done), running
        ours = ppo.scale_rewards(*inputs, 0.95, statistics)
        np.testing.assert_allclose(ours, plain_reward_scaling(rewards, done, 0.95, state), rtol=2e-5)
        np.testing.assert_allclose(running, state["running"], rtol=2e-5, atol=1e-6)
    assert statistics.count.item() == 4 * 9 * 5


def test_scaled_rewards_are_clipped():
    rewards = torch.full((1000, 1), 0.01)
    rewards[500:502, 0] = torch.tensor([1.0, -1.0])
    scaled = ppo.scale_rewards(rewards, torch.ones(1000, 1), torch.zeros(1), 0.99, ppo.RunningStatistics(()))
    assert (scaled.max().item(), scaled.min().item()) == (10, -10)
    assert 0 < scaled[0].item() < 1  # the mean stays


# ------------------------------------------------------------------------------------ agent and its policy


def make_agent(
    observation_size: int = 3, low: float = -1.0, high: float = 1.0, actions: int = 2
) -> ppo.Agent:
    """With weights, log_std and statistics away from where they start."""
    bounds = np.full(actions, low, np.float32), np.full(actions, high, np.float32)
    agent = ppo.Agent(observation_size, *bounds, log_std=-0.5)
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    agent.observation_statistics.update(np.random.default_rng(0).normal(2, 5, (100, observation_size)))
    return agent


def test_initial_weights():
    """Orthogonal of gain sqrt(2); 0.01 for the actions, so that the first ones are noise, and 1 for V."""
    agent = ppo.Agent(5, np.full(2, -1.0), np.full(2, 1.0), log_std=-0.7)
    for network, width, gain in ((agent.actor, 64, 0.01), (agent.critic, 128, 1.0)):
        linear = [layer for layer in network if isinstance(layer, nn.Linear)]
        assert [layer.out_features for layer in linear[:2]] == [width, width]
        for layer, expected in zip(linear, (math.sqrt(2), math.sqrt(2), gain)):
            gains = torch.linalg.svdvals(layer.weight)
            torch.testing.assert_close(gains, torch.full_like(gains, expected), rtol=1e-5, atol=1e-7)
            assert not layer.bias.any()
    assert torch.equal(agent.log_std, torch.full((2,), -0.7))
    assert not {*agent.actor.parameters()} & {*agent.critic.parameters()}


ACTORS = {
    "as it is": None,
    "relu and layer norm": lambda: nn.Sequential(
        nn.Linear(3, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 2)
    ),
    "one layer": lambda: nn.Linear(3, 2),
    "without bias": lambda: nn.Sequential(
        nn.Linear(3, 8, bias=False), nn.Tanh(), nn.Linear(8, 2, bias=False)
    ),
}


@pytest.mark.parametrize("actor", ACTORS)
def test_frozen_policy_is_the_actor(actor):
    agent = make_agent()
    if ACTORS[actor]:
        agent.actor = ACTORS[actor]()
    observations = np.random.default_rng(1).normal(2, 5, (7, 3))
    statistics = agent.observation_statistics
    normalized = (torch.from_numpy(observations) - statistics.mean) / (
        statistics.variance.double() + 1e-8
    ).sqrt()
    expected = agent.actor(normalized.clamp(-10, 10).float()).detach()
    np.testing.assert_allclose(ppo.FrozenPolicy(agent).mean_action(observations), expected, rtol=0, atol=2e-6)


def test_frozen_policy_is_that_of_its_moment():
    agent, observations = make_agent(), np.ones((1, 3))
    policy = ppo.FrozenPolicy(agent)
    before, std = policy.mean_action(observations), policy.std.copy()
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter += 1
    agent.observation_statistics.update(np.full((500, 3), 40.0))
    assert np.array_equal(policy.mean_action(observations), before) and np.array_equal(policy.std, std)


def test_normalized_observations_are_clipped():
    agent = ppo.Agent(2, -np.ones(1), np.ones(1))
    agent.observation_statistics.update(np.array([[0.0, 5.0], [2.0, 5.0]]))
    normalized = ppo.FrozenPolicy(agent).normalize(np.array([[2.0, 5.0], [100.0, 5.1], [-100.0, 4.9]]))
    # The second number never varied, so anything else is as far out as the clip allows.
    np.testing.assert_allclose(normalized, [[1, 0], [10, 10], [-10, -10]], rtol=1e-6)
    assert normalized.dtype == np.float32


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("low", "high", "raw", "expected"),
    [
        (-2.0, 6.0, [-1, 0, 0.5, 1, 1.5, -9], [-2, 2, 4, 6, 6, -2]),
        (-1.0, 1.0, [-1, 0.25, 2], [-1, 0.25, 1]),
        (-np.inf, np.inf, [-50, 0.25, 50], [-50, 0.25, 50]),
        (0.0, np.inf, [-1, 0.25, 50], [0, 0.25, 50]),
        (-np.inf, 3.0, [-50, 0.25, 50], [-50, 0.25, 3]),
    ],
)
def test_raw_actions_cover_the_range_of_the_environment(low, high, raw, expected):
    agent = ppo.Agent(1, np.array([low], np.float32), np.array([high], np.float32))
    actions = ppo.FrozenPolicy(agent).to_environment(np.array(raw, np.float32)[:, None])
    np.testing.assert_allclose(actions[:, 0], expected, rtol=1e-6)
    assert actions.dtype == np.float32


def test_evaluation_changes_nothing():
    agent = make_agent(observation_size=11, actions=3)
    agent.return_statistics.update(np.arange(5.0))
    before = {name: tensor.clone() for name, tensor in agent.state_dict().items()}
    random.seed(1)
    np.random.seed(1)

    def generators() -> tuple:
        _, keys, position, *_ = np.random.get_state()
        return random.getstate(), keys.tolist(), position, torch.get_rng_state().tolist()

    states = generators()
    returns = ppo.evaluate(agent, "Hopper-v5", episodes=3, seed=5)
    policy = ppo.FrozenPolicy(agent)
    policy.to_environment(policy.mean_action(np.ones((2, 11))))
    assert generators() == states
    assert all(torch.equal(tensor, before[name]) for name, tensor in agent.state_dict().items())
    assert np.array_equal(returns, ppo.evaluate(agent, "Hopper-v5", episodes=3, seed=5))
    assert len({*returns}) == 3  # each episode starts from a seed of its own
    assert returns[1] == ppo.evaluate(agent, "Hopper-v5", episodes=1, seed=6)[0]


def test_evaluation_plays_the_mean_action_and_adds_up_the_rewards():
    stub_environments.LOG.clear()
    agent = make_agent(low=-2.0, high=6.0)
    returns = ppo.evaluate(agent, "Stub/Coded-v0", episodes=2, seed=4)
    policy = ppo.FrozenPolicy(agent)
    assert [sum(step[3] for step in stub_environments.LOG if step[0] == seed) for seed in (4, 5)] == [
        *returns
    ]
    for _, observation, action, *_ in stub_environments.LOG:
        expected = policy.to_environment(policy.mean_action(observation[None]))[0]
        assert np.array_equal(action, expected)


# ---------------------------------------------------------------------------------------------- update


def test_adam_is_that_of_pytorch():
    ours = [nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(()))]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    optimizer = ppo.Adam(ours, 1e-2)
    reference = torch.optim.Adam(theirs, 1e-2)
    for step in range(50):
        # Those of the second parameter are as small as eps, so that its size and its place show.
        gradients = [torch.randn_like(p) * scale for p, scale in zip(ours, (1.0, 1e-5))]
        optimizer.learning_rate.fill_(1e-2 * (1 - step / 50))
        reference.param_groups[0]["lr"] = 1e-2 * (1 - step / 50)
        optimizer.step(gradients)
        for p, gradient in zip(theirs, gradients):
            p.grad = gradient
        reference.step()
        for p, q in zip(ours, theirs):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert optimizer.steps.item() == 50


def make_batch_of(agent: ppo.Agent, B: int = 64) -> ppo.Batch:
    """What an iteration gives to the update; the old policy lies beside that of the agent."""
    dtype = agent.log_std.dtype
    observations = torch.randn(B, 3, dtype=dtype)
    old_means = agent.actor(observations).detach() + 0.1 * torch.randn(B, 2, dtype=dtype)
    old_log_std = agent.log_std.detach() + 0.05
    actions = old_means + old_log_std.exp() * torch.randn(B, 2, dtype=dtype)
    old_log_probs = Independent(Normal(old_means, old_log_std.exp()), 1).log_prob(actions)
    advantages, returns = torch.randn(2, B, dtype=dtype) * 3 + 1
    return ppo.Batch(observations, actions, old_means, old_log_std, old_log_probs, advantages, returns)


def update_args(**changes) -> ppo.Args:
    return ppo.Args(**{"compile": False, "ent_coef": 0.01, "vf_coef": 0.7} | changes)


def coefficients_of(args: ppo.Args, kl_coef: torch.Tensor) -> dict[str, torch.Tensor]:
    numbers = {"clip": args.clip_coef, "value": args.vf_coef, "entropy": args.ent_coef}
    return {name: torch.tensor(x) for name, x in numbers.items()} | {"kl": kl_coef}


def reference_step(agent, optimizer, args, indices, batch, kl_coef) -> list[float]:
    """One step of PPO as a textbook has it, with torch.distributions and torch.optim."""
    obs, actions, old_means, old_log_std, old_log_probs, advantages, returns = batch
    obs, actions, old_means, old_log_probs, advantages, returns = (
        x[indices] for x in (obs, actions, old_means, old_log_probs, advantages, returns)
    )
    if args.norm_adv:
        advantages = (advantages - advantages.mean()) / (advantages.std(correction=1) + 1e-8)
    old = Independent(Normal(old_means, old_log_std.exp()), 1)
    new = Independent(Normal(agent.actor(obs), agent.log_std.exp()), 1)
    ratio = (new.log_prob(actions) - old_log_probs).exp()
    policy_loss = -(ratio * advantages).mean()
    if args.surrogate == "clip":
        clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
        policy_loss = torch.maximum(-ratio * advantages, -clipped * advantages).mean()
    elif args.surrogate != "none":
        policy_loss = policy_loss + kl_coef * kl_divergence(old, new).mean()
    value_loss = 0.5 * nn.functional.mse_loss(agent.critic(obs)[:, 0], returns)
    entropy = new.entropy().mean()
    optimizer.zero_grad()
    (policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy).backward()
    parameters = [*agent.actor.parameters(), *agent.critic.parameters(), agent.log_std]
    grad_norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
    optimizer.step()
    approx_kl = ((ratio - 1) - ratio.log()).mean()
    clip_fraction = ((ratio < 1 - args.clip_coef) | (ratio > 1 + args.clip_coef)).float().mean()
    return [x.item() for x in (policy_loss, value_loss, entropy, approx_kl, clip_fraction, grad_norm)]


@pytest.mark.parametrize("max_grad_norm", [0.5, 1e3])
@pytest.mark.parametrize("norm_adv", [True, False])
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_update_is_the_textbook_step(surrogate, norm_adv, max_grad_norm):
    args = update_args(surrogate=surrogate, norm_adv=norm_adv, max_grad_norm=max_grad_norm)
    # In float64, so that four steps do not drift apart. What is left is the bias correction of Adam, which
    # stays in float32: 1 - 0.999^step is off by 1e-4 of itself at most, a step of 3e-4 by 2e-8.
    agent, reference = make_agent().double(), make_agent().double()
    reference.load_state_dict(agent.state_dict())
    batch, kl_coef = make_batch_of(agent), torch.tensor(0.6)
    update = ppo.make_update(agent, ppo.Adam(agent.parameters(), args.learning_rate), args)
    optimizer = torch.optim.Adam(reference.parameters(), args.learning_rate)
    norms = []
    for indices in torch.randperm(64).view(4, 16):
        metrics = update(indices, batch, coefficients_of(args, kl_coef))
        expected = reference_step(reference, optimizer, args, indices, batch, kl_coef)
        norms.append(expected[-1])
        torch.testing.assert_close(metrics, torch.tensor(expected).double(), rtol=1e-5, atol=1e-6)
        for p, q in zip(agent.parameters(), reference.parameters()):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-7)
    assert (min(norms) > max_grad_norm) == (max_grad_norm == 0.5)  # both sides of the limit are tried


@torch._dynamo.config.patch(recompile_limit=1)
def test_a_later_run_in_the_process_is_compiled_as_well(capsys):
    """PyTorch counts how often a function was compiled over all runs, and gives up at a limit."""
    for _ in range(3):
        agent, args = make_agent(), update_args(compile=True)
        update = ppo.make_update(agent, ppo.Adam(agent.parameters(), 1e-3), args)
        update(torch.arange(16), make_batch_of(agent), coefficients_of(args, torch.tensor(0.6)))
    assert capsys.readouterr().out.count("Compiling the update") == 3


def test_compiled_update_is_the_eager_one_whatever_is_scheduled(capsys):
    """Learning rate, beta and all coefficients change in every epoch, and the update is compiled once."""
    agents = make_agent(), make_agent()
    agents[1].load_state_dict(agents[0].state_dict())
    batch, kl_coef = make_batch_of(agents[0]), torch.tensor(0.6)
    updates, optimizers = [], []
    for agent, compiled in zip(agents, (True, False)):
        args = update_args(surrogate="kl-adaptive", compile=compiled)
        optimizers.append(ppo.Adam(agent.parameters(), 1e-3))
        updates.append(ppo.make_update(agent, optimizers[-1], args))
    for epoch in range(6):
        kl_coef.fill_(0.6 * 2**epoch)
        changes = {"clip_coef": 0.2 / (1 + epoch), "ent_coef": 0.01 * epoch, "vf_coef": 0.7 + epoch}
        coefficients = coefficients_of(update_args(**changes), kl_coef)
        for optimizer in optimizers:
            optimizer.learning_rate.fill_(1e-3 / (1 + epoch))
        for indices in torch.randperm(64).view(4, 16):
            compiled, eager = (update(indices, batch, coefficients) for update in updates)
            torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)
    for p, q in zip(agents[0].parameters(), agents[1].parameters()):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5)
    states = [optimizer.state_dict() for optimizer in optimizers]
    for name in ("scalars", "first", "second"):
        for p, q in zip(*(state[name] for state in states)):
            torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-6)
    printed = capsys.readouterr().out
    if "does not work here" in printed:
        pytest.skip("no compiler")
    assert printed.count("Compiling the update") == 1 and "again" not in printed


# ---------------------------------------------------------------------------------- rollout and environments


def play(num_envs: int, num_steps: int, rollouts: int):
    """Rollouts in Seeded environments, which write what they see to LOG; the observations after each."""
    stub_environments.LOG.clear()
    envs = ppo.Environments("Stub/Seeded-v0", num_envs)
    policy = ppo.FrozenPolicy(make_agent(low=-2.0, high=6.0))
    batches, following = [], []
    for _ in range(rollouts):
        batches.append(ppo.collect_rollout(envs, policy, num_steps))
        following.append(envs.observations.copy())
    return envs, policy, batches, following


def seen_by(num_envs: int) -> list[list]:
    """The steps of each environment, in the order in which it saw them; all are stepped in turn."""
    return [stub_environments.LOG[i::num_envs] for i in range(num_envs)]


def test_rollout_is_what_the_environments_saw():
    num_envs, num_steps = 3, 11
    _, _, batches, following = play(num_envs, num_steps, rollouts=3)
    batch = ppo.Rollout(*(np.concatenate(arrays) for arrays in zip(*batches)))
    assert batch.actions.shape == (33, num_envs, 2) and batch.observations.shape == (33, num_envs, 3)
    clipped = 0
    for i, steps in enumerate(seen_by(num_envs)):
        assert len(steps) == 33
        for t, (_, before, env_action, reward, after, was_terminated, was_truncated) in enumerate(steps):
            assert np.array_equal(batch.observations[t, i], before)
            assert np.array_equal(batch.next_observations[t, i], after)  # the final one if the episode ended
            assert batch.rewards[t, i] == reward and batch.terminated[t, i] == was_terminated
            assert batch.done[t, i] == (was_terminated or was_truncated)
            # Stored raw, so that it can be scored; played scaled from [-1, 1] to [-2, 6] and clipped.
            expected = np.clip(2 + 4 * batch.actions[t, i], -2, 6)
            np.testing.assert_allclose(env_action, expected, rtol=1e-6)
            clipped += (np.abs(batch.actions[t, i]) > 1).sum()
            # Play goes on from the first observation of the next episode, not from the final one of the last.
            after_that = batch.observations[t + 1, i] if t + 1 < 33 else following[-1][i]
            assert after_that[2] == 0 if batch.done[t, i] else np.array_equal(after_that, after)
    assert clipped > 10 and batch.terminated.any() and (batch.done & ~batch.terminated).any()
    assert np.array_equal(following[0], batch.observations[num_steps])


def test_noise_of_the_rollout_has_the_std_of_the_policy():
    _, policy, batches, _ = play(num_envs=8, num_steps=500, rollouts=1)
    observations, actions = batches[0].observations, batches[0].actions
    noise = (actions - policy.mean_action(observations.reshape(-1, 3)).reshape(actions.shape)) / policy.std
    # 4000 draws per number: standard errors are 0.016 of the mean and 0.011 of the standard deviation.
    np.testing.assert_allclose(noise.mean((0, 1)), 0, atol=0.065)
    np.testing.assert_allclose(noise.std((0, 1)), 1, atol=0.045)
    assert abs(np.corrcoef(noise.reshape(-1, 2).T)[0, 1]) < 0.065


def test_returns_and_lengths_of_episodes():
    envs, *_ = play(num_envs=3, num_steps=7, rollouts=3)
    expected, going_on = [], np.zeros((2, 3))
    for t in range(21):
        for i, steps in enumerate(seen_by(3)):
            going_on[:, i] += steps[t][3], 1
            if steps[t][5] or steps[t][6]:
                expected.append(tuple(going_on[:, i]))
                going_on[:, i] = 0
    assert [*envs.finished] == expected and len(expected) > 6
    assert np.array_equal([envs.returns, envs.lengths], going_on)
    means = dict(zip(("charts/episodic_return", "charts/episodic_length"), np.mean(expected, axis=0)))
    assert envs.statistics() == means
    assert ppo.Environments("Stub/Seeded-v0", 2).statistics() == {}


def test_every_episode_has_a_seed_of_its_own_from_the_generator_of_pytorch():
    torch.manual_seed(3)
    seeds, states = [], []
    for _ in range(2):
        torch.manual_seed(3)
        envs = ppo.Environments("Stub/Seeded-v0", 3)
        seeds.append([*envs.seeds])
        for _ in range(12):
            before = envs.seeds.copy()
            *_, done = envs.step(np.zeros((3, 2), np.float32))
            assert np.array_equal(envs.seeds != before, done)
            seeds[-1] += envs.seeds[done].tolist()
        states.append(torch.get_rng_state())
    assert seeds[0] == seeds[1] and torch.equal(*states)
    assert len({*seeds[0]}) == len(seeds[0]) > 9
    assert all(0 <= seed < ppo.EVALUATION_SEED for seed in seeds[0])  # no episode of an evaluation


def test_time_limits_are_staggered():
    envs = ppo.Environments("HalfCheetah-v5", 4)
    action, ends = np.zeros((4, 6), np.float32), [[], [], [], []]
    for t in range(1, 2001):
        _, _, terminated, done = envs.step(action)
        assert not terminated.any()
        for i in np.flatnonzero(done):
            ends[i].append(t)
    assert ends == [[1000, 2000], [750, 1750], [500, 1500], [250, 1250]]


def test_an_environment_without_a_time_limit_gets_one(monkeypatch):
    monkeypatch.setattr(ppo, "MAX_EPISODE_STEPS", 30)
    envs = ppo.Environments("Stub/Endless-v0", 3)
    ends = [envs.step(np.zeros((3, 1), np.float32))[3].tolist() for _ in range(60)]
    assert [[t + 1 for t in range(60) if ends[t][i]] for i in range(3)] == [[30, 60], [20, 50], [10, 40]]
    returns = ppo.evaluate(make_agent(1, actions=1), "Stub/Endless-v0", episodes=2, seed=0)
    assert returns.tolist() == [30, 30]


def test_actions_of_an_integer_box_are_rounded():
    envs = ppo.Environments("Stub/Levels-v0", 1)
    stub_environments.LOG.clear()
    for action in ([[0.4, 2.6]], [[5.0, 0.0]], [[1.5, 2.5]]):
        envs.step(np.array(action, np.float32))
    played = [step[2] for step in stub_environments.LOG]
    assert [action.tolist() for action in played] == [[0, 3], [5, 0], [2, 2]]
    assert all(action.dtype == np.int64 for action in played)
    agent = ppo.Agent(3, envs.action_space.low, envs.action_space.high)
    stub_environments.LOG.clear()
    ppo.evaluate(agent, "Stub/Levels-v0", episodes=2, seed=0)
    assert stub_environments.LOG and all(step[2].dtype == np.int64 for step in stub_environments.LOG)


def test_images_are_flattened_with_a_note(capsys):
    envs = ppo.Environments("Stub/Image-v0", 2)
    assert envs.observations.shape == (2, 4 * 5 * 3)
    (line,) = capsys.readouterr().out.splitlines()
    assert "(4, 5, 3)" in line and "convolutions" in line
    ppo.Environments("Stub/Seeded-v0", 2)
    assert capsys.readouterr().out == ""


# ------------------------------------------------------------------------------------- replay of episodes

MUJOCO = (
    "HalfCheetah Hopper Walker2d Ant Swimmer Humanoid Reacher Pusher InvertedPendulum InvertedDoublePendulum"
)
REPLAYED = [f"{name}-v5" for name in f"{MUJOCO} HumanoidStandup".split()]
REPLAYED += ["Pendulum-v1", "MountainCarContinuous-v0", "LunarLanderContinuous-v3"]
REPLAYED += [f"Stub/{name}-v0" for name in "NoisySeeded Opaque OwnGenerator Stacked GlobalReset".split()]
REPLAYED += [f"Stub/{name}-v0" for name in "Matrix Levels".split()]


def draw_actions(envs: ppo.Environments, steps: int, seed: int) -> np.ndarray:
    """Actions (steps, N, ...) over the whole range."""
    generator = np.random.default_rng(seed)
    low, high = np.maximum(envs.action_space.low, -1e3), np.minimum(envs.action_space.high, 1e3)
    return generator.uniform(low, high, (steps, len(envs), *low.shape)).astype(np.float32)


def go_on(envs: ppo.Environments, actions: np.ndarray) -> list[bytes]:
    return [np.asarray(x).tobytes() for action in actions for x in (*envs.step(action), envs.observations)]


def save_and_restore(env_id: str, envs: ppo.Environments, path: Path) -> ppo.Environments:
    """Other environments, with other episodes behind them, brought to the state of `envs` through a file."""
    torch.save({"envs": envs.state_dict(), "generator": torch.get_rng_state()}, path)
    torch.manual_seed(99)
    restored = ppo.Environments(env_id, len(envs))
    state = torch.load(path, weights_only=True)
    torch.set_rng_state(state["generator"])
    restored.load_state_dict(state["envs"])
    return restored


@pytest.mark.parametrize("env_id", REPLAYED)
def test_replayed_environments_go_on_bit_for_bit(env_id, tmp_path, capsys):
    """In the middle of episodes, a few steps before the time limit of some; two more episodes are begun."""
    if env_id == "LunarLanderContinuous-v3":
        pytest.importorskip("Box2D")
    envs = ppo.Environments(env_id, 3)
    go_on(envs, draw_actions(envs, 23, seed=0))
    envs.limits = np.minimum(envs.limits, envs.lengths + np.array([4, 9, 10**6]))
    actions = draw_actions(envs, 20, seed=1)
    restored = save_and_restore(env_id, envs, tmp_path / "state.pt")
    generator = torch.get_rng_state()
    after_restoring = go_on(restored, actions)
    torch.set_rng_state(generator)
    assert go_on(envs, actions) == after_restoring
    assert "differ" not in capsys.readouterr().out
    assert len(envs.finished) >= 2 and [*envs.finished] == [*restored.finished]
    for name, x in envs.state_dict().items():
        assert name == "finished" or torch.equal(x, restored.state_dict()[name]), name


@pytest.mark.parametrize("kind", ["GlobalStep", "Counted", "GlobalHidden", "Flicker"])
def test_environments_that_do_not_repeat_begin_anew_with_a_sentence(kind, tmp_path, capsys):
    """Draws from np.random in every step, seen at once or later; a shared counter, seen always or once."""
    env_id = f"Stub/{kind}-v0"
    envs = ppo.Environments(env_id, 3)
    go_on(envs, draw_actions(envs, 23, seed=0))
    capsys.readouterr()
    restored = save_and_restore(env_id, envs, tmp_path / "state.pt")
    assert capsys.readouterr().out.count(f"{env_id} differ") == 1
    assert not restored.lengths.any() and not restored.returns.any()
    assert [*restored.finished] == [*envs.finished]
    go_on(restored, draw_actions(envs, 5, seed=1))  # it can be played and saved again
    restored.state_dict()


def test_replay_keeps_no_more_actions_than_the_longest_episode_has():
    envs = ppo.Environments("Stub/Seeded-v0", 3)
    for _ in range(5):
        go_on(envs, draw_actions(envs, 7, seed=0))
        assert len(envs.state_dict()["actions"]) == envs.lengths.max()


# ------------------------------------------------------------------------------------- what training does


class Call(NamedTuple):
    indices: torch.Tensor
    batch: ppo.Batch
    coefficients: dict[str, float]


class Recorder:
    """In the place of `make_update`: keeps what each call is given, moves nothing, returns chosen metrics."""

    def __init__(self, monkeypatch, metrics=lambda call: {}):
        self.calls, self.metrics = [], metrics
        monkeypatch.setattr(ppo, "make_update", self.make_update)

    def make_update(self, agent, optimizer, args):
        self.agent = agent

        def update(*inputs):
            indices, batch, coefficients = inputs
            assert type(batch) is ppo.Batch
            numbers = {name: x.item() for name, x in coefficients.items()}
            self.calls.append(Call(indices, ppo.Batch(*(x.clone() for x in batch)), numbers))
            chosen = self.metrics(len(self.calls) - 1)
            return torch.tensor([float(chosen.get(name, 0)) for name in ppo.METRICS])

        return update


def train_stub(tmp_path: Path, **changes) -> Path:
    args = {
        "env_id": "Stub/NoisySeeded-v0",
        "num_envs": 3,
        "num_steps": 8,
        "num_minibatches": 4,
        "compile": False,
    }
    args |= {"update_epochs": 2, "eval_interval": 0, "target_kl": None, "runs": str(tmp_path), "seed": 1}
    return ppo.main(ppo.Args(**args | changes))


def test_update_is_given_what_the_definitions_say(tmp_path, monkeypatch):
    """Three iterations, computed anew from what the environments saw.

    Observations are normalised with the statistics of the iterations before (of its own in the first), final
    ones too; rewards are scaled by all returns so far; V is bootstrapped from the final observation at a time
    limit; every transition is used once per epoch.
    """
    recorder = Recorder(monkeypatch)
    stub_environments.LOG.clear()
    run = train_stub(tmp_path, total_timesteps=72, gamma=0.9, gae_lambda=0.8)
    seen = seen_by(3)
    _, raw, env_actions, rewards, raw_next, terminated, truncated = (
        np.array([[steps[t][field] for steps in seen] for t in range(24)]) for field in range(7)
    )
    done, agent = terminated | truncated, recorder.agent
    assert terminated.any() and truncated.any() and len(recorder.calls) == 3 * 2 * 4
    returns_state = {"running": np.zeros(3), "seen": []}
    for iteration in range(3):
        rows = slice(8 * iteration, 8 * iteration + 8)
        history = raw[: max(8 * iteration, 8)].reshape(-1, 3)
        mean, std = history.mean(0), np.sqrt(history.var(0) + 1e-8)

        def normalize(x, mean=mean, std=std):
            return torch.from_numpy(np.clip((x - mean) / std, -10, 10)).float()

        observations = normalize(raw[rows])
        with torch.no_grad():
            values, next_values = (agent.critic(x)[..., 0] for x in (observations, normalize(raw_next[rows])))
            policy = Independent(Normal(agent.actor(observations), agent.log_std.exp()), 1)
        scaled = plain_reward_scaling(rewards[rows], done[rows], 0.9, returns_state)
        batch = scaled, values.numpy(), next_values.numpy(), terminated[rows], done[rows]
        advantages = plain_gae(*batch, 0.9, 0.8)
        calls = recorder.calls[8 * iteration : 8 * iteration + 8]
        for epoch in (calls[:4], calls[4:]):
            assert sorted(torch.cat([call.indices for call in epoch]).tolist()) == list(range(24))
        assert not torch.equal(calls[0].indices, calls[4].indices)  # shuffled anew
        for call in calls:
            assert call.coefficients == pytest.approx({"clip": 0.2, "value": 0.5, "entropy": 3e-4, "kl": 1.0})
            given, actions, old_means, old_log_std, old_log_probs, *targets = call.batch
            np.testing.assert_allclose(given, observations.flatten(0, 1), rtol=0, atol=1e-5)
            played = np.clip(2 + 4 * actions.numpy(), -2, 6).reshape(8, 3, 2)
            np.testing.assert_allclose(env_actions[rows], played, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(old_means, policy.mean.flatten(0, 1), rtol=0, atol=1e-6)
            assert torch.equal(old_log_std, agent.log_std)
            expected = policy.log_prob(actions.view(8, 3, 2)).flatten()
            torch.testing.assert_close(old_log_probs, expected, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(targets[0], advantages.flatten(), rtol=0, atol=1e-4)
            expected = (advantages + values.numpy()).flatten()
            np.testing.assert_allclose(targets[1], expected, rtol=0, atol=1e-4)
        explained = 1 - np.var(advantages) / np.var(advantages + values.numpy())
        logged = read_curves(run)["losses/explained_variance"][24 * (iteration + 1)]
        assert logged == pytest.approx(explained, abs=1e-4)
    # Final observations were normalised too, and entered no statistics: these are of what was acted upon.
    state = ppo.load_checkpoint(run)["agent"]
    assert state["observation_statistics.count"].item() == state["return_statistics.count"].item() == 72
    np.testing.assert_allclose(state["observation_statistics.mean"], raw.reshape(-1, 3).mean(0), rtol=1e-5)
    np.testing.assert_allclose(state["observation_statistics.variance"], raw.reshape(-1, 3).var(0), rtol=1e-4)


def test_first_observation_does_not_decide_the_type_of_all(tmp_path, monkeypatch):
    Recorder(monkeypatch)
    stub_environments.LOG.clear()
    run = train_stub(tmp_path, env_id="Stub/IntegerReset-v0", total_timesteps=48)
    mean = np.mean([step[1] for step in stub_environments.LOG], axis=0)
    np.testing.assert_allclose(ppo.Agent.load(run).observation_statistics.mean, mean, rtol=1e-5)


def test_advantages_are_recomputed_per_epoch_only_if_asked(tmp_path, monkeypatch):
    for recompute in (True, False):
        recorder = Recorder(monkeypatch)

        def disturb(call, recorder=recorder):
            with torch.no_grad():
                recorder.agent.critic[-1].bias += 1
            return {}

        recorder.metrics = disturb
        train_stub(tmp_path / str(recompute), total_timesteps=24, recompute_advantages=recompute)
        returns = [call.batch.returns for call in recorder.calls]
        assert all(torch.equal(returns[0], x) for x in returns[:4])
        assert torch.equal(returns[3], returns[4]) != recompute


def test_target_kl_looks_at_the_mean_of_a_whole_epoch(tmp_path, monkeypatch):
    """1.5 x 0.02 is kept by the first epoch and not by the second; their last minibatches say otherwise."""
    kl = [0, 0, 0, 0.119] + [0.06, 0.07, 0, 0] + [0] * 8
    recorder = Recorder(monkeypatch, lambda call: {"approx_kl": kl[call]})
    train_stub(tmp_path, total_timesteps=24, update_epochs=4, target_kl=0.02)
    assert len(recorder.calls) == 8


def test_logged_losses_are_means_over_all_minibatches(tmp_path, monkeypatch):
    Recorder(monkeypatch, lambda call: {"policy_loss": call, "clip_fraction": call**2, "value_loss": 3})
    curves = read_curves(train_stub(tmp_path, total_timesteps=48))
    assert curves["losses/policy_loss"] == {24: np.mean(range(8)), 48: np.mean(range(8, 16))}
    assert curves["losses/clip_fraction"] == {
        24: np.mean(np.arange(8) ** 2),
        48: np.mean(np.arange(8, 16) ** 2),
    }
    assert curves["losses/value_loss"] == {24: 3, 48: 3}


def make_goldens() -> None:
    batch = golden_batch()
    golden = {"batch": {name: array.tolist() for name, array in batch.items()}}
    golden["advantages"] = np.round(sb3_advantages(batch, 0.99, 0.95).astype(float), 7).tolist()
    GOLDENS.mkdir(exist_ok=True)
    (GOLDENS / "gae_stable_baselines3.json").write_text(json.dumps(golden) + "\n")


if __name__ == "__main__":
    make_goldens()
