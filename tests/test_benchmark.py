"""The benchmark harness: reading what was logged, statistics, running what is missing, tables and figures."""

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import scipy
import torch
from matplotlib.figure import Figure
from PIL import Image
from scipy.stats import trim_mean
from torch.utils.tensorboard import SummaryWriter

from benchmark import ablated, frontier, gpu, overoptimization, speed
from benchmark.events import make_curve, read_curve, read_scalars, write_curve
from benchmark.figures import COLORS, draw_run, save
from benchmark.manifest import available_cores
from benchmark.report import reference_ratio, write_report
from benchmark.results import bootstrap_interval, interquartile_mean, summarize
from benchmark.runs import list_jobs, run_jobs
from benchmark.suites import ELAPSED, EVALUATION, SUITES, TRAINING, Reference, Task, find_suite

REPOSITORY = Path(__file__).resolve().parent.parent

# Makes a run directory as the scripts do; --fail ends it after the checkpoint, as long as it is not resumed.
FAKE_SCRIPT = """
import argparse, json, pathlib, sys
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

parser = argparse.ArgumentParser()
for flag in ("--env-id", "--exp-name", "--runs", "--run-name"):
    parser.add_argument(flag)
parser.add_argument("--seed", type=int)
parser.add_argument("--total-timesteps", type=int)
parser.add_argument("--fail", action="store_true")
args = parser.parse_args()
run = pathlib.Path(args.runs, args.run_name or "run")
resumed = run.exists()
run.mkdir(exist_ok=True)
(run / "args.json").write_text(json.dumps(vars(args)))
if args.fail and not resumed:
    sys.exit("the simulator fell over")
writer = EventFileWriter(str(run))
for step in range(0, 1001, 100):
    for tag, value in {
        "charts/episodic_return": step / 10, "eval/episodic_return": step / 5, "charts/SPS": 7
    }.items():
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
        writer.add_event(Event(step=step, wall_time=step, summary=summary))
writer.close()
"""


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = tmp_path / "fake.py"
    path.write_text(FAKE_SCRIPT)
    return str(path)


def write_scalars(folder: Path, tag: str, points: dict[int, float], suffix: str) -> None:
    writer = SummaryWriter(str(folder), filename_suffix=suffix)
    for step, value in points.items():
        writer.add_scalar(tag, value, step)
    writer.close()


def test_the_later_file_of_a_resumed_run_holds(tmp_path: Path) -> None:
    write_scalars(tmp_path, TRAINING, {step: 1.0 for step in range(5000)}, "")
    write_scalars(tmp_path, TRAINING, {step: 2.0 for step in range(4000, 6000)}, "")
    first, second = sorted(tmp_path.iterdir(), key=lambda path: path.stat().st_size, reverse=True)
    first.rename(tmp_path / "events.out.tfevents.1000000000.host.1.0")
    second.rename(tmp_path / "events.out.tfevents.1000000100.host.1.0")
    steps, values, wall_times = read_scalars(tmp_path)[TRAINING]
    assert steps.tolist() == list(range(6000))  # whole: the accumulator of TensorBoard would give a sample
    assert values.tolist() == [1.0] * 4000 + [2.0] * 2000
    assert len(wall_times) == 6000


def test_an_event_file_cut_short_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    write_scalars(tmp_path, TRAINING, {step: 1.0 for step in range(100)}, "")
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-7])
    assert read_scalars(tmp_path)[TRAINING].steps.tolist() == list(range(99))


def test_no_event_files_gives_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no TensorBoard event files"):
        read_scalars(tmp_path)


