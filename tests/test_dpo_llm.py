"""dpo_llm.py, against TRL's losses, closed forms, plain definitions and hand-worked numbers."""

import contextlib
import copy
import json
import math
import random
import re
import shutil
import signal
import time
import tracemalloc
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import transformers
from helpers import checkpoint_difference, read_curves, run_two_processes, start
from test_grpo_llm import SHAPE, write_rows
from test_ppo_continuous_runs import flags, kill_when, nth_evaluation, refusal

import dpo_llm as dpo

SCRIPT = "dpo_llm.py"
CPU = torch.device("cpu")
LOSSES = ["dpo", "ipo", "simpo", "orpo", "kto", "sft"]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# ------------------------------------------------------------------------------------- losses of pairs


def double(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # Log-ratios 1 and -1, so the margin is 0.5 * 2 = 1.
        ({"loss": "dpo"}, math.log(1 + math.exp(-1))),
        ({"loss": "dpo", "label_smoothing": 0.1}, math.log(1 + math.exp(-1)) + 0.1),  # of 1 in a tenth
        ({"loss": "ipo"}, (1 / 2 - -1 / 4 - 1) ** 2),
        # Per token -2 and -1.
        ({"loss": "simpo", "simpo_gamma": 0.3}, math.log(1 + math.exp(0.5 + 0.3))),
        ({"loss": "sft"}, 2.0),
    ],
)
def test_losses_by_hand(settings, expected):
    """A pair of 2 and 4 tokens; the rewards are those the loss speaks of."""
    x = double(-4), double(-4), double(-5), double(-3), double(2), double(4)
    losses, chosen, rejected = dpo.preference_loss(*x, beta=0.5, **settings)
    assert losses.item() == pytest.approx(expected, rel=1e-12)
    expected = (0.5, -0.5) if settings["loss"] in ("dpo", "ipo") else (-1.0, -0.5)
    assert (chosen.item(), rejected.item()) == expected
    assert losses.shape == chosen.shape == rejected.shape == (1,)


def test_odds_ratio_by_hand():
    """Probabilities of 1/2 and 1/4 per token have odds of 1 and 1/3, whose ratio 3 gives -log(3/4)."""
    x = double(2 * math.log(1 / 2)), double(3 * math.log(1 / 4)), None, None, double(2), double(3)
    for weight in (0.0, 1.0, 0.25):
        losses, *rewards = dpo.preference_loss(*x, loss="orpo", beta=0.1, orpo_lambda=weight)
        assert losses.item() == pytest.approx(math.log(2) + weight * math.log(4 / 3), rel=1e-12)
    assert [y.item() for y in rewards] == pytest.approx([-0.1 * math.log(2), -0.1 * math.log(4)])


@pytest.mark.parametrize("loss", ["dpo", "ipo", "simpo", "orpo", "sft"])
def test_gradient_is_the_difference_quotient(loss):
    """In the four log-probabilities; the losses without a reference take none, and ask for none."""
    lengths = double(3, 5), double(4, 2)
    x = torch.stack((double(-3, -8), double(-7, -1), double(-4, -7), double(-5, -2))).requires_grad_()
    settings = {"loss": loss, "beta": 0.4, "label_smoothing": 0.2 * (loss == "dpo"), "simpo_gamma": 0.6}

    def total(x):
        return dpo.preference_loss(*x, *lengths, orpo_lambda=0.7, **settings)[0].sum()

    assert torch.autograd.gradcheck(total, x)
    (gradient,) = torch.autograd.grad(total(x), x)
    assert (gradient[0] < 0).any() and (gradient[2:] == 0).all() == (loss not in ("dpo", "ipo"))
    assert (gradient[1] > 0).any() == (loss != "sft")
    _, *rewards = dpo.preference_loss(*x, *lengths, **settings)
    assert not any(reward.requires_grad for reward in rewards)
    if loss in ("simpo", "orpo", "sft"):
        without = dpo.preference_loss(*x[:2], None, None, *lengths, orpo_lambda=0.7, **settings)[0]
        assert without.sum() == total(x)


@pytest.mark.parametrize("loss", ["dpo", "ipo", "simpo", "orpo", "sft"])
def test_sums_and_means_over_tokens(loss):
    """Twice the tokens with the same sums change all but dpo; with twice the sums they change only dpo."""
    x, lengths = torch.stack((double(-3), double(-5), double(-4), double(-2))), torch.stack((double(3),) * 2)

    def value(scale, longer):
        return dpo.preference_loss(*scale * x, *longer * lengths, loss=loss, beta=0.4)[0].item()

    assert (value(1, 2) == value(1, 1)) == (loss == "dpo")
    assert (value(2, 2) == pytest.approx(value(1, 1), rel=1e-12)) == (loss != "dpo")
    for rejected in (0, 1):  # each completion by its own length
        lengths[rejected] *= 2
        assert (value(1, 1) == value(1, 0.5)) == (loss == "dpo")


def test_label_smoothing_is_the_expected_loss_of_flipped_labels():
    """-(1 - e) log sigmoid(h) - e log sigmoid(-h), equation 3 of Mitchell's note on cDPO, from two of dpo."""
    x, e = torch.randn(4, 6, dtype=torch.float64), 0.3
    ones = torch.ones(6)
    settings = {"loss": "dpo", "beta": 0.9}
    found = dpo.preference_loss(*x, ones, ones, label_smoothing=e, **settings)[0]
    right = dpo.preference_loss(*x, ones, ones, **settings)[0]
    flipped = dpo.preference_loss(*x[[1, 0, 3, 2]], ones, ones, **settings)[0]
    torch.testing.assert_close(found, (1 - e) * right + e * flipped)


def test_odds_ratio_is_finite_where_everything_is_certain():
    """Probabilities of 1 have infinite odds; far apart, both signs, and in float32."""
    ends = [0.0, -1e-12, -1e-7, -1e-3, -50.0, -3000.0]
    x = torch.tensor([[a, b] for a in ends for b in ends]).T.clone().requires_grad_()
    ones = torch.ones(36)
    losses, *_ = dpo.preference_loss(x[0], x[1], None, None, ones, ones, loss="orpo", beta=0.1)
    (gradient,) = torch.autograd.grad(losses.sum(), x)
    assert losses.isfinite().all() and gradient.isfinite().all() and (losses >= 0).all()
    # 1 - p = -expm1(-1e-3): odds of 999.5 against e^-50.
    near = losses[3 * 6 + 4].item(), losses[4 * 6 + 3].item()
    assert near == pytest.approx((1e-3, 50 + 50 + math.log(999.5)), rel=1e-5)


@pytest.mark.parametrize("loss", ["dpo", "ipo", "simpo"])
def test_extreme_margins_are_finite(loss):
    x = torch.tensor([[0.0, -1e5], [-1e5, 0.0]]).requires_grad_()
    zeros, ones = torch.zeros(2), torch.ones(2)
    losses, *_ = dpo.preference_loss(*x, zeros, zeros, ones, ones, loss=loss, beta=0.1)
    (gradient,) = torch.autograd.grad(losses.sum(), x)
    assert losses.isfinite().all() and gradient.isfinite().all()


# ---------------------------------------------------------------------------------------- losses of TRL

GOLDENS = Path(__file__).parent / "goldens" / "dpo_trl.json"
SETTINGS = {
    "dpo": {"loss": "dpo", "beta": 0.3},
    "cdpo": {"loss": "dpo", "beta": 0.3, "label_smoothing": 0.2},
    "ipo": {"loss": "ipo", "beta": 0.3},
    "simpo": {"loss": "simpo", "beta": 2.5, "simpo_gamma": 1.4},
    "orpo": {"loss": "orpo", "beta": 0.1, "orpo_lambda": 0.6},
    "kto": {"loss": "kto", "beta": 0.3, "desirable_weight": 1.2, "undesirable_weight": 0.7},
    "kto-below-0": {"loss": "kto", "beta": 0.3, "desirable_weight": 1.2, "undesirable_weight": 0.7},
}


def golden_inputs(name: str) -> dict:
    """Numbers that do not depend on a generator: of 5 pairs, the chosen ones and then the rejected ones."""
    i = torch.arange(10, dtype=torch.float64)
    reference = -6 - 3 * torch.sin(1.7 * i)
    return {
        "policy": (reference + 2 * torch.cos(2.3 * i)).requires_grad_(),
        "reference": reference,
        "lengths": torch.tensor([4, 7, 2, 9, 5, 6, 3, 8, 1, 5]),
        "gaps": torch.sin(1.1 * i) * 2 + (-0.9 if name == "kto-below-0" else 0.9),  # of mismatched prompts
    }


def own_loss(name: str, x: dict) -> torch.Tensor:
    settings, (chosen, rejected) = SETTINGS[name], x["policy"].chunk(2)
    if settings["loss"] == "kto":
        settings = {key: value for key, value in settings.items() if key != "loss"}
        return dpo.kto_loss(
            x["policy"], x["reference"], torch.arange(10) < 5, x["gaps"].mean(), **settings
        ).mean()
    return dpo.preference_loss(
        chosen, rejected, *x["reference"].chunk(2), *x["lengths"].chunk(2), **settings
    )[0].mean()


def trl_loss(name: str, x: dict) -> torch.Tensor:
    """Methods of TRL's trainers, called with stand-ins for them; private interfaces, of 1.16."""
    settings, trainer, ratios = SETTINGS[name], MagicMock(), x["policy"] - x["reference"]
    trainer.beta, trainer.accelerator.device = settings["beta"], CPU
    trainer.accelerator.gather_for_metrics.side_effect = lambda y: y
    trainer.accelerator.gather.side_effect = lambda y: y
    means = (x["policy"] / x["lengths"]).chunk(2)
    if name in ("simpo", "cdpo"):  # TRL has cDPO for sums without a reference; log-ratios stand in for them
        from trl.experimental.cpo import CPOTrainer

        trainer.alpha, trainer.label_smoothing = 0.0, settings.get("label_smoothing", 0.0)
        trainer.loss_type = "simpo" if name == "simpo" else "sigmoid"
        trainer.simpo_gamma = settings.get("simpo_gamma")
        return CPOTrainer.cpo_loss(trainer, *(means if name == "simpo" else ratios.chunk(2)))[0].mean()
    if name == "orpo":
        from trl.experimental.orpo import ORPOTrainer

        trainer.beta = settings["orpo_lambda"]
        return (-means[0] - ORPOTrainer.odds_ratio_loss(trainer, *means)[0]).mean()
    # A column of the prompt, then each completion with its log-probability in equal parts.
    mask = torch.arange(-1, 9) < x["lengths"][:, None]
    mask[:, 0] = False
    outputs = MagicMock()
    outputs.log_probs = mask[:, 1:] * (x["policy"] / x["lengths"])[:, None]
    outputs.entropy = outputs.mean_logits = torch.zeros(10, 9)
    outputs.is_top1 = torch.zeros(10, 9, dtype=torch.bool)
    tokens = {"input_ids": mask.long(), "attention_mask": mask.long(), "completion_mask": mask.long()}
    model = MagicMock(return_value=outputs)
    trainer.model.training = trainer.precompute_ref_logps = True
    trainer.aux_loss_enabled = trainer.use_weighting = False
    if name.startswith("kto"):
        from trl import KTOTrainer

        trainer.loss_type, trainer.calculate_KL, trainer._tp_size = "kto", True, 1
        trainer.desirable_weight = settings["desirable_weight"]
        trainer.undesirable_weight = settings["undesirable_weight"]
        trainer._compute_kl_logps.return_value, trainer._total_train_tokens = x["gaps"] - 3, 0
        tokens |= {"label": torch.arange(10) < 5, "ref_logps": x["reference"]}
        tokens |= {"ref_KL_logps": torch.full((10,), -3.0)}
        return KTOTrainer._compute_loss(trainer, model, tokens, False)
    from trl import DPOTrainer

    trainer.ld_alpha, trainer.f_divergence_type, trainer.label_smoothing = None, "reverse_kl", 0.0
    trainer.loss_types, trainer.loss_weights = ["ipo" if name == "ipo" else "sigmoid"], [1.0]
    trainer._tp_size, trainer._total_train_tokens = 1, 0
    chosen, rejected = x["reference"].chunk(2)
    tokens |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    return DPOTrainer._compute_loss(trainer, model, tokens, False)


