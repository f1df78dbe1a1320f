"""Direct Preference Optimization (DPO) of a language model, and its relatives, from pairs of completions.

Of two completions of a prompt, one was preferred. The policy pi is fine-tuned to tell which one, by how much
more likely it makes a completion than the reference pi_ref does, which is a reward without a reward model:

    E[ -log sigmoid(beta (log pi(chosen) / pi_ref(chosen) - log pi(rejected) / pi_ref(rejected))) ]

(Rafailov et al. 2023, equation 7). --loss chooses it or a relative: IPO (Azar et al. 2023), SimPO (Meng et
al. 2024), ORPO (Hong et al. 2024), KTO (Ethayarajh et al. 2024), or likelihood of what was chosen (sft).
Beside DPO there is a tenth of that likelihood (Pang et al. 2024), unless --sft-coef is 0.

By default a transformer of 0.4M parameters is made here and learns to go on with reviews; pairs are sampled
from it, and the more favourable of the two is chosen, with some mistakes. So the true reward of what it
writes afterwards can be measured, which takes two minutes on a CPU. --model takes a folder or id of Hugging
Face instead (Llama, Qwen2, Qwen3 families), --dataset a file of preferences. Look at `eval/true_reward` and
`eval/kl_to_reference`: `rewards/accuracies` nears 1 whether or not the policy is any good.

    python dpo_llm.py --loss ipo --beta 2
    python dpo_llm.py --resume runs/reviews__dpo_llm__1__20261120-101500
    torchrun --nproc-per-node 2 dpo_llm.py --model Qwen/Qwen2.5-0.5B-Instruct --dataset pairs.jsonl \
        --learning-rate 5e-7
"""

import dataclasses
import hashlib
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
from functools import lru_cache, partial
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
    dataset: str | None = None
    """JSONL or Parquet file, or dataset of the Hugging Face hub as `id` or `id:configuration`"""
    prompt_column: str = "prompt"
    """column of the dataset that holds the prompt, as text or as messages"""
    chosen_column: str = "chosen"
    """column of the preferred completion, or of the conversation that ends with it"""
    rejected_column: str = "rejected"
    """column of the other one"""
    completion_column: str = "completion"
    """column of the completion where each has a label of its own, for --loss kto"""
    label_column: str = "label"
    """column that says whether it is desirable"""
    max_length: int | None = None
    """tokens of prompt and completion; what is longer is dropped. None for the context of the model"""
    model: str | None = None
    """folder or hub id of a Llama, Qwen2 or Qwen3 model; None makes a model here and warms it up"""
    seed: int = 1
    """seed of the model, the pairs made here and the order of the data"""
    max_steps: int = 225
    """steps of the optimizer, each with one batch"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the model is trained; auto is a GPU if there is one"""
    checkpoint_interval: int = 50
    """steps between checkpoints"""
    eval_interval: int = 45
    """steps between evaluations on held-out prompts; 0 for none"""
    eval_prompts: int = 512
    """held-out prompts of an evaluation, with a completion sampled of each"""
    max_completion_length: int | None = None
    """tokens after which a sampled completion is cut off; None for what the task needs, 256 with a dataset"""
    resume: str | None = None
    """run directory to resume; its arguments are loaded first"""
    evaluate: str | None = None
    """run directory or checkpoint file to evaluate instead of training"""

    # Model and pairs made here; the warm-up is supervised fine-tuning (SFT)
    hidden_size: int = 128
    """width of the residual stream; a multiple of 2 x num_heads"""
    num_layers: int = 2
    """transformer layers"""
    num_heads: int = 4
    """attention heads"""
    sft_steps: int = 300
    """steps of SFT on demonstrations of the task"""
    sft_batch_size: int = 64
    """demonstrations per step"""
    sft_learning_rate: float = 2e-3
    """highest step size of AdamW in the warm-up"""
    num_pairs: int = 16384
    """prompts of which two completions are sampled from the reference, to make a pair"""
    label_noise: float = 0.1
    """probability that the worse one of a pair is called the chosen one"""

    # Algorithm
    loss: Literal["dpo", "ipo", "simpo", "orpo", "kto", "sft"] = "dpo"
    """sft is the likelihood of what was chosen; simpo, orpo and sft have no reference"""
    beta: float = 0.3
    """weight of the KL to the reference that is implied: the smaller, the further the policy goes"""
    label_smoothing: float = 0.0
    """share of the labels that are taken to be wrong (cDPO), with --loss dpo"""
    simpo_gamma: float = 0.5
    """margin that --loss simpo asks for"""
    orpo_lambda: float = 1.0
    """weight of the odds ratio beside the likelihood, with --loss orpo"""
    desirable_weight: float = 1.0
    """weight of desirable completions, with --loss kto"""
    undesirable_weight: float = 1.0
    """weight of undesirable completions, with --loss kto"""
    sft_coef: float | None = None
    """weight of the likelihood of what was chosen, per token; None for 0.1 with --loss dpo, 0 with others"""
    batch_size: int = 64
    """pairs per step over all processes; twice as many completions with --loss kto"""
    micro_batch_size: int = 128
    """completions per forward and backward pass, a pair at least; changes memory and speed only"""
    learning_rate: float = 5e-4
    """highest step size of AdamW; 5e-7 to 5e-6 for pretrained models"""
    warmup_steps: int = 10
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
        return Path(self.dataset).stem.replace(":", "-") if self.dataset else "reviews"

    @property
    def likelihood_weight(self) -> float:
        """The value of sft_coef, which keeps the mass on text that is in the pairs."""
        return (0.1 if self.loss == "dpo" else 0.0) if self.sft_coef is None else self.sft_coef

    @property
    def has_reference(self) -> bool:
        """Whether the loss compares the policy with the reference."""
        return self.loss in ("dpo", "ipo", "kto")

    def __post_init__(self) -> None:
        counts = "max_steps checkpoint_interval eval_prompts hidden_size num_layers num_heads "
        counts += "sft_batch_size num_pairs batch_size micro_batch_size"
        for name in counts.split():
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in "beta learning_rate sft_learning_rate max_grad_norm".split():
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        weights = "simpo_gamma orpo_lambda desirable_weight undesirable_weight"
        for name in f"eval_interval sft_steps warmup_steps {weights}".split():
            if not getattr(self, name) >= 0:  # not "< 0", which lets NaN through
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("label_smoothing", "label_noise"):
            if not 0 <= getattr(self, name) < 0.5:
                raise ValueError(f"{name} must lie in [0, 0.5), got {getattr(self, name)}")
        if self.label_smoothing and self.loss != "dpo":
            raise ValueError(f"label_smoothing belongs to the loss dpo, not to {self.loss}")
        if self.sft_coef and self.loss in ("kto", "sft"):
            raise ValueError(f"sft_coef belongs to the losses of pairs, not to {self.loss}")
        for name, least in (("max_length", 1), ("max_completion_length", 1), ("sft_coef", 0)):
            if getattr(self, name) is not None and not getattr(self, name) >= least:
                raise ValueError(f"{name} must be at least {least}, or None for the default")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must lie in [0, 2^32), got {self.seed}")
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"hidden_size = {self.hidden_size} must be a multiple of 2 x num_heads = {2 * self.num_heads}"
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