def test_thinning_keeps_evaluations_and_the_ends(tmp_path: Path) -> None:
    write_scalars(tmp_path, TRAINING, {step: step / 3 for step in range(7, 5001, 7)}, "")
    write_scalars(tmp_path, EVALUATION, {0: -1.5, 7 * 123: 123456.7, 7 * 714: 3.0}, "_evaluation")
    curve = make_curve(read_scalars(tmp_path), (TRAINING, EVALUATION, ELAPSED), keep=EVALUATION)
    assert 100 <= len(curve["step"]) <= 103
    assert curve["step"][[0, -1]].tolist() == [0, 4998]
    evaluated = ~np.isnan(curve[EVALUATION])
    assert curve["step"][evaluated].tolist() == [0, 7 * 123, 7 * 714]
    assert np.isnan(curve[TRAINING][0]) and np.isnan(curve[ELAPSED]).all()

    write_curve(tmp_path / "curve.csv", curve)
    lines = (tmp_path / "curve.csv").read_text().splitlines()
    assert lines[:2] == [f"step,{TRAINING},{EVALUATION},{ELAPSED}", "0,,-1.5,"]
    assert lines[-1] == "4998,1666,3,"
    for name, column in read_curve(tmp_path / "curve.csv").items():
        np.testing.assert_allclose(column, curve[name], rtol=1e-4)


def test_interquartile_mean() -> None:
    assert interquartile_mean(np.array([100.0, 1, 2, 3, 4, 5, 6, -100])) == pytest.approx(3.5)
    scores = np.random.default_rng(1).normal(size=(4, 9))
    np.testing.assert_allclose(interquartile_mean(scores, axis=1), trim_mean(scores, 0.25, axis=1))


def test_bootstrap_interval() -> None:
    scores = np.random.default_rng(2).normal(size=400)
    low, high = bootstrap_interval([scores], np.mean)
    standard_error = scores.std() / 20
    assert low == pytest.approx(scores.mean() - 1.96 * standard_error, abs=0.2 * standard_error)
    assert high == pytest.approx(scores.mean() + 1.96 * standard_error, abs=0.2 * standard_error)
    # Two seeds, 0 and 1: the resampled mean is 0, 1/2 or 1 with probability 1/4, 1/2, 1/4.
    assert bootstrap_interval([np.array([0.0, 1.0])], np.mean) == (0.0, 1.0)
    # Stratified: groups that do not vary leave no variation, however far apart they are.
    assert bootstrap_interval([np.zeros(3), np.ones(3)], np.mean) == (0.5, 0.5)
    low, high = bootstrap_interval([np.random.default_rng(3).normal(size=(5, 7))], interquartile_mean)
    assert low.shape == high.shape == (7,) and (low < high).all()


def test_better_than_the_reference_is_more_than_one() -> None:
    np.testing.assert_allclose(reference_ratio(np.array([50.0, 200.0]), 100), [0.5, 2])
    np.testing.assert_allclose(reference_ratio(np.array([-8.0, -2.0]), -4), [0.5, 2])
    np.testing.assert_allclose(
        reference_ratio(np.array([700.0]), 100), [2]
    )  # one task cannot make up for many


def test_suites_give_commands_that_a_user_would_type() -> None:
    assert SUITES["smoke"][0].arguments(3) == (
        "ppo_continuous.py --env-id Pendulum-v1 --seed 3 --total-timesteps 4096".split()
    )
    variant = Task("reinforce.py", "ALE/Pong-v5", 10, ("--estimator", "baseline"), label="reinforce_baseline")
    assert " ".join(variant.arguments(1)).endswith("10 --exp-name reinforce_baseline --estimator baseline")
    assert variant.folder == Path("reinforce_baseline/ALE-Pong-v5")
    name, tasks = find_suite("mujoco", 1000)
    assert name == "mujoco-1000" and {task.total_timesteps for task in tasks} == {1000}
    name, tasks = find_suite("atari", preset="fast")
    assert name == "atari-fast" and all("--num-envs" in task.flags for task in tasks)


def test_unknown_suite_gives_a_sentence() -> None:
    with pytest.raises(SystemExit, match="There is no suite 'mojoco'; there are mujoco, "):
        find_suite("mojoco")


