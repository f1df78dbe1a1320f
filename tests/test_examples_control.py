"""examples/own_environment.py and examples/own_network.py, as their docstrings say to use them."""

import importlib
import shlex
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from helpers import REPOSITORY, checkpoint_difference, read_curves, run_script

import ppo_continuous as ppo
from examples import own_environment

ENVIRONMENT = "examples.own_environment:Boat-v0"
SMALL = {"num_envs": 8, "num_steps": 64, "num_minibatches": 4, "compile": False, "eval_episodes": 2}
SMALL |= {"eval_interval": 0, "total_timesteps": 2048}


def docstring_commands(name: str) -> list[list[str]]:
    lines = (REPOSITORY / "examples" / name).read_text().split('"""')[1].splitlines()
    return [shlex.split(line) for line in lines if line.strip().startswith("python ")]


def test_environment_keeps_to_gymnasiums_rules():
    check_env(gym.make("Boat-v0", render_mode="rgb_array").unwrapped)


def test_boat_moves_as_its_physics_say():
    boat = own_environment.Boat()
    start = boat.reset(seed=3)[0]
    assert np.array_equal(start, boat.reset(seed=3)[0]) and not np.array_equal(start, boat.reset(seed=4)[0])
    boat.reset(seed=3)
    ahead, aside = boat.position.copy(), []
    for _ in range(60):  # full thrust to the right, until it is lost
        observation, reward, terminated, truncated, _ = boat.step(np.array([1.0, 0.0], np.float32))
        aside.append(observation[3])
        assert not truncated and np.allclose(observation[:2], -boat.position)
        distance = np.hypot(*boat.position)
        assert terminated == (distance > 3)
        assert reward == pytest.approx(1 - distance / 3 - 0.01)
        if terminated:
            break
    assert terminated and boat.position[0] > ahead[0] + 1 and np.abs(aside).max() < 0.3


def test_boat_is_learned(tmp_path):
    """Hardly moving is worth about 75, seeds 1, 2 and 3 come to 92, and the best possible is below 100."""
    settings = SMALL | {"env_id": ENVIRONMENT, "total_timesteps": 20_480, "learning_rate": 1e-3}
    settings |= {"eval_interval": 10**6, "eval_episodes": 10, "update_epochs": 10}
    evaluations = read_curves(ppo.main(ppo.Args(**settings, runs=str(tmp_path))))["eval/episodic_return"]
    assert evaluations[0] < 82 and evaluations[20_480] > 88


def test_commands_of_the_environment(tmp_path):
    """In processes of their own: training, then the evaluation with a video."""
    train, evaluate = docstring_commands("own_environment.py")
    assert train[1:4] == ["ppo_continuous.py", "--env-id", ENVIRONMENT] and evaluate[4:6] == train[2:4]
    shortened = "--total-timesteps 512 --num-steps 16 --eval-episodes 2 --no-compile --runs".split()
    code, output = run_script(*train[1:], *shortened, tmp_path, cwd=tmp_path)
    assert code == 0, output
    (run,) = tmp_path.iterdir()
    pytest.importorskip("moviepy")
    ppo.main(ppo.parse_args(["--evaluate", str(run), *evaluate[4:], "--eval-episodes", "2"]))
    assert len([*(run / "videos").glob("*.mp4")]) == 1


def test_boat_resumes_bit_for_bit(tmp_path):
    settings = SMALL | {"env_id": ENVIRONMENT, "anneal_lr": False}
    whole = ppo.main(ppo.Args(**settings, runs=str(tmp_path / "whole")))
    half = ppo.main(ppo.Args(**settings | {"total_timesteps": 1024, "runs": str(tmp_path / "half")}))
    words = ["--resume", str(half), "--env-id", ENVIRONMENT, "--total-timesteps", "2048"]
    ppo.main(ppo.parse_args(words))
    assert checkpoint_difference(ppo.load_checkpoint(whole), ppo.load_checkpoint(half)) is None


@pytest.fixture
def own_network(monkeypatch):
    """The module, whose import replaces the agent of ppo_continuous.py; it is put back."""
    monkeypatch.setattr(ppo, "Agent", ppo.Agent)
    monkeypatch.delitem(sys.modules, "examples.own_network", raising=False)
    yield importlib.import_module("examples.own_network")
    sys.modules.pop("examples.own_network")


def test_network_is_trained_evaluated_and_resumed(own_network, tmp_path, capsys):
    settings = SMALL | {"env_id": "Pendulum-v1", "total_timesteps": 512, "runs": str(tmp_path)}
    run = ppo.main(ppo.Args(**settings))
    ppo.main(ppo.parse_args(["--resume", str(run), "--total-timesteps", "1024"]))
    ppo.main(ppo.parse_args(["--evaluate", str(run)]))
    assert "over 2 episodes" in capsys.readouterr().out
    agent = own_network.Agent.load(run)
    kinds = [type(layer).__name__ for layer in agent.actor]
    assert kinds == ["Linear", "LayerNorm", "SiLU"] * 2 + ["Linear"] and agent.actor[0].out_features == 256
    torch.manual_seed(1)
    start = own_network.Agent(3, [-2.0], [2.0])
    assert all(not torch.equal(x, y) for x, y in zip(agent.actor.parameters(), start.actor.parameters()))
    observations = torch.randn(100, 3)
    assert start.actor(observations).abs().max() < 0.1 < start.value(observations).abs().max()
    expected = agent.actor(observations.clamp(-10, 10)).detach()
    agent.observation_statistics = ppo.RunningStatistics((3,))
    policy = ppo.FrozenPolicy(agent)
    np.testing.assert_allclose(policy.mean_action(observations.numpy()), expected, rtol=0, atol=1e-6)


def test_networks_of_the_script_are_there_again():
    assert (
        ppo.Agent.__module__ == "ppo_continuous" and ppo.Agent(3, [-1.0], [1.0]).actor[0].out_features == 64
    )


def test_command_of_the_network(tmp_path):
    """It is a module, started from the folder of the scripts."""
    train, _ = docstring_commands("own_network.py")
    words = (
        train
        + f"--total-timesteps 512 --num-steps 16 --eval-episodes 1 --no-compile --runs {tmp_path}".split()
    )
    result = subprocess.run([sys.executable, *words[1:]], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (run,) = Path(tmp_path).iterdir()
    assert "Hopper-v5__own_network__1__" in run.name
    assert ppo.load_checkpoint(run)["agent"]["actor.0.weight"].shape == (256, 11)
