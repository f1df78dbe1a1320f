"""Proximal Policy Optimization (PPO) on Atari games from pixels, in one file.

Every iteration plays num_envs x num_steps transitions with the policy pi_old, estimates their advantages A by
GAE(lambda) (Schulman et al. 2016), and takes a few epochs of minibatch steps to

    maximise  E[ min(r A, clip(r, 1 - eps, 1 + eps) A) ] - vf_coef E[ (V - R)^2 / 2 ] + ent_coef E[ H(pi) ],

where r = pi(a|s) / pi_old(a|s) and R = A + V, with V before the update (Schulman et al. 2017, equations 7 and
9). Policy and value function share the network of Mnih et al. (2015).

    python ppo_atari.py --env-id ALE/Pong-v5 --seed 3
    python ppo_atari.py --resume runs/ALE-Pong-v5__ppo_atari__3__20261120-101500
    python ppo_atari.py --evaluate runs/ALE-Pong-v5__ppo_atari__3__20261120-101500 --capture-video
    torchrun --nproc-per-node 8 ppo_atari.py --num-envs 64

Evaluation on Pong after 2.5M steps, with the flags of benchmark/results/atari-fast: 17.2 +- 3.7, mean and
standard deviation of 10 games of one seed. As in the authors' code and unlike the paper, the script
normalises advantages, keeps the clipping range while the learning rate falls, takes 4 epochs instead of 3,
gives (V - R)^2 the weight 0.25 instead of 1, and has the larger of the two usual networks. It also bootstraps
a game that reaches its limit of 108,000 frames.
The algorithm comes first; the plumbing after `train` is shared by all scripts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import difflib
import itertools
import json
import math
import os
import signal
import sys
import time
import warnings
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_type_hints

import ale_py
import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import typeguard
import tyro
from torch import Tensor
from tqdm import tqdm


@dataclasses.dataclass
class Args:
    # Run
    env_id: str = "ALE/Breakout-v5"  # game, as ALE/Name-v5
    seed: int = 1  # seed of the games, the network and the sampling
    total_timesteps: int = 10_000_000  # steps of 4 frames, over all games, rounded up to whole iterations
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto is a CUDA GPU if there is one, else the CPU
    num_threads: int = 0  # threads of the emulator, and of PyTorch, per process; 0: PyTorch's default
    compile: bool = True  # compile the update, on a GPU into CUDA graphs; it runs eagerly without a compiler
    bfloat16: bool = True  # run the convolutions in bfloat16 if the hardware has it; weights stay in float32
    eval_interval: int = 1_000_000  # steps between evaluations; 0: none
    eval_episodes: int = 10  # whole games of an evaluation
    checkpoint_interval: int = 100_000  # steps between checkpoints
    checkpoint_minutes: float = 10  # minutes after which a checkpoint is saved, too
    checkpoint_barrier: bool = False  # start all games anew every checkpoint_interval; makes resuming exact
    run_name: str | None = None  # fixed name of the run directory; resumes the run if it exists
    resume: str | None = None  # run directory to resume; its arguments are loaded first
    evaluate: str | None = None  # run directory or checkpoint file to evaluate instead of training

    # Algorithm
    repeat_action_probability: float = 0.0  # of the emulator; 0.25 are the sticky actions of Machado et al.
    num_envs: int = 8  # games played side by side, over all processes
    num_steps: int = 128  # steps in each game per iteration
    update_epochs: int = 4  # passes over the transitions of an iteration
    num_minibatches: int = 4  # minibatches per epoch; divides num_envs x num_steps
    learning_rate: float = 2.5e-4  # step size of Adam at the start
    anneal_lr: bool = True  # lower the learning rate linearly to 0 over total_timesteps
    gamma: float = 0.99  # discount factor, in [0, 1]
    gae_lambda: float = 0.95  # lambda of GAE, in [0, 1]: 0 trusts the value function, 1 the sampled return
    clip_coef: float = 0.1  # eps: ratios in [1 - eps, 1 + eps] are left alone
    target_kl: float | None = None  # stop the epochs when the mean KL of one exceeds 1.5 x this; None: never
    norm_adv: bool = True  # normalise the advantages of each minibatch
    ent_coef: float = 0.01  # weight of the entropy bonus
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # gradients of a larger norm are scaled down to this norm

    # Logging
    exp_name: str = Path(__file__).stem  # name of the experiment, part of the name of the run directory
    runs: str = "runs"  # folder of the run directories
    capture_video: bool = False  # record one more game at each evaluation
    track: bool = False  # log to Weights & Biases too
    wandb_project_name: str = "policy-optimization"  # project in Weights & Biases
    wandb_entity: str | None = None  # team in Weights & Biases

    def __post_init__(self) -> None:
        self.batch_size = self.num_envs * self.num_steps  # transitions per iteration, over all processes
        check(self)


# ----------------------------------------------------------------------------------------------- agent


class Agent(nn.Module):
    """Categorical policy and value function on the network of Mnih et al. (2015)."""

    def __init__(self, num_actions: int, bfloat16: bool = False):
        super().__init__()
        self.bfloat16 = bfloat16
        self.network = nn.Sequential(
            *(nn.Conv2d(4, 32, 8, stride=4), nn.ReLU()),
            *(nn.Conv2d(32, 64, 4, stride=2), nn.ReLU()),
            *(nn.Conv2d(64, 64, 3, stride=1), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(64 * 7 * 7, 512), nn.ReLU()),
        )
        self.actor, self.critic = nn.Linear(512, num_actions), nn.Linear(512, 1)
        gains = {self.actor: 0.01, self.critic: 1.0}  # 0.01, so that the first policy is almost uniform
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.orthogonal_(layer.weight, gains.get(layer, math.sqrt(2)))
                nn.init.zeros_(layer.bias)
        self.to(memory_format=torch.channels_last)  # convolutions are fastest in this layout

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """Unnormalised log-probabilities (B, n) and V (B,) of observations (B, 4, 84, 84), uint8.

        The heads stay in float32: a rounded logit would move the ratio of the new to the old policy.
        """
        device = observations.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.bfloat16):
            pixels = observations.to(torch.bfloat16 if self.bfloat16 else torch.float32) / 255
            hidden = self.network(pixels)
        with torch.autocast(device, enabled=False):
            hidden = hidden.float()
            return self.actor(hidden), self.critic(hidden).squeeze(-1)

    @classmethod
    def load(cls, run: str | Path) -> Agent:
        """The agent of a run directory or a checkpoint file, on the CPU."""
        state = load_checkpoint(run)["agent"]
        agent = cls(len(state["actor.bias"]))
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


def log_prob(logits: Tensor, actions: Tensor) -> Tensor:
    """Log-probability (...) of actions (...) under logits (..., n)."""
    return logits.log_softmax(-1).gather(-1, actions.unsqueeze(-1)).squeeze(-1)


def surrogate_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, clip_coef: float | Tensor
) -> Tensor:
    """Policy loss of each transition, from tensors (B,); Schulman et al. 2017, equation 7."""
    ratio = (log_probs - old_log_probs).exp()
    return -torch.min(ratio * advantages, ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantages)


def normalize(x: Tensor, valid: Tensor, count: Tensor) -> Tensor:
    """(x - mean) / standard deviation of x (B,), both over the `count` valid entries of all processes."""
    mean = sum_over_ranks((valid * x).sum()) / count
    variance = sum_over_ranks((valid * (x - mean).square()).sum()) / (count - 1).clamp(min=1)
    return (x - mean) / (variance.sqrt() + 1e-8)


class Batch(NamedTuple):
    """The B transitions that this process learns from in an iteration, or in a minibatch."""

    observations: Tensor  # (B, 84, 84, 4), uint8
    actions: Tensor  # (B,)
    old_log_probs: Tensor  # (B,)
    advantages: Tensor  # (B,)
    returns: Tensor  # (B,), the targets of the critic
    weights: Tensor  # (B,), 0 where the action was not the policy's


def take_minibatch(batch: Batch, indices: Tensor, norm_adv: bool) -> Batch:
    """The rows `indices` of the batch, with weights that add up to 1 over all processes."""
    minibatch = Batch(*(x[indices] for x in batch))
    advantages, valid = minibatch.advantages, minibatch.weights
    count = sum_over_ranks(valid.sum()).clamp(min=1)
    if norm_adv:
        advantages = normalize(advantages, valid, count)
    return minibatch._replace(advantages=advantages, weights=valid / count)


METRICS = ("policy_loss", "value_loss", "entropy", "approx_kl", "clip_fraction", "grad_norm")


def make_update(agent: Agent, optimizer: Adam, args: Args) -> Callable[..., Tensor]:
    """The function that takes one step on one minibatch and returns METRICS as a tensor.

    Means are sums with the weights of the minibatch. So with several processes, each of which has a part of
    it, gradients and metrics need only be added up.
    """
    sum_parts = sum_all_over_ranks if world_size() > 1 else list  # its copies would cost a sixth of an update
    if args.compile and world_size() > 1:
        sum_parts = torch.compiler.disable(sum_parts)  # one graph ends before it, another begins after it

    def update(minibatch: Batch, coefficients: dict[str, Tensor]) -> Tensor:
        """Learns from this process's part of a minibatch."""
        old_log_probs, weights = minibatch.old_log_probs, minibatch.weights
        logits, values = agent(minibatch.observations.movedim(-1, 1))
        log_policy, log_probs = logits.log_softmax(-1), log_prob(logits, minibatch.actions)
        losses = surrogate_loss(log_probs, old_log_probs, minibatch.advantages, coefficients["clip"])
        policy_loss = weights @ losses
        value_loss = weights @ (0.5 * (values - minibatch.returns).square())
        entropy = -(weights @ (log_policy.exp() * log_policy).sum(-1))
        loss = policy_loss + coefficients["value"] * value_loss - coefficients["entropy"] * entropy

        gradients = torch.autograd.grad(loss, optimizer.parameters)
        with torch.no_grad():
            log_ratio = log_probs - old_log_probs
            # k3 of Schulman (2020), "Approximating KL divergence": estimates KL(old, new), is never negative
            approx_kl = weights @ (log_ratio.exp() - 1 - log_ratio)
            clip_fraction = weights @ ((log_ratio.exp() - 1).abs() > coefficients["clip"]).float()
            metrics = torch.stack((policy_loss, value_loss, entropy, approx_kl, clip_fraction))
            *gradients, metrics = sum_parts([*gradients, metrics])
            grad_norm = nn.utils.get_total_norm(gradients, foreach=False)
            scale = (args.max_grad_norm / (grad_norm + 1e-6)).clamp(max=1)
            optimizer.step([scale * gradient for gradient in gradients])
            return torch.cat((metrics, grad_norm[None]))

    if not args.compile:
        return update
    for tensor in (*optimizer.parameters, *itertools.chain(*optimizer.state_dict().values())):
        torch._dynamo.mark_static_address(tensor)  # so that a CUDA graph can change it in place
    return compile_update(update, optimizer.steps.device)


