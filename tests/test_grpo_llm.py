"""grpo_llm.py, against transformers, against TRL's formulas, plain definitions and hand-worked numbers."""

import copy
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
import tracemalloc
from contextlib import nullcontext
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import transformers
from helpers import REPOSITORY, checkpoint_difference, read_curves, run_script, run_two_processes, start
from test_ppo_continuous_runs import flags, kill_when, nth_evaluation, refusal

import grpo_llm as grpo

SCRIPT = "grpo_llm.py"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# ----------------------------------------------------------------------------------------------- model

SHAPE = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
SHAPE |= {"initializer_range": 0.3, "pad_token_id": None, "bos_token_id": None, "eos_token_id": 1}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
MODELS = {
    "llama": ("Llama", {}),
    "llama-all-heads": ("Llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-2}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 12}),
    "llama-llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3-untied": ("Qwen3", {"head_dim": 8, "attention_bias": True}),
}


def make_peer(name: str, folder: Path, **options):
    """A model of transformers with random weights, biases and norms too; its folder."""
    family, changes = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**SHAPE | changes)
    peer = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for x in peer.parameters():
            if x.ndim == 1:
                x += 0.3 * torch.randn_like(x)
    peer.save_pretrained(folder, **options)
    return peer


def random_tokens(*shape: int) -> torch.Tensor:
    return torch.randint(2, SHAPE["vocab_size"], shape)


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name, tmp_path):
    """Read from one file and written back, past the original context of scaled positions."""
    peer = make_peer(name, tmp_path / "peer")
    model = grpo.Transformer.from_pretrained(tmp_path / "peer")
    tokens = random_tokens(3, 100)
    with torch.no_grad():
        expected = peer(tokens).logits
        assert expected.std() > 0.5
        torch.testing.assert_close(model(tokens), expected, atol=1e-4, rtol=1e-4)
        model.save_pretrained(tmp_path / "saved")
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        assert type(again) is type(peer)
        torch.testing.assert_close(again(tokens).logits, expected, atol=1e-5, rtol=1e-5)
    assert len(list(model.parameters())) == len(list(peer.parameters()))