# ---------------------------------------------------------------------------------- task made here


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


# Of the model made here: a token for each tag, character and word.
VOCABULARY = "<pad> <bos> <eos> <think> </think> <answer> </answer>".split() + [*"\n0123456789+-*/()=,."]
VOCABULARY += ["the", *(f" {word}" for word in WORDS)]  # with the space before it


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


# ------------------------------------------------------------------------------------------------ model


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


# ------------------------------------------------------------------------------------------- preferences


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


@dataclass
class Data:
    """Prompts and completions as tokens. Of pairs, 2 i is the chosen one and 2 i + 1 the rejected one."""

    paired: bool
    texts: list[str] = dataclasses.field(default_factory=list)  # of the prompts
    prompts: list[list[int]] = dataclasses.field(default_factory=list)
    completions: list[list[int]] = dataclasses.field(default_factory=list)  # with the token that ends them
    labels: list[bool] = dataclasses.field(default_factory=list)  # True for chosen, or desirable
    reference: torch.Tensor | None = None  # (N,) log-probabilities of the completions
    reference_mismatched: torch.Tensor | None = None  # (N,) those after `other_prompt`
    limit: float = math.inf  # tokens of prompt and completion

    def other_prompt(self, row: int) -> list[int]:
        """The prompt of the next row that has another one, with room for the completion; its own if none has.

        For the estimate of the KL in KTO.
        """
        room = self.limit - len(self.completions[row])
        others = (self.prompts[(row + i) % len(self.prompts)] for i in range(1, len(self.prompts)))
        fitting = (prompt for prompt in others if prompt != self.prompts[row] and len(prompt) <= room)
        return next(fitting, self.prompts[row])