# -------------------------------------------------------------------------------------------- training


class Rollout(NamedTuple):
    """T steps in each of the N games of this process, on the device of the network."""

    observations: Tensor  # (T, N, 84, 84, 4), uint8
    actions: Tensor  # (T, N)
    log_probs: Tensor  # (T, N)
    values: Tensor  # (T, N)
    next_values: Tensor  # (T, N), of the final observation where a game was truncated
    rewards: Tensor  # (T, N), clipped
    terminated: Tensor  # (T, N)
    done: Tensor  # (T, N), terminated or truncated
    valid: Tensor  # (T, N), false where FIRE was pressed for the next life instead of the action


@torch.no_grad()
def collect_rollout(games: Games, policy: Callable, noise: Tensor, observations: Tensor) -> Rollout:
    """Plays T steps in each of N games.

    `policy` maps observations to logits and values, `noise` (T, N, n) decides the actions. `observations`
    (T, N, 84, 84, 4) is the memory that all rollouts share; the channels come last, as in the network. While
    the policy acts in one half of the games, the emulator plays the other, if `games` has two halves.
    """
    device, (num_steps, num_games, _) = observations.device, noise.shape
    logits = torch.empty_like(noise)
    values, final_values = torch.empty(2, num_steps + 1, num_games, device=device)
    rewards = np.empty((num_steps, num_games), np.float32)
    terminated, truncated, valid = (np.empty_like(rewards, bool) for _ in range(3))
    size = num_games // len(games.halves)
    halves = [(half, slice(i * size, (i + 1) * size)) for i, half in enumerate(games.halves)]

    def act(t: int, half: Games, part: slice) -> None:
        observations[t, part] = torch.from_numpy(half.observations).to(device).movedim(1, -1)
        logits[t, part], values[t, part] = policy(observations[t, part].movedim(-1, 1))
        # Gumbel-max trick (Gumbel 1954; Maddison et al. 2014): the argmax of logits + noise is a sample of
        # their distribution, if the noise is -log of exponential variables.
        actions = (logits[t, part] + noise[t, part]).argmax(-1).cpu().numpy()
        valid[t, part] = ~half.must_fire
        half.send(actions)

    for half, part in halves:
        act(0, half, part)
    for t in range(num_steps):
        for half, part in halves:
            rewards[t, part], terminated[t, part], truncated[t, part], final_observations = half.receive()
            if truncated[t, part].any():
                final_values[t, part] = policy(as_images(final_observations, device))[1]
            if t + 1 < num_steps:
                act(t + 1, half, part)
    for half, part in halves:
        values[num_steps, part] = policy(as_images(half.observations, device))[1]
    arrays = rewards, terminated, truncated, valid
    rewards, terminated, truncated, valid = (torch.from_numpy(x).to(device) for x in arrays)
    next_values, values = torch.where(truncated, final_values[:-1], values[1:]), values[:-1]
    actions = (logits + noise).argmax(-1)
    log_probs, done = log_prob(logits, actions), terminated | truncated
    return Rollout(observations, actions, log_probs, values, next_values, rewards, terminated, done, valid)


