"""ppo_atari.py, against ale_py played by hand, Gymnasium's wrappers, torch.distributions, torch.optim; runs.

What the script shares with ppo_continuous.py, letter for letter, is tested there too.
"""

import copy
import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import ale_py
import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from ale_py.roms import get_rom_path
from helpers import checkpoint_difference, read_curves, run_script, start
from scipy.stats import chi2, kstest
from test_ppo_continuous import make_batch as make_rollout
from test_ppo_continuous import plain_gae
from test_ppo_continuous_runs import flags, kill_when, nth_evaluation, refusal
from torch.distributions import Categorical

import ppo_atari as ppo

SCRIPT = "ppo_atari.py"
BREAKOUT, PONG, MS_PACMAN = "ALE/Breakout-v5", "ALE/Pong-v5", "ALE/MsPacman-v5"
ROMS = {BREAKOUT: "breakout", PONG: "pong", MS_PACMAN: "ms_pacman"}
NOOP, FIRE = ale_py.Action.NOOP, ale_py.Action.FIRE
ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# --------------------------------------------------------------------------------------- games, by hand


class PlainGame:
    """One game on a bare emulator, frame by frame, with all that `Games` promises written out."""

    def __init__(self, env_id: str, seed: int, max_frames: int = 108_000, sticky: float = 0.0):
        self.cv2 = pytest.importorskip("cv2")
        self.ale = ale_py.ALEInterface()
        self.ale.setInt("random_seed", seed)
        self.ale.setFloat("repeat_action_probability", sticky)
        self.ale.loadROM(get_rom_path(ROMS[env_id]))
        self.buttons, self.max_frames = self.ale.getMinimalActionSet(), max_frames

    def small(self, *screens: np.ndarray) -> np.ndarray:
        brightest = np.max(screens, axis=0)
        return self.cv2.resize(brightest, (84, 84), interpolation=self.cv2.INTER_AREA)

    def begin(self, frames: int) -> np.ndarray:
        """A new game, in which so many frames go by: FIRE where there is such a button, then no-ops."""
        self.ale.reset_game()
        fire = [FIRE] * (FIRE in self.buttons)
        assert len(fire) <= frames < 30
        for button in (fire + [NOOP] * 30)[:frames]:
            self.ale.act(button)
        self.score, self.length, self.must_fire = 0, 0, False
        self.screens = [self.ale.getScreenGrayscale()]
        self.stack = [np.zeros((84, 84), np.uint8)] * 3 + [self.small(*self.screens)]
        return np.stack(self.stack)

    def step(self, action: int) -> tuple[int, bool, bool, bool]:
        """The score of four frames; whether a life is lost, the game is over, its limit is reached."""
        lives, score, before, self.screens = self.ale.lives(), 0, self.screens, []
        for _ in range(4):
            score += self.ale.act(FIRE if self.must_fire else self.buttons[action])
            self.screens.append(self.ale.getScreenGrayscale())
            if self.ale.game_over():
                break
        self.score, self.length = self.score + score, self.length + 1
        lost, over, at_limit = (
            self.ale.lives() < lives,
            self.ale.game_over(),
            4 * self.length >= self.max_frames,
        )
        last_two = self.screens[-2:]
        if at_limit:
            # The engine (ale-py 0.12) leaves out the last frame of all, and has the two before in its place.
            last_two = [*self.screens[-2:-1], *before[-2:]]
        self.stack = [*self.stack[1:], self.small(*last_two)]
        self.must_fire = lost and FIRE in self.buttons
        return score, lost, over, at_limit


def play_both(
    env_id, num_games, steps, *, max_frames=108_000, sticky=0.0, first_seed=7, noop=False
) -> Counter:
    """Asserts that `Games` and `PlainGame` are the same throughout; how often things have happened."""
    games = ppo.Games(env_id, num_games, sticky)
    seeds = first_seed + np.arange(num_games)
    games.reset(seeds)
    observations, happened, finished = games.observations, Counter(), []
    plain = [PlainGame(env_id, seed, max_frames, sticky) for seed in seeds.tolist()]
    for i, game in enumerate(plain):
        assert np.array_equal(observations[i], game.begin(games.frames[i]))
    assert observations.shape == (num_games, 4, 84, 84) and observations.dtype == np.uint8
    assert games.num_actions == len(plain[0].buttons)
    for chosen in np.random.default_rng(0).integers(0, games.num_actions, (steps, num_games)) * (not noop):
        assert games.must_fire.tolist() == [game.must_fire for game in plain]
        rewards, terminated, truncated, final_observations = games.step(chosen)
        observations = games.observations
        for i, game in enumerate(plain):
            happened["forced"] += game.must_fire and game.buttons[chosen[i]] != FIRE
            score, lost, over, at_limit = game.step(chosen[i])
            terminal = lost or over
            assert (rewards[i], terminated[i]) == (np.sign(score), terminal)
            assert truncated[i] == (at_limit and not terminal)
            happened += Counter(lost=lost, over=over, limit=at_limit, truncated=int(truncated[i]))
            happened.update({f"reward {int(rewards[i])}": 1, "raw": int(abs(score) > 1)})
            if over or at_limit:
                if truncated[i]:
                    assert np.array_equal(final_observations[i], np.stack(game.stack))
                    assert not np.array_equal(final_observations[i], observations[i])
                finished.append((i, game.score, game.length))
                game.begin(games.frames[i])
            assert np.array_equal(observations[i], np.stack(game.stack))
    assert games.finished == finished
    games.close()
    return happened


def test_breakout_is_the_game_played_by_hand():
    """Lives are lost, after each the ball is served, and games are over and start anew, with other no-ops."""
    happened = play_both(BREAKOUT, 3, 350)
    assert happened["lost"] > 10 and happened["over"] >= 3 and happened["forced"] > 5
    assert happened["reward 1"] > 3 and not happened["limit"]


def test_pong_is_the_game_played_by_hand():
    happened = play_both(PONG, 2, 250)
    assert happened["reward -1"] > 5 and not happened["lost"] and not happened["forced"]


def test_game_without_fire_is_the_game_played_by_hand():
    """Its scores are tens; the action that would be FIRE elsewhere is never forced."""
    happened = play_both(MS_PACMAN, 2, 300)
    assert happened["lost"] > 1 and happened["raw"] > 20 and not happened["forced"]
    assert FIRE not in PlainGame(MS_PACMAN, 0).buttons


def test_sticky_actions_are_those_of_the_emulator():
    assert play_both(BREAKOUT, 2, 150, sticky=0.25)["lost"] > 2


def test_ball_is_served_whatever_the_policy_does():
    """With no-ops alone nothing would ever happen again after the first life."""
    happened = play_both(BREAKOUT, 1, 200, noop=True)
    assert happened["forced"] >= 4 and happened["over"] >= 1


