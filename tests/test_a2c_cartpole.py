"""What is A2C's and A3C's own in a2c_cartpole.py, against plain definitions, NumPy, torch.optim; short runs.

The rest of the script is shared with other scripts, letter for letter, and tested with those.
"""

import copy
import dataclasses
import io
import json
import math
import multiprocessing
import os
import re
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import stub_environments
import torch
import torch.nn as nn
from helpers import checkpoint_difference, difference, read_curves, start
from test_ppo_continuous_runs import flags, kill_when, nth_evaluation, refusal
from torch.distributions import Categorical

import a2c_cartpole as a2c
import ppo_continuous

SCRIPT = "a2c_cartpole.py"
ACTIONS = gym.spaces.Discrete(3, start=2)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# ---------------------------------------------------------------------------------------- environments


class Coded(stub_environments.Seeded):
    """With three actions, numbered from 2."""

    def __init__(self, noise: float = 0.0, render_mode: str | None = None):
        super().__init__(noise)
        self.action_space = ACTIONS


class Poisoned(stub_environments.Poisoned):
    def __init__(self, render_mode: str | None = None):
        super().__init__()
        self.action_space = ACTIONS


class Opaque(stub_environments.Opaque):
    def __init__(self, render_mode: str | None = None):
        super().__init__()
        self.action_space = ACTIONS


class Nested(stub_environments.Matrix):
    """Observations are a Dict, actions a MultiDiscrete of shape (2, 2), each numbered from 1."""

    action_space = gym.spaces.MultiDiscrete([[2, 3], [4, 2]], start=[[1, 1], [1, 1]])


gym.register("Actions/Coded-v0", Coded)
gym.register("Actions/NoisyCoded-v0", Coded, kwargs={"noise": 1.0})
gym.register("Actions/Poisoned-v0", Poisoned)
gym.register("Actions/Opaque-v0", Opaque)
gym.register("Actions/Nested-v0", Nested)


def tumble(observations: np.ndarray) -> np.ndarray:
    """Actions that keep the pole of CartPole up for some 50 steps."""
    return (observations[:, 2] > 0).astype(int)


def swing(observations: np.ndarray) -> np.ndarray:
    """Actions that bring Acrobot to its goal within some 80 steps."""
    return np.where(observations[:, 5] > 0, 2, 0)


def balance(observations: np.ndarray) -> np.ndarray:
    """Actions that keep the pole of CartPole up for ever."""
    return (observations @ np.array([0.1, 0.3, 1, 0.5]) > 0).astype(int)


@pytest.mark.parametrize(
    ("env_id", "kind"),
    [
        ("CartPole-v1", a2c.CartPoles),
        ("CartPole-v0", a2c.CartPoles),
        ("Acrobot-v1", a2c.Environments),
        ("Actions/Nested-v0", a2c.Environments),
    ],
)
def test_cartpole_is_vectorised_and_others_are_stepped_in_turn(env_id, kind):
    envs, env = a2c.make_environments(env_id, 3), a2c.make_env(env_id)
    assert type(envs) is kind and len(envs) == 3
    assert envs.observations.shape == (3, *env.observation_space.shape)
    assert envs.statistics() == {}


def test_vectorised_cartpole_steps_as_the_single_one_and_begins_at_once():
    """Also at the time limit; each begun episode starts as Gymnasium's do."""
    torch.manual_seed(6)
    envs, env = a2c.CartPoles("CartPole-v1", 3), gym.make("CartPole-v1").unwrapped
    env.reset()
    age, sums, finished, ends = np.zeros(3, int), np.zeros(3), [], {"fallen": 0, "time limit": 0}
    starts = []
    for t in range(1300):
        observations = envs.observations
        # The first one balances after 200 steps, and so meets its time limit.
        actions = np.where((np.arange(3) == 0) & (t > 200), balance(observations), tumble(observations))
        next_observations, rewards, terminated, done = envs.step(actions[:, None])
        age, sums = age + 1, sums + rewards
        for n in range(3):
            env.state, env.steps_beyond_terminated = np.array(observations[n], np.float64), None
            observation, reward, fallen, *_ = env.step(actions[n])
            np.testing.assert_allclose(next_observations[n], observation, rtol=1e-4, atol=1e-5)
            limit = age[n] == 500
            assert (rewards[n], terminated[n], done[n]) == (reward, fallen, fallen or limit)
            if done[n]:
                starts.append(envs.observations[n])
                finished.append((sums[n], age[n]))
                ends["fallen" if fallen else "time limit"] += 1
                age[n] = sums[n] = 0
            else:
                assert np.array_equal(envs.observations[n], next_observations[n])
    assert ends["fallen"] > 20 and ends["time limit"] == 2
    assert [*envs.finished] == finished[-100:]
    names = {"charts/episodic_return": 0, "charts/episodic_length": 1}
    means = {name: pytest.approx(np.mean(finished[-100:], axis=0)[i]) for name, i in names.items()}
    assert envs.statistics() == means
    starts = np.array(starts)  # drawn uniformly from [-0.05, 0.05]
    assert len({*starts.flat}) == starts.size > 80 and np.abs(starts).max() <= 0.05
    assert abs(starts.mean()) < 0.012 and starts.std() == pytest.approx(0.1 / math.sqrt(12), rel=0.2)


def test_vectorised_cartpoles_differ_and_depend_on_the_generator_of_pytorch():
    observations = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        observations.append(a2c.CartPoles("CartPole-v1", 2).observations)
    assert np.array_equal(observations[0], observations[1])
    assert len({*np.concatenate(observations[1:]).flat}) == 16


@pytest.mark.parametrize("moment", ["in the middle of episodes", "right after an end"])
@pytest.mark.parametrize(
    ("env_id", "policy"), [("CartPole-v1", tumble), ("Acrobot-v1", swing), ("Actions/NoisyCoded-v0", None)]
)
def test_restored_environments_go_on_bit_for_bit(env_id, policy, moment):
    """Through a file and into fresh environments, with what they count."""
    policy = policy or (lambda observations: np.full(len(observations), 3))
    envs = a2c.make_environments(env_id, 3)
    ended_steps = 0
    for _ in range(1000):
        *_, done = envs.step(policy(envs.observations))
        ended_steps += done.any()
        if ended_steps >= 2 and done.any() == (moment == "right after an end"):
            break
    assert done.any() == (moment == "right after an end") and not done.all()
    file = io.BytesIO()
    torch.save({"envs": envs.state_dict(), "generator": torch.get_rng_state()}, file)
    file.seek(0)
    count, expected = len(envs.finished), []
    for _ in range(250):
        expected.append((*envs.step(policy(envs.observations)), envs.observations))
    torch.manual_seed(77)
    restored = a2c.make_environments(env_id, 3)
    for _ in range(3):  # what it was before it is restored must not matter
        restored.step(policy(restored.observations))
    state = torch.load(file, weights_only=True)
    torch.set_rng_state(state["generator"])
    restored.load_state_dict(state["envs"])
    for arrays in expected:
        again = (*restored.step(policy(restored.observations)), restored.observations)
        for one, other in zip(arrays, again, strict=True):
            assert one.dtype == other.dtype and one.tobytes() == other.tobytes()
    assert sum(done.sum() for *_, done, _ in expected) >= 5
    assert count > 0 and [*restored.finished] == [*envs.finished] and envs.lengths.any()
    assert np.array_equal(restored.lengths, envs.lengths) and np.array_equal(restored.returns, envs.returns)


