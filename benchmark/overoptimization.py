"""Learned and true reward against the KL to the reference, after Gao et al. (2023, figure 1), in miniature.

Each variant of the suite is a reward model of another number of pairs, optimised without a KL penalty. Where
the learned reward still rises and the true one falls, the policy exploits the errors of the reward model.
"""

from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmark.events import logged
from benchmark.figures import COLORS, STYLE, save
from benchmark.frontier import KL
from benchmark.report import image, mean_and_std, table, write_page
from benchmark.results import Summary, summarize
from benchmark.suites import Task

LEARNED, TRUE, ACCURACY = "eval/learned_reward", "eval/true_reward", "reward_model/true_accuracy"


def curves_of(summary: Summary, tag: str) -> np.ndarray:
    """What a variant has logged (seeds, evaluations)."""
    return np.array([logged(curve, tag)[1] for curve in summary.curves])


def draw(summaries: list[Summary], path: Path) -> None:
    """One panel for each reward; the evaluations of a run are joined, and the mean over seeds is thick."""
    with rc_context(STYLE):
        figure = Figure(figsize=(7.5, 3.2), layout="constrained")
        panels = figure.subplots(1, 2)
        for axes, tag, name in zip(panels, (LEARNED, TRUE), ("learned reward", "true reward"), strict=True):
            for summary, color in zip(summaries, COLORS[: len(summaries)], strict=True):
                # At step 0 the estimate of a KL of 0 may lie a little below it.
                x, y = np.sqrt(curves_of(summary, KL).clip(0)), curves_of(summary, tag)
                axes.plot(x.T, y.T, color=color, linewidth=0.6, alpha=0.4)
                axes.plot(x.mean(0), y.mean(0), "o-", color=color, markersize=3, label=summary.task.label)
            axes.set_xlabel("square root of KL(policy, reference)")
            axes.set_ylabel(name)
        panels[0].legend(frameon=False, fontsize=8)
        save(figure, path)


EXPLANATION = """\
Mean ± sample standard deviation over seeds, on held-out prompts, without a KL penalty. The accuracy is that
of the reward model on held-out pairs, in the true order. "Best" is the evaluation of a run with the highest
true reward, with the learned reward and the KL there; "last" is the end of the training."""


def write_overoptimization(suite: str, tasks: list[Task], results: Path, figures: Path) -> str:
    """Writes {results}/{suite}/README.md and the figure {suite}.png; returns the table."""
    summaries = [summary for task in tasks if (summary := summarize(suite, task, results))]
    path, rows = figures / f"{suite}.png", []
    draw(summaries, path)
    for summary in summaries:
        true = curves_of(summary, TRUE)
        runs, best = np.arange(len(true)), true.argmax(1)
        cells = [mean_and_std(curves_of(summary, ACCURACY)[:, -1])]
        for place in (best, np.full(len(true), -1)):
            cells += [mean_and_std(curves_of(summary, tag)[runs, place]) for tag in (TRUE, LEARNED, KL)]
        rows.append([summary.task.label, str(len(true)), *cells])
    names = [f"{name}, {place}" for place in ("best", "last") for name in ("True", "learned", "KL")]
    text = table(["Reward model", "Seeds", "Accuracy", *names], rows)
    page = [
        text + "\n",
        EXPLANATION + "\n",
        image("Learned and true reward against the KL", path, results / suite),
    ]
    write_page(suite, page, summaries, results)
    return text
