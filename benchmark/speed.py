"""Steps per second of the scripts, end to end with logging, beside the peers at equal hyperparameters."""

import importlib.util
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from benchmark import manifest
from benchmark.events import read_scalars
from benchmark.report import table
from benchmark.runs import last_lines, start_process

DROPPED = 3  # iterations at the start, with compilation and warm-up
LOGGED_ONCE_PER_ITERATION = ("time/elapsed", "charts/SPS", "time/fps")  # whichever there is


@dataclass(frozen=True)
class Comparison:
    """Programs that do the same work; each takes `steps_flag` and --runs, and logs once per iteration."""

    name: str
    batch_size: int
    """steps per iteration, over all environments; or per entry of the log, if it has not one per iteration"""
    programs: dict[str, list[str]]
    """arguments after `python`, by name: "ours", and the names of peers"""
    batch_sizes: dict[str, int] = field(default_factory=dict)
    """those of programs that are to run for longer or shorter than the others"""
    threads: int = 1
    """threads, each on a core of its own"""
    steps_flag: str = "--total-timesteps"
    per_step: int = 1
    """what is counted, per step: the completions of a batch for a language model"""
    prepare: list[str] = field(default_factory=list)
    """arguments of a run before the others, whose folder `model` takes the place of {model} in theirs"""


def ppo_continuous(num_envs: int, num_steps: int) -> Comparison:
    """HalfCheetah-v5, 10 epochs of 32 minibatches; ours without what Stable-Baselines3 does not do."""
    sizes = ["--env-id", "HalfCheetah-v5", "--num-envs", str(num_envs), "--num-steps", str(num_steps)]
    equal = ["--eval-interval", "0", "--no-recompute-advantages", "--target-kl", "None"]
    return Comparison(
        f"ppo_continuous, HalfCheetah-v5, {num_envs} x {num_steps}",
        num_envs * num_steps,
        {
            "ours": ["ppo_continuous.py", *sizes, *equal],
            "sb3": ["-m", "benchmark.peers", "sb3", "--algorithm", "ppo", *sizes],
            "raw": ["-m", "benchmark.peers", "raw", *sizes],
        },
    )


def sb3(algorithm: str, env_id: str, num_envs: int, num_steps: int) -> list[str]:
    sizes = ["--env-id", env_id, "--num-envs", str(num_envs), "--num-steps", str(num_steps)]
    return ["-m", "benchmark.peers", "sb3", "--algorithm", algorithm, *sizes]


def trpo(num_envs: int, num_steps: int) -> Comparison:
    """HalfCheetah-v5, sb3-contrib's defaults: 15 products, 10 epochs of minibatches of 128, radius 0.01."""
    ours = ["trpo_mujoco.py", "--num-envs", str(num_envs), "--num-steps", str(num_steps)]
    ours += ["--cg-iterations", "15", "--max-kl", "0.01", "--eval-interval", "0"]
    return Comparison(
        f"trpo_mujoco, HalfCheetah-v5, {num_envs} x {num_steps}",
        num_envs * num_steps,
        {"ours": ours, "sb3": sb3("trpo", "HalfCheetah-v5", num_envs, num_steps)},
    )


def ppo_atari(threads: int, precision: str) -> Comparison:
    """Breakout, 4 epochs of 4 minibatches of 256; ours in bfloat16 or, as Stable-Baselines3, in float32."""
    sizes = ["--env-id", "ALE/Breakout-v5", "--num-envs", "8", "--num-steps", "128"]
    ours = ["ppo_atari.py", *sizes, "--eval-interval", "0"]
    cores = "2 cores" if threads == 2 else "1 core"
    return Comparison(
        f"ppo_atari, Breakout, 8 x 128, {precision}, {cores}",
        1024,
        {
            "ours": ours if precision == "bfloat16" else [*ours, "--no-bfloat16"],
            "sb3": ["-m", "benchmark.peers", "sb3", "--algorithm", "ppo", *sizes],
            "raw": ["-m", "benchmark.peers", "raw", *sizes],
        },
        threads=threads,
    )


def beside_trl(ours: list[str], trl: list[str], precision: str) -> dict[str, list[str]]:
    """Both programs in one precision; bfloat16 is the default of both."""
    flag = [] if precision == "bfloat16" else ["--no-bf16"]
    return {"ours": [*ours, *flag], "trl": [*trl, *flag]}


