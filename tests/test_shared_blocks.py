"""The form of the scripts: each stands alone, the algorithm comes first, and shared code is equal.

shared_blocks.toml says which functions, classes, methods and constants are the same in which scripts.
"""

import ast
import re
import tomllib
from itertools import combinations
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPTS = {path.name: path.read_text() for path in sorted(REPOSITORY.glob("*.py"))}
GROUPS = tomllib.loads((Path(__file__).parent / "shared_blocks.toml").read_text())["group"]

# Lines up to the marker that ends the algorithm, and of the whole file. A reader opens a script to see the
# algorithm, so a change that needs more lines here needs a reason.
LINES = {
    "a2c_cartpole.py": (378, 1154),
    "dpo_llm.py": (430, 2056),
    "grpo_llm.py": (606, 2218),
    "ppo_atari.py": (374, 1205),
    "ppo_continuous.py": (338, 1095),
    "ppo_discrete.py": (306, 1055),
    "ppo_llm.py": (682, 2481),
    "reinforce.py": (364, 1000),
    "trpo_mujoco.py": (415, 1172),
}


def named_blocks(source: str) -> dict[str, tuple[str, bool]]:
    """{name: (source, whether it is a definition)} of top-level definitions and constants, and of methods."""
    lines, blocks = source.splitlines(), {}

    def text(node: ast.stmt) -> str:
        first = min([node.lineno] + [decorator.lineno for decorator in getattr(node, "decorator_list", [])])
        return "\n".join(lines[first - 1 : node.end_lineno])

    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            blocks[node.name] = text(node), True
            for method in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(method, ast.FunctionDef):
                    blocks[f"{node.name}.{method.name}"] = text(method), True
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            # Whole lines, since the comment behind a constant belongs to it.
            blocks |= {x.id: (text(node), False) for x in targets if isinstance(x, ast.Name)}
    return blocks


def find_problems(groups: list[dict], scripts: dict[str, str]) -> list[str]:
    """One sentence for each copy that is missing, has drifted, or is not listed."""
    blocks, problems = {file: named_blocks(source) for file, source in scripts.items()}, []
    for group in groups:
        first, *others = group["scripts"]
        for name in group["names"]:
            missing = [file for file in group["scripts"] if name not in blocks.get(file, {})]
            problems += [f"{file} has no {name}" for file in missing]
            if missing:
                continue
            problems += [
                f"{name} differs between {first} and {file}"
                for file in others
                if blocks[file][name] != blocks[first][name]
            ]
    for one, other in combinations(blocks, 2):
        listed = {name for group in groups if {one, other} <= {*group["scripts"]} for name in group["names"]}
        for name in blocks[one].keys() & blocks[other].keys():
            text, is_definition = blocks[one][name]
            is_listed = name in listed or name.split(".")[0] in listed
            if is_definition and not is_listed and text == blocks[other][name][0]:
                problems.append(
                    f"{name} is the same in {one} and {other}; shared_blocks.toml does not say so"
                )
    return problems


def find_local_imports(source: str, local: set[str]) -> list[str]:
    """The imports of a script, wherever they stand, that need this repository."""
    modules = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules.append("." * node.level + (node.module or ""))
    return [module for module in modules if module.startswith(".") or module.split(".")[0] in local]


def marker_line(source: str) -> int | None:
    """The line of `# =====` that ends the algorithm."""
    lines = enumerate(source.splitlines(), 1)
    return next((number for number, line in lines if re.fullmatch(r"# ={60,}", line)), None)


def test_shared_blocks_are_equal_and_listed():
    assert find_problems(GROUPS, SCRIPTS) == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_imports_nothing_from_the_repository(name):
    folders = {path.name for path in REPOSITORY.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert find_local_imports(SCRIPTS[name], {Path(script).stem for script in SCRIPTS} | folders) == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_algorithm_comes_first_and_stays_short(name):
    source, (first_part, whole) = SCRIPTS[name], LINES[name]
    marker = marker_line(source)
    assert marker and marker <= first_part
    assert len(source.splitlines()) <= whole
    definitions = {node.name: node for node in ast.parse(source).body if hasattr(node, "name")}
    train = definitions["train"]
    assert train.end_lineno - train.lineno + 1 <= 90
    algorithm = {name for name, node in definitions.items() if node.lineno < marker}
    plumbing = {name for name, node in definitions.items() if node.lineno > marker}
    assert {"Args", "train"} <= algorithm
    assert {"Run", "load_checkpoint", "parse_args", "main"} <= plumbing


def test_lines_are_counted():
    source = "x = 1\n# " + "=" * 80 + "\ny = 2\n# ===\n"
    assert marker_line(source) == 2
    assert marker_line(source.replace("=" * 80, "-" * 80)) is None


F = "def f(x):\n    return x\n"
C = "class C:\n    def g(self):\n        return 1\n\n    def h(self):\n        return 2\n"
TWO = {"a.py": "LIMIT = 1\n" + F, "b.py": "LIMIT = 1\n" + F}
CLASSES = {"a.py": C, "b.py": C}
OTHER_H = ("return 2", "return 3")


def group(*names: str, scripts: str = "a.py b.py") -> dict:
    return {"scripts": scripts.split(), "names": list(names)}


@pytest.mark.parametrize(
    ("groups", "scripts", "change", "problem"),
    [
        ([group("f")], TWO, ("", ""), None),
        ([group("f")], TWO, ("return x", "return  x"), "f differs between a.py and b.py"),
        ([group("f")], TWO, ("def f", "@cache\ndef f"), "f differs between a.py and b.py"),
        ([group("f")], TWO, ("def f", "def g"), "b.py has no f"),
        ([group("f", scripts="a.py b.py c.py")], TWO, ("", ""), "c.py has no f"),
        ([group("f", "LIMIT")], TWO, ("= 1", "= 2"), "LIMIT differs between"),
        ([group("f", "LIMIT")], TWO, ("= 1", "= 1  # why"), "LIMIT differs between"),
        ([], TWO, ("", ""), "f is the same in a.py and b.py; shared_blocks.toml does not say so"),
        ([], TWO, ("return x", "return x + 1"), None),  # one name may stand for two things
        ([group("C")], CLASSES, ("", ""), None),
        ([group("C")], CLASSES, OTHER_H, "C differs between a.py and b.py"),
        ([group("C.g")], CLASSES, OTHER_H, None),
        ([group("C.g", "C.h")], CLASSES, OTHER_H, "C.h differs between a.py and b.py"),
        ([], CLASSES, OTHER_H, "C.g is the same in a.py and b.py; shared_blocks.toml does not say so"),
    ],
)
def test_problems_are_found(groups, scripts, change, problem):
    changed = {"b.py": scripts["b.py"].replace(*change)} if change[0] else {}
    problems = find_problems(groups, scripts | changed)
    assert len(problems) == (problem is not None)
    assert all(problem in found for found in problems)


def test_local_imports_are_found():
    source = "import torch, benchmark.runs\ndef f():\n    from ppo_continuous import mlp\nfrom . import x\n"
    assert find_local_imports(source, {"benchmark", "ppo_continuous"}) == [
        "benchmark.runs",
        ".",
        "ppo_continuous",
    ]
