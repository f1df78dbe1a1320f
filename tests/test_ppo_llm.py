"""ppo_llm.py: losses, rewards and advantages by hand, scalar models against transformers, and whole runs."""

import itertools
import json
import math
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from helpers import checkpoint_difference, read_curves, run_two_processes, start
from test_dpo_llm import TEMPLATE, assistant, user
from test_grpo_llm import SHAPE, write_rows
from test_ppo_continuous_runs import flags, refusal

import ppo_discrete
import ppo_llm as ppo

SCRIPT = "ppo_llm.py"


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def double(*numbers) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def masks(*lengths: int, width: int | None = None) -> torch.Tensor:
    return torch.arange(width or max(lengths)) < torch.tensor(lengths)[:, None]


# ----------------------------------------------------------------------------------- loss of the reward model


def test_loss_of_pairs_by_hand():
    """Bradley and Terry: -log p with p = 1 / (1 + exp(-(r(better) - r(worse))))."""
    losses = ppo.ranking_loss(double(3, 1, -0.5, 0.5), [2, 2])
    expected = [-math.log(1 / (1 + math.exp(-2))), -math.log(1 / (1 + math.exp(1)))]
    np.testing.assert_allclose(losses, expected, rtol=1e-12)


def test_loss_of_rankings_by_hand():
    """Of three, the pairs have margins 2, 2.5 and 0.5; each ranking counts once, whatever its size."""
    losses = ppo.ranking_loss(double(1, -1, -1.5, 0.25, 0), [3, 2])
    three = sum(math.log(1 + math.exp(-gap)) for gap in (2, 2.5, 0.5)) / 3
    np.testing.assert_allclose(losses, [three, math.log(1 + math.exp(-0.25))], rtol=1e-12)


def test_loss_of_rankings_is_a_plain_loop_and_knows_differences_only():
    sizes, rewards = [4, 2, 5, 3], torch.randn(14, dtype=torch.float64, requires_grad=True)
    losses, expected = ppo.ranking_loss(rewards, sizes), []
    for ranking in rewards.split(sizes):
        pairs = [(i, j) for i in range(len(ranking)) for j in range(len(ranking)) if i < j]
        expected.append(-sum((ranking[i] - ranking[j]).sigmoid().log() for i, j in pairs) / len(pairs))
    torch.testing.assert_close(losses, torch.stack(expected))
    moved = torch.cat([x + 7 * i for i, x in enumerate(rewards.split(sizes))])
    torch.testing.assert_close(ppo.ranking_loss(moved, sizes), losses)
    assert torch.autograd.gradcheck(lambda x: ppo.ranking_loss(x, sizes), rewards)


def test_right_pairs_are_counted():
    rewards = double(2, 1, 3, 0, 1)
    right, pairs = ppo.count_right(rewards, [3, 2])
    assert (right, pairs) == (1, 4)  # 2 > 1; not 2 > 3, 1 > 3, 0 > 1
    right, _ = ppo.count_right(rewards, [3, 2], double(0.5, 0.4, 0.6, 0.9, 0.8))
    assert right == 3  # the labels of the second and third pair were wrong; the last one is right


# ------------------------------------------------------------------------------------- rewards and advantages


def test_shaped_rewards_by_hand():
    log_probs, reference = double([-1, -2, -3], [-1, -1, 9]), double([-2, -2, -1], [-1.5, -1, 5])
    rewards = ppo.shaped_rewards(double(5, -1), log_probs, reference, masks(3, 2), 0.1)
    np.testing.assert_allclose(rewards, [[-0.1, 0, 0.2 + 5], [-0.05, -1, 0]], atol=1e-12)


