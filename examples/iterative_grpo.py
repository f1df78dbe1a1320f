"""Iterative GRPO from the scripts: the reward model learns on from what the policy has come to write.

Algorithm 1 of Shao et al. (2024, section 4.1.4). In each iteration the policy becomes the reference, takes
steps of GRPO on the learned reward, and writes the completions from which the reward model learns on, with a
replay of earlier ones:

    python -m examples.iterative_grpo
    python -m examples.iterative_grpo --iterations 5 --beta 0

The first policy and the first reward model are those of ppo_llm.py. Each part is a run of its own, in the
folder --runs: `start`, `policy1`, `reward_model1`, `policy2`, and so on. The same command goes on with what
an interrupted one has left.
"""

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

import grpo_llm
import ppo_llm


@dataclass
class Args:
    iterations: int = 3  # outer iterations
    max_steps: int = 20  # steps of GRPO in each of them
    beta: float = 0.1  # weight of the KL to the policy at the start of the iteration
    num_rankings: int = 4096  # prompts whose completions are sampled and ranked in each iteration
    replay: float = 0.1  # share of earlier rankings among those that the reward model learns from
    reward_steps: int = 64  # steps of the reward model in each iteration
    reward_learning_rate: float = 5e-4  # below that of the first reward model, which began from nothing
    start_flags: str = ""  # flags of ppo_llm.py for the first two models: --start-flags="--sft-steps 500"
    seed: int = 1
    runs: str = "runs/iterative_grpo"


def with_replay(new: list[dict], old: list[dict], share: float, seed: int) -> list[dict]:
    """New rows, and as many old ones as make up `share` of the result; fewer if there are not so many."""
    count = min(round(len(new) * share / (1 - share)), len(old))
    return new + [row | {"replayed": True} for row in random.Random(seed).sample(old, count)]


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def main(args: Args) -> None:
    runs, task = Path(args.runs), ppo_llm.Reviews()
    start = ["--runs", args.runs, "--run-name", "start", "--seed", str(args.seed), *args.start_flags.split()]
    for stage in ("sft", "reward-model"):
        first = ppo_llm.parse_args([*start, "--stage", stage])
        ppo_llm.main(first)
    policy, reward_model = runs / "start" / "reference", runs / "start" / "reward_model"
    history = read_rows(runs / "start" / "rankings.jsonl")

    for i in range(1, args.iterations + 1):
        # The reference of GRPO is the model that it is given: here, the policy of the last iteration.
        flags = ["--model", str(policy), "--reward-model", str(reward_model), "--task", "ppo_llm:Reviews"]
        flags += ["--max-steps", str(args.max_steps), "--beta", str(args.beta), "--eval-samples", "1"]
        flags += ["--runs", args.runs, "--run-name", f"policy{i}", "--seed", str(args.seed + i)]
        policy = grpo_llm.main(grpo_llm.parse_args(flags)) / "model"

        # Rankings of what the new policy writes, as of ppo_llm.py's second stage.
        path = runs / f"rankings{i}.jsonl"
        if not path.exists():
            length = {"max_completion_length": task.max_completion_length}
            settings = replace(first, seed=args.seed + i, num_rankings=args.num_rankings, **length)
            rows = ppo_llm.sample_rankings(ppo_llm.read_model(policy), task, settings)
            rows = with_replay(rows, history, args.replay, args.seed + i)
            ppo_llm.write_file(path, "".join(json.dumps(row) + "\n" for row in rows))
        history += [row for row in read_rows(path) if "replayed" not in row]
        flags = ["--stage", "reward-model", "--model", str(policy), "--reward-model", str(reward_model)]
        flags += ["--dataset", str(path), "--reward-steps", str(args.reward_steps)]
        flags += ["--reward-learning-rate", str(args.reward_learning_rate)]
        flags += ["--runs", args.runs, "--run-name", f"reward_model{i}", "--seed", str(args.seed + i)]
        reward_model = ppo_llm.main(ppo_llm.parse_args(flags)) / "reward_model"


if __name__ == "__main__":
    main(tyro.cli(Args))
