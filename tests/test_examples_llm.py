"""examples/countdown.py: its parser and reward, its problems, and a short run through the command line."""

import json
import random
import re
import time
from fractions import Fraction

import pytest
import torch
from helpers import REPOSITORY, read_curves, run_script

import grpo_llm as grpo
from examples import countdown, iterative_grpo


def test_expressions():
    good = {"1+2*3": (7, [1, 2, 3]), "(1+2)*3": (9, [1, 2, 3]), "8/3/2": (Fraction(4, 3), [8, 3, 2])}
    good |= {"10-4-3": (3, [10, 4, 3]), " 2 * ( 3 ) ": (6, [2, 3]), "7": (7, [7])}
    for text, expected in good.items():
        assert countdown.parse_expression(text) == expected
    bad = ["", "1+", "(1", "1)", "1 2", "-1", "1**2", "2//1", "1/0", "1/(2-2)", "a", "1;2", "__import__", "²"]
    for text in [*bad, "(" * 90 + "1", "1" * 101, None, "1\n+\x00", "٣+1", "()"]:
        assert countdown.parse_expression(text) is None, text
    for _ in range(200):  # against Python's own arithmetic
        numbers = [random.randrange(1, 20) for _ in range(4)]
        text = "(1+2)*3-4/5".replace("1", str(numbers[0])).replace("5", str(numbers[3]))
        assert countdown.parse_expression(text)[0] == eval(re.sub(r"(\d+)", r"Fraction(\1)", text))


HOSTILE = ["9" * 2_000_000, "(" * 1_000_000, "<think>" * 200_000, "<answer>" * 200_000, "\x00" * 1000]
HOSTILE += ["<think></think>" * 100_000, " " * 1_000_000, "-,." * 300_000, "٣" * 100_000, "1/" * 40 + "0"]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: text[:8])
def test_hostile_completions_cost_little_and_gain_nothing(text):
    for completion in (text, f"<think></think><answer>{text}</answer>", f"<answer>{text}"):
        for reward in (countdown.countdown_reward, countdown.Countdown.lenient):
            seconds = []
            for _ in range(3):
                begin = time.perf_counter()
                value = reward([""], [completion], numbers=[[9, 9, 9]], target=[9])
                seconds.append(time.perf_counter() - begin)
            assert value == [0.0] and min(seconds) < 0.002


def test_problems_are_solvable_and_each_number_is_used_once():
    task = countdown.Countdown()
    for problem in (grpo.draw(task, 1, i) for i in range(300)):
        text = f"<think></think><answer>{problem['solution']}</answer>"
        assert grpo.score(task, [problem], [text])["correctness"].item() == 1, problem
    reward = countdown.countdown_reward
    assert reward([""], ["<think></think><answer>5+5</answer>"], [[5, 5, 1]], [10]) == [0.0]
    assert reward([""], ["<think></think><answer>9+1</answer>"], [[5, 5]], [10]) == [0.0]
    assert countdown.Countdown.lenient([""], ["so <answer>5+5"], numbers=[[5, 5]], target=[10]) == [1.0]


def test_demonstrations_fit_the_vocabulary_and_are_often_right():
    task, rng = countdown.Countdown(), random.Random(0)
    tokenizer = grpo.make_tokenizer(task.vocabulary)
    problems = [grpo.draw(task, 3, i) for i in range(400)]
    texts = [task.demonstration(problem, rng) for problem in problems]
    ids = tokenizer([text + "<eos>" for text in texts], add_special_tokens=False)["input_ids"]
    assert tokenizer.batch_decode(ids, skip_special_tokens=True) == texts
    assert max(map(len, ids)) <= task.max_completion_length
    rewards = grpo.score(task, problems, texts)
    assert rewards["format"].all() and 0.6 < rewards["correctness"].mean() < 0.7
    torch.testing.assert_close(rewards["reward"], rewards["correctness"] + 0.5 * rewards["format"])
    prompts = tokenizer([problem["prompt"] for problem in problems])["input_ids"]
    assert all(tokenizer.unk_token_id not in prompt for prompt in prompts)


