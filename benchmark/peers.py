"""What the speed comparison measures beside the scripts, each in a process of its own.

python -m benchmark.peers sb3 --num-envs 8 --num-steps 256 --runs DIR
Each logs to TensorBoard in DIR, once per iteration, as the scripts do.
"""

import time
from pathlib import Path

import gymnasium as gym
import tyro


def sb3(env_id: str, num_envs: int, num_steps: int, total_timesteps: int, runs: Path) -> None:
    """PPO of Stable-Baselines3, default networks, 10 epochs of minibatches of 64, normalised as ours is."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.logger import configure
    from stable_baselines3.common.vec_env import VecNormalize

    envs = VecNormalize(make_vec_env(env_id, n_envs=num_envs, seed=1))
    model = PPO(
        "MlpPolicy",
        envs,
        n_steps=num_steps,
        batch_size=64,
        n_epochs=10,
        learning_rate=3e-4,
        seed=1,
        device="cpu",
    )
    model.set_logger(configure(str(runs), ["tensorboard"]))
    model.learn(total_timesteps)


def raw(env_id: str, num_envs: int, num_steps: int, total_timesteps: int, runs: Path) -> None:
    """The environments alone, without wrappers, under random actions drawn beforehand: the limit for all."""
    from torch.utils.tensorboard import SummaryWriter

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
