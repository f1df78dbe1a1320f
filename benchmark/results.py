"""The results of a suite on disk, and statistics over seeds."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import trim_mean

from benchmark.events import Curve, logged, read_curve
from benchmark.suites import ELAPSED, Task


@dataclass
class Summary:
    """The results of one task over its S seeds."""

    task: Task
    curves: list[Curve]
    manifests: list[dict]
    training: np.ndarray  # (S,), return of the last 100 training episodes
    minutes: np.ndarray  # (S,), of training
    evaluation_steps: np.ndarray  # (K,), the mean of the seeds, or those that every seed has
    evaluations: np.ndarray  # (S, K)


def interquartile_mean(scores: np.ndarray, axis: int = -1) -> np.ndarray:
    """Mean of what is left without the lowest and the highest quarter."""
    return trim_mean(scores, 0.25, axis=axis)


def bootstrap_interval(
    groups: list[np.ndarray], statistic: Callable[..., np.ndarray], resamples: int = 2000
) -> tuple[np.ndarray, np.ndarray]:
    """95% stratified percentile bootstrap interval of a statistic of the pooled groups.

    Each group (S, ...) is resampled along S, by itself (Agarwal et al. 2021); `statistic` takes `axis`.
    Returns the lower and the upper ends, arrays (...). The draws are the same in every call.
    """
    generator = np.random.default_rng(0)
    drawn = [group[generator.integers(len(group), size=(resamples, len(group)))] for group in groups]
    low, high = np.percentile(statistic(np.concatenate(drawn, axis=1), axis=1), (2.5, 97.5), axis=0)
    return low, high


def summarize(suite: str, task: Task, results: Path) -> Summary | None:
    """The results of a task that are there; None if there are none."""
    paths = [
        path
        for path in (results / suite / task.folder).glob("seed*.csv")
        if path.with_suffix(".json").exists()
    ]
    paths.sort(key=lambda path: int(path.stem.removeprefix("seed")))
    if not paths:
        return None
    curves = [read_curve(path) for path in paths]

    def last(tag: str) -> np.ndarray:
        return np.array([values[-1] if len(values := logged(curve, tag)[1]) else np.nan for curve in curves])

    logs = [logged(curve, task.evaluation_tag) for curve in curves]
    if len({len(steps) for steps, _ in logs}) == 1:
        # Where iterations differ in length, the seeds are evaluated a little after the same steps.
        steps = np.mean([steps for steps, _ in logs], axis=0)
        evaluations = np.array([values for _, values in logs])
    else:
        by_step = [dict(zip(*log, strict=True)) for log in logs]
        steps = np.array(sorted(set.intersection(*map(set, by_step))))
        evaluations = np.array([[values[step] for step in steps] for values in by_step])
    return Summary(
        task,
        curves,
        [json.loads(path.with_suffix(".json").read_text()) for path in paths],
        training=last(task.training_tag),
        minutes=last(ELAPSED) / 60,
        evaluation_steps=steps,
        evaluations=evaluations,
    )
