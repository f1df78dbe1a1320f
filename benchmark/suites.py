"""What is run: suites of tasks, as plain data, and the figures that others have published for them."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

TRAINING = "charts/episodic_return"  # mean of the last 100 training episodes
EVALUATION = "eval/episodic_return"  # of the policy without noise, but for Atari
ELAPSED = "time/elapsed"  # seconds of training so far
LOSSES = ("losses/approx_kl", "losses/clip_fraction", "losses/entropy", "losses/explained_variance")


@dataclass(frozen=True)
class Reference:
    """A published figure, and where it stands."""

    metric: Literal["training", "evaluation"]
    """which of our figures it is to be held against"""
    value: float
    source: str


@dataclass
class Task:
    """A variant of a script on one environment, to be run once per seed."""

    script: str
    """file, relative to the repository"""
    environment: str
    """environment id; for a script without environments the name of what it does"""
    total_timesteps: int
    flags: tuple[str, ...] = ()
    """further arguments, which make the variant; {seed} stands for the seed"""
    label: str = ""
    """name of the variant, which keeps its results apart; the script's own name if not given"""
    references: tuple[Reference, ...] = ()
    environment_flag: str = "--env-id"
    """empty for a script without environments"""
    steps_flag: str = "--total-timesteps"
    training_tag: str = TRAINING
    evaluation_tag: str = EVALUATION
    other_tags: tuple[str, ...] = LOSSES
    """what else to keep of the logged scalars"""
    training_name: str = "last 100 training episodes"
    """what the value of training_tag is, for tables and figures"""
    evaluation_name: str = "evaluation"
    """the same of evaluation_tag, for figures"""
    multithreaded: bool = False
    """whether a run uses more than one core; most would be slower with more"""
    drawn_tag: str = ""
    """one of these that has a panel of its own in the figures, on a logarithmic scale"""

    def __post_init__(self) -> None:
        self.label = self.label or Path(self.script).stem

    @property
    def tags(self) -> tuple[str, ...]:
        """The columns of a result, less the step."""
        return (self.training_tag, self.evaluation_tag, ELAPSED, *self.other_tags)

    @property
    def folder(self) -> Path:
        """Where the runs and results of this task lie, relative to those of the suite."""
        return Path(self.label) / self.environment.replace("/", "-").replace(":", "-")

    def arguments(self, seed: int) -> list[str]:
        """The command line after `python`, as a user would type it."""
        environment = [self.environment_flag, self.environment] if self.environment_flag else []
        name = ["--exp-name", self.label] if self.label != Path(self.script).stem else []
        steps = [self.steps_flag, str(self.total_timesteps)]
        flags = [flag.replace("{seed}", str(seed)) for flag in self.flags]
        return [self.script, *environment, "--seed", str(seed), *steps, *name, *flags]


def evaluation(value: float, source: str) -> Reference:
    return Reference("evaluation", value, source)


def cleanrl(value: float, steps: str = "1M") -> Reference:
    return Reference("training", value, f"CleanRL, {steps}")


# The best public evaluations of PPO, at 1M steps and a discount of 0.99 where there is no other note, and
# CleanRL's last 100 training episodes. Tianshou's figures are the maximum over training of the mean over 10
# seeds, rl-zoo's are of one run with settings tuned for the task. None is for v5.
PPO_MUJOCO = {
    "HalfCheetah-v5": (evaluation(5819.1, "rl-zoo"), evaluation(5783.9, "Tianshou"), cleanrl(1442.6)),
    "Hopper-v5": (evaluation(3450.1, "XuanCe"), cleanrl(2382.9)),
    "Walker2d-v5": (evaluation(4318.6, "XuanCe"), cleanrl(2288.0)),
    "Ant-v5": (evaluation(3258.4, "Tianshou"),),
    "Swimmer-v5": (evaluation(120, "Spinning Up, read off a graph"),),
    "Humanoid-v5": (evaluation(799.4, "RPO in CleanRL, 8M"), cleanrl(716.1)),
    "Reacher-v5": (evaluation(-4.1, "Tianshou"),),
    "InvertedPendulum-v5": (evaluation(1000, "Tianshou"), cleanrl(963.1)),
    "InvertedDoublePendulum-v5": (evaluation(9231.3, "Tianshou"),),
}

