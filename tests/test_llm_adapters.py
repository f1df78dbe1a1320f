"""LoRA in the scripts for language models, against peft, plain matrix products and uninterrupted runs."""

import json
import signal
import time
from pathlib import Path

import pytest
import torch
import transformers
from helpers import checkpoint_difference, read_curves, run_two_processes, start
from test_ppo_continuous_runs import flags, refusal

import dpo_llm as dpo
import grpo_llm as grpo

SMALL = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "sft_steps": 60, "sft_batch_size": 16}
SMALL |= {"sft_learning_rate": 1e-2, "warmup_steps": 0, "learning_rate": 5e-3, "bf16": False}
SMALL |= {"max_steps": 4, "checkpoint_interval": 2, "eval_interval": 2, "eval_prompts": 16}
SMALL |= {"lora_rank": 4, "lora_alpha": 8.0}
SETTINGS = {
    grpo: SMALL | {"num_prompts": 8, "num_generations": 8, "eval_samples": 2, "temperature": 1.2},
    dpo: SMALL | {"num_pairs": 64, "batch_size": 8, "beta": 0.1},
}
SCRIPTS = pytest.mark.parametrize("script", SETTINGS, ids=lambda script: script.__name__)
FAMILIES = {"Llama": {}, "Qwen2": {"tie_word_embeddings": True}, "Qwen3": {"head_dim": 12}}
PEERS = FAMILIES | {"Mistral": {"sliding_window": None, "head_dim": 12}}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Workplace:
    """What the model needs of a Run."""

    device, matrix_type = torch.device("cpu"), torch.float32


def make_peer(family: str, folder: Path, **changes):
    """A model of transformers with random weights; its folder."""
    config = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config |= {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.3,
        "eos_token_id": 1,
    }
    config = getattr(transformers, f"{family}Config")(**config | PEERS[family] | changes)
    peer = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    peer.save_pretrained(folder)
    return peer


def adapted(script, folder: Path, rank: int = 3, matrix_type: torch.dtype = torch.float32):
    """The model of a folder with adapters that do something; arguments."""
    args, run = script.Args(lora_rank=rank, lora_alpha=6.0), Workplace()
    run.matrix_type = matrix_type
    model = script.Transformer.from_pretrained(folder, dtype=None)
    script.add_adapters(model, args, run)
    with torch.no_grad():
        for layer in model.modules():
            if hasattr(layer, "lora_B"):
                layer.lora_B.normal_(std=0.2)
    return model, args


def train(script, folder: Path, **changes) -> Path:
    return script.main(script.Args(**SETTINGS[script] | {"runs": str(folder)} | changes))


def the_run(folder: Path) -> Path:
    (run,) = folder.iterdir()
    return run


def curves_of(run: Path) -> dict:
    return {
        tag: x for tag, x in read_curves(run).items() if not tag.startswith(("time/", "perf/", "samples"))
    }


def assert_same_run(script, run: Path, reference: Path) -> None:
    assert checkpoint_difference(*map(script.load_checkpoint, (run, reference))) is None
    assert curves_of(run) == curves_of(reference)
    assert (run / "samples.jsonl").read_text() == (reference / "samples.jsonl").read_text()


@pytest.fixture(scope="module", params=SETTINGS, ids=lambda script: script.__name__)
def finished(request, tmp_path_factory) -> tuple:
    """A script, and a run of it that nobody changes."""
    return request.param, train(request.param, tmp_path_factory.mktemp("runs"))


