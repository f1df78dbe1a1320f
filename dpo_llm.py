"""Direct Preference Optimization (DPO) of a language model, and its relatives, from pairs of completions.

Of two completions of a prompt x, y_w was preferred to y_l. DPO trains the policy pi to tell which one, by how
much more likely pi makes each completion than a frozen reference pi_ref does:

    minimise  E[ -log sigmoid( beta log(pi(y_w|x) / pi_ref(y_w|x)) - beta log(pi(y_l|x) / pi_ref(y_l|x)) ) ]

(Rafailov et al. 2023, equation 7). It needs no reward model, and samples nothing while it learns. --loss
selects a relative of DPO instead: IPO (Azar et al. 2023), SimPO (Meng et al. 2024), ORPO (Hong et al. 2024),
KTO (Ethayarajh et al. 2024), or the likelihood of the chosen completion alone (sft).

    python dpo_llm.py --loss ipo --beta 2
    python dpo_llm.py --resume runs/reviews__dpo_llm__1__20261120-101500
    torchrun --nproc-per-node 2 dpo_llm.py --model Qwen/Qwen2.5-0.5B-Instruct --dataset pairs.jsonl \
        --learning-rate 5e-7

By default the script makes a transformer of 0.4M parameters, teaches it to write reviews, samples pairs of
reviews from it and prefers the more favourable one, with a tenth of the labels wrong. So the true reward of
what the policy writes is known: it rises from 0.43 to 0.85 +- 0.02, mean and standard deviation of 5 seeds
(benchmark/results/llm-dpo), within two minutes on a CPU. With --model and --dataset it trains a Hugging Face
model (Llama, Qwen2 or Qwen3) on your preferences. Watch `eval/true_reward` and `eval/kl_to_reference`;
`rewards/accuracies` rises even if the policy writes worse.

Beyond the paper, the loss of DPO has 0.1 times the negative log-likelihood of the chosen completion (Pang et
al. 2024): without it the policy ends twice as far from the reference, with no higher reward. AdamW replaces
RMSprop.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
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
    # Task or dataset
    task: str = "Reviews"  # generated prompts and their reward; module:Class imports a task of your own
    reward: Repeatable = field(default_factory=list)  # module:function[=weight] joins the rewards of the task
    dataset: str | None = None  # JSONL or Parquet file, or id[:configuration[:split]] on the Hugging Face hub
    eval_dataset: str | None = None  # held-out rows of its own; None holds out a tenth of the dataset
    prompt_column: str = "prompt"  # column of the dataset with the prompt, as text or as messages
    chosen_column: str = "chosen"  # column with the preferred completion, or the conversation that it ends
    rejected_column: str = "rejected"  # column with the other completion
    completion_column: str = "completion"  # column with the completion if rows have labels (--loss kto)
    label_column: str = "label"  # column that says whether that completion is desirable
    max_length: int | None = None  # tokens of prompt and completion; longer rows are dropped; None: context
    num_pairs: int = 16384  # prompts for which two completions are sampled from the reference to make a pair
    label_noise: float = 0.1  # probability that the worse completion of a pair is labelled as chosen

    # Model
    model: str | None = None  # folder or hub id of a Llama, Mistral or Qwen; None makes a small one
    hidden_size: int = 128  # width of the residual stream; a multiple of 2 x num_heads
    num_layers: int = 2  # transformer layers
    num_heads: int = 4  # attention heads
    sft_steps: int = 300  # warm-up of that small model: steps of supervised fine-tuning on demonstrations
    sft_batch_size: int = 64  # demonstrations per warm-up step
    sft_learning_rate: float = 2e-3  # highest learning rate of AdamW in the warm-up
    lora_rank: int = 0  # train adapters of this rank beside the linear layers (LoRA); 0 trains all weights
    lora_alpha: float = 32.0  # the adapters are multiplied by lora_alpha / lora_rank
    bf16: bool = True  # multiply matrices in bfloat16 if the hardware can; what learns stays in float32
    gradient_checkpointing: bool = False  # recompute activations in the backward pass to save memory

    # Algorithm
    loss: Literal["dpo", "ipo", "simpo", "orpo", "kto", "sft"] = "dpo"  # simpo, orpo and sft use no reference
    beta: float = 0.3  # weight of the implied KL penalty; smaller values let the policy go further
    label_smoothing: float = 0.0  # assumed probability of a wrong label (cDPO); --loss dpo only
    simpo_gamma: float = 0.5  # target margin; --loss simpo only
    orpo_lambda: float = 1.0  # weight of the odds ratio beside the likelihood; --loss orpo only
    desirable_weight: float = 1.0  # weight of desirable completions; --loss kto only
    undesirable_weight: float = 1.0  # weight of undesirable completions; --loss kto only
    sft_coef: float | None = None  # weight of the chosen completion's likelihood; None: 0.1 for dpo, else 0
    max_steps: int = 225  # optimizer steps, one batch each
    batch_size: int = 64  # pairs per step, over all processes; with --loss kto twice as many completions
    micro_batch_size: int = 128  # completions per forward and backward pass; changes memory and speed only
    micro_batch_tokens: int = 8192  # tokens per forward and backward pass, so that memory has a limit
    learning_rate: float = 5e-4  # highest learning rate of AdamW; 5e-7 to 5e-6 for pretrained models
    warmup_steps: int = 10  # steps over which the learning rate rises to its highest value
    anneal_lr: bool = True  # afterwards lower it linearly to 5 percent at max_steps
    max_grad_norm: float = 1.0  # scale larger gradients down to this norm

    # Evaluation
    eval_interval: int = 45  # steps between evaluations on held-out prompts; 0 for none
    eval_prompts: int = 512  # held-out prompts of an evaluation, one sampled completion each
    max_completion_length: int | None = None  # tokens of a sampled completion; None: the task's, or 256

    # Run
    seed: int = 1  # seed of the model, the sampled pairs and the order of the data
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto is a GPU if there is one
    checkpoint_interval: int = 50  # optimizer steps between checkpoints
    checkpoint_minutes: float = 10  # minutes after which a checkpoint is saved, too
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
        self.has_reference = self.loss in ("dpo", "ipo", "kto")
        self.rows_per_unit = 1 if self.loss == "kto" else 2  # what is drawn together: a completion, or a pair
        default_weight = 0.1 if self.loss == "dpo" else 0.0
        self.likelihood_weight = default_weight if self.sft_coef is None else self.sft_coef

    @property
    def first_step(self) -> int:
        """The steps of the warm-up count up to 0."""
        return 0 if self.model else -self.sft_steps


# -------------------------------------------------------------------------------------------------- equations


def preference_loss(
    policy_chosen: Tensor, policy_rejected: Tensor, reference_chosen: Tensor | None,
    reference_rejected: Tensor | None, chosen_lengths: Tensor, rejected_lengths: Tensor, *,
    loss: str, beta: float, label_smoothing: float = 0.0, simpo_gamma: float = 0.5, orpo_lambda: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Losses (B,) of pairs, and the rewards (B,) that the policy implies for chosen and rejected, detached.

    All inputs (B,): log-probabilities of whole completions, and their lengths in tokens. Below, rho is
    log pi - log pi_ref of a completion, h = beta (rho(chosen) - rho(rejected)), and log p = log pi per token.

    dpo: -log sigmoid(h) (Rafailov et al. 2023, equation 7); with label smoothing e,
        -(1 - e) log sigmoid(h) - e log sigmoid(-h) (Mitchell 2023, cDPO)
    ipo: (rho(chosen) - rho(rejected) - 1 / (2 beta))^2 with rho per token, as the authors came to advise, not
        the sums of Azar et al. (2023, equation 17)
    simpo: -log sigmoid(beta (log p(chosen) - log p(rejected)) - gamma) (Meng et al. 2024, equation 6)
    orpo: -log p(chosen) - lambda log sigmoid(log odds p(chosen) - log odds p(rejected)) (Hong et al. 2024,
        equations 6 and 7)
    sft: -log p(chosen)
    """
    chosen, rejected = policy_chosen / chosen_lengths, policy_rejected / rejected_lengths  # per token
    if loss in ("dpo", "ipo"):
        chosen, rejected = policy_chosen - reference_chosen, policy_rejected - reference_rejected
    margin = beta * (chosen - rejected)
    if loss == "dpo":
        losses = -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
    elif loss == "ipo":
        losses = (chosen / chosen_lengths - rejected / rejected_lengths - 1 / (2 * beta)).square()
    elif loss == "simpo":
        losses = -F.logsigmoid(margin - simpo_gamma)
    elif loss == "orpo":
        losses = -chosen - orpo_lambda * F.logsigmoid(log_odds(chosen) - log_odds(rejected))
    else:
        losses = -chosen
    return losses, beta * chosen.detach(), beta * rejected.detach()