# Swimmer's stroke pays off over hundreds of steps, which a discount of 0.99 hides.
LONG_HORIZON = ("--gamma", "0.9999", "--gae-lambda", "0.98")

# The best public evaluations of TRPO at 1M steps: Tianshou's and rl-zoo's, as above, and sb3-contrib's at the
# end of training, mean of 3 seeds, with settings tuned for each task. None is for v5.
TRPO_MUJOCO = {
    "HalfCheetah-v5": (evaluation(4471.2, "Tianshou"), evaluation(1803, "sb3-contrib")),
    "Hopper-v5": (
        evaluation(3618.4, "rl-zoo"),
        evaluation(3372, "sb3-contrib"),
        evaluation(2046.0, "Tianshou"),
    ),
    "Walker2d-v5": (
        evaluation(4933.1, "rl-zoo"),
        evaluation(4502, "sb3-contrib"),
        evaluation(3826.7, "Tianshou"),
    ),
    "Ant-v5": (evaluation(4982.3, "rl-zoo"), evaluation(3554, "sb3-contrib"), evaluation(2866.7, "Tianshou")),
    "Swimmer-v5": (evaluation(40.9, "Tianshou"),),
    "InvertedPendulum-v5": (evaluation(1000, "Tianshou"),),
    "InvertedDoublePendulum-v5": (evaluation(8435.2, "Tianshou"),),
}
STEPS_OF_TRPO = (
    "losses/kl",
    "losses/improvement",
    "losses/expected_improvement",
    "losses/backtracks",
    "losses/step_accepted",
    "losses/cg_residual",
    "losses/explained_variance",
)


# What ppo_continuous.py does otherwise than CleanRL's PPO, undone one by one. The first rows are flags of the
# script; benchmark/ablated.py undoes the others.
ABLATIONS = {
    "all of it": (),
    "advantages once per batch": ("--no-recompute-advantages",),
    "advantages normalised": ("--norm-adv",),
    "no entropy bonus": ("--ent-coef", "0"),
    "no KL stop": ("--target-kl", "None"),
    "lambda 0.95": ("--gae-lambda", "0.95"),
    "standard deviation 1": ("--log-std-init", "0"),
    "starts together": ("--without", "staggered-starts"),
    "epsilon 1e-5": ("--without", "small-epsilon"),
    "raw observations": ("--without", "normalised-observations"),
    "raw rewards": ("--without", "scaled-rewards"),
}


def ablation(environment: str, label: str) -> Task:
    flags = ABLATIONS[label]
    script = "benchmark/ablated.py" if "--without" in flags else "ppo_continuous.py"
    return Task(script, environment, 500_000, flags, label)


def trpo(environment: str, total_timesteps: int = 1_000_000, *flags: str, label: str = "") -> Task:
    references = TRPO_MUJOCO[environment]
    return Task(
        "trpo_mujoco.py", environment, total_timesteps, flags, label, references, other_tags=STEPS_OF_TRPO
    )


# Tianshou's evaluations of REINFORCE and of A2C, as above, at 3M steps, on v3.
REINFORCE_MUJOCO = {
    "HalfCheetah-v5": (884.0, 2377.3),
    "Hopper-v5": (395.8, 1608.6),
    "Walker2d-v5": (412.0, 1805.4),
    "InvertedPendulum-v5": (999.2, 1000.0),
}
GRADIENT_OF_REINFORCE = (
    "losses/gradient_variance",
    "losses/grad_norm",
    "losses/entropy",
    "losses/explained_variance",
)
LOSSES_OF_A2C = ("losses/entropy", "losses/explained_variance", "losses/grad_norm")
ESTIMATORS = ("total_return", "reward_to_go", "baseline", "q_value", "advantage", "td_residual")


def reinforce(
    environment: str,
    total_timesteps: int,
    *flags: str,
    label: str = "",
    references: tuple[Reference, ...] = (),
    drawn_tag: str = "",
) -> Task:
    return Task(
        "reinforce.py",
        environment,
        total_timesteps,
        flags,
        label,
        references,
        other_tags=GRADIENT_OF_REINFORCE,
        drawn_tag=drawn_tag,
    )