def test_mean_shaped_reward_is_the_exact_kl():
    """Over all four answers of two tokens, each with its probability: score less kl_coef times the KL."""
    first, second = (torch.randn(2, 2, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    policy, reference = torch.stack((first, second))  # rows: of the first and of the second token
    answers = list(itertools.product(range(2), repeat=2))
    log_probs, reference_log_probs = (
        torch.stack([torch.stack([p[t, token] for t, token in enumerate(answer)]) for answer in answers])
        for p in (policy, reference)
    )
    scores, weights = torch.randn(4, dtype=torch.float64), log_probs.sum(1).exp()
    rewards = ppo.shaped_rewards(scores, log_probs, reference_log_probs, masks(2, 2, 2, 2), 0.7).sum(1)
    kl = F.kl_div(reference, policy, log_target=True, reduction="sum")  # of two independent tokens
    expected = (weights * scores).sum() - 0.7 * kl
    torch.testing.assert_close((weights * rewards).sum(), expected)


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.8, 0.0)])
def test_advantages_of_tokens_are_those_of_each_completion_alone(gamma, gae_lambda):
    """The definition: a discounted sum of TD errors up to the last token; what lies past it has no effect."""
    lengths = [5, 1, 3, 6]
    mask = masks(*lengths, width=7)
    rewards, values = torch.randn(2, 4, 7, dtype=torch.float64)
    advantages, returns = ppo.token_advantages(rewards, values, mask, gamma, gae_lambda)
    for row, length in enumerate(lengths):
        v = [*values[row, :length].tolist(), 0.0]
        errors = [rewards[row, t].item() + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            expected = sum((gamma * gae_lambda) ** (u - t) * errors[u] for u in range(t, length))
            assert advantages[row, t].item() == pytest.approx(expected, abs=1e-12)
            assert returns[row, t].item() == pytest.approx(expected + v[t], abs=1e-12)
        assert not advantages[row, length:].any() and not returns[row, length:].any()
    wider = [F.pad(x, (0, 3), value=5.0) for x in (rewards, values)]
    again, _ = ppo.token_advantages(*wider, F.pad(mask, (0, 3)), gamma, gae_lambda)
    torch.testing.assert_close(again[:, :7], advantages)


def test_whitening():
    x, mask = torch.randn(3, 5, dtype=torch.float64) * 4 + 2, masks(5, 2, 3)
    numbers = x[mask].numpy()
    whitened = ppo.whiten(x, mask)
    np.testing.assert_allclose(whitened[mask], (numbers - numbers.mean()) / numbers.std(), rtol=1e-7)
    scaled = ppo.whiten(x, mask, shift_mean=False)[mask].numpy()
    assert scaled.mean() == pytest.approx(numbers.mean()) and scaled.std() == pytest.approx(1)
    assert not whitened[~mask].any() and not ppo.whiten(x, mask, shift_mean=False)[~mask].any()


def test_adapted_kl_coef_by_hand():
    """Twice the target counts as an error of 0.2, and half of it as -0.2 (Ziegler et al. 2019)."""
    args, kl_coef = ppo.Args(kl_target=4.0, kl_gain=0.1), double(0.5)
    for kl, factor in ((8.0, 1.02), (4.4, 1.01), (4.0, 1.0), (3.8, 0.995), (0.0, 0.98)):
        assert ppo.adapted_kl_coef(kl_coef, kl, args).item() == pytest.approx(0.5 * factor)
    assert ppo.adapted_kl_coef(kl_coef, 8.0, ppo.Args()).item() == 0.5


# ----------------------------------------------------------------------------------------------------- losses


def test_policy_loss_by_hand():
    """Ratios 1.5, 0.5, 1.5, 0.5 and 1.1 with eps = 0.2; the last token is no token."""
    ratios = double([1.5, 0.5, 1.5], [0.5, 1.1, 9.0])
    advantages, mask = double([2, 2, -1], [-1, 1, 1]), masks(3, 2)
    loss, metrics = ppo.policy_loss(ratios.log(), torch.zeros(2, 3), advantages, mask, clip_coef=0.2)
    # 1.2 x 2 and not 3; 0.5 x 2; -1.5 and not -1.2; -0.8 and not -0.5; 1.1
    assert loss.item() == pytest.approx(-(2.4 + 1 - 1.5 - 0.8 + 1.1) / 5)
    assert metrics["losses/clip_fraction"].item() == pytest.approx(4 / 5)
    expected = sum(x - 1 - math.log(x) for x in (1.5, 0.5, 1.5, 0.5, 1.1)) / 5
    assert metrics["losses/approx_kl"].item() == pytest.approx(expected)


def test_policy_loss_is_that_of_the_other_script():
    log_probs, old, advantages = torch.randn(3, 4, 6, dtype=torch.float64)
    mask = masks(6, 2, 5, 1)
    loss, _ = ppo.policy_loss(log_probs, old, advantages, mask, clip_coef=0.3)
    flat = (x[mask] for x in (log_probs, old, advantages))
    torch.testing.assert_close(loss, ppo_discrete.surrogate_loss(*flat, 0.3))


def test_approx_kl_is_the_exact_one_in_the_mean():
    """k3 over all answers of one token, each with its probability under the old policy."""
    old, new = torch.randn(2, 9, dtype=torch.float64).log_softmax(-1)
    mean = 0
    for a, b in zip(new, old):
        _, metrics = ppo.policy_loss(*(x.view(1, 1) for x in (a, b, a)), masks(1), clip_coef=0.2)
        mean += b.exp() * metrics["losses/approx_kl"]
    torch.testing.assert_close(mean, F.kl_div(new, old, log_target=True, reduction="sum"))


def test_value_loss_by_hand():
    """Errors 1, 4 and 0.25; the second value was 0 before and may reach 0.2: error 1.8 against 1."""
    values, old = double([1, 1], [0.5, 7.0]).requires_grad_(), double([1, 0], [0.6, 0])
    returns, mask = double([2, 2], [0, 0]), masks(2, 1)
    loss, metrics = ppo.value_loss(values, old, returns, mask, value_clip_coef=0.2)
    assert loss.item() == pytest.approx(0.5 * (1 + 1.8**2 + 0.25) / 3)
    assert metrics["losses/value_clip_fraction"].item() == pytest.approx(1 / 3)
    loss.backward()
    np.testing.assert_allclose(values.grad, [[-1 / 3, 0], [0.5 / 3, 0]], atol=1e-12)
    loss, _ = ppo.value_loss(values, old, returns, mask, value_clip_coef=math.inf)
    assert loss.item() == pytest.approx(0.5 * (1 + 1 + 0.25) / 3)


def test_micro_batches_add_up_and_padding_has_no_effect():
    x, mask = torch.randn(4, 4, 6, dtype=torch.float64), masks(6, 2, 5, 1)
    losses = [
        (ppo.policy_loss, {"clip_coef": 0.2}, (x[0], x[1], x[2])),
        (ppo.value_loss, {"value_clip_coef": 0.2}, (x[0], x[1], x[3])),
    ]
    for function, settings, inputs in losses:
        whole, metrics = function(*inputs, mask, **settings)
        total, means = 0, dict.fromkeys(metrics, 0)
        for rows, end in ((slice(0, 1), 6), (slice(1, 2), 2), (slice(2, 4), 5)):
            part = (y[rows, :end] for y in (*inputs, mask))
            loss, more = function(*part, token_count=mask.sum(), **settings)
            total, means = total + loss, {name: means[name] + more[name] for name in means}
        torch.testing.assert_close(total, whole)
        assert all(means[name].item() == pytest.approx(metrics[name].item()) for name in metrics)


# --------------------------------------------------------------------------------------------- scalar models


@pytest.fixture(scope="module")
def tokenizer():
    return ppo.make_tokenizer(ppo.Reviews.vocabulary)


@pytest.fixture(scope="module")
def chat_tokenizer():
    tokenizer = ppo.make_tokenizer(ppo.Reviews.vocabulary)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


FAMILIES = {"llama": ("Llama", {}), "qwen2": ("Qwen2", {"tie_word_embeddings": True}), "qwen3": ("Qwen3", {})}


def save_peer(family: str, folder: Path, tokenizer, kind: str = "CausalLM", **changes):
    torch.manual_seed(0)
    name, shape = FAMILIES[family]
    settings = SHAPE | {"vocab_size": len(tokenizer), "pad_token_id": 0} | shape | changes
    config = getattr(transformers, f"{name}Config")(**settings)
    peer = getattr(transformers, f"{name}For{kind}")(config).eval()
    peer.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return peer


def random_sequences(count: int, prompts: int = 3) -> list[ppo.Sequence]:
    """Completions of a few prompts, some of which neighbours share; no token is 0, the padding there."""

    def tokens(low: int, high: int) -> list[int]:
        return torch.randint(3, 61, (int(torch.randint(low, high, ())),)).tolist()

    drawn = [tokens(2, 9) for _ in range(prompts)]
    return [ppo.Sequence(drawn[i * prompts // count], tokens(1, 12)) for i in range(count)]


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_transformers(family, tmp_path, tokenizer):
    """In both directions: its reward models, which have no bias, and ours, whose bias it leaves out."""
    peer = save_peer(family, tmp_path / "peer", tokenizer, "SequenceClassification", num_labels=1)
    model = ppo.read_model(tmp_path / "peer", kind=ppo.ScalarModel)
    sequences = random_sequences(7)
    scores = ppo.sequence_scores(model, sequences)
    with torch.no_grad():
        for (prompt, completion), own in zip(sequences, scores):
            expected = peer(torch.tensor([prompt + completion])).logits
            torch.testing.assert_close(own.view(1, 1), expected, atol=1e-4, rtol=1e-4)
    assert model.score.bias.item() == 0
    with torch.no_grad():
        model.score.bias.fill_(2.5)
    model.save_pretrained(tmp_path / "own")
    again = ppo.read_model(tmp_path / "own", kind=ppo.ScalarModel)
    torch.testing.assert_close(ppo.sequence_scores(again, sequences), scores + 2.5)
    classes = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "own").eval()
    assert type(classes) is type(peer) and classes.config.num_labels == 1
    prompt, completion = sequences[0]
    logits = classes(torch.tensor([prompt + completion])).logits
    torch.testing.assert_close(logits + 2.5, scores[:1, None] + 2.5, atol=1e-4, rtol=1e-4)


def test_scalar_model_begins_from_a_language_model(tmp_path, tokenizer):
    save_peer("qwen2", tmp_path, tokenizer)
    language, model = ppo.read_model(tmp_path), ppo.read_model(tmp_path, kind=ppo.ScalarModel)
    tokens = torch.randint(3, 61, (2, 9))
    torch.testing.assert_close(model.hidden(tokens), language.hidden(tokens))
    names = {name for name, _ in model.named_parameters()}
    assert {"score.weight", "score.bias"} <= names and "lm_head.weight" not in names
    other = ppo.read_model(tmp_path, kind=ppo.ScalarModel)
    assert not torch.equal(model.score.weight, other.score.weight) and not model.score.bias.any()
    heads = torch.cat([ppo.read_model(tmp_path, kind=ppo.ScalarModel).score.weight for _ in range(30)])
    assert heads.std().item() == pytest.approx(1 / math.sqrt(33), rel=0.1)


def test_values_do_not_depend_on_packing_or_padding(tmp_path, tokenizer):
    """Each is the head on the hidden state of the token before; the score is the one after the last token."""
    save_peer("llama", tmp_path, tokenizer)
    model, sequences = ppo.read_model(tmp_path, kind=ppo.ScalarModel), random_sequences(9)
    values, scores = ppo.completion_values(model, sequences), ppo.sequence_scores(model, sequences)
    assert values.shape == (9, max(len(completion) for _, completion in sequences))
    for row, (prompt, completion) in enumerate(sequences):
        states = model.hidden(torch.tensor([prompt + completion]))[0]
        alone = states @ model.score.weight[0] + model.score.bias
        first = len(prompt) - 1
        torch.testing.assert_close(values[row, : len(completion)], alone[first:-1], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(scores[row], alone[-1], atol=1e-5, rtol=1e-4)
        assert not values[row, len(completion) :].any()
    args = ppo.Args(micro_batch_size=2)
    torch.testing.assert_close(ppo.all_scores(model, sequences, args), scores.detach(), atol=1e-5, rtol=1e-4)
    wider = ppo.all_values(model, sequences, 40, args)
    torch.testing.assert_close(wider[:, : values.shape[1]], values.detach(), atol=1e-5, rtol=1e-4)


def test_scores_are_normalised_in_the_head(tmp_path, tokenizer):
    save_peer("llama", tmp_path, tokenizer)
    model, sequences = ppo.read_model(tmp_path, kind=ppo.ScalarModel), random_sequences(12)
    with torch.no_grad():
        model.score.bias.fill_(5.0)
    before = ppo.all_scores(model, sequences, ppo.Args())
    ppo.normalize(model, sequences, ppo.Args())
    after = ppo.all_scores(model, sequences, ppo.Args())
    np.testing.assert_allclose(after, (before - before.mean()) / before.std(correction=0), atol=1e-4)


def test_unfinished_completions_get_a_fixed_score(tmp_path, tokenizer):
    save_peer("llama", tmp_path, tokenizer)
    model, sequences = ppo.read_model(tmp_path, kind=ppo.ScalarModel), random_sequences(3)
    finished = torch.tensor([True, False, True])
    scores = ppo.all_scores(model, sequences, ppo.Args())
    found = ppo.final_scores(model, sequences, finished, ppo.Args(penalty_reward_value=-3.0))
    torch.testing.assert_close(found, torch.stack((scores[0], torch.tensor(-3.0), scores[2])))
    found = ppo.final_scores(model, sequences, finished, ppo.Args(penalty_reward_value=None))
    torch.testing.assert_close(found, scores)


def test_step_of_the_reward_model_is_a_plain_one(tmp_path, tokenizer):
    """Packed, in micro-batches, against one ranking after the other without either."""
    save_peer("llama", tmp_path, tokenizer)
    rankings = []
    for size in (2, 3, 2, 4):
        prompt, _ = random_sequences(1)[0]
        completions = [ppo.array("i", random_sequences(1)[0].completion) for _ in range(size)]
        rankings.append(ppo.Ranking(False, ppo.array("i", prompt), completions, None))
    model, plain = (ppo.read_model(tmp_path, kind=ppo.ScalarModel) for _ in range(2))
    plain.load_state_dict(model.state_dict())
    loss, right = 0, []
    for ranking in rankings:
        states = [plain.hidden(torch.tensor([[*ranking.prompt, *x]]))[0, -1] for x in ranking.completions]
        rewards = torch.stack(states) @ plain.score.weight[0] + plain.score.bias
        pairs = list(itertools.combinations(rewards, 2))
        loss -= sum(F.logsigmoid(better - worse) for better, worse in pairs) / len(pairs) / 4
        right += [float(better > worse) for better, worse in pairs]
    loss.backward()
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    before = [x.detach().clone() for x in model.parameters()]
    args = ppo.Args(micro_batch_size=2, max_grad_norm=1e9)
    metrics = ppo.reward_step(model, optimizer, rankings, args)
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert metrics["accuracy"] == pytest.approx(sum(right) / len(right)) and len(right) == 11
    for x, old, reference in zip(model.parameters(), before, plain.parameters(), strict=True):
        gradient = torch.zeros_like(old) if reference.grad is None else reference.grad
        torch.testing.assert_close(old - x.detach(), gradient, atol=1e-5, rtol=1e-3)


# --------------------------------------------------------------------------------------------------- rankings


def reader(tokenizer, context: int = 64) -> ppo.Transformer:
    config = {"model_type": "llama", "vocab_size": len(tokenizer), "hidden_size": 8, "intermediate_size": 16}
    config |= {"num_hidden_layers": 1, "num_attention_heads": 1, "max_position_embeddings": context}
    model = ppo.Transformer(config)
    model.tokenizer, model.eos_ids = tokenizer, {tokenizer.eos_token_id}
    return model


class Workplace:
    """What the loading of data needs to know of a run."""

    path, rank, device = Path(), 0, torch.device("cpu")

    def identify(self, name, source, checksum):
        pass


def load(folder: Path, rows: list[dict], tokenizer, **changes) -> tuple[ppo.Data, ppo.Data]:
    file = write_rows(folder / "rows.jsonl", rows)
    args = ppo.Args(**{"max_completion_length": 8} | changes)
    return ppo.load_data(file, reader(tokenizer), args, Workplace())


def written(tokenizer, data: ppo.Data) -> list[tuple[str, ...]]:
    return [tuple(map(tokenizer.decode, (row.prompt, *row.completions))) for row in data.rankings]


def test_rows_of_text(tmp_path, tokenizer):
    """Pairs, rankings and single completions, each with the token that ends it; prompts that leave room."""
    rows = [
        {"prompt": "the", "chosen": " nice.", "rejected": " odd."},
        {"prompt": "the", "completions": [" superb.", " nice.", " awful."], "true_rewards": [3, 2, 1]},
    ]
    train, held_out = load(tmp_path, [x | {"held_out": y} for y in (False, True) for x in rows], tokenizer)
    expected = [
        ("<bos>the", " nice.<eos>", " odd.<eos>"),
        ("<bos>the", " superb.<eos>", " nice.<eos>", " awful.<eos>"),
    ]
    assert written(tokenizer, train) == written(tokenizer, held_out) == expected
    assert [row.true_rewards for row in train.rankings] == [None, [3, 2, 1]]
    assert train.prompts == [tokenizer("the")["input_ids"]] * 2
    assert train.rankings[1].joined.completion.tolist() == sum(map(list, train.rankings[1].completions), [])
    rows = [{"prompt": "the", "completion": " nice."}, {"prompt": "the", "chosen": " odd."}]
    rows = [x | {"held_out": y} for y in (False, True) for x in rows]
    train, _ = load(tmp_path, rows, tokenizer, stage="sft")
    assert written(tokenizer, train) == [("<bos>the", " nice.<eos>"), ("<bos>the", " odd.<eos>")]
    continued = {"stage": "ppo", "model": "x", "reward_model": "y"}
    train, _ = load(tmp_path, [*rows, {"prompt": "the", "held_out": False}], tokenizer, **continued)
    assert written(tokenizer, train) == [("<bos>the",)] * 3


def test_rows_of_messages(tmp_path, chat_tokenizer):
    rows = [
        {"prompt": [user("1")], "completions": [[assistant("2")], [assistant("3")]]},
        {"chosen": [user("1"), assistant("2")], "rejected": [user("1"), assistant("3")]},
        {"prompt": [user("1")], "chosen": [user("1"), assistant("2")], "rejected": [assistant("3")]},
    ]
    rows = [x | {"held_out": y} for y in (False, True) for x in rows]
    train, _ = load(tmp_path, rows, chat_tokenizer)
    model, messages = reader(chat_tokenizer), [user("1"), assistant("2")]
    prompt = ppo.apply_template(model, messages[:1])
    whole = ppo.apply_template(model, messages, begin_answer=False)
    first, second, third = written(chat_tokenizer, train)
    assert first == second == third and first[0] == prompt and first[0] + first[1] == whole


@pytest.mark.parametrize(
    ("row", "message", "changes"),
    [
        ({"prompt": "the"}, "without columns chosen and rejected, or a list completions", {}),
        ({"prompt": "the", "chosen": " nice."}, "without columns chosen and rejected", {}),
        ({"prompt": "the", "completions": [" nice."]}, "without columns chosen and rejected", {}),
        ({"prompt": "the"}, "without a column chosen or completion", {"stage": "sft"}),
        ({"chosen": " a", "rejected": " b"}, "without text in prompt", {}),
        ({"prompt": " ", "chosen": " nice.", "rejected": " odd."}, "without text in prompt", {}),
        ({"prompt": "the", "chosen": "", "rejected": " odd."}, "without text in a completion", {}),
        ({"prompt": "the", "completions": [" nice.", 5]}, "without text in a completion", {}),
        ({"prompt": "the", "completions": [" nice.", " odd.", " nice."]}, "with two equal completions", {}),
        ({"prompt": "the" * 70, "chosen": " a", "rejected": " b"}, "longer than the limit", {}),
        ({"prompt": "the", "completions": [[assistant("1")], [assistant("2")]]}, "both text or both", {}),
        (
            {"chosen": [user("1"), assistant("2")], "rejected": [user("3"), assistant("2")]},
            "whose completions answer different prompts",
            {},
        ),
    ],
)
def test_a_bad_row_is_dropped(row, message, changes, tmp_path, chat_tokenizer, capsys):
    good = {"prompt": "the", "chosen": " nice.", "rejected": " odd."}
    rows = [good, row, good | {"held_out": True}, good]
    rows = [x | {"held_out": x.get("held_out", False)} for x in rows]
    train, _ = load(tmp_path, rows, chat_tokenizer, **changes)
    assert len(train.rankings) == 2
    told = capsys.readouterr().out
    assert message in told and "(row 2)" in told


def test_every_pass_over_the_data_is_a_permutation():
    rows = [ppo.drawn(10, batch, 4, seed=3) for batch in range(5)]
    flat = sum(rows, [])
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10)) and flat[:10] != flat[10:]
    assert ppo.drawn(10, 2, 4, seed=3) == rows[2]


# -------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(
            ({name: 0}, f"{name} must lie in [1, inf), got 0")
            for name in "max_steps checkpoint_interval eval_prompts hidden_size num_layers num_heads "
            "sft_batch_size reward_steps reward_batch_size num_rankings batch_size update_epochs "
            "num_minibatches micro_batch_size micro_batch_tokens max_length max_completion_length".split()
        ),
        *(
            ({name: value}, f"{name} must lie in (0, inf), got {value}")
            for name in "learning_rate value_learning_rate sft_learning_rate reward_learning_rate "
            "max_grad_norm temperature clip_coef kl_target checkpoint_minutes lora_alpha".split()
            for value in (0.0, math.nan)
        ),
        *(
            ({name: -1}, f"{name} must lie in [0, inf), got -1")
            for name in "eval_interval export_interval sft_steps warmup_steps kl_coef kl_gain ptx_coef "
            "lora_rank".split()
        ),
        ({"ranking_size": 1}, "ranking_size must lie in [2, inf), got 1"),
        ({"value_clip_coef": 0.0}, "value_clip_coef must lie in (0, inf], got 0.0"),
        ({"penalty_reward_value": -math.inf}, "penalty_reward_value must lie in (-inf, inf), got -inf"),
        ({"gamma": 1.1}, "gamma must lie in [0, 1], got 1.1"),
        ({"gae_lambda": -0.1}, "gae_lambda must lie in [0, 1], got -0.1"),
        ({"label_noise": 0.5}, "label_noise must lie in [0, 0.5), got 0.5"),
        ({"num_minibatches": 3}, "num_minibatches = 3 must divide batch_size = 256"),
        ({"hidden_size": 100, "num_heads": 3}, "hidden_size = 100 must be a multiple of 2 x num_heads = 6"),
        ({"export": "adapters"}, "without lora_rank there are no adapters to export"),
        ({"dataset": "a.jsonl", "model": "b", "reward": ["sentiment=2"]}, "a dataset has none"),
        ({"resume": "a", "evaluate": "b"}, "resume, evaluate and run_name exclude each other"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    with pytest.raises(ValueError) as error:
        ppo.Args(**changes)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sft_steps": 0}, "a small model is made by sft_steps, so they cannot be 0 without --model"),
        ({"reward_model": "a", "model": "b"}, "a reward_model needs --stage ppo, which it serves"),
        ({"stage": "ppo", "model": "a"}, "stage ppo needs the models of the others"),
        ({"stage": "ppo", "reward_model": "a"}, "stage ppo needs the models of the others"),
        ({"stage": "reward-model"}, "stage reward-model needs a model that writes"),
    ],
)
def test_a_stage_needs_the_models_of_those_before_it(tmp_path, changes, message):
    assert message in refusal(ppo.main, ppo.Args(**changes, runs=str(tmp_path)))
    assert not [*tmp_path.iterdir()]


