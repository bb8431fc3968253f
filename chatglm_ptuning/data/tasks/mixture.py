"""A mixture file: which tasks share a prefix, where their data are, and how often each task is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, field_validator
from pydantic.dataclasses import dataclass
from transformers.utils import logging

from chatglm_ptuning.data.sources.hub import is_on_hub
from chatglm_ptuning.data.tasks.checked_yaml import FORBID, Count, PositiveNumber, Text, nearest, read_yaml
from chatglm_ptuning.data.tasks.heads import head_of, heads_of
from chatglm_ptuning.data.tasks.registry import load_task
from chatglm_ptuning.data.tasks.task import Task

logger = logging.get_logger(__name__)


def _loaded(name: Any, info: ValidationInfo) -> Any:
    """The packaged task of a name, or the task of a file, relative to the mixture file."""
    if not isinstance(name, str):
        return name
    own = info.context.path.parent / name
    return load_task(own if own.is_file() else name)


def _beside_file(task_data: str, info: ValidationInfo) -> str:
    folder = info.context.path.parent
    return task_data if is_on_hub(task_data) else str(folder / Path(task_data).expanduser())


@dataclass(frozen=True, config=FORBID)
class MixedTask:
    """One task of a mixture.

    Attributes:
        task_data: folder of the files of all tasks; a folder in the file is relative to the mixture file.
        head: that solves the task; the task's default head if none is named.
        weight: how often it is drawn in proportion to the others; None to draw by size.
    """

    task: Annotated[Task, BeforeValidator(_loaded)]
    task_data: Annotated[
        Text,
        AfterValidator(_beside_file),
        Field(description="the folder with its files, or huggingface or modelscope"),
    ]
    head: Annotated[str, Field(validate_default=True)] = ""
    train_split: str | None = None
    eval_split: str | None = None
    max_train_samples: Count | None = None
    max_eval_samples: Count | None = None
    weight: PositiveNumber | None = None

    @field_validator("head")
    @classmethod
    def _solves(cls, head: str, info: ValidationInfo) -> str:
        task = info.data.get("task")
        if task is None:  # it was refused
            return head
        if head and head not in heads_of(task):
            known = list(heads_of(task))
            raise ValueError(f"is no head of {task.name}{nearest(head, known)}: there are {', '.join(known)}")
        chosen = head_of(task, head or None)
        chosen.check(task)
        return chosen.name

    @field_validator("train_split", "eval_split")
    @classmethod
    def _is_there(cls, split: str | None, info: ValidationInfo) -> str | None:
        task = info.data.get("task")
        if task is not None and split is not None and split not in task.files:
            known = list(task.files)
            raise ValueError(f"is no split of {task.name}{nearest(split, known)}: there are {', '.join(known)}")
        return split


def _named(tasks: Any) -> Any:
    """The entries with the key `task`, which by default is the name of the entry."""
    if not isinstance(tasks, Mapping):
        return tasks
    return {name: {"task": name, **entry} if isinstance(entry, Mapping) else entry for name, entry in tasks.items()}


@dataclass(frozen=True, config=FORBID)
class _MixtureFile:
    tasks: Annotated[Mapping[Text, MixedTask], BeforeValidator(_named)]
    temperature: PositiveNumber = 1.0


@dataclass(frozen=True, config=FORBID)
class Mixture:
    """The content of a mixture file.

    Attributes:
        temperature: T of the probabilities `size ** (1 / T)`; 1 draws by size, a large T uniformly.
    """

    tasks: tuple[MixedTask, ...]
    temperature: float = 1.0

    def probabilities(self, sizes: Sequence[int]) -> list[float]:
        """The probability of each task for a batch.

        Temperature-scaled or, with weights, custom mixing of T5 (Raffel et al. 2020, section 3.5.2).

        Args:
            sizes: number of training rows of each task.
        """
        weights = [entry.weight for entry in self.tasks]
        if None in weights:
            weights = [size ** (1 / self.temperature) for size in sizes]
        return [weight / sum(weights) for weight in weights]


def read_mixture(path: str | Path) -> Mixture:
    """The mixture that a YAML file describes.

    Raises:
        ValueError: naming file, line and key that is missing, unknown or does not fit.
    """
    file = read_yaml(Path(path), "mixture file")
    found = file.read(_MixtureFile)
    if not found.tasks:
        raise file.error(
            ("tasks",), "'tasks' names no task; write for example `tasks: {eprstmt: {task_data: FOLDER}}`."
        )
    seen: dict[str, str] = {}
    weighted = [entry.task.name for entry in found.tasks.values() if entry.weight is not None]
    for key, entry in found.tasks.items():
        place, name = ("tasks", key), entry.task.name
        if name in seen:
            raise file.error(place, f"duplicate task {name} in 'tasks', as {seen[name]} and as {key}.")
        seen[name] = key
        if weighted and entry.weight is None:
            raise file.error(
                place, f"{weighted[0]} has a 'weight' and {name} has none; give every task a weight, or none."
            )
        if "task" in file.content["tasks"][key] and key not in (name, *entry.task.aliases):
            logger.warning(f"{path}: '{key}' is the task {name}, the name to use for it elsewhere.")
    if weighted and "temperature" in file.content:
        raise file.error(("temperature",), "'temperature' cannot be used with 'weight'; remove one of them.")
    return Mixture(tuple(found.tasks.values()), found.temperature)
