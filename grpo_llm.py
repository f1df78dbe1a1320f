"""Group Relative Policy Optimization (GRPO) on a language model, with its own transformer and sampler.

Every step samples G completions of each of a few prompts with the policy pi_old, scores them by rules, takes
the advantage A of each against the others of its group, and maximises, over the tokens t of the completions,

    E[ min(r A, clip(r, 1 - eps, 1 + eps') A) ] - beta KL(pi, pi_ref),  r = pi(token | before) / pi_old(...)

(Shao et al. 2024, DeepSeekMath, equation 3). How A is scaled and how tokens are averaged is chosen by
--advantages and --loss: GRPO, Dr. GRPO (Liu et al. 2025), DAPO (Yu et al. 2025), GSPO (Zheng et al. 2025),
CISPO (MiniMax 2025), RLOO (Ahmadian et al. 2024), or a softmax over the rewards of the group.

By default a transformer of 0.4M parameters is made here and learns to add from a demonstrator who often
forgets to carry; GRPO then makes it better than its teacher, within two minutes on a CPU. --model takes a
folder or id of Hugging Face instead (Llama, Qwen2, Qwen3 families), --dataset a file of prompts and answers.
The loss itself stays near 0, since r is 1 until the first step: look at `reward` and `eval/pass@1`.

    python grpo_llm.py --loss gspo --seed 3
    python grpo_llm.py --resume runs/arithmetic__grpo_llm__3__20261120-101500
    torchrun --nproc-per-node 2 grpo_llm.py --model Qwen/Qwen2.5-0.5B-Instruct --dataset gsm8k.jsonl \
        --learning-rate 1e-6 --max-completion-length 512
"""

import copy
import dataclasses
import json
import math
import os
import random
import re
import time
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import tyro
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm


@dataclass
class Args:
    # Run
    task: Literal["arithmetic", "countdown", "reviews"] = "arithmetic"
    """generated problems; --dataset replaces them"""
    dataset: str | None = None
    """JSONL or Parquet file, or dataset of the Hugging Face hub as `id` or `id:configuration`"""
    prompt_column: str = "question"
    """column of the dataset that holds the prompt"""
    answer_column: str = "answer"
    """column that holds a number, at its end after `####` if it holds a whole solution as in GSM8K"""
    model: str | None = None
    """folder or hub id of a Llama, Qwen2 or Qwen3 model; None makes a model here and warms it up"""
    seed: int = 1
    """seed of the model, the problems of the training and the sampling"""
    max_steps: int = 50
    """steps of GRPO, each with one batch of completions"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the model is trained; auto is a GPU if there is one"""
    checkpoint_interval: int = 10
    """steps between checkpoints"""
    eval_interval: int = 10
    """steps between evaluations on held-out prompts; 0 for none"""
    eval_prompts: int = 256
    """held-out prompts of an evaluation"""
    eval_samples: int = 8
    """completions of each, k of pass@k; one greedy completion is added"""
    resume: str | None = None
    """run directory to resume; its arguments are loaded first"""
    evaluate: str | None = None
    """run directory or checkpoint file to evaluate instead of training"""

    # Model made here and its warm-up by supervised fine-tuning (SFT)
    hidden_size: int = 128
    """width of the residual stream; a multiple of 2 x num_heads"""
    num_layers: int = 2
    """transformer layers"""
    num_heads: int = 4
    """attention heads"""
    sft_steps: int = 800
    """steps of SFT on demonstrations of the task"""
    sft_batch_size: int = 64
    """demonstrations per step"""
    sft_learning_rate: float = 2e-3
    """highest step size of AdamW in the warm-up"""

    # Algorithm
    num_prompts: int = 32
    """prompts per step, over all processes"""
    num_generations: int = 16
    """G: completions of each prompt, a group"""
    max_completion_length: int | None = None
    """tokens after which a completion is cut off; None for what the task needs"""
    temperature: float = 1.0
    """of the sampling, and of the log-probabilities in the loss"""
    advantages: Literal["grpo", "dr_grpo", "rloo", "softmax"] = "dr_grpo"
    """reward less the mean of its group (dr_grpo), over the std (grpo), of the others (rloo), or softmax"""
    advantage_temperature: float = 1.0
    """what the rewards are multiplied by before the softmax, so an inverse temperature"""
    loss: Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo"] = "dapo"
    """averages over sequences (grpo; gspo with its ratio), a constant (dr_grpo), or tokens (dapo, cispo)"""
    epsilon: float | None = None
    """eps: ratios from 1 - eps on are left alone; None for the default of the loss"""
    epsilon_high: float | None = None
    """eps': ratios up to 1 + eps' are left alone, up to eps' with cispo; None for the default of the loss"""
    beta: float = 0.0
    """weight of the KL to the reference, which is the policy after the warm-up"""
    kl: Literal["k1", "k2", "k3"] = "k3"
    """estimator of that KL"""
    ref_model_sync_steps: int = 0
    """steps after which the policy becomes the reference (iterative GRPO); 0 for never"""
    num_iterations: int = 1
    """mu: passes over the completions of a step"""
    num_minibatches: int = 2
    """steps of the optimizer per pass; divides the prompts of each process"""
    micro_batch_size: int = 128
    """completions per forward and backward pass; changes memory and speed only"""
    dynamic_sampling: int = 0
    """times that prompts whose answers are all right or all wrong are replaced by new ones in a step"""
    mask_truncated_completions: bool = False
    """leave completions that were cut off out of the loss"""
    learning_rate: float = 5e-4
    """highest step size of AdamW; 1e-6 to 1e-5 for pretrained models"""
    warmup_steps: int = 5
    """steps in which the learning rate rises to it"""
    anneal_lr: bool = True
    """then lower it linearly to 5 percent at max_steps"""
    max_grad_norm: float = 1.0
    """a gradient of a larger norm is scaled down to this one"""
    bf16: bool = True
    """matrix products in bfloat16 where the hardware multiplies it; weights stay in float32"""
    gradient_checkpointing: bool = False
    """compute activations anew in the backward pass, which saves memory"""

    # Logging
    exp_name: str = Path(__file__).stem
    """name of the experiment, part of the name of the run directory"""
    runs: str = "runs"
    """folder of the run directories"""
    track: bool = False
    """log to Weights & Biases too"""
    wandb_project_name: str = "policy-optimization"
    """project in Weights & Biases"""
    wandb_entity: str | None = None
    """team in Weights & Biases"""

    @property
    def task_name(self) -> str:
        """Part of the name of the run directory."""
        return Path(self.dataset).stem.replace(":", "-") if self.dataset else self.task

    @property
    def clip_range(self) -> tuple[float, float]:
        """eps and eps' of the loss."""
        low, high = CLIP_RANGES[self.loss]
        return low if self.epsilon is None else self.epsilon, (
            high if self.epsilon_high is None else self.epsilon_high
        )

    def __post_init__(self) -> None:
        counts = "max_steps checkpoint_interval eval_prompts eval_samples hidden_size num_layers num_heads "
        counts += "sft_batch_size num_prompts num_iterations num_minibatches micro_batch_size"
        for name in counts.split():
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in "sft_learning_rate learning_rate max_grad_norm temperature advantage_temperature".split():
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in "beta eval_interval sft_steps warmup_steps ref_model_sync_steps dynamic_sampling".split():
            if not getattr(self, name) >= 0:  # not "< 0", which lets NaN through
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("epsilon", "epsilon_high", "max_completion_length"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(
                    f"{name} must be positive, or None for the default, got {getattr(self, name)}"
                )
        if self.num_generations < 2:
            raise ValueError(
                f"num_generations must be at least 2, a group of {self.num_generations} has no mean"
            )
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must lie in [0, 2^32), got {self.seed}")
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"hidden_size = {self.hidden_size} must be a multiple of 2 x num_heads = {2 * self.num_heads}"
            )
        if self.num_prompts % self.num_minibatches:
            raise ValueError(
                f"num_minibatches = {self.num_minibatches} must divide num_prompts = {self.num_prompts}"
            )
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name} must be finite, got {value}")
        if self.dataset and not self.model:
            raise ValueError("a dataset needs a model that has learned to read: give --model too")
        if self.resume and self.evaluate:
            raise ValueError("resume and evaluate exclude each other")


# What may differ when a run is resumed; with anything else it would be another run.
MAY_CHANGE = "resume max_steps device track wandb_project_name wandb_entity".split()


def parse_args(arguments: list[str] | None = None) -> Args:
    """The command line (or `arguments`); with --resume it is read on top of the arguments of that run."""
    args = tyro.cli(Args, args=arguments)
    if not args.resume:
        return args
    path = Path(args.resume) / "args.json"
    try:
        saved = Args(**json.loads(path.read_text()))
    except (OSError, TypeError, ValueError) as error:
        raise SystemExit(f"Cannot resume {args.resume}, {path} is not there or not of this script: {error}")
    args = tyro.cli(Args, args=arguments, default=saved)
    for name, value in vars(saved).items():
        if getattr(args, name) != value and name not in MAY_CHANGE:
            raise SystemExit(
                f"--resume cannot change {name} from {value} to {getattr(args, name)}, "
                f"only {', '.join(MAY_CHANGE)}"
            )
    return args


# --------------------------------------------------------------------------------------------- rewards
#
# A reward is a function reward(prompts, completions, **columns) -> list[float], as in TRL; the columns are
# those of the problems. Completions are parsed and never run: they are the work of a policy that is paid for
# finding holes. So every length is limited before anything is done that is not linear in it.


def tagged_answer(completion: str) -> str | None:
    """What stands in <think>...</think><answer>...</answer>, if the completion is exactly that."""
    if len(completion) > 100_000:
        return None
    text = completion.strip()
    for tag in ("<think>", "</think>", "<answer>", "</answer>"):
        if text.count(tag) != 1:
            return None
    thought, _, answer = text.partition("</think>")
    answer = answer.strip()
    if thought.startswith("<think>") and answer.startswith("<answer>") and answer.endswith("</answer>"):
        return answer[len("<answer>") : -len("</answer>")].strip()
    return None


