"""Reinforcement learning from human feedback (RLHF): fine-tuning, a reward model, and PPO, in one run.

Three stages (Ouyang et al. 2022, section 3.1). Supervised fine-tuning (SFT) on demonstrations makes the
reference pi_ref. A reward model r learns from rankings of K completions of a prompt x, of which y_w is better
than y_l, and PPO maximises it near the reference, with a value model as the baseline:

    minimise  -1 / C(K, 2) sum over pairs  log sigmoid( r(x, y_w) - r(x, y_l) )
    maximise  E[ r(x, y) - kl_coef log(pi(y|x) / pi_ref(y|x)) ]  +  ptx_coef E[ log pi(demonstrations) ]

(their equations 1 and 2). Each token is an action: it costs its own part of the KL, and the last one earns r.

    python ppo_llm.py
    python ppo_llm.py --resume runs/reviews__ppo_llm__1__20261120-101500
    python ppo_llm.py --stage ppo --model my_sft --reward-model my_reward --dataset prompts.jsonl \
        --learning-rate 1e-6 --value-learning-rate 2e-6

By default the script makes a transformer of 0.4M parameters, teaches it to write reviews, samples pairs of
reviews and labels the more favourable one as better, with a tenth of the labels wrong. So the true reward is
known beside the learned one that PPO sees: it rises from 0.43 to 0.91, mean of five seeds, in two minutes on
a CPU. Watch `eval/true_reward` beside `eval/learned_reward`: where only the second still rises, the policy
exploits the reward model.

Departures from Huang et al. (2024): the score has standard deviation 1 on samples of the reference, and not
only mean 0, so that kl_coef means the same for any reward model. Policy and value model have an optimizer
each, so there is no vf_coef. The minibatches are the same in all epochs, so that several processes take the
steps of one. The sampler's log-probabilities are the old ones: both come from one model here. With a group
baseline there is no value model, and half the memory: grpo_llm.py --reward-model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import time
import zipfile
import zlib
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, get_type_hints

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import typeguard
import tyro
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

Repeatable = Annotated[list[str], tyro.conf.UseAppendAction]  # a flag that may be given several times


@dataclass
class Args:
    # Stages
    stage: Literal["all", "sft", "reward-model", "ppo"] = "all"  # which to run; the models stay in the run
    reward_model: str | None = None  # folder or hub id: to train on, or for --stage ppo in place of its own

    # Task or dataset
    task: str = "Reviews"  # generated prompts and their reward; module:Class imports a task of your own
    reward: Repeatable = field(default_factory=list)  # module:function[=weight] joins the rewards of the task
    dataset: str | None = None  # JSONL or Parquet file, or id[:configuration[:split]] on the Hugging Face hub
    eval_dataset: str | None = None  # held-out rows of its own; None holds out a tenth of the dataset
    prompt_column: str = "prompt"  # column of the dataset with the prompt, as text or as messages
    chosen_column: str = "chosen"  # column with the better completion, or the conversation that it ends
    rejected_column: str = "rejected"  # column with the other completion
    ranking_column: str = "completions"  # column with K completions, best first, in place of those two
    completion_column: str = "completion"  # column with one completion, a demonstration; --stage sft only
    max_length: int | None = None  # tokens of prompt and completion; longer rows are dropped; None: context
    num_rankings: int = 16384  # prompts for which completions are sampled from the reference and ranked
    ranking_size: int = 2  # K: completions of each of these prompts; 2 makes pairs
    label_noise: float = 0.1  # probability that two neighbours in a ranking are swapped

    # Model
    model: str | None = None  # folder or hub id of a Llama, Mistral or Qwen; None makes a small one
    hidden_size: int = 128  # width of the residual stream; a multiple of 2 x num_heads
    num_layers: int = 2  # transformer layers
    num_heads: int = 4  # attention heads
    lora_rank: int = 0  # train adapters of this rank beside the linear layers (LoRA); 0 trains all weights
    lora_alpha: float = 32.0  # the adapters are multiplied by lora_alpha / lora_rank
    bf16: bool = True  # multiply matrices in bfloat16 if the hardware can; what learns stays in float32
    gradient_checkpointing: bool = False  # recompute activations in the backward pass to save memory
    micro_batch_size: int = 128  # rows per forward and backward pass; changes memory and speed only
    micro_batch_tokens: int = 8192  # tokens per forward and backward pass, so that memory has a limit

    # Supervised fine-tuning
    sft_steps: int = 300  # steps on demonstrations, or on the best completions of a dataset; 0 for none
    sft_batch_size: int = 64  # demonstrations per step
    sft_learning_rate: float = 2e-3  # highest learning rate of AdamW; 1e-5 for pretrained models

    # Reward model
    reward_steps: int = 225  # steps on rankings; more than one pass over them fits their noise
    reward_batch_size: int = 64  # rankings per step
    reward_learning_rate: float = 2e-3  # highest learning rate of AdamW; 1e-5 for pretrained models

    # PPO
    max_steps: int = 50  # steps of PPO, each with a batch of completions of its own
    batch_size: int = 256  # completions per step, one of each prompt, over all processes
    update_epochs: int = 2  # passes over the completions of a step
    num_minibatches: int = 4  # optimizer steps per pass; divides the completions of each process
    max_completion_length: int | None = None  # tokens after which a completion is cut off; None: the task's
    temperature: float = 1.0  # of the sampling, and of the log-probabilities in the loss
    penalty_reward_value: float | None = -1.0  # replaces the score of a completion that was cut off
    kl_coef: float = 0.2  # weight of the KL to the reference in the reward
    kl_target: float | None = None  # KL per completion that kl_coef is adapted to; None keeps it fixed
    kl_gain: float = 0.1  # how fast kl_coef is adapted, in relative change per relative error
    gamma: float = 1.0  # discount factor, in [0, 1]
    gae_lambda: float = 0.95  # lambda of GAE, in [0, 1]: 0 trusts the value model, 1 the sampled return
    clip_coef: float = 0.2  # eps: ratios in [1 - eps, 1 + eps] are left alone
    value_clip_coef: float = 0.2  # values may move this far from those before the step; inf for no limit
    whiten_rewards: bool = False  # scale the rewards of all tokens to variance 1
    norm_adv: bool = True  # normalise the advantages of a step
    ptx_coef: float = 0.0  # weight of the likelihood of demonstrations beside the loss (PPO-ptx)
    learning_rate: float = 3e-4  # highest learning rate of AdamW; 1e-6 to 5e-6 for pretrained models
    value_learning_rate: float = 5e-4  # the same for the value model
    warmup_steps: int = 5  # steps over which both learning rates rise to their highest value
    anneal_lr: bool = True  # afterwards lower them linearly to 5 percent at max_steps
    max_grad_norm: float = 1.0  # scale larger gradients down to this norm

    # Evaluation
    eval_interval: int = 10  # steps of PPO between evaluations on held-out prompts; 0 for none
    eval_prompts: int = 512  # held-out prompts of an evaluation, one sampled completion each

    # Run
    seed: int = 1  # seed of the model, the sampled rankings and the order of the data
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto is a GPU if there is one
    checkpoint_interval: int = 10  # steps of PPO between checkpoints
    checkpoint_minutes: float = 10  # minutes after which a checkpoint is saved, too, in all stages
    export: Literal["merged", "adapters"] = "merged"  # with LoRA, a whole model or the adapters alone
    export_interval: int = 0  # steps between exports of the model; 0 for the end only
    run_name: str | None = None  # fixed name of the run directory; resumes the run if it exists
    resume: str | None = None  # run directory to resume; its arguments are loaded first
    evaluate: str | None = None  # run directory or checkpoint file to evaluate instead of training

    # Logging
    exp_name: str = Path(__file__).stem  # name of the experiment, part of the name of the run directory
    runs: str = "runs"  # folder of the run directories
    track: bool = False  # log to Weights & Biases too
    wandb_project_name: str = "policy-optimization"  # project in Weights & Biases
    wandb_entity: str | None = None  # team in Weights & Biases

    def __post_init__(self) -> None:
        check(self)

    @property
    def first_step(self) -> int:
        """The steps of PPO count from 0; those of the stages before it count up to 0."""
        before = {"ppo": 0, "reward-model": self.reward_steps}
        return -before.get(self.stage, self.sft_steps + self.reward_steps)


# -------------------------------------------------------------------------------------------------- equations


def ordered_pairs(sizes: list[int]) -> Tensor:
    """Indices (3, P) of the better and the worse completion of each pair, and of the ranking it belongs to.

    The completions of all rankings stand in one list, those of a ranking side by side and the best one first.
    """
    pairs, start = [], 0
    for ranking, size in enumerate(sizes):
        for i, j in itertools.combinations(range(start, start + size), 2):
            pairs.append((i, j, ranking))
        start += size
    return torch.tensor(pairs).view(-1, 3).T


def ranking_loss(rewards: Tensor, sizes: list[int]) -> Tensor:
    """Losses (B,) of B rankings of `sizes` completions, from rewards (N,) of all of them, best first in each.

    The mean of -log sigmoid(r(better) - r(worse)) over all C(K, 2) pairs of a ranking (Ouyang et al. 2022,
    equation 1); for K = 2 the loss of Bradley and Terry's model (1952).
    """
    better, worse, ranking = ordered_pairs(sizes).to(rewards.device)
    losses = -F.logsigmoid(rewards[better] - rewards[worse])
    return rewards.new_zeros(len(sizes)).index_add(0, ranking, losses / ranking.bincount()[ranking])


def shaped_rewards(
    scores: Tensor, log_probs: Tensor, reference_log_probs: Tensor, mask: Tensor, kl_coef: float | Tensor
) -> Tensor:
    """Rewards (B, T) of tokens: -kl_coef (log pi - log pi_ref), and at the last token the score (B,) too.

    Ziegler et al. 2019, section 2.1. All other inputs (B, T); the mask is true on the tokens of completions.
    """
    rewards = -kl_coef * (log_probs - reference_log_probs)
    return torch.where(mask, rewards, 0.0) + torch.where(last_tokens(mask), scores[:, None], 0.0)


def last_tokens(mask: Tensor) -> Tensor:
    """True (B, T) on the last token of each completion."""
    return mask & ~F.pad(mask, (0, 1))[:, 1:]


def compute_gae(
    rewards: Tensor, values: Tensor, next_values: Tensor, terminated: Tensor, done: Tensor,
    gamma: float, gae_lambda: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Advantages and value targets (T, N) by GAE (Schulman et al. 2016, equation 16); all inputs (T, N).

    `next_values[t]` is V of the observation after step t, the final one where the episode ended there.
    `terminated` stops the bootstrap, `done` (terminated or truncated) the sum. Targets: advantages + values.
    """
    deltas = rewards + gamma * next_values * (1 - terminated.to(values.dtype)) - values
    advantages = discounted_sum(deltas, gamma * gae_lambda * (1 - done.to(values.dtype)))
    return advantages, advantages + values


def token_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Advantages and value targets (B, T) of tokens, whose values (B, T) are of the states before them.

    Each completion is an episode, which its last token ends. Past it everything is 0.
    """
    rewards, values = torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)
    end, next_values = last_tokens(mask), F.pad(values, (0, 1))[:, 1:]
    steps = (x.T for x in (rewards, values, next_values, end, end))
    advantages, returns = compute_gae(*steps, gamma, gae_lambda)
    return advantages.T, returns.T


def moments(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of x over the entries of the mask, of all processes."""
    x = x[mask]
    count, total = sum_over_ranks(torch.stack((x.new_tensor(len(x)), x.sum())))
    mean = total / count
    return mean, sum_over_ranks((x - mean).square().sum()) / count


def whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """x (B, T) with mean 0 and variance 1 over the mask, or with variance 1 and its own mean; 0 elsewhere."""
    mean, variance = moments(x, mask)
    whitened = (x - mean) * (variance + 1e-8).rsqrt()
    return torch.where(mask, whitened if shift_mean else whitened + mean, 0.0)


