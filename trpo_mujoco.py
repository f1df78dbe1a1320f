"""Trust Region Policy Optimization (TRPO) for continuous control, in one file.

Every iteration plays num_envs x num_steps transitions with the policy pi_old, estimates their advantages A by
GAE(lambda) (Schulman et al. 2016), and takes one step that should

    maximise  L = E[ pi(a|s) / pi_old(a|s) A ]   subject to  E[ KL(pi_old, pi) ] <= delta

(Schulman et al. 2015, equation 14). With g the gradient of L, and F the Fisher matrix, which is the Hessian
of the KL at pi_old, the step is beta x: conjugate gradient solves F x = g, and beta = sqrt(2 delta / x'Fx) is
where the quadratic model of the KL, x'Fx / 2, reaches delta. (In both places, --cg-damping times the identity
is added to F.) A line search then shortens the step until the KL itself is at most delta and L itself has
grown (appendix C of the paper). The critic is fitted by epochs of minibatches. `--step-rule` has what this
grew from: the natural gradient, which takes the step as it is (Kakade 2001), and a line search along the
plain gradient, without a trust region.

    python trpo_mujoco.py --env-id Hopper-v5 --seed 3
    python trpo_mujoco.py --resume runs/Hopper-v5__trpo_mujoco__3__20261120-101500
    python trpo_mujoco.py --evaluate runs/Hopper-v5__trpo_mujoco__3__20261120-101500 --capture-video
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
import mujoco
import numpy as np
import threadpoolctl
import torch
import torch.nn as nn
import tyro
from gymnasium.envs.mujoco import MujocoEnv
from torch.nn.utils import parameters_to_vector
from tqdm import tqdm


@dataclass
class Args:
    # Run
    env_id: str = "HalfCheetah-v5"
    """Gymnasium environment with a Box of actions; `module:Name-v0` imports the module that registers it"""
    seed: int = 1
    """seed of the environments, the networks and the sampling"""
    total_timesteps: int = 1_000_000
    """environment steps, rounded up to whole iterations"""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """where the networks are trained; auto is the CPU, which is faster for networks of this size"""
    compile: bool = True
    """compile the update of the critic with torch.compile; it runs eagerly without a compiler"""
    checkpoint_interval: int = 100_000
    """environment steps between checkpoints"""
    eval_interval: int = 100_000
    """environment steps between evaluations of the deterministic policy; 0 for none"""
    eval_episodes: int = 10
    """episodes of an evaluation"""
    resume: str | None = None
    """run directory to resume; its arguments are loaded first"""
    evaluate: str | None = None
    """run directory or checkpoint file to evaluate instead of training"""

    # Algorithm
    num_envs: int = 16
    """environments played side by side"""
    num_steps: int = 128
    """steps in each environment per iteration"""
    gamma: float = 0.99
    """discount factor, in [0, 1]"""
    gae_lambda: float = 0.95
    """lambda of GAE, in [0, 1]: 0 trusts the value function, 1 the sampled return"""
    norm_adv: bool = True
    """normalise the advantages of each iteration"""
    step_rule: Literal["trust-region", "natural-gradient", "line-search"] = "trust-region"
    """TRPO; its step without the line search; or a line search along the gradient, without a trust region"""
    max_kl: float = 0.04
    """delta, the radius of the trust region at the start: mean KL(old, new) of a step, in nats"""
    anneal_kl: bool = True
    """lower the radius linearly to 0 over total_timesteps"""
    cg_iterations: int = 10
    """iterations of conjugate gradient, one Fisher-vector product each; not for step rule line-search"""
    cg_damping: float = 0.1
    """multiple of the identity that is added to the Fisher matrix"""
    max_backtracks: int = 10
    """how often the line search shortens the step before it gives up"""
    backtrack_coef: float = 0.8
    """what the line search multiplies the step with, in (0, 1)"""
    initial_step_size: float = 1.0
    """multiple of the gradient that step rule line-search tries first"""
    critic_epochs: int = 10
    """passes of the critic over the transitions of an iteration"""
    num_minibatches: int = 16
    """minibatches of the critic per epoch; divides num_envs x num_steps"""
    learning_rate: float = 1e-3
    """step size of the critic's Adam at the start"""
    anneal_lr: bool = True
    """lower the learning rate linearly to 0 over total_timesteps"""
    log_std_init: float = -0.5
    """logarithm of the initial standard deviation of the actions, in units of half the action range"""

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
        counts = "total_timesteps num_envs num_steps cg_iterations max_backtracks critic_epochs"
        for name in f"{counts} num_minibatches checkpoint_interval eval_episodes".split():
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("max_kl", "initial_step_size", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must lie in [0, 2^32), got {self.seed}")
        for name in ("cg_damping", "eval_interval"):
            if not getattr(self, name) >= 0:  # not "< 0", which lets NaN through
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if not 0 < self.backtrack_coef < 1:
            raise ValueError(f"backtrack_coef must lie in (0, 1), got {self.backtrack_coef}")
        if self.batch_size % self.num_minibatches:
            batch = f"num_envs x num_steps = {self.num_envs} x {self.num_steps} = {self.batch_size}"
            raise ValueError(f"num_minibatches = {self.num_minibatches} must divide the batch of {batch}")
        if self.norm_adv and self.batch_size == 1:
            raise ValueError("the advantage of one transition cannot be normalised: raise num_steps")
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
    """An environment with flat observations and a Box of actions, or SystemExit with a sentence."""
    try:
        keywords = {"render_mode": render_mode} if render_mode else {}
        env = gym.make(env_id, disable_env_checker=True, **keywords)
    except (gym.error.Error, ImportError, TypeError) as error:
        raise SystemExit(f"Cannot make the environment {env_id}: {error}")
    if not isinstance(env.action_space, gym.spaces.Box):
        raise SystemExit(
            f"{env_id} has {env.action_space} actions, and this script needs a Box: "
            "ppo_discrete.py is for discrete actions, ppo_atari.py for Atari"
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
            hint = "without a display, set MUJOCO_GL=egl or MUJOCO_GL=osmesa for MuJoCo"
            raise SystemExit(f"Cannot record {env_id}, {hint} ({error})")
    return env


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
NOT_STATE += (mujoco.MjModel, mujoco.MjData)
NOT_STATE_NAMES = ("metadata", "mujoco_renderer", "_ezpickle_args")


def get_env_state(env: gym.Env) -> dict | None:
    """All that decides how an environment goes on; None where that cannot be read.

    That is its generator, the plain attributes of it and its wrappers (elapsed steps, and the whole state of
    Gymnasium's classic control), and the simulation of a MuJoCo task.
    """
    core = env.unwrapped
    if not isinstance(core.np_random, np.random.Generator):
        return None
    state = {"generator": core.np_random.bit_generator.state, "layers": []}
    for layer in wrapper_layers(env):
        attributes = {}
        for name, x in vars(layer).items():
            if is_plain(x):
                attributes[name] = torch.tensor(x) if isinstance(x, np.ndarray | np.generic) else x
            elif not (isinstance(x, NOT_STATE) or name in NOT_STATE_NAMES or inspect.isroutine(x)):
                return None
        state["layers"].append(attributes)
    if isinstance(core, MujocoEnv):
        simulation = np.empty(mujoco.mj_stateSize(core.model, mujoco.mjtState.mjSTATE_INTEGRATION))
        mujoco.mj_getState(core.model, core.data, simulation, mujoco.mjtState.mjSTATE_INTEGRATION)
        # Ant and Humanoid take their velocity from positions of bodies that lag the simulation by a substep.
        state["mujoco"] = [torch.tensor(x) for x in (simulation, core.data.xpos, core.data.xipos)]
    return state


def set_env_state(env: gym.Env, state: dict) -> None:
    """Brings an environment that has been reset to the state that `get_env_state` returned."""
    core = env.unwrapped
    core.np_random.bit_generator.state = state["generator"]
    for layer, attributes in zip(wrapper_layers(env), state["layers"], strict=True):
        for name, x in attributes.items():
            setattr(layer, name, x.numpy()[()] if isinstance(x, torch.Tensor) else x)  # [()]: 0-d to scalar
    if isinstance(core, MujocoEnv):
        simulation, xpos, xipos = (x.numpy() for x in state["mujoco"])
        mujoco.mj_setState(core.model, core.data, simulation, mujoco.mjtState.mjSTATE_INTEGRATION)
        core.data.xpos[:], core.data.xipos[:] = xpos, xipos


# ----------------------------------------------------------------------------------------------- agent


class RunningStatistics(nn.Module):
    """Mean and variance of all rows so far, as buffers, merged batch by batch (Chan et al. 1979)."""

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("variance", torch.ones(shape))
        self.register_buffer("count", torch.zeros(()))

    def update(self, rows: np.ndarray) -> None:
        """Takes in rows (B, *shape)."""
        total = self.count.item() + len(rows)
        weight = len(rows) / total
        mean, variance = self.mean.cpu().numpy(), self.variance.cpu().numpy()
        delta = rows.mean(0, dtype=np.float64) - mean
        within = (1 - weight) * variance + weight * rows.var(0, dtype=np.float64)
        self.mean.copy_(torch.as_tensor(mean + weight * delta).float())
        self.variance.copy_(torch.as_tensor(within + weight * (1 - weight) * delta**2).float())
        self.count.fill_(total)


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
    """Gaussian policy and value function, with the statistics and action bounds that belong to them.

    Both networks see normalised observations. A raw action in [-1, 1] covers the range of the environment.
    """

    def __init__(
        self, observation_size: int, action_low: np.ndarray, action_high: np.ndarray, log_std: float = 0.0
    ):
        super().__init__()
        self.actor = mlp([observation_size, 64, 64, len(action_low)], output_gain=0.01)
        self.critic = mlp([observation_size, 64, 64, 1], output_gain=1.0)
        self.log_std = nn.Parameter(torch.full((len(action_low),), log_std))
        self.observation_statistics = RunningStatistics((observation_size,))
        self.return_statistics = RunningStatistics(())
        self.register_buffer("action_low", torch.as_tensor(action_low, dtype=torch.float32))
        self.register_buffer("action_high", torch.as_tensor(action_high, dtype=torch.float32))

    def value(self, observations: torch.Tensor) -> torch.Tensor:
        """V (...) of normalised observations (..., D)."""
        return self.critic(observations).squeeze(-1)

    @classmethod
    def load(cls, run: str | Path) -> "Agent":
        """The agent of a run directory or a checkpoint file, on the CPU."""
        state = load_checkpoint(run)["agent"]
        agent = cls(len(state["observation_statistics.mean"]), state["action_low"], state["action_high"])
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

        self.observation_mean = array(agent.observation_statistics.mean)
        self.observation_scale = 1 / np.sqrt(array(agent.observation_statistics.variance) + 1e-8)
        self.low, self.high = array(agent.action_low), array(agent.action_high)
        # A dimension without two bounds is not scaled; "no bound" may be infinite, or the largest float.
        bounded = np.maximum(-self.low, self.high) < 1e10
        low, high = np.where(bounded, self.low, -1), np.where(bounded, self.high, 1)
        self.action_center, self.action_scale = (low + high) / 2, (high - low) / 2
        self.std = array(agent.log_std.exp())
        self.actor, self.device = agent.actor, agent.log_std.device
        layers = agent.actor if type(agent.actor) is nn.Sequential else [agent.actor]
        self.layers = []  # (weight, bias) of a Linear, None for a Tanh; empty: left to PyTorch
        if all(type(layer) in (nn.Linear, nn.Tanh) for layer in layers):
            for layer in layers:
                bias = 0 if getattr(layer, "bias", None) is None else array(layer.bias)
                self.layers.append(None if type(layer) is nn.Tanh else (array(layer.weight).T, bias))

    def normalize(self, observations: np.ndarray) -> np.ndarray:
        """Observations (..., D) less their mean, over their standard deviation, clipped to [-10, 10]."""
        x = (observations - self.observation_mean) * self.observation_scale
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


def scale_rewards(
    rewards: torch.Tensor,
    done: torch.Tensor,
    discounted_return: torch.Tensor,
    gamma: float,
    statistics: RunningStatistics,
) -> torch.Tensor:
    """Rewards (T, N) over the standard deviation of the discounted return so far, clipped to [-10, 10].

    The mean is not subtracted: that would add a constant to every step, and so change what the length of an
    episode is worth. `discounted_return` (N,) is what the running episodes have gathered; it and the
    statistics are updated in place.
    """
    # G[t] = r[t] + gamma (1 - done[t - 1]) G[t - 1], after the G carried over: discounted_sum, time reversed.
    carried_and_rewards = torch.cat((discounted_return[None], rewards))
    done_before = torch.cat((done.new_zeros(2, done.shape[1]), done[:-1]))
    decay = gamma * (1 - done_before.to(rewards.dtype))
    discounted = discounted_sum(carried_and_rewards.flip(0), decay.flip(0)).flip(0)[1:]
    discounted_return.copy_(discounted[-1] * (1 - done[-1].to(rewards.dtype)))
    statistics.update(discounted.flatten().numpy())
    return (rewards / (statistics.variance.cpu() + 1e-8).sqrt()).clamp(-10, 10)


def gaussian_log_prob(actions: torch.Tensor, means: torch.Tensor, log_std: torch.Tensor) -> torch.Tensor:
    """Log density (...) of actions (..., A), independent in each dimension."""
    return (-0.5 * ((actions - means) / log_std.exp()) ** 2 - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


def gaussian_kl(
    old_means: torch.Tensor, old_log_std: torch.Tensor, means: torch.Tensor, log_std: torch.Tensor
) -> torch.Tensor:
    """KL(old, new) (...), in nats, of normal distributions (..., A), independent in each dimension."""
    squares = (2 * old_log_std).exp() + (old_means - means) ** 2
    return (log_std - old_log_std + 0.5 * squares / (2 * log_std).exp() - 0.5).sum(-1)


def surrogate_objective(
    log_probs: torch.Tensor, old_log_probs: torch.Tensor, advantages: torch.Tensor
) -> torch.Tensor:
    """Mean advantage of the new policy by importance sampling, a scalar; all inputs (B,).

    Schulman et al. 2015, equation 14. Its gradient at the old policy is the policy gradient.
    """
    return ((log_probs - old_log_probs).exp() * advantages).mean()


# ----------------------------------------------------------------------------------- the policy's step


def conjugate_gradient(
    matvec: Callable[[torch.Tensor], torch.Tensor], b: torch.Tensor, iterations: int, tolerance: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """An approximate solution x (P,) of A x = b, and its squared residual |b - A x|^2, a scalar.

    A is symmetric and positive definite, and `matvec` gives A v. Ends once the squared residual is at most
    `tolerance`, or after `iterations` (Hestenes and Stiefel 1952).
    """
    x = torch.zeros_like(b)
    residual, direction = b.clone(), b.clone()
    squared_residual = residual @ residual
    for _ in range(iterations):
        if squared_residual <= tolerance:
            break
        product = matvec(direction)
        curvature = direction @ product
        if not curvature > 0:  # nothing is left but rounding; or NaN
            break
        step_size = squared_residual / curvature
        x += step_size * direction
        residual -= step_size * product
        previous, squared_residual = squared_residual, residual @ residual
        direction = residual + squared_residual / previous * direction
    return x, squared_residual


def fisher_vector_product(
    kl_gradient: torch.Tensor, parameters: list[torch.Tensor], vector: torch.Tensor, damping: float
) -> torch.Tensor:
    """(F + damping I) v (P,), where F is the Hessian of the mean KL(old, new) at the old policy.

    F is never formed: `kl_gradient` (P,) is the gradient of that KL, made with create_graph=True, and the
    gradient of its product with a fixed v is F v (Pearlmutter 1994; Schulman et al. 2015, appendix C.1).
    """
    products = torch.autograd.grad(kl_gradient @ vector, parameters, retain_graph=True)
    return parameters_to_vector(products) + damping * vector


@torch.no_grad()
def line_search(
    evaluate_step: Callable[[], tuple[torch.Tensor, torch.Tensor]],
    parameters: list[torch.Tensor],
    full_step: torch.Tensor,
    max_kl: float,
    backtrack_coef: float,
    max_backtracks: int,
) -> tuple[bool, int]:
    """Moves the parameters by `full_step` (P,), shortened until L has grown and the KL is at most max_kl.

    `evaluate_step` gives L, the surrogate, and the mean KL(old, new), of the parameters as they are. Returns
    whether this succeeded, and how often the step was shortened. After a failure the parameters are as they
    were, bit for bit.
    """
    old = parameters_to_vector(parameters)
    old_surrogate, _ = evaluate_step()
    for backtracks in range(max_backtracks + 1):
        set_parameters(parameters, old + backtrack_coef**backtracks * full_step)
        surrogate, kl = evaluate_step()
        if surrogate > old_surrogate and kl <= max_kl:  # both are False for NaN
            return True, backtracks
    set_parameters(parameters, old)
    return False, max_backtracks


@torch.no_grad()
def set_parameters(parameters: list[torch.Tensor], vector: torch.Tensor) -> None:
    """Copies a vector (P,) into the parameters, in their order."""
    for p, values in zip(parameters, vector.split([p.numel() for p in parameters])):
        p.copy_(values.view_as(p))


CG_TOLERANCE = 1e-10  # on r'r / g'g; conjugate gradient ends sooner once it gets there


def policy_step(
    agent: Agent,
    observations: torch.Tensor,  # (B, D) normalised
    actions: torch.Tensor,  # (B, A) raw
    advantages: torch.Tensor,  # (B,)
    args: Args,
) -> dict[str, float]:
    """Moves the policy by one step of `args.step_rule`; returns what there is to log about it."""
    parameters = [*agent.actor.parameters(), agent.log_std]  # the trust region is one of the noise too
    with torch.no_grad():
        old_means, old_log_std = agent.actor(observations), agent.log_std.clone()
        old_log_probs = gaussian_log_prob(actions, old_means, old_log_std)

    def evaluate_step() -> tuple[torch.Tensor, torch.Tensor]:
        means = agent.actor(observations)
        log_probs = gaussian_log_prob(actions, means, agent.log_std)
        kl = gaussian_kl(old_means, old_log_std, means, agent.log_std).mean()
        return surrogate_objective(log_probs, old_log_probs, advantages), kl

    surrogate, kl = evaluate_step()
    gradient = parameters_to_vector(torch.autograd.grad(surrogate, parameters, retain_graph=True))
    cg_residual = 0.0
    if args.step_rule == "line-search":
        full_step = args.initial_step_size * gradient
    else:
        kl_gradient = parameters_to_vector(torch.autograd.grad(kl, parameters, create_graph=True))

        def matvec(vector: torch.Tensor) -> torch.Tensor:
            return fisher_vector_product(kl_gradient, parameters, vector, args.cg_damping)

        tolerance = CG_TOLERANCE * (gradient @ gradient)
        direction, cg_residual = conjugate_gradient(matvec, gradient, args.cg_iterations, tolerance)
        curvature = direction @ matvec(direction)
        curvature = curvature.clamp(min=torch.finfo(curvature.dtype).tiny)  # it is 0 without a gradient
        full_step = (2 * args.max_kl / curvature).sqrt() * direction

    if args.step_rule == "natural-gradient":
        set_parameters(parameters, parameters_to_vector(parameters).detach() + full_step)
        accepted, backtracks = True, 0
    else:
        max_kl = args.max_kl if args.step_rule == "trust-region" else math.inf
        accepted, backtracks = line_search(
            evaluate_step, parameters, full_step, max_kl, args.backtrack_coef, args.max_backtracks
        )
    with torch.no_grad():
        new_surrogate, kl = evaluate_step()
    taken = accepted * args.backtrack_coef**backtracks
    return {
        "kl": kl.item(),
        "improvement": (new_surrogate - surrogate).item(),
        "expected_improvement": taken * (gradient @ full_step).item(),
        "backtracks": backtracks,
        "step_accepted": float(accepted),
        "grad_norm": gradient.norm().item(),
        "cg_residual": float(cg_residual),
    }


# ----------------------------------------------------------------------------------------- the critic


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


def make_update(agent: Agent, optimizer: Adam, args: Args) -> Callable[..., torch.Tensor]:
    """The function that takes one step of the critic on one minibatch and returns its loss."""

    def update(indices: torch.Tensor, observations: torch.Tensor, returns: torch.Tensor) -> torch.Tensor:
        """Shapes (M,) rows of the minibatch, (B, D) normalised, and (B,)."""
        value_loss = 0.5 * (agent.value(observations[indices]) - returns[indices]).square().mean()
        optimizer.step(torch.autograd.grad(value_loss, optimizer.parameters))
        return value_loss.detach()

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

    Returns observations and next_observations (T, N, D) as the environments give them, raw actions (T, N, A),
    rewards, terminated and done (T, N). Updates in place: `latest`, the current observations (N, D);
    `running`, the return and length so far (2, N); `finished`, to which those of ended episodes are appended.
    """
    action_shape = envs[0].action_space.shape
    noise = policy.std * torch.randn(num_steps, len(envs), math.prod(action_shape)).numpy()
    actions = np.empty_like(noise)
    observations = np.empty((num_steps, *latest.shape), latest.dtype)
    next_observations = np.empty_like(observations)
    rewards = np.empty((num_steps, len(envs)), np.float32)
    terminated, truncated = np.empty_like(rewards, bool), np.empty_like(rewards, bool)
    for t in range(num_steps):
        observations[t] = latest
        actions[t] = policy.mean_action(latest) + noise[t]
        env_actions = policy.to_environment(actions[t]).reshape(-1, *action_shape)
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
    """Undiscounted returns (episodes,) of the deterministic policy; episode i starts from seed + i.

    The statistics are frozen, and no generator of the training is drawn from. With `videos`, a folder, the
    first episode is recorded.
    """
    env = make_env(env_id, render_mode="rgb_array" if videos else None)
    if videos:
        env = gym.wrappers.RecordVideo(env, str(videos), lambda episode: episode == 0, name_prefix=video_name)
    policy = FrozenPolicy(agent)
    returns = np.zeros(episodes)
    for episode in range(episodes):
        observation, _ = env.reset(seed=seed + episode)
        for _ in range(MAX_EPISODE_STEPS):
            action = policy.to_environment(policy.mean_action(observation[None]))
            observation, reward, terminated, truncated, _ = env.step(action.reshape(env.action_space.shape))
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
    """TRPO (Schulman et al. 2015, section 6); goes on from the checkpoint in `run` if there is one."""
    device = torch.device("cpu" if args.device == "auto" else args.device)
    torch.manual_seed(args.seed)
    random.seed(args.seed)  # this and the next for environments that draw from global generators
    np.random.seed(args.seed)
    envs = [make_env(args.env_id) for _ in range(args.num_envs)]
    latest = reset_all(
        envs, first_seed=args.seed * args.num_envs
    )  # runs that differ in --seed only share no start
    space = envs[0].action_space
    agent = Agent(latest.shape[1], space.low.flatten(), space.high.flatten(), args.log_std_init).to(device)
    optimizer = Adam(agent.critic.parameters(), args.learning_rate)
    discounted_return = torch.zeros(args.num_envs)
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
            discounted_return.copy_(state["discounted_return"])
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
            "discounted_return": discounted_return,
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

        max_kl = args.max_kl * (1 - (iteration - 1) / num_iterations) if args.anneal_kl else args.max_kl

        # 1. Play.
        policy = FrozenPolicy(agent)
        raw_observations, raw_next_observations, actions, rewards, terminated, done = collect_rollout(
            envs, latest, policy, args.num_steps, running, finished
        )
        batch_observations = raw_observations.reshape(args.batch_size, -1)
        if iteration == 1:
            # Played without statistics, scored with them: the two policies agree, because the last layer of
            # the actor starts with gain 0.01, and its means are near 0 whatever it is shown.
            agent.observation_statistics.update(batch_observations)
            policy = FrozenPolicy(agent)

        # 2. Turn what was seen into what the networks take.
        observations = torch.from_numpy(policy.normalize(raw_observations)).to(device)
        next_observations = torch.from_numpy(policy.normalize(raw_next_observations)).to(device)
        actions = torch.from_numpy(actions).flatten(0, 1).to(device)
        rewards, terminated, done = (torch.from_numpy(x) for x in (rewards, terminated, done))
        rewards = scale_rewards(rewards, done, discounted_return, args.gamma, agent.return_statistics)
        rewards, terminated, done = rewards.to(device), terminated.to(device), done.to(device)
        with torch.no_grad():
            values, next_values = agent.value(observations), agent.value(next_observations)
        advantages, returns = compute_gae(
            rewards, values, next_values, terminated, done, args.gamma, args.gae_lambda
        )
        explained_variance = (1 - (returns - values).var() / returns.var()).item()
        if args.norm_adv:
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        flat_observations, flat_returns = observations.flatten(0, 1), returns.flatten()

        # 3. Learn: one step of the policy, then several epochs of the critic.
        step_args = dataclasses.replace(args, max_kl=max_kl)
        losses = policy_step(agent, flat_observations, actions, advantages.flatten(), step_args)
        value_loss = torch.zeros((), device=device)
        for _ in range(args.critic_epochs):
            for indices in torch.randperm(args.batch_size).view(args.num_minibatches, -1).to(device):
                value_loss += update(indices, flat_observations, flat_returns)
        losses["value_loss"] = value_loss.item() / (args.critic_epochs * args.num_minibatches)
        losses["entropy"] = (agent.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum().item()
        if iteration > 1:
            agent.observation_statistics.update(batch_observations)

        # 4. Log, evaluate, save.
        for name, value in losses.items():
            if not math.isfinite(value):
                causes = "rewards or observations that are not finite, or too large a step (--max-kl)"
                raise SystemExit(
                    f"{name} is {value} at step {step:,}; look for {causes}. {run} keeps the last checkpoint"
                )
        seconds = time.perf_counter() - start
        elapsed += seconds
        log({f"losses/{name}": value for name, value in losses.items()}, step)
        log({"losses/explained_variance": explained_variance}, step)
        log({"charts/learning_rate": optimizer.learning_rate, "charts/max_kl": max_kl}, step)
        log({"charts/action_std": policy.std.mean(), "charts/SPS": args.batch_size / seconds}, step)
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
    # MuJoCo would print a warning for each environment and write it to a file; Python shows it once.
    mujoco.set_mju_user_warning(warnings.warn)
    warnings.filterwarnings("ignore", ".*settotalmass")  # in Gymnasium's model of HalfCheetah
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