# The best public scores of PPO on each game at 10M steps, without sticky actions: the mean of the last 100
# training games, and an evaluation of one run, Tianshou's the best of the run, rl-zoo's the last.
JAX = "CleanRL, JAX"
PPO_ATARI = {
    "Pong": ((20.8, JAX), (20.99, "rl-zoo")),
    "Breakout": ((430, JAX), (441.8, "Tianshou")),
    "BeamRider": ((2860.6, JAX), (3397, "rl-zoo")),
    "Qbert": ((17246, JAX), (17395, "Tianshou")),
    "SpaceInvaders": ((1189, JAX), (1340.5, "Tianshou")),
    "Seaquest": ((1518, "OpenAI baselines"), (1784, "rl-zoo")),
    "Enduro": ((1297, JAX), (1245.4, "Tianshou")),
    "MsPacman": ((2346, JAX), (2098, "Tianshou")),
}
# Many games at a time, for a fast emulator, and larger steps: for minutes instead of hours.
FAST_ATARI_FLAGS = ("--num-envs", "64", "--num-steps", "32", "--num-minibatches", "8", "--update-epochs", "3")
FAST_ATARI_FLAGS += ("--clip-coef", "0.2", "--learning-rate", "5e-4")


def atari(game: str, total_timesteps: int, *flags: str, label: str = "") -> Task:
    (training, trained_by), (evaluated, evaluated_by) = PPO_ATARI[game]
    references = (
        Reference("training", training, f"{trained_by}, 10M"),
        evaluation(evaluated, f"{evaluated_by}, 10M"),
    )
    environment = f"ALE/{game}-v5"
    return Task("ppo_atari.py", environment, total_timesteps, flags, label, references, multithreaded=True)


# Several updates per batch, without which most of the losses are the same.
SEVERAL_UPDATES = ("--num-minibatches", "4", "--num-iterations", "2", "--learning-rate", "2e-4")
LOSSES_OF_GRPO = ("grpo", "dr_grpo", "dapo", "gspo", "cispo")
ADVANTAGES_OF_GRPO = ("grpo", "rloo", "softmax")  # and dr_grpo, the default, which the losses have


# The flag that holds a method of preferences back from the reference, and values from near to far.
FRONTIER = {
    "dpo": ("--beta", ("2", "0.7", "0.2")),
    "ipo": ("--beta", ("10", "3", "1")),
    "kto": ("--beta", ("2", "0.7", "0.2")),
    "simpo": ("--beta", ("20", "10", "4")),
    "orpo": ("--orpo-lambda", ("0.3", "1", "3")),
}
# Without the likelihood of the chosen that stands beside DPO by default.
PURE = ("--sft-coef", "0")
# As in dpo_llm.py, which has the task.
GRPO_ON_REVIEWS = ("--task", "dpo_llm:Reviews", "--sft-steps", "300", "--eval-prompts", "512")
GRPO_ON_REVIEWS += ("--eval-samples", "1")


# The models that the suite llm-ppo has made with the same seed, for methods that start from them.
RLHF_RUN = "runs/benchmark/llm-ppo/ppo_llm/reviews/seed{seed}/run"
LEARNED_REWARD = ("--reward-model", f"{RLHF_RUN}/reward_model")
PPO_ALONE = ("--stage", "ppo", "--model", f"{RLHF_RUN}/reference", *LEARNED_REWARD)
# Reward models of fewer pairs, and what PPO makes of them without a KL to hold it back.
NO_PENALTY = ("--kl-coef", "0", "--eval-interval", "5")
KL_COEFS = ("2", "0.7", "0.2", "0.05")
PAIRS_AND_STEPS = {"512": "32", "2048": "64", "16384": "225"}


def grpo(*flags: str, label: str = "") -> Task:
    """Three-digit sums, for as many steps as are the default; both figures are of held-out prompts."""
    return Task(
        "grpo_llm.py",
        "arithmetic",
        50,
        flags,
        label,
        environment_flag="--task",
        steps_flag="--max-steps",
        training_tag="eval/pass@1",
        training_name="pass@1, sampled",
        evaluation_tag="eval/greedy_pass@1",
        evaluation_name="pass@1, greedy",
        other_tags=("reward", "eval/pass@8", "eval/kl_to_reference", "eval/mean_length", "entropy"),
    )


def grpo_on_reviews(*flags: str, label: str) -> Task:
    """The task of dpo_llm.py, which one of the flags names; only the first figure is used."""
    task = grpo(*flags, *GRPO_ON_REVIEWS, label=label)
    return replace(task, environment="reviews", environment_flag="", training_name="true reward")


