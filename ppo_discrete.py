"""The minimal Proximal Policy Optimization (PPO): flat observations, discrete actions, in one file.

Every iteration plays num_envs x num_steps transitions with the policy pi_old, estimates their advantages A by
GAE(lambda) (Schulman et al. 2016), and takes a few epochs of minibatch steps to

    maximise  E[ min(r A, clip(r, 1 - eps, 1 + eps) A) ] - vf_coef E[ (V - R)^2 / 2 ] + ent_coef E[ H(pi) ],

where r = pi(a|s) / pi_old(a|s) and R = A + V, with V of the critic before the update (Schulman et al. 2017,
equations 7 and 9).

Greedy evaluation: CartPole-v1 500 after 100k steps in 5 of 5 seeds (benchmark/results/classic).

    python ppo_discrete.py --env-id Acrobot-v1 --seed 3
    python ppo_discrete.py --resume runs/Acrobot-v1__ppo_discrete__3__20261120-101500
    python ppo_discrete.py --evaluate runs/Acrobot-v1__ppo_discrete__3__20261120-101500 --capture-video
"""

import dataclasses
import inspect
import json
import math
import os
import random
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import threadpoolctl
import torch
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
    total_timesteps: int = 100_000
    """environment steps, rounded up to whole iterations"""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """where the networks are trained; auto is the CPU, which is faster for networks of this size"""
    compile: bool = True
    """compile the update with torch.compile, several times faster; it runs eagerly without a compiler"""
    checkpoint_interval: int = 25_000
    """environment steps between checkpoints"""
    eval_interval: int = 25_000
    """environment steps between evaluations of the greedy policy; 0 for none"""
    eval_episodes: int = 10
    """episodes of an evaluation"""
    resume: str | None = None
    """run directory to resume; its arguments are loaded first"""
    evaluate: str | None = None
    """run directory or checkpoint file to evaluate instead of training"""

    # Algorithm
    shared_network: bool = False
    """one network with two heads for policy and value function, instead of one for each"""
    num_envs: int = 8
    """environments played side by side"""
    num_steps: int = 128
    """steps in each environment per iteration"""
    update_epochs: int = 10
    """passes over the transitions of an iteration"""
    num_minibatches: int = 16
    """minibatches per epoch; divides num_envs x num_steps"""
    learning_rate: float = 1e-3
    """step size of Adam at the start"""
    anneal_lr: bool = True
    """lower the learning rate linearly to 0 over total_timesteps"""
    gamma: float = 0.99
    """discount factor, in [0, 1]"""
    gae_lambda: float = 0.95
    """lambda of GAE, in [0, 1]: 0 trusts the value function, 1 the sampled return"""
    clip_coef: float = 0.2
    """eps: ratios in [1 - eps, 1 + eps] are left alone"""
    target_kl: float | None = None
    """end the epochs of an iteration once the mean KL of one exceeds 1.5 times this; None for no limit"""
    norm_adv: bool = True
    """normalise the advantages of each minibatch"""
    ent_coef: float = 0.0
    """weight of the entropy bonus"""
    vf_coef: float = 0.5
    """weight of the value loss; lower it for a shared_network with large returns"""
    max_grad_norm: float = 0.5
    """a gradient, of policy and value function together, of a larger norm is scaled down to this one"""

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

    @property
    def batch_size(self) -> int:
        """Transitions per iteration."""
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
        for name in ("ent_coef", "vf_coef", "eval_interval"):
            if not getattr(self, name) >= 0:  # not "< 0", which lets NaN through
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("gamma", "gae_lambda"):
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


