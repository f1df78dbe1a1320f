"""Learning curves as PNG."""

from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from benchmark.events import logged, make_curve, read_scalars
from benchmark.results import Summary, bootstrap_interval
from benchmark.suites import ELAPSED, EVALUATION, TRAINING, Task

COLORS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#7f7f7f",
    "#000000",
)  # told apart by the colour-blind, too
EVALUATION_COLOR = COLORS[1]
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
}


def save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    with Image.open(path) as image:  # a palette makes it a third of the size
        # The default method goes by the number of pixels, and has merged the colours of thin lines.
        method, dither = Image.Quantize.FASTOCTREE, Image.Dither.NONE
        palette = image.convert("RGB").quantize(128, method, dither=dither)
    palette.save(path, optimize=True)


def mean_curve(summary: Summary, tag: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps (K,) that all seeds share, and the values (S, K) there, by interpolation."""
    seeds = [xy for curve in summary.curves if len((xy := logged(curve, tag))[0])]
    if not seeds:
        return np.empty(0), np.empty((0, 0))
    start, end = max(steps[0] for steps, _ in seeds), min(steps[-1] for steps, _ in seeds)
    grid = np.unique(np.concatenate([steps for steps, _ in seeds]))
    grid = grid[(grid >= start) & (grid <= end)]
    return grid, np.array([np.interp(grid, steps, values) for steps, values in seeds])


def unit_of_steps(task: Task) -> tuple[float, str]:
    """What steps are divided by along the axis, and its label."""
    return (1e6, "million steps") if task.total_timesteps >= 10_000 else (1, "steps")


def draw_curve(
    axes: Axes,
    summary: Summary,
    axis: str,
    steps: np.ndarray,
    values: np.ndarray,
    color: str,
    label: str,
    marker: str | None = None,
) -> None:
    """Values (S, K) at steps (K,): seeds thin, their mean thick, with its 95% bootstrap interval."""
    elapsed_steps, elapsed = mean_curve(summary, ELAPSED)
    if not values.size or axis == "time" and not elapsed.size:
        return
    if axis == "steps":
        x = steps / unit_of_steps(summary.task)[0]
    else:  # the mean time of the seeds, so that the curves have the shape that they have against steps
        x = np.interp(steps, np.append(0, elapsed_steps), np.append(0, elapsed.mean(0) / 60))
    axes.plot(x, values.T, color=color, linewidth=0.5, alpha=0.4)
    axes.plot(x, values.mean(0), color=color, linewidth=1.8, marker=marker, markersize=3, label=label)
    low, high = bootstrap_interval([values], np.mean)
    axes.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)


def draw_task(axes: Axes, summary: Summary, axis: str, color: str, with_evaluation: bool) -> None:
    """The training of one variant, and its evaluations if there is no other."""
    label = summary.task.training_name if with_evaluation else summary.task.label
    draw_curve(axes, summary, axis, *mean_curve(summary, summary.task.training_tag), color, label)
    if with_evaluation:
        evaluations = summary.evaluation_steps, summary.evaluations
        name = summary.task.evaluation_name
        draw_curve(axes, summary, axis, *evaluations, EVALUATION_COLOR, name, marker="o")


def draw_suite(summaries: list[Summary], path: Path, axis: str) -> None:
    """One panel per environment, against `axis` "steps" or "time"; dotted: the best published figures.

    With one variant there are its training and its evaluation; with several the training of each. The
    `drawn_tag` of the tasks has a panel of its own.
    """
    environments = list(dict.fromkeys(summary.task.environment for summary in summaries))
    panels = [(environment, "") for environment in environments]
    drawn = dict.fromkeys((summary.task.environment, summary.task.drawn_tag) for summary in summaries)
    panels += [(environment, tag) for environment, tag in drawn if tag]
    labels = list(dict.fromkeys(summary.task.label for summary in summaries))
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    with rc_context(STYLE):
        width = 6.5 if len(panels) == 1 and len(labels) > 2 else 4 * columns + 0.5  # room for the legend
        size = (width, 2.8 * rows + 0.7)
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        for axes, (environment, tag) in zip(grid.flat, panels, strict=False):
            here = [summary for summary in summaries if summary.task.environment == environment]
            several = len(labels) > 1  # then the legend has no room for what is drawn
            shown = tag or (here[0].task.training_name if several else "")
            axes.set_title(f"{environment}: {shown}" if shown else environment, fontsize=10)
            axes.set_xlabel(unit_of_steps(here[0].task)[1] if axis == "steps" else "minutes")
            for summary in here:
                color = COLORS[labels.index(summary.task.label) % len(COLORS)]
                if tag:
                    axes.set_yscale("log")
                    draw_curve(axes, summary, axis, *mean_curve(summary, tag), color, summary.task.label)
                else:
                    draw_task(axes, summary, axis, color, with_evaluation=not several)
            if tag:
                continue
            references = [reference for summary in here for reference in summary.task.references]
            best = {x.metric: x for x in sorted(references, key=lambda x: x.value)}  # the last one stays
            for reference in best.values():
                above = (
                    reference.metric == "evaluation"
                )  # and below for training, so that they do not collide
                color = EVALUATION_COLOR if above else COLORS[0]
                axes.axhline(reference.value, color=color, linestyle=":", linewidth=1.2)
                axes.annotate(
                    f"{reference.source}: {reference.value:g}",
                    (0.01, reference.value),
                    xycoords=("axes fraction", "data"),
                    xytext=(0, 2 if above else -2),
                    textcoords="offset points",
                    verticalalignment="bottom" if above else "top",
                    fontsize=7,
                    color=color,
                )
        legend = {}  # of all panels: a variant need not be in the first
        for axes in grid.flat:
            legend |= {name: handle for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)}
        letters = max(map(len, legend), default=0) + 8  # with the line before the name
        columns = max(1, min(len(legend), int(11 * width // letters)))
        figure.legend(legend.values(), legend, loc="outside upper center", ncols=columns, frameon=False)
        save(figure, path)


def draw_scores(summaries: list[Summary], path: Path) -> None:
    """Final evaluations: one panel per environment, one line per variant.

    Dots are seeds, bars their means, the dotted line that of the first variant.
    """
    environments = list(dict.fromkeys(summary.task.environment for summary in summaries))
    labels = list(dict.fromkeys(summary.task.label for summary in summaries))
    columns = min(4, len(environments))
    rows = -(-len(environments) // columns)
    with rc_context(STYLE):
        size = (2.6 * columns + 1.6, rows * (0.24 * len(labels) + 0.9))
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
        for axes in grid.flat[len(environments) :]:
            axes.set_visible(False)
        for axes, environment in zip(grid.flat, environments, strict=False):
            here = [summary for summary in summaries if summary.task.environment == environment]
            axes.set(title=environment, xlabel=here[0].task.evaluation_name, ylim=(len(labels) - 0.5, -0.5))
            axes.set_yticks(range(len(labels)), labels)
            for summary in here:
                scores, line = summary.evaluations[:, -1], labels.index(summary.task.label)
                axes.scatter(
                    scores, np.full(len(scores), line), color=COLORS[0], s=12, alpha=0.6, linewidth=0
                )
                axes.plot([scores.mean()] * 2, [line - 0.3, line + 0.3], color=COLORS[1], linewidth=2)
            axes.axvline(here[0].evaluations[:, -1].mean(), color=COLORS[1], linestyle=":", linewidth=1)
        save(figure, path)


# What a run is drawn by: the first of each that it has logged.
TRAINING_TAGS = (TRAINING, "reward", "rewards/accuracies", "loss")
EVALUATION_TAGS = (EVALUATION, "eval/pass@1", "eval/true_reward", "eval/accuracy")


def draw_run(
    run: Path, path: Path, training_tag: str | None = None, evaluation_tag: str | None = None
) -> str:
    """Draws training and evaluation of one run against steps; returns first and last evaluation in words.

    A tag that is not given is the first of TRAINING_TAGS or EVALUATION_TAGS that the run has logged.
    """
    scalars = read_scalars(run)
    training_tag = training_tag or next((tag for tag in TRAINING_TAGS if tag in scalars), TRAINING)
    evaluation_tag = evaluation_tag or next((tag for tag in EVALUATION_TAGS if tag in scalars), EVALUATION)
    curve = make_curve(scalars, (training_tag, evaluation_tag), keep=evaluation_tag, rows=1000)
    evaluations = logged(curve, evaluation_tag)
    with rc_context(STYLE):
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        axes.plot(*logged(curve, training_tag), color=COLORS[0], label=f"training ({training_tag})")
        axes.plot(
            *evaluations,
            color=EVALUATION_COLOR,
            marker="o",
            markersize=4,
            label=f"evaluation ({evaluation_tag})",
        )
        axes.set(title=run.resolve().name, xlabel="steps")
        axes.legend(frameon=False)
        save(figure, path)
    drawn = f"Learning curve: {path}"
    if not len(evaluations[0]):
        return f"No evaluation was logged. {drawn}"
    first, last = (f"{evaluations[1][i]:.5g} at step {evaluations[0][i]:.0f}" for i in (0, -1))
    return f"First evaluation {first}, last evaluation {last}. {drawn}"