def reviews(script: str, max_steps: int, flags: tuple[str, ...], label: str) -> Task:
    """Reviews, for as many steps as are the default; both figures are of held-out prompts."""
    return Task(
        script,
        "reviews",
        max_steps,
        flags,
        label,
        environment_flag="",
        steps_flag="--max-steps",
        training_tag="eval/true_reward",
        training_name="true reward",
    )


def dpo(*flags: str, label: str = "") -> Task:
    margins = "eval/rewards/accuracies", "eval/rewards/margins", "eval/logps/chosen", "eval/logps/rejected"
    return replace(
        reviews("dpo_llm.py", 225, flags, label),
        evaluation_tag="eval/win_rate",
        evaluation_name="win rate against the reference",
        other_tags=("eval/kl_to_reference", "eval/mean_length", *margins),
    )


def ppo(*flags: str, label: str = "") -> Task:
    texts = "eval/mean_length", "eval/clipped_ratio", "eval/distinct"
    reward_model = "reward_model/true_accuracy", "reward_model/eval_accuracy", "kl_coef"
    return replace(
        reviews("ppo_llm.py", 50, flags, label),
        evaluation_tag="eval/learned_reward",
        evaluation_name="learned reward",
        other_tags=("eval/kl_to_reference", *texts, *reward_model),
    )