def reset_all(envs: list[gym.Env], first_seed: int) -> np.ndarray:
    """Resets N environments, with seeds from `first_seed` on, and returns the observations (N, D), float64.

    Environment i begins i/N into its time limit, so that the time limits do not fall together. Otherwise
    every batch would cover the same short stretch of all episodes.
    """
    observations = np.array([env.reset(seed=first_seed + i)[0] for i, env in enumerate(envs)], np.float64)
    for i, env in enumerate(envs):
        for layer in wrapper_layers(env):
            if isinstance(layer, gym.wrappers.TimeLimit):
                layer._elapsed_steps = i * layer._max_episode_steps // len(envs)
    return observations


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


def surrogate_loss(
    log_probs: torch.Tensor, old_log_probs: torch.Tensor, advantages: torch.Tensor, clip_coef: float
) -> torch.Tensor:
    """Policy loss, a scalar, from tensors (B,); Schulman et al. 2017, equation 7."""
    ratio = (log_probs - old_log_probs).exp()
    return -torch.min(ratio * advantages, ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantages).mean()


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


def make_update(agent: Agent, optimizer: Adam, args: Args) -> Callable[..., torch.Tensor]:
    """The function that takes one step on one minibatch and returns METRICS as a tensor."""

    def update(
        indices: torch.Tensor,  # (M,) rows of the minibatch in the tensors that follow
        observations: torch.Tensor,  # (B, D)
        actions: torch.Tensor,  # (B, K)
        old_log_probs: torch.Tensor,  # (B,)
        advantages: torch.Tensor,  # (B,)
        returns: torch.Tensor,  # (B,)
    ) -> torch.Tensor:
        observations, old_log_probs = observations[indices], old_log_probs[indices]
        advantages = advantages[indices]
        if args.norm_adv:
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        logits = agent.logits(observations)
        log_probs = categorical_log_prob(logits, actions[indices])
        policy_loss = surrogate_loss(log_probs, old_log_probs, advantages, args.clip_coef)
        value_loss = 0.5 * (agent.value(observations) - returns[indices]).square().mean()
        entropy = categorical_entropy(logits).mean()
        loss = policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy

        gradients = torch.autograd.grad(loss, optimizer.parameters)
        with torch.no_grad():
            grad_norm = nn.utils.get_total_norm(gradients, foreach=False)
            scale = (args.max_grad_norm / (grad_norm + 1e-6)).clamp(max=1)
            optimizer.step([scale * gradient for gradient in gradients])
            log_ratio = log_probs - old_log_probs
            # k3 of Schulman (2020), "Approximating KL divergence": estimates KL(old, new), is never negative
            approx_kl = (log_ratio.exp() - 1 - log_ratio).mean()
            clip_fraction = ((log_ratio.exp() - 1).abs() > args.clip_coef).float().mean()
            return torch.stack((policy_loss, value_loss, entropy, approx_kl, clip_fraction, grad_norm))

    return compile_update(update, optimizer.steps.device) if args.compile else update


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
    envs: list[gym.Env],
    latest: np.ndarray,
    policy: FrozenPolicy,
    num_steps: int,
    running: np.ndarray,
    finished: deque,
) -> tuple[np.ndarray, ...]:
    """Plays T = num_steps steps in each of N environments; one is reset in the step that ends its episode.

    Returns observations and next_observations (T, N, D) in float32, actions (T, N, K), rewards, terminated
    and done (T, N). Updates in place: `latest`, the current observations (N, D); `running`, the return and
    length so far (2, N); `finished`, to which those of ended episodes are appended.
    """
    action_shape, action_type = envs[0].action_space.shape, envs[0].action_space.dtype
    # The largest of logits + noise is a sample of their distribution, if the noise is -log of an exponential
    # variable: the Gumbel-max trick (Gumbel 1954; Maddison et al. 2014).
    noise = -torch.empty(num_steps, len(envs), *policy.mask.shape).exponential_().log().numpy()
    actions = np.empty(noise.shape[:-1], np.int64)
    observations = np.empty((num_steps, *latest.shape), np.float32)
    next_observations = np.empty_like(observations)
    rewards = np.empty((num_steps, len(envs)), np.float32)
    terminated, truncated = np.empty_like(rewards, bool), np.empty_like(rewards, bool)
    for t in range(num_steps):
        observations[t] = latest
        actions[t] = (policy.logits(latest) + noise[t]).argmax(-1)
        env_actions = policy.to_environment(actions[t]).reshape(-1, *action_shape).astype(action_type)
        for i, env in enumerate(envs):
            latest[i], rewards[t, i], terminated[t, i], truncated[t, i], _ = env.step(env_actions[i])
        next_observations[t] = latest
        running[0] += rewards[t]
        running[1] += 1
        for i in np.flatnonzero(terminated[t] | truncated[t]):
            finished.append(running[:, i].tolist())
            running[:, i] = 0
            latest[i], _ = envs[i].reset()
    return observations, next_observations, actions, rewards, terminated, terminated | truncated


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


