"""The code that only a GPU runs, without one: under a pretended GPU, and what a CPU can check of it exactly.

The pretence (pretend_gpu.py) finds mixed devices, generators of the wrong device and waits for the GPU.
Nothing here says how fast anything is, nor that CUDA's kernels take what they are given.
"""

import contextlib
import inspect
import itertools

import pytest
import torch
from pretend_gpu import CPU, GPU, pretend_gpu
from test_llm_adapters import SETTINGS
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils.checkpoint import checkpoint

import a2c_cartpole
import dpo_llm
import grpo_llm
import ppo_atari

LLM_SCRIPTS = [grpo_llm, dpo_llm]
BY_NAME = {"ids": lambda script: script.__name__}
CONFIG = {"model_type": "llama", "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48}
CONFIG |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
CONFIG |= {"max_position_embeddings": 512, "initializer_range": 0.3}
PROMPTS = [[3], [4, 5, 6, 7], [8, 9, 10]]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def make_model(eos_ids: set[int], script=grpo_llm, **changes):
    model = script.Transformer(CONFIG | changes)
    model.eos_ids = eos_ids
    return model


# ------------------------------------------------------------------------------------------- the pretence


@pytest.mark.parametrize(
    ("action", "error"),
    [
        (lambda x: x + torch.ones(3), "expected all tensors on cuda:0"),
        (lambda x: torch.cat((x, torch.ones(3))), "expected all tensors on cuda:0"),
        (lambda x: torch.ones(3)[x.argsort()], "indices on cuda"),
        (lambda x: x.__setitem__(x.argsort(), torch.ones(3)), "a value on another device"),
        (lambda x: torch.rand(3, generator=torch.Generator(), device=GPU), "expected a 'cuda' generator"),
        (lambda x: x.uniform_(generator=torch.Generator()), "expected a 'cuda' generator"),
        (lambda x: x.numpy(), "can't convert cuda:0"),
        (lambda x: torch.nn.Linear(3, 3)(x), "expected all tensors on cuda:0"),
        (lambda x: torch.nn.Linear(3, 3).to(GPU)(x.cpu()), "expected all tensors on cuda:0"),
    ],
)
def test_what_a_gpu_refuses_is_refused(action, error):
    with pretend_gpu(), pytest.raises((RuntimeError, TypeError), match=error):
        action(torch.ones(3).to(GPU))


def test_what_a_gpu_takes_is_taken_and_waits_are_counted():
    with pretend_gpu() as gpu:
        x = torch.arange(3.0, device=GPU)
        y = (x * torch.tensor(2.0)).sum() + torch.zeros((), device=GPU)
        assert y.is_cuda and y.device == GPU and x[1:].is_cuda and not gpu.waits
        x[:2] = torch.ones(2)
        x[x > 1] = 0
        assert y.item() == 6 and int(y) == 6 and bool(y) and x.tolist() == [1, 1, 0]
        assert not x.cpu().is_cuda and len(x.nonzero()) == 2
        waits = ["boolean_index", "item", "__int__", "__bool__", "tolist", "cpu", "nonzero"]
        assert gpu.waits == dict.fromkeys(waits, 1)
        layer = torch.nn.Linear(3, 1).to(GPU)
        layer(x).sum().backward()
        assert layer.weight.grad.is_cuda and layer.weight.grad.tolist() == [[1, 1, 0]]
    assert torch.ones(1).device == CPU


def test_a_graph_repeats_functions_on_tensors_and_forgets_numbers_of_python():
    with pretend_gpu():
        total, count, numbers = torch.zeros(1, device=GPU), torch.zeros(1, device=GPU), iter(range(100))

        def step():
            count.add_(1)
            total.add_(count * 10 + next(numbers))

        grpo_llm.repeat_in_graph(step, 4)
        assert total.tolist() == [10 + 20 + 30 + 40 + 0 + 1 + 1 + 1]  # what Python gave stays as recorded
        with pytest.raises(RuntimeError, match="capturing"):
            grpo_llm.repeat_in_graph(lambda: print(total.item()), 4)


# -------------------------------------------------------------------------------------------- the sampler


@pytest.mark.parametrize("script", LLM_SCRIPTS, **BY_NAME)
@pytest.mark.parametrize(("temperature", "vocabulary"), [(1.0, 61), (0.0, 61), (0.8, 5000)])
def test_sampler_in_graphs_gives_the_rows_of_a_cpu_and_waits_once_per_span(temperature, vocabulary, script):
    """Spans of 64, 64 and 21 tokens after the first; rows leave the batch between them."""
    model = make_model({1, 2}, script, vocab_size=vocabulary, hidden_size=32)
    uniforms = torch.rand(3, 50, 150)
    wanted = script.generate(model, PROMPTS, uniforms, temperature)
    shapes, attend = [], script.attend
    with pretend_gpu(script) as gpu, pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "attend", lambda q, k, v, m: shapes.append(k.shape) or attend(q, k, v, m))
        model.to(GPU)
        numbers = uniforms.to(GPU)
        gpu.waits.clear()
        found = script.generate(model, PROMPTS, numbers, temperature)
        # A span begins with a wait; if all rows have ended there, it has no graph.
        assert gpu.graphs <= gpu.waits.pop("__int__") <= 3 and gpu.waits == {"tolist": 2}
        found = found._replace(log_probs=found.log_probs.cpu(), finished=found.finished.cpu())
    # Attention rounds differently there, so of 20,000 numbers a few lie on the other side of a bound.
    same = torch.tensor([a == b for a, b in zip(found.tokens, wanted.tokens)])
    firsts = [
        next(((x, y) for x, y in zip(a, b) if x != y), (0, 0)) for a, b in zip(found.tokens, wanted.tokens)
    ]
    assert same.float().mean() > 0.8 and all(abs(x - y) <= 3 for x, y in firsts), firsts
    assert torch.equal(found.finished[same], wanted.finished[same])
    assert (found.log_probs - wanted.log_probs)[same].abs().max() < 1e-4
    if temperature == 1:
        assert gpu.graphs == 3 and same.all()
        assert {shape[2] for shape in shapes} == {4, 128, 160}  # slots of the prompts, and in use
        assert len({shape[0] for shape in shapes}) > 2