def test_run_skips_what_is_there_survives_a_failure_and_resumes(script: str, tmp_path: Path, capsys) -> None:
    tasks = [Task(script, "Good-v0", 1000), Task(script, "Bad-v0", 1000, flags=("--fail",))]
    jobs = list_jobs("suite", tasks, 1, tmp_path / "results", tmp_path / "runs")
    ((failed, problem),) = run_jobs(jobs, parallel=2)
    assert failed.task.environment == "Bad-v0" and problem == "exit code 1"
    assert "the simulator fell over" in failed.log.read_text()
    assert "Good-v0 seed 1 after 0:0" in capsys.readouterr().out

    good = tmp_path / "results" / "suite" / "fake" / "Good-v0"
    assert sorted(path.name for path in good.iterdir()) == ["seed1.csv", "seed1.json"]
    manifest = json.loads((good / "seed1.json").read_text())
    assert manifest["command"] == f"python {script} --env-id Good-v0 --seed 1 --total-timesteps 1000"
    assert manifest["final"] == {"step": 1000, TRAINING: 100, EVALUATION: 200}
    assert manifest["packages"]["numpy"] == np.__version__ and not manifest["resumed"]

    written = (good / "seed1.csv").stat().st_mtime_ns
    assert run_jobs(jobs, parallel=1) == []  # the fake script does not fail when it is resumed
    output = capsys.readouterr().out
    assert (
        "1 of 2 runs are there" in output and "resume fake Bad-v0 seed 1" in output and "Good" not in output
    )
    assert (good / "seed1.csv").stat().st_mtime_ns == written


def test_threads_are_shared_out(script: str, tmp_path: Path) -> None:
    tasks = [Task(script, "One-v0", 1000), Task(script, "All-v0", 1000, multithreaded=True)]
    jobs = list_jobs("suite", tasks, 1, tmp_path / "results", tmp_path / "runs")
    assert run_jobs(jobs, parallel=1) == []
    threads = [json.loads(job.manifest.read_text())["threads"] for job in jobs]
    assert threads == [1, len(available_cores())]


def test_interrupt_ends_the_runs_and_says_how_to_go_on(tmp_path: Path, monkeypatch) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    script = tmp_path / "slow.py"
    script.write_text("import time; time.sleep(600)")
    jobs = list_jobs(
        "suite", [Task(str(script), "Slow-v0", 1000)], 2, tmp_path / "results", tmp_path / "runs"
    )
    monkeypatch.setattr("benchmark.runs.time.sleep", interrupt)
    with pytest.raises(SystemExit, match="The same command goes on"):
        run_jobs(
            jobs, parallel=2
        )  # waits for the processes, so it would take 10 minutes if it did not end them


def test_speed_from_the_times_of_the_events(script: str, tmp_path: Path, monkeypatch) -> None:
    programs = {"ours": [script], "raw": [script], "sb3": ["missing.py"]}
    monkeypatch.setattr(speed, "COMPARISONS", [speed.Comparison("a comparison", 100, programs)])
    text = speed.measure(("raw",), rounds=2, iterations=10, only="", results=tmp_path)
    assert (tmp_path / "speed.md").read_text() == text
    measured = json.loads((tmp_path / "speed.json").read_text())["a comparison"]
    assert list(measured["programs"]) == ["ours", "raw"]
    # The fake script logs every 100 steps with the step as the time, so it makes one step per second.
    assert [one["steps_per_second"] for one in measured["programs"]["ours"]] == [1.0, 1.0]
    assert measured["programs"]["raw"][0]["peak_memory_mb"] > 5
    with pytest.raises(SystemExit, match="No comparison has 'other' in its name"):
        speed.measure((), rounds=1, iterations=10, only="other", results=tmp_path)


def write_result(folder: Path, seed: int, last: float) -> None:
    steps = np.arange(0, 1_000_001, 50_000)
    values = (
        last * (1 - np.exp(-steps / 3e5)) + np.random.default_rng(seed).normal(size=len(steps)) * last / 20
    )
    curve = {"step": steps, TRAINING: np.where(steps > 0, values, np.nan), EVALUATION: 1.1 * values}
    folder.mkdir(parents=True, exist_ok=True)
    write_curve(folder / f"seed{seed}.csv", curve | {ELAPSED: steps / 3000 * (1 + seed / 20)})
    manifest = {"command": "python fake.py", "commit": "0123456789ab", "dirty": False, "gpu": None}
    manifest |= {"processor": "A processor", "packages": {"torch": "2.13.0"}}
    (folder / f"seed{seed}.json").write_text(json.dumps(manifest))