# ------------------------------------------------------------------------------------------------- model


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_are_the_product_of_two_matrices_beside_each_weight(family, tmp_path):
    """Against transformers with W + alpha / rank B A written into its weights, values and gradients."""
    peer = make_peer(family, tmp_path)
    model, args = adapted(grpo, tmp_path)
    tokens = torch.randint(2, 61, (2, 20))
    with torch.no_grad(), grpo.Reference(model, Workplace()) as frozen:
        assert frozen is model
        torch.testing.assert_close(frozen(tokens), peer(tokens).logits, atol=1e-4, rtol=1e-4)
    names = {name for name, x in peer.named_modules() if isinstance(x, torch.nn.Linear)} - {"lm_head"}
    learned = dict(model.named_parameters())
    assert {*learned} == {f"{name}.lora_{x}" for name in names for x in "AB"} == {*model.state_dict()}
    with torch.no_grad():
        for name in names:
            a, b = learned[f"{name}.lora_A"], learned[f"{name}.lora_B"]
            assert a.dtype == b.dtype == torch.float32 and a.shape[0] == b.shape[1] == 3
            peer.get_submodule(name).weight += 6 / 3 * b @ a
    logits = model(tokens)
    torch.testing.assert_close(logits, peer(tokens).logits, atol=1e-4, rtol=1e-4)
    (logits[..., 5].sum()).backward()
    (peer(tokens).logits[..., 5].sum()).backward()
    for name in names:  # by the chain rule
        gradient, x = peer.get_submodule(name).weight.grad, learned[f"{name}.lora_A"]
        expected = 6 / 3 * learned[f"{name}.lora_B"].T @ gradient
        torch.testing.assert_close(x.grad, expected, atol=1e-3, rtol=1e-3)