def test_arguments_at_their_bounds_are_taken():
    ppo.Args(value_clip_coef=math.inf, penalty_reward_value=None, gamma=1.0, gae_lambda=0.0, kl_coef=0.0)
    parsed = ppo.parse_args("--stage ppo --model a --reward-model b --kl-target 3 --no-norm-adv".split())
    assert parsed == ppo.Args(stage="ppo", model="a", reward_model="b", kl_target=3.0, norm_adv=False)
    steps = {"all": -525, "sft": -525, "reward-model": -225, "ppo": 0}
    assert all(ppo.Args(stage=x, resume="a").first_step == step for x, step in steps.items())


# ------------------------------------------------------------------------------------------------- short runs

TINY = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "sft_steps": 100, "sft_batch_size": 16}
TINY |= {"sft_learning_rate": 1e-2, "num_rankings": 64, "reward_steps": 12, "reward_batch_size": 8}
TINY |= {"max_steps": 4, "batch_size": 16, "num_minibatches": 2, "warmup_steps": 2, "eval_interval": 2}
TINY |= {"eval_prompts": 24, "checkpoint_interval": 2, "micro_batch_size": 6, "bf16": False}
SECTIONS = {"sft": (-112, -12), "reward-model": (-12, 0), "ppo": (0, 4)}  # steps of the stages