def test_report_writes_table_and_figures(tmp_path: Path) -> None:
    results, figures = tmp_path / "results", tmp_path / "figures"
    published = (Reference("evaluation", 1000, "Somebody"), Reference("training", 700, "Somebody else"))
    tasks = [
        Task("fake.py", name, 1_000_000, references=published) for name in ("One-v0", "Two-v0", "None-v0")
    ]
    for task in tasks[:2]:
        for seed in (1, 2, 3):
            write_result(results / "suite" / task.folder, seed, last=900 + 50 * seed)
    text = write_report("suite", tasks, results, figures)
    row = next(line for line in text.splitlines() if "One-v0" in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    curves = [read_curve(results / "suite" / "fake" / "One-v0" / f"seed{seed}.csv") for seed in (1, 2, 3)]
    evaluations = np.array([curve[EVALUATION] for curve in curves])
    assert cells[:3] == ["One-v0", "fake", "3"]
    assert cells[3] == f"{evaluations[:, -1].mean():.0f} ± {evaluations[:, -1].std(ddof=1):.1f}"
    assert cells[5].startswith(f"{evaluations.max(1).mean():.0f} ± ")
    assert cells[6].startswith(f"{evaluations.mean(0).max():.0f} ± ")
    assert cells[7] == "1000 (Somebody)" and cells[9] == "700 (Somebody else)"
    assert cells[10] == "6.11 ± 0.28"
    assert "None-v0" not in text and "IQM over 2 environments 1." in text
    readme = (results / "suite" / "README.md").read_text()
    for axis in ("steps", "time"):
        assert 5_000 < (figures / f"suite_{axis}.png").stat().st_size < 300_000
        assert os.path.join("..", "..", "figures", f"suite_{axis}.png") in readme
    with pytest.raises(SystemExit, match="There are no results of suite other"):
        write_report("other", tasks, results, figures)


def test_evaluations_of_iterations_of_different_length(tmp_path: Path) -> None:
    """Each seed is evaluated a little after the same steps; with fewer of one, common steps are left."""
    folder = tmp_path / "suite" / "fake" / "One-v0"
    for seed in (1, 2):
        write_result(folder, seed, last=1000)
        curve = read_curve(folder / f"seed{seed}.csv")
        curve["step"][1:] += 10 * seed
        write_curve(folder / f"seed{seed}.csv", curve)
    task = Task("fake.py", "One-v0", 1_000_000)
    summary = summarize("suite", task, tmp_path)
    assert summary.evaluation_steps[:3].tolist() == [0, 50_015, 100_015]
    seeds = [read_curve(folder / f"seed{seed}.csv") for seed in (1, 2)]
    np.testing.assert_allclose(summary.evaluations, [curve[EVALUATION] for curve in seeds])
    write_curve(folder / "seed2.csv", {name: column[:-1] for name, column in seeds[1].items()})
    assert summarize("suite", task, tmp_path).evaluation_steps.tolist() == [0]


def test_colours_of_lines_survive_the_palette(tmp_path: Path) -> None:
    """Eight noisy lines in bands, as in the figure of a suite with eight variants."""
    figure, rng = Figure(figsize=(6.5, 3.5)), np.random.default_rng(0)
    axes = figure.subplots()
    for i, color in enumerate(COLORS):
        y = 1 - np.exp(-np.arange(50) / 5) + rng.normal(0, 0.02, 50)
        axes.plot(y, color=color, label=str(i), linewidth=1.2)
        axes.fill_between(range(50), y - 0.05, y + 0.05, color=color, alpha=0.2)
    axes.legend(ncols=4)
    save(figure, tmp_path / "figure.png")
    with Image.open(tmp_path / "figure.png") as image:
        found = np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3).astype(int), axis=0)
    for color in COLORS:
        wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
        assert np.abs(found - wanted).max(1).min() < 8, color


