"""Advantage actor-critic (A2C, A3C) for discrete actions, in one file.

Every iteration plays num_envs x num_steps transitions with the policy pi, estimates their advantages A by
GAE(lambda) (Schulman et al. 2016), and takes one step of RMSprop on all of them to

    maximise  E[ A log pi(a|s) ] - vf_coef E[ (V - R)^2 / 2 ] + ent_coef E[ H(pi) ],

where R = A + V, and neither A nor R is differentiated (Mnih et al. 2016, algorithm S3). With lambda = 1, R is
the n-step return of that paper: the rewards to the end of the rollout or of the episode, then V. With
`--asynchronous` workers do this independently of each other on parameters they share (A3C). Otherwise one
process plays all environments in step (A2C), which is faster on one core, and can be reproduced.

Greedy evaluation after 500k steps: CartPole-v1 500 in 5 of 5 seeds (benchmark/results/classic).

    python a2c_cartpole.py --env-id Acrobot-v1 --seed 3
    python a2c_cartpole.py --asynchronous --num-workers 4
    python a2c_cartpole.py --resume runs/Acrobot-v1__a2c_cartpole__3__20261120-101500
    python a2c_cartpole.py --evaluate runs/Acrobot-v1__a2c_cartpole__3__20261120-101500 --capture-video
"""

import copy
import dataclasses
import inspect
import json
import math
import os
import random
import signal
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import threadpoolctl
import torch
import torch.multiprocessing as multiprocessing
import torch.nn as nn
import tyro
from tqdm import tqdm


@dataclass
class Args:
    # Run
    env_id: str = "CartPole-v1"
    """Gymnasium environment with discrete actions; `module:Name-v0` imports the module that registers it"""
    seed: int = 1
    """seed of the environments, the networks and the sampling"""
    total_timesteps: int = 500_000
    """environment steps, rounded up to whole iterations"""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """where the networks are trained; auto is the CPU, which is faster for networks of this size"""
    compile: bool = True
    """compile the update with torch.compile, training is 1.5 times as fast; eager without a compiler"""
    log_interval: int = 2_000
    """environment steps between entries of the log, each with the means over the iterations in between"""
    checkpoint_interval: int = 50_000
    """environment steps between checkpoints, which are saved when there is an entry of the log"""
    eval_interval: int = 50_000
    """environment steps between evaluations of the greedy policy, at the same moments; 0 for none"""
    eval_episodes: int = 10
    """episodes of an evaluation"""
    resume: str | None = None
    """run directory to resume; its arguments are loaded first"""
    evaluate: str | None = None
    """run directory or checkpoint file to evaluate instead of training"""

    # Algorithm
    asynchronous: bool = False
    """A3C: workers that update shared parameters without locks, eagerly; not reproducible"""
    num_workers: int = 2
    """processes of the asynchronous form; divides num_envs"""
    shared_network: bool = False
    """one network with two heads for policy and value function, instead of one for each"""
    num_envs: int = 64
    """environments played side by side, or divided among the workers"""
    num_steps: int = 16
    """steps in each environment per iteration"""
    learning_rate: float = 1e-2
    """step size of RMSprop at the start"""
    anneal_lr: bool = True
    """lower the learning rate linearly to 0 over total_timesteps"""
    rmsprop_alpha: float = 0.99
    """alpha, in [0, 1): the share of the mean of squared gradients that a step of RMSprop keeps"""
    rmsprop_eps: float = 1e-5
    """epsilon of RMSprop, added to that mean under the root"""
    gamma: float = 0.99
    """discount factor, in [0, 1]"""
    gae_lambda: float = 0.95
    """lambda of GAE, in [0, 1]: 0 trusts the value function, 1 the sampled n-step return"""
    norm_adv: bool = False
    """normalise the advantages of each iteration"""
    ent_coef: float = 0.0
    """weight of the entropy bonus"""
    vf_coef: float = 0.5
    """weight of the value loss"""
    max_grad_norm: float = 0.5
    """a gradient of a larger norm is scaled down to this one"""

    # Logging
    exp_name: str = Path(__file__).stem
    """name of the experiment, part of the name of the run directory"""
    runs: str = "runs"
    """folder of the run directories"""
    capture_video: bool = False
    """record the first episode of each evaluation"""
    track: bool = False
    """log to Weights & Biases too"""
    wandb_project_name: str = "policy-optimization"
    """project in Weights & Biases"""
    wandb_entity: str | None = None
    """team in Weights & Biases"""

    def __post_init__(self) -> None:
        counts = "total_timesteps num_workers num_envs num_steps log_interval checkpoint_interval"
        for name in f"{counts} eval_episodes".split():
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "rmsprop_eps", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must lie in [0, 2^32), got {self.seed}")
        for name in ("ent_coef", "vf_coef", "eval_interval"):
            if not getattr(self, name) >= 0:  # not "< 0", which lets NaN through
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if not 0 <= self.rmsprop_alpha < 1:
            raise ValueError(f"rmsprop_alpha must lie in [0, 1), got {self.rmsprop_alpha}")
        if self.asynchronous and self.num_envs % self.num_workers:
            raise ValueError(f"num_workers = {self.num_workers} must divide num_envs = {self.num_envs}")
        if self.asynchronous and self.device in ("cuda", "mps"):
            raise ValueError(f"the workers of the asynchronous form run on the CPU, not on {self.device}")
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