def policy_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, *, clip_coef: float,
    token_count: Tensor | float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """The clipped surrogate, a mean over tokens (Schulman et al. 2017, equation 7), and metrics.

    Inputs (B, T). The count is that of the whole minibatch, so that micro-batches and processes add up to it.
    """
    weights = mask.to(log_probs.dtype)
    token_count = weights.sum() if token_count is None else token_count
    log_ratio = (log_probs - old_log_probs).where(mask, 0.0).clamp(-20, 20)
    ratio = log_ratio.exp()
    losses = -torch.min(ratio * advantages, ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantages)
    metrics = {
        "losses/approx_kl": ratio - 1 - log_ratio,  # k3 of KL(old, new) (Schulman 2020)
        "losses/clip_fraction": ((ratio - 1).abs() > clip_coef).to(ratio.dtype),
    }
    means = {name: (x.detach() * weights).sum() / token_count for name, x in metrics.items()}
    return (losses * weights).sum() / token_count, means


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, value_clip_coef: float,
    token_count: Tensor | float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Half the squared error, a mean over tokens, and metrics; inputs (B, T).

    Of the values and those within value_clip_coef of the old ones, the larger error counts: a value that has
    moved further in the right direction has no gradient.
    """
    weights = mask.to(values.dtype)
    token_count = weights.sum() if token_count is None else token_count
    clipped = old_values + (values - old_values).clamp(-value_clip_coef, value_clip_coef)
    errors, clipped_errors = (values - returns).square(), (clipped - returns).square()
    losses = 0.5 * torch.max(errors, clipped_errors)
    was_clipped = (clipped_errors > errors).to(values.dtype)
    metrics = {"losses/value_clip_fraction": (was_clipped * weights).sum() / token_count}
    return (losses * weights).sum() / token_count, metrics


def adapted_kl_coef(kl_coef: Tensor, kl: float, args: Args) -> Tensor:
    """kl_coef moved by a proportional controller towards kl_target (Ziegler et al. 2019, section 2.2)."""
    if args.kl_target is None:
        return kl_coef
    error = min(max(kl / args.kl_target - 1, -0.2), 0.2)
    return kl_coef * (1 + args.kl_gain * error)


# ------------------------------------------------------------------------------------------------------- task

ADJECTIVES = {"awful": -2, "boring": -1, "weak": -1, "plain": 0, "odd": 0, "long": 0}
ADJECTIVES |= {"nice": 1, "funny": 1, "superb": 2}
SUBJECTS = [  # the words of "the short film by the young director", which a review is about
    "short new old quiet loud strange".split(),
    "film novel play song show game".split(),
    "young famous local foreign retired unknown".split(),
    "director writer artist band student team".split(),
]
PARTS = "plot cast music acting ending".split()
CLAUSE = rf"was (?:(?:not|very) )?(?:{'|'.join(ADJECTIVES)})"
REVIEW = re.compile(rf" {CLAUSE}(?:, (?:and|but) the (?:{'|'.join(PARTS)}) {CLAUSE})*\.")
WORDS = [*sum(SUBJECTS, []), *PARTS, *ADJECTIVES, *"by the was very not and but".split()]


def sentiment_reward(prompts: list[str], completions: list[str], **columns: list) -> list[float]:
    """How favourable a review is, from 0 to 1: sigmoid of half the sum of its adjectives; 0 for no review.

    "very" doubles the value of an adjective, "not" inverts its sign.
    """
    rewards = []
    for text in completions:
        proper = len(text) <= 1000 and REVIEW.fullmatch(text)
        words = re.findall(r"[a-z]+", text) if proper else []
        factors = [{"not": -1, "very": 2}.get(word, 1) for word in ["", *words]]
        total = sum(factor * ADJECTIVES.get(word, 0) for factor, word in zip(factors, words))
        rewards.append(1 / (1 + math.exp(-total / 2)) if proper else 0.0)
    return rewards


class Reviews:
    """Complete a review; the more favourable it is, the higher the reward.

    In Rafailov et al. (2023, section 6.1), a model completes film reviews, and the true reward is the
    probability that a classifier finds them positive. Here the adjectives decide. A task of your own
    is a class with these members, in any file: --task my_file:MyTask.
    """

    # name: (function with the signature of TRL's rewards, weight)
    rewards = {"sentiment": (sentiment_reward, 1.0)}
    max_completion_length = 32
    # Strings that the small model reads and writes, one token each; words include the space before them.
    # Tags and digits serve other tasks: one vocabulary lets the same model learn several.
    vocabulary = [*"<think> </think> <answer> </answer>".split(), *"\n0123456789+-*/()=,.", "the"]
    vocabulary += [f" {word}" for word in WORDS]

    def problem(self, rng: random.Random) -> dict:
        """`prompt`, `question` in its place for models with a chat template, and columns for the rewards."""
        size, kind, fame, maker = (rng.choice(words) for words in SUBJECTS)
        prompt = f"the {size} {kind} by the {fame} {maker}"
        return {"prompt": prompt, "question": f"Go on with this review in one sentence: {prompt}"}

    def demonstration(self, problem: dict, rng: random.Random) -> str:
        """A review of one to four clauses whose mood shows in most of them; only the small model needs it."""
        mood, clauses = rng.choice((-1, -1, 1)), []
        for _ in range(rng.randrange(1, 5)):
            adverb = rng.choice(("", "", "not ", "very "))
            value = -mood if adverb == "not " else mood
            fitting = [word for word, x in ADJECTIVES.items() if x * value > 0 or rng.random() < 0.3]
            clauses.append(f"was {adverb}{rng.choice(fitting or [*ADJECTIVES])}")
        rest = (f", {rng.choice(('and', 'but'))} the {rng.choice(PARTS)} {clause}" for clause in clauses[1:])
        return f" {clauses[0]}{''.join(rest)}."


TASKS = {"reviews": Reviews}


# ------------------------------------------------------------------------- stage 1: supervised fine-tuning


def learn_demonstrations(model: Transformer, sequences: list[Sequence], weight: float, args: Args) -> Tensor:
    """Adds the gradient of the negative log-likelihood, a mean over tokens; returns it for all processes."""
    token_count = sum(len(completion) for _, completion in sequences)
    sequences, total = my_share(sequences), torch.zeros((), device=model.device)
    for part in split(sequences, args):
        loss = -sequence_log_probs(model, [sequences[row] for row in part]).sum() / token_count
        (weight * loss).backward()
        total += loss.detach()
    return sum_over_ranks(total)


def train_sft(task, args: Args, run: Run) -> None:
    """Stage 1: maximises the likelihood of demonstrations. The result is the folder `reference`."""
    model = load_model(task, args, run)
    data = load_rankings(model, None, args, run)[0] if args.dataset else None
    optimizer = adam(model, weight_decay=0.01)
    run.start(model=model, optimizer=optimizer)
    for progress in run.iterations(begin=args.first_step, end=-args.reward_steps):
        batch = round(progress * args.sft_steps)
        # Rise in 50 steps; fall to 5 percent over the second half.
        rate = args.sft_learning_rate * min((batch + 1) / 50, 1, 0.05 + 1.9 * (1 - progress))
        optimizer.param_groups[0]["lr"] = rate
        with run.precision:
            loss = learn_demonstrations(model, demonstrations(model, task, data, batch, args), 1.0, args)
        norm = optimizer_step(model, optimizer, args.max_grad_norm)
        if batch % 10 == 9 or not math.isfinite(norm):
            run.log({"sft/loss": loss, "sft/grad_norm": norm})
    export(model.save_pretrained, run.path / "reference")
    run.start()  # without state, since the stage is over
    run.save()


# ----------------------------------------------------------------------------------- stage 2: reward model


def reward_step(
    model: ScalarModel, optimizer: torch.optim.Optimizer, rankings: list[Ranking], args: Args
) -> dict[str, float]:
    """One step of the reward model on a batch of rankings; returns metrics."""
    count, rankings = len(rankings), my_share(rankings)
    totals = torch.zeros(3, device=model.device)
    # The completions of a ranking stay together, packed after one copy of their prompt.
    for part in split([ranking.joined for ranking in rankings], args):
        sequences = [x for row in part for x in rankings[row].sequences]
        sizes = [len(rankings[row].completions) for row in part]
        rewards = sequence_scores(model, sequences)
        loss = ranking_loss(rewards, sizes).sum() / count
        loss.backward()
        totals += torch.stack((loss.detach(), *count_right(rewards.detach(), sizes)))
    loss, right, pairs = sum_over_ranks(totals).tolist()
    norm = optimizer_step(model, optimizer, args.max_grad_norm)
    return {"loss": loss, "accuracy": right / pairs, "grad_norm": norm}


def normalize(model: ScalarModel, sequences: list[Sequence], args: Args) -> None:
    """Folds into the head that the scores of `sequences`, over all processes, have mean 0 and deviation 1.

    Bradley and Terry's model leaves the mean free, and kl_coef is in units of the score.
    """
    scores = all_scores(model, sequences, args)
    mean, variance = moments(scores, torch.ones_like(scores, dtype=torch.bool))
    deviation = variance.sqrt().clamp(min=1e-6)
    with torch.no_grad():
        model.score.weight /= deviation
        model.score.bias.sub_(mean).div_(deviation)


def train_reward_model(task, args: Args, run: Run) -> None:
    """Stage 2: the SFT model with a scalar head learns to rank. The result is the folder `reward_model`.

    With --reward-model that one learns on, from rankings of samples of --model.
    """
    reference = read_frozen("reference", Transformer, args, run)
    model = load_trainable("reward_model" if args.reward_model else "reference", ScalarModel, args, run)
    with run.precision:
        data, held_out = load_rankings(reference, task, args, run)
    optimizer = adam(model)
    run.start(model=model, optimizer=optimizer)
    for progress in run.iterations(begin=-args.reward_steps, end=0):
        batch = round(progress * args.reward_steps)
        rate = min((batch + 1) / 10, 1 - 0.95 * progress)
        optimizer.param_groups[0]["lr"] = args.reward_learning_rate * rate
        rows = drawn(len(data.rankings), batch, args.reward_batch_size, args.seed)
        with run.precision:
            metrics = reward_step(model, optimizer, [data.rankings[row] for row in rows], args)
        run.log({f"reward_model/{name}": x for name, x in metrics.items()})

    with run.precision:
        metrics = evaluate_reward_model(model, held_out.rankings, args)
        generator = torch.Generator().manual_seed(args.seed + 2 * EVALUATION_SEED)
        uniforms = torch.rand(args.eval_prompts, 1, args.max_completion_length, generator=generator)
        numbers = range(args.eval_prompts)
        samples = sample_completions(reference, task, data, my_share(numbers), my_share(uniforms), args)
        normalize(model, samples.sequences, args)
    run.write({f"reward_model/{name}": x for name, x in metrics.items()})
    say("reward model: " + ", ".join(f"{name} {x:.3f}" for name, x in metrics.items()))
    export(model.save_pretrained, run.path / "reward_model")
    run.start()
    run.save()


# ------------------------------------------------------------------------------------------- stage 3: PPO


class Rollout(NamedTuple):
    """B completions of this process, each of another prompt, of at most C tokens."""

    problems: list[dict]
    sequences: list[Sequence]
    texts: list[str]
    log_probs: Tensor  # (B, C), under the distribution that was sampled from
    mask: Tensor  # (B, C), True on the tokens of the completions
    finished: Tensor  # (B,), False for completions that were cut off
    true_rewards: Tensor | None  # (B,), if there is a task


def sample_completions(
    model: Transformer, task, data: Data | None, numbers: list[int] | range, uniforms: Tensor, args: Args,
    held_out: bool = False,
) -> Rollout:  # fmt: skip
    """A completion of each of the prompts `numbers`, from random numbers (B, 1, C), one for each token."""
    problems, prompts = draw_prompts(model, task, data, numbers, args, held_out)
    tokens, log_probs, finished = sample(model, prompts, uniforms.to(model.device), args, args.temperature)
    texts = model.decode(tokens)
    rewards = score(task, problems, texts)["reward"] if task else None
    lengths = torch.tensor([len(completion) for completion in tokens])
    mask = (torch.arange(max(lengths)) < lengths[:, None]).to(model.device)
    sequences = list(map(Sequence, prompts, tokens))
    return Rollout(problems, sequences, texts, log_probs[:, : mask.shape[1]], mask, finished, rewards)


def collect_rollout(model: Transformer, task, data: Data | None, step: int, args: Args) -> Rollout:
    """The completions of a step for this process."""
    rank, world = rank_and_world()
    share = args.batch_size // world
    rows = slice(rank * share, (rank + 1) * share)
    first = args.num_rankings + (step - 1) * args.batch_size  # past the prompts of the rankings
    # All processes draw all numbers, so that the completions do not depend on how many there are.
    uniforms = torch.rand(args.batch_size, 1, args.max_completion_length)[rows]
    return sample_completions(model, task, data, range(first, first + args.batch_size)[rows], uniforms, args)


def final_scores(
    reward_model: ScalarModel, sequences: list[Sequence], finished: Tensor, args: Args
) -> Tensor:
    """Scores (B,) of completions by the reward model, with a fixed one for those that were cut off.

    Without it, endless text is the way to the highest score (Huang et al. 2024, detail on the EOS trick).
    """
    scores = all_scores(reward_model, sequences, args)
    if args.penalty_reward_value is None:
        return scores
    return torch.where(finished, scores, args.penalty_reward_value)


class Batch(NamedTuple):
    """What the losses need to know of B completions of at most C tokens."""

    sequences: list[Sequence]
    mask: Tensor  # (B, C)
    old_log_probs: Tensor  # (B, C)
    old_values: Tensor  # (B, C), of the value model before the step
    advantages: Tensor  # (B, C)
    returns: Tensor  # (B, C)

    def select(self, rows: list[int]) -> Batch:
        """Some of the rows, cut where the longest of their completions ends."""
        sequences = [self.sequences[row] for row in rows]
        end = max(len(completion) for _, completion in sequences)
        return Batch(sequences, *(x[rows, :end] for x in self[1:]))


def make_batch(
    rollout: Rollout, reference: Transformer, reward_model: ScalarModel, critic: ScalarModel,
    kl_coef: Tensor, args: Args,
) -> tuple[Batch, dict[str, float]]:  # fmt: skip
    """The rollout with its advantages, and metrics over all processes."""
    sequences, mask, length = rollout.sequences, rollout.mask, rollout.mask.shape[1]
    scores = final_scores(reward_model, sequences, rollout.finished, args)
    reference_log_probs = log_probs_under(reference, sequences, length, args)
    rewards = shaped_rewards(scores, rollout.log_probs, reference_log_probs, mask, kl_coef.to(scores.device))
    if args.whiten_rewards:
        rewards = whiten(rewards, mask, shift_mean=False)
    values = all_values(critic, sequences, length, args)
    advantages, returns = token_advantages(rewards, values, mask, args.gamma, args.gae_lambda)
    unexplained = moments(returns - values, mask)[1] / moments(returns, mask)[1].clamp(min=1e-8)
    if args.norm_adv:
        advantages = whiten(advantages, mask)
    means = {
        "reward": scores,
        "objective/kl": (rollout.log_probs - reference_log_probs).sum(1),
        "objective/entropy": -rollout.log_probs.sum(1),  # of whole completions, estimated from the samples
        "completions/mean_length": mask.sum(1),
        "completions/clipped_ratio": 1 - rollout.finished.float(),
    } | ({} if rollout.true_rewards is None else {"true_reward": rollout.true_rewards})
    totals = sum_over_ranks(torch.stack([x.to(scores).sum() for x in means.values()]))
    metrics = dict(zip(means, (totals / args.batch_size).tolist()))
    metrics["objective/rlhf_reward"] = metrics["reward"] - kl_coef.item() * metrics["objective/kl"]
    metrics["losses/explained_variance"] = 1 - unexplained.item()
    return Batch(sequences, mask, rollout.log_probs, values, advantages, returns), metrics


def take_step(
    model: Transformer, critic: ScalarModel, optimizer: torch.optim.Optimizer,
    critic_optimizer: torch.optim.Optimizer, batch: Batch, pretraining: list[Sequence], args: Args,
) -> dict[str, float]:  # fmt: skip
    """One step of both optimizers on a minibatch, and on `pretraining`, if there is any; returns metrics."""
    token_count, totals = sum_over_ranks(batch.mask.sum()), defaultdict(float)
    for part in split(batch.sequences, args):
        micro = batch.select(part)
        log_probs = completion_log_probs(model, micro.sequences, args.temperature)
        loss, metrics = policy_loss(
            log_probs, micro.old_log_probs, micro.advantages, micro.mask,
            clip_coef=args.clip_coef, token_count=token_count,
        )  # fmt: skip
        loss.backward()
        values = completion_values(critic, micro.sequences)
        error, more = value_loss(
            values, micro.old_values, micro.returns, micro.mask,
            value_clip_coef=args.value_clip_coef, token_count=token_count,
        )  # fmt: skip
        error.backward()
        metrics |= more | {"losses/policy_loss": loss.detach(), "losses/value_loss": error.detach()}
        for name, value in metrics.items():
            totals[name] += value
    metrics = {name: sum_over_ranks(value).item() for name, value in sorted(totals.items())}
    if pretraining:
        metrics["losses/ptx_loss"] = learn_demonstrations(model, pretraining, args.ptx_coef, args).item()
    metrics["losses/value_grad_norm"] = optimizer_step(critic, critic_optimizer, args.max_grad_norm)
    return metrics | {"grad_norm": optimizer_step(model, optimizer, args.max_grad_norm)}


def train_policy(task, args: Args, run: Run) -> None:
    """Stage 3: PPO on the learned reward (Ziegler et al. 2019). The result is the folder `model`."""
    model = load_trainable("reference", Transformer, args, run)
    critic = load_trainable("reward_model", ScalarModel, args, run)
    reward_model, reference = read_frozen("reward_model", ScalarModel, args, run), Reference(model, run, True)
    if reward_model.tokenizer.get_vocab() != model.tokenizer.get_vocab():
        raise SystemExit("The reward model reads the tokens of the policy, so it needs the same vocabulary")
    data, held_out = load_rankings(model, None, args, run) if args.dataset else (None, None)
    optimizer, critic_optimizer = adam(model, eps=1e-5), adam(critic, eps=1e-5)
    kl_coef, num_tokens = torch.tensor(args.kl_coef), torch.tensor(0)
    state = {"model": model, "critic": critic, "kl_coef": kl_coef, "num_tokens": num_tokens}
    run.start(**state, optimizer=optimizer, critic_optimizer=critic_optimizer)

    for _ in run.iterations(partial(evaluate, model, reference, reward_model, task, held_out, args, run)):
        factor, updates = schedule(run.step, args), []
        optimizer.param_groups[0]["lr"] = args.learning_rate * factor
        critic_optimizer.param_groups[0]["lr"] = args.value_learning_rate * factor

        # 1. Sample a completion of each prompt.
        with run.precision:
            rollout = collect_rollout(model, task, data, run.step, args)
        rollout_seconds = run.seconds

        # 2. Score it, compare it with the reference, and find out which tokens did better than expected.
        with run.precision, reference as frozen:
            batch, metrics = make_batch(rollout, frozen, reward_model, critic, kl_coef, args)
        metrics["kl_coef"] = kl_coef.item()
        score_seconds = run.seconds

        # 3. Learn, from the same minibatches in each epoch.
        for i in range(args.update_epochs * args.num_minibatches):
            rows = [*range(len(batch.sequences))][i % args.num_minibatches :: args.num_minibatches]
            number = args.sft_steps + (run.step - 1) * args.update_epochs * args.num_minibatches + i
            pretraining = demonstrations(model, task, data, number, args) if args.ptx_coef else []
            models = model, critic, optimizer, critic_optimizer
            with run.precision:  # for one step only: it caches casts of the weights, which change
                updates.append(take_step(*models, batch.select(rows), pretraining, args))
        kl_coef.copy_(adapted_kl_coef(kl_coef, metrics["objective/kl"], args))

        # 4. Log.
        seconds = run.seconds
        metrics |= {name: sum(x[name] for x in updates) / len(updates) for name in updates[0]}
        tokens = round(metrics["completions/mean_length"] * args.batch_size)
        num_tokens += tokens
        metrics |= {
            "learning_rate": args.learning_rate * factor,
            "num_tokens": num_tokens,
            "time/rollout": rollout_seconds,
            "time/score": score_seconds - rollout_seconds,
            "time/update": seconds - score_seconds,
            "perf/generated_tokens_per_second": tokens / rollout_seconds,
            "perf/tokens_per_second": tokens / seconds,
        }
        run.log(metrics)


def train(args: Args, run: Run) -> None:
    """RLHF (Ouyang et al. 2022, section 3.1), from the stage on at which the run is."""
    task = None if args.dataset else make_task(args)
    limit = args.max_completion_length or (task.max_completion_length if task else 256)
    args = dataclasses.replace(args, max_completion_length=limit)
    if run.step < args.first_step:
        where = f"{run.path} is at step {run.step:,}, in an earlier stage"
        raise SystemExit(f"{where}; resume it with --stage all")
    # Each stage begins with the seed, so that it is the same in a run of its own.
    if args.stage in ("all", "sft") and run.step < -args.reward_steps:
        torch.manual_seed(args.seed)
        train_sft(task, args, run)
    if args.stage in ("all", "reward-model") and run.step < 0:
        torch.manual_seed(args.seed)
        train_reward_model(task, args, run)
    if args.stage in ("all", "ppo") or args.evaluate:
        torch.manual_seed(args.seed)
        train_policy(task, args, run)


# ======================================================================================================
# Plumbing, the same in all scripts wherever it serves the same: limits of the flags, data, evaluation, model,
# sampler, tasks, runs, files, command line. Nothing below is about the algorithm.

EVALUATION_SEED = 1_000_000_000  # added to the seed: evaluations share no random numbers with the training

LIMITS = {  # the interval that flags have to lie in
    "[1, inf)": """max_steps checkpoint_interval eval_prompts hidden_size num_layers num_heads sft_batch_size
                   reward_steps reward_batch_size num_rankings batch_size update_epochs num_minibatches
                   micro_batch_size micro_batch_tokens max_length max_completion_length""",
    "[2, inf)": "ranking_size",
    "[0, inf)": "eval_interval export_interval sft_steps warmup_steps kl_coef kl_gain ptx_coef lora_rank",
    "(0, inf)": """learning_rate value_learning_rate sft_learning_rate reward_learning_rate max_grad_norm
                   temperature clip_coef kl_target checkpoint_minutes lora_alpha""",
    "(0, inf]": "value_clip_coef",
    "(-inf, inf)": "penalty_reward_value",
    "[0, 1]": "gamma gae_lambda",
    "[0, 0.5)": "label_noise",
    "[0, 4294967296)": "seed",
}


def check(args: Args) -> None:
    """Raises ValueError, with a sentence, for flags that cannot work."""
    check_limits(args)
    width, heads = args.hidden_size, 2 * args.num_heads
    if width % heads:
        raise ValueError(f"hidden_size = {width} must be a multiple of 2 x num_heads = {heads}")
    if args.batch_size % args.num_minibatches:
        sizes = f"num_minibatches = {args.num_minibatches} must divide batch_size = {args.batch_size}"
        raise ValueError(sizes)
    if args.export == "adapters" and not args.lora_rank:
        raise ValueError("without lora_rank there are no adapters to export")
    if args.dataset and args.reward:
        raise ValueError("a reward judges the completions of a task, and a dataset has none")


def check_limits(args: Args) -> None:
    """Raises ValueError for a flag outside of LIMITS; None lies in all of them."""
    for interval, names in LIMITS.items():
        low, high = map(float, interval[1:-1].split(", "))
        for name in names.split():
            value = getattr(args, name)
            on_bound = (interval[0] == "[" and value == low) or (interval[-1] == "]" and value == high)
            if value is not None and not (low < value < high or on_bound):  # NaN is in no interval
                raise ValueError(f"{name} must lie in {interval}, got {value}")
    if sum(x is not None for x in (args.resume, args.evaluate, args.run_name)) > 1:
        raise ValueError("resume, evaluate and run_name exclude each other")


# --------------------------------------------------------------------------------------------------- rankings


class Ranking(NamedTuple):
    """A row of a dataset: a prompt and completions of it, the best one first, in tokens."""

    held_out: bool
    prompt: list[int]
    completions: list[list[int]]  # each with the token that ends it
    true_rewards: list[float] | None

    @property
    def sequences(self) -> list[Sequence]:
        return [Sequence(self.prompt, completion) for completion in self.completions]

    @property
    def joined(self) -> Sequence:
        """As long as the prompt and all completions together."""
        return Sequence(self.prompt, sum(self.completions, array("i")))


class Data(NamedTuple):
    """The training part, or the held-out part, of a dataset."""

    rankings: list[Ranking]
    prompts: list[list[int]]  # those that leave room for a completion


@lru_cache(2)  # a step may need two: the pass that ends in it and the one that begins
def shuffled(seed: int, epoch: int, count: int) -> list[int]:
    """The order of the units in a pass over the data."""
    return random.Random(f"{seed} {epoch}").sample(range(count), count)


def drawn(count: int, batch: int, size: int, seed: int) -> list[int]:
    """The rows of batch 0, 1, ... of `count` rows; every pass over them has an order of its own."""
    positions = range(batch * size, (batch + 1) * size)
    return [shuffled(seed, position // count, count)[position % count] for position in positions]


def demonstrations(model: Transformer, task, data: Data | None, batch: int, args: Args) -> list[Sequence]:
    """Batch number `batch` of the demonstrations of the task, or of the best completions of the dataset."""
    size = args.sft_batch_size
    if data:
        rows = drawn(len(data.rankings), batch, size, args.seed)
        return [data.rankings[row].sequences[0] for row in rows]
    if not hasattr(task, "demonstration"):
        raise SystemExit(f"{args.task} has no demonstrations to learn from; --sft-steps 0 leaves them out")
    # Problems of negative numbers, which the stages after it do not reach.
    numbers = range(-(batch + 1) * size, -batch * size)
    problems = [draw(task, args.seed, i) for i in numbers]
    texts = [task.demonstration(x, random.Random(f"{args.seed} {i}")) for i, x in zip(numbers, problems)]
    completions = model.encode([text + model.tokenizer.eos_token for text in texts], special_tokens=False)
    return list(map(Sequence, encode_prompts(model, problems, 0), completions))


def draw_prompts(
    model: Transformer, task, data: Data | None, numbers: list[int] | range, args: Args, held_out: bool
) -> tuple[list[dict], list[list[int]]]:
    """Problems and their prompts in tokens, of the task or of the data."""
    if task:
        problems = [draw(task, args.seed, number, held_out) for number in numbers]
        return problems, encode_prompts(model, problems, args.max_completion_length)
    count = len(data.prompts)
    rows = numbers if held_out else [drawn(count, number, 1, args.seed)[0] for number in numbers]
    prompts = [data.prompts[row] for row in rows]
    return [{"prompt": model.tokenizer.decode(prompt)} for prompt in prompts], prompts


NEEDED_COMPLETIONS = {"all": 2, "reward-model": 2, "sft": 1, "ppo": 0}  # in a row, by stage


def parse_row(row: dict, model: Transformer, limit: int, args: Args) -> Ranking:
    """The completions that the stage needs, of `limit` tokens; ValueError if the row is of no use.

    Prompt and completion are both text, or both messages. Of these the last one is the completion, whichever
    column the others stand in. They are tokenized apart, so that no token spans both. A text gets the token
    that ends it; a conversation is closed by the chat template.
    """
    columns, prompt = [args.chosen_column, args.rejected_column], row.get(args.prompt_column)
    if isinstance(row.get(args.ranking_column), list):
        completions = row[args.ranking_column]
    else:
        columns = columns if any(column in row for column in columns) else [args.completion_column]
        completions = [row[column] for column in columns if row.get(column) is not None]
    if len(completions) < NEEDED_COMPLETIONS[args.stage]:
        pair = f"columns {args.chosen_column} and {args.rejected_column}, or a list {args.ranking_column}"
        single = f"a column {args.chosen_column} or {args.completion_column}"
        raise ValueError(f"without {single if args.stage == 'sft' else pair}")
    if args.stage == "ppo":
        completions = []  # the policy writes its own
    found = [split_conversation(prompt, completion) for completion in completions]
    prompt = found[0].prompt if found else prompt
    check_text(prompt, args.prompt_column)
    for other, completion in found:
        check_text(completion, "a completion")
        if type(prompt) is not type(completion):
            raise ValueError("whose prompt and completion are not both text or both messages")
        if other != prompt:
            raise ValueError("whose completions answer different prompts")
    held_out, is_text, end = row.get("held_out"), isinstance(prompt, str), model.tokenizer.eos_token_id
    if not isinstance(held_out, bool):
        # A matter of the prompt itself: a template may add today's date.
        held_out = is_held_out(prompt if is_text else json.dumps(prompt))
    texts = [prompt, *(completion for _, completion in found)]
    if not is_text:
        texts = [apply_template(model, prompt), *(render(model, messages).completion for messages in found)]
    elif end is None:
        raise ValueError("of text, while the tokenizer has no token that ends a text")
    if sum(map(len, texts)) > 100 * limit:
        raise ValueError("longer than the limit")  # to read it would take minutes
    (prompt,) = model.encode(texts[:1], special_tokens=is_text)
    completions = model.encode(texts[1:], special_tokens=False)
    # Arrays: a list of Python's integers takes nine times the memory.
    prompt, completions = array("i", prompt), [array("i", x + [end] * is_text) for x in completions]
    if not prompt or not all(completions):
        raise ValueError("without any token in the prompt or a completion")
    if len(prompt) + max(map(len, completions), default=0) > limit:
        raise ValueError("longer than the limit")
    if len({tuple(completion) for completion in completions}) < len(completions):
        raise ValueError("with two equal completions")
    return Ranking(held_out, prompt, completions, row.get("true_rewards"))


def split_conversation(prompt: str | list | None, completion: str | list) -> Sequence:
    """Prompt and completion. A conversation of several messages ends with the completion."""
    if isinstance(completion, list) and len(completion) > 1:
        follows = isinstance(prompt, list) and completion[: len(prompt)] != prompt
        return Sequence((prompt if follows else []) + completion[:-1], completion[-1:])
    return Sequence(prompt, completion)


def check_text(value: object, column: str) -> None:
    """Raises ValueError unless a value is a text or a list of messages, and not empty."""
    if isinstance(value, list):
        fields = [isinstance(x, dict) and x.get(name) for x in value for name in ("role", "content")]
        if not all(isinstance(field, str) for field in fields):
            raise ValueError("with a message that lacks a role or a content")
        value = fields[-1] if fields else ""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"without text in {column}")


def apply_template(model: Transformer, messages: list[dict], begin_answer: bool = True) -> str:
    """A conversation as text, and the beginning of an answer to it; ValueError if the template refuses."""
    template = partial(model.tokenizer.apply_chat_template, tokenize=False)
    try:
        return template(messages, add_generation_prompt=begin_answer)
    except Exception as error:  # of Jinja, in which templates are written
        raise ValueError(f"that the chat template refuses ({' '.join(str(error).split())[:100]})")


def render(model: Transformer, messages: Sequence) -> Sequence:
    """A conversation as text: the prompt up to where the answer begins, the answer with what closes it."""
    prompt = apply_template(model, messages.prompt)
    whole = apply_template(model, messages.prompt + messages.completion, begin_answer=False)
    if not whole.startswith(prompt):
        raise ValueError("whose prompt the chat template changes when an answer follows")
    return Sequence(prompt, whole[len(prompt) :])


def load_data(source: str | Path, model: Transformer, args: Args, run: Run) -> tuple[Data, Data]:
    """The training part and the held-out tenth of a dataset, or the whole of it and --eval-dataset."""
    context, parts = model.config["max_position_embeddings"], (Data([], []), Data([], []))
    limit = min(args.max_length or context, context)
    parse = partial(parse_row, model=model, limit=limit, args=args)
    for name, file in {"dataset": source, "eval_dataset": args.eval_dataset}.items():
        for row in parse_rows(name, file, parse, run):
            part = parts[name != "dataset" or (row.held_out and not args.eval_dataset)]
            if part is parts[0] or len(part.rankings) < args.eval_prompts:  # no more are evaluated
                part.rankings.append(row)
                if len(row.prompt) + args.max_completion_length <= context:
                    part.prompts.append([*row.prompt])
    if min(len(part.rankings) for part in parts) < rank_and_world()[1]:
        raise SystemExit(f"There are too few rows of use in {source}, or in --eval-dataset")
    if min(len(part.prompts) for part in parts) < rank_and_world()[1]:
        raise SystemExit("Too few prompts leave room for a completion; lower --max-completion-length")
    return parts


def sample_rankings(reference: Transformer, task, args: Args) -> list[dict]:
    """Rankings of completions sampled from the reference, in the form of the rows of a dataset.

    The true reward ranks them; then each neighbour, from the best on, is swapped with the next one with
    probability `label_noise`. Completions that were cut off are left out, and all but one of those with equal
    rewards. Held-out prompts are included and marked.
    """
    problems = [draw(task, args.seed, i) for i in range(args.num_rankings)]
    problems += [draw(task, args.seed, i, held_out=True) for i in range(args.eval_prompts)]
    generator, noise = torch.Generator().manual_seed(args.seed), random.Random(args.seed)
    K = args.ranking_size
    uniforms = torch.rand(len(problems), K, args.max_completion_length, generator=generator)
    prompts = encode_prompts(reference, problems, args.max_completion_length)
    completions = sample(reference, prompts, uniforms, args)
    texts = reference.decode(completions.tokens)
    rewards = score(task, [problem for problem in problems for _ in range(K)], texts)["reward"].tolist()
    rows = []
    for i, problem in enumerate(problems):
        mine = [row for row in range(i * K, i * K + K) if completions.finished[row]]
        different = list({rewards[row]: row for row in reversed(mine)}.values())
        ranking = sorted(different, key=lambda row: -rewards[row])
        for j in range(len(ranking) - 1):
            if noise.random() < args.label_noise:
                ranking[j], ranking[j + 1] = ranking[j + 1], ranking[j]
        if len(ranking) < 2:
            continue
        prompt, answers = problem["prompt"], [texts[row] for row in ranking]
        if reference.tokenizer.chat_template:
            prompt = [{"role": "user", "content": problem.get("question", prompt)}]
            answers = [[{"role": "assistant", "content": answer}] for answer in answers]
        columns = {args.chosen_column: answers[0], args.rejected_column: answers[-1]}
        row = {args.prompt_column: prompt} | (columns if K == 2 else {args.ranking_column: answers})
        row |= {"true_rewards": [rewards[row] for row in ranking]}
        rows.append(row | {"held_out": is_held_out(problem["prompt"])})
    if not rows:
        raise SystemExit(f"The model writes no two completions of {args.task} of which one is better")
    return rows


def load_rankings(model: Transformer, task, args: Args, run: Run) -> tuple[Data, Data]:
    """The training and the held-out part of the dataset, or of rankings of samples of the model."""
    source = args.dataset or run.path / "rankings.jsonl"
    if task and run.rank == 0 and not source.exists():
        rows = sample_rankings(model, task, args)
        write_file(source, "".join(json.dumps(row) + "\n" for row in rows))
    wait_for_ranks()  # until the file is there
    return load_data(source, model, args, run)


# ------------------------------------------------------------------------------------------------- evaluation


def count_right(
    rewards: Tensor, sizes: list[int], true_rewards: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """How many pairs the rewards (N,) order as the ranking does, or the true rewards; and of how many."""
    better, worse, _ = ordered_pairs(sizes).to(rewards.device)
    gaps = rewards[better] - rewards[worse]
    if true_rewards is not None:
        gaps = gaps * (true_rewards[better] - true_rewards[worse]).sign()
    return (gaps > 0).sum().to(rewards.dtype), rewards.new_tensor(len(gaps))


def evaluate_reward_model(model: ScalarModel, rankings: list[Ranking], args: Args) -> dict[str, float]:
    """Loss and accuracy on held-out rankings; where the true rewards are known, against them too."""
    mine = my_share(rankings)
    sizes = [len(ranking.completions) for ranking in mine]
    rewards = all_scores(model, [x for ranking in mine for x in ranking.sequences], args)
    totals = [ranking_loss(rewards, sizes).sum(), *count_right(rewards, sizes)]
    if rankings[0].true_rewards:
        true_rewards = [x for ranking in mine for x in ranking.true_rewards]
        totals += [count_right(rewards, sizes, rewards.new_tensor(true_rewards))[0]]
    loss, right, pairs, *truly_right = sum_over_ranks(torch.stack(totals)).tolist()
    metrics = {"eval_loss": loss / len(rankings), "eval_accuracy": right / pairs}
    if truly_right:
        metrics["true_accuracy"] = truly_right[0] / pairs
    return metrics


@torch.no_grad()
def evaluate(
    model: Transformer, reference: Reference, reward_model: ScalarModel, task, data: Data | None, args: Args,
    run: Run,
) -> tuple[dict[str, float], list[dict]]:  # fmt: skip
    """Metrics of completions of held-out prompts, and a few of them; the training's generator is not used."""
    count = args.eval_prompts if task else min(args.eval_prompts, len(data.prompts))
    generator = torch.Generator().manual_seed(args.seed + EVALUATION_SEED)
    uniforms = my_share(torch.rand(count, 1, args.max_completion_length, generator=generator))
    with run.precision:
        rollout = sample_completions(model, task, data, my_share(range(count)), uniforms, args, held_out=True)
        scores = final_scores(reward_model, rollout.sequences, rollout.finished, args)
        with reference as frozen:
            length = rollout.mask.shape[1]
            log_ratios = rollout.log_probs - log_probs_under(frozen, rollout.sequences, length, args)
    values = {
        "learned_reward": scores,
        "kl_to_reference": log_ratios.sum(1),  # of whole completions
        "mean_length": rollout.mask.sum(1),
        "clipped_ratio": 1 - rollout.finished.float(),
        "distinct": scores.new_full(scores.shape, len({*rollout.texts}) / len(scores)),  # share of texts
    }
    samples = [{"prompt": x["prompt"], "completion": y} for x, y in zip(rollout.problems[:8], rollout.texts)]
    samples = [row | {"learned_reward": x} for row, x in zip(samples, scores.tolist())]
    if task:
        values = {"true_reward": rollout.true_rewards} | values
        samples = [row | {"true_reward": x} for row, x in zip(samples, rollout.true_rewards.tolist())]
    totals = torch.stack([x.to(scores).sum() for x in values.values()])
    return dict(zip(values, (sum_over_ranks(totals) / count).tolist())), samples