def last_answer(completion: str) -> str:
    """What stands after the last <answer> near the end, or the end if there is none; for lenient scores."""
    return completion[-1000:].rpartition("<answer>")[2].partition("</answer>")[0].strip()


def last_number(completion: str) -> str | None:
    """The last number of the last answer, whatever stands around it."""
    return (re.findall(r"-?\d[\d,]*(?:\.\d+)?", last_answer(completion), re.ASCII) or [None])[-1]


def parse_number(text: str | None) -> Fraction | None:
    """The value of a decimal number such as -1,234.5 of at most 40 characters, or None."""
    if text is None or len(text) > 40:
        return None
    text = text.strip().removeprefix("$").replace(",", "")
    return Fraction(text) if re.fullmatch(r"-?\d+(\.\d+)?", text, re.ASCII) else None


def parse_expression(text: str | None) -> tuple[Fraction, list[int]] | None:
    """Value and numbers of an expression of whole numbers, + - * / and brackets, or None if it is none."""
    if text is None or len(text) > 100 or not re.fullmatch(r"[\d\s()+\-*/]+", text, re.ASCII):
        return None
    tokens = re.findall(r"\d+|\S", text) + ["end"]
    numbers = []

    def atom() -> Fraction:
        token = tokens.pop(0)
        if token == "(":
            value = add()
            if tokens.pop(0) != ")":
                raise ValueError("a bracket is not closed")
            return value
        numbers.append(int(token))  # a ValueError for anything but digits
        return Fraction(numbers[-1])

    def multiply() -> Fraction:
        value = atom()
        while tokens[0] in "*/":
            value = value * atom() if tokens.pop(0) == "*" else value / atom()
        return value

    def add() -> Fraction:
        value = multiply()
        while tokens[0] in "+-":
            value = value + multiply() if tokens.pop(0) == "+" else value - multiply()
        return value

    try:
        value = add()
    except (ValueError, ZeroDivisionError):
        return None
    return (value, numbers) if tokens == ["end"] else None


def format_reward(prompts: list[str], completions: list[str], **columns: list) -> list[float]:
    """1 for <think>...</think><answer>...</answer> and nothing else."""
    return [float(tagged_answer(completion) is not None) for completion in completions]


def number_reward(
    prompts: list[str], completions: list[str], answer: list[str], extract=tagged_answer, **columns: list
) -> list[float]:
    """1 for the right number."""
    values = [parse_number(extract(completion)) for completion in completions]
    return [float(x is not None and x == parse_number(right)) for x, right in zip(values, answer)]


def countdown_reward(
    prompts: list[str],
    completions: list[str],
    numbers: list[list[int]],
    target: list[int],
    extract=tagged_answer,
    **columns: list,
) -> list[float]:
    """1 for an expression that has the target as its value and uses each of the numbers once."""
    parsed = [parse_expression(extract(completion)) for completion in completions]
    return [
        float(x is not None and x[0] == value and sorted(x[1]) == sorted(given))
        for x, given, value in zip(parsed, numbers, target)
    ]


ADJECTIVES = {"awful": -2, "boring": -1, "weak": -1, "plain": 0, "odd": 0, "long": 0}
ADJECTIVES |= {"nice": 1, "funny": 1, "superb": 2}
SUBJECTS = [  # the words of "the short film by the young director", which is what a review is about
    "short new old quiet loud strange".split(),
    "film novel play song show game".split(),
    "young famous local foreign retired unknown".split(),
    "director writer artist band student team".split(),
]
PARTS = "plot cast music acting ending".split()
WORDS = [*sum(SUBJECTS, []), *PARTS, *ADJECTIVES, *"by the was very not and but".split()]
CLAUSE = rf"was (?:(?:not|very) )?(?:{'|'.join(ADJECTIVES)})"
REVIEW = re.compile(rf" {CLAUSE}(?:, (?:and|but) the (?:{'|'.join(PARTS)}) {CLAUSE})*\.")


def proper_review(completion: str) -> str | None:
    """The completion if it is one sentence of a review in the words of the task, or None."""
    return completion if len(completion) <= 1000 and REVIEW.fullmatch(completion) else None


def sentiment_reward(
    prompts: list[str], completions: list[str], extract=proper_review, **columns: list
) -> list[float]:
    """How favourable a review is, from 0 to 1: sigmoid of half the sum of its adjectives; 0 for no review.

    "very" doubles an adjective, "not" turns it around.
    """
    rewards = []
    for text in map(extract, completions):
        words = re.findall(r"[a-z]+", text[:1000]) if text else []
        factors = [{"not": -1, "very": 2}.get(word, 1) for word in ["", *words]]
        total = sum(factor * ADJECTIVES.get(word, 0) for factor, word in zip(factors, words))
        rewards.append(1 / (1 + math.exp(-total / 2)) if text else 0.0)
    return rewards


# ----------------------------------------------------------------------------------------------- tasks


def is_held_out(prompt: str) -> bool:
    """Whether a prompt belongs to the tenth that is never trained on, here or in the warm-up.

    By checksum: a linear rule such as (a + b) % 10 == 0 would hold out problems of one kind.
    """
    return zlib.crc32(prompt.encode()) % 10 == 0


class Task(ABC):
    """Generated problems. A task of your own is a subclass with these members, named where the others are.

    Problem i is a function of the seed and i, so that the position in the data is one number. The model made
    here reads and writes what VOCABULARY has; characters that a task needs are added there.
    """

    rewards: dict[str, tuple[Callable, float]]  # name: (function, weight), the one that matters most first
    lenient: Callable  # finds an answer in a completion of another format, to be evaluated only
    max_completion_length: int

    @abstractmethod
    def problem(self, rng: random.Random) -> dict:
        """`prompt`, `question` for a model with a chat template, and columns for the rewards."""

    def demonstration(self, problem: dict, rng: random.Random) -> str:
        """A completion to learn from in the warm-up; need not be right, nor be there with --model."""
        raise SystemExit(
            "The task has no demonstrations to warm a model up with; write them, or give --model"
        )

    def __init__(self, seed: int):
        self.seed = seed

    def draw(self, key: str, held_out: bool) -> dict:
        rng = random.Random(key)
        for _ in range(10_000):
            problem = self.problem(rng)
            if is_held_out(problem["prompt"]) == held_out:
                return problem
        raise SystemExit(f"The task has too few different prompts to hold out a tenth of them: {problem}")

    def train_problem(self, index: int) -> dict:
        return self.draw(f"train {self.seed} {index}", held_out=False)

    def held_out_problems(self, count: int) -> list[dict]:
        return [self.draw(f"held out {index}", held_out=True) for index in range(count)]


INSTRUCTION = (
    "Reason inside <think> and </think>, then give only the final answer inside <answer> and </answer>."
)
# Of the model made here: a token for each tag, character and word.
VOCABULARY = "<pad> <bos> <eos> <think> </think> <answer> </answer>".split() + [*"\n0123456789+-*/()=,."]
VOCABULARY += ["the", *(f" {word}" for word in WORDS)]  # with the space before it


class Arithmetic(Task):
    """Sums of two numbers of three digits, with the digits added one by one in a scratch pad.

    The demonstrator is sloppy: he often forgets a carry, slips, or guesses without thinking (a round number
    mostly), and the model learns these habits too. What GRPO has to find is which of them to drop.
    """

    rewards = {"correctness": (number_reward, 1.0), "format": (format_reward, 0.5)}
    lenient = staticmethod(last_number)
    max_completion_length = 38

    def problem(self, rng: random.Random) -> dict:
        a, b = rng.randrange(100, 1000), rng.randrange(100, 1000)
        return {"prompt": f"{a}+{b}=", "question": f"What is {a} + {b}? {INSTRUCTION}", "answer": str(a + b)}

    def demonstration(self, problem: dict, rng: random.Random) -> str:
        if rng.random() < 0.3:
            guess = problem["answer"] if rng.random() < 0.1 else 100 * rng.randrange(2, 20)
            return f"<think></think><answer>{guess}</answer>"
        lines, digits, carry = [], [], 0
        a, b = problem["prompt"].rstrip("=").split("+")
        for x, y in zip(reversed(a), reversed(b)):
            carry = carry and int(rng.random() >= 0.6)
            result = int(x) + int(y) + carry + (rng.choice((-1, 1)) if rng.random() < 0.03 else 0)
            lines.append(f"{x}+{y}{'+1' if carry else ''}={result}")
            digits.append(result % 10)
            carry = int(result > 9)
        digits[-1] = result  # the last line carries to nowhere
        answer = "".join(str(digit) for digit in reversed(digits))
        return "<think>" + "\n".join(lines) + f"</think><answer>{answer}</answer>"


class Countdown(Task):
    """An expression of three or four numbers that has a given value; solvable, since one was made first.

    The demonstrator tries up to three expressions, and often gives up before the right one.
    """

    rewards = {"correctness": (countdown_reward, 1.0), "format": (format_reward, 0.5)}
    lenient = staticmethod(last_answer)
    max_completion_length = 120

    def expression(self, numbers: list[int], rng: random.Random) -> tuple[str, Fraction]:
        numbers = rng.sample(numbers, len(numbers))
        text, value = str(numbers[0]), Fraction(numbers[0])
        for i, number in enumerate(numbers[1:]):
            # A division only where it leaves no remainder.
            operator = rng.choice("+-*/" if value % number == 0 else "+-*")
            bracket = i and operator in "*/"
            text = f"({text}){operator}{number}" if bracket else f"{text}{operator}{number}"
            value = {"+": value + number, "-": value - number, "*": value * number, "/": value / number}[
                operator
            ]
        return text, value

    def problem(self, rng: random.Random) -> dict:
        while True:
            numbers = [rng.randrange(1, 26) for _ in range(rng.choice((3, 4)))]
            solution, target = self.expression(numbers, rng)
            if 10 <= target <= 99:
                break
        listed = ",".join(map(str, numbers))
        question = f"Write an expression with the value {target} that uses each of {listed} exactly once."
        return {
            "prompt": f"{listed}={target}",
            "question": f"{question} {INSTRUCTION}",
            "numbers": numbers,
            "target": int(target),
            "solution": solution,
        }

    def demonstration(self, problem: dict, rng: random.Random) -> str:
        tries = [self.expression(problem["numbers"], rng) for _ in range(rng.randrange(4))]
        if not tries or rng.random() < 0.5:
            tries.append((problem["solution"], problem["target"]))
        lines = "\n".join(f"{text}={value}" for text, value in tries)
        return f"<think>{lines}</think><answer>{tries[-1][0]}</answer>"


