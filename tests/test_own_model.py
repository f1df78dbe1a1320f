"""docs/own_model.md: its commands, in small, on a model and files that are made here.

`python tests/test_own_model.py` makes them in the folder where it is started, for a reader of the page.
"""

import contextlib
import itertools
import json
import random
import re
import shlex
from pathlib import Path

import pytest
import torch
import transformers
from helpers import REPOSITORY, read_curves, run_script

import dpo_llm
import grpo_llm
from examples import own_reward

SCRIPTS = {"dpo_llm.py": dpo_llm, "grpo_llm.py": grpo_llm}
PAGE = (REPOSITORY / "docs" / "own_model.md").read_text()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
SYSTEM = "Answer with a day of the week."
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_rows() -> tuple[list[dict], list[dict]]:
    """Questions with answers, and pairs for all but the first 60 of them.

    The chosen answer is short, and right three times out of four; the rejected one is wordy and a guess.
    """
    rng, questions, pairs = random.Random(0), [], []
    for days in rng.sample([*itertools.permutations(DAYS, 4)], 840):
        question = f"Which of {', '.join(days[:3])} and {days[3]} comes first in the week?"
        right = min(days, key=DAYS.index)
        questions.append({"question": question, "answer": right})
        prompt = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
        chosen = right if rng.random() < 0.75 else rng.choice(days)
        pair = {"chosen": f"{chosen}.", "rejected": f"I think that it is {rng.choice(days)}."}
        answers = {name: [{"role": "assistant", "content": text}] for name, text in pair.items()}
        pairs.append({"prompt": prompt, **answers})
    return questions, pairs[60:]


def make_tokenizer(texts: list[str]) -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE, trained on the texts, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    names = {"pad_token": special[0], "eos_token": special[2]}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.chat_template = TEMPLATE
    return fast


def make_files(folder: Path, hidden_size: int = 128) -> None:
    """my_model, pairs.jsonl, questions.jsonl and test.jsonl."""
    torch.manual_seed(0)
    questions, pairs = make_rows()
    texts = [x["content"] for row in pairs for part in row.values() for x in part]
    tokenizer = make_tokenizer(texts)
    shape = {"vocab_size": len(tokenizer), "hidden_size": hidden_size, "intermediate_size": 3 * hidden_size}
    shape |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    shape |= {"max_position_embeddings": 256, "tie_word_embeddings": True, "bos_token_id": None}
    shape |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**shape)).save_pretrained(folder / "my_model")
    tokenizer.save_pretrained(folder / "my_model")
    for name, rows in (("pairs", pairs), ("questions", questions[60:]), ("test", questions[:60])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


# ------------------------------------------------------------------------------------------------- the page


SMALL = {"max_steps": 2, "eval_interval": 1, "eval_prompts": 4, "max_completion_length": 4}
SMALL_DPO = SMALL | {"batch_size": 4}
SMALL_GRPO = SMALL | {"num_prompts": 4, "num_generations": 4, "eval_samples": 2}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def commands() -> list[list[str]]:
    text = "".join(blocks("bash")).replace("\\\n", "")
    return [shlex.split(line) for line in text.splitlines()]


def with_flags(words: list[str], **flags) -> list[str]:
    return [
        *words,
        *(str(x) for name, value in flags.items() for x in (f"--{name.replace('_', '-')}", value)),
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The folder after all commands of the page but those with a model of the hub, in their order."""
    folder = tmp_path_factory.mktemp("own")
    for words in commands():
        if "Qwen/Qwen2.5-0.5B-Instruct" in words:
            break
        if "--evaluate" in words:
            (folder / "more.jsonl").write_text(
                (folder / "test.jsonl").read_text().replace("Monday", "Sunday")
            )
            words = with_flags(words, eval_prompts=4, eval_samples=2)
        elif "--resume" in words:
            words = with_flags(words, max_steps=3)
        elif "dpo_llm.py" in words:
            words = with_flags(words, **SMALL_DPO)
        elif "grpo_llm.py" in words:
            words = with_flags(words, **SMALL_GRPO)
        script, *words = words[words.index("python") + 1 :]
        if script in SCRIPTS:  # in this process, which takes a fifth of the time
            with contextlib.chdir(folder):
                SCRIPTS[script].main(SCRIPTS[script].parse_args(words))
        else:
            code, output = run_script(script, *words, cwd=folder, PYTHONPATH=str(REPOSITORY))
            assert code == 0, output
    return folder


def test_files_are_as_the_page_shows_them(folder):
    shown = [json.loads(block) for block in blocks("json")]
    for name, example in zip(("pairs", "questions"), shown, strict=True):
        rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        assert example in rows and all(row.keys() == example.keys() for row in rows)


def test_commands_of_the_page_train(folder):
    tags = {"sft": "loss", "dpo": "rewards/margins", "grpo": "rewards/brevity/mean"}
    for name, tag in tags.items():
        steps = 3 if name == "grpo" else 2
        assert [*read_curves(folder / "runs" / name)[tag]] == [*range(1, steps + 1)]
    curves = read_curves(folder / "runs" / "grpo")
    rewards = [curves[f"rewards/{name}/mean"][1] for name in ("correctness", "format", "brevity")]
    assert curves["reward"][1] == pytest.approx(rewards[0] + 0.2 * rewards[2], abs=1e-6)
    assert "eval/accuracy_lenient" not in curves  # that of numbers says nothing about days
    samples = (folder / "runs" / "grpo" / "samples.jsonl").read_text().splitlines()
    asked = {row["question"] for row in map(json.loads, (folder / "test.jsonl").read_text().splitlines())}
    assert {json.loads(line)["prompt"] for line in samples} <= asked


def test_result_is_read_by_transformers(folder, monkeypatch, capsys):
    """The code of the page, and the same tokens here as there."""
    monkeypatch.chdir(folder)
    code, names = next(block for block in blocks("python") if "AutoModel" in block), {}
    exec(code, names)
    printed = capsys.readouterr().out.strip()
    model = grpo_llm.read_model("runs/grpo/model")
    prompts = grpo_llm.encode_prompts(model, [{"prompt": "", "messages": names["messages"]}], 16)
    assert prompts == names["tokens"]["input_ids"].tolist()
    tokens = grpo_llm.generate(model, prompts, torch.zeros(1, 1, 16), 0.0).tokens
    assert model.decode(tokens)[0].strip() == printed
    start = dpo_llm.read_model("my_model").state_dict()
    assert any(not torch.equal(x, start[name]) for name, x in model.state_dict().items())


def test_commands_with_a_model_of_the_hub_are_understood():
    found = 0
    for words in commands():
        if any(flag in words for flag in ("--resume", "--evaluate")) or words[1] not in SCRIPTS:
            continue
        args = SCRIPTS[words[1]].parse_args(words[2:])
        found += "Qwen" in args.model
        assert args.dataset
    assert found == 2


def test_rewards():
    texts = ["Tuesday.", "I think that it is Tuesday", "Friday or Tuesday", "Tuesdays", "", "day" * 10**6]
    prompts, answer = [""] * 6, ["Tuesday"] * 6
    assert own_reward.correctness(prompts, texts, answer=answer, other=[0] * 6) == [1, 1, 0, 0, 0, 0]
    assert own_reward.brevity(prompts, texts, answer=answer) == [1, 1 / 6, 1 / 3, 1, 1, 1]


def test_function_of_the_page_is_that_of_the_example():
    shown = next(block for block in blocks("python") if "def brevity" in block)
    assert shown.strip() in (REPOSITORY / "examples" / "own_reward.py").read_text()


if __name__ == "__main__":
    make_files(Path())