def log_odds(log_p: Tensor) -> Tensor:
    """log(p / (1 - p)) of log p; expm1 keeps 1 - p exact for p near 1, the clamp keeps it above 0."""
    return log_p - torch.log(-torch.expm1(log_p.clamp(max=-1e-6)))


def kto_loss(
    policy: Tensor, reference: Tensor, labels: Tensor, kl: Tensor | float, *,
    beta: float, desirable_weight: float = 1.0, undesirable_weight: float = 1.0,
) -> Tensor:  # fmt: skip
    """Losses (B,) of single completions, desirable or not (Ethayarajh et al. 2024, equation 8).

    w (1 - sigmoid(beta (rho - kl))) if desirable, w (1 - sigmoid(beta (kl - rho))) if not, where rho is
    log pi - log pi_ref. The KL has no gradient, and an estimate of it below 0 counts as 0.
    """
    kl = torch.as_tensor(kl).detach().clamp(min=0)
    gain = beta * (policy - reference - kl)
    desirable = desirable_weight * (1 - gain.sigmoid())
    undesirable = undesirable_weight * (1 - (-gain).sigmoid())
    return torch.where(labels, desirable, undesirable)


def judge(
    log_probs: Tensor, data: Data, kl: Tensor | float, args: Args, paired: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses of the rows of `data`, or of its pairs, and metrics as (sum, count).

    `log_probs` (N,) are those of the whole completions. All losses but that of KTO need paired rows.
    """
    reference, lengths = data.reference, torch.tensor([len(x.completion) for x in data.sequences])
    lengths = lengths.to(log_probs.device)
    if args.loss == "kto":
        weights = {"desirable_weight": args.desirable_weight, "undesirable_weight": args.undesirable_weight}
        losses = kto_loss(log_probs, reference, data.labels, kl, beta=args.beta, **weights)
        rewards = args.beta * (log_probs - reference).detach()
    else:
        losses, chosen, rejected = preference_loss(
            log_probs[0::2], log_probs[1::2], reference[0::2], reference[1::2], lengths[0::2], lengths[1::2],
            loss=args.loss, beta=args.beta, label_smoothing=args.label_smoothing,
            simpo_gamma=args.simpo_gamma, orpo_lambda=args.orpo_lambda,
        )  # fmt: skip
        losses = losses - args.likelihood_weight * log_probs[0::2] / lengths[0::2]
        rewards = torch.stack((chosen, rejected), 1).flatten()
    values = {"loss": losses.detach()}
    for name, selected in (("chosen", data.labels), ("rejected", ~data.labels)):
        values[f"rewards/{name}"] = rewards[selected]
        values[f"logps/{name}"] = log_probs.detach()[selected]
    if paired:
        values["rewards/accuracies"] = (rewards[0::2] > rewards[1::2]).float()
    return losses, {name: torch.stack((x.sum(), x.new_tensor(len(x)))) for name, x in values.items()}


def means_of(sums: dict[str, Tensor]) -> dict[str, float]:
    """Metrics from their (sum, count), and the margin between the rewards."""
    means = {name: (x[0] / x[1]).item() for name, x in sums.items() if x[1] > 0}
    if "rewards/chosen" in means and "rewards/rejected" in means:  # a batch of KTO may have one label only
        means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
    return means


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


def sample_pairs(reference: Transformer, task, args: Args) -> list[dict]:
    """Pairs of completions sampled from the reference, in the form of the rows of a dataset.

    The completion with the higher reward is chosen, except for a share of `label_noise`. Pairs with equal
    rewards, or with a completion that was cut off, are left out. Held-out prompts are included and marked.
    """
    problems = [draw(task, args.seed, i) for i in range(args.num_pairs)]
    problems += [draw(task, args.seed, i, held_out=True) for i in range(args.eval_prompts)]
    generator, noise = torch.Generator().manual_seed(args.seed), random.Random(args.seed)
    uniforms = torch.rand(len(problems), 2, args.max_completion_length, generator=generator)
    prompts = encode_prompts(reference, problems, args.max_completion_length)
    completions = sample(reference, prompts, uniforms, args)
    texts = reference.decode(completions.tokens)
    rewards = score(task, [problem for problem in problems for _ in range(2)], texts)["reward"].view(-1, 2)
    pairs = []
    for i, (problem, (first, second)) in enumerate(zip(problems, rewards.tolist())):
        if first == second or not completions.finished[2 * i : 2 * i + 2].all():
            continue
        chosen = int(first < second) ^ int(noise.random() < args.label_noise)
        prompt, answers = problem["prompt"], [texts[2 * i + chosen], texts[2 * i + 1 - chosen]]
        if reference.tokenizer.chat_template:
            prompt = [{"role": "user", "content": problem.get("question", prompt)}]
            answers = [[{"role": "assistant", "content": answer}] for answer in answers]
        pair = dict(zip((args.prompt_column, args.chosen_column, args.rejected_column), (prompt, *answers)))
        pair["true_rewards"] = [second, first] if chosen else [first, second]
        pairs.append(pair | {"held_out": is_held_out(problem["prompt"])})
    if not pairs:
        raise SystemExit(f"The model writes no two completions of {args.task} of which one is better")
    return pairs


# --------------------------------------------------------------------------------------------------- training


def take_step(
    model: Transformer, optimizer: torch.optim.Optimizer, data: Data, units: list[list[int]], args: Args
) -> dict[str, float]:
    """One optimizer step; returns metrics. A unit is the two rows of a pair, or a single row with KTO."""
    count, units = len(units), my_share(units)
    rows = sum(units, [])
    parts = split([data.sequences[row] for row in rows], args, args.rows_per_unit)
    parts = [data.select([rows[i] for i in part], model.device) for part in parts]
    kl = torch.zeros((), device=model.device)
    if args.loss == "kto":  # of the whole batch, so that its division into micro-batches changes nothing
        with torch.no_grad():
            for part in parts:
                gaps = sequence_log_probs(model, part.mismatched) - part.mismatched_reference
                kl += gaps.sum() / count
        kl = sum_over_ranks(kl).clamp(min=0)
    totals = {}
    for part in parts:
        log_probs = sequence_log_probs(model, part.sequences)
        losses, sums = judge(log_probs, part, kl, args, paired=args.loss != "kto")
        (losses.sum() / count).backward()
        for name, value in sums.items():
            totals[name] = totals.get(name, 0) + value
    metrics = means_of({name: sum_over_ranks(value) for name, value in totals.items()})
    if args.loss == "kto":
        metrics["kl"] = kl.item()
    return metrics | {"grad_norm": optimizer_step(model, optimizer, args.max_grad_norm)}


def draw_units(data: Data, step: int, args: Args) -> list[list[int]]:
    """The units of rows that `step` learns from: every pass over the data has an order of its own."""
    size = args.rows_per_unit
    count, per_step = len(data.sequences) // size, args.batch_size * 2 // size
    positions = range((step - 1) * per_step, step * per_step)
    units = [shuffled(args.seed, position // count, count)[position % count] for position in positions]
    return [list(range(size * unit, size * unit + size)) for unit in units]


@lru_cache(2)  # a step may need two: the pass that ends in it and the one that begins
def shuffled(seed: int, epoch: int, count: int) -> list[int]:
    """The order of the units in a pass over the data."""
    return random.Random(f"{seed} {epoch}").sample(range(count), count)


def train(args: Args, run: Run) -> None:
    """DPO (Rafailov et al. 2023, section 4)."""
    task = None if args.dataset else make_task(args)
    limit = args.max_completion_length or (task.max_completion_length if task else 256)
    args = dataclasses.replace(args, max_completion_length=limit)
    model = load_model(task, args, run)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    num_tokens = torch.zeros((), dtype=torch.long)
    run.start(model=model, optimizer=optimizer, num_tokens=num_tokens)

    # 1. The reference: a model that was read, or a small one that learns from demonstrations first.
    warm_up(model, optimizer, task, args, run)
    reference = Reference(model, run)

    # 2. Preferences, read or sampled from the reference, with their log-probabilities under it.
    with run.precision, reference as frozen:
        data, held_out = load_preferences(frozen, task, args, run)
        before = sample_held_out(frozen, task, held_out, args, args.seed + 2 * EVALUATION_SEED)
    units = len(data.sequences) // args.rows_per_unit
    per_step = args.batch_size * 2 // args.rows_per_unit
    name = "completions" if args.loss == "kto" else "pairs"
    say(f"{units:,} {name}, {args.max_steps * per_step / units:.1f} passes")

    # 3. Learn: one optimizer step on each batch.
    for _ in run.iterations(partial(evaluate, model, reference, held_out, before, task, args, run)):
        rate = args.learning_rate * schedule(run.step, args)
        optimizer.param_groups[0]["lr"] = rate
        batch = draw_units(data, run.step, args)
        with run.precision:
            metrics = take_step(model, optimizer, data, batch, args)
        tokens = sum(len(part) for unit in batch for row in unit for part in data.sequences[row])
        num_tokens += tokens
        metrics |= {"learning_rate": rate, "epoch": run.step * per_step / units}
        run.log(metrics | {"num_tokens": num_tokens, "perf/tokens_per_second": tokens / run.seconds})


# ======================================================================================================
# Plumbing, the same in all scripts wherever it serves the same: limits of the flags, data, evaluation, model,
# sampler, tasks, runs, files, command line. Nothing below is about the algorithm.

EVALUATION_SEED = 1_000_000_000  # added to the seed: evaluations share no random numbers with the training

LIMITS = {  # the interval that flags have to lie in
    "[1, inf)": """max_steps checkpoint_interval eval_prompts hidden_size num_layers num_heads sft_batch_size
                   num_pairs batch_size micro_batch_size micro_batch_tokens max_length
                   max_completion_length""",
    "[0, inf)": """eval_interval export_interval sft_steps warmup_steps simpo_gamma orpo_lambda
                   desirable_weight undesirable_weight sft_coef lora_rank""",
    "(0, inf)": "beta learning_rate sft_learning_rate max_grad_norm checkpoint_minutes lora_alpha",
    "[0, 0.5)": "label_smoothing label_noise",
    "[0, 4294967296)": "seed",
}


def check(args: Args) -> None:
    """Raises ValueError, with a sentence, for flags that cannot work."""
    check_limits(args)
    width, heads = args.hidden_size, 2 * args.num_heads
    if width % heads:
        raise ValueError(f"hidden_size = {width} must be a multiple of 2 x num_heads = {heads}")
    if args.label_smoothing and args.loss != "dpo":
        raise ValueError(f"label_smoothing belongs to the loss dpo, not to {args.loss}")
    if args.sft_coef and args.loss in ("kto", "sft"):
        raise ValueError(f"sft_coef belongs to the losses of pairs, not to {args.loss}")
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


# ------------------------------------------------------------------------------------------------ preferences


@dataclass
class Data:
    """N completions of prompts; of pairs, row 2 i is the chosen one and row 2 i + 1 the rejected one."""

    paired: bool
    sequences: list[Sequence]  # prompts and completions, each with the token that ends it
    mismatched: list[Sequence]  # the completions after other prompts, for the KL of KTO
    labels: Tensor  # (N,), True if chosen, or desirable
    reference: Tensor  # (N,), log-probabilities of the completions under the reference, if the loss has one
    mismatched_reference: Tensor  # (N,), the same after other prompts, with KTO

    def select(self, rows: list[int], device: torch.device) -> Data:
        lists = ([x[row] for row in rows] for x in (self.sequences, self.mismatched))
        tensors = (self.labels, self.reference, self.mismatched_reference)
        return Data(self.paired, *lists, *(x[rows].to(device) for x in tensors))


def mismatch(sequences: list[Sequence], limit: int) -> list[Sequence]:
    """Each completion after the next prompt that is another one and leaves room, or else after its own."""
    mismatched = []
    for row, (prompt, completion) in enumerate(sequences):
        others = (sequences[(row + i) % len(sequences)].prompt for i in range(1, len(sequences)))
        fitting = (other for other in others if other != prompt and len(other) + len(completion) <= limit)
        mismatched.append(Sequence(next(fitting, prompt), completion))
    return mismatched


class ParsedRow(NamedTuple):
    """The completions of a row after their prompt, in tokens."""

    held_out: bool
    sequences: list[Sequence]  # of a pair, the chosen one comes first
    labels: list[bool]


def parse_row(row: dict, model: Transformer, limit: int, args: Args) -> ParsedRow:
    """A pair, or a completion with its label, of `limit` tokens; ValueError if the row is of no use.

    Prompt and completion are both text, or both messages. Of these the last one is the completion, whichever
    column the others stand in. They are tokenized apart, so that no token spans both. A text gets the token
    that ends it; a conversation is closed by the chat template.
    """
    columns, labels, found = [args.chosen_column, args.rejected_column], [True, False], []
    if not any(column in row for column in columns):
        if args.loss != "kto":
            hint = "; --loss kto takes labels" if args.label_column in row else ""
            raise ValueError(f"without columns {columns[0]} and {columns[1]}{hint}")
        columns, labels = [args.completion_column], [row.get(args.label_column)]
        if labels[0] not in (True, False):
            raise ValueError(f"whose {args.label_column} is neither true nor false")
    for column in columns:
        prompt, completion = row.get(args.prompt_column), row.get(column)
        if isinstance(completion, list) and len(completion) > 1:
            # Either the whole conversation, or the part of it that follows a prompt of messages.
            follows = isinstance(prompt, list) and completion[: len(prompt)] != prompt
            prompt, completion = (prompt if follows else []) + completion[:-1], completion[-1:]
        check_text(prompt, args.prompt_column)
        check_text(completion, column)
        if type(prompt) is not type(completion):
            raise ValueError(f"whose {args.prompt_column} and {column} are not both text or both messages")
        found.append(Sequence(prompt, completion))
    if found[0].prompt != prompt:
        raise ValueError(f"whose {columns[0]} and {columns[1]} answer different prompts")
    held_out, is_text, end = row.get("held_out"), isinstance(prompt, str), model.tokenizer.eos_token_id
    if not isinstance(held_out, bool):
        # A matter of the prompt itself: a template may add today's date.
        held_out = is_held_out(prompt if is_text else json.dumps(prompt))
    if not is_text:
        found = [render(model, messages) for messages in found]
    elif end is None:
        raise ValueError("of text, while the tokenizer has no token that ends a text")
    if sum(map(len, sum(found, ()))) > 100 * limit:
        raise ValueError("longer than the limit")  # to read it would take minutes
    (prompt,) = model.encode([found[0].prompt], special_tokens=is_text)
    completions = model.encode([x.completion for x in found], special_tokens=False)
    # Arrays: a list of Python's integers takes nine times the memory.
    prompt, completions = array("i", prompt), [array("i", x + [end] * is_text) for x in completions]
    if not prompt or not all(completions):
        raise ValueError("without any token in the prompt or a completion")
    if len(prompt) + max(map(len, completions)) > limit:
        raise ValueError("longer than the limit")
    if len(completions) == 2 and completions[0] == completions[1]:
        raise ValueError("with chosen equal to rejected")
    return ParsedRow(held_out, [Sequence(prompt, x) for x in completions], [*map(bool, labels)])


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
    context, parts, data = model.config["max_position_embeddings"], ([], []), []
    limit = min(args.max_length or context, context)
    parse = partial(parse_row, model=model, limit=limit, args=args)
    for name, file in {"dataset": source, "eval_dataset": args.eval_dataset}.items():
        for row in parse_rows(name, file, parse, run):
            held_out = name != "dataset" or (row.held_out and not args.eval_dataset)
            if not held_out or len(parts[1]) < args.eval_prompts:  # no more are evaluated
                parts[held_out].append(row)
    if not all(parts):
        raise SystemExit(f"There are too few rows of use in {source}, or in --eval-dataset")
    for rows in parts:
        sequences = [x for row in rows for x in row.sequences]
        mismatched = mismatch(sequences, limit) if args.loss == "kto" else sequences  # else not used
        labels = torch.tensor([label for row in rows for label in row.labels])
        paired = all(len(row.labels) == 2 for row in rows)
        data.append(Data(paired, sequences, mismatched, labels, *torch.zeros(2, len(labels))))
    return tuple(data)


def load_preferences(reference: Transformer, task, args: Args, run: Run) -> tuple[Data, Data]:
    """The training and the held-out part of the dataset, or of pairs sampled from the reference."""
    source, known = args.dataset or run.path / "pairs.jsonl", run.path / "reference_log_probs.pt"
    if task and run.rank == 0 and not source.exists():
        pairs = sample_pairs(reference, task, args)
        write_file(source, "".join(json.dumps(pair) + "\n" for pair in pairs))
    wait_for_ranks()  # until the file is there
    train, held_out = load_data(source, reference, args, run)
    if args.has_reference:
        add_reference(reference, held_out, args)
        if run.is_warm and known.exists():  # of the same model and rows, so nothing is computed again
            train.reference, train.mismatched_reference = torch.load(known, weights_only=True)["log_probs"]
        elif not args.evaluate:
            add_reference(reference, train, args)
            if run.rank == 0:
                write_file(known, {"log_probs": [train.reference, train.mismatched_reference]})
    return train, held_out


def add_reference(reference: Transformer, data: Data, args: Args) -> None:
    """Adds log-probabilities under the reference; those of mismatched rows with KTO only."""
    data.reference = all_log_probs(reference, data.sequences, args)
    if args.loss == "kto":
        data.mismatched_reference = all_log_probs(reference, data.mismatched, args)


@torch.no_grad()
def all_log_probs(model: Transformer, sequences: list[Sequence], args: Args) -> Tensor:
    """Log-probabilities (N,) of whole completions, on the CPU; each process computes its share."""
    log_probs = torch.zeros(len(sequences), device=model.device)
    for part in my_share(split(sequences, args)):
        log_probs[part] = sequence_log_probs(model, [sequences[row] for row in part])
    return sum_over_ranks(log_probs).cpu()


# ------------------------------------------------------------------------------------------------- evaluation


class Samples(NamedTuple):
    """One completion for each held-out prompt of this process."""

    problems: list[dict]
    sequences: list[Sequence]
    texts: list[str]
    log_probs: Tensor  # (P,), of the whole completions
    finished: Tensor  # (P,)
    rewards: Tensor  # (P,), zeros if there is no task
    count: int  # of prompts over all processes


def sample_held_out(model: Transformer, task, data: Data, args: Args, seed: int) -> Samples:
    """Completes held-out prompts of the task, or those of the held-out data."""
    length = args.max_completion_length
    if task:
        problems = [draw(task, args.seed, i, held_out=True) for i in range(args.eval_prompts)]
        prompts = encode_prompts(model, problems, length)
    else:
        room = model.config["max_position_embeddings"] - length
        different = dict.fromkeys(tuple(x.prompt) for x in data.sequences if len(x.prompt) <= room)
        prompts = [*map(list, different)]
        problems = [{"prompt": model.tokenizer.decode(prompt)} for prompt in prompts]
        if len(prompts) < rank_and_world()[1]:
            raise SystemExit("Too few held-out prompts leave room; lower --max-completion-length")
    uniforms = torch.rand(len(prompts), 1, length, generator=torch.Generator().manual_seed(seed))
    count, problems, prompts = len(prompts), my_share(problems), my_share(prompts)
    tokens, log_probs, finished = sample(model, prompts, my_share(uniforms), args)
    texts = model.decode(tokens)
    rewards = score(task, problems, texts)["reward"] if task else torch.zeros(len(texts))
    sequences = list(map(Sequence, prompts, tokens))
    return Samples(problems, sequences, texts, log_probs.sum(1), finished, rewards, count)


@torch.no_grad()
def evaluate(
    model: Transformer, reference: Reference, data: Data, before: Samples, task, args: Args, run: Run
) -> tuple[dict[str, float], list[dict]]:
    """Metrics of completions and of held-out preferences, and a few of the completions.

    `before` are completions of the reference, for the win rate.
    """
    with run.precision:
        after = sample_held_out(model, task, data, args, args.seed + EVALUATION_SEED)
        with reference as frozen:
            parts = [[after.sequences[row] for row in part] for part in split(after.sequences, args)]
            reference_log_probs = torch.cat([sequence_log_probs(frozen, part).cpu() for part in parts])
        values = {  # the KL is the mean of log policy - log reference over whole completions
            "kl_to_reference": after.log_probs - reference_log_probs,
            "mean_length": torch.tensor([float(len(x.completion)) for x in after.sequences]),
            "clipped_ratio": 1 - after.finished.float(),
        }
        pairs = zip(after.problems[:8], after.texts)
        samples = [{"prompt": problem["prompt"], "completion": text} for problem, text in pairs]
        if task:
            draws = (after.rewards == before.rewards).float()
            values |= {"true_reward": after.rewards, "win_rate": (after.rewards > before.rewards) + draws / 2}
            samples = [row | {"reward": reward} for row, reward in zip(samples, after.rewards.tolist())]
        totals = torch.stack([x.sum().to(model.device) for x in values.values()])
        metrics = dict(zip(values, (sum_over_ranks(totals) / after.count).tolist()))
        log_probs, kl = all_log_probs(model, data.sequences, args), 0.0
        if args.loss == "kto":
            kl = (all_log_probs(model, data.mismatched, args) - data.mismatched_reference).mean()
        _, sums = judge(log_probs, data, kl, args, paired=data.paired)
    return metrics | means_of(sums), samples


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


def warm_up(model: Transformer, optimizer: torch.optim.Optimizer, task, args: Args, run: Run) -> None:
    """Supervised fine-tuning of a small new model on demonstrations, in the steps up to 0."""
    if args.model or run.is_warm:
        return
    group, eos = optimizer.param_groups[0], model.tokenizer.eos_token
    for progress in run.iterations(begin=run.first_step, end=0):
        # Rise in 50 steps; fall to 5 percent over the second half.
        done = round(progress * args.sft_steps)
        group["lr"] = args.sft_learning_rate * min((done + 1) / 50, 1, 0.05 + 1.9 * (1 - progress))
        group["weight_decay"] = 0.01
        # Problems of negative numbers, which the training after it does not reach.
        numbers = range(-(done + 1) * args.sft_batch_size, -done * args.sft_batch_size)
        problems = [draw(task, args.seed, i) for i in numbers]
        texts = [task.demonstration(x, random.Random(f"{args.seed} {i}")) for i, x in zip(numbers, problems)]
        completions = model.encode([text + eos for text in texts], special_tokens=False)
        sequences = list(map(Sequence, encode_prompts(model, problems, 0), completions))
        with run.precision:
            loss = -sequence_log_probs(model, my_share(sequences)).sum() / sum(map(len, completions))
            loss.backward()
        norm = optimizer_step(model, optimizer, 1.0)
        if done % 10 == 9 or not math.isfinite(norm):
            run.log({"sft/loss": sum_over_ranks(loss.detach()), "sft/grad_norm": norm})
    model.folder = run.path / "reference"
    export(model.save_pretrained, model.folder)
    add_adapters(model, args, run)
    optimizer.state.clear()  # the training begins with a new optimizer
    group |= {"params": [*model.parameters()], "weight_decay": 0.0}
    run.save()


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
MAY_CHANGE = """resume evaluate run_name runs max_steps device checkpoint_minutes export export_interval track
                wandb_project_name wandb_entity""".split()
MAY_MOVE = "model", "dataset", "eval_dataset"
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
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():  # started by torchrun
        if cuda:
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if cuda else "gloo")
    _, world = rank_and_world()
    if args.batch_size % world:
        raise SystemExit(f"batch_size = {args.batch_size} must be a multiple of {world} processes")
    if min(args.eval_prompts, args.sft_batch_size) < world:
        raise SystemExit(f"eval_prompts and sft_batch_size must be at least {world}, one per process")
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