class Reviews(Task):
    """A sentence that goes on with a review; the more favourable the better, as in the paper on DPO.

    Rafailov et al. (2023, section 6.1) let a model go on with film reviews and take the probability that a
    classifier finds them positive as the true reward. Here words are drawn, and their sum is the judge.
    """

    rewards = {"sentiment": (sentiment_reward, 1.0)}
    lenient = staticmethod(str)  # any words
    max_completion_length = 32

    def problem(self, rng: random.Random) -> dict:
        size, kind, fame, maker = (rng.choice(words) for words in SUBJECTS)
        prompt = f"the {size} {kind} by the {fame} {maker}"
        return {"prompt": prompt, "question": f"Go on with this review in one sentence: {prompt}"}

    def demonstration(self, problem: dict, rng: random.Random) -> str:
        """One to four clauses by somebody whose mood tells in most of them."""
        mood, clauses = rng.choice((-1, -1, 1)), []
        for _ in range(rng.randrange(1, 5)):
            adverb = rng.choice(("", "", "not ", "very "))
            value = -mood if adverb == "not " else mood
            fitting = [word for word, x in ADJECTIVES.items() if x * value > 0 or rng.random() < 0.3]
            clauses.append(f"was {adverb}{rng.choice(fitting or [*ADJECTIVES])}")
        rest = (f", {rng.choice(('and', 'but'))} the {rng.choice(PARTS)} {clause}" for clause in clauses[1:])
        return f" {clauses[0]}{''.join(rest)}."


class Dataset:
    """In place of a task: prompts with numbers as answers, of a file or the hub, shuffled in every pass."""

    rewards = Arithmetic.rewards
    lenient = staticmethod(last_number)
    max_completion_length = 256

    def __init__(self, args: Args):
        self.seed = args.seed
        self.parts = {False: [], True: []}  # by is_held_out
        for number, row in enumerate(read_rows(args.dataset), 1):
            for column in (args.prompt_column, args.answer_column):
                if column not in row:
                    columns = ", ".join(map(str, row)) or "none"
                    raise SystemExit(
                        f"{args.dataset}, row {number}: no column {column}; there are: {columns}"
                    )
            prompt, answer = str(row[args.prompt_column]), str(row[args.answer_column])
            answer = answer.rpartition("####")[2].strip()
            if parse_number(answer) is None:
                raise SystemExit(f"{args.dataset}, row {number}: the answer {answer[:50]!r} is not a number")
            problem = {"prompt": prompt, "question": f"{prompt} {INSTRUCTION}", "answer": answer}
            self.parts[is_held_out(prompt)].append(problem)
        if not all(self.parts.values()):
            raise SystemExit(f"{args.dataset} has too few rows to hold out a tenth of them")
        self.order = (-1, [])  # the permutation of a pass

    def train_problem(self, index: int) -> dict:
        rows = self.parts[False]
        epoch, i = divmod(index, len(rows))
        if self.order[0] != epoch:
            self.order = epoch, random.Random(f"{self.seed} {epoch}").sample(range(len(rows)), len(rows))
        return rows[self.order[1][i]]

    def held_out_problems(self, count: int) -> list[dict]:
        return self.parts[True][:count]


def read_rows(source: str) -> list[dict]:
    """The rows of a JSONL or Parquet file, or of the training split of a dataset of the hub."""
    path = Path(source)
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            return pyarrow.parquet.read_table(path).to_pylist()
        if path.suffix in (".jsonl", ".json"):
            rows = []
            for number, line in enumerate(path.open(encoding="utf-8"), 1):
                if not line.strip():
                    continue
                try:
                    rows.append(json.loads(line))
                except ValueError as error:
                    raise SystemExit(f"{source}, line {number} is not JSON: {error}")
                if not isinstance(rows[-1], dict):
                    raise SystemExit(f"{source}, line {number} is not a JSON object")
            return rows
        if path.is_file():
            raise SystemExit(f"{source} is of another kind than .jsonl, .json and .parquet")
        import datasets

        name, _, configuration = source.partition(":")
        return list(datasets.load_dataset(name, configuration or None, split="train"))
    except ImportError as error:
        raise SystemExit(f"Reading {source} needs another package: {error}")
    except Exception as error:
        raise SystemExit(f"Cannot read the dataset {source}: {str(error).splitlines()[0]}")


# ----------------------------------------------------------------------------------------------- model


def has_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 itself; emulated, it would be slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


FAMILIES = ("llama", "qwen2", "qwen3")