def test_sharded_files_and_old_configs_are_read(tmp_path):
    peer = make_peer("llama-llama3", tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    for left_out in ("head_dim", "tie_word_embeddings", "hidden_act"):
        del config[left_out]
    file.write_text(json.dumps(config))
    tokens = random_tokens(2, 50)
    with torch.no_grad():
        logits = grpo.Transformer.from_pretrained(tmp_path)(tokens)
        torch.testing.assert_close(logits, peer(tokens).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "llama, mistral, qwen2, qwen3"),
        ({"hidden_act": "gelu"}, "activations other than silu"),
        ({"use_sliding_window": True}, "sliding windows"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "yarn"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": None}, "linear"),
        ({"rope_parameters": {"rope_theta": 9.0, "partial_rotary_factor": 0.5}}, "rotary positions"),
        ({"num_hidden_layers": 3}, "Missing key"),
        ({"hidden_size": None}, "Cannot read a model"),
    ],
)
def test_models_that_are_not_supported_are_named(changes, message, tmp_path):
    make_peer("llama", tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    assert message in refusal(grpo.Transformer.from_pretrained, tmp_path)


def test_missing_model_files_are_named(tmp_path):
    assert "config.json" in refusal(grpo.Transformer.from_pretrained, tmp_path)
    make_peer("llama", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    assert str(tmp_path) in refusal(grpo.Transformer.from_pretrained, tmp_path)


@pytest.fixture(params=["llama", "qwen2", "qwen3"])
def model(request) -> grpo.Transformer:
    config = SHAPE | {"model_type": request.param, "head_dim": 10, "rope_theta": 100.0}
    return grpo.Transformer(config)


def random_sequences(count: int = 9, longest: int = 30) -> list[tuple[list[int], list[int]]]:
    """Prompts, of which some follow themselves, with a completion of each."""
    lengths = torch.randint(1, longest, (2, count)).tolist()
    prompts, completions = ([random_tokens(n).tolist() for n in row] for row in lengths)
    prompts[1] = prompts[2] = prompts[0]
    prompts[6] = prompts[5]
    return [*zip(prompts, completions)]


@pytest.mark.parametrize("longest", [4, 30, 120])
def test_log_probs_of_packed_sequences_are_those_of_each_alone(model, longest, monkeypatch):
    """Values and gradients, with sequences that are short against the width of a row, and longer than it."""
    monkeypatch.setattr(grpo, "PACKED_WIDTH", 40)
    sequences = random_sequences(longest=longest)
    weights = torch.randn(9, max(len(completion) for _, completion in sequences))
    expected = torch.zeros_like(weights)
    for i, (prompt, completion) in enumerate(sequences):
        row = torch.tensor([prompt + completion])
        log_probs = (model(row)[0, len(prompt) - 1 : -1] / 0.7).log_softmax(-1)
        expected[i, : len(completion)] = log_probs.gather(1, row[0, len(prompt) :, None])[:, 0]
    found = grpo.completion_log_probs(model, sequences, 0.7)
    assert not found[expected == 0].any()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
    gradients = [torch.autograd.grad((x * weights).sum(), [*model.parameters()]) for x in (found, expected)]
    for x, y in zip(*gradients, strict=True):
        torch.testing.assert_close(x, y, atol=1e-3, rtol=1e-3)
    order = torch.randperm(9).tolist()
    again = grpo.completion_log_probs(model, [sequences[i] for i in order], 0.7)
    torch.testing.assert_close(again, expected[order], atol=1e-4, rtol=1e-5)


def test_pack_by_hand(monkeypatch):
    monkeypatch.setattr(grpo, "PACKED_WIDTH", 8)
    device = torch.device("cpu")
    prompts, completions = [[9, 8], [9, 8], [9, 8], [7]], [[1, 2], [3], [4, 5, 6, 1], [2]]
    packed = grpo.pack([*zip(prompts, completions)], device)
    assert packed.tokens.tolist() == [[9, 8, 1, 2, 3, 0, 0, 0], [9, 8, 4, 5, 6, 1, 7, 2]]
    assert packed.positions.tolist() == [[0, 1, 2, 3, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5, 0, 1]]
    assert packed.targets.tolist() == [1, 2, 3, 4, 5, 6, 1, 2] + [0] * 56
    assert packed.predictors.tolist() == [1, 2, 1, 9, 10, 11, 12, 14] + [0] * 56
    sees = [[{i for i in range(8) if query[i]} for query in row] for row in packed.visible]
    assert sees[0] == [{0}, {0, 1}, {0, 1, 2}, {0, 1, 2, 3}, {0, 1, 4}, {5}, {5, 6}, {5, 6, 7}]
    assert sees[1] == [*({*range(i + 1)} for i in range(6)), {6}, {6, 7}]


def test_packed_rows_are_as_few_as_the_lengths_allow():
    """16 completions of each of 8 prompts, as in training."""
    prompts = [[2 + i] * 9 for i in range(8) for _ in range(16)]
    completions = [[1] * n for n in torch.randint(15, 33, (128,)).tolist()]
    tokens = grpo.pack([*zip(prompts, completions)], torch.device("cpu")).tokens
    assert tokens.shape[1] == grpo.PACKED_WIDTH
    rows = tokens[tokens.any(1)]
    assert len(tokens) % 2 == 0 and len(tokens) - len(rows) < 2
    assert (rows == 1).sum() == sum(map(len, completions))
    assert (rows > 0).float().mean() > 0.85
    assert (rows > 1).sum() < 9 * (len(rows) + 8)  # a prompt once in a row
    assert grpo.pack([([1] * 600, [2] * 99)], torch.device("cpu")).tokens.shape == (1, 704)


def test_chunks_of_the_head_and_checkpointing_change_nothing(model, monkeypatch):
    sequences = random_sequences()

    def results():
        model.zero_grad()
        log_probs = grpo.completion_log_probs(model, sequences, 1.3)
        log_probs.square().sum().backward()
        return [log_probs.detach(), *(p.grad.clone() for p in model.parameters())]

    expected = results()
    monkeypatch.setattr(grpo, "HEAD_ELEMENTS", 61 * 5)
    model.gradient_checkpointing = True
    for x, y in zip(results(), expected, strict=True):
        torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)


# --------------------------------------------------------------------------------------------- sampler


def plain_generate(model, prompt: list[int], uniforms: torch.Tensor, eos: list[int], temperature: float):
    """Token by token, with the whole row read anew each time; log-probabilities of the sampled tokens."""
    row, log_probs = list(prompt), []
    for u in uniforms:
        with torch.no_grad():
            distribution = (model(torch.tensor([row]))[0, -1].double() / (temperature or 1)).log_softmax(-1)
        if temperature:
            token = int((distribution.exp().cumsum(0) <= u.item()).sum())
        else:
            token = int(distribution.argmax())
        row.append(token)
        log_probs.append(distribution[token].item())
        if token in eos:
            break
    return row[len(prompt) :], log_probs


@pytest.mark.parametrize("temperature", [1.0, 0.6, 0.0])
def test_sampler_is_the_plain_loop(model, temperature):
    """Prompts of several lengths, with groups; rows that end early leave the batch and change no other."""
    prompts = [random_tokens(n).tolist() for n in (2, 7, 4)]
    uniforms, eos = torch.rand(3, 60, 13), [1, 5, 6, 7, 8, 9, 10, 11]
    model.eos_ids = eos
    out = grpo.generate(model, prompts, uniforms, temperature)
    lengths = set()
    for i in range(0, 180, 7):
        tokens, log_probs = plain_generate(
            model, prompts[i // 60], uniforms.flatten(0, 1)[i], eos, temperature
        )
        n = len(tokens)
        lengths.add(n)
        assert out.tokens[i] == tokens
        assert out.finished[i].item() == (tokens[-1] in eos)
        assert not out.log_probs[i, n:].any()
        np.testing.assert_allclose(out.log_probs[i, :n], log_probs, rtol=1e-5, atol=1e-5)  # float32
    if temperature:  # so many rows have ended that the others went on in a smaller batch
        assert sum(len(tokens) <= 12 for tokens in out.tokens) > 64
    assert temperature == 0 or len(lengths) > 3


def test_rows_of_the_sampler_are_frozen():
    """Rows for one seed, as sampled before the sampler was rewritten in spans for GPUs."""
    config = SHAPE | {"model_type": "llama", "initializer_range": 0.4, "max_position_embeddings": 64}
    torch.manual_seed(7)
    model = grpo.Transformer(config)
    model.eos_ids = {1, 2, 3}
    out = grpo.generate(model, [[5, 9], [7, 8, 6, 30]], torch.rand(2, 4, 12), 0.9)
    assert [" ".join(map(str, row)) for row in out.tokens] == [
        "27 17 39 27 17 0 10 23 5 6 30 23",
        "49 6 50 18 27 47 18 27 49 19 37 40",
        "50 6 56 17 4 56 13 23 60 35 29 6",
        "17 19 7 27 10 57 29 4 22 3",
        "59 19 4 38 6 55 4 0 49 7 38 4",
        "59 16 18 40 1",
        "59 27 53 18 10 21 23 25 13 18 49 25",
        "30 10 42 12 58 54 26 6 3",
    ]
    sums = [-27.5241, -22.4513, -29.1895, -19.992, -27.3785, -11.8565, -19.3411, -21.4131]
    np.testing.assert_allclose(out.log_probs.sum(1), sums, atol=1e-3)


@pytest.mark.parametrize("size", [61, 4096, 4097, 5120, 20_011])  # from 4,097 on in two levels
def test_pick_finds_the_interval_of_each_number(size):
    """Against a running sum in float64, with stretches of tokens that have no probability."""
    weights = (3 * torch.randn(200, size)).exp()
    weights[:, 10 : size // 2] *= torch.rand(200, size // 2 - 10) < 0.1
    weights[:50, : size // 3] = 0
    weights[50:100, -size // 3 :] = 0
    uniforms = torch.rand(200, 1)
    uniforms[::10], uniforms[5::10] = 0, 1 - 2**-24
    chosen = grpo.pick(weights, uniforms)
    assert chosen.shape == (200, 1) and (weights.gather(1, chosen) > 0).all()
    ends = (weights.double() / weights.double().sum(1, keepdim=True)).cumsum(1)
    start = torch.nn.functional.pad(ends, (1, 0)).gather(1, chosen)
    # The bounds are as exact as a sum in float32; at 0 and 1 they are moved inwards by 1e-6.
    assert (uniforms > start - 4e-6).all() and (uniforms < ends.gather(1, chosen) + 4e-6).all()


def make_groups(model, prompts: list[list[int]], uniforms: torch.Tensor, temperature: float = 1.0) -> list:
    """Groups as the script samples them, without texts and rewards."""
    out, G = grpo.generate(model, prompts, uniforms, temperature), uniforms.shape[1]
    parts = [[x[i * G : (i + 1) * G] for x in out] for i in range(len(prompts))]
    return [grpo.Group(prompt, grpo.Completions(*part), [], {}) for prompt, part in zip(prompts, parts)]


def test_log_probs_of_sampler_and_trainer_are_equal(model):
    args, model.eos_ids = grpo.Args(max_completion_length=13), [1, 2, 3, 4]
    prompts = [random_tokens(n).tolist() for n in (2, 7, 4)]
    for temperature in (1.0, 0.7):
        groups = make_groups(model, prompts, torch.rand(3, 8, 13), temperature)
        batch = grpo.make_batch(groups, torch.arange(24.0).view(3, 8), None, args)
        # The token that ends a completion is in the loss.
        assert batch.mask.sum(1).tolist() == [len(completion) for _, completion in batch.sequences]
        rows = torch.randperm(24)[:20]
        part = batch.select(rows)
        assert torch.equal(part.advantages, rows.float()) and part.reference_log_probs is None
        log_probs = grpo.completion_log_probs(model, part.sequences, temperature)
        assert log_probs.shape == part.mask.shape == part.old_log_probs.shape
        assert (log_probs - part.old_log_probs)[part.mask].abs().max() < 1e-5
        for i in (0, 9, 23):
            assert batch.sequences[i] == (prompts[i // 8], groups[i // 8].completions.tokens[i % 8])


def test_frequencies_of_tokens_follow_the_distribution(model):
    prompt, n = random_tokens(5).tolist(), 20_000
    out = grpo.generate(model, [prompt], torch.rand(1, n, 1), 1.5)
    with torch.no_grad():
        expected = (model(torch.tensor([prompt]))[0, -1] / 1.5).softmax(-1) * n
    counts = torch.bincount(torch.tensor(out.tokens)[:, 0], minlength=len(expected))
    chi2 = ((counts - expected).square() / expected.clamp(min=1)).sum()
    assert chi2 < 61 + 4 * math.sqrt(2 * 61)


def test_extreme_uniform_numbers_give_tokens_that_have_probability(model):
    uniforms = torch.tensor([0.0, 1 - 2**-24]).expand(2, 4, 2)
    with torch.no_grad():
        model.lm_head.weight[-30:] = 0
        model.lm_head.weight *= 1000
    out = grpo.generate(model, [[3], [4, 5]], uniforms)
    assert (out.log_probs > -20).all() and max(map(max, out.tokens)) < 61


def test_masking_of_truncated_completions(model):
    model.eos_ids = list(range(1, 12))
    groups = make_groups(model, [[3], [4, 5]], torch.rand(2, 16, 4))
    finished = torch.cat([group.completions.finished for group in groups])
    assert 0 < finished.sum() < 32
    args = grpo.Args(max_completion_length=4, mask_truncated_completions=True)
    batch = grpo.make_batch(groups, torch.zeros(2, 16), None, args)
    lengths = torch.tensor([len(completion) for _, completion in batch.sequences])
    assert torch.equal(batch.mask.sum(1), lengths * finished)


def test_kl_of_an_evaluation_counts_truncated_completions_too():
    args, task = grpo.Args(max_completion_length=3, eval_prompts=8, eval_samples=2), grpo.Arithmetic()
    policy, reference = grpo.make_model(task, args), grpo.make_model(task, args)
    found = []
    for masked in (False, True):
        args.mask_truncated_completions = masked
        metrics, _ = grpo.evaluate(
            policy, nullcontext(reference), task, args, MagicMock(precision=nullcontext())
        )
        assert metrics["clipped_ratio"] > 0.5 and metrics["kl_to_reference"] != 0
        found.append(metrics["kl_to_reference"])
    assert found[0] == found[1]


# ------------------------------------------------------------------------------------- advantages, loss


def test_group_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [3.0, 1.0, 1.0, 1.0]], dtype=torch.float64)
    expected = {
        "dr_grpo": [[0.5, -0.5, -0.5, 0.5], [1.5, -0.5, -0.5, -0.5]],
        "rloo": [[2 / 3, -2 / 3, -2 / 3, 2 / 3], [2, -2 / 3, -2 / 3, -2 / 3]],
        "grpo": [
            [x / (math.sqrt(1 / 3) + 1e-4) for x in (0.5, -0.5, -0.5, 0.5)],
            [1.5 / 1.0001, *[-0.5 / 1.0001] * 3],
        ],
    }
    e = math.e
    expected["softmax"] = [
        [e / (2 * e + 2) - 0.25, 1 / (2 * e + 2) - 0.25, 1 / (2 * e + 2) - 0.25, e / (2 * e + 2) - 0.25],
        [e**3 / (e**3 + 3 * e) - 0.25, *[e / (e**3 + 3 * e) - 0.25] * 3],
    ]
    for kind, values in expected.items():
        torch.testing.assert_close(grpo.group_advantages(rewards, kind), torch.tensor(values).double())
    hot = grpo.group_advantages(rewards, "softmax", temperature=2.0)
    torch.testing.assert_close(hot, (2 * rewards).softmax(1) - 0.25)
    others = (rewards.sum(1, keepdim=True) - rewards) / 3
    torch.testing.assert_close(grpo.group_advantages(rewards, "rloo"), rewards - others)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo", "softmax"])
def test_equal_rewards_have_no_advantage(kind):
    rewards = torch.tensor([0.1, 0.7, -1 / 3]).repeat_interleave(7).view(3, 7)
    assert not grpo.group_advantages(rewards, kind).any()
    rewards[0, 0] += 1e-3
    assert (grpo.group_advantages(rewards, kind) != 0).any(1).tolist() == [True, False, False]


def inputs(B: int = 5, T: int = 7) -> dict:
    """A batch in float64 with ratios on both sides of each bound; one row with a single token."""
    old = -2 * torch.rand(B, T, dtype=torch.float64)
    log_probs = (old + 0.4 * torch.randn(B, T, dtype=torch.float64)).requires_grad_()
    lengths = torch.tensor([7, 3, 1, 5, 6, 2, 4, 7][:B])
    return {
        "log_probs": log_probs,
        "old_log_probs": old,
        "reference_log_probs": old + 0.3 * torch.randn(B, T, dtype=torch.float64),
        "advantages": torch.tensor([1.5, -0.5, 0.7, -1.0, 0.2, -0.3, 0.0, 1.0], dtype=torch.float64)[:B],
        "mask": torch.arange(T) < lengths[:, None],
    }


def plain_loss(x: dict, *, loss, clip_low, clip_high, beta, kl, max_completion_length):
    """TRL's formulas (1.16), one token after the other."""
    B, totals, means, lengths = len(x["advantages"]), [], [], x["mask"].sum(1).tolist()
    for i in range(B):
        A, n = x["advantages"][i], lengths[i]
        log_ratio = x["log_probs"][i] - x["old_log_probs"][i]
        tokens = []
        for t in range(n):
            r = (log_ratio[:n].mean() if loss == "gspo" else log_ratio[t]).exp()
            if loss == "cispo":
                value = -min(r.item(), clip_high) * A * x["log_probs"][i, t]
            else:
                value = -torch.minimum(r * A, r.clamp(1 - clip_low, 1 + clip_high) * A)
            d = x["reference_log_probs"][i, t] - x["log_probs"][i, t]
            value = value + beta * {"k1": -d, "k2": d**2 / 2, "k3": d.exp() - d - 1}[kl]
            tokens.append(value)
        totals.append(sum(tokens))
        means.append(sum(tokens) / n)
    if loss in ("grpo", "gspo"):
        return sum(means) / B
    return sum(totals) / (B * max_completion_length if loss == "dr_grpo" else sum(lengths))


@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
@pytest.mark.parametrize("loss", grpo.CLIP_RANGES)
def test_policy_loss_and_gradient_are_the_formulas(loss, kl):
    low, high = grpo.CLIP_RANGES[loss] if loss != "cispo" else (0.2, 1.1)
    settings = {"loss": loss, "clip_low": low, "clip_high": high, "beta": 0.3, "kl": kl}
    settings |= {"max_completion_length": 11}
    x = inputs()
    value, metrics = grpo.policy_loss(**x, **settings)
    expected = plain_loss(x, **settings)
    torch.testing.assert_close(value, expected)
    gradients = [torch.autograd.grad(y, x["log_probs"])[0] for y in (value, expected)]
    torch.testing.assert_close(*gradients)
    assert not gradients[0][~x["mask"]].any() and gradients[0][x["mask"]].any()
    # What is under the mask may be anything; empty rows and columns change nothing.
    filled = {name: y.detach().clone() for name, y in x.items()}
    for name in ("log_probs", "old_log_probs", "reference_log_probs"):
        filled[name][~x["mask"]] = math.nan if name == "old_log_probs" else -77.0
        filled[name] = torch.nn.functional.pad(filled[name], (0, 3, 0, 1), value=5.0)
    filled["mask"] = torch.nn.functional.pad(x["mask"], (0, 3, 0, 1))
    filled["advantages"] = torch.nn.functional.pad(x["advantages"], (0, 1), value=9.0)
    torch.testing.assert_close(grpo.policy_loss(**filled, **settings)[0], value.detach())
    for mask in (x["mask"].float(), x["mask"].double()):
        torch.testing.assert_close(grpo.policy_loss(**x | {"mask": mask}, **settings)[0], value)


GOLDENS = Path(__file__).parent / "goldens" / "grpo_trl.json"


def golden_inputs() -> tuple[dict, dict[str, dict]]:
    """Numbers that do not depend on a generator, and the settings of each loss."""
    grid = torch.arange(40, dtype=torch.float64).view(5, 8)
    old = -1 - torch.sin(1.7 * grid)
    x = {
        "log_probs": (old + 0.4 * torch.cos(2.3 * grid)).requires_grad_(),
        "old_log_probs": old,
        "reference_log_probs": old + 0.3 * torch.sin(3.1 * grid),
        "advantages": torch.tensor([1.5, -0.5, 0.7, -1.0, 0.2], dtype=torch.float64),
        "mask": torch.arange(8) < torch.tensor([8, 3, 1, 5, 6])[:, None],
    }
    common = {"beta": 0.1, "max_completion_length": 9}
    ranges = grpo.CLIP_RANGES | {"gspo": (0.01, 0.02), "cispo": (0.2, 1.2)}
    return x, {
        loss: {"loss": loss, "clip_low": low, "clip_high": high} | common
        for loss, (low, high) in ranges.items()
    }


def trl_loss(x: dict, settings: dict) -> torch.Tensor:
    """The method of TRL's trainer, called with a stand-in for the trainer; a private interface, of 1.16."""
    from trl import GRPOTrainer

    loss, mask = settings["loss"], x["mask"].double()
    trainer = MagicMock()
    trainer._get_per_token_logps_and_entropies.return_value = (x["log_probs"], torch.zeros_like(mask), None)
    trainer.importance_sampling_level = "sequence" if loss == "gspo" else "token"
    trainer.loss_type = "grpo" if loss == "gspo" else loss
    trainer.epsilon_low, trainer.epsilon_high = settings["clip_low"], settings["clip_high"]
    trainer.beta, trainer.max_completion_length = settings["beta"], settings["max_completion_length"]
    trainer.top_entropy_quantile, trainer.off_policy_mask_threshold = 1.0, None
    trainer.use_vllm = trainer._entropy_bonus_enabled = trainer.aux_loss_enabled = False
    trainer.args.use_bias_correction_kl, trainer.args.delta, trainer.args.steps_per_generation = (
        False,
        None,
        1,
    )
    trainer.current_gradient_accumulation_steps = trainer.accelerator.num_processes = 1
    trainer.accelerator.gather.side_effect = lambda y: y
    trainer.accelerator.reduce.side_effect = lambda y, **_: y
    batch = {"prompt_ids": torch.zeros(5, 1), "prompt_mask": torch.ones(5, 1), "completion_ids": mask}
    batch |= {"completion_mask": mask, "advantages": x["advantages"], "num_items_in_batch": mask.sum()}
    batch |= {"old_per_token_logps": x["old_log_probs"], "ref_per_token_logps": x["reference_log_probs"]}
    return GRPOTrainer._compute_loss(trainer, None, batch)


def with_gradient(value: torch.Tensor, x: dict) -> dict:
    return {"loss": value.item(), "gradient": torch.autograd.grad(value, x["log_probs"])[0].tolist()}


@pytest.mark.parametrize("loss", grpo.CLIP_RANGES)
def test_losses_are_those_of_trl(loss):
    """Values and gradients; frozen, made with TRL 1.16.0 by this file run as a script."""
    x, settings = golden_inputs()
    expected = json.loads(GOLDENS.read_text())[loss]
    found = with_gradient(grpo.policy_loss(**x, **settings[loss])[0], x)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-9)
    np.testing.assert_allclose(found["gradient"], expected["gradient"], rtol=1e-9, atol=1e-12)


def test_losses_by_hand():
    """Two rows of 2 tokens and 1, ratios 2, 1 and 1/2; token by token on paper."""
    log_probs = torch.tensor([[math.log(2), 0.0], [-math.log(2), 0.0]], requires_grad=True)
    mask, advantages = torch.tensor([[1, 1], [1, 0]]), torch.tensor([1.0, -2.0])
    expected = {
        "grpo": (-(1.2 + 1) / 2 + 1.6) / 2,
        "dr_grpo": (-(1.2 + 1) + 1.6) / (2 * 4),
        "dapo": (-(1.28 + 1) + 1.6) / 3,
        "gspo": (-1.0004 + 2 * (1 - 3e-4)) / 2,
        "cispo": (-2 * math.log(2) - 0 + 2 * 0.5 * -math.log(2)) / 3,
    }
    for loss, value in expected.items():
        low, high = grpo.CLIP_RANGES[loss]
        zeros = torch.zeros(2, 2)
        settings = {"clip_low": low, "clip_high": high, "beta": 0.0, "max_completion_length": 4}
        total, metrics = grpo.policy_loss(log_probs, zeros, None, advantages, mask, loss=loss, **settings)
        assert total.item() == pytest.approx(value, rel=1e-5), loss
        clipped = {"gspo": (1 / 3, 2 / 3), "cispo": (0, 0)}.get(loss, (1 / 3, 1 / 3))
        found = metrics["clip_ratio/low_mean"], metrics["clip_ratio/high_mean"]
        np.testing.assert_allclose(found, clipped, rtol=1e-6)
        assert metrics["clip_ratio/region_mean"].item() == pytest.approx(sum(clipped))
        assert "kl" not in metrics


@pytest.mark.parametrize("loss", grpo.CLIP_RANGES)
def test_parts_of_a_batch_add_up_to_it(loss):
    """Losses, gradients and metrics, with the counts of the whole."""
    x = inputs(8)
    settings = {"loss": loss, "clip_low": 0.1, "clip_high": 0.2, "beta": 0.1, "max_completion_length": 9}
    whole, metrics = grpo.policy_loss(**x, **settings)
    (expected,) = torch.autograd.grad(whole, x["log_probs"])
    counts = {"token_count": x["mask"].sum(), "sequence_count": 8}
    parts = []
    for rows in (slice(0, 1), slice(1, 5), slice(5, 8)):
        part = {name: y[rows] for name, y in x.items()}
        parts.append(grpo.policy_loss(**part, **settings, **counts))
    total = sum(value for value, _ in parts)
    torch.testing.assert_close(total, whole)
    torch.testing.assert_close(torch.autograd.grad(total, x["log_probs"])[0], expected)
    for name, value in metrics.items():
        torch.testing.assert_close(sum(part[name] for _, part in parts), value)


def test_kl_estimates():
    """Their mean over a whole distribution is the KL for k1 and k3; each is 0 where the policies agree."""
    policy, reference = torch.randn(2, 9, dtype=torch.float64).mul(0.3).log_softmax(-1)
    kl = (policy.exp() * (policy - reference)).sum()
    for kind, close in (("k1", 1e-12), ("k3", 1e-12), ("k2", 0.02)):
        mean = (policy.exp() * grpo.kl_estimate(policy, reference, kind)).sum()
        assert abs(mean - kl) < close * max(1, kl), kind
        assert not grpo.kl_estimate(policy, policy, kind).any()
    assert (grpo.kl_estimate(policy, reference, "k3") >= 0).all()
    far = grpo.kl_estimate(torch.tensor([-200.0, 0.0]), torch.tensor([0.0, -200.0]), "k3")
    assert far.isfinite().all()


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("loss", grpo.CLIP_RANGES)
def test_micro_batches_change_nothing(model, loss, beta, monkeypatch):
    """One step of the optimizer, with rows of many lengths, some of them without an advantage."""
    model.eos_ids = [1, 2, 3, 4]
    groups = make_groups(model, [random_tokens(n).tolist() for n in (2, 7, 4)], torch.rand(3, 8, 13))
    advantages = torch.randn(3, 8) * (torch.rand(3, 8) < 0.6)
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for p in reference.parameters():
            p += 0.02 * torch.randn_like(p)
    results = []
    for size in (24, 5):
        args = grpo.Args(loss=loss, beta=beta, micro_batch_size=size, max_completion_length=13)
        batch = grpo.make_batch(groups, advantages, nullcontext(reference) if beta else None, args)
        batch = batch._replace(old_log_probs=batch.old_log_probs + 0.1 * torch.sin(torch.arange(13)))
        gradients = []
        monkeypatch.setattr(
            grpo,
            "optimizer_step",
            lambda *a, out=gradients: out.extend(p.grad.clone() for p in a[0].parameters()) or 1.0,
        )
        model.zero_grad()
        metrics = grpo.take_step(model, None, batch, args)
        if size == 24:  # the plain formula on all rows
            log_probs, low_high = grpo.completion_log_probs(model, batch.sequences), args.clip_range
            settings = dict(zip(("clip_low", "clip_high"), low_high), beta=beta, max_completion_length=13)
            columns = batch.select(torch.arange(24))[1:]
            _, mask, _, old_log_probs, reference_log_probs = columns
            loss_value, _ = grpo.policy_loss(
                log_probs,
                old_log_probs,
                reference_log_probs,
                advantages.flatten(),
                mask,
                loss=loss,
                **settings,
            )
            results.append(list(torch.autograd.grad(loss_value, list(model.parameters()))))
            assert metrics["loss"] == pytest.approx(loss_value.item(), abs=1e-5)
        results.append(gradients)
    for one in results[1:]:
        for x, y in zip(one, results[0], strict=True):
            torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-3)


# ------------------------------------------------------------------------------------- rewards and tasks


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("<think>5+7=12</think><answer>852</answer>", "852"),
        (" <think></think>\n <answer> 852 </answer>\n", "852"),
        ("<think>a</think><answer></answer>", ""),
        ("<think>a</think><answer>852</answer>.", None),
        ("<think>a</think><answer>1</answer><answer>852</answer>", None),
        ("<think><think>a</think><answer>852</answer>", None),
        ("<answer>852</answer><think></think>", None),
        ("<think></think>852", None),
        ("852", None),
        ("", None),
    ],
)
def test_format(completion, answer):
    assert grpo.tagged_answer(completion) == answer
    assert grpo.format_reward([""], [completion]) == [float(answer is not None)]


def test_numbers():
    half = Fraction(1, 2)
    good = {
        "852": 852,
        "-1,234.50": Fraction(-2469, 2),
        "$7": 7,
        " 007 ": 7,
        "-$5": -5,
        "$-5": -5,
        "1/2": half,
    }
    good |= {"50%": half, ".5": half, "-.5": -half, "$.50": half, "-10/4": -5 * half, "12,345,678": 12345678}
    good |= {"12.5%": half / 4, "-1/2%": -half / 100, "1/02": half, "$1,000.00": 1000, "-0": 0}
    for text, value in good.items():
        assert grpo.parse_number(text) == value, text
        # The lenient score finds it between words, commas and full stops.
        assert grpo.last_number(f"7 so it is {text}, I think.") == text.strip()
    bad = [
        "",
        "1e3",
        "0x10",
        "٣",
        "1_000",
        "nan",
        "--1",
        "1.",
        "1 2",
        "9" * 50,
        None,
        "½",
        "1\x00",
        "1/0",
        ".",
    ]
    bad += ["1,2", "1,2345", ",123", "1,,234", "8$52", "5$", "-$-5", "$", "%", "-", "1/2/3", "1/-2", "1/2.5"]
    bad += ["50%%", "1.5/2", "1,234/2,", "٣/٣", "1 /2", "/2", "$$5", "1.2.3", "5e", "."]
    for text in bad:
        assert grpo.parse_number(text) is None, text
    assert grpo.last_number("so 3 and <answer>x = 1,852. </answer>") == "1,852"
    assert grpo.last_number("it is 3, no, 12") == "12" and grpo.last_number("nothing") is None


HOSTILE = ["9" * 2_000_000, "(" * 1_000_000, "<think>" * 200_000, "<answer>" * 200_000, "\x00" * 1000]
HOSTILE += ["<think></think>" * 100_000, " " * 1_000_000, "-,." * 300_000, "٣" * 100_000, "1/" * 40 + "0"]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: text[:8])
def test_hostile_completions_cost_little_and_gain_nothing(text):
    for completion in (text, f"<think></think><answer>{text}</answer>", f"<answer>{text}"):
        for reward in (grpo.number_reward, grpo.Arithmetic.lenient):
            seconds = []
            for _ in range(3):
                begin = time.perf_counter()
                value = reward([""], [completion], answer=["9"])
                seconds.append(time.perf_counter() - begin)
            assert value == [0.0] and min(seconds) < 0.002


