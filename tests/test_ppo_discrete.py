"""ppo_discrete.py, against plain definitions, torch.distributions, torch.optim; short runs.

What the script shares with ppo_continuous.py, letter for letter, is tested there. The agent, its frozen
policy and the evaluation are tested here for a2c_cartpole.py too.
"""

import copy
import dataclasses
import json
import math
import random
import re
import signal
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import stub_environments
import torch
import torch.nn as nn
from helpers import checkpoint_difference, difference, read_curves, start
from scipy.stats import chi2
from test_ppo_continuous import plain_gae, plain_reward_scaling
from test_ppo_continuous_runs import flags, kill_when, nth_evaluation, random_return, refusal
from torch.distributions import Categorical

import ppo_continuous
import ppo_discrete as ppo

SCRIPT = "ppo_discrete.py"
SEVERAL = gym.spaces.MultiDiscrete([2, 4, 3], start=[5, 0, -1])
SIZES = [2, 4, 3]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Coded(stub_environments.Seeded):
    """With three actions, numbered from -1, or with the space that is given."""

    def __init__(self, noise: float = 0.0, action_space: gym.Space | None = None, render_mode=None):
        super().__init__(noise)
        self.action_space = action_space or gym.spaces.Discrete(3, start=-1)

    def step(self, action):
        assert self.action_space.contains(action)
        if isinstance(self.action_space, gym.spaces.Discrete):
            hash(action)  # a person's environment may look it up in a dictionary, which takes no array
        return super().step(action)


class Poisoned(stub_environments.Poisoned):
    def __init__(self, render_mode=None):
        super().__init__()
        self.action_space = gym.spaces.Discrete(3)


class Opaque(stub_environments.Opaque):
    def __init__(self, render_mode=None):
        super().__init__()
        self.action_space = gym.spaces.Discrete(3)


class Nested(stub_environments.Matrix):
    """Observations are a Dict, actions a MultiDiscrete of shape (2, 2), which the environment checks."""

    action_space = gym.spaces.MultiDiscrete([[2, 3], [4, 2]], start=[[1, 0], [-1, 7]])


class Small(Coded):
    """Insists on the small integers that its space is of."""

    def __init__(self, render_mode=None):
        super().__init__(action_space=gym.spaces.MultiDiscrete(np.array([2, 4, 3], np.int8), dtype=np.int8))

    def step(self, action):
        assert action.dtype == np.int8
        return super().step(action)


class Unflattenable(Coded):
    def __init__(self, render_mode=None):
        super().__init__()
        self.observation_space = gym.spaces.Sequence(gym.spaces.Discrete(2))


gym.register("PPODiscrete/Coded-v0", Coded)
gym.register("PPODiscrete/NoisyCoded-v0", Coded, kwargs={"noise": 1.0})
gym.register("PPODiscrete/Several-v0", Coded, kwargs={"action_space": SEVERAL})
gym.register("PPODiscrete/NoisySeveral-v0", Coded, kwargs={"noise": 1.0, "action_space": SEVERAL})
gym.register("PPODiscrete/Binary-v0", Coded, kwargs={"action_space": gym.spaces.MultiBinary(3)})
gym.register("PPODiscrete/Poisoned-v0", Poisoned)
gym.register("PPODiscrete/Opaque-v0", Opaque)
gym.register("PPODiscrete/Nested-v0", Nested)
gym.register("PPODiscrete/Small-v0", Small)
gym.register("PPODiscrete/Unflattenable-v0", Unflattenable)


def make_agent(sizes: list[int], shared: bool = False, first: list[int] | None = None) -> ppo.Agent:
    """3 observations, weights away from where they start; masked choices would be by far the likeliest."""
    agent = ppo.Agent(3, sizes, shared, first)
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
        agent.actor[-1].bias += 100.0 * (agent.mask.flatten() != 0)
    return agent


def parts(agent: ppo.Agent, sizes: list[int], observations: torch.Tensor) -> list[Categorical]:
    """The policy in each component, as torch.distributions has it, without any choice that is missing."""
    outputs = agent.actor(observations).unflatten(-1, (len(sizes), max(sizes)))
    return [Categorical(logits=outputs[..., k, :size]) for k, size in enumerate(sizes)]


# ---------------------------------------------------------------------------------------- environments


@pytest.mark.parametrize(
    ("env_id", "message"),
    [
        ("Pendulum-v1", "ppo_continuous.py is for a Box"),
        ("ALE/Pong-v5", "ppo_atari.py"),
        ("ale_py:ALE/Pong-v5", "ppo_atari.py"),
        ("PPODiscrete/Binary-v0", "MultiBinary(3)"),
        ("NoSuchEnvironment-v0", "NoSuchEnvironment"),
        ("no_such_module:Thing-v0", "no_such_module"),
        ("PPODiscrete/Unflattenable-v0", "cannot be flattened"),
        ("", "environment"),
    ],
)
def test_bad_environments_are_named(env_id, message, tmp_path):
    refused = refusal(train, tmp_path, env_id=env_id)
    assert message in refused and env_id in refused
    assert [*tmp_path.iterdir()] == []


def test_environment_that_draws_nothing_is_named():
    assert "PPODiscrete/Coded-v0" in refusal(ppo.make_env, "PPODiscrete/Coded-v0", render_mode="rgb_array")


def test_observations_are_flattened():
    env = ppo.make_env("PPODiscrete/Nested-v0")
    observation, _ = env.reset(seed=0)
    goal = env.unwrapped.goal
    assert observation.shape == env.observation_space.shape == (6,)
    assert np.array_equal(observation[:4], goal.flatten()) and sorted(observation[4:]) == [0, 1]
    place, _ = ppo.make_env("FrozenLake-v1").reset(seed=0)  # one of 16 places
    assert place.tolist() == [1] + [0] * 15
    assert not isinstance(ppo.make_env("CartPole-v1"), gym.wrappers.FlattenObservation)


