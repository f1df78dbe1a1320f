"""Proximal Policy Optimization (PPO) on Atari games from pixels, in one file.

Every iteration plays num_envs x num_steps transitions with the policy pi_old, estimates their advantages A by
GAE(lambda) (Schulman et al. 2016), and takes a few epochs of minibatch steps to

    maximise  E[ min(r A, clip(r, 1 - eps, 1 + eps) A) ] - vf_coef E[ (V - R)^2 / 2 ] + ent_coef E[ H(pi) ],

where r = pi(a|s) / pi_old(a|s) and R = A + V, with V of the critic before the update (Schulman et al. 2017,
equations 7 and 9). Policy and value function share the network of Mnih et al. (2015).

    python ppo_atari.py --env-id ALE/Pong-v5 --seed 3
    python ppo_atari.py --resume runs/ALE-Pong-v5__ppo_atari__3__20261120-101500
    python ppo_atari.py --evaluate runs/ALE-Pong-v5__ppo_atari__3__20261120-101500 --capture-video
    torchrun --nproc-per-node 8 ppo_atari.py --num-envs 64

Departures from the paper: advantages are normalised, the clipping range stays as it is while the learning
rate falls, and a game that reaches its limit of 108,000 frames is bootstrapped instead of counted as lost.
"""

import dataclasses
import datetime
import difflib
import json
import math
import os
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import ale_py
import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import tyro
from tqdm import tqdm

gym.register_envs(ale_py)


@dataclass
class Args:
    # Run
    env_id: str = "ALE/Breakout-v5"
    """game, as `ALE/Name-v5`"""
    seed: int = 1
    """seed of the games, the network and the sampling"""
    total_timesteps: int = 10_000_000
    """steps of the agent, four frames each, over all games; rounded up to whole iterations"""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """where the network is; auto is a CUDA GPU if there is one, else the CPU"""
    num_threads: int = 0
    """threads of the emulator, and of PyTorch on the CPU, per process; 0 for as many as PyTorch would take"""
    compile: bool = True
    """compile the update with torch.compile, on a GPU into CUDA graphs; it runs eagerly without a compiler"""
    bfloat16: bool = True
    """compute the convolutions in bfloat16 where the hardware multiplies it; weights stay in float32"""
    checkpoint_interval: int = 100_000
    """steps between checkpoints"""
    checkpoint_barrier: bool = False
    """start all games anew after each checkpoint, so that a resumed run equals an uninterrupted one"""
    eval_interval: int = 1_000_000
    """steps between evaluations; 0 for none"""
    eval_episodes: int = 10
    """whole games of an evaluation"""
    resume: str | None = None
    """run directory to resume; its arguments are loaded first"""
    evaluate: str | None = None
    """run directory or checkpoint file to evaluate instead of training"""

    # Algorithm
    repeat_action_probability: float = 0.0
    """the emulator repeats the last action with this probability: 0.25 are Machado et al.'s sticky actions"""
    num_envs: int = 8
    """games played side by side, over all processes"""
    num_steps: int = 128
    """steps in each game per iteration"""
    update_epochs: int = 4
    """passes over the transitions of an iteration"""
    num_minibatches: int = 4
    """minibatches per epoch; divides num_envs x num_steps"""
    learning_rate: float = 2.5e-4
    """step size of Adam at the start"""
    anneal_lr: bool = True
    """lower the learning rate linearly to 0 over total_timesteps"""
    gamma: float = 0.99
    """discount factor, in [0, 1]"""
    gae_lambda: float = 0.95
    """lambda of GAE, in [0, 1]: 0 trusts the value function, 1 the sampled return"""
    clip_coef: float = 0.1
    """eps: ratios in [1 - eps, 1 + eps] are left alone"""
    target_kl: float | None = None
    """end the epochs of an iteration once the mean KL of one exceeds 1.5 times this; None for no limit"""
    norm_adv: bool = True
    """normalise the advantages of each minibatch"""
    ent_coef: float = 0.01
    """weight of the entropy bonus"""
    vf_coef: float = 0.5
    """weight of the value loss"""
    max_grad_norm: float = 0.5
    """a gradient, of policy and value function together, of a larger norm is scaled down to this one"""

    # Logging
    exp_name: str = Path(__file__).stem
    """name of the experiment, part of the name of the run directory"""
    runs: str = "runs"
    """folder of the run directories"""
    capture_video: bool = False
    """record one more game at each evaluation"""
    track: bool = False
    """log to Weights & Biases too"""
    wandb_project_name: str = "policy-optimization"
    """project in Weights & Biases"""
    wandb_entity: str | None = None
    """team in Weights & Biases"""

    @property
    def batch_size(self) -> int:
        """Transitions per iteration, over all processes."""
        return self.num_envs * self.num_steps

    def __post_init__(self) -> None:
        counts = "total_timesteps num_envs num_steps update_epochs num_minibatches checkpoint_interval"
        for name in f"{counts} eval_episodes".split():
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "clip_coef", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must lie in [0, 2^32), got {self.seed}")
        if self.target_kl is not None and not self.target_kl > 0:
            raise ValueError(f"target_kl must be positive, or None for no limit, got {self.target_kl}")
        for name in ("ent_coef", "vf_coef", "eval_interval", "num_threads"):
            if not getattr(self, name) >= 0:  # not "< 0", which lets NaN through
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("gamma", "gae_lambda", "repeat_action_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if self.batch_size % self.num_minibatches:
            batch = f"num_envs x num_steps = {self.num_envs} x {self.num_steps} = {self.batch_size}"
            raise ValueError(f"num_minibatches = {self.num_minibatches} must divide the batch of {batch}")
        if self.norm_adv and self.batch_size == self.num_minibatches:
            raise ValueError("minibatches of one transition cannot be normalised: lower num_minibatches")
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name} must be finite, got {value}")
        if self.resume and self.evaluate:
            raise ValueError("resume and evaluate exclude each other")


