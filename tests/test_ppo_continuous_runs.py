"""ppo_continuous.py as a user runs it: command line, determinism, kill and resume, bad input, learning."""

import dataclasses
import json
import math
import pickle
import random
import re
import signal
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import stub_environments  # noqa: F401 (registers its environments)
import torch
from helpers import REPOSITORY, checkpoint_difference, read_curves, run_script, start
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ppo_continuous as ppo

SCRIPT = "ppo_continuous.py"
TINY = {"env_id": "Hopper-v5", "num_envs": 4, "num_steps": 32, "num_minibatches": 4, "update_epochs": 2}
TINY |= {"compile": False, "total_timesteps": 1024, "checkpoint_interval": 512, "eval_interval": 512}
TINY |= {"eval_episodes": 2}


def train(folder: Path, **changes) -> Path:
    return ppo.main(ppo.Args(**TINY | {"runs": str(folder)} | changes))


def flags(**settings) -> list[str]:
    """The same settings as a command line."""
    words = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        words += (
            [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
        )
    return words


def refusal(call, *args, **kwargs) -> str:
    """The one sentence with which a call ends the program; the exit code of a sentence is 1."""
    with pytest.raises(SystemExit) as stopped:
        call(*args, **kwargs)
    assert isinstance(stopped.value.code, str) and "\n" not in stopped.value.code.strip()
    return stopped.value.code


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory) -> Path:
    """A run that nobody changes."""
    return train(tmp_path_factory.mktemp("runs"))


# ------------------------------------------------------------------------------------------ determinism


def test_equal_seeds_give_equal_runs_and_others_do_not(finished_run, tmp_path):
    again, other = train(tmp_path / "again"), train(tmp_path / "other", seed=2)
    for name in ("checkpoint.pt", "best.pt"):
        one, two = ppo.load_checkpoint(finished_run / name), ppo.load_checkpoint(again / name)
        assert checkpoint_difference(one, two) is None
    assert read_curves(finished_run) == read_curves(again)
    weights = [ppo.load_checkpoint(run)["agent"]["actor.0.weight"] for run in (again, other)]
    assert not torch.equal(*weights)
    assert read_curves(other)["losses/value_loss"] != read_curves(again)["losses/value_loss"]


@pytest.mark.parametrize(
    "changes",
    [{"checkpoint_interval": 1}, {"checkpoint_interval": 10**9}, {"eval_interval": 0}, {"eval_interval": 1}],
    ids=lambda changes: "-".join(map(str, *changes.items())),
)
def test_checkpoints_and_evaluations_do_not_touch_the_training(finished_run, tmp_path, changes):
    run = train(tmp_path, **changes)
    states = ppo.load_checkpoint(finished_run), ppo.load_checkpoint(run)
    assert checkpoint_difference(*states, ignore=("args", "best_return")) is None
    curves = [
        {tag: curve for tag, curve in read_curves(x).items() if not tag.startswith("eval/")}
        for x in (finished_run, run)
    ]
    assert curves[0] == curves[1]