@pytest.mark.parametrize(
    ("space", "sizes", "first"),
    [
        (gym.spaces.Discrete(4), [4], [0]),
        (gym.spaces.Discrete(3, start=-2), [3], [-2]),
        (gym.spaces.MultiDiscrete([2, 5]), [2, 5], [0, 0]),
        (SEVERAL, SIZES, [5, 0, -1]),
        (Nested.action_space, [2, 3, 4, 2], [1, 0, -1, 7]),
    ],
)
def test_action_layout(space, sizes, first):
    """And the last and first choices of all components are the largest and smallest action of the space."""
    layout = ppo.action_layout(space)
    assert layout == (sizes, first) and all(type(x) is int for x in layout[0] + layout[1])
    policy = ppo.FrozenPolicy(make_agent(sizes, first=layout[1]))
    for choices, further in ((np.array(sizes) - 1, 1), (np.zeros(len(sizes), int), -1)):
        action = policy.to_environment(choices[None]).reshape(-1, *space.shape)[0]
        assert space.contains(action) and not space.contains(action + further)
        assert np.array_equal(np.ravel(action), choices + first)


def go_on(envs: ppo.Environments, actions: np.ndarray) -> list[bytes]:
    return [np.asarray(x).tobytes() for action in actions for x in (*envs.step(action), envs.observations)]


def draw_actions(envs: ppo.Environments, steps: int, seed: int) -> np.ndarray:
    """Choices (steps, N, ...), as the environment numbers them."""
    envs.action_space.seed(seed)
    return np.array([[envs.action_space.sample() for _ in range(len(envs))] for _ in range(steps)], np.int64)


REPLAYED = "CartPole-v1 Acrobot-v1 MountainCar-v0 FrozenLake-v1 LunarLander-v3".split()
REPLAYED += [f"PPODiscrete/{name}-v0" for name in "NoisyCoded NoisySeveral Opaque Nested Small".split()]


@pytest.mark.parametrize("env_id", REPLAYED)
def test_replayed_environments_go_on_bit_for_bit(env_id, tmp_path, capsys):
    """Through a file, in the middle of episodes; two of them meet their time limit soon after."""
    if env_id == "LunarLander-v3":
        pytest.importorskip("Box2D")
    envs = ppo.Environments(env_id, 3)
    go_on(envs, draw_actions(envs, 23, seed=0))
    envs.limits = np.minimum(envs.limits, envs.lengths + np.array([4, 9, 10**6]))
    torch.save({"envs": envs.state_dict(), "generator": torch.get_rng_state()}, tmp_path / "state.pt")
    actions = draw_actions(envs, 20, seed=1)
    expected = go_on(envs, actions)
    torch.manual_seed(99)
    restored = ppo.Environments(env_id, 3)  # with other episodes behind them
    go_on(restored, actions[:5])
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    torch.set_rng_state(state["generator"])
    restored.load_state_dict(state["envs"])
    assert go_on(restored, actions) == expected
    assert "differ" not in capsys.readouterr().out and len(envs.finished) >= 2
    states = envs.state_dict(), restored.state_dict()
    assert [*envs.finished] == [*restored.finished][-len(envs.finished) :]
    assert all(
        difference(states[0][name], states[1][name]) is None for name in ("seeds", "lengths", "limits")
    )


# ------------------------------------------------------------------------------------ agent and its policy


@pytest.mark.parametrize("sizes", [[3], SIZES], ids=str)
def test_policy_is_that_of_torch_distributions(sizes):
    """Logits, log-probabilities and entropy; what is masked has probability 0 and adds nothing."""
    agent, observations = make_agent(sizes), torch.randn(2, 5, 3)
    logits, reference = agent.logits(observations), parts(agent, sizes, observations)
    assert logits.shape == (2, 5, len(sizes), max(sizes)) and agent.value(observations).shape == (2, 5)
    torch.testing.assert_close(agent.value(observations), agent.critic(observations)[..., 0])
    probabilities = logits.softmax(-1)
    for k, size in enumerate(sizes):
        torch.testing.assert_close(probabilities[..., k, :size], reference[k].probs)
        assert not probabilities[..., k, size:].any()
    entropy = ppo.categorical_entropy(logits)
    torch.testing.assert_close(entropy, sum(part.entropy() for part in reference))
    actions = torch.stack([part.sample() for part in reference], -1)
    expected = sum(part.log_prob(action) for part, action in zip(reference, actions.unbind(-1)))
    log_probs = ppo.categorical_log_prob(logits, actions)
    torch.testing.assert_close(log_probs, expected)
    (log_probs.sum() + entropy.sum()).backward()
    assert all(p.grad.isfinite().all() for p in agent.actor.parameters())
    masked = agent.mask.flatten() != 0
    assert not agent.actor[-1].bias.grad[masked].any() and agent.actor[-1].bias.grad[~masked].all()


@pytest.mark.parametrize("shared", [False, True])
def test_initial_weights(shared):
    """Orthogonal of gain sqrt(2); 0.01 for the logits, so that the first policy is uniform, and 1 for V."""
    agent = ppo.Agent(5, SIZES, shared)
    for network, gain in ((agent.actor, 0.01), (agent.critic, 1.0)):
        linear = [layer for layer in network if isinstance(layer, nn.Linear)]
        assert [layer.out_features for layer in linear] == [64, 64, 12 if gain < 1 else 1]
        for layer, expected in zip(linear, (math.sqrt(2), math.sqrt(2), gain)):
            gains = torch.linalg.svdvals(layer.weight)
            torch.testing.assert_close(gains, torch.full_like(gains, expected), rtol=1e-5, atol=1e-7)
            assert not layer.bias.any()
    for k, part in enumerate(parts(agent, SIZES, torch.randn(50, 5))):
        assert (part.probs - 1 / SIZES[k]).abs().max() < 0.03


def test_shared_network_is_one_trunk_with_two_heads():
    agent, separate = ppo.Agent(3, SIZES, shared=True), ppo.Agent(3, SIZES)
    assert all(one is other for one, other in zip(agent.actor[:-1], agent.critic[:-1], strict=True))
    trunk, heads = 3 * 64 + 64 + 64 * 64 + 64, 64 * 12 + 12 + 64 + 1
    assert sum(p.numel() for p in agent.parameters()) == trunk + heads
    assert len(ppo.Adam(agent.parameters(), 1e-3).parameters) == 8
    assert sum(p.numel() for p in separate.parameters()) == 2 * trunk + heads
    assert not {*separate.actor.parameters()} & {*separate.critic.parameters()}
    before = agent.value(torch.ones(1, 3))
    with torch.no_grad():
        agent.actor[0].bias += 1
    assert not torch.equal(agent.value(torch.ones(1, 3)), before)


