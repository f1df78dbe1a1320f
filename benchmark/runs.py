"""Runs the tasks of a suite that have no result yet, several at a time, and keeps what they logged."""

import json
import os
import shlex
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from benchmark import events, manifest
from benchmark.suites import Task

RUN_NAME = "run"  # of the run directory of a job


@dataclass
class Job:
    """One task with one seed."""

    task: Task
    seed: int
    runs: Path
    """folder of its run directories, its own"""
    curve: Path
    """the result, a CSV; the manifest lies beside it"""

    def __str__(self) -> str:
        return f"{self.task.label} {self.task.environment} seed {self.seed}"

    @property
    def manifest(self) -> Path:
        return self.curve.with_suffix(".json")

    @property
    def log(self) -> Path:
        return self.runs / "log.txt"

    def is_done(self) -> bool:
        return self.curve.exists() and self.manifest.exists()

    def last_run(self) -> Path | None:
        """The run directory, once the script has made it."""
        return self.runs / RUN_NAME if (self.runs / RUN_NAME / "args.json").exists() else None


@dataclass
class RunningJob:
    job: Job
    process: subprocess.Popen
    manifest: dict
    start: float


def list_jobs(suite: str, tasks: list[Task], seeds: int, results: Path, runs: Path) -> list[Job]:
    """All tasks with seeds 1 to `seeds`, one seed of every task before the next."""
    return [
        Job(
            task,
            seed,
            runs / suite / task.folder / f"seed{seed}",
            results / suite / task.folder / f"seed{seed}.csv",
        )
        for seed in range(1, seeds + 1)
        for task in tasks
    ]


def start_process(arguments: list[str], log: Path, cores: list[int]) -> subprocess.Popen:
    """`python arguments...` in the repository, a thread on each of `cores`, its output appended to `log`."""
    environment = os.environ | {"OMP_NUM_THREADS": str(len(cores)), "PYTHONUNBUFFERED": "1"}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as output:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=manifest.REPOSITORY,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(process.pid, cores)
    return process


def start_job(job: Job, cores: list[int]) -> RunningJob:
    """Starts or resumes a job on its share of the cores, of which most tasks use one."""
    cores = cores if job.task.multithreaded else cores[:1]
    arguments = job.task.arguments(job.seed)
    description = {"command": shlex.join(["python", *arguments])} | manifest.describe()
    description |= {"script_blob": manifest.git("hash-object", job.task.script)}
    description |= {"resumed": job.last_run() is not None, "threads": len(cores)}
    arguments += ["--runs", str(job.runs), "--run-name", RUN_NAME]  # goes on if the run is there already
    return RunningJob(job, start_process(arguments, job.log, cores), description, time.perf_counter())


def keep_result(running: RunningJob) -> str:
    """Writes curve and manifest of a run that has ended; returns its final figures in words.

    SystemExit with the reason if the run failed or logged nothing.
    """
    job, task = running.job, running.job.task
    if running.process.returncode:
        raise SystemExit(f"exit code {running.process.returncode}")
    run = job.last_run()
    if run is None:
        raise SystemExit(f"The script made no run directory in {job.runs}")
    curve = events.make_curve(events.read_scalars(run), task.tags, keep=task.evaluation_tag)
    columns = {tag: events.logged(curve, tag)[1] for tag in task.tags}
    final = {tag: float(f"{values[-1]:.5g}") for tag, values in columns.items() if len(values)}
    if task.training_tag not in final and task.evaluation_tag not in final:
        raise SystemExit(f"The script logged neither {task.training_tag} nor {task.evaluation_tag}")
    job.curve.parent.mkdir(parents=True, exist_ok=True)
    events.write_curve(job.curve, curve)
    seconds = round(time.perf_counter() - running.start, 1)
    running.manifest |= {"wall_seconds": seconds, "final": {"step": curve["step"][-1].item()} | final}
    job.manifest.write_text(json.dumps(running.manifest, indent=2) + "\n")
    wanted = {"training": task.training_tag, "evaluation": task.evaluation_tag}
    return ", ".join(f"{name} {final[tag]:.5g}" for name, tag in wanted.items() if tag in final)


def last_lines(log: Path, count: int = 10) -> str:
    return "\n".join("    " + line for line in log.read_text(errors="replace").splitlines()[-count:])


def elapsed(start: float) -> str:
    minutes, seconds = divmod(round(time.perf_counter() - start), 60)
    return f"{minutes}:{seconds:02}"


def run_jobs(jobs: list[Job], parallel: int) -> list[tuple[Job, str]]:
    """Runs the jobs that have no result, `parallel` at a time; returns those that failed, with the reason.

    A failure does not stop the others. Ctrl-C ends the running ones; they are resumed the next time.
    """
    waiting = deque(job for job in jobs if not job.is_done())
    total, started = len(waiting), 0
    print(f"{len(jobs) - total} of {len(jobs)} runs are there, {total} to go", flush=True)
    cores = manifest.available_cores()
    shares = [cores[slot % len(cores) :: parallel] for slot in range(parallel)]
    running: dict[int, RunningJob] = {}  # by slot; a slot is a share of the cores
    failures = []
    start = time.perf_counter()
    try:
        while waiting or running:
            for slot in range(parallel):
                if slot not in running and waiting:
                    now = running[slot] = start_job(waiting.popleft(), shares[slot])
                    started += 1
                    verb = "resume" if now.manifest["resumed"] else "start"
                    print(f"[{elapsed(start)}] {verb} {now.job} ({started} of {total})", flush=True)
                elif slot in running and running[slot].process.poll() is not None:
                    ended = running.pop(slot)
                    try:
                        outcome = keep_result(ended)
                    except SystemExit as error:
                        failures.append((ended.job, str(error)))
                        outcome = f"FAILED, {error}"
                    duration = elapsed(ended.start)
                    print(f"[{elapsed(start)}] end {ended.job} after {duration}: {outcome}", flush=True)
            time.sleep(0.1)
    except KeyboardInterrupt:
        raise SystemExit("Interrupted. The same command goes on from the last checkpoints") from None
    finally:  # nothing is left running, whatever the reason
        for now in running.values():
            now.process.terminate()
        for now in running.values():
            now.process.wait()
    return failures