def train(folder: Path, **changes) -> Path:
    return ppo.main(ppo.Args(**TINY | {"runs": str(folder)} | changes))


def resume(run: Path, *words: str) -> None:
    ppo.main(ppo.parse_args(["--resume", str(run), *words]))


def curves_of(run: Path) -> dict:
    """What is logged, but for clocks and texts."""
    curves = read_curves(run)
    return {tag: x for tag, x in curves.items() if not re.match("time/|perf/|samples", tag)}


def assert_same_run(run: Path, reference: Path) -> None:
    states = [ppo.load_checkpoint(x) for x in (run, reference)]
    for state in states:
        state["args"] |= {"stage": "all", "checkpoint_minutes": 0}
    assert checkpoint_difference(*states) is None
    assert curves_of(run) == curves_of(reference)
    for name in ("samples.jsonl", "rankings.jsonl"):
        assert (run / name).read_text() == (reference / name).read_text()
    for name in ("reference", "reward_model", "model"):
        found, expected = (x / name / "model.safetensors" for x in (run, reference))
        assert found.read_bytes() == expected.read_bytes()


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory) -> Path:
    """A run that nobody changes."""
    return train(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def models(finished_run) -> dict[str, str]:
    """Models for runs of PPO alone."""
    folders = {"model": finished_run / "reference", "reward_model": finished_run / "reward_model"}
    return {"stage": "ppo"} | {name: str(folder) for name, folder in folders.items()}


PPO_METRICS = """reward true_reward objective/kl objective/entropy objective/rlhf_reward kl_coef
    learning_rate num_tokens grad_norm completions/mean_length completions/clipped_ratio losses/policy_loss
    losses/value_loss losses/approx_kl losses/clip_fraction losses/value_clip_fraction losses/value_grad_norm
    losses/explained_variance""".split()
EVALUATED = "true_reward learned_reward kl_to_reference mean_length clipped_ratio distinct".split()


def test_what_is_logged(finished_run):
    assert re.fullmatch(r"reviews__ppo_llm__1__\d{8}-\d{6}", finished_run.name)
    assert ppo.read_args(finished_run) == ppo.Args(**TINY | {"runs": str(finished_run.parent)})
    curves = curves_of(finished_run)
    reward = [f"reward_model/{name}" for name in ("loss", "accuracy", "grad_norm")]
    ends = [f"reward_model/{name}" for name in ("eval_loss", "eval_accuracy", "true_accuracy")]
    evaluations = [f"eval/{name}" for name in EVALUATED]
    assert {*curves} == {*PPO_METRICS, *reward, *ends, *evaluations, "sft/loss", "sft/grad_norm"}
    assert all(list(curves[tag]) == [1, 2, 3, 4] for tag in PPO_METRICS)
    assert all(list(curves[tag]) == [0, 2, 4] for tag in evaluations)
    assert all(list(curves[tag]) == list(range(-11, 1)) for tag in reward)
    assert all(list(curves[tag]) == [0] for tag in ends)
    assert list(curves["sft/loss"]) == list(range(-102, -11, 10))
    assert all(math.isfinite(x) for curve in curves.values() for x in curve.values())
    # Before the first step the policy is the reference.
    assert curves["eval/kl_to_reference"][0] == pytest.approx(0, abs=1e-3)
    assert curves["objective/kl"][1] == pytest.approx(0, abs=1e-3)
    assert curves["objective/rlhf_reward"][3] == pytest.approx(
        curves["reward"][3] - 0.2 * curves["objective/kl"][3], abs=1e-6
    )
    rates = 3e-4 * np.array([0.5, 1, 1 - 0.95 / 2, 0.05])
    np.testing.assert_allclose(list(curves["learning_rate"].values()), rates, rtol=1e-5)
    lengths = 16 * np.array(list(curves["completions/mean_length"].values()))
    np.testing.assert_allclose(np.diff([0, *curves["num_tokens"].values()]), lengths, atol=0.5)


def test_files_of_a_run(finished_run, tokenizer):
    """Each stage leaves a folder that transformers reads; the rows are ranked by the true reward."""
    kinds = {"reference": "CausalLM", "model": "CausalLM", "reward_model": "SequenceClassification"}
    for name, kind in kinds.items():
        folder = finished_run / name
        peer = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(folder)
        assert type(peer).__name__ == f"LlamaFor{kind}"
        vocabulary = transformers.AutoTokenizer.from_pretrained(folder).get_vocab()
        assert vocabulary == tokenizer.get_vocab()
    rows = [json.loads(line) for line in (finished_run / "rankings.jsonl").open()]
    assert {*rows[0]} == {"prompt", "chosen", "rejected", "true_rewards", "held_out"}
    for row in rows:
        assert row["held_out"] == ppo.is_held_out(row["prompt"])
        found = ppo.sentiment_reward([], [row["chosen"], row["rejected"]])
        np.testing.assert_allclose(found, row["true_rewards"], rtol=1e-6)
    swapped = sum(row["true_rewards"][0] < row["true_rewards"][1] for row in rows)
    assert 0 < swapped < len(rows) / 3
    samples = [json.loads(line) for line in (finished_run / "samples.jsonl").open()]
    assert {*samples[0]} == {"step", "prompt", "completion", "learned_reward", "true_reward"}


def test_rankings_follow_the_true_reward(models):
    """Of four completions each, cut-off ones and ties left out; without noise in the right order."""
    reference = ppo.read_model(models["model"])
    settings = {"num_rankings": 40, "ranking_size": 4, "eval_prompts": 10, "max_completion_length": 32}
    for noise in (0.0, 0.3):
        args = ppo.Args(**TINY | settings | {"label_noise": noise})
        rows = ppo.sample_rankings(reference, ppo.Reviews(), args)
        sizes = [len(row["completions"]) for row in rows]
        assert 2 <= min(sizes) and max(sizes) == 4 and len(rows) > 30
        ordered = [row["true_rewards"] == sorted(row["true_rewards"], reverse=True) for row in rows]
        assert all(ordered) if noise == 0 else 0.2 < np.mean(ordered) < 0.8
        for row in rows:
            assert len({*row["true_rewards"]}) == len(row["completions"])
            found = ppo.sentiment_reward([], row["completions"])
            np.testing.assert_allclose(found, row["true_rewards"], rtol=1e-6)


@pytest.mark.parametrize("stage", SECTIONS)
def test_killed_in_each_stage(stage, finished_run, tmp_path, capsys):
    """SIGKILL between two checkpoints, which are due after each step; then resumed."""
    settings = TINY | {"checkpoint_minutes": 1e-9}
    process = start(SCRIPT, *flags(**settings, runs=tmp_path, run_name="killed"), cwd=tmp_path)
    run, (begin, end) = tmp_path / "killed", SECTIONS[stage]
    while not ((run / "checkpoint.pt").exists() and ppo.load_checkpoint(run)["step"] > begin):
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.stdout.close()
    assert process.wait(timeout=60) == -signal.SIGKILL
    resume(run)
    step = int(re.search(r"Resumed at step ([-\d]+)", capsys.readouterr().out)[1])
    assert begin < step < end
    assert_same_run(run, finished_run)


def test_stages_one_by_one_are_the_whole(finished_run, tmp_path):
    """The same command with another --stage goes on; the result is that of one run."""
    for stage in ("sft", "reward-model", "all"):
        # Through the command line, which reads the arguments of the run so far.
        folder = ppo.main(ppo.parse_args(flags(**TINY, runs=tmp_path, stage=stage, run_name="steps")))
        assert (folder / "reference").is_dir()
        assert (folder / "reward_model").is_dir() == (stage != "sft")
        assert (folder / "model").is_dir() == (stage == "all")
    assert_same_run(folder, finished_run)


def the_run(folder: Path) -> Path:
    """The only run there."""
    (run,) = folder.iterdir()
    return run


def test_ppo_takes_models_from_elsewhere(models, finished_run, tmp_path):
    """The stage alone, with the models of another run, is the same as after the stages before it."""
    run = train(tmp_path, **models)
    curves, expected = curves_of(run), curves_of(finished_run)
    assert curves == {tag: expected[tag] for tag in expected if not re.match("sft/|reward_model/", tag)}
    assert not (run / "reference").exists() and not (run / "reward_model").exists()


def test_a_reward_model_learns_on(models, tmp_path):
    """With hardly any step size, the result is the given one, but for the head, normalised anew."""
    settings = {"stage": "reward-model", "reward_steps": 1, "reward_learning_rate": 1e-12}
    run = train(tmp_path, **models | settings)
    expected, result = (
        ppo.read_model(folder, kind=ppo.ScalarModel).state_dict()
        for folder in (models["reward_model"], run / "reward_model")
    )
    for name in expected:
        if not name.startswith("score."):
            torch.testing.assert_close(result[name], expected[name], msg=name)
    ratio = result["score.weight"] / expected["score.weight"]
    torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-4, atol=0)
    assert ratio.mean() > 0