# ------------------------------------------------------------------------------------------------------ model


def rotary_frequencies(config: dict) -> Tensor:
    """Angle per position (D / 2,) of each pair of dimensions (Su et al. 2021), with the scaling of Llama 3.

    Older files have rope_theta and rope_scaling, newer ones have both in rope_parameters.
    """
    rope = {"rope_theta": config.get("rope_theta", 10000.0)} | (config.get("rope_scaling") or {})
    rope |= config.get("rope_parameters") or {}
    size, kind = config["head_dim"], rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3") or rope.get("partial_rotary_factor", 1) != 1:
        raise ValueError(f"rotary positions of type {kind} are not supported, only full default and llama3")
    exponents = torch.arange(0, size, 2, dtype=torch.float32, device="cpu") / size
    frequencies = rope["rope_theta"] ** -exponents
    if kind == "llama3":  # pairs that turn slowly are slowed down by `factor`, fast ones are kept
        turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = frequencies * (keep + (1 - keep) / rope["factor"])
    return frequencies


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (i, i + D / 2) of x (B, T, heads, D) by their angles."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def attend_in_blocks(q: Tensor, keys: Tensor, values: Tensor, mask: BlockMask) -> Tensor:
    """`attend` on a GPU for packed rows: blocks of slots that see nothing of each other are left out."""
    attention = compile_once(flex_attention, dynamic=True) if q.is_cuda else flex_attention
    q, D = q.transpose(1, 2), q.shape[-1]
    if D < 16:  # the least that the kernel takes
        q, keys, values = (F.pad(x, (0, 16 - D)) for x in (q, keys, values))
    out = attention(q, keys, values, block_mask=mask, scale=D**-0.5, enable_gqa=True)
    return out[..., :D].transpose(1, 2)