def test_generated_task():
    """Held-out prompts never come up in training; all can be written in the vocabulary; some are solved."""
    task = grpo.Arithmetic()
    tokenizer = grpo.make_tokenizer(task.vocabulary)
    train = [grpo.draw(task, 3, i) for i in range(-200, 200)]
    held_out = [grpo.draw(task, 3, i, held_out=True) for i in range(100)]
    assert train[7] == grpo.draw(task, 3, -193) and train[7] != grpo.draw(task, 4, -193)
    assert held_out == [grpo.draw(task, 4, i, held_out=True) for i in range(100)]
    assert not {x["prompt"] for x in train} & {x["prompt"] for x in held_out}
    assert all(grpo.is_held_out(x["prompt"]) for x in held_out)
    assert not any(grpo.is_held_out(x["prompt"]) for x in train)
    rng = random.Random(0)
    texts = [task.demonstration(problem, rng) for problem in train]
    ids = tokenizer([x + "<eos>" for x in texts], add_special_tokens=False)["input_ids"]
    assert tokenizer.batch_decode(ids, skip_special_tokens=True) == texts
    assert max(map(len, ids)) <= task.max_completion_length
    assert all(x[-1] == tokenizer.eos_token_id for x in ids)
    rewards = grpo.score(task, train, texts)
    assert rewards["format"].all() and 0.2 < rewards["correctness"].mean() < 0.7
    torch.testing.assert_close(rewards["reward"], rewards["correctness"] + 0.5 * rewards["format"])
    prompts = tokenizer([x["prompt"] for x in train])["input_ids"]
    assert all(x[0] == tokenizer.bos_token_id and tokenizer.unk_token_id not in x for x in prompts)