def make_run_of_models(folder: Path, models: dict, **changes) -> tuple:
    """Models, rollout and batch of a first step of PPO, outside of a run."""
    args = ppo.Args(**TINY | models | {"max_completion_length": 32} | changes)
    model, frozen = ppo.read_model(models["model"]), ppo.read_model(models["model"])
    critic, reward_model = (ppo.read_model(models["reward_model"], kind=ppo.ScalarModel) for _ in range(2))
    rollout = ppo.collect_rollout(model, ppo.Reviews(), None, 1, args)
    batch, metrics = ppo.make_batch(rollout, frozen, reward_model, critic, torch.tensor(args.kl_coef), args)
    return args, model, critic, rollout, batch, metrics


def test_batch_of_a_step(models, tmp_path):
    """At first the policy is the reference and V is the reward model: the last value target is the score."""
    args, _, critic, rollout, batch, metrics = make_run_of_models(tmp_path, models, gae_lambda=1.0)
    assert len(batch.sequences) == 16 and batch.mask.sum(1).tolist() == [len(y) for _, y in batch.sequences]
    scores = ppo.final_scores(critic, rollout.sequences, rollout.finished, args)
    for row, (_, completion) in enumerate(batch.sequences):
        np.testing.assert_allclose(batch.returns[row, : len(completion)], scores[row], atol=1e-3)
    assert batch.advantages[batch.mask].mean().item() == pytest.approx(0, abs=1e-5)
    assert batch.advantages[batch.mask].std(correction=0).item() == pytest.approx(1, abs=1e-3)
    assert metrics["reward"] == pytest.approx(scores.mean().item(), abs=1e-5)
    rewards = ppo.sentiment_reward([], rollout.texts)
    assert metrics["true_reward"] == pytest.approx(np.mean(rewards), abs=1e-5)
    entropy = -sum(ppo.sequence_log_probs(ppo.read_model(models["model"]), [x]) for x in batch.sequences) / 16
    assert metrics["objective/entropy"] == pytest.approx(entropy.item(), rel=1e-3)
    part = batch.select([3, 1])
    end = max(len(completion) for _, completion in part.sequences)
    assert part.mask.shape == (2, end) and torch.equal(part.returns, batch.returns[[3, 1], :end])