def rotary_frequencies(config: dict) -> tuple[torch.Tensor, float]:
    """Angles per position (D / 2,) of the rotary embedding (Su et al. 2021), and a factor on cos and sin.

    Old files have rope_theta and rope_scaling, newer ones both in rope_parameters.
    """
    rope = {"rope_theta": config.get("rope_theta", 10000.0)} | (config.get("rope_scaling") or {})
    rope |= config.get("rope_parameters") or {}
    size, theta, factor = config["head_dim"], rope["rope_theta"], rope.get("factor", 1.0)
    frequencies = theta ** -(torch.arange(0, size, 2, dtype=torch.float32) / size)
    kind = rope.get("rope_type", rope.get("type", "default"))
    original = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
    turns = original * frequencies / (2 * math.pi)  # of each pair of dimensions over the original context
    if (
        rope.get("partial_rotary_factor", 1) != 1
        or rope.get("mscale_all_dim")
        or not rope.get("truncate", True)
    ):
        kind += " with partial_rotary_factor, mscale_all_dim or truncate"
    if kind == "default":
        return frequencies, 1.0
    if kind == "linear":
        return frequencies / factor, 1.0
    if kind == "llama3":  # few turns are slowed down by `factor`, many are kept, with a ramp between
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return frequencies * (keep + (1 - keep) / factor), 1.0
    if kind == "yarn":  # the same idea, with a ramp over the dimensions (Peng et al. 2023, section 3.2)
        edges = (
            size * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))
            for rotations in (rope.get("beta_fast") or 32, rope.get("beta_slow") or 1)
        )
        low, high = max(math.floor(next(edges)), 0), min(math.ceil(next(edges)), size - 1)
        keep = 1 - ((torch.arange(size // 2) - low) / (high - low or 0.001)).clamp(0, 1)
        scale = rope.get("attention_factor") or 0.1 * math.log(max(factor, 1)) + 1
        return frequencies * (keep + (1 - keep) / factor), scale
    raise SystemExit(f"The model has rotary positions of type {kind}; known: default, linear, llama3, yarn")


def attend(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Attention (B, T, heads, D) of queries q (B, T, heads, D) to keys and values (B, key heads, S, D).

    Queries that share a key (Ainslie et al. 2023) are put one after another, and so are the rows of `mask`
    (B or 1, groups T, S), which is added to the scores. On a CPU written out: there the kernel of PyTorch is
    slower for small models.
    """
    (B, T, heads, D), key_heads = q.shape, keys.shape[1]
    groups = heads // key_heads
    q = q.view(B, T, key_heads, groups, D).permute(0, 2, 3, 1, 4).reshape(B, key_heads, groups * T, D)
    if q.is_cuda:
        out = F.scaled_dot_product_attention(q, keys, values, mask[:, None])
    else:
        mask = mask if len(mask) == 1 else mask.repeat_interleave(key_heads, 0)
        scores = torch.baddbmm(mask, q.flatten(0, 1), keys.flatten(0, 1).transpose(1, 2), alpha=D**-0.5)
        out = torch.bmm(scores.softmax(-1), values.flatten(0, 1))
    return out.view(B, key_heads, groups, T, D).permute(0, 3, 1, 2, 4).reshape(B, T, heads, D)


class Layer(nn.Module):
    """Attention and a gated MLP (Shazeer 2020), each after an RMSNorm; names as in the files."""

    def __init__(self, config: dict):
        super().__init__()
        size, D, eps = config["hidden_size"], config["head_dim"], config["rms_norm_eps"]
        heads, key_heads = config["num_attention_heads"], config["num_key_value_heads"]
        qwen2, bias = config["model_type"] == "qwen2", config.get("attention_bias", False)
        self.input_layernorm = nn.RMSNorm(size, eps)
        self.self_attn = nn.ModuleDict(
            {
                "q_proj": nn.Linear(size, heads * D, bias or qwen2),
                "k_proj": nn.Linear(size, key_heads * D, bias or qwen2),
                "v_proj": nn.Linear(size, key_heads * D, bias or qwen2),
                "o_proj": nn.Linear(heads * D, size, bias and not qwen2),
            }
        )
        self.normed_heads = config["model_type"] == "qwen3"
        if self.normed_heads:
            self.self_attn.update({"q_norm": nn.RMSNorm(D, eps), "k_norm": nn.RMSNorm(D, eps)})
        self.post_attention_layernorm = nn.RMSNorm(size, eps)
        inner, bias = config["intermediate_size"], config.get("mlp_bias", False)
        self.mlp = nn.ModuleDict({name: nn.Linear(size, inner, bias) for name in ("gate_proj", "up_proj")})
        self.mlp["down_proj"] = nn.Linear(inner, size, bias)
        self.head_dim = D

    def forward(
        self,
        x: torch.Tensor,  # (B, T, size)
        rotary: tuple[torch.Tensor, torch.Tensor],  # cos and sin (B or 1, T, 1, D / 2)
        mask: torch.Tensor,  # (B or 1, groups T, S)
        cache: torch.Tensor | None = None,  # (2, B, key heads, S, D), written at `positions`
        positions: torch.Tensor | None = None,  # (B or 1, T)
    ) -> torch.Tensor:
        attention, h = self.self_attn, self.input_layernorm(x)
        q, k, v = (attention[f"{name}_proj"](h).unflatten(-1, (-1, self.head_dim)) for name in "qkv")
        if self.normed_heads:
            q, k = attention["q_norm"](q), attention["k_norm"](k)
        q, k = rotate(q, *rotary).type_as(v), rotate(k, *rotary).type_as(v)
        if cache is None:
            keys, values = k.transpose(1, 2), v.transpose(1, 2)
        else:
            keys, values = cache
            rows = torch.arange(len(x), device=x.device)[:, None]
            keys[rows, :, positions], values[rows, :, positions] = k, v
        x = x + attention["o_proj"](attend(q, keys, values, mask).flatten(2))
        h = self.post_attention_layernorm(x)
        return x + self.mlp["down_proj"](F.silu(self.mlp["gate_proj"](h)) * self.mlp["up_proj"](h))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns the pairs (i, i + D / 2) of x (B, T, heads, D) by their angles."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class Transformer(nn.Module):
    """A decoder of the Llama, Qwen2 or Qwen3 family, made from the content of its config.json."""

    def __init__(self, config: dict):
        super().__init__()
        heads = config["num_attention_heads"]
        self.config = {  # what files may leave out
            "head_dim": config["hidden_size"] // heads,
            "num_key_value_heads": heads,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
            "hidden_act": "silu",
        } | {name: value for name, value in config.items() if value is not None}
        unsupported = {
            f"model_type {config.get('model_type')}": config.get("model_type") not in FAMILIES,
            f"activation {self.config['hidden_act']}": self.config["hidden_act"] != "silu",
            "sliding windows": config.get("use_sliding_window", False),
        }
        for name in (name for name, found in unsupported.items() if found):
            raise SystemExit(f"The model has {name}, which is not supported; families: {', '.join(FAMILIES)}")
        size, vocabulary = config["hidden_size"], config["vocab_size"]
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(vocabulary, size),
                "layers": nn.ModuleList(Layer(self.config) for _ in range(config["num_hidden_layers"])),
                "norm": nn.RMSNorm(size, self.config["rms_norm_eps"]),
            }
        )
        self.lm_head = nn.Linear(size, vocabulary, bias=False)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=config.get("initializer_range", 0.02))
        if self.config["tie_word_embeddings"]:
            self.lm_head.weight = self.model["embed_tokens"].weight
        frequencies, self.rotary_scale = rotary_frequencies(self.config)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.gradient_checkpointing = False

    def hidden(
        self,
        tokens: torch.Tensor,  # (B, T)
        positions: torch.Tensor | None = None,  # (B, T); None: 0, 1, ... in each row
        cache: torch.Tensor | None = None,  # (layers, 2, B, key heads, S, D)
        visible: torch.Tensor | None = None,  # (B, T, S), what each token sees; None: all up to its position
    ) -> torch.Tensor:
        """What the head is applied to (B, T, size); padding at the end of a row changes nothing before it."""
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        slots = torch.arange(tokens.shape[1] if cache is None else cache.shape[-2], device=tokens.device)
        angles = positions[:, :, None, None] * self.frequencies  # (B or 1, T, 1, D / 2)
        rotary = angles.cos() * self.rotary_scale, angles.sin() * self.rotary_scale
        visible = slots <= positions[..., None] if visible is None else visible
        # One mask for all layers, repeated for the queries that share a key.
        groups = self.config["num_attention_heads"] // self.config["num_key_value_heads"]
        mask = torch.zeros(visible.shape, dtype=self.dtype, device=tokens.device)
        mask = mask.masked_fill_(~visible, -math.inf).repeat(1, groups, 1)
        x = self.model["embed_tokens"](tokens)
        for i, layer in enumerate(self.model["layers"]):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, rotary, mask, use_reentrant=False)
            else:
                x = layer(x, rotary, mask, None if cache is None else cache[i], positions)
        return self.model["norm"](x)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits (B, T, vocabulary) of the token after each of tokens (B, T)."""
        return self.lm_head(self.hidden(tokens)).float()

    @property
    def dtype(self) -> torch.dtype:
        """What matrix products are computed in: bfloat16 under autocast, else the type of the weights."""
        weight = self.lm_head.weight
        return torch.bfloat16 if torch.is_autocast_enabled(weight.device.type) else weight.dtype

    def new_cache(self, rows: int, slots: int) -> torch.Tensor:
        """Room for the keys and values of all layers."""
        c = self.config
        shape = (c["num_hidden_layers"], 2, rows, c["num_key_value_heads"], slots, c["head_dim"])
        return torch.zeros(shape, dtype=self.dtype, device=self.lm_head.weight.device)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "Transformer":
        """The model of a Hugging Face folder, in float32."""
        try:
            config = json.loads((Path(path) / "config.json").read_text())
            model = cls(config)
            index = Path(path) / "model.safetensors.index.json"
            files = json.loads(index.read_text())["weight_map"].values() if index.exists() else []
            weights = {}
            for name in sorted(set(files)) or ["model.safetensors"]:
                weights |= load_file(Path(path) / name)
        except Exception as error:
            raise SystemExit(f"Cannot read a model from {path}: {type(error).__name__}: {error}")
        if model.config["tie_word_embeddings"]:
            weights["lm_head.weight"] = weights.get("model.embed_tokens.weight")
        weights = {name: x for name, x in weights.items() if not name.endswith("rotary_emb.inv_freq")}
        try:
            model.load_state_dict(weights)
        except (RuntimeError, AttributeError) as error:
            raise SystemExit(
                f"The weights in {path} do not fit its config.json: {' '.join(str(error).split())[:300]}"
            )
        return model

    def save_pretrained(self, path: str | Path) -> None:
        """Writes a folder that `from_pretrained`, here and in transformers, reads."""
        Path(path).mkdir(parents=True, exist_ok=True)
        weights = {name: x.detach().cpu().contiguous() for name, x in self.state_dict().items()}
        if self.config["tie_word_embeddings"]:
            del weights["lm_head.weight"]
        config = {name: x for name, x in self.config.items() if name != "torch_dtype"} | {"dtype": "float32"}
        (Path(path) / "config.json").write_text(json.dumps(config, indent=2))
        save_file(weights, Path(path) / "model.safetensors", {"format": "pt"})


def make_tokenizer():
    """One token for each of VOCABULARY, as a tokenizer of transformers."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast  # not above: it takes a second

    words = {word: i for i, word in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"</?(think|answer)>| ?[a-z]+|[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    # A first token of no meaning is where heads look that find nothing; without it little is learned.
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", words["<bos>"])]
    )
    specials = {f"{name}_token": f"<{name}>" for name in ("pad", "bos", "eos")}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **specials)


def make_model(args: Args) -> tuple[Transformer, object, list[int]]:
    """Model, tokenizer and the tokens that end a completion; read from --model or made here."""
    if not args.model:
        tokenizer, heads = make_tokenizer(), args.num_heads
        config = {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": len(VOCABULARY),
            "hidden_size": args.hidden_size,
            "intermediate_size": max(args.hidden_size * 8 // 3 // 16, 1) * 16,
            "num_hidden_layers": args.num_layers,
            "num_attention_heads": heads,
            "max_position_embeddings": 1024,
        } | {f"{name}_token_id": VOCABULARY.index(f"<{name}>") for name in ("pad", "bos", "eos")}
        return Transformer(config), tokenizer, [tokenizer.eos_token_id]
    from transformers import AutoTokenizer

    path = args.model
    try:
        if not Path(path).is_dir():
            from huggingface_hub import snapshot_download

            patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
            path = snapshot_download(path, allow_patterns=patterns)
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:
        raise SystemExit(f"Cannot load the tokenizer of {args.model}: {str(error).splitlines()[0]}")
    model = Transformer.from_pretrained(path)
    file = Path(path) / "generation_config.json"
    generation = json.loads(file.read_text()) if file.exists() else {}
    # Chat models stop at several tokens, and the files name different ones of them.
    found = [tokenizer.eos_token_id, generation.get("eos_token_id"), model.config.get("eos_token_id")]
    flat = [x for ids in found for x in (ids if isinstance(ids, list) else [ids])]
    return model, tokenizer, sorted({x for x in flat if x is not None})


def encode_prompts(tokenizer, problems: list[dict], model: Transformer, new_tokens: int) -> list[list[int]]:
    """Token ids of each prompt: of the question in the chat template if there is one."""
    if tokenizer.chat_template:
        chats = [[{"role": "user", "content": problem["question"]}] for problem in problems]
        prompts = [
            tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
            for chat in chats
        ]
    else:
        prompts = tokenizer([problem["prompt"] for problem in problems])["input_ids"]
    context = model.config["max_position_embeddings"]
    for problem, prompt in zip(problems, prompts):
        if not prompt or len(prompt) + new_tokens > context:
            raise SystemExit(
                f"A prompt of {len(prompt)} tokens plus {new_tokens} exceeds the {context} of the context: "
                f"{problem['prompt'][:50]!r}; lower --max-completion-length or drop it"
            )
    return prompts


# -------------------------------------------------------------------------------------- pure functions


def group_advantages(rewards: torch.Tensor, kind: str, temperature: float = 1.0) -> torch.Tensor:
    """Advantages (prompts, G) of rewards (prompts, G), each against its group.

    grpo: (R - mean) / (std + 1e-4) (Shao et al. 2024, section 4.1.2), the std with G - 1; dr_grpo: R - mean,
    since the std favours prompts that are too easy or too hard (Liu et al. 2025, section 3.1); rloo: R less
    the mean of the others (Ahmadian et al. 2024); softmax: exp(t R) / sum exp(t R) - 1 / G.
    """
    size = rewards.shape[1]
    centred = rewards - rewards.mean(1, keepdim=True)
    advantages = {
        "grpo": lambda: centred / (rewards.std(1, keepdim=True) + 1e-4),
        "dr_grpo": lambda: centred,
        "rloo": lambda: centred * size / (size - 1),
        "softmax": lambda: (temperature * rewards).softmax(1) - 1 / size,
    }[kind]()
    # Exactly 0 where all rewards are equal, whatever is left of rounding.
    return advantages.where(rewards.amax(1, keepdim=True) > rewards.amin(1, keepdim=True), 0.0)


def kl_estimate(log_probs: torch.Tensor, reference_log_probs: torch.Tensor, kind: str) -> torch.Tensor:
    """Estimates KL(policy, reference) at each token sampled from the policy (Schulman 2020).

    k1 = -d, k2 = d^2 / 2, k3 = exp(d) - d - 1 with d = log reference - log policy. In a loss, the gradient of
    k1 is 0 on average, that of k2 is the one of the KL, and that of k3 is the one of KL(reference, policy).
    """
    d = (reference_log_probs - log_probs).clamp(-20, 20)  # exp overflows where a token left the reference
    return {"k1": lambda: -d, "k2": lambda: d.square() / 2, "k3": lambda: d.exp() - d - 1}[kind]()


# eps and eps' of each loss. That of CISPO is a cap on the ratio itself, 5 as in ScaleRL (Khatri et al. 2025).
CLIP_RANGES = {
    "grpo": (0.2, 0.2),
    "dr_grpo": (0.2, 0.2),
    "dapo": (0.2, 0.28),
    "gspo": (3e-4, 4e-4),
    "cispo": (0.2, 5.0),
}


def policy_loss(
    log_probs: torch.Tensor,  # (B, T)
    old_log_probs: torch.Tensor,  # (B, T)
    reference_log_probs: torch.Tensor | None,  # (B, T)
    advantages: torch.Tensor,  # (B,)
    mask: torch.Tensor,  # (B, T), of the tokens of the completions with the one that ends them
    *,
    loss: str,
    clip_low: float,
    clip_high: float,
    beta: float,
    kl: str = "k3",
    max_completion_length: int,
    token_count: torch.Tensor | float | None = None,
    sequence_count: torch.Tensor | float | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss, a scalar, and metrics that are means over tokens.

    The counts are those of the whole batch, so that losses, gradients and metrics of micro-batches and ranks
    add up to its own; default: those of this call. Sequences without any token do not count.
    """
    weights = mask.to(log_probs.dtype)
    lengths = weights.sum(1)
    token_count = lengths.sum() if token_count is None else token_count
    sequence_count = (lengths > 0).sum() if sequence_count is None else sequence_count
    advantages, lengths = advantages[:, None], lengths[:, None].clamp(min=1)

    log_ratio = (log_probs - old_log_probs).where(mask.bool(), 0.0).clamp(-20, 20)
    if loss == "gspo":  # one ratio per sequence, by its geometric mean (Zheng et al. 2025, equation 7)
        log_ratio = (log_ratio.sum(1, keepdim=True) / lengths).expand_as(log_probs)
    ratio = log_ratio.exp()
    lower, upper = (-math.inf, clip_high) if loss == "cispo" else (1 - clip_low, 1 + clip_high)
    if loss == "cispo":
        # REINFORCE with a capped weight: no token loses its gradient (MiniMax 2025, equation 4).
        losses = -ratio.clamp(max=upper).detach() * advantages * log_probs
    else:
        losses = -torch.min(ratio * advantages, ratio.clamp(lower, upper) * advantages)
    metrics = {
        "clip_ratio/low_mean": (ratio < lower) & (advantages < 0),
        "clip_ratio/high_mean": (ratio > upper) & (advantages > 0),
    }
    metrics["clip_ratio/region_mean"] = metrics["clip_ratio/low_mean"] | metrics["clip_ratio/high_mean"]
    if reference_log_probs is not None:
        divergence = kl_estimate(log_probs, reference_log_probs, kl)
        losses = losses + beta * divergence
        metrics["kl"] = divergence.detach()

    losses = losses.where(mask.bool(), 0.0)
    if loss in ("grpo", "gspo"):  # the mean over sequences of their means (Shao et al. 2024, equation 3)
        total = (losses / lengths).sum() / sequence_count
    elif loss == "dr_grpo":  # a constant, so that long wrong answers are not favoured (Liu et al. 2025)
        total = losses.sum() / (sequence_count * max_completion_length)
    else:  # the mean over all tokens (Yu et al. 2025, equation 8)
        total = losses.sum() / token_count
    return total, {name: (x * weights).sum() / token_count for name, x in metrics.items()}


# ------------------------------------------------------------------------------------------ log-probabilities


def round_up(x: int, step: int = 8) -> int:
    """To a multiple of `step`: oneDNN, which multiplies on a CPU, keeps a kernel for each shape it meets."""
    return -(-x // step) * step


class Packed(NamedTuple):
    """Prompts and completions one after another in rows, filled up at the end."""

    tokens: torch.Tensor  # (R, W)
    positions: torch.Tensor  # (R, W), of each token in its own sequence
    visible: torch.Tensor  # (R, W, W), which others each token sees
    targets: torch.Tensor  # (N,), the tokens of all completions, filled up too
    predictors: torch.Tensor  # (N,), where in R W the token before each target stands


PACKED_WIDTH = 128  # slots at least; in fewer, more are left empty, in more, attention scores more in vain


def pack(prompts: list[list[int]], completions: list[list[int]], device: torch.device) -> Packed:
    """Puts as many sequences into a row as it holds, in their order, so that little is padding.

    Completions of one prompt that follow each other stand after a single copy of it: each of them sees the
    prompt and itself, at the positions that it would have alone.
    """
    W = max(round_up(max(len(x) + len(y) for x, y in zip(prompts, completions))), PACKED_WIDTH)
    columns = [], [], [], []  # of each slot: token, position, segment, segment of its prompt
    targets, predictors = [], []

    def add(tokens: list[int], position: int, segment: int, prompt_segment: int) -> None:
        n = len(tokens)
        values = tokens, range(position, position + n), [segment] * n, [prompt_segment] * n
        for column, x in zip(columns, values):
            column.extend(x)

    end, row_end, prompt_start, last = 0, 0, 0, None  # a segment is named after its first slot
    for prompt, completion in zip(prompts, completions):
        if end + (prompt != last) * len(prompt) + len(completion) > row_end:
            add([0] * (row_end - end), 0, -1, -1)
            end, row_end, last = row_end, row_end + W, None
        if prompt != last:
            add(prompt, 0, end, end)
            prompt_start, end, last = end, end + len(prompt), prompt
        add(completion, len(prompt), end, prompt_start)
        targets += completion
        predictors += [prompt_start + len(prompt) - 1, *range(end, end + len(completion) - 1)]
        end += len(completion)
    # Filled up to numbers that come again, see round_up: pairs of narrow rows, and predictions.
    add([0] * (round_up(row_end, 2 * W if W == PACKED_WIDTH else W) - end), 0, -1, -1)
    spare = [0] * (round_up(len(targets), 64) - len(targets))
    predicted = torch.tensor((targets + spare, predictors + spare), device=device)
    tokens, positions, segments, prompt_segments = torch.tensor(columns, device=device).view(4, -1, W)
    keys, queries = segments[:, None], segments[..., None]
    visible = ((keys == queries) | (keys == prompt_segments[..., None])).tril()
    return Packed(tokens, positions, visible, *predicted)


HEAD_ELEMENTS = 2**25  # logits at a time: 128 MB in float32


def completion_log_probs(
    model: Transformer, prompts: list[list[int]], completions: list[list[int]], temperature: float = 1.0
) -> torch.Tensor:
    """Log-probabilities (B, C) of the tokens of completions after their prompts; 0 past the end of one.

    The head is applied where these tokens are predicted only, and to a part of them at a time, since for a
    large vocabulary the logits need more memory than all else.
    """
    packed = pack(prompts, completions, next(model.parameters()).device)
    hidden = model.hidden(packed.tokens, packed.positions, visible=packed.visible)
    hidden = hidden.flatten(0, 1)[packed.predictors]  # (N, size)

    def log_probs(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return -F.cross_entropy(model.lm_head(hidden).float() / temperature, targets, reduction="none")

    size = max(HEAD_ELEMENTS // model.lm_head.out_features, 1)
    parts = list(zip(hidden.split(size), packed.targets.split(size)))
    if len(parts) == 1:
        flat = log_probs(*parts[0])
    else:
        flat = torch.cat([checkpoint(log_probs, *part, use_reentrant=False) for part in parts])
    lengths = [len(completion) for completion in completions]
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).to(flat.device)
    return flat.new_zeros(mask.shape).masked_scatter(mask, flat)  # leaves what is over at the end


def sequence_log_probs(
    model: Transformer, prompts: list[list[int]], completions: list[list[int]]
) -> torch.Tensor:
    """Log-probabilities (B,) of whole completions, each after its prompt."""
    return completion_log_probs(model, prompts, completions).sum(1)


# --------------------------------------------------------------------------------------------- sampler


class Completions(NamedTuple):
    """G completions of each of P prompts; row i belongs to prompt i // G. Past its length a row is 0."""

    tokens: torch.Tensor  # (P G, C)
    lengths: torch.Tensor  # (P G,), with the token that ends it
    log_probs: torch.Tensor  # (P G, C), of the distribution that was sampled from
    finished: torch.Tensor  # (P G,), False for those that were cut off

    def lists(self) -> list[list[int]]:
        """The tokens of each row up to its length."""
        return [row[:n] for row, n in zip(self.tokens.tolist(), self.lengths.tolist())]


@torch.no_grad()
def generate(
    model: Transformer,
    prompts: list[list[int]],
    uniforms: torch.Tensor,  # (P, G, C), from [0, 1)
    eos_ids: list[int],
    temperature: float = 1.0,
) -> Completions:
    """Samples from softmax(logits / temperature); top-k or top-p would bias the ratio of the loss.

    Token t of a row is the one in whose stretch of the cumulative distribution uniforms[row, t] falls, so
    that a row depends on its own numbers, whatever else is in the batch. Temperature 0 is greedy.
    """
    (P, G, C), device = uniforms.shape, uniforms.device
    uniforms, eos = uniforms.flatten(0, 1), torch.tensor(eos_ids, device=device)
    positions, width = torch.tensor([len(p) for p in prompts], device=device), max(map(len, prompts))

    # Each prompt is read once; its group then goes on from copies of the keys and values.
    cache = model.new_cache(P, width)
    start = torch.arange(width, device=device)[None]
    padded = torch.tensor([prompt + [0] * (width - len(prompt)) for prompt in prompts], device=device)
    hidden = model.hidden(padded, start, cache)
    logits = model.lm_head(hidden[torch.arange(P, device=device), positions - 1]).repeat_interleave(G, 0)
    cache = F.pad(cache, (0, 0, 0, round_up(width + C) - width)).repeat_interleave(G, 2)
    positions = positions.repeat_interleave(G)

    tokens = torch.zeros(P * G, C, dtype=torch.long, device=device)
    log_probs = torch.zeros(P * G, C, device=device)
    lengths = torch.full((P * G,), C, device=device)
    finished = torch.zeros(P * G, dtype=torch.bool, device=device)
    rows = torch.arange(P * G, device=device)  # those in the batch, of which some may have finished
    for t in range(C):
        distribution = (logits.float() / (temperature or 1.0)).log_softmax(-1)
        if temperature:
            cumulative = distribution.exp().cumsum(-1)
            # Off the ends, where rounding could pick a token that has next to no probability.
            share = (uniforms[rows, t, None] * (1 - 2e-6) + 1e-6) * cumulative[:, -1:]
            chosen = torch.searchsorted(cumulative, share, right=True)
        else:
            chosen = distribution.argmax(-1, keepdim=True)
        tokens[rows, t], log_probs[rows, t] = chosen[:, 0], distribution.gather(1, chosen)[:, 0]
        ends = rows[torch.isin(chosen[:, 0], eos) & ~finished[rows]]
        lengths[ends], finished[ends] = t + 1, True
        alive = ~finished[rows]
        count = int(alive.sum())
        if t == C - 1 or count == 0:
            break
        keep = round_up(count, 64)
        if keep < 0.75 * len(rows):  # copying the cache of the others costs less than going on with all
            going_on = alive.int().argsort(descending=True, stable=True)[:keep]
            rows, positions, chosen = rows[going_on], positions[going_on], chosen[going_on]
            cache = cache[:, :, going_on]
        hidden = model.hidden(chosen, positions[:, None], cache)
        logits, positions = model.lm_head(hidden[:, 0]), positions + 1
    mask = torch.arange(C, device=device) < lengths[:, None]
    return Completions(tokens * mask, lengths, log_probs * mask, finished)


# ----------------------------------------------------------------------------- rollout and evaluation


def rank_and_world() -> tuple[int, int]:
    """The number of this process and how many there are, under torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def sum_over_ranks(x: torch.Tensor) -> torch.Tensor:
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def score(
    task: Task | Dataset, problems: list[dict], completions: list[str], **options
) -> dict[str, torch.Tensor]:
    """The rewards (rows,) by name, and their weighted sum as `reward`; a problem for each completion."""
    # TRL's signature: what a reward does not ask for goes into its **columns.
    columns = {name: [problem[name] for problem in problems] for name in problems[0]}
    prompts = columns.pop("prompt")
    parts = {}
    for name, (function, _) in task.rewards.items():
        values = function(prompts=prompts, completions=completions, **columns, **options)
        parts[name] = torch.tensor(values, dtype=torch.float32)
        if parts[name].shape != (len(completions),) or not parts[name].isfinite().all():
            raise SystemExit(f"The reward {name} must give one finite number for each completion")
    return parts | {"reward": sum(weight * parts[name] for name, (_, weight) in task.rewards.items())}


class Rollout(NamedTuple):
    """What was sampled for the prompts of this process, group by group."""

    prompts: list[list[int]]
    completions: Completions
    rewards: dict[str, torch.Tensor]  # (P, G) each

    @classmethod
    def merge(cls, rounds: list["Rollout"], groups: list[int]) -> "Rollout":
        """Chosen groups of several rollouts, counted through all of them."""
        G = next(iter(rounds[0].rewards.values())).shape[1]
        prompts = [prompt for rollout in rounds for prompt in rollout.prompts]
        completions = [
            torch.cat(x).unflatten(0, (-1, G))[groups] for x in zip(*(r.completions for r in rounds))
        ]
        rewards = {name: torch.cat([r.rewards[name] for r in rounds])[groups] for name in rounds[0].rewards}
        chosen = [prompts[i] for i in groups]
        return cls(chosen, Completions(*(x.flatten(0, 1) for x in completions)), rewards)


def collect_rollout(
    model: Transformer,
    tokenizer,
    task: Task | Dataset,
    eos_ids: list[int],
    args: Args,
    position: int,
    generator: torch.Generator,
) -> tuple[Rollout, int]:
    """Samples the groups of a step; returns them with the new position in the data.

    With dynamic sampling (Yu et al. 2025, section 3.2), groups whose answers are all right or all wrong make
    room for others. By correctness, not by reward: the format alone would keep a group in.
    """
    (rank, world), device = rank_and_world(), next(model.parameters()).device
    share, G, C = args.num_prompts // world, args.num_generations, args.max_completion_length
    rounds = []
    while True:
        # All processes draw all numbers, so that it does not matter how many they are.
        uniforms = torch.rand(args.num_prompts, G, C, generator=generator)
        mine = slice(rank * share, (rank + 1) * share)
        problems = [task.train_problem(position + i) for i in range(args.num_prompts)[mine]]
        position += args.num_prompts
        prompts = encode_prompts(tokenizer, problems, model, C)
        completions = generate(model, prompts, uniforms[mine].to(device), eos_ids, args.temperature)
        rows = [problem for problem in problems for _ in range(G)]
        rewards = score(task, rows, decode(tokenizer, completions))
        rounds.append(Rollout(prompts, completions, {n: x.view(-1, G) for n, x in rewards.items()}))

        (main, *_) = task.rewards
        scores = torch.cat([rollout.rewards[main] for rollout in rounds])
        mixed = scores.amax(1) > scores.amin(1)
        missing = sum_over_ranks((share - mixed.sum()).clamp(min=0).to(device))
        if missing == 0 or len(rounds) > args.dynamic_sampling:
            order = mixed.int().argsort(descending=True, stable=True)
            return Rollout.merge(rounds, sorted(order[:share].tolist())), position


def decode(tokenizer, completions: Completions) -> list[str]:
    return tokenizer.batch_decode(completions.lists(), skip_special_tokens=True)


EVALUATION_SEED = 1_000_000_000  # added to the seed: other random numbers than those of the training


@torch.no_grad()
def evaluate(
    model: Transformer,
    reference: Transformer,
    tokenizer,
    task: Task | Dataset,
    eos_ids: list[int],
    args: Args,
) -> tuple[dict[str, float], list[dict]]:
    """Metrics on held-out problems and a few completions; no generator of the training is drawn from."""
    (rank, world), device = rank_and_world(), next(model.parameters()).device
    problems, k, C = task.held_out_problems(args.eval_prompts), args.eval_samples, args.max_completion_length
    (main, *_) = task.rewards  # `correctness`, or else pass@1 is its mean, pass@k that of the best of k
    generator = torch.Generator().manual_seed(args.seed + EVALUATION_SEED)
    uniforms = torch.rand(len(problems), k, C, generator=generator)
    names = ["pass@1", f"pass@{k}", "greedy_pass@1", "accuracy_lenient", "mean_length", "clipped_ratio"]
    names = list(dict.fromkeys([*names, "kl_to_reference"]))  # pass@1 stands there twice if k is 1
    totals, samples = torch.zeros(len(names), dtype=torch.float64), []
    size = max(args.num_prompts * args.num_generations // world // k, 1)  # as many rows as in training
    for first in range(rank * size, len(problems), world * size):
        part = problems[first : first + size]
        prompts = encode_prompts(tokenizer, part, model, C)
        sampled = generate(
            model, prompts, uniforms[first : first + size].to(device), eos_ids, args.temperature
        )
        greedy = generate(model, prompts, uniforms[first : first + size, :1].to(device), eos_ids, 0.0)
        rows, texts = [problem for problem in part for _ in range(k)], decode(tokenizer, sampled)
        rewards = score(task, rows, texts)
        correct = rewards[main].view(-1, k)
        lenient = score(task, rows, texts, extract=task.lenient)[main]
        # E[log policy - log reference] over whole completions; one of each prompt is enough.
        one = Completions(*(x[::k] for x in sampled))
        batch = make_batch(prompts, one, torch.zeros(len(part)), args)
        divergence = one.log_probs - reference_of(reference, batch, args)  # both 0 past the end
        values = {
            "pass@1": correct.mean(1),
            f"pass@{k}": correct.amax(1),
            "greedy_pass@1": score(task, part, decode(tokenizer, greedy))[main],
            "accuracy_lenient": lenient.view(-1, k).mean(1),
            "mean_length": sampled.lengths.view(-1, k).float().mean(1),
            "clipped_ratio": 1 - sampled.finished.view(-1, k).float().mean(1),
            "kl_to_reference": divergence.sum(1),
        }
        totals += torch.stack([values[name].double().sum().cpu() for name in names])
        samples += [
            {"prompt": row["prompt"], "completion": text, "reward": rewards["reward"][i].item()}
            | {name: rewards[name][i].item() for name in task.rewards}
            | {"length": sampled.lengths[i].item(), "finished": sampled.finished[i].item()}
            for i, (row, text) in enumerate(zip(rows, texts))
            if i % k == 0 and len(samples) + i // k < 8
        ]
    totals = sum_over_ranks(totals.to(device, torch.float32)) / len(problems)
    return dict(zip(names, totals.tolist())), samples


# -------------------------------------------------------------------------------------------- learning


@dataclass
class Batch:
    """B completions, and what the loss needs to know of them."""

    prompts: list[list[int]]
    completions: list[list[int]]
    mask: torch.Tensor  # (B, C) of the tokens in the loss
    old_log_probs: torch.Tensor  # (B, C) those of the sampler: it is the policy that acted
    advantages: torch.Tensor  # (B,)
    reference_log_probs: torch.Tensor | None = None  # (B, C)


def make_batch(
    prompts: list[list[int]], completions: Completions, advantages: torch.Tensor, args: Args
) -> Batch:
    """`prompts` for each group of rows in `completions`; advantages (B,)."""
    (B, C), device = completions.tokens.shape, completions.tokens.device
    mask = torch.arange(C, device=device) < completions.lengths[:, None]
    if args.mask_truncated_completions:
        mask &= completions.finished[:, None]
    rows = [prompt for prompt in prompts for _ in range(B // len(prompts))]
    return Batch(rows, completions.lists(), mask, completions.log_probs, advantages.to(device))


def log_probs_of(model: Transformer, batch: Batch, rows: torch.Tensor, temperature: float) -> torch.Tensor:
    """Log-probabilities of the completions of some rows, cut where the longest of them ends."""
    parts = ([x[i] for i in rows.tolist()] for x in (batch.prompts, batch.completions))
    return completion_log_probs(model, *parts, temperature)


@torch.no_grad()
def reference_of(reference: Transformer, batch: Batch, args: Args) -> torch.Tensor:
    """Log-probabilities (B, C) of a batch by the reference."""
    out = torch.zeros_like(batch.old_log_probs)
    for rows in torch.arange(len(out), device=out.device).split(args.micro_batch_size):
        log_probs = log_probs_of(reference, batch, rows, args.temperature)
        out[rows, : log_probs.shape[1]] = log_probs
    return out


def take_step(
    model: Transformer, optimizer: torch.optim.Optimizer, batch: Batch, rows: torch.Tensor, args: Args
) -> dict[str, float]:
    """One step of the optimizer on some rows of the batch; returns metrics."""
    counts = torch.stack((batch.mask[rows].sum(), batch.mask[rows].any(1).sum()))
    token_count, sequence_count = sum_over_ranks(counts.clone())
    kept = batch.mask[rows].any(1)
    if args.beta == 0:  # a row without an advantage has no gradient; it counts, but need not be computed
        kept &= batch.advantages[rows] != 0
    if sum_over_ranks(kept.sum()) == 0:
        return {}  # not even a step of 0, in which AdamW would still move by its momentum
    rows = rows[kept] if kept.any() else rows[:1]  # one at least, to go along with the other processes
    totals, gaps = {}, []
    for micro in rows.split(args.micro_batch_size):
        log_probs = log_probs_of(model, batch, micro, args.temperature)
        count = log_probs.shape[1]
        reference = batch.reference_log_probs
        low, high = args.clip_range
        loss, metrics = policy_loss(
            log_probs,
            batch.old_log_probs[micro, :count],
            None if reference is None else reference[micro, :count],
            batch.advantages[micro],
            batch.mask[micro, :count],
            loss=args.loss,
            clip_low=low,
            clip_high=high,
            beta=args.beta,
            kl=args.kl,
            max_completion_length=args.max_completion_length,
            token_count=token_count,
            sequence_count=sequence_count,
        )
        loss.backward()
        for name, value in (metrics | {"loss": loss.detach()}).items():
            totals[name] = totals.get(name, 0) + value
        gaps.append(
            (log_probs.detach() - batch.old_log_probs[micro, :count])[batch.mask[micro, :count]].abs()
        )
    metrics = {name: sum_over_ranks(value).item() for name, value in sorted(totals.items())}
    metrics["grad_norm"] = optimizer_step(model, optimizer, args.max_grad_norm)
    gaps = torch.cat([*gaps, batch.advantages.new_zeros(1)])
    mean = gaps.sum().item() / max(len(gaps) - 1, 1)
    return metrics | {"logp_difference/mean": mean, "logp_difference/max": gaps.max().item()}


def optimizer_step(model: Transformer, optimizer: torch.optim.Optimizer, max_grad_norm: float) -> float:
    """Adds up the gradients of all processes, limits their norm and moves the weights; returns the norm."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if dist.is_initialized():
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = sum_over_ranks(torch.cat([gradient.flatten() for gradient in gradients]))
        for p, gradient in zip(parameters, flat.split([p.numel() for p in parameters])):
            p.grad = gradient.view_as(p)
    norm = nn.utils.clip_grad_norm_(parameters, max_grad_norm).item()
    if math.isfinite(norm):  # else the caller ends the run, with weights that are still good
        optimizer.step()
    optimizer.zero_grad()
    return norm


def warm_up(
    model: Transformer, tokenizer, task: Task, args: Args, log: Callable, precision: torch.autocast
) -> None:
    """SFT on demonstrations, logged at negative steps: what comes after begins at 0."""
    rank, world = rank_and_world()
    optimizer = torch.optim.AdamW(
        model.parameters(), args.sft_learning_rate, (0.9, 0.95), weight_decay=0.01, fused=True
    )
    progress = tqdm(total=args.sft_steps, unit=" steps of SFT", disable=None if rank == 0 else True)
    for step in range(args.sft_steps):
        # Up in 50 steps, level until half of them are done, then down to 5 percent.
        rate = min((step + 1) / 50, 1, 0.05 + 1.9 * (1 - step / args.sft_steps))
        optimizer.param_groups[0]["lr"] = args.sft_learning_rate * min(rate, 1)
        # Problems with numbers below 0, which what comes after does not reach.
        first = -(step + 1) * args.sft_batch_size
        problems = [task.train_problem(first + i) for i in range(args.sft_batch_size)]
        texts = [
            task.demonstration(x, random.Random(f"{args.seed} {first + i}")) for i, x in enumerate(problems)
        ]
        prompts = encode_prompts(tokenizer, problems, model, 0)
        texts = [text + tokenizer.eos_token for text in texts]
        completions = tokenizer(texts, add_special_tokens=False)["input_ids"]
        token_count = sum(map(len, completions))
        with precision:
            log_probs = sequence_log_probs(model, prompts[rank::world], completions[rank::world])
            loss = -log_probs.sum() / token_count
            loss.backward()
        norm = optimizer_step(model, optimizer, 1.0)
        progress.update()
        if not math.isfinite(norm):
            raise SystemExit(
                f"The gradient of the warm-up is {norm} at step {step}; lower --sft-learning-rate"
            )
        if step % 10 == 9:
            loss = sum_over_ranks(loss.detach()).item()
            log({"sft/loss": loss, "sft/grad_norm": norm}, step + 1 - args.sft_steps)
    progress.close()


# ------------------------------------------------------------------------------------------ checkpoints


def save_checkpoint(path: Path, state: dict) -> None:
    """Writes to a temporary file and renames it, so that a crash leaves the checkpoint before it."""
    temporary = path.with_suffix(".tmp")
    try:
        torch.save({"script": Path(__file__).stem, **state}, temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch calls a full disk a RuntimeError
        temporary.unlink(missing_ok=True)
        raise SystemExit(f"Cannot write {path}, the one before it is untouched; is the disk full? ({error})")


def load_checkpoint(run: str | Path) -> dict:
    """The checkpoint of a run directory, or a checkpoint file; code that hides in it is not run."""
    path, script = Path(run), Path(__file__).stem
    path = path / "checkpoint.pt" if path.is_dir() else path
    if not path.exists():
        raise SystemExit(f"There is no checkpoint {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).split("\n")[0]
        raise SystemExit(f"{path} is damaged, or no checkpoint: {reason}")
    if not isinstance(state, dict) or state.get("script") != script:
        raise SystemExit(f"{path} is not a checkpoint of {script}.py")
    return state


def export(model: Transformer, tokenizer, eos_ids: list[int], path: Path) -> None:
    """Writes a Hugging Face folder with all that sampling needs."""
    try:
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        (path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos_ids}))
    except Exception as error:  # the libraries have errors of their own for a full disk
        raise SystemExit(f"Cannot write {path}; is the disk full? ({error})")


# --------------------------------------------------------------------------------------------- training


def train(args: Args, run: Path, device: torch.device) -> None:
    """GRPO (Shao et al. 2024, algorithm 1); goes on from the checkpoint in `run` if there is one."""
    rank, world = rank_and_world()
    torch.manual_seed(args.seed)
    task = make_task(args)
    model, tokenizer, eos_ids = make_model(args)
    model.to(device).gradient_checkpointing = args.gradient_checkpointing
    args = dataclasses.replace(
        args, max_completion_length=args.max_completion_length or task.max_completion_length
    )
    if args.dataset:  # a prompt that is too long is found now, not when its turn comes
        encode_prompts(tokenizer, sum(task.parts.values(), []), model, args.max_completion_length)
    # The only generator: problems are functions of their number.
    generator = torch.Generator().manual_seed(args.seed)
    state = load_checkpoint(run) if args.resume and (run / "checkpoint.pt").exists() else None
    first = state["step"] + 1 if state else 1

    from torch.utils.tensorboard import SummaryWriter  # not above: it takes a second

    if args.track and rank == 0:
        import wandb

        wandb.init(
            project=args.wandb_project_name,
            entity=args.wandb_entity,
            id=run.name,  # a resumed run goes on in the same place
            resume="allow",
            dir=str(run),
            config=dataclasses.asdict(args),
            sync_tensorboard=True,
        )
    # What was logged past the checkpoint is hidden; it will be logged again.
    writer = SummaryWriter(str(run), purge_step=first if state else -args.sft_steps) if rank == 0 else None

    def log(metrics: dict[str, float], step: int) -> None:
        for name, value in metrics.items() if writer else ():
            writer.add_scalar(name, value, step)

    def say(line: str) -> None:
        if rank == 0:
            tqdm.write(line)

    precision = torch.autocast(device.type, torch.bfloat16, args.bf16 and has_bfloat16(device))
    elapsed, position, num_tokens = 0.0, 0, 0
    if not args.model and not state:
        start = time.perf_counter()
        warm_up(model, tokenizer, task, args, log, precision)
        elapsed = time.perf_counter() - start
    reference = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(
        model.parameters(), args.learning_rate, (0.9, 0.95), weight_decay=0.0, fused=True
    )
    samples_file, lines = run / "samples.jsonl", []
    if state:
        model.load_state_dict(state["model"])
        reference.load_state_dict(state["reference"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        elapsed, position, num_tokens = state["elapsed"], state["position"], state["num_tokens"]
        if samples_file.exists():
            lines = samples_file.read_text().splitlines(keepends=True)
        say(f"Resumed at step {first - 1:,}")
    if rank == 0:
        samples_file.write_text(
            "".join(x for x in lines if x.endswith("\n") and json.loads(x)["step"] < first)
        )

    def save(step: int) -> None:
        state = {
            "args": dataclasses.asdict(args),
            "model": model.state_dict(),
            "reference": reference.state_dict(),
            "optimizer": optimizer.state_dict(),
            "generator": generator.get_state(),
            "step": step,
            "position": position,
            "num_tokens": num_tokens,
            "elapsed": elapsed,
        }
        if rank == 0:
            writer.flush()
            save_checkpoint(run / "checkpoint.pt", state)

    def log_evaluation(step: int) -> None:
        with precision:
            metrics, samples = evaluate(model, reference, tokenizer, task, eos_ids, args)
        log({f"eval/{name}": value for name, value in metrics.items()}, step)
        k = args.eval_samples
        say(
            f"step {step:>5,}: evaluation pass@1 {metrics['pass@1']:.3f}, "
            f"greedy {metrics['greedy_pass@1']:.3f}, pass@{k} {metrics[f'pass@{k}']:.3f}, "
            f"length {metrics['mean_length']:.1f}, KL {metrics['kl_to_reference']:.2f}"
        )
        if metrics["kl_to_reference"] > 0.5 * metrics["mean_length"]:
            say("Warning: the policy is over half a nat per token away from its reference; raise --beta")
        if rank == 0:
            rows = [{"step": step, **sample} for sample in samples]
            with samples_file.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
            writer.add_text("samples", "\n\n".join(f"`{json.dumps(row)}`" for row in rows), step)
            if args.track:
                table = wandb.Table(list(rows[0]), [list(row.values()) for row in rows])
                wandb.log({"samples": table, "global_step": step})

    if not state:
        if args.eval_interval:
            log_evaluation(0)
        save(0)
    progress = tqdm(
        total=args.max_steps, initial=first - 1, unit=" steps", disable=None if rank == 0 else True
    )
    last_line, cut_off_steps = -math.inf, 0
    share, G = args.num_prompts // world, args.num_generations

    for step in range(first, args.max_steps + 1):
        start = time.perf_counter()
        rate = min(step / max(args.warmup_steps, 1), 1)
        if args.anneal_lr and step > args.warmup_steps:
            rate = 1 - 0.95 * (step - args.warmup_steps) / max(args.max_steps - args.warmup_steps, 1)
        optimizer.param_groups[0]["lr"] = args.learning_rate * rate
        if args.ref_model_sync_steps and step > 1 and (step - 1) % args.ref_model_sync_steps == 0:
            reference.load_state_dict(model.state_dict())  # algorithm 1, line 3

        # 1. Sample.
        before = position
        with precision:
            rollout, position = collect_rollout(model, tokenizer, task, eos_ids, args, position, generator)
        sampled = time.perf_counter()

        # 2. Judge.
        completions, rewards = rollout.completions, rollout.rewards["reward"]
        advantages = group_advantages(rewards, args.advantages, args.advantage_temperature)
        batch = make_batch(rollout.prompts, completions, advantages.flatten(), args)
        if args.beta:
            with precision:
                batch.reference_log_probs = reference_of(reference, batch, args)

        # 3. Learn.
        updates = []
        for _ in range(args.num_iterations):
            for i in range(args.num_minibatches):
                # Whole groups, and the same ones whatever the number of processes.
                groups = torch.arange(i, share, args.num_minibatches)
                rows = (groups[:, None] * G + torch.arange(G)).flatten().to(device)
                with precision:
                    updates.append(take_step(model, optimizer, batch, rows, args))
                if not math.isfinite(updates[-1].get("grad_norm", 0.0)):
                    raise SystemExit(
                        f"grad_norm is {updates[-1]['grad_norm']} at step {step:,}; lower --learning-rate. "
                        f"{run} keeps the last checkpoint"
                    )

        # 4. Log, evaluate, save.
        seconds, tokens = time.perf_counter() - start, completions.lengths.sum()
        elapsed += seconds
        means = {  # over processes too
            "reward": rewards.mean(),
            "reward_std": rewards.std(1).mean(),
            "frac_reward_zero_std": (rewards.amax(1) == rewards.amin(1)).float().mean(),
            "completions/mean_length": completions.lengths.float().mean(),
            "completions/clipped_ratio": 1 - completions.finished.float().mean(),
            "entropy": -completions.log_probs.sum(1).mean(),  # of a sequence; estimated from what was sampled
        } | {f"rewards/{name}/mean": rollout.rewards[name].mean() for name in task.rewards}
        values = torch.stack([x.float().to(device) for x in means.values()] + [tokens.float() * world])
        *values, tokens = (sum_over_ranks(values) / world).tolist()
        num_tokens += int(tokens)
        metrics = dict(zip(means, values))
        metrics["entropy"] /= metrics["completions/mean_length"]
        updates = [update for update in updates if update]
        for name in updates[0] if updates else ():
            metrics[name] = sum(update[name] for update in updates) / len(updates)
            if name.startswith("logp_difference"):
                metrics[name] = updates[0][name]  # later ones hold what the first one changed
        metrics |= {"learning_rate": args.learning_rate * rate, "num_tokens": num_tokens}
        metrics |= {"updates": len(updates), "sampled_prompts": position - before}
        log(metrics, step)
        log({"time/rollout": sampled - start, "time/update": start + seconds - sampled}, step)
        log({"time/elapsed": elapsed, "perf/generated_tokens_per_second": tokens / (sampled - start)}, step)
        log({"perf/tokens_per_second": tokens / seconds}, step)
        cut_off_steps = cut_off_steps + 1 if metrics["completions/clipped_ratio"] > 0.5 else 0
        if cut_off_steps == 5:
            say("Warning: most completions are cut off; raise --max-completion-length")
        if not updates:
            say(f"Warning: at step {step:,} all rewards of each group are equal: nothing to learn from")
        last = step == args.max_steps
        if args.eval_interval and (last or step % args.eval_interval == 0):
            log_evaluation(step)
        if last or step % args.checkpoint_interval == 0:
            save(step)
        progress.set_postfix_str(f"reward {metrics['reward']:.3f}", refresh=False)
        progress.update()
        if rank == 0 and progress.disable and (last or time.perf_counter() - last_line > 10):
            last_line = time.perf_counter()
            speed = f"{tokens / seconds:,.0f} tokens/s"
            print(f"step {step:>5,}: reward {metrics['reward']:.3f}, {speed}", flush=True)

    progress.close()
    if rank == 0:
        writer.close()
        export(model, tokenizer, eos_ids, run / "model")
        if args.track:
            wandb.finish()


def make_task(args: Args) -> Task | Dataset:
    if args.dataset:
        return Dataset(args)
    return {"arithmetic": Arithmetic, "countdown": Countdown, "reviews": Reviews}[args.task](args.seed)


def evaluate_run(args: Args, device: torch.device) -> None:
    """Prints the metrics of a run on its held-out prompts."""
    state = load_checkpoint(args.evaluate)
    saved = Args(**state["args"])
    args = dataclasses.replace(
        saved, eval_prompts=args.eval_prompts, eval_samples=args.eval_samples, seed=args.seed
    )
    task, (model, tokenizer, eos_ids) = make_task(saved), make_model(saved)
    reference = copy.deepcopy(model)
    model.load_state_dict(state["model"])
    reference.load_state_dict(state["reference"])
    with torch.autocast(device.type, torch.bfloat16, args.bf16 and has_bfloat16(device)):
        metrics, _ = evaluate(model.to(device), reference.to(device), tokenizer, task, eos_ids, args)
    values = ", ".join(f"{name} {value:.3f}" for name, value in metrics.items())
    print(f"{args.task_name}: {values} over {len(task.held_out_problems(args.eval_prompts))} prompts")


def main(args: Args) -> Path:
    """Trains, goes on with a run, or evaluates one; returns the run directory."""
    available = {"cuda": torch.cuda.is_available()}
    if not available.get(args.device, True):
        raise SystemExit(f"PyTorch finds no {args.device} device here; use --device auto")
    cuda = available["cuda"] and args.device != "cpu"
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    model = load_checkpoint(args.evaluate)["args"]["model"] if args.evaluate else args.model
    if not model:
        torch.set_num_threads(1)  # for a small model a second thread costs more than it gives
    if args.evaluate:
        evaluate_run(args, device)
        return Path(args.evaluate)
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():  # started by torchrun
        if cuda:
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if cuda else "gloo")
    rank, world = rank_and_world()
    if args.num_prompts % (world * args.num_minibatches):
        raise SystemExit(
            f"num_prompts = {args.num_prompts} must be a multiple of {world} processes x "
            f"{args.num_minibatches} minibatches"
        )
    if args.sft_batch_size < world:
        raise SystemExit(f"sft_batch_size must be at least {world}, one per process")
    if args.kl == "k1" and args.beta and rank == 0:
        print("Warning: the gradient of k1 is 0 on average, so it holds nothing back; use k2 or k3")

    if args.resume:
        run = Path(args.resume)
    else:
        name = f"{args.task_name}__{args.exp_name}__{args.seed}"
        stamp = [time.strftime("%Y%m%d-%H%M%S")]
        if dist.is_initialized():
            dist.broadcast_object_list(stamp)
        run = Path(args.runs) / f"{name}__{stamp[0]}"
    try:
        if rank == 0:
            run.mkdir(parents=True, exist_ok=args.resume is not None)
            (run / "args.tmp").write_text(json.dumps(dataclasses.asdict(args), indent=2))
            os.replace(run / "args.tmp", run / "args.json")
            print(f"Run directory: {run}", flush=True)
    except OSError as error:
        raise SystemExit(f"Cannot write the run directory {run}: {error}")
    try:
        train(args, run, device)
    except KeyboardInterrupt:
        raise SystemExit(f"\nInterrupted; go on with: python {Path(__file__).name} --resume {run}")
    except OSError as error:
        raise SystemExit(f"{error}; go on with: python {Path(__file__).name} --resume {run}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return run


if __name__ == "__main__":
    main(parse_args())
