"""Tables of a suite from its results, with intervals over seeds, beside the published figures."""

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from benchmark.figures import draw_scores, draw_suite
from benchmark.manifest import machine
from benchmark.results import Summary, bootstrap_interval, interquartile_mean, summarize
from benchmark.suites import Task


def reference_ratio(scores: np.ndarray, reference: float) -> np.ndarray:
    """Scores relative to a published figure, 1 where they are equal and more, up to 2, where they are better.

    Negative scores are costs, of which twice as much is half as good. Without the limit, one task on which
    others fail would make up for several lost ones.
    """
    ratio = scores / reference if reference > 0 else reference / scores
    return np.minimum(ratio, 2)


def number(x: float) -> str:
    return f"{x:.0f}" if abs(x) >= 100 else f"{x:.1f}" if abs(x) >= 10 else f"{x:.2f}"


def mean_and_std(scores: np.ndarray) -> str:
    """Mean and sample standard deviation over seeds (S,)."""
    if np.isnan(scores).all():
        return "–"
    mean = number(np.nanmean(scores))
    return f"{mean} ± {number(np.nanstd(scores, ddof=1))}" if len(scores) > 1 else mean


def iqm_and_interval(groups: list[np.ndarray]) -> str:
    low, high = bootstrap_interval(groups, interquartile_mean)
    return f"{number(interquartile_mean(np.concatenate(groups)))} [{number(low)}, {number(high)}]"


def table_row(summary: Summary) -> list[str]:
    evaluations = summary.evaluations
    published = {metric: "–" for metric in ("evaluation", "training")}
    for reference in summary.task.references:
        text = f"{number(reference.value)} ({reference.source})"
        known = published[reference.metric]
        published[reference.metric] = text if known == "–" else f"{known}, {text}"
    evaluation_cells = ["–"] * 4
    if evaluations.size:
        final, peak = evaluations[:, -1], evaluations[:, evaluations.mean(0).argmax()]
        evaluation_cells = [
            mean_and_std(final),
            iqm_and_interval([final]),
            mean_and_std(evaluations.max(1)),
            mean_and_std(peak),
        ]
    return [
        summary.task.environment,
        summary.task.label,
        str(len(summary.curves)),
        *evaluation_cells,
        published["evaluation"],
        mean_and_std(summary.training),
        published["training"],
        mean_and_std(summary.minutes),
    ]


MOST_CURVES = 4  # variants whose learning curves can be told apart; more are drawn by their scores, too
FIGURES = {
    "steps": "Learning curves, steps",
    "time": "Learning curves, time",
    "scores": "Final evaluations: seeds, their means, and the mean of the first variant dotted",
}
TRAINING_CELL = "training"  # named after what it is in the suite
HEADER = [
    "Environment",
    "Variant",
    "Seeds",
    "Final evaluation",
    "IQM [95% interval]",
    "Best evaluation of each seed",
    "Best evaluation of the mean",
    "Published evaluation",
    TRAINING_CELL,
    "Published training",
    "Minutes",
]

EXPLANATION = """\
Mean ± sample standard deviation over seeds. An evaluation is of the deterministic policy, on Atari of the one
that is played in training; with a language model it is what the heading says. The interquartile mean (IQM) is
that of the final evaluation, its interval a bootstrap over seeds. *Best evaluation of each seed* takes the
maximum over training seed by seed; *best evaluation of the mean* takes the point of training at which the
mean over seeds is highest, which is how Tianshou reports. Minutes are those of training, without the
evaluations, on the cores that the run had."""