def test_whitened_rewards(models, tmp_path):
    """Scaled over all tokens, most of which have a reward of 0 as long as the policy is the reference."""
    settings = {"gae_lambda": 1.0, "whiten_rewards": True}
    args, _, critic, rollout, batch, _ = make_run_of_models(tmp_path, models, **settings)
    scores, last = ppo.final_scores(critic, rollout.sequences, rollout.finished, args), batch.mask.sum(1) - 1
    rewards = np.zeros(int(batch.mask.sum()))
    rewards[: len(scores)] = scores  # in another order, which does not matter
    factor = 1 / rewards.std()
    shift = rewards.mean() * (1 - factor)  # the mean keeps its value
    found = batch.returns.gather(1, last[:, None])[:, 0]
    np.testing.assert_allclose(found, scores * factor + shift, atol=1e-3)


@pytest.mark.parametrize("ptx_coef", [0.0, 0.5])
def test_step_does_not_depend_on_micro_batches(ptx_coef, models, tmp_path):
    """Both networks move by the gradients of plain losses, of the demonstrations' likelihood too if asked."""
    args, model, critic, _, batch, _ = make_run_of_models(tmp_path, models, ptx_coef=ptx_coef)
    args = ppo.dataclasses.replace(args, max_grad_norm=1e9, micro_batch_size=5)
    pretraining = ppo.demonstrations(model, ppo.Reviews(), None, 7, args) if ptx_coef else []
    networks = [model, critic]
    expected = []
    for network in networks:
        if network is model:
            log_probs = ppo.completion_log_probs(model, batch.sequences)
            loss, _ = ppo.policy_loss(
                log_probs, batch.old_log_probs, batch.advantages, batch.mask, clip_coef=0.2
            )
            if pretraining:
                tokens = sum(len(completion) for _, completion in pretraining)
                loss = loss - 0.5 * ppo.sequence_log_probs(model, pretraining).sum() / tokens
        else:
            values = ppo.completion_values(critic, batch.sequences)
            loss, _ = ppo.value_loss(values, batch.old_values, batch.returns, batch.mask, value_clip_coef=0.2)
        gradients = torch.autograd.grad(loss, [*network.parameters()])
        expected += [x.detach() - y for x, y in zip(network.parameters(), gradients, strict=True)]
    optimizers = [torch.optim.SGD(network.parameters(), 1.0) for network in networks]
    metrics = ppo.take_step(*networks, *optimizers, batch, pretraining, args)
    found = [x.detach() for network in networks for x in network.parameters()]
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-3)
    assert metrics["losses/approx_kl"] < 1e-6 and metrics["losses/clip_fraction"] == 0
    assert ("losses/ptx_loss" in metrics) == bool(ptx_coef)