def test_command_of_the_docstring_trains(tmp_path):
    """Cut down to a few steps; from another folder too, since the script's own folder is on the path."""
    command = re.search(r"python grpo_llm\.py (.*?)\n\n", countdown.__doc__.replace("\\\n", ""), re.DOTALL)
    small = "--hidden-size 32 --num-layers 1 --sft-steps 5 --max-steps 2 --num-prompts 4 --num-generations 4"
    small += " --eval-prompts 4 --eval-samples 2 --max-completion-length 40"
    code, output = run_script(
        "grpo_llm.py", *command[1].split(), *small.split(), "--runs", tmp_path / "runs", cwd=tmp_path
    )
    assert code == 0, output
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("countdown__grpo_llm__1__")
    assert json.loads((run / "args.json").read_text())["task"] == "examples.countdown:Countdown"
    curves = read_curves(run)
    assert [*curves["rewards/correctness/mean"]] == [*curves["rewards/format/mean"]] == [1, 2]
    code, output = run_script("grpo_llm.py", "--evaluate", run, cwd=REPOSITORY)
    assert code != 0 and "--task examples.countdown:Countdown" in output  # never imported unasked


def test_task_of_the_page(tmp_path, monkeypatch):
    """The class that docs/grpo_llm.md shows: its demonstrations fit, and some are right."""
    page = (REPOSITORY / "docs" / "grpo_llm.md").read_text()
    code = next(x for x in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "class Product" in x)
    (tmp_path / "my_tasks.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    task = grpo.make_task(grpo.Args(task="my_tasks:Product"))
    tokenizer, rng = grpo.make_tokenizer(task.vocabulary), random.Random(0)
    problems = [grpo.draw(task, 1, i) for i in range(200)]
    texts = [task.demonstration(problem, rng) for problem in problems]
    ids = tokenizer([text + "<eos>" for text in texts], add_special_tokens=False)["input_ids"]
    assert tokenizer.batch_decode(ids, skip_special_tokens=True) == texts
    assert max(map(len, ids)) <= task.max_completion_length
    rewards = grpo.score(task, problems, texts)
    assert rewards["format"].all() and 0.1 < rewards["correctness"].mean() < 0.9


def test_replay_is_a_share_of_the_rankings():
    new, old = ([{"name": f"{kind} {i}"} for i in range(count)] for kind, count in (("new", 90), ("old", 40)))
    mixed = iterative_grpo.with_replay(new, old, 0.1, seed=1)
    replayed = [row["name"] for row in mixed if row.get("replayed")]
    assert mixed[:90] == new and len(mixed) == 100 and len(set(replayed)) == 10
    assert {*replayed} <= {row["name"] for row in old}
    assert len(iterative_grpo.with_replay(new, old[:3], 0.1, seed=1)) == 93
    assert iterative_grpo.with_replay(new, old, 0.0, seed=1) == new


def test_iterative_grpo(tmp_path, capsys):
    """Each iteration starts from policy and reward model of the one before; started again, it goes on."""
    start = "--hidden-size 64 --num-layers 1 --sft-steps 100 --num-rankings 128 --reward-steps 3"
    args = iterative_grpo.Args(iterations=1, max_steps=1, num_rankings=64, reward_steps=2, runs=str(tmp_path))
    args.start_flags = f"{start} --eval-prompts 16"
    iterative_grpo.main(args)
    first = (tmp_path / "policy1" / "model" / "model.safetensors").read_bytes()
    args.iterations = 2
    iterative_grpo.main(args)
    assert (tmp_path / "policy1" / "model" / "model.safetensors").read_bytes() == first
    assert "Resumed at step 1" in capsys.readouterr().out
    arguments = {
        path.parent.name: json.loads(path.read_text()) for path in sorted(tmp_path.glob("*/args.json"))
    }
    assert [*arguments] == ["policy1", "policy2", "reward_model1", "reward_model2", "start"]
    assert arguments["policy2"]["model"] == arguments["reward_model1"]["model"]
    assert arguments["policy2"]["model"] == str(tmp_path / "policy1" / "model")
    assert arguments["policy2"]["reward_model"] == arguments["reward_model2"]["reward_model"]
    assert arguments["policy2"]["reward_model"] == str(tmp_path / "reward_model1" / "reward_model")
    rows = iterative_grpo.read_rows(tmp_path / "rankings2.jsonl")
    assert 0.05 < sum("replayed" in row for row in rows) / len(rows) < 0.15
    # The reward model of the last iteration learned on: it is not the one that it began with.
    weights = [
        (tmp_path / name / "reward_model" / "model.safetensors").read_bytes()
        for name in ("start", "reward_model1", "reward_model2")
    ]
    assert len({*weights}) == 3