def attend(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | BlockMask) -> Tensor:
    """Attention (B, T, heads, D) of queries q (B, T, heads, D) to keys and values (B, key heads, S, D).

    `mask` (B or 1, groups T, S) is added to the scores. Queries that share a key head (Ainslie et al. 2023)
    are rows of one matrix. On a CPU, plain products are faster than PyTorch's kernel for small models.
    """
    if isinstance(mask, BlockMask):
        return attend_in_blocks(q, keys, values, mask)
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
        queries, keys = config["num_attention_heads"] * D, config["num_key_value_heads"] * D
        qwen2, bias = config["model_type"] == "qwen2", config.get("attention_bias", False)
        self.head_dim = D
        self.input_layernorm = nn.RMSNorm(size, eps)
        self.self_attn = nn.ModuleDict({"q_proj": nn.Linear(size, queries, bias or qwen2)})
        self.self_attn.update({name: nn.Linear(size, keys, bias or qwen2) for name in ("k_proj", "v_proj")})
        self.self_attn["o_proj"] = nn.Linear(queries, size, bias and not qwen2)
        if config["model_type"] == "qwen3":
            self.self_attn.update({name: nn.RMSNorm(D, eps) for name in ("q_norm", "k_norm")})
        self.post_attention_layernorm = nn.RMSNorm(size, eps)
        inner, bias = config["intermediate_size"], config.get("mlp_bias", False)
        self.mlp = nn.ModuleDict({name: nn.Linear(size, inner, bias) for name in ("gate_proj", "up_proj")})
        self.mlp["down_proj"] = nn.Linear(inner, size, bias)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor, cache: Tensor | None, positions: Tensor
    ) -> Tensor:
        """x and result (B, T, size); `rotary` is cos and sin (B or 1, T, 1, D / 2), `mask` as in `attend`.

        Keys and values are written into the cache (2, B, key heads, S, D) at `positions` (B or 1, T).
        """
        attention, h = self.self_attn, self.input_layernorm(x)
        q, k, v = (attention[f"{name}_proj"](h).unflatten(-1, (-1, self.head_dim)) for name in "qkv")
        if "q_norm" in attention:
            # In float32, the type of their weights: PyTorch has one kernel for that, and many for a mixture.
            q, k = (attention[f"{name}_norm"](x.float()).type_as(x) for name, x in (("q", q), ("k", k)))
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


class Transformer(nn.Module):
    """A decoder of the families below, made from the content of a config.json."""

    def __init__(self, config: dict):
        super().__init__()
        heads, family = config["num_attention_heads"], config.get("model_type")
        left_out = {"head_dim": config["hidden_size"] // heads, "num_key_value_heads": heads}
        left_out |= {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "hidden_act": "silu"}
        self.config = left_out | {name: value for name, value in config.items() if value is not None}
        if family not in (known := ["llama", "mistral", "qwen2", "qwen3"]):
            raise ValueError(f"model_type {family} is not supported, only {', '.join(known)}")
        window = config.get("sliding_window") if family == "mistral" else config.get("use_sliding_window")
        if self.config["hidden_act"] != "silu" or window:
            raise ValueError("sliding windows and activations other than silu are not supported")
        size, vocabulary = config["hidden_size"], config["vocab_size"]
        self.model = nn.ModuleDict({"embed_tokens": nn.Embedding(vocabulary, size)})
        self.model["layers"] = nn.ModuleList(Layer(self.config) for _ in range(config["num_hidden_layers"]))
        self.model["norm"] = nn.RMSNorm(size, self.config["rms_norm_eps"])
        self.lm_head = nn.Linear(size, vocabulary, bias=False)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=config.get("initializer_range", 0.02))
        if self.config["tie_word_embeddings"]:
            self.lm_head.weight = self.model["embed_tokens"].weight
        self.register_buffer("frequencies", rotary_frequencies(self.config), persistent=False)
        self.tokenizer, self.eos_ids = None, set()  # the tokens that end a completion
        self.folder, self.file_type, self.generation_config = None, torch.float32, {}  # of what was read
        self.adapter_scale, self.adapters_on = 0.0, True  # see add_adapters
        self.gradient_checkpointing = False

    def hidden(
        self, tokens: Tensor, positions: Tensor | None = None, cache: Tensor | None = None,
        visible: Tensor | BlockMask | None = None,
    ) -> Tensor:  # fmt: skip
        """Input of the head (B, T, size) for tokens (B, T); padding at the end of a row changes nothing else.

        `positions` (B, T) are 0, 1, ... in each row by default. `visible` (B, T, S) says which tokens a token
        sees, by default all up to its position. The cache is that of `new_cache`.
        """
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        if visible is None:
            slots = tokens.shape[1] if cache is None else cache.shape[-2]
            visible = torch.arange(slots, device=tokens.device) <= positions[..., None]
        angles = positions[:, :, None, None] * self.frequencies  # (B or 1, T, 1, D / 2)
        rotary = angles.cos(), angles.sin()
        mask = visible
        if isinstance(visible, Tensor):  # one mask for all layers, repeated for the queries that share a key
            groups = self.config["num_attention_heads"] // self.config["num_key_value_heads"]
            mask = torch.zeros(visible.shape, dtype=self.dtype, device=tokens.device)
            mask = mask.masked_fill_(~visible, -math.inf).repeat(1, groups, 1)
        x = self.model["embed_tokens"](tokens).type_as(self.model["norm"].weight)
        for i, layer in enumerate(self.model["layers"]):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, rotary, mask, None, positions, use_reentrant=False)
            else:
                x = layer(x, rotary, mask, None if cache is None else cache[i], positions)
        return self.model["norm"](x)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, T, vocabulary) of the token after each of tokens (B, T)."""
        return self.lm_head(self.hidden(tokens)).float()

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of matrix products: bfloat16 under autocast, else that of the weights."""
        return torch.bfloat16 if torch.is_autocast_enabled(self.device.type) else self.lm_head.weight.dtype

    def new_cache(self, rows: int, slots: int) -> Tensor:
        """Room for the keys and values of all layers."""
        c = self.config
        shape = (c["num_hidden_layers"], 2, rows, c["num_key_value_heads"], slots, c["head_dim"])
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def encode(self, texts: list[str], special_tokens: bool = True) -> list[list[int]]:
        """Token ids of texts; with special tokens, if the tokenizer begins a text with any."""
        ids = self.tokenizer(texts, add_special_tokens=special_tokens)["input_ids"] if texts else []
        highest, size = max((max(row) for row in ids if row), default=0), self.config["vocab_size"]
        if highest >= size:
            raise SystemExit(f"The tokenizer has a token {highest}, but the model knows {size} tokens only")
        return ids

    def decode(self, tokens: list[list[int]]) -> list[str]:
        """Texts of token ids, without special tokens."""
        return self.tokenizer.batch_decode(tokens, skip_special_tokens=True)

    @classmethod
    def from_pretrained(cls, path: str | Path, device="cpu", dtype=torch.float32) -> Transformer:
        """The model of a Hugging Face folder, without its tokenizer; dtype None keeps the file's."""
        path, weights = Path(path), {}
        with explained(f"Cannot read a model from {path}"):
            config = json.loads((path / "config.json").read_text())
            with torch.device("meta"):  # initial weights would be made in vain
                model = cls(config)
            for file in sorted(path.glob("model*.safetensors")):
                for name, x in load_file(file).items():  # which leaves them on the disk until they are copied
                    weights[name], model.file_type = x.to(device, dtype, copy=True), x.dtype
            if not weights:
                raise ValueError("no model*.safetensors; other formats, as pytorch_model.bin, may hold code")
            weights = {name: x for name, x in weights.items() if not name.endswith("inv_freq")}
            if model.config["tie_word_embeddings"]:
                embedding = weights.get("model.embed_tokens.weight")
                head = weights.setdefault("lm_head.weight", embedding)
                # Some files have a head of their own all the same.
                model.config["tie_word_embeddings"] = head is embedding or torch.equal(head, embedding)
            model.load_state_dict(weights, assign=True)
            if model.config["tie_word_embeddings"]:
                model.lm_head.weight = model.model["embed_tokens"].weight
            # Chat models stop at several tokens, and the files name different ones of them.
            model.folder, file = path, path / "generation_config.json"
            if file.exists():
                model.generation_config = json.loads(file.read_text())
            for values in (config, model.generation_config):
                ids = values.get("eos_token_id")
                model.eos_ids |= {*(ids if isinstance(ids, list) else [ids])} - {None}
        return model.to(device)

    def save_pretrained(self, path: str | Path) -> None:
        """Writes a folder that `from_pretrained` reads, here and in transformers, with adapters merged."""
        path, weights = Path(path), {}
        path.mkdir(parents=True, exist_ok=True)
        for name, x in (*self.named_parameters(), *self.named_buffers()):
            layer = self.get_submodule(name.rpartition(".")[0])
            if name.endswith("weight") and hasattr(layer, "lora_A"):
                x = x + self.adapter_scale * layer.lora_B @ layer.lora_A
            if name.endswith(("weight", "bias")):
                weights[name] = x.detach().to("cpu", self.file_type).contiguous()
        config = {name: x for name, x in self.config.items() if name != "torch_dtype"}
        config |= {"dtype": str(self.file_type).removeprefix("torch.")}
        (path / "config.json").write_text(json.dumps(config, indent=2))
        generation_config = self.generation_config | {"eos_token_id": sorted(self.eos_ids)}
        (path / "generation_config.json").write_text(json.dumps(generation_config, indent=2))
        save_file(weights, path / "model.safetensors", {"format": "pt"})
        if self.tokenizer:
            self.tokenizer.save_pretrained(path)