@pytest.mark.parametrize("shared", [False, True])
def test_agent_is_loaded_as_it_was_saved(shared, tmp_path):
    agent, observations = make_agent(SIZES, shared, [5, 0, -1]), torch.randn(4, 3)
    state = {"agent": agent.state_dict(), "args": {"shared_network": shared}}
    ppo.save_checkpoint(tmp_path / "checkpoint.pt", state)
    for place in (tmp_path, tmp_path / "checkpoint.pt"):
        loaded = ppo.Agent.load(place)
        assert torch.equal(loaded.logits(observations), agent.logits(observations))
        assert torch.equal(loaded.value(observations), agent.value(observations))
        assert loaded.action_start.tolist() == [5, 0, -1] and torch.equal(loaded.mask, agent.mask)
        assert (loaded.actor[0] is loaded.critic[0]) == shared


ACTORS = {
    "separate": None,
    "shared": None,
    "one layer": lambda: nn.Linear(3, 12),
    "without bias": lambda: nn.Sequential(nn.Linear(3, 8, bias=False), nn.Tanh(), nn.Linear(8, 12)),
    "relu and layer norm": lambda: nn.Sequential(
        nn.Linear(3, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 12)
    ),
}


@pytest.mark.parametrize("actor", ACTORS)
def test_frozen_policy_is_the_network(actor):
    agent = make_agent(SIZES, actor == "shared")
    if ACTORS[actor]:
        agent.actor = ACTORS[actor]()
    observations = np.random.default_rng(1).normal(0, 2, (7, 3))
    expected = agent.logits(torch.from_numpy(observations).float()).detach()
    policy = ppo.FrozenPolicy(agent)
    assert bool(policy.layers) == (actor != "relu and layer norm")
    np.testing.assert_allclose(policy.logits(observations), expected, rtol=1e-6, atol=1e-5)


def test_frozen_policy_is_that_of_its_moment():
    agent, observations = make_agent(SIZES, first=[5, 0, -1]), np.ones((1, 3))
    policy = ppo.FrozenPolicy(agent)
    before = policy.logits(observations)
    with torch.no_grad():
        for tensor in (*agent.parameters(), agent.mask, agent.action_start):
            tensor += 1
    assert np.array_equal(policy.logits(observations), before)
    assert policy.to_environment(np.array([1, 2, 2])).tolist() == [6, 2, 1]


# ------------------------------------------------------------------------------------------ evaluation


def test_evaluation_is_greedy_and_adds_up_the_rewards():
    for env_id, sizes, first in (
        ("PPODiscrete/Coded-v0", [3], [-1]),
        ("PPODiscrete/Several-v0", SIZES, [5, 0, -1]),
    ):
        agent = make_agent(sizes, first=first)
        stub_environments.LOG.clear()
        returns = ppo.evaluate(agent, env_id, episodes=4, seed=4)
        log = stub_environments.LOG
        sums = [sum(step[3] for step in log if step[0] == seed % 5) for seed in range(4, 8)]
        assert returns.tolist() == sums
        seen = torch.tensor(np.array([step[1] for step in log])).float()
        best = [part.probs.argmax(-1) + a for part, a in zip(parts(agent, sizes, seen), first)]
        played = np.array([np.atleast_1d(step[2]) for step in log])
        assert np.array_equal(played, torch.stack(best, -1))


def test_evaluation_changes_nothing():
    agent = ppo.Agent(4, [2])
    with torch.no_grad():
        agent.actor[-1].weight.mul_(100)
    before = copy.deepcopy(agent.state_dict())

    def generators() -> tuple:
        _, keys, position, *_ = np.random.get_state()
        return random.getstate(), keys.tolist(), position, torch.get_rng_state().tolist()

    states = generators()
    returns = ppo.evaluate(agent, "CartPole-v1", episodes=5, seed=5)
    assert generators() == states
    assert all(torch.equal(tensor, before[name]) for name, tensor in agent.state_dict().items())
    assert np.array_equal(returns, ppo.evaluate(agent, "CartPole-v1", episodes=5, seed=5))
    assert len({*returns}) > 1  # each episode starts from a seed of its own
    assert returns[1] == ppo.evaluate(agent, "CartPole-v1", episodes=1, seed=6)[0]


def test_evaluation_that_never_ends_is_cut(monkeypatch):
    class Endless(Coded):
        def step(self, action):
            return super().step(action)[0], 1.0, False, False, {}

    gym.register("PPODiscrete/Endless-v0", Endless)
    monkeypatch.setattr(ppo, "MAX_EPISODE_STEPS", 7)
    agent = make_agent([3], first=[-1])
    assert ppo.evaluate(agent, "PPODiscrete/Endless-v0", episodes=2, seed=3).tolist() == [7, 7]


# -------------------------------------------------------------------------------------- loss and update


def test_surrogate_loss_and_its_gradient():
    """Schulman et al. 2017, equation 7, sample by sample."""
    log_probs, old_log_probs, advantages = torch.randn(3, 32, dtype=torch.float64) * 0.5
    objectives, clipped = [], 0
    for new, old, advantage in zip(log_probs.tolist(), old_log_probs.tolist(), advantages.tolist()):
        ratio = math.exp(new - old)
        bounded = min(max(ratio, 0.8), 1.2)
        objectives.append(min(ratio * advantage, bounded * advantage))
        clipped += bounded * advantage < ratio * advantage
    ours = ppo.surrogate_loss(log_probs, old_log_probs, advantages, 0.2)
    assert ours.shape == () and 0 < clipped < 32
    assert ours.item() == pytest.approx(-sum(objectives) / 32, abs=1e-12)
    log_probs.requires_grad_()
    assert torch.autograd.gradcheck(ppo.surrogate_loss, (log_probs, old_log_probs, advantages, 0.2))


@pytest.mark.parametrize(
    ("ratio", "advantage", "has_gradient"),
    [(1.3, 1, False), (1.3, -1, True), (0.7, 1, True), (0.7, -1, False), (1.1, 1, True), (0.9, -1, True)],
)
def test_clip_ends_the_gradient_where_nothing_is_to_be_gained(ratio, advantage, has_gradient):
    """Paper's figure 1: past the range in the direction of the advantage, and only there."""
    log_probs = torch.tensor([math.log(ratio)], requires_grad=True)
    ppo.surrogate_loss(log_probs, torch.zeros(1), torch.tensor([1.0 * advantage]), 0.2).backward()
    assert log_probs.grad.item() == pytest.approx(-ratio * advantage if has_gradient else 0, abs=1e-6)