def test_adapters_do_nothing_at_the_start(tmp_path):
    make_peer("Qwen2", tmp_path)
    model, plain = grpo.Transformer.from_pretrained(tmp_path), grpo.Transformer.from_pretrained(tmp_path)
    grpo.add_adapters(model, grpo.Args(lora_rank=4), Workplace())
    tokens = torch.randint(2, 61, (2, 20))
    assert torch.equal(model(tokens), plain(tokens))
    assert sum(layer.lora_A.abs().sum() for layer in model.modules() if hasattr(layer, "lora_A")) > 1


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_export_is_the_adapted_model(family, tmp_path):
    make_peer(family, tmp_path / "base")
    model, _ = adapted(grpo, tmp_path / "base")
    model.save_pretrained(tmp_path / "merged")
    tokens = torch.randint(2, 61, (2, 20))
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(peer(tokens).logits, model(tokens), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_are_read_by_peft(family, tmp_path):
    peft = pytest.importorskip("peft")
    base = make_peer(family, tmp_path / "base")
    model, args = adapted(grpo, tmp_path / "base")
    model.tokenizer = grpo.make_tokenizer(grpo.Arithmetic.vocabulary)
    grpo.save_adapters(model, args, tmp_path / "adapters")
    peer = peft.PeftModel.from_pretrained(base, tmp_path / "adapters")
    tokens = torch.randint(2, 61, (2, 20))
    with torch.no_grad():
        expected = peer(tokens).logits
        assert (expected - grpo.Transformer.from_pretrained(tmp_path / "base")(tokens)).abs().max() > 0.1
        torch.testing.assert_close(model(tokens), expected, atol=1e-4, rtol=1e-4)
    config = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_matrices_are_bfloat16_and_compute_what_autocast_computes(dtype, tmp_path):
    peer = make_peer("Qwen2", tmp_path / "base", tie_word_embeddings=dtype == torch.bfloat16)
    peer.to(dtype).save_pretrained(tmp_path / "base")
    plain = grpo.Transformer.from_pretrained(tmp_path / "base")
    frozen = grpo.freeze(grpo.Transformer.from_pretrained(tmp_path / "base", dtype=None), torch.bfloat16)
    assert not [*frozen.parameters()] and not frozen.state_dict()
    kinds = {name: x.dtype for name, x in frozen.named_buffers()}
    assert kinds.pop("frequencies") == torch.float32
    assert kinds.pop("model.embed_tokens.weight") == dtype
    assert all((kind == torch.float32) == ("norm" in name) for name, kind in kinds.items())
    tokens = torch.randint(2, 61, (2, 20))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(frozen(tokens), plain(tokens))


# ------------------------------------------------------------------------------------------------- runs


def test_a_run_trains_and_saves_adapters_only(finished):
    script, run = finished
    state = script.load_checkpoint(run)
    assert all(name.endswith(("lora_A", "lora_B")) for name in state["model"])
    moments = [x["exp_avg"].shape for x in state["optimizer"]["state"].values()]
    assert sorted(moments) == sorted(x.shape for x in state["model"].values())
    assert sum(x.abs().sum() for name, x in state["model"].items() if name.endswith("B")) > 0
    curves = curves_of(run)
    assert curves["eval/kl_to_reference"][0] == pytest.approx(0, abs=1e-3)
    assert curves["eval/kl_to_reference"][4] > 1e-3
    base, model = (script.Transformer.from_pretrained(run / x) for x in ("reference", "model"))
    same = {name: torch.equal(x, base.state_dict()[name]) for name, x in model.state_dict().items()}
    assert all(same[name] == ("proj" not in name) for name in same)


def test_killed_run_with_adapters_equals_an_uninterrupted_one(finished, tmp_path, capsys):
    """Killed after the first checkpoint of the training; one of the scripts in the warm-up, too."""
    script, reference = finished
    settings = SETTINGS[script] | {"checkpoint_minutes": 0.003}
    words = [*flags(**settings, runs=tmp_path), "--run-name", "mine"]
    for step in (-50, 2) if script is grpo else (2,):
        process = start(f"{script.__name__}.py", *words, cwd=tmp_path)
        while True:
            time.sleep(0.01)
            file = tmp_path / "mine" / "checkpoint.pt"
            if file.exists() and script.load_checkpoint(file)["step"] >= step:
                break
            assert process.poll() is None, process.stdout.read()
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
    assert script.load_checkpoint(tmp_path / "mine")["step"] < 4
    script.main(script.parse_args(["--resume", str(tmp_path / "mine")]))
    assert "Resumed at step" in capsys.readouterr().out
    states = [script.load_checkpoint(x) for x in (tmp_path / "mine", reference)]
    for state in states:
        del state["args"]["checkpoint_minutes"]
    assert checkpoint_difference(*states) is None
    assert curves_of(tmp_path / "mine") == curves_of(reference)


def test_evaluation_of_a_run_with_adapters(finished, capsys):
    """Of its directory, and of its checkpoint, which is loaded once."""
    script, run = finished
    for path in (run, run / "checkpoint.pt"):
        script.main(script.parse_args(["--evaluate", str(path)]))
        kl = curves_of(run)["eval/kl_to_reference"][4]
        assert f"kl_to_reference {kl:.3f}" in capsys.readouterr().out


def test_a_given_model_with_adapters_is_resumed(finished, tmp_path, monkeypatch):
    """Nothing of it is in the run, and beta or the pairs need no second model in memory."""
    script, base = finished
    changes = {"model": str(base / "model"), "bf16": True, "export": "adapters", "export_interval": 3}
    changes |= {"beta": 0.1, "gradient_checkpointing": True}
    reference = train(script, tmp_path / "one", **changes)
    assert not (reference / "reference").exists()
    names = {x.name for x in (reference / "model").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= names
    assert "model.safetensors" not in names
    steps, left = script.optimizer_step, iter(range(3))

    def interrupted(*arguments):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return steps(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(script, "optimizer_step", interrupted)
        refusal(train, script, tmp_path / "two", **changes)
    run = the_run(tmp_path / "two")
    script.main(script.parse_args(["--resume", str(run)]))
    assert_same_run(script, run, reference)


def test_two_processes_with_adapters_take_the_step_of_one(finished, tmp_path):
    script, base = finished
    settings = SETTINGS[script] | {
        "max_steps": 1,
        "eval_interval": 1,
        "beta": 0.1,
        "model": str(base / "model"),
    }
    settings |= {"num_minibatches": 1} if script is grpo else {}
    one = script.main(script.Args(**settings, runs=str(tmp_path / "one")))
    port, words = {grpo: 29521, dpo: 29522}[script], flags(**settings, runs=tmp_path / "two")
    run_two_processes(f"{script.__name__}.py", port, *words, cwd=tmp_path)
    states = [script.load_checkpoint(run) for run in (one, the_run(tmp_path / "two"))]
    first_moments = [[x["exp_avg"] for x in state["optimizer"]["state"].values()] for state in states]
    assert any(x.abs().max() > 1e-4 for x in first_moments[0])
    for x, y in zip(*first_moments, strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-2)


@SCRIPTS
def test_settings_that_exclude_each_other_are_named(script):
    with pytest.raises(ValueError, match="there are no adapters to export"):
        script.Args(export="adapters")
    with pytest.raises(ValueError, match="lora_rank"):
        script.Args(lora_rank=-1)
    if script is grpo:
        with pytest.raises(ValueError, match="the reference cannot change"):
            script.Args(lora_rank=4, ref_model_sync_steps=2)