def test_several_published_figures_and_a_panel_of_its_own(tmp_path: Path, monkeypatch) -> None:
    published = (Reference("evaluation", 2000, "A"), Reference("evaluation", 500, "B"))
    tasks = [
        Task("fake.py", "One-v0", 1, label=label, references=published, drawn_tag=EVALUATION)
        for label in ("x", "y")
    ]
    for task in tasks:
        for seed in (1, 2):
            write_result(tmp_path / "suite" / task.folder, seed, last=1000)
    drawn = []
    monkeypatch.setattr("benchmark.figures.save", lambda figure, path: drawn.append(figure))
    assert "2000 (A), 500 (B)" in write_report("suite", tasks, tmp_path, tmp_path)
    left, right = drawn[0].axes[:2]
    assert [text.get_text() for text in left.texts] == ["A: 2000"]  # of two published figures, the best
    assert left.get_yscale() == "linear" and left.get_title() == f"One-v0: {tasks[0].training_name}"
    assert right.get_yscale() == "log" and right.get_title() == f"One-v0: {EVALUATION}"
    assert len(right.lines) == len(tasks) * 3  # two seeds and their mean each, no published figures


def test_many_variants_are_drawn_by_their_scores(tmp_path: Path, monkeypatch) -> None:
    tasks = [
        Task("fake.py", environment, 1, label=label)
        for label in ("all of it", "less", "much less", "little", "nothing")
        for environment in ("One-v0", "Two-v0")
    ]
    for task in tasks[:-1]:  # one variant is missing in one environment
        for seed in (1, 2):
            last = 500 + 100 * tasks.index(task) + 10 * seed
            write_result(tmp_path / "suite" / task.folder, seed, last=last)
    drawn = {}
    monkeypatch.setattr("benchmark.figures.save", lambda figure, path: drawn.update({path.stem: figure}))
    write_report("suite", tasks, tmp_path, tmp_path)
    one, two = drawn["suite_scores"].axes
    assert [label.get_text() for label in one.get_yticklabels()] == [task.label for task in tasks[::2]]
    assert len(one.collections) == 5 and len(two.collections) == 4
    for line, task in enumerate(tasks[::2]):
        scores = summarize("suite", task, tmp_path).evaluations[:, -1]
        np.testing.assert_allclose(one.collections[line].get_offsets(), [[x, line] for x in scores])
        np.testing.assert_allclose(one.lines[line].get_xdata(), scores.mean())
    first = summarize("suite", tasks[0], tmp_path).evaluations[:, -1].mean()
    np.testing.assert_allclose(one.lines[-1].get_xdata(), first)
    assert "suite_time" not in drawn and "suite_scores.png" in (tmp_path / "suite" / "README.md").read_text()


def test_lines_of_the_frontier() -> None:
    """Rewards 0 and 1, equally often: the optimum is a coin of probability sigmoid(1 / beta)."""
    coin = np.array([[0.0, 1.0] * 50, [1.0, 0.0] * 50])
    for beta in (0.01, 0.2, 1.0, 5.0):
        p = 1 / (1 + np.exp(-1 / beta))
        divergence = np.log(2) - scipy.stats.entropy([p, 1 - p])
        np.testing.assert_allclose(frontier.optimum(coin, beta), (divergence, p), atol=1e-12)
    rewards = np.array([[0.3, 0.1, 0.9]])
    for n in (1, 2, 4):
        best = np.mean([max(choice) for choice in itertools.product(rewards[0], repeat=n)])
        np.testing.assert_allclose(frontier.best_of(rewards, n), (np.log(n) - (n - 1) / n, best))