def test_lenient_score():
    texts = ["the answer is 1,852.", "<think></think><answer>852</answer>", "nothing"]
    assert grpo.Arithmetic.lenient([""] * 3, texts, answer=["1852", "852", "0"]) == [1, 1, 0]


def test_arithmetic_demonstrations_are_right_without_slips():
    class Careful(random.Random):
        def random(self):
            return 0.99

    task = grpo.Arithmetic()
    for a, b in ((365, 487), (999, 999), (100, 100), (905, 95 + 9)):
        problem = {"prompt": f"{a}+{b}=", "answer": str(a + b)}
        assert grpo.tagged_answer(task.demonstration(problem, Careful())) == str(a + b)
    text = task.demonstration({"prompt": "365+487=", "answer": "852"}, Careful())
    assert text == "<think>5+7=12\n6+8+1=15\n3+4+1=8</think><answer>852</answer>"


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def make_dataset(folder: Path, rows: list[dict] | str, template: str | None = None, **changes):
    """A dataset from rows or the text of a file, for the model of the arithmetic task."""
    path = folder / "a.jsonl"
    path.write_text(rows) if isinstance(rows, str) else write_rows(path, rows)
    args = grpo.Args(**{"dataset": str(path), "model": "x", "hidden_size": 16} | changes)
    model = grpo.make_model(grpo.Arithmetic(), args)
    model.tokenizer.chat_template = template
    return grpo.Dataset(grpo.make_task(args), model, args, MagicMock())