# ---------------------------------------------------------------------------------------- environments


def make_env(env_id: str, render_mode: str | None = None) -> gym.Env:
    """An environment with flat observations and discrete actions, or SystemExit with a sentence."""
    try:
        keywords = {"render_mode": render_mode} if render_mode else {}
        env = gym.make(env_id, disable_env_checker=True, **keywords)
    except (gym.error.Error, ImportError, TypeError) as error:
        raise SystemExit(f"Cannot make the environment {env_id}: {error}")
    if not isinstance(env.action_space, gym.spaces.Discrete | gym.spaces.MultiDiscrete):
        raise SystemExit(
            f"{env_id} has {env.action_space} actions, and this script needs Discrete or MultiDiscrete ones: "
            "ppo_continuous.py is for a Box of actions"
        )
    if not env.observation_space.is_np_flattenable:
        raise SystemExit(f"{env_id} has {env.observation_space} observations, which cannot be flattened")
    if not isinstance(env.observation_space, gym.spaces.Box) or len(env.observation_space.shape) != 1:
        env = gym.wrappers.FlattenObservation(env)
    if render_mode:
        try:
            env.reset()
            env.render()
        except Exception as error:
            raise SystemExit(f"Cannot record {env_id}, it does not render here ({error})")
    return env


def make_vector_env(env_id: str, num_envs: int) -> gym.vector.VectorEnv:
    """N environments; an episode that ended in one step is reset in the next one, which ignores the action.

    Gymnasium's own vectorised form of an environment steps all of them at once; without one they are stepped
    in turn.
    """
    spec = make_env(env_id).spec
    if spec.vector_entry_point and not spec.additional_wrappers:  # such as one that flattens observations
        envs = gym.make_vec(env_id, num_envs, vectorization_mode="vector_entry_point")
        if envs.metadata.get("autoreset_mode") == gym.vector.AutoresetMode.NEXT_STEP:
            return envs
    make = [lambda: make_env(env_id)] * num_envs
    return gym.vector.SyncVectorEnv(make, autoreset_mode=gym.vector.AutoresetMode.NEXT_STEP)


def action_layout(space: gym.spaces.Discrete | gym.spaces.MultiDiscrete) -> tuple[list[int], list[int]]:
    """The number of choices of each action component, and its smallest value; Discrete has one component."""
    if isinstance(space, gym.spaces.Discrete):
        return [int(space.n)], [int(space.start)]
    return space.nvec.flatten().tolist(), space.start.flatten().tolist()


def wrapper_layers(env: gym.Env) -> list[gym.Env]:
    """The environment with its wrappers, outermost first."""
    layers = [env]
    while isinstance(layers[-1], gym.Wrapper):
        layers.append(layers[-1].env)
    return layers


def is_plain(x) -> bool:
    """Whether a checkpoint can hold x: a number, string or None, an array or a container of such.

    By exact type: loading refuses subclasses, which may hide code.
    """
    if isinstance(x, np.ndarray | np.generic):
        return x.dtype.kind in "biuf"
    values = [*x, *x.values()] if type(x) is dict else x if type(x) in (list, tuple) else [x]
    return all(type(value) in (bool, int, float, str, type(None)) for value in values)


# What an environment never changes, or what is saved in another way, by type and by name.
NOT_STATE = (gym.Env, gym.Space, gym.envs.registration.EnvSpec, np.random.Generator, type)
NOT_STATE_NAMES = ("metadata", "_ezpickle_args")


def get_env_state(env: gym.Env) -> dict | None:
    """All that decides how an environment goes on; None where that cannot be read.

    That is its generator and the plain attributes of it and its wrappers: elapsed steps, and the whole state
    of Gymnasium's classic control.
    """
    core = env.unwrapped
    if not isinstance(core.np_random, np.random.Generator):
        return None
    state = {"generator": core.np_random.bit_generator.state, "layers": []}
    for layer in wrapper_layers(env):
        attributes = {}
        for name, x in vars(layer).items():
            if type(x) is tuple:  # MountainCar has np.float64 in one, a subclass of float
                x = tuple(float(value) if isinstance(value, float) else value for value in x)
            if is_plain(x):
                attributes[name] = torch.tensor(x) if isinstance(x, np.ndarray | np.generic) else x
            elif not (isinstance(x, NOT_STATE) or name in NOT_STATE_NAMES or inspect.isroutine(x)):
                return None
        state["layers"].append(attributes)
    return state