def test_frontier_is_drawn_with_the_optimum_at_the_same_kl(tmp_path: Path) -> None:
    tags = {"training_tag": "eval/true_reward", "evaluation_tag": "eval/win_rate"}
    others = (frontier.KL, "eval/mean_length")
    tasks = [
        Task("dpo_llm.py", "reviews", 20, label=f"dpo, beta {x}", other_tags=others, **tags) for x in "12"
    ]
    for i, task in enumerate(tasks):
        for seed in (1, 2):
            rows = [[0, 0.4, 0.5, 0, 0, 14], [20, 0.6 + 0.1 * i, 0.7, 9, 1 + 3 * i + 0.5 * seed, 12 + seed]]
            folder = tmp_path / "frontier" / task.folder
            folder.mkdir(parents=True, exist_ok=True)
            lines = [",".join(["step", *task.tags]), *(",".join(map(str, row)) for row in rows)]
            (folder / f"seed{seed}.csv").write_text("\n".join(lines) + "\n")
            manifest = {"command": "python dpo_llm.py", "commit": "abc", "dirty": False, "packages": {}}
            manifest |= {"processor": "A processor", "gpu": None}
            (folder / f"seed{seed}.json").write_text(json.dumps(manifest))
    lines = "line,parameter,kl,reward\noptimum,1,0,0.4\noptimum,0.1,2,0.8\nbest of n,1,0,0.4\n"
    (tmp_path / "frontier" / "lines.csv").write_text(lines)
    text = frontier.write_frontier("frontier", tasks, tmp_path, tmp_path / "figures")
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in text.splitlines()[2:]]
    assert cells[0] == ["dpo, beta 1", "2", "0.60 ± 0.00", "1.75 ± 0.35", "13.5 ± 0.71", "0.75"]
    assert cells[1][-1] == "–"  # further out than the line goes
    assert (tmp_path / "figures" / "frontier.png").stat().st_size > 1000
    assert text in (tmp_path / "frontier" / "README.md").read_text()


def test_seed_in_the_flags() -> None:
    """A method that starts from the models of another suite starts from those of its seed."""
    (task,) = (x for x in SUITES["llm-frontier"] if x.label == "ppo, learned reward, kl_coef 0.2")
    assert "runs/benchmark/llm-ppo/ppo_llm/reviews/seed3/run/reward_model" in task.arguments(3)
    assert not any("{" in word for word in task.arguments(3))
    folder = Path("runs/benchmark/llm-ppo") / SUITES["llm-ppo"][0].folder / "seed3/run"
    assert f"{folder}/reference" in task.arguments(3)
    assert frontier.method_of(SimpleNamespace(task=task)) == "ppo, learned reward"


def test_over_optimization(tmp_path: Path) -> None:
    """The best evaluation of each run, and the last one; the estimate of a KL may lie below 0."""
    tasks = [replace(SUITES["llm-overoptimization"][0], label=label) for label in ("few", "many")]
    for i, task in enumerate(tasks):
        for seed in (1, 2):
            folder = tmp_path / "over" / task.folder
            folder.mkdir(parents=True, exist_ok=True)
            values = {"eval/true_reward": (0.4, 0.6 + 0.1 * i, 0.5), "eval/learned_reward": (0, 1, 2 + i)}
            values |= {overoptimization.KL: (-0.01, 4, 9 * seed), overoptimization.ACCURACY: (0.8, "", "")}
            columns = [values.get(tag, ("", "", "")) for tag in task.tags]
            rows = [["step", *task.tags], *([step, *row] for step, row in zip((0, 5, 10), zip(*columns)))]
            (folder / f"seed{seed}.csv").write_text("".join(",".join(map(str, x)) + "\n" for x in rows))
            manifest = {"command": "python ppo_llm.py", "commit": "abc", "dirty": False, "packages": {}}
            manifest |= {"processor": "A processor", "gpu": None}
            (folder / f"seed{seed}.json").write_text(json.dumps(manifest))
    text = overoptimization.write_overoptimization("over", tasks, tmp_path, tmp_path / "figures")
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in text.splitlines()[2:]]
    few = ["0.60 ± 0.00", "1.00 ± 0.00", "4.00 ± 0.00", "0.50 ± 0.00", "2.00 ± 0.00", "13.5 ± 6.36"]
    assert cells[0] == ["few", "2", "0.80 ± 0.00", *few] and cells[1][3] == "0.70 ± 0.00"
    assert (tmp_path / "figures" / "over.png").stat().st_size > 1000
    assert text in (tmp_path / "over" / "README.md").read_text()


