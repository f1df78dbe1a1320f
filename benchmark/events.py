"""From TensorBoard event files to compact curves, and the curves on disk."""

import csv
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.util.tensor_util import make_ndarray

Curve = dict[str, np.ndarray]
"""Columns (K,) by name, "step" first; NaN where nothing was logged."""


class Series(NamedTuple):
    """All that was logged under one tag, in the order of the steps."""

    steps: np.ndarray  # (K,)
    values: np.ndarray  # (K,)
    wall_times: np.ndarray  # (K,), seconds since the epoch


def read_scalars(run: Path) -> dict[str, Series]:
    """Every scalar of a run directory by tag; SystemExit if there are no event files.

    A resumed run has several files, with the steps past the checkpoint twice: the later file holds. The files
    are read whole, because TensorBoard's accumulator keeps a sample only.
    """
    files = sorted(run.glob("events.out.tfevents.*"))  # the name goes on with the time of creation
    if not files:
        raise SystemExit(f"There are no TensorBoard event files in {run}")
    points: dict[str, dict[int, tuple[float, float]]] = defaultdict(dict)
    for file in files:
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name == "scalars":
                    points[value.tag][event.step] = (make_ndarray(value.tensor).item(), event.wall_time)
    series = {}
    for tag, by_step in points.items():
        steps = sorted(by_step)
        values, wall_times = np.array([by_step[step] for step in steps]).T
        series[tag] = Series(np.array(steps), values, wall_times)
    return series


def make_curve(scalars: dict[str, Series], tags: tuple[str, ...], keep: str, rows: int = 100) -> Curve:
    """The scalars `tags` as columns, thinned to about `rows` rows and those that have a value of `keep`."""
    steps = np.unique(np.concatenate([scalars[tag].steps for tag in tags if tag in scalars] or [[]]))
    chosen = np.linspace(0, len(steps) - 1, min(rows, len(steps))).round().astype(int)
    kept = steps[chosen]
    if keep in scalars:
        kept = np.union1d(kept, scalars[keep].steps)
    curve = {"step": kept} | {tag: np.full(len(kept), np.nan) for tag in tags}
    for tag in tags:
        if tag in scalars:
            _, rows_of_curve, rows_of_series = np.intersect1d(kept, scalars[tag].steps, return_indices=True)
            curve[tag][rows_of_curve] = scalars[tag].values[rows_of_series]
    return curve


def write_curve(path: Path, curve: Curve) -> None:
    """CSV with 5 significant digits; a cell without a value is empty."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(curve)
        for step, *values in zip(*curve.values(), strict=True):
            writer.writerow([int(step), *("" if np.isnan(value) else f"{value:.5g}" for value in values)])


def read_curve(path: Path) -> Curve:
    """What `write_curve` wrote."""
    with path.open(newline="") as file:
        header, *rows = csv.reader(file)
    columns = zip(*([float(cell or "nan") for cell in row] for row in rows), strict=True)
    return dict(zip(header, map(np.array, columns), strict=True))


def logged(curve: Curve, tag: str, x: str = "step") -> tuple[np.ndarray, np.ndarray]:
    """The column `x` and the column `tag`, both (K,), at the rows where `tag` has a value."""
    rows = ~np.isnan(curve[tag])
    return curve[x][rows], curve[tag][rows]