def train(args: Args, run: Run) -> None:
    """PPO (Schulman et al. 2017, algorithm 1)."""
    device = choose_device(args)
    games = TrainingGames(args, num_halves=2 if device.type == "cuda" and not args.checkpoint_barrier else 1)
    agent = Agent(games.num_actions, args.bfloat16 and has_bfloat16(device)).to(device)
    optimizer = Adam(agent.parameters(), args.learning_rate, eps=1e-5)  # of OpenAI's baselines
    run.start(agent=agent, games=games, optimizer=optimizer)
    update = make_update(agent, optimizer, args)
    # On a CPU the convolutions themselves take the time, and eager PyTorch is as fast.
    compiled = args.compile and device.type == "cuda"
    policy = compile_update(agent, device, "policy") if compiled else agent
    shape = (args.num_steps, args.num_envs // world_size(), 84, 84, 4)
    observations = torch.empty(shape, dtype=torch.uint8, device=device)

    for progress in run.iterations(args.batch_size):
        if args.anneal_lr:
            optimizer.learning_rate.fill_(args.learning_rate * (1 - progress))

        # 1. Play. Each process draws the noise of all games and uses that of its own.
        noise = -torch.empty(args.num_steps, args.num_envs, games.num_actions).exponential_().log()
        noise = noise[:, games.part].to(device)
        # Inside this one context, eager PyTorch rounds the weights to bfloat16 once, not for every step.
        with torch.autocast(device.type, torch.bfloat16, enabled=agent.bfloat16):
            rollout = collect_rollout(games, policy, noise, observations)

        # 2. Convert the rollout to a batch.
        values = rollout.values
        advantages, returns = compute_gae(
            rollout.rewards, values, rollout.next_values, rollout.terminated, rollout.done,
            args.gamma, args.gae_lambda,
        )  # fmt: skip
        errors = (returns - values).var(correction=0)
        explained_variance = 1 - errors / returns.var(correction=0).clamp(min=1e-8)
        weights = rollout.valid.float()
        batch = Batch(observations, rollout.actions, rollout.log_probs, advantages, returns, weights)
        batch = Batch(*(x.flatten(0, 1) for x in batch))

        # 3. Learn. Coefficients may be scheduled: as tensors, they do not compile the update anew.
        coefficients = {"clip": args.clip_coef, "value": args.vf_coef, "entropy": args.ent_coef}
        coefficients = {name: torch.tensor(float(x), device=device) for name, x in coefficients.items()}
        epochs = []  # the mean of METRICS over the minibatches of each epoch
        for _ in range(args.update_epochs):
            totals = torch.zeros(len(METRICS), device=device)
            permutation = torch.randperm(len(batch.actions)).to(device)
            for indices in permutation.view(args.num_minibatches, -1):
                # Taken here and not in the update, since a CUDA graph copies everything that it is given.
                # Its name keeps it until the next one is there: freed before, its memory is mapped anew.
                minibatch = take_minibatch(batch, indices, args.norm_adv)
                totals += update(minibatch, coefficients)
            epochs.append(totals / args.num_minibatches)
            if args.target_kl and epochs[-1][METRICS.index("approx_kl")] > 1.5 * args.target_kl:
                break

        # 4. Log.
        losses = dict(zip(METRICS, torch.stack(epochs).mean(0)))
        losses |= {"explained_variance": explained_variance, "epochs": len(epochs)}
        charts = {"charts/learning_rate": optimizer.learning_rate}
        run.log({f"losses/{name}": x for name, x in losses.items()} | charts | games.statistics())


# ======================================================================================================
# Plumbing, the same in all scripts wherever it serves the same: limits of the flags, numerics, environments
# and evaluation, runs, files, command line. Nothing below is about the algorithm.

LIMITS = {  # the interval that flags have to lie in
    "[1, inf)": """total_timesteps num_envs num_steps update_epochs num_minibatches eval_episodes
                   checkpoint_interval""",
    "[0, inf)": "eval_interval num_threads ent_coef vf_coef",
    "(0, inf)": "learning_rate clip_coef target_kl max_grad_norm checkpoint_minutes",
    "[0, 1]": "gamma gae_lambda repeat_action_probability",
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


def compile_update(function: Callable, device: torch.device, name: str = "update") -> Callable:
    """The update, or the policy, compiled into one graph, or the function itself if there is no compiler."""
    from torch._inductor.compile_fx import compile_fx  # not above: it takes a second

    torch._dynamo.reset()  # it gives up on a function that was compiled 8 times, in earlier runs too
    # Without this, tracing stops at the gradient, and the update is no longer one graph.
    torch._dynamo.config.trace_autograd_ops = True
    # On a CPU, calls from kernel to kernel in C++ instead of Python, and without their checks.
    on_cpu = {"cpp_wrapper": True, "size_asserts": False, "alignment_asserts": False}
    options = {"cpu": on_cpu, "cuda": {"triton.cudagraphs": True}}.get(device.type, {})
    compilations = 0

    def compile_graph(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        nonlocal compilations
        compilations += 1
        if compilations == 1:
            say(f"Compiling the {name}, about 30 s, or a few if it is in the cache")
        elif compilations == 4:
            say(f"The {name} is compiled again and again, as a number in it changes: make it a tensor")
        try:
            return compile_fx(graph, inputs, config_patches=options)
        except Exception as error:
            reason = str(error).strip().split("\n")[0][:150]
            say(f"torch.compile does not work here, the {name} runs eagerly, and slower: {reason}")
            return graph.forward

    return torch.compile(function, backend=compile_graph, dynamic=False)


def has_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 itself; emulated, it would be slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


# ------------------------------------------------------------------------------------------- processes


def world_size() -> int:
    """The number of processes that train together; 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0; process 0 is the one that writes and prints."""
    return dist.get_rank() if dist.is_initialized() else 0


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of a tensor over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def sum_all_over_ranks(tensors: list[Tensor]) -> list[Tensor]:
    """The sums of tensors over all processes, in one message."""
    if not dist.is_initialized():
        return tensors
    flat = sum_over_ranks(torch.cat([x.flatten() for x in tensors]))
    return [part.view_as(x) for part, x in zip(flat.split([x.numel() for x in tensors]), tensors)]


def gather(x: Any) -> list:
    """The `x` of each process, in each process."""
    gathered = [x] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(gathered, x)
    return gathered


def broadcast(x: Any) -> Any:
    """The `x` of process 0, in each process."""
    objects = [x]
    if dist.is_initialized():
        dist.broadcast_object_list(objects)
    return objects[0]


def start_processes(args: Args) -> None:
    """Joins the other processes if torchrun has started several."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if args.num_envs % processes or (args.batch_size // processes) % args.num_minibatches:
        raise SystemExit(
            f"{processes} processes must divide num_envs = {args.num_envs}, and num_minibatches = "
            f"{args.num_minibatches} the part of the batch that each has, {args.batch_size / processes:g}"
        )
    if processes == 1:
        return
    device = choose_device(args)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # The others wait for process 0 while it evaluates.
    patience = datetime.timedelta(hours=2)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patience)
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")  # process 0 prints


def choose_device(args: Args) -> torch.device:
    """The device of this process, a CUDA GPU of its own if there are any and no other device is asked for."""
    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    name = automatic if args.device == "auto" else args.device
    index = int(os.environ.get("LOCAL_RANK", 0)) if name == "cuda" else None
    return torch.device(name, index)


# --------------------------------------------------------------------------------- games and evaluation

EVALUATION_SEED = 1_000_000_000  # added to the seed; games of the training have seeds below
MAX_FRAMES = 108_000  # of a game: half an hour (Machado et al. 2018)
MAX_VIDEO_STEPS = 3 * 60 * 60 // 4  # of 4 frames, 60 of which are a second; they are kept in memory

gym.register_envs(ale_py)


def check_game(env_id: str) -> None:
    """SystemExit with near matches if ale-py has no such game."""
    games = [name for name in gym.registry if name.startswith("ALE/")]
    if env_id in games:
        return
    if env_id in gym.registry and "ale_py" not in str(gym.spec(env_id).entry_point):
        hint = "it is not an Atari game: ppo_discrete.py and ppo_continuous.py are for other environments"
    else:
        by_name = {name[len("ALE/") : -len("-v5")].lower(): name for name in games}
        name = env_id.split("/")[-1].lower().split("-v")[0]
        name = name.removesuffix("noframeskip").removesuffix("deterministic")
        near = difflib.get_close_matches(name, by_name, n=3, cutoff=0.6)
        hint = f"did you mean {' or '.join(by_name[match] for match in near)}?" if near else "try ALE/Pong-v5"
    raise SystemExit(f"There is no game {env_id}; {hint}")


def as_images(observations: np.ndarray, device: torch.device) -> Tensor:
    """Observations (N, 4, 84, 84) on the device, channels last in memory as in `collect_rollout`."""
    return torch.from_numpy(observations).to(device).contiguous(memory_format=torch.channels_last)


class Games:
    """N games that ale-py's engine plays side by side in threads; `observations` are the ones to act on.

    The engine starts a game with up to 29 frames of waiting, repeats each action for 4 frames, takes the
    maximum of the last two, scales them to 84 x 84 gray pixels and stacks the last 4 of these. It reports a
    lost life as the end of an episode and plays on. A game that is over or has reached its limit starts anew
    in the same step. This class adds the other wrappers of the literature: FIRE for the next life, and
    clipped rewards.
    """

    def __init__(self, env_id: str, num_games: int, repeat_action_probability: float = 0.0):
        self.engine = gym.make_vec(
            env_id,
            num_games,
            vectorization_mode="vector_entry_point",
            num_threads=torch.get_num_threads(),
            autoreset_mode=gym.vector.AutoresetMode.SAME_STEP,
            life_loss_info=True,
            reward_clipping=False,  # clipped below, since the true score is logged
            repeat_action_probability=repeat_action_probability,
            max_num_frames_per_episode=MAX_FRAMES,
            noop_max=30,
            use_fire_reset=True,
        )
        self.num_actions = int(self.engine.single_action_space.n)
        buttons = self.engine.ale.get_action_set()
        self.has_fire = ale_py.Action.FIRE in buttons
        self.fire = buttons.index(ale_py.Action.FIRE) if self.has_fire else 0
        self.halves: list[Games] = [self]  # two on a GPU, see TrainingGames

    def reset(self, seeds: np.ndarray) -> None:
        """Starts all games, each with its own seed (N,); observations are (N, 4, 84, 84), uint8."""
        self.observations, info = self.engine.reset(seed=seeds % 2**31)  # the engine's seeds have 31 bits
        self.frames = info["episode_frame_number"]
        self.scores, self.lengths = np.zeros((2, len(seeds)))  # of the games so far
        self.must_fire = np.zeros(len(seeds), bool)
        self.finished: list[tuple[int, float, float]] = []  # (index, score, length) of games since then

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, ...]:
        """Plays one action (N,) in each game; those where `must_fire` holds press FIRE instead.

        Returns rewards clipped to their sign, terminated (a life was lost or the game is over), truncated
        (N,), and final observations (N, 4, 84, 84), which count only where a game has ended.
        """
        self.send(actions)
        return self.receive()

    def send(self, actions: np.ndarray) -> None:
        """The first part of `step`; the engine plays in its threads until `receive`, the second part."""
        self.engine.send(np.where(self.must_fire, self.fire, actions))

    def receive(self) -> tuple[np.ndarray, ...]:
        self.observations, scores, terminated, truncated, info = self.engine.recv()
        over = info["episode_frame_number"] < self.frames  # the count went back: a new game has begun
        self.frames = info["episode_frame_number"]
        self.must_fire = terminated & ~over & self.has_fire
        self.scores += scores
        self.lengths += 1
        for i in np.flatnonzero(over).tolist():
            self.finished.append((i, self.scores[i].item(), self.lengths[i].item()))
            self.scores[i] = self.lengths[i] = 0
        return np.sign(scores), terminated, truncated, info.get("final_obs", self.observations)

    def close(self) -> None:
        """Ends the threads of the engine, and of that of the other half."""
        for half in self.halves:
            half.engine.close()


class TrainingGames(Games):
    """The games of a run that this process plays, and what a checkpoint holds of the games of all processes.

    The engine cannot save a game, so a resumed run begins new ones. With `--checkpoint-barrier`, all games
    start anew every checkpoint_interval. By Gymnasium's contract, their seeds and the actions since determine
    them. So every checkpoint holds both, and resuming plays them again. Of two halves this is the first.
    """

    def __init__(self, args: Args, num_halves: int = 1):
        self.env_id, self.num_envs, self.barrier = args.env_id, args.num_envs, args.checkpoint_barrier
        num_games = args.num_envs // world_size()
        self.part = slice(rank() * num_games, (rank() + 1) * num_games)
        num_halves = math.gcd(num_halves, num_games)
        game = args.env_id, num_games // num_halves, args.repeat_action_probability
        super().__init__(*game)
        self.halves += [Games(*game) for _ in range(num_halves - 1)]
        self.last_games = deque(maxlen=100)  # scores and lengths of the last games of all processes
        self.begin()

    def begin(self) -> None:
        """Starts all games anew, from seeds that all processes draw together."""
        self.seeds = torch.randint(EVALUATION_SEED, (self.num_envs,))
        self.actions = []  # (num_envs,) each, of all processes since then
        self.new_actions = []  # (N,) each, of this process, not yet among them
        for half, seeds in zip(self.halves, np.split(self.seeds[self.part].numpy(), len(self.halves))):
            half.reset(seeds)
        self.checksums = self.compute_checksums()

    def send(self, actions: np.ndarray) -> None:
        if self.barrier:
            self.new_actions.append(actions.astype(np.uint8))
        super().send(actions)

    def compute_checksums(self) -> list[int]:
        """Of the observations of all games, in all processes, to check a replay."""
        parts = gather([zlib.crc32(x) for half in self.halves for x in half.observations])
        return list(itertools.chain(*parts))

    def statistics(self) -> dict[str, float]:
        """Mean score and length of the last 100 games, to be logged; empty before the first one ends.

        All processes call it in each iteration, and tell each other what they have played.
        """
        finished = [game for half in self.halves for game in half.finished]
        finished, actions = zip(*gather((finished, self.new_actions)))
        self.last_games.extend((score, length) for part in finished for _, score, length in part)
        self.actions.extend(map(np.concatenate, zip(*actions)))
        self.new_actions = []
        for half in self.halves:
            half.finished = []
        if self.barrier:
            self.checksums = self.compute_checksums()
        names = "charts/episodic_return", "charts/episodic_length"
        return dict(zip(names, np.mean(self.last_games, axis=0))) if self.last_games else {}

    def state_dict(self) -> dict:
        state = {"last_games": list(self.last_games), "seeds": self.seeds, "checksums": self.checksums}
        actions = np.array(self.actions, np.uint8).reshape(-1, self.num_envs)
        return state | {"actions": torch.from_numpy(actions)}

    def load_state_dict(self, state: dict) -> None:
        """Plays the saved games again; begins new ones, and says so, if that is not possible."""
        self.last_games.extend(state["last_games"])
        if not self.barrier:
            say("The games start anew, since ale-py cannot save them; see --checkpoint-barrier")
            self.begin()
            return
        self.seeds, self.actions = state["seeds"], [*state["actions"].numpy()]
        say(f"Replaying {len(self.actions) * self.num_envs:,} steps of the games")
        self.reset(self.seeds[self.part].numpy())
        for actions in self.actions:
            super().send(actions[self.part].astype(int))
            self.receive()
        self.finished, self.checksums = [], self.compute_checksums()
        if self.checksums != state["checksums"]:
            say(f"Replayed games of {self.env_id} differ from the saved ones, so new ones begin")
            self.begin()


@torch.no_grad()
def draw_actions(agent: Agent, observations: np.ndarray, generator: torch.Generator) -> np.ndarray:
    """Actions (N,) drawn from the policy at observations (N, 4, 84, 84)."""
    logits = agent(as_images(observations, agent.actor.bias.device))[0].cpu()
    noise = -torch.empty_like(logits).exponential_(generator=generator).log()
    return (logits + noise).argmax(-1).numpy()


def evaluate(
    agent: Agent, env_id: str, episodes: int, seed: int, videos: Path | None = None,
    video_name: str = "video", repeat_action_probability: float = 0.0,
) -> np.ndarray:  # fmt: skip
    """True scores (episodes,) of whole games, all at a time; game i starts from seed + i.

    Actions are drawn from the policy, as in the published figures: the most probable ones can go round in
    circles without end. The generator of the training is not used. If `videos` is a folder, one more game is
    recorded there.
    """
    games = Games(env_id, episodes, repeat_action_probability)
    generator = torch.Generator().manual_seed(seed)
    scores: dict[int, float] = {}  # of the first game at each place
    games.reset(seed + np.arange(episodes))
    while len(scores) < episodes:
        games.step(draw_actions(agent, games.observations, generator))
        for i, score, _ in games.finished:
            scores.setdefault(i, score)
        games.finished.clear()
    games.close()
    if videos:
        record_game(agent, env_id, seed, repeat_action_probability, videos, video_name)
    return np.array([scores[i] for i in range(episodes)])


def record_game(
    agent: Agent, env_id: str, seed: int, repeat_action_probability: float, videos: Path, name: str
) -> None:
    """Plays one game and writes up to 3 minutes of it to `videos`, as an MP4 in colour.

    The engine of `Games` cannot render, so this goes through Gymnasium's own wrappers.
    """
    with explained(f"Cannot write videos to {videos}"):
        videos.mkdir(parents=True, exist_ok=True)
    sticky, limit = {"repeat_action_probability": repeat_action_probability}, MAX_FRAMES
    game = gym.make(env_id, frameskip=1, max_num_frames_per_episode=limit, render_mode="rgb_array", **sticky)
    game = gym.wrappers.RecordVideo(game, str(videos), lambda episode: True, name_prefix=name)
    game = gym.wrappers.AtariPreprocessing(game)  # below it each frame is a step
    game = gym.wrappers.FrameStackObservation(game, 4, padding_type="zero")
    buttons = game.unwrapped.get_action_meanings()
    generator = torch.Generator().manual_seed(seed)
    observation, info = game.reset(seed=seed)
    must_fire = "FIRE" in buttons
    for _ in range(MAX_VIDEO_STEPS):
        action = draw_actions(agent, observation[None], generator).item()
        action = buttons.index("FIRE") if must_fire else action
        lives = info["lives"]
        observation, _, terminated, truncated, info = game.step(action)
        must_fire = "FIRE" in buttons and info["lives"] < lives
        if terminated or truncated:
            break
    game.close()


# ----------------------------------------------------------------------------------------------- runs


class Run:
    """One run: its directory, curves, checkpoints and videos; progress, interruption and resuming.

    `train` names everything that has state once, in `start`, and then loops over `iterations`.
    Of several processes, the first one reads, writes and evaluates.
    """

    def __init__(self, args: Args):
        self.args, self.path = args, broadcast(make_directory(args) if rank() == 0 else None)
        self.state = {}
        # A copy, since `train` may change args. Where a run is found does not belong to it.
        self.arguments = dataclasses.asdict(args) | {"resume": None, "evaluate": None, "run_name": None}
        self.step = self.last_step = 0  # environment steps, now and before this iteration
        self.elapsed, self.best_return = 0.0, -math.inf  # seconds of training, best evaluation
        self.started = self.saved_at = self.shown_at = time.perf_counter()
        self.logged = self.progress = self.writer = self.wandb = None
        self.interrupted = False
        reads = rank() == 0 and any(self.path.glob("checkpoint*.pt"))
        self.checkpoint = broadcast(load_checkpoint(self.path) if reads else {})
        if saved := self.checkpoint.get("args"):
            refuse_changes(saved, self.arguments, MAY_CHANGE)
            self.step, self.elapsed = self.checkpoint["step"], self.checkpoint["elapsed"]
            self.best_return = self.checkpoint["best_return"]
            if args.total_timesteps < min(saved["total_timesteps"], self.step + 1):
                raise SystemExit(f"{self.path} is at step {self.step:,} already; raise --total-timesteps")
        if rank() == 0:
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
        program = "python" if world_size() == 1 else "torchrun ..."
        return f"resume with: {program} {Path(__file__).name} --resume {self.path}"

    def start(self, **state) -> None:
        """Takes everything that has state by name: tensors, and objects with state_dict and load_state_dict.

        Restores the last checkpoint if there is one, and opens the logs.
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
        if dist.is_initialized():
            for tensor in state["agent"].state_dict().values():
                dist.broadcast(tensor, 0)  # another processor may have rounded the first weights otherwise
        if rank() > 0:
            return
        from torch.utils.tensorboard import SummaryWriter  # not above: it takes a second

        if self.args.track:
            import wandb

            place = {"project": self.args.wandb_project_name, "entity": self.args.wandb_entity}
            place |= {"id": self.path.name, "resume": "allow", "dir": str(self.path.parent)}
            self.wandb = wandb.init(**place, config=self.arguments)
        # Points after the checkpoint are purged; they will be logged again.
        self.writer = SummaryWriter(str(self.path), purge_step=self.step + 1 if self.step else 0)

    def iterations(self, batch_size: int) -> Iterator[float]:
        """Yields the fraction of the run that is done; evaluates and saves after an iteration if it is time.

        An iteration counts as batch_size steps, and the run is rounded up to whole iterations.
        """
        args, total = self.args, math.ceil(self.args.total_timesteps / batch_size) * batch_size
        # disable=None: shown on a terminal only
        silent = True if rank() > 0 else None
        self.progress = tqdm(total=total, initial=self.step, unit=" steps", disable=silent)
        while self.step < total:
            if any(gather(self.interrupted)):  # signals reach the processes in different iterations
                if rank() > 0:
                    raise SystemExit(0)
                self.save("checkpoint.pt")
                raise SystemExit(f"Interrupted at step {self.step:,}; {self.advice}")
            self.last_step, self.started = self.step, time.perf_counter()
            self.step += batch_size
            yield self.last_step / total
            self.elapsed += time.perf_counter() - self.started
            if args.checkpoint_barrier and self.due(args.checkpoint_interval):
                self.state["games"].begin()
            if rank() > 0:
                continue
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
        if rank() > 0:
            return
        metrics = {name: float(x) for name, x in metrics.items()}
        for name, value in metrics.items():
            if not math.isfinite(value):
                where = f"{name} is {value} at step {self.step:,}; look for too high a learning rate"
                raise SystemExit(f"{where}. {self.path} keeps the last checkpoint")
        with explained(f"Cannot write the curves in {self.path}; is the disk full?"):
            for name, value in metrics.items():
                self.writer.add_scalar(name, value, self.step)
        if self.wandb:
            self.wandb.log(metrics, step=self.step)

    def evaluate(self) -> float:
        """Mean score of whole games, logged and printed."""
        args, video = self.args, f"step-{self.step}"
        videos = self.path / "videos" if args.capture_video else None
        seed, sticky = args.seed + EVALUATION_SEED, args.repeat_action_probability
        agent = self.state["agent"]
        returns = evaluate(agent, args.env_id, args.eval_episodes, seed, videos, video, sticky)
        self.write({"eval/episodic_return": returns.mean(), "eval/episodic_return_std": returns.std()})
        if self.wandb and videos:
            import wandb

            self.wandb.log({"video": wandb.Video(str(videos / f"{video}-episode-0.mp4"))}, step=self.step)
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
MAY_CHANGE_IN_EVALUATION = [*MAY_CHANGE, "seed", "eval_episodes", "num_threads"]


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
    if (processes := int(os.environ.get("LOCAL_WORLD_SIZE", 1))) > 1:
        # torchrun sets OMP_NUM_THREADS to 1, which would leave one thread to the emulator as well.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // processes))
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    warnings.filterwarnings("ignore", ".*Overwriting existing videos")  # those of the evaluation before
    warnings.filterwarnings("ignore", ".*TensorFloat32")  # a proposal to round what is kept in float32 here
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(args.device, True):
        raise SystemExit(f"PyTorch finds no {args.device} device here; use --device auto")


def main(args: Args) -> Path:
    """Trains, resumes or evaluates a run; returns its path."""
    prepare(args)
    check_game(args.env_id)  # refuses before there is a run directory
    if args.evaluate:
        path, device = Path(args.evaluate), choose_device(args)
        videos = (path if path.is_dir() else path.parent) / "videos" if args.capture_video else None
        seed, sticky = args.seed + EVALUATION_SEED, args.repeat_action_probability
        refuse_changes(load_checkpoint(path)["args"], dataclasses.asdict(args), MAY_CHANGE_IN_EVALUATION)
        agent = Agent.load(path).to(device)
        agent.bfloat16 = args.bfloat16 and has_bfloat16(device)
        returns = evaluate(agent, args.env_id, args.eval_episodes, seed, videos, "evaluation", sticky)
        score = f"{returns.mean():.1f} +- {returns.std():.1f}"
        print(f"{args.env_id}: {score} over {args.eval_episodes} games")
        if videos:
            print(f"Video: {videos / 'evaluation-episode-0.mp4'}")
        return path
    start_processes(args)
    torch.manual_seed(args.seed)  # all processes draw the same numbers
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
    if dist.is_initialized():  # not after an error: it would wait for processes that wait for this one
        dist.destroy_process_group()
    return run.path


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # for paths with letters that the terminal lacks
    try:
        main(parse_args())
    except BrokenPipeError:  # the reader of the output has ended, as in `| head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python would fail once more when it closes the output
        raise SystemExit("Nobody reads the output any more, so the program ends; checkpoints are kept")
