"""What the speed comparison measures beside the scripts, each in a process of its own.

python -m benchmark.peers sb3 --algorithm ppo --env-id HalfCheetah-v5 --num-envs 8 --num-steps 256 --runs DIR
Each logs to TensorBoard in DIR, once per iteration, as the scripts do.
"""

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
    common = {"policy": policy, "env": envs, "n_steps": num_steps, "seed": 1, "device": "cpu"}
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


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"sb3": sb3, "raw": raw})
