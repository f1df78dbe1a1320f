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
from test_ppo_continuous_runs import flags, kill_when, refusal

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


# ------------------------------------------------------------------------------------- loss of the reward model


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


# -------------------------------------------------------------------------------------- rewards and advantages


def test_shaped_rewards_by_hand():
    log_probs, reference = double([-1, -2, -3], [-1, -1, 9]), double([-2, -2, -1], [-1.5, -1, 5])
    rewards = ppo.shaped_rewards(double(5, -1), log_probs, reference, masks(3, 2), 0.1)
    np.testing.assert_allclose(rewards, [[-0.1, 0, 0.2 + 5], [-0.05, -1, 0]], atol=1e-12)


def test_mean_shaped_reward_is_the_exact_kl():
    """Over all four answers of two tokens, each with its probability: score less kl_coef times the KL."""
    first, second = (torch.randn(2, 2, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    policy, reference = torch.stack((first, second))  # rows: of the first and of the second token
    answers = list(itertools.product(range(2), repeat=2))
    of = [[torch.stack([p[t, token] for t, token in enumerate(x)]) for x in answers] for p in (policy, reference)]
    log_probs, reference_log_probs = map(torch.stack, of)
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


# ------------------------------------------------------------------------------------------------------ losses


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
    _, metrics = ppo.policy_loss(new[:, None], old[:, None], old[:, None].exp(), masks(*[1] * 9), clip_coef=0.2)
    per_token = [
        ppo.policy_loss(*(x.view(1, 1) for x in (a, b, a)), masks(1), clip_coef=0.2)[1]["losses/approx_kl"]
        for a, b in zip(new, old)
    ]
    assert metrics["losses/approx_kl"].item() == pytest.approx(sum(per_token).item() / 9)
    mean = sum(p.exp() * x for p, x in zip(old, per_token))
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
    """Completions of a few prompts; some neighbours share theirs. No token is 0, which pads in transformers."""

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
    rollout = ppo.Rollout([], sequences, [], None, None, finished, None)
    scores = ppo.all_scores(model, sequences, ppo.Args())
    found = ppo.final_scores(model, rollout, ppo.Args(penalty_reward_value=-3.0))
    torch.testing.assert_close(found, torch.stack((scores[0], torch.tensor(-3.0), scores[2])))
    torch.testing.assert_close(ppo.final_scores(model, rollout, ppo.Args(penalty_reward_value=None)), scores)


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


# ---------------------------------------------------------------------------------------------------- rankings


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
        ({"prompt": "the", "chosen": [assistant("1")], "rejected": [assistant("2")]}, "both text or both", {}),
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


# --------------------------------------------------------------------------------------------------- arguments


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
        ({"sft_steps": 0}, "a small model is made by sft_steps, so they cannot be 0 without --model"),
        ({"reward_model": "a", "model": "b"}, "takes the place of the stages before PPO: give --stage ppo"),
        ({"stage": "ppo", "model": "a"}, "stage ppo needs the models of the others"),
        ({"stage": "ppo", "reward_model": "a"}, "stage ppo needs the models of the others"),
        ({"stage": "reward-model"}, "stage reward-model needs a model that writes"),
        ({"export": "adapters"}, "without lora_rank there are no adapters to export"),
        ({"dataset": "a.jsonl", "model": "b", "reward": ["sentiment=2"]}, "a dataset has none"),
        ({"resume": "a", "evaluate": "b"}, "resume, evaluate and run_name exclude each other"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    with pytest.raises(ValueError) as error:
        ppo.Args(**changes)
    assert message in str(error.value)


def test_arguments_at_their_bounds_are_taken():
    ppo.Args(value_clip_coef=math.inf, penalty_reward_value=None, gamma=1.0, gae_lambda=0.0, kl_coef=0.0)
    parsed = ppo.parse_args("--stage ppo --model a --reward-model b --kl-target 3 --no-norm-adv".split())
    assert parsed == ppo.Args(stage="ppo", model="a", reward_model="b", kl_target=3.0, norm_adv=False)
    steps = {"all": -525, "sft": -525, "reward-model": -225, "ppo": 0}
    assert all(ppo.Args(stage=x, resume="a").first_step == step for x, step in steps.items())


# --------------------------------------------------------------------------------------------------- short runs

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


PPO_METRICS = """reward true_reward objective/kl objective/entropy objective/rlhf_reward kl_coef learning_rate
    num_tokens grad_norm completions/mean_length completions/clipped_ratio losses/policy_loss losses/value_loss
    losses/approx_kl losses/clip_fraction losses/value_clip_fraction losses/value_grad_norm
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
        curves["reward"][3] - 0.3 * curves["objective/kl"][3], abs=1e-6
    )
    rates = 3e-4 * np.array([0.5, 1, 1 - 0.95 / 2, 0.05])
    np.testing.assert_allclose(list(curves["learning_rate"].values()), rates, rtol=1e-5)
    lengths = 16 * np.array(list(curves["completions/mean_length"].values()))
    np.testing.assert_allclose(np.diff([0, *curves["num_tokens"].values()]), lengths, atol=0.5)


def test_files_of_a_run(finished_run, tokenizer):
    """Each stage leaves a folder that transformers reads; the rows are ranked by the true reward."""
    for name, kind in (("reference", "CausalLM"), ("model", "CausalLM"), ("reward_model", "SequenceClassification")):
        peer = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(finished_run / name)
        assert type(peer).__name__ == f"LlamaFor{kind}"
        assert transformers.AutoTokenizer.from_pretrained(finished_run / name).get_vocab() == tokenizer.get_vocab()
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
            np.testing.assert_allclose(ppo.sentiment_reward([], row["completions"]), row["true_rewards"], rtol=1e-6)


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
    for stage, step in (("sft", None), ("reward-model", -12), ("all", -1)):
        folder = train(tmp_path, stage=stage, run_name="steps")
        assert (folder / "reference").is_dir()
        assert (folder / "reward_model").is_dir() == (stage != "sft")
        assert (folder / "model").is_dir() == (stage == "all")
        assert step is None or True
    assert_same_run(folder, finished_run)
