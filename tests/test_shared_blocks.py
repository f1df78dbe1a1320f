"""Scripts stand alone, and what they have in common is the same in each: see shared_blocks.toml."""

import ast
import tomllib
from itertools import combinations
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPTS = {path.name: path.read_text() for path in sorted(REPOSITORY.glob("*.py"))}
BLOCKS = tomllib.loads((Path(__file__).parent / "shared_blocks.toml").read_text())["blocks"]


def top_level(source: str) -> dict[str, tuple[str, bool]]:
    """What a script names at its top level: {name: (source, whether it is a function or class)}."""
    lines, blocks = source.splitlines(), {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            first = min([node.lineno] + [decorator.lineno for decorator in node.decorator_list])
            blocks[node.name] = "\n".join(lines[first - 1 : node.end_lineno]), True
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            # The whole lines, since the comment behind a constant belongs to it.
            text = "\n".join(lines[node.lineno - 1 : node.end_lineno])
            blocks |= {x.id: (text, False) for x in targets if isinstance(x, ast.Name)}
    return blocks


def find_problems(listed: dict[str, list], scripts: dict[str, str]) -> list[str]:
    """One sentence for each copy that is missing, has drifted, or is not listed."""
    blocks, problems = {file: top_level(source) for file, source in scripts.items()}, []
    # A name that stands for several texts has a list of files for each of them.
    texts = {name: files if isinstance(files[0], list) else [files] for name, files in listed.items()}
    for name, files in [(name, files) for name, lists in texts.items() for files in lists]:
        present = [file for file in files if name in blocks.get(file, {})]
        problems += [f"{file} has no {name}" for file in files if file not in present]
        problems += [
            f"{name} differs between {present[0]} and {file}"
            for file in present[1:]
            if blocks[file][name] != blocks[present[0]][name]
        ]
    for one, other in combinations(blocks, 2):
        for name in blocks[one].keys() & blocks[other].keys():
            text, is_definition = blocks[one][name]
            if (
                is_definition
                and text == blocks[other][name][0]
                and not any({one, other} <= {*files} for files in texts.get(name, []))
            ):
                problems.append(
                    f"{name} is the same in {one} and {other}, and shared_blocks.toml does not say so"
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


def test_shared_blocks_are_equal_and_listed():
    assert find_problems(BLOCKS, SCRIPTS) == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_imports_nothing_from_the_repository(name):
    folders = {path.name for path in REPOSITORY.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert find_local_imports(SCRIPTS[name], {Path(script).stem for script in SCRIPTS} | folders) == []


TWO = {"a.py": "LIMIT = 1\ndef f(x):\n    return x\n", "b.py": "LIMIT = 1\ndef f(x):\n    return x\n"}


@pytest.mark.parametrize(
    ("listed", "change", "problem"),
    [
        ({"f": ["a.py", "b.py"]}, ("", ""), None),
        ({"f": ["a.py", "b.py"]}, ("return x", "return  x"), "f differs between a.py and b.py"),
        ({"f": ["a.py", "b.py"]}, ("def f", "@cache\ndef f"), "f differs between a.py and b.py"),
        ({"f": ["a.py", "b.py"]}, ("def f", "def g"), "b.py has no f"),
        ({"f": ["a.py", "b.py", "c.py"]}, ("", ""), "c.py has no f"),
        ({"f": ["a.py", "b.py"], "LIMIT": ["a.py", "b.py"]}, ("= 1", "= 2"), "LIMIT differs between"),
        ({"f": ["a.py", "b.py"], "LIMIT": ["a.py", "b.py"]}, ("= 1", "= 1  # why"), "LIMIT differs between"),
        ({}, ("", ""), "f is the same in a.py and b.py, and shared_blocks.toml does not say so"),
        ({"f": ["a.py"]}, ("", ""), "f is the same in a.py and b.py, and shared_blocks.toml does not say so"),
        ({"f": [["a.py", "b.py"], ["c.py", "d.py"]]}, ("", ""), None),
        ({"f": [["c.py", "d.py"], ["a.py", "b.py"]]}, ("return x", "return 0"), "f differs between a.py and"),
        ({}, ("return x", "return x + 1"), None),  # the same name may stand for something else elsewhere
    ],
)
def test_problems_are_found(listed, change, problem):
    changed = {"b.py": TWO["b.py"].replace(*change)} if change[0] else {}
    other = "LIMIT = 1\ndef f(x):\n    return -x\n"
    both = (
        {"c.py": other, "d.py": other} if any(isinstance(files[0], list) for files in listed.values()) else {}
    )
    problems = find_problems(listed, TWO | changed | both)
    assert len(problems) == (problem is not None)
    assert all(problem in found for found in problems)


def test_local_imports_are_found():
    source = "import torch, benchmark.runs\ndef f():\n    from ppo_continuous import mlp\nfrom . import x\n"
    assert find_local_imports(source, {"benchmark", "ppo_continuous"}) == [
        "benchmark.runs",
        ".",
        "ppo_continuous",
    ]