def test_curve_of_one_run(tmp_path: Path) -> None:
    write_scalars(tmp_path, TRAINING, {step: step / 3 for step in range(10, 100)}, "")
    write_scalars(tmp_path, EVALUATION, {0: -1.5, 50: 2.5, 99: 7.25}, "_evaluation")
    text = draw_run(tmp_path, tmp_path / "curve.png", TRAINING, EVALUATION)
    assert text.startswith("First evaluation -1.5 at step 0, last evaluation 7.25 at step 99.")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_command_line_says_what_is_wrong() -> None:
    for arguments, sentence in (
        (["run", "--suite", "mojoco"], "There is no suite 'mojoco'"),
        (["run", "--suite", "smoke", "--only", "Hopper-v5"], "Suite smoke has no Hopper-v5"),
    ):
        command = [sys.executable, "-m", "benchmark", *arguments]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
        assert done.returncode == 1 and sentence in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "name", ["staggered-starts", "small-epsilon", "normalised-observations", "scaled-rewards"]
)
def test_ablated_script_lacks_one_detail(name, tmp_path, monkeypatch):
    ppo = ablated.ppo
    for replaced in ("Environments", "Adam", "Agent"):
        monkeypatch.setattr(ppo, replaced, getattr(ppo, replaced))  # restores what main replaces
    flags = "--env-id Pendulum-v1 --num-envs 2 --num-steps 8 --num-minibatches 2 --total-timesteps 16".split()
    flags += ["--eval-interval", "0", "--no-compile", "--runs", str(tmp_path)]
    run = ablated.main([*flags, "--without", name])  # where the harness puts the flags of a variant
    state = ppo.load_checkpoint(run)
    assert (state["envs"]["limits"].unique().tolist() == [200]) == (name == "staggered-starts")
    assert (state["agent"]["observation_statistics.count"] == 0) == (name == "normalised-observations")
    assert (state["agent"]["return_statistics.count"] == 0) == (name == "scaled-rewards")
    assert (ppo.Adam([torch.zeros(1)], 1e-3).eps == 1e-5) == (name == "small-epsilon")


def test_unknown_detail_is_refused(capsys):
    with pytest.raises(SystemExit):
        ablated.main(["--without", "luck"])
    assert "staggered-starts" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------- GPU


def test_findings_on_a_gpu_are_appended_at_once_and_reported_beside_the_limit(tmp_path):
    """A failure is a finding too; a page of a trial does not pass for one of a GPU."""
    findings = gpu.Findings("sample", tmp_path, small=True)
    findings.attempt("machine", lambda: {"TB_per_s": 2.0})
    findings.attempt("generate", lambda: {"tokens_per_s": 5e5, "bytes_per_token": 1e6}, span=64)
    findings.attempt("generate", lambda: 1 / 0, span=1)
    lines = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines] == ["machine", "generate", "generate"]
    assert "ZeroDivisionError" in lines[2]["error"] and lines[2]["manifest"]["small"]
    page = tmp_path / "docs.md"
    gpu.write_report(tmp_path, page)
    assert not page.exists()
    text = (tmp_path / "gpu.md").read_text()
    assert "2,000,000" in text and "0.25" in text and "ZeroDivisionError" in text
    for line in lines:
        line["manifest"] |= {"small": False, "gpu": "Some GPU"}
    (tmp_path / "gpu.jsonl").write_text("\n".join(map(json.dumps, lines)))
    gpu.write_report(tmp_path, page)
    assert "Some GPU" in page.read_text()


def test_checks_on_a_gpu_can_fail(tmp_path):
    """What the piece `check` compares is told apart: a sampler at another temperature, another mask."""
    findings = gpu.Findings("check", tmp_path, small=True)
    fine = findings.sampler_equals_trainer(False)
    assert fine["gap_max"] < 1e-4 and fine["rows_as_eager"] == 1
    generate = findings.grpo.generate
    with mock.patch.object(findings.grpo, "generate", lambda *x: generate(*x, temperature=1.1)):
        assert findings.sampler_equals_trainer(False)["gap_max"] > 0.01
    fine = findings.blocks_equal_mask(False)
    assert fine["gap_max"] == fine["gradient_error_blocks"] == 0  # without a GPU both are the mask