ONES, HEAD = "torch.ones(P * G, dtype=torch.bool", "choose(model.lm_head(hidden[:, 0]))"
MUTANTS = {
    "none": ("column.add_(1)", "column.add_(1)"),
    "a number of Python": ("uniforms[rows, column]", "uniforms[rows, column + next(ticks)]"),
    "a step that waits": ("column.add_(1)", "column.add_(1 if alive.any() else 0)"),
    "a state that is replaced": ("column.add_(1)", "column = column + 1"),
    "a wait for each token": (HEAD, f"{HEAD}; int(column)"),
    "a tensor on the CPU": (f"{ONES}, device=device)", f"{ONES})"),
    "too few slots": ("round_up(width + t + span, 64)", "round_up(t, 64)"),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_of_the_sampler_are_caught(mutant, monkeypatch):
    """Each fault passes on a CPU, where a span is one step, and is found under the pretence."""
    old, new = MUTANTS[mutant]
    source = inspect.getsource(grpo_llm.generate)
    assert source.count(old) == 1
    source = source.replace(old, new)
    if mutant == "a state that is replaced":
        source = source.replace("    def step() -> None:", "    def step() -> None:\n        nonlocal column")
    namespace = vars(grpo_llm) | {"ticks": itertools.repeat(0)}
    if mutant == "a number of Python":
        namespace["ticks"] = itertools.chain([0, 0], itertools.count(1))
    model, uniforms = make_model({1, 2}), torch.rand(3, 50, 150)
    wanted = grpo_llm.generate(model, PROMPTS, uniforms).tokens
    with pretend_gpu(grpo_llm) as gpu:
        exec(source, namespace)
        model.to(GPU)
        fails = pytest.raises((RuntimeError, AssertionError, IndexError))
        with contextlib.nullcontext() if mutant == "none" else fails:
            found = namespace["generate"](model, PROMPTS, uniforms.to(GPU))
            assert found.tokens == wanted and gpu.waits["__int__"] == gpu.graphs


# ------------------------------------------------------------------------------------ log-probabilities


def sequences_of_all_kinds() -> list:
    """Prompts shared by several completions, and alone; rows of two blocks of 128 slots."""
    lengths = [(5, 60), (5, 3), (5, 90), (40, 1), (2, 170), (30, 33), (30, 70)]
    prompts = {n: torch.randint(61, (n,)).tolist() for n, _ in lengths}
    return [grpo_llm.Sequence(prompts[n], torch.randint(61, (m,)).tolist()) for n, m in lengths]


def pack_as_on_a_gpu(sequences: list) -> grpo_llm.Packed:
    """With the block mask that PyTorch makes of the function it is given, on the CPU."""
    made = []
    with pretend_gpu(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo_llm, "create_block_mask", lambda *arguments: made.append(arguments[:-1]))
        packed = grpo_llm.pack(sequences, GPU)
    return packed._replace(visible=create_block_mask(*made[0], "cpu"))


@pytest.mark.parametrize("changes", [{}, {"head_dim": 32}, {"num_key_value_heads": 4, "head_dim": 16}])
def test_attention_in_blocks_gives_the_log_probs_of_the_mask(changes, monkeypatch):
    """flex_attention itself, not compiled; queries that share keys and heads below 16 columns included."""
    model, sequences = make_model(set(), **changes), sequences_of_all_kinds()
    with torch.no_grad():
        wanted = grpo_llm.completion_log_probs(model, sequences, 0.8)
        packed, masks, attend = pack_as_on_a_gpu(sequences), [], grpo_llm.attend_in_blocks
        assert packed.tokens.shape[1] == 256 and isinstance(packed.visible, grpo_llm.BlockMask)
        monkeypatch.setattr(grpo_llm, "pack", lambda *_: packed)
        monkeypatch.setattr(grpo_llm, "attend_in_blocks", lambda *x: masks.append(x[-1]) or attend(*x))
        found = grpo_llm.completion_log_probs(model, sequences, 0.8)
    assert masks == [packed.visible] * 2
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("script", LLM_SCRIPTS, **BY_NAME)
def test_training_under_the_pretence_gives_the_gradients_of_a_cpu(script, monkeypatch):
    """The head in three parts and then, with more memory, at once."""
    sequences = sequences_of_all_kinds()
    monkeypatch.setattr(script, "HEAD_ELEMENTS", 61 * 200)
    made = []  # parts that are computed again
    monkeypatch.setattr(script, "checkpoint", lambda *x, **y: made.append(0) or checkpoint(*x, **y))
    for memory in (1, 80 * 10**9):
        model = make_model(set(), script, model_type="qwen3")
        state = {name: x.clone() for name, x in model.state_dict().items()}
        script.completion_log_probs(model, sequences).mean().backward()
        wanted = [x.grad.clone() for x in model.parameters()]
        with pretend_gpu(script) as gpu:
            model = make_model(set(), script, model_type="qwen3").to(GPU)
            model.load_state_dict(state)
            gpu.memory = memory
            made.clear()
            log_probs = script.completion_log_probs(model, sequences)
            log_probs.mean().backward()
            assert log_probs.is_cuda and len(made) == (3 if memory == 1 else 0)
            found = [x.grad.cpu() for x in model.parameters()]
        for x, y in zip(found, wanted, strict=True):
            torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-4)