def test_restored_environments_keep_to_their_time_limit():
    """Truncated 500 steps after the start, not after it was restored; the first Acrobot has all of them."""
    for env_id, policy in (("Acrobot-v1", lambda x: np.ones(len(x), int)), ("CartPole-v1", balance)):
        envs = a2c.make_environments(env_id, 1)
        for _ in range(300):
            *_, done = envs.step(policy(envs.observations))
            assert not done.any()
        restored = a2c.make_environments(env_id, 1)
        restored.load_state_dict(envs.state_dict())
        done = [restored.step(policy(restored.observations))[3].item() for _ in range(202)]
        assert done == [False] * 199 + [True] + [False] * 2


# -------------------------------------------------------------------------------------------- RMSprop


def parameters_and_gradients(steps: int) -> tuple[list[torch.Tensor], list[list[torch.Tensor]]]:
    """Two parameters in float64 and their gradients, of sizes around the root of 1e-5."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(3, 4), (5,)]
    draw = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes * (steps + 1)]
    scale = [10.0 ** (i % 5 - 4) for i in range(steps)]
    return draw[:2], [[scale[i] * x for x in draw[2 * i + 2 : 2 * i + 4]] for i in range(steps)]


def test_rmsprop_is_the_formula():
    """Mnih et al. 2016, equations S2 and S3: g = alpha g + (1 - alpha) d^2, step = rate d / sqrt(g + eps)."""
    parameters, gradients = parameters_and_gradients(8)
    expected, mean_squares = [p.numpy().copy() for p in parameters], [np.zeros(p.shape) for p in parameters]
    optimizer = a2c.RMSprop(iter(parameters), 0.5, 0.9, 1e-5)
    for i, step_gradients in enumerate(gradients):
        rate = 0.5 / (i + 1)
        optimizer.learning_rate.fill_(rate)
        before = [gradient.clone() for gradient in step_gradients]
        optimizer.step(step_gradients)
        assert all(torch.equal(x, y) for x, y in zip(before, step_gradients))
        for p, d, g in zip(expected, step_gradients, mean_squares):
            g[:] = 0.9 * g + 0.1 * d.numpy() ** 2
            p -= rate * d.numpy() / np.sqrt(g + 1e-5)
        for p, q in zip(parameters, expected):
            np.testing.assert_allclose(p, q, rtol=1e-6, atol=1e-7)  # the rate is a float32
    state = optimizer.state_dict()
    assert state["learning_rate"][0].item() == pytest.approx(0.5 / 8)
    for saved, g in zip(state["mean_squares"], mean_squares, strict=True):
        np.testing.assert_allclose(saved, g, rtol=1e-12)
    other = a2c.RMSprop([torch.zeros_like(p) for p in parameters], 1.0, 0.9, 1e-5)
    tensors = [other.learning_rate, *other.mean_squares]
    other.load_state_dict(copy.deepcopy(state))  # into the tensors that a compiled update refers to
    assert difference(other.state_dict(), state) is None
    assert [*map(id, tensors)] == [*map(id, (other.learning_rate, *other.mean_squares))]


@pytest.mark.parametrize("alpha", [0.0, 0.9, 0.99])
def test_rmsprop_without_epsilon_is_that_of_torch(alpha):
    parameters, gradients = parameters_and_gradients(6)
    others = [p.clone().requires_grad_() for p in parameters]
    optimizer = a2c.RMSprop(parameters, 0.125, alpha, 1e-60)
    reference = torch.optim.RMSprop(others, 0.125, alpha, eps=1e-30)
    for step_gradients in gradients:
        optimizer.step(step_gradients)
        for other, gradient in zip(others, step_gradients):
            other.grad = gradient.clone()
        reference.step()
    for p, other in zip(parameters, others):
        torch.testing.assert_close(p, other.detach(), rtol=1e-9, atol=1e-10)


def test_rmsprop_is_that_of_stable_baselines3():
    """Theirs, epsilon inside the root too, begins with ones instead of zeros, as TensorFlow did."""
    module = pytest.importorskip("stable_baselines3.common.sb2_compat.rmsprop_tf_like")
    parameters, gradients = parameters_and_gradients(6)
    others = [p.clone().requires_grad_() for p in parameters]
    optimizer = a2c.RMSprop(parameters, 0.125, 0.95, 1e-5)
    for mean_square in optimizer.mean_squares:
        mean_square.fill_(1)
    reference = module.RMSpropTFLike(others, 0.125, alpha=0.95, eps=1e-5)
    for step_gradients in gradients:
        optimizer.step(step_gradients)
        for other, gradient in zip(others, step_gradients):
            other.grad = gradient.clone()
        reference.step()
    for p, other in zip(parameters, others):
        torch.testing.assert_close(p, other.detach(), rtol=1e-9, atol=1e-10)


# ------------------------------------------------------------------------------------------ gradients


SIZES = [3, 2]  # choices of the two components of an action


def make_agent(shared: bool = False, sizes: list[int] = SIZES) -> a2c.Agent:
    """In float64, with a policy that is far from uniform."""
    agent = a2c.Agent(4, sizes, shared).double()
    with torch.no_grad():
        agent.actor[-1].weight.mul_(100)
    return agent


def make_batch(T: int, N: int, seed: int, sizes: list[int] = SIZES) -> a2c.Batch:
    """As `collect_rollout` makes them, in float64."""
    generator = np.random.default_rng(seed)
    observations, rewards = generator.normal(size=(T + 1, N, 4)), generator.normal(size=(T, N))
    actions = np.stack([generator.integers(size, size=(T, N)) for size in sizes], -1)
    terminated, truncated = generator.random((2, T, N)) < 0.2
    final_values = np.where(truncated & ~terminated, generator.normal(size=(T, N)), 0)
    arrays = observations, actions, rewards, terminated, terminated | truncated, final_values
    return a2c.Batch(*map(torch.from_numpy, arrays))


def plain_targets(agent, args, batch: a2c.Batch) -> dict[tuple, tuple]:
    """{(t, n): (advantage, return)}, from the definitions, as numbers."""
    T, N = batch.rewards.shape
    with torch.no_grad():
        values = [[agent.value(batch.observations[t, n]).item() for n in range(N)] for t in range(T + 1)]
    targets = {}
    for n in range(N):
        R = 0.0
        for t in reversed(range(T)):
            reward, value = batch.rewards[t, n].item(), values[t][n]
            done, terminated = bool(batch.done[t, n]), bool(batch.terminated[t, n])
            after = batch.final_values[t, n].item() if done else values[t + 1][n]
            bootstrap = 0.0 if terminated else after
            last = done or t == T - 1
            if args.gae_lambda == 1:  # algorithm S3: R = r + gamma R, begun with 0 or V
                R = reward + args.gamma * (bootstrap if last else R)
                targets[t, n] = (R - value, R)
            else:
                advantage = reward + args.gamma * bootstrap - value
                if not last:
                    advantage += args.gamma * args.gae_lambda * targets[t + 1, n][0]
                targets[t, n] = (advantage, advantage + value)
    return targets


def plain_loss(agent, args, batch, targets) -> tuple[torch.Tensor, list[float]]:
    """The loss of the docstring, one step at a time, and policy loss, value loss and entropy."""
    observations, actions = batch[:2]
    policy_losses, value_losses, entropies = [], [], []
    advantages = np.array([advantage for advantage, _ in targets.values()])
    mean, std = (advantages.mean(), advantages.std() + 1e-8) if args.norm_adv else (0.0, 1.0)
    for (t, n), (advantage, R) in targets.items():
        components = agent.actor(observations[t, n]).view(len(SIZES), -1)
        policy = [Categorical(logits=x[:size]) for x, size in zip(components, SIZES)]
        log_prob = sum(component.log_prob(a) for component, a in zip(policy, actions[t, n]))
        policy_losses.append(-log_prob * (advantage - mean) / std)
        value_losses.append((agent.value(observations[t, n]) - R) ** 2 / 2)
        entropies.append(sum(component.entropy() for component in policy))
    means = [sum(losses) / len(losses) for losses in (policy_losses, value_losses, entropies)]
    loss = means[0] + args.vf_coef * means[1] - args.ent_coef * means[2]
    return loss, [x.item() for x in means]


def coefficients_of(args: a2c.Args, dtype=torch.float64) -> dict[str, torch.Tensor]:
    coefficients = a2c.make_coefficients(args, "cpu")
    assert {name: x.item() for name, x in coefficients.items()} == pytest.approx(
        {"value": args.vf_coef, "entropy": args.ent_coef}
    )
    values = {"value": args.vf_coef, "entropy": args.ent_coef}
    return {name: torch.tensor(x, dtype=dtype) for name, x in values.items()}


def gradient_args(**changes) -> a2c.Args:
    defaults = {"gamma": 0.9, "gae_lambda": 1.0, "ent_coef": 0.3, "vf_coef": 0.7, "max_grad_norm": 1e9}
    return a2c.Args(**defaults | {"compile": False} | changes)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gae_lambda": 0.8, "norm_adv": True},
        {"gae_lambda": 0.0, "ent_coef": 0.0, "vf_coef": 0.0},
        {"max_grad_norm": 0.25},
    ],
    ids=lambda changes: "-".join(f"{name}-{value}" for name, value in changes.items()) or "n-step",
)
def test_gradients_are_those_of_the_textbook_loss(changes, shared):
    agent, batch, args = make_agent(shared), make_batch(9, 5, seed=2), gradient_args(**changes)
    truncated = batch.done & ~batch.terminated
    assert batch.terminated[:-1].any() and truncated[:-1].any() and (batch.terminated & batch.done).any()
    assert 0 < batch.done[-1].sum() < 5  # an end in the last row, and rollouts that go on
    gradients, metrics = a2c.compute_gradients(agent, args, batch, coefficients_of(args))
    targets = plain_targets(agent, args, batch)
    assert len(targets) == 9 * 5
    loss, means = plain_loss(agent, args, batch, targets)
    expected = torch.autograd.grad(loss, list(agent.parameters()), materialize_grads=True)
    norm = math.sqrt(sum(x.square().sum().item() for x in expected))
    scale = min(1, args.max_grad_norm / norm)
    assert (scale < 0.9) == ("max_grad_norm" in changes)
    for gradient, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, scale * other, rtol=1e-5, atol=1e-12)
    returns = np.array([R for _, R in targets.values()])
    residuals = [advantage for advantage, _ in targets.values()]
    explained = 1 - np.var(residuals) / np.var(returns)
    assert dict(zip(a2c.METRICS, metrics.tolist(), strict=True)) == pytest.approx(
        {
            "policy_loss": means[0],
            "value_loss": means[1],
            "entropy": means[2],
            "grad_norm": norm,
            "explained_variance": explained,
        },
        rel=1e-7,
    )


def test_advantages_and_returns_are_not_differentiated():
    """The gradient along a direction is the finite difference of the loss with both held fixed."""
    agent, batch, args = make_agent(True), make_batch(6, 4, seed=3), gradient_args(gae_lambda=0.9)
    targets = plain_targets(agent, args, batch)
    gradients, _ = a2c.compute_gradients(agent, args, batch, coefficients_of(args))
    for _ in range(3):
        direction, losses = [torch.randn_like(p) for p in agent.parameters()], []
        for size in (1e-5, -1e-5):
            moved = copy.deepcopy(agent)
            with torch.no_grad():
                for p, d in zip(moved.parameters(), direction):
                    p += size * d
                losses.append(plain_loss(moved, args, batch, targets)[0].item())
        slope = sum((g * d).sum().item() for g, d in zip(gradients, direction))
        assert slope == pytest.approx((losses[0] - losses[1]) / 2e-5, rel=1e-5)


def test_final_values_matter_at_time_limits_only():
    """Not in a single bit elsewhere, after a termination for instance."""
    args, agent, batch = gradient_args(gae_lambda=0.9), make_agent(), make_batch(10, 6, seed=4)
    gradients, metrics = a2c.compute_gradients(agent, args, batch, coefficients_of(args))
    truncated = batch.done & ~batch.terminated
    junk = torch.where(truncated, batch.final_values, 1e4 * torch.randn(10, 6).double())
    changed = batch._replace(final_values=junk)
    again, metrics_again = a2c.compute_gradients(agent, args, changed, coefficients_of(args))
    assert torch.equal(metrics, metrics_again)
    assert all(torch.equal(x, y) for x, y in zip(gradients, again, strict=True))
    t, n = truncated.nonzero()[0].tolist()
    junk[t, n] += 1
    _, metrics_again = a2c.compute_gradients(agent, args, changed, coefficients_of(args))
    assert not torch.equal(metrics, metrics_again)


def test_compiled_update_equals_the_eager_one_whatever_is_scheduled(capsys):
    """The learning rate and both coefficients change in every step, and the update is compiled once."""
    agents = [make_agent(True).float()]
    agents.append(copy.deepcopy(agents[0]))
    results = []
    for agent, compiled in zip(agents, (False, True)):
        args = gradient_args(gae_lambda=0.95, max_grad_norm=0.5, compile=compiled, norm_adv=True)
        optimizer = a2c.RMSprop(agent.parameters(), 0.01, 0.99, 1e-5)
        update, coefficients = a2c.make_update(agent, optimizer, args), a2c.make_coefficients(args, "cpu")
        assert (update.__qualname__ == "make_update.<locals>.update") or compiled
        metrics = []
        for seed in range(6):
            batch = make_batch(8, 4, seed)
            batch = a2c.Batch(*(x.float() if x.dtype == torch.float64 else x for x in batch))
            optimizer.learning_rate.fill_(0.01 / (seed + 1))
            coefficients["entropy"].fill_(0.3 * seed)
            coefficients["value"].fill_(0.7 + seed)
            metrics.append(update(batch, coefficients).clone())
        results.append((torch.stack(metrics), optimizer.state_dict()["mean_squares"]))
    torch.testing.assert_close(*(result[0] for result in results), rtol=1e-3, atol=1e-4)
    for p, q in zip(agents[0].parameters(), agents[1].parameters()):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-4)
    for p, q in zip(results[0][1], results[1][1]):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-6)
    printed = capsys.readouterr().out
    if "does not work here" in printed:
        pytest.skip("no compiler")
    assert printed.count("Compiling the update") == 1 and "again" not in printed


# -------------------------------------------------------------------------------------------- rollout


def play(envs: a2c.Environments, agent: a2c.Agent, lengths: list[int]) -> list[np.ndarray]:
    """Several rollouts joined to one."""
    batches = [a2c.collect_rollout(envs, agent, length) for length in lengths]
    for before, after in zip(batches, batches[1:]):
        assert torch.equal(before.observations[-1], after.observations[0])
    assert torch.equal(batches[-1].observations[-1], torch.from_numpy(envs.observations).float())
    observations = torch.cat([batch.observations[:-1] for batch in batches])
    return [observations.numpy(), *(torch.cat(x).numpy() for x in list(zip(*batches))[1:])]


def test_rollout_is_what_the_environments_saw():
    """LOG has what each environment, stepped in turn, was given and returned; V of the final observations."""
    agent = a2c.Agent(3, [3], action_start=[2])
    envs = a2c.make_environments("Actions/Coded-v0", 3)
    stub_environments.LOG.clear()
    observations, actions, rewards, terminated, done, final_values = play(envs, agent, [1, 2, 7, 20])
    assert [x.dtype for x in (observations, actions, rewards)] == [np.float32, np.int64, np.float32]
    assert observations.shape == (30, 3, 3) and actions.shape == (30, 3, 1) and len({*actions.flat}) == 3
    assert terminated.any() and (done & ~terminated).any() and len(stub_environments.LOG) == 90
    for k, (_, before, action, reward, after, stopped, truncated) in enumerate(stub_environments.LOG):
        t, n = divmod(k, 3)
        assert np.array_equal(observations[t, n], before) and action == actions[t, n, 0] + 2
        assert rewards[t, n] == reward
        assert (terminated[t, n], done[t, n]) == (stopped, stopped or truncated)
        if t + 1 < 30 and not done[t, n]:
            assert np.array_equal(observations[t + 1, n], after)
        value = agent.value(torch.from_numpy(after).float()).item() if truncated else 0
        assert final_values[t, n] == pytest.approx(value, rel=1e-5, abs=1e-6)


class Balance(nn.Module):
    """In the place of an actor: all but certain of what `balance` says."""

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        return 1e9 * nn.functional.one_hot(torch.from_numpy(balance(observations.numpy())), 2).float()


def test_balanced_cartpole_is_truncated_at_500_and_bootstrapped():
    agent, envs = a2c.Agent(4, [2]), a2c.CartPoles("CartPole-v1", 2)
    agent.actor = Balance()
    observations, _, rewards, terminated, done, final_values = play(envs, agent, [498, 10])
    assert done[499].all() and done.sum() == 2 and not terminated.any() and (rewards == 1).all()
    assert (np.abs(observations[500]) <= 0.05).all()
    before, action = torch.from_numpy(observations[499]), balance(observations[499])
    env = gym.make("CartPole-v1").unwrapped
    env.reset()
    for n in range(2):
        env.state = before[n].double().numpy()
        final = torch.from_numpy(env.step(action[n])[0])
        assert final_values[499, n] == pytest.approx(agent.value(final).item(), rel=1e-3)
    assert np.count_nonzero(final_values) == 2
    assert [*envs.finished] == [(500, 500)] * 2 and envs.lengths.tolist() == [8, 8]


class Still(a2c.Environments):
    """Nothing happens; it remembers the actions."""

    def __init__(self, num_envs: int, space: gym.Space):
        self.envs, self.space, self.played = [None] * num_envs, space, []
        self.observations = np.zeros((num_envs, 1))

    def step(self, actions):
        actions = actions.reshape(-1, *self.space.shape)
        assert all(self.space.contains(action) for action in actions)
        self.played.append(actions)
        nothing = np.zeros(len(self), np.float32)
        return self.observations, nothing, nothing > 0, nothing > 0


@pytest.mark.parametrize(
    "space",
    [
        gym.spaces.Discrete(3, start=-1),
        gym.spaces.MultiDiscrete([3, 2], start=[5, 0]),
        gym.spaces.MultiDiscrete([[3, 2], [1, 4]]),
    ],
    ids=["discrete", "multi", "matrix"],
)
def test_actions_follow_the_policy(space):
    """In frequency, those of the softmax; in the environment, as its space numbers them."""
    sizes, first = a2c.action_layout(space)
    agent = a2c.Agent(1, sizes, action_start=first)
    with torch.no_grad():
        agent.actor[-1].bias.normal_()
    envs = Still(500, space)
    actions = a2c.collect_rollout(envs, agent, 20).actions.numpy()
    assert np.array_equal(np.stack(envs.played).reshape(actions.shape), actions + np.array(first))
    with torch.no_grad():
        probabilities = agent.logits(torch.zeros(1)).softmax(-1).numpy()
    for k, size in enumerate(sizes):
        counts = np.bincount(actions[..., k].flatten(), minlength=size)
        expected = 10_000 * probabilities[k, :size]
        assert len(counts) == size
        assert (np.abs(counts - expected) <= 5 * np.sqrt(expected * (1 - expected / 10_000)) + 1e-6).all()
    (pairs, _) = np.unique(actions.reshape(20, -1), axis=0, return_counts=True)
    assert len(pairs) == 20  # drawn anew in every step


# ------------------------------------------------------------------------------------------ arguments


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"total_timesteps": 0}, "total_timesteps must lie in [1, inf), got 0"),
        ({"num_workers": 0}, "num_workers must lie in [1, inf)"),
        ({"num_envs": 0}, "num_envs must lie in [1, inf)"),
        ({"num_steps": -3}, "num_steps must lie in [1, inf), got -3"),
        ({"log_interval": 0}, "log_interval must lie in [1, inf)"),
        ({"checkpoint_interval": 0}, "checkpoint_interval must lie in [1, inf)"),
        ({"eval_episodes": 0}, "eval_episodes must lie in [1, inf)"),
        ({"eval_interval": -1}, "eval_interval must lie in [0, inf)"),
        ({"learning_rate": 0.0}, "learning_rate must lie in (0, inf), got 0.0"),
        ({"learning_rate": math.nan}, "learning_rate must lie in (0, inf), got nan"),
        ({"rmsprop_eps": 0.0}, "rmsprop_eps must lie in (0, inf)"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must lie in (0, inf)"),
        ({"seed": -1}, "seed must lie in [0, 4294967296), got -1"),
        ({"seed": 2**32}, "seed must lie in"),
        ({"ent_coef": -0.1}, "ent_coef must lie in [0, inf)"),
        ({"vf_coef": math.nan}, "vf_coef must lie in [0, inf), got nan"),
        ({"gamma": 1.01}, "gamma must lie in [0, 1], got 1.01"),
        ({"gae_lambda": math.nan}, "gae_lambda must lie in [0, 1]"),
        ({"rmsprop_alpha": 1.0}, "rmsprop_alpha must lie in [0, 1), got 1.0"),
        ({"rmsprop_alpha": -0.1}, "rmsprop_alpha must lie in [0, 1)"),
        ({"checkpoint_minutes": 0.0}, "checkpoint_minutes must lie in (0, inf)"),
        ({"asynchronous": True, "num_workers": 3}, "num_workers = 3 must divide num_envs = 64"),
        ({"asynchronous": True, "device": "cuda"}, "run on the CPU, not on cuda"),
        ({"resume": "a", "evaluate": "b"}, "resume, evaluate and run_name exclude each other"),
    ],
    ids=lambda x: "-".join(f"{name}-{value}" for name, value in x.items()) if isinstance(x, dict) else "",
)
def test_bad_arguments_are_named(changes, message):
    with pytest.raises(ValueError) as error:
        a2c.Args(**changes)
    assert message in str(error.value)


def test_arguments_at_the_edge_are_fine():
    a2c.Args(num_workers=3, num_envs=1, num_steps=1, rmsprop_alpha=0.0, gamma=1.0, gae_lambda=0.0)
    a2c.Args(eval_interval=0, seed=2**32 - 1, ent_coef=0.0, vf_coef=0.0)
    assert a2c.Args(asynchronous=True, num_workers=4, num_envs=4).device == "auto"


def test_every_number_has_its_limits():
    numbers = {field.name for field in dataclasses.fields(a2c.Args) if re.search("int|float", field.type)}
    assert sorted(" ".join(a2c.LIMITS.values()).split()) == sorted(numbers)


def test_command_line(capsys):
    args = a2c.parse_args("--asynchronous --num-workers 4 --no-compile --rmsprop-eps 0.1".split())
    assert (args.asynchronous, args.num_workers, args.compile, args.rmsprop_eps) == (True, 4, False, 0.1)
    for words in ("--rmsprop-alpha 1.0", "--num-workers 5 --asynchronous"):
        with pytest.raises(SystemExit) as stopped:
            a2c.parse_args(words.split())
        printed = capsys.readouterr().err + str(stopped.value.code)
        assert stopped.value.code not in (0, None)
        assert words.split()[0][2:].replace("-", "_") in printed.replace("-", "_")


# ------------------------------------------------------------------------------- synchronous training


TINY = {"num_envs": 4, "num_steps": 8, "compile": False, "total_timesteps": 1200, "log_interval": 100}
TINY |= {"checkpoint_interval": 300, "eval_interval": 400, "eval_episodes": 1}


def train(folder: Path, **changes) -> Path:
    return a2c.main(a2c.Args(**TINY | {"runs": str(folder)} | changes))


def resume(run: Path, *words: str) -> None:
    a2c.main(a2c.parse_args(["--resume", str(run), *words]))


def assert_same_run(run: Path, reference: Path, ignore: tuple[str, ...] = ()) -> None:
    for name in ("checkpoint.pt", "best.pt"):
        states = [a2c.load_checkpoint(x / name) for x in (run, reference)]
        assert checkpoint_difference(*states, ignore=ignore) is None
    assert read_curves(run) == read_curves(reference)


@pytest.mark.parametrize("anneal_lr", [True, False])
def test_steps_are_counted_annealed_and_logged_as_they_are_played(anneal_lr, tmp_path, monkeypatch):
    """Iteration k has the metrics k, k + 1, ...; LOG knows how many steps there really were."""
    calls = []

    def make_update(agent, optimizer, args):
        assert [*map(id, optimizer.parameters)] == [*map(id, agent.parameters())]

        def update(batch, coefficients):
            weights = {name: x.item() for name, x in coefficients.items()}
            assert weights == {"value": 0.75, "entropy": 0.25}
            calls.append((optimizer.learning_rate.item(), batch))
            return torch.arange(5.0) + len(calls)

        return update

    monkeypatch.setattr(a2c, "make_update", make_update)
    stub_environments.LOG.clear()
    settings = {"env_id": "Actions/Coded-v0", "num_envs": 3, "num_steps": 5, "total_timesteps": 610}
    settings |= {"log_interval": 50, "eval_interval": 0, "seed": 7, "anneal_lr": anneal_lr}
    run = train(tmp_path, **settings, vf_coef=0.75, ent_coef=0.25)
    curves = read_curves(run)

    step, window, expected = 0, [], {}
    for k, (rate, batch) in enumerate(calls, 1):
        assert rate == pytest.approx(1e-2 * (1 - step / 615 if anneal_lr else 1), rel=1e-5)
        if k > 1:
            assert torch.equal(batch.observations[0], calls[k - 2][1].observations[-1])
        step, window = step + batch.rewards.numel(), [*window, k]
        if step // 50 > (step - 15) // 50 or k == len(calls):
            expected[step], window = (np.mean(window), rate), []
    assert step == 615 == len(stub_environments.LOG) and len(expected) == 13  # 610, in whole iterations
    assert a2c.load_checkpoint(run)["step"] == step
    for i, name in enumerate(a2c.METRICS):
        curve = curves[f"losses/{name}"]
        assert curve == pytest.approx({step: mean + i for step, (mean, _) in expected.items()})
    assert curves["charts/learning_rate"] == pytest.approx({s: rate for s, (_, rate) in expected.items()})

    episodes, sums = [], np.zeros((3, 2))
    for i, (_, _, _, reward, _, terminated, truncated) in enumerate(stub_environments.LOG):
        sums[i % 3] += reward, 1
        if terminated or truncated:
            episodes.append(sums[i % 3].copy())
            sums[i % 3] = 0
        if i + 1 in expected:  # the last hundred episodes
            mean_return, mean_length = np.mean(episodes[-100:], axis=0)
            assert curves["charts/episodic_return"][i + 1] == pytest.approx(mean_return, rel=1e-6)
            assert curves["charts/episodic_length"][i + 1] == pytest.approx(mean_length, rel=1e-6)
    assert len(episodes) > 120


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory) -> Path:
    """A run that nobody changes."""
    return train(tmp_path_factory.mktemp("runs"))


def test_what_is_logged(finished_run):
    curves = read_curves(finished_run)
    losses = {f"losses/{name}" for name in a2c.METRICS}
    charts = {f"charts/{name}" for name in ("learning_rate", "episodic_return", "episodic_length")}
    evaluations = {"eval/episodic_return", "eval/episodic_return_std"}
    assert curves.keys() == losses | charts | evaluations
    steps = [32 * math.ceil(limit / 32) for limit in range(100, 1201, 100)]
    assert all(list(curves[tag]) == steps for tag in losses | charts) and steps[-1] == 1216
    assert all(list(curves[tag]) == [0, 416, 800, 1216] for tag in evaluations)
    assert all(math.isfinite(x) for curve in curves.values() for x in curve.values())
    assert 0 < min(curves["losses/entropy"].values()) <= max(curves["losses/entropy"].values()) < 0.6932
    best = max(value for step, value in curves["eval/episodic_return"].items() if step)
    assert a2c.load_checkpoint(finished_run / "best.pt")["best_return"] == pytest.approx(best, rel=1e-6)


def test_equal_seeds_give_equal_runs_and_others_do_not(finished_run, tmp_path):
    again, other = train(tmp_path / "again"), train(tmp_path / "other", seed=2, eval_interval=0)
    assert_same_run(again, finished_run)
    weights = [a2c.load_checkpoint(run)["agent"]["actor.0.weight"] for run in (again, other)]
    assert not torch.equal(*weights)


def test_update_learns_in_every_part(finished_run):
    """Each parameter has moved from where the seed put it, and its mean square from zero."""
    torch.manual_seed(1)
    before, state = a2c.Agent(4, [2]), a2c.load_checkpoint(finished_run)
    for name, p in before.named_parameters():
        assert not torch.equal(p, state["agent"][name]), name
    mean_squares = state["optimizer"]["mean_squares"]
    assert len(mean_squares) == len([*before.parameters()])
    assert all(tensor.abs().sum() > 0 for tensor in mean_squares)


def test_evaluate(finished_run, capsys):
    a2c.main(a2c.parse_args(["--evaluate", str(finished_run), "--eval-episodes", "3", "--seed", "9"]))
    returns = a2c.evaluate(a2c.Agent.load(finished_run), "CartPole-v1", 3, 9 + a2c.EVALUATION_SEED)
    expected = f"CartPole-v1: {returns.mean():.1f} +- {returns.std():.1f} over 3 episodes"
    assert expected in capsys.readouterr().out
    trained = a2c.evaluate(a2c.Agent.load(finished_run), "CartPole-v1", 1, 1 + a2c.EVALUATION_SEED)
    assert [*read_curves(finished_run)["eval/episodic_return"].values()][-1] == trained.mean()


@pytest.mark.parametrize(
    ("env_id", "shared_network"), [("Actions/NoisyCoded-v0", False), ("CartPole-v1", True)]
)
def test_same_command_goes_on_after_sigterm(env_id, shared_network, tmp_path, monkeypatch, capsys):
    """In an iteration between two points of the curves: the sums until then are saved as well."""
    settings = {"env_id": env_id, "shared_network": shared_network, "norm_adv": True}
    settings |= {"checkpoint_interval": 10**9}
    reference = train(tmp_path / "reference", **settings)
    play_one, calls = a2c.collect_rollout, iter(range(1, 10**6))

    def collect(*arguments):
        if next(calls) == 26:
            os.kill(os.getpid(), signal.SIGTERM)
        return play_one(*arguments)

    command = flags(**TINY | settings, runs=tmp_path, run_name="queued")
    with monkeypatch.context() as patch:
        patch.setattr(a2c, "collect_rollout", collect)
        message = refusal(lambda: a2c.main(a2c.parse_args(command)))
    run = tmp_path / "queued"
    assert "Interrupted at step 832; resume with: python a2c_cartpole.py --resume" in message
    state = a2c.load_checkpoint(run)
    assert state["step"] == 832 and state["count"].item() == 1 and state["totals"].any()
    a2c.main(a2c.parse_args(command))
    printed = capsys.readouterr().out
    assert "Resumed at step 832" in printed and "differ" not in printed
    assert_same_run(run, reference)


@pytest.mark.parametrize(
    ("env_id", "changes"),
    [("CartPole-v1", {"num_steps": 5}), ("Acrobot-v1", {"shared_network": True, "num_envs": 3})],
)
def test_killed_run_equals_an_uninterrupted_one(env_id, changes, tmp_path):
    """Killed without notice while it goes on for ever, then resumed; Acrobot meets its limit of 500 steps."""
    settings = TINY | {"env_id": env_id, "anneal_lr": False, "total_timesteps": 10**8} | changes
    process = start(SCRIPT, *flags(**settings, runs=tmp_path / "killed"), cwd=tmp_path)
    kill_when(process, nth_evaluation(4), delay=0.03)
    (run,) = (tmp_path / "killed").iterdir()
    total = a2c.load_checkpoint(run)["step"] + 1700  # one more time limit for each Acrobot; whole iterations
    resume(run, "--total-timesteps", str(total))
    reference = train(tmp_path / "reference", **settings | {"total_timesteps": total})
    states = [a2c.load_checkpoint(x / "checkpoint.pt") for x in (run, reference)]
    assert checkpoint_difference(*states) is None
    states = [a2c.load_checkpoint(x / "best.pt") for x in (run, reference)]
    assert checkpoint_difference(*states, ignore=("args",)) is None  # that one may be older than the end
    curves = read_curves(run)
    assert curves == read_curves(reference) and len(curves["charts/episodic_return"]) > 3


def test_finished_run_goes_on_with_more_steps(tmp_path):
    """With a constant rate and an entry for each iteration it is the longer run from the start."""
    constant = {"anneal_lr": False, "log_interval": 1, "total_timesteps": 500}
    longer = train(tmp_path / "longer", **constant | {"total_timesteps": 900})
    run = train(tmp_path / "short", **constant)
    resume(run, "--total-timesteps", "900")
    ignore = ("best_return",)  # the last evaluation of the shorter one is an additional one
    states = [a2c.load_checkpoint(x) for x in (run, longer)]
    assert checkpoint_difference(*states, ignore=ignore) is None
    curves = [{tag: c for tag, c in read_curves(x).items() if "eval" not in tag} for x in (run, longer)]
    assert curves[0] == curves[1]
    assert json.loads((run / "args.json").read_text())["total_timesteps"] == 900


def test_finished_run_is_left_as_it_is(tmp_path, capsys):
    run = train(tmp_path, total_timesteps=200)
    before, curves = a2c.load_checkpoint(run), read_curves(run)
    resume(run)
    assert f"Resumed at step {before['step']}" in capsys.readouterr().out
    assert checkpoint_difference(before, a2c.load_checkpoint(run)) is None
    assert read_curves(run) == curves


def test_dict_observations_and_matrix_actions(tmp_path):
    """The environment itself checks that its actions are (2, 2) and within its space."""
    run = train(tmp_path, env_id="Actions/Nested-v0", total_timesteps=300)
    agent = a2c.Agent.load(run)
    assert agent.mask.shape == (4, 4) and agent.action_start.tolist() == [1] * 4
    resume(run, "--total-timesteps", "400")
    assert a2c.load_checkpoint(run)["step"] >= 400


def test_rewards_that_are_not_finite_end_the_run(tmp_path):
    """From the 41st step of each environment on; `refusal` sees to the exit code."""
    changes = {"env_id": "Actions/Poisoned-v0", "eval_interval": 0, "checkpoint_interval": 1}
    message = refusal(train, tmp_path, log_interval=1, **changes)
    assert "nan at step" in message and "rewards" in message and str(tmp_path) in message
    (run,) = tmp_path.iterdir()
    state = a2c.load_checkpoint(run)
    assert 0 < state["step"] <= 4 * 40
    assert all(tensor.isfinite().all() for tensor in state["agent"].values())


def test_checkpoint_of_another_script_is_refused(tmp_path):
    state = {"agent": a2c.Agent(3, [2]).state_dict(), "args": {}}
    ppo_continuous.save_checkpoint(tmp_path / "checkpoint.pt", state)
    (tmp_path / "args.json").write_text(json.dumps(dataclasses.asdict(a2c.Args(**TINY))))
    for words in (["--resume", str(tmp_path)], ["--evaluate", str(tmp_path)]):
        message = refusal(lambda words=words: a2c.main(a2c.parse_args(words)))
        assert str(tmp_path / "checkpoint.pt") in message and "a2c_cartpole.py" in message
    a2c.save_checkpoint(tmp_path / "own.pt", state)
    assert a2c.load_checkpoint(tmp_path / "own.pt")["agent"].keys() == state["agent"].keys()


def test_arguments_of_another_script_are_refused(tmp_path):
    (tmp_path / "args.json").write_text(json.dumps(dataclasses.asdict(ppo_continuous.Args())))
    message = refusal(a2c.parse_args, ["--resume", str(tmp_path)])
    assert str(tmp_path / "args.json") in message and "asynchronous" in message


# ------------------------------------------------------------------------------ asynchronous training


ASYNCHRONOUS = TINY | {"asynchronous": True, "num_workers": 2, "log_interval": 200}


def make_shared(args: a2c.Args, observation_size: int, sizes: list[int], first: list[int] | None = None):
    """Agent, optimizer and counts as all workers share them."""
    torch.manual_seed(3)
    agent = a2c.Agent(observation_size, sizes, args.shared_network, first)
    optimizer = a2c.RMSprop(agent.parameters(), args.learning_rate, args.rmsprop_alpha, args.rmsprop_eps)
    return agent, optimizer, torch.zeros(args.num_workers, len(a2c.COUNTS), dtype=torch.float64)


@pytest.fixture
def living_parent(monkeypatch):
    """For `work` in this process, which has no parent that it knows of."""
    parent = SimpleNamespace(is_alive=lambda: True)
    monkeypatch.setattr(a2c.multiprocessing, "parent_process", lambda: parent)
    return parent


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("anneal_lr", [True, False])
def test_worker_is_the_algorithm(index, anneal_lr, living_parent):
    """Played again with a plain loop; the other worker has made 7 steps, and the run 20 before it started."""
    settings = {"env_id": "Actions/Coded-v0", "num_envs": 4, "num_steps": 5, "total_timesteps": 160}
    args = a2c.Args(**ASYNCHRONOUS | settings | {"anneal_lr": anneal_lr, "seed": 2})
    agent, optimizer, counts = make_shared(args, 3, [3], [2])
    expected, reference, _ = make_shared(args, 3, [3], [2])
    counts[1 - index, 0] = 7
    stub_environments.LOG.clear()
    seed = 2**61 + index
    a2c.work(index, seed, args, agent, optimizer, counts, 20)
    log = list(stub_environments.LOG)

    torch.manual_seed(seed)
    envs = a2c.make_environments("Actions/Coded-v0", 2)
    steps, iterations, totals, finished = 0, 0, np.zeros(5), []
    while 27 + steps < 160:
        batch = a2c.collect_rollout(envs, expected, 5)
        coefficients = {"value": torch.tensor(args.vf_coef), "entropy": torch.tensor(args.ent_coef)}
        gradients, metrics = a2c.compute_gradients(expected, args, batch, coefficients)
        reference.learning_rate.fill_(1e-2 * (1 - (27 + steps) / 160 if anneal_lr else 1))
        reference.step(gradients)
        steps, iterations, totals = steps + 10, iterations + 1, totals + metrics.numpy()
    finished = [*envs.finished]
    assert steps == len(log) and 10 < len(finished) < 100
    for p, q in zip(agent.parameters(), expected.parameters()):
        assert torch.equal(p, q)
    assert difference_of_states(optimizer, reference) is None
    returns, lengths = np.sum(finished, axis=0)
    values = [steps, iterations, len(finished), returns, lengths, *totals]
    np.testing.assert_allclose(counts[index], values, rtol=1e-5, atol=1e-5)
    assert counts[1 - index].tolist() == [7] + [0] * (len(a2c.COUNTS) - 1)


def difference_of_states(one: a2c.RMSprop, other: a2c.RMSprop) -> str | None:
    return difference(one.state_dict(), other.state_dict())


def test_worker_ends_with_its_parent(living_parent):
    living_parent.is_alive = lambda: False
    args = a2c.Args(**ASYNCHRONOUS)
    agent, optimizer, counts = make_shared(args, 4, [2])
    a2c.work(0, 5, args, agent, optimizer, counts, 0)
    assert not counts.any()


def test_worker_in_a_process_of_its_own_moves_the_shared_parameters(living_parent):
    """To the bits that it moves them to in this process, which the process before shared with this one."""
    args = a2c.Args(**ASYNCHRONOUS | {"total_timesteps": 200, "shared_network": True})
    here, there = make_shared(args, 4, [2]), make_shared(args, 4, [2])
    initial = copy.deepcopy(here[0])
    a2c.work(1, 5, args, *here, 0)
    state = there[1].state_dict()
    tensors = [*there[0].parameters(), *there[0].buffers(), *state["learning_rate"], *state["mean_squares"]]
    for tensor in (*tensors, there[2]):
        tensor.share_memory_()
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=a2c.work, args=(1, 5, args, *there, 0), daemon=True)
    process.start()
    process.join(300)
    assert process.exitcode == 0
    assert there[2][1, 0] >= 200 and torch.equal(here[2], there[2])
    assert difference_of_states(here[1], there[1]) is None
    for p, q, before in zip(here[0].parameters(), there[0].parameters(), initial.parameters()):
        assert torch.equal(p, q) and not torch.equal(p, before)


class FakeContext:
    """Instead of processes: rows of counts, which are there one after the other, and how the workers end."""

    def __init__(self, stages: list[list[list[float]]], exit_codes: list[int | None]):
        self.stages, self.exit_codes, self.workers, self.started = [*stages], exit_codes, [], 0
        self.seeds = []

    def Process(self, target, args, daemon):
        assert target is a2c.work and daemon
        index, seed, _, agent, optimizer, self.counts, self.first_step = args
        assert index == len(self.workers)
        self.seeds.append(seed)
        self.agent, self.optimizer = agent, optimizer
        self.initial = copy.deepcopy((agent.state_dict(), optimizer.state_dict()))
        state = optimizer.state_dict()
        shared = [*agent.parameters(), *optimizer.parameters, *state["learning_rate"], *state["mean_squares"]]
        shared.append(self.counts)
        assert [*map(id, optimizer.parameters)] == [*map(id, agent.parameters())]
        assert all(tensor.is_shared() for tensor in shared)
        worker = SimpleNamespace(is_alive=lambda: True, exitcode=None, sentinel=index)
        stopped = []

        def begin():
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
            self.started += 1

        worker.start, worker.terminate = begin, lambda: stopped.append("terminate")
        worker.join, worker.stopped = lambda: stopped.append("join"), stopped
        self.workers.append(worker)
        return worker

    def wait(self, sentinels: list[int], timeout: float) -> None:
        """The next stage, and after the last one the end of the workers."""
        assert self.started == len(self.workers) == len(sentinels) and timeout > 0
        assert self.stages, "it goes on although all is done"
        self.counts.copy_(torch.tensor(self.stages.pop(0), dtype=torch.float64))
        with torch.no_grad():
            for tensor in (*self.agent.parameters(), *self.optimizer.mean_squares):
                tensor += 0.01
        if not self.stages:
            for worker, code in zip(self.workers, self.exit_codes):
                worker.exitcode = code


def fake_workers(monkeypatch, stages, exit_codes) -> FakeContext:
    context = FakeContext(stages, exit_codes)
    monkeypatch.setattr(a2c.multiprocessing, "get_context", lambda method: context)
    monkeypatch.setattr(a2c, "wait", context.wait)
    return context


def test_what_workers_counted_is_logged(tmp_path, monkeypatch):
    """The sums over the workers since the entry before, per iteration and per episode, if there were any."""
    stages = [[[90, 1, 0, 0, 0, 5, 5, 5, 5, 5], [100, 1, 0, 0, 0, 9, 9, 9, 9, 9]]]  # too little for an entry
    stages.append([[400, 3, 3, 30, 60, 1, 2, 3, 4, 5], [100, 5, 1, 50, 20, 7, 14, 21, 28, 35]])
    stages.append([[400, 3, 3, 30, 60, 1, 2, 3, 4, 5], [500, 9, 1, 50, 20, 11, 22, 33, 44, 55]])
    stages.append([[800, 5, 5, 60, 80, 5, 6, 7, 8, 9], [800, 11, 2, 70, 80, 15, 26, 37, 48, 59]])
    before = signal.getsignal(signal.SIGINT)
    context, evaluate, save = fake_workers(monkeypatch, stages, [0, 0]), a2c.evaluate, a2c.save_checkpoint

    def save_what_stands_still(path, state):
        saved = [*state["agent"].values(), *sum(state["optimizer"].values(), [])]
        assert len(saved) > 20 and not any(tensor.is_shared() for tensor in saved)
        save(path, state)

    monkeypatch.setattr(a2c, "save_checkpoint", save_what_stands_still)
    monkeypatch.setattr(a2c, "evaluate", lambda *x: (time.sleep(0.3), evaluate(*x))[1])
    run = train(tmp_path, **ASYNCHRONOUS)
    assert signal.getsignal(signal.SIGINT) == before
    curves = read_curves(run)
    for i, name in enumerate(a2c.METRICS, 1):
        assert curves[f"losses/{name}"] == {500: i, 900: i, 1600: 2}
    assert curves["charts/episodic_return"] == {500: 20, 900: 20, 1600: pytest.approx(50 / 3)}
    assert curves["charts/episodic_length"] == {500: 20, 900: 20, 1600: pytest.approx(80 / 3)}
    assert list(curves["eval/episodic_return"]) == [0, 500, 900, 1600]
    state = a2c.load_checkpoint(run)
    assert context.first_step == 0 and state["step"] == 1600
    assert difference(state["agent"], context.agent.state_dict()) is None
    assert difference(state["optimizer"], context.optimizer.state_dict()) is None
    assert state["elapsed"] > 0.6  # the workers go on while the first two evaluations last
    assert [worker.stopped for worker in context.workers] == [["terminate", "join"]] * 2
    before, saved = context.seeds, (state["agent"], state["optimizer"])
    context = fake_workers(monkeypatch, [[[300, *[1] * 9], [200, *[1] * 9]]], [0, 0])
    resume(run, "--total-timesteps", "2000")
    assert context.first_step == 1600 and a2c.load_checkpoint(run)["step"] == 2100
    assert difference(saved, context.initial) is None  # the workers go on where the run was saved
    assert len({*before, *context.seeds}) == 4  # nobody plays what another one played before


@pytest.mark.parametrize("value", [1.0, math.nan])
def test_failed_worker_ends_the_run_and_what_is_finite_is_saved(value, tmp_path, monkeypatch, capsys):
    stages = [[[200, 1, 0, 0, 0] + [value] * 5, [100, *[1] * 9]]]
    context = fake_workers(monkeypatch, stages, [0, 3])
    message = refusal(train, tmp_path, **ASYNCHRONOUS)
    assert "Worker 1 ended with exit code 3 at step 300" in capsys.readouterr().out
    (run,) = tmp_path.iterdir()
    assert (run / "checkpoint.pt").exists() == math.isfinite(value)
    if math.isfinite(value):
        assert f"--resume {run}" in message and a2c.load_checkpoint(run)["step"] == 300
    else:
        assert "policy_loss is nan at step 300" in message
    assert [worker.stopped for worker in context.workers] == [["terminate", "join"]] * 2


def test_worker_that_fails_at_once_logs_nothing(tmp_path, monkeypatch, capsys):
    fake_workers(monkeypatch, [[[0] * 10, [0] * 10]], [1, None])
    message = refusal(train, tmp_path, **ASYNCHRONOUS)
    assert "Worker 0 ended with exit code 1 at step 0" in capsys.readouterr().out
    assert "Interrupted at step 0" in message
    (run,) = tmp_path.iterdir()
    assert {*read_curves(run)} == {"eval/episodic_return", "eval/episodic_return_std"}


def test_metrics_of_workers_that_are_not_finite_end_the_run(tmp_path, monkeypatch):
    stages = [[[200, 1, 0, 0, 0] + [math.nan] * 5, [100, *[1] * 9]]]
    context = fake_workers(monkeypatch, stages, [None, None])
    assert "policy_loss is nan at step 300" in refusal(train, tmp_path, **ASYNCHRONOUS)
    assert [worker.stopped for worker in context.workers] == [["terminate", "join"]] * 2


def worker_processes(parent: int) -> list[int]:
    """Process ids of the workers of a process, in the order they were started in."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            command = (folder / "cmdline").read_bytes()
        except OSError:  # ended meanwhile
            continue
        if int(fields[1]) == parent and b"spawn_main" in command:
            found.append((int(fields[19]), int(folder.name)))  # when it was started, its id
    return [process for _, process in sorted(found)]