def grpo(precision: str) -> Comparison:
    """32 groups of 16 completions of the default model after its warm-up, one update, no reference."""
    ours = ["grpo_llm.py", "--model", "{model}", "--max-completion-length", "38", "--num-minibatches", "1"]
    ours += ["--learning-rate", "1e-5", "--eval-interval", "0", "--checkpoint-interval", "1000"]
    trl = ["-m", "benchmark.peers", "trl-grpo", "--model", "{model}"]
    return Comparison(
        f"grpo_llm, 32 x 16 completions, {precision}",
        1,
        beside_trl(ours, trl, precision),
        steps_flag="--max-steps",
        per_step=512,
        prepare=["grpo_llm.py", "--max-steps", "1", "--eval-interval", "0"],
    )


def dpo(precision: str) -> Comparison:
    """64 pairs a step that were sampled from the default model, its log-probabilities computed before."""
    words = ["--model", "{model}", "--dataset", "{model}/../pairs.jsonl"]
    ours = ["dpo_llm.py", *words, "--learning-rate", "1e-5", "--eval-interval", "0"]
    trl = ["-m", "benchmark.peers", "trl-dpo", *words]
    return Comparison(
        f"dpo_llm, 64 pairs, {precision}",
        1,
        beside_trl(ours, trl, precision),
        steps_flag="--max-steps",
        per_step=64,
        prepare=["dpo_llm.py", "--max-steps", "1", "--eval-interval", "0"],
    )


COMPARISONS = [
    ppo_continuous(1, 2048),
    ppo_continuous(8, 256),
    Comparison(
        "ppo_continuous, HalfCheetah-v5, with its defaults",
        2048,
        {
            "ours": ["ppo_continuous.py", "--env-id", "HalfCheetah-v5", "--eval-interval", "0"],
            "raw": ppo_continuous(32, 64).programs["raw"],
        },
    ),
    trpo(1, 2048),
    trpo(16, 128),
    Comparison(
        "ppo_discrete, CartPole-v1, 8 x 128, 10 epochs of minibatches of 64",
        1024,
        {
            "ours": ["ppo_discrete.py", "--eval-interval", "0", "--num-envs", "8", "--num-steps", "128"]
            + ["--update-epochs", "10", "--num-minibatches", "16"],
            "sb3": sb3("ppo", "CartPole-v1", 8, 128),
        },
    ),
    Comparison(
        "a2c_cartpole, CartPole-v1, 8 x 5",
        4000,  # Stable-Baselines3 logs every 100 iterations
        {
            "ours": ["a2c_cartpole.py", "--eval-interval", "0", "--num-envs", "8", "--num-steps", "5"],
            "sb3": sb3("a2c", "CartPole-v1", 8, 5),
        },
    ),
    Comparison(
        "a2c_cartpole, CartPole-v1, both with their defaults",
        100_000,
        {
            "ours": ["a2c_cartpole.py", "--eval-interval", "0"],
            "sb3": sb3("a2c", "CartPole-v1", 1, 5),
        },
        {"sb3": 1000},
    ),
    ppo_atari(2, "bfloat16"),
    ppo_atari(2, "float32"),
    grpo("bfloat16"),
    grpo("float32"),
    dpo("bfloat16"),
    dpo("float32"),
]


def prepared_model(arguments: list[str], folder: Path) -> Path:
    """The model of a run in `folder`; SystemExit with the end of its log if it fails."""
    log = folder / "log.txt"
    if start_process([*arguments, "--runs", str(folder)], log, manifest.available_cores()[-1:]).wait():
        raise SystemExit(f"python {shlex.join(arguments)} failed:\n{last_lines(log)}")
    return next(folder.glob("*/model"))


def measure_once(arguments: list[str], steps_flag: str, number: int, threads: int = 1) -> dict[str, float]:
    """One run in a process of its own, on the last cores; SystemExit with the end of its log if it fails.

    Returns steps per second after the DROPPED iterations, the seconds from the start of the process to the
    end of the first iteration, and the peak memory in MB; also the seconds of sampling in an iteration, where
    they are logged.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.txt"
        command = [*arguments, steps_flag, str(number), "--runs", folder]
        start = time.time()  # the clock of the event files
        process = start_process(command, log, manifest.available_cores()[-threads:])
        try:
            _, status, usage = os.wait4(process.pid, 0)  # Popen does not tell the memory of one child
        except KeyboardInterrupt:
            process.terminate()
            raise SystemExit("Interrupted; nothing was written") from None
        if status:
            raise SystemExit(f"python {shlex.join(command)} failed:\n{last_lines(log)}")
        run = next(Path(folder).rglob("events.out.tfevents.*")).parent
        scalars = read_scalars(run)
    tag = next(tag for tag in LOGGED_ONCE_PER_ITERATION if tag in scalars)
    steps, _, times = scalars[tag]
    sampling = scalars["time/rollout"][1][DROPPED:].tolist() if "time/rollout" in scalars else []
    bytes_per_unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return {
        "steps_per_second": (steps[-1] - steps[DROPPED - 1]) / (times[-1] - times[DROPPED - 1]),
        "startup_seconds": times[0] - start,
        "peak_memory_mb": usage.ru_maxrss * bytes_per_unit / 1e6,
    } | ({"sampling_seconds": statistics.median(sampling)} if sampling else {})


EXPLANATION = f"""\
# Speed

