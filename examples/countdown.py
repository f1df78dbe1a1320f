"""A task of your own for grpo_llm.py: Countdown, a small search problem, with a reward of its own.

The prompt `3,7,25=82` asks for an expression that has the value 82 and uses each of 3, 7 and 25 exactly once.
The model writes down what it tried, then its answer:

    <think>3+7+25=35
    25*3+7=82</think><answer>25*3+7</answer>

From the folder of grpo_llm.py:

    python grpo_llm.py --task examples.countdown:Countdown \
        --hidden-size 256 --num-layers 4 --sft-steps 3000 --max-steps 200

A task is a class with the members of `Countdown` below. It makes problems, demonstrates them for the warm-up,
and names its rewards. Nothing else has to be registered: --task module:Class finds it.
"""

import random
import re
from fractions import Fraction
from functools import partial

# Rewards of a task may come from anywhere; these two belong to the arithmetic task of the script.
from grpo_llm import INSTRUCTION, format_reward, tagged_answer

# ------------------------------------------------------------------------------------------------ the reward
#
# Completions come from a policy that is paid for finding holes in the reward. So they are parsed and never
# run (no `eval`), and every length is limited before anything is done that takes more than linear time.


def parse_expression(text: str | None) -> tuple[Fraction, list[int]] | None:
    """Value and numbers of an expression of whole numbers, + - * / and brackets, or None for other text."""
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
        numbers.append(int(token))  # raises ValueError for anything but digits
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


def last_answer(completion: str) -> str:
    """The text after the last <answer> near the end, or the end if there is none; for the lenient score."""
    return completion[-1000:].rpartition("<answer>")[2].partition("</answer>")[0].strip()


def countdown_reward(
    prompts: list[str],
    completions: list[str],
    numbers: list[list[int]],  # columns of the problems, by name
    target: list[int],
    extract=tagged_answer,  # finds the answer in a completion
    **columns: list,  # columns that this reward does not need
) -> list[float]:
    """1 for an expression that has the value `target` and uses each of `numbers` once, else 0."""
    rewards = []
    for completion, given, value in zip(completions, numbers, target):
        parsed = parse_expression(extract(completion))
        rewards.append(
            float(parsed is not None and parsed[0] == value and sorted(parsed[1]) == sorted(given))
        )
    return rewards


# -------------------------------------------------------------------------------------------------- the task


class Countdown:
    """An expression of three or four numbers with a given value; a solution is made first, so there is one.

    The demonstrator tries up to three expressions, and often gives up before it has found a right one.
    """

    # By name: function and weight. The first is what `eval/pass@1` and --dynamic-sampling go by.
    rewards = {"correctness": (countdown_reward, 1.0), "format": (format_reward, 0.5)}
    # Optional, a reward that accepts any format: `eval/accuracy_lenient`.
    lenient = partial(countdown_reward, extract=last_answer)
    # In tokens: enough for the longest right completion and the token that ends it.
    max_completion_length = 120
    # The tokens of the model that is made without --model; other text is read as <pad>.
    vocabulary = ["<think>", "</think>", "<answer>", "</answer>", *"\n0123456789+-*/()=,."]

    def expression(self, numbers: list[int], rng: random.Random) -> tuple[str, Fraction]:
        """A random expression of the numbers, and its value."""
        numbers = rng.sample(numbers, len(numbers))
        text, value = str(numbers[0]), Fraction(numbers[0])
        for i, number in enumerate(numbers[1:]):
            # A division only where it leaves no remainder.
            operator = rng.choice("+-*/" if value % number == 0 else "+-*")
            if i and operator in "*/":
                text = f"({text})"
            text += f"{operator}{number}"
            if operator == "+":
                value += number
            elif operator == "-":
                value -= number
            elif operator == "*":
                value *= number
            else:
                value /= number
        return text, value

    def problem(self, rng: random.Random) -> dict:
        """`prompt`, by which problems are held out; `question`, for chat models; columns for the rewards.

        All random numbers come from `rng`, so that a problem is a function of its number, and a resumed run
        sees the same problems.
        """
        target = Fraction(0)
        while not 10 <= target <= 99:
            numbers = [rng.randrange(1, 26) for _ in range(rng.choice((3, 4)))]
            solution, target = self.expression(numbers, rng)
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
        """A completion for the warm-up; with --model there is none. It need not be right, but often enough.

        GRPO learns from differences within a group: a model that never finds an answer has none.
        """
        tries = [self.expression(problem["numbers"], rng) for _ in range(rng.randrange(4))]
        if not tries or rng.random() < 0.5:
            tries.append((problem["solution"], problem["target"]))
        lines = "\n".join(f"{text}={value}" for text, value in tries)
        return f"<think>{lines}</think><answer>{tries[-1][0]}</answer>"