def table(header: list[str], rows: list[list[str]]) -> str:
    """Markdown, with the columns aligned."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in [header, *rows]]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def aggregates(summaries: list[Summary]) -> str:
    """One sentence per variant that has several environments with a published evaluation."""
    sentences = []
    for label in dict.fromkeys(summary.task.label for summary in summaries):
        groups = []
        for summary in summaries:
            references = [r.value for r in summary.task.references if r.metric == "evaluation"]
            if summary.task.label == label and references and summary.evaluations.size:
                groups.append(reference_ratio(summary.evaluations[:, -1], max(references)))
        if len(groups) > 1:
            sentences.append(
                f"`{label}`, final evaluation relative to the best published one (1 is equal, more is "
                f"better, nothing counts more than 2): IQM over {len(groups)} environments "
                f"{iqm_and_interval(groups)}, with the 95% interval of a bootstrap stratified by "
                "environment.\n"
            )
    return "\n".join(sentences)


def extra_flags(summaries: list[Summary]) -> str:
    """Which tasks do not run with the defaults of their script."""
    tasks = [summary.task for summary in summaries if summary.task.flags]
    listed = "; ".join(f"{task.label} on {task.environment} with `{' '.join(task.flags)}`" for task in tasks)
    return f"All with the defaults of the scripts, but {listed}.\n" if tasks else ""


def provenance(manifests: list[dict]) -> str:
    """Which commits, packages and processors the results come from."""

    def distinct(values: Iterable[str]) -> str:
        return ", ".join(sorted(set(values)))

    commits = [(m["commit"] or "none")[:10] + ("+changes" if m["dirty"] else "") for m in manifests]
    packages = [f"{name} {version}" for m in manifests for name, version in m["packages"].items()]
    machines = distinct(map(machine, manifests))
    return f"Measured on {machines}, with {distinct(packages)}; commit {distinct(commits)}."


def image(title: str, path: Path, folder: Path) -> str:
    """A figure on a page in `folder`."""
    return f"![{title}]({Path(os.path.relpath(path, folder)).as_posix()})\n"


def write_page(suite: str, parts: list[str], summaries: list[Summary], results: Path) -> None:
    """Writes {results}/{suite}/README.md: the parts that are not empty, and where the results come from."""
    manifests = [manifest for summary in summaries for manifest in summary.manifests]
    parts = [f"# Results: {suite}\n", *parts]
    parts += [f"The first of {len(manifests)} runs; each result has a manifest beside it:\n"]
    parts += [f"    {manifests[0]['command']}\n", provenance(manifests)]
    (results / suite / "README.md").write_text("\n".join(part for part in parts if part) + "\n")


def write_report(suite: str, tasks: list[Task], results: Path, figures: Path) -> str:
    """Writes {results}/{suite}/README.md and two figures, {suite}_{kind}.png for kinds of FIGURES.

    Returns the table; SystemExit if there are no results.
    """
    summaries = [summary for task in tasks if (summary := summarize(suite, task, results))]
    if not summaries:
        raise SystemExit(
            f"There are no results of suite {suite} in {results}; python -m benchmark run makes them"
        )
    figures.mkdir(parents=True, exist_ok=True)
    several = len({summary.task.label for summary in summaries}) > MOST_CURVES
    images = []
    for kind in ("steps", "scores" if several else "time"):
        path = figures / f"{suite}_{kind}.png"
        if kind == "scores":
            draw_scores(summaries, path)
        else:
            draw_suite(summaries, path, axis=kind)
        images.append(image(FIGURES[kind], path, results / suite))
    names = ", ".join(dict.fromkeys(task.training_name for task in tasks))
    header = [names.capitalize() if cell == TRAINING_CELL else cell for cell in HEADER]
    evaluation = ", ".join(dict.fromkeys(task.evaluation_name for task in tasks))
    header = [cell.replace("evaluation", evaluation) for cell in header]
    text = table(header, [table_row(summary) for summary in summaries])
    aggregate = aggregates(summaries)
    page = [text + "\n", extra_flags(summaries), aggregate, EXPLANATION + "\n", *images]
    write_page(suite, page, summaries, results)
    return f"{text}\n\n{extra_flags(summaries)}\n{aggregate}".rstrip()
