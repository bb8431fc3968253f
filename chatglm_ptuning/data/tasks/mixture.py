"""A mixture file: which tasks share a prefix, where their files are, and how often each is seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils import logging

from chatglm_ptuning.data.sources.hub import is_on_hub
from chatglm_ptuning.data.tasks.checked_yaml import FieldChecker, nearest, read_yaml
from chatglm_ptuning.data.tasks.heads import head_of, heads_of
from chatglm_ptuning.data.tasks.registry import load_task
from chatglm_ptuning.data.tasks.task import Task

logger = logging.get_logger(__name__)

_KEYS = ("temperature", "tasks")
_KEYS_OF_A_TASK = (
    "task", "task_data", "head", "train_split", "eval_split", "max_train_samples", "max_eval_samples", "weight",
)  # fmt: skip


@dataclass(frozen=True)
class MixedTask:
    """One task of a mixture.

    Attributes:
        task_data: as --task_data, a folder being relative to the mixture file.
        weight: how often it is drawn in proportion to the others; None if the sizes say so.
    """

    task: Task
    task_data: str
    head: str
    train_split: str | None = None
    eval_split: str | None = None
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    weight: float | None = None


@dataclass(frozen=True)
class Mixture:
    """What a mixture file says.

    Attributes:
        temperature: T of the probabilities `size ** (1 / T)`; 1 draws by size, a large one evenly.
    """

    tasks: Sequence[MixedTask]
    temperature: float = 1.0

    def probabilities(self, sizes: Sequence[int]) -> list[float]:
        """How likely a batch is of each task.

        T5 (Raffel et al. 2020, section 3.5.2) calls the two ways temperature-scaled and custom mixing.

        Args:
            sizes: rows to train on of each task.
        """
        weights = [entry.weight for entry in self.tasks]
        if None in weights:
            weights = [size ** (1 / self.temperature) for size in sizes]
        return [weight / sum(weights) for weight in weights]


def read_mixture(path: str | Path) -> Mixture:
    """The mixture that a YAML file describes.

    Raises:
        ValueError: naming the file, the key and the way out, for anything that is missing, unknown or does not fit.
    """
    path = Path(path)
    return _MixtureChecker(path).mixture(read_yaml(path, "mixture file"))


class _MixtureChecker(FieldChecker):
    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self.folder = path.parent

    def mixture(self, content: Any) -> Mixture:
        content = self.mapping(content, "the mixture file")
        self.known_keys(content, _KEYS, "key")
        named = self.mapping(content.get("tasks"), "'tasks'")
        entries = [self.entry(self.text(name, "tasks"), value) for name, value in named.items()]
        if not entries:
            self.fail("'tasks' names no task; write for example `tasks: {eprstmt: {task_data: FOLDER}}`.")
        names = [entry.task.name for entry in entries]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            self.fail(f"the task {twice} stands twice in 'tasks'.")
        weighted = [entry.task.name for entry in entries if entry.weight is not None]
        if weighted and len(weighted) < len(entries):
            without = next(name for name in names if name not in weighted)
            self.fail(f"{weighted[0]} has a 'weight' and {without} has none; give one to every task, or to none.")
        if weighted and "temperature" in content:
            self.fail("with a 'weight' for every task there is no 'temperature'; leave one of them out.")
        return Mixture(entries, self.positive_float(content.get("temperature", 1.0), "temperature"))

    def entry(self, name: str, value: Any) -> MixedTask:
        what = f"tasks.{name}"
        value = self.mapping(value, f"'{what}'")
        self.known_keys(value, _KEYS_OF_A_TASK, f"key of {what}")
        task = self.task(self.text(value.get("task", name), f"{what}.task"))
        if "task" in value and name not in (task.name, *task.aliases):
            logger.warning(f"{self.origin}: '{name}' is the task {task.name}; scores and --task call it that.")
        if "task_data" not in value:
            self.fail(f"'{what}' has no 'task_data': the folder with its files, or huggingface or modelscope.")
        return MixedTask(
            task,
            self.place(self.text(value["task_data"], f"{what}.task_data")),
            self.head(task, value, what),
            self.split(task, value, "train_split", what),
            self.split(task, value, "eval_split", what),
            self.count(value, "max_train_samples", what),
            self.count(value, "max_eval_samples", what),
            self.positive_float(value["weight"], f"{what}.weight") if "weight" in value else None,
        )

    def task(self, name: str) -> Task:
        own = self.folder / name
        try:
            return load_task(own if own.is_file() else name)
        except ValueError as error:
            self.fail(str(error))

    def place(self, task_data: str) -> str:
        return task_data if is_on_hub(task_data) else str(self.folder / Path(task_data).expanduser())

    def head(self, task: Task, value: Mapping[str, Any], what: str) -> str:
        named = value.get("head")
        if named is not None:
            self.one_of(named, heads_of(task), f"{what}.head")
        head = head_of(task, named)
        head.check(task)
        return head.name

    def split(self, task: Task, value: Mapping[str, Any], key: str, what: str) -> str | None:
        if key not in value:
            return None
        name = self.text(value[key], f"{what}.{key}")
        if name not in task.files:
            self.fail(
                f"{what}.{key}: {task.name} has no split '{name}'{nearest(name, list(task.files))}; there are "
                f"{', '.join(task.files)}."
            )
        return name

    def count(self, value: Mapping[str, Any], key: str, what: str) -> int | None:
        return self.positive_int(value[key], f"{what}.{key}") if key in value else None
