"""Rewards of your own for grpo_llm.py: the right day of the week, in as few words as possible.

docs/own_model.md leads from a model and files of your own to the commands that use this module:

    python grpo_llm.py --model my_model --dataset questions.jsonl \
        --reward examples.own_reward:correctness --reward examples.own_reward:brevity=0.2 --reward format=0

`correctness` takes the place of the reward of this name that the script has, which wants a number; `brevity`
is added with the weight 0.2, and `format`, which pays for tags, loses its weight.
"""

import re


def correctness(
    prompts: list[str],
    completions: list[str],
    answer: list[str],  # the column that --answer-column names
    **columns: list,  # all other columns of the dataset by name
) -> list[float]:
    """1 if the day that a completion names first is the right one."""
    rewards = []
    for completion, right in zip(completions, answer):
        days = re.findall(r"\b\w+day\b", completion[:1000])  # a policy may write megabytes
        rewards.append(float(days[:1] == [right]))
    return rewards


def brevity(prompts: list[str], completions: list[str], **columns: list) -> list[float]:
    """1 for one word, half as much for two, and so on."""
    return [1 / max(len(completion.split()), 1) for completion in completions]