def problems_of(task) -> list[dict]:
    """All problems of a dataset, those that are held out last."""
    return [task.draw(1, i, out) for out in (False, True) for i in range(len(task.parts[out]))]


def test_dataset(tmp_path):
    rows = [{"question": f"q{i}", "answer": f"because 1 + 2\n#### {i},000"} for i in range(200)]
    task = make_dataset(tmp_path, rows)
    held_out = [row["question"] for row in rows if grpo.is_held_out(row["question"])]
    count = 200 - len(held_out)
    assert len(task.parts[True]) == len(held_out)
    assert 5 < len(held_out) < 40
    passes = [[grpo.draw(task, 1, p * count + i)["prompt"] for i in range(count)] for p in range(2)]
    assert sorted(passes[0]) == sorted(passes[1]) and passes[0] != passes[1]
    assert not {*passes[0]} & {*held_out}
    assert grpo.draw(make_dataset(tmp_path, rows), 1, count + 3)["prompt"] == passes[1][3]
    assert grpo.draw(task, 1, 3, held_out=True)["prompt"] == held_out[3]
    problem = grpo.draw(task, 1, 0)
    right = f"<think></think><answer>{problem['prompt'][1:]}000</answer>"
    assert grpo.score(task, [problem] * 2, [right, "x"])["correctness"].tolist() == [1, 0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"question": "a", "result": "1"}\n', "more than half; the columns are question, result"),
        ('{"question": "a", "answer": "x"}\n' * 20, "20 without a number as the answer (row 1, 2, 3)"),
        ("[1]\n", "1 that are no JSON objects (row 1). That is more than half; the columns are unknown"),
        ('{"question": "a", "answer": "1"}\n{no\n\xff\n', "2 that are no JSON in UTF-8 (row 2, 3)"),
        ("", "too few rows of use"),
        ('{"question": "a", "answer": "1"}\n', "too few rows"),
        (None, "No such file"),
    ],
)
def test_bad_datasets_are_named(content, message, tmp_path):
    if content is None:
        assert message in refusal(lambda: [*grpo.read_rows(str(tmp_path / "a.jsonl"))])
    else:
        assert message in refusal(make_dataset, tmp_path, content)


def test_a_file_may_hold_one_array_of_rows(tmp_path, capsys):
    rows = [{"question": "a", "answer": 1}, {"question": "b"}, 5]
    path = tmp_path / "a.json"
    path.write_text(f"\n {json.dumps(rows, indent=1)}")
    assert [*grpo.read_rows(str(path))] == rows
    path.write_text("\n".join(json.dumps(row) for row in rows))
    assert [json.loads(line) for line in grpo.read_rows(str(path))] == rows
    path.write_text('[{"question": "a"')
    assert "Cannot read the dataset" in refusal(lambda: [*grpo.read_rows(str(path))])


def test_rows_of_no_use_are_dropped_and_counted(tmp_path, capsys):
    rows = [{"question": f"q{i}", "answer": i, "level": i % 3} for i in range(100)]
    bad = [
        {"question": None, "answer": 1},
        {"question": " ", "answer": 1},
        {"answer": 1},
        {"question": ["a"]},
    ]
    bad += [{"question": "a", "answer": "four"}, {"question": "a", "answer": None}, {"question": "b"}]
    bad += [{"question": "1+2" * 300, "answer": 2}]
    task = make_dataset(tmp_path, [*rows[:50], *bad, *rows[50:]])
    assert len(task.parts[True]) + len(task.parts[False]) == 100
    output = capsys.readouterr().out
    assert "Dropped of the 108 rows of" in output and "3 without text in question (row 51, 52, 53)" in output
    assert "1 with a message that lacks a role or a content (row 54)" in output
    assert "3 without a number as the answer (row 55, 56, 57)" in output
    assert "1 too long for the context, or without any token (row 58)" in output
    problem = grpo.draw(task, 1, 0)
    assert problem["level"] == int(problem["answer"]) % 3  # other columns are there for rewards


def test_conversations_are_taken_as_they_are(tmp_path):
    chat = [[{"role": "system", "content": "1+"}, {"role": "user", "content": f"{i}="}] for i in range(60)]
    rows = [{"question": messages, "answer": i + 1} for i, messages in enumerate(chat)]
    task = make_dataset(tmp_path, rows, "{% for m in messages %}{{ m['content'] }}{% endfor %}")
    problem = grpo.draw(task, 1, 5)
    i = int(problem["answer"]) - 1
    assert problem["prompt"] == f"1+\n{i}=" and problem["messages"] == problem["question"] == chat[i]
    model = grpo.make_model(grpo.Arithmetic(), grpo.Args())
    model.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert model.decode(grpo.encode_prompts(model, [problem], 9)) == [f"1+{i}="]
    assert "60 that the chat template refuses (Cannot use" in refusal(make_dataset, tmp_path, rows)


def test_an_evaluation_file_of_its_own(tmp_path):
    """All rows of the dataset are learned from then, and all of the other file are held out."""
    rows = [{"question": f"{i}=", "answer": i} for i in range(60)]
    path = write_rows(tmp_path / "eval.jsonl", [{"question": "7+", "answer": 8}, {"question": "8+"}, rows[0]])
    task = make_dataset(tmp_path, rows, eval_dataset=path)
    assert len(task.parts[False]) == 60
    found = [grpo.draw(task, 1, i, held_out=True) for i in range(2)]
    assert [x["prompt"] for x in found] == ["7+", "0="] and len(task.parts[True]) == 2
    path = write_rows(tmp_path / "eval.jsonl", [{"question": "7+"}, {"question": "8+"}, rows[0]])
    message = refusal(make_dataset, tmp_path, rows, eval_dataset=path)
    assert "eval.jsonl: 2 without a number" in message and "more than half" in message


ROLES = "{% for m in messages %}{{ m['role'][0] }}({{ m['content'] }}){% endfor %}"


def test_system_prompt_and_instruction(tmp_path):
    """Text gets both, a conversation the system prompt, unless it has one; rewards see the row as it is."""
    chats = [
        [{"role": "user", "content": "55="}],
        [{"role": "system", "content": "own"}, {"role": "user", "content": "66="}],
    ]
    rows = [{"question": f"{i}=", "answer": i, "hint": i * 2} for i in range(40)]
    rows += [{"question": chat, "answer": 5 + i} for i, chat in enumerate(chats)]

    def asked(prompt: str, **changes) -> tuple[dict, str]:
        args = {"system_prompt": "add", "instruction": "now"} | changes
        task = make_dataset(tmp_path, rows, template=ROLES, **args)
        problem = next(x for x in problems_of(task) if x["prompt"] == prompt)
        written = []
        task.model.encode = lambda texts, special_tokens: written.extend(texts) or [[2]] * len(texts)
        grpo.encode_prompts(task.model, [problem], 1)
        return problem, written[0]

    problem, text = asked("7=")
    assert text == "s(add)u(7= now)" and problem["question"] == "7=" and problem["hint"] == 14
    assert asked("7=", instruction="")[1] == "s(add)u(7=)"
    assert asked("7=", system_prompt=None)[1] == "u(7= now)"
    assert asked("7=", system_prompt=None, instruction=grpo.INSTRUCTION)[1] == f"u(7= {grpo.INSTRUCTION})"
    assert asked("55=")[1] == "s(add)u(55=)" and asked("own\n66=")[1] == "s(own)u(66=)"
    assert [chat[0]["role"] for chat in chats] == ["user", "system"]  # the rows are not changed
    # Whether a problem is held out is a matter of its row.
    tasks = [
        make_dataset(tmp_path, rows, template=ROLES, **args)
        for args in ({}, {"system_prompt": "add", "instruction": "now"})
    ]
    splits = [[x["prompt"] for x in problems_of(task)[-len(task.parts[True]) :]] for task in tasks]
    assert splits[0] == splits[1] and splits[0]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", "leaves out"),
        ("{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}", "(no system)"),
        (None, "40 whose system prompt the chat template leaves out"),
    ],
)
def test_a_system_prompt_that_does_not_arrive_is_named(template, message, tmp_path):
    rows = [{"question": f"{i}=", "answer": i} for i in range(40)]
    assert message in refusal(make_dataset, tmp_path, rows, template=template, system_prompt="add")


