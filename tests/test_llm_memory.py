"""Memory of the scripts for language models, counted and measured; what they read and export; bfloat16."""

import json
import re
import shutil

import pytest
import torch
import transformers
from helpers import REPOSITORY
from safetensors.torch import load_file, save_file
from test_llm_adapters import SETTINGS, make_peer, train
from test_ppo_continuous_runs import refusal

import dpo_llm as dpo
import grpo_llm as grpo
from benchmark import memory


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# ------------------------------------------------------------------------------------------- by count


def test_counts_are_those_of_the_network(tmp_path):
    """And the sizes of Qwen2.5 those that its authors name."""
    shape = memory.Shape(32, 48, 2, True, 16, 61)
    make_peer("Qwen2", tmp_path)
    model = grpo.Transformer.from_pretrained(tmp_path)
    matrices = sum(x.numel() for x in model.parameters() if x.ndim == 2)
    assert shape.weights == shape.matrices == matrices
    args = grpo.Args(lora_rank=3)
    run = type("Workplace", (), {"device": torch.device("cpu"), "matrix_type": torch.float32})()
    grpo.add_adapters(model, args, run)
    assert shape.adapters(3) == sum(x.numel() for x in model.parameters())
    billions = {name: memory.Shape(**sizes).weights / 1e9 for name, sizes in memory.MODELS.items()}
    assert billions == pytest.approx({"0.5B": 0.494, "1.5B": 1.54, "3B": 3.09, "7B": 7.61}, rel=5e-3)


def test_what_has_to_fit_fits():
    """And the page shows the table as it is."""
    shapes = {name: memory.Shape(**sizes) for name, sizes in memory.MODELS.items()}
    for samples in (True, False):
        assert memory.needed(shapes["1.5B"], samples=samples).total < 48
        for name, card in (("1.5B", 24), ("3B", 24), ("7B", 48)):
            assert memory.needed(shapes[name], 16, samples=samples).total < card
    assert memory.needed(shapes["7B"]).total > 80
    assert memory.table() in (REPOSITORY / "docs" / "memory.md").read_text()


# ------------------------------------------------------------------------------------- limits in tokens


def test_micro_batches_have_limits_in_rows_and_tokens():
    sequences = [grpo.Sequence([1] * 3, [1] * length) for length in (5, 1, 2, 30, 4, 4, 4, 4, 4)]
    limits = grpo.Args(micro_batch_size=3, micro_batch_tokens=20)
    assert grpo.split(sequences, limits) == [[0, 1, 2], [3], [4, 5], [6, 7], [8]]
    assert dpo.split(sequences[1:], limits, 2) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    limits = grpo.Args(micro_batch_size=1, micro_batch_tokens=1)
    assert dpo.split(sequences[1:], limits, 2) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert grpo.split([], limits) == []