def eventually(condition, seconds: float = 120) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def has_ended(process: int) -> bool:
    """Also if nobody has asked for its exit code yet."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def assert_no_worker_is_left() -> None:
    assert not multiprocessing.active_children()
    if Path("/proc/self/stat").exists():
        assert not worker_processes(os.getpid())


def assert_finished(run: Path, total: int) -> None:
    """Every worker ends the iteration it is in: at most two rollouts too many."""
    state, curves = a2c.load_checkpoint(run), read_curves(run)
    assert total <= state["step"] < total + 4 * 8
    steps = list(curves["losses/policy_loss"])
    assert steps[-1] == state["step"] and (np.diff(steps)[:-1] >= 200).all()
    assert all(math.isfinite(x) for curve in curves.values() for x in curve.values())
    assert curves["charts/episodic_return"] and [*curves["eval/episodic_return"]][-1] == state["step"]
    agent = a2c.Agent.load(run)
    assert all(p.isfinite().all() for p in agent.parameters())


def test_asynchronous_run_finishes(tmp_path, capsys):
    run = train(tmp_path, **ASYNCHRONOUS)
    assert_no_worker_is_left()
    assert_finished(run, 1200)
    torch.manual_seed(1)
    initial = a2c.Agent(4, [2])
    assert all(not torch.equal(p, q) for p, q in zip(initial.parameters(), a2c.Agent.load(run).parameters()))
    assert "step " in capsys.readouterr().out


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc")
def test_killed_worker_is_reported_and_the_run_goes_on(tmp_path, capsys):
    settings = ASYNCHRONOUS | {"total_timesteps": 10**9, "eval_interval": 0, "checkpoint_interval": 10**9}
    process = start(SCRIPT, *flags(**settings, runs=tmp_path / "runs"), cwd=tmp_path)
    watchdog = threading.Timer(300, process.kill)  # so that nothing below waits for ever
    watchdog.start()
    try:
        line = next((line for line in process.stdout if "steps/s" in line), "")
        reported = int(re.search(r"step +([\d,]+)", line)[1].replace(",", ""))
        assert eventually(lambda: len(worker_processes(process.pid)) == 2)
        workers = worker_processes(process.pid)
        os.kill(workers[1], signal.SIGKILL)
        output = process.stdout.read()
        assert process.wait(300) == 1
    finally:
        watchdog.cancel()
        process.kill()
        process.stdout.close()
    message = re.search(r"Worker 1 ended with exit code -9 at step ([\d,]+), so the run ends", output)
    assert message and f"Interrupted at step {message[1]}; resume with" in output, output
    assert "Traceback" not in output
    assert all(eventually(lambda worker=worker: has_ended(worker)) for worker in workers)
    (run,) = (tmp_path / "runs").iterdir()
    step = a2c.load_checkpoint(run)["step"]
    assert step == int(message[1].replace(",", "")) >= reported >= 200

    resume(run, "--total-timesteps", str(step + 600))
    assert f"Resumed at step {step:,}" in capsys.readouterr().out
    assert_no_worker_is_left()
    state = a2c.load_checkpoint(run)
    assert step + 600 <= state["step"] < step + 600 + 4 * 8
    (*_, last), rates = read_curves(run)["losses/entropy"], read_curves(run)["charts/learning_rate"]
    assert last == state["step"] and 0 <= rates[last] <= 1.001e-2 * 600 / (step + 600)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_signal_saves_and_stops_the_workers(number, tmp_path):
    """Ctrl-C reaches the workers as well, which ignore it."""
    settings = ASYNCHRONOUS | {"total_timesteps": 10**9, "eval_interval": 0, "checkpoint_interval": 10**9}
    process = start(SCRIPT, *flags(**settings, runs=tmp_path / "runs"), cwd=tmp_path)
    watchdog = threading.Timer(100, process.kill)
    watchdog.start()
    try:
        next(line for line in process.stdout if "steps/s" in line)
        workers = worker_processes(process.pid)
        assert len(workers) == 2
        for one in (*workers, process.pid) if number == signal.SIGINT else (process.pid,):
            os.kill(one, number)
        output = process.stdout.read()
        assert process.wait(100) == 1 and "Traceback" not in output, output
    finally:
        watchdog.cancel()
        process.kill()
        process.stdout.close()
    assert all(eventually(lambda worker=worker: has_ended(worker)) for worker in workers)
    (run,) = (tmp_path / "runs").iterdir()
    step = a2c.load_checkpoint(run)["step"]
    assert step >= 200 and f"Interrupted at step {step:,}; resume with: python a2c_cartpole.py" in output
    assert "Worker" not in output


# ------------------------------------------------------------------------------------------- learning


def test_it_learns(tmp_path):
    settings = {"num_envs": 32, "num_steps": 16, "learning_rate": 5e-3, "total_timesteps": 40_000}
    intervals = {"log_interval": 2000, "eval_interval": 10**9, "checkpoint_interval": 10**9}
    run = train(tmp_path, **settings, **intervals, eval_episodes=10)
    evaluations = [*read_curves(run)["eval/episodic_return"].values()]
    assert len(evaluations) == 2 and evaluations[0] < 150 < evaluations[1]