# What may differ when a run is resumed; with anything else it would be another run.
MAY_CHANGE = "resume total_timesteps device capture_video track wandb_project_name wandb_entity".split()


def parse_args(arguments: list[str] | None = None) -> Args:
    """The command line (or `arguments`); with --resume it is read on top of the arguments of that run."""
    args = tyro.cli(Args, args=arguments)
    if not args.resume:
        return args
    path = Path(args.resume) / "args.json"
    try:
        saved = Args(**json.loads(path.read_text()))
    except (OSError, TypeError, ValueError) as error:
        raise SystemExit(f"Cannot resume {args.resume}, {path} is not there or not of this script: {error}")
    args = tyro.cli(Args, args=arguments, default=saved)
    for name, value in vars(saved).items():
        if getattr(args, name) != value and name not in MAY_CHANGE:
            raise SystemExit(
                f"--resume cannot change {name} from {value} to {getattr(args, name)}, "
                f"only {', '.join(MAY_CHANGE)}"
            )
    return args


# --------------------------------------------------------------------------------------------- processes


def world_size() -> int:
    """The number of processes that train together; 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0; process 0 is the one that writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def sum_over_ranks(x: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


# ------------------------------------------------------------------------------------------------- games

MAX_FRAMES = 108_000  # of a game: half an hour (Machado et al. 2018)


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


class Games:
    """N games that ale-py's engine plays side by side in threads.

    The engine starts a game with up to 29 frames of waiting, repeats each action for 4 frames, takes the
    maximum of the last two, scales them to 84 x 84 gray pixels and stacks the last 4 of these. It reports a
    lost life as the end of an episode and plays on; a game that is over or has reached its limit starts anew
    in the same step. What else the literature's wrappers do is here: FIRE for the next life, clipped rewards.
    """

    def __init__(self, env_id: str, num_games: int, num_threads: int, repeat_action_probability: float):
        self.engine = gym.make_vec(
            env_id,
            num_games,
            vectorization_mode="vector_entry_point",
            num_threads=num_threads,
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
        self.finished: list[tuple[int, float, float]] = []  # (index, return, steps) of games since `reset`

    def reset(self, seeds: np.ndarray) -> np.ndarray:
        """Starts all games, each with its own seed (N,); observations (N, 4, 84, 84), uint8."""
        observations, info = self.engine.reset(seed=seeds % 2**31)  # the engine's seeds have 31 bits
        self.frames = info["episode_frame_number"]
        self.running = np.zeros((2, self.engine.num_envs))  # returns and steps of the games so far
        self.must_fire = np.zeros(self.engine.num_envs, bool)
        self.finished.clear()
        return observations

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, ...]:
        """Plays one action (N,) in each game; those where `must_fire` holds press FIRE instead.

        Returns observations (N, 4, 84, 84), rewards clipped to their sign, terminated (a life was lost or the
        game is over), truncated (N,), and final observations, which count only where a game has ended.
        """
        actions = np.where(self.must_fire, self.fire, actions)
        observations, scores, terminated, truncated, info = self.engine.step(actions)
        over = info["episode_frame_number"] < self.frames  # the count went back: a new game has begun
        self.frames = info["episode_frame_number"]
        self.must_fire = terminated & ~over & self.has_fire
        self.running[0] += scores
        self.running[1] += 1
        for i in np.flatnonzero(over).tolist():
            self.finished.append((i, *self.running[:, i].tolist()))
            self.running[:, i] = 0
        return observations, np.sign(scores), terminated, truncated, info.get("final_obs", observations)

    def close(self) -> None:
        """Ends the threads of the engine."""
        self.engine.close()


# ----------------------------------------------------------------------------------------------- agent


def has_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 itself; emulated, it would be slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


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
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                gain = {self.actor: 0.01, self.critic: 1.0}.get(layer, math.sqrt(2))
                nn.init.orthogonal_(layer.weight, gain)
                nn.init.zeros_(layer.bias)
        self.to(memory_format=torch.channels_last)  # the layout that convolutions are fastest in

    def forward(self, observations: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
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
    def load(cls, run: str | Path) -> "Agent":
        """The agent of a run directory or a checkpoint file, on the CPU."""
        state = load_checkpoint(run)["agent"]
        agent = cls(len(state["actor.bias"]))
        agent.load_state_dict(state)
        return agent


# -------------------------------------------------------------------------------------- pure functions


def discounted_sum(x: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
    """y of y[t] = x[t] + decay[t] y[t + 1] along the first dimension, where y = 0 past the end.

    By doubling (Hillis and Steele 1986): before pass k = 0, 1, ..., x[t] holds the terms t to t + 2^k - 1 of
    y[t]. So ceil(log2 T) passes over whole tensors replace a loop over T rows.
    """
    shift = 1
    while shift < len(x):
        x = torch.cat((x[:-shift] + decay[:-shift] * x[shift:], x[-shift:]))
        decay = torch.cat((decay[:-shift] * decay[shift:], decay[-shift:]))
        shift *= 2
    return x


def compute_gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    next_values: torch.Tensor,
    terminated: torch.Tensor,
    done: torch.Tensor,
    gamma: float,
    gae_lambda: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages and value targets (T, N) by GAE (Schulman et al. 2016, equation 16); all inputs (T, N).

    `next_values[t]` is V of the observation after step t, the final one where the episode ended there.
    `terminated` stops the bootstrap, `done` (terminated or truncated) the sum. Targets: advantages + values.
    """
    deltas = rewards + gamma * next_values * (1 - terminated.to(values.dtype)) - values
    advantages = discounted_sum(deltas, gamma * gae_lambda * (1 - done.to(values.dtype)))
    return advantages, advantages + values


