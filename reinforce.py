"""REINFORCE (Williams 1992) with the usual estimators of the policy gradient, in one file.

Every iteration plays N whole episodes, one in each environment, and takes one step of Adam along the mean of

    g = sum over t of  Psi_t grad log pi(a_t|s_t),

whose expectation is the gradient of the expected return. `--estimator` chooses Psi, from the list of Schulman
et al. 2016, section 2:

    total_return   G_0, the discounted return of the whole episode (Williams 1992)
    reward_to_go   G_t, the discounted return from t on
    baseline       G_t - V(s_t)
    q_value        r_t + gamma V(s_t+1)
    advantage      GAE(lambda) (Schulman et al. 2016, equation 16)
    td_residual    r_t + gamma V(s_t+1) - V(s_t)

The first three are unbiased for any V, except where a time limit cuts an episode, and each is usually less
noisy than the one before. The other three have the bias of V; `advantage` is the least noisy of all once V is
learned. The noise is logged: the trace of the covariance of g over the episodes of a batch.

    python reinforce.py --estimator baseline --seed 3
    python reinforce.py --resume runs/CartPole-v1__reinforce__3__20261120-101500
    python reinforce.py --evaluate runs/CartPole-v1__reinforce__3__20261120-101500 --capture-video

Mean of the last 100 episodes of 300k steps: CartPole-v1 500 in each of 5 seeds (benchmark/results/classic).
Beyond the paper: a critic, normalised observations and Psi, and g divided by the mean length of the episodes
before, because Adam is slow to follow gradients that grow with the episodes. As usual in practice, g lacks
the factor gamma^t of the gradient of the discounted return, except for G_0: `--discount-states` adds it.
The algorithm comes first; the plumbing after `train` is shared by all scripts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import random
import signal
import sys
import time
import warnings
import zipfile
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple, get_type_hints

import gymnasium as gym
import numpy as np
import threadpoolctl
import torch
import torch.nn as nn
import typeguard
import tyro
from torch import Tensor
from torch.nn.utils import parameters_to_vector
from tqdm import tqdm

ESTIMATORS = Literal["total_return", "reward_to_go", "baseline", "q_value", "advantage", "td_residual"]


@dataclasses.dataclass
class Args:
    # Run
    env_id: str = "CartPole-v1"  # of Gymnasium, Discrete or a Box; module:Name-v0 imports module first
    seed: int = 1  # seed of the environments, the networks and the sampling
    total_timesteps: int = 300_000  # environment steps; the batch that reaches them is finished
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # of the networks; auto: the CPU, faster here
    eval_interval: int = 100_000  # environment steps between evaluations of the deterministic policy; 0: none
    eval_episodes: int = 10  # episodes of an evaluation
    checkpoint_interval: int = 100_000  # environment steps between checkpoints
    checkpoint_minutes: float = 10  # minutes after which a checkpoint is saved, too
    run_name: str | None = None  # fixed name of the run directory; resumes the run if it exists
    resume: str | None = None  # run directory to resume; its arguments are loaded first
    evaluate: str | None = None  # run directory or checkpoint file to evaluate instead of training

    # Algorithm
    num_envs: int = 8  # N, episodes per batch, each in an environment of its own
    max_episode_steps: int = 1000  # longer episodes are cut here, and bootstrapped as at a time limit
    estimator: ESTIMATORS = "advantage"  # Psi, the weights of the gradients of the log-probabilities
    norm_returns: bool = True  # normalise Psi over a batch, to mean 0 and standard deviation 1
    discount_states: bool = False  # multiply Psi_t by gamma^t, except total_return, which has it already
    gamma: float = 0.99  # discount factor, in [0, 1]
    gae_lambda: float = 0.95  # lambda of GAE, in [0, 1], for estimator advantage and the critic's targets
    learning_rate: float = 3e-3  # step size of the policy's Adam at the start
    critic_learning_rate: float = 1e-3  # step size of the critic's Adam at the start
    anneal_lr: bool = True  # lower both learning rates linearly to 0 over total_timesteps
    critic_epochs: int = 5  # passes of the critic over a batch
    minibatch_size: int = 256  # transitions per step of the critic
    log_std_init: float = -0.5  # Box: log of the initial standard deviation, in units of half the range

    # Logging
    exp_name: str = Path(__file__).stem  # name of the experiment, part of the name of the run directory
    runs: str = "runs"  # folder of the run directories
    capture_video: bool = False  # record the first episode of each evaluation
    track: bool = False  # log to Weights & Biases too
    wandb_project_name: str = "policy-optimization"  # project in Weights & Biases
    wandb_entity: str | None = None  # team in Weights & Biases

    def __post_init__(self) -> None:
        check(self)


# ----------------------------------------------------------------------------------------------- agent


def mlp(sizes: list[int], output_gain: float) -> nn.Sequential:
    """Linear layers with tanh between them; orthogonal weights of gain sqrt(2), the last `output_gain`."""
    layers = []
    for inputs, outputs in zip(sizes, sizes[1:]):
        linear = nn.Linear(inputs, outputs)
        nn.init.orthogonal_(linear.weight, math.sqrt(2))
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.Tanh()]
    nn.init.orthogonal_(linear.weight, output_gain)
    return nn.Sequential(*layers[:-1])


class Agent(nn.Module):
    """Policy and value function of normalised observations, with the statistics and action bounds.

    The policy is categorical for Discrete actions. For a Box it is Gaussian, and a raw action in [-1, 1]
    covers the range of the environment. Actions are (..., A), with A = 1 for Discrete.
    """

    def __init__(self, observation_size: int, action_space: gym.Space, log_std: float = 0.0):
        super().__init__()
        self.discrete = isinstance(action_space, gym.spaces.Discrete)
        if self.discrete:
            outputs, low = int(action_space.n), torch.tensor(int(action_space.start))
            high = low + outputs - 1
        else:
            low, high = (torch.tensor(x, dtype=torch.float32) for x in (action_space.low, action_space.high))
            outputs = low.numel()
            self.log_std = nn.Parameter(torch.full((outputs,), log_std))
        self.actor = mlp([observation_size, 64, 64, outputs], output_gain=0.01)
        self.critic = mlp([observation_size, 64, 64, 1], output_gain=1.0)
        self.observation_statistics = RunningStatistics((observation_size,))
        self.return_statistics = RunningStatistics(())
        self.register_buffer("action_low", low)
        self.register_buffer("action_high", high)

    def policy_parameters(self) -> list[nn.Parameter]:
        return [*self.actor.parameters(), *([] if self.discrete else [self.log_std])]

    def value(self, observations: Tensor) -> Tensor:
        """V (...) of normalised observations (..., D); the critic's unit is the std of returns."""
        return self.critic(observations).squeeze(-1) * (self.return_statistics.variance + 1e-8).sqrt()

    def log_prob(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Log-probability, or log density, (...) of actions (..., A) at normalised observations (..., D)."""
        output = self.actor(observations)
        if self.discrete:
            return output.log_softmax(-1).gather(-1, actions).squeeze(-1)
        return gaussian_log_prob(actions, output, self.log_std)

    def entropy(self, observations: Tensor) -> Tensor:
        """Mean entropy of the policy, in nats, at normalised observations (B, D)."""
        if self.discrete:
            log_probs = self.actor(observations).log_softmax(-1)
            return -(log_probs.exp() * log_probs).sum(-1).mean()
        return (self.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum()

    @classmethod
    def load(cls, run: str | Path) -> Agent:
        """The agent of a run directory or a checkpoint file, on the CPU."""
        state = load_checkpoint(run)["agent"]
        low, high = state["action_low"].numpy(), state["action_high"].numpy()
        if "log_std" in state:
            space = gym.spaces.Box(low, high)
        else:
            space = gym.spaces.Discrete(int(high - low) + 1)  # its start is in the state
        agent = cls(len(state["observation_statistics.mean"]), space)
        agent.load_state_dict(state)
        return agent


# ------------------------------------------------------------------------------------------- equations


def compute_gae(
    rewards: Tensor, values: Tensor, next_values: Tensor, terminated: Tensor, done: Tensor,
    gamma: float, gae_lambda: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Advantages and value targets (T, N) by GAE (Schulman et al. 2016, equation 16); all inputs (T, N).

    `next_values[t]` is V of the observation after step t, the final one where the episode ended there.
    `terminated` stops the bootstrap, `done` (terminated or truncated) the sum. Targets: advantages + values.
    """
    deltas = rewards + gamma * next_values * (1 - terminated.to(values.dtype)) - values
    advantages = discounted_sum(deltas, gamma * gae_lambda * (1 - done.to(values.dtype)))
    return advantages, advantages + values


def policy_gradient_weights(
    rewards: Tensor, values: Tensor, next_values: Tensor, terminated: Tensor, done: Tensor,
    gamma: float, gae_lambda: float, estimator: str,
) -> Tensor:  # fmt: skip
    """Psi (T, N), the weights of the gradients of log-probabilities; inputs (T, N) as in compute_gae.

    An episode that is truncated, or that goes on past the last row, is bootstrapped: the rewards to come are
    worth `next_values`.
    """
    terminated, done = terminated.to(values.dtype), done.to(values.dtype)
    if estimator == "advantage":
        return compute_gae(rewards, values, next_values, terminated, done, gamma, gae_lambda)[0]
    q_values = rewards + gamma * (1 - terminated) * next_values
    if estimator == "q_value":
        return q_values
    if estimator == "td_residual":
        return q_values - values
    # G_t = r_t + gamma G_t+1 inside an episode, and q_value in its last row.
    last = done.clone()
    last[-1] = 1
    reward_to_go = discounted_sum(torch.where(last > 0, q_values, rewards), gamma * (1 - last))
    if estimator == "reward_to_go":
        return reward_to_go
    if estimator == "baseline":
        return reward_to_go - values
    # total_return: all rows of an episode have the reward to go of its first row.
    rows = torch.arange(len(done), device=done.device)[:, None].expand(done.shape)
    begins = torch.cat((torch.ones_like(done[:1]), done[:-1]))
    first_row = torch.where(begins > 0, rows, 0).cummax(0).values
    return reward_to_go.gather(0, first_row)


def gaussian_log_prob(actions: Tensor, means: Tensor, log_std: Tensor) -> Tensor:
    """Log density (...) of actions (..., A), independent in each dimension."""
    return (-0.5 * ((actions - means) / log_std.exp()) ** 2 - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


def episode_gradients(
    agent: Agent, observations: Tensor, actions: Tensor, weights: Tensor, lengths: list[int]
) -> Tensor:
    """g (N, P), the gradient estimate of each episode.

    Normalised observations (T, N, D), actions (T, N, A) and weights (T, N), of which lengths[n] rows count.
    """
    parameters, gradients = agent.policy_parameters(), []
    for n, length in enumerate(lengths):
        log_probs = agent.log_prob(observations[:length, n], actions[:length, n])
        objective = (weights[:length, n] * log_probs).sum()
        gradients.append(parameters_to_vector(torch.autograd.grad(objective, parameters)))
    return torch.stack(gradients)


def fit_critic(
    agent: Agent, optimizer: torch.optim.Optimizer, observations: Tensor, returns: Tensor, args: Args
) -> Tensor:
    """Several epochs of minibatch steps on observations (B, D) and returns (B,); the mean loss."""
    targets = returns / (agent.return_statistics.variance + 1e-8).sqrt()
    losses = []
    for _ in range(args.critic_epochs):
        for indices in torch.randperm(len(targets)).to(targets.device).split(args.minibatch_size):
            values = agent.critic(observations[indices]).squeeze(-1)
            loss = 0.5 * (values - targets[indices]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    return torch.stack(losses).mean()


# -------------------------------------------------------------------------------------------- training


class Rollout(NamedTuple):
    """One episode in each of N environments; T is the length of the longest, rows past an end are padding."""

    observations: np.ndarray  # (T, N, D)
    actions: np.ndarray  # (T, N, A), raw
    next_observations: np.ndarray  # (T, N, D)
    rewards: np.ndarray  # (T, N)
    terminated: np.ndarray  # (T, N)
    done: np.ndarray  # (T, N), terminated or truncated


def collect_episodes(envs: Environments, policy: FrozenPolicy) -> Rollout:
    """Plays one whole episode in each environment; ending all after a few steps would favour short ones."""
    envs.reset()
    steps = []
    while envs.playing.any():
        observations = envs.observations
        actions = policy.sample(observations)
        steps.append((observations, actions, *envs.step(policy.to_environment(actions))))
    return Rollout(*map(np.array, zip(*steps)))


def train(args: Args, run: Run) -> None:
    """REINFORCE (Williams 1992), on batches of whole episodes."""
    device = torch.device("cpu" if args.device == "auto" else args.device)
    envs = Environments(args.env_id, args.num_envs, args.max_episode_steps)
    agent = Agent(envs.observations.shape[1], envs.action_space, args.log_std_init).to(device)
    parameters = agent.policy_parameters()
    optimizer = torch.optim.Adam(parameters, args.learning_rate, eps=1e-5, maximize=True)
    critic_optimizer = torch.optim.Adam(agent.critic.parameters(), args.critic_learning_rate, eps=1e-5)
    run.start(agent=agent, envs=envs, optimizer=optimizer, critic_optimizer=critic_optimizer)

    for progress in run.iterations():
        if args.anneal_lr:
            optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - progress)
            critic_optimizer.param_groups[0]["lr"] = args.critic_learning_rate * (1 - progress)

        # 1. Play.
        mean_length = envs.statistics().get("charts/episodic_length")  # of the episodes before this batch
        policy = FrozenPolicy(agent)
        rollout = collect_episodes(envs, policy)
        lengths = rollout.done.argmax(0) + 1  # (N,)
        valid = np.arange(len(rollout.done))[:, None] < lengths  # (T, N), the rest is padding
        run.step += int(lengths.sum())
        if progress == 0:
            # The first rollout is played unnormalised and scored normalised. The two policies nearly agree:
            # the last layer of the actor starts with gain 0.01, so its output is near 0 for any input.
            agent.observation_statistics.update(rollout.observations[valid])
            policy = FrozenPolicy(agent)

        # 2. Convert the rollout to tensors.
        observations = torch.from_numpy(policy.normalize(rollout.observations)).to(device)
        next_observations = torch.from_numpy(policy.normalize(rollout.next_observations)).to(device)
        actions = torch.from_numpy(rollout.actions).to(device)
        rewards, terminated, done = (torch.from_numpy(x).to(device) for x in rollout[-3:])
        with torch.no_grad():
            values, next_values = agent.value(observations), agent.value(next_observations)
        transitions = rewards, values, next_values, terminated, done, args.gamma, args.gae_lambda
        weights = policy_gradient_weights(*transitions, args.estimator)
        _, returns = compute_gae(*transitions)
        mask = torch.from_numpy(valid).to(device)
        if args.discount_states and args.estimator != "total_return":
            weights = weights * args.gamma ** torch.arange(len(weights), device=device)[:, None]
        if args.norm_returns:
            # In float32, the mean of equal numbers is not always their value; MPS has no float64.
            psi = weights[mask].cpu().double()
            weights = ((weights.cpu() - psi.mean()) / (psi.std(correction=0) + 1e-8)).float().to(device)

        # 3. Learn: one step of the policy, then several epochs of the critic.
        gradients = episode_gradients(agent, observations, actions, weights, lengths.tolist())
        # The mean length of this batch itself would give batches of short episodes more weight.
        gradients /= mean_length or lengths.mean()
        gradient = gradients.mean(0)
        for p, part in zip(parameters, gradient.split([p.numel() for p in parameters])):
            p.grad = part.view_as(p)
        optimizer.step()
        observations, returns, values = observations[mask], returns[mask], values[mask]
        agent.return_statistics.update(returns.cpu().numpy())
        value_loss = fit_critic(agent, critic_optimizer, observations, returns, args)
        if progress > 0:
            agent.observation_statistics.update(rollout.observations[valid])

        # 4. Log.
        errors = (returns - values).var(correction=0)
        explained_variance = 1 - errors / returns.var(correction=0).clamp(min=1e-8)
        with torch.no_grad():
            losses = {"value_loss": value_loss, "entropy": agent.entropy(observations)}
        losses |= {"grad_norm": gradient.norm(), "explained_variance": explained_variance}
        if args.num_envs > 1:
            # The trace of the covariance of g over episodes; that of their mean is 1/N of it.
            losses["gradient_variance"] = gradients.var(0).sum()
        charts = {"charts/learning_rate": optimizer.param_groups[0]["lr"]}
        run.log({f"losses/{name}": x for name, x in losses.items()} | charts | envs.statistics())


# ======================================================================================================
# Plumbing, the same in all scripts wherever it serves the same: limits of the flags, numerics, environments
# and evaluation, runs, files, command line. Nothing below is about the algorithm.

LIMITS = {  # the interval that flags have to lie in
    "[1, inf)": "total_timesteps num_envs max_episode_steps critic_epochs minibatch_size eval_episodes "
    "checkpoint_interval",
    "[0, inf)": "eval_interval",
    "(0, inf)": "learning_rate critic_learning_rate checkpoint_minutes",
    "(-inf, inf)": "log_std_init",
    "[0, 1]": "gamma gae_lambda",
    "[0, 4294967296)": "seed",
}


def check(args: Args) -> None:
    """Raises ValueError, with a sentence, for flags that cannot work."""
    check_limits(args)
    alone = args.estimator == "total_return" or args.max_episode_steps == 1
    if args.num_envs == 1 and args.norm_returns and alone:
        raise ValueError("one return, normalised, is 0: raise num_envs or say --no-norm-returns")


def check_limits(args: Args) -> None:
    """Raises ValueError for a flag outside of LIMITS; None lies in all of them."""
    for interval, names in LIMITS.items():
        low, high = map(float, interval[1:-1].split(", "))
        for name in names.split():
            value = getattr(args, name)
            on_bound = (interval[0] == "[" and value == low) or (interval[-1] == "]" and value == high)
            if value is not None and not (low < value < high or on_bound):  # NaN is in no interval
                raise ValueError(f"{name} must lie in {interval}, got {value}")
    if sum(x is not None for x in (args.resume, args.evaluate, args.run_name)) > 1:
        raise ValueError("resume, evaluate and run_name exclude each other")


# ------------------------------------------------------------------------------------------- numerics


class RunningStatistics(nn.Module):
    """Mean and variance of all rows so far, as buffers, merged batch by batch (Chan et al. 1979)."""

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("variance", torch.ones(shape))
        self.register_buffer("count", torch.zeros(()))

    def update(self, rows: np.ndarray) -> None:
        """Adds rows (..., *shape)."""
        rows = rows.reshape(-1, *self.mean.shape)
        total = self.count.item() + len(rows)
        weight = len(rows) / total
        mean, variance = self.mean.cpu().numpy(), self.variance.cpu().numpy()
        delta = rows.mean(0, dtype=np.float64) - mean
        within = (1 - weight) * variance + weight * rows.var(0, dtype=np.float64)
        self.mean.copy_(torch.as_tensor(mean + weight * delta).float())
        self.variance.copy_(torch.as_tensor(within + weight * (1 - weight) * delta**2).float())
        self.count.fill_(total)


def discounted_sum(x: Tensor, decay: Tensor) -> Tensor:
    """y with y[t] = x[t] + decay[t] y[t + 1] along the first dimension, and y = 0 past the end.

    It computes the same as this loop over T rows,

        y = x.clone()
        for t in reversed(range(len(x) - 1)):
            y[t] += decay[t] * y[t + 1]

    in ceil(log2 T) passes over whole tensors, by doubling (Hillis and Steele 1986): before pass k = 0, 1, ...
    x[t] holds the terms t to t + 2^k - 1 of y[t].
    """
    shift = 1
    while shift < len(x):
        x = torch.cat((x[:-shift] + decay[:-shift] * x[shift:], x[-shift:]))
        decay = torch.cat((decay[:-shift] * decay[shift:], decay[-shift:]))
        shift *= 2
    return x


class FrozenPolicy:
    """A copy of the policy in NumPy, which has a fraction of the overhead of PyTorch for a few rows.

    If the actor has other layers than Linear and Tanh, PyTorch evaluates it, and it is not a copy.
    """

    def __init__(self, agent: Agent):
        def array(tensor: Tensor) -> np.ndarray:
            return tensor.detach().cpu().numpy().copy()

        self.mean = array(agent.observation_statistics.mean)
        self.scale = 1 / np.sqrt(array(agent.observation_statistics.variance) + 1e-8)
        self.discrete, self.low, self.high = agent.discrete, array(agent.action_low), array(agent.action_high)
        if not self.discrete:
            # A dimension without two bounds is not scaled; "no bound" may be infinite, or the largest float.
            bounded = np.maximum(-self.low, self.high) < 1e10
            low, high = np.where(bounded, self.low, -1), np.where(bounded, self.high, 1)
            self.action_center, self.action_scale = (low + high) / 2, (high - low) / 2
            self.std = array(agent.log_std.exp())
        self.actor, self.device = agent.actor, agent.action_low.device
        layers = agent.actor if type(agent.actor) is nn.Sequential else [agent.actor]
        self.layers = []  # (weight, bias) of a Linear, None for a Tanh; empty: PyTorch evaluates the actor
        if all(type(layer) in (nn.Linear, nn.Tanh) for layer in layers):
            for layer in layers:
                bias = 0 if getattr(layer, "bias", None) is None else array(layer.bias)
                self.layers.append(None if type(layer) is nn.Tanh else (array(layer.weight).T, bias))

    def normalize(self, observations: np.ndarray) -> np.ndarray:
        """Observations (..., D) less their mean, over their standard deviation, clipped to [-10, 10]."""
        x = (observations - self.mean) * self.scale
        return np.minimum(np.maximum(x, -10), 10).astype(np.float32)  # np.clip, at less overhead

    def output(self, observations: np.ndarray) -> np.ndarray:
        """Logits, or mean raw actions, (N, A') at observations (N, D) of the environment."""
        x = self.normalize(observations)
        if not self.layers:
            with torch.inference_mode():
                return self.actor(torch.as_tensor(x, device=self.device)).cpu().numpy()
        for layer in self.layers:
            x = np.tanh(x) if layer is None else x @ layer[0] + layer[1]
        return x

    def sample(self, observations: np.ndarray) -> np.ndarray:
        """Actions (N, A) drawn from the policy, with the noise of torch's generator."""
        output = self.output(observations)
        if self.discrete:
            # With Gumbel noise, -log of exponential noise, the largest sum is a draw from the softmax.
            noise = -torch.empty(output.shape).exponential_().log().numpy()
            return (output + noise).argmax(-1, keepdims=True)
        return output + self.std * torch.randn(output.shape).numpy()

    def mode(self, observations: np.ndarray) -> np.ndarray:
        """The likeliest actions (N, A)."""
        output = self.output(observations)
        return output.argmax(-1, keepdims=True) if self.discrete else output

    def to_environment(self, actions: np.ndarray) -> np.ndarray | list[int]:
        """Actions (N, A) for N environments: counted from the start of Discrete, or scaled and clipped."""
        if self.discrete:
            return (actions[:, 0] + self.low).tolist()
        actions = actions.reshape(-1, *self.low.shape)
        return np.minimum(np.maximum(actions * self.action_scale + self.action_center, self.low), self.high)


# --------------------------------------------------------------------------- environments and evaluation

EVALUATION_SEED = 1_000_000_000  # added to --seed in evaluations; training episodes have smaller seeds
MAX_EPISODE_STEPS = 10_000  # of an environment that has no time limit of its own


def make_env(env_id: str, render_mode: str | None = None) -> gym.Env:
    """An environment with flat observations and Discrete or Box actions, or SystemExit with a sentence."""
    if env_id.count(":") > 1:
        raise SystemExit(f"Cannot make the environment {env_id}: write Name-v0, or module:Name-v0")
    try:
        keywords = {"render_mode": render_mode} if render_mode else {}
        env = gym.make(env_id, disable_env_checker=True, **keywords)
    except (gym.error.Error, ModuleNotFoundError, TypeError) as error:
        if isinstance(error, TypeError) and not render_mode:  # an error in the environment itself
            raise
        raise SystemExit(f"Cannot make the environment {env_id}: {error}")
    space = env.action_space
    if not isinstance(space, gym.spaces.Discrete | gym.spaces.Box):
        raise SystemExit(f"{env_id} has {space} actions, and this script needs Discrete or a Box")
    if isinstance(space, gym.spaces.Box) and np.issubdtype(space.dtype, np.integer):
        env = gym.wrappers.TransformAction(env, lambda action: np.rint(action).astype(space.dtype), space)
    if not env.observation_space.is_np_flattenable:
        raise SystemExit(f"{env_id} has {env.observation_space} observations, which cannot be flattened")
    if not isinstance(env.observation_space, gym.spaces.Box) or len(env.observation_space.shape) != 1:
        env = gym.wrappers.FlattenObservation(env)
    if env.spec.max_episode_steps is None:
        env = gym.wrappers.TimeLimit(env, MAX_EPISODE_STEPS)
    if render_mode:
        hint = "without a display, set MUJOCO_GL=egl or MUJOCO_GL=osmesa for MuJoCo"
        with explained(f"Cannot record {env_id}, {hint}"):
            env.reset()
            env.render()
    return env


def reset(env: gym.Env, seed: int) -> np.ndarray:
    """Begins an episode. Seeds the global generators too, since some environments draw from these."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    return env.reset(seed=seed)[0]


class Environments:
    """N environments side by side, each of which plays one whole episode after every reset.

    A reset draws the seeds of the episodes from torch's generator, which a checkpoint holds. Between batches
    no episode is under way, so the environments have no state that a checkpoint needs.
    """

    def __init__(self, env_id: str, num_envs: int, max_episode_steps: int):
        self.envs = [gym.wrappers.TimeLimit(make_env(env_id), max_episode_steps) for _ in range(num_envs)]
        self.action_space = self.envs[0].action_space
        if len(shape := self.envs[0].unwrapped.observation_space.shape or ()) > 1:
            say(f"Observations of shape {shape} are flattened; for images, Agent needs convolutions")
        self.observations = np.zeros((num_envs, *self.envs[0].observation_space.shape))
        self.finished = deque(maxlen=100)  # returns and lengths of the last episodes

    def __len__(self) -> int:
        return len(self.envs)

    def reset(self) -> None:
        seeds = torch.randint(EVALUATION_SEED, (len(self),)).tolist()
        self.observations = np.array([reset(env, seed) for env, seed in zip(self.envs, seeds)], np.float64)
        self.playing = np.ones(len(self), bool)
        self.returns, self.lengths = np.zeros(len(self)), np.zeros(len(self), np.int64)

    def step(self, actions: np.ndarray | list[int]) -> tuple[np.ndarray, ...]:
        """Returns next observations (N, D), rewards, terminated and done (N,).

        An environment whose episode has ended is not stepped: its observation stays, the rest is 0.
        """
        next_observations, rewards = self.observations.copy(), np.zeros(len(self), np.float32)
        terminated, truncated = np.zeros((2, len(self)), bool)
        for i in self.playing.nonzero()[0]:
            next_observations[i], rewards[i], terminated[i], truncated[i], _ = self.envs[i].step(actions[i])
        done = terminated | truncated
        self.observations = next_observations
        self.returns += rewards
        self.lengths += self.playing
        self.playing &= ~done
        # All at once: in the order of their ends, the deque would drop the short episodes of a batch first.
        if not self.playing.any():
            self.finished.extend(zip(self.returns.tolist(), self.lengths.tolist()))
        return next_observations, rewards, terminated, done

    def statistics(self) -> dict[str, float]:
        """Mean return and length of the last 100 episodes, to be logged; empty before the first one ends."""
        names = "charts/episodic_return", "charts/episodic_length"
        return dict(zip(names, np.mean(self.finished, axis=0))) if self.finished else {}

    def state_dict(self) -> dict:
        return {"finished": list(self.finished)}

    def load_state_dict(self, state: dict) -> None:
        self.finished.extend(state["finished"])

    def close(self) -> None:
        for env in self.envs:
            env.close()


def evaluate(
    agent: Agent, env_id: str, episodes: int, seed: int, videos: Path | None = None, video_name: str = "video"
) -> np.ndarray:
    """Undiscounted returns (episodes,) of the deterministic policy; episode i starts from seed + i.

    Statistics and generators stay as they are. If `videos` is a folder, the first episode is recorded there.
    """
    generators = random.getstate(), np.random.get_state()
    env = make_env(env_id, render_mode="rgb_array" if videos else None)
    if videos:
        with explained(f"Cannot write videos to {videos}"):
            videos.mkdir(parents=True, exist_ok=True)
        env = gym.wrappers.RecordVideo(env, str(videos), lambda episode: episode == 0, name_prefix=video_name)
    policy = FrozenPolicy(agent)
    returns = np.zeros(episodes)
    for episode in range(episodes):
        observation, done = reset(env, seed + episode), False
        while not done:
            action = policy.to_environment(policy.mode(observation[None]))[0]
            observation, reward, terminated, truncated, _ = env.step(action)
            returns[episode] += reward
            done = terminated or truncated
    env.close()
    random.setstate(generators[0])
    np.random.set_state(generators[1])
    return returns


# ----------------------------------------------------------------------------------------------- runs


class Run:
    """One run: its directory, curves, checkpoints and videos; progress, interruption and resuming.

    `train` passes everything that has state to `start`, by name, and then loops over `iterations`.
    """

    def __init__(self, args: Args):
        self.args, self.path, self.state = args, make_directory(args), {}
        # A copy, since `train` may change args; without the flags that say where the run is.
        self.arguments = dataclasses.asdict(args) | {"resume": None, "evaluate": None, "run_name": None}
        self.step = self.last_step = 0  # environment steps, now and before this iteration
        self.elapsed, self.best_return = 0.0, -math.inf  # seconds of training, best evaluation
        self.started = self.saved_at = self.shown_at = time.perf_counter()
        self.logged = self.progress = self.writer = self.wandb = None
        self.interrupted = False
        self.checkpoint = load_checkpoint(self.path) if any(self.path.glob("checkpoint*.pt")) else {}
        if self.checkpoint:
            saved = self.checkpoint["args"]
            refuse_changes(saved, self.arguments, MAY_CHANGE)
            self.step, self.elapsed = self.checkpoint["step"], self.checkpoint["elapsed"]
            self.best_return = self.checkpoint["best_return"]
            if args.total_timesteps < saved["total_timesteps"] and args.total_timesteps <= self.step:
                raise SystemExit(f"{self.path} is at step {self.step:,} already; raise --total-timesteps")
        write_file(self.path / "args.json", json.dumps(self.arguments, indent=2))
        say(f"Run directory: {self.path}")
        self.handlers = {}  # the ones before, by signal
        with contextlib.suppress(ValueError):  # outside of the main thread, Python refuses handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self.handlers[number] = signal.signal(number, self.interrupt)

    def interrupt(self, number: int, frame) -> None:
        """Handles Ctrl-C and SIGTERM."""
        if self.interrupted and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.interrupted = True
        # os.write, because print fails if the signal arrives during another print.
        os.write(2, b"\nThe run ends after this iteration and a checkpoint; Ctrl-C again ends it at once\n")

    @property
    def advice(self) -> str:
        module = f" --env-id {self.args.env_id}" if ":" in self.args.env_id else ""
        return f"resume with: python {Path(__file__).name} --resume {self.path}{module}"

    def start(self, **state) -> None:
        """Takes, by name, everything with state: tensors, and objects with state_dict and load_state_dict.

        Restores the last checkpoint if there is one, opens the logs, and evaluates a new run.
        """
        self.state = state
        if self.checkpoint:
            torch.set_rng_state(self.checkpoint["generator"])
            for name, x in state.items():
                if name not in self.checkpoint:
                    raise SystemExit(f"The checkpoint of {self.path} has no {name}; was the script changed?")
                restore = x.copy_ if isinstance(x, Tensor) else x.load_state_dict
                restore(self.checkpoint.pop(name))
            say(f"Resumed at step {self.step:,}")
        elif self.args.resume:
            say(f"{self.path} has no checkpoint yet, so the run begins anew")
        from torch.utils.tensorboard import SummaryWriter  # not above: it takes a second

        if self.args.track:
            import wandb

            place = {"project": self.args.wandb_project_name, "entity": self.args.wandb_entity}
            place |= {"id": self.path.name, "resume": "allow", "dir": str(self.path.parent)}
            wandb.init(**place, config=self.arguments)
            self.wandb = wandb
        # Points after the checkpoint are purged; they will be logged again.
        self.writer = SummaryWriter(str(self.path), purge_step=self.step + 1 if self.step else 0)
        if self.step == 0 and self.args.eval_interval:
            self.evaluate()

    def iterations(self, batch_size: int = 0) -> Iterator[float]:
        """Yields the fraction of the run that is done; evaluates and saves after an iteration if it is time.

        With a batch_size, an iteration counts as that many steps, and the run is rounded up to whole
        iterations. Without one, `train` adds to `step` itself.
        """
        args, total = self.args, self.args.total_timesteps
        total = math.ceil(total / batch_size) * batch_size if batch_size else total
        # disable=None: shown on a terminal only
        self.progress = tqdm(total=total, initial=self.step, unit=" steps", disable=None)
        while self.step < total:
            if self.interrupted:
                self.save("checkpoint.pt")
                raise SystemExit(f"Interrupted at step {self.step:,}; {self.advice}")
            self.last_step, self.started = self.step, time.perf_counter()
            self.step += batch_size
            yield self.last_step / total
            self.elapsed += time.perf_counter() - self.started
            last = self.step >= total
            if args.eval_interval and (last or self.due(args.eval_interval)):
                evaluation = self.evaluate()
                if evaluation > self.best_return:
                    self.best_return = evaluation
                    self.save("best.pt")
            minutes = (time.perf_counter() - self.saved_at) / 60
            if last or self.due(args.checkpoint_interval) or minutes > args.checkpoint_minutes:
                self.save("checkpoint.pt")
                self.saved_at = time.perf_counter()
            self.progress.update(self.step - self.last_step)

    def due(self, interval: int) -> bool:
        """Whether this iteration passed a multiple of `interval` steps."""
        return self.step // interval > self.last_step // interval

    def log(self, metrics: dict[str, float | Tensor]) -> None:
        """Adds one point to each curve, of time and speed too, and shows progress."""
        elapsed = self.elapsed + time.perf_counter() - self.started
        metrics = metrics | {"time/elapsed": elapsed}
        if self.logged:  # the first iteration compiles the update, so its speed says nothing
            metrics["charts/SPS"] = (self.step - self.logged[0]) / (elapsed - self.logged[1])
        self.logged = self.step, elapsed
        self.write(metrics)
        line = f"return {metrics.get('charts/episodic_return', math.nan):.1f}"
        self.progress.set_postfix_str(line, refresh=False)
        last, now = self.step >= self.progress.total, time.perf_counter()
        if self.progress.disable and (last or now - self.shown_at > 10):
            self.shown_at = now
            speed = f", {metrics['charts/SPS']:,.0f} steps/s" if "charts/SPS" in metrics else ""
            say(f"step {self.step:>9,}: {line}{speed}")

    def write(self, metrics: dict[str, float | Tensor]) -> None:
        """Adds one point to each curve; ends the run if one is not finite."""
        metrics = {name: float(x) for name, x in metrics.items()}
        for name, value in metrics.items():
            if not math.isfinite(value):
                causes = "rewards or observations that are not finite, or steps that are too large"
                where = f"{name} is {value} at step {self.step:,}; look for {causes}"
                raise SystemExit(f"{where}. {self.path} keeps the last checkpoint")
        with explained(f"Cannot write the curves in {self.path}; is the disk full?"):
            for name, value in metrics.items():
                self.writer.add_scalar(name, value, self.step)
        if self.wandb:
            self.wandb.log(metrics, step=self.step)

    def evaluate(self) -> float:
        """Mean return of the deterministic policy, logged and printed."""
        args, video = self.args, f"step-{self.step}"
        videos = self.path / "videos" if args.capture_video else None
        seed = args.seed + EVALUATION_SEED
        returns = evaluate(self.state["agent"], args.env_id, args.eval_episodes, seed, videos, video)
        self.write({"eval/episodic_return": returns.mean(), "eval/episodic_return_std": returns.std()})
        if self.wandb and videos:
            recording = self.wandb.Video(str(videos / f"{video}-episode-0.mp4"))
            self.wandb.log({"video": recording}, step=self.step)
        say(f"step {self.step:>9,}: evaluation {returns.mean():.1f} +- {returns.std():.1f}")
        return returns.mean().item()

    def save(self, name: str) -> None:
        """Saves all state by name; ends the run instead if a weight is not finite."""
        if not all(x.isfinite().all() for x in self.state["agent"].parameters()):
            where = f"The weights are not finite at step {self.step:,}; make steps smaller"
            raise SystemExit(f"{where}. {self.path} keeps the last checkpoint")
        state = {"args": self.arguments, "step": self.step, "elapsed": self.elapsed}
        # The training draws from this generator only; an episode draws from one seeded at its reset.
        state |= {"best_return": self.best_return, "generator": torch.get_rng_state()}
        state |= {key: x if isinstance(x, Tensor) else x.state_dict() for key, x in self.state.items()}
        with explained(f"Cannot write the curves in {self.path}; is the disk full?"):
            self.writer.flush()
        save_checkpoint(self.path / name, state)

    def close(self) -> None:
        """Closes logs and environments, and gives the signals back."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        for x in (self.progress, self.writer, *self.state.values()):
            with contextlib.suppress(OSError):  # a full disk was explained before
                if hasattr(x, "close"):
                    x.close()
        if self.wandb:
            self.wandb.finish()


def say(line: str) -> None:
    """Prints a line, above the progress bar if there is one."""
    with tqdm.external_write_mode():
        print(line, flush=True)


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Turns an exception into one sentence."""
    try:
        yield
    except Exception as error:
        raise SystemExit(f"{what}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")


# ---------------------------------------------------------------------------------------------- files

FORMAT = 2  # of a checkpoint


def make_directory(args: Args) -> Path:
    """The directory of the run: the one that args name, or a new one with the time in its name."""
    named = args.resume or (args.run_name and Path(args.runs, args.run_name))
    name = f"{args.env_id.replace('/', '-').replace(':', '-')}__{args.exp_name}__{args.seed}"
    while True:
        path = Path(named or Path(args.runs, f"{name}__{time.strftime('%Y%m%d-%H%M%S')}"))
        try:
            path.mkdir(parents=True, exist_ok=bool(named))
            return path
        except OSError as error:
            if named or not isinstance(error, FileExistsError):
                raise SystemExit(f"Cannot make the run directory {path}: {error}")
            time.sleep(0.1)  # another run began in the same second


def write_file(path: Path, content: str | dict) -> None:
    """Writes a text, or a state with torch.save, so that a crash leaves the old file or the new one."""
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode()) if isinstance(content, str) else torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        if path.name == "checkpoint.pt" and path.exists():
            os.replace(path, path.with_name("checkpoint.previous.pt"))
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch calls a full disk a RuntimeError
        temporary.unlink(missing_ok=True)
        raise SystemExit(f"Cannot write {path}, what was there is untouched; is the disk full? ({error})")


def save_checkpoint(path: Path, state: dict) -> None:
    write_file(path, {"script": Path(__file__).stem, "format": FORMAT, **state})


def load_checkpoint(run: str | Path) -> dict:
    """The checkpoint of a run directory, or a checkpoint file; if it is damaged, the one before it.

    The checksums are verified, and no code that hides in the file runs.
    """
    path = Path(run, "checkpoint.pt") if Path(run).is_dir() else Path(run)
    previous, script = path.with_name("checkpoint.previous.pt"), Path(__file__).stem
    try:
        if damaged := zipfile.ZipFile(path).testzip():  # torch.load does not verify checksums
            raise ValueError(f"the checksum of {damaged} is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = f"{path} is damaged, or no checkpoint: {' '.join(str(error).split())[:200]}"
        reason = reason if path.exists() else f"There is no checkpoint {path}"
        if path.name != "checkpoint.pt" or not previous.exists():
            raise SystemExit(reason)
        say(f"{reason}. The one before it takes its place: {previous}")
        state = load_checkpoint(previous)
        with contextlib.suppress(OSError):  # a folder that cannot be written, in an evaluation
            os.replace(previous, path)
        return state
    if not isinstance(state, dict) or state.get("script") != script:
        raise SystemExit(f"{path} is not a checkpoint of {script}.py")
    if state.get("format") != FORMAT:
        raise SystemExit(
            f"{path} has format {state.get('format')}; this version of {script}.py reads {FORMAT}"
        )
    return state


def read_args(run: str | Path) -> Args:
    """The arguments of a run directory or a checkpoint file; names a field that does not fit."""
    path = Path(run, "args.json") if Path(run).is_dir() else Path(run)
    with explained(f"Cannot read {path}"):
        values = json.loads(path.read_text()) if path.suffix == ".json" else load_checkpoint(path)["args"]
        hints = get_type_hints(Args)
        if unfit := values.keys() ^ hints.keys():
            raise ValueError(f"missing or unknown: {', '.join(sorted(unfit))}")
        for name, value in values.items():
            with explained(f"{path} has {name} = {value!r}"):
                typeguard.check_type(value, hints[name])
                if isinstance(value, bool) and hints[name] is not bool:  # an int for typeguard
                    raise TypeError(f"a bool is not {hints[name]}")
        return Args(**values)


# --------------------------------------------------------------------------------------- command line

# Flags that may change on resume or evaluation; any other would make it a different run.
MAY_CHANGE = """resume evaluate run_name runs total_timesteps device checkpoint_minutes capture_video track
                wandb_project_name wandb_entity""".split()
MAY_CHANGE_IN_EVALUATION = [*MAY_CHANGE, "seed", "eval_episodes"]


def refuse_changes(saved: dict, arguments: dict, may_change: list[str]) -> None:
    """Ends the program if arguments differ from saved ones in a flag that may not change."""
    for name, value in saved.items():
        if arguments.get(name) != value and name not in may_change:
            change = f"{name} from {value} to {arguments.get(name)}"
            raise SystemExit(f"A run cannot change {change}, only {', '.join(may_change)}")


def parse_args(arguments: list[str] | None = None) -> Args:
    """The command line, on top of the arguments of the run that it names, if it names one."""
    args = tyro.cli(Args, args=arguments)
    named = args.run_name and Path(args.runs, args.run_name)
    run = args.resume or args.evaluate or (named if named and (named / "args.json").exists() else None)
    if not run:
        return args
    saved = read_args(run)
    # A file must not decide which modules are imported: the command line has to name them again.
    default = dataclasses.replace(saved, env_id=saved.env_id.rpartition(":")[2])
    args = tyro.cli(Args, args=arguments, default=default)
    if saved.env_id != args.env_id == default.env_id:
        raise SystemExit(f"The run imports a module of yours; add --env-id {saved.env_id} to confirm it")
    may_change = MAY_CHANGE_IN_EVALUATION if args.evaluate else MAY_CHANGE
    refuse_changes(dataclasses.asdict(saved), dataclasses.asdict(args), may_change)
    return args


def prepare(args: Args) -> None:
    """Sets threads and warnings, and checks the device."""
    # For networks of this size a second thread costs more than it gives, in PyTorch as in NumPy.
    torch.set_num_threads(1)
    threadpoolctl.threadpool_limits(1)
    with explained("MuJoCo cannot be imported; does MUJOCO_GL name a library that is missing?"):
        import mujoco
    # MuJoCo would print a warning for each environment and write it to a file; Python shows it once.
    mujoco.set_mju_user_warning(warnings.warn)
    warnings.filterwarnings("ignore", ".*settotalmass")  # in Gymnasium's model of HalfCheetah
    warnings.filterwarnings("ignore", ".*Overwriting existing videos")  # those of the evaluation before
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(args.device, True):
        raise SystemExit(f"PyTorch finds no {args.device} device here; use --device auto")


def main(args: Args) -> Path:
    """Trains, resumes or evaluates a run; returns its path."""
    prepare(args)
    if args.evaluate:
        path = Path(args.evaluate)
        videos = (path if path.is_dir() else path.parent) / "videos" if args.capture_video else None
        seed = args.seed + EVALUATION_SEED
        refuse_changes(load_checkpoint(path)["args"], dataclasses.asdict(args), MAY_CHANGE_IN_EVALUATION)
        returns = evaluate(Agent.load(path), args.env_id, args.eval_episodes, seed, videos, "evaluation")
        print(f"{args.env_id}: {returns.mean():.1f} +- {returns.std():.1f} over {len(returns)} episodes")
        return path
    make_env(args.env_id).close()  # refuses before there is a run directory
    torch.manual_seed(args.seed)
    run = Run(args)
    try:
        train(args, run)
    except KeyboardInterrupt:
        raise SystemExit(f"\nEnded at once; {run.advice}")
    except Exception:
        say(f"An error ended the run at step {run.step:,}; once it is fixed, {run.advice}")
        raise
    finally:
        run.close()
    return run.path


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # for paths with letters that the terminal lacks
    try:
        main(parse_args())
    except BrokenPipeError:  # the reader of the output has ended, as in `| head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python would fail once more when it closes the output
        raise SystemExit("Nobody reads the output any more, so the program ends; checkpoints are kept")