def make_tokenizer(vocabulary: list[str]):
    """A tokenizer of transformers with a token for each string of a vocabulary, and <pad>, <bos>, <eos>."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast  # not above: it takes a second

    vocabulary = ["<pad>", "<bos>", "<eos>", *vocabulary]
    ids = {word: i for i, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<pad>"))
    longest_first = sorted(map(re.escape, vocabulary), key=len, reverse=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("|".join([*longest_first, r"[\s\S]"])), "isolated")
    tokenizer.decoder = decoders.Fuse()
    # Attention heads that find nothing look at a first token without meaning; without it little is learned.
    begin = [("<bos>", ids["<bos>"])]
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=begin)
    specials = {f"{name}_token": f"<{name}>" for name in ("pad", "bos", "eos")}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **specials)


def make_model(task, args: Args) -> Transformer:
    """A small Llama with random weights, and a tokenizer for the vocabulary of the task."""
    if not hasattr(task, "vocabulary") or not hasattr(task, "demonstration"):
        raise SystemExit(f"{args.task} has no vocabulary and demonstrations for a small model; give --model")
    tokenizer, size = make_tokenizer(task.vocabulary), args.hidden_size
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 1024}
    config |= {"vocab_size": len(tokenizer), "hidden_size": size}
    config |= {"intermediate_size": max(size * 8 // 3 // 16, 1) * 16}
    config |= {"num_hidden_layers": args.num_layers, "num_attention_heads": args.num_heads}
    config |= {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    model = Transformer(config)
    model.tokenizer, model.eos_ids = tokenizer, {tokenizer.eos_token_id}
    return model


def read_model(
    source: str | Path, device="cpu", dtype=torch.float32, kind: type | None = None
) -> Transformer:
    """The model of a folder, or of an id on the Hugging Face hub, with its tokenizer."""
    from transformers import AutoTokenizer  # not above: it takes a second

    with explained(f"Cannot read a model from {source}"):
        path = Path(source)
        if not path.is_dir():
            from huggingface_hub import snapshot_download

            patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
            path = Path(snapshot_download(str(source), allow_patterns=patterns))
        tokenizer = AutoTokenizer.from_pretrained(path)
    model = (kind or Transformer).from_pretrained(path, device, dtype)
    model.tokenizer, model.eos_ids = tokenizer, model.eos_ids | {tokenizer.eos_token_id} - {None}
    if unknown := model.eos_ids - {*range(model.config["vocab_size"])}:
        raise SystemExit(f"{source} names {unknown} as tokens that end a text, which the model does not know")
    return model


def fingerprint(model: Transformer) -> int:
    """A checksum of the chat template and of the first weights of each layer, whatever type they have."""
    weights = [(name, list(x.shape), x.flatten()[:1000].tolist()) for name, x in model.state_dict().items()]
    return zlib.crc32(json.dumps([model.tokenizer.chat_template, weights]).encode())


def load_model(task, args: Args, run: Run) -> Transformer:
    """The model of --model, that of the warm-up of a resumed run, or a small one that has yet to warm up."""
    if args.model or run.is_warm:
        source = args.model or run.path / "reference"
        model = read_model(source, run.device, None if args.lora_rank else torch.float32)
        if args.model:
            run.identify("model", args.model, fingerprint(model))
        add_adapters(model, args, run)
    else:
        model = make_model(task, args).to(run.device)
    model.gradient_checkpointing = args.gradient_checkpointing
    return model


# ------------------------------------------------------------------------------------------------------- LoRA


def freeze(model: Transformer, matrix_type: torch.dtype) -> Transformer:
    """Turns the weights into buffers, which no optimizer moves and no checkpoint holds.

    Matrices get the type in which they are multiplied, norms float32; embeddings keep theirs.
    """
    frozen, types = {}, {nn.Linear: matrix_type, nn.RMSNorm: torch.float32}
    for module in reversed([*model.modules()]):
        for name, weight in [*module.named_parameters(recurse=False)]:
            if weight not in frozen:  # a tied head, which is the last module, comes before its embedding
                frozen[weight] = weight.detach().to(types.get(type(module)))
            delattr(module, name)
            module.register_buffer(name, frozen[weight], persistent=False)
    return model


def add_adapters(model: Transformer, args: Args, run: Run) -> None:
    """With --lora-rank: freezes the model and lets W + alpha / rank B A act in place of each W.

    W are the linear layers but the head. A and B learn, and B begins at 0 (Hu et al. 2021, section 4.1).
    """
    if not args.lora_rank:
        return

    def add(layer: nn.Linear, x: tuple[Tensor], y: Tensor) -> Tensor:
        low_rank = F.linear(F.linear(x[0], layer.lora_A), layer.lora_B)
        return y + model.adapter_scale * low_rank if model.adapters_on else y

    freeze(model, run.matrix_type).adapter_scale = args.lora_alpha / args.lora_rank
    for layer in model.model["layers"].modules():
        if isinstance(layer, nn.Linear):
            new = partial(layer.weight.new_zeros, dtype=torch.float32)
            layer.lora_A = nn.Parameter(new((args.lora_rank, layer.in_features)))
            nn.init.kaiming_uniform_(layer.lora_A, math.sqrt(5))
            layer.lora_B = nn.Parameter(new((layer.out_features, args.lora_rank)))
            layer.register_forward_hook(add)


def save_adapters(model: Transformer, args: Args, path: Path) -> None:
    """Writes the adapters in a folder that PEFT reads."""
    weights = {f"base_model.model.{name}.weight": x.cpu() for name, x in model.state_dict().items()}
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": args.lora_rank}
    config |= {"lora_alpha": args.lora_alpha, "base_model_name_or_path": args.model or str(model.folder)}
    config["target_modules"] = sorted({name.split(".")[-3] for name in weights})
    model.tokenizer.save_pretrained(path)
    (path / "adapter_config.json").write_text(json.dumps(config, indent=2))
    save_file(weights, path / "adapter_model.safetensors", {"format": "pt"})


class Reference:
    """The model that the training began with, while `with reference as model` lasts.

    With LoRA it is the model without its adapters. Else a frozen copy is read.
    """

    def __init__(self, model: Transformer, run: Run, keep: bool = False):
        self.model, self.run, self.keep, self.copy, self.has_moved = model, run, keep, None, False

    def __enter__(self) -> Transformer:
        self.model.adapters_on = False
        if self.model.adapter_scale:
            return self.model
        if self.copy is None:
            copy = Transformer.from_pretrained(self.model.folder, self.run.device, None)
            self.copy = freeze(copy, self.run.matrix_type)
            copy.tokenizer, copy.eos_ids = self.model.tokenizer, self.model.eos_ids
        return self.copy

    def __exit__(self, *_) -> None:
        self.model.adapters_on = True
        self.copy = self.copy if self.keep else None


# ---------------------------------------------------------------------------------------------- scalar models


class ScalarHead(nn.Linear):
    """A type of its own, so that `freeze` leaves the weights in float32."""


class ScalarModel(Transformer):
    """A transformer with one number for each token in place of logits: a reward model, or a value model.

    Its folder is that of a model for sequence classification in transformers, which ignores the bias of the
    head: a constant, which no comparison of rewards depends on.
    """

    lm_head = property(lambda self: self.score)

    def __init__(self, config: dict):
        super().__init__(config | {"tie_word_embeddings": False})
        del self._modules["lm_head"]
        self.score = ScalarHead(config["hidden_size"], 1)
        names = [name.partition("For")[0] for name in config.get("architectures") or ["Llama"]]
        self.config["architectures"] = [f"{name}ForSequenceClassification" for name in names]
        self.config |= {"id2label": {"0": "score"}, "label2id": {"score": 0}}

    def values(self, hidden: Tensor) -> Tensor:
        """Values (N,) of hidden states (N, size), in float32 even under autocast."""
        return (hidden.float() * self.score.weight[0]).sum(-1) + self.score.bias

    def load_state_dict(self, state: dict, *args, **options):
        """Takes the weights of a language model too, with a new head in place of its own."""
        state = {name: x for name, x in state.items() if not name.startswith("lm_head.")}
        size = self.config["hidden_size"]  # deviation of the new head: Huang et al. 2024
        if "score.weight" not in state:
            state["score.weight"] = torch.randn(1, size) / math.sqrt(size + 1)
        state.setdefault("score.bias", torch.zeros(1))
        return super().load_state_dict(state, *args, **options)


def read_stage(name: str, kind: type, dtype: torch.dtype | None, args: Args, run: Run) -> Transformer:
    """The model that a stage of this run has made, or the one that was given in its place."""
    folder, given = run.path / name, {"reference": args.model, "reward_model": args.reward_model}[name]
    source = folder if folder.is_dir() else given
    if source is None:
        raise SystemExit(f"{run.path} has no {name}; run the stage that makes it, or give a folder")
    model = read_model(source, run.device, dtype, kind)
    if source == given and (kind is ScalarModel) == (name == "reward_model"):
        run.identify("model" if name == "reference" else name, given, fingerprint(model))
    model.gradient_checkpointing = args.gradient_checkpointing
    return model


def read_frozen(name: str, kind: type, args: Args, run: Run) -> Transformer:
    """The model of a stage, for no gradient."""
    return freeze(read_stage(name, kind, None, args, run), run.matrix_type)


def load_trainable(name: str, kind: type, args: Args, run: Run) -> Transformer:
    """The model of a stage, to train all of it, or adapters and the scalar head."""
    model = read_stage(name, kind, None if args.lora_rank else torch.float32, args, run)
    add_adapters(model, args, run)
    if args.lora_rank and kind is ScalarModel:
        for part in ("weight", "bias"):
            x = getattr(model.score, part).float()
            delattr(model.score, part)
            setattr(model.score, part, nn.Parameter(x))
    return model


# ------------------------------------------------------------------------------ log-probabilities and sampler


def round_up(x: int, step: int = 8) -> int:
    """Rounds up to a multiple of `step`: oneDNN, which multiplies on a CPU, keeps a kernel for each shape."""
    return -(-x // step) * step


class Sequence(NamedTuple):
    """A prompt and its completion, in tokens; before that as text, or as messages."""

    prompt: list[int]
    completion: list[int]  # with the token that ends it


class Packed(NamedTuple):
    """Sequences side by side in R rows of W slots."""

    tokens: Tensor  # (R, W)
    positions: Tensor  # (R, W), of each token in its own sequence
    visible: Tensor | BlockMask  # (R, W, W), whether a token sees another
    targets: Tensor  # (N,), the tokens of all completions, padded with zeros
    predictors: Tensor  # (N,), slots in R W of the tokens before them


def block_mask(segments: Tensor, prompt_segments: Tensor) -> BlockMask:
    """Which slots see which in rows with these segments (R, W), for flex_attention."""

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        other = segments[row, key]
        return (query >= key) & ((other == segments[row, query]) | (other == prompt_segments[row, query]))

    (R, W), device = segments.shape, segments.device
    return create_block_mask(sees, R, None, W, W, device)


PACKED_WIDTH = 128  # minimum row width: narrower rows waste slots, wider ones waste attention


def pack(sequences: list[Sequence], device: torch.device) -> Packed:
    """Puts as many sequences into a row as fit, in their order, which leaves little padding.

    Consecutive completions of one prompt follow a single copy of it: each sees the prompt and itself, at the
    positions that it would have alone.
    """
    W = max(len(prompt) + len(completion) for prompt, completion in sequences)
    W = max(round_up(W, 128 if device.type == "cuda" else 8), PACKED_WIDTH)  # flex_attention: blocks of 128
    tokens, positions, segments, prompt_segments = columns = [], [], [], []
    targets, predictors = [], []

    def append(part: list[int], position: int, segment: int, prompt_segment: int) -> None:
        tokens.extend(part)
        positions.extend(range(position, position + len(part)))
        segments.extend([segment] * len(part))
        prompt_segments.extend([prompt_segment] * len(part))

    start, row_end, last = 0, 0, None  # of the last prompt: its first slot, the end of its row, its tokens
    for prompt, completion in sequences:
        needed = len(completion) + (0 if prompt == last else len(prompt))
        if len(tokens) + needed > row_end:
            append([0] * (row_end - len(tokens)), 0, -1, -1)
            row_end, last = row_end + W, None
        if prompt != last:
            start, last = len(tokens), prompt
            append(prompt, 0, start, start)  # a segment is named after its first slot
        first = len(tokens)
        append(completion, len(prompt), first, start)
        targets += completion
        predictors += [start + len(prompt) - 1, *range(first, first + len(completion) - 1)]
    # Pad rows and targets to sizes that recur, see `round_up`.
    append([0] * (round_up(row_end, 2 * W if W == PACKED_WIDTH else W) - len(tokens)), 0, -1, -1)
    spare = [0] * (round_up(len(targets), 64) - len(targets))
    targets, predictors = torch.tensor((targets + spare, predictors + spare), device=device)
    tokens, positions, segments, prompt_segments = torch.tensor(columns, device=device).view(4, -1, W)
    if device.type == "cuda" and any(map(shutil.which, ("cc", "gcc", "clang"))):  # it has to be compiled
        return Packed(tokens, positions, block_mask(segments, prompt_segments), targets, predictors)
    keys, queries = segments[:, None], segments[..., None]
    visible = ((keys == queries) | (keys == prompt_segments[..., None])).tril()
    return Packed(tokens, positions, visible, targets, predictors)


HEAD_ELEMENTS = 2**25  # logits computed at a time: 128 MB in float32
SPAN = 64  # tokens of each row between two looks of the host at what a GPU has sampled
compile_once = lru_cache(torch.compile)  # the same compiled function for the same arguments


def completion_log_probs(model: Transformer, sequences: list[Sequence], temperature: float = 1.0) -> Tensor:
    """Log-probabilities (B, C) of the tokens of completions after their prompts; 0 past the end of one.

    Only slots that predict such a token get logits, some at a time: for a large vocabulary the logits would
    need more memory than everything else.
    """
    packed = pack(sequences, model.device)
    hidden = model.hidden(packed.tokens, packed.positions, visible=packed.visible)
    hidden = hidden.flatten(0, 1)[packed.predictors]  # (N, size)

    def log_probs(hidden: Tensor, targets: Tensor) -> Tensor:
        # Autocast would cast the head once for all parts, and so add up their gradients in bfloat16.
        logits = F.linear(hidden.to(model.dtype), model.lm_head.weight.to(model.dtype))
        return -F.cross_entropy(logits.float() / temperature, targets, reduction="none")

    memory = torch.cuda.get_device_properties(hidden.device).total_memory if hidden.is_cuda else 0
    # On a GPU a twentieth of the memory, at 16 bytes each, since each part adds a gradient of the whole head.
    size = max(max(memory // 320, HEAD_ELEMENTS) // model.lm_head.out_features, 1)
    parts = list(zip(hidden.split(size), packed.targets.split(size)))
    if len(parts) == 1:
        flat = log_probs(*parts[0])
    else:
        flat = torch.cat([checkpoint(log_probs, *part, use_reentrant=False) for part in parts])
    lengths = torch.tensor([len(completion) for _, completion in sequences])
    mask = (torch.arange(max(lengths)) < lengths[:, None]).to(model.device)
    return flat.new_zeros(mask.shape).masked_scatter(mask, flat)  # ignores the padding at the end of `flat`


def split(sequences: list[Sequence], args: Args, unit: int = 1) -> list[list[int]]:
    """The rows of each micro-batch, within both limits; `unit` rows, at least, stay together."""
    parts, room = [], 0
    for row in range(0, len(sequences), unit):
        tokens = sum(len(part) for sequence in sequences[row : row + unit] for part in sequence)
        if tokens > room or len(parts[-1]) + unit > args.micro_batch_size:
            parts, room = [*parts, []], args.micro_batch_tokens
        parts[-1] += range(row, row + unit)
        room -= tokens
    return parts


def sequence_log_probs(model: Transformer, sequences: list[Sequence]) -> Tensor:
    """Log-probabilities (B,) of whole completions after their prompts."""
    return completion_log_probs(model, sequences).sum(1)


@torch.no_grad()
def log_probs_under(model: Transformer, sequences: list[Sequence], length: int, args: Args) -> Tensor:
    """Log-probabilities (B, length) of the tokens of completions, in micro-batches; 0 past the end of one."""
    out = torch.zeros(len(sequences), length, device=model.device)
    for rows in split(sequences, args):
        log_probs = completion_log_probs(model, [sequences[i] for i in rows], args.temperature)
        out[rows, : log_probs.shape[1]] = log_probs
    return out


def completion_values(model: ScalarModel, sequences: list[Sequence]) -> Tensor:
    """Values (B, C) of the states in which the tokens of completions were chosen; 0 past the end of one."""
    packed = pack(sequences, model.device)
    hidden = model.hidden(packed.tokens, packed.positions, visible=packed.visible)
    flat = model.values(hidden.flatten(0, 1)[packed.predictors])
    lengths = torch.tensor([len(completion) for _, completion in sequences])
    mask = (torch.arange(max(lengths)) < lengths[:, None]).to(model.device)
    return flat.new_zeros(mask.shape).masked_scatter(mask, flat)  # ignores the padding at the end of `flat`


def sequence_scores(model: ScalarModel, sequences: list[Sequence]) -> Tensor:
    """Scores (B,) of whole completions, read at their last token."""
    # One more token, whatever it is: its state is that in which all of the completion has been seen.
    longer = [Sequence(prompt, [*completion, 0]) for prompt, completion in sequences]
    ends = torch.tensor([len(completion) for _, completion in sequences], device=model.device)
    return completion_values(model, longer).gather(1, ends[:, None])[:, 0]


@torch.no_grad()
def all_scores(model: ScalarModel, sequences: list[Sequence], args: Args) -> Tensor:
    """Scores (B,) of this process, in micro-batches."""
    parts = [[sequences[row] for row in part] for part in split(sequences, args)]
    return torch.cat([sequence_scores(model, part) for part in parts])


@torch.no_grad()
def all_values(model: ScalarModel, sequences: list[Sequence], length: int, args: Args) -> Tensor:
    """Values (B, length) of the states of completions, in micro-batches; 0 past the end of one."""
    out = torch.zeros(len(sequences), length, device=model.device)
    for rows in split(sequences, args):
        values = completion_values(model, [sequences[i] for i in rows])
        out[rows, : values.shape[1]] = values
    return out


class Completions(NamedTuple):
    """G completions of each of P prompts, of at most C tokens; row i belongs to prompt i // G."""

    tokens: list[list[int]]  # each with the token that ends it, if any
    log_probs: Tensor  # (P G, C), under the distribution that was sampled from; 0 past the end
    finished: Tensor  # (P G,), False for completions that were cut off