def with_gradient(loss, name: str) -> dict:
    x = golden_inputs(name)
    value = loss(name, x)
    return {"loss": value.item(), "gradient": torch.autograd.grad(value, x["policy"])[0].tolist()}


def assert_close_to_golden(found: dict, name: str) -> None:
    expected = json.loads(GOLDENS.read_text())[name]
    tolerance = 1e-5 if name == "orpo" else 1e-9  # TRL's odds ratio is computed in float32
    assert found["loss"] == pytest.approx(expected["loss"], rel=tolerance)
    np.testing.assert_allclose(found["gradient"], expected["gradient"], rtol=tolerance, atol=1e-9)


@pytest.mark.parametrize("name", SETTINGS)
def test_losses_are_those_of_trl(name):
    """Values and gradients; frozen, made with TRL 1.16.0 by this file run as a script."""
    assert_close_to_golden(with_gradient(own_loss, name), name)


@pytest.mark.parametrize("name", SETTINGS)
def test_goldens_are_those_of_trl(name):
    pytest.importorskip("trl", minversion="1.16")
    assert_close_to_golden(with_gradient(trl_loss, name), name)


# ------------------------------------------------------------------------------------------ loss of KTO


def test_kto_loss_by_hand():
    """Log-ratio 3, KL 1, beta log(3)/2: a gain of log 3, whose sigmoid is 3/4."""
    settings = {"beta": math.log(3) / 2, "desirable_weight": 2.0, "undesirable_weight": 3.0}
    policy = double(-4, -4, -8, -8).requires_grad_()
    labels = torch.tensor([True, False, True, False])
    losses = dpo.kto_loss(policy, double(-7, -7, -7, -7), labels, 1.0, **settings)
    assert losses.tolist() == pytest.approx([2 * 0.25, 3 * 0.75, 2 * 0.75, 3 * 0.25])
    (gradient,) = torch.autograd.grad(losses.sum(), policy)
    slope = settings["beta"] * 3 / 16  # sigmoid' is 3/4 * 1/4
    assert gradient.tolist() == pytest.approx([-2 * slope, 3 * slope, -2 * slope, 3 * slope])


def test_kl_of_kto_is_a_constant_and_not_below_0():
    policy, reference = torch.randn(2, 6, dtype=torch.float64)
    policy.requires_grad_()
    labels = torch.arange(6) % 2 == 0
    kl = policy.mean() + 5
    losses = dpo.kto_loss(policy, reference, labels, kl, beta=0.3)
    (gradient,) = torch.autograd.grad(losses.sum(), policy)
    again = dpo.kto_loss(policy, reference, labels, kl.detach().clone(), beta=0.3)
    assert torch.equal(again, losses) and torch.equal(torch.autograd.grad(again.sum(), policy)[0], gradient)
    below, zero, above = (
        dpo.kto_loss(policy, reference, labels, x, beta=0.3) for x in (torch.tensor(-2.0), 0.0, 2.0)
    )
    assert torch.equal(below, zero) and (above != zero).all()


# ------------------------------------------------------------------------------------------ known optima


def tabular_policy(loss_of_log_probs, size: int) -> torch.Tensor:
    """The categorical distribution that minimises a loss, by LBFGS."""
    logits = torch.zeros(size, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = loss_of_log_probs(logits.log_softmax(0))
        loss.backward()
        return loss

    optimizer.step(closure)
    return logits.detach().softmax(0)


@pytest.mark.parametrize("loss", ["dpo", "ipo"])
@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_exact_optimum_over_a_few_answers(loss, beta):
    """Labels by Bradley-Terry, every pair with its probability.

    dpo ends in pi_ref exp(r / beta) / Z (Rafailov et al. 2023, equation 4), ipo in pi_ref exp(p / beta) / Z,
    where p is the probability of winning against another answer of the data (Azar et al. 2023, section 5).
    """
    r = double(0.3, -1.0, 1.2, 0.0, 0.7)
    reference, data = double(0.1, 0.3, 0.05, 0.25, 0.3), double(0.3, 0.2, 0.1, 0.2, 0.2)
    wins = (r[:, None] - r).sigmoid()
    i, j = (x.flatten() for x in torch.meshgrid(torch.arange(5), torch.arange(5), indexing="ij"))
    weights, ones = data[i] * data[j] * wins[i, j], torch.ones(25)  # i against j, and i preferred

    def expected_loss(log_probs):
        pairs = log_probs[i], log_probs[j], reference.log()[i], reference.log()[j]
        return (weights * dpo.preference_loss(*pairs, ones, ones, loss=loss, beta=beta)[0]).sum()

    gain = r if loss == "dpo" else wins @ data
    optimum = (reference.log() + gain / beta).softmax(0)
    found = tabular_policy(expected_loss, 5)
    torch.testing.assert_close(found, optimum, atol=1e-4, rtol=0)
    assert (found - reference).abs().max() > 0.01


def test_margins_at_the_optimum_of_one_pair():
    """One answer is always preferred: cDPO stops at a margin of log((1 - e) / e), ipo at 1 / (2 beta)."""
    reference, one = double(0.2, 0.8).log(), torch.ones(1)
    margins = {}
    for loss, smoothing in (("dpo", 0.1), ("ipo", 0.0)):

        def value(x, loss=loss, smoothing=smoothing):
            pair = x[:1], x[1:], reference[:1], reference[1:], one, one
            return dpo.preference_loss(*pair, loss=loss, beta=0.4, label_smoothing=smoothing)[0].sum()

        ratios = tabular_policy(value, 2).log() - reference
        margins[loss] = 0.4 * (ratios[0] - ratios[1]).item()
    assert margins["dpo"] == pytest.approx(math.log(9), abs=1e-4)
    assert margins["ipo"] / 0.4 == pytest.approx(1 / (2 * 0.4), abs=1e-4)


# --------------------------------------------------------------------------------- rewards and the task


@pytest.mark.parametrize(
    ("completion", "total"),
    [
        (" was superb.", 2),
        (" was nice, and the plot was funny.", 2),
        (" was not nice, but the cast was very superb.", 3),
        (" was very awful, and the ending was not boring.", -3),
        (" was plain, and the music was not odd.", 0),
        (" was not awful.", 2),
        (" was nice", None),  # no full stop
        ("was nice.", None),
        (" was nice. ", None),
        (" was not very nice.", None),
        (" was nice and the plot was nice.", None),
        (" was nice, or the plot was nice.", None),
        (" was nice, and the film was nice.", None),
        (" was nice. was nice.", None),
        (" was good.", None),
        (" Was nice.", None),
        (" was nice.\n", None),
        ("", None),
    ],
)
def test_sentiment_reward(completion, total):
    expected = 0.0 if total is None else 1 / (1 + math.exp(-total / 2))
    assert dpo.sentiment_reward(["a film"], [completion]) == pytest.approx([expected], rel=1e-12)


HOSTILE = [" superb" * 150_000, "\x00" * 1_000_000, " was nice, and the plot" * 50_000, "☃" * 300_000]
HOSTILE += [" was superb" + ", and the plot was superb" * 41_000 + ".", " was very" * 120_000, "\x00"]
HOSTILE += [" was ﬁne.", " was nice.\x00", " was nісe."]  # a ligature, an end of a string, Cyrillic letters


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text[:10]))
def test_hostile_completions_cost_little_and_gain_nothing(text):
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        value = dpo.sentiment_reward(["a film"], [text])
        seconds.append(time.perf_counter() - begin)
    assert value == [0.0] and min(seconds) < 0.002


def test_reviews():
    """Held-out prompts never come up in training, nothing needs another vocabulary, and moods are mixed."""
    task, tokenizer = dpo.Reviews(), dpo.make_tokenizer(dpo.Reviews.vocabulary)
    train = [dpo.draw(task, 3, i) for i in range(-200, 200)]
    held_out = [dpo.draw(task, 3, i, held_out=True) for i in range(100)]
    assert train[7] == dpo.draw(dpo.Reviews(), 3, -193) != dpo.draw(task, 4, -193)
    assert held_out == [dpo.draw(task, 4, i, held_out=True) for i in range(100)]
    assert not {x["prompt"] for x in train} & {x["prompt"] for x in held_out}
    assert len({x["prompt"] for x in train}) > 300
    rng = random.Random(0)
    texts = [task.demonstration(problem, rng) for problem in train]
    ids = tokenizer([x + "<eos>" for x in texts], add_special_tokens=False)["input_ids"]
    assert tokenizer.batch_decode(ids, skip_special_tokens=True) == texts
    assert max(map(len, ids)) <= task.max_completion_length
    assert all(x[-1] == tokenizer.eos_token_id and tokenizer.pad_token_id not in x for x in ids)
    prompts = tokenizer([x["prompt"] for x in train])["input_ids"]
    assert all(x[0] == tokenizer.bos_token_id and tokenizer.pad_token_id not in x for x in prompts)
    rewards = dpo.score(task, train, texts)["reward"]
    assert all(map(dpo.REVIEW.fullmatch, texts)) and 0.35 < rewards.mean() < 0.49 and rewards.std() > 0.2


class Lengths:
    """A task of the user's: digits, and the more of them the better."""

    rewards = {"length": (lambda prompts, completions, **columns: [len(x) / 8 for x in completions], 1.0)}
    max_completion_length = 8
    vocabulary = [*"0123456789="]

    def problem(self, rng: random.Random) -> dict:
        return {"prompt": f"{rng.randrange(1000)}=", "first": rng.randrange(10)}

    def demonstration(self, problem: dict, rng: random.Random) -> str:
        return str(problem["first"]) * rng.randrange(1, 6)


def begins_right(
    prompts: list[str], completions: list[str], first: list[int], **columns: list
) -> list[float]:
    return [float(completion.startswith(str(digit))) for completion, digit in zip(completions, first)]


def nothing(prompts, completions, **columns):
    return [None] * len(completions)


def test_rewards_of_the_command_line():
    """One joins those of the task, another weight or function replaces one; TRL's signature."""
    problems = [{"prompt": "1=", "first": 2}, {"prompt": "7=", "first": 3}]

    def scores(*words: str) -> dict:
        task = dpo.make_task(dpo.Args(task=f"{__name__}:Lengths", reward=[*words]))
        return {name: x.tolist() for name, x in dpo.score(task, problems, ["22", "4444"]).items()}

    assert scores() == {"length": [0.25, 0.5], "reward": [0.25, 0.5]}
    found = scores(f"{__name__}:begins_right=2")
    assert found == {"length": [0.25, 0.5], "begins_right": [1, 0], "reward": [2.25, 0.5]}
    assert scores("length=0", f"{__name__}:begins_right")["reward"] == [1, 0]
    assert dpo.Reviews.rewards.keys() == {"sentiment"} and Lengths.rewards.keys() == {"length"}


