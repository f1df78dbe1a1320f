"""What is to be seen on a GPU, in pieces of under ten minutes each.

`check` says what the machine can do and what must be equal there; `sample` and `step` measure the sampler and
a training step at the shape of Qwen2.5-0.5B; `grpo` and `atari` are whole runs. Every finding is appended to
gpu.jsonl at once, failures too, so that a cut loses little. `write_report` makes docs/gpu.md of them.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch

from benchmark import manifest
from benchmark.events import read_scalars
from benchmark.report import table

QWEN = {"model_type": "qwen2", "vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4864}
QWEN |= {"num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2}
QWEN |= {"max_position_embeddings": 32_768, "rope_theta": 1e6, "tie_word_embeddings": True}
SMALL = QWEN | {"vocab_size": 5000, "hidden_size": 56, "intermediate_size": 96, "num_hidden_layers": 2}
PIECES = ("check", "sample", "step", "grpo", "atari")


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(function: Callable[[], object], repeats: int = 1) -> float:
    """Seconds of one call, after one that does not count."""
    function()
    wait()
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    wait()
    return (time.perf_counter() - start) / repeats


class Findings:
    """Makes the findings of a piece; with `small`, at sizes for a trial on a CPU."""

    def __init__(self, piece: str, out: Path, small: bool):
        sys.path.insert(0, str(manifest.REPOSITORY))
        import grpo_llm

        self.grpo, self.piece, self.out, self.small = grpo_llm, piece, out, small
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.manifest = manifest.describe() | {"small": small, "device": self.device.type}
        self.config = SMALL if small else QWEN
        self.spread = 0.3 if small else 0.05  # of weights, where rows are to differ in probability
        torch.manual_seed(0)

    def attempt(self, name: str, function: Callable[[], dict], **facts) -> None:
        """One finding, appended at once; if it fails, the error is the finding."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        try:
            found = function()
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        if self.device.type == "cuda":
            found["peak_GB"] = torch.cuda.max_memory_allocated() / 1e9
        found = {name: float(f"{x:.4g}") if isinstance(x, float) else x for name, x in found.items()}
        finding = {"piece": self.piece, "name": name, **facts, **found}
        finding |= {"took": round(time.perf_counter() - start, 1), "manifest": self.manifest}
        with (self.out / "gpu.jsonl").open("a") as file:
            file.write(json.dumps(finding) + "\n")
        print(json.dumps({key: x for key, x in finding.items() if key != "manifest"}), flush=True)

    def precision(self, bf16: bool = True) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=bf16)

    def model(self, **changes):
        torch.manual_seed(0)
        model = self.grpo.Transformer(self.config | changes).to(self.device)
        model.eos_ids = {self.config["vocab_size"] - 1}
        return model

    def rows(self, count: int, length: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(count + length)
        return torch.randint(self.config["vocab_size"] - 1, (count, length), generator=generator).tolist()

    # ------------------------------------------------------------------------------------------ pieces

    def check(self) -> None:
        self.attempt("machine", self.machine)
        for bf16 in (False, True):
            self.attempt("sampler", lambda bf16=bf16: self.sampler_equals_trainer(bf16), bf16=bf16)
        for bf16 in (False, True):
            self.attempt("blocks", lambda bf16=bf16: self.blocks_equal_mask(bf16), bf16=bf16)
        self.attempt("cpu", self.gpu_equals_cpu)

    def machine(self) -> dict:
        size, count = (512, 2**20) if self.small else (8192, 2**30)
        square, vector = (
            torch.randn(size, size, device=self.device).bfloat16(),
            torch.empty(count, device=self.device),
        )
        product, copy = seconds_of(lambda: square @ square, 10), seconds_of(vector.clone, 5)
        return {"TFLOPs": 2 * size**3 / product / 1e12, "TB_per_s": 2 * 4 * count / copy / 1e12}

    def sampler_equals_trainer(self, bf16: bool) -> dict:
        """Gaps of sampler and trainer, and the share of rows that are the same without graphs."""
        model, prompts = self.model(initializer_range=self.spread), self.rows(4, 24)
        uniforms = torch.rand(4, 16, 100, generator=torch.Generator().manual_seed(2)).to(self.device)
        with self.precision(bf16), torch.no_grad():
            out = self.grpo.generate(model, prompts, uniforms)
            with mock.patch.object(self.grpo, "SPAN", 1):
                eager = self.grpo.generate(model, prompts, uniforms)
            sequences = [self.grpo.Sequence(prompts[i // 16], x) for i, x in enumerate(out.tokens)]
            again = self.grpo.completion_log_probs(model, sequences)
        gaps = (again - out.log_probs[:, : again.shape[1]]).abs()
        same = sum(a == b for a, b in zip(out.tokens, eager.tokens)) / len(out.tokens)
        return {"gap_max": gaps.max().item(), "gap_mean": gaps.mean().item(), "rows_as_eager": same}

    def sequences(self, groups: int, size: int, width: int, length: int) -> list:
        prompts, completions = self.rows(groups, width), self.rows(groups * size, length)
        return [self.grpo.Sequence(prompts[i // size], x) for i, x in enumerate(completions)]

    def dense(self, dense: bool = True):
        """Makes the scripts find no compiler, so that they take the mask instead of blocks."""
        which = (lambda name: None) if dense else shutil.which
        return mock.patch.object(self.grpo, "shutil", mock.Mock(wraps=shutil, which=which))

    def gradient(self, model, sequences: list) -> tuple[torch.Tensor, torch.Tensor]:
        model.zero_grad()
        log_probs = self.grpo.completion_log_probs(model, sequences)
        log_probs.mean().backward()
        return log_probs.detach(), torch.cat([x.grad.flatten() for x in model.parameters()])

    def blocks_equal_mask(self, bf16: bool) -> dict:
        """Block attention against the mask, values and gradients; both against float32."""
        model, sequences = self.model(initializer_range=self.spread), self.sequences(3, 4, 40, 100)
        with self.precision(bf16):
            one, gradient = self.gradient(model, sequences)
            with self.dense():
                other, expected = self.gradient(model, sequences)
        with self.dense():
            _, exact = self.gradient(model, sequences)
        return {
            "gap_max": (one - other).abs().max().item(),
            "gradient_error_blocks": ((gradient - exact).norm() / exact.norm()).item(),
            "gradient_error_mask": ((expected - exact).norm() / exact.norm()).item(),
        }

    def gpu_equals_cpu(self) -> dict:
        model, sequences = (
            self.model(initializer_range=self.spread, num_hidden_layers=2),
            self.sequences(2, 2, 20, 40),
        )
        with torch.no_grad():
            here = self.grpo.completion_log_probs(model, sequences).cpu()
            there = self.grpo.completion_log_probs(model.cpu(), sequences)
        return {"gap_max": (here - there).abs().max().item()}

    def sample(self) -> None:
        """Tokens per second of the sampler: 256 rows, prompts of 200 tokens, 512 tokens each."""
        P, G, C, width = (2, 4, 24, 8) if self.small else (16, 16, 512, 200)
        model, prompts = self.model(), self.rows(P, width)
        model.eos_ids = {self.config["vocab_size"]}  # never: all rows have their full length
        uniforms = torch.rand(P, G, C, device=self.device)
        weights = sum(x.numel() for x in model.parameters())
        shape = self.config["num_hidden_layers"] * self.config["num_key_value_heads"]
        head_dim = self.config["hidden_size"] // self.config["num_attention_heads"]
        # Each step reads all weights and the live part of the cache, in bfloat16.
        bytes_per_step = 2 * weights + P * G * (width + C / 2) * 2 * shape * head_dim * 2

        def ours(span: int) -> dict:
            with self.precision(), mock.patch.object(self.grpo, "SPAN", span):
                seconds = seconds_of(lambda: self.grpo.generate(model, prompts, uniforms))
            return {"tokens_per_s": P * G * C / seconds, "bytes_per_token": bytes_per_step / (P * G)}

        def transformers_generate() -> dict:
            import transformers

            config = {name: x for name, x in self.config.items() if name != "model_type"}
            peer = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**config))
            peer = peer.to(self.device, torch.bfloat16).eval()
            tokens = torch.tensor(prompts, device=self.device).repeat_interleave(G, 0)
            options = {"max_new_tokens": C, "min_new_tokens": C, "do_sample": True, "top_k": 0}
            options |= {"attention_mask": torch.ones_like(tokens), "pad_token_id": 0}
            seconds = seconds_of(lambda: peer.generate(tokens, **options))
            return {"tokens_per_s": P * G * C / seconds}

        for span in (64, 1, 128):
            self.attempt("generate", lambda span=span: ours(span), span=span)
        self.attempt("transformers generate", transformers_generate)

    def step(self) -> None:
        """Tokens per second of a training step: 32 groups of 4, 200 and 512 tokens."""
        groups, width, length = (2, 8, 16) if self.small else (32, 200, 512)
        sequences, limits = (
            self.sequences(groups, 4, width, length),
            self.grpo.Args(micro_batch_tokens=16_384),
        )
        tokens = groups * (width + 4 * length)

        def measure(dense: bool, elements: int | None, compiled: bool, checkpointing: bool) -> dict:
            model = self.model()
            model.gradient_checkpointing = checkpointing
            optimizer = torch.optim.AdamW(model.parameters(), 1e-6, fused=True)
            for layer in model.model["layers"] if compiled else ():
                layer.compile(dynamic=True)

            def once() -> None:
                with self.precision():
                    for part in self.grpo.split(sequences, limits):
                        part = [sequences[i] for i in part]
                        (-self.grpo.completion_log_probs(model, part).sum() / len(sequences)).backward()
                    self.grpo.optimizer_step(model, optimizer, 1.0)

            properties = mock.Mock(return_value=mock.Mock(total_memory=320 * (elements or 0)))
            real = torch.cuda.get_device_properties
            with self.dense(dense), mock.patch.object(
                torch.cuda, "get_device_properties", properties if elements else real
            ):  # fmt: skip
                seconds = seconds_of(once, 2)
            flops = 6 * sum(x.numel() for x in model.parameters()) * tokens
            return {"tokens_per_s": tokens / seconds, "TFLOPs": flops / seconds / 1e12}

        variants = [(False, None, False, False), (True, None, False, False), (False, 2**25, False, False)]
        variants += [(False, 2**29, False, False), (False, None, False, True), (False, None, True, False)]
        for variant in variants:
            facts = dict(zip(("mask", "logits", "compiled_layers", "checkpointing"), variant))
            self.attempt("training step", lambda variant=variant: measure(*variant), **facts)

    def run_script(self, limit: float, *arguments: str, tag: str) -> dict:
        """A run of at most `limit` seconds; the curve of `tag`, and speed in the second half."""
        folder = manifest.REPOSITORY / "runs" / "benchmark" / f"gpu-{time.time_ns()}"
        folder.mkdir(parents=True)
        command = [sys.executable, *arguments, "--runs", str(folder)]
        with (folder / "log.txt").open("a+") as log:
            process = subprocess.Popen(command, cwd=manifest.REPOSITORY, stdout=log, stderr=log)
            start = time.perf_counter()
            try:
                process.wait(limit)
            except subprocess.TimeoutExpired:
                process.terminate()  # it saves a checkpoint
                process.wait(60)
            if not list(folder.rglob("events.out.tfevents.*")):
                log.seek(0)
                raise RuntimeError("; ".join(log.read().splitlines()[-3:]))
        (run,) = {file.parent for file in folder.rglob("events.out.tfevents.*")}
        scalars = read_scalars(run)
        found = {"seconds": time.perf_counter() - start, "steps": int(scalars["time/elapsed"][0][-1])}
        for name in (tag, f"eval/{tag.rpartition('/')[2]}", "charts/SPS", "perf/generated_tokens_per_second"):
            if name in scalars:
                values = scalars[name][1]
                found |= {f"{name} first": float(values[0]), f"{name} last": float(values[-1])}
        return found

    def grpo_runs(self) -> None:
        """Countdown with a model of 150M weights; then beside TRL at the small default model."""
        size = ["--hidden-size", "1024", "--num-layers", "12", "--num-heads", "16", "--max-steps", "200"]
        size += ["--learning-rate", "1e-4", "--sft-learning-rate", "5e-4"]
        if self.small:
            size = ["--hidden-size", "32", "--num-layers", "1", "--sft-steps", "3", "--max-steps", "1"]
            size += ["--num-prompts", "2", "--eval-prompts", "4"]
        countdown = ["grpo_llm.py", "--task", "examples.countdown:Countdown", *size]
        limit = 60 if self.small else 300
        self.attempt("grpo", lambda: self.run_script(limit, *countdown, tag="pass@1"), flags=" ".join(size))
        if not self.small:
            self.attempt("beside TRL", self.beside_trl)

    def beside_trl(self) -> dict:
        from benchmark.speed import measure

        measure(("trl",), 1, 8, "grpo_llm, 32 x 16 completions, bfloat16", self.out)
        (comparison,) = json.loads((self.out / "speed.json").read_text()).values()
        return {name: rounds[0]["steps_per_second"] for name, rounds in comparison["programs"].items()}

    def atari(self) -> None:
        """Steps per second with 8 and 128 games, then Pong with what time is left."""
        cores = str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
        for games in (8, 16 if self.small else 128):
            flags = ["--num-envs", str(games), "--eval-interval", "0", "--num-threads", cores]
            flags += ["--num-steps", "8" if self.small else "128"] + (["--no-compile"] if self.small else [])
            steps = str(games * (16 if self.small else 128 * 40))
            command = ["ppo_atari.py", *flags, "--total-timesteps", steps]
            self.attempt(
                "atari", lambda command=command: self.run_script(90, *command, tag="charts/SPS"), games=games
            )
        if not self.small:
            flags = [
                "--env-id",
                "ALE/Pong-v5",
                "--num-envs",
                "128",
                "--num-steps",
                "32",
                "--num-threads",
                cores,
            ]
            flags += ["--total-timesteps", "5000000", "--learning-rate", "5e-4", "--num-minibatches", "4"]
            command = ["ppo_atari.py", *flags, "--eval-interval", "1000000"]
            self.attempt("pong", lambda: self.run_script(300, *command, tag="charts/episodic_return"))


def measure(piece: str, out: Path, small: bool) -> None:
    """Makes the findings of a piece."""
    out.mkdir(parents=True, exist_ok=True)
    findings = Findings(piece, out.resolve(), small)
    {name: getattr(findings, "grpo_runs" if name == "grpo" else name) for name in PIECES}[piece]()


def write_report(out: Path, page: Path) -> str:
    """The page with all findings of out/gpu.jsonl; those of a trial, or without a GPU, stay in `out`."""
    path = out / "gpu.jsonl"
    if not path.exists():
        raise SystemExit(f"There is no {path}; run python -m benchmark gpu check first")
    findings = [json.loads(line) for line in path.read_text().splitlines()]
    if any(x["manifest"]["small"] or not x["manifest"]["gpu"] for x in findings):
        page = out / "gpu.md"  # of a trial: not to be taken for figures of a GPU
    machines = sorted({manifest.machine(x["manifest"]) for x in findings})
    versions = sorted({f"Python {x['manifest']['python']}" for x in findings})
    versions += sorted({f"torch {x['manifest']['packages']['torch']}" for x in findings})
    bandwidth = next((x["TB_per_s"] for x in findings if x["name"] == "machine" and "TB_per_s" in x), None)
    text = "# Measured on a GPU\n\nWritten by `python -m benchmark gpu report`, from findings of\n"
    text += f"`python -m benchmark gpu` with {'; '.join(machines)}; {', '.join(versions)}.\n"
    for piece in PIECES:
        chosen = [x for x in findings if x["piece"] == piece]
        for name in dict.fromkeys(x["name"] for x in chosen):
            rows = [x for x in chosen if x["name"] == name]
            for row in rows:
                if bandwidth and "bytes_per_token" in row and "tokens_per_s" in row:
                    limit = bandwidth * 1e12 / row.pop("bytes_per_token")
                    row |= {"limit_tokens_per_s": limit, "share_of_limit": row["tokens_per_s"] / limit}
            left_out = {"piece", "name", "manifest", "flags"}
            keys = dict.fromkeys(key for row in rows for key in row if key not in left_out)
            cells = [[as_text(row.get(key)) for key in keys] for row in rows]
            text += f"\n## {piece}: {name}\n\n{table(list(keys), cells)}\n"
    page.write_text(text)
    return f"{text}\nWritten to {page}"


def as_text(value: object) -> str:
    """A cell of the report: floats with four digits, nothing for what a finding lacks."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)
