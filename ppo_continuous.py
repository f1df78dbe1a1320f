"""Proximal Policy Optimization (PPO) for continuous control, in one file.

Every iteration plays num_envs x num_steps transitions with the policy pi_old, estimates their advantages A by
GAE(lambda) (Schulman et al. 2016), and takes a few epochs of minibatch steps to

    maximise  E[ min(r A, clip(r, 1 - eps, 1 + eps) A) ] - vf_coef E[ (V - R)^2 / 2 ] + ent_coef E[ H(pi) ],

where r = pi(a|s) / pi_old(a|s) and R = A + V, with V at the start of the epoch (Schulman et al. 2017,
equations 7 and 9). `--surrogate` has the other rows of that paper's Table 1: a fixed or an adaptive KL
penalty instead of the clip, or neither.

    python ppo_continuous.py --env-id Hopper-v5 --seed 3
    python ppo_continuous.py --resume runs/Hopper-v5__ppo_continuous__3__20261120-101500
    python ppo_continuous.py --evaluate runs/Hopper-v5__ppo_continuous__3__20261120-101500 --capture-video

Deterministic evaluation after 1M steps: HalfCheetah-v5 7999 +- 864, mean and standard deviation of 3 seeds
(benchmark/results/mujoco). Beyond the paper: observations are normalised, rewards are scaled, gradients of a
large norm are scaled down, the learning rate falls to 0, advantages are computed anew for each epoch, and the
epochs stop early when the KL grows large.
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
from collections.abc import Callable, Iterable, Iterator
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
from tqdm import tqdm


@dataclasses.dataclass
class Args:
    # Run
    env_id: str = "HalfCheetah-v5"  # of Gymnasium, with a Box of actions; module:Name-v0 imports module first
    seed: int = 1  # seed of the environments, the networks and the sampling
    total_timesteps: int = 1_000_000  # environment steps, rounded up to whole iterations
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # of the networks; auto: the CPU, faster here
    compile: bool = True  # compile the update, about 6 times faster; it runs eagerly without a compiler
    eval_interval: int = 100_000  # environment steps between evaluations of the deterministic policy; 0: none
    eval_episodes: int = 10  # episodes of an evaluation
    checkpoint_interval: int = 100_000  # environment steps between checkpoints
    checkpoint_minutes: float = 10  # minutes after which a checkpoint is saved, too
    run_name: str | None = None  # fixed name of the run directory; resumes the run if it exists
    resume: str | None = None  # run directory to resume; its arguments are loaded first
    evaluate: str | None = None  # run directory or checkpoint file to evaluate instead of training

    # Algorithm
    num_envs: int = 32  # environments played side by side
    num_steps: int = 64  # steps in each environment per iteration
    update_epochs: int = 10  # passes over the transitions of an iteration
    num_minibatches: int = 32  # minibatches per epoch; divides num_envs x num_steps
    learning_rate: float = 5e-4  # step size of Adam at the start
    anneal_lr: bool = True  # lower the learning rate linearly to 0 over total_timesteps
    gamma: float = 0.99  # discount factor, in [0, 1]
    gae_lambda: float = 0.9  # lambda of GAE, in [0, 1]: 0 trusts the value function, 1 the sampled return
    surrogate: Literal["clip", "kl-fixed", "kl-adaptive", "none"] = "clip"  # what keeps pi near pi_old
    clip_coef: float = 0.2  # eps: surrogate clip leaves ratios in [1 - eps, 1 + eps] alone
    kl_coef: float = 1.0  # beta, the weight of the penalty of kl-fixed, and its initial value for kl-adaptive
    adaptive_kl_target: float = 0.01  # KL(old, new) of an iteration that kl-adaptive steers to, in nats
    target_kl: float | None = 0.02  # stop the epochs when the mean KL of one exceeds 1.5 x this; None: never
    norm_adv: bool = False  # normalise the advantages of each minibatch
    recompute_advantages: bool = True  # compute them anew for each epoch, with the critic as it is by then
    ent_coef: float = 0.0003  # weight of the entropy bonus, in units of the scaled rewards
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # gradients of a larger norm are scaled down to this norm
    log_std_init: float = -0.5  # log of the initial standard deviation, in units of half the action range

    # Logging
    exp_name: str = Path(__file__).stem  # name of the experiment, part of the name of the run directory
    runs: str = "runs"  # folder of the run directories
    capture_video: bool = False  # record the first episode of each evaluation
    track: bool = False  # log to Weights & Biases too
    wandb_project_name: str = "policy-optimization"  # project in Weights & Biases
    wandb_entity: str | None = None  # team in Weights & Biases

    def __post_init__(self) -> None:
        self.batch_size = self.num_envs * self.num_steps  # transitions per iteration
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
    """Gaussian policy and value function, with statistics for normalisation and action bounds.

    Both networks see normalised observations. Raw actions in [-1, 1] cover the range of the environment.
    """

    def __init__(self, observation_size: int, action_low, action_high, log_std: float = 0.0):
        super().__init__()
        self.actor = mlp([observation_size, 64, 64, len(action_low)], output_gain=0.01)
        self.critic = mlp([observation_size, 128, 128, 1], output_gain=1.0)
        self.log_std = nn.Parameter(torch.full((len(action_low),), log_std))
        self.observation_statistics = RunningStatistics((observation_size,))
        self.return_statistics = RunningStatistics(())
        self.register_buffer("action_low", torch.as_tensor(action_low, dtype=torch.float32))
        self.register_buffer("action_high", torch.as_tensor(action_high, dtype=torch.float32))

    def value(self, observations: Tensor) -> Tensor:
        """V (...) of normalised observations (..., D)."""
        return self.critic(observations).squeeze(-1)

    @classmethod
    def load(cls, run: str | Path) -> Agent:
        """The agent of a run directory or a checkpoint file, on the CPU."""
        state = load_checkpoint(run)["agent"]
        agent = cls(len(state["observation_statistics.mean"]), state["action_low"], state["action_high"])
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


def gaussian_log_prob(actions: Tensor, means: Tensor, log_std: Tensor) -> Tensor:
    """Log density (...) of actions (..., A), independent in each dimension."""
    return (-0.5 * ((actions - means) / log_std.exp()) ** 2 - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


def gaussian_kl(old_means: Tensor, old_log_std: Tensor, means: Tensor, log_std: Tensor) -> Tensor:
    """KL(old, new) (...), in nats, of normal distributions (..., A), independent in each dimension."""
    squares = (2 * old_log_std).exp() + (old_means - means) ** 2
    return (log_std - old_log_std + 0.5 * squares / (2 * log_std).exp() - 0.5).sum(-1)


def surrogate_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, kl: Tensor,
    surrogate: str, clip_coef: float | Tensor, kl_coef: float | Tensor,
) -> Tensor:  # fmt: skip
    """Policy loss, a scalar; Schulman et al. 2017, equation 7 (clip), 8 (kl-fixed, kl-adaptive) or 6 (none).

    All tensors (B,); `kl` is KL(old, new) at each observation.
    """
    ratio = (log_probs - old_log_probs).exp()
    if surrogate == "clip":
        return -torch.min(ratio * advantages, ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantages).mean()
    penalty = 0 if surrogate == "none" else kl_coef * kl
    return -(ratio * advantages - penalty).mean()


class Batch(NamedTuple):
    """The B transitions that an iteration learns from."""

    observations: Tensor  # (B, D), normalised
    actions: Tensor  # (B, A), raw
    old_means: Tensor  # (B, A)
    old_log_std: Tensor  # (A,)
    old_log_probs: Tensor  # (B,)
    advantages: Tensor  # (B,)
    returns: Tensor  # (B,), the targets of the critic


METRICS = ("policy_loss", "value_loss", "entropy", "approx_kl", "clip_fraction", "grad_norm")


def make_update(agent: Agent, optimizer: Adam, args: Args) -> Callable[..., Tensor]:
    """The function that takes one step on one minibatch and returns METRICS as a tensor."""

    def update(indices: Tensor, batch: Batch, coefficients: dict[str, Tensor]) -> Tensor:
        """Learns from the rows `indices` (M,) of the batch."""
        observations, old_log_probs = batch.observations[indices], batch.old_log_probs[indices]
        advantages = batch.advantages[indices]
        if args.norm_adv:
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        means = agent.actor(observations)
        log_probs = gaussian_log_prob(batch.actions[indices], means, agent.log_std)
        kl = gaussian_kl(batch.old_means[indices], batch.old_log_std, means, agent.log_std)
        clip, kl_coef = coefficients["clip"], coefficients["kl"]
        policy_loss = surrogate_loss(log_probs, old_log_probs, advantages, kl, args.surrogate, clip, kl_coef)
        value_loss = 0.5 * (agent.value(observations) - batch.returns[indices]).square().mean()
        entropy = (agent.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum()
        loss = policy_loss + coefficients["value"] * value_loss - coefficients["entropy"] * entropy

        gradients = torch.autograd.grad(loss, optimizer.parameters)
        with torch.no_grad():
            grad_norm = nn.utils.get_total_norm(gradients, foreach=False)
            scale = (args.max_grad_norm / (grad_norm + 1e-6)).clamp(max=1)
            optimizer.step([scale * gradient for gradient in gradients])
            log_ratio = log_probs - old_log_probs
            # k3 of Schulman (2020), "Approximating KL divergence": estimates KL(old, new), is never negative
            approx_kl = (log_ratio.exp() - 1 - log_ratio).mean()
            clip_fraction = ((log_ratio.exp() - 1).abs() > clip).float().mean()
            return torch.stack((policy_loss, value_loss, entropy, approx_kl, clip_fraction, grad_norm))

    return compile_update(update, optimizer.steps.device) if args.compile else update


# -------------------------------------------------------------------------------------------- training


class Rollout(NamedTuple):
    """T steps in each of N environments, as they return them."""

    observations: np.ndarray  # (T, N, D)
    actions: np.ndarray  # (T, N, A), raw
    next_observations: np.ndarray  # (T, N, D), the final ones where an episode ended
    rewards: np.ndarray  # (T, N)
    terminated: np.ndarray  # (T, N)
    done: np.ndarray  # (T, N), terminated or truncated


def collect_rollout(envs: Environments, policy: FrozenPolicy, num_steps: int) -> Rollout:
    """Plays T = num_steps steps in each environment."""
    noise = policy.std * torch.randn(num_steps, len(envs), len(policy.std)).numpy()
    steps = []
    for t in range(num_steps):
        observations = envs.observations
        actions = policy.mean_action(observations) + noise[t]
        steps.append((observations, actions, *envs.step(policy.to_environment(actions))))
    return Rollout(*map(np.array, zip(*steps)))


def train(args: Args, run: Run) -> None:
    """PPO (Schulman et al. 2017, algorithm 1)."""
    device = torch.device("cpu" if args.device == "auto" else args.device)
    envs = Environments(args.env_id, args.num_envs)
    space = envs.action_space
    agent = Agent(envs.observations.shape[1], space.low.flatten(), space.high.flatten(), args.log_std_init)
    optimizer = Adam(agent.to(device).parameters(), args.learning_rate)
    kl_coef = torch.tensor(float(args.kl_coef), device=device)
    discounted_returns = torch.zeros(args.num_envs)  # of the current episodes
    state = {"kl_coef": kl_coef, "discounted_returns": discounted_returns}
    run.start(agent=agent, envs=envs, optimizer=optimizer, **state)
    update = make_update(agent, optimizer, args)

    for progress in run.iterations(args.batch_size):
        if args.anneal_lr:
            optimizer.learning_rate.fill_(args.learning_rate * (1 - progress))

        # 1. Play.
        policy = FrozenPolicy(agent)
        rollout = collect_rollout(envs, policy, args.num_steps)
        if progress == 0:
            # The first rollout is played unnormalised and scored normalised. The two policies nearly agree:
            # the last layer of the actor starts with gain 0.01, so its means are near 0 for any input.
            agent.observation_statistics.update(rollout.observations)
            policy = FrozenPolicy(agent)

        # 2. Convert the rollout to tensors.
        observations = torch.from_numpy(policy.normalize(rollout.observations)).to(device)
        next_observations = torch.from_numpy(policy.normalize(rollout.next_observations)).to(device)
        flat_observations = observations.flatten(0, 1)
        actions = torch.from_numpy(rollout.actions).flatten(0, 1).to(device)
        rewards, terminated, done = (torch.from_numpy(x) for x in rollout[-3:])
        rewards = scale_rewards(rewards, done, discounted_returns, args.gamma, agent.return_statistics)
        rewards, terminated, done = rewards.to(device), terminated.to(device), done.to(device)
        with torch.no_grad():
            old_means, old_log_std = agent.actor(flat_observations), agent.log_std.clone()
            old_log_probs = gaussian_log_prob(actions, old_means, old_log_std)

        # 3. Learn. Coefficients may be scheduled: as tensors, they do not compile the update anew.
        coefficients = {"clip": args.clip_coef, "value": args.vf_coef, "entropy": args.ent_coef}
        coefficients = {name: torch.tensor(float(x), device=device) for name, x in coefficients.items()}
        coefficients |= {"kl": kl_coef}
        epochs = []  # METRICS of each epoch, means over its minibatches
        for epoch in range(args.update_epochs):
            if epoch == 0 or args.recompute_advantages:
                with torch.no_grad():
                    values, next_values = agent.value(observations), agent.value(next_observations)
                advantages, returns = compute_gae(
                    rewards, values, next_values, terminated, done, args.gamma, args.gae_lambda
                )
                targets = advantages.flatten(), returns.flatten()
                batch = Batch(flat_observations, actions, old_means, old_log_std, old_log_probs, *targets)
            if epoch == 0:
                errors = (returns - values).var(correction=0)
                explained_variance = 1 - errors / returns.var(correction=0).clamp(min=1e-8)
            minibatches = torch.randperm(args.batch_size).view(args.num_minibatches, -1).to(device)
            metrics = [update(indices, batch, coefficients) for indices in minibatches]
            epochs.append(torch.stack(metrics).mean(0))
            if args.target_kl and epochs[-1][METRICS.index("approx_kl")] > 1.5 * args.target_kl:
                break
        with torch.no_grad():
            kl = gaussian_kl(old_means, old_log_std, agent.actor(flat_observations), agent.log_std).mean()
        if args.surrogate == "kl-adaptive" and kl < args.adaptive_kl_target / 1.5:
            kl_coef /= 2  # Schulman et al. 2017, section 4
        if args.surrogate == "kl-adaptive" and kl > args.adaptive_kl_target * 1.5:
            kl_coef *= 2
        if progress > 0:
            agent.observation_statistics.update(rollout.observations)

        # 4. Log.
        losses = dict(zip(METRICS, torch.stack(epochs).mean(0)))
        losses |= {"kl": kl, "explained_variance": explained_variance, "epochs": len(epochs)}
        charts = {"charts/learning_rate": optimizer.learning_rate, "charts/kl_coef": kl_coef}
        charts |= {"charts/action_std": policy.std.mean()}
        run.log({f"losses/{name}": x for name, x in losses.items()} | charts | envs.statistics())


# ======================================================================================================
# Plumbing, the same in all scripts wherever it serves the same: limits of the flags, numerics, environments
# and evaluation, runs, files, command line. Nothing below is about the algorithm.

LIMITS = {  # the interval that flags have to lie in
    "[1, inf)": "total_timesteps num_envs num_steps update_epochs num_minibatches eval_episodes "
    "checkpoint_interval",
    "[0, inf)": "eval_interval ent_coef vf_coef",
    "(0, inf)": "learning_rate clip_coef kl_coef adaptive_kl_target target_kl max_grad_norm "
    "checkpoint_minutes",
    "(-inf, inf)": "log_std_init",
    "[0, 1]": "gamma gae_lambda",
    "[0, 4294967296)": "seed",
}


def check(args: Args) -> None:
    """Raises ValueError, with a sentence, for flags that cannot work."""
    check_limits(args)
    if args.batch_size % args.num_minibatches:
        batch = f"num_envs x num_steps = {args.num_envs} x {args.num_steps} = {args.batch_size}"
        raise ValueError(f"num_minibatches = {args.num_minibatches} must divide the batch of {batch}")
    if args.norm_adv and args.batch_size == args.num_minibatches:
        raise ValueError("minibatches of one transition cannot be normalised: lower num_minibatches")


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


def scale_rewards(
    rewards: Tensor, done: Tensor, discounted_returns: Tensor, gamma: float, statistics: RunningStatistics
) -> Tensor:
    """Rewards (T, N) over the standard deviation of the discounted return so far, clipped to [-10, 10].

    The mean is not subtracted: a constant added to every reward would favour long episodes, or short ones.
    `discounted_returns` (N,) of the current episodes and the statistics are updated in place.
    """
    # G[t] = r[t] + gamma (1 - done[t - 1]) G[t - 1], after the G carried over: discounted_sum, time reversed.
    carried_and_rewards = torch.cat((discounted_returns[None], rewards))
    done_before = torch.cat((done.new_zeros(2, done.shape[1]), done[:-1]))
    decay = gamma * (1 - done_before.to(rewards.dtype))
    discounted = discounted_sum(carried_and_rewards.flip(0), decay.flip(0)).flip(0)[1:]
    discounted_returns.copy_(discounted[-1] * (1 - done[-1].to(rewards.dtype)))
    statistics.update(discounted.numpy())
    return (rewards / (statistics.variance.cpu() + 1e-8).sqrt()).clamp(-10, 10)


class Adam:
    """Adam (Kingma and Ba 2015, algorithm 1).

    The step of torch.optim breaks a compiled graph, which nearly halves the speed of the update; this one is
    traced into one graph with the loss and its gradient.
    """

    beta1, beta2 = 0.9, 0.999

    def __init__(self, parameters: Iterable[nn.Parameter], learning_rate: float, eps: float = 1e-8):
        self.parameters, self.eps = list(parameters), eps
        # Tensors, because each new number would compile the update anew.
        self.learning_rate = torch.tensor(float(learning_rate), device=self.parameters[0].device)
        self.steps = torch.zeros_like(self.learning_rate)
        self.first_moments = [torch.zeros_like(p) for p in self.parameters]
        self.second_moments = [torch.zeros_like(p) for p in self.parameters]

    @torch.no_grad()
    def step(self, gradients: list[Tensor]) -> None:
        """Moves the parameters by one step, given their gradients."""
        self.steps += 1
        step_size = self.learning_rate / (1 - self.beta1**self.steps)
        correction = 1 - self.beta2**self.steps
        moments = zip(self.parameters, gradients, self.first_moments, self.second_moments)
        for p, gradient, first, second in moments:
            first.lerp_(gradient, 1 - self.beta1)
            second.lerp_(gradient.square(), 1 - self.beta2)
            p -= step_size * first / ((second / correction).sqrt() + self.eps)

    def state_dict(self) -> dict[str, list[Tensor]]:
        """The tensors of the state themselves, not copies."""
        scalars = [self.learning_rate, self.steps]
        return {"scalars": scalars, "first": self.first_moments, "second": self.second_moments}

    def load_state_dict(self, state: dict[str, list[Tensor]]) -> None:
        """Copies a state into these tensors, which a compiled update refers to."""
        for name, tensors in self.state_dict().items():
            for tensor, saved in zip(tensors, state[name], strict=True):
                tensor.copy_(saved)


def compile_update(update: Callable[..., Tensor], device: torch.device) -> Callable[..., Tensor]:
    """The update compiled into one graph, or the update itself if there is no compiler."""
    from torch._inductor.compile_fx import compile_fx  # not above: it takes a second

    torch._dynamo.reset()  # it gives up on a function that was compiled 8 times, in earlier runs too
    # Without this, tracing stops at the gradient, and the update is no longer one graph.
    torch._dynamo.config.trace_autograd_ops = True
    # Calls from kernel to kernel in C++ instead of Python, and without their checks: a quarter faster.
    options = {"cpp_wrapper": True, "size_asserts": False, "alignment_asserts": False}
    options = options if device.type == "cpu" else {}
    compilations = 0

    def compile_graph(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        nonlocal compilations
        compilations += 1
        if compilations == 1:
            say("Compiling the update, about 30 s, or a few if it is in the cache")
        elif compilations == 4:
            say("The update is compiled again and again, as a number in it changes: make it a tensor")
        try:
            return compile_fx(graph, inputs, config_patches=options)
        except Exception as error:
            reason = str(error).strip().split("\n")[0][:150]
            say(f"torch.compile does not work here, the update runs eagerly, several times slower: {reason}")
            return graph.forward

    return torch.compile(update, backend=compile_graph, dynamic=False)


class FrozenPolicy:
    """A copy of the policy in NumPy, which has less overhead than PyTorch for a few rows.

    An actor with layers other than Linear and Tanh is not copied: PyTorch evaluates it.
    """

    def __init__(self, agent: Agent):
        def array(tensor: Tensor) -> np.ndarray:
            return tensor.detach().cpu().numpy().copy()

        self.mean = array(agent.observation_statistics.mean)
        self.scale = 1 / np.sqrt(array(agent.observation_statistics.variance) + 1e-8)
        self.low, self.high = array(agent.action_low), array(agent.action_high)
        # A dimension without two bounds is not scaled; "no bound" may be infinite, or the largest float.
        bounded = np.maximum(-self.low, self.high) < 1e10
        low, high = np.where(bounded, self.low, -1), np.where(bounded, self.high, 1)
        self.action_center, self.action_scale = (low + high) / 2, (high - low) / 2
        self.std = array(agent.log_std.exp())
        self.actor, self.device = agent.actor, agent.log_std.device
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

    def mean_action(self, observations: np.ndarray) -> np.ndarray:
        """Mean raw action (N, A) at observations (N, D) of the environment."""
        x = self.normalize(observations)
        if not self.layers:
            with torch.inference_mode():
                return self.actor(torch.as_tensor(x, device=self.device)).cpu().numpy()
        for layer in self.layers:
            x = np.tanh(x) if layer is None else x @ layer[0] + layer[1]
        return x

    def to_environment(self, actions: np.ndarray) -> np.ndarray:
        """Raw actions scaled from [-1, 1] to the range of the environment, if it has one, and clipped."""
        return np.minimum(np.maximum(actions * self.action_scale + self.action_center, self.low), self.high)


# --------------------------------------------------------------------------- environments and evaluation

EVALUATION_SEED = 1_000_000_000  # added to --seed in evaluations; training episodes have smaller seeds
MAX_EPISODE_STEPS = 10_000  # of an environment that has no time limit of its own


def make_env(env_id: str, render_mode: str | None = None) -> gym.Env:
    """An environment with flat observations and a Box of actions, or SystemExit with a sentence."""
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
    if not isinstance(space, gym.spaces.Box):
        raise SystemExit(
            f"{env_id} has {space} actions, and this script needs a Box: "
            "ppo_discrete.py is for discrete actions, ppo_atari.py for Atari"
        )
    if np.issubdtype(space.dtype, np.integer):
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


def global_generators() -> str:
    """The states of the global generators, to be compared."""
    return repr((random.getstate(), np.random.get_state(), torch.get_rng_state().tolist()))


class Environments:
    """N environments side by side. In the step that ends an episode, the next episode begins.

    By Gymnasium's contract, the seed of a reset and the actions since determine an episode. So a checkpoint
    holds the seed and the actions, and resuming replays them.

    The first episode of environment i is limited to 1 - i/N of the time limit. This staggers the time limits.
    Otherwise all episodes would end together, and a batch would cover the same part of each.
    """

    def __init__(self, env_id: str, num_envs: int):
        self.env_id, self.envs = env_id, [make_env(env_id) for _ in range(num_envs)]
        env = self.envs[0]
        self.action_space, self.time_limit = env.action_space, env.spec.max_episode_steps
        if len(shape := env.unwrapped.observation_space.shape or ()) > 1:
            say(f"Observations of shape {shape} are flattened; for images, Agent needs convolutions")
        self.limits = self.time_limit - np.arange(num_envs) * self.time_limit // num_envs  # of this episode
        self.seeds, self.lengths = np.zeros((2, num_envs), np.int64)
        self.returns = np.zeros(num_envs)
        self.observations = np.empty((num_envs, *env.observation_space.shape))
        self.observation_sums = np.empty_like(self.observations)  # over the episode, to check a replay
        self.actions = deque(maxlen=self.time_limit)  # (N, ...) each, as many as the longest episode has
        self.finished = deque(maxlen=100)  # returns and lengths of the last episodes
        for i in range(num_envs):
            self.begin_episode(i)

    def __len__(self) -> int:
        return len(self.envs)

    def begin_episode(self, i: int, seed: int | None = None) -> None:
        """Resets environment i, with a seed from PyTorch's generator if none is given."""
        self.seeds[i] = torch.randint(EVALUATION_SEED, ()).item() if seed is None else seed
        self.lengths[i] = self.returns[i] = 0
        self.observations[i] = self.observation_sums[i] = reset(self.envs[i], int(self.seeds[i]))

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, ...]:
        """Returns next observations (N, D), rewards, terminated and done (N,).

        Next observations are the final ones where an episode ends; `observations` are the ones to act on.
        """
        actions = actions.reshape(-1, *self.action_space.shape)
        self.actions.append(actions)
        next_observations, rewards = np.empty_like(self.observations), np.empty(len(self), np.float32)
        terminated, truncated = np.empty(len(self), bool), np.empty(len(self), bool)
        for i, env in enumerate(self.envs):
            next_observations[i], rewards[i], terminated[i], truncated[i], _ = env.step(actions[i])
        self.lengths += 1
        self.returns += rewards
        self.observation_sums += next_observations
        done = terminated | truncated | (self.lengths >= self.limits)
        self.observations = next_observations.copy() if done.any() else next_observations
        for i in done.nonzero()[0]:
            self.finished.append((self.returns[i].item(), self.lengths[i].item()))
            self.limits[i] = self.time_limit
            self.begin_episode(i)
        return next_observations, rewards, terminated, done

    def statistics(self) -> dict[str, float]:
        """Mean return and length of the last 100 episodes, to be logged; empty before the first one ends."""
        names = "charts/episodic_return", "charts/episodic_length"
        return dict(zip(names, np.mean(self.finished, axis=0))) if self.finished else {}

    def state_dict(self) -> dict:
        names = "seeds limits lengths returns observations observation_sums".split()
        actions = np.array(self.actions)[len(self.actions) - self.lengths.max() :]
        arrays = {name: getattr(self, name) for name in names} | {"actions": actions}
        return {name: torch.tensor(x) for name, x in arrays.items()} | {"finished": list(self.finished)}

    def load_state_dict(self, state: dict) -> None:
        """Replays the saved episodes. If they differ from the saved ones, says so and begins new ones."""
        self.finished.extend(state["finished"])
        saved = {name: x.numpy() for name, x in state.items() if name != "finished"}
        actions, self.limits = saved["actions"], saved["limits"].copy()
        self.actions.extend(actions)
        same = True
        for i, env in enumerate(self.envs):
            self.begin_episode(i, saved["seeds"][i].item())
            generators = global_generators()
            for action in actions[len(actions) - saved["lengths"][i] :]:
                observation, reward, terminated, truncated, _ = env.step(action[i])
                self.observations[i] = observation
                self.observation_sums[i] += observation
                self.returns[i] += np.float32(reward)
                same = same and not (terminated or truncated)
            # Steps that draw from global generators depend on the order in which environments are stepped.
            same = same and generators == global_generators()
        self.lengths = saved["lengths"].copy()
        for name in ("observations", "observation_sums", "returns"):
            same = same and np.array_equal(getattr(self, name), saved[name], equal_nan=True)
        if not same:
            say(f"Replayed episodes of {self.env_id} differ from the saved ones, so new ones begin")
            for i in range(len(self)):
                self.begin_episode(i)

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
            action = policy.to_environment(policy.mean_action(observation[None]))
            observation, reward, terminated, truncated, _ = env.step(action.reshape(env.action_space.shape))
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