def make_batch(agent: ppo.Agent, sizes: list[int], B: int = 32) -> ppo.Batch:
    """What an iteration gives to the update; the old policy lies beside that of the agent."""
    dtype = agent.mask.dtype
    observations = torch.randn(B, 3, dtype=dtype)
    policy = parts(agent, sizes, observations)
    actions = torch.stack([part.sample() for part in policy], -1)
    log_probs = sum(part.log_prob(action) for part, action in zip(policy, actions.T)).detach()
    advantages, returns = torch.randn(2, B, dtype=dtype) * 3 + 1
    return ppo.Batch(
        observations, actions, log_probs + 0.2 * torch.randn(B, dtype=dtype), advantages, returns
    )


def update_args(**changes) -> ppo.Args:
    return ppo.Args(**{"compile": False, "ent_coef": 0.05, "vf_coef": 0.7} | changes)


def coefficients_of(args: ppo.Args) -> dict[str, torch.Tensor]:
    values = {"clip": args.clip_coef, "value": args.vf_coef, "entropy": args.ent_coef}
    return {name: torch.tensor(x) for name, x in values.items()}


def reference_step(agent, optimizer, args, sizes, indices, batch) -> list[float]:
    """One step of PPO as a textbook has it, with torch.distributions and torch.optim."""
    observations, actions, old_log_probs, advantages, returns = (x[indices] for x in batch)
    if args.norm_adv:
        advantages = (advantages - advantages.mean()) / (advantages.std(correction=1) + 1e-8)
    policy = parts(agent, sizes, observations)
    ratio = (sum(part.log_prob(action) for part, action in zip(policy, actions.T)) - old_log_probs).exp()
    clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    policy_loss = torch.maximum(-ratio * advantages, -clipped * advantages).mean()
    value_loss = 0.5 * nn.functional.mse_loss(agent.critic(observations)[:, 0], returns)
    entropy = sum(part.entropy() for part in policy).mean()
    optimizer.zero_grad()
    (policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy).backward()
    grad_norm = nn.utils.clip_grad_norm_({*agent.actor.parameters(), *agent.critic.parameters()}, 1e9)
    nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
    optimizer.step()
    approx_kl = ((ratio - 1) - ratio.log()).mean()
    clip_fraction = ((ratio < 1 - args.clip_coef) | (ratio > 1 + args.clip_coef)).double().mean()
    return [x.item() for x in (policy_loss, value_loss, entropy, approx_kl, clip_fraction, grad_norm)]


@pytest.mark.parametrize("max_grad_norm", [0.05, 1e3])
@pytest.mark.parametrize("norm_adv", [True, False])
@pytest.mark.parametrize(("sizes", "shared"), [([3], False), (SIZES, True)], ids=str)
def test_update_is_the_textbook_step(sizes, shared, norm_adv, max_grad_norm):
    args = update_args(norm_adv=norm_adv, max_grad_norm=max_grad_norm)
    # In float64, so that steps do not drift apart; the bias correction of Adam stays in float32.
    agent = make_agent(sizes, shared).double()
    reference = copy.deepcopy(agent)
    batch = make_batch(agent, sizes)
    update = ppo.make_update(agent, ppo.Adam(agent.parameters(), args.learning_rate), args)
    optimizer = torch.optim.Adam(reference.parameters(), args.learning_rate)
    norms, fractions = [], []
    for indices in torch.randperm(32).view(4, 8):
        metrics = update(indices, batch, coefficients_of(args))
        expected = reference_step(reference, optimizer, args, sizes, indices, batch)
        fractions.append(expected[4])
        norms.append(expected[5])
        torch.testing.assert_close(metrics, torch.tensor(expected).double(), rtol=1e-5, atol=1e-6)
        assert not metrics.requires_grad
        for p, q in zip(agent.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=2e-7)
    assert (min(norms) > max_grad_norm) == (max_grad_norm == 0.05)  # both sides of the limit are tried
    assert 0 < sum(fractions) < 4


def test_compiled_update_is_the_eager_one_whatever_is_scheduled(capsys):
    """Learning rate and all coefficients change in every epoch, and the update is compiled once."""
    agents = make_agent(SIZES, shared=True), make_agent(SIZES, shared=True)
    agents[1].load_state_dict(agents[0].state_dict())
    batch = make_batch(agents[0], SIZES)
    optimizers = [ppo.Adam(agent.parameters(), 1e-3) for agent in agents]
    updates = [
        ppo.make_update(agent, optimizer, update_args(compile=compiled))
        for agent, optimizer, compiled in zip(agents, optimizers, (True, False))
    ]
    assert hasattr(updates[0], "_torchdynamo_orig_callable")
    before = agents[0].actor[0].weight.detach().clone()
    for epoch in range(6):
        changes = {"clip_coef": 0.2 / (1 + epoch), "ent_coef": 0.05 * epoch, "vf_coef": 0.7 + epoch}
        coefficients = coefficients_of(update_args(**changes))
        for optimizer in optimizers:
            optimizer.learning_rate.fill_(1e-3 / (1 + epoch))
        for indices in torch.randperm(32).view(2, 16):
            compiled, eager = (update(indices, batch, coefficients) for update in updates)
            torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(agents[0].actor[0].weight, before, atol=1e-3)
    for p, q in zip(agents[0].parameters(), agents[1].parameters()):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5)
    printed = capsys.readouterr().out
    if "does not work here" in printed:
        pytest.skip("no compiler")
    assert printed.count("Compiling the update") == 1 and "again" not in printed


# --------------------------------------------------------------------------------------------- rollout


def play(env_id: str, agent: ppo.Agent, num_envs: int, num_steps: int, rollouts: int):
    """Joined rollouts, the observations after each, and what the environments, stepped in turn, saw."""
    envs, policy = ppo.Environments(env_id, num_envs), ppo.FrozenPolicy(agent)
    stub_environments.LOG.clear()
    rollouts_and_next = [
        (ppo.collect_rollout(envs, policy, num_steps), envs.observations) for _ in range(rollouts)
    ]
    rollouts, following = zip(*rollouts_and_next)
    seen = [stub_environments.LOG[i::num_envs] for i in range(num_envs)]
    return ppo.Rollout(*map(np.concatenate, zip(*rollouts))), following, envs, seen