def set_env_state(env: gym.Env, state: dict) -> None:
    """Brings an environment that has been reset to the state that `get_env_state` returned."""
    env.unwrapped.np_random.bit_generator.state = state["generator"]
    for layer, attributes in zip(wrapper_layers(env), state["layers"], strict=True):
        for name, x in attributes.items():
            setattr(layer, name, x.numpy()[()] if isinstance(x, torch.Tensor) else x)  # [()]: 0-d to scalar


def get_vector_state(envs: gym.vector.VectorEnv) -> dict | None:
    """All that decides how the environments go on; None where that cannot be read."""
    if not isinstance(envs, gym.vector.SyncVectorEnv):
        return get_env_state(envs)  # one generator and plain arrays, like one environment
    states = [get_env_state(env) for env in envs.envs]
    if None in states:
        return None
    return {"envs": states, "reset_next": torch.tensor(envs._autoreset_envs)}


def set_vector_state(envs: gym.vector.VectorEnv, state: dict) -> None:
    """Brings environments that have been reset to the state that `get_vector_state` returned."""
    if not isinstance(envs, gym.vector.SyncVectorEnv):
        return set_env_state(envs, state)
    for env, env_state in zip(envs.envs, state["envs"], strict=True):
        set_env_state(env, env_state)
    envs._autoreset_envs[:] = state["reset_next"].numpy()


# ----------------------------------------------------------------------------------------------- agent


def mlp(sizes: list[int], output_gain: float) -> nn.Sequential:
    """Linear layers with tanh between them; orthogonal weights of gain sqrt(2), the last `output_gain`."""
    layers = []
    for inputs, outputs in zip(sizes, sizes[1:]):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
        nn.init.orthogonal_(layers[-2].weight, math.sqrt(2))
        nn.init.zeros_(layers[-2].bias)
    nn.init.orthogonal_(layers[-2].weight, output_gain)
    return nn.Sequential(*layers[:-1])


class Agent(nn.Module):
    """Categorical policy and value function.

    An action has K components (1 for Discrete) with up to n choices each, counted from 0; in a component that
    has fewer, the others are masked out.
    """

    def __init__(
        self,
        observation_size: int,
        action_sizes: list[int],
        shared: bool = False,
        action_start: list[int] | None = None,
    ):
        super().__init__()
        choices = max(action_sizes)
        self.actor = mlp([observation_size, 64, 64, len(action_sizes) * choices], output_gain=0.01)
        self.critic = mlp([observation_size, 64, 64, 1], output_gain=1.0)
        if shared:
            self.critic = nn.Sequential(*self.actor[:-1], self.critic[-1])
        missing = torch.arange(choices) >= torch.tensor(action_sizes)[:, None]
        self.register_buffer("mask", torch.where(missing, -1e9, 0.0))  # finite: 0 x inf would be NaN
        self.register_buffer("action_start", torch.tensor(action_start or [0] * len(action_sizes)))

    def logits(self, observations: torch.Tensor) -> torch.Tensor:
        """Unnormalised log-probabilities (..., K, n) of the choices at observations (..., D)."""
        return self.actor(observations).unflatten(-1, self.mask.shape) + self.mask

    def value(self, observations: torch.Tensor) -> torch.Tensor:
        """V (...) of observations (..., D)."""
        return self.critic(observations).squeeze(-1)

    @classmethod
    def load(cls, run: str | Path) -> "Agent":
        """The agent of a run directory or a checkpoint file, on the CPU."""
        checkpoint = load_checkpoint(run)
        state = checkpoint["agent"]
        action_sizes = (state["mask"] == 0).sum(1).tolist()
        agent = cls(state["actor.0.weight"].shape[1], action_sizes, checkpoint["args"]["shared_network"])
        agent.load_state_dict(state)
        return agent


