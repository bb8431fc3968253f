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


FLOORS = (
    ("exact_json", "files", "figures", "tables", "version"),
    ("prefix",),
    ("chat",),
    ("model",),
    ("metrics",),
    ("command_line",),
    ("exchange",),
    ("serving/engine",),
    ("data",),
    ("tuning",),
    ("evaluation",),
    ("training",),
    ("experiments",),
    ("estimation",),
    ("serving",),
    ("cli", "__main__"),
)
"""The rooms from the lowest up, as docs/architecture.md lists them."""


def room_of(module: str) -> str:
    """The room of a module below the package itself."""
    _, room, *inside = module.split(".")
    return f"{room}/{inside[0]}" if inside and f"{room}/{inside[0]}" in sum(FLOORS, ()) else room


def test_no_import_goes_up(imports):
    floor_of = {name: floor for floor, names in enumerate(FLOORS) for name in names}
    for module, names in imports.items():
        rooms = {room_of(name) for name in names if "." in name}
        if "." in module:
            own = floor_of[room_of(module)]
            assert [room for room in rooms if floor_of[room] > own] == [], module


@pytest.mark.parametrize("room", ["exchange", "estimation", "serving"])
def test_the_estimate_and_the_chat_need_no_data(imports, room):
    below = {room, *sum(FLOORS[: FLOORS.index(("data",))], ())}
    own = {name for module, names in imports.items() if module.startswith(f"chatglm_ptuning.{room}.") for name in names}
    assert {room_of(name) for name in own if "." in name} <= below


def test_the_page_lists_the_rooms_in_their_order():
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text("utf-8")
    table = page[page.index("| room |") : page.index("## From the command")]
    places = [table.index(f"`{name}.py`" if (PACKAGE / f"{name}.py").exists() else f"`{name}/`")
              for names in FLOORS for name in names if name != "__main__"]  # fmt: skip
    assert places == sorted(places)


def test_no_circle_of_modules(imports):
    assert [name for name in imports if name in reachable(imports, name)] == []