def test_norms_of_qwen3_get_one_type_under_autocast():
    """Otherwise PyTorch refuses the kernel that is one; on a CPU the results are equal to the bit."""
    model, types = make_model(set(), model_type="qwen3"), set()
    norm = model.model["layers"][0].self_attn["q_norm"]
    norm.register_forward_hook(lambda module, x, y: types.add((x[0].dtype, module.weight.dtype)))
    tokens = torch.randint(61, (2, 9))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens)
        assert types == {(torch.float32, torch.float32)}
        norm.register_forward_pre_hook(lambda module, x: (x[0].bfloat16(),))
        assert torch.equal(model(tokens), logits)


# ------------------------------------------------------------------------------------------- whole scripts

RUNS = {
    "grpo": (grpo_llm, {"beta": 0.1, "ref_model_sync_steps": 1, "lora_rank": 0, "sft_steps": 3}),
    "grpo with adapters": (grpo_llm, {"gradient_checkpointing": True, "bf16": True, "sft_steps": 3}),
    "gspo": (grpo_llm, {"loss": "gspo", "bf16": True, "dynamic_sampling": 1}),
    "dpo": (dpo_llm, {"bf16": True}),
    "kto": (dpo_llm, {"loss": "kto", "lora_rank": 0}),
}
RL = {"device": "cuda", "compile": False, "eval_interval": 64, "eval_episodes": 1, "checkpoint_interval": 64}
GAMES = RL | {"num_envs": 4, "num_steps": 16, "num_minibatches": 2, "total_timesteps": 128}


@pytest.mark.parametrize("name", RUNS)
def test_language_model_scripts_run_under_the_pretence(name, tmp_path):
    script, changes = RUNS[name]
    settings = SETTINGS[script] | {"max_steps": 2, "eval_prompts": 4, "device": "cuda"}
    with pretend_gpu(script) as gpu:
        run = script.main(script.Args(**settings | {"runs": str(tmp_path)} | changes))
        assert gpu.waits
        if script is grpo_llm:
            assert gpu.graphs
    state = script.load_checkpoint(run)
    assert state["step"] == 2 and all(x.isfinite().all() for x in state["model"].values())


def test_atari_runs_under_the_pretence_in_halves(tmp_path, monkeypatch):
    """As many waits per step as there are halves: the actions of each, which the emulator needs."""
    monkeypatch.setattr(ppo_atari, "MAX_FRAMES", 400)
    rollouts, collect_rollout = [], ppo_atari.collect_rollout
    with pretend_gpu() as gpu:

        def watched(games, *arguments):
            before = gpu.waits.copy()
            rollout = collect_rollout(games, *arguments)
            rollouts.append((len(games.halves), gpu.waits - before))
            return rollout

        monkeypatch.setattr(ppo_atari, "collect_rollout", watched)
        run = ppo_atari.main(ppo_atari.Args(**GAMES, runs=str(tmp_path)))
    assert [halves for halves, _ in rollouts] == [2, 2]
    assert all(waits == {"cpu": 2 * 16} for _, waits in rollouts)
    assert ppo_atari.load_checkpoint(run)["step"] == 128


def test_a2c_runs_under_the_pretence(tmp_path):
    with pretend_gpu() as gpu:
        run = a2c_cartpole.main(a2c_cartpole.Args(**RL, total_timesteps=128, runs=str(tmp_path)))
        assert gpu.waits
    assert a2c_cartpole.load_checkpoint(run)["step"] >= 128