@pytest.mark.parametrize(
    ("env_id", "sizes", "first"),
    [("PPODiscrete/Coded-v0", [3], [-1]), ("PPODiscrete/Several-v0", SIZES, [5, 0, -1])],
)
def test_rollout_is_what_the_environments_saw(env_id, sizes, first):
    """Returns and lengths of episodes too, of which some reach from one rollout into the next."""
    rollout, following, envs, seen = play(env_id, make_agent(sizes, first=first), 3, 14, 3)
    observations, actions, next_observations, rewards, terminated, done = rollout
    assert observations.shape == next_observations.shape == (42, 3, 3) and actions.dtype == np.int64
    assert actions.shape == (42, 3, len(sizes)) and rewards.dtype == np.float32
    expected_finished, going_on = [], np.zeros((2, 3))
    for t in range(42):
        for i in range(3):
            _, before, action, reward, after, was_terminated, was_truncated = seen[i][t]
            assert np.array_equal(observations[t, i], before)
            assert np.array_equal(next_observations[t, i], after)  # the final one where the episode ended
            assert np.array_equal(np.ravel(action), actions[t, i] + first)
            ended = was_terminated or was_truncated
            assert (rewards[t, i], terminated[t, i], done[t, i]) == (reward, was_terminated, ended)
            # Play goes on from the first observation of the next episode.
            after_that = observations[t + 1, i] if t + 1 < 42 else following[-1][i]
            assert after_that[2] == 0 if ended else np.array_equal(after_that, after)
            going_on[:, i] += reward, 1
            if ended:
                expected_finished.append(tuple(going_on[:, i]))
                going_on[:, i] = 0
    assert terminated.any() and (done & ~terminated).any() and len({*actions.flatten()}) == max(sizes)
    assert [*envs.finished] == expected_finished and len(expected_finished) > 10
    assert np.array_equal([envs.returns, envs.lengths], going_on) and going_on.any()
    assert np.array_equal(following[0], observations[14])


def test_frequencies_of_actions_follow_the_softmax():
    """All 24 joint choices against their probabilities; steps and environments are independent."""
    agent = make_agent(SIZES, first=[5, 0, -1])
    with torch.no_grad():
        agent.actor[-1].weight.zero_()  # the same policy at every observation
    (_, actions, *_), *_ = play("PPODiscrete/Several-v0", agent, 2, 1500, 1)
    assert (actions < np.array(SIZES)).all()  # what is masked never happens
    probabilities = np.ones(1)
    for part in parts(agent, SIZES, torch.zeros(3)):
        probabilities = np.outer(probabilities, part.probs.detach()).flatten()
    index = np.ravel_multi_index(tuple(np.moveaxis(actions, -1, 0)), SIZES)
    expected = probabilities * index.size
    counts = np.bincount(index.flatten(), minlength=24)
    assert expected.min() > 5 and probabilities.max() / probabilities.min() > 4
    assert ((counts - expected) ** 2 / expected).sum() < chi2.ppf(0.999, 23)
    # Standard errors of 1500 draws are 0.026.
    for k in range(3):
        one, other = actions[..., k].T
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.1 and abs(np.corrcoef(one[1:], one[:-1])[0, 1]) < 0.1


# --------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"total_timesteps": 0}, "total_timesteps must lie in [1, inf), got 0"),
        ({"num_envs": 0}, "num_envs must lie in [1, inf)"),
        ({"num_steps": 0}, "num_steps must lie in [1, inf)"),
        ({"update_epochs": 0}, "update_epochs must lie in [1, inf)"),
        ({"num_minibatches": 0}, "num_minibatches must lie in [1, inf)"),
        ({"num_minibatches": 7}, "num_minibatches = 7 must divide"),
        ({"checkpoint_interval": 0}, "checkpoint_interval must lie in [1, inf)"),
        ({"checkpoint_minutes": 0.0}, "checkpoint_minutes must lie in (0, inf)"),
        ({"eval_episodes": 0}, "eval_episodes must lie in [1, inf)"),
        ({"learning_rate": math.nan}, "learning_rate must lie in (0, inf), got nan"),
        ({"learning_rate": math.inf}, "learning_rate must lie in (0, inf), got inf"),
        ({"clip_coef": 0.0}, "clip_coef must lie in (0, inf)"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must lie in (0, inf)"),
        ({"seed": -1}, "seed must lie in"),
        ({"seed": 2**32}, "seed must lie in"),
        ({"target_kl": 0.0}, "target_kl must lie in (0, inf)"),
        ({"ent_coef": -0.1}, "ent_coef must lie in [0, inf)"),
        ({"vf_coef": math.nan}, "vf_coef must lie in [0, inf), got nan"),
        ({"eval_interval": -1}, "eval_interval must lie in [0, inf)"),
        ({"gamma": 1.01}, "gamma must lie in [0, 1]"),
        ({"gae_lambda": math.nan}, "gae_lambda must lie in [0, 1]"),
        ({"num_envs": 4, "num_steps": 8, "num_minibatches": 32, "norm_adv": True}, "cannot be normalised"),
        ({"resume": "a", "evaluate": "b"}, "resume, evaluate and run_name exclude each other"),
    ],
    ids=lambda x: "-".join(f"{name}-{value}" for name, value in x.items()) if isinstance(x, dict) else "",
)
def test_bad_arguments_are_named(changes, message):
    with pytest.raises(ValueError) as error:
        ppo.Args(**changes)
    assert message in str(error.value)


def test_arguments_at_the_edge_are_fine():
    ppo.Args(ent_coef=0.0, vf_coef=0.0, gamma=1.0, gae_lambda=0.0, seed=2**32 - 1, eval_interval=0)
    assert ppo.Args(num_envs=4, num_steps=8, num_minibatches=32, norm_adv=False).batch_size == 32


def test_every_number_has_its_limits():
    numbers = {field.name for field in dataclasses.fields(ppo.Args) if re.search("int|float", field.type)}
    assert sorted(" ".join(ppo.LIMITS.values()).split()) == sorted(numbers)