SUITES: dict[str, list[Task]] = {
    "mujoco": [
        Task("ppo_continuous.py", environment, 1_000_000, references=references)
        for environment, references in PPO_MUJOCO.items()
    ],
    "ablations": [
        ablation(environment, label)
        for label in ABLATIONS
        for environment in ("HalfCheetah-v5", "Hopper-v5", "Walker2d-v5", "Ant-v5")
    ],
    "pendulum": [Task("ppo_continuous.py", "Pendulum-v1", 300_000, references=(cleanrl(-1142.0, "8M"),))],
    # Tasks on which no setting of ppo_continuous.py was tuned; those of Box2D need gymnasium[box2d].
    "untuned": [
        Task("ppo_continuous.py", environment, 1_000_000)
        for environment in (
            "BipedalWalker-v3",
            "LunarLanderContinuous-v3",
            "MountainCarContinuous-v0",
            "Pusher-v5",
            "HumanoidStandup-v5",
        )
    ],
    "trpo": [trpo(environment) for environment in TRPO_MUJOCO],
    "swimmer": [
        Task(
            "ppo_continuous.py",
            "Swimmer-v5",
            1_000_000,
            LONG_HORIZON,
            label="ppo_gamma_0.9999",
            references=(evaluation(281.6, "rl-zoo, PPO"),),
        ),
        replace(
            trpo("Swimmer-v5", 1_000_000, *LONG_HORIZON[:2], label="trpo_gamma_0.9999"),
            references=(evaluation(365.7, "rl-zoo, TRPO"),),
        ),
    ],
    "trpo-step-rules": [
        trpo(environment, 500_000, "--step-rule", rule, label=rule)
        for environment in ("HalfCheetah-v5", "Hopper-v5")
        for rule in ("trust-region", "natural-gradient", "line-search")
    ],
    # The scripts for discrete actions side by side.
    "classic": [
        reinforce("CartPole-v1", 300_000),
        Task("a2c_cartpole.py", "CartPole-v1", 500_000, other_tags=LOSSES_OF_A2C),
        Task("ppo_discrete.py", "CartPole-v1", 100_000),
        Task("a2c_cartpole.py", "Acrobot-v1", 500_000, other_tags=LOSSES_OF_A2C),
        Task("ppo_discrete.py", "Acrobot-v1", 200_000),
    ],
    "a3c": [
        Task(
            "a2c_cartpole.py",
            "CartPole-v1",
            500_000,
            ("--asynchronous", "--num-workers", "2"),
            label="a3c",
            other_tags=LOSSES_OF_A2C,
        )
    ],
    # Needs Box2D: pip install "gymnasium[box2d]".
    "lunarlander": [
        Task("ppo_discrete.py", "LunarLander-v3", 1_000_000),
        Task("a2c_cartpole.py", "LunarLander-v3", 1_000_000, other_tags=LOSSES_OF_A2C),
    ],
    # The estimator of the textbook beside others' REINFORCE, and GAE with a critic beside others' A2C.
    "reinforce": [
        task
        for environment, (plain, actor_critic) in REINFORCE_MUJOCO.items()
        for task in (
            reinforce(
                environment,
                3_000_000,
                *("--estimator", "reward_to_go"),
                label="reward_to_go",
                references=(evaluation(plain, "Tianshou's REINFORCE, 3M"),),
            ),
            reinforce(
                environment,
                3_000_000,
                label="advantage",
                references=(evaluation(actor_critic, "Tianshou's A2C, 3M"),),
            ),
        )
    ],
    # Weights as they are, without normalisation, so that their noise can be compared.
    "estimators": [
        reinforce(
            "CartPole-v1",
            300_000,
            *("--estimator", estimator, "--no-norm-returns"),
            label=estimator,
            drawn_tag="losses/gradient_variance",
        )
        for estimator in ESTIMATORS
    ],
    "atari": [atari(game, 10_000_000) for game in PPO_ATARI],
    "atari-fast": [atari(game, 2_500_000, *FAST_ATARI_FLAGS, label="fast") for game in ("Pong", "Breakout")],
    # What rounding to bfloat16 costs in score; both with one thread, side by side.
    "atari-precision": [
        replace(
            atari("Breakout", 150_000, *FAST_ATARI_FLAGS, *flag, label=label),
            references=(),  # the published ones are of runs 67 times as long
            multithreaded=False,
        )
        for label, flag in (("bfloat16", ()), ("float32", ("--no-bfloat16",)))
    ],
    "llm-grpo": [grpo()],
    "llm-grpo-losses": [
        replace(
            task,
            training_tag="reward",
            training_name="reward in training",
            evaluation_tag="eval/pass@1",
            evaluation_name="pass@1, sampled",
            other_tags=("eval/greedy_pass@1", *task.other_tags[1:]),
        )
        for task in [
            *(grpo("--loss", loss, *SEVERAL_UPDATES, label=loss) for loss in LOSSES_OF_GRPO),
            *(
                grpo("--advantages", kind, *SEVERAL_UPDATES, label=f"dapo, advantages {kind}")
                for kind in ADVANTAGES_OF_GRPO
            ),
        ]
    ],
    "llm-dpo": [
        dpo(),
        dpo(*PURE, label="without likelihood"),
        dpo("--loss", "sft", label="likelihood of the chosen"),
    ],
    "llm-frontier": [
        *(
            dpo("--loss", loss, flag, value, *PURE, label=f"{loss}, {flag.removeprefix('--')} {value}")
            for loss, (flag, values) in FRONTIER.items()
            for value in values
        ),
        *(dpo("--beta", value, label=f"dpo and likelihood, beta {value}") for value in ("1", "0.3", "0.1")),
        *(grpo_on_reviews("--beta", beta, label=f"grpo, beta {beta}") for beta in ("0.3", "0.1", "0.03")),
        # Both on the same learned reward; GRPO's KL is in its loss, PPO's in the reward.
        *(ppo(*PPO_ALONE, "--kl-coef", x, label=f"ppo, learned reward, kl_coef {x}") for x in KL_COEFS),
        *(
            grpo_on_reviews(*LEARNED_REWARD, "--beta", x, label=f"grpo, learned reward, beta {x}")
            for x in ("1", "0.3", "0.1", "0.03")
        ),
    ],
    "llm-ppo": [ppo()],
    "llm-overoptimization": [
        ppo(
            *("--num-rankings", pairs, "--reward-steps", steps, *NO_PENALTY),
            label=f"{int(pairs):,} pairs",
        )
        for pairs, steps in PAIRS_AND_STEPS.items()
    ],
    "smoke": [Task("ppo_continuous.py", "Pendulum-v1", 4096)],
}


def find_suite(
    name: str, total_timesteps: int | None = None, preset: str | None = None
) -> tuple[str, list[Task]]:
    """Name and tasks of a suite, or of that with a preset; SystemExit with a sentence if there is none.

    With `total_timesteps` it is another suite, with another name: a trial is never taken for the real thing.
    """
    name = f"{name}-{preset}" if preset else name
    if name not in SUITES:
        raise SystemExit(f"There is no suite {name!r}; there are {', '.join(SUITES)}")
    if total_timesteps is None:
        return name, SUITES[name]
    tasks = [replace(task, total_timesteps=total_timesteps) for task in SUITES[name]]
    return f"{name}-{total_timesteps}", tasks
