"""The rules of the house: which package may know which."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("gptcore", "worker", "api", "trainmaster")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}

OURS_AND_SERVERS = {"redis", "rq", "fastapi", "starlette", "uvicorn", "worker", "api", "trainmaster"}
FORBIDDEN = {
    "gptcore": OURS_AND_SERVERS,
    "worker": {"fastapi", "starlette", "uvicorn", "torch", "numpy", "api", "trainmaster"},
    "api": {"torch", "numpy", "rq", "trainmaster"},
}
# what the API, the command line and the worker may read of the trainer: nothing that needs torch
TORCH_FREE = ("api.app", "worker.agent", "worker.launch", "trainmaster.cli", "trainmaster.client", "gptcore.plan")


def imports(path: Path) -> Iterator[str]:
    """Dotted names of everything a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: a relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports_at_load(path: Path) -> Iterator[str]:
    """Our modules among what is imported as a module loads: what could go round in a circle."""
    waiting: list[ast.AST] = [ast.parse(path.read_text())]
    while waiting:
        node = waiting.pop()
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                continue
            case ast.If(test=ast.Name("TYPE_CHECKING") | ast.Compare(left=ast.Name("__name__"))):
                continue
            case ast.Import():
                yield from (alias.name for alias in node.names)
            case ast.ImportFrom():
                yield from (
                    name for alias in node.names for name in (node.module, f"{node.module}.{alias.name}") if name
                )
        waiting += ast.iter_child_nodes(node)


@pytest.mark.parametrize("package", FORBIDDEN)
def test_a_package_knows_none_that_it_must_not(package: str) -> None:
    found = {
        f"{path.relative_to(ROOT)} imports {name}"
        for path in FILES
        if path.is_relative_to(ROOT / package)
        for name in imports(path)
        if name.split(".")[0] in FORBIDDEN[package]
    }
    assert found == set()


@pytest.mark.parametrize("module", TORCH_FREE)
def test_what_serves_and_schedules_loads_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_imports_go_round_in_no_circle() -> None:
    graph = {
        module: {name for name in imports_at_load(path) if name in MODULES and name != module}
        for module, path in MODULES.items()
    }
    assert any(graph.values())
    tuple(TopologicalSorter(graph).static_order())  # raises CycleError naming the circle


def test_packages_are_flat_and_their_init_is_empty() -> None:
    init = {path.parent.name: path.read_text() for path in FILES if path.name == "__init__.py"}
    assert set(init) == set(PACKAGES)
    assert {name for name, text in init.items() if text.strip()} == {"trainmaster"}
    assert all(line.startswith("from trainmaster.client import") for line in init["trainmaster"].splitlines())
    assert [path for path in FILES if path.parent.parent != ROOT] == []


def test_no_module_is_a_drawer_for_odds_and_ends() -> None:
    assert {path.stem for path in FILES} & {"utils", "util", "helpers", "common", "misc", "base"} == set()


def test_only_the_store_and_its_keys_spell_a_redis_key() -> None:
    spelled = {path.name for path in FILES if "trainmaster:" in path.read_text().replace("`trainmaster:`", "")}
    assert spelled == {"keys.py"}