def test_command_line():
    args = ppo.parse_args("--env-id Acrobot-v1 --shared-network --no-norm-adv --target-kl 0.02".split())
    assert (args.env_id, args.shared_network, args.norm_adv, args.target_kl) == (
        "Acrobot-v1",
        True,
        False,
        0.02,
    )


# ------------------------------------------------------------------------------------- what training does


class Recorder:
    """In the place of `make_update`: keeps what each call is given, moves nothing, returns chosen metrics."""

    def __init__(self, monkeypatch, metrics=lambda call: {}):
        self.calls, self.learning_rates, self.metrics = [], [], metrics
        monkeypatch.setattr(ppo, "make_update", self.make_update)

    def make_update(self, agent, optimizer, args):
        self.agent = agent
        assert [*map(id, optimizer.parameters)] == [*map(id, agent.parameters())]

        def update(indices, batch, coefficients):
            self.calls.append((indices, batch, {name: x.item() for name, x in coefficients.items()}))
            self.learning_rates.append(optimizer.learning_rate.item())
            chosen = self.metrics(len(self.calls) - 1)
            return torch.tensor([float(chosen.get(name, 0)) for name in ppo.METRICS])

        return update


def train_stub(folder: Path, **changes) -> Path:
    settings = {"env_id": "PPODiscrete/NoisyCoded-v0", "num_envs": 3, "num_steps": 8, "num_minibatches": 4}
    settings |= {"update_epochs": 2, "eval_interval": 0, "compile": False, "runs": str(folder), "seed": 2}
    return ppo.main(ppo.Args(**settings | changes))


