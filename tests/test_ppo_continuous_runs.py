"""ppo_continuous.py as a user runs it: command line, determinism, kill and resume, bad input, learning.

Its plumbing is that of all scripts, letter for letter (test_shared_blocks.py), and is tested here in full.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import pickle
import random
import re
import resource
import shutil
import signal
import struct
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import stub_environments
import torch
import torch.nn as nn
from helpers import (
    REPOSITORY,
    checkpoint_difference,
    difference,
    read_curves,
    run_script,
    start,
    steps_in_tensorboard,
)

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


@pytest.fixture(autouse=True)
def no_test_waits_for_ever():
    def fail(*_):
        raise TimeoutError("the test has taken too long")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


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
    # The first iteration has no speed, since it may compile the update.
    clock = steps_in_tensorboard(finished_run, wall_clock=True)
    assert clock["charts/SPS"] == steps[1:] and clock["time/elapsed"] == steps
    assert curves["charts/episodic_length"].keys() == curves["charts/episodic_return"].keys() <= {*steps}
    # The first iteration learns at the full rate, the last one at the smallest above zero.
    np.testing.assert_allclose(
        [*curves["charts/learning_rate"].values()], 5e-4 * np.arange(8, 0, -1) / 8, rtol=1e-6
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


def assert_same_run(run: Path, reference: Path, ignore_in_best: tuple[str, ...] = ()) -> None:
    for name, ignore in (("checkpoint.pt", ()), ("best.pt", ignore_in_best)):
        states = [ppo.load_checkpoint(x / name) for x in (run, reference)]
        assert checkpoint_difference(*states, ignore=ignore) is None
    curves, expected = read_curves(run), read_curves(reference)
    assert curves == expected
    # TensorBoard itself shows each step once, in order, and nothing of what was lost.
    assert steps_in_tensorboard(run) == {tag: list(curve) for tag, curve in expected.items()}


def test_killed_run_equals_an_uninterrupted_one(tmp_path):
    """Killed before the first checkpoint, then at two random moments; episodes of Hopper are short."""
    generator = random.Random(2)
    settings = TINY | {"seed": 2, "surrogate": "kl-adaptive", "total_timesteps": 6400}
    settings |= {"checkpoint_interval": 640, "eval_interval": 256}
    reference = train(tmp_path / "reference", **settings)

    runs = tmp_path / "killed"
    kill_when(start(SCRIPT, *flags(**settings, runs=runs), cwd=tmp_path), nth_evaluation(1))
    (run,) = runs.iterdir()
    assert not (run / "checkpoint.pt").exists()
    for _ in range(2):
        process = start(SCRIPT, "--resume", run, cwd=tmp_path)
        kill_when(process, nth_evaluation(generator.randint(2, 5)), delay=generator.uniform(0, 0.1))
    assert 0 < ppo.load_checkpoint(run)["step"] < 6400
    ppo.main(ppo.parse_args(["--resume", str(run)]))
    assert_same_run(run, reference)


def test_killed_run_equals_an_uninterrupted_one_compiled(tmp_path):
    """The default way; each part is compiled in a process of its own. HalfCheetah has a time limit."""
    settings = TINY | {"env_id": "HalfCheetah-v5", "num_steps": 64, "compile": True, "eval_episodes": 1}
    settings |= {"total_timesteps": 6400, "checkpoint_interval": 768, "eval_interval": 1024}
    reference = train(tmp_path / "reference", **settings)
    process = start(SCRIPT, *flags(**settings, runs=tmp_path / "killed"), cwd=tmp_path)
    kill_when(process, nth_evaluation(3), 0.05)
    (run,) = (tmp_path / "killed").iterdir()
    assert 0 < ppo.load_checkpoint(run)["step"] < 6400
    code, output = run_script(SCRIPT, "--resume", run, cwd=tmp_path)
    assert code == 0 and "Resumed at step" in output, output
    assert_same_run(run, reference)
    assert len(read_curves(run)["charts/episodic_return"]) > 3  # time limits were met


REPLAYED = "NoisySeeded Opaque OwnGenerator Stacked GlobalReset Levels".split()


@pytest.mark.parametrize("name", ["Pendulum-v1", *(f"Stub/{name}-v0" for name in REPLAYED)])
def test_resumed_run_equals_an_uninterrupted_one_in_every_kind_of_environment(name, tmp_path, capsys):
    """An object that cannot be saved, a generator of its own, a stateful wrapper, np.random at the reset."""
    settings = {"env_id": name, "total_timesteps": 640, "eval_interval": 256, "checkpoint_interval": 128}
    reference = train(tmp_path / "reference", **settings)
    stopped = stop_in_iteration(3, tmp_path / "stopped", signal.SIGTERM, **settings)
    assert ppo.load_checkpoint(stopped)["step"] == 384
    ppo.main(ppo.parse_args(["--resume", str(stopped)]))
    assert "differ" not in capsys.readouterr().out
    assert_same_run(stopped, reference)


def test_environment_that_does_not_repeat_begins_new_episodes(tmp_path, capsys):
    run = stop_in_iteration(3, tmp_path, signal.SIGTERM, env_id="Stub/GlobalStep-v0")
    capsys.readouterr()
    ppo.main(ppo.parse_args(["--resume", str(run)]))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "new ones begin" in line]
    assert "Stub/GlobalStep-v0" in line
    assert ppo.load_checkpoint(run)["step"] == 1024


# ------------------------------------------------------------------------------- signals and preemption


def interrupt_in(calls: dict[int, int], monkeypatch) -> None:
    """Sends this process the signal calls[n] in the n-th rollout, before it is played."""
    collect_rollout, count = ppo.collect_rollout, iter(range(1, 10**6))

    def collect(*arguments):
        if number := calls.get(next(count)):
            os.kill(os.getpid(), number)
        return collect_rollout(*arguments)

    monkeypatch.setattr(ppo, "collect_rollout", collect)


def stop_in_iteration(n: int, folder: Path, number: int, **changes) -> Path:
    """A run that gets a signal in its n-th iteration, ends after it, and says how to go on."""
    handlers = [signal.getsignal(x) for x in (signal.SIGINT, signal.SIGTERM)]
    with pytest.MonkeyPatch.context() as monkeypatch:
        interrupt_in({n: number}, monkeypatch)
        message = refusal(train, folder, **changes)
    (run,) = [path for path in folder.iterdir() if path.is_dir()]
    assert f"python ppo_continuous.py --resume {run}" in message
    assert f"step {n * TINY['num_envs'] * TINY['num_steps']}" in message
    assert [signal.getsignal(x) for x in (signal.SIGINT, signal.SIGTERM)] == handlers
    return run


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_signal_ends_the_run_after_its_iteration_with_a_checkpoint(number, finished_run, tmp_path, capfd):
    """Long before the first checkpoint is due."""
    run = stop_in_iteration(2, tmp_path, number, checkpoint_interval=10**9)
    assert "after this iteration" in capfd.readouterr().err
    assert ppo.load_checkpoint(run)["step"] == 256
    ppo.main(ppo.parse_args(["--resume", str(run)]))
    assert "Resumed at step 256" in capfd.readouterr().out
    states = ppo.load_checkpoint(run), ppo.load_checkpoint(finished_run)
    assert states[0]["args"].pop("checkpoint_interval") != states[1]["args"].pop("checkpoint_interval")
    assert checkpoint_difference(*states) is None
    assert read_curves(run) == read_curves(finished_run)


def test_signal_before_the_first_iteration(finished_run, tmp_path, monkeypatch, capsys):
    evaluate = ppo.evaluate
    with monkeypatch.context() as patch:
        patch.setattr(ppo, "evaluate", lambda *x: (os.kill(os.getpid(), signal.SIGTERM), evaluate(*x))[1])
        message = refusal(train, tmp_path)
    (run,) = tmp_path.iterdir()
    assert "step 0" in message and ppo.load_checkpoint(run)["step"] == 0
    ppo.main(ppo.parse_args(["--resume", str(run)]))
    assert_same_run(run, finished_run)


def test_signal_in_the_last_iteration_changes_nothing(finished_run, tmp_path, monkeypatch):
    interrupt_in({8: signal.SIGTERM}, monkeypatch)
    assert_same_run(train(tmp_path), finished_run)


@pytest.mark.parametrize(
    ("first", "last"), [([signal.SIGINT], signal.SIGINT), ([signal.SIGTERM] * 2, signal.SIGINT)]
)
def test_second_ctrl_c_ends_at_once_and_a_second_sigterm_does_not(first, last, tmp_path, monkeypatch):
    survived = []

    def collect(*_):
        for number in (*first, last):
            os.kill(os.getpid(), number)
            survived.append(number)

    monkeypatch.setattr(ppo, "collect_rollout", collect)
    message = refusal(train, tmp_path)
    (run,) = tmp_path.iterdir()
    assert "at once" in message and f"--resume {run}" in message
    assert survived == first and not (run / "checkpoint.pt").exists()


def test_same_command_survives_a_requeue(finished_run, tmp_path):
    """As a scheduler does it: start, SIGTERM, the same command again, and once more when all is done."""
    command = [SCRIPT, *flags(**TINY, runs=tmp_path, run_name="queued")]
    process = start(*command, cwd=tmp_path)
    next(line for line in process.stdout if "evaluation" in line)
    process.terminate()
    output, _ = process.communicate(timeout=60)
    step = ppo.load_checkpoint(tmp_path / "queued")["step"]
    assert process.returncode == 1 and "Traceback" not in output and step < 1024, output
    ppo.main(ppo.parse_args(command[1:]))
    assert_same_run(tmp_path / "queued", finished_run)
    ppo.main(ppo.parse_args(command[1:]))
    assert_same_run(tmp_path / "queued", finished_run)
    message = refusal(ppo.parse_args, [*command[1:], "--gamma", "0.5"])
    assert "gamma" in message and "0.5" in message  # the name is taken by a run with other flags
    (tmp_path / "file").touch()
    assert "file" in refusal(train, tmp_path, run_name="file")


def test_checkpoints_are_due_by_time_too(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(ppo, "save_checkpoint", lambda path, state: saved.append(state["step"]))
    settings = {"eval_interval": 0, "checkpoint_interval": 10**9, "total_timesteps": 512}
    train(tmp_path / "often", **settings, checkpoint_minutes=1e-9)
    train(tmp_path / "seldom", **settings, checkpoint_minutes=60)
    assert saved == [128, 256, 384, 512, 512]


def test_best_policies_do_not_postpone_the_checkpoint(tmp_path, monkeypatch):
    """Every evaluation is the best one so far, and by the clock of the test each iteration takes minutes."""
    saved, clock, score = [], itertools.count(0, 60), itertools.count()
    monkeypatch.setattr(ppo, "save_checkpoint", lambda path, state: saved.append((path.name, state["step"])))
    monkeypatch.setattr(ppo.Run, "evaluate", lambda run: next(score))
    monkeypatch.setattr(ppo.time, "perf_counter", lambda: next(clock))
    train(tmp_path, eval_interval=128, checkpoint_interval=10**9, checkpoint_minutes=10)
    assert [step for name, step in saved if name == "best.pt"] == [*range(128, 1025, 128)]
    assert len([step for name, step in saved if name == "checkpoint.pt"]) > 2


def test_too_few_steps_are_refused(finished_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    before = (run / "args.json").read_bytes()
    message = refusal(lambda: ppo.main(ppo.parse_args(["--resume", str(run), "--total-timesteps", "64"])))
    assert "1,024" in message and "total-timesteps" in message
    assert (run / "args.json").read_bytes() == before


def test_run_without_a_checkpoint_says_that_it_begins_anew(finished_run, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(finished_run / "args.json", run)
    ppo.main(ppo.parse_args(["--resume", str(run)]))
    assert "begins anew" in capsys.readouterr().out
    assert_same_run(run, finished_run)


def test_checkpoint_file_in_place_of_a_run_is_refused(finished_run):
    """Only a directory can be gone on with."""
    checkpoint = str(finished_run / "checkpoint.pt")
    assert checkpoint in refusal(lambda: ppo.main(ppo.parse_args(["--resume", checkpoint])))


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
    assert_same_run(run, longer, ignore_in_best=("args",))  # the best one may be of before
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


@pytest.fixture
def copied_run(finished_run, tmp_path) -> Path:
    """A run that a test may damage."""
    return Path(shutil.copytree(finished_run, tmp_path / "runs" / "copied"))


def resume(run: Path, *words: str) -> Path:
    return ppo.main(ppo.parse_args(["--resume", str(run), *words]))


def test_no_flipped_bit_loads_other_numbers(finished_run, tmp_path):
    """200 random ones. Some lie between the records, where they mean nothing."""
    generator, path = random.Random(0), tmp_path / "checkpoint.pt"
    good, expected = (finished_run / "checkpoint.pt").read_bytes(), ppo.load_checkpoint(finished_run)
    refused = 0
    for _ in range(200):
        damaged = bytearray(good)
        damaged[generator.randrange(len(good))] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        try:
            state = ppo.load_checkpoint(path)
        except SystemExit as error:
            assert str(path) in str(error)
            refused += 1
        else:
            assert difference(state, expected) is None
    assert refused > 100


def test_checkpoint_before_is_kept_and_taken(finished_run, copied_run, capsys):
    """A run that is damaged at its end goes on from half way, and ends as it would have."""
    newest, previous = copied_run / "checkpoint.pt", copied_run / "checkpoint.previous.pt"
    assert ppo.load_checkpoint(previous)["step"] == 512
    before, content = previous.read_bytes(), bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    for damaged in (content, None):  # None: the machine died between the two renames
        previous.write_bytes(before)
        newest.write_bytes(damaged or b"")
        if damaged is None:
            newest.unlink()
        capsys.readouterr()
        assert ppo.load_checkpoint(copied_run)["step"] == 512
        (line,) = capsys.readouterr().out.splitlines()
        assert "checkpoint.previous.pt" in line
        # It takes the place of the damaged one, which the next checkpoint would else rename over it.
        assert newest.read_bytes() == before and not previous.exists()
    resume(copied_run)
    assert "Resumed at step 512" in capsys.readouterr().out
    assert_same_run(copied_run, finished_run)
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        (copied_run / name).write_bytes(b"")
    assert "checkpoint.previous.pt" in refusal(ppo.load_checkpoint, copied_run)


def rewrite(run: Path, **changes) -> None:
    """Changes what the checkpoint holds, with valid checksums."""
    torch.save(ppo.load_checkpoint(run) | changes, run / "checkpoint.pt")


def test_checkpoint_of_another_version_is_refused(copied_run):
    rewrite(copied_run, format=ppo.FORMAT + 1)
    message = refusal(resume, copied_run)
    assert f"format {ppo.FORMAT + 1}" in message and str(ppo.FORMAT) in message
    state = ppo.load_checkpoint(copied_run / "checkpoint.previous.pt")
    del state["format"]  # as those of the first release
    torch.save(state, copied_run / "checkpoint.pt")
    assert "format None" in refusal(resume, copied_run)


@pytest.mark.parametrize("content", ["", "[]", "{", "3", '{"num_envs": 0}'])
def test_damaged_arguments(content, tmp_path):
    (tmp_path / "args.json").write_text(content)
    assert "args.json" in refusal(ppo.parse_args, ["--resume", str(tmp_path)])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gamma", None),
        ("gamma", "0.99"),
        ("gamma", math.nan),
        ("num_envs", 4.0),
        ("num_envs", True),
        ("num_envs", 0),
        ("num_envs", [4]),
        ("compile", "no"),
        ("compile", 0),
        ("surrogate", "foo"),
        ("env_id", 3),
        ("target_kl", "None"),
        ("no_such_flag", 1),
        ("num_minibatches", 7),
    ],
    ids=str,
)
def test_field_that_does_not_fit_is_named(name, value, copied_run):
    path = copied_run / "args.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {name: value}))
    for flag in ("--resume", "--evaluate"):
        assert name in refusal(ppo.parse_args, [flag, str(copied_run)])


def test_missing_field_is_named(copied_run):
    path = copied_run / "args.json"
    values = json.loads(path.read_text())
    del values["gamma"]  # today's default must not fill it
    path.write_text(json.dumps(values))
    assert "gamma" in refusal(ppo.parse_args, ["--resume", str(copied_run)])


def test_arguments_are_compared_with_those_of_the_checkpoint(copied_run):
    path = copied_run / "args.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"gamma": 0.5}))
    for flag in ("--resume", "--evaluate"):
        message = refusal(lambda flag=flag: ppo.main(ppo.parse_args([flag, str(copied_run)])))
        assert "gamma" in message and "0.5" in message and "0.99" in message
    assert json.loads(path.read_text())["gamma"] == 0.5


PAYLOAD = "from pathlib import Path\nPath(__file__).with_name('touched').touch()\n"


@pytest.mark.parametrize("where", ["args.json", "checkpoint.pt", "both"])
def test_no_module_that_a_file_names_is_imported(where, tmp_path, monkeypatch):
    """A run directory that was received, with a module inside, and its name where the environment stands."""
    monkeypatch.syspath_prepend(str(tmp_path))
    settings = {"env_id": "Pendulum-v1", "total_timesteps": 128, "eval_episodes": 1}
    run = train(tmp_path / "runs", **settings, run_name=f"received_{where[:4]}")
    (run / "payload.py").write_text(PAYLOAD)
    env_id = f"runs.{run.name}.payload:Pendulum-v1"
    values = json.loads((run / "args.json").read_text())
    if where != "checkpoint.pt":
        (run / "args.json").write_text(json.dumps(values | {"env_id": env_id}))
    if where != "args.json":
        rewrite(run, args=values | {"env_id": env_id})
    more, confirmed = ["--total-timesteps", "256"], ["--env-id", env_id]
    calls = [["--resume", str(run)], ["--resume", str(run), *more]]
    calls += [["--run-name", run.name, "--runs", str(run.parent)]]
    calls += [["--evaluate", str(run)]] if where != "checkpoint.pt" else []
    calls += [["--evaluate", str(run / "checkpoint.pt")]] if where != "args.json" else []
    for words in calls:
        assert "--env-id" in refusal(ppo.parse_args, words) if where != "checkpoint.pt" else True
        refusal(lambda words=words: ppo.main(ppo.parse_args(words)))
    ppo.Agent.load(run)
    assert not (run / "touched").exists() and not any(run.name in name for name in sys.modules)
    if where != "both":  # the two files contradict each other
        refusal(lambda: ppo.main(ppo.parse_args(["--resume", str(run), *more, *confirmed])))
    else:
        ppo.main(ppo.parse_args(["--resume", str(run), *more, *confirmed]))
        assert (run / "touched").exists() and ppo.load_checkpoint(run)["step"] == 256
        ppo.main(ppo.parse_args(["--evaluate", str(run), *confirmed]))


# ----------------------------------------------------------------------------------------------- full disk


@pytest.mark.parametrize(
    "error", [OSError("No space left on device"), RuntimeError("unexpected pos 64 vs 0")]
)
def test_full_disk_leaves_the_checkpoint_before(error, tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    ppo.save_checkpoint(path, {"step": 1})
    before = path.read_bytes()

    def fail(state, file):
        file.write(b"half of it")
        raise error

    monkeypatch.setattr(torch, "save", fail)
    assert str(path) in refusal(ppo.save_checkpoint, path, {"step": 2})
    assert path.read_bytes() == before and [*tmp_path.iterdir()] == [path]


def test_checkpoint_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    done, path = [], tmp_path / "checkpoint.pt"
    for name in ("fsync", "replace"):
        call = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *x, name=name, call=call: (done.append(name), call(*x)))
    ppo.save_checkpoint(path, {"step": 1})
    ppo.save_checkpoint(path, {"step": 2})
    assert done == ["fsync", "replace", "fsync", "replace", "replace"]
    assert ppo.load_checkpoint(path)["step"] == 2
    assert ppo.load_checkpoint(tmp_path / "checkpoint.previous.pt")["step"] == 1


@contextlib.contextmanager
def full_disk(size: int):
    """No file can grow beyond `size` bytes. Only around a call: pytest may be writing to a file as well."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of TensorBoard's writer
