"""REINFORCE (Williams 1992) with the usual estimators of the policy gradient, in one file.

Every iteration plays a batch of whole episodes and takes one step along the mean over these episodes of

    g = sum over t of  Psi_t grad log pi(a_t|s_t),

whose expectation is the gradient of the expected return. Psi is the choice of `--estimator`:

    total_return   G_0, the discounted return of the whole episode (Williams 1992)
    reward_to_go   G_t, the discounted return from t on
    baseline       G_t - V(s_t)
    q_value        r_t + gamma V(s_t+1)
    advantage      GAE(lambda) (Schulman et al. 2016, equation 16)
    td_residual    r_t + gamma V(s_t+1) - V(s_t)

The first three are unbiased whatever V is, but where a time limit cuts an episode, and each is less noisy
than the one before; the other three have the bias of V, and those that subtract V have less noise still. How
noisy g is, is logged: the trace of its covariance over the episodes of a batch. The gradient of the
discounted return has a factor gamma^t with Psi_t, which only G_0 contains: `--discount-states`.

    python reinforce.py --estimator total_return --seed 3
    python reinforce.py --env-id HalfCheetah-v5 --total-timesteps 3000000
    python reinforce.py --resume runs/CartPole-v1__reinforce__3__20261120-101500
    python reinforce.py --evaluate runs/CartPole-v1__reinforce__3__20261120-101500 --capture-video
"""

import dataclasses
import json
import math
import os
import random
import time
import warnings
from collections import deque
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
from torch.nn.utils import parameters_to_vector
from tqdm import tqdm

ESTIMATORS = Literal["total_return", "reward_to_go", "baseline", "q_value", "advantage", "td_residual"]