Environment steps per second, or completions of language models, for DPO pairs of them, end to end with
logging, the programs in turn, each with one thread on one core where the heading says nothing else; the
first {DROPPED} iterations do not count. *Ours / this* is how many times faster ours is. *Startup* is the time
from the start of the process to the end of the first iteration, *sampling* a part of an iteration. `sb3` is
Stable-Baselines3, or sb3-contrib for TRPO, on MuJoCo with VecNormalize, on Atari with its wrappers; `trl` is
TRL's trainer; `raw` is the environment alone, under random actions: the limit.
"""


def median(rounds: list[dict[str, float]], key: str) -> float:
    return statistics.median(measured[key] for measured in rounds)


def as_markdown(comparisons: dict[str, dict]) -> str:
    """A section with a table for each comparison."""
    text = EXPLANATION
    header = ["Program", "Rounds", "Median", "Ours / this", "Startup (s)", "Peak memory (MB)"]
    for name, comparison in comparisons.items():
        ours = median(comparison["programs"]["ours"], "steps_per_second")
        samples = all("sampling_seconds" in rounds[0] for rounds in comparison["programs"].values())
        rows = []
        for program, rounds in comparison["programs"].items():
            rate = median(rounds, "steps_per_second")
            each = ", ".join(f"{measured['steps_per_second']:.0f}" for measured in rounds)
            startup, memory = median(rounds, "startup_seconds"), median(rounds, "peak_memory_mb")
            rows.append(
                [program, each, f"{rate:.0f}", f"{ours / rate:.2f}", f"{startup:.1f}", f"{memory:.0f}"]
            )
            if samples:
                rows[-1].append(f"{median(rounds, 'sampling_seconds'):.3f}")
        columns = [*header, "Sampling (s)"] if samples else header
        description = comparison["manifest"]
        packages = ", ".join(f"{name} {version}" for name, version in description["packages"].items())
        text += f"\n## {name}\n\n{table(columns, rows)}\n\n{manifest.machine(description)}; {packages}.\n"
    return text


def measure(peers: tuple[str, ...], rounds: int, iterations: int, only: str, results: Path) -> str:
    """Runs the comparisons with `only` in their name; brings speed.json and speed.md in `results` up to date.

    Returns the text of speed.md; SystemExit with a sentence if a program fails or a peer is not installed.
    """
    chosen = [comparison for comparison in COMPARISONS if only in comparison.name]
    if not chosen:
        raise SystemExit(
            f"No comparison has {only!r} in its name; there are:\n" + "\n".join(c.name for c in COMPARISONS)
        )
    if rounds < 1 or iterations <= DROPPED:
        raise SystemExit(f"--rounds must be at least 1, --iterations more than {DROPPED}")
    for peer, package in (("sb3", "stable_baselines3"), ("trl", "trl")):
        needed = any(peer in comparison.programs for comparison in chosen)
        if peer in peers and needed and not importlib.util.find_spec(package):
            raise SystemExit(f"{package} is not installed: pip install .[peers], or leave it out of --peers")
    measured = {}
    for comparison in chosen:
        description = manifest.describe()
        folder = tempfile.TemporaryDirectory()
        model = str(prepared_model(comparison.prepare, Path(folder.name))) if comparison.prepare else ""
        programs = {name: p for name, p in comparison.programs.items() if name == "ours" or name in peers}
        taken: dict[str, list] = {name: [] for name in programs}
        for round in range(rounds):
            for name, arguments in programs.items():
                batch_size = comparison.batch_sizes.get(name, comparison.batch_size)
                arguments = [word.replace("{model}", model) for word in arguments]
                one = measure_once(
                    arguments, comparison.steps_flag, iterations * batch_size, comparison.threads
                )
                one["steps_per_second"] *= comparison.per_step
                taken[name].append(one)
                rate = taken[name][-1]["steps_per_second"]
                print(
                    f"{comparison.name}, round {round + 1}, {name}: {rate:.0f} steps per second", flush=True
                )
        folder.cleanup()
        commands = {name: shlex.join(["python", *arguments]) for name, arguments in programs.items()}
        measured[comparison.name] = {"commands": commands, "programs": taken, "manifest": description}
    results.mkdir(parents=True, exist_ok=True)
    path = results / "speed.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | measured, indent=2) + "\n")
    text = as_markdown(known | measured)
    (results / "speed.md").write_text(text)
    return text