@pytest.mark.parametrize("values", [[math.nan, 1.0], [1.0], None, [None, 1.0], ["a", 1.0], 1.0])
def test_rewards_that_are_no_numbers_are_named(values):
    arguments = "mine", lambda **columns: values, [{"prompt": "a"}] * 2, ["b", "c"]
    assert "The reward mine must give one finite number" in refusal(dpo.call_reward, *arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "Film"}, "There is no task Film, only reviews"),
        ({"task": "no_module:Film"}, "Cannot find no_module:Film: No module named"),
        ({"task": "json:Film"}, "Cannot find json:Film"),
        ({"task": "json:JSONDecoder"}, "json:JSONDecoder is not a task: it has no problem"),
        ({"reward": ["praise=2"]}, "--reward praise=2: there is no praise in ['sentiment']"),
        ({"reward": ["sentiment=much"]}, "--reward sentiment=much: what follows = is the weight"),
        ({"reward": ["json:nothing"]}, "Cannot find json:nothing"),
    ],
)
def test_tasks_and_rewards_that_are_not_there_are_named(changes, message):
    assert message in refusal(dpo.make_task, dpo.Args(**changes))


# -------------------------------------------------------------------------------------------------- data

# The answer follows what asks for it, and is closed by the template.
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}={{ m['content'] }}<eos>"
    "{% else %}({{ m['content'] }}){% endif %}{% endfor %}{% if add_generation_prompt %}={% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return dpo.make_tokenizer(dpo.Reviews.vocabulary)


@pytest.fixture(scope="module")
def chat_tokenizer():
    tokenizer = dpo.make_tokenizer(dpo.Reviews.vocabulary)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict:
    return {"role": "assistant", "content": content}


def reader(tokenizer, context: int = 64) -> dpo.Transformer:
    """A model that is there to read: its tokenizer, its vocabulary and its context count."""
    model = dpo.Transformer(
        SHAPE | {"model_type": "llama", "vocab_size": len(tokenizer), "max_position_embeddings": context}
    )
    model.tokenizer = tokenizer
    return model


def load(tmp_path: Path, rows: list[dict], tokenizer, context: int = 64, **changes) -> tuple:
    args = dpo.Args(model="x", **changes)
    source = write_rows(tmp_path / "rows.jsonl", rows)
    return dpo.load_data(source, reader(tokenizer, context), args, MagicMock())


def prompts_of(data: dpo.Data) -> list[tuple[int, ...]]:
    return [tuple(x.prompt) for x in data.sequences]


def written(tokenizer, data: dpo.Data) -> list[tuple[str, str, bool]]:
    return [
        (tokenizer.decode(prompt), tokenizer.decode(completion), label)
        for (prompt, completion), label in zip(data.sequences, data.labels.tolist())
    ]


def assert_same_data(parts, others) -> None:
    for one, other in zip(parts, others, strict=True):
        assert (one.paired, one.sequences, one.mismatched) == (
            other.paired, other.sequences, other.mismatched
        )  # fmt: skip
        assert torch.equal(one.labels, other.labels)


PAIRS = [{"prompt": f"2*{i}=", "chosen": f" the{i}", "rejected": f" was{i}"} for i in range(60)]


def test_pairs_of_text(tmp_path, tokenizer):
    """Rows in their order, chosen first; the prompt begins with <bos>, the completion ends with <eos>."""
    parts = load(tmp_path, PAIRS, tokenizer)
    held_out = [dpo.is_held_out(row["prompt"]) for row in PAIRS]
    assert 0 < sum(held_out) < 15 and all(part.paired for part in parts)
    for part, wanted in zip(parts, (False, True)):
        rows = [row for row, out in zip(PAIRS, held_out) if out == wanted]
        expected = [
            (f"<bos>{row['prompt']}", f"{row[name]}<eos>", name == "chosen")
            for row in rows
            for name in ("chosen", "rejected")
        ]
        assert written(tokenizer, part) == expected
    assert not {*prompts_of(parts[0])} & {*prompts_of(parts[1])}


def test_prompt_and_completion_are_tokens_of_their_own(tmp_path, tokenizer):
    """Written together, " the the" would be other tokens; a space stays with what it belongs to."""
    rows = [{"prompt": f"{i} the", "chosen": "the", "rejected": " the"} for i in range(99)]
    for part in load(tmp_path, rows, tokenizer):
        known = tokenizer.convert_tokens_to_ids(["the", " the", "<eos>"])
        first, second = (x.completion for x in part.sequences[:2])
        assert list(first) == [known[0], known[2]] and list(second) == [known[1], known[2]]
        assert all(x.prompt[-1] == known[1] for x in part.sequences)


def test_columns_and_parquet(tmp_path, tokenizer):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    names = {"prompt": "q", "chosen": "yes", "rejected": "no"}
    rows = [{names[key]: value for key, value in row.items()} for row in PAIRS]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    args = dpo.Args(model="x", **{f"{key}_column": value for key, value in names.items()})
    parts = dpo.load_data(tmp_path / "rows.parquet", reader(tokenizer), args, MagicMock())
    for part, expected in zip(parts, load(tmp_path, PAIRS, tokenizer)):
        assert written(tokenizer, part) == written(tokenizer, expected)


def test_conversations(tmp_path, chat_tokenizer):
    """With the prompt apart, and as whole conversations; the template closes an answer, nothing else does."""
    apart, whole = [], []
    for i in range(40):
        system = [{"role": "system", "content": "*"}] if i % 2 else []
        asked = [*system, user(f"{i}"), assistant("1"), user("+")]
        answers = [assistant(f" the{i}")], [assistant(f" was{i}")]
        apart.append(dict(zip(("prompt", "chosen", "rejected"), (asked, *answers))))
        whole.append({"chosen": asked + answers[0], "rejected": asked + answers[1]})
        if i % 3 == 0:  # what many files have: the prompt as text beside it
            whole[-1]["prompt"] = f"{i}"
    parts = load(tmp_path, apart, chat_tokenizer)
    assert_same_data(parts, load(tmp_path, whole, chat_tokenizer))
    assert parts[0].paired and parts[1].paired
    split = [  # the messages of the prompt in both columns
        {"prompt": row["prompt"][:-2]}
        | {name: row["prompt"][-2:] + row[name] for name in ("chosen", "rejected")}
        for row in apart
    ]
    assert_same_data(load(tmp_path, split, chat_tokenizer), parts)
    found = sorted(sum((written(chat_tokenizer, part) for part in parts), []))
    expected = [
        (f"{'(*)' * (i % 2)}({i})=1<eos>(+)=", f" {word}{i}<eos>", word == "the")
        for i in range(40)
        for word in ("the", "was")
    ]
    assert found == sorted(expected)
    assert not {*prompts_of(parts[0])} & {*prompts_of(parts[1])}


def test_what_is_held_out_does_not_depend_on_the_template(tmp_path, chat_tokenizer):
    """Templates may write today's date: the split is one of the prompts themselves, as messages."""
    rows = [MESSAGES | {"prompt": [user(f"{i}")]} for i in range(80)]
    parts = load(tmp_path, rows, chat_tokenizer)
    other = dpo.make_tokenizer(dpo.Reviews.vocabulary)
    other.chat_template = "20/11" + TEMPLATE
    for part, again in zip(parts, load(tmp_path, rows, other)):
        texts, others = ([text for text, *_ in written(other, data)] for data in (part, again))
        assert [f"20/11{text}" for text in texts] == others
    held_out = [f"({i})=" for i in range(80) if dpo.is_held_out(json.dumps([user(f"{i}")]))]
    found = [text for text, *_ in written(other, parts[1])]
    assert found[::2] == held_out and 2 < len(held_out) < 20


def test_text_stays_text_where_the_tokenizer_has_a_template(tmp_path, chat_tokenizer, tokenizer):
    assert_same_data(load(tmp_path, PAIRS, chat_tokenizer), load(tmp_path, PAIRS, tokenizer))


def test_rows_with_labels(tmp_path, tokenizer, chat_tokenizer):
    """Texts and conversations, each with a label of its own; pairs serve for kto as well."""
    rows = [{"prompt": f"{i}", "completion": f" the{i}", "label": i % 3 == 0} for i in range(40)]
    parts = load(tmp_path, rows, tokenizer, loss="kto")
    assert not parts[0].paired and not parts[1].paired
    found = sorted(sum((written(tokenizer, part) for part in parts), []))
    assert found == sorted((f"<bos>{i}", f" the{i}<eos>", i % 3 == 0) for i in range(40))
    chats = [
        {"text": [user(row["prompt"]), assistant(row["completion"])], "good": row["label"]} for row in rows
    ]
    changes = {"loss": "kto", "completion_column": "text", "label_column": "good"}
    parts = load(tmp_path, chats, chat_tokenizer, **changes)
    found = sorted(sum((written(chat_tokenizer, part) for part in parts), []))
    assert found == sorted((f"({i})=", f" the{i}<eos>", i % 3 == 0) for i in range(40))
    pairs = load(tmp_path, PAIRS, tokenizer, loss="kto")
    assert pairs[0].paired and pairs[0].labels[:4].tolist() == [True, False, True, False]


def test_text_messages_pairs_and_labels_may_stand_in_one_file(tmp_path, chat_tokenizer):
    """Each row is read as it is; without labels a file holds pairs only."""
    rows = [row | {"held_out": i < 30} for i, row in enumerate(PAIRS)]
    chat = {"prompt": [user("1")], "held_out": False}
    pair = chat | {"chosen": [assistant("3")], "rejected": [assistant("2")]}
    train, held_out = load(tmp_path, [*rows, pair], chat_tokenizer)
    assert train.paired and held_out.paired
    assert written(chat_tokenizer, train)[0] == ("<bos>2*30=", " the30<eos>", True)
    alone, _ = load(tmp_path, [pair, rows[0]], chat_tokenizer)
    assert written(chat_tokenizer, train)[-2:] == written(chat_tokenizer, alone)
    label = chat | {"completion": [assistant("3")], "label": False}
    train, held_out = load(tmp_path, [*rows, label], chat_tokenizer, loss="kto")
    assert held_out.paired and not train.paired and train.labels[-3:].tolist() == [True, False, False]


def test_what_is_dropped_is_told(tmp_path, tokenizer, chat_tokenizer, capsys):
    """A pair goes as a whole; 8 tokens are <bos>, 3 of the prompt, 3 of the completion and <eos>."""
    bad = [
        {"prompt": "1+1", "chosen": "123", "rejected": "1234"},
        {"prompt": "1+2", "chosen": "1234", "rejected": "123"},
        {"prompt": "1+3", "chosen": "", "rejected": "123"},
        {"prompt": "1+4", "chosen": "123", "rejected": " \n"},
        {"prompt": "1+5", "chosen": "12", "rejected": "12"},
    ]
    rows = [{"prompt": f"9{i:02}", "chosen": "111", "rejected": "222"} for i in range(40)]
    clean = load(tmp_path, rows, tokenizer, max_length=8)
    assert capsys.readouterr().out == "" and sum(len(part.sequences) for part in clean) == 80
    parts = load(tmp_path, bad + rows, tokenizer, max_length=8)
    told = capsys.readouterr().out
    assert_same_data(parts, clean)
    assert "Dropped of the 45 rows of " in told
    for reason in (
        "1 without text in chosen (row 3)",
        "1 without text in rejected (row 4)",
        "2 longer than the limit (row 1, 2)",
        "1 with chosen equal to rejected (row 5)",
    ):
        assert reason in told
    # In a conversation it is the message that is empty, not what closes it.
    empty = {"prompt": [user("1")], "chosen": [assistant(" ")], "rejected": [assistant("2")]}
    said = [empty | {"prompt": [user(f"{i}")], "chosen": [assistant("3")]} for i in range(40)]
    parts = load(tmp_path, [empty, *said], chat_tokenizer)
    told = capsys.readouterr().out
    assert ": 1 without text in chosen" in told and sum(len(part.sequences) for part in parts) == 80
    # The context is a limit of its own.
    assert_same_data(load(tmp_path, bad + rows, tokenizer, context=8, max_length=99), clean)