def train(args: Args, run: Path) -> None:
    """PPO (Schulman et al. 2017, algorithm 1); goes on from the checkpoint in `run` if there is one."""
    device = torch.device("cpu" if args.device == "auto" else args.device)
    torch.manual_seed(args.seed)
    random.seed(args.seed)  # this and the next for environments that draw from global generators
    np.random.seed(args.seed)
    envs = [make_env(args.env_id) for _ in range(args.num_envs)]
    # Runs that differ in --seed only share no start.
    latest = reset_all(envs, first_seed=args.seed * args.num_envs)
    action_sizes, action_start = action_layout(envs[0].action_space)
    agent = Agent(latest.shape[1], action_sizes, args.shared_network, action_start).to(device)
    optimizer = Adam(agent.parameters(), args.learning_rate)
    running, finished = np.zeros((2, args.num_envs)), deque(maxlen=100)  # returns and lengths of episodes
    iteration, best_return, elapsed = 0, -math.inf, 0.0

    if (run / "checkpoint.pt").exists():
        state = load_checkpoint(run)
        agent.load_state_dict(state["agent"])
        for tensor, saved in zip(optimizer.state(), state["optimizer"], strict=True):
            tensor.copy_(saved)
        iteration, best_return, elapsed = state["iteration"], state["best_return"], state["elapsed"]
        finished.extend(state["finished"])
        torch.set_rng_state(state["generator"])
        if None in state["envs"]:
            latest = reset_all(envs, first_seed=(args.seed + iteration) * args.num_envs)
            print(f"The state of {args.env_id} cannot be saved, so its episodes start anew")
        else:
            for env, env_state in zip(envs, state["envs"], strict=True):
                set_env_state(env, env_state)
            latest, running = state["latest"].numpy(), state["running"].numpy()
        print(f"Resumed at step {iteration * args.batch_size:,}", flush=True)

    def save(name: str) -> None:
        state = {
            "args": dataclasses.asdict(args),
            "agent": agent.state_dict(),
            "optimizer": optimizer.state(),
            "iteration": iteration,
            "best_return": best_return,
            "elapsed": elapsed,
            "finished": list(finished),
            "generator": torch.get_rng_state(),  # training draws from this one; each environment has its own
            "envs": [get_env_state(env) for env in envs],
            "latest": torch.from_numpy(latest),
            "running": torch.from_numpy(running),
        }
        save_checkpoint(run / name, state)

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
        videos = run / "videos" if args.capture_video else None
        seed = args.seed + EVALUATION_SEED
        returns = evaluate(agent, args.env_id, args.eval_episodes, seed, videos, f"step-{step}")
        log({"eval/episodic_return": returns.mean(), "eval/episodic_return_std": returns.std()}, step)
        if args.track and videos:
            wandb.log({"video": wandb.Video(str(videos / f"step-{step}-episode-0.mp4")), "global_step": step})
        tqdm.write(f"step {step:>9,}: evaluation {returns.mean():.1f} ± {returns.std():.1f}")
        return returns.mean().item()

    num_iterations = math.ceil(args.total_timesteps / args.batch_size)
    if iteration == 0 and args.eval_interval:
        log_evaluation(0)
    update = make_update(agent, optimizer, args)  # after the evaluation: compiling anew takes half a minute
    total, already = num_iterations * args.batch_size, iteration * args.batch_size
    progress = tqdm(total=total, initial=already, unit=" steps", disable=None)  # None: on a terminal only
    last_line = -math.inf

    first = iteration + 1
    for iteration in range(first, num_iterations + 1):
        start = time.perf_counter()
        step = iteration * args.batch_size
        if args.anneal_lr:
            optimizer.learning_rate.fill_(args.learning_rate * (1 - (iteration - 1) / num_iterations))

        # 1. Play.
        rollout = collect_rollout(envs, latest, FrozenPolicy(agent), args.num_steps, running, finished)
        observations, next_observations, actions, rewards, terminated, done = (
            torch.from_numpy(x).to(device) for x in rollout
        )

        # 2. Judge.
        with torch.no_grad():
            values, next_values = agent.value(observations), agent.value(next_observations)
            old_log_probs = categorical_log_prob(agent.logits(observations), actions)
        advantages, returns = compute_gae(
            rewards, values, next_values, terminated, done, args.gamma, args.gae_lambda
        )
        explained_variance = (1 - (returns - values).var() / returns.var()).item()
        batch = [x.flatten(0, 1) for x in (observations, actions, old_log_probs, advantages, returns)]

        # 3. Learn.
        epochs = []  # the mean of METRICS over the minibatches of each epoch
        for _ in range(args.update_epochs):
            totals = torch.zeros(len(METRICS), device=device)
            for indices in torch.randperm(args.batch_size).view(args.num_minibatches, -1).to(device):
                totals += update(indices, *batch)
            epochs.append(totals / args.num_minibatches)
            if args.target_kl and epochs[-1][METRICS.index("approx_kl")] > 1.5 * args.target_kl:
                break

        # 4. Log, evaluate, save.
        losses = dict(zip(METRICS, torch.stack(epochs).mean(0).tolist()))
        for name, value in losses.items():
            if not math.isfinite(value):
                causes = "rewards or observations that are not finite, or too high a learning rate"
                raise SystemExit(
                    f"{name} is {value} at step {step:,}; look for {causes}. {run} keeps the last checkpoint"
                )
        seconds = time.perf_counter() - start
        elapsed += seconds
        log({f"losses/{name}": value for name, value in losses.items()}, step)
        log({"losses/explained_variance": explained_variance, "losses/epochs": len(epochs)}, step)
        log({"charts/learning_rate": optimizer.learning_rate, "charts/SPS": args.batch_size / seconds}, step)
        log({"time/elapsed": elapsed}, step)
        training_return = math.nan
        if finished:
            training_return, length = np.mean(finished, axis=0)
            log({"charts/episodic_return": training_return, "charts/episodic_length": length}, step)
        # step % interval < batch_size: a multiple of the interval was reached in this iteration.
        last = iteration == num_iterations
        if args.eval_interval and (last or step % args.eval_interval < args.batch_size):
            evaluation = log_evaluation(step)
            if evaluation > best_return:
                best_return = evaluation
                save("best.pt")
        if last or step % args.checkpoint_interval < args.batch_size:
            writer.flush()
            save("checkpoint.pt")
        progress.set_postfix_str(f"return {training_return:.1f}", refresh=False)
        progress.update(args.batch_size)
        if progress.disable and (last or time.perf_counter() - last_line > 10):
            last_line = time.perf_counter()
            speed = f"{args.batch_size / seconds:,.0f} steps/s"
            print(f"step {step:>9,}: return {training_return:.1f}, {speed}", flush=True)

    progress.close()
    writer.close()
    for env in envs:
        env.close()
    if args.track:
        wandb.finish()


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
