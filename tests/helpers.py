"""Starting scripts as a user does, reading what a run has logged, and comparing checkpoints bit for bit."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.util.tensor_util import make_ndarray

REPOSITORY = Path(__file__).resolve().parent.parent
WALL_CLOCK = {"charts/SPS", "time/elapsed"}  # the only numbers that two equal runs may differ in


def start(script: str, *flags, cwd: Path, merge: bool = True, **environment: str) -> subprocess.Popen:
    """The script in a process of its own, started in `cwd`; its output and errors come line by line."""
    paths = (str(Path(__file__).parent), os.environ.get("PYTHONPATH", ""))
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"} | environment
    command = [sys.executable, str(REPOSITORY / script), *map(str, flags)]
    errors = subprocess.STDOUT if merge else subprocess.PIPE
    pipes = {"stdout": subprocess.PIPE, "stderr": errors, "text": True}
    # Where the tests run in the background Ctrl-C is ignored, and a process that is started inherits that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(command, cwd=cwd, env=variables, **pipes)
    finally:
        signal.signal(signal.SIGINT, before)


def run_script(script: str, *flags, cwd: Path, **environment: str) -> tuple[int, str]:
    """Exit code and output of the script."""
    with start(script, *flags, cwd=cwd, **environment) as process:
        output, _ = process.communicate(timeout=300)
        return process.returncode, output


def run_two_processes(script: str, port: int, *flags, cwd: Path) -> None:
    """The two processes that torchrun would start, without torchrun, which takes seconds to begin."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    processes = [start(script, *flags, cwd=cwd, RANK=rank, LOCAL_RANK=rank, **place) for rank in "01"]
    for process in processes:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output


def read_curves(run: Path) -> dict[str, dict[int, float]]:
    """Every scalar of a run, {tag: {step: value}}, wall-clock ones left out; a later file wins."""
    curves = {}
    for file in sorted(run.glob("events.out.tfevents.*"), key=lambda file: file.stat().st_mtime_ns):
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if value.tag not in WALL_CLOCK:
                    curves.setdefault(value.tag, {})[event.step] = make_ndarray(value.tensor).item()
    return curves


def steps_in_tensorboard(run: Path, wall_clock: bool = False) -> dict[str, list[int]]:
    """The steps at which TensorBoard shows each curve, {tag: steps}: what was purged is not among them.

    TensorBoard reads files in the order of their names, which hold the second. Tests resume within a second,
    so the files are renamed in the order of writing.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = sorted(run.glob("events.out.tfevents.*"), key=lambda file: file.stat().st_mtime_ns)
        for i, file in enumerate(files):
            shutil.copy(file, Path(folder, f"events.out.tfevents.{i:05}"))
        accumulator = EventAccumulator(folder, size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in accumulator.Tags()["scalars"] if wall_clock or tag not in WALL_CLOCK]
    return {tag: [event.step for event in accumulator.Scalars(tag)] for tag in tags}


def difference(one, other, path: str = "") -> str | None:
    """Where two checkpoints first differ in a single bit, or None."""
    if type(one) is not type(other):
        return f"{path}: {type(one)} and {type(other)}"
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return f"{path}: {sorted(one.keys() ^ other.keys())}"
        found = (difference(one[key], other[key], f"{path}.{key}") for key in one)
    elif isinstance(one, list | tuple):
        if len(one) != len(other):
            return f"{path}: {len(one)} and {len(other)} entries"
        found = (difference(a, b, f"{path}[{i}]") for i, (a, b) in enumerate(zip(one, other)))
    elif isinstance(one, torch.Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape
        if same:  # as bytes, since NumPy has no bfloat16
            one_bytes, other_bytes = (x.contiguous().flatten().view(torch.uint8) for x in (one, other))
            same = torch.equal(one_bytes, other_bytes)
        return None if same else f"{path}: {one} and {other}"
    else:
        return None if one == other else f"{path}: {one!r} and {other!r}"
    return next((place for place in found if place), None)


def checkpoint_difference(one: dict, other: dict, *, ignore: tuple[str, ...] = ()) -> str | None:
    """The same for whole checkpoints, apart from where the run lies, how it was started, and the clock."""

    def comparable(state: dict) -> dict:
        args = {name: value for name, value in state["args"].items() if name not in ("runs", "resume")}
        return {name: x for name, x in (state | {"args": args}).items() if name not in ("elapsed", *ignore)}

    return difference(comparable(one), comparable(other))