@pytest.mark.parametrize(
    ("env_id", "sizes", "first", "shared", "anneal_lr"),
    [
        ("PPODiscrete/NoisyCoded-v0", [3], [-1], False, True),
        ("PPODiscrete/NoisySeveral-v0", SIZES, [5, 0, -1], True, False),
    ],
)
def test_update_is_given_what_the_definitions_say(
    env_id, sizes, first, shared, anneal_lr, tmp_path, monkeypatch
):
    """Two iterations, computed anew from what the environments saw; the steps themselves move nothing.

    V is bootstrapped from the final observation at a time limit; every transition is used once per epoch.
    """
    recorder = Recorder(monkeypatch)
    stub_environments.LOG.clear()
    changes = {"env_id": env_id, "shared_network": shared, "anneal_lr": anneal_lr, "gamma": 0.9}
    changes |= {"clip_coef": 0.3, "vf_coef": 0.75, "ent_coef": 0.25}
    run = train_stub(tmp_path, total_timesteps=48, gae_lambda=0.8, **changes)
    curves, agent = read_curves(run), recorder.agent
    assert (agent.actor[0] is agent.critic[0]) == shared and agent.action_start.tolist() == first
    seen = [stub_environments.LOG[i::3] for i in range(3)]  # the environments are stepped in turn
    raw, env_actions, rewards, raw_next, terminated, truncated = (
        np.array([[steps[t][field] for steps in seen] for t in range(16)]) for field in range(1, 7)
    )
    assert terminated.any() and truncated.any() and len(recorder.calls) == 2 * 2 * 4
    returns_state = {"running": np.zeros(3), "seen": []}
    for iteration in range(2):
        rows = slice(8 * iteration, 8 * iteration + 8)
        observations, following = (torch.from_numpy(x[rows]).float() for x in (raw, raw_next))
        with torch.no_grad():
            values, next_values = (agent.critic(x)[..., 0].numpy() for x in (observations, following))
            policy = parts(agent, sizes, observations)
        done = terminated[rows] | truncated[rows]
        scaled = plain_reward_scaling(rewards[rows], done, 0.9, returns_state)
        advantages = plain_gae(scaled, values, next_values, terminated[rows], done, 0.9, 0.8)
        choices = torch.from_numpy(env_actions[rows].reshape(8, 3, -1) - first)
        log_probs = sum(part.log_prob(x) for part, x in zip(policy, choices.unbind(-1)))
        calls = recorder.calls[8 * iteration : 8 * iteration + 8]
        for epoch in (calls[:4], calls[4:]):
            assert sorted(torch.cat([call[0] for call in epoch]).tolist()) == list(range(24))
            assert [len(call[0]) for call in epoch] == [6] * 4
        assert not torch.equal(calls[0][0], calls[4][0])  # shuffled anew
        for _, batch, coefficients in calls:
            assert torch.equal(batch.observations, observations.flatten(0, 1))
            assert torch.equal(batch.actions, choices.flatten(0, 1))
            torch.testing.assert_close(batch.old_log_probs, log_probs.flatten(), rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(batch.advantages, advantages.flatten(), rtol=1e-5, atol=1e-3)
            expected = (advantages + values).flatten()
            np.testing.assert_allclose(batch.returns, expected, rtol=1e-5, atol=1e-3)
            assert coefficients == pytest.approx({"clip": 0.3, "value": 0.75, "entropy": 0.25})
        rate = 1e-3 * (1 - iteration / 2) if anneal_lr else 1e-3
        assert recorder.learning_rates[8 * iteration : 8 * iteration + 8] == pytest.approx([rate] * 8)
        step = 24 * (iteration + 1)
        assert curves["charts/learning_rate"][step] == pytest.approx(rate)
        explained = 1 - np.var(advantages) / np.var(advantages + values)
        assert curves["losses/explained_variance"][step] == pytest.approx(explained, abs=1e-4)
        assert curves["losses/epochs"][step] == 2


def test_size_of_the_rewards_does_not_matter(tmp_path, monkeypatch):
    """What the first update learns from is the same if all rewards are 10,000 times as large."""
    seen, step = [], ppo.Environments.step
    for factor in (1, 10_000):

        def scaled_step(self, actions, factor=factor):
            observations, rewards, terminated, done = step(self, actions)
            return observations, factor * rewards, terminated, done

        monkeypatch.setattr(ppo.Environments, "step", scaled_step)
        recorder = Recorder(monkeypatch)
        train_stub(tmp_path / str(factor), total_timesteps=24)
        seen.append(recorder.calls[0][1])
    torch.testing.assert_close(seen[0].advantages, seen[1].advantages, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(seen[0].returns, seen[1].returns, rtol=1e-4, atol=1e-4)


def test_target_kl_looks_at_the_mean_of_a_whole_epoch(tmp_path, monkeypatch):
    """1.5 x 0.02 is kept by the first epoch and not by the second; their last minibatches say otherwise."""
    kl = [0, 0, 0, 0.119] + [0.06, 0.07, 0, 0] + [0] * 8
    for target_kl, epochs in ((0.02, 2), (None, 4)):
        recorder = Recorder(monkeypatch, lambda call: {"approx_kl": kl[call]})
        run = train_stub(tmp_path / str(target_kl), total_timesteps=24, update_epochs=4, target_kl=target_kl)
        assert len(recorder.calls) == 4 * epochs
        assert read_curves(run)["losses/epochs"] == {24: epochs}


def test_logged_losses_are_means_over_all_minibatches(tmp_path, monkeypatch):
    Recorder(monkeypatch, lambda call: {"policy_loss": call, "clip_fraction": call**2, "value_loss": 3})
    curves = read_curves(train_stub(tmp_path, total_timesteps=48))
    assert curves["losses/policy_loss"] == {24: np.mean(range(8)), 48: np.mean(range(8, 16))}
    squares = np.arange(16) ** 2
    assert curves["losses/clip_fraction"] == {24: squares[:8].mean(), 48: squares[8:].mean()}
    assert curves["losses/value_loss"] == {24: 3, 48: 3}


# -------------------------------------------------------------------------------------------- short runs


TINY = {"num_envs": 4, "num_steps": 32, "num_minibatches": 4, "update_epochs": 2, "compile": False}
TINY |= {"total_timesteps": 1024, "checkpoint_interval": 512, "eval_interval": 512, "eval_episodes": 2}


def train(folder: Path, **changes) -> Path:
    return ppo.main(ppo.Args(**TINY | {"runs": str(folder)} | changes))


def resume(run: Path, *words: str) -> None:
    ppo.main(ppo.parse_args(["--resume", str(run), *words]))


def assert_same_run(run: Path, reference: Path, *, files: tuple[str, ...] = ("checkpoint.pt", "best.pt")):
    for name in files:  # the last checkpoint, and the best
        states = [ppo.load_checkpoint(x / name) for x in (run, reference)]
        assert checkpoint_difference(*states) is None
    assert read_curves(run) == read_curves(reference)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory) -> Path:
    """A run that nobody changes."""
    return train(tmp_path_factory.mktemp("runs"))


def test_what_is_logged(finished_run):
    assert re.fullmatch(r"CartPole-v1__ppo_discrete__1__\d{8}-\d{6}", finished_run.name)
    saved = json.loads((finished_run / "args.json").read_text())
    assert ppo.Args(**saved) == ppo.Args(**TINY | {"runs": str(finished_run.parent)})
    curves, steps = read_curves(finished_run), list(range(128, 1025, 128))
    losses = {f"losses/{name}" for name in (*ppo.METRICS, "explained_variance", "epochs")}
    dense, evaluations = (
        losses | {"charts/learning_rate"},
        {"eval/episodic_return", "eval/episodic_return_std"},
    )
    sparse = {"charts/episodic_return", "charts/episodic_length"}
    assert curves.keys() == dense | evaluations | sparse
    assert all(list(curves[tag]) == steps for tag in dense)
    assert all(list(curves[tag]) == [0, 512, 1024] for tag in evaluations)
    assert all({*curves[tag]} <= {*steps} and 1024 in curves[tag] for tag in sparse)
    assert all(math.isfinite(x) for curve in curves.values() for x in curve.values())
    rates = [*curves["charts/learning_rate"].values()]
    np.testing.assert_allclose(rates, 1e-3 * np.arange(8, 0, -1) / 8, rtol=1e-6)
    # CartPole pays 1 per step, and the policy is near-uniform at first.
    assert curves["charts/episodic_return"] == curves["charts/episodic_length"]
    assert curves["losses/entropy"][128] == pytest.approx(math.log(2), abs=0.02)
    best = max(curves["eval/episodic_return"][step] for step in (512, 1024))
    assert ppo.load_checkpoint(finished_run / "best.pt")["best_return"] == pytest.approx(best, rel=1e-6)
    finished = np.mean(ppo.load_checkpoint(finished_run)["envs"]["finished"], axis=0)
    assert curves["charts/episodic_return"][1024] == pytest.approx(finished[0], rel=1e-6)


@pytest.mark.parametrize("file", ["", "best.pt"])
def test_evaluate_prints_mean_and_std(file, finished_run, capsys):
    ppo.main(ppo.parse_args(["--evaluate", str(finished_run / file), "--eval-episodes", "3", "--seed", "9"]))
    agent = ppo.Agent.load(finished_run / file)
    returns = ppo.evaluate(agent, "CartPole-v1", 3, 9 + ppo.EVALUATION_SEED)
    expected = f"CartPole-v1: {np.mean(returns):.1f} +- {np.std(returns):.1f} over 3 episodes"
    assert expected in capsys.readouterr().out
    if not file:  # it is the agent that was evaluated at the end of the training
        returns = ppo.evaluate(agent, "CartPole-v1", 2, 1 + ppo.EVALUATION_SEED)
        logged = read_curves(finished_run)["eval/episodic_return"][1024]
        assert returns.mean() == pytest.approx(logged, rel=1e-6)


def test_equal_seeds_give_equal_runs_and_others_do_not(finished_run, tmp_path):
    """However often they are evaluated and saved."""
    again = train(tmp_path / "again")
    other = train(tmp_path / "other", seed=2, total_timesteps=128, eval_interval=0)
    often = train(tmp_path / "often", checkpoint_interval=1, eval_interval=128, eval_episodes=1)
    assert_same_run(again, finished_run)
    states = ppo.load_checkpoint(finished_run), ppo.load_checkpoint(often)
    assert checkpoint_difference(*states, ignore=("args", "best_return")) is None
    losses = [read_curves(run)["losses/value_loss"][128] for run in (again, other)]
    assert losses[0] != losses[1]


def test_killed_run_equals_an_uninterrupted_one(tmp_path, capsys):
    """Killed without notice past some checkpoints, then resumed."""
    settings = TINY | {"total_timesteps": 6400, "checkpoint_interval": 384, "eval_interval": 256}
    reference = train(tmp_path / "reference", **settings)
    process = start(SCRIPT, *flags(**settings, runs=tmp_path / "killed"), cwd=tmp_path)
    kill_when(process, nth_evaluation(5), delay=0.03)
    (run,) = (tmp_path / "killed").iterdir()
    assert 0 < ppo.load_checkpoint(run)["step"] < 6400
    resume(run)
    printed = capsys.readouterr().out
    assert "Resumed at step" in printed and "differ" not in printed
    assert_same_run(run, reference)


def test_same_command_goes_on_after_sigterm(tmp_path, capsys):
    """Long before the first checkpoint is due; one network for both, and a fixed name."""
    settings = {"shared_network": True, "env_id": "MountainCar-v0", "eval_episodes": 1, "eval_interval": 256}
    settings = TINY | settings | {"total_timesteps": 2560, "checkpoint_interval": 10**9}
    reference = train(tmp_path / "reference", **settings)
    command = flags(**settings, runs=tmp_path, run_name="queued")
    process = start(SCRIPT, *command, cwd=tmp_path)
    seen = nth_evaluation(3)
    next(line for line in process.stdout if seen(line))
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    step = ppo.load_checkpoint(tmp_path / "queued")["step"]
    assert process.returncode == 1 and f"Interrupted at step {step:,}" in output and 512 <= step < 2560
    assert "python ppo_discrete.py --resume" in output and "Traceback" not in output
    ppo.main(ppo.parse_args(command))
    assert f"Resumed at step {step:,}" in capsys.readouterr().out
    assert_same_run(tmp_path / "queued", reference)


def test_finished_run_goes_on_with_more_steps(tmp_path):
    """With a constant learning rate, which knows nothing of the end, it is the longer run from the start."""
    constant = {"anneal_lr": False, "env_id": "PPODiscrete/NoisySeveral-v0", "eval_interval": 256}
    longer = train(tmp_path / "longer", **constant)
    run = train(tmp_path / "short", **constant, total_timesteps=512)
    resume(run, "--total-timesteps", "1024")
    assert_same_run(run, longer, files=("checkpoint.pt",))
    assert json.loads((run / "args.json").read_text())["total_timesteps"] == 1024
    before = ppo.load_checkpoint(run)
    resume(run)  # there is nothing left to do
    assert checkpoint_difference(ppo.load_checkpoint(run), before) is None
    assert_same_run(run, longer, files=("checkpoint.pt",))


def test_opaque_environment_goes_on_exactly(tmp_path, capsys):
    """Nobody can save its attributes, and nobody has to."""
    constant = {"env_id": "PPODiscrete/Opaque-v0", "anneal_lr": False, "eval_interval": 0}
    run = train(tmp_path / "short", **constant, total_timesteps=128)
    resume(run, "--total-timesteps", "256")
    assert "differ" not in capsys.readouterr().out
    longer = train(tmp_path / "longer", **constant, total_timesteps=256)
    assert_same_run(run, longer, files=("checkpoint.pt",))


def test_dict_observations_and_matrix_actions(tmp_path, capsys):
    """The environment itself checks that its actions are (2, 2) and within its space."""
    changes = {"shared_network": True, "total_timesteps": 256, "eval_interval": 256}
    run = train(tmp_path, env_id="PPODiscrete/Nested-v0", **changes)
    agent = ppo.Agent.load(run)
    assert (agent.mask == 0).sum(1).tolist() == [2, 3, 4, 2]
    assert agent.action_start.tolist() == [1, 0, -1, 7] and agent.actor[0].in_features == 6
    ppo.main(ppo.parse_args(["--evaluate", str(run), "--eval-episodes", "1"]))
    assert "over 1 episodes" in capsys.readouterr().out


def test_rewards_that_are_not_finite_end_the_run(tmp_path):
    """From the 41st step of each environment on, in the second iteration of 4 x 32 steps."""
    changes = {"env_id": "PPODiscrete/Poisoned-v0", "eval_interval": 0, "checkpoint_interval": 1}
    message = refusal(train, tmp_path, **changes)
    (run,) = tmp_path.iterdir()
    assert "nan at step 256" in message and "rewards" in message and str(run) in message
    state = ppo.load_checkpoint(run)
    assert state["step"] == 128 and all(tensor.isfinite().all() for tensor in state["agent"].values())


def test_run_of_another_script_is_refused(tmp_path):
    state = {"agent": ppo.Agent(3, [2]).state_dict(), "args": {"shared_network": False}}
    ppo_continuous.save_checkpoint(tmp_path / "checkpoint.pt", state)
    (tmp_path / "args.json").write_text(json.dumps(dataclasses.asdict(ppo.Args(**TINY))))
    for flag in ("--resume", "--evaluate"):
        message = refusal(lambda flag=flag: ppo.main(ppo.parse_args([flag, str(tmp_path)])))
        assert str(tmp_path / "checkpoint.pt") in message and "ppo_discrete.py" in message
    (tmp_path / "args.json").write_text(json.dumps(dataclasses.asdict(ppo_continuous.Args())))
    message = refusal(ppo.parse_args, ["--resume", str(tmp_path)])
    assert str(tmp_path / "args.json") in message and "shared_network" in message


def test_resume_keeps_to_the_arguments_of_the_run(finished_run):
    for flag, value in (("--gamma", "0.5"), ("--env-id", "Acrobot-v1"), ("--num-envs", "8")):
        message = refusal(ppo.parse_args, ["--resume", str(finished_run), flag, value])
        assert flag[2:].replace("-", "_") in message and value in message
    with_one = refusal(ppo.parse_args, ["--resume", str(finished_run), "--shared-network"])
    assert "shared_network from False to True" in with_one


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_missing_device_is_named(tmp_path):
    assert "no cuda device" in refusal(train, tmp_path, device="cuda")


def test_it_learns(tmp_path):
    """The most that can be had is 500; seeds 1 to 5 have more than 200 by then."""
    settings = {"num_envs": 8, "num_steps": 128, "num_minibatches": 8, "update_epochs": 8}
    settings |= {"total_timesteps": 12_288, "eval_episodes": 10}
    run = train(tmp_path, **settings, eval_interval=10**9, checkpoint_interval=10**9)
    curves = read_curves(run)
    assert random_return("CartPole-v1", 20) < 40 and curves["charts/episodic_return"][1024] < 40
    assert curves["eval/episodic_return"][12_288] > 150
    assert curves["charts/episodic_return"][12_288] > 60  # of the last 100 episodes, of which many are old
