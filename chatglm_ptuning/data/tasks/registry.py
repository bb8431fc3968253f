"""The tasks that the kit knows, and those that a user adds by a file."""

from __future__ import annotations

import difflib
from functools import cache
from pathlib import Path

from chatglm_ptuning.data.tasks.checked_yaml import read_yaml
from chatglm_ptuning.data.tasks.schema import parse_task
from chatglm_ptuning.data.tasks.task import Task

DEFINITIONS = Path(__file__).parent / "definitions"
"""One file per task, `NAME.yaml`."""


def task_names() -> list[str]:
    """The names of the tasks of the registry, sorted."""
    return sorted(path.stem for path in DEFINITIONS.glob("*.yaml"))


def load_task(name_or_path: str | Path) -> Task:
    """A task of the registry by its name or one of its other names, or the task of a YAML file.

    Raises:
        ValueError: if there is no such task or file, naming the nearest; or if the file is malformed, naming the key.
    """
    text = str(name_or_path)
    if text in _names():
        return _packaged(_names()[text])
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return read_task_file(path)
    near = difflib.get_close_matches(text, _names(), n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else "`chatglm-ptuning tasks` lists them."
    raise ValueError(f"There is no task '{text}'; {hint} A task of your own is named by its file, MY_TASK.yaml.")


def read_task_file(path: Path) -> Task:
    """The task that a YAML file describes.

    Raises:
        ValueError: if the file is missing, not YAML, or not a task, naming the file and the key.
    """
    return parse_task(read_yaml(path, "task file"))


@cache
def _packaged(name: str) -> Task:
    return read_task_file(DEFINITIONS / f"{name}.yaml")


@cache
def _names() -> dict[str, str]:
    """Every name that a packaged task goes by -> the name of its file."""
    names = {name: name for name in task_names()}
    for name in task_names():
        names |= dict.fromkeys(_packaged(name).aliases, name)
    return names