def test_sft_step_is_that_of_the_other_scripts_warm_up(tmp_path):
    """One step with the same numbers leaves the reference that dpo_llm.py makes; only its norm is smaller."""
    import dpo_llm as dpo

    shape = {
        name: TINY[name] for name in ("hidden_size", "num_layers", "num_heads", "sft_batch_size", "bf16")
    }
    shape |= {"sft_steps": 5, "runs": str(tmp_path), "eval_interval": 0, "eval_prompts": 8, "seed": 3}
    own = ppo.main(ppo.Args(**shape, stage="sft", run_name="own"))
    with pytest.raises(SystemExit):  # it cannot write reviews yet
        dpo.main(dpo.Args(**shape, run_name="other", num_pairs=4))
    one, other = (ppo.load_file(tmp_path / x / "reference" / "model.safetensors") for x in ("own", "other"))
    assert own == tmp_path / "own" and all(torch.equal(one[name], other[name]) for name in other)


@pytest.mark.parametrize(
    "changes",
    [
        {"ptx_coef": 0.1, "kl_target": 0.5, "whiten_rewards": True, "norm_adv": False},
        {"lora_rank": 2, "export": "adapters", "penalty_reward_value": None, "temperature": 0.7},
    ],
    ids=["mixes", "adapters"],
)
def test_resumed_with_other_flags(changes, models, tmp_path):
    """Resumed from a checkpoint in between, with adapters and an adapted coefficient too."""
    whole = train(tmp_path / "whole", **models | changes)
    part = train(tmp_path / "part", **models | changes)
    (part / "checkpoint.pt").unlink()  # that of step 2 takes its place
    resume(part)
    states = [ppo.load_checkpoint(run) for run in (whole, part)]
    assert checkpoint_difference(*states) is None and curves_of(whole) == curves_of(part)
    if "kl_target" in changes:
        assert states[0]["kl_coef"] != 0.2 and "losses/ptx_loss" in curves_of(whole)
    if "lora_rank" in changes:
        assert {"score.weight", "score.bias"} < {*states[0]["critic"]}
        assert all("lora_" in name for name in states[0]["model"])
        moved = states[0]["critic"]["score.weight"]
        begun = ppo.load_file(Path(models["reward_model"]) / "model.safetensors")["score.weight"]
        assert not torch.equal(moved, begun)
        assert (whole / "model" / "adapter_model.safetensors").exists()


@pytest.fixture(scope="module")
def peer(tmp_path_factory, chat_tokenizer) -> str:
    """A model of transformers with random weights, and a tokenizer with a chat template."""
    folder = tmp_path_factory.mktemp("peer")
    save_peer("qwen2", folder, chat_tokenizer, initializer_range=0.1)
    return str(folder)


def test_dataset_of_rankings_with_adapters(peer, tmp_path):
    """All stages on rankings of conversations, then PPO on prompts alone; there is no true reward."""
    rows = [
        {"prompt": [user(f"{i}")], "completions": [[assistant(x)] for x in ("1+", "2*3", "4")]}
        for i in range(60)
    ]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    settings = {"model": peer, "dataset": data, "lora_rank": 2, "sft_steps": 2, "max_completion_length": 8}
    run = train(tmp_path / "runs", **settings, reward_steps=3, max_steps=1, eval_interval=1)
    curves = curves_of(run)
    assert {"sft/loss", "reward_model/eval_accuracy", "eval/learned_reward", "reward"} <= {*curves} | {
        "sft/loss"
    }
    assert "eval/true_reward" not in curves and "true_reward" not in curves
    assert "reward_model/true_accuracy" not in curves
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": row["prompt"]} for row in rows])
    folders = {"model": str(run / "reference"), "reward_model": str(run / "reward_model"), "stage": "ppo"}
    settings |= {"dataset": prompts, "max_steps": 1, "eval_interval": 1}
    again = train(tmp_path / "again", **settings | folders)
    assert curves_of(again)["eval/kl_to_reference"][0] == pytest.approx(0, abs=1e-3)


def test_two_processes_take_the_steps_of_one(models, tmp_path):
    """One step of each stage: metrics, and the gradients that the first moments of the optimizers hold."""
    settings = TINY | {"model": models["model"], "sft_steps": 1, "reward_steps": 1, "max_steps": 1}
    settings |= {"eval_interval": 1, "num_minibatches": 1, "sft_learning_rate": 1e-4}
    settings |= {"update_epochs": 1, "warmup_steps": 0, "num_rankings": 30, "micro_batch_size": 5}
    one = train(tmp_path / "one", **settings)
    run_two_processes(SCRIPT, 29521, *flags(**settings, runs=tmp_path / "two"), cwd=tmp_path)
    two = the_run(tmp_path / "two")
    assert (one / "rankings.jsonl").read_text() == (two / "rankings.jsonl").read_text()
    states = [ppo.load_checkpoint(run) for run in (one, two)]
    for name in ("optimizer", "critic_optimizer"):
        moments = [[x["exp_avg"] for x in state[name]["state"].values()] for state in states]
        for x, y in zip(*moments, strict=True):
            torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-3)
    curves = [curves_of(run) for run in (one, two)]
    assert curves[0].keys() == curves[1].keys()
    for tag in curves[0].keys() - {"eval/distinct"}:  # which each process counts for itself
        values = [[*x[tag].values()] for x in curves]
        np.testing.assert_allclose(*values, rtol=2e-3, atol=1e-3, err_msg=tag)