class FrozenPolicy:
    """The policy of this moment in NumPy, which has a fraction of the overhead of PyTorch for a few rows.

    The network is read off `agent.actor`. One with other layers than Linear and Tanh is left to PyTorch: then
    it is the live module that is called, not a copy.
    """

    def __init__(self, agent: Agent):
        def array(tensor: torch.Tensor) -> np.ndarray:
            return tensor.detach().cpu().numpy().copy()

        self.mask, self.action_start = array(agent.mask), array(agent.action_start)
        self.actor, self.device = agent.actor, agent.mask.device
        layers = agent.actor if type(agent.actor) is nn.Sequential else [agent.actor]
        self.layers = []  # (weight, bias) of a Linear, None for a Tanh; empty: left to PyTorch
        if all(type(layer) in (nn.Linear, nn.Tanh) for layer in layers):
            for layer in layers:
                bias = 0 if getattr(layer, "bias", None) is None else array(layer.bias)
                self.layers.append(None if type(layer) is nn.Tanh else (array(layer.weight).T, bias))

    def logits(self, observations: np.ndarray) -> np.ndarray:
        """Unnormalised log-probabilities (N, K, n) at observations (N, D) of the environment."""
        x = observations.astype(np.float32)
        if self.layers:
            for layer in self.layers:
                x = np.tanh(x) if layer is None else x @ layer[0] + layer[1]
        else:
            with torch.inference_mode():
                x = self.actor(torch.as_tensor(x, device=self.device)).cpu().numpy()
        return x.reshape(-1, *self.mask.shape) + self.mask

    def to_environment(self, actions: np.ndarray) -> np.ndarray:
        """Choices (..., K), counted from 0, as the environment numbers them."""
        return actions + self.action_start


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


def categorical_log_prob(logits: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
    """Log-probability (...) of actions (..., K) under logits (..., K, n), summed over the components."""
    return logits.log_softmax(-1).gather(-1, actions.unsqueeze(-1)).squeeze(-1).sum(-1)


def categorical_entropy(logits: torch.Tensor) -> torch.Tensor:
    """Entropy (...), in nats, of logits (..., K, n), summed over the components."""
    log_probs = logits.log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum((-2, -1))


def masked_mean(x: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Mean, a scalar, of the x (...) where valid (...); 0 if there are none."""
    return torch.where(valid, x, 0).sum() / valid.sum().clamp(min=1)


# ----------------------------------------------------------------------------------------- optimisation


class RMSprop:
    """RMSprop without momentum (Mnih et al. 2016, equations S2 and S3), epsilon inside the root.

    torch.optim adds epsilon to the root instead, where 1e-5 hardly matters; inside, it weighs as much as
    gradients of 0.003, and keeps the steps small where gradients are smaller than that. And its step breaks a
    compiled graph; this one is traced into one graph with the loss and its gradient.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], learning_rate: float, alpha: float, eps: float):
        self.parameters = list(parameters)
        self.alpha, self.eps = alpha, eps
        # A tensor, since each new number would compile the update anew.
        self.learning_rate = torch.tensor(float(learning_rate), device=self.parameters[0].device)
        self.mean_squares = [torch.zeros_like(p) for p in self.parameters]

    @torch.no_grad()
    def step(self, gradients: list[torch.Tensor]) -> None:
        """Moves the parameters by one step, given their gradients."""
        for p, gradient, mean_square in zip(self.parameters, gradients, self.mean_squares):
            mean_square.lerp_(gradient.square(), 1 - self.alpha)
            p -= self.learning_rate * gradient / (mean_square + self.eps).sqrt()

    def state(self) -> list[torch.Tensor]:
        """The tensors of the state, to be saved and to be copied to."""
        return [self.learning_rate, *self.mean_squares]


METRICS = ("policy_loss", "value_loss", "entropy", "grad_norm", "explained_variance")