def test_answers_for_rewards_of_ones_own(tmp_path, own_module):
    """Any text arrives whole, and so does what is no text; a number as in GSM8K arrives alone."""
    answers = ["Paris", "# A\n#### B and C", None, ["a", 1], "so 5\n#### 1,005", 7, True, "", {"a": "b"}]
    rows = [{"question": f"{i}=", "answer": answers[i % 9], "level": i} for i in range(90)]
    rows += [{"question": "no answer"}]
    task = make_dataset(tmp_path, rows, reward=["digits:nothing=0", "digits:correctness"])
    problems = problems_of(task)
    assert len(problems) == 91
    found = {x["prompt"]: x["answer"] for x in problems}
    assert [found[f"{i}="] for i in range(9)] == answers[:4] + ["1,005", "7"] + answers[6:]
    # A column that few rows have is there in all of them.
    assert all(grpo.draw(task, 1, i).keys() >= {"level", "answer", "prompt"} for i in range(60))
    assert "40 without a number" in refusal(
        make_dataset, tmp_path, [row | {"answer": "Paris"} for row in rows[:40]]
    )


def test_columns_with_the_names_of_the_reward_are_left_out(tmp_path):
    rows = [
        {"question": f"{i}=", "answer": i, "completions": 1, "prompts": 2, "prompt": 3} for i in range(40)
    ]
    task = make_dataset(tmp_path, rows)
    problem = grpo.draw(task, 1, 0)
    right = f"<think></think><answer>{problem['answer']}</answer>"
    assert grpo.score(task, [problem], [right])["correctness"].tolist() == [1]
    assert problem["prompt"] == problem["question"]


def test_datasets_of_the_hub_are_named_with_configuration_and_split(monkeypatch):
    calls, rows = [], [{"question": "a", "answer": 1}]
    hub = SimpleNamespace(load_dataset=lambda *words, split: calls.append((*words, split)) or rows)
    monkeypatch.setitem(sys.modules, "datasets", hub)
    for name in ("a/b", "a/b:c", "a/b:c:test", "a/b::test"):
        assert [*grpo.read_rows(name)] == rows
    assert calls == [
        ("a/b", None, "train"), ("a/b", "c", "train"), ("a/b", "c", "test"), ("a/b", None, "test")
    ]  # fmt: skip


@pytest.mark.parametrize(("count", "size", "times"), [(9000, 20, 3), (1500, 400, 2)])
def test_a_dataset_takes_little_memory_and_is_read_in_parts(count, size, times, tmp_path):
    """Peak of Python's memory, as so many times the file; the tokenizer's is not in it."""
    rng = random.Random(0)
    rows = [{"question": "".join(rng.choices("0123456789+", k=size)), "answer": i} for i in range(count)]
    path = Path(write_rows(tmp_path / "a.jsonl", rows))
    args = grpo.Args(dataset=str(path), model="x", hidden_size=16, instruction="")
    model = grpo.make_model(grpo.Arithmetic(), args)
    rows = None
    tracemalloc.start()
    task = grpo.Dataset(grpo.make_task(args), model, args, MagicMock())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(map(len, task.parts.values())) == count
    assert peak < times * path.stat().st_size


def test_huge_rows_are_dropped_without_being_tokenized(tmp_path, capsys):
    rows = [{"question": f"{i}=", "answer": i} for i in range(40)]
    begin = time.perf_counter()
    task = make_dataset(tmp_path, [{"question": "1+" * 10**6, "answer": 1}, *rows])
    assert time.perf_counter() - begin < 2 and sum(map(len, task.parts.values())) == 40
    assert "1 too long for the context" in capsys.readouterr().out


def test_a_file_of_another_kind_is_no_dataset_of_the_hub(tmp_path):
    (tmp_path / "a.csv").write_text("question,answer\n")
    message = refusal(lambda: [*grpo.read_rows(str(tmp_path / "a.csv"))])
    assert message.endswith("a.csv is none of .jsonl, .json and .parquet")


# --------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_steps": 0}, "max_steps must lie in [1, inf), got 0"),
        ({"num_generations": 1}, "num_generations must lie in [2, inf), got 1"),
        ({"micro_batch_size": 0}, "micro_batch_size must lie in [1, inf)"),
        ({"hidden_size": 100, "num_heads": 3}, "hidden_size = 100 must be a multiple of 2 x num_heads = 6"),
        ({"learning_rate": math.nan}, "learning_rate must lie in (0, inf), got nan"),
        ({"learning_rate": math.inf}, "learning_rate must lie in (0, inf), got inf"),
        ({"temperature": 0.0}, "temperature must lie in (0, inf)"),
        ({"beta": -0.1}, "beta must lie in [0, inf)"),
        ({"epsilon": 0.0}, "epsilon must lie in (0, inf)"),
        ({"max_completion_length": 0}, "max_completion_length must lie in [1, inf)"),
        ({"seed": -1}, "seed must lie in [0, 4294967296)"),
        ({"resume": "a", "evaluate": "b"}, "resume, evaluate and run_name exclude each other"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    with pytest.raises(ValueError) as error:
        grpo.Args(**changes)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "a.jsonl"}, "give --model too"),
        ({"eval_dataset": "a.jsonl"}, "belong to a dataset"),
        ({"system_prompt": "a"}, "belong to a dataset"),
    ],
)
def test_flags_of_a_dataset_that_lack_one_are_named(changes, message, tmp_path):
    assert message in refusal(train, tmp_path, **changes)
    assert not [*tmp_path.iterdir()]


def test_minibatches_divide_the_prompts(tmp_path):
    message = refusal(train, tmp_path, num_prompts=6, num_minibatches=4)
    assert "num_prompts = 6 must be a multiple of 1 processes x 4 minibatches" in message


def test_an_evaluation_file_needs_a_run_with_a_dataset(finished_run):
    args = grpo.parse_args(["--evaluate", str(finished_run), "--eval-dataset", "a.jsonl"])
    assert "belong to a dataset" in refusal(grpo.main, args)


def test_each_loss_has_its_own_clip_range():
    assert grpo.Args(loss="gspo").clip_range == (3e-4, 4e-4)
    assert grpo.Args(loss="dapo", epsilon=0.1).clip_range == (0.1, 0.28)
    assert grpo.parse_args("--loss cispo --epsilon-high 3 --no-anneal-lr".split()).clip_range == (0.2, 3.0)


# -------------------------------------------------------------------------------------------- short runs

TINY = {"hidden_size": 48, "num_layers": 1, "num_heads": 2, "sft_steps": 120, "sft_batch_size": 16}
TINY |= {"num_prompts": 8, "num_generations": 8, "max_steps": 6, "checkpoint_interval": 2, "eval_interval": 2}
TINY |= {"eval_prompts": 8, "eval_samples": 2, "micro_batch_size": 24, "temperature": 1.2, "bf16": False}


def train(folder: Path, **changes) -> Path:
    return grpo.main(grpo.Args(**TINY | {"runs": str(folder)} | changes))


def resume(run: Path, *words: str) -> None:
    grpo.main(grpo.parse_args(["--resume", str(run), *words]))


def curves_of(run: Path) -> dict:
    """What is logged, but for clocks and texts."""
    curves = read_curves(run)
    return {tag: x for tag, x in curves.items() if not re.match("time/|perf/|samples", tag)}


def assert_same_run(run: Path, reference: Path) -> None:
    assert checkpoint_difference(*map(grpo.load_checkpoint, (run, reference))) is None
    assert curves_of(run) == curves_of(reference)
    assert (run / "samples.jsonl").read_text() == (reference / "samples.jsonl").read_text()


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory) -> Path:
    """A run that nobody changes."""
    return train(tmp_path_factory.mktemp("runs"))