def test_grpo_learns_from_the_reward_model(models, tmp_path):
    """Its reward is the score, with a fixed one for what was cut off; the true one is logged beside it."""
    import grpo_llm as grpo

    settings = {name: models[name] for name in ("model", "reward_model")} | {"task": "ppo_llm:Reviews"}
    settings |= {"num_prompts": 4, "num_generations": 4, "max_steps": 1, "eval_prompts": 8, "eval_samples": 1}
    settings |= {"num_minibatches": 1, "bf16": False, "max_completion_length": 14, "runs": str(tmp_path)}
    groups, sample_groups = [], grpo.sample_groups

    def keep(*arguments):
        groups.extend(sample_groups(*arguments))
        return groups[-len(arguments[2]) :]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo, "sample_groups", keep)
        run = grpo.main(grpo.Args(**settings, eval_interval=0))
    scorer, cut_off = ppo.read_model(models["reward_model"], kind=ppo.ScalarModel), 0
    for group in groups:
        sequences = [ppo.Sequence(group.prompt, tokens) for tokens in group.completions.tokens]
        scores = ppo.all_scores(scorer, sequences, ppo.Args())
        expected = torch.where(group.completions.finished, scores, torch.tensor(-1.0))
        torch.testing.assert_close(group.rewards["reward"], expected, atol=1e-4, rtol=1e-4)
        cut_off += (~group.completions.finished).sum()
    assert 0 < cut_off < 16
    curves = curves_of(run)
    assert curves["reward"][1] == pytest.approx(
        np.mean([x.rewards["reward"].mean() for x in groups]), abs=1e-5
    )
    assert curves["rewards/sentiment/mean"][1] != curves["reward"][1]
    weights = tmp_path / "moved"
    ppo.shutil.copytree(models["reward_model"], weights)
    (weights / "tokenizer.json").unlink()
    ppo.make_tokenizer([*ppo.Reviews.vocabulary, "more"]).save_pretrained(weights)
    message = refusal(grpo.main, grpo.Args(**settings | {"reward_model": str(weights)}))
    assert "it needs the same vocabulary" in message


# ----------------------------------------------------------------------------------------- bad input to runs


def test_missing_models_are_named(tmp_path, models, tokenizer):
    run = train(tmp_path, stage="sft", sft_steps=2, run_name="begun")
    message = refusal(resume, run, "--stage", "ppo")
    assert "begun is at step -12, in an earlier stage; resume it with --stage all" in message
    message = refusal(train, tmp_path, stage="ppo", run_name="new")
    assert "new has no reference; run the stage that makes it, or give a folder" in message
    other = ppo.make_tokenizer([*ppo.Reviews.vocabulary, "more"])
    save_peer("llama", tmp_path / "other", other, "SequenceClassification", num_labels=1)
    message = refusal(train, tmp_path, **models | {"reward_model": str(tmp_path / "other")})
    assert "it needs the same vocabulary" in message


def test_models_may_move_but_not_change(tmp_path, models):
    run = train(tmp_path, **models | {"max_steps": 1, "eval_interval": 0})
    moved = tmp_path / "moved"
    ppo.shutil.copytree(models["reward_model"], moved)
    resume(run, "--max-steps", "2", "--reward-model", str(moved))
    weights = ppo.load_file(moved / "model.safetensors")
    ppo.save_file(weights | {"score.weight": weights["score.weight"] * 2}, moved / "model.safetensors")
    message = refusal(resume, run, "--max-steps", "3", "--reward-model", str(moved))
    assert f"began with another reward_model than {moved}" in message


def test_model_that_writes_no_reviews_is_named(tmp_path):
    assert "no two completions of Reviews of which one is better" in refusal(train, tmp_path, sft_steps=1)


def test_batch_must_be_divisible_by_the_processes(monkeypatch, tmp_path):
    monkeypatch.setattr(ppo, "rank_and_world", lambda: (0, 3))
    assert "batch_size = 16 must be a multiple of 3 processes" in refusal(train, tmp_path)
    monkeypatch.setattr(ppo, "rank_and_world", lambda: (0, 16))
    assert "num_minibatches = 2 must divide them" in refusal(train, tmp_path)
    monkeypatch.setattr(ppo, "rank_and_world", lambda: (0, 4))
    assert "must be at least 4, one per process" in refusal(train, tmp_path, reward_batch_size=3)


@pytest.mark.parametrize(
    ("loss", "flag"), [("ranking_loss", "--reward-learning-rate"), ("value_loss", "--learning")]
)
def test_loss_that_is_not_finite_ends_the_run(loss, flag, models, tmp_path, monkeypatch):
    function = getattr(ppo, loss)

    def spoiled(*arguments, **keywords):
        found = function(*arguments, **keywords)
        return found * math.nan if loss == "ranking_loss" else (found[0] * math.nan, found[1])

    monkeypatch.setattr(ppo, loss, spoiled)
    settings = {"stage": "reward-model", "model": models["model"]} if loss == "ranking_loss" else models
    message = refusal(train, tmp_path, **settings)
    assert re.search(rf"is nan at step (-11|1); lower {flag}", message) and str(the_run(tmp_path)) in message


def test_evaluate_prints_the_metrics(finished_run, capsys):
    ppo.main(ppo.parse_args(["--evaluate", str(finished_run)]))
    told = capsys.readouterr().out
    values = dict(re.findall(r"(\w+) (-?\d+\.\d+)", told.split("evaluation")[1]))
    curves = curves_of(finished_run)
    for name in EVALUATED:
        assert float(values[name]) == pytest.approx(curves[f"eval/{name}"][4], abs=1e-3)


# -------------------------------------------------------------------------------------------------- learning


def test_it_learns(models, tmp_path):
    """PPO raises the learned reward and, with this reward model, the true one."""
    settings = {"max_steps": 12, "eval_interval": 12, "batch_size": 64, "num_minibatches": 4, "kl_coef": 0.05}
    settings |= {
        "learning_rate": 2e-3,
        "value_learning_rate": 2e-3,
        "micro_batch_size": 64,
        "eval_prompts": 256,
    }
    reward = train(
        tmp_path / "reward", stage="reward-model", model=models["model"], num_rankings=1500, reward_steps=80,
        reward_batch_size=16, reward_learning_rate=5e-3, micro_batch_size=64, eval_prompts=256,
    )  # fmt: skip
    assert curves_of(reward)["reward_model/true_accuracy"][0] > 0.6
    folders = {"model": models["model"], "reward_model": str(reward / "reward_model"), "stage": "ppo"}
    curves = curves_of(train(tmp_path / "policy", **settings | folders))
    learned, true = (list(curves[f"eval/{name}"].values()) for name in ("learned_reward", "true_reward"))
    print(learned, true, curves_of(reward)["reward_model/true_accuracy"], curves["eval/kl_to_reference"])
    assert learned[1] > learned[0] + 0.3 and true[1] > true[0] + 0.05
