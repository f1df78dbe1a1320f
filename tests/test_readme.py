"""What README.md and docs/ say: the commands run, the flags, metrics, names and links are there.

Training is cut down to a few steps by flags that are appended, since the last one of a name counts. What
installs, logs in or serves is only looked at.
"""

import dataclasses
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from helpers import REPOSITORY, WALL_CLOCK, read_curves

README = (REPOSITORY / "README.md").read_text()
SCRIPTS = {path.stem: importlib.import_module(path.stem) for path in sorted(REPOSITORY.glob("*.py"))}
PAGES = {name: (REPOSITORY / "docs" / f"{name}.md").read_text() for name in SCRIPTS}
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())

TRAIN = {"num_envs": 2, "num_steps": 64, "num_minibatches": 2, "update_epochs": 1, "critic_epochs": 1}
TRAIN |= {"total_timesteps": 256, "eval_episodes": 1, "compile": False}
TRAIN |= {"sft_steps": 10, "max_steps": 2, "num_prompts": 4, "num_generations": 4, "eval_prompts": 4}
# Pairs need a model that has learned to write reviews.
TRAIN_OF = {"dpo_llm": {"sft_steps": 100, "num_pairs": 100, "eval_prompts": 32}}
TRAIN_OF["ppo_llm"] = {"sft_steps": 100, "num_rankings": 100, "eval_prompts": 32, "reward_steps": 2}
TRAIN_OF["ppo_llm"] |= {"batch_size": 8}
SMALL = {
    "--resume": "--total-timesteps 384",
    "--evaluate": "--eval-episodes 1",
    "--capture-video": "--no-capture-video",  # a machine for tests need not be able to draw
    "benchmark run": "--suite smoke --total-timesteps 256 --seeds 1 --jobs 1",
    "benchmark report": "--suite smoke --total-timesteps 256",
    "benchmark speed": "--help",  # measured in test_benchmark.py
}
ONLY_LOOKED_AT = ("pip install", "python3 -m venv .venv", "source .venv/bin/activate", "tensorboard", "wandb")