def compute_gradients(
    agent: Agent,
    args: Args,
    observations: torch.Tensor,  # (T + 1, N, D)
    actions: torch.Tensor,  # (T, N, K)
    rewards: torch.Tensor,  # (T, N), as are the next ones
    terminated: torch.Tensor,
    done: torch.Tensor,
    valid: torch.Tensor,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Gradients of the loss on one rollout, scaled down to max_grad_norm, and METRICS as a tensor."""
    all_values = agent.value(observations)
    values = all_values[:-1]
    with torch.no_grad():
        # The observation after step t is the one before step t + 1, also where an episode ended: step t + 1
        # then only resets. What that step adds to the sums, done[t] keeps from flowing back.
        advantages, returns = compute_gae(
            rewards, values, all_values[1:], terminated, done, args.gamma, args.gae_lambda
        )
        errors, centered = returns - values, returns - masked_mean(returns, valid)
        error_variance = masked_mean((errors - masked_mean(errors, valid)).square(), valid)
        explained_variance = 1 - error_variance / masked_mean(centered.square(), valid).clamp(min=1e-8)
        if args.norm_adv:
            advantages = advantages - masked_mean(advantages, valid)
            advantages = advantages / (masked_mean(advantages.square(), valid).sqrt() + 1e-8)
    logits = agent.logits(observations[:-1])
    policy_loss = -masked_mean(categorical_log_prob(logits, actions) * advantages, valid)
    value_loss = 0.5 * masked_mean((values - returns).square(), valid)
    entropy = masked_mean(categorical_entropy(logits), valid)
    loss = policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy

    gradients = torch.autograd.grad(loss, list(agent.parameters()))
    with torch.no_grad():
        grad_norm = nn.utils.get_total_norm(gradients, foreach=False)
        scale = (args.max_grad_norm / (grad_norm + 1e-6)).clamp(max=1)
        metrics = torch.stack((policy_loss, value_loss, entropy, grad_norm, explained_variance))
        return [scale * gradient for gradient in gradients], metrics


def make_update(agent: Agent, optimizer: RMSprop, args: Args) -> Callable[..., torch.Tensor]:
    """The function that takes one step on one rollout and returns METRICS as a tensor."""

    def update(*rollout: torch.Tensor) -> torch.Tensor:
        gradients, metrics = compute_gradients(agent, args, *rollout)
        optimizer.step(gradients)
        return metrics

    return compile_update(update, optimizer.learning_rate.device) if args.compile else update


def compile_update(update: Callable[..., torch.Tensor], device: torch.device) -> Callable[..., torch.Tensor]:
    """The update compiled into one graph, or as it is where there is no compiler."""
    # Without this, tracing stops at the gradient, and the update is no longer one graph.
    torch._dynamo.config.trace_autograd_ops = True
    # Calls from kernel to kernel in C++ instead of Python, and without their checks: a quarter faster.
    options = {"cpp_wrapper": True, "size_asserts": False, "alignment_asserts": False}
    options = options if device.type == "cpu" else {}
    try:
        torch.compile(lambda x: x + 1, options=options)(torch.zeros(8, device=device))
    except Exception as error:
        reason = str(error).strip().split("\n")[0][:150]
        print(f"torch.compile does not work here, the update runs eagerly, several times slower: {reason}")
        return update
    return torch.compile(update, dynamic=False, options=options)


# ----------------------------------------------------------------------------- rollout and evaluation


def collect_rollout(
    envs: gym.vector.VectorEnv,
    latest: np.ndarray,
    done_before: np.ndarray,
    policy: FrozenPolicy,
    num_steps: int,
    running: np.ndarray,
    finished: deque,
) -> tuple[np.ndarray, ...]:
    """Plays T = num_steps steps in each of N environments, from observations `latest` (N, D).

    Returns observations (T + 1, N, D), actions (T, N, K), rewards, terminated, done and valid (T, N). A step
    is not valid if the one before it ended an episode (`done_before` (N,), for the first step): it only
    resets, ignores its action and has reward 0. Updates in place: `running`, the return and length so far
    (2, N); `finished`, to which those of ended episodes are appended.
    """
    action_shape, action_type = envs.action_space.shape, envs.action_space.dtype
    # The largest of logits + noise is a sample of their distribution, if the noise is -log of an exponential
    # variable: the Gumbel-max trick (Gumbel 1954; Maddison et al. 2014).
    noise = -torch.empty(num_steps, envs.num_envs, *policy.mask.shape).exponential_().log().numpy()
    actions = np.empty(noise.shape[:-1], np.int64)
    observations = np.empty((num_steps + 1, *latest.shape), np.float32)
    rewards = np.empty((num_steps, envs.num_envs), np.float32)
    terminated, done, valid = np.empty((3, *rewards.shape), bool)
    observations[0] = latest
    for t in range(num_steps):
        valid[t] = ~done_before
        actions[t] = (policy.logits(observations[t]) + noise[t]).argmax(-1)
        env_actions = policy.to_environment(actions[t]).reshape(action_shape).astype(action_type)
        observations[t + 1], rewards[t], terminated[t], truncated, _ = envs.step(env_actions)
        done_before = done[t] = terminated[t] | truncated
        running[0] += rewards[t]
        running[1] += valid[t]
        if done_before.any():
            finished.extend(running[:, done_before].T.tolist())
            running[:, done_before] = 0
    return observations, actions, rewards, terminated, done, valid


EVALUATION_SEED = 1_000_000_000  # added to the seed: no start of the training is one of an evaluation
MAX_EPISODE_STEPS = 100_000  # of an evaluation, in environments that never end an episode


def evaluate(
    agent: Agent, env_id: str, episodes: int, seed: int, videos: Path | None = None, video_name: str = "video"
) -> np.ndarray:
    """Undiscounted returns (episodes,) of the greedy policy; episode i starts from seed + i.

    No generator of the training is drawn from. With `videos`, a folder, the first episode is recorded.
    """
    env = make_env(env_id, render_mode="rgb_array" if videos else None)
    if videos:
        env = gym.wrappers.RecordVideo(env, str(videos), lambda episode: episode == 0, name_prefix=video_name)
    policy = FrozenPolicy(agent)
    returns = np.zeros(episodes)
    for episode in range(episodes):
        observation, _ = env.reset(seed=seed + episode)
        for _ in range(MAX_EPISODE_STEPS):
            actions = policy.to_environment(policy.logits(observation[None]).argmax(-1))
            action = actions.reshape(-1, *env.action_space.shape)[0].astype(env.action_space.dtype)
            observation, reward, terminated, truncated, _ = env.step(action)
            returns[episode] += reward
            if terminated or truncated:
                break
    env.close()
    return returns


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


class Training:
    """What both forms of the training have in common: agent, optimizer, log, evaluations and checkpoints.

    Goes on from the checkpoint in `run` if there is one.
    """

    def __init__(self, args: Args, run: Path):
        self.args, self.run = args, run
        device = torch.device("cpu" if args.device == "auto" else args.device)
        torch.manual_seed(args.seed)
        random.seed(args.seed)  # this and the next for environments that draw from global generators
        np.random.seed(args.seed)
        env = make_env(args.env_id)
        action_sizes, action_start = action_layout(env.action_space)
        observation_size = env.observation_space.shape[0]
        self.agent = Agent(observation_size, action_sizes, args.shared_network, action_start).to(device)
        self.optimizer = RMSprop(
            self.agent.parameters(), args.learning_rate, args.rmsprop_alpha, args.rmsprop_eps
        )
        self.step, self.best_return, self.elapsed = 0, -math.inf, 0.0
        self.checkpoint = load_checkpoint(run) if (run / "checkpoint.pt").exists() else None
        if self.checkpoint:
            self.agent.load_state_dict(self.checkpoint["agent"])
            for tensor, saved in zip(self.optimizer.state(), self.checkpoint["optimizer"], strict=True):
                tensor.copy_(saved)
            self.step, self.elapsed = self.checkpoint["step"], self.checkpoint["elapsed"]
            self.best_return = self.checkpoint["best_return"]

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
        self.writer = SummaryWriter(str(run), purge_step=self.step + 1 if self.step else 0)

    def start(self) -> None:
        """Evaluates a new run, or says where an old one goes on, and shows the progress from here on."""
        if self.step:
            print(f"Resumed at step {self.step:,}", flush=True)
        elif self.args.eval_interval:
            self.log_evaluation()
        total, step = self.args.total_timesteps, self.step
        self.progress = tqdm(
            total=total, initial=step, unit=" steps", disable=None
        )  # None: on a terminal only
        self.last_line = -math.inf
        self.window_start = time.perf_counter()

    def save(self, name: str, form_state: dict) -> None:
        state = {
            "args": dataclasses.asdict(self.args),
            "agent": self.agent.state_dict(),
            "optimizer": self.optimizer.state(),
            "step": self.step,
            "best_return": self.best_return,
            "elapsed": self.elapsed,
        }
        save_checkpoint(self.run / name, state | form_state)

    def log(self, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, self.step)

    def log_evaluation(self) -> float:
        args, step = self.args, self.step
        videos = self.run / "videos" if args.capture_video else None
        seed = args.seed + EVALUATION_SEED
        returns = evaluate(self.agent, args.env_id, args.eval_episodes, seed, videos, f"step-{step}")
        self.log({"eval/episodic_return": returns.mean(), "eval/episodic_return_std": returns.std()})
        if args.track and videos:
            import wandb

            wandb.log({"video": wandb.Video(str(videos / f"step-{step}-episode-0.mp4")), "global_step": step})
        tqdm.write(f"step {step:>9,}: evaluation {returns.mean():.1f} ± {returns.std():.1f}")
        return returns.mean().item()

    def record(
        self,
        step: int,
        metrics: list[float],
        episode_means: list[float],
        get_form_state: Callable[[], dict] = dict,
    ) -> None:
        """Logs what happened since the step of the last record, evaluates and saves if it is time to.

        `metrics` are the means of METRICS, `episode_means` the mean return and length of episodes, or empty;
        `get_form_state` returns what a checkpoint is to hold besides what both forms have.
        """
        args, previous, self.step = self.args, self.step, step
        losses = dict(zip(METRICS, metrics))
        parameters = nn.utils.parameters_to_vector(self.agent.parameters()).sum().item()
        for name, value in {**losses, "the sum of the parameters": parameters}.items():
            if not math.isfinite(value):
                causes = "rewards or observations that are not finite, or too high a learning rate"
                raise SystemExit(
                    f"{name} is {value} at step {step:,}; look for {causes}. "
                    f"{self.run} keeps the last checkpoint"
                )
        now = time.perf_counter()
        seconds = now - self.window_start
        self.elapsed += seconds
        self.log({f"losses/{name}": value for name, value in losses.items()})
        self.log({"charts/learning_rate": self.optimizer.learning_rate})
        self.log({"charts/SPS": (step - previous) / seconds, "time/elapsed": self.elapsed})
        training_return, length = episode_means or (math.nan, math.nan)
        if episode_means:
            self.log({"charts/episodic_return": training_return, "charts/episodic_length": length})
        last = step >= args.total_timesteps
        if args.eval_interval and (last or step // args.eval_interval > previous // args.eval_interval):
            evaluation = self.log_evaluation()
            if evaluation > self.best_return:
                self.best_return = evaluation
                self.save("best.pt", get_form_state())
        if last or step // args.checkpoint_interval > previous // args.checkpoint_interval:
            self.writer.flush()
            self.save("checkpoint.pt", get_form_state())
        self.progress.set_postfix_str(f"return {training_return:.1f}", refresh=False)
        self.progress.update(step - previous)
        if self.progress.disable and (last or time.perf_counter() - self.last_line > 10):
            self.last_line = time.perf_counter()
            speed = f"{(step - previous) / seconds:,.0f} steps/s"
            print(f"step {step:>9,}: return {training_return:.1f}, {speed}", flush=True)
        # The workers of A3C go on while this process evaluates and saves.
        self.window_start = now if args.asynchronous else time.perf_counter()

    def close(self) -> None:
        self.progress.close()
        self.writer.close()
        if self.args.track:
            import wandb

            wandb.finish()


def train(args: Args, run: Path) -> None:
    """A2C or A3C; goes on from the checkpoint in `run` if there is one."""
    training = Training(args, run)
    if args.asynchronous:
        train_asynchronous(args, training)
    else:
        train_synchronous(args, training)
    training.close()


def train_synchronous(args: Args, training: Training) -> None:
    """A2C: all environments are played with the same policy, and then there is one update."""
    agent, optimizer, device = training.agent, training.optimizer, training.agent.mask.device
    envs = make_vector_env(args.env_id, args.num_envs)
    latest, _ = envs.reset(seed=args.seed * args.num_envs)  # runs that differ in --seed only share no start
    done = np.zeros(args.num_envs, bool)
    running, finished = np.zeros((2, args.num_envs)), deque(maxlen=100)  # returns and lengths of episodes
    if training.checkpoint:
        state = training.checkpoint
        finished.extend(state["finished"])
        torch.set_rng_state(state["generator"])
        if state["envs"] is None:
            latest, _ = envs.reset(seed=(args.seed + state["step"]) * args.num_envs)
            print(f"The state of {args.env_id} cannot be saved, so its episodes start anew")
        else:
            set_vector_state(envs, state["envs"])
            latest, done, running = (state[name].numpy() for name in ("latest", "done", "running"))

    def get_form_state() -> dict:
        return {
            "finished": list(finished),
            "generator": torch.get_rng_state(),  # training draws from this one; environments have their own
            "envs": get_vector_state(envs),
            "latest": torch.tensor(latest),
            "done": torch.tensor(done),
            "running": torch.tensor(running),
        }

    training.start()
    update = make_update(agent, optimizer, args)  # after the evaluation: compiling anew takes half a minute
    step, iterations, totals = training.step, 0, torch.zeros(len(METRICS), device=device)
    while step < args.total_timesteps:
        if args.anneal_lr:
            optimizer.learning_rate.fill_(args.learning_rate * (1 - step / args.total_timesteps))
        rollout = collect_rollout(envs, latest, done, FrozenPolicy(agent), args.num_steps, running, finished)
        totals += update(*(torch.from_numpy(x).to(device) for x in rollout))
        latest, done, valid = rollout[0][-1], rollout[-2][-1], rollout[-1]
        step += int(valid.sum())
        iterations += 1
        if step - training.step >= args.log_interval or step >= args.total_timesteps:
            episode_means = np.mean(finished, axis=0).tolist() if finished else []
            training.record(step, (totals / iterations).tolist(), episode_means, get_form_state)
            iterations, totals = 0, totals.zero_()
    envs.close()


# ------------------------------------------------------------------------------- asynchronous training

# What a worker counts, each in its own row of a shared tensor: nothing there needs a lock.
COUNTS = ("steps", "iterations", "episodes", "returns", "lengths", *METRICS)


def train_asynchronous(args: Args, training: Training) -> None:
    """A3C (Mnih et al. 2016, algorithm S3): starts the workers, watches them, and logs what they do."""
    shared_agent = training.agent.share_memory()
    for tensor in training.optimizer.state():
        tensor.share_memory_()
    counts = torch.zeros(args.num_workers, len(COUNTS), dtype=torch.float64).share_memory_()
    first_step = training.step
    training.start()
    # Spawned, not forked: a fork would copy the locks of the threads that write the log and the progress, in
    # whatever state they are, but not the threads that would release them.
    context = multiprocessing.get_context("spawn")
    shared = args, shared_agent, training.optimizer, counts, first_step
    workers = [context.Process(target=work, args=(i, *shared), daemon=True) for i in range(args.num_workers)]
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: Ctrl-C is left to this process
    for worker in workers:
        worker.start()
    signal.signal(signal.SIGINT, handler)
    try:
        before, episode_means = torch.zeros_like(counts[0]), []
        while training.step < args.total_timesteps:
            wait([worker.sentinel for worker in workers if worker.is_alive()], timeout=0.05)
            ended = [(i, worker.exitcode) for i, worker in enumerate(workers) if worker.exitcode is not None]
            now = counts.sum(0)  # after that: a worker that ended well has counted all of its steps
            step = first_step + int(now[0])
            early = ended if step < args.total_timesteps else []
            failed = [worker for worker in ended if worker[1]] or early
            training.agent = copy.deepcopy(shared_agent)  # stands still while it is evaluated and saved
            if failed:
                index, code = failed[0]
                training.step = step
                training.writer.flush()
                # What is not finite is not saved: the checkpoint before it is better.
                if all(x.isfinite().all() for x in (now, *training.agent.parameters())):
                    training.save("checkpoint.pt", {})
                raise SystemExit(
                    f"Worker {index} ended with exit code {code} at step {step:,}; the others were stopped. "
                    f"Go on with: python {Path(__file__).name} --resume {training.run}"
                )
            if step - training.step >= args.log_interval or step >= args.total_timesteps:
                _, iterations, episodes, *sums = (now - before).tolist()
                metrics = [x / max(iterations, 1) for x in sums[2:]]
                if episodes:  # else the means of before
                    episode_means = [x / episodes for x in sums[:2]]
                training.record(step, metrics, episode_means)
                before = now
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()


def work(
    index: int, args: Args, shared: Agent, optimizer: RMSprop, counts: torch.Tensor, first_step: int
) -> None:
    """One worker: plays with a copy of the shared parameters, and updates them with the gradient of that."""
    torch.set_num_threads(1)
    threadpoolctl.threadpool_limits(1)
    num_envs = args.num_envs // args.num_workers
    seed = (args.seed + first_step) * args.num_envs + index * num_envs
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # NumPy takes 32 bits
    envs = make_vector_env(args.env_id, num_envs)
    latest, _ = envs.reset(seed=seed)
    done, running, finished = np.zeros(num_envs, bool), np.zeros((2, num_envs)), deque()
    agent = copy.deepcopy(shared)
    parent = multiprocessing.parent_process()
    while (step := first_step + counts[:, 0].sum().item()) < args.total_timesteps and parent.is_alive():
        agent.load_state_dict(shared.state_dict())
        rollout = collect_rollout(envs, latest, done, FrozenPolicy(agent), args.num_steps, running, finished)
        gradients, metrics = compute_gradients(agent, args, *(torch.from_numpy(x) for x in rollout))
        if args.anneal_lr:
            optimizer.learning_rate.fill_(args.learning_rate * (1 - step / args.total_timesteps))
        optimizer.step(gradients)
        latest, done, valid = rollout[0][-1], rollout[-2][-1], rollout[-1]
        episodes = np.sum(finished, axis=0).tolist() if finished else [0, 0]
        counts[index] += torch.tensor([valid.sum(), 1, len(finished), *episodes, *metrics.tolist()])
        finished.clear()


def main(args: Args) -> Path:
    """Trains, goes on with a run, or evaluates one; returns the run directory."""
    # For networks of this size a second thread costs more than it gives, in PyTorch as in NumPy.
    torch.set_num_threads(1)
    threadpoolctl.threadpool_limits(1)
    warnings.filterwarnings("ignore", ".*Overwriting existing videos")  # those of the evaluation before
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(args.device, True):
        raise SystemExit(f"PyTorch finds no {args.device} device here; use --device auto")

    if args.evaluate:
        run = Path(args.evaluate)
        agent, env_id = Agent.load(run), load_checkpoint(run)["args"]["env_id"]
        videos = (run if run.is_dir() else run.parent) / "videos" if args.capture_video else None
        seed = args.seed + EVALUATION_SEED
        returns = evaluate(agent, env_id, args.eval_episodes, seed, videos, "evaluation")
        print(f"{env_id}: {returns.mean():.1f} ± {returns.std():.1f} over {args.eval_episodes} episodes")
        return run
    if args.resume:
        run = Path(args.resume)
    else:
        make_env(args.env_id).close()  # refuses before there is a run directory
        name = f"{args.env_id.replace('/', '-').replace(':', '-')}__{args.exp_name}__{args.seed}"
        run = Path(args.runs) / f"{name}__{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        run.mkdir(parents=True, exist_ok=args.resume is not None)
        (run / "args.tmp").write_text(json.dumps(dataclasses.asdict(args), indent=2))
        os.replace(run / "args.tmp", run / "args.json")
    except OSError as error:
        raise SystemExit(f"Cannot write the run directory {run}: {error}")
    print(f"Run directory: {run}", flush=True)
    try:
        train(args, run)
    except KeyboardInterrupt:
        raise SystemExit(f"\nInterrupted; go on with: python {Path(__file__).name} --resume {run}")
    return run


if __name__ == "__main__":
    main(parse_args())