def completions_of(row: dict, args: Args, place: str) -> list[tuple[str | list, str | list, bool]]:
    """(prompt, completion, label) of a row: two of a pair, chosen first, or one that has a label.

    Prompt and completion are both text, or both lists of messages. Of the messages the last one is the
    completion, whichever column the others stand in.
    """
    paired = args.chosen_column in row or args.rejected_column in row
    names = [args.chosen_column, args.rejected_column] if paired else [args.completion_column]
    columns, labels, found = ", ".join(map(str, row)) or "none", [True, False], []
    if not paired and args.loss != "kto":
        hint = "; --loss kto takes labels" if args.label_column in row else ""
        raise SystemExit(
            f"{place}: no columns {args.chosen_column} and {args.rejected_column}; there are: {columns}{hint}"
        )
    if not paired:
        labels = [row.get(args.label_column)]
        if labels[0] not in (True, False):
            raise SystemExit(f"{place}: {args.label_column} must be true or false, got {labels[0]!r}")
    for name, label in zip(names, labels):
        prompt, completion = row.get(args.prompt_column), row.get(name)
        if isinstance(completion, list) and len(completion) > 1:
            # Either the whole conversation, or the part of it that follows a prompt of messages.
            follows = isinstance(prompt, list) and completion[: len(prompt)] != prompt
            prompt, completion = (prompt if follows else []) + completion[:-1], completion[-1:]
        for column, value in ((args.prompt_column, prompt), (name, completion)):
            if value is None:
                raise SystemExit(f"{place}: no column {column}; there are: {columns}")
        messages = [x for value in (prompt, completion) if isinstance(value, list) for x in value]
        if type(prompt) is not type(completion) or not isinstance(prompt, str | list):
            raise SystemExit(
                f"{place}: {args.prompt_column} and {name} must both be text, or both be lists of messages"
            )
        fields = [x.get(field) for x in messages if isinstance(x, dict) for field in ("role", "content")]
        if len(fields) < 2 * len(messages) or not all(isinstance(field, str) for field in fields):
            raise SystemExit(f"{place}: each message of a conversation needs a role and a content")
        found.append((prompt, completion, bool(label)))
    if paired and found[0][0] != found[1][0]:
        raise SystemExit(f"{place}: {names[0]} and {names[1]} answer different prompts")
    return found