def blocks(text: str) -> list[str]:
    """The commands of the bash blocks and the python blocks, in order."""
    found = []
    for language, body in re.findall(r"^```(\w+)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        if language == "bash":
            lines = body.replace("\\\n", " ").splitlines()
            found += [line for line in lines if line.strip() and not line.startswith("#")]
        else:
            found.append(body)
    return found


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a user gets, in which the commands of the README run one after another."""
    folder = tmp_path_factory.mktemp("clone")
    for file in [*REPOSITORY.glob("*.py"), *map(REPOSITORY.joinpath, ("Makefile", "pyproject.toml"))]:
        shutil.copy(file, folder)
    shutil.copy(REPOSITORY / "constraints.txt", folder)
    leave_out = shutil.ignore_patterns("results", "figures", "__pycache__")
    for name in ("benchmark", "examples"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=leave_out)
    return folder


def fill_in_runs(text: str, clone: Path) -> str:
    """The text with each run directory replaced by the newest one of that name, whatever its time."""

    def newest(match: re.Match) -> str:
        runs = sorted((clone / "runs").glob(f"{match[1]}*"))
        assert runs, f"no command of the README before this one makes {match[0]}"
        return f"runs/{runs[-1].name}"

    return re.sub(r"runs/([\w-]+?__\w+?__\d+__)\d{8}-\d{6}", newest, text)


def run(arguments: list[str], clone: Path, variables: dict[str, str]) -> str:
    """Output of a command in the clone; without compilation, and without W&B."""
    environment = os.environ | variables | {"TORCHDYNAMO_DISABLE": "1", "WANDB_MODE": "disabled"}
    process = subprocess.run(
        arguments, cwd=clone, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.returncode == 0, f"{shlex.join(arguments)}\n{process.stdout}"
    return process.stdout


def small_arguments(script: str) -> dict[str, int | bool]:
    """TRAIN, as far as the script has these arguments."""
    known = {field.name for field in dataclasses.fields(SCRIPTS[script].Args)}
    return {name: value for name, value in (TRAIN | TRAIN_OF.get(script, {})).items() if name in known}


def cut_down(command: str) -> list[str]:
    """The arguments of a command after `python`, with the flags that make it small."""
    if "--help" in command:
        return shlex.split(command)
    small = [flags for word, flags in SMALL.items() if word in command]
    if not command.startswith("-m ") and "--resume" not in command and "--evaluate" not in command:
        script = command.split(".py")[0].replace("my_ppo", "ppo_continuous")
        for name, value in small_arguments(script).items():
            flag = name.replace("_", "-")
            small.append(f"--no-{flag}" if value is False else f"--{flag} {value}")
    return shlex.split(command) + shlex.split(" ".join(small))


def change_network(code: str, clone: Path) -> None:
    """Puts the README's network into the copy of the script that the README makes, and trains it."""
    script = clone / "my_ppo.py"
    indented = "".join(f"        {line}\n" for line in code.splitlines())
    changed, places = re.subn(
        r"^        self\.actor = .*\n", indented, script.read_text(), flags=re.MULTILINE
    )
    assert places == 1
    script.write_text(changed)
    run([sys.executable, *cut_down("my_ppo.py --env-id Hopper-v5")], clone, {})


@pytest.mark.parametrize("block", blocks(README), ids=lambda block: block.split("\n")[0])
def test_readme_runs(block: str, clone: Path):
    if match := re.match(r"# (\w+\.py)\n", block):
        (clone / match[1]).write_text(block)
    elif block.startswith("self."):
        change_network(block, clone)
    elif "\n" in block:
        run([sys.executable, "-c", fill_in_runs(block, clone)], clone, {})
    elif block.startswith("make "):
        if not shutil.which("make"):
            pytest.skip("there is no make")
        run(["make", "-n", *shlex.split(block)[1:]], clone, {})
    elif block.startswith(ONLY_LOOKED_AT):
        extras = {extra for names in re.findall(r"\.\[(.*?)\]", block) for extra in names.split(",")}
        assert extras <= PROJECT["project"]["optional-dependencies"].keys()
    elif block.startswith("cp "):
        run(shlex.split(block), clone, {})
    else:
        variables, command = re.fullmatch(r"((?:\w+=\w+ )*)python (.*)", fill_in_runs(block, clone)).groups()
        variables = dict(word.split("=") for word in variables.split())
        run([sys.executable, *cut_down(command)], clone, variables)


def check_metrics_of_a_language_model(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With rewards at which an untrained model sometimes differs from itself, so that there are updates."""

    def parity(prompts: list[str], completions: list[str], **columns: list) -> list[float]:
        return [float(len(completion) % 2) for completion in completions]

    task = getattr(SCRIPTS[name], "Arithmetic", None) or SCRIPTS[name].Reviews
    monkeypatch.setitem(task.rewards, next(iter(task.rewards)), (parity, 1.0))
    run = SCRIPTS[name].main(SCRIPTS[name].Args(**small_arguments(name), runs=str(folder)))
    logged = {tag for tag in read_curves(run) if not tag.endswith("/text_summary")} | {"time/elapsed"}
    assert logged == set(re.findall(r"^\| `([a-z][^`]+)`", PAGES[name], re.MULTILINE))


@pytest.mark.parametrize("name", SCRIPTS)
def test_logged_metrics_are_documented(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if name.endswith("_llm"):
        check_metrics_of_a_language_model(name, tmp_path, monkeypatch)
        return
    quick = {"HalfCheetah-v5": "Pendulum-v1", "ALE/Breakout-v5": "ALE/Breakout-v5"}
    env_id = quick.get(SCRIPTS[name].Args().env_id, "CartPole-v1")
    arguments = small_arguments(name) | {"env_id": env_id, "runs": str(tmp_path), "total_timesteps": 2500}
    run = SCRIPTS[name].main(SCRIPTS[name].Args(**arguments))
    logged = read_curves(run).keys() | WALL_CLOCK
    assert logged == set(re.findall(r"^\| `(\w+/\w+)`", PAGES[name], re.MULTILINE))


@pytest.mark.parametrize("name", SCRIPTS)
def test_flags_and_defaults_are_documented(name: str):
    table = PAGES[name].split("\n## Flags\n")[1].split("\n## ")[0]
    rows = "".join(line for line in table.splitlines() if line.startswith("|"))
    found = re.findall(r"`--([\w-]+)`(?: \((?:`([^`]+)`|([^,)]+)))?", rows)
    documented = {name: quoted or plain for name, quoted, plain in found}
    for field in dataclasses.fields(SCRIPTS[name].Args):
        text, default = documented[field.name.replace("_", "-")], field.default
        if default is dataclasses.MISSING:  # a list, empty by default
            default = None
        if isinstance(default, bool):
            default = "on" if default else "off"
        elif isinstance(default, int | float):
            text = float(text)
        assert text == ("" if default is None else default), field.name


@pytest.mark.parametrize("name", ["README", *SCRIPTS])
def test_mentioned_flags_exist(name: str):
    known = {"help"}
    for script in [name] if name in SCRIPTS else SCRIPTS:
        known |= {field.name for field in dataclasses.fields(SCRIPTS[script].Args)}
    for flag in re.findall(r"`--([\w-]+)", PAGES.get(name, README)):
        assert flag.removeprefix("no-").replace("-", "_") in known, flag


COMMANDS = [(name, block) for name in PAGES for block in blocks(PAGES[name]) if f"{name}.py" in block]


@pytest.mark.parametrize(("name", "command"), COMMANDS)
def test_commands_of_the_pages_are_understood(name: str, command: str):
    words = shlex.split(command)
    SCRIPTS[name].parse_args(words[words.index(f"{name}.py") + 1 :])


@pytest.mark.parametrize("name", SCRIPTS)
def test_names_of_the_pages_exist(name: str):
    """Every function, class and attribute in backticks is in the script."""
    source = Path(SCRIPTS[name].__file__).read_text()
    names = re.findall(r"`([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)`", PAGES[name])
    files = {"checkpoint.pt", "best.pt"}
    missing = [name for name in names if name not in files and name.split(".")[-1] not in source]
    assert not missing


@pytest.mark.parametrize("path", ["README.md", *(f"docs/{name}.md" for name in SCRIPTS)])
def test_links_lead_somewhere(path: str):
    text = re.sub(r"<!--.*?-->", "", (REPOSITORY / path).read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if not link.startswith("https://"):
            file, _, section = link.partition("#")
            target = (REPOSITORY / path).parent / file if file else REPOSITORY / path
            assert target.exists(), link
            if section:
                headings = re.findall(r"^#+ (.*)", target.read_text(), re.MULTILINE)
                slugs = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
                assert section in slugs, link


def test_scripts_are_listed():
    """A script is in the README as planned or as ready, and those that are ready are installed."""
    scripts = {path.name for path in REPOSITORY.glob("*.py")}
    rows = dict(re.findall(r"^\| \[?`(\w+\.py)`.*? \| (planned|ready) \|", README, re.MULTILINE))
    assert {name for name, state in rows.items() if state == "ready"} == scripts
    assert {f"{name}.py" for name in PROJECT["tool"]["setuptools"]["py-modules"]} == scripts


def test_constraints_cover_the_dependencies():
    groups = [PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"].values()]
    needed = {re.match(r"[\w-]+", line)[0] for group in groups for line in group}
    pinned = {
        re.match(r"[\w-]+", line)[0]
        for line in (REPOSITORY / "constraints.txt").read_text().splitlines()
        if not line.startswith("#")
    }
    assert needed == pinned
