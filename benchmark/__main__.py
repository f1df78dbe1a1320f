"""Command line of the benchmark.

python -m benchmark run --suite mujoco --seeds 5 --jobs 2    # runs what is missing
python -m benchmark report --suite mujoco                    # tables and figures from the results
python -m benchmark frontier --seeds 3                       # true reward against KL, language models
python -m benchmark overoptimization --seeds 3                # learned and true reward against KL
python -m benchmark curve runs/Hopper-v5__...                # learning curve of one run
python -m benchmark speed                                    # steps per second beside the peers
python -m benchmark memory                                   # what fits on which GPU, language models
python -m benchmark gpu check                                # what is to be seen on a GPU, in pieces
"""

import signal
from pathlib import Path
from typing import Literal

import tyro

from benchmark.manifest import REPOSITORY
from benchmark.suites import find_suite

RESULTS = REPOSITORY / "benchmark" / "results"
FIGURES = REPOSITORY / "benchmark" / "figures"
RUNS = REPOSITORY / "runs" / "benchmark"


def run(
    suite: str,
    preset: str | None = None,
    seeds: int = 5,
    jobs: int = 1,
    only: tuple[str, ...] = (),
    total_timesteps: int | None = None,
    results: Path = RESULTS,
    runs: Path = RUNS,
) -> None:
    """Run what is missing of a suite; interrupted runs are resumed, results that are there are left alone.

    Args:
        suite: name of the suite
        preset: name of other settings for the same tasks: `fast` for atari
        seeds: runs per task, with seeds 1 to this
        jobs: runs at a time, each with one thread on one core; those of Atari share all cores
        only: environments to run; all of the suite if not given
        total_timesteps: another length of the runs, for a trial; the results are kept apart
        results: folder of the results
        runs: folder of the run directories and logs
    """
    from benchmark.runs import last_lines, list_jobs, run_jobs

    if seeds < 1 or jobs < 1:
        raise SystemExit("--seeds and --jobs must be at least 1")
    suite, tasks = find_suite(suite, total_timesteps, preset)
    unknown = set(only) - {task.environment for task in tasks}
    if unknown:
        raise SystemExit(f"Suite {suite} has no {', '.join(sorted(unknown))}")
    tasks = [task for task in tasks if not only or task.environment in only]
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # being terminated ends the runs as Ctrl-C does
    failures = run_jobs(list_jobs(suite, tasks, seeds, results.resolve(), runs.resolve()), jobs)
    for job, problem in failures:
        print(f"\n{job}: {problem}; the end of {job.log}:\n{last_lines(job.log)}")
    if failures:
        raise SystemExit(f"\n{len(failures)} runs failed; the same command tries them again")


def report(
    suite: str,
    preset: str | None = None,
    total_timesteps: int | None = None,
    results: Path = RESULTS,
    figures: Path = FIGURES,
) -> None:
    """Write the table and the figures of a suite from its results.

    Args:
        suite: name of the suite
        preset: that of `run`, if any
        total_timesteps: the length that `run` was given, if any
        results: folder of the results; the table is its {suite}/README.md
        figures: folder of the figures
    """
    from benchmark.report import write_report

    print(write_report(*find_suite(suite, total_timesteps, preset), results, figures))


def frontier(
    seeds: int = 3, jobs: int = 1, results: Path = RESULTS, figures: Path = FIGURES, runs: Path = RUNS
) -> None:
    """Run what is missing of the suite llm-frontier; table and figure of the true reward against the KL.

    Args:
        seeds: runs per method and beta, with seeds 1 to this
        jobs: runs at a time, each with one thread on one core
        results: folder of the results
        figures: folder of the figures
        runs: folder of the run directories and logs
    """
    from benchmark.frontier import write_frontier, write_lines
    from benchmark.runs import list_jobs

    suite, tasks = find_suite("llm-frontier")
    run("llm-ppo", seeds=seeds, jobs=jobs, results=results, runs=runs)  # makes the reward models
    run(suite, seeds=seeds, jobs=jobs, results=results, runs=runs)
    folders = [
        job.last_run() for job in list_jobs(suite, tasks[:1], seeds, results.resolve(), runs.resolve())
    ]
    if all(folders):  # else the runs were made elsewhere, and the lines with them
        write_lines([folder / "reference" for folder in folders], results / suite / "lines.csv")
    print(write_frontier(suite, tasks, results, figures))


def overoptimization(
    seeds: int = 3, jobs: int = 1, results: Path = RESULTS, figures: Path = FIGURES, runs: Path = RUNS
) -> None:
    """Run what is missing of the suite llm-overoptimization; figure of learned and true reward against KL.

    Args:
        seeds: runs per size of the reward model's data, with seeds 1 to this
        jobs: runs at a time, each with one thread on one core
        results: folder of the results
        figures: folder of the figures
        runs: folder of the run directories and logs
    """
    from benchmark.overoptimization import write_overoptimization

    suite, tasks = find_suite("llm-overoptimization")
    run(suite, seeds=seeds, jobs=jobs, results=results, runs=runs)
    print(write_overoptimization(suite, tasks, results, figures))


def curve(
    run: tyro.conf.Positional[Path],
    out: Path | None = None,
    training_tag: str | None = None,
    evaluation_tag: str | None = None,
) -> None:
    """Draw the learning curve of one run.

    Args:
        run: run directory
        out: where the PNG goes; curve.png in the run directory if not given
        training_tag: logged name of the training curve; the return, the reward, or else the loss
        evaluation_tag: logged name of the evaluations
    """
    from benchmark.figures import draw_run

    print(draw_run(run, out or run / "curve.png", training_tag, evaluation_tag))


def speed(
    peers: tuple[Literal["sb3", "raw", "trl"], ...] = ("sb3", "raw", "trl"),
    rounds: int = 3,
    iterations: int = 20,
    only: str = "",
    results: Path = RESULTS,
) -> None:
    """Measure steps per second beside the peers, alternating, each on one core.

    Args:
        peers: sb3 is Stable-Baselines3, trl is TRL, raw the environment alone with random actions
        rounds: runs of each
        iterations: iterations per run; the first 3 are not measured
        only: compare only where this is part of the comparison's name
        results: folder of speed.json and speed.md
    """
    from benchmark.speed import measure

    print(measure(peers, rounds, iterations, only, results))


def memory(micro_batch_tokens: int = 8192, lora_rank: int = 16) -> None:
    """Count the GPU memory that grpo_llm.py and dpo_llm.py need for models of several sizes.

    Args:
        micro_batch_tokens: as the flag of the scripts
        lora_rank: rank of the adapters in the rows with LoRA
    """
    from benchmark.memory import table

    print(table(micro_batch_tokens, lora_rank))


def gpu(
    piece: tyro.conf.Positional[Literal["check", "sample", "step", "grpo", "atari", "report"]],
    out: Path = RESULTS / "gpu",
    small: bool = False,
) -> None:
    """Check and measure on a GPU, in pieces of under ten minutes each.

    Args:
        piece: check first: nothing else counts if it finds differences; report writes docs/gpu.md
        out: folder of gpu.jsonl, to which every finding is appended at once
        small: tiny sizes, for a trial on a CPU; the report then stays in `out`
    """
    from benchmark.gpu import measure, write_report

    if piece == "report":
        print(write_report(out, REPOSITORY / "docs" / "gpu.md"))
    else:
        measure(piece, out, small)


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict(
        {
            "run": run,
            "report": report,
            "frontier": frontier,
            "overoptimization": overoptimization,
            "curve": curve,
            "speed": speed,
            "memory": memory,
            "gpu": gpu,
        },
        prog="python -m benchmark",
    )