def test_what_is_logged(finished_run):
    curves = read_curves(finished_run)
    steps = list(range(128, 1025, 128))
    for name in (*ppo.METRICS, "kl", "explained_variance", "epochs"):
        assert list(curves[f"losses/{name}"]) == steps
    for name in ("learning_rate", "kl_coef", "action_std"):
        assert list(curves[f"charts/{name}"]) == steps
    assert list(curves["eval/episodic_return"]) == [0, 512, 1024]
    assert curves["charts/episodic_length"].keys() == curves["charts/episodic_return"].keys() <= {*steps}
    # The first iteration learns at the full rate, the last one at the smallest above zero.
    np.testing.assert_allclose(
        [*curves["charts/learning_rate"].values()], 3e-4 * np.arange(8, 0, -1) / 8, rtol=1e-6
    )
    agent = ppo.Agent.load(finished_run)
    assert curves["losses/entropy"][1024] == pytest.approx(
        (agent.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum().item(), abs=2e-3
    )
    best = max(curves["eval/episodic_return"][step] for step in (512, 1024))
    assert ppo.load_checkpoint(finished_run / "best.pt")["best_return"] == pytest.approx(best, rel=1e-6)


# ---------------------------------------------------------------------------------------- kill and resume


def kill_when(process, seen, delay: float = 0.0) -> None:
    """SIGKILL `delay` seconds after `seen(line)` holds for a line of output; the process must be at work."""
    output = []
    for line in process.stdout:
        output.append(line)
        if seen(line):
            break
    time.sleep(delay)
    assert process.poll() is None, "ended before it could be killed:\n" + "".join(output)
    process.kill()
    process.stdout.close()
    assert process.wait(timeout=60) == -signal.SIGKILL


def nth_evaluation(n: int):
    """True at the n-th line that reports an evaluation."""
    left = iter(range(n - 1, -1, -1))
    return lambda line: "evaluation" in line and next(left) == 0


def assert_same_run(run: Path, reference: Path) -> None:
    for name in ("checkpoint.pt", "best.pt"):
        states = [ppo.load_checkpoint(x / name) for x in (run, reference)]
        assert checkpoint_difference(*states) is None
    curves, expected = read_curves(run), read_curves(reference)
    assert curves == expected
    # TensorBoard itself shows each step once, in order, and nothing of what was lost.
    accumulator = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    for tag, curve in expected.items():
        assert [event.step for event in accumulator.Scalars(tag)] == list(curve)


@pytest.mark.parametrize(("seed", "surrogate"), [(1, "clip"), (2, "kl-adaptive")])
def test_killed_run_equals_an_uninterrupted_one(seed, surrogate, tmp_path):
    """Killed before the first checkpoint, then at three random moments; episodes of Hopper are short."""
    generator = random.Random(seed)
    settings = TINY | {"seed": seed, "surrogate": surrogate, "total_timesteps": 6400}
    settings |= {"checkpoint_interval": 640, "eval_interval": 256}
    reference = train(tmp_path / "reference", **settings)

    runs = tmp_path / "killed"
    kill_when(start(SCRIPT, *flags(**settings, runs=runs), cwd=tmp_path), nth_evaluation(1))
    (run,) = runs.iterdir()
    assert not (run / "checkpoint.pt").exists()
    for _ in range(3):
        process = start(SCRIPT, "--resume", run, cwd=tmp_path)
        kill_when(process, nth_evaluation(generator.randint(2, 5)), delay=generator.uniform(0, 0.1))
    assert 0 < ppo.load_checkpoint(run)["iteration"] < 50
    code, output = run_script(SCRIPT, "--resume", run, cwd=tmp_path)
    assert code == 0 and "Resumed at step" in output, output
    assert_same_run(run, reference)


def test_killed_run_equals_an_uninterrupted_one_compiled(tmp_path):
    """The default way, in fresh processes; HalfCheetah's episodes end by their time limit."""
    settings = TINY | {"env_id": "HalfCheetah-v5", "num_steps": 64, "compile": True, "eval_episodes": 1}
    settings |= {"total_timesteps": 6400, "checkpoint_interval": 768, "eval_interval": 1024}
    code, output = run_script(SCRIPT, *flags(**settings, runs=tmp_path / "reference"), cwd=tmp_path)
    assert code == 0, output
    (reference,) = (tmp_path / "reference").iterdir()

    kill_when(
        start(SCRIPT, *flags(**settings, runs=tmp_path / "killed"), cwd=tmp_path), nth_evaluation(3), 0.05
    )
    (run,) = (tmp_path / "killed").iterdir()
    assert 0 < ppo.load_checkpoint(run)["iteration"] < 25
    code, output = run_script(SCRIPT, "--resume", run, cwd=tmp_path)
    assert code == 0 and "Resumed at step" in output, output
    assert_same_run(run, reference)
    assert len(read_curves(run)["charts/episodic_return"]) > 3  # time limits were met


def test_interrupted_run_says_how_to_go_on(tmp_path):
    process = start(SCRIPT, *flags(**TINY | {"total_timesteps": 10**6}, runs="runs"), cwd=tmp_path)
    seen = nth_evaluation(3)
    next(line for line in process.stdout if seen(line))
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    (run,) = (tmp_path / "runs").iterdir()
    assert process.returncode == 1 and "Traceback" not in output
    assert f"--resume runs/{run.name}" in output
    assert ppo.load_checkpoint(run)["iteration"] >= 4


def test_finished_run_is_left_as_it_is(tmp_path, capsys):
    run = train(tmp_path)
    before, curves = ppo.load_checkpoint(run), read_curves(run)
    ppo.main(ppo.parse_args(["--resume", str(run)]))
    assert "1,024" in capsys.readouterr().out.split("Resumed")[-1]
    assert checkpoint_difference(before, ppo.load_checkpoint(run)) is None
    assert read_curves(run) == curves


def test_finished_run_goes_on_with_more_steps(tmp_path):
    """With a constant learning rate, which knows nothing of the end, it is the longer run from the start."""
    constant = {"anneal_lr": False, "eval_interval": 256, "surrogate": "kl-adaptive"}
    longer = train(tmp_path / "longer", **constant, total_timesteps=2048)
    run = train(tmp_path / "short", **constant)
    ppo.main(ppo.parse_args(["--resume", str(run), "--total-timesteps", "2048"]))
    assert_same_run(run, longer)
    assert json.loads((run / "args.json").read_text())["total_timesteps"] == 2048


def test_resume_keeps_to_the_arguments_of_the_run(finished_run):
    args = ppo.parse_args(["--resume", str(finished_run)])
    expected = ppo.Args(**TINY | {"runs": str(finished_run.parent), "resume": str(finished_run)})
    assert args == expected
    for flag, value in (("--gamma", "0.5"), ("--seed", "7"), ("--env-id", "Ant-v5"), ("--num-envs", "8")):
        message = refusal(ppo.parse_args, ["--resume", str(finished_run), flag, value])
        assert flag[2:].replace("-", "_") in message and value in message
    args = ppo.parse_args(["--resume", str(finished_run), "--total-timesteps", "9999", "--capture-video"])
    assert (args.total_timesteps, args.capture_video, args.num_envs) == (9999, True, TINY["num_envs"])
    assert {*ppo.MAY_CHANGE} < {field.name for field in dataclasses.fields(ppo.Args)}


def test_environment_whose_state_cannot_be_read_starts_anew(tmp_path, capsys):
    run = train(tmp_path, env_id="Stub/Opaque-v0")
    ppo.main(ppo.parse_args(["--resume", str(run), "--total-timesteps", "1536"]))
    assert "cannot be saved" in capsys.readouterr().out
    assert ppo.load_checkpoint(run)["iteration"] == 12


# -------------------------------------------------------------------------------------- damaged checkpoints


class Evil:
    """Unpickling this creates a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def damage(kind: str, good: bytes, path: Path) -> None:
    if kind == "malicious":
        torch.save({"script": "ppo_continuous", "agent": Evil(path.parent / "touched")}, path)
    elif kind == "malicious pickle":
        path.write_bytes(pickle.dumps(Evil(path.parent / "touched"), protocol=2))
    elif kind == "of another script":
        torch.save({"script": "ppo_discrete", "agent": {}}, path)
    elif kind == "a tensor":
        torch.save(torch.zeros(3), path)
    else:
        parts = {
            "random": random.Random(0).randbytes(5000),
            "truncated": good[: len(good) // 2],
            "empty": b"",
        }
        path.write_bytes(parts[kind])


@pytest.mark.parametrize(
    "kind",
    ["random", "truncated", "empty", "a tensor", "of another script", "malicious", "malicious pickle"],
)
def test_damaged_checkpoint_is_refused(kind, finished_run, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "args.json").write_text(json.dumps(dataclasses.asdict(ppo.Args(**TINY))))
    damage(kind, (finished_run / "checkpoint.pt").read_bytes(), run / "checkpoint.pt")
    before = (run / "checkpoint.pt").read_bytes()
    for call in (
        lambda: ppo.main(ppo.parse_args(["--resume", str(run)])),
        lambda: ppo.main(ppo.parse_args(["--evaluate", str(run)])),
        lambda: ppo.Agent.load(run),
    ):
        message = refusal(call)
        assert str(run / "checkpoint.pt") in message
        assert "ppo_continuous.py" in message if kind == "of another script" else message
    assert not (run / "touched").exists()
    assert (run / "checkpoint.pt").read_bytes() == before


def test_damage_really_is_harmful(tmp_path):
    """What the test above relies on: loaded without care, the file does run code."""
    for kind in ("malicious", "malicious pickle"):
        damage(kind, b"", tmp_path / "checkpoint.pt")
        if kind == "malicious":
            torch.load(tmp_path / "checkpoint.pt", weights_only=False)
        else:
            pickle.loads((tmp_path / "checkpoint.pt").read_bytes())
        (tmp_path / "touched").unlink()


@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
def test_missing_run(flag, tmp_path):
    message = refusal(lambda: ppo.main(ppo.parse_args([flag, str(tmp_path / "nowhere")])))
    assert str(tmp_path / "nowhere") in message


@pytest.mark.parametrize("content", ["", "[]", "{", '{"no_such_flag": 1}', '{"num_envs": 0}'])
def test_damaged_arguments(content, tmp_path):
    (tmp_path / "args.json").write_text(content)
    assert "args.json" in refusal(ppo.parse_args, ["--resume", str(tmp_path)])


@pytest.mark.parametrize(
    "error", [OSError("No space left on device"), RuntimeError("unexpected pos 64 vs 0")]
)
def test_full_disk_leaves_the_checkpoint_before(error, tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    ppo.save_checkpoint(path, {"iteration": 1})
    before = path.read_bytes()

    def fail(state, file):
        Path(file).write_bytes(b"half of it")
        raise error

    monkeypatch.setattr(torch, "save", fail)
    assert str(path) in refusal(ppo.save_checkpoint, path, {"iteration": 2})
    assert path.read_bytes() == before and [*tmp_path.iterdir()] == [path]


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--num-minibatches 7", "num_minibatches = 7 must divide"),
        ("--num-envs 4 --num-steps 8 --num-minibatches 32", "lower num_minibatches"),
        ("--num-envs 0", "num_envs"),
        ("--total-timesteps -5", "total_timesteps"),
        ("--learning-rate -1", "learning_rate"),
        ("--learning-rate nan", "learning_rate"),
        ("--clip-coef 0", "clip_coef"),
        ("--gamma 1.01", "gamma must lie in [0, 1]"),
        ("--gae-lambda -0.1", "gae_lambda must lie in [0, 1]"),
        ("--target-kl -1", "target_kl"),
        ("--target-kl 0", "target_kl"),
        ("--vf-coef -1", "vf_coef"),
        ("--ent-coef nan", "ent_coef"),
        ("--seed -1", "seed"),
        ("--eval-episodes 0", "eval_episodes"),
        ("--resume a --evaluate b", "resume and evaluate exclude each other"),
        ("--surrogate trust-me", "kl-adaptive"),
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


def test_minibatches_of_one_are_fine_without_normalisation():
    assert ppo.Args(num_envs=4, num_steps=8, num_minibatches=32, norm_adv=False).batch_size == 32


@pytest.mark.parametrize(
    ("env_id", "message"),
    [
        ("NoSuchEnvironment-v0", "NoSuchEnvironment"),
        ("no_such_module:Thing-v0", "no_such_module"),
        ("CartPole-v1", "ppo_discrete.py"),
        ("", "environment"),
    ],
)
def test_bad_environments_are_named(env_id, message, tmp_path):
    assert message in refusal(train, tmp_path, env_id=env_id)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_missing_device_is_named(tmp_path):
    assert "no cuda device" in refusal(train, tmp_path, device="cuda")


def test_rewards_that_are_not_finite_end_the_run(tmp_path):
    """From the 41st step of each environment on, in the second iteration of 4 x 32 steps."""
    message = refusal(train, tmp_path, env_id="Stub/Poisoned-v0", checkpoint_interval=1)
    assert "nan" in message and "256" in message
    (run,) = tmp_path.iterdir()
    state = ppo.load_checkpoint(run)
    assert state["iteration"] == 1
    assert all(tensor.isfinite().all() for name, tensor in state["agent"].items() if "action" not in name)


@pytest.mark.parametrize(
    "words",
    [
        ["--env-id", "NoSuchEnvironment-v0"],
        ["--num-minibatches", "7"],
        ["--evaluate", "nowhere"],
        ["--resume", "nowhere"],
    ],
    ids=lambda words: words[0],
)
def test_command_line_fails_without_a_traceback(words, tmp_path):
    code, output = run_script(SCRIPT, *words, cwd=tmp_path)
    assert code != 0 and "Traceback" not in output and words[1] in output
    assert len(output) < 1000


# -------------------------------------------------------------------------- evaluation, videos, environments


@pytest.mark.parametrize("file", ["", "best.pt"])
def test_evaluate_prints_mean_and_std(file, finished_run, capsys):
    ppo.main(ppo.parse_args(["--evaluate", str(finished_run / file), "--eval-episodes", "3", "--seed", "9"]))
    returns = ppo.evaluate(ppo.Agent.load(finished_run / file), "Hopper-v5", 3, 9 + ppo.EVALUATION_SEED)
    expected = f"Hopper-v5: {np.mean(returns):.1f} ± {np.std(returns):.1f} over 3 episodes"
    assert expected in capsys.readouterr().out


def test_loaded_agent_is_the_one_that_was_trained(finished_run):
    agent, curves = ppo.Agent.load(finished_run), read_curves(finished_run)
    returns = ppo.evaluate(agent, "Hopper-v5", 2, 1 + ppo.EVALUATION_SEED)
    assert returns.mean() == pytest.approx(curves["eval/episodic_return"][1024], rel=1e-6)
    assert not torch.equal(agent.action_low, agent.action_high)


def test_videos(tmp_path):
    pytest.importorskip("moviepy")
    pytest.importorskip("imageio_ffmpeg")
    settings = {"env_id": "Pendulum-v1", "capture_video": True, "eval_episodes": 1, "eval_interval": 10**9}
    run = train(tmp_path, **settings, total_timesteps=128)
    ppo.main(ppo.parse_args(["--evaluate", str(run), "--eval-episodes", "1", "--capture-video"]))
    videos = {path.name: path.read_bytes() for path in (run / "videos").iterdir() if path.suffix == ".mp4"}
    names = {"step-0-episode-0.mp4", "step-128-episode-0.mp4", "evaluation-episode-0.mp4"}
    assert videos.keys() == names
    assert all(video[4:8] == b"ftyp" and len(video) > 5000 for video in videos.values())


def test_video_does_not_touch_the_training(tmp_path):
    pytest.importorskip("moviepy")
    runs = [
        train(
            tmp_path / str(video),
            env_id="Pendulum-v1",
            capture_video=video,
            total_timesteps=256,
            eval_episodes=1,
        )
        for video in (True, False)
    ]
    assert checkpoint_difference(*map(ppo.load_checkpoint, runs), ignore=("args",)) is None


def test_environment_that_draws_nothing_is_named(tmp_path):
    assert "Stub/Coded-v0" in refusal(train, tmp_path, env_id="Stub/Coded-v0", capture_video=True)


USER_MODULE = """
import gymnasium as gym
import numpy as np


class Target(gym.Env):
    observation_space = gym.spaces.Box(-1, 1, (2,))
    action_space = gym.spaces.Box(-1, 1, (2,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.target = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        return self.target, {}

    def step(self, action):
        return self.target, -float(np.abs(action - self.target).sum()), True, False, {}


gym.register("Target-v0", Target)
"""


def test_environment_of_the_user(tmp_path):
    """A module of theirs on the path, as small as Gymnasium allows: its constructor takes nothing."""
    (tmp_path / "my_environments.py").write_text(USER_MODULE)
    settings = TINY | {"env_id": "my_environments:Target-v0", "runs": tmp_path / "runs"}
    code, output = run_script(SCRIPT, *flags(**settings), cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert code == 0, output
    (run,) = (tmp_path / "runs").iterdir()
    code, output = run_script(SCRIPT, "--evaluate", run, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert code == 0 and "Target-v0" in output and "over 10 episodes" in output


def test_dict_observations_and_matrix_actions(tmp_path):
    """The environment itself checks that its actions are (2, 2) and within its space."""
    run = train(tmp_path, env_id="Stub/Matrix-v0")
    agent = ppo.Agent.load(run)
    assert agent.observation_statistics.mean.shape == (2 * 2 + 2,) and agent.log_std.shape == (4,)
    assert agent.action_low.tolist() == [-3] * 4 and agent.action_high.tolist() == [1] * 4
    ppo.main(ppo.parse_args(["--resume", str(run), "--total-timesteps", "1280"]))
    assert ppo.load_checkpoint(run)["iteration"] == 10


# ---------------------------------------------------------------------------------------- what is optimised


@pytest.mark.parametrize("surrogate", ["clip", "kl-fixed", "kl-adaptive", "none"])
def test_every_surrogate_trains(surrogate, tmp_path):
    run = train(tmp_path, surrogate=surrogate, eval_interval=0, total_timesteps=384)
    curves = read_curves(run)
    assert all(math.isfinite(x) for curve in curves.values() for x in curve.values())
    assert (len({*curves["charts/kl_coef"].values()}) > 1) == (surrogate == "kl-adaptive")


def test_adaptive_coefficient_follows_the_rule(tmp_path):
    """Schulman et al. 2017, section 4: halved where KL < target / 1.5, doubled where KL > 1.5 target."""
    changes = set()
    for learning_rate in (1e-5, 3e-4, 1e-2):
        settings = {
            "surrogate": "kl-adaptive",
            "adaptive_kl_target": 0.002,
            "kl_coef": 3.0,
            "target_kl": None,
        }
        settings |= {"eval_interval": 0, "learning_rate": learning_rate, "anneal_lr": False}
        curves = read_curves(train(tmp_path / str(learning_rate), **settings, total_timesteps=1280))
        beta = 3.0
        for kl, logged in zip(curves["losses/kl"].values(), curves["charts/kl_coef"].values(), strict=True):
            factor = 0.5 if kl < 0.002 / 1.5 else 2.0 if kl > 0.002 * 1.5 else 1.0
            beta *= factor
            changes.add(factor)
            assert logged == beta
    assert changes == {0.5, 1.0, 2.0}  # all three happened


def test_target_kl_ends_the_epochs(tmp_path):
    settings = {"eval_interval": 0, "update_epochs": 5, "total_timesteps": 384}
    for target_kl, epochs in ((1e-9, 1), (1e9, 5), (None, 5)):
        curves = read_curves(train(tmp_path / str(target_kl), **settings, target_kl=target_kl))
        assert {*curves["losses/epochs"].values()} == {epochs}


def test_constant_learning_rate(tmp_path):
    curves = read_curves(train(tmp_path, anneal_lr=False, eval_interval=0, total_timesteps=384))
    np.testing.assert_allclose([*curves["charts/learning_rate"].values()], 3e-4, rtol=1e-6)


def random_return(env_id: str, episodes: int) -> float:
    """Mean return of actions drawn uniformly."""
    env = gym.make(env_id)
    env.action_space.seed(0)
    total = 0.0
    for episode in range(episodes):
        env.reset(seed=episode)
        done = False
        while not done:
            _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
            total, done = total + reward, terminated or truncated
    return total / episodes


def test_it_learns(tmp_path):
    """The most that can be had is 1000, and seeds 1, 2 and 3 have it by 16384 steps."""
    settings = {"env_id": "InvertedPendulum-v5", "num_envs": 8, "num_steps": 128, "num_minibatches": 8}
    settings |= {"update_epochs": 10, "learning_rate": 1e-3, "total_timesteps": 24_576, "eval_episodes": 10}
    run = train(tmp_path, **settings, eval_interval=10**9, checkpoint_interval=10**9)
    curves = read_curves(run)
    assert random_return("InvertedPendulum-v5", 20) < 20
    assert curves["eval/episodic_return"][0] < 50 and curves["eval/episodic_return"][24_576] > 900
    assert (
        curves["charts/episodic_return"][24_576] > 100
    )  # the mean of all the last 100 episodes, noise and all


# -------------------------------------------------------------------------------------------------- the rest


def test_help_lists_every_flag(tmp_path):
    code, output = run_script(SCRIPT, "--help", cwd=tmp_path, COLUMNS="200")
    assert code == 0
    for field in dataclasses.fields(ppo.Args):
        assert f"--{field.name.replace('_', '-')}" in output
    assert [*tmp_path.iterdir()] == []


IMPORT = """
import random
import numpy, torch

def look():
    generators = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    return generators, torch.get_num_threads(), torch.get_default_dtype(), numpy.geterr()

before = look()
import ppo_continuous
print(look() == before)
"""


def test_import_has_no_side_effect(tmp_path):
    (tmp_path / "look.py").write_text(IMPORT)
    code, output = run_script(str(tmp_path / "look.py"), cwd=tmp_path, PYTHONPATH=str(REPOSITORY))
    assert (code, output) == (0, "True\n")
    assert [path.name for path in tmp_path.iterdir()] == ["look.py"]


def test_a_run_leaves_nothing_but_its_directory(tmp_path):
    """HalfCheetah is the task of which MuJoCo would write a warning to a file."""
    code, output = run_script(SCRIPT, *flags(**TINY | {"env_id": "HalfCheetah-v5"}), cwd=tmp_path)
    assert code == 0 and "warn" not in output.lower(), output
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    (run,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"HalfCheetah-v5__ppo_continuous__1__\d{8}-\d{6}", run.name)
    files = sorted(path.name.split(".tfevents")[0] for path in run.iterdir())
    assert files == ["args.json", "best.pt", "checkpoint.pt", "events.out"]


def test_run_directory_that_is_there_already(tmp_path, monkeypatch):
    """Two starts within a second."""
    monkeypatch.setattr(time, "strftime", lambda *_: "20260101-000000")
    train(tmp_path, total_timesteps=128, eval_interval=0)
    assert "run directory" in refusal(train, tmp_path, total_timesteps=128, eval_interval=0)


def test_weights_and_biases_offline(tmp_path):
    pytest.importorskip("wandb")
    settings = TINY | {"runs": tmp_path / "runs", "track": True, "total_timesteps": 256}
    code, output = run_script(
        SCRIPT, *flags(**settings), cwd=tmp_path, WANDB_MODE="offline", WANDB_SILENT="true"
    )
    assert code == 0, output
    (run,) = (tmp_path / "runs").iterdir()
    (log,) = run.glob("wandb/offline-run-*/*.wandb")
    content = log.read_bytes()
    assert b"losses/policy_loss" in content and b"eval/episodic_return" in content