def test_what_is_logged(finished_run):
    assert re.fullmatch(r"arithmetic__grpo_llm__1__\d{8}-\d{6}", finished_run.name)
    saved = json.loads((finished_run / "args.json").read_text())
    assert grpo.Args(**saved) == grpo.Args(**TINY | {"runs": str(finished_run.parent)})
    curves = curves_of(finished_run)
    dense = "reward reward_std rewards/correctness/mean rewards/format/mean frac_reward_zero_std entropy "
    dense += (
        "completions/mean_length completions/clipped_ratio learning_rate num_tokens updates sampled_prompts"
    )
    updates = "loss grad_norm clip_ratio/low_mean clip_ratio/high_mean clip_ratio/region_mean "
    updates += "logp_difference/mean logp_difference/max"
    evaluations = "pass@1 pass@2 greedy_pass@1 accuracy_lenient mean_length clipped_ratio kl_to_reference"
    assert {*curves} == {*dense.split(), *updates.split(), "sft/loss", "sft/grad_norm"} | {
        f"eval/{name}" for name in evaluations.split()
    }
    assert all(list(curves[tag]) == [1, 2, 3, 4, 5, 6] for tag in dense.split())
    assert all(list(curves[f"eval/{tag}"]) == [0, 2, 4, 6] for tag in evaluations.split())
    assert list(curves["sft/loss"]) == list(range(-110, 1, 10))
    assert all(math.isfinite(x) for curve in curves.values() for x in curve.values())
    assert max(curves["logp_difference/max"].values()) < 1e-4
    assert sum(curves["updates"].values()) >= 6
    assert curves["eval/kl_to_reference"][0] == pytest.approx(0, abs=1e-4)
    rates = [0.2, 0.4, 0.6, 0.8, 1, 0.05]
    np.testing.assert_allclose(list(curves["learning_rate"].values()), 5e-4 * np.array(rates), rtol=1e-5)
    samples = [json.loads(line) for line in (finished_run / "samples.jsonl").read_text().splitlines()]
    assert [x["step"] for x in samples] == sorted([0, 2, 4, 6] * 8)


def test_exported_model_is_read_by_transformers_and_by_the_script(finished_run, tmp_path):
    folder = finished_run / "model"
    peer = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer("123+456=", return_tensors="pt")["input_ids"]
    weights = grpo.load_checkpoint(finished_run)["model"]
    model = grpo.Transformer.from_pretrained(folder)
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())
    with torch.no_grad():
        torch.testing.assert_close(peer(tokens).logits, model(tokens), atol=1e-4, rtol=1e-4)
    run = train(tmp_path, model=str(folder), max_steps=1)
    assert "sft/loss" not in curves_of(run) and grpo.load_checkpoint(run)["step"] == 1


CHAT_TEMPLATE = "{% for m in messages %}({{ m['content'][:5] }}){% endfor %}"  # characters of the vocabulary


def make_chat_model(finished_run: Path, folder: Path) -> str:
    model = grpo.read_model(finished_run / "model")
    model.tokenizer.chat_template = CHAT_TEMPLATE
    model.save_pretrained(folder)
    return str(folder)


def test_dataset_with_a_chat_template(finished_run, tmp_path):
    rows = [{"q": f"{a}+{b}=", "a": a + b} for a in range(10, 30) for b in range(5)]
    folder, data = make_chat_model(finished_run, tmp_path / "model"), tmp_path / "sums.jsonl"
    write_rows(data, rows)
    changes = {"dataset": str(data), "prompt_column": "q", "answer_column": "a", "max_completion_length": 9}
    run = train(tmp_path / "runs", model=folder, max_steps=2, beta=0.1, dynamic_sampling=1, **changes)
    assert run.name.startswith("sums__grpo_llm__1__")
    curves = curves_of(run)
    assert curves["sampled_prompts"][1] == 16  # nothing is right, so a second round was sampled in vain
    assert all(x <= 9 for x in curves["completions/mean_length"].values()) and "kl" in curves
    model = grpo.read_model(folder)
    ids = grpo.encode_prompts(model, [{"prompt": "", "question": "12+3= and so on"}], 9)
    assert model.tokenizer.batch_decode(ids) == ["(12+3=)"] and model.eos_ids == {
        model.tokenizer.eos_token_id
    }
    message = refusal(train, tmp_path, model=folder, **changes | {"max_completion_length": 1020})
    assert "100 too long for the context" in message and "more than half" in message

    resume(run, "--max-steps", "3")
    assert grpo.load_checkpoint(run)["step"] == 3


def test_prompts_that_leave_no_room_are_named(finished_run, tmp_path):
    message = refusal(train, tmp_path, model=str(finished_run / "model"), max_completion_length=1020)
    assert "exceeds the context of 1024" in message


def test_evaluate_prints_the_metrics(finished_run, capsys):
    grpo.main(
        grpo.parse_args(["--evaluate", str(finished_run), "--eval-prompts", "8", "--eval-samples", "2"])
    )
    logged = curves_of(finished_run)["eval/pass@1"][6]
    assert f"step     6: evaluation pass@1 {logged:.3f}, pass@2" in capsys.readouterr().out


def test_killed_run_equals_an_uninterrupted_one(finished_run, tmp_path, capsys):
    """Killed without notice between checkpoints, then resumed."""
    process = start(SCRIPT, *flags(**TINY, runs=tmp_path / "killed"), cwd=tmp_path)
    kill_when(process, nth_evaluation(3), delay=0.02)
    (run,) = (tmp_path / "killed").iterdir()
    resume(run)
    assert "Resumed at step" in capsys.readouterr().out
    assert_same_run(run, finished_run)


def test_the_same_command_goes_on_after_sigterm(finished_run, tmp_path):
    """As on a cluster that requeues a job: terminated in the warm-up, and again after it."""
    words = [*flags(**TINY, runs=tmp_path), "--run-name", "mine", "--checkpoint-minutes", "0.003"]
    run = tmp_path / "mine"
    for in_warm_up in (True, False):
        process = start(SCRIPT, *words, cwd=tmp_path)
        if in_warm_up:  # which is quiet when it is short, but saves
            while not (run / "checkpoint.pt").exists():
                time.sleep(0.01)
        else:
            evaluated = nth_evaluation(1)  # of this process
            next(line for line in process.stdout if evaluated(line))
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
        assert process.returncode != 0 and f"--resume {run}" in output
        assert (-120 < grpo.load_checkpoint(run)["step"] < 0) == in_warm_up
    code, output = run_script(SCRIPT, *words, cwd=tmp_path)
    assert code == 0 and "Resumed at step" in output
    states = [grpo.load_checkpoint(x) for x in (run, finished_run)]
    for state in states:
        del state["args"]["checkpoint_minutes"]
    assert checkpoint_difference(*states) is None
    assert curves_of(run) == curves_of(finished_run)
    assert (run / "samples.jsonl").read_text() == (finished_run / "samples.jsonl").read_text()


def test_interrupted_run_with_all_that_has_state(tmp_path, monkeypatch, capsys):
    """A reference that moves on, dynamic sampling, several passes."""
    settings = {"beta": 0.05, "ref_model_sync_steps": 2, "dynamic_sampling": 2, "num_iterations": 2}
    settings |= {"loss": "gspo", "advantages": "grpo", "bf16": True}
    reference = train(tmp_path / "reference", **settings)
    assert curves_of(reference)["kl"].keys() == {*range(1, 7)}
    judge, left = grpo.group_advantages, iter(range(4))

    def interrupted(*arguments):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return judge(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(grpo, "group_advantages", interrupted)
        message = refusal(train, tmp_path / "interrupted", **settings)
    (run,) = (tmp_path / "interrupted").iterdir()
    assert f"python grpo_llm.py --resume {run}" in message
    resume(run)
    assert "Resumed at step 4" in capsys.readouterr().out
    assert_same_run(run, reference)


def test_dynamic_sampling_replaces_groups_whose_answers_are_all_alike(finished_run):
    """Here those of even problems; where too few are found, the first of the others fill up the batch."""

    class Odd(grpo.Arithmetic):
        rewards = {
            "correctness": (
                lambda prompts, **_: [int(p[2]) % 2 * (i % 2) for i, p in enumerate(prompts)],
                1.0,
            ),
            "format": (lambda prompts, **_: [float(i % 2) for i in range(len(prompts))], 1.0),
        }

    model, task = grpo.read_model(finished_run / "model"), Odd()
    for rounds in (0, 1, 20):
        changes = {"num_prompts": 8, "num_generations": 4, "max_completion_length": 5}
        args = grpo.Args(dynamic_sampling=rounds, **changes)
        groups, sampled = grpo.collect_rollout(model, task, 40, args)
        drawn = [grpo.draw(task, 1, i) for i in range(40, 40 + sampled)]
        odd = [i for i, x in enumerate(drawn) if int(x["prompt"][2]) % 2]
        even = [i for i, x in enumerate(drawn) if not int(x["prompt"][2]) % 2]
        assert sampled in range(8, 8 * rounds + 9, 8) and (rounds < 20 or len(odd) >= 8)
        kept = [drawn[i]["prompt"] for i in ((odd + even)[:8] if sampled > 8 else range(8))]
        assert [model.decode([group.prompt])[0] for group in groups] == kept
        assert all(group.rewards["correctness"].shape == (4,) for group in groups)
        assert all(len(tokens) <= 5 for group in groups for tokens in group.completions.tokens)


def test_bfloat16_and_gradient_checkpointing(finished_run, tmp_path):
    run = train(
        tmp_path, model=str(finished_run / "model"), bf16=True, gradient_checkpointing=True, max_steps=2
    )
    state, curves = grpo.load_checkpoint(run), curves_of(run)
    assert all(x.dtype == torch.float32 for x in state["model"].values())
    assert curves["logp_difference/max"][1] < 0.3


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]


