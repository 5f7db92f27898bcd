"""The arrows between the parts, read off the source itself."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tiny import PROJECT

PACKAGES = ("abn", "labeling", "flows")
SOURCES = [path for package in PACKAGES for path in sorted((PROJECT / package).rglob("*.py"))]
FORBIDDEN = {
    "abn": {"labeling", "flows", "prefect", "mlflow", "dvc", "label_studio_sdk"},
    "labeling": {"abn", "flows", "torch", "torchvision", "prefect", "mlflow", "dvc"},
    "flows": {"label_studio_sdk"},
}
ACTIONS = {
    *("getenv", "putenv", "argparse", "parse_args", "mkdir", "makedirs", "mkdtemp", "open", "touch"),
    *("write_text", "write_bytes", "read_text", "read_bytes", "unlink", "chdir", "Popen", "system", "check_call"),
    *("check_output", "run", "setlocale", "filterwarnings", "simplefilter", "basicConfig", "print"),
}


def imports(source: str, package: tuple[str, ...]) -> set[str]:
    """Every module that `source`, a module of `package`, imports anywhere: full names, also of relative imports.

    `from a import b` gives a and a.b, since b may be a module.
    """
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return names


def imports_of(path: Path) -> set[str]:
    return imports(path.read_text(), path.relative_to(PROJECT).parts[:-1])


def abn_modules(path: Path) -> set[str]:
    """The files of abn that `path` imports, directly or through others, and itself; abn/__init__.py is empty."""
    found, waiting = set(), [path]
    while waiting:
        current = waiting.pop()
        found.add(current.relative_to(PROJECT).as_posix())
        for name in imports_of(current):
            file = PROJECT / f"{name.replace('.', '/')}.py"
            if name.startswith("abn.") and file.is_file() and file.relative_to(PROJECT).as_posix() not in found:
                waiting.append(file)
    return found


def at_import(node: ast.AST) -> Iterator[ast.AST]:
    """What runs when a module is imported: everything but the bodies of functions and of `if __name__ == ...`."""
    children: list[ast.AST]
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        children = [*node.decorator_list, *node.args.defaults, *(d for d in node.args.kw_defaults if d)]
    elif isinstance(node, ast.Lambda) or (isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)):
        children = []
    else:
        children = list(ast.iter_child_nodes(node))
    for child in children:
        yield child
        yield from at_import(child)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(PROJECT).as_posix())
def test_a_module_imports_only_what_its_package_may(path: Path) -> None:
    package = path.relative_to(PROJECT).parts[0]
    roots = {name.split(".")[0] for name in imports_of(path)}
    allowed = {"label_studio_sdk"} if path.name == "client.py" and package == "labeling" else set()
    forbidden = FORBIDDEN[package] | ({"label_studio_sdk"} - allowed)
    assert not roots & forbidden


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(PROJECT).as_posix())
def test_a_module_does_nothing_when_it_is_imported(path: Path) -> None:
    for node in at_import(ast.parse(path.read_text())):
        called = node.func if isinstance(node, ast.Call) else node
        name = called.attr if isinstance(called, ast.Attribute) else called.id if isinstance(called, ast.Name) else ""
        acts = isinstance(node, ast.Call) and name in ACTIONS
        assert not acts and name != "environ", ast.unparse(node)


def test_importing_abn_and_labeling_makes_no_file(tmp_path: Path) -> None:
    modules = [".".join(path.relative_to(PROJECT).with_suffix("").parts) for path in SOURCES]
    code = "\n".join(f"import {name}" for name in modules if not name.startswith("flows") and "__init__" not in name)
    home = tmp_path / "home"
    home.mkdir()
    environment = {"HOME": str(home), "PYTHONPATH": str(PROJECT), "PYTHONDONTWRITEBYTECODE": "1", "PATH": "/usr/bin"}
    subprocess.run([sys.executable, "-c", code], cwd=home, env=environment, check=True, timeout=120)
    assert not list(home.iterdir())


def test_imports_are_seen_inside_functions_and_when_relative() -> None:
    source = "def f():\n import prefect.flows\n from . import data\n from ..flows import cli\n from .model import ABN"
    found = imports(source, ("abn",))
    assert {"prefect.flows", "abn.data", "abn.model"} <= found
    assert {"x.flows", "x.flows.cli"} <= imports(source, ("x", "abn"))


def test_an_action_at_import_is_seen_and_one_in_a_function_is_not() -> None:
    source = "class A:\n  b = os.mkdir('x')\ndef f(c=os.getenv('Y')):\n  open('z')\nif __name__ == '__main__':\n  run()"
    calls = {ast.unparse(node) for node in at_import(ast.parse(source)) if isinstance(node, ast.Call)}
    assert calls == {"os.mkdir('x')", "os.getenv('Y')"}


STAGES = yaml.safe_load((PROJECT / "dvc.yaml").read_text())["stages"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_names_every_module_that_it_imports_and_no_other(stage: str) -> None:
    commands = STAGES[stage]["cmd"]
    needed = set()
    for command in [commands] if isinstance(commands, str) else commands:
        module = command.removeprefix("python -m ").split()[0]
        needed |= abn_modules(PROJECT / f"{module.replace('.', '/')}.py")
    named = {dependency for dependency in STAGES[stage]["deps"] if dependency.startswith("abn/")}
    assert named == needed