@pytest.mark.parametrize(
    ("size", "file", "settings"),
    [
        (100, "args.json", {}),
        (4000, "", {"eval_interval": 0, "total_timesteps": 12_800, "checkpoint_interval": 10**9}),
        (40_000, "best.pt", {}),
        (40_000, "checkpoint.pt", {"eval_interval": 0}),
    ],
    ids=["args.json", "event file", "best.pt", "checkpoint.pt"],
)
def test_full_disk_ends_with_a_sentence(size, file, settings, tmp_path):
    with full_disk(size):
        message = refusal(train, tmp_path, **settings)
    (run,) = tmp_path.iterdir()
    assert str(run / file) in message and "disk" in message
    left = {path.name.split(".tfevents")[0] for path in run.iterdir()}
    assert left == ({"args.json", "events.out"} if size > 100 else set())


def test_full_disk_loses_nothing(finished_run, tmp_path):
    """The disk is full at some checkpoint; with room again, the run goes on as if nothing had happened."""
    run = stop_in_iteration(5, tmp_path, signal.SIGTERM)
    with full_disk(40_000):
        assert "disk" in refusal(resume, run)
    assert ppo.load_checkpoint(run)["step"] == 640
    resume(run)
    assert_same_run(run, finished_run)


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--num-minibatches 7", "num_minibatches = 7 must divide"),
        ("--num-envs 4 --num-steps 8 --num-minibatches 32 --norm-adv", "lower num_minibatches"),
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
        ("--resume a --evaluate b", "exclude each other"),
        ("--resume a --run-name b", "exclude each other"),
        ("--checkpoint-minutes 0", "checkpoint_minutes"),
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
        ("a:b:c", "a:b:c"),
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
    assert state["step"] == 128
    assert all(tensor.isfinite().all() for name, tensor in state["agent"].items() if "action" not in name)