@pytest.mark.parametrize(("env_id", "max_frames"), [(PONG, 160), (BREAKOUT, 100), (BREAKOUT, 84)])
def test_games_are_cut_at_the_limit(env_id, max_frames, monkeypatch):
    """84 frames after its start a game of Breakout without moves loses a life, which is an end anyway."""
    monkeypatch.setattr(ppo, "MAX_FRAMES", max_frames)
    happened = play_both(env_id, 2, 100, max_frames=max_frames, first_seed=0, noop=True)
    assert happened["limit"] == 2 * (100 // (max_frames // 4))
    assert (happened["truncated"] < happened["limit"]) == (max_frames == 84)


def test_limit_is_that_of_gymnasium():
    assert gym.spec(BREAKOUT).kwargs["max_num_frames_per_episode"] == ppo.MAX_FRAMES == 108_000


@pytest.mark.parametrize("env_id", [BREAKOUT, PONG])
def test_games_agree_with_the_wrappers_of_gymnasium(env_id):
    """AtariPreprocessing and FrameStackObservation, brought to the same frame of the same game.

    They can neither start with one frame of FIRE nor leave their first frames out of the stack, so that the
    first three observations are compared with the bare emulator only, above; so is the end of a game, which
    they show without its last frames.
    """
    pytest.importorskip("cv2")
    games = ppo.Games(env_id, 1)
    games.reset(np.array([5]))
    env = gym.make(env_id, frameskip=1, repeat_action_probability=0.0)
    env = gym.wrappers.AtariPreprocessing(env, noop_max=0)
    env = gym.wrappers.FrameStackObservation(env, 4, padding_type="zero")
    env.reset()
    ale = env.unwrapped.ale
    ale.setInt("random_seed", 5)
    ale.loadROM(get_rom_path(ROMS[env_id]))
    ale.reset_game()
    for button in [FIRE] + [NOOP] * (int(games.frames[0]) - 1):
        ale.act(button)
    generator, lives, compared = np.random.default_rng(1), ale.lives(), 0
    for t in range(200):
        action = generator.integers(games.num_actions)
        forced = games.fire if games.must_fire[0] else action
        reward, terminated, truncated, _ = games.step(np.array([action]))
        expected, score, over, cut, info = env.step(forced)
        assert (reward[0], terminated[0], truncated[0]) == (
            np.sign(score),
            info["lives"] < lives or over,
            cut,
        )
        lives = info["lives"]
        if over:
            break
        if t >= 3:
            assert np.array_equal(games.observations[0], expected)
            compared += 1
    games.close()
    assert compared > 100


def test_seeds_decide_the_games_and_threads_do_not(monkeypatch):
    """Of a seed the engine has 31 bits."""
    ends, made, make_vec = [], [], gym.make_vec
    monkeypatch.setattr(
        gym, "make_vec", lambda *names, **options: made.append(options) or make_vec(*names, **options)
    )
    for threads, seed in ((1, 3), (2, 3), (1, 11)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        games = ppo.Games(BREAKOUT, 3)
        assert made[-1]["num_threads"] == threads
        games.reset(seed + np.arange(3))
        begun = games.frames.tolist()
        for action in np.random.default_rng(0).integers(0, 4, (10, 3)):
            games.step(action)
        ends.append((begun, games.observations.tobytes()))
    assert ends[0] == ends[1] and ends[0] != ends[2] and len({*ends[0][0]}) > 1
    begun = []
    for seeds in ([3, 4, 2**32 - 1], [2**31 + 3, 2**31 + 4, 2**31 - 1]):
        games.reset(np.array(seeds, np.uint32))
        begun.append(games.frames.tolist())
    assert begun[0] == begun[1] and begun[0][:2] == ends[0][0][:2]


@pytest.mark.parametrize(("env_id", "fire"), [(BREAKOUT, 1), (MS_PACMAN, 0)])
def test_games_start_with_fewer_than_30_frames(env_id, fire, monkeypatch):
    """No-ops, and FIRE instead of one where there is such a button; with a limit of one step per game."""
    monkeypatch.setattr(ppo, "MAX_FRAMES", 4)
    games, begun = ppo.Games(env_id, 1), set()
    games.reset(np.array([0]))
    for _ in range(250):
        games.step(np.array([0]))
        begun.add(int(games.frames[0]))
    games.close()
    assert begun == {*range(fire, 30)}


def test_reset_forgets_the_games_before():
    games, still = ppo.Games(BREAKOUT, 2), np.zeros(2, int)
    seeds, returns = np.array([0, 1]), []
    for _ in range(2):
        games.reset(seeds)
        assert games.finished == [] and not games.must_fire.any()
        while not games.finished or not games.must_fire.any():
            games.step(still)
        returns.append(games.finished.copy())
    assert returns[0] == returns[1]


# ----------------------------------------------------------------------------------------------- agent


@pytest.mark.parametrize("num_actions", [4, 18])
def test_network_is_that_of_mnih_et_al(num_actions):
    agent = ppo.Agent(num_actions)
    convolutions = [layer for layer in agent.modules() if isinstance(layer, nn.Conv2d)]
    shapes = [
        (x.in_channels, x.out_channels, x.kernel_size[0], x.stride[0], x.padding[0]) for x in convolutions
    ]
    assert shapes == [(4, 32, 8, 4, 0), (32, 64, 4, 2, 0), (64, 64, 3, 1, 0)]
    # 84 -> 20 -> 9 -> 7 pixels on a side
    weights = 4 * 32 * 8**2 + 32 * 64 * 4**2 + 64 * 64 * 3**2 + 64 * 7 * 7 * 512 + 512 * (num_actions + 1)
    count = sum(p.numel() for p in agent.parameters())
    assert count == weights + 32 + 64 + 64 + 512 + num_actions + 1
    assert count == 1_686_693 or num_actions != 4


def test_initial_weights():
    """Orthogonal of gain sqrt(2); 0.01 for the logits, so that the first policy is uniform, and 1 for V."""
    agent = ppo.Agent(6)
    layers = [layer for layer in agent.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    for layer, gain in zip(layers, [math.sqrt(2)] * 4 + [0.01, 1.0], strict=True):
        gains = torch.linalg.svdvals(layer.weight.detach().flatten(1))
        torch.testing.assert_close(gains, torch.full_like(gains, gain), rtol=1e-4, atol=1e-6)
        assert not layer.bias.any() and layer.weight.dtype == torch.float32
    logits, values = agent(pictures(20))
    assert (logits.softmax(-1) - 1 / 6).abs().max() < 0.01 and values.std() > 0


def pictures(count: int) -> torch.Tensor:
    """Noise of 84 x 84 pixels in large blocks, which a convolution sees more of than of white noise."""
    blocks = torch.randint(0, 256, (count, 4, 12, 12), dtype=torch.uint8)
    return blocks.repeat_interleave(7, 2).repeat_interleave(7, 3)


def make_agent(num_actions: int = 4, **options) -> ppo.Agent:
    """Weights away from where they start, and a policy away from uniform."""
    agent = ppo.Agent(num_actions, **options)
    with torch.no_grad():
        agent.actor.weight.mul_(60)
        for parameter in agent.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    return agent


def plain_network(agent: ppo.Agent, observations: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The network of Mnih et al. (2015), in float64."""
    weights = [p.detach().double() for p in agent.parameters()]
    x = observations.double() / 255
    for stride in (4, 2, 1):
        x = F.conv2d(x, weights.pop(0), weights.pop(0), stride=stride).relu()
    x = F.linear(x.flatten(1), weights.pop(0), weights.pop(0)).relu()
    logits = F.linear(x, weights.pop(0), weights.pop(0))
    return logits, F.linear(x, weights.pop(0), weights.pop(0))[:, 0]


def test_outputs_are_those_of_the_network_in_either_layout():
    """What the rollout gives it lies channels last, what the engine gives it does not."""
    agent, observations = make_agent(), pictures(6)
    last = observations.movedim(1, -1).contiguous().movedim(-1, 1)
    assert last.is_contiguous(memory_format=torch.channels_last) and not last.is_contiguous()
    expected = plain_network(agent, observations)
    assert expected[0].std() > 0.1 and expected[1].std() > 0.1
    for given in (observations, last):
        outputs = agent(given)
        assert [x.shape for x in outputs] == [(6, 4), (6,)]
        assert all(x.dtype == torch.float32 for x in outputs)
        for x, y in zip(outputs, expected):
            torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-5)


def test_bfloat16_changes_little_and_not_the_heads():
    """By 0.5 to 1.5 % of the largest output on three seeds. A head in bfloat16 cannot tell 256 from 256.5."""
    agent, observations = make_agent(bfloat16=True), pictures(16)
    expected = plain_network(agent, observations)
    outputs = agent(observations)
    for x, y in zip(outputs, expected):
        assert x.dtype == torch.float32
        assert 0 < (x - y).abs().max() < 0.02 * y.abs().max()
    with torch.no_grad():
        agent.actor.weight.zero_()
        agent.actor.bias.copy_(torch.tensor([256.5, 256.25, 0.1, 0.0]))
    assert torch.equal(agent(observations)[0], agent.actor.bias.expand(16, 4))
    with torch.autocast("cpu", torch.bfloat16):  # as in the rollout
        assert torch.equal(agent(observations)[0], agent.actor.bias.expand(16, 4))
        torch.testing.assert_close(agent(observations)[1], outputs[1])
    agent(observations)[1].sum().backward()
    assert agent.network[0].weight.grad.dtype == torch.float32


def test_bfloat16_is_for_hardware_that_has_it(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for names, expected in (
        ({"avx2": True}, False),
        ({"avx512_bf16": True}, True),
        ({"amx_bf16": True}, True),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda names=names: names)
        assert ppo.has_bfloat16(cpu) is expected
    for capability in ((7, 5), (8, 0), (9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert ppo.has_bfloat16(gpu) == (capability[0] >= 8)
    assert not ppo.has_bfloat16(torch.device("mps"))


def test_agent_is_loaded(tmp_path):
    agent, observations = make_agent(9), pictures(2)
    ppo.save_checkpoint(tmp_path / "checkpoint.pt", {"agent": agent.state_dict()})
    for path in (tmp_path, tmp_path / "checkpoint.pt"):
        for x, y in zip(ppo.Agent.load(path)(observations), agent(observations)):
            torch.testing.assert_close(x, y, rtol=0, atol=0)


# ----------------------------------------------------------------------------------- losses and update


def test_surrogate_loss_and_its_gradient():
    """Schulman et al. 2017, equation 7, one transition at a time."""
    log_probs, old_log_probs, advantages = torch.randn(3, 32, dtype=torch.float64) * 0.5
    losses, clipped = [], 0
    for new, old, advantage in zip(log_probs.tolist(), old_log_probs.tolist(), advantages.tolist()):
        ratio = math.exp(new - old)
        bounded = min(max(ratio, 0.8), 1.2)
        losses.append(-min(ratio * advantage, bounded * advantage))
        clipped += bounded * advantage < ratio * advantage
    ours = ppo.surrogate_loss(log_probs, old_log_probs, advantages, 0.2)
    assert 0 < clipped < 32
    np.testing.assert_allclose(ours, losses, rtol=1e-12, atol=1e-12)
    log_probs.requires_grad_()
    assert torch.autograd.gradcheck(ppo.surrogate_loss, (log_probs, old_log_probs, advantages, 0.2))


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.5, 2, -2.2, 0),
        (1.5, -2, 3, 3),
        (0.5, 2, -1, -1),
        (0.5, -2, 1.8, 0),
        (1.05, 2, -2.1, -2.1),
        (0.95, -2, 1.9, 1.9),
    ],
)
def test_surrogate_loss_in_numbers(ratio, advantage, loss, gradient):
    """Range [0.9, 1.1]: past it in the direction of the advantage the gradient ends, and only there."""
    log_probs = torch.tensor([math.log(ratio)], requires_grad=True)
    ours = ppo.surrogate_loss(log_probs, torch.zeros(1), torch.tensor([1.0 * advantage]), 0.1)
    ours.sum().backward()
    assert ours.item() == pytest.approx(loss, rel=1e-6)
    assert log_probs.grad.item() == pytest.approx(gradient, rel=1e-6)


def test_log_prob_is_that_of_torch_distributions():
    logits, actions = 3 * torch.randn(5, 7, 6), torch.randint(0, 6, (5, 7))
    torch.testing.assert_close(ppo.log_prob(logits, actions), Categorical(logits=logits).log_prob(actions))


def test_normalize_looks_at_valid_entries_only():
    x, valid = torch.randn(40) * 3 + 5, (torch.rand(40) < 0.7).float()
    chosen = x[valid.bool()]
    ours = ppo.normalize(x, valid, valid.sum())
    torch.testing.assert_close(
        ours[valid.bool()], (chosen - chosen.mean()) / chosen.std(), rtol=1e-5, atol=1e-6
    )
    others = ppo.normalize(torch.where(valid.bool(), x, 1e6), valid, valid.sum())
    assert torch.equal(others[valid.bool()], ours[valid.bool()])
    assert not ppo.normalize(torch.ones(5), torch.ones(5), torch.tensor(5.0)).any()


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(0.99, 0.95), (0.9, 0.0), (1.0, 1.0)])
def test_gae_is_the_definition(gamma, gae_lambda):
    batch = make_rollout(37, 5, 1)
    terminated, done = batch[3:]
    assert terminated.any() and (done & ~terminated).any()
    advantages, returns = ppo.compute_gae(*batch, gamma, gae_lambda)
    expected = plain_gae(*(x.numpy() for x in batch), gamma, gae_lambda)
    np.testing.assert_allclose(advantages, expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(returns, expected + batch[1].numpy(), rtol=1e-9, atol=1e-9)


def test_gae_is_that_of_stable_baselines():
    """It adds what a cut game is still worth to its last reward."""
    buffers = pytest.importorskip("stable_baselines3.common.buffers")
    T, N = 30, 3
    rewards, values, next_values, terminated, done = make_rollout(T, N, 2)
    next_values[:-1] = torch.where((done & ~terminated)[:-1], next_values[:-1], values[1:])
    box, discrete = gym.spaces.Box(-1, 1, (1,)), gym.spaces.Discrete(2)
    buffer = buffers.RolloutBuffer(T, box, discrete, gae_lambda=0.9, gamma=0.97, n_envs=N)
    buffer.rewards[:] = rewards + 0.97 * next_values * (done & ~terminated)
    buffer.values[:] = values
    buffer.episode_starts[1:] = done[:-1]
    buffer.compute_returns_and_advantage(next_values[-1], done[-1].numpy())
    advantages, returns = ppo.compute_gae(rewards, values, next_values, terminated, done, 0.97, 0.9)
    np.testing.assert_allclose(advantages, buffer.advantages, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(returns, buffer.returns, rtol=1e-4, atol=1e-5)


def make_minibatch(agent: ppo.Agent, size: int = 24) -> ppo.Batch:
    """What is given to the update; the old policy lies beside that of the agent, 5 transitions are masked."""
    observations = pictures(size)
    policy = Categorical(logits=agent(observations)[0].detach())
    actions = policy.sample()
    old_log_probs = policy.log_prob(actions) + 0.2 * torch.randn(size)
    advantages, returns = torch.randn(2, size) * 2 + 0.5
    weights = (torch.arange(size) % 5 > 0).float()
    last = observations.movedim(1, -1).contiguous()
    return ppo.Batch(last, actions, old_log_probs, advantages, returns, weights / weights.sum())


def coefficients(args: ppo.Args) -> dict[str, torch.Tensor]:
    values = {"clip": args.clip_coef, "value": args.vf_coef, "entropy": args.ent_coef}
    return {name: torch.tensor(value) for name, value in values.items()}


def update_args(**changes) -> ppo.Args:
    return ppo.Args(**{"compile": False, "bfloat16": False, "ent_coef": 0.05, "vf_coef": 0.7} | changes)


def reference_step(agent: ppo.Agent, optimizer, args: ppo.Args, minibatch: ppo.Batch) -> list[float]:
    """One step of PPO on the transitions that are not masked, with torch.distributions and torch.optim."""
    kept = minibatch[-1] > 0
    observations, actions, old_log_probs, advantages, returns = (x[kept] for x in minibatch[:-1])
    logits, values = agent(observations.permute(0, 3, 1, 2))
    policy = Categorical(logits=logits)
    ratio = (policy.log_prob(actions) - old_log_probs).exp()
    clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    policy_loss = torch.maximum(-ratio * advantages, -clipped * advantages).mean()
    value_loss = 0.5 * F.mse_loss(values, returns)
    entropy = policy.entropy().mean()
    optimizer.zero_grad()
    (policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy).backward()
    grad_norm = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
    optimizer.step()
    approx_kl = ((ratio - 1) - ratio.log()).mean()
    clip_fraction = ((ratio < 1 - args.clip_coef) | (ratio > 1 + args.clip_coef)).float().mean()
    return [x.item() for x in (policy_loss, value_loss, entropy, approx_kl, clip_fraction, grad_norm)]


@pytest.mark.parametrize("max_grad_norm", [0.5, 1e3])
def test_update_is_the_textbook_step(max_grad_norm):
    args, agent = update_args(max_grad_norm=max_grad_norm), make_agent()
    reference = copy.deepcopy(agent)
    optimizer = ppo.Adam(agent.parameters(), args.learning_rate, eps=1e-5)
    # The coefficients are those of each call.
    others = {"clip_coef": 0.5, "ent_coef": 0.5, "vf_coef": 0.1}
    update = ppo.make_update(agent, optimizer, dataclasses.replace(args, **others))
    theirs = torch.optim.Adam(reference.parameters(), args.learning_rate, eps=1e-5)
    for _ in range(3):
        minibatch = make_minibatch(agent)
        metrics = update(minibatch, coefficients(args))
        expected = reference_step(reference, theirs, args, minibatch)
        torch.testing.assert_close(metrics, torch.tensor(expected), rtol=2e-4, atol=1e-5)
        assert not metrics.requires_grad and 0 < expected[4] < 1
        assert (expected[5] > max_grad_norm) == (max_grad_norm == 0.5)  # both sides of the limit are tried
    for i, (p, q) in enumerate(zip(agent.parameters(), reference.parameters(), strict=True)):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-6)
        state = theirs.state[q]
        scale = state["exp_avg"].abs().max().item()
        torch.testing.assert_close(optimizer.first_moments[i], state["exp_avg"], rtol=1e-3, atol=1e-3 * scale)
    assert optimizer.steps == 3


def test_masked_transitions_change_nothing():
    agents = [make_agent() for _ in range(2)]
    agents[1].load_state_dict(agents[0].state_dict())
    minibatch, args = make_minibatch(agents[0]), update_args()
    masked = minibatch.weights == 0
    changed = ppo.Batch(*(x.clone() for x in minibatch))
    for x, value in zip(changed, (255, 3, -9.0, 1e3, -1e3)):
        x[masked] = value
    assert masked.sum() == 5 and not torch.equal(minibatch[0], changed[0])
    optimizers = [ppo.Adam(agent.parameters(), 1e-3) for agent in agents]
    metrics = [
        ppo.make_update(agent, optimizer, args)(given, coefficients(args))
        for agent, optimizer, given in zip(agents, optimizers, (minibatch, changed))
    ]
    assert torch.equal(*metrics)
    for p, q in zip(*(agent.parameters() for agent in agents)):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-9)


def test_compiled_update_is_the_eager_one(capsys):
    """Compiled once: learning rate and coefficients are scheduled, as a reader may do in `train`."""
    agents = [make_agent() for _ in range(2)]
    agents[1].load_state_dict(agents[0].state_dict())
    optimizers = [ppo.Adam(agent.parameters(), 1e-3) for agent in agents]
    updates = [
        ppo.make_update(agent, optimizer, update_args(compile=compiled))
        for agent, optimizer, compiled in zip(agents, optimizers, (True, False))
    ]
    before = agents[0].actor.weight.detach().clone()
    for step in range(5):
        minibatch = make_minibatch(agents[1])
        args = update_args(clip_coef=0.2 / (1 + step), ent_coef=0.05 * step, vf_coef=0.7 - 0.1 * step)
        for optimizer in optimizers:
            optimizer.learning_rate.fill_(1e-3 / (1 + step))
        compiled, eager = (update(minibatch, coefficients(args)) for update in updates)
        torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(agents[0].actor.weight, before, atol=1e-3)
    for p, q in zip(agents[0].parameters(), agents[1].parameters()):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-5)
    printed = capsys.readouterr().out
    if "does not work here" in printed:
        pytest.skip("no compiler")
    assert printed.count("Compiling the update") == 1 and "again and again" not in printed


# --------------------------------------------------------------------------------------------- rollout


def scripted_policy(num_actions: int):
    """Logits and values from how bright the picture is in nine places."""
    weights = torch.randn(36, num_actions + 1, generator=torch.Generator().manual_seed(1)) / 400

    def policy(observations: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert observations.shape[1:] == (4, 84, 84) and observations.dtype == torch.uint8
        outputs = F.adaptive_avg_pool2d(observations.float(), 3).flatten(1) @ weights
        return outputs[:, :-1], outputs[:, -1]

    return policy


def gumbel(*shape: int) -> torch.Tensor:
    return torch.distributions.Gumbel(0.0, 1.0).sample(shape)


def test_rollout_is_what_the_games_saw(monkeypatch):
    """Two rollouts of 64 steps; games are cut after 40, and lives lost before."""
    monkeypatch.setattr(ppo, "MAX_FRAMES", 160)
    T, N, games, seen = 64, 3, ppo.Games(BREAKOUT, 3), []
    send, receive, sent = games.send, games.receive, []

    def recording_send(actions):
        assert isinstance(actions, np.ndarray) and actions.shape == (N,)
        sent[:] = actions, games.must_fire.copy()
        send(actions)

    def recording_receive():
        outcome = receive()
        seen.append([x.copy() for x in (*sent, games.observations, *outcome)])
        return outcome

    monkeypatch.setattr(games, "send", recording_send)
    monkeypatch.setattr(games, "receive", recording_receive)
    policy = scripted_policy(4)
    games.reset(np.arange(3))
    for _ in range(2):
        seen.clear()
        before = games.observations.copy()
        noise, observations = gumbel(T, N, 4), torch.zeros(T, N, 84, 84, 4, dtype=torch.uint8)
        rollout = ppo.collect_rollout(games, policy, noise, observations)
        played, forced, after, rewards, terminated, truncated, final = map(np.stack, zip(*seen))
        assert rollout.observations is observations
        transitions = rollout[1:]
        assert all(x.shape == (T, N) for x in transitions)
        expected_types = [torch.int64, *[torch.float32] * 4, *[torch.bool] * 3]
        assert [x.dtype for x in transitions] == expected_types
        actions, log_probs, values, next_values, *rest = transitions
        shown = np.concatenate((before[None], after[:-1]))
        assert np.array_equal(observations.permute(0, 1, 4, 2, 3), shown)
        logits, expected_values = policy(torch.from_numpy(shown).flatten(0, 1))
        distribution = Categorical(logits=logits.view(T, N, 4))
        assert np.array_equal(actions, played)
        assert torch.equal(actions, (distribution.logits + noise).argmax(-1)) and len(actions.unique()) == 4
        torch.testing.assert_close(log_probs, distribution.log_prob(actions), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(values, expected_values.view(T, N), rtol=1e-5, atol=1e-4)
        following = np.where(truncated[..., None, None, None], final, after)
        expected = policy(torch.from_numpy(following).flatten(0, 1))[1].view(T, N)
        torch.testing.assert_close(next_values, expected, rtol=1e-5, atol=1e-4)
        others = policy(torch.from_numpy(after).flatten(0, 1))[1].view(T, N)
        assert ((others - expected).abs()[truncated] > 1e-2).all()  # the new game is worth something else
        for ours, wanted in zip(rest, (rewards, terminated, terminated | truncated, ~forced), strict=True):
            assert np.array_equal(ours, wanted)
        assert truncated.any() and forced.any() and terminated.any()
        assert (played[forced] != 1).any()  # what the policy chose, not the FIRE that was pressed
        assert not any(x.requires_grad for x in transitions)


def test_two_halves_in_turn_play_as_each_half_alone(monkeypatch):
    """Two rollouts: games are cut after 25 steps and lives lost before, so that every branch is taken."""
    monkeypatch.setattr(ppo, "MAX_FRAMES", 100)
    T, args = 40, ppo.Args(num_envs=4, num_steps=40)
    games, policy = ppo.TrainingGames(args, num_halves=2), scripted_policy(4)
    assert [len(half.observations) for half in games.halves] == [2, 2]
    alone = [ppo.Games(BREAKOUT, 2) for _ in range(2)]
    for half, seeds in zip(alone, games.seeds.numpy().reshape(2, 2)):
        half.reset(seeds)
    ended = 0
    for _ in range(2):
        noise, observations = gumbel(T, 4, 4), torch.zeros(T, 4, 84, 84, 4, dtype=torch.uint8)
        together = ppo.collect_rollout(games, policy, noise, observations)
        for i, half in enumerate(alone):
            part = slice(2 * i, 2 * i + 2)
            memory = torch.zeros(T, 2, 84, 84, 4, dtype=torch.uint8)
            expected = ppo.collect_rollout(half, policy, noise[:, part], memory)
            for name, x, wanted in zip(expected._fields, together, expected):
                assert torch.equal(x[:, part], wanted), name
        ended += together.done.sum() - together.terminated.sum()
        assert not together.valid.all()
    assert ended >= 8
    finished = [(score, length) for half in alone for _, score, length in half.finished]
    games.statistics()
    assert [*games.last_games] == finished and len(finished) >= 8
    games.close()
    assert len(ppo.TrainingGames(ppo.Args(num_envs=3, num_minibatches=3), num_halves=2).halves) == 1


class StillGames:
    """Games in which nothing happens."""

    def __init__(self, num_games: int):
        self.must_fire = np.zeros(num_games, bool)
        self.observations = np.zeros((num_games, 4, 84, 84), np.uint8)
        self.halves = [self]

    def send(self, actions):
        self.sent = actions

    def receive(self):
        return self.step(self.sent)

    def step(self, actions):
        nothing = np.zeros(len(actions))
        return nothing, nothing.astype(bool), nothing.astype(bool), self.observations


def assert_frequencies(actions: np.ndarray, probabilities: np.ndarray) -> None:
    expected = probabilities * actions.size
    counts = np.bincount(actions.flatten(), minlength=len(probabilities))
    assert expected.min() > 5
    assert ((counts - expected) ** 2 / expected).sum() < chi2.ppf(0.9999, len(probabilities) - 1)


def test_frequencies_of_actions_follow_the_softmax():
    T, N, probabilities = 600, 4, np.array([0.5, 0.3, 0.15, 0.05])
    logits = torch.from_numpy(np.log(probabilities)).float() + 3
    observations = torch.zeros(1, N, 84, 84, 4, dtype=torch.uint8).expand(T, -1, -1, -1, -1)
    rollout = ppo.collect_rollout(
        StillGames(N), lambda x: (logits.expand(N, 4), torch.zeros(N)), gumbel(T, N, 4), observations
    )
    assert_frequencies(rollout.actions.numpy(), probabilities)
    torch.testing.assert_close(
        rollout.log_probs.exp(), torch.from_numpy(probabilities).float()[rollout.actions]
    )


# ------------------------------------------------------------------------------------------- evaluation


def record_steps(monkeypatch) -> list:
    """All games from here on, of trainings and evaluations, with the seeds and actions they were given."""
    made, init, step, reset = [], ppo.Games.__init__, ppo.Games.step, ppo.Games.reset

    def recorded_init(self, *arguments):
        init(self, *arguments)
        self.given, self.starts = [], []
        made.append(self)

    def recorded_step(self, actions):
        self.given.append(actions.copy())
        return step(self, actions)

    def recorded_reset(self, seeds):
        reset(self, seeds)
        self.starts, self.begun = [*self.starts, seeds.tolist()], self.frames.copy()

    monkeypatch.setattr(ppo.Games, "__init__", recorded_init)
    monkeypatch.setattr(ppo.Games, "step", recorded_step)
    monkeypatch.setattr(ppo.Games, "reset", recorded_reset)
    return made


def test_evaluation_is_whole_games_of_the_policy(monkeypatch):
    """Each score is that of the same actions by hand, on the first game at its place only."""
    made, agent = record_steps(monkeypatch), ppo.Agent(4)
    probabilities = np.array([0.1, 0.1, 0.5, 0.3])
    with torch.no_grad():
        agent.actor.weight.zero_()
        agent.actor.bias.copy_(torch.from_numpy(np.log(probabilities)))
    before, generator = copy.deepcopy(agent.state_dict()), torch.get_rng_state()
    scores = ppo.evaluate(agent, BREAKOUT, episodes=3, seed=4)
    actions, lengths = np.array(made[0].given), []
    assert made[0].starts == [[4, 5, 6]] and scores.shape == (3,)
    for i in range(3):
        game, over, t = PlainGame(BREAKOUT, 4 + i), False, 0
        game.begin(made[0].begun[i])
        while not over:
            _, _, over, _ = game.step(actions[t, i])
            t += 1
        assert scores[i] == game.score
        lengths.append(t)
    assert len(actions) == max(lengths) and len({*lengths}) > 1
    assert_frequencies(actions, probabilities)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(tensor, before[name]) for name, tensor in agent.state_dict().items())
    again = ppo.evaluate(agent, BREAKOUT, episodes=3, seed=4)
    assert np.array_equal(made[1].given, actions) and np.array_equal(again, scores)
    monkeypatch.setattr(ppo, "MAX_FRAMES", 200)
    ppo.evaluate(agent, BREAKOUT, 1, 5)
    assert not np.array_equal(made[2].given, actions[: len(made[2].given), 1:2])


def test_evaluation_counts_the_first_game_at_each_place(monkeypatch):
    """One place is through with three games before the other is with its first."""

    class Scripted(StillGames):
        def __init__(self, env_id, num_games, sticky):
            super().__init__(num_games)
            self.steps, self.finished = 0, []

        def reset(self, seeds):
            assert seeds.tolist() == [0, 1]

        def step(self, actions):
            self.steps += 1
            self.finished += [(0, 10.0 * self.steps, 1.0)] + [(1, 7.0, 3.0)] * (self.steps == 3)
            return super().step(actions)

        def close(self):
            assert self.steps == 3

    monkeypatch.setattr(ppo, "Games", Scripted)
    assert ppo.evaluate(ppo.Agent(4), BREAKOUT, episodes=2, seed=0).tolist() == [10, 7]


def test_evaluation_with_sticky_actions(monkeypatch):
    made, agent = record_steps(monkeypatch), ppo.Agent(4)
    (score,) = ppo.evaluate(agent, BREAKOUT, episodes=1, seed=8, repeat_action_probability=0.25)
    game, over = PlainGame(BREAKOUT, 8, sticky=0.25), False
    game.begin(made[0].begun[0])
    for (action,) in made[0].given:
        assert not over
        _, _, over, _ = game.step(action)
    assert over and game.score == score


def test_video_is_of_a_whole_game(tmp_path, monkeypatch):
    """Of an agent that presses nothing: without FIRE its balls would stay where they are for 3000 frames."""
    pytest.importorskip("moviepy")
    pytest.importorskip("imageio_ffmpeg")
    cv2 = pytest.importorskip("cv2")
    monkeypatch.setattr(ppo, "MAX_FRAMES", 3000)
    agent, generator = ppo.Agent(4), torch.get_rng_state()
    with torch.no_grad():
        agent.actor.bias[0] = 100
    ppo.evaluate(agent, BREAKOUT, 1, 1, tmp_path / "videos", "some")
    (path,) = (tmp_path / "videos").iterdir()
    assert path.name == "some-episode-0.mp4" and path.read_bytes()[4:8] == b"ftyp"
    film = cv2.VideoCapture(str(path))
    assert 450 < film.get(cv2.CAP_PROP_FRAME_COUNT) < 700
    picture = film.read()[1].astype(int)
    assert picture.shape[:2] == (210, 160) and np.ptp(picture, axis=-1).max() > 50  # in colour
    assert torch.equal(torch.get_rng_state(), generator)
    monkeypatch.setattr(ppo, "MAX_VIDEO_STEPS", 20)
    ppo.record_game(agent, MS_PACMAN, 1, 0.0, tmp_path / "short", "other")
    film = cv2.VideoCapture(str(tmp_path / "short" / "other-episode-0.mp4"))
    assert 80 < film.get(cv2.CAP_PROP_FRAME_COUNT) <= 80 + 31


# ------------------------------------------------------------------------------- what training does


class Recorder:
    """In the place of `make_update`: keeps each minibatch, moves nothing, returns chosen metrics."""

    def __init__(self, monkeypatch, metrics=lambda call: {}):
        self.calls, self.learning_rates, self.metrics = [], [], metrics
        monkeypatch.setattr(ppo, "make_update", self.make_update)

    def make_update(self, agent, optimizer, args):
        assert [*map(id, optimizer.parameters)] == [*map(id, agent.parameters())]

        def update(minibatch, coefficients):
            assert {name: x.item() for name, x in coefficients.items()} == pytest.approx(
                {"clip": args.clip_coef, "value": args.vf_coef, "entropy": args.ent_coef}
            )
            self.calls.append([x.clone() for x in minibatch])
            self.learning_rates.append(optimizer.learning_rate.item())
            chosen = self.metrics(len(self.calls) - 1)
            return torch.tensor([float(chosen.get(name, 0)) for name in ppo.METRICS])

        return update


TINY = {"num_envs": 2, "num_steps": 16, "num_minibatches": 2, "update_epochs": 2, "compile": False}
TINY |= {"total_timesteps": 256, "checkpoint_interval": 64, "eval_interval": 0, "eval_episodes": 1}
EXACT = {"checkpoint_barrier": True, "eval_interval": 128}


def train(folder: Path, **changes) -> Path:
    return ppo.main(ppo.Args(**TINY | {"runs": str(folder)} | changes))


def resume(run: Path, *words: str) -> None:
    ppo.main(ppo.parse_args(["--resume", str(run), *words]))


def spy_on_rollouts(monkeypatch, **changes: torch.Tensor) -> list:
    """Keeps what each rollout begins with, its noise and what it returns; `changes` alter it before use."""
    collect_rollout, seen = ppo.collect_rollout, []

    def spy(games, policy, noise, observations):
        begun = games.observations.copy()
        rollout = collect_rollout(games, policy, noise, observations)._replace(**changes)
        seen.append((begun, noise.clone(), ppo.Rollout(*(x.clone() for x in rollout))))
        return rollout

    monkeypatch.setattr(ppo, "collect_rollout", spy)
    return seen


@pytest.mark.parametrize(("norm_adv", "anneal_lr"), [(True, True), (False, False)])
def test_update_is_given_what_the_definitions_say(norm_adv, anneal_lr, tmp_path, monkeypatch):
    """Two iterations; every transition once per epoch, shuffled, steps that only press FIRE without weight.

    Transitions are given numbers, in the place of their log-probabilities, to be known by.
    """
    monkeypatch.setattr(ppo, "MAX_FRAMES", 160)
    recorder = Recorder(monkeypatch)
    numbers = torch.arange(96.0).view(48, 2)
    seen = spy_on_rollouts(monkeypatch, log_probs=numbers)
    settings = {
        "num_steps": 48,
        "num_minibatches": 4,
        "total_timesteps": 192,
        "gamma": 0.9,
        "gae_lambda": 0.8,
    }
    run = train(tmp_path, norm_adv=norm_adv, anneal_lr=anneal_lr, learning_rate=1e-3, **settings)
    curves, masked = read_curves(run), 0
    assert len(seen) == 2 and len(recorder.calls) == 16
    for iteration, (*_, (observations, actions, _, *rest)) in enumerate(seen):
        values, next_values, rewards, terminated, done, valid = (x.numpy() for x in rest)
        assert (done & ~terminated).any()
        advantages = plain_gae(rewards, values, next_values, terminated, done, 0.9, 0.8)
        calls = recorder.calls[8 * iteration : 8 * iteration + 8]
        orders = [torch.cat([call[2] for call in epoch]).tolist() for epoch in (calls[:4], calls[4:])]
        assert all(sorted(order) == list(range(96)) and order != list(range(96)) for order in orders)
        assert orders[0] != orders[1] and all(len(call[2]) == 24 for call in calls)
        for given, chosen, indices, given_advantages, given_returns, weights in calls:
            indices = indices.long()
            assert torch.equal(given, observations.flatten(0, 1)[indices])
            assert torch.equal(chosen, actions.flatten()[indices])
            counted, wanted = valid.flatten()[indices], advantages.flatten()[indices]
            np.testing.assert_allclose(
                given_returns, wanted + values.flatten()[indices], rtol=1e-4, atol=1e-5
            )
            np.testing.assert_allclose(weights, counted / counted.sum(), rtol=1e-5)
            masked += (~counted).sum()
            if norm_adv:
                wanted = (wanted - wanted[counted].mean()) / wanted[counted].std(ddof=1)
            np.testing.assert_allclose(given_advantages, wanted, rtol=1e-3, atol=1e-4)
        rate = 1e-3 * (1 - iteration / 2) if anneal_lr else 1e-3
        assert recorder.learning_rates[8 * iteration : 8 * iteration + 8] == pytest.approx([rate] * 8)
        step = 96 * (iteration + 1)
        assert curves["charts/learning_rate"][step] == pytest.approx(rate)
        explained = 1 - np.var(advantages) / np.var(advantages + values)
        assert curves["losses/explained_variance"][step] == pytest.approx(explained, abs=1e-3)
    assert masked > 0


def test_noise_of_the_training_is_gumbel_and_the_games_go_on(tmp_path, monkeypatch):
    Recorder(monkeypatch)
    seen, made = spy_on_rollouts(monkeypatch), record_steps(monkeypatch)
    run = train(tmp_path, num_steps=100, total_timesteps=600)
    noise = torch.stack([noise for _, noise, _ in seen]).numpy()
    assert kstest(noise.flatten(), "gumbel_r").pvalue > 1e-3 and len(np.unique(noise)) > 0.99 * noise.size
    # Each iteration goes on from where the one before has ended.
    games = ppo.Games(BREAKOUT, 2)
    games.reset(np.array(made[0].starts[0]))
    for begun, _, rollout in seen:
        assert np.array_equal(begun, games.observations)
        for t in range(100):
            assert np.array_equal(rollout.observations[t].permute(0, 3, 1, 2), games.observations)
            games.step(rollout.actions[t].numpy())
    # Scores and lengths of whole games, as they are counted by hand above.
    expected = [(score, length) for _, score, length in games.finished]
    assert len(expected) >= 2 and ppo.load_checkpoint(run)["games"]["last_games"] == expected
    curves = read_curves(run)
    assert curves["charts/episodic_return"][600] == pytest.approx(np.mean([x[0] for x in expected]))
    assert curves["charts/episodic_length"][600] == pytest.approx(np.mean([x[1] for x in expected]))


def test_target_kl_looks_at_the_mean_of_a_whole_epoch(tmp_path, monkeypatch):
    """1.5 x 0.02 is kept by the first epoch and not by the second; their last minibatches say otherwise."""
    kl = [0, 0, 0, 0.119] + [0.06, 0.07, 0, 0] + [0] * 8
    settings = {
        "num_steps": 4,
        "total_timesteps": 8,
        "num_minibatches": 4,
        "update_epochs": 4,
        "norm_adv": False,
    }
    for target_kl, epochs in ((0.02, 2), (None, 4)):
        recorder = Recorder(monkeypatch, lambda call: {"approx_kl": kl[call]})
        run = train(tmp_path / str(target_kl), **settings, target_kl=target_kl)
        assert len(recorder.calls) == 4 * epochs
        assert read_curves(run)["losses/epochs"] == {8: epochs}


def test_logged_losses_are_means_over_all_minibatches(tmp_path, monkeypatch):
    Recorder(monkeypatch, lambda call: {"policy_loss": call, "clip_fraction": call**2, "value_loss": 3})
    curves = read_curves(train(tmp_path, num_steps=8, total_timesteps=32))
    assert curves["losses/policy_loss"] == {16: 1.5, 32: 5.5}
    assert curves["losses/clip_fraction"] == {16: np.mean([0, 1, 4, 9]), 32: np.mean([16, 25, 36, 49])}
    assert curves["losses/value_loss"] == {16: 3, 32: 3}


# ------------------------------------------------------------------------------------- several processes


DRIVER = """
import sys

import torch
import torch.distributed as dist

import ppo_atari as ppo

ppo.MAX_FRAMES = 80  # so that games end within the run
train, make_update, agents = ppo.train, ppo.make_update, []


def checked_train(args, run):
    x, valid = (part.chunk(2)[ppo.rank()] for part in torch.load("inputs.pt"))
    count = ppo.sum_over_ranks(valid.sum())
    found = {"count": count, "normal": ppo.normalize(x, valid, count), "sum": ppo.sum_over_ranks(x.clone())}
    train(args, run)
    torch.save(found | {"run": str(run.path), "agent": agents[0].state_dict()}, f"rank{ppo.rank()}.pt")


def spy(agent, optimizer, args):
    agents.append(agent)
    return make_update(agent, optimizer, args)


ppo.train, ppo.make_update = checked_train, spy
assert ppo.main(ppo.parse_args()).is_dir() and not dist.is_initialized()
"""


def launch(script: Path, **settings) -> subprocess.Popen:
    """The script in two processes."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    variables = os.environ | {"PYTHONPATH": str(Path(ppo.__file__).parent), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(
        [*torchrun, str(script), *flags(**TINY | settings)], cwd=script.parent, env=variables, **pipes
    )


def test_two_processes_are_one_with_all_games(tmp_path, monkeypatch):
    """One update, in which games have ended and steps are masked, in different numbers on both sides."""
    settings = {"num_envs": 4, "num_steps": 32, "num_minibatches": 1, "update_epochs": 1, "bfloat16": False}
    settings |= {"total_timesteps": 128, "eval_interval": 128, "num_threads": 1, "seed": 3}
    x, valid = torch.randn(60) * 3 + 1, (torch.rand(60) < torch.linspace(0.3, 1, 60)).float()
    torch.save((x, valid), tmp_path / "inputs.pt")
    (tmp_path / "driver.py").write_text(DRIVER)
    with launch(tmp_path / "driver.py", **settings, runs=tmp_path / "both") as process:
        output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert output.count("Run directory") == output.count("return") == 1
    (run,) = (tmp_path / "both").iterdir()
    assert len([*run.glob("events*")]) == 1
    ranks = [torch.load(tmp_path / f"rank{i}.pt") for i in range(2)]
    assert [rank["run"] for rank in ranks] == [str(run)] * 2
    torch.testing.assert_close(
        torch.cat([rank["normal"] for rank in ranks]), ppo.normalize(x, valid, valid.sum())
    )
    for rank in ranks:
        assert rank["count"] == valid.sum()
        torch.testing.assert_close(rank["sum"], x[:30] + x[30:])

    monkeypatch.setattr(ppo, "MAX_FRAMES", 80)
    seen = spy_on_rollouts(monkeypatch)
    alone = train(tmp_path / "alone", **settings)
    masked = (~seen[0][-1].valid).sum(0)
    assert masked[:2].sum() != masked[2:].sum()
    ours, expected = ppo.load_checkpoint(run), ppo.load_checkpoint(alone)
    for name, tensor in expected["agent"].items():
        torch.testing.assert_close(ours["agent"][name], tensor, rtol=0, atol=1e-6)
        assert all(torch.equal(rank["agent"][name], ours["agent"][name]) for rank in ranks)
    assert ours["optimizer"].keys() == expected["optimizer"].keys()
    for name in expected["optimizer"]:
        for x, y in zip(ours["optimizer"][name], expected["optimizer"][name], strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-6 * max(1, y.abs().max().item()))
    finished = [sorted(state["games"]["last_games"]) for state in (ours, expected)]
    assert finished[0] == finished[1] and len(finished[0]) >= 4
    assert ours["step"] == expected["step"] == 128
    curves = [read_curves(x) for x in (run, alone)]
    for tag, curve in curves[1].items():
        if tag != "losses/explained_variance":  # that of the first process
            assert curves[0][tag] == pytest.approx(curve, rel=1e-3, abs=1e-5), tag
    assert curves[0].keys() == curves[1].keys()


STOPPED_DRIVER = """
import os
import signal

import torch.distributed as dist

import ppo_atari as ppo

dist.init_process_group("gloo")  # one group for all three runs
dist.init_process_group = dist.destroy_process_group = lambda *names, **options: None
args, collect_rollout, left = ppo.parse_args(), ppo.collect_rollout, None


def signalled(*inputs):
    global left
    left = left and left - 1
    if left == 0 and ppo.rank() == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return collect_rollout(*inputs)


ppo.collect_rollout = signalled
for name, left in (("whole", None), ("stopped", 4), ("stopped", None)):
    args.run_name = name
    try:
        ppo.main(args)
    except SystemExit as error:
        assert name == "stopped" and left == 0
        print(f"rank {ppo.rank()}: {error}", file=open(f"rank{ppo.rank()}.txt", "w"))
    dist.barrier()
"""


def test_processes_agree_on_a_stop_and_go_on_exactly(tmp_path):
    """SIGTERM reaches one of two in its fourth iteration of eight, one after a barrier."""
    (tmp_path / "driver.py").write_text(STOPPED_DRIVER)
    settings = {"num_envs": 4, "num_steps": 8, "num_threads": 1, "checkpoint_interval": 96}
    settings |= {"checkpoint_barrier": True, "update_epochs": 1, "runs": tmp_path}
    with launch(tmp_path / "driver.py", **settings) as process:
        output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    program = f"torchrun ... ppo_atari.py --resume {tmp_path / 'stopped'}"
    expected = [f"rank 0: Interrupted at step 128; resume with: {program}\n", "rank 1: 0\n"]
    assert [(tmp_path / f"rank{i}.txt").read_text() for i in range(2)] == expected
    assert "Replaying 32 steps" in output and "differ" not in output
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")
    assert ppo.load_checkpoint(tmp_path / "whole")["games"]["actions"].shape == (16, 4)


@pytest.mark.parametrize(
    ("processes", "num_envs", "num_minibatches"), [(3, 4, 2), (8, 4, 1), (2, 2, 32), (4, 8, 64)]
)
def test_processes_that_do_not_divide_the_games(processes, num_envs, num_minibatches, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    message = refusal(train, tmp_path, num_envs=num_envs, num_minibatches=num_minibatches, norm_adv=False)
    assert f"{processes} processes must divide num_envs = {num_envs}" in message
    assert f"num_minibatches = {num_minibatches}" in message and [*tmp_path.iterdir()] == []


# ------------------------------------------------------------------------------------------- short runs


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory) -> Path:
    """A run that nobody changes."""
    return train(tmp_path_factory.mktemp("runs"), **EXACT)


def assert_same_run(run: Path, reference: Path, *, files=("checkpoint.pt",), ignore=()) -> None:
    for name in files:
        states = [ppo.load_checkpoint(x / name) for x in (run, reference)]
        assert checkpoint_difference(*states, ignore=ignore) is None
    assert read_curves(run) == read_curves(reference)


def test_what_is_logged(finished_run):
    assert re.fullmatch(r"ALE-Breakout-v5__ppo_atari__1__\d{8}-\d{6}", finished_run.name)
    saved = json.loads((finished_run / "args.json").read_text())
    assert ppo.Args(**saved) == ppo.Args(**TINY | EXACT | {"runs": str(finished_run.parent)})
    curves, steps = read_curves(finished_run), list(range(32, 257, 32))
    dense = {f"losses/{name}" for name in (*ppo.METRICS, "explained_variance", "epochs")}
    dense |= {"charts/learning_rate"}
    evaluations = {"eval/episodic_return", "eval/episodic_return_std"}
    assert curves.keys() - {"charts/episodic_return", "charts/episodic_length"} == dense | evaluations
    assert all(list(curves[tag]) == steps for tag in dense)
    assert all(list(curves[tag]) == [128, 256] for tag in evaluations)
    rates = [*curves["charts/learning_rate"].values()]
    np.testing.assert_allclose(rates, 2.5e-4 * np.arange(8, 0, -1) / 8, rtol=1e-6)
    assert curves["losses/entropy"][32] == pytest.approx(math.log(4), abs=0.02)
    best = ppo.load_checkpoint(finished_run / "best.pt")
    assert best["best_return"] == max(curves["eval/episodic_return"].values())
    assert {path.name for path in finished_run.iterdir() if "events" not in path.name} == {
        "args.json",
        "checkpoint.pt",
        "checkpoint.previous.pt",
        "best.pt",
    }


def test_killed_run_equals_an_uninterrupted_one(finished_run, tmp_path, capsys):
    """Killed without notice past a checkpoint, at 128 of 256 steps or a little later, then resumed."""
    process = start(SCRIPT, *flags(**TINY | EXACT, runs=tmp_path / "killed"), cwd=tmp_path)
    kill_when(process, nth_evaluation(1), delay=0.05)
    (run,) = (tmp_path / "killed").iterdir()
    assert ppo.load_checkpoint(run)["step"] in (64, 128)
    resume(run)
    printed = capsys.readouterr().out
    assert re.search(r"Resumed at step (64|128)\n", printed) and "anew" not in printed
    assert_same_run(run, finished_run, files=("checkpoint.pt", "best.pt"))


def interrupt(monkeypatch, after: int, with_signal: int | None = None) -> None:
    """Ctrl-C twice in the iteration after so many, or one signal."""
    collect_rollout, left = ppo.collect_rollout, iter(range(after))

    def interrupted(*arguments):
        if next(left, None) is None:
            if not with_signal:
                raise KeyboardInterrupt
            os.kill(os.getpid(), with_signal)
        return collect_rollout(*arguments)

    monkeypatch.setattr(ppo, "collect_rollout", interrupted)


def test_stopped_run_goes_on_by_the_same_command(finished_run, tmp_path, monkeypatch, capsys):
    """SIGTERM and Ctrl-C fall between two barriers; the first comes before the first checkpoint."""
    words = flags(**TINY | EXACT, runs=tmp_path, run_name="mine")
    for after, number, step in ((0, signal.SIGTERM, 32), (1, signal.SIGINT, 96)):
        with monkeypatch.context() as patch:
            interrupt(patch, after, number)
            message = refusal(ppo.main, ppo.parse_args(words))
        assert f"Interrupted at step {step}; resume with: python ppo_atari.py --resume" in message
    ppo.main(ppo.parse_args(words))
    printed = capsys.readouterr().out
    assert printed.count("Replaying 32 steps of the games") == 2 and "anew" not in printed
    assert_same_run(tmp_path / "mine", finished_run, files=("checkpoint.pt", "best.pt"))


def test_checkpoints_by_time_are_exact_too(finished_run, tmp_path, monkeypatch, capsys):
    """Ended at once in its 6th iteration; the fifth is neither at a barrier nor at a multiple of 64 steps."""
    with monkeypatch.context() as patch:
        interrupt(patch, 5)
        message = refusal(train, tmp_path, **EXACT, checkpoint_minutes=1e-9)
    (run,) = tmp_path.iterdir()
    assert f"Ended at once; resume with: python ppo_atari.py --resume {run}" in message
    assert ppo.load_checkpoint(run)["step"] == 160
    resume(run)
    assert "Replaying 32 steps of the games" in capsys.readouterr().out
    assert_same_run(run, finished_run, files=("checkpoint.pt", "best.pt"), ignore=("args",))


def test_games_that_come_out_otherwise_are_not_gone_on_with(tmp_path, monkeypatch, capsys):
    """In the checkpoint, an action of a game is another one; the run starts new games and says so."""
    with monkeypatch.context() as patch:
        interrupt(patch, 0, signal.SIGTERM)
        refusal(train, tmp_path, checkpoint_barrier=True, checkpoint_interval=1000, num_steps=64)
    (run,) = tmp_path.iterdir()
    state = ppo.load_checkpoint(run)
    actions, made = state["games"]["actions"], record_steps(monkeypatch)
    assert actions.shape == (64, 2) and actions.dtype == torch.uint8
    actions[:, 1] = 3 - actions[:, 1]
    ppo.save_checkpoint(run / "checkpoint.pt", state)
    resume(run)
    assert "Replayed games of ALE/Breakout-v5 differ from the saved ones" in capsys.readouterr().out
    torch.set_rng_state(state["generator"])
    fresh = torch.randint(ppo.EVALUATION_SEED, (2,))
    assert made[0].starts[1:] == [state["games"]["seeds"].tolist(), fresh.tolist()]
    assert torch.equal(ppo.load_checkpoint(run)["games"]["seeds"], fresh)


def test_resumed_run_without_a_barrier_has_all_but_the_games(tmp_path, monkeypatch, capsys):
    """Stopped in its 8th iteration, 192 steps have been saved, in which games have ended."""
    monkeypatch.setattr(ppo, "MAX_FRAMES", 100)
    with monkeypatch.context() as patch:
        interrupt(patch, 7)
        message = refusal(train, tmp_path)
    (run,) = tmp_path.iterdir()
    assert f"python ppo_atari.py --resume {run}" in message
    before = ppo.load_checkpoint(run)
    assert before["step"] == 192 and len(before["games"]["last_games"]) == 6
    assert before["games"]["actions"].shape == (0, 2)
    made, make_update = [], ppo.make_update

    def spy(agent, optimizer, args):
        state = {"agent": agent.state_dict(), "optimizer": optimizer.state_dict()}
        made.append(copy.deepcopy(state) | {"generator": torch.get_rng_state()})
        return make_update(agent, optimizer, args)

    monkeypatch.setattr(ppo, "make_update", spy)
    seen, games = spy_on_rollouts(monkeypatch), record_steps(monkeypatch)
    resume(run)
    printed = capsys.readouterr().out
    assert "Resumed at step 192\n" in printed and "The games start anew, since ale-py cannot" in printed
    torch.set_rng_state(before["generator"])
    fresh = torch.randint(ppo.EVALUATION_SEED, (2,)).tolist()
    before["generator"] = torch.get_rng_state()
    assert (
        checkpoint_difference(*({**x, "args": {}} for x in (made[0], {k: before[k] for k in made[0]})))
        is None
    )
    assert not seen[0][0][:, :3].any()  # what was seen before a start is black
    after = ppo.load_checkpoint(run)
    assert after["step"] == 256 and after["elapsed"] > before["elapsed"] > 0
    last_games = [state["games"]["last_games"] for state in (before, after)]
    assert last_games[1][:6] == last_games[0] and len(last_games[1]) > 6
    assert list(read_curves(run)["losses/value_loss"]) == list(range(32, 257, 32))
    # Nor do they start where those of the first iteration have.
    first, again = games[0].starts
    assert again == fresh and not {*first} & {*again}


def test_no_two_starts_have_one_seed(tmp_path, monkeypatch):
    """At the beginning and after each of three barriers, with each --seed; nor is it one of an evaluation."""
    Recorder(monkeypatch)
    made = record_steps(monkeypatch)
    for seed in (1, 2):
        settings = {"num_envs": 3, "num_steps": 2, "total_timesteps": 18, "checkpoint_interval": 6}
        train(tmp_path, seed=seed, checkpoint_barrier=True, **settings)
    assert [len(games.starts) for games in made] == [4, 4]
    seeds = [seed for games in made for start in games.starts for seed in start]
    assert len({*seeds}) == 24 and 0 <= min(seeds) and max(seeds) < ppo.EVALUATION_SEED < 2**31


def test_finished_run_goes_on_with_more_steps(tmp_path, capsys):
    """With a constant learning rate, which knows nothing of the end, it is the longer run from the start."""
    constant = {"anneal_lr": False, "checkpoint_barrier": True, "total_timesteps": 128}
    longer = train(tmp_path / "longer", **constant)
    run = train(tmp_path / "short", **constant | {"total_timesteps": 64})
    resume(run, "--total-timesteps", "128")
    assert_same_run(run, longer)
    assert json.loads((run / "args.json").read_text())["total_timesteps"] == 128
    resume(run)  # there is nothing left to do
    assert "Resumed at step 128" in capsys.readouterr().out
    assert_same_run(run, longer)


def test_checkpoints_evaluations_and_videos_do_not_touch_the_training(tmp_path, monkeypatch):
    pytest.importorskip("moviepy")
    monkeypatch.setattr(ppo, "MAX_FRAMES", 200)
    often = {"checkpoint_interval": 1, "eval_interval": 32, "capture_video": True}
    runs = [train(tmp_path / name, **{"total_timesteps": 64} | x) for name, x in (("a", {}), ("b", often))]
    states = [*map(ppo.load_checkpoint, runs)]
    assert checkpoint_difference(*states, ignore=("args", "best_return")) is None
    videos = {path.name for path in (runs[1] / "videos").glob("*.mp4")}
    assert videos == {"step-32-episode-0.mp4", "step-64-episode-0.mp4"}
    other = train(tmp_path / "other", total_timesteps=32, seed=2)
    assert not torch.equal(
        ppo.load_checkpoint(other)["agent"]["actor.weight"], states[0]["agent"]["actor.weight"]
    )


@pytest.mark.parametrize("file", ["", "best.pt"])
def test_evaluate_prints_mean_and_std(file, finished_run, monkeypatch, capsys):
    monkeypatch.setattr(ppo, "MAX_FRAMES", 300)
    ppo.main(ppo.parse_args(["--evaluate", str(finished_run / file), "--eval-episodes", "2", "--seed", "9"]))
    scores = ppo.evaluate(ppo.Agent.load(finished_run / file), BREAKOUT, 2, 9 + ppo.EVALUATION_SEED)
    expected = f"{BREAKOUT}: {np.mean(scores):.1f} +- {np.std(scores):.1f} over 2 games"
    assert expected in capsys.readouterr().out


def test_resume_keeps_to_the_arguments_of_the_run(finished_run):
    for flag, value in (("--gamma", "0.5"), ("--env-id", PONG), ("--num-envs", "8")):
        message = refusal(ppo.parse_args, ["--resume", str(finished_run), flag, value])
        assert flag[2:].replace("-", "_") in message and value in message
    message = refusal(ppo.parse_args, ["--resume", str(finished_run), "--no-checkpoint-barrier"])
    assert "checkpoint_barrier from True to False" in message
    args = ppo.parse_args(["--resume", str(finished_run), "--total-timesteps", "9999", "--capture-video"])
    assert (args.total_timesteps, args.capture_video, args.num_envs) == (9999, True, 2)
    assert {*ppo.MAY_CHANGE} < {field.name for field in dataclasses.fields(ppo.Args)}


# ------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("env_id", "hint"),
    [
        ("BreakoutNoFrameskip-v4", "did you mean ALE/Breakout-v5"),
        ("ALE/Brekout-v5", "did you mean ALE/Breakout-v5"),
        ("ALE/pong-v5", "did you mean ALE/Pong-v5"),
        ("SpaceInvaders", "did you mean ALE/SpaceInvaders-v5"),
        ("CartPole-v1", "not an Atari game: ppo_discrete.py"),
        ("ALE/Xyzzy-v5", "try ALE/Pong-v5"),
        ("no_such_module:Thing-v0", "try ALE/Pong-v5"),
        ("", "try ALE/Pong-v5"),
        ("Pong-v4", "did you mean ALE/Pong-v5"),
        ("PongDeterministic-v4", "did you mean ALE/Pong-v5"),
    ],
)
def test_unknown_games_are_named(env_id, hint, tmp_path):
    message = refusal(train, tmp_path, env_id=env_id)
    assert f"There is no game {env_id}; " in message and hint in message
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--num-minibatches 7",
            "num_minibatches = 7 must divide the batch of num_envs x num_steps = 8 x 128",
        ),
        ("--num-envs 4 --num-steps 8 --num-minibatches 32", "lower num_minibatches"),
        ("--num-envs 0", "num_envs must lie in [1, inf), got 0"),
        ("--total-timesteps -5", "total_timesteps must lie in [1, inf)"),
        ("--checkpoint-interval 0", "checkpoint_interval must lie in [1, inf)"),
        ("--checkpoint-minutes 0", "checkpoint_minutes must lie in (0, inf)"),
        ("--eval-interval -1", "eval_interval must lie in [0, inf)"),
        ("--num-threads -1", "num_threads must lie in [0, inf)"),
        ("--learning-rate nan", "learning_rate must lie in (0, inf), got nan"),
        ("--learning-rate inf", "learning_rate must lie in (0, inf), got inf"),
        ("--max-grad-norm inf", "max_grad_norm must lie in (0, inf)"),
        ("--repeat-action-probability 1.5", "repeat_action_probability must lie in [0, 1]"),
        ("--gamma nan", "gamma must lie in [0, 1]"),
        ("--clip-coef 0", "clip_coef must lie in (0, inf)"),
        ("--ent-coef nan", "ent_coef must lie in [0, inf)"),
        ("--target-kl 0", "target_kl must lie in (0, inf)"),
        ("--seed -1", "seed must lie in"),
        ("--seed 4294967296", "seed must lie in"),
        ("--resume a --evaluate b", "resume, evaluate and run_name exclude each other"),
        ("--device tpu", "cuda"),
        ("--no-such-flag", "no-such-flag"),
    ],
)
def test_bad_arguments_are_named(words, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        ppo.parse_args(words.split())
    printed = capsys.readouterr().err
    assert stopped.value.code not in (0, None)
    # The command line draws a frame around the sentence and breaks it into lines.
    plain = " ".join(re.sub(r"[^\w\s.,:=\[\]()/*-]", " ", printed + str(stopped.value.code)).split())
    assert message in plain


def test_arguments_at_the_edge_are_fine():
    ppo.Args(ent_coef=0.0, vf_coef=0.0, gamma=1.0, gae_lambda=0.0, seed=2**32 - 1, eval_interval=0)
    assert ppo.Args(num_envs=4, num_steps=8, num_minibatches=32, norm_adv=False).batch_size == 32


def test_defaults_are_those_of_the_paper():
    """Schulman et al. 2017, table 5, at a constant alpha for the clipping range; 40 million frames."""
    args = ppo.Args()
    assert (args.num_envs, args.num_steps, args.update_epochs, args.batch_size // args.num_minibatches) == (
        *(8, 128),
        # Implementations of the authors take 4 epochs, where the paper has 3.
        *(4, 256),
    )
    assert (args.learning_rate, args.gamma, args.gae_lambda, args.clip_coef) == (2.5e-4, 0.99, 0.95, 0.1)
    assert (args.ent_coef, args.total_timesteps * 4) == (0.01, 40_000_000)


def test_loss_that_is_not_finite_ends_the_run(tmp_path, monkeypatch):
    """In the third iteration, of which nothing is saved."""
    surrogate_loss, calls = ppo.surrogate_loss, []

    def poisoned(*arguments):
        calls.append(0)
        return surrogate_loss(*arguments) * (math.nan if len(calls) > 8 else 1)

    monkeypatch.setattr(ppo, "surrogate_loss", poisoned)
    message = refusal(train, tmp_path, checkpoint_interval=1)
    (run,) = tmp_path.iterdir()
    assert "policy_loss is nan at step 96" in message and str(run) in message
    state = ppo.load_checkpoint(run)
    assert state["step"] == 64 and all(tensor.isfinite().all() for tensor in state["agent"].values())


def test_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    save, saved = torch.save, []

    def fail(state, file):
        saved.append(state["step"])
        if len(saved) == 2:
            file.write(b"half of it")
            raise OSError("No space left on device")
        save(state, file)

    monkeypatch.setattr(torch, "save", fail)
    message = refusal(train, tmp_path)
    (run,) = tmp_path.iterdir()
    assert str(run / "checkpoint.pt") in message and "No space left" in message
    assert saved == [64, 128] and ppo.load_checkpoint(run)["step"] == 64
    assert not [*run.glob("*.tmp")]


def test_run_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in refusal(train, tmp_path / "file")


@pytest.mark.parametrize("kind", ["truncated", "empty", "random", "tensor", "of another script", "missing"])
def test_damaged_checkpoint_is_refused(kind, finished_run, tmp_path):
    path = tmp_path / "checkpoint.pt"
    (tmp_path / "args.json").write_text(json.dumps(dataclasses.asdict(ppo.Args(**TINY))))
    if kind == "of another script":
        torch.save({"script": "ppo_discrete", "agent": {}}, path)
    elif kind == "tensor":
        torch.save(torch.zeros(3), path)
    elif kind != "missing":
        good = (finished_run / "checkpoint.pt").read_bytes()
        damaged = {"truncated": good[: len(good) // 2], "empty": b"", "random": bytes(range(256)) * 9}
        path.write_bytes(damaged[kind])
    calls = [lambda: ppo.Agent.load(tmp_path), lambda: ppo.main(ppo.Args(evaluate=str(path)))]
    if kind != "missing":  # otherwise it starts from the beginning
        calls.append(lambda: resume(tmp_path))
    for call in calls:
        message = refusal(call)
        assert str(path) in message
        assert "ppo_atari.py" in message if kind == "of another script" else message


def test_missing_and_foreign_runs_are_named(tmp_path):
    assert str(tmp_path / "nowhere") in refusal(ppo.parse_args, ["--resume", str(tmp_path / "nowhere")])
    for content in ("", "[]", "{", '{"hidden_size": 64}', '{"num_envs": 0}'):
        (tmp_path / "args.json").write_text(content)
        assert str(tmp_path / "args.json") in refusal(ppo.parse_args, ["--resume", str(tmp_path)])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_missing_device_is_named(tmp_path):
    assert "no cuda device" in refusal(train, tmp_path, device="cuda")
    assert [*tmp_path.iterdir()] == []


def test_command_line_fails_without_a_traceback(tmp_path):
    code, output = run_script(SCRIPT, "--num-envs", "4", cwd=tmp_path, WORLD_SIZE="3")
    assert code == 1 and "Traceback" not in output and output.count("\n") == 1
    assert "3 processes must divide num_envs = 4" in output and [*tmp_path.iterdir()] == []


# -------------------------------------------------------------------------------------------- learning


def test_it_learns(tmp_path, monkeypatch):
    """CrazyClimber pays for each row that is climbed; Pong and Breakout show nothing within a minute."""
    seen = spy_on_rollouts(monkeypatch)
    settings = {"env_id": "ALE/CrazyClimber-v5", "num_envs": 4, "num_steps": 64, "num_minibatches": 4}
    settings |= {"update_epochs": 4, "learning_rate": 5e-4, "gamma": 0.95, "anneal_lr": False}
    curves = read_curves(train(tmp_path, **settings, total_timesteps=10 * 256))
    explained = [*curves["losses/explained_variance"].values()]
    rewards = [rollout.rewards.mean().item() for *_, rollout in seen]
    assert np.mean(explained[:3]) < 0.1 and np.mean(explained[-3:]) > 0.25
    assert np.mean(rewards[-3:]) > 2 * np.mean(rewards[:3])
