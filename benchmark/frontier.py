"""True reward against KL to the reference, after Rafailov et al. (2023, figure 2, left), in miniature.

Each variant of the suite is a method with one beta. The lines to approach are of the reference itself, whose
completions are weighted by exp(reward / beta), the optimum of what all methods maximise, or of which the best
of n is taken.
"""

import csv
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmark.events import logged
from benchmark.figures import COLORS, STYLE, save
from benchmark.report import image, mean_and_std, number, table, write_page
from benchmark.results import Summary, summarize
from benchmark.suites import Task

KL = "eval/kl_to_reference"
EDGE = 12  # KL that is drawn at the right edge, as is all beyond it
BETAS = (3.0, 1.0, 0.6, 0.4, 0.3, 0.25, 0.2, 0.15, 0.12, 0.1, 0.085, 0.07, 0.06, 0.05, 0.04, 0.03)
BEST_OF = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


def optimum(rewards: np.ndarray, beta: float) -> tuple[float, float]:
    """KL and reward of pi_ref exp(r / beta) / Z, from rewards (prompts, N) of samples of pi_ref."""
    log_weights = rewards / beta - np.logaddexp.reduce(rewards / beta, axis=1, keepdims=True)
    weights = np.exp(log_weights)
    divergence = (weights * (log_weights + math.log(rewards.shape[1]))).sum(1)
    return divergence.mean(), (weights * rewards).sum(1).mean()


def best_of(rewards: np.ndarray, n: int) -> tuple[float, float]:
    """KL, at most log n - (n - 1) / n, and reward of the best of n samples, from rewards (prompts, N).

    The mean over all choices of n, with replacement, of the N: the i-th smallest is the best one with
    probability (i / N)^n - ((i - 1) / N)^n.
    """
    ranks = np.arange(rewards.shape[1] + 1) / rewards.shape[1]
    return math.log(n) - (n - 1) / n, (np.sort(rewards, 1) * np.diff(ranks**n)).sum(1).mean()


def sampled_rewards(reference: Path, prompts: int = 64, samples: int = 1024) -> np.ndarray:
    """True rewards (prompts, samples) of completions of a model made by dpo_llm.py."""
    import dpo_llm

    task, model = dpo_llm.Reviews(), dpo_llm.read_model(reference)
    problems = [dpo_llm.draw(task, 0, i, held_out=True) for i in range(prompts)]
    uniforms = torch.rand(
        prompts, samples, task.max_completion_length, generator=torch.Generator().manual_seed(0)
    )
    ids = dpo_llm.encode_prompts(model, problems, task.max_completion_length)
    texts = model.decode(dpo_llm.sample(model, ids, uniforms, dpo_llm.Args()).tokens)
    rows = [problem for problem in problems for _ in range(samples)]
    return dpo_llm.score(task, rows, texts)["reward"].double().view(prompts, samples).numpy()


@dataclass
class Line:
    """A line to approach, with the mean over references at each of its parameters."""

    name: str
    parameters: list[float]
    points: np.ndarray
    """(len(parameters), 2): KL and reward"""


def write_lines(references: list[Path], path: Path) -> None:
    """Samples from the references, one for each seed, and writes both lines as CSV."""
    rewards = [sampled_rewards(reference) for reference in references]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["line", "parameter", "kl", "reward"])
        for name, function, parameters in (("optimum", optimum, BETAS), ("best of n", best_of, BEST_OF)):
            for parameter in parameters:
                point = np.mean([function(x, parameter) for x in rewards], axis=0)
                writer.writerow([name, parameter, *(f"{x:.5g}" for x in point)])


def read_lines(path: Path) -> list[Line]:
    with path.open() as file:
        rows = list(csv.DictReader(file))
    lines = []
    for name in dict.fromkeys(row["line"] for row in rows):
        mine = [row for row in rows if row["line"] == name]
        points = np.array([[float(row["kl"]), float(row["reward"])] for row in mine])
        lines.append(Line(name, [float(row["parameter"]) for row in mine], points))
    return lines


def points_of(summary: Summary) -> np.ndarray:
    """KL and true reward (2, seeds, evaluations) of a variant."""
    tags = (KL, summary.task.training_tag)
    return np.array([[logged(curve, tag)[1] for curve in summary.curves] for tag in tags])


def method_of(summary: Summary) -> str:
    """What the label of the variant says before its beta."""
    return summary.task.label.rpartition(",")[0]


def draw(summaries: list[Summary], lines: list[Line], path: Path) -> None:
    """All evaluations small, the mean over seeds of the last ones large and joined within a method."""
    methods = list(dict.fromkeys(map(method_of, summaries)))
    with rc_context(STYLE):
        figure = Figure(figsize=(7.5, 4.8), layout="constrained")
        axes = figure.subplots()
        for line, style in zip(lines, ("-", "--"), strict=True):
            axes.plot(*line.points.T, color="black", linestyle=style, linewidth=1.2, label=line.name)
        colors = COLORS[:-1]  # the last one is that of the lines
        for i, method in enumerate(methods):
            color, marker = colors[i % len(colors)], "os"[i // len(colors)]
            mine = [points_of(summary) for summary in summaries if method_of(summary) == method]
            for points in mine:
                x, y = points.reshape(2, -1)
                axes.plot(x.clip(0, EDGE), y, ".", color=color, markersize=3, alpha=0.35, clip_on=False)
            x, y = np.array([points[..., -1].mean(1) for points in mine]).T
            axes.plot(
                x.clip(0, EDGE),
                y,
                f"{marker}-",
                color=color,
                markersize=5,
                linewidth=1,
                label=method,
                clip_on=False,
            )
        axes.set_xscale("function", functions=(np.sqrt, np.square))  # most of it happens below 1
        axes.set_xlim(0, EDGE)
        axes.set_xticks([0, 0.1, 0.5, 1, 2, 4, 6, 9, EDGE], [0, 0.1, 0.5, 1, 2, 4, 6, 9, f"{EDGE} or more"])
        axes.set_xlabel("KL(policy, reference), nats per completion")
        axes.set_ylabel("true reward")
        axes.legend(frameon=False, ncols=2, fontsize=8)
        save(figure, path)


EXPLANATION = """\
Mean ± sample standard deviation over seeds, at the end of the training, on held-out prompts. The KL is that
of the policy to the reference, in nats per completion. The last column is the true reward of the optimum,
pi_ref exp(reward / beta) / Z, at the same KL, from weighted samples of the reference; – is further out than
its line goes."""


def write_frontier(suite: str, tasks: list[Task], results: Path, figures: Path) -> str:
    """Writes {results}/{suite}/README.md and the figure {suite}.png; returns the table."""
    summaries = [summary for task in tasks if (summary := summarize(suite, task, results))]
    lines = read_lines(results / suite / "lines.csv")
    path = figures / f"{suite}.png"
    draw(summaries, lines, path)
    rows = []
    for summary in summaries:
        divergence, reward = points_of(summary)[..., -1]
        lengths = np.array([logged(curve, "eval/mean_length")[1][-1] for curve in summary.curves])
        best = np.interp(divergence.mean(), *lines[0].points.T, right=np.nan)
        cells = [mean_and_std(reward), mean_and_std(divergence), mean_and_std(lengths)]
        rows.append([summary.task.label, str(len(reward)), *cells, "–" if np.isnan(best) else number(best)])
    text = table(["Variant", "Seeds", "True reward", "KL", "Tokens", "Optimum at that KL"], rows)
    page = [text + "\n", EXPLANATION + "\n", image("True reward against KL", path, results / suite)]
    write_page(suite, page, summaries, results)
    return text