@pytest.mark.parametrize(
    "words",
    [
        ["--env-id", "NoSuchEnvironment-v0"],
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
    expected = f"Hopper-v5: {np.mean(returns):.1f} +- {np.std(returns):.1f} over 3 episodes"
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


def test_environment_of_the_user(tmp_path, monkeypatch, capsys):
    """A module of theirs on the path, as small as Gymnasium allows: its constructor takes nothing."""
    (tmp_path / "my_environments.py").write_text(USER_MODULE)
    settings = TINY | {"env_id": "my_environments:Target-v0", "runs": tmp_path / "runs"}
    code, output = run_script(SCRIPT, *flags(**settings), cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert code == 0, output
    (run,) = (tmp_path / "runs").iterdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    env_id = ["--env-id", "my_environments:Target-v0"]  # to be named again: it is a module that is imported
    ppo.main(ppo.parse_args(["--evaluate", str(run), *env_id]))
    output = capsys.readouterr().out
    assert "Target-v0" in output and "over 2 episodes" in output


@pytest.mark.parametrize("where", ["__init__", "reset", "step"])
def test_error_in_the_environment_of_the_user_keeps_its_traceback(where, tmp_path, capsys, monkeypatch):
    """In the constructor before there is a run; later, after a sentence that says how to go on."""
    monkeypatch.setattr(stub_environments.Failing, "where", where)
    monkeypatch.setattr(stub_environments.Failing, "calls_left", 30)
    with pytest.raises(TypeError, match=f"mistake in {where}") as raised:
        train(tmp_path, env_id="Stub/Failing-v0")
    assert ", in fail" in "".join(traceback.format_exception(raised.value))  # the line of the user
    printed = capsys.readouterr()
    if where == "__init__":
        assert [*tmp_path.iterdir()] == []
    else:
        (run,) = tmp_path.iterdir()
        assert f"--resume {run}" in printed.out + printed.err


def test_dict_observations_and_matrix_actions(tmp_path):
    """The environment itself checks that its actions are (2, 2) and within its space."""
    run = train(tmp_path, env_id="Stub/Matrix-v0")
    agent = ppo.Agent.load(run)
    assert agent.observation_statistics.mean.shape == (2 * 2 + 2,) and agent.log_std.shape == (4,)
    assert agent.action_low.tolist() == [-3] * 4 and agent.action_high.tolist() == [1] * 4
    ppo.main(ppo.parse_args(["--resume", str(run), "--total-timesteps", "1280"]))
    assert ppo.load_checkpoint(run)["step"] == 1280


# ---------------------------------------------------------------------------------------- what is optimised


def change_in_iteration(monkeypatch, change) -> None:
    """As if `train` began each iteration with a line of the reader's own: change(args, progress)."""
    iterations = ppo.Run.iterations

    def changed(run, batch_size):
        for progress in iterations(run, batch_size):
            change(run.args, progress)
            yield progress

    monkeypatch.setattr(ppo.Run, "iterations", changed)


# What this environment shows does not depend on the actions, so that rounding errors stay small.
COMPILED = {"env_id": "Stub/NoisySeeded-v0", "compile": True, "eval_interval": 0, "ent_coef": 0.01}
COMPILED |= {"total_timesteps": 10 * 128}


def test_scheduled_coefficients_do_not_compile_the_update_again(tmp_path, monkeypatch, capsys):
    """And they take effect: the run without a compiler comes to the same, one without a schedule does not."""

    def schedule(args, progress):
        args.ent_coef = 0.01 * (1 - progress)
        args.clip_coef = 0.2 - 0.15 * progress
        args.vf_coef = 0.5 + progress
        args.learning_rate = 1e-3 * (1 - progress) ** 2

    def weights(folder: str, **changes) -> torch.Tensor:
        agent = ppo.Agent.load(train(tmp_path / folder, **COMPILED | changes))
        return nn.utils.parameters_to_vector(agent.parameters()).detach()

    constant = weights("constant", compile=False)
    capsys.readouterr()
    change_in_iteration(monkeypatch, schedule)
    compiled = weights("compiled")
    (run,) = (tmp_path / "compiled").iterdir()
    assert ppo.load_checkpoint(run)["args"]["ent_coef"] == 0.01  # with which the run can be gone on with
    printed = capsys.readouterr().out
    if "does not work here" in printed:
        pytest.skip("no compiler")
    assert printed.count("Compiling the update") == 1 and "again" not in printed
    eager = weights("eager", compile=False)
    assert (compiled - eager).abs().max() < 1e-5 < (compiled - constant).abs().max() / 100


def test_number_that_is_compiled_in_and_changes_is_reported_once(tmp_path, monkeypatch, capsys):
    change_in_iteration(monkeypatch, lambda args, progress: setattr(args, "max_grad_norm", 0.5 + progress))
    # Compilation itself is left out: it is how often it is asked for that counts.
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda graph, *_, **__: graph.forward)
    train(tmp_path, **COMPILED)
    printed = capsys.readouterr().out
    if "does not work here" in printed:
        pytest.skip("no compiler")
    assert printed.count("Compiling the update") == 1
    assert printed.count("compiled again and again") == 1


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
    np.testing.assert_allclose([*curves["charts/learning_rate"].values()], 5e-4, rtol=1e-6)


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
    """MuJoCo would write a warning about HalfCheetah to a file. The terminal knows ASCII only."""
    settings = flags(**TINY | {"env_id": "HalfCheetah-v5"})
    code, output = run_script(SCRIPT, *settings, cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert code == 0 and "warn" not in output.lower(), output
    assert "steps/s" in output and "+-" in output
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    (run,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"HalfCheetah-v5__ppo_continuous__1__\d{8}-\d{6}", run.name)
    files = sorted(path.name.split(".tfevents")[0] for path in run.iterdir())
    assert files == ["args.json", "best.pt", "checkpoint.previous.pt", "checkpoint.pt", "events.out"]


def test_two_runs_in_one_second(tmp_path, monkeypatch):
    times = iter(["20260101-000000"] * 3 + ["20260101-000001"])
    monkeypatch.setattr(time, "strftime", lambda *_: next(times))
    runs = [train(tmp_path, total_timesteps=128, eval_interval=0) for _ in range(2)]
    assert [run.name[-15:] for run in runs] == ["20260101-000000", "20260101-000001"]


def test_output_that_nobody_reads(tmp_path):
    """As with `| head -1`: no traceback, and not a word about a broken pipe."""
    process = start(SCRIPT, *flags(**TINY | {"total_timesteps": 10**6}), cwd=tmp_path, merge=False)
    assert "Run directory" in process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == 1
    assert "Traceback" not in errors and "Broken" not in errors and "reads the output" in errors, errors


def test_run_in_a_thread(tmp_path):
    """Signals can be handled in the main thread only; a run elsewhere does without."""
    with ThreadPoolExecutor(1) as executor:
        run = executor.submit(train, tmp_path, total_timesteps=128, eval_interval=0).result()
    assert ppo.load_checkpoint(run)["step"] == 128


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_videos_in_a_folder_that_cannot_be_written(copied_run):
    copied_run.chmod(0o500)
    try:
        words = ["--evaluate", str(copied_run), "--capture-video"]
        assert "videos" in refusal(lambda: ppo.main(ppo.parse_args(words)))
    finally:
        copied_run.chmod(0o700)


def test_videos_where_a_file_is_in_the_way(tmp_path):
    run = train(tmp_path, env_id="Pendulum-v1", total_timesteps=128, eval_interval=0)
    (run / "videos").touch()
    words = ["--evaluate", str(run), "--capture-video"]
    assert "videos" in refusal(lambda: ppo.main(ppo.parse_args(words)))


def test_weights_and_biases_offline(tmp_path):
    pytest.importorskip("wandb")
    settings = TINY | {"runs": tmp_path / "runs", "track": True, "total_timesteps": 512}
    code, output = run_script(
        SCRIPT, *flags(**settings), cwd=tmp_path, WANDB_MODE="offline", WANDB_SILENT="true"
    )
    assert code == 0, output
    (run,) = (tmp_path / "runs").glob("Hopper*")
    (log,) = (tmp_path / "runs").glob("wandb/offline-run-*/*.wandb")
    assert run.name in str(log) and not [*run.glob("**/*wandb*")]
    assert [path.parent for path in (tmp_path / "runs").glob("**/*tfevents*")] == [run]  # no ghost runs
    rows = wandb_history(log)
    curves = read_curves(run)
    # One row per iteration and one for the evaluation before the first; nothing twice.
    assert [row["_step"] for row in rows] == [0, 128, 256, 384, 512]
    for tag, curve in curves.items():
        assert {row["_step"]: pytest.approx(row[tag]) for row in rows if tag in row} == curve


def wandb_history(path: Path) -> list[dict]:
    """The rows of the history in the file of an offline run: records in a log of LevelDB's format."""
    from wandb.proto import wandb_internal_pb2

    content, record, rows, place = path.read_bytes(), b"", [], 7  # after the header of the file
    while place < len(content):
        if 32768 - place % 32768 < 7:  # a block ends with zeros where no header of a chunk fits
            place += 32768 - place % 32768
            continue
        size, kind = struct.unpack_from("<4xHB", content, place)
        record += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # a whole record, or the last chunk of one
            message = wandb_internal_pb2.Record.FromString(record)
            items = message.history.item if message.WhichOneof("record_type") == "history" else []
            rows += (
                [{x.key or ".".join(x.nested_key): json.loads(x.value_json) for x in items}] if items else []
            )
            record = b""
    return rows