def log_prob(logits: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
    """Log-probability (...) of actions (...) under logits (..., n)."""
    return logits.log_softmax(-1).gather(-1, actions.unsqueeze(-1)).squeeze(-1)


def surrogate_loss(
    log_probs: torch.Tensor, old_log_probs: torch.Tensor, advantages: torch.Tensor, clip_coef: float
) -> torch.Tensor:
    """Policy loss of each transition, from tensors (B,); Schulman et al. 2017, equation 7."""
    ratio = (log_probs - old_log_probs).exp()
    return -torch.min(ratio * advantages, ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantages)


def normalize(x: torch.Tensor, valid: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """(x - mean) / standard deviation of x (B,), both over the `count` valid entries of all processes."""
    mean = sum_over_ranks((valid * x).sum()) / count
    variance = sum_over_ranks((valid * (x - mean).square()).sum()) / (count - 1).clamp(min=1)
    return (x - mean) / (variance.sqrt() + 1e-8)


# ----------------------------------------------------------------------------------------- optimisation


class Adam:
    """Adam (Kingma and Ba 2015, algorithm 1).

    The step of torch.optim breaks a compiled graph, which nearly halves the speed of the update; this one is
    traced into one graph with the loss and its gradient.
    """

    beta1, beta2, eps = 0.9, 0.999, 1e-5

    def __init__(self, parameters: Iterable[nn.Parameter], learning_rate: float):
        self.parameters = list(parameters)
        # Tensors, since each new number would compile the update anew.
        self.learning_rate = torch.tensor(float(learning_rate), device=self.parameters[0].device)
        self.steps = torch.zeros_like(self.learning_rate)
        self.first_moments = [torch.zeros_like(p) for p in self.parameters]
        self.second_moments = [torch.zeros_like(p) for p in self.parameters]

    @torch.no_grad()
    def step(self, gradients: list[torch.Tensor]) -> None:
        """Moves the parameters by one step, given their gradients."""
        self.steps += 1
        step_size = self.learning_rate / (1 - self.beta1**self.steps)
        correction = 1 - self.beta2**self.steps
        for p, gradient, first, second in zip(
            self.parameters, gradients, self.first_moments, self.second_moments
        ):
            first.lerp_(gradient, 1 - self.beta1)
            second.lerp_(gradient.square(), 1 - self.beta2)
            p -= step_size * first / ((second / correction).sqrt() + self.eps)

    def state(self) -> list[torch.Tensor]:
        """The tensors of the state, to be saved and to be copied to."""
        return [self.learning_rate, self.steps, *self.first_moments, *self.second_moments]


METRICS = ("policy_loss", "value_loss", "entropy", "approx_kl", "clip_fraction", "grad_norm")


def sum_all_over_ranks(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The sums of tensors over all processes, in one message."""
    flat = sum_over_ranks(torch.cat([x.flatten() for x in tensors]))
    return [part.view_as(x) for part, x in zip(flat.split([x.numel() for x in tensors]), tensors)]


def make_update(agent: Agent, optimizer: Adam, args: Args) -> Callable[..., torch.Tensor]:
    """The function that takes one step on one minibatch and returns METRICS as a tensor.

    With several processes each has a part of the minibatch. Means are sums with `weights`, which add up to 1
    over all parts, so that gradients and metrics need only be added up.
    """
    communicate = sum_all_over_ranks if dist.is_initialized() else None
    if communicate and args.compile:
        communicate = torch.compiler.disable(communicate)  # one graph ends before it, another begins after

    def update(
        observations: torch.Tensor,  # (M, 84, 84, 4)
        actions: torch.Tensor,  # (M,)
        old_log_probs: torch.Tensor,  # (M,)
        advantages: torch.Tensor,  # (M,)
        returns: torch.Tensor,  # (M,)
        weights: torch.Tensor,  # (M,)
    ) -> torch.Tensor:
        logits, values = agent(observations.movedim(-1, 1))
        log_policy, log_probs = logits.log_softmax(-1), log_prob(logits, actions)
        policy_loss = weights @ surrogate_loss(log_probs, old_log_probs, advantages, args.clip_coef)
        value_loss = weights @ (0.5 * (values - returns).square())
        entropy = -(weights @ (log_policy.exp() * log_policy).sum(-1))
        loss = policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy

        gradients = torch.autograd.grad(loss, optimizer.parameters)
        with torch.no_grad():
            log_ratio = log_probs - old_log_probs
            # k3 of Schulman (2020), "Approximating KL divergence": estimates KL(old, new), is never negative
            approx_kl = weights @ (log_ratio.exp() - 1 - log_ratio)
            clip_fraction = weights @ ((log_ratio.exp() - 1).abs() > args.clip_coef).float()
            metrics = torch.stack((policy_loss, value_loss, entropy, approx_kl, clip_fraction))
            if communicate:
                *gradients, metrics = communicate([*gradients, metrics])
            grad_norm = nn.utils.get_total_norm(gradients, foreach=False)
            scale = (args.max_grad_norm / (grad_norm + 1e-6)).clamp(max=1)
            optimizer.step([scale * gradient for gradient in gradients])
            return torch.cat((metrics, grad_norm[None]))

    if not args.compile:
        return update
    for tensor in (*optimizer.parameters, *optimizer.state()):
        torch._dynamo.mark_static_address(tensor)  # a CUDA graph may change these in place
    return compile_graph(update, optimizer.steps.device)


def compile_graph(function: Callable, device: torch.device) -> Callable:
    """The function compiled into one graph, a CUDA graph on a GPU; as it is where there is no compiler."""
    # Without this, tracing stops at the gradient, and the update is no longer one graph.
    torch._dynamo.config.trace_autograd_ops = True
    on_cpu = {"cpp_wrapper": True, "size_asserts": False, "alignment_asserts": False}
    options = {"cpu": on_cpu, "cuda": {"triton.cudagraphs": True}}.get(device.type, {})
    try:
        torch.compile(lambda x: x + 1, options=options)(torch.zeros(8, device=device))
    except Exception as error:
        reason = str(error).strip().split("\n")[0][:150]
        print(f"torch.compile does not work here, the script runs eagerly and slower: {reason}")
        return function
    return torch.compile(function, dynamic=False, options=options)


# ----------------------------------------------------------------------------- rollout and evaluation


def as_images(observations: np.ndarray, device: torch.device) -> torch.Tensor:
    """Observations (N, 4, 84, 84) on the device, channels last in memory as in `collect_rollout`."""
    return torch.from_numpy(observations).to(device).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def collect_rollout(
    games: Games,
    latest: np.ndarray,
    policy: Callable,
    observations: torch.Tensor,
    noise: torch.Tensor,
) -> tuple[np.ndarray, tuple[torch.Tensor, ...]]:
    """Plays T steps in each of N games from the observations `latest` (N, 4, 84, 84).

    `policy` maps observations to logits and values, `noise` (T, N, n) decides the actions. What is seen is
    written to `observations` (T, N, 84, 84, 4), channels last.

    Returns the observations after the last step, and actions, log_probs, values, next_values, rewards,
    terminated, done, valid (T, N). Steps that only press FIRE for the next life are not valid: they are not
    the policy's.
    """
    device, (num_steps, num_games, _) = observations.device, noise.shape
    logits = torch.empty_like(noise)
    values, final_values = torch.empty(2, num_steps, num_games, device=device)
    rewards = np.empty((num_steps, num_games), np.float32)
    terminated, truncated, valid = (np.empty_like(rewards, bool) for _ in range(3))
    for t in range(num_steps):
        observations[t] = torch.from_numpy(latest).to(device).movedim(1, -1)
        logits[t], values[t] = policy(observations[t].movedim(-1, 1))
        # The largest of logits + noise is a sample of their distribution, if the noise is -log of an
        # exponential variable: the Gumbel-max trick (Gumbel 1954; Maddison et al. 2014).
        actions = (logits[t] + noise[t]).argmax(-1).cpu().numpy()
        valid[t] = ~games.must_fire
        latest, rewards[t], terminated[t], truncated[t], final_observations = games.step(actions)
        if truncated[t].any():
            final_values[t] = policy(as_images(final_observations, device))[1]
    next_values = torch.cat((values[1:], policy(as_images(latest, device))[1][None]))
    rewards, terminated, truncated, valid = (
        torch.from_numpy(x).to(device) for x in (rewards, terminated, truncated, valid)
    )
    next_values = torch.where(truncated, final_values, next_values)
    actions = (logits + noise).argmax(-1)
    log_probs = log_prob(logits, actions)
    return latest, (
        actions,
        log_probs,
        values,
        next_values,
        rewards,
        terminated,
        terminated | truncated,
        valid,
    )


EVALUATION_SEED = 1_000_000_000  # added to the seed: no start of the training is one of an evaluation
MAX_VIDEO_STEPS = 3 * 60 * 60 // 4  # of 4 frames, 60 of which are a second; they are kept in memory


@torch.no_grad()
def draw_actions(agent: Agent, observations: np.ndarray, generator: torch.Generator) -> np.ndarray:
    """Actions (N,) drawn from the policy at observations (N, 4, 84, 84)."""
    logits = agent(as_images(observations, agent.actor.bias.device))[0].cpu()
    noise = -torch.empty_like(logits).exponential_(generator=generator).log()
    return (logits + noise).argmax(-1).numpy()


def evaluate(
    agent: Agent,
    env_id: str,
    episodes: int,
    seed: int,
    num_threads: int = 1,
    repeat_action_probability: float = 0.0,
) -> np.ndarray:
    """True scores (episodes,) of whole games, all at a time; game i starts from seed + i.

    Actions are drawn from the policy, as in the published figures: the most probable ones can go round in
    circles without end. No generator of the training is drawn from.
    """
    games = Games(env_id, episodes, num_threads, repeat_action_probability)
    generator = torch.Generator().manual_seed(seed)
    scores: dict[int, float] = {}  # of the first game at each place
    latest = games.reset(seed + np.arange(episodes))
    while len(scores) < episodes:
        latest, *_ = games.step(draw_actions(agent, latest, generator))
        for i, score, _ in games.finished:
            scores.setdefault(i, score)
        games.finished.clear()
    games.close()
    return np.array([scores[i] for i in range(episodes)])


def record_game(
    agent: Agent, env_id: str, seed: int, repeat_action_probability: float, videos: Path, name: str
) -> Path:
    """Plays one game, of which it writes up to 3 minutes to `videos` as an MP4 in colour; returns its path.

    The engine of `Games` cannot render, so this goes through Gymnasium's own wrappers.
    """
    game = gym.make(
        env_id,
        frameskip=1,
        repeat_action_probability=repeat_action_probability,
        max_num_frames_per_episode=MAX_FRAMES,
        render_mode="rgb_array",
    )
    game = gym.wrappers.RecordVideo(game, str(videos), lambda episode: True, name_prefix=name)
    game = gym.wrappers.AtariPreprocessing(game)  # below it each frame is a step
    game = gym.wrappers.FrameStackObservation(game, 4, padding_type="zero")
    buttons = game.unwrapped.get_action_meanings()
    generator = torch.Generator().manual_seed(seed)
    observation, info = game.reset(seed=seed)
    must_fire = "FIRE" in buttons
    for _ in range(MAX_VIDEO_STEPS):
        action = draw_actions(agent, observation[None], generator).item()
        lives = info["lives"]
        action = buttons.index("FIRE") if must_fire else action
        observation, _, terminated, truncated, info = game.step(action)
        must_fire = "FIRE" in buttons and info["lives"] < lives
        if terminated or truncated:
            break
    game.close()
    return videos / f"{name}-episode-0.mp4"


# ------------------------------------------------------------------------------------------ checkpoints


def save_checkpoint(path: Path, state: dict) -> None:
    """Writes to a temporary file and renames it, so that a crash leaves the checkpoint before it."""
    temporary = path.with_suffix(".tmp")
    try:
        torch.save({"script": Path(__file__).stem, **state}, temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch calls a full disk a RuntimeError
        temporary.unlink(missing_ok=True)
        raise SystemExit(f"Cannot write {path}, the one before it is untouched; is the disk full? ({error})")


def load_checkpoint(run: str | Path) -> dict:
    """The checkpoint of a run directory, or a checkpoint file; code that hides in it is not run."""
    path, script = Path(run), Path(__file__).stem
    path = path / "checkpoint.pt" if path.is_dir() else path
    if not path.exists():
        raise SystemExit(f"There is no checkpoint {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).split("\n")[0]
        raise SystemExit(f"{path} is damaged, or no checkpoint: {reason}")
    if not isinstance(state, dict) or state.get("script") != script:
        raise SystemExit(f"{path} is not a checkpoint of {script}.py")
    return state


# --------------------------------------------------------------------------------------------- training


def train(args: Args, run: Path, device: torch.device, num_threads: int) -> None:
    """PPO (Schulman et al. 2017, algorithm 1); goes on from the checkpoint in `run` if there is one."""
    torch.manual_seed(args.seed)  # all processes draw the same numbers
    mine = slice(rank() * args.num_envs // world_size(), (rank() + 1) * args.num_envs // world_size())
    num_games = mine.stop - mine.start
    games = Games(args.env_id, num_games, num_threads, args.repeat_action_probability)
    agent = Agent(games.num_actions, args.bfloat16 and has_bfloat16(device)).to(device)
    optimizer = Adam(agent.parameters(), args.learning_rate)
    finished = deque(maxlen=100)  # returns and steps of games, over all processes
    iteration, best_return, elapsed = 0, -math.inf, 0.0

    if (run / "checkpoint.pt").exists():
        state = load_checkpoint(run)
        agent.load_state_dict(state["agent"])
        for tensor, saved in zip(optimizer.state(), state["optimizer"], strict=True):
            tensor.copy_(saved)
        iteration, best_return, elapsed = state["iteration"], state["best_return"], state["elapsed"]
        finished.extend(state["finished"])
        torch.set_rng_state(state["generator"])
        if rank() == 0:
            exactly = "" if args.checkpoint_barrier else "; the games start anew"
            print(f"Resumed at step {iteration * args.batch_size:,}{exactly}", flush=True)
    if dist.is_initialized():
        for tensor in agent.state_dict().values():
            dist.broadcast(tensor, 0)

    def reset_games() -> np.ndarray:
        # Others for every game, every --seed, and every iteration in which games start anew.
        seeds = np.random.SeedSequence((args.seed, iteration)).generate_state(args.num_envs)
        return games.reset(seeds[mine])

    def save(name: str) -> None:
        state = {
            "args": dataclasses.asdict(args),
            "agent": agent.state_dict(),
            "optimizer": optimizer.state(),
            "iteration": iteration,
            "best_return": best_return,
            "elapsed": elapsed,
            "finished": list(finished),
            "generator": torch.get_rng_state(),
        }
        save_checkpoint(run / name, state)

    if rank() == 0:
        from torch.utils.tensorboard import SummaryWriter  # not above: it takes a second

        if args.track:
            import wandb

            wandb.init(
                project=args.wandb_project_name,
                entity=args.wandb_entity,
                id=run.name,  # a resumed run goes on in the same place
                resume="allow",
                dir=str(run),
                config=dataclasses.asdict(args),
                sync_tensorboard=True,
            )
        # What was logged past the checkpoint is hidden; it will be logged again.
        writer = SummaryWriter(str(run), purge_step=iteration * args.batch_size + 1 if iteration else 0)

    def log(metrics: dict[str, float], step: int) -> None:
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)

    def log_evaluation(step: int) -> float:
        seed, sticky = args.seed + EVALUATION_SEED, args.repeat_action_probability
        returns = evaluate(agent, args.env_id, args.eval_episodes, seed, num_threads, sticky)
        log({"eval/episodic_return": returns.mean(), "eval/episodic_return_std": returns.std()}, step)
        if args.capture_video:
            video = record_game(agent, args.env_id, seed, sticky, run / "videos", f"step-{step}")
            if args.track:
                wandb.log({"video": wandb.Video(str(video)), "global_step": step})
        tqdm.write(f"step {step:>9,}: evaluation {returns.mean():.1f} ± {returns.std():.1f}")
        return returns.mean().item()

    num_iterations = math.ceil(args.total_timesteps / args.batch_size)
    update = make_update(agent, optimizer, args)
    # On a CPU the convolutions themselves take the time, and eager PyTorch is as fast.
    policy = compile_graph(agent, device) if args.compile and device.type == "cuda" else agent
    observations = torch.empty(args.num_steps, num_games, 84, 84, 4, dtype=torch.uint8, device=device)
    latest = reset_games()
    total, already = num_iterations * args.batch_size, iteration * args.batch_size
    # None: on a terminal only.
    progress = tqdm(total=total, initial=already, unit=" steps", disable=True if rank() else None)
    last_line = -math.inf

    first = iteration + 1
    for iteration in range(first, num_iterations + 1):
        start = time.perf_counter()
        step = iteration * args.batch_size
        if args.anneal_lr:
            optimizer.learning_rate.fill_(args.learning_rate * (1 - (iteration - 1) / num_iterations))

        # 1. Play. Each process draws the noise of all games and uses that of its own.
        noise = -torch.empty(args.num_steps, args.num_envs, games.num_actions).exponential_().log()
        # Inside this one context, eager PyTorch rounds the weights to bfloat16 once, not for every step.
        with torch.autocast(device.type, torch.bfloat16, enabled=agent.bfloat16):
            latest, transitions = collect_rollout(
                games, latest, policy, observations, noise[:, mine].to(device)
            )
        actions, old_log_probs, values, next_values, rewards, terminated, done, valid = transitions

        # 2. Judge.
        advantages, returns = compute_gae(
            rewards, values, next_values, terminated, done, args.gamma, args.gae_lambda
        )
        explained_variance = (1 - (returns - values).var() / returns.var()).item()
        batch = (observations, actions, old_log_probs, advantages, returns, valid.float())
        batch = [x.flatten(0, 1) for x in batch]

        # 3. Learn.
        epochs = []  # the mean of METRICS over the minibatches of each epoch
        for _ in range(args.update_epochs):
            totals = torch.zeros(len(METRICS), device=device)
            permutation = torch.randperm(num_games * args.num_steps)
            for indices in permutation.view(args.num_minibatches, -1).to(device):
                *minibatch, advantage, target, counted = (x[indices] for x in batch)
                count = sum_over_ranks(counted.sum()).clamp(min=1)
                if args.norm_adv:
                    advantage = normalize(advantage, counted, count)
                totals += update(*minibatch, advantage, target, counted / count)
            epochs.append(totals / args.num_minibatches)
            if args.target_kl and epochs[-1][METRICS.index("approx_kl")] > 1.5 * args.target_kl:
                break

        # 4. Log, evaluate, save.
        losses = dict(zip(METRICS, torch.stack(epochs).mean(0).tolist()))
        for name, value in losses.items():
            if not math.isfinite(value):
                raise SystemExit(
                    f"{name} is {value} at step {step:,}; look for too high a learning rate. {run} keeps the "
                    "last checkpoint"
                )
        ended = [games.finished]
        if dist.is_initialized():
            ended = [None] * world_size()
            dist.all_gather_object(ended, games.finished)
        finished.extend((score, length) for part in ended for _, score, length in part)
        games.finished.clear()
        seconds = time.perf_counter() - start
        elapsed += seconds
        # step % interval < batch_size: a multiple of the interval was reached in this iteration.
        last = iteration == num_iterations
        save_now = last or step % args.checkpoint_interval < args.batch_size
        if rank() == 0:
            log({f"losses/{name}": value for name, value in losses.items()}, step)
            log({"losses/explained_variance": explained_variance, "losses/epochs": len(epochs)}, step)
            log({"charts/learning_rate": optimizer.learning_rate.item()}, step)
            log({"charts/SPS": args.batch_size / seconds, "time/elapsed": elapsed}, step)
            training_return = math.nan
            if finished:
                training_return, length = np.mean(finished, axis=0)
                log({"charts/episodic_return": training_return, "charts/episodic_length": length}, step)
            if args.eval_interval and (last or step % args.eval_interval < args.batch_size):
                evaluation = log_evaluation(step)
                if evaluation > best_return:
                    best_return = evaluation
                    save("best.pt")
            if save_now:
                writer.flush()
                save("checkpoint.pt")
            progress.set_postfix_str(f"return {training_return:.1f}", refresh=False)
            progress.update(args.batch_size)
            if progress.disable and (last or time.perf_counter() - last_line > 10):
                last_line = time.perf_counter()
                speed = f"{args.batch_size / seconds:,.0f} steps/s"
                print(f"step {step:>9,}: return {training_return:.1f}, {speed}", flush=True)
        if save_now and args.checkpoint_barrier and not last:
            latest = reset_games()

    progress.close()
    games.close()
    if rank() == 0:
        writer.close()
        if args.track:
            wandb.finish()


def make_run_directory(args: Args) -> Path:
    """Creates the run directory, or finds the one to resume, and writes the arguments to it."""
    if args.resume:
        run = Path(args.resume)
    else:
        name = f"{args.env_id.replace('/', '-').replace(':', '-')}__{args.exp_name}__{args.seed}"
        run = Path(args.runs) / f"{name}__{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        run.mkdir(parents=True, exist_ok=args.resume is not None)
        (run / "args.tmp").write_text(json.dumps(dataclasses.asdict(args), indent=2))
        os.replace(run / "args.tmp", run / "args.json")
    except OSError as error:
        raise SystemExit(f"Cannot write the run directory {run}: {error}")
    print(f"Run directory: {run}", flush=True)
    return run


def main(args: Args) -> Path:
    """Trains, goes on with a run, or evaluates one; returns the run directory."""
    warnings.filterwarnings("ignore", ".*Overwriting existing videos")  # those of the evaluation before
    warnings.filterwarnings("ignore", ".*TensorFloat32")  # a proposal to round what is kept in float32 here
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(args.device, True):
        raise SystemExit(f"PyTorch finds no {args.device} device here; use --device auto")
    name = args.device if args.device != "auto" else "cuda" if available["cuda"] else "cpu"
    local_rank = int(os.environ.get("LOCAL_RANK", 0))  # set by torchrun
    device = torch.device(name, local_rank) if name == "cuda" else torch.device(name)
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    # torchrun sets OMP_NUM_THREADS to 1, which would leave one thread to the emulator as well.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    default = torch.get_num_threads() if local_processes == 1 else max(1, cores // local_processes)
    num_threads = args.num_threads or default
    torch.set_num_threads(num_threads)

    if args.evaluate:
        run = Path(args.evaluate)
        saved, agent = load_checkpoint(run)["args"], Agent.load(run).to(device)
        agent.bfloat16 = saved["bfloat16"] and has_bfloat16(device)  # as in the evaluations of the training
        env_id, sticky = saved["env_id"], saved["repeat_action_probability"]
        seed = args.seed + EVALUATION_SEED
        returns = evaluate(agent, env_id, args.eval_episodes, seed, num_threads, sticky)
        print(f"{env_id}: {returns.mean():.1f} ± {returns.std():.1f} over {args.eval_episodes} games")
        if args.capture_video:
            videos = (run if run.is_dir() else run.parent) / "videos"
            print(f"Video: {record_game(agent, env_id, seed, sticky, videos, 'evaluation')}")
        return run

    check_game(args.env_id)  # refuses before there is a run directory
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if args.num_envs % processes or (args.batch_size // processes) % args.num_minibatches:
        raise SystemExit(
            f"{processes} processes must divide num_envs = {args.num_envs}, and num_minibatches = "
            f"{args.num_minibatches} the part of the batch that each has, {args.batch_size / processes:g}"
        )
    if processes > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # The others wait while process 0 evaluates.
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(hours=2)
        )
    runs = [make_run_directory(args) if rank() == 0 else None]
    if dist.is_initialized():
        dist.broadcast_object_list(runs)
    try:
        train(args, runs[0], device, num_threads)
    except KeyboardInterrupt:
        program = "python" if world_size() == 1 else "torchrun ..."
        raise SystemExit(f"\nInterrupted; go on with: {program} {Path(__file__).name} --resume {runs[0]}")
    if dist.is_initialized():  # not after an error: it would wait for processes that wait for this one
        dist.destroy_process_group()
    return runs[0]


if __name__ == "__main__":
    main(parse_args())
