"""The rooms of the package: who may import whom."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "chatglm_ptuning"


def imported_by(path: Path) -> set[str]:
    """The package's modules that a file imports, for type checking too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("chatglm_ptuning"):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.startswith("chatglm_ptuning.")}
    return names


@pytest.fixture(scope="module")
def imports() -> dict[str, set[str]]:
    """Every module of the package with the modules that it imports."""
    modules = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = imported_by(path)
    return {name: found & modules.keys() - {name} for name, found in modules.items()}


def reachable(imports: dict[str, set[str]], start: str) -> set[str]:
    found, waiting = set(), [start]
    while waiting:
        new = imports[waiting.pop()] - found
        found |= new
        waiting += new
    return found


def test_prefix_is_the_ground_floor(imports):
    allowed = ("chatglm_ptuning.prefix", "chatglm_ptuning.files", "chatglm_ptuning.version")
    for module, names in imports.items():
        if module.startswith("chatglm_ptuning.prefix"):
            assert all(name.startswith(allowed) for name in names), (module, names)


def test_no_import_goes_up(imports):
    floors = ["prefix", "chat", "model", "metrics", "data", "tuning", "evaluation", "training", "experiments"]
    floor_of = {name: floors.index(part) for name in imports for part in name.split(".")[1:2] if part in floors}
    for module, names in imports.items():
        own = floor_of.get(module, len(floors))
        assert [name for name in names if floor_of.get(name, 0) > own] == [], module


def test_no_circle_of_modules(imports):
    assert [name for name in imports if name in reachable(imports, name)] == []