def test_held_out_rows(tmp_path, tokenizer):
    """Those that no evaluation needs are not learned from either; a column may say which they are."""
    train, held_out = load(tmp_path, PAIRS, tokenizer)
    fewer = load(tmp_path, PAIRS, tokenizer, eval_prompts=3)
    assert len(held_out.sequences) > 6 == len(fewer[1].sequences)
    assert_same_data(fewer[:1], [train])
    assert fewer[1].sequences == held_out.sequences[:6]
    marked = [row | {"held_out": i in (4, 7)} for i, row in enumerate(PAIRS)]
    train, held_out = load(tmp_path, marked, tokenizer)
    assert [text for text, *_ in written(tokenizer, held_out)] == ["<bos>2*4="] * 2 + ["<bos>2*7="] * 2
    assert len(train.sequences) == 116


MESSAGES = {"prompt": [user("a")], "chosen": [assistant("1")], "rejected": [assistant("2")]}


@pytest.mark.parametrize(
    ("row", "message", "changes"),
    [
        ({"prompt": "a"}, "without columns chosen and rejected", {}),
        (
            {"prompt": "a", "label": True},
            "without columns chosen and rejected; --loss kto takes labels",
            {},
        ),
        ({"prompt": "a", "chosen": "b"}, "without text in rejected", {}),
        ({"chosen": "a", "rejected": "b"}, "without text in prompt", {}),
        ({"prompt": None, "chosen": "a", "rejected": "b"}, "without text in prompt", {}),
        ({"prompt": "a", "chosen": None, "rejected": "b"}, "without text in chosen", {}),
        (
            {"prompt": [], "chosen": [assistant("b")], "rejected": [assistant("c")]},
            "without text in prompt",
            {},
        ),
        ({"prompt": "", "chosen": "b", "rejected": "c"}, "without text in prompt", {}),
        ({"prompt": [user("a")], "chosen": [], "rejected": []}, "without text in chosen", {}),
        (MESSAGES, "that the chat template refuses (Cannot use chat template functions", {}),
        (PAIRS[0] | {"chosen": [assistant("b")]}, "whose prompt and chosen are not both text", {}),
        (MESSAGES | {"prompt": "a"}, "whose prompt and chosen are not both text", {}),
        (PAIRS[0] | {"prompt": 5}, "without text in prompt", {}),
        (PAIRS[0] | {"rejected": 5}, "without text in rejected", {}),
        (PAIRS[0] | {"rejected": "\ud800"}, "that are no JSON in UTF-8", {}),
        (MESSAGES | {"chosen": [{"role": "assistant"}]}, "with a message that lacks", {}),
        (MESSAGES | {"chosen": [{"content": "b"}]}, "with a message that lacks a role or a content", {}),
        (MESSAGES | {"prompt": [user(None)]}, "with a message that lacks a role or a content", {}),
        (MESSAGES | {"prompt": ["a"]}, "with a message that lacks a role or a content", {}),
        (MESSAGES | {"prompt": [5]}, "with a message that lacks a role or a content", {}),
        (
            {"chosen": [user("a"), assistant("b")], "rejected": [user("x"), assistant("c")]},
            "whose chosen and rejected answer different prompts",
            {},
        ),
        ({"prompt": "a", "completion": "b"}, "whose label is neither true nor false", {"loss": "kto"}),
        (
            {"prompt": "a", "completion": "b", "label": "yes"},
            "whose label is neither true nor false",
            {"loss": "kto"},
        ),
        ({"prompt": "a", "label": True}, "without text in completion", {"loss": "kto"}),
    ],
)
def test_a_bad_row_is_dropped(row, message, changes, tmp_path, tokenizer, capsys):
    """With its number and the reason; the other rows are learned from. A file of such rows is refused."""
    expected = load(tmp_path, PAIRS, tokenizer, **changes)
    assert_same_data(load(tmp_path, [*PAIRS, row], tokenizer, **changes), expected)
    told = capsys.readouterr().out
    assert f"Dropped of the 61 rows of {tmp_path / 'rows.jsonl'}: 1 {message}" in told and "(row 61)" in told
    told = refusal(load, tmp_path, [row] * 40, tokenizer, **changes)
    assert f"the columns are {', '.join(row)}" in told


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{nonsense\n\n{\n[\n", "3 that are no JSON in UTF-8 (row 1, 2, 3)"),
        ("[1]\n", "1 that are no JSON objects"),
        ("5\n", "1 that are no JSON objects"),
        ('{"prompt": "a", "chosen": "1", "rejected": "2"}\n', "too few rows"),
        ("", "too few rows"),
        (None, "No such file"),
    ],
)
def test_bad_files_are_named(content, message, tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    if content is not None:
        path.write_text(content)
    assert message in refusal(dpo.load_data, str(path), reader(tokenizer), dpo.Args(model="x"), MagicMock())


def test_chat_templates_that_do_not_serve_are_named(tmp_path, tokenizer, capsys):
    rows = [MESSAGES | {"prompt": [user(f"{i}")]} for i in range(40)]
    message = refusal(load, tmp_path, rows, tokenizer)
    assert "40 that the chat template refuses" in message and "more than half" in message
    other = dpo.make_tokenizer(dpo.Reviews.vocabulary)
    other.chat_template = "{{ messages | length }}" + TEMPLATE
    message = refusal(load, tmp_path, rows, other)
    assert "40 whose prompt the chat template changes when an answer follows" in message
    other.chat_template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    assert "40 without any token in the prompt or a completion" in refusal(load, tmp_path, rows, other)
    other.chat_template = (
        "{% if messages[0].content == '7' %}{{ raise_exception('no') }}{% endif %}" + TEMPLATE
    )
    parts = load(tmp_path, rows, other)
    assert "1 that the chat template refuses (no) (row 8)" in capsys.readouterr().out
    assert sum(len(part.sequences) for part in parts) == 78


def test_an_evaluation_file_of_its_own(tmp_path, tokenizer, capsys):
    """All rows of the dataset are learned from then, and all of the other file are held out."""
    other = [{"prompt": f"8*{i}=", "chosen": "1", "rejected": "2"} for i in range(9)]
    source = write_rows(tmp_path / "eval.jsonl", [other[0] | {"chosen": ""}, *other])
    train, held_out = load(tmp_path, PAIRS, tokenizer, dataset="x", eval_dataset=source)
    assert "1 without text in chosen (row 1)" in capsys.readouterr().out
    assert len(train.sequences) == 120
    assert [text for text, *_ in written(tokenizer, held_out)][::2] == [f"<bos>8*{i}=" for i in range(9)]
    fewer = load(tmp_path, PAIRS, tokenizer, dataset="x", eval_dataset=source, eval_prompts=4)
    assert len(fewer[1].sequences) == 8


def test_a_dataset_takes_little_memory_and_is_read_in_parts(tmp_path, tokenizer):
    """Peak of Python's memory, for rows of half a kilobyte; here a token is one letter."""
    rng = random.Random(0)
    texts = iter(["".join(rng.choices("0123456789+", k=150)) for _ in range(3000)])
    rows = [
        dict(zip(("prompt", "chosen", "rejected"), (next(texts), next(texts), next(texts))))
        for _ in range(1000)
    ]
    path, model = Path(write_rows(tmp_path / "a.jsonl", rows)), reader(tokenizer, 400)
    texts = rows = None
    tracemalloc.start()
    parts = dpo.load_data(path, model, dpo.Args(model="x"), MagicMock())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    tokens = sum(len(part) for data in parts for x in data.sequences for part in x)
    assert tokens > 4e5  # prompts count twice, though they are kept once
    assert peak < 4 * 0.75 * tokens + 250 * 2000 + 2**20


def test_tokens_that_the_model_does_not_know_are_named(tmp_path, tokenizer):
    model = dpo.Transformer(SHAPE | {"model_type": "llama", "vocab_size": 40})
    model.tokenizer = tokenizer
    source = write_rows(tmp_path / "rows.jsonl", PAIRS)
    message = refusal(dpo.load_data, source, model, dpo.Args(model="x"), MagicMock())
    assert re.search(r"tokenizer has a token \d+, but the model knows 40 tokens only", message)


def test_mismatched_prompts():
    """The next one that differs, round the end; nothing to choose from where all are alike."""

    def others(prompts: list[list[int]], completions: list[list[int]], limit: int = 99) -> list[list[int]]:
        found = dpo.mismatch([*map(dpo.Sequence, prompts, completions)], limit)
        assert [x.completion for x in found] == completions
        return [x.prompt for x in found]

    assert others([[1], [1], [2], [2], [2], [3]], [[7]] * 6) == [[2], [2], [3], [3], [3], [1]]
    assert others([[1], [1]], [[7]] * 2) == [[1], [1]]
    # [2, 2, 2] leaves no room
    assert others([[1], [2, 2, 2], [3, 3]], [[7, 7]] * 3, limit=4) == [[3, 3], [3, 3], [1]]
    assert others([[1], [2]], [[7]] * 2, limit=1) == [[1], [2]]


# ------------------------------------------------------------------------------- log-probabilities, steps


@pytest.fixture
def model() -> dpo.Transformer:
    return dpo.Transformer(SHAPE | {"model_type": "llama"})


def random_rows(count: int, low: int, high: int) -> list[list[int]]:
    return [torch.randint(2, 61, (int(n),)).tolist() for n in torch.randint(low, high, (count,))]


def plain_log_prob(model, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """One row by itself, token by token."""
    log_probs = model(torch.tensor([prompt + completion]))[0].log_softmax(-1)
    return sum(log_probs[len(prompt) + t - 1, token] for t, token in enumerate(completion))


def test_sequence_log_probs_are_plain_sums(model):
    """Of the tokens of the completion only; other rows, and so how far a row is filled up, change nothing."""
    prompts, completions = random_rows(6, 1, 12), random_rows(6, 1, 15)
    with torch.no_grad():
        sequences = [*map(dpo.Sequence, prompts, completions)]
        found = dpo.sequence_log_probs(model, sequences)
        expected = torch.stack([plain_log_prob(model, *row) for row in sequences])
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
        alone = [dpo.sequence_log_probs(model, [sequence]) for sequence in sequences]
        torch.testing.assert_close(torch.cat(alone), expected, atol=1e-4, rtol=1e-5)
        for size in (1, 4, 64):
            args = dpo.Args(micro_batch_size=size)
            again = dpo.all_log_probs(model, sequences, args)
            torch.testing.assert_close(again, expected, atol=1e-4, rtol=1e-5)


def random_data(count: int, paired: bool = True) -> dpo.Data:
    """Pairs of rows with the same prompt, of many lengths, with a reference that never was."""
    prompts, completions = random_rows(count, 1, 9), random_rows(count, 1, 12)
    if paired:
        prompts[1::2] = prompts[0::2]
    labels = [i % 2 == 0 for i in range(count)] if paired else [i % 3 == 0 for i in range(count)]
    lengths = torch.tensor([float(len(x)) for x in completions])
    sequences = [*map(dpo.Sequence, prompts, completions)]
    references = -4 * lengths + torch.randn(count), -6 * lengths + torch.randn(count)
    mismatched = dpo.mismatch(sequences, 99)
    return dpo.Data(paired, sequences, mismatched, torch.tensor(labels), *references)


def plain_step(model, data: dpo.Data, units: list[int], args: dpo.Args) -> tuple[torch.Tensor, dict]:
    """The loss of a step on all rows at once, from the formulas, and what else it tells."""
    size = 1 if args.loss == "kto" else 2
    rows = [size * unit + i for unit in units for i in range(size)]
    log_probs = torch.stack([plain_log_prob(model, *data.sequences[i]) for i in rows])
    ratios = log_probs - data.reference[rows]
    lengths = torch.tensor([len(data.sequences[i].completion) for i in rows])
    if args.loss == "kto":
        labels = data.labels[rows]
        with torch.no_grad():
            gaps = [plain_log_prob(model, *data.mismatched[i]) - data.mismatched_reference[i] for i in rows]
            kl = torch.stack(gaps).mean().clamp(min=0)
        signs = torch.where(labels, 1.0, -1.0)
        weights = torch.where(labels, args.desirable_weight, args.undesirable_weight)
        losses, rewards = weights * (1 - (args.beta * signs * (ratios - kl)).sigmoid()), args.beta * ratios
        told = {"kl": kl.item(), "rewards/chosen": rewards[labels].mean().item()}
        return losses.mean(), told | {"rewards/rejected": rewards[~labels].mean().item()}
    chosen, rejected = (log_probs / lengths).view(-1, 2).T
    if args.loss == "simpo":
        margin, rewards = args.beta * (chosen - rejected) - args.simpo_gamma, args.beta * log_probs / lengths
        losses = -margin.sigmoid().log()
    elif args.loss == "orpo":
        odds = torch.log(chosen.exp() / (1 - chosen.exp())) - torch.log(rejected.exp() / (1 - rejected.exp()))
        losses, rewards = -chosen - args.orpo_lambda * odds.sigmoid().log(), args.beta * log_probs / lengths
    else:
        margin = args.beta * (ratios[0::2] - ratios[1::2])
        losses, rewards = -margin.sigmoid().log(), args.beta * ratios
    rewards = rewards.view(-1, 2)
    told = {"rewards/chosen": rewards[:, 0].mean().item(), "rewards/rejected": rewards[:, 1].mean().item()}
    told["rewards/accuracies"] = (rewards[:, 0] > rewards[:, 1]).float().mean().item()
    weight = 0.1 * (args.loss == "dpo") if args.sft_coef is None else args.sft_coef
    return (losses - weight * chosen).mean(), told


@pytest.mark.parametrize("changes", [
    {"loss": "dpo"},
    {"loss": "dpo", "sft_coef": 0.0},
    {"loss": "simpo", "sft_coef": 0.3},
    {"loss": "orpo", "orpo_lambda": 0.7},
    {"loss": "kto", "desirable_weight": 1.5, "undesirable_weight": 0.5},
], ids=lambda changes: "-".join(map(str, changes.values())))  # fmt: skip
def test_micro_batches_change_nothing(changes, model, monkeypatch):
    """Metrics and gradient of a step are those of the formula on all rows, with pairs kept together."""
    data, taken = random_data(24, paired=changes["loss"] != "kto"), []
    monkeypatch.setattr(
        dpo, "optimizer_step", lambda model, *_: taken.extend(p.grad for p in model.parameters()) or 7.0
    )
    units = [9, 2, 11, 5, 0, 7, 3]
    args = dpo.Args(**changes)
    size = 1 if changes["loss"] == "kto" else 2
    groups = [list(range(size * unit, size * unit + size)) for unit in units]
    loss, told = plain_step(model, data, units, args)
    expected = torch.autograd.grad(loss, list(model.parameters()))
    assert any(x.abs().max() > 1e-3 for x in expected) and told.get("kl", 1) > 0.1
    for size in (64, 5, 1):
        model.zero_grad()
        taken.clear()
        metrics = dpo.take_step(model, None, data, groups, dpo.Args(**changes, micro_batch_size=size))
        for x, y in zip(taken, expected, strict=True):
            torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-3)
        told |= {"loss": loss.item(), "grad_norm": 7.0}
        for name, value in told.items():
            assert metrics[name] == pytest.approx(value, abs=1e-4), name
        margin = metrics["rewards/chosen"] - metrics["rewards/rejected"]
        assert metrics["rewards/margins"] == pytest.approx(margin)


def test_kl_below_0_counts_as_0_in_a_step(model, monkeypatch):
    monkeypatch.setattr(dpo, "optimizer_step", lambda *_: 1.0)
    data = random_data(12, paired=False)
    data.mismatched_reference = torch.zeros(12)
    assert dpo.take_step(model, None, data, [[1], [2], [3]], dpo.Args(loss="kto"))["kl"] == 0


def test_judge_by_hand():
    """Two pairs, beta 0.5: rewards 1 and -1, then 0 and 0.5; the second is taken the wrong way round."""
    completions = [[1]] * 2 + [[1, 1], [1, 1, 1, 1], [1] * 5, [1]]
    sequences, labels = [dpo.Sequence([1], x) for x in completions], torch.tensor([True, False] * 3)
    reference = torch.tensor([9.0, 9.0, -3.0, -3.0, -2.0, -2.0])
    data = dpo.Data(True, sequences, sequences, labels, reference, torch.zeros(6))
    log_probs = torch.tensor([-1.0, -5.0, -2.0, -1.0], requires_grad=True)
    args = dpo.Args(loss="dpo", beta=0.5, sft_coef=0.1)
    losses, sums = dpo.judge(log_probs, data.select([2, 3, 4, 5], CPU), 0.0, args, paired=True)
    expected = [math.log(1 + math.exp(-2)) + 0.1 * 1 / 2, math.log(1 + math.exp(0.5)) + 0.1 * 2 / 5]
    assert losses.tolist() == pytest.approx(expected) and losses.requires_grad
    assert dpo.means_of(sums) == pytest.approx({
        "loss": sum(expected) / 2, "rewards/chosen": 0.5, "rewards/rejected": -0.25,
        "rewards/margins": 0.75, "rewards/accuracies": 0.5, "logps/chosen": -1.5, "logps/rejected": -3.0,
    })  # fmt: skip
    # With labels of their own there is no accuracy, and what there is none of has no mean.
    args, data.labels = dpo.Args(loss="kto", beta=0.5), torch.tensor([True] * 6)
    losses, sums = dpo.judge(log_probs, data.select([2, 3, 4, 5], CPU), 0.0, args, paired=False)
    means = dpo.means_of(sums)
    assert "rewards/accuracies" not in means and means["rewards/chosen"] == pytest.approx(0.125)
    assert not {"rewards/rejected", "rewards/margins"} & means.keys() and losses.shape == (4,)


# --------------------------------------------------------------------------------------- the reference


def test_reference_is_computed_for_what_the_loss_needs(model):
    args, data = dpo.Args(micro_batch_size=8), random_data(20)
    dpo.add_reference(model, data, args)
    with torch.no_grad():
        expected, mismatched = (dpo.sequence_log_probs(model, x) for x in (data.sequences, data.mismatched))
    torch.testing.assert_close(data.reference, expected, atol=1e-4, rtol=1e-5)
    before = data.mismatched_reference.clone()
    assert not torch.allclose(before, mismatched)
    dpo.add_reference(model, data, dpo.Args(loss="kto", micro_batch_size=8))
    torch.testing.assert_close(data.mismatched_reference, mismatched, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_a_resumed_run_does_not_compute_the_reference_again(loss, saved_model, tmp_path, monkeypatch):
    """Of the rows to learn from; a run that begins anew in the same folder does."""
    settings = {"model": saved_model, "loss": loss, "num_pairs": 30, "batch_size": 12, "eval_prompts": 12}
    settings |= {"max_steps": 2, "eval_interval": 1, "anneal_lr": False}
    sizes, compute = [], dpo.add_reference
    monkeypatch.setattr(dpo, "add_reference", lambda *x: sizes.append(len(x[1].labels)) or compute(*x))
    run = train(tmp_path / "runs", **settings)
    file, (held_out, whole) = run / "reference_log_probs.pt", sizes
    known = torch.load(file)["log_probs"]
    assert [len(x) for x in known] == [whole, whole] and whole > held_out
    sizes.clear()
    resume(run, "--max-steps", "3")
    dpo.main(dpo.parse_args(["--evaluate", str(run)]))
    assert sizes == [held_out, held_out]
    expected = train(tmp_path / "longer", **settings | {"max_steps": 3})
    assert_same_run(run, expected)
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        (run / name).unlink()
    torch.save({"log_probs": [-x for x in known]}, file)
    resume(run)
    assert_same_run(run, expected)


# --------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(
            ({name: 0}, f"{name} must lie in [1, inf), got 0")
            for name in "max_steps checkpoint_interval eval_prompts hidden_size "
            "num_layers num_heads sft_batch_size num_pairs batch_size micro_batch_size".split()
        ),
        *(
            ({name: value}, f"{name} must lie in (0, inf), got {value}")
            for name in "beta learning_rate sft_learning_rate max_grad_norm checkpoint_minutes".split()
            for value in (0.0, math.nan, math.inf)
        ),
        *(
            ({name: -1}, f"{name} must lie in [0, inf), got -1")
            for name in "eval_interval sft_steps warmup_steps simpo_gamma orpo_lambda desirable_weight "
            "undesirable_weight sft_coef".split()
        ),
        ({"sft_coef": math.nan}, "sft_coef must lie in [0, inf), got nan"),
        *(({name: 0}, f"{name} must lie in [1, inf)") for name in ("max_length", "max_completion_length")),
        ({"simpo_gamma": math.nan}, "simpo_gamma must lie in [0, inf), got nan"),
        ({"label_smoothing": 0.5}, "label_smoothing must lie in [0, 0.5), got 0.5"),
        ({"label_noise": -0.1}, "label_noise must lie in [0, 0.5), got -0.1"),
        ({"label_noise": math.nan}, "label_noise must lie in"),
        ({"label_smoothing": 0.1, "loss": "ipo"}, "label_smoothing belongs to the loss dpo, not to ipo"),
        ({"sft_coef": 0.1, "loss": "kto"}, "sft_coef belongs to the losses of pairs, not to kto"),
        ({"sft_coef": 0.1, "loss": "sft"}, "sft_coef belongs to the losses of pairs, not to sft"),
        ({"seed": -1}, "seed must lie in"),
        ({"seed": 2**32}, "seed must lie in"),
        ({"hidden_size": 100, "num_heads": 3}, "hidden_size = 100 must be a multiple of 2 x num_heads = 6"),
        ({"dataset": "a.jsonl", "model": "b", "reward": ["sentiment=2"]}, "a dataset has none"),
        ({"resume": "a", "evaluate": "b"}, "resume, evaluate and run_name exclude each other"),
        ({"resume": "a", "run_name": "b"}, "resume, evaluate and run_name exclude each other"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    with pytest.raises(ValueError) as error:
        dpo.Args(**changes)
    assert message in str(error.value)


def test_arguments_at_their_bounds_are_taken():
    dpo.Args(
        seed=2**32 - 1, label_noise=0.0, label_smoothing=0.49, eval_interval=0, sft_steps=0, max_length=2
    )
    parsed = dpo.parse_args("--loss simpo --beta 2 --simpo-gamma 1 --no-anneal-lr".split())
    assert parsed == dpo.Args(loss="simpo", beta=2.0, simpo_gamma=1.0, anneal_lr=False)
    assert [loss for loss in LOSSES if dpo.Args(loss=loss).has_reference] == ["dpo", "ipo", "kto"]
    rewards = dpo.parse_args("--reward a:b --reward sentiment=0.5".split()).reward
    assert rewards == ["a:b", "sentiment=0.5"]


# -------------------------------------------------------------------------------------------- short runs

TINY = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "sft_steps": 100, "sft_batch_size": 16}
TINY |= {"sft_learning_rate": 1e-2, "num_pairs": 64, "batch_size": 8, "max_steps": 6, "learning_rate": 2e-3}
TINY |= {"warmup_steps": 2, "checkpoint_interval": 2, "eval_interval": 2, "eval_prompts": 32}
TINY |= {"micro_batch_size": 6, "bf16": False, "beta": 0.1, "sft_coef": 0.0}


def train(folder: Path, **changes) -> Path:
    return dpo.main(dpo.Args(**TINY | {"runs": str(folder)} | changes))


def resume(run: Path, *words: str) -> None:
    dpo.main(dpo.parse_args(["--resume", str(run), *words]))


def curves_of(run: Path) -> dict:
    """What is logged, but for clocks and texts."""
    curves = read_curves(run)
    return {tag: x for tag, x in curves.items() if not re.match("time/|perf/|samples", tag)}


def assert_same_run(run: Path, reference: Path) -> None:
    assert checkpoint_difference(*map(dpo.load_checkpoint, (run, reference))) is None
    assert curves_of(run) == curves_of(reference)
    for name in ("samples.jsonl", "pairs.jsonl"):
        assert (run / name).read_text() == (reference / name).read_text()


def the_run(folder: Path) -> Path:
    """The only run there."""
    (run,) = folder.iterdir()
    return run


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory) -> Path:
    """A run that nobody changes."""
    return train(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def saved_model(finished_run) -> str:
    """A model that writes reviews, for runs that shall not begin with a warm-up."""
    return str(finished_run / "reference")


JUDGED = "loss rewards/chosen rewards/rejected rewards/margins rewards/accuracies logps/chosen logps/rejected"
SAMPLED = "kl_to_reference mean_length clipped_ratio"


def test_what_is_logged(finished_run):
    assert re.fullmatch(r"reviews__dpo_llm__1__\d{8}-\d{6}", finished_run.name)
    saved = json.loads((finished_run / "args.json").read_text())
    assert dpo.Args(**saved) == dpo.Args(**TINY | {"runs": str(finished_run.parent)})
    assert dpo.read_args(finished_run) == dpo.Args(**saved)
    curves, losses = curves_of(finished_run), JUDGED.split()
    dense = [*losses, "grad_norm", "learning_rate", "epoch", "num_tokens"]
    evaluations = [f"eval/{name}" for name in [*losses, *SAMPLED.split(), "true_reward", "win_rate"]]
    assert {*curves} == {*dense, *evaluations, "sft/loss", "sft/grad_norm"}
    assert all(list(curves[tag]) == [1, 2, 3, 4, 5, 6] for tag in dense)
    assert all(list(curves[tag]) == [0, 2, 4, 6] for tag in evaluations)
    assert list(curves["sft/loss"]) == list(range(-90, 1, 10))
    assert all(math.isfinite(x) for curve in curves.values() for x in curve.values())
    # Before the first step the policy is the reference.
    assert curves["loss"][1] == pytest.approx(math.log(2), abs=1e-5)
    assert curves["eval/rewards/margins"][0] == pytest.approx(0, abs=1e-5)
    assert curves["eval/kl_to_reference"][0] == pytest.approx(0, abs=1e-3)
    assert curves["eval/rewards/margins"][6] > 1e-3
    rates = [0.5, 1, *(1 - 0.95 * i / 4 for i in range(1, 5))]
    np.testing.assert_allclose(list(curves["learning_rate"].values()), 2e-3 * np.array(rates), rtol=1e-5)


def test_files_of_a_run(finished_run):
    """Pairs, each drawn once in a pass; samples of each evaluation; the reference and the model."""
    assert {x.name for x in finished_run.iterdir() if "tfevents" not in x.name} == {
        *"args.json checkpoint.pt checkpoint.previous.pt model pairs.jsonl reference samples.jsonl".split(),
        "reference_log_probs.pt",
    }
    samples = [json.loads(line) for line in (finished_run / "samples.jsonl").read_text().splitlines()]
    assert [x["step"] for x in samples] == sorted([0, 2, 4, 6] * 8)
    assert all(
        x["reward"] == pytest.approx(dpo.sentiment_reward([""], [x["completion"]])[0]) for x in samples
    )
    state = dpo.load_checkpoint(finished_run)
    assert state["step"] == 6
    reference = dpo.Transformer.from_pretrained(finished_run / "reference").state_dict()
    assert any(not torch.equal(x, state["model"][name]) for name, x in reference.items())
    args = dpo.Args(**state["args"])
    model = dpo.read_model(finished_run / "model")
    data, _ = dpo.load_data(finished_run / "pairs.jsonl", model, args, MagicMock())
    count = len(data.sequences) // 2
    for epoch in (0, 1):
        assert sorted(dpo.shuffled(1, epoch, count)) == list(range(count))
    assert dpo.shuffled(1, 0, count) != dpo.shuffled(1, 1, count) != dpo.shuffled(2, 1, count)
    drawn = [dpo.shuffled(1, i // count, count)[i % count] for i in range(48)]
    steps = [row for step in range(1, 7) for unit in dpo.draw_units(data, step, args) for row in unit]
    assert steps == [2 * i + j for i in drawn for j in (0, 1)]
    tokens = sum(len(part) for row in steps for part in data.sequences[row])
    curves = curves_of(finished_run)
    assert curves["num_tokens"][6] == tokens and curves["epoch"][6] == pytest.approx(48 / count)


def test_exported_model_is_read_by_transformers_and_by_the_script(finished_run):
    folder = finished_run / "model"
    peer = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert peer.generation_config.eos_token_id == [tokenizer.eos_token_id]
    tokens = tokenizer("the new film by the young artist", return_tensors="pt")["input_ids"]
    weights = dpo.load_checkpoint(finished_run)["model"]
    model = dpo.Transformer.from_pretrained(folder)
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())
    with torch.no_grad():
        torch.testing.assert_close(peer(tokens).logits, model(tokens), atol=1e-4, rtol=1e-4)


def load_parts(saved_model: str, **changes) -> tuple:
    """Arguments, task and model."""
    args = dpo.Args(**TINY | {"model": saved_model, "max_completion_length": 32} | changes)
    return args, dpo.Reviews(), dpo.read_model(args.model)


class Workplace:
    """What an evaluation needs of a Run."""

    rank, step, device, precision, is_warm = 0, 1, CPU, contextlib.nullcontext(), False

    def __init__(self, path: Path):
        self.path = path

    def identify(self, name: str, source: object, fingerprint: int) -> None:
        pass


def sampled_by(monkeypatch) -> list[dpo.Completions]:
    """Whatever is sampled from here on."""
    sampled, sample = [], dpo.sample
    monkeypatch.setattr(dpo, "sample", lambda *x: sampled.append(sample(*x)) or sampled[-1])
    return sampled


def test_pairs_follow_the_true_reward(saved_model, monkeypatch, tmp_path):
    """With a noise of 0 always, with one of 0.3 in about 70 percent, from the same completions."""
    pairs = {}
    for noise in (0.0, 0.3):
        args, task, model = load_parts(saved_model, num_pairs=500, label_noise=noise)
        pairs[noise] = dpo.sample_pairs(model, task, args)
    assert len(pairs[0.0]) == len(pairs[0.3]) > 300
    flips = 0
    for one, other in zip(pairs[0.0], pairs[0.3]):
        assert one["prompt"] == other["prompt"] and one["true_rewards"][0] > one["true_rewards"][1]
        flips += one["chosen"] == other["rejected"]
        for row in (one, other):
            texts = [row["chosen"], row["rejected"]]
            assert dpo.sentiment_reward(["", ""], texts) == pytest.approx(row["true_rewards"])
        assert {one["chosen"], one["rejected"]} == {other["chosen"], other["rejected"]}
    n = len(pairs[0.0])
    assert abs(flips - 0.3 * n) < 4 * math.sqrt(0.21 * n)
    # They are read back as the tokens that were sampled, but for <pad> and <bos>, of which no text is made;
    # with held-out prompts in a part of their own.
    args, task, model = load_parts(saved_model, num_pairs=100)
    with monkeypatch.context() as patch:
        sampled = sampled_by(patch)
        rows = dpo.sample_pairs(model, task, args)
    tokens = {tuple(token for token in row if token > 1) for row in sampled[0].tokens}
    parts = dpo.load_data(write_rows(tmp_path / "pairs.jsonl", rows), model, args, MagicMock())
    found = [tuple(x.completion) for part in parts for x in part.sequences]
    assert {*found} <= tokens and 2 * len(rows) == len(found)
    assert all(x[-1] == model.tokenizer.eos_token_id for x in found)
    held_out = {dpo.draw(task, 1, i, held_out=True)["prompt"] for i in range(32)}
    texts = [{*model.decode([list(x.prompt) for x in part.sequences])} for part in parts]
    assert texts[1] <= held_out and not texts[0] & held_out and len(parts[1].sequences) > 20


def test_pairs_leave_out_ties_and_what_is_cut_off(saved_model, monkeypatch):
    args, task, model = load_parts(saved_model, num_pairs=100, max_completion_length=9)
    sampled = sampled_by(monkeypatch)
    rows = dpo.sample_pairs(model, task, args)
    texts = model.decode(sampled[0].tokens)
    rewards = dpo.sentiment_reward(texts, texts)
    kept = [
        {texts[i], texts[i + 1]}
        for i in range(0, len(texts), 2)
        if sampled[0].finished[i] and sampled[0].finished[i + 1] and rewards[i] != rewards[i + 1]
    ]
    assert [{row["chosen"], row["rejected"]} for row in rows] == kept
    assert 5 < len(kept) < 100 and not sampled[0].finished.all()


def test_evaluation_of_the_reference_against_itself(finished_run, saved_model):
    """No KL, no margin, and as many wins as losses; what the training draws from is left alone."""
    args, task, model = load_parts(
        saved_model, eval_prompts=8, runs=str(finished_run.parent), max_completion_length=20
    )
    run = Workplace(finished_run)
    _, held_out = dpo.load_preferences(model, task, args, run)
    seed = args.seed + 2 * dpo.EVALUATION_SEED
    before = dpo.sample_held_out(model, task, held_out, args, seed)
    state = torch.get_rng_state()
    metrics, samples = dpo.evaluate(model, contextlib.nullcontext(model), held_out, before, task, args, run)
    assert torch.equal(torch.get_rng_state(), state)
    assert abs(metrics["kl_to_reference"]) < 1e-3 and abs(metrics["rewards/margins"]) < 1e-4
    assert metrics["loss"] == pytest.approx(math.log(2), abs=1e-4)
    rewards = dpo.sentiment_reward([""] * 8, [x["completion"] for x in samples])
    assert [x["prompt"] for x in samples] == [dpo.draw(task, 0, i, held_out=True)["prompt"] for i in range(8)]
    assert metrics["true_reward"] == pytest.approx(sum(rewards) / 8, abs=1e-6)
    assert dpo.evaluate(model, contextlib.nullcontext(model), held_out, before, task, args, run)[0] == metrics
    # A win counts 1 and a draw half.
    shift = torch.tensor([0.1, -0.1, 0, 0, -0.1, -0.1, -0.1, 0])
    other = before._replace(rewards=torch.tensor(rewards) + shift)
    found = dpo.evaluate(model, contextlib.nullcontext(model), held_out, other, task, args, run)[0]
    assert found["win_rate"] == pytest.approx((4 + 3 / 2) / 8)
    args, task, model = load_parts(saved_model, eval_prompts=400)
    many = dpo.sample_held_out(model, task, held_out, args, seed)
    metrics, _ = dpo.evaluate(model, contextlib.nullcontext(model), held_out, many, task, args, run)
    assert 0.4 < metrics["win_rate"] < 0.6 and metrics["win_rate"] != 0.5  # other numbers, other samples


def test_kl_to_the_reference_is_that_of_the_samples(finished_run, saved_model, monkeypatch):
    """E[log policy - log reference] of whole completions, each log-probability computed by itself."""
    args, task, reference = load_parts(saved_model, eval_prompts=8, runs=str(finished_run.parent))
    run = Workplace(finished_run)
    _, held_out = dpo.load_preferences(reference, task, args, run)
    before = dpo.sample_held_out(reference, task, held_out, args, 0)
    policy = copy.deepcopy(reference)
    with torch.no_grad():
        policy.lm_head.weight += 0.1 * torch.randn_like(policy.lm_head.weight)
    sampled = sampled_by(monkeypatch)
    metrics, _ = dpo.evaluate(policy, contextlib.nullcontext(reference), held_out, before, task, args, run)
    problems = [dpo.draw(task, args.seed, i, held_out=True) for i in range(8)]
    gaps = []
    for prompt, row in zip(dpo.encode_prompts(policy, problems, 32), sampled[0].tokens, strict=True):
        with torch.no_grad():
            gaps.append(plain_log_prob(policy, prompt, row) - plain_log_prob(reference, prompt, row))
    assert metrics["kl_to_reference"] == pytest.approx(torch.stack(gaps).mean().item(), abs=1e-3)
    assert metrics["kl_to_reference"] > 0.05
    assert metrics["mean_length"] == pytest.approx(sum(map(len, sampled[0].tokens)) / 8)


@pytest.mark.parametrize("loss", LOSSES)
def test_each_loss_runs(loss, saved_model, tmp_path):
    """A few steps on few pairs, whose loss falls; what has no reference computes none."""
    settings = {"loss": loss, "max_steps": 12, "eval_interval": 12, "beta": 2.0 if loss == "simpo" else 0.1}
    settings |= {"sft_coef": 0.1 * (loss == "ipo"), "micro_batch_size": 16, "learning_rate": 4e-3}
    run = train(tmp_path, model=saved_model, num_pairs=20, **settings)
    curves = curves_of(run)
    assert ("kl" in curves) == (loss == "kto") and "sft/loss" not in curves
    assert ("rewards/accuracies" in curves) == (loss != "kto") and "eval/rewards/accuracies" in curves
    assert (run / "reference_log_probs.pt").exists() == (loss in ("dpo", "ipo", "kto"))
    assert 0.98 * sum(curves["loss"][step] for step in (1, 2)) > sum(
        curves["loss"][step] for step in (11, 12)
    )


def test_killed_run_equals_an_uninterrupted_one(finished_run, tmp_path, capsys):
    """Killed without notice between checkpoints, then resumed."""
    process = start(SCRIPT, *flags(**TINY, runs=tmp_path / "killed"), cwd=tmp_path)
    kill_when(process, nth_evaluation(3), delay=0.02)
    run = the_run(tmp_path / "killed")
    resume(run)
    assert "Resumed at step" in capsys.readouterr().out
    assert_same_run(run, finished_run)


def interrupted_at(call: int, name: str, monkeypatch):
    """Ctrl-C in the `call`-th call of a function of the script."""
    function, left = getattr(dpo, name), iter(range(call - 1))

    def interrupted(*arguments, **keywords):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return function(*arguments, **keywords)

    monkeypatch.setattr(dpo, name, interrupted)


def test_interrupted_run_over_several_passes(saved_model, tmp_path, monkeypatch, capsys):
    """KTO, whose order of the data goes on in the second pass; stopped past a checkpoint."""
    settings = {"loss": "kto", "model": saved_model, "num_pairs": 30, "batch_size": 12, "eval_prompts": 12}
    settings |= {"max_steps": 5, "eval_interval": 1}
    reference = train(tmp_path / "reference", **settings)
    assert curves_of(reference)["epoch"][5] > 1.5
    with monkeypatch.context() as patch:
        interrupted_at(4, "take_step", patch)
        message = refusal(train, tmp_path / "interrupted", **settings)
    run = the_run(tmp_path / "interrupted")
    assert f"Ended at once; resume with: python dpo_llm.py --resume {run}" in message
    resume(run)
    assert "Resumed at step 2" in capsys.readouterr().out
    assert_same_run(run, reference)


@pytest.mark.parametrize("stage", ["warm_up", "sample_pairs", "add_reference", "take_step"])
def test_run_stopped_before_its_first_step(stage, finished_run, tmp_path, monkeypatch):
    """The end of the warm-up is saved, so that what follows it does not cost it."""
    with monkeypatch.context() as patch:
        interrupted_at(1, stage, patch)
        refusal(train, tmp_path)
    run = the_run(tmp_path)
    assert (run / "checkpoint.pt").exists() == (stage != "warm_up")
    if stage != "warm_up":
        assert dpo.load_checkpoint(run)["step"] == 0
    resume(run)
    assert_same_run(run, finished_run)


def line_with(process, text: str) -> str:
    return next(line for line in process.stdout if text in line)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_preempted_in_the_warm_up_and_started_again(number, tmp_path):
    """The same command goes on where the signal came, and ends as if there had been none."""
    settings = TINY | {"sft_steps": 300, "max_steps": 2, "checkpoint_minutes": 1e-4}
    expected = train(tmp_path / "expected", **settings)
    command = [*flags(**settings, runs=tmp_path), "--run-name", "mine"]
    process = start(SCRIPT, *command, cwd=tmp_path)
    while not (tmp_path / "mine" / "checkpoint.pt").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    told = line_with(process, "Interrupted at step -")
    assert process.wait(timeout=60) == 1 and "resume with: python dpo_llm.py --resume" in told
    step = dpo.load_checkpoint(tmp_path / "mine")["step"]
    assert -300 < step < 0 and f"step {step}" in told
    assert dpo.main(dpo.parse_args(command)) == tmp_path / "mine"
    assert_same_run(tmp_path / "mine", expected)
    message = refusal(dpo.main, dpo.parse_args([*command, "--max-steps", "1"]))
    assert "is at step 2 already; raise --max-steps" in message


def test_resume_keeps_to_the_arguments_of_the_run(finished_run):
    for flag, value in (("--loss", "ipo"), ("--beta", "0.3"), ("--label-noise", "0.2"), ("--seed", "7")):
        message = refusal(dpo.parse_args, ["--resume", str(finished_run), flag, value])
        assert flag[2:].replace("-", "_") in message and value in message
    assert dpo.parse_args(["--resume", str(finished_run), "--max-steps", "9"]).max_steps == 9


def test_evaluate_prints_the_metrics(finished_run, capsys):
    """The same numbers as those of the last evaluation of the run; another seed gives other samples."""
    files = sorted(finished_run.iterdir())
    dpo.main(dpo.parse_args(["--evaluate", str(finished_run), "--eval-prompts", "32", "--no-bf16"]))
    told, curves = capsys.readouterr().out, curves_of(finished_run)
    assert "step     6: evaluation kl_to_reference" in told
    for tag, curve in curves.items():
        if tag.startswith("eval/"):
            value = float(re.search(rf"{tag[5:]} (-?[0-9.]+)", told)[1])
            assert value == pytest.approx(curve[6], abs=6e-4), tag
    words = ["--evaluate", str(finished_run / "checkpoint.pt"), "--seed", "5", "--eval-prompts", "8"]
    dpo.main(dpo.parse_args(words))
    told = capsys.readouterr().out
    assert "true_reward" in told and f"true_reward {curves['eval/true_reward'][6]:.3f}" not in told
    assert sorted(finished_run.iterdir()) == files


# ------------------------------------------------------------------------------- other models and data


@pytest.fixture(scope="module")
def peer(tmp_path_factory) -> Path:
    """A model of transformers with random weights, and a tokenizer with a chat template."""
    torch.manual_seed(0)
    folder, tokenizer = tmp_path_factory.mktemp("peer"), dpo.make_tokenizer(dpo.Reviews.vocabulary)
    config = transformers.Qwen2Config(**SHAPE | {"vocab_size": len(tokenizer), "initializer_range": 0.1})
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def chats(count: int) -> list[dict]:
    return [
        {"chosen": [user(f"{i}"), assistant("1+")], "rejected": [user(f"{i}"), assistant("2*3")]}
        for i in range(count)
    ]


def test_dataset_of_conversations(peer, tmp_path):
    """No true reward there; sampled from the prompts of the held-out rows; the model learns the ones."""
    data = write_rows(tmp_path / "sums.jsonl", chats(60))
    settings = {"model": str(peer), "dataset": data, "max_completion_length": 5, "eval_prompts": 4}
    run = train(tmp_path / "runs", max_steps=8, eval_interval=8, learning_rate=5e-3, **settings)
    assert run.name.startswith("sums__dpo_llm__1__") and not (run / "pairs.jsonl").exists()
    curves = curves_of(run)
    assert {tag for tag in curves if tag.startswith("eval/")} == {
        f"eval/{name}" for name in [*JUDGED.split(), *SAMPLED.split()]
    }
    assert curves["eval/loss"][8] < 0.6 < curves["eval/loss"][0]
    assert curves["eval/rewards/accuracies"][8] == 1
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    held_out = [f"({i})=" for i in range(60) if dpo.is_held_out(json.dumps([user(f"{i}")]))]
    assert [x["prompt"] for x in samples] == held_out[:4] * 2 and "reward" not in samples[0]
    exported = transformers.AutoModelForCausalLM.from_pretrained(run / "model")
    assert isinstance(exported, transformers.Qwen2ForCausalLM)


def test_dataset_with_labels(peer, tmp_path):
    rows = [{"prompt": f"{i}=", "completion": "12"[i % 2] * 3, "label": i % 2 == 0} for i in range(60)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    settings = {"loss": "kto", "model": str(peer), "dataset": data, "max_completion_length": 5}
    run = train(tmp_path / "runs", max_steps=8, eval_interval=8, learning_rate=5e-3, **settings)
    curves = curves_of(run)
    assert "eval/rewards/accuracies" not in curves
    assert curves["eval/loss"][8] < 0.45 < curves["eval/loss"][0] == pytest.approx(0.5, abs=1e-3)


def test_reviews_by_a_model_with_a_chat_template(peer, saved_model, tmp_path):
    """The pairs are conversations; prompts of the evaluation are not among those that are trained on."""
    folder, model = tmp_path / "model", dpo.read_model(saved_model)
    model.tokenizer.chat_template = (  # of a question, what stands behind the colon
        "{% for m in messages %}{% if m['role'] == 'user' %}<bos>{{ m['content'].split(': ')[-1] }}"
        "{% else %}{{ m['content'] }}<eos>{% endif %}{% endfor %}"
    )
    model.save_pretrained(folder)
    args, task, model = load_parts(str(folder), runs=str(tmp_path))
    rows = dpo.sample_pairs(model, task, args)
    assert rows[0]["prompt"][0]["role"] == "user" and rows[0]["chosen"][0]["role"] == "assistant"
    data, held_out = dpo.load_preferences(model, task, args, Workplace(tmp_path))
    asked = dpo.sample_held_out(model, task, held_out, args, 0).sequences
    trained = {tuple(x.prompt) for x in data.sequences}
    assert len(asked) == 32 and not trained & {tuple(x.prompt) for x in asked}


OWN = f"{__name__}:Lengths"


def test_own_task_and_reward(tmp_path):
    """A task of the user's file is warmed up and learned; its name, and no name in a file, is imported."""
    words = [*flags(**TINY | {"num_pairs": 300}, runs=tmp_path), "--task", OWN]
    words += ["--reward", f"{__name__}:begins_right=0.5"]
    run = dpo.main(dpo.parse_args(words))
    assert run.name.startswith("lengths__dpo_llm__1__")
    rows = [json.loads(line) for line in (run / "pairs.jsonl").read_text().splitlines()]
    texts = [row[name] for row in rows for name in ("chosen", "rejected")]
    assert len({*texts}) > 5 and all(re.fullmatch("[0-9=]*", text) for text in texts)
    named = f"confirm them with --task {OWN} --reward {__name__}:begins_right=0.5"
    for flag in ("--resume", "--evaluate"):
        assert named in refusal(dpo.parse_args, [flag, str(run)])
    assert "cannot change reward" in refusal(
        dpo.parse_args, ["--resume", str(run), *words[-4:-1], "length=2"]
    )
    dpo.main(dpo.parse_args(["--resume", str(run), *words[-4:], "--max-steps", "7"]))
    assert dpo.load_checkpoint(run)["step"] == 7


def test_nothing_that_a_run_names_is_imported(finished_run, tmp_path, monkeypatch):
    run = tmp_path / "received"
    shutil.copytree(finished_run, run)
    (run / "payload.py").write_text("open('executed', 'w')\nclass Task: pass\n")
    monkeypatch.chdir(run)
    saved = json.loads((run / "args.json").read_text())
    for changes in ({"task": "payload:Task"}, {"reward": ["payload:Task"]}):
        (run / "args.json").write_text(json.dumps(saved | changes))
        for flag in ("--resume", "--evaluate"):
            assert "confirm" in refusal(lambda flag=flag: dpo.main(dpo.parse_args([flag, str(run)])))
    # With a harmless args.json and another name in the checkpoint.
    (run / "args.json").write_text(json.dumps(saved))
    state = dpo.load_checkpoint(run)
    dpo.save_checkpoint(run / "checkpoint.pt", state | {"args": state["args"] | {"task": "payload:Task"}})
    for flag in ("--resume", "--evaluate"):
        assert "cannot change" in refusal(lambda flag=flag: dpo.main(dpo.parse_args([flag, str(run)])))
    assert not (run / "executed").exists()


def without_places(run: Path) -> dict:
    state = dpo.load_checkpoint(run)
    # The shorter run had an evaluation at its end.
    return state | {"args": state["args"] | {"model": "", "dataset": "", "max_steps": 0}, "samples": {}}


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_model_and_dataset_may_move_but_not_change(lora_rank, peer, tmp_path):
    """A resumed run equals an uninterrupted one from the old places; others are refused with a sentence."""
    model = tmp_path / "model"
    shutil.copytree(peer, model)
    data = write_rows(tmp_path / "sums.jsonl", chats(60))
    settings = {"model": str(model), "dataset": data, "max_completion_length": 5, "eval_prompts": 4}
    settings["lora_rank"] = lora_rank
    reference = train(tmp_path / "reference", max_steps=2, anneal_lr=False, **settings)
    run = train(tmp_path / "runs", max_steps=1, anneal_lr=False, **settings)
    assert not (run / "reference").exists()  # no copy of the model
    elsewhere = tmp_path / "elsewhere"
    places = {"--model": elsewhere / "model", "--dataset": elsewhere / "moved.jsonl"}
    elsewhere.mkdir()
    model.rename(places["--model"])
    Path(data).rename(places["--dataset"])
    assert "Cannot read a model from" in refusal(resume, run, "--max-steps", "2")
    words = [str(word) for pair in places.items() for word in pair]
    assert "Cannot read the dataset" in refusal(resume, run, "--max-steps", "2", *words[:2])

    other = dpo.read_model(places["--model"])
    with torch.no_grad():
        other.model["layers"][1].mlp["up_proj"].weight[0, 0] += 1e-6
    other.save_pretrained(tmp_path / "other")
    changed = write_rows(tmp_path / "changed.jsonl", chats(61))
    for flag, place in (("--model", tmp_path / "other"), ("--dataset", changed)):
        for command in (["--resume", run, "--max-steps", "2"], ["--evaluate", run]):
            args = dpo.parse_args([*map(str, command), *words, flag, str(place)])
            assert f"began with another {flag[2:]} than {place}" in refusal(dpo.main, args)
    for flag in ("--model", "--dataset"):
        assert f"cannot change {flag[2:]}" in refusal(dpo.parse_args, ["--resume", str(run), flag, "None"])
    resume(run, "--max-steps", "2", *words)
    assert checkpoint_difference(*(without_places(x) for x in (run, reference))) is None
    dpo.main(dpo.parse_args(["--evaluate", str(run)]))  # it knows the new places


@pytest.mark.parametrize("content", ["[5]", "{", '{"eos_token_id": "x", "a": }'])
def test_malformed_files_of_a_model_are_named(content, saved_model, tmp_path):
    shutil.copytree(saved_model, tmp_path / "model")
    for name in ("generation_config.json", "config.json"):
        (tmp_path / "model" / name).write_text(content)
        assert "Cannot read a model from" in refusal(dpo.read_model, tmp_path / "model")


@pytest.mark.parametrize("unknown", [73, -1, "x", [1, 99], 1.5])
def test_tokens_that_end_a_text_must_be_known(unknown, saved_model, tmp_path):
    shutil.copytree(saved_model, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": unknown}))
    message = refusal(dpo.read_model, tmp_path / "model")
    assert "as tokens that end a text, which the model does not know" in message
    assert str(unknown[1] if isinstance(unknown, list) else unknown) in message


def test_two_processes_take_the_step_of_one(saved_model, tmp_path):
    """The first step of KTO, which needs the KL of the whole batch: metrics, gradient and moved weights."""
    settings = TINY | {"model": saved_model, "loss": "kto", "max_steps": 1, "eval_interval": 1}
    settings |= {"warmup_steps": 0, "num_pairs": 40, "eval_prompts": 17, "micro_batch_size": 5}
    one = train(tmp_path / "one", **settings)
    run_two_processes(SCRIPT, 29519, *flags(**settings, runs=tmp_path / "two"), cwd=tmp_path)
    two = the_run(tmp_path / "two")
    assert (one / "pairs.jsonl").read_text() == (two / "pairs.jsonl").read_text()
    states = [dpo.load_checkpoint(run) for run in (one, two)]
    first_moments = [[x["exp_avg"] for x in state["optimizer"]["state"].values()] for state in states]
    for x, y in zip(*first_moments, strict=True):  # a tenth of the gradient, whose norm is limited to 1
        torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-4)
    curves = [curves_of(run) for run in (one, two)]
    assert curves[0].keys() == curves[1].keys() and "kl" in curves[0]
    for tag in curves[0]:
        assert [*curves[0][tag]] == [*curves[1][tag]]
        np.testing.assert_allclose(
            [*curves[0][tag].values()], [*curves[1][tag].values()], rtol=1e-3, atol=1e-4, err_msg=tag
        )


def test_model_that_writes_no_reviews_is_named(tmp_path):
    assert "no two completions of Reviews of which one is better" in refusal(train, tmp_path, sft_steps=0)


def test_prompts_that_leave_no_room_are_named(peer, tmp_path):
    data = write_rows(tmp_path / "sums.jsonl", chats(60))
    settings = {"model": str(peer), "dataset": data, "max_completion_length": 126}
    assert "held-out prompts leave room; lower --max-completion-length" in refusal(
        train, tmp_path / "runs", **settings
    )


def test_batch_must_be_divisible_by_the_processes(monkeypatch, tmp_path):
    monkeypatch.setattr(dpo, "rank_and_world", lambda: (0, 3))
    assert "batch_size = 8 must be a multiple of 3 processes" in refusal(train, tmp_path)
    monkeypatch.setattr(dpo, "rank_and_world", lambda: (0, 4))
    for few in ({"eval_prompts": 3}, {"sft_batch_size": 3}):
        assert "must be at least 4, one per process" in refusal(train, tmp_path, **few)


# --------------------------------------------------------------------------------------- bad input to runs


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_gradient_that_is_not_finite_ends_the_run(value, saved_model, tmp_path, monkeypatch):
    judge = dpo.judge

    def spoiled(log_probs, *rest, **keywords):
        losses, sums = judge(log_probs, *rest, **keywords)
        return losses * value, sums

    monkeypatch.setattr(dpo, "judge", spoiled)
    message = refusal(train, tmp_path, model=saved_model, eval_interval=0)
    run = the_run(tmp_path)
    assert re.search(r"grad_norm is (nan|inf) at step 1; lower --learning-rate", message)
    assert str(run) in message
    state = dpo.load_checkpoint(run)
    reference = dpo.Transformer.from_pretrained(saved_model).state_dict()
    assert state["step"] == 0 and all(torch.equal(x, reference[name]) for name, x in state["model"].items())


def test_policy_that_runs_away_is_told(saved_model, tmp_path, capsys):
    settings = {"learning_rate": 0.3, "max_steps": 2, "max_completion_length": 6, "eval_prompts": 64}
    train(tmp_path, model=saved_model, num_pairs=300, **settings)
    told = capsys.readouterr().out
    assert "Warning: the policy is over half a nat per token away" in told
    assert "Warning: most completions are cut off" in told


def test_full_disk_ends_the_run_with_a_sentence(saved_model, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dpo.torch, "save", full)
    assert "is the disk full?" in refusal(train, tmp_path, model=saved_model, eval_interval=0)


def test_checkpoints_of_other_scripts_are_refused(finished_run, tmp_path):
    (tmp_path / "args.json").write_text((finished_run / "args.json").read_text())
    torch.save({"script": "grpo_llm"}, tmp_path / "checkpoint.pt")
    for flag in ("--resume", "--evaluate"):
        message = refusal(lambda flag=flag: dpo.main(dpo.parse_args([flag, str(tmp_path)])))
        assert "not a checkpoint of dpo_llm.py" in message


# ----------------------------------------------------------------------------------------------- learning


def test_it_learns(saved_model, tmp_path):
    """The reviews that it writes become more favourable, though nobody tells it the rewards."""
    settings = {"num_pairs": 2000, "batch_size": 64, "max_steps": 60, "eval_interval": 60, "beta": 0.1}
    settings |= {"eval_prompts": 256, "micro_batch_size": 64, "learning_rate": 1e-3}
    curves = curves_of(train(tmp_path, model=saved_model, **settings))
    before, after = curves["eval/true_reward"].values()
    # With seeds 1, 2 and 3 it rises by 0.13, 0.17 and 0.10, and wins 0.68, 0.67 and 0.65 of the time.
    assert before < 0.5 and after > before + 0.06 and curves["eval/win_rate"][60] > 0.6
    assert 0.3 < curves["eval/kl_to_reference"][60] < 4


if __name__ == "__main__":  # needs trl
    goldens = {name: with_gradient(trl_loss, name) for name in SETTINGS}
    GOLDENS.write_text(json.dumps(goldens, indent=1))