def test_two_processes_take_the_step_of_one(finished_run, tmp_path):
    """The first step from the same weights: completions, metrics, gradient and moved weights."""
    settings = TINY | {"model": str(finished_run / "model"), "max_steps": 1, "beta": 0.1, "eval_interval": 1}
    settings |= {"num_minibatches": 1, "learning_rate": 1e-3, "warmup_steps": 0}
    one = train(tmp_path / "one", **settings)
    command = [*TORCHRUN, "29517", str(REPOSITORY / SCRIPT), *flags(**settings, runs=tmp_path / "two")]
    variables = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    (two,) = (tmp_path / "two").iterdir()
    states = [grpo.load_checkpoint(run) for run in (one, two)]
    assert states[0]["position"] == states[1]["position"]
    first_moments = [[x["exp_avg"] for x in state["optimizer"]["state"].values()] for state in states]
    for x, y in zip(*first_moments, strict=True):  # a tenth of the gradient, whose norm is limited to 1
        torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-4)
    curves = [curves_of(run) for run in (one, two)]
    for tag in curves[0].keys() - {"logp_difference/max", "logp_difference/mean"}:
        assert [*curves[0][tag]] == [*curves[1][tag]]
        np.testing.assert_allclose(
            [*curves[0][tag].values()], [*curves[1][tag].values()], rtol=1e-3, atol=1e-4
        )


def test_warm_up_is_shared_by_processes(tmp_path):
    settings = TINY | {"sft_steps": 3, "max_steps": 1, "eval_interval": 0}
    one = train(tmp_path / "one", **settings)
    run_two_processes(SCRIPT, 29518, *flags(**settings, runs=tmp_path / "two"), cwd=tmp_path)
    (two,) = (tmp_path / "two").iterdir()
    weights = [grpo.Transformer.from_pretrained(run / "reference").state_dict() for run in (one, two)]
    for name, x in weights[0].items():
        torch.testing.assert_close(x, weights[1][name], atol=1e-4, rtol=1e-4)


# --------------------------------------------------------------------------------------- bad input to runs


def test_gradient_that_is_not_finite_ends_the_run(finished_run, tmp_path, monkeypatch):
    monkeypatch.setattr(grpo, "group_advantages", lambda rewards, *_: torch.full_like(rewards, math.nan))
    message = refusal(train, tmp_path, model=str(finished_run / "model"), checkpoint_interval=1)
    (run,) = tmp_path.iterdir()
    assert "is nan at step 1; lower --learning-rate" in message and str(run) in message
    state = grpo.load_checkpoint(run)
    assert state["step"] == 0 and all(x.isfinite().all() for x in state["model"].values())


def test_step_without_any_advantage_moves_nothing(finished_run, tmp_path, capsys):
    """All completions of a group are alike when the temperature is low; told, and no step of AdamW."""
    model = str(finished_run / "model")
    run = train(tmp_path, model=model, temperature=1e-4, max_steps=2)
    assert "nothing to learn from" in capsys.readouterr().out
    before = grpo.Transformer.from_pretrained(model).state_dict()
    assert all(torch.equal(x, before[name]) for name, x in grpo.load_checkpoint(run)["model"].items())


def test_damaged_and_foreign_checkpoints_are_refused(finished_run, tmp_path):
    (tmp_path / "args.json").write_text((finished_run / "args.json").read_text())
    (tmp_path / "checkpoint.pt").write_bytes((finished_run / "checkpoint.pt").read_bytes()[:5000])
    for flag in ("--resume", "--evaluate"):
        message = refusal(lambda flag=flag: grpo.main(grpo.parse_args([flag, str(tmp_path)])))
        assert "damaged" in message
    torch.save({"script": "ppo_discrete"}, tmp_path / "checkpoint.pt")
    assert "not a checkpoint of grpo_llm.py" in refusal(grpo.load_checkpoint, tmp_path)


def test_resume_keeps_to_the_arguments_of_the_run(finished_run):
    for flag, value in (("--loss", "gspo"), ("--num-prompts", "16")):
        message = refusal(grpo.parse_args, ["--resume", str(finished_run), flag, value])
        assert flag[2:].replace("-", "_") in message and value in message


def test_full_disk_ends_the_run_with_a_sentence(finished_run, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(grpo.torch, "save", full)
    message = refusal(train, tmp_path, model=str(finished_run / "model"))
    assert "is the disk full?" in message


def test_model_without_a_tokenizer_is_named(tmp_path):
    make_peer("llama", tmp_path / "peer")
    assert "a model from" in refusal(train, tmp_path / "runs", model=str(tmp_path / "peer"))


# ----------------------------------------------------------------------------- tasks and rewards of one's own

MODULE = """
Path("imported").touch()


def part_of_digits(completions, **_):
    return [sum(map(str.isdigit, completion)) / 8 for completion in completions]


def correctness(prompts, completions, answer, **_):
    return [float(completion == right) for completion, right in zip(completions, answer)]


def nothing(completions, **_):
    return [None for _ in completions]


def fault(completions, **_):
    return [1 / 0 for _ in completions]


class Digits:
    \"\"\"Pays for every digit, so that there is something to learn without a warm-up.\"\"\"

    rewards = {"correctness": (part_of_digits, 1.0)}
    max_completion_length = 8
    vocabulary = [*"0123456789=abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ+-*"]

    def problem(self, rng):
        return {"prompt": f"{rng.randrange(1000)}="}

    def demonstration(self, problem, rng):
        return "0"
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """A file of the user's in the folder where the script is started."""
    (tmp_path / "digits.py").write_text("from pathlib import Path\n" + MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "digits", raising=False)
    yield tmp_path
    sys.modules.pop("digits", None)


@pytest.mark.parametrize("advantages", ["grpo", "dr_grpo", "rloo", "softmax"])
def test_it_learns(advantages, own_module):
    """A task of the user's; by chance 10 of 69 characters are digits."""
    settings = {"sft_steps": 0, "max_steps": 25, "learning_rate": 3e-3, "temperature": 1.0}
    settings |= {"task": "digits:Digits", "eval_interval": 0, "advantages": advantages}
    run = train(own_module, **settings)
    curves = curves_of(run)
    assert run.name.startswith("digits__grpo_llm__1__")
    assert 0.1 < curves["reward"][1] < 0.2 and curves["reward"][25] > 0.6


def test_rewards_of_ones_own(finished_run, own_module):
    """They join those of the task; a name that is there gets another weight or another function."""
    rewards = ["digits:part_of_digits=0.5", "format=0.25"]
    task = grpo.make_task(grpo.Args(reward=rewards))
    assert list(task.rewards) == ["correctness", "format", "part_of_digits"]
    assert [weight for _, weight in task.rewards.values()] == [1.0, 0.25, 0.5]
    model = str(finished_run / "model")
    run = train(own_module / "runs", model=model, max_steps=1, reward=rewards)
    curves = curves_of(run)
    parts = [curves[f"rewards/{name}/mean"][1] for name in task.rewards]
    assert curves["reward"][1] == pytest.approx(parts[0] + 0.25 * parts[1] + 0.5 * parts[2], rel=1e-5)
    for bad, message in (
        ("digits:nothing", "The reward nothing must give one finite number for each completion"),
        ("digits:missing", "Cannot find digits:missing"),
        ("nowhere:reward", "Cannot find nowhere:reward"),
        ("forma=2", "--reward forma=2: there is no forma in"),
        ("format=much", "--reward format=much"),
    ):
        assert message in refusal(train, own_module / "runs", model=model, max_steps=1, reward=[bad])


def test_an_exception_of_a_reward_keeps_its_traceback(finished_run, own_module, capsys):
    settings = {"model": str(finished_run / "model"), "reward": ["digits:fault"]}
    with pytest.raises(ZeroDivisionError):
        train(own_module / "runs", **settings)
    assert "--reward digits:fault" in capsys.readouterr().out


def test_unknown_tasks_are_named(tmp_path):
    assert "There is no task Sums, only arithmetic" in refusal(train, tmp_path, task="Sums")
    assert "Cannot find json:Sums" in refusal(train, tmp_path, task="json:Sums")
    assert "json:JSONDecoder is not a task: it has no problem" in refusal(
        train, tmp_path, task="json:JSONDecoder"
    )
    assert not [*tmp_path.iterdir()]


def test_modules_named_by_a_run_are_imported_only_if_the_command_line_names_them(own_module):
    run = train(
        own_module / "runs", task="digits:Digits", reward=["digits:part_of_digits"], sft_steps=0, max_steps=1
    )
    (own_module / "imported").unlink()
    sys.modules.pop("digits")
    for flag in ("--resume", "--evaluate"):
        for words in ([], ["--task", "digits:Digits"], ["--reward", "digits:part_of_digits"]):
            message = refusal(grpo.parse_args, [flag, str(run), *words])
            assert "confirm" in message and "digits:" in message
    assert not (own_module / "imported").exists()
    words = ["--task", "digits:Digits", "--reward", "digits:part_of_digits"]
    grpo.main(grpo.parse_args(["--evaluate", str(run), *words, "--eval-prompts", "4"]))
    assert (own_module / "imported").exists()


if __name__ == "__main__":  # needs trl
    x, settings = golden_inputs()
    goldens = {loss: with_gradient(trl_loss(x, settings[loss]), x) for loss in settings}
    GOLDENS.write_text(json.dumps(goldens, indent=1))