def pick(weights: Tensor, uniforms: Tensor, block: int = 128) -> Tensor:
    """Indices (B, 1) in whose interval of the cumulative weights (B, V) the uniforms (B, 1) lie."""
    # Away from 0 and 1, where rounding could pick a token of almost no probability.
    uniforms, V = uniforms * (1 - 2e-6) + 1e-6, weights.shape[1]
    if V <= 32 * block:
        cumulative = weights.cumsum(-1)
        return torch.searchsorted(cumulative, uniforms * cumulative[:, -1:], right=True)
    # A block first and then a token in it: a long running sum is slow, and rounds more.
    blocks = (F.pad(weights, (0, -V % block)) if V % block else weights).unflatten(1, (-1, block))
    ends = blocks.sum(-1).cumsum(-1)
    threshold = uniforms * ends[:, -1:]
    chosen = torch.searchsorted(ends, threshold, right=True)
    inside = blocks.gather(1, chosen[..., None].expand(-1, -1, block))[:, 0]
    share = 1 - (ends.gather(1, chosen) - threshold) / inside.sum(-1, keepdim=True)
    return (chosen * block + pick(inside, share.clamp(0, 1))).clamp(max=V - 1)


def repeat_in_graph(step: Callable[[], None], times: int) -> torch.cuda.CUDAGraph:
    """Calls step() on a GPU: once, and then as a CUDA graph, which launches its thousand kernels at once.

    step() changes tensors in place and never waits. The result has to be kept until the GPU has finished.
    """
    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # records; nothing runs yet
        step()
    for _ in range(times - 1):
        graph.replay()
    return graph


@torch.no_grad()
def generate(
    model: Transformer, prompts: list[list[int]], uniforms: Tensor, temperature: float = 1.0
) -> Completions:
    """Samples from softmax(logits / temperature); top-k or top-p would bias the ratio in a loss.

    Each token takes one of the `uniforms` (P, G, C), numbers in [0, 1), and is the one in whose interval of
    the cumulative distribution this lies. So a row depends on its own numbers only. Temperature 0 is greedy.
    """
    (P, G, C), device = uniforms.shape, uniforms.device
    uniforms, eos = uniforms.flatten(0, 1), torch.tensor(sorted(model.eos_ids), device=device)
    starts, width = torch.tensor([len(p) for p in prompts], device=device), max(map(len, prompts))

    # Each prompt is read once; its completions continue from copies of its keys and values.
    cache = model.new_cache(P, width)
    padded = torch.tensor([prompt + [0] * (width - len(prompt)) for prompt in prompts], device=device)
    hidden = model.hidden(padded, torch.arange(width, device=device)[None], cache)
    logits = model.lm_head(hidden[torch.arange(P, device=device), starts - 1]).repeat_interleave(G, 0)
    cache = F.pad(cache, (0, 0, 0, round_up(width + C) - width)).repeat_interleave(G, 2)
    starts = starts.repeat_interleave(G)

    tokens = torch.zeros(P * G, C, dtype=torch.long, device=device)
    log_probs = torch.zeros(P * G, C, device=device)
    column = torch.zeros(1, dtype=torch.long, device=device)
    rows = torch.arange(P * G, device=device)  # those in the batch; some of them may have finished
    alive = torch.ones(P * G, dtype=torch.bool, device=device)  # of these rows

    def choose(logits: Tensor) -> None:
        distribution = (logits.float() / (temperature or 1.0)).log_softmax(-1)
        numbers = uniforms[rows, column][:, None]
        chosen = pick(distribution.exp(), numbers) if temperature else distribution.argmax(-1, keepdim=True)
        tokens[rows, column], log_probs[rows, column] = chosen[:, 0], distribution.gather(1, chosen)[:, 0]

    def step() -> None:
        hidden = model.hidden(tokens[rows, column][:, None], (starts + column)[:, None], slots_in_use)
        column.add_(1)
        choose(model.lm_head(hidden[:, 0]))

    choose(logits)
    span = SPAN if device.type == "cuda" else 1
    for t in range(1, C, span):  # every row has t tokens
        alive &= ~torch.isin(tokens[rows, max(t - span, 0) : t], eos).any(1)
        count = int(alive.sum())  # the one wait of the span
        if count == 0:
            break
        keep = round_up(count, 64)
        if keep < 0.75 * len(rows):  # then copying the cache of the others costs less than carrying all
            going_on = alive.int().argsort(descending=True, stable=True)[:keep]
            rows, starts, alive = rows[going_on], starts[going_on], alive[going_on]
            cache = cache[:, :, going_on]
        slots_in_use = cache if span == 1 else cache[..., : round_up(width + t + span, 64), :]
        graph = step() if span == 1 else repeat_in_graph(step, min(span, C - t))  # noqa: F841, see there
    ends = torch.isin(tokens, eos)
    finished = ends.any(1)
    lengths = torch.where(finished, ends.int().argmax(1) + 1, C)
    log_probs *= torch.arange(C, device=device) < lengths[:, None]
    token_lists = [row[:length] for row, length in zip(tokens.tolist(), lengths.tolist())]
    return Completions(token_lists, log_probs, finished)