def test_sampling_in_parts_is_sampling_at_once(monkeypatch):
    args = grpo.Args(max_completion_length=8)
    model = grpo.make_model(grpo.Arithmetic(), args)
    prompts, uniforms = [[1, 5], [1, 6, 7], [1], [1, 9]], torch.rand(4, 3, 8)
    whole, shapes, function = grpo.generate(model, prompts, uniforms), [], grpo.generate

    def watched(model, prompts, uniforms, temperature):
        shapes.append((len(prompts), uniforms.shape[1]))
        return function(model, prompts, uniforms, temperature)

    monkeypatch.setattr(grpo, "generate", watched)
    for limits, expected in [
        ({}, [(4, 3)]),
        ({"micro_batch_size": 2}, [(2, 3), (2, 3)]),  # 8 rows
        ({"micro_batch_tokens": 9}, [(2, 3), (2, 3)]),  # 72 slots of 11 for a row
        ({"micro_batch_tokens": 1}, [(1, 3)] * 4),
    ]:
        shapes.clear()
        parts = grpo.sample(model, prompts, uniforms, grpo.Args(**limits))
        assert shapes == expected and parts.tokens == whole.tokens
        assert torch.equal(parts.finished, whole.finished)
        torch.testing.assert_close(parts.log_probs, whole.log_probs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_a_run_directory_never_holds_more_than_two_checkpoints_and_an_export(
    lora_rank, tmp_path, monkeypatch
):
    script, sizes, write = grpo, [], grpo.write_file

    def watched(path, content):
        write(path, content)
        folder = path.parent
        sizes.append(sum(x.stat().st_size for x in folder.glob("*.pt*")))
        assert not any(folder.glob("*.tmp"))

    base = script.main(script.Args(**SETTINGS[script] | {"runs": str(tmp_path / "base"), "max_steps": 1}))
    monkeypatch.setattr(grpo, "write_file", watched)
    changes = {"model": str(base / "model"), "lora_rank": lora_rank, "checkpoint_interval": 1}
    run = train(script, tmp_path / "run", **changes)
    assert max(sizes) <= 2 * (run / "checkpoint.pt").stat().st_size + 1000
    weights = sum(x.numel() for x in script.load_checkpoint(run)["model"].values())
    assert (run / "checkpoint.pt").stat().st_size < 12 * weights + 50_000  # weights and two moments


# ---------------------------------------------------------------------------------------------- bfloat16


def test_gspo_does_not_clip_on_rounding():
    """24 random layers and 128 tokens: no ratio differs from 1 before the first update."""
    if not grpo.has_bfloat16(torch.device("cpu")):
        pytest.skip("needs a CPU that multiplies bfloat16")
    config = {"model_type": "qwen2", "vocab_size": 512, "hidden_size": 128, "intermediate_size": 384}
    config |= {"num_hidden_layers": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = grpo.Transformer(config | {"max_position_embeddings": 256, "initializer_range": 0.15})
    model.eos_ids, outside, gap = {1}, {}, 0.0
    settings = {"num_prompts": 4, "num_generations": 8, "max_completion_length": 128, "micro_batch_size": 3}
    prompts = [torch.randint(512, (n,)).tolist() for n in (5, 33, 11, 20)]
    with torch.autocast("cpu", torch.bfloat16):
        out = grpo.generate(model, prompts, torch.rand(4, 8, 128))
        groups = [
            grpo.Group(prompt, grpo.Completions(*(x[8 * i : 8 * i + 8] for x in out)), [], {})
            for i, prompt in enumerate(prompts)
        ]
        advantages = torch.randn(4, 8) * (torch.rand(4, 8) < 0.8)
        for loss in ("gspo", "dapo"):
            args = grpo.Args(loss=loss, **settings)
            batch = grpo.make_batch(groups, advantages, None, args)
            low, high = args.clip_range
            for part in grpo.make_minibatches(model, batch, args):
                rows = grpo.rows_to_learn_from(part, args)
                for micro in grpo.split([part.sequences[i] for i in rows], args):
                    micro = part.select(rows[micro])
                    log_probs = grpo.completion_log_probs(model, micro.sequences).detach()
                    weights = micro.mask / micro.mask.sum(1, keepdim=True)
                    for name, old in (("old", micro.old_log_probs), ("sampler", micro.sampler_log_probs)):
                        ratio = (log_probs - old) * micro.mask
                        gap = max(gap, ratio.abs().max().item())
                        ratio = (ratio * weights).sum(1) if loss == "gspo" else ratio
                        found = (ratio.exp() < 1 - low) | (ratio.exp() > 1 + high)
                        outside[loss, name] = outside.get((loss, name), 0) + found.sum().item()
                    assert loss == "dapo" or torch.equal(log_probs, micro.old_log_probs)
    assert outside["gspo", "old"] == outside["dapo", "old"] == 0
    assert gap > 0  # sampler and trainer do round differently


def test_chunks_add_up_the_gradient_of_the_head_in_float32(monkeypatch):
    """64 chunks are as near to float64 as one: rounded sums would be 8 bits wide."""
    config = {"model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}
    config |= {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 128}
    model = grpo.Transformer(config | {"initializer_range": 0.3})
    sequences = [grpo.Sequence([1], torch.randint(64, (100,)).tolist()) for _ in range(40)]
    gradients, exact = [], grpo.Transformer(model.config).double()
    exact.load_state_dict(model.state_dict())
    for elements in (2**25, 64 * 64):
        monkeypatch.setattr(grpo, "HEAD_ELEMENTS", elements)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            grpo.completion_log_probs(model, sequences).mean().backward()
        gradients.append(model.lm_head.weight.grad)
    grpo.completion_log_probs(exact, sequences).mean().backward()
    errors = [(x - exact.lm_head.weight.grad).norm() for x in gradients]
    assert errors[1] < 1.1 * errors[0], errors


# --------------------------------------------------------------------------------------- reading, export


def test_export_has_the_type_and_the_settings_of_the_model(tmp_path):
    peer = make_peer("Qwen2", tmp_path / "base").to(torch.bfloat16)
    peer.generation_config.update(temperature=0.6, top_k=20, do_sample=True, eos_token_id=[1, 7])
    peer.save_pretrained(tmp_path / "base")
    model = grpo.Transformer.from_pretrained(tmp_path / "base")
    assert {x.dtype for x in model.parameters()} == {torch.float32} and model.eos_ids == {1, 7}
    model.save_pretrained(tmp_path / "saved")
    first, again = (load_file(tmp_path / x / "model.safetensors") for x in ("base", "saved"))
    assert first.keys() == again.keys()
    assert all(torch.equal(x, again[name]) and x.dtype == again[name].dtype for name, x in first.items())
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert loaded.dtype == torch.bfloat16
    files = [json.loads((tmp_path / x / "generation_config.json").read_text()) for x in ("base", "saved")]
    assert files[0] == files[1] and files[1]["temperature"] == 0.6


@pytest.mark.parametrize("script", [grpo, dpo], ids=lambda script: script.__name__)
def test_exports_at_intervals_with_a_model_card(script, tmp_path, monkeypatch):
    exported, export = [], script.Run.export
    monkeypatch.setattr(script.Run, "export", lambda run: exported.append(run.step) or export(run))
    settings = SETTINGS[script] | {"runs": str(tmp_path), "export_interval": 3, "lora_rank": 0}
    run = script.main(script.Args(**settings))
    assert exported == [3, 4]
    card = (run / "model" / "README.md").read_text()
    (notes,) = re.findall(r"^```json\n(.*?)\n```$", card, re.MULTILINE | re.DOTALL)
    notes = json.loads(notes)
    assert notes["script"] == f"{script.__name__}.py" and notes["arguments"]["bf16"] is False
    assert script.Args(**notes["arguments"]) == script.Args(**settings)
    assert "seed" not in notes["arguments"] and "kl_to_reference" in notes["evaluation"]
    assert notes["torch"] == torch.__version__ and notes["transformers"] == transformers.__version__
    assert "step 4" in card and card.startswith("---\n")
    first = transformers.AutoModelForCausalLM.from_pretrained(run / "model")
    shutil.rmtree(run / "model")  # as if the run had been killed before the export
    script.main(script.parse_args(["--resume", str(run)]))
    again = transformers.AutoModelForCausalLM.from_pretrained(run / "model")
    assert all(torch.equal(x, y) for x, y in zip(first.parameters(), again.parameters(), strict=True))


def test_head_of_its_own_in_a_tied_model_is_loaded(tmp_path):
    """As transformers does it."""
    make_peer("Qwen2", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in weights
    weights["lm_head.weight"] = torch.randn_like(weights["model.embed_tokens.weight"])
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    model = grpo.Transformer.from_pretrained(tmp_path)
    assert torch.equal(model.lm_head.weight, weights["lm_head.weight"])
    assert not torch.equal(model.model["embed_tokens"].weight, model.lm_head.weight)
    model.save_pretrained(tmp_path / "saved")
    tokens = torch.randint(2, 61, (2, 9))
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        torch.testing.assert_close(peer(tokens).logits, model(tokens), atol=1e-4, rtol=1e-4)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    model = grpo.Transformer.from_pretrained(tmp_path)
    assert model.lm_head.weight is model.model["embed_tokens"].weight


def test_other_formats_are_named(tmp_path):
    peer = make_peer("Llama", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(peer.state_dict(), tmp_path / "pytorch_model.bin")
    assert "no model*.safetensors; other formats" in refusal(grpo.Transformer.from_pretrained, tmp_path)


def test_logits_of_mistral_are_those_of_transformers(tmp_path):
    peer = make_peer("Mistral", tmp_path)
    model = grpo.Transformer.from_pretrained(tmp_path)
    tokens = torch.randint(2, 61, (2, 50))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), peer(tokens).logits, atol=1e-4, rtol=1e-4)
        model.save_pretrained(tmp_path / "saved")
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        torch.testing.assert_close(again(tokens).logits, model(tokens), atol=1e-4, rtol=1e-4)
    make_peer("Mistral", tmp_path / "window", sliding_window=8)
    assert "sliding windows" in refusal(grpo.Transformer.from_pretrained, tmp_path / "window")


def test_a_reference_that_moves_is_saved_and_others_are_not(tmp_path):
    settings = {"lora_rank": 0, "beta": 0.1, "max_steps": 3}
    run = train(grpo, tmp_path / "still", **settings)
    assert grpo.load_checkpoint(run)["reference"] == {}
    moved = train(grpo, tmp_path / "moved", **settings, ref_model_sync_steps=2)
    state = grpo.load_checkpoint(moved)
    assert state["reference"].keys() == state["model"].keys()
    assert not torch.equal(state["reference"]["lm_head.weight"], state["model"]["lm_head.weight"])
    first = grpo.Transformer.from_pretrained(moved / "reference").lm_head.weight
    assert not torch.equal(state["reference"]["lm_head.weight"], first)
