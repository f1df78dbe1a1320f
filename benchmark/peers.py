"""What the speed comparison measures beside the scripts, each in a process of its own.

python -m benchmark.peers sb3 --algorithm ppo --env-id HalfCheetah-v5 --num-envs 8 --num-steps 256 --runs DIR
Each logs to TensorBoard in DIR, once per iteration, as the scripts do.
"""

import json
import time
from pathlib import Path
from typing import Literal

import ale_py
import gymnasium as gym
import tyro

from benchmark import manifest

gym.register_envs(ale_py)


def sb3(
    algorithm: Literal["ppo", "a2c", "trpo"],
    env_id: str,
    num_envs: int,
    num_steps: int,
    total_timesteps: int,
    runs: Path,
) -> None:
    """Stable-Baselines3, or sb3-contrib for TRPO; environments are prepared as ours are."""
    import stable_baselines3
    from gymnasium.envs.mujoco import MujocoEnv
    from stable_baselines3.common.env_util import make_atari_env, make_vec_env
    from stable_baselines3.common.logger import configure
    from stable_baselines3.common.vec_env import VecFrameStack, VecNormalize

    on_atari = env_id.startswith("ALE/")
    if on_atari:
        frames = {"frameskip": 1, "repeat_action_probability": 0.0}  # its wrappers skip frames
        envs = VecFrameStack(make_atari_env(env_id, n_envs=num_envs, seed=1, env_kwargs=frames), 4)
    else:
        envs = make_vec_env(env_id, n_envs=num_envs, seed=1)
        if isinstance(envs.envs[0].unwrapped, MujocoEnv):
            envs = VecNormalize(envs)
    policy = "CnnPolicy" if on_atari else "MlpPolicy"
    device = "auto" if on_atari else "cpu"  # as ours choose theirs
    common = {"policy": policy, "env": envs, "n_steps": num_steps, "seed": 1, "device": device}
    if on_atari:  # the only algorithm on pixels here is PPO
        settings = {"batch_size": 256, "n_epochs": 4, "learning_rate": 2.5e-4, "clip_range": 0.1}
        model = stable_baselines3.PPO(ent_coef=0.01, **settings, **common)
    elif algorithm == "ppo":
        model = stable_baselines3.PPO(batch_size=64, n_epochs=10, learning_rate=3e-4, **common)
    elif algorithm == "a2c":
        model = stable_baselines3.A2C(**common)
    else:
        from sb3_contrib import TRPO

        model = TRPO(batch_size=128, n_critic_updates=10, cg_max_steps=15, cg_damping=0.1, **common)
    model.set_logger(configure(str(runs), ["tensorboard"]))
    model.learn(total_timesteps)


def raw(env_id: str, num_envs: int, num_steps: int, total_timesteps: int, runs: Path) -> None:
    """The environments alone, without wrappers, under random actions drawn beforehand: the limit for all."""
    from torch.utils.tensorboard import SummaryWriter

    if env_id.startswith("ALE/"):
        threads = len(manifest.available_cores())
        envs = gym.make_vec(env_id, num_envs, vectorization_mode="vector_entry_point", num_threads=threads)
    else:
        envs = gym.vector.SyncVectorEnv([lambda: gym.make(env_id, disable_env_checker=True)] * num_envs)
    envs.action_space.seed(1)
    actions = [envs.action_space.sample() for _ in range(num_steps)]
    envs.reset(seed=1)
    writer = SummaryWriter(str(runs))
    for step in range(0, total_timesteps, num_envs * num_steps):
        start = time.perf_counter()
        for action in actions:
            envs.step(action)
        steps = num_envs * num_steps
        writer.add_scalar("charts/SPS", steps / (time.perf_counter() - start), step + steps)
    writer.close()


def trl_common(max_steps: int, runs: Path, bf16: bool) -> dict:
    """Settings of TRL's trainers under which they do what ours do, on the device that ours choose."""
    import torch

    return {
        "output_dir": str(runs),
        "max_steps": max_steps,
        "learning_rate": 1e-5,
        "bf16": bf16,
        "gradient_checkpointing": False,  # ours has none either
        "use_cpu": not torch.cuda.is_available(),
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def train_with_clock(trainer, runs: Path) -> None:
    """Trains, with an event at the end of each step; for GRPO also the seconds that its sampling took."""
    from torch.utils.tensorboard import SummaryWriter
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **keywords) -> None:
            writer.add_scalar("time/fps", 0, state.global_step)  # what counts is the time of the event
            if seconds:
                writer.add_scalar("time/rollout", seconds.pop(), state.global_step)

    writer, seconds = SummaryWriter(str(runs)), []
    if hasattr(trainer, "_generate"):
        generate = trainer._generate

        def timed(*arguments, **keywords):
            start = time.perf_counter()
            result = generate(*arguments, **keywords)
            seconds.append(time.perf_counter() - start)
            return result

        trainer._generate = timed
    trainer.add_callback(Clock())
    trainer.train()
    writer.close()


def trl_grpo(model: str, max_steps: int, runs: Path, bf16: bool = True) -> None:
    """TRL's GRPOTrainer on the prompts and with the reward of grpo_llm.py; 32 groups of 16 completions."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    from grpo_llm import Arithmetic, draw, number_reward

    def correctness(prompts: list[str], completions: list[str], answer: list[str], **columns) -> list[float]:
        return number_reward(prompts, completions, answer)

    problems = [draw(Arithmetic(), 1, i) for i in range(32 * (max_steps + 1))]
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model),
        processing_class=AutoTokenizer.from_pretrained(model),
        reward_funcs=correctness,
        args=GRPOConfig(
            per_device_train_batch_size=512,
            num_generations=16,
            max_completion_length=38,
            scale_rewards="none",
            **trl_common(max_steps, runs, bf16),
        ),
        train_dataset=Dataset.from_list([{key: x[key] for key in ("prompt", "answer")} for x in problems]),
    )
    train_with_clock(trainer, runs)


def trl_dpo(model: str, dataset: Path, max_steps: int, runs: Path, bf16: bool = True) -> None:
    """TRL's DPOTrainer on the pairs of dpo_llm.py, 64 a step, the reference computed before the training."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    rows = [json.loads(line) for line in dataset.read_text().splitlines()]
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model),
        processing_class=AutoTokenizer.from_pretrained(model),
        args=DPOConfig(
            per_device_train_batch_size=64,
            beta=0.5,
            precompute_ref_log_probs=True,
            **trl_common(max_steps, runs, bf16),
        ),
        train_dataset=Dataset.from_list(
            [{key: x[key] for key in ("prompt", "chosen", "rejected")} for x in rows]
        ),
    )
    train_with_clock(trainer, runs)


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"sb3": sb3, "raw": raw, "trl-grpo": trl_grpo, "trl-dpo": trl_dpo})