@dataclass
class Args:
    # Run
    env_id: str = "CartPole-v1"
    """Gymnasium environment, Discrete or a Box; `module:Name-v0` imports the module that registers it"""
    seed: int = 1
    """seed of the environments, the networks and the sampling"""
    total_timesteps: int = 300_000
    """environment steps; the batch that reaches them is finished"""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """where the networks are trained; auto is the CPU, which is faster for networks of this size"""
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
    num_envs: int = 8
    """episodes per batch, each in an environment of its own; 1 for an update after every episode"""
    max_episode_steps: int = 1000
    """longer episodes are cut here, and bootstrapped as at a time limit"""
    estimator: ESTIMATORS = "advantage"
    """Psi, what the gradients of the log-probabilities are weighted with"""
    norm_returns: bool = True
    """normalise Psi over a batch, to mean 0 and standard deviation 1; the targets of the critic are not"""
    discount_states: bool = False
    """multiply Psi_t by gamma^t (total_return has it already), for the gradient of the discounted return"""
    gamma: float = 0.99
    """discount factor, in [0, 1]"""
    gae_lambda: float = 0.95
    """lambda of GAE, for estimator advantage and the targets of the critic, in [0, 1]"""
    learning_rate: float = 3e-3
    """step size of the policy's Adam at the start"""
    critic_learning_rate: float = 1e-3
    """step size of the critic's Adam at the start"""
    anneal_lr: bool = True
    """lower both learning rates linearly to 0 over total_timesteps"""
    critic_epochs: int = 5
    """passes of the critic over a batch"""
    minibatch_size: int = 256
    """transitions per step of the critic"""
    log_std_init: float = -0.5
    """logarithm of the initial standard deviation of Box actions, in units of half the action range"""

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
        counts = "total_timesteps num_envs max_episode_steps critic_epochs minibatch_size checkpoint_interval"
        for name in f"{counts} eval_episodes".split():
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "critic_learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must lie in [0, 2^32), got {self.seed}")
        if not self.eval_interval >= 0:
            raise ValueError(f"eval_interval must be at least 0, got {self.eval_interval}")
        for name in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        alone = self.estimator == "total_return" or self.max_episode_steps == 1
        if self.num_envs == 1 and self.norm_returns and alone:
            raise ValueError("one return, normalised, is 0: raise num_envs or say --no-norm-returns")
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
    """An environment with flat observations and Discrete or Box actions, or SystemExit with a sentence."""
    try:
        keywords = {"render_mode": render_mode} if render_mode else {}
        env = gym.make(env_id, disable_env_checker=True, **keywords)
    except (gym.error.Error, ImportError, TypeError) as error:
        raise SystemExit(f"Cannot make the environment {env_id}: {error}")
    if not isinstance(env.action_space, gym.spaces.Discrete | gym.spaces.Box):
        raise SystemExit(f"{env_id} has {env.action_space} actions, and this script needs Discrete or a Box")
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
    """Policy and value function of normalised observations, with the statistics that belong to them.

    The policy is categorical for Discrete actions, and Gaussian for a Box, where a raw action in [-1, 1]
    covers the range of the environment. Actions are (..., A), with A = 1 for Discrete.
    """

    def __init__(self, observation_size: int, action_space: gym.Space, log_std: float = 0.0):
        super().__init__()
        self.action_space = action_space
        self.discrete = isinstance(action_space, gym.spaces.Discrete)
        outputs = int(action_space.n) if self.discrete else math.prod(action_space.shape)
        self.actor = mlp([observation_size, 64, 64, outputs], output_gain=0.01)
        self.critic = mlp([observation_size, 64, 64, 1], output_gain=1.0)
        if not self.discrete:
            self.log_std = nn.Parameter(torch.full((outputs,), log_std))
        self.observation_statistics = RunningStatistics((observation_size,))
        self.return_statistics = RunningStatistics(())

    def policy_parameters(self) -> list[nn.Parameter]:
        return [*self.actor.parameters(), *([] if self.discrete else [self.log_std])]

    def value(self, observations: torch.Tensor) -> torch.Tensor:
        """V (...) of normalised observations (..., D); the critic's unit is the std of returns."""
        return self.critic(observations).squeeze(-1) * (self.return_statistics.variance + 1e-8).sqrt()

    def log_prob(self, observations: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """Log-probability, or log density, (...) of actions (..., A) at normalised observations (..., D)."""
        output = self.actor(observations)
        if self.discrete:
            return categorical_log_prob(output.unsqueeze(-2), actions)
        return gaussian_log_prob(actions, output, self.log_std)

    def entropy(self, observations: torch.Tensor) -> torch.Tensor:
        """Entropy (...) of the policy, in nats, at normalised observations (..., D)."""
        if self.discrete:
            return categorical_entropy(self.actor(observations).unsqueeze(-2))
        entropy = (self.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum()
        return entropy.expand(observations.shape[:-1])

    @classmethod
    def load(cls, run: str | Path) -> "Agent":
        """The agent of a run directory or a checkpoint file, on the CPU."""
        checkpoint = load_checkpoint(run)
        env = make_env(checkpoint["args"]["env_id"])
        agent = cls(env.observation_space.shape[0], env.action_space)
        agent.load_state_dict(checkpoint["agent"])
        env.close()
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
        self.discrete, self.action_space = agent.discrete, agent.action_space
        if self.discrete:
            self.start = int(agent.action_space.start)
        else:
            space = agent.action_space
            self.low, self.high = (x.flatten().astype(np.float32) for x in (space.low, space.high))
            # A dimension without two bounds is not scaled; "no bound" may be infinite, or the largest float.
            bounded = np.maximum(-self.low, self.high) < 1e10
            low, high = np.where(bounded, self.low, -1), np.where(bounded, self.high, 1)
            self.action_center, self.action_scale = (low + high) / 2, (high - low) / 2
            self.std = array(agent.log_std.exp())
        self.actor, self.device = agent.actor, agent.observation_statistics.mean.device
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
        """Actions (N, A) as N environments take them: counted from their start, or scaled and clipped."""
        if self.discrete:
            return (actions[:, 0] + self.start).tolist()
        actions = np.maximum(actions * self.action_scale + self.action_center, self.low)
        return np.minimum(actions, self.high).reshape(-1, *self.action_space.shape)


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


def policy_gradient_weights(
    rewards: torch.Tensor,
    values: torch.Tensor,
    next_values: torch.Tensor,
    terminated: torch.Tensor,
    done: torch.Tensor,
    gamma: float,
    gae_lambda: float,
    estimator: str,
) -> torch.Tensor:
    """Psi (T, N), the weights of the gradients of log-probabilities; inputs (T, N) as in compute_gae.

    The list of Schulman et al. 2016, section 2, with discounts. An episode that is truncated, or that goes on
    past the last row, is bootstrapped: the rewards to come are worth `next_values`.
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
    # total_return: what an episode has in its first row, for all of its rows.
    rows = torch.arange(len(done), device=done.device)[:, None].expand(done.shape)
    begins = torch.cat((torch.ones_like(done[:1]), done[:-1]))
    first_row = torch.where(begins > 0, rows, 0).cummax(0).values
    return reward_to_go.gather(0, first_row)


def categorical_log_prob(logits: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
    """Log-probability (...) of actions (..., K) under logits (..., K, n), summed over the components."""
    return logits.log_softmax(-1).gather(-1, actions.unsqueeze(-1)).squeeze(-1).sum(-1)


def categorical_entropy(logits: torch.Tensor) -> torch.Tensor:
    """Entropy (...), in nats, of logits (..., K, n), summed over the components."""
    log_probs = logits.log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum((-2, -1))


def gaussian_log_prob(actions: torch.Tensor, means: torch.Tensor, log_std: torch.Tensor) -> torch.Tensor:
    """Log density (...) of actions (..., A), independent in each dimension."""
    return (-0.5 * ((actions - means) / log_std.exp()) ** 2 - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


def episode_gradients(
    agent: Agent,
    observations: torch.Tensor,
    actions: torch.Tensor,
    weights: torch.Tensor,
    lengths: list[int],
) -> torch.Tensor:
    """The gradient estimate of each episode, sum over t of Psi_t grad log pi(a_t|s_t), (N, P).

    Normalised observations (T, N, D), actions (T, N, A) and weights (T, N), of which lengths[n] rows count.
    """
    parameters, gradients = agent.policy_parameters(), []
    for n, length in enumerate(lengths):
        log_probs = agent.log_prob(observations[:length, n], actions[:length, n])
        objective = (weights[:length, n] * log_probs).sum()
        gradients.append(parameters_to_vector(torch.autograd.grad(objective, parameters)))
    return torch.stack(gradients)


# ----------------------------------------------------------------------------- rollout and evaluation


def collect_episodes(
    envs: list[gym.Env], policy: FrozenPolicy, max_episode_steps: int
) -> tuple[np.ndarray, ...]:
    """Plays one whole episode in each of N environments; T is the length of the longest.

    Returns observations and next_observations (T, N, D) as the environments give them, actions (T, N, A),
    rewards, terminated and done (T, N), and lengths (N,). Rows past the end of an episode are padding.

    Each episode has a seed from torch's generator, which a checkpoint holds: so there is no state of an
    environment to be saved.
    """
    seeds = torch.randint(EVALUATION_SEED, (len(envs),)).tolist()
    latest = np.array([env.reset(seed=seed)[0] for env, seed in zip(envs, seeds)], np.float64)
    rows = []
    playing = np.arange(len(envs))
    while len(playing):
        actions = policy.sample(latest[playing])
        observations, row_actions = latest.copy(), np.zeros((len(envs), actions.shape[1]), actions.dtype)
        row_actions[playing] = actions
        rewards, terminated, done = np.zeros((3, len(envs)), np.float32)
        for i, action in zip(playing, policy.to_environment(actions)):
            latest[i], rewards[i], terminated[i], truncated, _ = envs[i].step(action)
            done[i] = terminated[i] or truncated or len(rows) + 1 == max_episode_steps
        rows.append((observations, latest.copy(), row_actions, rewards, terminated, done))
        playing = playing[done[playing] == 0]
    batch = [np.stack(column) for column in zip(*rows)]
    lengths = batch[-1].argmax(0) + 1
    return *batch, lengths


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
            action = policy.to_environment(policy.mode(observation[None]))[0]
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
    """REINFORCE on batches of whole episodes; goes on from the checkpoint in `run` if there is one."""
    device = torch.device("cpu" if args.device == "auto" else args.device)
    torch.manual_seed(args.seed)
    random.seed(args.seed)  # this and the next for environments that draw from global generators
    np.random.seed(args.seed)
    envs = [make_env(args.env_id) for _ in range(args.num_envs)]
    observation_size = envs[0].observation_space.shape[0]
    agent = Agent(observation_size, envs[0].action_space, args.log_std_init).to(device)
    policy_optimizer = torch.optim.Adam(agent.policy_parameters(), args.learning_rate, eps=1e-5)
    critic_optimizer = torch.optim.Adam(agent.critic.parameters(), args.critic_learning_rate, eps=1e-5)
    optimizers = {"policy": policy_optimizer, "critic": critic_optimizer}
    finished = deque(maxlen=100)  # returns and lengths of episodes
    step, best_return, elapsed = 0, -math.inf, 0.0

    if (run / "checkpoint.pt").exists():
        state = load_checkpoint(run)
        agent.load_state_dict(state["agent"])
        for name, optimizer in optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        step, best_return, elapsed = state["step"], state["best_return"], state["elapsed"]
        finished.extend(state["finished"])
        torch.set_rng_state(state["generator"])
        print(f"Resumed at step {step:,}", flush=True)

    def save(name: str) -> None:
        state = {
            "args": dataclasses.asdict(args),
            "agent": agent.state_dict(),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in optimizers.items()},
            "step": step,
            "best_return": best_return,
            "elapsed": elapsed,
            "finished": list(finished),
            "generator": torch.get_rng_state(),  # the seeds of the episodes and the noise are drawn from it
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
    writer = SummaryWriter(str(run), purge_step=step + 1 if step else 0)

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

    if step == 0 and args.eval_interval:
        log_evaluation(0)
    progress = tqdm(
        total=args.total_timesteps, initial=step, unit=" steps", disable=None
    )  # None: on a terminal only
    last_line = -math.inf

    while step < args.total_timesteps:
        start, before = time.perf_counter(), step
        if args.anneal_lr:
            remaining = 1 - step / args.total_timesteps
            policy_optimizer.param_groups[0]["lr"] = args.learning_rate * remaining
            critic_optimizer.param_groups[0]["lr"] = args.critic_learning_rate * remaining

        # 1. Play.
        policy = FrozenPolicy(agent)
        raw_observations, raw_next_observations, actions, rewards, terminated, done, lengths = (
            collect_episodes(envs, policy, args.max_episode_steps)
        )
        step += int(lengths.sum())
        # Taken before this batch is in: its own mean would give batches of short episodes more weight.
        mean_length = np.mean(finished, axis=0)[1] if finished else lengths.mean()
        finished.extend(zip(rewards.sum(0).tolist(), lengths.tolist()))
        valid = np.arange(len(rewards))[:, None] < lengths  # (T, N)
        if before == 0:
            # Played without statistics, scored with them: the two policies agree, because the last layer of
            # the actor starts with gain 0.01, and its output is near 0 whatever it is shown.
            agent.observation_statistics.update(raw_observations[valid])
            policy = FrozenPolicy(agent)

        # 2. Turn what was seen into what the networks take, and weigh it.
        observations = torch.from_numpy(policy.normalize(raw_observations)).to(device)
        next_observations = torch.from_numpy(policy.normalize(raw_next_observations)).to(device)
        actions, rewards, terminated, done = (
            torch.from_numpy(x).to(device) for x in (actions, rewards, terminated, done)
        )
        with torch.no_grad():
            values, next_values = agent.value(observations), agent.value(next_observations)
        estimate = rewards, values, next_values, terminated, done, args.gamma
        weights = policy_gradient_weights(*estimate, args.gae_lambda, args.estimator)
        _, returns = compute_gae(*estimate, args.gae_lambda)
        mask = torch.from_numpy(valid).to(device)
        if args.discount_states and args.estimator != "total_return":
            weights = weights * args.gamma ** torch.arange(len(weights), device=device)[:, None]
        if args.norm_returns:
            # In float32, the mean of equal numbers is not always their value; MPS has no float64.
            psi = weights[mask].cpu().double()
            weights = ((weights.cpu() - psi.mean()) / (psi.std(correction=0) + 1e-8)).float().to(device)

        # 3. Learn: one step of the policy, then some of the critic.
        # Over the mean length: Adam would be slow to follow gradients that grow with the episodes.
        gradients = episode_gradients(agent, observations, actions, weights, lengths.tolist()) / mean_length
        gradient = gradients.mean(0)
        parameters = agent.policy_parameters()
        for p, part in zip(parameters, gradient.split([p.numel() for p in parameters])):
            p.grad = -part.view_as(p)  # Adam descends
        policy_optimizer.step()
        valid_observations, valid_returns = observations[mask], returns[mask]
        agent.return_statistics.update(valid_returns.cpu().numpy())
        targets = valid_returns / (agent.return_statistics.variance + 1e-8).sqrt()
        value_losses = []
        for _ in range(args.critic_epochs):
            for indices in torch.randperm(len(targets)).split(args.minibatch_size):
                indices = indices.to(device)
                output = agent.critic(valid_observations[indices]).squeeze(-1)
                value_loss = 0.5 * (output - targets[indices]).square().mean()
                critic_optimizer.zero_grad()
                value_loss.backward()
                critic_optimizer.step()
                value_losses.append(value_loss.detach())
        if before > 0:
            agent.observation_statistics.update(raw_observations[valid])

        # 4. Log, evaluate, save.
        errors = valid_returns - values[mask]
        explained_variance = 1 - (errors.var(correction=0) / valid_returns.var(correction=0)).item()
        with torch.no_grad():
            entropy = agent.entropy(valid_observations).mean().item()
        losses = {"value_loss": torch.stack(value_losses).mean().item(), "entropy": entropy}
        losses["grad_norm"] = gradient.norm().item()
        for name, value in losses.items():
            if not math.isfinite(value):
                causes = "rewards or observations that are not finite, or too high a learning rate"
                raise SystemExit(
                    f"{name} is {value} at step {step:,}; look for {causes}. {run} keeps the last checkpoint"
                )
        if args.num_envs > 1:
            # The trace of the covariance of the gradient over episodes; that of their mean is 1/N of it.
            losses["gradient_variance"] = gradients.var(0).sum().item()
        seconds = time.perf_counter() - start
        elapsed += seconds
        log({f"losses/{name}": value for name, value in losses.items()}, step)
        log({"losses/explained_variance": explained_variance}, step)
        log({"charts/learning_rate": policy_optimizer.param_groups[0]["lr"]}, step)
        log({"charts/SPS": (step - before) / seconds, "time/elapsed": elapsed}, step)
        training_return, length = np.mean(finished, axis=0)
        log({"charts/episodic_return": training_return, "charts/episodic_length": length}, step)
        last = step >= args.total_timesteps

        if args.eval_interval and (last or step // args.eval_interval > before // args.eval_interval):
            evaluation = log_evaluation(step)
            if evaluation > best_return:
                best_return = evaluation
                save("best.pt")
        if last or step // args.checkpoint_interval > before // args.checkpoint_interval:
            writer.flush()
            save("checkpoint.pt")
        progress.set_postfix_str(f"return {training_return:.1f}", refresh=False)
        progress.update(step - before)
        if progress.disable and (last or time.perf_counter() - last_line > 10):
            last_line = time.perf_counter()
            speed = f"{(step - before) / seconds:,.0f} steps/s"
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