def load_data(source: str | Path, args: Args, tokenizer, context: int) -> tuple[Data, Data]:
    """The training part and the held-out tenth of a file; says what was dropped.

    Prompt and completion are turned into tokens apart, so that none spans both. A completion that is text
    gets the token that ends it, in a conversation the chat template closes it.
    """
    raw = read_rows(str(source))
    rows = [completions_of(row, args, f"{source}, row {number}") for number, row in enumerate(raw, 1)]
    flat = [example for row in rows for example in row]
    kinds = {(type(prompt), len(row)) for row in rows for prompt, *_ in row}
    if len(kinds) != 1:
        raise SystemExit(f"{source} has no rows, or mixes texts with conversations, or pairs with labels")
    ((kind, size),) = kinds
    if kind is list:
        if not tokenizer.chat_template:
            raise SystemExit(
                f"{source} has conversations, and the tokenizer of {args.model} no chat template"
            )
        template = partial(tokenizer.apply_chat_template, tokenize=False)
        texts = [template(prompt, add_generation_prompt=True) for prompt, *_ in flat]
        whole = [template(prompt + answer) for prompt, answer, _ in flat]
        if not all(all_of_it.startswith(text) for text, all_of_it in zip(texts, whole)):
            raise SystemExit(f"The chat template of {args.model} changes a prompt when an answer follows it")
        answers = [all_of_it[len(text) :] for text, all_of_it in zip(texts, whole)]
        said, ends = [y[-1]["content"] for _, y, _ in flat], []
    else:
        texts, answers = [x for x, *_ in flat], [y for _, y, _ in flat]
        said, ends = answers, [tokenizer.eos_token_id]
        if ends == [None]:
            raise SystemExit(f"The tokenizer of {args.model} has no token that ends a text")
    prompts = tokenizer(texts, add_special_tokens=kind is str)["input_ids"]
    completions = [x + ends for x in tokenizer(answers, add_special_tokens=False)["input_ids"]]
    limit = min(args.max_length or context, context)
    parts = Data(size == 2, limit=limit), Data(size == 2, limit=limit)
    dropped = {"longer than the limit": 0, "empty": 0, "with chosen equal to rejected": 0}
    for first in range(0, len(flat), size):
        group = range(first, first + size)
        if any(len(prompts[i]) + len(completions[i]) > limit for i in group):
            dropped["longer than the limit"] += 1
        elif any(not prompts[i] or not said[i].strip() for i in group):
            dropped["empty"] += 1
        elif size == 2 and completions[first] == completions[first + 1]:
            dropped["with chosen equal to rejected"] += 1
        else:
            held_out = raw[first // size].get("held_out")
            if not isinstance(held_out, bool):
                held_out = is_held_out(texts[first])
            part = parts[held_out]
            if held_out and len(part.prompts) >= size * args.eval_prompts:
                continue  # neither evaluated nor learned from
            for i in group:
                part.texts.append(texts[i])
                part.prompts.append(prompts[i])
                part.completions.append(completions[i])
                part.labels.append(flat[i][2])
    if any(dropped.values()) and rank_and_world()[0] == 0:
        counts = ", ".join(f"{count:,} {reason}" for reason, count in dropped.items() if count)
        print(f"Dropped of {len(rows):,} rows of {source}: {counts}", flush=True)
    if not all(part.prompts for part in parts):
        raise SystemExit(f"{source} has too few rows of use to hold out a tenth of them")
    return parts


# -------------------------------------------------------------------------------------- pure functions


def preference_loss(
    policy_chosen: torch.Tensor,  # (B,), log-probabilities of whole completions, as the next three
    policy_rejected: torch.Tensor,
    reference_chosen: torch.Tensor | None,
    reference_rejected: torch.Tensor | None,
    chosen_lengths: torch.Tensor,  # (B,), in tokens
    rejected_lengths: torch.Tensor,
    *,
    loss: str,
    beta: float,
    label_smoothing: float = 0.0,
    simpo_gamma: float = 0.5,
    orpo_lambda: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Losses (B,) of pairs, with the rewards (B,) that the policy implies for chosen and rejected, detached.

    dpo: -log sigmoid(h) of the margin h between the rewards beta log(pi / pi_ref) (Rafailov et al. 2023,
    equation 7); with label smoothing e: -(1 - e) log sigmoid(h) - e log sigmoid(-h) (Mitchell 2023, cDPO).
    ipo: (h / beta - 1 / (2 beta))^2 with log-ratios per token, as its authors came to advise, not the sums of
    Azar et al. (2023, equation 17). simpo: -log sigmoid(h - gamma), rewards beta log pi per token (Meng et
    al. 2024, equation 6). orpo: -log p - lambda log sigmoid(log odds(chosen) - log odds(rejected)), where p
    is the geometric mean of the probabilities of tokens (Hong et al. 2024, equations 6 and 7).
    sft: -log p of what was chosen. The last three have no reference.
    """
    chosen, rejected = policy_chosen / chosen_lengths, policy_rejected / rejected_lengths
    if loss in ("dpo", "ipo"):
        chosen, rejected = policy_chosen - reference_chosen, policy_rejected - reference_rejected
        margin = beta * (chosen - rejected)
        losses = -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
        if loss == "ipo":
            losses = (chosen / chosen_lengths - rejected / rejected_lengths - 1 / (2 * beta)).square()
    elif loss == "simpo":
        losses = -F.logsigmoid(beta * (chosen - rejected) - simpo_gamma)
    else:
        losses = -chosen
        if loss == "orpo":
            # log(p / (1 - p)); expm1 keeps 1 - p exact where p is next to 1, the clamp where it is 1.
            odds = [x - torch.log(-torch.expm1(x.clamp(max=-1e-6))) for x in (chosen, rejected)]
            losses = losses - orpo_lambda * F.logsigmoid(odds[0] - odds[1])
    return losses, beta * chosen.detach(), beta * rejected.detach()


def kto_loss(
    policy: torch.Tensor,  # (B,), log-probabilities of whole completions
    reference: torch.Tensor,  # (B,)
    labels: torch.Tensor,  # (B,), True for desirable
    kl: torch.Tensor | float,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> torch.Tensor:
    """Losses (B,) of completions that are desirable or not (Ethayarajh et al. 2024, equation 8).

    w (1 - sigmoid(beta (x - kl))) where desirable, w (1 - sigmoid(beta (kl - x))) where not, with x =
    log(pi / pi_ref). The KL is what x is compared with; no gradient flows through it, and below 0 it is 0.
    """
    kl = torch.as_tensor(kl).detach().clamp(min=0)
    gain = beta * (policy - reference - kl)
    return torch.where(
        labels, desirable_weight * (1 - gain.sigmoid()), undesirable_weight * (1 - (-gain).sigmoid())
    )


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


@torch.no_grad()
def all_log_probs(
    model: Transformer, prompts: list[list[int]], completions: list[list[int]], args: Args
) -> torch.Tensor:
    """Log-probabilities (N,) of whole completions on the CPU; each process computes its part."""
    rank, world = rank_and_world()
    out = torch.zeros(len(prompts), device=next(model.parameters()).device)
    for first in range(rank * args.micro_batch_size, len(prompts), world * args.micro_batch_size):
        rows = slice(first, first + args.micro_batch_size)
        out[rows] = sequence_log_probs(model, prompts[rows], completions[rows])
    return sum_over_ranks(out).cpu()


def add_reference(model: Transformer, data: Data, args: Args) -> None:
    """Log-probabilities of the data by the reference, from the disk if they were computed before."""
    device = next(model.parameters()).device
    kind = [args.loss == "kto" and data.limit, torch.is_autocast_enabled(device.type), model.config]
    key = hashlib.sha256(json.dumps(kind).encode())
    for weights in model.state_dict().values():
        key.update(weights.cpu().numpy().tobytes())
    key.update(json.dumps([data.prompts, data.completions]).encode())
    path = Path(args.runs) / "reference_log_probs" / f"{key.hexdigest()[:32]}.safetensors"
    try:
        found = load_file(path)
    except Exception:  # not there, or damaged: both are mended by computing it
        found = None
    # All processes compute, or none does.
    if sum_over_ranks(torch.tensor(float(found is None), device=device)):
        found = {"log_probs": all_log_probs(model, data.prompts, data.completions, args)}
        if args.loss == "kto":
            others = [data.other_prompt(row) for row in range(len(data.prompts))]
            found["mismatched"] = all_log_probs(model, others, data.completions, args)
        if rank_and_world()[0] == 0:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                save_file(found, path.with_suffix(f".{os.getpid()}"))
                os.replace(path.with_suffix(f".{os.getpid()}"), path)
            except Exception as error:  # safetensors has one of its own for a full disk
                print(f"Warning: cannot keep the log-probabilities of the reference: {error}", flush=True)
    data.reference, data.reference_mismatched = found["log_probs"], found.get("mismatched")


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


def decode(tokenizer, completions: Completions) -> list[str]:
    return tokenizer.batch_decode(completions.lists(), skip_special_tokens=True)


# ----------------------------------------------------------------------------- sampling and evaluation


def rank_and_world() -> tuple[int, int]:
    """The number of this process and how many there are, under torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def sum_over_ranks(x: torch.Tensor) -> torch.Tensor:
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


SAMPLED_ROWS = 512  # completions sampled at a time
EVALUATION_SEED = 1_000_000_000  # added to the seed: other random numbers than those of the pairs


def sample(
    model: Transformer, prompts: list[list[int]], uniforms: torch.Tensor, eos_ids: list[int]
) -> Completions:
    """Completions of prompts for `uniforms` (P, G, C), some prompts at a time."""
    uniforms, size = uniforms.to(next(model.parameters()).device), max(SAMPLED_ROWS // uniforms.shape[1], 1)
    parts = [
        generate(model, prompts[i : i + size], uniforms[i : i + size], eos_ids)
        for i in range(0, len(prompts), size)
    ]
    return Completions(*(torch.cat(x) for x in zip(*parts)))


def true_rewards(task: Task, problems: list[dict], completions: list[str]) -> torch.Tensor:
    """The reward (rows,) of each completion; what a reward does not ask for goes into its **columns."""
    columns = {name: [problem[name] for problem in problems] for name in problems[0]}
    prompts = columns.pop("prompt")
    total = torch.zeros(len(completions))
    for name, (function, weight) in task.rewards.items():
        values = torch.tensor(function(prompts=prompts, completions=completions, **columns))
        if values.shape != total.shape or not values.isfinite().all():
            raise SystemExit(f"The reward {name} must give one finite number for each completion")
        total += weight * values
    return total


def sample_pairs(model: Transformer, tokenizer, task: Task, eos_ids: list[int], args: Args) -> list[dict]:
    """Rows for `load_data`: two completions of the model each, of which the better one is chosen, mostly.

    Held-out prompts are among them. Completions that were cut off, or are as good as the other, are not.
    """
    problems = [task.train_problem(i) for i in range(args.num_pairs)]
    problems += task.held_out_problems(args.eval_prompts)
    generator, mistakes = torch.Generator().manual_seed(args.seed), random.Random(args.seed)
    uniforms = torch.rand(len(problems), 2, args.max_completion_length, generator=generator)
    prompts = encode_prompts(tokenizer, problems, model, args.max_completion_length)
    completions = sample(model, prompts, uniforms, eos_ids)
    texts = decode(tokenizer, completions)
    rewards = true_rewards(task, [problem for problem in problems for _ in range(2)], texts).view(-1, 2)
    pairs = []
    for i, (problem, (first, second)) in enumerate(zip(problems, rewards.tolist())):
        if first == second or not completions.finished[2 * i : 2 * i + 2].all():
            continue
        chosen = (first < second) ^ (mistakes.random() < args.label_noise)  # 0 or 1
        prompt, answers = problem["prompt"], [texts[2 * i + chosen], texts[2 * i + 1 - chosen]]
        if tokenizer.chat_template:
            prompt = [{"role": "user", "content": problem["question"]}]
            answers = [[{"role": "assistant", "content": answer}] for answer in answers]
        pair = dict(zip((args.prompt_column, args.chosen_column, args.rejected_column), (prompt, *answers)))
        pair["true_rewards"] = [first, second][:: -1 if chosen else 1]
        pairs.append(pair | {"held_out": is_held_out(problem["prompt"])})
    if not pairs:
        raise SystemExit(
            "The model writes no two reviews of which one is better; give --dataset, or another model"
        )
    return pairs


class HeldOut(NamedTuple):
    """What an evaluation needs: prompts to sample from, and preferences."""

    prompts: list[list[int]]
    problems: list[dict]
    data: Data
    reference_rewards: torch.Tensor | None  # (P,), of completions of the reference, where there is a task


@torch.no_grad()
def evaluate(
    model: Transformer,
    reference: Transformer,
    tokenizer,
    task: Task | None,
    held_out: HeldOut,
    eos_ids: list[int],
    args: Args,
) -> tuple[dict[str, float], list[dict]]:
    """Metrics on held-out prompts and preferences, and a few completions."""
    (rank, world), device = rank_and_world(), next(model.parameters()).device
    generator = torch.Generator().manual_seed(args.seed + EVALUATION_SEED)
    uniforms = torch.rand(len(held_out.prompts), 1, args.max_completion_length, generator=generator)
    prompts, problems = held_out.prompts[rank::world], held_out.problems[rank::world]
    completions = sample(model, prompts, uniforms[rank::world], eos_ids)
    texts = decode(tokenizer, completions)
    tokens = completions.lists()
    # E[log policy - log reference] over whole completions.
    size = args.micro_batch_size
    by_reference = torch.cat(
        [
            sequence_log_probs(reference, prompts[i : i + size], tokens[i : i + size])
            for i in range(0, len(prompts), size)
        ]
    )
    values = {
        "kl_to_reference": completions.log_probs.sum(1) - by_reference,
        "mean_length": completions.lengths.float(),
        "clipped_ratio": 1 - completions.finished.float(),
    }
    samples = [{"prompt": x["prompt"], "completion": text} for x, text in zip(problems, texts)][:8]
    if task:
        rewards, before = true_rewards(task, problems, texts), held_out.reference_rewards[rank::world]
        values["true_reward"] = rewards.to(device)
        values["win_rate"] = ((rewards > before).float() + (rewards == before).float() / 2).to(device)
        samples = [row | {"reward": reward} for row, reward in zip(samples, rewards.tolist())]
    totals = sum_over_ranks(torch.stack([x.sum() for x in values.values()])) / len(held_out.prompts)
    metrics = dict(zip(values, totals.tolist()))

    data = held_out.data
    log_probs = all_log_probs(model, data.prompts, data.completions, args)
    kl = 0.0
    if args.loss == "kto":
        others = [data.other_prompt(row) for row in range(len(data.prompts))]
        kl = (all_log_probs(model, others, data.completions, args) - data.reference_mismatched).mean()
    _, sums = judge(log_probs, data, list(range(len(data.prompts))), kl, args, pairs=data.paired)
    return metrics | means_of(sums), samples


# -------------------------------------------------------------------------------------------- learning


def judge(
    log_probs: torch.Tensor,
    data: Data,
    rows: list[int],
    kl: torch.Tensor | float,
    args: Args,
    pairs: bool,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Losses of rows of the data by their log-probabilities (B,), and metrics as (sum, count).

    With `pairs`, the rows are pairs, chosen first; all losses but that of KTO need them.
    """
    device = log_probs.device
    labels = torch.tensor([data.labels[row] for row in rows], device=device)
    lengths = torch.tensor([len(data.completions[row]) for row in rows], device=device)
    reference = data.reference[rows].to(device) if args.has_reference else None
    if args.loss == "kto":
        weights = {
            "desirable_weight": args.desirable_weight,
            "undesirable_weight": args.undesirable_weight,
        }
        losses = kto_loss(log_probs, reference, labels, kl, beta=args.beta, **weights)
        rewards = args.beta * (log_probs - reference).detach()
    else:
        losses, *rewards = preference_loss(
            log_probs[0::2],
            log_probs[1::2],
            None if reference is None else reference[0::2],
            None if reference is None else reference[1::2],
            lengths[0::2],
            lengths[1::2],
            loss=args.loss,
            beta=args.beta,
            label_smoothing=args.label_smoothing,
            simpo_gamma=args.simpo_gamma,
            orpo_lambda=args.orpo_lambda,
        )
        losses = losses - args.likelihood_weight * log_probs[0::2] / lengths[0::2]
        rewards = torch.stack(rewards, 1).flatten()
    values = {"loss": losses.detach()}
    for name, which in (("chosen", labels), ("rejected", ~labels)):
        values[f"rewards/{name}"] = rewards[which]
        values[f"logps/{name}"] = log_probs.detach()[which]
    if pairs:
        values["rewards/accuracies"] = (rewards[0::2] > rewards[1::2]).float()
    return losses, {name: torch.stack((x.sum(), x.new_tensor(len(x)))) for name, x in values.items()}


def means_of(sums: dict[str, torch.Tensor]) -> dict[str, float]:
    """Metrics from their (sum, count), with the margin between the rewards."""
    means = {name: (x[0] / x[1]).item() for name, x in sums.items() if x[1] > 0}
    if "rewards/chosen" in means and "rewards/rejected" in means:  # a batch of KTO may have one kind only
        means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
    return means


def take_step(
    model: Transformer, optimizer: torch.optim.Optimizer, data: Data, units: list[int], args: Args
) -> dict[str, float]:
    """One step of the optimizer on pairs, or on single rows with KTO; returns metrics."""
    (rank, world), device = rank_and_world(), next(model.parameters()).device
    size = 1 if args.loss == "kto" else 2
    rows = [size * unit + i for unit in units[rank::world] for i in range(size)]
    step = max(args.micro_batch_size // size, 1) * size
    micro_batches = [rows[i : i + step] for i in range(0, len(rows), step)]
    kl = torch.zeros((), device=device)
    if args.loss == "kto":  # of the whole batch, so that it does not matter how it is divided
        with torch.no_grad():
            for micro in micro_batches:
                others = [data.other_prompt(row) for row in micro]
                gap = sequence_log_probs(model, others, [data.completions[row] for row in micro])
                kl += (gap - data.reference_mismatched[micro].to(device)).sum() / len(units)
        kl = sum_over_ranks(kl).clamp(min=0)
    totals = {}
    for micro in micro_batches:
        prompts, completions = [data.prompts[row] for row in micro], [data.completions[row] for row in micro]
        log_probs = sequence_log_probs(model, prompts, completions)
        losses, sums = judge(log_probs, data, micro, kl, args, pairs=size == 2)
        (losses.sum() / len(units)).backward()
        for name, value in sums.items():
            totals[name] = totals.get(name, 0) + value
    metrics = means_of({name: sum_over_ranks(value) for name, value in sorted(totals.items())})
    if args.loss == "kto":
        metrics["kl"] = kl.item()
    return metrics | {"grad_norm": optimizer_step(model, optimizer, args.max_grad_norm)}


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


def load_held_out(
    reference: Transformer, tokenizer, task: Task | None, data: Data, eos_ids: list[int], args: Args
) -> HeldOut:
    """Prompts of the task, or else of the data, and what the reference makes of them."""
    if not task:
        room = reference.config["max_position_embeddings"] - args.max_completion_length
        prompts = {text: ids for text, ids in zip(data.texts, data.prompts) if len(ids) <= room}
        if len(prompts) < rank_and_world()[1]:
            raise SystemExit(
                "Too few held-out prompts leave room for a completion: lower --max-completion-length"
            )
        return HeldOut([*prompts.values()], [{"prompt": text} for text in prompts], data, None)
    problems = task.held_out_problems(args.eval_prompts)
    prompts = encode_prompts(tokenizer, problems, reference, args.max_completion_length)
    generator = torch.Generator().manual_seed(args.seed + 2 * EVALUATION_SEED)
    uniforms = torch.rand(len(prompts), 1, args.max_completion_length, generator=generator)
    texts = decode(tokenizer, sample(reference, prompts, uniforms, eos_ids))
    return HeldOut(prompts, problems, data, true_rewards(task, problems, texts))


def read_data(
    reference: Transformer, tokenizer, task: Task | None, eos_ids: list[int], args: Args, run: Path
) -> tuple[Data, HeldOut]:
    """Preferences for the training, and held-out ones with the log-probabilities of the reference."""
    source = args.dataset or run / "pairs.jsonl"
    if task and rank_and_world()[0] == 0 and not source.exists():
        pairs = sample_pairs(reference, tokenizer, task, eos_ids, args)
        source.with_suffix(".tmp").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        os.replace(source.with_suffix(".tmp"), source)
    if dist.is_initialized():
        dist.barrier()  # the file is there
    data, held_out = load_data(source, args, tokenizer, reference.config["max_position_embeddings"])
    if args.has_reference:
        add_reference(reference, held_out, args)
    return data, load_held_out(reference, tokenizer, task, held_out, eos_ids, args)


def train(args: Args, run: Path, device: torch.device) -> None:
    """DPO; goes on from the checkpoint in `run` if there is one."""
    rank, world = rank_and_world()
    torch.manual_seed(args.seed)
    task = None if args.dataset else Reviews(args.seed)
    model, tokenizer, eos_ids = make_model(args)
    model.to(device).gradient_checkpointing = args.gradient_checkpointing
    length = task.max_completion_length if task else 256
    args = dataclasses.replace(args, max_completion_length=args.max_completion_length or length)
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
    start, num_tokens = time.perf_counter(), 0
    if state:
        model.load_state_dict(Transformer.from_pretrained(run / "reference").state_dict())
    else:
        if not args.model:
            warm_up(model, tokenizer, task, args, log, precision)
        if rank == 0:
            export(model, tokenizer, eos_ids, run / "reference")
    with precision:
        data, held_out = read_data(model, tokenizer, task, eos_ids, args, run)
        if args.has_reference:
            add_reference(model, data, args)
    elapsed = time.perf_counter() - start
    optimizer = torch.optim.AdamW(
        model.parameters(), args.learning_rate, (0.9, 0.95), weight_decay=0.0, fused=True
    )
    samples_file, lines = run / "samples.jsonl", []
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        elapsed, num_tokens = state["elapsed"], state["num_tokens"]
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
            "optimizer": optimizer.state_dict(),
            "step": step,
            "num_tokens": num_tokens,
            "elapsed": elapsed,
        }
        if rank == 0:
            writer.flush()
            save_checkpoint(run / "checkpoint.pt", state)

    def log_evaluation(step: int) -> None:
        with precision:
            # In memory for this long only.
            reference = Transformer.from_pretrained(run / "reference").to(device)
            metrics, samples = evaluate(model, reference, tokenizer, task, held_out, eos_ids, args)
        log({f"eval/{name}": value for name, value in metrics.items()}, step)
        reward = f"true reward {metrics['true_reward']:.3f}, " if task else ""
        say(
            f"step {step:>5,}: evaluation {reward}KL {metrics['kl_to_reference']:.2f}, "
            f"length {metrics['mean_length']:.1f}, margin {metrics.get('rewards/margins', math.nan):.2f}"
        )
        if metrics["kl_to_reference"] > 0.5 * metrics["mean_length"]:
            say("Warning: the policy is over half a nat per token away from its reference; raise --beta")
        if metrics["clipped_ratio"] > 0.5:
            say("Warning: most completions are cut off; raise --max-completion-length")
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
    # KTO draws single completions, and twice as many of them.
    size = 1 if args.loss == "kto" else 2
    count, per_step = len(data.prompts) // size, args.batch_size * 2 // size
    say(
        f"{count:,} {'pairs' if size == 2 else 'completions'}, {args.max_steps * per_step / count:.1f} passes"
    )
    progress = tqdm(
        total=args.max_steps, initial=first - 1, unit=" steps", disable=None if rank == 0 else True
    )
    last_line = -math.inf

    for step in range(first, args.max_steps + 1):
        start = time.perf_counter()
        rate = min(step / max(args.warmup_steps, 1), 1)
        if args.anneal_lr and step > args.warmup_steps:
            rate = 1 - 0.95 * (step - args.warmup_steps) / max(args.max_steps - args.warmup_steps, 1)
        optimizer.param_groups[0]["lr"] = args.learning_rate * rate
        positions = range((step - 1) * per_step, step * per_step)
        units = [shuffled(args.seed, i // count, count)[i % count] for i in positions]
        with precision:
            metrics = take_step(model, optimizer, data, units, args)
        if not math.isfinite(metrics["grad_norm"]):
            raise SystemExit(
                f"grad_norm is {metrics['grad_norm']} at step {step:,}; lower --learning-rate. "
                f"{run} keeps the last checkpoint"
            )
        seconds = time.perf_counter() - start
        elapsed += seconds
        rows = [size * unit + i for unit in units for i in range(size)]
        tokens = sum(len(data.prompts[row]) + len(data.completions[row]) for row in rows)
        num_tokens += tokens
        metrics |= {"learning_rate": args.learning_rate * rate, "epoch": step * per_step / count}
        log(metrics | {"num_tokens": num_tokens}, step)
        log({"time/elapsed": elapsed, "perf/tokens_per_second": tokens / seconds}, step)
        last = step == args.max_steps
        if args.eval_interval and (last or step % args.eval_interval == 0):
            log_evaluation(step)
        if last or step % args.checkpoint_interval == 0:
            save(step)
        progress.set_postfix_str(f"loss {metrics['loss']:.3f}", refresh=False)
        progress.update()
        if rank == 0 and progress.disable and (last or time.perf_counter() - last_line > 10):
            last_line = time.perf_counter()
            print(
                f"step {step:>5,}: loss {metrics['loss']:.3f}, {tokens / seconds:,.0f} tokens/s", flush=True
            )

    progress.close()
    if rank == 0:
        writer.close()
        export(model, tokenizer, eos_ids, run / "model")
        if args.track:
            wandb.finish()


@lru_cache(2)  # the pass that ends in a step and the one that begins in it
def shuffled(seed: int, epoch: int, count: int) -> list[int]:
    """The order of the data in a pass."""
    return random.Random(f"{seed} {epoch}").sample(range(count), count)


def evaluate_run(args: Args, device: torch.device) -> None:
    """Prints the metrics of a run on its held-out prompts."""
    state, path = load_checkpoint(args.evaluate), Path(args.evaluate)
    saved = dataclasses.replace(Args(**state["args"]), eval_prompts=args.eval_prompts)
    run = path if path.is_dir() else path.parent
    task = None if saved.dataset else Reviews(saved.seed)
    reference, (model, tokenizer, eos_ids) = Transformer.from_pretrained(run / "reference"), make_model(saved)
    reference.to(device)
    model.load_state_dict(state["model"])
    with torch.autocast(device.type, torch.bfloat16, saved.bf16 and has_bfloat16(device)):
        _, held_out = read_data(reference, tokenizer, task, eos_ids, saved, run)
        saved = dataclasses.replace(saved, seed=args.seed)
        metrics, _ = evaluate(model.to(device), reference, tokenizer, task, held_out, eos_ids, saved)
    values = ", ".join(f"{name} {value:.3f}" for name, value in metrics.items())
    print(f"{saved.task_name}: {values} over {len(held_out.prompts)} prompts")


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
    if args.batch_size % world:
        raise SystemExit(f"batch_size = {args.batch_size} must be a multiple of {world} processes")
    if min(args.eval_prompts, args.sft_batch_size) < world:
        raise SystemExit(f"eval_prompts and sft_batch_size must be at least {world}, one per process")

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