def sample(
    model: Transformer, prompts: list[list[int]], uniforms: Tensor, args: Args, temperature: float = 1.0
) -> Completions:
    """Samples completions for `uniforms` (P, G, C), on their device, in parts whose cache has a limit.

    No activations are kept, so a part may have 4 times the rows and 8 times the tokens of a micro-batch.
    """
    (_, G, C), parts = uniforms.shape, []
    rows = min(4 * args.micro_batch_size, 8 * args.micro_batch_tokens // (max(map(len, prompts)) + C))
    size = max(rows // G, 1)
    for i in range(0, len(prompts), size):
        numbers = uniforms[i : i + size].to(model.device)
        parts.append(generate(model, prompts[i : i + size], numbers, temperature))
    tokens, log_probs, finished = zip(*parts)
    log_probs, finished = (torch.cat(x).to(uniforms.device) for x in (log_probs, finished))
    return Completions(sum(tokens, []), log_probs, finished)


# --------------------------------------------------------------------------------------------- tasks, rewards


def import_by_name(name: str) -> object:
    """The object module:name, of a module in this folder or on Python's path."""
    module, _, attribute = name.partition(":")
    sys.path.append(os.getcwd())
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ModuleNotFoundError, AttributeError, ValueError) as error:
        raise SystemExit(f"Cannot find {name}: {error}")


def make_task(args: Args):
    """The task of --task, with the rewards of --reward: module:function[=weight], or NAME=weight."""
    if ":" not in args.task and args.task.lower() not in TASKS:
        raise SystemExit(f"There is no task {args.task}, only {', '.join(TASKS)} and your own: module:Class")
    task = import_by_name(args.task)() if ":" in args.task else TASKS[args.task.lower()]()
    for member in ("problem", "rewards", "max_completion_length"):
        if not hasattr(task, member):
            raise SystemExit(f"{args.task} is not a task: it has no {member}")
    task.rewards = dict(task.rewards)
    for words in args.reward:
        place, _, weight = words.partition("=")
        name = place.rpartition(":")[2]
        if ":" not in place and name not in task.rewards:
            raise SystemExit(
                f"--reward {words}: there is no {name} in {[*task.rewards]}; yours is module:{name}"
            )
        function = import_by_name(place) if ":" in place else task.rewards[name][0]
        with explained(f"--reward {words}: what follows = is the weight"):
            task.rewards[name] = function, float(weight or 1)
    return task


def is_held_out(prompt: str) -> bool:
    """Whether a prompt belongs to the tenth that is never trained on, in the warm-up neither.

    By checksum: a linear rule such as (a + b) % 10 == 0 would hold out problems of one kind.
    """
    return zlib.crc32(prompt.encode()) % 10 == 0


def draw(task, seed: int, index: int, held_out: bool = False) -> dict:
    """Problem `index`, a function of seed and index, so that a position in the data is one number.

    Held-out problems do not depend on the seed. A task may have a `draw` of its own.
    """
    if hasattr(task, "draw"):
        return task.draw(seed, index, held_out)
    rng = random.Random(f"held out {index}" if held_out else f"train {seed} {index}")
    for _ in range(10_000):
        problem = task.problem(rng)
        if is_held_out(problem["prompt"]) == held_out:
            return problem
    raise SystemExit(f"The task has too few different prompts to hold out a tenth of them: {problem}")


def call_reward(name: str, function: Callable, problems: list[dict], completions: list[str]) -> Tensor:
    """One reward (rows,) of completions, each of the problem in the same row."""
    # TRL's signature: a reward function takes the columns that it needs, and the others as **columns.
    names = {name for problem in problems for name in problem} - {"prompts", "completions"}
    columns = {name: [problem.get(name) for problem in problems] for name in names}
    values = function(prompts=columns.pop("prompt"), completions=completions, **columns)
    with explained(f"The reward {name} must give one finite number for each completion"):
        rewards = torch.tensor(values, dtype=torch.float32)
        if rewards.shape != (len(completions),) or not rewards.isfinite().all():
            raise ValueError(f"got {str(values)[:100]}")
    return rewards


def score(task, problems: list[dict], completions: list[str]) -> dict[str, Tensor]:
    """Each reward (rows,) of completions by its name, and their weighted sum as `reward`."""
    parts = {name: call_reward(name, x, problems, completions) for name, (x, _) in task.rewards.items()}
    return parts | {"reward": sum(weight * parts[name] for name, (_, weight) in task.rewards.items())}


def encode_prompts(model: Transformer, problems: list[dict], new_tokens: int) -> list[list[int]]:
    """Token ids of each prompt; with a chat template, those of its messages, or of the question in its place.

    A prompt that leaves no room for `new_tokens` ends the program.
    """
    texts, chat = [problem["prompt"] for problem in problems], bool(model.tokenizer.chat_template)
    if chat:
        asked = [{"role": "user", "content": x.get("question", x["prompt"])} for x in problems]
        with explained("A prompt is unfit"):
            texts = [apply_template(model, x.get("messages", [y])) for x, y in zip(problems, asked)]
    prompts, context = model.encode(texts, special_tokens=not chat), model.config["max_position_embeddings"]
    for problem, prompt in zip(problems, prompts):
        if not 0 < len(prompt) <= context - new_tokens:
            sizes = f"A prompt of {len(prompt)} tokens plus {new_tokens} exceeds the context of {context}"
            raise SystemExit(f"{sizes}: {problem['prompt'][:50]!r}; lower --max-completion-length or drop it")
    return prompts


# --------------------------------------------------------------------------------------------------- learning


def discounted_sum(x: Tensor, decay: Tensor) -> Tensor:
    """y with y[t] = x[t] + decay[t] y[t + 1] along the first dimension, and y = 0 past the end.

    It computes the same as this loop over T rows,

        y = x.clone()
        for t in reversed(range(len(x) - 1)):
            y[t] += decay[t] * y[t + 1]

    in ceil(log2 T) passes over whole tensors, by doubling (Hillis and Steele 1986): before pass k = 0, 1, ...
    x[t] holds the terms t to t + 2^k - 1 of y[t].
    """
    shift = 1
    while shift < len(x):
        x = torch.cat((x[:-shift] + decay[:-shift] * x[shift:], x[-shift:]))
        decay = torch.cat((decay[:-shift] * decay[shift:], decay[-shift:]))
        shift *= 2
    return x


def adam(model: Transformer, **settings) -> torch.optim.AdamW:
    """The optimizer of all stages."""
    settings = {"betas": (0.9, 0.95), "weight_decay": 0.0, "fused": True} | settings
    return torch.optim.AdamW(model.parameters(), **settings)


def schedule(step: int, args: Args) -> float:
    """Factor of the learning rate: rises over warmup_steps, then falls linearly to 0.05."""
    if args.anneal_lr and step > args.warmup_steps:
        return 1 - 0.95 * (step - args.warmup_steps) / max(args.max_steps - args.warmup_steps, 1)
    return min(step / max(args.warmup_steps, 1), 1)


def optimizer_step(model: Transformer, optimizer: torch.optim.Optimizer, max_grad_norm: float) -> float:
    """Sums the gradients over processes, limits their norm and moves the weights; returns the norm."""
    parameters = list(model.parameters())
    for parameter in parameters:
        sum_over_ranks(parameter.grad)
    norm = nn.utils.clip_grad_norm_(parameters, max_grad_norm).item()
    if math.isfinite(norm):  # otherwise the log ends the run, with weights that are still good
        optimizer.step()
    optimizer.zero_grad()
    return norm


# -------------------------------------------------------------------------------------------------- processes


def rank_and_world() -> tuple[int, int]:
    """The number of this process and how many there are, under torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def my_share(rows):
    """Every n-th row of a list or tensor, for this one of n processes."""
    rank, world = rank_and_world()
    return rows[rank::world]


def sum_over_ranks(x: Tensor) -> Tensor:
    """Sums a tensor over processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def wait_for_ranks() -> None:
    if dist.is_initialized():
        dist.barrier()


# ------------------------------------------------------------------------------------------------------- runs


class Run:
    """One run: its directory, curves and checkpoints; progress, interruption and resuming.

    `train` names everything that has state once, in `start`, and then loops over `iterations`. Steps of the
    warm-up count up to 0. Under torchrun every process has a Run, and the first one writes.
    """

    def __init__(self, args: Args, device: torch.device):
        self.args, self.device, self.state = args, device, {}
        self.rank = rank_and_world()[0]
        path = [None if self.rank else make_directory(args)]
        if dist.is_initialized():
            dist.broadcast_object_list(path)
        self.path = path[0]
        is_bf16 = args.bf16 and has_bfloat16(device)
        self.precision = torch.autocast(device.type, torch.bfloat16, is_bf16)
        self.matrix_type = torch.bfloat16 if is_bf16 else torch.float32
        # A copy, since `train` may change args. Where a run is found does not belong to it.
        self.arguments = dataclasses.asdict(args) | {"resume": None, "evaluate": None, "run_name": None}
        self.first_step = args.first_step
        self.step = self.last_step = self.first_step  # of the optimizer, now and before this iteration
        self.elapsed = 0.0  # seconds of training
        self.started = self.saved_at = self.shown_at = time.perf_counter()
        self.progress = self.writer = self.wandb = None
        self.interrupted, self.handlers, self.checkpoint, self.metrics = False, {}, {}, {}
        if args.evaluate or any(self.path.glob("checkpoint*.pt")):
            self.checkpoint = load_checkpoint(args.evaluate or self.path)
            saved, self.step = self.checkpoint["args"], self.checkpoint["step"]
            check_changes(saved, args)
            self.elapsed = self.checkpoint["elapsed"]
            if args.max_steps < min(saved["max_steps"], self.step + 1):
                raise SystemExit(f"{self.path} is at step {self.step:,} already; raise --max-steps")
        self.is_warm = bool(self.checkpoint) and self.step >= 0  # it is past the warm-up
        self.fingerprints = self.checkpoint.get("fingerprints", {})
        self.samples = self.checkpoint.get("samples", {})  # of each evaluation, by its step, as JSON
        if args.evaluate:
            return
        if self.rank == 0:
            write_file(self.path / "args.json", json.dumps(self.arguments, indent=2))
        say(f"Run directory: {self.path}")
        with contextlib.suppress(ValueError):  # outside of the main thread, Python refuses handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self.handlers[number] = signal.signal(number, self.interrupt)

    def interrupt(self, number: int, frame) -> None:
        """Handles Ctrl-C and SIGTERM."""
        # torchrun sends a Ctrl-C to processes that got it already: there it does not mean "at once".
        if self.interrupted and number == signal.SIGINT and not dist.is_initialized():
            raise KeyboardInterrupt
        self.interrupted = True
        # os.write, because print fails if the signal arrives during another print.
        os.write(2, b"\nThe run ends after this iteration and a checkpoint; Ctrl-C again ends it at once\n")

    def identify(self, name: str, source: object, fingerprint: int) -> None:
        """Ends the run if its model or dataset is not the one that it began with, wherever that lies now."""
        is_same = self.fingerprints.setdefault(name, fingerprint) == fingerprint
        if not is_same and not (self.args.evaluate and name == "eval_dataset"):
            raise SystemExit(f"{self.path} began with another {name} than {source}")

    @property
    def advice(self) -> str:
        modules = f" --task {self.args.task}" if ":" in self.args.task else ""
        modules += "".join(f" --reward {reward}" for reward in self.args.reward)
        return f"resume with: python {Path(__file__).name} --resume {self.path}{modules}"

    @property
    def seconds(self) -> float:
        """Seconds since this iteration began."""
        return time.perf_counter() - self.started

    def start(self, **state) -> None:
        """Takes everything that has state by name: tensors, and objects with state_dict and load_state_dict.

        Restores the last checkpoint if there is one, and opens the logs. A run of several stages calls it for
        each, and without any state at the end of one: such a checkpoint has nothing to restore.
        """
        self.state = state
        if "model" in self.checkpoint:
            torch.set_rng_state(self.checkpoint["generator"])
            for name, x in state.items():
                if name not in self.checkpoint:
                    raise SystemExit(f"The checkpoint of {self.path} has no {name}; was the script changed?")
                restore = x.copy_ if isinstance(x, Tensor) else x.load_state_dict
                restore(self.checkpoint.pop(name))
            say(f"Resumed at step {self.step:,}")
        elif self.args.resume and self.step == self.first_step:
            say(f"{self.path} has no checkpoint yet, so the run begins anew")
        self.checkpoint = {}
        if self.rank or self.args.evaluate or self.writer:
            return
        from torch.utils.tensorboard import SummaryWriter  # not above: it takes a second

        if self.args.track:
            import wandb

            place = {"project": self.args.wandb_project_name, "entity": self.args.wandb_entity}
            place |= {"id": self.path.name, "resume": "allow", "dir": str(self.path.parent)}
            self.wandb = wandb.init(**place, config=self.arguments)
        # Points after the checkpoint are purged; they will be logged again.
        self.writer = SummaryWriter(str(self.path), purge_step=self.step + 1)

    def iterations(
        self, evaluation: Callable | None = None, begin: int = 0, end: int | None = None
    ) -> Iterator[float]:
        """Yields the fraction of the steps from `begin` to `end` that is done; evaluates and saves if due.

        `evaluation` returns metrics and samples. Without it, as in the warm-up, checkpoints are due by the
        clock only, and not after the last step: it is saved together with what follows the steps.
        """
        args, end = self.args, self.args.max_steps if end is None else end
        self.evaluation = evaluation
        if args.evaluate and self.step < 0:
            raise SystemExit(f"{self.path} is still in its warm-up; there is nothing to evaluate")
        if evaluation and (args.evaluate or self.step == 0):
            self.elapsed += self.seconds  # of what was prepared
            if args.eval_interval or args.evaluate:
                self.evaluate()
            self.save()
        if args.evaluate:
            return
        # disable=None: shown on a terminal only
        progress = {"total": end - begin, "initial": self.step - begin, "unit": " steps"}
        self.progress = tqdm(**progress, disable=True if self.rank else None)
        while self.step < end:
            if sum_over_ranks(torch.tensor(float(self.interrupted), device=self.device)) > 0:
                self.save()
                raise SystemExit(f"Interrupted at step {self.step:,}; {self.advice}")
            self.last_step, self.started = self.step, time.perf_counter()
            self.step += 1
            yield (self.last_step - begin) / (end - begin)
            self.elapsed += self.seconds
            last = self.step == end
            if evaluation and args.eval_interval and (last or self.due(args.eval_interval)):
                self.evaluate()
            due = evaluation and (last or self.due(args.checkpoint_interval))
            minutes = (time.perf_counter() - self.saved_at) / 60
            if due or not last and minutes > args.checkpoint_minutes:
                self.save()
            if evaluation and not last and args.export_interval and self.due(args.export_interval):
                self.export()
            self.progress.update()
        self.progress.close()
        self.started = time.perf_counter()
        if evaluation:
            self.export()

    def due(self, interval: int) -> bool:
        """Whether this iteration passed a multiple of `interval` steps."""
        return self.step // interval > self.last_step // interval

    def log(self, metrics: dict[str, float | Tensor]) -> None:
        """Adds one point to each curve, of time too, and shows progress."""
        self.write(metrics | {"time/elapsed": self.elapsed + self.seconds})
        names = "reward", "loss", "sft/loss", "reward_model/loss"
        name = next(name for name in names if name in metrics)
        line = f"{name} {float(metrics[name]):.3f}"
        self.progress.set_postfix_str(line, refresh=False)
        last, now = self.step == self.args.max_steps, time.perf_counter()
        if self.progress.disable and (last or now - self.shown_at > 10):
            self.shown_at = now
            say(f"step {self.step:>5,}: {line}, {1 / self.seconds:.1f} steps/s")

    def write(self, metrics: dict[str, float | Tensor]) -> None:
        """Adds one point to each curve; ends the run if one is not finite."""
        metrics = {name: float(x) for name, x in metrics.items()}
        for name, value in metrics.items():
            if not math.isfinite(value):
                flags = {"sft": "--sft-learning-rate", "reward_model": "--reward-learning-rate"}
                flag = flags.get(name.partition("/")[0], "--learning-rate")
                where = f"{name} is {value} at step {self.step:,}; lower {flag}"
                raise SystemExit(f"{where}. {self.path} keeps the last checkpoint")
        if self.rank:
            return
        with explained(f"Cannot write the curves in {self.path}; is the disk full?"):
            for name, value in metrics.items():
                self.writer.add_scalar(name, value, self.step)
        if self.wandb:  # which knows no steps below 0
            self.wandb.log(metrics | {"global_step": self.step}, step=self.step - self.first_step)

    def evaluate(self) -> None:
        """Metrics of the policy, logged and printed, and samples of what it writes."""
        metrics, samples = self.evaluation()
        self.metrics = metrics
        values = ", ".join(f"{name} {x:.3f}" for name, x in metrics.items() if "/" not in name)
        say(f"step {self.step:>5,}: evaluation {values}")
        if metrics["kl_to_reference"] > 0.5 * metrics["mean_length"]:
            say("Warning: the policy is over half a nat per token away from its reference; weigh the KL more")
        if metrics["clipped_ratio"] > 0.5:
            say("Warning: most completions are cut off; raise --max-completion-length")
        if self.args.evaluate:
            return say(", ".join(f"{name} {x:.3f}" for name, x in metrics.items() if "/" in name))
        self.write({f"eval/{name}": x for name, x in metrics.items()})
        if self.rank:
            return
        self.samples[self.step] = lines = [json.dumps({"step": self.step, **sample}) for sample in samples]
        text = "".join(line + "\n" for lines in self.samples.values() for line in lines)
        write_file(self.path / "samples.jsonl", text)
        self.writer.add_text("samples", "\n\n".join(f"`{line}`" for line in lines), self.step)
        if self.wandb:
            import wandb

            table = wandb.Table(list(samples[0]), [list(row.values()) for row in samples])
            self.wandb.log({"samples": table}, step=self.step - self.first_step)

    def save(self) -> None:
        """Saves everything that has state under its name."""
        if self.rank or self.args.evaluate:
            return
        state = {"args": self.arguments, "step": self.step, "elapsed": self.elapsed}
        state |= {"fingerprints": self.fingerprints, "samples": self.samples}
        state |= {"generator": torch.get_rng_state()}  # the only one: problems are functions of their number
        state |= {key: x if isinstance(x, Tensor) else x.state_dict() for key, x in self.state.items()}
        with explained(f"Cannot write the curves in {self.path}; is the disk full?"):
            self.writer.flush()
        (self.path / "checkpoint.previous.pt").unlink(missing_ok=True)  # there are never more than two
        save_checkpoint(self.path / "checkpoint.pt", state)
        self.saved_at = time.perf_counter()

    def export(self) -> None:
        """Writes the model, or its adapters, with a model card."""
        args, model = self.args, self.state["model"]
        changed = {name: x for name, x in self.arguments.items() if x != getattr(Args(), name)}
        notes = {"script": Path(__file__).name, "arguments": changed, "evaluation": self.metrics}
        notes |= {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
        card = f"---\nlibrary_name: transformers\n---\n\n# {self.path.name}, step {self.step:,}\n\n"
        card += f"```json\n{json.dumps(notes, indent=2)}\n```\n"

        def write(path: Path) -> None:
            save_adapters(model, args, path) if args.export == "adapters" else model.save_pretrained(path)
            (path / "README.md").write_text(card)

        export(write, self.path / "model")

    def close(self) -> None:
        """Closes the logs, and gives the signals back."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        for x in (self.progress, self.writer):
            with contextlib.suppress(OSError):  # a full disk was explained before
                if x is not None:
                    x.close()
        if self.wandb:
            self.wandb.finish()


def say(line: str) -> None:
    """Prints a line in the first process, above the progress bar if there is one."""
    if rank_and_world()[0] == 0:
        with tqdm.external_write_mode():
            print(line, flush=True)


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Turns an exception into one sentence."""
    try:
        yield
    except Exception as error:
        raise SystemExit(f"{what}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")


def has_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 itself; emulated, it would be slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16"))


# ------------------------------------------------------------------------------------------------------ files

FORMAT = 2  # of a checkpoint


def read_rows(source: str) -> Iterator[bytes | dict]:
    """The rows of a dataset: a Parquet file, a JSON array, an id on the hub; of JSONL they are lines."""
    path = Path(source)
    if path.is_file() and path.suffix not in (".json", ".jsonl", ".parquet"):
        raise SystemExit(f"{source} is none of .jsonl, .json and .parquet")
    with explained(f"Cannot read the dataset {source}"):
        if path.suffix == ".parquet":
            import pyarrow.parquet

            for batch in pyarrow.parquet.ParquetFile(path).iter_batches(100):
                yield from batch.to_pylist()
        elif path.suffix == ".json" and path.read_bytes().lstrip().startswith(b"["):
            yield from json.loads(path.read_bytes())
        elif path.suffix in (".json", ".jsonl"):
            with path.open("rb") as file:
                yield from (line for line in file if line.strip())
        else:
            import datasets

            name, configuration, split = [*source.split(":"), "", ""][:3]
            yield from datasets.load_dataset(name, configuration or None, split=split or "train")


def parse_rows(name: str, source: str | Path | None, parse: Callable[[dict], object], run: Run) -> Iterator:
    """Yields parse(row) for the rows of a dataset; those for which it raises ValueError are dropped and told.

    The run ends if they are more than half, or if the rows are not those that it began with.
    """
    dropped, columns, count, checksum = defaultdict(list), {}, 0, 0
    for count, row in enumerate(read_rows(str(source)) if source else (), 1):
        try:
            row = json.loads(row) if isinstance(row, bytes) else row
            if not isinstance(row, dict):
                raise ValueError("that are no JSON objects")
            columns |= dict.fromkeys(row)
            checksum = zlib.crc32(json.dumps(row, ensure_ascii=False, default=str).encode(), checksum)
            parsed = parse(row)
        except (ValueError, RecursionError) as error:  # JSON and Unicode have errors of their own
            reason = str(error) if type(error) is ValueError else "that are no JSON in UTF-8"
            dropped[reason].append(count)
        else:
            yield parsed
    if dropped:
        items = sorted(dropped.items(), key=lambda item: -len(item[1]))[:9]
        reasons = [f"{len(rows):,} {reason} (row {str(rows[:3])[1:-1]})" for reason, rows in items]
        line = f"Dropped of the {count:,} rows of {source}: {'; '.join(reasons)}"
        if sum(map(len, dropped.values())) > count / 2:
            found = ", ".join(columns) or "unknown"
            raise SystemExit(f"{line}. That is more than half; the columns are {found}")
        say(line)
    run.identify(name, source, checksum)


def make_directory(args: Args) -> Path:
    """The directory of the run: the one that args name, or a new one with the time in its name."""
    if args.evaluate:
        return Path(args.evaluate) if Path(args.evaluate).is_dir() else Path(args.evaluate).parent
    named = args.resume or (args.run_name and Path(args.runs, args.run_name))
    task = Path(args.dataset).stem if args.dataset else args.task.rpartition(":")[2].lower()
    name = f"{task.replace(':', '-')}__{args.exp_name}__{args.seed}"
    while True:
        path = Path(named or Path(args.runs, f"{name}__{time.strftime('%Y%m%d-%H%M%S')}"))
        try:
            path.mkdir(parents=True, exist_ok=bool(named))
            return path
        except OSError as error:
            if named or not isinstance(error, FileExistsError):
                raise SystemExit(f"Cannot make the run directory {path}: {error}")
            time.sleep(0.1)  # another run began in the same second


def export(write: Callable[[Path], None], path: Path) -> None:
    """Lets the first process write a folder, whole or not at all, and the others wait for it."""
    if rank_and_world()[0] == 0:
        temporary = path.with_name(f"{path.name}.tmp")
        with explained(f"Cannot write {path}; is the disk full?"):  # the libraries have errors of their own
            shutil.rmtree(temporary, ignore_errors=True)
            write(temporary)
            shutil.rmtree(path, ignore_errors=True)
            os.replace(temporary, path)
    wait_for_ranks()


def write_file(path: Path, content: str | dict) -> None:
    """Writes a text, or a state with torch.save, so that a crash leaves the old file or the new one."""
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode()) if isinstance(content, str) else torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        if path.name == "checkpoint.pt" and path.exists():
            os.replace(path, path.with_name("checkpoint.previous.pt"))
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch calls a full disk a RuntimeError
        temporary.unlink(missing_ok=True)
        raise SystemExit(f"Cannot write {path}, what was there is untouched; is the disk full? ({error})")


def save_checkpoint(path: Path, state: dict) -> None:
    write_file(path, {"script": Path(__file__).stem, "format": FORMAT, **state})


def load_checkpoint(run: str | Path) -> dict:
    """The checkpoint of a run directory, or a checkpoint file; if it is damaged, the one before it.

    The checksums are verified, and no code that hides in the file runs.
    """
    path = Path(run, "checkpoint.pt") if Path(run).is_dir() else Path(run)
    previous, script = path.with_name("checkpoint.previous.pt"), Path(__file__).stem
    try:
        if damaged := zipfile.ZipFile(path).testzip():  # torch.load does not verify checksums
            raise ValueError(f"the checksum of {damaged} is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = f"{path} is damaged, or no checkpoint: {' '.join(str(error).split())[:200]}"
        reason = reason if path.exists() else f"There is no checkpoint {path}"
        if path.name != "checkpoint.pt" or not previous.exists():
            raise SystemExit(reason)
        say(f"{reason}. The one before it takes its place: {previous}")
        state = load_checkpoint(previous)
        with contextlib.suppress(OSError):  # a folder that cannot be written, in an evaluation
            os.replace(previous, path)
        return state
    if not isinstance(state, dict) or state.get("script") != script:
        raise SystemExit(f"{path} is not a checkpoint of {script}.py")
    if state.get("format") != FORMAT:
        raise SystemExit(
            f"{path} has format {state.get('format')}; this version of {script}.py reads {FORMAT}"
        )
    return state


def read_args(run: str | Path) -> Args:
    """The arguments of a run directory or a checkpoint file; names a field that does not fit."""
    path = Path(run, "args.json") if Path(run).is_dir() else Path(run)
    with explained(f"Cannot read {path}"):
        values = json.loads(path.read_text()) if path.suffix == ".json" else load_checkpoint(path)["args"]
        hints = get_type_hints(Args)
        if unfit := values.keys() ^ hints.keys():
            raise ValueError(f"missing or unknown: {', '.join(sorted(unfit))}")
        for name, value in values.items():
            with explained(f"{path} has {name} = {value!r}"):
                typeguard.check_type(value, hints[name])
                if isinstance(value, bool) and hints[name] is not bool:  # an int for typeguard
                    raise TypeError(f"a bool is not {hints[name]}")
        return Args(**values)


# ----------------------------------------------------------------------------------------------- command line

# Flags that may change on resume or evaluation; any other would make it a different run. A model or dataset
# may lie in another place: what is there is compared with the fingerprint in the checkpoint.
MAY_CHANGE = """resume evaluate run_name runs stage max_steps device checkpoint_minutes export
                export_interval track wandb_project_name wandb_entity""".split()
MAY_MOVE = "model", "reward_model", "dataset", "eval_dataset"
MAY_CHANGE_IN_EVALUATION = [*MAY_CHANGE, "seed", "eval_dataset", "eval_prompts"]


def refuse_changes(saved: dict, arguments: dict, may_change: list[str]) -> None:
    """Ends the program if arguments differ from saved ones in a flag that may not change."""
    for name, value in saved.items():
        if arguments.get(name) != value and name not in may_change:
            change = f"{name} from {value} to {arguments.get(name)}"
            raise SystemExit(f"A run cannot change {change}, only {', '.join(may_change)}")


def check_changes(saved: dict, args: Args) -> None:
    """Ends the program if args differ from saved ones in a flag that may not change."""
    new = dataclasses.asdict(args)
    new |= {name: saved[name] for name in MAY_MOVE if new[name] and saved[name]}
    refuse_changes(saved, new, MAY_CHANGE_IN_EVALUATION if args.evaluate else MAY_CHANGE)


def parse_args(arguments: list[str] | None = None) -> Args:
    """The command line, on top of the arguments of the run that it names, if it names one."""
    args = tyro.cli(Args, args=arguments)
    named = args.run_name and Path(args.runs, args.run_name)
    run = args.resume or args.evaluate or (named if named and (named / "args.json").exists() else None)
    if not run:
        return args
    beside = Path(run).with_name("args.json")  # of a checkpoint file, which is then loaded only once
    saved = read_args(beside if Path(run).is_file() and beside.exists() else run)
    # The name of a module in a file is not trusted: only the command line can have it imported.
    default = dataclasses.replace(saved, task=saved.task.rpartition(":")[2], reward=[])
    args = tyro.cli(Args, args=arguments, default=default)
    unconfirmed = [f"--task {saved.task}"] if saved.task != args.task == default.task else []
    unconfirmed += [] if args.reward else [f"--reward {reward}" for reward in saved.reward]
    if unconfirmed:
        raise SystemExit(f"The run imports modules of yours; confirm them with {' '.join(unconfirmed)}")
    check_changes(dataclasses.asdict(saved), args)
    return args


def prepare(args: Args) -> torch.device:
    """Settles threads, processes and the device before the first tensor; returns the device."""
    if not args.model:
        torch.set_num_threads(1)  # for a small model a second thread costs more than it gives
    cuda = torch.cuda.is_available() and args.device != "cpu"
    if args.device == "cuda" and not cuda:
        raise SystemExit("PyTorch finds no cuda device here; use --device auto")
    if args.dataset and not args.model:
        raise SystemExit("A dataset needs a model that has learned to read: give --model too")
    if args.eval_dataset and not args.dataset:
        raise SystemExit("eval_dataset belongs to a dataset: give --dataset too")
    continues = args.resume or args.evaluate or args.run_name  # then the models may lie in the run
    if args.reward_model and args.stage not in ("reward-model", "ppo") and not continues:
        raise SystemExit("a reward_model needs --stage ppo, which it serves, or reward-model, to train it on")
    if args.stage == "ppo" and not continues and not (args.model and args.reward_model):
        raise SystemExit("stage ppo needs the models of the others: --model and --reward-model, or --resume")
    if args.stage == "reward-model" and not continues and not args.model:
        raise SystemExit("stage reward-model needs a model that writes: --model, or --resume after stage sft")
    if not args.sft_steps and not args.model and not continues:
        raise SystemExit("a small model is made by sft_steps, so they cannot be 0 without --model")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():  # started by torchrun
        if cuda:
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if cuda else "gloo")
    _, world = rank_and_world()
    if args.batch_size % world:
        raise SystemExit(f"batch_size = {args.batch_size} must be a multiple of {world} processes")
    if args.batch_size // world % args.num_minibatches:
        sizes = f"each of {world} processes has {args.batch_size // world} of batch_size = {args.batch_size}"
        raise SystemExit(
            f"{sizes} completions, and num_minibatches = {args.num_minibatches} must divide them"
        )
    if min(args.eval_prompts, args.sft_batch_size, args.reward_batch_size) < world:
        sizes = "eval_prompts, sft_batch_size and reward_batch_size"
        raise SystemExit(f"{sizes} must be at least {world}, one per process")
    return device


def main(args: Args) -> Path:
    """Trains, resumes or evaluates a run; returns its path."""
    device = prepare(args)
    if not args.dataset:
        make_task(args)  # refuses before there is a run directory
    torch.manual_seed(args.seed)
    run = Run(args, device)
    try:
        train(args, run)
    except KeyboardInterrupt:
        raise SystemExit(f"\nEnded at once; {run.advice}")
    except Exception:
        say(f"An error ended the run at step {run.step:,}; once it is fixed, {run.advice}")
        raise
    finally:
        run.close()
        if dist.is_initialized():
            dist.destroy_process_group()
    return run.path


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # for paths with letters that the terminal lacks
    try:
        main(parse_args())
    except BrokenPipeError:  # the reader of the output has ended, as in `| head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python would fail once more when it closes the output
        raise SystemExit("Nobody reads the output any more, so the program ends; checkpoints are kept")
